"""Monarch matrices: two block-diagonal factors with a shuffle between them.

Reference: Dao, Chen, Sohoni, Desai, Poli, Grogan, Liu, Rao, Rudra and Re, "Monarch:
Expressive Structured Matrices for Efficient and Accurate Training", ICML 2022.
"""

from jaxlab.structured.monarch.initialisation import init_monarch
from jaxlab.structured.monarch.multiply import (
    MonarchFactors,
    monarch_matmul,
    monarch_to_dense,
)
from jaxlab.structured.monarch.projection import (
    monarch_project,
    monarch_project_error,
)

__all__ = [
    "MonarchFactors",
    "init_monarch",
    "monarch_matmul",
    "monarch_project",
    "monarch_project_error",
    "monarch_to_dense",
]
