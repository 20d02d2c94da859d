"""What every function over the recurrence checks and decides before it runs."""

import dataclasses
import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from jaxlab._checks import check_count
from jaxlab.curvature._recurrence import Forward
from jaxlab.curvature._vectors import Operator, Space, is_host, is_traced, prepared

Driver = Literal["auto", "compiled", "host"]

MEMORY_LIMIT = 2**30  # bytes of a basis, where the caller sets no limit


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Wrapped:
    operator: Any = dataclasses.field(metadata={"static": True})

    def __call__(self, v: PyTree) -> PyTree:
        return self.operator(v)

    def linearize(self) -> Operator:
        ready = prepared(self.operator)
        return self if ready is self.operator else as_pytree(ready)


def as_pytree(operator: Operator) -> Operator:
    """Wraps a plain function, which jit would take for a leaf that is no array.

    Raises:
      ValueError: if the operator is no callable.
    """
    if not callable(operator):
        raise ValueError(
            "An operator must be a callable v -> A v on trees like the parameters, got "
            f"{type(operator).__name__}; for a matrix pass "
            "jax.tree_util.Partial(jnp.matmul, matrix)."
        )
    leaves = jax.tree.leaves(operator)
    plain = len(leaves) == 1 and leaves[0] is operator
    return _Wrapped(operator) if plain and not is_host(operator) else operator


def under_trace(*trees: PyTree) -> bool:
    """Tells whether values are out of reach: inside jit, or given a tracer."""
    return is_traced(*trees) or isinstance(jnp.zeros(()), jax.core.Tracer)


def chosen_driver(
    name: str, operator: Operator, space: Space, driver: Driver, *, traced: bool
) -> Literal["compiled", "host"]:
    """Decides who loops.

    Raises:
      ValueError: for a driver that the operator or the caller's jit rules out.
    """
    if driver not in ("auto", "compiled", "host"):
        raise ValueError(
            f'{name}: driver must be "auto", "compiled" or "host", got {driver!r}.'
        )
    if is_host(operator):
        if traced:
            raise ValueError(
                f"{name}: this operator streams its data from the host and cannot run "
                "under jit, vmap or grad; call the function outside, or give the "
                "operator batches that lie on the device."
            )
        if driver == "compiled":
            raise ValueError(
                f"{name}: this operator streams its data from the host and cannot "
                'stand in a compiled loop; pass driver="host" or "auto".'
            )
        return "host"
    if driver == "host" and traced:
        raise ValueError(
            f'{name}: driver="host" loops in Python and cannot run under jit, vmap or '
            'grad; pass driver="compiled" or "auto".'
        )
    if driver != "auto":
        return driver
    if traced or not _on_cpu(operator):
        return "compiled"
    abstract = jax.eval_shape(lambda operator: operator, operator)
    leaves, structure = jax.tree.flatten(abstract)
    found = _has_convolutions(structure, tuple(leaves), space)
    return "host" if found else "compiled"


def _on_cpu(operator: Operator) -> bool:
    leaves = [x for x in jax.tree.leaves(operator) if isinstance(x, jax.Array)]
    platforms = {device.platform for leaf in leaves for device in leaf.devices()}
    return (platforms or {jax.default_backend()}) == {"cpu"}


@functools.lru_cache(maxsize=64)
def _has_convolutions(structure: Any, leaves: tuple[Any, ...], space: Space) -> bool:
    """Looks for convolutions, slow inside loops that XLA compiles for CPUs."""
    operator = jax.tree.unflatten(structure, leaves)
    vector = jax.ShapeDtypeStruct((space.size,), space.dtype)
    apply = lambda operator, vector: operator(space.unflatten(vector))
    return _mentions(jax.make_jaxpr(apply)(operator, vector).jaxpr)


def _mentions(jaxpr: Any) -> bool:
    for equation in jaxpr.eqns:
        if equation.primitive.name == "conv_general_dilated":
            return True
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=_is_program
        ):
            if _is_program(inner) and _mentions(getattr(inner, "jaxpr", inner)):
                return True
    return False


def _is_program(thing: Any) -> bool:
    return hasattr(thing, "eqns") or hasattr(thing, "jaxpr")


def exact_products():
    """Makes products exact to the dtype, unless the user has asked for a precision."""
    chosen = jax.config.jax_default_matmul_precision
    return jax.default_matmul_precision(chosen or "highest")


def check_order(
    name: str, order: int, reorthogonalize: str, space: Space, *, clip: bool
) -> Forward:
    """Checks the options and makes the step.

    Raises:
      ValueError: for an order below 1 or, unless it is to be clipped, above the
        dimension, or an unknown scheme.
    """
    check_count(name, order=order)
    if order > space.size and not clip:
        raise ValueError(
            f"{name}: order must be at most the dimension, {space.size}, got {order}."
        )
    if reorthogonalize not in ("full", "selective", "none"):
        raise ValueError(
            f'{name}: reorthogonalize must be "full", "selective" or "none", got '
            f"{reorthogonalize!r}."
        )
    return Forward(min(order, space.size), reorthogonalize)


def check_memory(
    name: str, step: Forward, space: Space, memory_limit: float | None, copies: int = 1
) -> None:
    """Refuses a basis above the limit.

    Raises:
      ValueError: with the bytes and what else can be done.
    """
    limit = MEMORY_LIMIT if memory_limit is None else memory_limit
    item = jnp.dtype(space.dtype).itemsize * space.size * copies
    needed = step.rows * item
    if needed <= limit:
        return
    size = f"{step.rows} x {space.size} x {jnp.dtype(space.dtype).itemsize} bytes"
    size += f", {copies} at once" if copies > 1 else ""
    slots = dataclasses.replace(step, reorthogonalize="selective").rows
    instead = 'reorthogonalize="none" (no basis)'
    if step.reorthogonalize == "full":
        instead = f'reorthogonalize="selective" ({slots * item:,} bytes) or {instead}'
    raise ValueError(
        f"{name}: the basis takes {needed:,} bytes ({size}), more than memory_limit="
        f"{math.floor(limit):,}. Raise memory_limit, lower order, or pass {instead}; "
        "ritz_vectors then makes Ritz vectors in a second pass."
    )


def check_asymmetry(name: str, asymmetry: Any, scale: Any, space: Space) -> None:
    """Refuses an operator whose T came out asymmetric; it looks at values.

    Raises:
      ValueError: if q_{j-1} . A q_j is not q_j . A q_{j-1} up to round-off.
    """
    coarsest = max(float(jnp.finfo(dtype).eps) for dtype in space.dtypes)
    asymmetry, scale = float(jnp.max(asymmetry)), float(jnp.max(scale))
    if asymmetry > 1000 * coarsest * scale:
        raise ValueError(
            f"{name}: the operator must be symmetric, but u . A v and v . A u differ "
            f"by {asymmetry:.3g} for two Lanczos vectors, where |A v| is up to "
            f"{scale:.3g}. Pass check_symmetric=False if that is round-off."
        )
