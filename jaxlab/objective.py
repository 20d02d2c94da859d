"""A model with its likelihood, as pure functions of the parameters.

With outputs f(theta) of a batch and L(f) the likelihood's weighted mean over rows,

    loss           L(f(theta))
    GGN product    J^T (d^2 L / df^2) J v,                  J = df / dtheta
    Fisher, true   the same: the likelihoods are exponential families in f
    sampled        sum_i share_i g_i (g_i . v), g_i = J_i^T dl_i/df_i, y_i ~ p(.|f_i)
    empirical      the same with the targets of the batch

where l_i is the loss of row i. No product forms a matrix or a gradient per row: each
costs one forward-mode and one reverse-mode pass.
References: Schraudolph, "Fast Curvature Matrix-Vector Products for Second-Order
Gradient Descent", Neural Computation 2002; Martens, JMLR 2020.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Key, PyTree

from jaxlab.likelihoods import Likelihood, row_shares

__all__ = ["GaussNewton", "Objective", "plain", "unpack_batch"]

Batch = tuple[Any, ...]
Scalar = Float[Array, ""]


def unpack_batch(batch: Batch) -> tuple[PyTree, PyTree, ArrayLike | None]:
    """Splits a batch into inputs, targets and weights.

    Args:
      batch: ``(inputs, targets)`` or ``(inputs, targets, weights)``.

    Returns:
      The three, with ``None`` for missing weights.

    Raises:
      ValueError: if it is neither.

    Examples:
      >>> unpack_batch(("x", "y"))
      ('x', 'y', None)
    """
    if not isinstance(batch, (tuple, list)) or len(batch) not in (2, 3):
        size = f" of {len(batch)}" if isinstance(batch, (tuple, list)) else ""
        raise ValueError(
            "A batch must be (inputs, targets) or (inputs, targets, weights), got a "
            f"{type(batch).__name__}{size}."
        )
    inputs, targets, *weights = batch
    return inputs, targets, weights[0] if weights else None


@dataclasses.dataclass(frozen=True)
class _Plain:
    """Compares by the function it holds, so that equal objectives share a trace."""

    apply_fn: Callable[..., Any]

    def __call__(self, params, state, inputs, *, key, train):
        return self.apply_fn(params, inputs), state


def plain(apply_fn: Callable[..., Any]) -> Callable[..., Any]:
    """Adapts ``apply_fn(params, inputs) -> outputs`` to what an objective calls.

    Args:
      apply_fn: a model without state and without noise.

    Returns:
      A function ``(params, state, inputs, *, key, train) -> (outputs, state)`` that
      hands the state back as it came.

    Examples:
      >>> apply_fn = plain(lambda params, x: params * x)
      >>> apply_fn(2.0, (), 3.0, key=None, train=True)
      (6.0, ())
    """
    return _Plain(apply_fn)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Objective:
    """Joins a model and a likelihood into loss, gradient and curvature products.

    In every method ``params`` is a pytree of arrays, ``state`` what the model keeps
    besides (BatchNorm statistics; ``()`` if nothing), ``batch`` ``(inputs, targets)``
    or ``(inputs, targets, weights)``, ``key`` the key of the model's noise (dropout;
    ``None`` if it has none) and ``train`` the model's mode. With the same ``key`` all
    methods see the same noise, so they speak of one function of ``params``.

    Attributes:
      apply_fn: ``(params, state, inputs, *, key, train) -> (outputs, state)``; static.
        :func:`plain` adapts ``(params, inputs) -> outputs``.
      likelihood: one of :mod:`jaxlab.likelihoods`, or a class with their methods.

    Examples:
      >>> from jaxlab.likelihoods import Gaussian
      >>> objective = Objective(plain(lambda w, x: x @ w), Gaussian())
      >>> w, batch = jnp.ones((2, 1)), (jnp.eye(2), jnp.zeros((2, 1)))
      >>> (loss, _), grad = objective.value_and_grad(w, (), batch)
      >>> grad.tolist()
      [[0.5], [0.5]]
      >>> objective.ggn_product(w, (), batch, jnp.ones((2, 1))).tolist()
      [[0.5], [0.5]]
    """

    apply_fn: Callable[..., Any] = dataclasses.field(metadata={"static": True})
    likelihood: Likelihood

    def loss(
        self,
        params: PyTree,
        state: PyTree,
        batch: Batch,
        *,
        key: Key[Array, ""] | None = None,
        train: bool = True,
    ) -> tuple[Scalar, PyTree]:
        """Gives the loss of a batch and the model's new state."""
        inputs, targets, weights = unpack_batch(batch)
        outputs, state = self.apply_fn(params, state, inputs, key=key, train=train)
        return self.likelihood.nll(outputs, targets, weights=weights), state

    def value_and_grad(
        self,
        params: PyTree,
        state: PyTree,
        batch: Batch,
        *,
        key: Key[Array, ""] | None = None,
        train: bool = True,
    ) -> tuple[tuple[Scalar, PyTree], PyTree]:
        """Gives ``((loss, state), gradient)``, as ``jax.value_and_grad`` would."""
        loss = lambda p: self.loss(p, state, batch, key=key, train=train)
        return jax.value_and_grad(loss, has_aux=True)(params)

    def ggn_product(
        self,
        params: PyTree,
        state: PyTree,
        batch: Batch,
        v: PyTree,
        *,
        key: Key[Array, ""] | None = None,
        train: bool = True,
    ) -> PyTree:
        """Multiplies ``v``, a tree like ``params``, by the Gauss-Newton matrix."""
        weights = unpack_batch(batch)[2]
        outputs_of = self._outputs_of(state, batch, key, train)
        outputs, tangent = _jvp(outputs_of, params, v)
        bent = self.likelihood.hessian_product(outputs, tangent, weights=weights)
        return jax.vjp(outputs_of, params)[1](bent)[0]

    def ggn_quadratic_form(
        self,
        params: PyTree,
        state: PyTree,
        batch: Batch,
        v: PyTree,
        *,
        key: Key[Array, ""] | None = None,
        train: bool = True,
    ) -> Scalar:
        """Gives ``v . GGN v`` from one forward-mode pass."""
        weights = unpack_batch(batch)[2]
        outputs_of = self._outputs_of(state, batch, key, train)
        outputs, tangent = _jvp(outputs_of, params, v)
        bent = self.likelihood.hessian_product(outputs, tangent, weights=weights)
        wide = jnp.promote_types(tangent.dtype, jnp.float32)
        return jnp.sum(tangent.astype(wide) * bent.astype(wide))

    def fisher_product(
        self,
        params: PyTree,
        state: PyTree,
        batch: Batch,
        v: PyTree,
        *,
        kind: Literal["true", "sampled", "empirical"] = "true",
        sample_key: Key[Array, ""] | None = None,
        key: Key[Array, ""] | None = None,
        train: bool = True,
    ) -> PyTree:
        """Multiplies ``v``, a tree like ``params``, by a Fisher matrix.

        Args:
          params: where the matrix is taken.
          state: the model's state.
          batch: gives the rows, their weights and, for the empirical kind, targets.
          v: a tree like ``params``.
          kind: "true" (equals the GGN here), "sampled" (targets drawn from the model
            with ``sample_key``: unbiased), "empirical" (the targets of the batch).
          sample_key: for "sampled" only.
          key: of the model's noise.
          train: the model's mode.

        Returns:
          A tree like ``params``.

        Raises:
          ValueError: if ``kind`` is none of the three, or ``sample_key`` is missing
            or of no use.
        """
        if kind not in ("true", "sampled", "empirical"):
            raise ValueError(
                f'kind must be "true", "sampled" or "empirical", got {kind!r}.'
            )
        if (kind == "sampled") != (sample_key is not None):
            raise ValueError(
                'fisher_product needs sample_key= for kind="sampled" and only there, '
                f'got kind="{kind}" {"with" if sample_key is not None else "without"} '
                "one."
            )
        if kind == "true":
            return self.ggn_product(params, state, batch, v, key=key, train=train)
        _, targets, weights = unpack_batch(batch)
        outputs_of = self._outputs_of(state, batch, key, train)
        outputs, tangent = _jvp(outputs_of, params, v)
        if kind == "sampled":
            targets = self.likelihood.sample(sample_key, outputs)
        total = lambda f: jnp.sum(self.likelihood.row_nll(f, targets))
        slopes = jax.grad(total)(outputs)
        shares = row_shares(outputs.shape[:-1], weights, dtype=slopes.dtype)
        along = shares * jnp.sum(slopes * tangent, axis=-1)
        bent = jnp.where(along[..., None] == 0, 0.0, along[..., None] * slopes)
        return jax.vjp(outputs_of, params)[1](bent.astype(outputs.dtype))[0]

    def _outputs_of(self, state, batch, key, train):
        inputs = unpack_batch(batch)[0]
        return lambda p: self.apply_fn(p, state, inputs, key=key, train=train)[0]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GaussNewton:
    """The operator ``v -> GGN v`` of an objective at one point and one batch.

    A pytree whose leaves are the parameters and the data: a jitted function of the
    operator does not recompile when they change.

    Examples:
      >>> from jaxlab.likelihoods import Gaussian
      >>> objective = Objective(plain(lambda w, x: x @ w), Gaussian())
      >>> batch = (jnp.eye(2), jnp.zeros((2, 1)))
      >>> operator = GaussNewton(objective, jnp.ones((2, 1)), (), batch)
      >>> float(operator.quadratic_form(jnp.ones((2, 1))))
      1.0
    """

    objective: Objective
    params: PyTree
    state: PyTree
    batch: Batch
    key: Key[Array, ""] | None = None
    train: bool = dataclasses.field(default=True, metadata={"static": True})

    def __call__(self, v: PyTree) -> PyTree:
        """Multiplies ``v``, a tree like the parameters, by the matrix."""
        return self.objective.ggn_product(
            self.params, self.state, self.batch, v, key=self.key, train=self.train
        )

    def quadratic_form(self, v: PyTree) -> Scalar:
        """Gives ``v . GGN v``, at the cost of one forward-mode pass."""
        return self.objective.ggn_quadratic_form(
            self.params, self.state, self.batch, v, key=self.key, train=self.train
        )


def _jvp(function, params, v):
    if jax.tree.structure(v) != jax.tree.structure(params):
        raise ValueError(
            "v must be a tree like params, got structure "
            f"{jax.tree.structure(v)} instead of {jax.tree.structure(params)}."
        )
    # Forward mode wants tangents of the primal's dtype.
    v = jax.tree.map(
        lambda t, p: jnp.asarray(t).astype(jnp.asarray(p).dtype), v, params
    )
    return jax.jvp(function, (params,), (v,))
