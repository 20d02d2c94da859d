"""The jitted step, which feeds every transformation what it asks for.

An optax ``update`` may take more than gradients; the step passes, by the names that
optax uses where it has one,

    value, grad, value_fn    the loss, its gradient, ``params -> loss``
    obj_fn                   ``value_fn`` under the name that Sophia uses
    grad_fn                  ``params -> gradient``
    fisher_vp                the Gauss-Newton operator ``v -> F v`` at ``params``
    key                      a fresh key

all on this step's batch and with this step's noise, so that they speak of one
function. They are closures that nobody has called yet: what a transformation does
not use leaves no trace in the compiled program. Inside ``optax.masked`` and
``optax.partition`` they accept trees with holes and return them.
"""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Key, PyTree

from jaxlab import trees
from jaxlab._chains import check_chain
from jaxlab._checks import check_count
from jaxlab.likelihoods import row_shares
from jaxlab.objective import Batch, Objective, unpack_batch
from jaxlab.training.state import LossScale, Optimizer, TrainState

Metrics = dict[str, Float[Array, ""]]
Step = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]

# Of the dynamic loss scale: doubled after so many good steps, halved at a bad one.
_GROWTH_INTERVAL = 2000


def make_train_step(
    objective: Objective,
    optimizer: Optimizer,
    *,
    accumulate: int = 1,
    remat: bool = False,
    loss_scale: float | Literal["dynamic"] | None = None,
    donate: bool = True,
    jit: bool = True,
) -> Step:
    """Makes the step ``(state, batch) -> (state, metrics)``.

    Args:
      objective: model and likelihood.
      optimizer: any optax transformation, ``optax.MultiSteps`` included.
      accumulate: cuts the batch into so many micro-batches and scans over them: the
        memory of one, and the loss, gradient and curvature of the whole batch
        (models whose rows do not interact; BatchNorm sees micro-batches).
      remat: recomputes the model in the backward pass instead of storing it.
      loss_scale: factor on the loss before its gradient is taken, divided out after:
        a number, or "dynamic" for one that lives in the state
        (``create_state(..., loss_scale=2.0**15)``), halves at a non-finite gradient,
        skips that step and doubles after 2,000 good ones. ``None`` for float32 and
        bfloat16.
      donate: gives the state's buffers back to the step; the old state is then gone.
      jit: ``False`` returns the pure function, for use inside another ``jax.jit``.

    Returns:
      The step. Its metrics are float32 scalars ``loss`` (before the update) and
      ``grad_norm``; with a dynamic scale also ``loss_scale`` and ``skipped``.

    Raises:
      ValueError: if ``accumulate`` is below 1 or, at the first call, does not divide
        the batch; if ``loss_scale`` is neither positive nor "dynamic", or is dynamic
        and the state holds none; at the first call also as :func:`create_state`.

    Examples:
      >>> import optax
      >>> from jaxlab.likelihoods import Gaussian
      >>> from jaxlab.objective import Objective, plain
      >>> from jaxlab.training import create_state
      >>> objective = Objective(plain(lambda w, x: x @ w), Gaussian())
      >>> optimizer = optax.sgd(1.0)
      >>> step = make_train_step(objective, optimizer)
      >>> state = create_state(jax.random.key(0), jnp.zeros((1, 1)), optimizer)
      >>> state, metrics = step(state, (jnp.ones((2, 1)), jnp.ones((2, 1))))
      >>> float(metrics["grad_norm"]), state.params.tolist(), int(state.step)
      (1.0, [[1.0]], 1)
    """
    check_count("make_train_step", accumulate=accumulate)
    dynamic = loss_scale == "dynamic"
    number = isinstance(loss_scale, (int, float)) and loss_scale > 0
    if not (loss_scale is None or dynamic or number):
        raise ValueError(
            f'loss_scale must be None, a number > 0 or "dynamic", got {loss_scale!r}.'
        )
    if remat:
        objective = dataclasses.replace(
            objective, apply_fn=_rematerialised(objective.apply_fn)
        )
    optimizer = with_extra_args(optimizer)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        if dynamic and not isinstance(state.loss_scale, LossScale):
            raise ValueError(
                'make_train_step(loss_scale="dynamic") needs a state made by '
                "create_state(..., loss_scale=2.0**15)."
            )
        check_chain(state.opt_state)
        noise = jax.random.fold_in(state.key, state.step)
        model_key, update_key = jax.random.split(noise)
        scale = state.loss_scale.scale if dynamic else loss_scale
        here = _Here(
            objective, state.model_state, _cut(batch, accumulate), model_key, scale
        )
        with jax.named_scope("value_and_grad"):
            (value, model_state), grads = here.value_and_grad(state.params)
        norm = optax.tree.norm(optax.tree.cast(grads, jnp.float32))
        metrics = {"loss": value.astype(jnp.float32), "grad_norm": norm}

        def updated():
            extra = _extra_arguments(here, state.params, value, grads, update_key)
            with jax.named_scope("update"):
                updates, opt_state = optimizer.update(
                    grads, state.opt_state, state.params, **extra
                )
            params = optax.apply_updates(state.params, updates)
            return params, model_state, opt_state

        if dynamic:
            finite = jnp.isfinite(norm)
            old = (state.params, state.model_state, state.opt_state)
            params, model_state, opt_state = jax.lax.cond(finite, updated, lambda: old)
            new_scale = _next_scale(state.loss_scale, finite)
            metrics |= {"loss_scale": scale, "skipped": 1.0 - finite}
        else:
            params, model_state, opt_state = updated()
            new_scale = state.loss_scale
        return TrainState(
            state.step + 1, params, model_state, opt_state, state.key, new_scale
        ), metrics

    return jax.jit(step, donate_argnums=(0,) if donate else ()) if jit else step


