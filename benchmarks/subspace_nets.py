"""Lines, curves and simplexes of networks, SWA and ensembles on digits, tuned alike.

Every run is that of a subspace: a single network is one of one endpoint. All take
momentum SGD, weight decay in the gradient, and a rate that falls along a cosine.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import noisy_digits
from benchmarks.noisy_digits import Rows
from benchmarks.paired import chosen_rate
from jaxlab.sharpness import (
    bezier_coefficients,
    cosine_squared,
    line_coefficients,
    sample_simplex,
    simplex_point,
    subspace_init,
    subspace_loss,
)

NETWORK, LINE, CURVE, SIMPLEX = "network", "line", "curve", "simplex"
NUM_ENDPOINTS = {NETWORK: 1, LINE: 2, CURVE: 3, SIMPLEX: 3}
NET = noisy_digits.net("MLP-S")
FIRST_TUNING_SEED = 1_000
POSITIONS = tuple(place / 10 for place in range(11))  # along a line

Endpoints = Any  # a tree of arrays with the leading axes (seed, endpoint)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    seeds: int  # a multiple of tuning_seeds
    tuning_seeds: int
    shares: tuple[float, ...]  # of wrong labels
    steps: int
    batch_size: int
    rates: tuple[float, ...]  # of networks
    subspace_rates: tuple[float, ...]
    decays: tuple[float, ...]  # 0 among them
    betas: tuple[float, ...]
    tails: tuple[tuple[float, float], ...]  # of SWA: where it begins, and Config.tail


class Config(NamedTuple):
    """The numbers of a run."""

    rate: float
    decay: float = 0.0
    beta: float = 0.0
    begin: float = 1.0  # share of the run after which weights are averaged; 1: never
    tail: float = -1.0  # rate after that, as a share of the first; below 0: the cosine

    def __str__(self) -> str:
        parts = [f"rate {self.rate:g}", f"decay {self.decay:g}"]
        parts += [f"beta {self.beta:g}"] if self.beta else []
        if self.begin < 1:
            tail = f"{self.tail:g} of the rate" if self.tail >= 0 else "cosine"
            parts.append(f"from {self.begin:g} on, {tail}")
        return ", ".join(parts)


class Method(NamedTuple):
    kind: str  # a key of NUM_ENDPOINTS
    points: tuple[tuple[float, ...], ...]  # whose probabilities are averaged
    copies: int = 1  # networks trained apart, whose probabilities are averaged too
    knob: str | None = None  # what is tuned beside rate and decay: a field of Options
    cost: int = 1  # in gradients a step

    def knobs(self, options: Options) -> list[dict[str, float]]:
        """Lists what the knob may be, as fields of ``Config``."""
        if self.knob == "tails":
            return [{"begin": a, "tail": b} for a, b in options.tails]
        return [{"beta": b} for b in options.betas] if self.knob == "betas" else [{}]


METHODS = {
    "SGD": Method(NETWORK, ((1.0,),)),
    "SWA": Method(NETWORK, ((1.0,),), knob="tails"),
    "2 networks": Method(NETWORK, ((1.0,),), copies=2, cost=2),
    "line": Method(LINE, ((0.5, 0.5),), knob="betas"),
    "line, 2 points": Method(LINE, ((0.75, 0.25), (0.25, 0.75)), knob="betas"),
    "curve": Method(CURVE, ((0.25, 0.25, 0.5),), knob="betas"),
    "simplex": Method(SIMPLEX, ((1 / 3, 1 / 3, 1 / 3),), knob="betas"),
}


def rate_at(config: Any, step: Any, steps: int) -> jax.Array:
    """Computes a step's rate: a cosine to zero, or to a constant tail.

    Examples:
      >>> swa = Config(1.0, begin=0.5, tail=0.25)
      >>> [round(float(rate_at(swa, step, 8)), 3) for step in (0, 2, 4, 6)]
      [1.0, 0.625, 0.25, 0.25]
      >>> round(float(rate_at(Config(1.0), 4, 8)), 3)
      0.5
    """
    falls = jnp.where(config.tail < 0, 1.0, config.begin) * steps
    cosine = (1 + jnp.cos(jnp.pi * jnp.minimum(step / falls, 1))) / 2
    last = jnp.maximum(config.tail, 0)
    return config.rate * (last + (1 - last) * cosine)


class Draws(NamedTuple):
    """What one run takes from its key, a row for each step."""

    rows: jax.Array
    coefficients: jax.Array
    keys: jax.Array  # of the pair in the penalty


@functools.partial(jax.jit, static_argnames=("steps", "batch_size"))
def _orders(keys, *, steps, batch_size):
    order = functools.partial(noisy_digits.batches, rows=noisy_digits.TRAIN)
    return jax.vmap(lambda k: order(k, batch_size=batch_size, steps=steps))(keys)


@functools.partial(jax.jit, static_argnames=("kind", "steps"))
def _coefficients(keys, *, kind, steps):
    def one(key):
        if kind == LINE:
            return line_coefficients(jax.random.uniform(key))
        if kind == CURVE:
            return bezier_coefficients(jax.random.uniform(key))
        return sample_simplex(key, NUM_ENDPOINTS[kind])

    return jax.vmap(lambda k: jax.vmap(one)(jax.random.split(k, steps)))(keys)


@jax.jit
def _starts(keys):
    most = max(NUM_ENDPOINTS.values())
    return jax.vmap(lambda k: subspace_init(k, NET.start, num_endpoints=most))(keys)


@functools.partial(jax.jit, static_argnames=("parts",))
def _split(keys, *, parts):
    return jax.vmap(lambda k: jax.random.split(k, parts))(keys)


def prepared(
    kind: str, keys: jax.Array, *, steps: int, batch_size: int
) -> tuple[Endpoints, Draws]:
    """Draws starts, batches and points of several runs, one for each key.

    All kinds begin at the first of the same three endpoints.
    """
    starts, orders, points, pairs = _split(keys, parts=4).T
    draws = Draws(
        _orders(orders, steps=steps, batch_size=batch_size),
        _coefficients(points, kind=kind, steps=steps),
        _split(pairs, parts=steps),
    )
    first = jax.tree.map(lambda w: w[:, : NUM_ENDPOINTS[kind]], _starts(starts))
    return first, draws


@jax.jit
def train(
    starts: Endpoints, draws: Draws, inputs: jax.Array, labels: jax.Array, config: Any
) -> Endpoints:
    """Trains endpoints, with SWA their mean over the last steps; axis 0: runs.

    Args:
      starts: the endpoints of each run.
      draws: of each run.
      inputs: the rows, the same for every run.
      labels: of each run.
      config: a ``Config``, whose numbers are traced.
    """

    def run(endpoints, draws, labels):
        steps = len(draws.rows)
        optimizer = optax.chain(
            optax.add_decayed_weights(config.decay),
            optax.sgd(lambda step: rate_at(config, step, steps), momentum=0.9),
        )

        def step(carry, number_and_draw):
            endpoints, state, mean, count = carry
            number, draw = number_and_draw
            batch = inputs[draw.rows], labels[draw.rows]
            grads = jax.grad(
                lambda w: subspace_loss(
                    lambda point: NET.loss_fn(point, batch),
                    w,
                    draw.coefficients,
                    beta=config.beta,
                    key=draw.keys,
                )
            )(endpoints)
            updates, state = optimizer.update(grads, state, endpoints)
            endpoints = optax.apply_updates(endpoints, updates)
            taken = number >= jnp.minimum(config.begin * steps, steps - 1)
            count = count + taken
            part = taken / jnp.maximum(count, 1)
            mean = jax.tree.map(lambda m, w: m + part * (w - m), mean, endpoints)
            return (endpoints, state, mean, count), None

        begin = endpoints, optimizer.init(endpoints), endpoints, jnp.int32(0)
        (_, _, mean, _), _ = jax.lax.scan(step, begin, (jnp.arange(steps), draws))
        return mean

    return jax.vmap(run)(starts, draws, labels)


@jax.jit
def point_probabilities(
    endpoints: Endpoints, coefficients: jax.Array, inputs: jax.Array
) -> jax.Array:
    """Computes the probabilities at one point of each run's subspace."""

    def one(w):
        return jax.nn.softmax(NET.apply_fn(simplex_point(w, coefficients), inputs))

    return jax.vmap(one)(endpoints)


