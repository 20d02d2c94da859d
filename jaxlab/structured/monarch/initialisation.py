"""Fresh Monarch factors for any two widths.

Both factors have the same number b of blocks. Widths that b does not divide are padded:
``in_b = ceil(n / b)`` and ``out_b = ceil(m / b)``, and the caller pads the input with
zeros to b*in_b and cuts the output to m. The middle has min(in_b, out_b) entries a
block, or rank*b where a rank is given.

Reference: Dao et al., "Monarch: Expressive Structured Matrices for Efficient and
Accurate Training", ICML 2022. The official scheme is that of the authors' code; a
factor of uniform entries divides the variance by three, so two of them leave a ninth.

The scheme "mup" treats each factor as a dense layer of its own, with d_in entries in
and d_out out of each block, ranks included:

    std of the entries = sqrt(min(d_in, d_out)) / d_in
    Adam's learning rate = that of the dense layer * (n / d_in) / 2

where 2 is the number of factors. With the learning rate of the dense layer in
proportion to 1/n, a step changes the features by as much at every width, so the best
rate of a small model is that of a large one.

Reference for "mup": Qiu, Potapczynski, Finzi, Goldblum and Wilson, "Compute Better
Spent: Replacing Dense Layers with Structured Matrices", ICML 2024.
"""

import math

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Key

from jaxlab._checks import are_sizes, is_whole
from jaxlab.structured.monarch.multiply import MonarchFactors

_SCHEMES = ("variance_preserving", "official", "mup")


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
        leaves a ninth of the variance; "mup" draws N(0, min(fan_in, fan_out) /
        fan_in^2), which keeps the spectral norm, and so the output wherever no
        factor narrows, and wants the learning rates of `monarch_mup_multipliers`.
        fan_in is the last axis of each factor, fan_out the one before.
      dtype: real or, unless the scheme is "official", complex.

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
    _check_sizes("init_monarch", in_features, out_features, nblocks, rank)
    _check_kind(scheme, dtype)
    first, second = _shapes(in_features, out_features, nblocks, rank)
    key_first, key_second = jax.random.split(key)
    return MonarchFactors(
        _draw(key_first, first, scheme, dtype), _draw(key_second, second, scheme, dtype)
    )


def monarch_mup_multipliers(
    in_features: int,
    out_features: int,
    *,
    nblocks: int = 4,
    rank: int | None = None,
) -> tuple[float, float]:
    """Gives the factors of Adam's learning rate that go with the scheme "mup".

    They multiply the rate that the dense layer would have, which itself falls as
    1/in_features with the width. They are for Adam and its kin, whose steps do not
    depend on the scale of the gradient; biases keep the rate of the dense layer's.

    Args:
      in_features: n, as for `init_monarch`.
      out_features: m, as for `init_monarch`.
      nblocks: b, as for `init_monarch`.
      rank: as for `init_monarch`.

    Returns:
      The multipliers of ``w1`` and of ``w2``, ``n / (2 * d_in)`` with d_in the last
      axis of each.

    Raises:
      ValueError: as `init_monarch`.

    Examples:
      Scale each update by its own number, whatever the names in the tree are:

      >>> import optax
      >>> from jaxlab.structured import MonarchFactors, monarch_mup_multipliers
      >>> scales = monarch_mup_multipliers(1024, 1024, nblocks=4, rank=8)
      >>> scales
      (2.0, 16.0)
      >>> optimizer = optax.chain(
      ...     optax.adam(0.5),
      ...     optax.partition(
      ...         {"w1": optax.scale(scales[0]), "w2": optax.scale(scales[1])},
      ...         MonarchFactors("w1", "w2"),
      ...     ),
      ... )
      >>> params = init_monarch(jax.random.key(0), 1024, 1024, rank=8, scheme="mup")
      >>> ones = jax.tree.map(jnp.ones_like, params)
      >>> updates, _ = optimizer.update(ones, optimizer.init(params))
      >>> [float(w.mean().round(3)) for w in updates]
      [-1.0, -8.0]
    """
    _check_sizes("monarch_mup_multipliers", in_features, out_features, nblocks, rank)
    first, second = _shapes(in_features, out_features, nblocks, rank)
    return in_features / (2 * first[-1]), in_features / (2 * second[-1])


def _draw(
    key: Array, shape: tuple[int, int, int], scheme: str, dtype: jnp.dtype
) -> Array:
    bound = 1 / math.sqrt(shape[-1])
    if scheme == "official":
        return jax.random.uniform(key, shape, dtype, minval=-bound, maxval=bound)
    if scheme == "mup":
        bound *= math.sqrt(min(shape[1:]) / shape[-1])
    return jax.random.normal(key, shape, dtype) * jnp.asarray(bound, dtype)


def _shapes(
    in_features: int, out_features: int, nblocks: int, rank: int | None
) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    in_block, out_block = -(-in_features // nblocks), -(-out_features // nblocks)
    middle = min(in_block, out_block) if rank is None else rank * nblocks
    return (nblocks, middle, in_block), (nblocks, out_block, middle)


def _check_sizes(
    name: str, in_features: int, out_features: int, nblocks: int, rank: int | None
) -> None:
    if not are_sizes((in_features, out_features, nblocks)):
        raise ValueError(
            f"{name}: in_features, out_features and nblocks must be at least 1, "
            f"integers, got {in_features!r}, {out_features!r} and nblocks={nblocks!r}."
        )
    full = -(-min(in_features, out_features) // nblocks)
    if rank is not None and not (is_whole(rank) and 1 <= rank <= full):
        raise ValueError(
            f"{name}: rank must be from 1 to min(ceil(in_features / nblocks), "
            f"ceil(out_features / nblocks)) = {full}, got rank={rank} for "
            f"{in_features} inputs, {out_features} outputs and nblocks={nblocks}; "
            "use rank=None for the usual middle or fewer blocks."
        )


def _check_kind(scheme: str, dtype: jnp.dtype) -> None:
    if scheme not in _SCHEMES:
        raise ValueError(
            f"init_monarch: scheme must be one of {_SCHEMES}, got {scheme!r}."
        )
    kinds = jnp.floating if scheme == "official" else jnp.inexact
    if not jnp.issubdtype(dtype, kinds):
        raise ValueError(
            'init_monarch: dtype must be a real or (unless scheme="official") complex '
            f"floating-point type, got {dtype} with scheme={scheme!r}."
        )
