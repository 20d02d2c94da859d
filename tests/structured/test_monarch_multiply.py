"""Monarch products against a four-index sum, a reference implementation and jax."""

import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.structured import MonarchFactors, monarch_matmul, monarch_to_dense

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens" / "monarch.npz"
CASES = (
    "sq16",
    "sq36",
    "nb4_32",
    "nb2_24",
    "wide_16_48",
    "tall_48_16",
    "asym_24_32",
    "nondiv_30",
)
# (k, q, p, l, s, r): every size differs where it can; the last two are ragged.
SIZES = (
    (1, 1, 1, 1, 1, 1),
    (2, 6, 4, 3, 5, 4),
    (6, 8, 4, 4, 3, 12),
    (3, 4, 5, 2, 7, 6),
    (5, 2, 3, 1, 4, 10),
    (1, 6, 5, 3, 2, 2),
    (3, 4, 2, 6, 3, 2),
    (4, 5, 3, 2, 3, 10),
)


@pytest.fixture(scope="module")
def goldens():
    with np.load(GOLDENS) as archive:
        return dict(archive)


def random_case(sizes, *, batch=(2, 3), seed=0, dtype=np.float64):
    k, q, p, l, s, r = sizes
    draw = np.random.default_rng(seed).standard_normal
    shapes = ((*batch, k * p), (k, q, p), (l, s, r))
    arrays = tuple(draw(shape) for shape in shapes)
    if np.issubdtype(dtype, np.complexfloating):
        arrays = tuple(a + 1j * draw(a.shape) for a in arrays)
    return tuple(jnp.asarray(a, dtype) for a in arrays)


# One program each: many small shapes compile much faster than op by op.
matmul, to_dense = jax.jit(monarch_matmul), jax.jit(monarch_to_dense)


@jax.jit
def value_and_pullback(dy, *arrays):
    y, pull = jax.vjp(monarch_matmul, *arrays)
    return y, *pull(dy)


def brute_force_dense(w1, w2):
    """The matrix entry by entry: sum over the middle units that join two blocks."""
    w1, w2 = np.asarray(w1), np.asarray(w2)
    (k, q, p), (l, s, _) = w1.shape, w2.shape
    dense = np.zeros((s * l, k * p), np.result_type(w1, w2))
    for middle in range(k * q):
        kappa, theta = divmod(middle, q)
        rho, lam = divmod(middle, l)
        for sigma in range(s):
            for pi in range(p):
                dense[sigma * l + lam, kappa * p + pi] += (
                    w2[lam, sigma, rho] * w1[kappa, theta, pi]
                )
    return dense


@pytest.mark.parametrize("dtype", [np.float64, np.complex128])
@pytest.mark.parametrize("sizes", SIZES)
def test_equals_the_sum_over_the_middle(x64, sizes, dtype):
    x, w1, w2 = random_case(sizes, dtype=dtype)
    dense = brute_force_dense(w1, w2)
    np.testing.assert_allclose(to_dense(w1, w2), dense, atol=1e-13)
    np.testing.assert_allclose(matmul(x, w1, w2), np.asarray(x) @ dense.T, atol=1e-12)


def test_four_index_formula_in_the_even_case(x64):
    k, q, p, l, s, _ = sizes = (6, 8, 4, 4, 3, 12)
    _, w1, w2 = random_case(sizes)
    c = q // l
    entries = np.zeros((s, l, k, p))
    for lam in range(l):
        for kappa in range(k):
            for a in range(c):
                column = np.asarray(w2)[lam, :, kappa * c + a]
                row = np.asarray(w1)[kappa, a * l + lam]
                entries[:, lam, kappa] += np.outer(column, row)
    np.testing.assert_allclose(
        monarch_to_dense(w1, w2), entries.reshape(s * l, k * p), atol=1e-14
    )
    ranks = np.linalg.matrix_rank(entries.transpose(1, 2, 0, 3))
    np.testing.assert_array_equal(ranks, np.full((l, k), c))


