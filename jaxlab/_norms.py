"""Trees as one vector: norms, inner products, finiteness; float32 at least."""

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, PyTree


def wide(leaf: ArrayLike) -> Array:
    """Gives an array of float32 at least."""
    leaf = jnp.asarray(leaf)
    return leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))


def cast_like(tree: PyTree, like: PyTree) -> PyTree:
    """Casts a tree to the dtypes of another, of which NumPy's float64 is float32."""
    return jax.tree.map(lambda t, x: t.astype(jnp.result_type(x)), tree, like)


def zeros_wide(tree: PyTree) -> PyTree:
    """Makes zeros like a tree, of float32 at least."""
    return jax.tree.map(lambda leaf: jnp.zeros_like(wide(leaf)), tree)


def all_finite(tree: PyTree) -> Array:
    """Tells whether every number of a tree is finite."""
    leaves = jax.tree.leaves(tree)
    return jnp.array([jnp.all(jnp.isfinite(leaf)) for leaf in leaves], bool).all()


def inner(one: PyTree, two: PyTree) -> Array:
    """Takes the inner product of two trees."""
    return optax.tree.vdot(jax.tree.map(wide, one), jax.tree.map(wide, two))


def safe_norm(tree: PyTree, eps: ArrayLike = 0.0) -> Array:
    """Takes the norm of all leaves; ``eps`` at least, and flat below it.

    Never below 1e-19, so that 0 divided by it is 0 even where eps has become 0, as
    1e-12 does in the float16 that ``optax.inject_hyperparams`` may cast it to.
    """
    square = optax.tree.norm(jax.tree.map(wide, tree), squared=True)
    least = jnp.maximum(jnp.square(wide(eps)), jnp.finfo(jnp.float32).tiny)
    return jnp.sqrt(jnp.maximum(square, least))


def unit(direction: PyTree, eps: ArrayLike = 1e-12) -> PyTree:
    """Divides a tree by its norm, ``eps`` at least; leaves at least float32."""
    norm = safe_norm(direction, eps)
    return jax.tree.map(lambda d: wide(d) / norm.astype(wide(d).dtype), direction)
