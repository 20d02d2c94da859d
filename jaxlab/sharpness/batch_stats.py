"""BatchNorm statistics of one set of parameters, measured by a pass over the data.

A point between two networks is a network that nobody has run, so the statistics of
neither fit it. They are measured afresh, by cumulative averaging over the batches:

    stat = sum_b r_b stat_b / sum_b r_b,    r_b the rows of batch b (their weights' sum)

The layer gives stat_b through its own update: from the running mean 0 it goes to
momentum * 0 + (1 - momentum) * stat_b.
Reference: Wortsman, Horton, Guestrin, Farhadi, Rastegari, "Learning Neural Network
Subspaces", ICML 2021.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Key, PyTree

from jaxlab._checks import check_number, check_sequence
from jaxlab.objective import unpack_batch


def recompute_batch_stats(
    apply_fn: Callable[..., Any],
    params: PyTree,
    batches: Iterable[tuple[Any, ...]],
    *,
    state: PyTree,
    momentum: ArrayLike = 0.99,
    key: Key[Array, ""] | None = None,
) -> PyTree:
    """Measures the BatchNorm statistics of ``params`` over a pass of batches.

    Every floating-point leaf of ``state`` is taken for a running mean that training
    updates as ``momentum * old + (1 - momentum) * new``, with one ``momentum``. For a
    model that keeps other numbers there, take the result for the BatchNorm leaves only.
    A running variance becomes the mean of the batches' variances, as in the authors'
    code: smaller than that of all rows by how much the batches' means vary. That code
    weighs all batches alike; here a last, smaller batch counts for its rows.

    Args:
      apply_fn: ``(params, state, inputs, *, key, train) -> (outputs, state)``, called
        with ``train=True``, under ``jax.jit``.
      params: where the statistics are measured.
      batches: of ``(inputs, targets)`` or ``(inputs, targets, weights)``; only inputs
        and the sums of the weights are read. The layer itself sees every row of a
        batch, those of weight 0 too.
      state: the model's state; gives structure and dtypes, and what is not floating.
      momentum: of the layers, in [0, 1). Flax's default is 0.99; for what others call
        a momentum of 0.1 pass 0.9.
      key: of the model's noise, folded with the batch's number; ``None`` if it has
        none.

    Returns:
      A state like ``state`` with new floating-point leaves, averaged in float32 at
      least; NaN where all weights are 0.

    Raises:
      ValueError: if ``momentum`` is out of range, there is no batch, or ``apply_fn``
        changes the structure or the shapes of the state.

    Examples:
      >>> def apply_fn(params, state, inputs, *, key, train):
      ...     return inputs, 0.5 * state + 0.5 * inputs.mean(axis=0)
      >>> batches = [(jnp.array([[1.0], [3.0]]), None), (jnp.array([[5.0]]), None)]
      >>> state = jnp.array([7.0])
      >>> recompute_batch_stats(apply_fn, (), batches, state=state, momentum=0.5)
      Array([3.], dtype=float32)
    """
    name = "recompute_batch_stats"
    check_number(name, "in [0, 1)", momentum=momentum)
    check_sequence(name, "batches", batches, "(inputs, targets) or the like")
    means = jax.tree.map(_zero, state)
    count, number = jnp.zeros((), jnp.float32), -1
    for number, batch in enumerate(batches):
        inputs, _, weights = unpack_batch(batch)
        if weights is None:
            leaves = jax.tree.leaves(inputs)
            if not leaves or not jnp.ndim(leaves[0]):
                raise ValueError(f"{name}: inputs must have a leading axis of rows.")
            weights = jnp.float32(jnp.shape(leaves[0])[0])
        here = None if key is None else jax.random.fold_in(key, number)
        given = params, state, inputs, weights, here, 1 - momentum
        means, count = _accumulate(apply_fn, means, count, *given)
    if number < 0:
        raise ValueError(
            f"{name}: batches must hold at least one batch, got none; an iterator that "
            "was read before is empty."
        )

    def finish(mean, old):
        if not _is_floating(old):
            return old
        return jnp.where(count > 0, mean, jnp.nan).astype(jnp.asarray(old).dtype)

    return jax.tree.map(finish, means, state)


@functools.partial(jax.jit, static_argnums=0)
def _accumulate(apply_fn, means, count, params, state, inputs, weights, key, rate):
    name = "recompute_batch_stats"
    fresh = jax.tree.map(_zero, state)
    _, new = apply_fn(params, fresh, inputs, key=key, train=True)
    shapes = lambda tree: [jnp.shape(leaf) for leaf in jax.tree.leaves(tree)]
    same = jax.tree.structure(new) == jax.tree.structure(state)
    if not same or shapes(new) != shapes(state):
        raise ValueError(
            f"{name}: apply_fn must give a state like the one it got, "
            f"{jax.tree.structure(state)} of shapes {shapes(state)}, got "
            f"{jax.tree.structure(new)} of shapes {shapes(new)}."
        )
    weight = jnp.sum(jnp.asarray(weights, jnp.float32))
    count = count + weight
    share = jnp.where(weight > 0, weight / jnp.where(count > 0, count, 1), 0)

    def average(mean, now, old):
        if not _is_floating(old):
            return mean
        step = share * (now.astype(mean.dtype) / rate - mean)
        # A batch without weight may hold anything, NaN too.
        return mean + jnp.where(weight > 0, step, 0).astype(mean.dtype)

    with jax.named_scope(name):
        return jax.tree.map(average, means, new, state), count


def _zero(leaf):
    if not _is_floating(leaf):
        return leaf
    leaf = jnp.asarray(leaf)
    return jnp.zeros(leaf.shape, jnp.promote_types(leaf.dtype, jnp.float32))


def _is_floating(leaf) -> bool:
    return jnp.issubdtype(jnp.asarray(leaf).dtype, jnp.floating)
