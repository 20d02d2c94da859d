"""The main job: digits, dense and Monarch, from scratch and by projection.

Nine rows over the same seeds, data and epochs, all but two with Adam:

- MLP-M as it is, dense;
- MLP-M with every linear layer a Monarch map of 4 blocks;
- a dense MLP narrow enough to have no more parameters than that, the honest baseline;
- the first two again with the gradient-norm penalty before the optimizer;
- the first two again with FishLeg in place of Adam;
- the trained dense MLP-M projected onto Monarch, as it comes out;
- the same after a few epochs of fine-tuning.

Adam has the same learning rate in all. The penalty's radius is the best of 0.05, 0.1,
0.2, 0.5 and 1 on the validation rows (seeds 10 to 12), FishLeg's damping that of 0.003,
0.01, 0.03, 0.1 and 0.3; nothing else was tuned. Of the dense and the Monarch network,
plain and penalised, the spectrum of the Hessian is measured too.
"""

import dataclasses
import functools
import json
import pathlib
import shutil
import statistics
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from matplotlib import rc_context
from matplotlib.figure import Figure

from benchmarks import demo_spectrum, members, plots, results, timing
from benchmarks.environment import ROOT
from benchmarks.results import Record
from benchmarks.tables import Table
from jaxlab.datasets import load
from jaxlab.layers import MonarchLinear, monarchize
from jaxlab.likelihoods import Categorical
from jaxlab.models import MLP, mlp_m
from jaxlab.objective import Objective
from jaxlab.optimizers import fishleg
from jaxlab.sharpness import gradient_norm_penalty
from jaxlab.training import (
    TrainState,
    create_state,
    evaluate,
    fit,
    from_nnx,
    make_train_step,
)

KIND, NAME = "demo", "digits"
PICTURE = ROOT / "docs" / "images" / "demo.png"

NBLOCKS = 4
DENSE, MONARCH, NARROW = "dense", "Monarch", "narrower dense"
PROJECTED, TUNED = "dense, projected", "dense, projected, fine-tuned"
PENALISED = {DENSE: "dense + penalty", MONARCH: "Monarch + penalty"}
NATURAL = {DENSE: "dense + FishLeg", MONARCH: "Monarch + FishLeg"}
SPECTRA = (DENSE, MONARCH, *PENALISED.values())
COLOURS = dict(zip((DENSE, MONARCH, NARROW, TUNED), plots.COLOURS, strict=False))
# Lighter kin of the plain ones' blue and red, of Okabe and Ito too.
COLOURS |= dict(zip(PENALISED.values(), ("#56B4E9", "#E69F00"), strict=True))
COLOURS |= dict(zip(NATURAL.values(), ("#004c77", "#8a3b00"), strict=True))

PENALTY = (
    " Penalty: {penalty:.2g} times the norm of the gradient (alpha {alpha}, radius "
    "{radius}, chosen on the validation rows; nothing else was tuned), two gradients a "
    "step."
)
FISHLEG = (
    " FishLeg: damping {damping}, chosen on the validation rows; an auxiliary step in "
    "each of the first {dense} steps and then in one of {every}, where the step was "
    "timed."
)
DENSE_STEPS, EVERY = 100, 10  # defaults of FishLeg


@dataclasses.dataclass(frozen=True)
class Options:
    seeds: int
    epochs: int
    fine_tuning_epochs: int
    rounds: int
    order: int  # of the spectrum
    batch_size: int = 128
    learning_rate: float = 2e-3
    alpha: float = 0.8  # share of the gradient at the perturbed point
    radius: float = 0.2  # of the perturbation; the penalty is alpha * radius
    damping: float = 0.03  # of FishLeg


PRESETS = {
    "small": Options(seeds=1, epochs=2, fine_tuning_epochs=1, rounds=2, order=8),
    "full": Options(seeds=3, epochs=60, fine_tuning_epochs=5, rounds=20, order=100),
}


def monarch_m(*, rngs: nnx.Rngs) -> MLP:
    """Builds MLP-M of Monarch layers."""
    return mlp_m(linear=functools.partial(MonarchLinear, nblocks=NBLOCKS), rngs=rngs)


def count(model: Callable[..., nnx.Module]) -> int:
    """Counts the parameters of a model without making them."""
    shapes = nnx.eval_shape(lambda: model(rngs=nnx.Rngs(0)))
    leaves = jax.tree.leaves(nnx.state(shapes, nnx.Param))
    return sum(leaf.size for leaf in leaves)


