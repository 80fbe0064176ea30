"""Planted errors: copies of a piece of assembly with one thing wrong, all of which the checks must find.

Enters: an `Assembly`. Leaves: `Mutant`s. Holds: each differs from the piece in one place, in a way that a slip of the
author's would: a wrong lane or element, a dropped iteration, a tail that is off by one, swapped operands, another
rounding, a clobbered register, another stride between the rows of a tile, an instruction left out.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

from ..codegen.machine import Immediate, Instruction, Label, Memory, Register, VirtualRegister
from ..codegen.row_facts import WRITE, facts_table
from .build import Assembly


@dataclass(frozen=True, slots=True)
class Mutant:
    """kind: which slip. place: in the body, of `item`, which was right. assembly: the piece with the error in it."""

    kind: str
    place: int
    item: Instruction
    assembly: Any

    def __str__(self) -> str:
        location = self.item.location
        name = getattr(self.item.row, "name", self.item.row.mnemonic)
        return f"{self.kind} at line {'?' if location is None else location.line} ({name})"


def mutants(assembly: Assembly, results: Collection[Any] = ()) -> Iterator[Mutant]:
    """All mutants of a piece, in the order of its text. results: registers in which a block leaves what it computes."""
    counts = _that_count(assembly, results)
    for place, item in enumerate(assembly.body):
        if isinstance(item, Label) or item not in counts:
            continue
        for kind, changed in _slips(assembly, place, item):
            made = copy.copy(assembly)
            made.body = [*assembly.body[:place], *changed, *assembly.body[place + 1:]]
            made.owners = dict(assembly.owners)
            if item in assembly.owners:
                for new in changed:
                    made.owners[new] = assembly.owners[item]
            yield Mutant(kind, place, item, made)


def _that_count(assembly: Assembly, results: Collection[Any]) -> set[Instruction]:
    """The instructions on which a result depends: not hints, nor what only leads to a hint's address."""
    table = assembly.table
    facts = facts_table(SimpleNamespace(idioms={}, move_bits={}, facts_table=None))
    reads: dict[Instruction, set[Any]] = {}
    writers: dict[Any, list[Instruction]] = {}
    pending: list[Instruction] = []
    setter: Instruction | None = None
    for item in assembly.body:
        if not isinstance(item, Instruction) or table.is_hint(item.row):
            continue
        known = facts[item.row]
        mine = reads[item] = {Register(*pair) for pair in known.reads} | ({item.mask} - {None})
        stores = bool(item.row.control) or item.row.side_effects
        for how, operand in zip(known.access, item.operands, strict=True):
            if isinstance(operand, Memory):
                mine |= {operand.base, operand.index} - {None}
                stores = stores or bool(item.row.operands[item.operands.index(operand)].writes)
            elif isinstance(operand, (Register, VirtualRegister)):
                mine.add(operand)
                if how & WRITE:
                    writers.setdefault(operand, []).append(item)
                    stores = stores or operand in assembly.results
        for pair in known.writes:
            writers.setdefault(Register(*pair), []).append(item)
        if known.reads_flags:
            mine.add(("flags", setter))
        if known.writes_flags:
            setter = item
            writers.setdefault(("flags", item), []).append(item)
        if stores:
            pending.append(item)
    pending += [writer for register in results for writer in writers.get(register, ()) if writer not in pending]
    found = set(pending)
    while pending:
        for register in reads[pending.pop()]:
            for writer in writers.get(register, ()):
                if writer not in found:
                    found.add(writer)
                    pending.append(writer)
    return found


