"""Data sets by name: the table of what there is, and the one call that loads it.

The arrays are made once, kept in array_record files below ``data_dir``, and read from
there in every later call and by every other process.
"""

import os
import pathlib
import sys
from collections.abc import Callable
from functools import partial

from jaxlab.datasets.curves import curves
from jaxlab.datasets.dataset import Dataset
from jaxlab.datasets.digits import digits
from jaxlab.datasets.downloads import cifar10, mnist
from jaxlab.datasets.gaussian_clusters import gaussian_clusters
from jaxlab.datasets.planted import planted_structure
from jaxlab.datasets.stdlib_text import stdlib_text
from jaxlab.datasets.store import default_data_dir, load_or_prepare

__all__ = ["load", "names"]

_PYTHON = "python_" + "_".join(map(str, sys.version_info[:3]))
_BUILDERS: dict[str, Callable[[], Dataset]] = {
    "curves": curves,
    "digits": digits,
    "gaussian_clusters": gaussian_clusters,
    "planted_convolution": partial(planted_structure, "convolution"),
    "planted_dft": partial(planted_structure, "dft"),
    "planted_structure": planted_structure,
    "stdlib_text": stdlib_text,
}
_DOWNLOADS = {"cifar10": cifar10, "mnist": mnist}


def names() -> list[str]:
    """Lists the names that ``load`` takes, in alphabetical order.

    Returns:
      The names; all but ``cifar10`` and ``mnist`` are made without a network.

    Examples:
      >>> "digits" in names()
      True
    """
    return sorted([*_BUILDERS, *_DOWNLOADS])


def load(name: str, data_dir: str | os.PathLike[str] | None = None) -> Dataset:
    """Loads a data set by name; the first call prepares it on disk.

    Args:
      name: one of ``names()``.
      data_dir: folder of the prepared data; if None ``$JAXLAB_DATA_DIR``, else
        ``$XDG_CACHE_HOME/jaxlab``, else ``~/.cache/jaxlab``.

    Returns:
      The data set: NumPy splits, description, content digest.

    Raises:
      ValueError: if there is no data set of that name.
      ImportError: if a package of the extra ``jaxlab[train]`` is missing.
      RuntimeError: if prepared files are damaged, or a download fails.

    Examples:
      >>> data = load("digits")
      >>> {split: x.shape for split, (x, y) in data.splits.items()}
      {'train': (1297, 64), 'validation': (250, 64), 'test': (250, 64)}
    """
    if name not in names():
        raise ValueError(f"name must be one of {', '.join(names())}; got {name!r}.")
    folder = pathlib.Path(data_dir or default_data_dir())
    build = _BUILDERS.get(name) or partial(
        _DOWNLOADS[name], download_dir=folder / "downloads"
    )
    variant = _PYTHON if name == "stdlib_text" else ""
    return load_or_prepare(build, name, data_dir=folder, variant=variant)
