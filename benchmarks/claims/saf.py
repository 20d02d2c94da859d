"""Is SAF flatter than SGD at the cost of SGD, on digits with wrong labels?

MLP-S, momentum SGD on a cosine. SAF holds the logits near those of the same example
three epochs ago, MESA near those of an averaged model, both after 30 % of the epochs.
Beside them stand SAM and SGD with weight decay.

Every method chooses its rate and its own numbers together, by the mean accuracy on the
validation rows over seeds that are not judged. SAF is also run at the rate that SGD
chose, with the weight chosen there and with the authors' 0.3 and 0.8: that is what the
term does by itself. SGD is run at the rate that SAF chose, too.

- Flatness: the largest eigenvalue of the Hessian of the plain training loss at the end.
- Cost: the processor time of a step in interleaved rounds while the term is on, and
  the operations that the compiler counts for it. MLP-S runs its steps in a compiled
  loop, the CNN from Python, as each is trained. The rounds of several new processes
  are put together: in a process that had trained before, the ratio on MLP-S once came
  out as 1.03, in eight new ones as 1.15 to 1.22.

An epoch of 16 batches leaves 54 of the 1,078 rows out, each time others. Such a row has
no logits of that epoch in the buffer; three epochs later it adds nothing to the term.
The decay 0.9995 of MESA, which the authors use, remembers 2,000 steps; training takes
800, so that the teacher stays near the start. Faster ones are tried beside it.
"""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from matplotlib import rc_context
from matplotlib.figure import Figure

from benchmarks import noisy_digits, noisy_loops, plots, timing
from benchmarks.noisy_loops import (
    DECAY,
    FIRST_TUNING_SEED,
    MESA,
    SAF,
    SAM,
    SGD,
    Numbers,
    Recipe,
    chosen,
)
from benchmarks.paired import difference, spread
from benchmarks.results import Record
from benchmarks.tables import Table, Verdict

TIME, OPERATIONS = 1.10, 1.05  # most that a step of SAF may take, in steps of SGD
CLAIM = (
    "On digits with a fifth of the labels wrong SAF ends flatter than SGD at the cost "
    f"of SGD: at most {TIME:.2f} times the processor time of a step and "
    f"{OPERATIONS:.2f} times the operations."
)

NET = "MLP-S"
SAME, SWAPPED = "SAF at SGD's rate", "SGD at SAF's rate"
AUTHORS = (0.3, 0.8)  # weights
AT = {weight: f"SAF {weight:g} at SGD's rate" for weight in AUTHORS}
DRAWN = (SGD, DECAY, SAME, SAF, MESA, SAM)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    seeds: int
    tuning_seeds: int
    epochs: int
    start: int  # the last epoch without the term
    rates: tuple[float, ...]
    decays: tuple[float, ...]
    weights: tuple[float, ...]  # holds those of AUTHORS
    averages: tuple[float, ...]  # decay of MESA's teacher
    radii: tuple[float, ...]
    nets: tuple[str, ...]  # whose steps are timed
    timed: tuple[str, ...]
    rounds: int  # in each process
    processes: int  # new ones; 0 takes this one
    lag: int = 3
    temperature: float = 5.0
    batch_size: int = 64


