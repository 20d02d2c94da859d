"""XTrace, XDiag and XNysTrace: every probe both sketches and measures.

With the images Y = A W of k random probes, an estimator splits A into what the
projection on (or the Nystrom approximation from) all images but the i-th captures,
which is known, and a rest, which probe i measures without bias since the others do not
know it. The mean over i is the estimate; the k terms are exchangeable, and their spread
gives its error as if they were independent. (They are not quite; the jackknife over
them overshoots as much as this falls short.) Nothing is factored k times:

- Range. Let Y = Q D V^T with orthonormal Q. Row i of the pseudo-inverse of Y, in the
  coordinates of Q, is V D^{-1} e_i: it is orthogonal to every image but the i-th. With
  s_i that direction at length 1, the projection without image i is
  P_i = Q (I - s_i s_i^T) Q^T. If image i depends on the others, s_i = 0.
- Nystrom. With H = W^T Y the approximation is Y H^{-1} Y^T. Without probe i it loses
  z_i z_i^T, where z_i = Y H^{-1} e_i / sqrt(h_i) and h_i is entry i of the diagonal of
  H^{-1}; and probe i measures w_i . (A - A_i) w_i = 1 / h_i, since A_i w_j = A w_j for
  j != i.

Reference: Epperly, Tropp, Webber, "XTrace: Making the Most of Every Sample in
Stochastic Trace Estimation", SIAM Journal on Matrix Analysis and Applications 2024.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxlab.curvature._probes import (
    Method,
    Rows,
    State,
    a_few_of,
    matmul,
    orthonormal,
    rows_of,
    scanned_mean,
    vector_of,
)
from jaxlab.curvature._vectors import Space

PerProbe = Float[Array, " k"]


class Check(NamedTuple):
    """How symmetric and how positive A is on the span of the rows."""

    asymmetry: Float[Array, ""]  # the largest |u . A v - v . A u|
    lowest: Float[Array, ""]  # the smallest eigenvalue there
    scale: Float[Array, ""]  # the largest |A v|


def check_operator(name: str, method: str, check: Check, space: Space) -> None:
    """Refuses an operator that a method cannot take; it looks at values.

    Raises:
      ValueError: if it came out asymmetric or, for "xnystrace", indefinite.
    """
    asymmetry, lowest, scale = map(float, check)
    off = 'Pass check_symmetric=False if that is round-off, or method="{}".'
    if asymmetry > _round_off(space) * scale:
        raise ValueError(
            f'{name}: the operator must be symmetric for method="{method}", but '
            f"u . A v and v . A u differ by {asymmetry:.3g} for two vectors of length "
            f"1, where |A v| is up to {scale:.3g}. {off.format('hutchinson')}"
        )
    if method == "xnystrace" and lowest < -_round_off(space) * scale:
        raise ValueError(
            f"{name}: the operator must be positive semi-definite for "
            f'method="xnystrace", but v . A v = {lowest:.3g} for a v of length 1, '
            f"where |A v| is up to {scale:.3g}. {off.format('xtrace')}"
        )


def is_semidefinite(check: Check, space: Space) -> Bool[Array, ""]:
    """Tells under jit what :func:`check_operator` would refuse for "xnystrace"."""
    bound = _round_off(space) * check.scale
    return (check.asymmetry <= bound) & (check.lowest >= -bound)


def _round_off(space: Space) -> float:
    return 1000 * max(float(jnp.finfo(dtype).eps) for dtype in space.dtypes)


class Downdates(NamedTuple):
    """What the span of the images loses without the i-th."""

    directions: Float[Array, "k k"]  # rows s_i, of length 1 or 0
    distances: PerProbe  # of image i from the span of the others
    ranks: Int[Array, " k"]  # of the others


def downdates(
    factor: Float[Array, "k k"],
) -> tuple[Float[Array, "k k"], Downdates]:
    """Finds the span of the columns of a factor, whole and without each of them.

    Returns:
      An orthonormal basis of the span as rows, zero rows beyond its rank; and the
      downdates, in the coordinates of that basis.
    """
    u, sizes, v = jnp.linalg.svd(factor)
    floor = len(factor) * jnp.finfo(factor.dtype).eps * sizes[0]
    kept = sizes > floor
    inverses = jnp.where(kept, 1 / jnp.where(kept, sizes, 1), 0)
    duals = v.T * inverses[None]
    lengths = jnp.sqrt(jnp.sum(duals**2, axis=1))
    # Null vectors of the factor with a part at i make image i depend on the others.
    null = jnp.sqrt(jnp.sum(jnp.where(kept[None], 0, v.T) ** 2, axis=1))
    free: Bool[Array, " k"] = null < floor * lengths
    safe = jnp.where(free, lengths, 1)
    directions = jnp.where(free[:, None], duals / safe[:, None], 0)
    basis = jnp.where(kept[:, None], u.T, 0)
    ranks = jnp.sum(kept) - free
    return basis, Downdates(directions, jnp.where(free, 1 / safe, 0), ranks)


def _begin(kind: str, sources: Array, space: Space) -> State:
    rows = rows_of(lambda source: vector_of(source, space, kind), sources)
    k = len(sources)
    zero = jnp.zeros((k,), space.dtype)
    found = Downdates(jnp.zeros((k, k), space.dtype), zero, jnp.zeros((k,), int))
    return State(rows, found)


def _span(sources: Array, space: Space, state: State, images: Rows) -> State:
    q, factor = orthonormal(images)
    basis, found = downdates(factor)
    found = found._replace(ranks=found.ranks.astype(state.extra.ranks.dtype))
    return State(matmul(basis, q), found)


def _check(inner: Float[Array, "k k"], images: Rows) -> Check:
    lowest = jnp.linalg.eigvalsh((inner + inner.T) / 2)[0]
    norms = jnp.sqrt(jnp.max(jnp.sum(images**2, axis=1)))
    return Check(jnp.max(jnp.abs(inner - inner.T)), lowest, norms)


def _xtrace_terms(sources: Array, space: Space, state: State, images: Rows) -> PerProbe:
    """Gives the k estimates, each with its probe left out of the span."""
    q, (s, distances, ranks) = state

    def against(source):
        probe = vector_of(source, space, "normal")
        return matmul(q, probe), matmul(images, probe), matmul(probe, probe)

    batch_size = a_few_of(len(sources))
    w, t, squares = lax.map(against, sources, batch_size=batch_size)
    inner = matmul(q, images.T)
    along = jnp.sum(w * s, axis=1)
    x = w - along[:, None] * s  # P_i w_i
    captured = jnp.trace(inner) - jnp.sum(matmul(s, inner) * s, axis=1)
    # mu . A mu for mu = (I - P_i) w_i, where (I - P_i) A w_i is distance times s_i.
    rest = along * distances - jnp.sum(t * x, axis=1)
    rest += jnp.sum(matmul(x, inner) * x, axis=1)
    # Given the others, mu has a random direction in the complement of their span:
    # its length tells nothing, so it is set to what it is on average.
    left = space.size - ranks
    length = jnp.maximum(squares - jnp.sum(x**2, axis=1), jnp.finfo(w.dtype).tiny)
    return captured + left * rest / length


def _xdiag(
    sources: Array, space: Space, state: State, images: Rows
) -> tuple[tuple[Array, Array], Check]:
    """Gives the mean of the k diagonals and its standard error."""
    q, (s, distances, _) = state

    def loss(each):
        source, direction, distance = each
        probe = vector_of(source, space, "rademacher")
        gone = matmul(direction, images)  # A Q s_i
        return matmul(direction, q) * (distance * probe - gone)

    at_once = a_few_of(len(sources))
    each = sources, s, distances
    shape = (space.size,)
    mean, error = scanned_mean(loss, each, shape, space.dtype, at_once)
    diagonal = jnp.sum(q * images, axis=0) + mean
    return (diagonal, error), _check(matmul(q, images.T), images)


def _orthonormal_probes(sources: Array, space: Space) -> State:
    # Orthonormal normal probes are exchangeable, and each has, given the others, a
    # random direction in their complement: what normal ones have once the part in the
    # span of the others is taken out and the length is set. H then needs no Gram
    # matrix of the probes, which is ill-conditioned for k near p.
    draw = lambda source: vector_of(source, space, "normal")
    return State(orthonormal(rows_of(draw, sources))[0], ())


def _xnystrace_terms(
    sources: Array, space: Space, state: State, images: Rows
) -> tuple[PerProbe, Check]:
    """Gives the k estimates, each with its probe left out of the approximation."""
    probes, k, p = state.rows, len(sources), space.size
    inner = matmul(probes, images.T)
    sizes, v = jnp.linalg.eigh((inner + inner.T) / 2)
    largest = jnp.max(jnp.abs(sizes))
    # A + shift I in place of A: its trace is p shift more, which is taken off again.
    coarsest = max(float(jnp.finfo(dtype).eps) for dtype in space.dtypes)
    shift = jnp.where(largest == 0, 1, 4 * coarsest * largest)
    roots = jnp.sqrt(jnp.maximum(sizes, 0) + shift)
    half = v / roots[None]  # H^{-1} = half half^T
    f = matmul(half.T, images + shift * probes)  # the approximation is f^T f
    h = jnp.sum(half**2, axis=1)
    gram = matmul(f, f.T)
    c = half / jnp.sqrt(h)[:, None]
    # z_i = sum_j c_ij f_j
    terms = jnp.trace(gram) - jnp.sum(matmul(c, gram) * c, axis=1)
    terms = terms + (p - k + 1) / h - p * shift
    return jnp.where(largest == 0, 0, terms), _check(inner, images)


def _begin_normal(sources: Array, space: Space) -> State:
    return _begin("normal", sources, space)


def _begin_rademacher(sources: Array, space: Space) -> State:
    return _begin("rademacher", sources, space)


XTRACE = Method(_begin_normal, (_span,), _xtrace_terms)
XDIAG = Method(_begin_rademacher, (_span,), _xdiag)
XNYSTRACE = Method(_orthonormal_probes, (), _xnystrace_terms)
