"""Do a few eigenvalues of the Hessian follow the data, and the bulk the width?

Gaussian clusters on R^20: k means of norm ``separation`` in random directions, noise
of norm about 1, 400 balanced points. A ReLU net 20-w-w-k learns them by full-batch
gradient descent. Its Hessian at the end is taken apart exactly, in float64; beside it
stand the library's estimates in float32, by Lanczos and stochastic Lanczos quadrature,
which never form the matrix, and a random symmetric matrix with the same trace and
Frobenius norm.

Outliers are counted by the widest gap, as a ratio, between neighbours among the 30
largest eigenvalues; values below 1e-3 of the largest count as that. For a softmax one
expects k - 1. The bulk is all but the k - 1 largest.

The flat path: a net on digits learns with batch 512, then goes on from there with batch
16 for as many epochs; loss and accuracy are read at 21 points of the segment between
the two solutions. Contrasts: the segment to the solution of another start, and a step
of the same length in a random direction.
Reference: Sagun, Evci, Guney, Dauphin, Bottou, "Empirical Analysis of the Hessian of
Over-Parametrized Neural Networks", 2017.
"""

import dataclasses
import functools
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.cluster_nets import (
    DIM,
    FLAT,
    ROWS,
    between,
    clusters,
    descend,
    exact_spectrum,
    gap_after,
    init,
    loss_fn,
    measured,
    outliers,
    random_spectrum,
)
from benchmarks.hessian_records import (
    BASE,
    ORDER,
    OTHER_START,
    PATH,
    PROBES,
    RANDOM,
    SMALL_BATCH,
    SPECTRUM,
    column,
    counts,
    draw,
    factor,
    gaps,
    paths_of,
    rise,
    spectra_of,
    tables,
)
from benchmarks.results import Record, digest
from benchmarks.tables import Verdict
from jaxlab.curvature.density import density_from_eigenvalues, spectral_density
from jaxlab.curvature.hessian import hessian_operator
from jaxlab.curvature.lanczos import lanczos, ritz
from jaxlab.datasets import load

__all__ = ["CLAIM", "PRESETS", "draw", "run", "tables", "verdict"]

CLAIM = (
    "A net's Hessian has k - 1 outliers for k clusters (2, 3, 5, 10); width adds to "
    "the bulk and leaves them alone, separability changes them only; solutions of "
    "large and small batches are connected by a flat path."
)

CURVES = ("train loss", "test loss", "train accuracy", "test accuracy")
FIRST = 30  # the eigenvalues among which a gap is looked for

# The rule.
GAP, RANDOM_GAP = 3.0, 2.0  # the gap after k - 1 at least; the random matrix's below
SAME = 1.15  # factor within which outliers stay when the width changes
MOVED, STILL = 4.0, 2.0  # outliers at least, bulk at most, between separations
RISE, BARRIER = 1.05, 2.0  # of the larger loss at the ends: no barrier, a barrier
AGREE = 0.8  # share of the spectra with k - 1 outliers, at least
CLOSE = 1e-5  # of the largest eigenvalue: error of the estimated outliers


@dataclasses.dataclass(frozen=True)
class Options:
    clusters: tuple[int, ...]
    widths: tuple[int, ...]
    separations: tuple[float, ...]
    seeds: int
    descent: int  # full-batch steps on clusters
    digits_width: int
    large_steps: int
    rate: float = 0.1
    large_batch: int = 512
    small_batch: int = 16
    points: int = 21


PRESETS = {
    "small": Options((3,), (12, 16), (1.0, 0.5), 1, 300, 16, 200, points=5),
    "full": Options((2, 3, 5, 10), (12, 16, 24), (1.0, 0.5, 2.0), 5, 300, 64, 5_000),
}


def cases(options: Options) -> list[tuple[int, int, float]]:
    """Lists (clusters, width, separation): one of them differs from ``BASE``."""
    k, width, separation = BASE
    listed = [(other, width, separation) for other in options.clusters]
    listed += [(k, other, separation) for other in options.widths]
    listed += [(k, width, other) for other in options.separations]
    return list(dict.fromkeys(listed))


