"""What FishLeg refuses, and in which words."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlab.curvature import ggn_operator
from jaxlab.likelihoods import Gaussian
from jaxlab.objective import Objective, plain
from jaxlab.optimizers import (
    LevenbergMarquardt,
    fishleg,
    fishleg_auxiliary_gradient,
    fishleg_auxiliary_loss,
    fishleg_group_step,
    fishleg_warm_start,
    inverse_fisher,
    q_apply,
    q_diag,
    q_init,
    scale_by_fishleg,
    static_args,
)

pytestmark = pytest.mark.untyped

PARAMS = {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}
IDENTITY = lambda v: v
KEY = jax.random.key(0)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (
            {"aux_mode": "newton"},
            r"aux_mode must be \"group\" or \"adam\", got 'newton'",
        ),
        ({"step": "line"}, r"step must be \"quadratic\" or \"fixed\""),
        ({"damping": 0.0}, r"damping must be finite and > 0, got 0\.0"),
        ({"damping": float("nan")}, r"damping must be finite and > 0, got nan"),
        ({"damping": LevenbergMarquardt(factor=2.0)}, r"0 < factor < 1"),
        ({"aux_step": 1.5}, r"aux_step must be in \(0, 1\)"),
        ({"init_scale": -1.0}, r"init_scale must be finite and > 0"),
        ({"white_directions": -1}, r"white_directions must be an integer >= 0"),
        ({"gradient_directions": 0.5}, r"gradient_directions must be an integer"),
        ({"aux_mode": "adam", "combine": True}, r"combine belongs to"),
        ({"combine": 0}, r"combine must be True or False, got 0"),
        ({"gradient_directions": 0, "white_directions": 0}, r"at least one direction"),
        ({"precondition": True}, r"belong to aux_mode=\"adam\""),
        ({"aux_optimizer": optax.sgd(0.1)}, r"belong to aux_mode=\"adam\""),
        (
            {"aux_mode": "adam", "aux_optimizer": optax.sgd(0.1), "aux_step": 0.1},
            r"leave aux_step out",
        ),
    ],
)
def test_options(options, match):
    with pytest.raises(ValueError, match=match):
        scale_by_fishleg(**options)


def test_options_of_the_whole_optimizer():
    with pytest.raises(ValueError, match=r"step=\"fixed\" needs a learning_rate"):
        fishleg(step="fixed")
    with pytest.raises(ValueError, match=r"weight_decay must be >= 0"):
        fishleg(weight_decay=-1.0)
    with pytest.raises(ValueError, match=r"put the decay into the loss"):
        fishleg(weight_decay=0.1, damping=LevenbergMarquardt())
    with pytest.raises(ValueError, match=r"LevenbergMarquardt needs step"):
        fishleg(0.1, step="fixed", damping=LevenbergMarquardt())


def test_arguments_of_update():
    optimizer = scale_by_fishleg()
    state = optimizer.init(PARAMS)
    update = lambda **extra: optimizer.update(PARAMS, state, PARAMS, **extra)
    with pytest.raises(ValueError, match=r"needs fisher_vp=: call update"):
        update(key=KEY)
    with pytest.raises(ValueError, match=r"needs key= for its 1 white direction"):
        update(fisher_vp=IDENTITY)
    with pytest.raises(ValueError, match=r"with params"):
        optimizer.update(PARAMS, state, fisher_vp=IDENTITY, key=KEY)
    streamed = ggn_operator(
        lambda p, x: x @ p["kernel"], Gaussian(), PARAMS, lambda: iter([])
    )
    with pytest.raises(ValueError, match=r"streams its data from the host"):
        update(fisher_vp=streamed, key=KEY)
    adaptive = scale_by_fishleg(damping=LevenbergMarquardt())
    with pytest.raises(ValueError, match=r"needs value= and value_fn="):
        adaptive.update(
            PARAMS, adaptive.init(PARAMS), PARAMS, fisher_vp=IDENTITY, key=KEY
        )
    for other, match in (
        ({"weights": jnp.ones((3, 2))}, r"must have the leaves of the params"),
        ({"kernel": jnp.ones((4, 2)), "bias": jnp.ones(2)}, r"4 x 2, got leaves of"),
    ):
        with pytest.raises(ValueError, match=match):
            optimizer.update(other, state, other, fisher_vp=IDENTITY, key=KEY)


def test_blocks():
    with pytest.raises(ValueError, match=r"must be one of \['kronecker', .*'band'"):
        q_init(PARAMS, rule={"kernel": "band"})
    with pytest.raises(ValueError, match=r"two axes at least, got shape \(2,\)"):
        q_init(PARAMS, rule=lambda path, shape: "kronecker")
    with pytest.raises(ValueError, match=r"hold at least one array"):
        q_init({})
    with pytest.raises(ValueError, match=r"scale must be finite and > 0"):
        q_init(PARAMS, scale=0.0)
    with pytest.raises(ValueError, match=r"max_size must be an integer >= 1"):
        q_init(PARAMS, max_size=0)
    with pytest.raises(ValueError, match=r"have no group step"):
        scale_by_fishleg(rule={"kernel": "scaled"}).init(PARAMS)


def test_functions_of_the_inverse():
    q, other = q_init(PARAMS), {"v": jnp.ones(2)}
    for call in (
        lambda: q_apply(q, other),
        lambda: q_diag(q, other),
        lambda: fishleg_auxiliary_loss(q, other, IDENTITY, damping=0.1),
        lambda: fishleg_auxiliary_gradient(q, other, IDENTITY, damping=0.1),
        lambda: fishleg_group_step(KEY, q, [other], IDENTITY, damping=0.1),
    ):
        with pytest.raises(ValueError, match=r"must have the leaves of the params"):
            call()
    with pytest.raises(ValueError, match=r"normalize must be"):
        fishleg_auxiliary_gradient(q, PARAMS, IDENTITY, damping=0.1, normalize="z")
    step = lambda key, grads, **more: fishleg_group_step(
        key, q, grads, IDENTITY, damping=0.1, **more
    )
    with pytest.raises(ValueError, match=r"at least one gradient or white"):
        step(KEY, [], white_directions=0)
    with pytest.raises(ValueError, match=r"needs a key"):
        step(None, [PARAMS])
    with pytest.raises(ValueError, match=r"give like="):
        step(KEY, [])
    with pytest.raises(ValueError, match=r"combine must be True or False"):
        step(KEY, [PARAMS], combine="yes")
    scaled = q_init(PARAMS, rule={"kernel": "scaled"})
    with pytest.raises(ValueError, match=r"have no group step"):
        fishleg_group_step(KEY, scaled, [PARAMS], IDENTITY, damping=0.1)


def test_fitting():
    fit = lambda **more: inverse_fisher(KEY, IDENTITY, PARAMS, **more)
    with pytest.raises(ValueError, match=r"damping must be finite and > 0"):
        fit(damping=-0.1)
    with pytest.raises(ValueError, match=r"white_directions must be an integer >= 1"):
        fit(damping=0.1, white_directions=0)
    streamed = ggn_operator(
        lambda p, x: x @ p["kernel"], Gaussian(), PARAMS, lambda: iter([])
    )
    with pytest.raises(ValueError, match=r"streams its data from the host"):
        inverse_fisher(KEY, streamed, PARAMS, damping=0.1)
    objective = Objective(plain(lambda p, x: x @ p["kernel"]), Gaussian())
    warm = lambda tx, batches: fishleg_warm_start(
        KEY, tx.init(PARAMS), PARAMS, batches, objective=objective
    )
    with pytest.raises(ValueError, match=r"at least one batch"):
        warm(fishleg(), [])
    with pytest.raises(ValueError, match=r"got 0 of FishLeg"):
        warm(optax.adam(0.1), [])
    with pytest.raises(ValueError, match=r"aux_mode='group'"):
        warm(fishleg(aux_mode="adam"), [])


def test_static_args_wants_the_function():
    with pytest.raises(ValueError, match=r"static_args\(fishleg\)"):
        static_args(fishleg())


def test_numpy_goes_in():
    params = {"kernel": np.ones((3, 2), np.float32)}
    found = q_apply(q_init(params, scale=16.0), params)
    np.testing.assert_allclose(found["kernel"], 16.0, rtol=1e-6)
