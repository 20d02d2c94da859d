"""Turns the result files into one Markdown page and one picture per file.

Everything on the page is computed from the records; where there is no file, the cell
reads *not shown*.
"""

import pathlib
from types import ModuleType

from benchmarks import members, plots
from benchmarks.results import (
    RESULTS,
    Record,
    devices_with_results,
    load_results,
    path_of,
    write_atomically,
)
from benchmarks.tables import NOT_SHOWN, Table

PAGE = "README.md"


def provenance(record: Record) -> str:
    """Says in one paragraph where the records of a run come from."""
    device, versions, flags = record["device"], record["versions"], record["flags"]
    commit = (versions["commit"] or "unknown")[:12]
    packages = ", ".join(
        f"{name} {version}"
        for name, version in versions.items()
        if name not in ("commit", "dirty") and version is not None
    )
    where = device["kind"]
    if device["cores"]:
        where = f"{device['kind']}, {len(device['cores'])} cores"
    if device["pinned"]:
        where = f"{device['kind']}, pinned to core {device['cores'][0]}"
    return (
        f"`{record['command']}`, {record['date']}, {where}; {packages}; commit "
        f"{commit}{' with local changes' if versions['dirty'] else ''}; XLA_FLAGS "
        f"`{flags['XLA_FLAGS'] or '(none)'}`, matmul precision "
        f"{flags['matmul_precision'] or 'default'}, x64 "
        f"{'on' if flags['x64'] else 'off'}, {record['dtype']}."
    )


def summary(directory: pathlib.Path) -> Table:
    """Tabulates the verdicts, members by devices."""
    devices = devices_with_results(directory)
    rows = []
    for kind in members.PLACES:
        for name in members.names(kind):
            cells = []
            for device in devices or [None]:
                path = path_of(directory, device or "", kind, name)
                cells.append(_word(members.member(kind, name), path))
            rows.append((f"{kind} {name}", *cells))
    return Table("", ("measured", *(devices or ["any device"])), rows)


def _word(module: ModuleType, path: pathlib.Path) -> str:
    if not path.exists():
        return NOT_SHOWN
    found = members.verdict(module, load_results(path))
    return f"*{found.word}*" if found else NOT_SHOWN


def page(directory: pathlib.Path) -> str:
    """Writes the page's text; raises where records cannot be compared."""
    devices = devices_with_results(directory)
    parts = [
        "# Measured results",
        "Made by `python -m benchmarks report` from the files beside it; nothing here "
        "is typed by hand. A cell without a file reads *not shown*.",
        str(summary(directory)),
    ]
    for kind in members.PLACES:
        for name in members.names(kind):
            module = members.member(kind, name)
            parts += [f"## {kind} {name}", module.CLAIM]
            paths = {d: path_of(directory, d, kind, name) for d in devices}
            paths = {device: path for device, path in paths.items() if path.exists()}
            if not paths:
                parts.append(NOT_SHOWN)
            # All devices at once: this refuses runs on different data.
            load_results(*paths.values())
            for device, path in paths.items():
                records = load_results(path)
                picture = path.with_suffix(".png").relative_to(directory).as_posix()
                parts += [
                    f"### {device}",
                    str(members.verdict(module, records) or members.NO_VERDICT),
                    *map(str, module.tables(records)),
                    f"![{kind} {name} on {device}]({picture})",
                    provenance(records[0]),
                ]
    return "\n\n".join(parts) + "\n"


def write(directory: pathlib.Path | None = None) -> pathlib.Path:
    """Writes page and pictures beside the result files; returns the page's path."""
    directory = RESULTS if directory is None else directory
    text = page(directory)
    for device in devices_with_results(directory):
        for kind in members.PLACES:
            for name in members.names(kind):
                path = path_of(directory, device, kind, name)
                if path.exists():
                    figure = members.member(kind, name).draw(load_results(path))
                    plots.save(figure, path.with_suffix(".png"))
    write_atomically(directory / PAGE, text.encode())
    return directory / PAGE
