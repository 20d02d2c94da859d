"""What the speed of curvature compares: yardsticks, peers, counts, verdicts."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import curvature_sides as sides
from benchmarks import curvature_tables as shown
from benchmarks import timing
from benchmarks.speed import curvature as speed
from jaxlab.curvature.dense import full_matrix
from jaxlab.curvature.lanczos import lanczos, ritz


@pytest.fixture(scope="module")
def net():
    return sides.digits_net("64-16-10", examples=24, steps=2, seed=0)


def test_exact_trace_is_that_of_the_matrix(net):
    expected = np.trace(np.asarray(full_matrix(net.ggn, net.params)))
    assert sides.exact_ggn_trace(net, rows=5) == pytest.approx(expected, rel=1e-4)


def test_deflated_power_finds_the_largest_pairs_and_counts(net):
    expected = np.linalg.eigvalsh(np.asarray(full_matrix(net.ggn, net.params)))[::-1]
    run = lambda most: sides.deflated_power(net.ggn, net.start(0), 1e-3, k=2, most=most)
    values, residuals, found, spent = run(400)
    assert (int(found), int(spent) < 400) == (2, True)
    np.testing.assert_allclose(values, expected[:2], rtol=1e-3)
    assert max(residuals) <= 1e-3 * values[0]
    assert int(run(3)[3]) == 3


def test_least_order_agrees_with_lanczos(net):
    result = lanczos(net.ggn, net.start(0), order=30)
    bound = 1e-3 * float(ritz(result)[0][-1])
    order = speed._least_order(result.alpha, result.beta[:-1], bound, 3)
    enough = lambda m: max(ritz(lanczos(net.ggn, net.start(0), order=m))[2][-3:])
    assert enough(order) <= 1.01 * bound
    assert enough(order - 1) > 0.99 * bound


def test_sides_that_differ_are_not_timed(net):
    result = lanczos(net.ggn, net.start(0), order=8)
    other = (None, result.alpha, result.beta[:-1])
    gaps = speed._gaps({speed.OURS: result, speed.MATFREE: other})
    assert gaps[speed.MATFREE] < 1e-6
    wrong = (None, result.alpha + 0.01 * jnp.max(result.alpha), result.beta[:-1])
    with pytest.raises(ValueError, match="nothing to compare"):
        speed._gaps({speed.OURS: result, speed.MATFREE: wrong})


def test_pyhessian_sees_the_same_net():
    peer = speed.peer("pyhessian_lanczos", "pyhessian")
    if peer is None:
        pytest.skip("needs pyhessian")
    net = sides.digits_net("CNN 4", examples=24, steps=2, seed=0)
    values = peer.lanczos(net, 24)()
    top = ritz(lanczos(net.hessian, net.start(0), order=24))[0][-1]
    assert values[-1] == pytest.approx(float(top), rel=1e-3)


def test_memory_is_measured_in_a_process_of_its_own():
    sizes = {"width": 16, "layers": 1, "heads": 2, "context": 16}
    found = speed.worker.call("memory", limit=8 * 10**9, order=4, sizes=sizes)
    assert found["documented"] == 11 * 4 * found["parameters"]
    assert found["orthogonality"] < 1e-5
    with pytest.raises(RuntimeError, match="failed"):
        speed.worker.call("memory", limit=8 * 10**9, order=0, sizes=sizes)


def record(net, ours, matfree):
    samples = {
        shown.GRADIENT: [1.0, 1.0],
        shown.GRADIENT + timing.AGAIN: [1.0, 1.01],
        shown.OURS: [ours, ours],
        shown.MATFREE: [matfree, matfree],
    }
    return {"case": {"net": net, "what": "steps"}, "samples": samples}


@pytest.mark.parametrize(
    ("ours", "matfree", "word"),
    [
        ((2.0, 1.5), (3.0, 10.0), "shown"),
        ((2.2, 1.5), (3.0, 10.0), "not shown"),
        ((2.0, 1.5), (1.9, 10.0), "not shown"),
        ((2.0, 1.5), (1.9, 1.4), "reversed"),
    ],
)
def test_verdict_needs_limit_and_lead_on_every_net(ours, matfree, word):
    nets = zip(("MLP-M", "CNN"), ours, matfree, strict=True)
    assert speed.verdict([record(*net) for net in nets]).word == word


def test_every_part_has_a_table(net):
    tiny = dataclasses.replace(
        speed.PRESETS["small"], parts=("compilation",), compilations=1
    )
    quiet = lambda done: None
    made = speed._compilation(net, tiny, quiet)
    json.dumps(made, allow_nan=False)
    (table,) = speed.tables([made])
    assert [row[0] for row in table.rows][:2] == [shown.OURS, shown.OURS_128]
    assert set(speed.PARTS) | {"steps"} == set(shown._MAKERS)
