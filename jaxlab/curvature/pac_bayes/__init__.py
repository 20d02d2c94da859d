"""PAC-Bayes bounds from curvature: closed form, over a grid of priors, optimised.

With n independent examples, a prior P chosen without them and any posterior Q, with
probability 1 - delta over the examples and for all Q at once,

    kl(e_hat || e) <= (KL(Q || P) + ln(n / delta)) / (n - 1)

where e_hat and e are the mean errors, on the examples and in the world, of parameters
drawn from Q, and kl(q || p) = q ln(q/p) + (1-q) ln((1-q)/(1-p)). For n >= 8 this
follows from Maurer's theorem, which has ln(2 sqrt(n) / delta) / n in place of
ln(n / delta) / (n - 1). The right-hand side is 2 gap^2, so that e <= e_hat + gap by
Pinsker's inequality, and e <= inverse_kl(e_hat, 2 gap^2) is never worse.

References: McAllester, "PAC-Bayesian Stochastic Model Selection", Machine Learning
2003; Maurer, "A Note on the PAC-Bayesian Theorem", 2004; Dziugaite, Roy, "Computing
Nonvacuous Generalization Bounds for Deep (Stochastic) Neural Networks with Many More
Parameters than Training Data", UAI 2017; Yang, Mao, Chaudhari, "Does the Data Induce
Capacity Control in Deep Learning?", ICML 2022.
"""

from jaxlab.curvature.pac_bayes.analytic import (
    GibbsError,
    PacBayes,
    gibbs_error,
    pac_bayes_analytic,
)
from jaxlab.curvature.pac_bayes.gaussians import (
    gaussian_kl_low_rank,
    sample_gaussian_low_rank,
)
from jaxlab.curvature.pac_bayes.grid import PacBayesGrid, pac_bayes_grid
from jaxlab.curvature.pac_bayes.inverse_kl import inverse_kl
from jaxlab.curvature.pac_bayes.optimize import pac_bayes_optimize

__all__ = [
    "GibbsError",
    "PacBayes",
    "PacBayesGrid",
    "gaussian_kl_low_rank",
    "gibbs_error",
    "inverse_kl",
    "pac_bayes_analytic",
    "pac_bayes_grid",
    "pac_bayes_optimize",
    "sample_gaussian_low_rank",
]
