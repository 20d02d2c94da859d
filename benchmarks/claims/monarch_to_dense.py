"""Does reverse sparsification reach the dense loss for fewer operations?

GPT-S on characters: dense for all steps; Monarch (4 blocks) for 90 % of them, then
dense with the moments of Adam begun anew for the layers that changed and the schedule
running on (:func:`jaxlab.training.switch_layers`); Monarch for all steps, as reference.
The second and third share their first part where they share rate and seed.

Operations are counted from the weights: those of a step are three times a forward
pass's, so the share saved is that of the forward operations over all steps.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from matplotlib.figure import Figure

from benchmarks import language, timing
from benchmarks.language import DENSE, MONARCH
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
from jaxlab.layers import densify
from jaxlab.likelihoods import Categorical
from jaxlab.training import TrainState, switch_layers

CLAIM = (
    "GPT-S on stdlib_text trained with Monarch layers for 90 % of the steps and dense "
    "for the rest reaches the test loss of dense training within noise, with less "
    "than half of its operations."
)

REVERSE = "Monarch, then dense"
DENSE_SHARE = 0.1


@dataclasses.dataclass(frozen=True)
class Options(language.Setting):
    pass


PRESETS = {
    "small": Options(steps=10, **language.TINY),
    "full": Options(
        steps=1_300,
        learning_rates=(5e-4, 1e-3, 2e-3, 4e-3, 8e-3),
        seeds=5,
        tuning_seeds=2,
    ),
}


def switch_step(steps: int) -> int:
    """Says after how many steps the layers become dense.

    Examples:
      >>> switch_step(400)
      360
    """
    return steps - max(1, round(DENSE_SHARE * steps))


class FirstPart:
    """Trains Monarch up to the switch, once for each seed and rate."""

    def __init__(self, trainer: language.Trainer, steps: int):
        self.trainer, self.steps = trainer, steps
        self.done: dict[tuple[int, float], tuple[TrainState, float]] = {}

    def __call__(self, seed: int, rate: float) -> tuple[TrainState, float]:
        """Gives a copy of the state, whose buffers may be used, and the seconds."""
        if (seed, rate) not in self.done:
            trainer = self.trainer
            state = trainer.start(trainer.fresh(seed), rate, self.steps)
            self.done[seed, rate] = trainer.go_on(
                state, (seed,), switch_step(self.steps)
            )
        state, seconds = self.done[seed, rate]
        return jax.tree.map(jnp.copy, state), seconds


def switched(
    model: nnx.Module, state: TrainState, rate: float, steps: int
) -> TrainState:
    """Turns the state of a Monarch run into that of a dense one."""
    new = switch_layers(
        model,
        state,
        densify,
        likelihood=Categorical(),
        optimizer=language.optimizer(rate, steps),
    )
    return new.state


def run(options: Options, progress: Callable[..., Any]) -> Iterator[dict[str, Any]]:
    """Trains the three ways."""
    text = language.Text(options)
    built = language.builders(options)
    dense, monarch = (language.Trainer(built[n], text) for n in (DENSE, MONARCH))
    model = built[MONARCH](rngs=nnx.Rngs(0))
    first = FirstPart(monarch, options.steps)

    def all_dense(seed: int, rate: float) -> language.Outcome:
        state = dense.start(dense.fresh(seed), rate, options.steps)
        return dense.outcome(state, (seed,), options.steps)

    def all_monarch(seed: int, rate: float) -> language.Outcome:
        state, seconds = first(seed, rate)
        return monarch.outcome(state, (seed,), options.steps, before=seconds)

    def reverse(seed: int, rate: float) -> language.Outcome:
        state, seconds = first(seed, rate)
        state = switched(model, state, rate, options.steps)
        return dense.outcome(state, (seed,), options.steps, before=seconds)

    share = switch_step(options.steps) / options.steps
    mixed = share * monarch.flops + (1 - share) * dense.flops
    ways = {
        DENSE: (all_dense, dense.parameters, dense.flops),
        REVERSE: (reverse, dense.parameters, mixed),
        MONARCH: (all_monarch, monarch.parameters, monarch.flops),
    }
    total = len(ways) * language.runs_of(options)
    with progress(total, "claim monarch_to_dense") as tick:
        for name, (one, parameters, flops) in ways.items():
            samples, _ = language.sweep(
                one,
                options,
                lambda done: tick(f"{name}, {done}"),  # noqa: B023
            )
            yield language.record(
                {"method": name},
                samples,
                text,
                steps=options.steps,
                parameters=parameters,
                flops=flops,
                saved=1 - flops / dense.flops,
            )


def _by_method(records: list[Record]) -> dict[str, Record]:
    return {record["case"]["method"]: record for record in records}


def tables(records: list[Record]) -> list[Table]:
    """Writes losses, differences to dense, and operations saved."""
    dense = _by_method(records)[DENSE]
    rows = []
    for record in records:
        name, samples = record["case"]["method"], record["samples"]
        gap = difference(samples["test"], dense["samples"]["test"])
        rows.append(
            (
                name,
                f"{record['parameters']:,}",
                chosen_rate(samples["tuning"]),
                spread(samples["test"]),
                "" if name == DENSE else str(gap),
                f"{record['saved']:.1%}",
                f"{timing.quartiles(samples['seconds']).median:.1f}",
            )
        )
    header = (
        "training",
        "parameters at the end",
        "rate",
        "test loss",
        "less dense [95 %]",
        "FLOPs saved",
        "seconds a run",
    )
    note = (
        f"{language.setting_note(records)} The switch is after step "
        f"{switch_step(dense['steps'])}. FLOPs: counted from the weights, attention's "
        f"own products left out. Noise: {noise(dense):.4f}, two standard deviations "
        "of the dense loss. Seconds: median over the seeds, evaluation left out."
    )
    return [Table("Monarch, then dense", header, rows, note)]


def verdict(records: list[Record]) -> Verdict:
    """Rules *shown* if the switched run ends at most the noise above the dense one.

    The upper end of the 95 % interval of the paired differences, switched less dense,
    is to be no higher than two standard deviations of the dense loss over the seeds,
    and more than half of the operations are to be saved. *Reversed*: the lower end is
    above those two standard deviations.
    """
    found = _by_method(records)
    dense, ours = found[DENSE], found[REVERSE]
    gap = difference(ours["samples"]["test"], dense["samples"]["test"])
    margin = noise(dense)
    alone = difference(ours["samples"]["test"], found[MONARCH]["samples"]["test"])
    why = (
        f"test loss less that of dense training {gap} (rule: at most {margin:.4f}, "
        f"two standard deviations of dense), {ours['saved']:.1%} of the operations "
        f"saved (rule: above 50 %); less that of Monarch all the way {alone}."
    )
    if gap.upper <= margin and ours["saved"] > 0.5:
        return Verdict("shown", why)
    return Verdict("reversed" if gap.lower > margin else "not shown", why)


def draw(records: list[Record]) -> Figure:
    """Draws the differences to dense training."""
    found = _by_method(records)
    rows = {name: gaps(found[name], found[DENSE]) for name in (REVERSE, MONARCH)}
    return draw_differences(rows, xlabel="test loss less that of dense training")
