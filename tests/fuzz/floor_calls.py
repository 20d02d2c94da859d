"""Calls of the rooms that need no Flax: structured, likelihoods, objective, trees."""

import pathlib
import runpy

import jax
import jax.numpy as jnp
import optax

from jaxlab import catalog, likelihoods, objective, structured, trees

_HARNESS = runpy.run_path(str(pathlib.Path(__file__).with_name("harness.py")))
call, _ramp = _HARNESS["call"], _HARNESS["ramp"]


KEY = jax.random.key(0)
W1, W2 = _ramp(2, 2, 3), _ramp(2, 3, 2)  # 6 -> 6 by 2 blocks
X = _ramp(4, 6)
MMSTAR = structured.factor_mmstar(_ramp(4, 4), block=2)
FOLDED = structured.fold_monarch_stack([(_ramp(2, 4, 4), _ramp(2, 4, 4))])
LINEAR = objective.Objective(
    objective.plain(lambda w, x: jnp.tanh(x @ w["a"]) @ w["b"]), likelihoods.Gaussian()
)
PARAMS = {"a": _ramp(3, 2), "b": _ramp(2, 1)}
VECTOR = {"a": _ramp(3, 2, scale=2.0), "b": _ramp(2, 1, scale=0.5)}
BATCH = (_ramp(5, 3), _ramp(5, 1), jnp.ones(5))
LOGITS, LABELS = _ramp(5, 3), jnp.array([0, 2, 1, 1, 0])


def _of(likelihood, method):
    def use(outputs, targets, weights):
        return getattr(likelihood, method)(outputs, targets, weights=weights)

    use.__name__ = method
    return use


def _row_nll(likelihood):
    def row_nll(outputs, targets):
        return likelihood.row_nll(outputs, targets)

    return row_nll


def _hessian_product(likelihood):
    def hessian_product(outputs, v, weights):
        return likelihood.hessian_product(outputs, v, weights=weights)

    return hessian_product


def _sample(likelihood):
    def sample(key, outputs):
        return likelihood.sample(key, outputs)

    return sample


def _likelihoods():
    for make, outputs, targets in (
        (likelihoods.Categorical, LOGITS, LABELS),
        (likelihoods.Bernoulli, LOGITS, (LOGITS > 0).astype(jnp.float32)),
        (likelihoods.Gaussian, LOGITS, LOGITS[::-1]),
    ):
        one, weights = make(), jnp.ones(5)
        yield call(make, outputs, targets, weights, use=_of(one, "nll"))
        yield call(make, outputs, targets, use=_row_nll(one))
        same = ("outputs", "v")
        yield call(
            make, outputs, outputs, weights, use=_hessian_product(one), same=same
        )
        yield call(make, KEY, outputs, use=_sample(one))


def _loss(params, batch):
    return LINEAR.loss(params, (), batch)[0]


def _value_and_grad(params, batch):
    return LINEAR.value_and_grad(params, (), batch)[1]


def _ggn_product(params, v, batch):
    return LINEAR.ggn_product(params, (), batch, v)


def _ggn_quadratic_form(params, v, batch):
    return LINEAR.ggn_quadratic_form(params, (), batch, v)


def _fisher_product(params, v, batch, kind):
    return LINEAR.fisher_product(params, (), batch, v, kind=kind)


def _operator(params, v, batch):
    return objective.GaussNewton(LINEAR, params, (), batch)(v)


def _plain(params, inputs):
    return objective.plain(lambda p, x: x @ p["a"])(
        params, (), inputs, key=None, train=True
    )[0]


both = {"same": ("params", "v"), "like": "params"}
form = {"same": ("params", "v")}
HOLED = {"a": PARAMS["a"], "b": optax.MaskedNode()}

CALLS = [
    call(structured.circulant_factors, _ramp(6), block=2),
    call(structured.dft_chain_factors, (2, 3), inverse=False),
    call(structured.dft_factors, 6, nblocks=2, inverse=False),
    call(structured.factor_mmstar, _ramp(4, 4), block=2),
    call(
        structured.fold_monarch_stack,
        [(_ramp(2, 4, 4), _ramp(2, 4, 4)), (_ramp(2, 4, 4), _ramp(2, 4, 4))],
        biases=[_ramp(8), _ramp(8)],
        order="interleaved",
    ),
    call(structured.hadamard_factors, 4, nblocks=2),
    call(structured.init_monarch, KEY, 6, 8, nblocks=2, rank=2, scheme="mup"),
    call(structured.kronecker_factors, _ramp(2, 3), _ramp(4, 5)),
    call(structured.mmstar_matmul, _ramp(3, 4), MMSTAR),
    call(structured.mmstar_to_dense, MMSTAR),
    call(structured.monarch_chain_matmul, _ramp(3, 8), [_ramp(4, 2, 2)] * 3),
    call(structured.monarch_chain_to_dense, [_ramp(4, 2, 2)] * 3),
    call(structured.monarch_matmul, X, W1, W2, output_layout="interleaved"),
    call(structured.monarch_matmul_features, X.T, W1, W2),
    call(
        structured.monarch_matmul_fused,
        _ramp(32, 3),
        _ramp(2, 16, 16),
        _ramp(2, 16, 16),
        platform="tpu",
        interpret=True,
    ),
    call(structured.monarch_mup_multipliers, 8, 6, nblocks=2, rank=2),
    call(structured.monarch_project, _ramp(6, 4), nblocks_in=2, nblocks_out=2, rank=1),
    call(
        structured.monarch_project_data,
        _ramp(6, 4),
        _ramp(5, 4),
        nblocks_in=2,
        nblocks_out=2,
        rank=1,
        num_iterations=2,
        ridge=1e-3,
    ),
    call(structured.monarch_project_error, _ramp(6, 4), nblocks_in=2, nblocks_out=2),
    call(
        structured.monarch_stack_matmul,
        _ramp(8, 3),
        FOLDED,
        output_layout="block_major",
    ),
    call(structured.monarch_to_dense, W1, W2),
    call(structured.unfold_monarch_stack, FOLDED, order="interleaved", skip=("dtype",)),
    call(likelihoods.row_shares, (3,), jnp.array([1.0, 1.0, 0.0])),
    *_likelihoods(),
    call(objective.Objective, PARAMS, BATCH, use=_loss),
    call(objective.Objective, PARAMS, BATCH, use=_value_and_grad, like="params"),
    call(objective.Objective, PARAMS, VECTOR, BATCH, use=_ggn_product, **both),
    call(objective.Objective, PARAMS, VECTOR, BATCH, use=_ggn_quadratic_form, **form),
    call(
        objective.Objective,
        PARAMS,
        VECTOR,
        BATCH,
        kind="empirical",
        use=_fisher_product,
        **both,
    ),
    call(objective.GaussNewton, PARAMS, VECTOR, BATCH, use=_operator, **both),
    call(objective.plain, PARAMS, BATCH[0], use=_plain),
    call(objective.unpack_batch, BATCH, skip=("dtype", "value", "shape", "layout")),
    call(trees.fill_holes, HOLED, PARAMS, skip=("dtype",)),
    call(trees.has_holes, HOLED),
    call(trees.punch_holes, PARAMS, HOLED, skip=("dtype",)),
    call(catalog.markdown_table, methods=catalog.METHODS[:2]),
]
