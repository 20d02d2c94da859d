"""Optimizers beyond the first order, and tools around gradients and their noise.

FishLeg (``fishleg``, ``scale_by_fishleg``) multiplies gradients by an inverse Fisher
that it learns online; ``q_init``, ``q_apply`` and ``inverse_fisher`` use that inverse
by itself. Gradients with noise that dies away (``annealed_gradient_noise``); how far
those of single examples agree (``gradient_coherence``); means that suppress what few
examples want (``winsorized_gradient``, ``median_of_means_gradient``,
``running_median``).
"""

from jaxlab.optimizers._links import static_args
from jaxlab.optimizers.coherence import (
    Alignment,
    Coherence,
    GradientMoments,
    RunningMedianState,
    coherence_from_moments,
    gradient_alignment,
    gradient_coherence,
    gradient_moments,
    median_of_means,
    median_of_means_gradient,
    per_example_gradients,
    running_median,
    winsorized_gradient,
    winsorized_mean,
)
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
from jaxlab.optimizers.gradient_noise import (
    GradientNoiseState,
    add_gradient_noise,
    annealed_gradient_noise,
    gradient_noise_schedule,
)

__all__ = [
    "Alignment",
    "Coherence",
    "Factors",
    "FishLegState",
    "GradientMoments",
    "GradientNoiseState",
    "InverseFisher",
    "InverseFisherFit",
    "LevenbergMarquardt",
    "RunningMedianState",
    "add_gradient_noise",
    "annealed_gradient_noise",
    "coherence_from_moments",
    "describe_blocks",
    "fishleg",
    "fishleg_auxiliary_gradient",
    "fishleg_auxiliary_loss",
    "fishleg_group_step",
    "fishleg_warm_start",
    "gradient_alignment",
    "gradient_coherence",
    "gradient_moments",
    "gradient_noise_schedule",
    "inverse_fisher",
    "median_of_means",
    "median_of_means_gradient",
    "per_example_gradients",
    "q_apply",
    "q_dense",
    "q_diag",
    "q_init",
    "running_median",
    "scale_by_fishleg",
    "static_args",
    "winsorized_gradient",
    "winsorized_mean",
]
