"""Gauss-Newton and Fisher matrices as operators: products, never the matrix.

With outputs f(theta) of the data, their Jacobian J and shares s_i (1/n, or the weights
over their sum) of the rows in the loss,

    GGN           J^T (d^2 L / df^2) J
    true          the same: the likelihoods are exponential families in f
    sampled       sum_i s_i g_i g_i^T,  g_i = J_i^T dl_i/df_i, y_i drawn from p(.|f_i)
    empirical     the same with the given targets

A product is one forward-mode and one reverse-mode pass; no gradient per row is formed.
Linearised once at theta, it costs less than one and a half gradients.
References: Schraudolph, "Fast Curvature Matrix-Vector Products for Second-Order
Gradient Descent", Neural Computation 2002; Martens, "New Insights and Perspectives on
the Natural Gradient Method", JMLR 2020; Kunstner, Hennig, Balles, "Limitations of the
Empirical Fisher Approximation for Natural Gradient Descent", NeurIPS 2019.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree

from jaxlab._norms import wide
from jaxlab.curvature._batches import (
    Parts,
    as_arrays,
    check_microbatch,
    collected,
    row_keys,
    rows_of,
)
from jaxlab.curvature._functions import as_function, held, hold
from jaxlab.curvature._options import exact_products
from jaxlab.curvature._partwise import (
    Partwise,
    Streamed,
    abstract,
    image_of,
    tangents_of,
)
from jaxlab.curvature._vectors import Operator, Space, space_of
from jaxlab.likelihoods import Likelihood, row_shares
from jaxlab.objective import unpack_batch

Kind = Literal["true", "sampled", "empirical"]


def ggn_operator(
    apply_fn: Callable[..., Any],
    likelihood: Likelihood,
    params: PyTree,
    batches: Any,
    *,
    microbatch: int | None = None,
) -> Operator:
    """Makes the generalised Gauss-Newton matrix of a model an operator ``v -> G v``.

    It is positive semi-definite, and the Hessian less the curvature of the model. The
    operator is a pytree as :func:`hessian_operator` describes, with ``quadratic_form``,
    which takes a forward pass only, and with ``linearize()``: for one batch that keeps
    the activations of a forward pass, and a product then costs less than one and a half
    gradients. With several parts nothing is kept.

    Args:
      apply_fn: ``(params, inputs) -> outputs``, with the event on the last axis.
      likelihood: one of :mod:`jaxlab.likelihoods`, or a class with their methods.
      params: where the matrix is taken; real arrays.
      batches: as in :func:`hessian_operator`; each batch is ``(inputs, targets)`` or
        ``(inputs, targets, weights)``, of which the targets are not read and may be
        ``None``. Streamed batches are padded to the first one, by rows of weight 0.
      microbatch: rows that are differentiated at once; ``None`` takes whole batches.

    Returns:
      An operator on trees like ``params``, as in :func:`hessian_operator`.

    Raises:
      ValueError: if a leaf is not real, there are no rows, or batches do not fit.

    Examples:
      >>> from jaxlab.likelihoods import Gaussian
      >>> apply_fn = lambda w, x: x @ w
      >>> x = jnp.array([[2.0, 0.0], [0.0, 4.0]])
      >>> operator = ggn_operator(apply_fn, Gaussian(), jnp.ones((2, 1)), (x, None))
      >>> operator(jnp.ones((2, 1))).tolist()
      [[2.0], [8.0]]
    """
    options = {"kind": "true", "key": None, "microbatch": microbatch}
    return _made("ggn_operator", apply_fn, likelihood, params, batches, **options)


def fisher_operator(
    apply_fn: Callable[..., Any],
    likelihood: Likelihood,
    params: PyTree,
    batches: Any,
    *,
    kind: Kind = "true",
    key: Key[Array, ""] | None = None,
    microbatch: int | None = None,
) -> Operator:
    """Makes a Fisher matrix of a model an operator ``v -> F v``.

    As :func:`ggn_operator` in cost and form. All kinds are weighted means over rows of
    the outputs. The sampled kind draws one target a row; which one depends on the key,
    the outputs and the place of the example in the data, not on how these are cut, so
    the operator is one fixed matrix.

    Args:
      apply_fn: ``(params, inputs) -> outputs``, with the event on the last axis.
      likelihood: one of :mod:`jaxlab.likelihoods`, or a class with their methods.
      params: where the matrix is taken; real arrays.
      batches: as in :func:`ggn_operator`; only the empirical kind reads the targets.
      kind: "true" (equals the Gauss-Newton matrix for these likelihoods), "sampled"
        (targets drawn from the model: its mean over keys is the true one) or
        "empirical" (the given targets: another matrix away from a fit).
      key: for "sampled" only.
      microbatch: rows that are differentiated at once; ``None`` takes whole batches.

    Returns:
      An operator on trees like ``params``, as in :func:`hessian_operator`.

    Raises:
      ValueError: as :func:`ggn_operator`, or if ``kind`` is unknown or ``key`` is
        missing or of no use.

    Examples:
      >>> from jaxlab.likelihoods import Gaussian
      >>> apply_fn = lambda w, x: x @ w
      >>> batch = (jnp.eye(2), jnp.array([[1.0], [3.0]]))
      >>> operator = fisher_operator(
      ...     apply_fn, Gaussian(), jnp.zeros((2, 1)), batch, kind="empirical"
      ... )
      >>> operator(jnp.ones((2, 1))).tolist()
      [[0.5], [4.5]]
    """
    name = "fisher_operator"
    if kind not in ("true", "sampled", "empirical"):
        raise ValueError(
            f'{name}: kind must be "true", "sampled" or "empirical", got {kind!r}.'
        )
    if (kind == "sampled") != (key is not None):
        raise ValueError(
            f'{name} needs key= for kind="sampled" and only there, got kind="{kind}" '
            f"{'with' if key is not None else 'without'} one."
        )
    options = {"kind": kind, "key": key, "microbatch": microbatch}
    return _made(name, apply_fn, likelihood, params, batches, **options)


def _made(name, apply_fn, likelihood, params, batches, *, kind, key, microbatch):
    params = as_arrays(params)
    space_of(name, params, "params")
    check_microbatch(name, microbatch)
    function, likelihood = as_function(apply_fn), hold(likelihood)
    operator = _GaussNewton(function, params, None, name, likelihood, key, kind)
    if callable(batches):
        return Streamed(operator, batches, microbatch)
    data = collected(name, batches, microbatch, operator.convert)
    return dataclasses.replace(operator, data=data, key=None)


class _Rows(NamedTuple):
    """A batch of which only what the kind needs is kept."""

    inputs: PyTree
    targets: PyTree
    weights: Any
    keys: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _GaussNewton(Partwise):
    likelihood: Any
    key: Any
    kind: Kind = dataclasses.field(metadata={"static": True})

    def product(self, v: PyTree, batch: Any) -> PyTree:
        return self.linear(batch)(v)

    def form(self, v: PyTree, batch: Any) -> Float[Array, ""]:
        outputs, tangent = jax.jvp(self.outputs(batch), (self.params,), (v,))
        return self.bend(outputs, batch).form(tangent)

    def linear(self, batch: Any) -> Operator:
        outputs, jacobian = jax.linearize(self.outputs(batch), self.params)
        space = space_of(self.name, self.params)
        return _Linear(jacobian, self.bend(outputs, batch), space, self.name)

    def with_fixed_targets(self) -> "_GaussNewton":
        if self.kind != "sampled":
            return self

        def drawn(batch):
            targets = self.sample(self.outputs(batch)(self.params), batch.keys)
            return batch._replace(targets=targets, keys=None)

        stack, rest = self.data.stack, self.data.rest
        with exact_products():
            stack = jax.lax.map(drawn, stack)
            data = Parts(stack, None if rest is None else drawn(rest))
        return dataclasses.replace(self, data=data, kind="empirical")

    def convert(self, batch: Any, start: Any) -> _Rows:
        inputs, targets, weights = as_arrays(_unpacked(self.name, batch))
        rows = rows_of(self.name, (inputs, weights))
        if self.kind != "empirical":
            targets = None
        elif rows_of(self.name, (inputs, targets)) and targets is None:
            raise ValueError(f'{self.name}: kind="empirical" needs targets, got None.')
        keys = None if self.key is None else row_keys(self.key, start, count=rows)
        return _Rows(inputs, targets, weights, keys)

    def weighted(self, batch: _Rows) -> _Rows:
        if batch.weights is not None:
            return batch
        return batch._replace(weights=jnp.ones(rows_of(self.name, batch)))

    def outputs(self, batch: _Rows) -> Callable[[Any], Any]:
        """Gives the outputs of one part as a function of the parameters."""

        def outputs(params):
            found = self.function(params, batch.inputs)
            if not hasattr(found, "shape") or len(found.shape) < 2:
                shapes = jax.tree.map(jnp.shape, found)
                raise ValueError(
                    f"{self.name}: apply_fn must give one array of outputs, (examples, "
                    f"..., event); got shapes {shapes}."
                )
            return found

        return outputs

    def bend(self, outputs: Array, batch: _Rows) -> Any:
        """Makes the matrix in the space of the outputs."""
        if self.kind == "true":
            return _Curved(self.likelihood, outputs, batch.weights)
        targets = batch.targets
        if self.kind == "sampled":
            targets = self.sample(outputs, batch.keys)
        total = lambda f: jnp.sum(held(self.likelihood).row_nll(f, targets))
        slopes = wide(jax.grad(total)(outputs))
        shares = row_shares(outputs.shape[:-1], batch.weights, dtype=slopes.dtype)
        shares = shares[..., None]
        # A row of weight 0 may have any target.
        return _Outer(jnp.where(shares == 0, 0.0, slopes), shares)

    def sample(self, outputs: Array, keys: Any) -> Array:
        """Draws targets, those of an example with its own key."""
        if len(outputs) != len(keys):
            raise ValueError(
                f'{self.name}: kind="sampled" needs outputs (examples, ..., event) for '
                f"{len(keys)} examples, got shape {outputs.shape}."
            )
        likelihood = held(self.likelihood)
        draw = lambda key, output: likelihood.sample(key, output[None])[0]
        return jax.lax.stop_gradient(jax.vmap(draw)(keys, outputs))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Curved:
    """The Hessian of a likelihood in the outputs."""

    likelihood: Any
    outputs: Any
    weights: Any

    def __call__(self, tangent: Array) -> Array:
        product = held(self.likelihood).hessian_product
        return product(self.outputs, tangent, weights=self.weights)

    def form(self, tangent: Array) -> Float[Array, ""]:
        tangent = wide(tangent)
        bent = dataclasses.replace(self, outputs=wide(self.outputs))(tangent)
        return jnp.sum(tangent * bent)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Outer:
    """The weighted sum over rows of ``slope slope^T``, a block each."""

    slopes: Any
    shares: Any

    def __call__(self, tangent: Array) -> Array:
        along = jnp.sum(self.slopes * wide(tangent), axis=-1, keepdims=True)
        return (self.shares * along * self.slopes).astype(tangent.dtype)

    def form(self, tangent: Array) -> Float[Array, ""]:
        along = jnp.sum(self.slopes * wide(tangent), axis=-1, keepdims=True)
        return jnp.sum(self.shares * along**2)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Linear:
    jacobian: Any
    bend: Any
    space: Space = dataclasses.field(metadata={"static": True})
    name: str = dataclasses.field(metadata={"static": True})

    def __call__(self, v: PyTree) -> PyTree:
        like = abstract(self.space)
        bent = self.bend(self.jacobian(tangents_of(self.name, v, like)))
        return image_of(jax.linear_transpose(self.jacobian, like)(bent)[0], v)

    def quadratic_form(self, v: PyTree) -> Float[Array, ""]:
        tangents = tangents_of(self.name, v, abstract(self.space))
        return self.bend.form(self.jacobian(tangents))


def _unpacked(name, batch):
    if not isinstance(batch, tuple):
        raise ValueError(
            f"{name}: a batch must be a tuple (inputs, targets) or (inputs, targets, "
            f"weights), got a {type(batch).__name__}; batches may be one batch, a list "
            "of them, or a callable that returns an iterable of them."
        )
    return unpack_batch(batch)
