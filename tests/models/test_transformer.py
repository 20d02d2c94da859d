import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxlab.models.transformer import Block, Feedforward, SelfAttention


def scramble(model):
    """Gives biases and norm parameters, which start at 0 and 1, other values."""
    state = nnx.state(model, nnx.Param)
    leaves, treedef = jax.tree.flatten(state)
    keys = jax.random.split(jax.random.key(7), len(leaves))
    noisy = [v + 0.3 * jax.random.normal(k, v.shape) for v, k in zip(leaves, keys)]
    nnx.update(model, jax.tree.unflatten(treedef, noisy))
    return model


def dense(layer, x):
    return x @ np.float64(layer.kernel[...]) + np.float64(layer.bias[...])


def layer_norm(layer, x):
    centred = x - x.mean(-1, keepdims=True)
    x = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
    return x * np.float64(layer.scale[...]) + np.float64(layer.bias[...])


def gelu(x):
    return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def attention(layer, x, heads, causal):
    """Head by head, query by query; x is (time, width)."""
    q, k, v = (dense(f, x) for f in (layer.query, layer.key, layer.value))
    time, width = x.shape
    size = width // heads
    mixed = np.zeros_like(x)
    for h in range(heads):
        part = slice(h * size, (h + 1) * size)
        for t in range(time):
            seen = t + 1 if causal else time
            scores = k[:seen, part] @ q[t, part] / np.sqrt(size)
            weights = np.exp(scores - scores.max())
            mixed[t, part] = weights @ v[:seen, part] / weights.sum()
    return dense(layer.out, mixed)


@pytest.mark.parametrize("causal", [False, True])
def test_block_equals_the_formula(causal):
    model = scramble(Block(6, 2, causal=causal, hidden=5, rngs=nnx.Rngs(0)))
    x = np.random.default_rng(0).normal(size=(3, 4, 6))
    expected = []
    for row in x:
        y = row + attention(model.attention, layer_norm(model.norm1, row), 2, causal)
        f = model.feedforward
        hidden = gelu(dense(f.up, layer_norm(model.norm2, y)))
        expected.append(y + dense(f.down, hidden))
    outputs = jax.jit(lambda x: model(x))(jnp.float32(x))
    np.testing.assert_allclose(outputs, expected, rtol=1e-4, atol=1e-4)


def test_hidden_width_is_four_times_the_width():
    model = nnx.eval_shape(lambda: Block(6, 2, causal=True, rngs=nnx.Rngs(0)))
    assert model.feedforward.up.kernel.shape == (6, 24)


def test_one_position_attends_to_itself():
    model = SelfAttention(6, 3, causal=False, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (5, 1, 6))
    np.testing.assert_allclose(model(x), model.out(model.value(x)), atol=1e-6)


def test_attention_commutes_with_permutations():
    model = SelfAttention(6, 3, causal=False, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, 5, 6))
    order = jnp.array([3, 0, 4, 1, 2])
    np.testing.assert_allclose(model(x[:, order]), model(x)[:, order], atol=1e-6)


def test_causal_attention_equals_attention_to_the_prefix():
    both = [SelfAttention(6, 3, causal=c, rngs=nnx.Rngs(0)) for c in (True, False)]
    x = jax.random.normal(jax.random.key(0), (2, 5, 6))
    causal, full = (model(x) for model in both)
    np.testing.assert_allclose(causal[:, -1], full[:, -1], atol=1e-6)
    np.testing.assert_allclose(causal[:, 2], both[1](x[:, :3])[:, 2], atol=1e-6)


def test_feedforward_acts_on_each_position():
    model = Feedforward(4, 9, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, 3, 4))
    np.testing.assert_allclose(model(x)[1, 2], model(x[1, 2]), atol=1e-6)
