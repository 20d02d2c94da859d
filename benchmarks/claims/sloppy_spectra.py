"""Do sloppy inputs make a net's Hessian and Fisher matrix sloppy, and its bound small?

Tanh nets with one hidden layer on digits, and on the same digits whitened: every
direction of the training inputs that carries variance then carries the same, labels
and mean squared norm stay. Each input gets the same learning rates, steps, batches and
seeds; the rate is chosen by the mean validation error.

- Spectra: of the inputs' correlation, of the Hessian after training and of the Fisher
  matrix there (one target an example drawn from the model). Judged is a line through
  log10 of the eigenvalues over their index, in ranges set before a fit: past the first
  eigenvalue up to the rank of the whitened inputs, and past the first ten (as many as
  classes) up to the eigenpairs that the bound takes.
- Displacement: the share of the way from start to end, squared, that lies in the
  leading eigenspace of the Fisher matrix at the start.
- Bounds on the error of random nets around a net that was trained on while pulled back
  to its start: along Hessian eigenvectors by the closed form, or isotropic. Both take
  the same priors and pulls, and each chooses its own scale and its own pull.

The bounds hold with probability 1 - 0.025 over the examples and 1 - 0.01 over the
draws. Start and grid of priors do not depend on the examples; all else may.
"""

import collections
import dataclasses
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from benchmarks import digits_nets, plots
from benchmarks.paired import chosen_rate, difference, spread
from benchmarks.results import Record
from benchmarks.sloppy_nets import (
    ANALYTIC,
    ISOTROPIC,
    Options,
    bounds,
    measured,
    swept,
)
from benchmarks.tables import Table, Verdict
from jaxlab.curvature.sloppiness import Sloppiness, sloppiness

CLAIM = (
    "On digits the spectra of inputs, Hessian and Fisher matrix all fall along a line "
    "over decades; on whitened digits they fall less, and nets generalise worse. A "
    "closed-form PAC-Bayes bound from the Hessian is not vacuous and beats the "
    "isotropic one. Training moves mostly in the top Fisher subspace."
)

DIGITS, WHITENED = "digits", "whitened digits"
TITLES = {
    "inputs": "inputs",
    "hessian": "Hessian at the end",
    "fisher": "Fisher at the end",
}
SPECTRA = tuple(TITLES)
STRAIGHT = 0.9  # least R^2 of the line
CHANCE = 0.9  # error of a guess among ten classes
MOSTLY = 0.5  # share of the displacement


