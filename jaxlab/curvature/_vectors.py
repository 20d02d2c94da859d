"""Trees as flat vectors, and operators on them: what every recurrence here runs on.

An operator maps a tree like the parameters to another. Recurrences keep one flat vector
in float32 at least, whatever the dtype of the parameters, and hand the operator a tree
with the dtypes of the leaves. ``optax.MaskedNode`` has no leaves, so a masked tree is
simply a shorter vector, and its holes come back when the tree is rebuilt. Where the
tree is cut over devices, ``laid_out`` lets the vectors lie as it does.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree

from jaxlab.curvature._cuts import Cuts, cuts_of

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
    cuts: Cuts | None = None  # over devices; without, in the order of the leaves

    @property
    def length(self) -> int:
        """Says how long flat vectors are: ``size``, or more where they are cut."""
        return self.size if self.cuts is None else self.cuts.length(self.shapes)

    @property
    def parts(self) -> int:
        """Says in how many parts flat vectors are cut."""
        return 1 if self.cuts is None else self.cuts.parts

    @property
    def wide(self) -> "Space":
        """The same trees in the dtype of the flat vectors."""
        return dataclasses.replace(self, dtypes=(self.dtype,) * len(self.dtypes))

    def flatten(self, tree: PyTree) -> Float[Array, " p"]:
        """Strings the leaves together; they must have the shapes of this space."""
        leaves = [jnp.asarray(x).astype(self.dtype) for x in jax.tree.leaves(tree)]
        if self.cuts is not None:
            return self.cuts.flattened(leaves)
        return jnp.concatenate([jnp.ravel(leaf) for leaf in leaves])

    def unflatten(self, vector: Float[Array, " p"]) -> PyTree:
        """Cuts a vector into a tree with the dtypes of the leaves."""
        leaves, start = [], 0
        if self.cuts is not None:
            leaves = self.cuts.leaves(vector, self.shapes)
        else:
            for shape in self.shapes:
                stop = start + math.prod(shape)
                leaves.append(vector[start:stop].reshape(shape))
                start = stop
        cast = [leaf.astype(dtype) for leaf, dtype in zip(leaves, self.dtypes)]
        return jax.tree.unflatten(self.structure, cast)


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


def laid_out(space: Space, like: PyTree) -> Space:
    """Lets the flat vectors lie over devices as the leaves of ``like`` do.

    Their entries then stand device by device, with zeros among them (``length``).
    """
    return dataclasses.replace(space, cuts=cuts_of(like))


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
    vector = draw(key, (space.size,), space.dtype)
    if space.cuts is None:
        return vector
    # The same tree, wherever its leaves lie.
    whole = dataclasses.replace(space.wide, cuts=None)
    return space.flatten(whole.unflatten(vector))


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
