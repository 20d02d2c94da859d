"""Training to a loss, so that solutions and not speeds are compared.

See :mod:`jaxlab.optimizers.solutions`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from jaxlab._checks import check_count, check_number
from jaxlab._norms import wide
from jaxlab.curvature._batches import as_arrays, rows_of
from jaxlab.optimizers.gradient_noise import _check_key

Step = Callable[[Any, Any], tuple[Any, Any]]


class TrainedToLoss(NamedTuple):
    """What :func:`train_to_loss` gives.

    Attributes:
      state: of the training, after the last step.
      loss: of that state.
      steps: that were made.
      reached: whether the loss is at most the target.

    Examples:
      >>> step = lambda w, batch: (0.5 * w, None)
      >>> found = train_to_loss(
      ...     jax.random.key(0), step, jnp.array(8.0), jnp.ones(3),
      ...     loss_fn=abs, target=1.0, max_steps=100, batch_size=1,
      ... )
      >>> found.steps, found.reached
      (Array(3, dtype=int32), Array(True, dtype=bool))
    """

    state: PyTree
    loss: Float[Array, ""]
    steps: Int[Array, ""]
    reached: Bool[Array, ""]


def train_to_loss(
    key: Key[Array, ""],
    step: Step,
    state: PyTree,
    data: PyTree,
    *,
    loss_fn: Callable[[Any], Any],
    target: ArrayLike,
    max_steps: int,
    batch_size: int,
    check_every: int = 1,
) -> TrainedToLoss:
    """Trains until the loss is at most a target, in one compiled loop.

    With the same key all optimizers see the same batches. The loss that stops the run
    is that of ``loss_fn`` and should be measured on all the training data, or noise
    decides. On CPUs convolutions are slow in such a loop.

    Args:
      key: of the batches.
      step: ``(state, batch) -> (state, anything)``, such as
        ``jaxlab.training.make_train_step(..., jit=False)``; any optimizer is in it.
      state: what the step takes; its arrays are not donated.
      data: a tree of arrays that share their leading axis, the rows.
      loss_fn: ``state -> scalar``.
      target: the loss to reach.
      max_steps: at most so many are made, >= 1.
      batch_size: rows of a step, drawn with replacement.
      check_every: steps between two measurements, >= 1; the run may go on by so many
        less one after it reached the target, but not beyond ``max_steps``.

    Returns:
      See :class:`TrainedToLoss`. A loss of NaN never reaches the target.

    Raises:
      ValueError: if a count is out of range, the data have no rows, or the key is not a
        typed one.

    Examples:
      >>> def step(w, batch):
      ...     return w - 0.5 * jnp.mean(w - batch), None
      >>> loss_fn = lambda w: (w - 2.0) ** 2
      >>> found = train_to_loss(
      ...     jax.random.key(0), step, jnp.array(0.0), jnp.full(4, 2.0),
      ...     loss_fn=loss_fn, target=0.3, max_steps=10, batch_size=4,
      ... )
      >>> found.loss, found.steps
      (Array(0.25, dtype=float32), Array(2, dtype=int32))
    """
    name = "train_to_loss"
    _check_key(name, key)
    check_count(
        name, max_steps=max_steps, batch_size=batch_size, check_every=check_every
    )
    rows, data = rows_of(name, data), as_arrays(data)
    check_number(name, "a number", target=target)
    state, step = strong(state), checked_step(name, step)

    def goes_on(carry):
        _, loss, count = carry
        return ~(loss <= wide(target)) & (count < max_steps)

    def some(carry):
        state, _, count = carry
        stop = jnp.minimum(count + check_every, max_steps)
        one = lambda i, s: step(s, batch_of(key, i, data, rows, batch_size))
        state = jax.lax.fori_loop(count, stop, one, state)
        return state, loss_of(state), stop

    def loss_of(state):
        loss = jnp.asarray(loss_fn(state))
        if loss.shape or not jnp.issubdtype(loss.dtype, jnp.floating):
            raise ValueError(
                f"{name}: loss_fn must give one floating scalar, got {loss.dtype} of "
                f"shape {loss.shape}."
            )
        return wide(loss)

    with jax.named_scope(name):
        start = (state, loss_of(state), jnp.int32(0))
        state, loss, count = jax.lax.while_loop(goes_on, some, start)
    return TrainedToLoss(state, loss, count, loss <= wide(target))


def checked_step(name, step):
    """Wraps a step whose state must come back as it went in."""

    def checked(state, batch):
        new = step(state, batch)[0]
        kinds = lambda tree: [
            f"{jnp.result_type(leaf)}{list(jnp.shape(leaf))}"
            for leaf in jax.tree.leaves(tree)
        ]
        here, there = jax.tree.structure(state), jax.tree.structure(new)
        if here != there or kinds(state) != kinds(new):
            raise ValueError(
                f"{name}: step must give back a state like the one it takes, "
                f"{here} of {kinds(state)}, got {there} of {kinds(new)}."
            )
        return new

    return checked


def batch_of(key, step, data, rows, size):
    """Draws the rows of a step; the key and the step decide them."""
    chosen = jax.random.randint(jax.random.fold_in(key, step), (size,), 0, rows)
    return jax.tree.map(lambda leaf: leaf[chosen], data)


def strong(tree):
    """Takes weak types away, which would not stay in a loop's carry."""
    plain = lambda x: jnp.issubdtype(jnp.result_type(x), jnp.number)
    return jax.tree.map(
        lambda x: jnp.asarray(x, jnp.result_type(x)) if plain(x) else x, tree
    )
