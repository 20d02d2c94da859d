"""What the optimizers of this room share with ``optax.inject_hyperparams``."""

import inspect
from collections.abc import Callable
from typing import Any

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
