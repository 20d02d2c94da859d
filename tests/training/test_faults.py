"""What goes wrong around ``fit``: kills, a full disk, bad bytes, bad data.

Nothing is lost beyond the last completed checkpoint, and what is run again ends with
the bits of a run that nothing disturbed.
"""

import json
import logging
import os
import pathlib
import random
import runpy
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlab.likelihoods import Gaussian
from jaxlab.objective import Objective, plain
from jaxlab.training import Checkpoints, create_state, fit

ROOT = pathlib.Path(__file__).parents[2]
WORKERS = ROOT / "tests" / "training" / "workers"
PROBLEM = runpy.run_path(str(WORKERS / "problem.py"))


def _environment():
    flag = "--xla_force_host_platform_device_count=8"
    flags = os.environ.get("XLA_FLAGS", "").replace(flag, "")
    return os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": flags}


# --- kill -9


KILLED_EPOCHS, WIDTH = 40, 256


def _start(folder):
    return subprocess.Popen(
        [
            sys.executable,
            WORKERS / "resume.py",
            folder,
            str(KILLED_EPOCHS),
            str(WIDTH),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=_environment(),
    )


def _finish(process):
    process.stdout.read()
    process.stdout.close()
    return process.wait(300)


def _saving(folder):
    """Says whether a save was under way: an unfinished or unsealed folder."""
    return any(
        "tmp" in path.name or not (path / "seal.json").exists()
        for path in (folder / "checkpoints").iterdir()
        if not path.name.endswith(".damaged")
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    assert _finish(_start(folder)) == 0
    return folder


def _lines(folder):
    text = (folder / "metrics.jsonl").read_text()
    return [
        {name: number for name, number in json.loads(line).items() if name in kept}
        for kept in [("step", "epoch", "loss", "grad_norm")]
        for line in text.splitlines()
    ]


def _check_equal(folder, undisturbed):
    with (
        np.load(folder / "final.npz") as found,
        np.load(undisturbed / "final.npz") as expected,
    ):
        assert set(found.files) == set(expected.files)
        for name in expected.files:
            np.testing.assert_array_equal(found[name], expected[name], err_msg=name)
    assert _lines(folder) == _lines(undisturbed)


@pytest.mark.soak
@pytest.mark.parametrize("seed", [0, 1])
def test_killed_at_25_random_points(undisturbed, tmp_path, seed, capsys):
    """Kill times count from the end of a process's first epoch; two seeds, 50 kills.

    Every third kill waits for a folder that is being written. A run that comes to its
    end is compared, and another is begun.
    """
    rng = random.Random(seed)
    kills = saves = 0
    runs, starts = [tmp_path / "0"], []
    while kills < 25:
        folder = runs[-1]
        folder.mkdir(exist_ok=True)
        process = _start(folder)
        line = process.stdout.readline()
        if line and kills % 3 == 2:
            until = time.monotonic() + 2
            while not _saving(folder) and time.monotonic() < until:
                time.sleep(0.0005)
        elif line:
            time.sleep(rng.uniform(0, 0.8))
        process.send_signal(signal.SIGKILL)
        _finish(process)
        if (folder / "final.npz").exists():
            runs.append(tmp_path / str(len(runs)))
            continue
        assert line, "it ended before its first epoch, and not at the end of the run"
        starts.append(int(line.split()[1]))
        kills += 1
        saves += _saving(folder)
    if runs[-1].exists():
        assert _finish(_start(runs[-1])) == 0
    else:
        runs.pop()
    with capsys.disabled():
        print(f"\nseed {seed}: {kills} kills, {saves} during a save, at {starts}")
    for folder in runs:
        _check_equal(folder, undisturbed)
    assert saves >= 5


# --- a full disk


def _disk_full(folder, epochs, width, how):
    (folder / "checkpoints").mkdir()
    command = [sys.executable, str(WORKERS / "disk_full.py"), str(folder)]
    command += [str(epochs), str(width), how]
    if how == "tmpfs":
        mount = 'mount -t tmpfs -o size=64m none "$0/checkpoints" && exec "$@"'
        own = ["unshare", "--user", "--mount", "--map-root-user"]
        if (
            not shutil.which("unshare")
            or subprocess.run(
                [*own, "sh", "-c", mount, str(folder), "true"], capture_output=True
            ).returncode
        ):
            pytest.skip("no tmpfs can be mounted without privileges here")
        command = [*own, "sh", "-c", mount, str(folder), *command]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=_environment()
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("how", "epochs", "width"),
    [
        ("tmpfs", 6, 32),
        pytest.param("limit", 6, 32, marks=pytest.mark.soak),
        pytest.param("tmpfs", 20, 256, marks=pytest.mark.soak),
    ],
)
def test_a_full_disk_stops_the_run_and_keeps_what_was_saved(
    tmp_path, how, epochs, width
):
    said = _disk_full(tmp_path, epochs, width, how)
    assert said["error"] in ("RuntimeError", "OSError", "ValueError"), said
    reasons = ("No space left", "File too large")
    assert any(reason in cause for cause in said["causes"] for reason in reasons), said
    steps = -(-PROBLEM["ROWS"] // PROBLEM["BATCH"])
    assert said["sealed"], said
    assert said["restored"] == said["sealed"][-1] <= 3 * steps
    assert said["equal"], said
    assert said["lines"], said


# --- A small run in this process


ROWS, BATCH = 24, 8
STEPS = ROWS // BATCH
RNG = np.random.default_rng(0)
X = RNG.normal(size=(ROWS, 4)).astype(np.float32)
Y = (X @ RNG.normal(size=(4, 2))).astype(np.float32)
OBJECTIVE = Objective(plain(lambda p, x: jnp.tanh(x @ p["w"]) @ p["v"]), Gaussian())
OPTIMIZER = optax.adam(1e-2)


def _batch(epoch, step):
    rows = (np.arange(BATCH) + BATCH * step + epoch) % ROWS
    return X[rows], Y[rows]


def _fit(folder, train=_batch, epochs=5, **options):
    params = {"w": jnp.ones((4, 3)) / 4, "v": jnp.ones((3, 2)) / 3}
    state = create_state(jax.random.key(0), params, OPTIMIZER)
    if train is _batch or callable(train):
        options["steps_per_epoch"] = STEPS
    else:
        options["batch_size"] = BATCH
    return fit(
        OBJECTIVE,
        OPTIMIZER,
        state,
        train,
        epochs=epochs,
        checkpoint_dir=folder / "checkpoints",
        metrics_path=folder / "metrics.jsonl",
        progress=False,
        **options,
    )


def _same(one, two):
    one, two = PROBLEM["leaves"](one.state), PROBLEM["leaves"](two.state)
    assert one.keys() == two.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], two[name], err_msg=name)