def test_ragged_slices_have_the_rank_of_their_middle_units(x64):
    k, q, p, l, s, _ = sizes = (3, 5, 9, 3, 9, 5)
    _, w1, w2 = random_case(sizes)
    slices = np.asarray(monarch_to_dense(w1, w2)).reshape(s, l, k, p)
    expected = np.zeros((l, k), int)
    for middle in range(k * q):
        expected[middle % l, middle // q] += 1
    assert set(expected.ravel()) == {1, 2}
    np.testing.assert_array_equal(
        np.linalg.matrix_rank(slices.transpose(1, 2, 0, 3)), expected
    )


def test_one_block_each_is_a_product_of_two_matrices(x64):
    x, w1, w2 = random_case((1, 3, 5, 1, 4, 3))
    np.testing.assert_allclose(monarch_matmul(x, w1, w2), x @ w1[0].T @ w2[0].T)


@pytest.mark.parametrize("case", CASES)
def test_reference_products_and_gradients(x64, goldens, case):
    g = {key: goldens.get(f"mul/{case}/{key}") for key in GOLDEN_KEYS}
    y, *gradients = value_and_pullback(g["dy"], g["x"], g["w1"], g["w2"])
    close = {"rtol": 1e-10, "atol": 1e-10}
    np.testing.assert_allclose(y, g["y"], **close)
    for got, name in zip(gradients, ("dx", "dw1", "dw2"), strict=True):
        np.testing.assert_allclose(got, g[name], **close, err_msg=name)
    if g["dense"] is not None:
        dense = to_dense(g["w1"], g["w2"])
        np.testing.assert_allclose(dense, g["dense"], **close)


GOLDEN_KEYS = ("x", "w1", "w2", "y", "dense", "dy", "dx", "dw1", "dw2")


# Two products, each with a relative error of a few epsilon times sqrt(length); bf16
# rounds the middle too.
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(jnp.float32, 2e-4), (jnp.bfloat16, 2e-2)]
)
@pytest.mark.parametrize("case", CASES)
def test_reference_products_in_lower_precision(goldens, case, dtype, tolerance):
    x, w1, w2, dy = (
        jnp.asarray(goldens[f"mul/{case}/{key}"], dtype)
        for key in ("x", "w1", "w2", "dy")
    )
    names = ("y", "dx", "dw1", "dw2")
    for got, name in zip(value_and_pullback(dy, x, w1, w2), names, strict=True):
        want = goldens[f"mul/{case}/{name}"]
        assert got.dtype == dtype
        error = np.linalg.norm(np.asarray(got, np.float64) - want)
        assert error <= tolerance * np.linalg.norm(want), name


