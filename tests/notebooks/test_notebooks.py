"""Every notebook runs in its small setting, and is in step with its pair."""

import pathlib
import runpy
import warnings

import jupytext
import pytest

FOLDER = pathlib.Path(__file__).parents[2] / "notebooks"
SCRIPTS = sorted(FOLDER.glob("*.py"))
scripts = pytest.mark.parametrize("script", SCRIPTS, ids=[p.stem for p in SCRIPTS])


def test_there_are_notebooks():
    assert SCRIPTS
    assert {p.stem for p in SCRIPTS} == {p.stem for p in FOLDER.glob("*.ipynb")}


@scripts
def test_script_runs(script, monkeypatch):
    monkeypatch.setenv("JAXLAB_SMALL", "1")
    names = runpy.run_path(str(script))
    assert names["SMALL"] is True


@scripts
def test_pair_is_in_step_and_executed(script):
    with warnings.catch_warnings():
        # nbformat's own deprecations are not this notebook's.
        warnings.simplefilter("ignore")
        text, notebook = (
            jupytext.read(script),
            jupytext.read(script.with_suffix(".ipynb")),
        )
    cells = lambda pages: [(c.cell_type, c.source) for c in pages.cells]
    assert cells(text) == cells(notebook), "run: make notebooks"
    code = [c for c in notebook.cells if c.cell_type == "code"]
    assert all(c.execution_count for c in code), "run: make notebooks"
    errors = [o for c in code for o in c.outputs if o.output_type == "error"]
    assert not errors
    pictures = [o for c in code for o in c.outputs if "image/png" in o.get("data", {})]
    assert pictures
