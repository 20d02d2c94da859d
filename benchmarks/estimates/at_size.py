"""Training steps of GPTs on many TPU chips, as their compiler sees them.

Whole sharded steps (loss, gradient, optimizer; state donated) are compiled for TPU v5p
meshes that need not be here: memory of a chip, operations, messages between chips, and
the cycles that the compiler's scheduler expects. Nothing is run.

The models are ``jaxlab.models.GPT`` with the blocks stacked and recomputed, bfloat16
activations, float32 parameters, context 2,048, linear layers without biases (a bias is
a row more of FishLeg's matrices, and 2,049 rows divide by nothing); the state is cut by
``tensor_parallel()`` over at most 16 chips, rows over all. In weak scaling a chip has
4 sequences; in strong scaling the batch has 512, in micro-batches of 4 a chip.

FishLeg's auxiliary step is a loop whose count only the run knows: "late" is a step
without it, "auxiliary" one with it, as every tenth is; late steps are what is drawn.
"""

import concurrent.futures
import dataclasses
import functools
import math
import multiprocessing
import os
from collections.abc import Callable, Iterator
from typing import Any

from matplotlib.figure import Figure

from benchmarks import devices
from benchmarks.results import Record, digest
from benchmarks.tables import Table, Verdict

CLAIM = (
    "By its compiler, a training step of a GPT of 0.1, 1.3 or 13 billion parameters, "
    "dense or Monarch, with AdamW, the gradient-norm penalty or FishLeg, fits on TPU "
    "v5p chips and keeps at least 90 % of its speed from 4 chips to 512 with 4 "
    "sequences a chip."
)
PLATFORMS = ("tpu",)

MEMORY = 95e9  # of a chip, bytes
CLOCK = 1.75e9  # cycles a second: 459 TFLOP/s over 8 units of 128 x 128
PEAK = 459e12  # FLOP/s of a chip in bfloat16
LINKS = 600e9  # bytes a second into and out of a chip: 4,800 Gbit/s
VOCABULARY, CONTEXT = 32_768, 2_048
STRONG = 512  # sequences in all
KEPT = 0.9
SHARED = 16  # chips that share one copy of the state, at most
# Width, layers, heads.
SIZES = {
    "toy": (256, 2, 2),
    "0.1B": (768, 12, 12),
    "1.3B": (2048, 24, 16),
    "13B": (5120, 40, 40),
}
TOPOLOGIES = {4: "v5p:2x2x1", 64: "v5p:4x4x4", 512: "v5p:8x8x8"}
NAMES = {"adamw": "AdamW", "gnp": "GNP + AdamW", "fishleg": "FishLeg"}


@dataclasses.dataclass(frozen=True)
class Case:
    size: str
    mlp: str
    optimizer: str
    chips: int
    sequences: int = 4  # of a chip, in a micro-batch
    accumulate: int = 1
    scaling: str = "weak"


@dataclasses.dataclass(frozen=True)
class Options:
    cases: tuple[Case, ...]
    context: int = CONTEXT
    vocabulary: int = VOCABULARY
    effort: float = 0.0  # of the compiler, -1 to 1


def _cases() -> tuple[Case, ...]:
    both = ("dense", "monarch")
    weak = [
        Case(size, mlp, "adamw", chips)
        for size in ("0.1B", "1.3B", "13B")
        for mlp in both
        for chips in TOPOLOGIES
    ]
    strong = [
        Case(size, "dense", "adamw", 4, 4, 32, "strong") for size in ("1.3B", "13B")
    ]
    strong += [
        Case(size, "dense", "adamw", 64, 4, 2, "strong") for size in ("1.3B", "13B")
    ]
    strong += [
        Case(size, "dense", "adamw", 512, 1, 1, "strong") for size in ("1.3B", "13B")
    ]
    gnp = [
        Case(size, mlp, "gnp", 64) for size in ("0.1B", "1.3B", "13B") for mlp in both
    ]
    fishleg = [Case(size, "dense", "fishleg", 64) for size in ("0.1B", "1.3B", "13B")]
    fishleg += [Case("1.3B", "monarch", "fishleg", 64)]
    far = [Case("1.3B", "dense", "gnp", 512)]
    # Long ones first, so that no process is left with one of them at the end.
    return (*fishleg, *far, *gnp, *strong, *weak)


PRESETS = {
    "small": Options(
        tuple(
            Case("toy", mlp, name, 4)
            for mlp, name in (("dense", "adamw"), ("monarch", "gnp"))
        ),
        context=128,
        vocabulary=512,
        effort=-1.0,
    ),
    "full": Options(_cases()),
}


