"""The commands from outside: every small preset, the report, the README."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from benchmarks import __main__ as cli
from benchmarks import environment, members, plots, readme, report, results
from benchmarks.tables import NOT_SHOWN

EVERY = [(kind, name) for kind in members.PLACES for name in members.names(kind)]
# Estimates need compilers of their own; test_estimates.py and tests/devices have them.
RUN = [(kind, name) for kind, name in EVERY if kind != "estimate"]
PNG = b"\x89PNG"


def command(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "benchmarks", *map(str, arguments)],
        cwd=environment.ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        **options,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("results")


@pytest.fixture(scope="module")
def ran(folder):
    """Runs every member's small preset, each in a process of its own as users do."""
    return {
        member: command(*member, "--preset", "small", "--directory", folder)
        for member in RUN
    }


@pytest.fixture(scope="module")
def full(ran, folder, tmp_path_factory):
    """The same records passed off as full ones, to see what a reader would see."""
    target = tmp_path_factory.mktemp("full")
    for path in folder.glob("*/*.jsonl"):
        records = results.load_results(path)
        results.save_results(target, [r | {"preset": "full"} for r in records])
    return target


@pytest.mark.parametrize("member", RUN, ids="-".join)
def test_small_preset_runs_and_gives_no_verdict(ran, folder, member):
    done = ran[member]
    assert done.returncode == 0, done.stderr
    assert "|" in done.stdout
    assert members.NO_VERDICT in done.stdout
    assert "1/" in done.stderr  # plain lines of progress: this is no terminal
    (path,) = folder.glob(f"*/{'_'.join(member)}.jsonl")
    assert done.stdout.rstrip().endswith(str(path))
    for record in results.load_results(path):
        assert record["preset"] == "small"
        assert record["command"].startswith("python -m benchmarks " + " ".join(member))
        assert len(record["data"]["digest"]) == 64
        assert record["samples"]
        json.dumps(record, allow_nan=False)


def test_speed_runs_on_one_core_and_waits_for_each_call(ran, folder):
    pinnable = hasattr(os, "sched_setaffinity")
    for name in members.names("speed"):
        (path,) = folder.glob(f"*/speed_{name}.jsonl")
        for record in results.load_results(path):
            assert record["device"]["pinned"] == pinnable
            assert record["flags"]["async_dispatch"] != pinnable


def test_report_without_files_says_not_shown(tmp_path):
    text = report.write(tmp_path).read_text()
    assert text.count(NOT_SHOWN) >= 2 * len(EVERY)
    assert "![" not in text


def test_report_gives_small_runs_no_verdict(ran, folder):
    text = report.write(folder).read_text()
    assert text.count(members.NO_VERDICT) == len(RUN)
    assert "*shown*" not in text


def test_report_shows_every_member_with_picture_and_provenance(full):
    text = report.write(full).read_text()
    for kind, name in RUN:
        verdict = members.member(kind, name).verdict(
            results.load_results(*full.glob(f"*/{kind}_{name}.jsonl"))
        )
        assert str(verdict) in text
        (picture,) = full.glob(f"*/{kind}_{name}.png")
        assert f"]({picture.relative_to(full).as_posix()})" in text
        assert picture.read_bytes().startswith(PNG)
    assert members.NO_VERDICT not in text
    assert "jaxlib" in text
    assert report.write(full).read_text() == text


def test_a_device_that_lacks_a_member_reads_not_shown(full, tmp_path):
    (path,) = full.glob("*/claim_monarch.jsonl")
    records = results.load_results(path)
    results.save_results(tmp_path, records)
    other = [r | {"device": r["device"] | {"name": "h200"}} for r in records]
    results.save_results(tmp_path, [r | {"name": "else"} for r in other])
    header, _, *rows = str(report.summary(tmp_path)).splitlines()
    assert "h200" in header
    (row,) = [row for row in rows if "claim monarch " in row]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[2] == NOT_SHOWN
    assert cells[1] in ("*shown*", "*not shown*", "*reversed*")


def test_report_refuses_devices_that_saw_other_data(full, tmp_path):
    (path,) = full.glob("*/claim_monarch.jsonl")
    records = results.load_results(path)
    results.save_results(tmp_path, records)
    for r in records:
        r["device"]["name"] = "h200"
        r["data"]["digest"] = "0" * 64
    results.save_results(tmp_path, records)
    with pytest.raises(ValueError, match="cannot be compared"):
        report.write(tmp_path)


