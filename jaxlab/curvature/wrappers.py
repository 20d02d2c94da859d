"""Operators made of others: a block, a change of scale, a shift."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, PyTree

from jaxlab._checks import check_number
from jaxlab._norms import wide
from jaxlab.curvature._options import as_pytree
from jaxlab.curvature._partwise import Partwise, Streamed
from jaxlab.curvature._vectors import Operator, is_host, prepared
from jaxlab.trees import punch_holes

Path = Any  # a key, or a tuple of keys


def block_operator(operator: Operator, path: Path, *, like: PyTree = None) -> Operator:
    """Restricts an operator to one leaf or sub-tree of the parameters.

    For a Hessian, Gauss-Newton or Fisher operator the other parameters become
    constants, which makes products cheaper; any other operator is given a tree with
    zeros elsewhere. For a choice that is no sub-tree give the operator trees with
    ``optax.MaskedNode()`` in place of the rest.

    Args:
      operator: on trees like the parameters.
      path: where the block stands: a key or index such as ``"w1"``, a tuple of them
        from the root down such as ``("layers", 0, "kernel")``, or a path of
        ``jax.tree_util.tree_leaves_with_path``. The key of an attribute is its name.
      like: tree that the operator acts on; only for an operator that does not know its
        parameters, such as a ``jax.tree_util.Partial``.

    Returns:
      An operator on trees like that sub-tree: ``params["layers"][0]["kernel"]``.

    Raises:
      ValueError: if nothing stands at the path, or ``like`` is missing.

    Examples:
      >>> from jaxlab.curvature.hessian import hessian_operator
      >>> loss_fn = lambda p: jnp.sum(p["a"] ** 2) * p["b"]
      >>> params = {"a": jnp.ones(2), "b": jnp.array(3.0)}
      >>> operator = block_operator(hessian_operator(loss_fn, params), "a")
      >>> operator(jnp.ones(2))
      Array([6., 6.], dtype=float32)
    """
    name = "block_operator"
    path = path if isinstance(path, tuple) else (path,)
    path = tuple(_plain_key(entry) for entry in path)
    params = getattr(operator, "params", None)
    params = like if params is None else params
    if params is None:
        raise ValueError(
            f"{name}: this operator does not know its parameters; pass like=, a tree "
            "that it acts on."
        )
    block = _taken(name, params, path)
    if isinstance(operator, (Partwise, Streamed)):
        whole = operator.operator if isinstance(operator, Streamed) else operator
        return operator.on(_Placed(whole.function, params, path), block)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    leaves, structure = jax.tree.flatten(shapes)
    return _Block(as_pytree(operator), path, (structure, tuple(leaves)))


def preconditioned_operator(operator: Operator, scale: PyTree) -> Operator:
    """Makes ``D^(-1/2) A D^(-1/2)`` of A, with a diagonal D.

    With D the denominator of Adam, its largest eigenvalue is the sharpness that bounds
    the learning rate there.

    Args:
      operator: A, symmetric, on trees like the parameters.
      scale: the diagonal of D, a tree like them with positive entries, such as
        ``jax.tree.map(lambda nu: jnp.sqrt(nu) + eps, second_moments)``.

    Returns:
      An operator on the same trees.

    Raises:
      ValueError: if ``scale`` is another tree; from the operator.

    Examples:
      >>> operator = jax.tree_util.Partial(jnp.multiply, jnp.array([4.0, 9.0]))
      >>> preconditioned_operator(operator, jnp.array([4.0, 1.0]))(jnp.ones(2))
      Array([1., 9.], dtype=float32)
    """
    return _Preconditioned(as_pytree(operator), jax.tree.map(jnp.asarray, scale))


def damped_operator(operator: Operator, damping: ArrayLike) -> Operator:
    """Makes ``A + damping I`` of A.

    Args:
      operator: A, on trees like the parameters.
      damping: a scalar, >= 0; may be traced.

    Returns:
      An operator on the same trees.

    Raises:
      ValueError: if ``damping`` is a negative number or no scalar.

    Examples:
      >>> operator = jax.tree_util.Partial(jnp.multiply, jnp.array([4.0, 9.0]))
      >>> damped_operator(operator, 1.0)(jnp.ones(2))
      Array([ 5., 10.], dtype=float32)
    """
    name = "damped_operator"
    check_number(name, "finite and >= 0", damping=damping)
    return _Damped(as_pytree(operator), jnp.asarray(damping))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Wrapper:
    operator: Any

    @property
    def host(self) -> bool:
        return is_host(self.operator)

    @property
    def params(self) -> PyTree:
        return getattr(self.operator, "params", None)

    def linearize(self) -> Operator:
        return dataclasses.replace(self, operator=prepared(self.operator))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Preconditioned(_Wrapper):
    scale: PyTree

    def __call__(self, v: PyTree) -> PyTree:
        return self._divided(self.operator(self._divided(v)))

    def quadratic_form(self, v: PyTree) -> Float[Array, ""]:
        return _form(self.operator, self._divided(v))

    def _divided(self, v: PyTree) -> PyTree:
        name, v = "preconditioned_operator", jax.tree.map(jnp.asarray, v)
        try:
            scale = punch_holes(self.scale, v)
        except ValueError:
            scale = None
        if jax.tree.structure(scale) != jax.tree.structure(v):
            raise ValueError(
                f"{name}: scale must be a tree like the parameters, "
                f"{jax.tree.structure(v)}; got {jax.tree.structure(self.scale)}."
            )

        def divided(d, x):
            if d.shape != x.shape:
                raise ValueError(
                    f"{name}: scale must have the shapes of the parameters, got "
                    f"{d.shape} instead of {x.shape}."
                )
            return (wide(x) / jnp.sqrt(wide(d))).astype(x.dtype)

        return jax.tree.map(divided, scale, v)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Damped(_Wrapper):
    damping: Any

    def __call__(self, v: PyTree) -> PyTree:
        shift = lambda a, x: (wide(a) + self._of(x) * wide(x)).astype(a.dtype)
        v = jax.tree.map(jnp.asarray, v)
        image = self.operator(v)
        _check_like("damped_operator", "the operator's image", image, v)
        return jax.tree.map(shift, image, v)

    def quadratic_form(self, v: PyTree) -> Float[Array, ""]:
        squares = [jnp.sum(wide(x) ** 2) for x in jax.tree.leaves(v)]
        return _form(self.operator, v) + self._of(squares[0]) * sum(squares)

    def _of(self, x: Array) -> Array:
        return self.damping.astype(wide(x).dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Block(_Wrapper):
    path: Path = dataclasses.field(metadata={"static": True})
    like: Any = dataclasses.field(metadata={"static": True})

    @property
    def params(self) -> PyTree:
        structure, leaves = self.like
        tree = jax.tree.unflatten(structure, leaves)
        return _taken("block_operator", tree, self.path)

    def __call__(self, v: PyTree) -> PyTree:
        structure, leaves = self.like
        try:
            block = punch_holes(self.params, v)
        except ValueError:
            block = self.params
        _check_like("block_operator", "the vector", v, block)
        zeros = [jnp.zeros(leaf.shape, leaf.dtype) for leaf in leaves]
        tree = _placed(jax.tree.unflatten(structure, zeros), self.path, v)
        return _taken("block_operator", self.operator(tree), self.path)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Placed:
    """A function of one block of the parameters; the others are constants."""

    function: Any
    params: PyTree
    path: Path = dataclasses.field(metadata={"static": True})

    def __call__(self, block: PyTree, *rest: Any) -> Any:
        return self.function(_placed(self.params, self.path, block), *rest)


def _check_like(name: str, what: str, found: PyTree, like: PyTree) -> None:
    described = lambda tree: (
        f"{jax.tree.structure(tree)} of shapes "
        f"{list(map(jnp.shape, jax.tree.leaves(tree)))}"
    )
    if described(found) != described(like):
        raise ValueError(
            f"{name}: {what} must be a tree {described(like)}, got {described(found)}."
        )


def _form(operator, v):
    form = getattr(operator, "quadratic_form", None)
    if form is not None:
        return form(v)
    dot = lambda x, y: jnp.sum(wide(x) * wide(y))
    return sum(jax.tree.leaves(jax.tree.map(dot, operator(v), v)))


def _plain_key(entry: Any) -> Any:
    for attribute in ("key", "idx", "name"):
        if hasattr(entry, attribute):
            return getattr(entry, attribute)
    return entry


def _children(node):
    """Gives the children of a node by key, and what rebuilds it."""
    below = lambda other: other is not node
    found, structure = jax.tree_util.tree_flatten_with_path(node, is_leaf=below)
    named = {_plain_key(path[0]): child for path, child in found if path}
    return named, structure


def _taken(name: str, tree: PyTree, path: Path) -> PyTree:
    for depth, key in enumerate(path):
        children, _ = _children(tree)
        if key not in list(children):
            raise ValueError(
                f"{name}: nothing stands at {key!r} of the path {path}; at "
                f"{path[:depth]} there are {list(children)}."
            )
        tree = children[key]
    return tree


def _placed(tree: PyTree, path: Path, block: PyTree) -> PyTree:
    if not path:
        return block
    children, structure = _children(tree)
    children[path[0]] = _placed(children[path[0]], path[1:], block)
    return structure.unflatten(list(children.values()))
