"""Gaussians that are isotropic outside a subspace: their divergence, draws from them.

With orthonormal u_1..u_k in R^p, precision lam_i along u_i and lam_c across, posterior
N(m, .) and prior N(m0, .) with precisions z_i and z_c along the same axes, d = m - m0,

    2 KL = sum_i (z_i/lam_i - 1 - ln(z_i/lam_i)) + (p-k) (z_c/lam_c - 1 - ln(z_c/lam_c))
           + sum_i z_i (u_i . d)^2 + z_c |d - sum_i (u_i . d) u_i|^2.

One formula for all bounds here: the analytic posterior (lam_c = z_i = z_c), the
isotropic one (lam_i too) and the prior aligned with a Fisher matrix.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Key, PyTree

from jaxlab._checks import check_number
from jaxlab.curvature._subspaces import (
    Blocks,
    blocks_of,
    coefficients,
    combination,
    count_of,
    displacement,
)
from jaxlab.curvature._vectors import Space, space_of


def gaussian_kl_low_rank(
    mean: PyTree,
    prior_mean: PyTree,
    vectors: PyTree,
    *,
    precisions: Float[ArrayLike, " k"],
    precision_outside: ArrayLike,
    prior_precisions: Float[ArrayLike, " k"],
    prior_precision_outside: ArrayLike,
) -> Float[Array, ""]:
    """Computes KL(posterior || prior) of Gaussians with common special axes.

    Args:
      mean: of the posterior; p numbers in a pytree.
      prior_mean: of the prior, a tree like ``mean``.
      vectors: k orthonormal axes, k <= p: a matrix (k, p), or a tree like ``mean`` with
        a leading axis on each leaf. That they are orthonormal is not checked.
      precisions: of the posterior along the axes, (k,), positive.
      precision_outside: of the posterior in all other directions, positive.
      prior_precisions: of the prior along the axes, (k,), positive.
      prior_precision_outside: of the prior in all other directions, positive.

    Returns:
      The divergence in nats, float32 at least; k p operations.

    Raises:
      ValueError: if shapes do not fit together.

    Examples:
      >>> one, both = jnp.ones(1), jnp.array([3.0, 0.0])
      >>> gaussian_kl_low_rank(
      ...     both, jnp.zeros(2), jnp.eye(2)[:1], precisions=one, precision_outside=1.0,
      ...     prior_precisions=one, prior_precision_outside=1.0,
      ... )
      Array(4.5, dtype=float32)
    """
    name = "gaussian_kl_low_rank"
    space = space_of(name, mean, "mean")
    blocks = axes_of(name, vectors, space)
    along, across, prior_along, prior_across = (
        _positive(name, which, value, shape, space)
        for which, value, shape in (
            ("precisions", precisions, (count_of(blocks),)),
            ("precision_outside", precision_outside, ()),
            ("prior_precisions", prior_precisions, (count_of(blocks),)),
            ("prior_precision_outside", prior_precision_outside, ()),
        )
    )
    with jax.named_scope(name):
        moved = displacement(name, mean, prior_mean, space)
        inside = coefficients(blocks, moved)
        # Not |moved|^2 - |inside|^2, which cancels.
        outside = moved - combination(blocks, inside)
        spread = jnp.sum(_excess(prior_along, along))
        spread += (space.size - count_of(blocks)) * _excess(prior_across, across)
        shift = jnp.vdot(prior_along, inside**2)
        shift += prior_across * jnp.vdot(outside, outside)
        return 0.5 * (spread + shift)


def sample_gaussian_low_rank(
    key: Key[Array, ""],
    mean: PyTree,
    vectors: PyTree,
    *,
    precisions: Float[ArrayLike, " k"],
    precision_outside: ArrayLike,
) -> PyTree:
    """Draws from a Gaussian that is isotropic outside a subspace.

    Args:
      key: of the draw; for several, map over keys with ``jax.lax.map`` or ``jax.vmap``.
      mean: p numbers in a pytree.
      vectors: k orthonormal axes, as for :func:`gaussian_kl_low_rank`.
      precisions: along the axes, (k,), positive.
      precision_outside: in all other directions, positive.

    Returns:
      A tree like ``mean``, with its dtypes.

    Raises:
      ValueError: if shapes do not fit together.

    Examples:
      >>> axes, sharp = jnp.eye(2), jnp.full(2, 1e30)
      >>> sample_gaussian_low_rank(
      ...     jax.random.key(0), jnp.array([3.0, 4.0]), axes, precisions=sharp,
      ...     precision_outside=1.0,
      ... )
      Array([3., 4.], dtype=float32)
    """
    name = "sample_gaussian_low_rank"
    space = space_of(name, mean, "mean")
    blocks = axes_of(name, vectors, space)
    along = _positive(name, "precisions", precisions, (count_of(blocks),), space)
    across = _positive(name, "precision_outside", precision_outside, (), space)
    with jax.named_scope(name):
        white = jax.random.normal(key, (space.size,), space.dtype)
        inside = coefficients(blocks, white)
        change = combination(blocks, (along**-0.5 - across**-0.5) * inside)
        return space.unflatten(space.flatten(mean) + across**-0.5 * white + change)


def axes_of(name: str, vectors: PyTree, space: Space) -> Blocks:
    """Reads vectors of which there can be an orthonormal set.

    Raises:
      ValueError: if there are more than dimensions, or they do not fit.
    """
    blocks = blocks_of(name, vectors, space)
    if count_of(blocks) > space.size:
        raise ValueError(
            f"{name}: vectors must be orthonormal, so at most {space.size} for as many "
            f"parameters; got {count_of(blocks)}."
        )
    return blocks


def _excess(prior: Array, posterior: Array) -> Array:
    """Computes ``r - 1 - ln r`` of the ratio of two precisions; 0 if they are equal."""
    log = jnp.log(prior) - jnp.log(posterior)
    return jnp.expm1(log) - log


def _positive(
    name: str, which: str, value: ArrayLike, shape: tuple[int, ...], space: Space
) -> Array:
    if shape == () or isinstance(value, (int, float)):
        check_number(name, "finite and > 0", **{which: value})
    value = jnp.asarray(value)
    if value.shape != shape:
        raise ValueError(
            f"{name}: {which} must have shape {shape}, one number for each of the "
            f"vectors if it is (k,); got {value.shape}."
        )
    return value.astype(space.dtype)
