"""What Gauss-Newton and Fisher operators refuse, and NumPy inputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.curvature.gauss_newton import fisher_operator, ggn_operator
from jaxlab.likelihoods import Categorical, Gaussian

pytestmark = pytest.mark.untyped

X, W = np.eye(4, 2, dtype=np.float32), np.ones((2, 3), np.float32)
Y = np.arange(4) % 3


def linear(w, x):
    return x @ w


def test_numpy_params_data_and_vectors_are_fine():
    batch = (X, Y)
    for batches in (batch, [batch, batch], lambda: [batch]):
        operator = fisher_operator(linear, Categorical(), W, batches, kind="empirical")
        assert operator(W).shape == (2, 3)


def test_keys_and_kinds():
    key = jax.random.key(0)
    with pytest.raises(ValueError, match='"sampled" or "empirical", got \'exact\''):
        fisher_operator(linear, Categorical(), W, (X, Y), kind="exact")
    with pytest.raises(ValueError, match='kind="sampled" without one'):
        fisher_operator(linear, Categorical(), W, (X, Y), kind="sampled")
    for kind in ("true", "empirical"):
        with pytest.raises(ValueError, match=f'kind="{kind}" with one'):
            fisher_operator(linear, Categorical(), W, (X, Y), kind=kind, key=key)


def test_batches_of_the_wrong_form():
    made = lambda batches, **more: fisher_operator(
        linear, Categorical(), W, batches, **more
    )
    with pytest.raises(ValueError, match="Wrap a data loader"):
        made(iter([]))
    for wrong in (X, {"x": X}):
        with pytest.raises(ValueError, match="a batch must be a tuple"):
            made(wrong)
    with pytest.raises(ValueError, match="needs targets, got None"):
        made((X, None), kind="empirical")
    with pytest.raises(ValueError, match="one row per example"):
        made((X, Y[:2]), kind="empirical")
    with pytest.raises(ValueError, match="one row per example"):
        made((X, Y, np.ones(3)))
    with pytest.raises(ValueError, match="at least one"):
        made((X[:0], Y[:0]))


def test_models_with_other_outputs():
    v = jnp.ones((2, 3))
    for wrong in (lambda w, x: (x @ w)[:, 0], lambda w, x: (x @ w, x)):
        with pytest.raises(ValueError, match="apply_fn must give one array of outputs"):
            ggn_operator(wrong, Gaussian(), W, (X, None))(v)
    pooled = lambda w, x: jnp.mean(x @ w, axis=0, keepdims=True)
    with pytest.raises(ValueError, match="for 4 examples, got shape"):
        fisher_operator(
            pooled, Gaussian(), W, (X, None), kind="sampled", key=jax.random.key(0)
        )(v)


def test_params_and_vectors():
    with pytest.raises(ValueError, match="ggn_operator: the leaves of params"):
        ggn_operator(linear, Gaussian(), np.ones((2, 3), np.int32), (X, None))
    with pytest.raises(ValueError, match="fisher_operator: v must have the shapes"):
        fisher_operator(linear, Gaussian(), W, (X, None))(jnp.ones((2, 2)))
    with pytest.raises(ValueError, match="ggn_operator: microbatch must be"):
        ggn_operator(linear, Gaussian(), W, (X, None), microbatch=0)
