"""Calls of the room curvature."""

import pathlib
import runpy

import jax
import jax.numpy as jnp
import optax

from jaxlab import curvature
from jaxlab.curvature import pac_bayes
from jaxlab.likelihoods import Gaussian
from jaxlab.objective import Objective, plain

_HARNESS = runpy.run_path(str(pathlib.Path(__file__).with_name("harness.py")))
call, _ramp = _HARNESS["call"], _HARNESS["ramp"]


KEY = jax.random.key(0)
SCALE = {"a": jnp.array([5.0, 3.0, 1.0]), "b": jnp.array([[2.0, 0.5]])}
ONES = {"a": jnp.ones(3), "b": jnp.ones((1, 2))}
VECTOR = {"a": _ramp(3), "b": _ramp(1, 2)}


# Written out, so that an error within counts as the caller's.
def _scaled(scale, vector):
    return {name: scale[name] * leaf for name, leaf in vector.items()}


OPERATOR = jax.tree_util.Partial(_scaled, SCALE)
PARAMS = {"w": _ramp(3, 1), "c": _ramp(1)}
DIRECTION = {"w": _ramp(3, 1, scale=0.5), "c": _ramp(1, scale=0.5)}
BATCH = (_ramp(4, 3), _ramp(4, 1))


def _apply(params, x):
    return jnp.tanh(x @ params["w"]) * params["c"].reshape(1, 1)


def _batch_loss(params, batch):
    return jnp.mean((_apply(params, batch[0]) - batch[1]) ** 2)


def _loss(params):
    return sum(jnp.sum(leaf**3) for leaf in jax.tree.leaves(params))


OBJECTIVE = Objective(plain(_apply), Gaussian())
AXES = {"w": jnp.eye(4)[:2, :3].reshape(2, 3, 1), "c": jnp.eye(4)[:2, 3:]}
OTHER = {"w": jnp.eye(4)[1:3, :3].reshape(2, 3, 1), "c": jnp.eye(4)[1:3, 3:]}
DENSITY = curvature.Density(
    jnp.linspace(-2.0, 30.0, 5),
    jnp.full(5, 0.1),
    jnp.array([[-1.0, 0.0, 2.0, 30.0]]),
    jnp.full((1, 4), 0.25),
    jnp.array(1.0),
    jnp.zeros(5),
)
POSTERIOR = pac_bayes.pac_bayes_analytic(
    jnp.array([2.0, 1.0]), AXES, PARAMS, DIRECTION, num_examples=9, prior_precision=1.0
)
START = _ramp(4)
DENSE = jax.tree_util.Partial(jnp.multiply, jnp.array([4.0, 3.0, 2.0, 1.0]))
LANCZOS = curvature.lanczos(DENSE, START, order=3)


def _applied(make, **fixed):
    def operator(vector, **arguments):
        return make(OPERATOR, **arguments, **fixed)(vector)

    return operator


def _hessian(params, vector, batches):
    return curvature.hessian_operator(_batch_loss, params, batches)(vector)


def _ggn(params, vector, batch, microbatch):
    made = curvature.ggn_operator(
        _apply, Gaussian(), params, batch, microbatch=microbatch
    )
    return made(vector)


def _fisher(key, params, vector, batch, kind):
    made = curvature.fisher_operator(
        _apply, Gaussian(), params, batch, kind=kind, key=key
    )
    return made(vector)


def _damped(vector, damping):
    return curvature.damped_operator(OPERATOR, damping)(vector)


def _preconditioned(vector, scale):
    return curvature.preconditioned_operator(OPERATOR, scale)(vector)


def _block(vector, path):
    return curvature.block_operator(OPERATOR, path, like=ONES)(vector)


def _error_fn(params):
    return 0.5 + 0.0 * jnp.sum(params["w"])


def _plot(density, outliers, decades):
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots()
    curvature.plot_density(density, ax=ax, outliers=outliers, decades=decades)
    plt.close(figure)
    return ()


ALIKE = {"same": ("params", "vector"), "like": "params"}
SIZES = {"order": 2, "num_probes": 2}