def step_and_shapes(case: Case, mesh: Any, *, context: int, vocabulary: int):
    """Makes the step of a case, and the shapes and shardings of its arguments.

    Args:
      case: what to compile.
      mesh: of ``make_mesh``.
      context: tokens of a sequence.
      vocabulary: number of tokens.

    Returns:
      The step; shapes of (state, batch); their shardings.
    """
    import jax
    import jax.numpy as jnp
    import optax
    from flax import nnx

    from jaxlab import training
    from jaxlab.layers import MonarchLinear
    from jaxlab.likelihoods import Categorical
    from jaxlab.models import GPT
    from jaxlab.objective import Objective
    from jaxlab.optimizers import fishleg
    from jaxlab.sharpness import gradient_norm_penalty

    width, layers, heads = SIZES[case.size]
    rows = training.batch_sharding(mesh)
    dense = functools.partial(nnx.Linear, use_bias=False, dtype=jnp.bfloat16)
    monarch = functools.partial(
        MonarchLinear, nblocks=16, use_bias=False, dtype=jnp.bfloat16
    )
    make = lambda: GPT(
        vocabulary=vocabulary,
        context=context,
        width=width,
        layers=layers,
        heads=heads,
        linear=dense,
        feedforward_linear=monarch if case.mlp == "monarch" else dense,
        scan=True,
        remat=True,
        dtype=jnp.bfloat16,
        activation_sharding=rows,
        rngs=nnx.Rngs(0),
    )
    graph, params = nnx.split(nnx.eval_shape(make), nnx.Param)
    params = nnx.to_pure_dict(params)

    def apply_fn(params, state, inputs, *, key, train):
        return nnx.merge(graph, params)(inputs), state

    adamw = optax.adamw(3e-4, weight_decay=0.1)
    optimizer = {
        "adamw": lambda: adamw,
        "gnp": lambda: optax.chain(gradient_norm_penalty(0.8, 0.05), adamw),
        "fishleg": lambda: fishleg(weight_decay=1e-5, rule=FISHLEG_RULE),
    }[case.optimizer]()
    step = training.make_train_step(
        Objective(apply_fn, Categorical()),
        optimizer,
        accumulate=case.accumulate,
        jit=False,
    )
    make_state = lambda key, params: training.create_state(key, params, optimizer)
    state = jax.eval_shape(make_state, jax.random.key(0), params)
    sequences = case.sequences * case.accumulate * case.chips
    tokens = jax.ShapeDtypeStruct((sequences, context), jnp.int32)
    plan = training.tensor_parallel()
    shardings = (plan.shardings(state, mesh), (rows, rows))
    return step, (state, (tokens, tokens)), shardings


# Monarch factors of stacked layers are matrices along their last two axes; vectors of
# stacked layers are no matrices, and the table has one row for each token.
FISHLEG_RULE = {
    r"/w[12]$": "stacked",
    r"(bias|norm\d?/scale)$": "diagonal",
    r"embedding|positions": "diagonal",
}


def compile_case(case: Case, options: Options) -> dict[str, Any]:
    """Compiles one step and collects what its compiler says of a chip."""
    devices.prepare()
    import jax
    from jax.experimental import topologies
    from jax.sharding import NamedSharding, PartitionSpec

    from benchmarks import flops, hlo
    from jaxlab import training

    jax.config.update("jax_exec_time_optimization_effort", options.effort)
    topology = topologies.get_topology_desc(
        platform="tpu", topology_name=TOPOLOGIES[case.chips]
    )
    shared = min(SHARED, case.chips)
    mesh = training.make_mesh(fsdp=shared, devices=topology.devices)
    step, shapes, shardings = step_and_shapes(
        case, mesh, context=options.context, vocabulary=options.vocabulary
    )
    whole = NamedSharding(mesh, PartitionSpec())
    jitted = jax.jit(
        step,
        in_shardings=shardings,
        out_shardings=(shardings[0], whole),
        donate_argnums=0,
    )
    traced = jitted.trace(*shapes)
    found = {
        "params": sum(leaf.size for leaf in jax.tree.leaves(shapes[0].params)),
        "tokens": math.prod(shapes[1][0].shape),
    }
    try:
        compiled = devices.compiled(traced.lower(lowering_platforms=("tpu",)))
    except jax.errors.JaxRuntimeError as error:
        return found | {"refused": refusal(str(error))}
    memory = compiled.memory_analysis()
    program = hlo.Program(compiled.as_text())
    found |= {
        "state_bytes": memory.argument_size_in_bytes,
        "peak_bytes": memory.argument_size_in_bytes + memory.temp_size_in_bytes,
    }
    for name, loops in (("late", 0), ("auxiliary", 1)):
        sent: dict[str, float] = {}
        for message in program.messages(open_loops=loops):
            sent[message.kind] = sent.get(message.kind, 0.0) + message.sent
        found[name] = {
            "cycles": program.cycles(open_loops=loops),
            "flops": flops.product_flops(traced.jaxpr, open_loops=loops) / case.chips,
            "sent": sent,
        }
    return found


