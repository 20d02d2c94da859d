"""MLP-Mixer: patches and channels mixed in turn, by two-layer maps alone.

Each block is ``y = x + F_t(LN(x)^T)^T``, ``z = y + F_c(LN(y))``, where ``F_t`` maps
across patches and ``F_c`` across channels. A last layer norm, the mean over patches,
and one dense layer give the logits. The output bias of ``F_t`` adds one number to all
channels of a patch, which every later layer norm removes: as in the paper's network
it is there and has no effect, so its gradient is zero.

Reference: Tolstikhin et al., "MLP-Mixer: An all-MLP Architecture for Vision",
NeurIPS 2021.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxlab.models.inputs import as_images, check_patches, check_sizes, patches
from jaxlab.models.transformer import Feedforward, Tokens


class MixerBlock(nnx.Module):
    """Mixes patches, then channels, each behind a layer norm and residual.

    Args:
      tokens: number of patches.
      width: channels of one patch.
      token_hidden: width inside the map across patches.
      channel_hidden: width inside the map across channels.
      linear: factory of the four dense layers.
      rngs: random streams of the parameters.

    Examples:
      >>> from flax import nnx
      >>> sizes = {"tokens": 4, "width": 8, "token_hidden": 2, "channel_hidden": 16}
      >>> MixerBlock(**sizes, rngs=nnx.Rngs(0))(jnp.ones((3, 4, 8))).shape
      (3, 4, 8)
    """

    def __init__(
        self,
        *,
        tokens: int,
        width: int,
        token_hidden: int,
        channel_hidden: int,
        linear: Callable[..., Any] = nnx.Linear,
        rngs: nnx.Rngs,
    ):
        self.norm1 = nnx.LayerNorm(width, rngs=rngs)
        self.across_tokens = Feedforward(tokens, token_hidden, linear=linear, rngs=rngs)
        self.norm2 = nnx.LayerNorm(width, rngs=rngs)
        self.across_channels = Feedforward(
            width, channel_hidden, linear=linear, rngs=rngs
        )

    def __call__(self, x: Tokens) -> Tokens:
        """Computes ``(..., tokens, width)`` from ``(..., tokens, width)``."""
        x = x + self.across_tokens(self.norm1(x).swapaxes(-1, -2)).swapaxes(-1, -2)
        return x + self.across_channels(self.norm2(x))


class Mixer(nnx.Module):
    """Classifies square images by mixing their patches and channels.

    Args:
      side: pixels along each edge.
      patch: pixels along the edge of a patch; it divides ``side``.
      width: channels of one patch inside the network.
      blocks: number of blocks.
      token_hidden: width inside the maps across patches.
      channel_hidden: width inside the maps across channels.
      outputs: logits of one image.
      channels: numbers of one pixel.
      linear: factory of every dense layer, embedding of patches and head included.
      rngs: random streams of the parameters.

    Raises:
      ValueError: if a size is below 1 or ``patch`` does not divide ``side``; from a
        call, where the inputs are no images of this size.

    Examples:
      >>> from flax import nnx
      >>> sizes = {"side": 4, "patch": 2, "width": 8, "blocks": 1, "outputs": 3}
      >>> hidden = {"token_hidden": 4, "channel_hidden": 16}
      >>> model = Mixer(**sizes, **hidden, rngs=nnx.Rngs(0))
      >>> model(jnp.zeros((5, 16))).shape
      (5, 3)
    """

    def __init__(
        self,
        *,
        side: int,
        patch: int,
        width: int,
        blocks: int,
        token_hidden: int,
        channel_hidden: int,
        outputs: int,
        channels: int = 1,
        linear: Callable[..., Any] = nnx.Linear,
        rngs: nnx.Rngs,
    ):
        inner = {
            "width": width,
            "token_hidden": token_hidden,
            "channel_hidden": channel_hidden,
        }
        outer = {"side": side, "patch": patch, "channels": channels}
        check_sizes("Mixer", blocks=blocks, outputs=outputs, **outer, **inner)
        check_patches("Mixer", side, patch)
        self.side = side
        self.patch = patch
        self.channels = channels
        self.embed = linear(patch * patch * channels, width, rngs=rngs)
        tokens = (side // patch) ** 2
        self.blocks = nnx.List(
            [
                MixerBlock(tokens=tokens, **inner, linear=linear, rngs=rngs)
                for _ in range(blocks)
            ]
        )
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.head = linear(width, outputs, rngs=rngs)

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "... outputs"]:
        """Computes logits ``(..., outputs)`` of pixel rows or images.

        ``x`` is ``(..., side * side * channels)`` or ``(..., side, side, channels)``.
        """
        x = as_images("Mixer", x, side=self.side, channels=self.channels)
        x = self.embed(patches(x, patch=self.patch))
        for block in self.blocks:
            x = block(x)
        return self.head(jnp.mean(self.norm(x), axis=-2))


def mixer(*, linear: Callable[..., Any] = nnx.Linear, rngs: nnx.Rngs) -> Mixer:
    """Builds the Mixer for digits: 2x2 patches, width 64, 4 blocks.

    The hidden widths are those of the paper relative to the width: a half across
    patches (32), four times across channels (256).

    Args:
      linear: factory of the 18 dense layers.
      rngs: random streams of the parameters.

    Returns:
      The module (138,762 parameters when dense); inputs ``(..., 64)`` or
      ``(..., 8, 8, 1)``, logits ``(..., 10)``.

    Examples:
      >>> from flax import nnx
      >>> nnx.eval_shape(lambda: mixer(rngs=nnx.Rngs(0))(jnp.zeros((2, 64)))).shape
      (2, 10)
    """
    return Mixer(
        side=8,
        patch=2,
        width=64,
        blocks=4,
        token_hidden=32,
        channel_hidden=256,
        outputs=10,
        linear=linear,
        rngs=rngs,
    )
