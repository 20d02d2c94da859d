"""Products and spectra compile for a TPU and a GPU that are not here."""

import jax
import jax.numpy as jnp
import pytest

from jaxlab import curvature
from jaxlab.likelihoods import Categorical

ROWS, WIDTH, CLASSES = 32, 16, 4
PARAMS = {
    "w1": jax.ShapeDtypeStruct((WIDTH, WIDTH), jnp.float32),
    "w2": jax.ShapeDtypeStruct((WIDTH, CLASSES), jnp.bfloat16),
}
BATCH = (
    jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32),
    jax.ShapeDtypeStruct((ROWS,), jnp.int32),
)


def apply(params, x):
    return jnp.tanh(x @ params["w1"]) @ params["w2"].astype(x.dtype)


def loss(params, batch):
    return Categorical().nll(apply(params, batch[0]), batch[1])


def operators(params, batch):
    model = (apply, Categorical(), params, batch)
    return {
        "hessian": curvature.hessian_operator(loss, params, batch),
        "parts": curvature.hessian_operator(loss, params, batch, microbatch=12),
        "ggn": curvature.ggn_operator(*model),
        "empirical": curvature.fisher_operator(*model, kind="empirical"),
    }


def products(params, batch):
    return {name: a(params) for name, a in operators(params, batch).items()}


def with_operator(function, **options):
    """Makes a function of arrays alone; the key is made inside."""

    def run(params, batch):
        operator = operators(params, batch)["ggn"]
        return function(jax.random.key(0), operator, params, **options)

    return run


def recurrence(reorthogonalize):
    def run(params, batch):
        operator = operators(params, batch)["hessian"]
        options = {"order": 8, "reorthogonalize": reorthogonalize}
        return curvature.lanczos(operator, params, **options)

    return run


PROGRAMS = {
    "products": products,
    "lanczos full": recurrence("full"),
    "lanczos selective": recurrence("selective"),
    "diagonal": with_operator(curvature.diagonal, num_matvecs=4, method="xdiag"),
    "logdet": with_operator(curvature.logdet, damping=0.1, order=8, num_probes=2),
    "spectral_density": with_operator(
        curvature.spectral_density, order=8, num_probes=2, probes_at_once=2
    ),
    "top_eigenpairs": with_operator(curvature.top_eigenpairs, k=3),
    "trace": with_operator(curvature.trace, num_matvecs=8, method="xtrace"),
}


@pytest.mark.parametrize("device", ["tpu", "gpu"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_compiles(name, device, request):
    target = request.getfixturevalue(device)
    compiled = target.compile(PROGRAMS[name], PARAMS, BATCH)
    expected = jax.eval_shape(PROGRAMS[name], PARAMS, BATCH)
    found = jax.tree.map(lambda a: (a.shape, a.dtype), compiled.out_info)
    assert found == jax.tree.map(lambda a: (a.shape, a.dtype), expected)
