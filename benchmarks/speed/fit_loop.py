"""Speed of ``jaxlab.training.fit`` against bare Python loops over the same step.

``fit`` keeps the data on the device, gathers its batches there and runs many steps in
one call; it also shuffles, checks every loss and writes a line of metrics per epoch,
all of which is in its time. The bare loops do nothing but call the jitted step: one on
batches gathered from NumPy arrays in a fresh order each epoch, one on batches that lie
on the device ready cut.

One sample of ``fit`` is a run of many epochs, counted from the first line of metrics
(the first epoch compiles) to the end of the call; the epochs that may have run before
that line was written are not counted as work. Like every speed member this runs on one
core with synchronous dispatch, so no loop can hide its Python behind the device.
"""

import dataclasses
import functools
import json
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from matplotlib.figure import Figure

from benchmarks import timing
from benchmarks.plots import dots
from benchmarks.results import Record
from benchmarks.tables import Table, Verdict
from jaxlab.datasets import load
from jaxlab.likelihoods import Categorical
from jaxlab.models import MLP, mlp_m
from jaxlab.training import (
    create_state,
    epoch_order,
    fit,
    from_nnx,
    make_train_step,
)

CLAIM = (
    "On digits a step of fit, everything included, takes less time than one of a bare "
    "loop fed from NumPy by a factor of 1.15, and no more than one fed from the device."
)

FIT, NUMPY, DEVICE = "fit", "bare loop, NumPy", "bare loop, device"
FACTOR = 1.15
AHEAD = 2  # epochs that fit may have run beyond the one whose line it writes
TOLERANCE = 1e-4  # of the parameters after two epochs; float32 in two programs
MODELS: dict[str, Callable[..., nnx.Module]] = {
    "64-64-10": functools.partial(MLP, (64, 64, 10)),
    "MLP-M": mlp_m,
}


@dataclasses.dataclass(frozen=True)
class Options:
    models: tuple[str, ...]
    epochs: int  # of one sample
    rounds: int
    batch_size: int = 128
    seed: int = 0


PRESETS = {
    "small": Options(("64-64-10",), epochs=20, rounds=2),
    "full": Options(("64-64-10", "MLP-M"), epochs=200, rounds=20),
}


class Loops:
    """Three ways through the same epochs of the same steps, each a sampler."""

    def __init__(
        self, model: str, data: tuple[np.ndarray, np.ndarray], options: Options
    ):
        self.data = data
        self.options = options
        self.steps = len(data[0]) // options.batch_size
        self.optimizer = optax.adam(1e-3)
        module = MODELS[model](rngs=nnx.Rngs(options.seed))
        self.objective, self.params, self.rest = from_nnx(module, Categorical())
        self.step = make_train_step(self.objective, self.optimizer)
        self.state = self.fresh()
        self.shuffle = np.random.default_rng(options.seed)
        self.on_device = [
            tuple(map(jnp.asarray, self.cut(np.arange(len(data[0])), index)))
            for index in range(self.steps)
        ]

    def fresh(self) -> Any:
        key = jax.random.key(self.options.seed)
        return create_state(key, self.params, self.optimizer, model_state=self.rest)

    def cut(self, order: np.ndarray, index: int) -> tuple[np.ndarray, np.ndarray]:
        size = self.options.batch_size
        rows = order[index * size : (index + 1) * size]
        return self.data[0][rows], self.data[1][rows]

    def fitted(self, epochs: int, metrics_path: pathlib.Path) -> Any:
        return fit(
            self.objective,
            self.optimizer,
            self.fresh(),
            self.data,
            epochs=epochs,
            batch_size=self.options.batch_size,
            drop_remainder=True,
            metrics_path=metrics_path,
            progress=False,
        ).state

    def disagreement(self) -> float:
        """Trains two epochs by ``fit`` and by hand over the same batches.

        Raises:
          ValueError: if the parameters differ by more than float32 explains.
        """
        with tempfile.TemporaryDirectory() as folder:
            found = self.fitted(2, pathlib.Path(folder, "metrics.jsonl"))
        state = self.fresh()
        for epoch in range(2):
            order = epoch_order(state.key, epoch, size=len(self.data[0]))
            for index in range(self.steps):
                state, _ = self.step(state, self.cut(np.asarray(order), index))
        gaps = jax.tree.map(
            lambda a, b: jnp.max(jnp.abs(a - b)), found.params, state.params
        )
        # NaN if one of them is, unlike max().
        worst = float(jnp.max(jnp.stack(jax.tree.leaves(gaps))))
        if not worst <= TOLERANCE:
            raise ValueError(
                f"fit and the bare loop end {worst:.1e} apart, more than "
                f"{TOLERANCE:.0e}: there is nothing to compare."
            )
        return worst

    def sample_fit(self) -> float:
        epochs = self.options.epochs
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder, "metrics.jsonl")
            jax.block_until_ready(self.fitted(epochs, path).params)
            end = time.time()
            with open(path) as lines:
                start = json.loads(next(lines))["time"]
        return (end - start) / ((epochs - 1 - AHEAD) * self.steps)

    def sample_numpy(self) -> float:
        start = time.perf_counter()
        for _ in range(self.options.epochs):
            order = self.shuffle.permutation(len(self.data[0]))
            for index in range(self.steps):
                self.state, _ = self.step(self.state, self.cut(order, index))
        jax.block_until_ready(self.state.params)
        return (time.perf_counter() - start) / (self.options.epochs * self.steps)

    def sample_device(self) -> float:
        start = time.perf_counter()
        for _ in range(self.options.epochs):
            for batch in self.on_device:
                self.state, _ = self.step(self.state, batch)
        jax.block_until_ready(self.state.params)
        return (time.perf_counter() - start) / (self.options.epochs * self.steps)


