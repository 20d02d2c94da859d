"""The claims about GPTs of Monarch layers: same conditions, and rules both ways."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from benchmarks import language, paired
from benchmarks.claims import (
    dense_to_monarch,
    monarch_language_model,
    monarch_to_dense,
)
from benchmarks.language import DENSE, LOW_RANK, MONARCH, NARROW
from jaxlab.likelihoods import Categorical
from jaxlab.training import from_nnx, reverse_sparsification

TINY = language.Setting(steps=5, **language.TINY)
FULL = monarch_language_model.PRESETS["full"]


@pytest.fixture(scope="module")
def text():
    return language.Text(TINY)


@pytest.fixture(scope="module")
def trainers(text):
    return {n: language.Trainer(f, text) for n, f in language.builders(TINY).items()}


# --- what is compared is comparable


def test_models_of_the_full_size_have_matched_parameters():
    counts = {n: language.count(f) for n, f in language.builders(FULL).items()}
    assert counts[DENSE] == language.dense_count(128, FULL) == 822_272
    assert counts[LOW_RANK] == counts[MONARCH] == 330_752
    assert abs(counts[NARROW] / counts[MONARCH] - 1) < 0.01


@pytest.mark.parametrize("shape", [(128, 128), (128, 512), (32, 24), (10, 7)])
def test_low_rank_has_no_fewer_parameters_and_hardly_more(shape):
    monarch = language.MonarchLinear(*shape, nblocks=4, rngs=nnx.Rngs(0))
    ours = monarch.w1.size + monarch.w2.size
    rank = language.matched_rank(*shape)
    assert ours <= rank * sum(shape) < ours + sum(shape)


def test_fresh_layers_of_all_kinds_keep_the_variance():
    x = jax.random.normal(jax.random.key(0), (64, 128))
    for make in (
        nnx.Linear,
        language.LowRankLinear,
        lambda *a, rngs: language.MonarchLinear(*a, nblocks=4, rngs=rngs),
    ):
        y = make(128, 512, rngs=nnx.Rngs(1))(x)
        assert float(jnp.std(y)) == pytest.approx(1.0, rel=0.1)


def test_flops_are_two_for_each_weight_that_multiplies():
    params = {
        "positions": jnp.ones((7, 8)),
        "embedding": {"embedding": jnp.ones((98, 8))},
        "layer": {"kernel": jnp.ones((8, 3)), "bias": jnp.ones(3)},
        "monarch": {"w1": jnp.ones((2, 3, 4)), "w2": jnp.ones((2, 5, 3))},
    }
    assert language.flops(params) == 2 * (98 * 8 + 8 * 3 + 24 + 30)


def test_batches_depend_on_stream_and_step_alone(text):
    again = language.Text(TINY)
    for stream, step in (((0,), 0), ((0, 1), 0), ((3,), 7)):
        for one, two in zip(
            text.batch(stream, step), again.batch(stream, step), strict=True
        ):
            np.testing.assert_array_equal(one, two)
    inputs, targets = text.batch((0,), 0)
    assert inputs.shape == (TINY.batch_size, TINY.context)
    np.testing.assert_array_equal(inputs[:, 1:], targets[:, :-1])
    for other in (((0,), 1), ((1,), 0), ((0, 1), 0)):
        assert not np.array_equal(inputs, text.batch(*other)[0])


def test_judged_and_tuning_seeds_do_not_meet():
    setting = dataclasses.replace(TINY, seeds=900, tuning_seeds=5)
    assert not set(setting.judged) & set(setting.tuning)


def test_schedule_warms_up_and_ends_at_a_tenth():
    """Reads the rate off Adam's steps: at a constant gradient they are the rate."""
    tx = language.optimizer(0.5, 40)
    params = jnp.zeros(1)
    state, rates = tx.init(params), []
    for _ in range(40):
        updates, state = tx.update(jnp.ones(1), state, params)
        rates.append(-float(updates[0]))
    np.testing.assert_allclose(rates[:4], [0.125, 0.25, 0.375, 0.5], rtol=1e-4)
    assert max(rates) == pytest.approx(0.5, rel=1e-4)
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[22] == pytest.approx(0.5 * (0.1 + 0.9 * 0.5), rel=1e-4)  # half-way
    assert 0.05 < rates[-1] < 0.055


def test_a_step_serves_every_rate_and_length(trainers):
    trainer = trainers[DENSE]
    for rate, steps in ((1e-3, 3), (1e-2, 4)):
        trainer.go_on(trainer.start(trainer.fresh(0), rate, steps), (0,), steps)
    assert trainer.step._cache_size() == 1


