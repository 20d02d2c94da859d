"""The best prior scale of a grid, by a union bound.

The prior's variance should match how far training moved the parameters, which depends
on the examples. It is therefore chosen among eps_j = exp(j / spacing) /
largest_variance, j = 1, 2, ..., J, prior j failing with probability delta 6 / (pi^2
j^2): all bounds hold at once, so the least of them does.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Key, PyTree

from jaxlab._checks import check_count, check_number
from jaxlab.curvature.pac_bayes.analytic import (
    GibbsError,
    PacBayes,
    draw_errors,
    gibbs_error,
    pac_bayes_analytic,
)

Scalar = Float[Array, ""]


class PacBayesGrid(NamedTuple):
    """Holds the best bound over a grid of priors, and the whole grid.

    Attributes:
      bound: on the error in the world; holds with probability 1 - delta over the
        examples and, independently, 1 - sample_delta over the draws.
      error: of fresh draws from the best posterior, on the examples.
      index: j of the best prior, from 1 on.
      posterior: the best one.
      prior_precisions: eps_j, (J,).
      kls: (J,).
      errors: of the few draws that the choice was made with, (J,).
      bounds: from these errors, so without their sampling error, (J,).

    Examples:
      >>> zero = jnp.zeros(())
      >>> PacBayesGrid(zero, zero, zero, None, zero, zero, zero, zero).bound
      Array(0., dtype=float32)
    """

    bound: Scalar
    error: GibbsError
    index: Int[Array, ""]
    posterior: PacBayes
    prior_precisions: Float[Array, " J"]
    kls: Float[Array, " J"]
    errors: Float[Array, " J"]
    bounds: Float[Array, " J"]


def pac_bayes_grid(
    key: Key[Array, ""],
    error_fn: Callable[[Any], Any],
    eigenvalues: Float[ArrayLike, " k"],
    vectors: PyTree,
    params: PyTree,
    params0: PyTree,
    *,
    num_examples: int,
    num_priors: int = 60,
    spacing: float = 10.0,
    largest_variance: float = 0.05,
    num_samples: int = 5,
    num_final_samples: int = 1_000,
    delta: float = 0.025,
    sample_delta: float = 0.01,
    slack: ArrayLike = 1.0,
    units: Literal["nats", "bits"] = "nats",
) -> PacBayesGrid:
    """Chooses the prior scale of the analytic bound from a grid, by a union bound.

    Prior j has variance ``largest_variance * exp(-j / spacing)`` in every direction. A
    few draws choose j; fresh ones, with their sampling error, make the final bound
    (published code stops at the few). Cost: ``num_priors * num_samples +
    num_final_samples`` calls of ``error_fn`` and as many draws of 2 k p operations.

    Args:
      key: of the draws.
      error_fn: ``params -> error`` on the n examples, in [0, 1].
      eigenvalues: as for :func:`pac_bayes_analytic`, as are the next three.
      vectors: orthonormal eigenvectors.
      params: the trained parameters.
      params0: mean of the priors.
      num_examples: n, at least 8.
      num_priors: J, at least 1. It and the next two are fixed without the examples.
      spacing: priors per factor e in variance, positive.
      largest_variance: in squared units of params, positive.
      num_samples: draws for each prior, at least 1.
      num_final_samples: draws for the final bound, at least 1.
      delta: the probability over the examples that the bound fails, in (0, 1).
      sample_delta: the probability over the draws that it fails, in (0, 1).
      slack: as for :func:`pac_bayes_analytic`, as are the units.
      units: of the loss.

    Returns:
      The bound, what it was computed from, and the grid.

    Raises:
      ValueError: if shapes do not fit together or a number is out of range.

    Examples:
      >>> zero = jnp.zeros(2)
      >>> found = pac_bayes_grid(
      ...     jax.random.key(0), lambda params: jnp.array(0.0), jnp.ones(1),
      ...     jnp.eye(2)[:1], zero, zero, num_examples=1_000,
      ... )
      >>> bool(found.bound < 0.05)
      True
    """
    name = "pac_bayes_grid"
    check_count(
        name,
        num_priors=num_priors,
        num_samples=num_samples,
        num_final_samples=num_final_samples,
    )
    widths = {"largest_variance": largest_variance, "spacing": spacing}
    check_number(name, "finite and > 0", **widths)
    few, fresh = jax.random.split(key)

    def analytic(index):
        return pac_bayes_analytic(
            eigenvalues,
            vectors,
            params,
            params0,
            num_examples=num_examples,
            prior_precision=jnp.exp(index / spacing) / largest_variance,
            prior_index=index,
            delta=delta,
            slack=slack,
            units=units,
        )

    def one(index):
        found = analytic(index)
        error = draw_errors(few, error_fn, found, vectors, num_samples).mean()
        return found.prior_precision_outside, found.kl, error, found.bound(error)

    with jax.named_scope(name):
        indices = jnp.arange(1, num_priors + 1)
        precisions, kls, errors, bounds = jax.lax.map(one, indices)
        best = indices[jnp.nanargmin(bounds)]
        posterior = analytic(best)
        final = gibbs_error(
            fresh,
            error_fn,
            posterior,
            vectors,
            num_samples=num_final_samples,
            delta=sample_delta,
        )
        bound = posterior.bound(final.upper)
        return PacBayesGrid(
            bound, final, best, posterior, precisions, kls, errors, bounds
        )
