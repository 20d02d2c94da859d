"""Gradients of single examples, and loops over rows that bound their memory."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jaxlab.curvature._batches import (
    Parts,
    as_arrays,
    check_microbatch,
    rows_of,
    weights_of,
)
from jaxlab.curvature._vectors import space_of

Loss = Callable[[Any, Any], Any]


def per_example_gradients(
    loss_fn: Loss, params: PyTree, batch: PyTree, *, microbatch: int | None = None
) -> PyTree:
    """Gives the gradient of every example, a tree with one more leading axis.

    All of them are held, whatever ``microbatch`` is: for measures of them see
    :func:`gradient_moments` and :func:`winsorized_gradient`.

    Args:
      loss_fn: ``(params, batch) -> scalar``, a mean over rows, weighted if the batch
        has weights; it is called on batches of one row. Rows must not act on each
        other: take running statistics in BatchNorm.
      params: floating leaves.
      batch: a tree of arrays that share their leading axis, the rows.
      microbatch: rows that are differentiated at once, for the memory of the forward
        pass; ``None`` takes all.

    Returns:
      A tree like ``params``, each leaf with a leading axis of rows.

    Raises:
      ValueError: if ``params`` is empty or not floating, the batch has no rows, or
        ``loss_fn`` does not return a scalar.

    Examples:
      >>> loss_fn = lambda w, x: 0.5 * jnp.mean((x - w) ** 2)
      >>> per_example_gradients(loss_fn, jnp.array(1.0), jnp.array([2.0, 3.0]))
      Array([-1., -2.], dtype=float32)
    """
    name = "per_example_gradients"
    params, batch, rows = prepared(name, loss_fn, params, batch, microbatch)
    with jax.named_scope(name):
        return map_rows(row_gradient(loss_fn, params), batch, rows, microbatch)


def prepared(
    name: str, loss_fn: Loss, params: PyTree, batch: PyTree, microbatch: int | None
) -> tuple[PyTree, PyTree, int]:
    """Checks what every function of this folder takes; gives arrays and the rows.

    Raises:
      ValueError: for params or a batch that do not do, or a loss that is no scalar.
    """
    space_of(name, params, "params")
    check_microbatch(name, microbatch)
    rows = rows_of(name, batch)
    params, batch = as_floating(params), as_arrays(batch)
    one = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype), batch
    )
    if not callable(loss_fn):
        raise ValueError(
            f"{name}: loss_fn must be a function (params, batch) -> scalar, got "
            f"{type(loss_fn).__name__}."
        )
    found = jax.eval_shape(loss_fn, params, one)
    scalar = getattr(found, "shape", None) == ()
    if not scalar or not jnp.issubdtype(found.dtype, jnp.floating):
        raise ValueError(
            f"{name}: loss_fn must return one floating scalar, the mean over the rows "
            f"of a batch, got {found} for a batch of one row; take the mean, and drop "
            "what else it returns."
        )
    return params, batch, rows


def as_floating(tree: PyTree) -> PyTree:
    """Makes jax arrays of the leaves, of one dtype for good (not weakly typed)."""
    return jax.tree.map(lambda p: jnp.asarray(p, jnp.result_type(p)), tree)


def row_weights(name: str, batch: PyTree, rows: int) -> Float[Array, " rows"]:
    """Gives the weight of each row: its own weights' sum, or 1.

    Raises:
      ValueError: if the third entry of a tuple cannot be weights.
    """
    weights = weights_of(batch)
    if weights is None:
        return jnp.ones(rows)
    kind = getattr(weights, "dtype", None)
    real = kind is not None and jnp.issubdtype(kind, jnp.floating)
    if not real and kind != jnp.bool_:
        raise ValueError(
            f"{name}: the third entry of a tuple batch holds the rows' weights, "
            f"floating or boolean, got {kind or type(weights).__name__}; pass other "
            "batches as ((a, b), targets) or as a dict."
        )
    weights = weights.astype(jnp.promote_types(kind, jnp.result_type(float)))
    return weights.reshape(rows, -1).sum(axis=1)


def refuse_weights(name: str, batch: PyTree) -> None:
    """Refuses a batch with weights.

    Raises:
      ValueError: if it is a tuple of more than two.
    """
    if weights_of(batch) is not None:
        raise ValueError(
            f"{name}: order statistics take all rows alike, got a batch with weights "
            "(the third entry of a tuple); leave padding out and pass (inputs, "
            "targets), or other batches as ((a, b), targets) or as a dict."
        )


def row_gradient(loss_fn: Loss, params: PyTree) -> Callable[[PyTree], PyTree]:
    """Makes the gradient on one row, which loses its axis in ``vmap``."""

    def gradient(row):
        return jax.grad(loss_fn)(params, jax.tree.map(lambda x: x[None], row))

    return gradient


def map_rows(
    function: Callable[[PyTree], PyTree],
    batch: PyTree,
    rows: int,
    microbatch: int | None,
) -> PyTree:
    """Maps a function of a row over the rows, ``microbatch`` at once."""
    if microbatch is None or microbatch >= rows:
        return jax.vmap(function)(batch)
    return jax.lax.map(function, batch, batch_size=microbatch)


def sum_over(function: Callable[[PyTree], PyTree], parts: Parts) -> PyTree:
    """Sums a function of some rows over parts, one after the other."""
    if parts.stack is None:
        return function(parts.rest)
    first = jax.tree.map(lambda leaf: leaf[0], parts.stack)
    shapes = jax.eval_shape(function, first)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    add = lambda sums, part: jax.tree.map(jnp.add, sums, function(part))
    sums, _ = jax.lax.scan(lambda c, part: (add(c, part), None), zeros, parts.stack)
    return sums if parts.rest is None else add(sums, parts.rest)
