"""Stacks of optax transformations, run for five steps, and what to expect of them.

A *rule* is a transformation of the suite or one of optax's. Two rules form a stack,
the first in front; where neither makes steps, ``optax.sgd`` stands behind them. A stack
runs through ``make_train_step`` on a small problem and ends in one of three ways:

- it *runs*: everything is finite, the step was traced once, the parameters moved, and
  from a state written to NumPy arrays and read back the next step is equal bit for bit;
- it is *refused*: a ``ValueError`` that begins with the name of one of our rules;
- it *fails* in any other way.

Running is not yet right: :func:`meaning` says, from what the rules do to gradients,
whether a stack ought to run, and what it computes.
"""

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jaxlab import optimizers, sharpness
from jaxlab.datasets import load
from jaxlab.layers import MonarchLinear
from jaxlab.likelihoods import Categorical
from jaxlab.models import GPT, cnn, mlp_s
from jaxlab.objective import Objective
from jaxlab.training import create_state, from_nnx, make_train_step, with_extra_args

STEPS = 5
RATE = 0.05  # of the SGD behind what makes no steps

# What a rule does; the order of two rules is judged by it.
TAKES = "takes the gradient anew"
GRADIENT = "gradient to gradient"
POWER = "scales the gradient by the weights"
INVERSE = "multiplies by an inverse Fisher"
MAKES = "makes steps"
SAMPLES = "makes steps with noise"

RIGHT, OTHER, REFUSED = "right", "other", "refused"
RUNS, FAILS = "runs", "fails"


@dataclasses.dataclass(frozen=True)
class Rule:
    """A transformation with small numbers.

    Attributes:
      name: in the tables.
      make: the factory.
      kind: what it does.
      numbers: keywords that may follow a schedule.
      static: keywords that may not.
    """

    name: str
    make: Callable[..., Any]
    kind: str
    numbers: dict[str, Any] = dataclasses.field(default_factory=dict)
    static: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def ours(self) -> bool:
        return self.make.__module__.startswith("jaxlab.")

    @property
    def steps(self) -> bool:
        return self.kind in (MAKES, SAMPLES)

    @property
    def fishleg(self) -> bool:
        return self.make in (optimizers.fishleg, optimizers.scale_by_fishleg)

    def build(self) -> optax.GradientTransformationExtraArgs:
        return with_extra_args(self.make(**self.numbers, **self.static))

    def injected(self, *, scheduled: bool) -> optax.GradientTransformationExtraArgs:
        """Builds it by ``inject_hyperparams``, its numbers as they are or falling."""
        room = sharpness if "sharpness" in self.make.__module__ else optimizers
        names = tuple(room.static_args(self.make)) if self.ours else tuple(self.static)
        fall = lambda n: optax.linear_schedule(n, 0.9 * n, STEPS)
        numbers = {n: fall(v) if scheduled else v for n, v in self.numbers.items()}
        factory = optax.inject_hyperparams(self.make, static_args=names)
        return with_extra_args(factory(**numbers, **self.static))


_FISHLEG = {"pre_aux_steps": 2}
_CHAIN = {"step_size": 1e-4, "temperature": 1e-4, "prior_precision": 1.0}

OURS = (
    Rule(
        "gradient_norm_penalty",
        sharpness.gradient_norm_penalty,
        TAKES,
        {"alpha": 0.8, "radius": 0.05},
    ),
    Rule("sam", sharpness.sam, TAKES, {"rho": 0.05}),
    Rule("asam", sharpness.asam, TAKES, {"rho": 0.5}),
    Rule(
        "look_sam",
        sharpness.look_sam,
        TAKES,
        {"rho": 0.05, "strength": 0.7},
        {"every": 2},
    ),
    Rule(
        "periodic",
        sharpness.periodic,
        TAKES,
        {},
        {"transformation": sharpness.sam(0.05), "every": 2},
    ),
    Rule(
        "hybrid",
        sharpness.hybrid,
        TAKES,
        {"probability": 0.5},
        {"transformation": sharpness.sam(0.05)},
    ),
    Rule(
        "annealed_gradient_noise",
        optimizers.annealed_gradient_noise,
        GRADIENT,
        {"eta": 1e-8, "gamma": 0.55},
    ),
    Rule("running_median", optimizers.running_median, GRADIENT, {}, {"window": 3}),
    Rule("scale_by_power", optimizers.scale_by_power, POWER, {"alpha": 1.2}),
    Rule(
        "scale_by_fishleg",
        optimizers.scale_by_fishleg,
        INVERSE,
        {"damping": 0.3, "aux_step": 0.2},
        _FISHLEG,
    ),
    Rule(
        "fishleg",
        optimizers.fishleg,
        MAKES,
        {"learning_rate": 0.5, "damping": 0.3, "momentum": 0.5, "weight_decay": 0.01},
        _FISHLEG,
    ),
    Rule("sgld", optimizers.sgld, SAMPLES, _CHAIN, {"num_data": 1000}),
    Rule("psgld", optimizers.psgld, SAMPLES, _CHAIN, {"num_data": 1000, "eps": 0.1}),
)
OPTAX = (
    Rule("optax.adamw", optax.adamw, MAKES, {"learning_rate": 1e-3}),
    Rule("optax.contrib.muon", optax.contrib.muon, MAKES, {"learning_rate": 1e-3}),
    Rule("optax.sgd", optax.sgd, MAKES, {"learning_rate": RATE, "momentum": 0.9}),
    Rule(
        "optax.clip_by_global_norm",
        optax.clip_by_global_norm,
        GRADIENT,
        {"max_norm": 0.5},
    ),
    Rule(
        "optax.scale_by_schedule",
        optax.scale_by_schedule,
        GRADIENT,
        {},
        {"step_size_fn": optax.linear_schedule(1.0, 0.5, STEPS)},
    ),
)
RULES = {rule.name: rule for rule in (*OURS, *OPTAX)}
CLIP, SCHEDULE = "optax.clip_by_global_norm", "optax.scale_by_schedule"
NOISE = "annealed_gradient_noise"


