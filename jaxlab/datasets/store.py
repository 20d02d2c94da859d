"""Keeps data sets on disk as array_record files and reads them back.

A data set is prepared once, by a TensorFlow Datasets builder made from its arrays, and
read through ``as_data_source``; neither needs TensorFlow. One record holds a block of
consecutive rows (about 1 MiB), since thousands of records of a few hundred bytes would
take seconds to read. The digest stands in the same folder, which appears by one
rename: what is there is whole, and reading compares the digest.

Two processes that prepare the same data set at once are kept apart by a file lock
(the kernel frees it when a process is killed). Where the file system has no locks,
the rename decides: the loser sees ``FileExistsError`` and reads what the winner wrote.
Folders ``incomplete.*`` of killed processes are removed under the lock.
"""

import contextlib
import importlib
import io
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from jaxlab.datasets.dataset import Dataset, make_dataset

__all__ = ["default_data_dir", "load_or_prepare"]

# Of the layout below and of what the builders draw: a change of either needs a new
# version, which is prepared beside the old one.
VERSION = "1.0.0"
_RECORD_BYTES = 2**20


def default_data_dir() -> pathlib.Path:
    """Returns the folder for prepared data where the caller names none.

    Returns:
      ``$JAXLAB_DATA_DIR``, else ``$XDG_CACHE_HOME/jaxlab``, else ``~/.cache/jaxlab``.

    Examples:
      >>> default_data_dir().is_absolute()
      True
    """
    named = os.environ.get("JAXLAB_DATA_DIR")
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = pathlib.Path(named) if named else pathlib.Path(cache) / "jaxlab"
    return folder.expanduser().absolute()


def load_or_prepare(
    build: Callable[[], Dataset],
    name: str,
    *,
    data_dir: str | os.PathLike[str] | None = None,
    variant: str = "",
) -> Dataset:
    """Reads a data set from disk, after preparing it there if it is missing.

    Args:
      build: makes the data set; called only where nothing is prepared yet.
      name: folder under ``data_dir``: lower-case letters, digits, underscores.
      data_dir: where prepared data live; ``default_data_dir()`` if None.
      variant: a folder below ``name``, for contents that depend on the machine.

    Returns:
      The data set, its contents checked against the digest stored beside them.

    Raises:
      ImportError: if tensorflow-datasets or array_record is not installed.
      RuntimeError: if the files are damaged; the message names the folder to delete.

    Examples:
      >>> import tempfile
      >>> ones = np.ones((3, 2), np.float32)
      >>> build = lambda: make_dataset("ones", "Ones.", {"train": (ones, ones)})
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     first = load_or_prepare(build, "ones", data_dir=folder)
      ...     again = load_or_prepare(build, "ones", data_dir=folder)
      >>> first.digest == again.digest == build().digest
      True
    """
    tfds = _tfds()
    root = default_data_dir() if data_dir is None else pathlib.Path(data_dir)
    root = root.expanduser().absolute()
    home = root / name / variant / VERSION
    if not _prepared(home):
        root.mkdir(parents=True, exist_ok=True)
        with _lock(root / f".{name}.lock") as held:
            if held:
                for stale in home.parent.glob("incomplete.*"):
                    shutil.rmtree(stale, ignore_errors=True)
            if not _prepared(home):
                # The winner of a race without locks leaves a whole folder behind.
                with contextlib.suppress(FileExistsError):
                    _write(tfds, build(), root, name, variant)
    return _read(tfds, home, name)


def _prepared(home: pathlib.Path) -> bool:
    return (home / "dataset_info.json").exists()


def _tfds() -> Any:
    try:
        tfds = importlib.import_module("tensorflow_datasets")
        importlib.import_module("array_record.python.array_record_module")
    except ImportError as error:
        raise ImportError(
            f"jaxlab.datasets.load needs {error.name}: pip install 'jaxlab[train]'."
        ) from error
    return tfds


