"""The digits: every image once, stratified, always the same."""

import numpy as np
from sklearn.datasets import load_digits

from jaxlab.datasets import digits


def test_sizes_types_and_range():
    data = digits()
    assert list(data.splits) == ["train", "validation", "test"]
    sizes = {"train": 1_297, "validation": 250, "test": 250}
    for split, (x, y) in data.splits.items():
        assert x.shape == (sizes[split], 64)
        assert y.shape == (sizes[split],)
        assert (x.dtype, y.dtype) == (np.float32, np.int32)
        assert x.min() == 0
        assert x.max() == 1


def test_every_image_is_in_exactly_one_split():
    images, labels = load_digits(return_X_y=True)
    row = lambda x, y: (*np.asarray(x, int).tolist(), int(y))
    want = sorted(row(x, y) for x, y in zip(images, labels))
    splits = digits().splits.values()
    got = sorted(row(x * 16, y) for xs, ys in splits for x, y in zip(xs, ys))
    assert got == want


def test_split_is_stratified_to_within_one_row():
    data = digits()
    counts = {k: np.bincount(y, minlength=10) for k, (_, y) in data.splits.items()}
    total = sum(counts.values())
    for split, count in counts.items():
        share = len(data.splits[split][1]) / total.sum()
        assert np.abs(count - share * total).max() <= 1


def test_rows_are_shuffled():
    _, y = digits().splits["train"]
    assert (np.diff(y) != 0).mean() > 0.8


def test_contents_are_pinned():
    digest = "90a470337ebf470016b9dfc462162bfc75882e78d02dd362d73af9b3004e6856"
    assert digits().digest == digest
