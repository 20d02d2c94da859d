import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxlab.models import ViT
from jaxlab.models.inputs import patches

SIZES = {
    "side": 4,
    "patch": 2,
    "width": 8,
    "blocks": 2,
    "heads": 2,
    "outputs": 5,
    "channels": 2,
}


@functools.cache
def small(positions=True):
    model = nnx.jit(lambda: ViT(**SIZES, rngs=nnx.Rngs(0)))()
    if not positions:
        model.positions[...] = jnp.zeros_like(model.positions[...])
    return model


@functools.cache
def apply(positions=True):
    return jax.jit(lambda x: small(positions)(x))


def images(*lead):
    return jax.random.normal(jax.random.key(0), (*lead, 4, 4, 2))


def shuffled(x):
    """Moves the upper left patch of each image to the lower right, and back."""
    return (
        x.at[..., :2, :2, :]
        .set(x[..., 2:, 2:, :])
        .at[..., 2:, 2:, :]
        .set(x[..., :2, :2, :])
    )


def test_equals_patches_positions_blocks_and_mean():
    model, x = small(), images(3)

    @jax.jit
    def formula():
        h = model.embed(patches(x, patch=2)) + model.positions[...][None]
        for block in model.blocks:
            h = block(h)
        return model.head(model.norm(h).mean(axis=1))

    np.testing.assert_allclose(apply()(x), formula(), rtol=1e-5, atol=1e-5)


def test_without_positions_the_order_of_patches_is_lost():
    x = images(3)
    np.testing.assert_allclose(apply(False)(shuffled(x)), apply(False)(x), atol=1e-5)


def test_with_positions_the_order_of_patches_counts():
    x = images(3)
    assert jnp.max(jnp.abs(apply()(shuffled(x)) - apply()(x))) > 1e-4


def test_a_patch_sees_later_patches():
    """Attention here is not causal: the first patch's output moves with the last."""
    block = small().blocks[0]
    x = jax.random.normal(jax.random.key(0), (4, 8))
    jacobian = jax.jit(jax.jacobian(lambda x: block(x)[0, 0]))(x)
    assert jnp.all(jnp.any(jacobian != 0, axis=-1))


def test_factory_sees_every_layer():
    made = []

    def linear(n, m, *, use_bias=True, rngs):
        made.append((n, m))
        return nnx.Linear(n, m, use_bias=use_bias, rngs=rngs)

    nnx.eval_shape(lambda: ViT(**SIZES, linear=linear, rngs=nnx.Rngs(0)))
    block = [*[(8, 8)] * 4, (8, 32), (32, 8)]
    assert made == [(8, 8), *block * 2, (8, 5)]
