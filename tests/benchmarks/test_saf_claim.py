"""The claim on SAF: its training loops by brute force, and the rule of its verdict."""

import copy
import dataclasses
import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks import noisy_digits, noisy_loops, timing
from benchmarks.claims import saf as claim
from benchmarks.noisy_loops import DECAY, MESA, SAF, SAM, SGD, Recipe
from jaxlab.sharpness import sam

NET = noisy_digits.net("MLP-S")
SIZES = {"epochs": 5, "batch_size": 256, "start": 2, "lag": 2}
KEY = jax.random.key(3)
RATE = 0.1

FLAT = [4.0, 5.0, 4.5]
SHARP = [8.0, 9.0, 9.5]


def records():
    cases = {
        SGD: SHARP,
        SAF: FLAT,
        claim.SAME: FLAT,
        SAM: FLAT,
        DECAY: SHARP,
        MESA: SHARP,
        claim.SWAPPED: SHARP,
    }
    found = {
        name: {"case": {"method": name}, "samples": {"top eigenvalue": values}}
        for name, values in cases.items()
    }
    for net in ("MLP-S", "CNN"):
        one, again = [1.0, 1.1, 1.0], [1.0, 1.08, 1.02]
        samples = {SGD: one, SAF: [1.05, 1.15, 1.06], SGD + timing.AGAIN: again}
        operations = {SGD: 1e6, SAF: 1.01e6}
        costs = {"samples": samples, "operations": operations}
        found[net] = {"case": {"cost": net}, **costs}
    return found


def word(found):
    return claim.verdict(list(found.values())).word


def test_all_parts_make_it_shown():
    assert word(records()) == "shown"


def curved(name, values):
    return lambda found: found[name]["samples"].update({"top eigenvalue": values})


BROKEN = {
    "as sharp as SGD": curved(SAF, SHARP),
    "as sharp at the same rate": curved(claim.SAME, SHARP),
    "flatter on two seeds only": curved(SAF, [4.0, 5.0, 12.0]),
    "sharper in one of two comparisons": curved(SAF, [80.0, 90.0, 95.0]),
    "slow on one net": lambda found: found["CNN"]["samples"].update(
        {SAF: [1.2, 1.3, 1.2]}
    ),
    "more operations": lambda found: found["MLP-S"]["operations"].update({SAF: 1.06e6}),
}


@pytest.mark.parametrize("name", BROKEN)
def test_any_part_that_fails_makes_it_not_shown(name):
    found = copy.deepcopy(records())
    BROKEN[name](found)
    assert word(found) == "not shown"
    assert claim.verdict(list(found.values())).why.count("no: ") == 1


def test_sharper_by_both_comparisons_is_reversed():
    found = records()
    for name in (SAF, claim.SAME):
        curved(name, [80.0, 90.0, 95.0])(found)
    assert word(found) == "reversed"


@pytest.mark.parametrize("which", [SGD, DECAY, SAM])
def test_loops_agree_with_those_of_the_shared_setting(which):
    made = Recipe(NET, which, **SIZES)
    links = {DECAY: optax.add_decayed_weights, SAM: sam}
    name = {DECAY: "decay", SAM: "radius"}.get(which)

    def make(rate, **number):
        first = [links[which](*number.values())] if number else []
        return optax.chain(*first, noisy_digits.momentum_sgd(rate, made.steps))

    numbers = {"rate": RATE} | ({name: 0.05} if name else {})
    data = noisy_digits.splits(0)
    ours = noisy_loops.train(made, numbers, KEY, data.train)
    sizes = {"steps": made.steps, "batch_size": made.batch_size}
    theirs = noisy_digits.train(NET, make, numbers, KEY, data, **sizes).params
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), ours, theirs)


def softmax(logits):
    shifted = np.exp(logits - logits.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)


