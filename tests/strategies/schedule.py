"""Random schedules for a kernel: any choice of any part, legal or not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

from hypothesis import strategies as st

from sapper.ir.nodes import Function
from sapper.tile.requests import USUAL
from sapper.tile.schedule import Schedule, UnfollowedError

T = TypeVar("T")
NUMBERS = [name for name, value in USUAL._asdict().items() if not isinstance(value, bool) and name[-6:] != "_level"]


def axes_of(function: Function) -> list[str]:
    """The axes that a kernel's loops and `whole` bring, in order."""
    return [axis for op in function.walk() if op.name in ("tiles", "whole")
            for axis in (op.attributes["axes"] if op.name == "tiles" else [op.attributes["axis"]])]


def draw_schedule(data: Any, function: Function) -> Schedule:
    """Some of the parts of a schedule, from Hypothesis's `data`."""
    axes, tensors = axes_of(function), [t.name for t in function.tensors()]

    def numbers(most: int) -> dict[str, int]:
        chosen = data.draw(st.lists(st.sampled_from(axes), max_size=2, unique=True)) if axes else []
        return {axis: data.draw(st.integers(1, most)) for axis in chosen}

    def some(names: list[str]) -> tuple[str, ...]:
        return tuple(data.draw(st.lists(st.sampled_from(names), max_size=3, unique=True))) if names else ()

    return Schedule(
        lane=data.draw(st.sampled_from([None, None, *axes])),
        tile={axis: data.draw(st.sampled_from([size, 16 * size])) for axis, size in numbers(4).items()},
        registers=numbers(5), order=some(axes), chunks=numbers(5),
        stage=data.draw(st.sampled_from([None, some(tensors)])),
        streaming=data.draw(st.sampled_from([None, some(tensors)])),
        requests=data.draw(st.dictionaries(st.sampled_from(NUMBERS), st.integers(0, 20), max_size=2)),
        lanes=data.draw(st.sampled_from([None, None, None, 4, 8])))


def as_far_as_followed(schedule: Schedule, lowered: Callable[[Schedule], T]) -> T:
    """What a lowering leaves for a schedule, without the entries that nothing in the kernel follows."""
    while True:
        try:
            return lowered(schedule)
        except UnfollowedError as error:
            value = getattr(schedule, error.entry)
            left = {name: size for name, size in value.items() if name != error.name} if isinstance(value, dict) else \
                tuple(name for name in value if name != error.name) if isinstance(value, tuple) else None
            assert left != value
            schedule = replace(schedule, **{error.entry: left})


__all__ = ["as_far_as_followed", "draw_schedule"]
