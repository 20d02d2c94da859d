"""Sharpness-aware steps compile for a TPU and a GPU that are not here, at their cost.

The cost is that of two gradients: operations, memory, and on four TPU chips that share
a batch what they send each other.
"""

import functools
import re

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks import devices
from jaxlab import sharpness
from jaxlab.likelihoods import Categorical

VOCABULARY, TIME, WIDTH, HEADS, LAYERS, BATCH = 98, 64, 128, 4, 2, 64
CHIPS = 4


def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


GPT = {
    "embedding": array(VOCABULARY, WIDTH),
    "positions": array(TIME, WIDTH),
    "blocks": [
        {
            "qkv": array(WIDTH, 3 * WIDTH),
            "out": array(WIDTH, WIDTH),
            "up": array(WIDTH, 4 * WIDTH),
            "down": array(4 * WIDTH, WIDTH),
        }
    ]
    * LAYERS,
}
MLP = [array(64, 256), array(256, 256), array(256, 10)]
TOKENS = array(BATCH, TIME, dtype=jnp.int32)
DIGITS = array(BATCH, 64), array(BATCH, dtype=jnp.int32)


def gpt_loss(params, batch):
    tokens, targets = batch
    x = params["embedding"][tokens] + params["positions"][None]
    for block in params["blocks"]:
        qkv = jnp.split(jax.nn.standardize(x) @ block["qkv"], 3, axis=-1)
        q, k, v = (a.reshape(*a.shape[:2], HEADS, -1) for a in qkv)
        mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        x = x + mixed.reshape(x.shape) @ block["out"]
        x = x + jax.nn.gelu(jax.nn.standardize(x) @ block["up"]) @ block["down"]
    outputs = jax.nn.standardize(x) @ params["embedding"].T
    return Categorical().nll(outputs, targets)


def mlp_loss(params, batch):
    x, labels = batch
    for w in params[:-1]:
        x = jax.nn.relu(x @ w)
    return Categorical().nll(x @ params[-1], labels)


PLAIN = optax.adamw(1e-3)
PENALTY = optax.chain(sharpness.gradient_norm_penalty(0.8, 0.05), PLAIN)
PERIODIC = optax.chain(sharpness.periodic(sharpness.sam(0.05), 5), PLAIN)
CASES = {
    "gpt, penalty": (gpt_loss, GPT, (TOKENS, TOKENS), PENALTY),
    "mlp, periodic sam": (mlp_loss, MLP, DIGITS, PERIODIC),
}


def step_of(loss, optimizer):
    """Makes one training step, a function of arrays alone."""

    def step(params, state, batch):
        grad_fn = lambda at: jax.grad(loss)(at, batch)
        grads = grad_fn(params)
        update = optax.with_extra_args_support(optimizer).update
        updates, state = update(grads, state, params, grad_fn=grad_fn, grad=grads)
        return optax.apply_updates(params, updates), state

    return step


def with_arguments(name, optimizer=None):
    loss, params, batch, own = CASES[name]
    optimizer = optimizer or own
    state = jax.eval_shape(optimizer.init, params)
    return step_of(loss, optimizer), (params, state, batch)


def bytes_of(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@functools.cache
def figures(target, name, plain):
    step, arguments = with_arguments(name, PLAIN if plain else None)
    return devices.figures(target, step, *arguments)


@pytest.mark.parametrize("place", ["tpu", "gpu"])
@pytest.mark.parametrize("name", CASES)
def test_a_step_costs_two_gradients(place, name, request):
    target = request.getfixturevalue(place)
    ours, plain = (figures(target, name, plain) for plain in (False, True))
    assert 1.5 < ours["flops"] / plain["flops"] <= 2.05
    # The first gradient and the point ahead are kept; activations are not kept twice.
    most = plain["temporary_bytes"] + 3 * bytes_of(CASES[name][1])
    assert ours["temporary_bytes"] <= most


@pytest.mark.parametrize("place", ["tpu", "gpu"])
def test_the_second_gradient_of_a_periodic_link_stands_in_a_branch(place, request):
    target = request.getfixturevalue(place)
    step, arguments = with_arguments("mlp, periodic sam")
    text = target.compile(step, *arguments).as_text()
    assert re.search(r" conditional\(", text)


@pytest.fixture(scope="module")
def mesh(tpu):
    mesh = tpu.mesh()
    assert mesh.size == CHIPS
    return mesh


def on_chips(mesh, step, arguments):
    """Compiles a step for all chips, each with its own rows."""
    whole, rows = NamedSharding(mesh, P()), NamedSharding(mesh, P("d"))
    jitted = jax.jit(step, in_shardings=(whole, whole, rows), out_shardings=whole)
    lowered = jitted.trace(*arguments).lower(lowering_platforms=("tpu",))
    return devices.collectives(devices.compiled(lowered).as_text())


def test_chips_that_share_a_batch_send_two_gradients(mesh):
    plain, ours = (
        on_chips(mesh, *with_arguments("gpt, penalty", optimizer))
        for optimizer in (PLAIN, PENALTY)
    )
    # The embedding is read twice, and the two parts of its gradient go apart.
    size = bytes_of(GPT) + bytes_of(GPT["embedding"])
    assert {kind for kind, _ in plain} == {"all-reduce"}
    assert bytes_of(GPT) <= sum(sent for _, sent in plain) <= 1.001 * size
    assert len(plain) < len(jax.tree.leaves(GPT))  # sent together
    assert sorted(ours) == sorted(plain * 2)


def test_chips_that_perturb_with_their_own_gradient_send_one(mesh):
    link = sharpness.gradient_norm_penalty(
        0.8, 0.05, axis_name="d", sync_perturbation=False
    )
    step, arguments = with_arguments("gpt, penalty", optax.chain(link, PLAIN))
    specs = (P(), P(), P("d"))
    local = jax.shard_map(
        step, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=False
    )
    sent = on_chips(mesh, local, arguments)
    assert {kind for kind, _ in sent} == {"all-reduce"}
    assert 1 <= sum(each for _, each in sent) / bytes_of(GPT) <= 1.001
