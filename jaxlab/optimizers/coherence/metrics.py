"""m-coherence, in sums over examples, and the alignment of each with a gradient.

See :mod:`jaxlab.optimizers.coherence` for what they mean.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from jaxlab._array_checks import check_fields
from jaxlab._norms import wide
from jaxlab.curvature._batches import cut
from jaxlab.curvature._vectors import space_of
from jaxlab.optimizers.coherence.examples import (
    Loss,
    as_floating,
    map_rows,
    prepared,
    row_gradient,
    row_weights,
    sum_over,
)

Scalar = Float[Array, ""]


class GradientMoments(NamedTuple):
    """Sums over examples, of :func:`gradient_moments`; those of two batches add.

    Attributes:
      gradient: sum of w g, w the weights of the rows; a tree like params.
      square: for each leaf of params the sum of w ||g||^2.
      own: likewise, the sum of w^2 ||g||^2.
      weight: sum of w, the number of examples where there are no weights.
      weight_square: sum of w^2.

    Examples:
      >>> loss_fn = lambda w, x: jnp.mean(x @ w)
      >>> one = gradient_moments(loss_fn, jnp.ones(2), jnp.eye(2))
      >>> two = jax.tree.map(jnp.add, one, one)
      >>> coherence_from_moments(two).m_coherence
      Array(2., dtype=float32)
    """

    gradient: PyTree
    square: PyTree
    own: PyTree
    weight: Scalar
    weight_square: Scalar


class Coherence(NamedTuple):
    """What :func:`gradient_coherence` gives.

    Attributes:
      alpha: mean inner product of two gradients over their mean squared norm; 0 where
        all gradients are 0.
      m_coherence: ``m alpha`` in examples; with weights ``m = (sum w)^2 / sum w^2``.
      by_leaf: alpha of each leaf by itself, a tree like params.

    Examples:
      >>> gradient_coherence(jnp.eye(3)).m_coherence
      Array(1., dtype=float32)
    """

    alpha: Scalar
    m_coherence: Scalar
    by_leaf: PyTree


class Alignment(NamedTuple):
    """What :func:`gradient_alignment` gives, in the order of the rows.

    Attributes:
      inner: inner product of each gradient with the reference.
      norm: of each gradient.
      cosine: ``inner`` over both norms; 0 where one of them is.

    Examples:
      >>> loss_fn = lambda w, x: jnp.mean(x @ w)
      >>> gradient_alignment(loss_fn, jnp.ones(1), jnp.array([[3.0], [-1.0]])).cosine
      Array([ 1., -1.], dtype=float32)
    """

    inner: Float[Array, " rows"]
    norm: Float[Array, " rows"]
    cosine: Float[Array, " rows"]


def gradient_moments(
    loss_fn: Loss, params: PyTree, batch: PyTree, *, microbatch: int | None = None
) -> GradientMoments:
    """Sums gradients and their squared norms over examples, one pass.

    At most ``microbatch`` gradients are in memory, and one sum. Over a data set, add
    the moments of its batches; over devices, ``psum`` them.

    Args:
      loss_fn: as in :func:`per_example_gradients`.
      params: floating leaves.
      batch: a tree of rows. The third entry of a tuple holds weights of the rows, 0 for
        padding, whose rows may hold anything.
      microbatch: rows that are differentiated at once; ``None`` takes all.

    Returns:
      The sums, float32 at least. ``gradient / weight`` is the gradient of the batch.

    Raises:
      ValueError: as :func:`per_example_gradients` does, or if the weights are integers.

    Examples:
      >>> loss_fn = lambda w, x: 0.5 * jnp.mean((x - w) ** 2)
      >>> moments = gradient_moments(loss_fn, jnp.array(1.0), jnp.array([1.0, 3.0]))
      >>> moments.gradient, moments.square
      (Array(-2., dtype=float32), Array(4., dtype=float32))
    """
    name = "gradient_moments"
    params, batch, rows = prepared(name, loss_fn, params, batch, microbatch)
    weights = row_weights(name, batch, rows)
    one = row_gradient(loss_fn, params)
    with jax.named_scope(name):
        return sum_over(
            lambda part: _moments(jax.vmap(one)(part[0]), part[1]),
            cut(name, (batch, weights), microbatch),
        )


def coherence_from_moments(
    moments: GradientMoments, *, unbiased: bool = False
) -> Coherence:
    """Turns sums over examples into their coherence.

    Args:
      moments: of one batch, or the sum of those of several. For a part of the network
        take the same part of ``gradient``, ``square`` and ``own``.
      unbiased: estimates alpha of the distribution that the examples are drawn from; 0
        for a single example.

    Returns:
      See :class:`Coherence`.

    Examples:
      >>> loss_fn = lambda w, x: jnp.mean(x @ w)
      >>> moments = gradient_moments(loss_fn, jnp.ones(2), jnp.eye(2))
      >>> coherence_from_moments(moments).alpha
      Array(0.5, dtype=float32)
      >>> coherence_from_moments(moments, unbiased=True).alpha
      Array(0., dtype=float32)
    """
    moments = check_fields(
        "coherence_from_moments",
        "moments",
        moments,
        GradientMoments,
        "gradient_moments",
        weight="",
        weight_square="",
    )
    shapes = {
        jnp.shape(leaf) for leaf in jax.tree.leaves((moments.square, moments.own))
    }
    if shapes - {()}:
        raise ValueError(
            "coherence_from_moments: square and own must be trees of scalars, got "
            f"shapes {sorted(shapes)}; gradient_moments makes them."
        )
    moments = jax.tree.map(jnp.asarray, moments)
    weight = moments.weight
    pairs = weight**2 - (moments.weight_square if unbiased else 0)

    def inner(total, own):
        square = jnp.sum(jnp.square(total))
        return _ratio(square - own if unbiased else square, pairs)

    with jax.named_scope("gradient_coherence"):
        inners = jax.tree.map(inner, moments.gradient, moments.own)
        squares = jax.tree.map(lambda square: _ratio(square, weight), moments.square)
        alpha = _ratio(optax.tree.sum(inners), optax.tree.sum(squares))
        count = _ratio(weight**2, moments.weight_square)
        return Coherence(alpha, count * alpha, jax.tree.map(_ratio, inners, squares))


def gradient_coherence(gradients: PyTree, *, unbiased: bool = False) -> Coherence:
    """Measures how far given gradients agree.

    Args:
      gradients: a tree whose leaves share their leading axis, one entry for each
        example, as :func:`per_example_gradients` gives it; or each worker, or step.
        In bounded memory: :func:`gradient_moments`.
      unbiased: as in :func:`coherence_from_moments`.

    Returns:
      See :class:`Coherence`.

    Raises:
      ValueError: if leaves are not floating or do not share their leading axis.

    Examples:
      >>> gradient_coherence({"w": jnp.ones((5, 2))})
      Coherence(alpha=Array(1., dtype=float32), m_coherence=Array(5., dtype=float32), \
by_leaf={'w': Array(1., dtype=float32)})
    """
    space_of("gradient_coherence", gradients, "gradients")
    gradients = as_floating(gradients)
    counts = sorted({leaf.shape[:1] for leaf in jax.tree.leaves(gradients)})
    if len(counts) != 1 or counts[0] in ((), (0,)):
        raise ValueError(
            "gradient_coherence: every leaf of gradients needs one entry per example "
            f"along its leading axis; got leading axes {counts}."
        )
    ((rows,),) = counts
    moments = _moments(gradients, jnp.ones(rows))
    return coherence_from_moments(moments, unbiased=unbiased)


def gradient_alignment(
    loss_fn: Loss,
    params: PyTree,
    batch: PyTree,
    *,
    reference: PyTree = None,
    microbatch: int | None = None,
) -> Alignment:
    """Compares the gradient of every example with one gradient.

    With the mean as reference the mean of ``inner`` over that of ``norm**2`` is alpha.
    Examples of low or negative cosine are those that the others do not help: hard,
    rare, mislabelled. It costs two passes over the examples, one with ``reference``.

    Args:
      loss_fn: as in :func:`per_example_gradients`.
      params: floating leaves.
      batch: a tree of rows, weights as in :func:`gradient_moments`.
      reference: a tree like ``params``, such as the gradient on held-out data; ``None``
        takes the mean over the batch.
      microbatch: gradients in memory at once; ``None`` takes all.

    Returns:
      See :class:`Alignment`; float32 at least, 0 for rows of weight 0.

    Raises:
      ValueError: as :func:`gradient_moments` does, or if ``reference`` is another tree.

    Examples:
      >>> loss_fn = lambda w, x: jnp.mean(x @ w)
      >>> x = jnp.array([[4.0, 0.0], [0.0, 0.0], [0.0, 4.0]])
      >>> gradient_alignment(loss_fn, jnp.ones(2), x, reference=jnp.array([3.0, 4.0]))
      Alignment(inner=Array([12.,  0., 16.], dtype=float32), \
norm=Array([4., 0., 4.], dtype=float32), \
cosine=Array([0.6, 0. , 0.8], dtype=float32))
    """
    name = "gradient_alignment"
    params, batch, rows = prepared(name, loss_fn, params, batch, microbatch)
    weights = row_weights(name, batch, rows)
    if reference is None:
        moments = gradient_moments(loss_fn, params, batch, microbatch=microbatch)
        reference = jax.tree.map(lambda s: _ratio(s, moments.weight), moments.gradient)
    reference = jax.tree.map(wide, as_floating(reference))
    described = lambda t: (jax.tree.structure(t), [x.shape for x in jax.tree.leaves(t)])
    if described(reference) != described(params):
        raise ValueError(
            f"{name}: reference must be a tree like params, structure and shapes "
            f"{described(params)}, got {described(reference)}."
        )
    gradient = row_gradient(loss_fn, params)

    def one(row):
        found = jax.tree.map(wide, gradient(row))
        products = jax.tree.map(lambda g, r: jnp.sum(g * r), found, reference)
        return optax.tree.sum(products), optax.tree.norm(found)

    with jax.named_scope(name):
        found = map_rows(one, batch, rows, microbatch)
        inner, norm = (jnp.where(weights == 0, 0, values) for values in found)
        cosine = _ratio(_ratio(inner, norm), optax.tree.norm(reference))
        return Alignment(inner, norm, cosine)


def _moments(gradients: PyTree, weights: Float[Array, " rows"]) -> GradientMoments:
    """Sums stacked gradients; rows of weight 0 may hold anything."""

    def sums(stack):
        along = weights.reshape(-1, *(1,) * (stack.ndim - 1)).astype(wide(stack).dtype)
        stack = jnp.where(along == 0, 0, wide(stack))
        square = jnp.sum(jnp.square(stack).reshape(len(stack), -1), axis=1)
        flat = along.reshape(-1)
        return (
            jnp.sum(along * stack, 0),
            jnp.sum(flat * square),
            jnp.sum(flat**2 * square),
        )

    leaves, structure = jax.tree.flatten(gradients)
    gradient, square, own = zip(*map(sums, leaves), strict=True)
    build = lambda found: jax.tree.unflatten(structure, found)
    return GradientMoments(
        build(gradient),
        build(square),
        build(own),
        jnp.sum(weights),
        jnp.sum(jnp.square(weights)),
    )


def _ratio(top, bottom):
    """Divides; 0 where the bottom is 0."""
    return jnp.where(bottom == 0, 0, top / jnp.where(bottom == 0, 1, bottom))
