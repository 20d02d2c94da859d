"""What operators over data share: trees in and out, parts, holes, streams.

Such an operator is a mean over parts of the data of products that one part gives. A
subclass knows the product on one part; everything else is here.
"""

import collections
import dataclasses
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jaxlab._norms import wide
from jaxlab.curvature._batches import (
    Stream,
    added,
    check_alike,
    cut,
    divided,
    mean_over,
    padded,
    rows_of,
    weight_of,
    weights_of,
)
from jaxlab.curvature._functions import Filled, Function
from jaxlab.curvature._options import exact_products, under_trace
from jaxlab.curvature._vectors import Operator, Space
from jaxlab.trees import fill_holes, has_holes, punch_holes

_IN_FLIGHT = 2  # streamed batches that may lie on the device at once
_HOLE = object()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Partwise:
    """An operator at ``params`` that is a mean over rows of data.

    Attributes:
      function: the loss or the model, a callable pytree.
      params: where the matrix is taken.
      data: rows on the device; ``None`` where there are none, or a stream has them.
      name: of the public function, for messages; static.
    """

    function: Any
    params: PyTree
    data: Any
    name: str = dataclasses.field(metadata={"static": True})

    def __call__(self, v: PyTree) -> PyTree:
        """Multiplies a tree like the parameters, which may have holes, by A."""
        return self._run("product", v)

    def linearize(self) -> Operator:
        """Gives the same map with what does not depend on its argument done once.

        What is kept are the activations of one part, so with several parts this gives
        the operator itself.
        """
        if self.data is not None and self.data.stack is not None:
            return self.with_fixed_targets()
        with exact_products():
            return self.linear(None if self.data is None else self.data.rest)

    def quadratic_form(self, v: PyTree) -> Float[Array, ""]:
        """Gives ``v . A v`` from forward passes alone."""
        return self._run("form", v)

    def product(self, v: PyTree, batch: Any) -> PyTree:
        """Multiplies by the matrix of one part."""
        raise NotImplementedError

    def form(self, v: PyTree, batch: Any) -> Float[Array, ""]:
        """Gives ``v . A v`` for the matrix of one part."""
        raise NotImplementedError

    def linear(self, batch: Any) -> Operator:
        """Linearises on one part."""
        raise NotImplementedError

    def with_fixed_targets(self) -> "Partwise":
        """Draws what is random in the operator, where something is."""
        return self

    def convert(self, batch: Any, start: Any) -> PyTree:
        """Checks a batch that the user gave; ``start`` rows came before it."""
        raise NotImplementedError

    def weighted(self, batch: PyTree) -> PyTree:
        """Gives a batch weights, where its rows may then be padded."""
        return batch

    def at(self, v: PyTree) -> "Partwise":
        """Gives the operator on the leaves that are not masked in ``v``."""
        if not has_holes(v) or jax.tree.structure(v) == jax.tree.structure(self.params):
            return self
        try:
            kept = punch_holes(self.params, v)
        except ValueError:
            raise _unlike(self.name, v, self.params) from None
        return self.on(Filled(self.function, self.params), kept)

    def on(self, function: Function, params: PyTree) -> "Partwise":
        """Gives the operator of another function."""
        return dataclasses.replace(self, function=function, params=params)

    def _run(self, what: str, v: PyTree) -> Any:
        run = apply if under_trace(self, v) else _jitted
        return run(self, v, what=what)


def apply(operator: Partwise, v: PyTree, *, what: str) -> Any:
    """Multiplies, or computes what else a method of that name gives."""
    with jax.named_scope(operator.name), exact_products():
        operator = operator.at(v)
        tangents = tangents_of(operator.name, v, operator.params)
        method = getattr(operator, what)
        image = mean_over(lambda batch: method(tangents, batch), operator.data)
        return image if what != "product" else image_of(image, v)


_jitted = jax.jit(apply, static_argnames="what")