@jax.jit
def judged(probabilities: jax.Array, labels: jax.Array) -> dict[str, jax.Array]:
    """Measures probabilities; axis 0: runs."""

    def one(p):
        likely = jnp.take_along_axis(p, labels[:, None], 1)
        return {
            "accuracy": noisy_digits.accuracy(p, labels),
            "loss": -jnp.mean(jnp.log(jnp.maximum(likely, 1e-30))),
            "calibration error": noisy_digits.calibration_error(p, labels),
        }

    return jax.vmap(one)(probabilities)


class Laboratory:
    """Trains and reads networks on digits with one share of wrong labels."""

    def __init__(self, options: Options, share: float):
        self.options = options
        self.tuning = range(FIRST_TUNING_SEED, FIRST_TUNING_SEED + options.tuning_seeds)
        self.judging = range(options.seeds)
        self.data = {
            seed: noisy_digits.splits(seed, share=share)
            for seed in (*self.tuning, *self.judging)
        }
        self.shared = self.data[0]
        self._prepared = functools.cache(self._prepare)

    def _prepare(self, kind: str, copy: int, seeds: range):
        keys = jnp.stack([jax.random.fold_in(jax.random.key(s), copy) for s in seeds])
        options = self.options
        size = {"steps": options.steps, "batch_size": options.batch_size}
        labels = jnp.stack([self.data[seed].train[1] for seed in seeds])
        return *prepared(kind, keys, **size), labels

    def trained(self, kind: str, config: Config, seeds: range, copy: int) -> Endpoints:
        """Trains a run for each seed, as many at a time as are tuned with."""
        numbers = Config(*map(jnp.float32, config))
        found, size = [], len(self.tuning)
        for place in range(0, len(seeds), size):
            starts, draws, labels = self._prepared(
                kind, copy, seeds[place : place + size]
            )
            found.append(train(starts, draws, self.shared.train[0], labels, numbers))
        return jax.tree.map(lambda *w: jnp.concatenate(w), *found)

    def runs(self, method: Method, config: Config, seeds: range) -> list[Endpoints]:
        """Trains every network that a method reads."""
        each = range(method.copies)
        return [self.trained(method.kind, config, seeds, copy) for copy in each]

    def read(self, method: Method, runs: Iterable[Endpoints], rows: Rows):
        """Measures the mean of a method's probabilities."""
        every = [
            point_probabilities(run, jnp.array(point, jnp.float32), rows[0])
            for run in runs
            for point in method.points
        ]
        return judged(sum(every) / len(every), rows[1])

    def sharpness(self, method: Method, runs: Endpoints) -> list[float]:
        """Finds the top eigenvalue of the training loss at a method's one point."""
        (coefficients,) = method.points
        at = jax.jit(lambda w: simplex_point(w, jnp.array(coefficients, jnp.float32)))
        found = []
        for place, seed in enumerate(self.judging):
            params = at(jax.tree.map(lambda w: w[place], runs))  # noqa: B023
            rows = self.data[seed].train
            found.append(listed(noisy_digits.top_eigenvalue(NET, params, rows)))
        return found


