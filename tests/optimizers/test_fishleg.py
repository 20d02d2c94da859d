"""FishLeg in an optimizer: its start, its step, its cadence, its company."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType

from jaxlab import sharpness
from jaxlab.datasets import load
from jaxlab.likelihoods import Bernoulli, Gaussian
from jaxlab.models import autoencoder_digits
from jaxlab.objective import GaussNewton, Objective, plain
from jaxlab.optimizers import (
    InverseFisher,
    LevenbergMarquardt,
    fishleg,
    scale_by_fishleg,
)
from jaxlab.training import create_state, from_nnx, make_train_step


def apply_fn(params, x):
    return jnp.tanh(x @ params["w1"] + params["b1"][None]) @ params["w2"]


OBJECTIVE = Objective(plain(apply_fn), Gaussian())
FLOOR = 1.5 * float(jnp.log(2 * jnp.pi))  # of the loss: three outputs of scale one


def params_of(seed=0):
    keys = jax.random.split(jax.random.key(seed), 2)
    return {
        "w1": jax.random.normal(keys[0], (5, 6)) / 2,
        "b1": jnp.zeros(6),
        "w2": jax.random.normal(keys[1], (6, 3)) / 2,
    }


def batch_of(seed=1, rows=32):
    x = jax.random.normal(jax.random.key(seed), (rows, 5))
    return x, jnp.stack([jnp.sin(x[:, 0]), x[:, 1] * x[:, 2], x[:, 3]], axis=1)


def stepper(optimizer):
    @jax.jit
    def step(params, state, batch, key):
        (value, _), grads = OBJECTIVE.value_and_grad(params, (), batch)
        updates, state = optimizer.update(
            grads,
            state,
            params,
            fisher_vp=GaussNewton(OBJECTIVE, params, (), batch),
            key=key,
            value=value,
            value_fn=lambda at: OBJECTIVE.loss(at, (), batch)[0],
        )
        return optax.apply_updates(params, updates), state, value

    return step


def trained(optimizer, steps, params=None):
    params = params_of() if params is None else params
    state, step, losses = optimizer.init(params), stepper(optimizer), []
    for number in range(steps):
        key = jax.random.fold_in(jax.random.key(0), number)
        params, state, value = step(params, state, batch_of(), key)
        losses.append(float(value) - FLOOR)
    return params, state, losses


NO_AUX = {"pre_aux_steps": 0, "dense_until": 0, "update_aux_every": 1_000}


def test_before_the_first_auxiliary_step_it_is_sgd_with_momentum_to_the_bit():
    ours = fishleg(
        2.0**-6,
        step="fixed",
        momentum=0.9,
        init_scale=16.0,
        white_directions=0,
        **NO_AUX,
    )
    theirs = optax.chain(optax.ema(0.9, debias=False), optax.scale(-0.25))
    params = params_of()
    states = [optimizer.init(params) for optimizer in (ours, theirs)]
    fisher = {"fisher_vp": lambda v: v}
    for number in range(5):
        grads = params_of(seed=number)  # the same bits for both
        found, states[0] = ours.update(grads, states[0], params, **fisher)
        expected, states[1] = theirs.update(grads, states[1])
        chex.assert_trees_all_equal(found, expected)


def test_the_quadratic_step_is_one_at_the_exact_inverse():
    """On a quadratic, Q = (F + damping)^-1 up to scale goes to the model's minimum."""
    curve = jnp.array([0.5, 1.0, 4.0])
    optimizer = scale_by_fishleg(damping=0.1, white_directions=0, **NO_AUX)
    params = {"v": jnp.array([1.0, -2.0, 3.0])}
    state = optimizer.init(params)
    exact = state.q.factors["v"]._replace(scale=3 / jnp.sqrt(curve + 0.1)[:, None])
    state = state._replace(q=InverseFisher({"v": exact}, state.q.blocks))
    gradient = {"v": curve * params["v"]}
    direction, _ = optimizer.update(
        gradient, state, params, fisher_vp=lambda v: {"v": curve * v["v"]}
    )
    np.testing.assert_allclose(direction["v"], gradient["v"] / (curve + 0.1), rtol=1e-5)


