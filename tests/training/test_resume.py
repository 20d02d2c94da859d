"""Killed at any moment and started again, a run ends with the same bits."""

import contextlib
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[2]
WORKER = ROOT / "tests" / "training" / "workers" / "resume.py"
EPOCHS, WIDTH, STEPS = 40, 256, 9  # STEPS an epoch


class _Run:
    """One process of the worker; its errors go to a file."""

    def __init__(self, folder):
        self.folder = folder
        folder.mkdir(exist_ok=True)
        self._errors = open(folder / "errors.txt", "w+")  # noqa: SIM115
        flag = "--xla_force_host_platform_device_count=8"
        flags = os.environ.get("XLA_FLAGS", "").replace(flag, "")
        environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": flags}
        self.process = subprocess.Popen(
            [sys.executable, WORKER, folder, str(EPOCHS), str(WIDTH)],
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=environment,
        )

    def epoch(self):
        """Waits for the end of an epoch and gives its number, 0 at the end."""
        line = self.process.stdout.readline()
        return int(line.split()[1]) if line else 0

    def stop(self, number=signal.SIGKILL):
        """Sends a signal, waits, and gives what the process said."""
        self.process.send_signal(number)
        return self.finish()

    def finish(self):
        self.process.stdout.read()
        self.process.stdout.close()
        self.process.wait()
        self._errors.seek(0)
        said = self._errors.read()
        self._errors.close()
        return said


def _kill_at_random(folder, rng):
    run = _Run(folder)
    first = run.epoch()
    if first:
        time.sleep(rng.uniform(0, 0.04 * (EPOCHS - first)))
    run.stop()


def _kill_during_a_save(folder):
    """Kills while Orbax writes or before the seal stands; says whether it did."""
    run = _Run(folder)
    if not run.epoch():
        run.finish()
        return False
    checkpoints = folder / "checkpoints"
    known = {p.name for p in checkpoints.iterdir()}
    while run.process.poll() is None:
        new = {p.name for p in checkpoints.iterdir()} - known
        if any("tmp" in name for name in new):
            break
        known |= new
    run.stop()
    return any("tmp" in p.name or not _sealed(p) for p in checkpoints.iterdir())


def _sealed(folder):
    return (folder / "seal.json").exists()


def _steps(folder):
    names = (p.name for p in (folder / "checkpoints").iterdir())
    return sorted(int(name) for name in names if name.isdecimal())


def _flip(folder, pattern):
    """Flips a bit in a file of the newest checkpoint; gives its step and the file."""
    step = _steps(folder)[-1]
    newest = folder / "checkpoints" / str(step)
    path = max(newest.rglob(pattern), key=lambda p: p.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(data)
    return step, path.relative_to(newest)


def _check_said(said, step, name):
    assert f"step {step} is not used: the file {name} does not match" in said
    assert f"Restoring step {step - STEPS} instead" in said


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    run = _Run(tmp_path_factory.mktemp("undisturbed"))
    said = run.finish()
    assert run.process.returncode == 0, said
    return run.folder


def _check_equal(folder, undisturbed):
    with (
        np.load(folder / "final.npz") as found,
        np.load(undisturbed / "final.npz") as expected,
    ):
        assert set(found.files) == set(expected.files)
        assert len(found.files) == 23
        for name in expected.files:
            np.testing.assert_array_equal(found[name], expected[name], err_msg=name)
    read = lambda f: [
        (line["step"], line["loss"])
        for line in map(json.loads, (f / "metrics.jsonl").read_text().splitlines())
    ]
    assert read(folder) == read(undisturbed)


def test_killed_and_damaged_ends_with_the_same_bits(undisturbed, tmp_path):
    folder = tmp_path / "run"
    rng = random.Random(time.time_ns())

    run = _Run(folder)  # in the first save: there may be nothing to go on from
    while run.process.poll() is None and not (folder / "checkpoints").is_dir():
        time.sleep(0.001)
    run.epoch()
    run.stop()

    assert any(_kill_during_a_save(folder) for _ in range(4))
    _kill_at_random(folder, rng)
    while len(_steps(folder)) < 2:
        _kill_at_random(folder, rng)

    if not _sealed(folder / "checkpoints" / str(_steps(folder)[-1])):
        _restart_and_terminate(folder)
    flipped = _flip(folder, "d/*")
    said, code = _restart_and_terminate(folder)
    _check_said(said, *flipped)
    # SIGTERM: the save under way was finished and sealed. (It may come after the end.)
    assert code in (128 + signal.SIGTERM, 0, -signal.SIGTERM)
    assert all(map(_sealed, (folder / "checkpoints").glob("[0-9]*[0-9]")))
    assert not list((folder / "checkpoints").glob("*tmp*"))

    flipped = _flip(folder, "_METADATA")
    run = _Run(folder)
    _check_said(run.finish(), *flipped)
    assert run.process.returncode == 0
    _check_equal(folder, undisturbed)


def _restart_and_terminate(folder):
    run = _Run(folder)
    run.epoch()
    run.epoch()
    said = run.stop(signal.SIGTERM)
    return said, run.process.returncode


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(5))
def test_killed_again_and_again(undisturbed, tmp_path, seed):
    rng = random.Random(seed)
    folder = tmp_path / "run"
    for _ in range(3):
        _kill_at_random(folder, rng)
    with contextlib.suppress(FileNotFoundError):
        _kill_during_a_save(folder)
    run = _Run(folder)
    said = run.finish()
    assert run.process.returncode == 0, said
    _check_equal(folder, undisturbed)
