"""What the loop says about arguments that do not fit."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlab.likelihoods import Gaussian
from jaxlab.objective import Objective, plain
from jaxlab.training import (
    accuracy,
    create_state,
    epoch_order,
    evaluate,
    fit,
    from_nnx,
    with_extra_args,
)

pytestmark = pytest.mark.untyped

DATA = (np.ones((10, 2), np.float32), np.ones((10, 1), np.float32))
OBJECTIVE = Objective(plain(lambda w, x: x @ w), Gaussian())
OPTIMIZER = optax.sgd(0.1)


def _state(seed=0):
    return create_state(jax.random.key(seed), jnp.zeros((2, 1)), OPTIMIZER)


def _fit(data=DATA, state=None, **options):
    options = {"epochs": 1, "progress": False} | options
    return fit(OBJECTIVE, OPTIMIZER, state or _state(), data, **options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "arrays need batch_size="),
        ({"batch_size": 0}, "batch_size must be an integer >= 1, got 0"),
        ({"batch_size": 4, "steps_per_epoch": 2}, "no steps_per_epoch=, got"),
        ({"batch_size": 4, "epochs": -1}, "epochs must be an integer >= 0, got -1"),
        (
            {"batch_size": 4, "steps_per_call": 0},
            "steps_per_call must be an .* or None",
        ),
        ({"batch_size": 4, "evaluate_every": 0}, "evaluate_every must be an integer"),
        (
            {"batch_size": 11, "drop_remainder": True},
            "10 rows give no batch of 11 with",
        ),
        ({"batch_size": 4, "data": (DATA[0], DATA[1][:9])}, "same number of rows"),
        ({"batch_size": 4, "data": (DATA[0][:0], DATA[1][:0])}, "0 rows give no batch"),
        ({"batch_size": 4, "data": DATA[0]}, "must be \\(inputs, targets\\)"),
        (
            {"batch_size": 4, "keep": 1, "checkpoint_dir": "x"},
            "keep must be an integer >= 2",
        ),
        ({"data": lambda e, s: DATA}, "needs steps_per_epoch="),
        (
            {"data": lambda e, s: DATA, "steps_per_epoch": 3, "steps_per_call": 2},
            "nor steps_per_call= above 1",
        ),
        ({"data": lambda e, s: DATA, "steps_per_epoch": 0}, "steps_per_epoch must be"),
        ({"batch_size": 5, "accumulate": 2}, "accumulate=2 must divide the batch"),
    ],
)
def test_arguments_that_do_not_fit(options, said):
    with pytest.raises(ValueError, match=said):
        _fit(**options)


def test_a_batch_that_the_mesh_does_not_divide():
    mesh = jax.make_mesh((8,), ("d",))
    with pytest.raises(ValueError, match="batch_size=12 cannot be cut evenly"):
        _fit(batch_size=12, data_sharding=NamedSharding(mesh, P("d")))


def test_a_sharded_state_needs_the_sharding_of_the_data():
    mesh = jax.make_mesh((8,), ("d",))
    state = jax.device_put(_state(), NamedSharding(mesh, P()))
    with pytest.raises(ValueError, match="batches need data_sharding="):
        _fit(state=state, batch_size=8)


def test_a_folder_with_another_run(tmp_path):
    _fit(batch_size=4, checkpoint_dir=tmp_path)
    with pytest.raises(ValueError, match=r"step 3 in .* a run with another base key"):
        _fit(state=_state(1), batch_size=4, checkpoint_dir=tmp_path)
    adam = optax.adam(0.1)
    other = create_state(jax.random.key(0), jnp.zeros((2, 1)), adam)
    with pytest.raises(ValueError, match="holds another tree"):
        fit(
            OBJECTIVE,
            adam,
            other,
            DATA,
            epochs=1,
            batch_size=4,
            checkpoint_dir=tmp_path,
        )


def test_no_epochs_change_nothing():
    result = _fit(batch_size=4, epochs=0)
    assert int(result.state.step) == 0
    assert result.epochs == []


def test_numpy_and_numbers_are_welcome():
    data = (DATA[0].astype(np.float64), DATA[1].tolist())
    data = (data[0], np.asarray(data[1]))
    result = _fit(data=data, batch_size=3)
    assert result.history["weight"].tolist() == [3.0, 3.0, 3.0, 1.0]
    found = evaluate(OBJECTIVE, np.zeros((2, 1), np.float32), (), data)
    assert found["loss"] > 0


def test_weights_that_are_all_zero_give_nan():
    data = (*DATA, np.zeros(10, np.float32))
    assert np.isnan(evaluate(OBJECTIVE, jnp.zeros((2, 1)), (), data)["loss"])


def test_a_state_that_is_none():
    with pytest.raises(
        ValueError, match=r"create_state\(key, params, optimizer\), got"
    ):
        _fit(state={"w": jnp.zeros((2, 1))}, batch_size=5)


def test_a_state_that_is_used_up():
    state = _state()
    _fit(state=state, batch_size=5)
    with pytest.raises(ValueError, match=r"go on with the state that came out"):
        _fit(state=state, batch_size=5)


def test_a_state_of_another_optimizer():
    state = create_state(jax.random.key(0), jnp.zeros((2, 1)), optax.adam(0.1))
    with pytest.raises(ValueError, match="does not come from this optimizer"):
        _fit(state=state, batch_size=5)


def test_a_key_of_the_old_kind():
    with pytest.raises(ValueError, match=r"typed key such as jax\.random\.key\(0\)"):
        create_state(jax.random.PRNGKey(0), jnp.zeros((2, 1)), OPTIMIZER)


@pytest.mark.parametrize("shape", [(1,), (5,), (2, 1)])
def test_targets_of_accuracy_are_not_broadcast(shape):
    with pytest.raises(ValueError, match=r"targets must have shape \(2,\) or, one-hot"):
        accuracy(jnp.ones((2, 3)), jnp.zeros(shape, jnp.int32))


def test_orders_of_negative_size():
    with pytest.raises(ValueError, match="size must be an integer >= 0, got -1"):
        epoch_order(jax.random.key(0), 0, size=-1)


def test_models_and_optimizers_that_are_none():
    with pytest.raises(ValueError, match=r"must be an nnx\.Module, got int"):
        from_nnx(3, Gaussian())
    with pytest.raises(ValueError, match="must have init and update"):
        with_extra_args(3)
