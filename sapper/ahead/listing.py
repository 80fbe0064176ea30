"""What a model's assembly file says besides instructions: so that it can be read from top to bottom.

Enters: a plan. Leaves: notes before functions and tables, and a remark for each instruction of a kernel: the line of
source that it comes from, and a map of the registers.
"""

from __future__ import annotations

import linecache
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from ..codegen.explain import register_map
from ..codegen.machine import Instruction
from ..ir.nodes import Location
from ..targets import module_of
from .opening import STACK_BYTES
from .plan import CONSTANT, STATE, TEMPORARY, TRAINED, Code, Plan, Training
from .tables import CONSTANTS

_WIDTH = 116


@dataclass(slots=True)
class Listing:
    """notes: lines of comment by the name of what they stand before; the file's under "". remarks: for each kernel the
    comment of each instruction, by its place in the body."""

    notes: dict[str, list[str]]
    remarks: dict[str, dict[int, str]]


def listing_of(plan: Plan[Any], written: Mapping[str, list[str]]) -> Listing:
    """written: notes of functions by hand."""
    listing = Listing({name: lines for name, lines in written.items() if lines} | {"": _head(plan)}, {})
    for number, code in enumerate(plan.codes, 1):
        columns, letters = register_map(code.machine, plan.target)
        listing.notes[code.symbol] = _kernel_notes(code, number, plan, columns)
        listing.remarks[code.symbol] = _remarks(code, letters)
    return listing


def _remarks(code: Code, letters: Mapping[int, str]) -> dict[int, str]:
    remarks = {}
    last: Location | None = None
    for place, item in enumerate(code.machine.body):
        if not isinstance(item, Instruction):
            continue
        parts = [letters[place]]
        if item.comment:
            parts.append(f"({item.comment})")
        if item.location is not None and item.location != last:
            if last is None or (item.location.file, item.location.line) != (last.file, last.line):
                parts.append(_source(item.location))
            last = item.location
        remarks[place] = "  ".join(parts)
    return remarks


def _source(location: Location) -> str:
    """`quantized.py:36  packed = quants[p, b, i, l].to(i32)`"""
    line = linecache.getline(location.file, location.line).strip()
    return f"{PurePath(location.file).name}:{location.line}  {line}".rstrip()


def _head(plan: Plan[Any]) -> list[str]:
    model, name = plan.model, plan.model.name
    trains = isinstance(model, Training)
    called = [f"{name}_{of}" for of in ("open", *(("train", "evaluate") if trains else ("prefill", "step")))]
    system = module_of(plan.target.family, "system").SYSTEM
    lines = [
        f"{name}: a language model{' in training' if trains else ''} as one assembly file. Made by sapper for "
        f"{plan.target.name}.",
        *textwrap.wrap(model.description, _WIDTH), "",
        f"{system.tools}as {name}.s -o {name}.o",
        f"{system.tools}ld -shared {name}.o -o {name}.so                      a library",
        *([f"{system.tools}ld -static -e {name}_start {name}.o -o {name}     an executable"] if plan.words else []),
        "",
        f"In this order: the functions that others call ({', '.join(called)}, ...), the programs",
        f"as tables of launches ({', '.join(f'{name}.{of}' for of in plan.programs)}), the kernels, and what lets",
        "several workers run them.",
        f"The weights lie in a file of their own ({plan.weights_bytes} bytes), which {name}_open maps and checks.",
        *(textwrap.wrap(f"Comments of code by hand name registers as x86-64 does: {system.registers}.", _WIDTH)
          if system.registers else []),
        "",
        "A model's memory, in bytes from its start:",
    ]
    for program in plan.programs.values():
        lines.append(_range(program.control, program.layout.scratch, f"program {program.name}: control, sync blocks, "
                            "table of launches, argument blocks"))
    for region in sorted(plan.of_kind(TEMPORARY), key=lambda region: (region.offset, region.name)):
        lives = ", ".join(f"{p} {first}-{last}" for p, (first, last) in region.lives.items())
        lines.append(_range(region.offset, region.size_bytes, f"{region.name}  (phases of {lives})"))
    lines += [
        *_ranges(plan, STATE),
        f"{plan.memory_bytes:>12}               scratch, {plan.scratch_bytes} bytes for each worker; then stacks, "
        f"{STACK_BYTES} for each",
        f"Temporaries take {plan.temporary_bytes} bytes; without sharing it would be {plan.separate_bytes}.",
    ]
    if plan.constants:
        lines += ["", f"Constants, in bytes from {name}.{CONSTANTS}:", *_ranges(plan, CONSTANT)]
    return [*lines, "", "The weights file, in bytes from its start:", *_ranges(plan, TRAINED if trains else CONSTANT)]


def _ranges(plan: Plan[Any], kind: str) -> list[str]:
    return [_range(region.offset, region.size_bytes, region.name)
            for region in sorted(plan.of_kind(kind), key=lambda region: (region.offset, region.name))]


def _range(offset: int, size_bytes: int, what: str) -> str:
    return f"{offset:>12} {size_bytes:>12}  {what}"


def _kernel_notes(code: Code, number: int, plan: Plan[Any], columns: list[str]) -> list[str]:
    source = code.source
    lines = ["=" * 80, f"kernel {number} of {len(plan.codes)}: {code.compiled.name}, {code.users} launches"
             + (f"; {PurePath(source.file).name}:{source.line}" if source else "")]
    lines += [line.strip() for line in code.documentation.strip().splitlines()]
    family = plan.target.family
    name_of = module_of(family, "registers").register_name
    block, worker, workers = (name_of("gpr", n, 64) for n in module_of(family, "abi").ARGUMENTS[:3])
    lines += [f"In: {block} argument block, {worker} worker, {workers} workers. Words of the block from 3 on:"]
    lines += textwrap.wrap(", ".join(f"{i} {slot}" for i, slot in enumerate(code.compiled.slots, 3)), _WIDTH)
    lines += ["The comment of an instruction begins with a map of the registers, a letter for each: | holds a value,",
              "r read, w written, x both, . free. Their order:"]
    return lines + textwrap.wrap(" ".join(columns), _WIDTH)
