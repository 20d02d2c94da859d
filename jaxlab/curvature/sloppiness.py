"""Sloppy spectra: how they fall, and the subspaces that they share.

A spectrum is sloppy when, past a first drop, ln lambda_i falls about linearly in i over
many decades. Inputs X (n x d) whose correlation X^T X / n is sloppy make the Hessian
and the Fisher matrix of a trained network sloppy too, and training then moves mostly
within the leading eigenspaces.

Reference: Yang, Mao, Chaudhari, "Does the Data Induce Capacity Control in Deep
Learning?", ICML 2022. The summary of a spectrum by a line is ours.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, PyTree

from jaxlab._checks import check_sequence, is_whole
from jaxlab.curvature._subspaces import (
    blocks_of,
    coefficients,
    count_of,
    displacement,
    products,
)
from jaxlab.curvature._vectors import space_of

Scalar = Float[Array, ""]


class Sloppiness(NamedTuple):
    """Holds how straight and how long a spectrum falls on a logarithmic scale.

    Attributes:
      slope: of log10 lambda_i over i, by least squares; in decades per index.
      r_squared: share of the variance of log10 lambda_i that the line explains.
      decades: log10 of the first eigenvalue of the range over its last.

    Examples:
      >>> float(sloppiness(jnp.array([100.0, 10.0, 1.0])).decades)
      2.0
    """

    slope: Scalar
    r_squared: Scalar
    decades: Scalar


def correlation_spectrum(inputs: Float[ArrayLike, "n ..."]) -> Float[Array, " d"]:
    """Computes the eigenvalues of ``X^T X / n``, the correlation of the inputs.

    They are squared singular values of X, so small ones keep their digits: errors are
    near eps sqrt(lambda_1 lambda_i), where forming the matrix would cost eps lambda_1.
    The inputs are not centred. A constant zero feature gives a zero.

    Args:
      inputs: X, a row per example; further axes are flattened to d features.

    Returns:
      d eigenvalues, descending, in float32 at least; those past n are zero.

    Raises:
      ValueError: if there is no example, no feature axis, or no floating-point dtype.

    Examples:
      >>> correlation_spectrum(jnp.array([[2.0, 0.0], [0.0, 4.0]]))
      Array([8., 2.], dtype=float32)
    """
    x = jnp.asarray(inputs)
    if x.ndim < 2 or not x.size or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
            "correlation_spectrum: inputs must be floating-point numbers of shape "
            f"(examples, features, ...), got {x.dtype} of shape {x.shape}."
        )
    x = x.reshape(len(x), -1).astype(jnp.promote_types(x.dtype, jnp.float32))
    n, d = x.shape
    with jax.named_scope("correlation_spectrum"):
        if n > d:
            x = jnp.linalg.qr(x, mode="r")
        values = jnp.linalg.svd(x, compute_uv=False) ** 2 / n
        return jnp.zeros(d, values.dtype).at[: len(values)].set(values)


def sloppiness(
    eigenvalues: Float[ArrayLike, " m"], *, low: int = 0, high: int | None = None
) -> Sloppiness:
    """Fits a line to log10 of the eigenvalues over their index.

    Args:
      eigenvalues: descending. Within the range they must be positive: drop what is
        zero or negative first, or every result is NaN or infinite.
      low: first index of the range; 0 is the largest eigenvalue.
      high: index past the last of the range, as in a slice; ``None``: all.

    Returns:
      Slope, R^2 and decades of the range, float32 at least. R^2 is 1 where all
      eigenvalues are equal, since the line is then exact.

    Raises:
      ValueError: if the range holds fewer than three eigenvalues or leaves the array.

    Examples:
      >>> fit = sloppiness(jnp.array([7.0, 100.0, 10.0, 1.0, 0.1]), low=1)
      >>> [round(float(number), 4) for number in fit]
      [-1.0, 1.0, 3.0]
    """
    values = jnp.asarray(eigenvalues)
    stop = len(values) if high is None and values.ndim else high
    whole = is_whole(low) and is_whole(stop)
    if values.ndim != 1 or not whole or not 0 <= low <= stop - 3 <= len(values) - 3:
        raise ValueError(
            "sloppiness: needs a vector of eigenvalues and a range of at least three, "
            f"0 <= low <= high - 3 and high <= their number; got shape {values.shape}, "
            f"low={low}, high={high}."
        )
    values = values[low:stop].astype(jnp.promote_types(values.dtype, jnp.float32))
    logs = jnp.log10(values)
    index = jnp.arange(len(values), dtype=logs.dtype) - (len(values) - 1) / 2
    centred = logs - logs.mean()
    slope = jnp.vdot(index, centred) / jnp.vdot(index, index)
    total = jnp.vdot(centred, centred)
    left = jnp.sum((centred - slope * index) ** 2)
    # Equal logarithms differ from their mean by round-off.
    noise = 8 * jnp.finfo(logs.dtype).eps * jnp.abs(logs).max()
    flat = total <= noise**2 * len(logs)
    r_squared = 1 - left / jnp.where(flat, 1.0, total)
    return Sloppiness(slope, r_squared, logs[0] - logs[-1])


def subspace_overlap_curve(
    a: PyTree, b: PyTree, *, ks: Sequence[int] | None = None
) -> Float[Array, " ks"]:
    """Computes ``|A_k B_k^T|^2 / k`` of the leading k vectors of two sets.

    The overlap is 1 for equal subspaces, 0 for orthogonal ones and about k/p for
    random ones. Rows of A and B are orthonormal; that is not checked.

    Args:
      a: vectors as a matrix (k, p), or as a tree with a leading axis on each leaf.
      b: others of the same space; their number may differ.
      ks: the numbers of leading vectors, each from 1 to the smaller number of the two;
        ``None``: all of these.

    Returns:
      One overlap in [0, 1] for each of ``ks``.

    Raises:
      ValueError: if the sets do not fit together or ``ks`` asks for more vectors.

    Examples:
      >>> subspace_overlap_curve(jnp.eye(3), jnp.eye(3)[jnp.array([0, 2, 1])])
      Array([1. , 0.5, 1. ], dtype=float32)
    """
    name = "subspace_overlap_curve"
    one, other = (
        blocks_of(name, vectors, space_of(name, _row_of(vectors), which))
        for vectors, which in ((a, "a"), (b, "b"))
    )
    sizes = [sum(block.shape[1] for block in blocks) for blocks in (one, other)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"{name}: a and b must be vectors of one space, got {sizes[0]} and "
            f"{sizes[1]} entries each."
        )
    numbers = _leading(name, ks, min(count_of(one), count_of(other)))
    with jax.named_scope(name):
        squares = products(one, other) ** 2
        inside = jnp.cumsum(jnp.cumsum(squares, axis=0), axis=1)
        return inside[numbers - 1, numbers - 1] / numbers


def displacement_fraction(
    vectors: PyTree,
    params: PyTree,
    params0: PyTree,
    *,
    ks: Sequence[int] | None = None,
) -> Float[Array, " ks"]:
    """Computes the share of a displacement within the leading k vectors.

    It is ``|U_k (params - params0)|^2 / |params - params0|^2``, about k/p for a random
    displacement and 0 where there is none.

    Args:
      vectors: U, orthonormal, a matrix (k, p) or a tree like ``params`` with a leading
        axis on each leaf; the Fisher matrix's eigenvectors at ``params0``, say.
      params: the end.
      params0: the start, a tree like ``params``.
      ks: the numbers of leading vectors; ``None``: 1, 2, ... up to all.

    Returns:
      One share in [0, 1] for each of ``ks``.

    Raises:
      ValueError: if the trees do not fit together or ``ks`` asks for more vectors.

    Examples:
      >>> end = jnp.array([3.0, 4.0])
      >>> displacement_fraction(jnp.eye(2)[1:], end, jnp.array([0.0, 4.0]))
      Array([0.], dtype=float32)
      >>> displacement_fraction(jnp.eye(2), end, jnp.array([2.0, 3.0]))
      Array([0.5, 1. ], dtype=float32)
    """
    name = "displacement_fraction"
    space = space_of(name, params, "params")
    blocks = blocks_of(name, vectors, space)
    numbers = _leading(name, ks, count_of(blocks))
    with jax.named_scope(name):
        moved = displacement(name, params, params0, space)
        total = jnp.vdot(moved, moved)
        inside = jnp.cumsum(coefficients(blocks, moved) ** 2)[numbers - 1]
        return jnp.where(total > 0, inside / jnp.where(total > 0, total, 1), 0)


def _row_of(vectors: PyTree) -> PyTree:
    """Describes one vector of a stack; what has no leading axis stays as it is."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(jnp.shape(x)[1:], jnp.result_type(x)), vectors
    )


def _leading(name: str, ks: Sequence[int] | None, most: int) -> Array:
    """Checks the numbers of leading vectors."""
    chosen = list(range(1, most + 1)) if ks is None else ks
    check_sequence(name, "ks", chosen, "integers")
    chosen = list(chosen)
    if (
        not chosen
        or not all(map(is_whole, chosen))
        or min(chosen) < 1
        or max(chosen) > most
    ):
        raise ValueError(
            f"{name}: ks must be numbers from 1 to {most}, the vectors that there are; "
            f"got {ks}."
        )
    return jnp.asarray(chosen)
