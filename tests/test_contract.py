"""The contract that every transformation of the suite keeps; one row each.

To add a transformation, append a :class:`Row`. The first rows are not ours: two of
optax's that keep the whole contract, and a small link that needs extra arguments,
so that the checks themselves are seen to pass (and, below, to fail).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlab import optimizers, sharpness
from jaxlab.likelihoods import Gaussian
from jaxlab.objective import GaussNewton, Objective, plain
from jaxlab.training import with_extra_args


@dataclasses.dataclass(frozen=True)
class Row:
    """One transformation.

    Attributes:
      make: factory; called with ``hyperparams`` as keywords.
      hyperparams: what ``inject_hyperparams`` may schedule, with values.
      static: further arguments, by the names the transformation publishes.
      inside_multi_steps: "right" if the link inside ``optax.MultiSteps`` gives the
        update of the mean gradient, "refused" if it raises there.
    """

    make: Callable[..., optax.GradientTransformation]
    hyperparams: dict[str, float]
    static: dict[str, Any] = dataclasses.field(default_factory=dict)
    inside_multi_steps: str = "right"

    def build(self):
        return with_extra_args(self.make(**self.hyperparams, **self.static))


def _reference_link(rate: float) -> optax.GradientTransformationExtraArgs:
    """Takes the gradient again, a little further on; shows how a link refuses."""

    def update(updates, state, params=None, *, grad_fn=None, grad=None, **extra_args):
        if grad_fn is None or grad is None:
            raise ValueError("reference_link: call update(..., grad_fn=..., grad=...).")
        pairs = zip(jax.tree.leaves(updates), jax.tree.leaves(grad), strict=True)
        if not all(ours is theirs for ours, theirs in pairs):
            raise ValueError("reference_link: put it first, outside MultiSteps.")
        ahead = jax.tree.map(
            lambda p, u: (p - rate * u).astype(p.dtype), params, updates
        )
        return grad_fn(ahead), state

    return optax.GradientTransformationExtraArgs(
        lambda params: optax.EmptyState(), update
    )


ROWS = {
    "optax.adam": Row(optax.adam, {"learning_rate": 0.1}),
    "optax.sgd": Row(optax.sgd, {"learning_rate": 0.1, "momentum": 0.9}),
    "reference_link": Row(_reference_link, {"rate": 0.1}, inside_multi_steps="refused"),
    "gradient_norm_penalty": Row(
        sharpness.gradient_norm_penalty,
        {"alpha": 0.8, "radius": 0.1},
        {"adaptive": False, "normalize_reference": False},
        inside_multi_steps="refused",
    ),
    "sam": Row(sharpness.sam, {"rho": 0.1}, inside_multi_steps="refused"),
    "asam": Row(sharpness.asam, {"rho": 0.5}, inside_multi_steps="refused"),
    "look_sam": Row(
        sharpness.look_sam,
        {"rho": 0.1, "strength": 0.7},
        {"every": 2},
        inside_multi_steps="refused",
    ),
    "periodic": Row(
        sharpness.periodic,
        {},
        {"transformation": sharpness.sam(0.1), "every": 2},
        inside_multi_steps="refused",
    ),
    "hybrid": Row(
        sharpness.hybrid,
        {"probability": 0.5},
        {"transformation": sharpness.sam(0.1)},
        inside_multi_steps="refused",
    ),
    "scale_by_fishleg": Row(
        optimizers.scale_by_fishleg,
        {"damping": 0.3, "aux_step": 0.2},
        {"pre_aux_steps": 2},
    ),
    "fishleg": Row(
        optimizers.fishleg,
        {"learning_rate": 0.5, "damping": 0.3, "momentum": 0.5, "weight_decay": 0.01},
        {"pre_aux_steps": 2, "update_aux_every": 3},
    ),
    "fishleg by Adam": Row(
        optimizers.fishleg,
        {"learning_rate": 0.1, "damping": 0.3, "aux_step": 0.01, "init_scale": 0.5},
        {"aux_mode": "adam", "step": "fixed", "white_directions": 0},
    ),
    "annealed_gradient_noise": Row(
        optimizers.annealed_gradient_noise, {"eta": 0.3, "gamma": 0.55}
    ),
    "running_median": Row(optimizers.running_median, {}, {"window": 3}),
    "sgld": Row(
        optimizers.sgld,
        {"step_size": 0.01, "temperature": 0.5, "prior_precision": 1.0},
        {"num_data": 16},
    ),
    "psgld": Row(
        optimizers.psgld,
        {"step_size": 0.01, "temperature": 0.5, "prior_precision": 1.0},
        {"num_data": 16, "eps": 0.1},
    ),
    "scale_by_power": Row(optimizers.scale_by_power, {"alpha": 1.2}),
}

rows = pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)


def _apply(params, x):
    return jnp.tanh(x @ params["w"]) @ params["v"]


OBJECTIVE = Objective(plain(_apply), Gaussian())


def _params(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 2)
    return {
        "w": jax.random.normal(keys[0], (8, 16), dtype) / 3,
        "v": jax.random.normal(keys[1], (16, 8), dtype) / 4,
    }


def _batch(dtype=jnp.float32, seed=1):
    keys = jax.random.split(jax.random.key(seed), 2)
    return tuple(jax.random.normal(key, (16, 8), dtype) for key in keys)


def _everything(params, batch):
    """Gradient and every extra argument that the suite passes."""

    def value_fn(at, *, obj_fn=None, grad_fn=None, fisher_vp=None, key=None):
        return OBJECTIVE.loss(at, (), batch)[0]

    value, grad = jax.value_and_grad(value_fn)(params)
    return grad, {
        "value": value,
        "grad": grad,
        "value_fn": value_fn,
        "obj_fn": value_fn,
        "grad_fn": jax.grad(value_fn),
        "fisher_vp": GaussNewton(OBJECTIVE, params, (), batch),
        "key": jax.random.key(0),
    }


def _step(tx, params, state, batch, **more):
    grad, extra = _everything(params, batch)
    updates, state = tx.update(grad, state, params, **extra, **more)
    return optax.apply_updates(params, updates), state


@rows
def test_jit_gives_the_same_in_one_trace(row):
    tx = row.build()
    step = jax.jit(lambda p, s, b: _step(tx, p, s, b))
    params = slow = _params()
    state = slow_state = tx.init(params)
    for seed in range(3):
        slow, slow_state = _step(tx, slow, slow_state, _batch(seed=seed))
        params, state = step(params, state, _batch(seed=seed))
    # Links that return gradients climb here at rate 1: parameters of 10 after 3 steps.
    chex.assert_trees_all_close(params, slow, rtol=1e-5, atol=5e-5)
    chex.assert_trees_all_close(state, slow_state, rtol=1e-5, atol=5e-5)
    assert step._cache_size() == 1


@rows
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dtypes_and_shapes_stay(row, dtype):
    tx = row.build()
    params = _params(dtype)
    state = tx.init(params)
    grad, extra = _everything(params, _batch(dtype))
    updates, new = tx.update(grad, state, params, **extra)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(new, state)
    chex.assert_tree_all_finite(updates)


@rows
def test_state_passes_through_cond_and_scan(row):
    tx = row.build()
    params = _params()
    state = tx.init(params)

    def body(carry, batch):
        carry = jax.lax.cond(
            carry[2] % 2 == 0,
            lambda c: (*_step(tx, c[0], c[1], batch), c[2] + 1),
            lambda c: (c[0], c[1], c[2] + 1),
            carry,
        )
        return carry, ()

    batches = jax.tree.map(lambda a, b: jnp.stack([a, b]), _batch(), _batch())
    (there, _, count), _ = jax.lax.scan(body, (params, state, 0), batches)
    once, _ = _step(tx, params, state, _batch())
    assert count == 2
    chex.assert_trees_all_close(there, once, rtol=1e-5, atol=1e-6)


@rows
def test_unknown_extra_arguments_are_dropped(row):
    tx = row.build()
    params = _params()
    known, _ = _step(tx, params, tx.init(params), _batch())
    more, _ = _step(tx, params, tx.init(params), _batch(), nobody_knows_this=object())
    chex.assert_trees_all_equal(known, more)


@rows
def test_inject_hyperparams(row):
    static = tuple(row.static)
    for room in (optimizers, sharpness):
        if row.make.__module__.startswith(room.__name__):
            assert set(static) <= set(room.static_args(row.make))
            static = room.static_args(row.make)
    factory = optax.inject_hyperparams(row.make, static_args=static)
    schedule = {
        name: optax.constant_schedule(value) for name, value in row.hyperparams.items()
    }
    params = _params()
    expected, _ = _step(row.build(), params, row.build().init(params), _batch())
    for values in (row.hyperparams, schedule):
        tx = factory(**values, **row.static)
        state = tx.init(params)
        step = jax.jit(lambda p, s, b, tx=tx: _step(tx, p, s, b))
        got, state = step(params, state, _batch())
        step(got, state, _batch())
        chex.assert_trees_all_close(got, expected, rtol=1e-5, atol=1e-6)
        assert step._cache_size() == 1
        assert set(state.hyperparams) >= set(row.hyperparams)


@rows
def test_abstract_init_has_the_real_structure(row):
    tx = row.build()
    abstract = jax.eval_shape(tx.init, _params())
    chex.assert_trees_all_equal_shapes_and_dtypes(abstract, tx.init(_params()))


@rows
def test_sharded_params_give_the_same(row):
    tx = row.build()
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    spread = NamedSharding(mesh, P("d"))
    params = _params()
    there = jax.device_put(params, spread)
    # init runs where the parameters are; a sharded state follows them.
    state = jax.jit(tx.init)(there)
    step = jax.jit(lambda p, s, b: _step(tx, p, s, b))
    there, _ = step(there, state, jax.device_put(_batch(), spread))
    here, _ = step(params, tx.init(params), _batch())
    chex.assert_trees_all_close(there, here, rtol=1e-5, atol=1e-6)


@rows
def test_checkpoint_round_trip(row, tmp_path):
    tx = row.build()
    params, state = _step(tx, _params(), tx.init(_params()), _batch())
    saved = {"params": params, "state": state}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "here", saved)
        checkpointer.wait_until_finished()
        like = jax.tree.map(ocp.utils.to_shape_dtype_struct, saved)
        restored = checkpointer.restore(tmp_path / "here", like)
    chex.assert_trees_all_equal(restored, saved)
    one, _ = _step(tx, params, state, _batch(seed=2))
    two, _ = _step(tx, restored["params"], restored["state"], _batch(seed=2))
    chex.assert_trees_all_equal(one, two)


def _two_mini_steps(tx, params):
    state = tx.init(params)
    for seed in (1, 2):
        grad, extra = _everything(params, _batch(seed=seed))
        updates, state = tx.update(grad, state, params, **extra)
    return updates


@rows
def test_inside_multi_steps_right_or_refused_and_right_outside(row):
    params = _params()
    inside = with_extra_args(optax.MultiSteps(row.build(), 2))
    if row.inside_multi_steps == "refused":
        with pytest.raises(ValueError, match="MultiSteps"):
            _two_mini_steps(inside, params)
    else:
        grads = [_everything(params, _batch(seed=seed))[0] for seed in (1, 2)]
        mean = jax.tree.map(lambda a, b: (a + b) / 2, *grads)
        tx = row.build()
        # The extra arguments are those of the mini-step that ends the sum.
        _, extra = _everything(params, _batch(seed=2))
        expected, _ = tx.update(mean, tx.init(params), params, **extra)
        chex.assert_trees_all_close(
            _two_mini_steps(inside, params), expected, rtol=1e-5, atol=1e-6
        )
    # Outside: the link runs at every mini-step, what follows at every second.
    outside = optax.chain(
        row.build(), with_extra_args(optax.MultiSteps(optax.sgd(1.0), 2))
    )
    tx = row.build()
    state, parts = tx.init(params), []
    for seed in (1, 2):
        grad, extra = _everything(params, _batch(seed=seed))
        updates, state = tx.update(grad, state, params, **extra)
        parts.append(updates)
    mean = jax.tree.map(lambda a, b: -(a + b) / 2, *parts)
    chex.assert_trees_all_close(
        _two_mini_steps(outside, params), mean, rtol=1e-5, atol=1e-6
    )


def _broken_dtype():
    cast = lambda u, s, p=None: (optax.tree.cast(u, jnp.float32), s)
    return optax.GradientTransformation(lambda p: (), cast)


def _broken_state():
    grow = lambda u, s, p=None: (u, jnp.append(s, 1.0))
    return optax.GradientTransformation(lambda p: jnp.zeros(1), grow)


@pytest.mark.parametrize("make", [_broken_dtype, _broken_state])
def test_the_contract_catches_what_breaks_it(make):
    with pytest.raises(AssertionError):
        test_dtypes_and_shapes_stay(Row(make, {}), "bfloat16")


def test_every_row_is_finite_on_a_zero_gradient():
    params = jax.tree.map(jnp.zeros_like, _params())
    for row in ROWS.values():
        tx = row.build()
        new, _ = _step(tx, params, tx.init(params), _batch())
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(new))
