"""The spectra in the demo: recorded, rebuilt, drawn; old records have none."""

import dataclasses
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from matplotlib.figure import Figure

from benchmarks import demo, demo_spectrum, results
from jaxlab.curvature import spectrum_report
from jaxlab.likelihoods import Gaussian
from jaxlab.models import mlp_s
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


@pytest.fixture(scope="module")
def kept():
    """Records without spectra and without a penalty, as in the first releases."""
    (path, *_) = results.RESULTS.glob("*/demo_digits.jsonl")
    names = demo.PENALISED.values()
    return [
        {name: value for name, value in record.items() if name != "spectrum"}
        for record in results.load_results(path)
        if record["case"]["model"] not in names
    ]


def with_penalty(records):
    """Adds the penalised rows to records of a run without them."""
    options = {"alpha": 0.8, "radius": 0.2}
    new = [record | {"options": record["options"] | options} for record in records]
    plain = {record["case"]["model"]: record for record in new}
    more = [
        plain[old] | {"case": {"model": name}} for old, name in demo.PENALISED.items()
    ]
    return new + more


def test_records_from_before_there_were_spectra_are_read(found, kept):
    assert len(demo.tables(kept)) == 1
    assert len(demo.draw(kept).axes) == 2
    new = [record | {"spectrum": found} for record in kept[:1]] + kept[1:]
    assert [len(t.rows) for t in demo.tables(new)] == [len(kept), 1]
    assert len(demo.draw(new).axes) == 3


def test_records_from_before_there_was_a_penalty_are_read(kept):
    assert "Penalty" not in demo.tables(kept)[0].note
    note = demo.tables(with_penalty(kept))[0].note
    assert "0.16 times the norm of the gradient (alpha 0.8, radius 0.2" in note


def test_a_penalised_spectrum_stands_with_that_of_its_plain_network(found, kept):
    both = ("dense", "Monarch")
    plain = [
        record | ({"spectrum": found} if record["case"]["model"] in both else {})
        for record in kept
    ]
    assert len(demo.draw(plain).axes) == 3
    records = with_penalty(plain)
    assert [len(t.rows) for t in demo.tables(records)] == [len(records), 4]
    *_, upper, lower = demo.draw(records).axes
    assert [t.get_text() for t in upper.texts] == ["dense", "dense + penalty"]
    assert [t.get_text() for t in lower.texts] == ["Monarch", "Monarch + penalty"]
    assert upper.get_xlim() == lower.get_xlim()
    assert upper.get_title(loc="left")
    assert not lower.get_title(loc="left")


def test_the_penalised_step_is_that_of_the_penalty():
    options = dataclasses.replace(demo.PRESETS["small"], alpha=1.0, radius=3.0)
    model = lambda: mlp_s(rngs=nnx.Rngs(0))
    plain = demo.Run(model(), 0, 1, options)
    penalised = demo.Run(model(), 0, 1, options, penalised=True)
    grads = jax.tree.map(jnp.ones_like, plain.params)
    seen = []

    def grad_fn(at):
        seen.append(at)
        return jax.tree.map(lambda g: -g, grads)

    step = lambda run, **extra: run.optimizer.update(
        grads, run.optimizer.init(run.params), run.params, **extra
    )[0]
    # Alpha is 1, so the step is against the second gradient, taken 3 away.
    first, second = step(plain), step(penalised, grad_fn=grad_fn, grad=grads)
    chex.assert_trees_all_close(first, jax.tree.map(jnp.negative, second))
    away = jax.tree.map(jnp.subtract, seen[0], plain.params)
    assert float(optax.tree.norm(away)) == pytest.approx(3, rel=1e-4)
