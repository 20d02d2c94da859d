"""A linear layer whose matrix is a Monarch matrix.

Any widths are taken: the input is padded with zeros to ``nblocks * ceil(n / nblocks)``
entries and the output is cut to its width. With ``nblocks`` blocks the layer has about
``2 / nblocks`` of the parameters and operations of a dense square one.
Reference: Dao et al., "Monarch: Expressive Structured Matrices for Efficient and
Accurate Training", ICML 2022.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Inexact, Num

from jaxlab.structured import init_monarch, monarch_matmul


class MonarchLinear(nnx.Module):
    """Maps the last axis by a Monarch matrix; takes the place of ``nnx.Linear``.

    The parameters are ``w1`` (nblocks, q, p), ``w2`` (nblocks, s, q) and ``bias``
    (out_features,), where p and s are the widths over ``nblocks``, rounded up, and
    q = min(p, s) or, where a rank is given, ``rank * nblocks``. They stand for a
    matrix (outputs, inputs): the kernel of the equal ``nnx.Linear`` is its transpose.

    Args:
      in_features: width of the input, at least 1.
      out_features: width of the output, at least 1.
      nblocks: blocks of each factor, at least 1; more blocks, fewer parameters.
      rank: of each slice of the matrix, from 1 to min(p, s); None makes the middle
        as wide as the narrower end.
      use_bias: whether to add a bias.
      dtype: of the computation and of the output; None takes the common dtype of
        input and parameters, as in ``nnx.Linear``.
      param_dtype: of the parameters.
      scheme: "variance_preserving" or "mup" (zero bias), or "official", the authors'
        uniform distributions (bias within 1/sqrt(out_features)); see
        :func:`jaxlab.structured.init_monarch`.
      rngs: random streams; ``params`` is used.

    Raises:
      ValueError: if a size, the rank, the scheme or ``param_dtype`` is out of range;
        from a call, where the last axis of the input is not ``in_features`` wide.

    Examples:
      >>> from flax import nnx
      >>> layer = MonarchLinear(10, 7, nblocks=4, rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((2, 3, 10))).shape
      (2, 3, 7)
      >>> layer.w1.shape, layer.w2.shape, layer.bias.shape
      ((4, 2, 3), (4, 2, 2), (7,))
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        nblocks: int = 4,
        rank: int | None = None,
        use_bias: bool = True,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        scheme: str = "variance_preserving",
        rngs: nnx.Rngs,
    ):
        w1, w2 = init_monarch(
            rngs.params(),
            in_features,
            out_features,
            nblocks=nblocks,
            rank=rank,
            scheme=scheme,
            dtype=param_dtype,
        )
        self.w1 = nnx.Param(w1)
        self.w2 = nnx.Param(w2)
        self.bias = nnx.data(None)
        if use_bias and scheme == "official":
            bound = 1 / math.sqrt(out_features)
            self.bias = nnx.Param(
                jax.random.uniform(
                    rngs.params(), (out_features,), param_dtype, -bound, bound
                )
            )
        elif use_bias:
            self.bias = nnx.Param(jnp.zeros((out_features,), param_dtype))
        self.in_features = in_features
        self.out_features = out_features
        self.nblocks = nblocks
        self.rank = rank
        self.use_bias = use_bias
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.scheme = scheme

    def __call__(
        self, x: Num[ArrayLike, "*batch inputs"]
    ) -> Inexact[Array, "*batch outputs"]:
        """Computes rows ``(..., out_features)`` from rows ``(..., in_features)``."""
        bias = None if self.bias is None else self.bias[...]
        x = jnp.asarray(x)
        x, w1, w2, bias = nnx.nn.dtypes.promote_dtype(
            (x, self.w1[...], self.w2[...], bias), dtype=self.dtype
        )
        if x.ndim == 0 or x.shape[-1] != self.in_features:
            raise ValueError(
                "MonarchLinear: the last axis of the input must have in_features="
                f"{self.in_features} entries, got shape {x.shape}."
            )
        missing = w1.shape[0] * w1.shape[2] - self.in_features
        if missing:
            x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)])
        y = monarch_matmul(x, w1, w2)[..., : self.out_features]
        return y if bias is None else y + jnp.broadcast_to(bias, y.shape)
