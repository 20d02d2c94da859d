"""Spectral densities by stochastic Lanczos quadrature.

The eigenvalues of A, smoothed by a Gaussian of width sigma, have the density

    phi(t) = (1/p) sum_i N(t; lambda_i, sigma^2) = E [v . N(t; A, sigma^2) v] / p

for random v with E v v^T = I. For one v, the Gauss rule (theta_k, w_k) of order m that
Lanczos gives turns the quadratic form into sum_k w_k N(t; theta_k, sigma^2); the mean
over a few v is the estimate and their spread its error. With sigma below range / m one
sees the nodes of the rule and not the spectrum.
References: Ghorbani, Krishnan, Xiao, "An Investigation into Neural Net Optimization via
Hessian Eigenvalue Density", ICML 2019; Papyan, "Traces of Class/Cross-Class Structure
Pervade Deep Learning Spectra", JMLR 2020 (the logarithmic scale).
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Key, PyTree

from jaxlab._array_checks import check_fields, check_floating
from jaxlab._checks import check_count, check_number
from jaxlab.curvature._options import Driver
from jaxlab.curvature._quadrature import gauss_rules, mean_and_error
from jaxlab.curvature._recurrence import Reorthogonalize
from jaxlab.curvature._vectors import Operator

Scale = Literal["linear", "log"]

_MARGIN = 5.0  # sigmas of the default grid beyond the outermost nodes
_APART = 4.0  # sigmas between nodes that a plot takes for separate groups


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Density:
    """Holds an estimated spectral density; a pytree of arrays.

    Attributes:
      grid: where the density is given, shape (g,): eigenvalues, or for ``scale="log"``
        the decimal logarithm of their absolute values.
      density: per unit of ``grid``, shape (g,); its integral is 1.
      nodes: Ritz values, shape (num_probes, order); always eigenvalues, not logarithms.
      weights: of the nodes, shape (num_probes, order); each row sums to 1.
      sigma: width of the Gaussian, in the units of ``grid``.
      standard_error: of the density, shape (g,), from the spread of the probes; NaN for
        a single probe. It does not hold the error of the quadrature.
      scale: "linear" or "log"; static.

    Examples:
      >>> x = jnp.zeros(1)
      >>> Density(x, x, x[None], x[None], x[0], x).scale
      'linear'
    """

    grid: Float[Array, " g"]
    density: Float[Array, " g"]
    nodes: Float[Array, "num_probes order"]
    weights: Float[Array, "num_probes order"]
    sigma: Float[Array, ""]
    standard_error: Float[Array, " g"]
    scale: Scale = dataclasses.field(default="linear", metadata={"static": True})


def spectral_density(
    key: Key[Array, ""],
    operator: Operator,
    like: PyTree,
    *,
    order: int = 64,
    num_probes: int = 4,
    sigma: ArrayLike | None = None,
    grid: ArrayLike | None = None,
    scale: Scale = "linear",
    num_points: int = 1024,
    floor: ArrayLike | None = None,
    reorthogonalize: Reorthogonalize = "full",
    memory_limit: float | None = None,
    probes_at_once: int = 1,
    check_symmetric: bool = True,
    driver: Driver = "auto",
) -> Density:
    """Estimates the density of an operator's eigenvalues.

    It costs ``num_probes * order`` products and the memory of :func:`lanczos` for
    ``probes_at_once`` runs. An order above the number p of parameters is cut to p.

    Args:
      key: of the probes, which are Rademacher vectors.
      operator: symmetric, as in :func:`lanczos`.
      like: tree with the shapes and dtypes that the operator acts on.
      order: Lanczos steps from each probe.
      num_probes: random vectors; an error bar needs two.
      sigma: width of the Gaussian in the units of the grid; ``None`` takes the range of
        the nodes / order.
      grid: points, shape (g,); ``None`` takes ``num_points`` equidistant ones that
        reach 5 sigma beyond the nodes.
      scale: "linear", or "log" for the density of ``log10 |lambda|``.
      num_points: of the default grid.
      floor: with "log", smaller absolute values count as this one; ``None`` takes
        10 epsilon times the largest, below which they are round-off.
      reorthogonalize: as in :func:`lanczos`; densities bear ``"none"``, where outliers
        keep their weight but share it among ghosts.
      memory_limit: bytes of the bases, as in :func:`lanczos`.
      probes_at_once: probes that share a product through ``vmap``. More than one helps
        on accelerators and hurts on CPUs.
      check_symmetric: as in :func:`lanczos`.
      driver: as in :func:`lanczos`.

    Returns:
      A :class:`Density`.

    Raises:
      ValueError: for an option out of range, or as :func:`lanczos` does.

    Examples:
      >>> operator = jax.tree_util.Partial(jnp.multiply, jnp.array([1.0, 1.0, 4.0]))
      >>> found = spectral_density(jax.random.key(0), operator, jnp.ones(3), order=2)
      >>> found.nodes[0].round(4), found.weights[0].round(4)
      (Array([1., 4.], dtype=float32), Array([0.6667, 0.3333], dtype=float32))
    """
    name = "spectral_density"
    if scale not in ("linear", "log"):
        raise ValueError(f'{name}: scale must be "linear" or "log", got {scale!r}.')
    if floor is not None and scale != "log":
        raise ValueError(f'{name}: floor belongs to scale="log".')
    check_count(name, num_points=num_points)
    check_number(name, "finite and > 0", optional=True, sigma=sigma, floor=floor)
    grid = None if grid is None else _as_grid(name, grid)
    rules = gauss_rules(
        name,
        key,
        operator,
        like,
        order=order,
        num_probes=num_probes,
        reorthogonalize=reorthogonalize,
        memory_limit=memory_limit,
        probes_at_once=probes_at_once,
        check_symmetric=check_symmetric,
        driver=driver,
    )
    return _density(
        rules.nodes,
        rules.weights,
        sigma,
        grid,
        floor,
        scale=scale,
        num_points=num_points,
    )


def density_from_eigenvalues(
    eigenvalues: Float[ArrayLike, " p"],
    grid: Float[ArrayLike, " g"],
    *,
    sigma: ArrayLike,
) -> Float[Array, " g"]:
    """Smooths known eigenvalues as :func:`spectral_density` would.

    Args:
      eigenvalues: shape (p,); for a logarithmic density their logarithms.
      grid: points in the same units, shape (g,).
      sigma: width of the Gaussian in the same units.

    Returns:
      The mean over the eigenvalues of ``N(t; lambda_i, sigma^2)``, shape (g,).

    Raises:
      ValueError: if an array is not a vector or empty, or ``sigma`` is not positive.

    Examples:
      >>> sigma = (2 * jnp.pi) ** -0.5
      >>> eigenvalues, grid = jnp.array([0.0, 9.0]), jnp.array([0.0, 9.0])
      >>> density_from_eigenvalues(eigenvalues, grid, sigma=sigma).round(4)
      Array([0.5, 0.5], dtype=float32)
    """
    name = "density_from_eigenvalues"
    check_number(name, "finite and > 0", sigma=sigma)
    grid = _as_grid(name, grid)
    values = jnp.asarray(eigenvalues)
    if values.ndim != 1 or not values.size:
        raise ValueError(
            f"{name}: eigenvalues must be a vector with one entry at least, got shape "
            f"{values.shape}."
        )
    return _smoothed(values, jnp.full(values.shape, 1 / values.size), grid, sigma)


def plot_density(
    density: Density,
    *,
    ax: Any = None,
    label: str | None = None,
    color: Any = None,
    outliers: ArrayLike | Sequence[float] | None = None,
    decades: float | int = 8,
) -> Any:
    """Draws a density on a logarithmic axis, with its error band and outliers.

    Args:
      density: of :func:`spectral_density`.
      ax: matplotlib axes; ``None`` makes a new figure.
      label: of the curve in the legend.
      color: of the curve; ``None`` takes the next one of the axes.
      outliers: eigenvalues to mark. ``None`` marks the groups of nodes that stand apart
        from the heaviest group, the bulk, by more than 4 sigma (on a logarithmic scale
        those above it), each at its mean.
      decades: height of the axis below the largest value.

    Returns:
      The axes.

    Raises:
      ImportError: if matplotlib is missing.

    Examples:
      >>> operator = jax.tree_util.Partial(jnp.multiply, jnp.array([1.0, 1.0, 4.0]))
      >>> found = spectral_density(jax.random.key(0), operator, jnp.ones(3), order=2)
      >>> plot_density(found).get_xlabel()
      'eigenvalue'
    """
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError(
            'plot_density needs matplotlib: pip install "jaxlab[train]".'
        ) from error
    density = checked_density("plot_density", density)
    check_number("plot_density", "finite and > 0", decades=decades)
    if ax is None:
        _, ax = pyplot.subplots(figsize=(6.4, 3.6), layout="constrained")
    grid, height, error = (
        np.asarray(x) for x in (density.grid, density.density, density.standard_error)
    )
    top = float(height.max())
    bottom = top * 10.0**-decades
    above = lambda y: np.maximum(y, bottom / 10)
    (line,) = ax.plot(grid, above(height), label=label, color=color)
    color = line.get_color()
    if np.isfinite(error).all():
        low, high = above(height - 2 * error), above(height + 2 * error)
        ax.fill_between(grid, low, high, color=color, alpha=0.25, linewidth=0)
    if outliers is None:
        marks = _isolated(density)
    else:
        marks = np.atleast_1d(np.asarray(outliers))
        marks = np.log10(np.abs(marks)) if density.scale == "log" else marks
    # Along the lower edge, where no curve hides them.
    places = ax.get_xaxis_transform()
    height = np.full(marks.shape, 0.03)
    ax.plot(marks, height, "^", transform=places, color=color, markersize=5)
    ax.set_yscale("log")
    ax.set_ylim(bottom, 3 * top)
    log = density.scale == "log"
    ax.set_xlabel("log10 |eigenvalue|" if log else "eigenvalue")
    ax.set_ylabel("density")
    if label is not None:
        ax.legend(frameon=False)
    return ax


def _isolated(density: Density) -> np.ndarray:
    """Finds the groups of nodes apart from the heaviest one, in units of the grid."""
    weights = np.asarray(density.weights).ravel()
    kept = weights > 0
    nodes = jnp.ravel(density.nodes)[kept]
    if density.scale == "log":
        # The grid begins 5 sigma below the floor.
        floor = 10 ** (density.grid[0] + _MARGIN * density.sigma)
        nodes = _logarithms(nodes, floor)
    order = np.argsort(nodes)
    nodes, weights = np.asarray(nodes)[order], weights[kept][order]
    apart = np.flatnonzero(np.diff(nodes) > _APART * float(density.sigma)) + 1
    groups = list(zip(np.split(nodes, apart), np.split(weights, apart), strict=True))
    bulk = max(range(len(groups)), key=lambda i: groups[i][1].sum())
    means = [np.average(x, weights=w) for x, w in groups]
    # On a logarithmic scale what lies below the bulk is small, not outside.
    below = [] if density.scale == "log" else means[:bulk]
    return np.array(below + means[bulk + 1 :])


@functools.partial(jax.jit, static_argnames=("scale", "num_points"))
def _density(nodes, weights, sigma, grid, floor, *, scale, num_points) -> Density:
    places = nodes
    if scale == "log":
        if floor is None:
            largest = jnp.max(jnp.abs(nodes))
            largest = jnp.where(largest == 0, 1, largest)
            floor = 10 * jnp.finfo(nodes.dtype).eps * largest
        places = _logarithms(nodes, jnp.asarray(floor, nodes.dtype))
    low, high = jnp.min(places), jnp.max(places)
    if sigma is None:
        # A single eigenvalue has no range.
        size = jnp.maximum(jnp.abs(low), jnp.abs(high))
        least = 1e-3 * jnp.where(size == 0, 1, size)
        sigma = jnp.maximum(high - low, least) / nodes.shape[1]
    sigma = jnp.asarray(sigma, nodes.dtype)
    if grid is None:
        margin = _MARGIN * sigma
        grid = jnp.linspace(low - margin, high + margin, num_points)
    grid = grid.astype(nodes.dtype)
    each = jax.vmap(lambda x, w: _smoothed(x, w, grid, sigma))(places, weights)
    density, error = mean_and_error(each)
    return Density(grid, density, nodes, weights, sigma, error, scale)


def _logarithms(values: Array, floor: ArrayLike) -> Array:
    return jnp.log10(jnp.maximum(jnp.abs(values), floor))


@jax.jit
def _smoothed(values, weights, grid, sigma):
    def at(t):
        shape = jnp.exp(-0.5 * ((t - values) / sigma) ** 2)
        return jnp.sum(weights * shape) / (sigma * math.sqrt(2 * math.pi))

    return lax.map(at, grid, batch_size=min(256, len(grid)))


def _as_grid(name: str, grid: ArrayLike) -> Array:
    grid = jnp.asarray(grid)
    if grid.ndim != 1 or not grid.size:
        raise ValueError(
            f"{name}: grid must be a vector with one point at least, got shape "
            f"{grid.shape}."
        )
    return grid


def checked_density(name: str, density: Density) -> Density:
    """Refuses what :func:`spectral_density` did not make; gives JAX arrays.

    Raises:
      ValueError: if it is no density, or its arrays do not fit together.
    """
    grids = dict.fromkeys(("grid", "density", "standard_error"), "g")
    nodes = dict.fromkeys(("nodes", "weights"), "num_probes order")
    density = check_fields(
        name,
        "density",
        density,
        Density,
        "spectral_density",
        **grids,
        **nodes,
        sigma="",
    )
    check_floating(name, "density", density)
    return density
