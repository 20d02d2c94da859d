"""The penalised gradient against identities, brute force, goldens and peers."""

import pathlib
import runpy
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlab import trees
from jaxlab.sharpness.gradient_norm_penalty import (
    asam,
    gnp_gradient,
    gnp_gradient_exact,
    gnp_value_and_grad,
    gradient_norm_penalty,
    sam,
)
from jaxlab.sharpness.perturbation import perturb

net = types.SimpleNamespace(
    **runpy.run_path(str(pathlib.Path(__file__).with_name("golden_net.py")))
)
GOLDEN = net.GOLDEN
TIGHT = {"rtol": 0, "atol": 1e-10}


def _quadratic(seed=0, size=7):
    draw = np.random.default_rng(seed)
    root = draw.normal(size=(size, size))
    matrix = jnp.asarray(root @ root.T / size)
    shift = jnp.asarray(draw.normal(size=size))
    return lambda w: 0.5 * (w - shift) @ matrix @ (w - shift), matrix


# Identities.


def test_alpha_zero_is_the_gradient_bit_for_bit():
    grads = jax.grad(net.loss_fn)(net.params(), net.batch())
    grad_fn = lambda at: jax.grad(net.loss_fn)(at, net.batch())
    for alpha in (0, 0.0, jnp.float32(0)):
        got = gnp_gradient(grad_fn, net.params(), alpha=alpha, radius=0.3, grads=grads)
        chex.assert_trees_all_equal(got, grads)


@pytest.mark.parametrize("radius", [1e-3, 0.1, 1.0, 10.0])
@pytest.mark.parametrize("alpha", [-0.5, 0.2, 0.8, 1.0, 3.0])
def test_on_a_quadratic_the_mixture_is_exact_at_every_radius(x64, radius, alpha):
    loss_fn, matrix = _quadratic()
    w = jnp.linspace(-1.0, 2.0, 7)
    g = jax.grad(loss_fn)(w)
    closed = g + alpha * radius * matrix @ g / jnp.linalg.norm(g)
    got = gnp_gradient(jax.grad(loss_fn), w, alpha=alpha, radius=radius)
    exact = gnp_gradient_exact(loss_fn, w, penalty=alpha * radius)
    np.testing.assert_allclose(got, closed, rtol=0, atol=1e-12 * (1 + 1 / radius))
    np.testing.assert_allclose(exact, closed, rtol=0, atol=1e-12)


def test_exact_form_is_the_gradient_of_loss_plus_norm(x64):
    norm = lambda at: optax.tree.norm(net.grad_fn(at))
    penalised = lambda at: net.loss_fn(at, net.batch()) + 0.3 * norm(at)
    loss_fn = lambda at: net.loss_fn(at, net.batch())
    got = gnp_gradient_exact(loss_fn, net.params(), penalty=0.3)
    chex.assert_trees_all_close(got, jax.grad(penalised)(net.params()), **TIGHT)


def test_a_scaled_loss_scales_the_gradient(x64):
    scaled = lambda at: jax.tree.map(lambda g: 1e3 * g, net.grad_fn(at))
    one = gnp_gradient(net.grad_fn, net.params(), alpha=0.8, radius=0.1)
    two = gnp_gradient(scaled, net.params(), alpha=0.8, radius=0.1)
    chex.assert_trees_all_close(two, jax.tree.map(lambda g: 1e3 * g, one), rtol=1e-10)


def test_neither_structure_nor_order_of_the_tree_matters(x64):
    split = lambda w: {"z": w[:2], "a": (w[2:3], w[3:].reshape(2, 2))}
    join = lambda t: jnp.concatenate([t["z"], t["a"][0], t["a"][1].ravel()])
    loss_fn, _ = _quadratic()
    cube = lambda w: loss_fn(w) + jnp.sum(w**3)
    w = jnp.linspace(-1.0, 2.0, 7)
    flat = gnp_gradient(jax.grad(cube), w, alpha=0.8, radius=0.2)
    nested = gnp_gradient(
        jax.grad(lambda t: cube(join(t))), split(w), alpha=0.8, radius=0.2
    )
    np.testing.assert_allclose(join(nested), flat, rtol=0, atol=1e-12)


# Goldens.


