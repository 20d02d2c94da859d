"""The README and the files beside it say what is true."""

import pathlib
import re
import runpy
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PAGES = runpy.run_path(str(ROOT / "tests" / "pages.py"))


def test_every_python_block_of_the_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names, count = PAGES["run"](ROOT / "README.md")
    assert count == 4
    assert names["error"] > 0
    assert int(names["result"].state.step) == 5 * 11  # ceil(1297 / 128) steps an epoch
    assert (tmp_path / "out" / "run").exists()
    assert names["report"].eigenpairs.values[0] > 0


def test_relative_links_resolve():
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]:
        for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if "://" not in link:
                assert (page.parent / link).exists(), f"{page.name} links to {link}"


def test_constraints_are_exact_and_carry_no_address():
    lines = (ROOT / "constraints.txt").read_text().split("\n")
    for line in filter(None, lines):
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.+!]+", line), line


@pytest.mark.parametrize("command", [["jaxlab.catalog", "README.md", "--check"]])
def test_generated_parts_are_fresh(command):
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
