"""FishLeg as an optax transformation: natural-gradient steps with a learnt inverse.

Each step multiplies the gradient g by Q, an approximation of (F + gamma)^-1 that is
learnt beside the parameters, and goes as far along d = Q g as the quadratic model says:

    theta <- theta - lr alpha d,   alpha = g.d / (d.F d + gamma ||d||^2).

The model's decrease ``alpha g.d / 2`` is held to four times the largest of the steps
before, which fades by a tenth with each: after a jump of the loss the step is shorter.
Q starts as a multiple of the identity. An auxiliary step, at every step at first and at
every tenth later, moves its factors towards the minimum of the auxiliary loss: by the
group step (:mod:`.group`; the default, a variant of ours) or by Adam as in the paper
(:mod:`.auxiliary`). The paper's update has a fixed step length, ``step="fixed"``; with
Adam its early progress is that of a first-order method.
References: Garcia, Freddi, Fotiadis, Li, Vakili, Bernacchia and Hennequin,
"Fisher-Legendre (FishLeg) Optimization of Deep Neural Networks", ICLR 2023; Martens,
Grosse, "Optimizing Neural Networks with Kronecker-factored Approximate Curvature",
ICML 2015, for the step length of the quadratic model and its damping.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, PyTree

from jaxlab._array_checks import check_floating
from jaxlab._chains import Place
from jaxlab._checks import check_count, check_flag, check_number
from jaxlab._norms import all_finite, inner, wide, zeros_wide
from jaxlab.curvature._layouts import for_branches
from jaxlab.curvature._options import exact_products
from jaxlab.optimizers._links import DROPPED, check_alike
from jaxlab.optimizers.fisher_legendre.auxiliary import (
    Normalize,
    fishleg_auxiliary_gradient,
)
from jaxlab.optimizers.fisher_legendre.blocks import Rule, check_like, gather, scatter
from jaxlab.optimizers.fisher_legendre.factors import (
    InverseFisher,
    check_group,
    colour,
    q_init,
    whiten,
)
from jaxlab.optimizers.fisher_legendre.group import fishleg_group_step

_GROWTH = 4.0  # of the decrease of the model, over the largest of late
_FADING = 0.9  # of the largest of late, in a step

ScalarOrSchedule = ArrayLike | Callable[..., Any]


class LevenbergMarquardt(NamedTuple):
    """Damping that follows how well the quadratic model predicts the loss.

    After each step the loss at the new point is compared with the model's: the damping
    falls by ``factor`` where the loss fell by more than 3/4 of what the model said, and
    rises by ``1 / factor`` where it fell by less than 1/4.

    Attributes:
      initial: damping of the first step.
      factor: in (0, 1).
      floor: the damping is at least this; without one Q loses its fit.

    Examples:
      >>> LevenbergMarquardt().floor
      0.03
    """

    initial: float = 1.0
    factor: float = 0.95
    floor: float = 0.03


class FishLegState(NamedTuple):
    """State of :func:`scale_by_fishleg`.

    Attributes:
      count: steps taken.
      q: the inverse Fisher.
      auxiliary: state of the auxiliary optimizer; ``()`` with the group step.
      recent: earlier gradients, where more than one direction is one.
      damping: of this step where it adapts, else 0.
      fit: the auxiliary loss (Adam), or the mean of ``||rho||^2 / ||eps||^2`` (group)
        of the last auxiliary step, before it.
      skipped: auxiliary steps that were not finite and were not taken.
      decrease: of the quadratic model, the largest of recent steps.

    Examples:
      >>> state = scale_by_fishleg().init({"w": jnp.ones((2, 2))})
      >>> int(state.count), int(state.skipped)
      (0, 0)
    """

    count: Int[Array, ""]
    q: InverseFisher
    auxiliary: Any
    recent: tuple[PyTree, ...]
    damping: Float[Array, ""]
    fit: Float[Array, ""]
    skipped: Int[Array, ""]
    decrease: Float[Array, ""]

    place = Place("scale_by_fishleg", "inverse")


class _StepMade(NamedTuple):
    """State of the end of :func:`fishleg`: behind it there are steps."""

    place = Place("fishleg", "steps")


def scale_by_fishleg(
    *,
    aux_mode: Literal["group", "adam"] = "group",
    step: Literal["quadratic", "fixed"] = "quadratic",
    damping: ScalarOrSchedule | LevenbergMarquardt = 0.3,
    aux_step: ScalarOrSchedule | None = None,
    gradient_directions: int = 1,
    white_directions: int = 1,
    combine: bool | None = None,
    pre_aux_steps: ArrayLike = 20,
    dense_until: ArrayLike = 100,
    update_aux_every: ArrayLike = 10,
    init_scale: ArrayLike = 10.0,
    rule: Rule = None,
    max_size: int = 256,
    aux_optimizer: optax.GradientTransformation | None = None,
    normalize: Normalize = "gradient",
    precondition: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Multiplies gradients by a learnt inverse Fisher.

    ``update`` needs ``fisher_vp=``, an operator ``v -> F v`` at params and on this
    step's batch (``jaxlab.curvature.ggn_operator(apply_fn, likelihood, params,
    batch)``; the loss is a mean over rows), and, for white directions, ``key=``;
    :func:`jaxlab.training.make_train_step` passes both. What stands in front of it (a
    clipped, averaged or penalised gradient) is what it multiplies.

    An auxiliary step costs a product with the Fisher for each direction, the gradient
    and the white one counting as one where they are combined, and a few products with
    the factors; the quadratic step one forward-mode pass.

    Args:
      aux_mode: "group" or, as in the paper, "adam".
      step: "quadratic" scales ``Q g`` by the minimum of the quadratic model along it,
        or less where the model promises far more than it did lately; "fixed" leaves it
        as it is.
      damping: gamma, > 0, in the units of F: a number, a schedule, or
        :class:`LevenbergMarquardt`, which needs ``value=`` and ``value_fn=`` and the
        quadratic step.
      aux_step: mu of the group step, in (0, 1), or Adam's rate; ``None`` takes 0.25 or
        1e-3.
      gradient_directions: this step's gradient and so many less one before it.
      white_directions: random directions: signs after whitening ("group"), or
        u ~ N(0, I) ("adam").
      combine: as in :func:`fishleg_group_step`, with ``aux_mode="group"``; ``None``
        takes True there.
      pre_aux_steps: auxiliary steps in the first update, all on its batch. For other
        batches see :func:`fishleg_warm_start`.
      dense_until: steps before which every update has an auxiliary step.
      update_aux_every: the cadence after that.
      init_scale: Q starts as so many times the identity. With the quadratic step too
        large is better than too small; with a fixed one, times the learning rate it
        must be a safe rate of SGD.
      rule: kinds of blocks, as in :func:`q_init`.
      max_size: longest factor, as in :func:`q_init`.
      aux_optimizer: in place of Adam, with ``aux_mode="adam"``.
      normalize: of :func:`fishleg_auxiliary_gradient`, with ``aux_mode="adam"``.
      precondition: likewise.

    Returns:
      A transformation; ``update`` returns the direction, not yet negated.

    Raises:
      ValueError: for an option out of range, or one that has no effect; from
        ``update`` where an extra argument or params are missing.

    Examples:
      >>> params = {"w": jnp.array([4.0, 4.0])}
      >>> tx = scale_by_fishleg(damping=1.0, white_directions=0)
      >>> direction, _ = tx.update(
      ...     params, tx.init(params), params, fisher_vp=lambda v: v
      ... )
      >>> direction["w"].round(3)  # g / (F + damping)
      Array([2., 2.], dtype=float32)
    """
    name = "scale_by_fishleg"
    group = aux_mode == "group"
    check_number(name, "a number", pre_aux_steps=pre_aux_steps)
    _check_options(
        name,
        aux_mode=aux_mode,
        step=step,
        damping=damping,
        aux_step=aux_step,
        gradient_directions=gradient_directions,
        white_directions=white_directions,
        init_scale=init_scale,
    )
    if not group and combine is not None:
        raise ValueError(f'{name}: combine belongs to aux_mode="group".')
    combine = True if combine is None else combine
    check_flag(name, combine=combine)
    if group and (aux_optimizer is not None or precondition):
        raise ValueError(
            f'{name}: aux_optimizer and precondition belong to aux_mode="adam".'
        )
    if not group and aux_optimizer is not None and aux_step is not None:
        raise ValueError(f"{name}: aux_optimizer has its own rate; leave aux_step out.")
    adaptive = isinstance(damping, LevenbergMarquardt)
    mu = (0.25 if group else 1e-3) if aux_step is None else aux_step
    optimizer = optax.adam(mu) if aux_optimizer is None else aux_optimizer

    def init(params: PyTree) -> FishLegState:
        q = q_init(params, scale=init_scale, rule=rule, max_size=max_size)
        if group:
            check_group(name, q)
        first = damping.initial if isinstance(damping, LevenbergMarquardt) else 0.0
        return FishLegState(
            jnp.zeros((), jnp.int32),
            q,
            () if group else optimizer.init(q),
            tuple(zeros_wide(params) for _ in range(gradient_directions - 1)),
            jnp.asarray(first, jnp.float32),
            jnp.zeros((), jnp.float32),
            jnp.zeros((), jnp.int32),
            jnp.zeros((), jnp.float32),
        )

    def update(
        updates,
        state,
        params=None,
        *,
        fisher_vp=None,
        key=None,
        value=None,
        value_fn=None,
        **extra_args,
    ):
        _check_arguments(name, params, fisher_vp, key, white_directions)
        check_like(name, state.q.blocks, updates, "updates")
        check_alike(name, updates, params)
        check_floating(name, "updates", updates)
        if adaptive and (value is None or value_fn is None):
            raise ValueError(
                f"{name}: damping=LevenbergMarquardt() needs value= and value_fn= in "
                "update (jaxlab.training.make_train_step passes them)."
            )
        count = state.count
        gamma = state.damping if adaptive else _at(damping, count)
        gradients = (updates, *state.recent)[:gradient_directions]
        fisher_in_loop = for_branches(fisher_vp)

        def auxiliary(index, carry):
            q, opt_state, before, skipped = carry
            ours = None if key is None else jax.random.fold_in(key, index)
            if group:
                new, fit = fishleg_group_step(
                    ours,
                    q,
                    gradients,
                    fisher_in_loop,
                    damping=gamma,
                    step=_at(mu, count),
                    white_directions=white_directions,
                    combine=combine,
                    like=updates,
                )
            else:
                fit, slope = _mean_gradient(
                    ours,
                    q,
                    gradients,
                    fisher_in_loop,
                    white_directions,
                    updates,
                    damping=gamma,
                    normalize=normalize,
                    precondition=precondition,
                )
                moves, moved = optimizer.update(slope, opt_state, q)
                new = optax.apply_updates(q, moves)
            good = all_finite((new, fit))
            keep = lambda one, two: jnp.where(good, one, two)
            q = jax.tree.map(keep, new, q)
            if not group:
                opt_state = jax.tree.map(keep, moved, opt_state)
            fit = keep(fit.astype(jnp.float32), before)
            return q, opt_state, fit, skipped + (1 - good)

        dense = (count < dense_until) | (count % update_aux_every == 0)
        first = jnp.asarray(pre_aux_steps, jnp.int32)
        steps = jnp.where(count == 0, first, dense.astype(jnp.int32))
        carry = state.q, state.auxiliary, state.fit, state.skipped
        with jax.named_scope(name):
            q, opt_state, fit, skipped = jax.lax.fori_loop(0, steps, auxiliary, carry)
            # Products of matrices, one for each block: leaves are twice as many.
            gradient = gather(q.blocks, updates)
            along_q = colour(q, whiten(q, gradient))
            direction = scatter(q.blocks, along_q, updates)
            new_gamma, decrease = state.damping, state.decrease
            if step == "quadratic":
                along = inner(gradient, along_q)
                bend = _bend(direction, fisher_vp) + gamma * inner(along_q, along_q)
                length = jnp.where(bend > 0, along / jnp.where(bend > 0, bend, 1), 0.0)
                share, decrease = _trusted(0.5 * length * along, state.decrease)
                length = share * length
                direction = jax.tree.map(
                    lambda d: (length * d).astype(d.dtype), direction
                )
                if isinstance(damping, LevenbergMarquardt):
                    there = jax.tree.map(
                        lambda p, d: p - d.astype(p.dtype), params, direction
                    )
                    ratio = (value_fn(there) - value) / (
                        length * (0.5 * length * bend - along)
                    )
                    new_gamma = _adapted(damping, state.damping, ratio)
        recent = jax.tree.map(wide, gradients[: gradient_directions - 1])
        count = optax.safe_increment(count)
        return direction, FishLegState(
            count, q, opt_state, recent, new_gamma, fit, skipped, decrease
        )

    return optax.GradientTransformationExtraArgs(init, update)


