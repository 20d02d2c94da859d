"""Sharpness-aware training: gradients that seek flat minima, for any optimizer.

The gradient-norm penalty and its kin, as functions of a gradient function
(``gnp_gradient``), as drop-ins for ``jax.value_and_grad`` (``gnp_value_and_grad``) and
as first links of an optax chain (``gradient_norm_penalty``, ``sam``, ``asam``,
``look_sam``, ``periodic``, ``hybrid``).
"""

from jaxlab.sharpness.gradient_norm_penalty import (
    GradientNormPenaltyState,
    asam,
    gnp_gradient,
    gnp_gradient_exact,
    gnp_value_and_grad,
    gradient_norm_penalty,
    sam,
)
from jaxlab.sharpness.look_sam import LookSAMState, look_sam
from jaxlab.sharpness.perturbation import perturb
from jaxlab.sharpness.sometimes import SometimesState, hybrid, periodic

__all__ = [
    "GradientNormPenaltyState",
    "LookSAMState",
    "SometimesState",
    "asam",
    "gnp_gradient",
    "gnp_gradient_exact",
    "gnp_value_and_grad",
    "gradient_norm_penalty",
    "hybrid",
    "look_sam",
    "periodic",
    "perturb",
    "sam",
]