def test_after_a_jump_of_the_loss_the_step_is_shorter():
    """A model's decrease of more than four times the largest of late is not trusted."""
    optimizer = scale_by_fishleg(damping=1.0, white_directions=0, **NO_AUX)
    curvature, w = jnp.array([3.0, 1.0]), jnp.ones(2)

    def update(scale, state):
        gradient = scale * jnp.array([1.0, 2.0])
        step, state = optimizer.update(
            gradient, state, w, fisher_vp=lambda v: curvature * v
        )
        decrease = gradient @ step - 0.5 * step @ ((curvature + 1) * step)
        return step, state, float(decrease)

    first, state, before = update(1.0, optimizer.init(w))
    _, state, same = update(1.0, state)
    np.testing.assert_allclose([same, float(state.decrease)], before, rtol=1e-5)
    step, state, after = update(1.9, state)  # 3.6 times the decrease
    np.testing.assert_allclose(step, 1.9 * first, rtol=1e-5)
    np.testing.assert_allclose(after, 1.9**2 * before, rtol=1e-5)
    step, state, after = update(1e3, state)
    np.testing.assert_allclose(after, 4 * 1.9**2 * before, rtol=1e-2)
    np.testing.assert_allclose(step[1] / step[0], first[1] / first[0], rtol=1e-5)
    _, faded, _ = update(1.0, state)  # small steps are what they were
    np.testing.assert_allclose(faded.decrease, 0.9 * float(state.decrease), rtol=1e-5)
    _, state, _ = update(jnp.nan, state)
    step, _, _ = update(1.0, state)
    np.testing.assert_allclose(step, first, rtol=1e-5)


def test_the_step_uses_a_quadratic_form_where_there_is_one():
    class Counting:
        forms = products = 0

        def __call__(self, v):
            self.products += 1
            return v

        def quadratic_form(self, v):
            self.forms += 1
            return optax.tree.norm(v, squared=True)

    optimizer = scale_by_fishleg(white_directions=0, **NO_AUX)
    params = {"v": jnp.ones(3)}
    operator = Counting()
    optimizer.update(params, optimizer.init(params), params, fisher_vp=operator)
    assert operator.forms == 1


def changes(optimizer, steps):
    """Tells in which steps the inverse Fisher moved."""
    params = params_of()
    state, step, moved = optimizer.init(params), stepper(optimizer), []
    for number in range(steps):
        before = state.q
        _, state, _ = step(params, state, batch_of(), jax.random.key(number))
        same = jax.tree.map(np.array_equal, before.factors, state.q.factors)
        moved.append(not jax.tree.all(same))
    return [number for number, move in enumerate(moved) if move]


def test_cadence():
    make = functools.partial(scale_by_fishleg, update_aux_every=3)
    assert changes(make(dense_until=4, pre_aux_steps=2), 10) == [0, 1, 2, 3, 6, 9]
    assert changes(make(dense_until=0, pre_aux_steps=0), 8) == [3, 6]
    assert changes(make(dense_until=0, pre_aux_steps=1), 8) == [0, 3, 6]


def test_more_start_up_steps_fit_better():
    fits = []
    for count in (1, 30):
        optimizer = scale_by_fishleg(pre_aux_steps=count, dense_until=2)
        fits.append(float(trained(optimizer, 2)[1].fit))
    assert fits[1] < 0.5 * fits[0]


def test_an_auxiliary_step_that_is_not_finite_is_skipped_and_counted():
    optimizer = scale_by_fishleg(white_directions=0, pre_aux_steps=3)
    params = {"v": jnp.ones(3), "kernel": jnp.ones((2, 2))}
    state = optimizer.init(params)
    nan = lambda v: jax.tree.map(lambda x: x * jnp.nan, v)
    _, new = optimizer.update(params, state, params, fisher_vp=nan)
    assert int(new.skipped) == 3
    chex.assert_trees_all_equal(new.q, state.q)
    assert jnp.isfinite(new.fit)


def test_one_trace():
    optimizer = fishleg()
    count = 0

    @jax.jit
    def step(params, state, key):
        nonlocal count
        count += 1
        operator = GaussNewton(OBJECTIVE, params, (), batch_of())
        updates, state = optimizer.update(
            params, state, params, fisher_vp=operator, key=key
        )
        return optax.apply_updates(params, updates), state

    params, state = params_of(), optimizer.init(params_of())
    for number in range(3):
        params, state = step(params, state, jax.random.key(number))
    assert count == 1


def test_damping_follows_levenberg_and_marquardt():
    rule = LevenbergMarquardt(initial=0.5, factor=0.9, floor=0.4)
    optimizer = scale_by_fishleg(damping=rule, white_directions=0, **NO_AUX)
    params = {"v": jnp.array([3.0, 4.0])}
    state = optimizer.init(params)
    assert state.damping == 0.5
    value_fn = lambda at: 0.5 * jnp.sum(at["v"] ** 2)
    update = functools.partial(
        optimizer.update, params, params=params, value=value_fn(params)
    )
    good = functools.partial(update, fisher_vp=lambda v: v, value_fn=value_fn)
    # The model holds the damping too: the loss falls by more than it says.
    _, once = good(state)
    np.testing.assert_allclose(once.damping, 0.45)
    for _ in range(5):
        _, once = good(once)
    np.testing.assert_allclose(once.damping, 0.4)
    # A loss that rises where the model says that it falls.
    _, worse = update(
        state, fisher_vp=lambda v: v, value_fn=lambda at: value_fn(at) + 99
    )
    np.testing.assert_allclose(worse.damping, 0.5 / 0.9, rtol=1e-6)


