"""Monarch products of any order: d block-diagonal factors instead of two.

Factor i has shape (B_i, q_i, p_i): B_i blocks that map p_i inputs to q_i. All but the
last read the flat vector as ``X[left, p_i, right]``, where ``right = q_1 ... q_(i-1)``
is the width that is done and ``left = B_i / right`` what is still to come; the blocks,
numbered in that order, act along the axis in the middle. The last factor reads it as
``X[p_d, right]`` with ``right = B_d``. Each step asks ``B_i p_i = B_(i-1) q_(i-1)``.

For n = m^d and factors of n/m blocks of size m by m, a vector is a tensor of d axes of
length m, factor i acts along axis d + 1 - i, and a product costs d m n = d n^(1 + 1/d)
multiplications. Two factors are `monarch_matmul`, any rank included; d of them hold
the fast Fourier transform of radix m.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Inexact

from jaxlab._checks import check_sequence
from jaxlab.structured.monarch.multiply import _promote


def monarch_chain_matmul(
    x: Inexact[ArrayLike, "*batch n"],
    factors: Sequence[Inexact[ArrayLike, "_ _ _"]],
) -> Inexact[Array, "*batch m"]:
    """Multiplies rows by the Monarch matrix of two or more factors.

    Products accumulate in float32 at least; the results of all steps have the common
    dtype of the arrays.

    Args:
      x: rows of width ``n = B_1 * p_1``; any leading dimensions, empty ones too.
      factors: two or more arrays (B_i, q_i, p_i), that next to the input first, with
        ``B_i * p_i == B_(i-1) * q_(i-1)``; B_i of all but the last must be a multiple
        of ``q_1 * ... * q_(i-1)``. With two factors these are `monarch_matmul`'s.

    Returns:
      Rows of width ``B_d * q_d`` with the leading dimensions of ``x``.

    Raises:
      ValueError: if there are fewer than two factors, they do not fit together, ``x``
        does not fit them, or an array holds integers.

    Examples:
      >>> ones = jnp.ones((4, 2, 2))
      >>> monarch_chain_matmul(jnp.arange(8.0), [ones, ones, ones])
      Array([28., 28., 28., 28., 28., 28., 28., 28.], dtype=float32)
    """
    (x, *factors), dtype = _check("monarch_chain_matmul", factors, x=x)
    blocks, _, p = factors[0].shape
    if x.ndim == 0 or x.shape[-1] != blocks * p:
        raise ValueError(
            f"monarch_chain_matmul: the last axis of x must have {blocks} * {p} = "
            f"{blocks * p} entries for a first factor of shape {factors[0].shape}, got "
            f"x of shape {x.shape}; pad x with zeros or make factors for that width."
        )
    batch, done = x.shape[:-1], 1
    wide = jnp.promote_types(dtype, jnp.float32)
    with jax.named_scope("monarch_chain_matmul"):
        for i, w in enumerate(factors):
            blocks, q, p = w.shape
            right = blocks if i == len(factors) - 1 else done
            w = w.reshape(blocks // right, right, q, p)
            x = x.reshape(*batch, blocks // right, p, right)
            x = jnp.einsum("...lpr,lrqp->...lqr", x, w, preferred_element_type=wide)
            x = x.astype(dtype)
            done *= q
        return x.reshape(*batch, math.prod(factors[-1].shape[:2]))


def monarch_chain_to_dense(
    factors: Sequence[Inexact[ArrayLike, "_ _ _"]],
) -> Inexact[Array, "m n"]:
    """Builds the matrix of two or more Monarch factors.

    Args:
      factors: as for `monarch_chain_matmul`.

    Returns:
      The matrix that maps columns x to y, of shape (B_d * q_d, B_1 * p_1).

    Raises:
      ValueError: if there are fewer than two factors, they do not fit together, or
        one holds integers.

    Examples:
      >>> scale = jnp.full((4, 1, 1), 2.0)
      >>> monarch_chain_to_dense([scale, scale, scale]).diagonal()
      Array([8., 8., 8., 8.], dtype=float32)
    """
    factors, dtype = _check("monarch_chain_to_dense", factors)
    blocks, _, p = factors[0].shape
    with jax.named_scope("monarch_chain_to_dense"):
        return monarch_chain_matmul(jnp.eye(blocks * p, dtype=dtype), factors).T


def _check(
    name: str, factors: Sequence[ArrayLike], **others: ArrayLike
) -> tuple[list[Array], jnp.dtype]:
    """Promotes all arrays and refuses factors that do not fit together."""
    check_sequence(name, "factors", factors, "arrays")
    if len(factors) < 2:
        raise ValueError(
            f"{name}: factors must be a sequence of at least two arrays, got "
            f"{len(factors)}."
        )
    named = {f"factors[{i}]": factor for i, factor in enumerate(factors)}
    values, dtype = _promote(name, **others, **named)
    factors = values[len(others) :]
    shapes = [factor.shape for factor in factors]
    if any(len(shape) != 3 for shape in shapes):
        raise ValueError(
            f"{name}: each factor must have shape (blocks, q, p), got {shapes}; map "
            "over further leading axes with jax.vmap."
        )
    done = 1
    for i, (blocks, q, _) in enumerate(shapes[:-1]):
        if blocks % done:
            raise ValueError(
                f"{name}: the blocks of factors[{i}] must be a multiple of {done}, "
                "the product of the q of the factors (blocks, q, p) before it, got "
                f"{shapes}."
            )
        done *= q
        following, _, inputs = shapes[i + 1]
        if blocks * q != following * inputs:
            raise ValueError(
                f"{name}: factors[{i}] (blocks, q, p) must give as many entries as "
                f"factors[{i + 1}] takes, blocks * q == blocks * p; got {shapes}, so "
                f"{blocks * q} against {following * inputs}."
            )
    return values, dtype
