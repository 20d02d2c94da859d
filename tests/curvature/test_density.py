"""Densities against exact spectra, golden arrays and their own moments."""

import pathlib
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlab.curvature._quadrature import gauss_rules
from jaxlab.curvature.density import (
    _density,
    density_from_eigenvalues,
    plot_density,
    spectral_density,
)
from jaxlab.curvature.lanczos import lanczos, ritz

M_ = runpy.run_path(str(pathlib.Path(__file__).parent / "matrices.py"))
multiply = M_["multiply"]
symmetric = M_["symmetric"]
GOLDEN = np.load(pathlib.Path(__file__).parent.parent / "goldens" / "hessian.npz")
Partial = jax.tree_util.Partial
KEY = jax.random.key(0)
EIGENVALUES = np.r_[-np.geomspace(1e-3, 0.3, 30), np.geomspace(1e-3, 1, 67), 4, 6, 9]


def integral(y, x):
    return float(jnp.trapezoid(y, x))


@pytest.mark.parametrize("case", ["ce", "mse"])
def test_golden_densities(x64, case):
    golden = {
        k.partition("/")[2]: jnp.asarray(GOLDEN[k])
        for k in GOLDEN
        if k.startswith(f"{case}/")
    }
    grid, sigma = golden["density_grid"], golden["density_sigma2"] ** 0.5
    exact = density_from_eigenvalues(golden["hessian_eigvals"], grid, sigma=sigma)
    np.testing.assert_allclose(exact, golden["density_exact"], rtol=1e-9, atol=1e-12)
    rules = [
        ritz(
            lanczos(multiply(golden["hessian"]), v, order=int(golden["lanczos_order"]))
        )
        for v in golden["probes_normal"]
    ]
    nodes, weights = (jnp.stack(x) for x in list(zip(*rules))[:2])
    found = _density(nodes, weights, sigma, grid, None, scale="linear", num_points=1)
    np.testing.assert_allclose(found.density, golden["density_slq"], atol=1e-8)


def test_order_of_the_dimension_is_the_density_seen_by_the_probe(x64):
    a = symmetric(EIGENVALUES, dtype=jnp.float64)
    # Exact as soon as the order reaches the number of distinct eigenvalues.
    found = spectral_density(KEY, multiply(a), jnp.ones(100), order=200, sigma=0.1)
    values, vectors = np.linalg.eigh(a)
    probes = [jax.random.rademacher(k, (100,), float) for k in jax.random.split(KEY, 4)]
    shapes = np.stack(
        [
            density_from_eigenvalues(values[i : i + 1], found.grid, sigma=0.1)
            for i in range(100)
        ]
    )
    each = [np.square(vectors.T @ v) / 100 @ shapes for v in probes]
    np.testing.assert_allclose(found.density, np.mean(each, axis=0), atol=1e-9)
    error = np.std(each, axis=0, ddof=1) / 2
    np.testing.assert_allclose(found.standard_error, error, atol=1e-9)


def test_moments_of_the_density(x64):
    a = symmetric(EIGENVALUES, dtype=jnp.float64)
    found = spectral_density(
        KEY, multiply(a), jnp.ones(100), order=20, num_probes=3, num_points=4096
    )
    t, y = found.grid, found.density
    assert integral(y, t) == pytest.approx(1, abs=1e-5)
    moment = lambda d: float(jnp.mean(jnp.sum(found.weights * found.nodes**d, axis=1)))
    assert integral(y * t, t) == pytest.approx(moment(1), abs=1e-4)
    second = moment(2) + float(found.sigma) ** 2
    assert integral(y * t**2, t) == pytest.approx(second, rel=1e-4)
    width = float(found.nodes.max() - found.nodes.min())
    assert float(found.sigma) == pytest.approx(width / 20)


def test_expectation_is_the_exact_density():
    """Over 200 keys the mean is unbiased and the standard error is honest."""
    a = symmetric(EIGENVALUES)
    grid = jnp.linspace(-1, 10, 40)

    @jax.jit
    @jax.vmap
    def run(key):
        found = spectral_density(
            key, multiply(a), jnp.ones(100), order=30, sigma=0.5, grid=grid
        )
        return found.density, found.standard_error

    densities, errors = run(jax.random.split(jax.random.key(1), 200))
    exact = density_from_eigenvalues(EIGENVALUES, grid, sigma=0.5)
    spread = np.std(densities, axis=0, ddof=1)
    seen = np.asarray(exact) > 1e-4
    z = (np.mean(densities, axis=0) - exact) / (spread / 200**0.5)
    assert np.abs(z[seen]).max() < 4
    typical = np.sqrt(np.mean(np.square(errors), axis=0))
    np.testing.assert_allclose(typical[seen], spread[seen], rtol=0.25)


def test_logarithmic_scale_smooths_the_logarithms(x64):
    a = symmetric(EIGENVALUES, dtype=jnp.float64)
    found = spectral_density(
        KEY, multiply(a), jnp.ones(100), order=100, scale="log", sigma=0.2, floor=1e-2
    )
    logs = np.log10(np.maximum(np.abs(np.asarray(found.nodes)), 1e-2))
    each = [
        sum(
            w * np.asarray(density_from_eigenvalues(x[None], found.grid, sigma=0.2))
            for w, x in zip(weights, row)
        )
        for weights, row in zip(found.weights, logs)
    ]
    np.testing.assert_allclose(found.density, np.mean(each, axis=0), atol=1e-9)
    assert integral(found.density, found.grid) == pytest.approx(1, abs=1e-4)
    assert float(found.grid[0]) == pytest.approx(-2 - 5 * 0.2)
    assert float(found.nodes.min()) < 0  # nodes stay eigenvalues
    default = spectral_density(KEY, multiply(a), jnp.ones(100), order=9, scale="log")
    low = float(default.grid[0] + 5 * default.sigma)
    assert low >= np.log10(10 * np.finfo(float).eps * 9) - 1e-6


