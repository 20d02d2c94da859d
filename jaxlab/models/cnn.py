"""Small convolutional network for square images.

3x3 convolutions with zero padding, an activation after each, then one dense layer on
the flattened result. On CPU a convolution inside a compiled loop runs several times
slower than outside, so drive such training from the host there.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

from flax import nnx
from jaxtyping import Array, Float

from jaxlab._checks import check_sequence
from jaxlab.models.inputs import as_images, check_sizes


class CNN(nnx.Module):
    """Classifies square images by convolutions and one dense layer.

    Args:
      side: pixels along each edge.
      features: channels that each convolution makes, at least one.
      strides: stride of each convolution, as many as ``features``.
      outputs: logits of one image.
      channels: numbers of one pixel.
      activation: function of an array, applied after each convolution.
      linear: factory of the dense layer; the convolutions are ``nnx.Conv``.
      rngs: random streams of the parameters.

    Raises:
      ValueError: if a size is below 1 or ``features`` and ``strides`` differ in
        length; from a call, where the inputs are no images of this size.

    Examples:
      >>> from flax import nnx
      >>> sizes = {"side": 8, "features": (4,), "strides": (2,), "outputs": 10}
      >>> model = CNN(**sizes, rngs=nnx.Rngs(0))
      >>> model(jnp.zeros((5, 64))).shape, model(jnp.zeros((5, 8, 8, 1))).shape
      ((5, 10), (5, 10))
    """

    def __init__(
        self,
        *,
        side: int,
        features: Sequence[int],
        strides: Sequence[int],
        outputs: int,
        channels: int = 1,
        activation: Callable[..., Any] = nnx.relu,
        linear: Callable[..., Any] = nnx.Linear,
        rngs: nnx.Rngs,
    ):
        for which, values in (("features", features), ("strides", strides)):
            check_sequence("CNN", which, values, "integers, one a layer")
        features, strides = tuple(features), tuple(strides)
        if not 0 < len(features) == len(strides):
            raise ValueError(
                "CNN: features and strides must have equal length of at least 1, got "
                f"{features=} and {strides=}."
            )
        check_sizes("CNN", side=side, outputs=outputs, channels=channels)
        for pair in zip(features, strides):
            check_sizes("CNN", **dict(zip(("features", "strides"), pair)))
        self.side = side
        self.channels = channels
        self.activation = activation
        self.convolutions = nnx.List([])
        edge, width = side, channels
        for feature, stride in zip(features, map(int, strides)):
            self.convolutions.append(
                nnx.Conv(width, feature, (3, 3), strides=stride, rngs=rngs)
            )
            edge, width = math.ceil(edge / stride), feature
        self.head = linear(edge * edge * width, outputs, rngs=rngs)

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "... outputs"]:
        """Computes logits ``(..., outputs)`` of pixel rows or images.

        ``x`` is ``(..., side * side * channels)`` or ``(..., side, side, channels)``.
        """
        x = as_images("CNN", x, side=self.side, channels=self.channels)
        for convolution in self.convolutions:
            x = self.activation(convolution(x))
        return self.head(x.reshape(*x.shape[:-3], math.prod(x.shape[-3:])))


def cnn(*, linear: Callable[..., Any] = nnx.Linear, rngs: nnx.Rngs) -> CNN:
    """Builds the CNN for digits: 3x3x16, 3x3x32 stride 2, dense 10.

    Args:
      linear: factory of the dense layer.
      rngs: random streams of the parameters.

    Returns:
      The module (9,930 parameters when dense); inputs ``(..., 64)`` or
      ``(..., 8, 8, 1)``, logits ``(..., 10)``.

    Examples:
      >>> from flax import nnx
      >>> cnn(rngs=nnx.Rngs(0))(jnp.zeros((2, 64))).shape
      (2, 10)
    """
    return CNN(
        side=8, features=(16, 32), strides=(1, 2), outputs=10, linear=linear, rngs=rngs
    )
