"""Low-rank adapters (LoRA), and a penalised gradient for the adapters alone.

A frozen matrix w (in, out), used as x @ w, gets two small trained ones of rank k:

    w' = w + (s / k) a b,    a (in, k) ~ normal of variance 1 / in,    b (k, out) = 0

so that w' = w at the start, where the gradient of a is zero and that of b is not. The
factor is s / k, not s / sqrt(k); by default s = k. The paper writes weights as
(out, in) and W + (s / k) B A: its A is our a transposed, its B our b transposed.

(c a, b / c) gives the same w' for every c, but another gradient norm, so the length of
a perturbation of (a, b) means something only together with this choice:
``lora_balance`` makes it, and the adaptive perturbation does not depend on it.

``regularised_lora_value_and_grad`` is a variant of our own: the gradient-norm penalty
on the adapters. GLAD (below) also joins LoRA with a regulariser of the gradient that
looks for a region stable under shifts of the data, but its formula was not available
to us and its public repository is empty. Neither that function nor
``project_conflicting`` is the method of that paper, and no figure of it applies here.
References: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022;
Peng et al., "GLAD: Generalizable Tuning for Vision-Language Models", ICCV 2025
workshop (the idea only).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Key, PyTree

from jaxlab._array_checks import check_floating
from jaxlab._checks import check_count, check_made, check_number
from jaxlab._norms import inner, wide
from jaxlab.sharpness._checks import check_alike
from jaxlab.sharpness.gradient_norm_penalty import gnp_value_and_grad


class LoRAPair(NamedTuple):
    """The adapter of one matrix: ``a`` (..., in, rank) and ``b`` (..., rank, out).

    Examples:
      >>> LoRAPair(jnp.ones((3, 1)), jnp.zeros((1, 2))).b
      Array([[0., 0.]], dtype=float32)
    """

    a: Any
    b: Any


def lora_init(
    key: Key[Array, ""],
    params: PyTree,
    *,
    rank: int,
    where: Callable[[str], bool] | None = None,
) -> PyTree:
    """Makes adapters that change nothing yet: ``a`` random, ``b`` zero.

    Args:
      key: of the draws of ``a``.
      params: the frozen tree, with matrices as (..., in, out).
      rank: k, from 1 to the smaller side of every adapted matrix.
      where: tells from a leaf's path (``"layers/0/kernel"``) whether it is adapted;
        default every leaf of exactly two axes. Leading axes that it lets in are a
        stack of matrices, with an adapter each.

    Returns:
      A tree like ``params`` with a :class:`LoRAPair`, in the leaf's dtype, in place of
      each adapted leaf and ``optax.MaskedNode()`` in place of the others: its leaves,
      and so a gradient's, are those of the adapters alone.

    Raises:
      ValueError: if ``rank`` is out of range, nothing is selected, or a selected leaf
        has fewer than two axes or is not floating.

    Examples:
      >>> params = {"bias": jnp.ones(2), "kernel": jnp.ones((3, 2))}
      >>> adapters = lora_init(jax.random.key(0), params, rank=1)
      >>> jax.tree.map(jnp.shape, adapters)
      {'bias': MaskedNode(), 'kernel': LoRAPair(a=(3, 1), b=(1, 2))}
    """
    name = "lora_init"
    check_count(name, rank=rank)
    found, tree = jax.tree_util.tree_flatten_with_path(params)
    paths = [
        jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in found
    ]
    adapters = []
    for number, (text, (_, leaf)) in enumerate(zip(paths, found)):
        shape, dtype = jnp.shape(leaf), jnp.result_type(leaf)
        if not (len(shape) == 2 if where is None else where(text)):
            adapters.append(optax.MaskedNode())
            continue
        if len(shape) < 2 or not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(
                f"{name}: adapted leaves must be floating, of shape (..., in, out), "
                f"got {dtype} of shape {shape} at {text!r}; leave it out by where=."
            )
        *stack, fan_in, fan_out = shape
        if rank > min(fan_in, fan_out):
            raise ValueError(
                f"{name}: rank must be at most {min(fan_in, fan_out)} for the leaf of "
                f"shape {shape} at {text!r}, got {rank}; lower it or leave the leaf "
                "out by where=."
            )
        kind = jnp.promote_types(dtype, jnp.float32)
        here = jax.random.fold_in(key, number)
        a = jax.random.normal(here, (*stack, fan_in, rank), kind) / np.sqrt(fan_in)
        b = jnp.zeros((*stack, rank, fan_out), dtype)
        adapters.append(LoRAPair(a.astype(dtype), b))
    if all(isinstance(adapter, optax.MaskedNode) for adapter in adapters):
        raise ValueError(
            f"{name}: no leaf of params is selected, "
            + (
                "since none has two axes; choose leaves by where=."
                if where is None
                else f"where= gave False for every path of {paths}."
            )
        )
    return jax.tree.unflatten(tree, adapters)


def lora_merge(
    params: PyTree, adapters: PyTree, *, scale: ArrayLike | None = None
) -> PyTree:
    """Adds the adapters to the frozen parameters: ``w + (scale / rank) a b``.

    Args:
      params: the frozen tree.
      adapters: from :func:`lora_init` for this tree.
      scale: s of the module's formula; default the rank, so a factor of 1.

    Returns:
      A tree like ``params``, in its dtypes; summed in float32 at least. Where ``b`` is
      zero it is ``params`` bit for bit, and leaves without adapter pass through.

    Raises:
      ValueError: if the trees or the shapes do not fit, or ``scale`` is a number that
        is not finite.

    Examples:
      >>> adapters = {"w": LoRAPair(jnp.ones((2, 1)), jnp.array([[2.0]]))}
      >>> lora_merge({"w": jnp.ones((2, 1))}, adapters)["w"]
      Array([[3.],
             [3.]], dtype=float32)
    """
    with jax.named_scope("lora_merge"):
        return _merge("lora_merge", params, adapters, scale, promote=False)


def lora_apply(
    x: ArrayLike, w: ArrayLike, pair: LoRAPair, *, scale: ArrayLike | None = None
) -> Float[Array, "..."]:
    """Multiplies by an adapted matrix: ``x @ w + (scale / rank) (x @ a) @ b``.

    The same as ``x @`` the merged matrix, without forming a product of the size of w.

    Args:
      x: rows (..., in).
      w: the frozen matrix (..., in, out).
      pair: its adapter.
      scale: as in :func:`lora_merge`.

    Returns:
      An array like ``x @ w``, bit for bit that where ``b`` is zero.

    Raises:
      ValueError: if the shapes do not fit, or ``scale`` is a number that is not finite.

    Examples:
      >>> pair = LoRAPair(jnp.ones((2, 1)), jnp.array([[2.0]]))
      >>> lora_apply(jnp.ones((1, 2)), jnp.ones((2, 1)), pair)
      Array([[6.]], dtype=float32)
    """
    name = "lora_apply"
    check_made(name, "pair", pair, LoRAPair, "lora_init")
    x, w = jnp.asarray(x), jnp.asarray(w)
    factor = _factor(name, w, pair, scale)
    if not x.shape or x.shape[-1] != w.shape[-2]:
        raise ValueError(
            f"{name}: x must be of shape (..., {w.shape[-2]}) for w of shape "
            f"{w.shape}, got {x.shape}."
        )
    with jax.named_scope(name):
        base = x @ w
        low = jnp.matmul(wide(x), wide(pair.a))
        update = factor * jnp.matmul(low, wide(pair.b))
        return _plus(wide(base), update.astype(wide(base).dtype)).astype(base.dtype)


def lora_balance(adapters: PyTree) -> PyTree:
    """Rescales each pair to ``||a||_F = ||b||_F``, without changing ``a b``.

    Each matrix of a stack is balanced for itself. Where ``a`` or ``b`` is zero nothing
    changes, so fresh adapters stay as they are. The moments that an optimizer keeps
    are not rescaled: balance before its ``init``, or between its runs.

    Args:
      adapters: from :func:`lora_init`, trained or not.

    Returns:
      Adapters in the same dtypes; the products agree up to rounding.

    Raises:
      ValueError: if there is no :class:`LoRAPair` in the tree.

    Examples:
      >>> pair = lora_balance(LoRAPair(jnp.array([[8.0]]), jnp.array([[2.0]])))
      >>> float(pair.a[0, 0]), float(pair.b[0, 0])
      (4.0, 4.0)
    """
    name = "lora_balance"
    if not any(map(_is_pair, jax.tree.leaves(adapters, is_leaf=_is_pair))):
        raise ValueError(
            f"{name}: adapters must hold at least one LoRAPair, got "
            f"{jax.tree.structure(adapters)}; lora_init makes them."
        )

    check_floating(name, "adapters", adapters)

    def balance(pair):
        a, b = wide(pair.a), wide(pair.b)
        if a.ndim < 2 or b.ndim != a.ndim or a.shape[-1] != b.shape[-2]:
            raise ValueError(
                f"{name}: an adapter must be a (..., in, rank) and b (..., rank, out), "
                f"got a {a.shape} and b {b.shape}."
            )
        norms = [jnp.sum(m * m, axis=(-2, -1), keepdims=True) for m in (a, b)]
        both = (norms[0] > 0) & (norms[1] > 0)
        of_a, of_b = (jnp.where(both, norm, 1) for norm in norms)
        # Fourth roots, since the norms above are squared.
        c = jnp.sqrt(jnp.sqrt(of_b)) / jnp.sqrt(jnp.sqrt(of_a))
        dtypes = (jnp.result_type(m) for m in pair)
        return LoRAPair(*(m.astype(d) for m, d in zip((a * c, b / c), dtypes)))

    with jax.named_scope(name):
        each = lambda node: balance(node) if _is_pair(node) else node
        return jax.tree.map(each, adapters, is_leaf=_is_pair)


def project_conflicting(grads: PyTree, reference_grads: PyTree) -> PyTree:
    """Takes out of a gradient what would undo a reference gradient.

    With g and r all leaves as one vector: g where ``<g, r> >= 0``, otherwise
    ``g - <g, r> r / ||r||^2``, which is orthogonal to r. The reference may be the
    gradient of another loss (closeness to the frozen model's outputs) or of the same
    loss on another batch.

    Args:
      grads: floating leaves of any shape.
      reference_grads: a tree like ``grads``; where it is zero all over, nothing
        conflicts.

    Returns:
      A tree like ``grads`` in its dtypes, whose inner product with the reference is
      not negative, up to rounding; ``grads`` bit for bit where they agree. NaN in the
      reference gives NaN.

    Raises:
      ValueError: if the trees differ.

    Examples:
      >>> project_conflicting(jnp.array([1.0, 2.0]), jnp.array([-4.0, 0.0]))
      Array([0., 2.], dtype=float32)
    """
    name = "project_conflicting"
    check_alike(name, "grads", grads, reference_grads=reference_grads)
    check_floating(name, "grads", grads)
    with jax.named_scope(name):
        wider = jax.tree.map(wide, reference_grads)
        # The length of r cancels, so that its square may neither over- nor underflow.
        tops = [jnp.max(jnp.abs(r), initial=0) for r in jax.tree.leaves(wider)]
        top = functools.reduce(jnp.maximum, tops, jnp.zeros((), jnp.float32))
        top = jnp.where(top == 0, 1, top)
        r = jax.tree.map(lambda leaf: leaf / top.astype(leaf.dtype), wider)
        product, square = inner(grads, r), inner(r, r)
        part = product / jnp.where(square == 0, 1, square)

        def project(g, along):
            g = jnp.asarray(g)
            rest = wide(g) - part.astype(along.dtype) * along
            return jnp.where(product >= 0, g, rest.astype(g.dtype))

        return jax.tree.map(project, grads, r)


def regularised_lora_value_and_grad(
    loss_fn: Callable[..., Any],
    *,
    alpha: ArrayLike = 0.8,
    radius: ArrayLike = 0.05,
    scale: ArrayLike | None = None,
    has_aux: bool = False,
    **options: Any,
) -> Callable[..., Any]:
    """Makes a value-and-gradient of the adapters with their gradient norm penalised.

    A variant of our own, not the method of the GLAD paper (see the module). At fresh
    adapters the gradient of every ``a`` is zero, so the first perturbation lies in the
    ``b`` alone, and with ``adaptive=True`` there is none, since ``b`` is zero.

    Args:
      loss_fn: ``(params, *args) -> scalar`` of merged parameters, or ``(scalar, aux)``
        with ``has_aux``.
      alpha: share of the gradient at the perturbed adapters; 1 is SAM, 0 plain LoRA.
      radius: length of the perturbation over all adapters together, in their units,
        >= 0. It depends on how a and b are balanced (:func:`lora_balance`).
      scale: as in :func:`lora_merge`.
      has_aux: as in ``jax.value_and_grad``.
      **options: of :func:`gnp_gradient`, but for ``grads``: ``adaptive=True`` perturbs
        independently of the balance of a and b.

    Returns:
      A function ``f(adapters, params, *args)`` that returns ``(value, grads)`` or
      ``((value, aux), grads)``, with ``grads`` like ``adapters``: no frozen leaf has
      one.

    Raises:
      ValueError: if a number is out of range or an option unknown.

    Examples:
      >>> f = regularised_lora_value_and_grad(jnp.sum, alpha=1.0, radius=2.0)
      >>> pair = LoRAPair(jnp.array([[3.0]]), jnp.array([[0.0]]))
      >>> f(pair, jnp.array([[1.0]]))[1].a  # at b = 0 + 2, no longer at b = 0
      Array([[2.]], dtype=float32)
    """
    name = "regularised_lora_value_and_grad"
    if "argnums" in options:
        raise ValueError(
            f"{name}: argnums is not an option, the adapters are differentiated and "
            "nothing else."
        )
    check_number(name, "finite", optional=True, scale=scale)

    def adapted(adapters, params, *args, **kwargs):
        # Promoted, so that a short step does not round away in bfloat16 weights.
        merged = _merge(name, params, adapters, scale, promote=True)
        return loss_fn(merged, *args, **kwargs)

    return gnp_value_and_grad(
        adapted, alpha=alpha, radius=radius, has_aux=has_aux, **options
    )


def _merge(name, params, adapters, scale, promote):
    def merge(pair, w):
        if not _is_pair(pair):
            return w
        factor = _factor(name, w, pair, scale)
        dtype = jnp.result_type(w, *pair) if promote else jnp.result_type(w)
        a, b = wide(pair.a), wide(pair.b)
        update = factor * jnp.matmul(a, b, precision="highest")
        kind = jnp.promote_types(wide(w).dtype, a.dtype)
        return _plus(wide(w).astype(kind), update.astype(kind)).astype(dtype)

    def stops(node):
        return _is_pair(node) or isinstance(node, optax.MaskedNode)

    nodes, tree = jax.tree.flatten(adapters, is_leaf=stops)
    if not all(map(stops, nodes)):
        raise ValueError(
            f"{name}: adapters must hold LoRAPair or optax.MaskedNode in place of each "
            f"leaf of params, got {tree}; lora_init makes them."
        )
    try:
        parts = tree.flatten_up_to(params)
    except ValueError as error:
        raise ValueError(
            f"{name}: adapters must be made by lora_init for these params, got {tree} "
            f"for {jax.tree.structure(params)}."
        ) from error
    return jax.tree.unflatten(tree, [merge(*both) for both in zip(nodes, parts)])


def _factor(name, w, pair, scale):
    """Checks one adapter against its matrix; gives scale / rank."""
    check_number(name, "finite", optional=True, scale=scale)
    shape, of_a, of_b = jnp.shape(w), jnp.shape(pair.a), jnp.shape(pair.b)
    rank = of_a[-1] if len(of_a) > 1 else 0
    fits = len(shape) > 1 and rank > 0
    if fits:
        fits = of_a == (*shape[:-1], rank) and of_b == (*shape[:-2], rank, shape[-1])
    if not fits:
        raise ValueError(
            f"{name}: an adapter of w (..., in, out) must be a (..., in, rank) and "
            f"b (..., rank, out), got a {of_a} and b {of_b} for w {shape}."
        )
    return 1 if scale is None else scale / rank


@jax.custom_jvp
def _plus(w, update):
    """Adds; an update of zero leaves w as it is, the sign of a zero included."""
    return jnp.where(update == 0, w, w + update)


@_plus.defjvp
def _plus_jvp(primals, tangents):
    return _plus(*primals), tangents[0] + tangents[1]


def _is_pair(node) -> bool:
    return isinstance(node, LoRAPair)
