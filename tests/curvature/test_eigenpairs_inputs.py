"""What top_eigenpairs, split_outliers and subspace_overlap refuse, in their words."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlab.curvature.density import spectral_density
from jaxlab.curvature.eigenpairs import (
    split_outliers,
    subspace_overlap,
    top_eigenpairs,
)

pytestmark = pytest.mark.untyped

A = np.diag(np.arange(1.0, 51.0)).astype(np.float32)
LIKE = np.ones(50, np.float32)
KEY = jax.random.key(0)
operator = jax.tree_util.Partial(jnp.matmul, jnp.asarray(A))


@dataclasses.dataclass(frozen=True)
class Streamed:
    host: bool = True

    def __call__(self, v):
        return v


def refused(match, *, operator=operator, like=LIKE, k=2, **options):
    with pytest.raises(ValueError, match=match):
        top_eigenpairs(KEY, operator, like, k=k, **options)


def test_numpy_is_fine():
    found = top_eigenpairs(KEY, operator, LIKE, k=2)
    np.testing.assert_allclose(found.values, [50, 49], rtol=1e-3)
    start = np.asarray(found.vectors)
    again = top_eigenpairs(KEY, operator, LIKE, k=2, start=start, tol=np.float32(1e-3))
    np.testing.assert_allclose(again.values, [50, 49], rtol=1e-3)


@pytest.mark.parametrize("k", [0, -1, 2.0, True, None, "2"])
def test_k_must_be_a_positive_integer(k):
    refused("k must be an integer >= 1", k=k)


def test_options_out_of_range():
    refused("k must be at most the dimension, 50, got 51", k=51)
    for tol in (0, -1.0, float("inf"), float("nan")):
        refused("tol must be finite and > 0", tol=tol)
    refused('which must be "largest", "smallest" or "both", got \'top\'', which="top")
    for most in (1, 0, 2.5):
        refused("max_products must be an integer, k = 2 at least", max_products=most)
    refused('"auto", "compiled" or "host"', driver="gpu")
    refused("basis_size must be an integer", basis_size=0)
    refused("basis_size must be at least 5 for k = 2, got 4", basis_size=4)
    start = np.eye(50, dtype=np.float32)[:3]
    refused("at least 8 for k = 2 and 3 start vectors", basis_size=7, start=start)


def test_bases_of_the_least_size_work():
    found = top_eigenpairs(KEY, operator, LIKE, k=2, basis_size=5, max_products=999)
    np.testing.assert_allclose(found.values, [50, 49], rtol=1e-3)
    start = np.eye(50, dtype=np.float32)[:3]
    found = top_eigenpairs(
        KEY, operator, LIKE, k=2, basis_size=8, start=start, max_products=999
    )
    np.testing.assert_allclose(found.values, [50, 49], rtol=1e-3)


def test_memory_limits():
    refused(
        r"takes 1,000 bytes \(5 x 50 x 4 bytes\), more than memory_limit=999",
        memory_limit=999,
    )
    refused("lower k and basis_size", memory_limit=1000, basis_size=6)
    # Without basis_size the basis shrinks to what is allowed.
    found = top_eigenpairs(KEY, operator, LIKE, k=2, memory_limit=1000)
    more = top_eigenpairs(KEY, operator, LIKE, k=2)
    assert found.num_products > more.num_products


def test_start_vectors():
    refused("start: vectors must be a matrix", start=np.ones(50, np.float32))
    refused("start: vectors must be a matrix", start=np.ones((2, 49), np.float32))
    refused("start: vectors must be a matrix", start={"a": np.ones((2, 50))})
    refused("start: vectors must be a matrix", start=np.ones((0, 50), np.float32))
    refused("at most as many vectors as", start=np.ones((51, 50), np.float32))
    for bad in (np.nan, np.inf):
        refused("start must be finite", start=np.full((2, 50), bad, np.float32))


def test_likes():
    refused("no entries", like={"a": optax.MaskedNode()}, k=1)
    for dtype in (jnp.int32, jnp.complex64):
        refused("real floating-point", like={"a": jnp.ones(5, dtype)}, k=1)


@pytest.mark.parametrize("driver", ["compiled", "host"])
def test_operators(driver):
    for wrong in (lambda v: v[:3], lambda v: {"v": v}, lambda v: v[None]):
        refused("must give a tree like the one", operator=wrong, driver=driver)
    lopsided = jax.tree_util.Partial(jnp.matmul, jnp.asarray(A).at[0, 1].add(3.0))
    refused("must be symmetric", operator=lopsided, driver=driver)
    top_eigenpairs(KEY, lopsided, LIKE, k=2, driver=driver, check_symmetric=False)


def test_host_operators():
    refused("cannot stand in a compiled loop", operator=Streamed(), driver="compiled")
    with pytest.raises(ValueError, match="cannot run under jit"):
        jax.jit(lambda v: top_eigenpairs(KEY, Streamed(), v, k=1))(LIKE)
    with pytest.raises(ValueError, match='driver="host" loops in Python'):
        jax.jit(lambda v: top_eigenpairs(KEY, operator, v, k=1, driver="host"))(LIKE)


def test_split_outliers():
    density = spectral_density(KEY, operator, LIKE, order=8)
    with pytest.raises(ValueError, match=r"vectors of one length, got shapes \(2,\)"):
        split_outliers(np.ones(2), np.ones(3), density)
    with pytest.raises(ValueError, match=r"factor must be finite and >= 1, got 0\.5"):
        split_outliers(np.ones(2), np.ones(2), density, factor=0.5)


def test_subspace_overlap():
    with pytest.raises(ValueError, match="equally many vectors of one space"):
        subspace_overlap(np.eye(4, dtype=np.float32)[:2], np.eye(4, dtype=np.float32))
    with pytest.raises(ValueError, match="equally many vectors of one space"):
        subspace_overlap(np.eye(4, dtype=np.float32), np.eye(5, dtype=np.float32)[:4])
    uneven = {"a": jnp.ones((2, 3)), "b": jnp.ones((3, 3))}
    with pytest.raises(ValueError, match="subspace_overlap: a: vectors must be"):
        subspace_overlap(uneven, uneven)
    with pytest.raises(ValueError, match="real floating-point"):
        subspace_overlap(np.eye(2, dtype=int), np.eye(2, dtype=int))
