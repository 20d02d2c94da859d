"""Stochastic estimates of a trace and of a Frobenius norm, from products alone.

For a random v with E v v^T = I the form v . A v has the mean tr A. Its variance, for
entries of +1 and -1, is 2 (|A|_F^2 - sum_i A_ii^2): good for flat spectra, poor where a
few eigenvalues dominate. There a part of A is taken exactly, by a sketch: with an
orthonormal basis Q of the span of A S,

    tr A = tr Q^T A Q + tr (I - Q Q^T) A (I - Q Q^T),

and only the second trace is left to chance (Hutch++). XTrace and XNysTrace let every
probe serve both for the sketch and for the rest, see ``_leave_one_out``.
References: Hutchinson, "A Stochastic Estimator of the Trace of the Influence Matrix for
Laplacian Smoothing Splines", Communications in Statistics 1990; Meyer, Musco, Musco,
Woodruff, "Hutch++: Optimal Stochastic Trace Estimation", SOSA 2021; Epperly, Tropp,
Webber, "XTrace: Making the Most of Every Sample in Stochastic Trace Estimation", SIMAX
2024.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree

from jaxlab.curvature._leave_one_out import (
    XNYSTRACE,
    XTRACE,
    check_operator,
    is_semidefinite,
)
from jaxlab.curvature._options import Driver, exact_products
from jaxlab.curvature._probes import (
    Method,
    Rows,
    State,
    check_bases,
    diagonal_entries,
    matmul,
    mean_of,
    opened,
    orthonormal,
    rows_of,
    run,
    sketch_size,
    vector_of,
)
from jaxlab.curvature._quadrature import mean_and_error
from jaxlab.curvature._vectors import Operator, Space, on_vectors

TraceMethod = Literal["hutchinson", "hutch++", "xtrace", "xnystrace"]
Scalar = Float[Array, ""]

# Products for each vector of the sketch.
_COSTS = {"hutch++": 3, "xtrace": 2, "xnystrace": 1}


def trace(
    key: Key[Array, ""],
    operator: Operator,
    like: PyTree,
    *,
    num_matvecs: int,
    method: TraceMethod = "hutchinson",
    memory_limit: float | None = None,
    probes_at_once: int = 1,
    check_symmetric: bool = True,
    driver: Driver = "auto",
) -> tuple[Scalar, Scalar]:
    """Estimates the trace of an operator, with a standard error.

    Every method but "xnystrace" is unbiased for any square A. "hutchinson" spends
    exactly ``num_matvecs`` products and keeps nothing. The others keep k vectors like
    the parameters: "xtrace" spends 2k with k = ``num_matvecs // 2``, "hutch++" 3k with
    k = ``num_matvecs // 3``, "xnystrace" k = ``num_matvecs``. If ``num_matvecs``
    reaches the number p of parameters, those three multiply the p unit vectors
    instead: the trace is then exact, its error zero and nothing is kept.

    Args:
      key: of the probes: Rademacher vectors for "hutchinson" and "hutch++", normal ones
        for the others.
      operator: ``v -> A v`` on trees like ``like``, as in :func:`lanczos`. With
        "hutchinson" its ``quadratic_form`` is used where it has one.
      like: tree with the shapes and dtypes that the operator acts on, p entries.
      num_matvecs: products to spend at most; at least 2 for "xtrace" and 3 for
        "hutch++", unless it reaches p. An error needs twice that ("hutchinson" and
        "xnystrace": 2).
      method: "hutchinson" averages quadratic forms, for flat spectra; the others gain
        where the spectrum decays. "xtrace" is the best of them that takes any A;
        "xnystrace" needs A symmetric and positive semi-definite (a GGN or a Fisher
        matrix) and is better still.
      memory_limit: bytes that the vectors may take: 5 bases of k, the factorisation
        included; ``None`` means 1 GiB.
      probes_at_once: probes that share a product through ``vmap`` in the compiled
        driver. More than one helps on accelerators and hurts on CPUs.
      check_symmetric: with "xnystrace", refuse an operator that comes out asymmetric or
        indefinite. It costs no product; under jit, where values cannot be looked at,
        the estimate becomes NaN instead.
      driver: as in :func:`lanczos`.

    Returns:
      The estimate and its standard error from the spread of the probes (NaN for a
      single one). For "xtrace" and "xnystrace" it takes their k terms for independent:
      on spectra that decay it was 0.7 to 1.1 of the true spread for "xtrace", and for
      "xnystrace" 0.8 at k = 6 and 0.3 to 0.6 at k = 48.

    Raises:
      ValueError: for an option out of range, vectors above the limit, an operator that
        "xnystrace" cannot take, or as :func:`lanczos` does.

    Examples:
      >>> operator = jax.tree_util.Partial(jnp.multiply, jnp.array([1.0, 4.0, 2.0]))
      >>> trace(jax.random.key(0), operator, jnp.ones(3), num_matvecs=2)
      (Array(7., dtype=float32), Array(0., dtype=float32))
    """
    name = "trace"
    if method != "hutchinson" and method not in tuple(_COSTS):
        raise ValueError(
            f'{name}: method must be "hutchinson", "hutch++", "xtrace" or "xnystrace", '
            f"got {method!r}."
        )
    setting, operator, chosen, traced = opened(
        name, key, operator, like, num_matvecs, probes_at_once, driver
    )
    space = setting.space
    with jax.named_scope(name), exact_products():
        if method == "hutchinson":
            keys = jax.random.split(key, num_matvecs)
            return mean_of(chosen, setting, _form, operator, keys)
        if num_matvecs >= space.size:
            total = jnp.sum(diagonal_entries(chosen, setting, operator))
            return total, jnp.zeros_like(total)
        count = sketch_size(name, method, _COSTS[method], num_matvecs, space)
        check_bases(name, count, space, memory_limit)
        draws = 2 * count if method == "hutch++" else count
        keys = jax.random.split(key, draws)
        found = run(chosen, setting, _METHODS[method], operator, keys)
        if method == "hutch++":
            return found
        if method == "xtrace":
            return mean_and_error(found)
        terms, check = found
        if check_symmetric:
            if traced:
                good = is_semidefinite(check, space)
                terms = jnp.where(good, terms, jnp.nan)
            else:
                check_operator(name, method, check, space)
        return mean_and_error(terms)


def frobenius_norm(
    key: Key[Array, ""],
    operator: Operator,
    like: PyTree,
    *,
    num_matvecs: int,
    probes_at_once: int = 1,
    driver: Driver = "auto",
) -> tuple[Scalar, Scalar]:
    """Estimates the Frobenius norm, the root of the sum of squared eigenvalues.

    For random v with E v v^T = I the mean of ``|A v|^2`` is ``|A|_F^2``, for any square
    A. The mean over ``num_matvecs`` probes is unbiased for the square; its root is low
    by about ``standard_error^2 / (2 estimate)``.

    Args:
      key: of the probes, which are Rademacher vectors.
      operator: ``v -> A v`` on trees like ``like``, as in :func:`lanczos`.
      like: tree with the shapes and dtypes that the operator acts on.
      num_matvecs: products, exactly; an error needs two.
      probes_at_once: as in :func:`trace`.
      driver: as in :func:`lanczos`.

    Returns:
      The estimate and its standard error to first order, from the spread of the probes
      (NaN for a single one).

    Raises:
      ValueError: for an option out of range, or as :func:`lanczos` does.

    Examples:
      >>> operator = jax.tree_util.Partial(jnp.multiply, jnp.array([3.0, 4.0]))
      >>> frobenius_norm(jax.random.key(0), operator, jnp.ones(2), num_matvecs=2)
      (Array(5., dtype=float32), Array(0., dtype=float32))
    """
    name = "frobenius_norm"
    setting, operator, chosen, _ = opened(
        name, key, operator, like, num_matvecs, probes_at_once, driver
    )
    with jax.named_scope(name), exact_products():
        keys = jax.random.split(key, num_matvecs)
        square, error = mean_of(chosen, setting, _square, operator, keys)
        root = jnp.sqrt(square)
        return root, error / jnp.where(root == 0, 1, 2 * root)


def _form(name: str, operator: Operator, space: Space, source: Array) -> Scalar:
    probe = vector_of(source, space, "rademacher")
    form = getattr(operator, "quadratic_form", None)
    if form is None:
        return matmul(probe, on_vectors(name, operator, space)(probe))
    value = jnp.asarray(form(space.unflatten(probe)))
    if value.shape:
        raise ValueError(
            f"{name}: quadratic_form must give a scalar, got shape {value.shape}."
        )
    return value.astype(space.dtype)


def _square(name: str, operator: Operator, space: Space, source: Array) -> Scalar:
    probe = vector_of(source, space, "rademacher")
    image = on_vectors(name, operator, space)(probe)
    return matmul(image, image)


def _sketch(sources: Array, space: Space) -> State:
    draw = lambda source: vector_of(source, space, "rademacher")
    rows = rows_of(draw, sources[: len(sources) // 2])
    return State(rows, jnp.zeros((), space.dtype))


def _basis(sources: Array, space: Space, state: State, images: Rows) -> State:
    return State(orthonormal(images)[0], state.extra)


def _rest(sources: Array, space: Space, state: State, images: Rows) -> State:
    q, captured = state.rows, jnp.sum(state.rows * images)

    def outside(source):
        probe = vector_of(source, space, "rademacher")
        return probe - matmul(matmul(q, probe), q)

    return State(rows_of(outside, sources[len(sources) // 2 :]), captured)


def _sum(sources: Array, space: Space, state: State, images: Rows):
    rest, error = mean_and_error(jnp.sum(state.rows * images, axis=1))
    return state.extra + rest, error


_METHODS = {
    "hutch++": Method(_sketch, (_basis, _rest), _sum),
    "xtrace": XTRACE,
    "xnystrace": XNYSTRACE,
}
