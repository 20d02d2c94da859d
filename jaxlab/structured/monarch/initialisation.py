"""Fresh Monarch factors for any two widths.

Both factors have the same number b of blocks. Widths that b does not divide are padded:
``in_b = ceil(n / b)`` and ``out_b = ceil(m / b)``, and the caller pads the input with
zeros to b*in_b and cuts the output to m. The middle has min(in_b, out_b) entries a
block, or rank*b where a rank is given.

Reference: Dao et al., "Monarch: Expressive Structured Matrices for Efficient and
Accurate Training", ICML 2022. The official scheme is that of the authors' code; a
factor of uniform entries divides the variance by three, so two of them leave a ninth.
"""

import math

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Key

from jaxlab.structured.monarch.multiply import MonarchFactors

_SCHEMES = ("variance_preserving", "official")


def init_monarch(
    key: Key[Array, ""],
    in_features: int,
    out_features: int,
    *,
    nblocks: int = 4,
    rank: int | None = None,
    scheme: str = "variance_preserving",
    dtype: DTypeLike = jnp.float32,
) -> MonarchFactors:
    """Draws the factors of a Monarch matrix with ``nblocks`` blocks on either side.

    Args:
      key: a typed key.
      in_features: n, at least 1.
      out_features: m, at least 1.
      nblocks: b, the blocks of each factor, at least 1. Parameters are about 2/b of
        a dense square matrix.
      rank: of each slice of the matrix, from 1 to min(ceil(n / b), ceil(m / b)), so
        that the middle width is ``rank * b * b``; None makes the middle as wide as
        the narrower end, as the authors do.
      scheme: "variance_preserving" draws N(0, 1/fan_in), so that unit inputs give
        unit outputs; "official" draws U(-1/sqrt(fan_in), 1/sqrt(fan_in)), which
        leaves a ninth of the variance. fan_in is the last axis of each factor.
      dtype: real or, for "variance_preserving", complex.

    Returns:
      ``w1`` of shape (b, q, ceil(n / b)) and ``w2`` of shape (b, ceil(m / b), q),
      where q = min(ceil(n / b), ceil(m / b)) or rank * b.

    Raises:
      ValueError: if a size is below 1, the rank is out of range, or the scheme or the
        dtype is none of the above.

    Examples:
      >>> w1, w2 = init_monarch(jax.random.key(0), 24, 36, nblocks=4)
      >>> w1.shape, w2.shape
      ((4, 6, 6), (4, 9, 6))
    """
    dtype = jnp.dtype(dtype)
    _check(in_features, out_features, nblocks, rank, scheme, dtype)
    in_block, out_block = -(-in_features // nblocks), -(-out_features // nblocks)
    middle = min(in_block, out_block) if rank is None else rank * nblocks
    first, second = (nblocks, middle, in_block), (nblocks, out_block, middle)
    key_first, key_second = jax.random.split(key)
    return MonarchFactors(
        _draw(key_first, first, scheme, dtype), _draw(key_second, second, scheme, dtype)
    )


def _draw(
    key: Array, shape: tuple[int, int, int], scheme: str, dtype: jnp.dtype
) -> Array:
    bound = 1 / math.sqrt(shape[-1])
    if scheme == "official":
        return jax.random.uniform(key, shape, dtype, minval=-bound, maxval=bound)
    return jax.random.normal(key, shape, dtype) * jnp.asarray(bound, dtype)


def _check(
    in_features: int,
    out_features: int,
    nblocks: int,
    rank: int | None,
    scheme: str,
    dtype: jnp.dtype,
) -> None:
    if min(in_features, out_features, nblocks) < 1:
        raise ValueError(
            "init_monarch: in_features, out_features and nblocks must be at least 1, "
            f"got {in_features}, {out_features} and nblocks={nblocks}."
        )
    full = -(-min(in_features, out_features) // nblocks)
    if rank is not None and not 1 <= rank <= full:
        raise ValueError(
            "init_monarch: rank must be from 1 to min(ceil(in_features / nblocks), "
            f"ceil(out_features / nblocks)) = {full}, got rank={rank} for "
            f"{in_features} inputs, {out_features} outputs and nblocks={nblocks}; "
            "use rank=None for the usual middle or fewer blocks."
        )
    if scheme not in _SCHEMES:
        raise ValueError(
            f"init_monarch: scheme must be one of {_SCHEMES}, got {scheme!r}."
        )
    kinds = jnp.floating if scheme == "official" else jnp.inexact
    if not jnp.issubdtype(dtype, kinds):
        raise ValueError(
            "init_monarch: dtype must be a real or (with "
            f'scheme="variance_preserving") complex floating-point type, got {dtype} '
            f"with scheme={scheme!r}."
        )
