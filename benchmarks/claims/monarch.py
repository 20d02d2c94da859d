"""Does gradient descent find a planted Monarch structure, and only Monarch models?

Teachers of :func:`jaxlab.datasets.planted_structure` on R^64, each learned from noisy
examples by Adam with a cosine schedule:

- ``monarch``: a Monarch matrix with 8 blocks and slices of rank 1; the model is that.
- ``dft``: the Fourier transform of real signals, real and imaginary parts as outputs;
  the model is a real Monarch map with 8 blocks and slices of rank 2.
- ``convolution``: a circulant matrix, which is in no small Monarch class but in M M*;
  the model is the real part of a complex Monarch map after the adjoint of another.

Baselines with no fewer parameters (a complex one counts twice): a low-rank map, and a
narrower dense network of two layers with a ReLU between. A full dense map stands by as
reference and takes no part in the verdict: at n = 64 it recovers every linear teacher,
and for the convolution it has as many parameters as M M*.

Every method gets the same learning rates, steps, batches and seeds; the rate of each is
chosen by the median validation error. A seed draws teacher, data, start and order.
"""

import dataclasses
import functools
import hashlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

from benchmarks.plots import dots
from benchmarks.results import Record
from benchmarks.tables import Table, Verdict
from jaxlab.datasets import Dataset, planted_structure
from jaxlab.structured import MonarchFactors, init_monarch, monarch_matmul

CLAIM = (
    "Gradient descent recovers a planted Monarch matrix, Fourier transform and "
    "convolution with a Monarch model, orders of magnitude in test error below a "
    "low-rank map and a narrower dense network of no fewer parameters."
)

WIDTH, BLOCKS = 64, 8
NOISE = 0.01
MONARCH, LOW_RANK, NARROW, DENSE = "Monarch", "low rank", "narrow dense", "dense"
FACTOR = 100.0  # what "orders of magnitude" means in the verdict
DIVERGED = 1e30  # stands for errors that are not finite


@dataclasses.dataclass(frozen=True)
class Options:
    structures: tuple[str, ...]
    seeds: int
    steps: int
    batch_size: int
    learning_rates: tuple[float, ...]


PRESETS = {
    "small": Options(("monarch",), 1, 100, 64, (1e-2, 3e-2)),
    "full": Options(
        ("monarch", "dft", "convolution"),
        5,
        3_000,
        128,
        (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1),
    ),
}


class Method(NamedTuple):
    init: Callable[[jax.Array], Any]  # key -> params
    apply: Callable[[Any, jax.Array], jax.Array]  # (params, x) -> y


def adjoint_matmul(z: jax.Array, w1: jax.Array, w2: jax.Array) -> jax.Array:
    """Multiplies by the conjugate transpose of the Monarch matrix of the factors."""
    k, q, p = w1.shape
    last, s, _ = w2.shape
    lead = z.shape[:-1]
    middle = jnp.einsum("lsr,...sl->...rl", w2.conj(), z.reshape(*lead, s, last))
    out = jnp.einsum("kqp,...kq->...kp", w1.conj(), middle.reshape(*lead, k, q))
    return out.reshape(*lead, k * p)


def _monarch(outputs: int, rank: int) -> Method:
    return Method(
        lambda key: init_monarch(key, WIDTH, outputs, nblocks=BLOCKS, rank=rank),
        lambda factors, x: monarch_matmul(x, *factors),
    )


def _monarch_twice() -> Method:
    def init(key: jax.Array) -> tuple[MonarchFactors, ...]:
        make = functools.partial(
            init_monarch,
            in_features=WIDTH,
            out_features=WIDTH,
            nblocks=BLOCKS,
            rank=1,
            dtype=jnp.complex64,
        )
        first, second = jax.random.split(key)
        return make(first), make(second)

    def apply(params: tuple[MonarchFactors, ...], x: jax.Array) -> jax.Array:
        right, left = params
        middle = adjoint_matmul(x.astype(jnp.complex64), *right)
        return monarch_matmul(middle, *left).real

    return Method(init, apply)


