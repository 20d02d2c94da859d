"""Stochastic gradient Langevin dynamics as optax links, plain and preconditioned.

See :mod:`jaxlab.optimizers.langevin` for the formulas.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Key, PyTree

from jaxlab._chains import Place
from jaxlab._checks import check_number, is_whole
from jaxlab._norms import cast_like, wide, zeros_wide
from jaxlab.optimizers._links import DROPPED, check_alike
from jaxlab.optimizers.gradient_noise import (
    ScalarOrSchedule,
    _at,
    _check_key,
    _check_numbers,
    _check_tree,
    _fold,
    add_gradient_noise,
)


def sgld_step_size(
    scale: ArrayLike, *, offset: ArrayLike = 1.0, power: ArrayLike = 0.55
) -> Callable[[Int[ArrayLike, ""]], Float[Array, ""]]:
    """Makes the decreasing step size ``scale (offset + t)^(-power)``.

    Its sum is infinite and that of its squares finite, which is what the chain needs
    to converge. A small constant step, which does not, is often preferred.

    Args:
      scale: a in ``h_t = a (b + t)^(-power)``, > 0.
      offset: b, > 0, in steps.
      power: in (0.5, 1], or the sums above are not as they must be.

    Returns:
      A schedule ``step -> h``, float32 at least.

    Raises:
      ValueError: if a number is out of range.

    Examples:
      >>> sgld_step_size(0.5, power=1.0)(1)
      Array(0.25, dtype=float32)
    """
    name = "sgld_step_size"
    _check_numbers(name, scale=scale, offset=offset, power=power)
    check_number(name, "finite and > 0", scale=scale, offset=offset)
    hint = "; for a constant step give the number itself in place of a schedule"
    check_number(name, "in (0.5, 1]", hint=hint, power=power)

    def step_size(step):
        base = wide(offset) + jnp.asarray(step).astype(jnp.result_type(float))
        return wide(scale) * base ** -wide(power)

    return step_size


class SGLDState(NamedTuple):
    """State of :func:`sgld`.

    Attributes:
      count: steps.
      key: made from the ``key`` that the link was given, the same at all steps; ``()``
        where ``update`` is given one.

    Examples:
      >>> int(sgld(0.1, num_data=1).init(jnp.ones(2)).count)
      0
    """

    count: Int[Array, ""]
    key: Any

    place = Place("sgld", "samples")


class PSGLDState(NamedTuple):
    """State of :func:`psgld`.

    Attributes:
      count: steps.
      key: as in :class:`SGLDState`.
      square: running mean of squared gradients, float32 at least.

    Examples:
      >>> psgld(0.1, num_data=1).init(jnp.ones(2)).square
      Array([0., 0.], dtype=float32)
    """

    count: Int[Array, ""]
    key: Any
    square: PyTree

    place = Place("psgld", "samples")


def sgld(
    step_size: ScalarOrSchedule,
    *,
    num_data: int,
    temperature: ScalarOrSchedule = 1.0,
    prior_precision: ScalarOrSchedule = 0.0,
    key: Key[Array, ""] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Turns gradients of the mean loss into Langevin steps.

    The gradient is that of the MEAN over a batch of ``-ln p(y | x, theta)``; the link
    multiplies it by ``num_data / 2``, so that it stands for the whole data set. What it
    returns is the step itself: it goes last in a chain, with no learning rate behind
    it, and weight decay is ``prior_precision``, not a link of its own.

    The noise of a step is a function of the key, the step and the leaf's path, as in
    :func:`jaxlab.optimizers.annealed_gradient_noise`. ``optax.MultiSteps`` belongs
    around the link; behind it, it would average the noise away. Keep parameters in
    float32: noise below half the spacing of bfloat16 is lost when they are updated.

    Args:
      step_size: h, >= 0, up to about the inverse of the largest eigenvalue of the
        negative log-posterior's Hessian: beyond 4 times that inverse the chain
        diverges; or a schedule.
      num_data: examples in the data set, >= 1.
      temperature: of the noise, >= 0; or a schedule. 1 samples the posterior, less is
        a cold variant that samples its power 1 / temperature; 0 is gradient descent.
      prior_precision: inverse variance of a normal prior around 0, >= 0, in the units
        of ``params^(-2)``; or a schedule. 0 is a flat prior.
      key: of all steps, a typed key, kept in the state; for loops that pass no key to
        ``update``. It goes before one that they pass.

    Returns:
      A transformation whose ``update`` needs ``key=``, a fresh typed key for each step,
      unless the link was given one, and ``params`` where there is a prior.

    Raises:
      ValueError: if a number is out of range or ``key`` is not a typed key; from
        ``update``, if the key or the params are missing or the tree is empty or not
        floating.

    Examples:
      >>> tx = sgld(0.5, num_data=8, temperature=0.0)
      >>> w = jnp.ones(2)
      >>> updates, state = tx.update(w, tx.init(w), w, key=jax.random.key(0))
      >>> updates
      Array([-2., -2.], dtype=float32)
    """
    name = "sgld"
    _check_settings(name, step_size, num_data, temperature, prior_precision, key)
    kept = key

    def init(params):
        _check_tree(name, params, "params")
        return SGLDState(jnp.zeros((), jnp.int32), _base_key(name, kept))

    def update(updates, state, params=None, *, key=None, **extra_args):
        now = _step_key(name, updates, state, kept, key)
        h, count = _at(step_size, state.count), state.count
        with jax.named_scope(name):
            slope = _slope(name, updates, params, num_data, prior_precision, count)
            drift = jax.tree.map(lambda s: -(h / 2).astype(s.dtype) * s, slope)
            variance = h * _at(temperature, count)
            moved = add_gradient_noise(now, drift, variance=variance)
            moved = cast_like(moved, updates)
        return moved, state._replace(count=optax.safe_increment(count))

    return optax.GradientTransformationExtraArgs(init, update)


