"""What fit and the links say to somebody who comes from Flax."""

import logging

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training import train_state

from jaxlab import sharpness
from jaxlab.likelihoods import Gaussian
from jaxlab.objective import Objective, plain
from jaxlab.training import create_state, fit

pytestmark = pytest.mark.untyped
DATA = (np.ones((10, 2), np.float32), np.ones((10, 1), np.float32))
OPTIMIZER = optax.sgd(0.1)


@pytest.mark.parametrize(
    ("objective", "said"),
    [
        (flax.linen.Dense(1), r"must be an Objective.*got Dense"),
        (Objective(lambda w, x: x @ w, Gaussian()), r"got \(w, x\); write Objective"),
        (Objective(plain(lambda w, x: x @ w), Gaussian), "the class Gaussian"),
    ],
)
def test_objectives(objective, said):
    state = create_state(jax.random.key(0), jnp.zeros((2, 1)), OPTIMIZER)
    with pytest.raises(ValueError, match=said):
        fit(objective, OPTIMIZER, state, DATA, epochs=1, batch_size=5)


def test_a_train_state_of_flax_is_told_apart():
    state = train_state.TrainState.create(
        apply_fn=None, params=jnp.zeros((2, 1)), tx=OPTIMIZER
    )
    objective = Objective(plain(lambda w, x: x @ w), Gaussian())
    with pytest.raises(ValueError, match=r"got flax\.training\.train_state\."):
        fit(objective, OPTIMIZER, state, DATA, epochs=1, batch_size=5)


def test_keywords_that_flax_drops():
    link = sharpness.gradient_norm_penalty(0.8, 0.2)
    params = {"w": jnp.ones(3)}
    state = train_state.TrainState.create(apply_fn=None, params=params, tx=link)
    with pytest.raises(ValueError, match="apply_gradients of Flax's TrainState"):
        state.apply_gradients(
            grads=state.params, grad=state.params, grad_fn=lambda p: p
        )


def test_a_resumed_run_says_so(tmp_path, caplog):
    objective = Objective(plain(lambda w, x: x @ w), Gaussian())
    new = lambda: create_state(jax.random.key(0), jnp.zeros((2, 1)), OPTIMIZER)
    options = {"batch_size": 5, "checkpoint_dir": tmp_path / "run", "progress": False}
    fit(objective, OPTIMIZER, new(), DATA, epochs=1, **options)
    with caplog.at_level(logging.INFO, logger="jaxlab"):
        fit(objective, OPTIMIZER, new(), DATA, epochs=2, **options)
    assert any("Restored step 2 from" in line for line in caplog.messages)
