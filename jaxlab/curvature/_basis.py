"""Rows of an orthonormal basis of changing length: projections, and turns in place."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxlab.curvature._ritz import Vector, divided, norm

Rows = Float[Array, "m p"]
Square = Float[Array, "m m"]

_COLUMNS = 2**16  # columns that a turn takes at once, which bounds its copies


def with_row(rows: Rows, i: Int[Array, ""], row: Vector, wanted) -> Rows:
    """Writes row i, unless it is not wanted; then i may be out of range."""
    old = lax.dynamic_index_in_dim(rows, i, keepdims=False)
    return lax.dynamic_update_index_in_dim(rows, jnp.where(wanted, row, old), i, 0)


def projected_twice(rows: Rows, w: Vector):
    """Projects once, and again if most of w was cancelled."""

    def project(carry):
        w, c, times, _ = carry
        rest, more = projected(rows, w)
        return rest, c + more, times + 1, norm(rest) < norm(w) * 2**-0.5

    going_on = lambda carry: carry[3] & (carry[2] < 2)
    carry = w, jnp.zeros(len(rows), w.dtype), 0, jnp.array(True)
    return lax.while_loop(going_on, project, carry)[:2]


def orthogonal(rows: Rows, w: Vector) -> Vector:
    """Makes a unit vector orthogonal to the rows."""

    def project(_, w):
        w, _ = projected(rows, divided(w, norm(w)))
        return w

    w = lax.fori_loop(0, 3, project, w)
    return divided(w, norm(w))


def projected(rows: Rows, w: Vector):
    """Subtracts from w its projections on the rows; their coefficients come too."""
    c = jnp.matmul(rows, w, precision=lax.Precision.HIGHEST)
    return w - jnp.matmul(c, rows, precision=lax.Precision.HIGHEST), c


def rotated(rows: Rows, turn: Square, wanted: Bool[Array, ""], parts: int = 1) -> Rows:
    """Multiplies by ``turn`` in place, some columns at a time, or leaves all alone.

    Columns that are cut over devices in ``parts`` are taken some of each part at a
    time, or the whole basis would have to be sent around.
    """
    if parts > 1:
        turned = jax.vmap(rotated, (1, None, None), 1)
        return turned(rows.reshape(len(rows), parts, -1), turn, wanted).reshape(
            rows.shape
        )
    size = rows.shape[1]
    width = min(_COLUMNS, size)
    whole, tail = divmod(size, width)

    def at(first, width, rows):
        block = lax.dynamic_slice_in_dim(rows, first, width, axis=1)
        block = jnp.matmul(turn, block, precision=lax.Precision.HIGHEST)
        return lax.dynamic_update_slice_in_dim(rows, block, first, axis=1)

    # Loops of no turns rather than a branch, for which XLA would copy the rows.
    turns = lambda count: jnp.where(wanted, count, 0)
    rows = lax.fori_loop(
        0, turns(whole), lambda i, rows: at(i * width, width, rows), rows
    )
    if tail:
        last = lambda i, rows: at(size - tail, tail, rows)
        rows = lax.fori_loop(0, turns(1), last, rows)
    return rows
