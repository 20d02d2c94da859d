"""The analytic posterior of leading Hessian eigenpairs, and what it certifies.

Prior N(theta0, I / eps); posterior around the trained theta with precision lam_i along
the eigenvectors u_i of the Hessian H of the mean loss, and eps elsewhere. To second
order the expected loss rises by sum_i h_i / (2 lam_i). The gap sqrt(K) with
K = (KL + penalty) / (2 (n-1)) is concave in KL; for every s > 0

    sqrt(K) <= K / (2 s) + s / 2,     equal at s = sqrt(K), the gap itself.

So expected loss + gap is at most, up to terms without lam,

    sum_i h_i / (2 lam_i) + 1/(4 (n-1) s) sum_i (1/2) (ln(lam_i / eps) + eps / lam_i)

whose derivative is zero, and which is least, at lam_i = 4 (n-1) s h_i + eps. Published
code takes s = 1, optimal if the gap were 1; ``slack`` is s. A posterior may depend on
the examples, so the bound holds for any s and any h.

The loss is the cross-entropy in bits: where the largest logit is wrong, the right class
has probability 1/2 at most, so the error is at most the loss over ln 2. A Hessian of
the loss in nats is divided by ln 2 for that reason. Negative h_i count as 0.

What may depend on the n examples: theta, h and u. What may not: theta0 and eps, save
for the j-th of a countable family of priors that was fixed without them: it gets
delta 6 / (pi^2 j^2), which sums to delta, so its penalty is ln(pi^2 j^2 n / (6 delta)).
"""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Key, PyTree

from jaxlab._array_checks import check_fields
from jaxlab._checks import check_count, check_number
from jaxlab.curvature._subspaces import count_of
from jaxlab.curvature._vectors import space_of
from jaxlab.curvature.pac_bayes.gaussians import (
    axes_of,
    gaussian_kl_low_rank,
    sample_gaussian_low_rank,
)
from jaxlab.curvature.pac_bayes.inverse_kl import inverse_kl

Scalar = Float[Array, ""]


class PacBayes(NamedTuple):
    """Holds a Gaussian posterior, its prior's precisions, and what they certify.

    Attributes:
      kl: KL(posterior || prior) in nats.
      gap: sqrt((kl + penalty) / (2 (n-1))); the error in the world is at most that on
        the examples plus the gap.
      mean: of the posterior, a tree.
      precisions: of the posterior along the k axes.
      precision_outside: of the posterior in all other directions.
      prior_precisions: of the prior along the k axes.
      prior_precision_outside: of the prior in all other directions.

    Examples:
      >>> zero, one = jnp.zeros(()), jnp.ones(1)
      >>> PacBayes(zero, zero, one, 4 * one, one[0], one, one[0]).effective_dimension
      Array(0.75, dtype=float32)
    """

    kl: Scalar
    gap: Scalar
    mean: PyTree
    precisions: Float[Array, " k"]
    precision_outside: Scalar
    prior_precisions: Float[Array, " k"]
    prior_precision_outside: Scalar

    @property
    def effective_dimension(self) -> Scalar:
        """Counts the axes that the posterior sharpens: sum of 1 - prior/posterior.

        For the analytic posterior it is ``sum_i h_i / (h_i + eps / (4 (n-1) s))``.
        """
        return jnp.sum(1 - self.prior_precisions / self.precisions)

    def bound(self, error: Float[ArrayLike, "..."]) -> Float[Array, "..."]:
        """Bounds the error in the world, ``inverse_kl(error, 2 gap^2)``.

        Args:
          error: of draws from the posterior on the n examples; an upper bound of it
            (:func:`gibbs_error`) if a few draws stand for the expectation.
        """
        return inverse_kl(error, 2 * self.gap**2)


class GibbsError(NamedTuple):
    """Holds the error of draws from a posterior.

    Attributes:
      mean: over the draws.
      upper: exceeds its expectation with probability 1 - delta over the draws.

    Examples:
      >>> GibbsError(jnp.zeros(()), jnp.ones(())).upper
      Array(1., dtype=float32)
    """

    mean: Scalar
    upper: Scalar


