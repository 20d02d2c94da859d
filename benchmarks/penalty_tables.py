"""Tables and picture of the claim on the gradient-norm penalty, from its records."""

import statistics
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from benchmarks import noisy_digits, plots
from benchmarks.paired import Difference, difference, spread
from benchmarks.results import Record
from benchmarks.tables import Table

STRENGTH, TUNED, TEXT = "strength", "tuned", "text"
SGD, DECAY, STOPPING = "SGD", "SGD, weight decay", "SGD, early stopping"
SAM, PENALTY, BOTH = "SAM", "penalty", "penalty, weight decay"
EXACT = "exact"
GRID = ("rate", "decay", "penalty")
ALPHA = 0.8  # of the penalty where nothing else is said, as in the authors' recipes
REFERENCE = 0.16  # the lambda that is judged, for all models


def strength_of(records: list[Record]) -> dict[tuple[str, str, float], Record]:
    return {
        (r["case"]["model"], r["case"]["alpha"], r["case"]["lambda"]): r
        for r in records
        if r["case"]["task"] == STRENGTH
    }


def tuned_of(records: list[Record]) -> dict[tuple[str, str], Record]:
    return {
        (r["case"]["model"], r["case"]["method"]): r
        for r in records
        if r["case"]["task"] == TUNED
    }


def text_of(records: list[Record]) -> dict[float, Record]:
    return {r["case"]["lambda"]: r for r in records if r["case"]["task"] == TEXT}


def ratios(records: list[Record]) -> dict[str, float]:
    """Divides the mean top eigenvalue with the judged penalty by that without."""
    mean = lambda record: statistics.mean(record["samples"]["top eigenvalue"])
    found = strength_of(records)
    models = dict.fromkeys(model for model, *_ in found)
    text = text_of(records)
    return {
        model: mean(found[model, f"{ALPHA:g}", REFERENCE])
        / mean(found[model, SGD, 0.0])
        for model in models
    } | {"GPT-S": mean(text[REFERENCE]) / mean(text[0.0])}


def gain(
    records: list[Record], ours: str, theirs: str, model: str = "MLP-S"
) -> Difference:
    """Compares test accuracies seed by seed, in percentage points."""
    tuned = tuned_of(records)
    column = lambda name: [
        100 * share for share in tuned[model, name]["samples"]["test accuracy"]
    ]
    return difference(column(ours), column(theirs))


def of_alpha(records: list[Record]) -> dict[str, Difference]:
    """Compares each alpha with SAM at equal lambda, accuracies seed by seed.

    The mean over lambda of a seed's test accuracies is one value of the pair; the
    largest lambda, at which some runs fail, is left out.
    """
    found = {key: r for key, r in strength_of(records).items() if key[0] == "MLP-S"}
    alphas = [a for a in dict.fromkeys(a for _, a, _ in found) if a not in (SGD, "1")]
    penalties = sorted({p for _, a, p in found if a != SGD})
    penalties = penalties[:-1] or penalties

    def column(alpha):
        rows = [found["MLP-S", alpha, p]["samples"]["test accuracy"] for p in penalties]
        return [100 * statistics.mean(seed) for seed in zip(*rows, strict=True)]

    return {a: difference(column(a), column("1")) for a in alphas}


def _models(found: dict[Any, Record]) -> list[str]:
    return list(dict.fromkeys(key[0] for key in found))


def _percent(record: Record, name: str) -> str:
    return spread([100 * value for value in record["samples"][name]], 1)


def _eigenvalue(record: Record) -> str:
    return spread(record["samples"]["top eigenvalue"], 2)


def tables(records: list[Record]) -> list[Table]:
    """Writes tuned methods, strengths, differences and the text."""
    strength = strength_of(records)
    return [
        _tuned_table(records),
        *(_strength_table(strength, model) for model in _models(strength)),
        _difference_table(records),
        _text_table(text_of(records)),
    ]


