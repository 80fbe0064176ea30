"""Interleaved measuring: who is called when, how often, and what comes out; on a clock of our own."""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle

import pytest

from sapper.tune import measure as measuring
from sapper.tune.measure import copies_to_be_cold, measure, rotating, timing_of, turns


class World:
    """A clock that only contestants move, and a log of their calls."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []

    def contestant(self, name: str, seconds: float) -> Callable[[], None]:
        def run() -> None:
            self.log.append(name)
            self.now += seconds
        return run

    def clock(self) -> float:
        return self.now


def test_each_round_has_every_name_and_begins_one_later() -> None:
    assert list(turns(["a", "b", "c"], 4)) == list("abc" "bca" "cab" "abc")


def test_samples_are_taken_in_turns() -> None:
    world = World()
    timings = measure({"a": world.contestant("a", 0.5), "b": world.contestant("b", 0.25)}, sample_s=0.1, budget_s=0.1,
                      rounds=3, clock=world.clock)
    assert "".join(world.log) == "aabb" + "ab" "ba" "ab"  # warm-up and estimate, then three rounds
    assert (timings["a"].median_s, timings["b"].median_s) == (0.5, 0.25)
    assert timings["a"].samples == timings["b"].samples == 3


def test_short_contestants_are_repeated_until_a_sample_is_long_enough() -> None:
    world = World()
    timings = measure({"a": world.contestant("a", 1e-5), "b": world.contestant("b", 3e-2)}, sample_s=1e-2, budget_s=0.1,
                      rounds=3, clock=world.clock)
    assert timings["a"].median_s == pytest.approx(1e-5)
    assert timings["a"].repeats * 1e-5 == pytest.approx(1e-2, rel=0.01)
    assert timings["b"].repeats == 1


@pytest.mark.parametrize("slow_calls", [1, 2, 3])
def test_calls_that_still_look_things_up_do_not_say_how_often_one_is_repeated(slow_calls: int) -> None:
    world = World()

    def run() -> None:
        world.log.append("a")
        world.now += 9e-3 if len(world.log) <= slow_calls else 1e-5

    timing = measure({"a": run}, sample_s=1e-2, budget_s=0.1, rounds=3, clock=world.clock)["a"]
    assert timing.median_s == pytest.approx(1e-5) and timing.repeats * 1e-5 == pytest.approx(1e-2, rel=0.01)


def test_slow_contestants_get_few_rounds_and_quick_ones_many() -> None:
    world = World()
    assert measure({"a": world.contestant("a", 10.0)}, clock=world.clock)["a"].samples == measuring.FEWEST
    assert measure({"a": world.contestant("a", 1e-3)}, clock=world.clock)["a"].samples == measuring.MAX_ROUNDS


def test_a_pause_comes_before_every_sample_and_a_short_one_wakes_its_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()
    monkeypatch.setattr(measuring.time, "sleep", lambda seconds: world.log.append(f"({seconds})"))
    measure({"a": world.contestant("a", 0.5), "b": world.contestant("b", 0.25)}, sample_s=0.5, budget_s=0.1, rounds=1,
            settle_s=0.1, clock=world.clock)
    pause = "(0.1)"
    assert world.log[-6:] == [pause, "a", pause, "b", "b", "b"]  # a once; b once unmeasured, then twice


def test_timing() -> None:
    timing = timing_of([5.0, 1.0, 2.0, 4.0, 3.0], 7)
    assert (timing.median_s, timing.low_s, timing.high_s, timing.samples, timing.repeats) == (3.0, 2.0, 4.0, 5, 7)
    assert timing.spread == pytest.approx(2 / 3)
    assert timing_of([2.0], 1).spread == 0.0


def test_rotating_goes_round() -> None:
    log: list[int] = []
    run = rotating([lambda i=i: log.append(i) for i in range(3)])
    for _ in range(7):
        run()
    assert log == [0, 1, 2, 0, 1, 2, 0]


def test_contestants_take_turns_at_the_same_data() -> None:
    log: list[tuple[str, int]] = []
    places = cycle(range(3))
    one, other = (rotating([lambda i=i, n=name: log.append((n, i)) for i in range(3)], places) for name in "ab")
    for run in (one, one, other, other, one):
        run()
    assert log == [("a", 0), ("a", 1), ("b", 2), ("b", 0), ("a", 1)]


@pytest.mark.parametrize(("size", "cache", "count"), [(100, 100, 2), (30, 100, 7), (1000, 100, 1), (0, 8, 16)])
def test_copies_take_twice_the_cache(size: int, cache: int, count: int) -> None:
    assert copies_to_be_cold(size, cache) == count
