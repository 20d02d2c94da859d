"""Every form of the Monarch product: against the dense matrix and against einsums."""

from unittest import mock

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.structured import (
    monarch_matmul,
    monarch_matmul_features,
    monarch_to_dense,
)
from jaxlab.structured.monarch import _forms

# (k, q, p, l, s, r): even, all different, ragged, one block, and blocks wide enough
# for the mixed form, the last of them ragged.
SMALL = (
    (2, 6, 4, 3, 5, 4),
    (6, 8, 4, 4, 3, 12),
    (4, 5, 3, 2, 3, 10),
    (1, 3, 5, 1, 4, 3),
)
LARGE = ((3, 136, 5, 4, 130, 102), (4, 130, 3, 8, 129, 65))
EPSILON = {np.float64: 1e-12, np.float32: 2e-5, np.complex64: 2e-5}


def random_case(sizes, *, batch=(7,), seed=0, dtype=np.float64):
    k, q, p, l, s, r = sizes
    draw = np.random.default_rng(seed).standard_normal
    shapes = ((*batch, k * p), (k, q, p), (l, s, r))
    arrays = [draw(shape) / np.sqrt(shape[-1]) for shape in shapes]
    if np.issubdtype(dtype, np.complexfloating):
        arrays = [a + 1j * draw(a.shape) / np.sqrt(a.shape[-1]) for a in arrays]
    return tuple(jnp.asarray(a, dtype) for a in arrays)


def block_major(y, sizes):
    """Reorders an interleaved last axis block by block."""
    s, l = sizes[4], sizes[3]
    return jnp.swapaxes(y.reshape(*y.shape[:-1], s, l), -1, -2).reshape(y.shape)


def einsums(x, w1, w2, layout="interleaved"):
    return _forms.plain(x, w1, w2, layout == "interleaved")


def by_rows(x, w1, w2, layout="interleaved"):
    return monarch_matmul(x, w1, w2, output_layout=layout, platform="cpu")


def in_pieces(x, w1, w2, layout="interleaved"):
    """The same with the interleaving pass in three pieces at most, the last odd."""
    with mock.patch.multiple(_forms, PIECE_BYTES=1, MOST_PIECES=3):
        return by_rows(x, w1, w2, layout)


def elsewhere(x, w1, w2, layout="interleaved"):
    return monarch_matmul(x, w1, w2, output_layout=layout, platform="tpu")


def by_columns(x, w1, w2, layout="interleaved"):
    """The feature-major product between token-major arrays."""
    y = monarch_matmul_features(jnp.moveaxis(x, -1, 0), w1, w2, output_layout=layout)
    return jnp.moveaxis(y, 0, -1)


FORMS = (by_rows, in_pieces, elsewhere, by_columns)
LAYOUTS = ("interleaved", "block_major")


def close(found, expected, tolerance):
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape
    scale = max(np.abs(expected).max(initial=0), 1e-30)
    np.testing.assert_allclose(found / scale, expected / scale, atol=tolerance, rtol=0)


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.complex64])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sizes", SMALL + LARGE)
def test_equals_the_dense_product(x64, form, sizes, dtype):
    x, w1, w2 = random_case(sizes, dtype=dtype)
    expected = np.asarray(x) @ np.asarray(monarch_to_dense(w1, w2)).T
    both = jax.jit(lambda *a: [form(*a, layout) for layout in LAYOUTS])
    interleaved, blocks = both(x, w1, w2)
    assert interleaved.dtype == blocks.dtype == dtype
    close(interleaved, expected, EPSILON[dtype])
    close(blocks, block_major(expected, sizes), EPSILON[dtype])


def test_the_sizes_decide_about_the_form():
    def orders(sizes):
        program = str(jax.make_jaxpr(by_rows)(*random_case(sizes, dtype=np.float32)))
        return program.count("dimension_numbers=(([2], [2])")

    assert orders(SMALL[0]) == 2  # rows: both products contract the last axes
    assert orders(LARGE[0]) == 1  # mixed: the first alone


