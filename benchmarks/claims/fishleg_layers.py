"""Does FishLeg beat tuned Adam and Muon per step on other layers than dense ones?

Three nets whose blocks are of other kinds, each trained by cross-entropy:

- ``CNN``: convolutions, on digits, batch 128;
- ``GPT``: an embedding, LayerNorms and attention of two blocks, width 64, on windows of
  64 characters of ``stdlib_text``, batch 8;
- ``Monarch``: MLP-M of Monarch layers, whose factors are stacks of small blocks, on
  digits, batch 128.

Each method chooses one number, on seeds that are not judged and for each judged step
anew: FishLeg its damping, whose unit is that of the Fisher and not the same on these
nets as on the auto-encoders, Adam and Muon their rate. All have the same grid size. The
loss is that of rows fixed beforehand, of digits all training rows, of text 64 windows.
Time is told, not judged: the median of the seconds of a step after the hundredth, of
FishLeg over whole cadences.
"""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from matplotlib import rc_context
from matplotlib.figure import Figure

from benchmarks import plots
from benchmarks.autoencoder_races import FIRST_TUNING_SEED, chosen
from benchmarks.paired import finite, spread
from benchmarks.results import Record
from benchmarks.tables import Table, Verdict
from jaxlab.datasets import load
from jaxlab.layers import MonarchLinear
from jaxlab.likelihoods import Categorical
from jaxlab.models import GPT, cnn, mlp_m
from jaxlab.optimizers import fishleg
from jaxlab.training import create_state, from_nnx, make_train_step

CLAIM = (
    "Per step FishLeg is below tuned Adam on a CNN, a small GPT and an MLP of Monarch "
    "layers at every judged step on every seed."
)

FISHLEG, ADAM, MUON = "FishLeg", "Adam", "Muon"
RIVALS = (ADAM, MUON)
CNN, TEXT, MONARCH = "CNN", "GPT", "Monarch"
WINDOWS, CONTEXT = 64, 64  # of text that is judged, and its length
EVERY = 10  # FishLeg's cadence
BATCH = {CNN: 128, TEXT: 8, MONARCH: 128}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    nets: tuple[str, ...]
    methods: tuple[str, ...]
    seeds: int
    tuning_seeds: int
    rates: tuple[float, ...]
    dampings: tuple[float, ...]
    judged: tuple[int, ...]


PRESETS = {
    "small": Options(
        nets=(MONARCH,),
        methods=(FISHLEG, ADAM),
        seeds=2,
        tuning_seeds=1,
        rates=(0.01,),
        dampings=(0.1,),
        judged=(2, 3),
    ),
    "full": Options(
        nets=(CNN, TEXT, MONARCH),
        methods=(FISHLEG, *RIVALS),
        seeds=5,
        tuning_seeds=1,
        rates=(0.0003, 0.001, 0.003, 0.006, 0.01, 0.03, 0.1),
        dampings=(0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0),
        judged=(20, 50, 100, 200),
    ),
}


def model(net: str, rngs: nnx.Rngs) -> nnx.Module:
    """Builds one of the nets."""
    if net == CNN:
        return cnn(rngs=rngs)
    if net == MONARCH:
        return mlp_m(linear=functools.partial(MonarchLinear, nblocks=4), rngs=rngs)
    sizes = {"context": CONTEXT, "width": 64, "layers": 2, "heads": 4}
    return GPT(vocabulary=98, **sizes, rngs=rngs)


@functools.cache
def data(net: str) -> tuple[Any, Any]:
    """Loads the rows to train on, and those that are judged."""
    x, y = load("stdlib_text" if net == TEXT else "digits").splits["train"]
    if net != TEXT:
        return (x, y), (jnp.asarray(x), jnp.asarray(y))
    rows = x[:, :CONTEXT], y[:, :CONTEXT]
    places = np.random.default_rng(0).choice(len(x), WINDOWS, replace=False)
    return rows, tuple(jnp.asarray(part[places], jnp.int32) for part in rows)


class Race(NamedTuple):
    """The compiled programs of a method on a net."""

    begin: Callable[..., Any]
    step: Callable[..., Any]
    loss: Callable[..., Any]


