"""Tables and pictures of the claims on FishLeg, from their records."""

import math
import statistics
from collections.abc import Sequence

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks import autoencoder_races as races
from benchmarks import plots, timing
from benchmarks.autoencoder_races import (
    ADAM,
    CURVES,
    DIGITS,
    EXACT,
    FISHLEG,
    HELD_OUT,
    IDENTITY,
    KFAC,
    MUON,
    RIVALS,
    SGD,
    TRAIN,
)
from benchmarks.paired import spread
from benchmarks.results import Record
from benchmarks.tables import Table

RACE, SIZES, FIT, TIME = "race", "sizes", "fit", "time"


def race_of(records: list[Record]) -> dict[str, Record]:
    return {r["case"]["method"]: r for r in records if r["case"]["task"] == RACE}


def only(records: list[Record], task: str) -> Record:
    (record,) = (r for r in records if r["case"]["task"] == task)
    return record


def at(record: Record, mark: int, what: str = TRAIN) -> list[float]:
    """Gives the losses of all seeds at a mark."""
    place = record["marks"].index(mark)
    return [seed[place] for seed in record["samples"][what]]


def sizes(records: list[Record]) -> dict[int, dict[str, Record]]:
    """Sorts the records by batch size, that of the race among them, and method."""
    found: dict[int, dict[str, Record]] = {}
    for record in records:
        case = record["case"]
        if case["task"] in (RACE, SIZES) and case["method"] in (ADAM, MUON, FISHLEG):
            found.setdefault(case["batch"], {})[case["method"]] = record
    return dict(sorted(found.items()))


def seconds_of(record: Record, method: str, steps: Sequence[int]) -> list[float]:
    """Adds up the median seconds of a method's steps, to each of some numbers of them.

    FishLeg has a first step, dense ones until step 100, and later ones.
    """
    median = {name: statistics.median(s) for name, s in record["samples"].items()}
    if method != FISHLEG:
        return [step * median[method] for step in steps]
    first, dense, late = (median[races.phase_name(p)] for p in races.PHASES)
    return [
        first + (min(n, races.DENSE) - 1) * dense + max(n - races.DENSE, 0) * late
        for n in steps
    ]


def tables(records: list[Record]) -> list[Table]:
    """Writes losses, and batch sizes, fit and time where they were taken."""
    tasks = {record["case"]["task"] for record in records}
    return [
        _losses(records, TRAIN),
        _losses(records, HELD_OUT),
        *([_sizes(records)] if SIZES in tasks else []),
        *([_fit(only(records, FIT))] if FIT in tasks else []),
        *([_time(only(records, TIME)), _equal_time(records)] if TIME in tasks else []),
    ]


def net_of(records: list[Record]) -> str:
    return CURVES if records[0]["data"]["name"] == "curves" else DIGITS


def _rates(record: Record, marks: Sequence[int]) -> str:
    if "numbers" not in record:
        return "none"
    places = [record["marks"].index(mark) for mark in marks]
    return " / ".join(f"{record['numbers'][place]:g}" for place in places)


def ends(records: list[Record]) -> list[str]:
    """Names tuned methods whose rate at a judged step is an end of its grid."""
    found = []
    for record in records:
        if "numbers" not in record:
            continue
        rates = [float(rate) for rate in record["tuning"]]
        for mark in record["options"]["judged"]:
            rate = record["numbers"][record["marks"].index(mark)]
            if rate in (min(rates), max(rates)):
                case = record["case"]
                found.append(f"{case['method']}, batch {case['batch']}, step {mark}")
    return found


def _losses(records: list[Record], what: str) -> Table:
    race = race_of(records)
    options = race[FISHLEG]["options"]
    marks = options["judged"]
    rows = [
        (name, _rates(r, marks), *(spread(at(r, m, what), 2) for m in marks))
        for name, r in race.items()
    ]
    rows.append((KFAC, "none", *["*unavailable*"] * len(marks)))
    goals = ", ".join(f"{goal:g}" for goal in options["goals"])
    edges = "; ".join(ends(list(race.values()))) or "none"
    exact = (
        f" {EXACT}: FishLeg's step with the exact direction, the damping the same, by "
        f"{races.PRODUCTS} products."
    )
    notes = {
        TRAIN: "All training rows, at each of the steps with the rate chosen for it "
        f"from {len(options['rates'])} on {options['tuning_seeds']} other seeds; "
        f"mean ± standard deviation of {options['seeds']} seeds. At an end of the "
        f"grid: {edges}.{exact if EXACT in race else ''} {KFAC} is not installed; the "
        f"goals {goals} stand for it.",
        HELD_OUT: "The same runs, rates chosen by training loss, on "
        f"{len(races.data(net_of(records))[HELD_OUT])} rows held out.",
    }
    titles = {TRAIN: "Training loss by steps", HELD_OUT: "Held-out loss by steps"}
    header = ("method", "rates", *(str(mark) for mark in marks))
    return Table(titles[what], header, rows, notes[what])


def _sizes(records: list[Record]) -> Table:
    options = records[0]["options"]
    marks = options["judged"]
    rows = [
        (
            str(batch),
            name,
            _rates(record, marks),
            *(spread(at(record, mark), 2) for mark in marks),
        )
        for batch, found in sizes(records).items()
        for name, record in found.items()
    ]
    apart = [r for found in sizes(records).values() for r in found.values()]
    edges = "; ".join(ends([r for r in apart if r["case"]["task"] == SIZES]))
    return Table(
        "Training loss by batch size",
        ("batch", "method", "rates", *(str(mark) for mark in marks)),
        rows,
        f"{options['size_seeds']} seeds and as many to tune on, rates from "
        f"{len(options['size_rates'])}, but for batch {races.BATCH[DIGITS]}, which is "
        f"the race. At an end of the grid: {edges or 'none'}.",
    )