@pytest.mark.parametrize("form", [by_rows, in_pieces])
def test_large_cotangents_are_laid_out_by_pieces(form):
    arrays = random_case(SMALL[0], dtype=np.float32)
    tangent = lambda *arrays: jax.jvp(form, arrays, arrays)[1]
    program = str(jax.make_jaxpr(tangent)(*arrays))
    assert ("sizes=(3, 3, 1)" in program) == (form is in_pieces)
    # Nothing is padded on the way back.
    y, pull = jax.vjp(form, *arrays)
    back = str(jax.make_jaxpr(pull)(y))
    assert ("concatenate" in back) == (form is in_pieces)
    assert " pad[" not in back


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sizes", [SMALL[1], SMALL[2], LARGE[1]])
def test_derivatives_equal_those_of_the_einsums(x64, form, sizes, layout):
    arrays, tangents = random_case(sizes), random_case(sizes, seed=1)

    def everything(product, arrays, tangents):
        apply = lambda *a: product(*a, layout)
        loss = lambda a: jnp.sum(jnp.sin(apply(*a)))
        y, dy = jax.jvp(apply, arrays, tangents)
        return (
            (y, dy),
            jax.grad(loss)(arrays),
            jax.jvp(jax.grad(loss), (arrays,), (tangents,))[1],  # forward over reverse
            jax.grad(lambda a: jax.jvp(loss, (a,), (tangents,))[1])(arrays),
            jax.grad(lambda a: jnp.vdot(*map(_ravel, (jax.grad(loss)(a), tangents))))(
                arrays
            ),  # reverse over reverse
        )

    run = jax.jit(everything, static_argnums=0)
    found, expected = run(form, arrays, tangents), run(einsums, arrays, tangents)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        close(a, b, 1e-11)
    _, _, over_reverse, over_forward, twice = found
    chex.assert_trees_all_close(over_reverse, over_forward, rtol=1e-9, atol=1e-12)
    chex.assert_trees_all_close(over_reverse, twice, rtol=1e-9, atol=1e-12)


def _ravel(tree):
    return jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree)])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sizes", [SMALL[2], LARGE[1]])
def test_the_gradient_of_each_argument_alone(x64, form, sizes):
    arrays = random_case(sizes)
    dense = np.asarray(monarch_to_dense(*arrays[1:]))
    dy = jnp.asarray(np.random.default_rng(2).standard_normal((7, len(dense))))
    pulled = jax.jit(lambda *a: jax.vjp(form, *a)[1](dy))(*arrays)
    close(pulled[0], np.asarray(dy) @ dense, 1e-12)
    for i in range(3):
        alone = lambda a, i=i: form(*arrays[:i], a, *arrays[i + 1 :])
        (found,) = jax.jit(lambda a, f=alone: jax.vjp(f, a)[1](dy))(arrays[i])
        close(found, pulled[i], 1e-12)
        # The product is linear in each argument, so its transpose exists too.
        (found,) = jax.linear_transpose(alone, arrays[i])(dy)
        close(found, pulled[i], 1e-12)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sizes", [SMALL[0], LARGE[1]])
def test_complex_cotangents_are_not_conjugated(x64, form, sizes):
    x, w1, w2 = random_case(sizes, dtype=np.complex128)
    matrix = np.asarray(monarch_to_dense(w1, w2))
    draw = np.random.default_rng(3).standard_normal
    dy = jnp.asarray(draw((7, len(matrix))) + 1j * draw((7, len(matrix))))
    _, pull = jax.vjp(form, x, w1, w2)
    _, expected = jax.vjp(einsums, x, w1, w2)
    for a, b in zip(pull(dy), expected(dy), strict=True):
        close(a, b, 1e-12)
    close(pull(dy)[0], np.asarray(dy) @ matrix, 1e-12)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sizes", [SMALL[1], LARGE[1]])
