"""``MonarchStack``: against a chain of products with the same factors."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxlab.layers import MonarchStack
from jaxlab.structured import monarch_matmul

ORDERS = ("interleaved", "block_major")


def by_layers(stack, x):
    """The same map, a token-major product at a time."""
    factors, biases = stack.unfold()
    missing = -x.shape[-1] % stack.nblocks
    y = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)])
    for i, (pair, bias) in enumerate(zip(factors, biases, strict=True)):
        y = monarch_matmul(y, *pair, output_layout=stack.order)
        y = y if bias is None else y + jnp.broadcast_to(bias, y.shape)
        if i < len(factors) - 1 and stack.activation is not None:
            y = stack.activation(y)
    return y[..., : stack.features[-1]]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("features", "options"),
    [
        ((32, 16, 32), {}),
        ((10, 48, 16, 7), {"activation": jnp.tanh}),
        ((12, 36, 5), {"nblocks": 3, "rank": 1, "use_bias": False}),
        ((8, 6), {"nblocks": 2, "activation": None, "scheme": "mup"}),
    ],
)
def test_equals_the_products_one_by_one(order, features, options):
    stack = MonarchStack(features, order=order, rngs=nnx.Rngs(0), **options)
    for bias in stack.bias:
        bias[...] = jax.random.normal(jax.random.key(1), bias.shape)
    x = jax.random.normal(jax.random.key(2), (2, 3, features[0]))
    expected = by_layers(stack, x)
    np.testing.assert_allclose(stack(x), expected, atol=2e-5)
    first = MonarchStack(
        features, order=order, features_first=True, rngs=nnx.Rngs(0), **options
    )
    nnx.update(first, nnx.state(stack))
    found = first(jnp.moveaxis(x, -1, 0))
    np.testing.assert_allclose(jnp.moveaxis(found, 0, -1), expected, atol=2e-5)


def test_dtypes_and_empty_batches():
    stack = MonarchStack((10, 16, 7), dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    y = stack(jnp.ones((3, 10)))
    assert y.dtype == jnp.bfloat16
    assert all(w.dtype == jnp.float32 for w in jax.tree.leaves(nnx.state(stack)))
    assert stack(jnp.ones((0, 10))).shape == (0, 7)
    assert stack(jnp.ones(10)).shape == (7,)


def test_one_trace_and_it_learns():
    stack = MonarchStack((8, 32, 32, 4), nblocks=2, rngs=nnx.Rngs(0))
    graph, params = nnx.split(stack, nnx.Param)
    x = jax.random.normal(jax.random.key(0), (64, 8))
    target = jnp.sin(x @ jax.random.normal(jax.random.key(1), (8, 4)))
    optimizer = optax.adam(1e-2)

    def loss(params):
        return jnp.mean((nnx.merge(graph, params)(x) - target) ** 2)

    @chex.assert_max_traces(1)
    def step(params, state):
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    step, state, values = jax.jit(step), optimizer.init(params), []
    for _ in range(150):
        params, state, value = step(params, state)
        values.append(float(value))
    assert values[-1] < 0.1 * values[0]
