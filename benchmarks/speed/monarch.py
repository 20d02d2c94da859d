"""Speed of a Monarch product against the dense one and against the FLOP bound.

A square Monarch map with b blocks in each factor has 2/b of the dense map's
multiply-adds, so its bound is the best dense time of the same run times 2/b. The dense
weight is the Monarch map written out: every side computes the same numbers, which is
checked before anything is timed. The feature-major product takes and gives its arrays
with the tokens last; its time is that between such arrays. Where torch is installed
(extra ``benchmarks``) and JAX runs on the CPU, the authors' product takes part as a
peer, on one thread; it has no compiler to ask for counts.
"""

import dataclasses
import importlib
import importlib.util
import time
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from matplotlib.figure import Figure

from benchmarks import timing
from benchmarks.plots import dots
from benchmarks.progress import Tick
from benchmarks.results import Record, digest
from benchmarks.tables import Table, Verdict
from jaxlab.structured import (
    init_monarch,
    monarch_matmul,
    monarch_matmul_features,
    monarch_to_dense,
)

CLAIM = "A Monarch product takes less time than the dense product it replaces."

DENSE = "dense"
OURS = "monarch_matmul"
FEATURES = "monarch_matmul_features"
EINSUM = "two einsums"
AUTHORS = "authors' torch"
FORWARD = "forward"
BOTH = "forward + backward"
SIDES = (DENSE, OURS, FEATURES, EINSUM, AUTHORS)
# Multiples of the bound to aim at, 256 tokens in float32: OURS and FEATURES, each
# forward and forward + backward.
AIMS = {
    (1024, 4): (1.15, 1.18, 1.12, 1.15),
    (1024, 32): (1.85, 1.95, 1.65, 1.7),
    (4096, 4): (1.02, 1.05, 1.0, 1.04),
    (4096, 64): (2.15, 2.1, 1.85, 1.65),
}
TOLERANCE = 2e-4  # of the largest entry; float32 sums of n terms in another order


@dataclasses.dataclass(frozen=True)
class Options:
    sizes: tuple[tuple[int, int], ...]  # (n, nblocks)
    tokens: int
    rounds: int
    sample_seconds: float
    seed: int = 0


PRESETS = {
    "small": Options(((256, 4),), tokens=32, rounds=3, sample_seconds=1e-3),
    "full": Options(
        ((1024, 4), (1024, 32), (4096, 4), (4096, 64)),
        tokens=256,
        rounds=40,
        sample_seconds=8e-3,
    ),
}


def two_einsums(x: jax.Array, w1: jax.Array, w2: jax.Array) -> jax.Array:
    """Multiplies by a Monarch matrix as one writes it down first."""
    k, _, p = w1.shape
    last, s, r = w2.shape
    lead = x.shape[:-1]
    middle = jnp.einsum("kqp,...kp->...kq", w1, x.reshape(*lead, k, p))
    out = jnp.einsum("lsr,...rl->...sl", w2, middle.reshape(*lead, r, last))
    return out.reshape(*lead, s * last)


def compared(
    n: int, nblocks: int, tokens: int, seed: int
) -> tuple[dict[str, tuple[Callable[..., jax.Array], tuple[jax.Array, ...]]], Any]:
    """Makes the products, each with its weights, and what they are applied to.

    Returns:
      ``{name: (apply(x, *weights), weights)}`` and ``(x, dy)``, which the feature-major
      product takes transposed.
    """
    of_weights, of_x, of_dy = jax.random.split(jax.random.key(seed), 3)
    factors = init_monarch(of_weights, n, n, nblocks=nblocks)
    w1, w2 = factors
    x = jax.random.normal(of_x, (tokens, n))
    dy = jax.random.normal(of_dy, (tokens, n))
    dense = jnp.array(monarch_to_dense(w1, w2).T)
    products = {
        DENSE: (jnp.matmul, (dense,)),
        OURS: (monarch_matmul, (w1, w2)),
        FEATURES: (monarch_matmul_features, (w1, w2)),
        EINSUM: (two_einsums, (w1, w2)),
    }
    return products, (x, dy)


def authors() -> ModuleType | None:
    """Imports the authors' product in torch; ``None`` where there is no such peer."""
    if jax.default_backend() != "cpu" or importlib.util.find_spec("torch") is None:
        return None
    return importlib.import_module("benchmarks.peers.torch_monarch")


def forward_only(apply: Callable[..., jax.Array]) -> Callable[..., Any]:
    """Returns ``(x, dy, *weights) -> (y,)``."""
    return lambda x, dy, *weights: (apply(x, *weights),)


def with_gradients(apply: Callable[..., jax.Array]) -> Callable[..., Any]:
    """Returns ``(x, dy, *weights) -> (y, dx, *dweights)``, gradients of <y, dy>."""

    def both(x, dy, *weights):
        y, pull = jax.vjp(apply, x, *weights)
        return y, *pull(dy)

    return both


