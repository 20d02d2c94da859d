"""Extremal eigenpairs in bounded memory, outliers, and overlaps of eigenspaces.

Thick-restart Lanczos grows an orthonormal basis by one product a step, takes the Ritz
pairs of the operator in it, and where the basis is full keeps the best of them and goes
on; see Wu and Simon, "Thick-Restart Lanczos Method for Large Symmetric Eigenvalue
Problems", SIAM Journal on Matrix Analysis and Applications 2000.

Outliers are the few eigenvalues above the bulk that the loss of a classifier has, about
one less than there are classes: Sagun et al., "Empirical Analysis of the Hessian of
Over-Parametrized Neural Networks", 2017.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from jaxlab._checks import check_count, check_number
from jaxlab.curvature._convolutions import driven
from jaxlab.curvature._options import (
    MEMORY_LIMIT,
    Driver,
    as_pytree,
    check_asymmetry,
    exact_products,
    under_trace,
)
from jaxlab.curvature._recurrence import linearized
from jaxlab.curvature._subspaces import blocks_of, count_of, products
from jaxlab.curvature._thick_restart import Plan, Which, run_compiled, run_host
from jaxlab.curvature._vectors import (
    Operator,
    Space,
    is_host,
    laid_out,
    on_vectors,
    prepared,
    space_of,
)
from jaxlab.curvature.density import Density, checked_density

_NAME = "top_eigenpairs"
_SPARE = 24  # rows of the default basis beyond the k wanted ones
_ROOM = 2  # rows that a restart must leave free
_PER_PAIR = 100  # products allowed for each pair
_APART = 4.0  # sigmas between nodes of separate groups
_RELATIVE = 0.01  # residual over value of a Ritz value that counts


class Eigenpairs(NamedTuple):
    """Holds what :func:`top_eigenpairs` found; a pytree of arrays.

    Attributes:
      values: shape (k,), in float32 at least.
      vectors: a tree like ``like`` whose leaves have a leading axis k and float32 at
        least; orthonormal.
      residuals: norms of ``A x - theta x``, shape (k,). An eigenvalue lies that near.
      num_products: int32 scalar, the products with the operator that were spent.

    Examples:
      >>> one = jnp.ones(1)
      >>> values, vectors, residuals, _ = Eigenpairs(one, one[None], 0 * one, 1)
      >>> values
      Array([1.], dtype=float32)
    """

    values: Float[Array, " k"]
    vectors: PyTree
    residuals: Float[Array, " k"]
    num_products: Int[Array, ""]


def top_eigenpairs(
    key: Key[Array, ""],
    operator: Operator,
    like: PyTree,
    *,
    k: int,
    tol: ArrayLike = 1e-3,
    which: Which = "largest",
    start: PyTree | None = None,
    max_products: ArrayLike | None = None,
    basis_size: int | None = None,
    memory_limit: float | None = None,
    check_symmetric: bool = True,
    driver: Driver = "auto",
) -> Eigenpairs:
    """Finds the k eigenpairs at one end of the spectrum, or at both.

    It stops when every residual is at most ``tol`` times the largest ``|theta|`` seen,
    or when ``max_products`` are spent: it never raises for that, the residuals tell.
    They follow from the products already made, at no extra cost, and equal the measured
    norms of ``A x - theta x`` up to the round-off of a product, below which none is
    reported (half an epsilon of the coarsest dtype in ``like``, times ``|A|``).

    It holds ``basis_size`` vectors, k more for the result and about 4 others, in
    float32 at least, besides what the operator needs. Matrix products are exact to the
    dtype, unless ``jax_default_matmul_precision`` is set.

    Each value is that near to an eigenvalue, yet among the last ones of the k an
    eigenvalue may be left out whose vector the random start hardly holds. Ask for a few
    pairs more than you need where that matters.

    Where an invariant subspace ends the recurrence, it goes on with a random vector
    orthogonal to it, so that multiple eigenvalues come with their multiplicity. Without
    such an end a copy comes in through round-off only, some ten products after the
    first one; if all k pairs converge before that, it is missed.

    Args:
      key: of the random vectors.
      operator: symmetric, as in :func:`lanczos`.
      like: tree with the shapes and dtypes that the operator acts on, p entries in all.
      k: pairs, from 1 to p.
      tol: largest residual over largest ``|theta|``, positive. Values are far better
        than vectors: their error is about residual^2 / gap.
      which: "largest" gives the k largest values, descending; "smallest" the k smallest
        (the most negative ones first), ascending; "both" the ceil(k/2) largest and the
        floor(k/2) smallest, all descending.
      start: earlier vectors, as returned before (a tree with a leading axis on each
        leaf, or a matrix), any number. Rayleigh-Ritz on them comes first, which costs a
        product each and two more: that is all if the operator has hardly changed. If
        the residuals then exceed 40 tolerances, it starts from their sum. A vector
        that has overtaken those given is seen only as far as they contain it: ask for
        a few pairs more than you need, and start without them now and then.
      max_products: k at least; ``None`` allows 100 k. It may be traced.
      basis_size: vectors kept, k + 3 at least (with k' start vectors max(k, k') + k' +
        2) unless it is p. ``None`` takes max(2 k, k + 24), k' and more with k' start
        vectors, or as many as the memory limit allows.
      memory_limit: bytes of the basis; ``None`` means 1 GiB.
      check_symmetric: as in :func:`lanczos`.
      driver: as in :func:`lanczos`.

    Returns:
      :class:`Eigenpairs`: values, vectors, residuals and the number of products.

    Raises:
      ValueError: for an option out of range, start vectors of another space or not
        finite, a basis above the limit, or as :func:`lanczos` does.

    Examples:
      >>> matrix = jnp.diag(jnp.array([1.0, 1.0, 6.0, 6.0]))
      >>> operator = jax.tree_util.Partial(jnp.matmul, matrix)
      >>> found = top_eigenpairs(jax.random.key(0), operator, jnp.ones(4), k=3)
      >>> found.values.round(4)
      Array([6., 6., 1.], dtype=float32)
    """
    space = space_of(_NAME, like)
    _check_options(space, k, tol, which, max_products)
    given = None if start is None else _given(start, space)
    rows = _rows(space, k, given, basis_size, memory_limit)
    starts = 0 if given is None else count_of(given)
    plan = Plan(k=k, which=which, rows=rows, starts=starts, space=space)
    operator = as_pytree(operator)
    traced = under_trace(key, operator, like, given, tol, max_products)
    operator, chosen = driven(_NAME, operator, space, driver, traced=traced)
    plan = dataclasses.replace(plan, space=laid_out(space, like))
    if given is not None and not traced:
        _check_finite(given)
    budget = _PER_PAIR * k if max_products is None else max_products
    arguments = key, given, jnp.asarray(tol, space.dtype), jnp.asarray(budget)
    with jax.named_scope(_NAME), exact_products():
        if chosen == "compiled":
            found, checks = _compiled(operator, arguments, plan=plan)
        else:
            operator = operator if is_host(operator) else linearized(operator)
            result, state = run_host(_NAME, operator, arguments, plan)
            found, checks = _found_jit(result, state, plan)
    if check_symmetric and not traced:
        check_asymmetry(_NAME, *checks, space)
    return found


def bulk_edges(density: Density) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Finds where the bulk of a smoothed spectrum begins and ends.

    Nodes of the quadrature more than 4 sigma apart are separate groups (their Gaussians
    meet at a seventh of their height at most); the bulk is the heaviest group, widened
    by sigma on each side. A density on a logarithmic scale knows no signs, and its bulk
    is an interval symmetric about zero.

    Args:
      density: of :func:`spectral_density`.

    Returns:
      Lower and upper edge, as eigenvalues.

    Examples:
      >>> nodes = jnp.array([[-1.0, 0.0, 2.0, 30.0]])
      >>> x, weights = jnp.zeros(1), jnp.full((1, 4), 0.25)
      >>> bulk_edges(Density(x, x, nodes, weights, jnp.array(1.0), x))
      (Array(-2., dtype=float32), Array(3., dtype=float32))
    """
    density = checked_density("bulk_edges", density)
    nodes, weights = jnp.ravel(density.nodes), jnp.ravel(density.weights)
    log = density.scale == "log"
    if log:
        # The default grid begins 5 sigma below the floor; zeros stand at its beginning.
        nodes = jnp.maximum(jnp.log10(jnp.abs(nodes)), density.grid[0])
    order = jnp.argsort(nodes)
    nodes, weights = nodes[order], weights[order]
    apart = jnp.diff(nodes) > _APART * density.sigma
    group = jnp.concatenate([jnp.zeros(1, int), jnp.cumsum(apart)])
    mass = jax.ops.segment_sum(weights, group, num_segments=nodes.size)
    inside = group == jnp.argmax(mass)
    low = jnp.min(jnp.where(inside, nodes, jnp.inf)) - density.sigma
    high = jnp.max(jnp.where(inside, nodes, -jnp.inf)) + density.sigma
    return (-(10**high), 10**high) if log else (low, high)


