"""Products with random vectors: means over single ones, and methods on k at a time.

Both run in one compiled program with the product in it once, or step by step from
Python for operators that stream their data or convolve on a CPU.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Key, PyTree

from jaxlab._checks import check_count
from jaxlab.curvature._convolutions import driven
from jaxlab.curvature._options import (
    MEMORY_LIMIT,
    Driver,
    as_pytree,
    under_trace,
)
from jaxlab.curvature._recurrence import linearized
from jaxlab.curvature._vectors import (
    Operator,
    Product,
    Space,
    is_host,
    on_vectors,
    prepared,
    random_vector,
    space_of,
)

BASES = 5  # of k vectors that a method holds at once, as compiled

Rows = Float[Array, "k p"]
Vector = Float[Array, " p"]
# What one probe is worth: (name, operator, space, source) -> array.
Measure = Callable[[str, Operator, Space, Array], Array]


class Setting(NamedTuple):
    """What a run needs to know besides arrays; hashable, so that it may be static."""

    name: str
    space: Space
    at_once: int


class State(NamedTuple):
    """What a method on k vectors keeps between two rounds of products."""

    rows: Rows  # multiplied next
    extra: PyTree


class Method(NamedTuple):
    """A method that multiplies k vectors, makes k others of that, and so on.

    ``begin(sources, space)`` makes the first state; each of ``steps`` takes a state and
    the images of its rows to the next one, as ``step(sources, space, state, images)``;
    ``finish``, called alike, gives the result.
    """

    begin: Callable[..., State]
    steps: tuple[Callable[..., State], ...]
    finish: Callable[..., Any]


def opened(
    name: str,
    key: Key[Array, ""],
    operator: Operator,
    like: PyTree,
    num_matvecs: int,
    probes_at_once: int,
    driver: Driver,
) -> tuple[Setting, Operator, str, bool]:
    """Checks what every estimator takes.

    Returns:
      The setting, the operator as a pytree, the driver, and whether values are traced.

    Raises:
      ValueError: for ``like``, a count or a driver that cannot be.
    """
    space = space_of(name, like)
    check_count(name, num_matvecs=num_matvecs, probes_at_once=probes_at_once)
    operator = as_pytree(operator)
    traced = under_trace(key, operator, like)
    operator, chosen = driven(name, operator, space, driver, traced=traced)
    return Setting(name, space, probes_at_once), operator, chosen, traced


def sketch_size(
    name: str, method: str, products: int, num_matvecs: int, space: Space
) -> int:
    """Says how many vectors a method keeps that multiplies each ``products`` times.

    Raises:
      ValueError: if there is not one.
    """
    if num_matvecs < products:
        raise ValueError(
            f'{name}: num_matvecs must be at least {products} for method="{method}", '
            f"or {space.size} for the exact answer, got {num_matvecs}."
        )
    return num_matvecs // products


def vector_of(source: Array, space: Space, kind: str) -> Vector:
    """Draws a probe from a key; a vector stands for itself."""
    if jnp.issubdtype(source.dtype, jnp.floating):
        return source.astype(space.dtype)
    return random_vector(source, space, kind)


def rows_of(one: Callable[[Any], Vector], xs: Any) -> Rows:
    """Stacks vectors that are made a few at a time, so that only they are copied."""
    count = len(jax.tree.leaves(xs)[0])
    return lax.map(one, xs, batch_size=a_few_of(count))


def a_few_of(count: int) -> int:
    """Picks a divisor of the count, at most 4: a remainder would compile again."""
    return next(size for size in range(4, 0, -1) if count % size == 0)


def matmul(a: Array, b: Array) -> Array:
    """Multiplies without the shortcuts that accelerators take by default."""
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


def orthonormal(rows: Rows) -> tuple[Rows, Float[Array, "k k"]]:
    """Factors k <= p rows: ``rows.T = q.T @ r``. The rows of q are orthonormal."""
    q, r = jnp.linalg.qr(rows.T)
    return q.T, r


def mean_of(
    chosen: str,
    setting: Setting,
    measure: Measure,
    operator: Operator,
    sources: Array,
    shape: tuple[int, ...] = (),
) -> tuple[Array, Array]:
    """Averages a measure over the sources, without keeping what it gave.

    Returns:
      The mean and its standard error, NaN for a single source.
    """
    if chosen == "compiled":
        return _mean_compiled(operator, sources, setting, measure, shape)
    total = _empty(shape, setting.space.dtype)
    for value in _from_host(setting, measure, operator, sources):
        total = _merged_jit(total, value)
    return _mean_and_error(total, len(sources))


def diagonal_entries(
    chosen: str, setting: Setting, operator: Operator
) -> Float[Array, " p"]:
    """Multiplies the p unit vectors: the exact diagonal, in p products."""
    places = jnp.arange(setting.space.size)
    if chosen == "compiled":
        return _entries_compiled(operator, places, setting)
    return jnp.stack(list(_from_host(setting, _entry, operator, places)))


def run(
    chosen: str, setting: Setting, method: Method, operator: Operator, sources: Array
) -> Any:
    """Takes a method through its rounds of products."""
    if chosen == "compiled":
        return _run_compiled(operator, sources, setting, method)
    space = setting.space
    state = _begin_jit(sources, method, space)
    for stage in range(len(method.steps) + 1):
        if stage:
            state = _step_jit(sources, state, images, method, space, stage - 1)
        images = jnp.stack(list(_from_host(setting, _image, operator, state.rows)))
    return _finish_jit(sources, state, images, method, space)


def check_bases(
    name: str, count: int, space: Space, memory_limit: float | None
) -> None:
    """Refuses k vectors like the parameters that do not fit.

    Raises:
      ValueError: with the bytes and what else can be done.
    """
    limit = MEMORY_LIMIT if memory_limit is None else memory_limit
    item = jnp.dtype(space.dtype).itemsize
    needed = BASES * count * space.size * item
    if needed > limit:
        raise ValueError(
            f"{name}: the vectors take {needed:,} bytes ({BASES} bases of {count} x "
            f"{space.size} x {item} bytes), more than memory_limit="
            f"{math.floor(limit):,}. Raise memory_limit, lower num_matvecs, or pass "
            'method="hutchinson" (no basis).'
        )


def _image(name: str, operator: Operator, space: Space, source: Array) -> Vector:
    return on_vectors(name, operator, space)(source)


def _entry(name: str, operator: Operator, space: Space, source: Array) -> Array:
    unit = jnp.zeros((space.size,), space.dtype).at[source].set(1)
    return on_vectors(name, operator, space)(unit)[source]


def _from_host(setting, measure, operator, sources):
    """Yields what the measure gives, source by source."""
    name, space, _ = setting
    streams = is_host(operator)
    operator = operator if streams else linearized(operator)
    for source in sources:
        if streams:
            yield measure(name, operator, space, source)
        else:
            yield _measured(operator, source, name, measure, space)


_measured = jax.jit(
    lambda operator, source, name, measure, space: measure(
        name, operator, space, source
    ),
    static_argnums=(2, 3, 4),
)


class _Total(NamedTuple):
    count: Float[Array, ""]
    mean: Array
    squares: Array  # sum of squared distances from the mean


def _empty(shape: tuple[int, ...], dtype: Any) -> _Total:
    # Three arrays, so that each may be donated.
    return _Total(*(jnp.zeros(s, dtype) for s in ((), shape, shape)))


def _merged(total: _Total, value: Array, count: int = 1, squares: Any = 0) -> _Total:
    """Adds the mean of ``count`` values (Chan, Golub, LeVeque 1983)."""
    both = total.count + count
    gap = value - total.mean
    return _Total(
        both,
        total.mean + gap * (count / both),
        total.squares + squares + gap**2 * (total.count * count / both),
    )


_merged_jit = jax.jit(_merged, donate_argnums=0)


def _mean_and_error(total: _Total, count: int) -> tuple[Array, Array]:
    if count == 1:
        return total.mean, jnp.full_like(total.mean, jnp.nan)
    return total.mean, jnp.sqrt(total.squares / (count - 1) / count)


def scanned_mean(
    one: Callable[[Any], Array], xs: Any, shape: tuple[int, ...], dtype: Any, at_once=1
) -> tuple[Array, Array]:
    """Averages ``one`` over the leading axis of ``xs``; call it under jit."""
    count = len(jax.tree.leaves(xs)[0])

    def add(total, chunk):
        if at_once == 1:
            return _merged(total, one(chunk)), None
        return _chunk(total, chunk), None

    def _chunk(total, chunk):
        values = jax.vmap(one)(chunk)
        mean = jnp.mean(values, axis=0)
        squares = jnp.sum((values - mean[None]) ** 2, axis=0)
        return _merged(total, mean, len(values), squares)

    total, rest = _empty(shape, dtype), count % at_once
    cut = lambda x: x[: count - rest]
    if at_once > 1:
        cut = lambda x: x[: count - rest].reshape((-1, at_once, *x.shape[1:]))
    total, _ = lax.scan(add, total, jax.tree.map(cut, xs))
    if rest:
        total = _chunk(total, jax.tree.map(lambda x: x[count - rest :], xs))
    return _mean_and_error(total, count)


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _mean_compiled(operator, sources, setting, measure, shape):
    name, space, at_once = setting
    operator = prepared(operator)
    one = lambda source: measure(name, operator, space, source)
    at_once = min(at_once, len(sources))
    return scanned_mean(one, sources, shape, space.dtype, at_once)


@functools.partial(jax.jit, static_argnums=2)
def _entries_compiled(operator, places, setting):
    name, space, at_once = setting
    operator = prepared(operator)
    one = lambda place: _entry(name, operator, space, place)
    return lax.map(one, places, batch_size=at_once if at_once > 1 else None)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _run_compiled(operator, sources, setting, method):
    name, space, at_once = setting
    product: Product = on_vectors(name, prepared(operator), space)
    batch_size = at_once if at_once > 1 else None
    multiply = lambda rows: lax.map(product, rows, batch_size=batch_size)
    state = method.begin(sources, space)
    stages = len(method.steps) + 1
    if stages == 1:
        return method.finish(sources, space, state, multiply(state.rows))
    branches = [lambda state, images: state]
    branches += [functools.partial(step, sources, space) for step in method.steps]

    def body(stage, carry):
        state = lax.switch(stage, branches, *carry)
        return state, multiply(state.rows)

    carry = state, jnp.zeros_like(state.rows)
    return method.finish(sources, space, *lax.fori_loop(0, stages, body, carry))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _begin_jit(sources, method, space):
    return method.begin(sources, space)


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def _step_jit(sources, state, images, method, space, stage):
    return method.steps[stage](sources, space, state, images)


@functools.partial(jax.jit, static_argnums=(3, 4))
def _finish_jit(sources, state, images, method, space):
    return method.finish(sources, space, state, images)
