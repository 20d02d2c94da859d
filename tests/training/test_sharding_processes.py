"""Two processes of four devices train a cut state as one device does, killed or not."""

import contextlib
import os
import pathlib
import runpy
import signal
import socket
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[2]
WORKER = ROOT / "tests" / "training" / "workers" / "composed.py"
COMPOSED = runpy.run_path(str(WORKER))
FAST, COMPOSITION = "gentle adamw", "gentle gnp + fishleg"
# Eight devices that wait for each other in turn on two cores take minutes.
pytestmark = pytest.mark.soak
EPOCHS = list(range(1, COMPOSED["EPOCHS"] + 1))
LIMIT = 900  # seconds until a process that hangs is killed


@contextlib.contextmanager
def _two(folder, name, slow=0.0):
    """Starts two processes; whatever happens, none is left."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = os.environ.get("XLA_FLAGS", "").replace("count=8", "count=4")
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": flags,
        # As in test_sharding.py: what is read back from the cache may wait for ever.
        "JAX_ENABLE_COMPILATION_CACHE": "false",
        "NAME": name,
        "SLOW": str(slow),
    }
    command = [sys.executable, "-W", "error", str(WORKER), str(folder), str(port), "2"]
    errors = [(folder / f"{index}.stderr").open("w+") for index in range(2)]
    processes = [
        subprocess.Popen(
            [*command, str(index)],
            stdout=subprocess.PIPE,
            stderr=error,
            text=True,
            env=environment,
        )
        for index, error in enumerate(errors)
    ]
    watch = threading.Timer(LIMIT, lambda: [p.kill() for p in processes])
    watch.start()
    try:
        yield processes
    finally:
        watch.cancel()
        for process, error in zip(processes, errors, strict=True):
            process.kill()
            process.wait()
            process.stdout.close()
            error.close()


def _epochs(text):
    return [int(n) for word, n in map(str.split, text.splitlines()) if word == "epoch"]


def _run(folder, name):
    """Runs both to their end; gives the epochs that they went through."""
    folder.mkdir(exist_ok=True)
    with _two(folder, name) as processes:
        said = [process.communicate()[0] for process in processes]
    codes = [process.returncode for process in processes]
    assert codes == [0, 0], (folder / "0.stderr").read_text()[-3000:]
    lines = ["\n".join(x for x in s.splitlines() if "epoch" in x) for s in said]
    assert lines[0] == lines[1]
    return _epochs(lines[0])


def _final(folder):
    with np.load(folder / "final.npz") as found:
        return dict(found)


def _away(found, state):
    """Gives the distance of the params, of their size."""
    away = size = 0.0
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        name = jax.tree_util.keystr(path)
        if name.startswith(".params"):
            away += float(
                np.sum(np.square(found[name] - np.asarray(leaf), dtype=float))
            )
            size += float(np.sum(np.square(leaf, dtype=float)))
    assert size > 0
    return (away / size) ** 0.5


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs undisturbed, each optimizer once."""
    known = {}

    def run(name):
        if name not in known:
            known[name] = tmp_path_factory.mktemp("undisturbed")
            assert _run(known[name], name) == EPOCHS
        return _final(known[name])

    return run


@pytest.mark.parametrize("name", [FAST, COMPOSITION])
def test_two_processes_end_where_one_device_does(runs, name):
    state = COMPOSED["train"](name=name).state
    assert _away(runs(name), state) <= 1e-5


@pytest.mark.parametrize("name", [FAST, COMPOSITION])
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_changes_nothing(runs, tmp_path, name, victim):
    expected = runs(name)
    with _two(tmp_path, name, slow=1.0) as processes:
        for line in processes[victim].stdout:
            if line.startswith("epoch 2"):
                break
        processes[victim].send_signal(signal.SIGKILL)
        assert processes[victim].wait(60) == -signal.SIGKILL
        # The other waits for messages that do not come: the job is stopped.
    assert not (tmp_path / "final.npz").exists()
    epochs = _run(tmp_path, name)
    # The save behind the last epoch that it told of may not have been finished.
    assert epochs in (EPOCHS[1:], EPOCHS[2:], EPOCHS[3:])
    found = _final(tmp_path)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