def _tuned_table(records: list[Record]) -> Table:
    columns = ("test accuracy", "calibration error", "wrong labels learnt")
    rows = [
        (
            *key,
            ", ".join(f"{k} {v:g}" for k, v in record["numbers"].items() if v),
            *(_percent(record, name) for name in columns),
            _eigenvalue(record),
        )
        for key, record in tuned_of(records).items()
    ]
    options = records[0]["options"]
    grid = {name: ", ".join(f"{v:g}" for v in options["grid"][name]) for name in GRID}
    steps = ", ".join(f"{n} ({model})" for model, n in options["steps"].items())
    note = (
        f"Digits, {noisy_digits.TRAIN:,} rows with {noisy_digits.FLIPPED:.0%} wrong "
        f"labels, SGD with momentum 0.9, cosine, batch {options['batch_size']}, steps: "
        f"{steps}; mean ± standard deviation of {options['seeds']} seeds. Chosen on "
        f"{noisy_digits.VALIDATION} clean rows and {options['tuning_seeds']} other "
        f"seeds from rate {grid['rate']}; decay {grid['decay']}; penalty (lambda) "
        f"{grid['penalty']}. At an end of its grid: {_at_ends(records)}. The last "
        "three cost two gradients a step, the others one."
    )
    named = (f"{column} %" for column in columns)
    header = ("model", "method", "chosen", *named, "top eigenvalue")
    return Table("Each method tuned", header, rows, note)


def _at_ends(records: list[Record]) -> str:
    """Names the choices that lie at an end of their grid, where others may be better.

    Early stopping has no strength and no decay is no end.
    """
    grid = records[0]["options"]["grid"]
    found = [
        f"{name} of {method} on {model}"
        for (model, method), record in tuned_of(records).items()
        for name, value in record["numbers"].items()
        if name in grid and value in (min(grid[name]), max(grid[name]))
    ]
    return ", ".join(found) or "none"


def _strength_table(
    strength: dict[tuple[str, str, float], Record], model: str
) -> Table:
    alphas = list(dict.fromkeys(a for m, a, _ in strength if m == model))[1:]
    penalties = sorted({p for m, a, p in strength if m == model and a != SGD})
    cell = lambda r: f"{_percent(r, 'test accuracy')}; {_eigenvalue(r)}"
    start = strength[model, SGD, 0.0]
    rows = [("0", *[cell(start)] * len(alphas))]
    rows += [
        (f"{p:g}", *(cell(strength[model, alpha, p]) for alpha in alphas))
        for p in penalties
    ]
    named = [a if a == EXACT else f"alpha {a}" for a in alphas]
    note = f"Rate {start['numbers']['rate']:g}; test accuracy %, top eigenvalue."
    return Table(f"{model} by strength", ("lambda", *named), rows, note)


def _difference_table(records: list[Record]) -> Table:
    pairs = [(PENALTY, other) for other in (SGD, DECAY, STOPPING, SAM)]
    rows = [
        (model, f"{ours} less {theirs}", str(gain(records, ours, theirs, model)))
        for model in _models(tuned_of(records))
        for ours, theirs in (*pairs, (BOTH, DECAY))
    ]
    rows += [
        ("MLP-S", f"alpha {alpha} less SAM, equal lambda, not the largest", str(found))
        for alpha, found in of_alpha(records).items()
    ]
    title = "Differences of test accuracy, percentage points"
    return Table(title, ("model", "", "mean [95 %]"), rows)


