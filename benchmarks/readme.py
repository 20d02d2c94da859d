"""Copies measured figures from the result files into the README.

What stands between ``<!-- figures -->`` and ``<!-- /figures -->`` is replaced.
"""

import pathlib
import sys

from benchmarks import demo, report
from benchmarks.results import (
    RESULTS,
    devices_with_results,
    load_results,
    path_of,
    write_atomically,
)
from benchmarks.tables import NOT_SHOWN

START, END = "<!-- figures -->", "<!-- /figures -->"


def figures(directory: pathlib.Path) -> str:
    """Writes what stands between the markers: the demo's table and the verdicts."""
    parts = []
    for device in devices_with_results(directory):
        path = path_of(directory, device, demo.KIND, demo.NAME)
        if path.exists():
            records = load_results(path)
            parts += [*map(str, demo.tables(records)), f"On {device}."]
    parts = parts or [f"The demo's table: {NOT_SHOWN}."]
    parts.append(
        "Verdicts of the full runs ([tables, pictures and how they were "
        "measured](benchmarks/results/README.md)):"
    )
    return "\n\n".join([*parts, str(report.summary(directory))])


def renewed(text: str, content: str) -> str:
    """Puts ``content`` between the markers of ``text``.

    Raises:
      ValueError: unless each marker stands there once, in order.
    """
    before, *rest = text.split(START)
    after = rest[0].split(END)[1:] if len(rest) == 1 else []
    if len(after) != 1:
        raise ValueError(f"the README needs {START} and then {END}, once each.")
    return f"{before}{START}\n\n{content}\n\n{END}{after[0]}"


def main(
    readme: pathlib.Path, *, directory: pathlib.Path | None = None, check: bool = False
) -> int:
    """Renews the README, or only compares; returns the exit status."""
    old = readme.read_text()
    try:
        new = renewed(old, figures(RESULTS if directory is None else directory))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if check and new != old:
        command = "python -m benchmarks readme"
        print(f"{readme.name} is stale; renew it with: {command}", file=sys.stderr)
        return 1
    if new != old:
        write_atomically(readme, new.encode())
    return 0
