"""Data-aware projections and "mup" on what people pass: messages, random shapes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlab.structured import (
    monarch_mup_multipliers,
    monarch_project_data,
    monarch_to_dense,
)

pytestmark = pytest.mark.untyped
SIZES = {"nblocks_in": 2, "nblocks_out": 3}


def fails(needed, function, *args, **options):
    with pytest.raises(ValueError, match=needed) as caught:
        function(*args, **options)
    assert "got" in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "shapes", [((15, 8), (4, 7)), ((15, 8), (8,)), ((15,), (4, 8))]
)
def test_arrays_that_do_not_fit(shapes):
    arrays = (jnp.ones(shape) for shape in shapes)
    message = fails(
        "monarch_project_data: .*shape", monarch_project_data, *arrays, **SIZES
    )
    assert str(shapes[0]) in message
    assert str(shapes[1]) in message


def test_options_that_cannot_be():
    arrays = jnp.ones((15, 8)), jnp.ones((4, 8))
    name = "monarch_project_data: "
    for ridge in (0, -1.0, float("nan")):
        fails(f"{name}ridge", monarch_project_data, *arrays, **SIZES, ridge=ridge)
    fails(f"{name}num", monarch_project_data, *arrays, **SIZES, num_iterations=-1)
    integers = arrays[0].astype(int)
    fails(f"{name}matrix", monarch_project_data, integers, arrays[1], **SIZES)
    fails("rank=5", monarch_project_data, *arrays, **SIZES, rank=5)
    fails("nblocks_in=3", monarch_project_data, *arrays, nblocks_in=3, nblocks_out=3)


def test_multipliers_that_cannot_be():
    name = "monarch_mup_multipliers: "
    fails(f"{name}.*at least 1", monarch_mup_multipliers, 0, 8)
    fails(f"{name}.*at least 1", monarch_mup_multipliers, 8, 8, nblocks=0)
    fails(f"{name}rank.*= 2", monarch_mup_multipliers, 10, 7, nblocks=4, rank=3)


@settings(max_examples=6, deadline=None)
@given(
    blocks=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    slices=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    rows=st.integers(1, 14),
    seed=st.integers(0, 99),
)
def test_errors_of_any_shape(blocks, slices, rows, seed):
    (k, l), (s, p) = blocks, slices
    rng = np.random.default_rng(seed)
    matrix, inputs = rng.standard_normal((s * l, k * p)), rng.random((rows, k * p))
    with jax.enable_x64(True):
        factors, errors = monarch_project_data(
            matrix, inputs, nblocks_in=k, nblocks_out=l, num_iterations=3
        )
        nearest, errors = np.asarray(monarch_to_dense(*factors)), np.asarray(errors)
    assert (np.diff(errors) <= 0).all()
    distance = ((inputs @ (matrix - nearest).T) ** 2).sum()
    np.testing.assert_allclose(errors[-1], distance, rtol=1e-8, atol=1e-12)