def listed(values: Any, digits: int = 6) -> Any:
    """Writes an array as lists of rounded numbers.

    Examples:
      >>> listed(np.float32([0.1, 0.25]))
      [0.1, 0.25]
    """
    array = np.asarray(values)
    if array.ndim:
        return [listed(value, digits) for value in array]
    return float(f"{float(array):.{digits}g}")


def search(
    method: Method, options: Options, errors: Callable[[Config], Sequence[float]]
) -> dict[Config, Sequence[float]]:
    """Tries planes of the grid of rate, decay and knob, each through the best so far.

    First rate and knob without decay, then rate and decay, last knob and decay.

    Args:
      method: what is tuned.
      options: the grids.
      errors: gives the validation errors of a configuration.

    Returns:
      The errors of all that was tried.
    """
    tried: dict[Config, Sequence[float]] = {}
    alone = method.kind == NETWORK
    rates = [
        {"rate": rate} for rate in (options.rates if alone else options.subspace_rates)
    ]
    decays = [{"decay": decay} for decay in options.decays]
    knobs = method.knobs(options)
    for axes in ((rates, knobs), (rates, decays), (knobs, decays)):
        best = chosen(tried) if tried else Config(**rates[0])
        for first, second in itertools.product(*axes):
            config = best._replace(**first, **second)
            if config not in tried:
                tried[config] = errors(config)
    return tried


def chosen(tried: dict[Config, Sequence[float]], *, decay: bool = True) -> Config:
    """Picks the least mean error, on request among those without decay."""
    allowed = {c: e for c, e in tried.items() if decay or c.decay == 0}
    names = {str(config): config for config in allowed}
    return names[chosen_rate({str(c): errors for c, errors in allowed.items()})]


def line_quality(
    first: Endpoints, second: Endpoints | None, rows: Rows, *, curve: bool = False
) -> list[list[float]]:
    """Computes each run's accuracy at ``POSITIONS``.

    Args:
      first: endpoints of a line or curve, or networks.
      second: networks at the other end, if ``first`` holds networks.
      rows: to judge with.
      curve: whether the last endpoint is a bend.
    """
    if second is not None:
        join = lambda a, b: jnp.concatenate([a, b], axis=1)
        first = jax.tree.map(join, first, second)
    place = bezier_coefficients if curve else line_coefficients
    found = [
        judged(point_probabilities(first, place(t), rows[0]), rows[1])["accuracy"]
        for t in POSITIONS
    ]
    return listed(jnp.stack(found, axis=1))


@jax.jit
def _cosines(endpoints):
    def one(w):
        at = lambda i: jax.tree.map(lambda x: x[i], w)
        pairs = itertools.combinations(range(len(jax.tree.leaves(w)[0])), 2)
        return jnp.mean(jnp.stack([cosine_squared(at(i), at(j)) for i, j in pairs]))

    return jax.vmap(one)(endpoints)


def cosines(endpoints: Endpoints) -> list[float]:
    """Computes each run's mean squared cosine of two endpoints."""
    return listed(_cosines(endpoints), 4)
