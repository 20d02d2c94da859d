"""What the claims on language models share: GPT-S on text, tuned runs, differences.

The text is ``stdlib_text``; the loss is in nats per character. Every method sees the
same batches at the same seed and step, is trained by Adam behind clipping at norm 1,
with linear warm-up over the first tenth and a cosine down to a tenth of the peak, and
gets the same peaks to choose from: the choice is by the mean validation loss over
seeds that take no part in what is judged. Judged are differences of test losses, seed
by seed, with a 95 % interval by Student's t.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from benchmarks import timing
from benchmarks.paired import chosen_rate, finite
from benchmarks.results import Record
from jaxlab.datasets import load
from jaxlab.layers import MonarchLinear
from jaxlab.likelihoods import Categorical
from jaxlab.models import GPT
from jaxlab.training import (
    TrainState,
    create_state,
    evaluate,
    from_nnx,
    make_train_step,
)

VOCABULARY = 98
NBLOCKS = 4
DENSE, MONARCH, LOW_RANK, NARROW = "dense", "Monarch", "low rank", "narrower dense"
FIRST_TUNING_SEED = 1_000
WARM_UP, FLOOR = 0.1, 0.1  # shares of the steps and of the peak


@dataclasses.dataclass(frozen=True)
class Setting:
    """The model, the text and the training that a member's methods share."""

    steps: int
    learning_rates: tuple[float, ...]
    seeds: int
    tuning_seeds: int
    batch_size: int = 2  # learns most for a given number of characters at this length
    context: int = 128
    width: int = 128
    layers: int = 4
    heads: int = 4
    held_out: int = 256  # windows of validation and of test that are evaluated

    @property
    def judged(self) -> list[int]:
        return list(range(self.seeds))

    @property
    def tuning(self) -> list[int]:
        return list(range(FIRST_TUNING_SEED, FIRST_TUNING_SEED + self.tuning_seeds))


# A model small enough for tests; its losses mean nothing.
TINY: dict[str, Any] = {
    "learning_rates": (1e-3, 1e-2),
    "seeds": 2,
    "tuning_seeds": 1,
    "batch_size": 4,
    "context": 32,
    "width": 32,
    "layers": 1,
    "held_out": 8,
}


@functools.cache
def matched_rank(inputs: int, outputs: int) -> int:
    """Gives the least rank with no fewer parameters than the Monarch layer.

    Examples:
      >>> matched_rank(128, 128), matched_rank(128, 512)
      (32, 32)
    """
    make = lambda: MonarchLinear(inputs, outputs, nblocks=NBLOCKS, rngs=nnx.Rngs(0))
    layer = nnx.eval_shape(make)
    return -(-(layer.w1.size + layer.w2.size) // (inputs + outputs))


class LowRankLinear(nnx.Module):
    """Maps rows by ``x squeeze expand + bias``, of as many parameters as Monarch."""

    def __init__(self, inputs: int, outputs: int, *, rngs: nnx.Rngs):
        rank = matched_rank(inputs, outputs)
        normal = lambda shape: jax.random.normal(rngs.params(), shape) / shape[0] ** 0.5
        self.squeeze = nnx.Param(normal((inputs, rank)))
        self.expand = nnx.Param(normal((rank, outputs)))
        self.bias = nnx.Param(jnp.zeros(outputs))

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x @ self.squeeze[...] @ self.expand[...]
        return y + jnp.broadcast_to(self.bias[...], y.shape)


def dense_count(width: int, setting: Setting) -> int:
    """Counts the parameters of a dense GPT of some width."""
    block = 12 * width**2 + 13 * width
    return (VOCABULARY + setting.context + 2) * width + setting.layers * block


def gpt(
    setting: Setting, *, linear: Callable[..., Any], width: int, rngs: nnx.Rngs
) -> GPT:
    """Builds the GPT of a setting with some layers and width."""
    return GPT(
        vocabulary=VOCABULARY,
        context=setting.context,
        width=width,
        layers=setting.layers,
        heads=setting.heads,
        linear=linear,
        rngs=rngs,
    )


def builders(setting: Setting) -> dict[str, Callable[..., GPT]]:
    """Makes the four models: dense, Monarch, and two with Monarch's parameters."""
    make = functools.partial(gpt, setting, width=setting.width)
    monarch = functools.partial(
        make, linear=functools.partial(MonarchLinear, nblocks=NBLOCKS)
    )
    budget = count(monarch)
    widths = range(setting.heads, setting.width + 1, setting.heads)
    narrow = min(widths, key=lambda w: abs(dense_count(w, setting) - budget))
    return {
        DENSE: functools.partial(make, linear=nnx.Linear),
        MONARCH: monarch,
        LOW_RANK: functools.partial(make, linear=LowRankLinear),
        NARROW: functools.partial(gpt, setting, linear=nnx.Linear, width=narrow),
    }


def count(build: Callable[..., GPT]) -> int:
    """Counts the parameters of a model without making them."""
    shapes = nnx.eval_shape(lambda: build(rngs=nnx.Rngs(0)))
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(shapes, nnx.Param)))


