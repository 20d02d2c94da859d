"""Calls of the room optimizers."""

import pathlib
import runpy

import jax
import jax.numpy as jnp
import optax

from jaxlab import optimizers
from jaxlab.likelihoods import Categorical, Gaussian
from jaxlab.objective import Objective, plain
from jaxlab.optimizers import (
    best_response,
    coherence,
    fisher_legendre,
    langevin,
    solutions,
)

_HARNESS = runpy.run_path(str(pathlib.Path(__file__).with_name("harness.py")))
call, transform = _HARNESS["call"], _HARNESS["transform"]
_ramp = _HARNESS["ramp"]


KEY = jax.random.key(0)
PARAMS = {"w": _ramp(3, 2), "b": _ramp(2)}
GRADS = {"w": _ramp(3, 2, scale=0.5), "b": _ramp(2, scale=0.5)}
MANY = {"w": _ramp(5, 3, 2), "b": _ramp(5, 2)}
X = _ramp(6, 3)
BATCH = (X, _ramp(6, 2))
U, RHO = _ramp(2), _ramp(2, scale=0.5)
SPECS = (
    best_response.Hyperparameter("dropout", init=0.25, lo=0.0, hi=0.5),
    best_response.Hyperparameter("holes", init=1, lo=0, hi=4, discrete=True),
)
GATED = best_response.init_gated(KEY, (3, 2), hyperparameters=2)
GATED_CONV = best_response.init_gated(KEY, (3, 3, 1, 2), hyperparameters=2)
LOGITS, LABELS = _ramp(4, 3), jnp.array([0, 2, 1, 1])
ACCURACIES = jnp.array([[1.0, 0.0], [0.5, 1.0]])
LOG_LIKELIHOODS, LOG_PRIOR = -jnp.abs(_ramp(4, 3)), jnp.log(jnp.ones(3) / 3)


def _apply(params, x):
    return jnp.tanh(x @ params["w"]) + params["b"].reshape(1, -1)


OBJECTIVE = Objective(plain(_apply), Gaussian())
Q = fisher_legendre.q_init(PARAMS, scale=0.5)


def _loss(params, x):
    return jnp.mean(_apply(params, x) ** 2)


def _identity(v):
    return v


def _free_loss(params):
    return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))


def _log_density(params):
    return -_free_loss(params)


def _train_loss(params, u, x, key):
    return jnp.mean((_apply(params, x) + u[:, :1]) ** 2)


def _val_loss(params, u, x):
    return jnp.mean((_apply(params, x) + u[:, :1]) ** 2)


def _sgd_step(params, batch):
    return jax.tree.map(lambda p: p - 0.1 * (p - batch.mean()), params), None


def _accuracy(params, task):
    return 1.0 * (params["b"][0] > task.mean())


MOMENTS = coherence.gradient_moments(_loss, PARAMS, X)


def _fishleg_step(make, **hyperparameters):
    def update(params, updates, **hyperparameters):
        tx = make(white_directions=0, **hyperparameters)
        state = tx.init(params)
        vp = lambda v: jax.tree.map(lambda a: 2.0 * a, v)
        return tx.update(updates, state, params, fisher_vp=vp, key=KEY)[0]

    made = transform(make, PARAMS, **hyperparameters)
    return _HARNESS["Call"](
        make,
        update,
        {"params": PARAMS, "updates": GRADS, **hyperparameters},
        "updates",
        ("params", "updates"),
        (),
        (),
        made.name,
    )


def _noise_at(eta, gamma, count):
    return optimizers.gradient_noise_schedule(eta, gamma)(count)


def _step_size_at(scale, count, power):
    return langevin.sgld_step_size(scale, power=power)(count)


def _self_tuning(key, params, u, batch, train_steps, entropy_weight):
    method = best_response.self_tuning(
        _train_loss,
        _val_loss,
        params_optimizer=optax.sgd(0.1),
        u_optimizer=optax.sgd(0.1),
        train_steps=train_steps,
        entropy_weight=entropy_weight,
    )
    return method.step(key, method.init(params, u), batch, batch)[0].params


def _hyperparameter(init, lo, hi):
    made = best_response.Hyperparameter("one", init=init, lo=lo, hi=hi)
    return best_response.unconstrain({}, [made])


def _constrain(u):
    return best_response.constrain(u, SPECS)


def _unconstrain(values):
    return best_response.unconstrain(values, SPECS)


def _auxiliary_gradient(q, u, damping):
    return fisher_legendre.fishleg_auxiliary_gradient(q, u, _identity, damping=damping)


