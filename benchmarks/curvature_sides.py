"""What the speed of curvature is measured on: nets, loops, and peers beside ours.

Every side gets the operator linearised inside its own program, so that the peers do
not pay for what ``linearize()`` saves. A gradient is timed in an equal loop: a compiled
one, or one driven from Python where the net has convolutions, which are slow in
compiled loops on CPUs.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.flatten_util import ravel_pytree

from benchmarks.results import digest
from jaxlab.curvature.gauss_newton import ggn_operator
from jaxlab.curvature.hessian import hessian_operator
from jaxlab.datasets import load
from jaxlab.likelihoods import Categorical
from jaxlab.models import CNN, GPT, MLP, cnn, mlp_m

LIKELIHOOD = Categorical()
LARGEST = 10  # Ritz values that are compared
MODELS: dict[str, Callable[..., nnx.Module]] = {
    "MLP-M": mlp_m,
    "CNN": cnn,
    "64-16-10": functools.partial(MLP, (64, 16, 10)),
    "CNN 4": functools.partial(CNN, side=8, features=(4,), strides=(2,), outputs=10),
}


class Net(NamedTuple):
    """A net in training with its data."""

    name: str
    params: Any
    batch: tuple[jax.Array, jax.Array]
    apply_fn: Callable[..., jax.Array]
    loss_fn: Callable[..., jax.Array]
    data: dict[str, str]

    @property
    def size(self) -> int:
        """Counts the parameters."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.params))

    @property
    def hessian(self) -> Any:
        return hessian_operator(self.loss_fn, self.params, self.batch)

    @property
    def ggn(self) -> Any:
        return ggn_operator(self.apply_fn, LIKELIHOOD, self.params, self.batch)

    def start(self, seed: int) -> Any:
        """Draws a tree like the parameters."""
        flat, unravel = ravel_pytree(self.params)
        return unravel(jax.random.normal(jax.random.key(seed), flat.shape))


def _net(name: str, module: nnx.Module, batch: Any, data: Any) -> Net:
    graph, params = nnx.split(module, nnx.Param)

    def apply_fn(params, inputs):
        return nnx.merge(graph, params)(inputs)

    def loss_fn(params, batch):
        return LIKELIHOOD.nll(apply_fn(params, batch[0]), batch[1])

    params = nnx.to_pure_dict(params)
    return Net(name, params, batch, apply_fn, loss_fn, data)


def digits_net(name: str, *, examples: int, steps: int, seed: int) -> Net:
    """Trains a model of ``MODELS`` on digits by so many steps of gradient descent."""
    data = load("digits")
    x, y = (np.concatenate(part)[:examples] for part in zip(*data.splits.values()))
    batch = jnp.asarray(x), jnp.asarray(y)
    named = {"name": f"digits, {len(x)} rows", "digest": digest(x, y)}
    net = _net(name, MODELS[name](rngs=nnx.Rngs(seed)), batch, named)
    step = descent(net, 0.1)
    params = net.params
    for _ in range(steps):
        params = step(params, batch)
    return net._replace(params=params)


def text_net(*, width: int, layers: int, heads: int, context: int, seed: int) -> Net:
    """Makes a GPT with one window of text as its batch."""
    data = load("stdlib_text")
    x, y = (part.reshape(-1)[:context][None] for part in data.splits["train"])
    sizes = {"width": width, "layers": layers, "heads": heads, "context": context}
    module = GPT(vocabulary=98, **sizes, rngs=nnx.Rngs(seed))
    batch = jnp.asarray(x, jnp.int32), jnp.asarray(y, jnp.int32)
    named = {"name": f"stdlib_text, {context} symbols", "digest": digest(x, y)}
    return _net("GPT", module, batch, named)


def descent(net: Net, rate: float) -> Callable[..., Any]:
    """Gives a jitted step of gradient descent."""

    def step(params, batch):
        slopes = jax.grad(net.loss_fn)(params, batch)
        return jax.tree.map(lambda p, g: p - rate * g, params, slopes)

    return jax.jit(step)


def gradients(net: Net, count: int, *, compiled: bool) -> Callable[[], Any]:
    """Gives a call that computes so many gradients in a loop."""
    step = descent(net, 1e-3)

    def from_python():
        params = net.params
        for _ in range(count):
            params = step(params, net.batch)
        return params

    @jax.jit
    def loop(params, batch):
        return jax.lax.fori_loop(0, count, lambda _, p: step(p, batch), params)

    return functools.partial(loop, net.params, net.batch) if compiled else from_python


