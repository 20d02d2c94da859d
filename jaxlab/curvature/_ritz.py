"""Ritz vectors without a stored basis: which to lock, and the replay that makes them.

A tridiagonal T = Q A Q^T with eigenpairs (theta, u) gives Ritz pairs (theta, u Q). In
finite precision Q loses orthogonality only along Ritz vectors that have converged, so
it is enough to keep later steps orthogonal to those. Their coefficients u are known
from T alone; a replay of the recurrence with the same alpha and beta sums them up.
Reference: Parlett and Scott, "The Lanczos Algorithm with Selective Orthogonalization",
Mathematics of Computation 1979.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

Vector = Float[Array, " p"]
Scalar = Float[Array, ""]

_LEAK = 1e-2  # part of a Ritz vector outside the locked ones that may be round-off
_NEVER = 2**30


def dot(u: Vector, v: Vector) -> Scalar:
    """Multiplies without the shortcuts that accelerators take by default."""
    return jnp.dot(u, v, precision=lax.Precision.HIGHEST)


def norm(vector: Vector) -> Scalar:
    """Computes the Euclidean norm."""
    return jnp.sqrt(dot(vector, vector))


def divided(vector: Vector, length: Scalar) -> Vector:
    """Divides by a number; by zero gives zero."""
    return jnp.where(length == 0, 0, vector / jnp.where(length == 0, 1, length))


def without(
    rows: Float[Array, "k p"], w: Vector, mask: Bool[Array, " k"] | None = None
) -> Vector:
    """Subtracts from w its projections on orthonormal rows."""
    c = jnp.matmul(rows, w, precision=lax.Precision.HIGHEST)
    c = c if mask is None else jnp.where(mask, c, 0)
    return w - jnp.matmul(c, rows, precision=lax.Precision.HIGHEST)


def orthonormalized(
    rows: Float[Array, "k p"], fresh: Bool[Array, " k"]
) -> Float[Array, "k p"]:
    """Makes the fresh rows orthonormal to the others and among themselves."""

    def settle(i, carry):
        rows, done = carry
        row = without(rows, without(rows, rows[i], done), done)
        row = jnp.where(fresh[i], divided(row, norm(row)), rows[i])
        return rows.at[i].set(row), done.at[i].set(True)

    return lax.fori_loop(0, len(rows), settle, (rows, ~fresh))[0]


def unit_rows(rows: Float[Array, "k p"]) -> Float[Array, "k p"]:
    """Scales rows to norm 1 and leaves zero rows alone."""
    return jax.vmap(lambda row: divided(row, norm(row)))(rows)


def tridiagonal_eigh(
    alpha: Float[Array, " m"], beta: Float[Array, " m"], num_steps: Int[Array, ""]
) -> tuple[Float[Array, " m"], Float[Array, "m m"]]:
    """Decomposes T; eigenvalues ascend, the first ``num_steps`` belong to it.

    What is padded gets eigenvalues above the spectrum, so that it cannot mix with T.
    """
    place = jnp.arange(alpha.size)
    bound = jnp.max(jnp.abs(alpha)) + 2 * jnp.max(jnp.abs(beta))
    bound = jnp.where(bound == 0, 1, bound)
    padding = bound * (1.5 + place / alpha.size).astype(alpha.dtype)
    diagonal = jnp.where(place < num_steps, alpha, padding)
    beside = jnp.where(place < num_steps - 1, beta, 0)[:-1]
    t = jnp.diag(diagonal) + jnp.diag(beside, 1) + jnp.diag(beside, -1)
    return jnp.linalg.eigh(t, symmetrize_input=False)


def gauss_rule(
    alpha: Float[Array, " m"], beta: Float[Array, " m"], num_steps: Int[Array, ""]
) -> tuple[Float[Array, " m"], Float[Array, " m"], Float[Array, " m"]]:
    """Computes Ritz values, weights and residuals.

    Padding repeats the largest value, where any function of it is as finite as on the
    spectrum, with weight 0 and residual infinity.
    """
    values, vectors = tridiagonal_eigh(alpha, beta, num_steps)
    valid = jnp.arange(values.size) < num_steps
    residuals = jnp.abs(beta[num_steps - 1] * vectors[num_steps - 1])
    return (
        jnp.where(valid, values, values[num_steps - 1]),
        jnp.where(valid, vectors[0] ** 2, 0),
        jnp.where(valid, residuals, jnp.inf),
    )


class Locks(NamedTuple):
    """Which Ritz vectors later steps are kept orthogonal to."""

    coefficients: Float[Array, "slots m"]  # in the Lanczos vectors
    since: Int[Array, " slots"]  # the first step that sees the row
    replayed: Int[Array, ""]  # products spent on making the rows
    fresh: Bool[Array, ""]  # some rows wait for their replay


def no_locks(slots: int, order: int, dtype: jnp.dtype) -> Locks:
    """Starts with every slot empty."""
    zero = jnp.zeros((), jnp.int32)
    since = jnp.full((slots,), _NEVER, jnp.int32)
    return Locks(jnp.zeros((slots, order), dtype), since, zero, zero > 0)


def lock_converged(
    locks: Locks,
    alpha: Float[Array, " m"],
    beta: Float[Array, " m"],
    num_steps: Int[Array, ""],
) -> Locks:
    """Adds the coefficients of Ritz vectors that have converged and are not locked.

    Orthogonality to a Ritz vector, or to the part of it that is not locked, is lost as
    eps |T| part / residual: at sqrt(eps) it asks for a replay, which then serves every
    pair that is as near as eps^(1/4). Any vector spanned so far may be locked, since
    later ones are orthogonal to it in exact arithmetic.
    """
    values, vectors = tridiagonal_eigh(alpha, beta, num_steps)
    valid = jnp.arange(values.size) < num_steps
    size = jnp.max(jnp.where(valid, jnp.abs(values), 0))
    last = jnp.abs(beta[num_steps - 1] * vectors[num_steps - 1])
    residuals = jnp.where(valid, last, jnp.inf)
    epsilon = jnp.finfo(values.dtype).eps
    outside = jax.vmap(lambda u: norm(without(locks.coefficients, u)))(vectors.T)
    urgent = (residuals < epsilon**0.5 * size * outside) & (outside > _LEAK)
    going_on = beta[num_steps - 1] > 0
    fresh = jnp.any(urgent) & jnp.any(locks.since == _NEVER) & going_on
    ranking = jnp.argsort(residuals)

    def add(rank, carry):
        coefficients, since = carry
        u, residual = vectors[:, ranking[rank]], residuals[ranking[rank]]
        u = without(coefficients, without(coefficients, u))
        slot = jnp.argmax(since == _NEVER)
        wanted = (residual < epsilon**0.25 * size * norm(u)) & (norm(u) > _LEAK)
        wanted &= since[slot] == _NEVER
        row = jnp.where(wanted, divided(u, norm(u)), coefficients[slot])
        first = jnp.where(wanted, num_steps, since[slot])
        return coefficients.at[slot].set(row), since.at[slot].set(first)

    carry = locks.coefficients, locks.since
    grow = lambda carry: lax.fori_loop(0, values.size, add, carry)
    coefficients, since = lax.cond(fresh, grow, lambda carry: carry, carry)
    return Locks(coefficients, since, locks.replayed, fresh)


class Repeat(NamedTuple):
    """The state of a replay."""

    q: Vector
    previous: Vector
    coupling: Scalar
    index: Int[Array, ""]
    alpha: Float[Array, " m"]
    beta: Float[Array, " m"]
    sums: Float[Array, "k p"]  # the locked rows come first
    coefficients: Float[Array, "k m"]
    since: Int[Array, " slots"]


def replay(
    unit: Vector,
    alpha: Float[Array, " m"],
    beta: Float[Array, " m"],
    sums: Float[Array, "k p"],
    coefficients: Float[Array, "k m"],
    since: Int[Array, " slots"],
) -> Repeat:
    """Makes the state before the first step of a replay from a start of norm 1."""
    zero, count = jnp.zeros((), unit.dtype), jnp.zeros((), jnp.int32)
    still = jnp.zeros_like(unit)
    return Repeat(unit, still, zero, count, alpha, beta, sums, coefficients, since)


@dataclasses.dataclass(frozen=True)
class Replay:
    """Takes one step of a replay; the first ``slots`` of its sums are locked rows."""

    slots: int

    def __call__(self, state: Repeat, image: Vector) -> Repeat:
        """Adds q_j to the sums and goes on to the next vector."""
        j, q = state.index, state.q
        w = image - state.alpha[j] * q - state.coupling * state.previous
        if self.slots:
            w = without(state.sums[: self.slots], w, state.since <= j)
        beta = state.beta[j]
        sums = state.sums + state.coefficients[:, j, None] * q[None]
        return state._replace(
            q=divided(w, beta), previous=q, coupling=beta, index=j + 1, sums=sums
        )