def _text_table(text: dict[float, Record]) -> Table:
    rows = [
        (
            f"{penalty:g}",
            _eigenvalue(record),
            *(spread(record["samples"][name]) for name in ("train loss", "test")),
            f"{statistics.median(record['samples']['seconds']):.0f}",
        )
        for penalty, record in text.items()
    ]
    first = text[0.0]
    setting = first["setting"]
    note = (
        f"stdlib_text, {setting['steps']} steps of {setting['batch_size']} x "
        f"{setting['context']} characters by Adam, peak rate {first['rate']:g}, alpha "
        f"{ALPHA}. Top eigenvalue and training loss on {first['windows']} "
        "windows; losses in nats per character; mean ± standard deviation of "
        f"{setting['seeds']} seeds."
    )
    header = ("lambda", "top eigenvalue", "train loss", "test loss", "seconds a run")
    return Table("GPT-S", header, rows, note)


def draw(records: list[Record]) -> Figure:
    """Draws eigenvalue and accuracy by strength, and the tuned methods."""
    found = {key[1:]: r for key, r in strength_of(records).items() if key[0] == "MLP-S"}
    alphas = [a for a in dict.fromkeys(alpha for alpha, _ in found) if a != SGD]
    with rc_context(plots.STYLE):
        figure = Figure(figsize=(13, 4.2), layout="constrained")
        left, middle, right = figure.subplots(1, 3)
        for axes, name, scale in (
            (left, "top eigenvalue", 1),
            (middle, "test accuracy", 100),
        ):
            start = scale * statistics.mean(found[SGD, 0.0]["samples"][name])
            axes.axhline(start, color=plots.COLOURS[2], lw=1, ls="--")
            axes.annotate(
                "no penalty", (0, start), (4, 4), va="bottom", ha="left",
                xycoords=("axes fraction", "data"), textcoords="offset points",
            )  # fmt: skip
            for alpha, colour in zip(alphas, plots.COLOURS, strict=False):
                points = sorted(p for a, p in found if a == alpha)
                points = [p for p in points if not _fails(found[alpha, p])]
                values = [
                    [scale * x for x in found[alpha, p]["samples"][name]]
                    for p in points
                ]
                axes.errorbar(
                    points,
                    list(map(statistics.mean, values)),
                    list(map(statistics.stdev, values)),
                    fmt="s-" if alpha == EXACT else "o-",
                    color=colour,
                    ms=4,
                    lw=1.2,
                    elinewidth=0.8,
                    label=alpha if alpha == EXACT else f"alpha {alpha}",
                )
            axes.set_xscale("log")
            points = sorted({p for a, p in found if a in alphas})
            axes.set_xticks(points, [f"{p:g}" for p in points])
            axes.set_xticks([], minor=True)
            axes.set_xlabel("lambda = alpha x radius (left out where runs fail)")
        left.set_yscale("log")
        left.set_title("Top Hessian eigenvalue, MLP-S")
        left.legend(frameon=False, fontsize=9)
        middle.set_title("Test accuracy %, MLP-S, one rate")
        _draw_tuned(right, tuned_of(records))
    return figure


def _fails(record: Record) -> bool:
    """Tells a strength that stops learning, where a small eigenvalue means nothing."""
    return min(record["samples"]["test accuracy"]) < 0.8


def _draw_tuned(axes: Any, tuned: dict[tuple[str, str], Record]) -> None:
    names = list(dict.fromkeys(name for _, name in tuned))
    for (model, name), record in tuned.items():
        first = model == "MLP-S"
        values = [100 * x for x in record["samples"]["test accuracy"]]
        height = names.index(name) + (-0.13 if first else 0.13)
        axes.plot(
            values, [height] * len(values), "o", ms=3, alpha=0.5,
            color=plots.COLOURS[0 if first else 1],
        )  # fmt: skip
        axes.plot([statistics.mean(values)], [height], "k|", ms=11, mew=2)
    for model, colour in zip(("MLP-S", "CNN"), plots.COLOURS, strict=False):
        axes.plot([], [], "o", color=colour, ms=4, label=model)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.legend(frameon=False, loc="lower left", fontsize=9)
    axes.set_title("Test accuracy %, each tuned (bar: mean)")
    axes.grid(axis="x", color="#e4e4e4", lw=0.6)
    axes.set_axisbelow(True)
