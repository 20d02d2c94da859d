"""Winsorized means, medians of means and running medians against sorted oracles."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.stats import mstats

from jaxlab.optimizers.coherence import (
    median_of_means,
    median_of_means_gradient,
    running_median,
    winsorized_gradient,
    winsorized_mean,
)

M = 11
TIGHT = {"rtol": 1e-12, "atol": 1e-14}


def loss_fn(params, batch):
    """A mean over rows, of several leaves, one of which reaches no row's output."""
    x, y = batch
    hidden = jnp.tanh(x @ params["w"])
    return jnp.mean((hidden @ params["v"] + params["b"] - y) ** 2) + 0 * params["off"]


def make(seed=0, rows=M):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape))
    params = {"w": draw(3, 4), "v": draw(4), "b": draw(), "off": draw()}
    return params, (draw(rows, 3), 2 * draw(rows))


slope = jax.jit(jax.grad(loss_fn))


def stack_of(params, batch):
    rows = [jax.tree.map(lambda a, i=i: a[i : i + 1], batch) for i in range(M)]
    return jax.tree.map(lambda *g: np.stack(g), *[slope(params, row) for row in rows])


def winsorized(x, k):
    """The oracle: sorts each column and copies the neighbours outwards."""
    x = np.sort(np.asarray(x, np.float64), axis=0)
    x[:k], x[len(x) - k :] = x[k], x[len(x) - 1 - k]
    return x.mean(axis=0)


# Winsorized means


@pytest.mark.parametrize("k", range(6))
def test_winsorized_mean_is_that_of_sorted_columns(k, x64):
    x = np.random.default_rng(k).normal(size=(M, 3, 2))
    got = winsorized_mean(jnp.asarray(x), k=k)
    np.testing.assert_allclose(got, winsorized(x, k), **TIGHT)
    for i, j in np.ndindex(3, 2):
        peer = mstats.winsorize(x[:, i, j], limits=(k / M, k / M)).mean()
        np.testing.assert_allclose(got[i, j], peer, **TIGHT)
    other = winsorized_mean(jnp.asarray(np.moveaxis(x, 0, -1)), k=k, axis=-1)
    np.testing.assert_array_equal(other, got)
    if k == 0:
        np.testing.assert_allclose(got, x.mean(0), **TIGHT)
    if k == 5:
        np.testing.assert_allclose(got, np.median(x, 0), **TIGHT)


@pytest.mark.parametrize(
    ("percent", "rows", "k"),
    [(0, 9, 0), (8, 12, 0), (8, 13, 1), (32.3, 1000, 323), (50, 10, 4), (50, 9, 4)],
)
def test_percent_counts_whole_examples(percent, rows, k, x64):
    x = jnp.asarray(np.random.default_rng(0).normal(size=rows))
    got = winsorized_mean(x, percent=percent)
    assert got == winsorized_mean(x, k=k)
    if percent == 50:
        np.testing.assert_allclose(got, np.median(x), **TIGHT)


def test_an_outlier_changes_nothing_beyond_its_neighbour():
    x = jnp.arange(10.0)
    want = winsorized_mean(x, k=1)
    for value in (1e9, 3e38, jnp.inf):
        assert winsorized_mean(x.at[9].set(value), k=1) == want
        assert winsorized_mean(x.at[0].set(-value), k=1) == want
    assert winsorized_mean(x[jnp.array([3, 0, 9, 1, 2, 8, 7, 4, 6, 5])], k=1) == want
    # Ties: the limits are values of the sample.
    assert winsorized_mean(jnp.array([1.0, 1.0, 1.0, 5.0]), k=1) == 1.0
    for k in range(5):
        assert jnp.isnan(winsorized_mean(x.at[4].set(jnp.nan), k=k))


