"""Monarch products as the compilers of accelerators see them; nothing is run.

A TPU's compiler gives two figures for a program. ``optimal_seconds`` is a roofline: the
FLOPs and the bytes of the program, as if every product filled the matrix unit. The
aims are in it. The cycles that its scheduler expects also know that blocks narrower
than the matrix unit leave most of it idle. Neither is a measurement. A GPU's compiler
gives no time at all; there the passes beside the products are counted.

Tokens come last in the feature-major forms. A chain is four layers; its folded factors
(:func:`jaxlab.structured.fold_monarch_stack`) are arguments, so folding costs nothing.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from matplotlib.figure import Figure

from benchmarks import devices
from benchmarks.plots import dots
from benchmarks.results import Record, digest
from benchmarks.tables import Table, Verdict
from jaxlab.structured import (
    MonarchFactors,
    fold_monarch_stack,
    monarch_matmul,
    monarch_matmul_features,
    monarch_stack_matmul,
)

CLAIM = (
    "By its compiler's estimate, a TPU v5p multiplies by Monarch matrices faster than "
    "by dense ones, by the factors aimed at."
)

LAYERS = 4
FORWARD = "forward"
BOTH = "forward + backward"
DENSE = "dense"
EINSUM = "two einsums"
TOKENS_MIXED = "monarch_matmul"
TOKENS = "monarch_matmul, block-major"
FEATURES_MIXED = "monarch_matmul_features"
FEATURES = "monarch_matmul_features, block-major"
DENSE_CHAIN = "dense chain"
DENSE_CHAIN_RELU = "dense chain, relu"
CHAIN = "folded chain, block-major"
CHAIN_RELU = "folded chain, block-major, relu"
MIXED_CHAIN = "folded chain"
MIXED_CHAIN_RELU = "folded chain, relu"
# What each form is compared with.
BASELINES = {
    DENSE: DENSE,
    EINSUM: DENSE,
    TOKENS_MIXED: DENSE,
    TOKENS: DENSE,
    FEATURES_MIXED: DENSE,
    FEATURES: DENSE,
    DENSE_CHAIN: DENSE_CHAIN,
    MIXED_CHAIN: DENSE_CHAIN,
    CHAIN: DENSE_CHAIN,
    DENSE_CHAIN_RELU: DENSE_CHAIN_RELU,
    MIXED_CHAIN_RELU: DENSE_CHAIN_RELU,
    CHAIN_RELU: DENSE_CHAIN_RELU,
}
DRAWN = (EINSUM, TOKENS_MIXED, TOKENS, FEATURES, CHAIN, MIXED_CHAIN_RELU)
# Speed-ups over dense to aim at, by (n, nblocks), form and mode.
AIMS = {
    (4096, 4): {(CHAIN, FORWARD): 1.85, (CHAIN, BOTH): 1.75, (TOKENS, FORWARD): 1.5},
    (4096, 64): {(CHAIN, FORWARD): 6.0, (CHAIN, BOTH): 5.8, (TOKENS, FORWARD): 3.2},
    (8192, 4): {(CHAIN, FORWARD): 1.75, (CHAIN, BOTH): 1.75, (TOKENS, FORWARD): 1.5},
}


@dataclasses.dataclass(frozen=True)
class Options:
    sizes: tuple[tuple[int, int], ...]  # (n, nblocks)
    tokens: int
    dtype: str = "bfloat16"


PRESETS = {
    "small": Options(((256, 4),), tokens=256),
    "full": Options(((4096, 4), (4096, 64), (8192, 4)), tokens=8192),
}


class Form(NamedTuple):
    """One way to multiply, and arrays of what shapes it takes."""

    apply: Callable[..., jax.Array]  # of x and weights
    x: jax.ShapeDtypeStruct
    weights: tuple[Any, ...]


def forms(n: int, nblocks: int, options: Options, platform: str) -> dict[str, Form]:
    """Lists what is compared: square maps of width n, one layer or a chain."""
    array = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.dtype(options.dtype))
    rows, columns = array((options.tokens, n)), array((n, options.tokens))
    block = array((nblocks, n // nblocks, n // nblocks))
    matrix, pair = array((n, n)), MonarchFactors(block, block)
    tokens = functools.partial(monarch_matmul, platform=platform)
    found = {
        DENSE: Form(jnp.matmul, rows, (matrix,)),
        EINSUM: Form(two_einsums, rows, pair),
        TOKENS_MIXED: Form(tokens, rows, pair),
        TOKENS: Form(
            functools.partial(tokens, output_layout="block_major"), rows, pair
        ),
        FEATURES_MIXED: Form(monarch_matmul_features, columns, pair),
        FEATURES: Form(
            functools.partial(monarch_matmul_features, output_layout="block_major"),
            columns,
            pair,
        ),
    }
    for activation, name in ((None, DENSE_CHAIN), (jax.nn.relu, DENSE_CHAIN_RELU)):
        apply = functools.partial(_dense_chain, activation=activation)
        found[name] = Form(apply, rows, (matrix,) * LAYERS)
    for order, activation, name in (
        ("interleaved", None, MIXED_CHAIN),
        ("block_major", None, CHAIN),
        ("interleaved", jax.nn.relu, MIXED_CHAIN_RELU),
        ("block_major", jax.nn.relu, CHAIN_RELU),
    ):
        fold = functools.partial(fold_monarch_stack, order=order)
        apply = functools.partial(
            monarch_stack_matmul,
            order=order,
            activation=activation,
            output_layout="block_major",
            platform=platform,
        )
        layers = jax.eval_shape(fold, (pair,) * LAYERS)
        found[name] = Form(apply, columns, (layers,))
    return {name: found[name] for name in BASELINES}


def two_einsums(x: jax.Array, w1: jax.Array, w2: jax.Array) -> jax.Array:
    """Multiplies by a Monarch matrix as one writes it down first."""
    (k, _, p), (l, s, r) = w1.shape, w2.shape
    middle = jnp.einsum("kqp,tkp->tkq", w1, x.reshape(-1, k, p))
    y = jnp.einsum("lsr,trl->tsl", w2, middle.reshape(-1, r, l))
    return y.reshape(-1, s * l)


def forward_only(apply: Callable[..., jax.Array]) -> Callable[..., Any]:
    """Returns ``(x, dy, *weights) -> y``."""
    return lambda x, dy, *weights: apply(x, *weights)


def with_gradients(apply: Callable[..., jax.Array]) -> Callable[..., Any]:
    """Returns ``(x, dy, *weights) -> (y, dx, *dweights)``, gradients of <y, dy>."""

    def both(x, dy, *weights):
        y, pull = jax.vjp(apply, x, *weights)
        return y, *pull(dy)

    return both


def _dense_chain(
    x: jax.Array, *matrices: jax.Array, activation: Callable[..., jax.Array] | None
) -> jax.Array:
    for i, matrix in enumerate(matrices):
        x = jnp.matmul(x, matrix)
        if activation is not None and i < len(matrices) - 1:
            x = activation(x)
    return x


def run(
    options: Options, progress: Callable[..., Any], target: devices.Target
) -> Iterator[dict[str, Any]]:
    """Compiles every form at every size, forward and forward + backward."""
    modes = {FORWARD: forward_only, BOTH: with_gradients}
    total = len(options.sizes) * len(modes)
    with progress(total, f"estimate monarch, {target.name}") as tick:
        for n, nblocks in options.sizes:
            found = forms(n, nblocks, options, target.platform)
            for mode, transform in modes.items():
                compiler = {
                    name: devices.figures(
                        target, transform(form.apply), form.x, form.x, *form.weights
                    )
                    for name, form in found.items()
                }
                tick(f"n={n}, {nblocks} blocks, {mode}")
                yield {
                    "case": {"n": n, "nblocks": nblocks, "mode": mode},
                    "data": {"name": "shapes alone", "digest": digest()},
                    "dtype": options.dtype,
                    "shapes": {
                        name: [list(form.x.shape)]
                        + [list(w.shape) for w in jax.tree.leaves(form.weights)]
                        for name, form in found.items()
                    },
                    "seed": None,
                    "samples": {},
                    "layers": {name: _layers(name) for name in found},
                    "compiler": compiler,
                }


def _layers(name: str) -> int:
    return LAYERS if BASELINES[name] != DENSE else 1


def speed_up(record: Record, name: str, figure: str = "optimal_seconds") -> float:
    """Divides the figure of the dense map, or chain, by that of ``name``."""
    compiler = record["compiler"]
    return compiler[BASELINES[name]][figure] / compiler[name][figure]


def timed(records: list[Record]) -> bool:
    """Tells whether the compiler gave times: those of GPUs do not."""
    return all(
        "optimal_seconds" in figures
        for record in records
        for figures in record["compiler"].values()
    )


def _label(record: Record) -> str:
    case = record["case"]
    return f"{case['n']}, {case['nblocks']} blocks, {case['mode']}"


def tables(records: list[Record]) -> list[Table]:
    """Writes the compilers' figures, a table for the ratios and one for the rest."""
    if timed(records):
        return [_speed_ups(records), _times(records)]
    return [_kernels(records)]


