"""The page of the documentation on curvature does what it shows."""

import pathlib
import re

ROOT = pathlib.Path(__file__).parents[2]


def test_the_page_on_curvature_runs():
    page = (ROOT / "docs" / "curvature.md").read_text()
    code = "\n".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL))
    names = {}
    exec(compile(code, "curvature.md", "exec"), names)
    assert names["outliers"].dtype == bool
