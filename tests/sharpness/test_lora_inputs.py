"""What the adapters refuse, in their own words, and NumPy inputs."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlab.sharpness.lora import (
    LoRAPair,
    lora_apply,
    lora_balance,
    lora_init,
    lora_merge,
    project_conflicting,
    regularised_lora_value_and_grad,
)

pytestmark = pytest.mark.untyped

KEY = jax.random.key(0)
PARAMS = {"b": jnp.ones(3), "w": jnp.ones((4, 3))}
PAIR = LoRAPair(jnp.ones((4, 2)), jnp.ones((2, 3)))
ADAPTERS = {"b": optax.MaskedNode(), "w": PAIR}


@pytest.mark.parametrize("rank", [0, -1, 2.0, True])
def test_ranks_are_positive_integers(rank):
    message = f"lora_init: rank must be an integer >= 1, got {rank}"
    with pytest.raises(ValueError, match=message):
        lora_init(KEY, PARAMS, rank=rank)


def test_ranks_fit_every_matrix():
    lora_init(KEY, PARAMS, rank=3)
    message = r"rank must be at most 3 for the leaf of shape \(4, 3\) at 'w', got 4"
    with pytest.raises(ValueError, match=message):
        lora_init(KEY, PARAMS, rank=4)


def test_something_is_selected():
    with pytest.raises(ValueError, match=r"no leaf .*since none has two axes"):
        lora_init(KEY, {"b": jnp.ones(3), "c": jnp.ones((2, 3, 4))}, rank=1)
    message = r"where= gave False for every path of \['b', 'w'\]"
    with pytest.raises(ValueError, match=message):
        lora_init(KEY, PARAMS, rank=1, where=lambda path: False)
    with pytest.raises(ValueError, match="no leaf of params is selected"):
        lora_init(KEY, {}, rank=1)


def test_only_floating_matrices_are_adapted():
    message = r"of shape \(\.\.\., in, out\), got float32 of shape \(3,\) at 'b'"
    with pytest.raises(ValueError, match=message):
        lora_init(KEY, PARAMS, rank=1, where=lambda path: True)
    with pytest.raises(ValueError, match=r"must be floating, .* got int32"):
        lora_init(KEY, jnp.ones((4, 3), jnp.int32), rank=1)


@pytest.mark.parametrize(
    "pair",
    [
        LoRAPair(PAIR.b.T, PAIR.a.T),
        LoRAPair(PAIR.a, jnp.ones((3, 3))),
        LoRAPair(jnp.ones((4, 0)), jnp.ones((0, 3))),
        LoRAPair(jnp.ones(4), jnp.ones(3)),
        LoRAPair(jnp.ones((2, 4, 2)), jnp.ones((2, 2, 3))),
    ],
)
def test_pairs_fit_their_matrix(pair):
    message = r"must be a \(\.\.\., in, rank\) and b .* for w \(4, 3\)"
    with pytest.raises(ValueError, match="lora_merge: .*" + message):
        lora_merge(PARAMS, {"b": optax.MaskedNode(), "w": pair})
    with pytest.raises(ValueError, match="lora_apply: .*" + message):
        lora_apply(jnp.ones(4), PARAMS["w"], pair)
    f = regularised_lora_value_and_grad(lambda p: jnp.sum(p["w"]))
    with pytest.raises(ValueError, match=r"regularised_lora_value_and_grad: .*b .*for"):
        f({"b": optax.MaskedNode(), "w": pair}, PARAMS)


def test_rows_fit_the_matrix():
    message = r"x must be of shape \(\.\.\., 4\) .*\(4, 3\), got \(2, 3\)"
    with pytest.raises(ValueError, match=message):
        lora_apply(jnp.ones((2, 3)), PARAMS["w"], PAIR)
    with pytest.raises(ValueError, match=r"got \(\)"):
        lora_apply(1.0, PARAMS["w"], PAIR)


def test_adapters_fit_the_params():
    with pytest.raises(ValueError, match="lora_merge: adapters must hold LoRAPair or"):
        lora_merge(PARAMS, PARAMS)
    with pytest.raises(ValueError, match="must be made by lora_init for these params"):
        lora_merge({"w": PARAMS["w"]}, ADAPTERS)
    with pytest.raises(ValueError, match=r"lora_balance: .* at least one LoRAPair"):
        lora_balance(PARAMS)


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_scales_are_finite(scale):
    for call in (
        lambda: lora_merge(PARAMS, ADAPTERS, scale=scale),
        lambda: lora_apply(jnp.ones(4), PARAMS["w"], PAIR, scale=scale),
        lambda: regularised_lora_value_and_grad(jnp.sum, scale=scale),
    ):
        with pytest.raises(ValueError, match=f"scale must be finite, got {scale}"):
            call()


def test_options_of_the_regularised_gradient():
    f = regularised_lora_value_and_grad
    with pytest.raises(ValueError, match="argnums is not an option"):
        f(jnp.sum, argnums=1)
    with pytest.raises(ValueError, match=r"unknown options \['rho'\]"):
        f(jnp.sum, rho=1)
    with pytest.raises(ValueError, match="radius must be finite"):
        f(jnp.sum, radius=-1.0)
    with pytest.raises(ValueError, match="alpha must be finite"):
        f(jnp.sum, alpha=float("nan"))


def test_references_are_like_the_gradient():
    for other in (jnp.ones(3), {"b": jnp.ones(3), "w": jnp.ones((3, 4))}):
        message = "project_conflicting: reference_grads must be a tree like grads"
        with pytest.raises(ValueError, match=message):
            project_conflicting(PARAMS, other)


def test_numpy_inputs():
    params = {"b": np.ones(3, np.float32), "w": np.ones((4, 3), np.float32)}
    fresh = lora_init(KEY, params, rank=2)
    np.testing.assert_array_equal(lora_merge(params, fresh)["w"], params["w"])
    pair = LoRAPair(np.ones((4, 2), np.float32), np.ones((2, 3), np.float32))
    merged = lora_merge(params, {"b": optax.MaskedNode(), "w": pair})
    np.testing.assert_array_equal(merged["w"], np.full((4, 3), 3.0))
    x = np.ones((2, 4), np.float32)
    np.testing.assert_array_equal(lora_apply(x, params["w"], pair), np.full((2, 3), 12))
    np.testing.assert_allclose(lora_balance(pair).b, np.full((2, 3), (4 / 3) ** 0.25))
    found = project_conflicting(np.array([1.0, 2.0]), np.array([-1.0, 0.0]))
    np.testing.assert_array_equal(found, [0, 2])
