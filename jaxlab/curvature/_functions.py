"""Losses and models as pytrees: what operators hold, so that jit can take them.

A plain function is static; a callable pytree (``jax.tree_util.Partial``, a registered
dataclass) keeps its arrays as leaves. Both share a trace where they compare equal.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax.tree_util import Partial, register_dataclass
from jaxtyping import PyTree

from jaxlab.objective import Batch, Objective
from jaxlab.trees import fill_holes

Function = Callable[..., Any]


def is_leaf(thing: Any) -> bool:
    """Tells whether jit would take an object for an array."""
    leaves = jax.tree.leaves(thing)
    return len(leaves) == 1 and leaves[0] is thing


def as_function(function: Function) -> Function:
    """Makes a callable a pytree, unless it is one already."""
    return Partial(function) if is_leaf(function) else function


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Held:
    """Keeps an object as its leaves, and what rebuilds it.

    So it need not exist while the leaves are something else than arrays.
    """

    leaves: Any
    rest: Any = dataclasses.field(metadata={"static": True})


def hold(thing: Any) -> Held:
    """Makes any object a pytree; :func:`held` gives it back.

    One that is no pytree must be hashable and becomes static.
    """
    if is_leaf(thing):
        return Held(None, thing)
    return Held(*jax.tree.flatten(thing))


def held(kept: Held) -> Any:
    """Gives back what :func:`hold` was given."""
    if kept.leaves is None:
        return kept.rest
    return jax.tree.unflatten(kept.rest, kept.leaves)


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Filled:
    """A function of the leaves that are not masked; the others are constants."""

    function: Any
    params: PyTree

    def __call__(self, kept: PyTree, *rest: Any) -> Any:
        return self.function(fill_holes(kept, self.params), *rest)


@register_dataclass
@dataclasses.dataclass(frozen=True)
class ObjectiveLoss:
    """The loss ``(params, batch) -> scalar`` of an objective with a fixed state."""

    objective: Any
    state: PyTree
    key: Any
    train: bool = dataclasses.field(metadata={"static": True})

    def __call__(self, params: PyTree, batch: Batch) -> Any:
        options = {"key": self.key, "train": self.train}
        return held(self.objective).loss(params, self.state, batch, **options)[0]


@register_dataclass
@dataclasses.dataclass(frozen=True)
class ObjectiveOutputs:
    """The model ``(params, inputs) -> outputs`` of an objective with a fixed state."""

    objective: Any
    state: PyTree
    key: Any
    train: bool = dataclasses.field(metadata={"static": True})

    def __call__(self, params: PyTree, inputs: PyTree) -> Any:
        apply_fn, options = held(self.objective).apply_fn, {"key": self.key}
        return apply_fn(params, self.state, inputs, train=self.train, **options)[0]


def functions_of(
    objective: Objective, *, state: PyTree = (), key: Any = None, train: bool = False
) -> tuple[ObjectiveLoss, ObjectiveOutputs]:
    """Gives the loss and the model of an objective, as the operators take them.

    With ``train=False`` statistics are frozen and dropout is off, so that the operators
    are one fixed matrix; with a key the same noise is drawn for every product.
    """
    fixed = (hold(objective), state, key, train)
    return ObjectiveLoss(*fixed), ObjectiveOutputs(*fixed)
