"""The links inside the training step: masks, partitions, accumulation, devices."""

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlab import sharpness
from jaxlab.likelihoods import Gaussian
from jaxlab.objective import Objective, plain
from jaxlab.training import create_state, make_train_step, with_extra_args

OBJECTIVE = Objective(
    plain(lambda p, x: jnp.tanh(x @ p["w"]) @ p["v"]["kernel"]), Gaussian()
)


def _params():
    one, two = jax.random.split(jax.random.key(0))
    return {
        "w": jax.random.normal(one, (4, 8)) / 2,
        "v": {"kernel": jax.random.normal(two, (8, 2)) / 3},
    }


def _batch():
    one, two = jax.random.split(jax.random.key(1))
    return jax.random.normal(one, (16, 4)), jax.random.normal(two, (16, 2))


def _walk(optimizer, *, steps=3, batch=None, **options):
    batch = _batch() if batch is None else batch
    step = make_train_step(OBJECTIVE, optimizer, donate=False, **options)
    state = create_state(jax.random.key(2), _params(), optimizer)
    for _ in range(steps):
        state, _ = step(state, batch)
    assert step._cache_size() == 1
    return state.params


def _by_hand(mask=None, steps=3):
    params = _params()
    grad_fn = jax.grad(lambda p: OBJECTIVE.loss(p, (), _batch())[0])
    for _ in range(steps):
        mixed = sharpness.gnp_gradient(
            grad_fn, params, alpha=0.8, radius=0.3, mask=mask
        )
        if mask is not None:  # outside the mask the plain gradient
            mixed = jax.tree.map(
                lambda m, a, b: a if m else b, mask, mixed, grad_fn(params)
            )
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, mixed)
    return params


LINK = sharpness.gradient_norm_penalty(0.8, 0.3)
MASK = {"w": True, "v": {"kernel": False}}
near = lambda a, b: chex.assert_trees_all_close(a, b, rtol=1e-5, atol=1e-6)


def test_alone_and_with_injected_hyperparams():
    near(_walk(optax.chain(LINK, optax.sgd(0.1))), _by_hand())
    injected = optax.inject_hyperparams(sharpness.gradient_norm_penalty)(
        alpha=0.8, radius=optax.constant_schedule(0.3)
    )
    near(_walk(optax.chain(injected, optax.sgd(0.1))), _by_hand())


def test_inside_masked_and_partition():
    masked = optax.chain(optax.masked(LINK, MASK), optax.sgd(0.1))
    near(_walk(masked), _by_hand(MASK))
    parts = optax.partition(
        {"in": optax.chain(LINK, optax.sgd(0.1)), "out": optax.sgd(0.1)},
        {"w": "in", "v": "out"},
    )
    near(_walk(parts), _by_hand(MASK))


def test_accumulated_in_the_step_it_is_the_whole_batch():
    near(_walk(optax.chain(LINK, optax.sgd(0.1)), accumulate=4), _by_hand())


def test_multi_steps_around_the_link_is_refused_and_behind_it_right():
    with pytest.raises(ValueError, match=r"outside optax\.MultiSteps"):
        _walk(optax.MultiSteps(optax.chain(LINK, optax.sgd(0.1)), 2))
    behind = with_extra_args(optax.MultiSteps(optax.sgd(0.1), 2))
    near(_walk(optax.chain(LINK, behind), steps=2), _by_hand(steps=1))


@pytest.mark.parametrize("name", ["penalty", "asam", "look_sam", "hybrid"])
def test_eight_devices_equal_one(name):
    link = {
        "penalty": LINK,
        "asam": sharpness.asam(0.5),
        "look_sam": sharpness.look_sam(0.3, every=2),
        "hybrid": sharpness.hybrid(LINK, 0.5),
    }[name]
    optimizer = optax.chain(link, optax.sgd(0.1, momentum=0.9))
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    spread = jax.device_put(_batch(), NamedSharding(mesh, P("d")))
    step = make_train_step(OBJECTIVE, optimizer, donate=False)
    state = create_state(jax.random.key(2), _params(), optimizer)
    state = jax.device_put(state, NamedSharding(mesh, P()))
    for _ in range(3):
        state, _ = step(state, spread)
    near(state.params, _walk(optimizer))
