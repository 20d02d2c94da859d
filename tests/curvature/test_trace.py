"""Traces and Frobenius norms against exact ones, left-out probes and golden arrays."""

import dataclasses
import functools
import importlib
import pathlib
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlab.curvature._leave_one_out import XNYSTRACE, XTRACE
from jaxlab.curvature._probes import Setting, _run_compiled, mean_of, run
from jaxlab.curvature._vectors import space_of

M_ = runpy.run_path(str(pathlib.Path(__file__).parent / "matrices.py"))
multiply = M_["multiply"]
symmetric = M_["symmetric"]
# The package gives the function under this name.
module = importlib.import_module("jaxlab.curvature.trace")
trace, frobenius_norm = module.trace, module.frobenius_norm

GOLDEN = np.load(pathlib.Path(__file__).parent.parent / "goldens" / "hessian.npz")
Partial = jax.tree_util.Partial
KEY = jax.random.key(0)
METHODS = ("hutchinson", "hutch++", "xtrace", "xnystrace")
SKETCHES = METHODS[1:]
DRIVERS = ("compiled", "host")
DECAYING = np.arange(1, 41.0) ** -2
SIZE = len(DECAYING)  # one size almost everywhere: programs are compiled once


def probes(k, p, seed=1):
    return np.random.default_rng(seed).standard_normal((k, p))


def setting(p, name="trace"):
    return Setting(name, space_of(name, jnp.ones(p)), 1)


# Oracles: one factorisation for each probe that is left out


def xtrace_oracle(a, w):
    p, terms = len(a), []
    for i in range(len(w)):
        others = np.delete(w, i, axis=0)
        q = np.linalg.qr(a @ others.T)[0]
        mu = w[i] - q @ (q.T @ w[i])
        mu *= np.sqrt(p - len(others)) / np.linalg.norm(mu)
        terms.append(np.trace(q.T @ a @ q) + mu @ a @ mu)
    return np.array(terms)


def xnystrace_oracle(a, w):
    p, terms = len(a), []
    w = np.linalg.qr(w.T)[0].T
    for i in range(len(w)):
        others = np.delete(w, i, axis=0)
        y = a @ others.T
        nystrom = y @ np.linalg.solve(others @ y, y.T)
        rest = w[i] @ (a - nystrom) @ w[i]
        terms.append(np.trace(nystrom) + (p - len(others)) * rest)
    return np.array(terms)


@pytest.mark.parametrize("driver", DRIVERS)
def test_xtrace_is_the_mean_over_left_out_probes(x64, driver):
    rng = np.random.default_rng(3)
    skewed = np.asarray(symmetric(DECAYING[:30], dtype=float))
    skewed = skewed + 0.1 * rng.standard_normal((30, 30))  # any square matrix will do
    for k in (1, 7) if driver == "compiled" else (7,):
        w = probes(k, 30)
        terms = run(driver, setting(30), XTRACE, multiply(skewed), jnp.asarray(w))
        np.testing.assert_allclose(terms, xtrace_oracle(skewed, w), rtol=1e-9)


@pytest.mark.parametrize("driver", DRIVERS)
def test_xnystrace_is_the_mean_over_left_out_probes(x64, driver):
    # What a shift of 4 epsilon does to the approximation is far below 1e-9.
    a = symmetric(np.linspace(0.5, 3, 30), dtype=jnp.float64)
    for k in (1, 9, 29) if driver == "compiled" else (9,):
        w = probes(k, 30)
        terms, check = run(driver, setting(30), XNYSTRACE, multiply(a), jnp.asarray(w))
        expected = xnystrace_oracle(np.asarray(a), w)
        np.testing.assert_allclose(terms, expected, rtol=1e-9)
        assert float(check.asymmetry) < 1e-14 < 0.4 < float(check.lowest)


