"""Products of a Monarch matrix and an adjoint one, and their exact factors.

Write n = t*b and number the entries of a vector ``x[sigma*b + lam]``. The class MM*
with block size b holds the n by n matrices

    M = (Pt L1 P) R (Pt L2 P)

where R is block-diagonal with t blocks of size b, L1 and L2 are block-diagonal with b
blocks of size t, and P sends ``sigma*b + lam`` to ``lam*t + sigma``. Cut out of M, the
t by t blocks ``T[i, j] = M.reshape(t, b, t, b)[:, i, :, j]`` are

    T[i, j] = L1[i] D[i, j] L2[j],   D[i, j] = diag(R[0, i, j], ..., R[t-1, i, j])

so that, wherever the inverses exist, the matrices

    F[i, j] = T[i, 0]^-1 T[i, j] T[0, j]^-1 T[0, 0] = L2[0]^-1 (diagonal) L2[0]

share their eigenvectors V. From V follow ``L1[i] = T[i, 0] V``, ``L2[j] = L1[0]^-1
T[0, j]`` and ``D[i, j] = L1[i]^-1 T[i, j] L2[j]^-1``, which is diagonal for all i and
j exactly where M is of the class.

Here one combination of all F gives a first V. Newton steps for the common eigenvectors
of all F then refine it, because the eigenvalues of the combination may nearly coincide
where those of the F do not; the paper takes the F one by one.

Reference: Dao et al., "Monarch: Expressive Structured Matrices for Efficient and
Accurate Training", ICML 2022, Algorithm 2 and Proposition 13.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Complex, Float, Inexact

from jaxlab._array_checks import check_fields
from jaxlab._checks import is_whole
from jaxlab.structured.monarch.multiply import _promote

_NEWTON_STEPS = 3


class MMStarFactors(NamedTuple):
    """Holds the three factors of a matrix in MM*; a pytree of arrays.

    Attributes:
      l1: the blocks next to the output, shape (b, t, t).
      r: the blocks in the middle, shape (t, b, b).
      l2: the blocks next to the input, shape (b, t, t).
      residual: real scalar, the relative error in the Frobenius norm of the matrix
        that was factored; 0 for factors that were made from a formula.

    Examples:
      >>> one = jnp.ones((1, 2, 2))
      >>> factors = MMStarFactors(one, jnp.ones((2, 1, 1)), one, jnp.zeros(()))
      >>> mmstar_to_dense(factors)
      Array([[2., 2.],
             [2., 2.]], dtype=float32)
    """

    l1: Inexact[Array, "b t t"]
    r: Inexact[Array, "t b b"]
    l2: Inexact[Array, "b t t"]
    residual: Float[Array, ""]


def factor_mmstar(matrix: Inexact[ArrayLike, "n n"], *, block: int) -> MMStarFactors:
    """Recovers the factors of a matrix that is a Monarch times an adjoint one.

    It is no projection: outside the class the factors mean nothing and ``residual``
    is large, or NaN where a block of the first block row or column is singular
    (``T[i, 0]`` and ``T[0, j]`` of the module's text have to be invertible) or the
    matrix is not finite. Nothing is raised. Inside the class the residual tracks the
    conditioning of those blocks and of their common eigenvectors: 1e-15 to 1e-9 for
    random factors in float64. The factors are unique only up to diagonal
    matrices between them and the order of the middle blocks: compare products.

    Gradients do not pass. Eigenvectors of matrices that are not symmetric are needed;
    jax computes them on CPU, not on every accelerator. The weights of the combination
    are fixed, so no key is needed and the result is a function of the matrix.

    Args:
      matrix: n by n, real or complex; map over further axes with ``jax.vmap``.
      block: b, the size of the blocks of R; must divide n. The cost is O(n^3 / b).

    Returns:
      The factors, always complex (a real matrix may have none that are real; where
      it does, the imaginary parts are zeros), and the residual.

    Raises:
      ValueError: if ``matrix`` is not square or holds integers, or ``block`` does
        not divide its size.

    Examples:
      >>> matrix = jnp.array([[1.0, 2.0], [4.0, 3.0]])
      >>> factors = factor_mmstar(matrix, block=2)
      >>> float(factors.residual)
      0.0
      >>> mmstar_to_dense(factors).real
      Array([[1., 2.],
             [4., 3.]], dtype=float32)
    """
    (matrix,), _ = _promote("factor_mmstar", matrix=matrix)
    n = matrix.shape[0] if matrix.ndim else 0
    if matrix.shape != (n, n):
        raise ValueError(
            "factor_mmstar: the matrix must be square, got shape "
            f"{matrix.shape}; map over further axes with jax.vmap."
        )
    if not is_whole(block) or block < 1 or n % block:
        raise ValueError(
            "factor_mmstar: block must be at least 1 and divide the size of the "
            f"matrix, got block={block!r} for a matrix of shape {matrix.shape}."
        )
    with jax.named_scope("factor_mmstar"):
        matrix = jax.lax.stop_gradient(matrix)
        matrix = matrix.astype(jnp.promote_types(matrix.dtype, jnp.float32))
        # A scale of one keeps products of blocks and of inverses in range.
        scale = jnp.abs(matrix).max(initial=0)
        blocks = matrix / jnp.where(scale > 0, scale, 1)
        blocks = blocks.reshape(n // block, block, n // block, block)
        blocks = blocks.transpose(1, 3, 0, 2)
        quotients = _quotients(blocks)
        valid = jnp.isfinite(quotients).all()
        # LAPACK must not see what is not finite.
        quotients = jnp.where(valid, quotients, jnp.eye(n // block, dtype=blocks.dtype))
        vectors = _common_eigenvectors(quotients)
        blocks = blocks.astype(vectors.dtype)
        l1 = blocks[:, 0] @ vectors
        l2 = jnp.linalg.solve(jnp.broadcast_to(l1[0], l1.shape), blocks[0])
        middle = _right_solve(_left_solve(l1[:, None], blocks), l2[None])
        diagonals = jnp.diagonal(middle, axis1=2, axis2=3)  # (b, b, t)
        rebuilt = (l1[:, None] * diagonals[:, :, None]) @ l2[None]
        residual = jnp.linalg.norm(blocks - rebuilt) / jnp.linalg.norm(blocks)
        residual = jnp.where(valid, residual, jnp.nan)
        return MMStarFactors(l1 * scale, diagonals.transpose(2, 0, 1), l2, residual)


def mmstar_matmul(
    x: Inexact[ArrayLike, "*batch n"], factors: MMStarFactors
) -> Inexact[Array, "*batch n"]:
    """Multiplies rows by a matrix in MM*, ``x @ mmstar_to_dense(factors).T``.

    Products accumulate in float32 at least; the result has the common dtype of the
    four arrays. A row costs ``2 * n * t + n * b`` multiplications and no shuffle.

    Args:
      x: rows of width n = t*b; any leading dimensions.
      factors: ``l1`` and ``l2`` of shape (b, t, t), ``r`` of shape (t, b, b).

    Returns:
      Rows of width n with the leading dimensions of ``x``.

    Raises:
      ValueError: if the factors do not fit together, ``x`` does not fit them, or an
        array holds integers.

    Examples:
      >>> from jaxlab.structured import circulant_factors
      >>> factors = circulant_factors(jnp.array([1.0, 2.0, 0.0, 0.0]))
      >>> mmstar_matmul(jnp.array([0.0, 3.0, 0.0, 0.0]), factors).real.round(5)
      Array([0., 3., 6., 0.], dtype=float32)
    """
    factors = check_fields(
        "mmstar_matmul", "factors", factors, MMStarFactors, "factor_mmstar", residual=""
    )
    (x, l1, r, l2), dtype = _promote(
        "mmstar_matmul", x=x, l1=factors.l1, r=factors.r, l2=factors.l2
    )
    t, b = _check_mmstar("mmstar_matmul", l1, r, l2)
    if x.ndim == 0 or x.shape[-1] != t * b:
        raise ValueError(
            f"mmstar_matmul: the last axis of x must have t * b = {t} * {b} = {t * b} "
            f"entries, got x of shape {x.shape}."
        )
    wide = jnp.promote_types(dtype, jnp.float32)
    with jax.named_scope("mmstar_matmul"):
        y = x.reshape(*x.shape[:-1], t, b)
        for spec, blocks in (
            ("...jb,bij->...ib", l2),
            ("...tj,tij->...ti", r),
            ("...jb,bij->...ib", l1),
        ):
            y = jnp.einsum(spec, y, blocks, preferred_element_type=wide).astype(dtype)
        return y.reshape(x.shape)


def mmstar_to_dense(factors: MMStarFactors) -> Inexact[Array, "n n"]:
    """Builds the matrix that three factors of MM* stand for.

    Args:
      factors: ``l1`` and ``l2`` of shape (b, t, t), ``r`` of shape (t, b, b).

    Returns:
      The n by n matrix, n = t*b, that maps columns.

    Raises:
      ValueError: if the factors do not fit together or hold integers.

    Examples:
      >>> from jaxlab.structured import circulant_factors
      >>> factors = circulant_factors(jnp.array([1.0, 2.0, 0.0, 0.0]))
      >>> mmstar_to_dense(factors).real.round(5) + 0.0
      Array([[1., 0., 0., 2.],
             [2., 1., 0., 0.],
             [0., 2., 1., 0.],
             [0., 0., 2., 1.]], dtype=float32)
    """
    factors = check_fields(
        "mmstar_to_dense",
        "factors",
        factors,
        MMStarFactors,
        "factor_mmstar",
        residual="",
    )
    l1, r, l2 = factors.l1, factors.r, factors.l2
    (l1, r, l2), dtype = _promote("mmstar_to_dense", l1=l1, r=r, l2=l2)
    t, b = _check_mmstar("mmstar_to_dense", l1, r, l2)
    wide = jnp.promote_types(dtype, jnp.float32)
    with jax.named_scope("mmstar_to_dense"):
        first = jnp.einsum("bij,jbc->ibjc", l1, r, preferred_element_type=wide)
        dense = jnp.einsum("ibjc,cjk->ibkc", first, l2, preferred_element_type=wide)
        return dense.astype(dtype).reshape(t * b, t * b)


def _quotients(blocks: Inexact[Array, "b b t t"]) -> Inexact[Array, "b b t t"]:
    """Computes ``F[i, j] = T[i, 0]^-1 T[i, j] T[0, j]^-1 T[0, 0]``."""
    left = _left_solve(blocks[:, :1], blocks)
    right = jnp.linalg.solve(blocks[0], jnp.broadcast_to(blocks[0, 0], blocks[0].shape))
    return left @ right[None]


def _common_eigenvectors(
    matrices: Inexact[Array, "b b t t"],
) -> Complex[Array, "t t"]:
    """Finds V that makes every ``V^-1 F V`` diagonal, if there is one."""
    t = matrices.shape[-1]
    matrices = matrices.reshape(-1, t, t)
    norms = jnp.linalg.norm(matrices, axis=(1, 2), keepdims=True)
    matrices = matrices / jnp.where(norms > 0, norms, 1)
    # Any fixed generic numbers: fractional parts of multiples of the golden ratio.
    weights = np.modf(np.arange(1, len(matrices) + 1) * (5**0.5 - 1) / 2)[0] - 0.5
    weights = jnp.asarray(weights, matrices.real.dtype).astype(matrices.dtype)
    _, vectors = jnp.linalg.eig(jnp.tensordot(weights, matrices, axes=1))
    matrices = matrices.astype(vectors.dtype)
    off = 1 - jnp.eye(t, dtype=vectors.real.dtype)[None]

    def turned(vectors):
        """Computes all V^-1 F V and the size of what is left off the diagonals."""
        turned = _left_solve(vectors, matrices) @ vectors
        return turned, jnp.linalg.norm(turned * off)

    def newton(state, _):
        vectors, matrices, size = state
        # V (I + Z) leaves E + Lambda Z - Z Lambda off the diagonals; the least squares
        # over all matrices have one unknown for each entry of Z.
        values = jnp.diagonal(matrices, axis1=1, axis2=2)
        gaps = values[:, :, None] - values[:, None, :]
        total = jnp.sum(jnp.abs(gaps) ** 2, axis=0)
        tiny = jnp.finfo(total.dtype).eps ** 2
        step = jnp.sum(gaps.conj() * matrices * off, axis=0)
        step = jnp.where(total > tiny, -step / jnp.where(total > tiny, total, 1), 0)
        moved = vectors + vectors @ step
        moved = moved / jnp.linalg.norm(moved, axis=0, keepdims=True)
        new = (moved, *turned(moved))
        better = new[2] < size  # false for NaN
        return jax.tree.map(lambda n, o: jnp.where(better, n, o), new, state), None

    state = (vectors, *turned(vectors))
    (vectors, _, _), _ = jax.lax.scan(newton, state, length=_NEWTON_STEPS)
    return vectors


def _left_solve(
    a: Inexact[Array, "*#stack t t"], b: Inexact[Array, "*#stack t t"]
) -> Inexact[Array, "*stack t t"]:
    """Computes ``a^-1 b`` over stacks of matrices that broadcast."""
    shape = jnp.broadcast_shapes(a.shape, b.shape)
    return jnp.linalg.solve(jnp.broadcast_to(a, shape), jnp.broadcast_to(b, shape))


def _right_solve(
    a: Inexact[Array, "*#stack t t"], b: Inexact[Array, "*#stack t t"]
) -> Inexact[Array, "*stack t t"]:
    """Computes ``a b^-1`` over stacks of matrices that broadcast."""
    return _left_solve(b.mT, a.mT).mT


def _check_mmstar(name: str, l1: Array, r: Array, l2: Array) -> tuple[int, int]:
    """Computes (t, b) and refuses factors that do not fit together."""
    t, b = r.shape[:2] if r.ndim == 3 else (0, 0)
    if r.shape != (t, b, b) or l1.shape != (b, t, t) or l2.shape != (b, t, t):
        raise ValueError(
            f"{name}: r must have shape (t, b, b) and l1, l2 shape (b, t, t), got "
            f"r {r.shape}, l1 {l1.shape} and l2 {l2.shape}; map over further leading "
            "axes with jax.vmap."
        )
    return t, b
