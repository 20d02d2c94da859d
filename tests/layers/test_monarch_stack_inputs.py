"""``MonarchStack`` on wrong sizes."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxlab.layers import MonarchStack

pytestmark = pytest.mark.untyped


@pytest.mark.parametrize(
    ("features", "options", "message"),
    [
        ((8,), {}, "two or more widths"),
        ((8, 0), {}, "two or more widths"),
        ((8, 16, 8), {"nblocks": 0}, "nblocks=0"),
        ((8, 24, 8), {}, "multiples of 16"),
        ((8, 10, 8), {"order": "block_major"}, "multiples of 4"),
        ((8, 16, 8), {"order": "rows"}, "order must be"),
        ((8, 16, 8), {"rank": 5}, "rank=5"),
        ((8, 16, 8), {"scheme": "glorot"}, "'glorot'"),
    ],
)
def test_options_out_of_range(features, options, message):
    with pytest.raises(ValueError, match=message):
        MonarchStack(features, **options, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("first", [False, True])
def test_inputs_of_the_wrong_width(first):
    stack = MonarchStack((10, 16, 7), features_first=first, rngs=nnx.Rngs(0))
    for shape in ((2, 12), (12, 2), ()):
        with pytest.raises(ValueError, match=r"features\[0\]=10"):
            stack(np.ones(shape))
    assert stack(np.ones((10, 10))).dtype == jnp.float32
