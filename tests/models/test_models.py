"""What holds for every reference network, whatever its family."""

import functools
import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxlab.models as models
from jaxlab.layers import MonarchLinear


class Preset(NamedTuple):
    inputs: jax.ShapeDtypeStruct
    outputs: tuple[int, ...]
    dense: int  # layers that the factory makes
    parameters: int


def floats(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def tokens(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def mlp_size(*sizes):
    return sum((n + 1) * m for n, m in itertools.pairwise(sizes))


def block_size(width):
    """Four square layers, up, down, and two layer norms."""
    return 4 * mlp_size(width, width) + mlp_size(width, 4 * width, width) + 4 * width


def gpt_size(vocabulary, context, width, layers):
    return (vocabulary + context + 2) * width + layers * block_size(width)


CURVES = (784, 400, 200, 100, 50, 25, 6)
PRESETS = {
    "mlp_s": Preset(floats(3, 64), (3, 10), 3, mlp_size(64, 64, 64, 10)),
    "mlp_m": Preset(floats(3, 64), (3, 10), 3, mlp_size(64, 256, 256, 10)),
    "cnn": Preset(floats(3, 64), (3, 10), 1, 9930),
    "autoencoder_digits": Preset(
        floats(3, 64), (3, 64), 6, mlp_size(64, 48, 24, 12, 24, 48, 64)
    ),
    "autoencoder_curves": Preset(
        floats(3, 784), (3, 784), 12, mlp_size(*CURVES, *CURVES[-2::-1])
    ),
    "gpt_s": Preset(tokens(3, 128), (3, 128, 98), 24, gpt_size(98, 128, 128, 4)),
    "gpt_m": Preset(tokens(3, 512), (3, 512, 98), 48, gpt_size(98, 512, 512, 8)),
    "mixer": Preset(
        floats(3, 64),
        (3, 10),
        18,
        mlp_size(4, 64)
        + 4 * (mlp_size(16, 32, 16) + mlp_size(64, 256, 64) + 4 * 64)
        + 2 * 64
        + mlp_size(64, 10),
    ),
    "vit": Preset(
        floats(3, 64),
        (3, 10),
        26,
        mlp_size(4, 64) + 16 * 64 + 4 * block_size(64) + 2 * 64 + mlp_size(64, 10),
    ),
}

# The same families, small and of one block, for what has to run.
SMALL = {
    "mlp": functools.partial(models.MLP, (16, 16, 16, 4)),
    "cnn": functools.partial(
        models.CNN, side=4, features=(4, 8), strides=(1, 2), outputs=4
    ),
    "autoencoder": functools.partial(models.Autoencoder, (16, 12, 8)),
    "gpt": functools.partial(
        models.GPT, vocabulary=7, context=6, width=8, layers=1, heads=2
    ),
    "mixer": functools.partial(
        models.Mixer,
        side=4,
        patch=2,
        width=8,
        blocks=1,
        token_hidden=4,
        channel_hidden=16,
        outputs=4,
    ),
    "vit": functools.partial(
        models.ViT, side=4, patch=2, width=8, blocks=1, heads=2, outputs=4
    ),
}
# q.(k + b) adds the same q.b to every score, which softmax ignores; a number added to
# all channels of a patch is removed by each later layer norm.
WITHOUT_EFFECT = {("key", "bias"), ("across_tokens", "down", "bias")}
MONARCH = functools.partial(MonarchLinear, nblocks=4)
IMAGES = ("cnn", "mixer", "vit")


def count(model):
    """Parameters, of an abstract model too."""
    leaves = jax.tree.leaves(nnx.state(model, nnx.Param))
    return sum(math.prod(leaf.shape) for leaf in leaves)


@functools.cache
def small(name):
    """Graph, parameters and inputs of a small dense model, built in one compile."""
    build = jax.jit(lambda: nnx.split(SMALL[name](rngs=nnx.Rngs(0)), nnx.Param))
    graph, params = build()
    return graph, params, inputs(name)


def inputs(name, batch=8):
    key = jax.random.key(1)
    if name == "gpt":
        return jax.random.randint(key, (batch, 6), 0, 7)
    x = jax.random.uniform(key, (batch, 16))
    # Pixels of 0 and 1 can be told for certain; the loss on grey ones stays above 0.5.
    return jnp.round(x) if name == "autoencoder" else x


def loss_function(name, graph, x):
    """Cross-entropy on fixed labels; the autoencoder's are its inputs."""

    def loss(params):
        outputs = nnx.merge(graph, params)(x)
        if name == "autoencoder":
            return optax.sigmoid_binary_cross_entropy(outputs, x).mean()
        labels = jnp.roll(x, -1, axis=1) if name == "gpt" else jnp.arange(8) % 4
        return optax.softmax_cross_entropy_with_integer_labels(outputs, labels).mean()

    return loss


def train(name, graph, params, steps=20):
    """First and last loss of Adam on one batch, driven from the host."""
    loss = loss_function(name, graph, inputs(name))
    optimizer = optax.adam(1e-2)

    @jax.jit
    def step(params, state):
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    state = optimizer.init(params)
    values = []
    for _ in range(steps + 1):
        params, state, value = step(params, state)
        values.append(float(value))
    return values[0], values[-1]


def test_every_public_network_is_tested():
    presets = {name for name in models.__all__ if name.islower()}
    assert presets == set(PRESETS)
    assert {build.func.__name__ for build in SMALL.values()} | presets == set(
        models.__all__
    )


@pytest.mark.parametrize("name", PRESETS)
def test_preset_has_the_size_of_the_table(name):
    preset = PRESETS[name]
    made = []

    def counting(*args, **options):
        made.append(args)
        return nnx.Linear(*args, **options)

    def build(x):
        model = getattr(models, name)(linear=counting, rngs=nnx.Rngs(0))
        return nnx.split(model, nnx.Param)[1], model(x)

    params, outputs = jax.eval_shape(build, preset.inputs)
    assert outputs.shape == preset.outputs
    leaves = jax.tree.leaves(params)
    assert {leaf.dtype for leaf in [outputs, *leaves]} == {jnp.dtype("float32")}
    assert sum(math.prod(leaf.shape) for leaf in leaves) == preset.parameters
    assert len(made) == preset.dense
    # Matrices outside the factory: embedding and positions only.
    tables = {"gpt_s": 2, "gpt_m": 2, "vit": 1}.get(name, 0)
    assert sum(leaf.ndim == 2 for leaf in leaves) == preset.dense + tables


def test_sizes_that_the_names_promise():
    assert PRESETS["mlp_s"].parameters == 8970
    assert PRESETS["mlp_m"].parameters == 85_002
    assert 0.75e6 < PRESETS["gpt_s"].parameters < 0.85e6
    assert 24e6 < PRESETS["gpt_m"].parameters < 26e6


@pytest.mark.parametrize("name", PRESETS)
def test_preset_with_monarch_is_smaller(name):
    preset = PRESETS[name]

    def build(x):
        model = getattr(models, name)(linear=MONARCH, rngs=nnx.Rngs(0))
        return nnx.split(model, nnx.Param)[1], model(x)

    params, outputs = jax.eval_shape(build, preset.inputs)
    assert outputs.shape == preset.outputs
    assert sum(p.size for p in jax.tree.leaves(params)) < preset.parameters


@pytest.mark.parametrize("vocabulary", [5, 256])
def test_vocabulary_of_the_gpt_presets(vocabulary):
    build = lambda preset: preset(vocabulary=vocabulary, rngs=nnx.Rngs(0))
    for preset, width in ((models.gpt_s, 128), (models.gpt_m, 512)):
        model = nnx.eval_shape(functools.partial(build, preset))
        assert model.embedding.embedding.shape == (vocabulary, width)


@pytest.mark.parametrize("name", SMALL)
def test_abstract_model_equals_the_real_one(name):
    _, params, _ = small(name)
    abstract = nnx.eval_shape(lambda: SMALL[name](rngs=nnx.Rngs(0)))
    shapes = lambda tree: jax.tree.map(lambda v: (v.shape, v.dtype), tree)
    assert shapes(nnx.to_pure_dict(nnx.state(abstract, nnx.Param))) == shapes(
        nnx.to_pure_dict(params)
    )
    assert count(abstract) == sum(p.size for p in jax.tree.leaves(params))


@pytest.mark.parametrize("name", SMALL)
def test_round_trip_and_one_trace(name):
    graph, params, x = small(name)
    traces = []

    @jax.jit
    def apply(params, x):
        traces.append(None)
        return nnx.merge(graph, params)(x)

    first = apply(params, x)
    again_graph, again = nnx.split(nnx.merge(graph, params), nnx.Param)
    assert again_graph == graph
    np.testing.assert_array_equal(apply(again, x), first)
    apply(jax.tree.map(lambda p: 0.9 * p, params), x[::-1])
    assert len(traces) == 1


@pytest.mark.parametrize("name", SMALL)
def test_rows_are_independent(name):
    """One row at a time, two batch axes, vmap and an empty batch."""
    graph, params, x = small(name)
    apply = jax.jit(lambda x: nnx.merge(graph, params)(x))
    whole = apply(x)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    close(apply(x[2]), whole[2])
    close(apply(x.reshape(2, 4, -1)), whole.reshape(2, 4, *whole.shape[1:]))
    close(jax.vmap(apply)(x), whole)
    assert apply(x[:0]).shape == (0, *whole.shape[1:])


@pytest.mark.parametrize("name", IMAGES)
def test_rows_of_pixels_are_images(name):
    graph, params, x = small(name)
    apply = jax.jit(lambda x: nnx.merge(graph, params)(x))
    np.testing.assert_array_equal(apply(x.reshape(8, 4, 4, 1)), apply(x))


@pytest.mark.parametrize("name", SMALL)
def test_gradients_are_finite_and_reach_every_parameter(name):
    graph, params, x = small(name)
    grads = jax.jit(jax.grad(loss_function(name, graph, x)))(params)
    for path, grad in nnx.to_flat_state(grads):
        largest = float(jnp.max(jnp.abs(grad[...])))
        assert math.isfinite(largest), path
        if path[-2:] in WITHOUT_EFFECT or path[-3:] in WITHOUT_EFFECT:
            assert largest < 1e-6, path
        else:
            assert largest > 1e-6, path


@pytest.mark.parametrize("name", SMALL)
def test_half_precision_layers(name):
    graph, params, x = small(name)
    linear = functools.partial(nnx.Linear, dtype=jnp.bfloat16)

    @jax.jit
    def both(x):
        half = SMALL[name](linear=linear, rngs=nnx.Rngs(0))
        assert {p.dtype for p in jax.tree.leaves(nnx.state(half))} <= {
            jnp.dtype("float32"),
            jnp.dtype("uint32"),
            jax.random.key(0).dtype,
        }
        return half(x), nnx.merge(graph, params)(x)

    half, full = both(x)
    # Three decimal digits, a dozen layers.
    np.testing.assert_allclose(half.astype(jnp.float32), full, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("name", SMALL)
def test_learns(name):
    graph, params, _ = small(name)
    first, last = train(name, graph, params)
    assert last < 0.95 * first


@pytest.mark.parametrize("name", SMALL)
def test_learns_with_monarch(name):
    build = jax.jit(
        lambda: nnx.split(SMALL[name](linear=MONARCH, rngs=nnx.Rngs(0)), nnx.Param)
    )
    first, last = train(name, *build())
    assert last < 0.95 * first
