"""CURVES against the formula written out, and the figures that identify seed 0."""

import numpy as np
import pytest

from jaxlab.datasets import curves


def _entropy(p):
    inside = (p > 0) & (p < 1)
    q = np.where(inside, p, 0.5)
    return np.where(inside, -q * np.log(q) - (1 - q) * np.log1p(-q), 0.0)


def test_pixels_follow_the_formula():
    data = curves(train=2, test=1, seed=3)
    points = np.random.default_rng(3).uniform(3, 24, size=(3, 3, 2))
    images = np.concatenate([data.splits["train"][0], data.splits["test"][0]])
    for image, (p0, p1, p2) in zip(images.reshape(3, 28, 28), points):
        want = np.zeros((28, 28))
        for t in np.linspace(0, 1, 100):
            c = 2 * (t - 0.5) * (t - 1) * p0 - 4 * t * (t - 1) * p1
            c = c + 2 * t * (t - 0.5) * p2
            for row in range(28):
                for column in range(28):
                    square = (column - c[0]) ** 2 + (row - c[1]) ** 2
                    value = np.exp(-square / (2 * 0.6**2))
                    want[row, column] = max(want[row, column], value)
        np.testing.assert_allclose(image, want, atol=2**-20)


def test_known_figures_of_seed_0():
    x, _ = curves(train=2_000, test=0).splits["train"]
    x = x.astype(np.float64)
    # The best constant image predicts the mean of every pixel; its loss is the
    # entropy of that mean. No model beats the entropy of the grey values themselves.
    assert round(_entropy(x.mean(0)).sum(), 2) == 120.28
    assert round(_entropy(x).sum(1).mean(), 2) == 34.01


def test_first_rows_do_not_depend_on_how_many_follow():
    short = curves(train=3, test=1).splits["train"][0]
    long = curves(train=600, test=0).splits["train"][0]
    np.testing.assert_array_equal(short, long[:3])


def test_targets_are_the_inputs():
    x, y = curves(train=2, test=1).splits["test"]
    assert y is x
    assert x.shape == (1, 784)
    assert x.dtype == np.float32


@pytest.mark.parametrize("seed", [0, 1])
def test_seed_decides(seed):
    one, two = curves(train=2, test=1, seed=seed), curves(train=2, test=1, seed=seed)
    assert one.digest == two.digest
    assert one.digest != curves(train=2, test=1, seed=seed + 1).digest


def test_contents_are_pinned():
    digest = "cfd2ba41fbda00b27236df08b0fb13488bbcd303d068cf8f0413541eac2acc00"
    assert curves(train=200, test=100).digest == digest
