"""What a training run carries from step to step.

The base key never changes: the order of an epoch is a function of
``fold_in(key, epoch)`` and the noise of a step of ``fold_in(key, step)``, so a run
that restarts from a checkpoint repeats what an undisturbed one would have done.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, PyTree

from jaxlab._chains import check_chain
from jaxlab._checks import check_number, described


@runtime_checkable
class Optimizer(Protocol):
    """Says what a step asks of an optimizer: ``init`` and ``update``.

    Optax transformations fit, and so does ``optax.MultiSteps``.

    Examples:
      >>> import optax
      >>> isinstance(optax.MultiSteps(optax.sgd(0.1), 2), Optimizer)
      True
    """

    @property
    def init(self) -> Callable[..., PyTree]:
        """Gives the optimizer's state for some parameters."""
        ...

    @property
    def update(self) -> Callable[..., tuple[PyTree, PyTree]]:
        """Turns gradients into updates."""
        ...


class LossScale(NamedTuple):
    """Holds a dynamic loss scale.

    Attributes:
      scale: the factor on the loss before its gradient is taken, float32.
      streak: steps since the scale last changed, int32.

    Examples:
      >>> float(LossScale(jnp.float32(1024.0), jnp.int32(0)).scale)
      1024.0
    """

    scale: Float[Array, ""]
    streak: Int[Array, ""]


class TrainState(NamedTuple):
    """Holds everything that a step reads and writes; a pytree of arrays.

    Attributes:
      step: number of steps done, int32.
      params: the trained parameters, any pytree of arrays.
      model_state: what the model keeps besides (BatchNorm statistics), else ``()``.
      opt_state: the optimizer's state.
      key: the run's base key; never changes.
      loss_scale: a :class:`LossScale` where the scale is dynamic, else ``()``.

    Examples:
      >>> import optax
      >>> params = {"w": jnp.ones(3)}
      >>> state = create_state(jax.random.key(0), params, optax.adam(1e-3))
      >>> int(state.step)
      0
    """

    step: Int[Array, ""]
    params: PyTree
    model_state: PyTree
    opt_state: PyTree
    key: Key[Array, ""]
    loss_scale: PyTree = ()


def create_state(
    key: Key[Array, ""],
    params: PyTree,
    optimizer: Optimizer,
    *,
    model_state: PyTree = (),
    loss_scale: float | None = None,
) -> TrainState:
    """Builds the state of step 0.

    Args:
      key: the run's base key, a typed ``jax.random.key``.
      params: any pytree of arrays; numbers and NumPy arrays in it become jax's.
      optimizer: an optax transformation, or anything with its ``init``.
      model_state: what the model keeps besides its parameters.
      loss_scale: first value of a dynamic loss scale, for float16 training with
        ``make_train_step(..., loss_scale="dynamic")``; 2**15 is usual.

    Returns:
      The state. Its leaves are fresh arrays: a step that donates them leaves the
      caller's ``params`` alone.

    Raises:
      ValueError: if ``key`` is not a typed key, the optimizer has no ``init``, or it is
        a chain of links of this package in an order of which no use is right.

    Examples:
      >>> import optax
      >>> state = create_state(jax.random.key(0), {"w": jnp.ones(3)}, optax.sgd(0.1))
      >>> state.params["w"].shape
      (3,)
    """
    kind = jnp.asarray(key).dtype
    if not jnp.issubdtype(kind, jax.dtypes.prng_key) or jnp.shape(key):
        raise ValueError(
            "create_state: key must be a typed key such as jax.random.key(0), got "
            f"{kind}{list(jnp.shape(key))} (jax.random.PRNGKey makes uint32[2])."
        )
    check_number("create_state", "finite and > 0", optional=True, loss_scale=loss_scale)
    if not callable(getattr(optimizer, "init", None)):
        raise ValueError(
            "create_state: optimizer must have an init, as optax transformations do, "
            f"got {described(optimizer)}."
        )
    copy = lambda tree: jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), tree)
    params = copy(params)
    opt_state = jax.tree.map(_fresh, optimizer.init(params))
    check_chain(opt_state)
    scale = ()
    if loss_scale is not None:
        scale = LossScale(jnp.float32(loss_scale), jnp.zeros((), jnp.int32))
    step = jnp.zeros((), jnp.int32)
    return TrainState(step, params, copy(model_state), opt_state, jnp.copy(key), scale)


def _fresh(leaf):
    """Copies a leaf and takes its weak type away.

    Copies, since ``init`` may hand one array out twice and a buffer is donated once;
    not weakly typed, since line searches start so and a step would trace twice.
    """
    array = jnp.asarray(leaf)
    return jnp.copy(jax.lax.convert_element_type(array, array.dtype))
