"""The orders of operations in which a Monarch product is computed.

All compute the same numbers from operations that jax differentiates, transposes and
batches itself; the one derivative written here says how a cotangent is laid out, not
what it is. The forms differ in which arrays are laid out anew, and that decides the
time on a CPU, where XLA's batched product wants its batch axis first and packed and the
tokens of the forward product become the shuffled operands of the backward ones. With B
tokens, x is (B, k, p), the middle is (B, k, q) = (B, r, l) and the output (B, s, l); an
array is named below by its axes.

- plain: two einsums over the last axes, for compilers that choose layouts themselves.
- rows: kBp -> kBq -> lBr -> lBs, tokens as the rows of both products. Best for small
  blocks, where the passes over memory cost more than the products.
- mixed: kBp -> kBq -> kqB = rlB -> lrB -> lsB. Best for large blocks.
- features: tokens last throughout, kpB -> kqB = rlB -> lrB -> lsB; only the middle and
  the interleaved output are shuffled, both in contiguous runs of tokens.

Autodiff of these keeps kBp (or kpB) and the shuffled middle, and lays the cotangents
out anew once each.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Inexact

LARGE_BLOCK = 128  # from this width of the blocks on, the mixed form is used
PIECE_BYTES = 2**20  # of the output are interleaved at a time: half an L2 cache
MOST_PIECES = 32  # each is a loop of its own in the compiled program


def plain(
    x: Inexact[Array, "*batch n"],
    w1: Inexact[Array, "k q p"],
    w2: Inexact[Array, "l s r"],
    interleaved: bool,
) -> Inexact[Array, "*batch m"]:
    """Multiplies rows by two einsums."""
    (k, _, p), (l, s, r) = w1.shape, w2.shape
    batch = x.shape[:-1]
    wide = jnp.promote_types(x.dtype, jnp.float32)
    blocks = x.reshape(*batch, k, p)
    middle = jnp.einsum("...kp,kqp->...kq", blocks, w1, preferred_element_type=wide)
    middle = middle.astype(x.dtype).reshape(*batch, r, l)
    order = "...rl,lsr->...sl" if interleaved else "...rl,lsr->...ls"
    y = jnp.einsum(order, middle, w2, preferred_element_type=wide)
    return y.astype(x.dtype).reshape(*batch, s * l)


def packed(
    x: Inexact[Array, "*batch n"],
    w1: Inexact[Array, "k q p"],
    w2: Inexact[Array, "l s r"],
    interleaved: bool,
) -> Inexact[Array, "*batch m"]:
    """Multiplies rows in the rows or the mixed form, by the width of the blocks."""
    (k, q, p), (l, s, r) = w1.shape, w2.shape
    batch = x.shape[:-1]
    tokens = math.prod(batch)
    blocks = x.reshape(tokens, k, p).transpose(1, 0, 2)
    middle = _product(blocks, w1, 2, 2)  # kBq
    if min(q, s) < LARGE_BLOCK:
        middle = middle.transpose(1, 0, 2).reshape(tokens, r, l).transpose(2, 0, 1)
        y = _product(middle, w2, 2, 2)  # lBs
        y = _interleave(y) if interleaved else y.transpose(1, 0, 2)
    else:
        middle = middle.transpose(0, 2, 1).reshape(r, l, tokens).transpose(1, 0, 2)
        y = _product(w2, middle, 2, 1)  # lsB
        y = y.transpose(2, 1, 0) if interleaved else y.transpose(2, 0, 1)
    return y.reshape(*batch, s * l)


def features(
    x: Inexact[Array, "n *batch"],
    w1: Inexact[Array, "k q p"],
    w2: Inexact[Array, "l s r"],
    interleaved: bool,
) -> Inexact[Array, "m *batch"]:
    """Multiplies columns, tokens last throughout."""
    (k, _, p), (l, s, r) = w1.shape, w2.shape
    batch = x.shape[1:]
    tokens = math.prod(batch)
    middle = _product(w1, x.reshape(k, p, tokens), 2, 1)  # kqB
    middle = middle.reshape(r, l, tokens).transpose(1, 0, 2)
    y = _product(w2, middle, 2, 1)  # lsB
    if interleaved:
        y = y.transpose(1, 0, 2)
    return y.reshape(s * l, *batch)


def _product(
    a: Inexact[Array, "g _ _"], b: Inexact[Array, "g _ _"], axis_a: int, axis_b: int
) -> Inexact[Array, "g _ _"]:
    """Multiplies batches of matrices, summing in float32 at least."""
    dims = (((axis_a,), (axis_b,)), ((0,), (0,)))
    wide = jnp.promote_types(a.dtype, jnp.float32)
    y = lax.dot_general(a, b, dims, preferred_element_type=wide)
    return y.astype(a.dtype)


@jax.custom_jvp
def _interleave(y: Inexact[Array, "l tokens s"]) -> Inexact[Array, "tokens s l"]:
    """Interleaves the output; its cotangent comes back by pieces of the tokens.

    XLA's loops write in order, so that the pass over the cotangent, (B, s, l) to
    (l, B, s), reads a cache line anew for every entry of it. The pass over the output
    does not suffer, and is slower by pieces on some CPUs.
    """
    return y.transpose(1, 2, 0)


@_interleave.defjvp
def _(primals, tangents):
    return _interleave(*primals), _interleave_pieces(*tangents)


def _interleave_pieces(y: Inexact[Array, "l tokens s"]) -> Inexact[Array, "tokens s l"]:
    """Interleaves by pieces that stay in the cache.

    Autodiff turns split into concatenate and back, so the cotangent is cut as well.
    """
    l, tokens, s = y.shape
    row = max(1, l * s * y.dtype.itemsize)
    step = max(1, PIECE_BYTES // row, -(-tokens // MOST_PIECES))
    if tokens <= step:
        return y.transpose(1, 2, 0)
    whole, rest = divmod(tokens, step)
    sizes = [step] * whole + [rest] * (rest > 0)
    pieces = [piece.transpose(1, 2, 0) for piece in lax.split(y, sizes, 1)]
    return lax.concatenate(pieces, 0)