def test_weight_decay_is_in_gradient_and_model():
    """Equal to the same FishLeg on the loss with the term in it."""
    curve = jnp.array([0.5, 1.0, 4.0])
    params = {"v": jnp.array([1.0, -2.0, 3.0])}
    gradient = {"v": curve * params["v"] + 1}
    run = lambda tx, g, operator: tx.update(
        g, tx.init(params), params, fisher_vp=operator
    )[0]
    found = run(
        fishleg(damping=0.1, weight_decay=0.2, white_directions=0),
        gradient,
        lambda v: {"v": curve * v["v"]},
    )
    expected = run(
        fishleg(damping=0.1, white_directions=0),
        {"v": gradient["v"] + 0.2 * params["v"]},
        lambda v: {"v": (curve + 0.2) * v["v"]},
    )
    chex.assert_trees_all_close(found, expected, rtol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_directions": 2},
        {"white_directions": 0},
        {"max_size": 2},
        {"rule": {"w1": "full"}},
        {"damping": LevenbergMarquardt()},
        {"damping": lambda count: 0.3 / (1 + 0.1 * count)},
        {"aux_mode": "adam", "aux_step": 1e-2, "gradient_directions": 0},
        {"aux_mode": "adam", "rule": {"w1": "scaled"}, "normalize": "product"},
        {"aux_mode": "adam", "aux_optimizer": optax.rmsprop(0.01)},
        {"aux_mode": "adam", "aux_step": 1e-2, "precondition": True},
    ],
    ids=lambda options: " ".join(options) or "defaults",
)
def test_every_option_learns(options):
    _, state, losses = trained(fishleg(**options), 40)
    assert losses[-1] < 0.3 * losses[0]
    assert state[0].skipped == 0


def test_better_per_step_than_the_best_of_many_rates_of_adam():
    ours = trained(fishleg(), 40)[2][-1]
    rates = (1e-2, 3e-2, 1e-1, 3e-1, 1.0)
    adam = [
        trained(optax.with_extra_args_support(optax.adam(rate)), 40)[2][-1]
        for rate in rates
    ]
    assert ours < min(adam)
    assert np.argmin(adam) not in (0, len(rates) - 1)


# In company.


def step_of(optimizer, params, steps=3, **options):
    objective = Objective(plain(apply_fn), Gaussian())
    step = make_train_step(objective, optimizer, **options)
    state = create_state(jax.random.key(0), params, optimizer)
    for _ in range(steps):
        state, metrics = step(state, batch_of())
    return state, metrics


CHAINS = {
    "penalty": optax.chain(sharpness.gradient_norm_penalty(0.8, 0.05), fishleg()),
    "clip, decay": optax.chain(
        optax.clip_by_global_norm(1.0),
        scale_by_fishleg(),
        optax.add_decayed_weights(1e-2),
        optax.scale(-1.0),
    ),
    "partition": optax.partition(
        {"kernels": fishleg(), "rest": optax.adamw(1e-2)},
        {"w1": "kernels", "b1": "rest", "w2": "kernels"},
    ),
    "masked": optax.chain(
        optax.masked(fishleg(), {"w1": True, "b1": True, "w2": False}),
        optax.masked(optax.sgd(0.1), {"w1": False, "b1": False, "w2": True}),
    ),
    "schedule": fishleg(optax.linear_schedule(1.0, 0.5, 10)),
}


@pytest.mark.parametrize("name", CHAINS)
def test_chains_in_the_training_step(name):
    params = params_of()
    before = float(OBJECTIVE.loss(params, (), batch_of())[0])
    state, _ = step_of(CHAINS[name], params, steps=6)
    chex.assert_tree_all_finite(state.params)
    assert float(OBJECTIVE.loss(state.params, (), batch_of())[0]) < 0.8 * before


def test_partition_fits_only_its_own_group():
    state, _ = step_of(CHAINS["partition"], params_of())
    (q,) = [
        node
        for node in jax.tree.leaves(
            state.opt_state, is_leaf=lambda n: isinstance(n, InverseFisher)
        )
        if isinstance(node, InverseFisher)
    ]
    assert set(q.factors) == {"w1", "w2"}


def test_accumulated_in_the_step_it_is_the_whole_batch():
    options = {"white_directions": 0, "pre_aux_steps": 5}
    whole, _ = step_of(fishleg(**options), params_of())
    parts, _ = step_of(fishleg(**options), params_of(), accumulate=4)
    chex.assert_trees_all_close(whole.params, parts.params, rtol=1e-3, atol=1e-4)


