"""Do Monarch layers, FishLeg and the gradient-norm penalty add up?

All eight nets with and without each of three parts: Monarch layers (4 blocks) in place
of dense ones, FishLeg in place of AdamW, and the gradient-norm penalty (GNP) in front.
The plain one is dense, by AdamW. Two problems:

- ``digits``: MLP-S on digits with wrong labels (:mod:`benchmarks.noisy_digits`), judged
  by the accuracy on the clean test rows. The training loss is told, not judged: below
  some value it falls by learning the wrong labels;
- ``text``: a GPT of two blocks, width 64, on windows of 64 characters of
  ``stdlib_text``, judged by the loss on validation windows that tuning does not see.

Two budgets: equal ``steps``, and equal ``time``: as many steps as fit into those of the
plain run, by the times of a step measured in turns in this process, the first one and
the first hundred of FishLeg apart, since they cost more. Schedules have that length.

Every variant has two numbers to choose, from grids of the same size and for each budget
anew, on seeds that are not judged: the rate of AdamW or the damping of FishLeg; and the
strength of GNP where it is, of the weight decay where it is not, so that a penalty has
a regulariser to beat. AdamW rises for a tenth of the steps; all fall by a cosine to
zero, FishLeg from its own step. Text that diverges counts as ``WORST`` nats.

With y the gain over the plain net at the same seed, a stack is compared with what its
parts give alone: what it adds is ``y(stack) - sum of y(part)``. Main effects and
interactions are those of the full table: for parts S the mean, over the settings of the
other parts, of the sum over subsets T of S of ``(-1)^(|S| - |T|) y(T and setting)``.
"""

import dataclasses
import functools
import itertools
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from matplotlib import rc_context
from matplotlib.figure import Figure

from benchmarks import noisy_digits, plots, timing
from benchmarks.noisy_loops import at_ends, named, points
from benchmarks.paired import difference, spread
from benchmarks.results import Record
from benchmarks.tables import Table, Verdict
from jaxlab.datasets import load
from jaxlab.layers import MonarchLinear
from jaxlab.likelihoods import Categorical
from jaxlab.models import GPT, mlp_s
from jaxlab.optimizers import fishleg
from jaxlab.sharpness import gradient_norm_penalty
from jaxlab.training import create_state, from_nnx, make_train_step

CLAIM = (
    "A stack of Monarch layers and the gradient-norm penalty, by AdamW or by FishLeg, "
    "is better than each of its parts alone and than the tuned plain net, on digits "
    "with wrong labels and on stdlib_text, at equal steps and at equal wall-clock."
)

PLAIN, MONARCH, FISHLEG, PENALTY = "plain", "Monarch", "FishLeg", "GNP"
PARTS = (MONARCH, FISHLEG, PENALTY)
DIGITS, TEXT = "digits", "text"
STEPS, TIME = "steps", "time"
FIRST_TUNING_SEED = 1_000
ALPHA = 0.8  # of the penalty
NBLOCKS = 4
WORST = 10.0  # nats; a uniform guess has 4.6
DENSE = 100  # steps of FishLeg that cost more
# Steps that are timed: of FishLeg the first, the dense ones and the later ones, whose
# cadence is ten.
PHASES = {"first": (0, 1), "dense": (20, 30), "late": (110, 120)}
# What a net is judged by, and whether more of it is better.
JUDGED = {DIGITS: ("test accuracy %", 1), TEXT: ("validation loss", -1)}

Parts = frozenset[str]
Numbers = Mapping[str, Any]


def name_of(parts: Parts) -> str:
    """Names a variant.

    Examples:
      >>> name_of(frozenset({"GNP", "Monarch"})), name_of(frozenset())
      ('Monarch + GNP', 'plain')
    """
    return " + ".join(part for part in PARTS if part in parts) or PLAIN


def subsets(parts: Sequence[str]) -> list[Parts]:
    """Lists all subsets, small ones first."""
    sizes = range(len(parts) + 1)
    return [frozenset(s) for n in sizes for s in itertools.combinations(parts, n)]


