"""Trains to the end with checkpoints, however often it was killed before.

python resume.py FOLDER EPOCHS WIDTH; prints "epoch N" after each epoch, and at the end
writes every array of the state to FOLDER/final.npz.
"""

import logging
import pathlib
import sys
import time

import jax
import numpy as np
import problem

from jaxlab.training import fit


def tell(info):
    print("epoch", info.epoch, flush=True)
    time.sleep(0.02)


def main(folder, epochs, width):
    logging.basicConfig(format="%(message)s")
    objective, optimizer, state, data = problem.make(int(width))
    folder = pathlib.Path(folder)
    result = fit(
        objective,
        optimizer,
        state,
        data,
        epochs=int(epochs),
        batch_size=problem.BATCH,
        steps_per_call=4,
        metrics_path=folder / "metrics.jsonl",
        checkpoint_dir=folder / "checkpoints",
        callbacks=[tell],
        progress=False,
    )
    jax.block_until_ready(result.state)
    np.savez(folder / "unfinished.npz", **problem.leaves(result.state))
    (folder / "unfinished.npz").rename(folder / "final.npz")


if __name__ == "__main__":
    main(*sys.argv[1:])