def test_an_interrupted_run_ends_where_an_undisturbed_one_does(trainers):
    trainer = trainers[MONARCH]
    start = lambda: trainer.start(trainer.fresh(0), 1e-2, 4)
    whole, _ = trainer.go_on(start(), (0,), 4)
    half, _ = trainer.go_on(start(), (0,), 2)
    assert int(half.step) == 2
    two, _ = trainer.go_on(half, (0,), 4)
    for one, other in zip(
        jax.tree.leaves(whole.params), jax.tree.leaves(two.params), strict=True
    ):
        np.testing.assert_array_equal(one, other)


def test_training_lowers_the_loss_and_divergence_leaves_a_number(trainers):
    trainer = trainers[LOW_RANK]
    params = trainer.fresh(0)
    before = trainer.loss(params, "test")
    found = trainer.outcome(trainer.start(params, 1e-2, 20), (0,), 20, before=100.0)
    assert found.test < before - 0.3
    assert found.seconds > 100
    found = trainer.outcome(trainer.start(params, 1e30, 3), (0,), 3)
    assert found.test == found.validation == paired.DIVERGED


# --- tuning and statistics


def test_a_sweep_tunes_on_its_own_seeds_and_judges_on_the_others():
    setting = dataclasses.replace(TINY, learning_rates=(0.1, 0.2, 0.3), seeds=3)
    calls, ticks = [], []

    def one(seed, rate):
        calls.append((seed, rate))
        # 0.2 is best on validation, 0.3 on test.
        return language.Outcome(abs(rate - 0.2), -rate, 1.0, {"seed": seed})

    samples, runs = language.sweep(one, setting, ticks.append)
    tuning = [(1000, 0.1), (1000, 0.2), (1000, 0.3)]
    assert calls == [*tuning, (0, 0.2), (1, 0.2), (2, 0.2)]
    assert samples["test"] == [-0.2] * 3
    assert samples["seconds"] == [1.0] * 3
    assert set(samples["tuning"]) == {"0.1", "0.2", "0.3"}
    assert runs[2, 0.2].params == {"seed": 2}
    assert len(ticks) == len(calls) == language.runs_of(setting)


def test_the_interval_is_students():
    # By hand: differences 1, 2, 3, 4, 5 have mean 3 and s = 1.5811; t = 2.7764.
    found = paired.difference([2.0, 3.0, 4.0, 5.0, 6.0], [1.0] * 5)
    assert found.mean == 3.0
    half = 2.776445 * 1.581139 / 5**0.5
    assert (found.lower, found.upper) == pytest.approx((3 - half, 3 + half), rel=1e-5)


def test_differences_are_paired_and_not_pooled():
    ours, theirs = [1.0, 5.0, 9.0], [1.1, 5.1, 9.1]
    assert paired.difference(ours, theirs).upper < 0
    assert paired.gaps(record(ours), record(theirs)) == pytest.approx([-0.1] * 3)


def test_noise_is_two_standard_deviations_of_the_test_loss():
    assert paired.noise(record([1.0, 2.0, 3.0])) == 2.0


# --- the switch


def test_switched_runs_are_those_of_reverse_sparsification(trainers, text, monkeypatch):
    """On one batch that returns every step: an epoch of the public function."""
    steps, rate = 10, 1e-2
    batch = text.batch((0,), 0)
    monkeypatch.setattr(text, "batch", lambda stream, step: batch)
    model = language.builders(TINY)[MONARCH](rngs=nnx.Rngs(0))
    first = monarch_to_dense.FirstPart(trainers[MONARCH], steps)
    ours = monarch_to_dense.switched(model, first(0, rate)[0], rate, steps)
    assert int(ours.step) == 9
    ours, _ = trainers[DENSE].go_on(ours, (0,), steps)

    start = trainers[MONARCH].start(trainers[MONARCH].fresh(0), rate, steps)
    expected = reverse_sparsification(
        model,
        start,
        batch,
        likelihood=Categorical(),
        optimizer=language.optimizer(rate, steps),
        epochs=steps,
        batch_size=TINY.batch_size,
        progress=False,
    )
    theirs = from_nnx(expected.model, Categorical()).params
    for params in (ours.params, theirs):  # its gradient is round-off, by the softmax
        params["blocks"][0]["attention"]["key"]["bias"] = jnp.zeros(TINY.width)
    # The rows of a batch come in another order, so sums round otherwise, and Adam
    # divides by gradients near 0: compared are whole trees, not entries.
    switched = monarch_to_dense.switched(model, first(0, rate)[0], rate, steps)
    moved = float(optax.tree.norm(optax.tree.sub(ours.params, switched.params)))
    apart = float(optax.tree.norm(optax.tree.sub(ours.params, theirs)))
    assert apart < 0.1 * moved  # by the last step, the only dense one


def test_the_first_part_runs_once_and_hands_out_copies(trainers):
    first = monarch_to_dense.FirstPart(trainers[MONARCH], 10)
    state, seconds = first(0, 1e-2)
    jax.tree.map(lambda leaf: leaf.delete(), state)
    again, same_seconds = first(0, 1e-2)
    assert same_seconds == seconds > 0
    assert int(again.step) == 9
    assert len(first.done) == 1


