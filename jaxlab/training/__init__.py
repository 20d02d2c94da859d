"""Training: the step that feeds every transformation, the loop, exact resume."""

try:
    import flax as _flax  # noqa: F401
except ImportError as error:
    raise ImportError(
        'jaxlab.training needs flax and orbax: pip install "jaxlab[train]".'
    ) from error

from jaxlab.training.adapters import NnxParts, from_nnx
from jaxlab.training.state import LossScale, Optimizer, TrainState, create_state
from jaxlab.training.step import make_train_step, with_extra_args

__all__ = [
    "LossScale",
    "NnxParts",
    "Optimizer",
    "TrainState",
    "create_state",
    "from_nnx",
    "make_train_step",
    "with_extra_args",
]
