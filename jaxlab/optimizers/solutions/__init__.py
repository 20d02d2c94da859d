"""What an optimizer changes besides speed: measures of the solutions it finds.

Two runs that end at one training loss may differ in what they learned. Compare them
there (``train_to_loss`` stops at a loss, not at a step), with the same initial values
and the same order of the data.

    features     with singular values s_i and p_i = s_i / sum s: effective rank
                 exp(-sum p_i ln p_i), stable rank sum s_i^2 / s_1^2, participation
                 ratio (sum l_i)^2 / sum l_i^2 of the covariance's eigenvalues l;
                 overlap |V_a^T V_b|^2 / k of the top k right singular vectors; linear
                 CKA; mean cosine between the mean features of classes; dead units
    weights      Hoyer's (sqrt n - |w|_1 / |w|_2) / (sqrt n - 1); near-zero fraction
    functions    disagreement of predictions; the barrier of the loss on the segment
                 between two solutions, max_t L(w_t) - (1 - t) L(w_0) - t L(w_1),
                 before and after the hidden units are matched
    tasks        a matrix of accuracies, its average and its forgetting

Ranks and overlaps depend on whether the means of the features are taken out: ``center``
says so. For sharpness :mod:`jaxlab.curvature` has ``top_eigenpairs`` and ``trace`` of
``hessian_operator``, and of its ``preconditioned_operator``, whose largest eigenvalue
bounds the learning rate of adaptive methods.

An optimizer may also be made for a property. With w = v |v|^(a - 1), a >= 1, gradient
descent on v prefers sparse w. To first order in the learning rate it is descent on w
with the gradient scaled by

    (dw / dv)^2 = a^2 |w|^(2 (a - 1) / a),

which :func:`scale_by_power` does.

Of the paper the abstract was read, and summaries of its experiments; neither its code
nor its numbers. The identity above is derived here. The ranks and Hoyer's measure are
recalled from the literature.
References: Pascanu, Lyle, Modoranu, Elosegui Borras, Alistarh, Velickovic, Chandar, De
and Martens, "Optimizers Qualitatively Alter Solutions And We Should Leverage This",
2025; Roy and Vetterli, "The Effective Rank", EUSIPCO 2007; Kornblith et al.,
"Similarity of Neural Network Representations Revisited", ICML 2019; Schwarz et al.,
"Powerpropagation: A Sparsity Inducing Weight Reparameterisation", NeurIPS 2021.
"""

from jaxlab.optimizers.solutions.continual import (
    ContinualRun,
    average_accuracy,
    continual_run,
    forgetting,
)
from jaxlab.optimizers.solutions.features import (
    class_similarity,
    dead_fraction,
    effective_rank,
    feature_overlap,
    linear_cka,
    match_units,
    participation_ratio,
    stable_rank,
)
from jaxlab.optimizers.solutions.functions import (
    LossPath,
    hoyer_sparsity,
    interpolation_barrier,
    near_zero_fraction,
    prediction_disagreement,
)
from jaxlab.optimizers.solutions.power import powerprop, powerprop_init, scale_by_power
from jaxlab.optimizers.solutions.stopping import TrainedToLoss, train_to_loss

__all__ = [
    "ContinualRun",
    "LossPath",
    "TrainedToLoss",
    "average_accuracy",
    "class_similarity",
    "continual_run",
    "dead_fraction",
    "effective_rank",
    "feature_overlap",
    "forgetting",
    "hoyer_sparsity",
    "interpolation_barrier",
    "linear_cka",
    "match_units",
    "near_zero_fraction",
    "participation_ratio",
    "powerprop",
    "powerprop_init",
    "prediction_disagreement",
    "scale_by_power",
    "stable_rank",
    "train_to_loss",
]
