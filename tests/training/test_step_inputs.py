"""What the step says of wrong options and wrong batches."""

import jax
import jax.numpy as jnp
import optax
import pytest

from jaxlab.likelihoods import Gaussian
from jaxlab.objective import Objective, plain
from jaxlab.training import create_state, make_train_step

pytestmark = pytest.mark.untyped

OBJECTIVE = Objective(plain(lambda w, x: x @ w), Gaussian())
TX = optax.sgd(0.1)
BATCH = (jnp.ones((3, 2)), jnp.ones((3, 1)))


def _state():
    return create_state(jax.random.key(0), jnp.ones((2, 1)), TX)


@pytest.mark.parametrize("optimizer", [None, (TX, TX), optax.sgd, "adam"])
def test_create_state_needs_an_init(optimizer):
    with pytest.raises(ValueError, match="optimizer must have an init, as optax"):
        create_state(jax.random.key(0), jnp.ones(2), optimizer)


@pytest.mark.parametrize("accumulate", [0, -1, 1.5, "2"])
def test_accumulate(accumulate):
    with pytest.raises(ValueError, match="accumulate must be an integer >= 1"):
        make_train_step(OBJECTIVE, TX, accumulate=accumulate)


def test_accumulate_must_divide():
    step = make_train_step(OBJECTIVE, TX, accumulate=2)
    with pytest.raises(ValueError, match="accumulate=2 must divide the batch, got 3"):
        step(_state(), BATCH)


@pytest.mark.parametrize("scale", [0.0, -1, "static"])
def test_loss_scale(scale):
    with pytest.raises(ValueError, match="loss_scale must be None, a number > 0"):
        make_train_step(OBJECTIVE, TX, loss_scale=scale)


def test_dynamic_scale_needs_its_state():
    step = make_train_step(OBJECTIVE, TX, loss_scale="dynamic")
    with pytest.raises(ValueError, match=r"create_state\(\.\.\., loss_scale=2.0\*\*15"):
        step(_state(), BATCH)


def test_batches():
    with pytest.raises(ValueError, match=r"\(inputs, targets\) or"):
        make_train_step(OBJECTIVE, TX)(_state(), (BATCH[0],))


def test_shapes_that_do_not_match():
    with pytest.raises(ValueError, match="outputs' shape"):
        make_train_step(OBJECTIVE, TX)(_state(), (BATCH[0], jnp.ones((3, 2))))


def test_empty_batches_and_nan_give_a_result():
    empty = (jnp.ones((0, 2)), jnp.ones((0, 1)))
    state, metrics = make_train_step(OBJECTIVE, TX)(_state(), empty)
    assert metrics["loss"] == 0
    assert state.params.tolist() == [[1.0], [1.0]]
    _, metrics = make_train_step(OBJECTIVE, TX)(
        _state(), (BATCH[0] * jnp.nan, BATCH[1])
    )
    assert jnp.isnan(metrics["loss"])
