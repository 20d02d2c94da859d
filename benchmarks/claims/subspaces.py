"""Is the middle of a learnt line of networks better than one network, or SWA's?

MLP-S on digits, a share of whose training labels is wrong. Methods take the same steps
and batches; one training run learns two endpoints of a line, or three of a curve or a
simplex, and its middle is one network. Against it stand the last iterate of SGD,
averaged weights (SWA: the rate falls to a constant tail, or on to zero), and at twice
the cost the mean probability of two networks trained apart.

Each method's rate, weight decay and knob (SWA's tail, the penalty's beta) are chosen by
the mean validation error of tuning seeds, once with weight decay and once without. Both
are reported; the verdict is on the former, where SGD is stronger. Seeds that are judged
have other starts, batches and wrong labels. Clean labels tell whether the gain over SGD
comes from the noise.
"""

import dataclasses
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from benchmarks import noisy_digits, plots
from benchmarks.paired import Difference, difference, spread
from benchmarks.results import Record
from benchmarks.subspace_nets import (
    CURVE,
    LINE,
    METHODS,
    NUM_ENDPOINTS,
    POSITIONS,
    Laboratory,
    Options,
    chosen,
    cosines,
    line_quality,
    listed,
    search,
)
from benchmarks.tables import Table, Verdict

CLAIM = (
    "On digits with wrong labels the middle of a learnt line of networks beats SGD, by "
    "more than on clean labels, and is as good as SWA. Points inside the line are not "
    "worse than its ends; between two networks trained apart accuracy collapses."
)

CLEAN = 0.0
TUNED, NONE = "tuned", "none"  # weight decay
MARGIN = 0.005  # of accuracy: less is as good
COLLAPSE = 0.1  # of accuracy: more is a collapse
MIDDLE = POSITIONS.index(0.5)
INSIDE = range(1, len(POSITIONS) - 1)
TAILS = 0.0125, 0.05, 0.2, 1.0  # of SWA's rate

# Parts of the claim.
BETTER = "middle less SGD"
AS_GOOD = "middle less SWA"
MORE = "gain over SGD less that on clean labels"
INNER = "lowest inner position less ends"
APART = "half-way between two networks less ends"

