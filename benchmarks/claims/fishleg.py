"""Does FishLeg beat tuned first-order methods per step on the digits auto-encoder?

FishLeg runs with its defaults, in every race. They are those of our variant (a group
step for the factors, the step length of the quadratic model), not the paper's; the
paper's form is run beside it with its rate tuned.

A rival may choose another rate for each step at which it is judged: the one of the
least mean training loss there, over seeds that are not judged. All runs of a seed have
the same start and the same batches.

- ``race``: training and held-out loss at batch 100. Beside FishLeg and its rivals:
  the exact direction by conjugate gradients in place of the learnt inverse, Adam and
  Muon on a cosine to each judged step, which have to know that step in advance.
- ``sizes``: FishLeg, Adam and Muon, tuned anew for each batch size.
- ``fit``: the share ``eff`` of the exact step's model decrease that the inverse makes.
- ``time``: a step of each method in interleaved rounds.

The claim is per step, that is per gradient. What FishLeg's products with the Fisher
cost stands in ``time``; nothing about seconds is claimed.

Reference: Garcia, Freddi, Fotiadis, Li, Vakili, Bernacchia and Hennequin,
"Fisher-Legendre (FishLeg) Optimization of Deep Neural Networks", ICLR 2023.
"""

import dataclasses
import statistics
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks import autoencoder_races as races
from benchmarks import noisy_digits
from benchmarks.autoencoder_races import (
    ADAM,
    BEST,
    COSINES,
    EXACT,
    FISHLEG,
    MUON,
    PAPER,
    RIVALS,
    TRAIN,
    raced,
)
from benchmarks.fishleg_tables import (
    FIT,
    RACE,
    SIZES,
    TIME,
    at,
    draw,
    race_of,
    tables,
)
from benchmarks.paired import difference
from benchmarks.results import Record
from benchmarks.tables import Verdict

__all__ = ["CLAIM", "PRESETS", "draw", "run", "tables", "verdict"]