def pac_bayes_analytic(
    eigenvalues: Float[ArrayLike, " k"],
    vectors: PyTree,
    params: PyTree,
    params0: PyTree,
    *,
    num_examples: int,
    prior_precision: ArrayLike,
    prior_index: ArrayLike | None = None,
    delta: float = 0.025,
    slack: ArrayLike = 1.0,
    units: Literal["nats", "bits"] = "nats",
) -> PacBayes:
    """Computes the closed-form posterior of leading Hessian eigenpairs and its KL.

    Precisions ``4 (n-1) slack h_i + eps`` along the vectors and eps elsewhere minimise
    the sum of loss in bits to second order and gap, the gap's root replaced by its
    tangent at ``slack`` (the module's text derives it). Eigenvalues of zero give the
    isotropic posterior.

    Args:
      eigenvalues: h, of the Hessian of the mean loss over the examples; negative ones
        count as 0.
      vectors: their orthonormal eigenvectors, a matrix (k, p) or a tree like ``params``
        with a leading axis on each leaf.
      params: the trained parameters, mean of the posterior.
      params0: mean of the prior, chosen without the examples: the initial parameters.
      num_examples: n, at least 8.
      prior_precision: eps, positive. Chosen without the examples, or ``prior_index``
        is needed.
      prior_index: j >= 1 if the prior is the j-th of a countable family that was fixed
        without the examples; the penalty is then ln(pi^2 j^2 n / (6 delta)), else
        ln(n / delta).
      delta: the probability over the examples that the bound fails, in (0, 1).
      slack: s, positive; the expected gap is best.
      units: of the loss. "nats" are turned into bits.

    Returns:
      The posterior with ``kl`` and ``gap``; ``bound(error)`` gives the bound.

    Raises:
      ValueError: if shapes do not fit together or a number is out of range.

    Examples:
      >>> found = pac_bayes_analytic(
      ...     jnp.array([0.25, -1.0]), jnp.eye(3)[:2], jnp.zeros(3), jnp.zeros(3),
      ...     num_examples=9, prior_precision=2.0, units="bits",
      ... )
      >>> found.precisions
      Array([10.,  2.], dtype=float32)
    """
    name = "pac_bayes_analytic"
    space = space_of(name, params, "params")
    count = count_of(axes_of(name, vectors, space))
    h = jnp.asarray(eigenvalues)
    if h.shape != (count,):
        raise ValueError(
            f"{name}: eigenvalues must have one entry for each of the {count} vectors, "
            f"got shape {h.shape}."
        )
    check_number(name, "finite and > 0", prior_precision=prior_precision, slack=slack)
    check_number(name, "finite and >= 8", num_examples=num_examples)
    if isinstance(prior_index, int) and prior_index < 1:
        raise ValueError(f"{name}: prior_index must be at least 1, got {prior_index}.")
    if units not in ("nats", "bits"):
        raise ValueError(f'{name}: units must be "nats" or "bits", got {units!r}.')
    with jax.named_scope(name):
        h = jnp.maximum(h.astype(space.dtype), 0)
        h = h / math.log(2) if units == "nats" else h
        eps = jnp.asarray(prior_precision, space.dtype)
        precisions = 4 * (num_examples - 1) * jnp.asarray(slack, h.dtype) * h + eps
        indices = None if prior_index is None else jnp.atleast_1d(prior_index)
        return certify(
            name,
            params,
            params0,
            vectors,
            precisions=precisions,
            precision_outside=eps,
            prior_precisions=jnp.full_like(h, eps),
            prior_precision_outside=eps,
            penalty=penalty(name, num_examples, delta, indices),
            num_examples=num_examples,
        )


def gibbs_error(
    key: Key[Array, ""],
    error_fn: Callable[[Any], Any],
    posterior: PacBayes,
    vectors: PyTree,
    *,
    num_samples: int = 1_000,
    delta: float = 0.01,
) -> GibbsError:
    """Estimates the error of draws from a posterior, with an upper bound.

    A mean over m draws is not the expectation that the bound speaks of. By Chernoff's
    inequality the expectation is at most ``inverse_kl(mean, ln(1 / delta) / m)`` with
    probability 1 - delta over the draws; at 5 draws that is above 0.6.

    Args:
      key: of the draws.
      error_fn: ``params -> error`` on the n examples, in [0, 1]; one call a draw.
      posterior: what to draw from.
      vectors: its axes.
      num_samples: m, at least 1; one after the other, so memory does not grow.
      delta: the probability over the draws that the upper bound fails, in (0, 1).

    Returns:
      The mean and the upper bound.

    Raises:
      ValueError: if a number is out of range or shapes do not fit together.

    Examples:
      >>> axes, zero = jnp.eye(2)[:1], jnp.zeros(2)
      >>> posterior = pac_bayes_analytic(
      ...     zero[:1], axes, zero, zero, num_examples=9, prior_precision=1.0
      ... )
      >>> half = lambda params: jnp.array(0.5)
      >>> found = gibbs_error(jax.random.key(0), half, posterior, axes, num_samples=10)
      >>> float(found.mean)
      0.5
    """
    name = "gibbs_error"
    shapes = dict.fromkeys(("kl", "gap"), "")
    for which in ("precision", "prior_precision"):
        shapes |= {f"{which}s": "k", f"{which}_outside": ""}
    posterior = check_fields(
        name, "posterior", posterior, PacBayes, "pac_bayes_analytic", **shapes
    )
    check_count(name, num_samples=num_samples)
    check_number(name, "in (0, 1)", delta=delta)
    with jax.named_scope(name):
        errors = draw_errors(key, error_fn, posterior, vectors, num_samples)
        mean = errors.mean()
        return GibbsError(mean, inverse_kl(mean, math.log(1 / delta) / num_samples))


def certify(
    name, mean, prior_mean, vectors, *, penalty, num_examples, **precisions
) -> PacBayes:
    """Computes the divergence and the gap of a posterior and a prior."""
    kl = gaussian_kl_low_rank(mean, prior_mean, vectors, **precisions)
    gap = jnp.sqrt((kl + penalty) / (2 * (num_examples - 1)))
    return PacBayes(kl, gap, mean, **precisions)


def penalty(
    name: str, num_examples: int, delta: float, indices: ArrayLike | None
) -> ArrayLike:
    """Computes ln(n / delta), plus ln(pi^2 j^2 / 6) for each index of a union bound."""
    check_number(name, "in (0, 1)", delta=delta)
    check_number(name, "finite and >= 8", num_examples=num_examples)
    total = math.log(num_examples / delta)
    if indices is None:
        return total
    indices = jnp.asarray(indices)
    each = math.log(math.pi**2 / 6) + 2 * jnp.log(
        indices.astype(jnp.result_type(float))
    )
    return total + jnp.sum(each)


def draw_errors(
    key: Key[Array, ""],
    error_fn: Callable[[Any], Any],
    posterior: PacBayes,
    vectors: PyTree,
    num_samples: int,
) -> Float[Array, " {num_samples}"]:
    """Computes the error of each of a number of draws, one after the other."""
    draw = lambda key: sample_gaussian_low_rank(
        key,
        posterior.mean,
        vectors,
        precisions=posterior.precisions,
        precision_outside=posterior.precision_outside,
    )
    keys = jax.random.split(key, num_samples)
    return jax.lax.map(lambda key: jnp.asarray(error_fn(draw(key))), keys)
