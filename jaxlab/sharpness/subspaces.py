"""Neural-network subspaces: a whole line, curve or simplex of networks in one run.

The m endpoints w_1..w_m are full parameter sets, initialised independently and stored
in one tree with a leading axis m. A step draws a point P(a; w) = sum_i a_i w_i with

    line      a = (1 - t, t),                       t ~ U(0, 1)
    curve     a = ((1 - t)^2, t^2, 2 t (1 - t)),    t ~ U(0, 1): two ends and a bend
    simplex   a ~ Dirichlet(1, .., 1)

and descends l(P(a; w)) + beta cos^2(w_j, w_k) for a random pair j != k. The gradient
that reaches endpoint i is a_i dl/dP: a step costs one forward and one backward pass,
and m times the optimizer's state. Afterwards the midpoint is one better network, and a
few points are an ensemble; their BatchNorm statistics must be measured afresh
(``batch_stats``), never interpolated. Weight decay acts on each endpoint: for
orthogonal ends of one norm the midpoint of a line has half their squared norm.
Reference: Wortsman, Horton, Guestrin, Farhadi, Rastegari, "Learning Neural Network
Subspaces", ICML 2021.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Key, PyTree

from jaxlab._checks import check_count, check_number
from jaxlab._norms import wide
from jaxlab.sharpness._checks import check_alike, check_tree
from jaxlab.sharpness._endpoints import (
    combine,
    num_endpoints_of,
    scalar_position,
    spread,
    weighted_point,
)

Scalar = Float[Array, ""]
Mask = PyTree | Callable[[PyTree], PyTree] | None


def line_coefficients(position: ArrayLike) -> Float[Array, "2"]:
    """Gives the coefficients of a point of a line.

    Args:
      position: a scalar; 0 is the start and 1 the end.

    Returns:
      ``(1 - position, position)``, for :func:`simplex_point`.

    Raises:
      ValueError: if ``position`` is no scalar.

    Examples:
      >>> line_coefficients(0.25)
      Array([0.75, 0.25], dtype=float32)
    """
    t = scalar_position("line_coefficients", position)
    return jnp.stack([1 - t, t])


def bezier_coefficients(position: ArrayLike) -> Float[Array, "3"]:
    """Gives the coefficients of a point of a quadratic Bezier curve.

    Args:
      position: a scalar; 0 is the start and 1 the end.

    Returns:
      Those of the start, the end and the bend, for :func:`simplex_point`.

    Raises:
      ValueError: if ``position`` is no scalar.

    Examples:
      >>> bezier_coefficients(0.5)
      Array([0.25, 0.25, 0.5 ], dtype=float32)
    """
    t = scalar_position("bezier_coefficients", position)
    return jnp.stack([(1 - t) ** 2, t**2, 2 * t * (1 - t)])


def line_point(start: PyTree, end: PyTree, position: ArrayLike) -> PyTree:
    """Gives the point ``(1 - t) start + t end`` of a line of networks.

    Args:
      start: tree of floating-point arrays, the point at ``t = 0``.
      end: a tree like ``start``, the point at ``t = 1``.
      position: the scalar t.

    Returns:
      A tree like ``start``, in its dtypes; the ends come out exactly.

    Raises:
      ValueError: if the trees differ, a leaf is not floating or ``position`` is no
        scalar.

    Examples:
      >>> line_point(jnp.zeros(2), jnp.array([4.0, 8.0]), 0.25)
      Array([1., 2.], dtype=float32)
    """
    return _mix("line_point", line_coefficients(position), start, end=end)


def bezier_point(
    start: PyTree, end: PyTree, bend: PyTree, position: ArrayLike
) -> PyTree:
    """Gives a point of a quadratic Bezier curve of networks.

    It is ``(1 - t)^2 start + 2 t (1 - t) bend + t^2 end``, which ``bend`` attracts but
    does not meet.

    Args:
      start: tree of floating-point arrays, the point at ``t = 0``.
      end: a tree like ``start``, the point at ``t = 1``.
      bend: a tree like ``start``, the middle control point.
      position: the scalar t.

    Returns:
      A tree like ``start``, in its dtypes; the ends come out exactly.

    Raises:
      ValueError: if the trees differ, a leaf is not floating or ``position`` is no
        scalar.

    Examples:
      >>> bezier_point(jnp.zeros(1), jnp.array([4.0]), jnp.array([2.0]), 0.5)
      Array([2.], dtype=float32)
    """
    return _mix(
        "bezier_point", bezier_coefficients(position), start, end=end, bend=bend
    )


def simplex_point(endpoints: PyTree, coefficients: PyTree) -> PyTree:
    """Gives the point ``sum_i a_i w_i`` of stacked endpoints.

    Args:
      endpoints: tree of floating-point arrays with a leading axis of m endpoints.
      coefficients: the ``(m,)`` array a, or a tree of such arrays that is a prefix of
        ``endpoints``, one for each leaf or sub-tree (:func:`sample_layerwise`). They
        are taken as they come: nothing makes them sum to 1.

    Returns:
      One tree of parameters, in the dtypes of ``endpoints``, summed in float32 at
      least; a vertex comes out exactly.

    Raises:
      ValueError: if a leaf is not floating or lacks the axis, or ``coefficients`` do
        not fit.

    Examples:
      >>> endpoints = {"w": jnp.array([[0.0, 0.0], [4.0, 8.0]])}
      >>> simplex_point(endpoints, jnp.array([0.5, 0.5]))
      {'w': Array([2., 4.], dtype=float32)}
    """
    name = "simplex_point"
    with jax.named_scope(name):
        return weighted_point(name, endpoints, coefficients)


def midpoint(endpoints: PyTree) -> PyTree:
    """Gives the mean of stacked endpoints.

    It is the middle of a line or a simplex. The middle of a curve is another point:
    ``simplex_point(endpoints, bezier_coefficients(0.5))``.

    Args:
      endpoints: tree of floating-point arrays with a leading axis of m endpoints.

    Returns:
      One tree of parameters, in the dtypes of ``endpoints``.

    Raises:
      ValueError: if a leaf is not floating or lacks the axis.

    Examples:
      >>> midpoint(jnp.array([[0.0, 0.0], [4.0, 8.0]]))
      Array([2., 4.], dtype=float32)
    """
    num_endpoints_of("midpoint", endpoints)
    mean = lambda w: jnp.mean(wide(w), axis=0).astype(jnp.asarray(w).dtype)
    return jax.tree.map(mean, endpoints)


def sample_simplex(key: Key[Array, ""], size: int) -> Float[Array, " size"]:
    """Samples coefficients evenly over the simplex, a Dirichlet(1, .., 1).

    For two endpoints this is a point drawn evenly from the line.

    Args:
      key: of the draw.
      size: number m of endpoints.

    Returns:
      ``(m,)`` positive numbers that sum to 1: m exponentials over their sum.

    Raises:
      ValueError: if ``size`` is no positive integer.

    Examples:
      >>> sample_simplex(jax.random.key(0), 1)
      Array([1.], dtype=float32)
    """
    check_count("sample_simplex", size=size)
    # Minus a Gumbel variable is the logarithm of an exponential one, without its zeros.
    return jax.nn.softmax(-jax.random.gumbel(key, (size,)))


def sample_layerwise(
    key: Key[Array, ""],
    endpoints: PyTree,
    *,
    groups: Callable[[str], str] | None = None,
) -> PyTree:
    """Samples coefficients evenly over the simplex, one draw for each layer.

    The authors' code draws for each convolution and each BatchNorm, as the default
    does where each is a dictionary of its own.

    Args:
      key: of the draws.
      endpoints: tree of floating-point arrays with a leading axis of m endpoints.
      groups: gives the name of a leaf's group from its path, such as
        ``"block/dense/kernel"``; leaves of one name share a draw. By default a group
        is what one dictionary holds, the path without its last key.

    Returns:
      A tree like ``endpoints`` of ``(m,)`` coefficients, for :func:`simplex_point`.

    Raises:
      ValueError: if a leaf is not floating or lacks the axis.

    Examples:
      >>> endpoints = {"dense": {"bias": jnp.ones((3, 2)), "kernel": jnp.ones((3, 2))}}
      >>> a = sample_layerwise(jax.random.key(0), endpoints)["dense"]
      >>> a["bias"].shape, bool(jnp.all(a["bias"] == a["kernel"]))
      ((3,), True)
    """
    size = num_endpoints_of("sample_layerwise", endpoints)
    leaves, tree = jax.tree_util.tree_flatten_with_path(endpoints)
    joined = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
    if groups is None:
        names = [joined(path[:-1]) for path, _ in leaves]
    else:
        names = [groups(joined(path)) for path, _ in leaves]
    order = list(dict.fromkeys(names))
    draws = jax.vmap(lambda k: sample_simplex(k, size))(
        jax.random.split(key, len(order))
    )
    return jax.tree.unflatten(tree, [draws[order.index(name)] for name in names])


def subspace_init(
    key: Key[Array, ""],
    init_fn: Callable[[Key[Array, ""]], PyTree],
    *,
    num_endpoints: int,
) -> PyTree:
    """Initialises stacked endpoints, each with a key of its own.

    Args:
      key: split into one for each endpoint.
      init_fn: gives parameters from a key; it runs under ``jax.vmap``.
      num_endpoints: m: 2 for a line, 3 for a curve (start, end, bend).

    Returns:
      The parameters with a leading axis m.

    Raises:
      ValueError: if ``num_endpoints`` is no positive integer.

    Examples:
      >>> init_fn = lambda key: {"w": jax.random.normal(key, (3,))}
      >>> subspace_init(jax.random.key(0), init_fn, num_endpoints=2)["w"].shape
      (2, 3)
    """
    check_count("subspace_init", num_endpoints=num_endpoints)
    return jax.vmap(init_fn)(jax.random.split(key, num_endpoints))


def cosine_squared(first: PyTree, second: PyTree, *, mask: Mask = None) -> Scalar:
    """Computes the squared cosine of the angle between two parameter trees.

    One inner product runs over all masked leaves together, in float32 at least. It is
    0, with gradient 0, where either side is 0.

    Args:
      first: tree of floating-point arrays.
      second: a tree like ``first``.
      mask: which leaves count: a tree of Python booleans that is a prefix of
        ``first``, or a function that gives one from the tree, as in
        ``optax.masked``. By default those of two axes or more. (The authors' code
        takes its convolutions, so neither biases nor BatchNorm.)

    Returns:
      A scalar in [0, 1] up to rounding.

    Raises:
      ValueError: if the trees differ, or ``mask`` does not fit or selects nothing.

    Examples:
      >>> first, second = jnp.array([[1.0, 1.0]]), jnp.array([[0.0, 3.0]])
      >>> cosine_squared(first, second)
      Array(0.5, dtype=float32)
    """
    name = "cosine_squared"
    check_alike(name, "first", first, second=second)
    chosen = _chosen(name, first, mask, first)
    pairs = zip(jax.tree.leaves(first), jax.tree.leaves(second), chosen)
    with jax.named_scope(name):
        return _cosine_squared([(wide(u), wide(v)) for u, v, c in pairs if c])


def subspace_loss(
    loss_fn: Callable[[PyTree], ArrayLike],
    endpoints: PyTree,
    coefficients: PyTree,
    *,
    beta: ArrayLike = 1.0,
    key: Key[Array, ""] | None = None,
    mask: Mask = None,
) -> Float[Array, ""]:
    """Computes the loss at a point of a subspace, plus what keeps its ends apart.

    It is ``loss_fn(point) + beta * cos^2(w_j, w_k)``, j != k drawn evenly with
    ``key``. On a curve the pair may include the bend, as in the authors' code.

    Args:
      loss_fn: gives the scalar loss of one tree of parameters on this step's batch.
      endpoints: tree of floating-point arrays with a leading axis of m endpoints.
      coefficients: of this step's point, as in :func:`simplex_point`. Draw them afresh
        each step: ``line_coefficients(jax.random.uniform(key))``,
        ``bezier_coefficients(jax.random.uniform(key))``, :func:`sample_simplex` or
        :func:`sample_layerwise`.
      beta: weight of the penalty, not negative; the paper's 1.0. For the Python number
        0 the penalty is not computed.
      key: of the pair; needed for three endpoints or more. Two have one pair, and a
        single one has no penalty.
      mask: as in :func:`cosine_squared`, for one endpoint; a function gets its shapes.

    Returns:
      The scalar to differentiate by ``endpoints``.

    Raises:
      ValueError: as :func:`simplex_point` and :func:`cosine_squared` do, if ``beta`` is
        negative, ``key`` is missing or the loss is no scalar.

    Examples:
      >>> endpoints = jnp.array([[[1.0, 1.0]], [[3.0, 1.0]]])
      >>> a = line_coefficients(0.5)
      >>> float(subspace_loss(jnp.sum, endpoints, a, beta=0.0))
      3.0
      >>> float(subspace_loss(jnp.sum, endpoints, a, beta=10.0))
      11.0
    """
    name = "subspace_loss"
    check_number(name, ">= 0", beta=beta)
    with jax.named_scope(name):
        size = num_endpoints_of(name, endpoints)
        loss = jnp.asarray(loss_fn(weighted_point(name, endpoints, coefficients)))
        if loss.shape:
            raise ValueError(
                f"{name}: loss_fn must give a scalar, got shape {loss.shape}; take the "
                "mean over rows."
            )
        if size == 1 or (isinstance(beta, (int, float)) and beta == 0):
            return loss
        if size > 2 and key is None:
            raise ValueError(
                f"{name}: {size} endpoints need key= to draw the pair of the penalty, "
                "or beta=0 for none."
            )
        one = jax.tree.map(
            lambda w: jax.ShapeDtypeStruct(w.shape[1:], w.dtype), endpoints
        )
        chosen = _chosen(name, one, mask, endpoints)
        kept = [wide(w) for w, c in zip(jax.tree.leaves(endpoints), chosen) if c]
        j, k = (0, 1) if size == 2 else _pair(key, size)
        return loss + beta * _cosine_squared([(w[j], w[k]) for w in kept])


def _mix(name: str, a: Array, start: PyTree, **others: PyTree) -> PyTree:
    check_tree(name, start, "start")
    check_alike(name, "start", start, **others)
    return jax.tree.map(lambda *w: combine(w, a), start, *others.values())


def _pair(key, size):
    """Draws two different numbers below ``size``."""
    first, second = jax.random.split(key)
    j = jax.random.randint(first, (), 0, size)
    return j, (j + jax.random.randint(second, (), 1, size)) % size


def _cosine_squared(pairs: list[tuple[Array, Array]]) -> Scalar:
    """Squares the cosine without squares of squares, which would leave float32."""
    dot = lambda i, j: sum(jnp.sum(p[i] * p[j]) for p in pairs)
    uu, vv, uv = dot(0, 0), dot(1, 1), dot(0, 1)
    ok = (uu > 0) & (vv > 0)
    safe = lambda x: jnp.where(ok, x, 1)
    return jnp.where(ok, (uv / safe(uu)) * (uv / safe(vv)), 0)


def _chosen(name: str, one: PyTree, mask: Mask, full: PyTree) -> list[bool]:
    """Gives a boolean for each leaf of a tree, whose single endpoint is ``one``."""
    if mask is None:
        flags = [jnp.ndim(w) >= 2 for w in jax.tree.leaves(one)]
    else:
        mask = mask(one) if callable(mask) else mask
        flags = spread(name, "mask", mask, full)
    if not all(isinstance(flag, (bool, np.bool_)) for flag in flags):
        raise ValueError(
            f"{name}: mask must be a tree of Python booleans, which choose leaves "
            f"before anything runs, got {flags}."
        )
    if not any(flags):
        raise ValueError(
            f"{name}: the mask selects no leaf"
            + (
                ", since none has two axes; pass mask=True to count them all."
                if mask is None
                else "; at least one must be True."
            )
        )
    return [bool(flag) for flag in flags]