PRESETS = {
    "small": Options(
        seeds=2,
        tuning_seeds=2,
        shares=(CLEAN, 0.4),
        steps=40,
        batch_size=64,
        rates=(0.04, 0.16),
        subspace_rates=(0.16, 0.32),
        decays=(0.0, 1e-3),
        betas=(0.0, 1.0),
        tails=((0.5, 0.2), (0.5, -1.0)),
    ),
    "full": Options(
        seeds=24,
        tuning_seeds=8,
        shares=(CLEAN, 0.2, 0.4),
        steps=800,
        batch_size=64,
        rates=(0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64),
        subspace_rates=(0.04, 0.08, 0.16, 0.32),
        decays=(0.0, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
        betas=(0.0, 0.1, 1.0, 10.0),
        tails=(
            *((begin, tail) for begin in (0.125, 0.25, 0.5) for tail in TAILS),
            *((0.75, tail) for tail in TAILS[1:3]),
            (0.5, -1.0),
        ),
    ),
}


def run(options: Options, progress: Callable[..., Any]) -> Iterator[dict[str, Any]]:
    """Tunes and judges every method; on clean labels SGD and the line alone."""
    names = {
        share: list(METHODS) if share else ["SGD", LINE] for share in options.shares
    }
    total = 3 * sum(map(len, names.values()))
    with progress(total, "claim subspaces") as tick:
        for share in options.shares:
            laboratory = Laboratory(options, share)
            errors: dict[Any, dict[str, list[float]]] = {}
            for name in names[share]:
                tried = search(
                    METHODS[name],
                    options,
                    lambda c: _validated(laboratory, name, c, names[share], errors),  # noqa: B023
                )
                tick(f"{share:.0%} wrong, {name}, tuned")
                for decay in (NONE, TUNED):
                    best = chosen(tried, decay=decay == TUNED)
                    yield {
                        "case": {
                            "wrong labels": f"{share:.0%}",
                            "weight decay": decay,
                            "method": name,
                        },
                        "data": noisy_digits.head(),
                        "dtype": "float32",
                        "shapes": {"inputs": [noisy_digits.TRAIN, 64]},
                        "seed": list(range(options.seeds)),
                        "options": dataclasses.asdict(options),
                        "chosen": best._asdict() | {"text": str(best)},
                        "samples": _measured(laboratory, name, best)
                        | {"tuning": {str(c): e for c, e in tried.items()}},
                    }
                    tick(f"{share:.0%} wrong, {name}, decay {decay}")


def _validated(laboratory, name, config, names, errors):
    """Trains once for all methods that read the same networks."""
    method = METHODS[name]
    key = method.kind, config
    if name not in errors.get(key, {}):
        alike = [n for n in names if METHODS[n].kind == method.kind]
        alike = [n for n in alike if METHODS[n].knob == method.knob]
        widest = max((METHODS[n] for n in alike), key=lambda m: m.copies)
        runs = laboratory.runs(widest, config, laboratory.tuning)
        validation = laboratory.shared.validation
        for other in alike:
            copies = runs[: METHODS[other].copies]
            found = laboratory.read(METHODS[other], copies, validation)
            errors.setdefault(key, {})[other] = listed(1 - found["accuracy"])
    return errors[key][name]


def _measured(laboratory, name, config):
    """Judges a method on the test rows."""
    method, seeds, rows = METHODS[name], laboratory.judging, laboratory.shared.test
    runs = laboratory.runs(method, config, seeds)
    found = laboratory.read(method, runs, rows)
    samples = {what: listed(values) for what, values in found.items()}
    if len(method.points) * method.copies == 1:
        samples["top eigenvalue"] = laboratory.sharpness(method, runs[0])
    if NUM_ENDPOINTS[method.kind] > 1:
        samples["cosine"] = cosines(runs[0])
    if method.kind in (LINE, CURVE):
        bent = method.kind == CURVE
        samples["along"] = line_quality(runs[0], None, rows, curve=bent)
    if name == "SGD":
        other = laboratory.trained(method.kind, config, seeds, 1)
        join = lambda a, b: np.concatenate([a, b], axis=1)
        samples["cosine"] = cosines(jax.tree.map(join, runs[0], other))
        samples["along"] = line_quality(runs[0], other, rows)
    return samples


def _of(records: list[Record], decay: str) -> dict[str, dict[str, Record]]:
    """Sorts the records of one choice of weight decay by share and method."""
    found: dict[str, dict[str, Record]] = {}
    for record in records:
        case = record["case"]
        if case["weight decay"] == decay:
            found.setdefault(case["wrong labels"], {})[case["method"]] = record
    return found


def _percent(values: Sequence[float], digits: int = 1) -> str:
    return spread([100 * value for value in values], digits)


def gain(ours: Record, theirs: Record) -> list[float]:
    """Gives the differences of accuracy, seed by seed."""
    pairs = zip(ours["samples"]["accuracy"], theirs["samples"]["accuracy"], strict=True)
    return [a - b for a, b in pairs]


def against_ends(record: Record) -> list[Difference]:
    """Compares accuracy at each inner position with the mean of the ends."""
    along = np.array(record["samples"]["along"])
    ends = along[:, [0, -1]].mean(axis=1)
    return [difference(along[:, place].tolist(), ends.tolist()) for place in INSIDE]


def points(found: Difference) -> str:
    """Writes a difference of accuracies in points.

    Examples:
      >>> points(Difference(0.01, 0.02, 0.03))
      '+2.00 [+1.00, +3.00]'
    """
    mean, lower, upper = (
        100 * value for value in (found.mean, found.lower, found.upper)
    )
    return f"{mean:+.2f} [{lower:+.2f}, {upper:+.2f}]"


def tables(records: list[Record]) -> list[Table]:
    """Writes the parts of the claim, what was chosen, accuracy along the lines."""
    options = records[0]["options"]
    pairs = zip(parts(records, TUNED), parts(records, NONE), strict=True)
    written = [
        Table(
            "Parts of the claim, in points of test accuracy",
            ("wrong labels, part", "rule", "tuned weight decay", "no weight decay"),
            [
                (f"{a.share}, {a.what}", a.rule, points(a.found), points(b.found))
                for a, b in pairs
            ],
            "Mean paired difference and its 95 % interval, which the rule is on.",
        )
    ]
    for decay in (TUNED, NONE):
        rows, lines = [], []
        for share, methods in _of(records, decay).items():
            for name, record in methods.items():
                samples = record["samples"]
                sharp = samples.get("top eigenvalue")
                row = (
                    f"{share}, {name}",
                    record["chosen"]["text"],
                    _percent(samples["accuracy"]),
                    "" if name == "SGD" else points(_gain_over_sgd(methods, name)),
                    spread(samples["loss"], 3),
                    _percent(samples["calibration error"]),
                    spread(sharp, 1) if sharp else "",
                )
                rows.append(row)
                if "along" in samples and name != "line, 2 points":
                    along = 100 * np.mean(samples["along"], axis=0)
                    label = "two SGD networks" if name == "SGD" else name
                    cells = [f"{value:.1f}" for value in along]
                    cosine = statistics.mean(samples["cosine"])
                    lines.append((f"{share}, {label}", *cells, f"{cosine:.4f}"))
        title = "tuned weight decay" if decay == TUNED else "no weight decay"
        written.append(
            Table(
                f"With {title}",
                (
                    "wrong labels, method",
                    "chosen",
                    "test accuracy %",
                    "less SGD, points [95 %]",
                    "test loss",
                    "calibration error %",
                    "top eigenvalue",
                ),
                rows,
                f"MLP-S, {options['steps']} steps of {options['batch_size']}, momentum "
                f"0.9. Mean ± standard deviation of {options['seeds']} seeds. Rates "
                f"tried: {_tried(options['rates'])}, of subspaces "
                f"{_tried(options['subspace_rates'])}; decays: "
                f"{_tried(options['decays'])}; betas: {_tried(options['betas'])}. "
                "Two networks cost twice the gradients, all others one a step. The "
                "eigenvalue is of the Hessian of the training loss, wrong labels "
                "included.",
            )
        )
        written.append(
            Table(
                f"Test accuracy % along the way, {title}",
                (
                    "wrong labels, ends",
                    *(f"{t:g}" for t in POSITIONS),
                    "squared cosine of ends",
                ),
                lines,
                "Mean of the seeds. A straight line, or the curve; ends of the line "
                "and of the curve are learnt together.",
            )
        )
    return written


def _tried(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _gain_over_sgd(methods: dict[str, Record], name: str) -> Difference:
    gaps = gain(methods[name], methods["SGD"])
    return difference(gaps, [0.0] * len(gaps))


class Part(NamedTuple):
    """One part of the claim at one share of wrong labels, in points of accuracy."""

    share: str
    what: str
    found: Difference
    rule: str
    held: bool


def parts(records: list[Record], decay: str) -> list[Part]:
    """Judges every part of the claim; the rule is that of :func:`verdict`."""
    found = _of(records, decay)
    clean = found.pop(f"{CLEAN:.0%}")
    judged = []
    for share, methods in found.items():
        line, sgd, swa = methods[LINE], methods["SGD"], methods["SWA"]
        better, as_good = gain(line, sgd), gain(line, swa)
        more = difference(better, gain(clean[LINE], clean["SGD"]))
        better, as_good = (difference(g, [0.0] * len(g)) for g in (better, as_good))
        least = min(against_ends(line), key=lambda d: d.lower)
        middle = against_ends(sgd)[INSIDE.index(MIDDLE)]
        margin = f"above {-100 * MARGIN:g}"
        deep = f"below {-100 * COLLAPSE:g}"
        judged += [
            Part(share, BETTER, better, "above 0", better.lower > 0),
            Part(share, AS_GOOD, as_good, margin, as_good.lower > -MARGIN),
            Part(share, MORE, more, "above 0", more.lower > 0),
            Part(share, INNER, least, margin, least.lower > -MARGIN),
            Part(share, APART, middle, deep, middle.upper < -COLLAPSE),
        ]
    return judged


def verdict(records: list[Record]) -> Verdict:
    """Rules *shown* if five parts hold at each share of wrong labels.

    All with tuned weight decay, from 95 % intervals of mean paired differences of test
    accuracy. Better: middle of the line less SGD is above 0. As good: middle less SWA
    is above -MARGIN. Most under noise: the gain over SGD less that on clean labels is
    above 0. Inside: at each inner position accuracy less the mean of the ends is above
    -MARGIN. Collapse: half-way between two SGD networks accuracy less the mean of the
    ends is below -COLLAPSE. *Reversed*: middle less SGD is below 0 at each share.
    """
    judged = parts(records, TUNED)
    why = "; ".join(
        f"{'yes' if p.held else 'no'}: {p.share}, {p.what} {points(p.found)} (rule: "
        f"{p.rule})"
        for p in judged
    )
    why = f"in points of test accuracy, {why}."
    if all(part.held for part in judged):
        return Verdict("shown", why)
    worse = all(part.found.upper < 0 for part in judged if part.what == BETTER)
    return Verdict("reversed" if worse else "not shown", why)


def draw(records: list[Record]) -> Figure:
    """Draws accuracy along the lines, and every method's gain over SGD."""
    found = {d: _of(records, d) for d in (TUNED, NONE)}
    shares = [s for s in found[TUNED] if s != f"{CLEAN:.0%}"]
    ways = {LINE: "learnt line", CURVE: "learnt curve", "SGD": "two SGD networks"}
    with rc_context(plots.STYLE):
        figure = Figure(figsize=(10, 7), layout="constrained")
        above, below = figure.subplots(2, len(shares), squeeze=False, sharey="row")
        for axes, share in zip(above, shares, strict=True):
            for colour, name in zip(plots.COLOURS, ways, strict=False):
                along = np.array(found[TUNED][share][name]["samples"]["along"]) * 100
                mean, off = along.mean(axis=0), along.std(axis=0, ddof=1)
                axes.plot(POSITIONS, mean, "o-", color=colour, ms=4)
                axes.fill_between(
                    POSITIONS, mean - off, mean + off, color=colour, alpha=0.2, lw=0
                )
            apart = found[NONE][share]["SGD"]["samples"]["along"]
            axes.plot(POSITIONS, 100 * np.mean(apart, axis=0), "--", color="#666666")
            axes.set_title(f"Test accuracy, %, {share} wrong labels")
            axes.set_xlabel("position (band: ± one standard deviation)")
            axes.grid(axis="y", color="#e4e4e4", lw=0.6)
        for colour, label in zip(plots.COLOURS, ways.values(), strict=False):
            above[0].plot([], [], "o-", color=colour, ms=4, label=label)
        above[0].plot([], [], "--", color="#666666", label="these without decay")
        for axes, share in zip(below, shares, strict=True):
            names = [name for name in METHODS if name != "SGD"]
            axes.axvline(0, color="#666666", lw=1)
            for place, decay in enumerate((TUNED, NONE)):
                for height, name in enumerate(names):
                    seen = _gain_over_sgd(found[decay][share], name)
                    y = height + 0.24 * (place - 0.5)
                    colour = plots.COLOURS[3 + place]
                    ends = [100 * seen.lower, 100 * seen.upper]
                    axes.plot(ends, [y, y], color=colour, lw=1.5)
                    axes.plot([100 * seen.mean], [y], "os"[place], color=colour, ms=5)
            axes.set_yticks(range(len(names)), names)
            axes.set_ylim(len(names) - 0.5, -0.5)
            axes.tick_params(axis="y", length=0)
            axes.grid(axis="x", color="#e4e4e4", lw=0.6)
            axes.set_axisbelow(True)
            axes.set_title(f"Test accuracy less SGD's, points, {share} wrong labels")
            axes.set_xlabel("mean and 95 % interval")
        marks = (("o", "tuned weight decay"), ("s", "no weight decay"))
        for place, (mark, label) in enumerate(marks):
            colour = plots.COLOURS[3 + place]
            above[0].plot([], [], mark, color=colour, ms=5, label=label)
        figure.legend(loc="outside upper left", ncols=3, frameon=False)
    return figure
