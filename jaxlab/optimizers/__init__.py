"""Optimizers beyond the first order, and tools around gradients and their noise.

FishLeg (``fishleg``, ``scale_by_fishleg``) multiplies gradients by an inverse Fisher
that it learns online; ``q_init``, ``q_apply`` and ``inverse_fisher`` use that inverse
by itself.
"""

from jaxlab.optimizers._links import static_args
from jaxlab.optimizers.fisher_legendre import (
    Factors,
    FishLegState,
    InverseFisher,
    InverseFisherFit,
    LevenbergMarquardt,
    describe_blocks,
    fishleg,
    fishleg_auxiliary_gradient,
    fishleg_auxiliary_loss,
    fishleg_group_step,
    fishleg_warm_start,
    inverse_fisher,
    q_apply,
    q_dense,
    q_diag,
    q_init,
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
    "static_args",
]
