"""Efficient SAM against SAM, a loop in NumPy, and its mean over the draws."""

import pathlib
import runpy
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlab.sharpness.esam import esam_value_and_grad
from jaxlab.sharpness.gradient_norm_penalty import gnp_value_and_grad

net = types.SimpleNamespace(
    **runpy.run_path(str(pathlib.Path(__file__).with_name("golden_net.py")))
)
GOLDEN = net.GOLDEN
TIGHT = {"rtol": 0, "atol": 1e-10}
ALL = {"weight_fraction": 1.0, "example_fraction": 1.0}


def losses_fn(at, batch):
    inputs, targets = batch
    hidden = jnp.tanh(inputs @ at["W1"] + at["b1"][None])
    logits = hidden @ at["W2"] + at["b2"][None]
    return optax.softmax_cross_entropy(logits, targets)


def _rows(batch, index):
    return jax.tree.map(lambda leaf: leaf[np.asarray(index)], batch)


def test_all_weights_and_examples_are_sam(x64):
    f = esam_value_and_grad(losses_fn, radius=0.05, **ALL)
    value, grads = jax.jit(f)(jax.random.key(3), net.params(), net.batch())
    np.testing.assert_allclose(value, GOLDEN["loss"], rtol=1e-12)
    np.testing.assert_allclose(net.flat(grads), GOLDEN["mixed_0"], **TIGHT)


@pytest.mark.parametrize(
    "options",
    [
        {"adaptive": True},
        {"mask": {"W1": True, "b1": False, "W2": True, "b2": False}},
    ],
)
def test_options_are_those_of_sam(x64, options):
    f = esam_value_and_grad(losses_fn, radius=0.3, **ALL, **options)
    sam = gnp_value_and_grad(net.loss_fn, alpha=1.0, radius=0.3, **options)
    got = f(jax.random.key(0), net.params(), net.batch())
    chex.assert_trees_all_close(got, sam(net.params(), net.batch()), **TIGHT)


@pytest.mark.parametrize(("fraction", "count"), [(0.5, 8), (0.3, 5), (1e-6, 1)])
def test_examples_are_those_whose_losses_rose_most(x64, fraction, count):
    params, batch, g = net.params(), net.batch(), GOLDEN["g"]
    point = net.tree(net.flat(params) + 0.4 * g / np.linalg.norm(g))
    rise = np.array(losses_fn(point, batch)) - np.array(losses_fn(params, batch))
    worst = sorted(range(16), key=lambda i: -rise[i])[:count]
    parts = [jax.grad(net.loss_fn)(point, _rows(batch, [i])) for i in worst]
    want = np.mean([net.flat(part) for part in parts], axis=0)
    f = esam_value_and_grad(
        losses_fn, radius=0.4, weight_fraction=1.0, example_fraction=fraction
    )
    value, grads = jax.jit(f)(jax.random.key(0), params, batch)
    np.testing.assert_allclose(net.flat(grads), want, **TIGHT)
    np.testing.assert_allclose(value, GOLDEN["loss"], rtol=1e-12)


def _moves(key, fraction, radius=0.05):
    """The steps of the weights, read off a loss whose gradient is constant, then w."""
    slope = jnp.linspace(1.0, 2.0, 400)

    def losses(w, x):
        # Linear near w = 0 for the first gradient; the second one tells where it is.
        return jnp.sum(slope * w + 0.5 * w**2)[None] + 0.0 * x

    f = esam_value_and_grad(
        losses, radius=radius, weight_fraction=fraction, example_fraction=1.0
    )
    _, grads = f(key, jnp.zeros(400), jnp.zeros(1))
    return grads - slope, radius * slope / jnp.linalg.norm(slope)


def test_weights_move_with_the_probability_and_are_scaled_by_it(x64):
    keys = jax.random.split(jax.random.key(1), 200)
    moves, sam = jax.vmap(lambda key: _moves(key, 0.6))(keys)
    moved = np.abs(moves) > 1e-8
    np.testing.assert_allclose(np.mean(moved), 0.6, atol=0.01)  # 80,000 draws
    np.testing.assert_allclose(
        np.asarray(moves)[moved], (np.asarray(sam) / 0.6)[moved], atol=1e-12
    )
    # Weights are drawn apart from each other: the count varies as a binomial's does.
    assert 0.7 < np.std(moved.sum(1)) / np.sqrt(400 * 0.24) < 1.3
    # The mean over the draws is the step of SAM.
    error = np.mean(moves, axis=0) / np.asarray(sam)[0] - 1
    assert abs(np.mean(error)) < 0.02
    assert np.std(error) < 0.1  # 0.816 / sqrt(200) is expected


def test_leaves_are_drawn_apart_and_keys_decide():
    params = {"a": jnp.ones(64), "b": jnp.ones(64)}
    losses = lambda p, x: jnp.sum(p["a"] ** 2 + p["b"] ** 2)[None] + 0.0 * x
    f = esam_value_and_grad(losses, radius=1.0, example_fraction=1.0)
    one = f(jax.random.key(0), params, jnp.zeros(1))[1]
    again = f(jax.random.key(0), params, jnp.zeros(1))[1]
    other = f(jax.random.key(1), params, jnp.zeros(1))[1]
    chex.assert_trees_all_equal(one, again)
    assert np.any(one["a"] != one["b"])
    assert np.any(one["a"] != other["a"])


def test_order_of_the_rows_does_not_count(x64):
    f = jax.jit(esam_value_and_grad(losses_fn, radius=0.2))
    key, order = jax.random.key(2), np.random.default_rng(0).permutation(16)
    one = f(key, net.params(), net.batch())
    two = f(key, net.params(), _rows(net.batch(), order))
    chex.assert_trees_all_close(one, two, **TIGHT)


def test_zero_gradient_stays_finite():
    losses = lambda w, x: jnp.sum(w**2)[None] * x
    f = esam_value_and_grad(losses, radius=0.1)
    value, grads = f(jax.random.key(0), jnp.zeros(3), jnp.ones(4))
    assert value == 0
    assert grads.tolist() == [0, 0, 0]


def test_dtypes_arguments_and_one_trace():
    traces = []

    def losses(w, x, scale):
        traces.append(w.dtype)
        return scale * jnp.sum(x * w[None], axis=1).astype(jnp.float32) ** 2

    f = jax.jit(esam_value_and_grad(losses, radius=0.1))
    w = jnp.ones(3, jnp.bfloat16)
    for seed in range(3):
        x = jnp.full((6, 3), float(seed))
        value, grads = f(jax.random.key(seed), w, x, 2.0)
        assert float(value) == 18.0 * seed**2
    assert grads.dtype == jnp.bfloat16
    # First gradient, losses at the point, second gradient: once each.
    assert traces == [jnp.bfloat16, jnp.float32, jnp.float32]


def test_it_learns():
    draw = np.random.default_rng(0)
    x = jnp.asarray(draw.normal(size=(64, 5)), jnp.float32)
    y = x @ jnp.arange(1.0, 6.0)
    losses = lambda w, batch: (batch[0] @ w - batch[1]) ** 2
    f = esam_value_and_grad(losses, radius=0.05)

    def step(w, key):
        value, grads = f(key, w, (x, y))
        return w - 0.03 * grads, value

    keys = jax.random.split(jax.random.key(0), 200)
    _, values = jax.lax.scan(step, jnp.zeros(5), keys)
    assert values[-1] < 0.02 < 10 < values[0]
