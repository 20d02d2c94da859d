"""The auxiliary loss of FishLeg, which the inverse Fisher minimises, and its gradient.

With z = Q u, F the Fisher and gamma a damping,

    A(Q; u) = 1/2 z^T (F + gamma) z - u^T z                                   (1)
    dA = r^T dz,   r = (F + gamma) z - u                                      (2)

A is least at z = (F + gamma)^-1 u, where it is -1/2 u^T (F + gamma)^-1 u: it is the
limit, for small eps, of the problem whose solution defines the conjugate of the loss.
(2) takes one Fisher product and one vector-Jacobian product through Q; r is a constant
in it.

Forms of the authors' code: u / ||u|| in place of u ("gradient": the paper's OCaml and
JAX), or (2) times (||z|| ||u||)^-1 ("product": PyTorch), there with r replaced by
Q r / (||z|| ||u||), which takes the condition number of F out (``precondition``).
Their JAX code reports z^T (F z - u), which lacks the 1/2 of (1); here (1) is reported.
References: Garcia, Freddi, Fotiadis, Li, Vakili, Bernacchia and Hennequin,
"Fisher-Legendre (FishLeg) Optimization of Deep Neural Networks", ICLR 2023.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, PyTree

from jaxlab._checks import check_number
from jaxlab._norms import safe_norm, unit, wide
from jaxlab.curvature._options import exact_products
from jaxlab.optimizers.fisher_legendre.blocks import check_like
from jaxlab.optimizers.fisher_legendre.factors import (
    InverseFisher,
    check_inverse,
    q_apply,
)

Normalize = Literal["gradient", "product"] | None
Operator = Callable[[Any], Any]


def fishleg_auxiliary_loss(
    q: InverseFisher,
    u: PyTree,
    fisher_vp: Operator,
    *,
    damping: ArrayLike,
    normalize: bool = True,
) -> Float[Array, ""]:
    """Computes the auxiliary loss ``1/2 z^T (F + damping) z - u^T z``, ``z = Q u``.

    Args:
      q: the inverse Fisher.
      u: a tree like the params, a gradient say.
      fisher_vp: the operator ``v -> F v``.
      damping: added to F, >= 0.
      normalize: takes ``u / ||u||``, so that the loss does not shrink with gradients.

    Returns:
      A scalar; at its least where ``Q u = (F + damping)^-1 u``.

    Raises:
      ValueError: if ``u`` is no tree like the params.

    Examples:
      >>> from jaxlab.optimizers import q_init
      >>> u = {"v": jnp.array([3.0, 4.0])}
      >>> q, identity = q_init(u, scale=0.5), lambda v: v
      >>> float(fishleg_auxiliary_loss(q, u, identity, damping=1.0).round(3))
      -0.25
    """
    check_number("fishleg_auxiliary_loss", "a number", damping=damping)
    check_inverse("fishleg_auxiliary_loss", q)
    check_like("fishleg_auxiliary_loss", q.blocks, u, "u")
    with jax.named_scope("fishleg_auxiliary_loss"), exact_products():
        u = unit(u, 0.0) if normalize else jax.tree.map(wide, u)
        z = q_apply(q, u)
        return _loss(u, z, _damped(fisher_vp, z, damping))


def fishleg_auxiliary_gradient(
    q: InverseFisher,
    u: PyTree,
    fisher_vp: Operator,
    *,
    damping: ArrayLike,
    normalize: Normalize = "gradient",
    precondition: bool = False,
) -> tuple[Float[Array, ""], InverseFisher]:
    """Computes the auxiliary loss and its gradient with respect to the factors.

    Args:
      q: the inverse Fisher.
      u: a tree like the params, a gradient say.
      fisher_vp: the operator ``v -> F v``.
      damping: added to F, >= 0.
      normalize: "gradient" takes ``u / ||u||``; "product" divides the residual by
        ``||z|| ||u||``; ``None`` does neither.
      precondition: multiplies the residual by Q (and divides once more by
        ``||z|| ||u||`` with "product"): no gradient of (1) any more, yet zero at the
        same place, and quicker where F is badly conditioned.

    Returns:
      The loss (of ``u / ||u||`` unless ``normalize`` is ``None``), and a tree like
      ``q``.

    Raises:
      ValueError: if ``u`` is no tree like the params or ``normalize`` is unknown.

    Examples:
      >>> from jaxlab.optimizers import q_init
      >>> u = {"v": jnp.array([3.0, 4.0])}
      >>> q, identity = q_init(u, scale=0.5), lambda v: v
      >>> _, slope = fishleg_auxiliary_gradient(q, u, identity, damping=1.0)
      >>> float(jnp.abs(slope.factors["v"].scale).max().round(5))
      0.0
    """
    name = "fishleg_auxiliary_gradient"
    if normalize not in ("gradient", "product", None):
        raise ValueError(
            f'{name}: normalize must be "gradient", "product" or None, got '
            f"{normalize!r}."
        )
    check_number(name, "a number", damping=damping)
    check_inverse(name, q)
    check_like(name, q.blocks, u, "u")
    with jax.named_scope(name), exact_products():
        size = safe_norm(u)
        u = unit(u, 0.0) if normalize == "gradient" else jax.tree.map(wide, u)
        z, pull = jax.vjp(lambda q: q_apply(q, u), q)
        product = _damped(fisher_vp, z, damping)
        residual = optax.tree.sub(product, u)
        shrink = 1.0
        loss = _loss(u, z, product)
        if normalize == "product":
            shrink = 1 / (safe_norm(z) * size)
            loss = loss / size**2
        residual = optax.tree.scale(shrink, residual)
        if precondition:
            residual = optax.tree.scale(shrink, q_apply(q, residual))
        return loss, pull(residual)[0]


def _damped(fisher_vp: Operator, z: PyTree, damping: ArrayLike) -> PyTree:
    add = lambda product, z: product.astype(z.dtype) + damping * z
    return jax.tree.map(add, fisher_vp(z), z)


def _loss(u: PyTree, z: PyTree, product: PyTree) -> Float[Array, ""]:
    return 0.5 * optax.tree.vdot(z, product) - optax.tree.vdot(u, z)
