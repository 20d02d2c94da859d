"""Measures of features, the outputs of a layer on probe rows.

See :mod:`jaxlab.optimizers.solutions` for the formulas. Features are matrices with one
row per example: flatten what has further axes. Each measure costs at most one singular
value decomposition per matrix, in float32 at least.
"""

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from jaxlab._checks import check_count, is_whole
from jaxlab._norms import wide
from jaxlab.curvature._options import exact_products

Scalar = Float[Array, ""]


def effective_rank(
    features: Float[ArrayLike, "n d"], *, center: bool = False
) -> Scalar:
    """Measures the rank of a matrix by the entropy of its singular values.

    Args:
      features: a matrix, such as features or a kernel.
      center: whether to take the mean of each column out first.

    Returns:
      ``exp(-sum p ln p)`` of the singular values' shares p; from 1 to the rank, 0 for a
      matrix of zeros.

    Raises:
      ValueError: if it is no matrix with entries, or not floating.

    Examples:
      >>> jnp.round(effective_rank(jnp.eye(4)), 4)
      Array(4., dtype=float32)
    """
    name = "effective_rank"
    with jax.named_scope(name):
        s = _spectrum(name, features, center)
        p = s / _not_zero(jnp.sum(s))
        entropy = -jnp.sum(p * jnp.log(jnp.where(p == 0, 1, p)))
        return jnp.where(s[0] == 0, 0, jnp.exp(entropy))


def stable_rank(features: Float[ArrayLike, "n d"], *, center: bool = False) -> Scalar:
    """Measures the rank of a matrix by its squared norms, Frobenius over spectral.

    Args:
      features: as in :func:`effective_rank`.
      center: likewise.

    Returns:
      From 1 to the rank, 0 for a matrix of zeros.

    Raises:
      ValueError: as :func:`effective_rank` does.

    Examples:
      >>> stable_rank(jnp.diag(jnp.array([2.0, 1.0])))
      Array(1.25, dtype=float32)
    """
    name = "stable_rank"
    with jax.named_scope(name):
        return jnp.sum(_spectrum(name, features, center) ** 2)


def participation_ratio(
    features: Float[ArrayLike, "n d"], *, center: bool = True
) -> Scalar:
    """Counts the directions that share the variance of features.

    Args:
      features: as in :func:`effective_rank`.
      center: whether to take the means out, as a covariance does.

    Returns:
      ``(sum l)^2 / sum l^2`` of the covariance's eigenvalues l; from 1 to the rank, 0
      where nothing varies.

    Raises:
      ValueError: as :func:`effective_rank` does.

    Examples:
      >>> participation_ratio(jnp.array([[1.0, 1], [1, -1], [-1, 1], [-1, -1]]))
      Array(2., dtype=float32)
    """
    name = "participation_ratio"
    with jax.named_scope(name):
        l = _spectrum(name, features, center) ** 2
        return jnp.sum(l) ** 2 / _not_zero(jnp.sum(l**2))


def linear_cka(one: Float[ArrayLike, "n d"], two: Float[ArrayLike, "n e"]) -> Scalar:
    """Compares the features of two networks on the same rows.

    Args:
      one: of the first network, or the first layer.
      two: of the other, in any number of units.

    Returns:
      The centred kernel alignment in [0, 1], which rotations, scales and shifts of
      either leave alone; 0 where one of them does not vary.

    Raises:
      ValueError: if they are not two floating matrices of equally many rows.

    Examples:
      >>> x = jnp.array([[1.0, 0.0], [0.0, 2.0], [3.0, 1.0]])
      >>> jnp.round(linear_cka(x, 5.0 * x[:, ::-1] + 1.0), 4)
      Array(1., dtype=float32)
    """
    name = "linear_cka"
    one, two = (_matrix(name, x, w) for x, w in ((one, "one"), (two, "two")))
    _check_same(name, "rows", one.shape[0], two.shape[0])
    with jax.named_scope(name), exact_products():
        one, two = (_scaled(_centred(x)) for x in (one, two))
        square = lambda x: jnp.sum(x**2)
        if one.shape[0] < max(one.shape[1], two.shape[1]):
            a, b = one @ one.T, two @ two.T  # rows by rows
            return jnp.sum(a * b) / _not_zero(jnp.sqrt(square(a) * square(b)))
        own = jnp.sqrt(square(one.T @ one) * square(two.T @ two))
        return square(one.T @ two) / _not_zero(own)