@pytest.mark.parametrize(
    ("k", "microbatch"), [(0, None), (0, 4), (2, None), (2, 1), (2, 4), (5, 4), (5, 20)]
)
def test_winsorized_gradient_is_that_of_the_stack(k, microbatch, x64):
    params, batch = make()
    gradient = jax.jit(
        lambda p, b: winsorized_gradient(loss_fn, p, b, k=k, microbatch=microbatch)
    )
    got = gradient(params, batch)
    want = jax.tree.map(lambda g: winsorized(g, k), stack_of(params, batch))
    chex.assert_trees_all_close(got, want, **TIGHT)
    if k == 0:
        chex.assert_trees_all_close(got, jax.grad(loss_fn)(params, batch), **TIGHT)


@pytest.mark.parametrize("microbatch", [None, 4])
def test_spoilt_examples_of_a_gradient(microbatch):
    linear = lambda w, x: jnp.mean(x @ w)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(M, 3)), jnp.float32)
    function = jax.jit(
        lambda x: winsorized_gradient(
            linear, jnp.ones(3), x, k=2, microbatch=microbatch
        )
    )
    top = x.at[jnp.argmax(x[:, 0]), 0]
    for value in (1e9, 3e38):
        chex.assert_trees_all_close(function(top.set(value)), function(x), rtol=1e-6)
    np.testing.assert_allclose(function(x), winsorized(x, 2), rtol=1e-5, atol=1e-7)
    broken = function(x.at[3, 1].set(jnp.nan))
    assert jnp.isnan(broken).tolist() == [False, True, False]
    every = function(jnp.full_like(x, jnp.nan))
    assert jnp.isnan(every).all()


def test_memory_of_two_passes():
    rows, width, k = 64, 128, 1
    x, w = jnp.ones((rows, width)), jnp.ones((width, width))
    loss = lambda w, x: jnp.mean(jnp.tanh(x @ w).sum(axis=1) ** 2)

    def cost(microbatch):
        function = lambda w, x: winsorized_gradient(
            loss, w, x, k=k, microbatch=microbatch
        )
        compiled = jax.jit(function).lower(w, x).compile()
        return compiled.memory_analysis().temp_size_in_bytes / (4 * width**2)

    # In gradients. The sorts copy their operands: up to four of 2 (k + 1) + microbatch.
    assert cost(2) <= 4 * (2 * (k + 1) + 2) < rows <= cost(None)


# Medians of means


@pytest.mark.parametrize("groups", [1, 3, 4, M])
def test_median_of_means_is_that_of_split_arrays(groups, x64):
    x = np.random.default_rng(groups).normal(size=(M, 3))
    means = [part.mean(axis=0) for part in np.array_split(x, groups)]
    got = median_of_means(jnp.asarray(x), groups=groups)
    np.testing.assert_allclose(got, np.median(means, axis=0), **TIGHT)
    other = median_of_means(jnp.asarray(x.T), groups=groups, axis=1)
    np.testing.assert_array_equal(other, got)
    params, batch = make()
    gradient = jax.jit(
        lambda p, b: median_of_means_gradient(loss_fn, p, b, groups=groups)
    )
    stack = stack_of(params, batch)
    halves = lambda g: [part.mean(axis=0) for part in np.array_split(g, groups)]
    want = jax.tree.map(lambda g: np.median(halves(g), axis=0), stack)
    chex.assert_trees_all_close(gradient(params, batch), want, **TIGHT)


def test_medians_outvote_less_than_half():
    x = jnp.arange(9.0)
    for value in (1e30, jnp.inf):
        spoilt = x.at[jnp.array([0, 2])].set(value)  # one group of three
        assert median_of_means(spoilt) == 7.0
    assert median_of_means(jnp.full(4, jnp.inf), groups=2) == jnp.inf
    assert median_of_means(jnp.array([jnp.inf, -jnp.inf, 1.0])) == 1.0
    assert jnp.isnan(median_of_means(x.at[0].set(jnp.nan)))


# Running medians


@pytest.mark.parametrize("window", [1, 2, 3, 4])
def test_running_median_is_that_of_what_was_seen(window):
    rng = np.random.default_rng(window)
    series = rng.normal(size=(9, 2, 3)).astype(np.float32)
    tx = running_median(window)
    update = jax.jit(tx.update)
    state = tx.init({"w": jnp.zeros((2, 3))})
    for step in range(9):
        got, state = update({"w": jnp.asarray(series[step])}, state)
        seen = series[max(0, step - window + 1) : step + 1]
        np.testing.assert_allclose(got["w"], np.median(seen, axis=0), rtol=1e-6)
    assert update._cache_size() == 1
    assert int(state.count) == 9


