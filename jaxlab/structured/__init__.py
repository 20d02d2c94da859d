"""Structured linear maps: matrices of few parameters, as functions on arrays.

Nothing here needs flax; the modules that hold such parameters are in
:mod:`jaxlab.layers`.
"""

from jaxlab.structured.monarch import (
    MonarchFactors,
    init_monarch,
    monarch_matmul,
    monarch_project,
    monarch_project_error,
    monarch_to_dense,
)

__all__ = [
    "MonarchFactors",
    "init_monarch",
    "monarch_matmul",
    "monarch_project",
    "monarch_project_error",
    "monarch_to_dense",
]
