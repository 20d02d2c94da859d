"""CURVES: images of quadratic curves through three random points of the plane.

With P ~ U[3, 24]^(3 x 2), three points (x, y), and t at 100 even steps of [0, 1],

    c(t) = P0 2 (t - 1/2)(t - 1) - 4 P1 t (t - 1) + 2 P2 t (t - 1/2),
    pixel(y, x) = max_t exp(-|(x, y) - c(t)|^2 / (2 0.6^2)),

on 28 x 28 pixels: six degrees of freedom, hence the code of width 6 in the
autoencoders that use it. It is the recipe of the classical set of that name, not its
images. Values are rounded to multiples of 2^-20, so that the last bit of a machine's
exp does not change the digest.
Reference: Hinton, Salakhutdinov, "Reducing the Dimensionality of Data with Neural
Networks", Science 2006, supporting text; Martens, "Deep Learning via Hessian-Free
Optimization", ICML 2010.
"""

import numpy as np

from jaxlab._checks import check_count
from jaxlab.datasets.dataset import Dataset, make_dataset, round_for_digest

__all__ = ["curves"]

_SIDE = 28
_STEPS = 100
_WIDTH = 0.6
_CHUNK = 500  # images drawn at once: 9 MB of factors


def curves(*, train: int = 20_000, test: int = 10_000, seed: int = 0) -> Dataset:
    """Draws images of random curves, the targets of an autoencoder being its inputs.

    Points are drawn image by image, the training images first, so the first rows do
    not depend on how many follow. Small studies take the first 2,000: with seed 0
    their constant-image Bernoulli loss is 120.28 nats an image and the entropy floor
    34.01. About 0.2 ms an image.

    Args:
      train: images of the training split.
      test: images of the test split.
      seed: of the points.

    Returns:
      Inputs and targets (rows, 784) float32 in [0, 1], the same array.

    Examples:
      >>> inputs, targets = curves(train=3, test=1).splits["train"]
      >>> inputs.shape, targets is inputs, bool(inputs.max() <= 1)
      ((3, 784), True, True)
    """
    check_count("curves", least=0, train=train, test=test, seed=seed)
    rng = np.random.default_rng(seed)
    points = rng.uniform(3, 24, size=(train + test, 3, 2))
    images = np.empty((train + test, _SIDE**2), np.float32)
    for start in range(0, len(points), _CHUNK):
        images[start : start + _CHUNK] = _draw(points[start : start + _CHUNK])
    description = (
        f"CURVES, generated: inputs (rows, {_SIDE**2}) float32 in [0, 1], flattened "
        f"{_SIDE} x {_SIDE} images of quadratic curves through three random points; "
        f"targets are the inputs. Train {train:,} / test {test:,}, seed {seed}; small "
        "studies use the first 2,000 training rows."
    )
    splits = {
        k: (x, x) for k, x in (("train", images[:train]), ("test", images[train:]))
    }
    return make_dataset("curves", description, splits)


def _draw(points: np.ndarray) -> np.ndarray:
    t = np.linspace(0, 1, _STEPS)
    basis = np.stack([2 * (t - 0.5) * (t - 1), -4 * t * (t - 1), 2 * t * (t - 0.5)])
    path = np.einsum("nkd,kt->ntd", points, basis)
    # exp(-|.|^2) is a product of a factor in x and one in y.
    offset = np.arange(_SIDE) - path[..., None]
    factor = np.exp(-(offset**2) / (2 * _WIDTH**2))
    images = np.empty((len(points), _SIDE, _SIDE))
    for image, (x, y) in zip(images, factor.transpose(0, 2, 1, 3)):
        np.max(y[:, :, None] * x[:, None, :], axis=0, out=image)
    return round_for_digest(images.reshape(len(points), -1))
