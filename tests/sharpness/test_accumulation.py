"""Three kinds of accumulation against loops, goldens and devices."""

import pathlib
import runpy
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxlab.sharpness.accumulation import (
    full_batch_value_and_grad,
    m_sharpness_value_and_grad,
    micro_batch_value_and_grad,
)
from jaxlab.sharpness.gradient_norm_penalty import gnp_gradient, gnp_value_and_grad

net = types.SimpleNamespace(
    **runpy.run_path(str(pathlib.Path(__file__).with_name("golden_net.py")))
)
GOLDEN = net.GOLDEN
TIGHT = {"rtol": 0, "atol": 1e-10}
BOTH = {"alpha": 0.8, "radius": 0.05}


pytestmark = pytest.mark.usefixtures("x64")


def _halves():
    return [
        jax.tree.map(lambda a, i=i: a[8 * i : 8 * i + 8], net.batch()) for i in (0, 1)
    ]


@pytest.mark.parametrize("count", [1, 2, 4, 16])
def test_full_batch_is_the_whole_batch(count):
    f = full_batch_value_and_grad(net.loss_fn, num_micro_batches=count, **BOTH)
    value, grads = jax.jit(f)(net.params(), net.batch())
    np.testing.assert_allclose(value, GOLDEN["loss"], rtol=1e-12)
    np.testing.assert_allclose(net.flat(grads), GOLDEN["mixed_1"], **TIGHT)


def test_micro_batches_are_the_mean_of_their_own():
    one = gnp_value_and_grad(net.loss_fn, **BOTH)
    parts = [one(net.params(), half) for half in _halves()]
    mean = jax.tree.map(lambda a, b: (a + b) / 2, *parts)
    f = micro_batch_value_and_grad(net.loss_fn, num_micro_batches=2, **BOTH)
    got = jax.jit(f)(net.params(), net.batch())
    chex.assert_trees_all_close(got, mean, **TIGHT)
    np.testing.assert_allclose(net.flat(got[1]), GOLDEN["msharp2_mixed"], **TIGHT)


@pytest.mark.parametrize("how", ["vmap", "scan"])
def test_m_sharpness(how):
    f = m_sharpness_value_and_grad(net.loss_fn, group_size=8, how=how, **BOTH)
    _, grads = jax.jit(f)(net.params(), net.batch())
    np.testing.assert_allclose(net.flat(grads), GOLDEN["msharp2_mixed"], **TIGHT)
    whole = m_sharpness_value_and_grad(net.loss_fn, group_size=16, how=how, **BOTH)
    _, grads = whole(net.params(), net.batch())
    np.testing.assert_allclose(net.flat(grads), GOLDEN["mixed_1"], **TIGHT)


def test_the_three_differ():
    far = {"alpha": 0.8, "radius": 0.5}
    full = full_batch_value_and_grad(net.loss_fn, num_micro_batches=4, **far)
    micro = micro_batch_value_and_grad(net.loss_fn, num_micro_batches=4, **far)
    single = m_sharpness_value_and_grad(net.loss_fn, group_size=1, **far)
    found = [net.flat(f(net.params(), net.batch())[1]) for f in (full, micro, single)]
    for a, b in [(0, 1), (1, 2), (0, 2)]:
        gap = np.linalg.norm(found[a] - found[b]) / np.linalg.norm(found[a])
        assert gap > 0.01


@pytest.mark.parametrize(
    ("sync", "golden"),
    [(False, "steps_gnp_two_replicas"), (True, "steps_gnp_two_replicas_sync")],
)
@pytest.mark.parametrize("check", [True, False])
def test_goldens_of_two_replicas(sync, golden, check):
    mesh = jax.make_mesh(
        (2,), ("d",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2]
    )

    def mixed(at, batch):
        return gnp_gradient(
            lambda p: jax.grad(net.loss_fn)(p, batch),
            at,
            axis_name="d",
            sync_perturbation=sync,
            **BOTH,
        )

    step = jax.jit(
        jax.shard_map(
            mixed, mesh=mesh, in_specs=(P(), P("d")), out_specs=P(), check_vma=check
        )
    )
    params, seen = net.params(), []
    for _ in range(3):
        grads = step(params, net.batch())
        params = optax.apply_updates(
            params, jax.tree.map(lambda g: -GOLDEN["lr"] * g, grads)
        )
        seen.append(net.flat(params))
    np.testing.assert_allclose(np.stack(seen), GOLDEN[golden], **TIGHT)


def test_eight_devices_are_eight_groups():
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    groups = m_sharpness_value_and_grad(net.loss_fn, group_size=2, **BOTH)
    _, want = groups(net.params(), net.batch())
    f = gnp_value_and_grad(net.loss_fn, axis_name="d", sync_perturbation=False, **BOTH)
    spread = jax.shard_map(
        lambda p, b: f(p, b)[1], mesh=mesh, in_specs=(P(), P("d")), out_specs=P()
    )
    chex.assert_trees_all_close(
        jax.jit(spread)(net.params(), net.batch()), want, **TIGHT
    )


def test_bfloat16_parts_are_summed_in_float32():
    x = jnp.ones((256, 1), jnp.bfloat16)
    loss_fn = lambda w, x: jnp.mean(x @ w)
    f = full_batch_value_and_grad(loss_fn, num_micro_batches=256, alpha=0, radius=0.1)
    value, grads = f(jnp.full((1,), 1.0, jnp.bfloat16), x)
    assert grads.dtype == jnp.bfloat16
    assert float(value) == float(grads[0]) == 1.0  # a sum in bfloat16 stops at 256


@pytest.mark.parametrize(
    "make",
    [
        lambda f: full_batch_value_and_grad(f, num_micro_batches=2, **BOTH),
        lambda f: micro_batch_value_and_grad(f, num_micro_batches=2, **BOTH),
        lambda f: m_sharpness_value_and_grad(f, group_size=8, **BOTH),
    ],
    ids=["full", "micro", "groups"],
)
def test_further_arguments_reach_every_part_in_one_trace(make):
    scaled = lambda at, batch, scale: scale * net.loss_fn(at, batch)
    f = jax.jit(make(scaled))
    value, grads = make(net.loss_fn)(net.params(), net.batch())
    for scale in (3.0, 5.0):
        got = f(net.params(), net.batch(), scale)
        want = jax.tree.map(lambda leaf, c=scale: c * leaf, (value, grads))
        chex.assert_trees_all_close(got, want, rtol=1e-10)
    assert f._cache_size() == 1
