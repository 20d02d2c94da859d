"""What the layouts and the feature-major product say to wrong input."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.structured import monarch_matmul, monarch_matmul_features

pytestmark = pytest.mark.untyped

W1, W2 = np.ones((2, 6, 4)), np.ones((3, 5, 4))
PRODUCTS = (monarch_matmul, monarch_matmul_features)


@pytest.mark.parametrize("product", PRODUCTS)
def test_unknown_layouts_are_refused(product):
    with pytest.raises(ValueError, match=r'"block_major", got .blocks'):
        product(np.ones((8, 8)), W1, W2, output_layout="blocks")


@pytest.mark.parametrize("shape", [(), (7, 8), (9,)])
def test_the_feature_axis_comes_first(shape):
    with pytest.raises(ValueError, match=r"first axis of x must have k \* p = 2 \* 4"):
        monarch_matmul_features(np.ones(shape), W1, W2)


@pytest.mark.parametrize("product", PRODUCTS)
def test_integers_and_factors_that_do_not_fit_are_refused(product):
    with pytest.raises(ValueError, match="x must hold real or complex"):
        product(np.ones((8, 8), int), W1, W2)
    with pytest.raises(ValueError, match=r"k \* q == l \* r"):
        product(np.ones((8, 8)), W1, np.ones((3, 5, 5)))


def test_numpy_arrays_are_welcome():
    y = monarch_matmul_features(np.ones((8, 2), np.float32), W1, W2)
    np.testing.assert_array_equal(y, jnp.full((15, 2), 16.0))


def test_platforms_that_do_not_exist():
    w = jnp.ones((2, 2, 2))
    with pytest.raises(ValueError, match='platform must be None, "cpu"'):
        monarch_matmul(jnp.ones(4), w, w, platform="cpuu")