def closed(*links: Any) -> optax.GradientTransformationExtraArgs:
    """Chains links that make no steps, with SGD behind them."""
    return optax.chain(*links, optax.sgd(RATE))


def pair(first: Rule, second: Rule) -> optax.GradientTransformationExtraArgs:
    """Chains two rules."""
    links = first.build(), second.build()
    return optax.chain(*links) if first.steps or second.steps else closed(*links)


def _ended(rule: Rule, link: Any) -> optax.GradientTransformationExtraArgs:
    return with_extra_args(link) if rule.steps else closed(link)


def _matrices(params: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.ndim(leaf) >= 2, params)


def _others(params: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.ndim(leaf) < 2, params)


def _masked(rule: Rule) -> optax.GradientTransformationExtraArgs:
    """Applies a rule to matrices; what is masked away descends the plain gradient."""
    link = optax.masked(rule.build(), _matrices)
    if not rule.steps:
        return closed(link)
    return optax.chain(link, optax.masked(optax.sgd(RATE), _others))


def _outside(rule: Rule) -> optax.GradientTransformationExtraArgs:
    behind = with_extra_args(optax.MultiSteps(optax.sgd(RATE), 2))
    return optax.chain(rule.build(), behind)


ALONE, INSIDE, OUTSIDE = "alone", "inside MultiSteps", "in front of MultiSteps"
INJECTED, SCHEDULED = "inject_hyperparams", "scheduled"
MASKED, CLIPPED = "masked", "behind clipping"
WRAPPERS: dict[str, Callable[[Rule], optax.GradientTransformationExtraArgs]] = {
    ALONE: lambda rule: _ended(rule, rule.build()),
    INSIDE: lambda rule: with_extra_args(
        optax.MultiSteps(_ended(rule, rule.build()), 2)
    ),
    OUTSIDE: _outside,
    INJECTED: lambda rule: _ended(rule, rule.injected(scheduled=False)),
    SCHEDULED: lambda rule: _ended(rule, rule.injected(scheduled=True)),
    MASKED: _masked,
    CLIPPED: lambda rule: _ended(
        rule, optax.chain(optax.clip_by_global_norm(0.5), rule.build())
    ),
}


def wrappers_of(rule: Rule) -> list[str]:
    """Lists the wrappers that make sense: steps are not accumulated once more."""
    left_out = {OUTSIDE} if rule.steps else set()
    if not rule.numbers:
        left_out |= {INJECTED, SCHEDULED}
    return [name for name in WRAPPERS if name not in left_out]


class Meaning(NamedTuple):
    word: str  # right, other, refused
    why: str


_RIGHT = Meaning(RIGHT, "each rule sees what it is made for")
_TAKEN = Meaning(
    REFUSED, "the second gradient belongs to the plain one, which has been changed"
)


