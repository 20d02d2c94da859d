"""What the methods of this room refuse, each in the same words."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jaxlab import trees


def check_numbers(name: str, **numbers: Any) -> None:
    """Refuses Python numbers that are NaN, radii below 0, an eps that is not > 0."""
    for word, number in numbers.items():
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            continue
        if word == "alpha":
            good, need = math.isfinite(number), "finite"
        elif word == "eps":
            good, need = math.isfinite(number) and number > 0, "> 0"
        elif word == "probability":
            good, need = 0 <= number <= 1, "in [0, 1]"
        else:
            good, need = math.isfinite(number) and number >= 0, "finite and >= 0"
        if not good:
            raise ValueError(f"{name}: {word} must be {need}, got {number}.")


def check_count(name: str, argument: str, count: Any) -> None:
    """Refuses what is no integer >= 1."""
    integer = isinstance(count, (int, np.integer)) and not isinstance(count, bool)
    if not integer or count < 1:
        array = isinstance(count, jax.Array)  # as optax.inject_hyperparams makes it
        hint = "; it is static, so name it in static_args=" if array else ""
        raise ValueError(
            f"{name}: {argument} must be an integer >= 1, got {count!r}{hint}."
        )


def check_tree(name: str, params: PyTree, argument: str = "params") -> None:
    """Refuses empty trees and leaves that are not floating."""
    if not jax.tree.leaves(params) and not trees.has_holes(params):
        raise ValueError(
            f"{name}: {argument} must hold at least one array, got {params}."
        )
    check_floating(name, params, argument)


def check_floating(name: str, params: PyTree, argument: str) -> None:
    """Refuses leaves that are not floating."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        kind = jnp.result_type(leaf)
        if not jnp.issubdtype(kind, jnp.floating):
            raise ValueError(
                f"{name}: {argument} must have floating leaves, got {kind} at "
                f"{argument}{jax.tree_util.keystr(path)}; keep others out of the tree "
                "(equinox.partition, nnx.split(model, nnx.Param, ...))."
            )


def check_alike(
    name: str, argument: str, tree: PyTree, *, hint: str = "", **others: PyTree
) -> None:
    """Refuses trees of another structure or other shapes."""
    described = lambda t: (
        f"{jax.tree.structure(t)} of shapes {list(map(jnp.shape, jax.tree.leaves(t)))}"
    )
    for other, found in others.items():
        if described(found) != described(tree):
            raise ValueError(
                f"{name}: {other} must be a tree like {argument}, {described(tree)}, "
                f"got {described(found)}{hint}."
            )


def like(name: str, found: PyTree, params: PyTree) -> PyTree:
    """Checks that a gradient is a tree like params."""
    if jax.tree.structure(found) != jax.tree.structure(params):
        raise ValueError(
            f"{name}: grad_fn must return a tree like params, got structure "
            f"{jax.tree.structure(found)} instead of {jax.tree.structure(params)} "
            "(a function that returns (value, grads) is not a grad_fn)."
        )
    return found