def _fit(record: Record) -> Table:
    samples, marks = record["samples"], record["marks"]
    rows = [
        (
            str(mark),
            *(spread([one[i] for one in samples[n]], 2) for n in (FISHLEG, IDENTITY)),
        )
        for i, mark in enumerate(marks)
    ]
    return Table(
        "Share of the exact step's model decrease",
        ("step", "learnt inverse", "identity"),
        rows,
        "On fresh gradients of 100 rows, the Fisher of 500.",
    )


def _time(record: Record) -> Table:
    seconds = record["samples"]
    rows = [
        (
            name,
            f"{1e6 * timing.best(seconds, name):.0f}",
            f"{1e6 * statistics.median(taken):.0f}",
            str(timing.ratio(seconds, name, ADAM)),
        )
        for name, taken in seconds.items()
    ]
    return Table(
        "Time of a step",
        ("method", "least us", "median us", "over Adam's"),
        rows,
        f"{record['options']['rounds']} interleaved rounds in compiled loops of ten "
        "steps: median of the ratios in a round with quartiles. Adam runs twice; "
        "inside the quartiles of the second run a ratio is no result. FishLeg makes 20 "
        f"auxiliary steps in its first step, one in each until step {races.DENSE} and "
        "then one in ten.",
    )


def _equal_time(records: list[Record]) -> Table:
    race, time = race_of(records), only(records, TIME)
    marks = race[FISHLEG]["options"]["judged"]
    rivals = [name for name in (ADAM, MUON) if name in time["samples"]]

    def reached(name, seconds):
        given = race[name]["marks"]
        spent = seconds_of(time, name, given)
        if not spent[0] <= seconds <= spent[-1]:
            return "not run"
        losses = _means(race[name], given)
        return f"{np.interp(math.log(seconds), np.log(spent), losses):.2f}"

    rows = [
        (
            str(mark),
            f"{1e3 * seconds:.0f}",
            f"{statistics.mean(at(race[FISHLEG], mark)):.2f}",
            *(reached(name, seconds) for name in rivals),
        )
        for mark, seconds in zip(marks, seconds_of(time, FISHLEG, marks), strict=True)
    ]
    return Table(
        "Training loss at equal time",
        ("FishLeg's step", "ms", FISHLEG, *rivals),
        rows,
        "Mean losses after as many ms, from median times of a step; between steps "
        "interpolated. Not judged.",
    )


COLOURS = dict(
    zip((FISHLEG, ADAM, SGD, MUON, *RIVALS[2::2]), plots.COLOURS, strict=True)
)


def _means(record: Record, marks: Sequence[int]) -> list[float]:
    return [statistics.mean(at(record, mark)) for mark in marks]


def draw(records: list[Record]) -> Figure:
    """Draws the race by steps, the lead by batch size, and the race by seconds."""
    race, options = race_of(records), records[0]["options"]
    first = max(at(race[FISHLEG], options["judged"][0]))
    top = min(1.75 * first, first + 40)
    least = min(min(_means(record, record["marks"])) for record in race.values())
    several = any(record["case"]["task"] == SIZES for record in records)
    with rc_context(plots.STYLE):
        figure = Figure(figsize=(12 if several else 9, 4), layout="constrained")
        panels = list(figure.subplots(1, 3 if several else 2))
        left, right = panels[0], panels[-1]
        for name, colour in COLOURS.items():
            if name not in race:
                continue
            marks, look = race[name]["marks"], {"color": colour, "lw": 1.6}
            short = [mark for mark in marks if mark in options["marks"]]
            left.plot(short, _means(race[name], short), label=name, **look)
            if name in options["timed"]:
                spent = seconds_of(only(records, TIME), name, marks)
                right.plot(spent, _means(race[name], marks), **look)
        if EXACT in race:
            marks = race[EXACT]["marks"]
            look = {"color": "black", "lw": 1, "label": "exact direction"}
            left.plot(marks, _means(race[EXACT], marks), "--", **look)
        if several:
            _draw_leads(panels[1], records)
        for axes, title, label in (
            (left, "Training loss by steps", "steps"),
            (right, "Training loss by seconds", "seconds, median step"),
        ):
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter("{x:g}")
            axes.set_ylim(least - 0.08 * (top - least), top)
            axes.set_xlabel(label)
            axes.set_title(title)
        for axes in panels:
            axes.grid(color="#e4e4e4", lw=0.6)
            axes.set_axisbelow(True)
        handles, labels = left.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=7, frameon=False)
    return figure


def _draw_leads(axes: Axes, records: list[Record]) -> None:
    """Draws the lead over Adam and Muon by batch size."""
    found, judged = sizes(records), records[0]["options"]["judged"]
    for method in (ADAM, MUON):
        for mark, style in ((judged[0], "--"), (judged[-1], "-")):
            mean = lambda record, mark=mark: statistics.mean(at(record, mark))
            leads = [mean(of[method]) - mean(of[FISHLEG]) for of in found.values()]
            look = {"color": COLOURS[method], "label": f"{method}, step {mark}"}
            axes.plot(list(found), leads, style, marker="o", ms=4, **look)
    axes.axhline(0, color="#666666", lw=1)
    axes.set_xscale("log")
    axes.set_xticks(list(found), [str(batch) for batch in found])
    axes.minorticks_off()
    axes.set_xlabel("batch size")
    axes.set_title("Loss of the rival less FishLeg's")
    axes.legend(frameon=False, fontsize=9)
