"""Stacked endpoints: what they must look like, and weighted sums of them."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, PyTree

from jaxlab._norms import wide
from jaxlab.sharpness._checks import check_tree

Scalar = Float[Array, ""]


def spread(name: str, argument: str, prefix: PyTree, tree: PyTree) -> list:
    """Gives the leaf of a prefix tree that stands over each leaf of a tree."""
    try:
        return jax.tree.leaves(jax.tree.broadcast(prefix, tree))
    except ValueError as error:
        raise ValueError(
            f"{name}: {argument} must be one value or a tree that is a prefix of the "
            f"parameters {jax.tree.structure(tree)}, got {jax.tree.structure(prefix)}."
        ) from error


def weighted_point(name: str, endpoints: PyTree, coefficients: PyTree) -> PyTree:
    """Checks stacked endpoints and coefficients, and sums up."""
    size = num_endpoints_of(name, endpoints)
    each = [
        jnp.asarray(a) for a in spread(name, "coefficients", coefficients, endpoints)
    ]
    for a in each:
        if a.shape != (size,):
            raise ValueError(
                f"{name}: coefficients must be an array of shape ({size},), one for "
                f"each endpoint, or a tree of such arrays, got shape {a.shape}."
            )
    leaves, tree = jax.tree.flatten(endpoints)
    return jax.tree.unflatten(tree, [combine(w, a) for w, a in zip(leaves, each)])


def combine(leaves, a: Array) -> Array:
    """Sums ``a_i leaves[i]``; products of matrices might round on accelerators."""
    dtype = jnp.asarray(leaves[0]).dtype
    work = jnp.promote_types(jnp.promote_types(dtype, a.dtype), jnp.float32)
    a = a.astype(work)
    terms = [a[i] * jnp.asarray(leaves[i]).astype(work) for i in range(a.shape[0])]
    return sum(terms[1:], terms[0]).astype(dtype)


def scalar_position(name: str, position: ArrayLike) -> Scalar:
    """Gives a scalar of float32 at least."""
    t = wide(position)
    if t.shape:
        raise ValueError(
            f"{name}: position must be a scalar, got shape {t.shape}; use jax.vmap for "
            "several."
        )
    return t


def num_endpoints_of(name: str, endpoints: PyTree) -> int:
    """Checks stacked endpoints and counts them."""
    leaves = jax.tree.leaves(endpoints)
    shapes = [jnp.shape(w) for w in leaves]
    sizes = {shape[0] if shape else 0 for shape in shapes}
    if len(sizes) != 1 or 0 in sizes:
        raise ValueError(
            f"{name}: every leaf of endpoints must have one leading axis of endpoints, "
            f"got shapes {shapes}; subspace_init makes such a tree, and so does "
            "jax.tree.map(lambda *w: jnp.stack(w), *trees)."
        )
    check_tree(name, endpoints, "endpoints")
    return sizes.pop()
