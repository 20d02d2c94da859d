"""What is a trained dense model worth as a start of a Monarch one?

GPT-S on characters is trained dense, every linear layer is replaced, and all is
fine-tuned for the same steps on further batches, each start with its own tuned rate:

- ``projected``: the nearest Monarch matrices (4 blocks), everything else as trained;
- ``SVD``: the nearest matrices of the rank that gives as many parameters, likewise;
- ``random layers``: random Monarch matrices, everything else as trained;
- ``from scratch``: a random Monarch model, which sees the fine-tuning steps alone;
- ``dense``: the dense model goes on, as reference outside the verdict.

Judged is the loss after fine-tuning; the loss before it, and the distance from the
trained weights, stand beside it. Which class is nearer depends on the weights. So a
second task plants them: linear teachers on R^64 that are Monarch matrices (8 blocks,
slices of rank 1), dense weights by least squares from noisy examples, then both
projections to 1,024 parameters. There inputs are white, so the error of a projection
is its squared distance, and no fine-tuning of the low-rank map can gain on its SVD.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from benchmarks import language, timing
from benchmarks.language import DENSE, LOW_RANK, MONARCH, NBLOCKS
from benchmarks.paired import (
    chosen_rate,
    difference,
    draw_differences,
    finite,
    gaps,
    spread,
)
from benchmarks.results import Record
from benchmarks.tables import Table, Verdict
from jaxlab.datasets import planted_structure
from jaxlab.layers import densify_params, monarchize_params

CLAIM = (
    "A trained dense GPT-S projected to Monarch layers (4 blocks) and fine-tuned ends "
    "at a lower test loss than random Monarch starts and than its SVD to low rank of "
    "as many parameters after the same fine-tuning; on planted Monarch weights the "
    "projection is nearer than the SVD before any fine-tuning."
)

GPT_TASK, PLANTED = "GPT-S", "planted"
PROJECTED, SVD = "projected", "SVD"
RANDOM, SCRATCH = "random layers", "from scratch"
BASELINES = (SVD, RANDOM, SCRATCH)
PLANTED_BLOCKS, NOISE = 8, 0.01
FINE_TUNING = 1  # names the stream of batches that follows training's


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(language.Setting):
    fine_tuning_steps: int
    fine_tuning_rates: tuple[float, ...]


PRESETS = {
    "small": Options(
        steps=6, fine_tuning_steps=4, fine_tuning_rates=(1e-3,), **language.TINY
    ),
    "full": Options(
        steps=1_300,
        fine_tuning_steps=325,
        learning_rates=(5e-4, 1e-3, 2e-3, 4e-3, 8e-3),
        fine_tuning_rates=(2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3),
        seeds=5,
        tuning_seeds=2,
    ),
}

Params = dict[Any, Any]


def truncated(kernel: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Computes factors of the nearest matrix of some rank; NaN stays NaN."""
    kernel = np.asarray(kernel, np.float64)
    if not np.isfinite(kernel).all():  # NumPy's SVD would raise
        return np.full_like(kernel[:, :rank], np.nan), np.full_like(
            kernel[:rank], np.nan
        )
    u, s, v = np.linalg.svd(kernel, full_matrices=False)
    root = np.sqrt(s[:rank])
    return u[:, :rank] * root, root[:, None] * v[:rank]


def low_rank_params(params: Params) -> Params:
    """Replaces dense kernels by the factors of their truncated SVD."""
    if "kernel" not in params:
        return {
            name: low_rank_params(leaf) if isinstance(leaf, dict) else leaf
            for name, leaf in params.items()
        }
    kernel = params["kernel"]
    rank = language.matched_rank(*kernel.shape)
    first, second = (jnp.asarray(f, kernel.dtype) for f in truncated(kernel, rank))
    return {"squeeze": first, "expand": second, "bias": params["bias"]}


def project(params: Params) -> Params:
    """Replaces dense kernels by the factors of their Monarch projections."""
    return monarchize_params(params, lambda path, kernel: True, nblocks=NBLOCKS)


def in_place_of(trained: Params, random: Params) -> Params:
    """Takes from a random model what the trained one has not, the rest from that."""
    return {
        name: in_place_of(trained[name], leaf)
        if isinstance(leaf, dict)
        else trained.get(name, leaf)
        for name, leaf in random.items()
    }


def kernels(params: Params) -> list[np.ndarray]:
    """Lists the matrices of all linear layers as dense kernels."""
    if "squeeze" in params:
        return [np.asarray(params["squeeze"]) @ np.asarray(params["expand"])]
    if "kernel" in params:
        return [np.asarray(params["kernel"])]
    inner = (params[name] for name in params if isinstance(params[name], dict))
    return [kernel for part in inner for kernel in kernels(part)]