@functools.cache
def race_of(net: str, method: str) -> Race:
    objective, *_ = from_nnx(
        nnx.eval_shape(lambda: model(net, nnx.Rngs(0))), Categorical()
    )

    def optimizer(number):
        if method == FISHLEG:
            return fishleg(damping=number, update_aux_every=EVERY)
        return optax.adam(number) if method == ADAM else optax.contrib.muon(number)

    def begin(key):
        start, noise = jax.random.split(key)
        _, params, rest = from_nnx(model(net, nnx.Rngs(start)), Categorical())
        return create_state(noise, params, optimizer(0.1), model_state=rest)

    def step(number, state, batch):
        one = make_train_step(objective, optimizer(number), jit=False)
        return one(state, batch)[0]

    def loss(state, rows):
        return objective.loss(state.params, state.model_state, rows)[0]

    return Race(jax.jit(begin), jax.jit(step, donate_argnums=1), jax.jit(loss))


class Run(NamedTuple):
    losses: list[float]
    seconds: float  # of a step


def race(net: str, method: str, number: float, seed: int, marks: Sequence[int]) -> Run:
    """Trains from a seed and judges at the marks.

    Steps are called one by one: convolutions are slow in compiled loops on CPUs.
    """
    run, (train, judged) = race_of(net, method), data(net)
    state = run.begin(jax.random.key(seed))
    draw = np.random.default_rng(seed)
    size, order = BATCH[net], np.zeros(0, int)
    number = jnp.float32(number)
    losses, taken, since = [], [], time.perf_counter()
    for count in range(1, max(marks) + 1):
        if len(order) < size:
            order = draw.permutation(len(train[0]))
        rows, order = order[:size], order[size:]
        batch = tuple(jnp.asarray(part[rows]) for part in train)
        state = run.step(number, state, batch)
        if count % EVERY == 0 or count in marks:
            jax.block_until_ready(state)
        if count % EVERY == 0:
            taken.append((time.perf_counter() - since) / EVERY)
        if count in marks:
            losses.append(finite(float(run.loss(state, judged))))
        if count % EVERY == 0:
            since = time.perf_counter()
    return Run(losses, statistics.median(taken[len(taken) // 2 :] or [0.0]))


def raced(net: str, method: str, options: Options) -> dict[str, Any]:
    """Tunes a method on seeds of their own and runs it on those that are judged."""
    numbers = options.dampings if method == FISHLEG else options.rates
    marks = options.judged
    apart = range(FIRST_TUNING_SEED, FIRST_TUNING_SEED + options.tuning_seeds)
    tuning = np.array(
        [[race(net, method, n, s, marks).losses for n in numbers] for s in apart]
    )
    best = chosen(tuning)
    seeds = range(options.seeds)
    found = {
        i: [race(net, method, numbers[i], seed, marks) for seed in seeds]
        for i in sorted(set(best))
    }
    return {
        "numbers": [numbers[i] for i in best],
        "tuning": {
            f"{n:g}": mean.tolist()
            for n, mean in zip(numbers, tuning.mean(0), strict=True)
        },
        "samples": {
            "loss": [
                [found[i][seed].losses[m] for m, i in enumerate(best)] for seed in seeds
            ],
            "seconds": [run.seconds for runs in found.values() for run in runs],
        },
    }


def run(options: Options, progress: Callable[..., Any]) -> Iterator[dict[str, Any]]:
    """Runs every method on every net."""
    total = len(options.nets) * len(options.methods)
    with progress(total, "claim fishleg_layers") as tick:
        for net in options.nets:
            rows = load("stdlib_text" if net == TEXT else "digits")
            for method in options.methods:
                found = raced(net, method, options)
                yield {
                    "case": {"net": net, "method": method, "batch": BATCH[net]},
                    "data": {"name": rows.name, "digest": rows.digest},
                    "dtype": "float32",
                    "shapes": {"judged": list(data(net)[1][0].shape)},
                    "seed": list(range(options.seeds)),
                    "options": dataclasses.asdict(options),
                    **found,
                }
                tick(f"{net}, {method}")


def by_net(records: list[Record]) -> dict[str, dict[str, Record]]:
    found: dict[str, dict[str, Record]] = {}
    for record in records:
        case = record["case"]
        found.setdefault(case["net"], {})[case["method"]] = record
    return found


def at(record: Record, mark: int) -> list[float]:
    """Gives the losses of all seeds at a judged step."""
    place = record["options"]["judged"].index(mark)
    return [seed[place] for seed in record["samples"]["loss"]]


def _ends(record: Record) -> list[str]:
    return sorted(record["tuning"], key=float)[:: max(1, len(record["tuning"]) - 1)]


def tables(records: list[Record]) -> list[Table]:
    """Writes the losses by steps and the seconds of a step."""
    options = records[0]["options"]
    rows = []
    for net, found in by_net(records).items():
        unit = statistics.median(found[ADAM]["samples"]["seconds"])
        for method, record in found.items():
            seconds = statistics.median(record["samples"]["seconds"])
            rows.append(
                (
                    net,
                    method,
                    " / ".join(f"{number:g}" for number in record["numbers"]),
                    *(spread(at(record, mark), 4) for mark in options["judged"]),
                    f"{1e3 * seconds:.3g}",
                    f"{seconds / unit:.1f}" if unit else "",
                )
            )
    edges = [
        f"{r['case']['method']} on {r['case']['net']}"
        for r in records
        if {f"{n:g}" for n in r["numbers"]} & set(_ends(r))
    ]
    note = (
        f"Training loss, mean ± standard deviation of {options['seeds']} seeds; the "
        f"number (FishLeg's damping, a rate of the others) chosen for each step from "
        f"{len(options['rates'])} on {options['tuning_seeds']} other seeds. At an end "
        f"of its grid: {', '.join(edges) or 'none'}. Time: median ms of the later "
        "steps in the race, its data included, and over Adam's."
    )
    header = ("net", "method", "numbers", *map(str, options["judged"]), "ms", "/ Adam")
    return [Table("Training loss by steps", header, rows, note)]


def verdict(records: list[Record]) -> Verdict:
    """Rules *shown* if FishLeg is below Adam on every net, step and seed.

    *Reversed*: Adam is below FishLeg on every net, at every step, on every seed. Muon
    is told, not judged.
    """
    held, lost, parts = [], [], []
    for net, found in by_net(records).items():
        for mark in records[0]["options"]["judged"]:
            ours = at(found[FISHLEG], mark)
            said = []
            for rival in (name for name in RIVALS if name in found):
                pairs = zip(ours, at(found[rival], mark), strict=True)
                leads = [theirs - mine for mine, theirs in pairs]
                said.append(f"{rival} {min(leads):+.4f}")
                if rival == ADAM:
                    held.append(min(leads) > 0)
                    lost.append(max(leads) < 0)
            parts.append(f"{net}, step {mark}: {', '.join(said)}")
    why = f"least lead of a seed over {'; '.join(parts)} (rule: Adam's above 0)."
    if all(held):
        return Verdict("shown", why)
    return Verdict("reversed" if all(lost) else "not shown", why)


def draw(records: list[Record]) -> Figure:
    """Draws the losses by steps, a panel for each net."""
    found = by_net(records)
    judged = records[0]["options"]["judged"]
    colours = dict(zip((FISHLEG, ADAM, MUON), plots.COLOURS, strict=False))
    with rc_context(plots.STYLE):
        figure = Figure(figsize=(4 * len(found), 3.8), layout="constrained")
        panels = np.atleast_1d(figure.subplots(1, len(found)))
        for axes, (net, methods) in zip(panels, found.items(), strict=True):
            for method, record in methods.items():
                colour = colours[method]
                for seed in record["samples"]["loss"]:
                    axes.plot(judged, seed, color=colour, lw=0.6, alpha=0.6)
                means = [statistics.mean(at(record, mark)) for mark in judged]
                axes.plot(judged, means, color=colour, lw=2, label=method)
            axes.set_xscale("log")
            axes.set_yscale("log" if net != TEXT else "linear")
            axes.set_xticks(judged, [str(mark) for mark in judged])
            axes.set_xticks([], minor=True)
            axes.set_title(f"{net}: training loss")
            axes.set_xlabel("steps")
        panels[0].legend(frameon=False)
    return figure
