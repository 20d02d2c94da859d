"""The fused Monarch kernels compile, and keep the middle out of device memory."""

import jax
import jax.numpy as jnp
import pytest

from jaxlab.structured import monarch_matmul_features, monarch_matmul_fused

TOKENS = 8192
TPU_SIZES = [(1024, 4), (1024, 32), (4096, 4), (4096, 64), (8192, 4), (8192, 8)]
GPU_SIZES = [(1024, 4), (4096, 4), (8192, 4)]


def arrays(n, nblocks, dtype=jnp.bfloat16):
    width = n // nblocks
    block = jax.ShapeDtypeStruct((nblocks, width, width), dtype)
    return jax.ShapeDtypeStruct((n, TOKENS), dtype), block, block


def temporary(target, function, *arguments):
    return target.compile(function, *arguments).memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("sizes", TPU_SIZES)
def test_on_a_tpu(tpu, sizes):
    kernel = lambda *a: monarch_matmul_fused(*a, platform="tpu")
    assert temporary(tpu, kernel, *arrays(*sizes)) == 0


@pytest.mark.parametrize("sizes", GPU_SIZES)
def test_on_a_gpu(gpu, sizes):
    kernel = lambda *a: monarch_matmul_fused(*a, platform="gpu")
    x, w1, w2 = arrays(*sizes)
    # The rows of w1 in another order, but no array of the size of the middle.
    assert temporary(gpu, kernel, x, w1, w2) <= 2 * w1.size < 2 * x.size
    plain = lambda *a: monarch_matmul_features(*a, output_layout="block_major")
    assert temporary(gpu, plain, x, w1, w2) >= 2 * x.size


def test_float32_and_gradients(tpu, gpu):
    for target, platform in ((tpu, "tpu"), (gpu, "gpu")):
        loss = lambda x, *w, platform=platform: jnp.sum(
            monarch_matmul_fused(x, *w, platform=platform) ** 2
        )
        target.compile(jax.grad(loss, (0, 1, 2)), *arrays(1024, 4, jnp.float32))
