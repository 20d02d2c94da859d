"""Chains of Monarch layers in which no activation is shuffled.

A Monarch product permutes twice: its middle, and its output where that is interleaved.
Between two layers of a chain nobody needs the order of the entries, so both fixed
permutations can be applied to the factors once instead of to the activations in every
call. With c = q / l the folded factors of a layer are

    w1[kappa, lam, a, :]  = the official w1[kappa, a*l + lam, :]       (k, l, c, p)
    w2[lam, :, kappa, a]  = the official w2[lam, :, kappa*c + a]       (l, s, k, c)

and a layer is two products that each read the other's output as it lies, the features
in front and the tokens t last:

    h[kappa, lam, a, t] = sum_pi w1[kappa, lam, a, pi] x[kappa, pi, t]
    y[lam, sigma, t]    = sum_{kappa, a} w2[lam, sigma, kappa, a] h[kappa, lam, a, t]

The next layer takes y, which is in block-major order, in one of two ways.

- order "interleaved": the chain of interleaved products, that of `monarch_matmul`. Its
  block kappa reads s/k rows sigma of every block lam, so the columns of its w1 are
  stored (lam, sigma) in place of (sigma, lam), and it reads y as (l, k, s/k, t).
- order "block_major": the chain of block-major products. Its block kappa reads p
  neighbours of y, which is y as it lies. Where it has as many blocks as the layer
  before, each of them reads one block only; the entries mix once a layer, not twice.

Element-wise functions and biases commute with permutations, so they may stand between.
Folding and unfolding are exact: they move entries and compute nothing.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Inexact

from jaxlab._checks import check_sequence
from jaxlab.structured.monarch import _forms
from jaxlab.structured.monarch.multiply import (
    MonarchFactors,
    OutputLayout,
    _check_factors,
    _is_interleaved,
    _platform,
    _promote,
)

Activation = Callable[[Array], Array]


class FoldedLayer(NamedTuple):
    """Holds one layer of a folded chain; a pytree of two or three arrays.

    Attributes:
      w1: the factor next to the input, (k, l, c, p).
      w2: the factor next to the output, (l, s, k, c).
      bias: in block-major order, (l, s), or None.

    Examples:
      >>> factors = jnp.ones((2, 2, 3)), jnp.ones((2, 1, 2))
      >>> (layer,) = fold_monarch_stack([factors])
      >>> layer.w1.shape, layer.w2.shape, layer.bias
      ((2, 2, 1, 3), (2, 1, 2, 1), None)
    """

    w1: Inexact[Array, "k l c p"]
    w2: Inexact[Array, "l s k c"]
    bias: Inexact[Array, "l s"] | None = None


def fold_monarch_stack(
    factors: Sequence[tuple[Inexact[ArrayLike, "_ _ _"], Inexact[ArrayLike, "_ _ _"]]],
    *,
    biases: Sequence[Inexact[ArrayLike, "_"] | None] | None = None,
    order: OutputLayout = "interleaved",
) -> tuple[FoldedLayer, ...]:
    """Moves the fixed permutations of a chain of Monarch layers into its factors.

    Args:
      factors: one or more pairs (w1, w2) as `monarch_matmul` takes them, that next to
        the input first. l must divide q in each; the outputs s*l of one must be the
        inputs k*p of the next. For the order "interleaved" the l of one must also
        divide the p of the next.
      biases: a vector of s*l entries, or None, for each pair, in the order of the
        outputs of `monarch_matmul` with ``output_layout=order``.
      order: of the entries between the layers, "interleaved" or "block_major".

    Returns:
      A layer of folded factors for each pair, for `monarch_stack_matmul`.

    Raises:
      ValueError: if there are no factors, they do not fit together or cannot be
        folded, the biases do not fit them, or the order is unknown.

    Examples:
      >>> pair = jnp.ones((2, 4, 8)), jnp.ones((2, 8, 4))
      >>> [layer.w1.shape for layer in fold_monarch_stack([pair, pair])]
      [(2, 2, 2, 8), (2, 2, 2, 8)]
    """
    name = "fold_monarch_stack"
    mixed = _is_interleaved(name, order, "order")
    check_sequence(name, "factors", factors, "pairs (w1, w2)")
    pairs = [_pair(name, i, pair) for i, pair in enumerate(factors)]
    if not pairs:
        raise ValueError(f"{name}: factors must hold at least one pair (w1, w2).")
    biases = [None] * len(pairs) if biases is None else list(biases)
    if len(biases) != len(pairs):
        raise ValueError(
            f"{name}: biases must hold a vector or None for each of the {len(pairs)} "
            f"pairs of factors, got {len(biases)}."
        )
    layers: list[FoldedLayer] = []
    for i, ((w1, w2), bias) in enumerate(zip(pairs, biases, strict=True)):
        (k, q, p), (l, s, _) = w1.shape, w2.shape
        if q % l:
            raise ValueError(
                f"{name}: l must divide q in every pair; factors[{i}] has w1 of shape "
                f"(k, q, p) = {w1.shape} and w2 (l, s, r) = {w2.shape}. Use "
                "monarch_matmul_features for such factors."
            )
        c = q // l
        first = w1.reshape(k, c, l, p).swapaxes(1, 2)
        if layers:
            blocks, rows = layers[-1].w2.shape[:2]
            _check_seam(name, i, (blocks, rows), (k, p), mixed)
            if mixed:
                first = first.reshape(k, l, c, p // blocks, blocks).swapaxes(3, 4)
        if bias is not None:
            bias = _fold_bias(name, i, bias, (l, s), mixed)
        layers.append(
            FoldedLayer(first.reshape(k, l, c, p), w2.reshape(l, s, k, c), bias)
        )
    return tuple(layers)


def unfold_monarch_stack(
    layers: Sequence[FoldedLayer], *, order: OutputLayout = "interleaved"
) -> tuple[tuple[MonarchFactors, ...], tuple[Inexact[Array, "_"] | None, ...]]:
    """Gives back the factors and biases that `fold_monarch_stack` took.

    Args:
      layers: folded layers.
      order: the one that they were folded for.

    Returns:
      The pairs (w1, w2) and, for each, its bias vector or None.

    Raises:
      ValueError: if the layers do not fit together or the order is unknown.

    Examples:
      >>> pair = MonarchFactors(jnp.arange(8.0).reshape(2, 2, 2), jnp.ones((2, 1, 2)))
      >>> (back,), (bias,) = unfold_monarch_stack(fold_monarch_stack([pair]))
      >>> bool((back.w1 == pair.w1).all()), bias
      (True, None)
    """
    name = "unfold_monarch_stack"
    mixed = _is_interleaved(name, order, "order")
    _check_layers(name, layers, mixed)
    return _unfold(layers, mixed)


def _unfold(
    layers: Sequence[FoldedLayer], mixed: bool
) -> tuple[tuple[MonarchFactors, ...], tuple[Array | None, ...]]:
    pairs, biases = [], []
    for i, (w1, w2, bias) in enumerate(layers):
        (k, l, c, p), s = w1.shape, w2.shape[1]
        if mixed and i:
            blocks = layers[i - 1].w2.shape[0]
            w1 = w1.reshape(k, l, c, blocks, p // blocks).swapaxes(3, 4)
        w1 = w1.reshape(k, l, c, p).swapaxes(1, 2).reshape(k, c * l, p)
        pairs.append(MonarchFactors(w1, w2.reshape(l, s, k * c)))
        if bias is not None:
            bias = (bias.T if mixed else bias).ravel()
        biases.append(bias)
    return tuple(pairs), tuple(biases)


def monarch_stack_matmul(
    x: Inexact[ArrayLike, "n *batch"],
    layers: Sequence[FoldedLayer],
    *,
    activation: Activation | Sequence[Activation] | None = None,
    order: OutputLayout = "interleaved",
    output_layout: OutputLayout | None = None,
    platform: str | None = None,
) -> Inexact[Array, "m *batch"]:
    """Applies a folded chain of Monarch layers to columns.

    It computes ``monarch_matmul_features`` of every pair in turn, bias and activation
    between, without moving an activation: products accumulate in float32 at least, and
    what they give has the common dtype of the arrays.

    Args:
      x: columns of height n = k*p; any further dimensions, empty ones too.
      layers: what `fold_monarch_stack` gave for the same ``order``.
      activation: an element-wise function that is applied after every layer but the
        last, or a sequence of such functions, one for each gap; None for none. A
        function that looks at several entries together would see them permuted.
      order: the one that the layers were folded for.
      output_layout: of the result: "interleaved", "block_major", or None, which means
        ``order``. Interleaving is one more pass: where the next consumer does not
        care, ask for "block_major".
      platform: "cpu", "gpu" or "tpu", where the program is compiled for another
        platform than the default backend, ``None``. It only decides about speed.

    Returns:
      Columns of height m = s*l of the last layer, with the further dimensions of x.

    Raises:
      ValueError: if the layers do not fit together, ``x`` or the activations do not
        fit them, an array holds integers, or a layout or the platform is unknown.

    Examples:
      >>> pair = jnp.ones((2, 2, 2)), jnp.ones((2, 2, 2))
      >>> layers = fold_monarch_stack([pair, pair])
      >>> monarch_stack_matmul(jnp.ones((4, 3)), layers, activation=jax.nn.relu)[0]
      Array([16., 16., 16.], dtype=float32)
    """
    name = "monarch_stack_matmul"
    mixed = _is_interleaved(name, order, "order")
    layout = order if output_layout is None else output_layout
    interleaved = _is_interleaved(name, layout)
    _check_layers(name, layers, mixed)
    functions = _functions(name, activation, len(layers) - 1)
    leaves, structure = jax.tree.flatten(tuple(layers))
    named = {f"layers[{i}]": leaf for i, leaf in enumerate(leaves)}
    (x, *leaves), _ = _promote(name, x=x, **named)
    layers = jax.tree.unflatten(structure, leaves)
    k, _, _, p = layers[0].w1.shape
    if x.ndim == 0 or x.shape[0] != k * p:
        raise ValueError(
            f"{name}: the first axis of x must have k * p = {k} * {p} = {k * p} "
            f"entries for a first layer with w1 of shape {layers[0].w1.shape}, got x "
            f"of shape {x.shape}; tokens stand last here."
        )
    batch = x.shape[1:]
    y = x.reshape(k * p, math.prod(batch))
    form = _unfolded if _platform(name, platform) == "gpu" else _folded
    with jax.named_scope(name):
        y = form(y, layers, functions, mixed, interleaved)
        return y.reshape(y.shape[0], *batch)


def _folded(
    y: Inexact[Array, "n t"],
    layers: Sequence[FoldedLayer],
    functions: Sequence[Activation],
    mixed: bool,
    interleaved: bool,
) -> Inexact[Array, "m t"]:
    """Multiplies by the factors as they are stored."""
    dtype, tokens = y.dtype, y.shape[1]
    wide = jnp.promote_types(dtype, jnp.float32)
    for i, (w1, w2, bias) in enumerate(layers):
        k, l, c, p = w1.shape
        if mixed and i:
            blocks = layers[i - 1].w2.shape[0]
            w1 = w1.reshape(k, l, c, blocks, p // blocks)
            y = y.reshape(blocks, k, p // blocks, tokens)
            product = "klcms,mkst->klct"
        else:
            y, product = y.reshape(k, p, tokens), "klcp,kpt->klct"
        h = jnp.einsum(product, w1, y, preferred_element_type=wide).astype(dtype)
        y = jnp.einsum("lskc,klct->lst", w2, h, preferred_element_type=wide)
        y = y.astype(dtype)
        if bias is not None:
            y = y + jnp.broadcast_to(bias[..., None], y.shape)
        if i < len(functions):
            y = functions[i](y)
    if interleaved:
        y = y.swapaxes(0, 1)
    return y.reshape(y.shape[0] * y.shape[1], tokens)


def _unfolded(
    y: Inexact[Array, "n t"],
    layers: Sequence[FoldedLayer],
    functions: Sequence[Activation],
    mixed: bool,
    interleaved: bool,
) -> Inexact[Array, "m t"]:
    """Unfolds the factors, which are small, and multiplies one product at a time.

    A GPU's product takes one contracted axis: h would have to be laid out anew where
    c > 1, but reads and writes the shuffled middle of the plain form as it lies.
    """
    pairs, biases = _unfold(layers, mixed)
    for i, ((w1, w2), bias) in enumerate(zip(pairs, biases, strict=True)):
        last = i == len(pairs) - 1
        if last and bias is not None and interleaved != mixed:
            l, s = w2.shape[:2]
            bias = (bias.reshape(l, s) if interleaved else bias.reshape(s, l)).T.ravel()
        y = _forms.features(y, w1, w2, interleaved if last else mixed)
        if bias is not None:
            y = y + jnp.broadcast_to(bias[:, None], y.shape)
        if i < len(functions):
            y = functions[i](y)
    return y


def _pair(name: str, i: int, pair: object) -> tuple[Array, Array]:
    """Brings one pair of factors to its common dtype and refuses what does not fit."""
    if not isinstance(pair, Sequence) or len(pair) != 2:
        raise ValueError(f"{name}: factors[{i}] must be a pair (w1, w2), got {pair!r}.")
    (w1, w2), _ = _promote(name, w1=pair[0], w2=pair[1])
    _check_factors(name, w1, w2)
    return w1, w2


def _fold_bias(
    name: str, i: int, bias: ArrayLike, shape: tuple[int, int], mixed: bool
) -> Array:
    (vector,), _ = _promote(name, bias=bias)
    l, s = shape
    if vector.shape != (l * s,):
        raise ValueError(
            f"{name}: biases[{i}] must have shape ({l * s},), an entry for each output "
            f"of factors[{i}], got {vector.shape}."
        )
    return vector.reshape(s, l).T if mixed else vector.reshape(l, s)


def _check_seam(
    name: str, i: int, before: tuple[int, int], after: tuple[int, int], mixed: bool
) -> None:
    """Refuses a layer that cannot read the one before as it lies."""
    (l, s), (k, p) = before, after
    if l * s != k * p:
        raise ValueError(
            f"{name}: layer {i} takes k * p = {k} * {p} = {k * p} entries, but layer "
            f"{i - 1} gives s * l = {s} * {l} = {s * l}."
        )
    if mixed and p % l:
        raise ValueError(
            f'{name}: with order="interleaved" the l = {l} blocks of layer {i - 1} '
            f"must divide the p = {p} inputs of a block of layer {i}; take fewer "
            'blocks, order="block_major" or monarch_matmul_features.'
        )


def _check_layers(name: str, layers: Sequence[FoldedLayer], mixed: bool) -> None:
    """Refuses folded layers that do not fit together."""
    if not layers:
        raise ValueError(f"{name}: layers must hold at least one FoldedLayer.")
    for i, layer in enumerate(layers):
        if not isinstance(layer, FoldedLayer):
            raise ValueError(
                f"{name}: layers[{i}] must be a FoldedLayer, got "
                f"{type(layer).__name__}; fold_monarch_stack(factors) makes them."
            )
        first, second = jnp.shape(layer.w1), jnp.shape(layer.w2)
        fit = len(first) == len(second) == 4
        fit = fit and (first[0], first[1], first[2]) == (
            second[2],
            second[0],
            second[3],
        )
        if fit and layer.bias is not None:
            fit = jnp.shape(layer.bias) == second[:2]
        if not fit:
            raise ValueError(
                f"{name}: layers[{i}] must have w1 (k, l, c, p), w2 (l, s, k, c) and "
                f"bias (l, s) or None, got {first}, {second} and "
                f"{None if layer.bias is None else jnp.shape(layer.bias)}."
            )
        if i:
            before = jnp.shape(layers[i - 1].w2)
            _check_seam(name, i, before[:2], (first[0], first[3]), mixed)


def _functions(
    name: str, activation: Activation | Sequence[Activation] | None, gaps: int
) -> list[Activation]:
    """Gives a function for each gap, or an empty list."""
    if activation is None:
        return []
    if callable(activation):
        return [activation] * gaps
    functions = list(activation)
    if len(functions) != gaps or not all(map(callable, functions)):
        raise ValueError(
            f"{name}: activation must be a function, or a sequence of {gaps} functions "
            f"for {gaps + 1} layers, got {activation!r}."
        )
    return functions