def run(options: Options, progress: Callable[..., Any]) -> Iterator[dict[str, Any]]:
    """Times every model."""
    data = load("digits")
    inputs, targets = data.splits["train"]
    with progress(len(options.models), "speed fit_loop") as tick:
        for model in options.models:
            loops = Loops(model, (inputs, targets), options)
            worst = loops.disagreement()
            samplers = {
                NUMPY: loops.sample_numpy,
                DEVICE: loops.sample_device,
                FIT: loops.sample_fit,
            }
            samples = timing.interleave(samplers, baseline=NUMPY, rounds=options.rounds)
            tick(model)
            yield {
                "case": {"model": model, "batch_size": options.batch_size},
                "data": {"name": data.name, "digest": data.digest},
                "dtype": "float32",
                "shapes": {"inputs": list(inputs.shape)},
                "seed": options.seed,
                "samples": samples,
                "epochs": options.epochs,
                "steps_per_epoch": loops.steps,
                "disagreement": worst,
            }


def tables(records: list[Record]) -> list[Table]:
    """Writes the time of a step in each loop."""
    rows = []
    for record in records:
        samples = record["samples"]
        same = timing.same_pair(samples, NUMPY)
        for name in (FIT, NUMPY, DEVICE):
            ratio = str(timing.ratio(samples, name, FIT))
            rows.append(
                (
                    record["case"]["model"],
                    name,
                    f"{1e6 * timing.best(samples, name):.1f}",
                    f"{1e6 * timing.quartiles(samples[name]).median:.1f}",
                    "1" if name == FIT else ratio,
                    str(same) if name == NUMPY else "",
                )
            )
    first = records[0]
    header = ("model", "loop", "min us", "median us", "time / fit's", "A/A")
    gap = max(r["disagreement"] for r in records)
    note = (
        f"Time of a step; digits, batch {first['case']['batch_size']}, Adam. A sample "
        f"is {first['epochs']} epochs of {first['steps_per_epoch']} steps, "
        f"{len(first['samples'][FIT])} rounds in alternation; A/A is the NumPy-fed "
        "loop against itself. Metrics file and checks included, callbacks off. The "
        f"parameters of fit and a bare loop differ by {gap:.0e} after two epochs."
    )
    return [Table("Fit loop", header, rows, note)]


def verdict(records: list[Record]) -> Verdict:
    """Rules *shown* if every model gains FACTOR on NumPy and loses nothing on device.

    "Loses nothing": the ratio to the device-fed loop is not below the A/A spread.
    *Reversed*: fit is slower than the NumPy-fed loop for every model.
    """
    gains, kept, slower, said = [], [], [], []
    for record in records:
        samples = record["samples"]
        same = timing.same_pair(samples, NUMPY)
        numpy_fed = timing.ratio(samples, NUMPY, FIT)
        device_fed = timing.ratio(samples, DEVICE, FIT)
        gains.append(numpy_fed.median >= FACTOR and timing.beyond(numpy_fed, same) > 0)
        kept.append(device_fed.median >= 1 or timing.beyond(device_fed, same) >= 0)
        slower.append(numpy_fed.median < 1 and timing.beyond(numpy_fed, same) < 0)
        said.append(
            f"{record['case']['model']}: {numpy_fed.median:.2f} times faster than fed "
            f"from NumPy, {device_fed.median:.2f} times than fed from the device"
        )
    why = f"{'; '.join(said)} (rule: at least {FACTOR} and not slower, beyond the A/A)."
    if all(gains) and all(kept):
        return Verdict("shown", why)
    return Verdict("reversed" if all(slower) else "not shown", why)


def draw(records: list[Record]) -> Figure:
    """Draws the time of a step in each loop."""
    rows = {
        record["case"]["model"]: {
            name: [1e6 * sample for sample in record["samples"][name]]
            for name in (FIT, NUMPY, DEVICE)
        }
        for record in records
    }
    return dots(rows, xlabel="microseconds a step (dot: minimum, line: quartiles)")