def distance(params: Params, trained: Params) -> float:
    """Computes the relative Frobenius distance of all linear layers together."""
    ours, theirs = kernels(densify_params(params)), kernels(trained)
    pairs = zip(ours, theirs, strict=True)
    lost = sum(float(np.sum((a - b) ** 2)) for a, b in pairs)
    return finite((lost / sum(float(np.sum(b**2)) for b in theirs)) ** 0.5)


def run(options: Options, progress: Callable[..., Any]) -> Iterator[dict[str, Any]]:
    """Trains dense, fine-tunes from every start, then projects planted weights."""
    text = language.Text(options)
    fine = dataclasses.replace(options, learning_rates=options.fine_tuning_rates)
    built = language.builders(options)
    dense, monarch, low_rank = (
        language.Trainer(built[name], text) for name in (DENSE, MONARCH, LOW_RANK)
    )
    starts = {
        PROJECTED: (monarch, lambda trained, seed: project(trained)),
        SVD: (low_rank, lambda trained, seed: low_rank_params(trained)),
        RANDOM: (
            monarch,
            lambda trained, seed: in_place_of(trained, monarch.fresh(seed)),
        ),
        SCRATCH: (monarch, lambda trained, seed: monarch.fresh(seed)),
        DENSE: (dense, lambda trained, seed: trained),
    }
    total = language.runs_of(options) + len(starts) * language.runs_of(fine) + 1
    with progress(total, "claim dense_to_monarch") as tick:

        def train(seed: int, rate: float) -> language.Outcome:
            state = dense.start(dense.fresh(seed), rate, options.steps)
            return dense.outcome(state, (seed,), options.steps)

        samples, runs = language.sweep(
            train, options, lambda done: tick(f"dense, {done}")
        )
        rate = float(chosen_rate(samples["tuning"]))
        trained = {
            seed: runs[seed, rate].params for seed in options.tuning + options.judged
        }
        for name, (trainer, make) in starts.items():
            first = {seed: make(trained[seed], seed) for seed in trained}
            steps = options.fine_tuning_steps

            def tune(seed: int, rate: float) -> language.Outcome:
                state = trainer.start(first[seed], rate, steps)  # noqa: B023
                return trainer.outcome(state, (seed, FINE_TUNING), steps)  # noqa: B023

            tuned, _ = language.sweep(
                tune,
                fine,
                lambda done: tick(f"{name}, {done}"),  # noqa: B023
            )
            yield language.record(
                {"task": GPT_TASK, "method": name},
                tuned
                | {
                    "before": [trainer.loss(first[s], "test") for s in options.judged],
                    "distance": [
                        distance(first[s], trained[s]) for s in options.judged
                    ],
                    "training": samples["tuning"],
                },
                text,
                steps=steps,
                parameters=trainer.parameters,
            )
        yield from planted(options.seeds)
        tick("planted weights")


