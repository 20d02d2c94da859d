"""Races on the digits auto-encoder: the same start and batches for every optimizer.

64-48-24-12-24-48-64 with ReLU on pixels in [0, 1]. The objective is the Bernoulli
negative log-likelihood, summed over pixels and averaged over the rows of the batch,
plus ``DECAY/2 ||theta||^2``; what is reported is the likelihood alone, on all training
rows and on the rows held out. Rates are constant, but for those on a cosine from the
rate to zero at the step that is judged.

The paper's form of FishLeg learns its factors by Adam and steps by a constant rate.
Here it takes an auxiliary step at every update, not at every tenth.

Exact natural gradient, the ceiling of FishLeg, has its damping and its quadratic model
on the batch; conjugate gradients stand in place of the learnt inverse.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from benchmarks import noisy_digits, timing
from benchmarks.paired import finite
from jaxlab.curvature import ggn_operator
from jaxlab.datasets import load
from jaxlab.likelihoods import Bernoulli
from jaxlab.models import autoencoder_digits
from jaxlab.optimizers import FishLegState, fishleg, q_apply

SGD, ADAM, FREE = "SGD, momentum", "Adam", "schedule-free AdamW"
MUON, SOPHIA = "Muon", "Sophia"
ADAM_COSINE, MUON_COSINE = "Adam, cosine", "Muon, cosine"
FISHLEG, PAPER, EXACT = "FishLeg", "FishLeg, paper's form", "exact"
RIVALS = (SGD, ADAM, FREE, MUON, SOPHIA)
COSINES = (ADAM_COSINE, MUON_COSINE)
UNTUNED = (FISHLEG, EXACT)
IDENTITY, KFAC = "identity", "kfac-jax"

TRAIN, HELD_OUT = "train", "held-out"
LIKELIHOOD = Bernoulli()
DECAY = 1e-5
DAMPING = 0.3  # FishLeg's default, for the exact direction too
SAFE = 0.01  # a rate at which SGD is safe: where the paper's form starts
PROBES = 10_000  # keys from here on measure and do not train
PRODUCTS = 50  # most of a conjugate gradient solve

Params = Any
# A rate, and the step at which a cosine ends.
Numbers = tuple[jax.Array, jax.Array]


@functools.cache
def _graph() -> nnx.GraphDef:
    return nnx.split(nnx.eval_shape(lambda: autoencoder_digits(rngs=nnx.Rngs(0))))[0]


@jax.jit
def fresh(key: jax.Array) -> Params:
    """Draws the parameters of a start."""
    state = nnx.split(autoencoder_digits(rngs=nnx.Rngs(key)), nnx.Param)[1]
    return nnx.to_pure_dict(state)


def apply_fn(params: Params, x: jax.Array) -> jax.Array:
    return nnx.merge(_graph(), params)(x)


def loss_fn(params: Params, x: jax.Array) -> jax.Array:
    return LIKELIHOOD.nll(apply_fn(params, x), x)


@functools.cache
def data() -> dict[str, jax.Array]:
    """Loads the rows to train on and those held out."""
    parts = [load("digits").splits[name][0] for name in ("train", "validation", "test")]
    return {
        TRAIN: jnp.asarray(parts[0]),
        HELD_OUT: jnp.asarray(np.concatenate(parts[1:])),
    }


def exact_natural_gradient(
    damping: float = DAMPING + DECAY, *, products: int = PRODUCTS
) -> optax.GradientTransformationExtraArgs:
    """Makes the step of FishLeg with ``(F + damping)^-1 g`` itself, by solving for it.

    The quadratic model asks for no other length: what conjugate gradients give is its
    minimum over the directions seen so far.

    Args:
      damping: gamma.
      products: most iterations of conjugate gradients.
    """

    def update(updates, state, params=None, *, fisher_vp, **extra_args):
        damped = lambda v: jax.tree.map(lambda f, x: f + damping * x, fisher_vp(v), v)
        solve = jax.scipy.sparse.linalg.cg
        direction, _ = solve(damped, updates, tol=0.0, maxiter=products)
        return jax.tree.map(jnp.negative, direction), state

    return optax.GradientTransformationExtraArgs(lambda params: (), update)


def make(method: str, numbers: Numbers) -> optax.GradientTransformationExtraArgs:
    """Makes an optimizer of the objective; those of ``UNTUNED`` read no numbers."""
    rate, horizon = numbers
    if method == FISHLEG:
        return fishleg(weight_decay=DECAY)
    if method == PAPER:
        return fishleg(
            rate,
            weight_decay=DECAY,
            aux_mode="adam",
            step="fixed",
            momentum=0.9,
            init_scale=SAFE / rate,
            aux_step=1e-2,
            white_directions=0,
            pre_aux_steps=1,
            update_aux_every=1,
        )
    cosine = lambda count: rate * (1 + jnp.cos(jnp.pi * count / horizon)) / 2
    rule = {
        SGD: lambda: optax.sgd(rate, momentum=0.9),
        ADAM: lambda: optax.adam(rate),
        ADAM_COSINE: lambda: optax.adam(cosine),
        FREE: lambda: optax.contrib.schedule_free_adamw(rate),
        MUON: lambda: optax.contrib.muon(rate),
        MUON_COSINE: lambda: optax.contrib.muon(cosine),
        SOPHIA: lambda: optax.contrib.sophia(rate, weight_decay=0.0),
        EXACT: exact_natural_gradient,
    }[method]()
    return optax.chain(optax.add_decayed_weights(DECAY), rule)


class Run(NamedTuple):
    params: Params
    state: Any


class Batches(NamedTuple):
    """Rows, their order, and the key of the optimizers' own noise."""

    rows: jax.Array
    index: jax.Array
    key: jax.Array


