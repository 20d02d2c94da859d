"""Eight devices, or two processes of four, find the spectrum that one device finds."""

import pathlib
import runpy

import jax
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

ROOT = pathlib.Path(__file__).parents[2]
WORKER = ROOT / "tests" / "curvature" / "workers" / "spectrum.py"
PROCESSES = runpy.run_path(str(ROOT / "tests" / "processes.py"))
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
    file = tmp_path / "found.npz"
    PROCESSES["run_two"](WORKER, file)
    with np.load(file) as found:
        close(found, one_device)
