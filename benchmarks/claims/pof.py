"""Does PoF leave less curvature in the head than more SGD, at a similar training loss?

MLP-S is trained on digits with a fifth of the labels wrong, or on 300 of them with
clean labels, at the rate of the best mean validation accuracy. Then it is trained on
for 160 steps: all weights by SGD, the features by SGD under the frozen head, or the
features by PoF, each on a cosine from a rate of its own to zero.

Curvature and training loss depend on the rate, and one is had for the other. So each
method chooses its rate, PoF its sampling range too, by one rule: of those whose mean
training loss stays within BAND of that before, the one of the least mean curvature of
the head. Means are geometric, over seeds that are not judged. A range of 0 would be SGD
under the frozen head. PoF's search may step up to 10,000, as in the authors' code for
several devices: with its 100 for one device every search on the clean rows ends there.

Not judged: each method at its best validation accuracy, and the features under the
frozen head at the rate that PoF chose.
"""

import dataclasses
import functools
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from benchmarks import noisy_digits, noisy_loops, plots
from benchmarks.noisy_digits import Params, Splits
from benchmarks.noisy_loops import (
    ALL,
    FIRST_TUNING_SEED,
    FROZEN,
    POF,
    SGD,
    Recipe,
    as_arrays,
    chosen,
)
from benchmarks.paired import DIVERGED, difference, finite, spread
from benchmarks.results import Record
from benchmarks.tables import Table, Verdict

CLAIM = (
    "On digits a trained net that is trained on by PoF ends with less curvature in its "
    "head than one trained on by SGD for as many steps, under a frozen head or not, at "
    "a similar training loss."
)

BAND = 1.05  # training loss over that before, either way, where a rate is chosen
APART = 1.10  # the same between two methods on the judged seeds
SHOWN = 1.3  # most in the picture

NOISY, CLEAN = "a fifth of the labels wrong", "300 clean rows"
CLEAN_ROWS = 300
BEFORE = "before"
METHODS = (FROZEN, ALL, POF)
FLAT, ACCURATE, SAME = "least curvature", "validation", "PoF's rate"
HEAD, WHOLE, LOSS = "head eigenvalue", "top eigenvalue", "train loss"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    seeds: int
    tuning_seeds: int
    settings: tuple[str, ...]
    base_steps: int
    steps: int
    base_rates: tuple[float, ...]
    rates: tuple[float, ...]
    ranges: tuple[float, ...]  # PoF's sampling range
    batch_size: int = 64


PRESETS = {
    "small": Options(
        seeds=2,
        tuning_seeds=1,
        settings=(NOISY,),
        base_steps=96,
        steps=32,
        base_rates=(0.05,),
        rates=(0.0125, 0.05),
        ranges=(2.0,),
    ),
    "full": Options(
        seeds=20,
        tuning_seeds=5,
        settings=(NOISY, CLEAN),
        base_steps=800,
        steps=160,
        base_rates=(0.00625, 0.0125, 0.025, 0.05, 0.1, 0.2, 0.4),
        rates=tuple(0.00625 * 2 ** (k / 3) for k in range(19)),
        ranges=(0.25, 0.5, 1.0, 2.0, 4.0),
    ),
}


def splits(setting: str, seed: int) -> Splits:
    """Gives the rows of a setting."""
    if setting == NOISY:
        return noisy_digits.splits(seed)
    data = noisy_digits.splits(seed, share=0.0)
    kept = np.random.default_rng(seed).permutation(noisy_digits.TRAIN)[:CLEAN_ROWS]
    train = data.train[0][kept], data.train[1][kept]
    return data._replace(train=train, wrong=data.wrong[kept])


def grids(options: Options) -> dict[str, dict[str, tuple[float, ...]]]:
    """Lists what each method may choose from."""
    grid = {"rate": options.rates}
    return {FROZEN: grid, ALL: grid, POF: grid | {"range": options.ranges}}