CALLS = [
    call(
        curvature.block_operator,
        VECTOR["a"],
        "a",
        use=_block,
        like="vector",
        skip=("dtype",),
    ),
    call(curvature.bulk_edges, DENSITY),
    call(curvature.correlation_spectrum, _ramp(4, 3)),
    call(
        curvature.damped_operator,
        VECTOR,
        0.5,
        use=_damped,
        like="vector",
        skip=("dtype",),
    ),
    call(
        curvature.density_from_eigenvalues,
        jnp.array([0.0, 9.0]),
        jnp.linspace(0.0, 9.0, 3),
        sigma=0.5,
    ),
    call(
        curvature.diagonal,
        KEY,
        OPERATOR,
        ONES,
        num_matvecs=2,
        method="xdiag",
        probes_at_once=1,
        driver="auto",
    ),
    call(
        curvature.displacement_fraction,
        AXES,
        PARAMS,
        DIRECTION,
        ks=(1, 2),
        same=("params", "params0"),
    ),
    call(
        curvature.fisher_operator,
        KEY,
        PARAMS,
        DIRECTION,
        BATCH,
        "sampled",
        use=_fisher,
        **ALIKE,
    ),
    call(curvature.frobenius_norm, KEY, OPERATOR, ONES, num_matvecs=2),
    call(curvature.full_matrix, OPERATOR, ONES, force=False),
    call(curvature.ggn_operator, PARAMS, DIRECTION, BATCH, 2, use=_ggn, **ALIKE),
    call(curvature.gram_fisher, _apply, Gaussian(), PARAMS, BATCH, k=2),
    call(curvature.hessian_operator, PARAMS, DIRECTION, BATCH, use=_hessian, **ALIKE),
    call(
        curvature.hessian_vector_product,
        _loss,
        PARAMS,
        DIRECTION,
        mode="reverse_over_reverse",
        **ALIKE,
    ),
    call(curvature.lanczos, OPERATOR, VECTOR, order=3, reorthogonalize="full"),
    call(curvature.logdet, KEY, OPERATOR, ONES, damping=1.0, **SIZES),
    call(curvature.plot_density, DENSITY, jnp.array([30.0]), 8, use=_plot),
    call(
        curvature.preconditioned_operator,
        VECTOR,
        SCALE,
        use=_preconditioned,
        same=("vector", "scale"),
        like="vector",
    ),
    call(curvature.ritz, LANCZOS),
    call(curvature.ritz_vectors, DENSE, START, LANCZOS, indices=(-1, 0)),
    call(curvature.sloppiness, jnp.array([7.0, 100.0, 10.0, 1.0]), low=0, high=3),
    call(
        curvature.spectral_density,
        KEY,
        OPERATOR,
        ONES,
        sigma=0.5,
        num_points=8,
        scale="linear",
        **SIZES,
    ),
    call(curvature.spectral_sum, KEY, OPERATOR, ONES, jnp.sqrt, **SIZES),
    call(
        curvature.spectrum_report,
        KEY,
        OBJECTIVE,
        PARAMS,
        BATCH,
        k=1,
        matrix="ggn",
        damping=0.5,
        **SIZES,
    ),
    call(
        curvature.split_outliers,
        jnp.array([30.0, 5.0]),
        jnp.array([0.1, 1.0]),
        DENSITY,
        factor=2.0,
    ),
    call(curvature.subspace_overlap, AXES, OTHER),
    call(curvature.subspace_overlap_curve, AXES, OTHER, ks=(1, 2)),
    call(curvature.top_eigenpairs, KEY, OPERATOR, ONES, k=2, tol=0.01, which="both"),
    call(curvature.trace, KEY, OPERATOR, ONES, num_matvecs=3, method="hutch++"),
    call(
        pac_bayes.gaussian_kl_low_rank,
        PARAMS,
        DIRECTION,
        AXES,
        precisions=jnp.array([2.0, 1.0]),
        precision_outside=1.0,
        prior_precisions=jnp.ones(2),
        prior_precision_outside=0.5,
        same=("mean", "prior_mean"),
    ),
    call(
        pac_bayes.gibbs_error,
        KEY,
        _error_fn,
        POSTERIOR,
        AXES,
        num_samples=3,
        delta=0.1,
    ),
    call(pac_bayes.inverse_kl, jnp.array([0.1, 0.2]), jnp.array([0.3, 0.4])),
    call(
        pac_bayes.pac_bayes_analytic,
        jnp.array([2.0, 1.0]),
        AXES,
        PARAMS,
        DIRECTION,
        num_examples=9,
        prior_precision=1.0,
        delta=0.1,
        units="bits",
        same=("params", "params0"),
    ),
    call(
        pac_bayes.pac_bayes_grid,
        KEY,
        _error_fn,
        jnp.array([2.0, 1.0]),
        AXES,
        PARAMS,
        DIRECTION,
        num_examples=9,
        num_priors=2,
        num_samples=2,
        num_final_samples=2,
        spacing=5.0,
        same=("params", "params0"),
    ),
    call(
        pac_bayes.pac_bayes_optimize,
        KEY,
        _loss,
        jnp.array([2.0, 1.0]),
        AXES,
        PARAMS,
        DIRECTION,
        num_examples=9,
        num_steps=2,
        optimizer=optax.sgd(0.1),
        delta=0.1,
        same=("params", "params0"),
    ),
    call(
        pac_bayes.sample_gaussian_low_rank,
        KEY,
        PARAMS,
        AXES,
        precisions=jnp.array([2.0, 1.0]),
        precision_outside=1.0,
        like="mean",
    ),
]
