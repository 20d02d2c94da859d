"""The timing helper, on clocks that the test owns."""

import itertools

import pytest

from benchmarks import timing
from benchmarks.timing import Quartiles


class Clock:
    """A clock that moves only when somebody works."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def work(self, seconds, log=None, name=None):
        def call():
            self.now += seconds
            if log is not None:
                log.append(name)

        return call


def test_measure_recovers_the_time_of_a_call_and_fills_the_sample():
    clock = Clock()
    timings = timing.measure(
        {"slow": clock.work(0.004), "fast": clock.work(0.0001)},
        baseline="slow",
        rounds=4,
        sample_seconds=0.008,
        clock=clock,
        wait=lambda _: None,
    )
    assert timings.repeats["slow"] == 2
    assert 80 <= timings.repeats["fast"] <= 160
    assert timings.samples["slow"] == pytest.approx([0.004] * 4)
    assert timings.samples["slow again"] == pytest.approx([0.004] * 4)
    assert timings.samples["fast"] == pytest.approx([0.0001] * 4)


def test_measure_warms_up_before_it_counts():
    clock, calls = Clock(), itertools.count()

    def compiles_first():
        clock.now += 5.0 if next(calls) == 0 else 0.01

    timings = timing.measure(
        {"f": compiles_first}, baseline="f", rounds=3, clock=clock, wait=lambda _: None
    )
    assert timings.samples["f"] == pytest.approx([0.01] * 3)
    assert timings.repeats == {"f": 1}


def test_a_call_that_gets_faster_still_fills_its_sample():
    clock, calls = Clock(), itertools.count()

    def work():
        clock.now += 0.01 if next(calls) < 4 else 0.001

    timings = timing.measure(
        {"f": work},
        baseline="f",
        rounds=2,
        sample_seconds=0.008,
        clock=clock,
        wait=lambda _: None,
    )
    assert timings.repeats["f"] * timings.samples["f"][0] >= 0.008


def test_every_result_is_waited_for_inside_the_timed_region():
    clock = Clock()

    def wait(result):
        clock.now += result  # the device finishes only here

    timings = timing.measure(
        {"f": lambda: 0.01}, baseline="f", rounds=2, clock=clock, wait=wait
    )
    assert timings.samples["f"] == pytest.approx([0.01, 0.01])


def test_rounds_rotate_and_run_backwards():
    names = ["a", "b", "c", "d"]
    orders = [timing.order_of(names, index) for index in range(8)]
    assert all(sorted(order) == names for order in orders)
    for there, back in zip(orders[::2], orders[1::2], strict=True):
        assert back == there[::-1]
    # Over a full turn everything stands in every place equally often.
    for place in range(4):
        column = [order[place] for order in orders]
        assert all(column.count(name) == 2 for name in names)


def test_drift_does_not_touch_the_ratio_of_equals():
    clock = Clock()

    def work():
        clock.now += 0.01 * (1 + clock.now)  # everything gets slower as time goes by

    timings = timing.measure(
        {"a": work, "b": work},
        baseline="a",
        rounds=40,
        sample_seconds=0.0,
        clock=clock,
        wait=lambda _: None,
    )
    assert timing.ratio(timings.samples, "a", "b").median == pytest.approx(1, abs=0.01)
    assert timing.same_pair(timings.samples, "a").median == pytest.approx(1, abs=0.01)


def test_interleave_runs_the_baseline_twice_a_round():
    log = []
    samplers = {name: lambda name=name: log.append(name) or 1.0 for name in "ab"}
    samples = timing.interleave(samplers, baseline="b", rounds=3)
    assert set(samples) == {"a", "b", "b again"}
    assert log.count("a") == 3
    assert log.count("b") == 6


def test_ratio_pairs_the_rounds():
    samples = {"a": [1.0, 10.0, 100.0], "b": [2.0, 20.0, 200.0]}
    assert timing.ratio(samples, "b", "a") == Quartiles(2.0, 2.0, 2.0)


def test_beyond_is_zero_inside_the_spread():
    same = Quartiles(0.9, 1.0, 1.1)
    place = lambda median: timing.beyond(Quartiles(0.0, median, 9.0), same)
    assert [place(x) for x in (0.8, 0.9, 1.0, 1.1, 1.2)] == [-1, 0, 0, 0, 1]


def test_best_takes_both_runs_of_the_baseline():
    samples = {"a": [3.0, 2.0], "a again": [1.0, 4.0], "b": [5.0]}
    assert timing.best(samples, "a") == 1.0
    assert timing.best(samples, "b") == 5.0


@pytest.mark.parametrize(
    ("baseline", "rounds", "message"),
    [("c", 2, "baseline must be one of"), ("a", 0, "rounds must be at least 1, got 0")],
)
def test_bad_arguments_are_named(baseline, rounds, message):
    with pytest.raises(ValueError, match=message):
        timing.measure(
            {"a": lambda: None},
            baseline=baseline,
            rounds=rounds,
            sample_seconds=0.0,
        )