def narrow_m(*, rngs: nnx.Rngs) -> MLP:
    """Builds the widest dense 64-h-h-10 with no more parameters than Monarch's."""
    budget = count(monarch_m)
    width = max(h for h in range(1, 257) if 10 + 76 * h + h * h <= budget)
    return MLP((64, width, width, 10), rngs=rngs)


def flops(params: Any) -> int:
    """Counts operations of one example: two for each weight, none for biases."""
    return sum(2 * leaf.size for leaf in jax.tree.leaves(params) if leaf.ndim > 1)


class Run:
    """Trains one model by ``fit`` and keeps what the table and the picture need."""

    def __init__(
        self,
        model: nnx.Module,
        seed: int,
        epochs: int,
        options: Options,
        *,
        penalised: bool = False,
        natural: bool = False,
    ):
        self.objective, self.params, self.rest = from_nnx(model, Categorical())
        self.model, self.seed, self.epochs, self.options = model, seed, epochs, options
        rows = len(load("digits").splits["train"][0])
        steps = epochs * -(-rows // options.batch_size)
        self.natural = natural
        decay = optax.cosine_decay_schedule(1.0, steps)
        self.optimizer = (
            fishleg(decay, damping=options.damping)
            if natural
            else optax.adam(lambda count: options.learning_rate * decay(count))
        )
        if penalised:
            penalty = gradient_norm_penalty(options.alpha, options.radius)
            self.optimizer = optax.chain(penalty, self.optimizer)

    def state(self) -> TrainState:
        """Makes the state of step 0."""
        key = jax.random.key(self.seed)
        return create_state(key, self.params, self.optimizer, model_state=self.rest)

    def accuracy(self) -> float:
        """Measures the share of right answers on the test rows."""
        test = load("digits").splits["test"]
        return evaluate(self.objective, self.params, self.rest, test)["accuracy"]

    def train(self) -> list[float]:
        """Trains; returns the mean training loss of every epoch."""
        result = fit(
            self.objective,
            self.optimizer,
            self.state(),
            load("digits").splits["train"],
            epochs=self.epochs,
            batch_size=self.options.batch_size,
            progress=False,
        )
        self.params = result.state.params
        nnx.update(self.model, self.params)
        return [epoch["loss"] for epoch in result.epochs]

    def spectrum(self, objective: Objective) -> dict[str, Any]:
        """Measures the spectrum of the Hessian on the training rows.

        Args:
          objective: of this network or of another one that is built alike: the same
            object means the same compiled program.
        """
        rows = load("digits").splits["train"]
        order = self.options.order
        return demo_spectrum.measure(
            objective, self.params, self.rest, rows, order=order
        )


def step_times(runs: dict[str, Run], options: Options) -> timing.Timings:
    """Times the training step of every model, in alternation."""
    inputs, targets = load("digits").splits["train"]
    batch = tuple(jnp.asarray(x[: options.batch_size]) for x in (inputs, targets))

    def stepper(run: Run) -> Callable[[], Any]:
        step = make_train_step(run.objective, run.optimizer)
        state, metrics = run.state(), None
        for _ in range(DENSE_STEPS if run.natural else 0):
            state, metrics = step(state, batch)

        def call() -> Any:
            nonlocal state, metrics  # each step takes the buffers of the one before
            for _ in range(EVERY if run.natural else 1):
                state, metrics = step(state, batch)
            return metrics

        return call

    calls = {name: stepper(run) for name, run in runs.items()}
    found = timing.measure(calls, baseline=DENSE, rounds=options.rounds)
    for name in NATURAL.values():
        found.samples[name] = [sample / EVERY for sample in found.samples[name]]
    return found


def run(options: Options, show: Callable[..., Any]) -> Iterator[dict[str, Any]]:
    """Trains all, seed by seed, then times the steps; yields a record for each row."""
    data = load("digits")
    builders = {DENSE: mlp_m, MONARCH: monarch_m, NARROW: narrow_m}
    for rows in (PENALISED, NATURAL):
        builders |= {new: builders[plain] for plain, new in rows.items()}
    names = (*builders, PROJECTED, TUNED)
    losses: dict[str, list[list[float]]] = {name: [] for name in names}
    accuracies: dict[str, list[float]] = {name: [] for name in names}
    runs: dict[str, Run] = {}
    spectra: dict[str, dict[str, Any]] = {}
    ticks = options.seeds * (len(builders) + 1) + len(SPECTRA) + 1
    with show(ticks, "demo") as tick:
        for seed in range(options.seeds):
            for name, build in builders.items():
                model = build(rngs=nnx.Rngs(seed))
                runs[name] = Run(
                    model,
                    seed,
                    options.epochs,
                    options,
                    penalised=name in PENALISED.values(),
                    natural=name in NATURAL.values(),
                )
                losses[name].append(runs[name].train())
                accuracies[name].append(runs[name].accuracy())
                tick(f"seed {seed}, {name}: accuracy {accuracies[name][-1]:.3f}")
            runs[TUNED] = Run(
                monarchize(runs[DENSE].model, nblocks=NBLOCKS),
                seed,
                options.fine_tuning_epochs,
                options,
            )
            accuracies[PROJECTED].append(runs[TUNED].accuracy())
            losses[TUNED].append(runs[TUNED].train())
            accuracies[TUNED].append(runs[TUNED].accuracy())
            tick(f"seed {seed}, projected: accuracy {accuracies[TUNED][-1]:.3f}")
        for plain, new in PENALISED.items():
            for name in (plain, new):
                found = runs[name].spectrum(runs[plain].objective)
                spectra[name] = {"spectrum": found}
                tick(f"spectrum, {name}")
        timings = step_times(runs, options)
        tick("time of a step")
    for name in names:
        trained = runs[TUNED if name == PROJECTED else name]
        leaves = jax.tree.leaves(trained.params)
        seconds = timings.samples if name == DENSE else {}
        own = [] if name == PROJECTED else timings.samples[name]
        yield {
            "case": {"model": name},
            "data": {"name": data.name, "digest": data.digest},
            "dtype": "float32",
            "shapes": {split: list(x.shape) for split, (x, _) in data.splits.items()},
            "seed": list(range(options.seeds)),
            "options": dataclasses.asdict(options),
            "parameters": sum(leaf.size for leaf in leaves),
            "flops": flops(trained.params),
            "samples": {
                "accuracy": accuracies[name],
                "loss": losses[name],
                "step_seconds": own,
                "step_seconds" + timing.AGAIN: seconds.get(DENSE + timing.AGAIN, []),
            },
            **spectra.get(name, {}),
        }


def spread(values: list[float], scale: float = 1.0, digits: int = 1) -> str:
    """Writes mean and standard deviation over the seeds."""
    mean = scale * statistics.mean(values)
    if len(values) == 1:
        return f"{mean:.{digits}f}"
    return f"{mean:.{digits}f} ± {scale * statistics.stdev(values):.{digits}f}"


def tables(records: list[Record]) -> list[Table]:
    """Writes the table of the demo, and that of the spectra if there are any."""
    rows = []
    for record in records:
        seconds = record["samples"]["step_seconds"]
        rows.append(
            (
                record["case"]["model"],
                f"{record['parameters']:,}",
                f"{record['flops']:,}",
                f"{1e6 * statistics.median(seconds):.0f}" if seconds else "",
                spread(record["samples"]["accuracy"], 100),
            )
        )
    first = records[0]
    samples, options = first["samples"], first["options"]
    again = samples["step_seconds" + timing.AGAIN]
    same = timing.quartiles(
        [b / a for a, b in zip(samples["step_seconds"], again, strict=True)]
    )
    header = (
        "model",
        "parameters",
        "FLOPs per example",
        "us per step",
        "test accuracy %",
    )
    note = (
        f"Digits, 64-256-256-10, {options['epochs']} epochs (fine-tuning: "
        f"{options['fine_tuning_epochs']}), batch {options['batch_size']}; accuracy: "
        f"mean ± standard deviation of {len(first['seed'])} seeds on "
        f"{first['shapes']['test'][0]} test rows. FLOPs: 2 per weight, forward. Step: "
        f"median on {len(first['device']['cores'])} cores, dense against itself {same}."
    )
    if set(PENALISED.values()) & {row[0] for row in rows}:
        note += PENALTY.format(**options, penalty=options["alpha"] * options["radius"])
    if set(NATURAL.values()) & {row[0] for row in rows}:
        note += FISHLEG.format(**options, dense=DENSE_STEPS, every=EVERY)
    return [Table("", header, rows, note), *demo_spectrum.tables(records)]


def draw(records: list[Record]) -> Figure:
    """Draws loss curves, accuracies, and spectra if there are any."""
    found = {record["case"]["model"]: record for record in records}
    rows = demo_spectrum.in_pairs(records, PENALISED)
    panels = 3 if rows else 2
    with rc_context(plots.STYLE):
        figure = Figure(figsize=(5 * panels, 4.2), layout="constrained")
        figure.get_layout_engine().set(wspace=0.06)
        grid = figure.add_gridspec(max(1, len(rows)), panels)
        _draw_losses(figure.add_subplot(grid[:, 0]), found)
        _draw_accuracies(figure.add_subplot(grid[:, 1]), found)
        demo_spectrum.draw_rows(
            figure, [grid[i, 2] for i in range(len(rows))], rows, COLOURS
        )
    return figure


def _draw_losses(axes: Any, found: dict[str, Record]) -> None:
    epochs = found[DENSE]["options"]["epochs"]
    ends = {}
    for name, colour in COLOURS.items():
        if name not in found:  # records from before there was a penalty
            continue
        curves = np.array(found[name]["samples"]["loss"])
        # Fine-tuning goes on where the dense runs end.
        x = 1 + np.arange(curves.shape[1]) + (epochs if name == TUNED else 0)
        for curve in curves:
            axes.plot(x, curve, color=colour, lw=0.6, alpha=0.6)
        middle = np.exp(np.log(curves).mean(0))
        axes.plot(x, middle, color=colour, lw=2, solid_capstyle="round")
        ends[name] = (x[-1], np.log10(middle[-1]))
    axes.set_yscale("log")
    axes.set_title("Training loss (bold: geometric mean of the seeds)")
    axes.set_xlabel("epoch; fine-tuning goes on where dense ends")
    axes.set_xlim(0, None)
    low, high = np.log10(axes.get_ylim())
    heights = plots.apart([y for _, y in ends.values()], 0.06 * (high - low))
    for (name, (x, _)), y in zip(ends.items(), heights, strict=True):
        axes.annotate(
            name.replace("dense, projected, ", "projected,\n"),
            (x, 10**y),
            (7, 0),
            textcoords="offset points",
            color=COLOURS[name],
            va="center",
            annotation_clip=False,
        )


def _draw_accuracies(axes: Any, found: dict[str, Record]) -> None:
    # Half a test row from 0 and 1 at the most, where the logit ends.
    rows = found[DENSE]["shapes"]["test"][0]
    inside = lambda values: np.clip(values, 0.5 / rows, 1 - 0.5 / rows)
    every = {name: inside(r["samples"]["accuracy"]) for name, r in found.items()}
    for height, (name, accuracies) in enumerate(every.items()):
        colour = COLOURS[TUNED if name == PROJECTED else name]
        # Seeds often agree: each has a line of its own.
        lines = height + 0.16 * (np.arange(len(accuracies)) - len(accuracies) / 2 + 0.5)
        fill = "white" if name == PROJECTED else colour
        axes.plot(accuracies, lines, "o", ms=5, color=colour, mfc=fill)
    axes.set_xscale("logit")
    values = np.concatenate(list(every.values()))
    logits = np.log(values / (1 - values))
    low, high = 1 / (1 + np.exp(-np.array([logits.min() - 0.3, logits.max() + 0.3])))
    axes.set_xlim(low, high)
    ticks = np.array([0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995])
    ticks = ticks[(ticks >= low) & (ticks <= high)]
    axes.set_xticks(ticks, [f"{100 * tick:g}" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("% (logit scale)")
    thousands = lambda name: f"{found[name]['parameters'] / 1e3:.0f} k"
    short = lambda name: name.replace("dense, ", "").replace(", ", ",\n")
    axes.set_yticks(range(len(every)), [f"{short(n)}, {thousands(n)}" for n in every])
    for label, name in zip(axes.get_yticklabels(), every, strict=True):
        label.set_color(COLOURS[TUNED if name == PROJECTED else name])
    axes.set_ylim(len(every) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.set_title("Test accuracy of each seed; parameters")
    axes.grid(axis="x", color="#e4e4e4", lw=0.6)
    axes.set_axisbelow(True)


def main(
    *, preset: str, directory: pathlib.Path, record: bool, arguments: list[str]
) -> None:
    """Runs the demo, prints the table, writes table and picture.

    Args:
      preset: "small" or "full".
      directory: where table and picture go.
      record: also files the records of a full run and copies the picture to ``docs``.
      arguments: what was typed.
    """
    this = sys.modules[__name__]  # a member in all but its place
    records = members.run(
        this, kind=KIND, name=NAME, preset=preset, arguments=arguments
    )
    table, *others = tables(records)
    shown = "\n\n".join(map(str, (table, *others)))
    named = [dict(zip(table.header, row, strict=True)) for row in table.rows]
    content = {"rows": named, "note": table.note, "records": records}
    results.write_atomically(
        directory / "table.json", json.dumps(content, indent=1).encode()
    )
    results.write_atomically(directory / "table.md", f"{shown}\n".encode())
    picture = directory / "demo.png"
    plots.save(draw(records), picture)
    print(f"{shown}\n\nTables and picture: {directory}")
    if record:
        PICTURE.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(picture, PICTURE)
        target = results.directory_for(preset)
        print(f"Kept: {PICTURE} and {results.save_results(target, records)}")
