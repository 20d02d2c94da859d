"""A small network with dropout and AdamW, the same in every process."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlab.likelihoods import Categorical
from jaxlab.objective import Objective
from jaxlab.training import create_state
from jaxlab.training.feed import place

ROWS = 200
BATCH = 24  # 200 = 8 * 24 + 8: the last batch is ragged


def make(width=32):
    """Gives objective, optimizer, state of step 0, data."""
    k1, k2, k3 = jax.random.split(jax.random.key(1), 3)
    params = {
        "w1": jax.random.normal(k1, (16, width)) / 4,
        "b1": jnp.zeros(width),
        "w2": jax.random.normal(k2, (width, width)) / width**0.5,
        "w3": jax.random.normal(k3, (width, 8)) / width**0.5,
    }

    def apply_fn(params, state, x, *, key, train):
        bias = jnp.broadcast_to(params["b1"], (len(x), width))
        h = jnp.tanh(x @ params["w1"] + bias)
        if train:
            h = jnp.where(jax.random.bernoulli(key, 0.8, h.shape), h / 0.8, 0.0)
        return jnp.tanh(h @ params["w2"]) @ params["w3"], state

    adamw = optax.inject_hyperparams(optax.adamw)(
        learning_rate=optax.cosine_decay_schedule(1e-2, 400)
    )
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), adamw)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(ROWS, 16)).astype(np.float32)
    y = np.argmax(x @ rng.normal(size=(16, 8)), axis=1).astype(np.int32)
    state = create_state(jax.random.key(0), params, optimizer)
    return Objective(apply_fn, Categorical()), optimizer, state, (x, y)


def leaves(state):
    """Gives the arrays of a state by path, the key as its numbers."""
    named = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        if jnp.issubdtype(jnp.asarray(leaf).dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        named[jax.tree_util.keystr(path)] = np.asarray(leaf)
    return named


def sharded(state, mesh):
    """Cuts every leaf along dimension 0 where the mesh divides it."""
    count = mesh.devices.size

    def cut(leaf):
        even = leaf.ndim > 0 and leaf.shape[0] % count == 0
        return place(leaf, NamedSharding(mesh, P("d") if even else P()))

    return jax.tree.map(cut, state)
