"""``MonarchLinear`` on what people pass: messages, NumPy arrays, no flax."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxlab.layers import (
    MonarchLinear,
    densify_params,
    monarchize,
    monarchize_params,
)

pytestmark = pytest.mark.untyped
EVERY = lambda path, layer: True


def test_inputs_of_the_wrong_width():
    layer = MonarchLinear(10, 7, rngs=nnx.Rngs(0))
    for shape in ((2, 12), (7,), ()):
        with pytest.raises(ValueError, match="in_features=10") as caught:
            layer(jnp.ones(shape))
        assert f"got shape {shape}" in str(caught.value)


def test_sizes_and_options_out_of_range():
    for options, words in (
        ({"nblocks": 0}, "nblocks=0"),
        ({"rank": 0}, "rank=0"),
        ({"rank": 3}, "= 2, got rank=3"),
        ({"scheme": "glorot"}, "'glorot'"),
        ({"param_dtype": int}, "int"),
    ):
        with pytest.raises(ValueError, match=words):
            MonarchLinear(10, 7, **options, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="at least 1"):
        MonarchLinear(0, 7, rngs=nnx.Rngs(0))


def test_numpy_and_nan():
    layer = MonarchLinear(10, 7, rngs=nnx.Rngs(0))
    x = np.ones((3, 10), np.float32)
    assert isinstance(layer(x), jax.Array)
    x[1, 4] = np.nan
    np.testing.assert_array_equal(np.isnan(layer(x)).any(1), [False, True, False])


def test_conversion_options():
    params = {"dense": {"kernel": np.ones((6, 4), np.float32)}}
    for options in ({"nblocks": 0}, {"rank": 0}, {"nblocks": -1, "rank": 1}):
        with pytest.raises(ValueError, match=r"at least 1 .*got"):
            monarchize_params(params, EVERY, **options)
        with pytest.raises(ValueError, match=r"monarchize: .* at least 1"):
            monarchize(nnx.Linear(6, 4, rngs=nnx.Rngs(0)), **options)
    with pytest.raises(ValueError, match="floating-point"):
        monarchize_params({"kernel": jnp.ones((4, 4), int)}, EVERY)


def test_like_that_does_not_fit():
    params = {"a": {"w1": np.ones((2, 2, 4)), "w2": np.ones((2, 3, 2))}}
    with pytest.raises(ValueError, match=r"kernel at \('a',\)") as caught:
        densify_params(params, like={"b": {"kernel": np.ones((8, 6))}})
    assert "('b',)" in str(caught.value)
    for shape in ((9, 6), (8, 7)):
        with pytest.raises(ValueError, match=r"no larger than \(8, 6\)") as caught:
            densify_params(params, like={"a": {"kernel": np.ones(shape)}})
        assert f"got {shape}" in str(caught.value)


def test_a_kernel_with_nan_ends():
    kernel = np.ones((40, 24), np.float32)
    kernel[3, 5] = np.nan
    new = monarchize_params({"kernel": kernel}, EVERY, nblocks=4)
    back = densify_params(new)["kernel"]
    assert jnp.isnan(back).any()
    assert not jnp.isnan(back).all()


def test_without_flax_the_message_names_the_extra():
    code = """
import sys
sys.modules["flax"] = None
import jaxlab.structured
try:
    import jaxlab.layers
except ImportError as error:
    assert 'pip install "jaxlab[train]"' in str(error), error
    assert isinstance(error.__cause__, ModuleNotFoundError), error.__cause__
    print("refused")
"""
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert run.stdout == "refused\n", run.stderr
