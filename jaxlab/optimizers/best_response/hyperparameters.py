"""Hyperparameters without bounds: their ranges, and noise of a trained size."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Key

from jaxlab._checks import check_count, check_number, described
from jaxlab._norms import wide


@dataclasses.dataclass(frozen=True)
class Hyperparameter:
    """Describes one hyperparameter: its name, range and first value.

    The value is ``lo + (hi - lo) sigmoid(u)``, ``lo + softplus(u)`` where ``hi`` is
    infinite, and u itself where both ends are. Discrete ones take the floor: the
    integers from ``lo`` to ``hi - 1``. Dropout rates need a ``hi`` below 1; the authors
    take 0.9.

    Args:
      name: in the results of :func:`constrain`.
      init: first value, inside the range.
      lo: lower end, or minus infinity if ``hi`` is infinite.
      hi: upper end, never reached save by rounding.
      discrete: whether the value is an integer; ``lo`` and ``hi`` then are, too.

    Raises:
      ValueError: if the range is empty, the first value lies outside, or the numbers of
        a discrete one are not integers.

    Examples:
      >>> Hyperparameter("dropout", init=0.05, lo=0.0, hi=0.9).hi
      0.9
    """

    name: str
    _: dataclasses.KW_ONLY
    init: int | float
    lo: int | float = -math.inf
    hi: int | float = math.inf
    discrete: bool = False

    def __post_init__(self):
        lo, hi = self.lo, self.hi
        which = f"Hyperparameter {self.name!r}"
        check_number(which, "a number", init=self.init, lo=lo, hi=hi)
        if not lo < hi or lo == math.inf or (lo == -math.inf and hi != math.inf):
            raise ValueError(
                f"Hyperparameter {self.name!r}: needs lo < hi, and a finite lo unless "
                f"both are infinite, got lo={lo} and hi={hi}."
            )
        ends = [end for end in (lo, hi) if math.isfinite(end)]
        if self.discrete and any(end != int(end) for end in ends):
            raise ValueError(
                f"Hyperparameter {self.name!r}: a discrete one needs integers lo and "
                f"hi, got lo={lo} and hi={hi}."
            )
        _check_value("Hyperparameter", self, self.init)


Specs = Sequence[Hyperparameter]


def constrain(
    u: Float[ArrayLike, "*rows h"], specs: Specs
) -> dict[str, Float[Array, "*rows"]]:
    """Gives the values of unbounded hyperparameters, by name.

    Args:
      u: one entry for each of ``specs`` on the last axis.
      specs: of the hyperparameters, in order.

    Returns:
      Arrays of the leading axes of ``u``, float32 at least; those of discrete ones hold
      integers and have gradient 0.

    Raises:
      ValueError: if there are no ``specs``, two have one name, or the last axis of
        ``u`` has another length.

    Examples:
      >>> specs = [
      ...     Hyperparameter("dropout", init=0.25, lo=0.0, hi=0.5),
      ...     Hyperparameter("holes", init=1, lo=0, hi=4, discrete=True),
      ... ]
      >>> constrain(jnp.array([0.0, 0.5]), specs)
      {'dropout': Array(0.25, dtype=float32), 'holes': Array(2., dtype=float32)}
    """
    _check_specs("constrain", specs)
    u = as_float(u)
    if u.ndim == 0 or u.shape[-1] != len(specs):
        raise ValueError(
            f"constrain: the last axis of u must have {len(specs)} entries, one for "
            f"each hyperparameter, got shape {u.shape}."
        )
    return {spec.name: _value(spec, u[..., i]) for i, spec in enumerate(specs)}


def unconstrain(
    values: Mapping[str, ArrayLike], specs: Specs
) -> Float[Array, "*rows h"]:
    """Gives the unbounded hyperparameters that have these values.

    Args:
      values: by name; a name left out takes its ``init``, so ``{}`` gives the start.
        Arrays of any one shape, or that broadcast to it; at an end of the range the
        result is infinite, beyond it NaN.
      specs: of the hyperparameters, in order.

    Returns:
      u with one entry for each of ``specs`` on the last axis, float32 at least. A
      discrete value goes to the middle of the interval that is rounded down to it.

    Raises:
      ValueError: if a name is not in ``specs``, a Python number lies outside its range,
        there are no ``specs`` or two have one name.

    Examples:
      >>> specs = [
      ...     Hyperparameter("dropout", init=0.25, lo=0.0, hi=0.5),
      ...     Hyperparameter("weight_decay", init=1e-4, lo=0.0),
      ... ]
      >>> unconstrain({}, specs)[0]
      Array(0., dtype=float32)
      >>> u = unconstrain({"weight_decay": 3.0}, specs)
      >>> constrain(u, specs)["weight_decay"]
      Array(3., dtype=float32)
    """
    _check_specs("unconstrain", specs)
    if not isinstance(values, Mapping):
        raise ValueError(
            "unconstrain: values must be a dictionary of numbers by name, got "
            f"{described(values)}."
        )
    unknown = sorted(set(values) - {spec.name for spec in specs})
    if unknown:
        raise ValueError(
            f"unconstrain: values must have names among "
            f"{[spec.name for spec in specs]}, got {unknown}."
        )
    columns = []
    for spec in specs:
        value = values.get(spec.name, spec.init)
        if isinstance(value, (int, float)):
            _check_value("unconstrain", spec, value)
        columns.append(_unbounded(spec, as_float(value)))
    shape = np.broadcast_shapes(*(column.shape for column in columns))
    return jnp.stack([jnp.broadcast_to(c, shape) for c in columns], axis=-1)


def perturb_hyperparameters(
    key: Key[Array, ""],
    u: Float[ArrayLike, " h"],
    rho: Float[ArrayLike, " h"],
    *,
    rows: int,
    shared: bool | Sequence[bool] = False,
) -> Float[Array, "rows h"]:
    """Draws ``u + softplus(rho) eps`` with normal eps for each row of a batch.

    Args:
      key: of the noise.
      u: the unbounded hyperparameters.
      rho: softplus(rho) is the deviation, for each of them.
      rows: examples of the batch, at least 1.
      shared: whether all rows have the same noise, for all hyperparameters or for each:
        true of those that act on the batch as a whole, such as dropped weights.

    Returns:
      One row for each example, float32 at least, differentiable in ``u`` and ``rho``.

    Raises:
      ValueError: if ``u``, ``rho`` and ``shared`` do not match or there are no rows.

    Examples:
      >>> u, rho = jnp.zeros(2), jnp.zeros(2)
      >>> noisy = perturb_hyperparameters(jax.random.key(0), u, rho, rows=4)
      >>> noisy.shape, bool(jnp.all(noisy[0] != noisy[1]))
      ((4, 2), True)
    """
    name = "perturb_hyperparameters"
    u, rho = check_vectors(name, u, rho)
    check_shared(name, shared, u.size)
    check_count(name, rows=rows)
    noise = jax.random.normal(key, (rows, u.size), u.dtype)
    same = jnp.broadcast_to(jnp.asarray(shared, bool), (1, u.size))
    noise = jnp.where(same, noise[:1], noise)
    return u[None] + jax.nn.softplus(rho)[None] * noise


def perturbation_entropy(rho: Float[ArrayLike, " h"]) -> Float[Array, ""]:
    """Gives the entropy of the noise, ``sum_j ln(softplus(rho_j) sqrt(2 pi e))``.

    Args:
      rho: softplus(rho) is the deviation, for each hyperparameter.

    Returns:
      A scalar in nats, float32 at least; finite where softplus(rho) has become 0.

    Raises:
      ValueError: if ``rho`` is not a vector of floating numbers.

    Examples:
      >>> one = jnp.log(jnp.expm1(jnp.array([1.0])))  # a deviation of 1
      >>> round(float(perturbation_entropy(one)), 4)
      1.4189
    """
    rho, _ = check_vectors("perturbation_entropy", rho, rho, "rho")
    # Below -40 ln softplus(rho) is rho to the last bit, and softplus may be 0.
    low = rho < -40
    log_scale = jnp.log(jax.nn.softplus(jnp.where(low, 0.0, rho)))
    constant = 0.5 * math.log(2 * math.pi * math.e)
    return jnp.sum(jnp.where(low, rho, log_scale) + constant)


def inverse_softplus(scale: ArrayLike) -> Array:
    """Solves ``softplus(x) = scale``; no overflow where the scale is large."""
    scale = as_float(scale)
    return scale + jnp.log(-jnp.expm1(-scale))


def as_float(value: ArrayLike) -> Array:
    """Makes a floating array of float32 at least, never weakly typed."""
    value = jnp.asarray(value)
    if not jnp.issubdtype(value.dtype, jnp.floating):
        value = value.astype(jnp.result_type(float))
    return wide(value)


def check_vectors(
    name: str, u: Any, rho: Any, argument: str = "u"
) -> tuple[Array, Array]:
    """Refuses what are no two floating vectors of one length, at least 1.

    Raises:
      ValueError: naming both shapes.
    """
    u, rho = jnp.asarray(u), jnp.asarray(rho)
    floating = all(jnp.issubdtype(v.dtype, jnp.floating) for v in (u, rho))
    if not floating or u.ndim != 1 or u.shape != rho.shape or not u.size:
        both = "a vector" if argument == "rho" else "u and rho must be vectors"
        words = f"rho must be {both}" if argument == "rho" else both
        raise ValueError(
            f"{name}: {words} of floating numbers, one for each hyperparameter, got "
            f"{u.dtype}{list(u.shape)}"
            + ("." if argument == "rho" else f" and {rho.dtype}{list(rho.shape)}.")
        )
    return wide(u), wide(rho)


def check_shared(name: str, shared: bool | Sequence[bool], count: int) -> None:
    """Refuses flags that are no booleans, or not one for each hyperparameter.

    Raises:
      ValueError: naming what came.
    """
    flags = np.asarray(shared)
    if flags.dtype != bool or flags.shape not in ((), (count,)):
        raise ValueError(
            f"{name}: shared must be one boolean, or {count}, one for each "
            f"hyperparameter, got {shared!r}."
        )


def _value(spec: Hyperparameter, u: Array) -> Array:
    if spec.lo == -math.inf:
        value = u
    elif spec.hi == math.inf:
        value = spec.lo + jax.nn.softplus(u)
    else:
        value = spec.lo + (spec.hi - spec.lo) * jax.nn.sigmoid(u)
    # The sigmoid of a large u is 1, but hi is not one of the integers.
    return jnp.minimum(jnp.floor(value), spec.hi - 1) if spec.discrete else value


def _unbounded(spec: Hyperparameter, value: Array) -> Array:
    if spec.discrete:
        value = jnp.floor(value) + 0.5
    if spec.lo == -math.inf:
        return value
    if spec.hi == math.inf:
        return inverse_softplus(value - spec.lo)
    return jnp.log(value - spec.lo) - jnp.log(spec.hi - value)


def _check_specs(name: str, specs: Specs) -> None:
    if isinstance(specs, Hyperparameter) or not specs:
        raise ValueError(
            f"{name}: specs must be a list of at least one Hyperparameter, got {specs}."
        )
    names = [spec.name for spec in specs]
    if len(set(names)) < len(names):
        raise ValueError(f"{name}: specs must have names of their own, got {names}.")


def _check_value(name: str, spec: Hyperparameter, value: int | float) -> None:
    good = spec.lo < value < spec.hi
    need = f"strictly between {spec.lo} and {spec.hi}"
    if spec.discrete:
        good = spec.lo <= value < spec.hi and math.isfinite(value)
        good = good and value == int(value)
        need = f"an integer >= {spec.lo} and < {spec.hi}"
    if not good:
        raise ValueError(f"{name}: {spec.name} must be {need}, got {value}.")
