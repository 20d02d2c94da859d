"""The head search against quadratics and a NumPy oracle; post-training of features."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlab.sharpness.pof import (
    head_line_search,
    join_head,
    pof_perturb,
    pof_value_and_grad,
    split_head,
)

KEY = jax.random.key(0)


def quadratic(seed, size=4, low=0.1, high=3.0):
    rng = np.random.default_rng(seed)
    q = np.linalg.qr(rng.standard_normal((size, size)))[0]
    a = q @ np.diag(rng.uniform(low, high, size)) @ q.T
    return a, rng.standard_normal(size), rng.standard_normal(size)


def loss_fn(features, head, batch):
    inputs, targets = batch
    outputs = jnp.tanh(inputs @ features["w"]) @ head["w"] + head["b"][None]
    return jnp.mean((outputs - targets) ** 2)


def probe_fn(features, batch):
    hidden = jnp.tanh(batch[0] @ features["w"])
    return lambda head: jnp.mean((hidden @ head["w"] + head["b"][None] - batch[1]) ** 2)


def problem(seed=0, rows=6):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    features, head = {"w": draw(3, 5)}, {"w": draw(5, 2), "b": draw(2)}
    return features, head, (draw(rows, 3), draw(rows, 2)), (draw(8, 3), draw(8, 2))


# Identities


@pytest.mark.parametrize("seed", range(2))
def test_quadratic_heads_have_a_known_step(seed):
    with jax.enable_x64(True):
        a, center, phi = quadratic(seed)
        loss = lambda h: 0.5 * jnp.dot(h - center, jnp.dot(a, h - center))
        d = a @ (phi - center)
        exact = d @ d / (d @ a @ d)
        found = head_line_search(loss, jnp.asarray(phi), jnp.asarray(d))
        assert found.step.dtype == jnp.float64
        assert abs(found.step - exact) <= found.bracket / 16
        assert found.loss < found.start_loss
        assert not found.capped
        far = loss(jnp.asarray(phi - 2 * exact * d))
        np.testing.assert_allclose(far, found.start_loss, rtol=1e-12)
        # A finer grid comes closer, and the whole range stays in the valley.
        fine = head_line_search(loss, jnp.asarray(phi), jnp.asarray(d), num_grid=999)
        assert abs(fine.step - exact) <= fine.bracket / 999


@pytest.mark.parametrize("jitted", [False, True])
def test_no_range_is_plain_training_bit_for_bit(jitted):
    features, head, batch, probe = problem()
    f = pof_value_and_grad(loss_fn, sampling_range=0.0)
    plain = jax.value_and_grad(loss_fn)
    if jitted:
        f, plain = jax.jit(f), jax.jit(plain)
    frozen = features
    for step in range(3 if jitted else 1):
        value, grads = f(jax.random.key(step), features, head, batch, probe)
        expected, plain_grads = plain(frozen, head, batch)
        assert value == expected
        chex.assert_trees_all_equal(grads, plain_grads)
        features = optax.tree.add_scale(features, -0.1, grads)
        frozen = optax.tree.add_scale(frozen, -0.1, plain_grads)


def test_value_and_gradient_are_those_at_the_moved_head():
    features, head, batch, probe = problem()
    f = pof_value_and_grad(loss_fn, with_info=True)
    value, grads, info = f(KEY, features, head, batch, probe)
    moved, again = pof_perturb(KEY, lambda h: loss_fn(features, h, probe), head)
    chex.assert_trees_all_equal(info, again)
    assert info.search.step > 0
    slope = jax.grad(loss_fn, argnums=1)(features, head, probe)
    size = info.scale * info.search.step
    chex.assert_trees_all_close(
        moved, jax.tree.map(lambda h, d: h - size * d, head, slope), rtol=1e-6
    )
    expected, plain = jax.value_and_grad(loss_fn)(features, moved, batch)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    chex.assert_trees_all_close(grads, plain, rtol=1e-5)


# Oracle


def numpy_search(loss, head, d, initial, growth, max_step, num_grid):
    start, step = loss(head), initial
    while loss(head - step * d) <= start and step < max_step:
        step = min(step * growth, max_step)
    capped = loss(head - step * d) <= start
    grid = [step * k / num_grid for k in range(1, num_grid + 1)]
    losses = [loss(head - t * d) for t in grid]
    best = int(np.argmin(losses))
    if losses[best] > start:
        return 0.0, start, start, step, capped
    return grid[best], losses[best], start, step, capped


@pytest.mark.parametrize("options", [(1.0, 2.0, 100.0, 16), (0.3, 1.7, 4.0, 7)])
@pytest.mark.parametrize("scale", [0.02, 1.0, 30.0])
def test_search_is_doubling_then_a_grid(options, scale):
    with jax.enable_x64(True):
        a, center, phi = quadratic(7)
        a = a * scale  # flat: the cap is reached; steep: no division is low enough

        def loss(h, xp=np):
            r = h - center
            return 0.5 * xp.dot(r, xp.dot(a, r)) + xp.sin(3 * r).sum()

        d = a @ (phi - center) + 3 * np.cos(3 * (phi - center))
        expected = numpy_search(loss, phi, d, *options)
        names = ("initial_step", "growth", "max_step", "num_grid")
        search = jax.jit(
            lambda h, d: head_line_search(
                lambda h: loss(h, jnp), h, d, **dict(zip(names, options))
            )
        )
        found = search(jnp.asarray(phi), jnp.asarray(d))
        np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_steep_losses_give_no_step():
    loss = lambda h: 1000 * h**2
    found = head_line_search(loss, jnp.float32(1), jnp.float32(2000))
    assert (found.step, found.loss, found.bracket) == (0, found.start_loss, 1)
    finer = head_line_search(
        loss, jnp.float32(1), jnp.float32(2000), initial_step=0.0005
    )
    np.testing.assert_allclose(finer.step, 0.0005, rtol=1e-6)


# Ends and edges


@pytest.mark.parametrize("growth", [2.0, 10.0, 1.01])
def test_unbounded_losses_reach_the_cap(growth):
    found = jax.jit(lambda h: head_line_search(jnp.sum, h, h, growth=growth))(
        jnp.ones(3)
    )
    assert found.capped
    assert (found.step, found.bracket, found.loss) == (100, 100, -297)


def test_the_first_step_may_be_the_last():
    options = {"initial_step": 1.0, "max_step": 1.0}
    found = head_line_search(jnp.sum, jnp.ones(3), jnp.ones(3), **options)
    assert found.capped
    assert found.step == found.bracket == 1
    found = head_line_search(lambda h: -jnp.sum(h), jnp.ones(3), jnp.ones(3), **options)
    assert not found.capped
    assert found.step == 0


@pytest.mark.parametrize("bad", [0.0, jnp.nan, jnp.inf])
def test_useless_directions_are_no_step(bad):
    head = jnp.array([1.0, 2.0])
    found = head_line_search(jnp.sum, head, jnp.full(2, bad))
    assert (found.step, found.loss) == (0, 3)
    assert not found.capped
    for jitted in (False, True):
        perturb = lambda h: pof_perturb(KEY, lambda h: jnp.sum(h * bad), h)
        moved, info = (jax.jit(perturb) if jitted else perturb)(head)
        chex.assert_trees_all_equal(moved, head)
        assert info.search.step == 0


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_steps_of_no_finite_loss_are_not_taken(bad):
    fenced = lambda h: jnp.where(h < -2, bad, h)
    found = head_line_search(fenced, jnp.float32(1), jnp.float32(1))
    assert (found.bracket, found.step) == (4, 3)
    lost = head_line_search(lambda h: h + bad, jnp.float32(1), jnp.float32(1))
    assert lost.step == 0
    assert not lost.capped


@pytest.mark.parametrize("head", [{}, {"a": optax.MaskedNode()}, None])
def test_empty_heads_train_plainly(head):
    features, batch = jnp.ones(3), jnp.arange(3.0)
    loss = lambda features, head, batch: jnp.sum((features - batch) ** 2)
    f = pof_value_and_grad(loss, with_info=True)
    value, grads, info = f(KEY, features, head, batch, batch)
    assert (value, info.search.step) == (2, 0)
    np.testing.assert_array_equal(grads, [2, 0, -2])
    assert not info.search.capped


# Randomness, dtypes and transformations


def test_scales_are_uniform_and_keys_are_kept():
    perturb = jax.jit(
        lambda key: pof_perturb(key, lambda h: jnp.sum(h**2), jnp.ones(2))
    )
    chex.assert_trees_all_equal(perturb(KEY), perturb(KEY))
    keys = jax.random.split(KEY, 2000)
    moved, info = jax.vmap(perturb)(keys)
    scales = np.sort(np.asarray(info.scale))
    even = (np.arange(2000) + 0.5) / 1000
    assert np.abs(scales - even).max() < 2 * 1.63 / 2000**0.5  # Kolmogorov, 1 %
    # To the opposite bank and no further: the loss is at most the start's.
    assert float(jnp.max(jnp.sum(moved**2, axis=1))) <= 2


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_dtypes_are_kept(dtype):
    head = {"w": jnp.ones((2, 2), dtype), "b": jnp.ones(2, jnp.float32)}
    loss = lambda h: jnp.sum(h["w"] ** 2) + jnp.sum(h["b"].astype(dtype) ** 2)
    moved, info = jax.jit(lambda h: pof_perturb(KEY, loss, h))(head)
    chex.assert_trees_all_equal_dtypes(moved, head)
    assert info.scale.dtype == info.search.loss.dtype == jnp.float32
    assert info.search.step == 0.5


def test_jit_is_eager_and_traces_once():
    features, head, batch, probe = problem()
    eager = pof_value_and_grad(loss_fn, with_info=True)
    traced = jax.jit(chex.assert_max_traces(eager, n=1))
    for seed in range(3):
        key = jax.random.key(seed)
        expected = eager(key, features, head, batch, probe)
        found = traced(key, features, head, batch, probe)
        chex.assert_trees_all_close(found, expected, rtol=2e-5)
        head = jax.tree.map(lambda h: 1.1 * h, head)


def test_ranges_may_be_traced():
    f = lambda s: pof_perturb(KEY, jnp.sum, jnp.ones(2), sampling_range=s)
    chex.assert_trees_all_close(jax.jit(f)(0.7), f(0.7))
    chex.assert_trees_all_equal(jax.jit(f)(0.0)[0], jnp.ones(2))


def test_probes_may_share_features():
    args = (KEY, *problem())
    expected = jax.jit(pof_value_and_grad(loss_fn))(*args)
    found = jax.jit(pof_value_and_grad(loss_fn, probe_fn=probe_fn))(*args)
    chex.assert_trees_all_close(found, expected, rtol=1e-5)


def test_auxiliary_outputs_come_back():
    features, head, batch, probe = problem()

    def with_aux(features, head, batch):
        return loss_fn(features, head, batch), {"rows": len(batch[0])}

    f = pof_value_and_grad(with_aux, has_aux=True)
    (value, aux), grads = f(KEY, features, head, batch, probe)
    expected = pof_value_and_grad(loss_fn)(KEY, features, head, batch, probe)
    chex.assert_trees_all_close((value, grads), expected)
    assert aux == {"rows": 6}


def test_values_may_be_differentiated_again():
    features, head, batch, probe = problem()
    f = pof_value_and_grad(loss_fn)
    value = lambda features: f(KEY, features, head, batch, probe)[0]
    chex.assert_trees_all_close(
        jax.grad(value)(features), f(KEY, features, head, batch, probe)[1], rtol=1e-5
    )


# Parts of a tree


def test_split_trees_join_again():
    params = {"body": [jnp.ones(2), jnp.zeros(3)], "head": {"w": jnp.ones(4)}}
    seen = []
    features, head = split_head(
        params, lambda path: seen.append(path) or "head" in path
    )
    assert seen == ["body/0", "body/1", "head/w"]
    assert len(jax.tree.leaves(features)) == 2
    assert len(jax.tree.leaves(head)) == 1
    assert isinstance(head["body"][0], optax.MaskedNode)
    chex.assert_trees_all_equal(join_head(features, head), params)
    # Holes that were there stay.
    holed = {**params, "extra": optax.MaskedNode()}
    chex.assert_trees_all_equal(
        join_head(*split_head(holed, lambda path: "head" in path)), holed
    )


def test_steps_train_the_features_and_keep_the_head():
    # A teacher's head over features that are off: what a trained network has.
    features, head, _, _ = problem()
    rng = np.random.default_rng(1)
    inputs = jnp.asarray(rng.standard_normal((64, 3)), jnp.float32)
    targets = jnp.tanh(inputs @ features["w"]) @ head["w"] + head["b"][None]
    noise = jnp.asarray(rng.standard_normal((3, 5)), jnp.float32)
    params = {"body": {"w": features["w"] + 0.5 * noise}, "head": head}
    batch, probe = (inputs[:32], targets[:32]), (inputs[32:], targets[32:])
    features, head = split_head(params, lambda path: path.startswith("head"))
    kept = jax.tree.map(np.array, head)

    def joined(features, head, batch):
        params = join_head(features, head)
        return loss_fn(params["body"], params["head"], batch)

    f = pof_value_and_grad(joined)
    optimizer = optax.sgd(0.02, momentum=0.9, nesterov=True)

    @jax.jit
    def step(carry, key):
        features, state, head = carry
        value, grads = f(key, features, head, batch, probe)
        updates, state = optimizer.update(grads, state, features)
        return (optax.apply_updates(features, updates), state, head), value

    carry = features, optimizer.init(features), head
    values = []
    for key in jax.random.split(KEY, 60):
        carry, value = step(carry, key)
        values.append(float(value))
    # Under the moved heads, and under the head itself.
    assert np.mean(values[-10:]) < 0.5 * np.mean(values[:10])
    assert joined(carry[0], head, batch) < 0.5 * joined(features, head, batch)
    chex.assert_trees_all_equal(carry[2], kept)
