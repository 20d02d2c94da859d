"""k vectors like the parameters, as flat rows: what subspace methods work on.

Vectors come as one tree like the parameters whose leaves carry a leading axis of
length k, or as a matrix (k, p) in the order of the leaves. Both become a tuple of
blocks (k, .) that stand side by side, so a tree is never copied into a matrix.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jaxlab.curvature._vectors import Space

Blocks = tuple[Float[Array, "k _"], ...]
_matmul = jax.tree_util.Partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


def blocks_of(name: str, vectors: PyTree, space: Space) -> Blocks:
    """Reads k vectors of a space, at least one.

    Raises:
      ValueError: if they are neither a stacked tree nor a matrix of that space.
    """
    leaves, structure = jax.tree.flatten(vectors)
    shapes = tuple(jnp.shape(leaf) for leaf in leaves)
    counts = {shape[:1] for shape in shapes}
    flat = jax.tree_util.treedef_is_leaf(structure) and len(shapes) == 1
    flat = flat and len(shapes[0]) == 2
    matrix = flat and shapes[0][1] == space.size
    alike = structure == space.structure and space.shapes == tuple(
        shape[1:] for shape in shapes
    )
    if not (matrix or alike) or len(counts) != 1 or counts <= {(), (0,)}:
        raise ValueError(
            f"{name}: vectors must be a matrix (k, {space.size}) or a tree like params "
            f"with a leading axis of length k >= 1 on each leaf, {space.structure} "
            f"with shapes (k,) + {space.shapes}; got {structure} with shapes {shapes}."
        )
    ((count,),) = counts
    return tuple(
        jnp.asarray(leaf).reshape(count, -1).astype(space.dtype) for leaf in leaves
    )


def count_of(blocks: Blocks) -> int:
    """Says how many vectors there are."""
    return blocks[0].shape[0]


def coefficients(blocks: Blocks, vector: Float[Array, " p"]) -> Float[Array, " k"]:
    """Computes the inner product of each vector with a flat one."""
    total, start = 0.0, 0
    for block in blocks:
        stop = start + block.shape[1]
        total, start = total + _matmul(block, vector[start:stop]), stop
    return total


def combination(blocks: Blocks, weights: Float[Array, " k"]) -> Float[Array, " p"]:
    """Sums the vectors with weights."""
    return jnp.concatenate([_matmul(weights, block) for block in blocks])


def products(a: Blocks, b: tuple[Float[Array, "l _"], ...]) -> Float[Array, "k l"]:
    """Computes the inner products of two sets of vectors, cut alike or not."""
    if [x.shape[1] for x in a] != [x.shape[1] for x in b]:
        a, b = ((jnp.concatenate(x, axis=1),) for x in (a, b))
    return sum(_matmul(x, y.T) for x, y in zip(a, b, strict=True))


def displacement(
    name: str, params: PyTree, params0: PyTree, space: Space
) -> Float[Array, " p"]:
    """Computes ``params - params0``, in the precision of the flat vectors.

    Raises:
      ValueError: if the trees differ in structure or shapes.
    """
    shapes = tuple(jnp.shape(leaf) for leaf in jax.tree.leaves(params0))
    structure = jax.tree.structure(params0)
    if structure != space.structure or shapes != space.shapes:
        raise ValueError(
            f"{name}: params0 must be a tree like params, {space.structure} with "
            f"shapes {space.shapes}; got {structure} with shapes {shapes}."
        )
    return space.flatten(params) - space.flatten(params0)
