"""Monarch products in one kernel: the middle activation stays on the chip.

Two products in a row write the middle to device memory and read it again. The kernels
here, in Pallas, do both products and the shuffle between them for a tile of tokens at a
time. Activations have the features first and the tokens last, and the output is
block-major, as in `monarch_matmul_features(..., output_layout="block_major")`.

- TPU: the middle of a tile lies in VMEM in float32, 128 tokens wide, so that block lam
  of the second factor reads its entries rho*l + lam as rows of stride l. The factors
  stay in VMEM for all tiles where they fit; else their blocks stream through it.
- GPU: each program makes output block lam of a tile from the c rows of every block of
  w1 that it needs. No other block needs them, so nothing is computed twice; the pieces
  of the middle never leave the registers.

Derivatives are those of the unfused product, which jax can differentiate in both modes
and any number of times; they compute the middle again.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.typing import ArrayLike
from jaxtyping import Array, Inexact

from jaxlab._checks import check_flag
from jaxlab.structured.monarch import _forms
from jaxlab.structured.monarch.multiply import (
    _check_factors,
    _check_width,
    _platform,
    _promote,
)

_DTYPES = ("bfloat16", "float16", "float32")
_LANES = 128  # tokens side by side in a vector register of a TPU
_VMEM = 48 * 2**20  # bytes of it that a kernel may plan with; the compiler adds some
_TILES = (1024, 512, 256, 128)  # tokens at a time on a TPU, the widest that fits
_LEAST_DOT = 16  # of every side of a product of Triton's


class _Sizes(NamedTuple):
    """The shapes of the factors; hashable."""

    k: int
    q: int
    p: int
    l: int
    s: int
    r: int


def monarch_matmul_fused(
    x: Inexact[ArrayLike, "n *batch"],
    w1: Inexact[ArrayLike, "k q p"],
    w2: Inexact[ArrayLike, "l s r"],
    *,
    platform: str | None = None,
    interpret: bool = False,
) -> Inexact[Array, "m *batch"]:
    """Multiplies columns by a Monarch matrix in one kernel, output block-major.

    It computes ``monarch_matmul_features(x, w1, w2, output_layout="block_major")``. No
    other function calls it: that it is faster has not been measured on any device.
    Products add up in float32; the middle is rounded to the dtype of the arrays.

    Args:
      x: columns of height n = k*p, bfloat16, float16 or float32; any further
        dimensions, empty ones too.
      w1: blocks next to the input, (k, q, p).
      w2: blocks next to the output, (l, s, r), with ``k * q == l * r``. On a GPU l must
        divide q, and c = q / l, p, s be powers of two from 16.
      platform: "tpu" or "gpu", where the program is compiled for another platform than
        the default backend, ``None``.
      interpret: compute what the kernel does without a compiler for it, slowly and on
        any device, for tests.

    Returns:
      Columns of height m = s*l with the further dimensions of ``x``.

    Raises:
      ValueError: if the factors do not fit together, ``x`` does not fit them, the
        common dtype is none of the three, the sizes are not those of the kernel, or
        the platform has none.

    Examples:
      >>> w1, w2 = jnp.ones((2, 16, 16)), jnp.ones((2, 16, 16))
      >>> y = monarch_matmul_fused(
      ...     jnp.ones((32, 3)), w1, w2, platform="tpu", interpret=True
      ... )
      >>> y[0]
      Array([256., 256., 256.], dtype=float32)
    """
    name = "monarch_matmul_fused"
    check_flag(name, interpret=interpret)
    (x, w1, w2), dtype = _promote(name, x=x, w1=w1, w2=w2)
    _check_factors(name, w1, w2)
    _check_width(name, x, w1, "first")
    if str(dtype) not in _DTYPES:
        raise ValueError(
            f"{name}: the common dtype must be one of {', '.join(_DTYPES)}, got "
            f"{dtype}; use monarch_matmul_features."
        )
    platform = _platform(name, platform)
    if platform not in ("gpu", "tpu"):
        raise ValueError(
            f'{name}: there is a kernel for platform="tpu" and "gpu", got '
            f'"{platform}"; use monarch_matmul_features or, in a test, pass '
            'platform="tpu", interpret=True.'
        )
    sizes = _Sizes(*w1.shape, *w2.shape)
    (_check_tpu if platform == "tpu" else _check_gpu)(name, sizes, dtype)
    batch = x.shape[1:]
    tokens = math.prod(batch)
    if not tokens:
        return jnp.zeros((sizes.l * sizes.s, *batch), dtype)
    with jax.named_scope(name):
        y = _fused(platform, interpret, x.reshape(x.shape[0], tokens), w1, w2)
        return y.reshape(y.shape[0], *batch)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _fused(platform: str, interpret: bool, x: Array, w1: Array, w2: Array) -> Array:
    sizes = _Sizes(*w1.shape, *w2.shape)
    kernel = _on_tpu if platform == "tpu" else _on_gpu
    return kernel(x, w1, w2, sizes=sizes, interpret=interpret)


@_fused.defjvp
def _fused_jvp(platform, interpret, primals, tangents):
    plain = lambda x, w1, w2: _forms.features(x, w1, w2, False)
    _, tangent = jax.jvp(plain, primals, tangents)
    return _fused(platform, interpret, *primals), tangent


def _dot(a: Array, b: Array) -> Array:
    """Multiplies two matrices, adding up in float32."""
    return lax.dot_general(
        a, b, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32
    )


# TPU ---------------------------------------------------------------------------------


def _check_tpu(name: str, sizes: _Sizes, dtype: jnp.dtype) -> None:
    """Refuses blocks that do not begin at a tile of the registers."""
    rows = 8 * 4 // dtype.itemsize
    wrong = {side: getattr(sizes, side) for side in "ps" if getattr(sizes, side) % rows}
    wrong |= {"q": sizes.q} if sizes.q % 8 else {}
    if wrong:
        raise ValueError(
            f"{name}: on a TPU p and s must be multiples of {rows} for {dtype} and q "
            f"of 8, got {wrong} from w1 of shape {sizes[:3]} and w2 of shape "
            f"{sizes[3:]}; use monarch_matmul_features."
        )


def _tile(sizes: _Sizes, tokens: int, itemsize: int, held: int, ends: int) -> int:
    """Chooses how many tokens are done at a time.

    Args:
      sizes: of the factors.
      tokens: how many there are.
      itemsize: bytes of a number.
      held: numbers of the factors in VMEM; everything that moves is there twice.
      ends: rows of input and output in VMEM.

    Returns:
      The tile, the least one if none fits: the compiler then says so.
    """
    for tile in _TILES:
        moving = 2 * itemsize * (held + ends * tile)
        fits = moving + 4 * sizes.k * sizes.q * tile <= _VMEM
        if fits and (tile < 2 * tokens or tile == _TILES[-1]):
            return tile
    return _TILES[-1]


def _on_tpu(x: Array, w1: Array, w2: Array, *, sizes: _Sizes, interpret: bool) -> Array:
    from jax.experimental.pallas import tpu

    k, q, p, l, s, r = sizes
    n, tokens = x.shape
    item = x.dtype.itemsize
    resident = 2 * item * (w1.size + w2.size) <= 2 * _VMEM // 3
    if resident:
        tile = _tile(sizes, tokens, item, w1.size + w2.size, n + s * l)
        grid = (pl.cdiv(tokens, tile),)
        kernel = _resident
        specs = [
            pl.BlockSpec((n, tile), lambda i: (0, i)),
            pl.BlockSpec(w1.shape, lambda i: (0, 0, 0)),
            pl.BlockSpec(w2.shape, lambda i: (0, 0, 0)),
        ]
        out_spec = pl.BlockSpec((s * l, tile), lambda i: (0, i))
    else:
        tile = _tile(sizes, tokens, item, q * p + s * r, p + s)
        grid = (pl.cdiv(tokens, tile), k + l)
        kernel = _streamed
        first = lambda j: jnp.minimum(j, k - 1)
        second = lambda j: jnp.maximum(j - k, 0)
        specs = [
            pl.BlockSpec((p, tile), lambda i, j: (first(j), i)),
            pl.BlockSpec((1, q, p), lambda i, j: (first(j), 0, 0)),
            pl.BlockSpec((1, s, r), lambda i, j: (second(j), 0, 0)),
        ]
        out_spec = pl.BlockSpec((s, tile), lambda i, j: (second(j), i))
    return pl.pallas_call(
        functools.partial(kernel, sizes=sizes, pieces=tile // _LANES),
        grid=grid,
        in_specs=specs,
        out_specs=out_spec,
        out_shape=jax.ShapeDtypeStruct((s * l, tokens), x.dtype),
        scratch_shapes=[tpu.VMEM((k * q * (tile // _LANES), _LANES), jnp.float32)],
        compiler_params=tpu.CompilerParams(vmem_limit_bytes=_VMEM + 14 * 2**20),
        interpret=interpret,
        name="monarch_matmul_fused",
    )(x, w1, w2)


def _resident(x_ref, w1_ref, w2_ref, y_ref, h_ref, *, sizes: _Sizes, pieces: int):
    """Does all blocks of a tile; both factors are at hand."""
    k, p, l, s = sizes.k, sizes.p, sizes.l, sizes.s

    def first(kappa, carry):
        block = pl.ds(pl.multiple_of(kappa * p, p), p)
        _write_middle(x_ref.at[block, :], w1_ref[kappa], h_ref, kappa, sizes, pieces)
        return carry

    def second(lam, carry):
        block = pl.ds(pl.multiple_of(lam * s, s), s)
        _read_middle(h_ref, w2_ref[lam], y_ref.at[block, :], lam, sizes, pieces)
        return carry

    lax.fori_loop(0, k, first, 0)
    lax.fori_loop(0, l, second, 0)


def _streamed(x_ref, w1_ref, w2_ref, y_ref, h_ref, *, sizes: _Sizes, pieces: int):
    """Does one block of either factor; the blocks of the first come first."""
    step = pl.program_id(1)

    @pl.when(step < sizes.k)
    def _():
        _write_middle(x_ref, w1_ref[0], h_ref, step, sizes, pieces)

    @pl.when(step >= sizes.k)
    def _():
        _read_middle(h_ref, w2_ref[0], y_ref, step - sizes.k, sizes, pieces)


def _write_middle(x_ref, w, h_ref, kappa, sizes: _Sizes, pieces: int) -> None:
    """Writes block kappa of the middle, 128 tokens under one another."""
    rows, q = sizes.k * sizes.q, sizes.q
    for piece in range(pieces):
        lanes = pl.ds(piece * _LANES, _LANES)
        block = pl.ds(pl.multiple_of(piece * rows + kappa * q, 8), q)
        h_ref[block, :] = _dot(w, x_ref[:, lanes])


def _read_middle(h_ref, w, y_ref, lam, sizes: _Sizes, pieces: int) -> None:
    """Reads the entries of block lam, of stride l, and writes its outputs."""
    rows, l, r = sizes.k * sizes.q, sizes.l, sizes.r
    for piece in range(pieces):
        lanes = pl.ds(piece * _LANES, _LANES)
        middle = h_ref[pl.ds(piece * rows + lam, r, stride=l), :]
        y_ref[:, lanes] = _dot(w, middle.astype(w.dtype)).astype(y_ref.dtype)


# GPU ---------------------------------------------------------------------------------


def _check_gpu(name: str, sizes: _Sizes, dtype: jnp.dtype) -> None:
    """Refuses blocks that Triton's products do not take."""
    q, p, l, s = sizes[1:5]
    sides = {"c = q / l": q // l if q % l == 0 else q / l, "p": p, "s": s}
    wrong = {
        side: value
        for side, value in sides.items()
        if value < _LEAST_DOT or value != int(value) or int(value) & (int(value) - 1)
    }
    if wrong:
        raise ValueError(
            f"{name}: on a GPU c = q / l, p and s must be powers of two from "
            f"{_LEAST_DOT}, got {wrong} from w1 of shape {sizes[:3]} and w2 of shape "
            f"{sizes[3:]}; use monarch_matmul_features."
        )


def _on_gpu(x: Array, w1: Array, w2: Array, *, sizes: _Sizes, interpret: bool) -> Array:
    from jax.experimental.pallas import triton

    k, q, p, l, s, r = sizes
    tokens = x.shape[1]
    c, tile = q // l, 64 if s <= 256 else 32 if s <= 1024 else 16
    missing = -tokens % tile
    if missing:
        x = jnp.pad(x, [(0, 0), (0, missing)])
    # The rows of w1 that block lam needs, one after the other.
    first = w1.reshape(k, c, l, p).transpose(2, 0, 1, 3).reshape(l * k * c, p)
    y = pl.pallas_call(
        functools.partial(_gpu_kernel, sizes=sizes, tile=tile),
        grid=(x.shape[1] // tile, l),
        out_shape=jax.ShapeDtypeStruct((s * l, x.shape[1]), x.dtype),
        compiler_params=triton.CompilerParams(num_warps=8, num_stages=2),
        interpret=interpret,
        name="monarch_matmul_fused",
    )(x, first, w2.reshape(l * s, r))
    return y[:, :tokens]


def _gpu_kernel(x_ref, w1_ref, w2_ref, y_ref, *, sizes: _Sizes, tile: int):
    """Makes output block lam of a tile of tokens."""
    k, q, p, l, s, _ = sizes
    c = q // l
    rows, deep = min(c, 32), min(p, 64)
    lam = pl.program_id(1)
    columns = pl.ds(pl.program_id(0) * tile, tile)

    def middle(start):
        """Computes some rows of the middle; ``start`` counts from (lam, 0, 0)."""
        kappa = start // c

        def add(i, total):
            entries = pl.ds(i * deep, deep)
            w = w1_ref[pl.ds(lam * k * c + start, rows), entries]
            return total + _dot(w, x_ref[pl.ds(kappa * p + i * deep, deep), columns])

        return lax.fori_loop(0, p // deep, add, jnp.zeros((rows, tile), jnp.float32))

    def add(i, total):
        start = i * rows
        h = middle(start).astype(x_ref.dtype)
        return total + _dot(w2_ref[pl.ds(lam * s, s), pl.ds(start, rows)], h)

    zero = jnp.zeros((s, tile), jnp.float32)
    y = lax.fori_loop(0, k * c // rows, add, zero)
    y_ref[pl.ds(lam * s, s), columns] = y.astype(y_ref.dtype)