def flops(params: dict[str, Any]) -> int:
    """Counts operations of a character, forward: two for each weight of a matrix.

    The embedding counts once, as the head; attention's own products, which have no
    parameters, do not count.
    """
    rest = {name: leaf for name, leaf in params.items() if name != "positions"}
    return sum(2 * leaf.size for leaf in jax.tree.leaves(rest) if leaf.ndim > 1)


def optimizer(rate: float, steps: int) -> optax.GradientTransformation:
    """Makes clipping, Adam and the schedule; rate and length lie in its state.

    So runs of another rate or length need no other compiled step.
    """

    def make(rate, steps):
        def schedule(step):
            warm_up = jnp.maximum(1.0, WARM_UP * steps)
            share = jnp.clip((step - warm_up) / (steps - warm_up), 0.0, 1.0)
            cosine = FLOOR + (1 - FLOOR) * 0.5 * (1 + jnp.cos(jnp.pi * share))
            return rate * jnp.minimum((step + 1) / warm_up, cosine)

        return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))

    return optax.inject_hyperparams(make)(rate=float(rate), steps=float(steps))


class Text:
    """Batches of the training text, and windows of the others."""

    def __init__(self, setting: Setting):
        data = load("stdlib_text")
        self.setting = setting
        self.head = {"name": data.name, "digest": data.digest}
        cut = lambda array: np.asarray(array[:, : setting.context], np.int32)
        self.train = tuple(map(cut, data.splits["train"]))
        self.held_out = {}
        for split in ("validation", "test"):
            inputs, targets = data.splits[split]
            # Evenly spread: neighbours come from one file.
            rows = np.linspace(0, len(inputs) - 1, setting.held_out).astype(int)
            self.held_out[split] = cut(inputs[rows]), cut(targets[rows])

    def batch(self, stream: Sequence[int], step: int) -> tuple[np.ndarray, ...]:
        """Draws the batch of a step, the same for every method."""
        rng = np.random.default_rng([*stream, step])
        rows = rng.integers(len(self.train[0]), size=self.setting.batch_size)
        return tuple(array[rows] for array in self.train)


class Trainer:
    """One model's compiled step, for runs from any parameters.

    ``make(rate, steps)`` gives the optimizer, with both numbers in its state.
    """

    def __init__(
        self,
        build: Callable[..., GPT],
        text: Text,
        make: Callable[[float, int], optax.GradientTransformation] = optimizer,
    ):
        self.build, self.text, self.make = build, text, make
        model = nnx.eval_shape(lambda: build(rngs=nnx.Rngs(0)))
        self.objective, params, _ = from_nnx(model, Categorical())
        self.step = make_train_step(self.objective, make(1.0, 1))
        self.parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
        self.flops = flops(params)
        init = lambda key: from_nnx(build(rngs=nnx.Rngs(key)), Categorical()).params
        # It runs once a seed: compiling it well takes longer than it ever runs.
        quick = {"xla_backend_optimization_level": 0}
        self._init = jax.jit(init, compiler_options=quick)

    def fresh(self, seed: int) -> dict[str, Any]:
        """Makes random parameters."""
        return self._init(jax.random.key(seed))

    def start(self, params: dict[str, Any], rate: float, steps: int) -> TrainState:
        """Makes the state of step 0 of a run of some length."""
        return create_state(jax.random.key(0), params, self.make(rate, steps))

    def go_on(
        self, state: TrainState, stream: Sequence[int], until: int
    ) -> tuple[TrainState, float]:
        """Trains up to a step; gives the state and the seconds it took.

        The buffers of ``state`` are used up. Numbers that are not finite pass through.
        """
        begin = time.perf_counter()
        for step in range(int(state.step), until):
            state, _ = self.step(state, self.text.batch(stream, step))
        jax.block_until_ready(state.params)
        return state, time.perf_counter() - begin

    def outcome(
        self,
        state: TrainState,
        stream: Sequence[int],
        until: int,
        *,
        before: float = 0.0,
    ) -> "Outcome":
        """Trains up to a step and evaluates; ``before`` are seconds spent before."""
        state, seconds = self.go_on(state, stream, until)
        losses = (self.loss(state.params, split) for split in ("validation", "test"))
        return Outcome(*losses, seconds + before, state.params)

    def loss(self, params: dict[str, Any], split: str) -> float:
        """Measures the loss on held-out text; ``DIVERGED`` if it is not finite."""
        data = self.text.held_out[split]
        size = min(32, len(data[0]))
        loss = evaluate(self.objective, params, (), data, batch_size=size, metrics={})
        return finite(loss["loss"])

    def stepper(self) -> Callable[[], Any]:
        """Makes a function that runs one training step, to be timed."""
        state = self.start(self.fresh(0), 1e-3, 1_000)
        batch = self.text.batch((0,), 0)

        def call() -> Any:
            nonlocal state  # each step takes the buffers of the one before
            state, metrics = self.step(state, batch)
            return state.params, metrics

        return call


