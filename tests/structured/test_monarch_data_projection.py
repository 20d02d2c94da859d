"""Data-aware Monarch projections: dense oracles of the half steps, monotone errors."""

import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.structured import (
    monarch_project,
    monarch_project_data,
    monarch_to_dense,
)

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens" / "monarch.npz"
# (rows, columns, nblocks_in, nblocks_out, rank)
SHAPES = ((15, 8, 2, 3, 1), (12, 20, 5, 4, 2), (6, 6, 1, 2, 1), (8, 9, 3, 1, 2))
options = ("nblocks_in", "nblocks_out", "rank", "num_iterations")
solve = jax.jit(monarch_project_data, static_argnames=options)


def case(shape, *, rows=40, seed=0, dtype=np.float64, inner=None):
    """A matrix and correlated inputs, of dimension `inner` where it is given."""
    m, n, k, l, c = shape
    rng = np.random.default_rng(seed)

    def draw(*sizes):
        array = rng.standard_normal(sizes)
        if np.issubdtype(dtype, np.complexfloating):
            array = array + 1j * rng.standard_normal(sizes)
        return array.astype(dtype)

    inputs = draw(rows, inner or n) @ draw(inner or n, n)
    sizes = {"nblocks_in": k, "nblocks_out": l, "rank": c}
    return jnp.asarray(draw(m, n)), jnp.asarray(inputs), sizes


def distance(matrix, inputs, factors):
    gap = np.asarray(matrix) - np.asarray(monarch_to_dense(*factors))
    return (np.abs(np.asarray(inputs) @ gap.T) ** 2).sum()


def dense_half_step(matrix, inputs, factors, which):
    """One least-squares problem in all entries of one factor, from its Jacobian."""
    factors = [np.asarray(w) for w in factors]
    target = (np.asarray(inputs) @ np.asarray(matrix).T).ravel()
    columns = []
    for entry in range(factors[which].size):
        unit = np.zeros_like(factors[which]).ravel()
        unit[entry] = 1
        probe = list(factors)
        probe[which] = unit.reshape(factors[which].shape)
        dense = np.asarray(monarch_to_dense(*probe))
        columns.append((np.asarray(inputs) @ dense.T).ravel())
    solution, *_ = np.linalg.lstsq(np.stack(columns, axis=1), target)
    factors[which] = solution.reshape(factors[which].shape)
    return factors


@pytest.mark.parametrize("dtype", [np.float64, np.complex128])
@pytest.mark.parametrize("shape", SHAPES[:3])
def test_half_steps_are_least_squares(x64, shape, dtype):
    matrix, inputs, sizes = case(shape, dtype=dtype)
    want = monarch_project(matrix, **sizes)
    _, errors = solve(matrix, inputs, **sizes, num_iterations=2, ridge=1e-15)
    np.testing.assert_allclose(errors[0], distance(matrix, inputs, want), rtol=1e-10)
    for error in errors[1:]:
        want = dense_half_step(matrix, inputs, want, 1)
        want = dense_half_step(matrix, inputs, want, 0)
        np.testing.assert_allclose(error, distance(matrix, inputs, want), rtol=1e-7)


@pytest.mark.parametrize("dtype", [np.float64, np.complex128])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("rows", "inner"), [(40, None), (3, None), (40, 4), (1, None)])
def test_errors_fall_and_are_the_distance(x64, shape, rows, inner, dtype):
    matrix, inputs, sizes = case(shape, rows=rows, inner=inner, dtype=dtype)
    factors, errors = solve(matrix, inputs, **sizes, num_iterations=8)
    assert errors.shape == (9,)
    assert (jnp.diff(errors) <= 0).all()
    assert errors[-1] < 0.95 * errors[0]
    np.testing.assert_allclose(
        errors[-1], distance(matrix, inputs, factors), rtol=1e-9, atol=1e-12
    )
    closed = monarch_project(matrix, **sizes)
    assert distance(matrix, inputs, factors) <= distance(matrix, inputs, closed)
    assert [w.shape for w in factors] == [w.shape for w in closed]


def test_white_inputs_keep_the_closed_form(x64):
    shape = SHAPES[1]
    matrix, _, sizes = case(shape)
    inputs = (
        3 * jnp.linalg.qr(jnp.asarray(np.random.default_rng(1).random((30, 20))))[0]
    )
    factors, errors = solve(matrix, inputs, **sizes)
    closed = monarch_to_dense(*monarch_project(matrix, **sizes))
    np.testing.assert_allclose(monarch_to_dense(*factors), closed, atol=1e-6)
    np.testing.assert_allclose(errors, errors[0], rtol=1e-10)


