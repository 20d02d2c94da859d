"""Tuned runs over seeds: the chosen rate, paired differences, their interval.

A difference is that of two methods at the same seed; its interval holds the mean with
95 % by Student's t. A run that diverged counts as the loss ``DIVERGED``.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from matplotlib import rc_context
from matplotlib.figure import Figure
from scipy.special import stdtrit

from benchmarks import plots
from benchmarks.results import Record

DIVERGED = 1e30  # stands for losses that are not finite


def finite(loss: float) -> float:
    """Puts ``DIVERGED`` in place of a loss that is not finite.

    Examples:
      >>> finite(2.0), finite(float("nan"))
      (2.0, 1e+30)
    """
    return loss if math.isfinite(loss) and loss < DIVERGED else DIVERGED


def chosen_rate(tuning: Mapping[str, Sequence[float]]) -> str:
    """Picks the rate of the least mean validation loss.

    Examples:
      >>> chosen_rate({"0.001": [2.0, 2.1], "0.01": [1.9, 2.3]})
      '0.001'
    """
    return min(tuning, key=lambda rate: statistics.mean(tuning[rate]))


class Difference(NamedTuple):
    """Mean of paired differences with its 95 % interval by Student's t."""

    lower: float
    mean: float
    upper: float

    def __str__(self) -> str:
        return f"{self.mean:+.4f} [{self.lower:+.4f}, {self.upper:+.4f}]"


def difference(ours: Sequence[float], theirs: Sequence[float]) -> Difference:
    """Compares two methods seed by seed: ours less theirs.

    Examples:
      >>> difference([1.0, 2.0, 3.0], [2.0, 3.0, 4.0])
      Difference(lower=-1.0, mean=-1.0, upper=-1.0)
    """
    gaps = [a - b for a, b in zip(ours, theirs, strict=True)]
    mean, deviation = statistics.mean(gaps), statistics.stdev(gaps)
    half = float(stdtrit(len(gaps) - 1, 0.975)) * deviation / math.sqrt(len(gaps))
    return Difference(mean - half, mean, mean + half)


def noise(record: Record) -> float:
    """Gives two standard deviations of a method's test loss over the seeds."""
    return 2 * statistics.stdev(record["samples"]["test"])


def spread(losses: Sequence[float], digits: int = 3) -> str:
    """Writes mean and standard deviation over the seeds.

    Examples:
      >>> spread([1.0, 2.0, 3.0])
      '2.000 ± 1.000'
    """
    if max(losses) >= DIVERGED:
        return f"{sum(loss >= DIVERGED for loss in losses)} diverged"
    deviation = statistics.stdev(losses)
    return f"{statistics.mean(losses):.{digits}f} ± {deviation:.{digits}f}"


def gaps(ours: Record, theirs: Record) -> list[float]:
    """Gives the paired differences of test losses, ours less theirs."""
    pairs = zip(ours["samples"]["test"], theirs["samples"]["test"], strict=True)
    return [a - b for a, b in pairs]


def draw_differences(rows: Mapping[str, Sequence[float]], *, xlabel: str) -> Figure:
    """Draws paired differences: a dot for each seed, a bar for the 95 % interval."""
    with rc_context(plots.STYLE):
        figure = Figure(figsize=(7.5, 1.2 + 0.45 * len(rows)), layout="constrained")
        axes = figure.subplots()
        axes.axvline(0, color="#666666", lw=1)
        for height, gaps in enumerate(rows.values()):
            found = difference(gaps, [0.0] * len(gaps))
            axes.plot([found.lower, found.upper], [height] * 2, color=plots.COLOURS[0])
            axes.plot(gaps, [height] * len(gaps), "o", color=plots.COLOURS[1], ms=4)
            axes.plot([found.mean], [height], "|", color=plots.COLOURS[0], ms=14, mew=2)
        axes.set_yticks(range(len(rows)), list(rows))
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlabel(f"{xlabel} (dots: seeds, bar: mean and 95 % interval)")
        axes.grid(axis="x", color="#e4e4e4", lw=0.6)
        axes.set_axisbelow(True)
        axes.tick_params(axis="y", length=0)
    return figure
