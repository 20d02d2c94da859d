"""Eight devices, or two processes of four, train what one device trains."""

import pathlib
import runpy

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlab.training import Checkpoints, evaluate, fit

ROOT = pathlib.Path(__file__).parents[2]
WORKERS = ROOT / "tests" / "training" / "workers"
PROCESSES = runpy.run_path(str(ROOT / "tests" / "processes.py"))
PROBLEM = runpy.run_path(str(WORKERS / "problem.py"))
BATCH = PROBLEM["BATCH"]


def _fit(epochs=3, mesh=None, place=None, **options):
    objective, optimizer, state, data = PROBLEM["make"]()
    if mesh is not None:
        options["data_sharding"] = NamedSharding(mesh, P("d"))
    if place is not None:
        state = place(state, mesh)
    return fit(
        objective,
        optimizer,
        state,
        data,
        epochs=epochs,
        batch_size=BATCH,
        validation=data,
        progress=False,
        **options,
    )


@pytest.fixture(scope="module")
def one_device():
    return _fit()


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))


def _close(found, expected):
    for name, value in PROBLEM["leaves"](expected).items():
        # 27 steps of AdamW: the sums run in another order.
        np.testing.assert_allclose(
            PROBLEM["leaves"](found)[name], value, rtol=1e-5, atol=3e-6, err_msg=name
        )


@pytest.mark.parametrize("place", [None, PROBLEM["sharded"]])
@pytest.mark.parametrize("steps_per_call", [1, None])
def test_eight_devices_equal_one(one_device, mesh, place, steps_per_call):
    result = _fit(mesh=mesh, place=place, steps_per_call=steps_per_call)
    _close(result.state, one_device.state)
    np.testing.assert_allclose(
        result.history["loss"], one_device.history["loss"], rtol=1e-5
    )
    for name, mean in one_device.epochs[-1].items():
        if name.startswith("validation"):
            np.testing.assert_allclose(result.epochs[-1][name], mean, rtol=1e-5)
    # The state stays where it was put, cut or copied.
    cut = result.state.params["w2"].sharding.spec
    assert cut == (P("d") if place else P())
    assert len(result.state.key.sharding.device_set) == 8


def test_goes_on_with_fewer_devices(one_device, mesh, tmp_path):
    options = {"checkpoint_dir": tmp_path}
    _fit(epochs=1, mesh=mesh, place=PROBLEM["sharded"], **options)
    _fit(epochs=2, **options)
    result = _fit(epochs=3, mesh=mesh, **options)
    assert len(result.epochs) == 1
    _close(result.state, one_device.state)


def test_a_function_feeds_a_mesh(one_device, mesh):
    objective, optimizer, state, data = PROBLEM["make"]()
    result = fit(
        objective,
        optimizer,
        state,
        lambda epoch, step: tuple(leaf[:BATCH] for leaf in data),
        epochs=1,
        steps_per_epoch=2,
        data_sharding=NamedSharding(mesh, P("d")),
        progress=False,
    )
    assert int(result.state.step) == 2
    assert np.isfinite(result.history["loss"]).all()


def test_two_processes_equal_one_device(one_device, tmp_path):
    PROCESSES["run_two"](WORKERS / "distributed.py", tmp_path)
    with np.load(tmp_path / "final.npz") as found:
        for name, value in one_device.state.params.items():
            np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=3e-6)
        loss = one_device.epochs[-1]["validation_loss"]
        np.testing.assert_allclose(found["loss"], loss, rtol=1e-5)
        assert found["step"] == one_device.state.step
    # What two processes saved, one device reads.
    objective, _, state, data = PROBLEM["make"]()
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        restored = checkpoints.restore(state, must_exist=True)
    assert restored.rejected == ()
    _close(restored.state, one_device.state)
    means = evaluate(objective, restored.state.params, (), data)
    np.testing.assert_allclose(means["loss"], loss, rtol=1e-5)
