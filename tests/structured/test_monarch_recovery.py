"""Recovery of the factors of matrices that are a Monarch times an adjoint one."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.structured import (
    MMStarFactors,
    circulant_factors,
    factor_mmstar,
    hadamard_factors,
    mmstar_matmul,
    mmstar_to_dense,
    monarch_to_dense,
)

SIZES = ((16, 4), (24, 4), (24, 6), (36, 4), (36, 6))
factor = jax.jit(factor_mmstar, static_argnames="block")


def draw(rng, *shape, dtype=np.float64):
    array = rng.standard_normal(shape)
    if np.issubdtype(dtype, np.complexfloating):
        array = array + 1j * rng.standard_normal(shape)
    return jnp.asarray(array, dtype)


def planted(n, block, *, seed=0, dtype=np.float64):
    rng, t = np.random.default_rng(seed), n // block
    shapes = ((block, t, t), (t, block, block), (block, t, t))
    arrays = (draw(rng, *shape, dtype=dtype) for shape in shapes)
    return MMStarFactors(*arrays, jnp.zeros(()))


def brute_force(factors):
    """The five matrices of the definition, with an explicit permutation."""
    l1, r, l2 = (np.asarray(w) for w in factors[:3])
    b, t = l1.shape[:2]
    permutation = np.eye(t * b)[np.arange(t * b).reshape(t, b).T.ravel()]

    def diagonal(blocks):
        size = blocks.shape[1]
        matrix = np.zeros((t * b, t * b), blocks.dtype)
        for i, block in enumerate(blocks):
            part = slice(i * size, (i + 1) * size)
            matrix[part, part] = block
        return matrix

    outer = lambda blocks: permutation.T @ diagonal(blocks) @ permutation
    return outer(l1) @ diagonal(r) @ outer(l2)


@pytest.mark.parametrize("dtype", [np.float64, np.complex128])
@pytest.mark.parametrize(("n", "block"), [(6, 2), (6, 3), (12, 4), (5, 1), (5, 5)])
def test_products_equal_the_definition(x64, n, block, dtype):
    factors = planted(n, block, dtype=dtype)
    dense = brute_force(factors)
    np.testing.assert_allclose(mmstar_to_dense(factors), dense, atol=1e-12)
    x = draw(np.random.default_rng(1), 2, 3, n, dtype=dtype)
    np.testing.assert_allclose(
        mmstar_matmul(x, factors), np.asarray(x) @ dense.T, atol=1e-11
    )


def test_a_monarch_times_an_adjoint_one_is_in_the_class(x64):
    rng = np.random.default_rng(0)
    (w1, v1), (w2, v2) = (
        [draw(rng, *shape, dtype=np.complex128) for _ in range(2)]
        for shape in ((3, 4, 4), (4, 3, 3))
    )
    product = monarch_to_dense(w1, w2) @ monarch_to_dense(v1, v2).conj().T
    middle = w1 @ v1.conj().mT
    factors = MMStarFactors(w2, middle, v2.conj().mT, jnp.zeros(()))
    np.testing.assert_allclose(mmstar_to_dense(factors), product, atol=1e-12)
    recovered = factor(product, block=4)
    assert recovered.residual < 1e-11
    np.testing.assert_allclose(mmstar_to_dense(recovered), product, atol=1e-9)


# Over seeds the residual spreads by orders of magnitude with the conditioning of the
# eigenvectors, more for real matrices; the bound is what ten seeds stay below.
@pytest.mark.parametrize(("dtype", "bound"), [(float, 1e-9), (complex, 1e-12)])
@pytest.mark.parametrize(("n", "block"), SIZES)
def test_planted_factors_are_recovered(x64, n, block, dtype, bound):
    residuals = []
    for seed in range(10):
        matrix = brute_force(planted(n, block, seed=seed, dtype=dtype))
        found = factor(matrix, block=block)
        t = n // block
        assert found.l1.shape == found.l2.shape == (block, t, t)
        assert found.r.shape == (t, block, block)
        assert found.l1.dtype == found.r.dtype == jnp.complex128
        error = np.linalg.norm(mmstar_to_dense(found) - matrix)
        error /= np.linalg.norm(matrix)
        # The residual is that relative error; the last digits are rounding.
        np.testing.assert_allclose(found.residual, error, rtol=0.1, atol=1e-14)
        residuals.append(error)
        if dtype is float:
            assert jnp.abs(found.l1.imag).max() == 0
    assert max(residuals) < bound
    assert np.median(residuals) < bound / 10


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("n", "block"), SIZES)
def test_outside_the_class_the_residual_is_large(x64, n, block, seed):
    rng = np.random.default_rng(seed)
    matrix = draw(rng, n, n)
    assert factor(matrix, block=block).residual > 0.5
    inside = brute_force(planted(n, block, seed=seed, dtype=complex))
    touched = inside.copy()
    touched[n // 2, n // 3] += 0.1 * np.abs(inside).max()
    assert factor(touched, block=block).residual > 1e-3


def test_one_block_of_the_last_row_counts(x64):
    # Only F[3, 3] leaves the common eigenvectors here.
    matrix = np.array(brute_force(planted(16, 4, dtype=complex)))
    matrix[3::4, 3::4] = draw(np.random.default_rng(5), 4, 4)
    assert factor(matrix, block=4).residual > 1e-2


def test_matrices_of_the_class_that_have_a_formula(x64):
    column = draw(np.random.default_rng(0), 24)
    circulant = mmstar_to_dense(circulant_factors(column, block=4))
    # All F of a Kronecker product are multiples of the unit matrix.
    hadamard = monarch_to_dense(*hadamard_factors(16, nblocks=4, dtype=jnp.float64))
    for matrix in (circulant, circulant.real, hadamard):
        found = factor(matrix, block=4)
        assert found.residual < 1e-11
        np.testing.assert_allclose(mmstar_to_dense(found), matrix, atol=1e-10)


def test_coinciding_eigenvalues_of_one_combination_do_no_harm(x64):
    # Every F alone has a double eigenvalue: only together they fix the eigenvectors.
    factors = planted(9, 3, dtype=complex)
    r = np.ones((3, 3, 3))
    r[0, 1, 1], r[1, 1, 2], r[2, 2, 1] = 2, 3, 4
    matrix = brute_force(factors._replace(r=r))
    assert factor(matrix, block=3).residual < 1e-12


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_scales_do_not_matter(scale):
    matrix = jnp.asarray(brute_force(planted(16, 4, dtype=complex)), np.complex64)
    found = factor(scale * matrix, block=4)
    assert found.residual < 1e-4
    error = np.linalg.norm((mmstar_to_dense(found) - scale * matrix) / scale)
    assert error < 1e-4 * np.linalg.norm(matrix)


def test_single_precision():
    matrix = brute_force(planted(16, 4, dtype=complex))
    for dtype in (jnp.float16, jnp.float32, jnp.complex64):
        found = factor(jnp.asarray(matrix.real, dtype), block=4)
        assert found.l1.dtype == jnp.complex64
        assert found.residual.dtype == jnp.float32
    found = factor(jnp.asarray(matrix, jnp.complex64), block=4)
    assert found.residual < 1e-4


@pytest.mark.parametrize("matrix", [np.eye(16), np.zeros((16, 16))])
def test_singular_blocks_give_nan(matrix):
    assert jnp.isnan(factor(jnp.asarray(matrix, np.float32), block=4).residual)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("place", [(0, 0), (7, 9), (15, 15)])
def test_what_is_not_finite_gives_nan(value, place):
    matrix = np.random.default_rng(0).standard_normal((16, 16)).astype(np.float32)
    matrix = jnp.asarray(matrix).at[place].set(value)
    assert jnp.isnan(factor(matrix, block=4).residual)


@pytest.mark.parametrize("block", [1, 6])
def test_one_block_holds_every_invertible_matrix(x64, block):
    matrix = draw(np.random.default_rng(0), 6, 6)
    found = factor(matrix, block=block)
    assert found.residual < 1e-13
    np.testing.assert_allclose(mmstar_to_dense(found), matrix, atol=1e-12)


def test_one_trace_vmap_and_no_gradient(x64):
    matrices = jnp.stack([brute_force(planted(16, 4, seed=i)) for i in range(2)])
    traced = jax.jit(chex.assert_max_traces(lambda m: factor_mmstar(m, block=4), 1))
    stack = jax.jit(jax.vmap(lambda m: factor_mmstar(m, block=4)))(matrices)
    assert stack.residual.shape == (2,)
    for i, matrix in enumerate(matrices):
        assert traced(matrix).residual < 1e-10
        one = jax.tree.map(lambda leaf, i=i: leaf[i], stack)
        np.testing.assert_allclose(mmstar_to_dense(one), matrix, atol=1e-8)
    loss = lambda m: jnp.abs(factor_mmstar(m, block=4).r).sum()
    np.testing.assert_array_equal(jax.grad(loss)(matrices[0]), 0)


def test_complex_gradients_of_the_product(x64):
    factors = planted(12, 4, dtype=np.complex128)
    rng = np.random.default_rng(3)
    x, y = (draw(rng, 12, dtype=np.complex128) for _ in range(2))
    _, pull = jax.vjp(lambda x: mmstar_matmul(x, factors), x)
    adjoint = mmstar_to_dense(factors).conj().T
    np.testing.assert_allclose(pull(y.conj())[0].conj(), adjoint @ y, rtol=1e-11)
    power = lambda f: jnp.sum(jnp.abs(mmstar_matmul(x, f)) ** 2)
    dense = lambda f: jnp.sum(jnp.abs(mmstar_to_dense(f) @ x) ** 2)
    got, want = jax.grad(power)(factors), jax.grad(dense)(factors)
    for g, w in zip(got[:3], want[:3], strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-10)