def with_extra_args(optimizer: Optimizer) -> optax.GradientTransformationExtraArgs:
    """Makes sure that an optimizer's extra arguments reach it.

    ``optax.chain`` and ``optax.with_extra_args_support`` drop them for everything that
    is not a ``GradientTransformationExtraArgs``, ``optax.MultiSteps`` among them,
    though its ``update`` takes them.

    Args:
      optimizer: an optax transformation or ``optax.MultiSteps``.

    Returns:
      A transformation whose ``update`` takes any keyword.

    Raises:
      ValueError: if ``optimizer`` has no ``init`` and ``update``.

    Examples:
      >>> import optax
      >>> tx = with_extra_args(optax.MultiSteps(optax.sgd(1.0), 2))
      >>> isinstance(tx, optax.GradientTransformationExtraArgs)
      True
    """
    if not isinstance(optimizer, Optimizer):
        raise ValueError(
            "optimizer must have init and update, as optax transformations do, got "
            f"{type(optimizer).__name__}."
        )
    parameters = inspect.signature(optimizer.update).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return optax.GradientTransformationExtraArgs(optimizer.init, optimizer.update)
    # optax.contrib.sam says that it takes extra arguments and names all it takes.
    named = {p.name for p in parameters} - {"updates", "state", "params"}

    def update(updates, state, params=None, **extra):
        extra = {name: value for name, value in extra.items() if name in named}
        return optimizer.update(updates, state, params, **extra)

    return optax.GradientTransformationExtraArgs(optimizer.init, update)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Here:
    """The functions of ``params`` that one step speaks of; batches stand stacked."""

    objective: Objective
    state: PyTree
    batches: Batch  # every leaf (rows, micro-batches, ...)
    key: Key[Array, ""]
    scale: Float[Array, ""] | float | None = None

    def value(self, params):
        return self._mean(
            lambda state, batch, key: self.objective.loss(params, state, batch, key=key)
        )[0]

    def value_and_grad(self, params):
        scale = 1.0 if self.scale is None else self.scale

        def one(state, batch, key):
            def scaled(p):
                loss, new = self.objective.loss(p, state, batch, key=key)
                return loss * scale, (loss, new)

            grads, (loss, new) = jax.grad(scaled, has_aux=True)(params)
            if self.scale is not None:
                grads = jax.tree.map(lambda g: (g / scale).astype(g.dtype), grads)
            return (loss, grads), new

        (loss, grads), state = self._mean(one)
        return (loss, state), grads

    def product(self, params, v):
        return self._mean(
            lambda state, batch, key: (
                self.objective.ggn_product(params, state, batch, v, key=key),
                state,
            )
        )[0]

    def quadratic_form(self, params, v):
        return self._mean(
            lambda state, batch, key: (
                self.objective.ggn_quadratic_form(params, state, batch, v, key=key),
                state,
            )
        )[0]

    def _mean(self, one):
        """Sums ``one(state, batch, key)`` over the micro-batches by their shares."""
        count = jax.tree.leaves(self.batches)[0].shape[1]
        at = lambda i: jax.tree.map(lambda leaf: leaf[:, i], self.batches)
        if count == 1:
            return one(self.state, at(0), self.key)
        weights = unpack_batch(self.batches)[2]
        if weights is None:
            shares = row_shares((count,))
        else:
            axes = (0, *range(2, weights.ndim))
            shares = row_shares((count,), jnp.sum(weights, axes))
        wide = lambda leaf: jnp.promote_types(leaf.dtype, jnp.float32)

        def body(carry, index):
            state, total = carry
            part, state = one(state, at(index), jax.random.fold_in(self.key, index))
            add = lambda t, p: t + shares[index].astype(t.dtype) * p
            return (state, jax.tree.map(add, total, part)), None

        shapes = jax.eval_shape(lambda: one(self.state, at(0), self.key)[0])
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, wide(s)), shapes)
        carry, _ = jax.lax.scan(body, (self.state, zeros), jnp.arange(count))
        state, total = carry
        return jax.tree.map(lambda t, s: t.astype(s.dtype), total, shapes), state


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _StepOperator:
    """The Gauss-Newton operator of a step; masked leaves count as zero."""

    here: _Here
    params: PyTree

    def __call__(self, v: PyTree) -> PyTree:
        return trees.punch_holes(self.here.product(self.params, self._full(v)), v)

    def quadratic_form(self, v: PyTree) -> Float[Array, ""]:
        return self.here.quadratic_form(self.params, self._full(v))

    def _full(self, v):
        return trees.fill_holes(v, jax.tree.map(jnp.zeros_like, self.params))