class Place:
    """One setting: its nets before, and training on from there."""

    def __init__(self, setting: str, options: Options):
        self.setting, self.options = setting, options
        self.net = noisy_digits.net("MLP-S")
        self.rate = math.nan  # of the nets before
        self.data = functools.cache(functools.partial(splits, setting))
        self.start = functools.cache(lambda seed: self.base(seed, self.rate))

    def recipe(self, method: str, steps: int) -> Recipe:
        """Makes the recipe of a method for a number of steps."""
        rows = noisy_digits.TRAIN if self.setting == NOISY else CLEAN_ROWS
        size = self.options.batch_size
        epochs = steps // (rows // size)
        return Recipe(self.net, method, epochs, size, rows=rows)

    def base(self, seed: int, rate: float) -> Params:
        """Trains a net from its start."""
        made = self.recipe(SGD, self.options.base_steps)
        key, rows = jax.random.key(seed), self.data(seed).train
        return noisy_loops.train(made, {"rate": rate}, key, rows)

    def trained_on(
        self, method: str, numbers: Mapping[str, float], seed: int
    ) -> noisy_loops.PostTrained:
        """Trains the net of a seed on."""
        made = self.recipe(method, self.options.steps)
        key, rows = jax.random.key(seed), self.data(seed).train
        given = as_arrays(numbers)
        return noisy_loops.post_train(made, given, key, self.start(seed), rows)

    def quality(self, params: Params, seed: int) -> dict[str, float]:
        """Measures losses, accuracies and the curvature of the head."""
        data = self.data(seed)
        found = noisy_digits.quality(self.net, params, data)
        if self.setting == CLEAN:
            del found["wrong labels learnt"]
        found[LOSS] = finite(found[LOSS])
        found[HEAD] = DIVERGED
        if found[LOSS] < DIVERGED:
            top = noisy_loops.top_head_eigenvalue(self.net, params, data.train)
            found[HEAD] = finite(top)
        return {name: float(f"{value:.6g}") for name, value in found.items()}

    def judged(self, found: Sequence[Params]) -> dict[str, list[float]]:
        """Measures the nets of the judged seeds."""
        samples: dict[str, list[float]] = {}
        for seed, params in enumerate(found):
            values = self.quality(params, seed)
            train = self.data(seed).train
            values[WHOLE] = noisy_digits.top_eigenvalue(self.net, params, train)
            for name, value in values.items():
                samples.setdefault(name, []).append(value)
        return samples


