"""Gaussian clusters: the noise is what it says, and the task can be solved."""

import numpy as np

from jaxlab.datasets import gaussian_clusters


def test_noise_is_standard_normal_around_the_centres():
    data = gaussian_clusters()
    x, y = data.splits["train"]
    noise = (x - data.extras["centres"][y]).astype(np.float64)
    # 262,144 values: standard errors 0.002 (mean) and 0.0028 (variance).
    assert abs(noise.mean()) < 0.01
    assert abs(noise.var() - 1) < 0.014


def test_nearest_centre_solves_it():
    data = gaussian_clusters()
    centres = data.extras["centres"]
    for x, y in data.splits.values():
        square = ((x[:, None] - centres[None]) ** 2).sum(-1)
        assert 0.95 < (square.argmin(1) == y).mean() < 1


def test_separation_is_the_norm_of_a_centre():
    data = gaussian_clusters(classes=200, separation=2.5, train=1)
    norms = np.linalg.norm(data.extras["centres"], axis=1)
    assert abs(np.sqrt((norms**2).mean()) - 2.5) < 0.1


def test_sizes_types_and_classes():
    data = gaussian_clusters(classes=3, dim=5, train=40, validation=7, test=0)
    shapes = {k: (x.shape, y.shape) for k, (x, y) in data.splits.items()}
    assert shapes == {
        "train": ((40, 5), (40,)),
        "validation": ((7, 5), (7,)),
        "test": ((0, 5), (0,)),
    }
    x, y = data.splits["train"]
    assert (x.dtype, y.dtype) == (np.float32, np.int32)
    assert set(y.tolist()) == {0, 1, 2}


def test_contents_are_pinned():
    digest = "9e620758d7b9bc4464c05b1f69e32549087a056e60f782be082580151b9f3b67"
    assert gaussian_clusters().digest == digest
    assert gaussian_clusters(seed=1).digest != digest
