"""The training loop: fast over small steps, exact over restarts.

One jitted call gathers the batches on the device and runs many steps in a compiled
loop; its metrics are read while the next call runs, so the host waits at most once a
call and the device never waits for the host. At the end of an epoch in which
something is due (validation, a callback, a checkpoint) the loop catches up first.

Exact resume: all that decides a step stands in the state (parameters, optimizer
state, step number, base key) and in the data; batches are functions of (key, epoch,
step). The state is saved only after the losses up to it were seen to be finite.
"""

import contextlib
import inspect
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxlab._checks import check_count
from jaxlab.objective import Batch, Objective
from jaxlab.training.checkpoint import Checkpoints
from jaxlab.training.feed import Streamed, place, resident
from jaxlab.training.loops import Calls
from jaxlab.training.metrics import RowMetric, evaluate
from jaxlab.training.record import MetricLines, Recorder
from jaxlab.training.state import Optimizer, TrainState
from jaxlab.training.step import make_train_step

__all__ = ["EpochInfo", "FitResult", "fit"]


class EpochInfo(NamedTuple):
    """Holds what a callback is told at the end of an epoch.

    Attributes:
      epoch: number of epochs done.
      step: number of steps done.
      state: the state now; its buffers are given to the next step when the callback
        returns, so copy what is to be kept.
      metrics: the epoch's means, and the validation's as ``validation_...``.

    Examples:
      >>> EpochInfo(1, 12, None, {"loss": 0.5}).metrics["loss"]
      0.5
    """

    epoch: int
    step: int
    state: TrainState
    metrics: dict[str, Any]


class FitResult(NamedTuple):
    """Holds what :func:`fit` returns.

    Attributes:
      state: the last state.
      history: NumPy arrays with one entry for each step of this call: ``step``
        (counted from 1), ``loss``, ``grad_norm``, ``weight`` (rows in the batch, or
        the sum of their weights) and what else the step measures.
      epochs: one dict of means for each epoch of this call, as in the metrics file.

    Examples:
      >>> FitResult(None, {"loss": np.array([2.0])}, []).history["loss"].tolist()
      [2.0]
    """

    state: TrainState
    history: dict[str, np.ndarray]
    epochs: list[dict[str, Any]]


