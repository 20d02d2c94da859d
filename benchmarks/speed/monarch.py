"""Speed of a Monarch product against the dense one and against the FLOP bound.

A square Monarch map with b blocks in each factor has 2/b of the dense map's
multiply-adds, so its bound is the best dense time of the same run times 2/b. The dense
weight is the Monarch map written out: every side computes the same numbers, which is
checked before anything is timed.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from matplotlib.figure import Figure

from benchmarks import timing
from benchmarks.plots import dots
from benchmarks.progress import Tick
from benchmarks.results import Record, digest
from benchmarks.tables import Table, Verdict
from jaxlab.structured import init_monarch, monarch_matmul, monarch_to_dense

CLAIM = "A Monarch product takes less time than the dense product it replaces."

DENSE = "dense"
OURS = "monarch_matmul"
EINSUM = "two einsums"
FORWARD = "forward"
BOTH = "forward + backward"
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
    """Makes the three products, each with its weights, and what they are applied to.

    Returns:
      ``{name: (apply(x, *weights), weights)}`` and ``(x, dy)``.
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
        EINSUM: (two_einsums, (w1, w2)),
    }
    return products, (x, dy)


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
    gradients of the factors with each other.

    Raises:
      ValueError: if they do not compute the same thing.
    """
    expected, gaps = results[DENSE], []
    pairs = [(results[name][:2], expected[:2]) for name in (OURS, EINSUM)]
    pairs.append((results[OURS][2:], results[EINSUM][2:]))
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
    modes = {FORWARD: forward_only, BOTH: with_gradients}
    for mode, transform in modes.items():
        # Compiled ahead, so that the compiler's time and estimates can be read.
        compiled, seconds = {}, {}
        for name, (apply, _) in products.items():
            start = time.perf_counter()
            lowered = jax.jit(transform(apply)).lower(*arguments[name])
            compiled[name] = lowered.compile()
            seconds[name] = time.perf_counter() - start
        worst = disagreement({n: f(*arguments[n]) for n, f in compiled.items()})
        calls = {
            name: lambda f=f, a=arguments[name]: f(*a) for name, f in compiled.items()
        }
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
                "digest": digest(x, dy, *products[OURS][1]),
            },
            "dtype": str(x.dtype),
            "shapes": {
                "x": list(x.shape),
                "w1": list(products[OURS][1][0].shape),
                "w2": list(products[OURS][1][1].shape),
            },
            "seed": options.seed,
            "samples": timings.samples,
            "repeats": timings.repeats,
            "compile_seconds": seconds,
            "compiler": {name: cost(f) for name, f in compiled.items()},
            "disagreement": worst,
        }


def bound(record: Record) -> float:
    """Computes the FLOP bound in seconds: best dense time x 2 / nblocks."""
    return timing.best(record["samples"], DENSE) * 2 / record["case"]["nblocks"]


def _label(record: Record) -> str:
    case = record["case"]
    return f"{case['n']}, {case['nblocks']} blocks, {case['mode']}"


def tables(records: list[Record]) -> list[Table]:
    """Writes the times against the bound and against the dense product."""
    rows = []
    for record in records:
        samples, limit = record["samples"], bound(record)
        same = timing.same_pair(samples, DENSE)
        for name in (DENSE, OURS, EINSUM):
            smallest = timing.best(samples, name)
            middle = timing.quartiles(samples[name]).median
            faster = timing.ratio(samples, DENSE, name)
            compiler = record["compiler"][name]
            rows.append(
                (
                    _label(record),
                    name,
                    f"{1e3 * smallest:.3f}",
                    f"{1e3 * middle:.3f}",
                    f"{smallest / limit:.2f}",
                    f"{middle / limit:.2f}",
                    "1" if name == DENSE else str(faster),
                    str(same) if name == DENSE else "",
                    f"{record['compile_seconds'][name]:.2f}",
                    _mega(compiler["flops"]),
                    _mega(compiler["temporary_bytes"]),
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
    return [Table("Monarch product", header, rows, note)]


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
            for name in (OURS, EINSUM, DENSE)
        }
        for record in records
    }
    return dots(rows, xlabel="time / FLOP bound (dot: minimum, line: quartiles)")
