"""Calls of the room sharpness."""

import pathlib
import runpy

import jax
import jax.numpy as jnp
import optax

from jaxlab import sharpness

_HARNESS = runpy.run_path(str(pathlib.Path(__file__).with_name("harness.py")))
call, transform = _HARNESS["call"], _HARNESS["transform"]
_ramp = _HARNESS["ramp"]


KEY = jax.random.key(0)
PARAMS = {"w": _ramp(3, 2), "b": _ramp(2)}
GRADS = {"w": _ramp(3, 2, scale=0.5), "b": _ramp(2, scale=0.5)}
ENDS = {"w": _ramp(2, 3, 2), "b": _ramp(2, 2)}
COEFFICIENTS = jnp.array([0.25, 0.75])
LOGITS, PAST = _ramp(4, 3), _ramp(4, 3, scale=0.5)
BUFFER = sharpness.init_trajectory_buffer(num_examples=6, num_classes=3, lag=1)
ROWS = jnp.array([0, 5, 2, 3])
PAIRS = {"w": sharpness.LoRAPair(_ramp(3, 1), _ramp(1, 2)), "b": optax.MaskedNode()}
BATCH = _ramp(4, 3)


def _loss(params):
    return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))


def _losses(params, x):
    return jnp.sum(jnp.tanh(x @ params["w"] + params["b"]) ** 2, axis=1)


def _mean_loss(params, x):
    return jnp.mean(_losses(params, x))


def _two_loss(features, head, batch):
    return jnp.mean((jnp.tanh(batch @ features["w"]) @ head["b"]) ** 2)


def _stats(params, state, inputs, *, key, train):
    return inputs, jax.tree.map(lambda s: 0.5 * s + 0.5 * inputs.mean(axis=0), state)


GRAD_FN = jax.grad(_loss)
EXTRA = (("grad_fn", GRAD_FN), ("key", KEY))


def _link(make, **hyperparameters):
    """Passes the gradient that it was given as ``grad`` too, as the step does."""

    def update(params, updates, **hyperparameters):
        tx = make(**hyperparameters)
        state = tx.init(params)
        return tx.update(
            updates, state, params, grad_fn=GRAD_FN, grad=updates, key=KEY
        )[0]

    made = transform(make, PARAMS, **hyperparameters)
    return _HARNESS["Call"](
        make,
        update,
        made.arguments,
        "updates",
        ("params", "updates"),
        ("transformation",),
        (),
        make.__name__,
    )


def _esam(key, params, x, radius, weight_fraction, example_fraction):
    f = sharpness.esam_value_and_grad(
        _losses,
        radius=radius,
        weight_fraction=weight_fraction,
        example_fraction=example_fraction,
    )
    return f(key, params, x)[1]


def _full_batch(params, x, num_micro_batches, alpha, radius):
    return sharpness.full_batch_value_and_grad(
        _mean_loss, num_micro_batches=num_micro_batches, alpha=alpha, radius=radius
    )(params, x)[1]


def _micro_batch(params, x, num_micro_batches, alpha, radius):
    return sharpness.micro_batch_value_and_grad(
        _mean_loss, num_micro_batches=num_micro_batches, alpha=alpha, radius=radius
    )(params, x)[1]


def _m_sharpness(params, x, group_size, alpha, radius, how):
    return sharpness.m_sharpness_value_and_grad(
        _mean_loss, group_size=group_size, alpha=alpha, radius=radius, how=how
    )(params, x)[1]


def _gnp(params, x, alpha, radius):
    f = sharpness.gnp_value_and_grad(_mean_loss, alpha=alpha, radius=radius)
    return f(params, x)[1]


def _momentum(params, x, radius, decay):
    method = sharpness.momentum_sam_value_and_grad(
        _mean_loss, radius=radius, decay=decay
    )
    state = method.update(params, method.init(params), x)[2]
    return method.update(params, state, x)[1]


def _pof(key, features, head, batch, sampling_range, num_grid):
    f = sharpness.pof_value_and_grad(
        _two_loss, sampling_range=sampling_range, num_grid=num_grid
    )
    return f(key, features, head, batch, batch)[1]


def _lora_grad(adapters, params, alpha, radius):
    f = sharpness.regularised_lora_value_and_grad(_loss, alpha=alpha, radius=radius)
    return f(adapters, params)[1]


def _split_and_join(params):
    split = sharpness.split_head(params, lambda path: path.startswith("b"))
    return sharpness.join_head(*split)


def _split(params):
    return sharpness.split_head(params, lambda path: path.startswith("b"))


def _subspace_init(key, num_endpoints):
    init = lambda key: {"w": jax.random.normal(key, (3,))}
    return sharpness.subspace_init(key, init, num_endpoints=num_endpoints)


GRADIENT = {"alpha": 0.5, "radius": 0.1}
OPTIONS = {"weight": 0.3, "temperature": 2.0}
W = jnp.ones(4)
X = {"params": PARAMS, "x": BATCH, "like": "params"}

