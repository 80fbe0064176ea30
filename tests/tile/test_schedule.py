"""Schedules as data: what is none is refused before any kernel is compiled."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

import pytest

from sapper import targets
from sapper.cli.errors import UsageError
from sapper.cli.kernels import parse_schedule
from sapper.codegen.pipeline import compile_kernel
from sapper.kernels import find
from sapper.tile.schedule import LoweringError, Schedule, ScheduleError
from tests.strategies.malformed import mutations, refusals

SOFTMAX = find("softmax").kernel
GOOD = Schedule("n", {"m": 4}, {"n": 2}, ("n",), (), ("y",), {"m": 4})
JUNK: tuple[Any, ...] = (
    None, -1, 0, 1, 3, 1.5, True, 10**30, float("nan"), "x", "m", "n", "y", "\ud800", [], {}, ["m"], ["x", "y"], [[]],
    [1], {"m": 0}, {"m": "4"}, {"n": None}, {"q": 4}, {"m": [1]}, {"m": 10**6})


@pytest.mark.parametrize(("entry", "value", "expected"), [
    ("lane", 3, "the name of an axis"),
    ("tile", ["m"], "axes with a size for each"),
    ("tile", {"m": "4"}, "axis m: found '4'; expected an integer of 1 to 2147483647"),
    ("registers", {"m": 0}, "axis m: found 0; expected an integer of 1 to 2147483647"),
    ("chunks", {"m": True}, "axis m: found True; expected an integer"),
    ("chunks", {"m": 1 << 31}, "axis m: found 2147483648; expected an integer of 1 to 2147483647"),
    ("order", "mn", "found 'mn'; expected a list of names"),
    ("order", None, "found None; expected a list of names"),
    ("stage", [1], "found (1,); expected a list of names"),
    ("assembly", {"a": 1}, "expected a list of names"),
    ("requests", ["again"], "expected fields with a value for each"),
    ("requests", {"prefetch": 1}, "found 'prefetch'; expected some of stream_ahead_bytes, line_by_line"),
    ("requests", {"again": 1}, "again: found 1; expected true or false"),
    ("requests", {"row_streams": True}, "row_streams: found True; expected an integer of 0 to 2147483647"),
    ("requests", {"stream_level": 3}, "stream_level: found 3; expected an integer of 0 to 2"),
])
def test_what_is_no_schedule(entry: str, value: Any, expected: str) -> None:
    with pytest.raises(ScheduleError, match=f"schedule entry {entry}") as caught:
        Schedule.from_json({entry: value})
    assert expected in str(caught.value)


def test_what_other_languages_have_has_a_mend() -> None:
    with pytest.raises(ScheduleError, match=r"unknown schedule entry 'unroll'; .* mend: registers says how many rows"):
        Schedule.from_json({"unroll": {"k": 4}})


@pytest.mark.parametrize("lanes", [3, 6, 2, 32, True, "8"])
def test_lanes_that_rows_cannot_have(lanes: Any) -> None:
    with pytest.raises(ScheduleError, match=f"lanes: found {lanes!r}; expected a power of two from 4 to 16"):
        compiled(Schedule(lanes=lanes))


@pytest.mark.parametrize(("lanes", "used"), [(16, "zmm"), (8, "ymm"), (4, "xmm")])
def test_rows_of_fewer_lanes_take_narrower_registers(lanes: int, used: str) -> None:
    text = compiled(Schedule(lanes=lanes))
    assert {name for name in ("zmm", "ymm", "xmm") if f"vmulps {name}" in text} == {used}


@pytest.mark.parametrize("data", [3, [1], "tile", None], ids=str)
def test_what_is_no_object(data: Any) -> None:
    with pytest.raises(ScheduleError, match=r"schedule: found .* expected an object with some of assembly"):
        Schedule.from_json(data)


@pytest.mark.parametrize("sizes", [{"tile": {"m": 10**6}}, {"registers": {"n": 10**6}}, {"registers": {"n": 10**9}}],
                         ids=str)
def test_a_schedule_that_unrolls_without_end_is_refused(sizes: dict[str, dict[str, int]]) -> None:
    """The maximum of each of a million rows would be a value of its own; so many coordinates alone fill the memory."""
    with pytest.raises(LoweringError, match="unrolls the kernel to more than 65536 values"):
        compiled(Schedule(**sizes))


def compiled(schedule: Schedule | None) -> str:
    return compile_kernel(SOFTMAX, {}, dict.fromkeys("xy", "contiguous"), {}, targets.target("v4"), schedule).text()


def changed(count: int) -> Iterator[str]:
    """JSON texts of GOOD with one to three entries, or values in them, replaced."""
    source = random.Random(3)
    for _ in range(count):
        data = json.loads(json.dumps(GOOD.to_json()))
        for _ in range(source.randint(1, 3)):
            entry = source.choice(sorted(data) or ["lane"])
            action = source.randrange(4)
            if action == 0:
                data.pop(entry, None)
            elif action == 1 and isinstance(data.get(entry), dict):
                data[entry][source.choice("mnq")] = source.choice(JUNK)
            elif action == 2 and isinstance(data.get(entry), list):
                data[entry].append(source.choice(JUNK))
            else:
                data[entry] = source.choice(JUNK)
        yield json.dumps(data)


def test_a_thousand_malformed_schedules() -> None:
    """Each is refused as text, as schedule, or by the kernel, or compiles."""
    kinds = UsageError, ScheduleError, LoweringError
    found = refusals(changed(300), lambda text: compile_kernel(
        SOFTMAX, {}, dict.fromkeys("xy", "contiguous"), {}, targets.target("v4"), parse_schedule(text)), kinds)
    assert 150 < len(found) < 300
    text = json.dumps(GOOD.to_json())[1:]
    pieces = ('"lane"', "null", "true", "1.5", '{"m": 3}', '"tile"', "{")
    found = refusals(("{" + text for text in mutations([text], pieces, 700)), parse_schedule, kinds)
    assert 500 < len(found) < 700