def _about(records: list[Record]) -> str:
    tokens = records[0]["shapes"][DENSE][0][0]
    return (
        f"Compiler's estimate, not a measurement. {tokens:,} tokens, "
        f"{records[0]['dtype']}; a chain is {LAYERS} layers, given back block-major."
    )


def _speed_ups(records: list[Record]) -> Table:
    """Writes the speed-ups over dense, a line for each form."""
    rows = [
        (name, *(f"{speed_up(record, name):.2f}" for record in records))
        for name, baseline in BASELINES.items()
        if name != baseline
    ]
    bounds = [f"{record['case']['nblocks'] / 2:g}" for record in records]
    aims = "; ".join(
        f"{n}, {nblocks} blocks: {', '.join(map(str, AIMS[n, nblocks].values()))}"
        for n, nblocks in dict.fromkeys(map(_size, records))
        if (n, nblocks) in AIMS
    )
    note = f"{_about(records)} From optimal_seconds, a roofline of FLOPs and bytes."
    if aims:
        note += (
            f" Aimed at, {CHAIN} {FORWARD} and {BOTH}, then {TOKENS} {FORWARD}: {aims}."
        )
    return Table(
        "Monarch product, compiler's estimate of the speed-up over dense",
        ("product", *map(_label, records)),
        [*rows, ("FLOP bound", *bounds)],
        note,
    )


