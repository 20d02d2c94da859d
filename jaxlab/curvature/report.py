"""One call that looks at a model's curvature: eigenpairs, density, trace, determinant.

Two runs give all of it for A, a Hessian or a Gauss-Newton matrix G. Restarted Lanczos
finds the top eigenpairs (theta_i, q_i). Gauss rules from a few random probes v give the
density, and from the same rules come sums tr f(A) = E s(v): the trace for f(t) = t, the
log-determinant of G + d I for f(t) = log(t + d). What is known of the top of the
spectrum takes much of the chance out of them and costs no product:

    s'(v) = s(v) + sum_i (f(theta_i) - c) (1 - (q_i . v)^2),   c the mean of f(lambda),

has the same mean, whatever theta and q are, since they do not depend on the probes and
E (q . v)^2 = |q|^2 = 1. (c comes from the probes, which adds a bias of some 2 sum_i
|f(theta_i)| / (p num_probes) for p parameters.) It pays where a few eigenvalues stand
apart; for matrices that are diagonal or nearly so :func:`trace` has the smaller error.
References: Ghorbani, Krishnan, Xiao, "An Investigation into Neural Net Optimization via
Hessian Eigenvalue Density", ICML 2019; Gambhir, Stathopoulos, Orginos, "Deflation as a
Method of Variance Reduction for Estimating the Trace of a Matrix Inverse", SISC 2017.
"""

import dataclasses
import functools
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from jaxlab._checks import check_number
from jaxlab.curvature._batches import as_arrays, check_microbatch
from jaxlab.curvature._convolutions import driven
from jaxlab.curvature._functions import functions_of
from jaxlab.curvature._options import Driver, as_pytree, under_trace
from jaxlab.curvature._quadrature import gauss_rules, mean_and_error
from jaxlab.curvature._slopes import loss_and_norm
from jaxlab.curvature._thick_restart import Which
from jaxlab.curvature._vectors import (
    Operator,
    Space,
    is_traced,
    random_vector,
    space_of,
)
from jaxlab.curvature.density import Density, Scale, spectral_density
from jaxlab.curvature.eigenpairs import Eigenpairs, split_outliers, top_eigenpairs
from jaxlab.curvature.gauss_newton import ggn_operator
from jaxlab.curvature.hessian import hessian_operator
from jaxlab.objective import Objective

Matrix = Literal["hessian", "ggn"]
Scalar = Float[Array, ""]

_NAME = "spectrum_report"
_TITLES = {"hessian": "Hessian", "ggn": "Gauss-Newton matrix"}


