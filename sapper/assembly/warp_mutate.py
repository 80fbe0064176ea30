"""Planted errors of assembly by hand whose registers the target's assembler gives; see mutate.py.

Enters: a `WarpAssembly`. Leaves: copies of it with one slip each: an instruction left out, a number or an offset that
is off, another condition or rounding, swapped operands, a predicate left off, a register cleared after it was made,
two registers of a vector exchanged.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Any

from ..codegen.machine import Immediate, Instruction, Memory, VirtualRegister
from .mutate import Mutant
from .notation import Reg
from .warp import WarpAssembly
from .warp_block import WarpBlock

_NEIGHBOURS = {"lt": "le", "le": "lt", "gt": "ge", "ge": "gt", "eq": "ne", "ne": "eq", "lo": "ls", "ls": "lo",
               "hi": "hs", "hs": "hi"}
_ROUNDINGS = {"rn": "rz", "rz": "rn", "rni": "rzi", "rzi": "rni"}
_COMMUTES = frozenset({"add", "mul", "min", "max", "and", "or", "xor", "fma", "mad"})


@dataclass(frozen=True)
class PlantedBlock(WarpBlock):
    """A block with one slip. number: of its mutant."""

    number: int = 0

    def assemble(self, sizes: tuple[int, ...], immediates: list[int], first_register: int = 0,
                 ) -> tuple[WarpAssembly, Reg, list[Reg]]:
        assembly, out, inputs = super().assemble(sizes, immediates, first_register)
        wrong: WarpAssembly = next(islice(mutants(assembly), self.number, None)).assembly
        return wrong, out, inputs


def planted(block: WarpBlock, number: int) -> PlantedBlock:
    """The block with one of its mutants in its place, over the mutant's own registers."""
    return PlantedBlock(block.table, f"{block.name}_{number}", block.write, block.inputs, block.result, block.features,
                        number=number)


def mutants(assembly: WarpAssembly) -> Iterator[Mutant]:
    """All mutants of a piece, in the order of its text."""
    for place, item in enumerate(assembly.body):
        if not isinstance(item, Instruction):
            continue
        for kind, changed in _slips(assembly, item):
            made = copy.copy(assembly)
            made.body = [*assembly.body[:place], *changed, *assembly.body[place + 1:]]
            yield Mutant(kind, place, item, made)


def _slips(assembly: WarpAssembly, item: Instruction) -> Iterator[tuple[str, list[Instruction]]]:
    table, form, operands = assembly.table, item.row, item.operands
    if form.row.opcode not in table.ENDS:
        yield "left out", []
    if item.mask is not None and form.row.opcode not in table.BRANCHES:
        yield "predicate left off", [Instruction(form, list(operands), None, False, item.location, item.comment)]
    words = form.mnemonic.split(".")
    for kind, others in (("off by one", _NEIGHBOURS), ("wrong rounding", _ROUNDINGS)):
        for at, word in enumerate(words):
            found = table.forms_of(".".join([*words[:at], others.get(word, word), *words[at + 1:]]))
            if word in others and at and found:
                yield kind, [Instruction(found[0], list(operands), item.mask, False, item.location, item.comment)]
    for at, operand in enumerate(operands):
        if isinstance(operand, Immediate):
            yield "wrong number", [_with(item, at, Immediate(operand.value + 1))]
        if isinstance(operand, Memory) and operand.label is None:
            moved = Memory(operand.base, None, 1, operand.disp + 4, False, None)
            yield "wrong element", [_with(item, at, moved)]
        parts: Any = operand
        if isinstance(operand, tuple) and len(operand) > 1 and parts[0] != parts[1]:
            yield "wrong register", [_with(item, at, (parts[1], parts[0], *parts[2:]))]
    specs = table.operands_of(form, len(operands))[:len(operands)]
    reads = [at for at, spec in enumerate(specs) if spec.role == "r"]
    for first, second in pairwise(reads):
        a, b = operands[first], operands[second]
        if form.row.opcode not in _COMMUTES and isinstance(a, VirtualRegister) and isinstance(b, VirtualRegister) \
                and a.kind == b.kind and a != b and not table.is_symmetric(item, first, second):
            swapped = list(operands)
            swapped[first], swapped[second] = b, a
            yield "swapped operands", [Instruction(form, swapped, item.mask, False, item.location, item.comment)]
    target = operands[0] if operands else None
    clear = {"vec": "mov.b32", "gpr": "mov.b64"}.get(getattr(target, "kind", ""))
    if clear is not None and form.operands[0].writes and isinstance(target, VirtualRegister):
        yield "clobber", [item, Instruction(table.forms_of(clear)[0], [target, Immediate(0)], item.mask, False,
                                            item.location)]


def _with(item: Instruction, at: int, operand: Any) -> Instruction:
    return Instruction(item.row, [*item.operands[:at], operand, *item.operands[at + 1:]], item.mask, False,
                       item.location, item.comment)
