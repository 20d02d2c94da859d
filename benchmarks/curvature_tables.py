"""Tables, verdict and picture of the speed of curvature."""

import math
from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from benchmarks import timing
from benchmarks.plots import dots
from benchmarks.results import Record
from benchmarks.tables import Table, Verdict

GRADIENT = "gradient"
HVP, GGN = "Hessian product", "GGN product"
OURS, OURS_GGN = "lanczos, Hessian", "lanczos, GGN"
OURS_128 = "lanczos, Hessian, twice the order"
MATFREE, MATFREE_GGN = "matfree full, Hessian", "matfree full, GGN"
MATFREE_NONE = "matfree none, Hessian"
PYHESSIAN = "PyHessian"
EIGENPAIRS, PARTIAL = "top_eigenpairs", "matfree eigh_partial, order doubled"
HINDSIGHT = "matfree eigh_partial, least order in hindsight"
POWER = "deflated power iteration"
OURS_TRACE, TRACEAX = "trace ", "traceax "
SECOND = ", second run"

# Multiples of a gradient to aim at.
AIMS = {
    "MLP-M": {HVP: 1.85, GGN: 1.4, OURS: 2.1, OURS_GGN: 1.65},
    "CNN": {OURS: 1.6, OURS_GGN: 1.6},
}
COMPILATION, GROWTH, FEWER, MEMORY = 1.2, 1.1, 5.0, 0.2


def of(records: list[Record], what: str) -> list[Record]:
    """Picks the records of one part."""
    return [record for record in records if record["case"]["what"] == what]


def in_gradients(record: Record, name: str) -> float:
    """Divides the least time of a side by that of a gradient."""
    samples = record["samples"]
    return timing.best(samples, name) / timing.best(samples, GRADIENT)


def tables(records: list[Record]) -> list[Table]:
    """Writes every part of a run that is there."""
    made = []
    for what, make in _MAKERS.items():
        chosen = of(records, what)
        if chosen:
            made.append(make(chosen))
    return made


def _steps(records: list[Record]) -> Table:
    rows = []
    for record in records:
        samples, aims = record["samples"], AIMS.get(record["case"]["net"], {})
        for name in [name for name in samples if not name.endswith(timing.AGAIN)]:
            ratio = timing.ratio(samples, name, GRADIENT)
            counted = record["flops"]
            per = {OURS: HVP, OURS_GGN: GGN}.get(name, name)
            work = counted.get(per)
            rows.append(
                (
                    record["case"]["net"],
                    name,
                    record["orders"][name],
                    f"{1e3 * timing.best(samples, name):.2f}",
                    f"{in_gradients(record, name):.2f}",
                    str(timing.same_pair(samples, GRADIENT))
                    if name == GRADIENT
                    else str(ratio),
                    aims.get(name, ""),
                    "-" if work is None else f"{work / counted[GRADIENT]:.2f}",
                    _tiny(record["apart"].get(name)),
                    _tiny(record["orthogonality"].get(name)),
                )
            )
    header = (
        "net",
        "what",
        "steps",
        "min ms",
        "gradients (min)",
        "median of ratios",
        "at most",
        "FLOPs of the product",
        "Ritz gap",
        "orthogonality",
    )
    first = records[0]
    versions = ", ".join(f"{k} {v}" for k, v in first["peers"].items()) or "none"
    note = (
        f"Process time of one gradient, product or step; {first['data']['name']}, "
        f"{first['dtype']}, one core, rounds in alternation "
        f"({', '.join(str(len(r['samples'][GRADIENT])) for r in records)}). In the "
        "gradient's row the median is its A/A. Every side is linearised in its own "
        "program, PyHessian before. On the CNN the gradient is driven from Python, "
        "lanczos takes its convolutions as matrix products, and matfree, whose loop "
        "holds convolutions, takes few steps. FLOPs: the compiler's count for one "
        "product over that for one gradient, as convolutions. Ritz gap: to ours among "
        "the largest values, relative to the largest (PyHessian, from another start: "
        f"the largest alone). Orthogonality: max |Q Q^T - I|. Peers: {versions}."
    )
    return Table("Lanczos steps in gradients", header, rows, note)