@pytest.mark.parametrize("scale", ["linear", "log"])
@pytest.mark.parametrize("value", [0.0, 3.0, -3.0])
def test_a_single_eigenvalue_has_a_finite_density(scale, value):
    a = value * jnp.eye(7)
    found = spectral_density(KEY, multiply(a), jnp.ones(7), scale=scale)
    assert np.isfinite(found.density).all()
    assert integral(found.density, found.grid) == pytest.approx(1, abs=1e-3)
    assert not np.asarray(found.standard_error).any()


def test_one_probe_knows_no_error():
    a = symmetric(EIGENVALUES)
    found = spectral_density(KEY, multiply(a), jnp.ones(100), order=8, num_probes=1)
    assert np.isnan(found.standard_error).all()
    assert np.isfinite(found.density).all()


def test_probes_at_once_and_drivers_agree():
    a = symmetric(EIGENVALUES)
    run = lambda **options: spectral_density(
        KEY, multiply(a), jnp.ones(100), order=20, num_probes=5, sigma=0.3, **options
    )
    expected = run()
    for options in (
        {"probes_at_once": 2},
        {"probes_at_once": 9},
        {"driver": "host"},
        {"reorthogonalize": "selective"},
    ):
        found = run(**options)
        np.testing.assert_allclose(found.density, expected.density, atol=2e-3)


def test_under_jit_with_one_trace_and_new_params():
    traces = []

    def product(matrix, v):
        traces.append(1)
        return matrix @ v

    like = {"a": jax.ShapeDtypeStruct((100,), jnp.float32), "b": optax.MaskedNode()}
    tree = lambda m, v: {"a": product(m, v["a"]), "b": v["b"]}
    run = lambda m: spectral_density(KEY, Partial(tree, m), like, order=12)
    for scale in (1.0, 2.0):
        a = scale * symmetric(EIGENVALUES)
        outside = run(a)
        inside = jax.jit(run)(a)
        np.testing.assert_allclose(
            inside.density, outside.density, rtol=1e-3, atol=1e-5
        )
        assert float(outside.nodes.max()) == pytest.approx(9 * scale, rel=1e-3)
    # Outside jit: one for the program, one to look for convolutions; inside: one each.
    assert len(traces) <= 4


def test_convolutions_are_driven_from_python():
    calls = []

    def product(kernel, v):
        calls.append(1)
        return jax.lax.conv(v[None, None], kernel[None, None], (1, 1), "SAME")[0, 0]

    operator = Partial(product, jnp.ones((3, 3)))
    found = spectral_density(KEY, operator, jnp.ones((4, 4)), order=6, sigma=0.3)
    compiled = spectral_density(
        KEY, operator, jnp.ones((4, 4)), order=6, sigma=0.3, driver="compiled"
    )
    np.testing.assert_allclose(found.density, compiled.density, atol=1e-4)


def test_equals_the_rules_of_lanczos():
    a = symmetric(EIGENVALUES)
    options = {
        "reorthogonalize": "full",
        "memory_limit": None,
        "probes_at_once": 1,
        "check_symmetric": True,
        "driver": "auto",
    }
    rules = gauss_rules(
        "test", KEY, multiply(a), jnp.ones(100), order=9, num_probes=2, **options
    )
    for i, key in enumerate(jax.random.split(KEY, 2)):
        v = jax.random.rademacher(key, (100,), jnp.float32)
        values, weights, residuals = ritz(lanczos(multiply(a), v, order=9))
        np.testing.assert_allclose(rules.nodes[i], values, atol=1e-5)
        np.testing.assert_allclose(rules.weights[i], weights, atol=1e-5)
        np.testing.assert_allclose(rules.residuals[i], residuals, atol=1e-5)


# The picture


@pytest.fixture
def drawn():
    from matplotlib import pyplot

    yield lambda *arguments, **options: plot_density(*arguments, **options)
    pyplot.close("all")


def test_picture_marks_outliers_and_shows_the_band(drawn):
    a = symmetric(EIGENVALUES)
    found = spectral_density(KEY, multiply(a), jnp.ones(100), sigma=0.15)
    ax = drawn(found, label="Hessian")
    curve, marks = ax.get_lines()
    np.testing.assert_allclose(curve.get_xdata(), found.grid)
    np.testing.assert_allclose(marks.get_xdata(), [4, 6, 9], atol=1e-3)
    assert ax.get_yscale() == "log"
    (band,) = ax.collections
    heights = band.get_paths()[0].vertices[:, 1]
    top = np.max(found.density + 2 * found.standard_error)
    assert heights.max() == pytest.approx(float(top), rel=1e-5)
    assert ax.get_legend().get_texts()[0].get_text() == "Hessian"


def test_picture_takes_axes_and_the_callers_outliers(drawn):
    from matplotlib import pyplot

    a = symmetric(EIGENVALUES)
    found = spectral_density(
        KEY, multiply(a), jnp.ones(100), order=12, num_probes=1, scale="log"
    )
    _, axes = pyplot.subplots()
    ax = drawn(found, ax=axes, outliers=jnp.array([-0.1, 10.0]))
    assert ax is axes
    np.testing.assert_allclose(ax.get_lines()[1].get_xdata(), [-1, 1], atol=1e-6)
    assert not ax.collections  # one probe: no band
    assert "log10" in ax.get_xlabel()
