"""Eigenpairs of Fisher matrices from the Gram matrix of per-example gradients.

With S (m x p) the rows of a Fisher matrix F = S^T S, the Gram matrix S S^T has the
non-zero eigenvalues of F, and S^T v_i points along the eigenvector of F that belongs to
the eigenvector v_i of S S^T. With share_i the weight of row i (1/n), the rows are

    empirical   sqrt(share_i) g_i,              g_i the gradient with the given target
    sampled     sqrt(share_i) g_i,              with a target drawn from the model
    true        sqrt(share_i w_ic) b_ic^T J_i,  c = 1..C, where the Hessian of the
                likelihood in the outputs of row i is sum_c w_ic b_ic b_ic^T

so the true matrix takes C rows an example. S^T v_i / sqrt(lambda_i) would be far from
orthonormal where lambda_i is near the round-off of S S^T, which is eps lambda_1. So the
S^T v_i are orthonormalised, and the singular values of S on their span give the pairs.

References: Yang, Mao, Chaudhari, "Does the Data Induce Capacity Control in Deep
Learning?", ICML 2022; Kunstner, Hennig, Balles, "Limitations of the Empirical Fisher
Approximation for Natural Gradient Descent", NeurIPS 2019 (the kinds differ).
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Float, Key, PyTree

from jaxlab._checks import is_whole
from jaxlab.curvature._batches import row_keys
from jaxlab.curvature._vectors import Space, space_of
from jaxlab.likelihoods import Likelihood, row_shares
from jaxlab.objective import Batch, unpack_batch


def gram_fisher(
    apply_fn: Callable[..., Any],
    likelihood: Likelihood,
    params: PyTree,
    batch: Batch,
    *,
    k: int,
    kind: Literal["true", "sampled", "empirical"] = "true",
    key: Key[Array, ""] | None = None,
    memory_limit: int = 2**30,
) -> tuple[Float[Array, " k"], PyTree]:
    """Computes the k largest eigenpairs of a Fisher matrix by the Gram trick.

    Exact up to round-off, unlike an iteration, and without a p by p matrix: m gradients
    of one row each, their m by m Gram matrix (m = n, or n C for ``kind="true"``) and
    its eigendecomposition, O(m^3). Take it where m is a few thousand; beyond, give
    ``fisher_operator`` to ``top_eigenpairs``.

    Gradients are held for a part of the examples at a time. With c such parts they are
    computed c (c + 7) / 2 times for a part; only once where all fit.

    Args:
      apply_fn: ``(params, inputs) -> outputs``, whose rows do not mix examples.
      likelihood: one of :mod:`jaxlab.likelihoods`, or a class with their methods.
      params: p parameters in a pytree.
      batch: ``(inputs, targets)`` or ``(inputs, targets, weights)``, n examples; only
        the empirical kind reads the targets.
      k: the number of pairs, at most p and m.
      kind: "true" (the GGN for these likelihoods), "sampled" (one target an example
        drawn with ``key``: unbiased) or "empirical" (the given targets).
      key: for "sampled" only; the same key draws the same targets as for
        :func:`fisher_operator`.
      memory_limit: in bytes, both for the gradients held at a time and for the Gram
        matrix. The k vectors come on top, about four times over.

    Returns:
      The eigenvalues (k,), descending and not negative, and orthonormal vectors: a tree
      like ``params`` with a leading axis k on each leaf; float32 at least. Beyond the
      rank eigenvalues are zero up to round-off and vectors arbitrary.

    Raises:
      ValueError: if ``k`` or ``kind`` is out of range, ``key`` is missing or of no use,
        there are no examples, or the limit is too small (the message says what is
        needed).

    Examples:
      >>> from jaxlab.likelihoods import Gaussian
      >>> x = jnp.array([[2.0, 0.0], [0.0, 4.0]])
      >>> values, vectors = gram_fisher(
      ...     lambda w, x: x @ w, Gaussian(), jnp.ones((2, 1)), (x, None), k=1,
      ...     kind="true",
      ... )
      >>> values.round(4), vectors.shape
      (Array([8.], dtype=float32), (1, 2, 1))
    """
    name = "gram_fisher"
    if kind not in ("true", "sampled", "empirical"):
        raise ValueError(
            f'{name}: kind must be "true", "sampled" or "empirical", got {kind!r}.'
        )
    if (kind == "sampled") != (key is not None):
        raise ValueError(
            f'{name} needs key= for kind="sampled" and only there, got kind="{kind}" '
            f"{'with' if key is not None else 'without'} one."
        )
    inputs, targets, weights = unpack_batch(batch)
    counts = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(inputs)}
    if len(counts) != 1 or counts <= {(), (0,)}:
        raise ValueError(
            f"{name}: every array of the inputs needs one row per example, at least "
            f"one; got leading axes {sorted(counts)}."
        )
    space = space_of(name, params, "params")
    apply_fn = apply_fn if isinstance(apply_fn, Partial) else Partial(apply_fn)
    outputs = jax.eval_shape(apply_fn, params, inputs)
    ((n,),) = counts
    if outputs.ndim < 2 or outputs.shape[0] != n:
        raise ValueError(
            f"{name}: apply_fn must give outputs (examples, ..., event) for {n} "
            f"examples, got shape {outputs.shape}."
        )
    if kind == "empirical" and any(
        jnp.shape(leaf)[:1] != (n,) for leaf in jax.tree.leaves(targets) or [0]
    ):
        raise ValueError(f"{name}: the empirical kind needs {n} targets, one a row.")
    rows = math.prod(outputs.shape[1:] if kind == "true" else outputs.shape[1:-1])
    if not is_whole(k) or not 1 <= k <= min(space.size, n * rows):
        raise ValueError(
            f"{name}: k must be at least 1 and at most min(p, m) = "
            f"min({space.size}, {n * rows}), got {k}."
        )
    part = _examples_at_a_time(name, n, rows, space, memory_limit)
    shares = row_shares(outputs.shape[:-1], weights, dtype=space.dtype)
    keys = None if key is None else row_keys(key, 0, count=n)
    data = (inputs, targets if kind == "empirical" else None, shares, keys)
    with jax.named_scope(name), jax.default_matmul_precision("highest"):
        values, flat = _gram_pairs(
            apply_fn, likelihood, params, data, k=k, part=part, exact=kind == "true"
        )
    wide = dataclasses.replace(space, dtypes=(space.dtype,) * len(space.dtypes))
    return values, jax.vmap(wide.unflatten)(flat)


@functools.partial(jax.jit, static_argnames=("k", "part", "exact"))
def _gram_pairs(apply_fn, likelihood, params, data, *, k, part, exact):
    """Computes eigenvalues (k,) and eigenvectors (k, p) from parts of the rows."""
    space = space_of("gram_fisher", params, "params")
    n = data[2].shape[0]
    parts = -(-n // part)
    one = functools.partial(_rows, apply_fn, likelihood, params, space, exact)

    def fresh(i):
        index = i * part + jnp.arange(part)
        take = lambda leaf: leaf[jnp.minimum(index, n - 1)]
        inputs, targets, shares, keys = jax.tree.map(take, data)
        real = (index < n).reshape((part,) + (1,) * (shares.ndim - 1))
        rows = jax.vmap(one)(inputs, targets, shares * real, keys)
        return rows.reshape(-1, space.size)

    if parts == 1:
        held = fresh(0)
        gradients = lambda i: held
    else:
        gradients = fresh
    size = jax.eval_shape(fresh, 0).shape[0]  # rows of a part

    def fill(i, gram):
        left = gradients(i)

        def pair(j, gram):
            block = left @ gradients(j).T
            gram = jax.lax.dynamic_update_slice(gram, block, (i * size, j * size))
            return jax.lax.dynamic_update_slice(gram, block.T, (j * size, i * size))

        return jax.lax.fori_loop(i, parts, pair, gram)

    gram = jnp.zeros((parts * size,) * 2, space.dtype)
    gram = jax.lax.fori_loop(0, parts, fill, gram)
    _, leading = jnp.linalg.eigh(gram)
    leading = leading[:, ::-1][:, :k].reshape(parts, size, k)

    def add(i, total):
        return total + gradients(i).T @ leading[i]

    span = jax.lax.fori_loop(0, parts, add, jnp.zeros((space.size, k), space.dtype))
    basis, _ = jnp.linalg.qr(span)
    on_basis = jax.lax.map(lambda i: gradients(i) @ basis, jnp.arange(parts))
    _, scales, turn = jnp.linalg.svd(on_basis.reshape(-1, k), full_matrices=False)
    return scales**2, turn @ basis.T


def _rows(apply_fn, likelihood, params, space, exact, inputs, targets, shares, key):
    """Computes the rows of S that one example gives, (rows, p)."""
    alone = jax.tree.map(lambda leaf: leaf[None], inputs)
    outputs, pull = jax.vjp(lambda p: apply_fn(p, alone), params)
    events = outputs.reshape(-1, outputs.shape[-1])
    roots = jnp.sqrt(shares).reshape(-1, 1, 1)
    if exact:
        slopes = jax.vmap(functools.partial(_hessian_root, likelihood))(events)
    else:
        if targets is None:
            targets = likelihood.sample(key, outputs)
        else:
            targets = jax.tree.map(lambda leaf: leaf[None], targets)
        loss = lambda f: jnp.sum(likelihood.row_nll(f, targets))
        slopes = jax.grad(loss)(outputs).reshape(len(events), 1, -1)
    slopes = jnp.where(roots == 0, 0.0, roots * slopes)  # (rows, c, event)
    place = jnp.eye(len(events), dtype=slopes.dtype)[:, None, :, None]
    bent = (place * slopes[:, :, None, :]).reshape(-1, *outputs.shape)
    rows = jax.vmap(lambda t: space.flatten(pull(t.astype(outputs.dtype))[0]))(bent)
    return jnp.where(shares.sum() == 0, 0.0, rows)


def _hessian_root(likelihood, outputs):
    """Computes rows B with ``B^T B`` the Hessian of one row's loss, (event, event)."""
    event = outputs.shape[-1]
    wide = jnp.promote_types(outputs.dtype, jnp.float32)
    product = lambda v: likelihood.hessian_product(outputs.astype(wide)[None], v[None])
    values, vectors = jnp.linalg.eigh(
        jax.vmap(product)(jnp.eye(event, dtype=wide))[:, 0]
    )
    return jnp.sqrt(jnp.maximum(values, 0))[:, None] * vectors.T


def _examples_at_a_time(
    name: str, n: int, rows: int, space: Space, memory_limit: int
) -> int:
    """Says for how many examples the gradients are held at once."""
    item = jnp.dtype(space.dtype).itemsize
    gram, each = (n * rows) ** 2 * item, rows * space.size * item
    if max(gram, min(n, 2) * each) > memory_limit:
        raise ValueError(
            f"{name}: memory_limit must be at least {gram:,} bytes for the Gram matrix "
            f"of {n * rows:,} rows and {min(n, 2) * each:,} bytes for the gradients of "
            f"two examples, got {memory_limit:,}. Raise it, take fewer examples or "
            'kind="sampled", or use top_eigenpairs with fisher_operator.'
        )
    return n if n * each <= memory_limit else memory_limit // (2 * each)
