"""Matrix-free curvature: operators, Lanczos, spectra, traces, eigenpairs, bounds.

An *operator* is a callable ``v -> A v`` from a tree like the parameters to the same. It
is a registered pytree itself, so a jitted function of it does not recompile when the
parameters or the data change.
"""

from jaxlab.curvature.dense import full_matrix
from jaxlab.curvature.density import (
    Density,
    density_from_eigenvalues,
    plot_density,
    spectral_density,
)
from jaxlab.curvature.diagonal import diagonal
from jaxlab.curvature.eigenpairs import (
    Eigenpairs,
    bulk_edges,
    split_outliers,
    subspace_overlap,
    top_eigenpairs,
)
from jaxlab.curvature.gauss_newton import fisher_operator, ggn_operator
from jaxlab.curvature.gram_fisher import gram_fisher
from jaxlab.curvature.hessian import hessian_operator, hessian_vector_product
from jaxlab.curvature.lanczos import LanczosResult, lanczos, ritz, ritz_vectors
from jaxlab.curvature.pac_bayes import (
    GibbsError,
    PacBayes,
    PacBayesGrid,
    gaussian_kl_low_rank,
    gibbs_error,
    inverse_kl,
    pac_bayes_analytic,
    pac_bayes_grid,
    pac_bayes_optimize,
    sample_gaussian_low_rank,
)
from jaxlab.curvature.report import Products, SpectrumReport, spectrum_report
from jaxlab.curvature.sloppiness import (
    Sloppiness,
    correlation_spectrum,
    displacement_fraction,
    sloppiness,
    subspace_overlap_curve,
)
from jaxlab.curvature.spectral_sums import logdet, spectral_sum
from jaxlab.curvature.trace import frobenius_norm, trace
from jaxlab.curvature.wrappers import (
    block_operator,
    damped_operator,
    preconditioned_operator,
)

__all__ = [
    "Density",
    "Eigenpairs",
    "GibbsError",
    "LanczosResult",
    "PacBayes",
    "PacBayesGrid",
    "Products",
    "Sloppiness",
    "SpectrumReport",
    "block_operator",
    "bulk_edges",
    "correlation_spectrum",
    "damped_operator",
    "density_from_eigenvalues",
    "diagonal",
    "displacement_fraction",
    "fisher_operator",
    "frobenius_norm",
    "full_matrix",
    "gaussian_kl_low_rank",
    "ggn_operator",
    "gibbs_error",
    "gram_fisher",
    "hessian_operator",
    "hessian_vector_product",
    "inverse_kl",
    "lanczos",
    "logdet",
    "pac_bayes_analytic",
    "pac_bayes_grid",
    "pac_bayes_optimize",
    "plot_density",
    "preconditioned_operator",
    "ritz",
    "ritz_vectors",
    "sample_gaussian_low_rank",
    "sloppiness",
    "spectral_density",
    "spectral_sum",
    "spectrum_report",
    "split_outliers",
    "subspace_overlap",
    "subspace_overlap_curve",
    "top_eigenpairs",
    "trace",
]
