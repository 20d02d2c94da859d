"""What the devices send each other in a training step: kinds, bytes, how often."""

import pathlib
import re
import runpy
from collections import Counter

import jax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks import hlo
from jaxlab.training import batch_sharding, make_mesh, make_train_step

WORKERS = pathlib.Path(__file__).parent / "workers"
COMPOSED = runpy.run_path(str(WORKERS / "composed.py"))


def compiled(plan, name):
    sizes, plan = COMPOSED["PLANS"][plan]
    mesh = make_mesh(**sizes)
    rows, whole = batch_sharding(mesh), NamedSharding(mesh, P())
    made = COMPOSED["make"](name, activation_sharding=rows)
    objective, optimizer, state, data = made
    step = make_train_step(objective, optimizer, jit=False)
    places = plan.shardings(state, mesh)
    batch = tuple(
        jax.ShapeDtypeStruct((COMPOSED["BATCH"], *leaf.shape[1:]), leaf.dtype)
        for leaf in data
    )
    jitted = jax.jit(
        step,
        in_shardings=(places, (rows, rows)),
        out_shardings=(places, whole),
        donate_argnums=0,
    )
    text = jitted.lower(state, batch).compile().as_text()
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state.params))
    return text, hlo.Program(text).messages(), size


def sent(messages, size):
    """Gives times and bytes of each kind; bytes in sizes of the params."""
    times, bytes_ = Counter(), Counter()
    for message in messages:
        times[message.kind] += message.times
        bytes_[message.kind] += message.size * message.times / size
    return {kind: (times[kind], bytes_[kind]) for kind in times}


# Loops of FishLeg whose length only the run knows count once.
# Data parallel: one sum of the gradient at a point, inside and outside the two layers.
# Fully sharded: params are gathered for the forward and again for the backward pass (a
# layer is computed again), gradients are summed once; XLA for CPUs has no
# reduce-scatter.
PINNED = {
    ("data_parallel", "adamw"): {"all-reduce": (3, 1.044)},
    ("data_parallel", "gnp + adamw"): {"all-reduce": (6, 2.087)},
    ("data_parallel", "fishleg"): {"all-reduce": (7, 2.087)},
    ("fully_sharded", "adamw"): {
        "all-gather": (72, 1.822),
        "all-to-all": (2, 0.047),
        "all-reduce": (4, 1.005),
    },
    ("fully_sharded", "gnp + adamw"): {
        "all-gather": (144, 3.644),
        "all-to-all": (4, 0.095),
        "all-reduce": (10, 2.010),
    },
    ("fully_sharded", "fishleg"): {
        "all-gather": (387, 13.557),
        "all-to-all": (44, 0.493),
        "all-reduce": (72, 3.124),
        "collective-permute": (39, 0.223),
    },
    ("tensor_parallel", "adamw"): {
        "all-gather": (73, 3.320),
        "all-to-all": (16, 0.806),
        "all-reduce": (29, 1.260),
        "collective-permute": (48, 0.265),
    },
    ("tensor_parallel", "gnp + adamw"): {
        "all-gather": (146, 6.640),
        "all-to-all": (32, 1.613),
        "all-reduce": (53, 2.521),
        "collective-permute": (96, 0.530),
    },
}
LONG = [case for case in PINNED if case[1] == "fishleg"]


@pytest.mark.parametrize(
    ("plan", "name"),
    [pytest.param(*c, marks=[pytest.mark.soak] * (c in LONG)) for c in PINNED],
)
def test_the_messages_of_a_step(plan, name):
    text, messages, size = compiled(plan, name)
    found, expected = sent(messages, size), PINNED[plan, name]
    assert found.keys() == expected.keys(), found
    for kind, (times, bytes_) in expected.items():
        assert found[kind] == (
            pytest.approx(times, rel=0.1, abs=1),
            pytest.approx(bytes_, rel=0.1),
        ), (kind, found)
    # A device holds its own rows of every activation, except where it looks all
    # tokens of the batch up in its part of a table that is cut along the width.
    rows, time, width = (COMPOSED[size] for size in ("BATCH", "TIME", "WIDTH"))
    assert not re.findall(rf"f32\[{rows},{time},[^\]]*\]", text)
    flat = re.findall(rf"f32\[{rows * time}(?:,[\d,]*)?\]", text)
    assert max(map(hlo.size_of, flat), default=0) < 4 * rows * time * width / 4


def test_gradients_are_summed_once():
    _, messages, size = compiled("data_parallel", "adamw")
    assert {message.kind for message in messages} == {"all-reduce"}
    assert size <= sum(m.size * m.times for m in messages) < 1.1 * size
