"""The training step: equal to a step written by hand, whatever its options."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlab.likelihoods import Categorical, Gaussian
from jaxlab.objective import Objective, plain
from jaxlab.training import create_state, make_train_step


def _apply(params, x):
    return jnp.tanh(x @ params["w1"]) @ params["w2"]


def _problem(rows=12, weighted=False):
    keys = jax.random.split(jax.random.key(0), 5)
    params = {
        "w1": jax.random.normal(keys[0], (3, 4)),
        "w2": jax.random.normal(keys[1], (4, 3)),
    }
    x = jax.random.normal(keys[2], (rows, 3))
    y = jax.random.randint(keys[3], (rows,), 0, 3)
    weights = (jax.random.uniform(keys[4], (rows,)),) if weighted else ()
    return Objective(plain(_apply), Categorical()), params, (x, y, *weights)


def _assert_close(one, two, atol=1e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol), one, two)


def test_is_the_step_written_by_hand():
    objective, params, batch = _problem()
    optimizer = optax.adam(1e-2)
    step = make_train_step(objective, optimizer)
    state = create_state(jax.random.key(0), params, optimizer)
    opt_state = optimizer.init(params)
    loss_fn = lambda p: optax.softmax_cross_entropy_with_integer_labels(
        _apply(p, batch[0]), batch[1]
    ).mean()
    for count in range(1, 4):
        state, metrics = step(state, batch)
        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        _assert_close(state.params, params)
        _assert_close(metrics["loss"], loss)
        _assert_close(metrics["grad_norm"], optax.tree.norm(grads))
        assert int(state.step) == count
    assert step._cache_size() == 1


class _Spy:
    """Keeps what the step passed, once, at trace time."""

    def __init__(self):
        self.tx = optax.GradientTransformationExtraArgs(lambda p: (), self.update)

    def update(self, updates, state, params=None, **extra):
        along = extra["fisher_vp"](updates)
        out = {
            "value": extra["value"],
            "value_fn": extra["value_fn"](params),
            "obj_fn": extra["obj_fn"](params),
            "grad": extra["grad"],
            "grad_fn": extra["grad_fn"](params),
            "fisher_vp": along,
            "quadratic_form": extra["fisher_vp"].quadratic_form(updates),
            "key": jax.random.key_data(extra["key"]),
            "updates": updates,
        }
        self.same_leaves = all(
            map(
                lambda a, b: a is b,
                jax.tree.leaves(updates),
                jax.tree.leaves(extra["grad"]),
            )
        )
        return out, state


@pytest.mark.parametrize("accumulate", [1, 2, 3])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("remat", [False, True])
def test_extra_arguments_speak_of_the_whole_batch(
    accumulate, weighted, remat, monkeypatch
):
    objective, params, batch = _problem(weighted=weighted)
    spy = _Spy()
    seen = {}
    monkeypatch.setattr(
        optax, "apply_updates", lambda p, u: seen.update(u) or jax.tree.map(jnp.copy, p)
    )
    step = make_train_step(
        objective, spy.tx, accumulate=accumulate, remat=remat, jit=False
    )
    state = create_state(jax.random.key(0), params, spy.tx)
    step(state, batch)
    (loss, _), grads = objective.value_and_grad(params, (), batch)
    along = objective.ggn_product(params, (), batch, grads)
    for name in ("value", "value_fn", "obj_fn"):
        _assert_close(seen[name], loss)
    for name in ("grad", "grad_fn", "updates"):
        _assert_close(seen[name], grads)
    _assert_close(seen["fisher_vp"], along)
    _assert_close(seen["quadratic_form"], optax.tree.vdot(grads, along))
    assert spy.same_leaves, "a link cannot tell that its gradient is the step's own"


def test_keys_differ_from_step_to_step_and_repeat_on_resume():
    objective, params, batch = _problem()
    keys = []
    tx = optax.GradientTransformationExtraArgs(
        lambda p: jnp.zeros(2, jnp.uint32),
        lambda u, s, p=None, *, key, **_: (
            optax.tree.zeros_like(u),
            jax.random.key_data(key),
        ),
    )
    step = make_train_step(objective, tx, donate=False)
    state = create_state(jax.random.key(0), params, tx)
    for _ in range(3):
        before = state
        state, _ = step(state, batch)
        keys.append(tuple(np.asarray(state.opt_state).tolist()))
    again, _ = step(before, batch)
    assert len(set(keys)) == 3
    assert tuple(np.asarray(again.opt_state).tolist()) == keys[-1]


def test_unused_arguments_cost_nothing():
    objective, params, batch = _problem()
    lower = lambda tx: (
        make_train_step(objective, tx)
        .lower(create_state(jax.random.key(0), params, tx), batch)
        .compile()
        .cost_analysis()["flops"]
    )

    def bare(state, batch):
        loss = lambda p: objective.loss(p, (), batch)[0]
        value, grads = jax.value_and_grad(loss)(state.params)
        params = jax.tree.map(lambda p, g: p - 0.1 * g, state.params, grads)
        return state._replace(params=params), (value, optax.tree.norm(grads))

    tx = optax.sgd(0.1)
    state = create_state(jax.random.key(0), params, tx)
    flops = jax.jit(bare).lower(state, batch).compile().cost_analysis()["flops"]
    # The keys of the step are a few hundred integer operations on this tiny problem.
    assert abs(lower(tx) - flops) < 600


def test_noise_is_the_same_in_every_function_of_a_step():
    def apply_fn(params, state, x, *, key, train):
        return params * (x + jax.random.normal(key, x.shape)), state

    objective = Objective(apply_fn, Gaussian())
    gaps = []

    def update(updates, state, params=None, *, value, value_fn, grad_fn, **_):
        gaps.append(value_fn(params) - value)
        gaps.append(grad_fn(params) - updates)
        return updates, state

    tx = optax.GradientTransformationExtraArgs(lambda p: (), update)
    for accumulate in (1, 2):
        step = make_train_step(objective, tx, jit=False, accumulate=accumulate)
        state = create_state(jax.random.key(0), jnp.float32(1.0), tx)
        step(state, (jnp.ones((4, 1)), jnp.zeros((4, 1))))
    assert len(gaps) == 4
    assert all(abs(gap) < 1e-6 for gap in gaps)


def test_model_state_is_carried():
    def apply_fn(params, state, x, *, key, train):
        return params * x, state + x.shape[0]

    objective = Objective(apply_fn, Gaussian())
    tx = optax.sgd(0.1)
    batch = (jnp.ones((4, 1)), jnp.zeros((4, 1)))
    for accumulate in (1, 2, 4):
        step = make_train_step(objective, tx, accumulate=accumulate)
        state = create_state(
            jax.random.key(0), jnp.float32(1.0), tx, model_state=jnp.int32(0)
        )
        for _ in range(3):
            state, _ = step(state, batch)
        assert int(state.model_state) == 12


@pytest.mark.parametrize("scale", [1024.0, "dynamic"])
def test_loss_scale_changes_nothing_where_nothing_overflows(scale):
    objective, params, batch = _problem()
    tx = optax.adam(1e-2)
    plain_state = create_state(jax.random.key(0), params, tx)
    scaled_state = create_state(
        jax.random.key(0),
        params,
        tx,
        loss_scale=1024.0 if scale == "dynamic" else None,
    )
    plain_step = make_train_step(objective, tx)
    scaled_step = make_train_step(objective, tx, loss_scale=scale)
    for _ in range(3):
        plain_state, _ = plain_step(plain_state, batch)
        scaled_state, metrics = scaled_step(scaled_state, batch)
    _assert_close(plain_state.params, scaled_state.params)
    if scale == "dynamic":
        assert metrics["skipped"] == 0
        assert metrics["loss_scale"] == 1024


def test_loss_scale_saves_gradients_that_float16_would_lose():
    half = jnp.float16
    objective = Objective(plain(lambda w, x: x * w.astype(half)), Gaussian())
    tx = optax.sgd(1.0)
    batch = (jnp.full((1, 1), 1e-4, half), jnp.full((1, 1), 1e-4, half))
    grads = {}
    for scale in (None, 2.0**15):
        state = create_state(jax.random.key(0), jnp.zeros(()), tx)
        _, metrics = make_train_step(objective, tx, loss_scale=scale)(state, batch)
        grads[scale] = float(metrics["grad_norm"])
    # The gradient is 1e-8; float16 ends at 6e-8.
    assert grads[None] == 0
    assert abs(grads[2.0**15] - 1e-8) < 1e-10


def test_dynamic_scale_skips_a_bad_step_halves_and_recovers():
    objective = Objective(plain(lambda w, x: w * x), Gaussian())
    tx = optax.adam(0.1)
    step = make_train_step(objective, tx, loss_scale="dynamic", donate=False)
    state = create_state(jax.random.key(0), jnp.ones(()), tx, loss_scale=8.0)
    good = (jnp.ones((2, 1)), jnp.zeros((2, 1)))
    bad = (jnp.full((2, 1), jnp.inf), jnp.zeros((2, 1)))
    skipped, metrics = step(state, bad)
    assert metrics["skipped"] == 1
    assert float(skipped.loss_scale.scale) == 4
    _assert_close(skipped.params, state.params)
    _assert_close(skipped.opt_state, state.opt_state)
    assert int(skipped.step) == 1
    after, metrics = step(skipped, good)
    assert metrics["skipped"] == 0
    assert after.params < state.params
    grown = state._replace(
        loss_scale=state.loss_scale._replace(streak=jnp.int32(1_999))
    )
    assert float(step(grown, good)[0].loss_scale.scale) == 16


def test_donation_frees_the_old_state_but_not_the_callers_params():
    objective, params, batch = _problem()
    tx = optax.adam(1e-2)
    state = create_state(jax.random.key(0), params, tx)
    make_train_step(objective, tx)(state, batch)
    assert state.params["w1"].is_deleted()
    assert not params["w1"].is_deleted()


@pytest.mark.parametrize("accumulate", [1, 2])
def test_eight_devices_equal_one(accumulate):
    objective, params, batch = _problem(rows=32)
    tx = optax.adam(1e-2)
    step = make_train_step(objective, tx, donate=False, accumulate=accumulate)
    state = create_state(jax.random.key(0), params, tx)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    spread = jax.device_put(batch, NamedSharding(mesh, P("data")))
    there = jax.device_put(state, NamedSharding(mesh, P()))
    for _ in range(3):
        state, _ = step(state, batch)
        there, _ = step(there, spread)
    _assert_close(state.params, there.params)


def test_numpy_batches_and_params():
    objective, params, batch = _problem()
    tx = optax.sgd(0.1)
    as_numpy = lambda tree: jax.tree.map(np.asarray, tree)
    step = make_train_step(objective, tx)
    one, _ = step(create_state(jax.random.key(0), params, tx), batch)
    two, _ = step(
        create_state(jax.random.key(0), as_numpy(params), tx), as_numpy(batch)
    )
    _assert_close(one.params, two.params)
