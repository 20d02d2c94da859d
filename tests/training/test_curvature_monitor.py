"""The monitor against known eigenvalues; its file, its picture, restarts."""

import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlab.likelihoods import Gaussian
from jaxlab.objective import Objective, plain
from jaxlab.training import CurvatureMonitor, EpochInfo, create_state, fit
from jaxlab.training import curvature as module

KEY = jax.random.key(0)
OBJECTIVE = Objective(plain(lambda w, x: x @ w), Gaussian())
EIGENVALUES = np.r_[3.0, 2.0, np.linspace(1, 0.1, 38)]
ROWS, SIZE = 48, len(EIGENVALUES)
OPTIMIZER = optax.sgd(0.3)
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def data():
    """Linear regression, whose Hessian X^T X / n has the eigenvalues above."""
    draw = np.random.default_rng(0).normal
    u, _ = np.linalg.qr(draw(size=(ROWS, SIZE)))
    v, _ = np.linalg.qr(draw(size=(SIZE, SIZE)))
    x = (u * np.sqrt(ROWS * EIGENVALUES)) @ v.T
    y = x @ draw(size=(SIZE, 1)) / SIZE**0.5
    return x.astype(np.float32), y.astype(np.float32)


def start(seed=0):
    return create_state(jax.random.key(seed), jnp.zeros((SIZE, 1)), OPTIMIZER)


def train(data, monitor, epochs, state=None, **options):
    options = {"epochs": epochs, "batch_size": 12, "progress": False} | options
    state = start() if state is None else state
    return fit(OBJECTIVE, OPTIMIZER, state, data, callbacks=[monitor], **options)


def read(path):
    return [json.loads(line) for line in pathlib.Path(path).read_text().splitlines()]


def steps(records):
    return [record["step"] for record in records]


def test_a_record_by_hand_is_what_algebra_says(data):
    monitor = CurvatureMonitor(OBJECTIVE, data, key=KEY, tol=1e-4)
    w = jnp.full((SIZE, 1), 0.1)
    found = monitor.record(7, w)
    assert found["sharpness"] == pytest.approx(3, rel=1e-5)
    np.testing.assert_allclose(found["eigenvalues"], [3, 2], rtol=1e-4)
    assert max(found["residuals"]) <= 3e-4
    wanted = EIGENVALUES.sum()
    assert abs(found["trace"] - wanted) < 5 * found["trace_standard_error"]
    x, y = (np.asarray(part, float) for part in data)
    rest = x @ np.full((SIZE, 1), 0.1) - y
    assert found["grad_norm"] == pytest.approx(
        np.linalg.norm(x.T @ rest / ROWS), rel=1e-4
    )
    loss = float(OBJECTIVE.loss(w, (), data)[0])
    assert found["loss"] == pytest.approx(loss, rel=1e-5)
    assert (found["step"], found["warm"]) == (7, False)
    assert "epoch" not in found
    assert monitor.records == [found]


def test_earlier_vectors_save_products(data):
    monitor = CurvatureMonitor(OBJECTIVE, data, key=KEY, refresh=3)
    w = jnp.zeros((SIZE, 1))
    found = [monitor.record(step, w + 0.01 * step) for step in range(5)]
    assert [record["warm"] for record in found] == [False, True, True, False, True]
    cold, warm = found[0]["num_products"], found[1]["num_products"]
    # Two vectors and two products more; 8 are for the trace.
    assert warm <= 8 + 4 < cold
    for record in found:
        assert record["sharpness"] == pytest.approx(3, rel=1e-3)
    never = CurvatureMonitor(OBJECTIVE, data, key=KEY, refresh=None)
    assert all(never.record(step, w)["warm"] is (step > 0) for step in range(3))