def split_outliers(
    values: Float[ArrayLike, " k"],
    residuals: Float[ArrayLike, " k"],
    density: Density,
    *,
    factor: ArrayLike = 2.0,
) -> Bool[Array, " k"]:
    """Tells which eigenvalues are outliers: converged, and well outside the bulk.

    A value is one if its residual is below 1 % of its size and it lies above ``factor``
    times the upper edge of the bulk, or below ``factor`` times the lower one; an edge
    on the far side of zero counts as zero. The rule is for a bulk around zero.

    Args:
      values: of :func:`top_eigenpairs`, say, shape (k,).
      residuals: theirs, shape (k,).
      density: of the same operator; :func:`bulk_edges` reads the bulk off it.
      factor: 1 at least.

    Returns:
      A mask of shape (k,).

    Raises:
      ValueError: if the shapes differ or ``factor`` is below 1.

    Examples:
      >>> nodes = jnp.array([[-1.0, 0.0, 2.0, 30.0]])
      >>> x, weights = jnp.zeros(1), jnp.full((1, 4), 0.25)
      >>> density = Density(x, x, nodes, weights, jnp.array(1.0), x)
      >>> values, residuals = jnp.array([30.0, 20.0, 5.0]), jnp.array([0.1, 1.0, 0.0])
      >>> split_outliers(values, residuals, density)
      Array([ True, False, False], dtype=bool)
    """
    name = "split_outliers"
    values, residuals = jnp.asarray(values), jnp.asarray(residuals)
    if values.ndim != 1 or values.shape != residuals.shape:
        raise ValueError(
            f"{name}: values and residuals must be vectors of one length, got shapes "
            f"{values.shape} and {residuals.shape}."
        )
    check_number(name, "finite and >= 1", factor=factor)
    low, high = bulk_edges(density)
    above = values > factor * jnp.maximum(high, 0)
    below = values < factor * jnp.minimum(low, 0)
    return (residuals < _RELATIVE * jnp.abs(values)) & (above | below)


