"""Multilayer perceptron, and the two that the digits experiments use.

``h_0 = x``, ``h_i = activation(W_i h_{i-1} + b_i)``, outputs ``W_L h_{L-1} + b_L``:
an activation between layers, none on the outputs. Every ``W_i, b_i`` comes from the
``linear`` factory.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxlab._checks import are_sizes


class MLP(nnx.Module):
    """Maps vectors to vectors through dense layers with an activation between.

    Args:
      sizes: widths from the inputs to the outputs, at least two.
      activation: function of an array, applied between layers.
      linear: factory ``linear(in_features, out_features, rngs=rngs)`` of every layer.
      rngs: random streams of the parameters.

    Raises:
      ValueError: if fewer than two sizes are given or one is below 1; from a call,
        where the width of the inputs is not ``sizes[0]``.

    Examples:
      >>> from flax import nnx
      >>> model = MLP((3, 8, 2), rngs=nnx.Rngs(0))
      >>> model(jnp.zeros((5, 3))).shape
      (5, 2)
    """

    def __init__(
        self,
        sizes: Sequence[int],
        *,
        activation: Callable[..., Any] = nnx.relu,
        linear: Callable[..., Any] = nnx.Linear,
        rngs: nnx.Rngs,
    ):
        if not are_sizes(sizes) or len(sizes) < 2:
            raise ValueError(
                "MLP: sizes must be at least two positive widths, inputs first, such "
                f"as (64, 64, 10); got {sizes!r}."
            )
        self.in_features = sizes[0]
        self.activation = activation
        self.layers = nnx.List(
            [linear(n, m, rngs=rngs) for n, m in itertools.pairwise(sizes)]
        )

    def __call__(self, x: Float[Array, "... inputs"]) -> Float[Array, "... outputs"]:
        """Computes the outputs ``(..., sizes[-1])`` of inputs ``(..., sizes[0])``."""
        x = jnp.asarray(x)
        if x.ndim == 0 or x.shape[-1] != self.in_features:
            raise ValueError(
                f"MLP: inputs must have shape (..., {self.in_features}), got {x.shape}."
            )
        *hidden, last = self.layers
        for layer in hidden:
            x = self.activation(layer(x))
        return last(x)


def mlp_s(
    *,
    activation: Callable[..., Any] = nnx.relu,
    linear: Callable[..., Any] = nnx.Linear,
    rngs: nnx.Rngs,
) -> MLP:
    """Builds MLP-S for digits, 64-64-64-10 (8,970 parameters when dense).

    Args:
      activation: between layers; ``nnx.tanh`` where curvature must be smooth.
      linear: factory of the three layers.
      rngs: random streams of the parameters.

    Returns:
      The module; inputs ``(..., 64)``, logits ``(..., 10)``.

    Examples:
      >>> from flax import nnx
      >>> mlp_s(rngs=nnx.Rngs(0))(jnp.zeros((2, 64))).shape
      (2, 10)
    """
    return MLP((64, 64, 64, 10), activation=activation, linear=linear, rngs=rngs)


def mlp_m(
    *,
    activation: Callable[..., Any] = nnx.relu,
    linear: Callable[..., Any] = nnx.Linear,
    rngs: nnx.Rngs,
) -> MLP:
    """Builds MLP-M for digits, 64-256-256-10 (85,002 parameters when dense).

    Args:
      activation: between layers; ``nnx.tanh`` where curvature must be smooth.
      linear: factory of the three layers.
      rngs: random streams of the parameters.

    Returns:
      The module; inputs ``(..., 64)``, logits ``(..., 10)``.

    Examples:
      >>> from flax import nnx
      >>> mlp_m(activation=nnx.tanh, rngs=nnx.Rngs(0))(jnp.zeros((2, 64))).shape
      (2, 10)
    """
    return MLP((64, 256, 256, 10), activation=activation, linear=linear, rngs=rngs)
