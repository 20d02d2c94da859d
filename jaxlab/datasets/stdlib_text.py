"""Characters of Python's standard library: a real text that every machine has.

The text are the ``*.py`` files of the interpreter that runs, without installed
packages, tests, and files that the installation generates. It differs between Python
releases (and a little between builds), so the digest does: figures from different
digests are not comparable. The split is by file: SHA-256 of the path, relative to the
library and with forward slashes, modulo 10, is 0 for the test split, 1 for the
validation split, and anything else for the training split. No file is in two splits.

Vocabulary: symbol 0 stands for every other character, then tab, newline, and the
printable ASCII characters from space to tilde: 98 symbols.
"""

import hashlib
import pathlib
import sys
import sysconfig
from collections.abc import Iterator

import numpy as np
from jaxtyping import Integer

from jaxlab._checks import described, is_whole
from jaxlab.datasets.dataset import Dataset, make_dataset

__all__ = ["decode_text", "encode_text", "stdlib_text", "windows"]

_OTHER = 255  # no character of ASCII; shown as a question mark
_SYMBOLS = np.array([_OTHER, 9, 10, *range(32, 127)], np.uint8)
_CODES = np.zeros(256, np.uint8)
_CODES[_SYMBOLS] = np.arange(len(_SYMBOLS))
_SKIPPED = frozenset(
    ("site-packages", "dist-packages", "test", "tests", "idlelib", "idle_test")
)
_GENERATED = ("_sysconfigdata", "sitecustomize", "usercustomize")


def encode_text(text: str) -> Integer[np.ndarray, "length"]:
    r"""Turns a text into symbols 0..97, one per character.

    Args:
      text: any text; characters without a symbol of their own become 0.

    Returns:
      (len(text),) uint8.

    Examples:
      >>> encode_text("a\tz~é").tolist()
      [68, 1, 93, 97, 0]
    """
    if not isinstance(text, str):
        raise ValueError(f"encode_text: text must be a string, got {described(text)}.")
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
    return _CODES[np.minimum(points, _OTHER)]


def decode_text(tokens: Integer[np.ndarray, "length"]) -> str:
    """Turns symbols 0..97 back into a text; 0 becomes a question mark.

    Args:
      tokens: integers (length,), each in 0..97.

    Returns:
      A text of as many characters.

    Raises:
      ValueError: if a symbol is outside 0..97.

    Examples:
      >>> decode_text(encode_text("def f(x):"))
      'def f(x):'
    """
    tokens = np.asarray(tokens)
    if tokens.ndim != 1 or (tokens.size and tokens.dtype.kind not in "iu"):
        raise ValueError(
            "decode_text: tokens must be integers of shape (length,), got "
            f"{described(tokens)}."
        )
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < len(_SYMBOLS):
        raise ValueError(
            f"tokens must be in 0..{len(_SYMBOLS) - 1}, got values from "
            f"{tokens.min()} to {tokens.max()}."
        )
    symbols = np.where(_SYMBOLS == _OTHER, ord("?"), _SYMBOLS).astype(np.uint8)
    return symbols[tokens.astype(np.intp)].tobytes().decode("ascii")


def windows(
    tokens: Integer[np.ndarray, "length"], *, context: int
) -> tuple[Integer[np.ndarray, "rows context"], Integer[np.ndarray, "rows context"]]:
    """Cuts a stream into windows without overlap and their next-symbol targets.

    Args:
      tokens: the stream, (length,) integers.
      context: length of a window, at least 1.

    Returns:
      Inputs and targets, both ((length - 1) // context, context) in the dtype of the
      stream; the targets are the stream one symbol later. What does not fill a window
      at the end is left out. ``inputs.reshape(-1)`` is the stream again, so windows
      can be cut anew to another context.

    Raises:
      ValueError: if the stream is not one-dimensional or ``context`` is below 1.

    Examples:
      >>> inputs, targets = windows(np.arange(8), context=3)
      >>> inputs.tolist(), targets.tolist()
      ([[0, 1, 2], [3, 4, 5]], [[1, 2, 3], [4, 5, 6]])
    """
    tokens = np.asarray(tokens)
    if tokens.ndim != 1 or not is_whole(context) or context < 1:
        raise ValueError(
            "windows needs a stream of shape (length,) and context at least 1, got "
            f"shape {tokens.shape} and context {context!r}."
        )
    rows = max(0, len(tokens) - 1) // context
    cut = lambda start: tokens[start : start + rows * context].reshape(rows, context)
    return cut(0), cut(1)


def stdlib_text(*, context: int = 128) -> Dataset:
    """Reads the standard library's sources as windows of characters.

    Args:
      context: length of a window.

    Returns:
      Splits ``"train"``, ``"validation"`` and ``"test"`` of ``windows``, uint8;
      ``extras["symbols"]`` is (98,) uint8, the character of each symbol (255: other).

    Raises:
      RuntimeError: if this Python has no sources beside it.

    Examples:
      >>> data = stdlib_text(context=64)
      >>> inputs, targets = data.splits["validation"]
      >>> bool((inputs[0, 1:] == targets[0, :-1]).all())
      True
    """
    root = pathlib.Path(sysconfig.get_path("stdlib"))
    streams: dict[str, list[np.ndarray]] = {"train": [], "validation": [], "test": []}
    for path in _sources(root):
        text = (root / path).read_text(encoding="utf-8", errors="replace")
        streams[split_of(path)].append(encode_text(text))
    if not all(streams.values()):
        raise RuntimeError(
            f"stdlib_text reads the *.py files below {root}, and this Python has too "
            "few of them there (a zipped or stripped installation): use a Python with "
            "its sources, or a data_dir that was prepared by one."
        )
    splits = {
        k: windows(np.concatenate(v), context=context) for k, v in streams.items()
    }
    python = ".".join(map(str, sys.version_info[:3]))
    counts = " / ".join(f"{k} {len(v)}" for k, v in streams.items())
    description = (
        f"Characters of the standard library of Python {python}, split by file "
        f"({counts} files): windows (rows, {context}) uint8 of a vocabulary of "
        f"{len(_SYMBOLS)} symbols (extras['symbols']), targets one character later. "
        "The text differs between Python releases: compare digests before figures."
    )
    extras = {"symbols": _SYMBOLS}
    return make_dataset("stdlib_text", description, splits, extras=extras)


def split_of(path: str) -> str:
    """Returns the split of a file; it depends on its relative path alone.

    Args:
      path: relative to the standard library, with forward slashes.

    Returns:
      ``"train"``, ``"validation"`` or ``"test"``.

    Examples:
      >>> [split_of(path) for path in ("abc.py", "ast.py", "json/decoder.py")]
      ['train', 'test', 'train']
    """
    share = int.from_bytes(hashlib.sha256(path.encode()).digest(), "big") % 10
    return {0: "test", 1: "validation"}.get(share, "train")


def _sources(root: pathlib.Path) -> Iterator[str]:
    for path in sorted(p.relative_to(root).as_posix() for p in root.rglob("*.py")):
        *folders, file = path.split("/")
        generated = any(part.startswith("config-") for part in folders)
        if not (generated or _SKIPPED & set(folders) or file.startswith(_GENERATED)):
            yield path