class Products(NamedTuple):
    """Counts the products that a report has spent, part by part.

    Attributes:
      eigenpairs: with the matrix, for the top eigenpairs.
      quadrature: with the matrix, for the density and the trace.
      log_determinant: with the Gauss-Newton matrix; 0 if the report is on that matrix,
        whose log-determinant costs nothing more, or has none.

    Examples:
      >>> sum(Products(20, 256, 256))
      532
    """

    eigenpairs: Int[Array, ""]
    quadrature: Int[Array, ""]
    log_determinant: Int[Array, ""]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class SpectrumReport:
    """Holds what :func:`spectrum_report` found; a pytree of arrays.

    ``print(report)`` shows :meth:`summary`.

    Attributes:
      loss: of the data.
      gradient_norm: Euclidean norm of its gradient in the parameters.
      eigenpairs: values, vectors, residuals and products of the top pairs.
      density: of all eigenvalues; :func:`plot_density` draws it.
      trace: estimate.
      trace_error: its standard error, from the spread of the probes; NaN for one.
      log_determinant: estimate of ``log det(G + damping I)``, G the Gauss-Newton
        matrix; ``None`` without damping.
      log_determinant_error: its standard error; it does not hold the error of the
        quadrature, which falls with the order.
      damping: number added to every eigenvalue of G, or ``None``.
      products: spent, part by part.
      matrix: "hessian" or "ggn"; static.
      dimension: number p of parameters; static.

    Examples:
      >>> from jaxlab.likelihoods import Gaussian
      >>> from jaxlab.objective import plain
      >>> objective = Objective(plain(lambda w, x: x @ w), Gaussian())
      >>> w, data = jnp.ones((2, 1)), (2 * jnp.eye(2), jnp.ones((2, 1)))
      >>> spectrum_report(jax.random.key(0), objective, w, data, k=1)
      SpectrumReport(matrix='hessian', dimension=2)
    """

    loss: Scalar
    gradient_norm: Scalar
    eigenpairs: Eigenpairs
    density: Density
    trace: Scalar
    trace_error: Scalar
    log_determinant: Scalar | None
    log_determinant_error: Scalar | None
    damping: Scalar | None
    products: Products
    matrix: Matrix = dataclasses.field(metadata={"static": True})
    dimension: int = dataclasses.field(metadata={"static": True})

    @property
    def num_products(self) -> Int[Array, ""]:
        """Counts the products spent in all; loss and gradient cost one gradient."""
        return sum(self.products[1:], start=self.products[0])

    @property
    def outliers(self) -> Bool[Array, " k"]:
        """Tells which of the top values stand apart, see :func:`split_outliers`."""
        pairs = self.eigenpairs
        return split_outliers(pairs.values, pairs.residuals, self.density)

    def summary(self) -> str:
        """Writes a short table; call it outside jit.

        Raises:
          ValueError: if the report holds tracers.
        """
        if is_traced(self):
            raise ValueError(
                "SpectrumReport.summary: its values are not known inside jit; return "
                "the report and print it outside."
            )
        pairs, rules = self.eigenpairs, self.density
        probes, order = rules.nodes.shape
        low, high = float(jnp.min(rules.nodes)), float(jnp.max(rules.nodes))
        products = [int(count) for count in self.products]
        parts = ["eigenpairs", "density and trace", "log-determinant"]
        spent = [f"{n} {part}" for n, part in zip(products, parts, strict=True) if n]
        rows = [
            ("loss", f"{float(self.loss):.6g}"),
            ("gradient norm", f"{float(self.gradient_norm):.6g}"),
            ("trace", _with_error(self.trace, self.trace_error)),
        ]
        if self.log_determinant is not None:
            label = f"log det(G + {float(self.damping):.3g} I)"
            value = _with_error(self.log_determinant, self.log_determinant_error)
            rows.append((label, value))
        rows += [
            ("density", f"{probes} x order {order}, nodes {low:.4g} to {high:.4g}"),
            ("products", f"{sum(products)} ({', '.join(spent)})"),
            ("eigenvalues", "+/- residual"),
        ]
        found = zip(pairs.values, pairs.residuals, self.outliers, strict=True)
        for place, (value, residual, apart) in enumerate(found, start=1):
            note = "  outlier" if apart else ""
            rows.append((f"  {place}", _with_error(value, residual) + note))
        width = max(len(label) for label, _ in rows)
        head = f"{_TITLES[self.matrix]}, {self.dimension:,} parameters"
        return "\n".join([head, *(f"{a:<{width}}  {b}" for a, b in rows)])

    def __str__(self) -> str:
        """Shows :meth:`summary`."""
        return self.summary()

    def __repr__(self) -> str:
        """Says what it is; the arrays may be tracers."""
        return f"SpectrumReport(matrix={self.matrix!r}, dimension={self.dimension})"


