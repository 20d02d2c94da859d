"""What blocks, changes of scale and shifts refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.curvature.hessian import hessian_operator
from jaxlab.curvature.wrappers import (
    block_operator,
    damped_operator,
    preconditioned_operator,
)

pytestmark = pytest.mark.untyped

PARAMS = {"a": {"w": jnp.ones(2)}, "b": jnp.ones(3)}
WHOLE = hessian_operator(lambda p: sum(map(jnp.sum, jax.tree.leaves(p))), PARAMS)


def test_paths_that_lead_nowhere():
    with pytest.raises(ValueError, match=r"'c' .* at \(\) there are \['a', 'b'\]"):
        block_operator(WHOLE, "c")
    with pytest.raises(ValueError, match=r"at \('a',\) there are \['w'\]"):
        block_operator(WHOLE, ("a", 0))
    with pytest.raises(ValueError, match=r"at \('b',\) there are \[\]"):
        block_operator(WHOLE, ("b", 0))
    with pytest.raises(ValueError, match="pass like="):
        block_operator(jax.tree_util.Partial(jnp.multiply, 2.0), "a")


def test_scales_unlike_the_parameters():
    for scale in ({"a": jnp.ones(2)}, jnp.ones(2)):
        with pytest.raises(ValueError, match="scale must be a tree like the param"):
            preconditioned_operator(WHOLE, scale)(PARAMS)
    scale = {"a": {"w": np.ones(3, np.float32)}, "b": np.ones(3, np.float32)}
    with pytest.raises(ValueError, match="scale must have the shapes"):
        preconditioned_operator(WHOLE, scale)(PARAMS)


@pytest.mark.parametrize("damping", [-1.0, float("nan"), float("inf"), np.ones(2)])
def test_dampings(damping):
    with pytest.raises(ValueError, match="damping must be"):
        damped_operator(WHOLE, damping)
