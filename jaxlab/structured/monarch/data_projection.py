"""Monarch factors nearest to a matrix on given inputs.

The closed form of `monarch_project` minimises ||A - M||, as if all inputs were equally
likely. On rows X the error that counts is

    ||X (A - M)^T||^2

which has no closed form: the slices of M that share inputs are coupled by X^T X. It is
quadratic in each factor alone, though, and separates over the output blocks lam. With
E the residual rows X (A - M)^T and H[rho] the middle activations of block lam, both
half steps of alternating least squares solve small normal equations for a change,

    w2[lam]:          (H^H H + mu) change = H^H E
    w1[:, lam's rows]: (G + mu) change = (conj(w2) X)^T E,
        G[(kappa, a, pi), (kappa', a', pi')]
            = (w2[lam]^H w2[lam])[kappa*c + a, kappa'*c + a'] (X^H X)[kappa p + pi, ...]

mu > 0 penalises the change, not the factor: so a half step never raises the error, and
where the inputs leave directions open the closed form stays. Only the triangular
factor of X enters, so the cost of a step does not depend on the number of rows.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Inexact

from jaxlab._checks import check_count, check_number
from jaxlab.structured.monarch.multiply import (
    MonarchFactors,
    _promote,
    monarch_to_dense,
)
from jaxlab.structured.monarch.projection import monarch_project


def monarch_project_data(
    matrix: Inexact[ArrayLike, "m n"],
    inputs: Inexact[ArrayLike, "rows n"],
    *,
    nblocks_in: int,
    nblocks_out: int,
    rank: int = 1,
    num_iterations: int = 10,
    ridge: ArrayLike = 1e-6,
) -> tuple[MonarchFactors, Float[Array, "1+{num_iterations}"]]:
    """Finds Monarch factors near a matrix in the norm that inputs define.

    Alternating least squares from `monarch_project`; the error never rises, and it
    ends in a minimum that need not be the global one. Gradients do not pass. The
    computation runs in float32 at least. An iteration costs O(l (c n)^3) operations
    and l (c n)^2 numbers of memory; with c n in the thousands take a device.

    Args:
      matrix: real or complex, m rows (outputs) by n columns (inputs).
      inputs: the rows x whose images ``matrix @ x`` are to be kept; flatten leading
        axes. Fewer rows than n, or dependent ones, are fine.
      nblocks_in: k, the blocks next to the input; must divide n.
      nblocks_out: l, the blocks next to the output; must divide m.
      rank: c, the rank of each slice, from 1 to min(m / l, n / k).
      num_iterations: how often both factors are solved for, at least 0.
      ridge: weight of the squared change of a factor, positive, relative to the trace
        of its normal matrix. Near 0 each half step is the exact minimum; float32
        needs about 1e-6.

    Returns:
      The factors (``w1`` of shape (k, c*l, n/k), ``w2`` of shape (l, m/l, c*k), in
      the common dtype of the two arrays) and the squared errors, those of
      ``inputs @ (A - M).T``, at the start and after each iteration. NaN in, NaN out.

    Raises:
      ValueError: as `monarch_project`, or if ``inputs`` is not a matrix of n columns,
        ``num_iterations`` is negative or ``ridge`` is not positive.

    Examples:
      >>> matrix = jnp.array([[1.0, 2.0], [2.0, 1.0]])
      >>> inputs = jnp.array([[1.0, 1.0]])
      >>> factors, errors = monarch_project_data(matrix, inputs, nblocks_in=1,
      ...                                        nblocks_out=1)
      >>> errors.round(5)[-1] + 0.0
      Array(0., dtype=float32)
    """
    name = "monarch_project_data"
    (matrix, inputs), dtype = _promote(name, matrix=matrix, inputs=inputs)
    if inputs.ndim != 2 or matrix.ndim != 2 or inputs.shape[1] != matrix.shape[1]:
        raise ValueError(
            f"{name}: the matrix must have shape (outputs, inputs) and inputs shape "
            f"(rows, inputs), got {matrix.shape} and {inputs.shape}."
        )
    check_count(name, least=0, num_iterations=num_iterations)
    check_number(name, "finite and > 0", ridge=ridge)
    wide = jnp.promote_types(dtype, jnp.float32)
    with jax.named_scope(name):
        matrix = jax.lax.stop_gradient(matrix).astype(wide)
        rows = jax.lax.stop_gradient(inputs).astype(wide)
        # Equal norms of all images, with at most n rows; and numbers of size one.
        rows = jnp.linalg.qr(rows, mode="r")
        scale = jnp.abs(rows).max(initial=0)
        rows = rows / jnp.where(scale > 0, scale, 1)
        start = monarch_project(
            matrix, nblocks_in=nblocks_in, nblocks_out=nblocks_out, rank=rank
        )

        def half_step(solve, factors, error):
            """Takes a solution unless rounding made it worse."""
            new = solve(factors, rows, _residual(matrix, rows, factors), ridge)
            new_error = _squared(_residual(matrix, rows, new))
            better = new_error < error  # false for NaN
            pick = lambda n, o: jnp.where(better, n, o)
            return jax.tree.map(pick, (new, new_error), (factors, error))

        def iteration(state, _):
            state = half_step(_solve_w2, *state)
            state = half_step(_solve_w1, *state)
            return state, state[1]

        first = _squared(_residual(matrix, rows, start))
        (factors, _), errors = jax.lax.scan(
            iteration, (start, first), length=num_iterations
        )
        errors = jnp.concatenate([first[None], errors]) * scale**2
        return jax.tree.map(lambda w: w.astype(dtype), factors), errors


def _residual(
    matrix: Inexact[Array, "m n"], rows: Inexact[Array, "rows n"], factors: tuple
) -> Inexact[Array, "l rows s"]:
    """Computes the rows ``X (A - M)^T``, split by output block."""
    l, s, _ = factors[1].shape
    residual = rows @ (matrix - monarch_to_dense(*factors)).T
    return residual.reshape(-1, s, l).transpose(2, 0, 1)


def _squared(residual: Inexact[Array, "l rows s"]) -> Float[Array, ""]:
    return jnp.sum(jnp.abs(residual) ** 2)


def _blocks(
    factors: tuple, rows: Inexact[Array, "rows n"]
) -> tuple[Inexact[Array, "l k c p"], Inexact[Array, "rows k p"]]:
    """Sorts w1 by output block and the inputs by input block."""
    w1, w2 = factors
    k, q, p = w1.shape
    l = w2.shape[0]
    return w1.reshape(k, q // l, l, p).transpose(2, 0, 1, 3), rows.reshape(-1, k, p)


def _solve_w2(
    factors: tuple, rows: Array, residual: Array, ridge: ArrayLike
) -> MonarchFactors:
    """Solves for w2; its output blocks are regressions on the middle activations."""
    w1, x = _blocks(factors, rows)
    l, k, c, _ = w1.shape
    middle = jnp.einsum("nkp,lkcp->lnkc", x, w1).reshape(l, -1, k * c)
    adjoint = middle.mT.conj()
    change = _normal_solve(adjoint @ middle, adjoint @ residual, ridge)
    return MonarchFactors(factors[0], factors[1] + change.mT)


def _solve_w1(
    factors: tuple, rows: Array, residual: Array, ridge: ArrayLike
) -> MonarchFactors:
    """Solves for w1; its input blocks are coupled through the covariance."""
    w1, x = _blocks(factors, rows)
    l, k, c, p = w1.shape
    w2 = factors[1].reshape(l, -1, k, c)
    inner = jnp.einsum("lska,lsjb->lkajb", w2.conj(), w2)
    covariance = jnp.einsum("nkp,njq->kpjq", x.conj(), x)
    normal = jnp.einsum("lkajb,kpjq->lkapjbq", inner, covariance)
    right = jnp.einsum("lska,nkp,lns->lkap", w2.conj(), x.conj(), residual)
    size = k * c * p
    change = _normal_solve(
        normal.reshape(l, size, size), right.reshape(l, size, 1), ridge
    )
    new = (w1 + change.reshape(w1.shape)).transpose(1, 2, 0, 3)
    return MonarchFactors(new.reshape(factors[0].shape), factors[1])


def _normal_solve(
    normal: Inexact[Array, "l u u"], right: Inexact[Array, "l u v"], ridge: ArrayLike
) -> Inexact[Array, "l u v"]:
    """Solves ``(normal + ridge * trace) change = right`` over the output blocks."""
    trace = jnp.trace(normal, axis1=1, axis2=2).real
    weight = jnp.where(trace > 0, ridge * trace, 1)[:, None, None]
    normal = normal + weight * jnp.eye(normal.shape[-1], dtype=normal.dtype)[None]
    factor = jnp.linalg.cholesky(normal)
    return jax.scipy.linalg.cho_solve((factor, True), right)
