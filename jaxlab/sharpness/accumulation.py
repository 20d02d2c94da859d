"""The penalised gradient over micro-batches: three quantities, three names.

With k parts of a batch, g_i the gradient of part i and g their mean,

    full batch      w' = w + r g / ||g||,        mix g with mean_i grad L_i(w')
    micro-batches   w_i' = w + r g_i / ||g_i||,  mean_i of g_i mixed with grad L_i(w_i')
    m-sharpness     the second, over groups of m examples

The first equals the whole batch in one pass and needs the memory of one part; it is
what "gradient accumulation" should mean. The second is what one gets from a link in
front of ``optax.MultiSteps``, and on several devices without synchronisation. The two
differ: the smaller the group, the stronger the penalty. ``optax.MultiSteps`` around
the link would perturb with g and take grad L_k(w') on the last part alone, which is
none of them; the links refuse it.
References: Foret et al., ICLR 2021 (m-sharpness); Zhao, Zhang and Hu, ICML 2022.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxlab._checks import check_count
from jaxlab._norms import cast_like, wide
from jaxlab.curvature._batches import rows_of
from jaxlab.sharpness._checks import check_numbers
from jaxlab.sharpness.gradient_norm_penalty import gnp_gradient, gnp_value_and_grad

_OPTIONS = ("adaptive", "eps", "mask", "normalize_reference", "point_dtype")


def full_batch_value_and_grad(
    loss_fn: Callable[..., Any],
    *,
    num_micro_batches: int,
    alpha: ArrayLike,
    radius: ArrayLike,
    **options: Any,
) -> Callable[..., Any]:
    """Makes the penalised gradient of a whole batch in the memory of a part.

    Both gradients are accumulated over the parts, one after the other: 2k passes, equal
    to ``gnp_value_and_grad`` on the whole batch but for round-off.

    Args:
      loss_fn: ``(params, batch, *args) -> scalar``, a mean over rows (equal row
        weights). All parts get the same further arguments, a dropout key say.
      num_micro_batches: k; cuts the rows of ``batch``, in order, into equal parts.
      alpha: share of the gradient at the perturbed point; 1 is SAM.
      radius: length of the perturbation, >= 0.
      **options: of :func:`gnp_gradient`: ``adaptive``, ``mask``, ``eps``,
        ``normalize_reference``, ``point_dtype``.

    Returns:
      A function ``(params, batch, *args) -> (value, grads)``; ``batch`` is a tree whose
      leaves share their leading axis, the rows. The value is that at ``params``, in
      float32 at least.

    Raises:
      ValueError: if a number is out of range or does not divide the rows.

    Examples:
      >>> loss_fn = lambda w, x: jnp.mean((x @ w) ** 2)
      >>> f = full_batch_value_and_grad(
      ...     loss_fn, num_micro_batches=2, alpha=1.0, radius=5.0
      ... )
      >>> f(jnp.array([3.0, 4.0]), jnp.eye(2))
      (Array(12.5, dtype=float32), Array([6., 8.], dtype=float32))
    """
    name = "full_batch_value_and_grad"
    check_numbers(name, alpha=alpha, radius=radius)
    check_count(name, num_micro_batches=num_micro_batches)
    _check_options(name, options)

    def value_and_grad(params, batch, *args):
        parts = _cut(name, batch, num_micro_batches, "num_micro_batches")
        one = lambda at, part: jax.value_and_grad(loss_fn)(at, part, *args)
        value, grads = _mean(one, params, parts)
        # Sums stay wide until the two are mixed.
        mixed = gnp_gradient(
            lambda at: _mean(one, at, parts)[1],
            params,
            alpha=alpha,
            radius=radius,
            grads=grads,
            **options,
        )
        return value, cast_like(mixed, params)

    return value_and_grad


def micro_batch_value_and_grad(
    loss_fn: Callable[..., Any],
    *,
    num_micro_batches: int,
    alpha: ArrayLike,
    radius: ArrayLike,
    **options: Any,
) -> Callable[..., Any]:
    """Makes the mean of the penalised gradients of the parts of a batch.

    Each part is perturbed along its own gradient, one after the other. Another quantity
    than :func:`full_batch_value_and_grad`, and that of a link in front of
    ``optax.MultiSteps``.

    Args:
      loss_fn: ``(params, batch, *args) -> scalar``, a mean over rows.
      num_micro_batches: k; cuts the rows of ``batch``, in order, into equal parts.
      alpha: share of the gradient at the perturbed point; 1 is SAM.
      radius: length of each perturbation, >= 0.
      **options: as in :func:`full_batch_value_and_grad`.

    Returns:
      A function ``(params, batch, *args) -> (value, grads)``.

    Raises:
      ValueError: if a number is out of range or does not divide the rows.

    Examples:
      >>> loss_fn = lambda w, x: 0.5 * jnp.mean((w - x) ** 2)
      >>> f = micro_batch_value_and_grad(
      ...     loss_fn, num_micro_batches=2, alpha=1.0, radius=1.0
      ... )
      >>> f(jnp.array(0.0), jnp.array([1.0, 3.0]))  # each part moves by 1
      (Array(2.5, dtype=float32), Array(-3., dtype=float32))
    """
    name = "micro_batch_value_and_grad"
    check_count(name, num_micro_batches=num_micro_batches)
    _check_options(name, options)
    mixed = gnp_value_and_grad(loss_fn, alpha=alpha, radius=radius, **options)

    def value_and_grad(params, batch, *args):
        parts = _cut(name, batch, num_micro_batches, "num_micro_batches")
        value, grads = _mean(lambda at, part: mixed(at, part, *args), params, parts)
        return value, cast_like(grads, params)

    return value_and_grad


def m_sharpness_value_and_grad(
    loss_fn: Callable[..., Any],
    *,
    group_size: int,
    alpha: ArrayLike,
    radius: ArrayLike,
    how: Literal["vmap", "scan"] = "vmap",
    **options: Any,
) -> Callable[..., Any]:
    """Makes the mean of the penalised gradients of groups of m examples.

    Args:
      loss_fn: ``(params, batch, *args) -> scalar``, a mean over rows.
      group_size: m, examples a group; consecutive rows.
      alpha: share of the gradient at the perturbed point; 1 is SAM.
      radius: length of each perturbation, >= 0.
      how: "vmap" runs all groups together, with a gradient in memory for each; "scan"
        one after the other.
      **options: as in :func:`full_batch_value_and_grad`.

    Returns:
      A function ``(params, batch, *args) -> (value, grads)``.

    Raises:
      ValueError: if a number is out of range or does not divide the rows, or ``how``
        is neither.

    Examples:
      >>> loss_fn = lambda w, x: 0.5 * jnp.mean((w - x) ** 2)
      >>> f = m_sharpness_value_and_grad(loss_fn, group_size=1, alpha=1.0, radius=1.0)
      >>> f(jnp.array(0.0), jnp.array([1.0, 3.0]))
      (Array(2.5, dtype=float32), Array(-3., dtype=float32))
    """
    name = "m_sharpness_value_and_grad"
    check_count(name, group_size=group_size)
    _check_options(name, options)
    if how not in ("vmap", "scan"):
        raise ValueError(f'{name}: how must be "vmap" or "scan", got {how!r}.')
    mixed = gnp_value_and_grad(loss_fn, alpha=alpha, radius=radius, **options)

    def value_and_grad(params, batch, *args):
        rows = rows_of(name, batch)
        if rows % group_size:
            raise ValueError(
                f"{name}: group_size={group_size} must divide the batch, got {rows} "
                "rows."
            )
        groups = _cut(name, batch, rows // group_size, "the number of groups")
        one = lambda at, group: mixed(at, group, *args)
        if how == "scan":
            value, grads = _mean(one, params, groups)
        else:
            found = jax.vmap(one, in_axes=(None, 0))(params, groups)
            value, grads = jax.tree.map(lambda f: jnp.mean(wide(f), axis=0), found)
        return value, cast_like(grads, params)

    return value_and_grad


def _mean(function, params, parts):
    """Averages ``function(params, part)`` over parts, in float32 at least."""
    found = lambda part: jax.tree.map(wide, function(params, part))
    shapes = jax.eval_shape(found, jax.tree.map(lambda leaf: leaf[0], parts))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    add = lambda total, part: (jax.tree.map(jnp.add, total, found(part)), None)
    total, _ = jax.lax.scan(add, zeros, parts)
    count = jax.tree.leaves(parts)[0].shape[0]
    return jax.tree.map(lambda t: t / count, total)


def _cut(name, batch, count, what):
    rows = rows_of(name, batch)
    if rows % count:
        raise ValueError(
            f"{name}: {what} = {count} must divide the batch, got {rows} rows."
        )
    split = lambda a: jnp.reshape(a, (count, rows // count, *jnp.shape(a)[1:]))
    return jax.tree.map(split, batch)


def _check_options(name, options) -> None:
    if unknown := sorted(set(options) - set(_OPTIONS)):
        raise ValueError(
            f"{name}: unknown options {unknown}; it takes {list(_OPTIONS)}. Several "
            "devices: shard the batch under jax.jit, or use gnp_value_and_grad with "
            "axis_name= inside jax.shard_map."
        )
