"""Speed of curvature: products, Lanczos, eigenpairs and traces, in gradients.

The yardstick is the process time of one gradient of the same loss, timed in the same
rounds in an equal loop. Everything runs on nets that have been trained for a while.
matfree and traceax take part where they are installed, and PyHessian does where it is
(it is in no extra): same net, same parameters, same process. Before anything is timed
the sides are checked to give the same Ritz values, and ours an orthonormal basis.
"""

import dataclasses
import functools
import importlib
import importlib.util
import time
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from benchmarks import curvature_sides as sides
from benchmarks import curvature_tables as shown
from benchmarks import curvature_worker as worker
from benchmarks import timing
from benchmarks.curvature_sides import Net
from benchmarks.curvature_tables import (
    GGN,
    GRADIENT,
    HVP,
    MATFREE,
    MATFREE_GGN,
    MATFREE_NONE,
    OURS,
    OURS_128,
    OURS_GGN,
    PYHESSIAN,
    TRACEAX,
)
from benchmarks.progress import Tick
from benchmarks.results import Record
from benchmarks.tables import Table, Verdict
from jaxlab.curvature.eigenpairs import top_eigenpairs
from jaxlab.curvature.lanczos import lanczos, ritz
from jaxlab.curvature.trace import trace

CLAIM = (
    "On a CPU a step of fully re-orthogonalised Lanczos on the Hessian takes at most "
    "2.1 gradients on MLP-M and 1.6 on the CNN, and less time than matfree's."
)

SAME_RITZ = 1e-3  # of the largest value, among the largest ones, between packages
ORTHOGONAL = 1e-5
_TEN_MILLION = {"width": 640, "layers": 2, "heads": 10, "context": 64}
PARTS = ("compilation", "eigenpairs", "trace", "every core", "memory")


@dataclasses.dataclass(frozen=True)
class Options:
    models: tuple[str, ...]
    rounds: int
    parts: tuple[str, ...] = PARTS  # beside the steps
    few: bool = False  # only gradient and Lanczos on the Hessian, ours and matfree's
    methods: tuple[str, ...] = ("hutchinson", "xtrace", "xnystrace")  # of the trace
    examples: int = 1797
    training_steps: int = 100
    order: int = 64
    slow_order: int = 2  # of peers whose loops hold convolutions
    slow_rounds: int = 3  # of nets with convolutions
    compilations: int = 2
    k: int = 10
    most_products: int = 2000
    matvecs: int = 64
    traces: int = 12
    text: tuple[tuple[str, int], ...] = tuple(_TEN_MILLION.items())  # sizes of the GPT
    text_order: int = 32
    text_limit: int = 8 * 10**9
    wall_rounds: int = 3
    seed: int = 0


PRESETS = {
    "small": Options(
        ("64-16-10",),
        rounds=1,
        parts=("eigenpairs", "trace"),
        few=True,
        methods=("xtrace",),
        examples=64,
        training_steps=3,
        order=8,
        k=2,
        most_products=200,
        matvecs=8,
        traces=1,
    ),
    "full": Options(("MLP-M", "CNN"), rounds=6),
}


def peer(name: str, package: str) -> ModuleType | None:
    """Imports a module of ``benchmarks.peers``; ``None`` without its package."""
    if importlib.util.find_spec(package) is None:
        return None
    return importlib.import_module(f"benchmarks.peers.{name}")


def net_of(model: str, options: Options) -> Net:
    """Makes one of the trained nets."""
    return sides.digits_net(
        model,
        examples=options.examples,
        steps=options.training_steps,
        seed=options.seed,
    )


class Steps(NamedTuple):
    """What a step of each side takes, and how far they agree."""

    samples: dict[str, list[float]]
    orders: dict[str, int]
    apart: dict[str, float]
    orthogonality: dict[str, float]


