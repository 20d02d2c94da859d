"""Speed of FishLeg: its steps beside Adam's and Muon's, and what their parts cost.

On the auto-encoders of the claims, AE-digits (batch 100) and AE-curves (batch 200),
with the defaults that the claims run with. Beside them stands the form that the
defaults came from: the white direction apart from the gradient, with a product with the
Fisher of its own, and no side of a layer cut.

- Time: interleaved loops of ten steps. FishLeg has an auxiliary step in each of the
  first hundred steps and then in one of ten; its first step has twenty.
- Operations: the compiler's count, in gradients of the same batch, of one auxiliary
  step, of ``Q g`` and of a product with the Fisher.
- Memory: the state, and what a step takes beside its arguments and results beyond what
  SGD takes, in trees of parameters.
- Compilation of a step, no cache.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from matplotlib.figure import Figure

from benchmarks import autoencoder_races as races
from benchmarks import timing
from benchmarks.autoencoder_races import ADAM, APART, CURVES, DIGITS, FISHLEG, MUON, SGD
from benchmarks.plots import dots
from benchmarks.results import Record
from benchmarks.tables import Table, Verdict
from jaxlab.curvature import ggn_operator
from jaxlab.optimizers import (
    describe_blocks,
    fishleg_group_step,
    q_apply,
    q_init,
)

CLAIM = (
    "On a CPU an auxiliary step of FishLeg takes at most 4.5 gradients' operations "
    "on AE-digits and 7 on AE-curves; a step after the dense phase at most 3.5 of "
    "Adam's on AE-digits, less than Muon's on both, and on AE-curves at most half of "
    "that with directions apart and whole sides; the state is at most the factors and "
    "two trees; a step compiles in 20 s."
)

AUXILIARY = {DIGITS: 4.5, CURVES: 7.0}  # gradients
OVER_ADAM = 3.5  # on DIGITS
HALF = 0.5  # of APART's step, on CURVES
TREES = 2.0  # of parameters, beside the factors
COMPILE = 20.0  # seconds
DENSE, LATE = "dense", "late"
FISHER, PRODUCT, STEP = "product with F", "Q g", "auxiliary step"


@dataclasses.dataclass(frozen=True)
class Options:
    nets: tuple[str, ...]
    methods: tuple[str, ...]
    rounds: int
    batches: int  # that are drawn; the steps beyond see the last one again


PRESETS = {
    "small": Options((DIGITS,), (ADAM, FISHLEG), rounds=1, batches=2),
    "full": Options(
        (DIGITS, CURVES), (ADAM, MUON, FISHLEG, APART), rounds=12, batches=100
    ),
}


def run(options: Options, progress: Callable[..., Any]) -> Iterator[dict[str, Any]]:
    """Times the steps of every net and counts their parts."""
    with progress(2 * len(options.nets), "speed fishleg") as tick:
        for net in options.nets:
            sizes = {"batch": races.BATCH[net], "steps": options.batches}
            seconds = races.step_seconds(
                options.methods, rounds=options.rounds, net=net, **sizes
            )
            tick(f"{net}, time")
            params = races.fresh(jax.random.key(0), net)
            rows = races.data(net)[races.TRAIN][: races.BATCH[net]]
            methods = [name for name in options.methods if name in (FISHLEG, APART)]
            counts = {name: operations(name, net, params, rows) for name in methods}
            costs = {name: costs_of(name, net) for name in (SGD, *options.methods)}
            tick(f"{net}, operations and memory")
            yield {
                "case": {"net": net},
                "data": races.head(net),
                "dtype": "float32",
                "shapes": {
                    "batch": list(rows.shape),
                    "parameters": [sum(x.size for x in jax.tree.leaves(params))],
                },
                "seed": 0,
                "samples": seconds,
                "operations": counts,
                "costs": costs,
                "factors": {
                    name: _size(q_init(params, **_settings(name))) for name in methods
                },
                "blocks": str(describe_blocks(params)).splitlines(),
                "options": dataclasses.asdict(options),
            }


def _settings(method: str) -> dict[str, Any]:
    return {"max_size": 1024} if method == APART else {}


def _size(tree: Any) -> int:
    """Counts the bytes of a tree."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def operations(method: str, net: str, params: Any, rows: Any) -> dict[str, float]:
    """Asks the compiler for the operations of FishLeg's parts, in gradients."""

    def count(function, *arguments):
        compiled = jax.jit(function).lower(*arguments).compile()
        return (compiled.cost_analysis() or {}).get("flops", float("nan"))

    apply = lambda params, x: races.apply_fn(params, x, net)
    operator = lambda params, x: ggn_operator(
        apply, races.LIKELIHOOD, params, (x, None)
    )

    def step(key, q, gradient, params, x):
        return fishleg_group_step(
            key,
            q,
            [gradient],
            operator(params, x),
            damping=races.DAMPING,
            combine=method != APART,
        )

    q, key = q_init(params, **_settings(method)), jax.random.key(0)
    one = count(lambda p, x: jax.grad(races.loss_fn)(p, x, net), params, rows)
    found = {
        FISHER: count(lambda p, x, v: operator(p, x)(v), params, rows, params),
        PRODUCT: count(q_apply, q, params),
        STEP: count(step, key, q, params, params, rows),
    }
    return {name: flops / one for name, flops in found.items()}


