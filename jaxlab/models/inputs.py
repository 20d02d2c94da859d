"""What several models share before their first layer: sizes checked, images, patches.

Digits travel as rows of 64 numbers; a network that needs the picture gives them their
two axes back. A patch is ``p x p`` neighbouring pixels with all channels, flattened
row by row; patches are in row order too.
"""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlab._checks import are_sizes


def check_sizes(model: str, **sizes: int) -> None:
    """Raises ``ValueError`` that names the sizes of ``model`` below 1."""
    wrong = {name: size for name, size in sizes.items() if not are_sizes([size])}
    if wrong:
        raise ValueError(f"{model}: sizes must be at least 1, integers, got {wrong}.")


def check_patches(model: str, side: int, patch: int) -> None:
    """Raises ``ValueError`` where patches do not tile the image."""
    if side % patch:
        raise ValueError(
            f"{model}: patch must divide side, got side={side} and patch={patch}; "
            f"patches that fit: {[p for p in range(1, side + 1) if side % p == 0]}."
        )


def as_images(
    model: str, x: Float[Array, "..."], *, side: int, channels: int
) -> Float[Array, "... side side channels"]:
    """Views rows of pixels as images and lets images through.

    Args:
      model: name for the message.
      x: ``(..., side * side * channels)`` or ``(..., side, side, channels)``.
      side: pixels along each edge.
      channels: numbers of one pixel.

    Returns:
      ``(..., side, side, channels)``.

    Raises:
      ValueError: if ``x`` has neither shape.

    Examples:
      >>> as_images("CNN", jnp.zeros((2, 12)), side=2, channels=3).shape
      (2, 2, 2, 3)
    """
    x = jnp.asarray(x)
    shape = (side, side, channels)
    if x.shape[-3:] == shape:
        return x
    if x.ndim and x.shape[-1] == math.prod(shape):
        return x.reshape(*x.shape[:-1], *shape)
    raise ValueError(
        f"{model}: inputs must have shape (..., {math.prod(shape)}) or "
        f"(..., {side}, {side}, {channels}), got {x.shape}."
    )


def patches(x: Float[Array, "... s s c"], *, patch: int) -> Float[Array, "... n d"]:
    """Cuts square images into flattened square patches.

    Args:
      x: images ``(..., s, s, c)``.
      patch: pixels along the edge of a patch; it divides ``s``.

    Returns:
      ``(..., (s / patch)**2, patch * patch * c)``.

    Examples:
      >>> patches(jnp.arange(16.0).reshape(4, 4, 1), patch=2)[1]
      Array([2., 3., 6., 7.], dtype=float32)
    """
    *lead, s, _, c = x.shape
    n = s // patch
    x = x.reshape(*lead, n, patch, n, patch, c).swapaxes(-4, -3)
    return x.reshape(*lead, n * n, patch * patch * c)
