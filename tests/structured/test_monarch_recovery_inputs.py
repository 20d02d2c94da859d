"""Factor recovery on what people pass: messages, NumPy arrays, random shapes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlab.structured import (
    MMStarFactors,
    factor_mmstar,
    mmstar_matmul,
    mmstar_to_dense,
)

pytestmark = pytest.mark.untyped


def fails(needed, function, *args, **options):
    with pytest.raises(ValueError, match=needed) as caught:
        function(*args, **options)
    assert str(caught.value).startswith(f"{function.__name__}: ")
    assert "got" in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("shape", [(4,), (4, 6), (2, 4, 4), ()])
def test_matrices_that_are_not_square(shape):
    message = fails("must be square", factor_mmstar, jnp.ones(shape), block=2)
    assert str(shape) in message


@pytest.mark.parametrize("block", [0, -2, 4, 12])
def test_blocks_that_do_not_divide(block):
    message = fails("block must", factor_mmstar, jnp.ones((6, 6)), block=block)
    assert f"block={block}" in message
    fails("floating-point", factor_mmstar, jnp.ones((6, 6), int), block=2)


def test_factors_that_do_not_fit():
    x, one, zero = jnp.ones(6), jnp.ones((2, 3, 3)), jnp.zeros(())
    good = MMStarFactors(one, jnp.ones((3, 2, 2)), one, zero)
    for function, args in ((mmstar_to_dense, ()), (mmstar_matmul, (x,))):
        for bad in (
            good._replace(r=one),
            good._replace(l1=one[0]),
            good._replace(l2=jnp.ones((3, 2, 2))),
            good._replace(r=jnp.ones(3)),
        ):
            fails(r"\(t, b, b\)", function, *args, bad)
        fails("floating-point", function, *args, good._replace(r=jnp.ones(3, int)))
    for shape in ((5,), (6, 2), ()):
        message = fails(r"3 \* 2 = 6", mmstar_matmul, jnp.ones(shape), good)
        assert str(shape) in message


def test_numpy_arrays_are_welcome():
    rng = np.random.default_rng(0)
    shapes = ((2, 3, 3), (3, 2, 2), (2, 3, 3))
    factors = MMStarFactors(*(rng.standard_normal(s) for s in shapes), np.zeros(()))
    dense = np.asarray(mmstar_to_dense(factors))
    found = factor_mmstar(dense, block=np.int64(2))
    assert found.residual < 1e-4
    np.testing.assert_allclose(
        mmstar_matmul(np.eye(6), factors), dense.T, rtol=1e-5, atol=1e-5
    )


@settings(max_examples=8, deadline=None)
@given(t=st.integers(1, 5), b=st.integers(1, 5), seed=st.integers(0, 99))
def test_planted_factors_of_any_shape(t, b, seed):
    rng = np.random.default_rng(seed)
    l1, r, l2 = (
        rng.standard_normal(s) + 1j * rng.standard_normal(s)
        for s in ((b, t, t), (t, b, b), (b, t, t))
    )
    # The sum of the definition: M[(s, i), (u, j)] = sum_k l1[i,s,k] r[k,i,j] l2[j,k,u].
    matrix = np.einsum("isk,kij,jku->siuj", l1, r, l2).reshape(t * b, t * b)
    with jax.enable_x64(True):
        dense = mmstar_to_dense(MMStarFactors(l1, r, l2, np.zeros(())))
        found = jax.jit(factor_mmstar, static_argnames="block")(matrix, block=b)
        rebuilt, residual = np.asarray(mmstar_to_dense(found)), float(found.residual)
    np.testing.assert_allclose(dense, matrix, atol=1e-11)
    assert residual < 1e-8
    np.testing.assert_allclose(
        np.linalg.norm(rebuilt - matrix) / np.linalg.norm(matrix), 0, atol=1e-8
    )
