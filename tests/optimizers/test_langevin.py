"""Langevin chains, mixtures and ensembles against exact sums and exact covariances."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlab.likelihoods import Bernoulli, Categorical, Gaussian
from jaxlab.objective import Objective, plain
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
from jaxlab.training import create_state, make_train_step

KEY = jax.random.key(7)
TIGHT = {"rtol": 1e-12, "atol": 1e-13}
MIXTURE, REGRET, BOUND = map(jax.jit, (mixture_log_loss, regret_curve, regret_bound))
PREDICT, ENSEMBLE, DISTILL = map(
    jax.jit, (ensemble_predict, ensemble_log_loss, distill_loss)
)
CALIBRATION = jax.jit(calibration_error, static_argnames="bins")
LINKS = pytest.mark.parametrize("make", [sgld, psgld], ids=["sgld", "psgld"])


def random_class(seed=0, n=12, k=5):
    """Gives likelihoods (n, k) and a prior of k hypotheses."""
    rng = np.random.default_rng(seed)
    return rng.uniform(0.05, 1, size=(n, k)), rng.dirichlet(np.ones(k))


# Mixtures: the oracle is the sum over the class, written out


def test_mixtures_are_sums_over_the_class(x64):
    p, w = random_class()
    got = MIXTURE(np.log(p), np.log(w))
    joint = w * np.cumprod(p, axis=0)
    marginal = np.concatenate([[1.0], joint.sum(axis=1)])
    np.testing.assert_allclose(got.losses, -np.log(marginal[1:] / marginal[:-1]))
    np.testing.assert_allclose(
        jnp.exp(got.log_posterior), joint[-1] / marginal[-1], **TIGHT
    )
    # Any order of the data, any scale of the prior.
    again = MIXTURE(np.log(p[::-1]), np.log(w) + 3.0)
    np.testing.assert_allclose(again.losses.sum(), got.losses.sum(), **TIGHT)
    np.testing.assert_allclose(again.log_posterior, got.log_posterior, **TIGHT)


@pytest.mark.parametrize("beta", [0.0, 0.5, 2.0])
def test_powers_of_the_likelihood(beta, x64):
    p, w = random_class(1)
    p[3, 0] = 0.0  # at beta = 0 nothing is excluded
    losses, weights = [], w
    for row in p:
        losses.append(-np.log(weights @ row))
        weights = weights * row**beta
        weights = weights / weights.sum()
    got = MIXTURE(jnp.log(p), np.log(w), beta=beta)
    np.testing.assert_allclose(got.losses, losses, **TIGHT)
    np.testing.assert_allclose(jnp.exp(got.log_posterior), weights, **TIGHT)


def test_coins_have_the_beta_integral(x64):
    n, heads = 30, 9
    tosses = np.random.default_rng(0).permutation(np.arange(n) < heads)
    log_beta = math.lgamma(heads + 1) + math.lgamma(n - heads + 1) - math.lgamma(n + 2)
    errors = []
    for size in (50, 500):
        theta = (np.arange(size) + 0.5) / size
        log_p = np.log(np.where(tosses[:, None], theta, 1 - theta))
        loss = MIXTURE(jnp.asarray(log_p), jnp.zeros(size)).losses.sum()
        errors.append(abs(float(loss) + log_beta))
    assert errors[1] < errors[0] < 1e-3
    assert errors[1] < 1e-5


def test_regret_against_the_best_and_against_a_truth(x64):
    p, w = random_class(2, n=40)
    log_p, log_w = np.log(p), np.log(w)
    total = -np.log((w * np.cumprod(p, axis=0)).sum(axis=1))
    lost = -np.cumsum(log_p, axis=0)
    got = REGRET(jnp.asarray(log_p), jnp.asarray(log_w))
    np.testing.assert_allclose(got, total - lost.min(axis=1), **TIGHT)
    assert (np.asarray(got) <= -log_w[lost.argmin(axis=1)] + 1e-12).all()
    truth = jnp.asarray(log_p[:, 2])
    got = regret_curve(jnp.asarray(log_p), jnp.asarray(log_w), reference=truth)
    np.testing.assert_allclose(got, total - lost[:, 2], **TIGHT)
    assert (got <= -log_w[2] + 1e-12).all()


def test_a_small_regret_keeps_its_digits_in_float32():
    log_p = -1000.0 + jnp.zeros((2000, 2)).at[:, 1].add(-1e-3)
    regret = regret_curve(log_p, jnp.zeros(2))[-1]
    exact = math.log(2) - math.log1p(math.exp(-2))
    assert abs(float(regret) - exact) < 0.05  # of losses of 2 million
    million = jnp.full((3, 10**6), -5.0)
    np.testing.assert_allclose(
        MIXTURE(million, jnp.zeros(10**6)).losses, 5.0, rtol=2e-6
    )


# Weights and bounds


def test_bounds_are_minima_over_all_radii(x64):
    rng = np.random.default_rng(3)
    kl = np.round(rng.exponential(size=30), 1)  # with ties
    w = rng.dirichlet(np.ones(30))
    for n in (0, 1, 7, 1e6):
        grid = np.unique(np.concatenate([kl, np.linspace(0, kl.max(), 500)]))
        inside = np.array([w[kl <= eps].sum() for eps in grid])
        with np.errstate(divide="ignore"):
            want = (n * grid - np.log(inside)).min()
        got = BOUND(jnp.asarray(kl), np.log(w), n=n)
        np.testing.assert_allclose(got.bound, want, **TIGHT)
        np.testing.assert_allclose(got.bound, n * got.eps - got.log_weight, **TIGHT)
        weight = log_hypothesis_weight(jnp.asarray(kl), np.log(w), eps=got.eps)
        np.testing.assert_allclose(weight, got.log_weight, **TIGHT)
    assert log_hypothesis_weight(jnp.ones(2), jnp.zeros(2), eps=0.5) == -jnp.inf
    far = regret_bound(jnp.array([0.1, jnp.inf]), jnp.log(jnp.array([0.5, 0.5])), n=0)
    np.testing.assert_allclose(far.bound, 0.0, atol=1e-12)  # 0 x infinity is 0 here


def test_a_smooth_class_costs_half_a_log_per_parameter(x64):
    # Coins around 1/2: w(A_eps) ~ eps^(1/2), hence (1/2) ln n + O(1).
    theta = (np.arange(200_000) + 0.5) / 200_000
    kl = -0.5 * np.log(4 * theta * (1 - theta))
    found = [
        float(BOUND(jnp.asarray(kl), jnp.zeros(kl.size), n=n).bound) for n in (1e3, 1e5)
    ]
    np.testing.assert_allclose(found[1] - found[0], 0.5 * math.log(100), rtol=0.01)


def test_expected_regret_is_below_the_bound_by_exact_enumeration(x64):
    # All 2^n sequences of a coin, so the expectation is a sum.
    truth, n = 0.3, 8
    theta = np.array([0.1, 0.25, 0.5, 0.8])
    w = np.array([0.1, 0.2, 0.3, 0.4])
    kl = truth * np.log(truth / theta) + 0.7 * np.log(0.7 / (1 - theta))
    bits = (np.arange(2**n)[:, None] >> np.arange(n)) & 1
    log_p = np.where(bits[..., None], np.log(theta), np.log(1 - theta))
    log_star = np.where(bits, np.log(truth), np.log(0.7))
    curves = jax.jit(jax.vmap(lambda p, r: regret_curve(p, np.log(w), reference=r)))(
        jnp.asarray(log_p), jnp.asarray(log_star)
    )
    expected = np.exp(log_star.sum(1)) @ np.asarray(curves)
    bounds = jax.vmap(lambda n: regret_bound(jnp.asarray(kl), np.log(w), n=n).bound)(
        jnp.arange(1.0, n + 1)
    )
    assert (expected > 0).all()
    assert (expected <= bounds).all()


def test_regret_depends_on_the_weight_and_not_on_the_size_of_the_class(x64):
    # 1 % of the prior at the truth, the rest on coins that are far from it.
    rng = np.random.default_rng(0)
    tosses = rng.random(400) < 0.5
    log_p = lambda theta: np.log(np.where(tosses[:, None], theta, 1 - theta))
    truth = jnp.full(400, math.log(0.5))

    def final(size, mass):
        theta = np.concatenate([[0.5], rng.uniform(0.8, 0.99, size=size)])
        prior = np.concatenate([[mass], np.full(size, (1 - mass) / size)])
        kl = -0.5 * np.log(4 * theta * (1 - theta))
        regret = REGRET(jnp.asarray(log_p(theta)), np.log(prior), reference=truth)
        bound = float(regret_bound(jnp.asarray(kl), np.log(prior), n=400).bound)
        assert regret[-1] <= bound + 1e-9
        return regret[-1]

    few, many = final(10, 0.01), final(3000, 0.01)
    assert abs(many - few) < 0.1
    half = final(3000, 0.005)
    np.testing.assert_allclose(half - many, math.log(2), atol=1e-6)


# One step, written by hand


def unit_noise(make, tree, key, count):
    """Gives the noise of one step: no gradient, and h T = 1."""
    tx = make(
        2.0, num_data=1, temperature=0.5, **({} if make is sgld else {"eps": 1.0})
    )
    state = tx.init(tree)._replace(count=jnp.int32(count))
    nothing = jax.tree.map(jnp.zeros_like, tree)
    return jax.tree.leaves(tx.update(nothing, state, tree, key=key)[0])


@LINKS
def test_steps_are_those_of_the_formula(make, x64):
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=(3, 2))), "b": jnp.ones(2)}
    n, precision, decay, eps = 50, 0.7, 0.9, 1e-2
    tx = make(
        optax.linear_schedule(0.02, 0.0, 10),
        num_data=n,
        temperature=optax.linear_schedule(1.0, 0.0, 4),
        prior_precision=precision,
        **({} if make is sgld else {"decay": decay, "eps": eps}),
    )
    update, state = jax.jit(tx.update), tx.init(params)
    square = [np.zeros(p.shape) for p in jax.tree.leaves(params)]
    for count in range(3):
        grads = jax.tree.map(lambda p, c=count: jnp.cos(p + c), params)
        key = jax.random.fold_in(KEY, count)
        got, state = update(grads, state, params, key=key)
        noise = unit_noise(make, params, key, count)
        h, t = 0.02 * (1 - count / 10), 1 - count / 4
        pairs = zip(*map(jax.tree.leaves, (got, grads, params)), strict=True)
        for i, (ours, g, p) in enumerate(pairs):
            square[i] = decay * square[i] + (1 - decay) * np.square(g)
            rms = np.sqrt(square[i] / (1 - decay ** (count + 1)))
            metric = 1.0 if make is sgld else 1 / (eps + rms)
            slope = n * np.asarray(g) + precision * np.asarray(p)
            want = -h / 2 * metric * slope + np.sqrt(h * t * metric) * noise[i]
            # The schedules are float32.
            np.testing.assert_allclose(ours, want, rtol=3e-6)
    assert int(state.count) == 3
    assert update._cache_size() == 1
    if make is psgld:
        chex.assert_trees_all_close(jax.tree.leaves(state.square), square, **TIGHT)


@LINKS
def test_the_noise_is_normal_of_variance_one(make):
    (noise,) = unit_noise(make, jnp.zeros(100_000), KEY, 0)
    noise = np.asarray(noise, np.float64)
    assert abs(noise.mean()) < 4 / np.sqrt(noise.size)
    assert abs(noise.var() - 1) < 4 * np.sqrt(2 / noise.size)
    assert abs((noise**4).mean() - 3) < 4 * np.sqrt(96 / noise.size)


@LINKS
def test_without_temperature_it_is_descent(make, x64):
    # On a gradient of the mean: n/2 times plain descent, or times scaled descent.
    g = jnp.array([0.5, -2.0])
    tx = make(0.1, num_data=20, temperature=0.0)
    updates, _ = tx.update(g, tx.init(g), key=KEY)
    scale = 1.0 if make is sgld else 1 / (1e-5 + jnp.abs(g))
    np.testing.assert_allclose(updates, -0.1 * 20 / 2 * scale * g, rtol=1e-6)


@LINKS
def test_data_sets_beyond_an_int32(make):
    tx = make(1e-9, num_data=3 * 10**9, temperature=0.0, prior_precision=1.0)
    w = jnp.ones(2)
    updates, _ = tx.update(w, tx.init(w), w, key=KEY)
    scale = 1.0 if make is sgld else 1 / (1 + 1e-5)
    np.testing.assert_allclose(updates, -1.5 * scale, rtol=1e-6)


def test_step_sizes_fall_as_they_should(x64):
    schedule = jax.jit(sgld_step_size(0.3, offset=2.0, power=0.7))
    for step in (0, 1, 100, 2**31 - 1):
        want = 0.3 * (2.0 + step) ** -0.7
        np.testing.assert_allclose(schedule(jnp.int32(step)), want, rtol=1e-12)


# Keys, dtypes, other links


@LINKS
def test_keys_decide_the_noise(make):
    tree = {"a": jnp.zeros(1000), "b": jnp.zeros(1000)}
    draw = lambda key, count: unit_noise(make, tree, key, count)
    samples = [*draw(KEY, 0), *draw(KEY, 1), *draw(jax.random.key(8), 0)]
    for i, one in enumerate(samples):
        for other in samples[:i]:
            assert abs(np.corrcoef(one, other)[0, 1]) < 5 / np.sqrt(1000)
    chex.assert_trees_all_equal(draw(KEY, 0), samples[:2])


@LINKS
def test_a_kept_key_goes_first_and_survives_a_donated_state(make):
    tx, w = make(0.1, num_data=4, key=KEY), jnp.ones(4)
    one, _ = tx.update(w, tx.init(w))
    two, _ = tx.update(w, tx.init(w), key=jax.random.key(9), value=1.0, grad=w)
    chex.assert_trees_all_equal(one, two)
    step = jax.jit(lambda state: tx.update(w, state), donate_argnums=0)
    for _ in range(2):
        chex.assert_trees_all_close(step(tx.init(w))[0], one, rtol=1e-5)


@LINKS
def test_narrow_parameters_keep_their_dtype(make):
    for dtype in ("bfloat16", "float16"):
        # Squares of 300 overflow float16; n g does too.
        g = jnp.full(4, 300.0, dtype)
        tx = make(1e-6, num_data=1000, temperature=0.0, prior_precision=1.0)
        updates, state = tx.update(g, tx.init(g), g, key=KEY)
        assert updates.dtype == g.dtype
        assert jnp.isfinite(updates).all()
        wide = {leaf.dtype for leaf in jax.tree.leaves(state)} - {jnp.dtype("int32")}
        assert wide <= {jnp.dtype("float32")}


@LINKS
def test_masks_and_partitions_leave_the_noise_of_others_alone(make):
    params = {"w": jnp.ones((3, 2)), "head": {"b": jnp.ones(2)}}
    whole = make(0.1, num_data=5, prior_precision=1.0)
    full, _ = whole.update(params, whole.init(params), params, key=KEY)
    tx = optax.partition(
        {"sample": whole, "train": optax.sgd(0.5)}, {"w": "sample", "head": "train"}
    )
    got, _ = tx.update(params, tx.init(params), params, key=KEY)
    chex.assert_trees_all_equal(got["w"], full["w"])
    assert got["head"]["b"].tolist() == [-0.5, -0.5]


@LINKS
def test_injected_numbers_and_schedules(make):
    static = ("num_data", "decay", "eps", "key")
    static = static if make is psgld else ("num_data", "key")
    numbers = {"step_size": 0.1, "temperature": 0.5, "prior_precision": 2.0}
    w = jnp.arange(3.0)
    plain_link = make(num_data=5, **numbers)
    want, _ = plain_link.update(w, plain_link.init(w), w, key=KEY)
    schedules = {k: optax.constant_schedule(v) for k, v in numbers.items()}
    for values in (numbers, schedules):
        tx = optax.inject_hyperparams(make, static_args=static)(num_data=5, **values)
        update = jax.jit(tx.update)
        got, state = update(w, tx.init(w), w, key=KEY)
        update(w, state, w, key=KEY)
        chex.assert_trees_all_close(got, want, rtol=1e-5)
        assert set(state.hyperparams) == set(numbers)
        assert update._cache_size() == 1


@LINKS
def test_the_training_step_feeds_its_key_through_a_chain(make):
    objective = Objective(plain(lambda w, x: x @ w), Gaussian())
    batch = (jnp.eye(4)[:, :2], jnp.ones((4, 1)))
    link = make(1e-3, num_data=4, prior_precision=1.0)
    tx = optax.chain(optax.clip_by_global_norm(10.0), link)
    step = make_train_step(objective, tx, donate=False)
    start = create_state(KEY, jnp.zeros((2, 1)), tx)
    first, _ = step(start, batch)
    second, _ = step(first, batch)
    assert step._cache_size() == 1
    _, key = jax.random.split(jax.random.fold_in(KEY, 0))
    (_, _), grads = objective.value_and_grad(start.params, (), batch)
    want, _ = link.update(grads, link.init(grads), start.params, key=key)
    chex.assert_trees_all_close(first.params, want, rtol=1e-5, atol=1e-7)
    # The same again, and from the middle of the run.
    again, _ = step(first, batch)
    chex.assert_trees_all_equal(second.params, again.params)
    assert (second.params - first.params != first.params).all()


def test_inside_multi_steps_it_moves_by_the_mean():
    tx, w = sgld(0.1, num_data=6, prior_precision=1.0), jnp.ones(3)
    outer = optax.MultiSteps(tx, 2)
    state = outer.init(w)
    still, state = outer.update(w, state, w, key=jax.random.key(1))
    got, _ = outer.update(3 * w, state, w, key=KEY)
    want, _ = tx.update(2 * w, tx.init(w), w, key=KEY)
    assert not still.any()
    chex.assert_trees_all_close(got, want, rtol=1e-6)


# Chains


def exact_covariance(precision, h, temperature=1.0):
    k = np.asarray(precision)
    eye = np.eye(len(k))
    return temperature * np.linalg.inv(k) @ np.linalg.inv(eye - h * k / 4)


def quadratic():
    turn, _ = np.linalg.qr(np.random.default_rng(2).normal(size=(3, 3)))
    return turn @ np.diag([1.0, 2.0, 4.0]) @ turn.T


def test_the_covariance_solves_its_own_equation():
    k, h = quadratic(), 0.4
    found = np.zeros((3, 3))
    for _ in range(400):
        shrink = np.eye(3) - h * k / 2
        found = shrink @ found @ shrink.T + h * np.eye(3)
    np.testing.assert_allclose(found, exact_covariance(k, h), rtol=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 0.25])
def test_chains_have_the_exact_covariance(temperature):
    k, h, mean = quadratic(), 0.4, np.array([1.0, -2.0, 0.5])
    log_density = lambda w: -0.5 * (w - mean) @ jnp.asarray(k, jnp.float32) @ (w - mean)
    chains, settings = 500, {"step_size": h, "temperature": temperature}

    @jax.jit
    @jax.vmap
    def run(key):
        start = jnp.zeros(3)
        return langevin_sample(
            key, log_density, start, steps=80, burn_in=60, thin=20, **settings
        )

    # Independent chains, so that the standard errors are those of independent draws.
    many = 40 * chains
    draws = np.asarray(run(jax.random.split(KEY, many)).samples[:, 0], np.float64)
    want = exact_covariance(k, h, temperature)
    off = draws - mean
    found = off.T @ off / many
    error = np.sqrt((np.outer(np.diag(want), np.diag(want)) + want**2) / many)
    assert (np.abs(found - want) < 5 * error).all()
    assert (np.abs(off.mean(0)) < 5 * np.sqrt(np.diag(want) / many)).all()
    # Far from the covariance of the density itself.
    assert abs(found - temperature * np.linalg.inv(k)).max() > 10 * error.max()


def test_steps_beyond_four_over_the_curvature_diverge():
    log_density = lambda w: -0.5 * 2.0 * jnp.sum(w**2)
    last = lambda h: langevin_sample(
        KEY, log_density, jnp.ones(50), step_size=h, steps=300
    ).samples[-1]
    assert jnp.abs(last(1.9)).max() < 100
    assert jnp.abs(last(2.1)).max() > 1e3


def test_mini_batches_estimate_the_whole_slope(x64):
    """Mean steps over all batches of one row are the step of the full data."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=12))
    loss = lambda w, batch: 0.5 * jnp.mean((batch - w) ** 2)
    w, tx = jnp.array(0.3), sgld(0.01, num_data=12, temperature=0, prior_precision=3.0)

    @jax.jit
    def move(batch):
        return tx.update(jax.grad(loss)(w, batch), tx.init(w), w, key=KEY)[0]

    full = -0.005 * (jnp.sum(w - x) + 3.0 * w)  # the log-posterior, written out
    np.testing.assert_allclose(move(x), full, **TIGHT)
    rows = jax.vmap(move)(x[:, None])
    np.testing.assert_allclose(rows.mean(), full, **TIGHT)
    # (n / b) times the sum over the batch.
    part = -0.005 * (12 / 3 * jnp.sum(w - x[:3]) + 3.0 * w)
    np.testing.assert_allclose(move(x[:3]), part, **TIGHT)


