"""The pattern search on a made-up landscape, and the steps that it takes."""

from __future__ import annotations

from math import prod

import pytest

from sapper.codegen.pipeline import facts_of
from sapper.ir.verifier import verify
from sapper.kernels import library
from sapper.lane.choices import Choices, choices
from sapper.lane.lower import lower
from sapper.lane.ops import LANE_OPS
from sapper.lane.rows import LoweringError
from sapper.targets import target
from sapper.tile.canonical import canonicalize
from sapper.tile.reduce_loops import reduce_loops
from sapper.tile.schedule import DimClass, Schedule, ScheduleError, Specialization
from sapper.tune.search import search
from sapper.tune.space import Step, steps

LIBRARY = {k.name: k for k in library()}
FACTS = facts_of(target("zen4"))
LARGE = Specialization({d: DimClass(512, 64) for d in "MNKTPDFHG"})


def ladder(schedule: Schedule) -> list[Step]:
    m = schedule.registers.get("m", 5)
    return [Step("m", f"m {n}", Schedule(registers={"m": n})) for n in (m - 1, m + 1)]


def test_the_search_walks_to_the_optimum_and_tries_nothing_twice() -> None:
    tried: list[tuple[int, int]] = []

    def attempt(step: Step, best: Schedule) -> float:
        now, before = step.schedule.registers["m"], best.registers.get("m", 5)
        tried.append((now, before))
        return (10 + abs(now - 9)) / (10 + abs(before - 9))

    found = search(Schedule(), ladder, attempt, lambda: False)
    assert found.best.registers == {"m": 9} and found.finished and found.failed == 0
    assert found.gained == ["m 6", "m 7", "m 8", "m 9"]
    assert len({now for now, _ in tried}) == len(tried) == found.tried


def test_what_fails_or_gains_too_little_is_not_kept() -> None:
    answers = {4: None, 6: 0.99}
    found = search(Schedule(), ladder, lambda step, _: answers[step.schedule.registers["m"]], lambda: False)
    assert found.best == Schedule() and found.finished and (found.tried, found.failed) == (2, 1)


def test_time_may_run_out() -> None:
    left = iter([False, True, True])
    found = search(Schedule(), ladder, lambda *_: 0.9, lambda: next(left))
    assert found.best.registers == {"m": 4} and not found.finished and found.tried == 1


def chosen(name: str, schedule: Schedule | None = None) -> Choices:
    function = LIBRARY[name].kernel.tile_ir()
    reduce_loops(function)
    canonicalize(function)
    return choices(function, schedule or Schedule(), FACTS, LARGE)


def test_the_models_choice_is_told_as_a_schedule() -> None:
    made = chosen("matmul_nn_f32")
    told = made.schedule
    assert (told.lane, told.registers, told.order) == ("n", {"m": 14, "n": 2, "k": 4}, ("n", "m"))
    assert told.stage == ("a", "b")
    assert made.parallel == ("m", "n") and made.stageable == ("a", "b") and made.lanes == 16
    again = chosen("matmul_nn_f32", told)
    assert again.schedule == told


@pytest.mark.parametrize(
    "name", ["matmul_nn_f32", "softmax", "matvec_f32", "attention_f32", "rms_norm", "matmul_nt_gelu_f32"])
def test_every_step_is_another_schedule_that_lowers_or_is_refused(name: str) -> None:
    made = chosen(name)
    found = list(steps(Schedule(), made, FACTS.vector_registers, threads=2))
    assert found and all(step.schedule != Schedule() for step in found)
    assert len({step.label for step in found}) == len(found)
    refused = 0
    for step in found[:: max(1, len(found) // 8)]:
        function = LIBRARY[name].kernel.tile_ir()
        reduce_loops(function)
        canonicalize(function)
        try:
            verify(lower(function, step.schedule, FACTS, LARGE), LANE_OPS)
        except (ScheduleError, LoweringError):
            refused += 1
    assert refused <= 3


def test_registers_are_traded_but_never_far_beyond_what_there_is() -> None:
    made = chosen("matmul_nn_f32")
    found = {step.label for step in steps(Schedule(), made, FACTS.vector_registers, threads=1)}
    assert "registers n 2 -> 3, m 14 -> 8" in found
    wide = chosen("matmul_nn_f32", Schedule(registers={"m": 14, "n": 4}))
    for step in steps(Schedule(registers={"m": 14, "n": 4}), wide, FACTS.vector_registers, threads=1):
        counts = {**wide.schedule.registers, **step.schedule.registers}
        assert step.part.startswith("lane") or not step.part.startswith("registers") or prod(
            counts[a] for a in "mn") <= 2 * FACTS.vector_registers
    assert not any(step.part.startswith("chunks") for step in steps(Schedule(), made, 32, threads=1))