@pytest.mark.parametrize("i", range(5))
def test_goldens_of_one_gradient(x64, i):
    alpha, radius = GOLDEN["alphas"][i], GOLDEN["rs"][i]
    params = net.params()
    point = perturb(params, net.grad_fn(params), radius=radius)
    np.testing.assert_allclose(net.flat(point), GOLDEN[f"pert_params_{i}"], **TIGHT)
    for normed in (False, True):
        got = gnp_gradient(
            net.grad_fn, params, alpha=alpha, radius=radius, normalize_reference=normed
        )
        want = GOLDEN[f"mixed_{'normed_' if normed else ''}{i}"]
        np.testing.assert_allclose(net.flat(got), want, **TIGHT)
    loss_fn = lambda at: net.loss_fn(at, net.batch())
    exact = gnp_gradient_exact(loss_fn, params, penalty=alpha * radius)
    np.testing.assert_allclose(net.flat(exact), GOLDEN[f"exact_{i}"], **TIGHT)


def test_goldens_of_the_adaptive_form(x64):
    params = net.params()
    point = perturb(params, net.grad_fn(params), radius=0.05, adaptive=True)
    step = net.flat(point) - net.flat(params)
    np.testing.assert_allclose(step, GOLDEN["asam_pert"], **TIGHT)
    got = gnp_gradient(net.grad_fn, params, alpha=0.8, radius=0.05, adaptive=True)
    np.testing.assert_allclose(net.flat(got), GOLDEN["asam_mixed"], **TIGHT)


def test_finite_difference_converges_as_the_golden_curve(x64):
    penalty, params = float(GOLDEN["conv_lambda"]), net.params()
    loss_fn = lambda at: net.loss_fn(at, net.batch())
    exact = net.flat(gnp_gradient_exact(loss_fn, params, penalty=penalty))
    errors = []
    for radius in GOLDEN["conv_r"]:
        got = gnp_gradient(net.grad_fn, params, alpha=penalty / radius, radius=radius)
        errors.append(np.linalg.norm(net.flat(got) - exact))
    ratio = np.array(errors) / GOLDEN["conv_err"]
    np.testing.assert_allclose(ratio / ratio[0], 1, rtol=2e-2)
    few = slice(1, 4)
    slope = np.polyfit(np.log(GOLDEN["conv_r"][few]), np.log(errors[few]), 1)[0]
    assert abs(slope - 1) < 0.05


def _walk(optimizer, *, l2=0.0, grad_fn=None):
    params = net.params()
    state = optimizer.init(params)
    seen = []
    for _ in range(3):
        decayed = lambda at: jax.tree.map(lambda g, p: g + l2 * p, net.grad_fn(at), at)
        here = grad_fn or decayed
        grads = here(params)
        updates, state = optimizer.update(
            grads, state, params, grad_fn=here, grad=grads
        )
        params = optax.apply_updates(params, updates)
        seen.append(net.flat(params))
    return np.stack(seen)


@pytest.mark.parametrize(
    ("golden", "link", "rest", "l2"),
    [
        ("steps_gnp", gradient_norm_penalty(0.8, 0.05), {}, 0.0),
        ("steps_sam", sam(0.05), {}, 0.0),
        (
            "steps_gnp_normed",
            gradient_norm_penalty(0.8, 0.05, normalize_reference=True),
            {},
            0.0,
        ),
        (
            "steps_gnp_l2_nesterov",
            gradient_norm_penalty(0.8, 0.05),
            {"momentum": 0.9, "nesterov": True},
            float(GOLDEN["l2"]),
        ),
    ],
)
def test_goldens_of_steps(x64, golden, link, rest, l2):
    optimizer = optax.chain(link, optax.sgd(float(GOLDEN["lr"]), **rest))
    np.testing.assert_allclose(_walk(optimizer, l2=l2), GOLDEN[golden], **TIGHT)


def test_goldens_of_exact_steps(x64):
    loss_fn = lambda at: net.loss_fn(at, net.batch())
    params, seen = net.params(), []
    for _ in range(3):
        grads = gnp_gradient_exact(loss_fn, params, penalty=0.04)
        params = jax.tree.map(lambda p, g: p - float(GOLDEN["lr"]) * g, params, grads)
        seen.append(net.flat(params))
    np.testing.assert_allclose(np.stack(seen), GOLDEN["steps_exact"], **TIGHT)


# Peers and chains.