def step_samples(net: Net, options: Options, clock: Callable[[], float]) -> Steps:
    """Times a gradient, a product and a step of every Lanczos.

    Args:
      net: what to differentiate.
      options: of the run.
      clock: seconds of process time, or on the wall.

    Raises:
      ValueError: if the sides do not compute the same thing.
    """
    convolves = "convolutions" in net.params
    order, slow = options.order, options.slow_order if convolves else options.order
    hessian, ggn, start = net.hessian, net.ggn, net.start(options.seed)
    matfree, few = peer("matfree_lanczos", "matfree"), options.few
    pyhessian = None if few else peer("pyhessian_lanczos", "pyhessian")
    loop = max(1, order // 4) if convolves else order
    calls = {
        GRADIENT: (sides.gradients(net, loop, compiled=not convolves), loop),
        OURS: (lambda: lanczos(hessian, start, order=order), order),
    }
    if not few:
        calls[OURS_GGN] = lambda: lanczos(ggn, start, order=order), order
        if not convolves:
            for name, operator in ((HVP, hessian), (GGN, ggn)):
                run = functools.partial(sides.products, operator, start, count=order)
                calls[name] = run, order
    if matfree:
        run = functools.partial(matfree.lanczos, order=slow, reortho="full")
        calls[MATFREE] = functools.partial(run, hessian, start), slow
        if not few:
            calls[MATFREE_GGN] = functools.partial(run, ggn, start), slow
        if not few and not convolves:
            run = functools.partial(run, hessian, start, reortho="none")
            calls[MATFREE_NONE] = run, slow
    if pyhessian:
        calls[PYHESSIAN] = pyhessian.lanczos(net, order), order
    results = {name: jax.block_until_ready(call()) for name, (call, _) in calls.items()}
    apart = _gaps(results)
    orthogonality = {
        name: sides.orthogonality(results[name].basis)
        for name in (OURS, OURS_GGN)
        if name in results
    }
    if not max(orthogonality.values()) <= ORTHOGONAL:
        raise ValueError(f"{net.name}: a basis is not orthonormal: {orthogonality}.")

    def sampler(call, count):
        begin = clock()
        jax.block_until_ready(call())
        return (clock() - begin) / count

    samplers = {
        name: functools.partial(sampler, call, count)
        for name, (call, count) in calls.items()
    }
    rounds = options.slow_rounds if convolves else options.rounds
    samples = timing.interleave(samplers, baseline=GRADIENT, rounds=rounds)
    orders = {name: count for name, (_, count) in calls.items()}
    return Steps(samples, orders, apart, orthogonality)


def _gaps(results: dict[str, Any]) -> dict[str, float]:
    """Compares the Ritz values of each peer with ours at the same order.

    Raises:
      ValueError: if they differ, relative to the largest.
    """
    gaps = {}
    pairs = ((MATFREE, OURS), (MATFREE_GGN, OURS_GGN))
    for name, own in ((a, b) for a, b in pairs if a in results):
        _, alpha, beta = results[name]
        ours = sides.tridiagonal(results[own].alpha, results[own].beta)
        size = len(alpha)
        other = sides.tridiagonal(alpha, beta)
        gaps[name] = sides.apart(ours[:size, :size], other)
    if PYHESSIAN in results:  # another start: only what has converged agrees
        top = float(ritz(results[OURS])[0][-1])
        gaps[PYHESSIAN] = abs(float(results[PYHESSIAN][-1]) / top - 1)
    limits = {PYHESSIAN: 1.0 if len(results[OURS].alpha) < 32 else SAME_RITZ}
    wrong = {k: v for k, v in gaps.items() if not v <= limits.get(k, SAME_RITZ)}
    if wrong:
        raise ValueError(f"the Ritz values differ, by {wrong}: nothing to compare.")
    return gaps


def run(options: Options, progress: Callable[..., Any]) -> Iterator[dict[str, Any]]:
    """Times the steps on every net, and the rest on the first one."""
    total = len(options.models) + len(options.parts)
    with progress(total, "speed curvature") as tick:
        nets = [net_of(model, options) for model in options.models]
        for net in nets:
            yield _steps(net, options, tick)
        for part in options.parts:
            yield _PARTS[part](nets[0], options, tick)


def _record(net: Net, options: Options, what: str, **fields: Any) -> dict[str, Any]:
    return {
        "case": {"net": net.name, "what": what},
        "data": net.data,
        "dtype": "float32",
        "shapes": {"inputs": list(net.batch[0].shape), "parameters": [net.size]},
        "seed": options.seed,
        "peers": _versions(options),
        **fields,
    }


def _versions(options: Options) -> dict[str, str]:
    matfree = peer("matfree_lanczos", "matfree")
    pyhessian = None if options.few else peer("pyhessian_lanczos", "pyhessian")
    versions = dict(matfree.VERSIONS) if matfree else {}
    return versions | ({PYHESSIAN: pyhessian.VERSION} if pyhessian else {})


def _steps(net: Net, options: Options, tick: Tick) -> dict[str, Any]:
    found = step_samples(net, options, time.process_time)
    tick(f"{net.name}, steps")
    counted = {} if options.few else sides.flops(net)
    return _record(net, options, "steps", **found._asdict(), flops=counted)


def _compilation(net: Net, options: Options, tick: Tick) -> dict[str, Any]:
    """Times first runs, caches empty, and the second runs after them."""
    matfree = peer("matfree_lanczos", "matfree")
    hessian, start, order = net.hessian, net.start(options.seed), options.order
    calls = {
        OURS: lambda: lanczos(hessian, start, order=order),
        OURS_128: lambda: lanczos(hessian, start, order=2 * order),
    }
    if matfree:
        run = functools.partial(matfree.lanczos, order=order, reortho="full")
        calls[MATFREE] = functools.partial(run, hessian, start)
    samples = {name + after: [] for name in calls for after in ("", shown.SECOND)}
    cached = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        for index in range(options.compilations):
            for name in timing.order_of(list(calls), index):
                jax.clear_caches()
                for after in ("", shown.SECOND):
                    begin = time.process_time()
                    jax.block_until_ready(calls[name]())
                    samples[name + after].append(time.process_time() - begin)
    finally:
        jax.config.update("jax_enable_compilation_cache", cached)
    tick(f"{net.name}, compilation")
    return _record(net, options, "compilation", samples=samples, order=order)


def _eigenpairs(net: Net, options: Options, tick: Tick) -> dict[str, Any]:
    """Counts the products that the k largest pairs take."""
    matfree = peer("matfree_lanczos", "matfree")
    hessian, start, k = net.hessian, net.start(options.seed), options.k
    key, tol = jax.random.key(options.seed), 1e-3
    begin = time.process_time()
    found = jax.block_until_ready(top_eigenpairs(key, hessian, start, k=k, tol=tol))
    samples = {shown.EIGENPAIRS: [time.process_time() - begin]}
    bound = tol * float(found.values[0])
    spent = {shown.EIGENPAIRS: int(found.num_products)}
    misses = {shown.EIGENPAIRS: float(jnp.max(found.residuals)) / bound}
    values = {shown.EIGENPAIRS: found.values}
    if matfree:
        # The order has to be guessed: it is doubled until the residuals, which cost a
        # product each, are small enough.
        order, total = 2 * k, 0
        begin = time.process_time()
        while True:
            theirs, residuals = matfree.eigenpairs(hessian, start, order=order, k=k)
            total += order + k
            if float(jnp.max(residuals)) <= bound or total > options.most_products:
                break
            order *= 2
        samples[shown.PARTIAL] = [time.process_time() - begin]
        spent[shown.PARTIAL] = total
        misses[shown.PARTIAL] = float(jnp.max(residuals)) / bound
        values[shown.PARTIAL] = theirs
        _, alpha, beta = matfree.lanczos(hessian, start, order=order, reortho="full")
        spent[shown.HINDSIGHT] = _least_order(alpha, beta, bound, k)
    begin = time.process_time()
    theirs, residuals, pairs, total = sides.deflated_power(
        hessian, start, tol, k=k, most=options.most_products
    )
    jax.block_until_ready(total)
    samples[shown.POWER] = [time.process_time() - begin]
    spent[shown.POWER] = int(total)
    done = int(pairs)
    misses[shown.POWER] = float(jnp.max(residuals[:k])) / bound
    values[shown.POWER] = theirs
    tick(f"{net.name}, eigenpairs")
    listed = {name: np.asarray(v, float).tolist() for name, v in values.items()}
    fields = {"products": spent, "misses": misses, "values": listed, "k": k}
    return _record(
        net, options, "eigenpairs", samples=samples, tol=tol, power_pairs=done, **fields
    )


def _least_order(alpha: jax.Array, beta: jax.Array, bound: float, k: int) -> int:
    """Finds the order that would have sufficed, from the residuals of every order."""
    t, beta = sides.tridiagonal(alpha, beta), np.asarray(beta, float)
    for order in range(k, len(t)):
        _, vectors = np.linalg.eigh(t[:order, :order])
        if beta[order - 1] * np.max(np.abs(vectors[-1, -k:])) <= bound:
            return order
    return len(t)


def _traces(net: Net, options: Options, tick: Tick) -> dict[str, Any]:
    """Times estimates of the trace of the GGN, and takes their errors."""
    theirs = peer("matfree_lanczos", "traceax")
    ggn, like, count = net.ggn, net.start(options.seed), options.matvecs
    exact = sides.exact_ggn_trace(net)
    calls: dict[str, Callable[..., Any]] = {}
    for method in options.methods:
        one = functools.partial(trace, method=method, num_matvecs=count)
        calls[shown.OURS_TRACE + method] = lambda key, f=one: f(key, ggn, like)[0]
        if theirs:
            one = functools.partial(theirs.trace, method=method, num_matvecs=count)
            calls[TRACEAX + method] = functools.partial(one, operator=ggn, like=like)
    errors: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        jax.block_until_ready(call(jax.random.key(options.seed)))

    def sampler(name):
        key = jax.random.key(1 + len(errors[name]))
        begin = time.process_time()
        value = jax.block_until_ready(calls[name](key))
        taken = time.process_time() - begin
        errors[name].append(float(value) / exact - 1)
        return taken

    samplers = {name: functools.partial(sampler, name) for name in calls}
    baseline = shown.OURS_TRACE + options.methods[0]
    samples = timing.interleave(samplers, baseline=baseline, rounds=options.traces)
    tick(f"{net.name}, traces")
    fields = {"errors": errors, "exact": exact, "matvecs": count}
    return _record(net, options, "trace", samples=samples, **fields)


def _wall(net: Net, options: Options, tick: Tick) -> dict[str, Any]:
    named = ("examples", "training_steps", "order", "slow_order", "seed")
    chosen = {name: getattr(options, name) for name in named}
    found = worker.call("wall", model=net.name, rounds=options.wall_rounds, **chosen)
    tick(f"{net.name}, every core")
    return _record(net, options, "every core", **found)


def _memory(net: Net, options: Options, tick: Tick) -> dict[str, Any]:
    del net
    order, limit = options.text_order, options.text_limit
    sizes = dict(options.text)
    found = worker.call("memory", limit=limit, order=order, sizes=sizes)
    tick("GPT, memory")
    return {
        "case": {"net": "GPT", "what": "memory"},
        "data": found.pop("data"),
        "dtype": "float32",
        "shapes": {
            "inputs": [1, sizes["context"]],
            "parameters": [found["parameters"]],
        },
        "seed": options.seed,
        "peers": {},
        "samples": {"peak growth, bytes": [found.pop("grown")]},
        "limit": limit,
        "order": order,
        "sizes": sizes,
        **found,
    }


_PARTS = dict(
    zip(PARTS, (_compilation, _eigenpairs, _traces, _wall, _memory), strict=True)
)


def tables(records: list[Record]) -> list[Table]:
    """Writes every part against its aim."""
    return shown.tables(records)


def verdict(records: list[Record]) -> Verdict:
    """Rules *shown* if both nets keep the limit and are faster than matfree's."""
    return shown.verdict(records)


def draw(records: list[Record]) -> Figure:
    """Draws what a step takes in gradients."""
    return shown.draw(records)
