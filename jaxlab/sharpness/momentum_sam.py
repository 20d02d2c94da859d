"""SAM along a running mean of past gradients: one gradient a step.

With d the running mean and L_t the loss on the batch of step t,

    w' = w + r d / ||d||,   g = grad L_t(w'),   d <- decay d + (1 - decay) g

and g goes to the optimizer. SAM takes d = grad L_t(w) and pays a second gradient for
it; here d is what earlier steps left. On the first step d = 0 and g is the plain
gradient. The step is uphill, along +d, as in SAM.

This form is our own derivation from SAM, not the published MSAM: that one uses the
momentum buffer v of the optimizer itself and takes its gradient at w - r v / ||v||,
downhill, as Nesterov's method does. Here the mean is kept apart, so that any optimizer
may follow, at the price of one tree like the parameters. The scale of d does
not count, so it needs no correction for its start at zero.
Reference: Becker, Altrock and Risse, "Momentum-SAM: Sharpness Aware Minimization
without Computational Overhead", 2024.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Int, PyTree

from jaxlab._checks import check_number
from jaxlab._norms import wide
from jaxlab.sharpness._checks import check_alike, check_numbers, check_tree
from jaxlab.sharpness._links import at_step
from jaxlab.sharpness.perturbation import Mask, perturb


class MomentumSAMState(NamedTuple):
    """State of :func:`momentum_sam_value_and_grad`, to be kept from step to step.

    Attributes:
      direction: running mean of gradients, float32 at least.
      count: steps, for schedules.

    Examples:
      >>> momentum_sam_value_and_grad(jnp.sum, radius=0.1).init(jnp.ones(2)).direction
      Array([0., 0.], dtype=float32)
    """

    direction: PyTree
    count: Int[Array, ""]


class MomentumSAM(NamedTuple):
    """What :func:`momentum_sam_value_and_grad` returns: two functions.

    Examples:
      >>> int(momentum_sam_value_and_grad(jnp.sum, radius=0.1).init(jnp.ones(2)).count)
      0
    """

    init: Callable[..., MomentumSAMState]
    update: Callable[..., Any]


def momentum_sam_value_and_grad(
    loss_fn: Callable[..., Any],
    *,
    radius: ArrayLike | Callable[..., Any],
    decay: ArrayLike = 0.9,
    has_aux: bool = False,
    eps: ArrayLike = 1e-12,
    mask: Mask = None,
    adaptive: bool = False,
) -> MomentumSAM:
    """Makes a gradient at a point uphill along past gradients, one a step.

    Args:
      loss_fn: ``(params, *args) -> scalar``, or ``(scalar, aux)`` with ``has_aux``.
      radius: length of the perturbation, >= 0, in the units of ``params``; or a
        schedule of the step.
      decay: of the running mean, in [0, 1); 0 keeps the last gradient alone.
      has_aux: as in ``jax.value_and_grad``.
      eps: the norm of the direction is at least this.
      mask: which parameters are perturbed (see :func:`perturb`).
      adaptive: perturbs as ASAM does.

    Returns:
      A pair: ``init(params) -> state``, and ``update(params, state, *args)`` that
      returns ``(value, grads, state)``, with ``has_aux`` ``((value, aux), grads,
      state)``. Value and ``aux`` are those at the PERTURBED point, the only one seen:
      after the first step the value lies above the loss at ``params``, and BatchNorm
      statistics are those of the perturbed network. The point is float32 at least,
      the gradient comes in the dtypes of ``params``.

    Raises:
      ValueError: if a number is out of range; from ``init`` and ``update``, if
        ``params`` is empty or holds leaves that are not floating, or the state is not
        that of ``params``.

    Examples:
      >>> loss_fn = lambda w: 0.5 * jnp.sum(w**2)
      >>> method = momentum_sam_value_and_grad(loss_fn, radius=5.0)
      >>> w = jnp.array([3.0, 4.0])
      >>> value, grads, state = method.update(w, method.init(w))
      >>> value, grads  # no past: the plain gradient
      (Array(12.5, dtype=float32), Array([3., 4.], dtype=float32))
      >>> method.update(w, state)[1]
      Array([6., 8.], dtype=float32)
    """
    name = "momentum_sam_value_and_grad"
    check_numbers(name, radius=radius, eps=eps)
    check_number(name, "in [0, 1)", decay=decay)

    def init(params: PyTree) -> MomentumSAMState:
        check_tree(name, params)
        zeros = jax.tree.map(lambda p: jnp.zeros_like(wide(p)), params)
        return MomentumSAMState(zeros, jnp.zeros((), jnp.int32))

    def update(params: PyTree, state: MomentumSAMState, *args: Any) -> Any:
        check_tree(name, params)
        check_alike(
            name,
            "params",
            params,
            hint="; the state must be that of init(params)",
            direction=state.direction,
        )
        with jax.named_scope(name):
            point = perturb(
                params,
                state.direction,
                radius=at_step(radius, state.count),
                eps=eps,
                mask=mask,
                adaptive=adaptive,
            )
            value, grads = jax.value_and_grad(loss_fn, has_aux=has_aux)(point, *args)

            def average(d, g):
                share = jnp.asarray(decay, d.dtype)
                return share * d + (1 - share) * g.astype(d.dtype)

            direction = jax.tree.map(average, state.direction, grads)
            grads = jax.tree.map(
                lambda g, p: g.astype(jnp.result_type(p)), grads, params
            )
            count = optax.safe_increment(state.count)
            return value, grads, MomentumSAMState(direction, count)

    return MomentumSAM(init, update)