class Outcome(NamedTuple):
    """What a run gave."""

    validation: float
    test: float
    seconds: float  # of training
    params: dict[str, Any]


def sweep(
    one: Callable[[int, float], Outcome], setting: Setting, tick: Callable[[str], None]
) -> tuple[dict[str, Any], dict[tuple[int, float], Outcome]]:
    """Tunes the rate on some seeds, runs the best on others.

    Args:
      one: ``one(seed, rate)`` runs once.
      setting: names seeds and rates.
      tick: called after every run.

    Returns:
      ``{"tuning": {rate: validation losses}, "validation": [...], "test": [...],
      "seconds": [...]}`` of the record's samples, and every run by seed and rate.
    """
    runs = {}

    def run(seed: int, rate: float) -> Outcome:
        runs[seed, rate] = found = one(seed, rate)
        tick(f"rate {rate:g}, seed {seed}: validation loss {found.validation:.3f}")
        return found

    tuning = {
        f"{rate:g}": [run(seed, rate).validation for seed in setting.tuning]
        for rate in setting.learning_rates
    }
    rate = float(chosen_rate(tuning))
    judged = [run(seed, rate) for seed in setting.judged]
    return {
        "tuning": tuning,
        "validation": [found.validation for found in judged],
        "test": [found.test for found in judged],
        "seconds": [found.seconds for found in judged],
    }, runs


def runs_of(setting: Setting) -> int:
    """Counts the runs of one sweep."""
    return len(setting.learning_rates) * setting.tuning_seeds + setting.seeds


def record(
    case: dict[str, str],
    samples: dict[str, Any],
    text: Text,
    **more: Any,
) -> dict[str, Any]:
    """Makes what a member yields."""
    setting = text.setting
    return {
        "case": case,
        "data": text.head,
        "dtype": "float32",
        "shapes": {
            "batch": [setting.batch_size, setting.context],
            **{split: list(text.held_out[split][0].shape) for split in text.held_out},
        },
        "seed": setting.judged,
        "setting": dataclasses.asdict(setting),
        "samples": samples,
        **more,
    }


def step_seconds(
    trainers: Mapping[str, Trainer], *, rounds: int
) -> dict[str, list[float]]:
    """Times a training step of every model, in alternation; dense twice."""
    calls = {name: trainer.stepper() for name, trainer in trainers.items()}
    return timing.measure(calls, baseline=DENSE, rounds=rounds).samples


def setting_note(records: Sequence[Record]) -> str:
    """Says what was trained on how much text, and how the rates were tuned."""
    setting = records[0]["setting"]
    tokens = setting["steps"] * setting["batch_size"] * setting["context"]
    edge, tried = [], set()
    for record in records:
        tuning = record["samples"]["tuning"]
        tried.add(", ".join(tuning))
        if chosen_rate(tuning) in (min(tuning, key=float), max(tuning, key=float)):
            edge.append(" ".join(record["case"].values()))
    at_edge = f" At an end of this grid: {'; '.join(edge)}." if edge else ""
    return (
        f"GPT of width {setting['width']} and {setting['layers']} layers on "
        f"stdlib_text, {setting['steps']} steps of {setting['batch_size']} x "
        f"{setting['context']} characters ({tokens:,} in all) where no other number "
        "stands: longer training is not shown. Adam, clipping at norm 1, warm-up over "
        f"{WARM_UP:.0%} of the steps, cosine to {FLOOR:.0%} of the peak. Peaks tried "
        f"for each row: {' or '.join(sorted(tried))}, chosen on "
        f"{setting['tuning_seeds']} other seed(s) by validation.{at_edge} Test "
        f"loss in nats per character on {setting['held_out']} windows, mean ± "
        f"standard deviation of {setting['seeds']} seeds; differences are paired by "
        "seed, with 95 % intervals."
    )
