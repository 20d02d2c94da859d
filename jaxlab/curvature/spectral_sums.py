"""Sums over a spectrum by stochastic Lanczos quadrature: log-determinants and others.

For random v with entries of +1 and -1 and the Gauss rule (theta_k, w_k) that Lanczos
makes from it, E sum_k p w_k f(theta_k) approximates tr f(A) = sum_i f(lambda_i), and
equals it where f is a polynomial of degree 2 order - 1 at most.
Reference: Ubaru, Chen, Saad, "Fast Estimation of tr(f(A)) via Stochastic Lanczos
Quadrature", SIAM Journal on Matrix Analysis and Applications 2017.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Key, PyTree

from jaxlab._checks import check_number
from jaxlab.curvature._options import Driver
from jaxlab.curvature._quadrature import gauss_rules, mean_and_error
from jaxlab.curvature._recurrence import Reorthogonalize
from jaxlab.curvature._vectors import Operator

Scalar = Float[Array, ""]


def spectral_sum(
    key: Key[Array, ""],
    operator: Operator,
    like: PyTree,
    function: Callable[[Array], Array],
    *,
    order: int,
    num_probes: int,
    reorthogonalize: Reorthogonalize = "full",
    memory_limit: float | None = None,
    probes_at_once: int = 1,
    check_symmetric: bool = True,
    driver: Driver = "auto",
) -> tuple[Scalar, Scalar]:
    """Estimates ``tr f(A)``, the sum of a function over the eigenvalues.

    It costs ``num_probes * order`` products and the memory of :func:`lanczos` for
    ``probes_at_once`` runs. An order above the number of parameters is cut to it.

    Args:
      key: of the probes, which are Rademacher vectors.
      operator: symmetric, as in :func:`lanczos`.
      like: tree with the shapes and dtypes that the operator acts on.
      function: f, from an array of eigenvalues to one of the same shape; called outside
        the compiled loop, so a new function compiles nothing again.
      order: Lanczos steps from each probe.
      num_probes: random vectors; an error needs two.
      reorthogonalize: as in :func:`lanczos`.
      memory_limit: bytes of the bases, as in :func:`lanczos`.
      probes_at_once: probes that share a product through ``vmap``. More than one helps
        on accelerators and hurts on CPUs.
      check_symmetric: as in :func:`lanczos`.
      driver: as in :func:`lanczos`.

    Returns:
      The estimate and its standard error from the spread of the probes (NaN for a
      single one), which does not hold the error of the quadrature.

    Raises:
      ValueError: if ``function`` changes the shape, for an option out of range, or as
        :func:`lanczos` does.

    Examples:
      >>> operator = jax.tree_util.Partial(jnp.multiply, jnp.array([1.0, 4.0]))
      >>> key, sizes = jax.random.key(0), dict(order=2, num_probes=3)
      >>> spectral_sum(key, operator, jnp.ones(2), jnp.sqrt, **sizes)[0].round(4)
      Array(3., dtype=float32)
    """
    return _sum(
        "spectral_sum",
        key,
        operator,
        like,
        function,
        order=order,
        num_probes=num_probes,
        reorthogonalize=reorthogonalize,
        memory_limit=memory_limit,
        probes_at_once=probes_at_once,
        check_symmetric=check_symmetric,
        driver=driver,
    )


def logdet(
    key: Key[Array, ""],
    operator: Operator,
    like: PyTree,
    *,
    damping: ArrayLike,
    order: int = 64,
    num_probes: int = 8,
    reorthogonalize: Reorthogonalize = "full",
    memory_limit: float | None = None,
    probes_at_once: int = 1,
    check_symmetric: bool = True,
    driver: Driver = "auto",
) -> tuple[Scalar, Scalar]:
    """Estimates ``log det(A + damping I)`` of a positive semi-definite operator.

    Eigenvalues that come out negative count as zero: round-off of a GGN or Fisher
    matrix. For an indefinite Hessian this is not its determinant. Cost as in
    :func:`spectral_sum`.

    Args:
      key: of the probes, which are Rademacher vectors.
      operator: symmetric and positive semi-definite, as in :func:`lanczos`.
      like: tree with the shapes and dtypes that the operator acts on.
      damping: positive number added to every eigenvalue.
      order: Lanczos steps from each probe.
      num_probes: random vectors; an error needs two.
      reorthogonalize: as in :func:`lanczos`.
      memory_limit: bytes of the bases, as in :func:`lanczos`.
      probes_at_once: as in :func:`spectral_sum`.
      check_symmetric: as in :func:`lanczos`.
      driver: as in :func:`lanczos`.

    Returns:
      The estimate and its standard error, as :func:`spectral_sum` does.

    Raises:
      ValueError: if ``damping`` is not positive, or as :func:`spectral_sum` does.

    Examples:
      >>> operator = jax.tree_util.Partial(jnp.multiply, jnp.array([0.0, 3.0]))
      >>> logdet(jax.random.key(0), operator, jnp.ones(2), damping=1.0)[0].round(4)
      Array(1.3863, dtype=float32)
    """
    check_number("logdet", "finite and > 0", damping=damping)
    return _sum(
        "logdet",
        key,
        operator,
        like,
        lambda values: jnp.log(jnp.maximum(values, 0) + damping),
        order=order,
        num_probes=num_probes,
        reorthogonalize=reorthogonalize,
        memory_limit=memory_limit,
        probes_at_once=probes_at_once,
        check_symmetric=check_symmetric,
        driver=driver,
    )


def _sum(name, key, operator, like, function, **options) -> tuple[Scalar, Scalar]:
    rules = gauss_rules(name, key, operator, like, **options)
    values = jnp.asarray(function(rules.nodes))
    if values.shape != rules.nodes.shape:
        raise ValueError(
            f"{name}: function must keep the shape of its argument, "
            f"{rules.nodes.shape}, got {values.shape}."
        )
    # Where a weight is zero the function may be anything.
    terms = jnp.where(rules.weights > 0, rules.weights * values, 0)
    sums = rules.dimension * jnp.sum(terms, axis=1)
    return mean_and_error(sums)
