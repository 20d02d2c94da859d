"""Gaussian clusters: a classification task whose best possible error is known.

Class c has the centre m_c ~ N(0, separation^2 I / dim), so that two centres are about
sqrt(2) separation apart, and its points are x = m_c + e with e ~ N(0, I). Classes are
equally likely. The best classifier takes the nearest centre.
"""

import numpy as np

from jaxlab._checks import check_count, check_number
from jaxlab.datasets.dataset import Dataset, make_dataset

__all__ = ["gaussian_clusters"]


def gaussian_clusters(
    *,
    classes: int = 10,
    dim: int = 32,
    separation: float = 4.0,
    train: int = 8_192,
    validation: int = 1_024,
    test: int = 2_048,
    seed: int = 0,
) -> Dataset:
    """Draws points around random centres, one centre per class.

    Args:
      classes: number of classes, at least 1.
      dim: width of the inputs, at least 1.
      separation: typical norm of a centre, in standard deviations of the noise.
      train: rows of the training split; likewise ``validation`` and ``test``.
      validation: rows of the validation split.
      test: rows of the test split.
      seed: of centres, labels and noise.

    Returns:
      Inputs (rows, dim) float32, labels (rows,) int32; ``extras["centres"]`` is
      (classes, dim) float32.

    Raises:
      ValueError: if ``classes`` or ``dim`` is below 1.

    Examples:
      >>> data = gaussian_clusters(classes=3, dim=2, train=6, validation=2, test=2)
      >>> inputs, labels = data.splits["train"]
      >>> inputs.shape, labels.shape, data.extras["centres"].shape
      ((6, 2), (6,), (3, 2))
    """
    name = "gaussian_clusters"
    check_count(name, classes=classes, dim=dim)
    rows = {"train": train, "validation": validation, "test": test}
    check_count(name, least=0, seed=seed, **rows)
    check_number(name, "a number", separation=separation)
    separation = float(separation)
    rng = np.random.default_rng(seed)
    scale = separation / np.sqrt(dim)
    centres = (scale * rng.standard_normal((classes, dim))).astype(np.float32)
    splits = {}
    for split, rows in (("train", train), ("validation", validation), ("test", test)):
        labels = rng.integers(classes, size=rows, dtype=np.int32)
        noise = rng.standard_normal((rows, dim), dtype=np.float32)
        splits[split] = (centres[labels] + noise, labels)
    description = (
        f"Gaussian clusters: {classes} classes in {dim} dimensions, unit noise around "
        f"centres of norm about {separation:g} (extras['centres']); inputs float32, "
        f"labels int32; train {train:,} / validation {validation:,} / test {test:,}, "
        f"seed {seed}."
    )
    extras = {"centres": centres}
    return make_dataset("gaussian_clusters", description, splits, extras=extras)