def tangents_of(name: str, v: PyTree, params: PyTree, argument: str = "v") -> PyTree:
    """Casts a tree to the dtypes of ``params``, with zeros in its holes.

    Raises:
      ValueError: if the tree, its shapes or its dtypes do not fit.
    """
    try:
        full = fill_holes(v, jax.tree.map(lambda p: _HOLE, params))
    except ValueError:
        raise _unlike(name, v, params, argument) from None
    if jax.tree.structure(full) != jax.tree.structure(params):
        raise _unlike(name, v, params, argument)
    paths, structure = jax.tree_util.tree_flatten_with_path(params)
    leaves = []
    for (path, p), leaf in zip(paths, jax.tree.leaves(full), strict=True):
        if leaf is _HOLE:
            leaves.append(jnp.zeros(p.shape, p.dtype))
            continue
        where = f"{argument}{jax.tree_util.keystr(path)}"
        if jnp.shape(leaf) != p.shape:
            raise ValueError(
                f"{name}: {argument} must have the shapes of params, got "
                f"{jnp.shape(leaf)} instead of {p.shape} at {where}."
            )
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise ValueError(
                f"{name}: the leaves of {argument} must be real floating-point arrays, "
                f"got {jnp.result_type(leaf)} at {where}."
            )
        leaves.append(jnp.asarray(leaf).astype(p.dtype))
    return jax.tree.unflatten(structure, leaves)


def abstract(space: Space) -> PyTree:
    """Gives the tree of shapes and dtypes that a space describes."""
    leaves = map(jax.ShapeDtypeStruct, space.shapes, space.dtypes)
    return jax.tree.unflatten(space.structure, list(leaves))


def image_of(image: PyTree, v: PyTree) -> PyTree:
    """Punches the holes of ``v`` and takes over its dtypes."""
    image = punch_holes(image, v) if has_holes(v) else image
    return jax.tree.map(lambda x, y: x.astype(jnp.result_type(y)), image, v)


def _unlike(name, v, params, argument="v") -> ValueError:
    return ValueError(
        f"{name}: {argument} must be a tree like params, "
        f"{jax.tree.structure(params)}, or have optax.MaskedNode() in place of some of "
        f"its leaves or sub-trees; got {jax.tree.structure(v)}."
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Streamed:
    """A host operator: a pass over a stream for each product."""

    operator: Any
    batches: Stream = dataclasses.field(metadata={"static": True})
    microbatch: int | None = dataclasses.field(metadata={"static": True})
    host: ClassVar[bool] = True

    @property
    def params(self) -> PyTree:
        """Gives the parameters at which the matrix is taken."""
        return self.operator.params

    def __call__(self, v: PyTree) -> PyTree:
        """Multiplies a tree like the parameters, which may have holes, by A."""
        sums = jax.tree.map(lambda x: jnp.zeros_like(wide(x)), v)
        return image_of(self._pass("product", v, sums), v)

    def quadratic_form(self, v: PyTree) -> Float[Array, ""]:
        """Gives ``v . A v`` from forward passes alone."""
        return self._pass("form", v, jnp.zeros(()))

    def on(self, function: Function, params: PyTree) -> "Streamed":
        """Gives the operator of another function."""
        return dataclasses.replace(self, operator=self.operator.on(function, params))

    def _pass(self, what: str, v: PyTree, sums: Any) -> Any:
        name = self.operator.name
        if under_trace(self, v):
            raise ValueError(
                f"{name}: this operator streams its data from the host and cannot run "
                "under jit, vmap or grad. Call it outside, or give the operator its "
                "batches as a list or one batch, which then lie on the device."
            )
        operator = self.operator.at(v)
        v = jax.tree.map(lambda x: wide(x), v)
        total, start, size, first = jnp.zeros(()), 0, 0, None
        running = collections.deque()
        for batch in self.batches():
            batch = operator.weighted(operator.convert(batch, start))
            rows = rows_of(name, batch)
            if first is None:
                first, size = shapes_of(batch), rows
            check_alike(name, first, batch)
            if weights_of(batch) is not None:
                batch = padded(batch, size)
            options = {"what": what, "microbatch": self.microbatch}
            sums, total, token = _added(operator, batch, v, sums, total, **options)
            start += rows
            # Dispatch runs ahead: without a limit the stream would pile up there.
            running.append(token)
            if len(running) >= _IN_FLIGHT:
                running.popleft().block_until_ready()
        if not start:
            raise ValueError(
                f"{name}: batches() gave no batch. It is called once for each product "
                "and must return a fresh iterable each time, not one that is used up."
            )
        return divided(sums, total)


def shapes_of(batch: PyTree) -> PyTree:
    """Keeps the shapes of a batch without its rows."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch)


@functools.partial(
    jax.jit, static_argnames=("what", "microbatch"), donate_argnames=("sums", "total")
)
def _added(operator, batch, v, sums, total, *, what, microbatch):
    parts = cut(operator.name, batch, microbatch)
    image = apply(dataclasses.replace(operator, data=parts), v, what=what)
    weight = weight_of(batch)
    total = total + weight
    return added(sums, weight, image), total, jnp.copy(total)