def fishleg(
    learning_rate: ScalarOrSchedule | None = None,
    *,
    momentum: ArrayLike | None = None,
    weight_decay: ArrayLike = 0.0,
    aux_mode: Literal["group", "adam"] = "group",
    step: Literal["quadratic", "fixed"] = "quadratic",
    damping: ScalarOrSchedule | LevenbergMarquardt = 0.3,
    aux_step: ScalarOrSchedule | None = None,
    gradient_directions: int = 1,
    white_directions: int = 1,
    combine: bool | None = None,
    pre_aux_steps: ArrayLike = 20,
    dense_until: ArrayLike = 100,
    update_aux_every: ArrayLike = 10,
    init_scale: ArrayLike = 10.0,
    rule: Rule = None,
    max_size: int = 256,
    aux_optimizer: optax.GradientTransformation | None = None,
    normalize: Normalize = "gradient",
    precondition: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Optimizes by FishLeg: :func:`scale_by_fishleg` with decay, momentum and rate.

    Args:
      learning_rate: multiplies the step; ``None`` is 1 with ``step="quadratic"`` and
        must not be with ``step="fixed"``.
      momentum: decay of a running mean of the directions (not corrected for its start,
        as in the authors' code); ``None`` for none.
      weight_decay: w of a term ``w/2 ||theta||^2`` of the loss: it is in the gradient
        and, as damping, in the quadratic model. For decoupled decay chain
        ``optax.add_decayed_weights`` behind :func:`scale_by_fishleg`.
      aux_mode: as in :func:`scale_by_fishleg`, like all that follow.
      step: "quadratic" or "fixed".
      damping: gamma.
      aux_step: of the auxiliary steps.
      gradient_directions: gradients that Q is fitted to.
      white_directions: random directions that Q is fitted to.
      combine: add them to the gradients.
      pre_aux_steps: auxiliary steps in the first update.
      dense_until: steps with an auxiliary step each.
      update_aux_every: the cadence after them.
      init_scale: of Q.
      rule: kinds of blocks.
      max_size: longest factor.
      aux_optimizer: in place of Adam.
      normalize: with Adam.
      precondition: with Adam.

    Returns:
      A transformation that needs the extra arguments of :func:`scale_by_fishleg`.

    Raises:
      ValueError: as :func:`scale_by_fishleg`, or if the learning rate is missing.

    Examples:
      >>> params = {"w": jnp.array([4.0, 4.0])}
      >>> tx = fishleg(damping=1.0, white_directions=0)
      >>> updates, _ = tx.update(
      ...     params, tx.init(params), params, fisher_vp=lambda v: v
      ... )
      >>> optax.apply_updates(params, updates)["w"].round(3)
      Array([2., 2.], dtype=float32)
    """
    if learning_rate is None and step == "fixed":
        raise ValueError('fishleg: step="fixed" needs a learning_rate.')
    check_number("fishleg", ">= 0", weight_decay=weight_decay)
    decayed = isinstance(weight_decay, jax.Array) or weight_decay != 0
    if decayed and isinstance(damping, LevenbergMarquardt):
        raise ValueError(
            "fishleg: LevenbergMarquardt compares with value_fn, which holds no decay; "
            "put the decay into the loss, or leave one of the two out."
        )
    total: Any = damping
    if decayed:
        total = (
            (lambda count: damping(count) + weight_decay)
            if callable(damping)
            else damping + weight_decay
        )
    links = [optax.add_decayed_weights(weight_decay)] if decayed else []
    links.append(
        scale_by_fishleg(
            aux_mode=aux_mode,
            step=step,
            damping=total,
            aux_step=aux_step,
            gradient_directions=gradient_directions,
            white_directions=white_directions,
            combine=combine,
            pre_aux_steps=pre_aux_steps,
            dense_until=dense_until,
            update_aux_every=update_aux_every,
            init_scale=init_scale,
            rule=rule,
            max_size=max_size,
            aux_optimizer=aux_optimizer,
            normalize=normalize,
            precondition=precondition,
        )
    )
    if momentum is not None:
        links.append(optax.ema(momentum, debias=False))
    rate = 1.0 if learning_rate is None else learning_rate
    links.append(optax.scale_by_learning_rate(rate))
    end = optax.GradientTransformation(
        lambda _: _StepMade(), lambda u, s, _=None: (u, s)
    )
    return optax.chain(*links, end)


def _at(value: ScalarOrSchedule, count: Any) -> Any:
    return value(count) if callable(value) else value


def _bend(direction: PyTree, fisher_vp: Any) -> Array:
    """Gives ``d.F d``, by the operator's own way where it has one.

    Products are exact. On CPUs they are in any case, and not asking for it lets the
    compiler see that the model was run at this point before, for the gradient.
    """

    def bend(direction):
        form = getattr(fisher_vp, "quadratic_form", None)
        return (
            inner(direction, fisher_vp(direction)) if form is None else form(direction)
        )

    def exact(direction):
        with exact_products():
            return bend(direction)

    return jax.lax.platform_dependent(direction, cpu=bend, default=exact)


def _trusted(decrease: Array, recent: Array) -> tuple[Array, Array]:
    """Shortens a step whose decrease of the model is far beyond those of late.

    Where the model fails it fails upwards: a loss that has jumped has huge gradients,
    and the next step would be longer still.

    Gives the share of the step that is left, and the largest decrease of late.
    """
    decrease = decrease.astype(jnp.float32)
    most = jnp.where(recent > 0, _GROWTH * recent, jnp.inf)
    excess = jnp.maximum(decrease / most, 1.0)
    # A share s of the step makes 2 s - s^2 of its decrease.
    share = 1 / (excess + jnp.sqrt(excess * (excess - 1)))
    kept = jnp.maximum(jnp.minimum(decrease, most), _FADING * recent)
    return share, jnp.where(jnp.isfinite(decrease), kept, recent)


def _adapted(rule: LevenbergMarquardt, damping: Array, ratio: Array) -> Array:
    grown = jnp.where(ratio < 0.25, damping / rule.factor, damping)
    found = jnp.where(ratio > 0.75, damping * rule.factor, grown)
    return jnp.maximum(found, rule.floor).astype(jnp.float32)


def _mean_gradient(
    key: Any,
    q: InverseFisher,
    gradients: tuple[PyTree, ...],
    fisher_vp: Any,
    white_directions: int,
    like: PyTree,
    **options: Any,
) -> tuple[Array, InverseFisher]:
    """Averages loss and gradient of the auxiliary problem over the directions."""
    directions = list(gradients)
    keys = jax.random.split(key, white_directions) if white_directions else []
    directions += [optax.tree.random_like(k, like, jax.random.normal) for k in keys]
    found = [fishleg_auxiliary_gradient(q, u, fisher_vp, **options) for u in directions]
    return jax.tree.map(lambda *parts: sum(parts) / len(parts), *found)


def _check_arguments(name, params, fisher_vp, key, white_directions) -> None:
    if params is None:
        raise ValueError(f"{name}: call update(grads, state, params, ...) with params.")
    if fisher_vp is None:
        raise ValueError(
            f"{name} needs fisher_vp=: call update(grads, state, params, fisher_vp="
            "jaxlab.curvature.ggn_operator(apply_fn, likelihood, params, batch), "
            "key=key) (nnx.Optimizer.update takes the same keywords; "
            f"jaxlab.training.make_train_step passes them). {DROPPED}"
        )
    if getattr(fisher_vp, "host", False):
        raise ValueError(
            f"{name}: fisher_vp streams its data from the host and cannot run inside "
            "update; give an operator on this step's batch."
        )
    if white_directions and key is None:
        raise ValueError(
            f"{name} needs key= for its {white_directions} white direction(s): call "
            "update(..., key=key) with a fresh key each step, or make it with "
            f"white_directions=0. {DROPPED}"
        )


def _check_options(
    name,
    *,
    aux_mode,
    step,
    damping,
    aux_step,
    gradient_directions,
    white_directions,
    init_scale,
) -> None:
    if aux_mode not in ("group", "adam"):
        raise ValueError(
            f'{name}: aux_mode must be "group" or "adam", got {aux_mode!r}.'
        )
    if step not in ("quadratic", "fixed"):
        raise ValueError(f'{name}: step must be "quadratic" or "fixed", got {step!r}.')
    if isinstance(damping, LevenbergMarquardt):
        if step != "quadratic":
            raise ValueError(f'{name}: LevenbergMarquardt needs step="quadratic".')
        if not (damping.initial > 0 and 0 < damping.factor < 1 and damping.floor >= 0):
            raise ValueError(
                f"{name}: LevenbergMarquardt needs initial > 0, 0 < factor < 1 and "
                f"floor >= 0, got {damping}."
            )
    else:
        check_number(name, "finite and > 0", schedule=True, damping=damping)
    check_number(name, "in (0, 1)", optional=True, schedule=True, aux_step=aux_step)
    check_number(name, "finite and > 0", optional=True, init_scale=init_scale)
    check_count(
        name,
        least=0,
        gradient_directions=gradient_directions,
        white_directions=white_directions,
    )
    if not gradient_directions and not white_directions:
        raise ValueError(f"{name}: Q needs at least one direction to be fitted to.")
