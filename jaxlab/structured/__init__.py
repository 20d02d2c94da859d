"""Structured linear maps: matrices of few parameters, as functions on arrays.

Nothing here needs flax; the modules that hold such parameters are in
:mod:`jaxlab.layers`.
"""

from jaxlab.structured.monarch import (
    DFTFactors,
    MMStarFactors,
    MonarchFactors,
    circulant_factors,
    dft_chain_factors,
    dft_factors,
    factor_mmstar,
    hadamard_factors,
    init_monarch,
    kronecker_factors,
    mmstar_matmul,
    mmstar_to_dense,
    monarch_chain_matmul,
    monarch_chain_to_dense,
    monarch_matmul,
    monarch_matmul_features,
    monarch_mup_multipliers,
    monarch_project,
    monarch_project_data,
    monarch_project_error,
    monarch_to_dense,
)

__all__ = [
    "DFTFactors",
    "MMStarFactors",
    "MonarchFactors",
    "circulant_factors",
    "dft_chain_factors",
    "dft_factors",
    "factor_mmstar",
    "hadamard_factors",
    "init_monarch",
    "kronecker_factors",
    "mmstar_matmul",
    "mmstar_to_dense",
    "monarch_chain_matmul",
    "monarch_chain_to_dense",
    "monarch_matmul",
    "monarch_matmul_features",
    "monarch_mup_multipliers",
    "monarch_project",
    "monarch_project_data",
    "monarch_project_error",
    "monarch_to_dense",
]
