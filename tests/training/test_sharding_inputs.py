"""What meshes and plans refuse, and in which words."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from jaxlab.training import (
    ShardingPlan,
    batch_sharding,
    fully_sharded,
    init_sharded,
    make_mesh,
    shard,
)

pytestmark = pytest.mark.untyped
TREE = {"w": jnp.ones((64, 64))}


def _mesh():
    return make_mesh(fsdp=8)


def _ruled(spec):
    return ShardingPlan(rules=(("w", spec),)).shardings(TREE, _mesh())


CASES = {
    "product": (lambda: make_mesh(data=3, fsdp=3), "number of devices, 8"),
    "two open": (lambda: make_mesh(data=-1, fsdp=-1), "one of them may be -1"),
    "zero": (lambda: make_mesh(fsdp=0), "integers >= 1"),
    "float": (lambda: make_mesh(fsdp=2.0), "integers >= 1"),
    "bool": (lambda: make_mesh(fsdp=True), "integers >= 1"),
    "no devices": (lambda: make_mesh(devices=[]), "at least one"),
    "no pair": (lambda: ShardingPlan(rules=("w",)), "a rule is a pair"),
    "no expression": (lambda: ShardingPlan(rules=(("(", P()),)), "regular expression"),
    "smallest": (lambda: ShardingPlan(smallest="all"), "smallest must be an integer"),
    "rest": (lambda: ShardingPlan(rest="x").shardings(TREE, _mesh()), "no axis of the"),
    "axis": (lambda: _ruled(P("x")), "which the mesh lacks"),
    "long": (lambda: _ruled(P("fsdp", None, None)), "has 3 axes"),
    "other mesh": (
        lambda: batch_sharding(jax.make_mesh((8,), ("x",))),
        "needs an axis",
    ),
    "no mesh": (lambda: batch_sharding(8), "must be a Mesh"),
    "swapped": (
        lambda: shard(TREE, fully_sharded(), _mesh()),
        "must be a ShardingPlan",
    ),
    "string": (lambda: shard({"w": "x"}, _mesh(), fully_sharded()), "got str at w"),
    "number": (lambda: shard({"w": 1.0}, _mesh(), fully_sharded()), "got float at w"),
    "no function": (
        lambda: init_sharded(TREE, mesh=_mesh(), plan=fully_sharded()),
        "must be a function",
    ),
}


@pytest.mark.parametrize(("wrong", "words"), CASES.values(), ids=CASES)
def test_wrong_input_is_refused_in_words(wrong, words):
    with pytest.raises(ValueError, match=words):
        wrong()


def test_an_empty_tree_stays_one():
    assert shard({}, _mesh(), fully_sharded()) == {}
