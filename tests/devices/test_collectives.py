"""What TPU chips send each other in a training step, by their compiler."""

import jax
import pytest
from jax.experimental import topologies

from benchmarks import devices, hlo
from benchmarks.estimates import at_size
from jaxlab import training

# Bytes that a chip sends by kind, late in training: GPT of width 256 and 2 layers, 128
# tokens in each of 4 sequences a chip, its state cut over 4 chips.
PINNED = {
    ("dense", "adamw"): {
        "all-gather": 5_750_784,
        "all-reduce": 11_544,
        "reduce-scatter": 2_801_664,
    },
    ("monarch", "gnp"): {
        "all-gather": 5_701_632,
        "all-reduce": 22_296,
        "all-to-all": 7_077_888,
        "collective-permute": 3_145_776,
        "reduce-scatter": 2_703_360,
    },
    ("dense", "fishleg"): {
        "all-gather": 25_853_952,
        "all-reduce": 109_890,
        "all-to-all": 491_520,
        "reduce-scatter": 7_471_104,
    },
}


@pytest.fixture(scope="module")
def little_effort():
    name = "jax_exec_time_optimization_effort"
    before = getattr(jax.config, name)
    jax.config.update(name, -1.0)
    yield
    jax.config.update(name, before)


@pytest.mark.usefixtures("little_effort")
@pytest.mark.parametrize(("mlp", "optimizer"), PINNED)
def test_bytes_sent_by_kind(tpu, mlp, optimizer):
    found = sent(mlp, optimizer)
    for kind, bytes_ in PINNED[mlp, optimizer].items():
        assert found.pop(kind, 0) == pytest.approx(bytes_, rel=0.1), kind
    assert not found


def sent(mlp, optimizer):
    devices.prepare()
    case = at_size.Case("toy", mlp, optimizer, 4)
    topology = topologies.get_topology_desc(
        platform="tpu", topology_name=at_size.TOPOLOGIES[4]
    )
    mesh = training.make_mesh(fsdp=4, devices=topology.devices)
    step, shapes, places = at_size.step_and_shapes(
        case, mesh, context=128, vocabulary=512
    )
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    jitted = jax.jit(
        step, in_shardings=places, out_shardings=(places[0], whole), donate_argnums=0
    )
    lowered = jitted.trace(*shapes).lower(lowering_platforms=("tpu",))
    program = hlo.Program(devices.compiled(lowered).as_text())
    found = {}
    for message in program.messages(open_loops=0):
        found[message.kind] = found.get(message.kind, 0.0) + message.sent
    return found
