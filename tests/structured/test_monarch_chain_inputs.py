"""Monarch chains on what people pass: messages, NumPy arrays, random shapes."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlab.structured import (
    monarch_chain_matmul,
    monarch_chain_to_dense,
    monarch_matmul,
)

pytestmark = pytest.mark.untyped
BOTH = [monarch_chain_matmul, monarch_chain_to_dense]


def fails(needed, function, factors, x=None):
    args = (factors,) if function is monarch_chain_to_dense else (x, factors)
    with pytest.raises(ValueError, match=needed) as caught:
        function(*args)
    assert str(caught.value).startswith(f"{function.__name__}: ")
    assert "got" in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("function", BOTH)
def test_factors_that_do_not_fit(function):
    x, cube = jnp.ones((2, 8)), jnp.ones((4, 2, 2))
    for few in ((), (cube,)):
        assert f"got {len(few)}" in fails("at least two", function, few, x)
    fails(r"\(blocks, q, p\)", function, [cube, cube[0], cube], x)
    message = fails(r"blocks \* q", function, [cube, jnp.ones((2, 2, 2)), cube], x)
    assert "8 against 4" in message
    odd = jnp.ones((3, 4, 4))  # 12 entries fit, but 3 blocks are no multiple of 2
    first, last = jnp.ones((6, 2, 2)), jnp.ones((6, 2, 2))
    fails("multiple of 2", function, [first, odd, last], jnp.ones(12))
    fails("floating-point", function, [cube, cube.astype(int)], x)


@pytest.mark.parametrize("shape", [(7,), (8, 2), ()])
def test_inputs_of_the_wrong_width(shape):
    cube = jnp.ones((4, 2, 2))
    message = fails(
        r"4 \* 2 = 8", monarch_chain_matmul, [cube, cube, cube], jnp.ones(shape)
    )
    assert str(shape) in message


def test_numpy_arrays_are_welcome():
    draw = np.random.default_rng(0).standard_normal
    x, w1, w2 = draw((3, 8)), draw((2, 6, 4)), draw((3, 5, 4))
    np.testing.assert_allclose(
        monarch_chain_matmul(x, (w1, w2)), monarch_matmul(x, w1, w2), rtol=1e-5
    )


@settings(max_examples=8, deadline=None)
@given(
    digits=st.lists(
        st.tuples(st.integers(1, 3), st.integers(1, 3)), min_size=2, max_size=4
    ),
    batch=st.sampled_from([(), (0,), (2, 3)]),
    seed=st.integers(0, 99),
)
def test_chains_of_any_shape(digits, batch, seed):
    draw = np.random.default_rng(seed).standard_normal
    inputs, outputs = zip(*digits, strict=True)
    x = draw((*batch, math.prod(inputs)))
    y, factors = x.reshape(*batch, *inputs), []
    for axis in reversed(range(len(inputs))):
        left, right = inputs[:axis], outputs[axis + 1 :]
        shape = (math.prod(left) * math.prod(right), outputs[axis], inputs[axis])
        factors.append(draw(shape))
        # The same along its own axis of the tensor of digits.
        blocks = factors[-1].reshape(*left, *right, *shape[1:])
        y = np.moveaxis(y, len(batch) + axis, -1)
        y = np.einsum("...p,...qp->...q", y, blocks)
        y = np.moveaxis(y, -1, len(batch) + axis)
    with jax.enable_x64(True):
        got = monarch_chain_matmul(x, factors)
    np.testing.assert_allclose(
        got, y.reshape(*batch, -1) if y.size else got, atol=1e-12
    )
    assert got.shape == (*batch, math.prod(outputs))
