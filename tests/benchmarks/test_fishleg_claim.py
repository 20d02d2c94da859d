"""The claim on FishLeg: its races by hand, its exact step, the rule of its verdict."""

import copy
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks import autoencoder_races as races
from benchmarks import fishleg_tables, timing
from benchmarks.autoencoder_races import (
    ADAM,
    ADAM_COSINE,
    DAMPING,
    DECAY,
    EXACT,
    FISHLEG,
    FREE,
    HELD_OUT,
    MUON,
    RIVALS,
    SGD,
    TRAIN,
)
from benchmarks.claims import fishleg as claim
from jaxlab.curvature import ggn_operator

RATES, MARKS, SEED, BATCH = (0.003, 0.02), (2, 5), 3, 50
JUDGED, GOALS = (50, 100), (17.6, 16.6)
OURS = {50: [17.0, 17.2, 17.1], 100: [16.2, 16.4, 16.3]}


def records():
    options = {"judged": JUDGED, "goals": GOALS, "beside": (EXACT,)}
    found = {}
    for place, method in enumerate((*RIVALS, FISHLEG, EXACT)):
        above = 0 if method == FISHLEG else 0.1 * (place + 1)
        columns = zip(*OURS.values(), strict=True)
        losses = [[loss + above for loss in seed] for seed in columns]
        found[method] = {
            "case": {"task": claim.RACE, "method": method, "batch": 100},
            "marks": list(OURS),
            "options": options,
            "samples": {TRAIN: losses, claim.BEST: losses},
        }
    return found


def word(found):
    return claim.verdict(list(found.values())).word


def set_seed(method, seed, losses):
    return lambda found: found[method]["samples"][TRAIN].__setitem__(seed, losses)


def set_all(method, losses):
    return lambda found: found[method]["samples"].update({TRAIN: [losses] * 3})


def test_all_parts_make_it_shown():
    assert word(records()) == "shown"


BROKEN = {
    "a rival is ahead on one seed at one step": set_seed(MUON, 1, [17.5, 16.39]),
    "a rival is level": set_seed(SGD, 2, [17.1, 17.0]),
    "above a goal": set_seed(FISHLEG, 0, [17.0, 17.2]),
    "a rival is ahead at one step": set_all(ADAM, [10.0, 20.0]),
}


@pytest.mark.parametrize("name", BROKEN)
def test_any_part_that_fails_makes_it_not_shown(name):
    found = copy.deepcopy(records())
    if name == "above a goal":  # though every rival stays above FishLeg
        for method in RIVALS:
            set_all(method, [30.0, 30.0])(found)
    BROKEN[name](found)
    assert word(found) == "not shown"
    assert claim.verdict(list(found.values())).why.count("no: ") == 1


def test_what_is_not_judged_changes_no_word():
    found = records()
    set_all(EXACT, [1.0, 1.0])(found)
    for method in RIVALS:
        found[method]["samples"][claim.BEST] = [[1.0, 1.0]] * 3
    assert word(found) == "shown"


def test_a_rival_ahead_everywhere_makes_it_reversed():
    found = records()
    set_all(MUON, [16.0, 16.25])(found)
    assert word(found) == "not shown"
    set_all(MUON, [16.0, 16.0])(found)
    assert word(found) == "reversed"


@functools.cache
def stepper(make):
    @jax.jit
    def step(rate, params, state, x):
        def loss(params):
            squares = sum(jnp.sum(p**2) for p in jax.tree.leaves(params))
            logits = races.apply_fn(params, x)
            pixels = optax.losses.sigmoid_binary_cross_entropy(logits, x)
            return jnp.sum(pixels) / len(x) + 0.5e-5 * squares

        updates, state = make(rate).update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    return step


def by_hand(make, rate, mark):
    """Trains in a Python loop."""
    params, given = races.batches(SEED, batch_size=BATCH, steps=max(MARKS))
    state = make(rate).init(params)
    for index in given.index[:mark]:
        params, state = stepper(make)(rate, params, state, given.rows[index])
    return params, state


def loss_of(params, rows):
    logits = np.asarray(races.apply_fn(params, races.data()[rows]), float)
    x = np.asarray(races.data()[rows], float)
    return (np.logaddexp(0, logits) - x * logits).sum() / len(x)


MADE = {
    SGD: lambda rate: optax.sgd(rate, momentum=0.9),
    ADAM: optax.adam,
    FREE: optax.contrib.schedule_free_adamw,
}


@pytest.mark.parametrize("method", MADE)
def test_a_race_is_a_loop_by_hand_at_every_rate(method):
    found = races.race(method, RATES, SEED, marks=MARKS, batch=BATCH)
    for place, mark in np.ndindex(len(RATES), len(MARKS)):
        params, state = by_hand(MADE[method], RATES[place], MARKS[mark])
        if method == FREE:
            params = optax.contrib.schedule_free_eval_params(state, params)
        for rows in (TRAIN, HELD_OUT):
            expected = loss_of(params, rows)
            assert found[rows][place, mark] == pytest.approx(expected, rel=2e-5)


def test_a_cosine_ends_at_each_mark():
    found = races.race(ADAM_COSINE, RATES, SEED, marks=MARKS, batch=BATCH)[TRAIN]
    for place, mark in enumerate(MARKS):
        make = lambda rate, mark=mark: optax.adam(
            optax.cosine_decay_schedule(rate, mark)
        )
        expected = loss_of(by_hand(make, RATES[1], mark)[0], TRAIN)
        assert found[1, place] == pytest.approx(expected, rel=2e-5)


