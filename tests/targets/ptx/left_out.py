"""Faults that are planted: ops that make workers wait left out of lane programs, and changes of PTX."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from sapper import emulate
from sapper.codegen.pipeline import Compiled
from sapper.ir.nodes import Function
from sapper.lane.rehearse import rehearse


def blocks_of(function: Function) -> list[Any]:
    """All blocks, the outermost first."""
    return [function.body, *(block for op in function.walk() for block in op.blocks)]


def missed(lane: Function, name: str) -> list[int]:
    """Which of the ops of that name, each left out by itself, the rehearsal does not miss. There is one at least."""
    places = [(block, op) for block in blocks_of(lane) for op in block.ops if op.name == name]
    assert places
    found = []
    for number, (block, op) in enumerate(places):
        place = block.ops.index(op)
        taken = dict(zip(op.results, op.operands, strict=True)) if name == "group_wait" else {}
        users = [(user, list(user.operands)) for user in lane.walk() if not taken.keys().isdisjoint(user.operands)]
        for user, operands in users:    # sums are taken as they are
            user.operands[:] = [taken.get(v, v) for v in operands]
        del block.ops[place]
        if not rehearse(lane):
            found.append(number)
        block.ops.insert(place, op)
        for user, operands in users:
            user.operands[:] = operands
    return found


def replaced(text: str, pattern: str, by: str, number: int | None) -> str:
    """With the match of that number replaced, or all of them."""
    assert re.search(pattern, text)
    if number is None:
        return re.sub(pattern, by, text)
    found = list(re.finditer(pattern, text))[number]
    return text[:found.start()] + found.expand(by) + text[found.end():]


def told(made: Compiled, fault: tuple[str, str, int | None], arguments: dict[str, np.ndarray],
         extents: dict[str, int]) -> bool:
    """Whether the emulator refuses one worker's run of a product whose text has a fault, in lazy mode."""
    faulty = emulate.load(replaced(made.text(), *fault))
    words = [arguments[s.split(".")[0]] if s.endswith("data") else extents[s.split(".")[1]] for s in made.slots]
    maps = [emulate.TensorMap(arguments[name], box, 128) for name, _, _, box in made.tensor_maps]
    try:
        faulty.launch(grid=(1,), block=(32 * made.warps,), shared_bytes=made.near_bytes,
                      arguments=[np.zeros(64), 64, np.zeros(1024, np.uint8), *words, *maps],
                      options=emulate.Options(lazy=True))
    except emulate.EmulationError:
        return True
    return False
