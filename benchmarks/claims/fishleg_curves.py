"""Does FishLeg beat tuned first-order methods per step on the CURVES auto-encoder?

784-400-200-100-50-25-6 and its mirror image, 842,340 parameters, on 2,000 images, batch
200. Losses of about 120 are those of a constant image, where first-order methods stay
for a hundred steps. FishLeg runs with its defaults, the same as on digits; its sides
longer than 256 are cut, in the run and in the time of a step alike.

Rivals have, at each step at which they are judged, the rate that other seeds chose for
that step. All runs of a seed have the same start and the same batches.

- ``race``: training and held-out loss. After some 200 steps every strong method
  over-fits 2,000 images: the claim is on optimization.
- ``time``: a step of each method in interleaved rounds. Nothing about seconds is
  claimed.

Reference: Garcia, Freddi, Fotiadis, Li, Vakili, Bernacchia and Hennequin,
"Fisher-Legendre (FishLeg) Optimization of Deep Neural Networks", ICLR 2023.
"""

import dataclasses
import statistics
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks import autoencoder_races as races
from benchmarks.autoencoder_races import (
    ADAM,
    CURVES,
    DIGITS,
    FISHLEG,
    MUON,
    RIVALS,
    TRAIN,
    raced,
)
from benchmarks.fishleg_tables import RACE, TIME, at, draw, race_of, tables
from benchmarks.results import Record
from benchmarks.tables import Verdict

__all__ = ["CLAIM", "PRESETS", "draw", "run", "tables", "verdict"]

CLAIM = (
    "On the CURVES auto-encoder at batch 200 FishLeg with its defaults is below 100, "
    "80, 70 and 50 nats after 50, 100, 200 and 500 steps, and below tuned SGD with "
    "momentum, Adam, schedule-free AdamW, Muon and Sophia, on every seed."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    seeds: int
    tuning_seeds: int
    rates: tuple[float, ...]
    marks: tuple[int, ...]  # steps at which the losses are taken
    judged: tuple[int, ...]  # those of the verdict
    goals: tuple[float, ...]  # what FishLeg must be below there, on every seed
    rivals: tuple[str, ...]
    timed: tuple[str, ...]
    rounds: int
    net: str = CURVES


PRESETS = {
    "small": Options(
        seeds=2,
        tuning_seeds=1,
        rates=(0.003,),
        marks=(1, 2),
        judged=(2,),
        goals=(300.0,),
        rivals=(ADAM,),
        timed=(),
        rounds=0,
        net=DIGITS,  # compiles sooner
    ),
    "full": Options(
        seeds=5,
        tuning_seeds=2,
        rates=(0.0003, 0.001, 0.002, 0.005, 0.01, 0.03, 0.1),
        marks=(1, 5, 20, 50, 100, 200, 350, 500),
        judged=(50, 100, 200, 500),
        goals=(100.0, 80.0, 70.0, 50.0),
        rivals=RIVALS,
        timed=(ADAM, MUON, FISHLEG),
        rounds=12,
    ),
}


def run(options: Options, progress: Callable[..., Any]) -> Iterator[dict[str, Any]]:
    """Times the steps, then races."""
    methods, net = (FISHLEG, *options.rivals), options.net
    batch = races.BATCH[net]
    common = {
        "data": races.head(net),
        "dtype": "float32",
        "shapes": {"batch": [batch, races.data(net)[TRAIN].shape[1]]},
        "seed": list(range(options.seeds)),
        "options": dataclasses.asdict(options),
    }

    def record(task, method, **found):
        case = {"task": task, "method": method, "batch": batch}
        return common | {"case": case} | found

    with progress(1 + len(methods), "claim fishleg_curves") as tick:
        if options.timed:
            sizes = {"batch": batch, "steps": max(options.marks), "net": net}
            seconds = races.step_seconds(options.timed, rounds=options.rounds, **sizes)
            yield record(TIME, "all", samples=seconds)
            tick("time of a step")
        for method in methods:
            found = raced(
                method,
                options.rates,
                options.marks,
                batch=batch,
                seeds=options.seeds,
                tuning_seeds=options.tuning_seeds,
                net=net,
                hindsight=False,
            )
            yield record(RACE, method, **found)
            tick(f"race of {method}")


def verdict(records: list[Record]) -> Verdict:
    """Rules *shown* if FishLeg keeps every goal and leads every rival on every seed.

    *Reversed*: at every judged step some rival is below FishLeg on every seed. Held-out
    losses and seconds are told, not judged.
    """
    race = race_of(records)
    options = race[FISHLEG]["options"]
    parts, worse = {}, []
    for mark, goal in zip(options["judged"], options["goals"], strict=True):
        ours = at(race[FISHLEG], mark)
        parts[
            f"step {mark}, largest of a seed {max(ours):.2f}, mean "
            f"{statistics.mean(ours):.2f} (rule: below {goal:g})"
        ] = max(ours) < goal
        lead = {
            name: [b - a for a, b in zip(ours, at(race[name], mark), strict=True)]
            for name in options["rivals"]
        }
        worst = min(lead, key=lambda name: min(lead[name]))
        parts[
            f"step {mark}, least lead of a seed over a rival {min(lead[worst]):+.2f} "
            f"({worst}; rule: above 0)"
        ] = min(lead[worst]) > 0
        worse.append(any(max(gaps) < 0 for gaps in lead.values()))
    why = "; ".join(f"{'yes' if held else 'no'}: {p}" for p, held in parts.items())
    if all(parts.values()):
        return Verdict("shown", f"{why}.")
    return Verdict("reversed" if all(worse) else "not shown", f"{why}.")
