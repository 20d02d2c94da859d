"""The spectra in the demo: recorded, rebuilt, drawn; old records have none."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure

from benchmarks import demo, demo_spectrum, results
from jaxlab.curvature import spectrum_report
from jaxlab.likelihoods import Gaussian
from jaxlab.objective import Objective, plain

SCALES = jnp.array([[6.0, 1.0, 1.0, 1.0, 1.0, 0.0]] * 2).ravel()


@pytest.fixture(scope="module")
def linear():
    """A linear model, whose Hessian is diagonal and known."""
    objective = Objective(plain(lambda w, x: x @ w), Gaussian())
    rows = jnp.diag(jnp.sqrt(12.0 * SCALES)), jnp.ones((12, 1))
    return objective, jnp.ones((12, 1)), rows


@pytest.fixture(scope="module")
def found(linear):
    objective, params, rows = linear
    return demo_spectrum.measure(objective, params, (), rows, order=3)


def test_spectrum_of_a_known_hessian(found):
    np.testing.assert_allclose(found["values"], sorted(SCALES)[::-1], atol=1e-4)
    assert found["trace"] == pytest.approx(20.0, abs=1e-3)
    assert len(found["outliers"]) == len(found["residuals"]) == 12
    np.testing.assert_allclose(np.sum(found["weights"], axis=1), 1, rtol=1e-5)


def test_density_is_rebuilt_from_the_record(linear, found):
    objective, params, rows = linear
    stored = json.loads(json.dumps(found, allow_nan=False))
    ours = demo_spectrum.density_of(stored)
    theirs = spectrum_report(
        jax.random.key(0),
        objective,
        params,
        rows,
        k=12,
        order=3,
        num_probes=2,
        damping=None,
    ).density
    for name in ("density", "standard_error"):
        at_ours = np.interp(ours.grid, theirs.grid, getattr(theirs, name))
        np.testing.assert_allclose(getattr(ours, name), at_ours, atol=2e-4)
    assert jnp.trapezoid(ours.density, ours.grid) == pytest.approx(1, abs=1e-4)


def test_outliers_are_marked_where_they_are(found):
    record = {"case": {"model": "dense"}, "spectrum": found | {"outliers": [True] * 12}}
    axes = Figure().subplots()
    demo_spectrum.draw(axes, [record], {"dense": "C0"})
    marks = [line for line in axes.lines if line.get_marker() == "^"]
    assert any(np.array_equal(m.get_xdata(), found["values"]) for m in marks)
    (table,) = demo_spectrum.tables([record])
    assert table.rows[0][:4] == ("dense", "7.7", "6", 12)


def test_records_from_before_there_were_spectra_are_read(found):
    (path, *_) = results.RESULTS.glob("*/demo_digits.jsonl")
    old = [
        {name: value for name, value in record.items() if name != "spectrum"}
        for record in results.load_results(path)
    ]
    assert len(demo.tables(old)) == 1
    assert len(demo.draw(old).axes) == 2
    new = [record | {"spectrum": found} for record in old[:1]] + old[1:]
    assert [len(t.rows) for t in demo.tables(new)] == [len(old), 1]
    assert len(demo.draw(new).axes) == 3