def planted(seeds: int) -> Iterator[dict[str, Any]]:
    """Projects the least-squares weights of planted Monarch teachers both ways."""
    project = functools.partial(
        monarchize_params, predicate=lambda path, kernel: True, nblocks=PLANTED_BLOCKS
    )
    data = [
        planted_structure("monarch", noise_scale=NOISE, seed=seed)
        for seed in range(seeds)
    ]
    digests = "".join(d.digest for d in data)
    found: dict[str, dict[str, list[float]]] = {
        name: {"before": [], "distance": []} for name in (DENSE, PROJECTED, SVD)
    }
    parameters = {}
    for one in data:
        x, y = (np.asarray(part, np.float64) for part in one.splits["train"])
        weights = {"kernel": jnp.asarray(np.linalg.lstsq(x, y)[0], jnp.float32)}
        factors = project(weights, rank=1)
        size = sum(leaf.size for leaf in jax.tree.leaves(factors))
        sides = weights["kernel"].shape
        first, second = truncated(weights["kernel"], -(-size // sum(sides)))
        made = {
            DENSE: weights,
            PROJECTED: factors,
            SVD: {"squeeze": first, "expand": second},
        }
        x, y = one.splits["test"]
        for name, params in made.items():
            (kernel,) = kernels(densify_params(params))
            error = float(np.mean((x @ kernel - y) ** 2))
            found[name]["before"].append(error)
            found[name]["distance"].append(distance(params, weights))
            parameters[name] = sum(leaf.size for leaf in jax.tree.leaves(params))
    for name, samples in found.items():
        yield {
            "case": {"task": PLANTED, "method": name},
            "data": {
                "name": f"planted Monarch teachers, {seeds} seeds",
                "digest": hashlib.sha256(digests.encode()).hexdigest(),
            },
            "dtype": "float32",
            "shapes": {"inputs": list(data[0].splits["train"][0].shape)},
            "seed": list(range(seeds)),
            "samples": samples,
            "parameters": parameters[name],
        }


def _of(records: list[Record], task: str) -> dict[str, Record]:
    return {r["case"]["method"]: r for r in records if r["case"]["task"] == task}


def tables(records: list[Record]) -> list[Table]:
    """Writes losses before and after fine-tuning, and the planted errors."""
    tuned, planted = _of(records, GPT_TASK), _of(records, PLANTED)
    ours = tuned[PROJECTED]
    rows = []
    for name, record in tuned.items():
        samples = record["samples"]
        random = name in (RANDOM, SCRATCH)
        gap = difference(ours["samples"]["test"], samples["test"])
        rows.append(
            (
                name,
                f"{record['parameters']:,}",
                "" if random else spread(samples["distance"]),
                spread(samples["before"]),
                chosen_rate(samples["tuning"]),
                spread(samples["test"]),
                "" if record is ours else str(gap),
                f"{timing.quartiles(samples['seconds']).median:.1f}",
            )
        )
    header = (
        "start",
        "parameters",
        "distance from trained",
        "test loss before",
        "rate",
        "after",
        "projected less this [95 %]",
        "seconds a run",
    )
    training = ours["samples"]["training"]
    note = (
        f"{language.setting_note(list(tuned.values()))} Rate of the dense training: "
        f"{chosen_rate(training)} of {', '.join(training)}. Fine-tuning: "
        f"{ours['steps']} steps on further text, with a schedule of its own. Distance: "
        "Frobenius, relative, all linear layers together."
    )
    errors = [
        (
            name,
            f"{record['parameters']:,}",
            spread(record["samples"]["distance"]),
            f"{timing.quartiles(record['samples']['before']).median:.2e}",
            f"{max(record['samples']['before']):.2e}",
        )
        for name, record in planted.items()
    ]
    return [
        Table("Trained GPT-S, replaced and fine-tuned", header, rows, note),
        Table(
            "Planted Monarch weights, replaced",
            ("weights", "parameters", "distance", "test MSE", "worst"),
            errors,
            f"{len(ours['seed'])} teachers, weights by least squares; median and worst "
            f"test MSE, of which {NOISE**2:.0e} is noise. No fine-tuning.",
        ),
    ]


def verdict(records: list[Record]) -> Verdict:
    """Rules *shown* if projecting ends below every other start, and is nearer planted.

    Below: the 95 % interval of the paired differences of test losses after
    fine-tuning, projected less the other, ends below 0 for the SVD and for both random
    starts. Nearer: in every seed the planted weights projected have a lower test error
    than their SVD. *Reversed*: the interval begins above 0 for one of the starts.
    """
    tuned, planted = _of(records, GPT_TASK), _of(records, PLANTED)
    test = {name: record["samples"]["test"] for name, record in tuned.items()}
    found = {name: difference(test[PROJECTED], test[name]) for name in BASELINES}
    errors = [planted[name]["samples"]["before"] for name in (PROJECTED, SVD)]
    nearer = sum(a < b for a, b in zip(*errors, strict=True))
    before = [tuned[name]["samples"]["before"] for name in (PROJECTED, SVD)]
    listed = "; ".join(f"{name} {gap}" for name, gap in found.items())
    why = (
        f"test loss after fine-tuning, projected less: {listed} (rule: below 0); "
        f"before it, less the SVD's: {difference(*before)}; on planted weights the "
        f"projection errs less in {nearer} of {len(errors[0])} seeds (rule: all)."
    )
    if nearer == len(errors[0]) and all(gap.upper < 0 for gap in found.values()):
        return Verdict("shown", why)
    beaten = any(gap.lower > 0 for gap in found.values())
    return Verdict("reversed" if beaten else "not shown", why)


def draw(records: list[Record]) -> Figure:
    """Draws the differences after fine-tuning."""
    tuned = _of(records, GPT_TASK)
    rows = {name: gaps(tuned[PROJECTED], tuned[name]) for name in (*BASELINES, DENSE)}
    return draw_differences(
        rows, xlabel="test loss after fine-tuning, projected less the other"
    )
