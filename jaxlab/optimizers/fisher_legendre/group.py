"""The group step of FishLeg: fits the factors of Q = C^T C in tens of steps.

The auxiliary loss A(Q; u) = 1/2 z^T (F + gamma) z - u^T z with z = Q u changes along
C -> (I + E) C by rho^T (E + E^T) eps, where in whitened coordinates

    eps = C u,   z = C^T eps,   rho = C (F + gamma) z - eps.

With E = E_L (x) I or I (x) E_R the gradients of a block of a rows and b columns, over m
directions, are

    D_L = sum_j (rho_j eps_j^T + eps_j rho_j^T) / (m b),   D_R = likewise with rho_j^T.

Each is divided by the largest eigenvalue of sum_j eps_j eps_j^T / (m b), so that the
step cannot overshoot however long eps is, then

    L <- L - mu D_L / max(1, ||D_L||_2) L.

Only matrix products: no inverse, and Q stays positive definite. Directions are given as
eps: C g, every block scaled to ||eps||_F^2 = a b (u = g up to scale), and random signs
(u = C^-1 eps, never formed). Half the signs are added to the scaled C g: one product
with the Fisher for both, and what the sum adds to eps eps^T beside the two terms is
zero in the mean. At Q = (F + gamma)^-1 nothing moves, whatever eps is.

The paper fits the factors by Adam instead (:mod:`.auxiliary`). This step is ours, akin
to how PSGD fits its preconditioners; where (F + gamma)^-1 is no Kronecker product and
eps is white, its fixed point minimises tr(Q (F + gamma)) - log det Q.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Key, PyTree

from jaxlab._checks import check_count, check_flag, check_number
from jaxlab.curvature._options import exact_products
from jaxlab.optimizers.fisher_legendre.blocks import (
    Block,
    Side,
    check_like,
    gather,
    scatter,
)
from jaxlab.optimizers.fisher_legendre.factors import (
    Factors,
    InverseFisher,
    check_group,
    check_inverse,
    colour,
    split,
    whiten,
)

Matrices = dict[str, Array]

_ITERATIONS = 3  # of the power method, from the largest column
_SHARE = 0.5  # of signs added to a gradient; on CURVES 1/8 to 1/2 are level, 1 worse


def fishleg_group_step(
    key: Key[Array, ""] | None,
    q: InverseFisher,
    gradients: Sequence[PyTree],
    fisher_vp: Callable[[Any], Any],
    *,
    damping: ArrayLike,
    step: ArrayLike = 0.25,
    white_directions: int = 1,
    combine: bool = True,
    like: PyTree | None = None,
) -> tuple[InverseFisher, Float[Array, ""]]:
    """Moves a learnt inverse Fisher one step towards ``(F + damping)^-1``.

    One product with the Fisher for each direction.

    Args:
      key: of the white directions; ``None`` if there are none.
      q: the inverse Fisher, without "scaled" blocks.
      gradients: trees like the params, a direction each.
      fisher_vp: the operator ``v -> F v``.
      damping: added to F, >= 0.
      step: mu, in (0, 1).
      white_directions: how many random directions.
      combine: add them to the gradients at half their size, the first to the first, so
        that there are as many directions as there are of the one or of the other; else
        each stands by itself.
      like: a tree like the params, needed where there are no gradients.

    Returns:
      The new inverse Fisher, and the mean over directions of ``||rho||^2 / ||eps||^2``
      before the step: 0 where Q is exact, 1 where Q is 0.

    Raises:
      ValueError: if there is no direction, a key is missing, a block is "scaled", or a
        gradient is no tree like the params.

    Examples:
      >>> from jaxlab.optimizers import q_apply, q_init
      >>> params = {"v": jnp.ones(2)}
      >>> q, identity = q_init(params, scale=0.5), lambda v: v
      >>> q, error = fishleg_group_step(
      ...     None, q, [params], identity, damping=1.0, white_directions=0
      ... )
      >>> float(error.round(5)), q_apply(q, params)["v"].round(3).tolist()
      (0.0, [0.5, 0.5])
    """
    name = "fishleg_group_step"
    if not gradients and not white_directions:
        raise ValueError(f"{name}: give at least one gradient or white direction.")
    if white_directions and key is None:
        raise ValueError(f"{name}: white_directions={white_directions} needs a key.")
    if not gradients and like is None:
        raise ValueError(f"{name}: without gradients give like=, a tree like params.")
    check_count(name, least=0, white_directions=white_directions)
    check_number(name, "a number", damping=damping, step=step)
    check_flag(name, combine=combine)
    check_inverse(name, q)
    check_group(name, q)
    for gradient in gradients:
        check_like(name, q.blocks, gradient, "a gradient")
    with jax.named_scope(name), exact_products():
        eps = [_scaled(q, whiten(q, gather(q.blocks, g))) for g in gradients]
        keys = jax.random.split(key, white_directions) if white_directions else []
        like = _shapes(gradients[0] if gradients else like)
        white = [_white(k, q) for k in keys]
        joined = min(len(eps), len(white)) if combine else 0
        join = lambda along, noise: along + _SHARE * noise
        for number in range(joined):
            eps[number] = jax.tree.map(join, eps[number], white[number])
        eps += white[joined:]
        rho = [_residual(q, e, fisher_vp, damping, like) for e in eps]
        stack = lambda parts, block: jnp.stack([part[block.name] for part in parts])
        factors, errors, sizes = {}, 0.0, 0.0
        for block in q.blocks:
            ours, away = stack(eps, block), stack(rho, block)
            old = q.factors[block.name]
            factors[block.name] = _moved(block, old, ours, away, step)
            errors += jnp.sum(away**2)
            sizes += jnp.sum(ours**2)
        error = errors / jnp.maximum(sizes, jnp.finfo(jnp.float32).tiny)
        return InverseFisher(factors, q.blocks), error.astype(jnp.float32)


def _shapes(tree: PyTree) -> PyTree:
    """Gives the shapes of a tree, in float32 at least."""
    dtype = lambda x: jnp.promote_types(jnp.result_type(x), jnp.float32)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), dtype(x)), tree)


def _scaled(q: InverseFisher, matrices: Matrices) -> Matrices:
    """Makes the mean square of every matrix one; zero stays zero."""

    def scaled(u: Array) -> Array:
        square = jnp.mean(u**2, axis=(-2, -1), keepdims=True)
        tiny = jnp.finfo(u.dtype).tiny
        return jnp.where(square > tiny, u / jnp.sqrt(jnp.maximum(square, tiny)), 0.0)

    return {name: scaled(u) for name, u in matrices.items()}


def _white(key: Key[Array, ""], q: InverseFisher) -> Matrices:
    """Draws random signs, 32 from each word: far cheaper than normal numbers."""
    keys = jax.random.split(key, len(q.blocks))

    def draw(key: Array, block: Block) -> Array:
        dtype = jnp.result_type(*jax.tree.leaves(q.factors[block.name]))
        shape = (*block.batch, block.rows, block.columns)
        size = math.prod(shape)
        words = jax.random.bits(key, (-(-size // 32), 1), jnp.uint32)
        bits = (words >> jnp.arange(32, dtype=jnp.uint32)[None]) & 1
        return 2 * bits.ravel()[:size].reshape(shape).astype(dtype) - 1

    return {b.name: draw(k, b) for k, b in zip(keys, q.blocks, strict=True)}


def _residual(
    q: InverseFisher,
    eps: Matrices,
    fisher_vp: Callable[[Any], Any],
    damping: ArrayLike,
    like: PyTree,
) -> Matrices:
    """Computes ``C (F + damping) C^T eps - eps``."""
    z = colour(q, eps)
    product = gather(q.blocks, fisher_vp(scatter(q.blocks, z, like)))
    damped = {name: product[name] + damping * z[name] for name in z}
    found = whiten(q, damped)
    return {name: found[name] - eps[name] for name in eps}


def _moved(
    block: Block, factors: Factors, eps: Array, rho: Array, step: ArrayLike
) -> Factors:
    left, right, scale = factors
    if scale is not None:
        return Factors(None, None, _moved_diagonal(scale, eps, rho, step, axes=(0,)))
    if left is not None:
        left = _moved_side(block.left, left, eps, rho, step)
    if right is not None:
        turn = lambda u: jnp.swapaxes(u, -1, -2)
        right = _moved_side(block.right, right, turn(eps), turn(rho), step)
    if left is not None and right is not None:
        left, right = _balanced(left, right, block)
    return Factors(left, right, None)


def _moved_side(
    side: Side | None, factor: Array, eps: Array, rho: Array, step: ArrayLike
) -> Array:
    assert side is not None
    if side.diagonal:
        return _moved_diagonal(factor, eps, rho, step, axes=(0, -1))
    eps, rho = (split(side, u) for u in (eps, rho))
    product = jnp.einsum("m...ab,m...cb->...ac", rho, eps)
    length = jnp.maximum(_top_of_gram(eps), jnp.finfo(eps.dtype).tiny)[..., None, None]
    move = (product + jnp.swapaxes(product, -1, -2)) / length
    clip = jnp.maximum(1.0, _spectral_norm(move))[..., None, None]
    return factor - step * (move / clip) @ factor


def _moved_diagonal(
    factor: Array, eps: Array, rho: Array, step: ArrayLike, axes: tuple[int, ...]
) -> Array:
    """Does the same for a diagonal, whose spectral norm is its largest entry."""
    inner = tuple(range(factor.ndim - (2 if len(axes) == 1 else 1), factor.ndim))
    square = jnp.sum(eps**2, axes)
    length = jnp.max(square, axis=inner, keepdims=True)
    length = jnp.maximum(length, jnp.finfo(eps.dtype).tiny)
    move = 2 * jnp.sum(rho * eps, axes) / length
    clip = jnp.maximum(1.0, jnp.max(jnp.abs(move), axis=inner, keepdims=True))
    return factor * (1 - step * move / clip)


def _balanced(left: Array, right: Array, block: Block) -> tuple[Array, Array]:
    """Gives both factors the same root mean square row; Q stays what it is."""
    rows = lambda u: tuple(range(len(block.batch), u.ndim))
    square = lambda u, n: jnp.sum(u**2, axis=rows(u)) / n
    ratio = square(right, block.columns) / square(left, block.rows)
    c = ratio**0.25
    spread = lambda u: c.reshape(c.shape + (1,) * (u.ndim - c.ndim))
    return left * spread(left), right / spread(right)


def _top_of_gram(eps: Array) -> Array:
    """Estimates the largest eigenvalue of ``sum_m eps_m eps_m^T`` from below."""
    norms = jnp.sum(eps**2, axis=(0, -1))
    start = jax.nn.one_hot(jnp.argmax(norms, axis=-1), eps.shape[-2], dtype=eps.dtype)

    def product(v: Array) -> Array:
        along = jnp.einsum("m...ab,...a->m...b", eps, v)
        return jnp.einsum("m...ab,m...b->...a", eps, along)

    return _power(product, product(start))


def _spectral_norm(matrix: Array) -> Array:
    """Estimates the spectral norm of symmetric matrices from below."""
    norms = jnp.sum(matrix**2, axis=-2)
    start = jax.nn.one_hot(
        jnp.argmax(norms, axis=-1), matrix.shape[-1], dtype=matrix.dtype
    )
    product = lambda v: (matrix @ v[..., None])[..., 0]
    return _power(product, product(start))


def _power(product: Callable[[Array], Array], v: Array) -> Array:
    norm = lambda v: jnp.sqrt(jnp.sum(v**2, axis=-1, keepdims=True))
    for _ in range(_ITERATIONS):
        v = product(v / jnp.maximum(norm(v), jnp.finfo(v.dtype).tiny))
    return norm(v)[..., 0]