def _rounded(values: Any, digits: int = 5) -> list[float]:
    return [float(f"{value:.{digits}g}") for value in np.asarray(values)]


def _spectra(options: Options, case: tuple[int, int, float]) -> dict[str, Any]:
    """Trains a net of each seed and takes its Hessian apart in three ways."""
    k, width, separation = case
    samples: dict[str, list[Any]] = {}
    more: dict[str, Any] = {}
    drawn = []
    for seed in range(options.seeds):
        x, y = clusters(k, separation, seed)
        drawn += [x, y]
        data = jnp.asarray(x), jnp.asarray(y)
        keys = jax.random.split(jax.random.key(seed), 3)
        start = init(keys[0], (DIM, width, width, k))
        params = descend(keys[1], start, data, options.rate, steps=options.descent)
        values = exact_spectrum(params, data)
        operator = hessian_operator(loss_fn, params, data)
        density = spectral_density(
            keys[2], operator, params, order=ORDER, num_probes=PROBES, num_points=200
        )
        exact = density_from_eigenvalues(
            values.astype(np.float32), density.grid, sigma=density.sigma
        )
        step = density.grid[1] - density.grid[0]
        found = np.asarray(density.nodes)[:, ::-1][:, : k - 1]
        error = np.abs(found - values[None, : k - 1]).max()
        loss, accuracy = measured(params, data)
        bulk = values[k - 1 :]
        new = {
            "loss": float(loss),
            "accuracy": float(accuracy),
            "first": _rounded(values[:FIRST], 8),
            "last": float(values[-1]),
            "bulk rms": float(np.sqrt(np.mean(bulk**2))),
            "flat": int(np.sum(np.abs(values) < FLAT * values[0])),
            "random": _rounded(random_spectrum(values, seed)[:FIRST]),
            "ritz error": float(error / values[0]),
            "density error": float(
                jnp.sum(jnp.abs(density.density - exact)) * step / 2
            ),
        }
        for name, value in new.items():
            samples.setdefault(name, []).append(value)
        # Whole curves of the first seed, for the picture.
        curves = density.grid, density.density, density.standard_error, exact
        more = more or {
            "spectrum": _rounded(values),
            "density": [_rounded(curve) for curve in curves],
        }
    return {
        "case": {
            "task": SPECTRUM,
            "clusters": k,
            "width": width,
            "separation": separation,
        },
        "data": {
            "name": f"{k} clusters at {separation:g}, {options.seeds} seeds",
            "digest": digest(*drawn),
        },
        "shapes": {"inputs": [ROWS, DIM], "parameters": len(values)},
        "samples": samples,
        **more,
    }


@functools.partial(jax.jit, static_argnames="order")
def _sharpness(operator, vector, *, order):
    return ritz(lanczos(operator, vector, order=order))[0][-1]


