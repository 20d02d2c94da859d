"""Log-loss of Bayesian mixtures over finite classes, and the bounds on its regret.

See :mod:`jaxlab.optimizers.langevin` for the formulas.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from jaxlab._norms import wide
from jaxlab.optimizers.gradient_noise import _check_numbers

Scalar = Float[Array, ""]


class Mixture(NamedTuple):
    """What :func:`mixture_log_loss` gives.

    Attributes:
      losses: ``-ln q(y_t | past)`` of each step, in nats.
      log_posterior: of the hypotheses after the last step; the logarithms of weights
        that sum to 1.

    Examples:
      >>> mixture = mixture_log_loss(jnp.full((3, 2), -1.0), jnp.zeros(2))
      >>> jnp.round(mixture.losses, 4)
      Array([1., 1., 1.], dtype=float32)
    """

    losses: Float[Array, " n"]
    log_posterior: Float[Array, " k"]


class RegretBound(NamedTuple):
    """What :func:`regret_bound` gives.

    Attributes:
      bound: on the expected regret of n steps, in nats.
      eps: the radius of the set that gives it, in nats.
      log_weight: ``ln w(A_eps)`` of that set.

    Examples:
      >>> regret_bound(jnp.zeros(2), jnp.zeros(2), n=5).eps
      Array(0., dtype=float32)
    """

    bound: Scalar
    eps: Scalar
    log_weight: Scalar


def mixture_log_loss(
    log_likelihoods: Float[ArrayLike, "n k"],
    log_prior: Float[ArrayLike, " k"],
    *,
    beta: ArrayLike = 1.0,
) -> Mixture:
    """Predicts online with a mixture of hypotheses and measures its log-loss.

    Args:
      log_likelihoods: ``ln p_theta(y_t | x_t)`` of step t under each of k hypotheses.
      log_prior: logarithms of the prior's weights; their sum is made 1. Minus infinity
        leaves a hypothesis out.
      beta: power of the likelihood in the posterior, >= 0. 1 is Bayes; 0 keeps the
        prior.

    Returns:
      See :class:`Mixture`; float32 at least. The losses of Bayes sum to minus the
      logarithm of the marginal likelihood. After an outcome that every hypothesis calls
      impossible, whose loss is infinite, the posterior is NaN.

    Raises:
      ValueError: if the shapes do not fit or ``beta`` is a number out of range.

    Examples:
      >>> import math
      >>> certain, coin = [0.0, 0.0], [math.log(0.5)] * 2
      >>> outcomes = jnp.array([certain, coin]).T
      >>> mixture = mixture_log_loss(outcomes, jnp.zeros(2))
      >>> [round(math.exp(-loss), 3) for loss in mixture.losses.tolist()]
      [0.75, 0.833]
    """
    name = "mixture_log_loss"
    found, prior = _checked(name, log_likelihoods, log_prior)
    _check_numbers(name, beta=beta)
    beta = wide(beta).astype(found.dtype)

    def step(log_w, now):
        loss, log_w = _learned(log_w, now, beta)
        return log_w, loss

    with jax.named_scope(name):
        posterior, losses = jax.lax.scan(step, prior, found)
    return Mixture(losses, posterior)


def regret_curve(
    log_likelihoods: Float[ArrayLike, "n k"],
    log_prior: Float[ArrayLike, " k"],
    *,
    reference: Float[ArrayLike, " n"] | None = None,
    beta: ArrayLike = 1.0,
) -> Float[Array, " n"]:
    """Gives the mixture's cumulative regret after each step, in nats.

    It sums differences, not losses, so that it keeps its digits where the losses are
    large and the regret is small.

    Args:
      log_likelihoods: as in :func:`mixture_log_loss`.
      log_prior: likewise.
      reference: ``ln p*(y_t | x_t)`` of the truth at each step. ``None`` compares with
        the hypothesis of the class that is best in hindsight, at each n anew.
      beta: as in :func:`mixture_log_loss`.

    Returns:
      ``-ln q(y^n)`` minus the loss of the reference, for n = 1, 2, ... Against the best
      of the class it is at most ``-ln w`` of that hypothesis, for Bayes.

    Raises:
      ValueError: as :func:`mixture_log_loss` does, or if the reference has another
        length.

    Examples:
      >>> regret_curve(jnp.zeros((3, 2)), jnp.zeros(2))
      Array([0., 0., 0.], dtype=float32)
    """
    name = "regret_curve"
    found, prior = _checked(name, log_likelihoods, log_prior)
    _check_numbers(name, beta=beta)
    beta = wide(beta).astype(found.dtype)
    if reference is not None:
        reference = jnp.asarray(reference).astype(found.dtype)
        if reference.shape != found.shape[:1]:
            raise ValueError(
                f"{name}: reference must have one log-likelihood for each of the "
                f"{found.shape[0]} steps, got shape {reference.shape}."
            )

    def step(carry, now):
        log_w, behind, regret = carry
        here, truth = now
        loss, log_w = _learned(log_w, here, beta)
        if truth is None:
            # Each hypothesis's lag behind the best so far, and what the best gains.
            behind = behind + here
            truth = jnp.max(behind)
            behind = behind - truth
        regret = regret + (loss + truth)
        return (log_w, behind, regret), regret

    with jax.named_scope(name):
        behind = None if reference is not None else jnp.zeros_like(prior)
        start = (prior, behind, jnp.zeros((), found.dtype))
        return jax.lax.scan(step, start, (found, reference))[1]


def log_hypothesis_weight(
    kl: Float[ArrayLike, " k"], log_prior: Float[ArrayLike, " k"], *, eps: ArrayLike
) -> Scalar:
    """Gives ``ln w(A_eps)``, the prior's weight of the hypotheses near the truth.

    Args:
      kl: divergence of the truth from each hypothesis, ``D(p* || p_theta)``, in nats.
      log_prior: logarithms of the prior's weights; their sum is made 1.
      eps: largest divergence that is near, in nats, >= 0.

    Returns:
      The logarithm; minus infinity where no hypothesis is near.

    Raises:
      ValueError: if the shapes do not fit or ``eps`` is a number out of range.

    Examples:
      >>> kl, prior = jnp.array([0.1, 0.2, 9.0]), jnp.array([0.5, 0.5, 0.0])
      >>> bool(jnp.exp(log_hypothesis_weight(kl, jnp.log(prior), eps=0.1)) == 0.5)
      True
    """
    name = "log_hypothesis_weight"
    kl, prior = _checked_kl(name, kl, log_prior)
    _check_numbers(name, eps=eps)
    near = kl <= wide(eps).astype(kl.dtype)
    return jax.nn.logsumexp(jnp.where(near, prior, -jnp.inf))


def regret_bound(
    kl: Float[ArrayLike, " k"], log_prior: Float[ArrayLike, " k"], *, n: ArrayLike
) -> RegretBound:
    """Bounds the expected regret by ``min over eps of n eps - ln w(A_eps)``.

    The minimum is attained where eps is one of the divergences.

    Args:
      kl: as in :func:`log_hypothesis_weight`; infinity is allowed.
      log_prior: likewise.
      n: steps, drawn independently from the truth; >= 0. Use ``vmap`` for a curve.

    Returns:
      See :class:`RegretBound`. Divided by n, the bound also holds for the average of
      the n online predictors as one predictor.

    Raises:
      ValueError: if the shapes do not fit or ``n`` is a number out of range.

    Examples:
      >>> kl, prior = jnp.array([0.0, 2.0]), jnp.array([0.25, 0.75])
      >>> regret_bound(kl, jnp.log(prior), n=0.5).eps
      Array(2., dtype=float32)
      >>> regret_bound(kl, jnp.log(prior), n=100).eps
      Array(0., dtype=float32)
    """
    name = "regret_bound"
    kl, prior = _checked_kl(name, kl, log_prior)
    _check_numbers(name, n=n)
    n = wide(n).astype(kl.dtype)
    with jax.named_scope(name):
        order = jnp.argsort(kl)
        eps = kl[order]
        # Of equal divergences the last one holds the weight of all.
        weight = jax.lax.cumlogsumexp(prior[order])
        bounds = jnp.where(n == 0, 0, n * jnp.where(n == 0, 0, eps)) - weight
        best = jnp.argmin(bounds)
    return RegretBound(bounds[best], eps[best], weight[best])


def _learned(log_w, now, beta):
    """Gives the loss of one outcome and the logarithm of the next posterior."""
    loss = -jax.nn.logsumexp(log_w + now)
    # 0 x (-inf) would be NaN: at beta 0 the prior stays.
    power = jnp.where(beta == 0, 0, beta * jnp.where(beta == 0, 0, now))
    log_w = log_w + power
    return loss, log_w - jax.nn.logsumexp(log_w)


def _checked(name, log_likelihoods, log_prior):
    found, prior = jnp.asarray(log_likelihoods), jnp.asarray(log_prior)
    if found.ndim != 2 or prior.shape != found.shape[1:] or not prior.size:
        raise ValueError(
            f"{name}: log_likelihoods must have shape (steps, hypotheses) and "
            f"log_prior (hypotheses,), got {found.shape} and {prior.shape}."
        )
    return _floating(name, log_likelihoods=found, log_prior=prior)


def _checked_kl(name, kl, log_prior):
    kl, prior = jnp.asarray(kl), jnp.asarray(log_prior)
    if kl.ndim != 1 or prior.shape != kl.shape or not kl.size:
        raise ValueError(
            f"{name}: kl and log_prior must both have shape (hypotheses,), got "
            f"{kl.shape} and {prior.shape}."
        )
    return _floating(name, kl=kl, log_prior=prior)


def _floating(name, **arrays):
    for word, array in arrays.items():
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"{name}: {word} must be floating, got {array.dtype}.")
    dtype = jnp.result_type(jnp.float32, *arrays.values())
    first, prior = (array.astype(dtype) for array in arrays.values())
    return first, prior - jax.nn.logsumexp(prior)
