"""Monarch projections: goldens, optimality, and classes that they hold exactly."""

import functools
import pathlib
import time

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.structured import (
    monarch_matmul,
    monarch_project,
    monarch_project_error,
    monarch_to_dense,
)

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens" / "monarch.npz"
SQUARE = ("0_n16", "1_n36", "2_n24", "3_n24", "4_n24")
RANKED = (
    "0_20x24_k3_j4_r1",
    "1_24x36_k4_j6_r2",
    "2_32x16_k4_j4_r3",
    "3_30x30_k5_j3_r2",
)
# (rows, columns, nblocks_in, nblocks_out)
SHAPES = ((15, 8, 2, 3), (12, 20, 5, 4), (6, 6, 1, 2), (8, 9, 3, 1))


@pytest.fixture(scope="module")
def goldens():
    with np.load(GOLDENS) as archive:
        return dict(archive)


def random_matrix(rows, columns, *, seed=0, dtype=np.float64):
    draw = np.random.default_rng(seed).standard_normal
    matrix = draw((rows, columns))
    if np.issubdtype(dtype, np.complexfloating):
        matrix = matrix + 1j * draw((rows, columns))
    return jnp.asarray(matrix, dtype)


@functools.partial(jax.jit, static_argnames=("nblocks_in", "nblocks_out", "rank"))
def solve(matrix, **sizes):
    """Factors, their matrix and the error in one program: it compiles faster."""
    factors = monarch_project(matrix, **sizes)
    error = monarch_project_error(matrix, **sizes)
    return factors, monarch_to_dense(*factors), error


