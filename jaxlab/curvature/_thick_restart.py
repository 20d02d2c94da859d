"""Thick-restart Lanczos: the step, what is decided between steps, and both loops.

The rows of V are orthonormal; the first j have been multiplied, the others wait:

    A V_j^T = V_n^T H[:n, :j],   H = V A V^T,   j <= n,

so a Ritz pair (theta, u) of H[:j, :j] has the residual norm |H[j:n, :j] u|. A step
takes the first waiting row, and what its image has outside the rows becomes the next
one that waits. From one start vector one row waits at a time, and this is Lanczos. From
several it is block Lanczos, where the directions in which the wanted pairs err most
come first. When the rows are full, the best Ritz vectors and the waiting rows are kept:
the same relation holds for them, and it goes on.

Where nothing is left outside (an invariant subspace), a random row begins anew.
References: Wu and Simon, "Thick-Restart Lanczos Method for Large Symmetric Eigenvalue
Problems", SIAM Journal on Matrix Analysis and Applications 2000.
"""

import dataclasses
import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key

from jaxlab.curvature._basis import (
    Rows,
    Square,
    orthogonal,
    projected_twice,
    rotated,
    with_row,
)
from jaxlab.curvature._recurrence import host_step
from jaxlab.curvature._ritz import Scalar, Vector, divided, dot, norm
from jaxlab.curvature._vectors import (
    Operator,
    Product,
    Space,
    random_vector,
)

Which = Literal["largest", "smallest", "both"]

_STILL = 32.0  # epsilons of the largest |A q| below which a vector is zero
_KEPT = 0.4  # share of the rows beyond the wanted ones that a restart keeps
_AFRESH = 40.0  # residuals over the tolerance from which a block start does not pay
_PROBE = 10  # products from a random row before "nothing else is there" is believed
_ADDED = 2  # products beyond those of the start vectors, to see what has overtaken them
_NEVER = -(2**30)


class State(NamedTuple):
    """What stands between two steps; the sizes do not change."""

    rows: Rows  # V; zero from n on
    h: Square
    q: Vector  # row j, which the next product takes
    j: Int[Array, ""]
    n: Int[Array, ""]
    num_products: Int[Array, ""]
    until: Int[Array, ""]  # the j at which the next check is due
    broken_at: Int[Array, ""]  # products at the last random row
    broken_top: Float[Array, " k"]  # the wanted values then
    scale: Scalar  # the largest |A q| so far
    asymmetry: Scalar  # the largest |v_i . A v_j - v_j . A v_i| so far
    key: Key[Array, ""]
    tol: Scalar
    budget: Int[Array, ""]
    values: Float[Array, " k"]  # of the wanted pairs, at the last check
    residuals: Float[Array, " k"]
    busy: Bool[Array, ""]  # a step may follow
    done: Bool[Array, ""]