def subspace_overlap(a: PyTree, b: PyTree) -> Float[Array, ""]:
    """Computes ``|U^T V|^2 / k`` of two sets of k orthonormal vectors.

    It is 1 for equal subspaces, 0 for orthogonal ones and about k/p for random ones.
    :func:`subspace_overlap_curve` gives it for the leading 1, 2, ... vectors.

    Args:
      a: vectors as a matrix (k, p), or as a tree with a leading axis on each leaf.
      b: k others of the same space. That rows are orthonormal is not checked.

    Returns:
      A scalar in [0, 1].

    Raises:
      ValueError: if the sets are of different spaces or sizes.

    Examples:
      >>> subspace_overlap(jnp.eye(4)[:2], jnp.eye(4)[1:3])
      Array(0.5, dtype=float32)
    """
    name = "subspace_overlap"
    one, other = (_stacked(name, tree, which) for tree, which in ((a, "a"), (b, "b")))
    (k, p), (l, q) = ((count_of(x), sum(y.shape[1] for y in x)) for x in (one, other))
    if (k, p) != (l, q):
        raise ValueError(
            f"{name}: a and b must hold equally many vectors of one space, got {k} "
            f"with {p} entries and {l} with {q}; cut the larger set, or see "
            "subspace_overlap_curve."
        )
    with jax.named_scope(name):
        return jnp.minimum(jnp.sum(products(one, other) ** 2) / k, 1)


