"""Layers whose weights are affine in hyperparameters, gated by output unit.

See :mod:`jaxlab.optimizers.best_response` for what they approximate.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float, Inexact, Key, Num

from jaxlab._array_checks import check_fields
from jaxlab._checks import (
    check_count,
    check_flag,
    check_number,
    check_sequence,
    described,
    is_whole,
)


class GatedParams(NamedTuple):
    """Parameters of a gated layer; the last three are ``None`` without a bias.

    Attributes:
      kernel: W, shaped as in ``nnx.Linear`` and ``nnx.Conv``: ``(*window, in, out)``.
      response_kernel: V, how the weights move, a direction for each output.
      kernel_gate: U_w, how far, for each hyperparameter and output.
      scale: c, one number.
      bias: b.
      response_bias: b_V.
      bias_gate: U_b.

    Examples:
      >>> init_gated(jax.random.key(0), (3, 2), hyperparameters=1).kernel_gate.shape
      (1, 2)
    """

    kernel: Float[Array, "*window inputs outputs"]
    response_kernel: Float[Array, "*window inputs outputs"]
    kernel_gate: Float[Array, "h outputs"]
    scale: Float[Array, ""]
    bias: Float[Array, " outputs"] | None = None
    response_bias: Float[Array, " outputs"] | None = None
    bias_gate: Float[Array, "h outputs"] | None = None


def init_gated(
    key: Key[Array, ""],
    shape: Sequence[int],
    *,
    hyperparameters: int,
    use_bias: bool = True,
    gate_scale: float = 0.01,
    dtype: DTypeLike = jnp.float32,
) -> GatedParams:
    """Draws the parameters of a gated layer, as the authors' code does.

    Kernels and biases are uniform within 1/sqrt(fan-in), the gates normal with
    deviation ``gate_scale``, and c is 1.

    Args:
      key: of the draws.
      shape: of the kernel, ``(in, out)`` or ``(*window, in, out)``; for a convolution
        in groups, ``in`` is that of one group.
      hyperparameters: how many, at least 1.
      use_bias: whether the layer adds a bias, which is gated, too.
      gate_scale: deviation of the gates, >= 0; at 0 the layer starts as a plain one and
        V does not move on the first step.
      dtype: of all parameters, floating.

    Returns:
      The parameters.

    Raises:
      ValueError: if a size is no integer >= 1, there are fewer than two, the deviation
        is negative or the dtype is not floating.

    Examples:
      >>> params = init_gated(jax.random.key(0), (3, 3, 8, 16), hyperparameters=2)
      >>> params.kernel.shape, params.bias_gate.shape, float(params.scale)
      ((3, 3, 8, 16), (2, 16), 1.0)
    """
    check_sequence("init_gated", "shape", shape, "sizes")
    check_flag("init_gated", use_bias=use_bias)
    shape = tuple(shape)
    if len(shape) < 2 or not all(map(_is_size, (*shape, hyperparameters))):
        raise ValueError(
            "init_gated: shape must be (in, out) or (*window, in, out) and "
            f"hyperparameters a count, all integers >= 1, got {shape} and "
            f"hyperparameters={hyperparameters!r}."
        )
    check_number("init_gated", "finite and >= 0", gate_scale=gate_scale)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"init_gated: dtype must be floating, got {dtype}.")
    bound = 1 / math.sqrt(math.prod(shape[:-1]))
    keys = jax.random.split(key, 6)
    draw = lambda key, shape: jax.random.uniform(key, shape, dtype, -bound, bound)
    gate = lambda key: (
        gate_scale * jax.random.normal(key, (hyperparameters, shape[-1]), dtype)
    ).astype(dtype)
    weights = draw(keys[0], shape), draw(keys[1], shape), gate(keys[2])
    biases = (None, None, None)
    if use_bias:
        width = shape[-1:]
        biases = draw(keys[3], width), draw(keys[4], width), gate(keys[5])
    return GatedParams(*weights, jnp.ones((), dtype), *biases)


def gated_linear(
    params: GatedParams,
    x: Num[ArrayLike, "*batch inputs"],
    u: Float[ArrayLike, "*rows h"],
) -> Inexact[Array, "*batch outputs"]:
    """Maps the last axis by weights that depend on each row's hyperparameters.

    ``y = c (x W + b) + (u U_w) * (x V) + (u U_b) * b_V``: two matrix products, whether
    or not u varies over the rows.

    Args:
      params: from :func:`init_gated` with a shape ``(in, out)``.
      x: rows.
      u: the unbounded hyperparameters, ``(h,)`` for all rows, or with a leading part of
        the axes of ``x`` before the last, such as one row for each example.

    Returns:
      The outputs, in the common dtype of ``x`` and ``params``. Gates are computed in
      that of ``u`` and rounded once.

    Raises:
      ValueError: if the shapes do not match.

    Examples:
      >>> params = init_gated(jax.random.key(0), (3, 2), hyperparameters=1)
      >>> x, u = jnp.ones((5, 7, 3)), jnp.zeros((5, 1))
      >>> gated_linear(params, x, u).shape
      (5, 7, 2)
    """
    name = "gated_linear"
    params = _checked(name, params)
    x, u = _check(name, params, x, u, window=0)
    product = lambda kernel: jnp.matmul(x, kernel)
    with jax.named_scope(name):
        return _combine(params, product, u, x.dtype)


def gated_conv(
    params: GatedParams,
    x: Num[ArrayLike, "*pixels inputs"],
    u: Float[ArrayLike, "*rows h"],
    *,
    strides: int | Sequence[int] = 1,
    padding: str | Sequence[tuple[int, int]] = "SAME",
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Inexact[Array, "*positions outputs"]:
    """Convolves with filters that depend on each example's hyperparameters.

    As :func:`gated_linear`, with a gate for each output channel: two convolutions.

    Args:
      params: from :func:`init_gated` with a shape ``(*window, in, out)``.
      x: ``(*batch, *space, channels)`` with as many axes of space as the window.
      u: ``(h,)``, or with a leading part of the batch's axes before h.
      strides: of the window, for all axes or each.
      padding: "SAME", "VALID" or pairs of counts.
      dilation: of the kernel, for all axes or each.
      groups: of channels that are convolved apart.

    Returns:
      The outputs ``(*batch, *space, outputs)``, in the common dtype of ``x`` and
      ``params``.

    Raises:
      ValueError: if the shapes do not match.

    Examples:
      >>> params = init_gated(jax.random.key(0), (3, 3, 1, 4), hyperparameters=2)
      >>> gated_conv(params, jnp.ones((5, 8, 8, 1)), jnp.zeros((5, 2)), strides=2).shape
      (5, 4, 4, 4)
    """
    name = "gated_conv"
    params = _checked(name, params)
    check_count(name, groups=groups)
    window = params.kernel.ndim - 2
    x, u = _check(name, params, x, u, window=window, groups=groups)
    batch = x.shape[: x.ndim - window - 1]
    flat = x.reshape(math.prod(batch), *x.shape[len(batch) :])
    strides = _each(name, "strides", strides, window)
    dilation = _each(name, "dilation", dilation, window)
    space = tuple(range(1, window + 1))
    layout = lax.ConvDimensionNumbers(
        lhs_spec=(0, window + 1, *space),
        rhs_spec=(window + 1, window, *range(window)),
        out_spec=(0, window + 1, *space),
    )

    def product(kernel):
        y = lax.conv_general_dilated(
            flat,
            kernel,
            strides,
            padding,
            rhs_dilation=dilation,
            dimension_numbers=layout,
            feature_group_count=groups,
        )
        return y.reshape(*batch, *y.shape[1:])

    with jax.named_scope(name):
        return _combine(params, product, u, x.dtype)


def gated_weights(
    params: GatedParams, u: Float[ArrayLike, " h"]
) -> tuple[Float[Array, "*window inputs outputs"], Float[Array, " outputs"] | None]:
    """Gives the kernel and bias of the plain layer at one u.

    Args:
      params: from :func:`init_gated`.
      u: the unbounded hyperparameters.

    Returns:
      ``c W + (u U_w) * V`` and ``c b + (u U_b) * b_V`` or ``None``, in the dtype of
      ``params``: for ``nnx.Linear`` or ``nnx.Conv`` once the hyperparameters are
      final, or where all rows share them. Map it over rows for penalties of each row.

    Raises:
      ValueError: if ``u`` is not a vector of the length that ``params`` have.

    Examples:
      >>> params = init_gated(jax.random.key(0), (3, 2), hyperparameters=1)
      >>> kernel, bias = gated_weights(params, jnp.zeros(1))
      >>> bool(jnp.all(kernel == params.kernel))  # c is 1, the gate is closed
      True
    """
    params = _checked("gated_weights", params)
    u = jnp.asarray(u)
    if u.shape != params.kernel_gate.shape[:1]:
        raise ValueError(
            "gated_weights: u must be a vector of "
            f"{params.kernel_gate.shape[0]} hyperparameters, got shape {u.shape}; "
            "map over rows with jax.vmap."
        )
    move = lambda w, v, gate: _plus(params.scale * w, v, u, gate)
    kernel = move(params.kernel, params.response_kernel, params.kernel_gate)
    if params.bias is None:
        return kernel, None
    return kernel, move(params.bias, params.response_bias, params.bias_gate)


def _combine(params: GatedParams, product: Any, u: Array, dtype: Any) -> Array:
    """Adds the plain layer and the gated one."""
    cast = lambda p: p if p is None else p.astype(dtype)
    params = GatedParams(*map(cast, params[:2]), params.kernel_gate, *params[3:])
    base, response = product(params.kernel), product(params.response_kernel)
    scale = params.scale.astype(dtype)
    y = _plus(scale * base, response, u, params.kernel_gate)
    if params.bias is None:
        return y
    plain = (scale * params.bias.astype(dtype)).reshape(*(1,) * (u.ndim - 1), -1)
    bend = params.response_bias.astype(dtype).reshape(plain.shape)
    bias = _plus(plain, bend, u, params.bias_gate)
    return y + jnp.broadcast_to(_spread(bias, y.ndim), y.shape)


def _plus(base: Array, response: Array, u: Array, gate: Array) -> Array:
    """Adds ``(u gate) * response``; the gate is rounded to the dtype of base."""
    open_ = jnp.matmul(u, gate.astype(jnp.promote_types(gate.dtype, u.dtype)))
    open_ = _spread(open_.astype(base.dtype), max(base.ndim, open_.ndim))
    return base + open_ * response


def _spread(y: Array, ndim: int) -> Array:
    """Puts axes of length 1 before the last, up to so many."""
    return y.reshape(*y.shape[:-1], *(1,) * (ndim - y.ndim), y.shape[-1])


def _check(
    name: str, params: GatedParams, x: Any, u: Any, *, window: int, groups: int = 1
) -> tuple[Array, Array]:
    """Checks shapes; gives ``x`` in the common dtype with ``params``, and ``u``.

    Raises:
      ValueError: naming the shapes.
    """
    x, u, kernel = jnp.asarray(x), jnp.asarray(u), params.kernel
    if kernel.ndim - 2 != window or (name == "gated_conv" and not window):
        need = "(*window, in, out)" if name == "gated_conv" else "(in, out)"
        raise ValueError(
            f"{name}: the kernel must have shape {need}, got {kernel.shape}."
        )
    inputs, batch = kernel.shape[-2] * groups, x.shape[: max(x.ndim - window - 1, 0)]
    if x.ndim < window + 1 or x.shape[-1] != inputs:
        axes = f"{window} axes of space and " if window else ""
        raise ValueError(
            f"{name}: x must end with {axes}{inputs} entries on the last axis, got "
            f"shape {x.shape}."
        )
    count = params.kernel_gate.shape[0]
    if not u.ndim or u.shape[-1] != count or u.shape[:-1] != batch[: u.ndim - 1]:
        raise ValueError(
            f"{name}: u must have shape (..., {count}), the dots a leading part of the "
            f"axes {batch} of x, got shape {u.shape}."
        )
    return x.astype(jnp.promote_types(x.dtype, kernel.dtype)), u


def _checked(name: str, params: GatedParams) -> GatedParams:
    kernels = dict.fromkeys(("kernel", "response_kernel"), "*window inputs outputs")
    biases, gates = {}, {"kernel_gate": "h outputs"}
    if getattr(params, "bias", None) is not None:
        biases = dict.fromkeys(("bias", "response_bias"), "outputs")
        gates["bias_gate"] = "h outputs"
    return check_fields(
        name,
        "params",
        params,
        GatedParams,
        "init_gated",
        **kernels,
        **gates,
        **biases,
        scale="",
    )


def _each(name: str, argument: str, numbers: Any, window: int) -> tuple[int, ...]:
    """Gives one number for each axis of the window."""
    several = tuple(numbers) if isinstance(numbers, (tuple, list)) else ()
    several = several or (numbers,) * window
    if len(several) != window or not all(map(_is_size, several)):
        raise ValueError(
            f"{name}: {argument} must be an integer >= 1, or {window} of them, got "
            f"{described(numbers)}."
        )
    return tuple(map(int, several))


def _is_size(number: Any) -> bool:
    return is_whole(number) and number >= 1
