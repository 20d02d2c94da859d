"""Conversions between dense and Monarch layers, on trees and on models."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from flax.core import FrozenDict

from jaxlab.layers import (
    MonarchLinear,
    densify,
    densify_params,
    monarchize,
    monarchize_params,
)
from jaxlab.structured import monarch_project, monarch_to_dense

EVERY = lambda path, layer: True


def random_kernel(inputs, outputs, seed=0):
    return jax.random.normal(jax.random.key(seed), (inputs, outputs))


def close(got, want, tolerance=1e-5):
    scale = float(jnp.abs(jnp.asarray(want)).max())
    np.testing.assert_allclose(got, want, atol=tolerance * scale)


class Model(nnx.Module):
    """A layer used twice, a list, a dictionary, and layers that are not linear."""

    def __init__(self, rngs, linear=nnx.Linear):
        self.first = linear(10, 12, rngs=rngs)
        self.shared = linear(12, 12, use_bias=False, rngs=rngs)
        self.blocks = nnx.List([self.shared, linear(12, 9, rngs=rngs)])
        self.heads = nnx.Dict(a=linear(9, 3, rngs=rngs), b=self.shared)
        self.norm = nnx.BatchNorm(12, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)

    def __call__(self, x):
        x = self.norm(self.first(x))
        x = self.heads["b"](jnp.tanh(self.shared(x)))
        x = jnp.tanh(self.blocks[1](jnp.tanh(self.blocks[0](x))))
        return self.heads["a"](self.dropout(x))


def model_and_inputs():
    model = Model(nnx.Rngs(0))
    model.eval()
    return model, jax.random.normal(jax.random.key(1), (5, 10))


def test_a_kernel_becomes_the_projection_of_its_transpose():
    kernel = random_kernel(8, 15)
    params = {"kernel": kernel, "bias": jnp.arange(15.0)}
    new = monarchize_params(params, EVERY, nblocks=1, rank=2)
    assert sorted(new) == ["bias", "w1", "w2"]
    assert new["bias"] is params["bias"]
    # One block: the best matrix of rank 2, of the transpose.
    u, sigma, vh = np.linalg.svd(np.asarray(kernel).T, full_matrices=False)
    want = u[:, :2] @ np.diag(sigma[:2]) @ vh[:2]
    close(monarch_to_dense(new["w1"], new["w2"]), want)
    close(densify_params(new)["kernel"], want.T)
    x = jnp.ones((3, 8)) * jnp.arange(8.0).reshape(1, 8)
    layer = MonarchLinear(8, 15, nblocks=1, rank=2, rngs=nnx.Rngs(0))
    nnx.update(layer, new)
    close(layer(x), x @ want.T + jnp.arange(15.0).reshape(1, 15))


def test_the_projection_is_that_of_the_function():
    kernel = random_kernel(12, 20)
    new = monarchize_params({"kernel": kernel}, EVERY, nblocks=4, rank=2)
    want = monarch_project(kernel.T, nblocks_in=4, nblocks_out=4, rank=2)
    close(new["w1"], want.w1)
    close(new["w2"], want.w2)


@pytest.mark.parametrize(
    ("widths", "rank"), [((24, 36), 1), ((64, 64), 4), ((10, 7), 1), ((64, 10), 1)]
)
def test_default_rank_keeps_the_size_of_a_fresh_layer(widths, rank):
    new = monarchize_params({"kernel": random_kernel(*widths)}, EVERY)
    assert new["w1"].shape[1] == new["w2"].shape[2] == 4 * rank
    if all(width % 16 == 0 for width in widths):
        fresh = MonarchLinear(*widths, rngs=nnx.Rngs(0))
        assert fresh.w1.shape == new["w1"].shape
        assert fresh.w2.shape == new["w2"].shape


@pytest.mark.parametrize("widths", [(12, 20), (10, 7), (7, 10), (5, 2)])
def test_full_rank_loses_nothing(widths):
    params = {"layer": {"kernel": random_kernel(*widths), "bias": jnp.ones(widths[1])}}
    new = monarchize_params(params, EVERY, nblocks=4, rank=99)
    close(
        densify_params(new, like=params)["layer"]["kernel"], params["layer"]["kernel"]
    )
    # The bias tells the true outputs, nothing tells the true inputs.
    padded = densify_params(new)["layer"]["kernel"]
    assert padded.shape == (-(-widths[0] // 4) * 4, widths[1])
    close(padded[: widths[0]], params["layer"]["kernel"])
    np.testing.assert_allclose(padded[widths[0] :], 0, atol=1e-6)


def test_padding_does_not_disturb_the_projection():
    # Zero rows and columns add nothing to the distance, so no better one is missed:
    # entries outside the kernel stay zero.
    kernel = random_kernel(10, 7)
    new = monarchize_params({"kernel": kernel}, EVERY, nblocks=4, rank=1)
    full = densify_params(new)["kernel"]
    assert full.shape == (12, 8)
    np.testing.assert_allclose(full[10:], 0, atol=1e-6)
    np.testing.assert_allclose(full[:, 7:], 0, atol=1e-6)


def test_paths_and_predicates():
    params = {
        "params": {
            "a": {"kernel": random_kernel(4, 6)},
            "b": [{"kernel": random_kernel(6, 4), "scale": jnp.ones(())}],
            "conv": {"kernel": jnp.ones((3, 3, 4, 4))},
            "norm": {"scale": jnp.ones(4), "bias": jnp.ones(4)},
            "embedding": jnp.ones((5, 4)),
        }
    }
    seen = {}

    def predicate(path, kernel):
        seen[path] = kernel.shape
        return path[-1] != "a"

    new = monarchize_params(params, predicate, nblocks=2)["params"]
    assert seen == {("params", "a"): (4, 6), ("params", "b", 0): (6, 4)}
    old = params["params"]
    assert new["a"]["kernel"] is old["a"]["kernel"]
    assert sorted(new["b"][0]) == ["scale", "w1", "w2"]
    for key in ("conv", "norm"):
        assert new[key].keys() == old[key].keys()
    seen.clear()

    def predicate_back(path, factors):
        seen[path] = factors.w1.shape
        return False

    kept = densify_params({"params": new}, predicate=predicate_back)
    assert seen == {("params", "b", 0): (2, 2, 3)}
    assert jax.tree.structure(kept) == jax.tree.structure({"params": new})
    assert sorted(params["params"]["b"][0]) == ["kernel", "scale"]  # not changed


def test_kinds_of_trees():
    plain = {"layer": {"kernel": random_kernel(6, 8), "bias": jnp.ones(8)}}
    frozen = FrozenDict(plain)
    new = monarchize_params(frozen, EVERY, nblocks=2)
    assert isinstance(new, FrozenDict)
    back = densify_params(new, like=frozen)
    assert isinstance(back, FrozenDict)
    assert jax.tree.structure(back) == jax.tree.structure(frozen)
    root = monarchize_params(plain["layer"], EVERY, nblocks=2)
    assert sorted(root) == ["bias", "w1", "w2"]


def test_linen_parameters():
    module = linen.Sequential([linen.Dense(9), linen.relu, linen.Dense(4)])
    x = jax.random.normal(jax.random.key(0), (3, 6))
    params = module.init(jax.random.key(1), x)
    new = monarchize_params(params, lambda path, _: path[-1] == "layers_0", rank=99)
    assert "w1" in new["params"]["layers_0"]
    assert "kernel" in new["params"]["layers_2"]
    back = densify_params(new, like=jax.eval_shape(lambda: params))
    close(module.apply(back, x), module.apply(params, x))


def test_state_of_a_model_takes_the_same_way():
    model, x = model_and_inputs()
    dense_graph, dense_state = nnx.split(model)
    monarch = monarchize(model, nblocks=4, rank=2)
    graph, _ = nnx.split(monarch)
    params = monarchize_params(dense_state, EVERY, nblocks=4, rank=2)
    assert isinstance(params, nnx.State)
    assert isinstance(params["first"]["w1"], nnx.Param)
    close(nnx.merge(graph, params)(x), monarch(x))
    back = densify_params(params, like=dense_state)
    assert jax.tree.structure(back) == jax.tree.structure(dense_state)
    close(nnx.merge(dense_graph, back)(x), monarch(x))


def test_trees_convert_under_jit():
    params = {"layer": {"kernel": random_kernel(10, 7), "bias": jnp.ones(7)}}
    convert = functools.partial(monarchize_params, predicate=EVERY, rank=1)
    got, want = jax.jit(convert)(params), convert(params)
    shapes = jax.eval_shape(convert, params)
    assert jax.tree.map(jnp.shape, got) == jax.tree.map(lambda s: s.shape, shapes)
    back = jax.jit(functools.partial(densify_params, like=params))
    close(
        back(got)["layer"]["kernel"],
        densify_params(want, like=params)["layer"]["kernel"],
    )


def test_a_model_at_full_rank_is_the_same_model():
    model, x = model_and_inputs()
    close(monarchize(model, nblocks=4, rank=99)(x), model(x), 2e-5)


@pytest.mark.parametrize("rank", [None, 1, 2])
def test_densify_undoes_the_form_not_the_projection(rank):
    model, x = model_and_inputs()
    monarch = monarchize(model, nblocks=4, rank=rank)
    assert float(jnp.abs(monarch(x) - model(x)).max()) > 1e-2
    dense = densify(monarch)
    assert type(dense.first) is type(dense.blocks[1]) is nnx.Linear
    assert dense.first.kernel.shape == (10, 12)
    close(dense(x), monarch(x))
    close(monarchize(dense, nblocks=4, rank=rank)(x), monarch(x), 1e-4)


def test_conversion_keeps_the_rest_and_does_not_touch_the_model():
    model, x = model_and_inputs()
    before = jax.tree.map(jnp.copy, nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    y = model(x)
    monarch = monarchize(model, nblocks=3)
    assert type(model.first) is nnx.Linear
    after = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    jax.tree.map(np.testing.assert_array_equal, before, after)
    np.testing.assert_array_equal(model(x), y)
    # Training the new model does not reach back through a shared variable.
    monarch.first.bias[...] += 1.0
    monarch.norm.scale[...] *= 2.0
    np.testing.assert_array_equal(model(x), y)
    assert monarch.dropout.deterministic
    assert type(monarch.norm) is nnx.BatchNorm


def test_shared_layers_stay_shared():
    model, _ = model_and_inputs()
    for converted in (monarchize(model), densify(monarchize(model))):
        assert converted.shared is converted.blocks[0] is converted.heads["b"]
        assert converted.first is not converted.shared


def test_tied_kernels_stay_tied():
    first, second = (nnx.Linear(8, 8, rngs=nnx.Rngs(i)) for i in range(2))
    second.kernel = first.kernel
    model = nnx.List([first, second, nnx.Linear(8, 8, rngs=nnx.Rngs(2))])
    monarch = monarchize(model, nblocks=2)
    assert monarch[0].w1 is monarch[1].w1
    assert monarch[0].w1 is not monarch[2].w1
    assert monarch[0].bias is not monarch[1].bias
    back = densify(monarch)
    assert back[0].kernel is back[1].kernel
    assert back[0].kernel is not back[2].kernel


def test_many_layers_keep_their_own_weights():
    rngs = nnx.Rngs(0)
    model = nnx.List([nnx.Linear(4, 4, rngs=rngs) for _ in range(30)])
    back = densify(monarchize(model, nblocks=2, rank=2))
    for old, new in zip(model, back, strict=True):
        close(new.kernel[...], old.kernel[...])


def test_the_root_may_be_the_layer():
    layer = nnx.Linear(10, 7, use_bias=False, rngs=nnx.Rngs(0))
    monarch = monarchize(layer, nblocks=4, rank=2)
    assert type(monarch) is MonarchLinear
    assert (monarch.rank, monarch.nblocks, monarch.bias) == (2, 4, None)
    x = jax.random.normal(jax.random.key(0), (3, 10))
    close(monarch(x), layer(x))
    close(densify(monarch)(x), layer(x))


def test_predicates_choose_layers_by_path():
    model, _ = model_and_inputs()
    seen = []

    def predicate(path, layer):
        seen.append((path, layer.in_features))
        return path == ("blocks", 1)

    monarch = monarchize(model, predicate, nblocks=3)
    assert sorted(seen, key=str) == [
        (("blocks", 0), 12),
        (("blocks", 1), 12),
        (("first",), 10),
        (("heads", "a"), 9),
    ]
    assert type(monarch.blocks[1]) is MonarchLinear
    assert type(monarch.first) is type(monarch.shared) is nnx.Linear
    both = monarchize(model)
    half = densify(both, lambda path, layer: layer.out_features == 9)
    assert type(half.blocks[1]) is nnx.Linear
    assert type(half.first) is MonarchLinear


def test_subclasses_are_left_alone():
    layer = nnx.LoRALinear(8, 6, lora_rank=2, rngs=nnx.Rngs(0))
    model = monarchize(nnx.List([layer, nnx.Linear(8, 6, rngs=nnx.Rngs(0))]))
    assert type(model[0]) is nnx.LoRALinear
    assert type(model[1]) is MonarchLinear


@pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.bfloat16])
def test_dtypes_carry_over(param_dtype):
    options = {"dtype": jnp.bfloat16, "param_dtype": param_dtype}
    layer = nnx.Linear(10, 7, **options, rngs=nnx.Rngs(0))
    monarch = monarchize(layer)
    assert monarch.w1.dtype == monarch.w2.dtype == param_dtype
    assert (monarch.dtype, monarch.param_dtype) == (jnp.bfloat16, param_dtype)
    x = jnp.ones((2, 10))
    assert monarch(x).dtype == densify(monarch)(x).dtype == jnp.bfloat16


def test_a_model_that_was_never_made_converts_in_the_abstract():
    make = lambda: monarchize(Model(nnx.Rngs(0)), nblocks=4)
    shapes = nnx.eval_shape(make)
    assert shapes.first.w1.shape == (4, 4, 3)
    graph, state = nnx.split(make())
    assert nnx.merge(graph, state)(jnp.ones((2, 10))).shape == (2, 3)
