"""What SAM along past gradients refuses, and what NumPy may pass to it."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.sharpness.momentum_sam import momentum_sam_value_and_grad

pytestmark = pytest.mark.untyped

loss_fn = lambda w: jnp.sum(w**2)


@pytest.mark.parametrize("decay", [1, 1.0, -0.1, float("nan")])
def test_decay(decay):
    message = rf"momentum_sam_value_and_grad: decay must be in \[0, 1\), got {decay}"
    with pytest.raises(ValueError, match=message):
        momentum_sam_value_and_grad(loss_fn, radius=0.1, decay=decay)


def test_numbers():
    with pytest.raises(ValueError, match="radius must be finite and >= 0, got -1"):
        momentum_sam_value_and_grad(loss_fn, radius=-1.0)
    with pytest.raises(ValueError, match="eps must be finite and > 0, got 0"):
        momentum_sam_value_and_grad(loss_fn, radius=0.1, eps=0)


def test_params():
    method = momentum_sam_value_and_grad(loss_fn, radius=0.1)
    with pytest.raises(ValueError, match="params must have floating leaves, got int"):
        method.init(jnp.ones(3, int))
    with pytest.raises(ValueError, match="params must hold at least one array"):
        method.init({})


def test_the_state_is_that_of_params():
    method = momentum_sam_value_and_grad(loss_fn, radius=0.1)
    state = method.init(jnp.ones(3))
    with pytest.raises(
        ValueError, match=r"\(4,\).* got .*\(3,\).*that of init\(params\)"
    ):
        method.update(jnp.ones(4), state)
    with pytest.raises(
        ValueError, match=r"like params, .*'w'.* got .*of init\(params\)"
    ):
        method.update({"w": jnp.ones(3)}, state)


def test_numpy_is_welcome():
    method = momentum_sam_value_and_grad(
        loss_fn, radius=np.float32(5), decay=np.float64(0.9)
    )
    w = np.array([3.0, 4.0], np.float32)
    _, grads, state = method.update(w, method.init(w))
    assert grads.tolist() == [6, 8]
    assert method.update(w, state)[1].tolist() == [12, 16]
