"""What Langevin dynamics, mixtures and ensembles refuse, and what NumPy may pass."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlab.likelihoods import Categorical
from jaxlab.optimizers import (
    calibration_error,
    distill_loss,
    ensemble_log_loss,
    ensemble_outputs,
    ensemble_predict,
    langevin_sample,
    log_hypothesis_weight,
    mixture_log_loss,
    psgld,
    regret_bound,
    regret_curve,
    sgld,
    sgld_sample,
    sgld_step_size,
)

pytestmark = pytest.mark.untyped

KEY = jax.random.key(0)
W = jnp.ones(2)
LINKS = pytest.mark.parametrize("make", [sgld, psgld], ids=["sgld", "psgld"])
MIXTURES = pytest.mark.parametrize(
    "function", [mixture_log_loss, regret_curve], ids=lambda f: f.__name__
)
OUTPUTS = jnp.zeros((3, 4, 2))
TARGETS = jnp.zeros(4, jnp.int32)


def density(w):
    return -jnp.sum(w**2)


def loss(w, x):
    return jnp.mean((w - x) ** 2)


def chain(**options):
    return langevin_sample(
        KEY, density, W, **{"step_size": 0.1, "steps": 4} | options
    ).samples


def posterior(key=KEY, loss_fn=loss, params=1.0, data=None, **options):
    data = jnp.arange(6.0) if data is None else data
    options = {"step_size": 0.1, "steps": 4, "batch_size": 2} | options
    return sgld_sample(key, loss_fn, params, data, **options).samples


# The links


@LINKS
@pytest.mark.parametrize("number", [-1, -0.1, float("nan"), float("inf")])
@pytest.mark.parametrize("word", ["step_size", "temperature", "prior_precision"])
def test_numbers_are_not_negative(make, word, number):
    message = f"{make.__name__}: {word} must be finite and >= 0, got {number}"
    with pytest.raises(ValueError, match=message):
        make(**{"step_size": 0.1, "num_data": 3, word: number})


@LINKS
@pytest.mark.parametrize("count", [0, -3, 2.0, True, None, jnp.int32(3)], ids=str)
def test_num_data_is_a_count(make, count):
    message = rf"{make.__name__}: num_data must be the number of examples .* static"
    with pytest.raises(ValueError, match=message):
        make(0.1, num_data=count)


def test_decay_and_eps():
    for decay in (-0.1, 1.0, float("nan"), True, "0.9", jnp.float32(0.9)):
        with pytest.raises(ValueError, match=r"decay must be a number in \[0, 1\)"):
            psgld(0.1, num_data=2, decay=decay)
    for eps in (0.0, -1e-5, float("inf"), float("nan"), True, jnp.float32(1e-5)):
        with pytest.raises(ValueError, match="eps must be a number > 0"):
            psgld(0.1, num_data=2, eps=eps)
    assert psgld(0.1, num_data=np.int64(2), decay=0, eps=1)


@LINKS
def test_a_key_is_needed(make):
    tx, name = make(0.1, num_data=2), make.__name__
    message = rf"{name} needs key=: call update\(\.\.\., key=key\) .* or give the link"
    with pytest.raises(ValueError, match=message):
        tx.update(W, tx.init(W))


@LINKS
@pytest.mark.parametrize(
    ("key", "got"),
    [
        (3, "int"),
        (jnp.zeros(2, jnp.uint32), r"uint32\[2\]"),
        (jax.random.split(KEY, 2), r"key<fry>\[2\]"),
    ],
    ids=["seed", "legacy", "two"],
)
def test_keys_are_single_and_typed(make, key, got):
    message = rf"key must be one typed key such as jax\.random\.key\(0\), got {got}"
    tx = make(0.1, num_data=2)
    with pytest.raises(ValueError, match=f"{make.__name__}: {message}"):
        make(0.1, num_data=2, key=key)
    with pytest.raises(ValueError, match=message):
        tx.update(W, tx.init(W), key=key)
    with pytest.raises(ValueError, match=f"langevin_sample: {message}"):
        langevin_sample(key, density, W, step_size=0.1, steps=2)
    with pytest.raises(ValueError, match=f"sgld_sample: {message}"):
        posterior(key=key)


@LINKS
def test_a_prior_needs_params(make):
    tx = make(0.1, num_data=2, prior_precision=1.0)
    message = rf"{make.__name__} needs params for its prior: call update\(grads, state"
    with pytest.raises(ValueError, match=message):
        tx.update(W, tx.init(W), key=KEY)


@LINKS
@pytest.mark.parametrize(
    ("leaf", "kind"),
    [(jnp.arange(2), "int32"), (jnp.ones(2, complex), "complex64")],
    ids=["int", "complex"],
)
def test_leaves_are_floating(make, leaf, kind):
    tx, tree = make(0.1, num_data=2), {"w": W, "n": leaf}
    message = rf"real floating-point arrays, got {kind} at {{}}\['n'\]"
    with pytest.raises(ValueError, match=message.format("params")):
        tx.init(tree)
    with pytest.raises(ValueError, match=message.format("updates")):
        tx.update(tree, tx.init({"w": W, "n": W}), key=KEY)
    with pytest.raises(ValueError, match=message.format("params")):
        langevin_sample(KEY, lambda p: density(p["w"]), tree, step_size=0.1, steps=2)
    with pytest.raises(ValueError, match=f"{make.__name__}: params has no entries"):
        tx.init({})


def test_step_sizes_of_a_schedule():
    for word in ("scale", "offset"):
        for number in (-1, float("nan"), float("inf")):
            with pytest.raises(ValueError, match=f"{word} must be finite and >= 0"):
                sgld_step_size(**{"scale": 1.0, word: number})
        with pytest.raises(ValueError, match=f"{word} must be finite and > 0, got 0"):
            sgld_step_size(**{"scale": 1.0, word: 0})
    for power in (0.5, 1.1, 0):
        with pytest.raises(ValueError, match=r"power must be in \(0\.5, 1\], got .*"):
            sgld_step_size(1.0, power=power)


# The chains


@pytest.mark.parametrize("run", [chain, posterior], ids=["density", "data"])
def test_counts_of_a_chain(run):
    for steps in (0, -1, 2.0, True, None):
        with pytest.raises(ValueError, match="steps must be an integer >= 1, got"):
            run(steps=steps)
    for burn_in in (-1, 4, 2.0, True):
        with pytest.raises(ValueError, match=r"burn_in must be .* 0 <= burn_in < 4"):
            run(burn_in=burn_in)
    for thin in (0, 3, 1.0, True):
        with pytest.raises(ValueError, match="thin must be an integer from 1 to 2,"):
            run(thin=thin)
    with pytest.raises(ValueError, match="step_size must be finite and >= 0, got -1"):
        run(step_size=-1)
    with pytest.raises(ValueError, match="temperature must be finite and >= 0"):
        run(temperature=-1)


def test_densities_are_floating_scalars():
    start = lambda f: langevin_sample(KEY, f, W, step_size=0.1, steps=2)
    message = "langevin_sample: log_density must give one floating scalar, got"
    for wrong, got in (
        (lambda w: w, r"\(float32\[2\]\)"),
        (lambda w: (density(w), w), r"\(float32\[\], float32\[2\]\)"),
        (lambda w: jnp.sum(w > 0), r"\(int32\[\]\)"),
        (lambda w: None, r"\(\)"),
    ):
        with pytest.raises(ValueError, match=rf"{message} {got}; add its entries up"):
            start(wrong)
    message = "log_density must be a function that gives one floating scalar, got float"
    with pytest.raises(ValueError, match=message):
        start(1.0)
    with pytest.raises(ValueError, match="sgld_sample: loss_fn must give one"):
        posterior(loss_fn=lambda w, x: w - x)
    with pytest.raises(ValueError, match="sgld_sample: loss_fn must be a function"):
        posterior(loss_fn=None)


def test_data_have_rows():
    message = "sgld_sample: every array of a batch needs one row per example"
    for data in (jnp.ones(0), (jnp.ones(3), jnp.ones(2)), jnp.ones(())):
        with pytest.raises(ValueError, match=message):
            posterior(data=data)
    with pytest.raises(ValueError, match="got float in place of arrays"):
        posterior(data=(jnp.ones(3), 1.0))
    for size in (0, -1, 2.0, True):
        with pytest.raises(ValueError, match="batch_size must be an integer >= 1, got"):
            posterior(batch_size=size)
    with pytest.raises(ValueError, match="prior_precision must be finite and >= 0"):
        posterior(prior_precision=-1.0)


# Mixtures


@MIXTURES
def test_classes_have_one_prior(function):
    name = function.__name__
    message = rf"{name}: log_likelihoods must have shape \(steps, hypotheses\) and"
    for table, prior in (
        (jnp.zeros(3), jnp.zeros(3)),
        (jnp.zeros((2, 3)), jnp.zeros(2)),
        (jnp.zeros((2, 0)), jnp.zeros(0)),
        (jnp.zeros((2, 3)), jnp.zeros((1, 3))),
    ):
        with pytest.raises(ValueError, match=message):
            function(table, prior)
    with pytest.raises(ValueError, match="log_likelihoods must be floating, got int32"):
        function(jnp.zeros((2, 3), int), jnp.zeros(3))
    with pytest.raises(ValueError, match="log_prior must be floating, got int32"):
        function(jnp.zeros((2, 3)), jnp.zeros(3, int))
    for beta in (-1.0, float("nan")):
        with pytest.raises(ValueError, match=f"{name}: beta must be finite and >= 0"):
            function(jnp.zeros((2, 3)), jnp.zeros(3), beta=beta)


def test_references_have_the_length_of_the_data():
    for wrong in (jnp.zeros(3), jnp.zeros((2, 1)), jnp.zeros(())):
        with pytest.raises(ValueError, match="one log-likelihood for each of the 2"):
            regret_curve(jnp.zeros((2, 3)), jnp.zeros(3), reference=wrong)


@pytest.mark.parametrize(
    ("function", "word"),
    [(log_hypothesis_weight, "eps"), (regret_bound, "n")],
    ids=["weight", "bound"],
)
def test_divergences_have_one_prior(function, word):
    name, good = function.__name__, {word: 1.0}
    message = rf"{name}: kl and log_prior must both have shape \(hypotheses,\)"
    for shapes in (((2,), (3,)), ((2, 1), (2, 1)), ((0,), (0,)), ((), ())):
        with pytest.raises(ValueError, match=message):
            function(*map(jnp.zeros, shapes), **good)
    with pytest.raises(ValueError, match="kl must be floating, got int32"):
        function(jnp.arange(2), jnp.zeros(2), **good)
    for number in (-1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"{name}: {word} must be finite and >= 0"):
            function(jnp.zeros(2), jnp.zeros(2), **{word: number})


# Ensembles


def test_samples_share_their_leading_axis():
    message = "every leaf of samples needs one entry per sample .* got leading axes"
    for samples in ({"a": jnp.ones(2), "b": jnp.ones(3)}, 1.0, {}, jnp.ones((0, 2))):
        with pytest.raises(ValueError, match=f"ensemble_outputs: {message}"):
            ensemble_outputs(lambda p, x: x, samples, jnp.ones(2))


@pytest.mark.parametrize(
    "function",
    [
        ensemble_predict,
        lambda x, **o: ensemble_log_loss(Categorical(), x, TARGETS, **o),
    ],
    ids=["predict", "log_loss"],
)
def test_members_of_an_ensemble(function):
    for wrong in (jnp.ones(3), jnp.ones(()), jnp.ones((0, 4, 2))):
        with pytest.raises(ValueError, match=r"outputs must have shape \(members, "):
            function(wrong)
    for weights in (jnp.zeros(2), jnp.zeros((3, 1)), 1.0):
        with pytest.raises(ValueError, match="one entry for each of the 3 members"):
            function(OUTPUTS, log_weights=weights)


def test_students_have_the_shape_of_the_teacher():
    for student, teacher in ((OUTPUTS, OUTPUTS[0]), (jnp.ones(()), jnp.ones(()))):
        with pytest.raises(ValueError, match="distill_loss: student_logits and teache"):
            distill_loss(student, teacher)
    with pytest.raises(ValueError, match="one entry per row"):
        distill_loss(OUTPUTS, OUTPUTS, weights=jnp.ones(5))


def test_calibration_takes_classes_and_bins():
    for bins in (0, -1, 2.0, True, None):
        with pytest.raises(ValueError, match="bins must be an integer >= 1, got"):
            calibration_error(OUTPUTS[0], TARGETS, bins=bins)
    for targets in (TARGETS[:2], OUTPUTS[0]):
        with pytest.raises(ValueError, match=r"shape \(\.\.\., classes\) and targets"):
            calibration_error(OUTPUTS[0], targets)
    with pytest.raises(ValueError, match="integers of classes, got float32; take the"):
        calibration_error(OUTPUTS[0], jnp.ones(4))


# What is welcome


def test_numpy_arrays_and_python_numbers_are_welcome():
    w = np.ones(2, np.float32)
    for make in (sgld, psgld):
        tx = make(np.float32(0.1), num_data=np.int64(3), prior_precision=np.float64(1))
        got, _ = tx.update(w, tx.init(w), w, key=KEY)
        want, _ = tx.update(W, tx.init(W), W, key=KEY)
        np.testing.assert_array_equal(got, want)
        tree = {"w": 1.0, "b": None}
        updates, _ = tx.update(tree, tx.init(tree), tree, key=KEY)
        assert np.isfinite(updates["w"])
        chained = optax.chain(tx, optax.identity())
        chained.update(w, chained.init(w), w, key=KEY)
    got = posterior(data=np.arange(6.0), steps=np.int64(4), batch_size=np.int64(2))
    np.testing.assert_array_equal(got, posterior())
    np.testing.assert_array_equal(chain(thin=np.int64(1)), chain())
    table, prior = np.full((3, 2), -1.0), np.zeros(2)
    np.testing.assert_allclose(mixture_log_loss(table, prior).losses, 1.0, rtol=1e-6)
    assert regret_bound(np.zeros(2), prior, n=np.int64(3)).bound == 0
    outputs = np.asarray(OUTPUTS)
    np.testing.assert_allclose(np.exp(ensemble_predict(outputs)), 0.5, rtol=1e-6)
    assert float(distill_loss(outputs, np.log(np.full((3, 4, 2), 0.5)))) < 1e-6
    assert float(calibration_error(outputs[0], np.asarray(TARGETS))) == 0.5
