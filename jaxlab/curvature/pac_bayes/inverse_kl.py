"""The largest error that a bound on the binary divergence allows.

kl(q || p) = q ln(q/p) + (1-q) ln((1-q)/(1-p)) grows in p from 0 at p = q. Its inverse B
on that side has, by the implicit function theorem,

    dB/dbound = B (1 - B) / (B - q),      dB/dq = -(dB/dbound) dkl/dq.

Written in the gap u = p - q, kl = -q log1p(u/q) - (1-q) log1p(-u/(1-q)) has an error
of eps u, not eps, so p is right to a few eps. Newton's method may leave [q, 1];
bisection cannot.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

# Halvings of [0, sqrt(bound / 2)]: enough for the last bit of float64, since the gap
# is at least min(bound, 1 - exp(-bound)) and so never tiny against that interval.
_HALVINGS = 100


def inverse_kl(
    error: Float[ArrayLike, "..."], bound: Float[ArrayLike, "..."]
) -> Float[Array, "..."]:
    """Computes the largest p with ``kl(error || p) <= bound``.

    Bisection, rounded up, elementwise over arrays that broadcast; ``1 - exp(-bound)``
    in closed form at ``error = 0``. Derivatives of any order pass; where they are
    infinite (in ``bound`` at 0, in ``error`` at 0) they are large and finite.

    With ``bound = ln(1 / delta) / m`` it also bounds, with probability 1 - delta, the
    expectation of a number in [0, 1] of which ``error`` is the mean of m draws.

    Args:
      error: q, in [0, 1].
      bound: in nats, not negative; infinity gives 1.

    Returns:
      p in [error, 1], float32 at least; NaN where an argument is out of range.

    Raises:
      ValueError: if a Python number is out of range.

    Examples:
      >>> inverse_kl(0.0, jnp.log(2.0))
      Array(0.5, dtype=float32)
      >>> inverse_kl(0.25, 0.0)
      Array(0.25, dtype=float32)
    """
    if isinstance(error, (int, float)) and not 0 <= error <= 1:
        raise ValueError(f"inverse_kl: error must be in [0, 1], got {error}.")
    if isinstance(bound, (int, float)) and not bound >= 0:
        raise ValueError(f"inverse_kl: bound must be at least 0, got {bound}.")
    error, bound = jnp.asarray(error), jnp.asarray(bound)
    dtype = jnp.promote_types(jnp.result_type(error, bound), jnp.float32)
    shape = jnp.broadcast_shapes(error.shape, bound.shape)
    error, bound = (jnp.broadcast_to(x, shape).astype(dtype) for x in (error, bound))
    with jax.named_scope("inverse_kl"):
        return _inverse_kl(error, bound)


@jax.custom_jvp
def _inverse_kl(error: Float[Array, "..."], bound: Float[Array, "..."]) -> Array:
    inside = _inside(error)

    def halve(_, ends):
        low, high = ends
        middle = 0.5 * (low + high)
        above = _divergence(inside, middle) >= bound
        return jnp.where(above, low, middle), jnp.where(above, middle, high)

    # Pinsker: kl >= 2 u^2. The last bits make up for rounding the root.
    widest = jnp.sqrt(bound / 2) * (1 + 8 * jnp.finfo(bound.dtype).eps)
    widest = jnp.minimum(1 - inside, widest)
    _, gap = jax.lax.fori_loop(0, _HALVINGS, halve, (jnp.zeros_like(error), widest))
    found = jnp.minimum(error + gap, 1)
    at_zero = jnp.maximum(-jnp.expm1(-bound), error)
    found = jnp.where(error <= jnp.finfo(error.dtype).tiny, at_zero, found)
    found = jnp.where((error == 1) | (bound == jnp.inf), 1, found)
    valid = (error >= 0) & (error <= 1) & (bound >= 0)
    return jnp.where(valid, found, jnp.nan)


@_inverse_kl.defjvp
def _derivative(primals, tangents):
    error, bound = primals
    found = _inverse_kl(error, bound)
    info = jnp.finfo(found.dtype)
    inside, p = _inside(error), _inside(found)
    rate = p * (1 - found) / jnp.maximum(found - error, info.eps * p + info.tiny)
    by_error = jnp.log(inside) - jnp.log(p) - jnp.log1p(-inside) + jnp.log1p(-p)
    return found, rate * (tangents[1] - by_error * tangents[0])


def _inside(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Moves 0 and 1 to their nearest neighbours, whose logarithms are finite."""
    info = jnp.finfo(x.dtype)
    return jnp.clip(x, info.tiny, 1 - info.epsneg)


def _divergence(q: Float[Array, "..."], gap: Float[Array, "..."]) -> Array:
    """Computes ``kl(q || q + gap)``."""
    return -q * jnp.log1p(gap / q) - (1 - q) * jnp.log1p(-gap / (1 - q))
