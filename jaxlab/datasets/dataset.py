"""A data set in memory: named splits of NumPy arrays and a digest of all of them.

The digest is what makes two results comparable: it is the SHA-256 of, in this order,

1. for every split, in alphabetical order of its name, the inputs, then the targets;
2. for every entry of ``extras``, in alphabetical order of its name, that array;

where an array contributes the text ``name|field|dtype|shape`` followed by a newline
and its bytes, little-endian and in C order. Name and description do not enter: data
are the same when their arrays are. Figures measured on data sets of different digests
were measured on different data and must not stand in one table.
"""

import dataclasses
import hashlib
from collections.abc import Mapping

import numpy as np

from jaxlab._checks import described

__all__ = ["Dataset", "content_digest", "make_dataset", "round_for_digest"]

Splits = Mapping[str, tuple[np.ndarray, np.ndarray]]


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """Holds the splits of one data set; its arrays are read-only.

    Attributes:
      name: the name that ``load`` knows it by.
      description: what the arrays are, how they were made and how they are split.
      digest: SHA-256 of the contents, 64 hexadecimal digits.
      splits: ``(inputs, targets)`` per split, a row per example; the splits are
        ``"train"``, where there is one ``"validation"``, and ``"test"``.
      extras: further arrays that belong to the data, such as the teacher of a
        planted task; the description names them.

    Examples:
      >>> rows = np.ones((4, 2), np.float32)
      >>> data = make_dataset("ones", "Ones.", {"train": (rows, rows)})
      >>> inputs, targets = data.splits["train"]
      >>> inputs.shape, data.digest[:8]
      ((4, 2), '5f5163dd')
    """

    name: str
    description: str
    digest: str
    splits: dict[str, tuple[np.ndarray, np.ndarray]]
    extras: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)


def make_dataset(
    name: str,
    description: str,
    splits: Splits,
    *,
    extras: Mapping[str, np.ndarray] | None = None,
) -> Dataset:
    """Builds a data set from arrays and computes its digest.

    Args:
      name: a short name, without spaces.
      description: what the arrays are.
      splits: ``(inputs, targets)`` per split, both with a row per example.
      extras: further arrays.

    Returns:
      The data set, with read-only views of the arrays that came in.

    Raises:
      ValueError: if inputs and targets of a split differ in their number of rows,
        or if there is no split.

    Examples:
      >>> x, y = np.zeros((3, 2), np.float32), np.zeros(3, np.int32)
      >>> make_dataset("tiny", "Zeros.", {"train": (x, y)}).splits["train"][1]
      array([0, 0, 0], dtype=int32)
    """
    if not splits:
        raise ValueError(f"{name}: a data set needs at least one split, got none.")
    for split, pair in splits.items():
        _check_pair(name, split, pair)
        inputs, targets = pair
        if inputs.shape[:1] != targets.shape[:1] or inputs.ndim == 0:
            raise ValueError(
                f"{name}/{split}: inputs and targets need the same number of rows, got "
                f"shapes {inputs.shape} and {targets.shape}."
            )
    frozen = {}
    for split, (inputs, targets) in splits.items():
        x = _read_only(inputs)
        frozen[split] = (x, x if targets is inputs else _read_only(targets))
    more = {k: _read_only(v) for k, v in (extras or {}).items()}
    digest = content_digest(frozen, extras=more)
    return Dataset(name, description, digest, frozen, more)


def content_digest(
    splits: Splits, *, extras: Mapping[str, np.ndarray] | None = None
) -> str:
    """Computes the SHA-256 of the arrays; the module's text gives the order.

    Args:
      splits: ``(inputs, targets)`` per split.
      extras: further arrays.

    Returns:
      64 hexadecimal digits; the order of the dictionaries does not matter.

    Examples:
      >>> x, y = np.zeros((2, 3), np.float32), np.zeros(2, np.int32)
      >>> one = content_digest({"train": (x, y), "test": (x, y)})
      >>> one == content_digest({"test": (x, y), "train": (x, y)})
      True
      >>> one == content_digest({"train": (x.T, y), "test": (x, y)})
      False
    """
    sha = hashlib.sha256()
    for split in sorted(splits):
        for field, array in zip(("inputs", "targets"), splits[split]):
            _absorb(sha, f"{split}|{field}", array)
    for key in sorted(extras or {}):
        _absorb(sha, f"extras|{key}", (extras or {})[key])
    return sha.hexdigest()


def round_for_digest(array: np.ndarray) -> np.ndarray:
    """Rounds to multiples of 2^-20, as float32, so that machines agree on the bits.

    The order of a sum or the last bit of ``exp`` differs between machines by about
    1e-16; after rounding hardly any value shows it, and the digest stays the same.

    Args:
      array: any shape, float64, values of order one.

    Returns:
      The same shape, float32.

    Examples:
      >>> (round_for_digest(np.array([0.1, 0.5])) * 2**20).tolist()
      [104858.0, 524288.0]
    """
    array = np.asarray(array)
    if array.dtype.kind not in "biuf":
        raise ValueError(
            f"round_for_digest: array must hold real numbers, got dtype {array.dtype}."
        )
    wide = array.astype(np.float64)
    return (np.round(wide * 2.0**20) / 2.0**20).astype(np.float32)


def _absorb(sha, label: str, array: np.ndarray) -> None:
    array = np.asarray(array)
    if array.dtype.hasobject:
        raise ValueError(
            f"content_digest: {label} must be an array of numbers, got objects."
        )
    little = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    shape = ",".join(map(str, array.shape))
    sha.update(f"{label}|{little.dtype.name}|{shape}\n".encode())
    sha.update(little.reshape(-1).view(np.uint8).data)


def _check_pair(name, split, pair):
    for field, array in zip(("inputs", "targets"), pair, strict=True):
        if not hasattr(array, "shape") or not hasattr(array, "dtype"):
            raise ValueError(
                f"{name}/{split}: {field} must be an array, got {described(array)}."
            )


def _read_only(array: np.ndarray) -> np.ndarray:
    view = np.asarray(array).view()
    view.flags.writeable = False
    return view
