"""Stochastic estimates of a diagonal, from products alone.

For v with entries of +1 and -1 the vector v * A v (entry by entry) has the mean diag A,
and entry i the variance sum_{j != i} A_ij^2. XDiag takes the part of A in the span of
k images exactly and leaves the rest to chance, with every probe in both roles:

    diag A ~ mean_i diag(P_i A) + w_i * (I - P_i) A w_i,

where P_i projects on the span of all images A w_j but the i-th, see ``_leave_one_out``.
References: Bekas, Kokiopoulou, Saad, "An Estimator for the Diagonal of a Matrix",
Applied Numerical Mathematics 2007; Epperly, Tropp, Webber, "XTrace: Making the Most of
Every Sample in Stochastic Trace Estimation", SIMAX 2024.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree

from jaxlab.curvature._leave_one_out import XDIAG, check_operator
from jaxlab.curvature._options import Driver, exact_products
from jaxlab.curvature._probes import (
    check_bases,
    diagonal_entries,
    mean_of,
    opened,
    run,
    sketch_size,
    vector_of,
)
from jaxlab.curvature._vectors import Operator, Space, on_vectors

DiagonalMethod = Literal["hutchinson", "xdiag"]


def diagonal(
    key: Key[Array, ""],
    operator: Operator,
    like: PyTree,
    *,
    num_matvecs: int,
    method: DiagonalMethod = "hutchinson",
    memory_limit: float | None = None,
    probes_at_once: int = 1,
    check_symmetric: bool = True,
    driver: Driver = "auto",
) -> tuple[PyTree, PyTree]:
    """Estimates the diagonal of an operator, with a standard error for each entry.

    "hutchinson" spends exactly ``num_matvecs`` products and keeps a running mean and
    variance, about 6 vectors like the parameters. "xdiag" spends 2k products with
    k = ``num_matvecs // 2`` and keeps bases of k vectors. If ``num_matvecs`` reaches
    the number p of parameters, it multiplies the p unit vectors instead: the diagonal
    is then exact and its error zero.

    Args:
      key: of the probes, which are Rademacher vectors.
      operator: ``v -> A v`` on trees like ``like``, as in :func:`lanczos`; symmetric
        for "xdiag".
      like: tree with the shapes and dtypes that the operator acts on, p entries.
      num_matvecs: products to spend at most; at least 2 for "xdiag", unless it reaches
        p. An error needs twice that ("hutchinson": 2).
      method: "hutchinson" for matrices whose diagonal dominates, "xdiag" where the
        spectrum decays.
      memory_limit: bytes that the vectors of "xdiag" may take: 5 bases of k, the
        factorisation included; ``None`` means 1 GiB.
      probes_at_once: probes that share a product through ``vmap`` in the compiled
        driver. More than one helps on accelerators and hurts on CPUs.
      check_symmetric: with "xdiag", refuse an operator that comes out asymmetric. It
        costs no product and looks at values, so under jit it is left out.
      driver: as in :func:`lanczos`.

    Returns:
      Two trees like ``like``: the estimate, accumulated in float32 at least, and its
      standard error from the spread of the probes (NaN for a single one).

    Raises:
      ValueError: for an option out of range, vectors above the limit, or as
        :func:`lanczos` does.

    Examples:
      >>> operator = jax.tree_util.Partial(jnp.multiply, jnp.array([1.0, 4.0]))
      >>> diagonal(jax.random.key(0), operator, jnp.ones(2), num_matvecs=2)[0]
      Array([1., 4.], dtype=float32)
    """
    name = "diagonal"
    if method not in ("hutchinson", "xdiag"):
        raise ValueError(
            f'{name}: method must be "hutchinson" or "xdiag", got {method!r}.'
        )
    setting, operator, chosen, traced = opened(
        name, key, operator, like, num_matvecs, probes_at_once, driver
    )
    space = setting.space
    with jax.named_scope(name), exact_products():
        if method == "hutchinson":
            keys = jax.random.split(key, num_matvecs)
            shape = (space.size,)
            result = mean_of(chosen, setting, _product, operator, keys, shape)
        elif num_matvecs >= space.size:
            entries = diagonal_entries(chosen, setting, operator)
            result = entries, jnp.zeros_like(entries)
        else:
            count = sketch_size(name, method, 2, num_matvecs, space)
            check_bases(name, count, space, memory_limit)
            keys = jax.random.split(key, count)
            result, check = run(chosen, setting, XDIAG, operator, keys)
            if check_symmetric and not traced:
                check_operator(name, method, check, space)
    return space.unflatten(result[0]), space.unflatten(result[1])


def _product(
    name: str, operator: Operator, space: Space, source: Array
) -> Float[Array, " p"]:
    probe = vector_of(source, space, "rademacher")
    return probe * on_vectors(name, operator, space)(probe)