def test_both_ends_of_the_spectrum(data):
    monitor = CurvatureMonitor(
        OBJECTIVE, data, key=KEY, k=3, which="both", tol=1e-4, num_matvecs=2
    )
    found = monitor.record(1, jnp.zeros((SIZE, 1)))
    np.testing.assert_allclose(found["eigenvalues"], [3, 2, 0.1], rtol=1e-3)
    assert found["sharpness"] == found["eigenvalues"][0]


def test_fit_end_to_end(data, tmp_path):
    path, picture = tmp_path / "logs" / "curvature.jsonl", tmp_path / "plots" / "c.png"
    monitor = CurvatureMonitor(
        OBJECTIVE, data, key=KEY, every=10, path=path, picture=picture
    )
    result = train(data, monitor, 9)  # of 4 steps
    # The first ends of epochs at or after 10, 20 and 30.
    found = read(path)
    assert steps(found) == [12, 20, 32]
    assert [record["epoch"] for record in found] == [3, 5, 8]
    assert found == monitor.records
    for record in found:
        assert record["sharpness"] == pytest.approx(3, rel=1e-3)
    assert found[2]["loss"] < found[1]["loss"] < found[0]["loss"]
    assert found[2]["grad_norm"] < found[0]["grad_norm"]
    # What the step measured before its update, up to the noise of batches.
    assert result.history["loss"][-1] < found[0]["loss"]
    assert picture.read_bytes()[:8] == PNG
    assert [p.name for p in picture.parent.iterdir()] == ["c.png"]


def test_a_restart_goes_on_as_if_undisturbed(data, tmp_path):
    times = lambda records: [
        {name: x for name, x in record.items() if name != "time"} for record in records
    ]
    options = {"key": KEY, "refresh": 1}  # no vectors, which a restart has lost
    path, other = tmp_path / "one.jsonl", tmp_path / "other.jsonl"
    train(data, CurvatureMonitor(OBJECTIVE, data, path=path, **options), 6)
    folder = tmp_path / "checkpoints"
    first = CurvatureMonitor(OBJECTIVE, data, path=other, **options)
    train(data, first, 3, checkpoint_dir=folder)
    # Killed after the checkpoint of step 12, in the middle of a line.
    with other.open("a") as file:
        file.write('{"step": 16, "sharpness": 99}\n{"step": 20, "sharp')
    again = CurvatureMonitor(OBJECTIVE, data, path=other, **options)
    train(data, again, 6, checkpoint_dir=folder)
    assert steps(read(other)) == [4, 8, 12, 16, 20, 24]
    assert times(read(other)) == times(read(path))
    assert again.records == read(other)


def test_a_line_is_cut_even_where_no_record_is_due(data, tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 4}\n{"step": 8}\n{"step": 12}\n')
    monitor = CurvatureMonitor(OBJECTIVE, data, key=KEY, every=100, path=path)
    monitor(EpochInfo(2, 8, start(), {}))
    assert steps(read(path)) == [4] == steps(monitor.records)


def test_going_back_replaces_what_came_later(data, tmp_path):
    path = tmp_path / "log.jsonl"
    monitor = CurvatureMonitor(OBJECTIVE, data, key=KEY, path=path)
    w = jnp.zeros((SIZE, 1))
    for step in (1, 2, 3, 2):
        last = monitor.record(step, w)
    assert steps(monitor.records) == steps(read(path)) == [1, 2]
    assert last["warm"] is False


def test_keeps_nothing_of_a_state_and_few_records(data, monkeypatch):
    monkeypatch.setattr(module, "_KEPT", 4)
    monitor = CurvatureMonitor(OBJECTIVE, data, key=KEY)
    for step in range(1, 8):
        w = jnp.full((SIZE, 1), float(step))
        monitor.record(step, w)
        w.delete()  # as a step does that was given the buffers
    assert len(monitor.records) <= 4
    assert monitor.records[-1]["step"] == 7
    held = [x for x in jax.tree.leaves(vars(monitor)) if isinstance(x, jax.Array)]
    sizes = sorted(x.size for x in held if x.ndim)
    assert sizes == sorted([2 * SIZE, ROWS * SIZE, ROWS])


