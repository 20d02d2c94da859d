"""What efficient SAM refuses, in its own words, and what NumPy may pass to it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.sharpness.esam import esam_value_and_grad

pytestmark = pytest.mark.untyped

KEY = jax.random.key(0)
W, X = jnp.ones(3), jnp.ones((6, 3))
losses_fn = lambda w, x: (x @ w) ** 2


@pytest.mark.parametrize("what", ["weight_fraction", "example_fraction"])
@pytest.mark.parametrize("fraction", [0, 0.0, -0.1, 1.5, float("nan")])
def test_fractions(what, fraction):
    message = rf"esam_value_and_grad: {what} must be in \(0, 1\], got {fraction}"
    with pytest.raises(ValueError, match=message):
        esam_value_and_grad(losses_fn, radius=0.1, **{what: fraction})


def test_numbers():
    with pytest.raises(ValueError, match="radius must be finite and >= 0, got -1"):
        esam_value_and_grad(losses_fn, radius=-1.0)
    with pytest.raises(ValueError, match="eps must be finite and > 0, got 0"):
        esam_value_and_grad(losses_fn, radius=0.1, eps=0)
    with pytest.raises(ValueError, match="example_fraction shapes the computation"):
        esam_value_and_grad(losses_fn, radius=0.1, example_fraction=jnp.array(0.5))


def test_losses_are_one_for_each_row():
    f = esam_value_and_grad(lambda w, x: jnp.mean(losses_fn(w, x)), radius=0.1)
    with pytest.raises(ValueError, match=r"one loss for each row, shape \(6,\), got"):
        f(KEY, W, X)


def test_batches():
    f = esam_value_and_grad(losses_fn, radius=0.1)
    for batch in (X[:0], (X, X[:4]), jnp.ones(()), ()):
        with pytest.raises(ValueError, match="one row per example, at least one"):
            f(KEY, W, batch)


def test_params():
    f = esam_value_and_grad(losses_fn, radius=0.1)
    with pytest.raises(ValueError, match="params must have floating leaves, got int"):
        f(KEY, jnp.ones(3, int), X)
    with pytest.raises(ValueError, match="params must hold at least one array"):
        f(KEY, {}, X)


def test_numpy_is_welcome():
    f = esam_value_and_grad(
        losses_fn,
        radius=np.float32(0.1),
        weight_fraction=np.float32(0.5),
        example_fraction=np.float64(0.5),
    )
    w, x = np.ones(3, np.float32), np.arange(18, dtype=np.float32).reshape(6, 3)
    value, grads = f(KEY, w, x)
    same = f(KEY, jnp.asarray(w), jnp.asarray(x))
    assert value == same[0]
    np.testing.assert_array_equal(grads, same[1])
