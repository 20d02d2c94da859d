"""What the post-training of features refuses, in its own words, and NumPy inputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.sharpness.pof import (
    head_line_search,
    join_head,
    pof_perturb,
    pof_value_and_grad,
    split_head,
)

pytestmark = pytest.mark.untyped

KEY = jax.random.key(0)
HEAD = jnp.ones(2)
square = lambda h: jnp.sum(h**2)


def calls(options):
    yield "head_line_search", lambda: head_line_search(square, HEAD, HEAD, **options)
    yield "pof_value_and_grad", lambda: pof_value_and_grad(lambda f, h, b: 0, **options)
    yield "head_line_search", lambda: pof_perturb(KEY, square, HEAD, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"initial_step": 0}, "0 < initial_step <= max_step < inf, got initial_step=0"),
        ({"initial_step": 2, "max_step": 1.0}, "initial_step=2 and max_step=1.0"),
        ({"max_step": float("inf")}, "got initial_step=1.0 and max_step=inf"),
        ({"max_step": float("nan")}, "max_step=nan"),
        ({"growth": 1.0}, "growth must be > 1 and finite, got 1.0"),
        ({"growth": float("nan")}, "growth must be > 1 and finite, got nan"),
        ({"num_grid": 0}, "num_grid must be an integer >= 1, got 0"),
        ({"num_grid": 2.0}, "num_grid must be an integer >= 1, got 2.0"),
        ({"num_grid": True}, "num_grid must be an integer >= 1, got True"),
    ],
)
def test_search_options(options, message):
    for name, call in calls(options):
        with pytest.raises(ValueError, match=f"{name}: .*{message}"):
            call()


@pytest.mark.parametrize("sampling_range", [-1, float("inf"), float("nan")])
def test_ranges(sampling_range):
    message = f"sampling_range must be finite and >= 0, got {sampling_range}; 0 leaves"
    with pytest.raises(ValueError, match=f"pof_perturb: {message}"):
        pof_perturb(KEY, square, HEAD, sampling_range=sampling_range)
    with pytest.raises(ValueError, match=f"pof_value_and_grad: {message}"):
        pof_value_and_grad(lambda f, h, b: 0, sampling_range=sampling_range)


def test_keys_are_typed():
    with pytest.raises(ValueError, match=r"jax\.random\.key\(0\), got uint32"):
        pof_perturb(np.zeros(2, np.uint32), square, HEAD)


def test_trees_are_alike():
    message = r"head_line_search: direction must be a tree like head, .*\(2,\)"
    for direction in (jnp.ones(3), [HEAD], {"w": HEAD}, jnp.ones((2, 1))):
        with pytest.raises(ValueError, match=message):
            head_line_search(square, HEAD, direction)


def test_heads_are_floating_point():
    head = {"w": HEAD, "count": jnp.zeros((), jnp.int32)}
    with pytest.raises(
        ValueError, match=r"pof_perturb: .* got int32 at head\['count'\]; keep"
    ):
        pof_perturb(KEY, lambda h: square(h["w"]), head)
    with pytest.raises(ValueError, match="floating leaves, got int32 at direction;"):
        head_line_search(square, HEAD, jnp.ones(2, int))


def test_losses_are_scalars():
    with pytest.raises(ValueError, match=r"must be a scalar, got shape \(2,\)"):
        head_line_search(lambda h: h, HEAD, HEAD)
    message = r"must be a scalar, got tuple\. A pair .* has_aux=True"
    pair = lambda features, head, batch: (square(head), 1)
    with pytest.raises(ValueError, match=message):
        pof_value_and_grad(pair)(KEY, HEAD, HEAD, 0, 0)
    f = pof_value_and_grad(lambda f, h, b: square(h), has_aux=True)
    with pytest.raises(ValueError, match=r"must give \(value, aux\), got"):
        f(KEY, HEAD, HEAD, 0, 0)


@pytest.mark.parametrize(
    ("answer", "which"), [(True, "every leaf"), (False, "no leaf")]
)
def test_splits_have_two_sides(answer, which):
    message = rf"picked {which} of \['a', 'b/0'\]\. .*is_head=lambda path"
    with pytest.raises(ValueError, match=message):
        split_head({"a": HEAD, "b": [HEAD]}, lambda path: answer)


def test_joins_are_of_the_same_tree():
    features, head = split_head({"a": HEAD, "b": HEAD}, lambda path: path == "b")
    with pytest.raises(ValueError, match=r"no leaf in common, got 1 and 1 .* for 1 pl"):
        join_head(features | {"b": head["a"]}, head | {"a": HEAD, "b": head["a"]})
    with pytest.raises(ValueError, match="must be the two trees that split_head gave"):
        join_head(features, {"a": HEAD})


def test_numpy_and_python_inputs():
    ones = np.ones(2, np.float32)
    found = head_line_search(lambda h: (h**2).sum(), ones, 2 * ones, max_step=50)
    assert found.step == 0.5
    assert head_line_search(lambda h: h**2, 1.0, 2.0, initial_step=1).step == 0.5
    assert head_line_search(lambda h: 3.0, 1.0, 2.0).capped
    moved, info = pof_perturb(KEY, square, ones, sampling_range=np.float32(1))
    np.testing.assert_allclose(moved, 1 - 2 * info.scale * info.search.step * ones)
    f = pof_value_and_grad(lambda features, head, batch: jnp.sum(features * head))
    _, grads = f(KEY, ones, ones, None, None)
    assert grads.shape == (2,)
