"""The fused kernels, interpreted: against the dense matrix and the unfused product."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.structured import (
    monarch_matmul_features,
    monarch_matmul_fused,
    monarch_to_dense,
)
from jaxlab.structured.monarch import fused

# (k, q, p, l, s, r); a TPU takes any numbers of blocks, ragged ones too, a GPU powers
# of two as the widths.
TPU_SIZES = (
    (2, 24, 8, 3, 16, 16),
    (4, 8, 16, 8, 8, 4),
    (3, 8, 8, 12, 24, 2),
    (2, 24, 8, 16, 8, 3),
    (1, 8, 8, 1, 8, 8),
)
GPU_SIZES = ((2, 32, 16, 2, 16, 32), (4, 16, 32, 1, 64, 64), (1, 96, 128, 6, 16, 16))
CASES = [("tpu", sizes) for sizes in TPU_SIZES] + [("gpu", s) for s in GPU_SIZES]
STREAMED = mock.patch.object(fused, "_VMEM", 2**10)


def random_case(sizes, *, tokens=5, seed=0, dtype=jnp.float32):
    k, q, p, l, s, r = sizes
    draw = np.random.default_rng(seed).standard_normal
    shapes = ((k * p, tokens), (k, q, p), (l, s, r))
    scales = (1, p**0.5, r**0.5)
    return tuple(
        jnp.asarray(draw(shape) / scale, dtype)
        for shape, scale in zip(shapes, scales, strict=True)
    )


def expected(x, w1, w2):
    """The product with the dense matrix in float64, rows in block-major order."""
    l, s, _ = w2.shape
    arrays = (np.asarray(a, np.float64) for a in (x, w1, w2))
    with jax.enable_x64(True):
        x, w1, w2 = map(jnp.asarray, arrays)
        y = np.asarray(monarch_to_dense(w1, w2) @ x)
    return y.reshape(s, l, -1).swapaxes(0, 1).reshape(l * s, -1)


@pytest.mark.parametrize("tokens", [1, 150])
@pytest.mark.parametrize(("platform", "sizes"), CASES)
def test_equals_the_dense_product(platform, sizes, tokens):
    x, w1, w2 = random_case(sizes, tokens=tokens)
    y = monarch_matmul_fused(x, w1, w2, platform=platform, interpret=True)
    np.testing.assert_allclose(y, expected(x, w1, w2), atol=1e-5)


@pytest.mark.parametrize("sizes", TPU_SIZES)
def test_factors_that_do_not_fit_stream_by_blocks(sizes):
    x, w1, w2 = random_case(sizes, tokens=300)
    with STREAMED:
        text = str(jax.make_jaxpr(lambda *a: fused._fused("tpu", True, *a))(x, w1, w2))
        y = monarch_matmul_fused(x, w1, w2, platform="tpu", interpret=True)
    assert f"grid=(3, {sizes[0] + sizes[3]})" in text
    np.testing.assert_allclose(y, expected(x, w1, w2), atol=1e-5)


def test_tiles_of_several_pieces():
    x, w1, w2 = random_case(TPU_SIZES[0], tokens=700)
    text = str(jax.make_jaxpr(lambda *a: fused._fused("tpu", True, *a))(x, w1, w2))
    assert "grid=(1,)" in text  # 1,024 tokens at a time, eight pieces of 128
    y = monarch_matmul_fused(x, w1, w2, platform="tpu", interpret=True)
    np.testing.assert_allclose(y, expected(x, w1, w2), atol=1e-5)


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
def test_bfloat16_adds_up_in_float32(platform):
    sizes = (2, 32, 32, 2, 32, 32)
    x, w1, w2 = random_case(sizes, tokens=9, dtype=jnp.bfloat16)
    y = monarch_matmul_fused(x, w1, w2, platform=platform, interpret=True)
    assert y.dtype == jnp.bfloat16
    right = expected(x, w1, w2)
    # Rounding of the middle and of the output, 2^-9 each.
    assert np.abs(np.asarray(y, np.float64) - right).max() < 0.01 * np.abs(right).max()
    kernel = lambda *a: fused._fused(platform, True, *a)
    program = str(jax.make_jaxpr(kernel)(x, w1, w2))
    assert program.count("preferred_element_type=float32") >= 2
    assert "preferred_element_type=bfloat16" not in program


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
def test_derivatives_are_those_of_the_unfused_product(platform):
    arrays = random_case((2, 32, 16, 2, 16, 32), tokens=6)
    tangents = random_case((2, 32, 16, 2, 16, 32), tokens=6, seed=1)
    kernel = lambda *a: monarch_matmul_fused(*a, platform=platform, interpret=True)
    plain = lambda *a: monarch_matmul_features(*a, output_layout="block_major")

    def first_and_second(f):
        loss = lambda *a: jnp.sum(jnp.sin(f(*a)))
        grad = jax.grad(loss, (0, 1, 2))
        return jax.jvp(f, arrays, tangents), jax.jvp(grad, arrays, tangents)

    found, right = first_and_second(kernel), first_and_second(plain)
    for a, b in zip(*map(jax.tree.leaves, (found, right)), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_batches_jit_and_vmap():
    x, w1, w2 = random_case(TPU_SIZES[0], tokens=24)
    kernel = jax.jit(
        lambda *a: monarch_matmul_fused(*a, platform="tpu", interpret=True)
    )
    y = kernel(x, w1, w2)
    np.testing.assert_array_equal(
        kernel(x.reshape(-1, 2, 3, 4), w1, w2).reshape(y.shape), y
    )
    assert kernel(x[:, 0], w1, w2).shape == (48,)
    assert kernel(x[:, :0], w1, w2).shape == (48, 0)
    both = jax.vmap(kernel, (None, 0, None))(x, jnp.stack([w1, 2 * w1]), w2)
    np.testing.assert_allclose(both, jnp.stack([y, 2 * y]), atol=1e-5)


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
def test_a_bad_token_spoils_no_other(platform):
    x, w1, w2 = random_case((2, 32, 16, 2, 16, 32), tokens=70)
    x = x.at[3, 11].set(jnp.nan)
    y = monarch_matmul_fused(x, w1, w2, platform=platform, interpret=True)
    assert np.flatnonzero(np.isnan(y).any(0)).tolist() == [11]
