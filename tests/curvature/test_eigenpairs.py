"""Extremal eigenpairs against eigendecompositions; outliers; overlaps."""

import dataclasses
import functools
import pathlib
import runpy

import chex
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlab.curvature._basis import projected_twice
from jaxlab.curvature.density import spectral_density
from jaxlab.curvature.eigenpairs import (
    Eigenpairs,
    bulk_edges,
    split_outliers,
    subspace_overlap,
    top_eigenpairs,
)
from jaxlab.curvature.lanczos import lanczos, ritz

M_ = runpy.run_path(str(pathlib.Path(__file__).parent / "matrices.py"))
multiply = M_["multiply"]
symmetric = functools.partial(M_["symmetric"], dtype=jnp.float64)
GOLDEN = np.load(pathlib.Path(__file__).parent.parent / "goldens" / "hessian.npz")
DRIVERS = ("compiled", "host")
Partial = jax.tree_util.Partial

# Ten outliers above a bulk with a long tail, some of it negative.
NETWORK = np.r_[
    -np.geomspace(1e-4, 0.3, 40),
    np.zeros(100),
    np.geomspace(1e-5, 2, 250),
    np.geomspace(2.2, 10, 10),
]
SPECTRA = {
    "negative": np.r_[-30, -12, -11.9, np.linspace(-1, 1, 57), 2, 5],
    "clusters": np.r_[np.linspace(-1, 1, 54), 4 - 1e-3, 4, 4 + 1e-3, 6, 6 + 1e-4, 9],
    "multiple": np.r_[np.linspace(-1, 1, 53), -5, -5, -5, 3, 4, 4, 7],
    "two values": np.r_[np.ones(50), np.full(10, 6)],
    "identity": np.ones(60),
    "zero": np.zeros(60),
    "deficient": np.r_[np.zeros(57), 1, 2, 3],
}


def turned(matrix, by, *, seed=0):
    """Rotates a matrix slightly and scales it by as much."""
    size = len(matrix)
    g = np.random.default_rng(seed).standard_normal((size, size))
    g = (g - g.T) * by / np.sqrt(8 * size)
    r = np.linalg.solve(np.eye(size) - g, np.eye(size) + g)
    return jnp.asarray((1 + by) * r @ np.asarray(matrix) @ r.T, matrix.dtype)


