"""Is a GPT of Monarch layers better than others of its size, and as good as dense?

GPT-S on characters, all 24 linear layers of one kind: dense; Monarch with 4 blocks;
low rank with as many parameters in every layer; dense in a GPT so narrow that the whole
model has as many parameters. Two budgets:

- ``steps``: as many steps for all;
- ``time``: the steps that fit into the dense run's time, by the times of one training
  step measured here in alternation; the schedule has that length, the rate is tuned
  anew. For the dense model both budgets are one.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from matplotlib.figure import Figure

from benchmarks import language, timing
from benchmarks.language import DENSE, LOW_RANK, MONARCH, NARROW
from benchmarks.paired import (
    chosen_rate,
    difference,
    draw_differences,
    gaps,
    noise,
    spread,
)
from benchmarks.results import Record
from benchmarks.tables import Table, Verdict

CLAIM = (
    "With Monarch layers (4 blocks) GPT-S on stdlib_text ends at a lower test loss "
    "than with low-rank layers and than a narrower dense GPT of as many parameters, "
    "after equal steps and after equal time, and after equal time no higher than "
    "dense, within noise."
)

STEPS, TIME = "steps", "time"
BASELINES = (LOW_RANK, NARROW)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(language.Setting):
    rounds: int  # of timing


PRESETS = {
    "small": Options(steps=6, rounds=2, **language.TINY),
    "full": Options(
        steps=1_300,
        learning_rates=(5e-4, 1e-3, 2e-3, 4e-3, 8e-3),
        seeds=5,
        tuning_seeds=1,
        rounds=20,
    ),
}


def lengths(seconds: dict[str, list[float]], steps: int) -> dict[str, int]:
    """Computes the steps of each model that take as long as the dense ones.

    Examples:
      >>> lengths({"dense": [2.0, 2.0], "Monarch": [1.0, 1.6]}, 10)
      {'dense': 10, 'Monarch': 16}
    """
    of = lambda name: timing.ratio(seconds, DENSE, name).median
    names = [name for name in seconds if not name.endswith(timing.AGAIN)]
    return {name: max(1, round(steps * of(name))) for name in names}


def run(options: Options, progress: Callable[..., Any]) -> Iterator[dict[str, Any]]:
    """Times a step of every model, then trains all at both budgets."""
    text = language.Text(options)
    built = language.builders(options)
    trainers = {n: language.Trainer(build, text) for n, build in built.items()}
    runs = language.runs_of(options) * (2 * len(trainers) - 1)
    with progress(1 + runs, "claim monarch_language_model") as tick:
        seconds = language.step_seconds(trainers, rounds=options.rounds)
        in_time = lengths(seconds, options.steps)
        tick(f"steps in equal time: {in_time}")
        cases = [(STEPS, name, options.steps) for name in trainers]
        cases += [(TIME, n, steps) for n, steps in in_time.items() if n != DENSE]
        for budget, name, steps in cases:
            trainer = trainers[name]

            def one(seed: int, rate: float) -> language.Outcome:
                state = trainer.start(trainer.fresh(seed), rate, steps)  # noqa: B023
                return trainer.outcome(state, (seed,), steps)  # noqa: B023

            samples, _ = language.sweep(
                one,
                options,
                lambda done: tick(f"{budget}, {name}, {done}"),  # noqa: B023
            )
            again = seconds[DENSE + timing.AGAIN] if name == DENSE else []
            yield language.record(
                {"budget": budget, "method": name},
                samples | {"step_seconds": seconds[name], "step_seconds again": again},
                text,
                steps=steps,
                parameters=trainer.parameters,
                flops=trainer.flops,
            )


def _by_case(records: list[Record]) -> dict[tuple[str, str], Record]:
    return {(r["case"]["budget"], r["case"]["method"]): r for r in records}


def compared(records: list[Record]) -> dict[str, tuple[Record, Record]]:
    """Pairs Monarch with each model at each budget."""
    found = _by_case(records)
    return {
        f"{name}, equal {budget}": (
            found[budget, MONARCH],
            found[STEPS if name == DENSE else budget, name],
        )
        for budget in (STEPS, TIME)
        for name in (DENSE, *BASELINES)
    }


def tables(records: list[Record]) -> list[Table]:
    """Writes sizes, times and losses, then Monarch's differences."""
    rows = []
    for record in records:
        samples = record["samples"]
        step = timing.quartiles(samples["step_seconds"]).median
        rows.append(
            (
                record["case"]["budget"],
                record["case"]["method"],
                f"{record['parameters']:,}",
                f"{record['flops']:,}",
                f"{1e3 * step:.1f}",
                f"{record['steps']:,}",
                f"{timing.quartiles(samples['seconds']).median:.1f}",
                chosen_rate(samples["tuning"]),
                spread(samples["test"]),
            )
        )
    header = (
        "equal",
        "model",
        "parameters",
        "FLOPs a character",
        "ms a step",
        "steps",
        "seconds a run",
        "rate",
        "test loss",
    )
    dense = _by_case(records)[STEPS, DENSE]["samples"]
    pairs = zip(dense["step_seconds"], dense["step_seconds again"], strict=True)
    same = timing.quartiles([again / first for first, again in pairs])
    note = (
        f"{language.setting_note(records)} FLOPs: forward, counted from the weights. "
        "ms a step: median of steps timed in alternation before training; dense "
        f"against itself {same}. Seconds a run: median over the seeds, as trained."
    )
    differences = [
        (name, str(difference(ours["samples"]["test"], theirs["samples"]["test"])))
        for name, (ours, theirs) in compared(records).items()
    ]
    return [
        Table("GPT-S of four kinds of layers", header, rows, note),
        Table("Monarch's test loss less that of", ("", "mean [95 %]"), differences, ""),
    ]


def verdict(records: list[Record]) -> Verdict:
    """Rules *shown* if Monarch is below both baselines at both budgets, and near dense.

    Below: the 95 % interval of the paired differences ends below 0. Near dense: at
    equal time the interval of Monarch less dense ends no higher than the noise, which
    is two standard deviations of the dense loss over the seeds. *Reversed*: at either
    budget one of the baselines lies below Monarch in the same sense.
    """
    pairs = compared(records)
    found = {name: difference(*_tests(*pair)) for name, pair in pairs.items()}
    margin = noise(_by_case(records)[STEPS, DENSE])
    near = found[f"{DENSE}, equal {TIME}"].upper <= margin
    matched = {n: d for n, d in found.items() if not n.startswith(DENSE + ",")}
    listed = "; ".join(f"{name}: {d}" for name, d in found.items())
    why = (
        f"Monarch's test loss less that of {listed} (rule: below 0 for low rank and "
        f"narrower dense, and at equal time at most {margin:.4f} above dense)."
    )
    if near and all(d.upper < 0 for d in matched.values()):
        return Verdict("shown", why)
    beaten = lambda budget: any(
        matched[f"{b}, equal {budget}"].lower > 0 for b in BASELINES
    )
    return Verdict("reversed" if beaten(STEPS) and beaten(TIME) else "not shown", why)


def _tests(ours: Record, theirs: Record) -> tuple[list[float], list[float]]:
    return ours["samples"]["test"], theirs["samples"]["test"]


def draw(records: list[Record]) -> Figure:
    """Draws Monarch's differences."""
    rows = {name: gaps(*pair) for name, pair in compared(records).items()}
    return draw_differences(rows, xlabel="Monarch's test loss less the other's")
