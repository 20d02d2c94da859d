"""The documentation: names are covered, links lead somewhere, pages run.

Needs no sphinx, which only the extra ``docs`` brings; ``make docs`` builds the site.
"""

import pathlib
import re
import runpy

import matplotlib.pyplot as plt
import pytest

# The pages are run as users run them.
pytestmark = pytest.mark.untyped

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / "docs"
SITE = runpy.run_path(str(DOCS / "site_parts.py"))
PAGES = runpy.run_path(str(ROOT / "tests" / "pages.py"))
MADE = ("_build", "api", "notebooks", "results")  # by the build, below docs/


def written():
    """Gives the pages that are written by hand, by path relative to ``docs/``."""
    paths = (page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md"))
    return sorted(path for path in paths if path.split("/")[0] not in MADE)


def unfenced(text):
    return re.sub(r"`[^`\n]*`", "", SITE["FENCE"].sub("", text))


def test_every_public_name_is_in_the_reference():
    assert SITE["coverage"]() == []


def test_coverage_names_what_is_missing(monkeypatch):
    names = SITE["coverage"].__globals__
    monkeypatch.setitem(names, "public_names", lambda module: {"load", "unheard_of"})
    monkeypatch.setitem(names, "MODULES", ("datasets",))
    problems = SITE["coverage"]()
    assert "reference/datasets.md lacks unheard_of" in problems
    assert "reference/datasets.md has names, not public" in problems
    assert "jaxlab.curvature has no page" in problems
    assert not any("load" in p.split() for p in problems)


@pytest.mark.parametrize("page", [*written(), "../README.md", "../CONTRIBUTING.md"])
def test_links_and_anchors_of_a_page_resolve(page):
    here = DOCS / page
    for link in re.findall(r"\]\(([^)\s]+)\)", unfenced(here.read_text())):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        there = (here.parent / path).resolve() if path else here
        assert there.exists(), f"{page} links to {link}"
        if anchor:
            assert anchor in SITE["anchors"](there.read_text()), f"{page}: {link}"


def test_links_to_files_of_the_repository_lead_to_pages_of_the_site():
    made = {f"results/{name}.md" for name in SITE["results_pages"]()}
    made |= {f"notebooks/{n.name}" for n in (ROOT / "notebooks").glob("*.ipynb")}
    for page in written():
        text = SITE["rewritten"]((DOCS / page).read_text(), page)
        for link in re.findall(r"\]\(([^)\s]+)\)", unfenced(text)):
            if "://" in link or link.startswith("#"):
                continue
            there = (DOCS / page).parent.joinpath(link.split("#")[0]).resolve()
            path = there.relative_to(DOCS).as_posix()
            assert path in made or path in written(), f"{page} links to {link}"


def test_every_page_is_in_one_list_of_contents():
    listed = []
    for page in written():
        for block in re.findall(
            r"```\{toctree\}\n(.*?)```", (DOCS / page).read_text(), re.S
        ):
            for entry in re.findall(r"^[\w./*-]+$", block, re.M):
                found = (DOCS / page).parent.glob(f"{entry}.md")
                paths = [p.resolve().relative_to(DOCS).as_posix() for p in found]
                assert paths or "*" in entry or entry.split("/")[0] in MADE, entry
                listed += [path for path in paths if path.split("/")[0] not in MADE]
    assert sorted([*listed, "index.md"]) == written()


def test_results_become_pages():
    pages = SITE["results_pages"]()
    report = (ROOT / "benchmarks" / "results" / "README.md").read_text()
    sections = re.findall(r"^## (\w+) (\w+)$", report, re.M)
    assert {f"{kind}_{name}" for kind, name in sections} | {"index", "demo"} == set(
        pages
    )
    for kind, name in sections:
        page = pages[f"{kind}_{name}"]
        assert f"({kind}_{name}.md)" in pages["index"]
        for picture in re.findall(r"!\[[^]]*\]\(([^)]+)\)", page):
            assert (ROOT / "benchmarks" / "results" / picture).exists()
    # No verdict is lost, and none is made up.
    for verdict in ("shown", "not shown", "reversed"):
        found = re.findall(rf"^\*{verdict}\*:", report, re.M)
        assert pages["index"].count(f"*{verdict}* on ") == len(found)
    figures = re.findall(r"^\|.*\|$", pages["demo"], re.M)
    readme = (ROOT / "README.md").read_text()
    assert len(figures) > 10
    assert all(row in readme for row in figures)


@pytest.mark.parametrize(
    ("link", "page", "there"),
    [
        ("../notebooks/01_monarch.ipynb", "monarch.md", "notebooks/01_monarch.ipynb"),
        ("../../CHANGELOG.md#010", "start/install.md", "../changelog.md#010"),
        (
            "../benchmarks/results/README.md#claim-fishleg_curves",
            "optimizers.md",
            "results/claim_fishleg_curves.md",
        ),
        ("monarch.md#which-product", "layers.md", "monarch.md#which-product"),
        ("https://a.b/c.md", "layers.md", "https://a.b/c.md"),
    ],
)
def test_links_are_rewritten(link, page, there):
    assert SITE["page_of"](link, page) == there
    fenced = f"[a]({link})\n\n```\n[a]({link})\n```\n"
    assert SITE["rewritten"](fenced, page) == fenced.replace(link, there, 1)


def test_anchors_are_those_of_headings():
    text = "# A `b` (c), d\n\n```\n# no\n```\n\n## Twice\n\n## Twice\n"
    assert SITE["anchors"](text) == {"a-b-c-d", "twice", "twice-1"}


# Pages whose blocks other tests run.
ELSEWHERE = {
    "curvature.md",
    "monarch.md",
    "optimizers.md",
    "recipes.md",
    "scale.md",
    "sharpness.md",
    "training.md",
}
RUN = [
    page
    for page in written()
    if "```python" in (DOCS / page).read_text() and page not in ELSEWHERE
]


@pytest.mark.parametrize("page", RUN)
def test_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names, count = PAGES["run"](DOCS / page)
    plt.close("all")
    assert count > 0
    losses = {name: loss for name, loss in names.items() if name.startswith("loss_")}
    if page == "start/own_loop.md":
        made = ("loss_dict", "loss_nnx", "loss_linen", "loss_both")
        assert all(losses[name] < 0.3 for name in made), losses
        assert int(names["resumed"]["step"]) == 20
        assert (tmp_path / "spectrum_nnx.png").stat().st_size > 0
    if page == "start/first_hour.md":
        assert names["repaired"]["accuracy"] > 0.7
        assert int(names["resumed"].state.step) == 8 * 11  # of which 33 in this call
        assert (tmp_path / "density.png").stat().st_size > 0
    if page == "index.md":
        start = names["loss_fn"](names["params"], (names["x"], names["y"]))
        end = names["loss_fn"](names["trained"], (names["x"], names["y"]))
        assert end < 0.3 * start
        assert names["estimate"] > 0
