"""Fitting outside the step: a whole inverse, a warm start, the measure of both."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from jaxlab.curvature import ggn_operator
from jaxlab.likelihoods import Gaussian
from jaxlab.objective import Objective, plain
from jaxlab.optimizers import (
    fishleg,
    fishleg_warm_start,
    inverse_fisher,
    q_apply,
    q_dense,
)


def spectrum(n=20):
    basis = np.linalg.qr(np.random.default_rng(0).normal(size=(n, n)))[0]
    return basis @ np.diag(1 / np.arange(1.0, n + 1)) @ basis.T


def test_a_full_block_is_the_inverse(x64):
    matrix = jnp.asarray(spectrum())
    fit = inverse_fisher(
        jax.random.key(0),
        jax.tree_util.Partial(jnp.matmul, matrix),
        jnp.zeros(20),
        damping=0.01,
        rule={"": "full"},
        tol=1e-12,
        max_steps=4_000,
    )
    product = q_dense(fit.q, jnp.zeros(20)) @ (matrix + 0.01 * jnp.eye(20))
    assert jnp.linalg.norm(product - jnp.eye(20)) / jnp.sqrt(20) < 1e-4
    assert bool(fit.converged)
    np.testing.assert_allclose(fit.eff, 1, atol=1e-4)


def test_eff_by_brute_force_and_what_structure_costs(x64):
    matrix = jnp.asarray(np.kron(spectrum(4), spectrum(3)))
    like = {"kernel": jnp.zeros((4, 3))}
    _, unravel = ravel_pytree(like)
    operator = jax.tree_util.Partial(
        lambda m, v: unravel(m @ ravel_pytree(v)[0]), matrix
    )
    found = {}
    for kind in ("full", "kronecker", "diagonal"):
        fit = inverse_fisher(
            jax.random.key(0),
            operator,
            like,
            damping=0.01,
            rule={"": kind},
            max_steps=1_000,
            num_probes=64,
        )
        found[kind] = float(fit.eff)
    assert found["full"] > 0.99
    assert found["full"] > found["kronecker"] > found["diagonal"]
    # The last fit's, with many vectors, against dense algebra.
    damped = matrix + 0.01 * jnp.eye(12)
    q = q_dense(fit.q, like)
    g = np.random.default_rng(1).normal(size=(4_000, 12))
    d = g @ q
    along = np.sum(g * d, 1) ** 2
    bend = np.sum(d * (d @ damped), 1) * np.sum(g * np.linalg.solve(damped, g.T).T, 1)
    np.testing.assert_allclose(found["diagonal"], np.mean(along / bend), atol=0.1)


def test_it_stops_at_its_limit_and_says_so():
    fit = inverse_fisher(
        jax.random.key(0),
        lambda v: 3 * v,
        jnp.zeros(5),
        damping=1.0,
        max_steps=2,
        tol=0,
    )
    assert int(fit.steps) == 2
    assert not bool(fit.converged)
    assert jnp.isfinite(fit.error)


def test_operators_of_a_model_need_no_second_compilation():
    apply_fn = lambda w, x: x @ w
    like = jnp.zeros((3, 2))
    fits = []
    for scale in (1.0, 2.0):
        operator = ggn_operator(apply_fn, Gaussian(), like, (scale * jnp.eye(3), None))
        fits.append(inverse_fisher(jax.random.key(0), operator, like, damping=0.1))
    # F is scale^2 / 3 times the identity.
    for fit, square in zip(fits, (1.0, 4.0), strict=True):
        np.testing.assert_allclose(
            q_dense(fit.q, like), jnp.eye(6) / (square / 3 + 0.1), atol=0.05
        )


def test_a_warm_start_fits_and_changes_nothing_else():
    objective = Objective(plain(lambda p, x: jnp.tanh(x @ p["w"]) @ p["v"]), Gaussian())
    keys = jax.random.split(jax.random.key(0), 4)
    params = {
        "w": jax.random.normal(keys[0], (4, 5)),
        "v": jax.random.normal(keys[1], (5, 3)),
    }
    x = jax.random.normal(keys[2], (20, 16, 4))
    batches = [(rows, jnp.sin(rows[:, :3])) for rows in x]
    optimizer = fishleg(pre_aux_steps=0)
    cold = optimizer.init(params)
    warm = fishleg_warm_start(keys[3], cold, params, batches, objective=objective)
    assert jax.tree.structure(warm) == jax.tree.structure(cold)
    assert int(warm[0].count) == 0
    operator = ggn_operator(objective.apply_fn.apply_fn, Gaussian(), params, batches[0])
    (_, _), g = objective.value_and_grad(params, (), batches[0])

    def eff(q):
        damped = lambda v: jax.tree.map(lambda f, x: f + 0.3 * x, operator(v), v)
        d = q_apply(q, g)
        exact, _ = jax.scipy.sparse.linalg.cg(damped, g)
        along = optax.tree.vdot(g, d)
        bend = optax.tree.vdot(d, damped(d)) * optax.tree.vdot(g, exact)
        return float(along**2 / bend)

    assert eff(warm[0].q) > 0.8 > eff(cold[0].q)
