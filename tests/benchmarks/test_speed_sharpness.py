"""What the speed of sharpness compares: steps, their counts, the verdict."""

import copy
import json
import math

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

from benchmarks import sharpness_sides as sides
from benchmarks import timing
from benchmarks.sharpness_sides import (
    AVERAGE,
    EVERY,
    EXACT,
    GRADIENT,
    MESA,
    OPAQUE,
    PENALTY,
    PERIODIC,
    SAF,
    SAM,
    SGD,
    TRANSPARENT,
    WIDE,
)
from benchmarks.speed import sharpness as speed


@pytest.fixture(scope="module")
def net():
    return sides.wide_net(layers=2, width=6, batch_size=4, seed=0)


@pytest.fixture(scope="module")
def running(net):
    return sides.loops(net)


@pytest.fixture(scope="module")
def apart(net, running):
    return sides.disagreement(net, running)


def fresh(net, loop, calls=1):
    """Starts a compiled loop again and gives the parameters after some calls."""
    loop.carry = jax.tree.map(jnp.copy, (net.params, loop.side.start(net.params)))
    for _ in range(calls):
        loop()
    return jax.tree.map(jnp.copy, loop.carry[0])


def test_first_steps_are_what_their_names_say(net, running, apart):
    del apart  # which needs the loops untouched
    gradient = jax.jit(lambda at: jax.grad(net.loss_fn)(at, net.batch))
    grads = gradient(net.params)
    norm = optax.tree.norm(grads)
    unit = jax.tree.map(lambda g: g / norm, grads)
    add = lambda tree, scale, other: jax.tree.map(
        lambda a, b: a + scale * b, tree, other
    )
    ahead = gradient(add(net.params, 0.05, unit))
    norm_of = lambda at: optax.tree.norm(gradient(at))
    expected = {
        SGD: grads,
        SAM: ahead,
        OPAQUE: ahead,
        TRANSPARENT: ahead,
        PENALTY: jax.tree.map(lambda g, a: 0.2 * g + 0.8 * a, grads, ahead),
        EXACT: add(grads, 0.04, jax.jit(jax.grad(norm_of))(net.params)),
    }
    for name, direction in expected.items():
        found = fresh(net, running[name])
        right = add(net.params, -sides.RATE, direction)
        chex.assert_trees_all_close(found, right, rtol=1e-5, atol=1e-6)
        moved = add(found, -1.0, net.params)
        slope = jax.tree.map(lambda m: m / -sides.RATE, moved)
        gap = float(optax.tree.norm(add(slope, -1.0, direction)))
        assert gap < 1e-3 * float(optax.tree.norm(direction)), name


def test_a_period_is_one_penalised_step_and_plain_ones(net, running, apart):
    del apart
    found = fresh(net, running[PERIODIC])
    loop = running[PENALTY]
    fresh(net, loop)
    params, (_, state) = loop.carry
    carry = jax.tree.map(jnp.copy, (params, state))
    for _ in range(EVERY - 1):
        carry = running[SGD].step(carry, net.batch)
    chex.assert_trees_all_close(found, carry[0], rtol=1e-5)
    assert (running[PERIODIC].side.calls, running[PERIODIC].side.steps) == (5, 5)
    assert (running[TRANSPARENT].side.calls, running[TRANSPARENT].side.steps) == (2, 1)


def test_sides_agree_and_would_be_seen_to_differ(net, running, apart):
    assert max(apart[OPAQUE], apart[TRANSPARENT]) <= sides.TOLERANCE
    assert apart[SGD] > 100 * sides.TOLERANCE
    assert set(apart) == {OPAQUE, TRANSPARENT, SGD}
    for name in (SAM, OPAQUE, TRANSPARENT, SGD):
        loop = running[name]
        loop.carry = jax.tree.map(jnp.copy, (net.params, loop.side.start(net.params)))
    with pytest.raises(ValueError, match="nothing to compare"):
        sides.disagreement(net, running | {OPAQUE: running[PENALTY]})


def test_periodic_samples_are_per_step(running, monkeypatch):
    given = {name: [10.0] for name in (*running, SGD + timing.AGAIN)}
    measured = lambda *args, **options: timing.Timings(given, {})
    monkeypatch.setattr(timing, "measure", measured)
    found = speed.step_samples(running, speed.PRESETS["small"])
    assert found.pop(PERIODIC) == [2.0]
    assert set(map(tuple, found.values())) == {(10.0,)}


def test_losses_from_the_past_are_counted():
    net = sides.digits_net("MLP-S", batch_size=32, seed=0)
    free = sides.free_flops(net, examples=40)
    assert 1 < free[SAF] / free[GRADIENT] < 1.05
    # Forward 2 (F1 + F2 + F3) on top of 2 (2 F1 + 3 F2 + 3 F3), F the sizes.
    sizes = 64 * 64, 64 * 64, 64 * 10
    forward, both = sum(sizes), 3 * sum(sizes) - sizes[0]
    assert free[MESA] / free[GRADIENT] == pytest.approx(1 + forward / both, rel=0.01)
    assert free[AVERAGE] <= 3 * net.size + 10


def test_text_net_has_two_windows_and_learns_from_chance():
    net = sides.text_net(seed=0, width=8, layers=1, heads=2, context=16)
    assert net.batch[0].shape == (2, 16)
    loss = jax.jit(net.loss_fn)(net.params, net.batch)
    assert float(loss) == pytest.approx(math.log(98), abs=1)
    assert (net.name, net.apply_fn) == ("GPT-S", None)
    assert net.bytes == 4 * net.size


