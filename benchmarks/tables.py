"""Tables and verdicts: what a reader sees of the records."""

from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

NOT_SHOWN = "*not shown*"  # also the word for a cell without a file


class Verdict(NamedTuple):
    word: Literal["shown", "not shown", "reversed"]
    why: str  # the rule and the numbers it was computed from

    def __str__(self) -> str:
        return f"*{self.word}*: {self.why}"


class Table(NamedTuple):
    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[Any]]
    note: str = ""

    def __str__(self) -> str:
        return markdown(self)


def markdown(table: Table) -> str:
    """Writes a table in Markdown whose columns line up in plain text too.

    Examples:
      >>> print(markdown(Table("", ("name", "ms"), [("a", "1.50"), ("bc", "12")])))
      | name |   ms |
      |:-----|-----:|
      | a    | 1.50 |
      | bc   |   12 |
    """
    cells = [[str(cell) for cell in row] for row in (table.header, *table.rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]

    def line(row: Iterable[str]) -> str:
        first, *rest = zip(row, widths, strict=True)
        parts = [first[0].ljust(first[1]), *(cell.rjust(w) for cell, w in rest)]
        return f"| {' | '.join(parts)} |"

    rule = [":" + "-" * (widths[0] + 1), *("-" * (w + 1) + ":" for w in widths[1:])]
    body = "\n".join([line(cells[0]), f"|{'|'.join(rule)}|", *map(line, cells[1:])])
    title = f"**{table.title}**\n\n" if table.title else ""
    note = f"\n\n{table.note}" if table.note else ""
    return title + body + note
