"""Loading by name: the disk gives what the functions make, imports stay light."""

import os
import subprocess
import sys

import numpy as np
import pytest

from jaxlab import datasets


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.mark.parametrize(
    ("name", "build"),
    [
        ("digits", datasets.digits),
        ("gaussian_clusters", datasets.gaussian_clusters),
        ("planted_convolution", lambda: datasets.planted_structure("convolution")),
        ("planted_dft", lambda: datasets.planted_structure("dft")),
        ("planted_structure", datasets.planted_structure),
        ("stdlib_text", datasets.stdlib_text),
    ],
)
def test_disk_gives_what_the_function_makes(folder, name, build):
    want = build()
    for _ in range(2):
        got = datasets.load(name, data_dir=folder)
        assert (got.name, got.digest) == (name, want.digest)
        assert got.description == want.description


def test_curves(folder):
    data = datasets.load("curves", folder)
    shapes = {k: x.shape for k, (x, _) in data.splits.items()}
    assert shapes == {"train": (20_000, 784), "test": (10_000, 784)}
    first = datasets.curves(train=50, test=0).splits["train"][0]
    np.testing.assert_array_equal(data.splits["train"][0][:50], first)
    assert data.splits["train"][1] is data.splits["train"][0]


def test_names_are_sorted_and_complete():
    assert datasets.names() == [
        "cifar10",
        "curves",
        "digits",
        "gaussian_clusters",
        "mnist",
        "planted_convolution",
        "planted_dft",
        "planted_structure",
        "stdlib_text",
    ]


def test_environment_names_the_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("JAXLAB_DATA_DIR", str(tmp_path))
    datasets.load("gaussian_clusters")
    assert (tmp_path / "gaussian_clusters").is_dir()


def test_a_relative_folder_and_a_home(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    datasets.load("gaussian_clusters", "here")
    datasets.load("gaussian_clusters", "~/there")
    assert (tmp_path / "here" / "gaussian_clusters").is_dir()
    assert (tmp_path / "there" / "gaussian_clusters").is_dir()


def test_importing_is_light():
    code = (
        "import sys, jaxlab.datasets; heavy = {'jax', 'flax', 'sklearn', 'tensorflow', "
        "'tensorflow_datasets', 'array_record', 'requests'}; "
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ)