def test_hutch_plus_plus_projects_on_the_sketch(x64):
    a = np.asarray(symmetric(np.linspace(-1, 2, 30), dtype=jnp.float64))
    w = probes(10, 30)
    method = module._METHODS["hutch++"]
    found = run("compiled", setting(30), method, multiply(a), jnp.asarray(w))
    q = np.linalg.qr(a @ w[:5].T)[0]
    rest = w[5:] - w[5:] @ q @ q.T
    forms = np.einsum("ij,jk,ik->i", rest, a, rest)
    expected = np.trace(q.T @ a @ q) + forms.mean(), np.std(forms, ddof=1) / 5**0.5
    np.testing.assert_allclose(found, expected, rtol=1e-9)


# Golden arrays


@pytest.mark.parametrize("case", ["ce", "mse"])
@pytest.mark.parametrize("kind", ["rademacher", "normal"])
def test_golden_quadratic_forms(x64, case, kind):
    vectors = jnp.asarray(GOLDEN[f"{case}/probes_{kind}"])
    operator = multiply(jnp.asarray(GOLDEN[f"{case}/hessian"]))
    expected = np.ravel(GOLDEN[f"{case}/hutchinson_{kind}"])
    where = setting(vectors.shape[1])
    each = [
        mean_of("compiled", where, module._form, operator, v[None])[0] for v in vectors
    ]
    np.testing.assert_allclose(each, expected, rtol=1e-9)
    mean, error = mean_of("compiled", where, module._form, operator, vectors)
    np.testing.assert_allclose(mean, expected.mean(), rtol=1e-9)
    spread = np.std(expected, ddof=1) / len(expected) ** 0.5
    np.testing.assert_allclose(error, spread, rtol=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_golden_trace(x64, method):
    ggn = jnp.asarray(GOLDEN["ce/ggn"])
    if method == "hutchinson":
        found, error = trace(KEY, multiply(ggn), jnp.ones(51), num_matvecs=50)
        assert abs(float(found) - np.trace(ggn)) < 4 * float(error)
        return
    # As many products as parameters: nothing is left to chance.
    options = {"num_matvecs": 60, "method": method}
    found, error = trace(KEY, multiply(ggn), jnp.ones(51), **options)
    np.testing.assert_allclose(found, np.trace(ggn), rtol=1e-12)
    assert float(error) == 0


# Statistics


@functools.cache
def estimates(method):
    """Runs 200 seeds: the estimates, the errors that they report, and the truth."""
    matrix, like = multiply(symmetric(DECAYING)), jnp.ones(SIZE)
    if method == "frobenius":
        once = lambda key: frobenius_norm(key, matrix, like, num_matvecs=12)
        exact = np.sqrt(np.sum(DECAYING**2))
    else:
        options = {"num_matvecs": 12, "method": method}
        once = lambda key: trace(key, matrix, like, **options)
        exact = DECAYING.sum()
    found = jax.jit(jax.vmap(once))(jax.random.split(KEY, 200))
    return *(np.asarray(x, np.float64) for x in found), exact


@pytest.mark.parametrize("method", [*METHODS, "frobenius"])
def test_mean_and_spread_over_200_seeds(method):
    found, errors, exact = estimates(method)
    spread = np.std(found, ddof=1)
    # The root of an unbiased square is low by half its relative variance.
    bias = spread**2 / (2 * exact) if method == "frobenius" else 0
    assert abs(found.mean() + bias - exact) < 4 * spread / 200**0.5
    assert 0.5 < np.sqrt(np.mean(errors**2)) / spread < 1.5


def test_sketches_beat_hutchinson_on_a_spectrum_that_decays():
    off = {}
    for method in METHODS:
        found, _, exact = estimates(method)
        off[method] = np.sqrt(np.mean((found - exact) ** 2))
    assert off["hutch++"] < 0.5 * off["hutchinson"]
    assert off["xtrace"] < 0.25 * off["hutchinson"]
    assert off["xnystrace"] < off["xtrace"] < off["hutch++"]


# Exact cases and edges


@pytest.mark.parametrize("method", SKETCHES)
@pytest.mark.parametrize("driver", DRIVERS)
def test_low_rank_is_exact(x64, method, driver):
    a = symmetric(np.r_[2.0, 1.0, 0.5, np.zeros(37)], dtype=jnp.float64)
    options = {"num_matvecs": 12, "method": method, "driver": driver}
    found, error = trace(KEY, multiply(a), jnp.ones(40), **options)
    assert float(found) == pytest.approx(3.5, abs=1e-12)
    assert float(error) < 1e-12


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("driver", DRIVERS)
def test_zero_operator(method, driver):
    options = {"num_matvecs": 12, "method": method, "driver": driver}
    zero = multiply(jnp.zeros((SIZE, SIZE)))
    found = trace(KEY, zero, jnp.ones(SIZE), **options)
    assert [float(x) for x in found] == [0, 0]


def test_zero_operator_has_norm_zero():
    zero = Partial(jnp.multiply, 0.0)
    found = frobenius_norm(KEY, zero, jnp.ones(3), num_matvecs=4)
    assert [float(x) for x in found] == [0, 0]


@pytest.mark.parametrize("method", METHODS)
def test_one_parameter(method):
    options = {"num_matvecs": 1, "method": method}
    found, _ = trace(KEY, Partial(jnp.multiply, 3.0), jnp.ones(1), **options)
    assert float(found) == 3
    norm = frobenius_norm(KEY, Partial(jnp.multiply, -3.0), jnp.ones(1), num_matvecs=1)
    assert float(norm[0]) == 3


@pytest.mark.parametrize(
    ("method", "least"),
    [("hutchinson", 1), ("hutch++", 3), ("xtrace", 2), ("xnystrace", 1)],
)
def test_a_single_probe_has_no_error(method, least):
    options = {"num_matvecs": least, "method": method}
    found, error = trace(KEY, multiply(symmetric(DECAYING)), jnp.ones(SIZE), **options)
    assert np.isfinite(found)
    assert np.isnan(error)


def test_repeated_probes_and_dependent_images(x64):
    # Images 0 and 1 are equal, so leaving one out loses nothing; image 2 is free.
    a = np.diag(np.arange(1.0, 9.0))
    w = probes(3, 8)
    w[1] = w[0]
    terms = run("compiled", setting(8), XTRACE, multiply(a), jnp.asarray(w))
    q = np.linalg.qr(a @ w[[0, 2]].T)[0]
    assert np.all(np.isfinite(terms))
    for i, kept in ((0, q), (1, q), (2, np.linalg.qr(a @ w[:1].T)[0])):
        mu = w[i] - kept @ (kept.T @ w[i])
        left = 8 - kept.shape[1]
        expected = np.trace(kept.T @ a @ kept) + left * (mu @ a @ mu) / (mu @ mu)
        np.testing.assert_allclose(terms[i], expected, rtol=1e-9)


@dataclasses.dataclass(frozen=True)
class Streamed:
    """A host operator: its product is NumPy's, out of reach of any trace."""

    matrix: np.ndarray
    spent: list
    host: bool = True

    def __call__(self, v):
        self.spent.append(1)
        return jnp.asarray(self.matrix @ np.asarray(v), jnp.float32)


@pytest.mark.parametrize(
    ("method", "count"),
    [("hutchinson", 12), ("hutch++", 12), ("xtrace", 12), ("xnystrace", 12)],
)
def test_host_operators_and_products_spent(method, count):
    a, spent = symmetric(DECAYING), []
    options = {"num_matvecs": 12, "method": method}
    found = trace(KEY, Streamed(np.asarray(a), spent), jnp.ones(SIZE), **options)
    assert len(spent) == count
    expected = trace(KEY, multiply(a), jnp.ones(SIZE), **options)
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=1e-6)


