"""What self-tuning networks refuse, and what NumPy may pass to them."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxlab.layers.self_tuning import SelfTuningConv, SelfTuningLinear
from jaxlab.optimizers import (
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

pytestmark = pytest.mark.untyped

KEY = jax.random.key(0)
ZERO = np.zeros(1, np.float32)
SPEC = Hyperparameter("dropout", init=0.05, lo=0.0, hi=0.9)
DENSE = init_gated(KEY, (3, 2), hyperparameters=2)
IMAGE = init_gated(KEY, (3, 3, 2, 4), hyperparameters=2)


def train_loss(w, u, x, key):
    return jnp.mean((w + u[:, 0] - x) ** 2)


def val_loss(w, u, x):
    return jnp.mean((w + u[:, 0] - x) ** 2)


def make(**options):
    options = {"u_optimizer": optax.sgd(0.1), **options}
    return self_tuning(train_loss, val_loss, params_optimizer=optax.sgd(0.1), **options)


# Hyperparameters


@pytest.mark.parametrize(
    ("lo", "hi"),
    [(1.0, 1.0), (2.0, 1.0), (-math.inf, 1.0), (math.inf, math.inf), (0.0, math.nan)],
)
def test_ranges_are_not_empty(lo, hi):
    message = rf"'x': needs lo < hi, .* got lo={lo} and hi={hi}"
    with pytest.raises(ValueError, match=message):
        Hyperparameter("x", init=0.5, lo=lo, hi=hi)


@pytest.mark.parametrize("value", [-0.1, 0.0, 0.9, 2, math.nan, math.inf])
def test_values_lie_inside(value):
    message = rf"dropout must be strictly between 0.0 and 0.9, got {value}"
    with pytest.raises(ValueError, match=message):
        Hyperparameter("dropout", init=value, lo=0.0, hi=0.9)
    with pytest.raises(ValueError, match=f"unconstrain: {message}"):
        unconstrain({"dropout": value}, [SPEC])


@pytest.mark.parametrize("value", [-1, 4, 1.5, math.nan])
def test_discrete_values_are_integers_in_range(value):
    message = rf"holes must be an integer >= 0 and < 4, got {value}"
    with pytest.raises(ValueError, match=message):
        Hyperparameter("holes", init=value, lo=0, hi=4, discrete=True)
    with pytest.raises(ValueError, match=r"needs integers lo and hi, got lo=0\.5"):
        Hyperparameter("holes", init=1, lo=0.5, hi=4, discrete=True)
    with pytest.raises(ValueError, match="must be an integer"):
        Hyperparameter("holes", init=math.inf, lo=0, discrete=True)


def test_specs_are_there_and_have_names_of_their_own():
    for wrong in ([], (), SPEC):
        with pytest.raises(ValueError, match="list of at least one Hyperparameter"):
            constrain(jnp.zeros(1), wrong)
        with pytest.raises(ValueError, match="list of at least one Hyperparameter"):
            unconstrain({}, wrong)
    with pytest.raises(ValueError, match=r"names of their own, got .*dropout"):
        constrain(jnp.zeros(2), [SPEC, SPEC])
    with pytest.raises(ValueError, match=r"among \['dropout'\], got \['drop'\]"):
        unconstrain({"drop": 0.1}, [SPEC])
    for u in (jnp.zeros(2), jnp.zeros((3, 2)), 0.0):
        with pytest.raises(ValueError, match="last axis of u must have 1 entries"):
            constrain(u, [SPEC])


def test_numpy_values_and_ends_of_the_range():
    u = unconstrain({"dropout": np.array([0.0, 0.45, 0.9, 1.0])}, [SPEC])
    assert u.dtype == jnp.float32
    np.testing.assert_allclose(u[:3, 0], [-np.inf, 0.0, np.inf], atol=1e-6)
    assert bool(jnp.isnan(u[3, 0]))
    assert constrain(np.zeros((4, 1)), [SPEC])["dropout"].shape == (4,)
    specs = [SPEC, Hyperparameter("decay", init=1.0, lo=0.0)]
    assert unconstrain({"decay": np.ones((3, 2))}, specs).shape == (3, 2, 2)
    np.testing.assert_allclose(unconstrain({"decay": 200}, specs)[1], 200.0)


@pytest.mark.parametrize(
    ("u", "rho", "got"),
    [
        (jnp.zeros(2), jnp.zeros(3), r"float32\[2\] and float32\[3\]"),
        (jnp.zeros(()), jnp.zeros(()), r"float32\[\] and float32\[\]"),
        (jnp.zeros(0), jnp.zeros(0), r"float32\[0\] and"),
        (jnp.arange(2), jnp.zeros(2), r"int32\[2\] and"),
    ],
    ids=["lengths", "scalars", "empty", "integers"],
)
def test_u_and_rho_are_vectors_of_one_length(u, rho, got):
    message = f"u and rho must be vectors of floating numbers, .* got {got}"
    with pytest.raises(ValueError, match=f"perturb_hyperparameters: {message}"):
        perturb_hyperparameters(KEY, u, rho, rows=3)
    with pytest.raises(ValueError, match=f"response_gradient: {message}"):
        response_gradient(KEY, train_loss, 1.0, u, rho, np.ones(3))
    with pytest.raises(ValueError, match=f"hyperparameter_gradient: {message}"):
        hyperparameter_gradient(KEY, val_loss, 1.0, u, rho, np.ones(3))


def test_entropy_needs_a_vector():
    with pytest.raises(ValueError, match=r"rho must be a vector .* got int32\[2\]\."):
        perturbation_entropy(jnp.arange(2))
    with pytest.raises(ValueError, match=r"rho must be a vector .* got float32\[\]\."):
        perturbation_entropy(0.5)


@pytest.mark.parametrize("rows", [0, -1, 2.0, True, None])
def test_rows_are_counted(rows):
    with pytest.raises(ValueError, match="rows must be an integer >= 1"):
        perturb_hyperparameters(KEY, ZERO, ZERO, rows=rows)


@pytest.mark.parametrize("shared", [1, [True, False], [0], "yes"])
def test_shared_is_one_boolean_for_each(shared):
    message = "shared must be one boolean, or 1, one for each hyperparameter"
    with pytest.raises(ValueError, match=message):
        perturb_hyperparameters(KEY, ZERO, ZERO, rows=3, shared=shared)
    with pytest.raises(ValueError, match=message):
        make(shared=shared).init(1.0, ZERO)


# Gates


@pytest.mark.parametrize(
    ("shape", "count"),
    [((3,), 1), ((), 1), ((3, 0), 1), ((3, 2.0), 1), ((3, 2), 0), ((3, 2), 1.5)],
)
def test_sizes_of_gated_layers(shape, count):
    with pytest.raises(ValueError, match=r"shape must be \(in, out\) or"):
        init_gated(KEY, shape, hyperparameters=count)


def test_options_of_gated_layers():
    for scale in (-0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"gate_scale must be .* got {scale}"):
            init_gated(KEY, (3, 2), hyperparameters=1, gate_scale=scale)
    with pytest.raises(ValueError, match="dtype must be floating"):
        init_gated(KEY, (3, 2), hyperparameters=1, dtype=jnp.int32)


def test_shapes_that_do_not_fit():
    x, u = np.ones((5, 3), np.float32), np.zeros((5, 2), np.float32)
    image = np.ones((5, 8, 8, 2), np.float32)
    with pytest.raises(ValueError, match=r"3 entries on the last axis, got .*\(5, 4\)"):
        gated_linear(DENSE, np.ones((5, 4)), u)
    with pytest.raises(ValueError, match="x must end with 3 entries"):
        gated_linear(DENSE, 1.0, u)
    for wrong in (u[:, :1], u[:4], np.zeros(()), np.zeros((5, 1, 2))):
        with pytest.raises(ValueError, match=r"u must have shape \(\.\.\., 2\)"):
            gated_linear(DENSE, x, wrong)
    with pytest.raises(ValueError, match=r"u must have .* axes \(5,\) of x"):
        gated_conv(IMAGE, image, np.zeros((8, 2)))
    with pytest.raises(ValueError, match="2 axes of space and 2 entries"):
        gated_conv(IMAGE, np.ones((8, 2)), u)
    with pytest.raises(ValueError, match="2 axes of space and 4 entries"):
        gated_conv(IMAGE, image, u, groups=2)
    with pytest.raises(ValueError, match=r"kernel must have shape \(in, out\)"):
        gated_linear(IMAGE, image, u)
    with pytest.raises(ValueError, match=r"kernel must have shape \(\*window"):
        gated_conv(DENSE, x, u)
    with pytest.raises(ValueError, match=r"vector of 2 .* got shape \(5, 2\); map"):
        gated_weights(DENSE, u)
    # NumPy is welcome, integers too.
    assert gated_linear(DENSE, np.ones((5, 3), np.uint8), u).shape == (5, 2)
    assert gated_conv(IMAGE, image, u).shape == (5, 8, 8, 4)


def test_modules_pass_the_messages_on():
    rngs = nnx.Rngs(0)
    with pytest.raises(ValueError, match="all integers >= 1, got"):
        SelfTuningLinear(3, 0, hyperparameters=1, rngs=rngs)
    with pytest.raises(ValueError, match="groups must divide in_features"):
        SelfTuningConv(3, 4, (3, 3), hyperparameters=1, groups=2, rngs=rngs)
    layer = SelfTuningLinear(3, 2, hyperparameters=1, rngs=rngs)
    with pytest.raises(ValueError, match=r"u must have shape \(\.\.\., 1\)"):
        layer(np.ones((5, 3), np.float32), np.zeros((5, 2), np.float32))


# Steps


@pytest.mark.parametrize("weight", [-1, math.nan, math.inf])
def test_entropy_weight(weight):
    message = f"entropy_weight must be finite and >= 0, got {weight}"
    with pytest.raises(ValueError, match=f"self_tuning: {message}"):
        make(entropy_weight=weight)
    with pytest.raises(ValueError, match=f"hyperparameter_gradient: {message}"):
        hyperparameter_gradient(
            KEY, val_loss, 1.0, ZERO, ZERO, np.ones(3), entropy_weight=weight
        )


def test_counts_of_steps():
    for wrong in (0, -1, 1.5, True, None):
        with pytest.raises(ValueError, match="train_steps must be an integer >= 1"):
            make(train_steps=wrong)
    for wrong in (-1, 1.5, False, None):
        with pytest.raises(ValueError, match="warmup must be an integer >= 0"):
            make(warmup=wrong)


def test_what_init_refuses():
    method = make()
    with pytest.raises(ValueError, match="self_tuning: params has no entries"):
        method.init({}, ZERO)
    with pytest.raises(ValueError, match=r"got int32 at params\['n'\]"):
        method.init({"w": jnp.ones(2), "n": jnp.arange(2)}, ZERO)
    for scale in (0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"scale must be .* > 0, got {scale}"):
            method.init(1.0, ZERO, scale=scale)
    with pytest.raises(ValueError, match="self_tuning: u and rho must be vectors"):
        method.init(1.0, ZERO, scale=np.ones(2))
    with pytest.raises(ValueError, match="self_tuning: u and rho must be vectors"):
        method.init(1.0, np.zeros((2, 1)))


def test_batches_have_rows():
    method = make()
    state = method.init(jnp.array(1.0), ZERO)
    for wrong in (jnp.ones(()), (jnp.ones(3), jnp.ones(2)), jnp.ones(0), {}):
        with pytest.raises(ValueError, match="response_gradient: every array of a"):
            method.fit_step(KEY, state, wrong)
        with pytest.raises(ValueError, match="hyperparameter_gradient: every array"):
            method.tune_step(KEY, state, wrong)


def test_numpy_goes_through_all_steps():
    method = make(rho_optimizer=optax.sgd(0.1), train_steps=1)
    state = method.init(np.float32(1.0), ZERO, scale=np.array([0.3]))
    batch = np.ones(4, np.float32)
    step = jax.jit(method.step)
    for i in range(2):
        state, metrics = step(jax.random.fold_in(KEY, i), state, batch, batch)
    assert step._cache_size() == 1
    assert bool(metrics.tuned)
    assert state.u.dtype == state.rho.dtype == jnp.float32


def test_errors_of_a_response_need_trees_alike():
    with pytest.raises(ValueError, match=r"exact must be a tree like response, .*got"):
        best_response_error({"w": jnp.ones(2)}, {"w": jnp.ones(3)})
    with pytest.raises(ValueError, match="exact must be a tree like response"):
        best_response_error({"w": jnp.ones(2)}, {"v": jnp.ones(2)})
    with pytest.raises(ValueError, match="response has no entries"):
        best_response_error({}, {})
    assert float(best_response_error(np.float32([3.0]), np.float32([0.0]))) > 1e10
    assert float(best_response_error(np.zeros(2), np.zeros(2))) == 0.0
