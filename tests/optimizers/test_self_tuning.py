"""Self-tuning networks: exact gates, exact gradients, and hyperparameters found."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxlab.layers.self_tuning import SelfTuningConv, SelfTuningLinear
from jaxlab.optimizers import (
    GatedParams,
    Hyperparameter,
    best_response_error,
    constrain,
    gated_conv,
    gated_linear,
    gated_weights,
    hyperparameter_gradient,
    init_gated,
    perturb_hyperparameters,
    perturbation_entropy,
    response_gradient,
    self_tuning,
    unconstrain,
)

KEY = jax.random.key(5)
SPECS = (
    Hyperparameter("dropout", init=0.05, lo=0.0, hi=0.9),
    Hyperparameter("decay", init=1e-4, lo=0.0),
    Hyperparameter("log_scale", init=-2.0),
    Hyperparameter("length", init=4, lo=0, hi=24, discrete=True),
    Hyperparameter("depth", init=2, lo=-1, discrete=True),
)


def inverse_softplus(scale):
    return np.log(np.expm1(scale))


def draw(seed, *shape, dtype=None):
    """Draws normal numbers outside jax, which would compile for every shape."""
    numbers = np.random.default_rng(seed).normal(size=shape)
    return jnp.asarray(numbers, dtype or jnp.result_type(float))


def random_gated(shape, h, *, use_bias=True, dtype=None):
    """Draws parameters of size one everywhere, c too."""
    *_, width = shape
    shapes = [shape, shape, (h, width), (), (width,), (width,), (h, width)]
    draws = [draw(i, *shape, dtype=dtype) for i, shape in enumerate(shapes)]
    return GatedParams(*draws[: 7 if use_bias else 4])


LINEAR = jax.jit(gated_linear)
WEIGHTS = jax.jit(gated_weights)
CONSTRAIN = jax.jit(constrain, static_argnames="specs")
UNCONSTRAIN = jax.jit(unconstrain, static_argnames="specs")


def plain(params, u):
    """The effective weights of the sheet, in numpy and one output at a time."""
    p = GatedParams(*(None if a is None else np.asarray(a) for a in params))
    kernel, bias = np.empty_like(p.kernel), None
    if p.bias is not None:
        bias = np.empty_like(p.bias)
    for j in range(p.kernel.shape[-1]):
        gate = sum(u[i] * p.kernel_gate[i, j] for i in range(len(u)))
        kernel[..., j] = p.scale * p.kernel[..., j] + gate * p.response_kernel[..., j]
        if bias is not None:
            gate = sum(u[i] * p.bias_gate[i, j] for i in range(len(u)))
            bias[j] = p.scale * p.bias[j] + gate * p.response_bias[j]
    return kernel, bias


# Gated layers against plain ones


@pytest.mark.parametrize("use_bias", [True, False])
def test_gated_linear_is_a_dense_layer_for_each_row(x64, use_bias):
    params = random_gated((3, 4), 2, use_bias=use_bias)
    x, u = draw(1, 6, 5, 3), draw(2, 6, 5, 2)
    for rows in (u, u[:, 0], u[0, 0]):  # for every row, for each example, for all
        got = LINEAR(params, x, rows)
        full = np.asarray(rows)
        full = full.reshape(*full.shape[:-1], *(1,) * (3 - full.ndim), 2)
        full = np.broadcast_to(full, (6, 5, 2))
        for i, t in np.ndindex(6, 5):
            kernel, bias = plain(params, full[i, t])
            want = np.asarray(x)[i, t] @ kernel + (0 if bias is None else bias)
            np.testing.assert_allclose(got[i, t], want, rtol=1e-12, atol=1e-12)
    mapped = jax.jit(jax.vmap(gated_linear, (None, 0, 0)))(params, x, u[:, 0])
    together = LINEAR(params, x, u[:, 0])
    np.testing.assert_allclose(mapped, together, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("shape", "space", "options"),
    [
        ((3, 2, 2, 4), (6, 5), {"strides": 2, "padding": "VALID"}),
        ((3, 3, 1, 4), (6, 5), {"groups": 2, "dilation": (2, 1)}),
        ((3, 2, 4), (7,), {"padding": ((2, 0),)}),
    ],
    ids=["valid", "groups", "causal"],
)
def test_gated_conv_is_a_convolution_for_each_example(x64, shape, space, options):
    h, groups = 2, options.get("groups", 1)
    params = random_gated(shape, h)
    x, u = draw(1, 3, *space, shape[-2] * groups), draw(2, 3, h)
    like = nnx.Conv(
        x.shape[-1],
        shape[-1],
        shape[:-2],
        strides=options.get("strides", 1),
        padding=options.get("padding", "SAME"),
        kernel_dilation=options.get("dilation", 1),
        feature_group_count=groups,
        param_dtype=float,
        rngs=nnx.Rngs(0),
    )
    graph, _ = nnx.split(like)

    @jax.jit
    def found():
        apply = functools.partial(gated_conv, params, **options)
        lead = jnp.stack([x, 2 * x], 1)  # two axes of batch, a u for the first
        return apply(x, u), apply(x[:1], u[0]), apply(lead, u)[:, 0]

    @jax.jit
    @jax.vmap
    def wanted(kernel, bias, x):
        return nnx.merge(graph, {"kernel": kernel, "bias": bias})(x)

    kernels, biases = zip(*(plain(params, row) for row in np.asarray(u)))
    want = wanted(np.stack(kernels), np.stack(biases), x)
    for got, same in zip(found(), (want, want[:1], want)):
        np.testing.assert_allclose(got, same, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("shape", [(3, 4), (3, 2, 2, 4)], ids=str)
@pytest.mark.parametrize("use_bias", [True, False])
def test_weights_are_those_of_the_formula(x64, shape, use_bias):
    params = random_gated(shape, 3, use_bias=use_bias)
    u = draw(1, 3)
    kernel, bias = WEIGHTS(params, u)
    want = plain(params, np.asarray(u))
    np.testing.assert_allclose(kernel, want[0], rtol=1e-12, atol=1e-12)
    if use_bias:
        np.testing.assert_allclose(bias, want[1], rtol=1e-12, atol=1e-12)
    else:
        assert bias is None


def test_start_is_that_of_the_authors():
    params = jax.jit(lambda key: init_gated(key, (20, 30, 50), hyperparameters=40))(KEY)
    bound = 1 / np.sqrt(20 * 30)
    for name in ("kernel", "response_kernel", "bias", "response_bias"):
        values = np.asarray(getattr(params, name))
        assert np.abs(values).max() <= bound
        assert np.abs(values).max() > 0.9 * bound
        assert values.min() < 0 < values.max()
    for gate in (params.kernel_gate, params.bias_gate):
        assert gate.shape == (40, 50)
        np.testing.assert_allclose(np.std(gate), 0.01, rtol=0.1)
    assert float(params.scale) == 1.0
    flat = [np.asarray(p).ravel()[:50] for p in params if np.size(p) > 1]
    for i, one in enumerate(flat):
        assert all(not np.array_equal(one, two) for two in flat[:i])
    # A closed gate makes a plain layer.
    kernel, bias = WEIGHTS(params, jnp.zeros(40))
    chex.assert_trees_all_equal((kernel, bias), (params.kernel, params.bias))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_dtypes(dtype):
    params, u = random_gated((3, 4), 2, dtype=dtype), draw(1, 5, 2)
    x = draw(2, 5, 3, dtype=dtype)
    got = LINEAR(params, x, u)
    assert got.dtype == dtype
    assert jax.eval_shape(gated_weights, params, u[0])[0].dtype == dtype
    pixels = jnp.ones((5, 3), jnp.uint8)
    assert jax.eval_shape(gated_linear, params, pixels, u).dtype == dtype
    conv = random_gated((3, 3, 2, 4), 2, dtype=dtype)
    image = jnp.ones((5, 8, 8, 2), dtype)
    assert jax.eval_shape(gated_conv, conv, image, u).dtype == dtype
    # Each number of the oracle is within a few roundings.
    wide = jax.tree.map(lambda p: p.astype(jnp.float32), (params, x))
    want = LINEAR(*wide, u)
    error = 8 * float(jnp.finfo(dtype).eps) * float(np.abs(want).max())
    np.testing.assert_allclose(np.asarray(got, np.float32), want, atol=error)


def test_modules_hold_what_the_functions_take():
    x, u = draw(1, 5, 8, 8, 4), draw(2, 5, 2)
    rngs, width = nnx.Rngs(0), {"hyperparameters": 2}
    conv = SelfTuningConv(4, 6, (3, 3), strides=2, groups=2, rngs=rngs, **width)
    dense = SelfTuningLinear(4, 6, use_bias=False, rngs=rngs, **width)
    graph, params = nnx.split((conv, dense), nnx.Param)

    @jax.jit
    def pairs(params):
        conv, dense = nnx.merge(graph, params)
        want = gated_conv(conv.params(), x, u, strides=2, groups=2)
        kernel, bias = dense.weights(u[0])
        assert bias is None
        plain = (dense(x, u[0]), x @ kernel)
        flexible = (dense(x, u), gated_linear(dense.params(), x, u))
        return (conv(x, u), want), flexible, plain

    for got, want in pairs(params):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    total = lambda p: sum(jnp.sum(m(x, u) ** 2) for m in nnx.merge(graph, p))
    grads = jax.tree.leaves(jax.jit(jax.grad(total))(params))
    assert len(grads) == 7 + 4
    assert all(np.any(g) for g in grads)
    half = SelfTuningLinear(4, 6, dtype=jnp.bfloat16, rngs=rngs, **width)
    assert half.kernel.dtype == half.params().kernel.dtype == jnp.float32
    assert jax.eval_shape(half, x, u).dtype == jnp.bfloat16


# Hyperparameters


def test_values_come_back(x64):
    values = {
        "dropout": jnp.array([1e-6, 0.05, 0.5, 0.899999]),
        "decay": jnp.array([1e-8, 0.1, 10.0, 1e4]),
        "log_scale": jnp.array([-50.0, 0.0, 1.0, 50.0]),
        "length": jnp.array([0.0, 4.0, 12.0, 23.0]),
        "depth": jnp.array([-1.0, 0.0, 7.0, 1000.0]),
    }
    u = UNCONSTRAIN(values, SPECS)
    assert u.shape == (4, 5)
    chex.assert_trees_all_close(CONSTRAIN(u, SPECS), values, rtol=1e-12)
    start = CONSTRAIN(UNCONSTRAIN({}, SPECS), SPECS)
    chex.assert_trees_all_close(start, {s.name: s.init for s in SPECS}, rtol=1e-12)
    want = 0.9 / (1 + np.exp(-np.asarray(u)[:, 0]))
    np.testing.assert_allclose(values["dropout"], want, rtol=1e-12)
    one = unconstrain({"decay": 2.0, "length": 23}, SPECS)
    np.testing.assert_allclose(one[1], np.log(np.expm1(2.0)), rtol=1e-12)
    # The middle of [23, 24): noise of either sign goes down as easily as up.
    np.testing.assert_allclose(one[3], np.log(23.5 / 0.5), rtol=1e-12)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_discrete_values_come_back_in_every_precision(dtype):
    specs = (SPECS[3],)
    values = jnp.arange(24, dtype=dtype)
    got = CONSTRAIN(UNCONSTRAIN({"length": values}, specs), specs)["length"]
    assert got.dtype == jnp.float32
    chex.assert_trees_all_equal(got, jnp.arange(24.0))


def test_far_away_values_stay_in_their_range_and_gradients_are_finite():
    u = jnp.array([[-1e4] * 5, [1e4] * 5, [0.3] * 5, [60.0] * 5])
    values = CONSTRAIN(u, SPECS)
    chex.assert_tree_all_finite(values)
    np.testing.assert_allclose(values["dropout"][:2], [0.0, 0.9])
    np.testing.assert_allclose(values["length"][:2], [0.0, 23.0])
    slopes = jax.jit(jax.vmap(jax.jacobian(lambda u: constrain(u, SPECS))))(u)
    for spec in SPECS:
        assert np.all(np.isfinite(slopes[spec.name]))
        assert bool(np.any(slopes[spec.name])) is not spec.discrete


def test_entropy_is_that_of_the_formula(x64):
    both = jax.jit(jax.value_and_grad(perturbation_entropy))
    scale = np.array([0.01, 0.5, 1.0, 30.0])
    want = np.sum(np.log(scale * np.sqrt(2 * np.pi * np.e)))
    value, grad = both(jnp.asarray(inverse_softplus(scale)))
    np.testing.assert_allclose(value, want, rtol=1e-12)
    slope = (1 - np.exp(-scale)) / scale  # softplus' is 1 - e^-s
    np.testing.assert_allclose(grad, slope, rtol=1e-12)
    # At both sides of the switch, and where softplus is 0.
    rho = np.array([-39.99, -40.01, -1000.0, 1e5])
    value, grad = both(jnp.asarray(rho))
    want = rho[:3].sum() + np.log(1e5) + 2 * np.log(2 * np.pi * np.e)
    np.testing.assert_allclose(value, want, rtol=1e-12)
    np.testing.assert_allclose(grad, [1.0, 1.0, 1.0, 1e-5], rtol=1e-12)


def test_noise_is_normal_and_each_row_has_its_own():
    u, scale = np.float32([1.0, -2.0]), np.array([0.5, 2.0])
    rho = np.float32(inverse_softplus(scale))

    @jax.jit
    def draws(rho):
        of = lambda rho, rows, shared: perturb_hyperparameters(
            KEY, u, rho, rows=rows, shared=shared
        )
        few = [of(rho, 9, shared) for shared in (False, (False, True), True)]
        return of(rho, 40_000, False), few, jax.jacobian(of)(rho, 9, False)

    near, few, slopes = jax.tree.map(np.asarray, draws(rho))
    noise = (np.float64(near) - u[None]) / scale[None]
    np.testing.assert_allclose(noise.mean(0), 0, atol=0.02)
    np.testing.assert_allclose(np.cov(noise.T), np.eye(2), atol=0.03)
    free, second, both = few
    np.testing.assert_allclose(second[:, 0], free[:, 0], rtol=1e-6)
    np.testing.assert_allclose(second[:, 1], np.full(9, free[0, 1]), rtol=1e-6)
    np.testing.assert_allclose(both, np.broadcast_to(free[:1], (9, 2)), rtol=1e-6)
    want = (1 - np.exp(-scale)) * (free - u) / scale
    np.testing.assert_allclose(np.einsum("rhh->rh", slopes), want, rtol=1e-4)


# The gradients of both levels against explicit sums, and against implicit ones


def ridge(*, rows=12, inputs=3):
    """A ridge problem with its best response, (X'X / n + e^u)^-1 X'y / n."""
    x = draw(0, 2, rows, inputs)
    y = jnp.sum(x, -1) + 3.0 * draw(100, 2, rows)
    train, val = (x[0], y[0]), (x[1], y[1])

    def response(u):
        gram = train[0].T @ train[0] / rows + jnp.exp(u[0]) * jnp.eye(inputs)
        return jnp.linalg.solve(gram, train[0].T @ train[1] / rows)

    def val_loss(w):
        return 0.5 * jnp.mean((val[0] @ w - val[1]) ** 2)

    return train, val, response, val_loss


def affine(params, u):
    return params["w"][None] + u @ params["slope"]


def affine_train_loss(params, u, batch, key):
    x, y = batch
    w = affine(params, u)  # one row of weights for each example
    fit = 0.5 * (jnp.sum(x * w, -1) - y) ** 2
    return jnp.mean(fit + 0.5 * jnp.exp(u[:, 0]) * jnp.sum(w**2, -1))


def affine_val_loss(params, u, batch):
    x, y = batch
    return 0.5 * jnp.mean((jnp.sum(x * affine(params, u), -1) - y) ** 2)


def exact_params(response, u):
    slope = jax.jacobian(response)(u).T
    return {"w": response(u) - u @ slope, "slope": slope}


def test_gradient_through_an_exact_response_is_the_implicit_one(x64):
    train, val, response, val_loss = ridge()

    @jax.jit
    def found(u):
        params = exact_params(response, u)
        return hyperparameter_gradient(
            KEY, affine_val_loss, params, u, u, val, tune_scales=False
        )

    @jax.jit
    def wanted(u):
        w = response(u)
        explicit = jax.value_and_grad(lambda u: val_loss(response(u)))(u)
        # Implicitly: -dL_val/dw H^-1 d2L_train/dw du.
        hessian = train[0].T @ train[0] / 12 + jnp.exp(u[0]) * jnp.eye(3)
        mixed = jnp.exp(u[0]) * w
        return *explicit, -jax.grad(val_loss)(w) @ jnp.linalg.solve(hessian, mixed)

    for start in np.array([[-2.0], [0.0], [1.5]]):
        loss, (grad, rho_grad) = found(start)
        value, explicit, implicit = wanted(start)
        np.testing.assert_allclose(loss, value, rtol=1e-12)
        np.testing.assert_allclose(grad, explicit, rtol=1e-10)
        np.testing.assert_allclose(grad[0], implicit, rtol=1e-10)
        np.testing.assert_array_equal(rho_grad, [0.0])


def test_gradients_are_those_of_sums_over_perturbed_rows(x64):
    train, val, _, _ = ridge()
    u, rho = jnp.array([0.3]), jnp.array([-0.7])
    params = {"w": jnp.array([1.0, -1.0, 2.0]), "slope": jnp.array([[0.5, 0.1, -1.0]])}
    noise, _ = jax.random.split(KEY)
    eps = np.asarray(jax.random.normal(noise, (12, 1)))

    def by_row(params, u, rho, eps, batch, penalty):
        total = 0.0
        for i in range(12):
            near = u + jnp.log1p(jnp.exp(rho)) * eps[i]
            w = params["w"] + near[0] * params["slope"][0]
            total += 0.5 * (batch[0][i] @ w - batch[1][i]) ** 2
            total += penalty * 0.5 * jnp.exp(near[0]) * (w @ w)
        return total / 12

    found = jax.jit(response_gradient, static_argnums=1)(
        KEY, affine_train_loss, params, u, rho, train
    )
    want = jax.jit(jax.value_and_grad(by_row))(params, u, rho, eps, train, 1.0)
    chex.assert_trees_all_close(found, want, rtol=1e-11)

    eps = np.asarray(jax.random.normal(KEY, (12, 1)))
    loss, grads = jax.jit(hyperparameter_gradient, static_argnums=1)(
        KEY, affine_val_loss, params, u, rho, val, entropy_weight=0.2
    )

    def objective(u, rho):
        entropy = jnp.log(jnp.log1p(jnp.exp(rho)) * np.sqrt(2 * np.pi * np.e)).sum()
        fit = by_row(params, u, rho, eps, val, 0.0)
        return fit - 0.2 * entropy, fit

    want, fit = jax.jit(jax.grad(objective, argnums=(0, 1), has_aux=True))(u, rho)
    np.testing.assert_allclose(loss, fit, rtol=1e-12)
    chex.assert_trees_all_close(grads, want, rtol=1e-11)


def test_aux_comes_along():
    train, val, _, _ = ridge()
    params, zero = {"w": jnp.ones(3), "slope": jnp.ones((1, 3))}, jnp.zeros(1)
    with_aux = lambda loss: lambda *args: (loss(*args), args[1])
    data = params, zero, zero
    find = lambda gradient, loss, batch: jax.eval_shape(
        lambda: gradient(KEY, with_aux(loss), *data, batch, has_aux=True)
    )
    (loss, near), grads = find(response_gradient, affine_train_loss, train)
    assert (loss.shape, near.shape) == ((), (12, 1))
    chex.assert_trees_all_equal_shapes_and_dtypes(grads, params)
    (loss, near), _ = find(hyperparameter_gradient, affine_val_loss, val)
    assert (loss.shape, near.shape) == ((), (12, 1))


# Steps


def scanned(method, state, train, val, steps, seed=0):
    @jax.jit
    def run(state):
        def body(state, key):
            state, metrics = method.step(key, state, train, val)
            return state, (state.u, metrics)

        return jax.lax.scan(body, state, jax.random.split(jax.random.key(seed), steps))

    return run(state)


@pytest.mark.parametrize(("train_steps", "warmup"), [(1, 0), (3, 4)])
def test_tuning_waits_for_the_warmup_and_its_turn(train_steps, warmup):
    train, val, _, _ = ridge()
    method = self_tuning(
        affine_train_loss,
        affine_val_loss,
        params_optimizer=optax.sgd(0.01),
        u_optimizer=optax.adam(0.1),
        rho_optimizer=optax.adam(0.1),
        train_steps=train_steps,
        warmup=warmup,
    )
    params = {"w": jnp.ones(3), "slope": jnp.ones((1, 3))}
    state = method.init(params, jnp.zeros(1))
    np.testing.assert_allclose(jax.nn.softplus(state.rho), 0.5, rtol=1e-6)
    last, (u, metrics) = scanned(method, state, train, val, 12)
    calls = np.arange(1, 13)
    due = (calls > warmup) & ((calls - warmup) % train_steps == 0)
    np.testing.assert_array_equal(metrics.tuned, due)
    moved = np.diff(np.asarray(u)[:, 0], prepend=0.0) != 0
    np.testing.assert_array_equal(moved, due)
    np.testing.assert_array_equal(np.asarray(metrics.val_loss) != 0, due)
    assert int(last.count) == 12
    assert int(last.u_state[0].count) == due.sum()
    assert bool(jnp.all(last.rho != state.rho))


def test_a_step_is_its_two_halves():
    train, val, _, _ = ridge()
    method = self_tuning(
        affine_train_loss,
        affine_val_loss,
        params_optimizer=optax.sgd(0.01, momentum=0.9),
        u_optimizer=optax.adam(0.1),
        rho_optimizer=optax.sgd(0.1),
        train_steps=1,
        entropy_weight=optax.constant_schedule(0.5),
    )
    params = {"w": jnp.ones(3), "slope": jnp.ones((1, 3))}
    state = method.init(params, jnp.zeros(1), scale=0.25)
    got, metrics = jax.jit(method.step)(KEY, state, train, val)
    one, two = jax.random.split(KEY)
    want, train_loss = jax.jit(method.fit_step)(one, state, train)
    chex.assert_trees_all_equal((want.u, want.rho), (state.u, state.rho))
    middle = want.params
    want, val_loss = jax.jit(method.tune_step)(two, want, val)
    chex.assert_trees_all_equal(want.params, middle)
    chex.assert_trees_all_close(got, want, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(metrics.train_loss, train_loss, rtol=1e-5)
    np.testing.assert_allclose(metrics.val_loss, val_loss, rtol=1e-5)
    entropy = np.log(np.log1p(np.exp(got.rho)) * np.sqrt(2 * np.pi * np.e)).sum()
    np.testing.assert_allclose(metrics.entropy, entropy, rtol=1e-5)

    @jax.jit
    def gradient(params):
        options = {"entropy_weight": 0.5}
        at = state.u, state.rho, val
        return hyperparameter_gradient(two, affine_val_loss, params, *at, **options)

    _, (_, rho_grad) = gradient(middle)
    moved = np.asarray(state.rho) - 0.1 * np.asarray(rho_grad)
    np.testing.assert_allclose(got.rho, moved, rtol=1e-5)


def test_optimizers_get_their_extra_arguments():
    seen = {}

    def update(updates, state, params=None, **extra):
        seen.update(extra)
        # Of the same noise, so that nothing is left.
        again = extra["grad_fn"](params)
        left = lambda a, g, u: jnp.abs(a - u) + jnp.abs(g - u)
        return jax.tree.map(left, again, extra["grad"], updates), extra["value"]

    spy = optax.GradientTransformationExtraArgs(lambda params: jnp.zeros(()), update)
    train, _, _, _ = ridge()
    method = self_tuning(
        affine_train_loss,
        affine_val_loss,
        params_optimizer=optax.chain(spy, optax.sgd(0.1)),
        u_optimizer=optax.sgd(0.1),
    )
    state = method.init({"w": jnp.ones(3), "slope": jnp.ones((1, 3))}, jnp.zeros(1))
    new, loss = jax.jit(method.fit_step)(KEY, state, train)
    assert float(new.params_state[0]) == float(loss) > 0
    chex.assert_trees_all_close(new.params, state.params, rtol=1e-5)
    assert set(seen) == {"value", "grad", "grad_fn", "key"}


def test_one_trace_and_dtypes_stay():
    train, val, _, _ = ridge()
    method = self_tuning(
        affine_train_loss,
        affine_val_loss,
        params_optimizer=optax.adam(0.01),
        u_optimizer=optax.adam(0.1),
        rho_optimizer=optax.adam(0.1),
    )
    params = {
        "w": jnp.ones(3, jnp.bfloat16),
        "slope": jnp.ones((1, 3), jnp.bfloat16),
    }
    state = first = method.init(params, jnp.zeros(1))
    step = jax.jit(method.step, donate_argnums=1)
    like = jax.tree.map(jnp.copy, first)
    for i in range(4):
        state, metrics = step(jax.random.fold_in(KEY, i), state, train, val)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, like)
    chex.assert_tree_all_finite((state, metrics))
    assert step._cache_size() == 1
    assert state.params["w"].dtype == jnp.bfloat16
    assert state.u.dtype == jnp.float32


def test_a_nan_in_training_is_seen():
    train, val, _, _ = ridge()
    train = (train[0].at[0, 0].set(jnp.nan), train[1])
    method = self_tuning(
        affine_train_loss,
        affine_val_loss,
        params_optimizer=optax.sgd(0.1),
        u_optimizer=optax.sgd(0.1),
    )
    state = method.init({"w": jnp.ones(3), "slope": jnp.ones((1, 3))}, jnp.zeros(1))
    _, metrics = jax.jit(method.step)(KEY, state, train, val)
    assert bool(jnp.isnan(metrics.train_loss))


# That it finds the best response, and the best hyperparameter


def test_a_gated_layer_learns_the_best_response_of_ridge(x64):
    # In the data's own directions w_j = a_j s_j^2 / (s_j^2 + e^u), a gate for each
    # coordinate. Fitted around u, its value and slope are those of this sigmoid.
    s2, a, u = np.array([0.3, 1.0, 4.0]), np.array([1.0, -2.0, 0.5]), 0.4
    factor = s2 / (s2 + np.exp(u))
    gate = 1 / (1 + np.exp(-(np.log(s2) - u)))
    np.testing.assert_allclose(factor, gate, rtol=1e-12)

    def train_loss(params, u, batch, key):
        w = gated_linear(params, batch, u)
        fit = 0.5 * s2.reshape(1, 3) * (w - a.reshape(1, 3)) ** 2
        return jnp.mean(jnp.sum(fit + 0.5 * jnp.exp(u) * w**2, -1))

    method = self_tuning(
        train_loss,
        lambda params, u, batch: jnp.sum(params.bias),
        params_optimizer=optax.adam(optax.cosine_decay_schedule(0.03, 3000)),
        u_optimizer=optax.sgd(0.0),
    )

    @jax.jit
    def learnt():
        params = init_gated(KEY, (1, 3), hyperparameters=1, dtype=float)
        state = method.init(params, jnp.array([u]), scale=0.1)
        ones = jnp.ones((64, 1))
        state, _ = scanned(method, state, ones, ones, 3000)
        at = lambda u: gated_linear(state.params, jnp.ones(1), u)
        return at(state.u), jax.jacobian(at)(state.u)[:, 0]

    value, slope = learnt()
    assert float(best_response_error(value, a * gate)) < 2e-3
    assert float(best_response_error(slope, -a * gate * (1 - gate))) < 0.02


@pytest.mark.parametrize("start", [-2.0, 2.0])
def test_the_scalar_toy_finds_its_optimum(start):
    # w*(u) = a sigmoid(-u) and L_val = (w - b)^2: the optimum is u = ln(a / b - 1).
    a, b = 2.0, 0.5
    response = lambda p, u: p["at"] + p["slope"] * u[:, 0]

    def train_loss(params, u, batch, key):
        w = response(params, u)
        return jnp.mean((w - a) ** 2 + jnp.exp(u[:, 0]) * w**2)

    method = self_tuning(
        train_loss,
        lambda params, u, batch: jnp.mean((response(params, u) - b) ** 2),
        params_optimizer=optax.adam(0.01),
        u_optimizer=optax.adam(optax.cosine_decay_schedule(0.01, 2000)),
        warmup=300,
    )
    params = {"at": jnp.zeros(()), "slope": jnp.zeros(())}
    state = method.init(params, jnp.array([start]), scale=0.05)
    state, _ = scanned(method, state, jnp.ones(32), jnp.ones(32), 4300)
    assert abs(float(state.u[0]) - np.log(a / b - 1)) < 0.02


def test_entropy_keeps_the_scales_from_collapsing():
    train, val, _, _ = ridge()

    @jax.jit
    @jax.vmap
    def last_scale(weight):
        method = self_tuning(
            affine_train_loss,
            affine_val_loss,
            params_optimizer=optax.sgd(0.05),
            u_optimizer=optax.adam(0.01),
            rho_optimizer=optax.adam(0.02),
            entropy_weight=weight,
        )
        params = {"w": jnp.zeros(3), "slope": jnp.zeros((1, 3))}
        state = method.init(params, jnp.zeros(1))
        state, _ = scanned(method, state, train, val, 1500)
        return jax.nn.softplus(state.rho[0])

    without, little, much = last_scale(jnp.array([0.0, 0.05, 0.1]))
    assert without < 0.5 * little
    assert little < 0.9 * much
    assert much < 5.0


def test_ridge_from_two_starts_ends_at_the_best_of_the_grid():
    train, val, response, val_loss = ridge(rows=40, inputs=20)
    grid = jnp.linspace(-6.0, 3.0, 181)
    loss_at = jax.jit(jax.vmap(lambda u: val_loss(response(u[None]))))
    losses = np.asarray(loss_at(grid))
    best = float(grid[losses.argmin()])
    assert -5.0 < best < 2.0  # inside
    method = self_tuning(
        affine_train_loss,
        affine_val_loss,
        params_optimizer=optax.adam(0.003),
        u_optimizer=optax.adam(0.01),
        warmup=1000,
    )

    @jax.jit
    def end(start):
        params = {"w": jnp.zeros(20), "slope": jnp.zeros((1, 20))}
        state = method.init(params, start[None])
        _, (u, _) = scanned(method, state, train, val, 6000)
        u = jnp.mean(u[-1000:, 0])  # the noise of the slopes moves u about
        return u, val_loss(response(u[None]))

    for start in (-4.0, 2.5):
        u, loss = end(jnp.float32(start))
        assert abs(u - best) < 0.2
        assert loss < 1.002 * losses.min()