def _warm_start(key, params, batches, damping):
    tx = optimizers.scale_by_fishleg(pre_aux_steps=0)
    state = tx.init(params)
    return fisher_legendre.fishleg_warm_start(
        key, state, params, batches, objective=OBJECTIVE, damping=damping
    ).q


WEIGHTS = jnp.ones(4)
ROWS = {"weights": WEIGHTS}
SIZES = {"steps": 4, "burn_in": 1, "thin": 1}

CALLS = [
    call(optimizers.add_gradient_noise, KEY, GRADS, variance=0.5, like="grads"),
    transform(
        optimizers.annealed_gradient_noise,
        PARAMS,
        extra=(("key", KEY),),
        same=(),  # the parameters are not read
        eta=0.3,
        gamma=0.55,
    ),
    call(optimizers.gradient_noise_schedule, 1.0, 0.55, 3, use=_noise_at),
    # Best responses.
    call(best_response.Hyperparameter, 0.25, 0.0, 0.5, use=_hyperparameter),
    call(best_response.best_response_error, PARAMS, GRADS, same=("response", "exact")),
    call(best_response.constrain, U, use=_constrain),
    call(
        best_response.unconstrain,
        {"dropout": jnp.array(0.25), "holes": jnp.array(2.0)},
        use=_unconstrain,
    ),
    call(
        best_response.gated_conv,
        GATED_CONV,
        _ramp(3, 4, 4, 1),
        _ramp(3, 2),
        strides=2,
        groups=1,
    ),
    call(best_response.gated_linear, GATED, X, _ramp(6, 2)),
    call(best_response.gated_weights, GATED, U),
    call(
        best_response.hyperparameter_gradient,
        KEY,
        _val_loss,
        PARAMS,
        U,
        RHO,
        X,
        entropy_weight=0.01,
        same=("u", "rho"),
    ),
    call(
        best_response.init_gated,
        KEY,
        (3, 2),
        hyperparameters=2,
        gate_scale=0.1,
        use_bias=True,
    ),
    call(
        best_response.perturb_hyperparameters,
        KEY,
        U,
        RHO,
        rows=3,
        shared=False,
        same=("u", "rho"),
    ),
    call(best_response.perturbation_entropy, RHO),
    call(
        best_response.response_gradient,
        KEY,
        _train_loss,
        PARAMS,
        U,
        RHO,
        X,
        same=("u", "rho"),
    ),
    call(
        best_response.self_tuning,
        KEY,
        PARAMS,
        U,
        X,
        1,
        0.01,
        use=_self_tuning,
        like="params",
    ),
    # Coherence.
    call(coherence.coherence_from_moments, MOMENTS, unbiased=False),
    call(
        coherence.gradient_alignment,
        _loss,
        PARAMS,
        X,
        reference=GRADS,
        microbatch=2,
        same=("params", "reference"),
    ),
    call(coherence.gradient_coherence, MANY, unbiased=True),
    call(coherence.gradient_moments, _loss, PARAMS, X, microbatch=2),
    call(coherence.median_of_means, _ramp(6, 2), groups=3, axis=0),
    call(coherence.median_of_means_gradient, _loss, PARAMS, X, groups=3, like="params"),
    call(coherence.per_example_gradients, _loss, PARAMS, X, microbatch=2),
    transform(coherence.running_median, PARAMS, window=3),
    call(
        coherence.winsorized_gradient,
        _loss,
        PARAMS,
        X,
        k=1,
        microbatch=2,
        like="params",
    ),
    call(coherence.winsorized_mean, _ramp(6, 2), k=1, axis=0),
    # FishLeg.
    call(fisher_legendre.describe_blocks, PARAMS, max_size=256),
    _fishleg_step(optimizers.fishleg, learning_rate=0.1, momentum=0.5, damping=0.3),
    _fishleg_step(optimizers.scale_by_fishleg, damping=0.3, pre_aux_steps=2),
    call(
        fisher_legendre.fishleg_auxiliary_gradient,
        Q,
        PARAMS,
        0.5,
        use=_auxiliary_gradient,
    ),
    call(
        fisher_legendre.fishleg_auxiliary_loss,
        Q,
        PARAMS,
        _identity,
        damping=0.5,
        normalize=True,
    ),
    call(
        fisher_legendre.fishleg_group_step,
        KEY,
        Q,
        [PARAMS],
        _identity,
        damping=0.5,
        step=0.25,
        white_directions=1,
    ),
    call(
        fisher_legendre.fishleg_warm_start, KEY, PARAMS, [BATCH], 0.3, use=_warm_start
    ),
    call(
        fisher_legendre.inverse_fisher,
        KEY,
        _identity,
        PARAMS,
        damping=0.5,
        max_steps=3,
        num_probes=2,
        tol=0.01,
    ),
    call(fisher_legendre.q_apply, Q, PARAMS, like="u"),
    call(fisher_legendre.q_dense, Q, PARAMS),
    call(fisher_legendre.q_diag, Q, PARAMS),
    call(fisher_legendre.q_init, PARAMS, scale=10.0, max_size=256),
    # Langevin.
    call(langevin.calibration_error, LOGITS, LABELS, bins=5, **ROWS),
    call(
        langevin.distill_loss,
        LOGITS,
        jax.nn.log_softmax(LOGITS[::-1]),
        same=("student_logits", "teacher_log_probs"),
        **ROWS,
    ),
    call(
        langevin.ensemble_log_loss,
        Categorical(),
        _ramp(2, 4, 3),
        LABELS,
        log_weights=jnp.log(jnp.array([0.5, 0.5])),
        **ROWS,
    ),
    call(langevin.ensemble_outputs, _apply, MANY, X),
    call(
        langevin.ensemble_predict, _ramp(2, 4, 3), log_weights=jnp.log(jnp.ones(2) / 2)
    ),
    call(
        langevin.langevin_sample,
        KEY,
        _log_density,
        PARAMS,
        step_size=0.01,
        temperature=1.0,
        **SIZES,
    ),
    call(
        langevin.log_hypothesis_weight, jnp.array([0.1, 0.2, 9.0]), LOG_PRIOR, eps=0.5
    ),
    call(langevin.mixture_log_loss, LOG_LIKELIHOODS, LOG_PRIOR, beta=0.5),
    transform(
        langevin.psgld,
        PARAMS,
        extra=(("key", KEY),),
        step_size=0.1,
        num_data=8,
        temperature=0.5,
        decay=0.9,
    ),
    call(langevin.regret_bound, jnp.array([0.0, 1.0, 2.0]), LOG_PRIOR, n=5),
    call(
        langevin.regret_curve,
        LOG_LIKELIHOODS,
        LOG_PRIOR,
        reference=LOG_LIKELIHOODS[:, 0],
        beta=0.5,
    ),
    transform(
        langevin.sgld,
        PARAMS,
        extra=(("key", KEY),),
        step_size=0.1,
        num_data=8,
        prior_precision=0.5,
    ),
    call(
        langevin.sgld_sample,
        KEY,
        _loss,
        PARAMS,
        X,
        step_size=0.01,
        batch_size=2,
        **SIZES,
    ),
    call(langevin.sgld_step_size, 0.5, 3, 0.55, use=_step_size_at),
    # Solutions.
    call(solutions.average_accuracy, ACCURACIES),
    call(solutions.forgetting, ACCURACIES),
    call(
        solutions.class_similarity, _ramp(4, 2), jnp.array([0, 0, 1, 1]), num_classes=2
    ),
    call(
        solutions.continual_run,
        KEY,
        _sgd_step,
        PARAMS,
        [X, 2 * X],
        accuracy_fn=_accuracy,
        steps=2,
        batch_size=2,
    ),
    call(solutions.dead_fraction, jax.nn.relu(X)),
    call(solutions.effective_rank, X, center=False),
    call(solutions.feature_overlap, X, 2 * X[::-1], k=2, center=True),
    call(solutions.hoyer_sparsity, PARAMS),
    call(
        solutions.interpolation_barrier,
        _free_loss,
        PARAMS,
        GRADS,
        points=3,
        same=("start", "end"),
    ),
    call(solutions.linear_cka, X, _ramp(6, 2)),
    call(solutions.match_units, X, X[:, ::-1]),
    call(solutions.near_zero_fraction, PARAMS, tolerance=0.1),
    call(solutions.participation_ratio, X, center=True),
    call(solutions.powerprop, PARAMS, alpha=2.0, like="params"),
    call(solutions.powerprop_init, PARAMS, alpha=2.0, like="params"),
    call(
        solutions.prediction_disagreement,
        LOGITS,
        LOGITS[::-1],
        same=("one", "two"),
        **ROWS,
    ),
    transform(solutions.scale_by_power, PARAMS, alpha=1.5),
    call(solutions.stable_rank, X, center=False),
    call(
        solutions.train_to_loss,
        KEY,
        _sgd_step,
        PARAMS,
        X,
        loss_fn=_free_loss,
        target=0.1,
        max_steps=3,
        batch_size=2,
        check_every=1,
    ),
]
