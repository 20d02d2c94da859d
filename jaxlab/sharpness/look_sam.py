"""LookSAM: the second gradient every few steps, its new direction kept in between.

With g the gradient, u = g / ||g|| and g_s the gradient at w + r u, every k-th step
uses g_s and keeps the part that plain training does not have,

    g_v = g_s - (g_s . u) u                    (so g_v . g = 0)

and the other steps use g + a (||g|| / ||g_v||) g_v. Derived from that decomposition
and not checked against the authors' code.
Reference: Liu et al., "Towards Efficient and Scalable Sharpness-Aware Minimization",
CVPR 2022.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Int, PyTree

from jaxlab._checks import check_count
from jaxlab._norms import cast_like, inner, safe_norm, unit
from jaxlab.curvature._layouts import for_branches
from jaxlab.sharpness._checks import check_numbers, check_tree
from jaxlab.sharpness._links import at_step, checked_grad_fn
from jaxlab.sharpness.gradient_norm_penalty import gnp_gradient
from jaxlab.sharpness.perturbation import Mask


class LookSAMState(NamedTuple):
    """State of :func:`look_sam`: the number of steps and the direction it reuses.

    Examples:
      >>> look_sam().init(jnp.ones(2)).orthogonal
      Array([0., 0.], dtype=float32)
    """

    count: Int[Array, ""]
    orthogonal: PyTree  # g_v, leaves like params


def look_sam(
    rho: ArrayLike | Callable[..., Any] = 0.05,
    *,
    every: int = 5,
    strength: ArrayLike | Callable[..., Any] = 0.7,
    mask: Mask = None,
    eps: ArrayLike = 1e-12,
) -> optax.GradientTransformationExtraArgs:
    """Replaces the gradient by SAM's on every k-th step and reuses it in between.

    Costs ``1 + 1/every`` gradients a step: the others do not take a second one.

    Args:
      rho: length of the perturbation, or a schedule.
      every: steps from one second gradient to the next, >= 1; static. The first step
        has one.
      strength: length of the reused part relative to the gradient, or a schedule.
      mask: which parameters are perturbed.
      eps: norms are at least this.

    Returns:
      A transformation whose ``update`` needs ``grad_fn=``, ``grad=`` and params; the
      first link of a chain. Its state holds one tree like params.

    Raises:
      ValueError: if a number is out of range; from ``update``, if an argument is
        missing or another link changed the gradient first.

    Examples:
      >>> grad_fn = jax.grad(lambda w: 0.5 * jnp.sum(w**2))
      >>> tx, w = look_sam(5.0, every=2), jnp.array([3.0, 4.0])
      >>> grads = grad_fn(w)
      >>> tx.update(grads, tx.init(w), w, grad_fn=grad_fn, grad=grads)[0]
      Array([6., 8.], dtype=float32)
    """
    name = "look_sam"
    check_numbers(name, rho=rho, strength=strength, eps=eps)
    check_count(name, every=every)

    def init(params):
        check_tree(name, params)
        return LookSAMState(
            jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, params)
        )

    def update(updates, state, params=None, *, grad_fn=None, grad=None, **extra_args):
        checked = checked_grad_fn(name, updates, params, grad_fn, grad)
        updates = jax.tree.map(jnp.asarray, updates)
        radius = at_step(rho, state.count)
        share = at_step(strength, state.count)

        def look():
            ahead = gnp_gradient(
                for_branches(checked),
                params,
                alpha=1.0,
                radius=radius,
                grads=updates,
                mask=mask,
                eps=eps,
            )
            along = unit(updates, eps)
            length = inner(ahead, along)
            rest = lambda s, u: (s - (length * u).astype(u.dtype)).astype(s.dtype)
            across = jax.tree.map(rest, ahead, along)
            return cast_like(ahead, updates), cast_like(across, state.orthogonal)

        def reuse():
            ratio = share * safe_norm(updates) / safe_norm(state.orthogonal, eps)
            add = lambda g, v: (g + ratio * v).astype(g.dtype)
            return jax.tree.map(add, updates, state.orthogonal), state.orthogonal

        new, orthogonal = jax.lax.cond(state.count % every == 0, look, reuse)
        return new, LookSAMState(optax.safe_increment(state.count), orthogonal)

    return optax.GradientTransformationExtraArgs(init, update)