def fit(
    objective: Objective,
    optimizer: Optimizer,
    state: TrainState,
    train: Batch | Callable[[int, int], Batch],
    *,
    epochs: int,
    batch_size: int | None = None,
    steps_per_epoch: int | None = None,
    drop_remainder: bool = False,
    steps_per_call: int | None = None,
    validation: Batch | None = None,
    metrics: Mapping[str, RowMetric] | None = None,
    evaluate_every: int = 1,
    metrics_path: Any = None,
    checkpoint_dir: Any = None,
    checkpoint_every: int = 1,
    keep: int = 2,
    callbacks: Sequence[Callable[[EpochInfo], bool | None]] = (),
    progress: bool = True,
    data_sharding: NamedSharding | None = None,
    accumulate: int = 1,
    remat: bool = False,
    loss_scale: float | Literal["dynamic"] | None = None,
) -> FitResult:
    """Trains until ``epochs`` epochs are done, from the newest checkpoint if any.

    Args:
      objective: model and likelihood.
      optimizer: any optax transformation; :func:`make_train_step` feeds it.
      state: from :func:`create_state`, at step 0 or where an earlier run stopped. Its
        buffers are given to the first step: copy what is needed afterwards.
      train: arrays ``(inputs, targets)`` or ``(inputs, targets, weights)``, rows
        first, which move to the device once; or a function ``(epoch, step) -> batch``
        of the host, numbers from 0, that depends on nothing else and always gives the
        same shapes.
      epochs: in all, those that the state has behind it included.
      batch_size: rows a batch, for arrays.
      steps_per_epoch: number of batches, for a function.
      drop_remainder: leaves out what does not fill a last batch. By default every row
        counts once an epoch, and the last batch is filled up with rows of weight 0
        (a BatchNorm sees them, no mean does).
      steps_per_call: steps in one jitted call. By default an epoch's, up to 100; one
        where the step has convolutions and runs on the CPU, or ``train`` is a function.
      validation: arrays like ``train``, evaluated with ``train=False``.
      metrics: of the validation, see :func:`evaluate`.
      evaluate_every: epochs between validations; the last epoch has one.
      metrics_path: file to which every epoch's means are appended, one JSON object a
        line. Lines later than the step where the run starts are cut.
      checkpoint_dir: folder of this run's checkpoints, see :class:`Checkpoints`. What
        is there is restored into the layout of ``state``, and the run goes on.
      checkpoint_every: epochs between checkpoints; the last epoch has one. Each costs
        some 20 to 50 ms even where the state is small: more than a short epoch.
      keep: number of checkpoints to keep, at least 2.
      callbacks: called in turn with an :class:`EpochInfo` after every epoch, before its
        checkpoint; one that returns True ends the run after that checkpoint.
      progress: shows a bar where standard error is a terminal.
      data_sharding: of a batch's rows over a mesh, such as ``NamedSharding(mesh,
        P("data"))``. Leaves of ``state`` that are not on the mesh are copied to all its
        devices; those that are keep their shardings.
      accumulate: micro-batches a step.
      remat: recomputes the model in the backward pass.
      loss_scale: for float16, see :func:`make_train_step`.

    Returns:
      Last state, per-step history and per-epoch means.

    Raises:
      ValueError: if the arguments do not fit each other or the data, ``objective`` is
        not one, the state is used up or of another optimizer, or the checkpoint does
        not fit the state (another tree, another base key).
      FloatingPointError: if a loss is not finite; names the step. No later state was
        saved, so the newest checkpoint is from before.

    Examples:
      >>> import optax
      >>> from jaxlab.likelihoods import Gaussian
      >>> from jaxlab.objective import Objective, plain
      >>> from jaxlab.training import create_state
      >>> objective = Objective(plain(lambda w, x: x @ w), Gaussian())
      >>> optimizer = optax.sgd(0.5)
      >>> state = create_state(jax.random.key(0), jnp.zeros((1, 1)), optimizer)
      >>> data = (jnp.ones((6, 1)), jnp.ones((6, 1)))
      >>> result = fit(objective, optimizer, state, data, epochs=2, batch_size=4)
      >>> result.state.params.tolist(), result.history["weight"].tolist()
      ([[0.9375]], [4.0, 2.0, 4.0, 2.0])
    """
    _check_counts(epochs, evaluate_every, checkpoint_every, steps_per_call)
    _check_objective(objective)
    _check_state(state, optimizer)
    state = _on_mesh(state, data_sharding)
    feed = _make_feed(
        train,
        batch_size,
        steps_per_epoch,
        steps_per_call,
        drop_remainder,
        data_sharding,
    )
    held_out = None
    if validation is not None:
        held_out = resident(validation, batch_size=batch_size, sharding=data_sharding)
    step = make_train_step(
        objective,
        optimizer,
        accumulate=accumulate,
        remat=remat,
        loss_scale=loss_scale,
        jit=False,
    )
    due = lambda every, epoch: epoch % every == 0 or epoch == epochs
    evaluates = lambda epoch: held_out is not None and due(evaluate_every, epoch)
    saves = lambda epoch: checkpoint_dir is not None and due(checkpoint_every, epoch)
    attends = lambda epoch: bool(callbacks) or evaluates(epoch) or saves(epoch)
    leader = jax.process_index() == 0
    records = []
    with contextlib.ExitStack() as stack:
        checkpoints = None
        if checkpoint_dir is not None:
            stack.enter_context(_terminated_as_exit())
            checkpoints = stack.enter_context(Checkpoints(checkpoint_dir, keep=keep))
            state = _restored(checkpoints, state)
        start = int(state.step)
        stop = max(start, epochs * feed.steps_per_epoch)
        lines = None
        if metrics_path is not None and leader:
            lines = MetricLines(metrics_path, after_step=start)
            stack.callback(lines.close)
        calls = Calls(step, feed, state, size=steps_per_call)
        recorder = Recorder(
            steps_per_epoch=feed.steps_per_epoch,
            first_step=start,
            last_step=stop,
            progress=progress and leader,
        )
        stack.callback(recorder.close)
        for done, found in calls.run(start, stop, catch_up=attends):
            record = recorder.add(done, found)
            if record is None:
                continue
            epoch = record["epoch"]
            if evaluates(epoch):
                now = calls.state
                means = evaluate(
                    objective, now.params, now.model_state, held_out, metrics=metrics
                )
                record |= {f"validation_{name}": mean for name, mean in means.items()}
            records.append(record)
            if lines is not None:
                lines.write(record)
            ends = False
            for callback in callbacks:
                info = EpochInfo(epoch, record["step"], calls.state, dict(record))
                ends |= callback(info) is True
            if checkpoints is not None and (saves(epoch) or ends):
                checkpoints.save(record["step"], calls.state)
            if attends(epoch):
                recorder.restart_clock()
            if ends:
                break
        if checkpoints is not None:
            checkpoints.wait()
        return FitResult(calls.state, recorder.history(), records)