def test_no_row_comes_twice_in_a_batch_and_all_methods_see_the_same():
    first, one = races.batches(7, batch_size=100, steps=13)
    again, two = races.batches(7, batch_size=100, steps=13)
    jax.tree.map(np.testing.assert_array_equal, (first, one.index), (again, two.index))
    assert all(len(set(rows)) == 100 for rows in np.asarray(one.index))
    other = races.batches(8, batch_size=100, steps=13)[1].index
    assert not np.array_equal(one.index, other)
    assert sum(map(len, races.data().values())) == 1797


def test_the_exact_step_solves_and_one_product_goes_along_the_gradient():
    root = np.random.default_rng(0).normal(size=(6, 6))
    matrix, gradient = root @ root.T, np.arange(1.0, 7.0)
    product = lambda v: jnp.asarray(matrix, jnp.float32) @ v
    g = jnp.asarray(gradient, jnp.float32)
    step = lambda **options: races.exact_natural_gradient(0.5, **options).update(
        g, (), g, fisher_vp=product
    )[0]
    damped = matrix + 0.5 * np.eye(6)
    expected = -np.linalg.solve(damped, gradient)
    np.testing.assert_allclose(step(), expected, rtol=1e-3)
    length = gradient @ gradient / (gradient @ damped @ gradient)
    np.testing.assert_allclose(step(products=1), -length * gradient, rtol=1e-4)


def test_the_share_is_one_for_the_inverse_and_does_not_mind_a_scale():
    params, given = races.batches(SEED, batch_size=BATCH, steps=5)
    key = jax.random.key(2)
    # Few rows, so that few products solve exactly.
    rows = given.rows[:20]
    last = jax.random.permutation(key, rows)
    operator = ggn_operator(races.apply_fn, races.LIKELIHOOD, params, (last, None))
    gamma = DAMPING + DECAY
    damped = lambda v: jax.tree.map(lambda f, x: f + gamma * x, operator(v), v)
    solve = lambda g: jax.scipy.sparse.linalg.cg(damped, g, tol=1e-6, maxiter=500)[0]

    @jax.jit
    def share(solves, scale):
        times = lambda g: jax.tree.map(lambda x: scale * x, g)
        inverse = lambda g: jax.lax.cond(solves, solve, times, g)
        return races.share_of_exact(key, inverse, params, rows)

    given = (True, 1.0), (False, 1.0), (False, 2.0)
    exact, identity, doubled = (float(share(*one)) for one in given)
    assert exact == pytest.approx(1, abs=1e-3)
    assert identity == pytest.approx(doubled, rel=1e-5)
    assert 0 < identity < 0.9


def test_rates_are_chosen_for_each_mark_on_other_seeds(monkeypatch):
    def race(method, rates, seed, *, marks, batch, net):
        tuning = seed >= races.FIRST_TUNING_SEED
        # The second rate is best at the first mark; judged seeds say the opposite.
        table = np.array([[3.0, 1.0], [2.0, 5.0]]) if tuning else np.eye(2)
        return {TRAIN: table + seed % 2, HELD_OUT: 10 + table}

    monkeypatch.setattr(races, "race", race)
    seeds = {"seeds": 2, "tuning_seeds": 2}
    found = claim.raced(ADAM, RATES, MARKS, batch=BATCH, **seeds)
    assert found["numbers"] == [RATES[1], RATES[0]]
    assert found["tuning"] == {"0.003": [3.5, 1.5], "0.02": [2.5, 5.5]}
    assert found["samples"] == {
        TRAIN: [[0.0, 0.0], [1.0, 1.0]],
        HELD_OUT: [[10.0, 10.0]] * 2,
        claim.BEST: [[0.0, 0.0], [1.0, 1.0]],
    }
    untuned = claim.raced(FISHLEG, RATES, MARKS, batch=BATCH, **seeds)
    assert set(untuned) == {"marks", "samples"}


def test_a_rate_at_an_end_is_named():
    record = {
        "case": {"method": ADAM, "batch": 10},
        "options": {"judged": JUDGED},
        "marks": list(JUDGED),
        "tuning": {"0.1": [], "0.2": [], "0.3": []},
        "numbers": [0.2, 0.3],
    }
    assert fishleg_tables.ends([record]) == ["Adam, batch 10, step 100"]


def test_steps_add_up_to_seconds_by_phase():
    names = [races.phase_name(phase) for phase in races.PHASES]
    values = zip(names, (20.0, 2.0, 0.5), strict=True)
    samples = {name: [value] for name, value in values} | {ADAM: [0.1, 0.3, 0.1]}
    seconds = lambda *given: fishleg_tables.seconds_of({"samples": samples}, *given)
    assert seconds(FISHLEG, (1, 100, 110)) == [20.0, 218.0, 223.0]
    assert seconds(ADAM, (10,)) == [pytest.approx(1.0)]


def test_a_step_is_timed():
    found = races.step_seconds((ADAM,), batch=10, steps=5, rounds=2)
    assert set(found) == {ADAM, ADAM + timing.AGAIN}
    assert all(0 < s < 0.1 for taken in found.values() for s in taken)


def test_the_full_grid_and_its_steps_fit_the_claim():
    full = claim.PRESETS["full"]
    assert list(full.rates) == sorted(set(full.rates))
    assert {*full.judged} <= {*full.marks}
    assert max(full.marks) >= races.PHASES["late"][1]
    assert len(full.goals) == len(full.judged)
    for mark in full.judged:
        assert str(mark) in claim.CLAIM
