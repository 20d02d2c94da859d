"""What subspaces refuse, in their own words, and the NumPy inputs that they take."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.sharpness.batch_stats import recompute_batch_stats
from jaxlab.sharpness.subspaces import (
    bezier_coefficients,
    bezier_point,
    cosine_squared,
    line_coefficients,
    line_point,
    midpoint,
    sample_layerwise,
    sample_simplex,
    simplex_point,
    subspace_init,
    subspace_loss,
)

pytestmark = pytest.mark.untyped

KEY = jax.random.key(0)
HALF = np.array([0.5, 0.5])
STACKED = {"a": np.ones((2, 3, 4), np.float32), "b": np.ones((2, 4), np.float32)}
loss = lambda p: p["a"].sum()


@pytest.mark.parametrize("function", [line_coefficients, bezier_coefficients])
def test_positions_are_scalars(function):
    message = rf"{function.__name__}: position must be a scalar, got shape \(2,\).*vmap"
    with pytest.raises(ValueError, match=message):
        function(HALF)


def test_trees_are_alike():
    with pytest.raises(ValueError, match="line_point: end must be a tree like start"):
        line_point({"a": HALF}, {"b": HALF}, 0.5)
    with pytest.raises(ValueError, match=r"end must be .*\(2,\).* got .*\(3,\)"):
        line_point({"a": HALF}, {"a": np.ones(3)}, 0.5)
    with pytest.raises(ValueError, match="bezier_point: bend must be a tree like"):
        bezier_point(HALF, HALF, (HALF,), 0.5)
    with pytest.raises(ValueError, match="cosine_squared: second must be a tree like"):
        cosine_squared(np.ones((2, 3)), np.ones((3, 2)))


def test_leaves_are_floating():
    with pytest.raises(
        ValueError, match=r"line_point: start must have floating leaves, .*int32"
    ):
        line_point(np.arange(2, dtype=np.int32), np.arange(2, dtype=np.int32), 0.5)
    with pytest.raises(ValueError, match="simplex_point: endpoints must have floating"):
        simplex_point(np.ones((2, 3), np.int32), HALF)


@pytest.mark.parametrize("bad", [{}, {"a": 1.0}, {"a": HALF, "b": np.ones(3)}])
def test_endpoints_are_stacked(bad):
    message = "every leaf of endpoints must have one leading axis"
    calls = {
        "simplex_point": lambda: simplex_point(bad, HALF),
        "midpoint": lambda: midpoint(bad),
        "sample_layerwise": lambda: sample_layerwise(KEY, bad),
        "subspace_loss": lambda: subspace_loss(loss, bad, HALF),
    }
    for name, call in calls.items():
        with pytest.raises(ValueError, match=f"{name}: {message}"):
            call()


def test_coefficients_fit():
    with pytest.raises(ValueError, match=r"shape \(2,\), one for .* got shape \(3,\)"):
        simplex_point(STACKED, np.ones(3))
    with pytest.raises(ValueError, match=r"got shape \(\)"):
        simplex_point(STACKED, 0.5)
    with pytest.raises(
        ValueError, match="simplex_point: coefficients must be one valu"
    ):
        simplex_point(STACKED, {"a": HALF})


@pytest.mark.parametrize("count", [0, -1, 2.0, True])
def test_counts_are_positive_integers(count):
    message = f"must be an integer >= 1, got {count}"
    with pytest.raises(ValueError, match=f"sample_simplex: size {message}"):
        sample_simplex(KEY, count)
    with pytest.raises(ValueError, match=f"subspace_init: num_endpoints {message}"):
        subspace_init(KEY, lambda k: HALF, num_endpoints=count)


def test_masks_choose_leaves():
    a = {"a": np.ones((3, 4)), "b": np.ones(4)}
    with pytest.raises(ValueError, match="none has two axes; pass mask=True"):
        cosine_squared(np.ones(3), np.ones(3))
    with pytest.raises(ValueError, match="selects no leaf; at least one"):
        cosine_squared(a, a, mask={"a": False, "b": False})
    with pytest.raises(ValueError, match=r"Python booleans.*got \[1, 0\]"):
        cosine_squared(a, a, mask={"a": 1, "b": 0})
    with pytest.raises(ValueError, match="subspace_loss: mask must be one value or a"):
        subspace_loss(loss, STACKED, HALF, mask={"c": True})
    # One axis of an endpoint is two of the stack; that is no matrix.
    with pytest.raises(ValueError, match="subspace_loss: the mask selects no leaf"):
        subspace_loss(lambda p: p.sum(), np.ones((2, 4)), HALF)


def test_losses():
    with pytest.raises(ValueError, match="beta must be >= 0, got -1"):
        subspace_loss(loss, STACKED, HALF, beta=-1)
    with pytest.raises(ValueError, match=r"must give a scalar, got shape \(4,\)"):
        subspace_loss(lambda p: p["b"], STACKED, HALF)
    three = jax.tree.map(lambda w: np.concatenate([w, w[:1]]), STACKED)
    with pytest.raises(ValueError, match="3 endpoints need key= to draw the pair"):
        subspace_loss(loss, three, np.ones(3))
    subspace_loss(loss, three, np.ones(3), beta=0)


def layer(params, state, inputs, *, key, train):
    return inputs, 0.01 * inputs.mean(axis=0)


def test_batch_statistics():
    rows = [(np.ones((2, 3)), None)]
    state = np.zeros(3, np.float32)
    for momentum in (1, -0.1, 1.5):
        with pytest.raises(ValueError, match=rf"in \[0, 1\), got {momentum}"):
            recompute_batch_stats(layer, (), rows, state=state, momentum=momentum)
    with pytest.raises(ValueError, match="at least one batch, got none"):
        recompute_batch_stats(layer, (), iter(()), state=state)
    with pytest.raises(ValueError, match="A batch must be"):
        recompute_batch_stats(layer, (), [np.ones((2, 3))], state=state)
    with pytest.raises(ValueError, match="inputs must have a leading axis of rows"):
        recompute_batch_stats(layer, (), [(1.0, None)], state=state)
    with pytest.raises(ValueError, match=r"state like .* \[\(4,\)\], got .*\[\(3,\)\]"):
        recompute_batch_stats(layer, (), rows, state=np.zeros(4, np.float32))


def test_numpy_inputs():
    point = simplex_point(STACKED, HALF)
    assert isinstance(point["a"], jax.Array)
    assert point["a"].dtype == jnp.float32
    np.testing.assert_array_equal(point["b"], 1)
    a = {"a": np.ones((3, 4)), "b": np.ones(4)}
    np.testing.assert_array_equal(line_point(a, a, np.float64(0.5))["a"], 1)
    assert float(cosine_squared(a, a)) == pytest.approx(1)
    mask = {"a": np.bool_(True), "b": False}
    assert float(subspace_loss(loss, STACKED, HALF, mask=mask)) == pytest.approx(13)
    assert sample_layerwise(KEY, STACKED)["a"].shape == (2,)
    assert sample_simplex(KEY, np.int64(2)).shape == (2,)
    rows = [(np.full((2, 3), 5.0, np.float32), None, np.ones(2))]
    state = np.zeros(3, np.float32)
    found = recompute_batch_stats(layer, (), rows, state=state)
    np.testing.assert_allclose(found, 5, rtol=1e-6)
