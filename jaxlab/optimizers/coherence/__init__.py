"""How far the gradients of single examples agree, and means that heed the many.

With g_1 .. g_m the gradients of m examples,

    alpha = ||mean g||^2 / mean ||g||^2   in [0, 1],     m-coherence = m alpha.

To first order a step along g_j changes the losses of all by alpha times what it changes
that of j, on average over j; m-coherence reads as how many of the m examples it helps.
Orthogonal gradients of equal norm give 1, equal ones m, those that cancel 0. The
unbiased form leaves out the pairs of an example with itself,

    alpha' = (||sum g||^2 - sum ||g||^2) / (m (m - 1)) / mean ||g||^2,
    alpha  = alpha' (m - 1) / m + 1 / m,

and may be negative. The alpha of several layers together is the mean of theirs, by
their shares of mean ||g||^2. Only sum g and sum ||g||^2 are needed, so a pass over
micro-batches does.

Coordinatewise means that suppress what few examples want: winsorized (the k lowest
values become the next one, likewise the highest), the median of means of groups (M3
with three), and the running median of the last gradients (RM3). A median of skewed
gradients is smaller than their mean: tune the rate again.

The meaning of m-coherence, its value 1 for examples fitted independently, M3 and RM3
are from the abstracts; the formula of alpha and winsorized SGD are recalled, not
checked in the texts; the relation of the two forms and that of layers are derived here.
References: Chatterjee and Zielinski, "On the Generalization Mystery in Deep Learning",
2022 (alpha, m-coherence); Chatterjee, "Coherent Gradients", ICLR 2020 (winsorized);
Zielinski, Krishnan and Chatterjee, "Weak and Strong Gradient Directions", 2020 (M3 and
RM3).
"""

from jaxlab.optimizers.coherence.examples import per_example_gradients
from jaxlab.optimizers.coherence.metrics import (
    Alignment,
    Coherence,
    GradientMoments,
    coherence_from_moments,
    gradient_alignment,
    gradient_coherence,
    gradient_moments,
)
from jaxlab.optimizers.coherence.robust import (
    RunningMedianState,
    median_of_means,
    median_of_means_gradient,
    running_median,
    winsorized_gradient,
    winsorized_mean,
)

__all__ = [
    "Alignment",
    "Coherence",
    "GradientMoments",
    "RunningMedianState",
    "coherence_from_moments",
    "gradient_alignment",
    "gradient_coherence",
    "gradient_moments",
    "median_of_means",
    "median_of_means_gradient",
    "per_example_gradients",
    "running_median",
    "winsorized_gradient",
    "winsorized_mean",
]
