"""Runs what ``benchmarks.train`` has read.

``metrics.jsonl`` of a run gets a line at the end of every interval: the mean training
loss, the validation loss, tokens and seconds so far, and where it is due the sharpness
(the top eigenvalue of the Hessian on fixed validation text). Seconds are those of
training steps: what is spent on validation, sharpness, checkpoints and on compiling the
step is left out; ``compile_seconds`` holds the latter, once for every start of the run.
"""

import contextlib
import dataclasses
import functools
import json
import pathlib
import sys
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import NamedSharding
from tqdm import tqdm

from benchmarks import environment
from benchmarks.results import write_atomically
from benchmarks.train import FILE, SIZES, Config
from jaxlab.curvature import hessian_operator, top_eigenpairs
from jaxlab.datasets import Dataset, load, names
from jaxlab.datasets.dataset import make_dataset
from jaxlab.datasets.stdlib_text import encode_text, windows
from jaxlab.layers import MonarchLinear
from jaxlab.likelihoods import Categorical
from jaxlab.models import GPT
from jaxlab.objective import Objective
from jaxlab.optimizers import fishleg
from jaxlab.sharpness import gradient_norm_penalty
from jaxlab.training import (
    EpochInfo,
    FitResult,
    batch_sharding,
    create_state,
    fit,
    from_nnx,
    make_mesh,
)
from jaxlab.training.record import MetricLines

METRICS, END = "metrics.jsonl", "run.json"
VOCABULARY = 98
MOST = 20_000_000  # characters that are read of a split of a TensorFlow data set
TOKENS, SECONDS = "tokens", "seconds"
Rows = tuple[np.ndarray, np.ndarray]


def text(name: str, *, data_dir: Any = None) -> Dataset:
    """Loads a text as windows of symbols.

    Args:
      name: "stdlib_text", or a TensorFlow data set with a text feature, whose rows
        are joined by newlines, up to ``MOST`` characters. Without a validation split
        the last tenth of the training text is held out.
      data_dir: where data sets are kept.

    Raises:
      ValueError: if the data set is none of text.
      RuntimeError: if it cannot be had; says why, and what there is without a network.
    """
    if name == "stdlib_text":
        return load(name, data_dir)
    if name in names():
        raise ValueError(
            f"data={name} is no text: take stdlib_text, or the name of a TensorFlow "
            "data set with a text feature."
        )
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
        feature = _text_feature(name, builder.info.features)
        builder.download_and_prepare()
        streams = {
            split: _read(builder.as_data_source(split=split), feature)
            for split in ("train", "validation")
            if split in builder.info.splits
        }
    except _NoText:
        raise
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        raise RuntimeError(
            f"The TensorFlow data set {name!r} cannot be had here "
            f"({type(error).__name__}: {reason}). Prepare it on a machine with a "
            "network, copy its folder to ~/tensorflow_datasets, or take "
            "data=stdlib_text, which needs none."
        ) from error
    if "validation" not in streams:
        cut = 9 * len(streams["train"]) // 10
        streams["train"], streams["validation"] = np.split(streams["train"], [cut])
    splits = {key: windows(stream, context=128) for key, stream in streams.items()}
    return make_dataset(name, f"Feature {feature!r} of {name}.", splits)


class _NoText(ValueError):
    pass


def _text_feature(name: str, features: Any) -> str:
    import tensorflow_datasets as tfds

    is_text = lambda feature: isinstance(feature, tfds.features.Text)
    found = [key for key, feature in features.items() if is_text(feature)]
    if not found:
        raise _NoText(f"data={name} has no text feature, only {', '.join(features)}.")
    return found[0]


def _read(rows: Any, feature: str) -> np.ndarray:
    parts, length = [], 0
    for row in rows:
        parts.append(encode_text(row[feature].decode("utf-8", "replace") + "\n"))
        length += len(parts[-1])
        if length >= MOST:
            break
    return np.concatenate(parts)[:MOST]