@pytest.fixture(scope="module")
def demo_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    done = command("demo", "--preset", "small", "--directory", folder)
    assert done.returncode == 0, done.stderr
    assert (folder / "table.md").read_text().strip() in done.stdout
    return folder


def test_demo_writes_table_and_picture(demo_folder):
    content = json.loads((demo_folder / "table.json").read_text())
    models = [row["model"] for row in content["rows"]]
    assert models[:3] == ["dense", "Monarch", "narrower dense"]
    assert models[3:5] == ["dense + penalty", "Monarch + penalty"]
    count = {r["case"]["model"]: r["parameters"] for r in content["records"]}
    assert count["dense"] == 85_002
    assert 0.97 * count["Monarch"] <= count["narrower dense"] <= count["Monarch"]
    assert (demo_folder / "demo.png").read_bytes().startswith(PNG)
    spectra = {r["case"]["model"] for r in content["records"] if "spectrum" in r}
    assert spectra == {"dense", "Monarch", "dense + penalty", "Monarch + penalty"}
    assert "top eigenvalue" in (demo_folder / "table.md").read_text()


def test_demo_keeps_full_runs_only(capsys):
    assert cli.main(["demo", "--preset", "small", "--record"]) == 2
    assert "full runs only" in capsys.readouterr().err


def test_readme_is_renewed_and_checked(full, tmp_path):
    page = tmp_path / "README.md"
    page.write_text("before\n<!-- figures -->\nold\n<!-- /figures -->\nafter\n")
    run = lambda *more: cli.main(
        ["readme", "--readme", str(page), "--directory", str(full), *more]
    )
    assert run("--check") == 1
    assert "old" in page.read_text()
    assert run() == 0
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "claim monarch" in text
    assert run("--check") == 0


@pytest.mark.parametrize(
    "text", ["", "<!-- figures -->", "<!-- /figures --> <!-- figures -->"]
)
def test_readme_without_markers_is_refused(text, tmp_path, capsys):
    page = tmp_path / "README.md"
    page.write_text(text)
    assert readme.main(page, directory=tmp_path) == 2
    assert "<!-- figures -->" in capsys.readouterr().err
    assert page.read_text() == text


def test_figures_show_the_demo_where_it_was_kept(demo_folder, tmp_path):
    assert f"The demo's table: {NOT_SHOWN}" in readme.figures(tmp_path)
    content = json.loads((demo_folder / "table.json").read_text())
    results.save_results(tmp_path, content["records"])
    text = readme.figures(tmp_path)
    assert "The demo's table" not in text
    assert all(row["test accuracy %"] in text for row in content["rows"])
    assert "top eigenvalue" in text


def test_list_names_every_member(capsys):
    assert cli.main(["list"]) == 0
    shown = capsys.readouterr().out
    assert all(f"{kind} {name}\n" in shown for kind, name in EVERY)


def test_unknown_member_and_misplaced_small_run_are_refused(capsys):
    assert cli.main(["claim", "nonsense"]) == 2
    assert "must be one of" in capsys.readouterr().err
    misplaced = str(results.RESULTS)
    assert cli.main(["claim", "monarch", "--directory", misplaced]) == 2
    assert "full runs only" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name",
    ["", "list", "speed", "claim", "estimate", "train", "train-compare", "demo"],
)
def test_help_is_there(name, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([*name.split(), "--help"])
    assert stop.value.code == 0
    assert "--help" in capsys.readouterr().out


def test_importing_the_package_wakes_nothing_up():
    code = (
        "import sys, benchmarks.__main__; "
        "sys.exit(any(m in sys.modules for m in ('jax', 'numpy', 'flax')))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=environment.ROOT)
    assert done.returncode == 0


def test_equal_figures_give_equal_bytes(tmp_path):
    rows = {"a": {"x": [1.0, 2.0, 3.0], "y": [100.0]}}
    paths = [pathlib.Path(tmp_path, name) for name in ("1.png", "2.png")]
    for path in paths:
        plots.save(plots.dots(rows, xlabel="s"), path)
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_the_readme_of_this_repository_is_up_to_date():
    assert cli.main(["readme", "--check"]) == 0
