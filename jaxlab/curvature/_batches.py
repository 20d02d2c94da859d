"""Data of the operators: one batch, a list of them, or a stream from the host.

A tuple is a batch, ``(inputs, targets)`` or ``(inputs, targets, weights)``; a list
holds batches; a callable gives them anew on each pass. On the device the rows lie in
parts: a stack of equal ones, which a compiled loop goes through, and a rest with fewer
rows. A quantity that is a mean over rows is then the mean over parts, weighed by their
rows or the sums of their weights; no row needs padding.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Key, PyTree

from jaxlab._checks import check_count
from jaxlab._norms import wide

Stream = Callable[[], Iterable[Any]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Parts:
    """Rows on the device.

    Attributes:
      stack: batches of one size, each array with a leading axis of parts; or ``None``.
      rest: one more batch; or ``None``.
    """

    stack: PyTree
    rest: PyTree


def weights_of(batch: Any) -> ArrayLike | None:
    """Gives the weights of a batch, which stand in its third place."""
    return batch[2] if isinstance(batch, tuple) and len(batch) > 2 else None


def rows_of(name: str, batch: PyTree) -> int:
    """Counts the rows of a batch.

    Raises:
      ValueError: if there are none, or the arrays do not agree.
    """
    leaves = jax.tree.leaves(batch)
    kinds = sorted({type(x).__name__ for x in leaves if not hasattr(x, "shape")})
    if kinds:
        raise _no_batch(name, ", ".join(kinds))
    counts = {leaf.shape[:1] for leaf in leaves}
    if len(counts) != 1 or counts <= {(), (0,)}:
        raise ValueError(
            f"{name}: every array of a batch needs one row per example, at least one; "
            f"got leading axes {sorted(counts)}."
        )
    ((count,),) = counts
    return count


def _no_batch(name: str, got: str) -> ValueError:
    return ValueError(
        f"{name}: batches must be a batch (inputs, targets) or (inputs, targets, "
        "weights) of arrays, a list of such tuples, or a callable that returns an "
        f"iterable of them; got {got} in place of arrays. Wrap a data loader: "
        "batches=lambda: loader."
    )


def check_microbatch(name: str, microbatch: int | None) -> None:
    """Refuses what is no number of rows.

    Raises:
      ValueError: unless it is ``None`` or an integer >= 1.
    """
    check_count(name, optional=True, microbatch=microbatch)


def collected(
    name: str,
    batches: Any,
    microbatch: int | None,
    convert: Callable[[Any, int], PyTree],
) -> Parts:
    """Lays one batch or a list of them out in parts of ``microbatch`` rows at most.

    Args:
      name: of the public function.
      batches: a batch, or a list of batches of one size; the last may be smaller.
      microbatch: rows; ``None`` leaves batches whole.
      convert: ``(batch, rows before it) -> tree`` that checks a batch.

    Raises:
      ValueError: if there are no rows or the batches do not fit together.
    """
    nothing = jax.tree_util.default_registry.flatten_one_level(batches) is None
    if nothing and not hasattr(batches, "__array__"):
        raise _no_batch(name, type(batches).__name__)
    if not isinstance(batches, list):
        return cut(name, convert(batches, 0), microbatch)
    if not batches:
        raise ValueError(f"{name}: batches must not be empty.")
    converted, sizes = [], []
    for batch in batches:
        if not isinstance(batch, (tuple, dict)):
            raise ValueError(
                f"{name}: a list of batches must hold tuples (inputs, targets) or "
                f"(inputs, targets, weights), got a {type(batch).__name__} in it; a "
                "single batch is a tuple."
            )
        converted.append(convert(batch, sum(sizes)))
        sizes.append(rows_of(name, converted[-1]))
        check_alike(name, converted[0], converted[-1])
    first = sizes[0]
    if any(size != first for size in sizes[:-1]) or sizes[-1] > first:
        raise ValueError(
            f"{name}: the batches of a list must have the same number of rows, only "
            f"the last may have fewer; got {sizes}. Join them to one batch and pass "
            "microbatch=, or pass a callable that yields them."
        )
    if microbatch is not None and microbatch < first:
        return cut(name, _joined(converted), microbatch)
    if len(sizes) == 1:
        return Parts(None, converted[0])
    ragged = sizes[-1] < first
    equal = converted[:-1] if ragged else converted
    return Parts(_stacked(equal), converted[-1] if ragged else None)


def check_alike(name: str, first: PyTree, other: PyTree) -> None:
    """Refuses a batch whose rows are unlike those of the first.

    Raises:
      ValueError: if the trees or the shapes of the rows differ.
    """
    shapes = [
        (jax.tree.structure(batch), [leaf.shape[1:] for leaf in jax.tree.leaves(batch)])
        for batch in (first, other)
    ]
    if shapes[0] != shapes[1]:
        (one, of_one), (two, of_two) = shapes
        raise ValueError(
            f"{name}: all batches need the same tree and the same shape of a row; "
            f"got {one} with {of_one} first, then {two} with {of_two}."
        )


def cut(name: str, batch: PyTree, microbatch: int | None) -> Parts:
    """Cuts a batch into parts of ``microbatch`` rows and a rest."""
    if microbatch is None or rows_of(name, batch) <= microbatch:
        return Parts(None, batch)
    return _cut(batch, microbatch=microbatch)


@functools.partial(jax.jit, static_argnames="microbatch")
def _cut(batch: PyTree, *, microbatch: int) -> Parts:
    count = jax.tree.leaves(batch)[0].shape[0]
    parts = count // microbatch
    split = parts * microbatch

    def stacked(leaf):
        # Every parts-th row: where rows are spread over devices, so is each part.
        leaf = leaf[:split].reshape(microbatch, parts, *leaf.shape[1:])
        return jnp.swapaxes(leaf, 0, 1)

    rest = None if split == count else jax.tree.map(lambda leaf: leaf[split:], batch)
    return Parts(jax.tree.map(stacked, batch), rest)


@jax.jit
def _stacked(batches: list[PyTree]) -> PyTree:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *batches)


@jax.jit
def _joined(batches: list[PyTree]) -> PyTree:
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *batches)


def weight_of(batch: PyTree) -> Float[Array, ""]:
    """Sums the weights of a batch; a row without one weighs 1."""
    weights = weights_of(batch)
    if weights is None:
        return jnp.asarray(float(jax.tree.leaves(batch)[0].shape[0]))
    return jnp.sum(wide(weights))


def added(sums: PyTree, weight: ArrayLike, image: PyTree) -> PyTree:
    """Adds a part to sums; one of weight 0 may hold anything."""
    add = lambda s, x: s + jnp.where(weight == 0, 0, jnp.asarray(weight, s.dtype) * x)
    return jax.tree.map(add, sums, jax.tree.map(wide, image))


def divided(sums: PyTree, total: ArrayLike) -> PyTree:
    """Divides sums by the total weight; nothing by nothing is 0."""
    safe = jnp.where(total == 0, 1, total)
    return jax.tree.map(lambda s: s / jnp.asarray(safe, s.dtype), sums)


def mean_over(function: Callable[[Any], PyTree], data: Parts | None) -> PyTree:
    """Means a function of a batch over parts, weighed by their rows.

    One part costs nothing more than the function. Several are summed in float32 at
    least, and the result keeps that dtype.
    """
    if data is None or data.stack is None:
        return function(None if data is None else data.rest)

    def body(carry, batch):
        sums, total = carry
        weight = weight_of(batch)
        return (added(sums, weight, function(batch)), total + weight), None

    first = jax.tree.map(lambda leaf: leaf[0], data.stack)
    shape = jax.eval_shape(lambda b: jax.tree.map(wide, function(b)), first)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shape)
    nothing = jnp.zeros((), jax.eval_shape(weight_of, first).dtype)
    carry, _ = lax.scan(body, (zeros, nothing), data.stack)
    if data.rest is not None:
        carry, _ = body(carry, data.rest)
    return divided(*carry)


def padded(batch: PyTree, rows: int) -> PyTree:
    """Repeats the first row, at weight 0, until there are ``rows``."""
    missing = rows - jax.tree.leaves(batch)[0].shape[0]
    if missing <= 0:
        return batch
    repeat = lambda leaf: jnp.concatenate(
        [leaf, jnp.broadcast_to(leaf[:1], (missing, *leaf.shape[1:]))]
    )
    inputs, targets, weights, *more = jax.tree.map(repeat, batch)
    fields = [inputs, targets, weights.at[-missing:].set(0), *more]
    return type(batch)(*fields) if hasattr(batch, "_fields") else tuple(fields)


@functools.partial(jax.jit, static_argnames="count")
def row_keys(
    key: Key[Array, ""], start: ArrayLike, *, count: int
) -> Key[Array, " count"]:
    """Gives each row a key of its own, whatever the batches that it comes in."""
    places = jnp.asarray(start, jnp.uint32) + jnp.arange(count, dtype=jnp.uint32)
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, places)


def as_arrays(batch: PyTree) -> PyTree:
    """Puts NumPy arrays on the device; what is no array stays for a message."""
    return jax.tree.map(
        lambda leaf: jnp.asarray(leaf) if hasattr(leaf, "__array__") else leaf, batch
    )
