"""``MonarchLinear``: the reference module, padding, dtypes, learning."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxlab.layers import MonarchLinear
from jaxlab.structured import init_monarch, monarch_matmul, monarch_to_dense

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens" / "monarch.npz"
WIDTHS = ((24, 36), (36, 24), (32, 32), (10, 7))


def golden_layer(archive, case, dtype):
    get = lambda name: jnp.asarray(archive[f"linear/{case}/{name}"], dtype)
    inputs, _, outputs, nblocks = case.split("_")
    layer = MonarchLinear(
        int(inputs),
        int(outputs),
        nblocks=int(nblocks.removeprefix("nb")),
        param_dtype=dtype,
        rngs=nnx.Rngs(0),
    )
    shapes = layer.w1.shape, layer.w2.shape, layer.bias.shape
    layer.w1[...], layer.w2[...] = get("blkdiag1"), get("blkdiag2")
    layer.bias[...] = get("bias")
    assert (layer.w1.shape, layer.w2.shape, layer.bias.shape) == shapes
    return layer, get("x"), archive[f"linear/{case}/y"]


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(jnp.float64, 1e-10), (jnp.float32, 2e-4)]
)
@pytest.mark.parametrize("widths", WIDTHS)
def test_reference_module(x64, widths, dtype, tolerance):
    inputs, outputs = widths
    case = f"{inputs}_to_{outputs}_nb4"
    with np.load(GOLDENS) as archive:
        layer, x, want = golden_layer(archive, case, dtype)
        saving = archive[f"linear/{case}/saving"]
    got = layer(x)
    assert got.dtype == dtype
    assert np.linalg.norm(got - want) <= tolerance * np.linalg.norm(want)
    assert (layer.w1.size + layer.w2.size) / (inputs * outputs) == saving


@pytest.mark.parametrize("rank", [None, 2])
def test_equals_its_matrix_where_widths_do_not_divide(rank):
    layer = MonarchLinear(10, 7, nblocks=4, rank=rank, rngs=nnx.Rngs(0))
    layer.bias[...] = jnp.arange(7.0)
    x = jax.random.normal(jax.random.key(1), (2, 3, 10))
    matrix = monarch_to_dense(layer.w1[...], layer.w2[...])[:7, :10]
    want = x @ matrix.T + jnp.arange(7.0).reshape(1, 1, 7)
    np.testing.assert_allclose(layer(x), want, rtol=1e-4, atol=1e-5)


def test_is_the_function_where_widths_divide():
    layer = MonarchLinear(24, 36, nblocks=4, use_bias=False, rngs=nnx.Rngs(0))
    assert layer.bias is None
    x = jax.random.normal(jax.random.key(1), (5, 24))
    want = monarch_matmul(x, layer.w1[...], layer.w2[...])
    np.testing.assert_array_equal(layer(x), want)
    want = init_monarch(nnx.Rngs(0).params(), 24, 36, nblocks=4)
    np.testing.assert_array_equal(layer.w1[...], want.w1)


# nnx.Linear is the rule: same arguments, same dtype of output and parameters.
@pytest.mark.parametrize("dtype", [None, jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("input_dtype", [jnp.float32, jnp.bfloat16, jnp.int32])
def test_dtypes_as_in_linear(dtype, param_dtype, input_dtype):
    x = jnp.ones((2, 10), input_dtype)
    dense, monarch = (
        kind(10, 7, dtype=dtype, param_dtype=param_dtype, rngs=nnx.Rngs(0))
        for kind in (nnx.Linear, MonarchLinear)
    )
    assert monarch(x).dtype == dense(x).dtype
    leaves = jax.tree.leaves(nnx.state(monarch, nnx.Param))
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype(param_dtype)}


@pytest.mark.parametrize("batch", [(), (0,), (3,), (2, 0), (2, 3)])
def test_leading_dimensions(batch):
    layer = MonarchLinear(10, 7, rngs=nnx.Rngs(0))
    assert layer(jnp.ones((*batch, 10))).shape == (*batch, 7)


def test_schemes():
    rngs = nnx.Rngs(0)
    layer = MonarchLinear(512, 1024, rngs=rngs)
    np.testing.assert_array_equal(layer.bias[...], jnp.zeros(1024))
    official = MonarchLinear(512, 1024, scheme="official", rngs=rngs)
    bias = official.bias[...]
    assert 0.9 / 32 < float(jnp.abs(bias).max()) <= 1 / 32
    np.testing.assert_allclose(bias.var(), 1 / 32**2 / 3, rtol=0.2)
    x = jax.random.normal(jax.random.key(0), (64, 512))
    np.testing.assert_allclose(layer(x).var(), 1.0, rtol=0.1)
    np.testing.assert_allclose((official(x) - bias[None]).var(), 1 / 9, rtol=0.1)


def test_streams_differ_between_layers():
    rngs = nnx.Rngs(0)
    first, second = (MonarchLinear(12, 8, rngs=rngs) for _ in range(2))
    assert (first.w1[...] != second.w1[...]).all()


def test_stands_in_for_linear_in_a_model():
    factory = functools.partial(MonarchLinear, nblocks=2)

    class Model(nnx.Module):
        def __init__(self, linear, rngs):
            self.layers = nnx.List([linear(6, 9, rngs=rngs), linear(9, 3, rngs=rngs)])

        def __call__(self, x):
            return self.layers[1](nnx.relu(self.layers[0](x)))

    graph, params = nnx.split(Model(factory, nnx.Rngs(0)), nnx.Param)
    apply = jax.jit(lambda params, x: nnx.merge(graph, params)(x))
    x = jnp.ones((4, 6))
    assert apply(params, x).shape == (4, 3)
    gradient = jax.grad(lambda params: (apply(params, x) ** 2).sum())(params)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(gradient))
    per_row = jax.vmap(lambda row: apply(params, row[None])[0])(x)
    np.testing.assert_allclose(per_row, apply(params, x), rtol=1e-5, atol=1e-6)


def test_abstract_and_stacked_layers():
    make = lambda key: MonarchLinear(10, 7, rngs=nnx.Rngs(key))
    shapes = nnx.eval_shape(lambda: make(jax.random.key(0)))
    assert shapes.w1.shape == (4, 2, 3)
    stack = nnx.vmap(make)(jax.random.split(jax.random.key(0), 3))
    y = nnx.vmap(lambda layer, x: layer(x), in_axes=(0, None))(stack, jnp.ones((2, 10)))
    assert y.shape == (3, 2, 7)


def test_learns_a_planted_monarch_matrix():
    key_w, key_x = jax.random.split(jax.random.key(0))
    teacher = init_monarch(key_w, 20, 12, nblocks=4)
    x = jax.random.normal(key_x, (256, 20))
    targets = monarch_matmul(x, *teacher) + 0.5
    layer = MonarchLinear(20, 12, nblocks=4, rngs=nnx.Rngs(1))
    graph, params = nnx.split(layer, nnx.Param)
    optimizer = optax.adam(optax.cosine_decay_schedule(0.02, 600))
    loss = lambda params: ((nnx.merge(graph, params)(x) - targets) ** 2).mean()

    def step(carry, _):
        params, state = carry
        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), value

    run = jax.jit(
        lambda params: jax.lax.scan(step, (params, optimizer.init(params)), length=600)
    )
    (params, _), losses = run(params)
    assert losses[0] > 0.5
    assert loss(params) < 1e-3 * losses[0]
