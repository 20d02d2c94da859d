"""Gradients of the two levels, and how far a response is from the best one.

See :mod:`jaxlab.optimizers.best_response` for the method.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Key, PyTree

from jaxlab._checks import check_number
from jaxlab._norms import safe_norm, wide
from jaxlab.curvature._batches import rows_of
from jaxlab.curvature._vectors import space_of
from jaxlab.optimizers.best_response.hyperparameters import (
    check_shared,
    check_vectors,
    perturb_hyperparameters,
    perturbation_entropy,
)
from jaxlab.optimizers.coherence.examples import as_floating

Loss = Callable[..., Any]
Scalar = Float[Array, ""]


def response_gradient(
    key: Key[Array, ""],
    train_loss_fn: Loss,
    params: PyTree,
    u: Float[ArrayLike, " h"],
    rho: Float[ArrayLike, " h"],
    batch: PyTree,
    *,
    shared: bool | Sequence[bool] = False,
    has_aux: bool = False,
) -> tuple[Any, PyTree]:
    """Gives the training loss around u and its gradient for the response's params.

    Args:
      key: of the noise, and of what ``train_loss_fn`` draws.
      train_loss_fn: ``(params, u, batch, key) -> scalar``, where u holds perturbed
        hyperparameters, one row for each of the batch. It feeds them to the gated
        layers AND regularises by them, row by row (see :func:`constrain`).
      params: of the response, phi; floating leaves.
      u: the unbounded hyperparameters.
      rho: softplus(rho) is the deviation of the noise.
      batch: training rows, arrays that share their leading axis.
      shared: as in :func:`perturb_hyperparameters`.
      has_aux: whether ``train_loss_fn`` returns ``(scalar, aux)``.

    Returns:
      The loss, or ``(loss, aux)``, and a gradient like ``params``. One gradient.

    Raises:
      ValueError: if ``params`` are empty or not floating, ``u`` and ``rho`` do not
        match, or the batch has no rows.

    Examples:
      >>> loss_fn = lambda w, u, x, key: jnp.mean((w - x) ** 2)
      >>> key, zero = jax.random.key(0), jnp.zeros(1)
      >>> response_gradient(key, loss_fn, jnp.array(3.0), zero, zero, jnp.ones(4))
      (Array(4., dtype=float32), Array(4., dtype=float32))
    """
    name = "response_gradient"
    space_of(name, params, "params")
    check_vectors(name, u, rho)
    rows = rows_of(name, batch)
    noise, other = jax.random.split(key)
    with jax.named_scope(name):
        near = perturb_hyperparameters(noise, u, rho, rows=rows, shared=shared)
        return jax.value_and_grad(train_loss_fn, has_aux=has_aux)(
            as_floating(params), near, batch, other
        )


def hyperparameter_gradient(
    key: Key[Array, ""],
    val_loss_fn: Loss,
    params: PyTree,
    u: Float[ArrayLike, " h"],
    rho: Float[ArrayLike, " h"],
    batch: PyTree,
    *,
    entropy_weight: ArrayLike = 1e-3,
    tune_scales: bool = True,
    shared: bool | Sequence[bool] = False,
    has_aux: bool = False,
) -> tuple[Any, tuple[Float[Array, " h"], Float[Array, " h"]]]:
    """Gives the validation loss and its gradient through the response.

    Args:
      key: of the noise; not used where the scales stay fixed.
      val_loss_fn: ``(params, u, batch) -> scalar`` WITHOUT regularisers (no dropout, no
        augmentation): u, one row for each of the batch, goes to the gated layers only.
      params: of the response, phi; not differentiated.
      u: the unbounded hyperparameters.
      rho: softplus(rho) is the deviation of the noise.
      batch: validation rows, arrays that share their leading axis.
      entropy_weight: tau, >= 0, times the entropy of the noise is subtracted in the
        gradient for rho: without it the scales collapse.
      tune_scales: whether rho is tuned. Else all rows get u itself, without noise, and
        the gradient for rho is 0.
      shared: as in :func:`perturb_hyperparameters`.
      has_aux: whether ``val_loss_fn`` returns ``(scalar, aux)``.

    Returns:
      The loss, without the entropy, or ``(loss, aux)``; and the gradients for ``u`` and
      ``rho``, float32 at least.

    Raises:
      ValueError: if ``u`` and ``rho`` do not match, the batch has no rows, or the
        weight is a number out of range.

    Examples:
      >>> loss_fn = lambda w, u, x: jnp.mean((w + u[:, 0] - x) ** 2)
      >>> key, zero = jax.random.key(0), jnp.zeros(1)
      >>> value, grads = hyperparameter_gradient(
      ...     key, loss_fn, 3.0, zero, zero, jnp.ones(4), tune_scales=False
      ... )
      >>> value, grads[0]
      (Array(4., dtype=float32), Array([4.], dtype=float32))
    """
    name = "hyperparameter_gradient"
    u, rho = check_vectors(name, u, rho)
    check_shared(name, shared, u.size)
    check_weight(name, entropy_weight)
    rows = rows_of(name, batch)

    def objective(u, rho):
        if tune_scales:
            near = perturb_hyperparameters(key, u, rho, rows=rows, shared=shared)
        else:
            near = jnp.broadcast_to(u[None], (rows, u.size))
        found = val_loss_fn(params, near, batch)
        loss = found[0] if has_aux else found
        if tune_scales:
            weight = jnp.asarray(entropy_weight, jnp.result_type(loss))
            loss = loss - weight * perturbation_entropy(rho)
        return loss, found

    with jax.named_scope(name):
        gradient = jax.grad(objective, argnums=(0, 1), has_aux=True)
        grads, found = gradient(u, rho)
        return found, grads


def best_response_error(response: PyTree, exact: PyTree) -> Scalar:
    """Gives the distance of a response's weights from the exact ones, relative.

    Args:
      response: a tree of floating leaves, such as :func:`gated_weights` gives.
      exact: the weights that minimise the training loss at the same u.

    Returns:
      ``||response - exact|| / ||exact||``, float32 at least; the denominator is at
      least 1e-12.

    Raises:
      ValueError: if the trees differ in structure or shapes, or are not floating.

    Examples:
      >>> best_response_error(jnp.array([3.0, 4.0]), jnp.array([3.0, 0.0]))
      Array(1.3333334, dtype=float32)
    """
    name = "best_response_error"
    one, two = space_of(name, response, "response"), space_of(name, exact, "exact")
    if one.structure != two.structure or one.shapes != two.shapes:
        raise ValueError(
            f"{name}: exact must be a tree like response, {one.structure} with shapes "
            f"{one.shapes}, got {two.structure} with shapes {two.shapes}."
        )
    gap = jax.tree.map(lambda r, e: wide(r) - wide(e), response, exact)
    return optax.tree.norm(gap) / safe_norm(exact, 1e-12)


def check_weight(name: str, weight: Any, *, schedule: bool = False) -> None:
    """Refuses what is no weight of the entropy.

    Raises:
      ValueError: if it is below 0 or not finite.
    """
    check_number(name, "finite and >= 0", schedule=schedule, entropy_weight=weight)