@pytest.mark.parametrize("base", [optax.sgd(0.3, momentum=0.9), optax.adamw(1e-2)])
def test_equals_the_opaque_mode_of_optax(x64, base):
    peer = optax.contrib.sam(
        base,
        optax.chain(optax.contrib.normalize(), optax.sgd(0.05)),
        sync_period=2,
        opaque_mode=True,
        reset_state=True,
    )
    params = net.params()
    state, seen = peer.init(params), []
    for _ in range(3):
        grads = net.grad_fn(params)
        updates, state = peer.update(
            grads, state, params, grad_fn=lambda at, i: net.grad_fn(at)
        )
        params = optax.apply_updates(params, updates)
        seen.append(net.flat(params))
    ours = _walk(optax.chain(sam(0.05), base))
    np.testing.assert_allclose(ours, np.stack(seen), **TIGHT)


@pytest.mark.parametrize(
    "rest",
    [
        optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(0.1)),
        optax.adamw(1e-2),
        optax.contrib.muon(1e-2),
        optax.contrib.schedule_free_sgd(0.1),
        optax.lion(1e-3),
    ],
    ids=["clip", "adamw", "muon", "schedule_free", "lion"],
)
def test_any_optimizer_follows(rest):
    # The links behind see the mixed gradient and nothing else.
    chain = optax.chain(gradient_norm_penalty(0.8, 0.2), rest)
    mixed = lambda at: gnp_gradient(
        lambda p: jax.grad(net.loss_fn)(p, f32), at, alpha=0.8, radius=0.2
    )
    f32 = jax.tree.map(lambda a: a.astype(jnp.float32), net.batch())
    params = jax.tree.map(lambda a: a.astype(jnp.float32), net.params())
    there, state, plain = params, chain.init(params), rest.init(params)

    @jax.jit
    def step(at, state):
        grad_fn = lambda p: jax.grad(net.loss_fn)(p, f32)
        grads = grad_fn(at)
        updates, state = chain.update(grads, state, at, grad_fn=grad_fn, grad=grads)
        return optax.apply_updates(at, updates), state

    @jax.jit
    def by_hand(at, state):
        updates, state = rest.update(mixed(at), state, at)
        return optax.apply_updates(at, updates), state

    for _ in range(3):
        there, state = step(there, state)
        params, plain = by_hand(params, plain)
    chex.assert_trees_all_close(there, params, rtol=1e-5, atol=1e-6)
    assert step._cache_size() == 1


def test_schedules_are_followed_and_refuse_a_changed_gradient(x64):
    alpha = optax.linear_schedule(0.0, 1.0, 2)
    tx = gradient_norm_penalty(alpha, lambda count: 0.1 * (count + 1))
    params = net.params()
    state = tx.init(params)
    grads = net.grad_fn(params)
    for step in range(3):
        got, state = tx.update(grads, state, params, grad_fn=net.grad_fn, grad=grads)
        want = gnp_gradient(
            net.grad_fn, params, alpha=step / 2, radius=0.1 * (step + 1)
        )
        chex.assert_trees_all_close(got, want, **TIGHT)
    chain = optax.chain(optax.clip_by_global_norm(0.1), tx)
    with pytest.raises(ValueError, match="first link"):
        chain.update(grads, chain.init(params), params, grad_fn=net.grad_fn, grad=grads)


def test_masked_links_need_functions_that_fill_holes(x64):
    params = net.params()
    mask = {name: name.startswith("W") for name in params}
    tx = optax.masked(sam(0.1), mask)
    grads = net.grad_fn(params)
    with pytest.raises(ValueError, match="fills them"):
        tx.update(grads, tx.init(params), params, grad_fn=net.grad_fn, grad=grads)
    inside = gnp_gradient(net.grad_fn, params, alpha=1.0, radius=0.1, mask=mask)

    def filling(at):
        return trees.punch_holes(net.grad_fn(trees.fill_holes(at, params)), at)

    got, _ = tx.update(grads, tx.init(params), params, grad_fn=filling, grad=grads)
    for name, chosen in mask.items():
        want = inside[name] if chosen else grads[name]
        np.testing.assert_allclose(got[name], want, **TIGHT)


# Values, auxiliaries, stochastic models.


