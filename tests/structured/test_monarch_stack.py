"""Folded chains of Monarch layers: against the chain of products, layer by layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlab.structured import (
    FoldedLayer,
    fold_monarch_stack,
    init_monarch,
    monarch_matmul,
    monarch_stack_matmul,
    monarch_to_dense,
    unfold_monarch_stack,
)

ORDERS = ("interleaved", "block_major")
# Widths of a chain and blocks k, l and rank c of every layer; l of one divides p of
# the next, so both orders take them.
CHAINS = {
    "even": ((16, 16, 16), ((4, 4, 1), (4, 4, 1))),
    "rank": ((32, 32, 16), ((4, 4, 2), (2, 4, 3))),
    "uneven": ((12, 18, 30, 8), ((4, 3, 2), (2, 5, 3), (3, 2, 1))),
    "one": ((6, 10), ((3, 2, 2),)),
}


def random_chain(name, *, seed=0, dtype=np.float64):
    widths, blocks = CHAINS[name]
    draw = np.random.default_rng(seed).standard_normal
    factors, biases = [], []
    for n, m, (k, l, c) in zip(widths, widths[1:], blocks, strict=False):
        p, q, s, r = n // k, c * l, m // l, k * c
        factors.append(
            (
                jnp.asarray(draw((k, q, p)) / np.sqrt(p), dtype),
                jnp.asarray(draw((l, s, r)) / np.sqrt(r), dtype),
            )
        )
        biases.append(jnp.asarray(draw(m), dtype))
    return jnp.asarray(draw((widths[0], 7)), dtype), factors, biases


def block_major(m, l):
    """The row of the interleaved matrix that stands at each place in block order."""
    return np.arange(m).reshape(m // l, l).T.ravel()


def oracle(x, factors, biases, order):
    """Dense matrices one after the other, rows permuted where the order asks it."""
    y = np.asarray(x)
    for i, ((w1, w2), bias) in enumerate(zip(factors, biases, strict=True)):
        matrix = np.asarray(monarch_to_dense(w1, w2))
        if order == "block_major":
            matrix = matrix[block_major(len(matrix), w2.shape[0])]
        y = matrix @ y + np.asarray(bias)[:, None]
        if i < len(factors) - 1:
            y = np.tanh(y)
    return y


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", CHAINS)
def test_equals_the_dense_matrices_in_turn(x64, name, order, platform):
    x, factors, biases = random_chain(name)
    layers = fold_monarch_stack(factors, biases=biases, order=order)
    apply = jax.jit(
        lambda x, layers: monarch_stack_matmul(
            x, layers, activation=jnp.tanh, order=order, platform=platform
        )
    )
    expected = oracle(x, factors, biases, order)
    np.testing.assert_allclose(apply(x, layers), expected, atol=1e-12)


@pytest.mark.parametrize("order", ORDERS)
def test_equals_the_chain_of_products_and_its_gradients(x64, order):
    x, factors, biases = random_chain("uneven")

    def plain(x, factors, biases):
        y = x.T
        for i, (pair, bias) in enumerate(zip(factors, biases, strict=True)):
            y = monarch_matmul(y, *pair, output_layout=order) + bias[None]
            y = jnp.sin(y) if i == 0 else jnp.tanh(y) if i == 1 else y
        return jnp.sum(jnp.cos(y))

    def folded(x, factors, biases):
        layers = fold_monarch_stack(factors, biases=biases, order=order)
        y = monarch_stack_matmul(x, layers, activation=[jnp.sin, jnp.tanh], order=order)
        return jnp.sum(jnp.cos(y))

    expected = jax.value_and_grad(plain, (0, 1, 2))(x, factors, biases)
    found = jax.value_and_grad(folded, (0, 1, 2))(x, factors, biases)
    for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-12)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", CHAINS)
def test_unfolding_gives_back_what_was_folded(name, order):
    _, factors, biases = random_chain(name, dtype=np.float32)
    biases[0] = None
    layers = fold_monarch_stack(factors, biases=biases, order=order)
    pairs, back = unfold_monarch_stack(layers, order=order)
    assert back[0] is None
    for a, b in zip(*map(jax.tree.leaves, (pairs, factors)), strict=True):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(back[1:], biases[1:], strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
@pytest.mark.parametrize("order", ORDERS)
def test_the_output_can_have_either_layout(x64, order, platform):
    x, factors, biases = random_chain("rank")
    layers = fold_monarch_stack(factors, biases=biases, order=order)
    outputs = {
        layout: monarch_stack_matmul(
            x, layers, order=order, output_layout=layout, platform=platform
        )
        for layout in (*ORDERS, None)
    }
    rows = block_major(16, 4)
    np.testing.assert_allclose(
        outputs["block_major"], outputs["interleaved"][rows], atol=1e-12
    )
    np.testing.assert_array_equal(outputs[None], outputs[order])


def test_the_orders_are_different_maps():
    key = jax.random.key(0)
    factors = [init_monarch(k, 16, 16) for k in jax.random.split(key)]
    entries = {}
    for order in ORDERS:
        layers = fold_monarch_stack(factors, order=order)
        entries[order] = monarch_stack_matmul(jnp.eye(16), layers, order=order)
    assert not np.allclose(entries["interleaved"], entries["block_major"], atol=0.1)


@pytest.mark.parametrize("order", ORDERS)
def test_no_activation_is_moved(order):
    """The program holds two products a layer and transposes nothing but weights."""
    x, factors, biases = random_chain("even", dtype=np.float32)
    layers = fold_monarch_stack(factors, biases=biases, order=order)
    program = jax.make_jaxpr(
        lambda x, layers: monarch_stack_matmul(
            x, layers, activation=jax.nn.relu, order=order, output_layout="block_major"
        )
    )(x, layers)
    text = str(program)
    assert text.count("dot_general") == 4
    moved = [line for line in text.splitlines() if "transpose[" in line]
    # einsum may name its result's axes in another order than dot_general gives them:
    # batch axes lead there, and here they lead already.
    assert not moved, moved


@settings(max_examples=25, deadline=None)
@given(
    k=st.integers(1, 3),
    l=st.integers(1, 3),
    c=st.integers(1, 3),
    s=st.integers(1, 3),
    after=st.integers(1, 3),
    order=st.sampled_from(ORDERS),
    seed=st.integers(0, 99),
)
def test_any_two_layers_that_fit(k, l, c, s, after, order, seed):
    draw = np.random.default_rng(seed).standard_normal
    first = draw((k, c * l, 2)), draw((l, s * after, k * c))
    second = draw((after, 2, l * s)), draw((2, 3, after))
    x = draw((2 * k, 4))
    layers = fold_monarch_stack(
        [tuple(jnp.asarray(w, jnp.float32) for w in pair) for pair in (first, second)],
        order=order,
    )
    found = monarch_stack_matmul(jnp.asarray(x, jnp.float32), layers, order=order)
    y = jnp.asarray(x.T, jnp.float32)
    for pair in (first, second):
        y = monarch_matmul(
            y, *(jnp.asarray(w, jnp.float32) for w in pair), output_layout=order
        )
    scale = max(float(jnp.max(jnp.abs(y))), 1.0)
    np.testing.assert_allclose(found / scale, y.T / scale, atol=2e-6)


def test_batches_and_dtypes(x64):
    x, factors, _ = random_chain("even", dtype=np.float32)
    layers = fold_monarch_stack(factors)
    flat = monarch_stack_matmul(jnp.tile(x, (1, 6)), layers)
    for shape in ((6, 7), (2, 3, 7)):
        wide = jnp.tile(x, (1, 6)).reshape(16, *shape)
        found = monarch_stack_matmul(wide, layers)
        np.testing.assert_array_equal(found.reshape(16, -1), flat)
    assert monarch_stack_matmul(x[:, 0], layers).shape == (16,)
    assert monarch_stack_matmul(x[:, :0], layers).shape == (16, 0)
    low = jax.tree.map(lambda w: w.astype(jnp.bfloat16), layers)
    assert monarch_stack_matmul(x.astype(jnp.bfloat16), low).dtype == jnp.bfloat16
    exact = monarch_stack_matmul(x, layers)
    rough = monarch_stack_matmul(x.astype(jnp.bfloat16), low)
    np.testing.assert_allclose(rough.astype(jnp.float32), exact, atol=0.1)
    assert monarch_stack_matmul(x.astype(np.float64), layers).dtype == jnp.float64
    complex_layers = jax.tree.map(lambda w: w.astype(jnp.complex64), layers)
    np.testing.assert_allclose(
        monarch_stack_matmul(x, complex_layers).real, exact, atol=1e-5
    )


def test_products_of_low_precision_add_up_in_float32():
    x, factors, _ = random_chain("even", dtype=jnp.bfloat16)
    layers = fold_monarch_stack(factors)
    program = str(jax.make_jaxpr(monarch_stack_matmul)(x, layers))
    assert program.count("preferred_element_type=float32") == 4


def test_derivatives_of_any_order_and_vmap(x64):
    x, factors, biases = random_chain("rank")
    layers = fold_monarch_stack(factors, biases=biases)

    def apply(layers, x):
        return monarch_stack_matmul(x, layers, activation=jnp.tanh)

    tangent = jax.tree.map(jnp.ones_like, layers)
    f = lambda layers: jnp.sum(apply(layers, x) ** 2)
    over = jax.jvp(jax.grad(f), (layers,), (tangent,))[1]
    step = 1e-5
    ends = [
        jax.grad(f)(jax.tree.map(lambda w, sign=sign: w + sign * step, layers))
        for sign in (1, -1)
    ]
    for a, up, down in zip(*map(jax.tree.leaves, (over, *ends)), strict=True):
        np.testing.assert_allclose(a, (up - down) / (2 * step), rtol=1e-5, atol=1e-6)
    several = jax.tree.map(lambda w: jnp.stack([w, 2 * w]), layers)
    both = jax.vmap(apply, (0, None))(several, x)
    np.testing.assert_allclose(both[0], apply(layers, x), atol=1e-12)


def test_layers_are_a_pytree():
    layers = fold_monarch_stack(random_chain("one", dtype=np.float32)[1])
    leaves, structure = jax.tree.flatten(layers)
    assert len(leaves) == 2
    assert isinstance(jax.tree.unflatten(structure, leaves)[0], FoldedLayer)
