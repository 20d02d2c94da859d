"""The loop equals a loop written by hand, whatever its options; then what it tells."""

import io
import json
import os
import pathlib
import runpy
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxlab.likelihoods import Categorical, Gaussian
from jaxlab.objective import Objective, plain
from jaxlab.training import (
    TrainState,
    accuracy,
    create_state,
    epoch_order,
    evaluate,
    fit,
    from_nnx,
    make_train_step,
)
from jaxlab.training.feed import resident
from jaxlab.training.loops import Calls, loops_slowly

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "training.md"
PROBLEM = runpy.run_path(str(pathlib.Path(__file__).parent / "workers" / "problem.py"))
BATCH, ROWS = PROBLEM["BATCH"], PROBLEM["ROWS"]
STEPS = -(-ROWS // BATCH)


def _problem():
    return PROBLEM["make"]()


def _fit(epochs=2, **options):
    objective, optimizer, state, data = _problem()
    options = {"batch_size": BATCH, "progress": False} | options
    return fit(objective, optimizer, state, data, epochs=epochs, **options)


def _leaves(tree):
    return PROBLEM["leaves"](tree)


def _same(one, two):
    one, two = _leaves(one), _leaves(two)
    assert one.keys() == two.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], two[name], err_msg=name)


def _close(one, two, **tolerance):
    one, two = _leaves(one), _leaves(two)
    for name in one:
        np.testing.assert_allclose(one[name], two[name], **tolerance, err_msg=name)


@pytest.fixture(scope="module")
def by_hand():
    """Two epochs of batches cut by NumPy, the last of each with fewer rows."""
    objective, optimizer, state, (x, y) = _problem()
    step = make_train_step(objective, optimizer)
    losses, norms, rows = [], [], []
    for epoch in range(2):
        order = np.asarray(epoch_order(state.key, epoch, size=ROWS))
        for start in range(0, ROWS, BATCH):
            pick = order[start : start + BATCH]
            # Dropout draws by the shape of the batch, so the shape must agree.
            short = BATCH - len(pick)
            weights = np.float32([1] * len(pick) + [0] * short)
            pick = np.concatenate([pick, order[:short]])
            state, metrics = step(state, (x[pick], y[pick], weights))
            losses.append(float(metrics["loss"]))
            norms.append(float(metrics["grad_norm"]))
            rows.append(weights.sum())
    return state, losses, norms, rows


@pytest.mark.parametrize("steps_per_call", [None, 1, 4, 1000])
def test_is_the_loop_written_by_hand(by_hand, steps_per_call):
    state, losses, norms, rows = by_hand
    result = _fit(steps_per_call=steps_per_call)
    _close(result.state, state, rtol=1e-5, atol=2e-6)
    assert int(result.state.step) == 2 * STEPS
    np.testing.assert_allclose(result.history["loss"], losses, rtol=1e-5)
    np.testing.assert_allclose(result.history["grad_norm"], norms, rtol=1e-4)
    np.testing.assert_array_equal(result.history["weight"], rows)
    np.testing.assert_array_equal(result.history["step"], 1 + np.arange(2 * STEPS))
    mean = np.average(losses[STEPS:], weights=rows[STEPS:])
    np.testing.assert_allclose(result.epochs[1]["loss"], mean, rtol=1e-5)


def test_a_function_of_epoch_and_step_feeds_as_arrays_do(by_hand):
    objective, optimizer, state, (x, y) = _problem()
    asked = []

    def batch(epoch, step):
        asked.append((epoch, step))
        order = np.asarray(epoch_order(jax.random.key(0), epoch, size=ROWS))
        at = step * BATCH + np.arange(BATCH)
        pick = order[at % ROWS]
        return x[pick], y[pick], np.float32(at < ROWS)

    result = fit(
        objective,
        optimizer,
        state,
        batch,
        epochs=2,
        steps_per_epoch=STEPS,
        progress=False,
    )
    _close(result.state, by_hand[0], rtol=1e-5, atol=2e-6)
    assert asked == [(e, s) for e in range(2) for s in range(STEPS)]


@pytest.mark.parametrize(
    ("rows", "size", "weighted"),
    [(10, 4, False), (10, 4, True), (8, 4, False), (3, 7, 0)],
)
def test_every_row_counts_once_an_epoch(rows, size, weighted):
    weights = (np.linspace(1, 2, rows).astype(np.float32),) if weighted else ()
    feed = resident((np.arange(rows), np.arange(rows), *weights), batch_size=size)
    order = feed.order(jax.random.key(3), 5)
    seen, shapes = {}, set()
    for step in range(feed.steps_per_epoch):
        x, y, *w = feed.batch(order, step)
        w = w[0] if w else np.ones(size, np.float32)
        np.testing.assert_array_equal(x, y)
        shapes.add((x.shape, w.shape))
        for row, weight in zip(x.tolist(), w.tolist(), strict=True):
            if weight:
                assert row not in seen
                seen[row] = weight
    assert shapes == {((size,), (size,))}
    expected = weights[0] if weighted else np.ones(rows)
    np.testing.assert_allclose([seen[row] for row in range(rows)], expected)


