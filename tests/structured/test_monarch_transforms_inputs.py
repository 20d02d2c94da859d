"""Transforms on what people pass: messages, NumPy arrays, random shapes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlab.structured import (
    circulant_factors,
    dft_chain_factors,
    dft_factors,
    hadamard_factors,
    kronecker_factors,
    mmstar_matmul,
    monarch_chain_matmul,
    monarch_matmul,
    monarch_to_dense,
)

pytestmark = pytest.mark.untyped
FEW = settings(max_examples=8, deadline=None)


def fails(needed, function, *args, **options):
    with pytest.raises(ValueError, match=needed) as caught:
        function(*args, **options)
    assert str(caught.value).startswith(f"{function.__name__}: ")
    assert "got" in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("function", [dft_factors, hadamard_factors])
def test_sizes_that_cannot_be(function):
    for n, nblocks in ((8, 3), (8, 0), (8, -2), (4, 8)):
        message = fails("nblocks divide n", function, n, nblocks=nblocks)
        assert f"nblocks={nblocks}" in message
    fails("at least 1|power of two", function, 0, nblocks=1)


def test_hadamard_asks_for_a_power_of_two():
    for n in (0, -2, 6, 12):
        assert str(n) in fails("power of two", hadamard_factors, n, nblocks=1)
    fails("floating-point", hadamard_factors, 4, nblocks=2, dtype=int)


def test_types_that_are_not_complex():
    fails("complex", dft_factors, 4, nblocks=2, dtype=jnp.float32)
    fails("complex", dft_chain_factors, (2, 2), dtype=int)


@pytest.mark.parametrize("radices", [(), (4,), (2, 0), (2, -1, 3)])
def test_radices_that_cannot_be(radices):
    assert str(radices) in fails("at least two sizes", dft_chain_factors, radices)


def test_matrices_and_columns_that_cannot_be():
    ones = jnp.ones((2, 2))
    fails("two dimensions", kronecker_factors, ones, jnp.ones(2))
    fails("two dimensions", kronecker_factors, jnp.ones((1, 2, 2)), ones)
    fails("floating-point", kronecker_factors, ones, jnp.ones((2, 2), int))
    for shape in ((2, 4), (), (0,)):
        assert str(shape) in fails("one dimension", circulant_factors, jnp.ones(shape))
    fails("floating-point", circulant_factors, jnp.ones(4, int))
    for block in (0, -1, 3, 8):
        message = fails("block must", circulant_factors, jnp.ones(4), block=block)
        assert f"block={block}" in message


@FEW
@given(k=st.integers(1, 12), l=st.integers(1, 12), seed=st.integers(0, 99))
def test_fourier_of_any_size(k, l, seed):
    x = np.random.default_rng(seed).standard_normal((2, k * l))
    with jax.enable_x64(True):
        permutation, w1, w2 = dft_factors(k * l, nblocks=k, dtype=np.complex128)
        y = monarch_matmul(x[:, np.asarray(permutation)], w1, w2)
    np.testing.assert_allclose(y, np.fft.fft(x, norm="ortho"), atol=1e-12)


@FEW
@given(radices=st.lists(st.integers(1, 5), min_size=2, max_size=4))
def test_chains_of_any_radices(radices):
    n = int(np.prod(radices))
    x = np.random.default_rng(0).standard_normal(n)
    with jax.enable_x64(True):
        permutation, factors = dft_chain_factors(radices, dtype=np.complex128)
        y = monarch_chain_matmul(x[np.asarray(permutation)], factors)
    np.testing.assert_allclose(y, np.fft.fft(x, norm="ortho"), atol=1e-12)


@FEW
@given(sizes=st.lists(st.integers(1, 5), min_size=4, max_size=4))
def test_kronecker_of_any_shape(sizes):
    draw = np.random.default_rng(0).standard_normal
    a, b = draw(sizes[:2]), draw(sizes[2:])
    with jax.enable_x64(True):
        dense = monarch_to_dense(*kronecker_factors(a, b))
    np.testing.assert_allclose(dense, np.kron(a, b), atol=1e-14)


@FEW
@given(t=st.integers(1, 6), b=st.integers(1, 6), seed=st.integers(0, 99))
def test_circulant_of_any_size(t, b, seed):
    draw = np.random.default_rng(seed).standard_normal
    column, x = draw(t * b), draw((2, t * b))
    with jax.enable_x64(True):
        y = mmstar_matmul(x, circulant_factors(column, block=b))
    want = np.fft.ifft(np.fft.fft(x) * np.fft.fft(column))
    np.testing.assert_allclose(y, want, atol=1e-12)