def batches(seed: int, *, batch_size: int, steps: int) -> tuple[Params, Batches]:
    """Draws a start and the batches of every step, without replacement in an epoch."""
    start, order, noise = jax.random.split(jax.random.key(seed), 3)
    rows = data()[TRAIN]
    sizes = {"rows": len(rows), "batch_size": batch_size, "steps": steps}
    return fresh(start), Batches(rows, noisy_digits.batches(order, **sizes), noise)


@functools.partial(jax.jit, static_argnames="method")
def begin(method: str, numbers: Numbers, params: Params) -> Run:
    """Starts a run."""
    return Run(params, make(method, numbers).init(params))


@functools.partial(jax.jit, static_argnames="method")
def advance(
    method: str, numbers: Numbers, run: Run, batches: Batches, ends: tuple[int, int]
) -> Run:
    """Takes the steps ``ends[0]`` to ``ends[1] - 1``."""
    optimizer = make(method, numbers)

    def step(number, run):
        x = batches.rows[batches.index[number]]
        value_fn = lambda params: loss_fn(params, x)
        updates, state = optimizer.update(
            jax.grad(value_fn)(run.params),
            run.state,
            run.params,
            obj_fn=value_fn,
            fisher_vp=ggn_operator(apply_fn, LIKELIHOOD, run.params, (x, None)),
            key=jax.random.fold_in(batches.key, number),
        )
        return Run(optax.apply_updates(run.params, updates), state)

    return jax.lax.fori_loop(*ends, step, run)