def test_reference_projection_of_the_other_layout(x64):
    keys = ("A", "w1", "w2", "dense", "kjb1b2", "sq_err")
    with np.load(GOLDENS) as archive:
        g = {key: archive[f"projb1b2/{key}"] for key in keys}
    k, l, c, minor = (int(size) for size in g["kjb1b2"])
    # There an output is (s, l, minor); with s and minor together it is our class.
    order = np.arange(24).reshape(-1, l, minor).transpose(0, 2, 1).ravel()
    matrix, dense = jnp.asarray(g["A"][order]), g["dense"][order]
    sizes = {"nblocks_in": k, "nblocks_out": l, "rank": c}
    closed = monarch_project(matrix, **sizes)
    np.testing.assert_allclose(monarch_to_dense(*closed), dense, atol=1e-10)
    factors, errors = solve(matrix, jnp.eye(20), **sizes, num_iterations=3)
    np.testing.assert_allclose(errors, g["sq_err"], rtol=1e-10)
    np.testing.assert_allclose(monarch_to_dense(*factors), dense, atol=1e-6)


def test_a_member_of_the_class_is_found_exactly(x64):
    # Seen through few inputs, far from where the closed form starts.
    shape = (12, 12, 3, 3, 1)
    member, inputs, sizes = case(shape, rows=6)
    member = monarch_to_dense(*monarch_project(member, **sizes))
    _, errors = solve(member, inputs, **sizes)
    assert errors[0] < 1e-20
    noise = case(shape, seed=3)[0]
    # The noise is invisible to the inputs, so the data norm has a member at zero.
    blind = np.eye(12) - np.linalg.pinv(inputs) @ inputs
    _, errors = solve(
        member + 0.3 * noise @ blind, inputs, **sizes, num_iterations=60, ridge=1e-12
    )
    assert errors[-1] < 1e-4 * errors[0]


def test_full_rank_is_exact(x64):
    matrix, inputs, sizes = case((8, 9, 3, 2, 3))
    factors, errors = solve(matrix, inputs, **sizes, num_iterations=2)
    assert errors[-1] < 1e-20
    np.testing.assert_allclose(monarch_to_dense(*factors), matrix, atol=1e-9)


def test_scales_of_inputs_and_matrix_do_not_matter(x64):
    matrix, inputs, sizes = case(SHAPES[0])
    _, errors = solve(matrix, inputs, **sizes)
    _, scaled = solve(1e3 * matrix, 1e-5 * inputs, **sizes)
    np.testing.assert_allclose(scaled, 1e-4 * errors, rtol=1e-6)


@pytest.mark.parametrize("rows", [2, 64])
def test_single_precision_falls_too(rows):
    matrix, inputs, sizes = case((32, 32, 4, 4, 2), rows=rows, dtype=np.float32)
    factors, errors = solve(matrix, inputs, **sizes)
    assert errors.dtype == factors.w1.dtype == jnp.float32
    assert (jnp.diff(errors) <= 0).all()
    assert errors[-1] < 0.9 * errors[0]
    half, errors = solve(
        matrix.astype(jnp.bfloat16), inputs.astype(jnp.bfloat16), **sizes
    )
    assert (half.w1.dtype, errors.dtype) == (jnp.bfloat16, jnp.float32)


def test_zero_empty_and_nan_inputs():
    matrix, inputs, sizes = case(SHAPES[0], dtype=np.float32)
    closed = monarch_to_dense(*monarch_project(matrix, **sizes))
    for nothing in (0 * inputs, inputs[:0]):
        factors, errors = solve(matrix, nothing, **sizes)
        np.testing.assert_array_equal(errors, 0)
        np.testing.assert_allclose(monarch_to_dense(*factors), closed, atol=1e-5)
    _, errors = solve(matrix, inputs.at[0, 0].set(jnp.nan), **sizes)
    assert jnp.isnan(errors).all()


def test_no_iterations_is_the_closed_form():
    matrix, inputs, sizes = case(SHAPES[0], dtype=np.float32)
    factors, errors = solve(matrix, inputs, **sizes, num_iterations=0)
    assert errors.shape == (1,)
    chex.assert_trees_all_close(factors, monarch_project(matrix, **sizes), rtol=1e-5)


def test_one_trace_vmap_and_no_gradient():
    matrix, inputs, sizes = case(SHAPES[0], dtype=np.float32)
    plain = lambda a, x: monarch_project_data(a, x, **sizes, num_iterations=2)
    traced = jax.jit(chex.assert_max_traces(plain, 1))
    _, errors = traced(matrix, inputs)
    _, double = traced(2 * matrix, inputs)
    np.testing.assert_allclose(double, 4 * errors, rtol=1e-3)
    _, stack = jax.jit(jax.vmap(plain, (0, None)))(jnp.stack([matrix] * 2), inputs)
    np.testing.assert_allclose(stack[1], errors, rtol=1e-3)
    loss = lambda a: plain(a, inputs)[1].sum()
    np.testing.assert_array_equal(jax.jit(jax.grad(loss))(matrix), 0)
