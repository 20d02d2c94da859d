"""PAC-Bayes: inverse of the binary divergence, Gaussians, analytic posterior, grid."""

import functools
import math
import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from jaxlab.curvature.pac_bayes import (
    gaussian_kl_low_rank,
    gibbs_error,
    inverse_kl,
    pac_bayes_analytic,
    pac_bayes_grid,
    sample_gaussian_low_rank,
)

GOLDEN = np.load(pathlib.Path(__file__).parents[1] / "goldens" / "hessian.npz")


def kl(q, p):
    """Binary divergence from the definition, in long double."""
    q, p = np.longdouble(q), np.longdouble(p)
    part = lambda a, b: a * np.log(a / b) if a > 0 else np.longdouble(0)
    return part(q, p) + part(1 - q, 1 - p)


ERRORS = (1e-9, 1e-3, 0.02, 0.3, 0.5, 0.9, 0.999)
BOUNDS = (1e-12, 1e-6, 1e-2, 0.3, 2.0, 20.0)


def brent(error, bound):
    """Solves for ln(1 - p), which keeps its digits near p = 1."""
    q = np.longdouble(error)

    def short(log_rest):
        p = -np.expm1(np.longdouble(log_rest))
        left = q * np.log(q / p) + (1 - q) * (np.log1p(-q) - np.longdouble(log_rest))
        return float(left - bound)

    log_rest = scipy.optimize.brentq(
        short, -1e5, math.log1p(-error), xtol=1e-15, rtol=1e-15
    )
    return -math.expm1(log_rest)


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("error", ERRORS)
def test_inverse_kl_against_brentq(x64, error, bound):
    found = float(inverse_kl(error, bound))
    assert error <= found <= 1
    # brentq knows ln(1 - p) to 4e-16 at best.
    np.testing.assert_allclose(found, brent(error, bound), rtol=1e-12, atol=4e-15)
    gap = found - error
    if gap > 1e-3 and found < 0.999:
        np.testing.assert_allclose(float(kl(error, found)), bound, rtol=1e-9)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_inverse_kl_is_an_upper_bound(x64, dtype):
    """Rounded up: no divergence at the result falls short of the bound."""
    errors, bounds = np.meshgrid(
        np.linspace(0.01, 0.6, 30), np.geomspace(1e-3, 0.3, 30)
    )
    errors, bounds = (jnp.asarray(x, dtype) for x in (errors, bounds))
    found = np.asarray(inverse_kl(errors, bounds))
    assert found.dtype == dtype
    short = np.vectorize(kl)(np.asarray(errors), found) - np.asarray(bounds)
    assert (short > -8 * np.finfo(dtype).eps).all()
    assert (short < 100 * np.finfo(dtype).eps).all()


def test_inverse_kl_ends(x64):
    c = jnp.geomspace(1e-9, 30, 20)
    np.testing.assert_allclose(inverse_kl(0.0, c), -np.expm1(-c), rtol=1e-15)
    np.testing.assert_array_equal(inverse_kl(1.0, c), 1)
    e = jnp.linspace(0, 1, 20)
    np.testing.assert_array_equal(inverse_kl(e, 0.0), e)
    np.testing.assert_array_equal(inverse_kl(e, jnp.inf), 1)
    tiny = inverse_kl(1e-300, c)
    np.testing.assert_allclose(tiny, -np.expm1(-c), rtol=1e-12)
    nan = jnp.array(jnp.nan)
    for bad in ((nan, 0.1), (0.1, nan), (jnp.array(1.1), 0.1), (0.1, -c)):
        assert np.isnan(inverse_kl(*bad)).all()


def test_inverse_kl_is_monotone_and_below_pinsker(x64):
    e, c = jnp.meshgrid(jnp.linspace(0, 0.999, 40), jnp.geomspace(1e-8, 3, 50))
    b = inverse_kl(e, c)
    assert (jnp.diff(b, axis=0) >= 0).all()
    assert (jnp.diff(b, axis=1) >= 0).all()
    assert (b <= jnp.minimum(e + jnp.sqrt(c / 2), 1) + 1e-15).all()


