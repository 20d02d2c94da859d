"""What the records of Hessian spectra and of paths say: tables and the picture."""

import functools
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from benchmarks import plots
from benchmarks.cluster_nets import FLAT, gap_after, outliers
from benchmarks.results import Record
from benchmarks.tables import Table

SPECTRUM, PATH = "spectrum", "path"
SMALL_BATCH, OTHER_START, RANDOM = "small batch", "other start", "random direction"
BASE = (3, 12, 1.0)  # clusters, width, separation: what the cases differ from
ORDER, PROBES = 64, 4


def _case(record: Record) -> tuple[int, int, float]:
    case = record["case"]
    return case["clusters"], case["width"], case["separation"]


def spectra_of(records: list[Record]) -> dict[tuple[int, int, float], Record]:
    """Finds the spectra by clusters, width and separation."""
    return {_case(r): r for r in records if r["case"]["task"] == SPECTRUM}


def paths_of(records: list[Record]) -> dict[str, Record]:
    """Finds the paths by where they go."""
    return {r["case"]["to"]: r for r in records if r["case"]["task"] == PATH}


def rise(curves: Sequence[Sequence[float]]) -> list[float]:
    """Computes for each seed the highest loss on the way over the higher end.

    Examples:
      >>> rise([[1.0, 4.0, 2.0], [2.0, 1.5, 1.0]])
      [2.0, 1.0]
    """
    return [max(curve) / max(curve[0], curve[-1]) for curve in curves]


def factor(here: Sequence[float], there: Sequence[float]) -> float:
    """Gives the median over the seeds of the ratios, there over here."""
    pairs = zip(here, there, strict=True)
    return statistics.median(after / before for before, after in pairs)


def column(record: Record, name: str, place: int | None = None) -> list[Any]:
    values = record["samples"][name]
    return values if place is None else [value[place] for value in values]


def counts(record: Record, name: str = "first") -> list[int]:
    """Counts the outliers of each seed."""
    return [outliers(values) for values in record["samples"][name]]


def gaps(record: Record) -> list[float]:
    """Gives each seed's gap after the k - 1 largest eigenvalues."""
    count = record["case"]["clusters"] - 1
    return [gap_after(values, count) for values in record["samples"]["first"]]


def _middle(values: Sequence[float], form: str = ".3g") -> str:
    return format(statistics.median(values), form)


def tables(records: list[Record]) -> list[Table]:
    """Writes losses beside spectra, estimates beside exact values, and the paths."""
    spectra, paths = spectra_of(records), paths_of(records)
    rows, estimates = [], []
    for (k, width, separation), record in spectra.items():
        p = record["shapes"]["parameters"]
        name = f"k = {k}, width {width}, separation {separation:g}"
        of = functools.partial(column, record)
        random = [gap_after(v, outliers(v)) for v in of("random")]
        rows.append(
            (
                name,
                f"{p:,}",
                _middle(of("loss")),
                " ".join(map(str, counts(record))),
                _middle(of("first", 0)),
                _middle(of("first", k - 2)),
                _middle(of("first", k - 1)),
                _middle(gaps(record)),
                _middle(random),
                _middle(of("bulk rms"), ".2e"),
                _middle([flat / p for flat in of("flat")], ".3f"),
                _middle(of("last"), ".2g"),
            )
        )
        estimates.append(
            (
                name,
                f"{max(of('ritz error')):.1e}",
                _middle(of("density error"), ".1%"),
            )
        )
    options = records[0]["options"]
    seeds = len(records[0]["seed"])
    note = (
        f"Medians of {seeds} seeds, the counts one by one; eigenvalues exact, float64. "
        f"{options['descent']} full-batch steps at rate {options['rate']:g}. Gap: "
        "eigenvalue k - 1 over the next; random: widest gap of a random symmetric "
        "matrix with the same trace and Frobenius norm. Bulk: all but the k - 1 "
        f"largest. Flat: share of absolute values below {FLAT:g} of the largest."
    )
    header = (
        "clusters",
        "p",
        "loss",
        "outliers",
        "first",
        "no. k - 1",
        "no. k",
        "gap",
        "random",
        "bulk RMS",
        "flat",
        "least",
    )
    estimated = ("clusters", "outliers off by", "density off by")
    return [
        Table("Spectra at the end of training", header, rows, note),
        Table(
            "Estimates in float32 against them",
            estimated,
            estimates,
            f"Stochastic Lanczos quadrature, order {ORDER}, {PROBES} probes. Outliers: "
            "the worst of the k - 1 largest nodes, probes and seeds, relative to the "
            "largest eigenvalue. Density: half the integral of the absolute difference "
            "from the eigenvalues, equally smoothed; median.",
        ),
        _path_table(paths, options),
    ]