def _tiny(value: float | None) -> str:
    return "" if value is None else f"{value:.0e}"


def compilation(record: Record) -> dict[str, float]:
    """Gives first runs over matfree's, and compilation at twice the order over ours."""
    samples = record["samples"]
    least = {name: min(values) for name, values in samples.items()}
    compiled = {
        name: least[name] - least[name + SECOND]
        for name in (OURS, OURS_128, MATFREE)
        if name in least
    }
    found = {"growth": compiled[OURS_128] / compiled[OURS]}
    if MATFREE in least:
        found["first"] = least[OURS] / least[MATFREE]
    return found


def _compilation(records: list[Record]) -> Table:
    (record,) = records
    samples, rows = record["samples"], []
    for name in [name for name in samples if not name.endswith(SECOND)]:
        first, second = min(samples[name]), min(samples[name + SECOND])
        rows.append((name, f"{first:.2f}", f"{second:.2f}", f"{first - second:.2f}"))
    ratios = compilation(record)
    over = f"{ratios['first']:.2f}" if "first" in ratios else "-"
    note = (
        f"{record['case']['net']}, order {record['order']}; process time in seconds, "
        f"least of {len(samples[OURS])}. First run over matfree's: {over} (at most "
        f"{COMPILATION}); compilation at twice the order over that at the order: "
        f"{ratios['growth']:.2f} (at most {GROWTH})."
    )
    header = ("what", "first run", "second run", "difference")
    return Table("Compilation of Lanczos", header, rows, note)


def _eigenpairs(records: list[Record]) -> Table:
    (record,) = records
    products, rows = record["products"], []
    for name, count in products.items():
        cut = name == POWER and record["power_pairs"] < record["k"]
        seconds = record["samples"].get(name)
        miss = record["misses"].get(name)
        rows.append(
            (
                name,
                f"> {count}" if cut else count,
                f"{count / products[EIGENPAIRS]:.1f}",
                "-" if miss is None else f"{miss:.2f}",
                "-" if seconds is None else f"{seconds[0]:.1f}",
            )
        )
    note = (
        f"{record['case']['net']}, Hessian, {record['k']} largest pairs, residuals at "
        f"most {record['tol']} of the largest value. matfree's order has to be given: "
        "it is doubled from 2 k, and each try pays its order and a product for each "
        "residual. In hindsight: one run of the least order that would do, its "
        f"residuals not measured. Power iteration found {record['power_pairs']} pairs."
        " Seconds are process time with compilation."
    )
    header = ("what", "products", "over ours", "residual / allowed", "seconds")
    return Table("Eigenpairs", header, rows, note)


def _traces(records: list[Record]) -> Table:
    (record,) = records
    samples, rows = record["samples"], []
    keys = min(map(len, record["errors"].values()))  # the same for all
    for name, errors in record["errors"].items():
        method = name.split()[-1]
        theirs = TRACEAX + method
        both = name != theirs and theirs in samples
        gain = str(timing.ratio(samples, theirs, name)) if both else ""
        root = math.sqrt(sum(e**2 for e in errors[:keys]) / keys)
        times = f"{timing.best(samples, name):.3f}"
        rows.append((name, times, gain, f"{100 * root:.3f}"))
    note = (
        f"{record['case']['net']}, GGN, {record['matvecs']} products, "
        f"{keys} keys; the trace is "
        f"{record['exact']:.6g}, from the gradients of all outputs. Process time."
    )
    header = ("what", "min s", "traceax's time over it", "error, % (rms)")
    return Table("Traces", header, rows, note)


