"""The page of recipes, run block by block; and every kind of parameter tree."""

import pathlib
import runpy

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

from jaxlab.likelihoods import Categorical
from jaxlab.objective import Objective, plain
from jaxlab.training import create_state, from_nnx, make_train_step

ROOT = pathlib.Path(__file__).parents[2]
PAGES = runpy.run_path(str(ROOT / "tests" / "pages.py"))
PAGE = ROOT / "docs" / "recipes.md"


def test_every_recipe_of_the_page_learns():
    names, count = PAGES["run"](PAGE)
    assert count == 5
    losses = {name: loss for name, loss in names.items() if name.startswith("loss_")}
    assert set(losses) == {"loss_step", "loss_plain", "loss_nnx", "loss_linen"}
    # Ten L-BFGS steps fit 64 separable points far below the first loss of about 1.1.
    assert max(losses.values()) < 0.2, losses
    # The same model from the same seeds: two loops, one result.
    assert abs(losses["loss_step"] - losses["loss_nnx"]) < 1e-3


def test_the_page_on_monarch_matrices_runs():
    names, count = PAGES["run"](PAGE.with_name("monarch.md"))
    assert count == 4
    assert names["error"](names["fitted"]) < 0.5 * names["error"](names["nearest"])


def _nnx_state():
    model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    graph, params = nnx.split(model, nnx.Param)
    return params, lambda p, x: nnx.merge(graph, p)(x)


def _linen():
    model = linen.Dense(3)
    params = model.init(jax.random.key(0), jnp.ones((1, 4)))
    return params, model.apply


def _equinox():
    model = eqx.nn.Linear(4, 3, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)
    return params, lambda p, x: jax.vmap(eqx.combine(p, static))(x)


def _dict():
    params = {"w": jnp.zeros((4, 3)), "b": jnp.zeros((1, 3)), "none": None}
    return params, lambda p, x: x @ p["w"] + p["b"]


@pytest.mark.parametrize("make", [_dict, _nnx_state, _linen, _equinox])
def test_any_tree_of_params_trains(make):
    params, apply_fn = make()
    objective = Objective(plain(apply_fn), Categorical())
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.1))
    state = create_state(jax.random.key(0), params, optimizer)
    step = make_train_step(objective, optimizer)
    x = jax.random.normal(jax.random.key(1), (32, 4))
    batch = (x, jnp.argmax(x[:, :3], axis=1))
    first = objective.loss(params, (), batch)[0]
    for _ in range(20):
        state, metrics = step(state, batch)
    assert metrics["loss"] < 0.7 * first
    assert step._cache_size() == 1
    assert jax.tree.structure(state.params) == jax.tree.structure(params)


class _Noisy(nnx.Module):
    """BatchNorm statistics and two dropouts: all that a model may keep."""

    def __init__(self, rngs):
        self.up = nnx.Linear(4, 16, rngs=rngs)
        self.norm = nnx.BatchNorm(16, rngs=rngs)
        self.drops = nnx.List([nnx.Dropout(0.3, rngs=rngs) for _ in range(2)])
        self.down = nnx.Linear(16, 3, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.up(x)))
        for drop in self.drops:
            x = drop(x)
        return self.down(x)


@pytest.mark.parametrize("rngs", [{"default": 0}, {"params": 0, "dropout": 1}])
def test_nnx_statistics_and_dropout(rngs):
    model = _Noisy(nnx.Rngs(**rngs))
    objective, params, model_state = from_nnx(model, Categorical())
    assert set(model_state) == {"norm"}
    x = jax.random.normal(jax.random.key(1), (32, 4))
    batch = (x, jnp.argmax(x[:, :3], axis=1))
    one, _ = objective.loss(params, model_state, batch, key=jax.random.key(0))
    two, _ = objective.loss(params, model_state, batch, key=jax.random.key(1))
    assert one != two
    optimizer = optax.adam(0.05)
    state = create_state(jax.random.key(0), params, optimizer, model_state=model_state)
    step = make_train_step(objective, optimizer, remat=True)
    for _ in range(40):
        state, _ = step(state, batch)
    assert step._cache_size() == 1
    trained = objective.loss(state.params, state.model_state, batch, train=False)
    untrained = objective.loss(params, model_state, batch, train=False)
    assert trained[0] < 0.5 * untrained[0]
    # Evaluation leaves the statistics alone, training moves them.
    moved = jax.tree.map(jnp.array_equal, trained[1], state.model_state)
    assert all(jax.tree.leaves(moved))
    assert not np.allclose(state.model_state["norm"]["mean"], 0)
    # Back into the module: the same function.
    nnx.update(model, state.params)
    nnx.update(model, state.model_state)
    model.eval()
    assert abs(Categorical().nll(model(x), batch[1]) - trained[0]) < 1e-6


def test_training_noise_without_a_key_is_an_error():
    objective, params, model_state = from_nnx(_Noisy(nnx.Rngs(0)), Categorical())
    batch = (jnp.ones((4, 4)), jnp.zeros(4, jnp.int32))
    with pytest.raises(ValueError, match=r"random streams \['default'\]: pass key="):
        objective.loss(params, model_state, batch)


def test_a_model_without_state_takes_any_and_one_with_state_its_own():
    batch = (jnp.ones((4, 4)), jnp.zeros(4, jnp.int32))
    bare = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    objective, params, _ = from_nnx(bare, Categorical())
    assert objective.loss(params, (), batch)[1] == ()
    objective, params, _ = from_nnx(_Noisy(nnx.Rngs(0)), Categorical())
    with pytest.raises(ValueError, match="model_state=model_state"):
        objective.loss(params, (), batch, key=jax.random.key(0))
