"""The look of every picture: one font size, no frames, labels at the data."""

import io
import pathlib
from collections.abc import Mapping, Sequence

from matplotlib import rc_context
from matplotlib.figure import Figure

from benchmarks import timing
from benchmarks.results import write_atomically

# Okabe and Ito's colours, which colour-blind readers can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#666666", "#009E73", "#CC79A7", "#E69F00")
STYLE = {
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "font.size": 10,
    "savefig.dpi": 160,
}


def save(figure: Figure, path: pathlib.Path) -> None:
    """Writes a PNG in one step; equal figures give equal bytes."""
    stream = io.BytesIO()
    with rc_context(STYLE):
        figure.savefig(stream, format="png", metadata={"Software": None})
    write_atomically(path, stream.getvalue())


def dots(rows: Mapping[str, Mapping[str, Sequence[float]]], *, xlabel: str) -> Figure:
    """Draws a row of dots for each label: minimum and quartiles of every series.

    The scale is logarithmic where the values differ by more than a factor of 20.

    Args:
      rows: ``{row label: {series: values}}``; the same series in every row.
      xlabel: what the values are.
    """
    series = list(next(iter(rows.values())))
    gap = min(0.18, 0.8 / len(series))
    # Names that do not fit into one line stand in three columns.
    columns = len(series) if sum(map(len, series)) < 75 else 3
    with rc_context(STYLE):
        figure = Figure(figsize=(7.5, 1.2 + 0.5 * len(rows)), layout="constrained")
        axes = figure.subplots()
        for height, values in enumerate(rows.values()):
            for index, name in enumerate(series):
                y = height + gap * (index - (len(series) - 1) / 2)
                spread = timing.quartiles(values[name])
                colour = COLOURS[index]
                axes.plot([spread.lower, spread.upper], [y, y], color=colour, lw=1.5)
                axes.plot([min(values[name])], [y], "o", color=colour, ms=6)
        axes.set_yticks(range(len(rows)), list(rows))
        axes.set_ylim(len(rows) - 0.4, -0.6)
        every = [x for values in rows.values() for xs in values.values() for x in xs]
        if max(every) > 20 * min(every):
            axes.set_xscale("log")
        else:
            axes.set_xlim(0, 1.05 * max(every))
        axes.set_xlabel(xlabel)
        axes.grid(axis="x", which="both", color="#e4e4e4", lw=0.6)
        axes.set_axisbelow(True)
        axes.tick_params(axis="y", length=0)
        for index, name in enumerate(series):
            axes.plot([], [], "o", color=COLOURS[index], ms=6, label=name)
        figure.legend(loc="outside upper left", ncols=columns, frameon=False)
    return figure


def apart(values: Sequence[float], gap: float) -> list[float]:
    """Moves label positions up until neighbours are ``gap`` apart, lowest fixed.

    Examples:
      >>> apart([3.0, 1.0, 1.5], gap=1.0)
      [3.0, 1.0, 2.0]
    """
    placed: dict[int, float] = {}
    below = -float("inf")
    for index in sorted(range(len(values)), key=values.__getitem__):
        below = placed[index] = max(values[index], below + gap)
    return [placed[index] for index in range(len(values))]
