"""Predictions of several samples as one, and how much better they are.

See :mod:`jaxlab.optimizers.langevin` for the formulas.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, PyTree, Shaped

from jaxlab._checks import check_count
from jaxlab._norms import wide
from jaxlab.likelihoods import Likelihood, row_shares

Scalar = Float[Array, ""]


class EnsembleLoss(NamedTuple):
    """What :func:`ensemble_log_loss` gives; s members.

    Attributes:
      loss: of the mean of the members' probabilities, in nats per row.
      members: each member's own loss, (s,).
      gain: weighted mean of ``members`` minus ``loss``: >= 0 up to round-off, 0 where
        all members agree.

    Examples:
      >>> from jaxlab.likelihoods import Categorical
      >>> outputs, targets = jnp.zeros((3, 2, 4)), jnp.array([0, 1])
      >>> bool(abs(ensemble_log_loss(Categorical(), outputs, targets).gain) < 1e-6)
      True
    """

    loss: Scalar
    members: Float[Array, " s"]
    gain: Scalar


def ensemble_outputs(
    apply_fn: Callable[[Any, Any], Any], samples: PyTree, inputs: PyTree
) -> Array:
    """Applies a model with each sample of the parameters, one after the other.

    Args:
      apply_fn: ``(params, inputs) -> outputs``.
      samples: a tree like the parameters whose leaves have a leading axis s.
      inputs: what the model takes.

    Returns:
      The outputs with a leading axis s.

    Raises:
      ValueError: if the leaves of ``samples`` do not share their leading axis.

    Examples:
      >>> ensemble_outputs(lambda w, x: w * x, jnp.array([1.0, 2.0]), jnp.ones(3)).shape
      (2, 3)
    """
    name = "ensemble_outputs"
    samples = jax.tree.map(jnp.asarray, samples)
    counts = sorted({leaf.shape[:1] for leaf in jax.tree.leaves(samples)})
    if len(counts) != 1 or counts[0] in ((), (0,)):
        raise ValueError(
            f"{name}: every leaf of samples needs one entry per sample along its "
            f"leading axis, as langevin_sample gives it; got leading axes {counts}."
        )
    with jax.named_scope(name):
        return jax.lax.map(lambda params: apply_fn(params, inputs), samples)


def ensemble_predict(
    outputs: Float[ArrayLike, "s *rows classes"],
    *,
    log_weights: Float[ArrayLike, " s"] | None = None,
) -> Float[Array, "*rows classes"]:
    """Averages the probabilities of several classifiers, and gives their logarithm.

    The mean is over probabilities, not over logits. Its logarithms are logits of the
    ensemble: ``Categorical`` takes them as they are.

    Args:
      outputs: logits of each member, as :func:`ensemble_outputs` gives them.
      log_weights: logarithm of each member's weight, such as a posterior's; their sum
        is made 1. ``None`` weighs all alike.

    Returns:
      ``ln mean p``, float32 at least.

    Raises:
      ValueError: if there is no member or not one weight for each.

    Examples:
      >>> logits = jnp.array([[0.0, 20.0], [20.0, 0.0]])
      >>> jnp.round(jnp.exp(ensemble_predict(logits)), 4)
      Array([0.5, 0.5], dtype=float32)
    """
    name = "ensemble_predict"
    outputs = _stacked(name, outputs)
    shares = _log_shares(name, log_weights, outputs.shape[0], outputs.dtype)
    with jax.named_scope(name):
        return _log_mean(jax.nn.log_softmax(outputs), shares)


def ensemble_log_loss(
    likelihood: Likelihood,
    outputs: Float[ArrayLike, "s *rows event"],
    targets: Shaped[ArrayLike, "..."],
    *,
    weights: ArrayLike | None = None,
    log_weights: Float[ArrayLike, " s"] | None = None,
) -> EnsembleLoss:
    """Compares the log-loss of an ensemble with those of its members.

    The ensemble's density of a target is the mean of the members' densities, so that
    by Jensen's inequality its loss is at most their mean, for every row.

    Args:
      likelihood: one of :mod:`jaxlab.likelihoods`.
      outputs: of each member, as :func:`ensemble_outputs` gives them.
      targets: of the rows, as the likelihood takes them. Give ``Categorical`` integers:
        the loss is then that of :func:`ensemble_predict`, which it is not for targets
        that are probabilities of several classes.
      weights: of the rows, as in ``likelihood.nll``.
      log_weights: of the members, as in :func:`ensemble_predict`.

    Returns:
      See :class:`EnsembleLoss`.

    Raises:
      ValueError: if there is no member or not one weight for each.

    Examples:
      >>> from jaxlab.likelihoods import Bernoulli
      >>> outputs = jnp.array([[[40.0]], [[-40.0]]])
      >>> found = ensemble_log_loss(Bernoulli(), outputs, jnp.ones((1, 1)))
      >>> jnp.round(found.loss, 4), jnp.round(found.members, 4)
      (Array(0.6931, dtype=float32), Array([ 0., 40.], dtype=float32))
    """
    name = "ensemble_log_loss"
    outputs = _stacked(name, outputs)
    shares = _log_shares(name, log_weights, outputs.shape[0], outputs.dtype)
    with jax.named_scope(name):
        losses = jax.vmap(lambda f: likelihood.row_nll(f, targets))(outputs)
        joint = -_log_mean(-losses, shares)
        rows = row_shares(joint.shape, weights, dtype=losses.dtype)
        # A row of weight 0 may hold anything.
        over = lambda x: jnp.sum(jnp.where(rows == 0, 0, rows * x))
        members = jax.vmap(over)(losses)
        part = jnp.exp(shares)
        mean = jnp.sum(jnp.where(part == 0, 0, part * members))
        loss = over(joint)
    return EnsembleLoss(loss, members, mean - loss)


def distill_loss(
    student_logits: Float[ArrayLike, "*rows classes"],
    teacher_log_probs: Float[ArrayLike, "*rows classes"],
    *,
    weights: ArrayLike | None = None,
) -> Scalar:
    """Gives the divergence of a student from an ensemble, ``KL(teacher || student)``.

    Args:
      student_logits: of one model.
      teacher_log_probs: as :func:`ensemble_predict` gives them; minus infinity where
        a class is impossible. No gradient flows into them.
      weights: of the rows.

    Returns:
      The weighted mean over rows, in nats, >= 0.

    Raises:
      ValueError: if the two differ in shape.

    Examples:
      >>> log_probs = jax.nn.log_softmax(jnp.array([[0.0, 1.0]]))
      >>> distill_loss(log_probs + 5.0, log_probs)
      Array(0., dtype=float32)
    """
    name = "distill_loss"
    student, teacher = wide(student_logits), wide(teacher_log_probs)
    if student.shape != teacher.shape or not student.ndim:
        raise ValueError(
            f"{name}: student_logits and teacher_log_probs must have the same shape "
            f"(..., classes), got {student.shape} and {teacher.shape}."
        )
    teacher = jax.lax.stop_gradient(teacher)
    p = jnp.exp(teacher)
    with jax.named_scope(name):
        gap = teacher - jax.nn.log_softmax(student)
        rows = jnp.sum(p * jnp.where(p == 0, 0, gap), axis=-1)
        shares = row_shares(rows.shape, weights, dtype=rows.dtype)
        return jnp.sum(jnp.where(shares == 0, 0, shares * rows))


def calibration_error(
    log_probs: Float[ArrayLike, "*rows classes"],
    targets: Int[ArrayLike, "*rows"],
    *,
    bins: int = 15,
    weights: ArrayLike | None = None,
) -> Scalar:
    """Measures how far confidence is from accuracy, in bins of equal width.

    Args:
      log_probs: logits or log-probabilities.
      targets: the right class of each row.
      bins: of the largest probability, over [0, 1].
      weights: of the rows.

    Returns:
      The expected calibration error, in [0, 1]: the mean over rows of the distance
      between accuracy and mean confidence of the row's bin.

    Raises:
      ValueError: if ``bins`` is not an integer >= 1 or the shapes do not fit.

    Examples:
      >>> sure = jnp.array([[20.0, 0.0], [20.0, 0.0]])
      >>> jnp.round(calibration_error(sure, jnp.array([0, 1])), 4)
      Array(0.5, dtype=float32)
    """
    name = "calibration_error"
    check_count(name, bins=bins)
    log_probs, targets = wide(log_probs), jnp.asarray(targets)
    if targets.shape != log_probs.shape[:-1] or not log_probs.ndim:
        raise ValueError(
            f"{name}: log_probs must have shape (..., classes) and targets (...), got "
            f"{log_probs.shape} and {targets.shape}."
        )
    if not jnp.issubdtype(targets.dtype, jnp.integer):
        raise ValueError(
            f"{name}: targets must be the integers of classes, got {targets.dtype}; "
            "take the argmax of one-hot ones."
        )
    with jax.named_scope(name):
        probabilities = jax.nn.softmax(log_probs)
        sure = jnp.max(probabilities, axis=-1)
        right = jnp.argmax(log_probs, axis=-1) == targets
        shares = row_shares(sure.shape, weights, dtype=sure.dtype)
        places = jnp.clip((sure * bins).astype(jnp.int32), 0, bins - 1)
        gap = jnp.where(shares == 0, 0, shares * (right - sure))
        sums = jax.ops.segment_sum(gap.ravel(), places.ravel(), num_segments=bins)
        return jnp.sum(jnp.abs(sums))


def _log_mean(logs, shares):
    """Gives the logarithm of a weighted mean along the first axis."""
    shares = shares.reshape(-1, *(1,) * (logs.ndim - 1))
    shares = jnp.broadcast_to(shares, logs.shape)
    # A member of weight 0 may hold anything.
    logs = jnp.where(shares == -jnp.inf, -jnp.inf, logs + shares)
    return jax.nn.logsumexp(logs, axis=0)


def _stacked(name, outputs):
    outputs = wide(outputs)
    if outputs.ndim < 2 or not outputs.shape[0]:
        raise ValueError(
            f"{name}: outputs must have shape (members, ..., event), as "
            f"ensemble_outputs gives them, got {outputs.shape}."
        )
    return outputs


def _log_shares(name, log_weights, members, dtype):
    if log_weights is None:
        return jnp.full((members,), -jnp.log(members), dtype)
    log_weights = jnp.asarray(log_weights).astype(dtype)
    if log_weights.shape != (members,):
        raise ValueError(
            f"{name}: log_weights must have one entry for each of the {members} "
            f"members, got shape {log_weights.shape}."
        )
    return jax.nn.log_softmax(log_weights)
