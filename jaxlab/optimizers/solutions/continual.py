"""Tasks one after the other: what is learned, and what is forgotten.

See :mod:`jaxlab.optimizers.solutions`.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Key, PyTree

from jaxlab._checks import check_count
from jaxlab._norms import wide
from jaxlab.curvature._batches import as_arrays, check_alike, rows_of
from jaxlab.optimizers.gradient_noise import _check_key
from jaxlab.optimizers.solutions.stopping import Step, batch_of, checked_step, strong

Scalar = Float[Array, ""]


class ContinualRun(NamedTuple):
    """What :func:`continual_run` gives.

    Attributes:
      accuracies: entry ``(s, t)`` is that of task t after training on tasks 0 to s.
      states: of the training after each task, a tree with a leading axis of tasks.

    Examples:
      >>> tasks = [jnp.zeros(2), jnp.ones(2)]
      >>> run = continual_run(
      ...     jax.random.key(0), lambda w, batch: (batch[0], None), jnp.array(9.0),
      ...     tasks, accuracy_fn=lambda w, task: 1.0 * (w == task[0]),
      ...     steps=3, batch_size=1,
      ... )
      >>> run.accuracies.tolist()
      [[1.0, 0.0], [0.0, 1.0]]
    """

    accuracies: Float[Array, "tasks tasks"]
    states: PyTree


def continual_run(
    key: Key[Array, ""],
    step: Step,
    state: PyTree,
    tasks: Sequence[PyTree],
    *,
    accuracy_fn: Callable[[Any, Any], Any],
    steps: int,
    batch_size: int,
    test_tasks: Sequence[PyTree] | None = None,
) -> ContinualRun:
    """Trains on one task after the other and measures all of them after each.

    The optimizer's state goes from task to task. With the same key all optimizers see
    the same batches. Tune each on the first task alone, and list what else differs
    between them (momentum, weight decay): it fakes effects.

    Args:
      key: of the batches.
      step: as in :func:`train_to_loss`.
      state: what the step takes; its arrays are not donated.
      tasks: training data of each, trees of arrays that share their leading axis, of
        one shape for all tasks.
      accuracy_fn: ``(state, data) -> scalar``.
      steps: on each task.
      batch_size: rows of a step, drawn with replacement.
      test_tasks: what ``accuracy_fn`` gets, one for each task, of one shape; ``None``
        gives it the training data.

    Returns:
      See :class:`ContinualRun`; :func:`forgetting` and :func:`average_accuracy` take
      its matrix.

    Raises:
      ValueError: if a count is out of range, there is no task, the tasks differ in
        shape, or the key is not a typed one.

    Examples:
      >>> step = lambda w, batch: (w + 0.5 * (batch.mean() - w), None)
      >>> run = continual_run(
      ...     jax.random.key(0), step, jnp.array(0.0), [jnp.ones(2), 3 * jnp.ones(2)],
      ...     accuracy_fn=lambda w, x: -abs(w - x.mean()), steps=1, batch_size=2,
      ... )
      >>> run.states
      Array([0.5 , 1.75], dtype=float32)
    """
    name = "continual_run"
    _check_key(name, key)
    check_count(name, steps=steps, batch_size=batch_size)
    tests = tasks if test_tasks is None else test_tasks
    for word, given in (("tasks", tasks), ("test_tasks", tests)):
        if not isinstance(given, (list, tuple)) or not given:
            raise ValueError(
                f"{name}: {word} must be a list with the data of each task, one at "
                f"least, got {type(given).__name__}"
                f"{' without entries' if isinstance(given, (list, tuple)) else ''}."
            )
        for task in given:
            rows_of(name, task)
            check_alike(name, given[0], task)
            if rows_of(name, task) != rows_of(name, given[0]):
                raise ValueError(
                    f"{name}: all of {word} must have equally many rows, got "
                    f"{[rows_of(name, each) for each in given]}."
                )
    if len(tests) != len(tasks):
        raise ValueError(
            f"{name}: test_tasks must have one entry for each of the {len(tasks)} "
            f"tasks, got {len(tests)}."
        )
    rows = rows_of(name, tasks[0])
    stack = lambda trees: jax.tree.map(lambda *x: jnp.stack(x), *map(as_arrays, trees))
    tasks, tests = stack(tasks), stack(tests)
    step = checked_step(name, step)

    def accuracy_of(state, test):
        found = wide(accuracy_fn(state, test))
        if found.shape:
            raise ValueError(
                f"{name}: accuracy_fn must give a scalar, got shape {found.shape}."
            )
        return found

    def learn(carry, now):
        index, data = now
        mine = jax.random.fold_in(key, index)
        one = lambda i, s: step(s, batch_of(mine, i, data, rows, batch_size))
        state = jax.lax.fori_loop(0, steps, one, carry)
        found = jax.lax.map(lambda test: accuracy_of(state, test), tests)
        return state, (found, state)

    with jax.named_scope(name):
        numbers = jnp.arange(jax.tree.leaves(tasks)[0].shape[0])
        _, found = jax.lax.scan(learn, strong(state), (numbers, tasks))
    return ContinualRun(*found)


def average_accuracy(accuracies: Float[ArrayLike, "tasks tasks"]) -> Scalar:
    """Averages the accuracies of all tasks after the last one.

    Args:
      accuracies: entry ``(s, t)`` is that of task t after training on tasks 0 to s.

    Returns:
      The mean of the last row.

    Raises:
      ValueError: if it is no square matrix.

    Examples:
      >>> average_accuracy(jnp.array([[1.0, 0.0], [0.5, 1.0]]))
      Array(0.75, dtype=float32)
    """
    return jnp.mean(_square("average_accuracy", accuracies)[-1])


def forgetting(accuracies: Float[ArrayLike, "tasks tasks"]) -> Scalar:
    """Measures how far tasks fall below the best that they ever had.

    Args:
      accuracies: as in :func:`average_accuracy`.

    Returns:
      The mean over all tasks but the last of their best accuracy before the last task
      was trained, less that after it; below 0 where tasks still improved.

    Raises:
      ValueError: if it is no square matrix of two tasks at least.

    Examples:
      >>> forgetting(jnp.array([[1.0, 0.0], [0.5, 1.0]]))
      Array(0.5, dtype=float32)
    """
    found = _square("forgetting", accuracies)
    if len(found) < 2:
        raise ValueError("forgetting: accuracies must be of two tasks at least.")
    return jnp.mean(jnp.max(found[:-1, :-1], axis=0) - found[-1, :-1])


def _square(name, accuracies):
    accuracies = wide(accuracies)
    if accuracies.ndim != 2 or len(set(accuracies.shape)) > 1 or not accuracies.size:
        raise ValueError(
            f"{name}: accuracies must be a square matrix, one row after each task and "
            f"one column for each, got shape {accuracies.shape}."
        )
    return accuracies