def _sealed(folder):
    with Checkpoints(folder / "checkpoints") as checkpoints:
        return checkpoints.steps()


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("calm")
    return _fit(folder), folder


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """A folder with the checkpoints and lines of three of five epochs."""
    folder = tmp_path_factory.mktemp("half")
    _fit(folder, epochs=3)
    return folder


# --- bad bytes


def _files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _damage(path, places):
    data = bytearray(path.read_bytes())
    for place, bit in places:
        data[place % len(data)] ^= bit
    path.write_bytes(data)


def _check_goes_on_from_the_one_before(half, calm, folder, damaged, caplog):
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        result = _fit(folder)
    assert f"step {3 * STEPS} is not used: the file " in caplog.text
    assert any(name in caplog.text for name in damaged)
    assert f"Restoring step {2 * STEPS} instead" in caplog.text
    assert result.history["step"][0] == 2 * STEPS + 1
    _same(result, calm[0])
    assert _lines(folder) == _lines(calm[1])


def _copied(half, folder):
    shutil.copytree(half, folder)
    return folder / "checkpoints" / str(3 * STEPS)


def test_several_damaged_files_of_the_newest_checkpoint(half, calm, tmp_path, caplog):
    newest = _copied(half, tmp_path / "run")
    paths = _files(newest)
    data = max(paths, key=lambda path: path.stat().st_size)
    metadata = next(path for path in paths if "METADATA" in path.name)
    for path in (data, metadata):
        _damage(path, [(0, 1), (-1, 0x80), (7, 0xFF)])
    names = [str(path.relative_to(newest)) for path in (data, metadata)]
    _check_goes_on_from_the_one_before(half, calm, tmp_path / "run", names, caplog)


def _restored(folder):
    template = create_state(
        jax.random.key(0), {"w": jnp.ones((4, 3)), "v": jnp.ones((3, 2))}, OPTIMIZER
    )
    with Checkpoints(folder) as checkpoints:
        return checkpoints.restore(template)


