"""Planted structure: each teacher is what it says, the noise has its level."""

import numpy as np
import pytest

from jaxlab.datasets import planted_structure


def _teacher(structure):
    data = planted_structure(structure, train=1, validation=1, test=1)
    return data.extras["teacher"].astype(np.float64)


def _slice_ranks(matrix):
    """Ranks of the slices M[:, l, k, :] for 8 blocks on either side."""
    rows, columns = (size // 8 for size in matrix.shape)
    slices = matrix.reshape(rows, 8, 8, columns).transpose(1, 2, 0, 3)
    values = np.linalg.svd(slices, compute_uv=False)
    return {int(r) for r in (values > 1e-6 * values[..., :1]).sum(-1).ravel()}


def test_monarch_slices_have_rank_one():
    teacher = _teacher("monarch")
    assert teacher.shape == (64, 64)
    assert _slice_ranks(teacher) == {1}
    assert np.linalg.matrix_rank(teacher) == 64


def test_monarch_follows_its_formula():
    rng = np.random.default_rng(0)
    w1, w2 = rng.standard_normal((2, 8, 8, 8)) / np.sqrt(8)
    x = rng.standard_normal(64)
    # Two block-diagonal products with a transpose of the blocks between them.
    middle = np.stack([w1[k] @ x[8 * k : 8 * k + 8] for k in range(8)])
    out = np.stack([w2[j] @ middle[:, j] for j in range(8)], axis=1).ravel()
    np.testing.assert_allclose(_teacher("monarch") @ x, out, atol=1e-5)


def test_monarch_keeps_the_scale():
    assert abs((_teacher("monarch") ** 2).sum(1).mean() - 1) < 0.3


def test_convolution_is_circular():
    teacher = _teacher("convolution")
    x = np.random.default_rng(1).standard_normal(64)
    want = np.fft.ifft(np.fft.fft(teacher[:, 0]) * np.fft.fft(x)).real
    np.testing.assert_allclose(teacher @ x, want, atol=1e-12)
    assert _slice_ranks(teacher) == {8}


def test_dft_is_the_transform_in_permuted_order():
    teacher = _teacher("dft")
    signal = np.random.default_rng(2).standard_normal(64)
    order = np.array([8 * p + k for k in range(8) for p in range(8)])
    parts = (teacher @ signal[order]).reshape(8, 2, 8)
    got = (parts[:, 0] + 1j * parts[:, 1]).ravel()
    np.testing.assert_allclose(got, np.fft.fft(signal, norm="ortho"), atol=1e-6)
    assert _slice_ranks(teacher) <= {1, 2}


@pytest.mark.parametrize("structure", ["monarch", "convolution", "dft"])
@pytest.mark.parametrize("noise_scale", [0.01, 0.5])
def test_noise_has_its_level(structure, noise_scale):
    data = planted_structure(structure, noise_scale=noise_scale, seed=4)
    for x, y in data.splits.values():
        assert (x.dtype, y.dtype) == (np.float32, np.float32)
        noise = y - x.astype(np.float64) @ data.extras["teacher"].T
        # At least 65,536 values: a relative standard error of 0.003.
        assert abs(noise.std() / noise_scale - 1) < 0.015
        assert abs(x.astype(np.float64).var() - 1) < 0.03


def test_without_noise_least_squares_finds_the_teacher():
    data = planted_structure(noise_scale=0.0, train=256, validation=1, test=1)
    x, y = data.splits["train"]
    found = np.linalg.lstsq(x.astype(np.float64), y, rcond=None)[0].T
    np.testing.assert_allclose(found, data.extras["teacher"], atol=1e-6)


@pytest.mark.parametrize(
    ("structure", "digest"),
    [
        ("monarch", "21de8e6fe3736b94dea904526f6c375b6599933ea87eb2f12688627d1157019f"),
        (
            "convolution",
            "398a811ae5e0a6d19e5bdcd1c9f8d206dfcc8ee60487b05daa50c63830e1a7ac",
        ),
        ("dft", "cf9e6b457fefebba7fed4f797db3c691390fc884d6a6039e8eb9f827fd32c8de"),
    ],
)
def test_contents_are_pinned(structure, digest):
    assert planted_structure(structure).digest == digest
