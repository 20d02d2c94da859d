"""Runs steps, many in one jitted call where that is faster.

A call gathers its batches on the device, runs the steps in a compiled loop of any
length up to its size (one trace, whatever the last call of an epoch has left), and
returns the steps' metrics as one array, which is read while later calls run.

The exception is a convolution on the CPU, which XLA runs 5 to 7 times slower inside
a compiled loop than outside one (jax issue 12868). :func:`loops_slowly` is the one
place that decides this; such steps are driven from the host, one a call.
"""

import collections
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxlab.objective import unpack_batch
from jaxlab.training.feed import Resident, Streamed
from jaxlab.training.state import TrainState
from jaxlab.training.step import Step

__all__ = ["Calls", "loops_slowly"]

_STEPS_PER_CALL = 100  # so that the bar moves and few steps are lost to a NaN
_UNREAD = 2  # calls whose metrics the host leaves unread


class Calls:
    """Holds a state and runs steps on it, several in one jitted call.

    Args:
      step: the pure step ``(state, batch) -> (state, metrics)``.
      feed: gives the batches.
      state: the first state; its buffers are donated.
      size: steps in a call; ``None`` chooses. The choice stands in ``size``.

    Examples:
      >>> from jaxlab.training.feed import resident
      >>> step = lambda s, b: (s._replace(step=s.step + 1), {"loss": b[0].sum()})
      >>> feed = resident((jnp.ones(3), jnp.ones(3)), batch_size=2)
      >>> zero = jnp.zeros((), jnp.int32)
      >>> state = TrainState(zero, (), (), (), jax.random.key(0))
      >>> calls = Calls(step, feed, state)
      >>> for done, found in calls.run(0, 4, catch_up=lambda epoch: True):
      ...     print(done, found["loss"].tolist(), found["weight"].tolist())
      0 [2.0, 2.0] [2.0, 1.0]
      2 [2.0, 2.0] [2.0, 1.0]
    """

    def __init__(
        self,
        step: Step,
        feed: Resident | Streamed,
        state: TrainState,
        *,
        size: int | None = None,
    ):
        self._step = jax.jit(step)  # its trace serves the decision and the call
        self._feed = feed
        self._leaves, self._treedef = jax.tree.flatten(state)
        self._key = jnp.copy(state.key)  # of the order; the state's own is donated
        self.size = self._choose_size(size)
        self._names: list[str] = []
        whole = None
        if feed.sharding is not None:
            whole = NamedSharding(feed.sharding.mesh, PartitionSpec())
            whole = ([leaf.sharding for leaf in self._leaves], whole)
        self._call = jax.jit(self._run_steps, donate_argnums=0, out_shardings=whole)

    @property
    def state(self) -> TrainState:
        """The state after the last call; the next one takes its buffers."""
        return jax.tree.unflatten(self._treedef, self._leaves)

    def run(
        self, start: int, stop: int, *, catch_up: Callable[[int], bool]
    ) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        """Runs steps; yields their metrics in order, a little behind the device.

        Args:
          start: number of steps done before.
          stop: number of steps done at the end.
          catch_up: asked with the number of epochs done at the end of each: where it
            says True, :attr:`state` is that of the last metrics yielded.

        Yields:
          Number of steps done before a call, and the metrics of its steps by name.
        """
        unread = collections.deque()
        for done, count, source in self._sources(start, stop):
            if not self._names:
                first = jax.eval_shape(self._batch, source, 0)
                found = jax.eval_shape(self._step, self.state, first)[1]
                self._names = ["loss", *(name for name in found if name != "loss")]
            span = np.array([done % self._feed.steps_per_epoch, count], np.int32)
            self._leaves, rows = self._call(self._leaves, source, span)
            unread.append((done, count, rows))
            epoch, within = divmod(done + count, self._feed.steps_per_epoch)
            behind = within == 0 and (catch_up(epoch) or done + count == stop)
            while len(unread) > (0 if behind else _UNREAD):
                done, count, rows = unread.popleft()
                columns = np.asarray(rows)[:count].T
                yield done, dict(zip(["weight", *self._names], columns, strict=True))

    def _choose_size(self, size):
        feed = self._feed
        if isinstance(feed, Streamed):
            return 1
        if size is None:
            order = jax.eval_shape(feed.in_turn)
            batch = jax.eval_shape(feed.batch, order, 0)
            slow = loops_slowly(self._step, self.state, batch)
            size = 1 if slow else _STEPS_PER_CALL
        return min(size, feed.steps_per_epoch)

    def _sources(self, start, stop):
        """Yields steps done, steps of a call and what its batches come from."""
        feed, done = self._feed, start
        if isinstance(feed, Streamed):
            for batch in feed.batches(first=start, stop=stop):
                yield done, 1, batch
                done += 1
            return
        order = None
        while done < stop:
            epoch, within = divmod(done, feed.steps_per_epoch)
            if order is None or within == 0:
                order = feed.order(self._key, epoch)
            count = min(self.size, feed.steps_per_epoch - within, stop - done)
            yield done, count, (feed, order)
            done += count

    def _batch(self, source, index):
        if isinstance(self._feed, Streamed):
            return source
        feed, order = source
        return feed.batch(order, index)

    def _run_steps(self, leaves, source, span):
        # The state crosses the call as a list: a fast path, whatever its tree is.
        def one(leaves, index):
            batch = self._batch(source, index)
            state, found = self._step(jax.tree.unflatten(self._treedef, leaves), batch)
            values = [_weight(batch), *(found[name] for name in self._names)]
            return jax.tree.leaves(state), jnp.stack(values).astype(jnp.float32)

        first, count = span
        if self.size == 1:
            leaves, row = one(leaves, first)
            return leaves, row[None]

        def body(index, carry):
            leaves, rows = carry
            leaves, row = one(leaves, first + index)
            return leaves, rows.at[index].set(row)

        rows = jnp.zeros((self.size, 1 + len(self._names)), jnp.float32)
        return jax.lax.fori_loop(0, count, body, (leaves, rows))


def loops_slowly(function: Callable[..., Any], *args: Any) -> bool:
    """Tells whether a function should be driven from the host, call by call.

    Args:
      function: what the loop would repeat; traced, not run.
      *args: its arguments, arrays or ``ShapeDtypeStruct``; the devices of the arrays
        decide, those of the default backend where there are none.

    Returns:
      True for a function with convolutions that runs on the CPU.

    Examples:
      >>> loops_slowly(jnp.dot, jnp.ones(3), jnp.ones(3))
      False
      >>> loops_slowly(jnp.convolve, jnp.ones(3), jnp.ones(3))
      True
    """
    arrays = [x for x in jax.tree.leaves(args) if isinstance(x, jax.Array)]
    devices = arrays[0].sharding.device_set if arrays else jax.devices()
    if next(iter(devices)).platform != "cpu":
        return False
    return _has_convolution(jax.make_jaxpr(function)(*args).jaxpr)


def _weight(batch):
    """Gives the rows of a batch, or the sum of their weights."""
    _, targets, weights = unpack_batch(batch)
    if weights is None:
        return jnp.float32(jax.tree.leaves(targets)[0].shape[0])
    return jnp.sum(weights, dtype=jnp.float32)


def _has_convolution(jaxpr) -> bool:
    for equation in jaxpr.eqns:
        if equation.primitive.name == "conv_general_dilated":
            return True
        for value in jax.tree.leaves(list(equation.params.values())):
            inner = getattr(value, "jaxpr", value)  # a ClosedJaxpr holds one
            if hasattr(inner, "eqns") and _has_convolution(inner):
                return True
    return False
