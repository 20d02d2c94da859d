"""Output losses: negative log-likelihoods with their samples and Hessians.

A likelihood turns a network's outputs f into a distribution of the targets y. The
last axis of the outputs is the event, every axis before it counts rows: logits of
shape (batch, time, vocabulary) have batch x time rows. With a weight w_i per row
(0 for padding) and W = sum of w_i,

    nll = (1/W) sum_i w_i (-ln p(y_i | f_i)),      hessian_product = d^2 nll / df^2 v,

so that the 1/W stands in both. All three families are exponential families in
their natural parameter (for the Gaussian: up to its fixed scale), hence their
Hessian does not depend on y and equals the Fisher matrix of the outputs.
Reference: Martens, "New Insights and Perspectives on the Natural Gradient Method",
JMLR 2020, sections 6 and 9.
"""

import dataclasses
import math
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float, Key, Shaped

from jaxlab._array_checks import check_floating
from jaxlab._checks import described

__all__ = ["Bernoulli", "Categorical", "Gaussian", "Likelihood", "row_shares"]

Outputs = Float[Array, "*rows event"]


@runtime_checkable
class Likelihood(Protocol):
    """Says what an objective asks of a likelihood; any class with these four fits.

    Examples:
      >>> isinstance(Categorical(), Likelihood)
      True
    """

    def row_nll(self, outputs: Array, targets: ArrayLike) -> Array:
        """Gives the negative log-likelihood of each row."""
        ...

    def nll(
        self, outputs: Array, targets: ArrayLike, *, weights: ArrayLike | None = None
    ) -> Array:
        """Gives its weighted mean over the rows."""
        ...

    def sample(self, key: Array, outputs: Array) -> Array:
        """Draws targets."""
        ...

    def hessian_product(
        self, outputs: Array, v: Array, *, weights: ArrayLike | None = None
    ) -> Array:
        """Multiplies ``v`` by the Hessian of ``nll`` with respect to the outputs."""
        ...


def row_shares(
    rows: tuple[int, ...],
    weights: ArrayLike | None = None,
    *,
    dtype: DTypeLike = jnp.float32,
) -> Float[Array, "..."]:
    """Gives each row its share of a weighted mean.

    Args:
      rows: shape of the rows, such as ``(batch, time)``.
      weights: a weight per row, not negative; its shape is ``rows`` or a leading
        part of it, ``(batch,)`` for instance. ``None`` weighs all rows alike.
      dtype: of the result.

    Returns:
      Shares of shape ``rows`` that sum to 1, or all 0 where there are no rows or the
      weights sum to 0.

    Raises:
      ValueError: if the shape of ``weights`` is not a leading part of ``rows``.

    Examples:
      >>> row_shares((3,), jnp.array([1.0, 1.0, 0.0]))
      Array([0.5, 0.5, 0. ], dtype=float32)
    """
    if not isinstance(rows, (tuple, list)):
        raise ValueError(
            "row_shares: rows must be a shape such as (batch, time), got "
            f"{described(rows)}."
        )
    rows = tuple(rows)
    if weights is None:
        count = math.prod(rows)
        return jnp.full(rows, 1 / count if count else 0.0, dtype)
    weights = jnp.asarray(weights)
    if weights.shape != rows[: weights.ndim]:
        raise ValueError(
            f"weights must have one entry per row: shape {rows} or a leading part of "
            f"it, got {weights.shape}."
        )
    weights = weights.astype(dtype)
    weights = weights.reshape(weights.shape + (1,) * (len(rows) - weights.ndim))
    weights = jnp.broadcast_to(weights, rows)
    total = weights.sum()
    empty = total == 0
    return jnp.where(empty, 0.0, weights / jnp.where(empty, 1.0, total))