def refusal(message: str) -> str:
    """Reads from the compiler's message that a program is too large.

    Raises:
      ValueError: if it says something else.

    Examples:
      >>> refusal("RESOURCE_EXHAUSTED: Ran out of memory on HBM, 139.20G exceeds.")
      'Ran out of memory on HBM, 139.20G exceeds.'
    """
    word, _, rest = message.partition(": ")
    if word != "RESOURCE_EXHAUSTED":
        raise ValueError(message)
    return rest.splitlines()[0]


def run(
    options: Options, progress: Callable[..., Any], target: devices.Target
) -> Iterator[dict[str, Any]]:
    """Compiles every case, each in a process of its own."""
    workers = min(os.cpu_count() or 1, len(options.cases))
    context = multiprocessing.get_context("spawn")
    with (
        progress(len(options.cases), "estimate at_size") as tick,
        concurrent.futures.ProcessPoolExecutor(
            workers, mp_context=context, max_tasks_per_child=1
        ) as pool,
    ):
        jobs = {
            pool.submit(compile_case, case, options): case for case in options.cases
        }
        found = {}
        for job in concurrent.futures.as_completed(jobs):
            found[jobs[job]] = job.result()
            tick(_label(dataclasses.asdict(jobs[job])))
    for case in options.cases:
        yield {
            "case": dataclasses.asdict(case),
            "data": {"name": "shapes alone", "digest": digest()},
            "dtype": "bfloat16 activations, float32 parameters",
            "shapes": {
                "context": options.context,
                "vocabulary": options.vocabulary,
                "model": list(SIZES[case.size]),
            },
            "seed": None,
            "samples": {},
            "effort": options.effort,
            "compiler": found[case],
        }


def seconds(record: Record, step: str = "late") -> tuple[float, float]:
    """Gives the time of the operations and that of the messages, apart."""
    figures = record["compiler"][step]
    return figures["cycles"] / CLOCK, sum(figures["sent"].values()) / LINKS


def rate(record: Record) -> float:
    """Gives tokens a second of a chip, messages behind operations or hidden by them.

    The slower of the two counts: XLA overlaps messages with operations, and how well
    only a run can tell.
    """
    return record["compiler"]["tokens"] / record["case"]["chips"] / max(seconds(record))


def _label(case: dict[str, Any]) -> str:
    return (
        f"{case['size']} {case['mlp']}, {NAMES[case['optimizer']]}, "
        f"{case['chips']} chips, {case['scaling']}"
    )


def _compiled(records: list[Record]) -> list[Record]:
    return [record for record in records if "refused" not in record["compiler"]]


def _ordered(records: list[Record]) -> list[Record]:
    order = lambda name, value: list(name).index(value)
    return sorted(
        records,
        key=lambda r: (
            r["case"]["scaling"] == "strong",
            order(SIZES, r["case"]["size"]),
            r["case"]["mlp"],
            order(NAMES, r["case"]["optimizer"]),
            r["case"]["chips"],
        ),
    )


def tables(records: list[Record]) -> list[Table]:
    """Writes what the compiler says of every step."""
    rows, large = [], []
    for record in _ordered(records):
        case, figures = record["case"], record["compiler"]
        if "refused" in figures:
            large.append(f"{_label(case)}: {figures['refused']}")
            continue
        steps = ("late", "auxiliary") if case["optimizer"] == "fishleg" else ("late",)
        for step in steps:
            own, links = seconds(record, step)
            flops = figures[step]["flops"]
            kinds = figures[step]["sent"]
            name = NAMES[case["optimizer"]]
            rows.append(
                (
                    f"{case['size']} {case['mlp']}",
                    f"{name}, {step}" if len(steps) > 1 else name,
                    case["scaling"],
                    case["chips"],
                    f"{figures['params'] / 1e9:.3g}",
                    f"{figures['tokens'] / case['chips']:,.0f}",
                    f"{figures['state_bytes'] / 1e9:.1f}",
                    f"{figures['peak_bytes'] / 1e9:.1f}",
                    f"{flops / 1e12:.3g}",
                    f"{1e3 * own:,.0f}",
                    f"{100 * flops / PEAK / own:.0f}",
                    f"{sum(kinds.values()) / 1e9:.2f}",
                    f"{1e3 * links:,.0f}",
                    ", ".join(f"{k} {v / 1e9:.2f}" for k, v in sorted(kinds.items())),
                )
            )
    header = (
        "model",
        "optimizer",
        "scaling",
        "chips",
        "G params",
        "tokens a chip",
        "state GB",
        "peak GB",
        "TFLOP",
        "ms by cycles",
        "% of peak",
        "GB sent",
        "ms on links",
        "GB by kind",
    )
    note = (
        "Compiler's estimates for TPU v5p, not measurements; all of one chip and one "
        f"step. A chip has {MEMORY / 1e9:.0f} GB. Cycles: what the scheduler expects "
        f"of the operations one by one, at {CLOCK / 1e9} GHz. TFLOP: products as "
        "written, what is computed again included; % of peak is of "
        f"{PEAK / 1e12:.0f} TFLOP/s. Sent: by ring algorithms, at {LINKS / 1e9:.0f} "
        "GB/s a chip in all directions together, which no message reaches. FishLeg's "
        "auxiliary step is every tenth, late in training."
    )
    if large:
        note += f" Too large for a chip, in the compiler's words: {' '.join(large)}"
    return [Table("Training steps at size, compiler's estimate", header, rows, note)]


