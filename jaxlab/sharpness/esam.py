"""Efficient SAM: fewer weights perturbed, fewer examples in the second gradient.

With g the gradient of the mean loss at w, beta and gamma fractions, b examples,

    w' = w + (r / beta) m g / ||g||,     m ~ Bernoulli(beta) for each single weight
    S = the ceil(gamma b) examples whose losses rose most from w to w'
    result = grad of the mean over S of the loss at w'

The norm is over all the weights, drawn or not, so that the mean of w' over m is the
point of SAM (its step has length r / sqrt(beta) in the root mean square). At beta =
gamma = 1 the result is that of SAM. Besides the full gradient it takes one loss at w'
and a gradient on a fraction gamma of the examples, about 1.3 + gamma gradients in all.

Departures from the authors' code: there the draw is by whole arrays, once a step for
the next one, and turns gradients off altogether, so that the arrays not drawn get no
gradient from the second pass; here single weights stay in place and every weight is
trained. The number of examples there is rounded down, and examples that tie with the
last are lost. A draw by single weights saves no operations on the first gradient.
Reference: Du et al., "Efficient Sharpness-aware Minimization for Improved Training of
Neural Networks", ICLR 2022.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Key, PyTree

from jaxlab._checks import check_number
from jaxlab.curvature._batches import rows_of
from jaxlab.sharpness._checks import check_numbers, check_tree
from jaxlab.sharpness.perturbation import Mask, perturb


def esam_value_and_grad(
    per_example_loss_fn: Callable[..., Any],
    *,
    radius: ArrayLike,
    weight_fraction: ArrayLike = 0.6,
    example_fraction: float = 0.5,
    mask: Mask = None,
    adaptive: bool = False,
    eps: ArrayLike = 1e-12,
    point_dtype: Any = None,
) -> Callable[..., Any]:
    """Makes the gradient of SAM on some of the weights and examples.

    Args:
      per_example_loss_fn: ``(params, batch, *args) -> losses``, one for each row of
        ``batch``, shape ``(b,)``. A row's loss must not depend on the other rows: no
        BatchNorm in training mode, and dropout drawn per position in the batch falls
        on other rows once some are taken out.
      radius: length of SAM's perturbation, >= 0, in the units of ``params``.
      weight_fraction: beta, the probability that a weight is perturbed, in (0, 1].
      example_fraction: gamma, the share of the examples in the second gradient, in
        (0, 1]; static. Rows of padding count as examples.
      mask: which parameters may be perturbed at all (see :func:`perturb`); the norm is
        over these.
      adaptive: perturbs as ASAM does.
      eps: the norm is at least this.
      point_dtype: dtype of the perturbed point; see :func:`perturb`.

    Returns:
      A function ``(key, params, batch, *args) -> (value, grads)``, with ``batch`` a
      tree whose leaves share their leading axis b. The value is the mean loss at
      ``params``, over all rows. ``key`` draws the weights: a fresh one each step.

    Raises:
      ValueError: if a number is out of range, the leaves of ``batch`` do not share a
        leading axis, or the losses are not one for each row.

    Examples:
      >>> losses_fn = lambda w, x: 0.5 * jnp.sum((w - x) ** 2, axis=1)
      >>> f = esam_value_and_grad(
      ...     losses_fn, radius=5.0, weight_fraction=1.0, example_fraction=0.5
      ... )
      >>> w, x = jnp.zeros((1, 2)), jnp.array([[-6.0, -8.0], [0.0, 0.0]])
      >>> f(jax.random.key(0), w, x)  # at (3, 4) the first row's loss rose most
      (Array(25., dtype=float32), Array([[ 9., 12.]], dtype=float32))
    """
    name = "esam_value_and_grad"
    check_numbers(name, radius=radius, eps=eps)
    check_number(name, "in (0, 1]", weight_fraction=weight_fraction)
    if isinstance(example_fraction, jax.Array):
        raise ValueError(
            f"{name}: example_fraction shapes the computation and must be a Python "
            f"number, got {example_fraction}."
        )
    check_number(name, "in (0, 1]", example_fraction=example_fraction)

    def value_and_grad(
        key: Key[Array, ""], params: PyTree, batch: PyTree, *args: Any
    ) -> tuple[Array, PyTree]:
        check_tree(name, params)
        rows = rows_of(name, batch)
        # Less a little: 0.1 * 30 is 3.0000000000000004.
        count = max(1, math.ceil(rows * float(example_fraction) - 1e-9))

        def mean_and_losses(at, part, size):
            losses = per_example_loss_fn(at, part, *args)
            if jnp.shape(losses) != (size,):
                raise ValueError(
                    f"{name}: per_example_loss_fn must return one loss for each row, "
                    f"shape ({size},), got {jnp.shape(losses)}."
                )
            return jnp.mean(losses), losses

        gradient = jax.value_and_grad(mean_and_losses, has_aux=True)
        with jax.named_scope(name):
            (value, before), grads = gradient(params, batch, rows)
            far = perturb(
                params,
                grads,
                radius=radius / weight_fraction,
                eps=eps,
                mask=mask,
                adaptive=adaptive,
                dtype=point_dtype,
            )
            point = _some_of(key, far, params, weight_fraction)
            if count < rows:
                _, after = mean_and_losses(point, batch, rows)
                _, worst = jax.lax.top_k(after - before, count)
                batch = jax.tree.map(lambda leaf: jnp.asarray(leaf)[worst], batch)
            _, ahead = gradient(point, batch, count)
            return value, jax.tree.map(lambda a, g: a.astype(g.dtype), ahead, grads)

    return value_and_grad


def _some_of(key, far, params, fraction):
    """Takes each single weight of ``far`` with a probability, else of ``params``."""
    leaves, structure = jax.tree.flatten(far)
    keys = structure.unflatten(list(jax.random.split(key, len(leaves))))

    def draw(key, there, here):
        # At 1 all are drawn: the uniform numbers behind it lie below 1.
        drawn = jax.random.bernoulli(key, fraction, there.shape)
        return jnp.where(drawn, there, jnp.asarray(here).astype(there.dtype))

    return jax.tree.map(draw, keys, far, params)