def _nll(
    self,
    outputs: Outputs,
    targets: Shaped[ArrayLike, "..."],
    *,
    weights: ArrayLike | None = None,
) -> Float[Array, ""]:
    """Gives the weighted mean over the rows of the negative log-likelihood."""
    losses = self.row_nll(outputs, targets)
    shares = row_shares(losses.shape, weights, dtype=losses.dtype)
    # A row of weight 0 may hold anything, NaN from a made-up target included.
    return jnp.sum(jnp.where(shares == 0, 0.0, shares * losses))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Categorical:
    """Classes from logits; the last axis of the outputs holds the classes.

    Targets are integers with the shape of the rows, or one-hot (or any probabilities)
    with the shape of the outputs; for the latter ``nll`` is the cross-entropy. An
    integer outside ``[0, classes)`` gives NaN, or nothing where its weight is 0.

    Examples:
      >>> logits = jnp.zeros((2, 4))
      >>> nll = Categorical().nll(logits, jnp.array([0, 3]))
      >>> bool(jnp.isclose(nll, jnp.log(4.0)))
      True
    """

    def row_nll(
        self, outputs: Outputs, targets: Shaped[ArrayLike, "..."]
    ) -> Float[Array, "*rows"]:
        """Gives the negative log-probability of each row."""
        outputs, targets = _widened(outputs), jnp.asarray(targets)
        log_p = jax.nn.log_softmax(outputs)
        if targets.shape == outputs.shape:
            # A class of probability 0 costs nothing, not 0 x (-inf).
            p = targets.astype(log_p.dtype)
            return -jnp.sum(p * jnp.where(p == 0, 0.0, log_p), axis=-1)
        _check_integers(outputs, targets)
        inside = (targets >= 0) & (targets < outputs.shape[-1])
        index = jnp.where(inside, targets, 0)[..., None]
        picked = jnp.take_along_axis(log_p, index, axis=-1)[..., 0]
        return jnp.where(inside, -picked, jnp.nan)

    nll = _nll

    def sample(self, key: Key[Array, ""], outputs: Outputs) -> Shaped[Array, "*rows"]:
        """Draws integer classes, one a row."""
        outputs = _widened(outputs)
        if not outputs.ndim:
            raise ValueError(
                "Categorical: outputs must have a last axis, the classes; got a scalar."
            )
        return jax.random.categorical(key, outputs)

    def hessian_product(
        self, outputs: Outputs, v: Outputs, *, weights: ArrayLike | None = None
    ) -> Outputs:
        """Multiplies ``v`` by the Hessian of ``nll``: share x (diag(p) - p p^T)."""
        _check_v(outputs, v)
        p = jax.nn.softmax(_widened(outputs))
        pv = p * _widened(v)
        return _shared(pv - p * pv.sum(-1, keepdims=True), v, weights)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Bernoulli:
    """Independent 0/1 events from logits, summed over the last axis.

    Targets have the shape of the outputs; any number in [0, 1] is a probability and
    ``nll`` then the cross-entropy.

    Examples:
      >>> nll = Bernoulli().nll(jnp.full((2, 3), 1e4), jnp.ones((2, 3)))
      >>> float(nll)
      0.0
    """

    def row_nll(
        self, outputs: Outputs, targets: Shaped[ArrayLike, "..."]
    ) -> Float[Array, "*rows"]:
        """Gives the negative log-probability of each row."""
        outputs, targets = _widened(outputs), jnp.asarray(targets)
        _check_like(outputs, targets, "Bernoulli: targets")
        losses = outputs * (1 - targets.astype(outputs.dtype))
        return jnp.sum(losses + jax.nn.softplus(-outputs), axis=-1)

    nll = _nll

    def sample(self, key: Key[Array, ""], outputs: Outputs) -> Outputs:
        """Draws zeros and ones with the shape and dtype of the outputs."""
        check_floating("Bernoulli", "outputs", outputs)
        p = jax.nn.sigmoid(_widened(outputs))
        return jax.random.bernoulli(key, p).astype(jnp.result_type(outputs))

    def hessian_product(
        self, outputs: Outputs, v: Outputs, *, weights: ArrayLike | None = None
    ) -> Outputs:
        """Multiplies ``v`` by the Hessian of ``nll``: share x p (1 - p)."""
        _check_v(outputs, v)
        outputs = _widened(outputs)
        variance = jax.nn.sigmoid(outputs) * jax.nn.sigmoid(-outputs)
        return _shared(variance * _widened(v), v, weights)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Gaussian:
    """A normal distribution around the outputs, summed over the last axis.

    ``nll`` is the full negative log-density, ln(scale sqrt(2 pi)) per output
    included, so likelihoods with different scales may be compared.

    Attributes:
      scale: standard deviation in the units of the targets, > 0; may be traced.

    Examples:
      >>> nll = Gaussian(scale=2.0).hessian_product(jnp.ones((1, 1)), jnp.ones((1, 1)))
      >>> nll.tolist()
      [[0.25]]
    """

    scale: ArrayLike = 1.0

    def __post_init__(self):
        if isinstance(self.scale, (int, float)) and not self.scale > 0:
            raise ValueError(f"Gaussian: scale must be > 0, got {self.scale}.")

    def row_nll(
        self, outputs: Outputs, targets: Shaped[ArrayLike, "..."]
    ) -> Float[Array, "*rows"]:
        """Gives the negative log-density of each row."""
        outputs, targets = _widened(outputs), jnp.asarray(targets)
        _check_like(outputs, targets, "Gaussian: targets")
        scale = jnp.asarray(self.scale, outputs.dtype)
        z = (targets.astype(outputs.dtype) - outputs) / scale
        constant = jnp.log(scale) + 0.5 * math.log(2 * math.pi)
        return jnp.sum(0.5 * z * z + constant, axis=-1)

    nll = _nll

    def sample(self, key: Key[Array, ""], outputs: Outputs) -> Outputs:
        """Draws targets with the shape and dtype of the outputs."""
        check_floating("Gaussian", "outputs", outputs)
        mean = _widened(outputs)
        noise = jax.random.normal(key, mean.shape, mean.dtype)
        scale = jnp.asarray(self.scale, noise.dtype)
        return (mean + scale * noise).astype(jnp.result_type(outputs))

    def hessian_product(
        self, outputs: Outputs, v: Outputs, *, weights: ArrayLike | None = None
    ) -> Outputs:
        """Multiplies ``v`` by the Hessian of ``nll``: share / scale^2."""
        _check_v(outputs, v)
        wide = _widened(v)
        return _shared(wide / jnp.asarray(self.scale, wide.dtype) ** 2, v, weights)


def _widened(x):
    """Casts to float32 at least: sums and exponentials need it."""
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _shared(product, v, weights):
    shares = row_shares(product.shape[:-1], weights, dtype=product.dtype)
    return (shares[..., None] * product).astype(jnp.result_type(v))


def _check_integers(outputs, targets):
    fits = targets.shape == outputs.shape[:-1]
    if not (fits and jnp.issubdtype(targets.dtype, jnp.integer)):
        raise ValueError(
            f"Categorical: targets must be integers of shape {outputs.shape[:-1]} or "
            f"probabilities of shape {outputs.shape} for outputs of that shape, got "
            f"{targets.dtype} of shape {targets.shape}."
        )


def _check_v(outputs, v):
    _check_like(outputs, v, "hessian_product: v")
    check_floating("hessian_product", "v", v)


def _check_like(outputs, other, name):
    here, there = (jnp.asarray(array).shape for array in (outputs, other))
    if there != here:
        raise ValueError(f"{name} must have the outputs' shape {here}, got {there}.")
