"""Monarch matrices: two block-diagonal factors with a shuffle between them.

Reference: Dao, Chen, Sohoni, Desai, Poli, Grogan, Liu, Rao, Rudra and Re, "Monarch:
Expressive Structured Matrices for Efficient and Accurate Training", ICML 2022.
"""

from jaxlab.structured.monarch.chain import (
    monarch_chain_matmul,
    monarch_chain_to_dense,
)
from jaxlab.structured.monarch.data_projection import monarch_project_data
from jaxlab.structured.monarch.fused import monarch_matmul_fused
from jaxlab.structured.monarch.initialisation import (
    init_monarch,
    monarch_mup_multipliers,
)
from jaxlab.structured.monarch.multiply import (
    MonarchFactors,
    monarch_matmul,
    monarch_matmul_features,
    monarch_to_dense,
)
from jaxlab.structured.monarch.projection import (
    monarch_project,
    monarch_project_error,
)
from jaxlab.structured.monarch.recovery import (
    MMStarFactors,
    factor_mmstar,
    mmstar_matmul,
    mmstar_to_dense,
)
from jaxlab.structured.monarch.stack import (
    FoldedLayer,
    fold_monarch_stack,
    monarch_stack_matmul,
    unfold_monarch_stack,
)
from jaxlab.structured.monarch.transforms import (
    DFTFactors,
    circulant_factors,
    dft_chain_factors,
    dft_factors,
    hadamard_factors,
    kronecker_factors,
)

__all__ = [
    "DFTFactors",
    "FoldedLayer",
    "MMStarFactors",
    "MonarchFactors",
    "circulant_factors",
    "dft_chain_factors",
    "dft_factors",
    "factor_mmstar",
    "fold_monarch_stack",
    "hadamard_factors",
    "init_monarch",
    "kronecker_factors",
    "mmstar_matmul",
    "mmstar_to_dense",
    "monarch_chain_matmul",
    "monarch_chain_to_dense",
    "monarch_matmul",
    "monarch_matmul_features",
    "monarch_matmul_fused",
    "monarch_mup_multipliers",
    "monarch_project",
    "monarch_project_data",
    "monarch_project_error",
    "monarch_stack_matmul",
    "monarch_to_dense",
    "unfold_monarch_stack",
]