def meaning(first: Rule, second: Rule) -> Meaning:
    """Judges two rules in this order.

    *right*: each sees what it is made for. *other*: it computes something well defined
    that is not what the names suggest. *refused*: no use of it is right, so that it
    must raise.
    """
    if first.kind == SAMPLES:
        return Meaning(REFUSED, "what stands behind Langevin steps changes their law")
    if second.kind == TAKES:
        return _TAKEN
    if first.kind == MAKES:
        return _behind_steps(second)
    if second.kind == SAMPLES:
        return _in_front_of_samples(first)
    if first.kind == INVERSE:
        if second.fishleg:
            return Meaning(REFUSED, "two inverses: the square of one is no step")
        if second.name in (CLIP, SCHEDULE, "optax.sgd"):
            return _RIGHT
        return Meaning(OTHER, "FishLeg's step is changed after its length was chosen")
    if first.kind == POWER:
        if second.fishleg:
            return Meaning(
                REFUSED, "FishLeg's model takes a scaled gradient for the true"
            )
        if second.name == "optax.adamw":
            return Meaning(OTHER, "Adam divides a lasting factor of its input away")
        if second.kind == POWER:
            return Meaning(OTHER, "two powers multiply; they are no power of one alpha")
    if first.name == second.name == NOISE:
        return Meaning(REFUSED, "both draw the same numbers from the step's one key")
    if first.name == SCHEDULE and second.name in ("optax.adamw", "optax.contrib.muon"):
        return Meaning(OTHER, "the optimizer divides the scale of its input away")
    return _RIGHT


def _behind_steps(second: Rule) -> Meaning:
    if second.steps:
        return Meaning(
            REFUSED, "two optimizers: the sign turns twice, and the loss rises"
        )
    if second.fishleg:
        return Meaning(REFUSED, "FishLeg's model takes a step for the gradient")
    if second.name in (CLIP, SCHEDULE):
        return _RIGHT
    return Meaning(OTHER, "it acts on the step, in the units of the parameters")


def _in_front_of_samples(first: Rule) -> Meaning:
    if first.kind in (POWER, INVERSE):
        return Meaning(REFUSED, "the drift is scaled, and the noise is not")
    if first.kind == TAKES:
        return Meaning(OTHER, "it samples the posterior of the penalised loss")
    if first.name == NOISE:
        return Meaning(OTHER, "its noise comes on top: the chain is hotter")
    if first.name == SCHEDULE:
        return Meaning(OTHER, "it weighs the data against the prior and the noise")
    return Meaning(OTHER, "its gradient is biased: another law is sampled")


def wrapped_meaning(rule: Rule, wrapper: str) -> Meaning:
    """Judges a rule in a wrapper."""
    if rule.kind == TAKES and wrapper in (INSIDE, CLIPPED):
        return _TAKEN
    if rule.kind == SAMPLES and wrapper == CLIPPED:
        return _in_front_of_samples(RULES[CLIP])
    return _RIGHT


MLP, CONVOLUTIONS, TEXT = "MLP-S", "CNN", "GPT"
DENSE, MONARCH = "dense", "Monarch"
LINEAR: dict[str, Any] = {
    DENSE: nnx.Linear,
    MONARCH: functools.partial(MonarchLinear, nblocks=4),
}
NETS: dict[str, Any] = {
    MLP: mlp_s,
    CONVOLUTIONS: cnn,
    TEXT: functools.partial(
        GPT, vocabulary=98, context=16, width=128, layers=2, heads=4
    ),
}
PROBLEMS = tuple(f"{layer} {net}" for net in NETS for layer in LINEAR)
ROWS = {MLP: 32, CONVOLUTIONS: 16, TEXT: 2}


class Problem(NamedTuple):
    """A net and its batches, one for each step and one for after the restoration."""

    objective: Objective
    params: Any
    model_state: Any
    batches: list[tuple[Any, ...]]


@functools.cache
def problem(name: str) -> Problem:
    """Builds one of the six problems."""
    layer, net = name.split(" ")
    model = NETS[net](linear=LINEAR[layer], rngs=nnx.Rngs(0))
    objective, params, rest = from_nnx(model, Categorical())
    x, y = (part[: 8 * ROWS[net]] for part in _data(net).splits["train"])
    if net == TEXT:
        x, y = (np.asarray(part[:, :16], np.int32) for part in (x, y))
    cut = lambda part, i: jnp.asarray(part[i * ROWS[net] : (i + 1) * ROWS[net]])
    batches = [(cut(x, i), cut(y, i)) for i in range(STEPS + 1)]
    return Problem(objective, params, rest, batches)


def _data(net: str):
    return load("stdlib_text" if net == TEXT else "digits")


def data_of(name: str) -> dict[str, str]:
    """Names the data of a problem, with their digest."""
    found = _data(name.split(" ")[1])
    return {"name": found.name, "digest": found.digest}


