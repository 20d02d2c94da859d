"""A Monarch transformer trained by FishLeg behind the gradient-norm penalty.

As a program, python composed.py FOLDER PORT PROCESSES INDEX: one of several processes
that train it together, its state cut over all of them, from the newest checkpoint to
step 20. The environment's NAME says by which optimizer, SLOW makes an epoch last as
many seconds more.
"""

import functools
import os
import pathlib
import sys
import time

import jax
import numpy as np
import optax
from flax import nnx

from jaxlab.layers import MonarchLinear
from jaxlab.likelihoods import Categorical
from jaxlab.models import GPT
from jaxlab.objective import Objective
from jaxlab.optimizers import fishleg
from jaxlab.sharpness import gradient_norm_penalty
from jaxlab.training import (
    ShardingPlan,
    batch_sharding,
    create_state,
    data_parallel,
    fit,
    make_mesh,
    shard,
    tensor_parallel,
)

ROWS, BATCH, EPOCHS = 32, 8, 5  # 20 steps
WIDTH, LAYERS, HEADS, VOCABULARY, TIME = 16, 2, 2, 11, 6
# Its arrays are small: without this all of them would stay whole.
SMALL = ShardingPlan(rules=tensor_parallel().rules, smallest=8)
# The axes of a mesh of eight devices, and the plan.
PLANS = {
    "data_parallel": ({}, data_parallel()),
    "fully_sharded": ({"fsdp": 8}, ShardingPlan(smallest=8)),
    "tensor_parallel": ({"fsdp": 2, "tensor": 2}, SMALL),
}


def optimizers():
    """What trains it, by name.

    The layer norms divide embeddings of size 0.02 by their size, so that a quick rate
    makes 20 steps unstable: a change of 1e-7 of the params grows 2,000-fold under
    "gnp + fishleg", 5-fold under its gentle counterpart.
    """
    rule = {r"/w[12]$": "stacked", r"(bias|norm\d?/scale)$": "diagonal"}
    leg = functools.partial(
        fishleg, rule=rule, max_size=8, pre_aux_steps=2, weight_decay=1e-4
    )
    # A bias of keys has no gradient but round-off, which a small eps blows up.
    adamw = functools.partial(optax.adamw, eps=1e-3)
    gnp, chain = gradient_norm_penalty, optax.chain
    return {
        "adamw": lambda: adamw(1e-2),
        "gnp + adamw": lambda: chain(gnp(0.8, 0.05), adamw(1e-2)),
        "fishleg": lambda: leg(0.5),
        "gnp + fishleg": lambda: chain(gnp(0.8, 0.05), leg(0.5)),
        "gentle adamw": lambda: adamw(2e-3),
        "gentle gnp + fishleg": lambda: chain(
            gnp(0.8, 0.01), leg(0.2, damping=3.0, init_scale=0.3)
        ),
    }


def make(name="gnp + fishleg", *, mlp="monarch", dtype=None, activation_sharding=None):
    """Gives objective, optimizer, state of step 0 and data."""
    monarch = functools.partial(MonarchLinear, nblocks=4)
    model = GPT(
        vocabulary=VOCABULARY,
        context=TIME,
        width=WIDTH,
        layers=LAYERS,
        heads=HEADS,
        feedforward_linear=monarch if mlp == "monarch" else None,
        scan=True,
        remat=True,
        dtype=dtype,
        activation_sharding=activation_sharding,
        rngs=nnx.Rngs(0),
    )
    graph, params = nnx.split(model, nnx.Param)

    def apply_fn(params, state, inputs, *, key, train):
        return nnx.merge(graph, params)(inputs), state

    params = nnx.to_pure_dict(params)
    if dtype is not None:
        params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    optimizer = optimizers()[name]()
    state = create_state(jax.random.key(0), params, optimizer)
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (ROWS, TIME + 1))
    data = tokens[:, :-1].astype(np.int32), tokens[:, 1:].astype(np.int32)
    return Objective(apply_fn, Categorical()), optimizer, state, data


def train(mesh=None, plan=None, *, name="gnp + fishleg", dtype=None, **options):
    """Trains 20 steps, over a mesh where one is given."""
    rows = None if mesh is None else batch_sharding(mesh)
    made = make(name, dtype=dtype, activation_sharding=rows)
    objective, optimizer, state, data = made
    if mesh is not None:
        state = shard(state, mesh, plan)
    return fit(
        objective,
        optimizer,
        state,
        data,
        epochs=EPOCHS,
        batch_size=BATCH,
        data_sharding=rows,
        progress=False,
        **options,
    )


def main(folder, port, processes, index):
    jax.distributed.initialize(
        f"127.0.0.1:{port}", num_processes=int(processes), process_id=int(index)
    )
    from jax.experimental import multihost_utils

    def tell(info):
        print("epoch", info.epoch, flush=True)
        time.sleep(float(os.environ.get("SLOW", 0)))

    folder = pathlib.Path(folder)
    result = train(
        make_mesh(fsdp=4, tensor=2),
        SMALL,
        name=os.environ.get("NAME", "gentle gnp + fishleg"),
        checkpoint_dir=folder / "checkpoints",
        callbacks=[tell],
    )
    state = result.state._replace(key=jax.random.key_data(result.state.key))
    state = multihost_utils.process_allgather(state, tiled=True)
    if jax.process_index() == 0:
        leaves = jax.tree_util.tree_leaves_with_path(state)
        named = {jax.tree_util.keystr(p): np.asarray(leaf) for p, leaf in leaves}
        np.savez(folder / "unfinished.npz", **named)
        (folder / "unfinished.npz").rename(folder / "final.npz")
    jax.distributed.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
