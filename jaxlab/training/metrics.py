"""Evaluation: weighted means over the rows of a data set.

Each is sum(w_i m_i) / sum(w_i) over all rows, with w_i = 0 for the rows that fill up
the last batch, so no result depends on the batch size.
"""

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, PyTree, Shaped

from jaxlab.likelihoods import Categorical
from jaxlab.objective import Batch, Objective, unpack_batch
from jaxlab.training.feed import Resident, resident
from jaxlab.training.loops import loops_slowly

__all__ = ["accuracy", "evaluate"]

RowMetric = Callable[[PyTree, PyTree], Array]


def accuracy(
    outputs: Float[Array, "*rows classes"], targets: Shaped[Array, "..."]
) -> Float[Array, "*rows"]:
    """Gives 1 for each row whose largest output is at the target, else 0.

    Args:
      outputs: logits or probabilities, classes last.
      targets: integers with the shape of the rows, or one-hot like ``outputs``.

    Returns:
      Float32 zeros and ones.

    Raises:
      ValueError: if ``targets`` has neither of the two shapes.

    Examples:
      >>> accuracy(jnp.array([[0.1, 0.9], [0.8, 0.2]]), jnp.array([1, 1])).tolist()
      [1.0, 0.0]
    """
    outputs, targets = jnp.asarray(outputs), jnp.asarray(targets)
    if targets.shape == outputs.shape:
        targets = jnp.argmax(targets, -1)
    elif targets.shape != outputs.shape[:-1]:
        raise ValueError(
            f"accuracy: targets must have shape {outputs.shape[:-1]} or, one-hot, "
            f"{outputs.shape}, got {targets.shape}."
        )
    return (jnp.argmax(outputs, -1) == targets).astype(jnp.float32)


def evaluate(
    objective: Objective,
    params: PyTree,
    model_state: PyTree,
    data: Batch | Resident,
    *,
    batch_size: int | None = None,
    metrics: Mapping[str, RowMetric] | None = None,
    data_sharding: NamedSharding | None = None,
) -> dict[str, float]:
    """Evaluates a model on a data set: loss and other means over rows.

    Args:
      objective: model and likelihood; the model runs with ``train=False``.
      params: its parameters.
      model_state: what it keeps besides, ``()`` if nothing.
      data: ``(inputs, targets)`` or ``(inputs, targets, weights)``, rows first; or
        what :func:`~jaxlab.training.feed.resident` made of them.
      batch_size: rows at a time; by default all, up to about 1,024.
      metrics: functions ``(outputs, targets) -> value per row`` by name; by default
        :func:`accuracy` where the likelihood is categorical.
      data_sharding: of a batch's rows over devices.

    Returns:
      ``loss`` and the metrics as Python floats; NaN where all weights are 0.

    Raises:
      ValueError: if the arrays have no rows or different numbers of them.

    Examples:
      >>> from jaxlab.objective import Objective, plain
      >>> objective = Objective(plain(lambda w, x: x @ w), Categorical())
      >>> data = (jnp.eye(4), jnp.array([0, 1, 2, 0]))
      >>> found = evaluate(objective, 200 * jnp.eye(4), (), data, batch_size=3)
      >>> found["loss"], found["accuracy"]
      (50.0, 0.75)
    """
    if not isinstance(data, Resident):
        data = resident(data, batch_size=batch_size, sharding=data_sharding)
    if metrics is None:
        categorical = isinstance(objective.likelihood, Categorical)
        metrics = {"accuracy": accuracy} if categorical else {}
    named = tuple(metrics.items())
    one = functools.partial(_batch_sums, metrics=named)
    args = (objective, params, model_state, data, data.in_turn())
    steps = range(data.steps_per_epoch)
    if loops_slowly(one, *args, np.int32(0)):
        sums = np.stack([one(*args, np.int32(i)) for i in steps])
    else:
        sums = np.asarray(_all_sums(*args, metrics=named))
    names = ["loss", *metrics]
    with np.errstate(invalid="ignore"):  # infinities of both signs, or in both
        totals, weights = np.sum(sums.astype(np.float64), axis=0)
        means = np.divide(
            totals, weights, out=np.full_like(totals, np.nan), where=weights != 0
        )
    return dict(zip(names, means.tolist(), strict=True))


@functools.partial(jax.jit, static_argnames="metrics")
def _batch_sums(objective, params, model_state, feed, order, step, *, metrics):
    """Gives the weighted sums of loss and metrics over one batch, and the weights."""
    inputs, targets, weights = unpack_batch(feed.batch(order, step))
    outputs, _ = objective.apply_fn(params, model_state, inputs, key=None, train=False)
    if weights is None:
        weights = jnp.ones(feed.batch_size, jnp.float32)
    sums = []
    for metric in (objective.likelihood.row_nll, *(f for _, f in metrics)):
        values = metric(outputs, targets).astype(jnp.float32)
        w = weights.astype(jnp.float32)
        w = w.reshape(w.shape + (1,) * (values.ndim - w.ndim))
        w = jnp.broadcast_to(w, values.shape)
        # A row of weight 0 may hold anything, NaN included.
        sums.append((jnp.sum(jnp.where(w == 0, 0.0, w * values)), jnp.sum(w)))
    sums = jnp.array(sums).T
    if feed.sharding is None:
        return sums
    whole = NamedSharding(feed.sharding.mesh, PartitionSpec())
    return jax.lax.with_sharding_constraint(sums, whole)


@functools.partial(jax.jit, static_argnames="metrics")
def _all_sums(objective, params, model_state, feed, order, *, metrics):
    one = functools.partial(_batch_sums, metrics=metrics)
    at = lambda step: one(objective, params, model_state, feed, order, step)
    return jax.lax.map(at, jnp.arange(feed.steps_per_epoch, dtype=jnp.int32))
