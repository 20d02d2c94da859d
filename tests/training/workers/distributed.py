"""One of several processes that train together and write what came out.

python distributed.py FOLDER PORT PROCESSES INDEX; each process has the devices that
XLA_FLAGS gives it. Trains 2 epochs, then goes on to 3 from the checkpoint.
"""

import pathlib
import sys

import jax


def main(folder, port, processes, index):
    jax.distributed.initialize(
        f"127.0.0.1:{port}", num_processes=int(processes), process_id=int(index)
    )
    import numpy as np
    import problem
    from jax.experimental import multihost_utils
    from jax.sharding import AxisType, NamedSharding, PartitionSpec

    from jaxlab.training import fit

    folder = pathlib.Path(folder)
    mesh = jax.make_mesh((jax.device_count(),), ("d",), axis_types=(AxisType.Auto,))
    for epochs in (2, 3):
        objective, optimizer, state, data = problem.make()
        state = problem.sharded(state, mesh)
        result = fit(
            objective,
            optimizer,
            state,
            data,
            epochs=epochs,
            batch_size=problem.BATCH,
            validation=data,
            metrics_path=folder / "metrics.jsonl",
            checkpoint_dir=folder / "checkpoints",
            data_sharding=NamedSharding(mesh, PartitionSpec("d")),
            progress=False,
        )
    params = multihost_utils.process_allgather(result.state.params, tiled=True)
    if jax.process_index() == 0:
        loss = result.epochs[-1]["validation_loss"]
        np.savez(folder / "final.npz", loss=loss, step=result.state.step, **params)
    jax.distributed.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
