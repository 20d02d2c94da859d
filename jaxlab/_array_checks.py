"""What public functions refuse of arrays: leaves, dtypes, shapes of fields."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from jaxlab._checks import check_made, described


def check_arrays(name: str, argument: str, tree: PyTree) -> None:
    """Refuses leaves without a shape and a dtype, as a string or a Python number.

    Raises:
      ValueError: naming the leaf.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
            raise ValueError(
                f"{name}: {argument} must be a tree of arrays, got {described(leaf)} "
                f"at {argument}{jax.tree_util.keystr(path)}."
            )


def check_fields(
    name: str, argument: str, value: Any, kind: type, maker: str, **shapes: str
) -> Any:
    """Refuses what another function of ours did not make; gives it with JAX arrays.

    Args:
      name: of the function, for the message.
      argument: its argument.
      value: a named tuple or a dataclass.
      kind: its type.
      maker: the function that makes it.
      **shapes: of some of the fields by letters, as in annotations: ``"n d"``, ``""``
        for a scalar, ``"*stack n d"``.

    Raises:
      ValueError: naming the shapes.
    """
    check_made(name, argument, value, kind, maker)
    arrays = {field: jnp.asarray(getattr(value, field)) for field in shapes}
    found, sizes, fits = {f: a.shape for f, a in arrays.items()}, {}, True
    for field, shape in found.items():
        letters = shapes[field].split()
        if letters and letters[0].startswith("*"):
            last = len(shape) - len(letters) + 1
            shape = (shape[:last], *shape[last:]) if last >= 0 else ()
        fits = fits and len(letters) == len(shape)
        for letter, size in zip(letters, shape, strict=False):
            fits = fits and sizes.setdefault(letter, size) == size
    if not fits:
        needed = ", ".join(f"{field} ({shapes[field]})" for field in shapes)
        raise ValueError(
            f"{name}: the arrays of {argument} must have the shapes {needed}, one size "
            f"for each letter, got {found}; {maker} makes them."
        )
    replace = getattr(value, "_replace", functools.partial(dataclasses.replace, value))
    return replace(**arrays)


def check_floating(name: str, argument: str, tree: PyTree) -> None:
    """Refuses leaves that are not floating.

    Raises:
      ValueError: naming the leaf.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        kind = jnp.result_type(leaf)
        if not jnp.issubdtype(kind, jnp.floating):
            raise ValueError(
                f"{name}: {argument} must have floating leaves, got {kind} at "
                f"{argument}{jax.tree_util.keystr(path)}; keep others out of the tree "
                "(equinox.partition, nnx.split(model, nnx.Param, ...))."
            )
