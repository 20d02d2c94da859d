"""Trees as flat vectors, and operators on them: what every recurrence here runs on.

An operator maps a tree like the parameters to another. Recurrences keep one flat vector
in float32 at least, whatever the dtype of the parameters, and hand the operator a tree
with the dtypes of the leaves. ``optax.MaskedNode`` has no leaves, so a masked tree is
simply a shorter vector, and its holes come back when the tree is rebuilt.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree

Operator = Callable[[Any], Any]
Product = Callable[[Float[Array, " p"]], Float[Array, " p"]]


@dataclasses.dataclass(frozen=True)
class Space:
    """Describes the trees that an operator acts on; hashable, so it may be static."""

    structure: Any
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[Any, ...]
    size: int
    dtype: Any  # of the flat vectors

    def flatten(self, tree: PyTree) -> Float[Array, " p"]:
        """Strings the leaves together; they must have the shapes of this space."""
        leaves = jax.tree.leaves(tree)
        return jnp.concatenate([jnp.ravel(leaf).astype(self.dtype) for leaf in leaves])

    def unflatten(self, vector: Float[Array, " p"]) -> PyTree:
        """Cuts a vector into a tree with the dtypes of the leaves."""
        leaves, start = [], 0
        for shape, dtype in zip(self.shapes, self.dtypes, strict=True):
            stop = start + math.prod(shape)
            leaves.append(vector[start:stop].reshape(shape).astype(dtype))
            start = stop
        return jax.tree.unflatten(self.structure, leaves)


def space_of(name: str, like: PyTree, argument: str = "like") -> Space:
    """Describes trees like ``like``, whose leaves must be real floating-point arrays.

    Raises:
      ValueError: naming the argument, if a leaf holds integers or complex numbers, or
        there is none.
    """
    leaves, structure = jax.tree.flatten(like)
    for path, leaf in jax.tree_util.tree_leaves_with_path(like):
        dtype = jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.floating):
            where = jax.tree_util.keystr(path)
            raise ValueError(
                f"{name}: the leaves of {argument} must be real floating-point arrays, "
                f"got {dtype} at {argument}{where}; leave it out, or mask it with "
                "optax.MaskedNode()."
            )
    size = sum(math.prod(jnp.shape(leaf)) for leaf in leaves)
    if not size:
        raise ValueError(f"{name}: {argument} has no entries.")
    dtypes = tuple(jnp.result_type(leaf) for leaf in leaves)
    return Space(
        structure,
        tuple(jnp.shape(leaf) for leaf in leaves),
        dtypes,
        size,
        jnp.result_type(jnp.float32, *dtypes),
    )


def on_vectors(name: str, operator: Operator, space: Space) -> Product:
    """Lets an operator act on flat vectors.

    Raises:
      ValueError: from the product, if the operator gives another tree than it takes.
    """

    def product(vector: Float[Array, " p"]) -> Float[Array, " p"]:
        result = operator(space.unflatten(vector))
        structure = jax.tree.structure(result)
        shapes = tuple(jnp.shape(leaf) for leaf in jax.tree.leaves(result))
        if structure != space.structure or shapes != space.shapes:
            raise ValueError(
                f"{name}: the operator must give a tree like the one that it takes, "
                f"{space.structure} with shapes {space.shapes}; got {structure} with "
                f"shapes {shapes}."
            )
        return space.flatten(result)

    return product


def prepared(operator: Operator) -> Operator:
    """Does what need not be repeated, where the operator knows how.

    An operator may carry ``linearize()``, which gives the same map with everything that
    does not depend on its argument computed once. Call this inside the jitted function
    that loops, or the residuals become constants of the program.
    """
    linearize = getattr(operator, "linearize", None)
    return operator if linearize is None else linearize()


def is_host(operator: Operator) -> bool:
    """Tells whether an operator must be driven from Python (it streams its data)."""
    return bool(getattr(operator, "host", False))


def random_vector(
    key: Key[Array, ""], space: Space, kind: Literal["rademacher", "normal"]
) -> Float[Array, " p"]:
    """Draws a vector with independent entries of mean 0 and variance 1."""
    draw = jax.random.rademacher if kind == "rademacher" else jax.random.normal
    return draw(key, (space.size,), space.dtype)


def is_traced(*trees: PyTree) -> bool:
    """Tells whether any leaf is a tracer, so that values cannot be looked at."""
    leaves = jax.tree.leaves(trees)
    return any(isinstance(leaf, jax.core.Tracer) for leaf in leaves)


def check_symmetric(
    name: str, key: Key[Array, ""], product: Product, space: Space
) -> None:
    """Refuses an operator with u . A v != v . A u for two random vectors.

    It costs two products and looks at values: call it outside jit.

    Raises:
      ValueError: if they differ by more than round-off explains.
    """
    u, v = (random_vector(k, space, "normal") for k in jax.random.split(key))
    au, av = product(u), product(v)
    left, right = float(jnp.vdot(u, av)), float(jnp.vdot(v, au))
    norm = lambda x: float(jnp.linalg.norm(x))
    scale = max(norm(u) * norm(av), norm(v) * norm(au))
    coarsest = max(float(jnp.finfo(dtype).eps) for dtype in space.dtypes)
    if abs(left - right) > 100 * coarsest * scale:
        raise ValueError(
            f"{name}: the operator must be symmetric, but u . A v = {left:.6g} and "
            f"v . A u = {right:.6g} for random u and v. Pass check_symmetric=False if "
            "that is round-off."
        )
