"""The optimised bound with a prior aligned with the Fisher matrix."""

import functools
import math

import chex
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize

from jaxlab.curvature.pac_bayes import pac_bayes_optimize

N, DELTA = 200, 0.1


def problem(p=10, k=3, seed=0):
    """A quadratic loss with stiff axes, of which the prior knows."""
    rng = np.random.default_rng(seed)
    axes = np.linalg.qr(rng.standard_normal((p, k)))[0].T
    fisher = np.array([4.0, 1.0, 0.25])[:k]
    matrix = axes.T * fisher @ axes + 0.01 * np.eye(p)
    best = 0.7 * rng.standard_normal(k) @ axes + 0.1 * rng.standard_normal(p)
    return axes, fisher, matrix, best


def dense_divergence(found, mean0, axes):
    p = axes.shape[1]
    inside = axes.T @ axes
    cov = lambda along, across: (
        axes.T / np.asarray(along) @ axes + (np.eye(p) - inside) / float(across)
    )
    one = cov(found.precisions, found.precision_outside)
    prior = cov(found.prior_precisions, found.prior_precision_outside)
    solve, d = np.linalg.inv(prior), np.asarray(found.mean) - mean0
    logs = np.linalg.slogdet(prior)[1] - np.linalg.slogdet(one)[1]
    return 0.5 * (np.trace(solve @ one) - p + d @ solve @ d + logs)


@functools.cache
def solved():
    axes, fisher, matrix, best = problem()
    with jax.enable_x64(True):
        loss = lambda w: 0.5 * (w - best) @ matrix @ (w - best)
        run = jax.jit(
            lambda key: pac_bayes_optimize(
                key,
                loss,
                jnp.asarray(fisher),
                axes,
                jnp.asarray(best),
                jnp.zeros(10),
                num_examples=N,
                delta=DELTA,
                num_steps=6_000,
                units="bits",
                optimizer=optax.adam(optax.cosine_decay_schedule(0.03, 6_000)),
            )
        )
        return jax.device_get(run(jax.random.key(0)))


def test_the_certificate_is_the_dense_one():
    found, _ = solved()
    axes, *_ = problem()
    want = dense_divergence(found, np.zeros(10), axes)
    np.testing.assert_allclose(found.kl, want, rtol=1e-9)


def scales_of(found):
    """Reads s, the floor a and the outside variance back from the precisions."""
    _, fisher, *_ = problem()
    variances = 1 / np.asarray(found.prior_precisions)
    ratio = fisher / fisher[0]
    s = (variances[0] - variances[-1]) / (ratio[0] - ratio[-1])
    return s, variances[0] / s - 1, 1 / float(found.prior_precision_outside)


def test_prior_scales_lie_on_the_grid_that_the_penalty_counts():
    found, _ = solved()
    indices = [10 * math.log(10 / scale) for scale in scales_of(found)]
    np.testing.assert_allclose(indices, np.round(indices), atol=1e-6)
    assert min(indices) > 0.5
    penalty = math.log(N / DELTA)
    penalty += sum(math.log(math.pi**2 * j**2 / 6) for j in np.round(indices))
    np.testing.assert_allclose(
        found.gap, math.sqrt((found.kl + penalty) / (2 * (N - 1))), rtol=1e-9
    )
    # They shape the prior: its middle variance follows from the outer two.
    s, floor, _ = scales_of(found)
    np.testing.assert_allclose(
        found.prior_precisions[1], 1 / (s * (0.25 + floor)), rtol=1e-9
    )


def test_it_reaches_the_minimum_of_the_expected_objective():
    """Without noise the objective has a closed form, which L-BFGS minimises."""
    axes, fisher, matrix, best = problem()
    with jax.enable_x64(True):
        trace_in = jnp.asarray(np.einsum("kp,pq,kq->k", axes, matrix, axes))
        trace_out = np.trace(matrix) - trace_in.sum()

        def expected(x):
            mean, xi, xi_c, logs = x[:10], x[10:13], x[13], x[14:]
            j = jnp.maximum(10 * (jnp.log(10.0) - logs), 1)
            s, floor, outside = jnp.exp(logs)
            z, z_c = 1 / (s * (fisher / fisher[0] + floor)), 1 / outside
            tau, tau_c = jnp.exp(2 * xi), jnp.exp(2 * xi_c)
            d = axes @ mean
            kl2 = z @ d**2 + z_c * (mean @ mean - d @ d)
            kl2 += jnp.sum(z * tau - jnp.log(z * tau))
            kl2 += 7 * (z_c * tau_c - jnp.log(z_c * tau_c)) - 10
            penalty = jnp.log(N / DELTA) + jnp.sum(jnp.log(jnp.pi**2 * j**2 / 6))
            loss = 0.5 * (mean - best) @ matrix @ (mean - best)
            loss += 0.5 * (trace_in @ tau + trace_out * tau_c)
            return loss + jnp.sqrt((kl2 / 2 + penalty) / (2 * (N - 1)))

        found, history = solved()
        reached = np.concatenate(
            [
                found.mean,
                -0.5 * np.log(found.precisions),
                [-0.5 * np.log(found.precision_outside)],
                np.log(scales_of(found)),
            ]
        )
        start = np.concatenate([best, np.full(4, -1.0), [-1.0, -3.0, -3.0]])
        slope = jax.jit(jax.grad(expected))
        lowest = [
            scipy.optimize.minimize(jax.jit(expected), x, jac=slope).fun
            for x in (start, reached)
        ]
        # It has several minima. Rounded scales and the draws' noise cost a little.
        assert min(lowest) - 1e-9 <= expected(reached) <= 1.01 * min(lowest)
        assert min(lowest) < 0.7 * float(expected(start))
        np.testing.assert_allclose(history[-500:].mean(), min(lowest), rtol=0.05)