def _path_table(paths: dict[str, Record], options: dict[str, Any]) -> Table:
    rows = []
    for name, record in paths.items():
        of = functools.partial(column, record)
        ends = lambda field: " to ".join(
            _middle([curve[i] for curve in of(field)])  # noqa: B023
            for i in (0, -1)
        )
        rows.append(
            (
                name,
                _middle(of("distance")),
                ends("train loss"),
                _middle([max(c) for c in of("train loss")]),
                "" if name == RANDOM else f"{max(rise(of('train loss'))):.4g}",
                ends("test loss"),
                "" if name == RANDOM else f"{max(rise(of('test loss'))):.4g}",
                _middle([min(c) for c in of("test accuracy")], ".1%"),
                ends("sharpness"),
            )
        )
    header = (
        "from the large-batch solution to",
        "distance",
        "train loss, ends",
        "highest",
        "worst rise",
        "test loss, ends",
        "worst rise",
        "least test accuracy",
        "sharpness",
    )
    first = next(iter(paths.values()))
    width = first["shapes"]["layers"][1]
    note = (
        f"Digits, ReLU net 64-{width}-{width}-10, SGD at rate {options['rate']:g}: "
        f"{options['large_steps']:,} steps of batch {options['large_batch']}, then as "
        f"many epochs of batch {options['small_batch']}; {options['points']} points on "
        "each segment. Medians over the seeds; a rise is the highest loss on the way "
        "over the higher end, in the worst seed. The large-batch solution lies "
        f"{_middle(first['samples']['from start'])} from its start. Sharpness: largest "
        "eigenvalue of the train loss, at both ends, by Lanczos."
    )
    return Table("Segments between solutions on digits", header, rows, note)


def draw(records: list[Record]) -> Figure:
    """Draws eigenvalues by rank, one density beside its estimate, and the paths."""
    spectra, paths = spectra_of(records), paths_of(records)
    k, width, separation = BASE
    of = lambda keep: {c: r for c, r in spectra.items() if keep(*c)}
    panels = [
        ("k clusters", of(lambda c, w, s: (w, s) == (width, separation)), 0),
        (f"{k} clusters, width", of(lambda c, w, s: (c, s) == (k, separation)), 1),
        (f"{k} clusters, separation", of(lambda c, w, s: (c, w) == (k, width)), 2),
    ]
    with rc_context(plots.STYLE):
        figure = Figure(figsize=(11.5, 7.2), layout="constrained")
        axes = figure.subplots(2, 3)
        for ax, (title, found, place) in zip(axes[0], panels, strict=True):
            _draw_ranks(ax, found, place, whole=place > 0)
            ax.set_title(title)
        _draw_density(axes[1, 0], spectra[BASE])
        for ax, split in zip(axes[1, 1:], ("train", "test"), strict=True):
            _draw_paths(ax, paths, f"{split} loss")
    return figure


def _draw_ranks(ax: Any, found: dict[Any, Record], place: int, *, whole: bool) -> None:
    """Draws every seed's first eigenvalues, or all absolute ones of the first seed."""
    for colour, (case, record) in zip(
        plots.COLOURS, sorted(found.items()), strict=False
    ):
        label = f"{case[place]:g}, loss {_middle(record['samples']['loss'], '.2g')}"
        k = case[0]
        lines = record["samples"]["first"]
        if whole:
            lines = [sorted(map(abs, record["spectrum"]), reverse=True)]
        for values in lines:
            ranks = range(1, len(values) + 1)
            ax.plot(ranks, values, color=colour, lw=1, alpha=0.7)
            ax.plot(ranks[: k - 1], values[: k - 1], "o", color=colour, ms=4)
        ax.plot([], [], "o-", color=colour, ms=4, lw=1, label=label)
    if not whole:
        largest = found[max(found)]["samples"]["random"][0]
        label = f"random matrix, for {max(found)[place]:g}"
        ax.plot(range(1, len(largest) + 1), largest, ":", color="#999999", label=label)
    ax.set_xscale("log")
    ax.set_yscale("log")
    firsts = [r["samples"]["first"][0] for r in found.values()]
    # The legend stands above the lines.
    top = 30 * max(map(max, firsts))
    ax.set_ylim(1e-5 if whole else min(map(min, firsts)) / 2, top)
    ax.set_xlabel("rank (dots: the first k - 1)")
    ax.set_ylabel("|eigenvalue|" if whole else "eigenvalue")
    ax.legend(frameon=False, fontsize=8, loc="upper right")


def _draw_density(ax: Any, record: Record) -> None:
    grid, estimate, error, exact = map(np.asarray, record["density"])
    bottom = 1e-6 * max(exact)
    above = lambda y: np.maximum(y, bottom)
    ax.fill_between(
        grid,
        above(estimate - 2 * error),
        above(estimate + 2 * error),
        color=plots.COLOURS[0],
        alpha=0.25,
        lw=0,
    )
    ax.plot(grid, above(exact), color="#000000", lw=1, label="exact")
    ax.plot(grid, above(estimate), "--", color=plots.COLOURS[0], label="estimate")
    ax.set_yscale("log")
    ax.set_ylim(bottom=2 * bottom)
    ax.set_title("{} clusters, width {}: density".format(*_case(record)))
    ax.set_xlabel("eigenvalue")
    ax.legend(frameon=False, fontsize=8)


def _draw_paths(ax: Any, paths: dict[str, Record], field: str) -> None:
    for colour, (name, record) in zip(plots.COLOURS, paths.items(), strict=False):
        for curve in record["samples"][field]:
            ax.plot(np.linspace(0, 1, len(curve)), curve, color=colour, lw=1)
        ax.plot([], [], color=colour, label=name)
    ax.set_yscale("log")
    ax.set_title(f"digits: {field}")
    ax.set_ylim(
        top=5 * max(max(c) for r in paths.values() for c in r["samples"][field])
    )
    ax.set_xlabel("way from the large-batch solution")
    ax.legend(frameon=False, fontsize=8)