@contextlib.contextmanager
def _lock(path: pathlib.Path) -> Iterator[bool]:
    """Yields True while this process alone holds the file; False without locks."""
    with open(path, "a") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
            held = True
        except (ImportError, OSError):  # Windows; some network file systems
            held = False
        yield held


def _write(
    tfds: Any, data: Dataset, root: pathlib.Path, name: str, variant: str
) -> None:
    # TFDS prints what it does and draws bars; a cache fills silently.
    quiet = io.StringIO()
    with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
        config = tfds.core.BuilderConfig(name=variant, version=VERSION)
        builder = _builder_class(tfds, data, name)(
            data_dir=str(root),
            file_format="array_record",
            config=config if variant else None,
        )
        builder.download_and_prepare()


def _builder_class(tfds: Any, data: Dataset, name: str) -> type:
    """Makes the builder of one data set; its records are blocks of rows."""
    tensor = lambda array, shape: tfds.features.Tensor(
        shape=shape, dtype=array.dtype, encoding=tfds.features.Encoding.BYTES
    )
    inputs, targets = next(iter(data.splits.values()))
    same = all(x is y for x, y in data.splits.values())  # an autoencoder's
    features = {
        "inputs": tensor(inputs, (None, *inputs.shape[1:])),
        **({} if same else {"targets": tensor(targets, (None, *targets.shape[1:]))}),
        # Small, so every record repeats them: a record says all that it needs.
        **{f"extras_{k}": tensor(v, v.shape) for k, v in data.extras.items()},
    }
    extras = {f"extras_{k}": v for k, v in data.extras.items()}

    class ArraysBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        def __init__(self, **kwargs):
            self.name = name
            self.VERSION = tfds.core.Version(VERSION)
            super().__init__(**kwargs)

        def _info(self):
            info = tfds.core.DatasetInfo(
                builder=self,
                description=data.description,
                features=tfds.features.FeaturesDict(features),
                metadata=tfds.core.MetadataDict(
                    digest=data.digest, splits=list(data.splits)
                ),
                disable_shuffling=True,
            )
            # TFDS would ask a server for what it knows of these data: nothing.
            info.initialize_from_bucket = lambda: None
            return info

        def _split_generators(self, dl_manager):
            return {k: self._generate_examples(*v) for k, v in data.splits.items()}

        def _generate_examples(self, inputs, targets):
            rows = max(1, _RECORD_BYTES // max(1, inputs[:1].nbytes))
            for start in range(0, len(inputs), rows):
                block = slice(start, start + rows)
                pair = {} if same else {"targets": targets[block]}
                yield start, {"inputs": inputs[block], **pair, **extras}

    return ArraysBuilder


def _read(tfds: Any, home: pathlib.Path, name: str) -> Dataset:
    mend = f"delete the folder {home} and load again."
    try:
        builder = tfds.builder_from_directory(str(home))
        metadata = dict(builder.info.metadata)
        splits, extras = {}, {}
        for split in metadata["splits"]:
            source = builder.as_data_source(split=split)
            records = source.__getitems__(list(range(len(source))))
            inputs = np.concatenate([record["inputs"] for record in records])
            targets = inputs
            if "targets" in records[0]:
                targets = np.concatenate([record["targets"] for record in records])
            splits[split] = (inputs, targets)
            extras = {
                key.removeprefix("extras_"): value
                for key, value in records[0].items()
                if key.startswith("extras_")
            }
    except Exception as error:
        raise RuntimeError(
            f"The prepared data set {name!r} cannot be read ({error}): {mend}"
        ) from error
    data = make_dataset(name, builder.info.description, splits, extras=extras)
    if data.digest != metadata["digest"]:
        raise RuntimeError(
            f"The prepared data set {name!r} is damaged: its contents have the digest "
            f"{data.digest}, {metadata['digest']} was written: {mend}"
        )
    return data
