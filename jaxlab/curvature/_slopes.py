"""Loss and gradient over the data that operators take: batches, lists, streams."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jaxlab.curvature._batches import as_arrays, collected, rows_of
from jaxlab.curvature._functions import Function
from jaxlab.curvature._partwise import Partwise, Streamed
from jaxlab.objective import unpack_batch

Scalar = Float[Array, ""]


def loss_and_norm(
    name: str, loss_fn: Function, params: PyTree, data: Any, microbatch: int | None
) -> tuple[Scalar, Scalar]:
    """Computes the loss and the norm of its gradient; under jit too, unless it streams.

    Args:
      name: of the public function.
      loss_fn: ``(params, batch) -> loss``, a callable pytree.
      params: real arrays.
      data: as :func:`hessian_operator` takes them.
      microbatch: rows that are differentiated at once.

    Raises:
      ValueError: if there are no rows, or batches do not fit.
    """
    slope = _Slope(loss_fn, params, None, name)
    if callable(data):
        loss, gradient = _StreamedSlope(slope, data, microbatch).found()
    else:
        parts = collected(name, data, microbatch, slope.convert)
        loss, gradient = dataclasses.replace(slope, data=parts).found()
    return loss, _norm(gradient)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Slope(Partwise):
    """Means loss and gradient over parts as operators mean their products."""

    def slope(self, v: PyTree, batch: Any) -> Any:
        loss = lambda params: self.function(params, batch)
        return jax.value_and_grad(loss)(self.params)

    def convert(self, batch: Any, start: Any) -> PyTree:
        unpack_batch(batch)
        batch = as_arrays(batch)
        rows_of(self.name, batch)
        return batch

    def found(self) -> Any:
        return self._run("slope", self.params)


@dataclasses.dataclass(frozen=True)
class _StreamedSlope(Streamed):
    def found(self) -> Any:
        zero = jnp.zeros(())
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, _wide(x)), self.params)
        return self._pass("slope", self.params, (zero, zeros))


def _wide(x: Array) -> Any:
    return jnp.promote_types(x.dtype, jnp.float32)


@jax.jit
def _norm(tree: PyTree) -> Scalar:
    squares = [jnp.sum(x.astype(_wide(x)) ** 2) for x in jax.tree.leaves(tree)]
    return jnp.sqrt(sum(squares[1:], start=squares[0]))