def feature_overlap(
    one: Float[ArrayLike, "n d"],
    two: Float[ArrayLike, "m d"],
    *,
    k: int,
    center: bool = False,
) -> Scalar:
    """Compares the leading directions of two sets of features.

    Args:
      one: features of a network, on the rows of one task for example.
      two: of the same layer of that network on those of another task.
      k: directions of each, at most the smaller number of rows and units. Those beyond
        the rank are arbitrary.
      center: whether to take the means out first.

    Returns:
      ``|V_1^T V_2|^2 / k`` of the top k right singular vectors: 1 for one subspace, 0
      for orthogonal ones, about k / d for random ones. For bases of your own see
      :func:`jaxlab.curvature.subspace_overlap`.

    Raises:
      ValueError: if they are not two floating matrices of equally many columns, or k
        is out of range.

    Examples:
      >>> x = jnp.diag(jnp.array([3.0, 2.0, 1.0]))
      >>> jnp.round(feature_overlap(x, x[::-1, ::-1], k=2), 4)
      Array(0.5, dtype=float32)
    """
    name = "feature_overlap"
    one, two = (_matrix(name, x, w) for x, w in ((one, "one"), (two, "two")))
    _check_same(name, "columns", one.shape[1], two.shape[1])
    most = min(*one.shape, *two.shape)
    if not is_whole(k) or not 0 < k <= most:
        raise ValueError(
            f"{name}: k must be an integer from 1 to {most}, the smallest number of "
            f"rows or columns, got {k!r}."
        )

    def leading(x):
        x = _scaled(_centred(x) if center else x)
        return jnp.linalg.svd(x, full_matrices=False)[2][:k]

    with jax.named_scope(name), exact_products():
        return jnp.sum((leading(one) @ leading(two).T) ** 2) / k


def class_similarity(
    features: Float[ArrayLike, "n d"], labels: Int[ArrayLike, " n"], *, num_classes: int
) -> Scalar:
    """Measures how alike the mean features of two classes are.

    Args:
      features: as in :func:`effective_rank`. Their overall mean stays in: take it out
        first if only differences shall count.
      labels: the class of each row, in [0, num_classes).
      num_classes: at least 2.

    Returns:
      The mean cosine over pairs of distinct classes, in [-1, 1]. Classes without a row
      do not count; NaN where fewer than two have one.

    Raises:
      ValueError: if the shapes do not fit, the labels are no integers or there are
        fewer than two classes.

    Examples:
      >>> x = jnp.array([[1.0, 0.0], [3.0, 0.0], [0.0, 5.0]])
      >>> class_similarity(x, jnp.array([0, 0, 1]), num_classes=2)
      Array(0., dtype=float32)
    """
    name = "class_similarity"
    x, labels = _matrix(name, features, "features"), jnp.asarray(labels)
    check_count(name, least=2, num_classes=num_classes)
    integers = jnp.issubdtype(labels.dtype, jnp.integer)
    if labels.shape != x.shape[:1] or not integers:
        raise ValueError(
            f"{name}: labels must be integers of shape {x.shape[:1]}, one for each "
            f"row, got {labels.dtype} of shape {labels.shape}."
        )
    with jax.named_scope(name), exact_products():
        sums = jax.ops.segment_sum(_scaled(x), labels, num_segments=num_classes)
        counts = jnp.zeros(num_classes, x.dtype).at[labels].add(1, mode="drop")
        # A cosine is that of the sums: the counts cancel.
        norms = jnp.linalg.norm(sums, axis=1, keepdims=True)
        units = sums / _not_zero(norms)
        there = counts > 0
        pairs = there[:, None] & there[None, :] & ~jnp.eye(num_classes, dtype=bool)
        return jnp.sum(jnp.where(pairs, units @ units.T, 0)) / jnp.sum(pairs)


