"""What the coherence of gradients and its means refuse, and what NumPy may pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.optimizers.coherence import (
    gradient_alignment,
    gradient_coherence,
    gradient_moments,
    median_of_means,
    median_of_means_gradient,
    per_example_gradients,
    running_median,
    winsorized_gradient,
    winsorized_mean,
)

pytestmark = pytest.mark.untyped

W = jnp.array([1.0, -1.0])
X = jnp.arange(8.0).reshape(4, 2)
PLAIN = [
    per_example_gradients,
    gradient_moments,
    gradient_alignment,
    median_of_means_gradient,
]


def loss_fn(w, batch):
    x = batch[0] if isinstance(batch, tuple) else batch
    return jnp.mean((x @ w) ** 2)


def winsorized(loss_fn, params, batch, **options):
    return winsorized_gradient(loss_fn, params, batch, k=1, **options)


winsorized.__name__ = "winsorized_gradient"
everyone = pytest.mark.parametrize(
    "function", [*PLAIN, winsorized], ids=lambda f: f.__name__
)


@everyone
def test_params_are_floating_and_not_empty(function):
    name = function.__name__
    with pytest.raises(ValueError, match=rf"{name}: .* got int32 at params\['n'\]"):
        function(loss_fn, {"w": W, "n": jnp.arange(2)}, X)
    with pytest.raises(ValueError, match=f"{name}: .* got complex64 at params"):
        function(loss_fn, W.astype(complex), X)
    with pytest.raises(ValueError, match=f"{name}: params has no entries"):
        function(loss_fn, {}, X)


@everyone
def test_batches_have_rows(function):
    name = function.__name__
    with pytest.raises(ValueError, match=f"{name}: every array of a batch needs one"):
        function(loss_fn, W, (X, jnp.ones(3)))
    with pytest.raises(ValueError, match=r"at least one; got leading axes \[\(0,\)\]"):
        function(loss_fn, W, X[:0])
    with pytest.raises(ValueError, match="got float in place of arrays"):
        function(loss_fn, W, (X, 1.0))


@everyone
def test_losses_are_scalars(function):
    message = f"{function.__name__}: loss_fn must return one floating scalar"
    for wrong in (
        lambda w, x: (x @ w) ** 2,
        lambda w, x: (jnp.mean(x @ w), x),
        lambda w, x: jnp.sum(x @ w > 0),
    ):
        with pytest.raises(ValueError, match=message):
            function(wrong, W, X)
    with pytest.raises(ValueError, match=r"must be a function .* got float"):
        function(1.0, W, X)


@pytest.mark.parametrize("microbatch", [0, -1, 2.0, True])
def test_micro_batches_are_counts(microbatch):
    for function in (*PLAIN[:3], winsorized):
        message = rf"{function.__name__}: microbatch must be .* got {microbatch}"
        with pytest.raises(ValueError, match=message):
            function(loss_fn, W, X, microbatch=microbatch)


def test_third_entries_are_weights():
    for function in (gradient_moments, gradient_alignment):
        with pytest.raises(ValueError, match=r"rows' weights, .* got int32; pass"):
            function(loss_fn, W, (X, X, jnp.arange(4)))
        with pytest.raises(ValueError, match=r"got dict; pass other batches as"):
            function(loss_fn, W, (X, X, {"w": jnp.ones(4)}))
    for function in (median_of_means_gradient, winsorized):
        message = f"{function.__name__}: order statistics take all rows alike"
        with pytest.raises(ValueError, match=message):
            function(loss_fn, W, (X, X, jnp.ones(4)))
    # A weight for each token: a row weighs their sum.
    moments = gradient_moments(loss_fn, W, (X, X, jnp.ones((4, 3))))
    assert float(moments.weight) == 12


def test_references_resemble_params():
    for wrong in ({"w": W}, W[:1], [W]):
        with pytest.raises(ValueError, match="reference must be a tree like params"):
            gradient_alignment(loss_fn, W, X, reference=wrong)


def test_stacks_share_their_leading_axis():
    message = r"needs one entry per example .* got leading axes \[\(2,\), \(3,\)\]"
    with pytest.raises(ValueError, match=message):
        gradient_coherence({"a": jnp.ones((2, 1)), "b": jnp.ones((3, 1))})
    with pytest.raises(ValueError, match=r"got leading axes \[\(\)\]"):
        gradient_coherence(jnp.ones(()))
    with pytest.raises(ValueError, match="gradients has no entries"):
        gradient_coherence({})
    with pytest.raises(ValueError, match="got int32 at gradients"):
        gradient_coherence(jnp.arange(3))


def test_tails_leave_something():
    for k in (-1, 2, 1.0, True, jnp.int32(1)):
        with pytest.raises(ValueError, match="k must be an integer with 0 <= 2 k < 4"):
            winsorized_mean(X, k=k)
        with pytest.raises(
            ValueError, match="winsorized_gradient: k must be an integer"
        ):
            winsorized_gradient(loss_fn, W, X, k=k)
    for percent in (-1, 50.1, float("nan"), "8", True):
        with pytest.raises(ValueError, match=r"percent must be a number in \[0, 50\]"):
            winsorized_mean(X, percent=percent)
    for options in ({}, {"k": 1, "percent": 8}):
        with pytest.raises(ValueError, match=r"give one of k= and percent="):
            winsorized_mean(X, **options)
        with pytest.raises(ValueError, match=r"give one of k= and percent="):
            winsorized_gradient(loss_fn, W, X, **options)


@pytest.mark.parametrize("groups", [0, -1, 5, 2.0, True])
def test_groups_are_not_empty(groups):
    message = f"groups must be an integer from 1 to 4, .* got {groups}"
    with pytest.raises(ValueError, match=f"median_of_means: {message}"):
        median_of_means(X, groups=groups)
    with pytest.raises(ValueError, match=f"median_of_means_gradient: {message}"):
        median_of_means_gradient(loss_fn, W, X, groups=groups)


def test_arrays_of_the_means():
    for mean in (lambda x, **o: winsorized_mean(x, k=0, **o), median_of_means):
        with pytest.raises(ValueError, match="x must be floating, got int32"):
            mean(jnp.arange(4))
        with pytest.raises(ValueError, match=r"got axis=2 for shape \(4, 2\)"):
            mean(X, axis=2)
        with pytest.raises(ValueError, match=r"got axis=0 for shape \(0, 2\)"):
            mean(X[:0])
        with pytest.raises(ValueError, match=r"got axis=0 for shape \(\)"):
            mean(1.0)


def test_windows_are_counts():
    for window in (0, -3, 3.0, True, jnp.int32(3)):
        with pytest.raises(ValueError, match="window must be an integer >= 1, got"):
            running_median(window)
    with pytest.raises(ValueError, match="running_median: params has no entries"):
        running_median().init({})
    with pytest.raises(ValueError, match=r"got int32 at params\['n'\]"):
        running_median().init({"n": jnp.arange(2)})


def test_numpy_arrays_are_welcome():
    w, x = np.asarray(W), np.asarray(X)
    same = lambda a, b: all(
        np.array_equal(i, j) for i, j in zip(*map(jax.tree.leaves, (a, b)), strict=True)
    )
    for function in (*PLAIN, winsorized):
        assert same(function(loss_fn, w, x), function(loss_fn, W, X))
    assert same(
        gradient_moments(loss_fn, w, (x, x, np.ones(4)), microbatch=3),
        gradient_moments(loss_fn, W, (X, X, jnp.ones(4)), microbatch=3),
    )
    assert same(gradient_coherence({"w": x}), gradient_coherence({"w": X}))
    assert same(winsorized_mean(x, k=np.int64(1)), winsorized_mean(X, k=1))
    assert same(median_of_means(x, groups=np.int64(2)), median_of_means(X, groups=2))
    # Params of Python numbers, and half precision.
    assert float(winsorized(lambda w, x: jnp.mean(w * x), 1.0, x[:, 0])) == 3.0
    half = median_of_means(x.astype(np.float16))
    assert half.dtype == jnp.float16