def brute_force_project(matrix, k, l, rank):
    """Truncates each slice by itself; returns the matrix and the squared error."""
    matrix = np.asarray(matrix)
    n = matrix.shape[1]
    nearest, error = np.zeros_like(matrix), 0.0
    for kappa in range(k):
        for lam in range(l):
            columns = slice(kappa * (n // k), (kappa + 1) * (n // k))
            u, sigma, vh = np.linalg.svd(matrix[lam::l, columns], full_matrices=False)
            kept = u[:, :rank] @ np.diag(sigma[:rank]) @ vh[:rank]
            nearest[lam::l, columns] = kept
            error += (sigma[rank:] ** 2).sum()
    return nearest, error


def ranks_of(m, n, k, l):
    return range(1, min(m // l, n // k) + 1)


@pytest.mark.parametrize("dtype", [np.float64, np.complex128])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_truncation_slice_by_slice(x64, shape, dtype):
    m, n, k, l = shape
    matrix = random_matrix(m, n, dtype=dtype)
    for rank in ranks_of(*shape):
        sizes = {"nblocks_in": k, "nblocks_out": l, "rank": rank}
        (w1, w2), nearest, error = solve(matrix, **sizes)
        assert w1.shape == (k, rank * l, n // k)
        assert w2.shape == (l, m // l, rank * k)
        want, want_error = brute_force_project(matrix, k, l, rank)
        np.testing.assert_allclose(nearest, want, atol=1e-12)
        np.testing.assert_allclose(error, want_error, rtol=1e-12, atol=1e-12)


def check_golden(matrix, dense, error, sizes, tolerance):
    factors, nearest, distance = solve(matrix, **sizes)
    assert nearest.dtype == matrix.dtype
    assert np.linalg.norm(nearest - dense) <= tolerance * np.linalg.norm(dense)
    np.testing.assert_allclose(distance, error, rtol=tolerance)
    return factors


@pytest.mark.parametrize("case", SQUARE)
def test_reference_square_projections(x64, goldens, case):
    get = lambda key: goldens[f"proj/{case}/{key}"]
    k, l = (int(size) for size in get("sizes"))
    sizes = {"nblocks_in": k, "nblocks_out": l}
    w1, w2 = check_golden(get("A"), get("dense"), get("sq_err"), sizes, 1e-10)
    assert (w1.shape, w2.shape) == (get("w1").shape, get("w2").shape)
    np.testing.assert_allclose(
        monarch_to_dense(jnp.asarray(get("w1")), jnp.asarray(get("w2"))),
        get("dense"),
        atol=1e-10,
    )
    check_golden(np.float32(get("A")), get("dense"), get("sq_err"), sizes, 2e-4)


@pytest.mark.parametrize("case", RANKED)
def test_reference_rectangular_projections(x64, goldens, case):
    get = lambda key: goldens[f"projrank/{case}/{key}"]
    k, l, rank = (int(part[1:]) for part in case.split("_")[2:])
    sizes = {"nblocks_in": k, "nblocks_out": l, "rank": rank}
    w1, w2 = check_golden(get("A"), get("dense"), get("sq_err"), sizes, 1e-10)
    assert (w1.shape, w2.shape) == (get("w1").shape, get("w2").shape)
    check_golden(np.float32(get("A")), get("dense"), get("sq_err"), sizes, 2e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_error_is_the_squared_distance_and_falls_to_zero(x64, shape):
    m, n, k, l = shape
    matrix = random_matrix(m, n, seed=1)
    errors = []
    for rank in ranks_of(*shape):
        sizes = {"nblocks_in": k, "nblocks_out": l, "rank": rank}
        _, nearest, error = solve(matrix, **sizes)
        errors.append(float(error))
        np.testing.assert_allclose(
            errors[-1], ((matrix - nearest) ** 2).sum(), rtol=1e-12, atol=1e-12
        )
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] == 0
    np.testing.assert_allclose(nearest, matrix, atol=1e-13)


def test_projecting_twice_is_projecting_once(x64):
    sizes = {"nblocks_in": 5, "nblocks_out": 4, "rank": 2}
    _, once, _ = solve(random_matrix(12, 20), **sizes)
    _, twice, error = solve(once, **sizes)
    np.testing.assert_allclose(twice, once, atol=1e-13)
    assert error < 1e-26


def test_a_member_of_the_class_is_its_own_projection(x64):
    k, l, s, p, c = 3, 4, 5, 7, 2
    w1 = random_matrix(k * c * l, p).reshape(k, c * l, p)
    w2 = random_matrix(l * s, c * k, seed=1).reshape(l, s, c * k)
    dense = monarch_to_dense(w1, w2)
    factors, nearest, _ = solve(dense, nblocks_in=k, nblocks_out=l, rank=c)
    np.testing.assert_allclose(nearest, dense, atol=1e-12)
    # The even split of the singular values: rows of w1 and columns of w2 agree.
    rows = (factors.w1.reshape(k, c, l, p) ** 2).sum(-1)
    columns = (factors.w2.reshape(l, s, k, c) ** 2).sum(1)
    np.testing.assert_allclose(rows, columns.transpose(1, 2, 0), rtol=1e-10)


def test_no_perturbation_and_no_alternating_fit_is_nearer(x64):
    k, l, c = 2, 3, 2
    matrix = random_matrix(15, 8)
    factors, _, _ = solve(matrix, nblocks_in=k, nblocks_out=l, rank=c)
    distance = jax.jit(lambda f: ((matrix - monarch_to_dense(*f)) ** 2).sum())
    best = float(distance(factors))
    draw = np.random.default_rng(0).standard_normal
    for scale in (1e-3, 1e-2, 0.1, 1.0):
        for _ in range(20):
            moved = jax.tree.map(lambda w, t=scale: w + t * draw(w.shape), factors)
            assert distance(moved) >= best
    gradient = jax.grad(distance)(factors)
    chex.assert_trees_all_close(
        gradient, jax.tree.map(jnp.zeros_like, factors), atol=1e-12
    )
    # Alternating least squares from another start ends no lower.
    slices = np.asarray(matrix).reshape(5, l, k, 4).transpose(2, 1, 0, 3)
    left = draw((k, l, 5, c))
    for _ in range(200):
        right = np.linalg.pinv(left) @ slices
        left = slices @ np.linalg.pinv(right)
    fitted = ((slices - left @ right) ** 2).sum()
    assert fitted >= best - 1e-12
    np.testing.assert_allclose(fitted, best, rtol=1e-6)


def test_unitary_changes_inside_slices_keep_the_error(x64):
    m, n, k, l = 15, 8, 2, 3
    sizes = {"nblocks_in": k, "nblocks_out": l, "rank": 2}
    matrix = random_matrix(m, n)
    left, _ = np.linalg.qr(random_matrix(m // l, m // l, seed=1))
    right, _ = np.linalg.qr(random_matrix(n // k, n // k, seed=2))
    # Rows are interleaved (the block is the minor index), columns are not.
    turned = np.kron(left, np.eye(l)) @ matrix @ np.kron(np.eye(k), right)
    np.testing.assert_allclose(
        monarch_project_error(turned, **sizes),
        monarch_project_error(matrix, **sizes),
        rtol=1e-12,
    )


def hadamard(n):
    sylvester = np.array([[1.0, 1.0], [1.0, -1.0]])
    return functools.reduce(np.kron, [sylvester] * (n.bit_length() - 1))


def kronecker(k, l, s, p):
    draw = np.random.default_rng(0).standard_normal
    return np.kron(draw((s, k)), draw((l, p)))


def block_diagonal(k, s, p):
    blocks = np.random.default_rng(0).standard_normal((k, s, p))
    return np.einsum("ksp,kj->ksjp", blocks, np.eye(k)).reshape(k * s, k * p)


# Blocks (s, p) on the diagonal: with l = s a slice is one row of one block.
MEMBERS = {
    "identity": (np.eye(24), 4, 6),
    "identity, other blocks": (np.eye(24), 8, 3),
    "block-diagonal": (block_diagonal(3, 4, 5), 3, 4),
    "hadamard": (hadamard(16), 4, 4),
    "hadamard, two blocks of eight": (hadamard(16), 2, 8),
    "hadamard, eight blocks of two": (hadamard(16), 8, 2),
    "kronecker": (kronecker(3, 4, 5, 2), 3, 4),
    "kronecker, wide": (kronecker(4, 2, 3, 7), 4, 2),
}


@pytest.mark.parametrize("name", MEMBERS)
def test_known_members_of_rank_one(x64, name):
    matrix, k, l = MEMBERS[name]
    matrix = jnp.asarray(matrix, jnp.float64)
    _, nearest, error = solve(matrix, nblocks_in=k, nblocks_out=l)
    np.testing.assert_allclose(nearest, matrix, atol=1e-12)
    assert error < 1e-24


def test_low_rank_matrices_are_members_of_their_rank(x64):
    matrix = random_matrix(15, 2) @ random_matrix(2, 8, seed=1)
    for rank, inside in ((1, False), (2, True)):
        _, _, error = solve(matrix, nblocks_in=2, nblocks_out=3, rank=rank)
        assert (error < 1e-24) == inside


@pytest.mark.parametrize("size", [3, 4, 5])
def test_distance_of_the_perfect_shuffle(x64, size):
    n = size**2
    shuffle = jnp.eye(n)[np.arange(n).reshape(size, size).T.ravel()]
    error = monarch_project_error(shuffle, nblocks_in=size, nblocks_out=size)
    np.testing.assert_allclose(error, n - size, rtol=1e-12)


def test_adjoint_of_a_complex_projection(x64):
    matrix = random_matrix(15, 8, dtype=np.complex128)
    sizes = {"nblocks_in": 2, "nblocks_out": 3, "rank": 2}
    factors, dense, error = solve(matrix, **sizes)
    x = random_matrix(3, 8, seed=1, dtype=np.complex128)
    y = random_matrix(3, 15, seed=2, dtype=np.complex128)
    np.testing.assert_allclose(
        jnp.vdot(y, monarch_matmul(x, *factors)),
        jnp.vdot(y @ dense.conj(), x),
        rtol=1e-12,
    )
    assert error.dtype == jnp.float64


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.complex64])
def test_dtypes(dtype):
    matrix = random_matrix(15, 8, dtype=np.float32).astype(dtype)
    factors = monarch_project(matrix, nblocks_in=2, nblocks_out=3, rank=4)
    assert {w.dtype for w in factors} == {jnp.dtype(dtype)}
    error = monarch_project_error(matrix, nblocks_in=2, nblocks_out=3)
    assert error.dtype == jnp.float32
    # Full rank: only the rounding of the factors is left.
    dense = monarch_to_dense(*factors)
    distance = jnp.linalg.norm((dense - matrix).astype(jnp.complex64))
    tolerance = 8 * jnp.finfo(dtype).eps
    assert distance <= tolerance * jnp.linalg.norm(matrix.astype(jnp.complex64))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_ends_as_nan_in_its_slice(value):
    matrix = random_matrix(60, 40, dtype=np.float32).at[5, 33].set(value)
    sizes = {"nblocks_in": 2, "nblocks_out": 3, "rank": 20}
    start = time.monotonic()
    _, dense, error = jax.block_until_ready(solve(matrix, **sizes))
    assert time.monotonic() - start < 60
    slices = jnp.isnan(dense).reshape(20, 3, 2, 20)
    poisoned = np.zeros((3, 2), bool)
    poisoned[5 % 3, 33 // 20] = True
    np.testing.assert_array_equal(slices.all((0, 3)), poisoned)
    np.testing.assert_array_equal(slices.any((0, 3)), poisoned)
    assert jnp.isnan(error)


def test_a_matrix_of_nan_ends():
    matrix = jnp.full((64, 32), jnp.nan)
    factors = monarch_project(matrix, nblocks_in=4, nblocks_out=8)
    assert all(bool(jnp.isnan(w).all()) for w in factors)


def test_gradient_of_the_error_points_away_from_the_projection(x64):
    matrix = random_matrix(15, 8)
    sizes = {"nblocks_in": 2, "nblocks_out": 3, "rank": 2}
    _, nearest, _ = solve(matrix, **sizes)
    slope = jax.jit(jax.grad(lambda a: monarch_project_error(a, **sizes)))
    gradient = slope(matrix)
    np.testing.assert_allclose(gradient, 2 * (matrix - nearest), atol=1e-12)
    # Repeated and zero singular values do not upset it.
    for special in (jnp.zeros((15, 8)), jnp.ones((15, 8)), jnp.eye(15, 8)):
        assert jnp.isfinite(slope(special)).all()


def test_no_gradient_passes_through_the_projection(x64):
    matrix = random_matrix(15, 8)
    x = random_matrix(4, 8, seed=1)

    def loss(a):
        factors = monarch_project(a, nblocks_in=2, nblocks_out=3)
        return (monarch_matmul(x, *factors) ** 2).sum()

    value, gradient = jax.jit(jax.value_and_grad(loss))(matrix)
    assert value > 0
    np.testing.assert_array_equal(gradient, jnp.zeros_like(matrix))


def test_jit_traces_once_and_vmap_maps_matrices(x64):
    stack = random_matrix(45, 8).reshape(3, 15, 8)
    sizes = {"nblocks_in": 2, "nblocks_out": 3, "rank": 2}
    project = lambda matrix: monarch_project(matrix, **sizes)
    error = lambda matrix: monarch_project_error(matrix, **sizes)
    traced = jax.jit(chex.assert_max_traces(project, 1))
    mapped, errors = jax.vmap(project)(stack), jax.vmap(error)(stack)
    for i, matrix in enumerate(stack):
        _, dense, want = solve(matrix, **sizes)
        np.testing.assert_allclose(monarch_to_dense(*traced(matrix)), dense, atol=1e-12)
        np.testing.assert_allclose(
            monarch_to_dense(mapped.w1[i], mapped.w2[i]), dense, atol=1e-12
        )
        np.testing.assert_allclose(errors[i], want, rtol=1e-12)