@functools.partial(jax.jit, static_argnames="count")
def products(operator: Any, v: Any, *, count: int) -> Any:
    """Multiplies so many times in a compiled loop, by the operator linearised once."""
    product = operator.linearize()

    def body(_, v):
        image = product(v)
        squares = [jnp.sum(x**2) for x in jax.tree.leaves(image)]
        return jax.tree.map(lambda x: x / jnp.sqrt(sum(squares)), image)

    return jax.lax.fori_loop(0, count, body, v)


@jax.jit
def linearized(operator: Any) -> Any:
    return operator.linearize()


def flops(net: Net) -> dict[str, float | None]:
    """Asks the compiler for the operations of one gradient and of one product."""
    count = lambda f, *a: (jax.jit(f).lower(*a).compile().cost_analysis() or {}).get(
        "flops"
    )
    start, apply = net.start(0), lambda operator, v: operator(v)
    return {
        "gradient": count(jax.grad(net.loss_fn), net.params, net.batch),
        "Hessian product": count(apply, linearized(net.hessian), start),
        "GGN product": count(apply, linearized(net.ggn), start),
    }


def on_flat(operator: Any, start: Any) -> tuple[Callable[..., jax.Array], jax.Array]:
    """Linearises an operator and lets it act on flat vectors; call it under jit."""
    vector, unravel = ravel_pytree(start)
    product = operator.linearize()
    return lambda v: ravel_pytree(product(unravel(v)))[0], vector


def orthogonality(basis: jax.Array) -> float:
    """Measures ``max |Q Q^T - I|`` of rows."""
    return float(jnp.max(jnp.abs(basis @ basis.T - jnp.eye(len(basis)))))


def tridiagonal(alpha: jax.Array, beta: jax.Array) -> np.ndarray:
    """Writes T out, in float64."""
    alpha, beta = np.asarray(alpha, float), np.asarray(beta, float)[: len(alpha) - 1]
    return np.diag(alpha) + np.diag(beta, 1) + np.diag(beta, -1)


def apart(t: np.ndarray, other: np.ndarray) -> float:
    """Compares two T of equal order by their largest Ritz values.

    The gap is in units of the largest.
    """
    count = min(LARGEST, -(-len(t) // 4))
    values, others = (np.linalg.eigvalsh(x)[-count:] for x in (t, other))
    return float(np.max(np.abs(values - others)) / np.max(np.abs(values)))


@functools.partial(jax.jit, static_argnames=("k", "most"))
def deflated_power(operator: Any, start: Any, tol: Any, *, k: int, most: int) -> Any:
    """Finds k pairs one after another by power iteration, as one writes it first.

    A pair is done when its residual is at most ``tol`` times the first value.

    Returns:
      Values, residuals, pairs found, and the products spent, ``most`` at most.
    """
    product, first = on_flat(operator, start)
    unit = lambda v: v / jnp.linalg.norm(v)

    def body(state):
        rows, values, misses, i, v, spent = state
        v = v - (rows @ v) @ rows
        v = unit(v - (rows @ v) @ rows)
        image = product(v)
        value = v @ image
        miss = jnp.linalg.norm(image - value * v)
        done = miss <= tol * jnp.where(i == 0, value, values[0])
        fresh = jax.random.normal(jax.random.fold_in(jax.random.key(1), i), v.shape)
        return (
            jnp.where(done, rows.at[i].set(v), rows),
            values.at[i].set(value),
            misses.at[i].set(miss),
            i + done,
            jnp.where(done, fresh, image),
            spent + 1,
        )

    nothing, none = jnp.zeros((k, first.size)), jnp.zeros((k,))
    state = nothing, none, none, jnp.array(0), first, jnp.array(0)
    going = lambda state: (state[3] < k) & (state[5] < most)
    _, values, misses, found, _, spent = jax.lax.while_loop(going, body, state)
    return values, misses, found, spent


def exact_ggn_trace(net: Net, *, rows: int = 64) -> float:
    """Sums the squared gradients of all outputs, weighted as the likelihood curves.

    With diag(p) - p p^T = B B^T, B = (diag(p) - p p^T) diag(p)^(-1/2), the trace is the
    mean over examples of ``|J^T b|^2`` over the columns b of B.
    """

    def one(x):
        outputs, pull = jax.vjp(lambda p: net.apply_fn(p, x[None])[0], net.params)
        shares = jax.nn.softmax(outputs)
        root = jnp.sqrt(shares)
        columns = (jnp.diag(shares) - jnp.outer(shares, shares)) / root[None]
        slopes = jax.vmap(pull)(columns.T)
        return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(slopes))

    sums = jax.jit(lambda x: jax.lax.map(one, x, batch_size=rows))(net.batch[0])
    return float(np.mean(np.asarray(sums, float)))