def test_products_left_over_are_not_spent():
    for method, count in (("hutch++", 12), ("xtrace", 14)):
        spent = []
        operator = Streamed(np.eye(SIZE), spent)
        trace(KEY, operator, jnp.ones(SIZE), num_matvecs=count + 1, method=method)
        assert len(spent) == count
    spent = []
    operator = Streamed(np.eye(SIZE), spent)
    found, _ = trace(KEY, operator, jnp.ones(SIZE), num_matvecs=99, method="xtrace")
    assert len(spent) == SIZE == float(found)


# How it runs


@pytest.mark.parametrize("method", METHODS)
def test_drivers_and_chunks_agree(method):
    a, like = symmetric(DECAYING), jnp.ones(SIZE)
    options = {"num_matvecs": 12, "method": method}
    expected = trace(KEY, multiply(a), like, **options)
    chunks = trace(KEY, multiply(a), like, probes_at_once=5, **options)
    host = trace(KEY, multiply(a), like, driver="host", **options)
    np.testing.assert_allclose(chunks, expected, rtol=2e-4, atol=1e-6)
    np.testing.assert_allclose(host, expected, rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_params_that_change_compile_nothing_again(method):
    traces = []

    def product(matrix, v):
        traces.append(1)
        return matrix @ v

    for driver in DRIVERS:
        for scale in (1.0, 2.0, 3.0):
            operator = Partial(product, scale * jnp.eye(SIZE))
            options = {"num_matvecs": 12, "method": method, "driver": driver}
            found, _ = trace(KEY, operator, jnp.ones(SIZE), **options)
            assert float(found) == pytest.approx(SIZE * scale, rel=0.1)
        assert len(traces) == 1
        traces.clear()


def test_holes_and_trees():
    diagonal = {"a": jnp.arange(6.0).reshape(2, 3), "b": optax.MaskedNode()}
    like = {"a": jnp.ones((2, 3)), "b": optax.MaskedNode()}
    operator = Partial(optax.tree.mul, diagonal)
    for count in (5, 6):
        found, _ = trace(KEY, operator, like, num_matvecs=count, method="xnystrace")
        assert float(found) == pytest.approx(15, rel=0.3 if count == 5 else 1e-6)


def test_bfloat16_params_and_float32_sums():
    weights = jnp.full(5000, 1.0, jnp.bfloat16)
    for method in ("hutchinson", "xnystrace"):
        options = {"num_matvecs": 4, "method": method}
        found, error = trace(KEY, Partial(jnp.multiply, weights), weights, **options)
        assert found.dtype == error.dtype == jnp.float32
        assert float(found) == pytest.approx(5000, rel=3e-3)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Forms:
    """An operator whose quadratic form is cheap, and whose product must not be used."""

    weights: jax.Array

    def __call__(self, v):
        raise AssertionError("the quadratic form stands ready")

    def quadratic_form(self, v):
        return jnp.sum(self.weights * v**2)


def test_quadratic_forms_are_used():
    options = {"num_matvecs": 2, "driver": "compiled"}
    found = trace(KEY, Forms(jnp.arange(4.0)), jnp.ones(4), **options)
    assert [float(x) for x in found] == [6, 0]


def test_indefinite_operators_give_nan_under_jit():
    operator = multiply(symmetric(np.linspace(-1, 2, SIZE)))
    options = {"num_matvecs": 12, "method": "xnystrace"}
    once = jax.jit(lambda key: trace(key, operator, jnp.ones(SIZE), **options)[0])
    assert np.isnan(once(KEY))


@pytest.mark.parametrize("method", SKETCHES)
def test_memory_is_as_documented(method):
    p, k = 20_000, 16
    where = setting(p)
    keys = jax.random.split(KEY, 2 * k if method == "hutch++" else k)
    arguments = Partial(jnp.multiply, jnp.ones(p)), keys, where, module._METHODS[method]
    program = _run_compiled.lower(*arguments).compile()
    assert program.memory_analysis().temp_size_in_bytes < 1.2 * 5 * k * p * 4
