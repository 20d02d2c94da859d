"""What the densities refuse, in their own words."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.curvature.density import (
    density_from_eigenvalues,
    plot_density,
    spectral_density,
)

pytestmark = pytest.mark.untyped

KEY = jax.random.key(0)
A = jnp.diag(jnp.arange(1.0, 6.0))
operator = jax.tree_util.Partial(jnp.matmul, A)


def run(**options):
    return spectral_density(KEY, operator, jnp.ones(5), **options)


@pytest.mark.parametrize(
    "name", ["order", "num_probes", "probes_at_once", "num_points"]
)
@pytest.mark.parametrize("value", [0, -3, 1.5, True])
def test_counts_are_positive_integers(name, value):
    with pytest.raises(ValueError, match=f"{name} must be an integer >= 1"):
        run(**{name: value})


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf")])
def test_widths_are_positive(value):
    with pytest.raises(ValueError, match="sigma must be finite and > 0"):
        run(sigma=value)
    with pytest.raises(ValueError, match="floor must be finite and > 0"):
        run(floor=value, scale="log")
    with pytest.raises(ValueError, match="sigma must be finite and > 0"):
        density_from_eigenvalues(jnp.ones(2), jnp.ones(2), sigma=value)


def test_scales_and_grids():
    with pytest.raises(ValueError, match='"linear" or "log", got \'ln\''):
        run(scale="ln")
    with pytest.raises(ValueError, match='floor belongs to scale="log"'):
        run(floor=0.1)
    for grid in (jnp.ones((2, 2)), 1.0, jnp.zeros(0)):
        with pytest.raises(ValueError, match="grid must be a vector"):
            run(grid=grid)
        with pytest.raises(ValueError, match="grid must be a vector"):
            density_from_eigenvalues(jnp.ones(2), grid, sigma=1.0)
    for values in (jnp.ones((2, 2)), jnp.zeros(0)):
        with pytest.raises(ValueError, match="eigenvalues must be a vector"):
            density_from_eigenvalues(values, jnp.ones(3), sigma=1.0)


def test_numpy_and_lists_are_fine():
    found = run(grid=np.linspace(0, 6, 5), sigma=np.float64(0.5))
    assert found.grid.dtype == found.density.dtype == jnp.float32
    same = density_from_eigenvalues([1.0, 2.0], [0.0, 1.0], sigma=0.5)
    assert same.shape == (2,)


def test_what_lanczos_refuses():
    with pytest.raises(ValueError, match="spectral_density: the basis takes 160 bytes"):
        run(order=4, memory_limit=159, probes_at_once=2)
    run(order=4, memory_limit=159)
    lopsided = A.at[0, 1].add(1.0)
    apply = jax.tree_util.Partial(jnp.matmul, lopsided)
    with pytest.raises(ValueError, match="spectral_density: the operator must be sym"):
        spectral_density(KEY, apply, jnp.ones(5))
    spectral_density(KEY, apply, jnp.ones(5), check_symmetric=False)
    with pytest.raises(ValueError, match="spectral_density: the leaves of like"):
        spectral_density(KEY, operator, jnp.ones(5, int))
    with pytest.raises(ValueError, match="spectral_density: the operator must give"):
        spectral_density(KEY, lambda v: v[1:], jnp.ones(5))


def test_missing_matplotlib_is_named(monkeypatch):
    import sys

    found = run(order=2)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install \"jaxlab\[train\]\""):
        plot_density(found)