def psgld(
    step_size: ScalarOrSchedule,
    *,
    num_data: int,
    temperature: ScalarOrSchedule = 1.0,
    prior_precision: ScalarOrSchedule = 0.0,
    decay: float = 0.99,
    eps: float = 1e-5,
    key: Key[Array, ""] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Makes Langevin steps in coordinates scaled by the gradients' RMS.

    ``G = 1 / (eps + sqrt(V))`` with V the running mean of squared gradients multiplies
    the drift and the variance of the noise. V is divided by ``1 - decay^t``, without
    which the first steps are ten times too long. The term with the derivative of G is
    left out, as authors of the method do too: the samples are a little off, the less
    the nearer ``decay`` is to 1. A coordinate without gradients has noise of variance
    ``h / eps``.

    Args:
      step_size: h, in the units of the gradients, other than in :func:`sgld`.
      num_data: as in :func:`sgld`, like all arguments below but two.
      temperature: likewise.
      prior_precision: likewise.
      decay: of the running mean, in [0, 1).
      eps: in the units of the gradients of the mean loss, > 0.
      key: as in :func:`sgld`.

    Returns:
      A transformation, with what :func:`sgld` says of its ``update``.

    Raises:
      ValueError: as :func:`sgld` does, or if ``decay`` or ``eps`` is out of range.

    Examples:
      >>> tx = psgld(0.5, num_data=8, temperature=0.0, eps=2.0)
      >>> g = jnp.array([2.0, -2.0])
      >>> updates, state = tx.update(g, tx.init(g), key=jax.random.key(0))
      >>> jnp.round(updates, 4)
      Array([-1.,  1.], dtype=float32)
    """
    name = "psgld"
    _check_settings(name, step_size, num_data, temperature, prior_precision, key)
    if not (_is_number(decay) and 0 <= decay < 1):
        raise ValueError(f"{name}: decay must be a number in [0, 1), got {decay}.")
    if not (_is_number(eps) and 0 < eps < float("inf")):
        raise ValueError(f"{name}: eps must be a number > 0, got {eps}.")
    kept = key

    def init(params):
        _check_tree(name, params, "params")
        count = jnp.zeros((), jnp.int32)
        return PSGLDState(count, _base_key(name, kept), zeros_wide(params))

    def update(updates, state, params=None, *, key=None, **extra_args):
        now = _step_key(name, updates, state, kept, key)
        h, count = _at(step_size, state.count), state.count
        heat = _at(temperature, count)
        steps = count.astype(jnp.result_type(float)) + 1
        # 1 - decay^t would lose half its digits at the first steps.
        seen = -jnp.expm1(steps * math.log(decay)) if decay else jnp.ones_like(steps)

        def mean(v, g):
            g = wide(g).astype(v.dtype)
            return decay * v + (1 - decay) * jnp.square(g)

        def scaled(s, v, noise):
            metric = 1 / (eps + jnp.sqrt(v / seen.astype(v.dtype)))
            spread = jnp.sqrt((h * heat).astype(v.dtype) * metric)
            return -(h / 2).astype(v.dtype) * metric * s + spread * noise

        with jax.named_scope(name):
            slope = _slope(name, updates, params, num_data, prior_precision, count)
            square = jax.tree.map(mean, state.square, updates)
            still = jax.tree.map(jnp.zeros_like, slope)
            noise = add_gradient_noise(now, still, variance=1.0)
            moved = jax.tree.map(scaled, slope, square, noise)
            moved = cast_like(moved, updates)
        return moved, PSGLDState(optax.safe_increment(count), state.key, square)

    return optax.GradientTransformationExtraArgs(init, update)


def _slope(name, grads, params, num_data, prior_precision, count):
    """Estimates the gradient of the negative log-posterior; float32 at least."""
    if params is not None:
        check_alike(name, grads, params)
    many = float(num_data)  # which may exceed an int32
    if isinstance(prior_precision, (int, float)) and prior_precision == 0:
        return jax.tree.map(lambda g: many * wide(g), grads)
    if params is None:
        raise ValueError(
            f"{name} needs params for its prior: call update(grads, state, params, "
            "...), or give prior_precision=0.0."
        )
    precision = _at(prior_precision, count)

    def total(g, p):
        g = wide(g)
        return many * g + precision.astype(g.dtype) * wide(p).astype(g.dtype)

    return jax.tree.map(total, grads, params)


def _base_key(name, kept):
    # Folded here: a new buffer, so that a donated state does not take ours along.
    return () if kept is None else _fold(kept, name)


def _step_key(name, updates, state, kept, key):
    _check_tree(name, updates, "updates")
    base = state.key
    if kept is None:
        if key is None:
            raise ValueError(
                f"{name} needs key=: call update(..., key=key) with a fresh "
                "jax.random.key for each step (make_train_step passes one), or give "
                f"the link one for all: {name}(..., key=jax.random.key(0)). {DROPPED}"
            )
        _check_key(name, key)
        base = _fold(key, name)
    return jax.random.fold_in(base, state.count)


def _check_settings(name, step_size, num_data, temperature, prior_precision, key):
    _check_numbers(
        name,
        step_size=step_size,
        temperature=temperature,
        prior_precision=prior_precision,
    )
    if not is_whole(num_data) or num_data < 1:
        raise ValueError(
            f"{name}: num_data must be the number of examples in the data set, an "
            f"integer >= 1, got {num_data!r}; it is static, so name it in static_args= "
            "of inject_hyperparams."
        )
    if key is not None:
        _check_key(name, key)


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
