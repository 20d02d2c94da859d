"""Pytree operations that ``optax.tree`` lacks: the holes of masked trees.

``optax.masked`` and ``optax.partition`` show a transformation a tree in which whole
leaves or sub-trees are :class:`optax.MaskedNode`. A function of the full tree then
needs the holes filled, and its result the same holes punched.
"""

import jax
import optax
from jaxtyping import PyTree

__all__ = ["fill_holes", "has_holes", "punch_holes"]


def has_holes(tree: PyTree) -> bool:
    """Tells whether a tree has ``optax.MaskedNode`` in it.

    Args:
      tree: any pytree.

    Returns:
      True where at least one leaf or sub-tree is masked away.

    Examples:
      >>> import optax
      >>> has_holes({"a": jnp.ones(2), "b": optax.MaskedNode()})
      True
    """
    return any(map(_is_hole, jax.tree.leaves(tree, is_leaf=_is_hole)))


def fill_holes(tree: PyTree, full: PyTree) -> PyTree:
    """Fills the ``optax.MaskedNode`` holes of a tree from a full one.

    Args:
      tree: a tree like ``full``, with holes in place of leaves or sub-trees.
      full: gives what stands in the holes.

    Returns:
      A tree of the structure of ``full``.

    Raises:
      ValueError: if the trees differ in more than the holes.

    Examples:
      >>> import optax
      >>> fill_holes({"a": 1, "b": optax.MaskedNode()}, {"a": 5, "b": {"c": 6}})
      {'a': 1, 'b': {'c': 6}}
    """
    fill = lambda leaf, rest: rest if _is_hole(leaf) else leaf
    return jax.tree.map(fill, tree, full, is_leaf=_is_hole)


def punch_holes(full: PyTree, tree: PyTree) -> PyTree:
    """Punches into a full tree the ``optax.MaskedNode`` holes of another.

    Args:
      full: a tree without holes.
      tree: a tree like ``full`` with holes; its other leaves are not read.

    Returns:
      The leaves of ``full`` with the holes of ``tree``.

    Raises:
      ValueError: if the trees differ in more than the holes.

    Examples:
      >>> import optax
      >>> punch_holes({"a": 5, "b": {"c": 6}}, {"a": 1, "b": optax.MaskedNode()})
      {'a': 5, 'b': MaskedNode()}
    """
    punch = lambda leaf, rest: leaf if _is_hole(leaf) else rest
    return jax.tree.map(punch, tree, full, is_leaf=_is_hole)


def _is_hole(node) -> bool:
    return isinstance(node, optax.MaskedNode)
