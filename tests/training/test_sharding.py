"""Plans cut a training state by its paths; what is cut trains as what is whole."""

import pathlib
import runpy

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from jaxlab.training import (
    Checkpoints,
    ShardingPlan,
    data_parallel,
    make_mesh,
    shard,
    tensor_parallel,
)

WORKERS = pathlib.Path(__file__).parent / "workers"
COMPOSED = runpy.run_path(str(WORKERS / "composed.py"))
SMALL = ShardingPlan(rules=tensor_parallel().rules, smallest=8)


def test_factors_and_moments_are_cut_with_their_parameters():
    state = COMPOSED["make"]("gnp + fishleg")[2]
    mesh = make_mesh(fsdp=2, tensor=2)
    cut = {
        jax.tree_util.keystr(path, simple=True, separator="/"): tuple(s.spec)
        for path, s in jax.tree_util.tree_leaves_with_path(SMALL.shardings(state, mesh))
    }
    both = ("tensor", "fsdp")
    assert cut["params/blocks/feedforward/up/w1"] == (None, both, None, None)
    factors = [v for k, v in cut.items() if k.endswith("up/w1/left")]
    assert factors == [(None, both, None, None, None)]


def test_the_first_rule_that_divides_counts():
    plan = ShardingPlan(
        rules=(("w", P("fsdp", None)), ("w", P(None, "fsdp"))), smallest=1
    )
    mesh = make_mesh(fsdp=8)
    assert plan.spec("w", (8, 3), mesh) == P("fsdp", None)
    assert plan.spec("w", (3, 8), mesh) == P(None, "fsdp")
    assert plan.spec("w", (3, 5), mesh) == P()
    assert plan.spec("other", (16, 8, 3), mesh) == P("fsdp", None, None)


def test_what_eight_devices_wrote_four_and_one_read(tmp_path):
    tree = {"up": {"kernel": jnp.arange(256.0).reshape(16, 16)}}
    eight = shard(tree, make_mesh(fsdp=4, tensor=2), SMALL)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, eight)
        checkpoints.wait()
        four = make_mesh(fsdp=4, devices=jax.devices()[:4])
        for like in (shard(tree, four, SMALL), tree):
            found = checkpoints.restore(like, must_exist=True).state
            np.testing.assert_array_equal(found["up"]["kernel"], tree["up"]["kernel"])
            assert found["up"]["kernel"].sharding == like["up"]["kernel"].sharding


def test_twenty_steps_on_eight_devices_equal_one():
    whole = COMPOSED["train"](name="adamw").state.params
    cut = COMPOSED["train"](make_mesh(), data_parallel(), name="adamw").state.params
    total = lambda x: float(np.sum(np.square(x)))
    square = lambda tree: sum(map(total, jax.tree.leaves(tree)))
    apart = jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), whole, cut)
    assert square(apart) ** 0.5 <= 1e-5 * square(whole) ** 0.5
