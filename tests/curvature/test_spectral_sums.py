"""Sums over spectra against eigendecompositions and golden arrays."""

import pathlib
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.curvature.lanczos import lanczos, ritz
from jaxlab.curvature.spectral_sums import logdet, spectral_sum

M_ = runpy.run_path(str(pathlib.Path(__file__).parent / "matrices.py"))
multiply = M_["multiply"]
symmetric = M_["symmetric"]
GOLDEN = np.load(pathlib.Path(__file__).parent.parent / "goldens" / "hessian.npz")
Partial = jax.tree_util.Partial
KEY = jax.random.key(0)


@pytest.mark.parametrize("case", ["ce", "mse"])
def test_golden_quadratic_forms_of_the_logarithm(x64, case):
    ggn, damping = GOLDEN[f"{case}/ggn"], float(GOLDEN[f"{case}/damping"])
    p = len(ggn)
    for v, expected in zip(
        GOLDEN[f"{case}/probes_normal"], GOLDEN[f"{case}/ggn_log_quadform_normal"]
    ):
        result = lanczos(multiply(jnp.asarray(ggn)), jnp.asarray(v), order=p)
        values, weights, _ = ritz(result)
        form = (v @ v) * jnp.sum(weights * jnp.log(jnp.maximum(values, 0) + damping))
        np.testing.assert_allclose(form, expected, rtol=1e-9)


@pytest.mark.parametrize("case", ["ce", "mse"])
def test_golden_log_determinant(x64, case):
    ggn, damping = jnp.asarray(GOLDEN[f"{case}/ggn"]), float(GOLDEN[f"{case}/damping"])
    expected = float(GOLDEN[f"{case}/ggn_logdet_damped"])
    estimate, error = logdet(
        KEY, multiply(ggn), jnp.ones(len(ggn)), damping=damping, num_probes=64
    )
    assert abs(float(estimate) - expected) < 4 * float(error)
    assert float(error) < 0.05 * abs(expected)
    # The unit vectors leave nothing to chance.
    rule = lambda e: ritz(lanczos(multiply(ggn), e, order=len(ggn)))
    values, weights, _ = jax.jit(jax.vmap(rule))(jnp.eye(len(ggn)))
    total = jnp.sum(weights * jnp.log(jnp.maximum(values, 0) + damping))
    np.testing.assert_allclose(total, expected, rtol=1e-9)


def test_no_chance_where_the_function_is_linear_or_the_matrix_diagonal(x64):
    a = symmetric(np.linspace(0.1, 3, 40), dtype=jnp.float64)
    estimate, _ = spectral_sum(
        KEY,
        multiply(jnp.diag(jnp.diag(a))),
        jnp.ones(40),
        jnp.sqrt,
        order=40,
        num_probes=2,
    )
    # For a diagonal matrix every Rademacher probe gives the trace itself.
    assert float(estimate) == pytest.approx(float(np.sqrt(np.diag(a)).sum()), abs=1e-9)
    square, error = spectral_sum(
        KEY, multiply(a), jnp.ones(40), jnp.square, order=2, num_probes=3
    )
    probes = [jax.random.rademacher(k, (40,), float) for k in jax.random.split(KEY, 3)]
    forms = [float(v @ a @ a @ v) for v in probes]
    assert float(square) == pytest.approx(np.mean(forms), rel=1e-12)
    assert float(error) == pytest.approx(np.std(forms, ddof=1) / 3**0.5, rel=1e-12)


def exact_forms(keys, matrix):
    """Computes v . matrix v for the eight probes of each key, in float64."""
    draw = lambda key: jax.random.rademacher(key, (len(matrix),), jnp.float32)
    probes = jax.vmap(lambda key: jax.vmap(draw)(jax.random.split(key, 8)))(keys)
    return np.einsum("kpi,ij,kpj->kp", probes, matrix, np.asarray(probes, float))


