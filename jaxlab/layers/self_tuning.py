"""Self-tuning networks' layers as Flax NNX modules.

Thin holders of parameters over :mod:`jaxlab.optimizers.best_response`, which has the
mathematics and the reference.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float, Inexact, Num

from jaxlab._checks import check_sequence
from jaxlab.optimizers.best_response.gates import (
    GatedParams,
    gated_conv,
    gated_linear,
    gated_weights,
    init_gated,
)


class _Gated(nnx.Module):
    """Holds what is common to both layers; fields are those of ``GatedParams``."""

    def _draw(self, shape, hyperparameters, use_bias, dtype, param_dtype, rngs):
        params = init_gated(
            rngs.params(),
            shape,
            hyperparameters=hyperparameters,
            use_bias=use_bias,
            dtype=param_dtype,
        )
        for name, value in params._asdict().items():
            held = nnx.data(None) if value is None else nnx.Param(value)
            setattr(self, name, held)
        self.hyperparameters = hyperparameters
        self.use_bias = use_bias
        self.dtype = dtype
        self.param_dtype = param_dtype

    def params(self) -> GatedParams:
        """Gives the parameters as the functions of ``self_tuning`` take them."""
        held = (getattr(self, name) for name in GatedParams._fields)
        return GatedParams(*(p if p is None else p[...] for p in held))

    def weights(
        self, u: Float[ArrayLike, " h"]
    ) -> tuple[Float[Array, "..."], Float[Array, "..."] | None]:
        """Gives the kernel and bias of the plain layer at one u."""
        return gated_weights(self.params(), u)

    def _promoted(self, x):
        # The gates keep their precision: it is their result that is rounded.
        params = self.params()
        x, kernel, response = nnx.nn.dtypes.promote_dtype(
            (x, params.kernel, params.response_kernel), dtype=self.dtype
        )
        return params._replace(kernel=kernel, response_kernel=response), x


class SelfTuningLinear(_Gated):
    """Maps the last axis by weights that depend on hyperparameters.

    The parameters are those of :class:`GatedParams`, the kernels (in, out) as in
    ``nnx.Linear``.

    Args:
      in_features: width of the input, at least 1.
      out_features: width of the output, at least 1.
      hyperparameters: entries of u, at least 1.
      use_bias: whether to add a bias, which is gated, too.
      dtype: of the computation and of the output; None takes the common dtype of
        input and parameters.
      param_dtype: of the parameters.
      rngs: random streams; ``params`` is used.

    Raises:
      ValueError: if a size is below 1; from a call, where the shapes do not match.

    Examples:
      >>> from flax import nnx
      >>> layer = SelfTuningLinear(3, 2, hyperparameters=4, rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((5, 3)), jnp.zeros((5, 4))).shape
      (5, 2)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        hyperparameters: int,
        use_bias: bool = True,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        shape = (in_features, out_features)
        self._draw(shape, hyperparameters, use_bias, dtype, param_dtype, rngs)
        self.in_features = in_features
        self.out_features = out_features

    def __call__(
        self, x: Num[ArrayLike, "*batch inputs"], u: Float[ArrayLike, "*rows h"]
    ) -> Inexact[Array, "*batch outputs"]:
        """Computes rows ``(..., out_features)`` from rows ``(..., in_features)``."""
        params, x = self._promoted(x)
        return gated_linear(params, x, u)


class SelfTuningConv(_Gated):
    """Convolves with filters that depend on hyperparameters, channels last.

    The parameters are those of :class:`GatedParams`, the kernels (*window, in, out) as
    in ``nnx.Conv``.

    Args:
      in_features: channels of the input, a multiple of ``groups``.
      out_features: channels of the output, a multiple of ``groups``.
      kernel_size: the window, one count for each axis of space.
      hyperparameters: entries of u, at least 1.
      strides: of the window, for all axes or each.
      padding: "SAME", "VALID" or pairs of counts.
      dilation: of the kernel, for all axes or each.
      groups: of channels that are convolved apart.
      use_bias: whether to add a bias, which is gated, too.
      dtype: as in :class:`SelfTuningLinear`.
      param_dtype: of the parameters.
      rngs: random streams; ``params`` is used.

    Raises:
      ValueError: if a size is below 1 or ``groups`` does not divide the channels; from
        a call, where the shapes do not match.

    Examples:
      >>> from flax import nnx
      >>> layer = SelfTuningConv(1, 4, (3, 3), hyperparameters=2, rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((5, 8, 8, 1)), jnp.zeros((5, 2))).shape
      (5, 8, 8, 4)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: Sequence[int],
        *,
        hyperparameters: int,
        strides: int | Sequence[int] = 1,
        padding: str | Sequence[tuple[int, int]] = "SAME",
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        use_bias: bool = True,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        check_sequence("SelfTuningConv", "kernel_size", kernel_size, "integers")
        if groups < 1 or in_features % groups or out_features % groups:
            raise ValueError(
                "SelfTuningConv: groups must divide in_features and out_features, got "
                f"{groups} for {in_features} and {out_features}."
            )
        shape = (*kernel_size, in_features // groups, out_features)
        self._draw(shape, hyperparameters, use_bias, dtype, param_dtype, rngs)
        self.in_features = in_features
        self.out_features = out_features
        self.kernel_size = tuple(kernel_size)
        self.strides = strides
        self.padding = padding
        self.dilation = dilation
        self.groups = groups

    def __call__(
        self, x: Num[ArrayLike, "*pixels inputs"], u: Float[ArrayLike, "*rows h"]
    ) -> Inexact[Array, "*positions outputs"]:
        """Computes ``(*batch, *space, out_features)`` from channels-last arrays."""
        params, x = self._promoted(x)
        return gated_conv(
            params,
            x,
            u,
            strides=self.strides,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
        )