def spectrum_report(
    key: Key[Array, ""],
    objective: Objective,
    params: PyTree,
    data: Any,
    *,
    state: PyTree = (),
    matrix: Matrix = "hessian",
    k: int = 10,
    which: Which = "largest",
    tol: ArrayLike = 1e-3,
    max_products: int | None = None,
    start: PyTree | None = None,
    order: int = 64,
    num_probes: int = 4,
    sigma: ArrayLike | None = None,
    scale: Scale = "linear",
    damping: ArrayLike | None = 1e-2,
    microbatch: int | None = None,
    reorthogonalize: Literal["full", "none"] = "full",
    memory_limit: float | None = None,
    probes_at_once: int = 1,
    check_symmetric: bool = True,
    driver: Driver = "auto",
) -> SpectrumReport:
    """Reports on the curvature of a model's loss on some data.

    It spends some products on the top eigenpairs, ``num_probes * order`` on density and
    trace, and with ``matrix="hessian"`` as many with the Gauss-Newton matrix on the
    log-determinant, which an indefinite Hessian does not have; ``damping=None`` leaves
    that out, and with ``matrix="ggn"`` it costs nothing more. Loss and gradient cost
    one gradient. The model runs with ``train=False``.

    It works under jit unless ``data`` is a callable: only the checks that look at
    values are then left out, and :meth:`SpectrumReport.summary` waits for the result.
    Called outside jit it compiles its parts, and does not compile again for parameters,
    a state or data of the same shapes.

    Args:
      key: of the random vectors.
      objective: model and likelihood; :func:`plain` adapts ``(params, inputs) ->
        outputs``.
      params: where the curvature is taken; a tree of real arrays.
      data: a batch ``(inputs, targets)`` or ``(inputs, targets, weights)``, a list of
        batches, or a callable that returns an iterable of batches anew for each
        product, as in :func:`hessian_operator`. They may lie on many devices.
      state: what the model keeps besides the parameters (BatchNorm statistics).
      matrix: "hessian" or "ggn", of which eigenpairs, density and trace are.
      k: eigenpairs; above the number p of parameters it is cut to p.
      which: "largest", "smallest" or "both", as in :func:`top_eigenpairs`.
      tol: largest residual over largest ``|theta|``.
      max_products: for the eigenpairs, as in :func:`top_eigenpairs`.
      start: earlier vectors, ``report.eigenpairs.vectors``, as in
        :func:`top_eigenpairs`.
      order: Lanczos steps from each probe; above p it is cut to p.
      num_probes: random probes. A standard error needs two, and is itself known to one
        part in sqrt(2 num_probes) only.
      sigma: width of the density's Gaussian, as in :func:`spectral_density`.
      scale: of the density, "linear" or "log".
      damping: positive, in the units of the eigenvalues. Where the Gauss-Newton matrix
        has many eigenvalues near it, the log-determinant needs a higher order the
        smaller it is.
      microbatch: rows that are differentiated at once.
      reorthogonalize: "full" keeps ``order`` vectors like ``params``; "none" keeps
        none, and outliers come as ghosts in the density. The eigenpairs keep theirs,
        see ``memory_limit``.
      memory_limit: bytes of either basis; ``None`` means 1 GiB.
      probes_at_once: probes that share a product through ``vmap``.
      check_symmetric: as in :func:`lanczos`.
      driver: as in :func:`lanczos`.

    Returns:
      A :class:`SpectrumReport`.

    Raises:
      ValueError: for an option out of range, no objective, or as
        :func:`hessian_operator`, :func:`top_eigenpairs` and :func:`spectral_density`
        do.

    Examples:
      >>> from jaxlab.likelihoods import Gaussian
      >>> from jaxlab.objective import plain
      >>> objective = Objective(plain(lambda w, x: x @ w), Gaussian())
      >>> x = jnp.sqrt(3) * jnp.diag(jnp.array([4.0, 2.0, 1.0]))
      >>> w, data = jnp.zeros((3, 1)), (x, jnp.zeros((3, 1)))
      >>> report = spectrum_report(jax.random.key(0), objective, w, data, k=2)
      >>> report.eigenpairs.values.round(4), report.trace.round(4)
      (Array([16.,  4.], dtype=float32), Array(21., dtype=float32))
      >>> print(report.summary().splitlines()[0])
      Hessian, 3 parameters
    """
    _check(objective, matrix, damping, reorthogonalize)
    params, state = as_arrays(params), as_arrays(state)
    space = space_of(_NAME, params, "params")
    check_microbatch(_NAME, microbatch)
    loss_fn, apply_fn = functions_of(objective, state=state)
    loss, norm = loss_and_norm(_NAME, loss_fn, params, data, microbatch)

    def operator_of(matrix: Matrix) -> Operator:
        if matrix == "hessian":
            return hessian_operator(loss_fn, params, data, microbatch=microbatch)
        likelihood = objective.likelihood
        return ggn_operator(apply_fn, likelihood, params, data, microbatch=microbatch)

    shared = {"check_symmetric": check_symmetric, "driver": driver}
    shared["memory_limit"] = memory_limit
    rule = {"order": order, "num_probes": num_probes, "probes_at_once": probes_at_once}
    rule |= shared | {"reorthogonalize": reorthogonalize}
    of_pairs, of_rules, of_ggn = jax.random.split(key, 3)
    operator = operator_of(matrix)
    pairs = top_eigenpairs(
        of_pairs,
        operator,
        params,
        k=min(k, space.size) if isinstance(k, int) else k,
        tol=tol,
        which=which,
        start=start,
        max_products=max_products,
        **shared,
    )
    density = spectral_density(
        of_rules, operator, params, sigma=sigma, scale=scale, **rule
    )
    rules = density.nodes, density.weights
    spent = _steps_of(operator, space, density.weights, driver, of_rules, params)
    overlaps = functools.partial(_overlaps, vectors=pairs.vectors, space=space)
    beside = overlaps(jax.random.split(of_rules, num_probes))
    trace, trace_error = _sum(rules, pairs.values, beside, None, space.size)
    products = Products(pairs.num_products, spent, jnp.zeros((), jnp.int32))
    logdet = logdet_error = None
    if damping is not None:
        damping = jnp.asarray(damping, space.dtype)
        if matrix != "ggn":
            operator = operator_of("ggn")
            found = gauss_rules(_NAME, of_ggn, operator, params, **rule)
            rules = found.nodes, found.weights
            spent = _steps_of(operator, space, found.weights, driver, of_ggn, params)
            products = products._replace(log_determinant=spent)
            beside = overlaps(jax.random.split(of_ggn, num_probes))
        logdet, logdet_error = _sum(rules, pairs.values, beside, damping, space.size)
    return SpectrumReport(
        loss=loss,
        gradient_norm=norm,
        eigenpairs=pairs,
        density=density,
        trace=trace,
        trace_error=trace_error,
        log_determinant=logdet,
        log_determinant_error=logdet_error,
        damping=damping,
        products=products,
        matrix=matrix,
        dimension=space.size,
    )


