"""Killed and started again, FishLeg ends with the same bits, its factors too.

The worker is this file: python test_fishleg_resume.py FOLDER RUN ... trains each run to
the end, however often it was killed before, and writes its arrays to FOLDER/RUN.npz.
"""

import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np

ROOT = pathlib.Path(__file__).parents[2]
EPOCHS, BATCH, ROWS = 10, 8, 32
STEPS = 4 * EPOCHS
KILLED, WHOLE = "killed", "whole"
QUICK = {  # to compile well takes longer than to run
    "XLA_FLAGS": "--xla_backend_optimization_level=0",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
}


def make():
    """Gives objective, optimizer, first state and data: both kinds of auxiliary step.

    One group has the group step with all that its state can hold, the other Adam's.
    """
    import jax
    import jax.numpy as jnp
    import optax

    from jaxlab.likelihoods import Gaussian
    from jaxlab.objective import Objective, plain
    from jaxlab.optimizers import LevenbergMarquardt, fishleg
    from jaxlab.training import create_state

    draw = np.random.default_rng(0)
    like = {"w1": (4, 5), "b1": (5,), "w2": (5, 3)}
    params = {name: jnp.float32(draw.normal(size=s) / 2) for name, s in like.items()}

    def apply_fn(params, x):
        bias = jnp.broadcast_to(params["b1"], (len(x), 5))
        return jnp.tanh(x @ params["w1"] + bias) @ params["w2"]

    options = {"pre_aux_steps": 3, "dense_until": 6, "update_aux_every": 5}
    group = fishleg(
        damping=LevenbergMarquardt(),
        gradient_directions=2,
        momentum=0.5,
        init_scale=1.0,
        **options,
    )
    adam = fishleg(0.1, aux_mode="adam", step="fixed", init_scale=1.0, **options)
    labels = {"w1": "group", "b1": "group", "w2": "adam"}
    optimizer = optax.partition({"group": group, "adam": adam}, labels)
    x = draw.normal(size=(ROWS, 4)).astype(np.float32)
    state = create_state(jax.random.key(0), params, optimizer)
    objective = Objective(plain(apply_fn), Gaussian())
    return objective, optimizer, state, (x, np.sin(x[:, :3]))


def arrays_of(state):
    """Gives the arrays of a state by path, keys as their numbers."""
    import jax

    named = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        named[jax.tree_util.keystr(path)] = np.asarray(leaf)
    return named


def tell(info):
    print("epoch", info.epoch, flush=True)
    time.sleep(0.05)


def main(folder, *runs):
    from jaxlab.training import fit

    folder = pathlib.Path(folder)
    for run in runs:
        objective, optimizer, state, data = make()
        result = fit(
            objective,
            optimizer,
            state,
            data,
            epochs=EPOCHS,
            batch_size=BATCH,
            checkpoint_dir=folder / run,
            callbacks=[tell],
            progress=False,
        )
        np.savez(folder / f"{run}.npz", **arrays_of(result.state))
        np.savez(folder / "first.npz", **arrays_of(make()[2]))


def start(folder, *runs):
    return subprocess.Popen(
        [sys.executable, __file__, folder, *runs],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | QUICK | {"PYTHONPATH": str(ROOT)},
    )


def test_killed_in_training_it_ends_with_the_same_bits(tmp_path):
    with start(tmp_path, KILLED) as process:
        for _ in range(3):  # an epoch is saved while the next one runs
            assert process.stdout.readline().startswith("epoch")
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    saved = [int(p.name) for p in (tmp_path / KILLED).iterdir() if p.name.isdecimal()]
    assert 0 < max(saved) < STEPS
    with start(tmp_path, KILLED, WHOLE) as process:
        epochs = process.stdout.read().split()[1::2]
    assert process.returncode == 0
    # The second process went on where the first was saved, then trained all of it.
    assert 1 < int(epochs[0]) < EPOCHS
    assert len(epochs) == EPOCHS - int(epochs[0]) + 1 + EPOCHS

    with (
        np.load(tmp_path / f"{KILLED}.npz") as found,
        np.load(tmp_path / f"{WHOLE}.npz") as expected,
        np.load(tmp_path / "first.npz") as first,
    ):
        assert set(found.files) == set(expected.files) == set(first.files)
        for name in expected.files:
            np.testing.assert_array_equal(found[name], expected[name], err_msg=name)
        same = lambda name: np.array_equal(expected[name], first[name])
        moved = [name for name in expected.files if not same(name)]
    # All that the auxiliary steps keep was in use.
    for part in (".q.", ".auxiliary", ".recent", ".damping", ".fit", "ema"):
        assert any(part in name for name in moved), (part, moved)


if __name__ == "__main__":
    main(*sys.argv[1:])
