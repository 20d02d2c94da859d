"""The inverse Fisher Q = C^T C of FishLeg: made, applied, read.

On a block, C U = L (S * U) R^T (:mod:`jaxlab.optimizers.fisher_legendre.blocks`), so

    Q U = S * (L^T L (S * U) R^T R),

positive semi-definite whatever the factors are. With R = I and S = 1 this is the full
matrix L^T L; with L = R = I the diagonal S^2. The paper's form is S = 1; the authors'
PyTorch code has A o (R^T R (A o U) L L^T) with U transposed: their L is our L^T.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, PyTree

from jaxlab._array_checks import check_floating
from jaxlab._checks import check_made, check_number
from jaxlab.curvature.dense import full_matrix
from jaxlab.optimizers.fisher_legendre.blocks import (
    Block,
    Rule,
    Side,
    blocks_of,
    check_like,
    gather,
    scatter,
)


class Factors(NamedTuple):
    """The factors of one block; what it lacks is ``None``.

    With leading axes where a block is several matrices. A side that is cut holds its
    parts along one more axis; a diagonal side is a vector.

    Attributes:
      left: L, (..., parts, size, size) or (..., a).
      right: R, (..., parts, size, size).
      scale: S, (..., a, b).

    Examples:
      >>> q = q_init({"v": jnp.ones(3)}, scale=4.0)
      >>> q.factors["v"].scale.ravel()
      Array([2., 2., 2.], dtype=float32)
    """

    left: Array | None
    right: Array | None
    scale: Array | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class InverseFisher:
    """A learnt inverse Fisher: factors of every block, and what is static of them.

    A pytree whose leaves are the factors.

    Attributes:
      factors: :class:`Factors` by the name of the block.
      blocks: the static layout.

    Examples:
      >>> q = q_init({"kernel": jnp.ones((2, 2))}, scale=16.0)
      >>> q.factors["kernel"].left[0]
      Array([[2., 0.],
             [0., 2.]], dtype=float32)
    """

    factors: dict[str, Factors]
    blocks: tuple[Block, ...] = dataclasses.field(metadata={"static": True})


def q_init(
    params: PyTree, *, scale: ArrayLike = 10.0, rule: Rule = None, max_size: int = 256
) -> InverseFisher:
    """Makes the inverse Fisher ``scale`` times the identity.

    Args:
      params: tree of floating arrays.
      scale: positive. Too large is mended in a few steps, too small is not.
      rule: the kind of a block by the path of its leaf, where the automatic one is not
        wanted: a function ``(path, shape) -> kind or None``, or a dict from regular
        expressions to kinds, of which the first that is found in the path counts. The
        kinds: "kronecker", "stacked" (every axis but the last two counts matrices),
        "scaled" (with S), "embedding" (with L diagonal), "diagonal", "full".
      max_size: longest factor; longer sides are cut into equal parts.

    Returns:
      The :class:`InverseFisher`, in float32 at least.

    Raises:
      ValueError: if there are no leaves, a kind is unknown or does not fit its leaf, or
        a number is out of range.

    Examples:
      >>> params = {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}
      >>> q_apply(q_init(params, scale=16.0), params)["bias"]
      Array([16., 16.], dtype=float32)
    """
    name = "q_init"
    check_number(name, "finite and > 0", scale=scale)
    blocks = blocks_of(name, params, rule, max_size)
    wide = gather(blocks, jax.tree.map(jnp.zeros_like, params))
    made = {b.name: _initial(b, scale, wide[b.name]) for b in blocks}
    return InverseFisher(made, blocks)


def q_apply(q: InverseFisher, u: PyTree) -> PyTree:
    """Multiplies a tree like the params by the inverse Fisher.

    Args:
      q: from :func:`q_init` or learnt.
      u: a tree like the params; holes of masked trees are left where they are.

    Returns:
      ``Q u``, in the dtypes of ``u``.

    Raises:
      ValueError: if ``u`` has other leaves than the params.

    Examples:
      >>> u = {"v": jnp.array([1.0, 2.0])}
      >>> q_apply(q_init(u, scale=3.0), u)["v"].round(4)
      Array([3., 6.], dtype=float32)
    """
    check_inverse("q_apply", q)
    check_like("q_apply", q.blocks, u, "u")
    check_floating("q_apply", "u", u)
    with jax.named_scope("q_apply"):
        matrices = gather(q.blocks, u)
        return scatter(q.blocks, colour(q, whiten(q, matrices)), u)


def q_diag(q: InverseFisher, like: PyTree) -> PyTree:
    """Reads the diagonal of the inverse Fisher.

    Args:
      q: from :func:`q_init` or learnt.
      like: a tree like the params; its leaves are not read.

    Returns:
      A tree like the params.

    Raises:
      ValueError: if ``like`` has other leaves than the params.

    Examples:
      >>> params = {"kernel": jnp.ones((2, 2))}
      >>> q_diag(q_init(params, scale=16.0), params)["kernel"]
      Array([[16., 16.],
             [16., 16.]], dtype=float32)
    """
    check_inverse("q_diag", q)
    check_like("q_diag", q.blocks, like, "like")
    check_floating("q_diag", "like", like)
    found = {}
    for block in q.blocks:
        factors = q.factors[block.name]
        left = _column_squares(block.left, factors.left, block.rows)
        right = _column_squares(block.right, factors.right, block.columns)
        square = jnp.ones((*block.batch, block.rows, block.columns), _dtype(factors))
        square = square * left[..., :, None] * right[..., None, :]
        if factors.scale is not None:
            square = square * factors.scale**2
        found[block.name] = square
    return scatter(q.blocks, found, like)


def q_dense(q: InverseFisher, like: PyTree) -> Float[Array, "p p"]:
    """Writes the inverse Fisher as a matrix, for tests and small trees.

    Args:
      q: from :func:`q_init` or learnt.
      like: a tree like the params, p entries in all.

    Returns:
      The matrix in the order of ``jax.flatten_util.ravel_pytree``.

    Raises:
      ValueError: if ``like`` has other leaves than the params, or p is too large for
        :func:`jaxlab.curvature.full_matrix`.

    Examples:
      >>> like = {"v": jnp.ones(2)}
      >>> q_dense(q_init(like, scale=4.0), like)
      Array([[4., 0.],
             [0., 4.]], dtype=float32)
    """
    check_inverse("q_dense", q)
    check_like("q_dense", q.blocks, like, "like")
    return full_matrix(jax.tree_util.Partial(q_apply, q), like)


def check_inverse(name: str, q: InverseFisher) -> None:
    """Refuses what q_init did not make, and factors that do not fit the blocks."""
    check_made(name, "q", q, InverseFisher, "q_init")
    check_floating(name, "q", q)
    for block in q.blocks:
        scale = (*block.batch, block.rows, block.columns)
        needed = [*(_shape(block, s) for s in (block.left, block.right)), scale]
        found = [None if f is None else jnp.shape(f) for f in q.factors[block.name]]
        if any(f not in (None, n) for f, n in zip(found, needed, strict=True)):
            raise ValueError(
                f"{name}: the factors of q at {block.name} must have the shapes "
                f"{needed}, got {found}; q_init makes them."
            )


def check_group(name: str, q: InverseFisher) -> None:
    """Refuses blocks that the group step cannot move."""
    scaled = [block.name for block in q.blocks if block.kind == "scaled"]
    if scaled:
        raise ValueError(
            f'{name}: blocks of kind "scaled" ({scaled}) have no group step; choose '
            'another kind, or aux_mode="adam".'
        )


def whiten(q: InverseFisher, matrices: dict[str, Array]) -> dict[str, Array]:
    """Applies C to the matrices of the blocks."""
    found = {}
    for block in q.blocks:
        left, right, scale = q.factors[block.name]
        u = matrices[block.name]
        u = u if scale is None else scale * u
        u = from_left(block.left, left, u)
        found[block.name] = from_right(block.right, right, u)
    return found


def colour(q: InverseFisher, matrices: dict[str, Array]) -> dict[str, Array]:
    """Applies C^T to the matrices of the blocks."""
    found = {}
    for block in q.blocks:
        left, right, scale = q.factors[block.name]
        u = from_left(block.left, transposed(block.left, left), matrices[block.name])
        u = from_right(block.right, transposed(block.right, right), u)
        found[block.name] = u if scale is None else scale * u
    return found


def _shape(block: Block, side: Side | None) -> tuple[int, ...] | None:
    if side is None:
        return None
    each = (side.size,) if side.diagonal else (side.count, side.size, side.size)
    return (*block.batch, *each)


def transposed(side: Side | None, factor: Array | None) -> Array | None:
    """Transposes a factor."""
    if side is None or factor is None or side.diagonal:
        return factor
    return jnp.swapaxes(factor, -1, -2)


def from_left(side: Side | None, factor: Array | None, u: Array) -> Array:
    """Multiplies matrices by a factor from the left."""
    if side is None or factor is None:
        return u
    if side.diagonal:
        return factor[..., :, None] * u
    return join(side, factor @ split(side, u), u.shape[-2])


def from_right(side: Side | None, factor: Array | None, u: Array) -> Array:
    """Multiplies matrices by the transpose of a factor from the right."""
    if side is None or factor is None:
        return u
    if side.count == 1:
        return u @ jnp.swapaxes(factor[..., 0, :, :], -1, -2)
    turned = from_left(side, factor, jnp.swapaxes(u, -1, -2))
    return jnp.swapaxes(turned, -1, -2)


def split(side: Side, u: Array) -> Array:
    """Cuts the rows of matrices into the parts of a side."""
    missing = side.count * side.size - u.shape[-2]
    if missing:
        u = jnp.pad(u, [(0, 0)] * (u.ndim - 2) + [(0, missing), (0, 0)])
    return u.reshape(*u.shape[:-2], side.count, side.size, u.shape[-1])


def join(side: Side, parts: Array, length: int) -> Array:
    """Undoes :func:`split`."""
    shape = (*parts.shape[:-3], side.count * side.size, parts.shape[-1])
    return parts.reshape(shape)[..., :length, :]


def _initial(block: Block, scale: ArrayLike, zeros: Array) -> Factors:
    sides = [side for side in (block.left, block.right) if side is not None]
    # Each factor counts twice in Q, and S alone carries the scale where there is one.
    root = (
        1.0
        if block.scaled
        else jnp.asarray(scale, zeros.dtype) ** (1 / (2 * max(1, len(sides))))
    )
    # Stacks of matrices lie on the devices where their parameters do.
    each = jnp.sum(zeros, axis=(-2, -1))

    def factor(side: Side | None) -> Array | None:
        if side is None:
            return None
        if side.diagonal:
            return each[..., None] + jnp.full(
                (1,) * each.ndim + (side.size,), root, zeros.dtype
            )
        eye = root * jnp.eye(side.size, dtype=zeros.dtype)
        parts = jnp.broadcast_to(eye, (side.count, side.size, side.size))
        return each[..., None, None, None] + parts.reshape(
            (1,) * each.ndim + parts.shape
        )

    scales = zeros + jnp.sqrt(jnp.asarray(scale, zeros.dtype)) if block.scaled else None
    return Factors(factor(block.left), factor(block.right), scales)


def _dtype(factors: Factors) -> jnp.dtype:
    return jnp.result_type(*(factor for factor in factors if factor is not None))


def _column_squares(side: Side | None, factor: Array | None, length: int) -> Array:
    if side is None or factor is None:
        return jnp.ones(length)
    if side.diagonal:
        return factor**2
    # Rows that pad the last part are no outputs.
    real = (jnp.arange(side.count * side.size) < length).reshape(side.count, side.size)
    squares = jnp.sum(
        jnp.where(jnp.broadcast_to(real[..., None], factor.shape), factor, 0.0) ** 2,
        axis=-2,
    )
    return squares.reshape(*squares.shape[:-2], -1)[..., :length]
