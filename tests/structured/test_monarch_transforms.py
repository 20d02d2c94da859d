"""Transforms as Monarch factors, against library transforms and reference arrays."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.structured import (
    circulant_factors,
    dft_chain_factors,
    dft_factors,
    hadamard_factors,
    kronecker_factors,
    mmstar_matmul,
    mmstar_to_dense,
    monarch_chain_matmul,
    monarch_matmul,
    monarch_project_error,
    monarch_to_dense,
)

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens" / "monarch.npz"
complex_dft = functools.partial(dft_factors, dtype=jnp.complex128)


def draw(*shape, seed=0, imaginary=True):
    rng = np.random.default_rng(seed)
    real = rng.standard_normal(shape)
    return real + 1j * rng.standard_normal(shape) if imaginary else real


@pytest.mark.parametrize("case", ["16", "12", "36"])
def test_reference_fourier_factors(x64, case):
    with np.load(GOLDENS) as archive:
        g = {key: archive[f"dft/{case}/{key}"] for key in ("perm", "sizes", "w1", "w2")}
    k, l = (int(size) for size in g["sizes"])
    permutation, w1, w2 = complex_dft(k * l, nblocks=k)
    np.testing.assert_array_equal(permutation, g["perm"])
    assert (w1.shape, w2.shape) == (g["w1"].shape, g["w2"].shape)
    want = np.fft.fft(np.eye(k * l), norm="ortho")[:, g["perm"]]
    for factors in ((w1, w2), (g["w1"], g["w2"])):
        dense = monarch_to_dense(*(jnp.asarray(w) for w in factors))
        np.testing.assert_allclose(dense, want, atol=1e-10)
    # Single factors may differ by a phase in each slice, so not by absolute value.
    np.testing.assert_allclose(jnp.abs(w1), np.abs(g["w1"]), atol=1e-10)
    np.testing.assert_allclose(jnp.abs(w2), np.abs(g["w2"]), atol=1e-10)


# Sizes with k < l, k > l, k = l, one block, blocks of one, a prime.
@pytest.mark.parametrize(
    ("n", "nblocks"),
    [(1, 1), (6, 2), (6, 3), (7, 7), (7, 1), (16, 4), (24, 6), (24, 3), (64, 16)],
)
def test_fourier_is_the_library_transform(x64, n, nblocks):
    x = jnp.asarray(draw(2, 3, n))
    permutation, w1, w2 = complex_dft(n, nblocks=nblocks)
    assert (w1.shape, w2.shape) == (
        (nblocks, n // nblocks, n // nblocks),
        (n // nblocks, nblocks, nblocks),
    )
    y = monarch_matmul(x[..., permutation], w1, w2)
    np.testing.assert_allclose(y, np.fft.fft(x, norm="ortho"), atol=1e-12)
    permutation, w1, w2 = complex_dft(n, nblocks=nblocks, inverse=True)
    back = monarch_matmul(y[..., permutation], w1, w2)
    np.testing.assert_allclose(back, x, atol=1e-12)
    for w in (w1, w2):
        unit = np.broadcast_to(np.eye(w.shape[1]), w.shape)
        np.testing.assert_allclose(w @ w.mT.conj(), unit, atol=1e-12)


def test_fourier_in_single_precision_does_not_lose_digits():
    n = 1 << 12
    permutation, w1, w2 = dft_factors(n, nblocks=64)
    assert w1.dtype == w2.dtype == jnp.complex64
    assert permutation.dtype == jnp.int32
    x = draw(n)
    y = monarch_matmul(jnp.asarray(x, jnp.complex64)[permutation], w1, w2)
    want = np.fft.fft(x, norm="ortho")
    assert np.linalg.norm(y - want) <= 1e-6 * np.linalg.norm(want)


def test_fourier_without_its_permutation_is_not_in_the_class(x64):
    permutation, w1, w2 = complex_dft(16, nblocks=4)
    fourier = (
        jnp.zeros((16, 16), w1.dtype).at[:, permutation].set(monarch_to_dense(w1, w2))
    )
    sizes = {"nblocks_in": 4, "nblocks_out": 4}
    assert monarch_project_error(fourier[:, permutation], **sizes) < 1e-24
    assert monarch_project_error(fourier, **sizes) > 1


@pytest.mark.parametrize(
    "radices",
    [(4, 4, 4), (2, 2, 2, 2, 2), (3, 3, 3, 3), (2, 3, 5), (1, 4, 3), (5, 2), (7, 1)],
)
def test_fourier_of_any_radices(x64, radices):
    n = int(np.prod(radices))
    x = jnp.asarray(draw(3, n))
    for inverse, library in ((False, np.fft.fft), (True, np.fft.ifft)):
        permutation, factors = dft_chain_factors(
            radices, inverse=inverse, dtype=jnp.complex128
        )
        assert [w.shape for w in factors] == [(n // m, m, m) for m in radices]
        y = monarch_chain_matmul(x[:, permutation], factors)
        np.testing.assert_allclose(y, library(x, norm="ortho"), atol=1e-12)


def test_two_radices_are_the_two_factors(x64):
    chain = dft_chain_factors((3, 4), dtype=jnp.complex128)
    pair = complex_dft(12, nblocks=4)
    np.testing.assert_array_equal(chain[0], pair.permutation)
    for got, want in zip(chain[1], pair[1:], strict=True):
        np.testing.assert_array_equal(got, want)


def sylvester(n):
    matrix = np.ones((1, 1))
    while len(matrix) < n:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix / np.sqrt(n)


@pytest.mark.parametrize(
    ("n", "nblocks"), [(1, 1), (2, 1), (2, 2), (8, 2), (16, 4), (64, 2), (64, 32)]
)
def test_hadamard_in_natural_order(x64, n, nblocks):
    factors = hadamard_factors(n, nblocks=nblocks, dtype=jnp.float64)
    assert factors.w1.shape == (nblocks, n // nblocks, n // nblocks)
    dense = monarch_to_dense(*factors)
    np.testing.assert_allclose(dense, sylvester(n), atol=1e-14)
    x = jnp.asarray(draw(5, n, imaginary=False))
    twice = monarch_matmul(monarch_matmul(x, *factors), *factors)
    np.testing.assert_allclose(twice, x, atol=1e-13)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.complex64])
def test_hadamard_dtypes(dtype):
    factors = hadamard_factors(16, nblocks=4, dtype=dtype)
    assert factors.w1.dtype == factors.w2.dtype == dtype
    # Entries of a half are exact everywhere.
    np.testing.assert_array_equal(jnp.abs(factors.w1.astype(jnp.complex64)), 0.5)


@pytest.mark.parametrize("shapes", [((3, 4), (5, 2)), ((1, 6), (4, 1)), ((2, 2),) * 2])
def test_kronecker(x64, shapes):
    a, b = jnp.asarray(draw(*shapes[0])), jnp.asarray(draw(*shapes[1], seed=1))
    factors = kronecker_factors(a, b.real)
    assert factors.w1.dtype == factors.w2.dtype == jnp.complex128
    np.testing.assert_allclose(
        monarch_to_dense(*factors), np.kron(a, b.real), atol=1e-14
    )
    x = jnp.asarray(draw(2, a.shape[1] * b.shape[1], seed=2))
    product = monarch_matmul(x, *kronecker_factors(a, b))
    np.testing.assert_allclose(product, x @ np.kron(a, b).T, atol=1e-13)


def test_gradient_of_a_kronecker_product(x64):
    a, b = (jnp.asarray(draw(3, 4, seed=i, imaginary=False)) for i in range(2))
    c = jnp.asarray(draw(9, 16, seed=2, imaginary=False))
    structured = lambda a, b: jnp.vdot(c, monarch_to_dense(*kronecker_factors(a, b)))
    plain = lambda a, b: jnp.vdot(c, jnp.kron(a, b))
    got = jax.grad(structured, argnums=(0, 1))(a, b)
    want = jax.grad(plain, argnums=(0, 1))(a, b)
    for g, w in zip(got, want, strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-12)


def circulant(column):
    return np.stack([np.roll(column, i) for i in range(len(column))], axis=1)


@pytest.mark.parametrize("imaginary", [False, True])
@pytest.mark.parametrize(
    ("n", "block"), [(1, None), (6, 2), (6, 3), (7, None), (16, 4), (24, None), (24, 4)]
)
def test_circulant_is_the_library_convolution(x64, n, block, imaginary):
    column, x = jnp.asarray(draw(n, imaginary=imaginary)), jnp.asarray(draw(3, n))
    factors = circulant_factors(column, block=block)
    if block:
        assert factors.r.shape == (n // block, block, block)
    np.testing.assert_allclose(
        mmstar_to_dense(factors), circulant(np.asarray(column)), atol=1e-12
    )
    convolved = np.fft.ifft(np.fft.fft(x) * np.fft.fft(column))
    np.testing.assert_allclose(mmstar_matmul(x, factors), convolved, atol=1e-12)
    assert factors.residual == 0


def test_the_cheapest_block_is_taken():
    factors = circulant_factors(jnp.ones(128))
    assert factors.r.shape == (8, 16, 16)


def test_toeplitz_is_the_corner_of_a_circulant(x64):
    n = 6
    entries = draw(2 * n, imaginary=False)  # 0..n-1 down, then n+1.. up
    factors = circulant_factors(jnp.asarray(entries), block=4)
    toeplitz = [[entries[(i - j) % (2 * n)] for j in range(n)] for i in range(n)]
    x = np.concatenate([draw(n), np.zeros(n)])
    np.testing.assert_allclose(
        mmstar_matmul(jnp.asarray(x), factors)[:n], toeplitz @ x[:n], atol=1e-13
    )


@pytest.mark.parametrize("imaginary", [False, True])
def test_gradient_of_a_convolution(x64, imaginary):
    column, x, target = (
        jnp.asarray(draw(12, seed=i, imaginary=imaginary or i > 0)) for i in range(3)
    )

    def structured(column):
        y = mmstar_matmul(x, circulant_factors(column))
        return jnp.sum(jnp.abs(y - target) ** 2)

    def library(column):
        y = jnp.fft.ifft(jnp.fft.fft(x) * jnp.fft.fft(column))
        return jnp.sum(jnp.abs(y - target) ** 2)

    np.testing.assert_allclose(
        jax.grad(structured)(column), jax.grad(library)(column), rtol=1e-10
    )


def test_transforms_under_jit_and_vmap():
    columns = jnp.asarray(draw(3, 8), jnp.complex64)
    stack = jax.jit(jax.vmap(circulant_factors))(columns)
    assert stack.r.shape == (3, 2, 4, 4)
    for i, column in enumerate(columns):
        one = mmstar_to_dense(jax.tree.map(lambda leaf, i=i: leaf[i], stack))
        np.testing.assert_allclose(one, circulant(np.asarray(column)), atol=1e-5)
    fft = jax.jit(lambda x: monarch_matmul(x[dft.permutation], dft.w1, dft.w2))
    dft = dft_factors(8, nblocks=2)
    np.testing.assert_allclose(
        fft(columns[0]), np.fft.fft(columns[0], norm="ortho"), atol=1e-5
    )
