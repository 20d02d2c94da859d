"""Annealed gradient noise: its variance, its independence, what it leaves alone."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlab.optimizers.gradient_noise import (
    add_gradient_noise,
    annealed_gradient_noise,
    gradient_noise_schedule,
)

KEY = jax.random.key(3)
N = 100_000
STATIC = ("key", "mask")


def draws(tx, state, tree, steps, *, start=0):
    """Gives the updates of several steps on one tree, in one trace."""
    update = jax.jit(lambda state, key: tx.update(tree, state, key=key))
    seen = []
    for step in range(start, start + steps):
        updates, state = update(state, jax.random.fold_in(KEY, step))
        seen.append(updates)
    assert update._cache_size() == 1
    return seen, state


def at_count(state, count):
    return state._replace(count=jnp.int32(count))


def check_moments(sample, variance, *, deviations=4.0):
    """Compares with N(0, variance) within so many standard errors."""
    sample = np.asarray(sample, np.float64).ravel()
    error = variance * np.sqrt(2 / sample.size)
    assert abs(sample.var() - variance) < deviations * error
    assert abs(sample.mean()) < deviations * np.sqrt(variance / sample.size)


# Limits


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_eta_zero_is_the_identity_bit_for_bit(dtype):
    grads = {
        "a": jnp.array([-0.0, 0.1, jnp.inf, 3e-8], dtype),
        "b": jnp.ones((), dtype),
    }
    tx = annealed_gradient_noise(0.0)
    (first, second), state = draws(tx, tx.init(grads), grads, 2)
    for got in (first, second):
        bits = lambda tree: [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]
        assert bits(got) == bits(grads)
        chex.assert_trees_all_equal_shapes_and_dtypes(got, grads)
    assert int(state.count) == 2


def test_a_schedule_that_ends_stops_the_noise():
    tx = annealed_gradient_noise(optax.piecewise_constant_schedule(1.0, {2: 0.0}))
    seen, _ = draws(tx, tx.init(jnp.zeros(3)), jnp.zeros(3), 4)
    assert [bool(u.any()) for u in seen] == [True, True, False, False]


# The oracle: the formula, in float64


@pytest.mark.parametrize("step", [0, 1, 7, 99, 10**6, 2**31 - 1])
def test_variance_is_that_of_the_formula(step, x64):
    for eta, gamma in ((0.01, 0.55), (0.3, 0.0), (1, 2)):
        got = gradient_noise_schedule(eta, gamma)(jnp.int32(step))
        np.testing.assert_allclose(got, eta / (1.0 + step) ** gamma, rtol=1e-14)
    ratio = [gradient_noise_schedule()(t) for t in (99, 0)]
    np.testing.assert_allclose(ratio[0] / ratio[1], 0.07943282347, rtol=1e-9)


def test_both_numbers_may_be_schedules(x64):
    eta, gamma = optax.linear_schedule(1.0, 0.0, 10), optax.linear_schedule(0.0, 1.0, 5)
    variance = jax.jit(gradient_noise_schedule(eta, gamma))
    for step in range(10):
        want = (1 - step / 10) / (1 + step) ** min(step / 5, 1)
        # The schedules themselves are float32.
        np.testing.assert_allclose(variance(jnp.int32(step)), want, rtol=1e-6)


@pytest.mark.parametrize("step", [0, 9, 99])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_sampled_variance(step, dtype):
    tx, zeros = annealed_gradient_noise(0.3, 0.55), jnp.zeros((200, N // 200), dtype)
    (got,), _ = draws(tx, at_count(tx.init(zeros), step), zeros, 1)
    assert got.dtype == zeros.dtype
    check_moments(got, 0.3 / (1 + step) ** 0.55)


def test_the_noise_adds_to_what_comes_in_and_is_gaussian():
    grads = jnp.linspace(-1.0, 1.0, N)
    noise = np.asarray(add_gradient_noise(KEY, grads, variance=4.0) - grads)
    check_moments(noise, 4.0)
    # Fourth moment 3 s^4; its standard error is sqrt(96 / n) s^4.
    assert abs((noise**4).mean() / 16 - 3) < 4 * np.sqrt(96 / N)


def test_a_sum_is_rounded_once():
    grads = jnp.ones(N, jnp.bfloat16)
    got = add_gradient_noise(KEY, grads, variance=0.3)
    exact = add_gradient_noise(KEY, jnp.ones(N), variance=0.3)
    chex.assert_trees_all_equal(got, exact.astype(jnp.bfloat16))


# Against optax


def test_variances_are_those_of_optax():
    ours, theirs = annealed_gradient_noise(0.3), optax.add_noise(0.3, 0.55, KEY)
    zeros = jnp.zeros(N)
    for count in (0, 1, 50):
        (got,), _ = draws(ours, at_count(ours.init(zeros), count), zeros, 1)
        peer, state = theirs.update(zeros, at_count(theirs.init(zeros), count))
        assert int(state.count) == count + 1
        check_moments(got, 0.3 / (1 + count) ** 0.55)
        check_moments(peer, 0.3 / (1 + count) ** 0.55)


def test_what_optax_does_otherwise():
    # An integer gamma there is an integer power, which overflows.
    zeros, count = jnp.zeros(N), 50_000
    ours, theirs = annealed_gradient_noise(1.0, 2), optax.add_noise(1.0, 2, KEY)
    (got,), _ = draws(ours, at_count(ours.init(zeros), count), zeros, 1)
    check_moments(got, 1.0 / (1 + count) ** 2)
    assert jnp.isnan(theirs.update(zeros, at_count(theirs.init(zeros), count))[0]).all()
    # In bfloat16 it draws one of 128 numbers, the largest below 3 deviations.
    zeros = jnp.zeros(N, jnp.bfloat16)
    theirs = optax.add_noise(1.0, 0.55, KEY)
    peer = theirs.update(zeros, theirs.init(zeros))[0]
    got = add_gradient_noise(KEY, zeros, variance=1.0)
    assert jnp.unique(peer).size <= 256 < 1000 < jnp.unique(got).size
    assert jnp.abs(peer).max() < 3 < 4 < jnp.abs(got).max()
    # It takes no key from the step.
    assert not isinstance(theirs, optax.GradientTransformationExtraArgs)


# Independence


def correlation(one, two):
    return abs(np.corrcoef(np.ravel(one), np.ravel(two))[0, 1])


def test_leaves_and_steps_are_uncorrelated():
    zeros = {"a": jnp.zeros(N), "b": jnp.zeros(N), "c": [jnp.zeros(N)]}
    for tx in (annealed_gradient_noise(1.0), annealed_gradient_noise(1.0, key=KEY)):
        (one, two), _ = draws(tx, tx.init(zeros), zeros, 2)
        samples = [*jax.tree.leaves(one), *jax.tree.leaves(two)]
        for i, left in enumerate(samples):
            for right in samples[:i]:
                assert correlation(left, right) < 5 / np.sqrt(N)


def test_one_key_at_all_steps_still_gives_new_noise():
    tx, zeros = annealed_gradient_noise(1.0), jnp.zeros(N)
    one, state = tx.update(zeros, tx.init(zeros), key=KEY)
    two, _ = tx.update(zeros, state, key=KEY)
    assert correlation(one, two) < 5 / np.sqrt(N)


def test_other_links_with_the_same_key_draw_other_numbers():
    tx, zeros = annealed_gradient_noise(1.0), jnp.zeros(N)
    noise, _ = tx.update(zeros, tx.init(zeros), key=KEY)
    folded = [jax.random.fold_in(KEY, i) for i in range(2)]
    twice = [jax.random.fold_in(key, i) for key in folded for i in range(2)]
    for key in (KEY, *folded, *twice, *jax.random.split(KEY)):
        assert correlation(noise, jax.random.normal(key, (N,))) < 5 / np.sqrt(N)


@pytest.mark.parametrize("key", [None, KEY], ids=["update", "link"])
def test_equal_state_and_key_give_equal_bits(key):
    tx, grads = annealed_gradient_noise(key=key), {"w": jnp.ones(5)}
    one, _ = draws(tx, tx.init(grads), grads, 3)
    two, _ = draws(tx, tx.init(grads), grads, 3)
    chex.assert_trees_all_equal(one, two)

    def body(state, index):
        now = jax.random.fold_in(KEY, index)
        updates, state = tx.update(grads, state, key=now)
        return state, updates

    _, scanned = jax.lax.scan(body, tx.init(grads), jnp.arange(3))
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *one)
    chex.assert_trees_all_equal(scanned, stacked)


def test_vmap_over_keys():
    keys, grads = jax.random.split(KEY, 3), jnp.ones(4)
    noisy = lambda key: add_gradient_noise(key, grads, variance=1.0)
    rows = jnp.stack([noisy(key) for key in keys])
    chex.assert_trees_all_equal(jax.vmap(noisy)(keys), rows)


def test_a_kept_key_goes_first_and_survives_a_donated_state():
    tx, grads = annealed_gradient_noise(key=KEY), jnp.ones(4)
    one, _ = tx.update(grads, tx.init(grads))
    two, _ = tx.update(grads, tx.init(grads), key=jax.random.key(8), value=1.0)
    chex.assert_trees_all_equal(one, two)
    step = jax.jit(lambda state: tx.update(grads, state), donate_argnums=0)
    for _ in range(2):
        chex.assert_trees_all_close(step(tx.init(grads))[0], one, rtol=1e-6)


# Beside other links


def test_before_sgd_it_is_the_noisy_gradient():
    params = {"w": jnp.arange(3.0), "b": jnp.ones(())}
    grads = jax.tree.map(jnp.cos, params)
    noise = annealed_gradient_noise()
    tx = optax.chain(noise, optax.sgd(0.1))
    updates, _ = tx.update(grads, tx.init(params), params, key=KEY)
    noisy, _ = noise.update(grads, noise.init(params), key=KEY)
    got = optax.apply_updates(params, updates)
    want = jax.tree.map(lambda p, g: p - jnp.float32(0.1) * g, params, noisy)
    chex.assert_trees_all_equal(got, want)


def test_masks_and_partitions_leave_the_noise_of_others_alone():
    grads = {
        "kernel": jnp.zeros((3, 2)),
        "bias": jnp.zeros(2),
        "norm": {"s": jnp.ones(2)},
    }
    whole = annealed_gradient_noise()
    full, _ = whole.update(grads, whole.init(grads), key=KEY)
    mask = {"kernel": True, "bias": False, "norm": False}
    ndim = lambda tree: jax.tree.map(lambda x: x.ndim > 1, tree)
    for chosen in (mask, ndim):
        tx = annealed_gradient_noise(mask=chosen)
        (got,), _ = draws(tx, tx.init(grads), grads, 1)
        again, _ = tx.update(grads, tx.init(grads), key=KEY)
        chex.assert_trees_all_equal(again, grads | {"kernel": full["kernel"]})
        chex.assert_trees_all_equal(got["norm"], grads["norm"])
    labels = {"kernel": "a", "bias": "b", "norm": "b"}
    links = {"a": annealed_gradient_noise(), "b": annealed_gradient_noise()}
    parts = optax.partition(links, labels)
    got, _ = parts.update(grads, parts.init(grads), key=KEY)
    chex.assert_trees_all_equal(got, full)
    nothing = annealed_gradient_noise(mask=dict.fromkeys(mask, False))
    got, _ = nothing.update(grads, nothing.init(grads), key=KEY)
    chex.assert_trees_all_equal(got, grads)


@pytest.mark.parametrize("key", [None, KEY], ids=["update", "link"])
def test_injected_hyperparameters(key):
    factory = optax.inject_hyperparams(annealed_gradient_noise, static_args=STATIC)
    plain, zeros = annealed_gradient_noise(1.0, 1.0, key=key), jnp.zeros(64)
    want, _ = draws(plain, plain.init(zeros), zeros, 3)
    for eta in (1.0, optax.constant_schedule(1.0)):
        tx = factory(eta, 1.0, key=key)
        got, state = draws(tx, tx.init(zeros), zeros, 3)
        chex.assert_trees_all_close(got, want, rtol=1e-6)
        assert set(state.hyperparams) == {"eta", "gamma"}


def test_inside_multi_steps_it_adds_to_the_mean():
    tx = annealed_gradient_noise()
    outer = optax.MultiSteps(tx, 2)
    state = outer.init(jnp.zeros(3))
    _, state = outer.update(jnp.ones(3), state, jnp.zeros(3), key=jax.random.key(1))
    got, _ = outer.update(3 * jnp.ones(3), state, jnp.zeros(3), key=KEY)
    want, _ = tx.update(2 * jnp.ones(3), tx.init(jnp.zeros(3)), key=KEY)
    chex.assert_trees_all_close(got, want, rtol=1e-6)


def test_behind_adam_small_gradients_walk_at_the_learning_rate():
    tx = optax.chain(annealed_gradient_noise(0.01, key=KEY), optax.adam(1e-3))
    zeros = jnp.zeros(1000)
    update = jax.jit(tx.update)
    state = tx.init(zeros)
    for _ in range(5):
        updates, state = update(zeros, state, zeros)
    assert 1e-4 < jnp.abs(updates).mean() < 1e-3
    chex.assert_tree_all_finite(updates)


def test_nan_comes_through():
    grads = jnp.array([jnp.nan, 1.0])
    for variance in (0.0, 1.0):
        got = add_gradient_noise(KEY, grads, variance=variance)
        assert jnp.isnan(got).tolist() == [True, False]


# That it helps where it should


def test_noise_leaves_the_plateau_of_zero_weights():
    rng = np.random.default_rng(0)
    labels = jnp.asarray(np.arange(120) % 3)
    x = jnp.asarray(np.eye(3)[labels] * 2 + rng.normal(size=(120, 3)) / 3, jnp.float32)
    params = [jnp.zeros((3, 16)), jnp.zeros((16, 16)), jnp.zeros((16, 3))]

    def loss_fn(params):
        hidden = x
        for w in params[:-1]:
            hidden = jax.nn.relu(hidden @ w)
        logits = hidden @ params[-1]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @jax.jit
    def final_loss(eta):
        tx = optax.chain(annealed_gradient_noise(eta), optax.sgd(0.3))

        def body(carry, key):
            params, state = carry
            updates, state = tx.update(jax.grad(loss_fn)(params), state, key=key)
            return (optax.apply_updates(params, updates), state), None

        keys = jax.random.split(KEY, 400)
        (found, _), _ = jax.lax.scan(body, (params, tx.init(params)), keys)
        return loss_fn(found)

    # All gradients vanish at the start: log(3) for ever.
    assert not any(bool(g.any()) for g in jax.grad(loss_fn)(params))
    assert final_loss(jnp.float32(0.0)) == loss_fn(params)
    assert final_loss(jnp.float32(0.3)) < 0.3 < float(loss_fn(params))