BATCH = races.BATCH[races.DIGITS]
CLAIM = (
    "On the digits auto-encoder at batch 100 FishLeg with its defaults has a lower "
    "training loss per step than tuned SGD with momentum, Adam, schedule-free AdamW, "
    "Muon and Sophia at 50, 100, 200 and 500 steps on every seed."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    seeds: int
    tuning_seeds: int
    rates: tuple[float, ...]
    marks: tuple[int, ...]  # steps at which the losses are taken
    judged: tuple[int, ...]  # those of the verdict
    goals: tuple[float, ...]  # most that FishLeg's mean may be there
    long: dict[str, tuple[int, ...]]  # more marks of some methods, for the seconds
    beside: tuple[str, ...]  # methods in the race that are not judged
    timed: tuple[str, ...]
    batches: tuple[int, ...]
    size_seeds: int
    size_rates: tuple[float, ...]
    rounds: int


PRESETS = {
    "small": Options(
        seeds=2,
        tuning_seeds=1,
        rates=(0.01, 0.02),
        marks=(1, 2, 4),
        judged=(2, 4),
        goals=(40.0, 40.0),
        long={ADAM: (5,)},
        beside=(EXACT,),
        timed=(ADAM, FISHLEG),
        batches=(),
        size_seeds=2,
        size_rates=(0.01,),
        rounds=2,
    ),
    "full": Options(
        seeds=5,
        tuning_seeds=5,
        rates=(
            *(0.0005, 0.001, 0.002, 0.003, 0.005, 0.007, 0.01, 0.015, 0.02),
            *(0.03, 0.04, 0.06, 0.08, 0.12, 0.2, 0.3, 0.5),
        ),
        marks=(1, 2, 4, 7, 10, 15, 20, 30, 50, 70, 100, 140, 200, 300, 500),
        judged=(50, 100, 200, 500),
        goals=(17.6, 16.6, 16.1, 15.8),
        long={ADAM: (1000, 2000), MUON: (1000,)},
        beside=(*COSINES, PAPER, EXACT),
        timed=(*RIVALS, FISHLEG, PAPER, EXACT),
        batches=(1000, 200, 50, 10),
        size_seeds=3,
        size_rates=(0.001, 0.002, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16),
        rounds=20,
    ),
}


def run(options: Options, progress: Callable[..., Any]) -> Iterator[dict[str, Any]]:
    """Races, then batch sizes, fit and time."""
    methods = (*RIVALS, FISHLEG, *options.beside)
    total = len(methods) + 3 * len(options.batches) + 2
    common = {
        "data": noisy_digits.head(),
        "dtype": "float32",
        "seed": list(range(options.seeds)),
        "options": dataclasses.asdict(options),
    }

    def record(task, method, batch, **found):
        case = {"task": task, "method": method, "batch": batch}
        return common | {"case": case, "shapes": {"batch": [batch, 64]}} | found

    with progress(total, "claim fishleg") as tick:
        seeds = {"seeds": options.seeds, "tuning_seeds": options.tuning_seeds}
        for method in methods:
            marks = options.judged if method in COSINES else options.marks
            marks += options.long.get(method, ())
            found = raced(method, options.rates, marks, batch=BATCH, **seeds)
            yield record(RACE, method, BATCH, **found)
            tick(f"race of {method}")
        sizes = {"batch": BATCH, "steps": max(options.marks), "rounds": options.rounds}
        seconds = races.step_seconds(options.timed, **sizes)
        yield record(TIME, "all", BATCH, samples=seconds)
        tick("time of a step")
        every = [
            races.fits(seed, marks=options.marks, batch=BATCH)
            for seed in range(options.seeds)
        ]
        samples = {name: [one[name] for one in every] for name in every[0]}
        yield record(FIT, FISHLEG, BATCH, samples=samples, marks=list(options.marks))
        tick("fit")
        seeds = dict.fromkeys(seeds, options.size_seeds)
        for batch in options.batches:
            for method in (ADAM, MUON, FISHLEG):
                rates, marks = options.size_rates, options.judged
                found = raced(method, rates, marks, batch=batch, **seeds)
                yield record(SIZES, method, batch, **found)
                tick(f"batch {batch}, {method}")


def verdict(records: list[Record]) -> Verdict:
    """Rules *shown* if FishLeg is below every rival on every seed at every judged step.

    A rival has, at each judged step, the rate that its tuning seeds chose for that
    step. FishLeg's mean has to be at most the goal that was set for the step, too: the
    goals stand for kfac-jax, which is not installed. *Reversed*: at every judged step
    some rival is below FishLeg on every seed. Rates that follow a schedule, rates
    chosen by hindsight on each seed, the exact direction, the paper's form, held-out
    losses, other batch sizes and seconds are told, not judged.
    """
    race = race_of(records)
    options = race[FISHLEG]["options"]
    parts, worse, others, ahead = {}, [], [], []
    for mark, goal in zip(options["judged"], options["goals"], strict=True):
        ours = at(race[FISHLEG], mark)
        lead = {
            name: [b - a for a, b in zip(ours, at(race[name], mark), strict=True)]
            for name in RIVALS
        }
        worst = min(lead, key=lambda name: min(lead[name]))
        parts[
            f"step {mark}, least lead of a seed over a rival {min(lead[worst]):+.3f} "
            f"({worst}; rule: above 0)"
        ] = min(lead[worst]) > 0
        parts[
            f"step {mark}, mean {statistics.mean(ours):.3f} (rule: at most {goal:g})"
        ] = statistics.mean(ours) <= goal
        worse.append(any(max(gaps) < 0 for gaps in lead.values()))
        compare = lambda name, what=TRAIN, mark=mark, ours=ours: difference(
            ours, at(race[name], mark, what)
        )
        found = [f"{name} {compare(name)}" for name in options["beside"]]
        hindsight = min(RIVALS, key=lambda n: statistics.mean(at(race[n], mark, BEST)))
        found.append(f"{hindsight} at each seed's best rate {compare(hindsight, BEST)}")
        others.append(f"at step {mark} {', '.join(found)}")
        ahead += [name for name in RIVALS if min(lead[name]) > 0]
    why = "; ".join(f"{'yes' if held else 'no'}: {p}" for p, held in parts.items())
    steps = len(options["judged"])
    counts = ", ".join(f"{name} {ahead.count(name)} of {steps}" for name in RIVALS)
    why = (
        f"{why}. Steps at which FishLeg leads on every seed, by rival: {counts}. Not "
        f"judged, FishLeg's training loss less that of others: {'; '.join(others)}."
    )
    if all(parts.values()):
        return Verdict("shown", why)
    return Verdict("reversed" if all(worse) else "not shown", why)
