"""Times of several ways to do the same work, taken in turns so that what slows the machine slows all of them alike.

Enters: closures by name. Leaves: a `Timing` for each. Holds: every round samples every contestant once, and each round
begins with another one; a sample repeats a short closure until the clock's own cost no longer counts. Where threads are
used, a pause before each sample lets those of the contestant before fall asleep, as they spin for a while after their
work on the CPUs that the next one needs; a short closure then runs once unmeasured, which wakes its own.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from statistics import quantiles
from typing import Any

Run = Callable[[], Any]
Clock = Callable[[], float]

SAMPLE_S = 2e-3
"""A sample lasts at least about this long."""
BUDGET_S = 1.0
"""Time for the samples of one contestant, about."""
ROUNDS = 9
FEWEST = 3
MAX_ROUNDS = 40
SETTLED_S = 0.05
"""A call that takes so long has nothing to look up that matters."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds for one call. low_s, high_s: the quartiles, between which half of the samples lie. samples: how many.
    repeats: calls in each sample."""

    median_s: float
    low_s: float
    high_s: float
    samples: int
    repeats: int

    @property
    def spread(self) -> float:
        """Distance of the quartiles over the median."""
        return (self.high_s - self.low_s) / self.median_s if self.median_s else 0.0


def timing_of(samples: Sequence[float], repeats: int) -> Timing:
    """A Timing from seconds for one call, at least one of them."""
    if len(samples) == 1:
        return Timing(samples[0], samples[0], samples[0], 1, repeats)
    low, middle, high = quantiles(samples, n=4, method="inclusive")
    return Timing(middle, low, high, len(samples), repeats)


def turns(names: Sequence[str], rounds: int) -> Iterator[str]:
    """The order of samples: each round has every name once, and begins one name later than the round before."""
    for number in range(rounds):
        start = number % len(names)
        yield from names[start:]
        yield from names[:start]


def rotating(runs: Sequence[Run], places: Iterator[int] | None = None) -> Run:
    """A closure that calls one of `runs` after another, over and over: for data that shall not be in a cache. places:
    the number of the next one, by which contestants take turns at the same data: else one finds in a large last cache
    what another has just read."""
    if len(runs) == 1:
        return runs[0]
    numbers = cycle(range(len(runs))) if places is None else places

    def run() -> None:
        runs[next(numbers)]()

    return run


def copies_to_be_cold(size_bytes: int, cache_bytes: int) -> int:
    """How many copies of data, used in turn, make each one leave a cache before it comes again: twice the cache."""
    return max(1, math.ceil(2 * cache_bytes / max(1, size_bytes)))


def measure(
    contestants: Mapping[str, Run], *, sample_s: float = SAMPLE_S, budget_s: float = BUDGET_S, rounds: int = ROUNDS,
    settle_s: float = 0.0, clock: Clock = time.perf_counter,
) -> dict[str, Timing]:
    """Time each closure.

    contestants: name -> what is timed; each is called a few times before. sample_s: the least length of a sample.
    budget_s: wanted time for each contestant's samples. rounds: the fewest samples of each, or FEWEST where that would
    take more than four times the budget. settle_s: the pause before each sample. clock: seconds.
    """
    repeats: dict[str, int] = {}
    slowest_s = 0.0
    for name, run in contestants.items():
        if settle_s:
            time.sleep(settle_s)
        run()
        count, taken = 1, _sample(run, 1, clock)
        if taken < SETTLED_S:  # the second and third call may still look up what later ones need not
            taken = min(taken, _sample(run, 1, clock), _sample(run, 1, clock))
        while taken < sample_s / 4:
            count *= 4 if taken < sample_s / 16 else 2
            taken = _sample(run, count, clock)
        repeats[name] = max(1, math.ceil(count * sample_s / taken)) if taken < sample_s else count
        slowest_s = max(slowest_s, taken / count * repeats[name])
    if slowest_s:
        # Slow ones get fewer rounds, but FEWEST; quick ones more.
        fewest = min(rounds, max(FEWEST, int(4 * budget_s / slowest_s)))
        rounds = max(fewest, min(MAX_ROUNDS, int(budget_s / slowest_s)))
    samples: dict[str, list[float]] = {name: [] for name in contestants}
    for name in turns(tuple(contestants), rounds):
        count = repeats[name]
        if settle_s:
            time.sleep(settle_s)
            if count > 1:
                contestants[name]()
        samples[name].append(_sample(contestants[name], count, clock) / count)
    return {name: timing_of(samples[name], repeats[name]) for name in contestants}


def _sample(run: Run, count: int, clock: Clock) -> float:
    start = clock()
    for _ in range(count):
        run()
    return clock() - start
