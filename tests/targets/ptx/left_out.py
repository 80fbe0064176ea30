"""Faults that are planted: ops that make workers wait left out of lane programs, and changes of PTX."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from sapper.ir.nodes import Function
from sapper.lane.rehearse import rehearse


def blocks_of(function: Function) -> list[Any]:
    """All blocks, the outermost first."""
    return [function.body, *(block for op in function.walk() for block in op.blocks)]


def missed(made: Callable[[], Function], name: str) -> list[int]:
    """Which of the ops of that name, each left out by itself of a program that is made anew, the rehearsal does not
    miss. There is one at least."""
    found: list[bool] = []
    while True:
        lane = made()
        places = [(b, op) for b in blocks_of(lane) for op in b.ops if op.name == name]
        if len(found) == len(places):
            break
        block, op = places[len(found)]
        taken = dict(zip(op.results, op.operands, strict=True)) if name == "group_wait" else {}
        for user in lane.walk():        # sums are taken as they are
            user.operands[:] = [taken.get(v, v) for v in user.operands]
        block.ops.remove(op)
        found.append(bool(rehearse(lane)))
    assert found
    return [n for n, caught in enumerate(found) if not caught]


def replaced(text: str, pattern: str, by: str, number: int | None) -> str:
    """With the match of that number replaced, or all of them."""
    assert re.search(pattern, text)
    if number is None:
        return re.sub(pattern, by, text)
    found = list(re.finditer(pattern, text))[number]
    return text[:found.start()] + found.expand(by) + text[found.end():]
