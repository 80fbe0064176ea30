"""A sample of all floats through functions as machine code; `tools/exhaust_math.py` runs them on each one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.lane.test_math import FUNCTIONS

from .run_native import RUNNABLE

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
import exhaust_math

EVERY = 4093
"""A prime, so that the floats have all endings."""


@pytest.mark.sampled(3)
@pytest.mark.parametrize("target", RUNNABLE)
@pytest.mark.parametrize("name", exhaust_math.MEANINGS)
def test_a_sample_of_all_floats(name: str, target: str) -> None:
    worst, place, count = exhaust_math.worst_of(name, target, EVERY, 0, 1)
    assert count == -(-(1 << 32) // EVERY)
    assert worst <= FUNCTIONS[name][1], f"{worst} ulp at {place!r}"


@pytest.mark.parametrize("target", RUNNABLE)
def test_a_sample_of_all_floats_beside_one(target: str) -> None:
    worst, place, _ = exhaust_math.worst_of("erf", target, EVERY, 0, 1, 1.0)
    assert worst <= 2.0, f"{worst} ulp at {place!r}"


@pytest.mark.parametrize("target", RUNNABLE)
@pytest.mark.parametrize("name", exhaust_math.SHORT)
def test_a_sample_of_all_floats_in_short_forms(name: str, target: str) -> None:
    others, wrong, place, count = exhaust_math.strays(name, target, EVERY, 0, 1)
    assert not wrong, place
    assert others < count / 1000     # where the exact result is that near to the middle of two neighbours


def test_a_wrong_function_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(exhaust_math.MEANINGS, "exp", exhaust_math.MEANINGS["exp2"])
    assert exhaust_math.worst_of("exp", None, EVERY, 0, 1)[0] > 1000
    assert exhaust_math.strays("exp", None, EVERY, 0, 1)[1] > 1000
