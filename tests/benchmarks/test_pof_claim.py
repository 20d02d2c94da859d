"""The claim on PoF: training on by hand, the head's block, the rule of its verdict."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks import noisy_digits, noisy_loops
from benchmarks.claims import pof as claim
from benchmarks.claims.pof import ALL, BEFORE, FLAT, FROZEN, HEAD, LOSS, POF, SAME
from benchmarks.noisy_loops import Recipe, as_arrays, is_head
from jaxlab.sharpness import join_head, pof_perturb, split_head

NET = noisy_digits.net("MLP-S")
SIZES = {"epochs": 1, "batch_size": 256, "probe_size": 300}
KEY = jax.random.key(5)
RATE = 0.3


def records():
    found = {}
    for setting in (claim.NOISY, claim.CLEAN):
        for method in (FROZEN, ALL, POF):
            top = [1.0, 1.1, 0.9] if method == POF else [2.0, 2.1, 2.2]
            found[setting, method] = {
                "case": {"setting": setting, "method": method, "by": FLAT},
                "samples": {LOSS: [0.5, 0.6, 0.5], HEAD: top},
            }
        # Neither of these is judged.
        for method, by in ((BEFORE, claim.ACCURATE), (FROZEN, SAME)):
            found[setting, by] = {
                "case": {"setting": setting, "method": method, "by": by},
                "samples": {LOSS: [9.0] * 3, HEAD: [0.1] * 3},
            }
    return found


def word(found):
    return claim.verdict(list(found.values())).word


def test_all_parts_make_it_shown():
    assert word(records()) == "shown"


CASES = [(s, m) for s in (claim.NOISY, claim.CLEAN) for m in (FROZEN, ALL)]
BROKEN = {
    "no less curvature": (HEAD, [1.0, 1.1, 0.9]),
    "less in the mean only": (HEAD, [2.0, 1.0, 1.0]),
    "more curvature": (HEAD, [0.5, 0.5, 0.4]),
    "a lower loss": (LOSS, [0.4, 0.5, 0.4]),
    "a higher loss": (LOSS, [0.6, 0.7, 0.6]),
}


@pytest.mark.parametrize("case", CASES, ids="-".join)
@pytest.mark.parametrize("name", BROKEN)
def test_any_part_that_fails_makes_it_not_shown(name, case):
    found = copy.deepcopy(records())
    what, values = BROKEN[name]
    found[case]["samples"][what] = values
    assert word(found) == "not shown"
    assert claim.verdict(list(found.values())).why.count("no: ") == 1


def test_more_curvature_everywhere_is_reversed_if_losses_are_similar():
    found = records()
    for case in CASES:
        found[case]["samples"][HEAD] = [0.5, 0.5, 0.4]
    assert word(found) == "reversed"
    found[CASES[0]]["samples"][LOSS] = [0.4, 0.5, 0.4]
    assert word(found) == "not shown"


def test_the_least_curvature_in_the_band_wins():
    before = [1.0, 2.0]
    measured = lambda loss, top: {LOSS: [loss, 2 * loss], HEAD: [top, top]}
    tried = [
        [{"rate": 1.0}, measured(1.0, 5.0)],
        [{"rate": 2.0}, measured(0.96, 4.0)],
        [{"rate": 3.0}, measured(1.049, 3.0)],
        [{"rate": 4.0}, measured(1.06, 2.0)],
        [{"rate": 5.0}, measured(0.94, 1.0)],
    ]
    assert claim.flattest(tried, before) == {"rate": 3.0}
    assert claim.flattest(tried[:2], before) == {"rate": 2.0}
    assert claim.flattest(tried[4:] + tried[3:4], before) == {"rate": 4.0}


def test_settings_are_what_they_say():
    full = claim.PRESETS["full"]
    for setting, rows in ((claim.NOISY, 1_078), (claim.CLEAN, 300)):
        one, two = (claim.splits(setting, seed) for seed in (0, 1))
        assert [len(part) for part in one.train] == [rows, rows]
        assert (one.wrong.mean() > 0.19) == (setting == claim.NOISY)
        assert np.any(np.asarray(one.train[1]) != np.asarray(two.train[1]))
        place = claim.Place(setting, full)
        assert place.recipe(ALL, full.base_steps).steps == 800
        assert place.recipe(POF, full.steps).steps == 160
    clean = noisy_digits.splits(0, share=0.0).train
    picked = claim.splits(claim.CLEAN, 0).train
    pairs = {(x.tobytes(), int(y)) for x, y in zip(*map(np.asarray, clean))}
    assert all((x.tobytes(), int(y)) in pairs for x, y in zip(*map(np.asarray, picked)))


def by_hand(method, numbers, params, train):
    """Trains on in a Python loop, one gradient of the whole tree at a time."""
    made = Recipe(NET, method, **SIZES)
    of_batch, of_probe, of_moves = jax.random.split(KEY, 3)
    index = made.order(of_batch).reshape(made.steps, -1)
    probes = noisy_digits.batches(of_probe, rows=1_078, batch_size=300, steps=4)
    keys = jax.random.split(of_moves, made.steps)
    slope, loss = jax.jit(jax.grad(NET.loss_fn)), jax.jit(NET.loss_fn)
    features, head = split_head(params, is_head)
    speed = jax.tree.map(jnp.zeros_like, params)
    for number, (rows, probe, key) in enumerate(zip(index, probes, keys, strict=True)):
        batch, other = ((train[0][i], train[1][i]) for i in (rows, probe))
        at = params
        if method == POF:
            features = split_head(params, is_head)[0]
            of_head = lambda h, f=features, b=other: loss(join_head(f, h), b)
            options = {"sampling_range": numbers["range"], "max_step": made.max_step}
            at = join_head(features, pof_perturb(key, of_head, head, **options)[0])
        rate = numbers["rate"] * (1 + np.cos(np.pi * number / made.steps)) / 2
        grads = slope(at, batch)
        speed = jax.tree.map(lambda v, g: 0.9 * v + g, speed, grads)
        moved = jax.tree.map(lambda p, v, r=rate: p - r * v, params, speed)
        kept = moved if method == ALL else params
        params = join_head(split_head(moved, is_head)[0], split_head(kept, is_head)[1])
    return params


@pytest.fixture(scope="module")
def start():
    return NET.start(jax.random.key(1)), noisy_digits.splits(0).train


@pytest.mark.parametrize("method", [FROZEN, ALL, POF])
def test_training_on_is_that_of_a_loop_by_hand(method, start):
    numbers = {"rate": RATE, "range": 2.0}
    made = Recipe(NET, method, **SIZES)
    found = noisy_loops.post_train(made, as_arrays(numbers), KEY, *start)
    expected = by_hand(method, numbers, *start)
    near = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5)
    jax.tree.map(near, found.params, expected)
    heads = [found.params["layers"][2]["kernel"], start[0]["layers"][2]["kernel"]]
    assert np.array_equal(*heads) == (method != ALL)
    assert found.capped == found.idle == 0
    if method == POF:
        still = noisy_loops.post_train(
            made, as_arrays(numbers | {"range": 0.0}), KEY, *start
        )
        made = Recipe(NET, FROZEN, **SIZES)
        plain = noisy_loops.post_train(made, as_arrays(numbers), KEY, *start)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7),
            still.params,
            plain.params,
        )
        apart = optax.tree.norm(optax.tree.sub(found.params, plain.params))
        assert apart > 1e-2


def test_the_heads_eigenvalue_is_that_of_the_dense_block(start):
    params, train = start
    x, y = train[0][:200], train[1][:200]
    layers = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)["layers"]
    *hidden, last = (layers[i] for i in range(3))
    features = np.asarray(x, np.float64)
    for layer in hidden:
        features = np.maximum(features @ layer["kernel"] + layer["bias"], 0)
    logits = features @ last["kernel"] + last["bias"]
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    features = np.c_[features, np.ones(len(x))]  # the bias
    middle = np.einsum("nk,kl->nkl", p, np.eye(10)) - np.einsum("nk,nl->nkl", p, p)
    dense = np.einsum("ni,nj,nkl->ikjl", features, features, middle) / len(x)
    expected = np.linalg.eigvalsh(dense.reshape(650, 650))[-1]
    found = noisy_loops.top_head_eigenvalue(NET, params, (x, y))
    np.testing.assert_allclose(found, expected, rtol=1e-4)
