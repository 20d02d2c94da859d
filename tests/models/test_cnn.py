import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxlab.models import CNN


def convolve(x, kernel, bias, stride):
    """3x3 correlation with zero padding, by loops; x is (side, side, channels)."""
    side = x.shape[0]
    out = -(-side // stride)
    # Zeros are split evenly; where their number is odd the later edge has one more.
    total = max((out - 1) * stride + 3 - side, 0)
    before = total // 2
    padded = np.zeros((side + 3, side + 3, x.shape[2]))
    padded[before : before + side, before : before + side] = x
    y = np.zeros((out, out, kernel.shape[-1]))
    for i in range(out):
        for j in range(out):
            window = padded[stride * i : stride * i + 3, stride * j : stride * j + 3]
            y[i, j] = np.einsum("abc,abcd->d", window, kernel) + bias
    return y


def test_equals_convolution_by_loops():
    model = CNN(
        side=6,
        channels=2,
        features=(3, 4),
        strides=(1, 2),
        outputs=5,
        rngs=nnx.Rngs(0),
    )
    for i, layer in enumerate([*model.convolutions, model.head]):
        layer.bias[...] = 0.3 * jax.random.normal(jax.random.key(i), layer.bias.shape)
    x = np.random.default_rng(0).normal(size=(2, 6, 6, 2))
    expected = []
    for h in x:
        for layer, stride in zip(model.convolutions, (1, 2)):
            kernel, bias = np.float64(layer.kernel[...]), np.float64(layer.bias[...])
            h = np.maximum(convolve(h, kernel, bias, stride), 0)
        kernel, bias = model.head.kernel[...], model.head.bias[...]
        expected.append(h.reshape(-1) @ np.float64(kernel) + np.float64(bias))
    outputs = jax.jit(lambda x: model(x))(jnp.float32(x))
    np.testing.assert_allclose(outputs, expected, rtol=1e-4, atol=1e-5)


def test_odd_sides_are_rounded_up():
    build = lambda: CNN(
        side=5, features=(2, 3), strides=(2, 2), outputs=4, rngs=nnx.Rngs(0)
    )
    # 5 -> 3 -> 2 pixels along the edge, three channels.
    assert nnx.eval_shape(build).head.in_features == 12
    assert nnx.eval_shape(lambda: build()(jnp.zeros((1, 25)))).shape == (1, 4)


def test_activation_is_an_option():
    build = lambda: CNN(
        side=4,
        features=(2,),
        strides=(1,),
        outputs=3,
        activation=jnp.zeros_like,
        rngs=nnx.Rngs(0),
    )
    x = jax.random.normal(jax.random.key(0), (2, 16))
    np.testing.assert_array_equal(jax.jit(lambda: build()(x))(), np.zeros((2, 3)))
