"""Diagonals against exact ones, left-out probes and golden arrays."""

import functools
import importlib
import pathlib
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlab.curvature._leave_one_out import XDIAG
from jaxlab.curvature._probes import Setting, mean_of, run
from jaxlab.curvature._vectors import space_of

M_ = runpy.run_path(str(pathlib.Path(__file__).parent / "matrices.py"))
multiply = M_["multiply"]
symmetric = M_["symmetric"]
# The package gives the function under this name.
module = importlib.import_module("jaxlab.curvature.diagonal")
diagonal = module.diagonal

GOLDEN = np.load(pathlib.Path(__file__).parent.parent / "goldens" / "hessian.npz")
Partial = jax.tree_util.Partial
KEY = jax.random.key(0)
METHODS = ("hutchinson", "xdiag")
DRIVERS = ("compiled", "host")
DECAYING = np.arange(1, 41.0) ** -2
SIZE = len(DECAYING)  # one size almost everywhere: programs are compiled once


def setting(p, at_once=1):
    return Setting("diagonal", space_of("diagonal", jnp.ones(p)), at_once)


def xdiag_oracle(a, w):
    """Factors the images anew for each probe that is left out."""
    terms = []
    for i in range(len(w)):
        q = np.linalg.qr(a @ np.delete(w, i, axis=0).T)[0]
        image = a @ w[i]
        rest = image - q @ (q.T @ image)
        terms.append(np.diag(q @ (q.T @ a)) + w[i] * rest)
    return np.mean(terms, axis=0), np.std(terms, axis=0, ddof=1) / len(w) ** 0.5


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("k", [2, 7])
def test_xdiag_is_the_mean_over_left_out_probes(x64, driver, k):
    a = symmetric(np.linspace(-1, 3, 30), dtype=jnp.float64)
    w = np.random.default_rng(1).choice([-1.0, 1.0], (k, 30))
    found, _ = run(driver, setting(30), XDIAG, multiply(a), jnp.asarray(w))
    for ours, expected in zip(found, xdiag_oracle(np.asarray(a), w), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("at_once", [1, 2, 3])
@pytest.mark.parametrize("case", ["ce", "mse"])
def test_golden_diagonal(x64, case, at_once):
    vectors = jnp.asarray(GOLDEN[f"{case}/probes_rademacher"])
    hessian = GOLDEN[f"{case}/hessian"]
    p = len(hessian)
    arguments = module._product, multiply(jnp.asarray(hessian)), vectors, (p,)
    found, error = mean_of("compiled", setting(p, at_once), *arguments)
    expected = GOLDEN[f"{case}/bekas_diag_rademacher"]
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)
    each = np.asarray(vectors) * (np.asarray(vectors) @ hessian)
    spread = np.std(each, axis=0, ddof=1) / len(each) ** 0.5
    np.testing.assert_allclose(error, spread, rtol=1e-9, atol=1e-12)
    options = {"num_matvecs": p, "method": "xdiag", "probes_at_once": at_once}
    exact, zero = diagonal(KEY, multiply(hessian), jnp.ones(p), **options)
    np.testing.assert_allclose(exact, GOLDEN[f"{case}/hessian_diag"], rtol=1e-9)
    assert not np.any(zero)


@functools.cache
def estimates(method):
    """Runs 200 seeds: the estimates, the errors that they report, and the truth."""
    a, options = symmetric(DECAYING), {"num_matvecs": 16, "method": method}
    once = lambda key: diagonal(key, multiply(a), jnp.ones(SIZE), **options)
    found = jax.jit(jax.vmap(once))(jax.random.split(KEY, 200))
    return *(np.asarray(x, np.float64) for x in found), np.diag(a)


@pytest.mark.parametrize("method", METHODS)
def test_mean_and_spread_over_200_seeds(method):
    found, errors, exact = estimates(method)
    spread = np.std(found, axis=0, ddof=1)
    z = (found.mean(axis=0) - exact) / (spread / 200**0.5)
    # 40 entries: one in 4,000 goes beyond 4.5.
    assert np.abs(z).max() < 4.5
    ratio = np.sqrt(np.mean(errors**2, axis=0)) / spread
    assert 0.5 < ratio.min() < ratio.max() < 2


