"""Gradient-norm penalty: descends the loss and the norm of its gradient together.

With g the gradient of the loss L at w, u = g / ||g|| over all parameters as one
vector, and H the Hessian,

    J(w) = L(w) + lambda ||g(w)||,   grad J = g + lambda H u                  (E)
    (1 - alpha) g + alpha grad L(w + r u),   alpha = lambda / r               (G)

(G) replaces H u by its finite difference along u: two gradients, no second-order
differentiation. On a quadratic loss (G) = (E) for every r; on a smooth one they differ
by O(lambda r); across the kinks of ReLU the difference does not approach H u. alpha = 1
is sharpness-aware minimisation (SAM) of radius r, alpha = 0 plain training.

The authors' code of 2024 defaults to (1 - alpha) u + alpha grad L(w + r u), which is
not (G); it is here under ``normalize_reference``. It divides by ||g|| without a guard;
here the norm is at least ``eps``, so a zero gradient stays zero.
References: Zhao, Zhang and Hu, "Penalizing Gradient Norm for Efficiently Improving
Generalization in Deep Learning", ICML 2022; Foret et al., ICLR 2021; Kwon et al.,
"ASAM", ICML 2021.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Int, PyTree

from jaxlab._norms import unit
from jaxlab.sharpness._checks import check_numbers, check_tree, like
from jaxlab.sharpness._links import at_step, checked_grad_fn
from jaxlab.sharpness.perturbation import Mask, perturb

ScalarOrSchedule = ArrayLike | Callable[..., Any]
AxisName = str | tuple[str, ...] | None


def gnp_gradient(
    grad_fn: Callable[[Any], Any],
    params: PyTree,
    *,
    alpha: ArrayLike,
    radius: ArrayLike,
    grads: PyTree | None = None,
    normalize_reference: bool = False,
    adaptive: bool = False,
    mask: Mask = None,
    axis_name: AxisName = None,
    sync_perturbation: bool = True,
    eps: ArrayLike = 1e-12,
    point_dtype: Any = None,
) -> PyTree:
    """Takes the gradient of the loss with its gradient norm penalised.

    Args:
      grad_fn: ``params -> gradient``, the same function both times (same batch, same
        dropout key).
      params: floating leaves of any shape.
      alpha: share of the gradient at the perturbed point; 1 is SAM. Any number: the
        penalty is ``alpha * radius``, negative ones climb.
      radius: length of the perturbation, >= 0, in the units of ``params``.
      grads: the gradient at ``params``, where the caller has it: saves one.
      normalize_reference: mixes with ``g / ||g||`` in place of ``g``, as the authors'
        code of 2024 does by default.
      adaptive: perturbs as ASAM does.
      mask: which parameters are perturbed (see :func:`perturb`); all are mixed.
      axis_name: mesh or ``vmap`` axis (axes) over which gradients are averaged; every
        device holds the same ``params``, and ``grad_fn`` speaks of its own batch.
      sync_perturbation: averages the gradient before the perturbation: equal to one
        device with the whole batch. ``False`` lets each device perturb with its own
        and averages what it mixed (m-sharpness, the authors' default).
      eps: the norm is at least this.
      point_dtype: dtype of the point handed to ``grad_fn``; default that of each
        leaf, but at least float32, since a short step rounds away in bfloat16. (A
        model that casts its parameters to bfloat16 itself rounds it away again.)

    Returns:
      A tree like ``params``, in the dtypes of the gradient. At ``alpha == 0`` it is
      the gradient bit for bit; the Python number 0 also saves the second pass.

    Raises:
      ValueError: if a number is out of range, or trees are empty, differ or hold
        leaves that are not floating.

    Examples:
      >>> grad_fn = jax.grad(lambda w: 0.5 * jnp.sum(w**2))  # H = 1: g + lambda u
      >>> gnp_gradient(grad_fn, jnp.array([3.0, 4.0]), alpha=0.5, radius=10.0)
      Array([6., 8.], dtype=float32)
    """
    name = "gnp_gradient"
    check_numbers(name, alpha=alpha, radius=radius, eps=eps)
    check_tree(name, params)
    if axis_name is not None:
        params = _varying(params, axis_name)
    if grads is None:
        grads = grad_fn(params)
    grads = like(name, grads, params)
    average = lambda tree: tree if axis_name is None else _mean(tree, axis_name)
    if sync_perturbation:
        grads = average(grads)
    if _is_zero(alpha) and not normalize_reference:
        return grads if sync_perturbation else average(grads)
    with jax.named_scope(name):
        point = perturb(
            params,
            grads,
            radius=radius,
            eps=eps,
            mask=mask,
            adaptive=adaptive,
            dtype=point_dtype,
        )
        ahead = like(name, grad_fn(point), params)
        if sync_perturbation:
            ahead = average(ahead)
        mixed = _mix(grads, ahead, alpha, normalize_reference, eps)
        return mixed if sync_perturbation else average(mixed)


def gnp_gradient_exact(
    loss_fn: Callable[[Any], Any],
    params: PyTree,
    *,
    penalty: ArrayLike,
    eps: ArrayLike = 1e-12,
) -> PyTree:
    """Takes the exact gradient of ``loss + penalty * ||gradient||``, equation (E).

    The gradient is linearised once and its derivative taken along u: about 2.9 times
    the operations of a gradient, and the memory of both passes.

    Args:
      loss_fn: ``params -> scalar``, twice differentiable.
      params: floating leaves of any shape.
      penalty: lambda, the weight of the norm; any number.
      eps: the norm is at least this.

    Returns:
      A tree like ``params``; at a zero gradient, zero.

    Raises:
      ValueError: if ``penalty`` is a number that is not finite, or ``params`` is empty
        or holds leaves that are not floating.

    Examples:
      >>> loss_fn = lambda w: 0.5 * jnp.sum(w**2)
      >>> gnp_gradient_exact(loss_fn, jnp.array([3.0, 4.0]), penalty=5.0)
      Array([6., 8.], dtype=float32)
    """
    name = "gnp_gradient_exact"
    check_numbers(name, alpha=penalty, eps=eps)
    check_tree(name, params)
    with jax.named_scope(name):
        grads, hessian_times = jax.linearize(jax.grad(loss_fn), params)
        along = jax.tree.map(lambda u, g: u.astype(g.dtype), unit(grads, eps), grads)
        bent = hessian_times(along)
        add = lambda g, h: (g + penalty * h).astype(g.dtype)
        return jax.tree.map(add, grads, bent)


def gnp_value_and_grad(
    loss_fn: Callable[..., Any],
    *,
    alpha: ArrayLike,
    radius: ArrayLike,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    **options: Any,
) -> Callable[..., Any]:
    """Makes a drop-in for ``jax.value_and_grad`` whose gradient is penalised.

    Both passes call ``loss_fn`` with the same other arguments, so with the same
    dropout key. Value and ``aux`` are those of the first pass, at the parameters
    themselves: BatchNorm statistics returned as ``aux`` are the unperturbed ones.

    Args:
      loss_fn: returns a scalar, or ``(scalar, aux)`` with ``has_aux``.
      alpha: share of the gradient at the perturbed point; 1 is SAM.
      radius: length of the perturbation, >= 0.
      argnums: which arguments are parameters; several are perturbed together, under
        one norm.
      has_aux: as in ``jax.value_and_grad``.
      **options: of :func:`gnp_gradient`, but for ``grads``. With ``axis_name`` the
        gradient alone is averaged; value and ``aux`` stay those of the device.

    Returns:
      A function of the arguments of ``loss_fn`` that returns ``(value, grads)`` or
      ``((value, aux), grads)``.

    Raises:
      ValueError: if a number is out of range or an option unknown.

    Examples:
      >>> loss_fn = lambda w, x: 0.5 * jnp.sum((w * x) ** 2)
      >>> f = gnp_value_and_grad(loss_fn, alpha=1.0, radius=5.0)
      >>> f(jnp.array([3.0, 4.0]), 1.0)
      (Array(12.5, dtype=float32), Array([6., 8.], dtype=float32))
    """
    check_numbers("gnp_value_and_grad", alpha=alpha, radius=radius)
    known = set(gnp_gradient.__annotations__) - {"grad_fn", "params", "grads", "return"}
    if unknown := sorted(set(options) - known):
        raise ValueError(
            f"gnp_value_and_grad: unknown options {unknown}; gnp_gradient takes "
            f"{sorted(known)}."
        )
    several = not isinstance(argnums, int)
    places = tuple(argnums) if several else (argnums,)

    def value_and_grad(*args, **kwargs):
        if not all(-len(args) <= place < len(args) for place in places):
            raise ValueError(
                f"gnp_value_and_grad: argnums={argnums} must name positional "
                f"arguments, got {len(args)} of them."
            )
        # One argument stays as it is, so that a mask is a tree like it.
        params = tuple(args[place] for place in places)
        params = params if several else params[0]
        check_tree("gnp_value_and_grad", params)

        def at(point):
            full = list(args)
            each = point if several else (point,)
            for place, leaf in zip(places, each, strict=True):
                full[place] = leaf
            return loss_fn(*full, **kwargs)

        axis_name = options.get("axis_name")
        here = params if axis_name is None else _varying(params, axis_name)
        value, grads = jax.value_and_grad(at, has_aux=has_aux)(here)
        only_loss = (lambda point: at(point)[0]) if has_aux else at
        grads = gnp_gradient(
            jax.grad(only_loss),
            params,
            alpha=alpha,
            radius=radius,
            grads=grads,
            **options,
        )
        return value, grads

    return value_and_grad


class GradientNormPenaltyState(NamedTuple):
    """State of :func:`gradient_norm_penalty`: the number of steps, for schedules.

    Examples:
      >>> int(gradient_norm_penalty().init(jnp.ones(2)).count)
      0
    """

    count: Int[Array, ""]


def gradient_norm_penalty(
    alpha: ScalarOrSchedule = 0.8,
    radius: ScalarOrSchedule = 0.05,
    *,
    normalize_reference: bool = False,
    adaptive: bool = False,
    mask: Mask = None,
    axis_name: AxisName = None,
    sync_perturbation: bool = True,
    eps: ArrayLike = 1e-12,
    point_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Replaces the gradient by that of the loss with its gradient norm penalised.

    The first link of a chain; any optimizer follows:
    ``optax.chain(gradient_norm_penalty(0.8, 0.1), optax.adamw(1e-3))``. It returns a
    gradient, not a step. Inside ``optax.MultiSteps`` it refuses to work.

    Args:
      alpha: share of the gradient at the perturbed point, or a schedule; 1 is SAM.
      radius: length of the perturbation, or a schedule. The authors' recipes take
        0.05 to 0.1.
      normalize_reference: see :func:`gnp_gradient`, as for all that follow.
      adaptive: perturbs as ASAM does.
      mask: which parameters are perturbed. Inside ``optax.masked`` the norm is over
        what the link sees.
      axis_name: axis over which gradients are averaged. ``updates`` must then be each
        device's own.
      sync_perturbation: averages before the perturbation.
      eps: the norm is at least this.
      point_dtype: dtype of the point handed to ``grad_fn``.

    Returns:
      A transformation whose ``update`` needs ``grad_fn=`` (``params -> gradient`` on
      this step's batch), ``grad=`` (the very tree given as updates) and params.
      :func:`static_args` gives the names for ``optax.inject_hyperparams``.

    Raises:
      ValueError: if a number is out of range; from ``update``, if an argument is
        missing or another link changed the gradient first.

    Examples:
      >>> import optax
      >>> grad_fn = jax.grad(lambda w: 0.5 * jnp.sum(w**2))
      >>> tx = optax.chain(gradient_norm_penalty(0.5, 10.0), optax.sgd(1.0))
      >>> w = jnp.array([3.0, 4.0])
      >>> grads = grad_fn(w)
      >>> tx.update(grads, tx.init(w), w, grad_fn=grad_fn, grad=grads)[0]
      Array([-6., -8.], dtype=float32)
    """
    name = "gradient_norm_penalty"
    check_numbers(name, alpha=alpha, radius=radius, eps=eps)
    return _link(
        name,
        alpha,
        radius,
        eps,
        normalize_reference=normalize_reference,
        adaptive=adaptive,
        mask=mask,
        axis_name=axis_name,
        sync_perturbation=sync_perturbation,
        point_dtype=point_dtype,
    )


# The signatures below are written out: optax.inject_hyperparams reads them.


def sam(
    rho: ScalarOrSchedule = 0.05,
    *,
    mask: Mask = None,
    axis_name: AxisName = None,
    sync_perturbation: bool = True,
    eps: ArrayLike = 1e-12,
    point_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Replaces the gradient by that at the sharpest point nearby (SAM).

    :func:`gradient_norm_penalty` with ``alpha = 1``: wraps no optimizer, the first link
    of a chain.

    Args:
      rho: length of the perturbation, or a schedule.
      mask: which parameters are perturbed.
      axis_name: axis over which gradients are averaged.
      sync_perturbation: averages before the perturbation.
      eps: the norm is at least this.
      point_dtype: dtype of the point handed to ``grad_fn``.

    Returns:
      A transformation whose ``update`` needs ``grad_fn=``, ``grad=`` and params.

    Raises:
      ValueError: as :func:`gradient_norm_penalty`.

    Examples:
      >>> grad_fn = jax.grad(lambda w: 0.5 * jnp.sum(w**2))
      >>> tx, w = sam(5.0), jnp.array([3.0, 4.0])
      >>> grads = grad_fn(w)
      >>> tx.update(grads, tx.init(w), w, grad_fn=grad_fn, grad=grads)[0]
      Array([6., 8.], dtype=float32)
    """
    check_numbers("sam", rho=rho, eps=eps)
    return _link(
        "sam",
        1.0,
        rho,
        eps,
        mask=mask,
        axis_name=axis_name,
        sync_perturbation=sync_perturbation,
        point_dtype=point_dtype,
    )


def asam(
    rho: ScalarOrSchedule = 0.5,
    *,
    mask: Mask = None,
    axis_name: AxisName = None,
    sync_perturbation: bool = True,
    eps: ArrayLike = 1e-12,
    point_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Replaces the gradient by that at the adaptively perturbed point (ASAM).

    The perturbation ``rho w^2 g / || |w| g ||``; parameters at zero do not move (codes
    that use ``|w| + 0.01`` in place of ``|w|`` differ there).

    Args:
      rho: length of the perturbation relative to the parameters, or a schedule.
      mask: which parameters are perturbed.
      axis_name: axis over which gradients are averaged.
      sync_perturbation: averages before the perturbation.
      eps: the norm is at least this.
      point_dtype: dtype of the point handed to ``grad_fn``.

    Returns:
      A transformation whose ``update`` needs ``grad_fn=``, ``grad=`` and params.

    Raises:
      ValueError: as :func:`gradient_norm_penalty`.

    Examples:
      >>> grad_fn = jax.grad(lambda w: 2.0 * jnp.sum(w))
      >>> tx, w = asam(1.0), jnp.array([3.0, 4.0])
      >>> grads = grad_fn(w)
      >>> tx.update(grads, tx.init(w), w, grad_fn=grad_fn, grad=grads)[0]
      Array([2., 2.], dtype=float32)
    """
    check_numbers("asam", rho=rho, eps=eps)
    return _link(
        "asam",
        1.0,
        rho,
        eps,
        adaptive=True,
        mask=mask,
        axis_name=axis_name,
        sync_perturbation=sync_perturbation,
        point_dtype=point_dtype,
    )


def _link(name, alpha, radius, eps, **options):
    """Makes the link; ``name`` is what its messages call it."""

    def init(params):
        check_tree(name, params)
        return GradientNormPenaltyState(jnp.zeros((), jnp.int32))

    def update(updates, state, params=None, *, grad_fn=None, grad=None, **extra_args):
        checked = checked_grad_fn(name, updates, params, grad_fn, grad)
        mixed = gnp_gradient(
            checked,
            params,
            alpha=at_step(alpha, state.count),
            radius=at_step(radius, state.count),
            grads=updates,
            eps=eps,
            **options,
        )
        return mixed, GradientNormPenaltyState(optax.safe_increment(state.count))

    return optax.GradientTransformationExtraArgs(init, update)


def _mix(grads, ahead, alpha, normalize_reference, eps):
    """Mixes in float32 at least; exact at both ends, whatever the other end holds."""
    reference = unit(grads, eps) if normalize_reference else grads

    def mix(g, u, a):
        if isinstance(alpha, (int, float)) and alpha == 1:
            return a.astype(g.dtype)
        wide = jnp.promote_types(g.dtype, jnp.float32)
        share = jnp.asarray(alpha, wide)
        both = (1 - share) * u.astype(wide) + share * a.astype(wide)
        return jnp.where(share == 0, u.astype(wide), both).astype(g.dtype)

    return jax.tree.map(mix, grads, reference, ahead)


def _is_zero(number) -> bool:
    return isinstance(number, (int, float)) and bool(number == 0)


def _mean(tree, axis_name):
    return jax.tree.map(lambda leaf: jax.lax.pmean(leaf, axis_name), tree)


def _varying(params, axis_name):
    """Marks params as each device's own, so that their gradients are not summed.

    Under ``shard_map`` the gradient with respect to a value that all devices share is
    summed over them; the sum would no longer be a device's own gradient.
    """
    names = (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)

    def vma(value):
        kind = jax.typeof(value)
        return kind.mat.varying if hasattr(kind, "mat") else kind.vma

    # Only shard_map keeps such marks, not vmap: seen by what the axis' index carries.
    names = [name for name in names if name in vma(jax.lax.axis_index(name))]

    def mark(leaf):
        new = tuple(name for name in names if name not in vma(leaf))
        return jax.lax.pcast(leaf, new, to="varying") if new else leaf

    return jax.tree.map(mark, params)
