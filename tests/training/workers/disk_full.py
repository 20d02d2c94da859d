"""Trains until the disk is full, finds room, trains on; compares with a calm run.

python disk_full.py FOLDER EPOCHS WIDTH HOW; FOLDER/checkpoints is a small tmpfs of
this process's own (HOW is "tmpfs"), or no file may be longer than some bytes from the
third epoch on ("limit"). Prints what happened as one JSON object.
"""

import json
import logging
import pathlib
import resource
import subprocess
import sys

import jax
import numpy as np
import problem

from jaxlab.training import Checkpoints, fit


def train(folder, epochs, width, callbacks=()):
    objective, optimizer, state, data = problem.make(width)
    result = fit(
        objective,
        optimizer,
        state,
        data,
        epochs=epochs,
        batch_size=problem.BATCH,
        metrics_path=folder / "metrics.jsonl",
        checkpoint_dir=folder / "checkpoints",
        callbacks=callbacks,
        progress=False,
    )
    jax.block_until_ready(result.state)
    return problem.leaves(result.state)


def size_of(folder):
    """Bytes in blocks of 4 KiB, as a tmpfs counts them."""
    count = lambda path: -(-max(path.stat().st_size, 1) // 4096)
    return 4096 * sum(count(path) for path in folder.rglob("*"))


def main(folder, epochs, width, how):
    logging.basicConfig(format="%(message)s")
    folder, epochs, width = pathlib.Path(folder), int(epochs), int(width)
    calm = folder / "calm"
    calm.mkdir()
    expected = train(calm, epochs, width)
    newest = max((calm / "checkpoints").iterdir(), key=lambda path: int(path.name))

    def set_limit(count):
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (count, hard))

    def remount(count):
        options = f"remount,size={count}"
        subprocess.run(
            ["mount", "-o", options, str(folder / "checkpoints")], check=True
        )

    def shrink(info):
        if info.epoch == 3 and how == "limit":
            set_limit(256)

    if how == "tmpfs":  # two checkpoints and a part of a third
        remount(int(2.3 * size_of(newest)))
    said = {"error": None, "causes": []}
    try:
        train(folder, epochs, width, [shrink])
    except Exception as error:
        said["error"] = type(error).__name__
        while error is not None:
            said["causes"].append(f"{type(error).__name__}: {error}"[:1000])
            error = error.__cause__ or error.__context__
    if how == "tmpfs":
        remount("64m")
    else:
        set_limit(resource.RLIM_INFINITY)
    template = problem.make(width)[2]
    with Checkpoints(folder / "checkpoints") as checkpoints:
        said["sealed"] = checkpoints.steps()
        found = checkpoints.restore(template)
        said["restored"] = None if found is None else found.step
    got = train(folder, epochs, width)
    said["equal"] = set(got) == set(expected) and all(
        np.array_equal(got[name], expected[name]) for name in expected
    )
    read = lambda f: [
        (line["step"], line["loss"])
        for line in map(json.loads, (f / "metrics.jsonl").read_text().splitlines())
    ]
    said["lines"] = read(folder) == read(calm)
    print(json.dumps(said))


if __name__ == "__main__":
    main(*sys.argv[1:])