def test_a_single_spike_never_passes():
    for place in range(2, 5):
        tx, state = running_median(), running_median().init(jnp.zeros(1))
        for step in range(5):
            spike = 1e30 if step == place else 1.0
            got, state = tx.update(jnp.array([spike]), state)
            assert got.tolist() == [1.0]


def test_nan_is_shown_as_long_as_it_is_remembered():
    tx, state, seen = running_median(), running_median().init(jnp.zeros(2)), []
    for step in range(6):
        grads = jnp.array([jnp.nan if step == 1 else 1.0, 2.0])
        got, state = tx.update(grads, state)
        seen.append(jnp.isnan(got).tolist())
    spoilt = [False, True, True, True, False, False]
    assert seen == [[bad, False] for bad in spoilt]
    # apply_if_finite keeps such a gradient out of the memory.
    tx = optax.apply_if_finite(running_median(), 5)
    state = tx.init(jnp.zeros(2))
    for step in range(3):
        grads = jnp.array([jnp.nan if step == 1 else 1.0, 2.0])
        got, state = tx.update(grads, state)
        assert got.tolist() == ([0.0, 0.0] if step == 1 else [1.0, 2.0])


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_running_median_keeps_dtypes_in_scan_and_chain(dtype):
    params = {"w": jnp.ones((2, 2), dtype), "b": jnp.ones((), dtype)}
    tx = optax.chain(running_median(3), optax.adam(0.1))
    state = tx.init(params)

    def body(carry, step):
        params, state = carry
        grads = jax.tree.map(lambda p: (p * step).astype(p.dtype), params)
        updates, state = tx.update(grads, state, params, unknown=None)
        return (optax.apply_updates(params, updates), state), updates

    (new, after), _ = jax.lax.scan(body, (params, state), jnp.arange(4.0))
    chex.assert_trees_all_equal_shapes_and_dtypes((new, after), (params, state))
    chex.assert_tree_all_finite(new)


def test_running_median_under_masks_multi_steps_and_injection():
    grads = {"w": jnp.ones(2), "n": jnp.arange(2)}
    for mask in ({"w": True, "n": False}, {"w": False, "n": False}):
        tx = optax.masked(running_median(), mask)
        got, _ = tx.update(grads, tx.init(grads))
        chex.assert_trees_all_equal(got, grads)
    tx = optax.MultiSteps(running_median(), 2)
    state = tx.init(jnp.zeros(1))
    for value in (1.0, 3.0, 100.0, 200.0, 4.0, 4.0):
        got, state = tx.update(jnp.array([value]), state, jnp.zeros(1))
    np.testing.assert_allclose(got, 4.0)  # of the means 2, 150 and 4
    factory = optax.inject_hyperparams(running_median, static_args=("window",))
    tx = factory(window=3)
    got, _ = tx.update(jnp.ones(2), tx.init(jnp.zeros(2)))
    assert got.tolist() == [1.0, 1.0]


# What they are for


def test_means_that_heed_the_many_resist_spoilt_targets():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(120, 4))
    true = np.array([1.0, -2.0, 0.5, 3.0])
    y = x @ true
    y[:4] += 300.0 * np.sign(x[:4, 0])
    batch = (jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32))
    loss = lambda w, b: jnp.mean((b[0] @ w - b[1]) ** 2)
    functions = {
        "plain": jax.grad(loss),
        "winsorized": lambda w, b: winsorized_gradient(loss, w, b, percent=8),
        "median": lambda w, b: median_of_means_gradient(loss, w, b, groups=15),
    }
    error = {}
    for name, function in functions.items():
        step = lambda _, w, f=function: w - 0.05 * f(w, batch)
        found = jax.lax.fori_loop(0, 400, step, jnp.zeros(4))
        error[name] = float(np.linalg.norm(found - true))
    assert error["winsorized"] < 0.3 * error["plain"]
    assert error["median"] < 0.3 * error["plain"]
