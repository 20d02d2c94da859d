import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxlab.models import MLP, mlp_m, mlp_s


def test_one_layer_is_a_linear_map():
    model = MLP((3, 2), rngs=nnx.Rngs(0))
    x = jnp.array([[1.0, 2.0, 3.0]])
    expected = x @ model.layers[0].kernel[...]
    np.testing.assert_allclose(model(x), expected, rtol=1e-6)


@pytest.mark.parametrize("activation", [nnx.relu, nnx.tanh])
def test_equals_the_formula(activation):
    model = MLP((5, 7, 4, 3), activation=activation, rngs=nnx.Rngs(0))
    for i, layer in enumerate(model.layers):
        layer.bias[...] = 0.3 * jax.random.normal(jax.random.key(i), layer.bias.shape)
    x = np.random.default_rng(0).normal(size=(6, 5))
    h = x
    for i, layer in enumerate(model.layers):
        h = h @ np.float64(layer.kernel[...]) + np.float64(layer.bias[...])
        if i < 2:
            h = np.maximum(h, 0) if activation is nnx.relu else np.tanh(h)
    np.testing.assert_allclose(model(jnp.float32(x)), h, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("preset", [mlp_s, mlp_m])
def test_tanh_is_an_option_of_the_presets(preset):
    build = lambda **options: preset(**options, rngs=nnx.Rngs(0))
    smooth = nnx.eval_shape(lambda: build(activation=nnx.tanh))
    assert smooth.activation is nnx.tanh
    assert nnx.eval_shape(build).activation is nnx.relu
