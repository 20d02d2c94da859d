"""What may stand where in a chain of transformations, read from its state.

``optax.chain`` joins anything with anything. A state of this package says as ``place``
what its link does to updates; states of optax's optimizers are known by their running
means. What leaves nothing in the state, such as ``optax.sgd`` without momentum, cannot
be seen.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import optax
from jaxtyping import PyTree


class Place(NamedTuple):
    """What a link does to updates.

    Attributes:
      link: its name.
      does: "samples" (makes Langevin steps), "steps" (makes steps), "inverse"
        (multiplies by an inverse Fisher), "power" (scales by the weights), "noise"
        (adds noise from the step's key), "mean" (keeps a running mean, as optimizers
        of optax do).
    """

    link: str
    does: str


# Fields of optax's states that hold a running mean of gradients or of their squares.
_MEANS = {"mu", "nu", "trace", "v_row", "ema"}
_CHANGED = {"samples", "steps", "inverse", "power", "mean"}


def check_chain(state: PyTree) -> None:
    """Refuses chains of which no use is right.

    Args:
      state: of an optimizer; arrays, shapes or tracers.

    Raises:
      ValueError: that begins with the name of the link that must not stand there.

    Examples:
      >>> import optax
      >>> check_chain(optax.adamw(1e-3).init(0.0))
    """
    for chain in _chains(state):
        for index, group in enumerate(chain):
            before = [place for other in chain[:index] for place in other]
            behind = [place for other in chain[index + 1 :] for place in other]
            for place in group:
                _check_place(place, before, behind, last=index + 1 == len(chain))


def check_inner(name: str, state: PyTree) -> None:
    """Refuses optimizers inside a link that acts on some steps only.

    Raises:
      ValueError: if a part of the state belongs to what makes steps.

    Examples:
      >>> import optax
      >>> check_inner("periodic", optax.clip(1.0).init(0.0))
    """
    for link, does in _links(state):
        if does in {"samples", "steps", "mean"}:
            raise ValueError(
                f"{name}: transformation must turn gradients into gradients, as sam "
                f"does, and {link} makes steps of them: on the other steps the bare "
                "gradient would be added to the parameters. Put the optimizer behind."
            )


def _links(state: Any) -> Iterator[Place]:
    """Yields the links that tell of themselves, in their order."""
    if place := getattr(state, "place", None):
        yield place
    elif _MEANS & set(getattr(state, "_fields", ())):
        yield Place(f"optax's {type(state).__name__}", "mean")
    for inner in _parts(state):
        yield from _links(inner)


def _check_place(
    place: Place, before: list[Place], behind: list[Place], *, last: bool
) -> None:
    link, does = place
    changed = next((other.link for other in before if other.does in _CHANGED), None)
    if does == "samples" and not last:
        other = behind[0].link if behind else "another link"
        raise ValueError(
            f"{link} must stand last in its chain: what it returns is the step itself, "
            f"and {other} behind it would change the law that is sampled. Put what "
            "acts on gradients in front."
        )
    if does == "samples" and changed:
        raise ValueError(
            f"{link} needs the gradient, and {changed} in front of it makes something "
            "else of it: the drift would be scaled and the noise not. Leave one of the "
            "two out; by optax.partition different leaves have different optimizers."
        )
    if does == "inverse" and changed:
        raise ValueError(
            f"{link} needs the gradient, for its model of the loss, and {changed} in "
            "front of it makes something else of it. Put momentum behind it and leave "
            "other optimizers out."
        )
    made = next((other.link for other in before if other.does == "steps"), None)
    if does == "mean" and made:
        raise ValueError(
            f"{made} makes the step itself, and {link} behind it is a second "
            "optimizer. Leave one out, or chain scale_by_fishleg with optax.trace and "
            "optax.scale_by_learning_rate."
        )
    if does == "noise" and place in before:
        raise ValueError(
            f"{link} stands twice in a chain, and both would draw the same numbers "
            "from the step's key. Give one of them a key of its own: "
            f"{link}(key=jax.random.key(0))."
        )


def _chains(state: Any) -> Iterator[list[list[Place]]]:
    """Yields what is chained; what ``optax.masked`` holds forms a chain of its own."""
    apart: list[Any] = []
    yield list(_together(state, apart))
    for inner in apart:
        yield from _chains(inner)


def _together(state: Any, apart: list[Any]) -> Iterator[list[Place]]:
    """Yields for each link what it does; a partition is one link that may do much."""
    if isinstance(state, optax.MaskedState):
        apart.append(state.inner_state)
    elif isinstance(state, optax.transforms.PartitionState):
        apart.extend(inner.inner_state for inner in state.inner_states.values())
        yield list(_links(state))
    elif parts := _parts(state):
        for part in parts:
            yield from _together(part, apart)
    else:
        yield list(_links(state))


def _parts(state: Any) -> list[Any]:
    """Gives the states inside a state: of a chain, or of what wraps one."""
    if type(state) in (tuple, list):
        return list(state)
    if isinstance(state, dict):  # of named_chain, or the parts of a partition
        return list(state.values())
    fields = getattr(state, "_fields", ())
    return [getattr(state, name) for name in fields if name.startswith("inner")]