def _make_feed(train, batch_size, steps_per_epoch, steps_per_call, drop, sharding):
    if not callable(train):
        if batch_size is None or steps_per_epoch is not None:
            raise ValueError(
                "fit: arrays need batch_size= and no steps_per_epoch=, got "
                f"batch_size={batch_size}, steps_per_epoch={steps_per_epoch}."
            )
        return resident(
            train, batch_size=batch_size, drop_remainder=drop, sharding=sharding
        )
    if steps_per_epoch is None or drop or steps_per_call not in (None, 1):
        raise ValueError(
            "fit: a function of (epoch, step) needs steps_per_epoch=, and neither "
            "drop_remainder= nor steps_per_call= above 1; got "
            f"steps_per_epoch={steps_per_epoch}, drop_remainder={drop}, "
            f"steps_per_call={steps_per_call}."
        )
    return Streamed(train, steps_per_epoch=steps_per_epoch, sharding=sharding)


def _on_mesh(state, sharding):
    """Copies the leaves that are not on the mesh of the batches to all its devices."""
    if sharding is None:
        spread = [x for x in jax.tree.leaves(state) if len(x.sharding.device_set) > 1]
        if spread:
            raise ValueError(
                "fit: the state lies on several devices, so the batches need "
                "data_sharding=, such as NamedSharding(mesh, PartitionSpec('data'))."
            )
        return state
    whole = NamedSharding(sharding.mesh, PartitionSpec())
    on_mesh = lambda leaf: leaf.sharding.device_set == whole.device_set
    return jax.tree.map(lambda x: x if on_mesh(x) else place(x, whole), state)


def _restored(checkpoints, state):
    found = checkpoints.restore(state)
    if found is None:
        return state
    data = lambda state: np.asarray(jax.random.key_data(state.key))
    if not np.array_equal(data(found.state), data(state)):
        raise ValueError(
            f"The checkpoint of step {found.step} in {checkpoints.directory} belongs "
            "to a run with another base key: give the state that run's key to go on "
            "with it, or choose another folder."
        )
    return found.state


def _check_counts(epochs, evaluate_every, checkpoint_every, steps_per_call):
    check_count("fit", least=0, epochs=epochs)
    check_count("fit", evaluate_every=evaluate_every, checkpoint_every=checkpoint_every)
    check_count("fit", optional=True, steps_per_call=steps_per_call)


def _check_objective(objective):
    if not isinstance(objective, Objective):
        raise ValueError(
            "fit: objective must be an Objective; make one with from_nnx(model, "
            "likelihood) or Objective(plain(apply_fn), likelihood), got "
            f"{type(objective).__name__}."
        )
    if isinstance(objective.likelihood, type):
        raise ValueError(
            "fit: the objective's likelihood must be an instance, such as "
            f"Categorical(), got the class {objective.likelihood.__name__}."
        )
    try:
        signature = inspect.signature(objective.apply_fn)
    except (TypeError, ValueError):
        return  # built in, for one
    try:
        signature.bind((), (), (), key=None, train=True)
    except TypeError as error:
        raise ValueError(
            "fit: the objective's apply_fn must take (params, state, inputs, *, key, "
            f"train), got {signature}; write Objective(plain(apply_fn), likelihood) "
            "for a function of (params, inputs)."
        ) from error


def _check_state(state, optimizer):
    if not isinstance(state, TrainState):
        raise ValueError(
            "fit: state must be a TrainState of jaxlab; make one with "
            "jaxlab.training.create_state(key, params, optimizer), got "
            f"{type(state).__module__}.{type(state).__qualname__}."
        )
    if any(leaf.is_deleted() for leaf in jax.tree.leaves(state)):
        raise ValueError(
            "fit: the buffers of this state were given to an earlier step; go on with "
            "the state that came out of it (result.state), or make a new one with "
            "create_state."
        )
    expected = jax.eval_shape(optimizer.init, state.params)
    if jax.tree.structure(expected) != jax.tree.structure(state.opt_state):
        raise ValueError(
            "fit: state.opt_state does not come from this optimizer; call "
            "create_state with the optimizer that fit gets."
        )


@contextlib.contextmanager
def _terminated_as_exit():
    """Turns SIGTERM into SystemExit, so that the save under way is finished."""
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def leave(number, frame):
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
