"""Compares training runs by their directories, at equal tokens and equal seconds."""

import pathlib
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from benchmarks import plots
from benchmarks.tables import Table
from benchmarks.train import FILE
from benchmarks.training_runs import METRICS, SECONDS, TOKENS, lines_of, read_json


class Past(NamedTuple):
    """A run as its directory shows it, finished or not."""

    name: str
    device: str
    data: dict[str, str]
    lines: list[dict[str, Any]]

    def at(self, axis: str, where: float) -> float:
        """Interpolates the validation loss; NaN before the first evaluation."""
        of = lambda name: [line[name] for line in self.lines]
        return float(
            np.interp(where, of(axis), of("validation_loss"), left=np.nan, right=np.nan)
        )

    def end(self, axis: str) -> float:
        return self.lines[-1][axis]


def past(folder: pathlib.Path) -> Past:
    """Reads a run's directory.

    Raises:
      ValueError: if there is no run, or none with an evaluation.
    """
    path = folder / FILE
    lines = lines_of(folder)
    if not path.exists() or not lines:
        raise ValueError(
            f"{folder} holds no run with an evaluation: it needs {FILE} and {METRICS}, "
            "which python -m benchmarks train writes."
        )
    found = read_json(path)
    return Past(folder.name, found["device"], found["data"], lines)


def comparison(folders: Sequence[pathlib.Path]) -> tuple[list[Table], Figure]:
    """Compares runs at equal tokens and at equal seconds of training.

    Raises:
      ValueError: if there are fewer than two, or they saw different data.
    """
    if len(folders) < 2:
        raise ValueError(f"a comparison needs at least two runs, got {len(folders)}.")
    runs = [past(folder) for folder in folders]
    for run in runs[1:]:
        if run.data["digest"] != runs[0].data["digest"]:
            shown = [f"{r.name}: {r.data['digest'][:12]}" for r in (runs[0], run)]
            raise ValueError(
                f"runs on different data cannot be compared ({'; '.join(shown)}): "
                "train both on the same text."
            )
    return [_at(runs, TOKENS), _at(runs, SECONDS)], _drawn(runs)


def _at(runs: list[Past], axis: str) -> Table:
    most = min(run.end(axis) for run in runs)
    places = [most / 4, most / 2, most]
    shown = lambda x: f"{x:,.0f}" if axis == TOKENS else f"{x:.3g} s"
    cell = lambda x: "" if np.isnan(x) else f"{x:.4f}"
    rows = []
    for run in runs:
        last = run.lines[-1]
        sharpness = [x["sharpness"] for x in run.lines if x.get("sharpness")]
        speed = last[TOKENS] / max(last[SECONDS], 1e-9)
        rows.append(
            (
                run.name,
                *(cell(run.at(axis, place)) for place in places),
                shown(last[axis]),
                f"{speed:,.0f}",
                f"{sum(line['compile_seconds'] for line in run.lines):.1f}",
                f"{sharpness[-1]:.4g}" if sharpness else "",
                run.device,
            )
        )
    rows.sort(key=lambda row: row[3])
    header = (
        "run",
        *(f"at {shown(place)}" for place in places),
        "trained in all",
        "tokens/s",
        "compiling s",
        "last sharpness",
        "device",
    )
    note = (
        "Validation loss, nats per token, between two evaluations interpolated; an "
        "empty cell lies before the first one. Best at the last place first. Seconds "
        "of training steps, without compiling and evaluation."
    )
    return Table(f"Equal {axis}", header, rows, note)


def _drawn(runs: list[Past]) -> Figure:
    styles = ("-", "--", ":")
    with rc_context(plots.STYLE):
        figure = Figure(figsize=(11, 4.4), layout="constrained")
        for axes, axis in zip(figure.subplots(1, 2, sharey=True), (TOKENS, SECONDS)):
            for number, run in enumerate(runs):
                again, place = divmod(number, len(plots.COLOURS))
                axes.plot(
                    [line[axis] for line in run.lines],
                    [line["validation_loss"] for line in run.lines],
                    marker="o",
                    ms=3,
                    color=plots.COLOURS[place],
                    ls=styles[again % len(styles)],
                    label=run.name if axis == TOKENS else None,
                )
            axes.set_xlabel(axis if axis == TOKENS else "seconds of training steps")
            axes.set_title(f"Validation loss against {axis}")
            if axis == TOKENS:
                axes.xaxis.set_major_formatter(EngFormatter())
            axes.grid(color="#e4e4e4", lw=0.6)
            axes.set_axisbelow(True)
        columns = min(4, len(runs))
        figure.legend(loc="outside lower center", ncols=columns, frameon=False)
    return figure


def compare(folders: Sequence[pathlib.Path], picture: pathlib.Path) -> int:
    """Prints the comparison, draws it, and returns the exit status."""
    try:
        tables, figure = comparison(folders)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    plots.save(figure, picture)
    print(*tables, f"Picture: {picture}", sep="\n\n")
    return 0