def test_xdiag_beats_hutchinson_on_a_spectrum_that_decays():
    off = {}
    for method in METHODS:
        found, _, exact = estimates(method)
        off[method] = np.sqrt(np.mean((found - exact[None]) ** 2))
    assert off["xdiag"] < 0.5 * off["hutchinson"]


def test_low_rank_is_exact(x64):
    a = symmetric(np.r_[2.0, -1.0, 0.5, np.zeros(37)], dtype=jnp.float64)
    options = {"num_matvecs": 12, "method": "xdiag"}
    found, error = diagonal(KEY, multiply(a), jnp.ones(40), **options)
    np.testing.assert_allclose(found, np.diag(a), atol=1e-12)
    assert np.abs(error).max() < 1e-12


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("driver", DRIVERS)
def test_zero_operator_and_single_probe(method, driver):
    zero, options = multiply(jnp.zeros((9, 9))), {"method": method, "driver": driver}
    found = diagonal(KEY, zero, jnp.ones(9), num_matvecs=6, **options)
    assert not np.any(found)
    least = 2 if method == "xdiag" else 1
    found, error = diagonal(KEY, zero, jnp.ones(9), num_matvecs=least, **options)
    assert not np.any(found)
    assert np.isnan(error).all()


def test_repeated_probes(x64):
    # Two equal images: without either of them the span is the same.
    a = np.asarray(symmetric(np.linspace(1, 2, 8), dtype=jnp.float64))
    w = np.random.default_rng(2).choice([-1.0, 1.0], (2, 8))
    w[1] = w[0]
    (found, error), _ = run("compiled", setting(8), XDIAG, multiply(a), jnp.asarray(w))
    q = (a @ w[0] / np.linalg.norm(a @ w[0]))[:, None]
    np.testing.assert_allclose(found, np.diag(q @ (q.T @ a)), rtol=1e-9, atol=1e-12)
    assert np.abs(error).max() < 1e-12


@pytest.mark.parametrize("method", METHODS)
def test_trees_holes_and_one_parameter(method):
    weights = {"a": jnp.arange(6.0).reshape(2, 3), "b": optax.MaskedNode()}
    operator = Partial(optax.tree.mul, weights)
    for count in (4, 6):
        found, error = diagonal(
            KEY, operator, weights, num_matvecs=count, method=method
        )
        assert jax.tree.structure(found) == jax.tree.structure(weights)
        assert jax.tree.structure(error) == jax.tree.structure(weights)
        assert found["a"].shape == (2, 3)
    np.testing.assert_allclose(found["a"], weights["a"], atol=1e-6)
    one = Partial(jnp.multiply, 3.0)
    found, _ = diagonal(KEY, one, jnp.ones(1), num_matvecs=1, method=method)
    assert float(found[0]) == 3


@pytest.mark.parametrize("method", METHODS)
def test_drivers_and_chunks_agree(method):
    a, like = symmetric(DECAYING), jnp.ones(SIZE)
    options = {"num_matvecs": 16, "method": method}
    expected = diagonal(KEY, multiply(a), like, **options)
    others = [
        diagonal(KEY, multiply(a), like, probes_at_once=3, **options),
        diagonal(KEY, multiply(a), like, driver="host", **options),
    ]
    for other in others:
        for ours, theirs in zip(other, expected, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_bfloat16_params():
    weights = jnp.linspace(1, 2, 500).astype(jnp.bfloat16)
    operator = Partial(jnp.multiply, weights)
    for method in METHODS:
        found, error = diagonal(KEY, operator, weights, num_matvecs=8, method=method)
        assert found.dtype == error.dtype == jnp.bfloat16
        # A diagonal operator leaves nothing to chance for Rademacher probes alone.
        if method == "hutchinson":
            np.testing.assert_array_equal(found, weights)


@pytest.mark.parametrize("method", METHODS)
def test_params_that_change_compile_nothing_again(method):
    traces = []

    def product(matrix, v):
        traces.append(1)
        return matrix @ v

    for driver in DRIVERS:
        for scale in (1.0, 2.0, 3.0):
            operator = Partial(product, scale * jnp.eye(20))
            options = {"num_matvecs": 12, "method": method, "driver": driver}
            diagonal(KEY, operator, jnp.ones(20), **options)
        assert len(traces) == 1
        traces.clear()
