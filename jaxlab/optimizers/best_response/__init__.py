"""Self-tuning networks: regularisation is tuned while the network trains.

With u the unbounded hyperparameters and w_phi(u) weights that approximate the best
response w*(u) = argmin_w L_train(w, u) near the current u, two steps alternate:

    phi:     min E[L_train(w_phi(u + s eps), u + s eps)]           on a training batch
    u, rho:  min E[L_val(w_phi(u + s eps))] - tau sum_j ln(s_j sqrt(2 pi e))

with eps ~ N(0, 1), one for each EXAMPLE, and s = softplus(rho) (L_val has no
regulariser). L_train is never differentiated in u, which may be a dropout rate or a
discrete one. The second expectation is taken only where s is tuned; else u is fed.
Noise too small tells w_phi nothing of its slope, too large is more than it can fit.

Each layer is affine in u, with one gate for each output unit or channel,

    y = c (x W + b) + (u U_w) * (x V) + (u U_b) * b_V,

that is, weights c W + (u U_w) * V: exact for the ridge penalty of a linear network with
one hidden layer in the directions of the data, where the gate is a sigmoid of
2 ln(singular value) - ln(penalty), and only locally here (the theorem's form is
recalled, not checked; that the ridge factor is this sigmoid is an identity).

Departures from the authors' code: one layout for both layers, kernels (*window, in,
out); a discrete value starts in the middle of its interval, so that noise of either
sign moves it alike, and never reaches its upper end; the inverse of softplus does not
overflow. Their embedding and LSTM cells, gated by column and by gate row, are not here
(two :func:`gated_linear` of four times the width make such a cell).

The same layers as modules are ``SelfTuningLinear`` and ``SelfTuningConv`` of
``jaxlab.layers``.
Reference: MacKay, Vicol, Lorraine, Duvenaud, Grosse, "Self-Tuning Networks: Bilevel
Optimization of Hyperparameters using Structured Best-Response Functions", ICLR 2019.
"""

from jaxlab.optimizers.best_response.gates import (
    GatedParams,
    gated_conv,
    gated_linear,
    gated_weights,
    init_gated,
)
from jaxlab.optimizers.best_response.gradients import (
    best_response_error,
    hyperparameter_gradient,
    response_gradient,
)
from jaxlab.optimizers.best_response.hyperparameters import (
    Hyperparameter,
    constrain,
    perturb_hyperparameters,
    perturbation_entropy,
    unconstrain,
)
from jaxlab.optimizers.best_response.steps import (
    SelfTuning,
    SelfTuningMetrics,
    SelfTuningState,
    self_tuning,
)

__all__ = [
    "GatedParams",
    "Hyperparameter",
    "SelfTuning",
    "SelfTuningMetrics",
    "SelfTuningState",
    "best_response_error",
    "constrain",
    "gated_conv",
    "gated_linear",
    "gated_weights",
    "hyperparameter_gradient",
    "init_gated",
    "perturb_hyperparameters",
    "perturbation_entropy",
    "response_gradient",
    "self_tuning",
    "unconstrain",
]