VARIANTS = {name_of(parts): parts for parts in subsets(PARTS)}
STACKS = (name_of(frozenset({MONARCH, PENALTY})), name_of(frozenset(PARTS)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    problems: tuple[str, ...]
    steps: dict[str, int]
    batch: dict[str, int]
    grids: dict[str, dict[str, tuple[float, ...]]]  # by problem, see grid_of
    seeds: int
    tuning_seeds: dict[str, int]
    rounds: int  # of timing


GRIDS = {
    DIGITS: {
        "rate": (0.001, 0.003, 0.01, 0.03),
        "damping": (0.3, 1.0, 3.0, 10.0),
        "AdamW decay": (0.0, 0.1, 0.3, 1.0),
        "FishLeg decay": (0.0, 0.003, 0.01, 0.03),
        "penalty": (0.04, 0.16, 0.32, 0.64),
    },
    TEXT: {
        "rate": (0.001, 0.002, 0.004, 0.008),
        "damping": (0.03, 0.1, 0.3, 1.0),
        "AdamW decay": (0.0, 0.01, 0.1),
        "FishLeg decay": (0.0, 0.0001, 0.001),
        "penalty": (0.005, 0.02, 0.08),
    },
}
PRESETS = {
    "small": Options(
        problems=(DIGITS,),
        steps={DIGITS: 3},
        batch={DIGITS: 16},
        grids={DIGITS: {key: grid[:1] for key, grid in GRIDS[DIGITS].items()}},
        seeds=2,
        tuning_seeds={DIGITS: 1},
        rounds=1,
    ),
    "full": Options(
        problems=(DIGITS, TEXT),
        steps={DIGITS: 800, TEXT: 300},
        batch={DIGITS: 64, TEXT: 4},
        grids=GRIDS,
        seeds=5,
        tuning_seeds={DIGITS: 3, TEXT: 1},
        rounds=7,
    ),
}


def grid_of(options: Options, problem: str, parts: Parts) -> dict[str, Any]:
    """Gives the two numbers that a variant chooses, with what from."""
    grids = options.grids[problem]
    first = "damping" if FISHLEG in parts else "rate"
    decay = f"{'FishLeg' if FISHLEG in parts else 'AdamW'} decay"
    second = "penalty" if PENALTY in parts else "decay"
    return {first: grids[first], second: grids[second if second != "decay" else decay]}


class Rows(NamedTuple):
    """Inputs and targets to train on, to tune by and to judge by."""

    train: tuple[jax.Array, jax.Array]
    seen: tuple[jax.Array, jax.Array]  # of the training rows, for their loss
    tuning: tuple[jax.Array, jax.Array]
    judged: tuple[jax.Array, jax.Array]


def rows_of(problem: str, seed: int, *, context: int = 64, windows: int = 128) -> Rows:
    """Loads the rows; of digits the seed chooses the wrong labels.

    Args:
      problem: DIGITS or TEXT.
      seed: of the run.
      context: characters of a window of text.
      windows: of text, to tune by and, others, to judge by.
    """
    if problem == DIGITS:
        data = noisy_digits.splits(seed)
        return Rows(data.train, data.train, data.validation, data.test)
    splits = load("stdlib_text").splits

    def cut(split, first, stride):
        rows = splits[split]
        places = np.linspace(0, len(rows[0]) - 1, 2 * windows).astype(int)
        at = places[first::stride][:windows]
        return tuple(jnp.asarray(part[at, :context], jnp.int32) for part in rows)

    train = tuple(jnp.asarray(part[:, :context]) for part in splits["train"])
    # Every second window each, so that both see all files.
    return Rows(
        train,
        cut("train", 0, 2),
        cut("validation", 0, 2),
        cut("validation", 1, 2),
    )


def model(problem: str, parts: Parts, rngs: nnx.Rngs) -> nnx.Module:
    """Builds a net."""
    monarch = functools.partial(MonarchLinear, nblocks=NBLOCKS)
    linear = monarch if MONARCH in parts else nnx.Linear
    if problem == DIGITS:
        return mlp_s(linear=linear, rngs=rngs)
    sizes = {"context": 64, "width": 64, "layers": 2, "heads": 4}
    return GPT(vocabulary=98, linear=linear, rngs=rngs, **sizes)


def optimizer(
    parts: Parts, numbers: Numbers, steps: Any
) -> optax.GradientTransformationExtraArgs:
    """Makes the optimizer of a variant; numbers and length may be traced."""

    def fall(count):
        return 0.5 * (1 + jnp.cos(jnp.pi * jnp.minimum(count / steps, 1.0)))

    def rise_and_fall(count):
        rise = jnp.minimum((count + 1) / jnp.maximum(0.1 * steps, 1.0), 1.0)
        return numbers["rate"] * rise * fall(count)

    decay = numbers.get("decay", 0.0)
    if FISHLEG in parts:
        rule = fishleg(fall, damping=numbers["damping"], weight_decay=decay)
    else:
        rule = optax.adamw(rise_and_fall, weight_decay=decay)
    if PENALTY not in parts:
        return optax.with_extra_args_support(rule)
    # First: it compares the gradient it is given with that of the step.
    link = gradient_norm_penalty(ALPHA, numbers["penalty"] / ALPHA)
    return optax.chain(link, rule)


class Programs(NamedTuple):
    """The compiled programs of a variant on a problem; numbers and lengths traced."""

    begin: Callable[..., Any]
    advance: Callable[..., Any]
    measure: Callable[..., Any]


@functools.cache
def programs(problem: str, parts: Parts, batch: int) -> Programs:
    """Makes the programs that serve all runs of a variant."""
    objective = from_nnx(
        nnx.eval_shape(lambda: model(problem, parts, nnx.Rngs(0))), Categorical()
    ).objective

    def begin(numbers, steps, key):
        start, noise = jax.random.split(key)
        params = from_nnx(model(problem, parts, nnx.Rngs(start)), Categorical()).params
        return create_state(noise, params, optimizer(parts, numbers, steps))

    def advance(numbers, steps, state, train, key, ends):
        step = make_train_step(objective, optimizer(parts, numbers, steps), jit=False)

        def one(number, state):
            key_of = jax.random.fold_in(key, number)
            places = jax.random.randint(key_of, (batch,), 0, len(train[0]))
            x, y = (part[places] for part in train)
            return step(state, (x, y.astype(jnp.int32)))[0]

        return jax.lax.fori_loop(*ends, one, state)

    def score(params, rows):
        outputs, _ = objective.apply_fn(params, (), rows[0], key=None, train=False)
        if problem == DIGITS:
            return 100 * noisy_digits.accuracy(outputs, rows[1])
        return _capped(objective.likelihood.nll(outputs, rows[1]))

    def measure(params, rows):
        outputs, _ = objective.apply_fn(params, (), rows.seen[0], key=None, train=False)
        return {
            "train loss": _capped(objective.likelihood.nll(outputs, rows.seen[1])),
            "tuning": score(params, rows.tuning),
            JUDGED[problem][0]: score(params, rows.judged),
        }

    # It runs once a run: compiling it well takes longer.
    quick = {"xla_backend_optimization_level": 0}
    return Programs(
        jax.jit(begin, compiler_options=quick), jax.jit(advance), jax.jit(measure)
    )


def _capped(loss: jax.Array) -> jax.Array:
    return jnp.minimum(jnp.nan_to_num(loss, nan=WORST, posinf=WORST), WORST)


class Bench(NamedTuple):
    """A problem with its options."""

    problem: str
    options: Options

    @property
    def steps(self) -> int:
        return self.options.steps[self.problem]

    def started(self, parts: Parts, numbers: Numbers, seed: int, steps: int) -> Any:
        """Makes the programs' arguments up to the state, and the key of the batches."""
        batch = self.options.batch[self.problem]
        made = programs(self.problem, parts, batch)
        numbers = {key: jnp.float32(x) for key, x in numbers.items()}
        start, order = jax.random.split(jax.random.key(seed))
        length = jnp.float32(steps)
        return made, numbers, length, made.begin(numbers, length, start), order

    def trained(
        self, parts: Parts, numbers: Numbers, seed: int, steps: int
    ) -> dict[str, float]:
        """Trains once and measures."""
        made, numbers, length, state, order = self.started(parts, numbers, seed, steps)
        rows = rows_of(self.problem, seed)
        state = made.advance(numbers, length, state, rows.train, order, (0, steps))
        found = made.measure(state.params, rows._replace(train=None))
        return {name: float(f"{float(x):.6g}") for name, x in found.items()}

    def sampled(self, parts: Parts, steps: int) -> tuple[Numbers, list[Any], Any]:
        """Tunes on seeds of their own and runs the judged ones."""
        sign = JUDGED[self.problem][1]
        count = self.options.tuning_seeds[self.problem]
        apart = range(FIRST_TUNING_SEED, FIRST_TUNING_SEED + count)
        tried = []
        for numbers in points(grid_of(self.options, self.problem, parts)):
            found = [self.trained(parts, numbers, seed, steps) for seed in apart]
            tried.append([numbers, [run["tuning"] for run in found]])
        # Of equals the first.
        best = max(tried, key=lambda pair: sign * statistics.mean(pair[1]))[0]
        seeds = range(self.options.seeds)
        runs = [self.trained(parts, best, seed, steps) for seed in seeds]
        samples = {key: [run[key] for run in runs] for key in runs[0]}
        del samples["tuning"]
        return best, tried, samples

    def step_seconds(self) -> dict[str, list[float]]:
        """Times a step of every variant in turns, FishLeg's by their phases."""
        calls, counts = {}, {}
        for name, parts in VARIANTS.items():
            grid = grid_of(self.options, self.problem, parts)
            numbers = {key: values[0] for key, values in grid.items()}
            made, *numbered, state, order = self.started(parts, numbers, 0, self.steps)
            train = rows_of(self.problem, 0).train
            for phase in PHASES if FISHLEG in parts else ("",):
                ends = PHASES[phase or "dense"]
                at = made.advance(*numbered, state, train, order, (0, ends[0]))
                key = timed_name(name, phase)
                calls[key] = functools.partial(
                    made.advance, *numbered, at, train, order, ends
                )
                counts[key] = ends[1] - ends[0]
        counts[PLAIN + timing.AGAIN] = counts[PLAIN]
        found = timing.measure(calls, baseline=PLAIN, rounds=self.options.rounds)
        return {
            key: [seconds / counts[key] for seconds in taken]
            for key, taken in found.samples.items()
        }


def timed_name(variant: str, phase: str) -> str:
    return f"{variant}, {phase}" if phase else variant


def steps_within(seconds: Mapping[str, Sequence[float]], name: str, steps: int) -> int:
    """Counts the steps of a variant that fit into so many of the plain net, at least 1.

    Examples:
      >>> times = {"plain": [1.0], "GNP": [2.0], "FishLeg, first": [9.0]}
      >>> times |= {"FishLeg, dense": [4.0], "FishLeg, late": [5.0]}
      >>> [steps_within(times, name, 1_000) for name in ("GNP", "FishLeg")]
      [500, 219]
    """
    cost = lambda key: timing.ratio(seconds, key, PLAIN).median
    if FISHLEG not in VARIANTS[name]:
        return max(1, round(steps / cost(name)))
    first, dense, late = (cost(timed_name(name, phase)) for phase in PHASES)
    left = steps - first
    count = 1 + min(DENSE - 1, max(0.0, left) / dense)
    left -= (DENSE - 1) * dense
    return max(1, round(count + max(0.0, left) / late))


def run(options: Options, progress: Callable[..., Any]) -> Iterator[dict[str, Any]]:
    """Times the steps of each problem, then tunes and trains at both budgets."""
    total = len(options.problems) * (2 * len(VARIANTS) - 1 + 1)
    with progress(total, "claim composition") as tick:
        for problem in options.problems:
            bench = Bench(problem, options)
            seconds = bench.step_seconds()
            within = {n: steps_within(seconds, n, bench.steps) for n in VARIANTS}
            tick(f"{problem}, steps in equal time: {within}")
            cases = [(STEPS, name, bench.steps) for name in VARIANTS]
            # At the plain net both budgets are one.
            cases += [(TIME, name, n) for name, n in within.items() if name != PLAIN]
            data = load("stdlib_text" if problem == TEXT else "digits")
            for budget, name, steps in cases:
                parts = VARIANTS[name]
                numbers, tried, samples = bench.sampled(parts, steps)
                own = lambda key: key.partition(",")[0].removesuffix(timing.AGAIN)
                timed = {k: t for k, t in seconds.items() if own(k) == name}
                yield {
                    "case": {"problem": problem, "budget": budget, "variant": name},
                    "data": {"name": data.name, "digest": data.digest},
                    "dtype": "float32",
                    "shapes": {"batch": options.batch[problem]},
                    "seed": list(range(options.seeds)),
                    "options": dataclasses.asdict(options),
                    "steps": steps,
                    "numbers": numbers,
                    "ends": ends_of(numbers, grid_of(options, problem, parts)),
                    "tuning": tried,
                    "samples": samples | {"step_seconds": timed},
                }
                tick(f"{problem}, equal {budget}, {name}: {named(numbers)}")


def ends_of(numbers: Numbers, grid: Mapping[str, Sequence[float]]) -> list[str]:
    """Names the choices at an end of their grid; no decay is no end.

    Examples:
      >>> grid = {"rate": (0.1, 0.2, 0.3), "decay": (0.0, 0.1)}
      >>> ends_of({"rate": 0.3, "decay": 0.0}, grid)
      ['rate']
    """
    return [key for key in at_ends(numbers, grid) if numbers[key]]


# From here on: what a reader sees of the records.


def gains(records: list[Record], problem: str, budget: str) -> dict[str, list[float]]:
    """Gives what every variant gains over the plain net, seed by seed; more is better.

    The plain net has one record, at equal steps.
    """
    found = {
        (r["case"]["budget"], r["case"]["variant"]): r
        for r in records
        if r["case"]["problem"] == problem
    }
    name, sign = JUDGED[problem]
    of = lambda key: found[key]["samples"][name]
    plain = of((STEPS, PLAIN))
    return {
        variant: [
            sign * (ours - theirs)
            for ours, theirs in zip(
                of((STEPS if variant == PLAIN else budget, variant)), plain, strict=True
            )
        ]
        for variant in VARIANTS
    }


def alone(variant: str) -> list[str]:
    """Lists the parts of a variant, as variants.

    Examples:
      >>> alone("Monarch + GNP")
      ['Monarch', 'GNP']
    """
    return [part for part in PARTS if part in VARIANTS[variant]]


def summed(gain: Mapping[str, Sequence[float]], variant: str) -> list[float]:
    """Adds up what the parts of a variant gain alone, seed by seed.

    Examples:
      >>> summed({"Monarch": [1.0], "GNP": [0.5]}, "Monarch + GNP")
      [1.5]
    """
    columns = (gain[part] for part in alone(variant))
    return [sum(seed) for seed in zip(*columns, strict=True)]


def effect(gain: Mapping[str, Sequence[float]], parts: Sequence[str]) -> list[float]:
    """Computes the main effect of one part, or the interaction of several, by seed.

    Args:
      gain: of every variant.
      parts: one or more of ``PARTS``.

    Examples:
      >>> value = lambda s: 2.0 * ("GNP" in s) + 1.0 * ({"GNP", "Monarch"} <= s)
      >>> gain = {name: [value(parts)] for name, parts in VARIANTS.items()}
      >>> effect(gain, ["GNP"]), effect(gain, ["GNP", "Monarch"])
      ([2.5], [1.0])
    """
    settings = subsets([part for part in PARTS if part not in parts])
    total = [0.0] * len(gain[PLAIN])
    for subset in subsets(parts):
        sign = (-1) ** (len(parts) - len(subset))
        for setting in settings:
            for seed, value in enumerate(gain[name_of(subset | setting)]):
                total[seed] += sign * value / len(settings)
    return total


def is_better(ours: Sequence[float], theirs: Sequence[float]) -> bool:
    """Rules better: on every seed, or by a 95 % interval that lies above zero.

    Examples:
      >>> is_better([1.0, 2.0], [0.5, 1.9]), is_better([1.0, 2.0], [0.0, 3.0])
      (True, False)
    """
    every = all(a > b for a, b in zip(ours, theirs, strict=True))
    return every or difference(ours, theirs).lower > 0


def places(records: list[Record]) -> list[tuple[str, str]]:
    """Lists the problems that were run, with both budgets."""
    problems = dict.fromkeys(r["case"]["problem"] for r in records)
    return [(problem, budget) for problem in problems for budget in (STEPS, TIME)]


def beaten(records: list[Record], stack: str) -> dict[tuple[str, str, str], bool]:
    """Says by problem, budget and rival whether a stack is better than the rival."""
    found = {}
    for problem, budget in places(records):
        gain = gains(records, problem, budget)
        for rival in (PLAIN, *alone(stack)):
            found[problem, budget, rival] = is_better(gain[stack], gain[rival])
    return found


def verdict(records: list[Record]) -> Verdict:
    """Rules *shown* if one stack is better than all its parts and the plain net.

    The same stack, on both problems, at equal steps and at equal wall-clock; better: on
    every seed, or by a 95 % interval of the paired differences above zero. Training
    losses are not judged, nor is whether the parts add up.
    """
    said, shown = [], False
    for stack in STACKS:
        found = beaten(records, stack)
        both = {problem for problem, _, _ in found} == set(JUDGED)
        shown |= both and all(found.values())
        lost = [
            f"{rival} on {problem} at equal {budget}"
            for (problem, budget, rival), better in found.items()
            if not better
        ]
        count = f"{stack} is better than {len(found) - len(lost)} of {len(found)}"
        said.append(count + (f", not than {', '.join(lost)}" if lost else ""))
    why = (
        "of the parts alone and the plain net, over problems and budgets, "
        f"{'; '.join(said)} (rule: all of one stack, on both problems; on every seed, "
        "or by an interval above 0)."
    )
    return Verdict("shown" if shown else "not shown", why)


def signed(values: Sequence[float], problem: str) -> str:
    """Writes mean and 95 % interval of differences that are paired by seed."""
    found = difference(values, [0.0] * len(values))
    digits = 2 if problem == DIGITS else 3
    low, mean, high = (f"{x:+.{digits}f}" for x in found)
    return f"{mean} [{low}, {high}]"


def tables(records: list[Record]) -> list[Table]:
    """Writes each problem's nets, what the stacks add, and all effects."""
    problems = dict.fromkeys(problem for problem, _ in places(records))
    nets = [_net_table(records, problem) for problem in problems]
    return [*nets, _stack_table(records), _effect_table(records)]


def _net_table(records: list[Record], problem: str) -> Table:
    ours = [r for r in records if r["case"]["problem"] == problem]
    seconds = {}
    for record in ours:
        seconds |= record["samples"]["step_seconds"]
    name, digits = JUDGED[problem][0], 2 if problem == DIGITS else 3
    rows, edges = [], []
    for record in ours:
        budget, variant = record["case"]["budget"], record["case"]["variant"]
        phases = PHASES if FISHLEG in VARIANTS[variant] else ("",)
        times = (seconds[timed_name(variant, phase)] for phase in phases)
        edges += [f"{end} of {variant} ({budget})" for end in record["ends"]]
        rows.append(
            (
                budget,
                variant,
                named(record["numbers"]),
                f"{record['steps']:,}",
                " / ".join(f"{1e3 * statistics.median(t):.3g}" for t in times),
                spread(record["samples"][name], digits),
                spread(record["samples"]["train loss"], 3),
            )
        )
    options = records[0]["options"]
    grids = "; ".join(
        f"{key} {', '.join(f'{x:g}' for x in grid)}"
        for key, grid in options["grids"][problem].items()
    )
    same = timing.same_pair(seconds, PLAIN)
    note = (
        f"Batch {options['batch'][problem]}, mean ± standard deviation of "
        f"{options['seeds']} seeds. Grids: {grids}; all pairs tried on "
        f"{options['tuning_seeds'][problem]} other seed(s), for each budget. At an end "
        f"of its grid: {', '.join(edges) or 'none'}. ms: median of a step, of FishLeg "
        f"the first, the dense and the later ones; the plain net against itself {same}."
    )
    header = ("equal", "net", "chosen", "steps", "ms", name, "train loss")
    return Table(f"{problem}: each net tuned", header, rows, note)


def _stack_table(records: list[Record]) -> Table:
    rows = []
    for problem, budget in places(records):
        gain = gains(records, problem, budget)
        for stack in STACKS:
            total = summed(gain, stack)
            beyond = [a - b for a, b in zip(gain[stack], total, strict=True)]
            rivals = [
                f"{rival} {'yes' if is_better(gain[stack], gain[rival]) else 'no'}"
                for rival in (PLAIN, *alone(stack))
            ]
            values = (gain[stack], total, beyond)
            cells = (signed(value, problem) for value in values)
            rows.append((problem, budget, stack, *cells, ", ".join(rivals)))
    note = (
        "Gain over the plain net in points of accuracy (digits) or nats (text), more "
        "is better; means with 95 % intervals, paired by seed. Better: on every seed "
        "or by an interval above 0."
    )
    header = (
        *("problem", "equal", "stack", "gain", "sum of its parts alone"),
        *("gain less sum", "better than"),
    )
    return Table("What the stacks gain", header, rows, note)


def _effect_table(records: list[Record]) -> Table:
    found = {place: gains(records, *place) for place in places(records)}
    rows = [
        (
            " x ".join(part for part in PARTS if part in parts),
            *(signed(effect(g, sorted(parts)), p) for (p, _), g in found.items()),
        )
        for parts in VARIANTS.values()
        if parts
    ]
    header = ("", *(f"{problem}, equal {budget}" for problem, budget in found))
    note = (
        "Averaged over the settings of the other parts; of several parts, what they "
        "give together beyond the sum: above 0 they help, below 0 they hinder each "
        "other. Units as above."
    )
    return Table("Main effects and interactions", header, rows, note)


def draw(records: list[Record]) -> Figure:
    """Draws every variant's gain, and beside it the sum of its parts alone."""
    found = places(records)
    names = [name for name in VARIANTS if name != PLAIN]
    with rc_context(plots.STYLE):
        size = (10, 0.6 + 1.7 * len(found))
        figure = Figure(figsize=size, layout="constrained")
        panels = figure.subplots(
            len(found) // 2, 2, sharey=True, sharex="row", squeeze=False
        )
        for axes, (problem, budget) in zip(panels.flat, found, strict=True):
            gain = gains(records, problem, budget)
            axes.axvline(0, color="#666666", lw=1)
            for height, name in enumerate(names):
                _bar(axes, gain[name], height - 0.12, plots.COLOURS[0], "o")
                if len(alone(name)) > 1:
                    _bar(axes, summed(gain, name), height + 0.2, plots.COLOURS[1], "D")
            unit = "points of accuracy" if problem == DIGITS else "nats"
            axes.set_title(f"{problem}, equal {budget}: gain in {unit}")
            axes.set_yticks(range(len(names)), names)
            axes.set_ylim(len(names) - 0.4, -0.6)
            axes.grid(axis="x", color="#e4e4e4", lw=0.6)
            axes.set_axisbelow(True)
            axes.tick_params(axis="y", length=0)
        for label, colour, mark in (
            ("over the plain net", plots.COLOURS[0], "o"),
            ("sum of its parts alone", plots.COLOURS[1], "D"),
        ):
            axes.plot([], [], mark, color=colour, ms=5, label=f"{label}, 95 % interval")
        figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure


def _bar(axes: Any, values: Sequence[float], y: float, colour: str, mark: str) -> None:
    low, mean, high = difference(values, [0.0] * len(values))
    axes.plot([low, high], [y, y], color=colour, lw=1.4)
    axes.plot([mean], [y], mark, color=colour, ms=5)
    axes.plot(values, [y] * len(values), "|", color=colour, ms=5, alpha=0.6)
