"""Table of the methods: what each is, where it lives, and whether it is built.

The rows stand in ``catalog.csv`` beside this file, one line per method, and their
citations in ``catalog.bib``. To add a method, set its state to ``built``, list the
public names of its home, and give the key of its BibTeX entry. The table of a README
stands between the lines ``<!-- methods -->`` and ``<!-- /methods -->``::

    python -m jaxlab.catalog README.md           # writes it
    python -m jaxlab.catalog README.md --check   # exit status 1 if it is stale

Needs the standard library alone.
"""

import argparse
import csv
import dataclasses
import importlib.resources
import os
import pathlib
import re
import sys
from collections.abc import Sequence
from typing import Literal

__all__ = ["METHODS", "Method", "markdown_table"]

START, END = "<!-- methods -->", "<!-- /methods -->"


@dataclasses.dataclass(frozen=True)
class Method:
    """Describes one method of the table.

    Attributes:
      number: its number, from 1, which never changes.
      title: title of the paper, or its beginning.
      what: the name it goes by here.
      home: module that holds it, such as ``jaxlab.structured``.
      state: ``"built"`` or ``"planned"``.
      names: its public names in ``home``; empty while planned.
      bibtex: citation of the paper, or None while planned.

    Examples:
      >>> method = METHODS[20]
      >>> method.number, method.what, method.home, method.state
      (21, 'Monarch', 'jaxlab.structured', 'built')
    """

    number: int
    title: str
    what: str
    home: str
    state: Literal["built", "planned"]
    names: tuple[str, ...] = ()
    bibtex: str | None = None


def markdown_table(*, methods: Sequence[Method] | None = None) -> str:
    """Renders methods as a Markdown table, one row each.

    Args:
      methods: rows of the table; all of them if None.

    Returns:
      The lines of the table, without a newline at the end.

    Examples:
      >>> print(markdown_table(methods=METHODS[20:21]).splitlines()[0])
      | # | Paper | What it is here | Home | State |
    """
    lines = ["| # | Paper | What it is here | Home | State |", "|--:|---|---|---|---|"]
    for method in METHODS if methods is None else methods:
        state = f"**{method.state}**" if method.state == "built" else method.state
        cells = (method.number, method.title, method.what, f"`{method.home}`", state)
        escaped = (str(cell).replace("|", r"\|") for cell in cells)
        lines.append(f"| {' | '.join(escaped)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the table into a file, or says whether the one there is stale."""
    parser = argparse.ArgumentParser(
        prog="python -m jaxlab.catalog",
        description="Write the table of methods between its two markers.",
    )
    parser.add_argument("file", type=pathlib.Path, help="Markdown file, as README.md")
    parser.add_argument(
        "--check", action="store_true", help="change nothing, exit 1 if it is stale"
    )
    options = parser.parse_args(arguments)
    try:
        before = options.file.read_text(encoding="utf-8")
        after = _with_table(before)
    except (OSError, ValueError) as error:
        print(f"{options.file}: {error}", file=sys.stderr)
        return 2
    if after == before:
        return 0
    if options.check:
        print(
            f"{options.file}: the table of methods is stale; run "
            f"python -m jaxlab.catalog {options.file}",
            file=sys.stderr,
        )
        return 1
    # A reader sees the old file or the new one, never a part of it.
    partial = options.file.with_name(f"{options.file.name}.{os.getpid()}.tmp")
    try:
        partial.write_text(after, encoding="utf-8")
        partial.chmod(options.file.stat().st_mode)
        partial.replace(options.file)
    finally:
        partial.unlink(missing_ok=True)
    return 0


def _with_table(text: str) -> str:
    """Puts the table between the two markers of a text that has each once."""
    if (
        text.count(START) != 1
        or text.count(END) != 1
        or text.find(END) < text.find(START)
    ):
        raise ValueError(f"needs one {START} and, after it, one {END}.")
    head, rest = text.split(START)
    _, tail = rest.split(END)
    return f"{head}{START}\n{markdown_table()}\n{END}{tail}"


def _read() -> tuple[Method, ...]:
    folder = importlib.resources.files("jaxlab")
    entries = folder.joinpath("catalog.bib").read_text(encoding="utf-8")
    cite = {
        match["key"]: match[0].strip()
        for match in re.finditer(r"^@\w+\{(?P<key>[^,]+),.*?^\}", entries, re.M | re.S)
    }
    rows = folder.joinpath("catalog.csv").read_text(encoding="utf-8")
    return tuple(
        Method(
            number=int(row["number"]),
            title=row["title"],
            what=row["what"],
            home=row["home"],
            state=row["state"],
            names=tuple(row["names"].split()),
            bibtex=cite[row["cite"]] if row["cite"] else None,
        )
        for row in csv.DictReader(rows.splitlines())
    )


METHODS = _read()

if __name__ == "__main__":
    sys.exit(main())
