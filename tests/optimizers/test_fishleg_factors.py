"""The inverse Fisher itself: symmetric, semi-definite, equal to its dense form."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from jaxlab.optimizers import InverseFisher, q_apply, q_dense, q_diag, q_init

PARAMS = {
    "dense": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)},
    "stack": jnp.ones((2, 3, 2)),
    "embedding": jnp.ones((4, 3)),
    "gain": jnp.ones(3),
    "small": jnp.ones((2, 2)),
}
RULE = {"small": "full", "dense/kernel": "scaled"}


def drawn(seed=0, *, params=PARAMS, max_size=1024):
    """Makes an inverse Fisher of random factors."""
    q = q_init(params, rule=RULE, max_size=max_size)
    noise = optax.tree.random_like(jax.random.key(seed), q, jax.random.normal)
    return jax.tree.map(jnp.add, q, noise)


def vector(seed):
    return optax.tree.random_like(jax.random.key(seed), PARAMS, jax.random.normal)


def test_the_start_is_the_scale_exactly():
    u = vector(1)
    found = q_apply(q_init(PARAMS, scale=16.0), u)
    jax.tree.map(
        lambda f, x: np.testing.assert_allclose(f, 16 * x, rtol=1e-6), found, u
    )


@pytest.mark.parametrize("max_size", [2, 1024])
def test_symmetric_and_semi_definite(x64, max_size):
    params = optax.tree.cast(PARAMS, jnp.float64)
    q = drawn(params=params, max_size=max_size)
    matrix = q_dense(q, params)
    np.testing.assert_allclose(matrix, matrix.T, atol=1e-10)
    assert np.linalg.eigvalsh(matrix)[0] > -1e-10
    np.testing.assert_allclose(
        np.diag(matrix), ravel_pytree(q_diag(q, params))[0], rtol=1e-10
    )


def test_signs_of_factors_do_not_matter():
    q, u = drawn(), vector(2)
    flipped = InverseFisher(jax.tree.map(lambda f: -f, q.factors), q.blocks)
    same = lambda a, b: np.testing.assert_array_equal(a, b)
    jax.tree.map(same, q_apply(q, u), q_apply(flipped, u))


def test_a_dense_layer_is_a_kronecker_product(x64):
    u = {"kernel": jnp.ones((3, 2))}
    q = jax.tree.map(
        lambda f: f + jax.random.normal(jax.random.key(0), f.shape), q_init(u)
    )
    factors = q.factors["kernel"]
    left, right = factors.left[0], factors.right[0]
    expected = jnp.kron(left.T @ left, right.T @ right)
    np.testing.assert_allclose(q_dense(q, u), expected, atol=1e-12)


def test_parts_of_a_cut_side_know_nothing_of_each_other(x64):
    u = {"kernel": jnp.ones((5, 3))}
    q = q_init(u, max_size=2)
    q = jax.tree.map(lambda f: f + jax.random.normal(jax.random.key(0), f.shape), q)
    matrix = q_dense(q, u).reshape(5, 3, 5, 3)
    assert np.abs(matrix[:2, :, 2:]).max() == 0
    assert np.abs(matrix[:, :2, :, 2:]).max() == 0
    assert np.abs(matrix[0, 0, 1, 1]) > 0


def test_dtype_and_holes_are_kept():
    params = {"a": jnp.ones((3, 2), jnp.bfloat16), "b": optax.MaskedNode()}
    q = q_init(params)
    assert {leaf.dtype for leaf in jax.tree.leaves(q)} == {jnp.dtype("float32")}
    found = q_apply(q, params)
    assert found["a"].dtype == jnp.bfloat16
    assert isinstance(found["b"], optax.MaskedNode)


def test_transforms_of_jax():
    q, u = drawn(), vector(3)
    many = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), u)
    found = jax.vmap(q_apply, in_axes=(None, 0))(q, many)
    expected = jax.jit(q_apply)(q, u)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5)
    jax.tree.map(lambda f, e: close(f[1], 2 * e), found, expected)
    shapes = jax.eval_shape(q_init, PARAMS)
    assert jax.tree.structure(shapes) == jax.tree.structure(q_init(PARAMS))
