"""The curvature of the demo's networks: what is recorded, its table and its picture.

The Hessian of the mean training loss at the end of training: its largest eigenvalues
with residuals, the trace, and the nodes and weights from which the density is drawn.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from matplotlib.transforms import ScaledTranslation

from benchmarks.results import Record
from benchmarks.tables import Table
from jaxlab.curvature import Density, plot_density, spectrum_report
from jaxlab.objective import Objective

DECADES = 6.0  # of the picture's density
POINTS = 1500


def measure(
    objective: Objective, params: Any, state: Any, rows: tuple[Any, Any], *, order: int
) -> dict[str, Any]:
    """Measures the Hessian's spectrum on the rows; every entry is plain numbers.

    Args:
      objective: the model and its likelihood.
      params: where the Hessian is taken.
      state: what the model keeps besides.
      rows: inputs and targets.
      order: Lanczos steps from each of two random vectors.
    """
    report = spectrum_report(
        jax.random.key(0),
        objective,
        params,
        tuple(map(jnp.asarray, rows)),
        state=state,
        k=12,
        order=order,
        num_probes=2,
        damping=None,
    )
    pairs, density = report.eigenpairs, report.density
    plain = lambda array: np.asarray(array, float).tolist()
    return {
        "loss": float(report.loss),
        "values": plain(pairs.values),
        "residuals": plain(pairs.residuals),
        "outliers": np.asarray(report.outliers).tolist(),
        "trace": float(report.trace),
        "trace_error": float(report.trace_error),
        "nodes": plain(density.nodes),
        "weights": plain(density.weights),
        "sigma": float(density.sigma),
        "products": int(report.num_products),
    }


def density_of(spectrum: dict[str, Any]) -> Density:
    """Rebuilds the density from the recorded nodes and weights."""
    nodes, weights = (np.array(spectrum[name]) for name in ("nodes", "weights"))
    sigma = spectrum["sigma"]
    grid = np.linspace(nodes.min() - 5 * sigma, nodes.max() + 5 * sigma, POINTS)
    away = (grid[:, None, None] - nodes[None]) / sigma
    each = (weights[None] * np.exp(-0.5 * away**2)).sum(-1) / (
        sigma * np.sqrt(2 * np.pi)
    )
    error = each.std(-1, ddof=1) / np.sqrt(each.shape[-1])
    arrays = (grid, each.mean(-1), nodes, weights, sigma, error)
    return Density(*(jnp.asarray(array, jnp.float32) for array in arrays))


def spectra_of(records: list[Record]) -> dict[str, dict[str, Any]]:
    """Gives the spectra by model; records made before there were any have none."""
    return {r["case"]["model"]: r["spectrum"] for r in records if "spectrum" in r}


def tables(records: list[Record]) -> list[Table]:
    """Writes the table of the spectra, if there are any."""
    spectra = spectra_of(records)
    if not spectra:
        return []
    rows = [
        (
            model,
            f"{found['loss']:.2g}",
            f"{found['values'][0]:.3g}",
            sum(found["outliers"]),
            f"{found['trace']:.2f} ± {found['trace_error']:.2f}",
            found["products"],
        )
        for model, found in spectra.items()
    ]
    header = ("model", "loss", "top eigenvalue", "outliers", "trace", "products")
    probes, order = np.shape(next(iter(spectra.values()))["nodes"])
    note = (
        "Hessian of the mean training loss after training, last seed. Outliers: of "
        f"the 12 largest eigenvalues, those converged and above twice the edge of the "
        f"bulk. Trace: ± standard error; {probes} probes of order {order}."
    )
    return [Table("", header, rows, note)]


def in_pairs(records: list[Record], kin: Mapping[str, str]) -> list[list[Record]]:
    """Groups the records that have spectra: each model with its kin.

    Args:
      records: of the demo.
      kin: a model's name to that of the one drawn with it; where a record is missing,
        all are drawn together.
    """
    found = {r["case"]["model"]: r for r in records if "spectrum" in r}
    if all(found.keys() >= {*pair} for pair in kin.items()):
        return [[found[name] for name in pair] for pair in kin.items()]
    return [list(found.values())] if found else []


def draw_rows(
    figure: Figure,
    cells: Sequence[Any],
    rows: list[list[Record]],
    colours: Mapping[str, str],
) -> None:
    """Draws groups of records below each other, over one axis of eigenvalues.

    Args:
      figure: of matplotlib.
      cells: of its grid, one for each row.
      rows: of :func:`in_pairs`.
      colours: by model.
    """
    axes = None
    for place, (cell, records) in enumerate(zip(cells, rows, strict=True)):
        axes = figure.add_subplot(cell, sharex=axes)
        draw(axes, records, colours)
        if place:
            axes.set_title("")
        if place < len(rows) - 1:
            axes.set_xlabel("")
            axes.tick_params(labelbottom=False)


def draw(axes: Any, records: list[Record], colours: Mapping[str, str]) -> None:
    """Draws the densities on logarithmic axes, outliers marked.

    Args:
      axes: of matplotlib.
      records: of the demo, with spectra.
      colours: by model.
    """
    highest = 0.0
    for place, (model, found) in enumerate(spectra_of(records).items()):
        colour = colours[model]
        outliers = np.array(found["values"])[np.array(found["outliers"])]
        density = density_of(found)
        plot_density(
            density, ax=axes, color=colour, outliers=np.empty(0), decades=DECADES
        )
        # Along the lower edge, a row for each model, on panels of any height.
        up = ScaledTranslation(0, (5 + 7 * place) / 72, axes.figure.dpi_scale_trans)
        axes.plot(
            outliers,
            np.zeros(outliers.shape),
            "^",
            color=colour,
            ms=6,
            mec="white",
            mew=0.6,
            transform=axes.get_xaxis_transform() + up,
        )
        highest = max(highest, float(density.density.max()))
        axes.annotate(
            model,
            (1, 1),
            (0, -2 - 14 * place),
            xycoords="axes fraction",
            textcoords="offset points",
            color=colour,
            ha="right",
            va="top",
        )
    axes.set_ylim(highest / 10**DECADES, 3 * highest)
    axes.set_ylabel("")
    axes.set_xlabel("eigenvalue (triangles: outliers)")
    axes.set_title("Density of the Hessian's eigenvalues")
