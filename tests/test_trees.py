"""Holes: filled, punched, and seen."""

import jax.numpy as jnp
import optax
import pytest

from jaxlab import trees

FULL = {"a": jnp.ones(2), "b": {"c": jnp.ones(3), "d": jnp.ones(4)}}
HOLES = {"a": optax.MaskedNode(), "b": {"c": jnp.zeros(3), "d": optax.MaskedNode()}}
BIG_HOLE = {"a": jnp.zeros(2), "b": optax.MaskedNode()}


@pytest.mark.parametrize("holes", [HOLES, BIG_HOLE])
def test_fill_then_punch_is_the_identity(holes):
    assert trees.has_holes(holes)
    filled = trees.fill_holes(holes, FULL)
    assert not trees.has_holes(filled)
    again = trees.punch_holes(filled, holes)
    assert optax.tree.norm(optax.tree.sub(again, holes)) == 0


def test_filled_leaves_come_from_the_full_tree():
    filled = trees.fill_holes(HOLES, FULL)
    assert filled["a"].sum() == 2
    assert filled["b"]["c"].sum() == 0
    assert filled["b"]["d"].sum() == 4


def test_full_trees_pass_through():
    assert trees.fill_holes(FULL, FULL)["a"] is FULL["a"]
    assert not trees.has_holes({})


def test_other_differences_are_errors():
    with pytest.raises(ValueError, match="key"):
        trees.fill_holes({"a": optax.MaskedNode()}, FULL)
