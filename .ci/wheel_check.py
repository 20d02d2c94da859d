"""Run inside an empty environment that holds the wheel alone: floors 0 and 1 work."""

import importlib.util
import pathlib

import jax
import jax.numpy as jnp

import jaxlab
from jaxlab import catalog, curvature, likelihoods, optimizers, sharpness, structured

package = pathlib.Path(jaxlab.__file__).parent
assert "site-packages" in package.parts, "this is the source tree, not the wheel"
assert (package / "py.typed").exists(), "py.typed is missing from the wheel"
for absent in ("flax", "tensorflow_datasets", "pytest", "orbax"):
    assert importlib.util.find_spec(absent) is None, f"{absent} is installed"

factors = structured.init_monarch(jax.random.key(0), 24, 36, nblocks=4)
x = jax.random.normal(jax.random.key(1), (2, 24))
y = structured.monarch_matmul(x, *factors)
dense = structured.monarch_to_dense(*factors)
assert jnp.allclose(y, x @ dense.T, atol=1e-5)
again = structured.monarch_project(dense, nblocks_in=4, nblocks_out=4)
assert structured.monarch_to_dense(*again).shape == dense.shape
nll = likelihoods.Categorical().nll(jnp.zeros((2, 3)), jnp.array([0, 1]))
assert jnp.allclose(nll, jnp.log(3.0))
operator = curvature.hessian_operator(lambda w: jnp.sum(w**3), jnp.array([1.0, 2.0]))
values, *_ = curvature.top_eigenpairs(jax.random.key(0), operator, x[0, :2], k=1)
assert jnp.allclose(values, 12.0, rtol=1e-4)
mixed = sharpness.gnp_gradient(lambda w: w, jnp.array([3.0, 4.0]), alpha=0.5, radius=10)
assert jnp.allclose(mixed, jnp.array([6.0, 8.0]))
q = optimizers.q_init({"kernel": dense}, scale=16.0)
assert jnp.allclose(optimizers.q_apply(q, {"kernel": dense})["kernel"], 16 * dense)
assert len(catalog.METHODS) == 103
for room in ("layers", "models", "training"):
    message = ""
    try:
        getattr(jaxlab, room)
    except ImportError as error:
        message = str(error)
    assert 'pip install "jaxlab[train]"' in message, f"jaxlab.{room}: {message!r}"
print(f"jaxlab {jaxlab.__version__}: the wheel works alone, jax {jax.__version__}")
