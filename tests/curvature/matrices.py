"""Matrices with prescribed spectra, and operators that multiply by them."""

import jax
import jax.numpy as jnp
import numpy as np


def symmetric(eigenvalues, *, seed=0, dtype=jnp.float32):
    """Makes a symmetric matrix of random eigenvectors."""
    size = (len(eigenvalues),) * 2
    q, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal(size))
    matrix = (q * eigenvalues) @ q.T
    return jnp.asarray((matrix + matrix.T) / 2, dtype)


def multiply(matrix):
    """Makes a matrix an operator."""
    return jax.tree_util.Partial(jnp.matmul, matrix)