def test_the_aligned_prior_beats_one_that_knows_nothing():
    axes, fisher, matrix, best = (np.float32(x) for x in problem())
    loss = lambda w: 0.5 * (w - best) @ matrix @ (w - best)
    other = np.linalg.qr(np.random.default_rng(9).standard_normal((10, 3)))[0].T
    run = jax.jit(
        lambda axes: pac_bayes_optimize(
            jax.random.key(0),
            loss,
            fisher,
            axes,
            jnp.asarray(best),
            jnp.zeros(10),
            num_examples=N,
            num_steps=2_000,
        )[1][-200:].mean()
    )
    assert run(jnp.asarray(axes)) < run(jnp.asarray(other, jnp.float32))


def test_trees_batches_and_keys():
    rng = np.random.default_rng(0)
    params = {"w": jnp.zeros((3, 2), jnp.bfloat16), "b": jnp.ones(2)}
    vectors = jax.tree.map(lambda x: jnp.zeros((1, *x.shape), jnp.float32), params)
    vectors["b"] = jnp.array([[1.0, 0.0]])
    x = jnp.asarray(rng.standard_normal((4, 5, 3)), jnp.float32)
    batches = (x, jnp.ones((4, 5, 2)))
    seen = []

    def loss(p, batch):
        seen.append((p["w"].dtype, batch[0].shape, batch[1].shape))
        return jnp.mean((batch[0] @ p["w"] + p["b"].reshape(1, 2) - batch[1]) ** 2)

    @functools.partial(jax.jit, static_argnames="optimizer")
    def run(key, batches, optimizer=None):
        return pac_bayes_optimize(
            key,
            loss,
            jnp.ones(1),
            vectors,
            params,
            params,
            num_examples=20,
            batches=batches,
            num_steps=8,
            optimizer=optimizer,
        )

    found, history = run(jax.random.key(0), batches)
    assert set(seen) == {(jnp.dtype(jnp.bfloat16), (5, 3), (5, 2))}
    assert history.shape == (8,)
    chex.assert_trees_all_equal_shapes_and_dtypes(found.mean, params)
    again, _ = run(jax.random.key(0), batches)
    chex.assert_trees_all_equal(found, again)
    other, _ = run(jax.random.key(1), batches)
    assert not np.array_equal(other.mean["b"], found.mean["b"])
    # Batch i is used at step i and again after all of them.
    twice = jax.tree.map(lambda x: jnp.concatenate([x, x]), batches)
    chex.assert_trees_all_equal(run(jax.random.key(0), twice), (found, history))
    changed = (x.at[2].add(1.0), batches[1])
    same = run(jax.random.key(0), changed)[1] == history
    np.testing.assert_array_equal(same[:3], [True, True, False])
    frozen, _ = run(jax.random.key(0), batches, optimizer=optax.set_to_zero())
    chex.assert_trees_all_equal(frozen.mean, params)


def test_the_start_matches_prior_to_displacement():
    axes, fisher, _, best = (np.float32(x) for x in problem())
    found, _ = pac_bayes_optimize(
        jax.random.key(0),
        lambda w: jnp.sum(w**2),
        fisher,
        jnp.asarray(axes),
        jnp.asarray(best),
        jnp.zeros(10),
        num_examples=N,
        num_steps=1,
        optimizer=optax.set_to_zero(),
    )
    # Each of the p directions moved by about a standard deviation: KL near p/2.
    assert 0.7 * 5 < found.kl < 1.3 * 5
    np.testing.assert_array_equal(found.mean, best)


@pytest.mark.parametrize("values", [[0.0, 0.0, 0.0], [1.0, -1.0, 0.0]])
def test_degenerate_priors_stay_finite(values):
    still = jnp.ones(10)
    found, history = pac_bayes_optimize(
        jax.random.key(0),
        lambda w: jnp.sum(w**2),
        jnp.array(values),
        jnp.eye(10)[:3],
        still,
        still,
        num_examples=N,
        num_steps=20,
    )
    assert np.isfinite(history).all()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))