@functools.partial(jax.jit, static_argnames="space")
def _overlaps(
    keys: Key[Array, " num_probes"], *, vectors: PyTree, space: Space
) -> Float[Array, "num_probes k"]:
    """Multiplies the eigenvectors by the probes, which are drawn again."""
    rows = jax.tree.leaves(vectors)

    def one(key):
        # As gauss_rules draws them.
        probe = jax.tree.leaves(
            space.unflatten(random_vector(key, space, "rademacher"))
        )
        flat = lambda row: row.reshape(len(row), -1)
        dots = [
            jnp.matmul(flat(row), v.ravel().astype(row.dtype), precision="highest")
            for row, v in zip(rows, probe, strict=True)
        ]
        return sum(dots[1:], start=dots[0])

    return lax.map(one, keys)


@functools.partial(jax.jit, static_argnames="dimension")
def _sum(
    rules: tuple[Array, Array],
    values: Float[Array, " k"],
    overlaps: Float[Array, "num_probes k"],
    damping: Scalar | None,
    dimension: int,
) -> tuple[Scalar, Scalar]:
    """Sums t, or log(t + damping), over the spectrum; see the module's docstring."""
    nodes, weights = rules

    def function(t):
        return t if damping is None else jnp.log(jnp.maximum(t, 0) + damping)

    plain = jnp.sum(jnp.where(weights > 0, weights * function(nodes), 0), axis=1)
    above = function(values) - jnp.mean(plain)
    control = jnp.matmul(1 - overlaps**2, above, precision="highest")
    return mean_and_error(dimension * plain + control)


def _steps_of(operator, space, weights, driver, key, params) -> Int[Array, ""]:
    """Counts the products behind Gauss rules."""
    operator = as_pytree(operator)
    traced = under_trace(key, operator, params)
    operator, chosen = driven(_NAME, operator, space, driver, traced=traced)
    if chosen == "compiled":
        return jnp.asarray(weights.size, jnp.int32)
    # The host stops where an invariant subspace ends; what is padded has no weight.
    places = jnp.arange(1, 1 + weights.shape[1], dtype=jnp.int32)
    last = jnp.max(jnp.where(weights > 0, places.reshape(1, -1), 0), axis=1)
    return jnp.sum(last, dtype=jnp.int32)


def _with_error(value: ArrayLike, error: ArrayLike) -> str:
    """Writes a number with as many digits as its error allows, 7 at most."""
    value, error = float(value), float(error)
    if not math.isfinite(error) or not math.isfinite(value):
        return f"{value:.6g} +/- {error:.2g}"
    digits = 7
    if error > 0 and value != 0:
        size = math.floor(math.log10(abs(value))) - math.floor(math.log10(error))
        digits = min(max(size + 2, 1), 7)
    return f"{value:.{digits}g} +/- {error:.2g}"


def _check(objective, matrix, damping, reorthogonalize) -> None:
    if not isinstance(objective, Objective):
        raise ValueError(
            f"{_NAME}: objective must be an Objective(apply_fn, likelihood), such as "
            "Objective(plain(apply_fn), Categorical()) for apply_fn(params, inputs) -> "
            f"outputs; got a {type(objective).__name__}."
        )
    if matrix not in ("hessian", "ggn"):
        raise ValueError(f'{_NAME}: matrix must be "hessian" or "ggn", got {matrix!r}.')
    leaves_out = "; None leaves the log-determinant out"
    check_number(
        _NAME, "finite and > 0", optional=True, hint=leaves_out, damping=damping
    )
    if reorthogonalize not in ("full", "none"):
        raise ValueError(
            f'{_NAME}: reorthogonalize must be "full" or "none", got '
            f"{reorthogonalize!r}."
        )
