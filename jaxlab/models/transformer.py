"""Pre-norm transformer block: self-attention and a two-layer map, both residual.

``y = x + A(LN(x))``, ``block(x) = y + F(LN(y))`` with ``F(x) = W_d gelu(W_u x)`` and,
per head of width h, ``softmax(Q K^T / sqrt(h)) V``, the heads side by side through one
more dense layer. The six dense layers come from the ``linear`` factory; the softmax is
in float32. Layer norms and biases as in GPT-2; no dropout. The bias of the keys shifts
all scores of a query alike, which the softmax ignores: its gradient is zero.

References: Vaswani et al., "Attention Is All You Need", NeurIPS 2017; Xiong et al.,
"On Layer Normalization in the Transformer Architecture", ICML 2020 (pre-norm).
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxlab._checks import are_sizes

Tokens = Float[Array, "... time width"]


class Feedforward(nnx.Module):
    """Maps the last axis to ``hidden`` numbers, through GELU, and back.

    Args:
      width: of inputs and outputs.
      hidden: width between.
      linear: factory of both layers.
      rngs: random streams of the parameters.

    Examples:
      >>> from flax import nnx
      >>> Feedforward(4, 16, rngs=nnx.Rngs(0))(jnp.ones((3, 4))).shape
      (3, 4)
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        *,
        linear: Callable[..., Any] = nnx.Linear,
        rngs: nnx.Rngs,
    ):
        self.up = linear(width, hidden, rngs=rngs)
        self.down = linear(hidden, width, rngs=rngs)

    def __call__(self, x: Float[Array, "... width"]) -> Float[Array, "... width"]:
        """Computes ``(..., width)`` from ``(..., width)``."""
        return self.down(nnx.gelu(self.up(x)))


class SelfAttention(nnx.Module):
    """Mixes positions by multi-head attention of a sequence to itself.

    Args:
      width: of inputs and outputs.
      heads: number of heads; it divides ``width``.
      causal: whether a position sees only itself and earlier ones.
      linear: factory of the query, key, value and output layers.
      rngs: random streams of the parameters.

    Raises:
      ValueError: if ``heads`` does not divide ``width``.

    Examples:
      >>> from flax import nnx
      >>> model = SelfAttention(8, 2, causal=True, rngs=nnx.Rngs(0))
      >>> model(jnp.ones((3, 5, 8))).shape
      (3, 5, 8)
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        causal: bool,
        linear: Callable[..., Any] = nnx.Linear,
        rngs: nnx.Rngs,
    ):
        if not are_sizes((heads, width)) or width % heads:
            raise ValueError(
                f"SelfAttention: heads must divide width, got width={width} and "
                f"heads={heads}."
            )
        self.heads = heads
        self.causal = causal
        self.query = linear(width, width, rngs=rngs)
        self.key = linear(width, width, rngs=rngs)
        self.value = linear(width, width, rngs=rngs)
        self.out = linear(width, width, rngs=rngs)

    def __call__(self, x: Tokens) -> Tokens:
        """Computes ``(..., time, width)`` from ``(..., time, width)``."""
        *lead, time, width = x.shape
        # The attention of jax takes exactly one axis before time.
        split = (math.prod(lead), time, self.heads, width // self.heads)
        q, k, v = (f(x).reshape(split) for f in (self.query, self.key, self.value))
        mixed = jax.nn.dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(mixed.reshape(x.shape))


class Block(nnx.Module):
    """Adds attention and then a two-layer map, each behind a layer norm.

    Args:
      width: of inputs and outputs.
      heads: number of heads; it divides ``width``.
      causal: whether a position sees only itself and earlier ones.
      hidden: width inside the two-layer map; four times ``width`` if None.
      linear: factory of the six dense layers.
      feedforward_linear: factory of the two of the two-layer map; ``linear`` if None.
      dtype: of what the layer norms give; the dense layers' own is their factory's.
      rngs: random streams of the parameters.

    Raises:
      ValueError: if ``heads`` does not divide ``width``.

    Examples:
      >>> from flax import nnx
      >>> Block(8, 2, causal=False, rngs=nnx.Rngs(0))(jnp.ones((3, 5, 8))).shape
      (3, 5, 8)
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        causal: bool,
        hidden: int | None = None,
        linear: Callable[..., Any] = nnx.Linear,
        feedforward_linear: Callable[..., Any] | None = None,
        dtype: DTypeLike | None = None,
        rngs: nnx.Rngs,
    ):
        hidden = 4 * width if hidden is None else hidden
        inner = linear if feedforward_linear is None else feedforward_linear
        self.norm1 = nnx.LayerNorm(width, dtype=dtype, rngs=rngs)
        self.attention = SelfAttention(
            width, heads, causal=causal, linear=linear, rngs=rngs
        )
        self.norm2 = nnx.LayerNorm(width, dtype=dtype, rngs=rngs)
        self.feedforward = Feedforward(width, hidden, linear=inner, rngs=rngs)

    def __call__(self, x: Tokens) -> Tokens:
        """Computes ``(..., time, width)`` from ``(..., time, width)``."""
        x = x + self.attention(self.norm1(x))
        return x + self.feedforward(self.norm2(x))
