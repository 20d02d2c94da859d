"""The claim on network subspaces: its runs, its search, the rule of its verdict."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks import noisy_digits, subspace_nets
from benchmarks.claims import subspaces as claim
from benchmarks.subspace_nets import METHODS, NET, Config, Options

SEEDS = 4
OPTIONS = Options(
    seeds=2,
    tuning_seeds=2,
    shares=(0.4,),
    steps=6,
    batch_size=32,
    rates=(1.0, 2.0, 4.0),
    subspace_rates=(2.0, 4.0),
    decays=(0.0, 0.1, 0.2),
    betas=(0.0, 3.0),
    tails=((0.5, 0.2),),
)


# The verdict


def jittered(accuracy):
    return [accuracy + 0.001 * place for place in range(SEEDS)]


def along(values):
    return [[value + 0.001 * place for value in values] for place in range(SEEDS)]


FLAT = [0.93] + [0.95] * 9 + [0.93]
SAGGING = [0.9, 0.85, 0.8, 0.7, 0.6, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9]


def records():
    found = {}
    for share, sgd, line in (("0%", 0.97, 0.97), ("20%", 0.9, 0.95), ("40%", 0.8, 0.9)):
        for decay in (claim.TUNED, claim.NONE):
            for name, accuracy in (("SGD", sgd), ("SWA", line), ("line", line)):
                case = {
                    "wrong labels": share,
                    "weight decay": decay,
                    "method": name,
                }
                samples = {"accuracy": jittered(accuracy)}
                samples["along"] = along(FLAT if name == "line" else SAGGING)
                found[share, decay, name] = {"case": case, "samples": samples}
    return found


def word(found):
    return claim.verdict(list(found.values())).word


def test_all_parts_make_it_shown():
    assert word(records()) == "shown"


NOTCH = [*FLAT[:7], 0.92, *FLAT[8:]]
DENT = [*FLAT[:7], 0.926, *FLAT[8:]]  # 0.4 points below the ends
SHALLOW = [0.9] * 5 + [0.81] + [0.9] * 5
UNEVEN = [[0.9] * 5 + [low] + [0.9] * 5 for low in (0.5, 0.5, 0.9, 0.9)]
# What is changed, and the part that fails by it (others may too).
BROKEN = {
    "no better than SGD": ("20%", "line", "accuracy", jittered(0.9), claim.BETTER),
    "better in the mean only": (
        "20%",
        "line",
        "accuracy",
        [0.9, 0.9, 0.9, 1.0],
        claim.BETTER,
    ),
    "worse than SWA": ("40%", "SWA", "accuracy", jittered(0.906), claim.AS_GOOD),
    "as good as SWA in the mean only": (
        "40%",
        "SWA",
        "accuracy",
        [0.88, 0.92, 0.88, 0.92],
        claim.AS_GOOD,
    ),
    "as much gained on clean labels": (
        "0%",
        "SGD",
        "accuracy",
        jittered(0.87),
        claim.MORE,
    ),
    "one inner point below": ("40%", "line", "along", along(NOTCH), claim.INNER),
    "no collapse": ("20%", "SGD", "along", along(SHALLOW), claim.APART),
    "a collapse of some seeds": ("20%", "SGD", "along", UNEVEN, claim.APART),
}


@pytest.mark.parametrize("name", BROKEN)
def test_any_part_that_fails_makes_it_not_shown(name):
    found = copy.deepcopy(records())
    share, method, what, values, part = BROKEN[name]
    found[share, claim.TUNED, method]["samples"][what] = values
    assert word(found) == "not shown"
    judged = claim.parts(list(found.values()), claim.TUNED)
    assert len(judged) == 10
    failed = {(p.share, p.what) for p in judged if not p.held}
    where = {"20%", "40%"} if share == "0%" else {share}
    assert failed >= {(s, part) for s in where}
    assert {s for s, _ in failed} == where
    why = claim.verdict(list(found.values())).why
    assert why.count("no: ") == len(failed)
    assert why.count("yes: ") == 10 - len(failed)


def test_an_inner_point_a_little_below_the_ends_is_as_good():
    found = records()
    found["40%", claim.TUNED, "line"]["samples"]["along"] = along(DENT)
    assert word(found) == "shown"


def test_what_has_no_weight_decay_is_not_judged():
    found = records()
    for key, record in found.items():
        if key[1] == claim.NONE:
            record["samples"]["accuracy"] = [0.1] * SEEDS
    assert word(found) == "shown"


def test_a_middle_that_is_a_little_below_swa_is_as_good():
    found = records()
    found["20%", claim.TUNED, "SWA"]["samples"]["accuracy"] = jittered(0.954)
    assert word(found) == "shown"


def test_worse_than_sgd_at_each_share_is_reversed():
    found = records()
    for share, expected in (("20%", "not shown"), ("40%", "reversed")):
        found[share, claim.TUNED, "line"]["samples"]["accuracy"] = jittered(0.5)
        assert word(found) == expected


# The runs


def at(tree, *index):
    return jax.tree.map(lambda w: w[index], tree)


def prepared(kind):
    keys = jax.random.split(jax.random.key(0), 2)
    return subspace_nets.prepared(kind, keys, steps=6, batch_size=32)


@pytest.fixture(scope="module")
def data():
    return noisy_digits.splits(0, share=0.4)


CONFIGS = {
    "network": Config(0.2, decay=0.01),
    "line": Config(0.2, decay=0.01, beta=0.5, begin=0.5, tail=0.25),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_training_is_that_of_a_plain_loop(kind, data):
    config = CONFIGS[kind]
    starts, draws = prepared(kind)
    labels = jnp.stack([data.train[1], (data.train[1] + 1) % 10])
    numbers = Config(*map(jnp.float32, config))
    found = at(subspace_nets.train(starts, draws, data.train[0], labels, numbers), 1)

    gradient = jax.jit(jax.grad(NET.loss_fn))
    angle = jax.jit(jax.grad(claim_cosine, argnums=(0, 1)))
    ends = [at(starts, 1, i) for i in range(subspace_nets.NUM_ENDPOINTS[kind])]
    trace = [optax.tree.zeros_like(w) for w in ends]
    kept = []
    for step in range(6):
        rows, a = draws.rows[1, step], np.asarray(draws.coefficients[1, step])
        point = jax.tree.map(lambda *w: sum(x * y for x, y in zip(a, w)), *ends)  # noqa: B023
        slope = gradient(point, (data.train[0][rows], labels[1][rows]))
        pulls = [optax.tree.zeros_like(w) for w in ends]
        if kind == "line":
            pulls = angle(*ends)
        cosine = lambda part: (1 + np.cos(np.pi * min(part, 1))) / 2
        rate = config.rate * cosine(step / 6)
        if config.tail >= 0:
            rate = config.rate * (0.25 + 0.75 * cosine(step / 3))
        for i, w in enumerate(ends):
            full = jax.tree.map(
                lambda g, p, x: a[i] * g + config.beta * p + config.decay * x,  # noqa: B023
                slope,
                pulls[i],
                w,
            )
            trace[i] = jax.tree.map(lambda t, g: 0.9 * t + g, trace[i], full)
            ends[i] = jax.tree.map(lambda x, t: x - rate * t, w, trace[i])  # noqa: B023
        if step == 5 or (config.begin < 1 and step >= 3):
            kept.append(list(ends))
    for i in range(len(ends)):
        mean = jax.tree.map(lambda *w: sum(w) / len(w), *[k[i] for k in kept])
        close = lambda f, e: np.testing.assert_allclose(f, e, rtol=1e-3, atol=1e-5)
        jax.tree.map(close, at(found, i), mean)


def claim_cosine(first, second):
    """Flattens matrices alone, and takes NumPy's formula."""
    flat = lambda t: jnp.concatenate(
        [w.ravel() for w in jax.tree.leaves(t) if w.ndim > 1]
    )
    u, v = flat(first), flat(second)
    return (u @ v) ** 2 / ((u @ u) * (v @ v))


