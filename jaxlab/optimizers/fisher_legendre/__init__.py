"""FishLeg: natural-gradient steps with an inverse Fisher that is learnt online.

Reference: Garcia, Freddi, Fotiadis, Li, Vakili, Bernacchia and Hennequin,
"Fisher-Legendre (FishLeg) Optimization of Deep Neural Networks", ICLR 2023.
"""

from jaxlab.optimizers.fisher_legendre.auxiliary import (
    fishleg_auxiliary_gradient,
    fishleg_auxiliary_loss,
)
from jaxlab.optimizers.fisher_legendre.blocks import describe_blocks
from jaxlab.optimizers.fisher_legendre.factors import (
    Factors,
    InverseFisher,
    q_apply,
    q_dense,
    q_diag,
    q_init,
)
from jaxlab.optimizers.fisher_legendre.fitting import (
    InverseFisherFit,
    fishleg_warm_start,
    inverse_fisher,
)
from jaxlab.optimizers.fisher_legendre.group import fishleg_group_step
from jaxlab.optimizers.fisher_legendre.transform import (
    FishLegState,
    LevenbergMarquardt,
    fishleg,
    scale_by_fishleg,
)

__all__ = [
    "Factors",
    "FishLegState",
    "InverseFisher",
    "InverseFisherFit",
    "LevenbergMarquardt",
    "describe_blocks",
    "fishleg",
    "fishleg_auxiliary_gradient",
    "fishleg_auxiliary_loss",
    "fishleg_group_step",
    "fishleg_warm_start",
    "inverse_fisher",
    "q_apply",
    "q_dense",
    "q_diag",
    "q_init",
    "scale_by_fishleg",
]
