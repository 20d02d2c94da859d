"""Verdicts follow from the numbers by the rule that they state."""

import pytest

from benchmarks.claims import monarch as claim
from benchmarks.speed import fit_loop
from benchmarks.speed import monarch as speed


def claim_records(errors):
    """Makes records of chosen test errors: structure -> method -> errors."""
    return [
        {
            "case": {"structure": structure, "method": method},
            "samples": {
                "0.1": {"validation": [1.0] * len(test), "test": [0.0] * len(test)},
                "0.01": {"validation": [0.5] * len(test), "test": test},
            },
        }
        for structure, methods in errors.items()
        for method, test in methods.items()
    ]


GOOD = {claim.MONARCH: [1e-4, 2e-4], claim.LOW_RANK: [0.1, 0.2], claim.NARROW: [1, 1]}


@pytest.mark.parametrize(
    ("word", "errors"),
    [
        ("shown", {"monarch": GOOD, "dft": GOOD}),
        # One teacher falls short of the factor, though no seeds cross.
        ("not shown", {"monarch": GOOD, "dft": GOOD | {claim.LOW_RANK: [1e-3, 1e-3]}}),
        # A bad seed crosses, though the medians are far apart.
        ("not shown", {"monarch": GOOD | {claim.MONARCH: [1e-4, 1e-4, 0.3]}}),
        ("not shown", {"a": GOOD, "b": GOOD | {claim.MONARCH: [9.0, 9.0]}}),
        ("reversed", {"monarch": GOOD | {claim.MONARCH: [0.5, 0.5]}}),
    ],
)
def test_claim_monarch(word, errors):
    assert claim.verdict(claim_records(errors)).word == word


def test_the_rate_is_chosen_on_validation_and_not_on_test():
    (record,) = claim_records({"monarch": {claim.MONARCH: [0.3]}})
    assert claim.chosen(record) == ("0.01", [0.3])


def speed_record(dense, again, ours):
    samples = {speed.DENSE: dense, speed.DENSE + " again": again, speed.OURS: ours}
    return {"samples": samples, "case": {"n": 8, "nblocks": 4, "mode": "forward"}}


FAST = speed_record([2.0, 2.0], [2.1, 1.9], [1.0, 1.0])
SLOW = speed_record([2.0, 2.0], [2.1, 1.9], [3.0, 3.0])
NOISE = speed_record([2.0, 2.0], [2.5, 1.5], [1.9, 1.9])


@pytest.mark.parametrize(
    ("word", "records"),
    [
        ("shown", [FAST, FAST]),
        ("not shown", [FAST, SLOW]),
        ("not shown", [FAST, NOISE]),
        ("reversed", [SLOW]),
    ],
)
def test_speed_monarch(word, records):
    assert speed.verdict(records).word == word


def test_the_bound_is_the_best_dense_time_over_the_flop_ratio():
    assert speed.bound(FAST) == pytest.approx(1.9 * 2 / 4)


def loop_record(numpy_fed, device_fed, again=1.0):
    samples = {
        fit_loop.FIT: [1.0, 1.0],
        fit_loop.NUMPY: [numpy_fed] * 2,
        fit_loop.NUMPY + " again": [again * numpy_fed, numpy_fed / again],
        fit_loop.DEVICE: [device_fed] * 2,
    }
    return {"samples": samples, "case": {"model": "m"}}


@pytest.mark.parametrize(
    ("word", "records"),
    [
        ("shown", [loop_record(1.2, 1.0), loop_record(1.3, 1.1)]),
        ("shown", [loop_record(1.2, 0.97, again=1.1)]),  # inside the A/A spread
        ("not shown", [loop_record(1.2, 0.9, again=1.01)]),
        ("not shown", [loop_record(1.2, 1.1), loop_record(1.1, 1.1)]),
        ("not shown", [loop_record(1.2, 1.1, again=2.0)]),  # nothing but noise
        ("reversed", [loop_record(0.8, 0.7)]),
    ],
)
def test_fit_loop(word, records):
    assert fit_loop.verdict(records).word == word
