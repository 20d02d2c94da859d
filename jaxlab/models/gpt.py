"""GPT: decoder-only transformer over tokens, with the head tied to the embedding.

``x = E[tokens] + P[0..time)``, pre-norm causal blocks, a last layer norm, and logits
``LN(x) E^T``. As in GPT-2: learned positions, biases, GELU, the head is the
embedding matrix itself, and E and P start at normal(0, 0.02). Unlike GPT-2: no
dropout, and the dense layers start as their ``linear`` factory says (residual layers
are not scaled down by depth). The embedding is a table, not a dense layer: with the
head tied to it, neither comes from the factory.

With ``scan=True`` the blocks stand stacked, every parameter with one leading axis of
``layers``, and run in one ``jax.lax.scan``: the program and its compile time no longer
grow with the depth, which is what deep models on many chips need.

Reference: Radford, Wu, Child, Luan, Amodei, Sutskever, "Language Models are
Unsupervised Multitask Learners", 2019.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxlab.models.inputs import check_sizes
from jaxlab.models.transformer import Block


class GPT(nnx.Module):
    """Predicts each next token of a sequence from the tokens before it.

    Tokens are 0 to ``vocabulary - 1``; a larger one makes its whole sequence NaN.

    Args:
      vocabulary: number of distinct tokens.
      context: the longest sequence.
      width: of the residual stream.
      layers: number of blocks.
      heads: number of attention heads; it divides ``width``.
      linear: factory of the six dense layers of each block.
      feedforward_linear: factory of the two of each two-layer map; ``linear`` if None.
      scan: stacks the parameters of the blocks and scans over them. The seeds then give
        other numbers than without.
      remat: recomputes each block in the backward pass: what is stored of it is its
        input.
      dtype: of the residual stream and the logits, such as bfloat16; parameters stay
        float32. A factory's own dtype is set there: ``partial(nnx.Linear,
        dtype=jnp.bfloat16)``.
      activation_sharding: how the residual stream (batch, time, width) lies on a mesh,
        held so after the embedding and after each block. Without it XLA may follow the
        parameters instead, and give every device the whole batch of a narrow slice:
        ``batch_sharding(mesh)`` of :mod:`jaxlab.training` is what one wants there.
      rngs: random streams of the parameters.

    Raises:
      ValueError: if a size is below 1 or ``heads`` does not divide ``width``; from a
        call, where tokens are not integers or are more than ``context``.

    Examples:
      >>> from flax import nnx
      >>> sizes = {"vocabulary": 7, "context": 5, "width": 8, "layers": 1, "heads": 2}
      >>> model = GPT(**sizes, rngs=nnx.Rngs(0))
      >>> model(jnp.array([[0, 3, 6]])).shape
      (1, 3, 7)
    """

    def __init__(
        self,
        *,
        vocabulary: int,
        context: int,
        width: int,
        layers: int,
        heads: int,
        linear: Callable[..., Any] = nnx.Linear,
        feedforward_linear: Callable[..., Any] | None = None,
        scan: bool = False,
        remat: bool = False,
        dtype: DTypeLike | None = None,
        activation_sharding: jax.sharding.Sharding | None = None,
        rngs: nnx.Rngs,
    ):
        check_sizes(
            "GPT", vocabulary=vocabulary, context=context, width=width, layers=layers
        )
        normal = nnx.initializers.normal(0.02)
        self.context = context
        self.scan = scan
        self.remat = remat
        self.dtype = dtype
        self.activation_sharding = activation_sharding
        self.embedding = nnx.Embed(
            vocabulary, width, dtype=dtype, embedding_init=normal, rngs=rngs
        )
        self.positions = nnx.Param(normal(rngs.params(), (context, width), jnp.float32))

        def block(rngs: nnx.Rngs) -> Block:
            return Block(
                width,
                heads,
                causal=True,
                linear=linear,
                feedforward_linear=feedforward_linear,
                dtype=dtype,
                rngs=rngs,
            )

        if scan:
            self.blocks = nnx.vmap(block)(rngs.split(layers))
        else:
            self.blocks = nnx.List([block(rngs) for _ in range(layers)])
        self.norm = nnx.LayerNorm(width, dtype=dtype, rngs=rngs)

    def __call__(
        self, tokens: Int[Array, "... time"]
    ) -> Float[Array, "... time vocabulary"]:
        """Computes logits ``(..., time, vocabulary)`` of tokens ``(..., time)``.

        Row t of the logits depends on tokens 0 to t alone.
        """
        tokens = jnp.asarray(tokens)
        if not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise ValueError(f"GPT: tokens must be integers, got {tokens.dtype}.")
        if tokens.ndim == 0 or tokens.shape[-1] > self.context:
            raise ValueError(
                "GPT: tokens must have shape (..., time) with time at most "
                f"{self.context}, the context of this model; got {tokens.shape}."
            )
        x = self.embedding(tokens)
        positions = self.positions[: tokens.shape[-1]].astype(x.dtype)
        x = self._held(x + jnp.broadcast_to(positions, x.shape))
        return self.embedding.attend(self.norm(self._through(x)))

    def _held(self, x: Float[Array, "... time width"]):
        if self.activation_sharding is None:
            return x
        return jax.lax.with_sharding_constraint(x, self.activation_sharding)

    def _through(self, x: Float[Array, "... time width"]):
        def pure(params, x, graph):
            return self._held(nnx.merge(graph, params)(x))

        once = pure
        if self.remat:
            # In a scan nothing else can be merged with what is computed again; asking
            # to prevent that would gather the weights from other devices once more.
            once = jax.checkpoint(pure, static_argnums=2, prevent_cse=not self.scan)
        if self.scan:
            graph, stack = nnx.split(self.blocks)
            body = lambda x, params: (once(params, x, graph), None)
            return jax.lax.scan(body, x, stack)[0]
        for block in self.blocks:
            graph, params = nnx.split(block)
            x = once(params, x, graph)
        return x


def gpt_s(
    *,
    vocabulary: int = 98,
    linear: Callable[..., Any] = nnx.Linear,
    rngs: nnx.Rngs,
) -> GPT:
    """Builds GPT-S: width 128, 4 layers, 4 heads, context 128.

    Args:
      vocabulary: number of distinct tokens; 98 are the printable ASCII characters,
        newline, tab, and one for all others.
      linear: factory of the 24 dense layers.
      rngs: random streams of the parameters.

    Returns:
      The module (822,272 parameters when dense); tokens ``(..., time)``, logits
      ``(..., time, vocabulary)``.

    Examples:
      >>> from flax import nnx
      >>> model = nnx.eval_shape(lambda: gpt_s(rngs=nnx.Rngs(0)))
      >>> model.positions.shape, model.embedding.embedding.shape
      ((128, 128), (98, 128))
    """
    return GPT(
        vocabulary=vocabulary,
        context=128,
        width=128,
        layers=4,
        heads=4,
        linear=linear,
        rngs=rngs,
    )


def gpt_m(
    *,
    vocabulary: int = 98,
    linear: Callable[..., Any] = nnx.Linear,
    rngs: nnx.Rngs,
) -> GPT:
    """Builds GPT-M, for accelerators: width 512, 8 layers, 8 heads, context 512.

    Args:
      vocabulary: number of distinct tokens, as in :func:`gpt_s`.
      linear: factory of the 48 dense layers.
      rngs: random streams of the parameters.

    Returns:
      The module (25.5 million parameters when dense); tokens ``(..., time)``, logits
      ``(..., time, vocabulary)``.

    Examples:
      >>> from flax import nnx
      >>> model = nnx.eval_shape(lambda: gpt_m(rngs=nnx.Rngs(0)))
      >>> model.positions.shape, len(model.blocks)
      ((512, 512), 8)
    """
    return GPT(
        vocabulary=vocabulary,
        context=512,
        width=512,
        layers=8,
        heads=8,
        linear=linear,
        rngs=rngs,
    )
