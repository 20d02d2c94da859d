"""Likelihoods against brute force: row by row in float64, Hessians by autodiff."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.likelihoods import Bernoulli, Categorical, Gaussian, row_shares

LIKELIHOODS = {
    "categorical": Categorical(),
    "bernoulli": Bernoulli(),
    "gaussian": Gaussian(scale=0.7),
}


def _targets(name, key, shape):
    if name == "categorical":
        return jax.random.randint(key, shape[:-1], 0, shape[-1])
    if name == "bernoulli":
        return jax.random.bernoulli(key, 0.4, shape).astype(jnp.int32)
    return jax.random.normal(key, shape)


def _row_by_row(name, outputs, targets):
    """One row's loss at a time, in NumPy, from the textbook formula."""
    outputs, targets = np.asarray(outputs, np.float64), np.asarray(targets)
    losses = np.zeros(outputs.shape[:-1])
    for row in np.ndindex(*losses.shape):
        f, y = outputs[row], targets[row]
        if name == "categorical":
            losses[row] = math.log(np.exp(f - f.max()).sum()) + f.max() - f[y]
        elif name == "bernoulli":
            p = 1 / (1 + np.exp(-f))
            losses[row] = -(y * np.log(p) + (1 - y) * np.log(1 - p)).sum()
        else:
            density = np.exp(-((y - f) ** 2) / (2 * 0.49)) / math.sqrt(
                2 * math.pi * 0.49
            )
            losses[row] = -np.log(density).sum()
    return losses


@pytest.mark.parametrize("name", LIKELIHOODS)
@pytest.mark.parametrize("shape", [(5, 3), (2, 4, 3), (1, 1), (6, 1)])
def test_nll_is_the_weighted_mean_of_row_losses(name, shape, x64):
    keys = jax.random.split(jax.random.key(0), 3)
    outputs = 3 * jax.random.normal(keys[0], shape)
    targets = _targets(name, keys[1], shape)
    likelihood = LIKELIHOODS[name]
    losses = _row_by_row(name, outputs, targets)
    np.testing.assert_allclose(likelihood.row_nll(outputs, targets), losses, rtol=1e-12)
    np.testing.assert_allclose(
        likelihood.nll(outputs, targets), losses.mean(), rtol=1e-12
    )
    for weights in (
        jax.random.uniform(keys[2], shape[:1]),
        jax.random.uniform(keys[2], shape[:-1]),
    ):
        full = np.broadcast_to(
            np.reshape(weights, weights.shape + (1,) * (losses.ndim - weights.ndim)),
            losses.shape,
        )
        np.testing.assert_allclose(
            likelihood.nll(outputs, targets, weights=weights),
            (full * losses).sum() / full.sum(),
            rtol=1e-12,
        )


@pytest.mark.parametrize("name", LIKELIHOODS)
@pytest.mark.parametrize("weighted", [False, True])
def test_hessian_product_is_the_hessian_of_nll(name, weighted, x64):
    keys = jax.random.split(jax.random.key(1), 4)
    shape = (2, 3, 4)
    outputs, v = (jax.random.normal(k, shape) for k in keys[:2])
    targets = _targets(name, keys[2], shape)
    weights = jnp.array([0.5, 2.0]) if weighted else None
    likelihood = LIKELIHOODS[name]
    loss = lambda f: likelihood.nll(f.reshape(shape), targets, weights=weights)
    dense = jax.hessian(loss)(outputs.ravel())
    product = likelihood.hessian_product(outputs, v, weights=weights)
    np.testing.assert_allclose(product.ravel(), dense @ v.ravel(), atol=1e-13)


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_samples_have_the_mean_score_zero_and_the_fisher_matrix(name, x64):
    """E[g] = 0 and E[g g^T] = Hessian at any outputs: the Fisher identity."""
    likelihood, draws = LIKELIHOODS[name], 20_000
    f = jnp.array([0.5, -1.0, 0.3])
    rows = jnp.broadcast_to(f, (draws, 3))
    targets = likelihood.sample(jax.random.key(2), rows)
    score = jax.grad(lambda f: likelihood.row_nll(f, targets).sum())(rows)
    fisher = score.T @ score / draws
    hessian = jax.vmap(
        lambda v: likelihood.hessian_product(f[None], v[None])[0], out_axes=1
    )(jnp.eye(3))
    spread = 5 / math.sqrt(draws)
    np.testing.assert_allclose(score.mean(0), 0, atol=3 * spread)
    np.testing.assert_allclose(fisher, hessian, atol=6 * spread)


@pytest.mark.parametrize("size", [1e4, -1e4])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_huge_logits_stay_finite(size, dtype):
    outputs = jnp.array([[size, 0.0, -size]], dtype)
    for likelihood, targets, expected in (
        (Categorical(), jnp.array([0]), 0.0 if size > 0 else 2e4),
        (Categorical(), jnp.array([2]), 2e4 if size > 0 else 0.0),
        (Bernoulli(), jnp.array([[1, 0, 0]]), None),
    ):
        # bfloat16 rounds 1e4 to 9984.
        loss, grad = jax.value_and_grad(likelihood.nll)(outputs, targets)
        assert jnp.isfinite(loss)
        assert jnp.isfinite(grad.astype(jnp.float32)).all()
        if expected is not None:
            np.testing.assert_allclose(loss, expected, rtol=4e-3, atol=1e-6)
        v = jnp.ones_like(outputs)
        assert jnp.isfinite(likelihood.hessian_product(outputs, v)).all()
        assert jnp.isfinite(
            jnp.asarray(likelihood.sample(jax.random.key(0), outputs))
        ).all()