def test_multi_steps_steps_once_for_each_mean():
    optimizer = optax.MultiSteps(fishleg(white_directions=0), 2)
    params = params_of()
    state = optimizer.init(params)
    batch = batch_of()
    grads = OBJECTIVE.value_and_grad(params, (), batch)[1]
    operator = GaussNewton(OBJECTIVE, params, (), batch)
    update = jax.jit(
        lambda g, state: optimizer.update(g, state, params, fisher_vp=operator)
    )
    first, state = update(grads, state)
    assert optax.tree.norm(first) == 0
    found, state = update(grads, state)
    alone = fishleg(white_directions=0)
    expected, _ = alone.update(grads, alone.init(params), params, fisher_vp=operator)
    chex.assert_trees_all_close(found, expected, rtol=1e-3, atol=1e-5)


def test_low_precision_params_keep_wide_factors():
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params_of())
    optimizer = fishleg()
    state = optimizer.init(params)
    assert {x.dtype for x in jax.tree.leaves(state[0].q)} == {jnp.dtype("float32")}
    batch = jax.tree.map(lambda x: x.astype(jnp.bfloat16), batch_of())
    grads = OBJECTIVE.value_and_grad(params, (), batch)[1]
    updates, state = optimizer.update(
        grads,
        state,
        params,
        fisher_vp=GaussNewton(OBJECTIVE, params, (), batch),
        key=jax.random.key(0),
    )
    assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype("bfloat16")}
    chex.assert_tree_all_finite(updates)
    assert state[0].skipped == 0


def test_convolutions_of_auxiliary_steps_have_the_layout_that_is_fast():
    """In the compiled loop, where XLA on CPUs leaves every other layout slow."""
    layout = ("NHWC", "HWIO", "NHWC")
    convolve = functools.partial(jax.lax.conv_general_dilated, dimension_numbers=layout)

    def apply_fn(params, x):
        x = jnp.tanh(convolve(x, params["one"], (2, 2), "SAME"))
        return jnp.mean(convolve(x, params["two"], (1, 1), "SAME"), axis=(1, 2))

    objective = Objective(plain(apply_fn), Gaussian())
    params = {"one": jnp.ones((3, 3, 1, 4)) / 9, "two": jnp.ones((3, 3, 4, 3)) / 36}
    batch = (jnp.ones((8, 6, 6, 1)), jnp.zeros((8, 3)))
    optimizer = scale_by_fishleg(white_directions=0)

    def update(grads, state, params, batch):
        operator = GaussNewton(objective, params, (), batch)
        return optimizer.update(grads, state, params, fisher_vp=operator)

    arguments = params, optimizer.init(params), params, batch
    text = jax.jit(update).lower(*arguments).compile().as_text()
    found = re.findall(r"convolution\(.*dim_labels=(\S+->\w+)", text)
    assert len(found) == 11
    assert set(found) == {"b01f_01io->b01f"}


def test_factors_of_stacked_layers_are_sharded_with_them():
    mesh = jax.make_mesh((4,), ("blocks",), axis_types=(AxisType.Auto,))
    sharding = jax.NamedSharding(mesh, jax.P("blocks"))
    params = {"w1": jax.device_put(jnp.ones((4, 3, 2)), sharding)}
    optimizer = scale_by_fishleg(white_directions=0)
    state = jax.jit(optimizer.init)(params)
    grads = jax.tree.map(lambda x: x * 0.5, params)
    updates, state = jax.jit(
        lambda g, s, p: optimizer.update(g, s, p, fisher_vp=lambda v: v)
    )(grads, state, params)
    assert updates["w1"].sharding.is_equivalent_to(sharding, 3)
    plain = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), (grads, params))
    expected, _ = optimizer.update(
        plain[0], optimizer.init(plain[1]), plain[1], fisher_vp=lambda v: v
    )
    chex.assert_trees_all_close(updates, expected, rtol=1e-5)


def test_autoencoder_reaches_what_the_recipe_measured():
    """Digits, batch 100: 50 steps of tuned Adam end above 20, of FishLeg below 18."""
    objective, params, rest = from_nnx(
        autoencoder_digits(rngs=nnx.Rngs(0)), Bernoulli()
    )
    rows = jnp.asarray(load("digits").splits["train"][0])
    optimizer = fishleg(weight_decay=1e-5)
    step = make_train_step(objective, optimizer)
    state = create_state(jax.random.key(0), params, optimizer, model_state=rest)
    for number in range(50):
        index = jax.random.choice(jax.random.key(number), len(rows), (100,), False)
        state, _ = step(state, (rows[index], rows[index]))
    loss = objective.loss(state.params, rest, (rows, rows))[0]
    assert loss < 17.6
