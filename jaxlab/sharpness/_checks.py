"""What the methods of this room refuse, each in the same words."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from jaxlab import trees
from jaxlab._array_checks import check_floating
from jaxlab._checks import check_number


def check_numbers(name: str, **numbers: Any) -> None:
    """Refuses what is no number of its kind: radii below 0, an eps that is not > 0.

    Schedules pass.
    """
    needs = {"alpha": "finite", "eps": "finite and > 0", "probability": "in [0, 1]"}
    for word, number in numbers.items():
        need = needs.get(word, "finite and >= 0")
        check_number(name, need, schedule=True, **{word: number})


def check_tree(name: str, params: PyTree, argument: str = "params") -> None:
    """Refuses empty trees and leaves that are not floating."""
    if not jax.tree.leaves(params) and not trees.has_holes(params):
        raise ValueError(
            f"{name}: {argument} must hold at least one array, got {params}."
        )
    check_floating(name, argument, params)


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
    """Checks that a gradient is a tree like params; gives JAX arrays."""
    if jax.tree.structure(found) != jax.tree.structure(params):
        raise ValueError(
            f"{name}: grad_fn must return a tree like params, got structure "
            f"{jax.tree.structure(found)} instead of {jax.tree.structure(params)} "
            "(a function that returns (value, grads) is not a grad_fn)."
        )
    check_floating(name, "the gradient", found)
    return jax.tree.map(jnp.asarray, found)
