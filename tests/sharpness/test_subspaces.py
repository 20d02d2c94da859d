"""Points, penalties and batch statistics of network subspaces against NumPy."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxlab.likelihoods import Gaussian
from jaxlab.sharpness.batch_stats import recompute_batch_stats
from jaxlab.sharpness.subspaces import (
    bezier_coefficients,
    bezier_point,
    cosine_squared,
    line_coefficients,
    line_point,
    midpoint,
    sample_layerwise,
    sample_simplex,
    simplex_point,
    subspace_init,
    subspace_loss,
)
from jaxlab.training.adapters import from_nnx

KEY = jax.random.key(0)


class F:
    """Compiled once for each shape, which is what takes the time here."""

    simplex_point = jax.jit(simplex_point)
    line_point = jax.jit(line_point)
    bezier_point = jax.jit(bezier_point)
    midpoint = jax.jit(midpoint)
    sample_layerwise = jax.jit(sample_layerwise)


def net(key):
    a, b, c = jax.random.split(key, 3)
    return {
        "one": {
            "bias": jax.random.normal(a, (4,)),
            "kernel": jax.random.normal(b, (3, 4)),
        },
        "two": {"kernel": jax.random.normal(c, (4, 2))},
    }


def forward(params, x):
    h = jnp.tanh(x @ params["one"]["kernel"] + params["one"]["bias"][None])
    return h @ params["two"]["kernel"]


def mean_square(params, x, y):
    return jnp.mean((forward(params, x) - y) ** 2)


def data(rows=8, seed=1):
    x, y = jax.random.split(jax.random.key(seed))
    return jax.random.normal(x, (rows, 3)), jax.random.normal(y, (rows, 2))


def endpoint(endpoints, i):
    return jax.tree.map(lambda w: w[i], endpoints)


def check_equal(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def check_close(found, expected, **options):
    close = lambda f, e: np.testing.assert_allclose(f, e, **options)
    jax.tree.map(close, found, expected)


# Identities


def test_ends_and_vertices_are_exact():
    w = subspace_init(KEY, net, num_endpoints=3)
    start, end, bend = (endpoint(w, i) for i in range(3))
    for position, expected in ((0, start), (1, end)):
        check_equal(F.line_point(start, end, position), expected)
        check_equal(F.bezier_point(start, end, bend, position), expected)
    for i in range(3):
        check_equal(F.simplex_point(w, jnp.eye(3)[i]), endpoint(w, i))


def test_middles():
    w = subspace_init(KEY, net, num_endpoints=3)
    start, end, bend = (endpoint(w, i) for i in range(3))
    middle = jax.tree.map(lambda a, b, c: a / 4 + c / 2 + b / 4, start, end, bend)
    check_close(F.bezier_point(start, end, bend, 0.5), middle, rtol=1e-6, atol=1e-7)
    check_close(
        F.simplex_point(w, bezier_coefficients(0.5)), middle, rtol=1e-6, atol=1e-7
    )
    mean = jax.tree.map(lambda a, b, c: (a + b + c) / 3, start, end, bend)
    check_close(F.midpoint(w), mean, rtol=1e-6, atol=1e-7)
    two = jax.tree.map(lambda x: x[:2], w)
    check_close(F.midpoint(two), F.line_point(start, end, 0.5), rtol=1e-6, atol=1e-7)


def test_lines_and_curves_are_simplexes(x64):
    w = subspace_init(KEY, net, num_endpoints=3)
    start, end, bend = (endpoint(w, i) for i in range(3))
    two = jax.tree.map(lambda x: x[:2], w)
    for t in (0.1, 0.7):
        check_close(
            F.simplex_point(two, line_coefficients(t)),
            F.line_point(start, end, t),
            rtol=1e-14,
        )
        curve = F.bezier_point(start, end, bend, t)
        check_close(F.simplex_point(w, bezier_coefficients(t)), curve, rtol=1e-12)
        formula = lambda a, b, c, t=t: (1 - t) ** 2 * a + 2 * t * (1 - t) * c + t**2 * b
        expected = jax.tree.map(formula, start, end, bend)
        check_close(curve, expected, rtol=1e-12, atol=1e-14)


def test_a_point_of_equal_endpoints_is_that_endpoint():
    w = net(KEY)
    a = sample_simplex(jax.random.key(3), 4)
    found = F.simplex_point(jax.tree.map(lambda x: jnp.stack([x] * 4), w), a)
    check_close(found, w, rtol=1e-6)
    check_close(F.line_point(w, w, 0.3), w, rtol=1e-6)
    check_close(F.bezier_point(w, w, w, 0.3), w, rtol=1e-6)


@pytest.mark.parametrize("kind", ["line", "curve", "simplex"])
def test_gradients_are_weights_times_the_gradient_at_the_point(x64, kind):
    size = 2 if kind == "line" else 3
    w = subspace_init(KEY, net, num_endpoints=size)
    t = 0.3
    a, weights = {
        "line": (line_coefficients(t), [1 - t, t]),
        "curve": (bezier_coefficients(t), [(1 - t) ** 2, t**2, 2 * t * (1 - t)]),
        "simplex": (jnp.array([0.2, 0.5, 0.3]), [0.2, 0.5, 0.3]),
    }[kind]
    loss = lambda p: mean_square(p, *data())
    found = jax.jit(jax.grad(lambda w: subspace_loss(loss, w, a, beta=0)))(w)
    slope = jax.jit(jax.grad(loss))(F.simplex_point(w, a))
    for i, weight in enumerate(weights):
        expected = jax.tree.map(lambda g, weight=weight: weight * g, slope)
        check_close(endpoint(found, i), expected, rtol=1e-12, atol=1e-15)
    if kind == "line":
        ends = endpoint(w, 0), endpoint(w, 1)
        pull = jax.jit(
            jax.grad(lambda s, e: loss(line_point(s, e, t)), argnums=(0, 1))
        )(*ends)
        check_close(pull[1], jax.tree.map(lambda g: t * g, slope), rtol=1e-12)


def test_at_equal_endpoints_the_gradients_add_up(x64):
    one = net(KEY)
    w = jax.tree.map(lambda x: jnp.stack([x] * 3), one)
    loss = lambda p: mean_square(p, *data())
    a = sample_simplex(jax.random.key(1), 3)
    found = jax.jit(jax.grad(lambda w: subspace_loss(loss, w, a, beta=0)))(w)
    total = jax.tree.map(lambda g: g.sum(axis=0), found)
    check_close(total, jax.jit(jax.grad(loss))(one), rtol=1e-12, atol=1e-15)


# Draws


@pytest.mark.parametrize("size", [2, 3, 5])
def test_moments_of_the_simplex(size):
    draw = jax.jit(jax.vmap(lambda k: sample_simplex(k, size)))
    draws = np.asarray(draw(jax.random.split(KEY, 100_000)), np.float64)
    np.testing.assert_allclose(draws.sum(axis=1), 1, atol=1e-6)
    assert draws.min() > 0
    variance = (size - 1) / (size**2 * (size + 1))
    np.testing.assert_allclose(
        draws.mean(axis=0), 1 / size, atol=5 * (variance / 1e5) ** 0.5
    )
    np.testing.assert_allclose(draws.var(axis=0), variance, rtol=0.03)


def test_layers_have_draws_of_their_own():
    w = subspace_init(KEY, net, num_endpoints=3)
    a = F.sample_layerwise(jax.random.key(1), w)
    check_equal(a["one"]["bias"], a["one"]["kernel"])
    assert np.all(np.abs(a["one"]["kernel"] - a["two"]["kernel"]) > 1e-4)
    point = F.simplex_point(w, a)
    for layer, name in (("one", "bias"), ("one", "kernel"), ("two", "kernel")):
        expected = np.tensordot(a[layer][name], w[layer][name], axes=1)
        np.testing.assert_allclose(point[layer][name], expected, rtol=1e-5, atol=1e-6)
    prefix = {"one": a["one"]["bias"], "two": a["two"]["kernel"]}
    check_equal(F.simplex_point(w, prefix), point)


def test_draws_of_layers_are_independent():
    w = subspace_init(KEY, net, num_endpoints=2)
    draw = jax.jit(jax.vmap(lambda k: sample_layerwise(k, w)))
    a = draw(jax.random.split(KEY, 20_000))
    one, two = a["one"]["bias"][:, 0], a["two"]["kernel"][:, 0]
    assert abs(np.corrcoef(one, two)[0, 1]) < 5 / 20_000**0.5
    np.testing.assert_allclose([one.mean(), two.mean()], 0.5, atol=0.02)


def test_groups_are_what_one_says():
    w = subspace_init(KEY, net, num_endpoints=3)
    seen = []

    def groups(path):
        seen.append(path)
        return path.split("/")[-1]

    a = sample_layerwise(KEY, w, groups=groups)
    assert seen == ["one/bias", "one/kernel", "two/kernel"]
    check_equal(a["one"]["kernel"], a["two"]["kernel"])
    assert np.all(a["one"]["kernel"] != a["one"]["bias"])


def test_endpoints_are_initialised_apart():
    w = subspace_init(KEY, net, num_endpoints=3)
    for i, key in enumerate(jax.random.split(KEY, 3)):
        check_close(endpoint(w, i), net(key), rtol=1e-6)
    assert float(cosine_squared(endpoint(w, 0), endpoint(w, 1))) < 0.5


# The squared cosine


def flat(tree, names=("one", "two")):
    return np.concatenate([np.ravel(tree[n]["kernel"]) for n in names]).astype(float)


def cosine_oracle(u, v, names=("one", "two")):
    u, v = flat(u, names), flat(v, names)
    return (u @ v) ** 2 / ((u @ u) * (v @ v))


@pytest.mark.parametrize("seed", range(3))
def test_cosine_of_all_matrices_together(x64, seed):
    u, v = (net(k) for k in jax.random.split(jax.random.key(seed)))
    np.testing.assert_allclose(cosine_squared(u, v), cosine_oracle(u, v), rtol=1e-12)
    only = {"one": {"bias": False, "kernel": True}, "two": False}
    for mask in (only, lambda tree: only):
        found = cosine_squared(u, v, mask=mask)
        np.testing.assert_allclose(found, cosine_oracle(u, v, ("one",)), rtol=1e-12)
    a, b = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(t)]) for t in (u, v))
    expected = (a @ b) ** 2 / ((a @ a) * (b @ b))
    np.testing.assert_allclose(cosine_squared(u, v, mask=True), expected, rtol=1e-12)


def test_cosine_properties():
    u, v = (net(k) for k in jax.random.split(KEY))
    found = float(cosine_squared(u, v))
    assert 0 <= found <= 1
    for scale in (-3.0, 1e-12, 1e12):  # its squares' products would leave float32
        far = jax.tree.map(lambda x, scale=scale: scale * x, u)
        assert float(cosine_squared(far, v)) == pytest.approx(found, rel=1e-5)
        assert float(cosine_squared(far, u)) == pytest.approx(1, rel=1e-6)
    assert float(cosine_squared(jnp.eye(2)[:1], jnp.eye(2)[1:])) == 0


def test_cosine_at_zero_has_no_nan():
    u, zero = jnp.ones((2, 3)), jnp.zeros((2, 3))
    both = jax.jit(jax.value_and_grad(cosine_squared, argnums=(0, 1)))
    for pair in ((u, zero), (zero, u), (zero, zero)):
        value, slopes = both(*pair)
        assert float(value) == 0
        check_equal(slopes, (zero, zero))


def test_cosine_gradient(x64):
    u, v = (jax.random.normal(k, (2, 3)) for k in jax.random.split(KEY))
    found = jax.jit(jax.grad(cosine_squared))(u, v)
    c = jnp.vdot(u, v) / jnp.vdot(u, u)
    expected = 2 * c / jnp.vdot(v, v) * (v - c * u)
    np.testing.assert_allclose(found, expected, rtol=1e-10)


# The loss


@pytest.mark.parametrize("size", [2, 3, 4])
def test_loss_oracle(x64, size):
    w = subspace_init(KEY, net, num_endpoints=size)
    x, y = data()
    a = np.asarray(sample_simplex(jax.random.key(5), size))
    point = jax.tree.map(lambda w: sum(a[i] * np.asarray(w[i]) for i in range(size)), w)
    x, y = np.asarray(x), np.asarray(y)
    hidden = np.tanh(x @ point["one"]["kernel"] + point["one"]["bias"][None])
    plain = np.mean((hidden @ point["two"]["kernel"] - y) ** 2)
    pairs = list(itertools.combinations(range(size), 2))
    possible = np.array(
        [cosine_oracle(endpoint(w, j), endpoint(w, k)) for j, k in pairs]
    )
    run = jax.jit(
        lambda key: subspace_loss(
            lambda p: mean_square(p, x, y), w, jnp.asarray(a), beta=0.7, key=key
        )
    )
    keys = jax.random.split(KEY, 600)
    found = (np.asarray(jax.vmap(run)(keys)) - plain) / 0.7
    nearest = np.abs(found[:, None] - possible).argmin(axis=1)
    np.testing.assert_allclose(found, possible[nearest], rtol=1e-9, atol=1e-12)
    counts = np.bincount(nearest, minlength=len(pairs))
    share = 1 / len(pairs)
    spread = (600 * share * (1 - share)) ** 0.5
    assert np.all(np.abs(counts - 600 * share) <= 4 * spread)


def test_two_endpoints_need_no_key_and_one_has_no_penalty():
    loss = lambda p: mean_square(p, *data())
    w = subspace_init(KEY, net, num_endpoints=2)
    a = line_coefficients(0.4)
    found = subspace_loss(loss, w, a, beta=2.0) - subspace_loss(loss, w, a, beta=0)
    expected = 2 * cosine_squared(endpoint(w, 0), endpoint(w, 1))
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    single = subspace_init(KEY, net, num_endpoints=1)
    found = subspace_loss(loss, single, jnp.ones(1))
    np.testing.assert_allclose(found, loss(endpoint(single, 0)), rtol=1e-6)


def test_without_beta_there_is_no_penalty_to_compute():
    w = subspace_init(KEY, net, num_endpoints=3)
    fail = lambda tree: pytest.fail("the mask was asked for")
    a = jnp.full(3, 1 / 3)
    for beta in (0, 0.0):
        subspace_loss(lambda p: jnp.float32(1), w, a, beta=beta, mask=fail)


def test_descending_the_penalty_turns_the_ends_apart():
    one = net(KEY)
    nudge = net(jax.random.key(1))
    w = jax.tree.map(lambda x, d: jnp.stack([x, x + 0.3 * d]), one, nudge)
    zero = lambda p: jnp.float32(0)
    before = cosine_squared(endpoint(w, 0), endpoint(w, 1))
    a = line_coefficients(0.5)
    slope = jax.jit(jax.grad(lambda w: subspace_loss(zero, w, a)))
    for _ in range(20):
        w = jax.tree.map(lambda x, g: x - 0.5 * g, w, slope(w))
    assert float(cosine_squared(endpoint(w, 0), endpoint(w, 1))) < 0.8 * float(before)


def test_convex_losses_of_linear_models_are_convex_on_the_simplex(x64):
    x, y = data()
    loss = lambda w: jnp.mean((x @ w - y) ** 2)
    w = jax.random.normal(KEY, (3, 3, 2))
    ends = jnp.stack([loss(v) for v in w])
    for key in jax.random.split(KEY, 20):
        a = sample_simplex(key, 3)
        assert float(loss(F.simplex_point(w, a))) <= float(a @ ends)


# How it runs


def test_one_trace():
    traces = []

    def loss(p):
        traces.append(1)
        return mean_square(p, *data())

    @jax.jit
    def step(w, key, beta):
        draw, pair = jax.random.split(key)
        a = F.sample_layerwise(draw, w)
        return jax.grad(lambda w: subspace_loss(loss, w, a, beta=beta, key=pair))(w)

    w = subspace_init(KEY, net, num_endpoints=3)
    for i, beta in enumerate((0.0, 1.0, 2.0)):
        w = step(w, jax.random.key(i), beta)
    assert len(traces) == 1


def test_dtypes_are_kept_and_sums_are_wide():
    w = subspace_init(KEY, net, num_endpoints=3)
    w["two"] = optax.tree.cast(w["two"], jnp.bfloat16)
    dtypes = lambda tree: jax.tree.map(lambda x: x.dtype, tree)
    a = F.sample_layerwise(KEY, w)
    start, end = endpoint(w, 0), endpoint(w, 1)
    for point in (F.simplex_point(w, a), F.midpoint(w), F.line_point(start, end, 0.3)):
        assert dtypes(point) == dtypes(w)
    loss = lambda w: subspace_loss(lambda p: mean_square(p, *data()), w, a, key=KEY)
    assert loss(w).dtype == jnp.float32
    assert dtypes(jax.jit(jax.grad(loss))(w)) == dtypes(w)
    # In bfloat16 the sum would stop growing at 256, and 1/3 would be 0.334.
    ones = jnp.ones((400, 10), jnp.bfloat16)
    assert cosine_squared(ones, ones).dtype == jnp.float32
    assert float(cosine_squared(ones, ones)) == pytest.approx(1, rel=1e-6)
    third = F.simplex_point(jnp.full((3, 1), 3.0, jnp.bfloat16), jnp.full(3, 1 / 3))
    assert float(third[0]) == 3


def test_holes_stay_holes():
    w = {"a": jnp.ones((2, 3)), "b": optax.MaskedNode()}
    assert F.simplex_point(w, jnp.array([0.5, 0.5]))["b"] == optax.MaskedNode()
    assert F.midpoint(w)["b"] == optax.MaskedNode()


# Batch statistics


def norm(momentum):
    """A dense layer, then a BatchNorm by hand, with a counter among its state."""

    def apply_fn(params, state, inputs, *, key, train):
        h = inputs @ params
        if not train:
            return (h - state["mean"][None]) / jnp.sqrt(state["var"][None]), state
        new = {"mean": h.mean(axis=0), "var": h.var(axis=0)}
        mix = lambda name: momentum * state[name] + (1 - momentum) * new[name]
        moved = {"mean": mix("mean"), "var": mix("var"), "steps": state["steps"] + 1}
        return h - new["mean"][None], moved

    return apply_fn


STATE = {"mean": jnp.full(2, 9.0), "var": jnp.full(2, 9.0), "steps": jnp.int32(7)}


@pytest.mark.parametrize("momentum", [0, 0.9, 0.99])
def test_batch_statistics_by_hand(momentum):
    w = jax.random.normal(KEY, (3, 2))
    parts = [np.asarray(data(rows, seed)[0]) for rows, seed in ((8, 1), (8, 2), (3, 3))]
    batches = [(x, None) for x in parts]
    options = {"state": STATE, "momentum": momentum}
    found = recompute_batch_stats(norm(momentum), w, iter(batches), **options)
    hidden = [np.asarray(x @ w, np.float64) for x in parts]
    rows = [len(x) for x in parts]
    mean = np.average([h.mean(axis=0) for h in hidden], axis=0, weights=rows)
    var = np.average([h.var(axis=0) for h in hidden], axis=0, weights=rows)
    np.testing.assert_allclose(found["mean"], mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(mean, np.concatenate(hidden).mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(found["var"], var, rtol=1e-5)
    assert int(found["steps"]) == 7
    np.testing.assert_array_equal(STATE["mean"], 9)


def test_weights_of_rows_weigh_batches():
    w = jax.random.normal(KEY, (3, 2))
    x, other = data(4, 1)[0], data(4, 2)[0]
    nan = jnp.full((4, 3), jnp.nan)
    weights = jnp.array([1.0, 1, 0, 0]), jnp.ones(4), jnp.zeros(4)
    batches = list(zip((x, other, nan), (None,) * 3, weights))
    found = recompute_batch_stats(norm(0.99), w, batches, state=STATE)
    expected = (2 * (x @ w).mean(axis=0) + 4 * (other @ w).mean(axis=0)) / 6
    np.testing.assert_allclose(found["mean"], expected, rtol=1e-5, atol=1e-6)
    empty = recompute_batch_stats(norm(0.99), w, batches[2:], state=STATE)
    assert np.all(np.isnan(empty["mean"]))


def test_statistics_keep_their_dtype_and_do_not_compile_again():
    traces, layer = [], norm(0.99)

    def apply_fn(*args, **options):
        traces.append(1)
        return layer(*args, **options)

    w = jax.random.normal(KEY, (3, 2))
    state = STATE | {"mean": STATE["mean"].astype(jnp.bfloat16)}
    for i in range(2):
        batches = [data(8, seed) for seed in range(4)]
        found = recompute_batch_stats(apply_fn, i + w, batches, state=state)
        assert found["mean"].dtype == jnp.bfloat16
    assert len(traces) == 1


def test_noise_has_a_key_for_each_batch():
    def apply_fn(params, state, inputs, *, key, train):
        assert train
        return inputs, 0.01 * jax.random.normal(key, (2,))

    batches = [(jnp.ones((1, 1)), None)] * 3
    found = recompute_batch_stats(apply_fn, (), batches, state=jnp.ones(2), key=KEY)
    draws = [jax.random.normal(jax.random.fold_in(KEY, i), (2,)) for i in range(3)]
    np.testing.assert_allclose(found, sum(draws) / 3, rtol=1e-5)


class Model(nnx.Module):
    def __init__(self, *, rngs):
        self.first = nnx.Linear(3, 5, rngs=rngs)
        self.norm = nnx.BatchNorm(5, rngs=rngs)
        self.last = nnx.Linear(5, 2, rngs=rngs)

    def __call__(self, x):
        return self.last(nnx.relu(self.norm(self.first(x))))


def test_batch_statistics_of_an_nnx_model():
    parts = from_nnx(Model(rngs=nnx.Rngs(0)), Gaussian())
    apply_fn = parts.objective.apply_fn
    other = from_nnx(Model(rngs=nnx.Rngs(1)), Gaussian())
    point = F.line_point(parts.params, other.params, 0.5)
    x, y = data(64)
    given = parts.model_state
    found = recompute_batch_stats(apply_fn, point, [(x, y)], state=given)
    hidden = x @ point["first"]["kernel"] + point["first"]["bias"][None]
    np.testing.assert_allclose(found["norm"]["mean"], hidden.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(found["norm"]["var"], hidden.var(axis=0), rtol=1e-5)
    # With the statistics of its only batch, the model in use is the one in training.
    trained, _ = apply_fn(point, given, x, key=None, train=True)
    used, _ = apply_fn(point, found, x, key=None, train=False)
    np.testing.assert_allclose(used, trained, rtol=1e-4, atol=1e-5)
    stale, _ = apply_fn(point, given, x, key=None, train=False)
    assert float(jnp.abs(stale - trained).max()) > 0.05


# It learns


def wide_net(key):
    a, b = jax.random.split(key)
    return {
        "one": {
            "bias": jnp.zeros(16),
            "kernel": jax.random.normal(a, (2, 16)),
        },
        "two": {"kernel": 0.25 * jax.random.normal(b, (16, 2))},
    }


def test_a_line_learns_with_a_good_interior():
    x = jax.random.normal(jax.random.key(1), (256, 2))
    y = (x[:, 0] * x[:, 1] > 0).astype(jnp.int32)  # no linear model does it

    def loss(p):
        values = optax.softmax_cross_entropy_with_integer_labels(forward(p, x), y)
        return values.mean()

    tx = optax.adam(0.02)

    @jax.jit
    def train(w, key):
        def step(carry, key):
            w, state = carry
            a = line_coefficients(jax.random.uniform(key))
            slope = jax.grad(lambda w: subspace_loss(loss, w, a))(w)
            updates, state = tx.update(slope, state, w)
            return (optax.apply_updates(w, updates), state), None

        return jax.lax.scan(step, (w, tx.init(w)), jax.random.split(key, 500))[0][0]

    w = train(subspace_init(KEY, wide_net, num_endpoints=2), jax.random.key(2))
    right = lambda p: float((forward(p, x).argmax(axis=-1) == y).mean())
    along = [
        right(F.simplex_point(w, line_coefficients(t))) for t in np.linspace(0, 1, 11)
    ]
    assert min(along) > 0.85  # chance is 0.5
    assert min(along[2:-2]) >= min(along[0], along[-1]) - 0.02
    assert right(F.midpoint(w)) > 0.9
    assert float(cosine_squared(endpoint(w, 0), endpoint(w, 1))) < 0.5