def test_sgld_samples_the_posterior_of_a_mean():
    x = np.random.default_rng(4).normal(1.0, 1.0, size=50)
    loss_fn = lambda w, batch: 0.5 * jnp.mean((batch - w) ** 2)
    precision, h, batch = 10.0, 2e-3, 25
    k = 50 + precision

    @jax.jit
    @jax.vmap
    def run(key):
        return sgld_sample(
            key,
            loss_fn,
            jnp.array(0.0),
            jnp.asarray(x, jnp.float32),
            step_size=h,
            batch_size=batch,
            steps=200,
            burn_in=199,
            prior_precision=precision,
        ).samples[0]

    draws = np.asarray(run(jax.random.split(KEY, 4000)), np.float64)
    mean = x.sum() / k
    # The mini-batches add the variance (h/2)^2 n^2 var / b to the noise h of a step.
    extra = (h / 2) ** 2 * 50**2 * x.var() / batch
    variance = (h + extra) / (1 - (1 - h * k / 2) ** 2)
    assert abs(draws.mean() - mean) < 5 * np.sqrt(variance / 4000)
    assert abs(draws.var() - variance) < 5 * variance * np.sqrt(2 / 4000)
    assert variance > 1.01 / k


def test_chains_are_a_loop_over_the_link():
    log_density = lambda p: -jnp.sum(p["a"] ** 2) - jnp.sum(jnp.cosh(p["b"]))
    params = {"a": jnp.ones(3), "b": jnp.zeros((), jnp.bfloat16)}
    chain = langevin_sample(
        KEY, log_density, params, step_size=0.1, steps=11, burn_in=2, thin=4
    )
    tx = sgld(0.1, num_data=1)
    p = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
    state, seen = tx.init(p), []
    for _ in range(11):
        value, slope = jax.value_and_grad(lambda p: -log_density(p))(p)
        updates, state = tx.update(slope, state, p, key=KEY)
        p = optax.apply_updates(p, updates)
        seen.append((p, value))
    kept = [seen[6], seen[10]]  # what does not fill a sample goes from the front
    want = jax.tree.map(lambda *leaves: jnp.stack(leaves), *kept)
    chex.assert_trees_all_close(tuple(chain), want, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_equal_shapes_and_dtypes(tuple(chain), want)


def test_counts_of_samples():
    run = lambda **options: (
        langevin_sample(
            KEY, lambda w: -(w**2), 1.0, step_size=0.1, **options
        ).values.shape
    )
    assert run(steps=10) == (5,)
    assert run(steps=1) == (1,)
    assert run(steps=1000) == (100,)
    assert run(steps=1001, burn_in=0) == (91,)
    assert run(steps=10, burn_in=0, thin=10) == (1,)


def test_one_trace_of_a_chain():
    chex.clear_trace_counter()
    data = {"x": jnp.arange(6.0), "n": jnp.arange(6)}
    loss_fn = lambda w, batch: jnp.mean((w - batch["x"]) ** 2 * batch["n"])

    @jax.jit
    @chex.assert_max_traces(n=1)
    def run(key, step_size, start):
        options = {"step_size": step_size, "batch_size": 2, "steps": 4}
        return sgld_sample(key, loss_fn, start, data, **options).samples

    one = run(KEY, 0.01, jnp.ones(2)[0])
    two = run(jax.random.key(1), 0.02, jnp.ones(2)[1])
    assert (one != two).all()
    chex.assert_trees_all_equal(run(KEY, 0.01, jnp.ones(2)[0]), one)


# Ensembles


def test_outputs_of_samples_are_a_loop():
    apply_fn = lambda p, x: x @ p["w"] + p["b"][None]
    rng = np.random.default_rng(0)
    draw = lambda *s: jnp.asarray(rng.normal(size=s), jnp.float32)
    samples, x = {"w": draw(4, 3, 2), "b": draw(4, 2)}, draw(5, 3)
    got = ensemble_outputs(apply_fn, samples, x)
    for i in range(4):
        one = apply_fn(jax.tree.map(lambda leaf, i=i: leaf[i], samples), x)
        np.testing.assert_allclose(got[i], one, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("weighted", [False, True], ids=["alike", "weighed"])
def test_predictions_are_means_of_probabilities(weighted, x64):
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(4, 5, 3)) * 3
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    shares = np.array([0.5, 0.25, 0.25, 0.0]) if weighted else np.full(4, 0.25)
    with np.errstate(divide="ignore"):
        log_weights = np.log(shares) + 7.0 if weighted else None
    if weighted:
        logits[3] = np.nan  # of weight 0
    mean = np.einsum("s,src->rc", shares, p)
    got = PREDICT(jnp.asarray(logits), log_weights=log_weights)
    np.testing.assert_allclose(jnp.exp(got), mean, **TIGHT)
    targets = jnp.asarray(rng.integers(3, size=5))
    found = ENSEMBLE(
        Categorical(), jnp.asarray(logits), targets, log_weights=log_weights
    )
    picked = p[:, np.arange(5), targets]
    np.testing.assert_allclose(found.loss, -np.log(shares @ picked).mean(), **TIGHT)
    np.testing.assert_allclose(found.loss, Categorical().nll(got, targets), **TIGHT)
    members = -np.log(picked).mean(1)
    np.testing.assert_allclose(found.members[:3], members[:3], **TIGHT)
    np.testing.assert_allclose(found.gain, shares @ members - found.loss, **TIGHT)


@pytest.mark.parametrize(
    "likelihood",
    [Categorical(), Bernoulli(), Gaussian(0.5)],
    ids=["categorical", "bernoulli", "gaussian"],
)
def test_ensembles_lose_no_more_than_their_members(likelihood):
    for seed in range(20):
        keys = jax.random.split(jax.random.key(seed), 4)
        scale = 10.0 ** (seed % 4 - 1)
        outputs = scale * jax.random.normal(keys[0], (6, 5, 3))
        targets = likelihood.sample(keys[1], outputs[0])
        weights = jax.random.uniform(keys[2], (5,)).at[0].set(0)
        log_weights = jax.random.normal(keys[3], (6,))
        found = ENSEMBLE(
            likelihood, outputs, targets, weights=weights, log_weights=log_weights
        )
        assert found.gain >= -1e-5 * jnp.abs(found.members).max()
        # For every row, hence for every weighing of the rows.
        best = found.members.min() + jnp.log(6.0) + log_weights.max() + 20
        assert found.loss <= best
    same = jnp.broadcast_to(outputs[:1], outputs.shape)
    gain = ENSEMBLE(likelihood, same, targets).gain
    assert jnp.abs(gain) < 1e-5 * jnp.abs(found.members).max()


def test_padding_counts_for_nothing(x64):
    outputs = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4, 2)))
    targets = jnp.array([0, 1, 1, 0])
    padded = np.pad(outputs, ((0, 0), (0, 2), (0, 0)), constant_values=np.nan)
    more, weights = jnp.array([0, 1, 1, 0, -1, 7]), jnp.array([1.0, 1, 1, 1, 0, 0])
    got = ENSEMBLE(Categorical(), padded, more, weights=weights)
    want = ENSEMBLE(Categorical(), outputs, targets)
    chex.assert_trees_all_close(got, want, **TIGHT)
    logits = [PREDICT(x) for x in (padded, outputs)]
    got = CALIBRATION(logits[0], more, weights=weights)
    np.testing.assert_allclose(got, CALIBRATION(logits[1], targets), **TIGHT)
    got = DISTILL(padded[0], padded[1], weights=weights)
    np.testing.assert_allclose(got, DISTILL(outputs[0], outputs[1]), **TIGHT)


