"""What the spectral sums refuse, in their own words."""

import jax
import jax.numpy as jnp
import pytest

from jaxlab.curvature.spectral_sums import logdet, spectral_sum

pytestmark = pytest.mark.untyped

KEY = jax.random.key(0)
operator = jax.tree_util.Partial(jnp.matmul, jnp.diag(jnp.arange(1.0, 6.0)))


@pytest.mark.parametrize("damping", [0, -1.0, float("nan"), float("inf")])
def test_damping_must_be_positive(damping):
    with pytest.raises(ValueError, match="damping must be finite and > 0"):
        logdet(KEY, operator, jnp.ones(5), damping=damping)


def test_functions_keep_the_shape():
    with pytest.raises(ValueError, match=r"must keep the shape .* \(3, 2\), got \(\)"):
        spectral_sum(KEY, operator, jnp.ones(5), jnp.sum, order=2, num_probes=3)


@pytest.mark.parametrize("name", ["order", "num_probes", "probes_at_once"])
def test_counts_are_positive_integers(name):
    options = {"order": 3, "num_probes": 2} | {name: 0}
    with pytest.raises(ValueError, match=f"{name} must be an integer >= 1, got 0"):
        spectral_sum(KEY, operator, jnp.ones(5), jnp.exp, **options)


def test_messages_name_the_function_that_was_called():
    lopsided = lambda v: jnp.cumsum(v)
    with pytest.raises(ValueError, match="logdet: the operator must be symmetric"):
        logdet(KEY, lopsided, jnp.ones(5), damping=1.0)
    with pytest.raises(ValueError, match="spectral_sum: the basis takes"):
        spectral_sum(
            KEY, operator, jnp.ones(5), jnp.exp, order=3, num_probes=1, memory_limit=1
        )
