"""Small nets on digits, whitened or not, trained from a known start.

A tanh net with one hidden layer as a dict of arrays, its loss and error, and a training
loop that may pull the parameters towards an anchor.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax

from jaxlab.datasets import load
from jaxlab.likelihoods import Categorical

LIKELIHOOD = Categorical()
Params = dict[str, jax.Array]
Rows = tuple[jax.Array, jax.Array]


class Splits(NamedTuple):
    train: Rows
    validation: Rows
    test: Rows


def whitening(x: np.ndarray) -> np.ndarray:
    """Makes the matrix that whitens rows and keeps their mean squared norm.

    Examples:
      >>> x = np.array([[2.0, 0.0], [0.0, 4.0]])
      >>> x @ whitening(x)
      array([[3.16227766, 0.        ],
             [0.        , 3.16227766]])
    """
    values, vectors = np.linalg.eigh(x.T.astype(float) @ x / len(x))
    kept = values > 1e-6 * values[-1]
    vectors, values = vectors[:, kept], values[kept]
    scale = math.sqrt(values.sum() / len(values))
    return scale * (vectors / np.sqrt(values)) @ vectors.T


def splits(examples: int, *, whitened: bool) -> tuple[Splits, str]:
    """Loads digits, so many of them to train on, with the digest of all."""
    data = load("digits")
    train, validation, test = (data.splits[s] for s in Splits._fields)
    train = tuple(part[:examples] for part in train)
    change = whitening(train[0]) if whitened else np.eye(train[0].shape[1])
    cut = lambda rows: (
        jnp.asarray(rows[0] @ change, jnp.float32),
        jnp.asarray(rows[1]),
    )
    return Splits(*map(cut, (train, validation, test))), data.digest


def init(key: jax.Array, hidden: int) -> Params:
    """Draws weights of variance 1 / fan-in; biases start at zero."""
    first, second = jax.random.split(key)
    return {
        "w1": jax.random.normal(first, (64, hidden)) / 8,
        "b1": jnp.zeros((1, hidden)),
        "w2": jax.random.normal(second, (hidden, 10)) / math.sqrt(hidden),
        "b2": jnp.zeros((1, 10)),
    }


def apply(params: Params, x: jax.Array) -> jax.Array:
    hidden = jnp.tanh(x @ params["w1"] + params["b1"])
    return hidden @ params["w2"] + params["b2"]


def loss_fn(params: Params, batch: Rows) -> jax.Array:
    return LIKELIHOOD.nll(apply(params, batch[0]), batch[1])


def error_fn(params: Params, batch: Rows) -> jax.Array:
    return jnp.mean(apply(params, batch[0]).argmax(-1) != batch[1])


@functools.partial(jax.jit, static_argnames=("steps", "batch_size"))
def train(key, params, anchor, data, rate, pull, *, steps, batch_size):
    """Minimises the loss plus ``pull`` times the squared distance to the anchor."""
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, steps))

    def objective(params, rows):
        away = optax.tree.norm(optax.tree.sub(params, anchor), squared=True)
        return loss_fn(params, rows) + pull * away

    def step(carry, key):
        params, state = carry
        index = jax.random.randint(key, (batch_size,), 0, len(data[1]))
        grads = jax.grad(objective)(params, (data[0][index], data[1][index]))
        updates, state = optimizer.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    start = (params, optimizer.init(params))
    (params, _), _ = jax.lax.scan(step, start, jax.random.split(key, steps))
    return params


@functools.partial(jax.jit, static_argnames="k")
def hessian_pairs(params: Params, data: Rows, *, k: int) -> tuple[jax.Array, jax.Array]:
    """Computes the k largest eigenpairs of the Hessian of the mean loss, in nats."""
    flat, back = jax.flatten_util.ravel_pytree(params)
    slope = jax.grad(lambda theta: loss_fn(back(theta), data))
    column = lambda basis: jax.jvp(slope, (flat,), (basis,))[1]
    values, vectors = jnp.linalg.eigh(jax.lax.map(column, jnp.eye(len(flat))))
    return values[::-1][:k], vectors.T[::-1][:k]


class Run(NamedTuple):
    start: Params
    end: Params


def keys_of(seed: int) -> list[jax.Array]:
    """Draws keys for start, order, pull, Fisher at start and at end, bound."""
    return list(jax.random.split(jax.random.key(seed), 6))


def trained(
    seeds: int, data: Rows, rate: float, *, hidden: int, steps: int, batch_size: int
) -> list[Run]:
    """Trains a net for each seed, without a pull."""
    runs = []
    for seed in range(seeds):
        keys = keys_of(seed)
        start, sizes = init(keys[0], hidden), {"steps": steps, "batch_size": batch_size}
        end = train(keys[1], start, start, data, rate, 0.0, **sizes)
        runs.append(Run(start, end))
    return runs