PRESETS = {
    "small": Options(
        seeds=2,
        examples=200,
        hidden=8,
        steps=100,
        batch_size=32,
        learning_rates=(1e-2, 3e-2),
        pulls=(1e-3, 1e-2),
        k=40,
        input_range=(1, 40),
        matrix_range=(10, 40),
        num_priors=10,
        largest_variance=0.5,
        num_final_samples=50,
    ),
    "full": Options(
        seeds=5,
        examples=1_297,
        hidden=64,
        steps=1_000,
        batch_size=128,
        learning_rates=(3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
        pulls=(3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1),
        k=300,
        input_range=(1, 58),
        matrix_range=(10, 300),
        num_priors=80,
        largest_variance=0.5,
        num_final_samples=1_000,
    ),
}


def run(options: Options, progress: Callable[..., Any]) -> Iterator[dict[str, Any]]:
    """Trains on both inputs and measures the nets, then bounds those on digits."""
    total = 2 * (len(options.learning_rates) + options.seeds)
    total += options.seeds * len(options.pulls)
    inputs = {
        DIGITS: digits_nets.splits(options.examples, whitened=False),
        WHITENED: digits_nets.splits(options.examples, whitened=True),
    }

    def record(case: dict[str, str], samples: dict[str, Any]) -> dict[str, Any]:
        return {
            "case": case,
            "data": {"name": DIGITS, "digest": inputs[DIGITS][1]},
            "dtype": "float32",
            "shapes": {"inputs": [options.examples, 64]},
            "seed": list(range(options.seeds)),
            "parameters": (64 + 1) * options.hidden + (options.hidden + 1) * 10,
            "options": dataclasses.asdict(options),
            "samples": samples,
        }

    with progress(total, "claim sloppy_spectra") as tick:
        kept = {}
        for name, (data, _) in inputs.items():
            tuning, runs = swept(data, options, lambda x: tick(f"{name}, {x}"))  # noqa: B023
            kept[name] = tuning, runs
            samples: dict[str, Any] = collections.defaultdict(list, {"tuning": tuning})
            for seed, net in enumerate(runs):
                for what, value in measured(seed, net, data, options).items():
                    samples[what].append(value)
                tick(f"{name}, seed {seed}")
            yield record({"inputs": name}, dict(samples))
        tuning, runs = kept[DIGITS]
        rate, data = float(chosen_rate(tuning)), inputs[DIGITS][0]
        found: dict[str, list[dict[str, dict[str, float]]]] = {}
        for pull in options.pulls:
            found[f"{pull:g}"] = []
            for seed, net in enumerate(runs):
                one = bounds(seed, net, data, rate, pull, options)
                found[f"{pull:g}"].append(one)
                tick(f"bounds, pull {pull:g}, seed {seed}")
        for name in (ANALYTIC, ISOTROPIC):
            tuned = {p: [one[name]["tuning"] for one in found[p]] for p in found}
            best = [one[name] for one in found[chosen_rate(tuned)]]
            yield record(
                {"posterior": name},
                {what: [one[what] for one in best] for what in best[0]}
                | {"tuning": tuned},
            )


def _of(records: list[Record], what: str) -> dict[str, Record]:
    return {r["case"][what]: r for r in records if what in r["case"]}


def fits(record: Record, which: str) -> list[Sloppiness]:
    """Fits a line to one kind of spectrum of every seed, in the range of its kind."""
    options = record["options"]
    low, high = options["input_range" if which == "inputs" else "matrix_range"]
    return [
        Sloppiness(*map(float, sloppiness(np.array(values), low=low, high=high)))
        for values in record["samples"][which]
    ]


def _percent(shares: Sequence[float]) -> str:
    return spread([100 * share for share in shares], 1)


def tables(records: list[Record]) -> list[Table]:
    """Writes the lines through the spectra, the nets and the bounds."""
    nets, posteriors = _of(records, "inputs"), _of(records, "posterior")
    first = nets[DIGITS]
    options, size = first["options"], first["parameters"]
    lines, trained, bounded = [], [], []
    for name, record in nets.items():
        for which in SPECTRA:
            slopes, straight, decades = zip(*fits(record, which), strict=True)
            row = spread(decades, 2), spread(slopes, 4), spread(straight, 3)
            lines.append((name, which, *row, f"{min(straight):.3f}"))
        samples = record["samples"]
        ks = [k for k in (10, 100, options["k"]) if k <= options["k"]]
        at = lambda what, k: [curve[k - 1] for curve in samples[what]]  # noqa: B023
        trained.append(
            (
                name,
                chosen_rate(samples["tuning"]),
                f"{statistics.mean(samples['train loss']):.1e}",
                _percent(samples["train error"]),
                _percent(samples["test error"]),
                ", ".join(
                    f"{statistics.mean(at('displacement by k', k)):.2f}" for k in ks
                ),
                ", ".join(f"{statistics.mean(at('overlap by k', k)):.2f}" for k in ks),
            )
        )
    for name, record in posteriors.items():
        samples = record["samples"]
        bounded.append(
            (
                name,
                chosen_rate(samples["tuning"]),
                ", ".join(f"{index:.0f}" for index in sorted(samples["prior"])),
                f"{statistics.mean(samples['divergence']):.0f}",
                f"{statistics.mean(samples['effective dimension']):.1f}",
                _percent(samples["error"]),
                spread(samples["bound"]),
                spread(samples["error and gap"]),
                _percent(samples["test error"]),
            )
        )
    low, high = options["input_range"]
    start, stop = options["matrix_range"]
    return [
        Table(
            "Lines through log10 of the eigenvalues",
            ("net's inputs", "spectrum", "decades", "a step", "R^2", "least R^2"),
            lines,
            f"Eigenvalues {low + 1} to {high} of the inputs' correlation, {start + 1} "
            f"to {stop} of the matrices. Mean ± standard deviation of "
            f"{len(first['seed'])} seeds.",
        ),
        Table(
            "Nets",
            (
                "inputs",
                "rate",
                "train loss",
                "train error %",
                "test error %",
                f"displacement in top {', '.join(map(str, ks))}",
                "overlap of these, start and end",
            ),
            trained,
            f"64-{options['hidden']}-10, tanh, {size:,} parameters, "
            f"{options['steps']:,} steps of Adam at batch {options['batch_size']} on "
            f"{options['examples']:,} examples. Rates tried: "
            f"{', '.join(first['samples']['tuning'])}, chosen by validation error. "
            "Displacement: share of its square in the top Fisher subspaces at the "
            "start; for a random direction, and for the overlap of random subspaces, "
            f"it is {', '.join(f'{k / size:.3f}' for k in ks)}.",
        ),
        Table(
            "Bounds on the error of random nets",
            (
                "posterior",
                "pull",
                "priors chosen",
                "KL",
                "effective dimension",
                "train error %",
                "bound",
                "error + gap",
                "test error of the mean %",
            ),
            bounded,
            f"Digits, {options['k']} Hessian eigenpairs. Pulls tried: "
            f"{', '.join(posteriors[ANALYTIC]['samples']['tuning'])}, chosen by the "
            "mean bound from a few draws; priors of variance "
            f"{options['largest_variance']:g} exp(-j / 10), j = 1 to "
            f"{options['num_priors']}. Train error: of draws. Means over the seeds.",
        ),
    ]


def verdict(records: list[Record]) -> Verdict:
    """Rules *shown* if six parts hold: two in the mean, the others in every seed.

    Straight: the line through each of the three spectra on digits has an R^2 of
    STRAIGHT at least. Flatter: each spectrum on whitened digits falls through fewer
    decades than that of the same seed on digits. Worse: the 95 % interval of the mean
    difference of test errors, whitened less plain, is above 0. Not vacuous: the bound
    is below CHANCE, and error + gap below 1. Better: the interval of the mean
    difference of bounds, analytic less isotropic, is below 0. Mostly: the share of the
    displacement in the top Fisher subspace is above MOSTLY. *Reversed*: both intervals
    lie on the other side of 0.
    """
    nets, posteriors = _of(records, "inputs"), _of(records, "posterior")
    plain, white = nets[DIGITS], nets[WHITENED]
    straight, flatter, lines, decades = [], [], [], []
    for which in SPECTRA:
        ours, theirs = fits(plain, which), fits(white, which)
        pairs = zip(ours, theirs, strict=True)
        straight.append(all(fit.r_squared >= STRAIGHT for fit in ours))
        flatter.append(all(b.decades < a.decades for a, b in pairs))
        lines.append(f"{which} {np.min([fit.r_squared for fit in ours]):.3f}")
        least = np.min([fit.decades for fit in ours])
        most = np.max([fit.decades for fit in theirs])
        decades.append(f"{which} {least:.2f} against {most:.2f}")
    errors = [record["samples"]["test error"] for record in (white, plain)]
    worse = difference(*errors)
    analytic, isotropic = (posteriors[n]["samples"] for n in (ANALYTIC, ISOTROPIC))
    worst, total = max(analytic["bound"]), max(analytic["error and gap"])
    better = difference(analytic["bound"], isotropic["bound"])
    share = min(plain["samples"]["displacement"])
    straight_text = f"least R^2 on digits, {', '.join(lines)}"
    flatter_text = f"least decades on digits, most on whitened, {', '.join(decades)}"
    parts = {
        f"{straight_text} (rule: at least {STRAIGHT:g})": all(straight),
        f"{flatter_text} (rule: fewer in every seed)": all(flatter),
        f"test error, whitened less plain, {worse} (rule: above 0)": worse.lower > 0,
        f"worst analytic bound {worst:.3f}, error + gap {total:.3f} (rule: below "
        f"{CHANCE:g}, which is chance, and below 1)": worst < CHANCE and total < 1,
        f"bound, analytic less isotropic, {better} (rule: below 0)": better.upper < 0,
        "least share of the displacement in the top Fisher subspace "
        f"{share:.3f} (rule: above {MOSTLY:g})": share > MOSTLY,
    }
    why = "; ".join(f"{'yes' if held else 'no'}: {p}" for p, held in parts.items())
    if all(parts.values()):
        return Verdict("shown", f"{why}.")
    other = worse.upper < 0 and better.lower > 0
    return Verdict("reversed" if other else "not shown", f"{why}.")


def draw(records: list[Record]) -> Figure:
    """Draws the spectra, the displacement, the test errors and the bounds."""
    nets, posteriors = _of(records, "inputs"), _of(records, "posterior")
    options, size = nets[DIGITS]["options"], nets[DIGITS]["parameters"]
    colours = dict(zip(nets, plots.COLOURS, strict=False))
    with rc_context(plots.STYLE):
        figure = Figure(figsize=(10, 6.2), layout="constrained")
        above, below = figure.subplots(2, 3)
        curves = [*zip(above, SPECTRA, strict=True), (below[0], "displacement by k")]
        for axes, which in curves:
            for name, record in nets.items():
                for curve in record["samples"][which]:
                    shown = np.array(curve)
                    shown[shown < 1e-9 * shown.max()] = np.nan  # zeros, up to round-off
                    axes.plot(1 + np.arange(len(shown)), shown, color=colours[name])
        for axes, which in curves[:-1]:
            low, high = options["input_range" if which == "inputs" else "matrix_range"]
            axes.axvspan(low + 1, high, color="#f0f0f0", zorder=0)
            axes.set(yscale="log", xlabel="index (grey: range of the line)")
            axes.set_title(f"Eigenvalues: {TITLES[which]}")
        top = np.array([1, options["k"]])
        below[0].plot(top, top / size, "--", color="#666666")
        below[0].set(ylim=(0, 1), xlabel="k (dashed: a random direction)")
        below[0].set_title("Displacement in top-k Fisher space")
        for place, record in enumerate(nets.values()):
            errors = [100 * error for error in record["samples"]["test error"]]
            colour = plots.COLOURS[place]
            below[1].plot([place] * len(errors), errors, "o", color=colour, alpha=0.6)
        below[1].set_title("Test error, %")
        marks = {"bound": "o", "error": "x"}
        for place, record in enumerate(posteriors.values()):
            for what, mark in marks.items():
                values = record["samples"][what]
                below[2].plot([place] * len(values), values, mark, color="#666666")
        below[2].axhline(CHANCE, ls="--", color="#666666", lw=1)
        below[2].set_title("Bound (o), error of draws (x)")
        below[2].set_xlabel("dashed: error by chance")
        for axes, names in ((below[1], nets), (below[2], posteriors)):
            axes.set_xticks(range(len(names)), list(names))
            axes.set_xlim(-0.6, len(names) - 0.4)
            axes.set_ylim(0, 1.1 * axes.get_ylim()[1])
        for name, colour in colours.items():
            above[0].plot([], [], color=colour, label=name)
        figure.legend(loc="outside upper left", ncols=2, frameon=False)
    return figure