def _flip_and_restore(half, folder, rng):
    """Flips one to three bytes of a random file, or swaps two different bytes."""
    newest = _copied(half, folder)
    path = rng.choice(_files(newest))
    size = path.stat().st_size
    count = rng.randint(1, 3)
    places = [(p, 1 << rng.randrange(8)) for p in rng.sample(range(size), count)]
    _damage(path, places)
    found = _restored(folder / "checkpoints")
    name = str(path.relative_to(newest))
    assert found.step == 2 * STEPS, (name, places)
    assert len(found.rejected) == 1
    assert name in found.rejected[0]
    shutil.rmtree(folder)


def test_first_and_last_byte_of_every_file(half, tmp_path):
    names = [
        p.relative_to(half / "checkpoints" / str(3 * STEPS))
        for p in _files(half / "checkpoints" / str(3 * STEPS))
    ]
    for name in names:
        for place in (0, -1):
            newest = _copied(half, tmp_path / "run")
            _damage(newest / name, [(place, 0x01)])
            found = _restored(tmp_path / "run" / "checkpoints")
            assert found.step == 2 * STEPS, (name, place)
            assert str(name) in found.rejected[0]
            shutil.rmtree(tmp_path / "run")


@pytest.mark.soak
def test_300_random_flips_are_all_seen(half, tmp_path, capsys):
    rng = random.Random(0)
    for _ in range(300):
        _flip_and_restore(half, tmp_path / "run", rng)
    with capsys.disabled():
        print("\n300 of 300 damaged checkpoints were seen")


# --- a feeding function that raises


class _Gone(Exception):
    """An error of the user's own."""


@pytest.mark.parametrize(
    ("error", "at"),
    [
        (OSError(5, "the disk is gone"), 7),
        (_Gone("row 3"), 0),
        (ValueError("row 4"), 14),
        (KeyError("image"), 9),
    ],
)
def test_an_error_of_the_feeding_function_comes_out_as_it_is(calm, tmp_path, error, at):
    def raising(epoch, step):
        if STEPS * epoch + step == at:
            raise error
        return _batch(epoch, step)

    with pytest.raises(type(error)) as caught:
        _fit(tmp_path, raising)
    assert caught.value is error
    done = at // STEPS  # epochs whose checkpoint was completed
    assert _sealed(tmp_path) == [STEPS * n for n in range(1, done + 1)][-2:]
    result = _fit(tmp_path)
    assert len(result.history["step"]) == STEPS * (5 - done)
    _same(result, calm[0])
    assert _lines(tmp_path) == _lines(calm[1])


def test_an_iterator_that_ends_is_named(tmp_path):
    def ended(epoch, step):
        raise StopIteration

    with pytest.raises(ValueError, match=r"train\(0, 0\) ran out of batches"):
        _fit(tmp_path, ended)


@pytest.mark.soak
def test_an_error_at_every_step(calm, tmp_path):
    """One run that meets an error at each of its steps in turn."""
    failed = set()

    def raising(epoch, step):
        number = STEPS * epoch + step
        if number not in failed:
            failed.add(number)
            raise _Gone(number)
        return _batch(epoch, step)

    while len(failed) < 5 * STEPS:
        with pytest.raises(_Gone):
            _fit(tmp_path, raising)
    _same(_fit(tmp_path), calm[0])
    assert _lines(tmp_path) == _lines(calm[1])


# --- a loss that is not finite


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("at", [2, 10])
def test_a_loss_that_is_not_finite_then_sane_data(calm, tmp_path, bad, at):
    def poisoned(epoch, step):
        x, y = _batch(epoch, step)
        return (x, y * np.float32(bad)) if STEPS * epoch + step == at else (x, y)

    epoch, step = divmod(at, STEPS)
    said = rf"at step {at + 1} \(step {step + 1} of epoch {epoch + 1}\)"
    with pytest.raises(FloatingPointError, match=said):
        _fit(tmp_path, poisoned)
    assert _sealed(tmp_path) == [STEPS * n for n in range(1, epoch + 1)][-2:]
    result = _fit(tmp_path)
    assert np.isfinite(result.history["loss"]).all()
    _same(result, calm[0])
    assert _lines(tmp_path) == _lines(calm[1])


def test_bad_rows_among_arrays_then_sane_ones(tmp_path):
    straight = _fit(tmp_path / "straight", (X, Y))
    _fit(tmp_path / "run", (X, Y), epochs=2)
    bad = Y.copy()
    bad[5] = np.nan
    with pytest.raises(FloatingPointError, match=r"of epoch 3\)"):
        _fit(tmp_path / "run", (X, bad))
    assert _sealed(tmp_path / "run") == [STEPS, 2 * STEPS]
    _same(_fit(tmp_path / "run", (X, Y)), straight)
