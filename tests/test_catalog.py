import collections
import dataclasses
import importlib
import pathlib
import re
import stat
import subprocess
import sys

import pytest

from jaxlab import catalog
from jaxlab.catalog import METHODS, Method, markdown_table

README = pathlib.Path(__file__).parents[1] / "README.md"
BUILT = [method for method in METHODS if method.state == "built"]
# How many methods each home has.
HOMES = {
    "condensation": 2,
    "continual": 6,
    "curvature": 2,
    "data_selection": 6,
    "generative": 4,
    "losses": 5,
    "nn": 8,
    "optimizers": 6,
    "parametrization": 3,
    "pruning": 11,
    "quantization": 2,
    "reasoning": 3,
    "scaling": 4,
    "search": 8,
    "sharpness": 5,
    "structured": 8,
    "theory": 12,
    "transfer": 8,
}


def test_numbers_are_1_to_103_in_order():
    assert [method.number for method in METHODS] == list(range(1, 104))


def test_homes():
    homes = collections.Counter(method.home for method in METHODS)
    assert homes == {f"jaxlab.{home}": count for home, count in HOMES.items()}


@pytest.mark.parametrize("method", METHODS, ids=lambda method: str(method.number))
def test_row_is_whole(method):
    assert method.title.strip() == method.title != ""
    assert method.what.strip() == method.what != ""
    assert method.state in ("built", "planned")
    built = method.state == "built"
    assert bool(method.names) == built
    assert (method.bibtex is not None) == built
    with pytest.raises(dataclasses.FrozenInstanceError):
        method.state = "built"


def test_titles_differ():
    assert len({method.title for method in METHODS}) == 103


def test_monarch_is_built():
    assert 21 in [method.number for method in BUILT]
    assert "monarch_matmul" in METHODS[20].names


@pytest.mark.parametrize("method", BUILT, ids=lambda method: str(method.number))
def test_built_names_are_public(method):
    home = importlib.import_module(method.home)
    for name in method.names:
        assert name in home.__all__
        assert getattr(home, name) is not None


@pytest.mark.parametrize("method", BUILT, ids=lambda method: str(method.number))
def test_citation_is_one_entry_with_its_title(method):
    assert re.match(r"@\w+\{[\w-]+,\n", method.bibtex)
    assert method.bibtex.count("@") == 1
    assert method.bibtex.count("{") == method.bibtex.count("}")
    for field in ("title", "author", "year"):
        assert re.search(rf"^  {field} = \{{.+\}},$", method.bibtex, re.M)
    assert method.title in method.bibtex


def test_every_citation_is_used():
    entries = pathlib.Path(catalog.__file__).with_name("catalog.bib").read_text()
    assert entries.count("\n@") + entries.startswith("@") == len(BUILT)


def test_table_of_two_rows():
    rows = [
        Method(1, "A | B", "a", "jaxlab.nn", "planned"),
        Method(2, "C", "c", "jaxlab.nn", "built", ("c",), "@misc{c,\n}"),
    ]
    assert markdown_table(methods=rows).splitlines() == [
        "| # | Paper | What it is here | Home | State |",
        "|--:|---|---|---|---|",
        "| 1 | A \\| B | a | `jaxlab.nn` | planned |",
        "| 2 | C | c | `jaxlab.nn` | **built** |",
    ]


def test_table_of_all_rows():
    lines = markdown_table().splitlines()
    assert len(lines) == 105
    assert all(len(re.findall(r"(?<!\\)\|", line)) == 6 for line in lines)


def test_readme_has_the_table():
    text = README.read_text(encoding="utf-8")
    between = re.search(f"{catalog.START}\n(.*?)\n{catalog.END}", text, re.S)
    assert between is not None, "README.md lacks the markers of the table"
    assert between[1] == markdown_table(), "run python -m jaxlab.catalog README.md"


def test_command_writes_then_agrees(tmp_path, capsys):
    file = tmp_path / "page.md"
    file.write_text(f"# é\n\n{catalog.START}\nold\n{catalog.END}\nend\n", "utf-8")
    file.chmod(0o640)
    before = file.read_bytes()
    assert catalog.main([str(file), "--check"]) == 1
    assert "stale" in capsys.readouterr().err
    assert file.read_bytes() == before
    assert catalog.main([str(file)]) == 0
    table = markdown_table()
    assert (
        file.read_text("utf-8")
        == f"# é\n\n{catalog.START}\n{table}\n{catalog.END}\nend\n"
    )
    assert stat.S_IMODE(file.stat().st_mode) == 0o640
    assert catalog.main([str(file), "--check"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["page.md"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        catalog.START,
        f"{catalog.END}\n{catalog.START}",
        f"{catalog.START}\n{catalog.START}\n{catalog.END}",
    ],
)
def test_command_refuses_a_file_without_its_markers(tmp_path, capsys, text):
    file = tmp_path / "page.md"
    file.write_text(text)
    assert catalog.main([str(file)]) == 2
    assert "needs one <!-- methods -->" in capsys.readouterr().err
    assert file.read_text() == text


def test_command_names_a_missing_file(tmp_path, capsys):
    assert catalog.main([str(tmp_path / "none.md")]) == 2
    assert "none.md" in capsys.readouterr().err


def test_needs_the_standard_library_alone():
    code = (
        "import sys; before = set(sys.modules); import jaxlab.catalog; "
        "new = {m.split('.')[0] for m in set(sys.modules) - before}; "
        "print(sorted(new - sys.stdlib_module_names))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "['jaxlab']"