class Outcome(NamedTuple):
    """How a stack ended.

    Attributes:
      word: "runs", "refused" or "fails".
      detail: the message, or what failed.
      slope: of a stack that runs, the mean cosine between moves and gradients, below 0
        where it descends; of others 0.
    """

    word: str
    detail: str = ""
    slope: float = 0.0


def outcome(make: Callable[[], Any], on: Problem) -> Outcome:
    """Runs a stack for five steps, restores its state and compares the sixth.

    Args:
      make: builds the stack; what it raises counts too.
      on: the problem.

    Returns:
      The outcome.
    """
    try:
        return _run(make(), on)
    except ValueError as error:
        message = " ".join(str(error).split())
        named = re.match(r"[A-Za-z_.]+", message)
        if named and named[0] in NAMES:
            return Outcome(REFUSED, message)
        return Outcome(FAILS, f"ValueError: {message}"[:300])
    except (AttributeError, LookupError, RuntimeError, TypeError) as error:
        message = " ".join(str(error).split())
        return Outcome(FAILS, f"{type(error).__name__}: {message}"[:300])


# A refusal begins with one of these.
NAMES = {rule.make.__name__ for rule in OURS} | {"make_train_step", "create_state"}


def _run(optimizer: Any, on: Problem) -> Outcome:
    once = make_train_step(on.objective, optimizer, jit=False)
    traces = []

    def counted(state, batch):
        traces.append(1)
        return once(state, batch)

    step = jax.jit(counted, donate_argnums=(0,))
    begin = lambda: create_state(
        jax.random.key(0), on.params, optimizer, model_state=on.model_state
    )
    state, slopes = begin(), []
    start = jax.tree.map(np.array, on.params)
    for batch in on.batches[:STEPS]:
        before = jax.tree.map(np.array, state.params)
        slope = _gradient(on.objective)(state.params, state.model_state, batch)
        state, metrics = step(state, batch)
        if not np.isfinite(metrics["loss"]) or not _finite((state.params, state)):
            return Outcome(FAILS, "not finite")
        slopes.append(_cosine(before, state.params, slope))
    if len(traces) > 1:
        return Outcome(FAILS, f"traced {len(traces)} times")
    if _equal(start, state.params):
        return Outcome(FAILS, "no parameter moved")
    saved = [_as_numpy(leaf) for leaf in jax.tree.leaves(state)]
    like = jax.eval_shape(begin)
    if jax.tree.structure(like) != jax.tree.structure(state):
        return Outcome(FAILS, "the state is another tree than at first")
    pairs = zip(saved, jax.tree.leaves(like), strict=True)
    restored = jax.tree.unflatten(
        jax.tree.structure(like), [_from_numpy(*pair) for pair in pairs]
    )
    one, _ = step(state, on.batches[STEPS])
    two, _ = step(restored, on.batches[STEPS])
    if not _equal(one, two):
        return Outcome(FAILS, "the step from the restored state differs")
    if len(traces) > 1:
        return Outcome(FAILS, "traced again from the restored state")
    moves = [slope for slope in slopes if slope is not None]
    return Outcome(RUNS, "", float(np.mean(moves)))


@functools.cache
def _gradient(objective: Objective) -> Callable[..., Any]:
    return jax.jit(jax.grad(lambda p, s, batch: objective.loss(p, s, batch)[0]))


def _as_numpy(leaf: Any) -> np.ndarray:
    """Copies a leaf; of a key its numbers."""
    key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.array(jax.random.key_data(leaf) if key else leaf)


def _from_numpy(saved: np.ndarray, like: Any) -> jax.Array:
    if jnp.issubdtype(like.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(jnp.asarray(saved))
    if (saved.shape, saved.dtype) != (like.shape, like.dtype):
        raise ValueError(
            f"a leaf of the state was {like.dtype}{like.shape} and is now "
            f"{saved.dtype}{saved.shape}."
        )
    return jnp.asarray(saved)


def _finite(tree: Any) -> bool:
    leaves = map(_as_numpy, jax.tree.leaves(tree))
    return all(np.isfinite(x).all() for x in leaves if x.dtype.kind == "f")


def _equal(one: Any, two: Any) -> bool:
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True)
    return all(np.array_equal(_as_numpy(a), _as_numpy(b)) for a, b in pairs)


def _cosine(before: Any, after: Any, slope: Any) -> float | None:
    """Gives the cosine between a move and a gradient; ``None`` where nothing moved."""
    flat = lambda tree: np.concatenate(
        [np.ravel(np.asarray(leaf, np.float64)) for leaf in jax.tree.leaves(tree)]
    )
    move, gradient = flat(after) - flat(before), flat(slope)
    size = np.linalg.norm(move) * np.linalg.norm(gradient)
    return float(move @ gradient / size) if size else None