def test_vmap_over_inputs_and_factors(x64, form, sizes):
    cases = [random_case(sizes, seed=seed) for seed in range(3)]
    xs, w1s, w2s = (jnp.stack(values) for values in zip(*cases, strict=True))
    loss = lambda *a: jnp.sum(jnp.cos(form(*a)))
    gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
    for axes in ((0, 0, 0), (0, None, None), (None, 0, None), (None, None, 0)):
        arguments = [
            stack if axis == 0 else stack[0]
            for stack, axis in zip((xs, w1s, w2s), axes, strict=True)
        ]
        mapped = jax.jit(jax.vmap(gradient, axes))(*arguments)
        for i in range(3):
            one = [a[i] if x == 0 else a for a, x in zip(arguments, axes, strict=True)]
            for a, b in zip(mapped, gradient(*one), strict=True):
                close(a[i], b, 1e-12)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sizes", [SMALL[1], LARGE[0]])
def test_bfloat16_sums_in_float32_both_ways(form, sizes, layout):
    arrays = random_case(sizes, dtype=jnp.bfloat16)
    wide = [a.astype(jnp.float32) for a in arrays]
    y, pull = jax.vjp(lambda *a: form(*a, layout), *arrays)
    expected, expected_pull = jax.vjp(lambda *a: einsums(*a, layout), *wide)
    gradients = zip(pull(y), expected_pull(y.astype(jnp.float32)), strict=True)
    for a, b in ((y, expected), *gradients):
        assert a.dtype == jnp.bfloat16
        error = np.linalg.norm(np.asarray(a, np.float32) - np.asarray(b))
        assert error <= 1e-2 * np.linalg.norm(b)  # a few roundings of 2^-9
    program = str(jax.make_jaxpr(lambda *a: form(*a, layout))(*arrays))
    assert program.count("preferred_element_type=float32") == 2


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("batch", [(), (1,), (2, 3), (0,), (3, 0)])
def test_leading_and_empty_dimensions(form, batch, layout):
    sizes = SMALL[2]
    x, w1, w2 = random_case(sizes, batch=batch, dtype=np.float32)
    loss = lambda *a: form(*a, layout).sum()
    y = form(x, w1, w2, layout)
    gradients = jax.jit(jax.grad(loss, (0, 1, 2)))(x, w1, w2)
    assert y.shape == (*batch, 6)
    close(y, einsums(x, w1, w2, layout), 1e-6)
    chex.assert_trees_all_equal_shapes(gradients, (x, w1, w2))
    if x.size == 0:
        assert all(not np.any(g) for g in gradients)


@pytest.mark.parametrize("form", FORMS)
def test_one_trace_under_jit(form):
    traces = []

    @jax.jit
    @jax.grad
    def gradient(*arguments):
        traces.append(None)
        return form(*arguments).sum()

    arrays = random_case(SMALL[2], dtype=np.float32)
    for scale in (1.0, 2.0):
        gradient(scale * arrays[0], *arrays[1:])
    assert len(traces) == 1


def test_features_keep_further_dimensions_in_place():
    x, w1, w2 = random_case(SMALL[1], batch=(2, 3), dtype=np.float32)
    y = monarch_matmul_features(jnp.moveaxis(x, -1, 0), w1, w2)
    close(y, jnp.moveaxis(monarch_matmul(x, w1, w2), -1, 0), 1e-6)


def test_the_stated_permutation_of_the_layouts():
    s, l = SMALL[1][4], SMALL[1][3]
    x, w1, w2 = random_case(SMALL[1], batch=(), dtype=np.float32)
    y = monarch_matmul(x, w1, w2)
    blocks = monarch_matmul(x, w1, w2, output_layout="block_major")
    close(blocks, y.reshape(s, l).T.ravel(), 1e-6)


@pytest.mark.parametrize("platform", ["cpu", "tpu", "cuda"])
def test_lowers_for_other_platforms(platform):
    arrays = random_case(SMALL[1], dtype=np.float32)
    for form in FORMS:
        step = jax.jit(jax.grad(lambda *a, f=form: f(*a).sum(), argnums=(0, 1, 2)))
        assert step.trace(*arrays).lower(lowering_platforms=(platform,)).as_text()
