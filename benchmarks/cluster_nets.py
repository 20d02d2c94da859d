"""ReLU nets on Gaussian clusters and on digits, and the spectra of their Hessians.

Outliers are counted by the widest gap, as a ratio, between neighbours among the largest
eigenvalues; values below ``FLAT`` of the largest count as that.
"""

import functools
import itertools
import math
from collections.abc import Iterator, Sequence

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np

from jaxlab.datasets.dataset import round_for_digest
from jaxlab.likelihoods import Categorical

DIM, ROWS = 20, 400  # of the clusters
FLAT = 1e-3  # of the largest eigenvalue; what lies below counts as zero

Params = list[dict[str, jax.Array]]
Rows = tuple[jax.Array, jax.Array]


def clusters(k: int, separation: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draws balanced points around k means of equal norm."""
    rng = np.random.default_rng(seed)
    means = rng.standard_normal((k, DIM))
    means *= separation / np.linalg.norm(means, axis=1, keepdims=True)
    labels = np.arange(ROWS, dtype=np.int32) % k
    noise = rng.standard_normal((ROWS, DIM)) / math.sqrt(DIM)
    return round_for_digest(means[labels] + noise), labels


def init(key: jax.Array, sizes: Sequence[int]) -> Params:
    """Draws weights of variance 1 / fan-in; biases start at zero."""
    pairs = list(itertools.pairwise(sizes))
    return [
        {"w": jax.random.normal(k, pair) / math.sqrt(pair[0]), "b": jnp.zeros(pair[1])}
        for k, pair in zip(jax.random.split(key, len(pairs)), pairs, strict=True)
    ]


def apply(params: Params, x: jax.Array) -> jax.Array:
    affine = lambda layer, x: x @ layer["w"] + layer["b"][None]
    for layer in params[:-1]:
        x = jax.nn.relu(affine(layer, x))
    return affine(params[-1], x)


def loss_fn(params: Params, batch: Rows) -> jax.Array:
    return Categorical().nll(apply(params, batch[0]), batch[1])


@jax.jit
def measured(params: Params, batch: Rows) -> tuple[jax.Array, jax.Array]:
    """Gives loss and accuracy."""
    right = apply(params, batch[0]).argmax(-1) == batch[1]
    return loss_fn(params, batch), jnp.mean(right)


@functools.partial(jax.jit, static_argnames=("steps", "batch_size"))
def descend(key, params: Params, data: Rows, rate, *, steps, batch_size=None) -> Params:
    """Takes gradient steps, on all rows or on random ones."""

    def step(params, key):
        rows = data
        if batch_size is not None:
            index = jax.random.randint(key, (batch_size,), 0, len(data[1]))
            rows = data[0][index], data[1][index]
        grads = jax.grad(loss_fn)(params, rows)
        return jax.tree.map(lambda p, g: p - rate * g, params, grads), None

    return jax.lax.scan(step, params, jax.random.split(key, steps))[0]


@jax.jit
def _columns(params: Params, data: Rows) -> jax.Array:
    flat, back = jax.flatten_util.ravel_pytree(params)
    slope = jax.grad(lambda theta: loss_fn(back(theta), data))
    column = lambda basis: jax.jvp(slope, (flat,), (basis,))[1]
    return jax.lax.map(column, jnp.eye(len(flat), dtype=flat.dtype))


def exact_spectrum(params: Params, data: Rows) -> np.ndarray:
    """Computes all eigenvalues of the Hessian in float64, the largest first."""
    with jax.enable_x64(True):
        wide = lambda x: jnp.asarray(np.asarray(x, np.float64))
        matrix = _columns(jax.tree.map(wide, params), (wide(data[0]), data[1]))
        matrix = np.asarray(matrix)
    return np.linalg.eigvalsh((matrix + matrix.T) / 2)[::-1]


def random_spectrum(values: np.ndarray, seed: int) -> np.ndarray:
    """Gives the spectrum of a random matrix of equal trace and Frobenius norm."""
    p, mean = len(values), float(np.mean(values))
    draw = np.random.default_rng(seed).standard_normal((p, p))
    draw = draw + draw.T
    draw -= np.trace(draw) / p * np.eye(p)
    scale = np.sqrt(np.sum((values - mean) ** 2)) / np.linalg.norm(draw)
    return mean + scale * np.linalg.eigvalsh(draw)[::-1]


def gap_after(values: Sequence[float], count: int) -> float:
    """Computes eigenvalue ``count`` over the next; they descend.

    Examples:
      >>> gap_after([8.0, 4.0, 1.0], 2), gap_after([8.0, 0.0], 1)
      (4.0, 1000.0)
    """
    least = FLAT * values[0]
    return max(values[count - 1], least) / max(values[count], least)


def outliers(values: Sequence[float]) -> int:
    """Counts the eigenvalues before the widest gap.

    Examples:
      >>> outliers([8.0, 7.0, 1.0, 0.9, 0.5])
      2
    """
    return max(range(1, len(values)), key=lambda count: gap_after(values, count))


def between(here: Params, there: Params, points: int) -> Iterator[Params]:
    """Walks the segment from one solution to another, ends included."""
    for part in np.linspace(0, 1, points).tolist():
        yield jax.tree.map(lambda a, b: (1 - part) * a + part * b, here, there)  # noqa: B023
