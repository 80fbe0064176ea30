"""Programs as tables of a model's file, from which memory is filled when it is opened.

Enters: a `Plan`. Leaves: `NAME.step` and the like, a line for each launch and for each word of its argument block;
`NAME.step.position` and the like, the places of a variable; `NAME.constants`, where constants are not in the weights
file. Holds: a word counts from what its base says.
"""

from __future__ import annotations

import struct
from typing import Any

from ..codegen.table import Line, Table
from ..runtime import program
from ..runtime.arguments import FIRST_SLOT
from ..runtime.buffers import LINE_BYTES
from ..runtime.scratch import SYNC_BYTES
from .errors import AheadError
from .plan import CONSTANT, TRAINED, Plan, PlannedProgram, Training, memory_of

NUMBER, OF_WEIGHTS, OF_MEMORY, OF_CODE = 0, 1, 2, 3
BASES = {"NUMBER": NUMBER, "WEIGHTS": OF_WEIGHTS, "MEMORY": OF_MEMORY, "CONSTANTS": OF_CODE}
"""What a word of a program's table counts from."""
CONSTANTS, STATE_HEAD, WORDS = "constants", "state_head", "words"
"""The tables of what no launch writes, of how a file of the optimiser's state begins, and of a tokenizer (words.py), by
how their names end."""


def program_tables(plan: Plan[Any]) -> list[Table]:
    """For each program its launches and, for each variable, the words that take its value."""
    tables = []
    for of in plan.programs.values():
        tables.append(_launches(plan, of))
        variables = plan.model.variables[of.name]
        places: dict[str, list[int]] = {name: [] for name in variables}
        for launch, block in zip(of.launches, of.layout.blocks, strict=True):
            for place in launch.places:
                if place.variable.name not in places:
                    raise AheadError(f"program {of.name}", f"a variable {place.variable.name}",
                                     " and ".join(variables))
                places[place.variable.name].append(of.control + block + program.WORD_BYTES * place.word)
        for variable, offsets in places.items():
            lines = [Line(comment=f"where the argument blocks of {of.name} hold {variable}, in a model's memory"),
                     Line(4, [len(offsets)])]
            lines += [Line(4, offsets[start:start + 12]) for start in range(0, len(offsets), 12)]
            tables.append(Table(f"{plan.model.name}.{of.name}.{variable}", lines))
    if plan.constants:
        tables.append(_constants(plan))
    if isinstance(plan.model, Training):
        head = plan.model.state_head
        lines = [Line(comment="the length of what follows, and a header of safetensors"),
                 *(Line(1, head[start : start + 32]) for start in range(0, len(head), 32))]
        tables.append(Table(f"{plan.model.name}.{STATE_HEAD}", lines))
        if plan.words is not None:
            numbers = struct.unpack(f"<{len(plan.words.content) // 8}q", plan.words.content)
            tables.append(Table(f"{plan.model.name}.{WORDS}", [
                Line(8, numbers[start : start + 8]) for start in range(0, len(numbers), 8)], align_bytes=LINE_BYTES))
    return tables


def _constants(plan: Plan[Any]) -> Table:
    """Every constant at its offset, as words of four bytes."""
    lines: list[Line] = []
    here = 0
    for region in sorted(plan.constants, key=lambda region: region.offset):
        content = bytes(region.offset - here) + memory_of(region).tobytes()
        content += bytes(-len(content) % 4)
        here += len(content)
        words = [number for number, in struct.iter_unpack("<i", content)]
        lines.append(Line(comment=f"{region.name}, {region.size_bytes} bytes"))
        lines += [Line(4, words[start : start + 12]) for start in range(0, len(words), 12)]
    return Table(f"{plan.model.name}.{CONSTANTS}", lines, align_bytes=LINE_BYTES)


_WORDS = {number: name for name, number in BASES.items()}


def _launches(plan: Plan[Any], of: PlannedProgram) -> Table:
    """`NAME.prefill`, `NAME.step` or `NAME.draw`; `fill` reads it."""
    layout, launches = of.layout, of.launches
    barriers = sum(launch.barrier for launch in launches)
    counts = (f"{len(launches)} {'launch' if len(launches) == 1 else 'launches'}, "
              f"{barriers} {'barrier' if barriers == 1 else 'barriers'}")
    lines = [
        Line(comment=f"The program {of.name}: {counts}. A launch is its kernel,"),
        Line(comment="argument block, flags, number of words, bytes to the launch whose weights are asked for after"),
        Line(comment="it, its own: word, granules, bytes of one; then the words of the block: 0 scratch, 1 its bytes"),
        Line(comment="for each worker, 2 sync block, and what the kernel asks for."),
        Line(4, [of.control, of.control + layout.table, of.control + layout.sync, layout.sync_count],
             "control, table, sync blocks and their number"),
        Line(4, [layout.counters, len(launches), 0, 0], "counters, launches"),
    ]
    for number, (launch, block) in enumerate(zip(launches, layout.blocks, strict=True)):
        if number in of.headings:
            lines += [Line(), Line(comment=f"---- {of.name}, {of.headings[number]}")]
        notes = [f"{number}: {launch.signature.kernel}"]
        if launch.flags & program.ALONE:
            notes.append("on one worker")
        if launch.barrier:
            notes.append("then all meet")
        code = launch.code
        words = _words(plan, of, number)
        numbers = [code.symbol, of.control + block, launch.flags, len(words), *launch.asking]
        lines.append(Line(4, numbers, ", ".join(notes)))
        lines += [Line(8, [base, value], comment, {0: _WORDS[base]}) for base, value, comment in words]
    return Table(f"{plan.model.name}.{of.name}", lines, BASES)


def _words(plan: Plan[Any], of: PlannedProgram, number: int) -> list[tuple[int, int, str]]:
    """(base, value, comment) of each word of a launch's argument block."""
    launch, layout = of.launches[number], of.layout
    words = [
        (OF_MEMORY, plan.memory_bytes, "scratch"), (NUMBER, layout.step_bytes, "its bytes"),
        (OF_MEMORY, of.control + layout.sync + SYNC_BYTES * launch.sync_index, "sync"),
    ]
    variables = {place.word: place.variable.name for place in launch.places}
    for word, (slot, value) in enumerate(zip(launch.compiled.slots, launch.words, strict=True), FIRST_SLOT):
        head, _, tail = slot.partition(".")
        if tail == "data" and head in launch.signature.positions:
            view = launch.binding.tensors[launch.signature.positions[head]]
            low, high = view.extent
            region = plan.region_at(view.address + low) if low < high else None
            if region is None:
                words.append((NUMBER, 0, f"{slot}: no elements"))
                continue
            base = (OF_CODE if region.kind == CONSTANT and plan.constants else
                    OF_WEIGHTS if region.kind in (CONSTANT, TRAINED) else OF_MEMORY)
            words.append((base, region.offset + view.address - region.low, f"{slot}: {region.name}"))
        else:
            changed = f": the variable {variables[word]}" if word in variables else ""
            words.append((NUMBER, value, f"{slot}{changed}"))
    return words
