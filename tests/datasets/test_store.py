"""The store: one preparation, whatever is killed or damaged or runs beside it."""

import os
import pathlib
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from jaxlab.datasets import make_dataset
from jaxlab.datasets.store import VERSION, default_data_dir, load_or_prepare


def _example(rows=5_000):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((rows, 4, 16)).astype(np.float32)
    y = rng.integers(0, 200, rows).astype(np.uint8)
    extras = {"m": rng.standard_normal((3, 5)), "one": np.array(7, np.int64)}
    splits = {"train": (x, y), "validation": (x[:7], y[:7]), "test": (x[7:8], y[7:8])}
    return make_dataset("example", "An example.", splits, extras=extras)


def _run(code, *arguments):
    """Starts a Python process of its own with warnings as errors."""
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(code), *arguments]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def _finish(process):
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    return out.strip()


def _home(root, name="example"):
    return pathlib.Path(root) / name / VERSION


def test_what_comes_back_is_what_was_written(tmp_path):
    want = _example()
    got = load_or_prepare(_example, "example", data_dir=tmp_path)
    assert (got.name, got.description) == (want.name, want.description)
    assert got.digest == want.digest
    assert list(got.splits) == ["train", "validation", "test"]
    for split, pair in want.splits.items():
        for one, two in zip(got.splits[split], pair, strict=True):
            np.testing.assert_array_equal(one, two, strict=True)
    assert got.extras.keys() == want.extras.keys()
    for key, array in want.extras.items():
        np.testing.assert_array_equal(got.extras[key], array, strict=True)


def test_prepared_once(tmp_path, capfd):
    calls = []
    build = lambda: (calls.append(1), _example(10))[1]
    for _ in range(3):
        load_or_prepare(build, "example", data_dir=tmp_path)
    assert len(calls) == 1
    assert capfd.readouterr() == ("", "")


def test_records_are_blocks_of_rows(tmp_path):
    import tensorflow_datasets as tfds

    load_or_prepare(_example, "example", data_dir=tmp_path)
    builder = tfds.builder_from_directory(str(_home(tmp_path)))
    # 5,000 rows of 256 bytes in blocks of 1 MiB.
    assert len(builder.as_data_source(split="train")) == 2


@pytest.mark.parametrize("dtype", ["bool", "int8", "uint8", "int64", "float16"])
def test_dtypes_come_back(tmp_path, dtype):
    x = np.arange(12).reshape(6, 2).astype(dtype)
    build = lambda: make_dataset("d", "D.", {"train": (x, x[:, 0])})
    for _ in range(2):
        got = load_or_prepare(build, "d", data_dir=tmp_path)
        np.testing.assert_array_equal(got.splits["train"][0], x, strict=True)


def test_autoencoder_targets_are_stored_once(tmp_path):
    x = np.random.default_rng(0).standard_normal((4_000, 64)).astype(np.float32)
    build = lambda: make_dataset("ae", "AE.", {"train": (x, x), "test": (x, x)})
    inputs, targets = load_or_prepare(build, "ae", data_dir=tmp_path).splits["test"]
    assert targets is inputs
    size = sum(f.stat().st_size for f in _home(tmp_path, "ae").iterdir())
    assert size < 2.1 * x.nbytes


def test_variants_stand_beside_each_other(tmp_path):
    for i, variant in enumerate(("a", "b", "a")):
        x = np.full((2, 1), i, np.float32)
        build = lambda x=x: make_dataset("v", "V.", {"train": (x, x)})
        got = load_or_prepare(build, "v", data_dir=tmp_path, variant=variant)
        assert got.splits["train"][0][0, 0] == i % 2


_CHILD = """
    import sys, time, pathlib, numpy as np
    from jaxlab.datasets import make_dataset, store
    root, me, other, locks = sys.argv[1], *map(pathlib.Path, sys.argv[2:4]), sys.argv[4]
    built = 0

    def build():
        global built
        built += 1
        x = np.random.default_rng(0).standard_normal((20_000, 64)).astype(np.float32)
        if locks == "no":  # both build at once, so both try the rename
            meet("build")
        return make_dataset("race", "Race.", {"train": (x, x[:, :2])})

    def meet(where):
        me.with_suffix("." + where).touch()
        while not other.with_suffix("." + where).exists():
            time.sleep(0.001)

    if locks == "no":
        import fcntl
        def refuse(*_):
            raise OSError("no locks here")
        fcntl.flock = refuse
    store._tfds()
    meet("start")
    data = store.load_or_prepare(build, "race", data_dir=root)
    print(built, data.digest)
"""


