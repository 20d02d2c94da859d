"""MNIST and CIFAR-10: fetched and verified by TensorFlow Datasets, then kept here.

The download manager of TensorFlow Datasets fetches the original files and compares
their SHA-256 with the ones it has on record. Its own builders of these two read them
with TensorFlow; the formats are simple enough to be read here without it. Rows stay in
the order of the files.
References: LeCun et al., "Gradient-Based Learning Applied to Document Recognition",
1998; Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.
"""

import gzip
import os
import pathlib
import tarfile

import numpy as np

from jaxlab.datasets.dataset import Dataset, make_dataset

__all__ = ["cifar10", "mnist"]

_MNIST = "https://storage.googleapis.com/cvdf-datasets/mnist/"
_CIFAR10 = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
_VALIDATION = 5_000  # the last training rows
_CONNECT_SECONDS = 10.0


def mnist(*, download_dir: str | os.PathLike[str]) -> Dataset:
    """Fetches MNIST: 70,000 images of handwritten digits, 28 x 28 pixels.

    Args:
      download_dir: folder for the original files (12 MB); whole ones are kept.

    Returns:
      Inputs (rows, 28, 28, 1) float32 in [0, 1], labels (rows,) int32; train 55,000,
      validation 5,000 (the last training rows of the files), test 10,000.

    Raises:
      RuntimeError: if the files cannot be fetched.

    Examples:
      >>> data = mnist(download_dir="downloads")  # doctest: +SKIP
    """
    parts = ("images-idx3", "labels-idx1")
    urls = {
        f"{split}-{part}": f"{_MNIST}{split}-{part}-ubyte.gz"
        for split in ("train", "t10k")
        for part in parts
    }
    files = _download("mnist", urls, download_dir)
    pairs = {}
    for split in ("train", "t10k"):
        images, labels = (_read_idx(files[f"{split}-{part}"]) for part in parts)
        pairs[split] = (images[..., None], labels)
    text = "MNIST: inputs (rows, 28, 28, 1)"
    return _image_set("mnist", text, *pairs["train"], *pairs["t10k"])


def cifar10(*, download_dir: str | os.PathLike[str]) -> Dataset:
    """Fetches CIFAR-10: 60,000 colour photographs, 32 x 32 pixels, ten classes.

    Args:
      download_dir: folder for the original file (170 MB); a whole one is kept.

    Returns:
      Inputs (rows, 32, 32, 3) float32 in [0, 1], labels (rows,) int32; train 45,000,
      validation 5,000 (the last training rows of the files), test 10,000.

    Raises:
      RuntimeError: if the file cannot be fetched.

    Examples:
      >>> data = cifar10(download_dir="downloads")  # doctest: +SKIP
    """
    archive = _download("cifar10", {"all": _CIFAR10}, download_dir)["all"]
    batches = {}
    with tarfile.open(archive) as tar:
        for member in tar:
            stem = pathlib.PurePosixPath(member.name).stem
            file = tar.extractfile(member) if member.name.endswith(".bin") else None
            if file is not None:
                rows = np.frombuffer(file.read(), np.uint8).reshape(-1, 1 + 3 * 32 * 32)
                images = rows[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
                batches[stem] = (images, rows[:, 0])
    train = [batches[f"data_batch_{i}"] for i in range(1, 6)]
    images, labels = (np.concatenate(part) for part in zip(*train))
    text = "CIFAR-10: inputs (rows, 32, 32, 3)"
    return _image_set("cifar10", text, images, labels, *batches["test_batch"])


def _image_set(
    name: str,
    text: str,
    images: np.ndarray,
    labels: np.ndarray,
    test_images: np.ndarray,
    test_labels: np.ndarray,
) -> Dataset:
    ready = lambda x, y: (x.astype(np.float32) / np.float32(255), y.astype(np.int32))
    last = max(0, len(images) - _VALIDATION)
    splits = {
        "train": ready(images[:last], labels[:last]),
        "validation": ready(images[last:], labels[last:]),
        "test": ready(test_images, test_labels),
    }
    counts = " / ".join(f"{k} {len(x):,}" for k, (x, _) in splits.items())
    description = (
        f"{text} float32, the pixels divided by 255; labels int32 0..9; {counts}, the "
        "validation split being the last training rows of the original files."
    )
    return make_dataset(name, description, splits)


def _download(
    name: str, urls: dict[str, str], download_dir: str | os.PathLike[str]
) -> dict[str, str]:
    """Fetches files, verified; fails within seconds where there is no network."""
    import requests
    import tensorflow_datasets as tfds

    try:
        # The manager tries ten times with growing pauses (over three minutes); one
        # request tells at once whether the host answers. It honours proxies.
        first = next(iter(urls.values()))
        requests.head(first, timeout=_CONNECT_SECONDS, allow_redirects=True)
        manager = tfds.download.DownloadManager(
            download_dir=str(download_dir),
            dataset_name=name,
            force_checksums_validation=True,
        )
        return {key: os.fspath(path) for key, path in manager.download(urls).items()}
    except Exception as error:
        raise RuntimeError(
            f"{name} could not be downloaded ({type(error).__name__}). On a machine "
            f"with a network run jaxlab.datasets.load({name!r}, data_dir=FOLDER), copy "
            f"FOLDER here, and pass it as data_dir or set JAXLAB_DATA_DIR to it. "
            "Without a network there are digits, curves, gaussian_clusters, "
            "planted_structure and stdlib_text."
        ) from error


def _read_idx(path: str) -> np.ndarray:
    """Reads the IDX format: two zeros, 8 for bytes, the rank, big-endian sizes."""
    with gzip.open(path) as file:
        data = file.read()
    sizes = np.frombuffer(data, ">i4", count=data[3], offset=4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(sizes)
