"""Hessians as operators: products with a vector, never the matrix.

H v is the derivative of the gradient along v. Three compositions of forward (jvp) and
reverse (vjp) differentiation give it,

    forward over reverse    d/dt grad L(theta + t v) at t = 0
    reverse over reverse    grad <grad L(theta), v>
    reverse over forward    grad of d/dt L(theta + t v) at t = 0

of which the first keeps no tape of the backward pass. Linearised once at theta, a
product costs less than two gradients.
Reference: Pearlmutter, "Fast Exact Multiplication by the Hessian", Neural Computation
1994.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jaxlab._norms import wide
from jaxlab.curvature._batches import (
    as_arrays,
    check_microbatch,
    collected,
    rows_of,
)
from jaxlab.curvature._functions import as_function, is_leaf
from jaxlab.curvature._options import exact_products
from jaxlab.curvature._partwise import (
    Partwise,
    Streamed,
    abstract,
    image_of,
    tangents_of,
)
from jaxlab.curvature._vectors import Operator, Space, space_of
from jaxlab.objective import unpack_batch

Mode = Literal["forward_over_reverse", "reverse_over_reverse", "reverse_over_forward"]


def hessian_vector_product(
    loss_fn: Callable[[Any], Any],
    params: PyTree,
    vector: PyTree,
    *,
    mode: Mode = "forward_over_reverse",
) -> PyTree:
    """Multiplies the Hessian of a loss by a vector.

    It costs two to three gradients. Call it under jit; for many products at the same
    parameters take :func:`hessian_operator`. Matrix products are exact to the dtype,
    unless ``jax_default_matmul_precision`` is set.

    Args:
      loss_fn: ``params -> loss``, a scalar.
      params: where the Hessian is taken; real arrays.
      vector: a tree like ``params``; ``optax.MaskedNode`` in place of leaves or
        sub-trees counts as zero, and these parameters are then constants.
      mode: "forward_over_reverse" needs least memory. The others are for losses with
        functions that have no forward-mode derivative of their backward pass.

    Returns:
      A tree like ``vector``, with its holes and dtypes.

    Raises:
      ValueError: if the trees do not fit, leaves are not real, the loss is no scalar or
        the mode is unknown.

    Examples:
      >>> loss_fn = lambda w: jnp.sum(w**3)
      >>> hessian_vector_product(loss_fn, jnp.array([1.0, 2.0]), jnp.ones(2))
      Array([ 6., 12.], dtype=float32)
    """
    name = "hessian_vector_product"
    modes = {
        "forward_over_reverse": _forward_over_reverse,
        "reverse_over_reverse": _reverse_over_reverse,
        "reverse_over_forward": _reverse_over_forward,
    }
    if mode not in tuple(modes):
        raise ValueError(f"{name}: mode must be one of {', '.join(modes)}; got {mode}.")
    params = as_arrays(params)
    space_of(name, params, "params")
    at = _Hessian(as_function(loss_fn), params, None, name).at(vector)
    tangents = tangents_of(name, vector, at.params, "vector")
    with jax.named_scope(name), exact_products():
        return image_of(modes[mode](at.loss(None), at.params, tangents), vector)


def hessian_operator(
    loss_fn: Callable[..., Any],
    params: PyTree,
    batches: Any = None,
    *,
    microbatch: int | None = None,
) -> Operator:
    """Makes the Hessian of a loss an operator ``v -> H v``.

    The operator is a pytree: its parameters and data are leaves, the loss is static
    (or a callable pytree), so a jitted function of it does not compile again when they
    change. Called outside jit it compiles itself.

    With one batch ``linearize()`` computes the gradient once and keeps the activations
    of its forward and backward pass; a product then costs less than two gradients. With
    several parts nothing is kept and a product costs two to three. On CPUs convolutions
    are slow inside the loop over parts: give them one batch, or a callable.

    The loss of a batch must be a mean over its rows, weighted where it has weights:
    parts are combined by their rows, or the sums of their weights. Where the rows do
    not divide, the rest is a part of its own: ``loss_fn`` never sees padding. Only a
    streamed batch with weights is padded, by rows of weight 0.

    Args:
      loss_fn: ``(params, batch) -> loss``, or ``params -> loss`` without data.
      params: where the Hessian is taken; real arrays, with ``optax.MaskedNode`` for
        what is not differentiated.
      batches: a batch, ``(inputs, targets)`` or ``(inputs, targets, weights)`` or
        another tree whose arrays have one row per example; a list of batches of one
        size, of which the last may be smaller; or a callable that returns an iterable
        of batches, anew for each product. The callable makes a *host operator*: driven
        from Python, two batches on the device at a time, not for use under jit.
      microbatch: rows that are differentiated at once; ``None`` takes whole batches.
        The data are cut when the operator is made, which copies them.

    Returns:
      An operator on trees like ``params``; ``optax.MaskedNode`` in them counts as zero
      and comes back (:func:`block_operator` makes that cheaper where many products
      follow). ``v`` is cast to the dtypes of ``params``, the result has those of ``v``,
      and sums over parts run in float32 at least. Matrix products are exact to the
      dtype, unless ``jax_default_matmul_precision`` is set. ``quadratic_form(v)`` gives
      ``v . H v`` from forward passes.

    Raises:
      ValueError: if a leaf is not real, there are no rows, or batches do not fit.

    Examples:
      >>> loss_fn = lambda w, batch: jnp.mean((batch[0] @ w - batch[1]) ** 2)
      >>> batch = (jnp.array([[1.0, 0.0], [0.0, 2.0]]), jnp.zeros(2))
      >>> operator = hessian_operator(loss_fn, jnp.ones(2), batch)
      >>> operator(jnp.ones(2))
      Array([1., 4.], dtype=float32)
    """
    name = "hessian_operator"
    params = as_arrays(params)
    space_of(name, params, "params")
    check_microbatch(name, microbatch)
    operator = _Hessian(as_function(loss_fn), params, None, name)
    if batches is None:
        if microbatch is not None:
            raise ValueError(f"{name}: microbatch= cuts batches, but there are none.")
        return operator
    if callable(batches):
        return Streamed(operator, batches, microbatch)
    data = collected(name, batches, microbatch, operator.convert)
    return dataclasses.replace(operator, data=data)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Hessian(Partwise):
    def product(self, v: PyTree, batch: Any) -> PyTree:
        return _forward_over_reverse(self.loss(batch), self.params, v)

    def form(self, v: PyTree, batch: Any) -> Float[Array, ""]:
        loss, params = self.loss(batch), self.params
        slope = lambda p: jax.jvp(loss, (p,), (v,))[1]
        return wide(jax.jvp(slope, (params,), (v,))[1])

    def linear(self, batch: Any) -> Operator:
        _, product = jax.linearize(jax.grad(self.loss(batch)), self.params)
        return _Linear(product, space_of(self.name, self.params), self.name)

    def convert(self, batch: Any, start: Any) -> PyTree:
        if isinstance(batch, tuple):
            unpack_batch(batch)
        batch = as_arrays(batch)
        rows_of(self.name, batch)
        return batch

    def loss(self, batch: Any) -> Callable[[Any], Any]:
        """Gives the loss of one part as a function of the parameters."""

        def loss(params):
            data = () if batch is None else (batch,)
            value = self.function(params, *data)
            if not is_leaf(value) or jnp.shape(value) != ():
                shapes = jax.tree.map(jnp.shape, value)
                raise ValueError(
                    f"{self.name}: loss_fn must return a scalar, the mean over the "
                    f"rows, and nothing else; got shapes {shapes}."
                )
            return value

        return loss


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Linear:
    map: Any
    space: Space = dataclasses.field(metadata={"static": True})
    name: str = dataclasses.field(metadata={"static": True})

    def __call__(self, v: PyTree) -> PyTree:
        return image_of(self.map(tangents_of(self.name, v, abstract(self.space))), v)


def _forward_over_reverse(loss, params, v):
    return jax.jvp(jax.grad(loss), (params,), (v,))[1]


def _reverse_over_reverse(loss, params, v):
    return jax.vjp(jax.grad(loss), params)[1](v)[0]


def _reverse_over_forward(loss, params, v):
    return jax.grad(lambda p: jax.jvp(loss, (p,), (v,))[1])(params)
