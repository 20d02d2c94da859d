"""Lanczos: a small tridiagonal matrix that stands for a large symmetric one.

From q_1 = v/|v| the recurrence makes orthonormal vectors with A Q^T = Q^T T + ...,

    beta_j q_{j+1} = A q_j - alpha_j q_j - beta_{j-1} q_{j-1},   alpha_j = q_j . A q_j,

where the q_j are the rows of Q and T is tridiagonal with alpha on its diagonal and beta
beside it. With T = U diag(theta) U^T the Ritz pairs (theta_k, sum_j U_jk q_j) have the
residual norms beta_m |U_mk|, and theta_k with the weights U_1k^2 are the Gauss rule of
the spectral measure: sum_k U_1k^2 theta_k^d = v . A^d v / |v|^2 for every d <= 2m - 1.

The local three-term step comes first; against loss of orthogonality one projection on
all earlier vectors follows, and a second one where the first has cancelled more than
1 - 1/sqrt(2) of the vector. A single projection without the local step keeps the top
eigenvalue right and loses the basis.
References: Paige, "Computational Variants of the Lanczos Method", 1972; Golub and
Meurant, "Matrices, Moments and Quadrature with Applications", 2010; Parlett, "The
Symmetric Eigenvalue Problem", 1998, section 6.9 (twice is enough).
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, PyTree

from jaxlab._array_checks import check_fields
from jaxlab._checks import check_sequence, is_whole
from jaxlab.curvature._convolutions import driven
from jaxlab.curvature._options import (
    Driver,
    as_pytree,
    check_asymmetry,
    check_memory,
    check_order,
    exact_products,
    under_trace,
)
from jaxlab.curvature._recurrence import (
    Forward,
    Reorthogonalize,
    State,
    host_loop,
    linearized,
    loop,
    run_compiled,
    run_host,
)
from jaxlab.curvature._ritz import (
    Replay,
    gauss_rule,
    norm,
    replay,
    tridiagonal_eigh,
    unit_rows,
)
from jaxlab.curvature._vectors import (
    Operator,
    Space,
    is_host,
    laid_out,
    on_vectors,
    prepared,
    space_of,
)

_NAME = "lanczos"


class LanczosResult(NamedTuple):
    """Holds what :func:`lanczos` found, in float32 at least; a pytree of arrays.

    Attributes:
      alpha: diagonal of T, shape (order,); zero from ``num_steps`` on.
      beta: what stands beside it, shape (order,): ``beta[j]`` couples vectors j and
        j + 1, and the last one, ``beta[num_steps - 1]``, gives the residuals. It is
        zero where an invariant subspace was found.
      basis: the Lanczos vectors as rows, shape (order, p), in the order of the leaves
        of ``start``; zero from ``num_steps`` on. ``None`` unless
        ``reorthogonalize="full"``. Where ``start`` is cut over devices, the rows are
        cut with it, and their entries stand device by device, filled up with zeros:
        :func:`ritz_vectors` makes trees of them.
      num_steps: int32 scalar, ``order`` unless an invariant subspace was found before.
      num_products: int32 scalar, the products with the operator that were spent.
      locked: with ``"selective"``, the Ritz vectors that were kept, shape
        (ceil(order / 4), p), and for each the step from which it was; else ``None``.

    Examples:
      >>> none = dict(basis=None, num_products=jnp.array(1), locked=None)
      >>> one = LanczosResult(jnp.ones(1), jnp.zeros(1), num_steps=jnp.array(1), **none)
      >>> one.alpha
      Array([1.], dtype=float32)
    """

    alpha: Float[Array, " order"]
    beta: Float[Array, " order"]
    basis: Float[Array, "order p"] | None
    num_steps: Int[Array, ""]
    num_products: Int[Array, ""]
    locked: tuple[Float[Array, "slots p"], Int[Array, " slots"]] | None


def lanczos(
    operator: Operator,
    start: PyTree,
    *,
    order: int,
    reorthogonalize: Reorthogonalize = "full",
    memory_limit: float | None = None,
    check_symmetric: bool = True,
    driver: Driver = "auto",
) -> LanczosResult:
    """Reduces a symmetric operator to a tridiagonal matrix.

    It costs ``order`` products. Besides what the operator needs it holds, in units of
    the parameters in float32, ``order + 7`` vectors with ``"full"``, ``order / 2 + 8``
    with ``"selective"`` and 5 with ``"none"``. The recurrence runs in float32 at least
    (the operator is handed trees with the dtypes of ``start``). Matrix products in it
    and in the operator are exact to the dtype, unless
    ``jax_default_matmul_precision`` is set.

    After a breakdown (a vector below 32 epsilon of the largest ``|A q|``) an invariant
    subspace has been found: ``num_steps`` says where, and the rest is padded with
    zeros that :func:`ritz` leaves out.

    Args:
      operator: ``v -> A v`` on trees like ``start``; A symmetric. A registered pytree
        whose leaves change without recompilation; a plain function works too, compiled
        anew for each function object. Where it has ``linearize()``, that is done once.
      start: tree of real arrays, p entries in all, not zero; ``optax.MaskedNode`` where
        the operator has holes.
      order: steps, from 1 to p.
      reorthogonalize: "full" keeps every Lanczos vector and stays orthogonal to all.
        "selective" keeps at most ``ceil(order / 4)`` Ritz vectors, those that have
        converged: each time some do, the recurrence is replayed to make them, which
        costs as many products as there were steps. "none" keeps nothing: outliers then
        come back as ghosts, several times over, while densities stay usable.
      memory_limit: bytes that the kept vectors may take; ``None`` means 1 GiB.
      check_symmetric: refuse an operator whose T comes out asymmetric. It costs one
        scalar product a step and looks at values, so under jit it is left out.
      driver: "compiled" runs one compiled loop. "host" loops in Python over a jitted
        step, which is several times faster for convolutions on a CPU; it keeps the
        residuals of ``linearize()`` as arrays. "auto" takes the first, except for host
        operators. On a CPU, outside jit, it turns convolutions of Hessians, Gauss-
        Newton and Fisher matrices into matrix products of patches, which take the
        memory of the inputs times the entries of the kernels; where convolutions are
        left (other operators, grouped or dilated ones, kernels above 25 entries,
        inside loops or ``jax.checkpoint``), it takes the second.

    Returns:
      A :class:`LanczosResult`.

    Raises:
      ValueError: for a start that is empty, not real, zero or not finite, an order
        outside 1 to p, a basis above the limit, an operator that gives another tree or
        is not symmetric, or a driver that cannot run here.

    Examples:
      >>> matrix = jnp.diag(jnp.array([1.0, 1.0, 6.0]))
      >>> operator = jax.tree_util.Partial(jnp.matmul, matrix)
      >>> result = lanczos(operator, jnp.ones(3), order=3)
      >>> int(result.num_steps)  # two distinct eigenvalues
      2
      >>> ritz(result)[0].round(4)
      Array([1., 6., 6.], dtype=float32)
    """
    space = space_of(_NAME, start, "start")
    step = check_order(_NAME, order, reorthogonalize, space, clip=False)
    check_memory(_NAME, step, space, memory_limit)
    operator = as_pytree(operator)
    traced = under_trace(operator, start)
    operator, chosen = driven(_NAME, operator, space, driver, traced=traced)
    space = laid_out(space, start)
    if not traced:
        _check_start(start)
    with jax.named_scope(_NAME), exact_products():
        if chosen == "compiled":
            state = _compiled(operator, start, step=step, space=space)
        else:
            operator = operator if is_host(operator) else linearized(operator)
            vector = _flat(start, space=space)
            state = run_host(_NAME, operator, vector, step=step, space=space)
    if check_symmetric and not traced:
        check_asymmetry(_NAME, state.asymmetry, state.scale, space)
    return _result(step, state)


def ritz(
    result: LanczosResult,
) -> tuple[Float[Array, " order"], Float[Array, " order"], Float[Array, " order"]]:
    """Computes Ritz values, their weights and their residual norms.

    A symmetric matrix has an eigenvalue within the residual of each Ritz value.

    Args:
      result: of :func:`lanczos`.

    Returns:
      Three arrays of shape (order,). The values ascend. The weights are the squared
      first components of the eigenvectors of T and sum to 1: nodes and weights of the
      Gauss rule of the start vector. Where the recurrence stopped early, what follows
      the first ``num_steps`` repeats the largest value with weight 0 and residual
      infinity.

    Examples:
      >>> operator = jax.tree_util.Partial(jnp.multiply, jnp.array([2.0, 4.0]))
      >>> values, weights, _ = ritz(lanczos(operator, jnp.ones(2), order=2))
      >>> values.round(4), weights.round(4)
      (Array([2., 4.], dtype=float32), Array([0.5, 0.5], dtype=float32))
    """
    result = _checked("ritz", result)
    return gauss_rule(result.alpha, result.beta, result.num_steps)


def ritz_vectors(
    operator: Operator,
    start: PyTree,
    result: LanczosResult,
    *,
    indices: Sequence[int],
    driver: Driver = "auto",
) -> tuple[Float[Array, " k"], PyTree, Float[Array, " k"]]:
    """Makes chosen Ritz vectors, by a second pass where no basis was kept.

    With a basis it costs k products, which measure the residuals; without one
    ``num_steps`` more and the memory of the k vectors. A second pass repeats the first
    up to round-off. After ``"none"`` it is reliable for pairs that stand in the result
    once; the residuals tell.

    Args:
      operator: the operator of the first pass.
      start: the start of the first pass.
      result: what the first pass returned.
      indices: k places in the values of :func:`ritz`; negative ones count back from
        place ``num_steps``, so -1 is the largest value.
      driver: as in :func:`lanczos`.

    Returns:
      The Ritz values, shape (k,); the vectors of norm 1 as a tree like ``start`` whose
      leaves have a leading axis k; the measured norms of ``A y - theta y``, shape (k,).

    Raises:
      ValueError: if ``indices`` is empty or outside the steps that were taken, or as
        :func:`lanczos` does.

    Examples:
      >>> operator = jax.tree_util.Partial(jnp.multiply, jnp.array([2.0, 4.0]))
      >>> start = jnp.ones(2)
      >>> result = lanczos(operator, start, order=2, reorthogonalize="none")
      >>> values, vectors, _ = ritz_vectors(operator, start, result, indices=(-1,))
      >>> values.round(4), abs(vectors.round(4))
      (Array([4.], dtype=float32), Array([[0., 1.]], dtype=float32))
    """
    name = "ritz_vectors"
    space = space_of(name, start, "start")
    result = _checked(name, result)
    operator = as_pytree(operator)
    traced = under_trace(operator, start, result)
    steps = result.alpha.size if traced else int(result.num_steps)
    check_sequence(name, "indices", indices, "integers")
    indices = tuple(indices)
    inside = lambda index: is_whole(index) and -steps <= index < steps
    if not indices or not all(map(inside, indices)):
        raise ValueError(
            f"{name}: indices must be places among {steps} Ritz values, one at least, "
            f"got {indices}."
        )
    cut = laid_out(space, start)
    if result.basis is not None:
        _check_first(name, result.basis, start, cut, traced=traced)
    operator, chosen = driven(name, operator, space, driver, traced=traced)
    space = cut
    with jax.named_scope(name), exact_products():
        if chosen == "compiled":
            arguments = operator, start, result
            values, sums, residuals = _summed(*arguments, indices=indices, space=space)
        else:
            values, sums, residuals = _summed_from_host(
                operator, start, result, indices=indices, space=space
            )
        return values, _trees(sums, space=space), residuals


@functools.partial(jax.jit, static_argnames=("step", "space"))
def _compiled(operator: Operator, start: PyTree, *, step: Forward, space: Space):
    product = on_vectors(_NAME, prepared(operator), space)
    return run_compiled(product, space.flatten(start), step)


_flat = jax.jit(lambda start, *, space: space.flatten(start), static_argnames="space")
_trees = jax.jit(
    lambda rows, *, space: jax.vmap(space.unflatten)(rows), static_argnames="space"
)


def _checked(name: str, result: LanczosResult) -> LanczosResult:
    """Refuses what :func:`lanczos` did not make; gives JAX arrays."""
    shapes = {} if getattr(result, "basis", None) is None else {"basis": "order p"}
    return check_fields(
        name,
        "result",
        result,
        LanczosResult,
        "lanczos",
        alpha="order",
        beta="order",
        num_steps="",
        num_products="",
        **shapes,
    )


def _result(step: Forward, state: State) -> LanczosResult:
    full = step.reorthogonalize == "full"
    locked = None if state.locks is None else (state.rows, state.locks.since)
    replayed = 0 if state.locks is None else state.locks.replayed
    return LanczosResult(
        alpha=state.alpha,
        beta=state.beta,
        basis=state.rows if full else None,
        num_steps=state.num_steps,
        num_products=state.index + replayed,
        locked=locked,
    )


def _check_start(start: PyTree) -> None:
    leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(start)]
    largest = max(float(jnp.max(jnp.abs(leaf))) for leaf in leaves if leaf.size)
    if not all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in leaves):
        raise ValueError(f"{_NAME}: start must be finite, got NaN or infinity in it.")
    if largest == 0:
        raise ValueError(
            f"{_NAME}: start must not be zero; draw it, from jax.random.normal say."
        )


def _check_first(
    name: str, basis: Array, start: PyTree, space: Space, *, traced: bool
) -> None:
    """Refuses a start of another size, or one that lies otherwise over devices."""
    if basis.shape[1] != space.length:
        raise ValueError(
            f"{name}: start must be that of the first pass, with {basis.shape[1]} "
            f"entries, got {space.length}."
        )
    if traced or len(basis.sharding.device_set) == 1:
        return
    first = _flat(start, space=space)
    if float(norm(basis[0] - first / norm(first))) > 1e-3:
        raise ValueError(
            f"{name}: start must be that of the first pass and lie over devices as it "
            "did then; the first row of the basis is another vector."
        )


def _chosen(result: LanczosResult, indices: tuple[int, ...]):
    """Gives the chosen values and their coefficients in the Lanczos vectors."""
    steps = result.num_steps
    places = jnp.array(indices)
    places = jnp.where(places < 0, places + steps, places)
    _, vectors = tridiagonal_eigh(result.alpha, result.beta, steps)
    valid = jnp.arange(result.alpha.size) < steps
    coefficients = jnp.where(valid, vectors[:, places].T, 0)
    return ritz(result)[0][places], coefficients


def _second_pass(start: PyTree, result: LanczosResult, coefficients, space: Space):
    vector = space.flatten(start)
    rows = jnp.zeros((len(coefficients), space.length), space.dtype)
    since = jnp.zeros((0,), jnp.int32)
    if result.locked is not None:
        locked, since = result.locked
        rows = jnp.concatenate([locked, rows])
        nothing = jnp.zeros((len(locked), coefficients.shape[1]), space.dtype)
        coefficients = jnp.concatenate([nothing, coefficients])
    unit = vector / norm(vector)
    return replay(unit, result.alpha, result.beta, rows, coefficients, since)


@functools.partial(jax.jit, static_argnames=("indices", "space"))
def _summed(operator, start, result, *, indices, space):
    product = on_vectors("ritz_vectors", prepared(operator), space)
    values, coefficients = _chosen(result, indices)
    if result.basis is not None:
        high = lax.Precision.HIGHEST
        sums = jnp.matmul(coefficients, result.basis, precision=high)
    else:
        state = _second_pass(start, result, coefficients, space)
        turn = Replay(state.since.size)
        sums = loop(turn, product, state, result.num_steps).sums[-len(indices) :]
    sums = unit_rows(sums)
    misses = lambda pair: norm(product(pair[1]) - pair[0] * pair[1])
    return values, sums, lax.map(misses, (values, sums))


_chosen_jit = jax.jit(_chosen, static_argnums=1)
_second_pass_jit = jax.jit(_second_pass, static_argnums=3)
_product = jax.jit(
    lambda operator, vector, *, space: on_vectors("ritz_vectors", operator, space)(
        vector
    ),
    static_argnames="space",
)


def _summed_from_host(operator, start, result, *, indices, space):
    name = "ritz_vectors"
    streams = is_host(operator)
    operator = operator if streams else linearized(operator)
    values, coefficients = _chosen_jit(result, indices)
    if result.basis is not None:
        high = lax.Precision.HIGHEST
        sums = jnp.matmul(coefficients, result.basis, precision=high)
    else:
        state = _second_pass_jit(start, result, coefficients, space)
        turn, steps = Replay(state.since.size), int(result.num_steps)
        state = host_loop(name, turn, operator, state, steps, space=space)
        sums = state.sums[-len(indices) :]
    sums = unit_rows(sums)
    of = on_vectors(name, operator, space) if streams else None
    product = of or functools.partial(_product, operator, space=space)
    residuals = [norm(product(y) - value * y) for value, y in zip(values, sums)]
    return values, sums, jnp.stack(residuals)
