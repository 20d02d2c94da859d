"""The two golden networks as params, batch, model and loss, for tests of operators."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from jaxlab.likelihoods import Categorical, Gaussian

GOLDEN = np.load(pathlib.Path(__file__).parents[1] / "goldens" / "hessian.npz")
SIZES = {"ce": (4, 6, 3), "mse": (3, 5, 2)}
LIKELIHOODS = {"ce": Categorical(), "mse": Gaussian()}
NAMES = ("w1", "b1", "w2", "b2")  # the order of the flat golden vectors


def mlp(params, x):
    hidden = jnp.tanh(x @ params["w1"] + params["b1"].reshape(1, -1))
    return hidden @ params["w2"] + params["b2"].reshape(1, -1)


def loss_ce(params, batch):
    x, y, *weights = batch
    return Categorical().nll(mlp(params, x), y, weights=weights[0] if weights else None)


def loss_mse(params, batch):
    x, y, *weights = batch
    rows = 0.5 * jnp.sum((mlp(params, x) - y) ** 2, axis=1)
    return jnp.average(rows, weights=weights[0] if weights else None)


LOSSES = {"ce": loss_ce, "mse": loss_mse}


def unflat(net, vector, dtype=jnp.float64):
    """Cuts a golden vector into a dict, whose keys sort as b1 b2 w1 w2."""
    d, h, c = SIZES[net]
    parts = np.split(np.asarray(vector), np.cumsum([d * h, h, h * c]))
    shapes = ((d, h), (h,), (h, c), (c,))
    return {
        name: jnp.asarray(part.reshape(shape), dtype)
        for name, part, shape in zip(NAMES, parts, shapes, strict=True)
    }


def flat(tree):
    """Strings a dict together in the golden order."""
    return np.concatenate([np.ravel(np.asarray(tree[name])) for name in NAMES])


def order(net):
    """Gives, for each golden entry, its place in the order of the leaves."""
    count = len(GOLDEN[f"{net}/theta"])
    leaves = jax.tree.leaves(unflat(net, np.arange(count), jnp.float32))
    return np.argsort(np.concatenate([np.ravel(leaf) for leaf in leaves]).astype(int))


def golden(net, dtype=jnp.float64):
    x = jnp.asarray(GOLDEN[f"{net}/X"], dtype)
    y = GOLDEN[f"{net}/y"]
    y = jnp.asarray(y, jnp.int32 if net == "ce" else dtype)
    return unflat(net, GOLDEN[f"{net}/theta"], dtype), (x, y)


def small(rows=20, dtype=jnp.float64, seed=0):
    """Gives a problem whose programs compile quickly: params, batch, vector."""
    draw = np.random.default_rng(seed).normal
    array = lambda *shape: jnp.asarray(draw(size=shape), dtype)
    params = {"a": array(3, 2), "b": array(2)}
    v = {"a": array(3, 2), "b": array(2)}
    return params, (array(rows, 3), array(rows)), v


def loss_small(params, batch):
    x, y, *weights = batch
    rows = (jnp.tanh(x @ params["a"]) @ params["b"] - y) ** 2
    if not weights:
        return jnp.mean(rows)
    return jnp.sum(weights[0] * rows) / jnp.sum(weights[0])


def outputs_small(params, x):
    return jnp.tanh(x @ params["a"]) * params["b"].reshape(1, 2)


def cut(batch, size):
    """Cuts a batch into a list, of which the last may be smaller."""
    count = len(batch[0])
    return [tuple(x[i : i + size] for x in batch) for i in range(0, count, size)]


def close(found, want, tol):
    for name in want:
        np.testing.assert_allclose(found[name], want[name], atol=tol, rtol=tol)