@pytest.mark.parametrize("locks", ["yes", "no"])
def test_two_processes_prepare_one_data_set(tmp_path, locks):
    root, a, b = (str(tmp_path / name) for name in ("data", "a", "b"))
    pair = [_run(_CHILD, root, *order, locks) for order in ((a, b), (b, a))]
    (built_a, one), (built_b, two) = (_finish(p).split() for p in pair)
    assert one == two
    # With locks one process builds and the other reads.
    assert int(built_a) + int(built_b) == (1 if locks == "yes" else 2)
    assert not list(tmp_path.rglob("incomplete.*"))


def test_killed_while_preparing(tmp_path):
    code = """
        import os, signal, sys
        import tensorflow_datasets as tfds
        import numpy as np
        from jaxlab.datasets import make_dataset, store
        # The data are written, the folder is not yet renamed.
        tfds.core.DatasetInfo.write_to_directory = (
            lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL))
        x = np.zeros((100, 2), np.float32)
        build = lambda: make_dataset("example", "E.", {"train": (x, x[:, 0])})
        store.load_or_prepare(build, "example", data_dir=sys.argv[1])
    """
    process = _run(code, str(tmp_path))
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    left = list((tmp_path / "example").glob("incomplete.*"))
    assert len(left) == 1
    assert list(left[0].glob("*train*"))
    got = load_or_prepare(_example, "example", data_dir=tmp_path)
    assert got.digest == _example().digest
    assert not left[0].exists()


def test_killed_at_any_time(tmp_path):
    """Kills a process on its first sign of writing, then loads what it left."""
    code = """
        import sys, numpy as np
        from jaxlab.datasets import make_dataset, store
        x = np.random.default_rng(0).standard_normal((300_000, 64)).astype(np.float32)
        build = lambda: make_dataset("big", "Big.", {"train": (x, x[:, 0])})
        store.load_or_prepare(build, "big", data_dir=sys.argv[1])
    """
    process = _run(code, str(tmp_path))
    while process.poll() is None and not list(tmp_path.glob("big/incomplete.*")):
        pass
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    small = np.ones((2, 1), np.float32)
    build = lambda: make_dataset("big", "Small.", {"train": (small, small)})
    assert load_or_prepare(build, "big", data_dir=tmp_path).digest == build().digest
    assert not list(tmp_path.rglob("incomplete.*"))


@pytest.mark.parametrize("place", [0.1, 0.5, 0.9])
def test_flipped_bits_are_never_read_silently(tmp_path, place):
    load_or_prepare(_example, "example", data_dir=tmp_path)
    (file,) = _home(tmp_path).glob("*train*")
    content = bytearray(file.read_bytes())
    content[int(place * len(content))] ^= 4
    file.write_bytes(content)
    with pytest.raises(RuntimeError, match=f"delete the folder {_home(tmp_path)}"):
        load_or_prepare(_example, "example", data_dir=tmp_path)


def test_contents_other_than_their_digest(tmp_path):
    load_or_prepare(_example, "example", data_dir=tmp_path)
    other = lambda: _example(4_999)
    load_or_prepare(other, "example", data_dir=tmp_path / "other")
    for file in _home(tmp_path / "other").glob("*"):
        if file.name != "metadata.json":
            file.replace(_home(tmp_path) / file.name)
    with pytest.raises(RuntimeError, match=r"is damaged: .*delete the folder"):
        load_or_prepare(_example, "example", data_dir=tmp_path)


def test_missing_files(tmp_path):
    load_or_prepare(_example, "example", data_dir=tmp_path)
    next(_home(tmp_path).glob("*train*")).unlink()
    with pytest.raises(RuntimeError, match=r"cannot be read .*delete the folder"):
        load_or_prepare(_example, "example", data_dir=tmp_path)


def test_reading_writes_nothing(tmp_path):
    load_or_prepare(_example, "example", data_dir=tmp_path)
    (tmp_path / ".example.lock").unlink()
    before = sorted((p, p.stat().st_mtime_ns) for p in tmp_path.rglob("*"))
    load_or_prepare(_example, "example", data_dir=tmp_path)
    assert sorted((p, p.stat().st_mtime_ns) for p in tmp_path.rglob("*")) == before


def test_default_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("JAXLAB_DATA_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert default_data_dir() == pathlib.Path.home() / ".cache" / "jaxlab"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert default_data_dir() == tmp_path / "cache" / "jaxlab"
    monkeypatch.setenv("JAXLAB_DATA_DIR", str(tmp_path / "mine"))
    assert default_data_dir() == tmp_path / "mine"
    load_or_prepare(lambda: _example(10), "example")
    assert _home(tmp_path / "mine").is_dir()