def dead_fraction(features: Float[ArrayLike, "n d"]) -> Scalar:
    """Counts the units that are positive on no row, such as dead ReLUs.

    Args:
      features: behind the activation, or before a ReLU.

    Returns:
      Their share of the units, in [0, 1].

    Raises:
      ValueError: as :func:`effective_rank` does.

    Examples:
      >>> dead_fraction(jnp.array([[0.0, 1.0], [0.0, 0.0]]))
      Array(0.5, dtype=float32)
    """
    x = _matrix("dead_fraction", features, "features")
    return jnp.mean(jnp.all(x <= 0, axis=0).astype(x.dtype))


def match_units(
    one: Float[ArrayLike, "n d"], two: Float[ArrayLike, "n d"]
) -> Int[Array, " d"]:
    """Finds which unit of one network does what a unit of the other does.

    Networks whose hidden units are permuted are the same function. Before the loss
    between two solutions is looked at, give the units of the second the order of the
    first: ``w_in[:, found]``, ``bias[found]`` and ``w_out[found]``.

    Args:
      one: a hidden layer of the first network, one row per example.
      two: of the second, on the same rows, of equally many units.

    Returns:
      A permutation: ``two[:, found]`` resembles ``one``. It has the largest sum of
      correlations, by the Hungarian algorithm, O(d^3) steps.

    Raises:
      ValueError: if the two are not floating matrices of one shape.

    Examples:
      >>> x = jnp.array([[1.0, 0.0, 3.0], [0.0, 2.0, 1.0], [5.0, 1.0, 0.0]])
      >>> match_units(x, x[:, jnp.array([2, 0, 1])])
      Array([1, 2, 0], dtype=int32)
    """
    name = "match_units"
    one, two = (_matrix(name, x, w) for x, w in ((one, "one"), (two, "two")))
    _check_same(name, "rows", one.shape[0], two.shape[0])
    _check_same(name, "columns", one.shape[1], two.shape[1])

    def standard(x):
        x = _scaled(_centred(x))
        return x / _not_zero(jnp.linalg.norm(x, axis=0, keepdims=True))

    with jax.named_scope(name), exact_products():
        rows, columns = optax.assignment.hungarian_algorithm(
            -(standard(one).T @ standard(two))
        )
        return jnp.zeros_like(columns).at[rows].set(columns)


def _spectrum(name, features, center):
    """Gives the singular values over the largest one, which leaves no overflow."""
    x = _matrix(name, features, "features")
    s = jnp.linalg.svd(_scaled(_centred(x) if center else x), compute_uv=False)
    return s / _not_zero(s[0])


def _matrix(name, x, argument):
    x = jnp.asarray(x)
    if x.ndim != 2 or not x.size or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
            f"{name}: {argument} must be a floating matrix with one row per example "
            f"and at least one entry, got {x.dtype} of shape {x.shape}."
        )
    return wide(x)


def _check_same(name, what, one, two):
    if one != two:
        raise ValueError(
            f"{name}: one and two must have equally many {what}, got {one} and {two}."
        )


def _centred(x):
    # The mean of scaled numbers: that of large ones may overflow.
    largest = _not_zero(jnp.max(jnp.abs(x)))
    return x - jnp.mean(x / largest, axis=0, keepdims=True) * largest


def _scaled(x):
    return x / _not_zero(jnp.max(jnp.abs(x)))


def _not_zero(x):
    return jnp.where(x == 0, 1, x)
