"""Lives of registers that the target's assembler gives: how many are wanted over time, and columns to draw them in.

Enters: instructions over virtual registers, in the order written, and the family's table (targets/ptx/assembly.py).
Leaves: `Lives`, plain data. Holds: instruction i has the points 2i (where it reads) and 2i + 1 (where it writes), and
bit p of a live range is set where the register is wanted at point p; a result that nobody reads is wanted where it is
written. A predicated write ends nothing, as threads may keep what they had. Sets are Python ints used as bitsets.
The assembler may choose another order, so that its own count may differ, in both directions.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from .liveness import members
from .machine import Instruction, Label, LabelReference, Memory, VirtualRegister


@dataclass(slots=True)
class Column:
    """Registers of one kind, no two of which are wanted at one point. lives: (first point, last point, register), in
    order."""

    kind: str
    lives: list[tuple[int, int, VirtualRegister]]


@dataclass(frozen=True)
class Lives:
    """registers: in order of appearance. points: the live range of each. reads, writes: bitsets of registers, by place.
    words: of 32 bits that are wanted at each place, the larger of its two points; halves of 16 bits share one.
    """

    registers: list[VirtualRegister]
    points: list[int]
    reads: list[int]
    writes: list[int]
    words: list[int]

    @cached_property
    def columns(self) -> list[Column]:
        """As few columns as first fit finds, by kind: a register goes to the first in which its range is free."""
        taken: dict[str, list[tuple[int, Column]]] = {}
        order = sorted(range(len(self.registers)), key=lambda node: (self.points[node] & -self.points[node], node))
        for node in order:
            register, range_ = self.registers[node], self.points[node]
            of_kind = taken.setdefault(register.kind, [])
            at = next((n for n, (used, _) in enumerate(of_kind) if not used & range_), len(of_kind))
            used, column = of_kind[at] if at < len(of_kind) else (0, Column(register.kind, []))
            column.lives += [(first, last, register) for first, last in stretches(range_)]
            of_kind[at:at + 1] = [(used | range_, column)]
        found = [column for kind in sorted(taken) for _, column in taken[kind]]
        for column in found:
            column.lives.sort(key=lambda life: life[:2])
        return found

    @cached_property
    def letters(self) -> list[str]:
        """By place, a letter for each column: `.` free, `|` holds a value, `r` read, `w` written, `x` both."""
        node_of = {register: node for node, register in enumerate(self.registers)}
        drawn = [bytearray(b".") * len(self.columns) for _ in self.words]
        for at, column in enumerate(self.columns):
            for first, last, register in column.lives:
                bit = 1 << node_of[register]
                for place in range(first // 2, last // 2 + 1):
                    read, written = self.reads[place] & bit, self.writes[place] & bit
                    letter = "x" if read and written else "r" if read else "w" if written else "|"
                    before = chr(drawn[place][at])
                    drawn[place][at] = ord("x" if {before, letter} == {"r", "w"} else letter)
        return [row.decode() for row in drawn]


def stretches(bits: int) -> Iterator[tuple[int, int]]:
    """(first, last) of each stretch of neighbouring bits that are set, lowest first."""
    at = 0
    while bits:
        skipped = (bits & -bits).bit_length() - 1
        bits >>= skipped
        length = (~bits & (bits + 1)).bit_length() - 1
        yield at + skipped, at + skipped + length - 1
        bits >>= length
        at += skipped + length


def lives(body: Sequence[Instruction | Label], table: Any, results: Collection[Any] = ()) -> Lives:
    """The lives in a function's body. results: registers that are wanted at its end."""
    nodes: dict[VirtualRegister, int] = {}

    def bitset(registers: Collection[VirtualRegister]) -> int:
        found = 0
        for register in registers:
            found |= 1 << nodes.setdefault(register, len(nodes))
        return found

    accesses = [_accesses(table, item) if isinstance(item, Instruction) else ([], [], []) for item in body]
    reads, writes, ends = ([bitset(each[part]) for each in accesses] for part in range(3))
    before, after = _Paths.of(body, table).wanted(reads, ends, bitset(results))
    points = [0] * len(nodes)
    for place in range(len(body)):
        bits = 1 << 2 * place
        for node in members(before[place]):
            points[node] |= bits
        for node in members(after[place] | writes[place]):
            points[node] |= 2 * bits
    size = [table.register_bits(register.kind) for register in nodes]
    words = [max(_words(before[place], size), _words(after[place] | writes[place], size)) for place in range(len(body))]
    return Lives(list(nodes), points, reads, writes, words)