@dataclasses.dataclass(frozen=True)
class Plan:
    """Holds the sizes; called with a state and an image it takes one step."""

    k: int
    which: Which
    rows: int  # m
    starts: int  # start vectors that were given
    space: Space

    @property
    def whole(self) -> bool:
        """Tells whether the rows can span everything, so that none is dropped."""
        return self.rows == self.space.size

    @property
    def first(self) -> int:
        """Says how many products stand before the first check of a cold start."""
        return min(self.k, self.rows)

    @property
    def period(self) -> int:
        """Says how many products stand between two checks."""
        return 1 + self.k // 8

    def __call__(self, state: State, image: Vector) -> State:
        """Goes from A v_j to column j of H and the row that waits for it."""
        j, n, q, rows, h = state.j, state.n, state.q, state.rows, state.h
        place = jnp.arange(self.rows)
        scale = jnp.maximum(state.scale, norm(image))
        # The local terms first: one projection that has to cancel them too leaves too
        # much.
        before = jnp.maximum(j - 1, 0)
        alpha, coupling = dot(q, image), jnp.where(j > 0, h[before, j], 0)
        previous = lax.dynamic_index_in_dim(rows, before, keepdims=False)
        w = image - alpha * q - coupling * previous
        w, c = projected_twice(rows, w)
        c = c.at[j].add(alpha).at[before].add(coupling)
        c = jnp.where(place < n, c, 0)
        back = jnp.where(place < j, jnp.abs(c - h[:, j]), 0)
        beta = norm(w)
        still = beta <= _STILL * jnp.finfo(w.dtype).eps * scale
        beta = jnp.where(still | (n >= self.space.size), 0, beta)
        h = h.at[:, j].set(c).at[j, :].set(c)
        h = h.at[n, j].add(beta, mode="drop").at[j, n].add(beta, mode="drop")
        rows = with_row(rows, n, divided(w, beta), beta > 0)
        state = state._replace(
            rows=rows,
            h=h,
            j=j + 1,
            n=n + (beta > 0),
            num_products=state.num_products + 1,
            scale=scale,
            asymmetry=jnp.maximum(state.asymmetry, jnp.max(back)),
        )
        return self._ready(state)

    def _ready(self, state: State) -> State:
        j, n = state.j, state.n
        room = (n < self.rows) | self.whole
        q = lax.dynamic_index_in_dim(state.rows, j, keepdims=False)
        goes_on = (j < state.until) & (j < n) & room & jnp.isfinite(state.scale)
        busy = goes_on & (state.num_products < state.budget) & ~state.done
        return state._replace(q=q, busy=busy)

    def begin(
        self,
        key: Key[Array, ""],
        given: tuple[Float[Array, "starts _"], ...] | None,
        tol: Scalar,
        budget: Int[Array, ""],
    ) -> State:
        """Makes the state before the first step."""
        dtype = self.space.dtype
        key, draw = jax.random.split(key)
        rows = jnp.zeros((self.rows, self.space.length), dtype)
        if given is not None:
            rows = self._orthonormal(draw, rows, self._flat(given))
        zero, count = jnp.zeros((), dtype), jnp.zeros((), jnp.int32)
        none = jnp.full((self.k,), jnp.nan, dtype)
        return State(
            rows=rows,
            h=jnp.zeros((self.rows, self.rows), dtype),
            q=rows[0],
            j=count,
            n=count + self.starts,
            num_products=count,
            until=count + self.starts,
            broken_at=count + _NEVER,
            broken_top=none,
            scale=zero,
            asymmetry=zero,
            key=key,
            tol=jnp.asarray(tol, dtype),
            budget=jnp.asarray(budget, jnp.int32),
            values=none,
            residuals=none,
            busy=count < self.starts,  # else the first check draws a row
            done=count > 0,
        )

    def _flat(self, given):
        shapes = self.space.shapes
        leaves = lambda blocks: [b.reshape(s) for b, s in zip(blocks, shapes)]
        return jax.vmap(lambda blocks: self.space.flatten(leaves(blocks)))(given)

    def _orthonormal(self, key, rows: Rows, given: Float[Array, "starts p"]):
        """Orthonormalizes the given vectors; dependent ones become random."""

        def settle(i, rows):
            row = divided(given[i], norm(given[i]))
            rest, _ = projected_twice(rows, row)
            draw = lambda: random_vector(
                jax.random.fold_in(key, i), self.space, "normal"
            )
            row = lax.cond(norm(rest) < 1e-3, draw, lambda: rest)
            return rows.at[i].set(orthogonal(rows, row))

        return lax.fori_loop(0, self.starts, settle, rows)

    def settle(self, state: State) -> State:
        """Looks at the Ritz pairs; ends, restarts or goes on."""
        j, n, size = state.j, state.n, self.space.size
        pairs = ritz_pairs(state)
        order = self._ranking(j)
        wanted = order[: self.k]
        present = jnp.arange(self.k) < j
        top = jnp.where(present, pairs.values[wanted], jnp.nan)
        residuals = jnp.where(present, pairs.residuals[wanted], 0)
        bound = state.tol * pairs.size
        least = self.starts + min(_ADDED, size - self.starts) if self.starts else self.k
        enough = (j >= self.k) & (state.num_products >= least)
        converged = enough & jnp.all(residuals <= bound) & self._clear(pairs, j, bound)
        # After a break the wanted pairs of one part are exact, whatever the rest holds.
        broken = (j == n) & (j > 0)
        noise = _STILL * jnp.finfo(top.dtype).eps * state.scale
        same = jnp.all(jnp.abs(top - state.broken_top) <= noise)
        probed = state.num_products - state.broken_at >= _PROBE
        accepted = converged & jnp.where(broken, same, probed)
        spent = (state.num_products >= state.budget) | ~jnp.isfinite(state.scale)
        done = accepted | spent | (j >= size)
        full = (n >= self.rows) & (not self.whole) & ~done
        hopeless = jnp.max(residuals) > _AFRESH * bound
        afresh = (state.num_products == self.starts) & (n - j > 1) & hopeless
        afresh &= (state.budget - state.num_products >= 2 * self.k + _PROBE) & ~done
        rotate = full | done | (n - j > 1)
        chosen = full | done
        kept = self.k + (_KEPT * (self.rows - (n - j) - self.k)).astype(jnp.int32)
        kept = jnp.minimum(jnp.minimum(kept, self.rows - (n - j) - 2), j)
        kept = jnp.where(done, jnp.minimum(self.k, j), jnp.where(full, kept, j))
        turn = self._rotation(state, pairs, order, residuals > bound, chosen, kept)
        mix = jnp.sum(jnp.where(present, pairs.vectors[:, wanted], 0), axis=1)
        mix = divided(mix, norm(mix))
        turn = jnp.where(afresh, jnp.zeros_like(turn).at[0].set(mix), turn)
        rows = rotated(state.rows, turn, rotate, self.space.parts)
        high = lax.Precision.HIGHEST
        h = jnp.matmul(
            jnp.matmul(turn, state.h, precision=high), turn.T, precision=high
        )
        place = jnp.arange(self.rows)
        inner = (place[:, None] < kept) & (place[None] < kept)
        exact = jnp.diag(jnp.where(place < kept, pairs.values[order], 0))
        h = jnp.where(inner & chosen, exact, (h + h.T) / 2)
        h = jnp.where(afresh, 0, jnp.where(rotate, h, state.h))
        waiting = n - j
        j = jnp.where(afresh, 0, jnp.where(rotate, kept, j))
        n = jnp.where(afresh, 1, j + waiting)
        state = state._replace(
            rows=rows,
            h=h,
            j=j,
            n=n,
            until=jnp.maximum(j + self.period, self.first),
            broken_at=jnp.where(broken, state.num_products, state.broken_at),
            broken_top=jnp.where(broken, top, state.broken_top),
            values=top,
            residuals=jnp.where(present, residuals, jnp.nan),
            done=done,
        )
        return self._ready(self._refilled(state))

    def _clear(
        self, pairs: "Pairs", j: Int[Array, ""], bound: Scalar
    ) -> Bool[Array, ""]:
        """Tells whether no pair beside the wanted ones may yet rise among them."""
        upper = {"largest": self.k, "smallest": 0, "both": -(-self.k // 2)}[self.which]
        values, errors = pairs.values, pairs.residuals
        above = values[j - upper] - values[j - upper - 1]
        clear = (errors[j - upper - 1] <= jnp.maximum(above, bound)) | (upper == 0)
        lower = self.k - upper
        below = values[lower] - values[lower - 1]
        clear &= (errors[lower] <= jnp.maximum(below, bound)) | (lower == 0)
        return clear | (j <= self.k)

    def _refilled(self, state: State) -> State:
        """Lets a random row wait where none does."""
        n, size = state.n, self.space.size
        needed = (state.j == n) & (n < min(size, self.rows)) & ~state.done
        key, draw = jax.random.split(state.key)

        def fresh(rows):
            return orthogonal(rows, random_vector(draw, self.space, "normal"))

        nothing = lambda rows: jnp.zeros(self.space.length, rows.dtype)
        row = lax.cond(needed, fresh, nothing, state.rows)
        rows = with_row(state.rows, n, row, needed)
        return state._replace(rows=rows, n=n + needed, key=key)

    def _ranking(self, j: Int[Array, ""]) -> Int[Array, " m"]:
        """Orders the Ritz pairs, which ascend, the most wanted first."""
        r, upper = jnp.arange(self.rows), -(-self.k // 2)
        above = j - 1 - r
        turns = jnp.where(r % 2 == 0, j - 1 - r // 2, r // 2)
        first = jnp.where(r < upper, above, self.k - 1 - r)
        order = {
            "largest": above,
            "smallest": r,
            # The k wanted ones as they are returned, then from both ends in turn.
            "both": jnp.where((r < self.k) & (j >= self.k), first, turns),
        }[self.which]
        return jnp.where(r < j, order, r)

    def _rotation(self, state, pairs, order, open_, chosen, kept) -> Square:
        """Makes the matrix that takes the rows to those that are kept."""
        m, j, n = self.rows, state.j, state.n
        place = jnp.arange(m)
        waiting = n - j
        best = jnp.where(
            chosen, pairs.vectors[:, order].T, jnp.eye(m, dtype=state.h.dtype)
        )
        # Waiting rows: the directions in which open pairs err most come first.
        directions = jnp.eye(m, dtype=state.h.dtype)
        waits = (place >= j) & (place < n)
        if self.starts > 1:
            errors = jnp.where(open_, pairs.errors[:, order[: self.k]], 0)
            gram = jnp.matmul(errors, errors.T, precision=lax.Precision.HIGHEST)
            gram = gram / jnp.where(jnp.max(gram) > 0, jnp.max(gram), 1)
            others = jnp.where(waits, 0, 1.0 + place).astype(gram.dtype)
            gram = gram - jnp.diag(others)
            found = jnp.linalg.eigh(gram, symmetrize_input=False)[1]
            # The largest come last, the places of other rows far below them.
            directions = jnp.roll(jnp.where(waits, found.T[::-1], 0), j, axis=0)
        directions = jnp.roll(directions, kept - j, axis=0)
        turn = jnp.where((place < kept)[:, None], best, directions)
        return jnp.where((place < kept + waiting)[:, None], turn, 0)

    def result(self, state: State):
        """Gives values, vectors as rows and residuals of the wanted pairs."""
        # Products are no more exact than this.
        coarsest = max(float(jnp.finfo(dtype).eps) for dtype in self.space.dtypes)
        residuals = jnp.maximum(state.residuals, coarsest / 2 * state.scale)
        return state.values, state.rows[: self.k], residuals


class Pairs(NamedTuple):
    """Ritz pairs of the rows that were multiplied; values ascend."""

    values: Float[Array, " m"]
    vectors: Square  # columns, in the rows of V
    errors: Square  # columns, in the waiting rows of V
    residuals: Float[Array, " m"]
    size: Scalar  # the largest |value|


def ritz_pairs(state: State) -> Pairs:
    """Decomposes H; what is padded stands above the spectrum and cannot mix with it."""
    j, n = state.j, state.n
    place = jnp.arange(len(state.h))
    ready, waits = place < j, (place >= j) & (place < n)
    h = jnp.where(ready[:, None] & ready[None], state.h, 0)
    bound = jnp.max(jnp.sum(jnp.abs(h), axis=1))
    bound = jnp.where(bound == 0, 1, bound)
    padding = bound * (1.5 + place / len(h)).astype(h.dtype)
    padded = h + jnp.diag(jnp.where(ready, 0, padding))
    values, vectors = jnp.linalg.eigh(padded, symmetrize_input=False)
    vectors = jnp.where(ready[:, None] & ready[None], vectors, 0)
    beyond = jnp.where(waits[:, None] & ready[None], state.h, 0)
    errors = jnp.matmul(beyond, vectors, precision=lax.Precision.HIGHEST)
    residuals = jnp.sqrt(jnp.sum(errors**2, axis=0))
    size = jnp.max(jnp.where(ready, jnp.abs(values), 0))
    return Pairs(values, vectors, errors, residuals, size)


def run_compiled(product: Product, state: State, plan: Plan) -> State:
    """Runs it in one program, which holds the product once; call it under jit."""
    step = lambda state: plan(state, product(state.q))
    rounds = lambda state: plan.settle(
        lax.while_loop(lambda state: state.busy, step, state)
    )
    return lax.while_loop(lambda state: ~state.done, rounds, state)


_begin = jax.jit(
    lambda key, given, tol, budget, *, plan: plan.begin(key, given, tol, budget),
    static_argnames="plan",
)
_settled = jax.jit(
    lambda state, *, plan: plan.settle(state),
    static_argnames="plan",
    donate_argnames="state",
)
_result = jax.jit(lambda state, *, plan: plan.result(state), static_argnames="plan")


def run_host(name: str, operator: Operator, arguments: Any, plan: Plan):
    """Runs it from Python; ``operator`` is linearized already."""
    state = _begin(*arguments, plan=plan)
    turn = functools.partial(host_step, name, plan, operator, space=plan.space)
    while not state.done:
        while state.busy:
            state = turn(state)
        state = _settled(state, plan=plan)
    return _result(state, plan=plan), state
