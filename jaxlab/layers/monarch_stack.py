"""A chain of Monarch layers whose activations are never shuffled.

The parameters are the folded factors of :mod:`jaxlab.structured`: both permutations of
every layer were moved into them once, when they were drawn. Element-wise optimizers do
not see the difference.
Reference: Dao et al., "Monarch: Expressive Structured Matrices for Efficient and
Accurate Training", ICML 2022; the folding is ours.
"""

import itertools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Inexact, Num

from jaxlab._checks import are_sizes
from jaxlab.structured import (
    FoldedLayer,
    MonarchFactors,
    fold_monarch_stack,
    init_monarch,
    monarch_stack_matmul,
    unfold_monarch_stack,
)


class MonarchStack(nnx.Module):
    """Maps the last axis by Monarch layers with an activation between them.

    It computes what an MLP of :class:`MonarchLinear` layers does (for the order
    "interleaved"), but keeps the features first and the tokens last from the first
    layer to the last, and moves no activation on the way.

    Args:
      features: widths of input, hidden layers and output; two or more. Hidden widths
        must be multiples of ``nblocks``, for the order "interleaved" of its square;
        the input is padded with zeros and the output cut.
      nblocks: blocks of each factor, at least 1.
      rank: of each slice of the matrices; None makes the middle of a layer as wide as
        the narrower end, rounded up to a multiple of ``nblocks**2``.
      activation: an element-wise function, applied after every layer but the last.
      order: of the entries between the layers: "interleaved", as in a chain of
        ``MonarchLinear``, or "block_major", which is faster where the blocks are
        small, but mixes the entries once a layer in place of twice; see
        :func:`jaxlab.structured.fold_monarch_stack`.
      features_first: whether input and output have the features on the first axis;
        that saves the transposes at both ends.
      use_bias: whether each layer adds a bias.
      dtype: of the computation and of the output; None takes the common dtype of
        input and parameters.
      param_dtype: of the parameters.
      scheme: of :func:`jaxlab.structured.init_monarch`; biases start at zero.
      rngs: random streams; ``params`` is used.

    Raises:
      ValueError: if a width, the rank, the scheme, the order or ``param_dtype`` is out
        of range; from a call, where the input is not ``features[0]`` wide.

    Examples:
      >>> from flax import nnx
      >>> stack = MonarchStack((10, 32, 32, 7), rngs=nnx.Rngs(0))
      >>> stack(jnp.ones((2, 3, 10))).shape
      (2, 3, 7)
      >>> factors, biases = stack.unfold()
      >>> [pair.w1.shape for pair in factors]
      [(4, 4, 3), (4, 8, 8), (4, 4, 8)]
    """

    def __init__(
        self,
        features: Sequence[int],
        *,
        nblocks: int = 4,
        rank: int | None = None,
        activation: Callable[[Array], Array] | None = nnx.relu,
        order: str = "interleaved",
        features_first: bool = False,
        use_bias: bool = True,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        scheme: str = "variance_preserving",
        rngs: nnx.Rngs,
    ):
        if not are_sizes(features) or len(features) < 2 or not are_sizes([nblocks]):
            raise ValueError(
                "MonarchStack: features must hold two or more widths, each at least 1, "
                f"and nblocks must be at least 1; got {features!r} and "
                f"nblocks={nblocks!r}."
            )
        features = tuple(features)
        multiple = nblocks**2 if order == "interleaved" else nblocks
        if any(width % multiple for width in features[1:-1]):
            raise ValueError(
                f"MonarchStack: hidden widths must be multiples of {multiple} for "
                f'nblocks={nblocks} and order="{order}", got {features}.'
            )
        pairs = []
        for inputs, outputs in itertools.pairwise(features):
            narrow = -(-min(inputs, outputs) // nblocks)
            pairs.append(
                init_monarch(
                    rngs.params(),
                    inputs,
                    outputs,
                    nblocks=nblocks,
                    rank=-(-narrow // nblocks) if rank is None else rank,
                    scheme=scheme,
                    dtype=param_dtype,
                )
            )
        biases = [
            jnp.zeros(w2.shape[0] * w2.shape[1], param_dtype) if use_bias else None
            for _, w2 in pairs
        ]
        layers = fold_monarch_stack(pairs, biases=biases, order=order)
        self.w1 = nnx.List([nnx.Param(layer.w1) for layer in layers])
        self.w2 = nnx.List([nnx.Param(layer.w2) for layer in layers])
        self.bias = nnx.List([nnx.Param(layer.bias) for layer in layers if use_bias])
        self.features = features
        self.nblocks = nblocks
        self.rank = rank
        self.activation = activation
        self.order = order
        self.features_first = features_first
        self.use_bias = use_bias
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.scheme = scheme

    def __call__(self, x: Num[ArrayLike, "..."]) -> Inexact[Array, "..."]:
        """Computes rows ``(..., features[-1])`` from rows ``(..., features[0])``."""
        leaves, structure = jax.tree.flatten(self._layers())
        x = jnp.asarray(x)
        x, *leaves = nnx.nn.dtypes.promote_dtype((x, *leaves), dtype=self.dtype)
        layers = jax.tree.unflatten(structure, leaves)
        axis, inputs = 0 if self.features_first else -1, self.features[0]
        if x.ndim == 0 or x.shape[axis] != inputs:
            raise ValueError(
                f"MonarchStack: the {'last' if axis else 'first'} axis of the input "
                f"must have features[0]={inputs} entries, got shape {x.shape}."
            )
        batch = x.shape[:-1] if axis else x.shape[1:]
        tokens = math.prod(batch)
        x = x.reshape(tokens, inputs).T if axis else x.reshape(inputs, tokens)
        missing = -inputs % self.nblocks
        if missing:
            x = jnp.pad(x, [(0, missing), (0, 0)])
        y = monarch_stack_matmul(
            x, layers, activation=self.activation, order=self.order
        )
        y = y[: self.features[-1]]
        if axis:
            return y.T.reshape(*batch, self.features[-1])
        return y.reshape(self.features[-1], *batch)

    def unfold(
        self,
    ) -> tuple[tuple[MonarchFactors, ...], tuple[Inexact[Array, "_"] | None, ...]]:
        """Gives the factors and biases as the products of one layer take them.

        The bias of the last layer has the entries that the output cuts off, too.
        """
        return unfold_monarch_stack(self._layers(), order=self.order)

    def _layers(self) -> tuple[FoldedLayer, ...]:
        biases = [bias[...] for bias in self.bias] or [None] * len(self.w1)
        return tuple(
            FoldedLayer(w1[...], w2[...], bias)
            for w1, w2, bias in zip(self.w1, self.w2, biases, strict=True)
        )