def test_one_hot_and_integer_targets_agree():
    outputs = jax.random.normal(jax.random.key(3), (4, 2, 5))
    targets = jax.random.randint(jax.random.key(4), (4, 2), 0, 5)
    for hot in (
        jax.nn.one_hot(targets, 5),
        jax.nn.one_hot(targets, 5, dtype=jnp.int32),
    ):
        np.testing.assert_allclose(
            Categorical().nll(outputs, hot),
            Categorical().nll(outputs, targets),
            rtol=1e-6,
        )


def test_masked_classes_cost_nothing_with_one_hot_targets():
    outputs = jnp.array([[0.0, 0.0, -jnp.inf]])
    hot = jnp.array([[1.0, 0.0, 0.0]])
    loss, grad = jax.value_and_grad(Categorical().nll)(outputs, hot)
    np.testing.assert_allclose(loss, math.log(2), rtol=1e-6)
    np.testing.assert_allclose(grad, [[-0.5, 0.5, 0.0]], atol=1e-7)


def test_padding_rows_change_nothing_whatever_they_hold():
    outputs = jax.random.normal(jax.random.key(5), (4, 3))
    targets = jnp.array([0, 1, -1, 99])
    weights = jnp.array([1.0, 1.0, 0.0, 0.0])
    loss, grad = jax.value_and_grad(Categorical().nll)(
        outputs, targets, weights=weights
    )
    short, short_grad = jax.value_and_grad(Categorical().nll)(outputs[:2], targets[:2])
    np.testing.assert_allclose(loss, short, rtol=1e-6)
    np.testing.assert_allclose(grad[:2], short_grad, rtol=1e-6)
    np.testing.assert_array_equal(grad[2:], 0)


@pytest.mark.parametrize("target", [-1, 3, 99])
def test_a_class_that_does_not_exist_is_nan_not_another_class(target):
    assert jnp.isnan(Categorical().nll(jnp.zeros((1, 3)), jnp.array([target])))


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_no_rows_and_no_weight_give_zero(name):
    likelihood = LIKELIHOODS[name]
    empty = jnp.zeros((0, 3))
    targets = _targets(name, jax.random.key(0), (0, 3))
    assert likelihood.nll(empty, targets) == 0
    outputs = jnp.ones((2, 3))
    targets = _targets(name, jax.random.key(0), (2, 3))
    weights = jnp.zeros(2)
    loss, grad = jax.value_and_grad(likelihood.nll)(outputs, targets, weights=weights)
    assert loss == 0
    np.testing.assert_array_equal(grad, 0)
    np.testing.assert_array_equal(
        likelihood.hessian_product(outputs, outputs, weights=weights), 0
    )


def test_nan_outputs_pass_through():
    outputs = jnp.array([[jnp.nan, 0.0]])
    assert jnp.isnan(Categorical().nll(outputs, jnp.array([0])))
    assert jnp.isnan(Bernoulli().nll(outputs, jnp.zeros((1, 2))))
    assert jnp.isnan(Gaussian().nll(outputs, jnp.zeros((1, 2))))


def test_bfloat16_outputs_reduce_in_float32():
    outputs = jnp.full((512, 2), 0.25, jnp.bfloat16)
    loss = Categorical().nll(outputs, jnp.zeros(512, jnp.int32))
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, math.log(2), rtol=1e-6)
    v = jnp.ones_like(outputs)
    assert Categorical().hessian_product(outputs, v).dtype == jnp.bfloat16
    assert Gaussian().sample(jax.random.key(0), outputs).dtype == jnp.bfloat16


def test_scale_may_be_traced_and_learned():
    outputs, targets = jnp.zeros((100, 1)), 2 * jnp.ones((100, 1))
    loss = lambda log_scale: Gaussian(jnp.exp(log_scale)).nll(outputs, targets)
    # -ln p = ln s + 2/s^2 + const: the best s is 2.
    assert abs(jax.jit(jax.grad(loss))(jnp.log(2.0))) < 1e-6
    assert loss(jnp.log(2.0)) < loss(jnp.log(1.9))


def test_likelihoods_pass_through_jit_as_arguments():
    nll = jax.jit(lambda likelihood, f, y: likelihood.nll(f, y))
    f, y = jnp.ones((2, 3)), jnp.zeros((2, 3))
    for scale in (1.0, 2.0):
        np.testing.assert_allclose(
            nll(Gaussian(scale), f, y), Gaussian(scale).nll(f, y), rtol=1e-6
        )
    assert nll._cache_size() == 1


@pytest.mark.parametrize("rows", [(0,), (1,), (5,), (2, 3)])
def test_row_shares_sum_to_one(rows):
    total = row_shares(rows).sum()
    np.testing.assert_allclose(total, 1.0 if math.prod(rows) else 0.0, rtol=1e-6)
