"""One step of given length along a direction: what every method here starts with.

With w the parameters and d a direction (a gradient), both taken as one vector,

    plain       w' = w + r d / ||d||
    adaptive    w' = w + r w^2 d / || |w| d ||        (elementwise products)

The adaptive form (ASAM) does not change when a parameter is rescaled together with
its gradient. Near a zero direction ||.|| is replaced by eps, so that w' = w at d = 0
and the derivative stays finite.
References: Foret et al., "Sharpness-Aware Minimization for Efficiently Improving
Generalization", ICLR 2021; Kwon et al., "ASAM", ICML 2021.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import PyTree

from jaxlab import trees
from jaxlab._norms import safe_norm, wide
from jaxlab.sharpness._checks import check_alike, check_numbers, check_tree

Mask = PyTree | Callable[[Any], Any] | None


def perturb(
    params: PyTree,
    direction: PyTree,
    *,
    radius: ArrayLike,
    eps: ArrayLike = 1e-12,
    mask: Mask = None,
    adaptive: bool = False,
    dtype: Any = None,
) -> PyTree:
    """Moves params by a step of given length along a direction.

    Args:
      params: floating leaves of any shape.
      direction: a tree like ``params``; only its direction counts.
      radius: length of the step over all moved parameters together, in the units of
        ``params``; >= 0. With ``adaptive`` the length of the step over ``|params|``;
        usual values are about ten times larger.
      eps: the norm is at least this; > 0.
      mask: which parameters move: a tree like ``params`` of booleans or of boolean
        arrays of the leaves' shapes, or a function ``params -> mask``. The norm is
        over what moves.
      adaptive: the step of ASAM.
      dtype: of the result; default the dtype of each leaf, but at least float32: in
        bfloat16 most coordinates of a short step would round away.

    Returns:
      A tree like ``params``.

    Raises:
      ValueError: if the trees differ, are empty or hold leaves that are not floating,
        or a number is out of range.

    Examples:
      >>> perturb(jnp.zeros(2), jnp.array([3.0, 4.0]), radius=5.0)
      Array([3., 4.], dtype=float32)
    """
    check_numbers("perturb", radius=radius, eps=eps)
    check_tree("perturb", params)
    check_alike("perturb", "params", params, direction=direction)
    moves = _mask_of(mask, params)
    with jax.named_scope("perturb"):
        step, norm = _step_and_norm(params, direction, moves, adaptive, eps)
        scale = radius / norm

        def move(p, s):
            kind = jnp.promote_types(p.dtype, jnp.float32) if dtype is None else dtype
            if s is None:
                return p.astype(kind)
            return (p.astype(s.dtype) + jnp.asarray(scale, s.dtype) * s).astype(kind)

        return jax.tree.map(move, _arrays(params), step)


def _step_and_norm(params, direction, moves, adaptive, eps):
    """Gives the step before scaling (``None`` where nothing moves) and its norm."""

    def along(p, d, move):
        if move is False:
            return None
        d = wide(d)
        d = d if move is True else jnp.where(move, d, 0)
        return jnp.abs(wide(p)) * d if adaptive else d

    step = jax.tree.map(along, params, direction, moves)
    norm = safe_norm(step, eps)
    if adaptive:
        again = lambda p, s: None if s is None else jnp.abs(wide(p)) * s
        step = jax.tree.map(again, params, step)
    return step, norm


def _mask_of(mask, params):
    if callable(mask):
        mask = mask(params)
    if mask is None:
        return jax.tree.map(lambda _: True, params)
    if trees.has_holes(params):
        mask = trees.punch_holes(mask, params)
    if jax.tree.structure(mask) != jax.tree.structure(params):
        raise ValueError(
            "perturb: mask must be a tree like params with a boolean for each leaf, "
            f"got structure {jax.tree.structure(mask)} instead of "
            f"{jax.tree.structure(params)}."
        )

    def checked(m, p):
        if isinstance(m, (bool, np.bool_)):
            return bool(m)
        if jnp.result_type(m) != jnp.bool_ or jnp.shape(m) != jnp.shape(p):
            raise ValueError(
                "perturb: a leaf of mask must be a boolean or a boolean array of the "
                f"leaf's shape {jnp.shape(p)}, got {jnp.result_type(m)} of shape "
                f"{jnp.shape(m)}."
            )
        return jnp.asarray(m)

    return jax.tree.map(checked, mask, params)


def _arrays(tree):
    return jax.tree.map(jnp.asarray, tree)