def test_every_kind_begins_at_the_same_network_with_the_same_batches():
    (one, draws), (three, others) = prepared("network"), prepared("curve")
    same = lambda a, b: np.testing.assert_array_equal(a[:, 0], b[:, 0])
    jax.tree.map(same, one, three)
    np.testing.assert_array_equal(draws.rows, others.rows)
    np.testing.assert_array_equal(draws.coefficients, 1.0)
    starts = jax.tree.leaves(three)[-1]
    assert len({float(w.ravel()[-1]) for w in starts.reshape(6, -1)}) == 6
    np.testing.assert_allclose(others.coefficients.sum(-1), 1.0, rtol=1e-6)
    assert float(jnp.ptp(others.coefficients[..., 2])) > 0.1


def test_methods_read_the_means_of_probabilities(data):
    laboratory = subspace_nets.Laboratory(OPTIONS, 0.4)
    x, y = rows = data.test
    softmax = lambda w: jax.nn.softmax(NET.apply_fn(w, x))

    def check(method, runs, expected):
        found = laboratory.read(METHODS[method], runs, rows)
        for seed in range(2):
            p = np.asarray(expected(seed))
            right = np.mean(p.argmax(1) == y)
            assert float(found["accuracy"][seed]) == pytest.approx(right)
            loss = -np.mean(np.log(p[np.arange(len(y)), y]))
            assert float(found["loss"][seed]) == pytest.approx(loss, rel=1e-4)
            error = noisy_digits.calibration_error(jnp.asarray(p), y)
            np.testing.assert_allclose(
                found["calibration error"][seed], error, atol=1e-5
            )

    config = Config(0.1)
    one, two = runs = laboratory.runs(METHODS["2 networks"], config, range(2))
    mean = lambda seed: (softmax(at(one, seed, 0)) + softmax(at(two, seed, 0))) / 2
    check("2 networks", runs, mean)
    check("SGD", runs[:1], lambda seed: softmax(at(one, seed, 0)))
    (line,) = laboratory.runs(METHODS["line"], config, range(2))
    mix = lambda seed, t: jax.tree.map(
        lambda w: (1 - t) * w[seed, 0] + t * w[seed, 1], line
    )
    points = lambda seed: (softmax(mix(seed, 0.25)) + softmax(mix(seed, 0.75))) / 2
    check("line, 2 points", [line], points)
    check("line", [line], lambda seed: softmax(mix(seed, 0.5)))

    found = np.array(subspace_nets.line_quality(one, two, rows))
    for seed in range(2):
        for place, run in ((0, one), (-1, two)):
            right = noisy_digits.accuracy(softmax(at(run, seed, 0)), y)
            assert found[seed, place] == pytest.approx(float(right))
    middle = np.mean(np.asarray(softmax(mix(0, 0.5)).argmax(1) == y))
    assert subspace_nets.line_quality(line, None, rows)[0][5] == pytest.approx(middle)
    np.testing.assert_allclose(
        subspace_nets.cosines(line),
        [claim_cosine(at(line, seed, 0), at(line, seed, 1)) for seed in range(2)],
        rtol=1e-3,
    )


