"""Monarch functions on what people pass: messages, NumPy arrays, random shapes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlab.structured import (
    init_monarch,
    monarch_matmul,
    monarch_project,
    monarch_project_error,
    monarch_to_dense,
)

pytestmark = pytest.mark.untyped
FEW = settings(max_examples=25, deadline=None)


def fails(needed, function, *args, **options):
    """The message names the function, what was needed and what came."""
    with pytest.raises(ValueError, match=needed) as caught:
        function(*args, **options)
    assert str(caught.value).startswith(f"{function.__name__}: ")
    assert "got" in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("function", [monarch_to_dense, monarch_matmul])
def test_factors_that_do_not_fit(function):
    x = () if function is monarch_to_dense else (jnp.ones((2, 8)),)
    w1 = jnp.ones((2, 6, 4))
    message = fails(r"k \* q == l \* r", function, *x, w1, jnp.ones((3, 5, 5)))
    assert "2 * 6 = 12 against 3 * 5 = 15" in message
    message = fails(r"\(k, q, p\)", function, *x, w1[0], jnp.ones((3, 5, 4)))
    assert "(6, 4)" in message
    assert "jax.vmap" in message
    fails("floating-point", function, *x, w1, jnp.ones((3, 5, 4), int))


@pytest.mark.parametrize("shape", [(2, 7), (9,), (8, 2), ()])
def test_inputs_of_the_wrong_width(shape):
    w1, w2 = jnp.ones((2, 6, 4)), jnp.ones((3, 5, 4))
    message = fails(r"k \* p = 2 \* 4 = 8", monarch_matmul, jnp.ones(shape), w1, w2)
    assert str(shape) in message


def test_integer_inputs():
    w1, w2 = jnp.ones((2, 6, 4)), jnp.ones((3, 5, 4))
    message = fails("x must hold", monarch_matmul, jnp.ones((2, 8), int), w1, w2)
    assert "x.astype(jnp.float32)" in message
    fails("bool", monarch_matmul, jnp.ones((2, 8), bool), w1, w2)


def test_errors_come_at_trace_time():
    w1, w2 = jnp.ones((2, 6, 4)), jnp.ones((3, 5, 4))
    with pytest.raises(ValueError, match="monarch_matmul"):
        jax.eval_shape(monarch_matmul, jnp.ones((2, 7)), w1, w2)


@pytest.mark.parametrize("function", [monarch_project, monarch_project_error])
def test_matrices_that_cannot_be_projected(function):
    matrix, sizes = jnp.ones((15, 8)), {"nblocks_in": 2, "nblocks_out": 3}
    for shape in ((15,), (2, 15, 8), ()):
        message = fails("two dimensions", function, jnp.ones(shape), **sizes)
        assert str(shape) in message
    fails("floating-point", function, jnp.ones((15, 8), int), **sizes)
    for key, blocks, side in (
        ("nblocks_in", 3, "columns"),
        ("nblocks_in", 0, "columns"),
        ("nblocks_in", -2, "columns"),
        ("nblocks_in", 16, "columns"),
        ("nblocks_out", 2, "rows"),
        ("nblocks_out", 0, "rows"),
    ):
        message = fails(f"{key} must", function, matrix, **{**sizes, key: blocks})
        assert f"{key}={blocks}" in message
        assert side in message
        assert "pad" in message
    for rank in (0, -1, 5):
        message = fails(r"min\(5, 4\) = 4", function, matrix, **sizes, rank=rank)
        assert f"rank={rank}" in message


def test_initialisation_that_cannot_be():
    key = jax.random.key(0)
    for sizes in ((0, 8), (8, 0), (-1, 8)):
        fails("at least 1", init_monarch, key, *sizes)
    fails("at least 1", init_monarch, key, 8, 8, nblocks=0)
    for rank in (0, 3):
        message = fails("= 2", init_monarch, key, 10, 7, nblocks=4, rank=rank)
        assert f"rank={rank}" in message
    message = fails("scheme must be", init_monarch, key, 8, 8, scheme="normal")
    assert "'variance_preserving', 'official'" in message
    fails("dtype", init_monarch, key, 8, 8, dtype=int)
    fails("dtype", init_monarch, key, 8, 8, scheme="official", dtype=jnp.complex64)


def test_options_are_keywords():
    with pytest.raises(TypeError):
        monarch_project(jnp.ones((4, 4)), 2, 2)
    with pytest.raises(TypeError):
        init_monarch(jax.random.key(0), 4, 4, 2)


def test_numpy_arrays_are_welcome():
    draw = np.random.default_rng(0).standard_normal
    x, w1, w2 = draw((3, 8)), draw((2, 6, 4)), draw((3, 5, 4))
    dense = monarch_to_dense(w1, w2)
    assert isinstance(dense, jax.Array)
    np.testing.assert_allclose(
        monarch_matmul(x, w1, w2), x @ np.asarray(dense).T, rtol=1e-4, atol=1e-4
    )
    sizes = {"nblocks_in": 2, "nblocks_out": 3, "rank": np.int64(2)}
    factors = monarch_project(np.asarray(dense), **sizes)
    np.testing.assert_allclose(monarch_to_dense(*factors), dense, atol=1e-4)
    error = monarch_project_error(np.asarray(dense), **sizes)
    assert error < 1e-8


# The middle has N = k q = l r entries, so k and l are divisors of N.
@st.composite
def factor_sizes(draw):
    middle = draw(st.sampled_from([1, 2, 4, 6, 12, 15, 16]))
    divisors = [d for d in range(1, middle + 1) if middle % d == 0]
    k, l = draw(st.sampled_from(divisors)), draw(st.sampled_from(divisors))
    p, s = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    return k, middle // k, p, l, s, middle // l


@FEW
@given(
    sizes=factor_sizes(),
    batch=st.sampled_from([(), (0,), (1,), (2, 3)]),
    seed=st.integers(0, 99),
)
def test_products_of_any_shape(sizes, batch, seed):
    k, q, p, l, s, r = sizes
    draw = np.random.default_rng(seed).standard_normal
    x, w1, w2 = draw((*batch, k * p)), draw((k, q, p)), draw((l, s, r))
    # The definition with explicit matrices: blocks, shuffle, blocks, interleaving.
    first = np.zeros((k * q, k * p))
    for i in range(k):
        first[i * q : (i + 1) * q, i * p : (i + 1) * p] = w1[i]
    second = np.zeros((s * l, l * r))
    for i in range(l):
        second[i::l, i::l] = w2[i]
    dense = second @ first
    with jax.enable_x64(True):
        got = jax.jit(monarch_to_dense)(w1, w2)
        y = jax.jit(monarch_matmul)(x, w1, w2)
    np.testing.assert_allclose(got, dense, atol=1e-12)
    assert y.shape == (*batch, s * l)
    np.testing.assert_allclose(y, x @ dense.T, atol=1e-11)


@FEW
@given(
    blocks=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    slices=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    fraction=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_projections_of_any_shape(blocks, slices, fraction, seed):
    (k, l), (s, p) = blocks, slices
    rank = 1 + round(fraction * (min(s, p) - 1))
    matrix = np.random.default_rng(seed).standard_normal((s * l, k * p))
    sizes = {"nblocks_in": k, "nblocks_out": l, "rank": rank}
    with jax.enable_x64(True):
        nearest, error = jax.jit(
            lambda a: (
                monarch_to_dense(*monarch_project(a, **sizes)),
                monarch_project_error(a, **sizes),
            )
        )(matrix)
    nearest, error = np.asarray(nearest), float(error)
    np.testing.assert_allclose(
        ((matrix - nearest) ** 2).sum(), error, rtol=1e-12, atol=1e-12
    )
    # Pythagoras: what is left stands at a right angle to the projection.
    np.testing.assert_allclose((nearest**2).sum() + error, (matrix**2).sum())
    parts = nearest.reshape(s, l, k, p).transpose(2, 1, 0, 3)
    assert np.linalg.matrix_rank(parts, tol=1e-9).max() <= rank
