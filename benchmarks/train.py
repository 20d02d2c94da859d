"""The training run of a user: a GPT on text, from the command line, to be resumed.

``python -m benchmarks train --config NAME`` takes a named run of ``PRESETS`` or a JSON
file with fields of :class:`Config`; every field can be given on the command line too,
which wins. This file imports neither JAX nor NumPy: what is wrong with a command is
said at once.
"""

import dataclasses
import json
import pathlib
import shlex
import sys
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import tyro

from benchmarks.environment import ROOT

FOLDER = ROOT / "out" / "train"
FILE = "config.json"

Model = Literal["gpt-xs", "gpt-s", "gpt-m"]
Linear = Literal["dense", "monarch"]
Optimizer = Literal["adamw", "muon", "fishleg", "gnp-adamw"]

# Width, layers, heads and context; GPT-S and GPT-M are those of jaxlab.models.
SIZES: dict[str, dict[str, int]] = {
    "gpt-xs": {"width": 64, "layers": 2, "heads": 4, "context": 64},
    "gpt-s": {"width": 128, "layers": 4, "heads": 4, "context": 128},
    "gpt-m": {"width": 512, "layers": 8, "heads": 8, "context": 512},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that decides a run."""

    model: Model = "gpt-s"
    """Width, layers, heads, context: gpt-xs 64, 2, 4, 64; gpt-s 128, 4, 4, 128; gpt-m
    512, 8, 8, 512."""
    linear: Linear = "dense"
    """Kind of the linear layers in the blocks."""
    nblocks: int = 4
    """Blocks of a Monarch factor."""
    optimizer: Optimizer = "adamw"
    """gnp-adamw is AdamW on the gradient with its norm penalised."""
    learning_rate: float = 2e-3
    """Peak of the schedule; of fishleg a factor on its own step, 1 for that step."""
    weight_decay: float = 0.01
    """Decoupled; of fishleg part of the loss."""
    clip: float = 1.0
    """Largest norm of the gradient, not for fishleg; 0 for none."""
    damping: float = 0.3
    """Of fishleg."""
    alpha: float = 0.8
    """Of gnp-adamw: share of the gradient at the perturbed point."""
    radius: float = 0.05
    """Of gnp-adamw: length of the perturbation. In bfloat16 the model rounds it."""
    warm_up: float = 0.1
    """Share of the steps in which the rate rises linearly."""
    floor: float = 0.1
    """Share of the peak at which the cosine ends."""
    batch_size: int = 16
    """Windows of a step, over all devices."""
    steps: int = 1_000
    """Length of training."""
    tokens: int | None = None
    """Length in tokens, in place of steps; rounded up to whole intervals."""
    seed: int = 0
    """Of the start and of the order of the text."""
    data: str = "stdlib_text"
    """stdlib_text, or the name of a TensorFlow data set with a text feature."""
    held_out: int = 128
    """Windows of the validation text that are evaluated, evenly spread."""
    evaluate_every: int = 100
    """Steps of an interval: metrics and validation loss come at its end."""
    sharpness_every: int = 500
    """Steps between top eigenvalues of the Hessian, whole intervals; 0 for none."""
    sharpness_rows: int = 8
    """Windows of the validation text on which that Hessian is taken, the first ones."""
    checkpoint_every: int = 500
    """Steps between checkpoints, whole intervals; the end has one."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the model's computation; parameters, loss and sharpness are in float32."""
    devices: int = 1
    """Devices over which the windows of a step are cut; all hold the parameters."""
    directory: pathlib.Path = FOLDER / "run"
    """Of this run: config.json, metrics.jsonl, checkpoints, run.json."""

    def __post_init__(self):
        hints = typing.get_type_hints(Config)
        for field in dataclasses.fields(self):
            _check(field.name, getattr(self, field.name), hints[field.name])
        for name in ("sharpness_every", "seed", "weight_decay", "clip", "radius"):
            _demand(getattr(self, name) >= 0, name, ">= 0", getattr(self, name))
        for name in _POSITIVE:
            _demand(getattr(self, name) > 0, name, "> 0", getattr(self, name))
        for name in ("warm_up", "floor"):
            value = getattr(self, name)
            _demand(0 <= value <= 1, name, "in [0, 1]", value)
        _demand(self.tokens is None or self.tokens > 0, "tokens", "> 0", self.tokens)
        for name in ("steps", "sharpness_every", "checkpoint_every"):
            value = getattr(self, name)
            _demand(
                value % self.evaluate_every == 0,
                name,
                f"a multiple of evaluate_every={self.evaluate_every}",
                value,
            )
        _demand(
            self.batch_size % self.devices == 0,
            "batch_size",
            f"a multiple of devices={self.devices}",
            self.batch_size,
        )

    @property
    def context(self) -> int:
        return SIZES[self.model]["context"]

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.context

    @property
    def length(self) -> int:
        """Steps of the run."""
        if self.tokens is None:
            return self.steps
        interval = self.evaluate_every * self.tokens_per_step
        return -(-self.tokens // interval) * self.evaluate_every

    def as_json(self) -> dict[str, Any]:
        """Gives the fields, all but the directory, which may be moved."""
        fields = dataclasses.asdict(self)
        del fields["directory"]
        return fields


_POSITIVE = (
    *("nblocks", "learning_rate", "damping", "batch_size", "steps", "held_out"),
    *("evaluate_every", "sharpness_rows", "checkpoint_every", "devices"),
)


def _check(name: str, value: Any, hint: Any) -> None:
    """Checks one value against its annotation, and names what there is."""
    choices = typing.get_args(hint) if typing.get_origin(hint) is Literal else ()
    if choices:
        _demand(value in choices, name, f"one of {', '.join(choices)}", value)
    elif hint is float:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        _demand(number, name, "a number", value)
    elif hint in (int, int | None):
        whole = isinstance(value, int) and not isinstance(value, bool)
        allowed = whole or (value is None and hint is not int)
        _demand(allowed, name, "a whole number", value)
    else:
        _demand(isinstance(value, hint), name, f"a {hint.__name__}", value)


def _demand(holds: bool, name: str, needed: str, value: Any) -> None:
    if not holds:
        raise ValueError(f"{name} must be {needed}, got {value!r}.")


# What differs from the defaults, by model and by optimizer. The rates of gpt-m are
# guesses from the smaller ones.
_BY_MODEL: dict[str, dict[str, Any]] = {
    "gpt-xs": {"batch_size": 8, "steps": 500, "learning_rate": 4e-3},
    "gpt-s": {},
    "gpt-m": {"batch_size": 32, "steps": 2_000, "learning_rate": 6e-4},
}
_BY_OPTIMIZER: dict[str, dict[str, Any]] = {
    "adamw": {},
    "muon": {},
    "fishleg": {"learning_rate": 1.0, "weight_decay": 0.0},
    "gnp-adamw": {},
}


def _preset(model: Model, linear: Linear, optimizer: Optimizer) -> Config:
    name = f"{model}-{linear}-{optimizer}"
    numbers = _BY_MODEL[model] | _BY_OPTIMIZER[optimizer]
    return Config(
        model=model,
        linear=linear,
        optimizer=optimizer,
        directory=FOLDER / name,
        **numbers,
    )


PRESETS: dict[str, Config] = {
    f"{model}-{linear}-{optimizer}": _preset(model, linear, optimizer)
    for model in typing.get_args(Model)
    for linear in typing.get_args(Linear)
    for optimizer in typing.get_args(Optimizer)
}
FIRST = "gpt-s-dense-adamw"
FIELDS = tuple(field.name for field in dataclasses.fields(Config))


def from_fields(fields: Any, *, where: str, **defaults: Any) -> Config:
    """Makes a config from what a JSON file holds.

    Args:
      fields: names and values.
      where: they were read.
      **defaults: of fields that are not among them.

    Raises:
      ValueError: if it is no object, or a field or a value is unknown.

    Examples:
      >>> from_fields({"steps": 200}, where="here").steps
      200
    """
    if not isinstance(fields, Mapping):
        raise ValueError(f"{where} must hold one JSON object with fields of a run.")
    unknown = sorted(set(fields) - set(FIELDS))
    if unknown:
        raise ValueError(
            f"{where}: {', '.join(unknown)}: no such field; there are "
            f"{', '.join(FIELDS)}."
        )
    fields = defaults | dict(fields)
    if isinstance(fields.get("directory"), str):
        fields["directory"] = pathlib.Path(fields["directory"])
    return Config(**fields)


def named(config: str) -> Config:
    """Gives a preset, or reads a JSON file.

    Raises:
      ValueError: if there is neither, or the file is damaged.
    """
    if config in PRESETS:
        return PRESETS[config]
    path = pathlib.Path(config)
    if not path.is_file():
        raise ValueError(
            f"--config must be a JSON file or one of {', '.join(PRESETS)}; got "
            f"{config!r}."
        )
    try:
        fields = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path.name} is not JSON: {error}.") from error
    return from_fields(fields, where=path.name, directory=FOLDER / path.stem)


def parse(arguments: Sequence[str]) -> Config:
    """Reads the command line behind ``train``.

    Raises:
      ValueError: if a field or a value is unknown; says what there is.
      SystemExit: of tyro, for ``--help`` and values of the wrong type.

    Examples:
      >>> parse(["--config", "gpt-xs-dense-muon", "--steps", "100"]).steps
      100
    """
    rest, config = [], FIRST
    words = iter(arguments)
    for word in words:
        if word == "--config":
            config = next(words, "")
        elif word.startswith("--config="):
            config = word.partition("=")[2]
        else:
            rest.append(word)
    for word in rest:
        name = word.partition("=")[0]
        field = name[2:].replace("-", "_")
        if word.startswith("--") and field not in (*FIELDS, "help"):
            options = ", ".join(f"--{field.replace('_', '-')}" for field in FIELDS)
            raise ValueError(f"{name}: no such field; there are --config, {options}.")
    return tyro.cli(
        Config,
        prog="python -m benchmarks train",
        description=(
            "Trains a GPT on text; run the same command again to go on. --config NAME "
            f"takes a JSON file with the fields below, or one of {', '.join(PRESETS)}. "
            f"Defaults below: {config}."
        ),
        args=rest,
        default=named(config),
    )


def main(arguments: Sequence[str]) -> int:
    """Runs ``train`` and returns its exit status."""
    try:
        config = parse(arguments)
        from benchmarks import training_runs

        job = training_runs.prepare(config)
    except (ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    command = shlex.join(["python", "-m", "benchmarks", "train", *arguments])
    try:
        print(training_runs.run(job, command=command).line)
    except FloatingPointError as error:
        print(f"error: {error} Try a lower --learning-rate.", file=sys.stderr)
        return 1
    return 0