def verdict(records: list[Record]) -> Verdict:
    """Rules *shown* if every step fits and weak scaling keeps its speed."""
    refused = [_label(r["case"]) for r in records if "refused" in r["compiler"]]
    records = _compiled(records)
    peaks = {_label(r["case"]): r["compiler"]["peak_bytes"] for r in records}
    large = [name for name, peak in peaks.items() if peak > MEMORY] + refused
    kept = {}
    weak = {
        (r["case"]["size"], r["case"]["mlp"], r["case"]["chips"]): rate(r)
        for r in records
        if r["case"]["scaling"] == "weak" and r["case"]["optimizer"] == "adamw"
    }
    for size, mlp, chips in weak:
        if chips == 512 and (size, mlp, 4) in weak:
            kept[f"{size} {mlp}"] = weak[size, mlp, 512] / weak[size, mlp, 4]
    fits = f"too large for a chip: {'; '.join(large)}"
    if not large:
        most = max(peaks, key=peaks.__getitem__)
        fits = f"the largest step takes {peaks[most] / 1e9:.1f} GB ({most})"
    speeds = ", ".join(f"{name} {share:.2f}" for name, share in kept.items())
    why = (
        f"by the compiler's estimate, not by a measurement: {fits}; tokens a second "
        f"of a chip at 512 chips over those at 4, with AdamW: {speeds or 'no pair'} "
        f"(rule: all fit, all at least {KEPT})."
    )
    good = not large and kept and min(kept.values()) >= KEPT
    return Verdict("shown" if good else "not shown", why)


def draw(records: list[Record]) -> Figure:
    """Draws weak scaling, strong scaling, and memory of a chip."""
    from benchmarks import plots

    figure = Figure(figsize=(15, 4.4), layout="constrained")
    weak, strong, memory = figure.subplots(1, 3)
    groups: dict[tuple[str, str, str], dict[str, list[Record]]] = {}
    for record in _ordered(_compiled(records)):
        case = record["case"]
        group = groups.setdefault((case["size"], case["mlp"], case["optimizer"]), {})
        group.setdefault(case["scaling"], []).append(record)
    sizes = [s for s in SIZES if any(s == size for size, _, _ in groups)]
    colours = dict(zip(sizes, plots.COLOURS, strict=False))
    marks = {"adamw": "o", "gnp": "s", "fishleg": "^"}
    for (size, mlp, optimizer), found in groups.items():
        label = f"{size} {mlp}, {NAMES[optimizer]}"
        style = {
            "color": colours[size],
            "marker": marks[optimizer],
            "linestyle": "-" if mlp == "dense" else "--",
            "markerfacecolor": colours[size] if mlp == "dense" else "none",
        }
        chips = lambda name: [r["case"]["chips"] for r in found.get(name, [])]  # noqa: B023
        rates = lambda name: [rate(r) / 1e3 for r in found.get(name, [])]  # noqa: B023
        weak.plot(chips("weak"), rates("weak"), label=label, **style)
        if "strong" in found:
            steps = [1e3 * max(seconds(r)) for r in found["strong"]]
            strong.plot(chips("strong"), steps, label=label, **style)
            first = steps[0] * chips("strong")[0]
            strong.plot(
                chips("strong"),
                [first / n for n in chips("strong")],
                color="0.6",
                linestyle=":",
            )
        peaks = [r["compiler"]["peak_bytes"] / 1e9 for r in found.get("weak", [])]
        memory.plot(chips("weak"), peaks, **style)
    memory.axhline(MEMORY / 1e9, color="0.4", linestyle=":")
    for axes, ylabel, title in (
        (weak, "thousand tokens a second, a chip", "weak: 4 sequences a chip"),
        (strong, "ms a step", f"strong: {STRONG} in all (dotted: ideal)"),
        (memory, "GB of a chip", "weak, peak memory (dotted: a chip's)"),
    ):
        axes.set(xlabel="chips", ylabel=ylabel, title=title)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
    figure.legend(*weak.get_legend_handles_labels(), loc="outside right upper")
    figure.suptitle("TPU v5p, by its compiler's estimate; nothing was run")
    return figure
