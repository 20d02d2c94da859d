"""What the optimizers of this room share: schedules, and what they refuse."""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

# What may follow a schedule; everything else that an optimizer is made from is static.
_HYPERPARAMETERS = {
    "alpha",
    "aux_step",
    "damping",
    "eta",
    "gamma",
    "init_scale",
    "learning_rate",
    "momentum",
    "prior_precision",
    "step_size",
    "temperature",
    "weight_decay",
}

# The end of a message about a missing extra argument.
DROPPED = (
    "A plain optax.MultiSteps inside a chain drops it: wrap it with "
    "jaxlab.training.with_extra_args. So does apply_gradients of Flax's TrainState: "
    "use the subclass in docs/start/own_loop.md."
)


def static_args(optimizer: Callable[..., Any]) -> tuple[str, ...]:
    """Names the arguments that ``optax.inject_hyperparams`` must leave alone.

    Args:
      optimizer: ``fishleg``, ``annealed_gradient_noise`` or another of this room.

    Returns:
      For ``optax.inject_hyperparams(fishleg, static_args=static_args(fishleg))``:
      modes, counts, rules. The others may be schedules.

    Raises:
      ValueError: if it is given what such a function returns.

    Examples:
      >>> from jaxlab.optimizers import fishleg
      >>> "damping" in static_args(fishleg), "white_directions" in static_args(fishleg)
      (False, True)
    """
    if not callable(optimizer):
        raise ValueError(
            "static_args: optimizer must be the function that makes it, as in "
            f"static_args(fishleg), got {type(optimizer).__name__}."
        )
    names = inspect.signature(optimizer).parameters
    return tuple(name for name in names if name not in _HYPERPARAMETERS)


def check_alike(name: str, updates: PyTree, params: PyTree) -> None:
    """Refuses updates that are no tree like params: they would broadcast."""
    one, two = jax.tree.structure(updates), jax.tree.structure(params)
    if one != two:
        raise ValueError(
            f"{name}: updates and params must be trees of one structure, got {one} and "
            f"{two}."
        )
    shapes = lambda tree: [jnp.shape(leaf) for leaf in jax.tree.leaves(tree)]
    for mine, theirs in zip(shapes(updates), shapes(params), strict=True):
        if mine != theirs:
            raise ValueError(
                f"{name}: every leaf of updates must have the shape of its parameter, "
                f"got {mine} for {theirs}."
            )