def costs_of(method: str, net: str) -> dict[str, float]:
    """Compiles a step without a cache: seconds, bytes of state and of temporaries."""
    params, given = races.batches(0, batch_size=races.BATCH[net], steps=2, net=net)
    numbers = jnp.float32(0.01), jnp.float32(1)
    carry = races.begin(method, numbers, params)

    def step(run, given):
        return races.advance(method, numbers, run, given, (0, 1), net)

    lowered = jax.jit(step, donate_argnums=0).lower(carry, given)
    cached = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        begin = time.perf_counter()
        compiled = lowered.compile()
        seconds = time.perf_counter() - begin
    finally:
        jax.config.update("jax_enable_compilation_cache", cached)
    memory = compiled.memory_analysis()
    return {
        "compile": seconds,
        "state": _size(carry.state),
        "parameters": _size(params),
        "temporary": getattr(memory, "temp_size_in_bytes", float("nan")),
    }


def over(record: Record, top: str, bottom: str) -> timing.Quartiles:
    """Compares the steps of two methods, round by round."""
    return timing.ratio(record["samples"], top, bottom)


def memory(record: Record, method: str) -> tuple[float, float, float]:
    """Gives factors, state and temporaries beyond SGD's, in trees of parameters."""
    costs = record["costs"]
    tree = costs[method]["parameters"]
    beyond = costs[method]["temporary"] - costs[SGD]["temporary"]
    factors = record["factors"].get(method, 0)
    return factors / tree, costs[method]["state"] / tree, beyond / tree


def tables(records: list[Record]) -> list[Table]:
    """Writes times, operations, memory and compilation."""
    return [_times(records), _operations(records), _costs(records)]


def _times(records: list[Record]) -> Table:
    rows = []
    for record in records:
        samples = record["samples"]
        for name, taken in samples.items():
            rows.append(
                (
                    record["case"]["net"],
                    name,
                    f"{1e3 * timing.best(samples, name):.3g}",
                    f"{1e3 * statistics.median(taken):.3g}",
                    str(over(record, name, ADAM)),
                    str(over(record, name, MUON)) if MUON in samples else "",
                )
            )
    return Table(
        "Time of a step",
        ("net", "method", "least ms", "median ms", "over Adam's", "over Muon's"),
        rows,
        f"{records[0]['options']['rounds']} interleaved rounds in compiled loops of "
        "ten steps: median of the ratios in a round with quartiles. Adam runs twice; "
        "inside the quartiles of the second run a ratio is no result.",
    )