def _times(records: list[Record]) -> Table:
    """Writes what the TPU's compiler says of every program."""
    rows = []
    for record in records:
        for name in BASELINES:
            figures, layers = record["compiler"][name], record["layers"][name]
            rows.append(
                (
                    _label(record),
                    name,
                    f"{1e6 * figures['optimal_seconds'] / layers:.0f}",
                    f"{speed_up(record, name):.2f}",
                    f"{figures['cycles'] / layers / 1e3:.0f}",
                    f"{speed_up(record, name, 'cycles'):.2f}",
                    _giga(figures["flops"] / layers),
                    f"{figures['bytes'] / layers / 1e6:.0f}",
                    f"{figures['temporary_bytes'] / 1e6:.0f}",
                )
            )
    header = (
        "n, nblocks, mode",
        "product",
        "optimal us",
        "speed-up",
        "kcycles",
        "speed-up by cycles",
        "GFLOP",
        "MB moved",
        "temp MB",
    )
    note = (
        f"{_about(records)} Times, cycles, GFLOP and MB moved are of one layer, "
        "temporary memory of the program. Speed-up: dense, or the dense chain, over "
        "this. The cycles are what the scheduler expects of the operations one after "
        "the other; unlike the roofline they know the width of the matrix unit, which "
        "narrow blocks do not fill."
    )
    return Table("Monarch product, compiler's estimate", header, rows, note)


def _kernels(records: list[Record]) -> Table:
    """Writes what the GPU's compiler says of every program."""
    rows = []
    for record in records:
        for name in BASELINES:
            figures = record["compiler"][name]
            rows.append(
                (
                    _label(record),
                    name,
                    figures["gemms"],
                    figures["passes"],
                    f"{figures['passes_bytes'] / 1e6:.0f}",
                    _giga(figures["flops"]),
                    f"{figures['temporary_bytes'] / 1e6:.0f}",
                    f"{figures['total_bytes'] / 1e6:.0f}",
                )
            )
    header = (
        "n, nblocks, mode",
        "product",
        "GEMM fusions",
        "other kernels",
        "they write MB",
        "GFLOP",
        "temp MB",
        "with arguments MB",
    )
    note = (
        f"{_about(records)} No time: this compiler estimates none. The other kernels "
        "are transposes, copies, masks and sums of partial products; what GEMM fusions "
        "absorb is not among them."
    )
    return Table("Monarch product, compiler's kernels and memory", header, rows, note)


def _giga(value: float) -> str:
    """Writes thousand millions, to three digits at least.

    Examples:
      >>> _giga(8.59e9), _giga(13_194e9)
      ('8.59', '13,194')
    """
    return f"{value / 1e9:,.0f}" if value >= 1e11 else f"{value / 1e9:.3g}"


def _size(record: Record) -> tuple[int, int]:
    return record["case"]["n"], record["case"]["nblocks"]


def verdict(records: list[Record]) -> Verdict:
    """Rules *shown* if every speed-up aimed at is reached, by ``optimal_seconds``."""
    if not timed(records):
        return Verdict("not shown", "the compiler estimates no time for this device.")
    found, every, cycles = [], [], []
    for record in records:
        mode = record["case"]["mode"]
        for (name, aimed_mode), aim in AIMS.get(_size(record), {}).items():
            if mode == aimed_mode:
                found.append((speed_up(record, name), aim))
                cycles.append(speed_up(record, name, "cycles"))
                every.append(f"{found[-1][0]:.2f} of {aim} ({name}, {_label(record)})")
    if not found:
        return Verdict("not shown", "no size of these records has an aim.")
    reached = sum(value >= aim for value, aim in found)
    why = (
        f"by the compiler's roofline, not by a measurement, {reached} of {len(found)} "
        f"aims are reached: {'; '.join(every)} (rule: all). By the scheduler's cycles "
        f"the same speed-ups are {min(cycles):.2f} to {max(cycles):.2f}."
    )
    if reached == len(found):
        return Verdict("shown", why)
    slower = all(value < 1 for value, _ in found)
    return Verdict("reversed" if slower else "not shown", why)


def draw(records: list[Record]) -> Figure:
    """Draws the speed-ups or, where there are no times, the memory."""
    rows: dict[str, dict[str, list[float]]] = {}
    for record in records:
        compiler = record["compiler"]
        rows[_label(record)] = {
            name: [
                speed_up(record, name)
                if timed(records)
                else compiler[name]["total_bytes"] / 1e6
            ]
            for name in DRAWN
        }
    if timed(records):
        return dots(rows, xlabel="compiler's estimate: speed-up over dense")
    return dots(rows, xlabel="compiler's estimate: memory with arguments, MB")
