"""What the accumulation functions refuse, in their own words."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.sharpness.accumulation import (
    full_batch_value_and_grad,
    m_sharpness_value_and_grad,
    micro_batch_value_and_grad,
)

pytestmark = pytest.mark.untyped

loss_fn = lambda w, x: jnp.mean((x @ w) ** 2)
BOTH = {"alpha": 0.8, "radius": 0.1}
W, X = jnp.ones(3), jnp.ones((6, 3))


@pytest.mark.parametrize(
    "make", [full_batch_value_and_grad, micro_batch_value_and_grad]
)
def test_counts(make):
    for count in (0, -1, 2.0, True):
        with pytest.raises(ValueError, match="num_micro_batches must be an integer"):
            make(loss_fn, num_micro_batches=count, **BOTH)
    f = make(loss_fn, num_micro_batches=4, **BOTH)
    with pytest.raises(ValueError, match="= 4 must divide the batch, got 6 rows"):
        f(W, X)
    with pytest.raises(ValueError, match="one row per example, at least one"):
        f(W, X[:0])
    with pytest.raises(ValueError, match="one row per example, at least one"):
        f(W, (X, X[:4]))


def test_groups():
    with pytest.raises(ValueError, match="group_size must be an integer"):
        m_sharpness_value_and_grad(loss_fn, group_size=0, **BOTH)
    with pytest.raises(ValueError, match=r'how must be "vmap" or "scan", got \'loop\''):
        m_sharpness_value_and_grad(loss_fn, group_size=2, how="loop", **BOTH)
    f = m_sharpness_value_and_grad(loss_fn, group_size=4, **BOTH)
    with pytest.raises(ValueError, match="group_size=4 must divide the batch, got 6"):
        f(W, X)


@pytest.mark.parametrize(
    "make", [full_batch_value_and_grad, micro_batch_value_and_grad]
)
def test_numbers_and_numpy(make):
    for option in ({"has_aux": True}, {"axis_name": "d"}, {"grads": W}):
        with pytest.raises(ValueError, match=r"unknown options .* shard the batch"):
            make(loss_fn, num_micro_batches=2, **BOTH, **option)
    with pytest.raises(ValueError, match="radius must be finite and >= 0"):
        make(loss_fn, num_micro_batches=2, alpha=0.8, radius=-1.0)
    f = make(loss_fn, num_micro_batches=2, **BOTH)
    value, _ = f(np.ones(3, np.float32), np.ones((6, 3), np.float32))
    assert float(value) == 9.0