@pytest.mark.parametrize("name", ["sum", "logdet"])
def test_z_scores_over_200_seeds(name):
    eigenvalues = np.r_[np.zeros(40), np.geomspace(1e-2, 5, 40)]
    a, like = symmetric(eigenvalues), jnp.ones(80)

    def once(key):
        if name == "logdet":
            return logdet(key, multiply(a), like, damping=0.1, order=30)
        return spectral_sum(key, multiply(a), like, jnp.exp, order=12, num_probes=8)

    keys = jax.random.split(KEY, 200)
    estimates, errors = map(np.asarray, jax.jit(jax.vmap(once))(keys))
    function = np.exp if name == "sum" else lambda t: np.log(np.maximum(t, 0) + 0.1)
    exact = function(eigenvalues).sum()
    z = (estimates - exact) / errors
    # Student's t with 7 degrees of freedom: variance 1.4, one in 10^4 beyond 7.9.
    assert 0.9 < np.std(z) < 1.6
    spread = np.std(estimates, ddof=1) / 200**0.5
    assert abs(np.mean(estimates, dtype=float) - exact) < 4 * spread
    # The same probes with the matrix f(A): nothing but round-off is between them, the
    # skewness of z included, which for exp gives it a mean near -0.4.
    values, vectors = np.linalg.eigh(np.asarray(a, float))
    forms = exact_forms(keys, (vectors * function(values)) @ vectors.T)
    np.testing.assert_allclose(estimates, forms.mean(1), rtol=1e-5)
    expected = forms.std(1, ddof=1) / 8**0.5
    np.testing.assert_allclose(errors, expected, atol=1e-4 * expected.mean())
    oracle = (forms.mean(1) - exact) / expected
    assert abs(np.mean(z) - np.mean(oracle)) < 1e-3
    if name == "logdet":  # little skewed
        assert abs(np.mean(z)) < 4 * 1.2 / 200**0.5


def test_scaling_adds_to_the_log_determinant(x64):
    a = symmetric(np.linspace(0.1, 3, 40), dtype=jnp.float64)
    one, error = logdet(KEY, multiply(a), jnp.ones(40), damping=0.1)
    two, same = logdet(KEY, multiply(2 * a), jnp.ones(40), damping=0.2)
    assert float(two - one) == pytest.approx(40 * np.log(2), abs=1e-9)
    assert float(same) == pytest.approx(float(error), rel=1e-7)


def test_round_off_below_zero_counts_as_zero():
    a = jnp.diag(jnp.array([-1e-7, 0.0, 1.0]))
    estimate, _ = logdet(KEY, multiply(a), jnp.ones(3), damping=1e-8, order=3)
    assert float(estimate) == pytest.approx(2 * np.log(1e-8), rel=1e-3)


def test_padding_does_not_reach_the_function():
    # One step suffices; the rest repeats the eigenvalue 2 with weight zero.
    seen = []

    def function(values):
        seen.append(np.asarray(values))
        return jnp.where(values > 1, values, jnp.nan)

    estimate, error = spectral_sum(
        KEY, multiply(2 * jnp.eye(6)), jnp.ones(6), function, order=4, num_probes=2
    )
    assert float(estimate) == pytest.approx(12, rel=1e-6)
    assert float(error) == pytest.approx(0, abs=1e-5)
    np.testing.assert_allclose(seen[0], 2, rtol=1e-6)


def test_one_probe_knows_no_error():
    _, error = logdet(KEY, multiply(jnp.eye(4)), jnp.ones(4), damping=1.0, num_probes=1)
    assert np.isnan(error)


def test_damping_may_be_traced_and_functions_compile_nothing_again():
    traces = []

    def product(matrix, v):
        traces.append(1)
        return matrix @ v

    operator = Partial(product, symmetric(np.linspace(0, 1, 30)))
    sums = []
    for power in (1, 2, 3):
        found = spectral_sum(
            KEY,
            operator,
            jnp.ones(30),
            lambda t, power=power: t**power,
            order=6,
            num_probes=2,
        )
        sums.append(float(found[0]))
    assert len(traces) <= 2  # the program, and the look for convolutions
    assert sums[0] > sums[1] > sums[2]
    inside = jax.jit(lambda d: logdet(KEY, operator, jnp.ones(30), damping=d))
    outside = logdet(KEY, operator, jnp.ones(30), damping=0.3)
    np.testing.assert_allclose(inside(0.3), outside, rtol=1e-4)
