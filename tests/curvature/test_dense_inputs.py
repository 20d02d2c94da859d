"""What full_matrix refuses."""

import jax
import jax.numpy as jnp
import pytest

from jaxlab.curvature.dense import full_matrix
from jaxlab.curvature.hessian import hessian_operator

pytestmark = pytest.mark.untyped


def test_large_matrices_need_force():
    with pytest.raises(ValueError, match=r"5,001 entries.* 100,040,004 bytes.*force"):
        full_matrix(lambda v: v, jnp.ones(5001))
    shape = jax.eval_shape(lambda: full_matrix(lambda v: v, jnp.ones(5001), force=True))
    assert shape.shape == (5001, 5001)


def test_operators_that_give_another_tree_and_likes_that_are_not_real():
    with pytest.raises(ValueError, match="must give a tree like the one"):
        full_matrix(lambda v: v[:2], jnp.ones(3))
    with pytest.raises(ValueError, match="leaves of like must be real"):
        full_matrix(lambda v: v, jnp.ones(3, jnp.int32))


def test_streams_under_jit():
    loss = lambda w, batch: jnp.mean((batch[0] @ w - batch[1]) ** 2)
    operator = hessian_operator(loss, jnp.ones(2), lambda: [(jnp.eye(2), jnp.ones(2))])
    with pytest.raises(ValueError, match="streams its data"):
        jax.jit(lambda v: full_matrix(operator, v))(jnp.ones(2))
