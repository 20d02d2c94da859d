"""The claim on Hessian spectra: its nets, its counts, and the rule of its verdict."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import cluster_nets as nets
from benchmarks import hessian_records as found
from benchmarks import plots
from benchmarks.claims import hessian_spectra as claim

SEEDS = 5


def line(count, top, bulk):
    """Makes 30 eigenvalues that fall gently but for one gap after ``count``."""
    fall = 0.97 ** np.arange(30)
    return (np.where(np.arange(30) < count, top, bulk) * fall).tolist()


def spectrum(case, *, top=1.0, bulk=0.1, share=0.7):
    k, width, _ = case
    p = 30 * width
    samples = {
        "loss": [0.01] * SEEDS,
        "accuracy": [1.0] * SEEDS,
        "first": [line(k - 1, top, bulk)] * SEEDS,
        "last": [-0.01] * SEEDS,
        "bulk rms": [0.01] * SEEDS,
        "flat": [round(share * p)] * SEEDS,
        "random": [line(0, 1.0, 0.05)] * SEEDS,
        "ritz error": [1e-7] * SEEDS,
        "density error": [0.01] * SEEDS,
    }
    names = ("clusters", "width", "separation")
    return {
        "case": {"task": found.SPECTRUM, **dict(zip(names, case, strict=True))},
        "shapes": {"parameters": p},
        "samples": samples,
        "spectrum": line(k - 1, top, bulk),
        "density": [[0.0, 0.5, 1.0], [2.0, 1.0, 0.5], [0.1] * 3, [2.0, 1.0, 0.6]],
    }


def path(to, train, test):
    samples = {
        "train loss": [train] * SEEDS,
        "test loss": [test] * SEEDS,
        "train accuracy": [[1.0] * len(train)] * SEEDS,
        "test accuracy": [[0.97] * len(test)] * SEEDS,
        "distance": [3.0] * SEEDS,
        "from start": [9.0] * SEEDS,
        "sharpness": [[2.0, 1.0]] * SEEDS,
    }
    return {
        "case": {"task": found.PATH, "to": to},
        "shapes": {"layers": [64, 8, 8, 10]},
        "samples": samples,
    }


def records():
    made = {(k, 12, 1.0): spectrum((k, 12, 1.0)) for k in (2, 3, 5, 10)}
    for width, share in ((16, 0.72), (24, 0.75)):
        made[3, width, 1.0] = spectrum((3, width, 1.0), share=share)
    made[3, 12, 0.5] = spectrum((3, 12, 0.5), top=8.0, bulk=0.5)
    made[3, 12, 2.0] = spectrum((3, 12, 2.0), top=0.2, bulk=0.02)
    flat, wall = [0.1, 0.05, 0.01], [0.1, 2.0, 0.1]
    made[found.SMALL_BATCH] = path(found.SMALL_BATCH, flat, [0.3, 0.3, 0.31])
    made[found.OTHER_START] = path(found.OTHER_START, wall, wall)
    made[found.RANDOM] = path(found.RANDOM, [0.1, 0.3, 0.9], [0.1, 0.3, 0.9])
    options = {
        "descent": 300,
        "rate": 0.1,
        "large_steps": 5_000,
        "large_batch": 512,
        "small_batch": 16,
        "points": 3,
    }
    for record in made.values():
        record |= {"seed": list(range(SEEDS)), "options": options}
    return made


def judged(made):
    return claim.verdict(list(made.values()))


def test_all_parts_make_it_shown():
    why = judged(records()).why
    assert judged(records()).word == "shown"
    assert why.count("yes: ") == 9


BROKEN = {
    "a median count off": ((10, 12, 1.0), "first", [line(10, 1, 0.1)] * SEEDS, 2),
    "a narrow gap": ((10, 12, 1.0), "first", [line(9, 1.0, 0.4)] * SEEDS, 1),
    "a random matrix with outliers": ((2, 12, 1.0), "random", [line(1, 1, 0.1)], 1),
    "an outlier that moves with width": (
        (3, 24, 1.0),
        "first",
        [line(2, 1.2, 0.1)] * SEEDS,
        1,
    ),
    "an outlier that shrinks with width": (
        (3, 16, 1.0),
        "first",
        [[1.0, 0.8, *line(2, 1, 0.1)[2:]]] * SEEDS,
        1,
    ),
    "a bulk that does not grow": ((3, 24, 1.0), "flat", [345] * SEEDS, 1),
    "a share that falls": ((3, 24, 1.0), "flat", [500] * SEEDS, 1),
    "a bulk that shrinks in one seed": (
        (3, 24, 1.0),
        "flat",
        [540, 540, 540, 540, 300],
        1,
    ),
    "outliers that stay with separation": (
        (3, 12, 0.5),
        "first",
        [line(2, 3.5, 0.3)] * SEEDS,
        1,
    ),
    "a bulk that moves with separation": (
        (3, 12, 0.5),
        "bulk rms",
        [0.021] * SEEDS,
        1,
    ),
    "a barrier in one seed": (
        found.SMALL_BATCH,
        "train loss",
        [*[[0.1, 0.05, 0.01]] * 4, [0.1, 0.106, 0.01]],
        1,
    ),
    "a barrier in the test loss": (
        found.SMALL_BATCH,
        "test loss",
        [*[[0.3, 0.3, 0.3]] * 4, [0.3, 0.32, 0.3]],
        1,
    ),
    "no barrier elsewhere": (
        found.OTHER_START,
        "train loss",
        [*[[0.1, 2.0, 0.1]] * 4, [0.1, 0.19, 0.1]],
        1,
    ),
    "an estimate that is off": ((2, 12, 1.0), "ritz error", [1e-7] * 4 + [1e-4], 1),
}


@pytest.mark.parametrize("name", BROKEN)
def test_any_part_that_fails_makes_it_not_shown(name):
    made = copy.deepcopy(records())
    which, column, values, fails = BROKEN[name]
    made[which]["samples"][column] = values
    verdict = judged(made)
    assert verdict.word == "not shown"
    # A count that is off takes its gap along.
    assert verdict.why.count("no: ") == fails
    assert verdict.why.count("no: ") + verdict.why.count("yes: ") == 9


def test_a_fifth_of_the_counts_may_be_off_but_no_more():
    made = records()
    for k, word in ((2, "shown"), (3, "shown"), (5, "shown"), (10, "shown")):
        made[k, 12, 1.0] = copy.deepcopy(made[k, 12, 1.0])
        made[k, 12, 1.0]["samples"]["first"][0] = line(k, 1.0, 0.1)
        assert judged(made).word == word
    made[10, 12, 1.0]["samples"]["first"][1] = line(10, 1.0, 0.1)
    assert judged(made).word == "not shown"


def test_a_moving_bulk_and_a_barrier_reverse_it():
    made = records()
    made[3, 12, 0.5]["samples"]["bulk rms"] = [0.2] * SEEDS
    assert judged(made).word == "not shown"
    made[found.SMALL_BATCH]["samples"]["train loss"] = [[0.1, 0.3, 0.1]] * SEEDS
    assert judged(made).word == "reversed"


def test_tables_and_picture_come_from_the_records():
    spectra, estimates, paths = claim.tables(list(records().values()))
    counted = {row[0].split(",")[0]: row[3] for row in spectra.rows}
    assert counted["k = 10"] == "9 9 9 9 9"
    assert len(estimates.rows) == len(spectra.rows) == 8
    assert [row[4] for row in paths.rows] == ["1", "20", ""]
    assert len(claim.draw(list(records().values())).axes) == 6


# --- counts


def test_the_widest_gap_counts_and_what_is_flat_has_none():
    assert found.outliers([4.0, 3.9, 1.0, 0.9]) == 2
    # 1e-6 over 1e-12 is no gap: both count as 1e-3 of the largest.
    assert found.outliers([1.0, 0.5, 0.1, 1e-6, 1e-12, -1.0]) == 3
    assert found.gap_after([1.0, 0.5, 0.1, 1e-6], 3) == pytest.approx(100.0)


def test_the_random_matrix_has_the_trace_and_the_norm_and_no_gap():
    values = np.concatenate([[5.0, 3.0], np.linspace(0.2, -0.1, 200)])
    random = nets.random_spectrum(values, 0)
    assert np.sum(random) == pytest.approx(np.sum(values))
    assert np.sum(random**2) == pytest.approx(np.sum(values**2))
    assert found.outliers(values[:30]) == 2
    assert found.gap_after(random, found.outliers(random[:30])) < 1.5


# --- data, nets, spectra


def test_clusters_are_balanced_around_means_of_the_given_norm():
    x, y = nets.clusters(5, 2.0, 3)
    np.testing.assert_array_equal(np.bincount(y), [80] * 5)
    for label in range(5):
        mean = x[y == label].mean(axis=0)
        assert np.linalg.norm(mean) == pytest.approx(2.0, abs=0.2)
    assert np.mean((x - np.stack([x[y == c].mean(0) for c in y])) ** 2) * 20 == (
        pytest.approx(1.0, rel=0.05)
    )
    np.testing.assert_array_equal(x, nets.clusters(5, 2.0, 3)[0])
    assert not np.array_equal(x, nets.clusters(5, 2.0, 4)[0])


@pytest.fixture(scope="module")
def trained():
    x, y = nets.clusters(3, 1.0, 0)
    data = jnp.asarray(x), jnp.asarray(y)
    start = nets.init(jax.random.key(0), (20, 4, 4, 3))
    end = nets.descend(jax.random.key(1), start, data, 0.1, steps=100)
    return data, start, end


def test_descent_learns_on_all_rows_and_on_some(trained):
    data, start, end = trained
    some = nets.descend(jax.random.key(1), start, data, 0.1, steps=100, batch_size=32)
    for params in (end, some):
        assert nets.measured(params, data)[0] < 0.6 * nets.measured(start, data)[0]
    assert not np.array_equal(some[0]["w"], end[0]["w"])


def test_the_exact_spectrum_is_that_of_the_hessian_in_float64(trained, x64):
    data, _, params = trained
    values = nets.exact_spectrum(params, data)
    wide = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), params)
    flat, back = jax.flatten_util.ravel_pytree(wide)
    batch = jnp.asarray(data[0], jnp.float64), data[1]
    dense = jax.hessian(lambda theta: nets.loss_fn(back(theta), batch))(flat)
    expected = np.linalg.eigvalsh(dense)[::-1]
    np.testing.assert_allclose(values, expected, atol=1e-12)
    assert np.sum(np.abs(values) < 1e-14) >= 5  # equal shifts of all logits


def test_a_segment_begins_and_ends_at_the_solutions(trained):
    _, start, end = trained
    first, middle, last = nets.between(start, end, 3)
    for got, expected in ((first, start), (last, end)):
        jax.tree.map(np.testing.assert_array_equal, got, expected)
    halfway = (start[0]["w"] + end[0]["w"]) / 2
    np.testing.assert_allclose(middle[0]["w"], halfway, atol=1e-6)


def test_cases_differ_from_the_base_in_one_respect():
    listed = claim.cases(claim.PRESETS["full"])
    assert len(listed) == len(set(listed)) == 8
    for case in listed:
        assert sum(a != b for a, b in zip(case, found.BASE, strict=True)) <= 1


def test_the_picture_is_written(tmp_path):
    plots.save(claim.draw(list(records().values())), tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000