def _stacked(name: str, vectors: PyTree, argument: str):
    row = lambda x: jax.ShapeDtypeStruct(jnp.shape(x)[1:], jnp.result_type(x))
    space = space_of(name, jax.tree.map(row, vectors), argument)
    return blocks_of(f"{name}: {argument}", vectors, space)


def _given(start: PyTree, space: Space):
    """Reads the start vectors."""
    given = blocks_of(f"{_NAME}: start", start, space)
    if count_of(given) > space.size:
        raise ValueError(
            f"{_NAME}: start must hold at most as many vectors as they have entries, "
            f"{space.size}, got {count_of(given)}."
        )
    return given


def _check_finite(given) -> None:
    if not all(bool(jnp.all(jnp.isfinite(block))) for block in given):
        raise ValueError(
            f"{_NAME}: start must be finite, got NaN or infinity in it; pass start="
            "None to begin afresh."
        )


def _check_options(space: Space, k: int, tol, which, max_products) -> None:
    check_count(_NAME, k=k)
    if k > space.size:
        raise ValueError(
            f"{_NAME}: k must be at most the dimension, {space.size}, got {k}."
        )
    check_number(_NAME, "finite and > 0", optional=True, tol=tol)
    if which not in ("largest", "smallest", "both"):
        raise ValueError(
            f'{_NAME}: which must be "largest", "smallest" or "both", got {which!r}.'
        )
    number = isinstance(max_products, (int, float))
    if number and (max_products != int(max_products) or max_products < k):
        raise ValueError(
            f"{_NAME}: max_products must be an integer, k = {k} at least, got "
            f"{max_products}."
        )


def _rows(space: Space, k: int, given, basis_size, memory_limit) -> int:
    """Decides how many vectors the basis holds."""
    starts = 1 if given is None else count_of(given)
    # After the start vectors there are as many that wait.
    least = min(space.size, max(k, starts) + starts + _ROOM)
    wanted = max(2 * k, k + _SPARE) + (starts if given is not None else 0)
    if basis_size is not None:
        check_count(_NAME, basis_size=basis_size)
        if basis_size < least:
            raise ValueError(
                f"{_NAME}: basis_size must be at least {least} for k = {k}"
                f"{'' if given is None else f' and {starts} start vectors'}, got "
                f"{basis_size}."
            )
        least = wanted = min(basis_size, space.size)
    wanted = max(least, min(wanted, space.size))
    limit = MEMORY_LIMIT if memory_limit is None else memory_limit
    row = space.size * jnp.dtype(space.dtype).itemsize
    if least * row > limit:
        raise ValueError(
            f"{_NAME}: the basis takes {least * row:,} bytes ({least} x {space.size} x "
            f"{jnp.dtype(space.dtype).itemsize} bytes), more than memory_limit="
            f"{math.floor(limit):,}. Raise memory_limit, or lower k"
            f"{'' if basis_size is None else ' and basis_size'}; or run lanczos with "
            'reorthogonalize="none" and ritz_vectors, which keep no basis.'
        )
    return min(wanted, max(least, int(limit // row)))


@functools.partial(jax.jit, static_argnames="plan")
def _compiled(operator: Operator, arguments: Any, *, plan: Plan):
    product = on_vectors(_NAME, prepared(operator), plan.space)
    state = run_compiled(product, plan.begin(*arguments), plan)
    return _found(plan.result(state), state, plan)


def _found(result, state, plan: Plan):
    values, rows, residuals = result
    tree = jax.vmap(plan.space.wide.unflatten)(rows)
    found = Eigenpairs(values, tree, residuals, state.num_products)
    return found, (state.asymmetry, state.scale)


_found_jit = jax.jit(_found, static_argnames="plan")