@pytest.mark.parametrize(("steps", "first"), [(400, 360), (10, 9), (2, 1), (15, 13)])
def test_the_switch_leaves_a_tenth_and_at_least_a_step(steps, first):
    assert monarch_to_dense.switch_step(steps) == first


# --- replaced layers


def test_every_layer_is_replaced_and_the_rest_stays(trainers):
    trained = trainers[DENSE].fresh(0)
    projected = dense_to_monarch.project(trained)
    svd = dense_to_monarch.low_rank_params(trained)
    mixed = dense_to_monarch.in_place_of(trained, trainers[MONARCH].fresh(1))
    for params, name in ((projected, MONARCH), (svd, LOW_RANK), (mixed, MONARCH)):
        shapes = jax.tree.map(jnp.shape, params)
        assert shapes == jax.tree.map(jnp.shape, trainers[name].fresh(0))
        assert params["positions"] is trained["positions"]
        bias = params["blocks"][0]["feedforward"]["up"]["bias"]
        assert bias is trained["blocks"][0]["feedforward"]["up"]["bias"]
    random = trainers[MONARCH].fresh(1)["blocks"][0]["attention"]["key"]["w1"]
    found = mixed["blocks"][0]["attention"]["key"]["w1"]
    np.testing.assert_array_equal(found, random)


def test_distance_is_that_of_the_best_approximations():
    rng = np.random.default_rng(0)
    kernels = [rng.standard_normal(shape) for shape in ((16, 16), (16, 64))]
    trained = {
        "linears": {
            i: {"kernel": jnp.asarray(k, jnp.float32), "bias": jnp.zeros(k.shape[1])}
            for i, k in enumerate(kernels)
        }
    }
    lost = 0.0
    for kernel in kernels:
        rank = language.matched_rank(*kernel.shape)
        lost += np.sum(np.linalg.svd(kernel, compute_uv=False)[rank:] ** 2)
    whole = sum(np.sum(k**2) for k in kernels)
    svd = dense_to_monarch.low_rank_params(trained)
    found = dense_to_monarch.distance(svd, trained)
    assert found == pytest.approx((lost / whole) ** 0.5, rel=1e-4)
    monarch = dense_to_monarch.project(trained)
    other = jax.tree.map(lambda leaf: 1.01 * leaf, monarch)
    assert dense_to_monarch.distance(monarch, trained) > 0
    assert dense_to_monarch.distance(monarch, trained) < dense_to_monarch.distance(
        other, trained
    )
    assert dense_to_monarch.distance(trained, trained) == 0
    broken = jax.tree.map(lambda leaf: jnp.nan * leaf, trained)
    for replace in (dense_to_monarch.project, dense_to_monarch.low_rank_params):
        found = dense_to_monarch.distance(replace(broken), broken)
        assert found == paired.DIVERGED


def test_planted_weights_lie_near_the_class_and_far_from_low_rank():
    found = {r["case"]["method"]: r for r in dense_to_monarch.planted(2)}
    ours, svd = (found[n] for n in (dense_to_monarch.PROJECTED, dense_to_monarch.SVD))
    assert ours["parameters"] == svd["parameters"] == 1_024
    assert found[DENSE]["parameters"] == 64**2
    assert max(ours["samples"]["before"]) < 1.1e-4
    for seed in range(2):
        data = dense_to_monarch.planted_structure(
            "monarch", noise_scale=0.01, seed=seed
        )
        lost = np.linalg.svd(data.extras["teacher"], compute_uv=False)[8:]
        least = np.sum(lost.astype(np.float64) ** 2) / 64 + 1e-4
        assert svd["samples"]["before"][seed] == pytest.approx(least, rel=0.1)


# --- verdicts


def record(test, **more):
    samples = {"test": test, "tuning": {"0.1": [1.0], "0.2": [0.5], "0.3": [0.7]}}
    return {"samples": samples | more.pop("samples", {}), **more}


DENSE_LOSSES = [2.00, 2.02, 2.01, 1.99, 1.98]  # noise 2 x 0.0158


def above(amount, jitter=0.001):
    """Makes losses above the dense ones by about as much at every seed."""
    return [
        x + amount + jitter * sign
        for x, sign in zip(DENSE_LOSSES, (1, -1, 0, 1, -1), strict=True)
    ]


def language_records(**less):
    """Makes records; an amount above dense for each model and budget."""
    amounts = {
        "steps": {MONARCH: 0.05, LOW_RANK: 0.1, NARROW: 0.1},
        "time": {MONARCH: 0.0, LOW_RANK: 0.1, NARROW: 0.1},
    }
    records = [record(DENSE_LOSSES, case={"budget": "steps", "method": DENSE})]
    for budget, methods in amounts.items():
        for method, amount in (methods | less.get(budget, {})).items():
            losses = amount if isinstance(amount, list) else above(amount)
            records.append(record(losses, case={"budget": budget, "method": method}))
    return records