def _paths(options: Options, tick: Callable[[str], None]) -> list[dict[str, Any]]:
    data = load("digits")
    train, test = (tuple(map(jnp.asarray, data.splits[s])) for s in ("train", "test"))
    sizes = (train[0].shape[1], options.digits_width, options.digits_width, 10)
    learn = functools.partial(descend, data=train, rate=options.rate)
    small = options.large_steps * options.large_batch // options.small_batch
    length = lambda a, b: float(optax.tree.norm(optax.tree.sub(a, b)))
    names = (SMALL_BATCH, OTHER_START, RANDOM)
    samples: dict[str, dict[str, list[Any]]] = {name: {} for name in names}
    for seed in range(options.seeds):
        keys = jax.random.split(jax.random.key(seed), 7)
        starts = [init(key, sizes) for key in keys[:2]]
        large = {"steps": options.large_steps, "batch_size": options.large_batch}
        here, other = (
            learn(key, start, **large)
            for key, start in zip(keys[2:4], starts, strict=True)
        )
        there = learn(keys[4], here, steps=small, batch_size=options.small_batch)
        away = optax.tree.random_like(keys[5], here, jax.random.normal)
        away = optax.tree.scale(length(here, there) / optax.tree.norm(away), away)
        ends = dict(zip(names, (there, other, optax.tree.add(here, away)), strict=True))
        for name, end in ends.items():
            rows = []
            for params in between(here, end, options.points):
                pairs = [measured(params, split) for split in (train, test)]
                rows.append([float(p[i]) for i in (0, 1) for p in pairs])
            sharp = [
                float(_sharpness(hessian_operator(loss_fn, p, train), away, order=32))
                for p in (here, end)
            ]
            new = dict(zip(CURVES, map(_rounded, np.transpose(rows)), strict=True))
            new |= {
                "distance": length(here, end),
                "from start": length(here, starts[0]),
                "sharpness": sharp,
            }
            for field, value in new.items():
                samples[name].setdefault(field, []).append(value)
        tick(f"digits, seed {seed}")
    return [
        {
            "case": {"task": PATH, "to": name},
            "data": {"name": data.name, "digest": data.digest},
            "shapes": {"inputs": list(train[0].shape), "layers": list(sizes)},
            "samples": samples[name],
        }
        for name in names
    ]


def run(options: Options, progress: Callable[..., Any]) -> Iterator[dict[str, Any]]:
    """Takes Hessians of nets on clusters apart, then walks between nets on digits."""
    common = {
        "dtype": "float32",
        "seed": list(range(options.seeds)),
        "options": dataclasses.asdict(options),
    }
    listed = cases(options)
    with progress(len(listed) + options.seeds, "claim hessian_spectra") as tick:
        for case in listed:
            found = _spectra(options, case)
            tick("{} clusters, width {}, separation {:g}".format(*case))
            yield found | common
        for found in _paths(options, tick):
            yield found | common


Parts = list[tuple[bool, str]]


def _count_part(spectra: dict[Any, Record]) -> Parts:
    """Judges whether k - 1 stand out, and in the random matrix nothing does."""
    _, width, separation = BASE
    rows = {k: r for (k, *rest), r in spectra.items() if rest == [width, separation]}
    agree = [n == k - 1 for k, r in rows.items() for n in counts(r)]
    medians = {k: statistics.median(counts(r)) for k, r in rows.items()}
    widest = {k: statistics.median(gaps(r)) for k, r in rows.items()}
    noise = max(
        gap_after(values, outliers(values))
        for record in rows.values()
        for values in record["samples"]["random"]
    )
    listed = lambda found: ", ".join(f"{v:.3g} (k = {k})" for k, v in found.items())
    return [
        (
            all(n == k - 1 for k, n in medians.items())
            and sum(agree) >= AGREE * len(agree),
            f"outliers, median: {listed(medians)}; k - 1 of them in {sum(agree)} of "
            f"{len(agree)} spectra (rule: every median, and {AGREE:.0%})",
        ),
        (
            all(gap > GAP for gap in widest.values()) and noise < RANDOM_GAP,
            f"gap after k - 1, median: {listed(widest)} (rule: above {GAP:g}); the "
            f"random matrix's widest {noise:.3g} (rule: below {RANDOM_GAP:g})",
        ),
    ]


