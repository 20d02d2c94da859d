"""Messages of load: unknown names, missing packages, no network."""

import sys
import time

import pytest
import requests

from jaxlab import datasets
from jaxlab.datasets import downloads

pytestmark = pytest.mark.untyped


@pytest.mark.parametrize("name", ["imagenet", "", "Digits", "../digits"])
def test_unknown_name(name, tmp_path):
    with pytest.raises(ValueError, match=r"name must be one of cifar10, curves, .*got"):
        datasets.load(name, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "module", ["tensorflow_datasets", "array_record.python.array_record_module"]
)
def test_missing_packages_name_the_extra(monkeypatch, tmp_path, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r"pip install 'jaxlab\[train\]'"):
        datasets.load("digits", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_missing_scikit_learn_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'jaxlab\[train\]'"):
        datasets.digits()


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_no_network(monkeypatch, tmp_path, name):
    """A real request to a host that cannot exist: no answer, told within seconds."""
    monkeypatch.setattr(downloads, "_MNIST", "https://jaxlab.invalid/mnist/")
    monkeypatch.setattr(downloads, "_CIFAR10", "https://jaxlab.invalid/cifar.tar.gz")
    start = time.monotonic()
    with pytest.raises(RuntimeError) as caught:
        datasets.load(name, tmp_path)
    assert time.monotonic() - start < 30
    message = str(caught.value)
    for part in (name, "could not be downloaded", "data_dir", "JAXLAB_DATA_DIR"):
        assert part in message
    for offline in ("digits", "curves", "stdlib_text", "planted_structure"):
        assert offline in message
    assert isinstance(caught.value.__cause__, requests.ConnectionError)


def test_planted_structures():
    with pytest.raises(ValueError, match="monarch, convolution, dft; got 'low_rank'"):
        datasets.planted_structure("low_rank")


@pytest.mark.parametrize("sizes", [{"classes": 0}, {"dim": 0}])
def test_clusters_need_classes_and_dimensions(sizes):
    with pytest.raises(ValueError, match=r"(classes|dim) must be an integer >= 1"):
        datasets.gaussian_clusters(**sizes)
