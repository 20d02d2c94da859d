import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.models.inputs import as_images, patches


def test_one_pixel_patches_are_the_pixels():
    x = jnp.arange(2 * 9 * 2.0).reshape(2, 3, 3, 2)
    np.testing.assert_array_equal(patches(x, patch=1), x.reshape(2, 9, 2))


def test_one_patch_is_the_image():
    x = jnp.arange(2 * 9 * 2.0).reshape(2, 3, 3, 2)
    np.testing.assert_array_equal(patches(x, patch=3), x.reshape(2, 1, 18))


@pytest.mark.parametrize("lead", [(), (3,), (2, 3)])
def test_patches_by_loops(lead):
    x = np.random.default_rng(0).normal(size=(*lead, 6, 6, 3)).astype(np.float32)
    expected = np.stack(
        [
            x[..., i : i + 2, j : j + 2, :].reshape(*lead, 12)
            for i in (0, 2, 4)
            for j in (0, 2, 4)
        ],
        axis=-2,
    )
    np.testing.assert_array_equal(patches(jnp.asarray(x), patch=2), expected)


def test_rows_of_pixels_are_in_row_order():
    x = jnp.arange(12.0).reshape(1, 12)
    image = as_images("model", x, side=2, channels=3)
    np.testing.assert_array_equal(image[0, 1, 0], [6.0, 7.0, 8.0])
    assert as_images("model", image, side=2, channels=3) is image