def recut(rows: Rows, context: int) -> Rows:
    """Cuts windows of any length to another one.

    Examples:
      >>> x, y = recut(windows(np.arange(13), context=4), context=6)
      >>> x.tolist(), y[0].tolist()
      ([[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]], [1, 2, 3, 4, 5, 6])
    """
    count = rows[0].size // context
    cut = lambda part: part.reshape(-1)[: count * context].reshape(count, context)
    return cut(rows[0]), cut(rows[1])


class Batches:
    """Gives the batch of a step: every window once in a pass, in an order of its own.

    It also tells how long the first step took to compile: the loop asks for the second
    batch before it and for the third when it has been compiled and sent off.
    """

    def __init__(self, rows: Rows, config: Config):
        if len(rows[0]) < config.batch_size:
            raise ValueError(
                f"batch_size must be at most the {len(rows[0])} windows of the text, "
                f"got {config.batch_size}."
            )
        self.rows, self.config, self.asked = rows, config, []
        self._order = functools.lru_cache(maxsize=2)(
            lambda number: np.random.default_rng([config.seed, number]).permutation(
                len(rows[0])
            )
        )

    def __call__(self, epoch: int, step: int) -> Rows:
        if len(self.asked) < 3:
            self.asked.append(time.perf_counter())
        size, each = self.config.batch_size, len(self.rows[0])
        first = (epoch * self.config.evaluate_every + step) * size
        places = [divmod(first + i, each) for i in range(size)]
        rows = [self._order(number)[place] for number, place in places]
        return self.rows[0][rows].astype(np.int32), self.rows[1][rows].astype(np.int32)

    def compile_seconds(self) -> float:
        """Takes the time once; 0 afterwards, and where there were too few steps."""
        found = self.asked[2] - self.asked[1] if len(self.asked) == 3 else 0.0
        self.asked = [0.0] * 3
        return found


def model(config: Config, rngs: nnx.Rngs) -> GPT:
    """Builds the GPT of a run."""
    monarch = functools.partial(MonarchLinear, nblocks=config.nblocks)
    linear = {"dense": nnx.Linear, "monarch": monarch}[config.linear]
    return GPT(vocabulary=VOCABULARY, linear=linear, rngs=rngs, **SIZES[config.model])


def schedule(config: Config) -> optax.Schedule:
    """Makes the rate: a linear rise to the peak, then a cosine to the floor."""
    warm_up = round(config.warm_up * config.length)
    rest = max(1, config.length - warm_up)
    cosine = optax.cosine_decay_schedule(config.learning_rate, rest, alpha=config.floor)
    if not warm_up:
        return cosine
    # The first step is no step of rate zero.
    rise = lambda count: config.learning_rate * (count + 1) / (warm_up + 1)
    return optax.join_schedules([rise, cosine], [warm_up])


def _muon_axes(params: Any) -> Any:
    """Says which leaves Muon takes, Monarch's stacks of blocks too; Adam the others."""

    def axes(path, leaf):
        tables = {"embedding", "positions"}
        if tables & {getattr(entry, "key", None) for entry in path}:
            return None
        numbers = optax.contrib.MuonDimensionNumbers
        return {2: numbers(0, 1), 3: numbers(2, 1)}.get(leaf.ndim)

    return jax.tree_util.tree_map_with_path(axes, params)


def optimizer(config: Config) -> optax.GradientTransformation:
    """Makes the optimizer of a run."""
    rate, decay = schedule(config), config.weight_decay
    if config.optimizer == "fishleg":
        return fishleg(rate, damping=config.damping, weight_decay=decay)
    links = [optax.clip_by_global_norm(config.clip)] if config.clip else []
    if config.optimizer == "muon":
        # With this scale of its updates it takes the rates of AdamW.
        rule = optax.contrib.muon(
            rate,
            weight_decay=decay,
            adam_weight_decay=decay,
            muon_weight_dimension_numbers=_muon_axes,
            consistent_rms=0.2,
        )
        return optax.chain(*links, rule)
    if config.optimizer == "gnp-adamw":
        # First: it compares the gradient it is given with that of the step.
        links.insert(0, gradient_norm_penalty(config.alpha, config.radius))
    return optax.chain(*links, optax.adamw(rate, weight_decay=decay))


