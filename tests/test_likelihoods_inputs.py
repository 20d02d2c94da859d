"""What likelihoods say of wrong input, NumPy input, and any shape at all."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlab.likelihoods import Bernoulli, Categorical, Gaussian, row_shares

pytestmark = pytest.mark.untyped


def test_categorical_targets():
    with pytest.raises(ValueError, match=r"integers of shape \(4,\) or probabilities"):
        Categorical().nll(jnp.ones((4, 3)), jnp.ones(4))
    with pytest.raises(ValueError, match=r"got int32 of shape \(5,\)"):
        Categorical().nll(jnp.ones((4, 3)), jnp.ones(5, jnp.int32))


@pytest.mark.parametrize("likelihood", [Bernoulli(), Gaussian()])
def test_targets_like_outputs(likelihood):
    with pytest.raises(ValueError, match=r"outputs' shape \(4, 3\), got \(4, 1\)"):
        likelihood.nll(jnp.ones((4, 3)), jnp.ones((4, 1)))


@pytest.mark.parametrize("likelihood", [Categorical(), Bernoulli(), Gaussian()])
def test_vectors_like_outputs(likelihood):
    with pytest.raises(ValueError, match="hessian_product: v must have"):
        likelihood.hessian_product(jnp.ones((4, 3)), jnp.ones((1, 3)))


def test_weights():
    with pytest.raises(ValueError, match="one entry per row"):
        row_shares((4, 2), jnp.ones(2))


@pytest.mark.parametrize("scale", [0, -1.0, float("nan")])
def test_scale(scale):
    with pytest.raises(ValueError, match="scale must be > 0"):
        Gaussian(scale)


@given(
    rows=st.lists(st.integers(0, 3), min_size=1, max_size=3),
    classes=st.integers(1, 4),
    weighted=st.booleans(),
)
@settings(max_examples=30, deadline=None)
def test_numpy_in_a_number_out(rows, classes, weighted):
    rng = np.random.default_rng(0)
    outputs = rng.normal(size=(*rows, classes)).astype(np.float32)
    labels = rng.integers(0, classes, rows).astype(np.int32)
    weights = rng.uniform(size=rows[:1]).astype(np.float32) if weighted else None
    for likelihood, targets in (
        (Categorical(), labels),
        (Bernoulli(), (outputs > 0).astype(np.float32)),
        (Gaussian(), outputs),
    ):
        loss = likelihood.nll(outputs, targets, weights=weights)
        assert loss.shape == ()
        assert jnp.isfinite(loss)
        product = likelihood.hessian_product(outputs, outputs, weights=weights)
        assert product.shape == outputs.shape
        sample = likelihood.sample(jax.random.key(0), outputs)
        assert sample.shape == targets.shape
