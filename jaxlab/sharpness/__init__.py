"""Sharpness-aware training: gradients that seek flat minima, for any optimizer.

The gradient-norm penalty and its kin, as functions of a gradient function
(``gnp_gradient``), as drop-ins for ``jax.value_and_grad`` (``gnp_value_and_grad``) and
as first links of an optax chain (``gradient_norm_penalty``, ``sam``, ``asam``,
``look_sam``, ``periodic``, ``hybrid``). Beside them, losses that hold the outputs near
earlier ones (SAF, MESA), post-training of a feature extractor (PoF), and lines, curves
and simplexes of networks.
"""

from jaxlab.sharpness._links import static_args
from jaxlab.sharpness.accumulation import (
    full_batch_value_and_grad,
    m_sharpness_value_and_grad,
    micro_batch_value_and_grad,
)
from jaxlab.sharpness.batch_stats import recompute_batch_stats
from jaxlab.sharpness.esam import esam_value_and_grad
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
from jaxlab.sharpness.lora import (
    LoRAPair,
    lora_apply,
    lora_balance,
    lora_init,
    lora_merge,
    project_conflicting,
    regularised_lora_value_and_grad,
)
from jaxlab.sharpness.momentum_sam import (
    MomentumSAM,
    MomentumSAMState,
    momentum_sam_value_and_grad,
)
from jaxlab.sharpness.perturbation import perturb
from jaxlab.sharpness.pof import (
    HeadSearch,
    PofInfo,
    head_line_search,
    join_head,
    pof_perturb,
    pof_value_and_grad,
    split_head,
)
from jaxlab.sharpness.saf import (
    TrajectoryBuffer,
    in_window,
    init_teacher,
    init_trajectory_buffer,
    mesa_loss,
    read_trajectory,
    saf_loss,
    trajectory_loss,
    update_teacher,
    write_trajectory,
)
from jaxlab.sharpness.sometimes import SometimesState, hybrid, periodic
from jaxlab.sharpness.subspaces import (
    bezier_coefficients,
    bezier_point,
    cosine_squared,
    line_coefficients,
    line_point,
    midpoint,
    sample_layerwise,
    sample_simplex,
    simplex_point,
    subspace_init,
    subspace_loss,
)

__all__ = [
    "GradientNormPenaltyState",
    "HeadSearch",
    "LoRAPair",
    "LookSAMState",
    "MomentumSAM",
    "MomentumSAMState",
    "PofInfo",
    "SometimesState",
    "TrajectoryBuffer",
    "asam",
    "bezier_coefficients",
    "bezier_point",
    "cosine_squared",
    "esam_value_and_grad",
    "full_batch_value_and_grad",
    "gnp_gradient",
    "gnp_gradient_exact",
    "gnp_value_and_grad",
    "gradient_norm_penalty",
    "head_line_search",
    "hybrid",
    "in_window",
    "init_teacher",
    "init_trajectory_buffer",
    "join_head",
    "line_coefficients",
    "line_point",
    "look_sam",
    "lora_apply",
    "lora_balance",
    "lora_init",
    "lora_merge",
    "m_sharpness_value_and_grad",
    "mesa_loss",
    "micro_batch_value_and_grad",
    "midpoint",
    "momentum_sam_value_and_grad",
    "periodic",
    "perturb",
    "pof_perturb",
    "pof_value_and_grad",
    "project_conflicting",
    "read_trajectory",
    "recompute_batch_stats",
    "regularised_lora_value_and_grad",
    "saf_loss",
    "sam",
    "sample_layerwise",
    "sample_simplex",
    "simplex_point",
    "split_head",
    "static_args",
    "subspace_init",
    "subspace_loss",
    "trajectory_loss",
    "update_teacher",
    "write_trajectory",
]