def computing_in(objective: Objective, dtype: str) -> Objective:
    """Casts parameters on the way into the model, and its outputs back."""
    if dtype == "float32":
        return objective
    inner = objective.apply_fn
    cast = functools.partial(optax.tree.cast, dtype=jnp.dtype(dtype))

    def apply_fn(params, state, inputs, *, key, train):
        outputs, state = inner(cast(params), state, inputs, key=key, train=train)
        return outputs.astype(jnp.float32), state

    return dataclasses.replace(objective, apply_fn=apply_fn)


class Job(NamedTuple):
    """A run that is ready to start."""

    config: Config
    head: dict[str, str]  # of the data
    batches: Batches
    validation: Rows
    sharding: NamedSharding | None


class Ended(NamedTuple):
    """What a run gave."""

    result: FitResult
    line: str  # says how it ended


def prepare(config: Config, *, data_dir: Any = None) -> Job:
    """Loads the text, looks for the devices, and claims the directory.

    Raises:
      ValueError: if there are too few devices, or the directory holds a run of another
        config or on other data; names what differs.
      RuntimeError: if the text cannot be had.
    """
    devices = jax.devices()
    if config.devices > len(devices):
        raise ValueError(
            f"devices must be at most {len(devices)}, which this process sees; got "
            f"{config.devices}."
        )
    data = text(config.data, data_dir=data_dir)
    parts = [recut(data.splits[k], config.context) for k in ("train", "validation")]
    places = np.linspace(0, len(parts[1][0]) - 1, config.held_out).astype(int)
    held_out = parts[1][0][places], parts[1][1][places]
    sharding = None
    if config.devices > 1:
        sharding = batch_sharding(make_mesh(devices=devices[: config.devices]))
    batches = Batches(parts[0], config)
    head = {"name": data.name, "digest": data.digest}
    _claim(config, head)
    as_tokens = lambda part: part.astype(np.int32)
    return Job(config, head, batches, tuple(map(as_tokens, held_out)), sharding)


def _claim(config: Config, head: dict[str, str]) -> None:
    path = config.directory / FILE
    ours = {"config": config.as_json(), "data": head}
    if path.exists():
        found = read_json(path)
        theirs = found["config"]
        differ = [
            f"{name} ({theirs.get(name)!r} there, {value!r} here)"
            for name, value in ours["config"].items()
            if theirs.get(name) != value
        ]
        if found["data"] != head:
            differ.append(
                f"the contents of the data ({found['data']['digest'][:12]} there, "
                f"{head['digest'][:12]} here)"
            )
        if differ:
            raise ValueError(
                f"{config.directory} holds a run that differs in {', '.join(differ)}: "
                "give the same to go on with it, or another --directory."
            )
        return
    where = {"device": environment.device_name(), "devices": config.devices}
    write_atomically(path, json.dumps(ours | where, indent=1).encode())


def read_json(path: pathlib.Path) -> dict[str, Any]:
    return json.loads(path.read_text())


