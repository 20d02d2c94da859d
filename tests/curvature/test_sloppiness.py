"""Summaries of spectra and the subspaces that they share."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.curvature.sloppiness import (
    correlation_spectrum,
    displacement_fraction,
    sloppiness,
    subspace_overlap_curve,
)


def orthonormal(rng, k, p):
    return np.linalg.qr(rng.standard_normal((p, k)))[0].T


@pytest.mark.parametrize("shape", [(30, 6), (6, 30), (7, 7), (20, 2, 3), (1, 4)])
def test_correlation_spectrum_is_that_of_the_matrix(x64, shape):
    x = np.random.default_rng(0).standard_normal(shape) + 0.3
    flat = x.reshape(len(x), -1)
    want = np.linalg.eigvalsh(flat.T @ flat / len(x))[::-1]
    found = correlation_spectrum(jnp.asarray(x))
    assert found.shape == want.shape
    np.testing.assert_allclose(found, want, atol=1e-12)
    assert (found >= 0).all()
    assert (np.diff(found) <= 0).all()


def test_correlation_spectrum_keeps_small_eigenvalues_in_single_precision():
    rng = np.random.default_rng(1)
    want = 10.0 ** -np.arange(9)
    x = orthonormal(rng, 9, 50).T * np.sqrt(50 * want) @ orthonormal(rng, 9, 9)
    found = correlation_spectrum(jnp.asarray(x, jnp.float32))
    # Rounding x alone moves the last singular value by 6e-8 / 1e-4 of itself.
    np.testing.assert_allclose(found, want, rtol=2e-2)
    formed = np.linalg.eigvalsh((x.T @ x / 50).astype(np.float32))[::-1]
    assert abs(formed[-1] / want[-1] - 1) > 0.2


def test_correlation_spectrum_under_scaling_rotation_and_repetition(x64):
    rng = np.random.default_rng(2)
    x = rng.standard_normal((12, 5))
    base = correlation_spectrum(jnp.asarray(x))
    for other, factor in (
        (3 * x, 9),
        (x @ orthonormal(rng, 5, 5), 1),
        (np.concatenate([x, x]), 1),
        (x[::-1], 1),
    ):
        np.testing.assert_allclose(
            jax.jit(correlation_spectrum)(jnp.asarray(other)), factor * base, rtol=1e-12
        )
    wider = np.concatenate([x, np.zeros((12, 2))], axis=1)
    found = correlation_spectrum(jnp.asarray(wider))
    np.testing.assert_allclose(found, [*base, 0, 0], atol=1e-14)


def test_half_precision_inputs():
    x = jnp.asarray(np.random.default_rng(0).integers(0, 4, (9, 3)), jnp.bfloat16)
    found = correlation_spectrum(x)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, correlation_spectrum(x.astype("float32")))


def test_sloppiness_is_the_fit_of_the_range(x64):
    values = np.random.default_rng(0).uniform(0.1, 1, 40)
    values = np.sort(values * 10.0 ** -np.linspace(0, 5, 40))[::-1]
    for low, high in ((0, 40), (3, 30), (10, 13)):
        logs, index = np.log10(values[low:high]), np.arange(low, high)
        slope, _ = np.polyfit(index, logs, 1)
        found = sloppiness(jnp.asarray(values.copy()), low=low, high=high)
        np.testing.assert_allclose(found.slope, slope, rtol=1e-10)
        np.testing.assert_allclose(
            found.r_squared, np.corrcoef(index, logs)[0, 1] ** 2, rtol=1e-9
        )
        np.testing.assert_allclose(found.decades, logs[0] - logs[-1], rtol=1e-12)
    whole = sloppiness(jnp.asarray(values.copy()))
    np.testing.assert_allclose(
        whole, sloppiness(1e-7 * values, low=0, high=40), rtol=1e-10
    )


@pytest.mark.parametrize("value", [1.0, 0.3, 1e-20])
def test_a_flat_spectrum(value):
    fit = sloppiness(jnp.full(50, value))
    np.testing.assert_allclose(fit, (0, 1, 0), atol=1e-6)


def test_the_line_is_exact_for_a_geometric_spectrum_only():
    straight = sloppiness(10.0 ** -jnp.arange(0, 5, 0.1))
    np.testing.assert_allclose(straight, (-0.1, 1, 4.9), rtol=1e-4)
    power = sloppiness((1.0 + jnp.arange(50)) ** -4.0)
    assert power.r_squared < 0.9


@pytest.mark.parametrize("bad", [0.0, -1e-9])
def test_what_is_not_positive_spoils_only_ranges_that_hold_it(bad):
    values = jnp.array([4.0, 3.0, 2.0, 1.0, bad])
    assert not np.isfinite(sloppiness(values)).all()
    assert np.isfinite(sloppiness(values, high=4)).all()


def test_overlaps_are_those_of_the_definition(x64):
    rng = np.random.default_rng(0)
    a, b = orthonormal(rng, 6, 20), orthonormal(rng, 4, 20)
    want = [np.linalg.norm(a[:k] @ b[:k].T) ** 2 / k for k in range(1, 5)]
    found = jax.jit(subspace_overlap_curve)(jnp.asarray(a), jnp.asarray(b))
    np.testing.assert_allclose(found, want, rtol=1e-12)
    some = subspace_overlap_curve(jnp.asarray(a), jnp.asarray(b), ks=(3, 1))
    np.testing.assert_allclose(some, [want[2], want[0]], rtol=1e-12)


def test_equal_orthogonal_and_random_subspaces(x64):
    rng = np.random.default_rng(0)
    basis = orthonormal(rng, 400, 400)
    a, turn = basis[:20], orthonormal(rng, 20, 20)
    overlap = lambda x, y: subspace_overlap_curve(jnp.asarray(x), jnp.asarray(y))
    np.testing.assert_allclose(overlap(a, a), 1, rtol=1e-12)
    np.testing.assert_allclose(overlap(a, -a), 1, rtol=1e-12)
    np.testing.assert_allclose(overlap(a, turn @ a)[-1], 1, rtol=1e-12)
    np.testing.assert_allclose(overlap(a, basis[20:40]), 0, atol=1e-12)
    random = [overlap(a, orthonormal(rng, 20, 400))[-1] for _ in range(20)]
    # k/p = 0.05; one draw spreads by about sqrt(2) / p = 0.0035.
    np.testing.assert_allclose(np.mean(random), 20 / 400, atol=0.003)


def stacked(matrix):
    return {"w": matrix[:, :6].reshape(-1, 2, 3), "b": (matrix[:, 6:],)}


def test_trees_and_matrices_are_one(x64):
    rng = np.random.default_rng(0)
    a, b = (jnp.asarray(orthonormal(rng, 3, 8)) for _ in range(2))
    order = jnp.r_[6:8, 0:6]  # leaves in the order of the keys: b, w
    want = subspace_overlap_curve(a, b)
    for one, other in (
        (stacked(a), stacked(b)),
        (a[:, order], stacked(b)),
        (stacked(a), b[:, order]),
    ):
        np.testing.assert_allclose(subspace_overlap_curve(one, other), want, rtol=1e-12)
    params, params0 = (jnp.asarray(rng.standard_normal(8)) for _ in range(2))
    tree = lambda v: jax.tree.map(lambda x: x[0], stacked(v[None]))
    want = displacement_fraction(a, params, params0)
    for vectors in (stacked(a), a[:, order]):
        found = displacement_fraction(vectors, tree(params), tree(params0))
        np.testing.assert_allclose(found, want, rtol=1e-12)


def test_displacement_fractions_are_those_of_the_definition(x64):
    rng = np.random.default_rng(0)
    u = orthonormal(rng, 5, 9)
    end, start = rng.standard_normal((2, 9))
    d = end - start
    want = [np.sum((u[:k] @ d) ** 2) / (d @ d) for k in range(1, 6)]
    found = displacement_fraction(u, jnp.asarray(end), jnp.asarray(start))
    np.testing.assert_allclose(found, want, rtol=1e-12)
    some = displacement_fraction(u, jnp.asarray(end), jnp.asarray(start), ks=[4])
    np.testing.assert_allclose(some, want[3:4], rtol=1e-12)
    whole = jnp.asarray(orthonormal(rng, 9, 9))
    full = displacement_fraction(whole, jnp.asarray(end), jnp.asarray(start))
    np.testing.assert_allclose(full[-1], 1, rtol=1e-12)


def test_no_displacement_gives_zero_and_finite_gradients():
    start = jnp.ones(4)
    total = lambda end: displacement_fraction(jnp.eye(4)[:2], end, start).sum()
    value, slope = jax.value_and_grad(total)(start)
    assert value == 0
    np.testing.assert_array_equal(slope, 0)


def test_one_trace():
    rng = np.random.default_rng(0)
    traced = jax.jit(chex.assert_max_traces(displacement_fraction, 1))
    u = jnp.asarray(orthonormal(rng, 2, 5), jnp.float32)
    for _ in range(3):
        end, start = jnp.asarray(rng.standard_normal((2, 5)), jnp.float32)
        assert traced(u, end, start).shape == (2,)
