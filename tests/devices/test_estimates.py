"""Estimates with the real compilers: what is read from them, the small preset."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from benchmarks import devices, environment, members, report, results
from benchmarks.estimates import monarch

SQUARE = jax.ShapeDtypeStruct((512, 512), jnp.bfloat16)
FLOPS = 2 * 512**3


def test_a_product_on_a_tpu(tpu):
    found = devices.figures(tpu, jnp.matmul, SQUARE, SQUARE)
    assert found["flops"] == pytest.approx(FLOPS, rel=0.01)
    assert found["total_bytes"] - found["temporary_bytes"] == 3 * 512 * 512 * 2
    assert found["bytes"] >= 3 * 512 * 512 * 2
    assert 0 < found["optimal_seconds"] < 1e-3
    assert found["cycles"] > 0


def test_a_product_on_a_gpu(gpu):
    large = jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16)  # no sum of parts
    found = devices.figures(gpu, jnp.matmul, large, large)
    assert found["flops"] == pytest.approx(2 * 4096**3, rel=0.01)
    assert (found["gemms"], found["passes"], found["passes_bytes"]) == (1, 0, 0)
    assert "optimal_seconds" not in found
    shuffled = lambda x: (x.T.reshape(8, 64, 512) + 1).transpose(1, 2, 0)
    found = devices.figures(gpu, shuffled, SQUARE)
    assert found["gemms"] == 0
    assert found["passes"] >= 1
    assert found["passes_bytes"] >= 512 * 512 * 2


def test_the_gpu_is_the_one_described(gpu):
    (device,) = gpu.sharding.device_set
    assert device.device_kind == "NVIDIA H200"


@pytest.mark.parametrize("place", ["tpu", "gpu"])
def test_compiling_twice_passes_by_the_persistent_cache(place, request, tmp_path):
    target = request.getfixturevalue(place)
    name = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, name)
    jax.config.update(name, 0.0)
    try:
        for _ in range(2):  # a program read back from the cache would warn
            jax.clear_caches()
            target.compile(lambda x: jnp.sin(x) @ x, SQUARE)
        assert getattr(jax.config, name) == 0.0
    finally:
        jax.config.update(name, before)


@pytest.fixture(scope="module")
def ran(tpu, gpu, tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    arguments = ("estimate", "monarch", "--preset", "small", "--directory", folder)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "benchmarks", *map(str, arguments)],
        cwd=environment.ROOT,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    return folder, done


def test_the_small_preset_runs_and_gives_no_verdict(ran):
    folder, done = ran
    assert done.stdout.count(members.NO_VERDICT) == len(devices.TARGETS)
    assert done.stdout.count("not a measurement") == 3  # tables
    for target in devices.TARGETS.values():
        head = target.head()
        path = results.path_of(folder, head["name"], "estimate", "monarch")
        assert f"Records: {path}" in done.stdout
        records = results.load_results(path)
        assert [r["case"]["mode"] for r in records] == [monarch.FORWARD, monarch.BOTH]
        for record in records:
            assert record["device"] == head
            assert record["samples"] == {}
            assert all(record["versions"][package] for package in target.packages)
            assert list(record["compiler"]) == list(monarch.BASELINES)
            for name, found in record["compiler"].items():
                times = monarch.LAYERS if "chain" in name else 1
                least = 2 * 256**3 * times * (1 if "dense" in name else 0.5)
                least *= 3 if record["case"]["mode"] == monarch.BOTH else 1
                assert found["flops"] == pytest.approx(least, rel=0.05), name


def test_its_records_make_a_report(ran, tmp_path):
    folder, _ = ran
    for path in folder.glob("*/*.jsonl"):
        records = results.load_results(path)
        figure = monarch.draw(records)
        assert figure.axes
        full = [r | {"preset": "full"} for r in records]
        assert "no size of these records" in monarch.verdict(full).why or not (
            monarch.timed(full)
        )
    assert report.provenance(records[0]).count("not run") == 1
