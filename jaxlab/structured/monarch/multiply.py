"""Monarch products: two batched products and one shuffle.

The factors are ``w1`` of shape (k, q, p), k blocks that map p inputs to q, and ``w2``
of shape (l, s, r), l blocks that map r to s, with ``k * q == l * r``. They stand for
a matrix M with m = s*l rows and n = k*p columns:

1. ``h[kappa, theta] = sum_pi w1[kappa, theta, pi] x[kappa*p + pi]``;
2. the flat h is read again as ``H[rho, lam] = h.ravel()[rho*l + lam]``;
3. ``y[sigma*l + lam] = sum_rho w2[lam, sigma, rho] H[rho, lam]``.

The output is interleaved: the block index lam is the minor one. Where l divides q,
with c = q / l (so r = c*k),

    M[(sigma, lam), (kappa, pi)]
        = sum_{a < c} w2[lam, sigma, kappa*c + a] w1[kappa, a*l + lam, pi]

so each of the k*l slices ``M.reshape(s, l, k, p)[:, lam, kappa, :]`` has rank c at
most, and nothing else is asked. A product costs k*q*p + l*s*r multiplications a row.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Inexact


class MonarchFactors(NamedTuple):
    """Holds the two factors of a Monarch matrix; a pytree of two arrays.

    Attributes:
      w1: blocks next to the input, shape (k, q, p).
      w2: blocks next to the output, shape (l, s, r), with ``k * q == l * r``.

    Examples:
      >>> factors = MonarchFactors(jnp.ones((2, 2, 3)), jnp.ones((2, 1, 2)))
      >>> monarch_to_dense(*factors).shape
      (2, 6)
    """

    w1: Inexact[Array, "k q p"]
    w2: Inexact[Array, "l s r"]


def monarch_matmul(
    x: Inexact[ArrayLike, "*batch n"],
    w1: Inexact[ArrayLike, "k q p"],
    w2: Inexact[ArrayLike, "l s r"],
) -> Inexact[Array, "*batch m"]:
    """Multiplies rows by a Monarch matrix, ``x @ monarch_to_dense(w1, w2).T``.

    Products accumulate in float32 at least; the middle and the result have the
    common dtype of the three arrays. l need not divide q.

    Args:
      x: rows of width n = k*p; any leading dimensions, empty ones too.
      w1: blocks next to the input, (k, q, p).
      w2: blocks next to the output, (l, s, r), with ``k * q == l * r``.

    Returns:
      Rows of width m = s*l with the leading dimensions of ``x``.

    Raises:
      ValueError: if the factors do not fit together, ``x`` does not fit them, or an
        array holds integers.

    Examples:
      >>> w1 = jnp.ones((2, 2, 3))
      >>> w2 = jnp.array([[[1.0, 0.0]], [[0.0, 2.0]]])
      >>> monarch_matmul(jnp.arange(6.0), w1, w2)
      Array([ 3., 24.], dtype=float32)
    """
    (x, w1, w2), dtype = _promote("monarch_matmul", x=x, w1=w1, w2=w2)
    _check_factors("monarch_matmul", w1, w2)
    (k, _, p), (l, s, r) = w1.shape, w2.shape
    if x.ndim == 0 or x.shape[-1] != k * p:
        raise ValueError(
            f"monarch_matmul: the last axis of x must have k * p = {k} * {p} = "
            f"{k * p} entries for w1 of shape {w1.shape}, got x of shape {x.shape}; "
            "pad x with zeros or make factors for that width."
        )
    batch = x.shape[:-1]
    wide = jnp.promote_types(dtype, jnp.float32)
    with jax.named_scope("monarch_matmul"):
        blocks = x.reshape(*batch, k, p)
        middle = jnp.einsum("...kp,kqp->...kq", blocks, w1, preferred_element_type=wide)
        middle = middle.astype(dtype).reshape(*batch, r, l)
        y = jnp.einsum("...rl,lsr->...sl", middle, w2, preferred_element_type=wide)
        return y.astype(dtype).reshape(*batch, s * l)


def monarch_to_dense(
    w1: Inexact[ArrayLike, "k q p"], w2: Inexact[ArrayLike, "l s r"]
) -> Inexact[Array, "m n"]:
    """Builds the matrix, m = s*l rows by n = k*p columns, of two Monarch factors.

    Args:
      w1: blocks next to the input, (k, q, p).
      w2: blocks next to the output, (l, s, r), with ``k * q == l * r``.

    Returns:
      The matrix that maps columns x to y. A Flax kernel maps rows: it is the
      transpose of this.

    Raises:
      ValueError: if the factors do not fit together or hold integers.

    Examples:
      >>> w1 = jnp.ones((2, 2, 3))
      >>> w2 = jnp.array([[[1.0, 0.0]], [[0.0, 2.0]]])
      >>> monarch_to_dense(w1, w2)
      Array([[1., 1., 1., 0., 0., 0.],
             [0., 0., 0., 2., 2., 2.]], dtype=float32)
    """
    (w1, w2), dtype = _promote("monarch_to_dense", w1=w1, w2=w2)
    _check_factors("monarch_to_dense", w1, w2)
    (k, q, p), (l, s, _) = w1.shape, w2.shape
    if q % l:  # ragged: the slices differ in rank, so take the columns one by one
        return monarch_matmul(jnp.eye(k * p, dtype=dtype), w1, w2).T
    c = q // l
    with jax.named_scope("monarch_to_dense"):
        dense = jnp.einsum(
            "lskc,kclp->slkp",
            w2.reshape(l, s, k, c),
            w1.reshape(k, c, l, p),
            preferred_element_type=jnp.promote_types(dtype, jnp.float32),
        )
        return dense.astype(dtype).reshape(s * l, k * p)


def _promote(name: str, **arrays: ArrayLike) -> tuple[list[Array], jnp.dtype]:
    """Brings arrays to their common dtype, which has to be real or complex."""
    values = [jnp.asarray(array) for array in arrays.values()]
    for key, value in zip(arrays, values, strict=True):
        if not jnp.issubdtype(value.dtype, jnp.inexact):
            raise ValueError(
                f"{name}: {key} must hold real or complex floating-point numbers, got "
                f"{value.dtype}; convert it with {key}.astype(jnp.float32)."
            )
    dtype = jnp.result_type(*values)
    return [value.astype(dtype) for value in values], dtype


def _check_factors(name: str, w1: Array, w2: Array) -> None:
    """Refuses factors that do not fit together."""
    if w1.ndim != 3 or w2.ndim != 3:
        raise ValueError(
            f"{name}: w1 must have shape (k, q, p) and w2 (l, s, r), got {w1.shape} "
            f"and {w2.shape}; map over further leading axes with jax.vmap."
        )
    (k, q, _), (l, _, r) = w1.shape, w2.shape
    if k * q != l * r:
        raise ValueError(
            f"{name}: w1 (k, q, p) must give as many middle entries as w2 (l, s, r) "
            f"takes, k * q == l * r; got {w1.shape} and {w2.shape}, so {k} * {q} = "
            f"{k * q} against {l} * {r} = {l * r}."
        )
