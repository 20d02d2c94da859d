"""Fits the inverse Fisher outside the training step: before it, or for its own sake.

``fishleg_warm_start`` readies the state of an optimizer on several batches, where
``update`` sees one. ``inverse_fisher`` fits Q at fixed parameters, for pruning,
influence or Laplace, and measures how good it is:

    eff = (g.d)^2 / (d.(F + gamma) d  g.(F + gamma)^-1 g),   d = Q g,

the share of the exact step's decrease of the quadratic model that the step along d
makes, in [0, 1]. It is 1 for Q = (F + gamma)^-1 and does not mind the scale of Q. (The
relative error of Q (F + gamma) g is ruled by directions of small curvature, which
matter to no step.)
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from jaxlab._checks import check_count, check_number, check_sequence
from jaxlab._norms import all_finite, wide
from jaxlab.curvature._layouts import for_branches
from jaxlab.curvature._options import as_pytree, exact_products
from jaxlab.curvature._vectors import is_host, prepared
from jaxlab.objective import GaussNewton, Objective
from jaxlab.optimizers.fisher_legendre.blocks import Rule
from jaxlab.optimizers.fisher_legendre.factors import InverseFisher, q_apply, q_init
from jaxlab.optimizers.fisher_legendre.group import fishleg_group_step
from jaxlab.optimizers.fisher_legendre.transform import FishLegState

_SMOOTHING = 0.05  # of the running mean of the error


def fishleg_warm_start(
    key: Key[Array, ""],
    state: PyTree,
    params: PyTree,
    batches: Iterable[Any],
    *,
    objective: Objective,
    model_state: PyTree = (),
    damping: ArrayLike = 0.3,
    aux_step: ArrayLike = 0.25,
    white_directions: int = 1,
    combine: bool = True,
) -> PyTree:
    """Fits the inverse Fisher of an optimizer's state before the first step.

    One group step on each batch: along the gradient of the first one, with the Fisher
    of its own, as the recipe for small batches has it. Give the optimizer
    ``pre_aux_steps=0``.

    Args:
      key: of the white directions and of the model's noise.
      state: state of :func:`scale_by_fishleg` or of a chain around one.
      params: where the Fisher is taken.
      batches: each ``(inputs, targets)`` or ``(inputs, targets, weights)``, all of the
        same shapes; one auxiliary step each.
      objective: the model and its likelihood.
      model_state: what the model keeps besides.
      damping: as the optimizer's, weight decay included.
      aux_step: as the optimizer's.
      white_directions: as the optimizer's.
      combine: as the optimizer's.

    Returns:
      The state with its inverse Fisher fitted; all else as it was.

    Raises:
      ValueError: if the state holds no FishLeg of the group mode, or there is no batch.

    Examples:
      >>> from jaxlab.likelihoods import Gaussian
      >>> from jaxlab.objective import plain
      >>> from jaxlab.optimizers import scale_by_fishleg
      >>> objective = Objective(plain(lambda w, x: x @ w), Gaussian())
      >>> w, tx = jnp.ones((2, 1)), scale_by_fishleg(pre_aux_steps=0)
      >>> batch = jnp.eye(2), jnp.zeros((2, 1))
      >>> state = fishleg_warm_start(
      ...     jax.random.key(0), tx.init(w), w, [batch] * 50, objective=objective
      ... )
      >>> q_apply(state.q, w).round(2).ravel()  # 1 / (1/2 + 0.3)
      Array([1.25, 1.25], dtype=float32)
    """
    name = "fishleg_warm_start"
    is_ours = lambda node: isinstance(node, FishLegState)
    found = [s for s in jax.tree.leaves(state, is_leaf=is_ours) if is_ours(s)]
    if len(found) != 1 or found[0].auxiliary != ():
        raise ValueError(
            f"{name}: state must hold one state of scale_by_fishleg(aux_mode='group'), "
            f"got {len(found)} of FishLeg."
        )

    @jax.jit
    def step(key, q, gradient, params, model_state, batch):
        at = {"key": jax.random.fold_in(key, 0), "train": True}
        operator = GaussNewton(objective, params, model_state, batch, **at)
        if gradient is None:
            gradient = objective.value_and_grad(params, model_state, batch, **at)[1]
        new, error = fishleg_group_step(
            jax.random.fold_in(key, 1),
            q,
            [gradient],
            operator,
            damping=damping,
            step=aux_step,
            white_directions=white_directions,
            combine=combine,
        )
        good = all_finite((new, error))
        return jax.tree.map(lambda n, o: jnp.where(good, n, o), new, q), gradient

    q, gradient, number = found[0].q, None, -1
    check_sequence(name, "batches", batches, "batches")
    for number, batch in enumerate(batches):
        ours = jax.random.fold_in(key, number)
        q, gradient = step(ours, q, gradient, params, model_state, batch)
    if number < 0:
        raise ValueError(f"{name}: batches must hold at least one batch.")
    put = lambda node: node._replace(q=q) if is_ours(node) else node
    return jax.tree.map(put, state, is_leaf=is_ours)


class InverseFisherFit(NamedTuple):
    """What :func:`inverse_fisher` found.

    Attributes:
      q: the inverse Fisher; ``q_apply(fit.q, v)``.
      error: running mean of ``||C (F + damping) C^T eps - eps||^2 / ||eps||^2`` over
        white eps: the squared distance from the identity, per entry.
      steps: group steps that were taken.
      converged: whether the error fell to the tolerance. Blocks that cannot hold the
        inverse never get there: ask ``eff``.
      eff: share of the exact step's model decrease, the mean over random vectors.

    Examples:
      >>> like = {"v": jnp.ones(2)}
      >>> fit = inverse_fisher(jax.random.key(0), lambda v: v, like, damping=1.0)
      >>> bool(fit.converged), float(fit.eff.round(4))
      (True, 1.0)
    """

    q: InverseFisher
    error: Float[Array, ""]
    steps: Int[Array, ""]
    converged: Bool[Array, ""]
    eff: Float[Array, ""]


def inverse_fisher(
    key: Key[Array, ""],
    fisher_vp: Callable[[Any], Any],
    like: PyTree,
    *,
    damping: ArrayLike,
    init_scale: ArrayLike | None = None,
    step: ArrayLike = 0.25,
    white_directions: int = 1,
    tol: ArrayLike = 1e-3,
    max_steps: ArrayLike = 1000,
    num_probes: int = 4,
    rule: Rule = None,
    max_size: int = 256,
) -> InverseFisherFit:
    """Fits a structured inverse of ``F + damping`` to an operator.

    By group steps with white directions, one product with the Fisher each; at the end
    conjugate gradients with ``num_probes`` vectors measure the fit.

    Args:
      key: of the directions and of the vectors at the end.
      fisher_vp: the operator ``v -> F v``, symmetric and positive semi-definite.
      like: a tree like the params.
      damping: gamma, > 0.
      init_scale: Q starts as so many times the identity; ``None`` takes
        ``1 / damping``, the inverse where F is zero, and never too small.
      step: mu of the group step, in (0, 1).
      white_directions: random directions of a step.
      tol: it stops when the running mean of the squared error is below.
      max_steps: it stops after so many steps.
      num_probes: vectors for ``eff``.
      rule: kinds of blocks, as in :func:`q_init`.
      max_size: longest factor, as in :func:`q_init`.

    Returns:
      :class:`InverseFisherFit`.

    Raises:
      ValueError: as :func:`q_init` and :func:`fishleg_group_step`, for a damping that
        is not positive, or for an operator that streams from the host.

    Examples:
      >>> matrix = jnp.array([[2.0, 1.0], [1.0, 2.0]])
      >>> operator = jax.tree_util.Partial(jnp.matmul, matrix)
      >>> fit = inverse_fisher(
      ...     jax.random.key(0), operator, jnp.ones(2), damping=1.0, rule={"": "full"}
      ... )
      >>> from jaxlab.optimizers import q_dense
      >>> (q_dense(fit.q, jnp.ones(2)) @ (matrix + jnp.eye(2))).round(1)
      Array([[1., 0.],
             [0., 1.]], dtype=float32)
    """
    name = "inverse_fisher"
    check_number(name, "finite and > 0", damping=damping)
    check_number(name, "a number", tol=tol, max_steps=max_steps)
    check_count(name, white_directions=white_directions, probes=num_probes)
    if is_host(fisher_vp):
        raise ValueError(
            f"{name}: the operator streams its data from the host; give one on data "
            "that fit into memory (ggn_operator with microbatch=)."
        )
    scale = 1 / damping if init_scale is None else init_scale
    q = q_init(like, scale=scale, rule=rule, max_size=max_size)
    with jax.named_scope(name), exact_products():
        return _fitted(
            key,
            as_pytree(fisher_vp),
            q,
            like,
            (damping, step, tol, max_steps),
            white_directions=white_directions,
            num_probes=num_probes,
        )


def _fit(key, operator, q, like, numbers, *, white_directions, num_probes):
    damping, step, tol, max_steps = numbers
    operator = for_branches(prepared(operator))
    steps_key, probes_key = jax.random.split(key)

    def more(carry):
        _, error, steps = carry
        return (steps < max_steps) & ((steps == 0) | ~(error <= tol))

    def body(carry):
        q, error, steps = carry
        new, now = fishleg_group_step(
            jax.random.fold_in(steps_key, steps),
            q,
            [],
            operator,
            damping=damping,
            step=step,
            white_directions=white_directions,
            like=like,
        )
        share = jnp.maximum(_SMOOTHING, 1 / (steps + 1.0))
        return new, error + share * (now - error), steps + 1

    start = (q, jnp.float32(0), jnp.int32(0))
    q, error, steps = jax.lax.while_loop(more, body, start)
    error = jnp.where(steps > 0, error, jnp.inf)
    keys = jax.random.split(probes_key, num_probes)
    eff = jnp.mean(
        jax.lax.map(lambda k: _efficiency(k, operator, q, like, damping), keys)
    )
    return InverseFisherFit(q, error, steps, error <= tol, eff)


_fitted = jax.jit(_fit, static_argnames=("white_directions", "num_probes"))


def _efficiency(key, operator, q, like, damping):
    vector = optax.tree.random_like(key, like, jax.random.normal)
    vector = jax.tree.map(wide, vector)
    shifted = lambda f, x: (f + damping * x).astype(x.dtype)
    damped = lambda v: jax.tree.map(shifted, operator(v), v)
    exact, _ = jax.scipy.sparse.linalg.cg(damped, vector, tol=1e-5, maxiter=1000)
    direction = q_apply(q, vector)
    along = optax.tree.vdot(vector, direction)
    bend = optax.tree.vdot(direction, damped(direction))
    return along**2 / (bend * optax.tree.vdot(vector, exact))
