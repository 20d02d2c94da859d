"""The nearest Monarch matrix in closed form, and how far away it is.

A matrix A (m, n) with k blocks next to the input and l next to the output splits into
k*l slices ``T[kappa, lam] = A.reshape(s, l, k, p)[:, lam, kappa, :]`` of s = m/l rows
and p = n/k columns. A Monarch matrix of rank c is one whose slices have rank c at
most, so the squared Frobenius distance separates over the slices and each part is the
theorem of Eckart and Young: keep the c leading singular triples,

    w1[kappa, a*l + lam, :] = sqrt(sigma_a) vh_a
    w2[lam, :, kappa*c + a] = sqrt(sigma_a) u_a
    min ||A - M||^2 = sum_{kappa, lam} sum_{t > c} sigma_t(T[kappa, lam])^2

The factors are unique only up to an invertible c by c matrix in each slice: compare
their products. The cost is that of k*l singular value decompositions, s by p each.

Reference: Dao et al., "Monarch: Expressive Structured Matrices for Efficient and
Accurate Training", ICML 2022, Theorem 1.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Inexact

from jaxlab._checks import is_whole
from jaxlab.structured.monarch.multiply import MonarchFactors


def monarch_project(
    matrix: Inexact[ArrayLike, "m n"],
    *,
    nblocks_in: int,
    nblocks_out: int,
    rank: int = 1,
) -> MonarchFactors:
    """Finds the Monarch factors nearest to a matrix in the Frobenius norm.

    Gradients do not pass: the factors are constants for autodiff, because singular
    vectors have no derivative where singular values repeat. `monarch_project_error`
    has one. A slice that holds a NaN or an infinity becomes NaN in both factors. The
    decompositions run in float32 at least.

    Args:
      matrix: real or complex, m rows (outputs) by n columns (inputs); map over
        further axes with ``jax.vmap``.
      nblocks_in: k, the blocks next to the input; must divide n.
      nblocks_out: l, the blocks next to the output; must divide m.
      rank: c, the rank of each slice, from 1 to min(m / l, n / k), where the
        projection is the matrix itself.

    Returns:
      ``w1`` of shape (k, c*l, n/k) and ``w2`` of shape (l, m/l, c*k), in the dtype
      of the matrix.

    Raises:
      ValueError: if ``matrix`` is not two-dimensional or holds integers, a number of
        blocks does not divide its side, or the rank is out of range.

    Examples:
      >>> from jaxlab.structured import monarch_to_dense
      >>> factors = monarch_project(jnp.diag(jnp.arange(4.0)), nblocks_in=2,
      ...                           nblocks_out=2)
      >>> monarch_to_dense(*factors).round(5).diagonal()
      Array([0., 1., 2., 3.], dtype=float32)
    """
    matrix = jnp.asarray(matrix)
    k, l, s, p = _sizes("monarch_project", matrix, nblocks_in, nblocks_out, rank)
    with jax.named_scope("monarch_project"):
        slices, valid = _slices(jax.lax.stop_gradient(matrix), (k, l, s, p))
        u, sigma, vh = jnp.linalg.svd(slices, full_matrices=False)
        root = jnp.sqrt(jnp.where(valid[..., None], sigma, jnp.nan))[..., :rank]
        first = root[..., None] * vh[..., :rank, :]  # (k, l, c, p)
        second = root[..., None, :] * u[..., :rank]  # (k, l, s, c)
        w1 = first.transpose(0, 2, 1, 3).reshape(k, rank * l, p)
        w2 = second.transpose(1, 2, 0, 3).reshape(l, s, k * rank)
        return MonarchFactors(w1.astype(matrix.dtype), w2.astype(matrix.dtype))


def monarch_project_error(
    matrix: Inexact[ArrayLike, "m n"],
    *,
    nblocks_in: int,
    nblocks_out: int,
    rank: int = 1,
) -> Float[Array, ""]:
    """Measures the squared Frobenius distance to the nearest Monarch matrix.

    The factors are not built. The gradient is ``2 * (matrix - projection)``, so the
    distance may stand in a loss that pulls weights towards the class.

    Args:
      matrix: real or complex, m rows by n columns.
      nblocks_in: k, the blocks next to the input; must divide n.
      nblocks_out: l, the blocks next to the output; must divide m.
      rank: c, the rank of each slice, from 1 to min(m / l, n / k).

    Returns:
      A real scalar in the squared units of the matrix, float32 at least; NaN if the
      matrix holds a NaN or an infinity.

    Raises:
      ValueError: as `monarch_project`.

    Examples:
      >>> monarch_project_error(jnp.eye(4)[jnp.array([0, 2, 1, 3])], nblocks_in=2,
      ...                       nblocks_out=2)
      Array(2., dtype=float32)
    """
    matrix = jnp.asarray(matrix)
    sizes = _sizes("monarch_project_error", matrix, nblocks_in, nblocks_out, rank)
    with jax.named_scope("monarch_project_error"):
        slices, valid = _slices(matrix, sizes)
        sigma = jnp.linalg.svd(slices, compute_uv=False)
        return jnp.where(valid.all(), jnp.sum(sigma[..., rank:] ** 2), jnp.nan)


def _slices(matrix: Array, sizes: tuple[int, int, int, int]) -> tuple[Array, Array]:
    """Cuts out the (k, l, s, p) slices; those that are not finite become zero.

    Backends differ in what they return for a slice that is not finite (LAPACK may
    give finite numbers for an infinity), so the callers put NaN in their place.
    """
    k, l, s, p = sizes
    matrix = matrix.astype(jnp.promote_types(matrix.dtype, jnp.float32))
    slices = matrix.reshape(s, l, k, p).transpose(2, 1, 0, 3)
    valid = jnp.isfinite(slices).all(axis=(2, 3))
    return jnp.where(valid[..., None, None], slices, 0), valid


def _sizes(
    name: str, matrix: Array, nblocks_in: int, nblocks_out: int, rank: int
) -> tuple[int, int, int, int]:
    """Computes (k, l, s, p) and checks them and the rank."""
    if matrix.ndim != 2:
        raise ValueError(
            f"{name}: the matrix must have two dimensions (outputs, inputs), got shape "
            f"{matrix.shape}; map over further axes with jax.vmap."
        )
    if not jnp.issubdtype(matrix.dtype, jnp.inexact):
        raise ValueError(
            f"{name}: the matrix must hold real or complex floating-point numbers, "
            f"got {matrix.dtype}; convert it with matrix.astype(jnp.float32)."
        )
    m, n = matrix.shape
    for key, blocks, side, letter in (
        ("nblocks_in", nblocks_in, n, "columns"),
        ("nblocks_out", nblocks_out, m, "rows"),
    ):
        if not is_whole(blocks) or blocks < 1 or side % blocks:
            raise ValueError(
                f"{name}: {key} must be at least 1 and divide the number of {letter}, "
                f"got {key}={blocks!r} for a matrix of shape {matrix.shape}; choose a "
                "divisor or pad the matrix with zeros."
            )
    s, p = m // nblocks_out, n // nblocks_in
    if not is_whole(rank) or not 1 <= rank <= min(s, p):
        raise ValueError(
            f"{name}: rank must be from 1 to min(m / nblocks_out, n / nblocks_in) = "
            f"min({s}, {p}) = {min(s, p)}, got rank={rank!r}; use fewer blocks for a "
            "higher rank."
        )
    return nblocks_in, nblocks_out, s, p
