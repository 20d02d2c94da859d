import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxlab.layers import MonarchLinear
from jaxlab.models import GPT, gpt_s


@functools.cache
def small():
    return GPT(vocabulary=11, context=9, width=16, layers=2, heads=4, rngs=nnx.Rngs(0))


@functools.cache
def apply():
    return jax.jit(lambda tokens: small()(tokens))


def text(seed, *shape):
    return jax.random.randint(jax.random.key(seed), shape, 0, 11)


def test_equals_embedding_blocks_norm_and_tied_head():
    model, tokens = small(), text(0, 3, 7)

    @jax.jit
    def formula():
        table, positions = model.embedding.embedding[...], model.positions[...]
        x = table[tokens] + positions[None, :7]
        for block in model.blocks:
            x = block(x)
        return jnp.einsum("btw,vw->btv", model.norm(x), table)

    np.testing.assert_allclose(apply()(tokens), formula(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("changed", range(9))
def test_a_later_token_never_changes_earlier_logits(changed):
    tokens = text(0, 4, 9)
    other = tokens.at[:, changed].set((tokens[:, changed] + 1) % 11)
    before, after = apply()(tokens), apply()(other)
    np.testing.assert_array_equal(before[:, :changed], after[:, :changed])
    assert jnp.all(jnp.any(before[:, changed:] != after[:, changed:], axis=-1))


def test_derivatives_of_earlier_logits_by_later_tokens_are_zero():
    """The same through gradients, which a mask added after the softmax would break."""
    model = small()

    def logits(x):
        for block in model.blocks:
            x = block(x)
        return jnp.sum(model.norm(x) ** 3, axis=-1)

    x = jax.random.normal(jax.random.key(0), (9, 16))
    reach = jnp.max(jnp.abs(jax.jit(jax.jacobian(logits))(x)), axis=-1)
    np.testing.assert_array_equal(reach > 0, np.tri(9, dtype=bool))


def test_a_prefix_gives_the_same_logits():
    tokens = text(0, 4, 9)
    np.testing.assert_allclose(
        apply()(tokens[:, :5]), apply()(tokens)[:, :5], rtol=1e-5, atol=1e-6
    )


def test_the_order_of_earlier_tokens_counts():
    one, two = apply()(jnp.array([[1, 2, 3]])), apply()(jnp.array([[2, 1, 3]]))
    assert jnp.max(jnp.abs(one[:, 2] - two[:, 2])) > 1e-4


def test_starts_near_the_uniform_distribution():
    """Small embeddings make small logits: the first loss is log(vocabulary)."""
    tokens = text(0, 4, 9)
    logp = jax.nn.log_softmax(apply()(tokens))
    picked = jnp.take_along_axis(logp, text(1, 4, 9)[..., None], axis=-1)
    assert float(-picked.mean()) == pytest.approx(np.log(11), abs=0.05)


def test_unknown_tokens_are_not_hidden():
    """Their rows are NaN, earlier positions too (a zero weight times NaN is NaN)."""
    logits = apply()(jnp.array([[1, 2, 11, 3], [1, 2, 10, 3]]))
    assert jnp.all(jnp.isnan(logits[0]))
    assert jnp.all(jnp.isfinite(logits[1]))


def test_factory_sees_every_layer_of_a_block():
    made = []

    def linear(n, m, *, use_bias=True, rngs):
        made.append((n, m))
        return nnx.Linear(n, m, use_bias=use_bias, rngs=rngs)

    nnx.eval_shape(lambda: gpt_s(linear=linear, rngs=nnx.Rngs(0)))
    assert made == [*[(128, 128)] * 4, (128, 512), (512, 128)] * 4


@pytest.mark.parametrize("remat", [False, True])
def test_stacked_blocks_are_the_blocks_one_after_the_other(remat):
    sizes = {"vocabulary": 11, "context": 9, "width": 16, "layers": 3, "heads": 4}
    plain = GPT(**sizes, rngs=nnx.Rngs(0))
    stacked = GPT(**sizes, scan=True, remat=remat, rngs=nnx.Rngs(1))
    graph, params = nnx.split(plain, nnx.Param)
    other, _ = nnx.split(stacked, nnx.Param)
    params = nnx.to_pure_dict(params)
    blocks = params["blocks"].values()
    stack = params | {"blocks": jax.tree.map(lambda *x: jnp.stack(x), *blocks)}
    tokens = text(0, 2, 7)

    def loss(graph, params):
        return jnp.sum(nnx.merge(graph, params)(tokens) ** 2)

    expected = jax.jit(jax.grad(lambda p: loss(graph, p)))(params)
    found = jax.jit(jax.grad(lambda p: loss(other, p)))(stack)
    for number, block in expected["blocks"].items():
        mine = jax.tree.map(lambda x, n=number: x[n], found["blocks"])
        chex.assert_trees_all_close(mine, block, rtol=1e-4, atol=1e-4)
    for name in ("embedding", "positions", "norm"):
        chex.assert_trees_all_close(found[name], expected[name], rtol=1e-4, atol=1e-4)


def test_dtype_is_that_of_the_logits_and_not_of_the_parameters():
    sizes = {"vocabulary": 11, "context": 9, "width": 16, "layers": 1, "heads": 4}
    model = GPT(**sizes, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    assert model(text(0, 2, 7)).dtype == jnp.bfloat16
    leaves = jax.tree.leaves(nnx.state(model, nnx.Param))
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype("float32")}


def test_layers_of_the_two_layer_maps_have_a_factory_of_their_own():
    sizes = {"vocabulary": 11, "context": 9, "width": 16, "layers": 1, "heads": 4}
    monarch = functools.partial(MonarchLinear, nblocks=2)
    block = GPT(**sizes, feedforward_linear=monarch, rngs=nnx.Rngs(0)).blocks[0]
    assert isinstance(block.feedforward.up, MonarchLinear)
    assert isinstance(block.feedforward.down, MonarchLinear)
    assert isinstance(block.attention.out, nnx.Linear)
