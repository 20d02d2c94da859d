"""What is compared is comparable: same function, same number of parameters."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import demo
from benchmarks.claims import monarch as claim
from benchmarks.speed import monarch as speed
from jaxlab.datasets import planted_structure
from jaxlab.structured import init_monarch, monarch_to_dense


def asymmetric(dtype):
    """Makes factors whose six sizes all differ: k=6, q=8, p=4, l=12, s=5, r=4."""
    keys = jax.random.split(jax.random.key(0))
    w1 = jax.random.normal(keys[0], (6, 8, 4), dtype)
    w2 = jax.random.normal(keys[1], (12, 5, 4), dtype)
    return w1, w2


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.complex64])
def test_adjoint_is_the_conjugate_transpose(dtype):
    w1, w2 = asymmetric(dtype)
    dense = np.asarray(monarch_to_dense(w1, w2))
    z = jax.random.normal(jax.random.key(1), (2, 3, 60), dtype)
    expected = np.asarray(z) @ dense.conj()
    np.testing.assert_allclose(
        claim.adjoint_matmul(z, w1, w2), expected, rtol=1e-4, atol=1e-4
    )


def test_two_einsums_multiply_by_the_same_matrix():
    w1, w2 = asymmetric(jnp.float32)
    x = jax.random.normal(jax.random.key(1), (2, 3, 24))
    expected = np.asarray(x) @ np.asarray(monarch_to_dense(w1, w2)).T
    np.testing.assert_allclose(
        speed.two_einsums(x, w1, w2), expected, rtol=1e-4, atol=1e-4
    )


def test_sides_that_differ_are_not_timed():
    y = jnp.ones((2, 2))
    same = {name: (y, y) for name in (speed.DENSE, speed.OURS, speed.EINSUM)}
    assert speed.disagreement(same) == 0.0
    for name in (speed.OURS, speed.EINSUM):
        for wrong in (y.at[0, 1].add(0.1), y.at[0, 1].set(jnp.nan)):
            with pytest.raises(ValueError, match="nothing to compare"):
                speed.disagreement(same | {name: (y, wrong)})


def test_gradients_of_the_factors_are_compared_too():
    y = jnp.ones((2, 2))
    results = {
        speed.DENSE: (y, y, y),
        speed.OURS: (y, y, y),
        speed.EINSUM: (y, y, 2 * y),
    }
    with pytest.raises(ValueError, match="nothing to compare"):
        speed.disagreement(results)


def test_the_feature_major_product_is_compared_between_token_major_arrays():
    products, (x, dy) = speed.compared(16, 4, 5, seed=0)
    apply, weights = products[speed.FEATURES]
    both = speed.with_gradients(apply)
    results = {
        name: speed.with_gradients(f)(x, dy, *w)
        for name, (f, w) in products.items()
        if name != speed.FEATURES
    }
    found = speed.as_tokens(both(x.T, dy.T, *weights))
    assert speed.disagreement(results | {speed.FEATURES: found}) < speed.TOLERANCE
    for i in range(4):
        wrong = (*found[:i], 2 * found[i], *found[i + 1 :])
        with pytest.raises(ValueError, match="nothing to compare"):
            speed.disagreement(results | {speed.FEATURES: wrong})


@pytest.mark.parametrize("structure", ["monarch", "dft", "convolution"])
def test_baselines_have_as_many_parameters_and_hardly_more(structure):
    outputs = 128 if structure == "dft" else 64
    found = {n: claim.parameters(m) for n, m in claim.methods(structure).items()}
    ours = found[claim.MONARCH]
    for name in (claim.LOW_RANK, claim.NARROW):
        assert ours <= found[name] < ours + 64 + outputs


def test_complex_parameters_count_twice():
    factors = init_monarch(jax.random.key(0), 64, 64, nblocks=8, rank=1)
    real = sum(w.size for w in factors)
    ours = claim.methods("convolution")[claim.MONARCH]
    assert claim.parameters(ours) == 2 * 2 * real


@pytest.mark.parametrize("structure", ["monarch", "dft"])
def test_least_error_is_that_of_the_truncated_svd(structure):
    data = planted_structure(structure, noise_scale=claim.NOISE)
    low_rank = claim.methods(structure)[claim.LOW_RANK]
    first, _ = low_rank.init(jax.random.key(0))
    teacher = data.extras["teacher"]
    u, s, v = np.linalg.svd(teacher)
    rank = first.shape[1]
    best = (u[:, :rank] * s[:rank]) @ v[:rank]
    x, y = data.splits["test"]
    # 1,024 rows: the mean over the sample is within a few percent of the expectation.
    assert claim.least_error(data, low_rank) == pytest.approx(
        np.mean((x @ best.T - y) ** 2), rel=0.05
    )


def test_a_diverging_rate_leaves_a_number():
    options = dataclasses.replace(
        claim.PRESETS["small"], steps=30, learning_rates=(1e-2, 1e30)
    )
    data = [planted_structure("monarch", noise_scale=claim.NOISE)]
    validation, test = claim.errors(
        claim.methods("monarch")[claim.NARROW], data, options
    )
    assert np.isfinite(validation).all()
    assert validation[1, 0] == test[1, 0] == claim.DIVERGED


def test_narrower_dense_is_as_wide_as_it_may_be():
    budget = demo.count(demo.monarch_m)
    width = demo.narrow_m(rngs=demo.nnx.Rngs(0)).layers[1].kernel.shape[0]
    count = lambda h: 65 * h + (h + 1) * h + (h + 1) * 10
    assert count(width) == demo.count(demo.narrow_m)
    assert count(width) <= budget < count(width + 1)
