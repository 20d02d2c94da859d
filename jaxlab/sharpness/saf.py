"""SAF and MESA: flatness from the outputs of earlier weights, at the price of SGD.

Logits z = f_theta(x) are held near those y of the past, for a batch B at temperature t:

    trajectory loss = (1/|B|) sum_i t^2 KL(softmax(y_i / t) || softmax(z_i / t)),
    total = loss + weight * trajectory loss     in the epochs start < epoch < end.

The past is the first argument of KL and a constant, so the gradient for z_i is
(t / |B|) (softmax(z_i / t) - softmax(y_i / t)): bounded, and zero where z and y differ
by a constant. SAF takes for y the logits that the same example had ``lag`` epochs ago,
from a buffer; MESA those of an exponential moving average of the weights, on the same
inputs now, for one more forward pass.

Departures from the authors' code: log_softmax where it takes the log of a softmax,
which underflows; a buffer that knows what it was never told, so that ``start >= lag``
is advice rather than a duty.
Reference: Du, Zhou, Feng, Tan, Zhou, "Sharpness-Aware Training for Free", NeurIPS 2022.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Bool, Float, Int, PyTree, Shaped

from jaxlab._array_checks import check_fields, check_floating
from jaxlab._checks import check_count, check_number, described
from jaxlab.likelihoods import row_shares
from jaxlab.sharpness._checks import check_alike

Logits = Float[ArrayLike, "*rows classes"]
Scalar = Float[Array, ""]


class TrajectoryBuffer(NamedTuple):
    """Holds the logits of the last ``lag + 1`` epochs, and when each was written.

    Epoch e has the slot ``e mod (lag + 1)``. The buffer takes N (lag + 1) (K + 1)
    numbers for N examples and K classes.

    Attributes:
      logits: those of each example and slot.
      written: the epoch they come from, -1 for never.

    Examples:
      >>> buffer = init_trajectory_buffer(num_examples=5, num_classes=3, lag=2)
      >>> buffer.written.shape
      (5, 3)
    """

    logits: Float[Array, "examples slots classes"]
    written: Int[Array, "examples slots"]


def trajectory_loss(
    logits: Logits,
    past_logits: Logits,
    *,
    temperature: ArrayLike = 5.0,
    weights: Shaped[ArrayLike, "..."] | None = None,
) -> Scalar:
    """Gives ``temperature^2 KL(past || now)`` of the softmaxes, a mean over rows.

    For large temperatures it tends to half the variance over the classes of
    ``logits - past_logits``, whose size no longer depends on the temperature.

    Args:
      logits: of the current weights; the last axis holds the classes, every axis
        before it counts rows. Finite, save in rows of weight 0.
      past_logits: those to stay near, a constant: no gradient flows into it.
      temperature: divides both logits, > 0.
      weights: a weight per row, not negative, 0 for padding, as in
        :func:`jaxlab.likelihoods.row_shares`.

    Returns:
      A scalar, float32 at least; 0 where the two agree up to a constant per row.

    Raises:
      ValueError: if the shapes differ or the temperature is not positive.

    Examples:
      >>> logits = jnp.array([[1.0, 2.0, 0.0], [0.0, 0.0, 1.0]])
      >>> trajectory_loss(logits, logits)
      Array(0., dtype=float32)
      >>> bool(trajectory_loss(logits, 2 * logits) > 0)
      True
    """
    logits, past = _pair("trajectory_loss", logits, past_logits, temperature)
    shares = row_shares(logits.shape[:-1], weights, dtype=logits.dtype)
    with jax.named_scope("trajectory_loss"):
        return _mean(logits, past, temperature, shares)


def saf_loss(
    loss: Float[ArrayLike, ""],
    logits: Logits,
    past_logits: Logits,
    *,
    weight: ArrayLike = 0.3,
    temperature: ArrayLike = 5.0,
    active: Bool[ArrayLike, ""] = True,
    known: Bool[ArrayLike, "..."] | None = None,
    weights: Shaped[ArrayLike, "..."] | None = None,
) -> Scalar:
    """Adds to a loss the distance of the logits from recorded ones (SAF).

    A row that is not known adds nothing and still counts in the mean: the divisor is
    the whole batch (the sum of ``weights`` if given), so that each known row pulls
    equally hard however many there are. Where the term is switched off the result is
    the plain loss bit for bit, and its gradient too, even if the logits in question
    hold NaN.

    Args:
      loss: of the batch, such as the cross-entropy.
      logits: of the current weights, one row for each example.
      past_logits: what :func:`read_trajectory` gave for the batch.
      weight: of the term, >= 0. The authors take 0.3 to 0.8; 0 switches it off.
      temperature: as in :func:`trajectory_loss`.
      active: whether the term counts in this epoch, see :func:`in_window`; traced or
        not.
      known: for each row (or for a leading part of the rows' axes), whether its
        ``past_logits`` were recorded; ``None`` for all.
      weights: a weight per row, 0 for padding, as in :func:`trajectory_loss`.

    Returns:
      The total, float32 at least.

    Raises:
      ValueError: for shapes that do not match, a weight below 0 or a temperature that
        is not positive.

    Examples:
      >>> logits = jnp.array([[0.0, 1.0], [3.0, 1.0]])
      >>> known = jnp.array([False, True])
      >>> bool(saf_loss(2.0, logits, 0.0 * logits, known=known) > 2.0)
      True
      >>> saf_loss(2.0, logits, 0.0 * logits, known=known, active=False)
      Array(2., dtype=float32)
    """
    options = (weight, temperature, active, known, weights)
    return _total("saf_loss", loss, logits, past_logits, *options)


def mesa_loss(
    loss: Float[ArrayLike, ""],
    logits: Logits,
    ema_logits: Logits,
    *,
    weight: ArrayLike = 0.3,
    temperature: ArrayLike = 5.0,
    active: Bool[ArrayLike, ""] = True,
    weights: Shaped[ArrayLike, "..."] | None = None,
) -> Scalar:
    """Adds to a loss the distance of the logits from an averaged model's (MESA).

    It costs one forward pass of the teacher more than the plain loss. Where it is
    switched off the result is the plain loss bit for bit, as in :func:`saf_loss`.

    Args:
      loss: of the batch, such as the cross-entropy.
      logits: of the current weights.
      ema_logits: of the teacher (:func:`update_teacher`), on the same inputs.
      weight: of the term, >= 0; 0 switches it off.
      temperature: as in :func:`trajectory_loss`.
      active: as in :func:`saf_loss`.
      weights: a weight per row, 0 for padding, as in :func:`trajectory_loss`.

    Returns:
      The total, float32 at least.

    Raises:
      ValueError: as :func:`saf_loss` does.

    Examples:
      >>> logits = jnp.array([[0.0, 1.0], [3.0, 1.0]])
      >>> mesa_loss(2.0, logits, logits)
      Array(2., dtype=float32)
    """
    options = (weight, temperature, active, None, weights)
    return _total("mesa_loss", loss, logits, ema_logits, *options)


def in_window(epoch: ArrayLike, *, start: ArrayLike, end: ArrayLike) -> Bool[Array, ""]:
    """Tells whether an epoch lies strictly between two others.

    Args:
      epoch: the current one, from 0; traced or not.
      start: the last epoch without the term; the authors take 5, or 30 % of all.
      end: the first epoch without it again; ``float("inf")`` for never.

    Returns:
      The boolean to pass as ``active``.

    Raises:
      ValueError: if ``end`` is not above ``start``.

    Examples:
      >>> [bool(in_window(epoch, start=5, end=8)) for epoch in (5, 6, 7, 8)]
      [False, True, True, False]
    """
    check_number("in_window", "a number", epoch=epoch, start=start, end=end)
    numbers = isinstance(start, (int, float)) and isinstance(end, (int, float))
    if numbers and not start < end:
        raise ValueError(
            f"in_window: needs start < end, got start={start} and end={end}."
        )
    epoch = jnp.asarray(epoch)
    return (start < epoch) & (epoch < end)


def init_trajectory_buffer(
    *, num_examples: int, num_classes: int, lag: int, dtype: DTypeLike = jnp.float32
) -> TrajectoryBuffer:
    """Makes an empty buffer of logits for SAF.

    Args:
      num_examples: size N of the data set; indices run from 0 to N - 1.
      num_classes: entries K of each example's logits.
      lag: epochs between the logits that are compared, at least 1. The authors take 3
        (2 on ImageNet).
      dtype: of the stored logits; bfloat16 halves the memory.

    Returns:
      A buffer of zeros in which nothing is known.

    Raises:
      ValueError: if a size is not a positive integer.

    Examples:
      >>> buffer = init_trajectory_buffer(num_examples=5, num_classes=3, lag=2)
      >>> buffer.logits.shape
      (5, 3, 3)
    """
    check_count(
        "init_trajectory_buffer",
        num_examples=num_examples,
        num_classes=num_classes,
        lag=lag,
    )
    slots = (num_examples, lag + 1)
    return TrajectoryBuffer(
        jnp.zeros((*slots, num_classes), dtype), jnp.full(slots, -1, jnp.int32)
    )


def write_trajectory(
    buffer: TrajectoryBuffer,
    indices: Int[ArrayLike, "*rows"],
    logits: Logits,
    *,
    epoch: Int[ArrayLike, ""],
) -> TrajectoryBuffer:
    """Records the logits of a batch in the slot of its epoch.

    Args:
      buffer: from :func:`init_trajectory_buffer`; donate it to jit to update in place.
      indices: of the batch's examples in the data set, each at most once. Those outside
        ``[0, num_examples)`` are skipped: pad with -1.
      logits: as produced in this epoch, one row for each index. No gradient flows into
        the buffer.
      epoch: counted from 0, without gaps.

    Returns:
      The new buffer.

    Raises:
      ValueError: if the shapes do not match or ``epoch`` is negative.

    Examples:
      >>> buffer = init_trajectory_buffer(num_examples=3, num_classes=2, lag=1)
      >>> indices, logits = jnp.array([2]), jnp.array([[1.0, 2.0]])
      >>> write_trajectory(buffer, indices, logits, epoch=0).written[2]
      Array([ 0, -1], dtype=int32)
    """
    buffer = _checked("write_trajectory", buffer)
    size, slots, classes = buffer.logits.shape
    indices, logits = jnp.asarray(indices), jnp.asarray(logits)
    if logits.shape != (*indices.shape, classes):
        raise ValueError(
            f"write_trajectory: logits must have one row of {classes} classes per "
            f"index, shape {(*indices.shape, classes)}, got {logits.shape}."
        )
    epoch = _epoch("write_trajectory", epoch)
    with jax.named_scope("write_trajectory"):
        where = _inside(indices, size), epoch % slots
        new = jax.lax.stop_gradient(logits).astype(buffer.logits.dtype)
        return TrajectoryBuffer(
            buffer.logits.at[where].set(new, mode="drop"),
            buffer.written.at[where].set(epoch, mode="drop"),
        )


def read_trajectory(
    buffer: TrajectoryBuffer,
    indices: Int[ArrayLike, "*rows"],
    *,
    epoch: Int[ArrayLike, ""],
) -> tuple[Float[Array, "*rows classes"], Bool[Array, "*rows"]]:
    """Gives the logits that the examples of a batch had ``lag`` epochs ago.

    Before or after the step's :func:`write_trajectory`: the slots differ.

    Args:
      buffer: with what was written in earlier epochs.
      indices: of the batch's examples in the data set, as for the writing.
      epoch: the current one, from 0.

    Returns:
      The logits, in the buffer's dtype, and for each row whether they are known: False
      where nothing was written for that example in epoch ``epoch - lag``, which its
      logits of 0 then stand for.

    Raises:
      ValueError: if ``epoch`` is negative.

    Examples:
      >>> buffer = init_trajectory_buffer(num_examples=3, num_classes=2, lag=1)
      >>> indices, logits = jnp.array([2]), jnp.array([[1.0, 2.0]])
      >>> buffer = write_trajectory(buffer, indices, logits, epoch=0)
      >>> past, known = read_trajectory(buffer, jnp.array([2, 0]), epoch=1)
      >>> past.tolist(), known.tolist()
      ([[1.0, 2.0], [0.0, 0.0]], [True, False])
    """
    buffer = _checked("read_trajectory", buffer)
    size, slots, _ = buffer.logits.shape
    past = _epoch("read_trajectory", epoch) - (slots - 1)
    with jax.named_scope("read_trajectory"):
        where = _inside(jnp.asarray(indices), size), past % slots
        written = buffer.written.at[where].get(mode="fill", fill_value=-1)
        known = (written == past) & (past >= 0)
        logits = buffer.logits.at[where].get(mode="fill", fill_value=0)
        return jnp.where(known[..., None], logits, 0), known


def init_teacher(params: PyTree) -> PyTree:
    """Copies the parameters as the start of MESA's moving average.

    Args:
      params: any tree of arrays.

    Returns:
      The same tree in float32 at least: in bfloat16 a step of ``1 - decay`` = 0.0005 is
      below half a unit in the last place, and the average would stand still. Cast it
      for the forward pass with ``optax.tree.cast_like(teacher, params)``. Leaves that
      are not floating point (counters, keys) are copied as they are.

    Examples:
      >>> init_teacher({"w": jnp.ones(2, jnp.bfloat16)})
      {'w': Array([1., 1.], dtype=float32)}
    """
    return jax.tree.map(_average_of, params)


def update_teacher(
    teacher: PyTree, params: PyTree, *, decay: ArrayLike = 0.9995
) -> PyTree:
    """Moves the average to ``decay * teacher + (1 - decay) * params``.

    Args:
      teacher: from :func:`init_teacher`; its leaves keep their dtype.
      params: the new parameters, the same tree.
      decay: in [0, 1]. 0 copies the parameters. The paper's is 0.9995 as we recall it;
        the default of the authors' code is 0.9998.

    Returns:
      The new teacher; leaves that are not floating point are those of ``params``.

    Raises:
      ValueError: if the trees or shapes differ, or ``decay`` is out of range.

    Examples:
      >>> update_teacher({"w": jnp.ones(2)}, {"w": jnp.full(2, 3.0)}, decay=0.5)
      {'w': Array([2., 2.], dtype=float32)}
    """
    check_number("update_teacher", "in [0, 1]", decay=decay)
    check_alike(
        "update_teacher",
        "params",
        params,
        hint="; init_teacher(params) makes one",
        teacher=teacher,
    )

    def mixed(old, new):
        if not jnp.issubdtype(old.dtype, jnp.inexact):
            return new
        old = jnp.asarray(old)
        new = jnp.asarray(new, old.dtype)
        return optax.incremental_update(new, old, 1 - decay).astype(old.dtype)

    with jax.named_scope("update_teacher"):
        return jax.tree.map(mixed, teacher, params)


def _pair(name, logits, past, temperature) -> tuple[Array, Array]:
    check_number(name, "finite and > 0", temperature=temperature)
    logits, past = jnp.asarray(logits), jax.lax.stop_gradient(jnp.asarray(past))
    if not logits.shape or logits.shape != past.shape:
        raise ValueError(
            f"{name}: both logits must have the same shape (..., classes), got "
            f"{logits.shape} now and {past.shape} in the past."
        )
    dtype = jnp.promote_types(jnp.result_type(logits, past), jnp.float32)
    return logits.astype(dtype), past.astype(dtype)


def _mean(logits: Array, past: Array, temperature: ArrayLike, shares: Array) -> Scalar:
    # Rows of share 0 may hold NaN: they are left out before the softmax, or the NaN
    # would come back through the gradient.
    keep = (shares != 0)[..., None]
    temperature = jnp.asarray(temperature, logits.dtype)
    now, then = (jnp.where(keep, z, 0.0) / temperature for z in (logits, past))
    return temperature**2 * jnp.sum(shares * _divergences(now, then))


@jax.custom_jvp
def _divergences(z: Array, y: Array) -> Array:
    """Gives KL(softmax(y) || softmax(z)) of each row, for a constant y."""
    now, then = jax.nn.log_softmax(z), jax.nn.log_softmax(y)
    p, q = jnp.exp(now), jnp.exp(then)
    # p - q sums to 0; with it rounding errors of first order cancel.
    return jnp.sum(q * (then - now) + (p - q), axis=-1)


@_divergences.defjvp
def _divergences_jvp(primals, tangents):
    # Exactly 0 where the two agree. A product or quotient last (that of softmax, or of
    # a cotangent with each) would be fused into the difference and leave its rounding.
    z, y = primals
    slope = jnp.exp(jax.nn.log_softmax(z)) - jnp.exp(jax.nn.log_softmax(y))
    return _divergences(z, y), jnp.sum(slope * tangents[0], axis=-1)


def _total(
    name, loss, logits, past, weight, temperature, active, known, weights
) -> Scalar:
    check_number(name, "finite and >= 0", weight=weight)
    if jnp.shape(loss):
        raise ValueError(f"{name}: loss must be a scalar, got shape {jnp.shape(loss)}.")
    logits, past = _pair(name, logits, past, temperature)
    shape = logits.shape[:-1]
    with jax.named_scope(name):
        on = jnp.asarray(active, bool) & (jnp.asarray(weight) != 0)
        shares = row_shares(shape, weights, dtype=logits.dtype)
        if known is not None:
            known = jnp.asarray(known) != 0
            if known.shape != shape[: known.ndim]:
                raise ValueError(
                    f"{name}: known must have one entry per row, shape {shape} or a "
                    f"leading part of it, got {known.shape}."
                )
            rows = known.reshape(known.shape + (1,) * (len(shape) - known.ndim))
            shares = jnp.where(rows, shares, 0.0)
        shares = jnp.where(on, shares, 0.0)
        loss = jnp.asarray(loss)
        loss = loss.astype(jnp.promote_types(loss.dtype, logits.dtype))
        term = jnp.asarray(weight, logits.dtype) * _mean(
            logits, past, temperature, shares
        )
        # Not loss + 0: a loss of -0 would lose its sign.
        return jnp.where(jnp.any(shares != 0), loss + term, loss)


def _epoch(name: str, epoch: ArrayLike) -> Int[Array, ""]:
    if isinstance(epoch, int) and epoch < 0:
        raise ValueError(f"{name}: epoch counts from 0, got {epoch}.")
    return jnp.asarray(epoch, jnp.int32)


def _checked(name: str, buffer: TrajectoryBuffer) -> TrajectoryBuffer:
    buffer = check_fields(
        name,
        "buffer",
        buffer,
        TrajectoryBuffer,
        "init_trajectory_buffer",
        logits="examples slots classes",
        written="examples slots",
    )
    check_floating(name, "buffer.logits", buffer.logits)
    kind = buffer.written.dtype
    if not jnp.issubdtype(kind, jnp.signedinteger) or 0 in buffer.logits.shape:
        raise ValueError(
            f"{name}: buffer must hold entries, and their epochs as signed integers, "
            f"got {described(buffer.logits)} and {described(buffer.written)}; "
            "init_trajectory_buffer makes it."
        )
    return buffer


def _inside(indices: Array, size: int) -> Array:
    # Negative indices count from the end elsewhere; here they are padding.
    indices = indices.astype(jnp.int32)
    return jnp.where((indices >= 0) & (indices < size), indices, size)


def _average_of(leaf) -> Array:
    dtype = jnp.asarray(leaf).dtype
    inexact = jnp.issubdtype(dtype, jnp.inexact)
    return jnp.array(leaf, jnp.promote_types(dtype, jnp.float32) if inexact else dtype)
