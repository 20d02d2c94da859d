"""Speed of sharpness: steps of the gradient-norm penalty and of SAM, in steps of SGD.

Beside them stand the exact form, the penalty on every fifth step and optax.contrib.sam
in both modes, each with the same momentum SGD behind it, on the same net and batch, in
the same process. A transparent step is two calls, each with a gradient of its own; the
periodic penalty is timed over whole periods. Before anything is timed, SAM is checked
to move the parameters as optax's does. The compiler counts operations and temporary
memory, SAF's and MESA's too.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
from matplotlib.figure import Figure

from benchmarks import sharpness_sides as made
from benchmarks import timing
from benchmarks.plots import dots
from benchmarks.results import Record
from benchmarks.sharpness_sides import (
    AVERAGE,
    EVERY,
    EXACT,
    GRADIENT,
    MESA,
    OPAQUE,
    PENALTY,
    PERIODIC,
    SAF,
    SAM,
    SGD,
    TRANSPARENT,
    WIDE,
    Net,
)
from benchmarks.tables import Table, Verdict

CLAIM = (
    "On a CPU a step of SAM or of the gradient-norm penalty takes at most 2.05 steps "
    "of SGD on the CNN and GPT-S, SAM's no longer than optax.contrib.sam's, and every "
    "method keeps its limit of operations and memory."
)

TIME = 2.05  # steps of SGD, of PENALTY and SAM
TIMED = ("CNN", "GPT-S")
# Operations, relative to a step of SGD; of SAF and MESA, to the plain gradient.
OPERATIONS = {
    PENALTY: 2.02,
    SAM: 2.02,
    EXACT: 2.95,
    PERIODIC: 1 + 1.02 / EVERY,
    SAF: 1.05,
    MESA: 1.4,
}
# The exact form takes nine matrix products for the gradient's three, and four for two
# in a first layer, whose inputs are data. GPT-S has none such: 3 is its least.
EXACT_ON = ("MLP-S", "CNN")
MEMORY = 2.00  # trees of parameters, to two decimals, of PENALTY and SAM on WIDE
JUDGED = (PENALTY, SAM)
COUNTED = (SGD, PENALTY, SAM, EXACT, OPAQUE, TRANSPARENT)


@dataclasses.dataclass(frozen=True)
class Options:
    nets: tuple[str, ...]
    rounds: int
    sample_seconds: float
    wide: tuple[int, int]  # matrices, and their width
    counted: tuple[str, ...] = COUNTED  # steps on the wide net
    batch_size: int = 128  # of digits
    wide_batch_size: int = 8
    seed: int = 0


PRESETS = {
    "small": Options(
        ("MLP-S",),
        rounds=1,
        sample_seconds=1e-3,
        wide=(2, 32),
        counted=(SGD, PENALTY, SAM),
    ),
    "full": Options(
        ("CNN", "GPT-S", "MLP-S"), rounds=60, sample_seconds=0.03, wide=(8, 1024)
    ),
}


def net_of(name: str, options: Options) -> Net:
    """Makes one of the nets."""
    if name == WIDE:
        layers, width = options.wide
        sizes = {"layers": layers, "width": width}
        return made.wide_net(
            **sizes, batch_size=options.wide_batch_size, seed=options.seed
        )
    if name == "GPT-S":
        return made.text_net(seed=options.seed)
    return made.digits_net(name, batch_size=options.batch_size, seed=options.seed)


def run(options: Options, progress: Callable[..., Any]) -> Iterator[dict[str, Any]]:
    """Times and counts the steps on every net, and counts those of the wide one."""
    with progress(len(options.nets) + 1, "speed sharpness") as tick:
        for name in options.nets:
            net = net_of(name, options)
            running = made.loops(net)
            apart = made.disagreement(net, running)
            samples = step_samples(running, options)
            free = made.free_flops(net) if net.apply_fn else {}
            tick(name)
            fields = {"samples": samples, "apart": apart, "free": free}
            yield _record(net, running, options, **fields)
        net = net_of(WIDE, options)
        running = made.loops(net, options.counted)
        tick(WIDE)
        counted = {name: [loop.cost["temporary"]] for name, loop in running.items()}
        yield _record(net, running, options, samples=counted, apart={}, free={})


def step_samples(
    running: dict[str, made.Loop], options: Options
) -> dict[str, list[float]]:
    """Times all loops in alternation; seconds of a step of training."""
    # Without what the machine did for others; an accelerator's work is no process's.
    clock = time.process_time
    if jax.default_backend() != "cpu":
        clock = time.perf_counter
    found = timing.measure(
        running,
        baseline=SGD,
        rounds=options.rounds,
        sample_seconds=options.sample_seconds,
        clock=clock,
    ).samples
    steps = {name: loop.side.steps for name, loop in running.items()}
    return {
        name: [sample / steps.get(name, 1) for sample in samples]
        for name, samples in found.items()
    }


def _record(
    net: Net, running: dict[str, made.Loop], options: Options, **fields: Any
) -> dict[str, Any]:
    costs = {name: loop.cost for name, loop in running.items()}
    return {
        "case": {"net": net.name, "what": "memory" if net.name == WIDE else "steps"},
        "data": net.data,
        "dtype": "float32",
        "shapes": {"inputs": list(net.batch[0].shape), "parameters": [net.size]},
        "seed": options.seed,
        "bytes": net.bytes,
        "calls": {name: loop.side.calls for name, loop in running.items()},
        "flops": {name: cost["flops"] for name, cost in costs.items()},
        "temporary": {name: cost["temporary"] for name, cost in costs.items()},
        **fields,
    }


def operations(record: Record, name: str) -> float | None:
    """Counts the operations of a step of training, relative to one of SGD.

    The periodic penalty is the mean of its two branches, compiled apart. SAF and MESA
    are relative to the plain gradient. ``None`` where nothing was counted.
    """
    flops, free = record["flops"], record["free"]
    if name in (SAF, MESA, AVERAGE):
        return _over(free.get(name), free.get(GRADIENT))
    if name == PERIODIC:
        with_it = operations(record, PENALTY)
        return None if with_it is None else (with_it + EVERY - 1) / EVERY
    one = _over(flops.get(name), flops.get(SGD))
    return None if one is None else one * (2 if name == TRANSPARENT else 1)


def memory(record: Record, name: str) -> float | None:
    """Gives the temporary memory of a call, in trees of parameters."""
    return _over(record["temporary"].get(name), record["bytes"])


def _over(top: float | None, bottom: float | None) -> float | None:
    return None if top is None or not bottom else top / bottom


def _steps(records: list[Record]) -> list[Record]:
    return [record for record in records if record["case"]["what"] == "steps"]


def tables(records: list[Record]) -> list[Table]:
    """Writes times, operations and memory."""
    return [_times(_steps(records)), _counts(records)]


def _times(records: list[Record]) -> Table:
    rows = []
    for record in records:
        samples, net = record["samples"], record["case"]["net"]
        for name in record["flops"]:
            same = name == SGD
            over = timing.ratio(samples, SAM, name)
            ratio = timing.ratio(samples, name, SGD)
            rows.append(
                (
                    net,
                    name,
                    f"{1e3 * timing.best(samples, name):.3f}",
                    str(timing.same_pair(samples, SGD) if same else ratio),
                    TIME if name in JUDGED and net in TIMED else "",
                    str(over) if name in (OPAQUE, TRANSPARENT) else "",
                )
            )
    first = records[0]
    gaps = [max(r["apart"][n] for n in (OPAQUE, TRANSPARENT)) for r in records]
    seen = min(record["apart"][SGD] for record in records)
    count = len(first["samples"][SGD])
    note = (
        f"Process time of a step of training on one core, {first['dtype']}, "
        f"{count} rounds in alternation, momentum SGD behind everything, buffers "
        "donated; median of the ratios with quartiles. In SGD's row: SGD against "
        f"itself. A transparent step is two calls; {PERIODIC} is the mean over whole "
        f"periods. After {made.CHECKED} steps optax's SAM differs from ours by at most "
        f"{max(gaps):.0e} of the way that the parameters went, SGD by {seen:.2f} at "
        "least."
    )
    header = ("net", "step", "min ms", "time / SGD's", "at most", "sam's time over it")
    return Table("Steps in steps of SGD", header, rows, note)


def _counts(records: list[Record]) -> Table:
    rows = []
    for record in records:
        net = record["case"]["net"]
        for name in (*record["flops"], *(n for n in record["free"] if n != GRADIENT)):
            work, space = operations(record, name), memory(record, name)
            rows.append(
                (
                    net,
                    name,
                    "-" if work is None else f"{work:.3f}",
                    _limit(net, name),
                    "-" if space is None else f"{space:.2f}",
                    f"{MEMORY:.2f}" if net == WIDE and name in JUDGED else "",
                )
            )
    wide = [record for record in records if record["case"]["net"] == WIDE]
    shapes = wide[0]["shapes"] if wide else {}
    note = (
        "The compiler's counts. Operations of a step over those of SGD's; for "
        f"{PERIODIC} the mean of a step with and one without, compiled apart; for SAF "
        "(its buffer included) and MESA the gradient of the loss over the plain one. "
        "Memory: what one call takes beside its arguments and results, in the size of "
        f"the parameters; on the small nets activations outweigh them. {WIDE}: "
        f"parameters {shapes.get('parameters')}, inputs {shapes.get('inputs')}. The "
        "exact form takes nine matrix products for the gradient's three, in a layer on "
        "data four for two: on GPT-S, which has no such layer, no limit is set."
    )
    header = ("net", "step", "operations", "at most", "memory", "at most")
    return Table("Operations and memory", header, rows, note)


def _limit(net: str, name: str) -> str:
    if net == WIDE or (name == EXACT and net not in EXACT_ON):
        return ""
    limit = OPERATIONS.get(name)
    return "" if limit is None else f"{limit:.3f}"


def verdict(records: list[Record]) -> Verdict:
    """Rules *shown* if every limit is kept and SAM is nowhere slower than optax's.

    Limits: TIME on the nets TIMED (medians), OPERATIONS on every net but WIDE (EXACT on
    EXACT_ON), MEMORY on WIDE. Slower: the median of the ratios lies above 1 and above
    the A/A spread of SGD. *Reversed*: SAM is slower than both of optax's on every net.
    """
    timed, kept, slower = [], [], []
    steps = _steps(records)
    said: dict[str, list[str]] = {"time": [], "optax": [], "work": [], "memory": []}
    for record in steps:
        net, samples = record["case"]["net"], record["samples"]
        if net in TIMED:
            timed.append(net)
            found = [timing.ratio(samples, name, SGD).median for name in JUDGED]
            kept.append(max(found) <= TIME)
            numbers = " and ".join(f"{number:.2f}" for number in found)
            said["time"].append(f"{net} {numbers}")
        same = timing.same_pair(samples, SGD)
        pairs = [timing.ratio(samples, SAM, name) for name in (OPAQUE, TRANSPARENT)]
        lost = [pair.median > 1 and timing.beyond(pair, same) > 0 for pair in pairs]
        kept.append(not any(lost))
        slower.append(all(lost))
        numbers = " and ".join(f"{pair.median:.3f}" for pair in pairs)
        said["optax"].append(f"{net} {numbers} (A/A up to {same.upper:.3f})")
    for name, limit in OPERATIONS.items():
        found = _worst(
            operations(record, name)
            for record in steps
            if (name != EXACT or record["case"]["net"] in EXACT_ON)
            and (name not in (SAF, MESA) or record["free"])
        )
        kept.append(found <= limit)
        said["work"].append(f"{name} {found:.3f} (at most {limit:.3f})")
    for record in steps:
        net, found = record["case"]["net"], operations(record, EXACT)
        if net not in EXACT_ON and found is not None:
            said["work"].append(f"{EXACT} on {net} {found:.3f} (no limit)")
    wide = [record for record in records if record["case"]["net"] == WIDE]
    for name in JUDGED:
        found = _worst(memory(record, name) for record in wide)
        kept.append(round(found, 2) <= MEMORY)
        said["memory"].append(f"{name} {found:.3f}")
    why = (
        f"time of penalty and sam over SGD's {', '.join(said['time'])} (at most "
        f"{TIME}); sam's over optax's, opaque and transparent, "
        f"{', '.join(said['optax'])}; operations over SGD's, on the worst net, "
        f"{', '.join(said['work'])}; memory in trees of parameters "
        f"{', '.join(said['memory'])} (at most {MEMORY:.2f} to two decimals). "
        "Rule: all of it."
    )
    if set(timed) == set(TIMED) and all(kept):
        return Verdict("shown", why)
    return Verdict("reversed" if slower and all(slower) else "not shown", why)


def _worst(found: Any) -> float:
    """Gives the largest; infinity if there is none or one was not counted."""
    return max((math.inf if x is None else x for x in found), default=math.inf)


def draw(records: list[Record]) -> Figure:
    """Draws the time of a step in steps of SGD."""
    series = (SAM, OPAQUE, TRANSPARENT, PENALTY, PERIODIC, EXACT)
    rows = {}
    for record in _steps(records):
        samples = record["samples"]
        unit = timing.best(samples, SGD)
        rows[record["case"]["net"]] = {
            name: [sample / unit for sample in samples[name]] for name in series
        }
    figure = dots(rows, xlabel="steps of SGD (dot: minimum, line: quartiles)")
    figure.set_size_inches(8, 2 + 0.9 * len(rows))
    return figure