def _wall(records: list[Record]) -> Table:
    (record,) = records
    samples = record["samples"]
    rows = [
        (
            name,
            f"{1e3 * timing.best(samples, name):.2f}",
            f"{in_gradients(record, name):.2f}",
            str(timing.ratio(samples, name, GRADIENT)),
        )
        for name in samples
        if not name.endswith(timing.AGAIN)
    ]
    note = (
        f"{record['case']['net']}, wall-clock time of one gradient or step on "
        f"{record['cores']} cores, {len(samples[GRADIENT])} rounds, with whatever else "
        "the machine did; asynchronous dispatch."
    )
    header = ("what", "min ms", "gradients (min)", "median of ratios")
    return Table("Every core, wall-clock", header, rows, note)


def memory(record: Record) -> float:
    """Gives the measured growth over what the docstring predicts."""
    (grown,) = record["samples"]["peak growth, bytes"]
    return grown / (record["documented"] + record["product"])


def _memory(records: list[Record]) -> Table:
    (record,) = records
    (grown,) = record["samples"]["peak growth, bytes"]
    mega = lambda value: f"{value / 1e6:.0f}"
    order = record["order"]
    rows = [
        ("vectors as documented, order + 7", mega(record["documented"])),
        ("one product, the compiler's count", mega(record["product"])),
        ("measured growth of the peak", mega(grown)),
        ("measured / predicted", f"{memory(record):.2f}"),
    ]
    note = (
        f"GPT with {record['parameters']:,} parameters ({record['sizes']}), one window "
        f"of {record['data']['name']}, Hessian, order {order}, address space limited "
        f"to {record['limit'] / 1e9:.0f} GB. Resident memory in a process of its own, "
        "the second run (the first one compiles): peak less what was held before. "
        f"It took {record['seconds']:.1f} s of process time; orthogonality "
        f"{record['orthogonality']:.0e}. Within {100 * MEMORY:.0f} % is the aim."
    )
    return Table("Memory of Lanczos", ("what", "MB"), rows, note)


_MAKERS: Mapping[str, Any] = {
    "steps": _steps,
    "compilation": _compilation,
    "eigenpairs": _eigenpairs,
    "trace": _traces,
    "every core": _wall,
    "memory": _memory,
}


def verdict(records: list[Record]) -> Verdict:
    """Rules *shown* if Lanczos keeps its limit and beats matfree's on every net."""
    kept, faster, slower, said = [], [], [], []
    for record in of(records, "steps"):
        net, samples = record["case"]["net"], record["samples"]
        limit = AIMS.get(net, {}).get(OURS, math.inf)
        taken = in_gradients(record, OURS)
        kept.append(taken <= limit)
        text = f"{net}: {taken:.2f} gradients (at most {limit})"
        if MATFREE in samples:
            gain = timing.ratio(samples, MATFREE, OURS)
            same = timing.same_pair(samples, GRADIENT)
            faster.append(timing.beyond(gain, same) > 0)
            slower.append(timing.beyond(gain, same) < 0)
            text += f", matfree's time over ours {gain}"
        said.append(text)
    why = f"{'; '.join(said)} (rule: both, on every net, matfree beyond the A/A)."
    if all(kept) and faster and all(faster):
        return Verdict("shown", why)
    return Verdict("reversed" if slower and all(slower) else "not shown", why)


def draw(records: list[Record]) -> Figure:
    """Draws what a step takes in gradients."""
    series = (OURS, OURS_GGN, MATFREE, MATFREE_GGN, PYHESSIAN)
    steps = of(records, "steps")
    series = [name for name in series if all(name in r["samples"] for r in steps)]
    rows = {}
    for record in steps:
        samples = record["samples"]
        gradient = timing.best(samples, GRADIENT)
        rows[record["case"]["net"]] = {
            name: [sample / gradient for sample in samples[name]] for name in series
        }
    figure = dots(rows, xlabel="gradients a step (dot: minimum, line: quartiles)")
    figure.set_size_inches(8, 2 + 0.8 * len(rows))
    return figure
