"""Measures of weights and of what a network computes with them.

See :mod:`jaxlab.optimizers.solutions` for the formulas.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, PyTree

from jaxlab._checks import check_count, check_number
from jaxlab._norms import wide
from jaxlab.curvature._vectors import space_of
from jaxlab.likelihoods import row_shares

Scalar = Float[Array, ""]


class LossPath(NamedTuple):
    """What :func:`interpolation_barrier` gives.

    Attributes:
      barrier: largest rise of the loss above the straight line between its two ends,
        over the points between; below 0 where the loss is convex.
      positions: from 0 to 1.
      losses: at these.

    Examples:
      >>> path = interpolation_barrier(lambda w: w**2, jnp.array(0.0), jnp.array(1.0))
      >>> path.positions.shape, path.losses[0]
      ((11,), Array(0., dtype=float32))
    """

    barrier: Scalar
    positions: Float[Array, " points"]
    losses: Float[Array, " points"]


def interpolation_barrier(
    loss_fn: Callable[[Any], Any], start: PyTree, end: PyTree, *, points: int = 11
) -> LossPath:
    """Follows the loss along the segment between two solutions.

    Two networks may be one function with their units in another order: see
    :func:`match_units`. BatchNorm needs its statistics measured at each point, which
    ``loss_fn`` then does.

    Args:
      loss_fn: ``params -> scalar``, on data of its own.
      start: floating leaves, the solution at position 0.
      end: a tree like ``start``, at position 1.
      points: at equal distances, both ends among them; at least 3. Each costs one loss.

    Returns:
      See :class:`LossPath`.

    Raises:
      ValueError: if the trees differ, a leaf is not floating, the loss is no scalar or
        ``points`` is out of range.

    Examples:
      >>> double_well = lambda w: (w**2 - 1.0) ** 2
      >>> interpolation_barrier(double_well, jnp.array(-1.0), jnp.array(1.0)).barrier
      Array(1., dtype=float32)
    """
    name = "interpolation_barrier"
    check_count(name, least=3, points=points)
    spaces = [space_of(name, tree, w) for tree, w in ((start, "start"), (end, "end"))]
    (one, two), shapes = spaces, [(space.structure, space.shapes) for space in spaces]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"{name}: start and end must be alike, got {one.structure} of shapes "
            f"{one.shapes} and {two.structure} of shapes {two.shapes}."
        )

    def loss_at(t):
        def between(a, b):
            dtype = jnp.result_type(a)
            a, b = wide(a), wide(b)
            # The ends come out exactly.
            t_ = t.astype(a.dtype)
            return ((1 - t_) * a + t_ * b).astype(dtype)

        loss = jnp.asarray(loss_fn(jax.tree.map(between, start, end)))
        if loss.shape or not jnp.issubdtype(loss.dtype, jnp.floating):
            raise ValueError(
                f"{name}: loss_fn must give one floating scalar, got {loss.dtype} of "
                f"shape {loss.shape}."
            )
        return wide(loss)

    with jax.named_scope(name):
        positions = jnp.linspace(0, 1, points, dtype=one.dtype)
        losses = jax.lax.map(loss_at, positions)
        t = positions.astype(losses.dtype)
        rise = losses - ((1 - t) * losses[0] + t * losses[-1])
        return LossPath(jnp.max(rise[1:-1]), positions, losses)


def prediction_disagreement(
    one: Float[ArrayLike, "*rows classes"],
    two: Float[ArrayLike, "*rows classes"],
    *,
    weights: ArrayLike | None = None,
) -> Scalar:
    """Counts the rows on which two classifiers decide differently.

    Args:
      one: logits of the first.
      two: of the other, on the same rows.
      weights: of the rows, 0 for padding.

    Returns:
      The share of such rows, in [0, 1].

    Raises:
      ValueError: if the two differ in shape or the weights do not fit.

    Examples:
      >>> one, two = jnp.array([[1.0, 0.0], [0.0, 1.0]]), jnp.array([[2.0, 0], [2, 1]])
      >>> prediction_disagreement(one, two)
      Array(0.5, dtype=float32)
    """
    name = "prediction_disagreement"
    one, two = jnp.asarray(one), jnp.asarray(two)
    if one.shape != two.shape or not one.ndim or not one.shape[-1]:
        raise ValueError(
            f"{name}: one and two must have the same shape (..., classes), got "
            f"{one.shape} and {two.shape}."
        )
    with jax.named_scope(name):
        differ = jnp.argmax(one, axis=-1) != jnp.argmax(two, axis=-1)
        shares = row_shares(differ.shape, weights, dtype=jnp.result_type(float))
        return jnp.sum(shares * differ)


def hoyer_sparsity(tree: PyTree) -> Scalar:
    """Measures how few entries carry the norm of a tree, by Hoyer's ratio.

    Args:
      tree: floating leaves, at least two entries in all; a single leaf is an array.

    Returns:
      ``(sqrt n - |w|_1 / |w|_2) / (sqrt n - 1)``: 0 where all entries have one size, 1
      where a single one is not 0, or none.

    Raises:
      ValueError: if there are fewer than two entries or a leaf is not floating.

    Examples:
      >>> hoyer_sparsity({"w": jnp.zeros(3), "b": jnp.array([5.0])})
      Array(1., dtype=float32)
    """
    name = "hoyer_sparsity"
    sizes = _sizes(name, tree)
    root = sizes.size**0.5
    if sizes.size < 2:
        raise ValueError(f"{name}: tree must have at least two entries, got one.")
    with jax.named_scope(name):
        largest = jnp.max(sizes)
        sizes = sizes / jnp.where(largest == 0, 1, largest)
        norm = jnp.linalg.norm(sizes)
        ratio = jnp.sum(sizes) / jnp.where(largest == 0, 1, norm)
        return jnp.where(largest == 0, 1, (root - ratio) / (root - 1))


def near_zero_fraction(tree: PyTree, *, tolerance: ArrayLike = 1e-2) -> Scalar:
    """Counts the entries of a tree that are small beside its largest one.

    Args:
      tree: floating leaves.
      tolerance: a share of the largest absolute value, >= 0; 0 counts exact zeros.

    Returns:
      The share of entries with ``|w| <= tolerance max |w|``, in [0, 1].

    Raises:
      ValueError: if the tree has no entries, a leaf is not floating or the tolerance
        is a negative number.

    Examples:
      >>> near_zero_fraction(jnp.array([0.0, 1e-3, 0.5, -2.0]))
      Array(0.5, dtype=float32)
    """
    name = "near_zero_fraction"
    check_number(name, ">= 0", tolerance=tolerance)
    sizes = _sizes(name, tree)
    with jax.named_scope(name):
        most = jnp.max(sizes) * wide(tolerance).astype(sizes.dtype)
        return jnp.mean((sizes <= most).astype(sizes.dtype))


def _sizes(name, tree):
    return jnp.abs(space_of(name, tree, "tree").flatten(tree))
