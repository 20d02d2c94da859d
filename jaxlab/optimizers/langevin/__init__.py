"""Langevin dynamics and the ensembles and mixtures that it stands for.

A class of hypotheses p_theta with prior w predicts as a mixture,

    q(y^n | x^n) = sum over theta of w(theta) prod_i p_theta(y_i | x_i),

whose next prediction is the posterior's average. Its regret, the log-loss (in nats)
beyond that of the best hypothesis or of the truth p*, does not depend on how many
hypotheses there are but on the prior's weight of those near the truth:

    -ln q(y^n) - min over theta of -ln p_theta(y^n)  <=  -ln w(theta)      any data,
    E regret against p*  <=  min over eps of  n eps - ln w(A_eps),
    A_eps = {theta: D(p* || p_theta) <= eps},

the second for n draws from p*, by Jensen's inequality. The average of the n online
predictors has at most 1/n of that bound as its expected divergence from p*.

Networks are sampled rather than enumerated. With n examples, a batch of b, a step h, a
temperature T and a prior,

    theta <- theta - (h / 2) [(n / b) sum over batch of grad l_i - grad ln w] + noise,
    noise ~ N(0, h T I),

which for T = 1 and h falling to 0 samples the posterior. For a normal posterior of
precision K and the full batch the covariance is K^-1 (I - h K / 4)^-1: exact, and
divergent where h exceeds 4 over the largest eigenvalue. Of several samples the
PROBABILITIES are averaged; by Jensen's inequality the log-loss of the average is at
most the average log-loss. A student learns the average by KL(ensemble || student).

Of the paper, the abstract was read: it has the mixture, the weight, SGLD with ensembles
and distillation. The bounds and the covariance above are derived here. The exponent
0.55 of the step size and the constants of the preconditioned form are recalled, not
checked in the texts.
References: Feder, Urbanke and Fogel, "The Universality Lens: Why Even Highly
Over-Parametrized Models Learn Well", 2025; Welling and Teh, "Bayesian Learning via
Stochastic Gradient Langevin Dynamics", ICML 2011; Li, Chen, Carlson and Carin,
"Preconditioned Stochastic Gradient Langevin Dynamics for Deep Neural Networks", AAAI
2016.
"""

from jaxlab.optimizers.langevin.ensembles import (
    EnsembleLoss,
    calibration_error,
    distill_loss,
    ensemble_log_loss,
    ensemble_outputs,
    ensemble_predict,
)
from jaxlab.optimizers.langevin.mixture import (
    Mixture,
    RegretBound,
    log_hypothesis_weight,
    mixture_log_loss,
    regret_bound,
    regret_curve,
)
from jaxlab.optimizers.langevin.sampling import Chain, langevin_sample, sgld_sample
from jaxlab.optimizers.langevin.sgld import (
    PSGLDState,
    SGLDState,
    psgld,
    sgld,
    sgld_step_size,
)

__all__ = [
    "Chain",
    "EnsembleLoss",
    "Mixture",
    "PSGLDState",
    "RegretBound",
    "SGLDState",
    "calibration_error",
    "distill_loss",
    "ensemble_log_loss",
    "ensemble_outputs",
    "ensemble_predict",
    "langevin_sample",
    "log_hypothesis_weight",
    "mixture_log_loss",
    "psgld",
    "regret_bound",
    "regret_curve",
    "sgld",
    "sgld_sample",
    "sgld_step_size",
]
