"""Vision transformer: attention over the patches of an image.

Patches through a dense layer, plus learned positions; pre-norm blocks; a last layer
norm, the mean over patches, and one dense layer. The mean stands in the place of the
first paper's class token, as in Beyer, Zhai, Kolesnikov, "Better plain ViT baselines
for ImageNet-1k", 2022. Without positions the logits would not depend on the order of
the patches.

Reference: Dosovitskiy et al., "An Image is Worth 16x16 Words: Transformers for Image
Recognition at Scale", ICLR 2021.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxlab.models.inputs import as_images, check_patches, check_sizes, patches
from jaxlab.models.transformer import Block


class ViT(nnx.Module):
    """Classifies square images by attention between their patches.

    Args:
      side: pixels along each edge.
      patch: pixels along the edge of a patch; it divides ``side``.
      width: of the residual stream.
      blocks: number of blocks.
      heads: number of attention heads; it divides ``width``.
      outputs: logits of one image.
      channels: numbers of one pixel.
      linear: factory of every dense layer, embedding of patches and head included.
      rngs: random streams of the parameters.

    Raises:
      ValueError: if a size is below 1, ``patch`` does not divide ``side`` or ``heads``
        not ``width``; from a call, where the inputs are no images of this size.

    Examples:
      >>> from flax import nnx
      >>> sizes = {"side": 4, "patch": 2, "width": 8, "blocks": 1, "outputs": 3}
      >>> model = ViT(**sizes, heads=2, rngs=nnx.Rngs(0))
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
        heads: int,
        outputs: int,
        channels: int = 1,
        linear: Callable[..., Any] = nnx.Linear,
        rngs: nnx.Rngs,
    ):
        outer = {"side": side, "patch": patch, "channels": channels}
        check_sizes("ViT", width=width, blocks=blocks, outputs=outputs, **outer)
        check_patches("ViT", side, patch)
        self.side = side
        self.patch = patch
        self.channels = channels
        self.embed = linear(patch * patch * channels, width, rngs=rngs)
        tokens = (side // patch) ** 2
        self.positions = nnx.Param(
            nnx.initializers.normal(0.02)(rngs.params(), (tokens, width), jnp.float32)
        )
        self.blocks = nnx.List(
            [
                Block(width, heads, causal=False, linear=linear, rngs=rngs)
                for _ in range(blocks)
            ]
        )
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.head = linear(width, outputs, rngs=rngs)

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "... outputs"]:
        """Computes logits ``(..., outputs)`` of pixel rows or images.

        ``x`` is ``(..., side * side * channels)`` or ``(..., side, side, channels)``.
        """
        x = as_images("ViT", x, side=self.side, channels=self.channels)
        x = self.embed(patches(x, patch=self.patch))
        x = x + jnp.broadcast_to(self.positions[...], x.shape)
        for block in self.blocks:
            x = block(x)
        return self.head(jnp.mean(self.norm(x), axis=-2))


def vit(*, linear: Callable[..., Any] = nnx.Linear, rngs: nnx.Rngs) -> ViT:
    """Builds the ViT for digits: 2x2 patches, width 64, 4 blocks, 4 heads.

    Args:
      linear: factory of the 26 dense layers.
      rngs: random streams of the parameters.

    Returns:
      The module (202,058 parameters when dense); inputs ``(..., 64)`` or
      ``(..., 8, 8, 1)``, logits ``(..., 10)``.

    Examples:
      >>> from flax import nnx
      >>> nnx.eval_shape(lambda: vit(rngs=nnx.Rngs(0))(jnp.zeros((2, 64)))).shape
      (2, 10)
    """
    return ViT(
        side=8,
        patch=2,
        width=64,
        blocks=4,
        heads=4,
        outputs=10,
        linear=linear,
        rngs=rngs,
    )