def _operations(records: list[Record]) -> Table:
    rows = [
        (
            record["case"]["net"],
            method,
            *(f"{counts[part]:.2f}" for part in (FISHER, PRODUCT, STEP)),
            f"{AUXILIARY[record['case']['net']]:g}" if method == FISHLEG else "",
        )
        for record in records
        for method, counts in record["operations"].items()
    ]
    return Table(
        "Operations of the parts, in gradients",
        ("net", "method", FISHER, PRODUCT, STEP, "at most"),
        rows,
        "The compiler's count, over that of the gradient of the same batch.",
    )


def _costs(records: list[Record]) -> Table:
    rows = []
    for record in records:
        for method, costs in record["costs"].items():
            factors, state, beyond = memory(record, method)
            rows.append(
                (
                    record["case"]["net"],
                    method,
                    f"{factors:.2f}" if factors else "",
                    f"{state:.2f}",
                    f"{beyond:.2f}",
                    f"{costs['compile']:.1f}",
                )
            )
    return Table(
        "Memory in trees of parameters, and seconds of compilation",
        ("net", "method", "factors", "state", "temporaries beyond SGD's", "compile s"),
        rows,
        "The compiler's count of one training step whose carry is donated. Compiled "
        "once, without a cache.",
    )


def verdict(records: list[Record]) -> Verdict:
    """Rules *shown* if every limit is kept on every net. *Reversed* is not possible."""
    parts = {}
    for record in records:
        net, samples = record["case"]["net"], record["samples"]
        late = races.phase_name(LATE)
        steps = record["operations"][FISHLEG][STEP]
        limit = AUXILIARY[net]
        parts[f"{net}: auxiliary step {steps:.2f} gradients (at most {limit:g})"] = (
            steps <= limit
        )
        ratio = over(record, late, ADAM).median
        if net == DIGITS:
            parts[f"{net}: late step {ratio:.2f} of Adam's (at most {OVER_ADAM:g})"] = (
                ratio <= OVER_ADAM
            )
        if MUON in samples:
            ratio = over(record, late, MUON).median
            parts[f"{net}: late step {ratio:.2f} of Muon's (below 1)"] = ratio < 1
        if net == CURVES and APART in record["operations"]:
            for phase in (DENSE, LATE):
                names = [races.phase_name(phase, m) for m in (FISHLEG, APART)]
                ratio = over(record, *names).median
                parts[
                    f"{net}: {phase} step {ratio:.2f} of that with directions apart "
                    f"and whole sides (at most {HALF:g})"
                ] = ratio <= HALF
        factors, state, _ = memory(record, FISHLEG)
        parts[
            f"{net}: state {state:.2f} trees, the factors {factors:.2f} (at most "
            f"{TREES:g} more)"
        ] = state <= factors + TREES
        seconds = record["costs"][FISHLEG]["compile"]
        parts[f"{net}: compiled in {seconds:.1f} s (at most {COMPILE:g})"] = (
            seconds <= COMPILE
        )
    why = "; ".join(f"{'yes' if held else 'no'}: {p}" for p, held in parts.items())
    whole = {record["case"]["net"] for record in records} == {DIGITS, CURVES}
    return Verdict("shown" if whole and all(parts.values()) else "not shown", f"{why}.")


def draw(records: list[Record]) -> Figure:
    """Draws the time of a step in steps of Adam."""
    rows = {}
    for record in records:
        samples = record["samples"]
        unit = timing.best(samples, ADAM)
        names = [n for n in samples if n not in (ADAM, ADAM + timing.AGAIN)]
        rows[record["case"]["net"]] = {
            name: [sample / unit for sample in samples[name]]
            for name in names
            if not name.endswith("first")
        }
    figure = dots(rows, xlabel="steps of Adam (dot: minimum, line: quartiles)")
    figure.set_size_inches(9, 2 + 0.9 * len(rows))
    return figure
