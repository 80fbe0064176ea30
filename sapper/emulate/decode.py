"""An instruction to a `Step`: what it does to the lanes that run it.

Enters: a parsed instruction. Leaves: a `Step` whose `run(lanes)` does it. Holds: everything that can be decided from
the text (which operands are registers, which meaning) is decided here, once.
Rows with a meaning and no unit are done here. A unit's rows are done by the module that registered the unit (units.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ..targets.ptx.rows import BITS, Form
from . import (  # noqa: F401  each registers its units
    parse,
    unit_atomic,
    unit_barrier,
    unit_copy,
    unit_mbarrier,
    unit_memory,
    unit_other,
    unit_tcgen05,
    unit_tensor,
    unit_warp,
    unit_wgmma,
)
from .errors import EmulationError, ParseError
from .machine import Lanes, Machine, Run, Step, Wait, as_type, register_dtype, stacked
from .units import UNITS


def decode(machine: Machine, instruction: parse.Instruction) -> Step:
    machine.instruction = instruction
    form, guard = instruction.form, instruction.guard
    held = (guard.slot, guard.negated) if guard is not None else None
    name = form.row.unit
    try:
        if name == "control":
            return _control(machine, instruction, held)
        if name:
            if name not in UNITS:
                raise EmulationError(f"the emulator does not carry out {form.mnemonic}", instruction.line)
            return Step(instruction, UNITS[name](machine, instruction), guard=held,
                        whole=needs_whole_warps(instruction),
                        meets=name in ("warp", "warp_barrier"))
        if form.row.opcode == "mov" and any(isinstance(operand, parse.Vector) for operand in instruction.operands):
            return Step(instruction, _move_parts(machine, instruction), guard=held)
        return Step(instruction, _value(machine, instruction), guard=held)
    except EmulationError as error:
        raise error if error.line else type(error)(str(error), instruction.line) from None


def needs_whole_warps(instruction: parse.Instruction) -> bool:
    """Whether all lanes of a warp carry the instruction out together: the .aligned ones (PTX ISA: "all threads in the
    warp must execute the same instruction")."""
    form = instruction.form
    return "aligned" in form or (form.row.opcode == "bar" and form.row.unit == "barrier")


def _control(machine: Machine, instruction: parse.Instruction, held: tuple[int, bool] | None) -> Step:
    opcode = instruction.form.row.opcode
    if opcode == "bra":
        (target,) = instruction.operands
        place = machine.function.place_of(target) if isinstance(target, parse.Label) else None
        if place is None:
            raise ParseError(f"unknown label in {instruction.text} expected one that is in the function, `name:`",
                             instruction.line)
        return Step(instruction, _nothing, branch=place, guard=held)
    if opcode in ("ret", "exit"):
        return Step(instruction, _nothing, ends=True, guard=held)

    def stop(lanes: Lanes) -> Wait | None:
        lane = int(machine.lanes_of(lanes)[0])
        raise EmulationError(f"{instruction.text} is reached by {machine.place_of(lane)}", instruction.line)

    return Step(instruction, stop, guard=held)


def _nothing(lanes: Lanes) -> Wait | None:
    return None


def sources_of(machine: Machine, instruction: parse.Instruction) -> list[Callable[[Lanes], Any]]:
    """Readers of the operands that the meaning takes, in order."""
    return [machine.reader(found, operand.type)
            for operand, found in zip(instruction.form.operands, instruction.operands, strict=True)
            if (operand.reads or operand.role == "i") and found is not None]


def results_of(machine: Machine, instruction: parse.Instruction) -> list[Callable[[Lanes, Any], None] | None]:
    return [machine.writer(found, operand.type)
            for operand, found in zip(instruction.form.operands, instruction.operands, strict=True) if operand.writes]


def _value(machine: Machine, instruction: parse.Instruction) -> Run:
    form, meaning = instruction.form, instruction.form.row.meaning
    if meaning is None:
        raise EmulationError(f"the emulator does not carry out {form.mnemonic}", instruction.line)
    sources, results = sources_of(machine, instruction), results_of(machine, instruction)
    if len(results) == 1:
        write = results[0]
        if write is None:
            return _nothing
        return _one_result(form, meaning, sources, write)

    def run(lanes: Lanes) -> Wait | None:
        values = meaning(form, *[read(lanes) for read in sources])
        for write, value in zip(results, values, strict=True):
            if write is not None:
                write(lanes, value)
        return None

    return run


def _one_result(form: Form, meaning: Callable[..., Any], sources: list[Callable[[Lanes], Any]],
                write: Callable[[Lanes, Any], None]) -> Run:
    """By how many sources there are: most instructions are such, and a loop over these takes as long as NumPy."""
    if len(sources) == 1:
        (first,) = sources

        def run(lanes: Lanes) -> Wait | None:
            write(lanes, meaning(form, first(lanes)))
            return None
    elif len(sources) == 2:
        first, second = sources

        def run(lanes: Lanes) -> Wait | None:
            write(lanes, meaning(form, first(lanes), second(lanes)))
            return None
    else:
        def run(lanes: Lanes) -> Wait | None:
            write(lanes, meaning(form, *[read(lanes) for read in sources]))
            return None
    return run


def _move_parts(machine: Machine, instruction: parse.Instruction) -> Run:
    """mov between one register and a vector of its parts, lowest first (PTX ISA, mov: pack and unpack)."""
    target, source = instruction.operands
    whole = BITS[instruction.form.get("type")]
    for one, items in ((source, target), (target, source)):
        if isinstance(items, parse.Vector) and isinstance(one, parse.Register) and BITS[one.type] != whole:
            raise ParseError(f"found {one.name} of {BITS[one.type]} bits, expected {whole}", instruction.line)
    if isinstance(target, parse.Vector):
        bits = whole // len(target.items)
        read = machine.raw_reader(source, f"b{whole}")
        writers = [machine.writer(item, f"b{bits}") if item is not None else None for item in target.items]

        def unpack(lanes: Lanes) -> Wait | None:
            raw = np.ascontiguousarray(read(lanes))
            parts = raw.view(f"u{bits // 8}").reshape(len(raw), -1)
            for number, write in enumerate(writers):
                if write is not None:
                    write(lanes, np.ascontiguousarray(parts[:, number]))
            return None

        return unpack
    if not isinstance(source, parse.Vector):
        raise ParseError("expected a vector", instruction.line)
    bits = whole // len(source.items)
    readers = [machine.raw_reader(item, f"b{bits}") for item in source.items]
    write_whole = machine.writer(target, f"b{whole}")
    wide = register_dtype(f"b{whole}")

    def pack(lanes: Lanes) -> Wait | None:
        parts = stacked([as_type(read(lanes), f"b{bits}") for read in readers]).T
        if write_whole is not None:
            write_whole(lanes, np.ascontiguousarray(parts).view(wide).reshape(len(parts)))
        return None

    return pack