def test_distillation_is_the_divergence(x64):
    rng = np.random.default_rng(3)
    teacher = rng.dirichlet(np.ones(4), size=(2, 3))
    teacher[0, 0] = [0.5, 0.5, 0.0, 0.0]
    logits = rng.normal(size=(2, 3, 4))
    q = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        log_p = np.log(teacher)
        terms = np.where(teacher == 0, 0, teacher * (log_p - np.log(q)))
    got, slope = jax.value_and_grad(DISTILL)(jnp.asarray(logits), jnp.asarray(log_p))
    np.testing.assert_allclose(got, terms.sum(-1).mean(), **TIGHT)
    np.testing.assert_allclose(slope, (q - teacher) / 6, **TIGHT)
    # None where the student is the teacher, up to a constant of the logits.
    log_q = np.log(q)
    np.testing.assert_allclose(DISTILL(log_q + 3.0, log_q), 0, atol=1e-14)
    # The teacher learns nothing.
    back = jax.grad(DISTILL, argnums=1)(jnp.asarray(logits), log_q)
    assert not back.any()


@pytest.mark.parametrize("bins", [1, 4, 15])
def test_calibration_is_a_loop_over_bins(bins, x64):
    rng = np.random.default_rng(5)
    logits = rng.normal(size=(200, 3)) * 2
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    sure, best = p.max(1), p.argmax(1)
    # Too modest below 0.6 and too bold above, so that bins of both signs occur.
    targets = np.where((sure < 0.6) | (rng.random(200) < 0.5), best, (best + 1) % 3)
    right = best == targets
    want = 0.0
    for i in range(bins):
        inside = (sure >= i / bins) & (sure < (i + 1) / bins)
        if inside.any():
            gap = abs(right[inside].mean() - sure[inside].mean())
            want += inside.mean() * gap
    got = CALIBRATION(jnp.asarray(logits), jnp.asarray(targets), bins=bins)
    np.testing.assert_allclose(got, want, **TIGHT)
    certain = jnp.array([[0.0, -jnp.inf]] * 4)
    assert float(CALIBRATION(certain, jnp.array([0, 0, 0, 1]))) == 0.25


