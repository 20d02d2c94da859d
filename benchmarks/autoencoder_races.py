"""Races on auto-encoders: the same start and batches for every optimizer.

On digits 64-48-24-12-24-48-64, on 2,000 images of CURVES 784-400-200-100-50-25-6 and
its mirror image, with ReLU on pixels in [0, 1]. The objective is the Bernoulli
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
from jaxlab.datasets import curves, load
from jaxlab.likelihoods import Bernoulli
from jaxlab.models import autoencoder_curves, autoencoder_digits
from jaxlab.optimizers import FishLegState, fishleg, q_apply

SGD, ADAM, FREE = "SGD, momentum", "Adam", "schedule-free AdamW"
MUON, SOPHIA = "Muon", "Sophia"
ADAM_COSINE, MUON_COSINE = "Adam, cosine", "Muon, cosine"
FISHLEG, PAPER, EXACT = "FishLeg", "FishLeg, paper's form", "exact"
APART = "FishLeg, directions apart, sides whole"  # what the defaults came from
RIVALS = (SGD, ADAM, FREE, MUON, SOPHIA)
COSINES = (ADAM_COSINE, MUON_COSINE)
UNTUNED = (FISHLEG, APART, EXACT)
IDENTITY, KFAC = "identity", "kfac-jax"

TRAIN, HELD_OUT = "train", "held-out"
BEST = "train, best rate of the seed"
FIRST_TUNING_SEED = 1_000
DIGITS, CURVES = "digits", "curves"
BATCH = {DIGITS: 100, CURVES: 200}
IMAGES = 2_000  # of CURVES, to train on and held out
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
def _graph(net: str) -> nnx.GraphDef:
    return nnx.split(nnx.eval_shape(lambda: _model(net, nnx.Rngs(0))))[0]


def _model(net: str, rngs: nnx.Rngs) -> nnx.Module:
    return {DIGITS: autoencoder_digits, CURVES: autoencoder_curves}[net](rngs=rngs)


@functools.partial(jax.jit, static_argnames="net")
def fresh(key: jax.Array, net: str = DIGITS) -> Params:
    """Draws the parameters of a start."""
    return nnx.to_pure_dict(nnx.split(_model(net, nnx.Rngs(key)), nnx.Param)[1])


def apply_fn(params: Params, x: jax.Array, net: str = DIGITS) -> jax.Array:
    return nnx.merge(_graph(net), params)(x)


def loss_fn(params: Params, x: jax.Array, net: str = DIGITS) -> jax.Array:
    return LIKELIHOOD.nll(apply_fn(params, x, net), x)


@functools.cache
def data(net: str = DIGITS) -> dict[str, jax.Array]:
    """Loads the rows to train on and those held out."""
    if net == CURVES:
        (rows, _), _ = curves(train=2 * IMAGES, test=1).splits.values()
        return {TRAIN: jnp.asarray(rows[:IMAGES]), HELD_OUT: jnp.asarray(rows[IMAGES:])}
    parts = [load("digits").splits[name][0] for name in ("train", "validation", "test")]
    return {
        TRAIN: jnp.asarray(parts[0]),
        HELD_OUT: jnp.asarray(np.concatenate(parts[1:])),
    }


def head(net: str = DIGITS) -> dict[str, str]:
    """Names the data of a record."""
    found = curves(train=2 * IMAGES, test=1) if net == CURVES else load("digits")
    return {"name": found.name, "digest": found.digest}


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
    if method == APART:
        return fishleg(weight_decay=DECAY, combine=False, max_size=1024)
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


def batches(
    seed: int, *, batch_size: int, steps: int, net: str = DIGITS
) -> tuple[Params, Batches]:
    """Draws a start and the batches of every step, without replacement in an epoch."""
    start, order, noise = jax.random.split(jax.random.key(seed), 3)
    rows = data(net)[TRAIN]
    sizes = {"rows": len(rows), "batch_size": batch_size, "steps": steps}
    return fresh(start, net), Batches(rows, noisy_digits.batches(order, **sizes), noise)


@functools.partial(jax.jit, static_argnames="method")
def begin(method: str, numbers: Numbers, params: Params) -> Run:
    """Starts a run."""
    return Run(params, make(method, numbers).init(params))


@functools.partial(jax.jit, static_argnames=("method", "net"))
def advance(
    method: str,
    numbers: Numbers,
    run: Run,
    batches: Batches,
    ends: tuple[int, int],
    net: str = DIGITS,
) -> Run:
    """Takes the steps ``ends[0]`` to ``ends[1] - 1``."""
    optimizer = make(method, numbers)
    apply = functools.partial(apply_fn, net=net)

    def step(number, run):
        x = batches.rows[batches.index[number]]
        value_fn = lambda params: loss_fn(params, x, net)
        updates, state = optimizer.update(
            jax.grad(value_fn)(run.params),
            run.state,
            run.params,
            obj_fn=value_fn,
            fisher_vp=ggn_operator(apply, LIKELIHOOD, run.params, (x, None)),
            key=jax.random.fold_in(batches.key, number),
        )
        return Run(optax.apply_updates(run.params, updates), state)

    return jax.lax.fori_loop(*ends, step, run)


@functools.partial(jax.jit, static_argnames=("method", "net"))
def losses(
    method: str, run: Run, rows: dict[str, jax.Array], net: str = DIGITS
) -> dict[str, jax.Array]:
    """Computes the losses; of schedule-free methods those of the averaged params."""
    params = run.params
    if method == FREE:
        params = optax.contrib.schedule_free_eval_params(run.state[1], params)
    return {name: loss_fn(params, x, net) for name, x in rows.items()}


# One run, and the same for several rates side by side, which pays on a small net.
ONE = begin, advance, losses
SEVERAL = (
    jax.jit(jax.vmap(begin, (None, (0, None), None)), static_argnums=0),
    jax.jit(
        jax.vmap(advance, (None, (0, None), 0, None, None, None)),
        static_argnums=(0, 5),
    ),
    jax.jit(jax.vmap(losses, (None, 0, None, None)), static_argnums=(0, 3)),
)
NOTHING = np.float32(0), np.float32(0)  # numbers of methods that read none


def race(
    method: str,
    rates: Sequence[float],
    seed: int,
    *,
    marks: Sequence[int],
    batch: int,
    net: str = DIGITS,
) -> dict[str, np.ndarray]:
    """Runs a method at every rate, or once without one, and judges it at the marks.

    Args:
      method: by name; a cosine starts anew for each mark and ends there.
      rates: the grid.
      seed: of start, order and noise.
      marks: steps, ascending.
      batch: rows of a step.
      net: DIGITS or CURVES.

    Returns:
      Losses ``(rates, marks)`` by rows; the grid counts as one rate where none is read.
    """
    start = batches(seed, batch_size=batch, steps=max(marks), net=net)
    # One run by itself shares its program with those that are measured otherwise.
    if method in UNTUNED:
        found = [_judged(method, NOTHING[0], start, marks, net, ONE)]
    elif net == DIGITS:
        every = jnp.asarray(rates, jnp.float32)
        losses = _judged(method, every, start, marks, net, SEVERAL)
        found = [{n: at[..., i] for n, at in losses.items()} for i in range(len(rates))]
    else:
        each = [np.float32(rate) for rate in rates]
        found = [_judged(method, rate, start, marks, net, ONE) for rate in each]
    return {name: np.stack([one[name] for one in found]) for name in data(net)}


def _judged(method, rates, start, marks, net, programs) -> dict[str, np.ndarray]:
    """Judges one run, or several, at the marks, which become the leading axis."""
    starts, goes, judges = programs
    params, given = start
    found, before, run = [], 0, None
    for mark in marks:
        numbers = rates, np.float32(mark)
        if run is None or method in COSINES:
            before, run = 0, starts(method, numbers, params)
        run = goes(method, numbers, run, given, (before, mark), net)
        found.append(jax.device_get(judges(method, run, data(net), net)))
        before = mark
    return {name: np.stack([at[name] for at in found]) for name in data(net)}


def raced(
    method: str,
    rates: Sequence[float],
    marks: Sequence[int],
    *,
    batch: int,
    seeds: int,
    tuning_seeds: int,
    net: str = DIGITS,
    hindsight: bool = True,
) -> dict[str, Any]:
    """Tunes a method for each mark and runs it on the judged seeds.

    Args:
      method: by name.
      rates: the grid.
      marks: steps, ascending.
      batch: rows of a step.
      seeds: that are judged, from 0 on.
      tuning_seeds: other seeds, which choose the rate for each mark.
      net: DIGITS or CURVES.
      hindsight: run the judged seeds at every rate, not only at those chosen.

    Returns:
      ``samples``: losses by rows, seeds and marks, and, with hindsight, the training
      losses at the best rate of each seed. Where there is a rate also ``numbers``, one
      for each mark, and ``tuning``, the mean training losses by rate.
    """
    sizes = {"marks": marks, "batch": batch, "net": net}
    numbers, best = {}, [0] * len(marks)
    if method not in UNTUNED:
        seeds_apart = range(FIRST_TUNING_SEED, FIRST_TUNING_SEED + tuning_seeds)
        tuning = np.stack([race(method, rates, s, **sizes)[TRAIN] for s in seeds_apart])
        best = chosen(tuning)
        means = np.vectorize(finite)(tuning).mean(0)
        numbers = {
            "numbers": [rates[i] for i in best],
            "tuning": {
                f"{r:g}": _rounded(m) for r, m in zip(rates, means, strict=True)
            },
        }
        if not hindsight:
            kept = sorted(set(best))
            rates, best = [rates[i] for i in kept], [kept.index(i) for i in best]
    found = [race(method, rates, seed, **sizes) for seed in range(seeds)]
    take = lambda losses: _rounded(losses[best, range(len(marks))])
    samples = {name: [take(one[name]) for one in found] for name in found[0]}
    if hindsight:
        samples[BEST] = [_rounded(np.vectorize(finite)(f[TRAIN]).min(0)) for f in found]
    return {"marks": list(marks), "samples": samples, **numbers}


def _rounded(losses: np.ndarray) -> list[float]:
    return [float(f"{finite(float(loss)):.6g}") for loss in losses]


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


def phase_name(phase: str, method: str = FISHLEG) -> str:
    return f"{method}, {phase}"


def step_seconds(
    methods: Sequence[str], *, batch: int, steps: int, rounds: int, net: str = DIGITS
) -> dict[str, list[float]]:
    """Times a step of each method in interleaved rounds; Adam is the baseline.

    Batches beyond ``steps`` are the last one again.
    """
    params, given = batches(0, batch_size=batch, steps=steps, net=net)
    numbers = np.float32(0.01), np.float32(steps)
    calls, counts = {}, {}
    for method in methods:
        run = begin(method, numbers, params)
        phases = PHASES if method in (FISHLEG, APART) else {"": PHASES["dense"]}
        for phase, ends in phases.items():
            name = phase_name(phase, method) if phase else method
            # The count in the state rules the cadence: bring it where it belongs.
            at = advance(method, numbers, run, given, (0, ends[0]), net)
            calls[name] = lambda m=method, at=at, ends=ends: advance(
                m, numbers, at, given, ends, net
            )
            counts[name] = ends[1] - ends[0]
    found = timing.measure(calls, baseline=ADAM, rounds=rounds).samples
    counts[ADAM + timing.AGAIN] = counts[ADAM]
    return {name: [s / counts[name] for s in taken] for name, taken in found.items()}
