"""Descent that prefers sparse weights: powerpropagation and the same as a link.

See :mod:`jaxlab.optimizers.solutions` for the formulas.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import PyTree

from jaxlab._array_checks import check_floating
from jaxlab._chains import Place
from jaxlab._checks import check_number
from jaxlab._norms import wide
from jaxlab.curvature._vectors import space_of
from jaxlab.optimizers._links import check_alike
from jaxlab.trees import has_holes


def powerprop(params: PyTree, *, alpha: ArrayLike) -> PyTree:
    """Gives the weights ``w = v |v|^(alpha - 1)`` of the trained parameters v.

    Args:
      params: v, floating leaves. Leave biases and scales out.
      alpha: >= 1; 1 is the identity.

    Returns:
      A tree like ``params``. No gradient passes a v of 0 where alpha > 1.

    Raises:
      ValueError: if alpha is a number below 1 or a leaf is not floating.

    Examples:
      >>> powerprop(jnp.array([2.0, -3.0]), alpha=2)
      Array([ 4., -9.], dtype=float32)
    """
    name = "powerprop"
    a = _checked(name, params, alpha)

    def power(v):
        # The gradient of |v|^(a - 1) at 0 is not finite below a = 2.
        zero = v == 0
        size = jnp.abs(jnp.where(zero, 1, v))
        return jnp.where(zero, v * (a == 1), v * size ** (a.astype(v.dtype) - 1))

    with jax.named_scope(name):
        return _on_leaves(power, params)


def powerprop_init(params: PyTree, *, alpha: ArrayLike) -> PyTree:
    """Gives the v whose weights ``v |v|^(alpha - 1)`` are the given ones.

    Args:
      params: w, floating leaves, as a usual initialisation makes them.
      alpha: >= 1.

    Returns:
      ``sign(w) |w|^(1 / alpha)``, a tree like ``params``.

    Raises:
      ValueError: as :func:`powerprop` does.

    Examples:
      >>> powerprop_init(jnp.array([4.0, -9.0]), alpha=2)
      Array([ 2., -3.], dtype=float32)
    """
    name = "powerprop_init"
    a = _checked(name, params, alpha)
    root = lambda w: jnp.sign(w) * jnp.abs(w) ** (1 / a.astype(w.dtype))
    with jax.named_scope(name):
        return _on_leaves(root, params)


class ScaleByPowerState(NamedTuple):
    """State of :func:`scale_by_power`, which holds nothing."""

    place = Place("scale_by_power", "power")


def scale_by_power(alpha: ArrayLike) -> optax.GradientTransformationExtraArgs:
    """Scales gradients by ``alpha^2 |w|^(2 (alpha - 1) / alpha)``.

    In front of ``optax.sgd`` it does to w, to first order in the learning rate, what
    descent on v does where ``w = v |v|^(alpha - 1)``. Where alpha > 1, weights of
    exactly 0 never move, and for small rates no weight changes its sign.

    Args:
      alpha: >= 1; 1 is the identity. May be a schedule by ``optax.inject_hyperparams``.

    Returns:
      A transformation whose ``update`` needs ``params``.

    Raises:
      ValueError: if alpha is a number below 1; from ``update``, if the params are
        missing or a leaf is not floating.

    Examples:
      >>> tx, w = scale_by_power(2.0), jnp.array([0.0, 1.0, -4.0])
      >>> updates, _ = tx.update(jnp.ones(3), tx.init(w), w)
      >>> updates
      Array([ 0.,  4., 16.], dtype=float32)
    """
    name = "scale_by_power"
    _check_alpha(name, alpha)

    def init(params):
        _checked(name, params, alpha)
        return ScaleByPowerState()

    def update(updates, state, params=None, **extra_args):
        if params is None:
            raise ValueError(
                f"{name} needs params: call update(grads, state, params, ...)."
            )
        check_alike(name, updates, params)
        a = _checked(name, params, alpha)
        check_floating(name, "updates", updates)

        def scaled(g, p):
            size, power = jnp.abs(wide(p)), 2 * (a - 1) / a
            factor = jnp.square(a).astype(size.dtype) * size ** power.astype(size.dtype)
            return (factor * wide(g)).astype(jnp.result_type(g))

        with jax.named_scope(name):
            return jax.tree.map(scaled, updates, params), state

    return optax.GradientTransformationExtraArgs(init, update)


def _on_leaves(function, tree):
    """Works in float32 at least and gives back the dtypes that came."""
    return jax.tree.map(lambda x: function(wide(x)).astype(jnp.result_type(x)), tree)


def _checked(name, params, alpha):
    _check_alpha(name, alpha)
    if jax.tree.leaves(params) or not has_holes(params):
        space_of(name, params, "params")
    return wide(alpha)


def _check_alpha(name, alpha):
    check_number(name, "finite and >= 1", alpha=alpha)
