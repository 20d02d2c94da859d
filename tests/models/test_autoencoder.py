import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxlab.models import Autoencoder, autoencoder_curves


def test_is_the_decoder_of_the_encoder():
    model = Autoencoder((6, 5, 3), rngs=nnx.Rngs(0))
    x = jax.random.uniform(jax.random.key(0), (4, 6))
    code = model.encoder(x)
    assert code.shape == (4, 3)
    np.testing.assert_array_equal(model(x), model.decoder(code))


def test_widths_are_mirrored():
    model = nnx.eval_shape(lambda: autoencoder_curves(rngs=nnx.Rngs(0)))
    widths = lambda part: [layer.kernel.shape for layer in part.layers]
    assert widths(model.encoder)[-1] == (25, 6)
    assert widths(model.decoder) == [(m, n) for n, m in widths(model.encoder)[::-1]]


def test_code_and_outputs_are_linear():
    """A rectified code or output would have no negative numbers."""
    model = Autoencoder((6, 5, 3), rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (50, 6))
    assert jnp.any(model.encoder(x) < 0)
    assert jnp.any(model(x) < 0)


def test_activation_stands_between_layers():
    model = Autoencoder((6, 5, 3), activation=jnp.zeros_like, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (4, 6))
    model.encoder.layers[1].bias[...] = jnp.array([1.0, 2.0, 3.0])
    np.testing.assert_array_equal(
        model.encoder(x), np.broadcast_to([1.0, 2.0, 3.0], (4, 3))
    )