def wanted(eigenvalues, k, which):
    down = np.sort(np.asarray(eigenvalues))[::-1]
    if which == "both":
        upper = -(-k // 2)
        return np.r_[down[:upper], down[len(down) - (k - upper) :]]
    return down[:k] if which == "largest" else down[::-1][:k]


def check(matrix, found: Eigenpairs, atol):
    """Vectors are orthonormal, and residuals are what a product measures."""
    a, x = np.asarray(matrix), np.asarray(found.vectors)
    np.testing.assert_allclose(x @ x.T, np.eye(len(x)), atol=atol)
    measured = np.linalg.norm(x @ a - np.asarray(found.values)[:, None] * x, axis=1)
    scale = max(np.linalg.norm(a, 2), 1e-30)
    np.testing.assert_allclose(found.residuals, measured, atol=atol * scale)


def find(matrix, *, seed=0, **options):
    like = jnp.ones(len(matrix), matrix.dtype)
    return top_eigenpairs(jax.random.key(seed), multiply(matrix), like, **options)


@dataclasses.dataclass(frozen=True)
class Streamed:
    """A host operator: its product is NumPy's, out of reach of any trace."""

    matrix: np.ndarray
    host: bool = True

    def __call__(self, v):
        return jnp.asarray(self.matrix @ np.asarray(v), jnp.float32)


# Limits


def test_one_dimension(x64):
    found = find(jnp.full((1, 1), -3.0), k=1)
    np.testing.assert_allclose(found.values, [-3], rtol=1e-14)
    np.testing.assert_allclose(abs(found.vectors), [[1]], rtol=1e-14)
    assert found.num_products == 1


@pytest.mark.parametrize("name", ["negative", "multiple", "identity"])
def test_all_pairs_of_a_matrix(x64, name):
    a = symmetric(SPECTRA[name])
    found = find(a, k=len(a), which="both")
    exact = wanted(SPECTRA[name], len(a), "both")
    np.testing.assert_allclose(found.values, exact, atol=1e-11)
    check(a, found, 1e-11)
    assert found.num_products == len(a)


# Eigendecompositions


@pytest.mark.parametrize("which", ["largest", "smallest", "both"])
@pytest.mark.parametrize("name", SPECTRA)
def test_pairs_of_prescribed_spectra(x64, name, which):
    a = symmetric(SPECTRA[name])
    found = find(a, k=5, which=which, tol=1e-10, basis_size=24)
    np.testing.assert_allclose(
        found.values, wanted(SPECTRA[name], 5, which), rtol=1e-9, atol=1e-9
    )
    check(a, found, 1e-11)
    scale = max(abs(SPECTRA[name]).max(), 1e-30)
    assert found.residuals.max() <= 1e-10 * scale + 1e-15


@pytest.mark.parametrize("driver", DRIVERS)
def test_float32(driver):
    a = symmetric(NETWORK, dtype=jnp.float32)
    found = find(a, k=10, driver=driver)
    np.testing.assert_allclose(found.values, wanted(NETWORK, 10, "largest"), rtol=2e-4)
    check(a, found, 3e-6)
    assert found.residuals.max() <= 1e-3 * 10.001


def test_many_restarts_keep_the_vectors_orthonormal():
    a = symmetric(np.linspace(-1, 1, 300), dtype=jnp.float32)
    found = find(a, k=4, tol=1e-4, basis_size=12, max_products=2000)
    assert found.num_products > 100
    assert found.residuals.max() < 1e-4
    np.testing.assert_allclose(
        found.values, wanted(np.linspace(-1, 1, 300), 4, "largest"), atol=1e-5
    )
    check(a, found, 5e-6)


def test_projections_that_cancel_nearly_all_are_repeated():
    rng = np.random.default_rng(0)
    q = np.linalg.qr(rng.standard_normal((200, 9)))[0].T.astype(np.float32)
    rows, beyond = jnp.asarray(np.r_[q[:8], np.zeros((2, 200))], jnp.float32), q[8]
    w, c = projected_twice(rows, jnp.asarray(3 * q[0] - q[5] + 1e-4 * beyond))
    assert jnp.abs(rows @ w).max() < 1e-6 * jnp.linalg.norm(w)
    np.testing.assert_allclose(c, [3, 0, 0, 0, 0, -1, 0, 0, 0, 0], atol=1e-6)


# Golden arrays


@pytest.mark.parametrize("matrix", ["hessian", "ggn", "empirical_fisher"])
@pytest.mark.parametrize("case", ["ce", "mse"])
def test_golden_pairs(x64, case, matrix):
    a = jnp.asarray(GOLDEN[f"{case}/{matrix}"])
    exact = GOLDEN[f"{case}/{matrix}_eigvals"]
    found = find(a, k=3, tol=1e-12)
    np.testing.assert_allclose(found.values, exact[::-1][:3], rtol=1e-9)
    sign = jnp.sign(found.vectors[0, jnp.argmax(jnp.abs(found.vectors[0]))])
    top = GOLDEN[f"{case}/{matrix}_top_eigvec"]
    np.testing.assert_allclose(sign * found.vectors[0], top, atol=1e-9)


def test_golden_ends_of_the_hessian(x64):
    a = jnp.asarray(GOLDEN["ce/hessian"])
    exact = GOLDEN["ce/hessian_eigvals"]
    found = find(a, k=3, tol=1e-12, driver="host")
    vectors = jnp.asarray(GOLDEN["ce/hessian_top3_eigvecs"].T)
    assert subspace_overlap(found.vectors, vectors) == pytest.approx(1, abs=1e-12)
    bottom = find(a, k=3, which="smallest", tol=1e-12)
    np.testing.assert_allclose(bottom.values, exact[:3], rtol=1e-9)
    vector = bottom.vectors[0] * jnp.sign(
        bottom.vectors[0] @ GOLDEN["ce/hessian_bottom_eigvec"]
    )
    np.testing.assert_allclose(vector, GOLDEN["ce/hessian_bottom_eigvec"], atol=1e-9)


def test_golden_overlap(x64):
    h, g = (
        find(jnp.asarray(GOLDEN[f"ce/{m}"]), k=3, tol=1e-12) for m in ("hessian", "ggn")
    )
    overlap = subspace_overlap(h.vectors, g.vectors)
    np.testing.assert_allclose(overlap, GOLDEN["ce/overlap_top3_H_G"], rtol=1e-9)


# Breakdowns


@pytest.mark.parametrize("driver", DRIVERS)
def test_multiplicities_behind_an_invariant_subspace(x64, driver):
    for spectrum in ([1] * 7 + [6] * 2, [6] * 3 + [1] * 6, [2] * 9):
        a = symmetric(np.array(spectrum, float))
        found = find(a, k=3, driver=driver)
        exact = wanted(spectrum, 3, "largest")
        np.testing.assert_allclose(found.values, exact, atol=1e-12)
        check(a, found, 1e-12)


def test_a_null_space_costs_little(x64):
    # After four steps nothing is left; one more random vector confirms it.
    found = find(symmetric(SPECTRA["deficient"]), k=3, tol=1e-12)
    assert found.num_products <= 6
    assert find(jnp.zeros((60, 60)), k=3).num_products <= 5


# Cost


def long_run(matrix, k, tol, seed=0):
    """Counts the steps of one long Lanczos run until k residuals are small."""
    start = jax.random.normal(jax.random.key(seed), (len(matrix),), matrix.dtype)
    order = 100 if len(matrix) > 100 else len(matrix)
    whole = lanczos(multiply(matrix), start, order=order)
    for steps in range(k, order + 1):
        alpha, beta = np.asarray(whole.alpha[:steps]), np.asarray(whole.beta[:steps])
        t = np.diag(alpha) + np.diag(beta[:-1], 1) + np.diag(beta[:-1], -1)
        values, u = np.linalg.eigh(t)
        residuals = np.abs(beta[-1] * u[-1, -k:])
        if residuals.max() <= tol * np.abs(values).max():
            return steps
    raise AssertionError("raise the order")


def power_iteration(matrix, k, tol, seed=0):
    """Counts the products of deflated power iteration, to the same residuals."""
    a, rng = np.asarray(matrix), np.random.default_rng(seed)
    vectors, products, scale = np.zeros((0, len(a))), 0, None
    for _ in range(k):
        v = rng.standard_normal(len(a))
        while True:
            v -= vectors.T @ (vectors @ v)
            v /= np.linalg.norm(v)
            image = a @ v
            products += 1
            value = v @ image
            scale = scale or abs(value)
            scale = max(scale, abs(value))
            if np.linalg.norm(image - value * v) <= tol * scale:
                break
            v = image
        vectors = np.vstack([vectors, v])
    return products


@pytest.mark.parametrize("case", ["network", "golden"])
def test_products_against_one_long_run_and_power_iteration(x64, case):
    # The golden spectrum falls so fast that at 1e-3 of the top power iteration, too,
    # is done at once.
    k, tol = 10, 1e-3 if case == "network" else 1e-6
    golden = jnp.asarray(GOLDEN["ce/hessian"])
    a = symmetric(NETWORK) if case == "network" else golden
    ours = [int(find(a, k=k, tol=tol, seed=seed).num_products) for seed in range(5)]
    long = [long_run(a, k, tol, seed) for seed in range(5)]
    # A long run that knew where to stop is the least that one start vector can need.
    assert np.mean(ours) <= np.mean(long) + 2
    assert power_iteration(a, k, tol) >= 5 * max(ours)


def test_small_bases_cost_few_products_more(x64):
    a = symmetric(NETWORK)
    large = find(a, k=10, tol=1e-6, basis_size=200).num_products
    small = find(a, k=10, tol=1e-6, basis_size=20).num_products
    assert large <= small <= 1.5 * large


@pytest.mark.parametrize(
    ("k", "driver"), [(1, "compiled"), (10, "compiled"), (10, "host")]
)
def test_warm_starts_cost_fewer_products(k, driver):
    a = symmetric(NETWORK, dtype=jnp.float32)
    first = find(a, k=k, driver=driver)
    again = find(a, k=k, start=first.vectors, driver=driver)
    assert again.num_products == k + 2
    b = turned(a, 3e-3)
    cold = find(b, k=k, driver=driver)
    warm = find(b, k=k, start=first.vectors, driver=driver)
    assert warm.num_products <= 0.7 * cold.num_products
    exact = 1.003 * wanted(NETWORK, k, "largest")
    np.testing.assert_allclose(warm.values, exact, rtol=2e-4)
    check(b, warm, 3e-6)


def test_start_vectors_that_mix_the_pairs():
    a = symmetric(NETWORK, dtype=jnp.float32)
    x = find(a, k=10, tol=1e-5).vectors
    mix = jnp.asarray(
        np.linalg.qr(np.random.default_rng(0).standard_normal((10, 10)))[0]
    )
    found = find(a, k=10, tol=1e-6, start=mix.astype(x.dtype) @ x)
    np.testing.assert_allclose(found.values, wanted(NETWORK, 10, "largest"), rtol=1e-5)
    check(a, found, 3e-6)


def test_tracking_through_many_changes():
    a = symmetric(NETWORK, dtype=jnp.float32)
    vectors, cold, warm = find(a, k=10).vectors, 0, 0
    for step in range(6):
        a = turned(a, 1e-3, seed=step)
        found = find(a, k=10, start=vectors)
        exact = np.linalg.eigvalsh(np.asarray(a, np.float64))[::-1][:10]
        np.testing.assert_allclose(found.values, exact, rtol=1e-3)
        cold, warm = cold + find(a, k=10).num_products, warm + found.num_products
        vectors = found.vectors
    assert warm < 0.6 * cold


def test_useless_start_vectors_cost_no_more_than_their_own_products(x64):
    a = symmetric(NETWORK)
    rng = np.random.default_rng(3)
    cold = find(a, k=4)
    for start in (
        jnp.asarray(rng.standard_normal((4, len(a)))),
        jnp.zeros((4, len(a))),
        jnp.ones((4, len(a))),  # one direction
        jnp.asarray(np.linalg.eigh(a)[1][:, :4].T),  # of other eigenvalues
    ):
        found = find(a, k=4, start=start, tol=1e-3)
        np.testing.assert_allclose(found.values, cold.values, rtol=1e-3)
        check(a, found, 1e-12)
        assert found.num_products <= cold.num_products + 4 + 8


def test_more_and_fewer_start_vectors_than_pairs(x64):
    a = symmetric(NETWORK)
    x = find(a, k=10).vectors
    for k, start in ((4, x), (10, x[:4])):
        found = find(a, k=k, start=start, tol=1e-8)
        np.testing.assert_allclose(found.values, wanted(NETWORK, k, "largest"))
        check(a, found, 1e-12)


@pytest.mark.parametrize("driver", DRIVERS)
def test_max_products_ends_it(driver):
    a = symmetric(NETWORK, dtype=jnp.float32)
    options = dict(k=10, tol=1e-6, driver=driver)
    for most in (10, 11, 23):
        found = find(a, max_products=most, **options)
        assert found.num_products == most
        assert found.residuals.max() > 1e-5
        check(a, found, 3e-6)
    start = find(turned(a, 1e-3), **options).vectors
    found = find(a, max_products=13, start=start, **options)
    assert found.num_products == 13
    check(a, found, 3e-6)


# Programs


def test_drivers_agree(x64):
    a = symmetric(SPECTRA["negative"])
    options = dict(k=5, which="both", basis_size=24, tol=1e-10)
    one, other = (find(a, driver=driver, **options) for driver in DRIVERS)
    assert one.num_products == other.num_products
    chex.assert_trees_all_close(one, other, atol=1e-9)


def test_host_operators():
    a = symmetric(NETWORK, dtype=jnp.float32)
    like = jnp.ones(len(a))
    found = top_eigenpairs(jax.random.key(0), Streamed(np.asarray(a)), like, k=10)
    chex.assert_trees_all_close(found.values, find(a, k=10).values, rtol=1e-4)
    check(a, found, 3e-6)


def test_the_program_holds_the_product_once():
    calls = []

    def apply(matrix, v):
        calls.append(v)
        return jnp.sin(matrix @ v)  # a name to look for, not a linear map

    operator = Partial(apply, jnp.eye(50))
    run = lambda operator: top_eigenpairs(
        jax.random.key(0), operator, jnp.ones(50), k=3
    )
    program = jax.jit(run).lower(operator).as_text()
    assert program.count("stablehlo.sine") == 1
    assert len(calls) == 1


def test_operators_are_arguments_and_options_too():
    @jax.jit
    @chex.assert_max_traces(1)
    def run(key, matrix, start, tol, max_products):
        return top_eigenpairs(
            key,
            multiply(matrix),
            jnp.ones(len(matrix)),
            k=10,
            start=start,
            tol=tol,
            max_products=max_products,
        )

    a = symmetric(NETWORK, dtype=jnp.float32)
    vectors = find(a, k=10).vectors
    for seed, by in ((0, 0.0), (1, 1e-3)):
        b = turned(a, by)
        found = run(jax.random.key(seed), b, vectors, 1e-3, 50)
        check(b, found, 3e-6)
        assert found.residuals.max() < 1e-3 * 10.02


def test_eager_calls_compile_once_for_many_operators():
    from jaxlab.curvature.eigenpairs import _compiled

    before = None
    for seed in range(3):
        find(symmetric(SPECTRA["negative"], seed=seed, dtype=jnp.float32), k=2)
        before = before or _compiled._cache_size()
    assert _compiled._cache_size() == before


def quadratic(tree):
    """Acts on a tree leaf by leaf, and couples the leaves by their sums."""
    total = sum(jnp.sum(leaf.astype(jnp.float32)) for leaf in jax.tree.leaves(tree))
    scale = {"w": 3.0, "b": 1.0}
    return {
        name: (scale[name] * leaf + total.astype(leaf.dtype) / 4).astype(leaf.dtype)
        if not isinstance(leaf, optax.MaskedNode)
        else leaf
        for name, leaf in tree.items()
    }


@pytest.mark.parametrize("driver", DRIVERS)
def test_trees_and_holes(driver):
    like = {"w": jnp.ones((2, 3)), "b": jnp.ones(2)}
    unravel = jax.flatten_util.ravel_pytree(like)[1]
    columns = [
        jax.flatten_util.ravel_pytree(quadratic(unravel(e)))[0]
        for e in np.eye(8, dtype=np.float32)
    ]
    exact = np.linalg.eigvalsh(np.stack(columns))[::-1]
    found = top_eigenpairs(jax.random.key(0), quadratic, like, k=3, driver=driver)
    np.testing.assert_allclose(found.values, exact[:3], rtol=1e-5)
    chex.assert_shape(found.vectors["w"], (3, 2, 3))
    chex.assert_shape(found.vectors["b"], (3, 2))
    masked = {"w": jnp.ones((2, 3)), "b": optax.MaskedNode()}
    found = top_eigenpairs(jax.random.key(0), quadratic, masked, k=1, driver=driver)
    assert found.vectors["b"] == optax.MaskedNode()
    np.testing.assert_allclose(found.values, [3 + 6 / 4], rtol=1e-5)
    again = top_eigenpairs(
        jax.random.key(0), quadratic, masked, k=1, start=found.vectors, driver=driver
    )
    np.testing.assert_allclose(again.values, found.values, rtol=1e-5)


def test_bfloat16_params():
    a = symmetric(NETWORK, dtype=jnp.float32)
    operator = Partial(lambda a, v: (a @ v.astype(jnp.float32)).astype(v.dtype), a)
    like = jnp.ones(len(a), jnp.bfloat16)
    found = top_eigenpairs(jax.random.key(0), operator, like, k=3, tol=1e-2)
    assert found.vectors.dtype == found.values.dtype == jnp.float32
    np.testing.assert_allclose(found.values, wanted(NETWORK, 3, "largest"), rtol=1e-2)
    # No residual is below the round-off of a product.
    assert found.residuals.min() > 1e-3 * 10
    x = np.asarray(found.vectors)
    np.testing.assert_allclose(x @ x.T, np.eye(3), atol=1e-5)
    again = top_eigenpairs(
        jax.random.key(0), operator, like, k=3, tol=1e-2, start=found.vectors
    )
    assert again.num_products <= 6


def test_shapes_are_enough():
    a = symmetric(SPECTRA["negative"], dtype=jnp.float32)
    like = jax.ShapeDtypeStruct((len(a),), jnp.float32)
    found = top_eigenpairs(jax.random.key(0), multiply(a), like, k=2)
    np.testing.assert_allclose(found.values, [5, 2], rtol=1e-3)


def test_nan_ends_it_at_once():
    found = top_eigenpairs(
        jax.random.key(0),
        lambda v: v * jnp.nan,
        jnp.ones(9),
        k=2,
        check_symmetric=False,
    )
    assert np.isnan(found.values).all()
    assert found.num_products == 1


def test_scaling_and_shifting(x64):
    a = symmetric(NETWORK)
    x = find(a, k=4, tol=1e-10)
    scaled = find(7 * a, k=4, tol=1e-10)
    assert scaled.num_products == x.num_products
    np.testing.assert_allclose(scaled.values, 7 * x.values, rtol=1e-12)
    shifted = find(a + 0.5 * jnp.eye(len(a)), k=4, tol=1e-10)
    np.testing.assert_allclose(shifted.values, x.values + 0.5, rtol=1e-12)


# Outliers


def outliers_of(eigenvalues, which="largest", scale="linear", factor=2.0):
    a = symmetric(eigenvalues, dtype=jnp.float32)
    like = jnp.ones(len(a))
    density = spectral_density(jax.random.key(1), multiply(a), like, scale=scale)
    found = find(a, k=10, which=which)
    mask = split_outliers(found.values, found.residuals, density, factor=factor)
    return np.asarray(found.values)[np.asarray(mask)]


@pytest.mark.parametrize("count", [0, 1, 2, 4, 8])
def test_planted_outliers_are_counted(count):
    bulk = np.r_[np.zeros(250 - count), np.geomspace(1e-5, 0.05, 150)]
    planted = np.linspace(0.3, 0.5, count)
    found = outliers_of(np.r_[bulk, planted])
    np.testing.assert_allclose(found, planted[::-1], rtol=1e-3)


def test_outliers_on_both_sides():
    rng = np.random.default_rng(0)
    spectrum = np.r_[rng.uniform(-0.1, 0.1, 395), -1.2, -0.9, 1, 1.1, 2]
    np.testing.assert_allclose(
        outliers_of(spectrum, "both"), [2, 1.1, 1, -0.9, -1.2], rtol=1e-3
    )


def test_outliers_of_a_logarithmic_density():
    spectrum = np.r_[np.geomspace(1e-3, 0.05, 398), 30, 40]
    found = outliers_of(spectrum, scale="log")
    np.testing.assert_allclose(found, [40, 30], rtol=1e-3)


def test_unconverged_values_are_no_outliers():
    spectrum = np.r_[np.linspace(-0.1, 0.1, 398), 1, 2]
    a = symmetric(spectrum, dtype=jnp.float32)
    density = spectral_density(jax.random.key(1), multiply(a), jnp.ones(len(a)))
    values, residuals = jnp.array([2.0, 1.0, 0.1]), jnp.array([0.1, 0.001, 0.0])
    split = jax.jit(split_outliers)
    np.testing.assert_array_equal(
        split(values, residuals, density), [False, True, False]
    )
    assert not split(values, residuals, density, factor=20.0).any()
    low, high = bulk_edges(density)
    assert -0.14 < low < -0.1
    assert 0.1 < high < 0.14


def test_a_bulk_away_from_zero():
    # An edge beyond zero counts as zero: all of one sign is no outlier by itself.
    spectrum = np.r_[np.linspace(1, 1.2, 398), -0.5, 5]
    found = outliers_of(spectrum, "both")
    np.testing.assert_allclose(found, [5, -0.5], rtol=1e-3)


# Overlaps


def test_overlaps():
    rng = np.random.default_rng(0)
    u = np.linalg.qr(rng.standard_normal((40, 40)))[0].astype(np.float32)
    overlap = lambda a, b: float(subspace_overlap(jnp.asarray(a), jnp.asarray(b)))
    mix = np.linalg.qr(rng.standard_normal((5, 5)))[0].astype(np.float32)
    assert overlap(u[:5], mix @ u[:5]) == pytest.approx(1, abs=1e-6)
    assert overlap(u[:5], u[:5]) <= 1
    assert overlap(u[:5], u[5:10]) == pytest.approx(0, abs=1e-6)
    assert overlap(u[:5], u[3:8]) == pytest.approx(0.4, abs=1e-6)
    tree = {"a": jnp.asarray(u[:5, :10]), "b": jnp.asarray(u[:5, 10:]).reshape(5, 5, 6)}
    assert subspace_overlap(tree, jnp.asarray(u[3:8])) == pytest.approx(0.4, abs=1e-6)
    assert jax.jit(subspace_overlap)(tree, tree) == pytest.approx(1, abs=1e-6)


def test_ritz_values_agree_with_lanczos(x64):
    a = symmetric(NETWORK)
    start = jax.random.normal(jax.random.key(3), (len(a),), a.dtype)
    values, _, _ = ritz(lanczos(multiply(a), start, order=60))
    np.testing.assert_allclose(find(a, k=4, tol=1e-9).values, values[-4:][::-1])
