"""SAF and MESA against plain training, a NumPy oracle, buffers and operation counts."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlab.sharpness.saf import (
    in_window,
    init_teacher,
    init_trajectory_buffer,
    mesa_loss,
    read_trajectory,
    saf_loss,
    trajectory_loss,
    update_teacher,
    write_trajectory,
)


def pair(rows=(6,), classes=5, seed=0, scale=3.0):
    rng = np.random.default_rng(seed)
    z, y = rng.normal(scale=scale, size=(2, *rows, classes))
    return jnp.asarray(z), jnp.asarray(y)


def oracle(z, y, temperature, shares):
    z, y = (np.asarray(a, np.float64) / temperature for a in (z, y))
    total = 0.0
    for row in np.ndindex(shares.shape):
        p, q = (np.exp(a[row]) / np.exp(a[row]).sum() for a in (z, y))
        total += shares[row] * np.sum(q * np.log(q / p))
    return temperature**2 * total


def cross_entropy(logits, labels):
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses.mean()


def init_mlp(sizes, seed=0):
    rng = np.random.default_rng(seed)
    shapes = itertools.pairwise(sizes)
    make = lambda m, n: jnp.asarray(rng.normal(size=(m, n)) * (2 / m) ** 0.5, "float32")
    return [{"w": make(m, n), "b": jnp.zeros(n)} for m, n in shapes]


def mlp(params, x):
    for layer in params[:-1]:
        x = jax.nn.relu(x @ layer["w"] + layer["b"][None])
    return x @ params[-1]["w"] + params[-1]["b"][None]


# Identities


OFF = [
    {"active": False},
    {"weight": 0.0},
    {"weight": jnp.float32(0)},
    {"known": jnp.zeros(6, bool)},
    {"weights": jnp.zeros(6)},
]


@pytest.mark.parametrize("past", ["finite", "nan", "inf"])
@pytest.mark.parametrize("off", OFF, ids=str)
def test_switched_off_it_is_the_plain_loss_bit_for_bit(off, past):
    y = pair()[1]
    params = init_mlp((4, 8, 5))
    x = jnp.asarray(np.random.default_rng(1).normal(size=(6, 4)), jnp.float32)
    labels = jnp.arange(6) % 5
    y = {"finite": y, "nan": y * jnp.nan, "inf": y * jnp.inf}[past]

    def total(params, y, on):
        logits = mlp(params, x)
        plain = cross_entropy(logits, labels)
        if not on:
            return plain
        if "known" in off:
            return saf_loss(plain, logits, y, **off)
        return saf_loss(mesa_loss(plain, logits, y, **off), logits, y, **off)

    step = jax.jit(jax.value_and_grad(total), static_argnums=2)
    chex.assert_trees_all_equal(step(params, y, True), step(params, y, False))


def test_logits_that_hold_nan_are_left_alone_where_unknown():
    z, y = pair()
    known = jnp.arange(6) > 1
    broken = jnp.where(known[:, None], z, jnp.nan)
    f = lambda z, y: saf_loss(1.0, z, y, known=known)
    value, grad = jax.value_and_grad(f)(broken, jnp.where(known[:, None], y, jnp.nan))
    expected, expected_grad = jax.value_and_grad(f)(z, y)
    assert value == expected
    chex.assert_trees_all_equal(grad, expected_grad)
    assert not grad[:2].any()
    assert grad[2:].any()
    zero = saf_loss(jnp.float32(-0.0), z, y, active=False)
    assert np.signbit(np.asarray(zero))


@pytest.mark.parametrize("temperature", [0.3, 5.0, 50.0])
def test_equal_logits_cost_exactly_nothing(temperature):
    z, _ = pair(scale=20.0)
    f = jax.jit(
        jax.value_and_grad(lambda z, y: trajectory_loss(z, y, temperature=temperature))
    )
    value, grad = f(z, z)
    assert value == 0
    assert not np.any(grad)


def test_a_shift_of_each_row_costs_nothing(x64):
    z, y = pair()
    shift = jnp.arange(6.0)[:, None] * 7 - 3
    value, grad = jax.value_and_grad(trajectory_loss)(y + shift, y)
    np.testing.assert_allclose(value, 0, atol=1e-14)
    np.testing.assert_allclose(grad, 0, atol=1e-14)
    moved = trajectory_loss(z + shift, y - 2 * shift)
    np.testing.assert_allclose(moved, trajectory_loss(z, y), rtol=1e-12)


def test_a_teacher_without_memory_gives_an_identical_zero():
    params = init_mlp((4, 8, 5))
    x = jnp.asarray(np.random.default_rng(1).normal(size=(6, 4)), jnp.float32)
    labels = jnp.arange(6) % 5
    start = init_teacher(init_mlp((4, 8, 5), seed=1))

    @jax.jit
    def steps(params):
        teacher = update_teacher(start, params, decay=0.0)

        def plain(params):
            return cross_entropy(mlp(params, x), labels)

        def total(params):
            return mesa_loss(plain(params), mlp(params, x), mlp(teacher, x))

        return (
            teacher,
            jax.value_and_grad(plain)(params),
            jax.value_and_grad(total)(params),
        )

    teacher, plain, total = steps(params)
    chex.assert_trees_all_equal(teacher, params)
    chex.assert_trees_all_equal(total, plain)


# Oracles


@pytest.mark.parametrize("temperature", [0.7, 5.0])
@pytest.mark.parametrize("rows", [(), (6,), (3, 2)])
def test_it_is_the_divergence_from_the_past(x64, rows, temperature):
    z, y = pair(rows)
    shares = np.full(rows, 1 / np.prod(rows))
    found = trajectory_loss(z, y, temperature=temperature)
    np.testing.assert_allclose(found, oracle(z, y, temperature, shares), rtol=1e-12)
    other = trajectory_loss(y, z, temperature=temperature)
    assert abs(other / found - 1) > 1e-3  # the order matters
    for weight in (0.3, jnp.float64(0.3)):
        total = saf_loss(2.0, z, y, weight=weight, temperature=temperature)
        np.testing.assert_allclose(total, 2 + 0.3 * found, rtol=1e-14)
        assert mesa_loss(2.0, z, y, weight=weight, temperature=temperature) == total


def test_weights_and_known_rows(x64):
    z, y = pair((4, 2))
    w, known = np.array([1.0, 0, 3, 2]), np.array([True, True, False, True])
    shares = np.repeat(w[:, None] / (2 * w.sum()), 2, 1)
    nan = jnp.where((w == 0)[:, None, None], jnp.nan, z)
    found = trajectory_loss(nan, y, weights=jnp.asarray(w))
    np.testing.assert_allclose(found, oracle(z, y, 5.0, shares), rtol=1e-12)
    assert np.isfinite(jax.grad(trajectory_loss)(nan, y, weights=jnp.asarray(w))).all()
    # The rows that are not known still count in the mean.
    masked = oracle(z, y, 5.0, np.repeat(known[:, None] / 8, 2, 1))
    found = saf_loss(1.0, z, y, weight=1.0, known=jnp.asarray(known))
    np.testing.assert_allclose(found, 1 + masked, rtol=1e-12)
    both = oracle(z, y, 5.0, shares * known[:, None])
    options = {"known": jnp.asarray(known), "weights": jnp.asarray(w)}
    found = saf_loss(1.0, z, y, weight=1.0, **options)
    np.testing.assert_allclose(found, 1 + both, rtol=1e-12)
    each = saf_loss(1.0, z, y, weight=1.0, known=jnp.asarray(shares < 1))
    np.testing.assert_allclose(each, 1 + trajectory_loss(z, y), rtol=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 5.0])
def test_gradient_is_the_difference_of_the_softmaxes(x64, temperature):
    z, y = pair()
    f = lambda z: saf_loss(0.0, z, y, weight=0.8, temperature=temperature)
    f, grad = jax.jit(f), jax.jit(jax.grad(f))(z)
    p, q = (jax.nn.softmax(a / temperature) for a in (z, y))
    expected = 0.8 * temperature / 6 * (p - q)
    np.testing.assert_allclose(grad, expected, atol=1e-14)
    h, finite = 1e-5, np.zeros(z.shape)
    for at in np.ndindex(z.shape):
        finite[at] = (f(z.at[at].add(h)) - f(z.at[at].add(-h))) / (2 * h)
    np.testing.assert_allclose(finite, expected, atol=1e-7 * np.abs(expected).max())
    g = lambda y: saf_loss(0.0, z, y) + mesa_loss(0.0, z, y)
    assert not jax.grad(g)(y).any()  # the past is a constant


def test_large_temperatures_give_half_a_variance(x64):
    z, y = pair(scale=1.0)
    limit = jnp.var(z - y, axis=-1).mean() / 2
    error = [abs(trajectory_loss(z, y, temperature=t) / limit - 1) for t in (1e2, 1e4)]
    assert error[0] < 2e-2
    assert error[1] < 2e-4


def test_large_logits_stay_finite():
    z, y = jnp.array([[0.0, 1e4]]), jnp.array([[1e4, 0.0]])
    value, grad = jax.value_and_grad(trajectory_loss)(z, y)
    np.testing.assert_allclose(value, 5e4, rtol=1e-6)
    np.testing.assert_allclose(grad, [[-5.0, 5.0]], rtol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_it_works_in_float32_at_least(dtype):
    with jax.enable_x64(dtype == "float64"):
        z, y = (a.astype(dtype) for a in pair())
        value, grad = jax.value_and_grad(lambda z: saf_loss(z.mean(), z, y))(z)
        wide = jnp.promote_types(dtype, jnp.float32)
        assert (value.dtype, grad.dtype) == (wide, jnp.dtype(dtype))
        tolerance = 1e-5 if dtype != "float64" else 1e-12
        expected = oracle(z, y, 5.0, np.full(6, 1 / 6))
        np.testing.assert_allclose(trajectory_loss(z, y), expected, rtol=tolerance)


# The buffer


def epoch_logits(epoch, size=7, classes=3):
    return jnp.asarray(
        np.random.default_rng(epoch).normal(size=(size, classes)), "float32"
    )


@pytest.mark.parametrize("lag", [1, 2, 3])
@pytest.mark.parametrize("write_first", [True, False])
def test_buffer_gives_back_the_epoch_that_lies_lag_behind(lag, write_first):
    buffer = init_trajectory_buffer(num_examples=7, num_classes=3, lag=lag)
    chex.clear_trace_counter()
    write = jax.jit(chex.assert_max_traces(write_trajectory, n=1))
    read = jax.jit(chex.assert_max_traces(read_trajectory, n=1))
    for epoch in range(3 * lag + 4):
        order = np.random.default_rng(100 + epoch).permutation(6)
        for batch in jnp.asarray(order).reshape(2, 3):
            if write_first:
                new = epoch_logits(epoch)[batch]
                buffer = write(buffer, batch, new, epoch=jnp.int32(epoch))
            past, known = read(buffer, batch, epoch=jnp.int32(epoch))
            if not write_first:
                new = epoch_logits(epoch)[batch]
                buffer = write(buffer, batch, new, epoch=jnp.int32(epoch))
            assert (known == (epoch >= lag)).all()
            expected = epoch_logits(epoch - lag)[batch] if epoch >= lag else 0 * past
            chex.assert_trees_all_equal(past, expected)


def test_buffer_does_not_pass_older_logits_for_those_asked():
    buffer = init_trajectory_buffer(num_examples=7, num_classes=3, lag=2)
    everyone, some = jnp.arange(7), jnp.array([0, 3, 6])
    for epoch in range(4):
        buffer = write_trajectory(buffer, everyone, epoch_logits(epoch), epoch=epoch)
    # Three examples miss epoch 4; their slot still holds epoch 1.
    rest = jnp.array([1, 2, 4, 5])
    buffer = write_trajectory(buffer, rest, epoch_logits(4)[rest], epoch=4)
    past, known = read_trajectory(buffer, everyone, epoch=6)
    np.testing.assert_array_equal(known, [0, 1, 1, 0, 1, 1, 0])
    np.testing.assert_array_equal(past[rest], epoch_logits(4)[rest])
    assert not past[some].any()
    assert read_trajectory(buffer, everyone, epoch=5)[1].all()


def test_buffer_skips_padding_and_takes_no_gradient():
    empty = init_trajectory_buffer(
        num_examples=7, num_classes=3, lag=1, dtype=jnp.bfloat16
    )
    padded = jnp.array([2, -1, 7, 10**6, -7])

    def f(logits):
        buffer = write_trajectory(empty, padded, logits, epoch=0)
        past, known = read_trajectory(buffer, padded, epoch=1)
        return past.sum(), (buffer, past, known)

    grad, (buffer, past, known) = jax.grad(f, has_aux=True)(jnp.ones((5, 3)))
    assert not grad.any()
    assert past.dtype == buffer.logits.dtype == jnp.bfloat16
    np.testing.assert_array_equal(known, [True, False, False, False, False])
    assert (buffer.written[:, 0] == jnp.array([-1, -1, 0, -1, -1, -1, -1])).all()
    assert float(buffer.logits.sum()) == 3
    chex.assert_trees_all_equal_shapes_and_dtypes(buffer, empty)
    tiny = write_trajectory(empty, jnp.array([3], jnp.int8), jnp.ones((1, 3)), epoch=0)
    assert float(tiny.logits[3].sum()) == 3


# The teacher and the window


def test_teacher_is_the_exponential_mean(x64):
    rng = np.random.default_rng(0)
    values = rng.normal(size=(20, 3))
    teacher = init_teacher({"w": jnp.asarray(values[0])})
    for value in values[1:]:
        teacher = update_teacher(teacher, {"w": jnp.asarray(value)}, decay=0.9)
    powers = 0.9 ** np.arange(19, -1, -1) * np.where(np.arange(20) > 0, 0.1, 1)
    np.testing.assert_allclose(teacher["w"], powers @ values, rtol=1e-12)


def test_teacher_of_bfloat16_parameters_does_not_stand_still():
    params = {"w": jnp.ones(3, jnp.bfloat16)}
    far = {"w": jnp.full(3, 2.0, jnp.bfloat16)}
    teacher = jax.lax.fori_loop(
        0, 2000, lambda _, t: update_teacher(t, far), init_teacher(params)
    )
    assert teacher["w"].dtype == jnp.float32
    np.testing.assert_allclose(teacher["w"], 2 - 0.9995**2000, rtol=1e-4)


def test_teacher_keeps_counters_keys_and_holes():
    params = {"n": jnp.int32(3), "key": jax.random.key(0), "w": jnp.ones(2), "_": None}
    teacher = init_teacher(params)
    assert teacher["w"] is not params["w"]  # the parameters may be donated
    new = params | {"n": jnp.int32(4), "w": jnp.full(2, 3.0)}
    found = jax.jit(update_teacher)(teacher, new, decay=jnp.float32(0.5))
    assert int(found["n"]) == 4
    chex.assert_trees_all_equal_shapes_and_dtypes(found, teacher)
    np.testing.assert_array_equal(found["w"], [2, 2])


def test_window_is_strict_on_both_sides():
    inside = lambda epoch: in_window(epoch, start=2, end=5)
    found = [bool(jax.jit(inside)(jnp.int32(epoch))) for epoch in range(7)]
    assert found == [False, False, False, True, True, False, False]
    assert in_window(10, start=2, end=float("inf"))


# Cost


@pytest.mark.parametrize("sizes", [(64, 64, 64, 10), (64, 256, 256, 10)])
def test_operations_of_a_step(sizes):
    params, batch = init_mlp(sizes), 128
    teacher = init_teacher(params)
    buffer = init_trajectory_buffer(num_examples=1000, num_classes=10, lag=3)
    x, labels = jnp.ones((batch, 64)), jnp.zeros(batch, jnp.int32)
    indices, epoch = jnp.arange(batch), jnp.int32(4)

    def plain(params, x):
        return cross_entropy(mlp(params, x), labels)

    def saf(params, buffer, x, indices, epoch):
        past, known = read_trajectory(buffer, indices, epoch=epoch)
        active = in_window(epoch, start=3, end=9)

        def total(params):
            logits = mlp(params, x)
            loss = cross_entropy(logits, labels)
            return saf_loss(loss, logits, past, known=known, active=active), logits

        grads, logits = jax.grad(total, has_aux=True)(params)
        return grads, write_trajectory(buffer, indices, logits, epoch=epoch)

    def mesa(params, teacher, x):
        logits = mlp(params, x)
        return mesa_loss(cross_entropy(logits, labels), logits, mlp(teacher, x))

    def flops(f, *args):
        return jax.jit(f).lower(*args).compile().cost_analysis()["flops"]

    base = flops(jax.grad(plain), params, x)
    assert flops(saf, params, buffer, x, indices, epoch) <= 1.05 * base
    assert 1.3 * base <= flops(jax.grad(mesa), params, teacher, x) <= 1.4 * base
    # The average takes three more for each parameter, whatever the batch.
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    average = flops(update_teacher, teacher, params)
    assert 2 * size <= average <= 3 * size + 10


# That it learns


CENTRES = np.random.default_rng(5).normal(size=(4, 8)) * 1.2
LABELS = np.random.default_rng(6).integers(4, size=640)
INPUTS = CENTRES[LABELS] + np.random.default_rng(7).normal(size=(640, 8))
NOISY = np.where(np.arange(640) % 5 == 0, (LABELS + 1) % 4, LABELS)[:128]


@pytest.fixture(scope="module")
def runs():
    # One program for all three: a weight of 0 switches a method off.
    weights = {"sgd": (0.0, 0.0), "saf": (2.0, 0.0), "mesa": (0.0, 2.0)}
    run = jax.jit(train)
    return {
        name: jax.tree.map(np.asarray, run(jax.random.key(0), jnp.asarray(pair)))
        for name, pair in weights.items()
    }


def train(key, weights, epochs=40, batch=32, lag=3):
    x, y = jnp.asarray(INPUTS[:128], jnp.float32), jnp.asarray(NOISY)
    params = init_mlp((8, 32, 4))
    buffer = init_trajectory_buffer(num_examples=128, num_classes=4, lag=lag)

    def step(carry, inputs):
        params, buffer, teacher = carry
        indices, epoch = inputs
        past, known = read_trajectory(buffer, indices, epoch=epoch)
        active = in_window(epoch, start=5, end=epochs)

        def total(params):
            logits = mlp(params, x[indices])
            loss = cross_entropy(logits, y[indices])
            averaged = mlp(teacher, x[indices])
            loss = mesa_loss(loss, logits, averaged, weight=weights[1], active=active)
            options = {"weight": weights[0], "active": active, "known": known}
            return saf_loss(loss, logits, past, **options), logits

        grads, logits = jax.grad(total, has_aux=True)(params)
        params = jax.tree.map(lambda p, g: p - 0.2 * g, params, grads)
        buffer = write_trajectory(buffer, indices, logits, epoch=epoch)
        moved = trajectory_loss(logits, past)
        return (params, buffer, update_teacher(teacher, params, decay=0.95)), moved

    keys = jax.random.split(key, epochs)
    orders = jax.vmap(lambda k: jax.random.permutation(k, 128))(keys)
    steps = 128 // batch
    inputs = orders.reshape(-1, batch), jnp.repeat(jnp.arange(epochs), steps)
    start = params, buffer, init_teacher(params)
    (final, _, _), moved = jax.lax.scan(step, start, inputs)
    clean = jnp.asarray(INPUTS[128:], jnp.float32)
    right = jnp.argmax(mlp(final, clean), -1) == jnp.asarray(LABELS[128:])
    return right.mean(), moved.reshape(epochs, steps).mean(axis=1)


@pytest.mark.parametrize("method", ["saf", "mesa"])
def test_it_learns_and_fits_less_of_the_noise(runs, method):
    assert runs[method][0] > 0.75
    assert runs[method][0] > runs["sgd"][0] + 0.03


@pytest.mark.parametrize("method", ["saf", "mesa"])
def test_the_outputs_move_less_than_under_plain_descent(runs, method):
    before = slice(3, 6)  # nothing is active up to epoch 5
    np.testing.assert_array_equal(runs[method][1][before], runs["sgd"][1][before])
    assert runs[method][1][20:].mean() < 0.7 * runs["sgd"][1][20:].mean()