def _width_part(spectra: dict[Any, Record]) -> Parts:
    """Judges whether outliers stay and the bulk grows when the net does."""
    k, _, separation = BASE
    widths = sorted(w for c, w, s in spectra if (c, s) == (k, separation))
    rows = [spectra[k, width, separation] for width in widths]
    first, *wider = rows
    moves = [
        factor(column(first, "first", place), column(record, "first", place))
        for record in wider
        for place in range(k - 1)
    ]
    worst = max(max(move, 1 / move) for move in moves)
    number = list(zip(*(column(record, "flat") for record in rows), strict=True))
    grows = sum(list(seed) == sorted(set(seed)) for seed in number)
    shares = [
        statistics.median(column(r, "flat")) / r["shapes"]["parameters"] for r in rows
    ]
    listed = ", ".join(map(str, widths))
    return [
        (
            worst <= SAME,
            f"widths {listed}: the outliers move by a factor of {worst:.3g}, median, "
            f"the worst of them (rule: at most {SAME:g})",
        ),
        (
            grows == len(number) and shares == sorted(set(shares)),
            f"flat directions grow in {grows} of {len(number)} seeds (rule: all), "
            f"their share from {shares[0]:.3f} to {shares[-1]:.3f} (rule: each step)",
        ),
    ]


def _separability(spectra: dict[Any, Record]) -> tuple[float, float]:
    """Gives the factors of the first eigenvalue and of the bulk's root mean square."""
    k, width, _ = BASE
    there = spectra[BASE]
    here = spectra[k, width, min(s for c, w, s in spectra if (c, w) == (k, width))]
    top = factor(column(there, "first", 0), column(here, "first", 0))
    return top, factor(column(there, "bulk rms"), column(here, "bulk rms"))


def _separability_part(spectra: dict[Any, Record]) -> Parts:
    """Judges whether less separable data move the outliers and nothing else."""
    top, bulk = _separability(spectra)
    return [
        (
            top >= MOVED,
            f"less separable: the first eigenvalue grows by a factor of {top:.3g}, "
            f"median (rule: at least {MOVED:g})",
        ),
        (
            1 / STILL <= bulk <= STILL,
            f"the bulk's root mean square by {bulk:.3g} (rule: at most {STILL:g})",
        ),
    ]


def _path_part(paths: dict[str, Record]) -> Parts:
    """Judges whether the way to the small-batch solution is flat, the other not."""
    found = {
        (to, split): rise(column(record, f"{split} loss"))
        for to, record in paths.items()
        for split in ("train", "test")
    }
    flat = [max(found[SMALL_BATCH, split]) for split in ("train", "test")]
    wall = min(found[OTHER_START, "train"])
    return [
        (
            max(flat) <= RISE,
            f"to the small-batch solution the loss rises to {flat[0]:.4g} (train) and "
            f"{flat[1]:.4g} (test) times the higher end, worst seed (rule: at most "
            f"{RISE:g})",
        ),
        (
            wall >= BARRIER,
            f"to another start's to {wall:.3g} times (train), least seed (rule: at "
            f"least {BARRIER:g})",
        ),
    ]


def _estimate_part(spectra: dict[Any, Record]) -> Parts:
    """Judges whether quadrature finds the outliers without the matrix."""
    worst = max(max(column(record, "ritz error")) for record in spectra.values())
    return [
        (
            worst <= CLOSE,
            f"outliers by quadrature, order {ORDER}, off by {worst:.1e} of the "
            f"largest eigenvalue at most (rule: {CLOSE:.0e})",
        )
    ]


def verdict(records: list[Record]) -> Verdict:
    """Rules *shown* if every part holds; the constants above are the rule.

    *Reversed*: less separable data move the bulk by more than the outliers, and in
    every seed a barrier stands before the small-batch solution.
    """
    spectra, paths = spectra_of(records), paths_of(records)
    parts = [
        *_count_part(spectra),
        *_width_part(spectra),
        *_separability_part(spectra),
        *_path_part(paths),
        *_estimate_part(spectra),
    ]
    why = "; ".join(f"{'yes' if holds else 'no'}: {text}" for holds, text in parts)
    if all(holds for holds, _ in parts):
        return Verdict("shown", f"{why}.")
    top, bulk = _separability(spectra)
    barrier = min(rise(column(paths[SMALL_BATCH], "train loss"))) >= BARRIER
    return Verdict("reversed" if bulk > top and barrier else "not shown", f"{why}.")