# What it is for


def test_a_mean_of_samples_predicts_better_than_one_fit():
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(4, 20)) / 2

    def draw(count):
        labels = rng.integers(4, size=count)
        x = centres[labels] + rng.normal(size=(count, 20))
        return jnp.asarray(x, jnp.float32), jnp.asarray(labels)

    train, test = draw(60), draw(2000)
    apply_fn = lambda p, x: jnp.tanh(x @ p[0]) @ p[1]
    loss_fn = lambda p, batch: Categorical().nll(apply_fn(p, batch[0]), batch[1])
    start = [jax.random.normal(KEY, (20, 16)) / 5, jnp.zeros((16, 4))]

    @jax.jit
    def fitted(params):
        tx = optax.adam(1e-2)

        def body(_, carry):
            p, state = carry
            updates, state = tx.update(jax.grad(loss_fn)(p, train), state)
            return optax.apply_updates(p, updates), state

        return jax.lax.fori_loop(0, 500, body, (params, tx.init(params)))[0]

    @jax.jit
    def sampled(key, params):
        return sgld_sample(
            key,
            loss_fn,
            params,
            train,
            step_size=5e-3,
            batch_size=30,
            steps=2000,
            thin=20,
            prior_precision=1.0,
        ).samples

    fit = fitted(start)
    outputs = ensemble_outputs(apply_fn, sampled(KEY, start), test[0])
    single = apply_fn(fit, test[0])
    found = ENSEMBLE(Categorical(), outputs, test[1])
    logits = PREDICT(outputs)
    right = lambda z: float(jnp.mean(jnp.argmax(z, axis=-1) == test[1]))
    assert found.loss < 0.7 * Categorical().nll(single, test[1])
    assert found.gain > 0.05
    errors = [float(CALIBRATION(z, test[1])) for z in (logits, single)]
    assert errors[0] < 0.5 * errors[1]
    assert right(logits) > right(single) - 0.01
