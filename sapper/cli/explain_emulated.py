"""What the emulator of PTX says of each instruction of a kernel in one call: how often it runs, and what it touches.

Enters: compiled code, the arguments of a call. Leaves: `Emulated`. Holds: figures are counts over all warps of the
launch, nothing here is a time; the call runs with all checks of the emulator, few blocks, and limits of instructions
and seconds.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..codegen.lives import held
from ..codegen.outline import table_of
from .errors import CommandError

MOST_STEPS, MOST_SECONDS = 400_000, 20.0
"""Instructions of strands of blocks that run together; and of all blocks, as a product of tensor cores takes
milliseconds."""


@dataclass(slots=True)
class Emulated:
    """places: the counters of instructions that ran, by place in the body. total: of the whole launch."""

    total: Any
    places: dict[int, Any] = field(default_factory=dict)


def emulate_call(kernel: Any, compiled: Any, target: Any, arguments: Mapping[str, Any]) -> Emulated:
    """Raises CommandError where the emulator finds a fault, or that the call takes too long."""
    from ..emulate import EmulationError, Options, run
    from ..targets.ptx.text import first_line

    machine = compiled.made.machine
    try:
        options = Options(lines=True, step_limit=MOST_STEPS, deadline=time.monotonic() + MOST_SECONDS)
        total = run(kernel, *(arguments[name] for name, _ in kernel.parameters), target=target.name, code=compiled,
                    trial=False, options=options).counters
    except EmulationError as error:
        late = f" ({MOST_SECONDS:g} s); a smaller --shape has one" if time.monotonic() > options.deadline else ""
        raise CommandError(f"the emulator stopped: {str(error).splitlines()[0]}{late}") from None
    first = first_line(compiled.text(), machine)
    return Emulated(total, {line - first: counted for line, counted in total.lines.items()})


def near_letters(machine: Any, target: Any, emulated: Emulated) -> tuple[list[str], list[int]]:
    """(by place, a letter for each buffer of near memory: `.` free, `|` holds what is still read, `r`, `w`, `x`; how
    many bytes are held)."""
    body, buffers = machine.body, machine.near_buffers
    reads, writes = [0] * len(body), [0] * len(body)
    for place, counted in emulated.places.items():
        for at, (_, first, size) in enumerate(buffers):
            read, written = counted.touches(first, size)
            reads[place] |= read << at
            writes[place] |= written << at
    holds = held(body, table_of(target), reads, writes)
    letters, sizes = [], []
    for place, bits in enumerate(holds):
        row = ""
        for at in range(len(buffers)):
            read, written, kept = (bool(found >> at & 1) for found in (reads[place], writes[place], bits))
            row += "x" if read and written else "r" if read else "w" if written else "|" if kept else "."
        letters.append(row)
        sizes.append(sum(size for at, (_, _, size) in enumerate(buffers) if bits >> at & 1))
    return letters, sizes
