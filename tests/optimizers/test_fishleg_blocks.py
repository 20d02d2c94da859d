"""Which parameters share a block: five kinds of models, cuts, rules."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

from jaxlab.layers import MonarchLinear
from jaxlab.models import cnn, gpt_s, mlp_s
from jaxlab.optimizers import describe_blocks, fishleg_group_step, q_apply, q_init
from jaxlab.optimizers.fisher_legendre.blocks import blocks_of, gather, scatter


def found(params, rule=None, max_size=1024):
    return {b.name: b for b in blocks_of("test", params, rule, max_size)}


def nnx_params(build):
    state = nnx.split(nnx.eval_shape(lambda: build(rngs=nnx.Rngs(0))), nnx.Param, ...)[
        1
    ]
    return state


def test_plain_dict():
    params = {"w1": jnp.ones((3, 4)), "b1": jnp.ones(4), "w2": jnp.ones((4, 2))}
    params |= {"b2": jnp.ones(2), "temperature": jnp.ones(())}
    blocks = found(params)
    assert set(blocks) == {"w1 + b1", "w2 + b2", "temperature"}
    assert (blocks["w1 + b1"].rows, blocks["w1 + b1"].columns) == (4, 4)
    assert blocks["temperature"].kind == "diagonal"


def test_biases_of_equal_length_go_by_their_names():
    square = {"w1": jnp.ones((4, 4)), "b1": jnp.ones(4), "w2": jnp.ones((4, 4))}
    assert set(found(square | {"b2": jnp.ones(4)})) == {"w1 + b1", "w2 + b2"}
    # A gain is no bias, though its shape fits.
    assert set(found(square | {"gain2": jnp.ones(4)})) == {"w1 + b1", "w2", "gain2"}


def test_nnx_convolutions():
    blocks = found(nnx_params(cnn))
    by = {name.rsplit(" + ", 1)[0]: b for name, b in blocks.items()}
    assert all(block.kind == "kronecker" for block in blocks.values())
    assert sorted((b.rows, b.columns) for b in by.values()) == [
        (10, 16),
        (145, 32),
        (513, 10),
    ]


def test_nnx_transformer():
    blocks = found(nnx.to_pure_dict(nnx_params(gpt_s)))
    kinds = {name: block.kind for name, block in blocks.items()}
    attention = "blocks/0/attention/query/kernel + blocks/0/attention/query/bias"
    assert kinds[attention] == "kronecker"
    assert kinds["blocks/0/norm1/scale"] == kinds["blocks/0/norm1/bias"] == "diagonal"
    embeddings = [n for n, kind in kinds.items() if kind == "embedding"]
    assert len(embeddings) == 1
    assert blocks[embeddings[0]].left.diagonal


def test_linen():
    class Net(linen.Module):
        @linen.compact
        def __call__(self, x):
            return linen.Dense(2)(linen.LayerNorm()(linen.Dense(5)(x)))

    params = jax.eval_shape(Net().init, jax.random.key(0), jnp.ones((1, 3)))
    blocks = found(params)
    assert {b.kind for n, b in blocks.items() if "LayerNorm" in n} == {"diagonal"}
    dense = [b for n, b in blocks.items() if "Dense" in n]
    assert sorted((b.rows, b.columns) for b in dense) == [(4, 5), (6, 2)]


def test_monarch_factors_are_stacks_of_small_blocks():
    build = lambda *, rngs: mlp_s(
        linear=lambda i, o, *, rngs: MonarchLinear(i, o, nblocks=4, rngs=rngs),
        rngs=rngs,
    )
    blocks = found(nnx.to_pure_dict(nnx_params(build)))
    stacks = [b for b in blocks.values() if b.batch == (4,)]
    assert len(stacks) == 6
    assert all(b.kind == "kronecker" for b in stacks)
    assert {b.kind for b in blocks.values() if not b.batch} == {"diagonal"}


def test_stacked_layers_take_their_biases():
    params = {"kernel": jnp.ones((5, 3, 2)), "bias": jnp.ones((5, 2))}
    (block,) = found(params).values()
    assert (block.batch, block.rows, block.columns) == ((5,), 4, 2)


def test_holes_are_left_out():
    params = {"a": {"kernel": jnp.ones((2, 2))}, "b": optax.MaskedNode()}
    assert set(found(params)) == {"a/kernel"}


def test_long_sides_are_cut_into_equal_parts():
    (block,) = found({"kernel": jnp.ones((785, 400))}, max_size=256).values()
    assert (block.left.count, block.left.size) == (4, 197)
    assert (block.right.count, block.right.size) == (2, 200)


def test_rules_by_name_and_by_function():
    params = {"a": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}}
    assert set(found(params, {"a/": "full"})) == {"a/kernel", "a/bias"}
    by_shape = lambda path, shape: "diagonal" if len(shape) == 2 else None
    blocks = found(params, by_shape)
    assert {b.kind for b in blocks.values()} == {"diagonal"}
    assert found(params, {"kernel": "scaled"})["a/kernel + a/bias"].scaled


def test_leaves_go_into_matrices_and_back():
    draw = np.random.default_rng(0)
    params = {
        "conv": {"kernel": draw.normal(size=(3, 3, 2, 4)), "bias": draw.normal(size=4)},
        "stack": draw.normal(size=(5, 3, 2)),
        "gain": draw.normal(size=6),
    }
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), params)
    blocks = tuple(found(params).values())
    matrices = gather(blocks, params)
    assert all(m.dtype == jnp.float32 for m in matrices.values())
    conv = matrices["conv/kernel + conv/bias"]
    np.testing.assert_array_equal(conv[0], params["conv"]["bias"])
    np.testing.assert_array_equal(conv[1:], params["conv"]["kernel"].reshape(18, 4))
    returned = scatter(blocks, matrices, params)
    assert jax.tree.all(jax.tree.map(np.array_equal, returned, params))
    assert jax.tree.all(jax.tree.map(lambda a, b: a.dtype == b.dtype, returned, params))


def test_description_counts_the_numbers():
    params = {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2), "gain": jnp.ones(5)}
    numbers = sum(leaf.size for leaf in jax.tree.leaves(q_init(params)))
    text = describe_blocks(params)
    counts = [int(line.split()[-2].replace(",", "")) for line in text.splitlines()]
    assert sum(counts) == numbers == 25


@pytest.mark.parametrize("max_size", [2, 1024])
def test_description_of_cuts(max_size):
    params = {"stack": jnp.ones((3, 5, 4))}
    count = sum(
        leaf.size for leaf in jax.tree.leaves(q_init(params, max_size=max_size))
    )
    assert f"{count} numbers" in describe_blocks(params, max_size=max_size)


def test_stacked_kernels_are_as_many_matrices_of_their_own():
    """(layers, blocks, in, out) under "stacked" learns as each matrix does alone."""
    keys = jax.random.split(jax.random.key(0), 3)
    one, two = (jax.random.normal(key, (2, 3, 4, 5)) for key in keys[:2])
    scales = jnp.exp(jax.random.normal(keys[2], (2, 3, 4, 5)))
    rule = {"w": "stacked"}
    whole = q_init({"w": one}, rule=rule)
    alone = {f"{i}{j}": one[i, j] for i in range(2) for j in range(3)}
    split = lambda tree: {f"{i}{j}": tree[i, j] for i in range(2) for j in range(3)}
    parts = q_init(alone)
    for _ in range(3):
        whole, _ = fishleg_group_step(
            None,
            whole,
            [{"w": one}],
            lambda v: {"w": scales * v["w"]},
            damping=0.1,
            white_directions=0,
        )
        parts, _ = fishleg_group_step(
            None,
            parts,
            [split(one)],
            lambda v: {k: split(scales)[k] * v[k] for k in v},
            damping=0.1,
            white_directions=0,
        )
    found, expected = q_apply(whole, {"w": two})["w"], q_apply(parts, split(two))
    for name, matrix in split(found).items():
        np.testing.assert_allclose(matrix, expected[name], rtol=1e-5, atol=1e-5)
    # As a convolution, which is what four axes are by themselves, it is another map.
    assert describe_blocks({"w": one}, rule=rule) != describe_blocks({"w": one})
