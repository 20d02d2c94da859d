"""SAM along past gradients against a loop in NumPy and the limits it has."""

import pathlib
import runpy
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlab.sharpness.momentum_sam import momentum_sam_value_and_grad
from jaxlab.sharpness.perturbation import perturb

net = types.SimpleNamespace(
    **runpy.run_path(str(pathlib.Path(__file__).with_name("golden_net.py")))
)
GOLDEN = net.GOLDEN
TIGHT = {"rtol": 0, "atol": 1e-10}


def _train(method, steps=3, lr=0.5):
    update = jax.jit(method.update)
    params, state, seen = net.params(), method.init(net.params()), []
    for _ in range(steps):
        _, grads, state = update(params, state, net.batch())
        params = jax.tree.map(lambda p, g: p - lr * g, params, grads)
        seen.append(net.flat(params))
    return np.stack(seen), state


def test_first_step_is_the_plain_gradient(x64):
    method = momentum_sam_value_and_grad(net.loss_fn, radius=0.3)
    state = method.init(net.params())
    value, grads, state = method.update(net.params(), state, net.batch())
    np.testing.assert_allclose(value, GOLDEN["loss"], rtol=1e-12)
    np.testing.assert_allclose(net.flat(grads), GOLDEN["g"], **TIGHT)
    np.testing.assert_allclose(net.flat(state.direction), 0.1 * GOLDEN["g"], **TIGHT)
    assert state.count == 1


def test_radius_zero_is_plain_training(x64):
    seen, _ = _train(momentum_sam_value_and_grad(net.loss_fn, radius=0.0))
    np.testing.assert_allclose(seen, GOLDEN["steps_sgd"], **TIGHT)


def test_the_gradient_of_this_batch_as_past_is_sam(x64):
    method = momentum_sam_value_and_grad(net.loss_fn, radius=0.05)
    state = method.init(net.params())._replace(direction=net.tree(GOLDEN["g"]))
    _, grads, _ = method.update(net.params(), state, net.batch())
    np.testing.assert_allclose(net.flat(grads), GOLDEN["mixed_0"], **TIGHT)


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9])
def test_against_a_loop(x64, decay):
    method = momentum_sam_value_and_grad(net.loss_fn, radius=0.2, decay=decay)
    seen, state = _train(method, steps=5)
    w, d = net.flat(net.params()), np.zeros(92)
    for step in range(5):
        norm = np.linalg.norm(d)
        point = w + 0.2 * d / norm if norm else w
        g = net.flat(net.grad_fn(net.tree(point)))
        w, d = w - 0.5 * g, decay * d + (1 - decay) * g
        np.testing.assert_allclose(seen[step], w, **TIGHT)
    np.testing.assert_allclose(net.flat(state.direction), d, **TIGHT)


def test_value_and_aux_are_those_of_the_perturbed_point(x64):
    with_aux = lambda at, batch: (net.loss_fn(at, batch), at["b2"])
    method = momentum_sam_value_and_grad(with_aux, radius=0.2, has_aux=True)
    state = method.init(net.params())._replace(direction=net.tree(GOLDEN["g"]))
    (value, aux), _, _ = method.update(net.params(), state, net.batch())
    point = perturb(net.params(), net.tree(GOLDEN["g"]), radius=0.2)
    np.testing.assert_allclose(value, net.loss_fn(point, net.batch()), rtol=1e-12)
    np.testing.assert_allclose(aux, point["b2"], **TIGHT)
    assert value > GOLDEN["loss"] + 0.1  # uphill


@pytest.mark.parametrize("adaptive", [False, True])
def test_mask_and_adaptive_are_those_of_perturb(x64, adaptive):
    options = {
        "mask": {"W1": True, "b1": False, "W2": True, "b2": False},
        "adaptive": adaptive,
    }
    method = momentum_sam_value_and_grad(net.loss_fn, radius=0.2, **options)
    g = net.tree(GOLDEN["g"])
    state = method.init(net.params())._replace(direction=g)
    _, grads, _ = method.update(net.params(), state, net.batch())
    point = perturb(net.params(), g, radius=0.2, **options)
    chex.assert_trees_all_close(grads, net.grad_fn(point), **TIGHT)


def test_a_schedule_counts_the_steps(x64):
    late = lambda count: jnp.where(count == 2, 0.3, 0.0)
    seen, state = _train(momentum_sam_value_and_grad(net.loss_fn, radius=late))
    np.testing.assert_allclose(seen[:2], GOLDEN["steps_sgd"][:2], **TIGHT)
    assert np.linalg.norm(seen[2] - GOLDEN["steps_sgd"][2]) > 1e-3
    assert state.count == 3


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_a_scaled_loss_scales_the_gradient(x64, scale):
    scaled = lambda at, batch: scale * net.loss_fn(at, batch)
    one, _ = _train(momentum_sam_value_and_grad(net.loss_fn, radius=0.2))
    two, _ = _train(momentum_sam_value_and_grad(scaled, radius=0.2), lr=0.5 / scale)
    np.testing.assert_allclose(one, two, rtol=0, atol=1e-9)


def test_dtypes_state_and_one_trace():
    traces = []

    def loss_fn(w, x):
        traces.append(w.dtype)
        return jnp.mean((x @ w.astype(jnp.float32)) ** 2)

    method = momentum_sam_value_and_grad(loss_fn, radius=0.1)
    update = jax.jit(method.update)
    w = jnp.ones(3, jnp.bfloat16)
    start = state = method.init(w)
    for seed in range(3):
        _, grads, state = update(w, state, jnp.full((4, 3), float(seed)))
        chex.assert_trees_all_equal_shapes_and_dtypes(state, start)
    assert grads.dtype == jnp.bfloat16
    assert state.direction.dtype == jnp.float32
    assert traces == [jnp.float32]  # one gradient, one trace
    abstract = jax.eval_shape(method.init, w)
    chex.assert_trees_all_equal_shapes_and_dtypes(abstract, start)


def test_zero_gradients_stay_finite():
    method = momentum_sam_value_and_grad(lambda w: jnp.sum(w**2), radius=0.1)
    w = jnp.zeros(3)
    state = method.init(w)
    for _ in range(2):
        value, grads, state = method.update(w, state)
    assert value == 0
    assert grads.tolist() == [0, 0, 0]


def test_it_learns_with_any_optimizer():
    draw = np.random.default_rng(0)
    x = jnp.asarray(draw.normal(size=(64, 5)), jnp.float32)
    y = x @ jnp.arange(1.0, 6.0)
    loss_fn = lambda w: jnp.mean((x @ w - y) ** 2)
    method = momentum_sam_value_and_grad(loss_fn, radius=0.05)
    tx = optax.adam(0.1)

    def step(carry, _):
        w, state, opt_state = carry
        value, grads, state = method.update(w, state)
        updates, opt_state = tx.update(grads, opt_state, w)
        return (optax.apply_updates(w, updates), state, opt_state), value

    w = jnp.zeros(5)
    carry = (w, method.init(w), tx.init(w))
    carry, values = jax.lax.scan(step, carry, length=300)
    assert loss_fn(carry[0]) < 0.02 < 10 < values[0]
