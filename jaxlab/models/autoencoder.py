"""Autoencoder of mirrored perceptrons, and the two of the optimizer experiments.

Encoder ``sizes[0] -> ... -> sizes[-1]``, decoder the same widths backwards. ReLU
between layers; the code and the outputs are linear. The outputs are logits of pixels
in [0, 1], for a Bernoulli likelihood.

Reference: Hinton and Salakhutdinov, "Reducing the Dimensionality of Data with Neural
Networks", Science 2006.
"""

from collections.abc import Callable, Sequence
from typing import Any

from flax import nnx
from jaxtyping import Array, Float

from jaxlab.models.mlp import MLP


class Autoencoder(nnx.Module):
    """Maps vectors to a code and the code back to vectors of the same width.

    Args:
      sizes: widths from the inputs to the code, at least two.
      activation: function of an array, applied between layers.
      linear: factory of every layer.
      rngs: random streams of the parameters.

    Raises:
      ValueError: if fewer than two sizes are given or one is below 1; from a call,
        where the width of the inputs is not ``sizes[0]``.

    Examples:
      >>> from flax import nnx
      >>> model = Autoencoder((6, 4, 2), rngs=nnx.Rngs(0))
      >>> model(jnp.zeros((5, 6))).shape, model.encoder(jnp.zeros((5, 6))).shape
      ((5, 6), (5, 2))
    """

    def __init__(
        self,
        sizes: Sequence[int],
        *,
        activation: Callable[..., Any] = nnx.relu,
        linear: Callable[..., Any] = nnx.Linear,
        rngs: nnx.Rngs,
    ):
        options = {"activation": activation, "linear": linear, "rngs": rngs}
        self.encoder = MLP(sizes, **options)
        self.decoder = MLP(tuple(reversed(sizes)), **options)

    def __call__(self, x: Float[Array, "... inputs"]) -> Float[Array, "... inputs"]:
        """Computes logits ``(..., sizes[0])`` of inputs of the same shape."""
        return self.decoder(self.encoder(x))


def autoencoder_digits(
    *, linear: Callable[..., Any] = nnx.Linear, rngs: nnx.Rngs
) -> Autoencoder:
    """Builds AE-digits, 64-48-24-12-24-48-64, for digits divided by 16.

    Args:
      linear: factory of the six layers.
      rngs: random streams of the parameters.

    Returns:
      The module (9,244 parameters when dense); inputs and logits ``(..., 64)``.

    Examples:
      >>> from flax import nnx
      >>> autoencoder_digits(rngs=nnx.Rngs(0))(jnp.zeros((2, 64))).shape
      (2, 64)
    """
    return Autoencoder((64, 48, 24, 12), linear=linear, rngs=rngs)


def autoencoder_curves(
    *, linear: Callable[..., Any] = nnx.Linear, rngs: nnx.Rngs
) -> Autoencoder:
    """Builds AE-curves, 784-400-200-100-50-25-6 and its mirror image.

    Args:
      linear: factory of the twelve layers.
      rngs: random streams of the parameters.

    Returns:
      The module (842,340 parameters when dense); inputs and logits ``(..., 784)``.

    Examples:
      >>> from flax import nnx
      >>> model = nnx.eval_shape(lambda: autoencoder_curves(rngs=nnx.Rngs(0)))
      >>> len(model.encoder.layers), len(model.decoder.layers)
      (6, 6)
    """
    sizes = (784, 400, 200, 100, 50, 25, 6)
    return Autoencoder(sizes, linear=linear, rngs=rngs)