def test_bfloat16_accumulates_in_float32():
    # 300 ones: bfloat16 alone cannot count past 256.
    ones = jnp.ones((1, 1, 300), jnp.bfloat16)
    x = jnp.ones((2, 300), jnp.bfloat16)
    y = monarch_matmul(x, ones, jnp.ones((1, 2, 1), jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(y, np.float32), np.full((2, 2), 300.0))
    # A CPU sums in float32 anyway; other devices have to be told.
    w1, w2 = random_case((2, 6, 4, 3, 5, 4), dtype=jnp.bfloat16)[1:]
    for program, products in (
        (jax.make_jaxpr(monarch_matmul)(x[:, :8], w1, w2), 2),
        (jax.make_jaxpr(monarch_to_dense)(w1, w2), 1),
    ):
        assert str(program).count("preferred_element_type=float32") == products


def test_dtypes_follow_promotion():
    x, w1, w2 = random_case((2, 6, 4, 3, 5, 4), dtype=np.float32)
    assert monarch_matmul(x.astype(jnp.bfloat16), w1, w2).dtype == jnp.float32
    assert monarch_matmul(x, w1.astype(jnp.complex64), w2).dtype == jnp.complex64
    assert monarch_to_dense(w1.astype(jnp.float16), w2).dtype == jnp.float32


def test_adjoint_is_the_pullback(x64):
    x, w1, w2 = random_case((2, 6, 4, 3, 5, 4), dtype=np.complex128)
    y = random_case((3, 2, 5, 1, 4, 6), batch=(2, 3), seed=1, dtype=np.complex128)[0]
    matrix = monarch_to_dense(w1, w2)
    product = monarch_matmul(x, w1, w2)
    np.testing.assert_allclose(
        jnp.vdot(y, product), jnp.vdot(y @ matrix.conj(), x), rtol=1e-12
    )
    # jax transposes without conjugating; conjugating twice gives the adjoint.
    transpose = jax.linear_transpose(lambda x: monarch_matmul(x, w1, w2), x)
    (pulled,) = transpose(y.conj())
    np.testing.assert_allclose(pulled.conj(), y @ matrix.conj(), rtol=1e-12)


@pytest.mark.parametrize("batch", [(), (1,), (7,), (2, 3), (2, 1, 2)])
def test_leading_dimensions(batch):
    x, w1, w2 = random_case((2, 6, 4, 3, 5, 4), batch=batch, dtype=np.float32)
    y = matmul(x, w1, w2)
    assert y.shape == (*batch, 15)
    rows = [matmul(row, w1, w2) for row in x.reshape(-1, 8)]
    # Round-off of entries that cancel is relative to terms as large as 8.
    np.testing.assert_allclose(y.reshape(-1, 15), jnp.stack(rows), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("batch", [(0,), (3, 0), (0, 2)])
def test_empty_batches_give_empty(batch):
    x, w1, w2 = random_case((2, 6, 4, 3, 5, 4), batch=batch, dtype=np.float32)
    loss = lambda *arrays: monarch_matmul(*arrays).sum()
    assert monarch_matmul(x, w1, w2).shape == (*batch, 15)
    dx, dw1, _ = jax.grad(loss, argnums=(0, 1, 2))(x, w1, w2)
    assert dx.shape == x.shape
    np.testing.assert_array_equal(dw1, jnp.zeros_like(w1))


def test_nan_stays_in_its_row():
    x, w1, w2 = random_case((2, 6, 4, 3, 5, 4), batch=(3,), dtype=np.float32)
    y = monarch_matmul(x.at[1, 0].set(jnp.nan), w1, w2)
    np.testing.assert_array_equal(jnp.isnan(y).all(-1), [False, True, False])
    np.testing.assert_array_equal(jnp.isnan(y).any(-1), [False, True, False])


def test_one_trace_under_jit(x64):
    x, w1, w2 = random_case((4, 5, 3, 2, 3, 10))
    traced = jax.jit(chex.assert_max_traces(monarch_matmul, 1))
    for scale in (1.0, 2.0):
        np.testing.assert_allclose(
            traced(scale * x, w1, w2), scale * monarch_matmul(x, w1, w2), rtol=1e-12
        )


@pytest.mark.parametrize("sizes", [(2, 6, 4, 3, 5, 4), (4, 5, 3, 2, 3, 10)])
def test_vmap_over_inputs_and_factors(x64, sizes):
    x, w1, w2 = random_case(sizes, batch=(3,))
    np.testing.assert_allclose(
        jax.vmap(monarch_matmul, (0, None, None))(x, w1, w2),
        monarch_matmul(x, w1, w2),
        rtol=1e-12,
    )
    stack = jax.tree.map(lambda w: jnp.stack([w, 2 * w, -w]), MonarchFactors(w1, w2))
    scales = np.array([1.0, 4.0, 1.0])[:, None]
    np.testing.assert_allclose(
        jax.vmap(monarch_matmul)(x, *stack),
        scales * monarch_matmul(x, w1, w2),
        rtol=1e-12,
    )
    assert jax.vmap(monarch_to_dense)(*stack).shape[0] == 3


@pytest.mark.parametrize("sizes", [(2, 6, 4, 3, 5, 4), (4, 5, 3, 2, 3, 10)])
def test_derivatives_against_differences(x64, sizes):
    arrays = random_case(sizes)
    tangents = random_case(sizes, seed=1)
    shifted = lambda t: monarch_matmul(
        *(a + t * d for a, d in zip(arrays, tangents, strict=True))
    )
    _, forward = jax.jvp(monarch_matmul, arrays, tangents)
    step = 1e-5  # central differences: the map is cubic, the error about step squared
    np.testing.assert_allclose(
        forward, (shifted(step) - shifted(-step)) / (2 * step), rtol=1e-6, atol=1e-6
    )
    cotangent = jnp.cos(jnp.arange(forward.size)).reshape(forward.shape)
    pulled = jax.vjp(monarch_matmul, *arrays)[1](cotangent)
    inner = sum(jnp.vdot(a, b) for a, b in zip(pulled, tangents, strict=True))
    np.testing.assert_allclose(inner, jnp.vdot(cotangent, forward), rtol=1e-12)
    second = jax.jvp(
        jax.grad(lambda x: (monarch_matmul(x, *arrays[1:]) ** 2).sum()),
        arrays[:1],
        tangents[:1],
    )[1]
    matrix = monarch_to_dense(*arrays[1:])
    np.testing.assert_allclose(second, 2 * tangents[0] @ matrix.T @ matrix, rtol=1e-9)


def test_factors_are_a_pytree():
    _, w1, w2 = random_case((2, 6, 4, 3, 5, 4), dtype=np.float32)
    factors = MonarchFactors(w1, w2)
    doubled = jax.tree.map(lambda w: 2 * w, factors)
    assert isinstance(doubled, MonarchFactors)
    np.testing.assert_allclose(
        monarch_to_dense(*doubled), 4 * monarch_to_dense(*factors), rtol=1e-6
    )
