"""Adapters against frozen models, matrix identities and NumPy."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxlab.sharpness.gradient_norm_penalty import gnp_value_and_grad
from jaxlab.sharpness.lora import (
    LoRAPair,
    lora_apply,
    lora_balance,
    lora_init,
    lora_merge,
    project_conflicting,
    regularised_lora_value_and_grad,
)
from jaxlab.sharpness.perturbation import perturb

KEY = jax.random.key(0)
HOLE = optax.MaskedNode()


def net(dtype=None, seed=0):
    draw = np.random.default_rng(seed)
    array = lambda *shape: jnp.asarray(draw.normal(size=shape), dtype or jnp.float32)
    return {
        "first": {"kernel": array(5, 7), "bias": array(7)},
        "second": {"kernel": array(7, 3), "bias": array(3)},
    }


def batch(dtype=None, seed=1):
    draw = np.random.default_rng(seed)
    x, y = draw.normal(size=(11, 5)), draw.normal(size=(11, 3))
    return jnp.asarray(x, dtype or jnp.float32), jnp.asarray(y, dtype or jnp.float32)


def loss_fn(params, x, y):
    hidden = jnp.tanh(x @ params["first"]["kernel"] + params["first"]["bias"][None])
    out = hidden @ params["second"]["kernel"] + params["second"]["bias"][None]
    return jnp.mean((out - y) ** 2)


def trained(adapters, seed=2):
    """Adapters in which nothing is zero."""
    draw = np.random.default_rng(seed)
    move = lambda w: w + jnp.asarray(draw.normal(size=w.shape), w.dtype)
    return jax.tree.map(move, adapters)


# Identities at the start.


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("scale", [None, -3.0])
def test_fresh_adapters_change_no_bit(dtype, scale):
    params = net(dtype)
    kernel = params["first"]["kernel"].at[0].set(-0.0)
    params["first"]["kernel"] = kernel
    for rank in (1, 3):
        adapters = lora_init(KEY, params, rank=rank)
        merged = lora_merge(params, adapters, scale=scale)
        chex.assert_trees_all_equal(merged, params)
        chex.assert_trees_all_equal_dtypes(merged, params)
        same = np.signbit(merged["first"]["kernel"]) == np.signbit(kernel)
        assert same.all()
        pair, x = adapters["first"]["kernel"], batch(dtype)[0]
        out = lora_apply(x, kernel, pair, scale=scale)
        assert out.dtype == dtype
        np.testing.assert_array_equal(out, x @ kernel)


def test_at_the_start_only_b_has_a_gradient():
    params = net()
    adapters = lora_init(KEY, params, rank=2)
    f = regularised_lora_value_and_grad(loss_fn, alpha=0)
    value, grads = jax.jit(f)(adapters, params, *batch())
    np.testing.assert_allclose(value, jax.jit(loss_fn)(params, *batch()), rtol=1e-6)
    for layer in ("first", "second"):
        pair = grads[layer]["kernel"]
        assert np.all(pair.a == 0)
        assert np.all(np.linalg.norm(pair.b, axis=1) > 0)


def test_frozen_leaves_have_no_gradient_and_no_update():
    params = net()
    adapters = lora_init(KEY, params, rank=2)
    f = jax.jit(regularised_lora_value_and_grad(loss_fn))
    _, grads = f(adapters, params, *batch())
    assert jax.tree.structure(grads) == jax.tree.structure(adapters)
    chex.assert_trees_all_equal_shapes_and_dtypes(grads, adapters)
    assert grads["first"]["bias"] == grads["second"]["bias"] == HOLE
    assert optax.tree.size(grads) == 2 * (5 + 7) + 2 * (7 + 3)
    tx = optax.adamw(0.1)
    updates, _ = tx.update(grads, tx.init(adapters), adapters)
    merged = lora_merge(params, optax.apply_updates(adapters, updates))
    for layer in ("first", "second"):
        assert merged[layer]["bias"] is params[layer]["bias"]
        assert np.any(merged[layer]["kernel"] != params[layer]["kernel"])


def test_the_first_perturbation_lies_in_b_alone():
    params = net()
    adapters = lora_init(KEY, params, rank=2)
    grad_fn = jax.jit(jax.grad(lambda at: loss_fn(lora_merge(params, at), *batch())))
    expected = perturb(adapters, grad_fn(adapters), radius=0.3)
    for layer in ("first", "second"):
        fresh, moved = adapters[layer]["kernel"], expected[layer]["kernel"]
        np.testing.assert_array_equal(moved.a, fresh.a)
        assert np.any(moved.b != fresh.b)
    length = optax.tree.norm(optax.tree.sub(expected, adapters))
    np.testing.assert_allclose(length, 0.3, rtol=1e-6)
    # SAM's gradient is the one at that point, where a has a gradient too.
    f = regularised_lora_value_and_grad(loss_fn, alpha=1.0, radius=0.3)
    _, grads = jax.jit(f)(adapters, params, *batch())
    chex.assert_trees_all_close(grads, grad_fn(expected), rtol=1e-5, atol=1e-7)
    assert np.any(grads["first"]["kernel"].a != 0)


def test_adaptive_does_not_perturb_fresh_adapters():
    params = net()
    adapters = lora_init(KEY, params, rank=2)
    options = {"alpha": 0.7, "radius": 1.0}
    f = regularised_lora_value_and_grad(loss_fn, adaptive=True, **options)
    plain = regularised_lora_value_and_grad(loss_fn, alpha=0)
    found, expected = (jax.jit(g)(adapters, params, *batch()) for g in (f, plain))
    chex.assert_trees_all_close(found, expected, rtol=1e-5)


# What adapters are.


def test_draws_have_variance_one_over_in():
    params = {"w": jnp.zeros((400, 600)), "v": jnp.zeros((400, 600))}
    adapters = lora_init(KEY, params, rank=100)
    for pair in adapters.values():
        assert np.std(pair.a) * 20 == pytest.approx(1, abs=0.02)
        assert np.mean(pair.a) == pytest.approx(0, abs=0.002)
        assert np.all(pair.b == 0)
    assert np.any(adapters["w"].a != adapters["v"].a)
    other = lora_init(jax.random.key(1), params, rank=100)
    assert np.any(adapters["w"].a != other["w"].a)


@pytest.mark.parametrize("scale", [None, 0.5, jnp.float32(8.0)])
def test_apply_is_the_product_with_the_merged_matrix(scale):
    params = net()
    adapters = trained(lora_init(KEY, params, rank=3))
    merged = lora_merge(params, adapters, scale=scale)
    w, pair = params["first"]["kernel"], adapters["first"]["kernel"]
    x = batch()[0]
    found = lora_apply(x, w, pair, scale=scale)
    expected = x @ merged["first"]["kernel"]
    size = np.max(np.abs(expected))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * size)
    np.testing.assert_allclose(lora_apply(x[0], w, pair, scale=scale), found[0], 1e-5)


def test_merged_matrices_and_gradients_by_hand(x64):
    draw = np.random.default_rng(3)
    w, a, b = (draw.normal(size=s) for s in ((4, 6), (4, 2), (2, 6)))
    x, c = draw.normal(size=(5, 4)), draw.normal(size=(5, 6))
    pair = LoRAPair(jnp.asarray(a), jnp.asarray(b))
    merged = lora_merge(w, pair, scale=3.0)
    np.testing.assert_allclose(merged, w + 1.5 * a @ b, rtol=1e-13)
    for apply in (
        lambda p, q: jnp.sum(c * (x @ lora_merge(q, p, scale=3.0))),
        lambda p, q: jnp.sum(c * lora_apply(x, q, p, scale=3.0)),
    ):
        of_pair, of_w = jax.grad(apply, (0, 1))(pair, jnp.asarray(w))
        np.testing.assert_allclose(of_pair.a, 1.5 * x.T @ c @ b.T, rtol=1e-11)
        np.testing.assert_allclose(of_pair.b, 1.5 * a.T @ x.T @ c, rtol=1e-11)
        np.testing.assert_allclose(of_w, x.T @ c, rtol=1e-11)


@pytest.mark.parametrize("shape", [(4, 6), (6, 4), (5, 5)])
def test_full_rank_represents_any_update(x64, shape):
    draw = np.random.default_rng(4)
    w, update = jnp.asarray(draw.normal(size=shape)), draw.normal(size=shape)
    fresh = lora_init(KEY, w, rank=min(shape))
    u, s, v = np.linalg.svd(update, full_matrices=False)
    pair = LoRAPair(jnp.asarray(u * s), jnp.asarray(v))
    chex.assert_trees_all_equal_shapes_and_dtypes(pair, fresh)
    np.testing.assert_allclose(lora_merge(w, pair), w + update, rtol=1e-12, atol=1e-12)


def test_stacks_of_matrices_are_adapted_one_by_one():
    draw = np.random.default_rng(5)
    params = {"conv": jnp.ones((3, 3, 2, 4)), "w": jnp.ones((5, 4)), "b": jnp.ones(4)}
    params["stack"] = jnp.asarray(draw.normal(size=(6, 4, 5)), jnp.float32)
    default = lora_init(KEY, params, rank=2)
    assert [name for name, leaf in default.items() if leaf != HOLE] == ["w"]
    adapters = lora_init(KEY, params, rank=2, where=lambda path: path == "stack")
    assert [name for name, leaf in adapters.items() if leaf != HOLE] == ["stack"]
    pair = adapters["stack"]
    assert (pair.a.shape, pair.b.shape) == ((6, 4, 2), (6, 2, 5))
    assert np.any(pair.a[0] != pair.a[1])
    pair = trained(pair)
    merged = lora_merge(params, adapters | {"stack": pair})
    x = jnp.asarray(draw.normal(size=(6, 7, 4)), jnp.float32)
    outputs = lora_apply(x, params["stack"], pair)
    for i in range(6):
        one = LoRAPair(pair.a[i], pair.b[i])
        alone = lora_merge(params["stack"][i], one)
        np.testing.assert_allclose(merged["stack"][i], alone, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(outputs[i], x[i] @ alone, rtol=1e-4, atol=1e-5)


def test_paths_and_other_leaves_do_not_change_a_draw():
    params, seen = net(), []
    lora_init(KEY, params, rank=1, where=lambda p: seen.append(p) or "kernel" in p)
    assert seen == ["first/bias", "first/kernel", "second/bias", "second/kernel"]
    both = lora_init(KEY, params, rank=1)
    one = lora_init(KEY, params, rank=1, where=lambda p: p == "second/kernel")
    chex.assert_trees_all_equal(one["second"], both["second"])
    assert one["first"] == {"bias": HOLE, "kernel": HOLE}


def test_nnx_models():
    graph, state = nnx.split(nnx.Linear(4, 3, rngs=nnx.Rngs(0)))
    adapters = trained(lora_init(KEY, state, rank=2))
    merged = nnx.merge(graph, lora_merge(state, adapters))
    old = nnx.merge(graph, state)
    pair = jax.tree.leaves(adapters, is_leaf=lambda x: isinstance(x, LoRAPair))[0]
    x = jnp.ones((2, 4))
    expected = lora_apply(x, old.kernel[...], pair) + old.bias[...][None]
    np.testing.assert_allclose(merged(x), expected, rtol=1e-5)


def test_jit_and_vmap():
    params = net()
    adapters = trained(lora_init(KEY, params, rank=2))
    expected = lora_merge(params, adapters, scale=3.0)
    found = jax.jit(lora_merge)(params, adapters, scale=3.0)
    chex.assert_trees_all_close(found, expected, rtol=1e-5)
    several = jax.tree.map(lambda w: jnp.stack([w, 2 * w]), adapters)
    found = jax.vmap(lambda p: lora_merge(params, p))(several)
    one = lora_merge(params, adapters)
    chex.assert_trees_all_close(jax.tree.map(lambda w: w[0], found), one, rtol=1e-5)


# The balance of a and b.


def test_balance_keeps_the_product(x64):
    params = net(jnp.float64)
    adapters = trained(lora_init(KEY, params, rank=2))
    lopsided = jax.tree.map(
        lambda p: LoRAPair(50 * p.a, p.b / 50),
        adapters,
        is_leaf=lambda x: isinstance(x, LoRAPair),
    )
    balanced = lora_balance(lopsided)
    for layer in ("first", "second"):
        pair = balanced[layer]["kernel"]
        assert np.linalg.norm(pair.a) == pytest.approx(np.linalg.norm(pair.b))
    chex.assert_trees_all_close(
        lora_merge(params, balanced), lora_merge(params, adapters), rtol=1e-12
    )
    chex.assert_trees_all_close(balanced, lora_balance(adapters), rtol=1e-12)
    assert balanced["first"]["bias"] == HOLE


def test_balance_leaves_zero_factors_and_treats_stacks_one_by_one():
    adapters = lora_init(KEY, net(), rank=2)
    chex.assert_trees_all_equal(lora_balance(adapters), adapters)
    a = jnp.stack([jnp.full((2, 1), 8.0), jnp.full((2, 1), 3.0)]).astype(jnp.bfloat16)
    b = jnp.stack([jnp.full((1, 2), 2.0), jnp.zeros((1, 2))]).astype(jnp.bfloat16)
    pair = lora_balance(LoRAPair(a, b))
    assert pair.a.dtype == pair.b.dtype == jnp.bfloat16
    np.testing.assert_array_equal(pair.a[:, 0, 0], [4, 3])
    np.testing.assert_array_equal(pair.b[:, 0, 0], [4, 0])


@pytest.mark.parametrize("adaptive", [False, True])
def test_only_the_adaptive_perturbation_is_free_of_the_balance(x64, adaptive):
    params, data = net(jnp.float64), batch(jnp.float64)
    pairs = trained(lora_init(KEY, params, rank=2))
    stretch = lambda c, d: lambda p: LoRAPair(c * p.a, d * p.b)
    is_pair = lambda x: isinstance(x, LoRAPair)
    other = jax.tree.map(stretch(4.0, 0.25), pairs, is_leaf=is_pair)
    f = regularised_lora_value_and_grad(loss_fn, radius=0.5, adaptive=adaptive)
    f = jax.jit(f)
    _, grads = f(pairs, params, *data)
    _, found = f(other, params, *data)
    # Gradients go the other way than what they belong to.
    back = jax.tree.map(stretch(4.0, 0.25), found, is_leaf=is_pair)
    error = optax.tree.norm(optax.tree.sub(back, grads)) / optax.tree.norm(grads)
    assert (error < 1e-12) == adaptive


# The penalised gradient.


def test_it_is_the_penalty_on_the_adapters(x64):
    params, data = net(jnp.float64), batch(jnp.float64)
    adapters = trained(lora_init(KEY, params, rank=2))
    f = regularised_lora_value_and_grad(loss_fn, alpha=0.6, radius=0.2, scale=3.0)
    at = lambda p: loss_fn(lora_merge(params, p, scale=3.0), *data)
    grad_fn = jax.jit(jax.grad(at))
    g = grad_fn(adapters)
    norm = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(g)))
    there = jax.tree.map(lambda p, d: p + 0.2 * d / norm, adapters, g)
    mix = lambda one, two: 0.4 * one + 0.6 * two
    expected = jax.tree.map(mix, g, grad_fn(there))
    value, found = jax.jit(f)(adapters, params, *data)
    chex.assert_trees_all_close(found, expected, rtol=1e-11)
    np.testing.assert_allclose(value, at(adapters), rtol=1e-14)


def test_defaults_aux_and_options():
    params, data = net(), batch()
    adapters = trained(lora_init(KEY, params, rank=2))
    with_aux = lambda p, x, y: (loss_fn(p, x, y), p["first"]["bias"] + 1)
    still = lambda tree: jax.tree.map(lambda _: False, tree)
    f = regularised_lora_value_and_grad(with_aux, has_aux=True, mask=still)
    (value, aux), grads = jax.jit(f)(adapters, params, *data)
    plain = regularised_lora_value_and_grad(loss_fn, alpha=0)
    expected = jax.jit(plain)(adapters, params, *data)
    chex.assert_trees_all_close((value, grads), expected, rtol=1e-5)
    np.testing.assert_array_equal(aux, params["first"]["bias"] + 1)
    merged = lambda p: loss_fn(lora_merge(params, p), *data)
    expected = jax.jit(gnp_value_and_grad(merged, alpha=0.8, radius=0.05))(adapters)
    found = jax.jit(regularised_lora_value_and_grad(loss_fn))(adapters, params, *data)
    chex.assert_trees_all_close(found, expected, rtol=1e-5)


def test_a_zero_gradient_stays_zero():
    params = net()
    adapters = lora_init(KEY, params, rank=2)
    f = regularised_lora_value_and_grad(lambda p: jnp.sum(p["first"]["bias"]))
    _, grads = f(adapters, params)
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(grads))
    # A loss whose gradient vanishes at the fresh adapters, not around them.
    still = lambda p: jnp.sum((p["first"]["kernel"] - params["first"]["kernel"]) ** 2)
    _, grads = regularised_lora_value_and_grad(still)(adapters, params)
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(grads))


def test_short_steps_do_not_round_away_in_bfloat16():
    params = {"w": jnp.full((2, 2), 256.0, jnp.bfloat16)}
    adapters = lora_init(KEY, params, rank=2)
    seen = []

    def watched(p):
        seen.append(p["w"].dtype)
        return jnp.sum((p["w"].astype(jnp.float32) - 255) ** 2)

    f = regularised_lora_value_and_grad(watched, alpha=1.0, radius=1e-3)
    _, grads = f(adapters, params)
    assert seen == [jnp.bfloat16, jnp.float32]
    assert grads["w"].a.dtype == grads["w"].b.dtype == jnp.bfloat16
    assert np.any(grads["w"].a != 0)


# Projection.


def numpy_projection(g, r):
    product = g @ r
    return g if product >= 0 or not r @ r else g - product * r / (r @ r)


@pytest.mark.parametrize("seed", range(4))
def test_projection_against_numpy(x64, seed):
    draw = np.random.default_rng(seed)
    g, r = draw.normal(size=(2, 17))
    tree = lambda v: {"a": jnp.asarray(v[:5]), "b": [jnp.asarray(v[5:]).reshape(3, 4)]}
    flat = lambda t: np.concatenate([t["a"], t["b"][0].ravel()])
    for reference in (r, -r, 1e-200 * r, 1e200 * r, -1e-200 * r, 0 * r, g, -g):
        found = jax.jit(project_conflicting)(tree(g), tree(reference))
        # NumPy needs a reference whose square neither over- nor underflows.
        top = np.max(np.abs(reference)) or 1.0
        expected = numpy_projection(g, reference / top)
        np.testing.assert_allclose(flat(found), expected, rtol=1e-12, atol=1e-14)
        product = flat(found) @ (reference / top)
        assert product >= -1e-13
        if g @ (reference / top) >= 0:
            chex.assert_trees_all_equal(found, tree(g))
        else:
            assert abs(product) < 1e-13


def test_projection_is_global():
    # The leaves conflict one by one, but not together, and the other way round.
    g = {"a": jnp.array([1.0]), "b": jnp.array([-1.0])}
    r = {"a": jnp.array([3.0]), "b": jnp.array([1.0])}
    chex.assert_trees_all_equal(project_conflicting(g, r), g)
    found = project_conflicting(g, optax.tree.scale(-1.0, r))
    chex.assert_trees_all_close(
        found, {"a": jnp.array([0.4]), "b": jnp.array([-1.2])}, rtol=1e-6
    )


def test_projection_of_small_types_zeros_holes_and_nan():
    g = jnp.full(5000, 1.0, jnp.bfloat16)
    found = project_conflicting(g, -g)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found, jnp.zeros(5000))
    zero = jnp.zeros(3)
    one = jnp.arange(3.0)
    np.testing.assert_array_equal(project_conflicting(one, zero), one)
    np.testing.assert_array_equal(project_conflicting(zero, one), zero)
    grads = {"w": LoRAPair(one, -one), "b": HOLE}
    found = project_conflicting(grads, optax.tree.scale(-1.0, grads))
    assert found["b"] == HOLE
    assert np.all(found["w"].a == 0)
    assert np.all(np.isnan(project_conflicting(one, one * jnp.nan)))


# That it learns.


@pytest.mark.parametrize("alpha", [0.0, 0.8])
def test_it_adapts_a_regression_to_a_shift(alpha):
    draw = np.random.default_rng(6)
    w = draw.normal(size=(8, 6))
    shift = draw.normal(size=(8, 1)) @ draw.normal(size=(1, 6))
    x = jnp.asarray(draw.normal(size=(40, 8)), jnp.float32)
    y = x @ jnp.asarray(w + shift, jnp.float32)
    params = {"kernel": jnp.asarray(w, jnp.float32), "bias": jnp.zeros(6)}

    def loss(p, x, y):
        return jnp.mean((x @ p["kernel"] + p["bias"][None] - y) ** 2)

    tx = optax.adam(0.03)
    f = regularised_lora_value_and_grad(loss, alpha=alpha, radius=0.02)
    adapters = lora_init(KEY, params, rank=2)

    def step(carry, _):
        adapters, state = carry
        value, grads = f(adapters, params, x, y)
        updates, state = tx.update(grads, state, adapters)
        return (optax.apply_updates(adapters, updates), state), value

    start = adapters, tx.init(adapters)
    (adapters, _), values = jax.jit(
        lambda start: jax.lax.scan(step, start, length=600)
    )(start)
    assert values[-1] < 1e-2 * values[0]
    found = lora_merge(params, adapters)
    update = np.asarray(found["kernel"]) - w
    assert np.linalg.norm(update - shift) < 0.1 * np.linalg.norm(shift)
