"""Fast transforms as Monarch factors: Fourier, Hadamard, circulant and Kronecker.

- A Kronecker product of A (s, k) and B (l, p) has the entries ``A[sigma, kappa]
  B[lam, pi]``, so its factors repeat B (next to the input) and A.
- Hadamard, natural order: ``H_n = H_k kron H_(n/k)``.
- Fourier, n = k*l, by Cooley and Tukey's step from size l to size k*l: with the input
  permuted by ``permutation[kappa*l + pi] = pi*k + kappa``,

      w1[kappa, lam, pi] = exp(-2 pi i lam pi / l) / sqrt(l)
      w2[lam, sigma, kappa] = exp(-2 pi i kappa (sigma l + lam) / n) / sqrt(k)

  The twiddles stand in w2. Repeating the step gives d factors, the mixed-radix FFT.
- Circulant: with F the Fourier matrix, M its Monarch part and Pi the permutation
  (F = M Pi = Ft), ``C = F^H diag(fft(c)) F = conj(M) (Pi diag(fft(c)) Pit) Mt``, a
  Monarch matrix times an adjoint one: three factors of MM*, with the spectrum in the
  one in the middle.

Reference: Dao et al., "Monarch: Expressive Structured Matrices for Efficient and
Accurate Training", ICML 2022, Section 3 and Proposition 2.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Complex, Inexact, Int

from jaxlab._checks import are_sizes, is_whole
from jaxlab.structured.monarch.multiply import MonarchFactors, _promote
from jaxlab.structured.monarch.recovery import MMStarFactors


class DFTFactors(NamedTuple):
    """Holds a Fourier transform as a permutation and two Monarch factors.

    Attributes:
      permutation: of the inputs, n integers.
      w1: blocks next to the input, shape (k, n/k, n/k).
      w2: blocks next to the output, shape (n/k, k, k).

    Examples:
      >>> DFTFactors(*dft_factors(6, nblocks=2)).permutation
      Array([0, 2, 4, 1, 3, 5], dtype=int32)
    """

    permutation: Int[Array, "n"]
    w1: Complex[Array, "k l l"]
    w2: Complex[Array, "l k k"]


def dft_factors(
    n: int, *, nblocks: int, inverse: bool = False, dtype: DTypeLike = jnp.complex64
) -> DFTFactors:
    """Builds the orthonormal Fourier transform as a Monarch product.

    ``monarch_matmul(x[..., permutation], w1, w2)`` is ``jnp.fft.fft(x, norm="ortho")``
    in ``n * (k + n/k)`` multiplications a row instead of ``n**2``.

    Args:
      n: the size, at least 1.
      nblocks: k, the blocks of the factor next to the input; must divide n.
      inverse: whether to build the inverse transform, the complex conjugate.
      dtype: a complex type.

    Returns:
      The permutation of the inputs and the two factors, unitary both.

    Raises:
      ValueError: if ``nblocks`` does not divide ``n`` or ``dtype`` is not complex.

    Examples:
      >>> permutation, w1, w2 = dft_factors(4, nblocks=2)
      >>> from jaxlab.structured import monarch_matmul
      >>> x = jnp.array([0.0, 2.0, 0.0, 0.0])
      >>> monarch_matmul(x[permutation], w1, w2).round(5) + 0.0
      Array([ 1.+0.j,  0.-1.j, -1.+0.j,  0.+1.j], dtype=complex64)
    """
    _check_blocks("dft_factors", n, nblocks)
    dtype = _check_complex("dft_factors", dtype)
    permutation, (w1, w2) = _dft((n // nblocks, nblocks), inverse, dtype)
    return DFTFactors(permutation, w1, w2)


def dft_chain_factors(
    radices: Sequence[int], *, inverse: bool = False, dtype: DTypeLike = jnp.complex64
) -> tuple[Int[Array, "n"], tuple[Complex[Array, "_ _ _"], ...]]:
    """Builds the orthonormal Fourier transform as one factor per radix.

    ``monarch_chain_matmul(x[..., permutation], factors)`` is ``jnp.fft.fft(x,
    norm="ortho")`` for n the product of the radices: the FFT of radix m where each of
    the d radices is m. A row costs ``n * sum(radices)`` multiplications.

    Args:
      radices: at least two sizes, each at least 1, that of the factor next to the
        input first.
      inverse: whether to build the inverse transform, the complex conjugate.
      dtype: a complex type.

    Returns:
      The permutation of the n inputs (digit reversal) and the factors, in the order
      in which they are applied; factor i has n / radices[i] blocks.

    Raises:
      ValueError: if there are fewer than two radices, one is below 1, or ``dtype``
        is not complex.

    Examples:
      >>> permutation, factors = dft_chain_factors((2, 2, 2))
      >>> permutation
      Array([0, 4, 2, 6, 1, 5, 3, 7], dtype=int32)
      >>> [factor.shape for factor in factors]
      [(4, 2, 2), (4, 2, 2), (4, 2, 2)]
    """
    if not are_sizes(radices) or len(radices) < 2:
        raise ValueError(
            "dft_chain_factors: radices must be at least two sizes, each at least 1, "
            f"got {radices!r}."
        )
    dtype = _check_complex("dft_chain_factors", dtype)
    return _dft(tuple(radices), inverse, dtype)


def hadamard_factors(
    n: int, *, nblocks: int, dtype: DTypeLike = jnp.float32
) -> MonarchFactors:
    """Builds the orthonormal Walsh-Hadamard transform, natural order, as Monarch.

    Args:
      n: the size, a power of two.
      nblocks: k, the blocks of the factor next to the input; must divide n.
      dtype: a real or complex floating-point type.

    Returns:
      ``w1`` of shape (k, n/k, n/k) and ``w2`` of shape (n/k, k, k), orthogonal both;
      the matrix is symmetric and its own inverse.

    Raises:
      ValueError: if ``n`` is not a power of two, ``nblocks`` does not divide it, or
        ``dtype`` is an integer type.

    Examples:
      >>> from jaxlab.structured import monarch_to_dense
      >>> 2 * monarch_to_dense(*hadamard_factors(4, nblocks=2)).round(5)
      Array([[ 1.,  1.,  1.,  1.],
             [ 1., -1.,  1., -1.],
             [ 1.,  1., -1., -1.],
             [ 1., -1., -1.,  1.]], dtype=float32)
    """
    if not is_whole(n) or n < 1 or n & (n - 1):
        raise ValueError(f"hadamard_factors: n must be a power of two, got {n}.")
    _check_blocks("hadamard_factors", n, nblocks)
    dtype = jnp.dtype(dtype)
    if not jnp.issubdtype(dtype, jnp.inexact):
        raise ValueError(
            f"hadamard_factors: dtype must be a floating-point type, got {dtype}."
        )
    left, right = (_hadamard(size) for size in (nblocks, n // nblocks))
    return kronecker_factors(jnp.asarray(left, dtype), jnp.asarray(right, dtype))


def kronecker_factors(
    a: Inexact[ArrayLike, "s k"], b: Inexact[ArrayLike, "l p"]
) -> MonarchFactors:
    """Builds the Monarch factors of the Kronecker product of two matrices.

    Each of the factors repeats one of the two matrices. Gradients pass.

    Args:
      a: the outer matrix, s by k.
      b: the inner matrix, l by p.

    Returns:
      ``w1`` of shape (k, l, p) and ``w2`` of shape (l, s, k), whose matrix is
      ``jnp.kron(a, b)``, in the common dtype of the two.

    Raises:
      ValueError: if one of them is not a matrix or holds integers.

    Examples:
      >>> from jaxlab.structured import monarch_to_dense
      >>> a, b = jnp.array([[1.0, 2.0]]), jnp.array([[3.0], [4.0]])
      >>> monarch_to_dense(*kronecker_factors(a, b))
      Array([[3., 6.],
             [4., 8.]], dtype=float32)
    """
    (a, b), _ = _promote("kronecker_factors", a=a, b=b)
    if a.ndim != 2 or b.ndim != 2:
        raise ValueError(
            "kronecker_factors: a and b must have two dimensions, got shapes "
            f"{a.shape} and {b.shape}."
        )
    return MonarchFactors(
        jnp.broadcast_to(b, (a.shape[1], *b.shape)),
        jnp.broadcast_to(a, (b.shape[0], *a.shape)),
    )


def circulant_factors(
    column: Inexact[ArrayLike, "n"], *, block: int | None = None
) -> MMStarFactors:
    """Builds the MM* factors of a circulant matrix.

    `mmstar_matmul` with them is the circular convolution with ``column``. The outer
    factors do not depend on the column; gradients pass through the middle one.

    Args:
      column: the first column of the matrix, n entries.
      block: b, the size of the middle blocks; must divide n. None takes the divisor
        with which a product costs least, one near ``sqrt(2 * n)``.

    Returns:
      Complex factors ``l1``, ``l2`` of shape (b, n/b, n/b) and ``r`` of shape
      (n/b, b, b), and a residual of 0. Where the column is real, so is the matrix up
      to rounding: take the real part of the products.

    Raises:
      ValueError: if ``column`` is not one-dimensional or holds integers, is empty, or
        ``block`` does not divide its size.

    Examples:
      >>> from jaxlab.structured import mmstar_to_dense
      >>> factors = circulant_factors(jnp.array([1.0, 2.0, 3.0, 4.0]))
      >>> mmstar_to_dense(factors)[:, 1].real.round(4)
      Array([4., 1., 2., 3.], dtype=float32)
    """
    (column,), dtype = _promote("circulant_factors", column=column)
    if column.ndim != 1 or not column.size:
        raise ValueError(
            "circulant_factors: column must have one dimension and an entry, got shape "
            f"{column.shape}; map over further axes with jax.vmap."
        )
    n = column.size
    if block is None:
        block = min(
            (b for b in range(1, n + 1) if n % b == 0), key=lambda b: b + 2 * n // b
        )
    if not is_whole(block) or block < 1 or n % block:
        raise ValueError(
            "circulant_factors: block must be at least 1 and divide the size of the "
            f"column, got block={block!r} for {n} entries."
        )
    with jax.named_scope("circulant_factors"):
        dtype = jnp.promote_types(dtype, jnp.complex64)
        permutation, (w1, w2) = _dft((block, n // block), False, dtype)
        spectrum = jnp.fft.fft(column.astype(dtype))[permutation]
        scaled = w1.conj() * spectrum.reshape(n // block, 1, block)
        middle = jnp.einsum("tij,tkj->tik", scaled, w1)
        zero = jnp.zeros((), spectrum.real.dtype)
        return MMStarFactors(w2.conj(), middle, w2.mT, zero)


def _dft(
    radices: tuple[int, ...], inverse: bool, dtype: jnp.dtype
) -> tuple[Array, tuple[Array, ...]]:
    """Computes permutation and factors on the host, in float64, then rounds."""
    sign = 1 if inverse else -1
    permutation, factors, size = np.zeros(1, int), [], 1
    for m in radices:
        # One step from the transform of `size` to that of m * size.
        kappa = np.arange(m)
        row = kappa[None, :, None] * size + np.arange(size)[:, None, None]
        turns = kappa * row % (m * size) / (m * size)
        factors = [np.tile(w, (m, 1, 1)) for w in factors]
        factors.append(np.exp(sign * 2j * np.pi * turns) / math.sqrt(m))
        permutation = (permutation * m + kappa[:, None]).ravel()
        size *= m
    return jnp.asarray(permutation), tuple(jnp.asarray(w, dtype) for w in factors)


def _hadamard(n: int) -> np.ndarray:
    """Computes the orthonormal matrix: the sign is the parity of common bits."""
    index = np.arange(n)
    parity = np.bitwise_count(index[:, None] & index) % 2
    return (1.0 - 2.0 * parity) / math.sqrt(n)


def _check_blocks(name: str, n: int, nblocks: int) -> None:
    if not are_sizes((n, nblocks)) or n % nblocks:
        raise ValueError(
            f"{name}: n and nblocks must be at least 1 and nblocks divide n, got "
            f"n={n!r} and nblocks={nblocks!r}."
        )


def _check_complex(name: str, dtype: DTypeLike) -> jnp.dtype:
    if not jnp.issubdtype(dtype, jnp.complexfloating):
        raise ValueError(
            f"{name}: dtype must be a complex type, got {jnp.dtype(dtype)}."
        )
    return jnp.dtype(dtype)
