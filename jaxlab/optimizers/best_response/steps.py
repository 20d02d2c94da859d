"""The steps that train weights and tune their hyperparameters in turn.

See :mod:`jaxlab.optimizers.best_response` for the method.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxlab._checks import check_count
from jaxlab._norms import wide
from jaxlab.curvature._layouts import for_branches
from jaxlab.curvature._vectors import space_of
from jaxlab.optimizers.best_response.gradients import (
    Loss,
    check_weight,
    hyperparameter_gradient,
    response_gradient,
)
from jaxlab.optimizers.best_response.hyperparameters import (
    as_float,
    check_shared,
    check_vectors,
    inverse_softplus,
    perturbation_entropy,
)
from jaxlab.optimizers.coherence.examples import as_floating

Scalar = Float[Array, ""]


class SelfTuningState(NamedTuple):
    """State of :func:`self_tuning`.

    Attributes:
      params: of the response, phi.
      u: the unbounded hyperparameters; :func:`constrain` gives their values.
      rho: softplus(rho) is the deviation of the noise on each.
      params_state: of the optimizer of ``params``.
      u_state: of the optimizer of ``u``.
      rho_state: of the optimizer of ``rho``; ``()`` where the scales stay fixed.
      count: training steps.

    Examples:
      >>> sgd = optax.sgd(0.1)
      >>> method = self_tuning(
      ...     lambda w, u, x, key: jnp.mean((w - x) ** 2),
      ...     lambda w, u, x: jnp.mean((w - x) ** 2),
      ...     params_optimizer=sgd,
      ...     u_optimizer=sgd,
      ... )
      >>> int(method.init(jnp.array(3.0), jnp.zeros(1)).count)
      0
    """

    params: PyTree
    u: Float[Array, " h"]
    rho: Float[Array, " h"]
    params_state: Any
    u_state: Any
    rho_state: Any
    count: Int[Array, ""]


class SelfTuningMetrics(NamedTuple):
    """What one step of :func:`self_tuning` saw.

    Attributes:
      train_loss: at perturbed hyperparameters, before the step.
      val_loss: 0 where the step did not tune.
      entropy: of the noise, after the step.
      tuned: whether u took a step.

    Examples:
      >>> bool(SelfTuningMetrics(1.0, 0.0, 0.0, False).tuned)
      False
    """

    train_loss: Scalar
    val_loss: Scalar
    entropy: Scalar
    tuned: Bool[Array, ""]


class SelfTuning(NamedTuple):
    """What :func:`self_tuning` returns: four functions, described there.

    Examples:
      >>> SelfTuning._fields
      ('init', 'fit_step', 'tune_step', 'step')
    """

    init: Callable[..., SelfTuningState]
    fit_step: Callable[..., tuple[SelfTuningState, Scalar]]
    tune_step: Callable[..., tuple[SelfTuningState, Scalar]]
    step: Callable[..., tuple[SelfTuningState, SelfTuningMetrics]]


def self_tuning(
    train_loss_fn: Loss,
    val_loss_fn: Loss,
    *,
    params_optimizer: optax.GradientTransformation,
    u_optimizer: optax.GradientTransformation,
    rho_optimizer: optax.GradientTransformation | None = None,
    entropy_weight: ArrayLike | Callable[..., Any] = 1e-3,
    train_steps: int = 2,
    warmup: int = 0,
    shared: bool | Sequence[bool] = False,
) -> SelfTuning:
    """Makes the steps that train weights and tune their hyperparameters in turn.

    The authors take SGD with rate 0.01 and momentum 0.9 for the parameters, Adam with
    3e-3 for u and rho, five epochs of ``warmup``, and a fifth of the training set for
    validation. Without warm-up the validation loss of untrained weights falls under any
    change that trains faster, and u runs to no regularisation at all.

    Args:
      train_loss_fn: ``(params, u, batch, key) -> scalar``, see
        :func:`response_gradient`.
      val_loss_fn: ``(params, u, batch) -> scalar``, see
        :func:`hyperparameter_gradient`.
      params_optimizer: of the response's parameters. Its ``update`` gets ``value=``,
        ``grad=``, ``grad_fn=`` (of the same noise) and ``key=``, if it takes more.
      u_optimizer: of the hyperparameters.
      rho_optimizer: of the scales of the noise; ``None`` keeps them fixed, and
        the steps that tune free of noise.
      entropy_weight: tau, >= 0, or a schedule of the training steps. The authors' code
        has 1e-5 as its default and 1e-3 in the run that it describes.
      train_steps: of ``step``, from one tuning step to the next, >= 1; static.
      warmup: calls of ``step`` before the first that counts, >= 0.
      shared: as in :func:`perturb_hyperparameters`.

    Returns:
      Four pure functions:

      - ``init(params, u, *, scale=0.5) -> state``, where ``scale`` is the deviation of
        the noise, > 0, one number or one for each hyperparameter;
      - ``fit_step(key, state, train_batch) -> state, loss`` moves ``params``;
      - ``tune_step(key, state, val_batch) -> state, loss`` moves ``u`` and ``rho``;
      - ``step(key, state, train_batch, val_batch) -> state, metrics`` fits, and tunes
        after every ``train_steps``-th call past the ``warmup``.

    Raises:
      ValueError: if a number is out of range; from ``init``, if ``params`` are empty or
        not floating, or ``u`` and ``scale`` do not match; from the steps, as the two
        gradient functions do.

    Examples:
      >>> import optax
      >>> method = self_tuning(  # the response is w + u
      ...     lambda w, u, x, key: jnp.mean((w + u[:, 0] - x) ** 2),
      ...     lambda w, u, x: jnp.mean((w + u[:, 0] - x) ** 2),
      ...     params_optimizer=optax.sgd(0.0),
      ...     u_optimizer=optax.sgd(0.5),
      ...     train_steps=1,
      ... )
      >>> state = method.init(jnp.array(3.0), jnp.zeros(1))
      >>> batch = jnp.ones(4)
      >>> state, metrics = method.step(jax.random.key(0), state, batch, batch)
      >>> state.u, bool(metrics.tuned)
      (Array([-2.], dtype=float32), True)
    """
    name = "self_tuning"
    check_weight(name, entropy_weight, schedule=True)
    check_count(name, train_steps=train_steps)
    check_count(name, least=0, warmup=warmup)
    fitter, tuner = map(optax.with_extra_args_support, (params_optimizer, u_optimizer))
    scaler = None
    if rho_optimizer is not None:
        scaler = optax.with_extra_args_support(rho_optimizer)

    def init(params, u, *, scale: ArrayLike = 0.5):
        space_of(name, params, "params")
        if isinstance(scale, (int, float)) and not 0 < scale < math.inf:
            raise ValueError(f"{name}: scale must be finite and > 0, got {scale}.")
        params, u, scale = as_floating(params), as_float(u), as_float(scale)
        # A buffer of its own: a donated state must not take the caller's u along.
        u = jnp.array(u, copy=True)
        rho = inverse_softplus(scale).astype(u.dtype)
        if not rho.ndim:
            rho = jnp.broadcast_to(rho, u.shape)
        check_vectors(name, u, rho)
        check_shared(name, shared, u.size)
        rho_state = () if scaler is None else scaler.init(rho)
        count = jnp.zeros((), jnp.int32)
        states = fitter.init(params), tuner.init(u), rho_state
        return SelfTuningState(params, u, rho, *states, count)

    def fit_step(key, state, train_batch):
        draw, key = jax.random.split(key)

        def gradient(params):
            options = state.u, state.rho, train_batch
            return response_gradient(
                draw, train_loss_fn, params, *options, shared=shared
            )

        loss, grads = gradient(state.params)
        updates, params_state = fitter.update(
            grads,
            state.params_state,
            state.params,
            value=loss,
            grad=grads,
            grad_fn=lambda params: gradient(params)[1],
            key=key,
        )
        return state._replace(
            params=optax.apply_updates(state.params, updates),
            params_state=params_state,
            count=optax.safe_increment(state.count),
        ), wide(loss)

    def tune_step(key, state, val_batch):
        weight = entropy_weight
        loss, (u_grads, rho_grads) = hyperparameter_gradient(
            key,
            val_loss_fn,
            state.params,
            state.u,
            state.rho,
            val_batch,
            entropy_weight=weight(state.count) if callable(weight) else weight,
            tune_scales=scaler is not None,
            shared=shared,
        )
        move, u_state = tuner.update(u_grads, state.u_state, state.u, value=loss)
        new = state._replace(u=optax.apply_updates(state.u, move), u_state=u_state)
        if scaler is not None:
            move, rho_state = scaler.update(
                rho_grads, state.rho_state, state.rho, value=loss
            )
            rho = optax.apply_updates(state.rho, move)
            new = new._replace(rho=rho, rho_state=rho_state)
        return new, wide(loss)

    def step(key, state, train_batch, val_batch):
        fit_key, tune_key = jax.random.split(key)
        state, train_loss = fit_step(fit_key, state, train_batch)
        past = state.count - warmup
        due = (past > 0) & (past % train_steps == 0)
        tune = for_branches(lambda state: tune_step(tune_key, state, val_batch))
        loss_of = lambda state: jax.eval_shape(tune_step, tune_key, state, val_batch)[1]
        skip = lambda state: (state, jnp.zeros((), loss_of(state).dtype))
        state, val_loss = jax.lax.cond(due, tune, skip, state)
        entropy = perturbation_entropy(state.rho)
        return state, SelfTuningMetrics(train_loss, val_loss, entropy, due)

    return SelfTuning(init, fit_step, tune_step, step)
