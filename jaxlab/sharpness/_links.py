"""What the links of this room ask of ``update``, and how they find out."""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import optax
from jaxtyping import PyTree

from jaxlab import trees
from jaxlab._array_checks import check_floating
from jaxlab.sharpness._checks import like


def checked_grad_fn(
    name: str,
    updates: PyTree,
    params: PyTree | None,
    grad_fn: Callable[..., Any] | None,
    grad: PyTree | None,
) -> Callable[[PyTree], PyTree]:
    """Checks what a link was handed; gives ``grad_fn`` with its result checked.

    The link mixes ``updates`` with a second gradient, so ``updates`` must be this
    step's gradient of ``grad_fn``'s function itself. A running mean of ``MultiSteps``
    or a clipped gradient is another array than ``grad``: seen at trace time.
    """
    if params is None:
        raise ValueError(f"{name}: call update(grads, state, params, ...) with params.")
    missing = [
        f"{word}=" for word, it in (("grad_fn", grad_fn), ("grad", grad)) if it is None
    ]
    if grad_fn is None or grad is None:
        raise ValueError(
            f"{name} needs {' and '.join(missing)}: call update(grads, state, params, "
            "grad_fn=jax.grad(loss), grad=grads) (nnx.Optimizer.update takes the same "
            "keywords; jaxlab.training.make_train_step passes them). A plain "
            "optax.MultiSteps inside a chain drops them: wrap it with "
            "jaxlab.training.with_extra_args. So does apply_gradients of Flax's "
            "TrainState: use the subclass in docs/start/own_loop.md."
        )
    try:
        seen = trees.punch_holes(grad, updates)
    except ValueError:
        seen = grad
    if jax.tree.structure(seen) != jax.tree.structure(updates):
        raise ValueError(
            f"{name}: grad must be a tree like updates, got structure "
            f"{jax.tree.structure(grad)} instead of {jax.tree.structure(updates)}."
        )
    pairs = zip(jax.tree.leaves(updates), jax.tree.leaves(seen), strict=True)
    if any(one is not two for one, two in pairs):
        raise ValueError(
            f"{name}: updates are not the leaves of grad, so something changed the "
            "gradient first and another quantity would be computed. Make it the first "
            "link of its chain and keep it outside optax.MultiSteps (put MultiSteps "
            "around the links behind it, or accumulate inside the step: "
            "jaxlab.sharpness.full_batch_value_and_grad, make_train_step(..., "
            "accumulate=k))."
        )
    check_floating(name, "updates", updates)
    holes = trees.has_holes(updates)

    def checked(at: PyTree) -> PyTree:
        try:
            found = grad_fn(at)
        except Exception as error:
            if not holes:
                raise
            raise ValueError(
                f"{name} stands inside optax.masked or optax.partition and grad_fn "
                "failed on a tree with holes (optax.MaskedNode). Pass a grad_fn that "
                "fills them (jaxlab.trees.fill_holes and punch_holes; "
                "jaxlab.training.make_train_step does), or use mask= instead."
            ) from error
        return like(name, found, updates)

    return checked


def at_step(value: optax.ScalarOrSchedule, count: Any) -> jax.typing.ArrayLike:
    """Gives a hyperparameter's value at a step."""
    return value(count) if callable(value) else value


# What may follow a schedule; everything else that a link is made from is static.
_HYPERPARAMETERS = {"alpha", "eps", "probability", "radius", "rho", "strength"}


def static_args(link: Callable[..., Any]) -> tuple[str, ...]:
    """Names the arguments of a link that ``inject_hyperparams`` must leave alone.

    Args:
      link: one of ``gradient_norm_penalty``, ``sam``, ``asam``, ``look_sam``,
        ``periodic``, ``hybrid``.

    Returns:
      For ``optax.inject_hyperparams(link, static_args=static_args(link))``: sizes,
      masks, names and the transformation inside. The others may be schedules.

    Raises:
      ValueError: if it is given what such a function returns.

    Examples:
      >>> from jaxlab.sharpness import look_sam
      >>> static_args(look_sam)
      ('every', 'mask')
    """
    if not callable(link):
        raise ValueError(
            "static_args: link must be the function that makes it, as in "
            f"static_args(sam), got {type(link).__name__}."
        )
    names = inspect.signature(link).parameters
    return tuple(name for name in names if name not in _HYPERPARAMETERS)
