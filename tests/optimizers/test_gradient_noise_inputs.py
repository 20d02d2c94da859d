"""What the gradient noise refuses, and what NumPy may pass to it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlab.optimizers.gradient_noise import (
    add_gradient_noise,
    annealed_gradient_noise,
    gradient_noise_schedule,
)

pytestmark = pytest.mark.untyped

KEY = jax.random.key(0)


@pytest.mark.parametrize("number", [-1, -0.1, float("nan"), float("inf")])
@pytest.mark.parametrize("word", ["eta", "gamma"])
@pytest.mark.parametrize("make", [gradient_noise_schedule, annealed_gradient_noise])
def test_numbers_are_not_negative(make, word, number):
    message = rf"{make.__name__}: {word} must be finite and >= 0, got {number}"
    with pytest.raises(ValueError, match=message):
        make(**{word: number})
    with pytest.raises(ValueError, match=r"variance must be finite and >= 0"):
        add_gradient_noise(KEY, jnp.ones(2), variance=number)


def test_a_key_is_needed():
    tx = annealed_gradient_noise()
    message = r"needs key=: call update\(\.\.\., key=key\) .* or give the link one"
    with pytest.raises(ValueError, match=message):
        tx.update(jnp.ones(2), tx.init(jnp.ones(2)))


@pytest.mark.parametrize(
    ("key", "got"),
    [
        (3, "int"),
        (jnp.zeros(2, jnp.uint32), r"uint32\[2\]"),
        (jax.random.split(KEY, 2), r"key<fry>\[2\]"),
    ],
    ids=["seed", "legacy", "two"],
)
def test_keys_are_single_and_typed(key, got):
    message = rf"key must be one typed key such as jax\.random\.key\(0\), got {got}"
    tx = annealed_gradient_noise()
    with pytest.raises(ValueError, match=message):
        tx.update(jnp.ones(2), tx.init(jnp.ones(2)), key=key)
    with pytest.raises(ValueError, match=message):
        annealed_gradient_noise(key=key)
    with pytest.raises(ValueError, match=message):
        add_gradient_noise(key, jnp.ones(2), variance=1.0)


@pytest.mark.parametrize(
    ("leaf", "kind"),
    [(jnp.arange(2), "int32"), (jnp.ones(2, complex), "complex64"), (True, "bool")],
    ids=["int", "complex", "bool"],
)
def test_leaves_are_floating(leaf, kind):
    tree = {"w": jnp.ones(2), "n": leaf}
    tx = annealed_gradient_noise()
    message = rf"real floating-point arrays, got {kind} at {{}}\['n'\]"
    with pytest.raises(ValueError, match=message.format("params")):
        tx.init(tree)
    with pytest.raises(ValueError, match=message.format("updates")):
        tx.update(tree, tx.init({"w": jnp.ones(2)}), key=KEY)
    with pytest.raises(ValueError, match=message.format("grads")):
        add_gradient_noise(KEY, tree, variance=1.0)
    masked = annealed_gradient_noise(mask={"w": True, "n": False})
    got, _ = masked.update(tree, masked.init(tree), key=KEY)
    np.testing.assert_array_equal(got["n"], leaf)


def test_empty_trees():
    tx = annealed_gradient_noise(key=KEY)
    with pytest.raises(ValueError, match="annealed_gradient_noise: params has no"):
        tx.init({})
    with pytest.raises(ValueError, match="add_gradient_noise: grads has no entries"):
        add_gradient_noise(KEY, {"a": None}, variance=1.0)


def test_masks_of_another_structure():
    tx = annealed_gradient_noise(mask={"v": True})
    with pytest.raises(ValueError, match="pytree structure error"):
        tx.init({"w": jnp.ones(2)})


def test_numpy_arrays_and_python_numbers_are_welcome():
    tree = {"w": np.ones((2, 3), np.float32), "b": 1.0, "s": np.float32(2)}
    got = add_gradient_noise(KEY, tree, variance=np.float64(0.5))
    want = add_gradient_noise(KEY, jax.tree.map(jnp.asarray, tree), variance=0.5)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), got, want))
    tx = optax.chain(annealed_gradient_noise(np.float32(1), np.int64(1)), optax.sgd(1))
    updates, _ = tx.update(tree, tx.init(tree), key=KEY)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(updates))
    assert float(gradient_noise_schedule(1, 1)(np.int64(3))) == 0.25
