"""Eight devices, or two processes of four, find the spectrum that one device finds."""

import os
import pathlib
import runpy
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

ROOT = pathlib.Path(__file__).parents[2]
WORKER = ROOT / "tests" / "curvature" / "workers" / "spectrum.py"
PROBLEM = runpy.run_path(str(WORKER))


@pytest.fixture(scope="module")
def one_device():
    return PROBLEM["spectrum"](*PROBLEM["make"]())


def close(found, expected):
    for name, value in expected.items():
        scale = np.abs(value).max()
        np.testing.assert_allclose(
            found[name] / scale, value / scale, atol=1e-5, err_msg=name
        )


@pytest.mark.parametrize("where", ["data", "params", "both"])
def test_eight_devices_equal_one(one_device, where):
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    params, batch = PROBLEM["make"]()
    if where != "data":
        params = PROBLEM["sharded"](params, mesh, P("d"))
    if where != "params":
        batch = PROBLEM["sharded"](batch, mesh, P("d"))
    close(PROBLEM["spectrum"](params, batch), one_device)


def test_two_processes_equal_one_device(one_device, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
    }
    file = tmp_path / "found.npz"
    command = [sys.executable, "-W", "error", WORKER, file, str(port), "2"]
    processes = [
        subprocess.Popen(
            [*command, str(index)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )
        for index in range(2)
    ]
    try:
        said = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], said
    with np.load(file) as found:
        close(found, one_device)
