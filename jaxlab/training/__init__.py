"""Training: the step that feeds every transformation, the loop, exact resume."""

try:
    import flax as _flax  # noqa: F401
except ImportError as error:
    raise ImportError(
        'jaxlab.training needs flax and orbax: pip install "jaxlab[train]".'
    ) from error

from jaxlab.training.adapters import NnxParts, from_nnx
from jaxlab.training.checkpoint import Checkpoints, Restored
from jaxlab.training.curvature import CurvatureMonitor
from jaxlab.training.feed import epoch_order
from jaxlab.training.fit import EpochInfo, FitResult, fit
from jaxlab.training.metrics import accuracy, evaluate
from jaxlab.training.sharding import (
    ShardingPlan,
    batch_sharding,
    data_parallel,
    fully_sharded,
    init_sharded,
    make_mesh,
    shard,
    tensor_parallel,
)
from jaxlab.training.state import LossScale, Optimizer, TrainState, create_state
from jaxlab.training.step import make_train_step, with_extra_args
from jaxlab.training.switching import (
    ReverseSparsified,
    Switched,
    reverse_sparsification,
    switch_layers,
)

__all__ = [
    "Checkpoints",
    "CurvatureMonitor",
    "EpochInfo",
    "FitResult",
    "LossScale",
    "NnxParts",
    "Optimizer",
    "Restored",
    "ReverseSparsified",
    "ShardingPlan",
    "Switched",
    "TrainState",
    "accuracy",
    "batch_sharding",
    "create_state",
    "data_parallel",
    "epoch_order",
    "evaluate",
    "fit",
    "from_nnx",
    "fully_sharded",
    "init_sharded",
    "make_mesh",
    "make_train_step",
    "reverse_sparsification",
    "shard",
    "switch_layers",
    "tensor_parallel",
    "with_extra_args",
]
