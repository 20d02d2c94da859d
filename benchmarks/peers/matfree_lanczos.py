"""matfree's Lanczos and partial eigendecomposition, and traceax's estimators of traces.

All are called as their documentation does, on flat vectors, under one jit.
"""

import functools
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp
import lineax
import traceax  # pyrefly: ignore[missing-import]
from matfree import decomp, eig  # pyrefly: ignore[missing-import]

from benchmarks.curvature_sides import on_flat

VERSIONS = {name: metadata.version(name) for name in ("matfree", "traceax")}
ESTIMATORS = {
    "hutchinson": traceax.HutchinsonEstimator(traceax.RademacherSampler(float)),
    "xtrace": traceax.XTraceEstimator(),
    "xnystrace": traceax.XNysTraceEstimator(),
}


@functools.partial(jax.jit, static_argnames=("order", "reortho"))
def lanczos(operator: Any, start: Any, *, order: int, reortho: str) -> Any:
    """Gives the basis as rows, and the two diagonals of T."""
    product, vector = on_flat(operator, start)
    run = decomp.tridiag_sym(order, reortho=reortho, materialize=False)
    found = run(product, vector)
    return (found.Q_tall.T, *found.J_small)


@functools.partial(jax.jit, static_argnames=("order", "k"))
def eigenpairs(operator: Any, start: Any, *, order: int, k: int) -> Any:
    """Gives the k largest Ritz values, descending, and their measured residuals."""
    product, vector = on_flat(operator, start)
    values, vectors = eig.eigh_partial(decomp.tridiag_sym(order))(product, vector)
    values, vectors = values[::-1][:k], vectors[::-1][:k]
    miss = lambda pair: jnp.linalg.norm(product(pair[1]) - pair[0] * pair[1])
    return values, jax.lax.map(miss, (values, vectors))


@functools.partial(jax.jit, static_argnames=("method", "num_matvecs"))
def trace(key: Any, operator: Any, like: Any, *, method: str, num_matvecs: int) -> Any:
    """Estimates the trace of a positive semi-definite operator by traceax."""
    product, vector = on_flat(operator, like)
    shape = jax.ShapeDtypeStruct(vector.shape, vector.dtype)
    tags = lineax.positive_semidefinite_tag
    linear = lineax.FunctionLinearOperator(product, shape, tags)
    return ESTIMATORS[method](key, linear, num_matvecs)[0]
