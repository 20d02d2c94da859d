"""A posterior and a prior aligned with a Fisher matrix, optimised for their bound.

U and f are the leading Fisher eigenpairs at theta0. With three scales s, a, b the prior
N(theta0, .) has variance s (f_i / f_1 + a) along u_i and b elsewhere: wide where the
outputs depend on the parameters, since training moves there. The posterior N(mu, .) has
variance exp(2 xi_i) along u_i and exp(2 xi_c) elsewhere. Minimised over mu, xi, xi_c
and the logarithms of the scales, by draws from the posterior, is

    mean loss in bits + sqrt((KL + penalty) / (2 (n-1))).

The scales depend on the examples now, so the bound takes a union: each is
largest_variance exp(-j / spacing) with j = 1, 2, ..., and the penalty is ln(n / delta)
plus ln(pi^2 j^2 / 6) for each of the three. During the optimisation j is continuous;
at the end it is rounded and the divergence computed again.

References: Yang, Mao, Chaudhari, ICML 2022; Dziugaite, Roy, UAI 2017 (the rounding).
Ours: the scales are relative to f_1, and the union is over all three of them.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Key, PyTree

from jaxlab._checks import check_count, check_number
from jaxlab.curvature._subspaces import (
    coefficients,
    combination,
    count_of,
    displacement,
)
from jaxlab.curvature._vectors import Space, space_of
from jaxlab.curvature.pac_bayes.analytic import (
    PacBayes,
    certify,
    penalty,
)
from jaxlab.curvature.pac_bayes.gaussians import axes_of, sample_gaussian_low_rank


class _Scales(NamedTuple):
    """Turns indices of the grid into variances of the prior."""

    spectrum: Float[Array, " k"]  # f_i / f_1
    largest: float
    spacing: float

    def indices(self, log_scales: Float[Array, " 3"]) -> Float[Array, " 3"]:
        return jnp.maximum(self.spacing * (math.log(self.largest) - log_scales), 1)

    def prior(self, indices: Float[Array, " 3"]) -> dict[str, Array]:
        scale, floor, outside = self.largest * jnp.exp(-indices / self.spacing)
        return {
            "prior_precisions": 1 / (scale * (self.spectrum + floor)),
            "prior_precision_outside": 1 / outside,
        }


def pac_bayes_optimize(
    key: Key[Array, ""],
    loss_fn: Callable[..., Any],
    eigenvalues: Float[ArrayLike, " k"],
    vectors: PyTree,
    params: PyTree,
    params0: PyTree,
    *,
    num_examples: int,
    batches: PyTree | None = None,
    num_steps: int = 1_000,
    optimizer: optax.GradientTransformation | None = None,
    delta: float = 0.025,
    largest_variance: float = 10.0,
    spacing: float = 10.0,
    units: Literal["nats", "bits"] = "nats",
) -> tuple[PacBayes, Float[Array, " {num_steps}"]]:
    """Optimises posterior and Fisher-aligned prior for their bound.

    Eigenpairs and ``params0`` belong to the prior: compute them from other examples
    than the ``num_examples``, held out or without labels. One gradient of the loss and
    about 10 k p operations a step, in one ``lax.scan``.

    Args:
      key: of the draws, one a step.
      loss_fn: ``(params, batch) -> mean loss``, or ``params -> mean loss`` where no
        batches are given; it is minimised in the place of the error.
      eigenvalues: f >= 0, (k,), descending, of the Fisher matrix at ``params0``
        (:func:`gram_fisher`).
      vectors: its orthonormal eigenvectors, a matrix (k, p) or a tree like ``params``
        with a leading axis on each leaf.
      params: the trained parameters; the posterior's mean starts here.
      params0: mean of the prior.
      num_examples: n, at least 8.
      batches: a tree like one batch whose leaves have a leading axis; gone through in
        order and again.
      num_steps: at least 1.
      optimizer: of a dict ``mean`` (float32 at least, like ``params``), ``log_std``
        (k,), ``log_std_outside`` () and ``log_scales`` (3,); by default Adam with rate
        1e-3 for the mean and 1e-2 for the rest.
      delta: the probability over the examples that the bound fails, in (0, 1).
      largest_variance: of the grid of prior scales. It and the next are fixed without
        the examples.
      spacing: points of the grid per factor e, positive.
      units: of the loss. "nats" are turned into bits, of which the error is no more.

    Returns:
      The posterior with its certificate, for :func:`gibbs_error` and ``bound``, and
      the objective at each step.

    Raises:
      ValueError: if shapes do not fit together or a number is out of range.

    Examples:
      >>> loss = lambda params: jnp.sum(params**2)
      >>> found, history = pac_bayes_optimize(
      ...     jax.random.key(0), loss, jnp.ones(1), jnp.eye(3)[:1], jnp.ones(3),
      ...     jnp.zeros(3), num_examples=100, num_steps=50,
      ... )
      >>> bool(history[-1] < history[0])
      True
    """
    name = "pac_bayes_optimize"
    space = space_of(name, params, "params")
    blocks = axes_of(name, vectors, space)
    f = jnp.asarray(eigenvalues)
    if f.shape != (count_of(blocks),):
        raise ValueError(
            f"{name}: eigenvalues must have one entry for each of the "
            f"{count_of(blocks)} vectors, got shape {f.shape}."
        )
    check_count(name, num_steps=num_steps)
    check_number(name, "in (0, 1)", delta=delta)
    delta = float(delta)
    check_number(name, "finite and >= 8", num_examples=num_examples)
    widths = {"largest_variance": largest_variance, "spacing": spacing}
    check_number(name, "finite and > 0", **widths)
    if units not in ("nats", "bits"):
        raise ValueError(f'{name}: units must be "nats" or "bits", got {units!r}.')
    counts = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(batches)}
    if batches is not None and (len(counts) != 1 or counts <= {(), (0,)}):
        raise ValueError(
            f"{name}: the leaves of batches need one leading axis of the same length, "
            f"at least 1; got {sorted(counts)}."
        )
    f = jnp.maximum(f.astype(space.dtype), 0)
    top = f.max()
    scales = _Scales(f / jnp.where(top > 0, top, 1), largest_variance, spacing)
    wide = dataclasses.replace(space, dtypes=(space.dtype,) * len(space.dtypes))
    optimizer = _default_optimizer() if optimizer is None else optimizer
    bits = math.log(2) if units == "nats" else 1.0

    def certificate(state, indices) -> PacBayes:
        return certify(
            name,
            state["mean"],
            params0,
            vectors,
            precisions=jnp.exp(-2 * state["log_std"]),
            precision_outside=jnp.exp(-2 * state["log_std_outside"]),
            **scales.prior(indices),
            penalty=penalty(name, num_examples, delta, indices),
            num_examples=num_examples,
        )

    def objective(state, key, batch):
        found = certificate(state, scales.indices(state["log_scales"]))
        draw = sample_gaussian_low_rank(
            key,
            found.mean,
            vectors,
            precisions=found.precisions,
            precision_outside=found.precision_outside,
        )
        draw = space.unflatten(wide.flatten(draw))
        return loss_fn(draw, *batch) / bits + found.gap

    def step(carry, now):
        state, memory = carry
        index, key = now
        batch = ()
        if batches is not None:
            ((count,),) = counts
            batch = (jax.tree.map(lambda x: jnp.asarray(x)[index % count], batches),)
        value, grads = jax.value_and_grad(objective)(state, key, batch)
        updates, memory = optimizer.update(grads, memory, state)
        return (optax.apply_updates(state, updates), memory), value

    with jax.named_scope(name):
        state = _start(name, params, params0, space, blocks, scales)
        state["mean"] = wide.unflatten(state["mean"])
        now = (jnp.arange(num_steps), jax.random.split(key, num_steps))
        (state, _), history = jax.lax.scan(step, (state, optimizer.init(state)), now)
        state["mean"] = space.unflatten(wide.flatten(state["mean"]))
        return certificate(
            state, jnp.round(scales.indices(state["log_scales"]))
        ), history


def _start(
    name: str, params: PyTree, params0: PyTree, space: Space, blocks, scales: _Scales
) -> dict[str, Array]:
    """Matches the prior to the displacement, and the posterior to the prior."""
    moved = displacement(name, params, params0, space)
    inside = coefficients(blocks, moved)
    outside = moved - combination(blocks, inside)
    rest = max(space.size - count_of(blocks), 1)
    floor = jnp.clip(scales.spectrum.mean(), 1e-6, scales.largest / 2)
    variances = jnp.stack(
        [
            jnp.mean(inside**2 / (scales.spectrum + floor)),
            floor,
            jnp.vdot(outside, outside) / rest,
        ]
    )
    most = scales.largest * math.exp(-1 / scales.spacing)
    log_scales = jnp.log(jnp.clip(variances, 1e-6 * most, most))
    prior = scales.prior(scales.indices(log_scales))
    return {
        "mean": space.flatten(params),
        "log_std": -0.5 * jnp.log(prior["prior_precisions"]),
        "log_std_outside": -0.5 * jnp.log(prior["prior_precision_outside"]),
        "log_scales": log_scales,
    }


def _default_optimizer() -> optax.GradientTransformation:
    rates = {"mean": 1e-3, "scale": 1e-2}
    labels = {
        "mean": "mean",
        "log_std": "scale",
        "log_std_outside": "scale",
        "log_scales": "scale",
    }
    return optax.partition({k: optax.adam(rate) for k, rate in rates.items()}, labels)