def disagreement(results: dict[str, tuple[jax.Array, ...]]) -> float:
    """Measures how far the sides are apart, relative to the largest entry.

    Outputs and, where there are, input gradients are compared with the dense ones, the
    gradients of the factors with those of the einsums. All are token-major.

    Raises:
      ValueError: if they do not compute the same thing.
    """
    expected, gaps = results[DENSE], []
    ours = [name for name in (OURS, FEATURES, AUTHORS) if name in results]
    pairs = [(results[name][:2], expected[:2]) for name in (*ours, EINSUM)]
    pairs += [(results[name][2:], results[EINSUM][2:]) for name in ours]
    for found, right in pairs:
        for a, b in zip(found, right, strict=True):
            gaps.append(jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b)))
    worst = float(jnp.max(jnp.stack(gaps)))  # NaN if one of them is, unlike max()
    if not worst <= TOLERANCE:
        raise ValueError(
            f"the products differ by {worst:.1e} of the largest entry, more than "
            f"{TOLERANCE:.0e}: there is nothing to compare."
        )
    return worst


def as_tokens(results: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """Brings output and input gradient of the feature-major product to token-major."""
    return (*(value.T for value in results[:2]), *results[2:])


def cost(compiled: Any) -> dict[str, float | None]:
    """Asks the compiler for operations and temporary memory, where it tells."""
    analysis, memory = compiled.cost_analysis() or {}, compiled.memory_analysis()
    return {
        "flops": analysis.get("flops"),
        "temporary_bytes": getattr(memory, "temp_size_in_bytes", None),
    }


def run(options: Options, progress: Callable[..., Any]) -> Iterator[dict[str, Any]]:
    """Times every size, forward and forward + backward."""
    with progress(2 * len(options.sizes), "speed monarch") as tick:
        for n, nblocks in options.sizes:
            yield from _one_size(n, nblocks, options, tick)


def _one_size(
    n: int, nblocks: int, options: Options, tick: Tick
) -> Iterator[dict[str, Any]]:
    products, (x, dy) = compared(n, nblocks, options.tokens, options.seed)
    arguments = {name: (x, dy, *weights) for name, (_, weights) in products.items()}
    columns = jnp.array(x.T), jnp.array(dy.T)
    arguments[FEATURES] = (*columns, *products[FEATURES][1])
    factors, peer = products[OURS][1], authors()
    modes = {FORWARD: forward_only, BOTH: with_gradients}
    for mode, transform in modes.items():
        # Compiled ahead, so that the compiler's time and estimates can be read.
        compiled, seconds = {}, {}
        for name, (apply, _) in products.items():
            start = time.perf_counter()
            lowered = jax.jit(transform(apply)).lower(*arguments[name])
            compiled[name] = lowered.compile()
            seconds[name] = time.perf_counter() - start
        results = {name: f(*arguments[name]) for name, f in compiled.items()}
        results[FEATURES] = as_tokens(results[FEATURES])
        calls = {
            name: lambda f=f, a=arguments[name]: f(*a) for name, f in compiled.items()
        }
        if peer:
            make = peer.forward_only if mode == FORWARD else peer.with_gradients
            calls[AUTHORS] = make(x, dy, *factors)
            results[AUTHORS] = peer.as_jax(calls[AUTHORS]())
        worst = disagreement(results)
        timings = timing.measure(
            calls,
            baseline=DENSE,
            rounds=options.rounds,
            sample_seconds=options.sample_seconds,
        )
        tick(f"n={n}, {nblocks} blocks, {mode}")
        yield {
            "case": {"n": n, "nblocks": nblocks, "mode": mode},
            "data": {
                "name": f"normal n={n} nblocks={nblocks} tokens={options.tokens}",
                "digest": digest(x, dy, *factors),
            },
            "dtype": str(x.dtype),
            "shapes": {
                "x": list(x.shape),
                "w1": list(factors[0].shape),
                "w2": list(factors[1].shape),
            },
            "seed": options.seed,
            "samples": timings.samples,
            "repeats": timings.repeats,
            "compile_seconds": seconds,
            "compiler": {name: cost(f) for name, f in compiled.items()},
            "disagreement": worst,
            "peers": {AUTHORS: f"torch {peer.VERSION}"} if peer else {},
        }


def bound(record: Record) -> float:
    """Computes the FLOP bound in seconds: best dense time x 2 / nblocks."""
    return timing.best(record["samples"], DENSE) * 2 / record["case"]["nblocks"]


def sides(record: Record) -> list[str]:
    """Lists the products that a record holds; older ones have fewer."""
    return [name for name in SIDES if name in record["samples"]]


def _label(record: Record) -> str:
    case = record["case"]
    return f"{case['n']}, {case['nblocks']} blocks, {case['mode']}"


def tables(records: list[Record]) -> list[Table]:
    """Writes the times against the bound and against the dense product."""
    rows = []
    for record in records:
        samples, limit = record["samples"], bound(record)
        same = timing.same_pair(samples, DENSE)
        for name in sides(record):
            smallest = timing.best(samples, name)
            middle = timing.quartiles(samples[name]).median
            faster = timing.ratio(samples, DENSE, name)
            plain = timing.ratio(samples, EINSUM, name)
            compiler = record["compiler"].get(name, {})
            compile_seconds = record["compile_seconds"].get(name)
            rows.append(
                (
                    _label(record),
                    name,
                    f"{1e3 * smallest:.3f}",
                    f"{1e3 * middle:.3f}",
                    f"{smallest / limit:.2f}",
                    f"{middle / limit:.2f}",
                    "1" if name == DENSE else str(faster),
                    "1" if name == EINSUM else str(plain),
                    str(same) if name == DENSE else "",
                    "-" if compile_seconds is None else f"{compile_seconds:.2f}",
                    _mega(compiler.get("flops")),
                    _mega(compiler.get("temporary_bytes")),
                )
            )
    header = (
        "n, nblocks, mode",
        "product",
        "min ms",
        "median ms",
        "min / bound",
        "median / bound",
        "speed-up over dense",
        "over two einsums",
        "A/A",
        "compile s",
        "MFLOP",
        "temp MB",
    )
    first = records[0]
    note = (
        f"{first['shapes']['x'][0]} tokens, {first['dtype']}, "
        f"{len(first['samples'][DENSE])} rounds in alternation. Bound: best dense time "
        "x 2 / nblocks. Speed-up: median of the per-round ratios [quartiles]; A/A is "
        "dense against itself, and a speed-up inside its quartiles is no result. "
        "MFLOP and temporary memory are the compiler's counts. Largest disagreement "
        f"of the products: {max(r['disagreement'] for r in records):.0e} of the "
        "largest entry."
    )
    for name, version in first.get("peers", {}).items():
        note += f" {name}: their product restated in {version}, on one thread."
    return [Table("Monarch product", header, rows, note), _multiples(records)]


def _multiples(records: list[Record]) -> Table:
    """Writes the least times as multiples of the bound, a line for each size."""
    names = [name for name in SIDES[1:] if any(name in sides(r) for r in records)]
    columns = [(name, mode) for name in names for mode in (FORWARD, BOTH)]
    lines: dict[tuple[int, int], dict[tuple[str, str], str]] = {}
    for record in records:
        case = record["case"]
        line = lines.setdefault((case["n"], case["nblocks"]), {})
        for name in sides(record)[1:]:
            multiple = timing.best(record["samples"], name) / bound(record)
            line[name, case["mode"]] = f"{multiple:.2f}"
        line["A/A", case["mode"]] = str(timing.same_pair(record["samples"], DENSE))
    columns += [("A/A", mode) for mode in (FORWARD, BOTH)]
    rows = [
        (f"{n}, {nblocks}", *(line.get(column, "-") for column in columns))
        for (n, nblocks), line in lines.items()
    ]
    aims = "; ".join(
        f"{n}, {nblocks}: " + ", ".join(map(str, AIMS[n, nblocks]))
        for n, nblocks in lines
        if (n, nblocks) in AIMS
    )
    note = "Least time / bound; A/A is the dense product of the same mode."
    if aims:
        note += f" Aimed at, {OURS} forward and {BOTH}, then {FEATURES} alike: {aims}."
    header = ("n, nblocks", *(f"{name}, {mode}" for name, mode in columns))
    return Table("Monarch product, multiples of the bound", header, rows, note)


def _mega(value: float | None) -> str:
    return "-" if value is None else f"{value / 1e6:.3g}"


def verdict(records: list[Record]) -> Verdict:
    """Rules *shown* if every case is faster than dense by more than the A/A spread."""
    signs, ratios = [], []
    for record in records:
        faster = timing.ratio(record["samples"], DENSE, OURS)
        same = timing.same_pair(record["samples"], DENSE)
        signs.append(timing.beyond(faster, same))
        ratios.append(faster.median)
    why = (
        f"dense time / Monarch time is {min(ratios):.2f} to {max(ratios):.2f} over "
        f"{len(records)} cases, above the A/A spread in {signs.count(1)} and below it "
        f"in {signs.count(-1)} (rule: above in all, or below in all)."
    )
    if all(sign == 1 for sign in signs):
        return Verdict("shown", why)
    if all(sign == -1 for sign in signs):
        return Verdict("reversed", why)
    return Verdict("not shown", why)


def draw(records: list[Record]) -> Figure:
    """Draws each product's time as a multiple of the bound."""
    rows = {
        _label(record): {
            name: [sample / bound(record) for sample in record["samples"][name]]
            for name in (*sides(record)[1:], DENSE)
        }
        for record in records
    }
    figure = dots(rows, xlabel="time / FLOP bound (dot: minimum, line: quartiles)")
    series = len(next(iter(rows.values())))
    if series > 4:  # one line of names, and room for a dot each
        figure.set_size_inches(9, 1.2 + 0.12 * series * len(rows))
    return figure
