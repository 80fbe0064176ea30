"""Small pieces of assembly, and running them on plain buffers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from sapper.assembly import x86
from sapper.assembly.build import Assembly, Region, function
from sapper.assembly.emulate import Emulator
from sapper.assembly.finish import finish
from sapper.codegen.machine import Register
from sapper.lane.memory import Memory
from sapper.targets.x86_64.target import target

ZEN4 = target("zen4")
V3 = target("v3")
Write = Callable[[Assembly], None]


def piece(write: Write, naked: bool = False) -> Assembly:
    return function(x86.table, "piece", write, naked)


def binary(write: Callable[[Assembly, Any, Any, Any], None]) -> Write:
    """A piece with x (read), y (written) and n (a count) in the first three arguments."""
    def body(a: Assembly) -> None:
        x = a.input(x86.rdi, Region("x", False))
        y = a.input(x86.rsi, Region("y", True))
        n = a.input(x86.rdx)
        write(a, x, y, n)

    return body


def interpret(machine: Any, *arguments: Any) -> Emulator:
    """Run machine IR under the emulator; arrays become buffers (read-only ones stay so)."""
    memory = Memory()
    registers: dict[Any, Any] = {Register(*pair): 0 for pair in x86.table.CALLEE_SAVED}
    for pair, value in zip(x86.table.ARGUMENTS, arguments, strict=False):
        registers[Register(*pair)] = memory.add_array("buffer", value) if isinstance(value, np.ndarray) else value
    emulator = Emulator(x86.table, memory, registers)
    emulator.run(machine)
    return emulator


def native(write: Write, *arguments: Any) -> None:
    """Run a piece as code of this CPU; only for pieces that a test has interpreted before."""
    from sapper.runtime.loader import load

    block = load(finish(piece(write), ZEN4).code)
    block.function(*[a.ctypes.data if isinstance(a, np.ndarray) else a for a in arguments])