def samples(**times):
    named = {SGD: 1.0, OPAQUE: 2.0, TRANSPARENT: 2.1, PENALTY: 2.0, SAM: 2.0} | times
    return {name: [time] * 3 for name, time in named.items()} | {
        SGD + timing.AGAIN: [0.99, 1.0, 1.01]
    }


def record(net):
    flops = {SGD: 10.0, PENALTY: 20.1, SAM: 20.0, EXACT: 29.0, TRANSPARENT: 10.5}
    return {
        "case": {"net": net, "what": "memory" if net == WIDE else "steps"},
        "samples": samples(),
        "flops": flops if net != "GPT-S" else flops | {EXACT: 30.1},
        "free": {}
        if net in (WIDE, "GPT-S")
        else {GRADIENT: 100.0, SAF: 101.0, MESA: 139.0, AVERAGE: 1.0},
        "temporary": {SGD: 13, PENALTY: 200, SAM: 100, EXACT: 204},
        "bytes": 100,
        "dtype": "float32",
        "shapes": {"inputs": [8, 5], "parameters": [25]},
        "apart": {OPAQUE: 1e-7, TRANSPARENT: 1e-7, SGD: 0.1},
    }


@pytest.fixture
def records():
    return {net: record(net) for net in ("CNN", "GPT-S", "MLP-S", WIDE)}


def word(records):
    return speed.verdict([*records.values()]).word


def test_verdict_is_shown_where_everything_is_kept(records):
    found = speed.verdict([*records.values()])
    assert found.word == "shown"
    assert "CNN 2.00 and 2.00" in found.why
    records[WIDE]["temporary"][PENALTY] = 200.4  # 2.00 to two decimals
    # No slower than theirs, whatever SGD's spread.
    records["CNN"]["samples"][SGD + timing.AGAIN] = [0.9, 0.95, 0.97]
    # MLP-S is not among the timed nets.
    records["MLP-S"]["samples"] = samples(**{PENALTY: 3.0, SAM: 2.0})
    assert word(records) == "shown"


BROKEN = [
    ("CNN", "samples", PENALTY, [2.06] * 3),
    ("GPT-S", "samples", PENALTY, [2.06] * 3),
    ("CNN", "samples", SAM, [2.06] * 3),
    ("GPT-S", "samples", SGD, [0.97] * 3),
    ("MLP-S", "samples", OPAQUE, [1.9] * 3),
    ("GPT-S", "samples", OPAQUE, [1.9] * 3),
    ("CNN", "samples", TRANSPARENT, [1.9] * 3),
    ("MLP-S", "flops", PENALTY, 20.3),
    ("GPT-S", "flops", SAM, 20.3),
    ("CNN", "flops", EXACT, 29.6),
    ("MLP-S", "flops", EXACT, None),
    ("GPT-S", "flops", PENALTY, None),
    ("CNN", "free", SAF, 106.0),
    ("MLP-S", "free", MESA, 141.0),
    ("MLP-S", "free", MESA, None),
    (WIDE, "temporary", PENALTY, 201),
    (WIDE, "temporary", SAM, 201),
    (WIDE, "temporary", SAM, None),
]


@pytest.mark.parametrize(("net", "field", "name", "value"), BROKEN)
def test_verdict_is_not_shown_where_one_limit_breaks(records, net, field, name, value):
    records[net][field][name] = value
    assert word(records) == "not shown"


@pytest.mark.parametrize("net", ["CNN", "GPT-S", WIDE])
def test_verdict_needs_every_net(records, net):
    del records[net]
    assert word(records) == "not shown"


def test_verdict_is_reversed_where_sam_is_slower_everywhere(records):
    for made in records.values():
        made["samples"] |= {OPAQUE: [1.9] * 3, TRANSPARENT: [1.9] * 3}
    assert word(records) == "reversed"
    records["CNN"]["samples"][OPAQUE] = [2.0] * 3
    assert word(records) == "not shown"


def test_operations_are_those_of_a_step_of_training(records):
    one = records["CNN"]
    assert speed.operations(one, SGD) == 1
    assert speed.operations(one, TRANSPARENT) == pytest.approx(2.1)
    # Four plain steps and one of 2.01.
    assert speed.operations(one, PERIODIC) == pytest.approx(6.01 / 5)
    assert speed.operations(one, MESA) == pytest.approx(1.39)
    assert speed.operations(one, OPAQUE) is None
    assert speed.memory(one, EXACT) == pytest.approx(2.04)
    assert speed.OPERATIONS[PERIODIC] == pytest.approx(1 + 1.02 / EVERY)


def test_tables_and_picture_from_a_run(records):
    full = [copy.deepcopy(one) for one in records.values()]
    for one in full:
        every = (SGD, PENALTY, SAM, EXACT, PERIODIC, OPAQUE, TRANSPARENT)
        one["samples"] |= {EXACT: [3.0] * 3, PERIODIC: [1.2] * 3}
        one["flops"] = {name: one["flops"].get(name) for name in every}
    json.dumps(full, allow_nan=False)
    times, counts = speed.tables(full)
    assert len(times.rows) == 3 * 7
    limited = {row[:2]: row[3] for row in counts.rows if row[3]}
    assert limited["CNN", EXACT] == "2.950"
    assert ("GPT-S", EXACT) not in limited
    assert limited["GPT-S", PENALTY] == "2.020"
    assert [row[5] for row in counts.rows if row[5]] == ["2.00"] * 2
    assert speed.draw(full).axes
