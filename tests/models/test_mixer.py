import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxlab.models import Mixer
from jaxlab.models.inputs import patches

SIZES = {
    "side": 4,
    "patch": 2,
    "width": 6,
    "blocks": 2,
    "token_hidden": 3,
    "channel_hidden": 10,
    "outputs": 5,
    "channels": 2,
}


def dense(layer, x):
    return x @ np.float64(layer.kernel[...]) + np.float64(layer.bias[...])


def layer_norm(x):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)


def gelu(x):
    return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def feedforward(model, x):
    return dense(model.down, gelu(dense(model.up, x)))


def test_equals_the_formula():
    model = Mixer(**SIZES, rngs=nnx.Rngs(0))
    for i, block in enumerate(model.blocks):
        for part in (block.across_tokens, block.across_channels):
            key = jax.random.key(i)
            part.up.bias[...] = jax.random.normal(key, part.up.bias.shape)
    x = np.random.default_rng(0).normal(size=(3, 4, 4, 2)).astype(np.float32)
    h = dense(model.embed, np.float64(patches(jnp.asarray(x), patch=2)))
    for block in model.blocks:
        across = feedforward(block.across_tokens, np.swapaxes(layer_norm(h), 1, 2))
        h = h + np.swapaxes(across, 1, 2)
        h = h + feedforward(block.across_channels, layer_norm(h))
    expected = dense(model.head, layer_norm(h).mean(axis=1))
    outputs = jax.jit(lambda x: model(x))(jnp.asarray(x))
    np.testing.assert_allclose(outputs, expected, rtol=1e-4, atol=1e-5)


def test_factory_sees_every_layer():
    made = []

    def linear(n, m, *, use_bias=True, rngs):
        made.append((n, m))
        return nnx.Linear(n, m, use_bias=use_bias, rngs=rngs)

    nnx.eval_shape(lambda: Mixer(**SIZES, linear=linear, rngs=nnx.Rngs(0)))
    assert made == [(8, 6), *[(4, 3), (3, 4), (6, 10), (10, 6)] * 2, (6, 5)]
