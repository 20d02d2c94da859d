"""The matrix of an operator, written out: an oracle for small problems."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, PyTree

from jaxlab.curvature._options import (
    as_pytree,
    chosen_driver,
    exact_products,
    under_trace,
)
from jaxlab.curvature._recurrence import linearized
from jaxlab.curvature._vectors import (
    Operator,
    Space,
    is_host,
    on_vectors,
    prepared,
    space_of,
)

_LIMIT = 5_000
_NAME = "full_matrix"


def full_matrix(
    operator: Operator, like: PyTree, *, force: bool = False
) -> Float[Array, "p p"]:
    """Writes out the matrix of an operator, from one product for each column.

    Args:
      operator: linear, as in :func:`lanczos`.
      like: tree with the shapes and dtypes that it acts on, p entries in all; with
        ``optax.MaskedNode`` for a block.
      force: allow p above 5,000. The matrix then takes more than 100 MB in float32.

    Returns:
      Column j is A e_j, in the order of the leaves of ``like``; float32 at least.

    Raises:
      ValueError: if p is above 5,000 without ``force``, the operator gives another
        tree, or it is a host operator under jit.

    Examples:
      >>> operator = jax.tree_util.Partial(jnp.multiply, jnp.array([1.0, 4.0]))
      >>> full_matrix(operator, jnp.ones(2))
      Array([[1., 0.],
             [0., 4.]], dtype=float32)
    """
    space = space_of(_NAME, like)
    if space.size > _LIMIT and not force:
        size = space.size**2 * jnp.dtype(space.dtype).itemsize
        raise ValueError(
            f"{_NAME}: like has {space.size:,} entries, more than {_LIMIT:,}: the "
            f"matrix takes {size:,} bytes and {space.size:,} products. Pass force=True "
            "for that; lanczos, spectral_density or top_eigenpairs need no matrix."
        )
    operator = as_pytree(operator)
    traced = under_trace(operator, like)
    chosen = chosen_driver(_NAME, operator, space, "auto", traced=traced)
    with jax.named_scope(_NAME), exact_products():
        if chosen == "compiled":
            return _matrix(operator, space=space)
        if is_host(operator):
            product = on_vectors(_NAME, operator, space)
            columns = [product(unit(j, space)) for j in range(space.size)]
        else:
            operator = linearized(operator)
            columns = [_column(operator, j, space=space) for j in range(space.size)]
        return jnp.stack(columns, axis=1)


def unit(j: Int[Array, ""] | int, space: Space) -> Float[Array, " p"]:
    """Gives the unit vector e_j."""
    return jnp.zeros(space.size, space.dtype).at[j].set(1)


@functools.partial(jax.jit, static_argnames="space")
def _matrix(operator, *, space):
    product = on_vectors(_NAME, prepared(operator), space)
    return lax.map(lambda j: product(unit(j, space)), jnp.arange(space.size)).T


@functools.partial(jax.jit, static_argnames="space")
def _column(operator, j, *, space):
    return on_vectors(_NAME, operator, space)(unit(j, space))