CALLS = [
    _link(sharpness.asam, rho=0.5),
    _link(sharpness.sam, rho=0.1, eps=1e-12),
    _link(sharpness.gradient_norm_penalty, alpha=0.5, radius=0.1, adaptive=False),
    _link(sharpness.look_sam, rho=0.1, every=2, strength=0.7),
    _link(sharpness.periodic, transformation=sharpness.sam(0.1), every=2),
    _link(sharpness.hybrid, transformation=sharpness.sam(0.1), probability=0.5),
    call(sharpness.bezier_coefficients, 0.5),
    call(
        sharpness.bezier_point,
        PARAMS,
        GRADS,
        PARAMS,
        0.5,
        like="start",
        same=("start", "end", "bend"),
    ),
    call(sharpness.cosine_squared, ENDS, ENDS, same=("first", "second")),
    call(
        sharpness.esam_value_and_grad,
        key=KEY,
        radius=0.1,
        weight_fraction=0.6,
        example_fraction=0.5,
        use=_esam,
        **X,
    ),
    call(
        sharpness.full_batch_value_and_grad,
        num_micro_batches=2,
        use=_full_batch,
        **GRADIENT,
        **X,
    ),
    call(
        sharpness.micro_batch_value_and_grad,
        num_micro_batches=2,
        use=_micro_batch,
        **GRADIENT,
        **X,
    ),
    call(
        sharpness.m_sharpness_value_and_grad,
        group_size=2,
        how="scan",
        use=_m_sharpness,
        **GRADIENT,
        **X,
    ),
    call(sharpness.gnp_value_and_grad, use=_gnp, **GRADIENT, **X),
    call(
        sharpness.gnp_gradient,
        GRAD_FN,
        PARAMS,
        grads=GRADS,
        **GRADIENT,
        like="params",
        same=("params", "grads"),
    ),
    call(sharpness.gnp_gradient_exact, _loss, PARAMS, penalty=0.5, like="params"),
    call(
        sharpness.head_line_search,
        _loss,
        PARAMS,
        GRADS,
        initial_step=1.0,
        num_grid=4,
        same=("head", "direction"),
    ),
    call(sharpness.in_window, 5, start=3, end=8),
    call(sharpness.init_teacher, PARAMS, skip=("dtype",)),
    call(sharpness.init_trajectory_buffer, num_examples=6, num_classes=3, lag=1),
    call(
        sharpness.join_head, PARAMS, use=_split_and_join, like="params", skip=("dtype",)
    ),
    call(sharpness.line_coefficients, 0.25),
    call(
        sharpness.line_point,
        PARAMS,
        GRADS,
        0.25,
        like="start",
        same=("start", "end"),
    ),
    call(sharpness.lora_apply, _ramp(4, 3), PARAMS["w"], PAIRS["w"], scale=2.0),
    call(sharpness.lora_balance, PAIRS, like="adapters"),
    call(sharpness.lora_init, KEY, PARAMS, rank=1),
    call(
        sharpness.lora_merge,
        PARAMS,
        PAIRS,
        scale=2.0,
        like="params",
        skip=("params:dtype",),
    ),
    call(
        sharpness.mesa_loss,
        jnp.array(2.0),
        LOGITS,
        PAST,
        active=True,
        weights=W,
        **OPTIONS,
        same=("logits", "ema_logits"),
    ),
    call(
        sharpness.saf_loss,
        jnp.array(2.0),
        LOGITS,
        PAST,
        known=W > 0,
        weights=W,
        **OPTIONS,
        same=("logits", "past_logits"),
    ),
    call(
        sharpness.trajectory_loss,
        LOGITS,
        PAST,
        temperature=2.0,
        weights=W,
        same=("logits", "past_logits"),
    ),
    call(sharpness.midpoint, ENDS),
    call(
        sharpness.momentum_sam_value_and_grad,
        radius=0.1,
        decay=0.9,
        use=_momentum,
        **X,
    ),
    call(
        sharpness.perturb,
        PARAMS,
        GRADS,
        radius=0.1,
        adaptive=False,
        like="params",
        same=("params", "direction"),
    ),
    call(sharpness.pof_perturb, KEY, _loss, PARAMS, sampling_range=0.5, num_grid=4),
    call(
        sharpness.pof_value_and_grad,
        KEY,
        {"w": PARAMS["w"]},
        {"b": PARAMS["b"]},
        BATCH,
        0.5,
        4,
        use=_pof,
        like="features",
    ),
    call(
        sharpness.project_conflicting,
        PARAMS,
        GRADS,
        like="grads",
        same=("grads", "reference_grads"),
    ),
    call(sharpness.write_trajectory, BUFFER, ROWS, LOGITS, epoch=0),
    call(sharpness.read_trajectory, BUFFER, ROWS, epoch=1),
    call(
        sharpness.recompute_batch_stats,
        _stats,
        (),
        [(BATCH, None), (BATCH, None)],
        state={"mean": jnp.zeros(3)},
        momentum=0.5,
        skip=("state:dtype",),  # leaves that are not floating stay as they are
    ),
    call(
        sharpness.regularised_lora_value_and_grad,
        PAIRS,
        PARAMS,
        use=_lora_grad,
        like="adapters",
        **GRADIENT,
    ),
    call(sharpness.sample_layerwise, KEY, ENDS),
    call(sharpness.sample_simplex, KEY, 3),
    call(sharpness.simplex_point, ENDS, COEFFICIENTS),
    call(sharpness.split_head, PARAMS, use=_split, skip=("dtype",)),
    call(sharpness.subspace_init, KEY, 2, use=_subspace_init),
    call(sharpness.subspace_loss, _loss, ENDS, COEFFICIENTS, beta=0.5),
    call(
        sharpness.update_teacher,
        PARAMS,
        GRADS,
        decay=0.5,
        skip=("dtype",),
        same=("teacher", "params"),
    ),
]
