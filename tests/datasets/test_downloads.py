"""MNIST and CIFAR-10 from files in their original formats, written here."""

import gzip
import io
import pathlib
import struct
import tarfile
import types

import numpy as np
import pytest
import requests
import tensorflow_datasets as tfds

from jaxlab import datasets
from jaxlab.datasets import downloads

_ROWS = {"train": 5_020, "test": 30}


def _images(seed, shape):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, shape, dtype=np.uint8)
    return images, rng.integers(0, 10, shape[0], dtype=np.uint8)


def _idx(array):
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    return gzip.compress(header + array.tobytes(), compresslevel=1)


@pytest.fixture
def served(monkeypatch):
    """Puts files in the place of the network; returns the dictionary to fill."""
    files: dict[str, bytes] = {}

    class Manager:
        def __init__(self, *, download_dir, **kwargs):
            assert kwargs["force_checksums_validation"]
            self.folder = pathlib.Path(download_dir)
            self.folder.mkdir(parents=True, exist_ok=True)

        def download(self, urls):
            paths = {}
            for key, url in urls.items():
                paths[key] = self.folder / url.rsplit("/", 1)[-1]
                paths[key].write_bytes(files[url])
            return paths

    monkeypatch.setattr(requests, "head", lambda url, **kwargs: None)
    # In the package's name alone: its own builders keep the real one.
    fake = types.SimpleNamespace(DownloadManager=Manager)
    monkeypatch.setattr(tfds, "download", fake)
    return files


def test_mnist(served, tmp_path):
    want = {}
    for split, name in (("train", "train"), ("test", "t10k")):
        images, labels = want[split] = _images(len(name), (_ROWS[split], 28, 28))
        served[f"{downloads._MNIST}{name}-images-idx3-ubyte.gz"] = _idx(images)
        served[f"{downloads._MNIST}{name}-labels-idx1-ubyte.gz"] = _idx(labels)
    data = datasets.load("mnist", tmp_path)
    x, y = data.splits["test"]
    np.testing.assert_array_equal(x[..., 0] * 255, want["test"][0])
    np.testing.assert_array_equal(y, want["test"][1].astype(np.int32), strict=True)
    _check_splits(data, want["train"][1], (28, 28, 1))
    served.clear()  # the second time the files are not asked for
    assert datasets.load("mnist", tmp_path).digest == data.digest


def test_cifar10(served, tmp_path):
    images, labels = _images(0, (_ROWS["train"], 32, 32, 3))
    test_images, test_labels = _images(1, (_ROWS["test"], 32, 32, 3))
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=1) as tar:
        batches = {
            f"data_batch_{i + 1}": slice(i * 1004, (i + 1) * 1004) for i in range(5)
        }
        parts = {k: (images[rows], labels[rows]) for k, rows in batches.items()}
        parts["test_batch"] = (test_images, test_labels)
        for stem, (x, y) in reversed(parts.items()):
            # A record is the label, then the red, the green and the blue plane.
            planes = x.transpose(0, 3, 1, 2).reshape(len(x), -1)
            content = np.concatenate([y[:, None], planes], axis=1).tobytes()
            info = tarfile.TarInfo(f"cifar-10-batches-bin/{stem}.bin")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    served[downloads._CIFAR10] = buffer.getvalue()
    data = datasets.load("cifar10", tmp_path)
    np.testing.assert_array_equal(data.splits["test"][0] * 255, test_images)
    np.testing.assert_array_equal(data.splits["train"][0] * 255, images[:20])
    _check_splits(data, labels, (32, 32, 3))


def _check_splits(data, labels, shape):
    x, y = data.splits["validation"]
    assert x.shape == (5_000, *shape)
    assert x.dtype == np.float32
    assert x.max() == 1
    np.testing.assert_array_equal(y, labels[20:])
    np.testing.assert_array_equal(data.splits["train"][1], labels[:20])


def test_addresses_have_a_recorded_checksum():
    from tensorflow_datasets.core.download import checksums

    known = checksums.get_all_url_infos()
    assert downloads._CIFAR10 in known
    for split in ("train", "t10k"):
        for part in ("images-idx3", "labels-idx1"):
            assert f"{downloads._MNIST}{split}-{part}-ubyte.gz" in known