def test_value_and_aux_are_those_of_the_first_pass(x64):
    def loss_fn(at, scale, *, key):
        kept = jax.random.bernoulli(key, 0.7, (16, 1))
        inputs, targets = net.batch()
        loss = net.loss_fn(at, (inputs * kept * scale, targets))
        return loss, {"mean": jnp.mean(at["W1"]), "kept": kept}

    key, params = jax.random.key(3), net.params()
    f = jax.jit(gnp_value_and_grad(loss_fn, alpha=0.8, radius=0.2, has_aux=True))
    (value, aux), grads = f(params, 1.0, key=key)
    want, want_aux = loss_fn(params, 1.0, key=key)
    np.testing.assert_allclose(value, want, rtol=1e-12)
    chex.assert_trees_all_close(aux, want_aux, rtol=1e-12)
    # The second pass drops the same rows.
    same = lambda at: jax.grad(lambda p: loss_fn(p, 1.0, key=key)[0])(at)
    chex.assert_trees_all_close(
        grads, gnp_gradient(same, params, alpha=0.8, radius=0.2), **TIGHT
    )


def test_several_arguments_are_perturbed_under_one_norm(x64):
    loss_fn = lambda x, a, b: jnp.sum(jnp.sin(a * x)) + jnp.sum(jnp.cos(b)) * x
    a, b = jnp.arange(1.0, 4.0), jnp.arange(2.0)
    f = gnp_value_and_grad(loss_fn, alpha=0.8, radius=0.2, argnums=(1, 2))
    value, grads = f(0.7, a, b)
    joined = jax.grad(lambda t: loss_fn(0.7, *t))
    want = gnp_gradient(joined, (a, b), alpha=0.8, radius=0.2)
    chex.assert_trees_all_close(grads, want, **TIGHT)
    np.testing.assert_allclose(value, loss_fn(0.7, a, b))


def test_masks_are_trees_like_the_arguments(x64):
    params = net.params()
    mask = {name: name.startswith("W") for name in params}
    want = gnp_gradient(net.grad_fn, params, alpha=0.8, radius=0.2, mask=mask)
    both = {"alpha": 0.8, "radius": 0.2}
    for given in (mask, lambda tree: {name: name.startswith("W") for name in tree}):
        f = gnp_value_and_grad(net.loss_fn, mask=given, **both)
        grads = f(params, net.batch())[1]
        chex.assert_trees_all_close(grads, want, **TIGHT)
    one_of_two = gnp_value_and_grad(net.loss_fn, mask=(mask,), argnums=(0,), **both)
    (grads,) = one_of_two(params, net.batch())[1]
    chex.assert_trees_all_close(grads, want, **TIGHT)


# Numbers at the edge.


@pytest.mark.parametrize("adaptive", [False, True])
def test_finite_at_a_zero_gradient_with_its_derivative(adaptive):
    w = jnp.zeros(3)
    grad_fn = jax.grad(lambda v: jnp.sum(v**2))
    penalised = lambda v: gnp_gradient(
        grad_fn, v, alpha=0.8, radius=0.1, adaptive=adaptive
    )
    np.testing.assert_array_equal(penalised(w), jnp.zeros(3))
    assert np.isfinite(jax.jacobian(penalised)(w)).all()
    exact = lambda v: gnp_gradient_exact(lambda p: jnp.sum(p**2), v, penalty=0.1)
    np.testing.assert_array_equal(exact(w), jnp.zeros(3))
    assert np.isfinite(jax.jacobian(exact)(w)).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_zero_gradients_stay_zero_where_eps_is_cast(dtype):
    # inject_hyperparams casts numbers to the dtype of params: 1e-12 is 0 in float16.
    w = jnp.zeros(3, dtype)
    grad_fn = jax.grad(lambda v: jnp.sum(v**2))
    tx = optax.inject_hyperparams(gradient_norm_penalty)(0.8, 0.1)
    grads = grad_fn(w)
    got, _ = tx.update(grads, tx.init(w), w, grad_fn=grad_fn, grad=grads)
    np.testing.assert_array_equal(got, grads)


def test_bfloat16_steps_do_not_round_away():
    size = 100_000
    key = jax.random.key(0)
    w = jax.random.normal(key, (size,), jnp.bfloat16)
    g = jax.random.normal(jax.random.fold_in(key, 1), (size,), jnp.bfloat16)
    wide = g.astype(jnp.float32)
    along = lambda point: (point.astype(jnp.float32) - w.astype(jnp.float32)) @ wide
    full = 0.1 * float(jnp.linalg.norm(wide))
    point = perturb(w, g, radius=0.1)
    assert point.dtype == jnp.float32
    np.testing.assert_allclose(along(point), full, rtol=1e-3)
    rounded = perturb(w, g, radius=0.1, dtype=jnp.bfloat16)
    assert rounded.dtype == jnp.bfloat16
    assert float(jnp.mean(rounded == w)) > 0.3  # what the default avoids
    seen = []
    grad_fn = lambda at: (seen.append(at.dtype), at.astype(jnp.bfloat16))[1]
    got = gnp_gradient(grad_fn, w, alpha=0.8, radius=0.1)
    assert got.dtype == jnp.bfloat16
    assert seen == [jnp.bfloat16, jnp.float32]


