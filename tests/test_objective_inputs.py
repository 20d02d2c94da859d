"""What objectives say of wrong input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.likelihoods import Gaussian
from jaxlab.objective import Objective, plain, unpack_batch

pytestmark = pytest.mark.untyped

OBJECTIVE = Objective(plain(lambda w, x: x @ w), Gaussian())
W = jnp.ones((2, 1))
BATCH = (jnp.ones((3, 2)), jnp.ones((3, 1)))


@pytest.mark.parametrize("batch", [jnp.ones(3), (1,), (1, 2, 3, 4), {"x": 1}])
def test_batches(batch):
    with pytest.raises(ValueError, match=r"\(inputs, targets\) or"):
        unpack_batch(batch)


def test_kinds():
    with pytest.raises(ValueError, match='"true", "sampled" or "empirical"'):
        OBJECTIVE.fisher_product(W, (), BATCH, W, kind="exact")


def test_sample_keys():
    with pytest.raises(ValueError, match='kind="sampled" without one'):
        OBJECTIVE.fisher_product(W, (), BATCH, W, kind="sampled")
    with pytest.raises(ValueError, match='kind="true" with one'):
        OBJECTIVE.fisher_product(W, (), BATCH, W, sample_key=jax.random.key(0))


def test_vectors_like_params():
    with pytest.raises(ValueError, match="v must be a tree like params"):
        OBJECTIVE.ggn_product(W, (), BATCH, {"w": W})


def test_numpy_batches():
    batch = tuple(np.asarray(part) for part in BATCH)
    grads = OBJECTIVE.value_and_grad(W, (), batch)[1]
    np.testing.assert_allclose(grads, 1.0)
