"""What the estimator of diagonals refuses, in its own words."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.curvature.diagonal import diagonal

pytestmark = pytest.mark.untyped

KEY = jax.random.key(0)
operator = jax.tree_util.Partial(jnp.matmul, jnp.diag(jnp.arange(1.0, 10.0)))
like = jnp.ones(9)


def test_options():
    with pytest.raises(ValueError, match=r'"hutchinson" or "xdiag", got \'xtrace\''):
        diagonal(KEY, operator, like, num_matvecs=4, method="xtrace")
    with pytest.raises(ValueError, match="num_matvecs must be an integer >= 1, got 0"):
        diagonal(KEY, operator, like, num_matvecs=0)
    with pytest.raises(ValueError, match=r'at least 2 for method="xdiag", or 9 for'):
        diagonal(KEY, operator, like, num_matvecs=1, method="xdiag")
    options = {"num_matvecs": 6, "method": "xdiag", "memory_limit": 100}
    with pytest.raises(ValueError, match=r"diagonal: the vectors take 540 bytes"):
        diagonal(KEY, operator, like, **options)


def test_xdiag_takes_no_lopsided_operator():
    options = {"num_matvecs": 6, "method": "xdiag"}
    with pytest.raises(ValueError, match=r"must be symmetric for method=\"xdiag\""):
        diagonal(KEY, jnp.cumsum, like, **options)
    diagonal(KEY, jnp.cumsum, like, check_symmetric=False, **options)
    diagonal(KEY, jnp.cumsum, like, num_matvecs=6)


@pytest.mark.parametrize("method", ["hutchinson", "xdiag"])
def test_operators_keep_the_tree(method):
    with pytest.raises(ValueError, match="operator must give a tree like the one"):
        diagonal(KEY, lambda v: v[:-1], like, num_matvecs=6, method=method)


def test_numpy_inputs():
    matrix = np.diag(np.arange(1.0, 10.0, dtype=np.float32))
    numpy = jax.tree_util.Partial(jnp.matmul, matrix)
    found, _ = diagonal(KEY, numpy, np.ones(9, np.float32), num_matvecs=3)
    np.testing.assert_array_equal(found, np.arange(1.0, 10.0))