@pytest.mark.parametrize("error", [0.0, 1e-6, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("bound", [1e-4, 0.05, 1.0])
def test_inverse_kl_derivatives_are_implicit(x64, error, bound):
    by_bound = jax.grad(inverse_kl, argnums=1)(error, bound)
    h = 1e-6 * bound
    step = (inverse_kl(error, bound + h) - inverse_kl(error, bound - h)) / (2 * h)
    np.testing.assert_allclose(by_bound, step, rtol=1e-5)
    second = jax.grad(jax.grad(inverse_kl, argnums=1), argnums=1)(error, bound)
    slope = jax.grad(inverse_kl, argnums=1)
    step = (slope(error, bound + h) - slope(error, bound - h)) / (2 * h)
    np.testing.assert_allclose(second, step, rtol=1e-4)
    if error:
        h = 1e-5 * error
        by_error = jax.grad(inverse_kl)(error, bound)
        step = (inverse_kl(error + h, bound) - inverse_kl(error - h, bound)) / (2 * h)
        np.testing.assert_allclose(by_error, step, rtol=1e-4)


def test_inverse_kl_derivatives_stay_finite_where_they_are_not(x64):
    for error, bound in (
        (0.0, 0.0),
        (0.2, 0.0),
        (1.0, 0.3),
        (0.0, 0.3),
        (0.5, jnp.inf),
    ):
        slopes = jax.grad(inverse_kl, argnums=(0, 1))(error, bound)
        assert np.isfinite(slopes).all(), (error, bound, slopes)
    assert jax.grad(inverse_kl, argnums=1)(0.2, 0.0) > 1e6
    assert jax.grad(inverse_kl)(0.0, 0.3) > 100


def test_inverse_kl_under_jit_and_vmap():
    e, c = jnp.linspace(0, 1, 7), jnp.geomspace(1e-3, 2, 5)
    traced = jax.jit(chex.assert_max_traces(inverse_kl, 1))
    want = inverse_kl(e[:, None], c[None])
    both = jax.vmap(jax.vmap(inverse_kl, (None, 0)), (0, None))
    np.testing.assert_allclose(both(e, c), want, rtol=1e-6)
    for row, error in zip(want, e, strict=True):
        np.testing.assert_allclose(traced(error, c), row, rtol=1e-6)
    assert inverse_kl(jnp.bfloat16(0.1), 0.1).dtype == jnp.float32


# Gaussians


def random_axes(rng, k, p):
    return np.linalg.qr(rng.standard_normal((p, k)))[0].T


def covariance(axes, precisions, outside):
    inside = axes.T @ axes
    return axes.T / precisions @ axes + (np.eye(len(inside)) - inside) / outside


def dense_kl(mean, cov, mean0, cov0):
    solve, d = np.linalg.inv(cov0), mean - mean0
    logs = np.linalg.slogdet(cov0)[1] - np.linalg.slogdet(cov)[1]
    return 0.5 * (np.trace(solve @ cov) - len(d) + d @ solve @ d + logs)


@pytest.mark.parametrize("k", [1, 7, 30])
@pytest.mark.parametrize("seed", range(3))
def test_divergence_is_the_dense_one(x64, k, seed):
    rng, p = np.random.default_rng(seed), 30
    axes = random_axes(rng, k, p)
    mean, mean0 = rng.standard_normal((2, p))
    along, along0 = rng.uniform(0.1, 9, (2, k))
    across, across0 = rng.uniform(0.1, 9, 2)
    want = dense_kl(
        mean,
        covariance(axes, along, across),
        mean0,
        covariance(axes, along0, across0),
    )
    options = {
        "precisions": along,
        "precision_outside": across,
        "prior_precisions": along0,
        "prior_precision_outside": across0,
    }
    found = gaussian_kl_low_rank(jnp.asarray(mean), jnp.asarray(mean0), axes, **options)
    np.testing.assert_allclose(found, want, rtol=1e-11)
    cut = lambda m: {"w": m[..., :24].reshape(*m.shape[:-1], 4, 6), "b": m[..., 24:]}
    tree = gaussian_kl_low_rank(
        *(jax.tree.map(jnp.asarray, cut(m)) for m in (mean, mean0, axes)), **options
    )
    np.testing.assert_allclose(tree, want, rtol=1e-11)


def test_divergence_of_equal_gaussians_is_zero_and_diagonal_ones_add():
    rng = np.random.default_rng(0)
    axes, mean = random_axes(rng, 5, 1_000), jnp.ones(1_000)
    along = jnp.array([1e-3, 0.1, 1.0, 77.0, 1e6])
    same = functools.partial(
        gaussian_kl_low_rank,
        mean,
        mean,
        axes,
        prior_precisions=along,
        prior_precision_outside=3.0,
    )
    assert same(precisions=along, precision_outside=3.0) == 0
    assert same(precisions=along, precision_outside=3.001) > 0
    one = lambda z, lam: 0.5 * (z / lam - 1 - np.log(z / lam))
    np.testing.assert_allclose(
        same(precisions=2 * along, precision_outside=1.5),
        5 * one(1, 2) + 995 * one(2, 1),
        rtol=1e-5,
    )


def test_divergence_does_not_cancel_where_the_axes_hold_the_displacement():
    axes = random_axes(np.random.default_rng(0), 1, 100)
    moved = jnp.asarray(1e3 * axes[0], jnp.float32)
    found = gaussian_kl_low_rank(
        moved,
        jnp.zeros(100),
        axes,
        precisions=jnp.array([1e-6]),
        precision_outside=1e6,
        prior_precisions=jnp.array([1e-6]),
        prior_precision_outside=1e6,
    )
    np.testing.assert_allclose(found, 0.5, atol=0.5)  # 0.5 + 5e5 x round-off^2


def test_samples_have_the_covariance(x64):
    rng = np.random.default_rng(0)
    axes, mean = random_axes(rng, 3, 8), rng.standard_normal(8)
    along, across = np.array([0.2, 5.0, 30.0]), 2.0
    draw = lambda key: sample_gaussian_low_rank(
        key, jnp.asarray(mean), axes, precisions=along, precision_outside=across
    )
    draws = np.asarray(jax.vmap(draw)(jax.random.split(jax.random.key(1), 40_000)))
    want = covariance(axes, along, across)
    spread = np.sqrt(np.diag(want))
    assert (np.abs(draws.mean(0) - mean) < 5 * spread / 200).all()
    found = np.cov(draws.T)
    assert (np.abs(found - want) < 7.5 * np.outer(spread, spread) / 200).all()
    inside = (draws - mean) @ axes.T
    np.testing.assert_allclose(inside.var(0) * along, 1, atol=0.04)


def test_samples_keep_trees_and_dtypes():
    mean = {"w": jnp.ones((2, 3), jnp.bfloat16), "b": jnp.ones(2)}
    vectors = jax.tree.map(lambda x: jnp.zeros((1, *x.shape)), mean)
    draw = sample_gaussian_low_rank(
        jax.random.key(0), mean, vectors, precisions=jnp.ones(1), precision_outside=1e30
    )
    chex.assert_trees_all_equal_shapes_and_dtypes(draw, mean)
    chex.assert_trees_all_close(draw, mean)


# The analytic posterior


def problem(seed=0, k=4, p=12):
    rng = np.random.default_rng(seed)
    h = np.sort(rng.uniform(0, 0.4, k))[::-1].copy()
    theta, theta0 = (jnp.asarray(rng.standard_normal(p)) for _ in range(2))
    return h, random_axes(rng, k, p), theta, theta0


@pytest.mark.parametrize("slack", [1.0, 0.3])
def test_analytic_precisions_minimise_what_they_should(x64, slack):
    h, axes, theta, theta0 = problem()
    n, eps = 120, 3.0
    found = pac_bayes_analytic(
        h, axes, theta, theta0, num_examples=n, prior_precision=eps, slack=slack
    )

    def relaxed(log_precisions):
        """Rise of the loss in bits, to second order, and the tangent of the gap."""
        lam = jnp.exp(log_precisions)
        divergence = gaussian_kl_low_rank(
            theta,
            theta0,
            axes,
            precisions=lam,
            precision_outside=eps,
            prior_precisions=jnp.full(4, eps),
            prior_precision_outside=eps,
        )
        rise = jnp.sum(h / lam) / (2 * jnp.log(2.0))
        return rise + divergence / (2 * (n - 1)) / (2 * slack) + slack / 2

    at = jnp.log(found.precisions)
    np.testing.assert_allclose(jax.grad(relaxed)(at), 0, atol=1e-15)
    assert (jnp.linalg.eigvalsh(jax.hessian(relaxed)(at)) > 0).all()
    least = scipy.optimize.minimize(jax.jit(relaxed), jnp.zeros(4), tol=1e-12)
    np.testing.assert_allclose(np.exp(least.x), found.precisions, rtol=1e-3)
    # The tangent lies above the root and touches it at a gap of ``slack``.
    gap = jnp.linspace(0.01, 3, 100)
    assert (gap**2 / (2 * slack) + slack / 2 >= gap - 1e-15).all()


def test_the_gaps_own_slack_minimises_loss_and_gap(x64):
    """With s equal to the gap the true sum, without a tangent, is stationary."""
    h, axes, theta, theta0 = problem()
    n, eps, slack = 120, 3.0, 1.0
    analytic = lambda s: pac_bayes_analytic(
        h, axes, theta, theta0, num_examples=n, prior_precision=eps, slack=s
    )
    for _ in range(60):
        slack = analytic(slack).gap
    total = lambda s: (
        jnp.sum(h / analytic(s).precisions) / (2 * jnp.log(2.0)) + analytic(s).gap
    )
    np.testing.assert_allclose(jax.grad(total)(slack), 0, atol=1e-12)
    assert total(slack) < total(1.0)


def test_analytic_divergence_and_gap_by_hand(x64):
    h, axes, theta, theta0 = problem()
    h[-1] = -0.2
    n, eps, delta, j = 50, 4.0, 0.1, 7
    found = pac_bayes_analytic(
        h,
        axes,
        theta,
        theta0,
        num_examples=n,
        prior_precision=eps,
        delta=delta,
        prior_index=j,
    )
    lam = 4 * (n - 1) * np.maximum(h, 0) / np.log(2) + eps
    moved = np.sum((theta - theta0) ** 2)
    want = 0.5 * (np.sum(np.log(lam / eps) + eps / lam - 1) + eps * moved)
    np.testing.assert_allclose(found.precisions, lam, rtol=1e-12)
    np.testing.assert_allclose(found.kl, want, rtol=1e-12)
    penalty = np.log(np.pi**2 * j**2 * n / (6 * delta))
    np.testing.assert_allclose(
        found.gap, np.sqrt((want + penalty) / (2 * (n - 1))), rtol=1e-12
    )
    single = pac_bayes_analytic(
        h, axes, theta, theta0, num_examples=n, prior_precision=eps, delta=delta
    )
    np.testing.assert_allclose(
        single.gap, np.sqrt((want + np.log(n / delta)) / (2 * (n - 1))), rtol=1e-12
    )
    for error in (0.0, 0.1, 0.5):
        np.testing.assert_allclose(
            kl(error, float(found.bound(error))), 2 * found.gap**2, rtol=1e-9
        )


def test_units_are_a_factor_of_ln_2(x64):
    h, axes, theta, theta0 = problem()
    run = functools.partial(
        pac_bayes_analytic,
        vectors=axes,
        params=theta,
        params0=theta0,
        num_examples=50,
        prior_precision=2.0,
    )
    chex.assert_trees_all_close(run(h * np.log(2)), run(h, units="bits"), rtol=1e-12)


def test_without_curvature_the_posterior_is_the_moved_prior(x64):
    h, axes, theta, theta0 = problem()
    run = functools.partial(
        pac_bayes_analytic, vectors=axes, num_examples=50, prior_precision=2.0
    )
    still = run(0 * h, params=theta, params0=theta)
    assert still.kl == 0
    assert still.effective_dimension == 0
    moved = run(-h, params=theta, params0=theta0)
    np.testing.assert_allclose(moved.kl, jnp.sum((theta - theta0) ** 2), rtol=1e-12)


def test_effective_dimension_is_the_golden_one(x64):
    values = GOLDEN["ce/ggn_eigvals"][::-1]
    n, damping = 20, float(GOLDEN["ce/damping"])
    found = pac_bayes_analytic(
        jnp.asarray(values),
        jnp.eye(51),
        jnp.zeros(51),
        jnp.zeros(51),
        num_examples=n,
        prior_precision=damping * 4 * (n - 1),
        units="bits",
    )
    np.testing.assert_allclose(
        found.effective_dimension, GOLDEN["ce/ggn_effective_dim"], rtol=1e-11
    )


# Draws and the grid


def test_gibbs_error_is_the_expectation_with_a_bound():
    """Errors of a step function of one coordinate: a normal tail."""
    axes = jnp.eye(3)[:1]
    posterior = pac_bayes_analytic(
        jnp.array([0.0]),
        axes,
        jnp.array([1.0, 0, 0]),
        jnp.zeros(3),
        num_examples=10,
        prior_precision=4.0,
    )
    tail = 0.5 * math.erfc(2.0 / math.sqrt(2))  # P(1 + r/2 < 0)
    step = lambda params: (params[0] < 0).astype(jnp.float32)
    run = jax.jit(
        jax.vmap(
            lambda key: gibbs_error(
                key, step, posterior, axes, num_samples=400, delta=0.2
            )
        )
    )
    found = run(jax.random.split(jax.random.key(0), 300))
    np.testing.assert_allclose(found.mean.mean(), tail, atol=5 * 0.15 / 20 / 17)
    failed = np.mean(np.asarray(found.upper) < tail)
    assert failed <= 0.2
    np.testing.assert_allclose(
        found.upper, inverse_kl(found.mean, math.log(5) / 400), rtol=1e-6
    )


def quadratic_error(axes, h, theta):
    """A stand-in for the error: it grows with the distance, most along the axes."""

    def error(params):
        moved = params - theta
        along = jnp.sum(h * (axes @ moved) ** 2)
        return 1 - jnp.exp(-along - 0.1 * jnp.sum(moved**2))

    return error


def test_grid_is_a_loop_over_priors():
    h, axes, theta, theta0 = (jnp.asarray(x, jnp.float32) for x in problem())
    error_fn, key = quadratic_error(axes, 20 * h, theta), jax.random.key(3)
    n = 2_000
    found = jax.jit(
        lambda h: pac_bayes_grid(
            key,
            error_fn,
            h,
            axes,
            theta,
            theta0,
            num_examples=n,
            num_priors=12,
            spacing=2.0,
            largest_variance=3.0,
            num_samples=4,
            num_final_samples=200,
            delta=0.05,
            sample_delta=0.02,
        )
    )(h)
    few, fresh = jax.random.split(key)
    bounds = []
    for j in range(1, 13):
        one = pac_bayes_analytic(
            h,
            axes,
            theta,
            theta0,
            num_examples=n,
            prior_precision=math.exp(j / 2) / 3,
            prior_index=j,
            delta=0.05,
        )
        draws = [
            sample_gaussian_low_rank(
                k,
                theta,
                axes,
                precisions=one.precisions,
                precision_outside=one.precision_outside,
            )
            for k in jax.random.split(few, 4)
        ]
        error = np.mean([error_fn(draw) for draw in draws])
        np.testing.assert_allclose(found.prior_precisions[j - 1], math.exp(j / 2) / 3)
        np.testing.assert_allclose(found.kls[j - 1], one.kl, rtol=1e-5)
        np.testing.assert_allclose(found.errors[j - 1], error, rtol=1e-4)
        penalty = math.log(math.pi**2 * j**2 * n / (6 * 0.05))
        bounds.append(inverse_kl(error, (one.kl + penalty) / (n - 1)))
    np.testing.assert_allclose(found.bounds, bounds, rtol=1e-4)
    assert found.index == 1 + np.argmin(bounds)
    assert 1 < found.index < 12
    final = gibbs_error(
        fresh, error_fn, found.posterior, axes, num_samples=200, delta=0.02
    )
    chex.assert_trees_all_close(found.error, final, rtol=1e-5)
    np.testing.assert_allclose(found.bound, found.posterior.bound(final.upper))
    assert found.posterior.bound(final.mean) < found.bound < 1


def test_curvature_beats_the_isotropic_posterior():
    h, axes, theta, theta0 = (jnp.asarray(x, jnp.float32) for x in problem())
    error_fn = quadratic_error(axes, 20 * h, theta)
    run = jax.jit(
        lambda h: pac_bayes_grid(
            jax.random.key(0), error_fn, h, axes, theta, theta0, num_examples=2_000
        )
    )
    assert run(20 * h).bound < run(0 * h).bound
