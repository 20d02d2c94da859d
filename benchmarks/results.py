"""Result files: JSON lines, one record a line, written whole or not at all.

``benchmarks/results/<device>/<kind>_<name>.jsonl`` holds full runs and is committed.
Devices are real, except where the name ends in ``-compiled``: those have only been
compiled for. Small runs go to ``out/benchmarks`` in the same layout: they show that the
code works, and their figures mean nothing.
"""

import datetime
import hashlib
import json
import os
import pathlib
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.environment import ROOT

Record = dict[str, Any]

RESULTS = ROOT / "benchmarks" / "results"
SMALL = ROOT / "out" / "benchmarks"
# What a member adds to the head that :func:`complete` writes.
OWN_FIELDS = ("case", "data", "dtype", "samples", "seed", "shapes")


def digest(*arrays: Any) -> str:
    """Computes a sha256 of arrays: types, shapes and contents.

    Examples:
      >>> digest(np.zeros(2)) == digest(np.zeros((2, 1)))
      False
    """
    summary = hashlib.sha256()
    for array in map(np.asarray, arrays):
        summary.update(f"{array.dtype.str}{array.shape}".encode())
        summary.update(np.ascontiguousarray(array).tobytes())
    return summary.hexdigest()


def directory_for(preset: str, directory: pathlib.Path | None = None) -> pathlib.Path:
    """Chooses where a run's files go.

    Args:
      preset: "small" or "full".
      directory: the caller's wish, if any.

    Raises:
      ValueError: if a small run is to be filed among the measurements.
    """
    if directory is None:
        return RESULTS if preset == "full" else SMALL
    chosen = directory.resolve()
    if preset != "full" and chosen.is_relative_to(RESULTS):
        raise ValueError(
            f"{RESULTS.name}/ holds full runs only; give a small run another "
            f"directory, such as {SMALL.relative_to(ROOT)}."
        )
    return chosen


def complete(
    own: Mapping[str, Any],
    *,
    kind: str,
    name: str,
    preset: str,
    command: str,
    environment: Mapping[str, Any],
) -> Record:
    """Puts the common head in front of what a member measured.

    Args:
      own: the member's dict: ``case`` (what tells this record from its neighbours),
        ``data`` (``{"name": ..., "digest": ...}``), ``dtype``, ``shapes``, ``seed``,
        ``samples`` (every repetition, by name; none if nothing was run), and whatever
        else it keeps.
      kind: "speed", "claim", "estimate" or "demo".
      name: the member.
      preset: "small" or "full".
      command: what was typed.
      environment: :func:`benchmarks.environment.describe`.

    Raises:
      ValueError: if a field is missing.
    """
    missing = [field for field in OWN_FIELDS if field not in own]
    if missing:
        raise ValueError(f"a record needs {list(OWN_FIELDS)}; missing: {missing}.")
    now = datetime.datetime.now(datetime.UTC)
    return {
        "kind": kind,
        "name": name,
        "preset": preset,
        "command": command,
        "date": now.isoformat(timespec="seconds"),
        **environment,
        **own,
    }


def path_of(directory: pathlib.Path, device: str, kind: str, name: str) -> pathlib.Path:
    """Says where the records of one member on one device stand."""
    return directory / device / f"{kind}_{name}.jsonl"


def write_atomically(path: pathlib.Path, content: bytes) -> None:
    """Replaces a file in one step: readers see the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def save_results(directory: pathlib.Path, records: Sequence[Record]) -> pathlib.Path:
    """Writes the records of one run, in place of those of the run before.

    Raises:
      ValueError: if there are none, if they belong to several members, or if one of
        them holds a number that JSON cannot (NaN, infinity).
    """
    heads = {(r["device"]["name"], r["kind"], r["name"]) for r in records}
    if len(heads) != 1:
        raise ValueError(f"a file holds one run of one member, got {sorted(heads)}.")
    path = path_of(directory, *heads.pop())
    lines = [json.dumps(record, allow_nan=False) + "\n" for record in records]
    write_atomically(path, "".join(lines).encode())
    return path


def load_results(*paths: pathlib.Path) -> list[Record]:
    """Reads records that may be compared with each other.

    Raises:
      ValueError: if a file is damaged, or if two records measured different contents
        of data with the same name.
    """
    records: list[Record] = []
    for path in paths:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(f"{path.name}, line {number}: {error}.") from error
    check_comparable(records)
    return records


def check_comparable(records: Iterable[Record]) -> None:
    """Refuses records whose data have one name and different contents.

    Raises:
      ValueError: naming the data, the two digests and where each was measured.
    """
    seen: dict[str, Record] = {}
    for record in records:
        data = record["data"]
        first = seen.setdefault(data["name"], record)
        if first["data"]["digest"] != data["digest"]:
            here, there = (
                f"{r['data']['digest'][:12]} ({r['device']['name']}, {r['date']})"
                for r in (first, record)
            )
            raise ValueError(
                f"records on {data['name']!r} cannot be compared: its contents were "
                f"{here} and {there}. Measure both again on the same data."
            )


def devices_with_results(directory: pathlib.Path) -> list[str]:
    """Lists the devices that have result files, in alphabetical order."""
    return sorted({path.parent.name for path in directory.glob("*/*_*.jsonl")})
