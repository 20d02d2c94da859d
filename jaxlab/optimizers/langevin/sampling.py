"""Chains of Langevin samples in one scan, with the full batch or mini-batches.

See :mod:`jaxlab.optimizers.langevin` for the formulas.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Key, PyTree

from jaxlab._checks import check_count, is_whole
from jaxlab._norms import wide
from jaxlab.curvature._batches import as_arrays, rows_of
from jaxlab.optimizers.gradient_noise import (
    ScalarOrSchedule,
    _check_key,
    _check_tree,
)
from jaxlab.optimizers.langevin.sgld import sgld

_MOST = 100  # samples kept where the user does not say


class Chain(NamedTuple):
    """What the samplers give; s samples.

    Attributes:
      samples: a tree like params, each leaf with a leading axis s, the oldest first.
      values: the negative log-density, or the loss of the batch, at the point that
        each sample was stepped from; (s,).

    Examples:
      >>> log_density = lambda w: -0.5 * jnp.sum(w**2)
      >>> chain = langevin_sample(
      ...     jax.random.key(0), log_density, jnp.ones(2), step_size=0.1, steps=40
      ... )
      >>> chain.samples.shape, chain.values.shape
      ((20, 2), (20,))
    """

    samples: PyTree
    values: Float[Array, " s"]


def langevin_sample(
    key: Key[Array, ""],
    log_density: Callable[[Any], Any],
    params: PyTree,
    *,
    step_size: ScalarOrSchedule,
    steps: int,
    burn_in: int | None = None,
    thin: int | None = None,
    temperature: ScalarOrSchedule = 1.0,
) -> Chain:
    """Samples a density by unadjusted Langevin dynamics.

    The chain of a normal density with precision K has covariance ``T K^-1 (I - h K /
    4)^-1``, T the temperature, in place of ``T K^-1``; it diverges where h exceeds 4
    over the largest eigenvalue of K. ``vmap`` over keys runs several chains.

    Args:
      key: of all the noise.
      log_density: ``params -> scalar``, up to a constant.
      params: where the chain starts; floating leaves. The chain runs in their dtype,
        float32 at least, since the noise of a step is small.
      step_size: h, > 0, or a schedule.
      steps: in all; each costs one gradient.
      burn_in: steps that are dropped first; ``None`` drops half.
      thin: one step in so many is kept; ``None`` keeps at most 100 samples.
      temperature: as in :func:`jaxlab.optimizers.sgld`.

    Returns:
      See :class:`Chain`; ``(steps - burn_in) // thin`` samples.

    Raises:
      ValueError: if a number is out of range, no sample would stay, or the leaves are
        not floating.

    Examples:
      >>> log_density = lambda w: -0.5 * jnp.sum((w - 3.0) ** 2)
      >>> start = jnp.zeros(100)
      >>> chain = langevin_sample(
      ...     jax.random.key(0), log_density, start, step_size=0.5, steps=200
      ... )
      >>> bool(abs(chain.samples.mean() - 3) < 0.1)
      True
    """
    name = "langevin_sample"
    _check_key(name, key)
    slope = _value_and_grad(name, "log_density", log_density)
    link = sgld(step_size, num_data=1, temperature=temperature)
    plan = _plan(name, steps, burn_in, thin)
    with jax.named_scope(name):
        down = lambda _, p: jax.tree.map(jnp.negative, slope(p))
        return _run(name, key, down, params, link, plan)


def sgld_sample(
    key: Key[Array, ""],
    loss_fn: Callable[[Any, Any], Any],
    params: PyTree,
    data: PyTree,
    *,
    step_size: ScalarOrSchedule,
    batch_size: int,
    steps: int,
    burn_in: int | None = None,
    thin: int | None = None,
    temperature: ScalarOrSchedule = 1.0,
    prior_precision: ScalarOrSchedule = 0.0,
) -> Chain:
    """Samples a posterior with gradients of mini-batches.

    For data that fit on the device. Other loops take :func:`jaxlab.optimizers.sgld` as
    their optimizer and keep parameters now and then. Models with dropout or BatchNorm
    have no posterior: run them in evaluation mode.

    Args:
      key: of the batches and the noise.
      loss_fn: ``(params, batch) -> scalar``, the MEAN over rows of ``-ln p(y | x)``.
      params: where the chain starts, after some training with advantage.
      data: a tree of arrays that share their leading axis, the rows. No weights: each
        row counts once.
      step_size: as in :func:`jaxlab.optimizers.sgld`.
      batch_size: rows of a step, drawn with replacement.
      steps: as in :func:`langevin_sample`, like ``burn_in`` and ``thin``.
      burn_in: steps that are dropped first.
      thin: one step in so many is kept.
      temperature: as in :func:`jaxlab.optimizers.sgld`.
      prior_precision: likewise.

    Returns:
      See :class:`Chain`.

    Raises:
      ValueError: as :func:`langevin_sample` does, or if ``batch_size`` is not an
        integer >= 1 or the data have no rows.

    Examples:
      >>> loss_fn = lambda w, x: 0.5 * jnp.mean((x - w) ** 2)
      >>> chain = sgld_sample(
      ...     jax.random.key(0), loss_fn, jnp.array(0.0), jnp.arange(10.0),
      ...     step_size=0.01, batch_size=5, steps=1000,
      ... )
      >>> chain.samples.shape, bool(abs(chain.samples.mean() - 4.5) < 0.5)
      ((100,), True)
    """
    name = "sgld_sample"
    _check_key(name, key)
    rows = rows_of(name, data)
    data = as_arrays(data)
    check_count(name, batch_size=batch_size)
    link = sgld(
        step_size,
        num_data=rows,
        temperature=temperature,
        prior_precision=prior_precision,
    )
    plan = _plan(name, steps, burn_in, thin)
    value_and_grad = _value_and_grad(name, "loss_fn", loss_fn)
    row_key, key = jax.random.split(key)

    def slope(step, p):
        now = jax.random.fold_in(row_key, step)
        chosen = jax.random.randint(now, (batch_size,), 0, rows)
        batch = jax.tree.map(lambda leaf: leaf[chosen], data)
        return value_and_grad(p, batch)

    with jax.named_scope(name):
        return _run(name, key, slope, params, link, plan)


def _run(name, key, slope, params, link, plan) -> Chain:
    _check_tree(name, params, "params")
    params = jax.tree.map(wide, params)
    first, thin, kept = plan

    def step(_, carry):
        p, state, _ = carry
        value, grads = slope(state.count, p)
        updates, state = link.update(grads, state, p, key=key)
        return optax.apply_updates(p, updates), state, value

    def sample(carry, _):
        carry = jax.lax.fori_loop(0, thin, step, carry)
        return carry, Chain(carry[0], carry[2])

    value = jax.eval_shape(lambda p: slope(jnp.int32(0), p)[0], params)
    carry = (params, link.init(params), jnp.zeros(value.shape, value.dtype))
    carry = jax.lax.fori_loop(0, first, step, carry)
    return jax.lax.scan(sample, carry, length=kept)[1]


def _plan(name, steps, burn_in, thin) -> tuple[int, int, int]:
    """Gives the steps that are dropped first, those per sample, and the samples."""
    check_count(name, steps=steps)
    burn_in = steps // 2 if burn_in is None else burn_in
    if not is_whole(burn_in) or not 0 <= burn_in < steps:
        raise ValueError(
            f"{name}: burn_in must be an integer with 0 <= burn_in < {steps}, the "
            f"steps, got {burn_in!r}."
        )
    rest = steps - burn_in
    thin = -(-rest // _MOST) if thin is None else thin
    if not is_whole(thin) or not 1 <= thin <= rest:
        raise ValueError(
            f"{name}: thin must be an integer from 1 to {rest}, the steps after the "
            f"burn-in, got {thin!r}."
        )
    # What does not fill a sample is dropped at the front.
    return burn_in + rest % thin, thin, rest // thin


def _value_and_grad(name, argument, function):
    """Differentiates a function, or says that it gives no floating scalar."""
    if not callable(function):
        raise ValueError(
            f"{name}: {argument} must be a function that gives one floating scalar, "
            f"got {type(function).__name__}."
        )

    def scalar(*args):
        found = function(*args)
        point = getattr(found, "shape", None) == ()
        if not point or not jnp.issubdtype(found.dtype, jnp.floating):
            got = ", ".join(str(jax.typeof(leaf)) for leaf in jax.tree.leaves(found))
            raise ValueError(
                f"{name}: {argument} must give one floating scalar, got ({got}); add "
                "its entries up, or take their mean, and drop what else it gives."
            )
        return found

    return jax.value_and_grad(scalar)