def test_what_is_not_finite_is_null_and_starts_afresh(data, tmp_path):
    path, picture = tmp_path / "log.jsonl", tmp_path / "c.png"
    # At zero its Hessian is that of the linear model.
    objective = Objective(plain(lambda w, x: jnp.sin(x @ w)), Gaussian())
    monitor = CurvatureMonitor(objective, data, key=KEY, path=path, picture=picture)
    zero = jnp.zeros((SIZE, 1))
    monitor.record(1, zero)
    bad = monitor.record(2, zero * jnp.nan)
    names = ("loss", "grad_norm", "sharpness", "trace")
    assert [bad[name] for name in names] == [None] * 4
    assert bad["eigenvalues"] == [None, None]
    good = monitor.record(3, zero)
    assert good["sharpness"] == pytest.approx(3, rel=1e-3)
    assert not good["warm"]
    assert read(path) == monitor.records
    assert picture.read_bytes()[:8] == PNG


def test_a_stream_and_a_model_with_state(data):
    x, y = data
    seen = []

    def apply_fn(params, state, inputs, *, key, train):
        seen.append(train)
        return state["scale"] * (inputs @ params["w"]), state

    stream = lambda: iter([(x[:30], y[:30]), (x[30:], y[30:])])
    objective = Objective(apply_fn, Gaussian())
    monitor = CurvatureMonitor(objective, stream, key=KEY, k=1, num_matvecs=2)
    params, state = {"w": jnp.zeros((SIZE, 1))}, {"scale": jnp.float32(2)}
    assert monitor.record(1, params, state)["sharpness"] == pytest.approx(12, rel=1e-3)
    assert not any(seen)


def test_nothing_compiles_again(data):
    traces = []

    def counted(w, x):
        traces.append(1)
        return x @ w

    monitor = CurvatureMonitor(
        Objective(plain(counted), Gaussian()), data, key=KEY, k=1, num_matvecs=2
    )
    for step in (1, 2):  # cold, then warm
        monitor.record(step, jnp.zeros((SIZE, 1)))
    before = len(traces)
    for step in (3, 4):
        monitor.record(step, jnp.ones((SIZE, 1)))
    assert len(traces) == before


def test_eight_devices(data):
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, P("d"))
    monitor = CurvatureMonitor(
        OBJECTIVE, jax.device_put(data, sharding), key=KEY, every=4
    )
    train(data, monitor, 2, batch_size=24, data_sharding=sharding)
    assert steps(monitor.records) == [4]
    assert monitor.records[0]["sharpness"] == pytest.approx(3, rel=1e-3)


def test_the_figure(data):
    monitor = CurvatureMonitor(OBJECTIVE, data, key=KEY)
    assert len(monitor.figure().axes) == 3  # before the first record too
    for step in (1, 2):
        monitor.record(step, jnp.full((SIZE, 1), 1 / step))
    sharpness, trace, losses = monitor.figure().axes
    assert sharpness.lines[-1].get_ydata() == pytest.approx([3, 3], rel=1e-3)
    assert list(trace.lines[0].get_xdata()) == [1, 2]
    assert losses.get_yscale() == "log"


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"every": 0}, "every must be an integer >= 1 or None, got 0"),
        ({"refresh": 1.5}, "refresh must be an integer >= 1 or None, got 1.5"),
        ({"which": "smallest"}, 'which must be "largest" or "both", .* got \'smal'),
    ],
)
def test_options(options, said):
    with pytest.raises(ValueError, match=said):
        CurvatureMonitor(OBJECTIVE, (), key=KEY, **options)


def test_says_what_a_picture_needs(data, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    CurvatureMonitor(OBJECTIVE, data, key=KEY)
    with pytest.raises(ImportError, match="needs matplotlib for its picture"):
        CurvatureMonitor(OBJECTIVE, data, key=KEY, picture="c.png")
