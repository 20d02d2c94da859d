"""Sloppy spectra on what people pass: messages, NumPy arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlab.curvature.gram_fisher import gram_fisher
from jaxlab.curvature.sloppiness import (
    correlation_spectrum,
    displacement_fraction,
    sloppiness,
    subspace_overlap_curve,
)
from jaxlab.likelihoods import Categorical, Gaussian

pytestmark = pytest.mark.untyped


def fails(needed, function, *args, **options):
    with pytest.raises(ValueError, match=needed) as caught:
        function(*args, **options)
    assert str(caught.value).startswith(f"{function.__name__}")
    assert "got" in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("shape", [(), (4,), (0, 3), (3, 0)])
def test_inputs_need_examples_and_features(shape):
    assert str(shape) in fails(
        "examples, features", correlation_spectrum, np.ones(shape)
    )
    fails("floating-point", correlation_spectrum, np.ones((2, 3), int))


def test_inputs_may_be_numpy():
    x = np.random.default_rng(0).standard_normal((9, 3)).astype(np.float32)
    np.testing.assert_allclose(
        correlation_spectrum(x), correlation_spectrum(jnp.asarray(x))
    )
    assert sloppiness(np.array([3.0, 2.0, 1.0])).slope < 0
    assert sloppiness([100.0, 10.0, 1.0]).decades == 2


@pytest.mark.parametrize(
    "range_",
    [{"low": 8}, {"high": 2}, {"low": -1}, {"high": 11}, {"low": 3, "high": 3}],
)
def test_ranges_of_three_at_least(range_):
    message = fails("at least three", sloppiness, np.ones(10), **range_)
    assert all(f"{k}={v}" in message for k, v in range_.items())
    fails("vector of eigenvalues", sloppiness, np.ones((4, 4)))
    fails("vector of eigenvalues", sloppiness, 1.0)


def test_vectors_of_one_space():
    a = np.eye(4)[:2]
    fails("one space", subspace_overlap_curve, a, np.eye(5)[:2])
    fails("vectors must be", subspace_overlap_curve, {"a": a, "b": a[:1]}, np.eye(8))
    fails("at", subspace_overlap_curve, np.ones((2, 3), int), a)
    for bad in (np.float32(1), np.zeros((0, 4)), {}):
        with pytest.raises(ValueError, match="subspace_overlap_curve"):
            subspace_overlap_curve(bad, a)
    for ks in ((0,), (3,), (), (1, -1)):
        fails("from 1 to 2", subspace_overlap_curve, a, a, ks=ks)


def test_displacements_of_one_tree():
    params, vectors = {"w": np.ones(3)}, {"w": np.eye(3)}
    fails("params0 must", displacement_fraction, vectors, params, {"v": np.ones(3)})
    fails("params0 must", displacement_fraction, vectors, params, {"w": np.ones(4)})
    fails("vectors must", displacement_fraction, {"w": np.eye(4)}, params, params)
    fails("vectors must", displacement_fraction, np.ones(3), params, params)
    fails("from 1 to 3", displacement_fraction, vectors, params, params, ks=[4])
    np.testing.assert_array_equal(
        displacement_fraction(np.eye(3)[:1], np.ones(3), np.zeros(3)),
        [1 / np.float32(3)],
    )


X, Y = np.eye(3, dtype=np.float32), np.zeros(3, int)
W = np.ones((3, 2), np.float32)
linear = lambda w, x: x @ w


def gram(*, apply_fn=linear, params=W, batch=(X, Y), k=2, **options):
    return gram_fisher(apply_fn, Categorical(), params, batch, k=k, **options)


def gram_fails(needed, **options):
    with pytest.raises(ValueError, match=needed) as caught:
        gram(**options)
    return str(caught.value)


def test_gram_kinds_and_keys():
    gram_fails('"true", "sampled" or "empirical"', kind="exact")
    gram_fails('kind="sampled" without one', kind="sampled")
    gram_fails('kind="true" with one', key=jax.random.key(0))


@pytest.mark.parametrize("k", [0, -1, 7, 100])
def test_gram_counts(k):
    gram_fails(r"min\(p, m\) = min\(6, 6\)", k=k)


def test_gram_batches():
    gram_fails("A batch must be", batch=X)
    gram_fails("at least one", batch=(X[:0], Y[:0]))
    gram_fails("one row per example", batch=({"a": X, "b": X[:2]}, Y))
    gram_fails("needs 3 targets", batch=(X, Y[:2]), kind="empirical")
    gram_fails("needs 3 targets", batch=(X, None), kind="empirical")
    gram_fails("outputs", apply_fn=lambda w, x: (x @ w).sum(-1))
    gram_fails("outputs", apply_fn=lambda w, x: (x @ w)[:2])
    gram_fails("one entry per row", batch=(X, Y, np.ones(2)))


def test_gram_parameters():
    gram_fails("floating-point", params=np.ones((3, 2), int))
    gram_fails("no entries", params={})


def test_gram_memory():
    message = gram_fails("memory_limit", memory_limit=100)
    assert "144 bytes for the Gram matrix of 6 rows" in message
    assert "top_eigenpairs" in message
    gram_fails("gradients of two", memory_limit=40, kind="empirical")


def test_gram_takes_partials_and_holes():
    want = gram()[0]
    partial = jax.tree_util.Partial(linear)
    np.testing.assert_allclose(gram(apply_fn=partial)[0], want)
    holes = {"w": W, "rest": optax.MaskedNode()}
    values, vectors = gram_fisher(
        lambda p, x: x @ p["w"], Gaussian(), holes, (X, None), k=1
    )
    assert vectors["rest"] == optax.MaskedNode()
    assert vectors["w"].shape == (1, 3, 2)
    assert values.shape == (1,)
