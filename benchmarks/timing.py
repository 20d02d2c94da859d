"""Times several callables side by side, so that a ratio means something.

Each callable is compiled and warmed up, then timed once a round. A sample repeats the
call until it lasts ``sample_seconds`` and waits for every result inside the timed
region. The order rotates from round to round and every other round runs backwards, so
drift and neighbours meet all alike. The baseline runs twice, as if it were two: the
ratio of the two, which should be 1, shows the spread inside which a ratio is no result.

Minima say what the machine can do, medians what it did; the ratio of two callables is
the median of the ratios within each round, with its quartiles.
"""

import functools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

AGAIN = " again"  # the baseline's second appearance
MOST = 2**20  # calls in a sample, should a clock stand still


class Quartiles(NamedTuple):
    lower: float
    median: float
    upper: float

    def __str__(self) -> str:
        return f"{self.median:.2f} [{self.lower:.2f}, {self.upper:.2f}]"


class Timings(NamedTuple):
    samples: dict[str, list[float]]  # seconds per call, one entry a round
    repeats: dict[str, int]  # calls in one sample


def order_of(names: Sequence[str], index: int) -> list[str]:
    """Gives the order of round ``index``: rotated by pairs, odd rounds backwards.

    Examples:
      >>> [order_of("abc", i) for i in range(3)]
      [['a', 'b', 'c'], ['c', 'b', 'a'], ['b', 'c', 'a']]
    """
    shift = (index // 2) % len(names)
    order = [*names[shift:], *names[:shift]]
    return order[::-1] if index % 2 else order


def interleave(
    samplers: Mapping[str, Callable[[], float]], *, baseline: str, rounds: int
) -> dict[str, list[float]]:
    """Takes one sample of everything in every round, the baseline twice.

    Args:
      samplers: functions that run something and return the seconds of one call of it.
      baseline: the name that appears a second time as ``f"{baseline} again"``.
      rounds: samples of each.

    Returns:
      The samples by name, in the order of the rounds.

    Raises:
      ValueError: if ``baseline`` is not among the names or ``rounds`` is below 1.
    """
    if baseline not in samplers:
        raise ValueError(f"baseline must be one of {list(samplers)}, got {baseline!r}.")
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}.")
    samplers = {**samplers, baseline + AGAIN: samplers[baseline]}
    samples: dict[str, list[float]] = {name: [] for name in samplers}
    for index in range(rounds):
        for name in order_of(list(samplers), index):
            samples[name].append(samplers[name]())
    return samples


def measure(
    calls: Mapping[str, Callable[[], Any]],
    *,
    baseline: str,
    rounds: int = 20,
    sample_seconds: float = 8e-3,
    clock: Callable[[], float] = time.perf_counter,
    wait: Callable[[Any], Any] = jax.block_until_ready,
) -> Timings:
    """Times callables in alternation, the baseline twice.

    Args:
      calls: functions of no arguments, by name; each returns what is to be waited for.
      baseline: the name that appears a second time as ``f"{baseline} again"``.
      rounds: samples of each callable.
      sample_seconds: the least length of a sample; calls repeat until they fill it.
      clock: seconds; a test passes its own.
      wait: called on every result inside the timed region.

    Returns:
      Seconds per call of every round, and the calls in a sample.

    Raises:
      ValueError: if ``baseline`` is not among ``calls`` or ``rounds`` is below 1.
    """

    def seconds(call: Callable[[], Any], repeats: int) -> float:
        start = clock()
        for _ in range(repeats):
            wait(call())
        return (clock() - start) / repeats

    samplers, repeats = {}, {}
    for name, call in calls.items():
        wait(call())  # compiles
        once = min(seconds(call, 1) for _ in range(3))
        count = max(1, math.ceil(sample_seconds / max(once, 1e-7)))
        # The first calls may be slower than the later ones: grow until it is full.
        while count < MOST and seconds(call, count) * count < sample_seconds:
            count *= 2
        repeats[name] = count
        samplers[name] = functools.partial(seconds, call, count)
    samples = interleave(samplers, baseline=baseline, rounds=rounds)
    return Timings(samples, repeats)


def quartiles(values: Sequence[float]) -> Quartiles:
    """Computes the lower quartile, the median and the upper quartile.

    Examples:
      >>> quartiles([1.0, 2.0, 3.0, 4.0, 5.0])
      Quartiles(lower=2.0, median=3.0, upper=4.0)
    """
    if len(values) == 1:
        return Quartiles(values[0], values[0], values[0])
    return Quartiles(*statistics.quantiles(values, n=4, method="inclusive"))


def ratio(samples: Mapping[str, Sequence[float]], top: str, bottom: str) -> Quartiles:
    """Compares two callables round by round: quartiles of ``top / bottom``.

    Examples:
      >>> ratio({"a": [2.0, 9.0, 4.0], "b": [1.0, 3.0, 2.0]}, "a", "b").median
      2.0
    """
    pairs = zip(samples[top], samples[bottom], strict=True)
    return quartiles([above / below for above, below in pairs])


def same_pair(samples: Mapping[str, Sequence[float]], baseline: str) -> Quartiles:
    """Compares the baseline with itself: the spread that means nothing."""
    return ratio(samples, baseline + AGAIN, baseline)


def beyond(measured: Quartiles, same: Quartiles) -> int:
    """Says whether a ratio lies above (1), below (-1) or inside (0) the A/A spread."""
    return (measured.median > same.upper) - (measured.median < same.lower)


def best(samples: Mapping[str, Sequence[float]], name: str) -> float:
    """Gives the shortest time of a callable, over both runs if it is the baseline."""
    return min([*samples[name], *samples.get(name + AGAIN, [])])