@pytest.mark.parametrize(
    ("word", "less"),
    [
        ("shown", {}),
        ("shown", {"time": {MONARCH: 0.02}}),  # above dense, inside the noise
        ("not shown", {"time": {MONARCH: 0.04}}),  # beyond the noise
        ("not shown", {"time": {MONARCH: above(0.02, jitter=0.05)}}),  # too uncertain
        ("not shown", {"time": {LOW_RANK: -0.1}}),
        ("not shown", {"steps": {NARROW: 0.05}}),
        ("not shown", {"steps": {NARROW: above(0.07, jitter=0.1)}}),
        ("not shown", {"steps": {NARROW: [*above(0.1)[:4], paired.DIVERGED]}}),
        ("reversed", {"steps": {NARROW: 0.0}, "time": {LOW_RANK: -0.1}}),
    ],
)
def test_language_model(word, less):
    assert monarch_language_model.verdict(language_records(**less)).word == word


def switch_records(ours, saved=0.55):
    losses = ours if isinstance(ours, list) else above(ours)
    return [
        record(DENSE_LOSSES, case={"method": DENSE}, saved=0.0),
        record(losses, case={"method": monarch_to_dense.REVERSE}, saved=saved),
        record(above(0.1), case={"method": MONARCH}, saved=0.6),
    ]


@pytest.mark.parametrize(
    ("word", "ours"),
    [
        ("shown", 0.0),
        ("shown", 0.02),
        ("shown", -0.5),  # better than dense reaches it, too
        ("not shown", above(0.02, jitter=0.05)),
        ("not shown", above(0.04, jitter=0.02)),  # the interval holds the noise
        ("not shown", [*DENSE_LOSSES[:4], paired.DIVERGED]),
        ("reversed", 0.1),
    ],
)
def test_to_dense(word, ours):
    assert monarch_to_dense.verdict(switch_records(ours)).word == word


def test_a_switch_that_saves_little_does_not_show_the_claim():
    assert monarch_to_dense.verdict(switch_records(0.0, saved=0.4)).word == "not shown"


def start_records(planted=(0.1, 0.1, 0.1, 0.1, 0.1), **starts):
    module = dense_to_monarch
    amounts = {
        module.PROJECTED: 0.0,
        module.SVD: 0.05,
        module.RANDOM: 0.2,
        module.SCRATCH: 0.4,
        DENSE: -0.1,
    } | {getattr(module, name): amount for name, amount in starts.items()}
    records = [
        record(
            above(amount) if isinstance(amount, float) else amount,
            case={"task": module.GPT_TASK, "method": name},
            samples={"before": [3.0, 3.1, 3.2, 3.0, 3.1]},
        )
        for name, amount in amounts.items()
    ]
    errors = {module.PROJECTED: [0.01] * 5, module.SVD: list(planted)}
    return records + [
        {"case": {"task": module.PLANTED, "method": n}, "samples": {"before": e}}
        for n, e in errors.items()
    ]


@pytest.mark.parametrize(
    ("word", "records"),
    [
        ("shown", start_records()),
        # The dense model that goes on is a reference: it may be better.
        ("shown", start_records(DENSE=-1.0)),
        ("not shown", start_records(SVD=0.0)),
        ("not shown", start_records(SVD=above(0.05, jitter=0.1))),
        ("not shown", start_records(planted=(0.1, 0.1, 0.1, 0.1, 0.001))),
        ("reversed", start_records(SVD=-0.05)),
        ("reversed", start_records(RANDOM=-0.05)),
        ("reversed", start_records(SCRATCH=-0.05)),
    ],
)
def test_dense_to_monarch(word, records):
    assert dense_to_monarch.verdict(records).word == word


def test_rates_at_the_end_of_the_grid_are_named():
    setting = dataclasses.asdict(TINY)
    inside = record([1.0, 2.0], case={"method": "a"}, setting=setting)
    edge = record([1.0, 2.0], case={"method": "b c"}, setting=setting)
    edge["samples"]["tuning"] = {"0.1": [0.2], "0.2": [0.5]}
    assert "At an end" not in language.setting_note([inside])
    note = language.setting_note([inside, edge])
    assert "At an end of this grid: b c." in note
    assert "640 in all" in note
    assert "longer training is not shown" in note


def test_diverged_seeds_are_counted_and_drawn():
    assert paired.spread([1.0, paired.DIVERGED, paired.DIVERGED]) == "2 diverged"
    paired.draw_differences({"a": [1.0, paired.DIVERGED]}, xlabel="loss")