@functools.partial(jax.jit, static_argnames="method")
def losses(method: str, run: Run, rows: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Computes the losses; of schedule-free methods those of the averaged params."""
    params = run.params
    if method == FREE:
        params = optax.contrib.schedule_free_eval_params(run.state[1], params)
    return {name: loss_fn(params, x) for name, x in rows.items()}


# One run, and the same for several rates side by side.
ONE = begin, advance, losses
SEVERAL = (
    jax.jit(jax.vmap(begin, (None, (0, None), None)), static_argnums=0),
    jax.jit(jax.vmap(advance, (None, (0, None), 0, None, None)), static_argnums=0),
    jax.jit(jax.vmap(losses, (None, 0, None)), static_argnums=0),
)
NOTHING = np.float32(0), np.float32(0)  # numbers of methods that read none


def race(
    method: str, rates: Sequence[float], seed: int, *, marks: Sequence[int], batch: int
) -> dict[str, np.ndarray]:
    """Runs a method at every rate, or once without one, and judges it at the marks.

    Args:
      method: by name; a cosine starts anew for each mark and ends there.
      rates: the grid.
      seed: of start, order and noise.
      marks: steps, ascending.
      batch: rows of a step.

    Returns:
      Losses ``(rates, marks)`` by rows; the grid counts as one rate where none is read.
    """
    params, given = batches(seed, batch_size=batch, steps=max(marks))
    # One run by itself shares its program with those that are measured otherwise.
    alone = method in UNTUNED
    starts, goes, judges = ONE if alone else SEVERAL
    rates = NOTHING[0] if alone else jnp.asarray(rates, jnp.float32)
    found, before, run = [], 0, None
    for mark in marks:
        numbers = NOTHING if alone else (rates, jnp.float32(mark))
        if run is None or method in COSINES:
            before, run = 0, starts(method, numbers, params)
        run = goes(method, numbers, run, given, (before, mark))
        found.append(jax.device_get(judges(method, run, data())))
        before = mark
    columns = {name: np.stack([at[name] for at in found], axis=-1) for name in data()}
    return {name: np.atleast_2d(losses) for name, losses in columns.items()}


def chosen(tuning: np.ndarray) -> list[int]:
    """Picks the rate of the least mean loss for each mark.

    Args:
      tuning: ``(seeds, rates, marks)``; losses that are not finite count as huge.

    Examples:
      >>> chosen(np.array([[[2.0, 3.0], [1.0, np.nan]]]))
      [1, 0]
    """
    return [int(i) for i in np.vectorize(finite)(tuning).mean(0).argmin(0)]


def share_of_exact(
    key: jax.Array, inverse: Callable[[Any], Any], params: Params, rows: jax.Array
) -> jax.Array:
    """Gives the share of the exact step's model decrease that ``inverse`` makes.

    ``(g.d)^2 / (d.(F + damping) d  g.(F + damping)^-1 g)`` with d = ``inverse(g)``, g
    the gradient on 100 fresh rows and F on 500.

    Args:
      key: of the rows.
      inverse: of gradients.
      params: where F is taken.
      rows: to draw from.
    """
    order = jax.random.permutation(key, rows)
    gradient = jax.grad(loss_fn)(params, order[:100])
    operator = ggn_operator(apply_fn, LIKELIHOOD, params, (order[-500:], None))
    damping = DAMPING + DECAY
    damped = lambda v: jax.tree.map(lambda f, x: f + damping * x, operator(v), v)
    solve = jax.scipy.sparse.linalg.cg
    exact, _ = solve(damped, gradient, tol=1e-5, maxiter=1000)
    direction = inverse(gradient)
    along = optax.tree.vdot(gradient, direction)
    bend = optax.tree.vdot(direction, damped(direction))
    return along**2 / (bend * optax.tree.vdot(gradient, exact))


@jax.jit
def fit_of(key: jax.Array, run: Run, rows: jax.Array) -> dict[str, jax.Array]:
    """Measures FishLeg's inverse, and the identity in its place, on 4 gradients."""
    is_ours = lambda node: isinstance(node, FishLegState)
    (state,) = filter(is_ours, jax.tree.leaves(run.state, is_leaf=is_ours))
    inverses = {FISHLEG: functools.partial(q_apply, state.q), IDENTITY: lambda g: g}
    keys = jax.random.split(key, 4)
    return {
        name: jnp.mean(
            jax.lax.map(lambda k: share_of_exact(k, inverse, run.params, rows), keys)  # noqa: B023
        )
        for name, inverse in inverses.items()
    }


def fits(seed: int, *, marks: Sequence[int], batch: int) -> dict[str, list[float]]:
    """Measures FishLeg's inverse at the marks of a run."""
    params, given = batches(seed, batch_size=batch, steps=max(marks))
    run, before = begin(FISHLEG, NOTHING, params), 0
    found: dict[str, list[float]] = {FISHLEG: [], IDENTITY: []}
    for mark in marks:
        run = advance(FISHLEG, NOTHING, run, given, (before, mark))
        now = fit_of(jax.random.fold_in(given.key, PROBES + mark), run, given.rows)
        for name, value in now.items():
            found[name].append(float(value))
        before = mark
    return found


# Of FishLeg's steps: the first, the dense ones, and the later ones, in tens.
DENSE = 100  # steps
PHASES = {"first": (0, 1), "dense": (20, 30), "late": (200, 210)}


def phase_name(phase: str) -> str:
    return f"{FISHLEG}, {phase}"


def step_seconds(
    methods: Sequence[str], *, batch: int, steps: int, rounds: int
) -> dict[str, list[float]]:
    """Times a step of each method in interleaved rounds; Adam is the baseline.

    Batches beyond ``steps`` are the last one again.
    """
    params, given = batches(0, batch_size=batch, steps=steps)
    numbers = np.float32(0.01), np.float32(steps)
    calls, counts = {}, {}
    for method in methods:
        run = begin(method, numbers, params)
        phases = PHASES if method == FISHLEG else {"": PHASES["dense"]}
        for phase, ends in phases.items():
            name = phase_name(phase) if phase else method
            # The count in the state rules the cadence: bring it where it belongs.
            at = advance(method, numbers, run, given, (0, ends[0]))
            calls[name] = lambda m=method, at=at, ends=ends: advance(
                m, numbers, at, given, ends
            )
            counts[name] = ends[1] - ends[0]
    found = timing.measure(calls, baseline=ADAM, rounds=rounds).samples
    counts[ADAM + timing.AGAIN] = counts[ADAM]
    return {name: [s / counts[name] for s in taken] for name, taken in found.items()}