PRESETS = {
    "small": Options(
        seeds=2,
        tuning_seeds=1,
        epochs=6,
        start=3,
        rates=(0.05,),
        decays=(1e-3,),
        weights=AUTHORS,
        averages=(0.9,),
        radii=(0.05,),
        nets=(NET,),
        timed=(SGD, SAF),
        rounds=2,
        processes=0,
    ),
    "full": Options(
        seeds=20,
        tuning_seeds=5,
        epochs=50,
        start=15,
        rates=(0.00625, 0.0125, 0.025, 0.05, 0.1, 0.2),
        decays=(1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
        weights=(0.1, *AUTHORS, 2.0, 5.0, 12.0, 30.0),
        averages=(0.9, 0.97, 0.99, 0.997, 0.9995),
        radii=(0.02, 0.05, 0.1, 0.2, 0.5, 1.0),
        nets=(NET, "CNN"),
        timed=(SGD, SAF, MESA, SAM),
        rounds=40,
        processes=5,
    ),
}


def grids(options: Options) -> dict[str, dict[str, tuple[float, ...]]]:
    """Lists what each method may choose from."""
    own = {
        SGD: {},
        DECAY: {"decay": options.decays},
        SAF: {"weight": options.weights},
        MESA: {"weight": options.weights, "average": options.averages},
        SAM: {"radius": options.radii},
    }
    return {method: {"rate": options.rates} | more for method, more in own.items()}


def recipe(method: str, options: Options, net: str = NET) -> Recipe:
    """Makes the recipe of a method."""
    return Recipe(
        noisy_digits.net(net),
        method,
        options.epochs,
        options.batch_size,
        start=options.start,
        lag=options.lag,
        temperature=options.temperature,
    )


def trained(made: Recipe, numbers: Numbers, seed: int) -> dict[str, float]:
    """Trains once and measures: losses, accuracies, flatness on judged seeds."""
    data = noisy_digits.splits(seed)
    params = noisy_loops.train(made, numbers, jax.random.key(seed), data.train)
    found = noisy_digits.quality(made.net, params, data)
    if seed < FIRST_TUNING_SEED:
        top = noisy_digits.top_eigenvalue(made.net, params, data.train)
        found["top eigenvalue"] = top
    return {name: float(f"{value:.6g}") for name, value in found.items()}


def cost(net: str, options: Options) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Measures processor seconds of a step and counts its operations, by method."""
    train = noisy_digits.splits(0).train
    epoch = jnp.int32(options.start + 1)
    calls, operations = {}, {}
    for method in options.timed:
        made = recipe(method, options, net)
        grid = grids(options)[method]
        numbers = noisy_loops.as_arrays({name: grid[name][0] for name in grid})
        run = noisy_loops.begin(made, numbers, jax.random.key(0))
        index = made.order(jax.random.key(1))[0]
        given = made, numbers, run, train
        calls[method] = lambda given=given, index=index: noisy_loops.run_epoch(
            *given, index, epoch
        )
        compiled = noisy_loops.step.lower(*given, index[0], epoch).compile()
        operations[method] = float(compiled.cost_analysis()["flops"])
    found = timing.measure(
        calls, baseline=SGD, rounds=options.rounds, clock=time.process_time
    ).samples
    seconds = {n: [s / len(index) for s in taken] for n, taken in found.items()}
    return seconds, operations


def run(options: Options, progress: Callable[..., Any]) -> Iterator[dict[str, Any]]:
    """Tunes, trains on the judged seeds, and measures the cost."""
    points = {m: noisy_loops.points(grid) for m, grid in grids(options).items()}
    total = sum(map(len, points.values())) + len(points) + 2 + len(AT)
    total += len(options.nets)
    judged = range(options.seeds)
    shapes = {"batch": [options.batch_size, 64]}

    def record(case, samples, **more):
        return {
            "case": case,
            "data": noisy_digits.head(),
            "dtype": "float32",
            "shapes": shapes,
            "seed": list(judged),
            "options": dataclasses.asdict(options),
            "samples": samples,
            **more,
        }

    with progress(total, "claim saf") as tick:
        tried: dict[str, list[list[Any]]] = {method: [] for method in points}
        for method, choices in points.items():
            made = recipe(method, options)
            for numbers in choices:
                seeds = range(options.tuning_seeds)
                found = [trained(made, numbers, FIRST_TUNING_SEED + s) for s in seeds]
                accuracies = [one["validation accuracy"] for one in found]
                tried[method].append([numbers, accuracies])
                tick(f"tuning {method}")
        wanted = {name: (name, chosen(tried[name])) for name in points}
        rate = wanted[SGD][1]["rate"]
        wanted[SAME] = SAF, chosen(tried[SAF], rate=rate)
        wanted[SWAPPED] = SGD, {"rate": wanted[SAF][1]["rate"]}
        for weight, name in AT.items():
            wanted[name] = SAF, {"rate": rate, "weight": weight}
        for name, (method, numbers) in wanted.items():
            made = recipe(method, options)
            found = [trained(made, numbers, seed) for seed in judged]
            samples = {what: [one[what] for one in found] for what in found[0]}
            more = {"numbers": numbers}
            if name == method:
                more["tuning"] = tried[method]
            yield record({"method": name}, samples, **more)
            tick(name)
        for net in options.nets:
            many = {"processes": options.processes}
            every = list(noisy_loops.repeated(cost, net, options, **many))
            samples = {n: [s for one, _ in every for s in one[n]] for n in every[0][0]}
            yield record({"cost": net}, samples, operations=every[0][1])
            tick(f"cost on {net}")


def _of(records: list[Record], what: str) -> dict[str, Record]:
    return {r["case"][what]: r for r in records if what in r["case"]}


def by_process(record: Record, name: str) -> str:
    """Gives the least and the largest of the median ratios to SGD by process."""
    samples, rounds = record["samples"], record["options"]["rounds"]
    medians = [
        timing.ratio({n: s[i : i + rounds] for n, s in samples.items()}, name, SGD)[1]
        for i in range(0, len(samples[SGD]), rounds)
    ]
    return f"{min(medians):.2f} to {max(medians):.2f}"


def tables(records: list[Record]) -> list[Table]:
    """Writes the nets and the cost of a step."""
    nets, costs = _of(records, "method"), _of(records, "cost")
    options = nets[SGD]["options"]
    top = lambda record: record["samples"]["top eigenvalue"]
    percent = lambda values: spread([100 * x for x in values], 1)
    rows = [
        (
            name,
            noisy_loops.named(record["numbers"]),
            percent(record["samples"]["test accuracy"]),
            spread(record["samples"]["test loss"]),
            spread(record["samples"]["train loss"]),
            percent(record["samples"]["wrong labels learnt"]),
            spread(top(record), 2),
            "1" if name == SGD else str(noisy_loops.ratio(top(record), top(nets[SGD]))),
        )
        for name, record in nets.items()
    ]
    edges = [
        f"{name} ({', '.join(found)})"
        for name, grid in grids(Options(**options)).items()
        if (found := noisy_loops.at_ends(nets[name]["numbers"], grid))
    ]
    spent = []
    for net, record in costs.items():
        seconds, operations = record["samples"], record["operations"]
        for name in seconds:
            method = name.removesuffix(timing.AGAIN)
            spent.append(
                (
                    net,
                    name,
                    f"{1e6 * timing.best(seconds, name):.0f}",
                    f"{1e6 * statistics.median(seconds[name]):.0f}",
                    str(timing.ratio(seconds, name, SGD)),
                    by_process(record, name),
                    f"{operations[method] / 1e6:.3f}",
                    f"{operations[method] / operations[SGD]:.3f}",
                )
            )
    steps = recipe(SGD, Options(**options)).steps
    header = ["method", "numbers", "test accuracy %", "test loss", "train loss"]
    header += ["wrong labels learnt %", "top eigenvalue", "over SGD's"]
    below = ["net", "method", "least us", "median us", "over SGD's", "by process"]
    return [
        Table(
            "Nets",
            header,
            rows,
            f"{NET}, {steps} steps at batch {options['batch_size']}. Mean ± standard "
            f"deviation of {options['seeds']} seeds; the last column is the geometric "
            "mean of the paired ratios with its 95 % interval. Numbers chosen by "
            f"validation accuracy on {options['tuning_seeds']} other seeds; at an end "
            f"of the grid: {'; '.join(edges) or 'none'}.",
        ),
        Table(
            "Processor time and operations of a step",
            [*below, "MFLOP", "over SGD's"],
            spent,
            f"{options['processes'] or 1} processes of {options['rounds']} interleaved "
            "rounds: median of the ratios in a round with quartiles, and the least and "
            "the largest median of a process. SGD runs twice; inside the quartiles of "
            "the second run a ratio is no result.",
        ),
    ]


def verdict(records: list[Record]) -> Verdict:
    """Rules *shown* if SAF is flatter by both comparisons and cheap on each net.

    Flatter: the 95 % interval of the mean paired difference of the logarithms of the
    top eigenvalue, SAF less SGD, is below 0: with rate and weight both chosen, and at
    the rate of SGD with the weight chosen there. Cheap: on each net that is timed the
    median ratio of processor times, SAF over SGD, is at most TIME, and that of
    the operations at most OPERATIONS. *Reversed*: both intervals are above 0.
    """
    nets, costs = _of(records, "method"), _of(records, "cost")
    logs = {
        name: [math.log(value) for value in record["samples"]["top eigenvalue"]]
        for name, record in nets.items()
    }
    parts, found = {}, []
    for name in (SAF, SAME):
        gap = difference(logs[name], logs[SGD])
        found.append(gap)
        parts[f"log of the top eigenvalue, {name} less SGD, {gap} (rule: below 0)"] = (
            gap.upper < 0
        )
    for net, record in costs.items():
        seconds = timing.ratio(record["samples"], SAF, SGD)
        operations = record["operations"][SAF] / record["operations"][SGD]
        same = timing.same_pair(record["samples"], SGD)
        parts[
            f"processor time on {net}, SAF over SGD, {seconds}; SGD over itself {same} "
            f"(rule: at most {TIME:.2f})"
        ] = seconds.median <= TIME
        parts[
            f"operations on {net}, SAF over SGD, {operations:.3f} (rule: at most "
            f"{OPERATIONS:.2f})"
        ] = operations <= OPERATIONS
    others = "; ".join(
        f"SAF less {name} {difference(logs[SAF], logs[name])}"
        for name in (SWAPPED, DECAY, MESA, SAM)
    )
    why = "; ".join(f"{'yes' if held else 'no'}: {p}" for p, held in parts.items())
    why = f"{why}. Not judged, the same logarithm: {others}."
    if all(parts.values()):
        return Verdict("shown", why)
    return Verdict("reversed" if all(g.lower > 0 for g in found) else "not shown", why)


def _places(axes: Any, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), list(names))
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(axis="x", color="#e4e4e4", lw=0.6)
    axes.tick_params(axis="y", length=0)
    axes.set_axisbelow(True)


def draw(records: list[Record]) -> Figure:
    """Draws flatness over training loss, the test accuracy and the cost."""
    nets, costs = _of(records, "method"), _of(records, "cost")
    timed = nets[SGD]["options"]["timed"]
    colours = dict(zip(DRAWN, plots.COLOURS, strict=True))
    with rc_context(plots.STYLE):
        figure = Figure(figsize=(11, 3.8), layout="constrained")
        left, middle, right = figure.subplots(1, 3)
        for place, name in enumerate(DRAWN):
            samples, colour = nets[name]["samples"], colours[name]
            dots = {"color": colour, "alpha": 0.6, "ms": 4}
            accuracies = [100 * value for value in samples["test accuracy"]]
            left.plot(samples["train loss"], samples["top eigenvalue"], "o", **dots)
            middle.plot(accuracies, [place] * len(accuracies), "o", **dots)
            mean = statistics.mean(accuracies)
            middle.plot([mean], [place], "|", color=colour, ms=14, mew=2)
            left.plot([], [], "o", color=colour, ms=6, label=name)
        noisy_loops.log_axis(left)
        left.set_xlabel("training loss")
        left.set_title("Top eigenvalue")
        middle.set_title("Test accuracy, %")
        middle.set_xlabel("dots: seeds, bar: mean")
        _places(middle, DRAWN)
        for shift, (net, record) in enumerate(costs.items()):
            for place, name in enumerate(timed):
                found = timing.ratio(
                    record["samples"], name + timing.AGAIN * (name == SGD), SGD
                )
                height, colour = place + 0.16 * (2 * shift - 1), plots.COLOURS[2]
                right.plot([found.lower, found.upper], [height] * 2, color=colour)
                fill = colour if shift else "white"
                right.plot(
                    [found.median], [height], "os"[shift], color=colour, mfc=fill
                )
            right.plot([], [], "os"[shift], color=colour, mfc=fill, label=net)
        right.axvline(TIME, color="#666666", ls="--", lw=1)
        right.set_title("Processor time of a step over SGD's")
        right.set_xlabel(f"median, quartiles; dashed: {TIME:.2f}")
        _places(right, (f"{SGD} again", *timed[1:]))
        right.legend(frameon=False)
        handles, labels = left.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=6, frameon=False)
    return figure