def test_masks_of_leaves_and_of_entries(x64):
    params = net.params()
    g = net.grad_fn(params)
    few = {name: jnp.arange(p.size).reshape(p.shape) % 2 == 0 for name, p in g.items()}
    point = perturb(params, g, radius=0.3, mask=few)
    step = jax.tree.map(jnp.subtract, point, params)
    assert all(
        not np.any(np.asarray(s)[~np.asarray(m)])
        for s, m in zip(jax.tree.leaves(step), jax.tree.leaves(few))
    )
    np.testing.assert_allclose(optax.tree.norm(step), 0.3, rtol=1e-12)
    by_function = perturb(params, g, radius=0.3, mask=lambda tree: few)
    chex.assert_trees_all_equal(by_function, point)
    none = jax.tree.map(lambda _: False, params)
    chex.assert_trees_all_equal(perturb(params, g, radius=0.3, mask=none), params)


def test_asam_does_not_see_a_rescaling(x64):
    # w -> c w with the loss unchanged: g -> g / c, and so must the mixed gradient.
    loss_fn = lambda w: jnp.sum(jnp.sin(w))
    w, c = jnp.array([0.3, -1.2, 2.0]), jnp.array([2.0, 0.5, 8.0])
    one = gnp_gradient(jax.grad(loss_fn), w, alpha=1.0, radius=0.4, adaptive=True)
    scaled = jax.grad(lambda v: loss_fn(v / c))
    two = gnp_gradient(scaled, w * c, alpha=1.0, radius=0.4, adaptive=True)
    np.testing.assert_allclose(two * c, one, rtol=1e-12)
    tx = asam(0.4)
    grads = jax.grad(loss_fn)(w)
    link, _ = tx.update(grads, tx.init(w), w, grad_fn=jax.grad(loss_fn), grad=grads)
    np.testing.assert_allclose(link, one, rtol=1e-12)


# Cost.


def test_compiled_operations_against_plain_training():
    keys = jax.random.split(jax.random.key(0), 5)
    sizes = (64, 128, 128, 10)
    params = [
        jax.random.normal(key, (a, b)) / 8
        for key, a, b in zip(keys, sizes[:-1], sizes[1:])
    ]
    x = jax.random.normal(keys[3], (256, 64))
    y = jax.nn.one_hot(jax.random.randint(keys[4], (256,), 0, 10), 10)

    def loss_fn(at, x, y):
        for w in at[:-1]:
            x = jnp.tanh(x @ w)
        return jnp.mean(optax.softmax_cross_entropy(x @ at[-1], y))

    def flops(f):
        return jax.jit(f).lower(params, x, y).compile().cost_analysis()["flops"]

    plain = flops(jax.value_and_grad(loss_fn))
    for alpha in (0.8, 1.0):
        made = gnp_value_and_grad(loss_fn, alpha=alpha, radius=0.1)
        assert flops(made) <= 2.02 * plain
    exact = lambda at, x, y: gnp_gradient_exact(
        lambda p: loss_fn(p, x, y), at, penalty=0.1
    )
    assert flops(exact) <= 2.95 * plain


def test_it_walks_to_the_flattest_point_of_a_valley():
    # All points with a b = 1 are minima; the top eigenvalue there is a^2 + b^2 >= 2.
    loss_fn = lambda w: 0.5 * (w[0] * w[1] - 1) ** 2

    def descend(link):
        def body(carry, _):
            w, state = carry
            grad_fn = jax.grad(loss_fn)
            grads = grad_fn(w)
            updates, state = link.update(grads, state, w, grad_fn=grad_fn, grad=grads)
            return (w - 0.02 * updates, state), None

        start = jnp.array([4.0, 0.1])
        (w, _), _ = jax.lax.scan(body, (start, link.init(start)), None, length=4000)
        assert loss_fn(w) < 0.05
        return float(w @ w)

    assert descend(gradient_norm_penalty(0.0, 0.3)) > 14
    assert descend(gradient_norm_penalty(0.8, 0.3)) < 4
    assert descend(sam(0.3)) < 4