def test_tuning_and_judging_share_nothing_but_rows():
    laboratory = subspace_nets.Laboratory(OPTIONS, 0.4)
    assert not set(laboratory.tuning) & set(laboratory.judging)
    masks = np.stack([np.asarray(d.wrong) for d in laboratory.data.values()])
    assert (masks.sum(1) == round(0.4 * noisy_digits.TRAIN)).all()
    assert len(np.unique(masks, axis=0)) == len(masks)


# The search


def errors(config):
    return [
        abs(config.rate - 2) + abs(config.decay - 0.1) + 0.1 * (config.beta == 0)
    ] * 2


def test_the_search_finds_the_best_of_its_planes():
    tried = subspace_nets.search(METHODS["line"], OPTIONS, errors)
    assert subspace_nets.chosen(tried) == Config(2.0, decay=0.1, beta=3.0)
    best = subspace_nets.chosen(tried, decay=False)
    assert best == Config(2.0, decay=0.0, beta=3.0)
    at_zero = {(c.rate, c.beta) for c in tried if not c.decay}
    assert len(at_zero) == 4  # the whole plane without decay
    assert {c.beta for c in tried if c.rate == 2 and c.decay} == {0.0, 3.0}
    assert len(tried) == 2 * 2 + 2 * 2 + 2


def test_methods_without_a_knob_try_rates_and_decays():
    tried = subspace_nets.search(METHODS["SGD"], OPTIONS, errors)
    assert len(tried) == 9
    assert all(c.begin == 1 and c.beta == 0 for c in tried)


def test_configurations_have_names_of_their_own():
    for method in METHODS.values():
        options = claim.PRESETS["full"]
        names = {str(Config(1.0, **knob)) for knob in method.knobs(options)}
        assert len(names) == len(method.knobs(options))
