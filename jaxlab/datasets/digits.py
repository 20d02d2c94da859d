"""Handwritten digits of scikit-learn: 1,797 images of 8 x 8 pixels, no download.

The images are the test part of NIST's optical recognition set at the UCI repository,
pixels counted 0 to 16; here they are divided by 16 and flattened.
Reference: Alpaydin, Kaynak, "Cascading Classifiers", Kybernetika 1998.
"""

import numpy as np

from jaxlab.datasets.dataset import Dataset, make_dataset

__all__ = ["digits"]

_SIZES = {"train": 1_297, "validation": 250, "test": 250}


def digits() -> Dataset:
    """Makes the digits with a fixed, stratified split 1,297 / 250 / 250.

    The rows are shuffled by a fixed seed. Row i of the n_c rows of its class then has
    the quantile (i + 1/2) / n_c; the smallest 250 quantiles of all rows are the test
    split, the next 250 the validation split, the others the training split. So every
    split has each class in its share of the whole, to within one row.

    Returns:
      Inputs (rows, 64) float32 in [0, 1], labels (rows,) int32 in 0..9.

    Raises:
      ImportError: if scikit-learn is not installed.

    Examples:
      >>> x, y = digits().splits["test"]
      >>> np.bincount(y).tolist()
      [25, 25, 25, 26, 25, 25, 25, 25, 24, 25]
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "The digits come with scikit-learn: pip install 'jaxlab[train]'."
        ) from error
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    images, labels = images[order], labels[order]
    quantile = np.empty(len(labels))
    for label in range(10):
        rows = np.flatnonzero(labels == label)
        quantile[rows] = (np.arange(len(rows)) + 0.5) / len(rows)
    ranked = np.argsort(quantile, kind="stable")
    ends = np.cumsum([_SIZES["test"], _SIZES["validation"]])
    test, validation, train = map(np.sort, np.split(ranked, ends))
    cut = lambda rows: (
        (images[rows] / 16).astype(np.float32),
        labels[rows].astype(np.int32),
    )
    description = (
        "Handwritten digits of scikit-learn (1,797 images): inputs (rows, 64) float32, "
        "the pixels divided by 16; x.reshape(-1, 8, 8, 1) makes images of them. "
        "Targets: int32 labels 0..9. Fixed stratified split: train 1,297 / validation "
        "250 / test 250."
    )
    splits = {"train": cut(train), "validation": cut(validation), "test": cut(test)}
    return make_dataset("digits", description, splits)