def test_orders_are_permutations_and_differ():
    key = jax.random.key(0)
    orders = np.array([epoch_order(key, epoch, size=50) for epoch in range(20)])
    np.testing.assert_array_equal(np.sort(orders), np.tile(np.arange(50), (20, 1)))
    assert len({tuple(order) for order in orders.tolist()}) == 20
    # Uniform: each row stands at each place about as often.
    many = jax.vmap(lambda e: epoch_order(key, e, size=4))(jnp.arange(4000))
    counts = np.array([np.bincount(many[:, place]) for place in range(4)])
    assert np.abs(counts - 1000).max() < 5 * np.sqrt(1000 * 0.75)
    jitted = jax.jit(lambda e: epoch_order(key, e, size=50))
    np.testing.assert_array_equal(jitted(7), orders[7])


def test_drop_remainder_leaves_out_the_rest():
    result = _fit(drop_remainder=True)
    assert int(result.state.step) == 2 * (ROWS // BATCH)
    assert set(result.history["weight"].tolist()) == {BATCH}


def _counting(likelihood=None):
    """Gives an objective, its data and a list that grows when the model is traced."""
    traces = []

    def apply_fn(params, x):
        traces.append(x.shape)
        return x @ params

    objective = Objective(plain(apply_fn), likelihood or Gaussian())
    data = (np.ones((10, 2), np.float32), np.ones((10, 1), np.float32))
    return objective, data, traces


@pytest.mark.parametrize("steps_per_call", [None, 1, 2])
def test_traces_the_step_once(steps_per_call):
    objective, data, traces = _counting()
    optimizer = optax.adam(1e-2)
    state = create_state(jax.random.key(0), jnp.zeros((2, 1)), optimizer)
    options = {"batch_size": 4, "steps_per_call": steps_per_call, "progress": False}
    fit(objective, optimizer, state, data, epochs=3, **options)
    assert len(traces) == 1  # 3 steps an epoch, by 2, the last with 2 rows of 4


def test_validation_traces_the_model_once_more():
    objective, data, traces = _counting()
    optimizer = optax.sgd(1e-2)
    state = create_state(jax.random.key(0), jnp.zeros((2, 1)), optimizer)
    options = {"batch_size": 4, "validation": data, "progress": False}
    result = fit(objective, optimizer, state, data, epochs=4, **options)
    assert len(traces) == 2
    assert all("validation_loss" in epoch for epoch in result.epochs)


def _conv(params, x):
    out = jax.lax.conv_general_dilated(x, params, (1, 1), "SAME")
    return out.mean(axis=(2, 3))


def test_convolutions_on_the_cpu_are_driven_from_the_host():
    kernel, x = jnp.ones((2, 1, 3, 3)), jnp.ones((6, 1, 4, 4))
    inside = lambda k: jax.lax.cond(
        True, jax.grad(lambda k: jax.jit(_conv)(k, x).sum()), lambda k: k, k
    )
    assert loops_slowly(inside, kernel)
    assert not loops_slowly(jnp.dot, jnp.ones(3), jnp.ones(3))
    optimizer = optax.sgd(0.1)
    objective = Objective(plain(_conv), Categorical())
    step = make_train_step(objective, optimizer, jit=False)
    feed = resident((x, jnp.zeros(6, jnp.int32)), batch_size=2)
    sizes, states = [], []
    for size in (None, 3):
        state = create_state(jax.random.key(0), kernel, optimizer)
        calls = Calls(step, feed, state, size=size)
        list(calls.run(0, 6, catch_up=lambda epoch: False))
        sizes.append(calls.size)
        states.append(calls.state)
    assert sizes == [1, 3]
    _close(*states, rtol=1e-6)
    dense, data, _ = _counting()
    step = make_train_step(dense, optimizer, jit=False)
    state = create_state(jax.random.key(0), jnp.zeros((2, 1)), optimizer)
    assert Calls(step, resident(data, batch_size=4), state).size == 3


def test_goes_on_from_a_checkpoint_bit_for_bit(tmp_path):
    options = {"checkpoint_dir": tmp_path / "c", "metrics_path": tmp_path / "m.jsonl"}
    straight = _fit(epochs=4)
    _fit(epochs=2, **options)
    with open(options["metrics_path"], "a") as file:  # a line that a kill tore
        file.write('{"step": 30, "epoch": 4, "lo')
    second = _fit(epochs=4, **options)
    _same(second.state, straight.state)
    np.testing.assert_array_equal(second.history["step"], 2 * STEPS + 1 + np.arange(18))
    np.testing.assert_array_equal(second.history["loss"], straight.history["loss"][18:])
    lines = [json.loads(x) for x in (tmp_path / "m.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2, 3, 4]
    for line, epoch in zip(lines, straight.epochs, strict=True):
        assert line["loss"] == epoch["loss"]
        assert line.keys() == epoch.keys()
    third = _fit(epochs=4, **options)
    _same(third.state, straight.state)
    assert third.epochs == []
    assert third.history["loss"].shape == (0,)


def test_a_state_in_the_middle_of_an_epoch_goes_on_there():
    objective, optimizer, state, data = _problem()
    step = make_train_step(objective, optimizer, jit=False)
    feed = resident(data, batch_size=BATCH)
    calls = Calls(step, feed, state, size=4)
    list(calls.run(0, 5, catch_up=lambda epoch: False))
    assert int(calls.state.step) == 5
    result = fit(
        objective,
        optimizer,
        calls.state,
        data,
        epochs=2,
        batch_size=BATCH,
        progress=False,
    )
    _close(result.state, _fit().state, rtol=1e-5, atol=2e-6)


def test_checkpoints_come_when_they_are_due(tmp_path):
    _fit(epochs=5, checkpoint_dir=tmp_path, checkpoint_every=2, keep=3)
    steps = sorted(int(folder.name) for folder in tmp_path.iterdir())
    assert steps == [2 * STEPS, 4 * STEPS, 5 * STEPS]


@pytest.mark.parametrize("steps_per_call", [1, 4, None])
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, steps_per_call):
    # A step of size 3 on w^2/2 doubles w: its square passes 3e38 at step 9.
    objective = Objective(plain(lambda w, x: x * w), Gaussian())
    optimizer = optax.sgd(3.0)
    state = create_state(jax.random.key(0), jnp.full((1, 1), 2e17), optimizer)
    data = (np.ones((40, 1), np.float32), np.zeros((40, 1), np.float32))
    ran = []
    with pytest.raises(
        FloatingPointError, match=r"inf at step 9 \(step 4 of epoch 2\)"
    ):
        fit(
            objective,
            optimizer,
            state,
            data,
            epochs=9,
            batch_size=8,
            steps_per_call=steps_per_call,
            checkpoint_dir=tmp_path,
            callbacks=[lambda info: ran.append(info.step)],
            progress=False,
        )
    assert ran == [5]
    assert [folder.name for folder in tmp_path.iterdir()] == ["5"]


def test_callbacks_see_the_state_and_may_stop(tmp_path):
    seen = []

    def callback(info):
        assert isinstance(info.state, TrainState)
        assert int(info.state.step) == info.step == info.epoch * STEPS
        assert info.metrics["validation_accuracy"] >= 0
        seen.append(info.epoch)
        return info.epoch == 3

    result = _fit(
        epochs=9,
        callbacks=[callback],
        validation=_problem()[3],
        checkpoint_dir=tmp_path,
        checkpoint_every=100,
    )
    assert seen == [1, 2, 3]
    assert int(result.state.step) == 3 * STEPS
    assert os.listdir(tmp_path) == [str(3 * STEPS)]


def test_validation_comes_when_it_is_due():
    data = _problem()[3]
    result = _fit(epochs=5, validation=data, evaluate_every=2)
    due = [epoch["epoch"] for epoch in result.epochs if "validation_loss" in epoch]
    assert due == [2, 4, 5]
    objective = _problem()[0]
    found = evaluate(objective, result.state.params, (), data)
    last = result.epochs[-1]
    np.testing.assert_allclose(last["validation_loss"], found["loss"], rtol=1e-6)
    assert last["validation_accuracy"] == found["accuracy"]


@pytest.mark.parametrize("size", [1, 7, 20, 33])
@pytest.mark.parametrize("weighted", [False, True])
def test_evaluation_is_a_weighted_mean_over_rows(size, weighted):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(20, 5, 3)).astype(np.float32)  # sequences of 5 rows
    y = rng.integers(0, 4, size=(20, 5))
    w = rng.normal(size=(3, 4)).astype(np.float32)
    weights = np.float32(rng.integers(0, 3, size=20)) if weighted else np.ones(20)
    logits = (x.astype(np.float64) @ w).reshape(100, 4)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    share = np.repeat(weights, 5) / (5 * weights.sum())
    loss = -share @ log_p[np.arange(100), y.ravel()]
    right = share @ (logits.argmax(-1) == y.ravel())
    objective = Objective(plain(lambda p, x: x @ p), Categorical())
    data = (x, y, weights.astype(np.float32)) if weighted else (x, y)
    found = evaluate(objective, jnp.asarray(w), (), data, batch_size=size)
    np.testing.assert_allclose(found["loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(found["accuracy"], right, rtol=1e-5)


def test_evaluation_takes_any_metric_and_convolutions():
    kernel, x = jnp.ones((2, 1, 3, 3)), jnp.ones((5, 1, 4, 4))
    y = jnp.zeros((5, 2))
    first = lambda outputs, targets: outputs[:, 0] - targets[:, 0]
    objective = Objective(plain(_conv), Gaussian())
    found = evaluate(objective, kernel, (), (x, y), batch_size=2, metrics={"a": first})
    np.testing.assert_allclose(found["a"], _conv(kernel, x)[0, 0], rtol=1e-6)
    assert sorted(evaluate(objective, kernel, (), (x, y))) == ["loss"]


def test_accuracy_of_integers_and_of_one_hot():
    logits = jnp.array([[2.0, 1.0], [0.0, 3.0], [1.0, 0.0]])
    targets = jnp.array([0, 0, 0])
    np.testing.assert_array_equal(accuracy(logits, targets), [1, 0, 1])
    np.testing.assert_array_equal(
        accuracy(logits, jax.nn.one_hot(targets, 2)), [1, 0, 1]
    )


class _Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_bar_shows_on_a_terminal_alone(monkeypatch):
    for stream, options, shown in (
        (_Terminal(), {}, True),
        (io.StringIO(), {}, False),
        (_Terminal(), {"progress": False}, False),
    ):
        monkeypatch.setattr(sys, "stderr", stream)
        _fit(**{"progress": True} | options)
        assert ("18/18" in stream.getvalue()) == shown
        assert ("loss" in stream.getvalue()) == shown


def test_options_of_the_step_reach_it():
    plain_run = _fit(batch_size=40)
    for options in ({"remat": True}, {"loss_scale": 64.0}):
        other = _fit(batch_size=40, **options)
        _close(other.state, plain_run.state, rtol=1e-4, atol=1e-5)
    objective, data, _ = _counting()
    optimizer = optax.sgd(0.1)
    runs = []
    for options in ({}, {"accumulate": 2}, {"loss_scale": "dynamic"}):
        scale = 4.0 if "loss_scale" in options else None
        state = create_state(
            jax.random.key(0), jnp.zeros((2, 1)), optimizer, loss_scale=scale
        )
        options = {"batch_size": 4, "progress": False} | options
        runs.append(fit(objective, optimizer, state, data, epochs=2, **options))
        np.testing.assert_allclose(
            runs[-1].state.params, runs[0].state.params, rtol=1e-6
        )
    assert runs[2].history["loss_scale"].tolist() == [4.0] * 6
    assert runs[2].history["skipped"].tolist() == [0.0] * 6


class _Net(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(16, 12, rngs=rngs)
        self.norm = nnx.BatchNorm(12, rngs=rngs)
        self.drop = nnx.Dropout(0.2, rngs=rngs)
        self.last = nnx.Linear(12, 8, rngs=rngs)

    def __call__(self, x):
        return self.last(self.drop(jnp.tanh(self.norm(self.first(x)))))


def test_trains_a_module_with_batch_norm_and_dropout(tmp_path):
    data = _problem()[3]
    optimizer = optax.adam(1e-2)

    def run(epochs, folder):
        objective, params, model_state = from_nnx(_Net(nnx.Rngs(0)), Categorical())
        state = create_state(
            jax.random.key(0), params, optimizer, model_state=model_state
        )
        return fit(
            objective,
            optimizer,
            state,
            data,
            epochs=epochs,
            batch_size=BATCH,
            validation=data,
            checkpoint_dir=folder,
            progress=False,
        )

    straight = run(12, tmp_path / "one")
    run(5, tmp_path / "two")
    _same(run(12, tmp_path / "two").state, straight.state)
    assert straight.epochs[-1]["validation_accuracy"] > 0.8
    assert straight.epochs[-1]["loss"] < 0.6 * straight.epochs[0]["loss"]


def test_the_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pages = runpy.run_path(str(PAGE.parents[1] / "tests" / "pages.py"))
    names, count = pages["run"](PAGE)
    assert count == 8
    assert names["means"]["accuracy"] > 0.9
    assert dict(names["mesh"].shape) == {"data": 4, "fsdp": 2, "tensor": 1}
    assert len(names["result"].epochs) == 2
