"""Monarch products of any order against matrices, two factors and the FFT."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.structured import (
    dft_chain_factors,
    monarch_chain_matmul,
    monarch_chain_to_dense,
    monarch_matmul,
    monarch_to_dense,
)

# (k, q, p, l, s, r) of two factors: ranks above one and ragged ones too.
PAIRS = (
    (1, 1, 1, 1, 1, 1),
    (2, 6, 4, 3, 5, 4),
    (6, 8, 4, 4, 3, 12),
    (3, 4, 5, 2, 7, 6),
    (5, 2, 3, 1, 4, 10),
    (1, 6, 5, 3, 2, 2),
    (3, 4, 2, 6, 3, 2),
    (4, 5, 3, 2, 3, 10),
)
# Input and output digits, most significant first; the last axis is mapped first.
DIGITS = (
    ((2, 2, 2), (2, 2, 2)),
    ((2, 3, 4), (5, 2, 3)),
    ((3, 1, 2, 2), (1, 4, 3, 2)),
    ((4, 3), (2, 5)),
)


def draw(*shape, seed=0, dtype=np.float64):
    rng = np.random.default_rng(seed)
    array = rng.standard_normal(shape)
    if np.issubdtype(dtype, np.complexfloating):
        array = array + 1j * rng.standard_normal(shape)
    return jnp.asarray(array, dtype)


def chain(inputs, outputs, **options):
    """Factors for digits: the axes on the left are still inputs, others outputs."""
    shapes = []
    for axis in reversed(range(len(inputs))):
        blocks = math.prod(inputs[:axis]) * math.prod(outputs[axis + 1 :])
        shapes.append((blocks, outputs[axis], inputs[axis]))
    return [draw(*shape, seed=i, **options) for i, shape in enumerate(shapes)]


def brute_force(inputs, outputs, factors):
    """The product of the matrices of the single factors, entry by entry."""
    dense = np.eye(math.prod(inputs), dtype=factors[0].dtype)
    d = len(inputs)
    for step, w in enumerate(np.asarray(f) for f in factors):
        axis = d - 1 - step
        before = (*inputs[: axis + 1], *outputs[axis + 1 :])
        after = (*inputs[:axis], *outputs[axis:])
        matrix = np.zeros((math.prod(after), math.prod(before)), w.dtype)
        for column, digits in enumerate(np.ndindex(*before)):
            others = digits[:axis] + digits[axis + 1 :]
            sizes = before[:axis] + before[axis + 1 :]
            block = np.ravel_multi_index(others, sizes) if sizes else 0
            for o in range(after[axis]):
                target = (*digits[:axis], o, *digits[axis + 1 :])
                row = np.ravel_multi_index(target, after)
                matrix[row, column] = w[block, o, digits[axis]]
        dense = matrix @ dense
    return dense


@pytest.mark.parametrize("dtype", [np.float64, np.complex128])
@pytest.mark.parametrize("sizes", PAIRS)
def test_two_factors_are_a_monarch_matrix(x64, sizes, dtype):
    k, q, p, l, s, r = sizes
    w1, w2 = draw(k, q, p, dtype=dtype), draw(l, s, r, seed=1, dtype=dtype)
    x = draw(2, 3, k * p, seed=2, dtype=dtype)
    np.testing.assert_allclose(
        monarch_chain_matmul(x, (w1, w2)), monarch_matmul(x, w1, w2), atol=1e-13
    )
    np.testing.assert_allclose(
        monarch_chain_to_dense([w1, w2]), monarch_to_dense(w1, w2), atol=1e-13
    )


@pytest.mark.parametrize("dtype", [np.float64, np.complex128])
@pytest.mark.parametrize("digits", DIGITS)
def test_equals_the_product_of_the_matrices_of_its_factors(x64, digits, dtype):
    factors = chain(*digits, dtype=dtype)
    dense = brute_force(*digits, factors)
    np.testing.assert_allclose(monarch_chain_to_dense(factors), dense, atol=1e-12)
    x = draw(2, 3, dense.shape[1], seed=9, dtype=dtype)
    np.testing.assert_allclose(
        monarch_chain_matmul(x, factors), np.asarray(x) @ dense.T, atol=1e-12
    )


@pytest.mark.parametrize(("m", "d"), [(4, 3), (2, 5), (3, 4)])
def test_the_fast_fourier_transform(m, d):
    n = m**d
    permutation, factors = dft_chain_factors((m,) * d)
    assert sum(w.size for w in factors) == d * m * n
    x = draw(5, n, dtype=np.complex64)
    y = monarch_chain_matmul(x[:, permutation], factors)
    np.testing.assert_allclose(y, np.fft.fft(x, norm="ortho"), atol=1e-5)


def test_constant_blocks_are_a_kronecker_product(x64):
    a, b, c = (draw(2 + i, 3, seed=i) for i in range(3))
    factors = [
        jnp.broadcast_to(w, (blocks, *w.shape))
        for blocks, w in ((9, c), (3 * 4, b), (3 * 4, a))
    ]
    np.testing.assert_allclose(
        monarch_chain_to_dense(factors), np.kron(a, np.kron(b, c)), atol=1e-13
    )


def test_the_last_factor_may_take_a_rank(x64):
    # Rank 2 between the last two: the second gives 3*2 entries where 3 come out.
    first, second = draw(4, 2, 3), draw(4, 6, 2, seed=1)
    last = draw(6, 5, 4, seed=2)
    dense = monarch_chain_to_dense([first, second, last])
    assert dense.shape == (30, 12)
    slices = np.asarray(dense).reshape(5, 6, 2, 6).transpose(1, 2, 0, 3)
    np.testing.assert_array_equal(np.linalg.matrix_rank(slices), np.full((6, 2), 2))


def test_gradients(x64):
    digits = DIGITS[1]
    factors = chain(*digits)
    other = [draw(*w.shape, seed=7 + i) for i, w in enumerate(factors)]
    x = draw(3, 24, seed=5)
    shifted = lambda t: monarch_chain_matmul(
        x, [w + t * v for w, v in zip(factors, other, strict=True)]
    )
    _, forward = jax.jvp(shifted, (0.0,), (1.0,))
    step = 1e-5
    np.testing.assert_allclose(
        forward, (shifted(step) - shifted(-step)) / (2 * step), rtol=1e-6, atol=1e-6
    )
    cotangent = draw(*forward.shape, seed=11)
    _, pull = jax.vjp(lambda ws: monarch_chain_matmul(x, ws), factors)
    inner = sum(jnp.vdot(a, b) for a, b in zip(pull(cotangent)[0], other, strict=True))
    np.testing.assert_allclose(inner, jnp.vdot(cotangent, forward), rtol=1e-12)


def test_complex_gradient_is_the_adjoint(x64):
    digits = DIGITS[1]
    factors = chain(*digits, dtype=np.complex128)
    x, y = (draw(n, seed=n, dtype=np.complex128) for n in (24, 30))
    _, pull = jax.vjp(lambda x: monarch_chain_matmul(x, factors), x)
    (pulled,) = pull(y.conj())
    dense = monarch_chain_to_dense(factors)
    np.testing.assert_allclose(pulled.conj(), dense.conj().T @ y, rtol=1e-12)


@pytest.mark.parametrize("batch", [(), (0,), (2, 1, 3)])
def test_leading_dimensions_and_dtypes(batch):
    factors = chain(*DIGITS[1], dtype=np.float32)
    x = draw(*batch, 24, dtype=np.float32)
    y = monarch_chain_matmul(x, factors)
    assert (y.shape, y.dtype) == ((*batch, 30), jnp.float32)
    half = jax.tree.map(lambda w: w.astype(jnp.bfloat16), factors)
    assert monarch_chain_matmul(x.astype(jnp.bfloat16), half).dtype == jnp.bfloat16
    program = jax.make_jaxpr(monarch_chain_matmul)(x.astype(jnp.bfloat16), half)
    assert str(program).count("preferred_element_type=float32") == 3


def test_one_trace_and_vmap():
    factors = chain(*DIGITS[1], dtype=np.float32)
    x = draw(4, 24, dtype=np.float32)
    traced = jax.jit(chex.assert_max_traces(monarch_chain_matmul, 1))
    for scale in (1.0, 2.0):
        np.testing.assert_allclose(
            traced(scale * x, factors),
            scale * monarch_chain_matmul(x, factors),
            rtol=1e-5,
            atol=1e-5,
        )
    stack = [jnp.stack([w, -w]) for w in factors]
    both = jax.vmap(monarch_chain_matmul, (None, 0))(x, stack)
    np.testing.assert_allclose(both[0], -both[1], rtol=1e-6)