def _slips(assembly: Assembly, place: int, item: Instruction) -> Iterator[tuple[str, list[Instruction]]]:
    table, row, operands = assembly.table, item.row, item.operands
    if not row.control and row.mnemonic not in table.COMPARISONS:
        yield "left out", []  # without its comparison a loop may only hand more to the one that takes the rest
    if row.mnemonic == "cmp" and isinstance(operands[1], Immediate):
        yield "off by one", [_with(item, 1, Immediate(operands[1].value + 1))]
    if row.mnemonic in ("add", "sub") and isinstance(operands[1], Immediate):
        yield "dropped iteration", [_with(item, 1, Immediate(2 * operands[1].value))]
    condition = table.NEIGHBOURS.get(row.mnemonic)
    if condition is not None and not _whole_steps(assembly, place):
        yield "off by one", [_with_row(item, table.row_named(condition))]
    if row.mnemonic == "lea" and place in _bounds(assembly):
        bound = operands[1]
        assert isinstance(bound, Memory)
        yield "one iteration more", [_with(item, 1, _moved(bound, 1 - bound.disp))]
    for at, operand in enumerate(operands):
        spec = row.operands[at]
        if isinstance(operand, Memory) and spec.role != "a":
            lane = (spec.broadcast_bits or _element_bits(spec)) // 8
            yield "wrong lane", [_with(item, at, _moved(operand, lane))]
        if isinstance(operand, Memory) and spec.sibmem and operand.index is not None:
            yield "wrong stride", [_with(item, at, replace(operand, scale=2 * operand.scale))]
    reads = [at for at, spec in enumerate(row.operands) if spec.role == "r" and not isinstance(operands[at], Immediate)]
    for first, second in pairwise(reads):
        a, b = operands[first], operands[second]
        plain = isinstance(a, (Register, VirtualRegister)) and isinstance(b, (Register, VirtualRegister))
        if plain and a != b and not row.control and not table.commutes(row):
            swapped = list(operands)
            swapped[first], swapped[second] = b, a
            yield "swapped operands", [_copy(item, swapped)]
    other = table.OTHER_ROUNDING.get(row.mnemonic)
    if other is not None:
        for name in other:
            found = table.row_named(row.name.replace(row.mnemonic, name, 1))
            if found is not None and len(found.operands) == len(operands):
                yield "wrong rounding", [_with_row(item, found)]
    if row.operands and row.operands[-1].kind == "imm" and isinstance(operands[-1], Immediate) and not row.control:
        yield "wrong immediate", [_with(item, len(operands) - 1, Immediate(operands[-1].value ^ 1))]
    if item.mask is not None and row.masking != "required":
        yield "mask left off", [_unmasked(item)]
    clobber = _clobber(assembly, item)
    if clobber is not None:
        yield "clobber", [item, clobber]


def _bounds(assembly: Assembly) -> set[int]:
    """Places of `lea last, [stop - (step - 1)]`, the bound of a loop in whole steps (Assembly.loop)."""
    compared = {i.operands[1] for i in assembly.body if isinstance(i, Instruction) and i.row.mnemonic == "cmp"
                and isinstance(i.operands[1], (Register, VirtualRegister))}
    return {place for place, i in enumerate(assembly.body)
            if isinstance(i, Instruction) and i.row.mnemonic == "lea" and i.operands[0] in compared
            and isinstance(i.operands[1], Memory) and i.operands[1].disp < 0 and i.operands[1].index is None}


def _whole_steps(assembly: Assembly, place: int) -> bool:
    """Whether the jump here ends a loop in whole steps: where extents are multiples of the step, running it up to the
    bound or up to and with it is the same."""
    before = assembly.body[place - 1]
    bounds = {assembly.body[at].operands[0] for at in _bounds(assembly)}  # type: ignore[union-attr]
    return isinstance(before, Instruction) and before.row.mnemonic == "cmp" and before.operands[1] in bounds


def _element_bits(spec: Any) -> int:
    if spec.sibmem:
        return 32
    digits = spec.dtype.lstrip("bfiu")
    return min(int(digits), spec.memory_bits) if digits.isdigit() else int(spec.memory_bits)


def _clobber(assembly: Assembly, item: Instruction) -> Instruction | None:
    """Something written over the register that the instruction has just made."""
    target = item.operands[0] if item.operands else None
    if not isinstance(target, (Register, VirtualRegister)) or not item.row.operands[0].writes:
        return None
    zero = assembly.table.zero_row(item.row.operands[0])
    registers = [o for o in item.operands if isinstance(o, (Register, VirtualRegister))]
    if zero is item.row or (item.row.name in assembly.table.IDIOMS and len(set(registers)) == 1):
        return None  # it is zero already
    return None if zero is None else Instruction(zero, [target] * len(zero.operands), location=item.location)


def _copy(item: Instruction, operands: list[Any]) -> Instruction:
    return Instruction(item.row, operands, item.mask, item.zeroing, item.location, item.comment)


def _with(item: Instruction, at: int, operand: Any) -> Instruction:
    return _copy(item, [*item.operands[:at], operand, *item.operands[at + 1:]])


def _with_row(item: Instruction, row: Any) -> Instruction:
    return Instruction(row, list(item.operands), item.mask, item.zeroing, item.location, item.comment)


def _unmasked(item: Instruction) -> Instruction:
    return Instruction(item.row, list(item.operands), None, False, item.location, item.comment)


def _moved(memory: Memory, by: int) -> Memory:
    return Memory(memory.base, memory.index, memory.scale, memory.disp + by, memory.broadcast, memory.label)