def log_ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Computes the mean of the logarithms of paired ratios."""
    pairs = zip(ours, theirs, strict=True)
    return statistics.mean(math.log(a / b) for a, b in pairs)


def flattest(tried: Sequence[Sequence[Any]], before: Sequence[float]) -> dict:
    """Chooses the numbers of the least curvature whose training loss is in the band.

    Args:
      tried: pairs of numbers and, by name, what was measured on each tuning seed.
      before: training losses of the nets before.

    Returns:
      The numbers; where no loss is in the band, those of the nearest loss.

    Examples:
      >>> measured = lambda loss, top: {LOSS: [loss], HEAD: [top]}
      >>> low, high = measured(1.04, 3.0), measured(1.2, 1.0)
      >>> tried = [[{"rate": 1.0}, low], [{"rate": 2.0}, high]]
      >>> flattest(tried, [1.0]), flattest(tried, [2.0])
      ({'rate': 1.0}, {'rate': 2.0})
    """
    off = lambda pair: abs(log_ratio(pair[1][LOSS], before))
    inside = [pair for pair in tried if off(pair) <= math.log(BAND)]
    if not inside:
        return min(tried, key=off)[0]
    curvature = lambda pair: log_ratio(pair[1][HEAD], [1.0] * len(before))
    return min(inside, key=curvature)[0]


def run(options: Options, progress: Callable[..., Any]) -> Iterator[dict[str, Any]]:
    """Trains the nets before, tunes, and trains on from the judged seeds."""
    points = {m: noisy_loops.points(grid) for m, grid in grids(options).items()}
    each = len(options.base_rates) + sum(map(len, points.values()))
    total = len(options.settings) * (each + 2 * len(METHODS) + 2)
    tuning = range(FIRST_TUNING_SEED, FIRST_TUNING_SEED + options.tuning_seeds)
    judged = range(options.seeds)

    def record(place, method, by, numbers, samples, **more):
        return {
            "case": {"setting": place.setting, "method": method, "by": by},
            "data": noisy_digits.head(),
            "dtype": "float32",
            "shapes": {"train": [len(place.data(0).wrong), 64]},
            "seed": list(judged),
            "options": dataclasses.asdict(options),
            "numbers": numbers,
            "samples": samples,
            **more,
        }

    def after(place, method, by, numbers, **more):
        runs = [place.trained_on(method, numbers, seed) for seed in judged]
        samples = place.judged([one.params for one in runs])
        if method == POF:
            samples["capped"] = [float(one.capped) for one in runs]
            samples["idle"] = [float(one.idle) for one in runs]
        return record(place, method, by, numbers, samples, **more)

    with progress(total, "claim pof") as tick:
        for setting in options.settings:
            place, bases = Place(setting, options), []
            for rate in options.base_rates:
                found = [place.quality(place.base(s, rate), s) for s in tuning]
                accuracies = [one["validation accuracy"] for one in found]
                bases.append([{"rate": rate}, accuracies])
                tick(f"{setting}, rate {rate:g} before")
            place.rate = chosen(bases)["rate"]
            samples = place.judged([place.start(seed) for seed in judged])
            first = {"rate": place.rate}
            yield record(place, BEFORE, ACCURATE, first, samples, tuning=bases)
            tick(f"{setting}, before")
            before = [place.quality(place.start(seed), seed)[LOSS] for seed in tuning]
            for method, choices in points.items():
                tried = []
                for numbers in choices:
                    nets = [place.trained_on(method, numbers, s).params for s in tuning]
                    pairs = zip(nets, tuning, strict=True)
                    found = [place.quality(params, s) for params, s in pairs]
                    wanted = (LOSS, HEAD, "validation accuracy")
                    values = {name: [one[name] for one in found] for name in wanted}
                    tried.append([numbers, values])
                    tick(f"{setting}, tuning {method}")
                best = flattest(tried, before)
                yield after(place, method, FLAT, best, tuning=tried, before=before)
                tick(f"{setting}, {method}")
                accurate = chosen([[n, v["validation accuracy"]] for n, v in tried])
                yield after(place, method, ACCURATE, accurate)
                tick(f"{setting}, {method} by validation")
            yield after(place, FROZEN, SAME, {"rate": best["rate"]})
            tick(f"{setting}, {FROZEN} at the rate of {POF}")


def _of(records: list[Record], setting: str) -> dict[tuple[str, str], Record]:
    return {
        (r["case"]["method"], r["case"]["by"]): r
        for r in records
        if r["case"]["setting"] == setting
    }


def _settings(records: list[Record]) -> list[str]:
    return list(dict.fromkeys(r["case"]["setting"] for r in records))


def _row(record: Record, ours: Record) -> tuple[str, ...]:
    case, samples = record["case"], record["samples"]
    row = [case["method"], case["by"], noisy_loops.named(record["numbers"])]
    row.append(spread([100 * value for value in samples["test accuracy"]], 1))
    for what in (LOSS, HEAD, WHOLE):
        over = noisy_loops.ratio(ours["samples"][what], samples[what])
        mean, deviation = (
            f(samples[what]) for f in (statistics.mean, statistics.stdev)
        )
        row += [f"{mean:.3g} ± {deviation:.2g}", "" if record is ours else str(over)]
    return tuple(row)


def tables(records: list[Record]) -> list[Table]:
    """Writes the nets of each setting."""
    found, over = [], "PoF over it"
    header = ("trained on", "chosen by", "numbers", "test accuracy %")
    header += (LOSS, over, HEAD, over, WHOLE, over)
    for setting in _settings(records):
        nets = _of(records, setting)
        ours = nets[POF, FLAT]
        options = ours["options"]
        ends = [
            f"{method} ({', '.join(edge)})"
            for method, grid in grids(Options(**options)).items()
            if (edge := noisy_loops.at_ends(nets[method, FLAT]["numbers"], grid))
        ]
        capped, idle = (
            f"{100 * statistics.mean(ours['samples'][what]):.1f} %"
            for what in ("capped", "idle")
        )
        found.append(
            Table(
                f"Nets, {setting}",
                header,
                [_row(record, ours) for record in nets.values()],
                f"MLP-S, {options['base_steps']} steps before and {options['steps']} "
                f"after. Mean ± standard deviation of {options['seeds']} seeds; PoF of "
                "the least curvature over the others: geometric mean of the paired "
                f"ratios with its 95 % interval. Of its searches {capped} ended at the "
                f"largest step and {idle} found none. At an end of the grid: "
                f"{'; '.join(ends) or 'none'}.",
            )
        )
    return found


def verdict(records: list[Record]) -> Verdict:
    """Rules *shown* if PoF beats both ways to train on by SGD in every setting.

    The numbers of each method are those of the least curvature in the band. Similar:
    the geometric mean of the paired ratios of training losses, PoF over SGD, is within
    APART either way. Less: the 95 % interval of the mean paired difference of the
    logarithms of the head's top eigenvalue is below 0. *Reversed*: all losses are
    similar and all intervals are above 0.
    """
    parts, similar, gaps = {}, [], []
    for setting in _settings(records):
        nets = _of(records, setting)
        ours = nets[POF, FLAT]["samples"]
        for method in (FROZEN, ALL):
            theirs = nets[method, FLAT]["samples"]
            loss = math.exp(log_ratio(ours[LOSS], theirs[LOSS]))
            similar.append(1 / APART <= loss <= APART)
            logs = ([math.log(x) for x in samples[HEAD]] for samples in (ours, theirs))
            gaps.append(difference(*logs))
            text = f"{setting}, PoF against {method}"
            parts[
                f"{text}: training loss times {loss:.3f} (rule: within {APART:.2f} "
                "either way)"
            ] = similar[-1]
            parts[
                f"{text}: log of the head's eigenvalue {gaps[-1]} (rule: below 0)"
            ] = gaps[-1].upper < 0
    why = "; ".join(f"{'yes' if held else 'no'}: {p}" for p, held in parts.items())
    if all(parts.values()):
        return Verdict("shown", f"{why}.")
    other = all(similar) and all(gap.lower > 0 for gap in gaps)
    return Verdict("reversed" if other else "not shown", f"{why}.")


def draw(records: list[Record]) -> Figure:
    """Draws curvature over training loss while tuning, and the judged ratios."""
    settings = _settings(records)
    colours = dict(zip(METHODS, plots.COLOURS, strict=False))
    with rc_context(plots.STYLE):
        figure = Figure(figsize=(9.5, 6.2), layout="constrained")
        grid = figure.subplots(2, len(settings), squeeze=False)
        for (above, below), setting in zip(grid.T, settings, strict=True):
            nets = _of(records, setting)
            for method, colour in colours.items():
                record = nets[method, FLAT]
                base, size = record["before"], len(record["before"])
                for numbers, values in record["tuning"]:
                    loss = math.exp(log_ratio(values[LOSS], base))
                    top = math.exp(log_ratio(values[HEAD], [1.0] * size))
                    mine = numbers == record["numbers"]
                    style = {"ms": 9, "mec": "black"} if mine else {"ms": 4}
                    layer = 4 if mine else 3 if method != POF else 2
                    if loss < SHOWN:
                        dot = {"color": colour, "zorder": layer} | style
                        above.plot([loss], [top], "o", **dot)
                above.plot([], [], "o", color=colour, label=method)
            above.axvspan(1 / BAND, BAND, color="#eeeeee", zorder=0)
            noisy_loops.log_axis(above)
            above.set_xlabel("training loss over that before (grey: band)")
            above.set_title(f"Head's eigenvalue, {setting}")
            ours = nets[POF, FLAT]["samples"][HEAD]
            names = {
                "before": (BEFORE, ACCURATE),
                FROZEN: (FROZEN, FLAT),
                "frozen, same rate": (FROZEN, SAME),
                ALL: (ALL, FLAT),
            }
            for height, case in enumerate(names.values()):
                theirs = nets[case]["samples"][HEAD]
                ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
                found = noisy_loops.ratio(ours, theirs)
                line = {"color": plots.COLOURS[3]}
                below.plot(ratios, [height] * len(ratios), "o", color="#666666", ms=3)
                below.plot([found.lower, found.upper], [height] * 2, **line)
                below.plot([found.mean], [height], "|", ms=14, mew=2, **line)
            below.axvline(1, color="#666666", lw=1)
            below.set_yticks(range(len(names)), list(names))
            below.set_ylim(len(names) - 0.5, -0.5)
            below.set_xlabel("dots: seeds, bar: mean and 95 % interval")
            below.set_title("Head's eigenvalue, PoF over the other")
        handles, labels = grid[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=3, frameon=False)
    return figure
