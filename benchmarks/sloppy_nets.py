"""What is measured of nets on digits: spectra, displacement, PAC-Bayes bounds."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import digits_nets
from benchmarks.digits_nets import Params, Rows, Run, Splits
from benchmarks.paired import chosen_rate
from jaxlab.curvature.gram_fisher import gram_fisher
from jaxlab.curvature.pac_bayes import PacBayesGrid, pac_bayes_grid
from jaxlab.curvature.sloppiness import (
    correlation_spectrum,
    displacement_fraction,
    subspace_overlap_curve,
)

ANALYTIC, ISOTROPIC = "analytic", "isotropic"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    seeds: int
    examples: int
    hidden: int
    steps: int
    batch_size: int
    learning_rates: tuple[float, ...]
    pulls: tuple[float, ...]
    k: int  # Hessian and Fisher eigenpairs
    input_range: tuple[int, int]  # indices, the last one not included
    matrix_range: tuple[int, int]
    num_priors: int
    largest_variance: float
    num_final_samples: int

    @property
    def sizes(self) -> dict[str, int]:
        return {"steps": self.steps, "batch_size": self.batch_size}


def number(value: Any) -> float:
    """Rounds to six digits, as many as float32 has.

    Examples:
      >>> number(np.float32(0.1))
      0.1
    """
    return float(f"{float(value):.6g}")


def numbers(values: Any) -> list[float]:
    """Writes a vector as a list."""
    return [number(value) for value in np.asarray(values)]


def measured(seed: int, run: Run, data: Splits, options: Options) -> dict[str, Any]:
    """Measures one trained net: errors, spectra, displacement."""
    _, _, _, at_start, at_end, _ = digits_nets.keys_of(seed)
    fisher = functools.partial(
        gram_fisher,
        digits_nets.apply,
        digits_nets.LIKELIHOOD,
        batch=data.train,
        k=options.k,
        kind="sampled",
    )
    hessian, _ = digits_nets.hessian_pairs(run.end, data.train, k=options.k)
    _, first = fisher(params=run.start, key=at_start)
    values, last = fisher(params=run.end, key=at_end)
    moved = displacement_fraction(first, run.end, run.start)
    return {
        "test error": number(digits_nets.error_fn(run.end, data.test)),
        "train error": number(digits_nets.error_fn(run.end, data.train)),
        "train loss": number(digits_nets.loss_fn(run.end, data.train)),
        "inputs": numbers(correlation_spectrum(data.train[0])),
        "hessian": numbers(hessian),
        "fisher": numbers(values),
        "displacement": number(moved[-1]),
        "displacement by k": numbers(moved),
        "overlap by k": numbers(subspace_overlap_curve(first, last)),
    }


def swept(
    data: Splits, options: Options, done: Callable[[str], Any]
) -> tuple[dict[str, list[float]], list[Run]]:
    """Trains at every rate; gives validation errors, and the nets of the chosen one."""
    tuning, nets = {}, {}
    for rate in options.learning_rates:
        runs = digits_nets.trained(
            options.seeds, data.train, rate, hidden=options.hidden, **options.sizes
        )
        errors = [digits_nets.error_fn(run.end, data.validation) for run in runs]
        tuning[f"{rate:g}"], nets[f"{rate:g}"] = numbers(errors), runs
        done(f"rate {rate:g}")
    return tuning, nets[chosen_rate(tuning)]


@functools.partial(jax.jit, static_argnames="options")
def grid(
    key: jax.Array,
    values: jax.Array,
    vectors: jax.Array,
    run: Run,
    rows: Rows,
    *,
    options: Options,
) -> PacBayesGrid:
    """Computes the bound around the end of a run, priors around its start."""
    return pac_bayes_grid(
        key,
        lambda params: digits_nets.error_fn(params, rows),
        values,
        vectors,
        run.end,
        run.start,
        num_examples=options.examples,
        num_priors=options.num_priors,
        largest_variance=options.largest_variance,
        num_final_samples=options.num_final_samples,
    )


def bounds(
    seed: int, run: Run, data: Splits, rate: float, pull: float, options: Options
) -> dict[str, dict[str, float]]:
    """Trains a net on while pulling it back, then computes both bounds around it."""
    _, _, order, _, _, key = digits_nets.keys_of(seed)
    end: Params = digits_nets.train(
        order, run.end, run.start, data.train, rate, pull, **options.sizes
    )
    values, vectors = digits_nets.hessian_pairs(end, data.train, k=options.k)
    found = {}
    for name, sharp in ((ANALYTIC, values), (ISOTROPIC, jnp.zeros_like(values))):
        best = grid(
            key, sharp, vectors, Run(run.start, end), data.train, options=options
        )
        kept = {
            # From the few draws that choose the prior: it chooses the pull too.
            "tuning": jnp.nanmin(best.bounds),
            "bound": best.bound,
            "error and gap": best.error.upper + best.posterior.gap,
            "error": best.error.mean,
            "divergence": best.posterior.kl,
            "effective dimension": best.posterior.effective_dimension,
            "prior": best.index,
            "train error": digits_nets.error_fn(end, data.train),
            "test error": digits_nets.error_fn(end, data.test),
        }
        found[name] = {what: number(value) for what, value in kept.items()}
    return found
