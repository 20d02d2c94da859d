"""Monarch products: two batched products and one shuffle.

The factors are ``w1`` of shape (k, q, p), k blocks that map p inputs to q, and ``w2``
of shape (l, s, r), l blocks that map r to s, with ``k * q == l * r``. They stand for
a matrix M with m = s*l rows and n = k*p columns:

1. ``h[kappa, theta] = sum_pi w1[kappa, theta, pi] x[kappa*p + pi]``;
2. the flat h is read again as ``H[rho, lam] = h.ravel()[rho*l + lam]``;
3. ``y[sigma*l + lam] = sum_rho w2[lam, sigma, rho] H[rho, lam]``.

The output is interleaved: the block index lam is the minor one. Where l divides q,
with c = q / l (so r = c*k),

    M[(sigma, lam), (kappa, pi)]
        = sum_{a < c} w2[lam, sigma, kappa*c + a] w1[kappa, a*l + lam, pi]

so each of the k*l slices ``M.reshape(s, l, k, p)[:, lam, kappa, :]`` has rank c at
most, and nothing else is asked. A product costs k*q*p + l*s*r multiplications a row.

Interleaving is a pass over the output. Who does not need it asks for the block-major
order, entry lam*s + sigma in place of sigma*l + lam; who keeps activations with the
features first (:func:`monarch_matmul_features`) also saves the transposes at the edges.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Inexact

from jaxlab.structured.monarch import _forms

OutputLayout = Literal["interleaved", "block_major"]


class MonarchFactors(NamedTuple):
    """Holds the two factors of a Monarch matrix; a pytree of two arrays.

    Attributes:
      w1: blocks next to the input, shape (k, q, p).
      w2: blocks next to the output, shape (l, s, r), with ``k * q == l * r``.

    Examples:
      >>> factors = MonarchFactors(jnp.ones((2, 2, 3)), jnp.ones((2, 1, 2)))
      >>> monarch_to_dense(*factors).shape
      (2, 6)
    """

    w1: Inexact[Array, "k q p"]
    w2: Inexact[Array, "l s r"]


def monarch_matmul(
    x: Inexact[ArrayLike, "*batch n"],
    w1: Inexact[ArrayLike, "k q p"],
    w2: Inexact[ArrayLike, "l s r"],
    *,
    output_layout: OutputLayout = "interleaved",
    platform: str | None = None,
) -> Inexact[Array, "*batch m"]:
    """Multiplies rows by a Monarch matrix, ``x @ monarch_to_dense(w1, w2).T``.

    Products accumulate in float32 at least; the middle and the result have the
    common dtype of the three arrays. l need not divide q. On a CPU the order of the
    operations depends on the sizes; every order can be differentiated in both modes
    and any number of times, transposed and mapped.

    Args:
      x: rows of width n = k*p; any leading dimensions, empty ones too.
      w1: blocks next to the input, (k, q, p).
      w2: blocks next to the output, (l, s, r), with ``k * q == l * r``.
      output_layout: "interleaved", the order of ``monarch_to_dense``, or
        "block_major", one block after the other: the interleaved row y is then
        ``y.reshape(s, l).T.ravel()``. On accelerators that saves a pass.
      platform: "cpu", "gpu" or "tpu", where the program is compiled for another
        platform than the default backend, ``None``. It only decides about speed.

    Returns:
      Rows of width m = s*l with the leading dimensions of ``x``.

    Raises:
      ValueError: if the factors do not fit together, ``x`` does not fit them, an
        array holds integers, or the layout or the platform is unknown.

    Examples:
      >>> w1 = jnp.ones((2, 2, 3))
      >>> w2 = jnp.array([[[1.0, 0.0]], [[0.0, 2.0]]])
      >>> monarch_matmul(jnp.arange(6.0), w1, w2)
      Array([ 3., 24.], dtype=float32)
      >>> w2 = jnp.array([[[1.0, 0.0], [2.0, 0.0]], [[0.0, 1.0], [0.0, 2.0]]])
      >>> monarch_matmul(jnp.arange(6.0), w1, w2)
      Array([ 3., 12.,  6., 24.], dtype=float32)
      >>> monarch_matmul(jnp.arange(6.0), w1, w2, output_layout="block_major")
      Array([ 3.,  6., 12., 24.], dtype=float32)
    """
    (x, w1, w2), _ = _promote("monarch_matmul", x=x, w1=w1, w2=w2)
    _check_factors("monarch_matmul", w1, w2)
    interleaved = _is_interleaved("monarch_matmul", output_layout)
    _check_width("monarch_matmul", x, w1, "last")
    packed = _platform("monarch_matmul", platform) == "cpu"
    form = _forms.packed if packed else _forms.plain
    with jax.named_scope("monarch_matmul"):
        return form(x, w1, w2, interleaved)


def monarch_matmul_features(
    x: Inexact[ArrayLike, "n *batch"],
    w1: Inexact[ArrayLike, "k q p"],
    w2: Inexact[ArrayLike, "l s r"],
    *,
    output_layout: OutputLayout = "interleaved",
) -> Inexact[Array, "m *batch"]:
    """Multiplies columns by a Monarch matrix, ``monarch_to_dense(w1, w2) @ x``.

    The features stand first and the tokens last, so nothing is transposed at the
    edges: a chain of such products is faster than one of :func:`monarch_matmul`.
    Dtypes and derivatives are as there.

    Args:
      x: columns of height n = k*p; any further dimensions, empty ones too.
      w1: blocks next to the input, (k, q, p).
      w2: blocks next to the output, (l, s, r), with ``k * q == l * r``.
      output_layout: "interleaved", the order of ``monarch_to_dense``, or
        "block_major", one block after the other: the interleaved column y is then
        ``y.reshape(s, l).T.ravel()``, and the middle alone is shuffled.

    Returns:
      Columns of height m = s*l with the further dimensions of ``x``.

    Raises:
      ValueError: if the factors do not fit together, ``x`` does not fit them, an
        array holds integers, or the layout is unknown.

    Examples:
      >>> w1 = jnp.ones((2, 2, 3))
      >>> w2 = jnp.array([[[1.0, 0.0]], [[0.0, 2.0]]])
      >>> monarch_matmul_features(jnp.arange(6.0)[:, None], w1, w2)
      Array([[ 3.],
             [24.]], dtype=float32)
    """
    (x, w1, w2), _ = _promote("monarch_matmul_features", x=x, w1=w1, w2=w2)
    _check_factors("monarch_matmul_features", w1, w2)
    interleaved = _is_interleaved("monarch_matmul_features", output_layout)
    _check_width("monarch_matmul_features", x, w1, "first")
    with jax.named_scope("monarch_matmul_features"):
        return _forms.features(x, w1, w2, interleaved)


def monarch_to_dense(
    w1: Inexact[ArrayLike, "k q p"], w2: Inexact[ArrayLike, "l s r"]
) -> Inexact[Array, "m n"]:
    """Builds the matrix, m = s*l rows by n = k*p columns, of two Monarch factors.

    Args:
      w1: blocks next to the input, (k, q, p).
      w2: blocks next to the output, (l, s, r), with ``k * q == l * r``.

    Returns:
      The matrix that maps columns x to y. A Flax kernel maps rows: it is the
      transpose of this.

    Raises:
      ValueError: if the factors do not fit together or hold integers.

    Examples:
      >>> w1 = jnp.ones((2, 2, 3))
      >>> w2 = jnp.array([[[1.0, 0.0]], [[0.0, 2.0]]])
      >>> monarch_to_dense(w1, w2)
      Array([[1., 1., 1., 0., 0., 0.],
             [0., 0., 0., 2., 2., 2.]], dtype=float32)
    """
    (w1, w2), dtype = _promote("monarch_to_dense", w1=w1, w2=w2)
    _check_factors("monarch_to_dense", w1, w2)
    (k, q, p), (l, s, _) = w1.shape, w2.shape
    if q % l:  # ragged: the slices differ in rank, so take the columns one by one
        return monarch_matmul(jnp.eye(k * p, dtype=dtype), w1, w2).T
    c = q // l
    with jax.named_scope("monarch_to_dense"):
        dense = jnp.einsum(
            "lskc,kclp->slkp",
            w2.reshape(l, s, k, c),
            w1.reshape(k, c, l, p),
            preferred_element_type=jnp.promote_types(dtype, jnp.float32),
        )
        return dense.astype(dtype).reshape(s * l, k * p)


def _promote(name: str, **arrays: ArrayLike) -> tuple[list[Array], jnp.dtype]:
    """Brings arrays to their common dtype, which has to be real or complex."""
    values = [jnp.asarray(array) for array in arrays.values()]
    for key, value in zip(arrays, values, strict=True):
        if not jnp.issubdtype(value.dtype, jnp.inexact):
            raise ValueError(
                f"{name}: {key} must hold real or complex floating-point numbers, got "
                f"{value.dtype}; convert it with {key}.astype(jnp.float32)."
            )
    dtype = jnp.result_type(*values)
    return [value.astype(dtype) for value in values], dtype


def _check_factors(name: str, w1: Array, w2: Array) -> None:
    """Refuses factors that do not fit together."""
    if w1.ndim != 3 or w2.ndim != 3:
        raise ValueError(
            f"{name}: w1 must have shape (k, q, p) and w2 (l, s, r), got {w1.shape} "
            f"and {w2.shape}; map over further leading axes with jax.vmap."
        )
    (k, q, _), (l, _, r) = w1.shape, w2.shape
    if k * q != l * r:
        raise ValueError(
            f"{name}: w1 (k, q, p) must give as many middle entries as w2 (l, s, r) "
            f"takes, k * q == l * r; got {w1.shape} and {w2.shape}, so {k} * {q} = "
            f"{k * q} against {l} * {r} = {l * r}."
        )


def _check_width(
    name: str, x: Array, w1: Array, which: Literal["first", "last"]
) -> None:
    """Refuses an input whose feature axis does not fit the factors."""
    k, _, p = w1.shape
    if x.ndim == 0 or x.shape[0 if which == "first" else -1] != k * p:
        raise ValueError(
            f"{name}: the {which} axis of x must have k * p = {k} * {p} = "
            f"{k * p} entries for w1 of shape {w1.shape}, got x of shape {x.shape}; "
            "pad x with zeros or make factors for that width."
        )


def _is_interleaved(name: str, layout: str, argument: str = "output_layout") -> bool:
    """Refuses unknown layouts."""
    if layout not in ("interleaved", "block_major"):
        raise ValueError(
            f'{name}: {argument} must be "interleaved" or "block_major", got '
            f"{layout!r}."
        )
    return layout == "interleaved"


def _platform(name: str, platform: str | None) -> str:
    """Refuses unknown platforms; the default backend's if none is given."""
    if platform not in (None, "cpu", "gpu", "tpu"):
        raise ValueError(
            f'{name}: platform must be None, "cpu", "gpu" or "tpu", got {platform!r}.'
        )
    return platform or jax.default_backend()
