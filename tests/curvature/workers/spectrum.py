"""A spectrum of a small net, on however many devices there are.

As a program, one of several processes that compute it together:
python spectrum.py FILE PORT PROCESSES INDEX; each process has the devices that
XLA_FLAGS gives it, and the first writes what came out.
"""

import sys

ROWS, ORDER = 48, 12


def make():
    """Makes parameters and data, the same wherever it is called."""
    import jax
    import numpy as np

    keys = jax.random.split(jax.random.key(0), 4)
    normal = lambda key, *shape: np.asarray(jax.random.normal(key, shape))
    params = {"w1": normal(keys[0], 8, 16) / 3, "w2": normal(keys[1], 16, 4) / 4}
    inputs = normal(keys[2], ROWS, 8)
    targets = np.asarray(jax.random.randint(keys[3], (ROWS,), 0, 4))
    return params, (inputs, targets)


def apply(params, x):
    """Runs a net with one hidden layer."""
    import jax.numpy as jnp

    return jnp.tanh(x @ params["w1"]) @ params["w2"]


def sharded(tree, mesh, spec):
    """Puts a tree, equal in every process, on a mesh."""
    import jax
    import numpy as np
    from jax.sharding import NamedSharding

    def place(leaf):
        leaf, where = np.asarray(leaf), NamedSharding(mesh, spec)
        return jax.make_array_from_callback(leaf.shape, where, lambda i: leaf[i])

    return jax.tree.map(place, tree)


def spectrum(params, batch):
    """Computes Hessian and Gauss-Newton spectra with everything they rest on."""
    import jax

    from jaxlab.curvature import (
        ggn_operator,
        hessian_operator,
        spectral_density,
        top_eigenpairs,
        trace,
    )
    from jaxlab.likelihoods import Categorical

    loss = lambda p, b: Categorical().nll(apply(p, b[0]), b[1])
    hessian = hessian_operator(loss, params, batch)
    ggn = ggn_operator(apply, Categorical(), params, batch, microbatch=16)
    key = jax.random.key(1)
    density = spectral_density(key, hessian, params, order=ORDER, num_probes=2)
    pairs = top_eigenpairs(key, ggn, params, k=3, tol=1e-5)
    return {
        "grid": density.grid,
        "density": density.density,
        "nodes": density.nodes,
        "values": pairs.values,
        "trace": trace(key, hessian, params, num_matvecs=8)[0],
    }


def main(file, port, processes, index):
    """Computes it over all processes."""
    import jax

    jax.distributed.initialize(
        f"127.0.0.1:{port}", num_processes=int(processes), process_id=int(index)
    )
    import numpy as np
    from jax.experimental import multihost_utils
    from jax.sharding import AxisType
    from jax.sharding import PartitionSpec as P

    mesh = jax.make_mesh((jax.device_count(),), ("d",), axis_types=(AxisType.Auto,))
    params, batch = make()
    found = spectrum(sharded(params, mesh, P("d")), sharded(batch, mesh, P("d")))
    found = multihost_utils.process_allgather(found, tiled=True)
    if jax.process_index() == 0:
        np.savez(file, **found)
    jax.distributed.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
