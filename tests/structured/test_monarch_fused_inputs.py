"""What the fused kernels say to arrays that they do not take."""

import jax
import numpy as np
import pytest

from jaxlab.structured import monarch_matmul_fused

pytestmark = pytest.mark.untyped

X = np.ones((32, 3), np.float32)
W = np.ones((2, 16, 16), np.float32)


def test_numpy_arrays():
    y = monarch_matmul_fused(X, W, W, platform="tpu", interpret=True)
    assert isinstance(y, jax.Array)


@pytest.mark.parametrize(
    ("x", "w1", "w2", "options", "message"),
    [
        (X, W, W, {}, 'got "cpu"'),
        (X, W, W, {"platform": "xpu"}, "platform must be"),
        (X.T, W, W, {"platform": "tpu"}, "the first axis of x"),
        (X, W, W[:1], {"platform": "tpu"}, r"k \* q == l \* r"),
        (X, W[0], W, {"platform": "tpu"}, "w1 must have shape"),
        (X.astype(int), W, W, {"platform": "tpu"}, "floating-point"),
        (X.astype(complex), W, W, {"platform": "tpu"}, "common dtype"),
        (X[:30], W[..., :15], W, {"platform": "tpu"}, r"got {'p': 15}"),
        (X, W[:, :15], W[..., :15], {"platform": "tpu"}, r"got {'q': 15}"),
        (X, W, W[:, :12], {"platform": "tpu"}, r"got {'s': 12}"),
        (X, W, W, {"platform": "gpu"}, r"'c = q / l': 8"),
        (X, W, np.ones((32, 16, 1)), {"platform": "gpu"}, r"'c = q / l': 0.5"),
    ],
)
def test_what_no_kernel_takes(x, w1, w2, options, message):
    with pytest.raises(ValueError, match=message):
        monarch_matmul_fused(x, w1, w2, **options)