class Reporter:
    """Writes the line of an interval, with the sharpness where it is due."""

    def __init__(self, job: Job, objective: Objective):
        self.job, self.objective = job, objective
        self._lines: MetricLines | None = None
        self._seconds = 0.0

    def sharpness(self, params: Any) -> float:
        """Finds the top eigenvalue of the Hessian on fixed validation windows.

        It is right to about the square of the tolerance.
        """
        count = self.job.config.sharpness_rows
        rows = tuple(part[:count] for part in self.job.validation)
        operator = hessian_operator(self._loss, params, rows)
        key = jax.random.key(0)
        found = top_eigenpairs(key, operator, params, k=1, tol=1e-2, max_products=100)
        return float(found.values[0])

    def _loss(self, params: Any, rows: Any) -> jax.Array:
        return self.objective.loss(params, (), rows, train=False)[0]

    def __call__(self, info: EpochInfo) -> None:
        config, found = self.job.config, info.metrics
        path = config.directory / METRICS
        if self._lines is None:
            before = info.step - config.evaluate_every
            self._lines = MetricLines(path, after_step=before)
            earlier = path.read_text().splitlines()
            self._seconds = json.loads(earlier[-1])[SECONDS] if earlier else 0.0
        rows = config.evaluate_every * config.batch_size
        taken = rows / max(found["examples_per_second"], 1e-9)
        compiling = min(self.job.batches.compile_seconds(), taken)
        taken -= compiling
        self._seconds += taken
        line = {
            "step": info.step,
            TOKENS: info.step * config.tokens_per_step,
            SECONDS: round(self._seconds, 6),
            "loss": found["loss"],
            "grad_norm": found["grad_norm"],
            "validation_loss": found["validation_loss"],
            "validation_accuracy": found["validation_accuracy"],
            "tokens_per_second": round(rows * config.context / max(taken, 1e-9), 1),
            "compile_seconds": round(compiling, 3),
            "time": found["time"],
        }
        text = (
            f"step {info.step:,}/{config.length:,}: loss {line['loss']:.4f}, "
            f"validation loss {line['validation_loss']:.4f}, "
            f"{line['tokens_per_second']:,.0f} tokens/s"
        )
        if config.sharpness_every and info.step % config.sharpness_every == 0:
            line["sharpness"] = self.sharpness(info.state.params)
            text += f", sharpness {line['sharpness']:.4g}"
        self._lines.write(line)
        tqdm.write(text, file=sys.stderr)

    @property
    def called(self) -> bool:
        return self._lines is not None

    def close(self) -> None:
        if self._lines is not None:
            self._lines.close()


def run(job: Job, *, command: str) -> Ended:
    """Trains, from the newest checkpoint if there is one, and writes ``run.json``.

    Raises:
      FloatingPointError: if the loss is not finite.
    """
    config, folder = job.config, job.config.directory
    start, key = jax.random.split(jax.random.key(config.seed))
    init = jax.jit(lambda key: from_nnx(model(config, nnx.Rngs(key)), Categorical())[1])
    plain = from_nnx(
        nnx.eval_shape(lambda: model(config, nnx.Rngs(0))), Categorical()
    ).objective
    tx = optimizer(config)
    state = create_state(key, init(start), tx)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    reporter = Reporter(job, plain)
    with contextlib.closing(reporter):
        result = fit(
            computing_in(plain, config.dtype),
            tx,
            state,
            job.batches,
            steps_per_epoch=config.evaluate_every,
            epochs=config.length // config.evaluate_every,
            batch_size=config.batch_size,  # of the validation
            validation=job.validation,
            checkpoint_dir=folder / "checkpoints",
            checkpoint_every=config.checkpoint_every // config.evaluate_every,
            callbacks=[reporter],
            data_sharding=job.sharding,
        )
    last = lines_of(folder)[-1]
    end = {
        "command": command,
        **environment.describe(),
        "config": config.as_json(),
        "data": job.head,
        "parameters": parameters,
        "end": last,
    }
    if reporter.called or not (folder / END).exists():
        write_atomically(folder / END, json.dumps(end, indent=1).encode())
    line = (
        f"{config.model} {config.linear} {config.optimizer}, {parameters:,} "
        f"parameters: validation loss {last['validation_loss']:.4f} after "
        f"{last[TOKENS]:,} tokens and {last[SECONDS]:.1f} s of training; {folder}"
    )
    return Ended(result, line)


def lines_of(folder: pathlib.Path) -> list[dict[str, Any]]:
    path = folder / METRICS
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]
