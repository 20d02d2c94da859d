"""Sizes, distributions and options of fresh Monarch factors."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.structured import init_monarch, monarch_matmul


@pytest.mark.parametrize(
    ("widths", "nblocks", "w1", "w2"),
    [
        ((24, 36), 4, (4, 6, 6), (4, 9, 6)),
        ((36, 24), 4, (4, 6, 9), (4, 6, 6)),
        ((32, 32), 4, (4, 8, 8), (4, 8, 8)),
        ((10, 7), 4, (4, 2, 3), (4, 2, 2)),
        ((7, 10), 3, (3, 3, 3), (3, 4, 3)),
        ((5, 1), 1, (1, 1, 5), (1, 1, 1)),
        ((3, 2), 8, (8, 1, 1), (8, 1, 1)),
    ],
)
def test_padded_sizes(widths, nblocks, w1, w2):
    factors = init_monarch(jax.random.key(0), *widths, nblocks=nblocks)
    assert (factors.w1.shape, factors.w2.shape) == (w1, w2)


def test_a_rank_sets_the_middle():
    factors = init_monarch(jax.random.key(0), 24, 36, nblocks=4, rank=3)
    assert (factors.w1.shape, factors.w2.shape) == ((4, 12, 6), (4, 9, 12))


# The output variance of unit inputs: 1, and a third for each uniform factor. Over keys
# it spreads by about a percent, three at rank 2, where the middle has 32 units.
@pytest.mark.parametrize(
    ("scheme", "variance"), [("variance_preserving", 1.0), ("official", 1 / 9)]
)
@pytest.mark.parametrize(("nblocks", "rank"), [(4, None), (4, 2), (16, None)])
def test_output_variance(scheme, variance, nblocks, rank):
    key, key_x = jax.random.split(jax.random.key(1))
    w = init_monarch(key, 1024, 512, nblocks=nblocks, rank=rank, scheme=scheme)
    x = jax.random.normal(key_x, (128, 1024))
    got = float(monarch_matmul(x, *w).var())
    assert math.isclose(got, variance, rel_tol=0.12 if rank else 0.04)


def test_official_entries_are_bounded_by_their_own_fan_in():
    w1, w2 = init_monarch(jax.random.key(0), 1024, 256, scheme="official")
    for w in (w1, w2):
        bound = 1 / math.sqrt(w.shape[-1])
        assert float(jnp.abs(w).max()) <= bound
        assert math.isclose(float(w.var()), bound**2 / 3, rel_tol=0.05)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.complex64])
def test_dtype_and_unit_variance(dtype):
    factors = init_monarch(jax.random.key(0), 256, 256, dtype=dtype)
    for w in factors:
        assert w.dtype == dtype
        power = float((jnp.abs(w.astype(jnp.complex64)) ** 2).mean())
        assert math.isclose(power * w.shape[-1], 1.0, rel_tol=0.05)


def test_keys_decide():
    first, again = (init_monarch(jax.random.key(3), 12, 8) for _ in range(2))
    other = init_monarch(jax.random.key(4), 12, 8)
    np.testing.assert_array_equal(first.w1, again.w1)
    assert (first.w1 != other.w1).all()
    square = init_monarch(jax.random.key(3), 16, 16)
    assert (square.w1 != square.w2).all()


def test_abstract_and_mapped():
    keys = jax.random.split(jax.random.key(0), 3)
    stack = jax.vmap(lambda key: init_monarch(key, 10, 7))(keys)
    assert stack.w1.shape == (3, 4, 2, 3)
    shapes = jax.eval_shape(lambda key: init_monarch(key, 10, 7), keys[0])
    assert shapes.w2.shape == (4, 2, 2)
