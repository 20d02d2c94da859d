"""Means of gradients that heed the many: winsorized, of medians, over steps.

See :mod:`jaxlab.optimizers.coherence` for where they come from.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, PyTree

from jaxlab import trees
from jaxlab._array_checks import check_floating
from jaxlab._checks import check_count, is_whole
from jaxlab._norms import wide, zeros_wide
from jaxlab.curvature._batches import Parts, cut
from jaxlab.curvature._vectors import space_of
from jaxlab.optimizers._links import check_alike
from jaxlab.optimizers.coherence.examples import (
    Loss,
    prepared,
    refuse_weights,
    row_gradient,
    sum_over,
)


def winsorized_mean(
    x: Float[ArrayLike, "..."],
    *,
    k: int | None = None,
    percent: int | float | None = None,
    axis: int = 0,
) -> Float[Array, "..."]:
    """Averages along an axis with the k lowest and k highest values pulled in.

    The k lowest become the (k + 1)-th lowest and likewise at the top: order statistics,
    no interpolation. ``k = 0`` is the mean, the largest k the median.

    Args:
      x: any floating array with m entries along ``axis``.
      k: values on either side, ``0 <= 2 k < m``.
      percent: in place of ``k``, in [0, 50]: ``k = floor(percent m / 100)``, at most
        ``(m - 1) // 2``. The authors take 1 to 8, as we recall.
      axis: the examples.

    Returns:
      The mean, computed in float32 at least, in the dtype of ``x``. An infinite value
      among the k is pulled in like any other; NaN comes through.

    Raises:
      ValueError: unless exactly one of ``k`` and ``percent`` is given, in its range.

    Examples:
      >>> winsorized_mean(jnp.array([1.0, 2.0, 3.0, 1e9]), k=1)
      Array(2.5, dtype=float32)
    """
    rows = _rows_first("winsorized_mean", x, axis)
    k = _tail("winsorized_mean", k, percent, rows.shape[0])
    total = _clipped_sum(rows, _limits(rows, k) if k else None)
    return (total / rows.shape[0]).astype(rows.dtype)


def winsorized_gradient(
    loss_fn: Loss,
    params: PyTree,
    batch: PyTree,
    *,
    k: int | None = None,
    percent: int | float | None = None,
    microbatch: int | None = None,
) -> PyTree:
    """Gives the winsorized mean of the examples' gradients, coordinate by coordinate.

    Without ``microbatch`` all m gradients and a sorted copy of the largest leaf's are
    in memory, in one pass. With it there are two passes, the first for the limits, and
    ``2 (k + 1) + microbatch`` gradients: worth it where that is well below m.

    Args:
      loss_fn: as in :func:`per_example_gradients`.
      params: floating leaves.
      batch: a tree of rows, without weights.
      k: as in :func:`winsorized_mean`.
      percent: likewise, in place of ``k``.
      microbatch: rows that are differentiated at once; ``None`` takes all.

    Returns:
      A gradient like ``params``.

    Raises:
      ValueError: as both functions do, or if the batch has weights.

    Examples:
      >>> loss_fn = lambda w, x: jnp.mean(w * x)
      >>> winsorized_gradient(
      ...     loss_fn, jnp.array(1.0), jnp.array([1.0, 2.0, 3.0, 1e9]), k=1
      ... )
      Array(2.5, dtype=float32)
    """
    name = "winsorized_gradient"
    params, batch, rows = prepared(name, loss_fn, params, batch, microbatch)
    refuse_weights(name, batch)
    k = _tail(name, k, percent, rows)
    one = row_gradient(loss_fn, params)
    leaves, structure = jax.tree.flatten(params)

    def gradients(part):
        return jax.tree.leaves(jax.vmap(one)(part))

    with jax.named_scope(name):
        if microbatch is None or microbatch >= rows:
            found = gradients(batch)
            sums = [_clipped_sum(g, _limits(g, k) if k else None) for g in found]
        else:
            parts = cut(name, batch, microbatch)
            ends = [None] * len(leaves)
            if k:
                ends = _streamed_limits(gradients, parts, leaves, k)
            sums = sum_over(
                lambda part: list(map(_clipped_sum, gradients(part), ends)), parts
            )
        means = [(s / rows).astype(p.dtype) for s, p in zip(sums, leaves, strict=True)]
        return jax.tree.unflatten(structure, means)


def median_of_means(
    x: Float[ArrayLike, "..."], *, groups: int = 3, axis: int = 0
) -> Float[Array, "..."]:
    """Takes the median over groups of the groups' means, along an axis.

    Args:
      x: any floating array with m entries along ``axis``, in random order.
      groups: consecutive entries form a group; sizes differ by one at most, the longer
        ones first. 1 is the mean, m the median. A group that an outlier spoils is
        outvoted while such groups are fewer than half.
      axis: the examples.

    Returns:
      The median, computed in float32 at least, in the dtype of ``x``; for an even
      number of groups the mean of the middle two.

    Raises:
      ValueError: if ``groups`` is not an integer from 1 to m.

    Examples:
      >>> median_of_means(jnp.array([1.0, 3.0, 4.0, 6.0, 1e9, 1e9]))
      Array(5., dtype=float32)
    """
    rows = _rows_first("median_of_means", x, axis)
    groups = _check_groups("median_of_means", groups, rows.shape[0])
    means = lambda part: jnp.mean(wide(part), axis=1)
    return _median(_over_groups(means, rows, groups)).astype(rows.dtype)


def median_of_means_gradient(
    loss_fn: Loss, params: PyTree, batch: PyTree, *, groups: int = 3
) -> PyTree:
    """Gives the coordinatewise median of the gradients of groups of rows.

    One pass, no gradients of single examples: ``groups`` gradients are in memory, and
    the forward pass of one group. With three groups this is M3.

    Args:
      loss_fn: ``(params, batch) -> scalar``, a mean over rows.
      params: floating leaves.
      batch: a tree of rows in random order, without weights.
      groups: as in :func:`median_of_means`; odd ones need no mean of two.

    Returns:
      A gradient like ``params``.

    Raises:
      ValueError: as :func:`median_of_means` and :func:`winsorized_gradient` do.

    Examples:
      >>> loss_fn = lambda w, x: jnp.mean(w * x)
      >>> median_of_means_gradient(
      ...     loss_fn, jnp.array(1.0), jnp.array([1.0, 2.0, 1e9])
      ... )
      Array(2., dtype=float32)
    """
    name = "median_of_means_gradient"
    params, batch, rows = prepared(name, loss_fn, params, batch, None)
    refuse_weights(name, batch)
    groups = _check_groups(name, groups, rows)
    gradient = lambda part: jax.tree.map(wide, jax.grad(loss_fn)(params, part))
    with jax.named_scope(name):
        found = _over_groups(lambda p: jax.lax.map(gradient, p), batch, groups)
        return jax.tree.map(lambda g, p: _median(g).astype(p.dtype), found, params)


class RunningMedianState(NamedTuple):
    """State of :func:`running_median`.

    Attributes:
      count: steps.
      recent: the gradients before this step, the latest first; float32 at least.

    Examples:
      >>> len(running_median(3).init(jnp.ones(2)).recent)
      2
    """

    count: Int[Array, ""]
    recent: tuple[PyTree, ...]


def running_median(window: int = 3) -> optax.GradientTransformationExtraArgs:
    """Replaces gradients by the coordinatewise median of the last ones (RM3).

    While fewer than ``window`` have been seen, the median is that of those: the first
    step passes, the second gives the mean of two. It costs no gradient and
    ``window - 1`` trees of memory.

    Args:
      window: gradients, this step's among them; >= 1, static. 3 is RM3.

    Returns:
      A transformation, for the place in front of the optimizer.

    Raises:
      ValueError: if ``window`` is not an integer >= 1; from ``init``, if the tree is
        empty or not floating.

    Examples:
      >>> tx, w = running_median(3), jnp.zeros(1)
      >>> state, seen = tx.init(w), []
      >>> for g in (1.0, 1e9, 2.0, 3.0):
      ...     updates, state = tx.update(jnp.array([g]), state)
      ...     seen.append(float(updates[0]))
      >>> seen[0], seen[2:]
      (1.0, [2.0, 3.0])
    """
    name = "running_median"
    check_count(name, window=window)

    def init(params):
        if jax.tree.leaves(params) or not trees.has_holes(params):
            space_of(name, params, "params")
        recent = tuple(zeros_wide(params) for _ in range(window - 1))
        return RunningMedianState(jnp.zeros((), jnp.int32), recent)

    def update(updates, state, params=None, **extra_args):
        check_floating(name, "updates", updates)
        updates = jax.tree.map(jnp.asarray, updates)
        for before in state.recent:
            check_alike(name, updates, before)
        seen = jnp.minimum(state.count, window - 1) + 1

        def median(u, *before):
            stack = jnp.stack([wide(u), *(b.astype(wide(u).dtype) for b in before)])
            return _median(stack, seen).astype(u.dtype)

        with jax.named_scope(name):
            new = jax.tree.map(median, updates, *state.recent)
        recent = (updates, *state.recent)[: window - 1]
        recent = optax.tree.cast_like(recent, state.recent)
        return new, RunningMedianState(optax.safe_increment(state.count), recent)

    return optax.GradientTransformationExtraArgs(init, update)


def _limits(rows: Array, k: int) -> tuple[Array, Array]:
    """Gives the (k + 1)-th lowest and highest along the first axis."""
    ordered = jnp.sort(rows, axis=0)
    return ordered[k], ordered[-1 - k]


def _clipped_sum(rows: Array, limits: tuple[Array, Array] | None) -> Array:
    # Sums after the clipping: an outlier never enters them. NaN does.
    if limits is not None:
        low, high = limits
        rows = jnp.clip(rows, low[None], high[None])
    return jnp.sum(wide(rows), axis=0)


def _streamed_limits(gradients, parts: Parts, like: list[Array], k: int):
    """Gives the limits of each leaf, keeping the k + 1 outermost values."""

    def merge(kept, rows):
        low, high = kept
        low = jnp.sort(jnp.concatenate([low, rows]), axis=0)[: k + 1]
        high = jnp.sort(jnp.concatenate([high, rows]), axis=0)[-k - 1 :]
        return low, high

    full = lambda p, value: jnp.full((k + 1, *p.shape), value, p.dtype)
    kept = [(full(p, jnp.inf), full(p, -jnp.inf)) for p in like]
    step = lambda kept, part: list(map(merge, kept, gradients(part)))
    kept, _ = jax.lax.scan(lambda c, part: (step(c, part), None), kept, parts.stack)
    if parts.rest is not None:
        kept = step(kept, parts.rest)
    return [(low[-1], high[0]) for low, high in kept]


def _over_groups(function: Callable[[Any], Any], rows: PyTree, groups: int) -> PyTree:
    """Joins a function of stacked groups over the longer and the shorter ones."""
    count = jax.tree.leaves(rows)[0].shape[0]
    size, longer = divmod(count, groups)
    split = longer * (size + 1)
    stack = lambda x, number: x.reshape(number, len(x) // number, *x.shape[1:])
    found = []
    if longer:
        found.append(function(jax.tree.map(lambda x: stack(x[:split], longer), rows)))
    rest = groups - longer
    found.append(function(jax.tree.map(lambda x: stack(x[split:], rest), rows)))
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *found)


def _median(stack: Array, seen: ArrayLike | None = None) -> Array:
    """Takes the median of the first ``seen`` along the first axis; NaN if one is."""
    size = stack.shape[0]
    seen = jnp.asarray(size if seen is None else seen)
    counts = (jnp.arange(size) < seen).reshape(-1, *(1,) * (stack.ndim - 1))
    bad = jnp.any(jnp.isnan(stack) & counts, axis=0)
    ordered = jnp.sort(jnp.where(counts, stack, jnp.inf), axis=0)
    low, high = ordered[(seen - 1) // 2], ordered[seen // 2]
    return jnp.where(bad, jnp.nan, 0.5 * low + 0.5 * high)


def _rows_first(name: str, x: ArrayLike, axis: int) -> Array:
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"{name}: x must be floating, got {x.dtype}.")
    if not is_whole(axis) or not -x.ndim <= axis < x.ndim or not x.shape[axis]:
        raise ValueError(
            f"{name}: axis must be one of x with at least one entry, got axis={axis} "
            f"for shape {x.shape}."
        )
    return jnp.moveaxis(x, axis, 0)


def _tail(name: str, k: int | None, percent: int | float | None, rows: int) -> int:
    most = (rows - 1) // 2
    if (k is None) == (percent is None):
        raise ValueError(
            f"{name}: give one of k= and percent=, got k={k} and percent={percent}."
        )
    if percent is not None:
        number = isinstance(percent, (int, float)) and not isinstance(percent, bool)
        if not number or not 0 <= percent <= 50:
            raise ValueError(
                f"{name}: percent must be a number in [0, 50], got {percent!r}; it is "
                "static."
            )
        # 32.3 percent of 1,000 are 323, whatever the last bit of the product.
        return min(math.floor(percent * rows / 100 + 1e-9), most)
    if not is_whole(k) or not 0 <= k <= most:
        raise ValueError(
            f"{name}: k must be an integer with 0 <= 2 k < {rows}, the number of "
            f"examples, got {k!r}; it is static."
        )
    return int(k)


def _check_groups(name: str, groups: int, rows: int) -> int:
    if not is_whole(groups) or not 1 <= groups <= rows:
        raise ValueError(
            f"{name}: groups must be an integer from 1 to {rows}, the number of "
            f"examples, got {groups!r}; it is static."
        )
    return int(groups)
