"""Result files: round trip, all or nothing, and what must not be compared."""

import os

import numpy as np
import pytest

from benchmarks import environment, results

HEAD = {"device": {"name": "cpu-test"}, "versions": {}, "flags": {}}


def record(*, digest="d0", name="digits", kind="speed", device="cpu-test", **own):
    fields = {
        "case": {"n": 4},
        "data": {"name": name, "digest": digest},
        "dtype": "float32",
        "shapes": {"x": [4, 4]},
        "seed": 0,
        "samples": {"a": [0.1, 1 / 3]},
    }
    return results.complete(
        fields | own,
        kind=kind,
        name="thing",
        preset="full",
        command="python -m benchmarks",
        environment=HEAD | {"device": {"name": device}},
    )


def test_round_trip_keeps_every_digit(tmp_path):
    records = [record(), record(case={"n": 8}, samples={"a": [1e-300, 2.0 / 7]})]
    path = results.save_results(tmp_path, records)
    assert path == tmp_path / "cpu-test" / "speed_thing.jsonl"
    assert results.load_results(path) == records
    assert len(path.read_text().splitlines()) == 2
    assert results.devices_with_results(tmp_path) == ["cpu-test"]


def test_a_new_run_takes_the_place_of_the_old(tmp_path):
    results.save_results(tmp_path, [record(), record()])
    path = results.save_results(tmp_path, [record(seed=7)])
    assert [r["seed"] for r in results.load_results(path)] == [7]


def test_a_failing_write_leaves_the_old_file_and_no_debris(tmp_path, monkeypatch):
    path = results.save_results(tmp_path, [record()])
    before = path.read_bytes()

    def full_disk(descriptor):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="no space"):
        results.save_results(tmp_path, [record(seed=7)])
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def test_numbers_that_json_lacks_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="JSON compliant"):
        results.save_results(tmp_path, [record(samples={"a": [float("nan")]})])
    assert list(tmp_path.iterdir()) == []


def test_two_members_do_not_share_a_file(tmp_path):
    with pytest.raises(ValueError, match="one run of one member"):
        results.save_results(tmp_path, [record(), record(kind="claim")])


def test_other_contents_under_the_same_name_are_refused(tmp_path):
    here = results.save_results(tmp_path, [record()])
    there = results.save_results(tmp_path, [record(device="h200", digest="d1")])
    with pytest.raises(
        ValueError, match=r"'digits' cannot be compared.*d0.*d1"
    ) as info:
        results.load_results(here, there)
    assert "h200" in str(info.value)
    assert len(results.load_results(here)) == 1


def test_other_data_may_stand_beside(tmp_path):
    path = results.save_results(tmp_path, [record(), record(name="curves", digest="x")])
    assert len(results.load_results(path)) == 2


def test_a_damaged_line_is_named(tmp_path):
    path = results.save_results(tmp_path, [record(), record()])
    path.write_text(path.read_text()[:-20])
    with pytest.raises(ValueError, match=r"speed_thing\.jsonl, line 2"):
        results.load_results(path)


def test_missing_fields_are_named():
    with pytest.raises(ValueError, match=r"missing: .*'data'"):
        results.complete(
            {"case": {}},
            kind="speed",
            name="thing",
            preset="full",
            command="",
            environment=HEAD,
        )


def test_small_runs_stay_away_from_the_measurements(tmp_path):
    assert results.directory_for("full") == results.RESULTS
    assert results.directory_for("small") == results.SMALL
    assert results.directory_for("small", tmp_path) == tmp_path
    for inside in (results.RESULTS, results.RESULTS / "cpu-test"):
        with pytest.raises(ValueError, match="full runs only"):
            results.directory_for("small", inside)


def test_digest_tells_type_shape_and_contents_apart():
    x = np.arange(4, dtype=np.float32)
    others = [x.astype(np.float64), x.reshape(2, 2), x[::-1]]
    digests = {results.digest(array) for array in (x, *others)}
    assert len(digests) == 4
    assert results.digest(x[::-1]) == results.digest(x[::-1].copy())


def test_environment_names_what_a_figure_depends_on():
    found = environment.describe()
    assert found["device"]["platform"] == "cpu"
    assert found["device"]["name"].startswith("cpu-")
    assert found["device"]["count"] == 8
    assert set(environment.PACKAGES) <= set(found["versions"])
    assert {"XLA_FLAGS", "matmul_precision", "x64", "async_dispatch"} == set(
        found["flags"]
    )


def test_pinning_comes_before_jax():
    with pytest.raises(RuntimeError, match="before JAX is imported"):
        environment.pin_to_one_core()
