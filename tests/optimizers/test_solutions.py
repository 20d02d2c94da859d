"""Measures of solutions against closed forms, loops and known biases of optimizers."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlab.likelihoods import Categorical, Gaussian
from jaxlab.objective import Objective, plain
from jaxlab.optimizers import (
    average_accuracy,
    continual_run,
    forgetting,
    interpolation_barrier,
    powerprop,
    powerprop_init,
    scale_by_power,
    solutions,
    train_to_loss,
)
from jaxlab.training import create_state, make_train_step

KEY = jax.random.key(2)
ranks = lambda f: jax.jit(f, static_argnames="center")
effective_rank = ranks(solutions.effective_rank)
stable_rank = ranks(solutions.stable_rank)
participation_ratio = ranks(solutions.participation_ratio)
linear_cka = jax.jit(solutions.linear_cka)
feature_overlap = jax.jit(solutions.feature_overlap, static_argnames=("k", "center"))
class_similarity = jax.jit(solutions.class_similarity, static_argnames="num_classes")
dead_fraction = jax.jit(solutions.dead_fraction)
match_units = jax.jit(solutions.match_units)
hoyer_sparsity = jax.jit(solutions.hoyer_sparsity)
near_zero_fraction = jax.jit(solutions.near_zero_fraction)
prediction_disagreement = jax.jit(solutions.prediction_disagreement)
TIGHT = {"rtol": 1e-10, "atol": 1e-12}
RANKS = pytest.mark.parametrize(
    "rank", [effective_rank, stable_rank, participation_ratio], ids=lambda f: f.__name__
)


def matrix(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def rotation(seed, size):
    return np.linalg.qr(matrix(seed, size, size))[0]


# Ranks


@RANKS
def test_ranks_of_identities_and_of_rank_one(rank, x64):
    np.testing.assert_allclose(rank(jnp.eye(5), center=False), 5, **TIGHT)
    one = jnp.outer(jnp.arange(1.0, 5), jnp.arange(1.0, 4))
    np.testing.assert_allclose(rank(one, center=False), 1, rtol=1e-7)
    for center in (False, True):
        assert rank(jnp.zeros((3, 2)), center=center) == 0
    assert rank(jnp.ones((3, 2)), center=True) == 0


@pytest.mark.parametrize("center", [False, True], ids=["plain", "centred"])
def test_ranks_are_those_of_the_formulas(center, x64):
    x = matrix(0, 9, 4) + 1.0
    y = x - x.mean(0) if center else x
    s = np.sqrt(np.linalg.eigvalsh(y.T @ y))
    p = s / s.sum()
    want = np.exp(-(p * np.log(p)).sum())
    np.testing.assert_allclose(effective_rank(x, center=center), want, **TIGHT)
    want = (y**2).sum() / s.max() ** 2
    np.testing.assert_allclose(stable_rank(x, center=center), want, **TIGHT)
    l = np.linalg.eigvalsh(y.T @ y / 9)
    want = l.sum() ** 2 / (l**2).sum()
    np.testing.assert_allclose(participation_ratio(x, center=center), want, **TIGHT)


@RANKS
def test_ranks_know_no_scale_and_no_rotation(rank):
    x = matrix(1, 8, 3)
    want = rank(x)
    for same in (1e-30 * x, 1e30 * x, x @ rotation(2, 3)):
        got = rank(np.asarray(same, np.float32))
        np.testing.assert_allclose(got, want, rtol=1e-5)
    assert rank(jnp.asarray(100 * x, jnp.float16)).dtype == jnp.float32


# Comparing features


@pytest.mark.parametrize("rows", [6, 40], ids=["few rows", "many rows"])
def test_alignment_is_that_of_the_gram_matrices(rows, x64):
    a, b = matrix(0, rows, 5) + 2.0, matrix(1, rows, 7)
    off = np.eye(rows) - 1 / rows
    k, l = off @ a @ a.T @ off, off @ b @ b.T @ off
    want = (k * l).sum() / np.sqrt((k * k).sum() * (l * l).sum())
    np.testing.assert_allclose(linear_cka(a, b), want, **TIGHT)
    np.testing.assert_allclose(linear_cka(b, a), want, **TIGHT)
    for same in (a @ rotation(3, 5), -3e-3 * a + 5.0, a):
        np.testing.assert_allclose(linear_cka(a, same), 1, **TIGHT)
    assert linear_cka(a, jnp.ones((rows, 2))) == 0


def test_overlaps_of_leading_directions(x64):
    turn = rotation(0, 6)
    one = matrix(1, 9, 9)[:, :6] @ np.diag([9.0, 8, 7, 1e-3, 1e-3, 1e-3]) @ turn.T
    two = matrix(2, 4, 6)
    v, w = (np.linalg.svd(x)[2][:3] for x in (one, two))
    want = np.linalg.norm(v @ w.T) ** 2 / 3
    np.testing.assert_allclose(feature_overlap(one, two, k=3), want, **TIGHT)
    np.testing.assert_allclose(feature_overlap(one, 5 * one, k=3), 1, **TIGHT)
    e = np.eye(4)
    assert feature_overlap(e[:2], e[2:], k=2) == 0
    shifted = one + 100.0
    got = feature_overlap(one - one.mean(0), shifted, k=2, center=True)
    np.testing.assert_allclose(got, 1, rtol=1e-8)


def test_similarity_of_classes_is_a_loop_over_pairs(x64):
    x, labels = matrix(0, 20, 3) + 1.0, np.arange(20) % 4
    labels[labels == 2] = 4  # class 2 has no row
    means = [x[labels == c].mean(0) for c in (0, 1, 3, 4)]
    cosines = [
        a @ b / np.linalg.norm(a) / np.linalg.norm(b)
        for a, b in itertools.combinations(means, 2)
    ]
    got = class_similarity(x, labels, num_classes=5)
    np.testing.assert_allclose(got, np.mean(cosines), **TIGHT)
    assert jnp.isnan(class_similarity(x, 0 * labels, num_classes=3))


def test_dead_units():
    x = jnp.array([[0.0, 1.0, -1.0, 0.0], [0.0, -2.0, 0.0, 3.0]])
    assert dead_fraction(x) == dead_fraction(jax.nn.relu(x)) == 0.5


def test_matching_is_the_best_of_all_permutations(x64):
    one, two = matrix(0, 12, 5), matrix(1, 12, 5) + 3.0
    correlation = np.corrcoef(one.T, two.T)[:5, 5:]
    total = lambda order: correlation[np.arange(5), list(order)].sum()
    best = max(itertools.permutations(range(5)), key=total)
    assert tuple(match_units(one, two).tolist()) == best
    order = np.array([3, 0, 4, 1, 2])
    found = match_units(one, 2 * one[:, order] + 1)
    np.testing.assert_allclose(one[:, order][:, found], one)


# Weights and functions


def test_sparsity_from_one_hot_to_constant(x64):
    one_hot = {"a": jnp.zeros((2, 3)), "b": jnp.array([-7.0])}
    np.testing.assert_allclose(hoyer_sparsity(one_hot), 1, **TIGHT)
    np.testing.assert_allclose(hoyer_sparsity(jnp.full((3, 3), -2.0)), 0, atol=1e-14)
    assert hoyer_sparsity(jnp.zeros(3)) == 1
    w = matrix(0, 10)
    root = np.sqrt(10)
    want = (root - abs(w).sum() / np.linalg.norm(w)) / (root - 1)
    for scale in (1.0, 1e-200, 1e200):
        tree = {"a": jnp.asarray(scale * w[:4]), "b": jnp.asarray(scale * w[4:])}
        np.testing.assert_allclose(hoyer_sparsity(tree), want, **TIGHT)
        got = near_zero_fraction(tree, tolerance=0.3)
        np.testing.assert_allclose(got, np.mean(abs(w) <= 0.3 * abs(w).max()))
    assert near_zero_fraction(jnp.array([0.0, 1e-30, 1.0]), tolerance=0) == 1 / 3
    assert near_zero_fraction(jnp.zeros(3)) == 1


def test_disagreement_is_a_weighted_count():
    one, two = jnp.asarray(matrix(0, 2, 5, 3)), jnp.asarray(matrix(1, 2, 5, 3))
    differ = np.argmax(one, -1) != np.argmax(two, -1)
    np.testing.assert_allclose(prediction_disagreement(one, two), differ.mean())
    assert prediction_disagreement(one, 2 * one + 1) == 0
    weights = jnp.array([1.0, 0.0])
    got = prediction_disagreement(one, two, weights=weights)
    np.testing.assert_allclose(got, differ[0].mean(), rtol=1e-6)


def test_barriers_of_a_quadratic_and_of_a_double_well(x64):
    a = matrix(0, 4, 3)
    loss = lambda w: jnp.sum((a @ w) ** 2)
    start, end = jnp.asarray(matrix(1, 3)), jnp.asarray(matrix(2, 3))
    path = interpolation_barrier(loss, start, end, points=5)
    t = np.linspace(0, 1, 5)
    # The chord less the parabola is t (1 - t) |A d|^2.
    bend = t * (1 - t) * np.sum((a @ (start - end)) ** 2)
    line = (1 - t) * path.losses[0] + t * path.losses[-1]
    np.testing.assert_allclose(path.losses, line - bend, **TIGHT)
    np.testing.assert_allclose(path.barrier, -bend[1:-1].min(), **TIGHT)
    ends = [loss(start), loss(end)]
    np.testing.assert_allclose(path.losses[jnp.array([0, 4])], ends, **TIGHT)
    well = lambda p: jnp.sum((p["w"] ** 2 - 1) ** 2)
    wells = ({"w": -jnp.ones(2)}, {"w": jnp.ones(2)})
    assert interpolation_barrier(well, *wells).barrier == 2


def test_matching_removes_the_barrier_of_permuted_networks():
    x = jnp.asarray(matrix(0, 50, 4), jnp.float32)
    w, v = (
        jnp.asarray(matrix(i, *s), jnp.float32) for i, s in ((1, (4, 8)), (2, (8, 1)))
    )
    apply_fn = lambda p, x: jnp.tanh(x @ p["w"]) @ p["v"]
    one = {"w": w, "v": v}
    order = jnp.asarray(np.random.default_rng(3).permutation(8))
    two = {"w": w[:, order], "v": v[order]}
    loss = lambda p: jnp.mean((apply_fn(p, x) - apply_fn(one, x)) ** 2)
    hidden = lambda p: jnp.tanh(x @ p["w"])
    found = match_units(hidden(one), hidden(two))
    matched = {"w": two["w"][:, found], "v": two["v"][found]}
    assert interpolation_barrier(loss, one, two).barrier > 0.1
    assert abs(interpolation_barrier(loss, one, matched).barrier) < 1e-6


def test_bfloat16_ends_come_out_exactly():
    ends = jnp.array([0.1, 0.3], jnp.bfloat16)
    seen = lambda w: w.astype(jnp.float32)
    losses = interpolation_barrier(seen, ends[0], ends[1], points=3).losses
    assert losses[0] == ends[0]
    assert losses[2] == ends[1]


def test_measures_run_under_jit_in_one_trace():
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def measures(x, w):
        path = interpolation_barrier(lambda w: jnp.sum(w**4), w, -w)
        return (
            effective_rank(x),
            linear_cka(x, x[:, :2]),
            feature_overlap(x, x, k=2),
            hoyer_sparsity(w),
            match_units(x, x),
            path.barrier,
        )

    for seed in range(2):
        x, w = (jnp.asarray(matrix(seed, *s), jnp.float32) for s in ((6, 3), (4,)))
        got = measures(x, w)
        np.testing.assert_allclose(got[0], effective_rank(x), rtol=1e-5)
        assert got[4].tolist() == [0, 1, 2]


# Descent that prefers sparse weights


@pytest.mark.parametrize("alpha", [1.0, 1.5, 3.0])
def test_powers_invert_each_other(alpha, x64):
    w = jnp.array([0.0, -0.3, 2.0, 1e-12])
    v = powerprop_init({"w": w}, alpha=alpha)
    np.testing.assert_allclose(powerprop(v, alpha=alpha)["w"], w, **TIGHT)
    slope = jax.grad(lambda v: powerprop(v, alpha=alpha).sum())(v["w"])
    want = alpha * np.abs(v["w"]) ** (alpha - 1)
    np.testing.assert_allclose(slope, want, **TIGHT)
    assert powerprop(w.astype(jnp.bfloat16), alpha=alpha).dtype == jnp.bfloat16


@pytest.mark.parametrize("alpha", [1.0, 1.5, 3.0])
def test_the_link_is_descent_on_v_as_the_rate_vanishes(alpha, x64):
    loss = lambda w: jnp.sum(jnp.cosh(w - 1.0))
    v = jnp.asarray(matrix(0, 6))
    w = powerprop(v, alpha=alpha)
    tx = optax.chain(scale_by_power(alpha), optax.scale(-1.0))
    updates, _ = tx.update(jax.grad(loss)(w), tx.init(w), w)
    errors = []
    for rate in (1e-3, 1e-4):
        slope = jax.grad(lambda v: loss(powerprop(v, alpha=alpha)))(v)
        moved = powerprop(v - rate * slope, alpha=alpha) - w
        errors.append(float(jnp.abs(moved / rate - updates).max()))
    assert errors[0] < 1.0
    # First order: ten times closer, or equal where alpha is 1.
    assert errors[1] < max(0.11 * errors[0], 1e-9)


def test_the_link_among_others(x64):
    w = {"a": jnp.array([2.0, 0.0]), "b": jnp.array([-1.0])}
    tx = optax.masked(scale_by_power(2.0), {"a": True, "b": False})
    updates, _ = jax.jit(tx.update)(w, tx.init(w), w)
    chex.assert_trees_all_close(updates, {"a": jnp.array([16.0, 0]), "b": w["b"]})
    tx = optax.inject_hyperparams(scale_by_power)(optax.linear_schedule(1.0, 2.0, 1))
    first, state = tx.update(w, tx.init(w), w)
    second, _ = tx.update(w, state, w, nobody_knows_this=1)
    chex.assert_trees_all_close(first, w)
    np.testing.assert_allclose(second["a"], [16.0, 0.0])
    half = jnp.ones(2, jnp.bfloat16)
    tx = scale_by_power(2.0)
    assert tx.update(half, tx.init(half), half)[0].dtype == jnp.bfloat16


# Known biases: what the measures should tell apart


def least_squares():
    return matrix(0, 4, 10), matrix(1, 4)


@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "preconditioned"])
def test_descent_finds_the_interpolant_of_least_norm(scaled, x64):
    x, y = least_squares()
    p = np.linspace(0.5, 2.0, 10) if scaled else np.ones(10)
    loss = lambda w: jnp.mean((x @ w - y) ** 2)
    # A fixed diagonal scale, as the limit of an adaptive method.
    link = optax.stateless(lambda g, _: p * g)
    tx = optax.chain(link, optax.sgd(0.1))

    def step(carry, batch):
        w, state = carry
        updates, state = tx.update(jax.grad(loss)(w), state, w)
        return (optax.apply_updates(w, updates), state), None

    start = (jnp.zeros(10), tx.init(jnp.zeros(10)))
    found = train_to_loss(
        KEY,
        step,
        start,
        jnp.ones(1),
        loss_fn=lambda carry: loss(carry[0]),
        target=1e-20,
        max_steps=20_000,
        batch_size=1,
        check_every=50,
    )
    assert found.reached
    want = p * (x.T @ np.linalg.solve(x * p @ x.T, y))
    np.testing.assert_allclose(found.state[0], want, rtol=1e-6, atol=1e-8)


def test_powers_find_sparser_interpolants_at_equal_loss(x64):
    rng = np.random.default_rng(5)
    x = rng.normal(size=(12, 20))
    truth = np.zeros(20)
    truth[[2, 11]] = 1.0, -2.0
    y = x @ truth
    # Powers keep the signs: each weight is the difference of two positive ones.
    loss = lambda w: jnp.mean((x @ (w[0] - w[1]) - y) ** 2)
    found = {}
    for alpha in (1.0, 2.0):
        tx = optax.chain(scale_by_power(alpha), optax.sgd(0.01))

        def step(carry, batch, tx=tx):
            w, state = carry
            updates, state = tx.update(jax.grad(loss)(w), state, w)
            return (optax.apply_updates(w, updates), state), None

        start = jnp.full((2, 20), 1e-4)
        run = train_to_loss(
            KEY,
            step,
            (start, tx.init(start)),
            jnp.ones(1),
            loss_fn=lambda carry: loss(carry[0]),
            target=1e-3,
            max_steps=5000,
            batch_size=1,
            check_every=100,
        )
        assert run.reached
        found[alpha] = run.state[0][0] - run.state[0][1]
    assert hoyer_sparsity(found[2.0]) > hoyer_sparsity(found[1.0]) + 0.3
    assert jnp.abs(found[2.0]).sum() < 0.7 * jnp.abs(found[1.0]).sum()
    np.testing.assert_allclose(found[2.0], truth, atol=0.1)


# Training to a loss, and over tasks


def test_runs_stop_at_the_loss_and_are_a_loop_over_steps():
    x = jnp.asarray(matrix(0, 16, 2), jnp.float32)
    objective = Objective(plain(lambda w, x: x @ w), Gaussian())
    data = (x, x @ jnp.ones((2, 1)) + 1.0)
    step = make_train_step(objective, optax.adam(0.05), donate=False)
    state = create_state(KEY, jnp.zeros((2, 1)), optax.adam(0.05))
    loss_fn = jax.jit(lambda state: objective.loss(state.params, (), data)[0])

    @functools.partial(jax.jit, static_argnums=1)
    def run(target, check_every):
        return train_to_loss(
            KEY,
            step,
            state,
            data,
            loss_fn=loss_fn,
            target=target,
            max_steps=90,
            batch_size=4,
            check_every=check_every,
        )

    target = 1.55
    found = run(target, 1)
    assert found.reached
    assert 2 < found.steps < 90
    by_hand = state
    for i in range(int(found.steps)):
        assert loss_fn(by_hand) > target  # not one step too many
        rows = jax.random.randint(jax.random.fold_in(KEY, i), (4,), 0, 16)
        by_hand, _ = step(by_hand, jax.tree.map(lambda leaf, r=rows: leaf[r], data))
    chex.assert_trees_all_close(found.state.params, by_hand.params, rtol=1e-5)
    np.testing.assert_allclose(found.loss, loss_fn(by_hand), rtol=1e-5)
    assert run(target, 7).steps == -(-int(found.steps) // 7) * 7
    for target, every, steps, reached in ((0.0, 7, 90, False), (9.0, 1, 0, True)):
        end = run(target, every)
        assert (int(end.steps), bool(end.reached)) == (steps, reached)


def test_a_loss_of_nan_reaches_nothing():
    found = train_to_loss(
        KEY,
        lambda w, batch: (w * jnp.nan, None),
        1.0,
        jnp.ones(3),
        loss_fn=jnp.abs,
        target=0.5,
        max_steps=6,
        batch_size=1,
    )
    assert (int(found.steps), bool(found.reached)) == (6, False)
    assert jnp.isnan(found.loss)


def test_accuracies_of_tasks_by_hand(x64):
    a = np.array([[0.6, 0.2, 0.1], [0.9, 0.8, 0.2], [0.7, 0.5, 0.95]])
    np.testing.assert_allclose(average_accuracy(a), (0.7 + 0.5 + 0.95) / 3)
    np.testing.assert_allclose(forgetting(a), ((0.9 - 0.7) + (0.8 - 0.5)) / 2)
    assert forgetting(np.full((4, 4), 0.3)) == 0
    assert forgetting(np.array([[0.5, 0.0], [0.75, 1.0]])) == -0.25


def test_continual_runs_are_loops_over_tasks(x64):
    tasks = [jnp.asarray(matrix(i, 6)) for i in range(3)]
    tests = [jnp.asarray(matrix(9 + i, 2)) for i in range(3)]
    step = lambda w, batch: (w + 0.3 * (batch.mean() - w), None)
    accuracy = lambda w, x: -jnp.mean(jnp.abs(x - w))
    got = continual_run(
        KEY,
        step,
        jnp.array(0.0),
        tasks,
        accuracy_fn=accuracy,
        steps=4,
        batch_size=2,
        test_tasks=tests,
    )
    w = 0.0
    for s, task in enumerate(tasks):
        key = jax.random.fold_in(KEY, s)
        for i in range(4):
            rows = jax.random.randint(jax.random.fold_in(key, i), (2,), 0, 6)
            w, _ = step(w, task[rows])
        np.testing.assert_allclose(got.states[s], w, **TIGHT)
        want = [accuracy(w, test) for test in tests]
        np.testing.assert_allclose(got.accuracies[s], want, **TIGHT)


def test_a_network_forgets_permuted_tasks():
    """The experiment in small: the harness runs, and training on others forgets."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(4, 12))
    labels = rng.integers(4, size=200)
    x = centres[labels] + rng.normal(size=(200, 12)) / 2
    orders = [np.arange(12), *(rng.permutation(12) for _ in range(2))]
    tasks = [(jnp.asarray(x[:, o], jnp.float32), jnp.asarray(labels)) for o in orders]
    apply_fn = lambda p, x: jax.nn.relu(x @ p["w"]) @ p["v"]
    objective = Objective(plain(apply_fn), Categorical())
    params = {
        "w": jax.random.normal(KEY, (12, 16)) / 3,
        "v": jax.random.normal(jax.random.key(1), (16, 4)) / 4,
    }

    def accuracy(state, task):
        found = jnp.argmax(apply_fn(state.params, task[0]), axis=-1)
        return jnp.mean(found == task[1])

    tx = optax.adam(1e-2)
    step = make_train_step(objective, tx, jit=False)
    run = continual_run(
        KEY,
        step,
        create_state(KEY, params, tx),
        tasks,
        accuracy_fn=accuracy,
        steps=300,
        batch_size=32,
    )
    assert (jnp.diagonal(run.accuracies) > 0.95).all()
    assert forgetting(run.accuracies) > 0.1
    assert average_accuracy(run.accuracies) < 0.95
    # The last network's features of two tasks: overlaps lie in [0, 1].
    last = jax.tree.map(lambda leaf: leaf[-1], run.states.params)
    hidden = [jax.nn.relu(task[0] @ last["w"]) for task in tasks]
    assert 0 < feature_overlap(hidden[0], hidden[-1], k=4) < 1
    assert 0 < linear_cka(hidden[0], hidden[-1]) < 1
