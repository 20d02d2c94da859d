"""A link that acts on some steps only: every k-th, or each with a probability.

The second gradient of a sharpness-aware method is then taken on those steps alone;
on the others the gradient passes through unchanged and the link's state rests, so its
schedules count the steps on which it acted. The choice is a ``lax.cond``: under
``vmap`` both branches run.
References: the hybrid mode of the authors' code of Zhao, Zhang and Hu, ICML 2022;
Zhao et al., "When Will Gradient Regularization Be Harmful?", ICML 2024.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Int, PyTree

from jaxlab._chains import check_inner
from jaxlab._checks import check_count
from jaxlab.curvature._layouts import for_branches
from jaxlab.sharpness._checks import check_numbers
from jaxlab.sharpness._links import at_step


class SometimesState(NamedTuple):
    """State of :func:`periodic` and :func:`hybrid`: all steps, and the link's own.

    Examples:
      >>> import optax
      >>> int(periodic(optax.scale(2.0), 2).init(jnp.ones(2)).count)
      0
    """

    count: Int[Array, ""]
    inner: PyTree


def periodic(
    transformation: optax.GradientTransformation, every: int
) -> optax.GradientTransformationExtraArgs:
    """Applies a link on every k-th step, the first included.

    Args:
      transformation: what to apply, for example ``sam(0.1)``.
      every: the period in steps, >= 1; static.

    Returns:
      A transformation that hands all extra arguments on.

    Raises:
      ValueError: if ``every`` is not an integer >= 1 or ``transformation`` is none.

    Examples:
      >>> import optax
      >>> tx, w = periodic(optax.scale(2.0), 2), jnp.ones(1)
      >>> state = tx.init(w)
      >>> one, state = tx.update(w, state)
      >>> two, state = tx.update(w, state)
      >>> one.tolist(), two.tolist()
      ([2.0], [1.0])
    """
    check_count("periodic", every=every)
    act = lambda count, extra: (count % every == 0, extra)
    return _sometimes("periodic", transformation, act)


def hybrid(
    transformation: optax.GradientTransformation,
    probability: ArrayLike | Callable[..., Any] = 0.5,
) -> optax.GradientTransformationExtraArgs:
    """Applies a link on each step with a probability.

    Args:
      transformation: what to apply, for example ``sam(0.1)``.
      probability: in [0, 1], or a schedule over all steps.

    Returns:
      A transformation whose ``update`` needs ``key=``, a fresh typed key for each
      step; ``transformation`` gets another one made from it, and all extra arguments.

    Raises:
      ValueError: if ``probability`` is out of range or ``transformation`` is none;
        from ``update``, if ``key`` is missing.

    Examples:
      >>> import optax
      >>> tx, w = hybrid(optax.scale(2.0), 1.0), jnp.ones(1)
      >>> tx.update(w, tx.init(w), key=jax.random.key(0))[0].tolist()
      [2.0]
    """
    check_numbers("hybrid", probability=probability)

    def act(count, extra):
        if extra.get("key") is None:
            raise ValueError(
                "hybrid needs key=: call update(..., key=key) with a fresh "
                "jax.random.key for each step (make_train_step passes one)."
            )
        mine, other = jax.random.split(extra["key"])
        chance = at_step(probability, count)
        return jax.random.bernoulli(mine, chance), extra | {"key": other}

    return _sometimes("hybrid", transformation, act)


def _sometimes(name, transformation, act):
    if not (hasattr(transformation, "init") and hasattr(transformation, "update")):
        raise ValueError(
            f"{name}: transformation must be an optax transformation, got "
            f"{type(transformation).__name__}."
        )
    link = optax.with_extra_args_support(transformation)

    def init(params):
        inside = link.init(params)
        check_inner(name, inside)
        return SometimesState(jnp.zeros((), jnp.int32), inside)

    def update(updates, state, params=None, **extra_args):
        now, extra_args = act(state.count, extra_args)
        if extra_args.get("grad_fn") is not None:
            extra_args = extra_args | {"grad_fn": for_branches(extra_args["grad_fn"])}
        # Updates enter the branch by closure: an operand would be another array, and
        # the link could no longer tell them from what grad_fn gives.
        new, inside = jax.lax.cond(
            now,
            lambda: link.update(updates, state.inner, params, **extra_args),
            lambda: (updates, state.inner),
        )
        return new, SometimesState(optax.safe_increment(state.count), inside)

    return optax.GradientTransformationExtraArgs(init, update)
