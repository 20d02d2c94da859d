"""Objective against dense matrices from autodiff, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from jaxlab.likelihoods import Bernoulli, Categorical, Gaussian
from jaxlab.objective import GaussNewton, Objective, plain

LIKELIHOODS = {
    "categorical": Categorical(),
    "bernoulli": Bernoulli(),
    "gaussian": Gaussian(scale=0.7),
}


def _apply(params, x):
    return jnp.tanh(x @ params["w1"]) @ params["w2"]


def _problem(name, *, weighted=False, rows=(5,)):
    keys = jax.random.split(jax.random.key(0), 6)
    params = {
        "w1": jax.random.normal(keys[0], (3, 4)),
        "w2": jax.random.normal(keys[1], (4, 2)),
    }
    x = jax.random.normal(keys[2], (*rows, 3))
    targets = {
        "categorical": jax.random.randint(keys[3], rows, 0, 2),
        "bernoulli": jax.random.bernoulli(keys[3], 0.5, (*rows, 2)).astype(x.dtype),
        "gaussian": jax.random.normal(keys[3], (*rows, 2)),
    }[name]
    weights = (jax.random.uniform(keys[4], rows[:1]),) if weighted else ()
    v = jax.tree.map(lambda p: jax.random.normal(keys[5], p.shape), params)
    objective = Objective(plain(_apply), LIKELIHOODS[name])
    return objective, params, (x, targets, *weights), v


def _dense_parts(params, batch, likelihood):
    """Jacobian (rows, outputs, params) and shares by brute force."""
    flat, unravel = ravel_pytree(params)
    outputs = lambda p: _apply(unravel(p), batch[0]).reshape(-1, 2)
    jacobian = jax.jacobian(outputs)(flat)
    count = jacobian.shape[0]
    weights = np.ones(count)
    if len(batch) == 3:
        weights = np.repeat(batch[2], count // len(batch[2]))
    return outputs(flat), jacobian, weights / weights.sum()


@pytest.mark.parametrize("name", LIKELIHOODS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("rows", [(5,), (3, 2)])
def test_ggn_product_is_the_dense_matrix(name, weighted, rows, x64):
    objective, params, batch, v = _problem(name, weighted=weighted, rows=rows)
    outputs, jacobian, shares = _dense_parts(params, batch, objective.likelihood)
    flat_v, _ = ravel_pytree(v)
    expected = np.zeros(flat_v.shape)
    for i, share in enumerate(shares):
        y = batch[1].reshape(len(shares), -1)[i]
        y = y[0] if name == "categorical" else y
        loss = lambda f, y=y: objective.likelihood.row_nll(f[None], y[None])[0]
        hessian = jax.hessian(loss)(outputs[i])
        expected += share * jacobian[i].T @ hessian @ (jacobian[i] @ flat_v)
    product = objective.ggn_product(params, (), batch, v)
    np.testing.assert_allclose(ravel_pytree(product)[0], expected, atol=1e-13)
    fisher = objective.fisher_product(params, (), batch, v)
    np.testing.assert_allclose(ravel_pytree(fisher)[0], expected, atol=1e-13)
    operator = GaussNewton(objective, params, (), batch)
    np.testing.assert_allclose(
        operator.quadratic_form(v), flat_v @ expected, rtol=1e-12
    )
    np.testing.assert_allclose(ravel_pytree(operator(v))[0], expected, atol=1e-13)


@pytest.mark.parametrize("name", LIKELIHOODS)
@pytest.mark.parametrize("weighted", [False, True])
def test_empirical_fisher_is_the_sum_of_outer_products(name, weighted, x64):
    objective, params, batch, v = _problem(name, weighted=weighted)
    flat, unravel = ravel_pytree(params)
    *_, shares = _dense_parts(params, batch, objective.likelihood)
    expected = np.zeros(flat.shape)
    for i, share in enumerate(shares):
        row = tuple(part[i : i + 1] for part in batch[:2])
        gradient = jax.grad(lambda p, row=row: objective.loss(unravel(p), (), row)[0])
        g = gradient(flat)
        expected += share * g * (g @ ravel_pytree(v)[0])
    product = objective.fisher_product(params, (), batch, v, kind="empirical")
    np.testing.assert_allclose(ravel_pytree(product)[0], expected, atol=1e-13)


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_sampled_fisher_has_the_true_one_as_its_mean(name, x64):
    objective, params, batch, v = _problem(name)
    product = jax.jit(
        jax.vmap(
            lambda key: objective.fisher_product(
                params, (), batch, v, kind="sampled", sample_key=key
            )
        )
    )
    draws = ravel_pytree(
        jax.tree.map(
            lambda leaf: jnp.stack([leaf.mean(0), leaf.std(0) / 100]),
            product(jax.random.split(jax.random.key(1), 10_000)),
        )
    )[0]
    true = ravel_pytree(
        jax.tree.map(
            lambda leaf: jnp.stack([leaf, jnp.zeros_like(leaf)]),
            objective.fisher_product(params, (), batch, v),
        )
    )[0]
    is_mean = ravel_pytree(
        jax.tree.map(lambda leaf: jnp.stack([leaf * 0 + 1, leaf * 0]), params)
    )[0].astype(bool)
    errors = np.abs(draws - true)[is_mean]
    spread = draws[~is_mean]
    assert (errors < 5 * spread + 1e-12).all()


def test_loss_and_gradient_are_those_of_the_formula(x64):
    objective, params, batch, _ = _problem("gaussian", weighted=True)
    x, y, w = batch
    by_hand = lambda p: jnp.sum(
        w[:, None]
        * (((_apply(p, x) - y) / 0.7) ** 2 / 2 + jnp.log(0.7) + jnp.log(2 * jnp.pi) / 2)
        / w.sum()
    )
    (loss, state), grads = objective.value_and_grad(params, "kept", batch)
    expected, expected_grads = jax.value_and_grad(by_hand)(params)
    assert state == "kept"
    np.testing.assert_allclose(loss, expected, rtol=1e-13)
    for name, leaf in grads.items():
        np.testing.assert_allclose(leaf, expected_grads[name], rtol=1e-11)


def test_padding_rows_change_nothing(x64):
    objective, params, (x, y), v = _problem("categorical")
    padded = (
        jnp.concatenate([x, jnp.ones((3, 3))]),
        jnp.concatenate([y, jnp.full(3, -1)]),
        jnp.concatenate([jnp.ones(5), jnp.zeros(3)]),
    )
    for product in (
        lambda batch: objective.value_and_grad(params, (), batch)[1],
        lambda batch: objective.ggn_product(params, (), batch, v),
        lambda batch: objective.fisher_product(params, (), batch, v, kind="empirical"),
    ):
        short, long = ravel_pytree(product((x, y)))[0], ravel_pytree(product(padded))[0]
        np.testing.assert_allclose(long, short, atol=1e-14)


def test_state_and_noise_reach_the_model():
    def apply_fn(params, state, inputs, *, key, train):
        noise = jax.random.normal(key, inputs.shape) if train else 0.0
        return params * (inputs + noise), state + 1

    objective = Objective(apply_fn, Gaussian())
    batch = (jnp.ones((4, 2)), jnp.zeros((4, 2)))
    one = objective.loss(jnp.float32(1.0), 7, batch, key=jax.random.key(0))
    two = objective.loss(jnp.float32(1.0), 7, batch, key=jax.random.key(1))
    same = objective.loss(jnp.float32(1.0), 7, batch, key=jax.random.key(0))
    assert one[1] == 8
    assert one[0] == same[0] != two[0]
    quiet = objective.loss(jnp.float32(1.0), 7, batch, train=False)[0]
    np.testing.assert_allclose(quiet, 1 + jnp.log(2 * jnp.pi), rtol=1e-6)


def test_operators_do_not_recompile_when_params_or_data_change():
    apply = jax.jit(lambda operator, v: operator(v))
    for seed in range(3):
        w = jax.random.normal(jax.random.key(seed), (3, 2))
        x = jax.random.normal(jax.random.key(seed), (4, 3))
        objective = Objective(plain(_linear), Categorical())
        operator = GaussNewton(objective, w, (), (x, jnp.zeros(4, jnp.int32)))
        apply(operator, w)
    assert apply._cache_size() == 1


def _linear(w, x):
    return x @ w
