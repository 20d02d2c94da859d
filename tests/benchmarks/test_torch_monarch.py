"""The authors' product in torch: the same function, and nobody else needs torch."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import environment, timing
from benchmarks.speed import monarch as speed
from jaxlab.structured import monarch_to_dense

SMALL = speed.PRESETS["small"]


@pytest.fixture
def peer():
    pytest.importorskip("torch", reason='needs torch: pip install "jaxlab[benchmarks]"')
    return speed.authors()


class Tick:
    """A progress bar that nobody watches."""

    def __init__(self, total, label):
        pass

    def __enter__(self):
        return lambda *_: None

    def __exit__(self, *_):
        pass


@pytest.fixture
def measure_once(monkeypatch):
    """Runs every call once, at 1 s, in place of timing it."""

    def measure(calls, *, baseline, **_):
        for call in calls.values():
            jax.block_until_ready(call())
        samples = {name: [1.0, 1.0] for name in (*calls, baseline + timing.AGAIN)}
        return timing.Timings(samples, dict.fromkeys(calls, 1))

    monkeypatch.setattr(timing, "measure", measure)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ((6, 8, 4), (12, 5, 4)),  # six sizes that differ; 12 does not divide 8
        ((2, 6, 5), (3, 7, 4)),  # rank 2
        ((4, 4, 4), (4, 4, 4)),
    ],
)
def test_equals_the_dense_product_and_its_gradients(peer, first, second, x64):
    keys = jax.random.split(jax.random.key(0), 4)
    w1, w2 = (jax.random.normal(k, s) for k, s in zip(keys, (first, second)))
    dense = np.asarray(monarch_to_dense(w1, w2))
    x = jax.random.normal(keys[2], (3, dense.shape[1]))
    dy = jax.random.normal(keys[3], (3, dense.shape[0]))
    (y,) = peer.as_jax(peer.forward_only(x, dy, w1, w2)())
    np.testing.assert_allclose(y, np.asarray(x) @ dense.T, rtol=0, atol=1e-12)
    found = peer.as_jax(peer.with_gradients(x, dy, w1, w2)())
    apply = lambda x, w1, w2: x @ monarch_to_dense(w1, w2).T
    _, pull = jax.vjp(apply, x, w1, w2)
    assert len(found) == 4
    for a, b in zip(found, (y, *pull(dy)), strict=True):
        assert a.dtype == b.dtype == jnp.float64
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-12)


def test_calls_repeat_with_the_same_result_and_touch_no_argument(peer):
    products, (x, dy) = speed.compared(16, 4, 5, seed=0)
    arguments = (x, dy, *products[speed.OURS][1])
    before = [np.array(a) for a in arguments]
    call = peer.with_gradients(*arguments)
    first, second = peer.as_jax(call()), peer.as_jax(call())
    for a, b in zip((*first, *before), (*second, *arguments), strict=True):
        np.testing.assert_array_equal(a, b)


def test_it_keeps_to_one_thread(peer):
    import torch

    before = torch.get_num_threads()
    products, (x, dy) = speed.compared(16, 4, 5, seed=0)
    try:
        for make in (peer.forward_only, peer.with_gradients):
            torch.set_num_threads(2)
            make(x, dy, *products[speed.OURS][1])
            assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_it_is_timed_compared_and_shown(peer, measure_once):
    records = list(speed.run(SMALL, Tick))
    assert [r["case"]["mode"] for r in records] == [speed.FORWARD, speed.BOTH]
    for record in records:
        assert speed.sides(record) == list(speed.SIDES)
        assert record["peers"][speed.AUTHORS].startswith("torch 2")
        assert record["disagreement"] <= speed.TOLERANCE
    table, multiples = map(str, speed.tables(records))
    assert table.count(f"| {speed.AUTHORS:>23} |") == 2
    assert "torch 2" in table
    assert f"{speed.AUTHORS}, {speed.BOTH}" in multiples
    labels = [text.get_text() for text in speed.draw(records).legends[0].texts]
    assert speed.AUTHORS in labels


@pytest.mark.parametrize("index", range(4))
def test_a_peer_that_computes_something_else_is_not_timed(
    peer, index, measure_once, monkeypatch
):
    right = peer.as_jax

    def wrong(results):
        results = list(right(results))
        if index < len(results):
            results[index] = 1.01 * results[index]
        return tuple(results)

    monkeypatch.setattr(peer, "as_jax", wrong)
    with pytest.raises(ValueError, match="nothing to compare"):
        list(speed.run(SMALL, Tick))


def test_without_torch_the_others_are_compared(measure_once, monkeypatch):
    monkeypatch.setattr(speed.importlib.util, "find_spec", lambda name: None)
    assert speed.authors() is None
    records = list(speed.run(SMALL, Tick))
    for record in records:
        assert speed.sides(record) == list(speed.SIDES[:-1])
        assert record["peers"] == {}
    older = [{k: v for k, v in r.items() if k != "peers"} for r in records]
    for text in map(str, (*speed.tables(records), *speed.tables(older))):
        assert "torch" not in text
    labels = [text.get_text() for text in speed.draw(records).legends[0].texts]
    assert speed.AUTHORS not in labels


def test_a_product_on_the_cpu_is_no_peer_on_an_accelerator(peer, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert speed.authors() is None


def test_importing_the_benchmark_imports_no_torch():
    code = (
        "import sys, benchmarks.speed.monarch; "
        "sys.exit(any(name.startswith('torch') for name in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=environment.ROOT)
    assert done.returncode == 0