def _two_layers(
    outputs: int, width: int, activation: Callable[[jax.Array], jax.Array]
) -> Method:
    def init(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        first, second = jax.random.split(key)
        return (
            jax.random.normal(first, (WIDTH, width)) / jnp.sqrt(WIDTH),
            jax.random.normal(second, (width, outputs)) / jnp.sqrt(width),
        )

    return Method(init, lambda params, x: activation(x @ params[0]) @ params[1])


def _dense(outputs: int) -> Method:
    return Method(
        lambda key: jax.random.normal(key, (WIDTH, outputs)) / jnp.sqrt(WIDTH),
        lambda weight, x: x @ weight,
    )


def parameters(method: Method) -> int:
    """Counts the real numbers that a method trains."""
    leaves = jax.tree.leaves(jax.eval_shape(method.init, jax.random.key(0)))
    return sum(
        leaf.size * (2 if jnp.issubdtype(leaf.dtype, jnp.complexfloating) else 1)
        for leaf in leaves
    )


def methods(structure: str) -> dict[str, Method]:
    """Makes the Monarch model for a teacher and what it is compared with."""
    outputs = 2 * WIDTH if structure == "dft" else WIDTH
    if structure == "convolution":
        ours = _monarch_twice()
    else:
        ours = _monarch(outputs, 2 if structure == "dft" else 1)
    # The least width that gives a baseline at least as many parameters.
    width = -(-parameters(ours) // (WIDTH + outputs))
    return {
        MONARCH: ours,
        LOW_RANK: _two_layers(outputs, width, lambda x: x),
        NARROW: _two_layers(outputs, width, jax.nn.relu),
        DENSE: _dense(outputs),
    }


def least_error(data: Dataset, low_rank: Method) -> float:
    """Computes the expected test error of the best map of that rank, by an SVD."""
    first, _ = jax.eval_shape(low_rank.init, jax.random.key(0))
    teacher = data.extras["teacher"].astype(np.float64)
    lost = np.linalg.svd(teacher, compute_uv=False)[first.shape[1] :]
    return float(np.sum(lost**2) / len(teacher) + NOISE**2)


def errors(
    method: Method, data: list[Dataset], options: Options
) -> tuple[np.ndarray, np.ndarray]:
    """Trains one method at every rate and seed at once.

    Returns:
      Mean squared errors on validation and on test, both (learning rates, seeds).
    """
    splits = {
        split: tuple(np.stack([d.splits[split][i] for d in data]) for i in (0, 1))
        for split in ("train", "validation", "test")
    }

    def loss(params, x, y):
        return jnp.mean((method.apply(params, x) - y) ** 2)

    def one(rate, seed, splits):
        start, order = jax.random.split(jax.random.key(seed))
        params = method.init(start)
        optimizer = optax.adam(lambda step: rate * schedule(step))
        x, y = splits["train"]

        def step(carry, key):
            params, state = carry
            rows = jax.random.randint(key, (options.batch_size,), 0, len(x))
            # JAX's gradient of a real loss is the conjugate of the way down.
            grads = jax.tree.map(jnp.conj, jax.grad(loss)(params, x[rows], y[rows]))
            updates, state = optimizer.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        keys = jax.random.split(order, options.steps)
        (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), keys)
        return loss(params, *splits["validation"]), loss(params, *splits["test"])

    schedule = optax.cosine_decay_schedule(1.0, options.steps)
    over_seeds = jax.vmap(one, in_axes=(None, 0, 0))
    over_rates = jax.jit(jax.vmap(over_seeds, in_axes=(0, None, None)))
    rates, seeds = jnp.array(options.learning_rates), jnp.arange(options.seeds)
    found = over_rates(rates, seeds, splits)
    clean = lambda x: np.clip(np.nan_to_num(x, nan=DIVERGED), 0, DIVERGED)
    validation, test = map(clean, jax.device_get(found))
    return validation, test


def run(options: Options, progress: Callable[..., Any]) -> Iterator[dict[str, Any]]:
    """Trains every method on every teacher."""
    total = sum(len(methods(structure)) for structure in options.structures)
    with progress(total, "claim monarch") as tick:
        for structure in options.structures:
            data = [
                planted_structure(structure, noise_scale=NOISE, seed=seed)
                for seed in range(options.seeds)
            ]
            digests = "".join(d.digest for d in data)
            for name, method in methods(structure).items():
                start = time.perf_counter()
                validation, test = errors(method, data, options)
                tick(f"{structure}, {name}")
                yield {
                    "case": {"structure": structure, "method": name},
                    "data": {
                        "name": f"{structure} teacher, {options.seeds} seeds",
                        "digest": hashlib.sha256(digests.encode()).hexdigest(),
                    },
                    "dtype": "float32",
                    "shapes": {
                        "inputs": list(data[0].splits["train"][0].shape),
                        "targets": list(data[0].splits["train"][1].shape),
                    },
                    "seed": list(range(options.seeds)),
                    "steps": options.steps,
                    "batch_size": options.batch_size,
                    "parameters": parameters(method),
                    "least": [
                        least_error(d, method) if name == LOW_RANK else NOISE**2
                        for d in data
                    ],
                    "seconds": time.perf_counter() - start,
                    "samples": {
                        f"{rate:g}": {"validation": v.tolist(), "test": t.tolist()}
                        for rate, v, t in zip(
                            options.learning_rates, validation, test, strict=True
                        )
                    },
                }


def chosen(record: Record) -> tuple[str, list[float]]:
    """Picks the rate of the least median validation error; gives its test errors."""
    samples = record["samples"]
    rate = min(samples, key=lambda r: statistics.median(samples[r]["validation"]))
    return rate, samples[rate]["test"]


def _by_structure(records: list[Record]) -> dict[str, dict[str, Record]]:
    found: dict[str, dict[str, Record]] = {}
    for record in records:
        case = record["case"]
        found.setdefault(case["structure"], {})[case["method"]] = record
    return found


def tables(records: list[Record]) -> list[Table]:
    """Writes parameters, chosen rate and test errors of every method."""
    rows = []
    for record in records:
        rate, test = chosen(record)
        name = record["case"]["method"]
        rows.append(
            (
                record["case"]["structure"],
                name,
                f"{record['parameters']:,}",
                rate,
                f"{statistics.median(test):.2e}",
                f"{min(test):.2e}",
                f"{max(test):.2e}",
                "" if name == NARROW else f"{statistics.median(record['least']):.2e}",
                f"{record['seconds']:.0f}",
            )
        )
    header = (
        "teacher",
        "model",
        "parameters",
        "rate",
        "test MSE",
        "best",
        "worst",
        "least possible",
        "seconds",
    )
    first = records[0]
    note = (
        f"Median, best and worst of {len(first['seed'])} seeds; each seed draws "
        "another teacher (the Fourier transform is always the same). Least possible: "
        f"the noise's {NOISE**2:.0e}, and for the low rank what the truncated SVD of "
        "the teacher leaves besides (median). "
        f"{first['steps']:,} steps of Adam at batch "
        f"{first['batch_size']} for each of the learning rates "
        f"{', '.join(first['samples'])}, chosen for each model on validation. "
        f"'{DENSE}' is a reference outside the verdict. Seconds are of the whole sweep."
    )
    return [Table("Planted structure", header, rows, note)]


def verdict(records: list[Record]) -> Verdict:
    """Rules *shown* if, for every teacher, the margin is FACTOR and no seed crosses.

    The margin is the best baseline's median test error over Monarch's; no seed crosses
    if Monarch's worst seed is below every baseline's best. *Reversed*: in every teacher
    some baseline has the lower median.
    """
    margins, apart = {}, {}
    for structure, found in _by_structure(records).items():
        ours = chosen(found[MONARCH])[1]
        theirs = [chosen(found[name])[1] for name in (LOW_RANK, NARROW)]
        best = min(map(statistics.median, theirs))
        margins[structure] = best / statistics.median(ours)
        apart[structure] = max(ours) < min(map(min, theirs))
    listed = ", ".join(
        f"{margin:.3g} ({structure}, seeds {'apart' if apart[structure] else 'cross'})"
        for structure, margin in margins.items()
    )
    why = (
        f"best baseline's median test MSE over Monarch's: {listed} (rule: at least "
        f"{FACTOR:g} and seeds apart for every teacher)."
    )
    if all(m >= FACTOR for m in margins.values()) and all(apart.values()):
        return Verdict("shown", why)
    if all(margin < 1 for margin in margins.values()):
        return Verdict("reversed", why)
    return Verdict("not shown", why)


def draw(records: list[Record]) -> Figure:
    """Draws the test error of every model on every teacher."""
    rows = {
        structure: {name: chosen(record)[1] for name, record in found.items()}
        for structure, found in _by_structure(records).items()
    }
    return dots(rows, xlabel="test MSE (dot: best seed, line: quartiles)")
