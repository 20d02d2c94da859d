"""The step over every optax transformation whose ``update`` takes more arguments."""

import ast
import inspect
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

from jaxlab.likelihoods import Gaussian
from jaxlab.objective import Objective, plain
from jaxlab.training import create_state, make_train_step

PASSED = {"value", "grad", "value_fn", "obj_fn", "grad_fn", "fisher_vp", "key"}

TAKERS = {
    "backtracking": lambda: optax.chain(
        optax.sgd(1.0), optax.scale_by_backtracking_linesearch(5)
    ),
    "zoom": lambda: optax.chain(optax.sgd(1.0), optax.scale_by_zoom_linesearch(5)),
    "lbfgs": lambda: optax.lbfgs(),
    "polyak": lambda: optax.polyak_sgd(),
    "scale_by_polyak": lambda: optax.chain(optax.scale_by_polyak(), optax.scale(-0.1)),
    "plateau": lambda: optax.chain(optax.sgd(0.05), contrib.reduce_on_plateau()),
    "momo": lambda: contrib.momo(),
    "momo_adam": lambda: contrib.momo_adam(),
    "sophia": lambda: contrib.sophia(1e-2),
    "hutchinson": lambda: optax.chain(
        contrib.hutchinson_estimator_diag_hessian(), optax.scale(-0.05)
    ),
    "sam": lambda: contrib.sam(optax.sgd(0.05), optax.sgd(0.01)),
    "opaque_sam": lambda: contrib.sam(
        optax.sgd(0.05), optax.sgd(0.01), opaque_mode=True
    ),
}

# Take nothing by name, hand everything on to what they wrap.
WRAPPERS = {
    "multi_steps": lambda tx: optax.MultiSteps(tx, 2),
    "masked": lambda tx: optax.chain(
        optax.masked(tx, {"w": True, "rest": False}),
        optax.masked(optax.sgd(0.05), {"w": False, "rest": True}),
    ),
    "partition": lambda tx: optax.partition(
        {"a": tx, "b": optax.sgd(0.05)}, {"w": "a", "rest": "b"}
    ),
    "inject": lambda tx: optax.chain(
        tx, optax.inject_hyperparams(optax.scale)(step_size=1.0)
    ),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
}


def _apply(params, x):
    return x @ params["w"] + params["rest"]["b"][None]


def _start(tx):
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "w": jax.random.normal(keys[0], (4, 2)),
        "rest": {"b": jnp.zeros(2), "empty": {}},
    }
    x = jax.random.normal(keys[1], (16, 4))
    batch = (x, x @ jax.random.normal(keys[2], (4, 2)) + 1.0)
    objective = Objective(plain(_apply), Gaussian())
    return objective, create_state(jax.random.key(1), params, tx), batch


@pytest.mark.parametrize("name", TAKERS)
def test_every_taker_learns_in_one_trace(name):
    tx = TAKERS[name]()
    objective, state, batch = _start(tx)
    step = make_train_step(objective, tx)
    losses = []
    for _ in range(8):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert np.isfinite(losses).all()
    assert step._cache_size() == 1
    if name != "hutchinson":  # an estimator of curvature, no optimizer
        assert losses[-1] < losses[0]


def _needs_everything():
    """A link of our kind: takes every argument and uses every one."""

    def update(updates, state, params=None, **extra):
        assert set(extra) >= PASSED
        moved = jax.tree.map(lambda p, u: p - 0.01 * u, params, updates)
        again = extra["grad_fn"](moved)
        curved = extra["fisher_vp"](updates)
        size = extra["fisher_vp"].quadratic_form(updates)
        value = extra["value_fn"](moved) + extra["value"] + size
        noise = jax.random.normal(extra["key"])
        mix = lambda g, f: -0.05 * g + 0.0 * (f + value + noise)
        return jax.tree.map(mix, again, curved), state

    return optax.GradientTransformationExtraArgs(lambda p: (), update)


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_link_that_uses_all_works_inside_every_wrapper(name):
    tx = WRAPPERS[name](_needs_everything())
    objective, state, batch = _start(tx)
    step = make_train_step(objective, tx)
    losses = []
    for _ in range(8):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0]
    assert step._cache_size() == 1


def test_no_taker_of_optax_is_missing_here():
    """Reads optax's sources: any ``update`` that names an argument of ours."""
    found = set()
    for module in (optax, contrib):
        for name, function in inspect.getmembers(module, inspect.isfunction):
            tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
            for node in ast.walk(tree):
                if isinstance(node, ast.FunctionDef) and "update" in node.name:
                    arguments = [*node.args.args[3:], *node.args.kwonlyargs]
                    if {a.arg for a in arguments} & PASSED:
                        found.add(name)
    known = {
        "scale_by_backtracking_linesearch",
        "scale_by_zoom_linesearch",
        "scale_by_polyak",
        "reduce_on_plateau",
        "momo",
        "momo_adam",
        "hutchinson_estimator_diag_hessian",
        "sam",
    }
    assert found - known == set(), "add it to TAKERS"
    assert len(found) >= 6, "the search finds nothing any more: mend it"
