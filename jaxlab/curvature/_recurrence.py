"""The Lanczos recurrence: one step, and three ways to drive it.

A step is handed the product A q_j, so the same function stands in the body of one
compiled loop, in a jitted function that Python calls step by step, and behind a product
that streams its data.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxlab.curvature._ritz import (
    Locks,
    Replay,
    Scalar,
    Vector,
    divided,
    dot,
    lock_converged,
    no_locks,
    norm,
    orthonormalized,
    replay,
    without,
)
from jaxlab.curvature._vectors import (
    Operator,
    Product,
    Space,
    is_host,
    on_vectors,
    prepared,
)

Reorthogonalize = Literal["full", "selective", "none"]
Step = Callable[[Any, Vector], Any]

_CHUNK = 4  # rows of the basis that one matrix product takes on a CPU
# A vector below this many epsilons of the largest |A q| is taken for zero. Round-off
# leaves 1 to 10 where an invariant subspace ends, and more where the betas before were
# small; what is missed goes on with more eigenvectors, at weights of about eps^2.
_STILL = 32.0


class State(NamedTuple):
    """What stands between two steps; the sizes do not change."""

    q: Vector  # the next Lanczos vector; zero after a breakdown
    previous: Vector
    coupling: Scalar  # the beta between the two
    index: Int[Array, ""]
    num_steps: Int[Array, ""]
    alpha: Float[Array, " m"]
    beta: Float[Array, " m"]
    scale: Scalar  # the largest |A q| so far
    asymmetry: Scalar  # the largest |q_{j-1} . A q_j - beta_{j-1}| so far, scaled below
    rows: Float[Array, "rows p"]  # Lanczos vectors, or locked Ritz vectors
    locks: Locks | None


@dataclasses.dataclass(frozen=True)
class Forward:
    """Takes one step; hashable, so that it may be static."""

    order: int
    reorthogonalize: Reorthogonalize

    @property
    def rows(self) -> int:
        """Says how many vectors are kept."""
        kept = {"full": self.order, "selective": -(-self.order // 4), "none": 0}
        return kept[self.reorthogonalize]

    def begin(self, start: Vector) -> State:
        """Makes the state before the first step."""
        dtype, zero = start.dtype, jnp.zeros((), start.dtype)
        count = jnp.zeros((), jnp.int32)
        empty = jnp.zeros((self.order,), dtype)
        selective = self.reorthogonalize == "selective"
        return State(
            q=start / norm(start),
            previous=jnp.zeros_like(start),
            coupling=zero,
            index=count,
            num_steps=count,
            alpha=empty,
            beta=empty,
            scale=zero,
            asymmetry=zero,
            rows=jnp.zeros((self.rows, start.size), dtype),
            locks=no_locks(self.rows, self.order, dtype) if selective else None,
        )

    def __call__(self, state: State, image: Vector) -> State:
        """Goes from A q_j to alpha_j, beta_j and q_{j+1}."""
        j, q, rows = state.index, state.q, state.rows
        scale = jnp.maximum(state.scale, norm(image))
        back = jnp.abs(dot(state.previous, image) - state.coupling)
        if self.reorthogonalize != "full":
            # Neighbours are orthogonal to epsilon * |A| / beta only.
            back = back * state.coupling / jnp.where(scale == 0, 1, scale)
        alpha = dot(q, image)
        w = image - alpha * q - state.coupling * state.previous
        if self.reorthogonalize == "full":
            rows = lax.dynamic_update_index_in_dim(rows, q, j, 0)
            before = norm(w)
            w = _without_first(rows, w, j)
            # Once is enough, unless most of w was cancelled.
            again = norm(w) < before * 2**-0.5
            w = lax.cond(again, _without_first, lambda rows, w, j: w, rows, w, j)
        elif self.reorthogonalize == "selective":
            w = without(rows, w, state.locks.since <= j)
        beta = norm(w)
        beta = jnp.where(beta <= _STILL * jnp.finfo(w.dtype).eps * scale, 0, beta)
        alive = (j == 0) | (state.coupling != 0)
        state = State(
            q=divided(w, beta),
            previous=q,
            coupling=beta,
            index=j + 1,
            num_steps=state.num_steps + alive,
            alpha=lax.dynamic_update_index_in_dim(state.alpha, alpha, j, 0),
            beta=lax.dynamic_update_index_in_dim(state.beta, beta, j, 0),
            scale=scale,
            asymmetry=jnp.maximum(state.asymmetry, back),
            rows=rows,
            locks=state.locks,
        )
        if self.reorthogonalize != "selective":
            return state
        locks = lock_converged(state.locks, state.alpha, state.beta, state.num_steps)
        return state._replace(locks=locks)


def _without_first(rows: Float[Array, "m p"], w: Vector, j: Int[Array, ""]) -> Vector:
    """Projects on rows 0 to j; the others are zero."""
    # On accelerators it costs less to read them too than to decide.
    whole = lambda rows, w, j: without(rows, w)
    return lax.platform_dependent(rows, w, j, cpu=_in_chunks, default=whole)


def _in_chunks(rows: Float[Array, "m p"], w: Vector, j: Int[Array, ""]) -> Vector:
    """Projects on a few rows at a time, so that only they are copied."""
    order = len(rows)
    width = min(_CHUNK, order)

    def project(i, rows, rest):
        first = jnp.minimum(i * width, order - width)  # the last chunk overlaps
        chunk = lax.dynamic_slice_in_dim(rows, first, width)
        fresh = first + jnp.arange(width) >= i * width
        return without(chunk, rest, fresh)

    skip = lambda i, rows, rest: rest
    body = lambda i, rest: lax.cond(i * width <= j, project, skip, i, rows, rest)
    return lax.fori_loop(0, -(-order // width), body, w)


def _to_replay(state: State, unit: Vector) -> Any:
    fresh = (state.locks.since == state.index)[:, None]
    coefficients = jnp.where(fresh, state.locks.coefficients, 0)
    since = state.locks.since
    return replay(unit, state.alpha, state.beta, state.rows, coefficients, since)


def _from_replay(state: State, sums: Float[Array, "slots p"]) -> State:
    locks = state.locks
    rows = orthonormalized(sums, locks.since == state.index)
    done = jnp.zeros_like(locks.fresh)
    locks = locks._replace(replayed=locks.replayed + state.index, fresh=done)
    return state._replace(rows=rows, locks=locks)


def loop(step: Step, product: Product, state: Any, count: Any) -> Any:
    """Takes steps in one compiled loop."""
    return lax.fori_loop(0, count, lambda _, s: step(s, product(s.q)), state)


def run_compiled(product: Product, start: Vector, step: Forward) -> State:
    """Runs the whole recurrence in one loop; call it under jit."""
    state = step.begin(start)
    if state.locks is None:
        return loop(step, product, state, step.order)
    unit = state.q

    def lock(state):
        again = loop(Replay(step.rows), product, _to_replay(state, unit), state.index)
        return _from_replay(state, again.sums)

    def body(_, state):
        state = step(state, product(state.q))
        return lax.cond(state.locks.fresh, lock, lambda state: state, state)

    return lax.fori_loop(0, step.order, body, state)


_begin = jax.jit(lambda start, *, step: step.begin(start), static_argnames="step")
linearized = jax.jit(prepared)
_taken = jax.jit(
    lambda state, image, *, step: step(state, image),
    static_argnames="step",
    donate_argnames="state",
)
_to_replay_jit = jax.jit(_to_replay)
_from_replay_jit = jax.jit(_from_replay, donate_argnums=(0, 1))


@functools.partial(
    jax.jit, static_argnames=("name", "step", "space"), donate_argnames="state"
)
def _turned(name, operator, state, *, step, space):
    return step(state, on_vectors(name, operator, space)(state.q))


def host_loop(
    name: str, step: Step, operator: Operator, state: Any, count: int, *, space: Space
) -> Any:
    """Takes steps from Python; the state is donated from one to the next."""
    for _ in range(count):
        state = host_step(name, step, operator, state, space=space)
    return state


def host_step(
    name: str, step: Step, operator: Operator, state: Any, *, space: Space
) -> Any:
    """Takes one step: product and step in one program, unless the product streams."""
    if is_host(operator):
        image = on_vectors(name, operator, space)(state.q)
        return _taken(state, image, step=step)
    return _turned(name, operator, state, step=step, space=space)


def run_host(
    name: str, operator: Operator, start: Vector, *, step: Forward, space: Space
) -> State:
    """Runs the whole recurrence from Python; ``operator`` is ``linearized`` already."""
    state = _begin(start, step=step)
    unit = jnp.array(state.q)  # a copy: the state is donated
    for _ in range(step.order):
        state = host_step(name, step, operator, state, space=space)
        if state.locks is not None and bool(state.locks.fresh):
            again = _to_replay_jit(state, unit)
            count = int(state.index)
            turn = Replay(step.rows)
            again = host_loop(name, turn, operator, again, count, space=space)
            state = _from_replay_jit(state, again.sums)
        if float(state.coupling) == 0:
            break
    return state
