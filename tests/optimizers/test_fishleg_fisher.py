"""The Fisher that FishLeg multiplies by is the mean of Hessians at sampled targets."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from jaxlab.curvature import full_matrix, ggn_operator, hessian_operator
from jaxlab.likelihoods import Bernoulli, Categorical, Gaussian


@pytest.mark.parametrize(
    "likelihood", [Gaussian(0.7), Bernoulli(), Categorical()], ids=lambda x: str(x)[:5]
)
def test_the_ggn_product_is_the_mean_of_hessians_at_sampled_targets(x64, likelihood):
    draw = np.random.default_rng(0)
    params = {name: jnp.asarray(draw.normal(size=(3, 3))) for name in "wv"}
    x, z = draw.normal(size=(5, 3)), draw.normal(size=18)
    apply_fn = lambda p, x: jnp.tanh(x @ p["w"]) @ p["v"]
    unravel = ravel_pytree(params)[1]
    flat = lambda tree: ravel_pytree(tree)[0]
    operator = ggn_operator(apply_fn, likelihood, params, (x, None))

    def sampled(key):
        targets = likelihood.sample(key, apply_fn(params, x))
        loss = lambda p, batch: likelihood.nll(apply_fn(p, batch[0]), batch[1])
        return flat(hessian_operator(loss, params, (x, targets))(unravel(z)))

    def explicit():
        """Sums over rows the product with J^T H J."""
        outputs = lambda theta: apply_fn(unravel(theta), x)
        slope = jax.jacobian(outputs)(flat(params))
        bend = likelihood.hessian_product(outputs(flat(params)), slope @ z)
        return jnp.einsum("rop,ro->p", slope, bend)

    keys = jax.random.split(jax.random.key(0), 4_000)
    draws, product, expected, matrix = jax.jit(
        lambda: (
            jax.vmap(sampled)(keys),
            flat(operator(unravel(z))),
            explicit(),
            full_matrix(operator, params),
        )
    )()
    error = np.std(draws, 0) / len(draws) ** 0.5
    assert (error > 1e-4).all()
    assert (np.abs(np.mean(draws, 0) - product) < 4 * error).all()
    np.testing.assert_allclose(product, expected, rtol=1e-10)
    np.testing.assert_allclose(matrix, matrix.T, atol=1e-12)
    assert np.linalg.eigvalsh(matrix)[0] > -1e-12
