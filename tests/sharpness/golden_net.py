"""The network of ``tests/goldens/gnp.npz``, in float64 under ``jax.enable_x64``."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax

GOLDEN = dict(np.load(pathlib.Path(__file__).parents[1].joinpath("goldens", "gnp.npz")))
NAMES = ("W1", "b1", "W2", "b2")


def params():
    return {name: jnp.asarray(GOLDEN[f"params_{name}"]) for name in NAMES}


def batch():
    return jnp.asarray(GOLDEN["X"]), jnp.asarray(GOLDEN["Y"])


def loss_fn(at, batch):
    inputs, targets = batch
    hidden = jnp.tanh(inputs @ at["W1"] + at["b1"][None])
    logits = hidden @ at["W2"] + at["b2"][None]
    return jnp.mean(optax.softmax_cross_entropy(logits, targets))


def flat(tree):
    return np.concatenate([np.ravel(tree[name]) for name in NAMES])


def tree(vector):
    shapes = {name: GOLDEN[f"params_{name}"].shape for name in NAMES}
    ends = np.cumsum([int(np.prod(shape)) for shape in shapes.values()])
    parts = np.split(np.asarray(vector), ends[:-1])
    return {
        name: jnp.asarray(part.reshape(shapes[name]))
        for name, part in zip(NAMES, parts, strict=True)
    }


def grad_fn(at):
    return jax.grad(loss_fn)(at, batch())
