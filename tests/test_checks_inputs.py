"""The shared checks of inputs: what passes, what does not, and what is said."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

from jaxlab import sharpness
from jaxlab._array_checks import check_arrays, check_fields, check_floating
from jaxlab._checks import (
    are_sizes,
    check_count,
    check_flag,
    check_made,
    check_number,
    check_sequence,
)
from jaxlab.sharpness import LoRAPair

pytestmark = pytest.mark.untyped

NUMBERS = (2, 0.5, np.float32(0.5), np.array(0.5), jnp.array(0.5), jnp.int32(2))
NONE = (None, "text", True, 1j, jnp.ones(1), np.ones(2), jnp.array(True), Ellipsis)


@pytest.mark.parametrize("number", [*NUMBERS, ml_dtypes.bfloat16(0.5)], ids=repr)
def test_single_real_numbers_pass(number):
    check_number("f", "finite and > 0", a=number)


@pytest.mark.parametrize("number", NONE, ids=str)
def test_what_is_no_single_real_number(number):
    with pytest.raises(
        ValueError, match="f: a must be a single real number, finite and > 0, got"
    ):
        check_number("f", "finite and > 0", a=number)


@pytest.mark.parametrize("number", [0, -1.0, np.nan, np.inf, np.float32("nan")])
def test_values_out_of_range(number):
    with pytest.raises(
        ValueError, match=f"f: a must be finite and > 0, got {number}; so"
    ):
        check_number("f", "finite and > 0", hint="; so", a=number)


def test_numbers_under_a_trace():
    """A tracer has no value, but it has a shape."""

    def scaled(a):
        check_number("f", "finite and > 0", a=a)
        return a

    assert jax.jit(scaled)(-1.0) == -1
    assert jax.vmap(scaled)(jnp.ones(3)).shape == (3,)
    with pytest.raises(
        ValueError, match=r"float32\[2\]; map over several with jax.vmap"
    ):
        jax.jit(scaled)(jnp.ones(2))


def test_none_and_schedules_where_they_are_allowed():
    check_number("f", "finite and > 0", optional=True, a=None)
    check_number("f", "finite and > 0", schedule=True, a=optax.constant_schedule(1.0))
    with pytest.raises(
        ValueError, match="a single real number or a schedule, finite and > 0, got"
    ):
        check_number("f", "finite and > 0", schedule=True, a="text")
    with pytest.raises(
        ValueError, match="a single real number or None, finite and > 0, got"
    ):
        check_number("f", "finite and > 0", optional=True, a="text")


@pytest.mark.parametrize("count", [0, -1, 2.0, True, None, "3", np.nan, np.ones(2)])
def test_counts(count):
    check_count("f", k=1, m=np.int64(3))
    check_count("f", least=0, k=0)
    check_count("f", optional=True, k=None)
    with pytest.raises(ValueError, match="f: k must be an integer >= 1, got"):
        check_count("f", k=count)
    assert not are_sizes((1, count))


def test_a_count_of_inject_hyperparams_is_named():
    with pytest.raises(ValueError, match=r"every must be .* name it in static_args="):
        optax.inject_hyperparams(sharpness.look_sam)(0.1, every=2).init(jnp.ones(2))


@pytest.mark.parametrize("radius", [None, "text", 1j, jnp.ones(2)], ids=str)
def test_an_option_of_a_link(radius):
    with pytest.raises(
        ValueError, match="sam: rho must be a single real number or a s"
    ):
        sharpness.sam(radius)


def test_flags_and_sequences():
    check_flag("f", on=True, off=np.bool_(False))
    with pytest.raises(ValueError, match="f: on must be True or False, got None"):
        check_flag("f", on=None)
    check_sequence("f", "ks", (1, 2), "integers")
    for wrong in (3, None, "text"):
        with pytest.raises(
            ValueError, match="f: ks must be a sequence of integers, got"
        ):
            check_sequence("f", "ks", wrong, "integers")


def test_leaves():
    check_arrays("f", "tree", {"a": jnp.ones(2), "b": None})
    with pytest.raises(ValueError, match=r"got 'text' at tree\['a'\]"):
        check_arrays("f", "tree", {"a": "text"})
    check_floating("f", "tree", {"a": jnp.ones(2), "b": 1.0})
    with pytest.raises(ValueError, match=r"floating leaves, got int32 at tree\['a'\]"):
        check_floating("f", "tree", {"a": jnp.arange(2)})


def test_fields_by_letters():
    fields = {"a": "*stack n k", "b": "*stack k m"}
    made = LoRAPair, "lora_init"
    pair = LoRAPair(np.ones((5, 3, 1)), np.ones((5, 1, 2)))
    found = check_fields("f", "pair", pair, *made, **fields)
    assert isinstance(found.a, jax.Array)
    assert found.b.shape == (5, 1, 2)
    for wrong in (np.ones((1, 2)), np.ones((5, 2, 1)), np.ones(()), np.ones((4, 1, 2))):
        with pytest.raises(ValueError, match=r"one size for each letter, got .* makes"):
            check_fields("f", "pair", pair._replace(b=wrong), *made, **fields)
    with pytest.raises(ValueError, match="pair must be the LoRAPair that lora_init"):
        check_made("f", "pair", (1, 2), *made)