def _extra_arguments(here, params, value, grads, key) -> dict[str, Any]:
    # Line searches hand unknown keywords on to value_fn and demand that it name them.
    def value_fn(at, *, obj_fn=None, grad_fn=None, fisher_vp=None, key=None):
        return here.value(trees.fill_holes(at, params))

    # optax.contrib.sam adds the number of its inner step; the batch is the same one.
    def grad_fn(at, inner_step=None):
        full = trees.fill_holes(at, params)
        return trees.punch_holes(here.value_and_grad(full)[1], at)

    return {
        "value": value,
        "grad": grads,
        "value_fn": value_fn,
        "obj_fn": value_fn,
        "grad_fn": grad_fn,
        "fisher_vp": _StepOperator(here, params),
        "key": key,
    }


def _cut(batch, count):
    """Views a batch as ``count`` micro-batches along a new second axis.

    Rows i, i + count, ... form micro-batch i: where rows are sharded over devices,
    every device then holds its part of every micro-batch.
    """
    unpack_batch(batch)

    def cut(leaf):
        leaf = jnp.asarray(leaf)
        if leaf.ndim == 0 or leaf.shape[0] % count:
            rows = leaf.shape[0] if leaf.ndim else "no"
            raise ValueError(
                f"accumulate={count} must divide the batch, got {rows} rows; choose a "
                "batch size that is a multiple, or pad with rows of weight 0."
            )
        return leaf.reshape(leaf.shape[0] // count, count, *leaf.shape[1:])

    return jax.tree.map(cut, tuple(batch))


def _next_scale(scale: LossScale, finite) -> LossScale:
    streak = jnp.where(finite, scale.streak + 1, 0)
    grow = streak >= _GROWTH_INTERVAL
    factor = jnp.where(finite, jnp.where(grow, 2.0, 1.0), 0.5)
    value = jnp.maximum(scale.scale * factor, 1.0)
    return LossScale(value, jnp.where(grow, 0, streak))


def _rematerialised(apply_fn):
    def remat_apply(params, state, inputs, *, key, train):
        pure = lambda p, s, x, k: apply_fn(p, s, x, key=k, train=train)
        return jax.checkpoint(pure)(params, state, inputs, key)

    return remat_apply