def by_hand(which, train, *, weight, average):
    """Trains in a Python loop, with a dictionary of logits; counts the rows known."""
    made = Recipe(NET, which, **SIZES)
    start, order = jax.random.split(KEY)
    params = teacher = NET.start(start)
    speed = jax.tree.map(jnp.zeros_like, params)
    memory, seen, number = {}, [], 0
    pull = jax.jit(  # the gradient of sum(slopes * logits)
        lambda p, x, slopes: jax.vjp(lambda p: NET.apply_fn(p, x), p)[1](slopes)[0]
    )
    for epoch, batches in enumerate(np.asarray(made.order(order))):
        for rows in batches:
            x, y = train[0][rows], np.asarray(train[1])[rows]
            logits = np.asarray(NET.apply_fn(params, x))
            past = np.asarray(NET.apply_fn(teacher, x))
            slopes = (softmax(logits) - np.eye(10)[y]) / len(rows)
            for place, row in enumerate(rows):
                known = which == MESA or (row, epoch - made.lag) in memory
                if epoch > made.start:
                    seen.append(known)
                if epoch > made.start and known:
                    old = past[place] if which == MESA else memory[row, epoch - 2]
                    gap = softmax(logits[place] / 5) - softmax(old / 5)
                    slopes[place] += weight * 5 * gap / len(rows)
                memory[row, epoch] = logits[place]
            grads = pull(params, x, jnp.asarray(slopes, jnp.float32))
            rate = RATE * (1 + np.cos(np.pi * number / made.steps)) / 2
            speed = jax.tree.map(lambda v, g: 0.9 * v + g, speed, grads)
            params = jax.tree.map(lambda p, v, r=rate: p - r * v, params, speed)
            teacher = jax.tree.map(
                lambda t, p: average * t + (1 - average) * p, teacher, params
            )
            number += 1
    return params, np.mean(seen)


@pytest.mark.parametrize("which", [SAF, MESA])
def test_the_term_is_that_of_a_loop_by_hand(which):
    train = noisy_digits.splits(0).train
    own = {"weight": 3.0, "average": 0.9}
    expected, share = by_hand(which, train, **own)
    # An epoch leaves 54 of 1,078 rows out: 5 % are not known two epochs later.
    assert 0.93 < share < 0.97 if which == SAF else share == 1
    made, numbers = Recipe(NET, which, **SIZES), {"rate": RATE} | own
    found = noisy_loops.train(made, numbers, KEY, train)
    near = lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5)
    jax.tree.map(near, found, expected)
    plain = noisy_loops.train(made, numbers | {"weight": 0.0}, KEY, train)
    apart = lambda a, b: float(np.max(np.abs(np.asarray(a) - np.asarray(b))))
    assert max(jax.tree.leaves(jax.tree.map(apart, found, plain))) > 1e-3
    sgd = noisy_loops.train(Recipe(NET, SGD, **SIZES), {"rate": RATE}, KEY, train)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), plain, sgd)


def test_cost_times_each_method_and_counts_its_operations():
    options = dataclasses.replace(claim.PRESETS["small"], rounds=1)
    seconds, operations = claim.cost("MLP-S", options)
    assert set(seconds) == {*options.timed, SGD + timing.AGAIN}
    # Forward and backward; the slopes at the inputs of the first layer are not needed.
    products = 64 * (3 * (64 * 64 + 64 * 10) + 2 * 64 * 64)
    assert 2 * products < operations[SGD] < 2.4 * products
    assert 1 < operations[SAF] / operations[SGD] < 1.05


def test_the_best_numbers_win_and_ends_are_named():
    tried = [[{"rate": 1.0, "weight": w}, [w, 0.2]] for w in (0.3, 0.4, 0.1)]
    assert noisy_loops.chosen(tried)["weight"] == 0.4
    tied = [*tried, [{"rate": 2.0, "weight": 0.9}, [0.4, 0.2]]]
    assert noisy_loops.chosen(tied)["rate"] == 1.0
    assert noisy_loops.chosen(tied, rate=2.0)["weight"] == 0.9
    grid = {"rate": (1.0, 2.0, 3.0), "weight": (0.1, 0.4)}
    assert noisy_loops.at_ends({"rate": 2.0, "weight": 0.4}, grid) == ["weight"]
    full = claim.PRESETS["full"]
    assert set(claim.AUTHORS) <= set(full.weights)
    assert claim.recipe(SGD, full).steps == 800
    assert full.start == 0.3 * full.epochs


def test_repetitions_run_in_processes_of_their_own():
    first, second = noisy_loops.repeated(os.getpid, processes=2)
    assert len({first, second, os.getpid()}) == 3
    assert list(noisy_loops.repeated(os.getpid, processes=0)) == [os.getpid()]


def test_medians_of_each_process_are_told_apart():
    samples = {SGD: [1.0] * 6, SAF: [1.1, 1.2, 9.0, 2.0, 1.3, 1.3]}
    record = {"samples": samples, "options": {"rounds": 3}}
    assert claim.by_process(record, SAF) == "1.20 to 1.30"
