"""The matrix of an operator, written out."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxlab.curvature.dense import full_matrix
from jaxlab.curvature.hessian import hessian_operator

A = np.random.default_rng(0).normal(size=(6, 6)).astype(np.float32)


def apply(matrix, tree):
    """Multiplies b and w strung together."""
    image = matrix @ jnp.concatenate([tree["b"], tree["w"].ravel()])
    return {"b": image[:2], "w": image[2:].reshape(2, 2)}


LIKE = {"b": jnp.zeros(2), "w": jnp.zeros((2, 2))}


def test_columns_are_images_of_unit_vectors():
    operator = jax.tree_util.Partial(apply, jnp.asarray(A))
    np.testing.assert_allclose(full_matrix(operator, LIKE), A, rtol=1e-6)
    inside = jax.jit(lambda operator: full_matrix(operator, LIKE))
    np.testing.assert_allclose(inside(operator), A, rtol=1e-6)
    plain = full_matrix(lambda v: apply(jnp.asarray(A), v), LIKE)
    np.testing.assert_allclose(plain, A, rtol=1e-6)


def test_holes_leave_a_block_and_half_precision_gives_single():
    loss = lambda p: jnp.sum(p["w"] ** 2) * (1 + jnp.sum(p["b"] ** 2))
    operator = hessian_operator(loss, LIKE)
    block = full_matrix(operator, {"b": optax.MaskedNode(), "w": LIKE["w"]})
    np.testing.assert_allclose(block, 2 * np.eye(4))
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), LIKE)
    found = full_matrix(hessian_operator(loss, half), half)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, np.diag([0, 0, 2, 2, 2, 2]))


def test_products_stand_in_one_loop():
    """The program holds one product, whatever the size."""
    count = lambda n: str(
        jax.make_jaxpr(lambda d: full_matrix(jax.tree_util.Partial(_times, d), d))(
            jnp.ones(n)
        )
    ).count("mul")
    assert count(3) == count(40)


def _times(d, v):
    return d * v


@dataclasses.dataclass(frozen=True)
class Streamed:
    host: bool = True

    def __call__(self, v):
        assert not isinstance(v["b"], jax.core.Tracer)
        return apply(jnp.asarray(A), v)


def test_host_operators_and_convolutions_are_driven_from_python():
    np.testing.assert_allclose(full_matrix(Streamed(), LIKE), A, rtol=1e-6)
    calls = []

    def convolved(kernel, v):
        calls.append(None)
        return jnp.convolve(v, kernel, mode="same")

    kernel = jnp.array([1.0, 2.0, 1.0])
    found = full_matrix(jax.tree_util.Partial(convolved, kernel), jnp.zeros(5))
    np.testing.assert_allclose(found, 2 * np.eye(5) + np.eye(5, k=1) + np.eye(5, k=-1))
    assert len(calls) <= 2  # traced, not run
