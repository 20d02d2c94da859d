"""Flax NNX modules over the functions of the other folders, and conversions.

Each module is a thin holder of parameters. Conversions turn the dense layers of a
model, or of a tree of parameters, into structured ones and back.
"""

try:
    from flax import nnx as _nnx  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "flax":
        raise
    raise ImportError(
        'jaxlab.layers needs flax, which is missing: pip install "jaxlab[train]".'
    ) from error

from jaxlab.layers.conversion import (
    densify,
    densify_params,
    monarchize,
    monarchize_params,
)
from jaxlab.layers.monarch import MonarchLinear
from jaxlab.layers.monarch_stack import MonarchStack
from jaxlab.layers.self_tuning import SelfTuningConv, SelfTuningLinear

__all__ = [
    "MonarchLinear",
    "MonarchStack",
    "SelfTuningConv",
    "SelfTuningLinear",
    "densify",
    "densify_params",
    "monarchize",
    "monarchize_params",
]