@dataclass(frozen=True, slots=True)
class _Paths:
    """Where each place goes on: to its label's place, if it may jump; to the next one, if it does not always."""

    targets: list[int | None]
    goes_on: list[bool]

    @staticmethod
    def of(body: Sequence[Instruction | Label], table: Any) -> _Paths:
        places = {item.name: place for place, item in enumerate(body) if isinstance(item, Label)}
        targets: list[int | None] = [None] * len(body)
        goes_on = [True] * len(body)
        for place, item in enumerate(body):
            if isinstance(item, Instruction):
                label = next((o.name for o in item.operands if isinstance(o, LabelReference)), None)
                targets[place] = None if label is None else places[label]
                goes_on[place] = item.mask is not None or (label is None and item.row.row.opcode not in table.ENDS)
        return _Paths(targets, goes_on)

    def wanted(self, reads: list[int], ends: list[int], results: int = 0) -> tuple[list[int], list[int]]:
        """(what is read on some path from before each place, and from after it, before its value ends)."""
        before, after = [0] * len(reads), [0] * len(reads)
        changed = True
        while changed:
            changed = False
            live = results
            for place in range(len(reads) - 1, -1, -1):
                if not self.goes_on[place]:
                    live = 0
                target = self.targets[place]
                if target is not None:
                    live |= before[target]
                after[place] = live
                live = (live & ~ends[place]) | reads[place]
                if live != before[place]:
                    before[place], changed = live, True
        return before, after

    def written(self, writes: list[int]) -> list[int]:
        """What is written on some path to each place."""
        before = [0] * (len(writes) + 1)
        changed = True
        while changed:
            changed = False
            for place, written in enumerate(writes):
                known = before[place] | written
                for following in (self.targets[place], place + 1 if self.goes_on[place] else None):
                    if following is not None and known & ~before[following]:
                        before[following] |= known
                        changed = True
        return before[:-1]


def held(body: Sequence[Instruction | Label], table: Any, reads: list[int], writes: list[int]) -> list[int]:
    """Buffers that hold something at each place, as bitsets: what was written on a way to it and is read on a way from
    it. Where neither way leads from one place to another, other warps run the other: what these write may be there, and
    what these read is kept. reads, writes: bitsets of buffers, by place; a write may be of a part, so it ends nothing.
    """
    paths = _Paths.of(body, table)
    accesses = [place for place in range(len(body)) if reads[place] | writes[place]]
    marks = [0] * len(body)
    for number, place in enumerate(accesses):
        marks[place] = 1 << number
    before, after = paths.wanted(marks, [0] * len(body))
    everything = (1 << len(accesses)) - 1
    known: dict[tuple[int, int], int] = {}
    found = []
    for came, here, goes in zip(paths.written(marks), before, after, strict=True):
        key = came, here | goes
        if key not in known:
            beside = everything & ~(came | here | goes)
            written = read = 0
            for number in members(came | beside):
                written |= writes[accesses[number]]
            for number in members(here | goes | beside):
                read |= reads[accesses[number]]
            known[key] = written & read
        found.append(known[key])
    return found


def limits(body: Sequence[Instruction | Label], table: Any, start: int) -> list[int]:
    """Registers that a thread has at each place: `start`, until an instruction on the way sets another number; where
    ways with different ones meet, the least."""
    paths = _Paths.of(body, table)
    found = [0] * (len(body) + 1)
    pending = [(0, start)]
    while pending:
        place, limit = pending.pop()
        while place <= len(body) and (not found[place] or limit < found[place]):
            found[place] = limit
            if place == len(body):
                break
            item = body[place]
            limit = (table.register_limit(item) if isinstance(item, Instruction) else 0) or limit
            target = paths.targets[place]
            if target is not None:
                pending.append((target, limit))
            if not paths.goes_on[place]:
                break
            place += 1
    return [limit or start for limit in found[:-1]]


def _accesses(table: Any, item: Instruction) -> tuple[list[Any], list[Any], list[Any]]:
    """Registers that an instruction reads, those that it writes, and of these those whose value before ends in every
    thread."""
    reads: list[Any] = [] if item.mask is None else [item.mask]
    writes: list[Any] = []
    for spec, operand in zip(table.operands_of(item.row, len(item.operands)), item.operands, strict=False):
        for part in operand if type(operand) is tuple else (operand,):
            if isinstance(part, VirtualRegister):
                if spec.reads or spec.role == "m":
                    reads.append(part)
                if spec.writes:
                    writes.append(part)
            elif isinstance(part, Memory):
                reads += [] if part.base is None else [part.base]
            else:
                reads += getattr(part, "registers", ())
    return reads, writes, writes if item.mask is None else []


def _words(registers: int, size: list[int]) -> int:
    return -(-sum(size[node] for node in members(registers)) // 32)
