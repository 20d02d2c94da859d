"""The page of the documentation on curvature does what it shows."""

import pathlib
import runpy

ROOT = pathlib.Path(__file__).parents[2]
PAGES = runpy.run_path(str(ROOT / "tests" / "pages.py"))


def test_the_page_on_curvature_runs():
    names, _ = PAGES["run"](ROOT / "docs" / "curvature.md")
    assert names["outliers"].dtype == bool
