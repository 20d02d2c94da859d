"""Switching layers in a run: the same function, the right part of the optimizer."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxlab.layers import MonarchLinear, densify, monarchize
from jaxlab.likelihoods import Categorical, Gaussian
from jaxlab.models import MLP
from jaxlab.training import (
    create_state,
    fit,
    from_nnx,
    make_train_step,
    reverse_sparsification,
    switch_layers,
)
from jaxlab.training.switching import _carry_over

MONARCH = functools.partial(MonarchLinear, nblocks=4)


def _data(rows=64):
    x = jax.random.normal(jax.random.key(0), (rows, 12))
    return x, jnp.argmax(x[:, :5] * jnp.arange(1.0, 6.0)[None], axis=1)


def _start(optimizer, linear=MONARCH):
    model = MLP((12, 16, 5), linear=linear, rngs=nnx.Rngs(0))
    objective, params, model_state = from_nnx(model, Categorical())
    key = jax.random.key(1)
    state = create_state(key, params, optimizer, model_state=model_state)
    return model, objective, state


def _optimizer():
    schedule = optax.linear_schedule(1e-2, 0.0, 100)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))


def test_the_function_stays_and_training_goes_on():
    optimizer, data = _optimizer(), _data()
    model, objective, state = _start(optimizer)
    step = make_train_step(objective, optimizer)
    for _ in range(5):
        state, _ = step(state, data)
    before = objective.loss(state.params, state.model_state, data)[0]
    new = switch_layers(
        model, state, densify, likelihood=Categorical(), optimizer=optimizer
    )
    after = new.objective.loss(new.state.params, new.state.model_state, data)[0]
    np.testing.assert_allclose(after, before, rtol=1e-5)
    assert int(new.state.step) == 5
    assert jnp.array_equal(
        jax.random.key_data(new.state.key), jax.random.key_data(state.key)
    )
    # Clipping has no state; Adam is new, the schedule goes on.
    adam, schedule = new.state.opt_state[1]
    assert int(adam.count) == 0
    assert optax.tree.norm(adam.mu) == 0
    assert int(schedule.count) == 5
    dense_step = make_train_step(new.objective, optimizer)
    there = new.state
    for _ in range(5):
        there, metrics = dense_step(there, data)
    assert metrics["loss"] < before
    # The old state is whole: nothing of it was given away.
    objective.loss(state.params, state.model_state, data)


def test_dense_to_sparse_is_the_projection():
    optimizer, data = optax.sgd(0.1, momentum=0.9), _data()
    model, _, state = _start(optimizer, linear=nnx.Linear)
    convert = functools.partial(monarchize, nblocks=4, rank=1)
    new = switch_layers(
        model, state, convert, likelihood=Categorical(), optimizer=optimizer
    )
    expected = convert(model)
    np.testing.assert_allclose(new.model(data[0]), expected(data[0]), atol=1e-6)


def test_links_without_the_lost_weights_go_on():
    optimizer = optax.partition(
        {"a": optax.adam(1e-2), "b": optax.adam(1e-2)},
        {"x": "a", "layer": "b"},
    )
    old_params = {"x": jnp.ones(3), "layer": {"w1": jnp.ones(2), "w2": jnp.ones(2)}}
    new_params = {"x": jnp.ones(3), "layer": {"kernel": jnp.ones(4)}}
    state = optimizer.init(old_params)
    _, state = optimizer.update(old_params, state, old_params)
    kept = _carry_over(state, optimizer.init(new_params))
    inner = {name: kept.inner_states[name].inner_state[0] for name in "ab"}
    assert int(inner["a"].count) == 1
    assert float(inner["a"].mu["x"][0]) == pytest.approx(0.1)
    assert int(inner["b"].count) == 0
    assert jax.tree.structure(kept) == jax.tree.structure(optimizer.init(new_params))


@pytest.mark.parametrize("wrap", ["multi_steps", "inject", "plain"])
def test_the_same_params_keep_everything(wrap):
    optimizer = {
        "multi_steps": optax.MultiSteps(optax.adam(1e-2), 2),
        "inject": optax.inject_hyperparams(optax.adam)(learning_rate=1e-2),
        "plain": optax.adam(1e-2),
    }[wrap]
    params = {"w": jnp.ones(3)}
    state = optimizer.init(params)
    _, state = optimizer.update(params, state, params)
    kept = _carry_over(state, optimizer.init(params))
    jax.tree.map(np.testing.assert_array_equal, kept, state)


def test_reverse_sparsification_is_its_parts():
    optimizer, data = _optimizer(), _data()
    model, objective, state = _start(optimizer)
    options = {"batch_size": 16, "progress": False}
    result = reverse_sparsification(
        model,
        state,
        data,
        likelihood=Categorical(),
        optimizer=optimizer,
        epochs=10,
        dense_fraction=0.3,
        **options,
    )
    assert len(result.sparse.epochs) == 7
    assert len(result.dense.epochs) == 3
    assert result.dense.history["step"].tolist() == list(range(29, 41))
    _, objective, state = _start(optimizer)
    first = fit(objective, optimizer, state, data, epochs=7, **options)
    switched = switch_layers(
        model, first.state, densify, likelihood=Categorical(), optimizer=optimizer
    )
    second = fit(
        switched.objective, optimizer, switched.state, data, epochs=10, **options
    )
    jax.tree.map(
        np.testing.assert_array_equal, result.dense.state.params, second.state.params
    )
    assert result.dense.epochs[-1]["loss"] < result.sparse.epochs[-1]["loss"]
    # The model that comes back computes what its state says.
    loss = Categorical().nll(result.model(data[0]), data[1])
    means = switched.objective.loss(second.state.params, second.state.model_state, data)
    np.testing.assert_allclose(loss, means[0], rtol=1e-6)
    kinds = [type(module) for _, module in nnx.iter_modules(result.model)]
    assert MonarchLinear not in kinds


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"epochs": 1}, "epochs must be an integer >= 2"),
        ({"epochs": 4, "dense_fraction": 1.0}, r"dense_fraction must be in \(0, 1\)"),
        ({"epochs": 4, "checkpoint_dir": "x"}, "belong to one part"),
    ],
)
def test_messages(options, said):
    model = MONARCH(4, 4, rngs=nnx.Rngs(0))
    params = from_nnx(model, Gaussian()).params
    state = create_state(jax.random.key(0), params, optax.sgd(0.1))
    with pytest.raises(ValueError, match=said):
        reverse_sparsification(
            model,
            state,
            (jnp.ones((2, 4)), jnp.ones((2, 4))),
            likelihood=Gaussian(),
            optimizer=optax.sgd(0.1),
            batch_size=2,
            **options,
        )
