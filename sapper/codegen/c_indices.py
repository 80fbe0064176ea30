"""Machine code for x86-64 that looks through the indices of a call from C, as `ir.indices` does for one from Python.

Enters: a row "indexed" (ir/indices.py), where dimensions and scalars lie. Leaves: code that goes to a label where a
value of the index is outside. Holds: it goes there for exactly the calls that `ir.indices.outside` finds one for.

Below the stack pointer is a word for the smallest value of each node, then one for the largest of each. First these are
computed of ranges; where that does not show all to be inside, the counters are walked, and the first words have values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from ..ir.indices import TURNED, UNSPECIFIED, Row
from ..targets.x86_64.registers import RAX, RCX, RDX, RSP
from .listing import Listing, at
from .machine import Immediate, Memory

Load = Callable[[Listing, str, str], None]
"""Put ("dim" or "scalar", name) into rax; other registers stay."""

_CONDITIONS = {"lt": "l", "le": "le", "gt": "g", "ge": "ge", "eq": "e", "ne": "ne"}
_PLAIN = {"add": "add.64", "sub": "sub.64", "mul": "imul.64", "and": "and.64", "or": "or.64", "xor": "xor.64"}
_RISING = frozenset({"number", "dim", "scalar", "counter", "add", "sub", "mul", "floordiv", "min", "max"})
"""Ops of which ranges are computed; of products and quotients those by a number above 0."""


def check_index(emit: Listing, row: Row, load: Load, refuse: str) -> None:
    """rax, rcx and rdx are lost; `load` must not go by rsp."""
    code = _Check(emit, row, load)
    size_bytes = 16 * len(row.nodes)
    emit("sub.64", RSP, Immediate(size_bytes))
    if code.rises():
        code.ranges()
    code.walk()
    emit("jmp", code.done)
    emit.label(code.wrong)
    emit("add.64", RSP, Immediate(size_bytes))
    emit("jmp", refuse)
    emit.label(code.done)
    emit("add.64", RSP, Immediate(size_bytes))


class _Check:
    def __init__(self, emit: Listing, row: Row, load: Load) -> None:
        self.emit, self.row, self.load = emit, row, load
        self.name = f"index{len(emit.body)}"
        self.done, self.wrong = f"{self.name}.done", f"{self.name}.wrong"
        self.labels = 0

    def least(self, place: int) -> Memory:
        return at(RSP, 8 * place)

    def most(self, place: int) -> Memory:
        return at(RSP, 8 * (len(self.row.nodes) + place))

    def leaf(self, place: int) -> bool:
        """A node without operands into rax, if it is one."""
        op, *operands = self.row.nodes[place]
        if op == "number":
            self.emit("mov.64", RAX, Immediate(operands[0]))
        elif op in ("dim", "scalar"):
            self.load(self.emit, op, operands[0])
        return op in ("number", "dim", "scalar")

    def label(self) -> str:
        self.labels += 1
        return f"{self.name}.{self.labels}"

    # Ranges.

    def needed(self) -> list[int]:
        """The nodes that ranges are computed of, in order."""
        row, found = self.row, set()
        pending = [row.low, row.high, row.extent]
        while pending:
            place = pending.pop()
            if place not in found:
                found.add(place)
                op, *operands = row.nodes[place]
                pending += row.counters[operands[0]][:2] if op == "counter" else (
                    [] if op in ("number", "dim", "scalar") else operands[:1] if op == "wrap" else operands)
        return sorted(found)

    def rises(self) -> bool:
        nodes = self.row.nodes
        for place in self.needed():
            op, *operands = nodes[place]
            by = nodes[operands[1]] if op in ("mul", "floordiv") else ("number", 1)
            if op not in _RISING or by[0] != "number" or by[1] <= 0:
                return False
        return True

    def ranges(self) -> None:
        """To `done` where all is inside."""
        emit, row, through = self.emit, self.row, self.label()
        for place in self.needed():
            op, *operands = row.nodes[place]
            if self.leaf(place):
                emit("mov.64", self.least(place), RAX)
                emit("mov.64", self.most(place), RAX)
            elif op == "counter":
                start, stop, _ = row.counters[operands[0]]
                emit("mov.64", RCX, self.least(start))
                emit("mov.64", self.least(place), RCX)
                emit("mov.64", RAX, self.most(stop))
                emit("sub.64", RAX, Immediate(1))
                emit("mov.64", self.most(place), RAX)
                emit("cmp.64", RAX, RCX)
                emit("jl", self.done)       # it walks nothing
            else:
                for end, other in ((self.least, self.most), (self.most, self.least)):
                    emit("mov.64", RCX, (other if op == "sub" else end)(operands[1]))
                    emit("mov.64", RAX, end(operands[0]))
                    self.binary(op)
                    if op in ("add", "sub", "mul"):
                        emit("jo", through)
                    emit("mov.64", end(place), RAX)
        emit("mov.64", RAX, self.least(row.low))
        emit("test.64", RAX, RAX)
        emit("js", through)
        emit("mov.64", RAX, self.most(row.high))
        emit("cmp.64", RAX, self.least(row.extent))
        emit("jl", self.done)
        emit.label(through)

    # Values.

    def walk(self) -> None:
        """To `wrong` where a value is outside."""
        row = self.row
        depths = self.depths()
        self.level(range(len(row.nodes)), depths, 0, self.done)

    def depths(self) -> list[int]:
        """In how many counters' loops each node is computed."""
        found: list[int] = []
        for op, *operands in self.row.nodes:
            if op == "counter":
                found.append(operands[0] + 1)
            else:
                inputs = [] if op in ("number", "dim", "scalar") else operands[:1] if op == "wrap" else operands
                found.append(max((found[place] for place in inputs), default=0))
        return found

    def level(self, places: Iterable[int], depths: list[int], depth: int, leave: str) -> None:
        """The nodes and guards of one depth, and the loop inside; to `leave` where nothing is touched."""
        emit, row = self.emit, self.row
        for place in places:
            if depths[place] == depth and row.nodes[place][0] != "counter":
                self.value(place)
        for guard in row.guards:
            if depths[guard] == depth:
                emit("mov.64", RAX, self.least(guard))
                emit("test.64", RAX, RAX)
                emit("je", leave)
        if depth == len(row.counters):
            for index in dict.fromkeys((row.low, row.high)):
                emit("mov.64", RAX, self.least(index))
                emit("test.64", RAX, RAX)
                emit("js", self.wrong)
                emit("cmp.64", RAX, self.least(row.extent))
                emit("jge", self.wrong)
            return
        start, stop, step = row.counters[depth]
        counter = next(place for place, node in enumerate(row.nodes) if list(node) == ["counter", depth])
        again, following = self.label(), self.label()
        emit("mov.64", RAX, self.least(start))
        emit.label(again)
        emit("mov.64", self.least(counter), RAX)
        emit("cmp.64", RAX, self.least(stop))
        emit("jge", leave)
        self.level(places, depths, depth + 1, following)
        emit.label(following)
        emit("mov.64", RAX, self.least(counter))
        emit("add.64", RAX, Immediate(step))
        emit("jmp", again)

    def value(self, place: int) -> None:
        emit = self.emit
        op, *operands = self.row.nodes[place]
        if not self.leaf(place):
            if op == "wrap":
                self.wrapped(*operands)
            elif op == "select":
                condition, first, second = operands
                emit("mov.64", RCX, self.least(condition))
                emit("mov.64", RAX, self.least(first))
                emit("test.64", RCX, RCX)
                emit("cmove.64", RAX, self.least(second))
            else:
                emit("mov.64", RCX, self.least(operands[1]))
                emit("mov.64", RAX, self.least(operands[0]))
                self.binary(op)
        emit("mov.64", self.least(place), RAX)

    def binary(self, op: str) -> None:
        """rax op rcx into rax."""
        emit = self.emit
        if op in _PLAIN:
            emit(_PLAIN[op], RAX, RCX)
        elif op in ("min", "max"):
            emit("cmp.64", RAX, RCX)
            emit("cmovg.64" if op == "min" else "cmovl.64", RAX, RCX)
        elif op in TURNED:
            emit("cmp.64", RAX, RCX)
            emit("mov.32", RAX, Immediate(0))
            emit("mov.32", RCX, Immediate(1))
            emit(f"cmov{_CONDITIONS[op]}.64", RAX, RCX)
        else:
            self.divide(op)

    def divide(self, op: str) -> None:
        """Rounded down; by 0 it is UNSPECIFIED."""
        emit, zero, negative, down, end = self.emit, *(self.label() for _ in range(4))
        emit("test.64", RCX, RCX)
        emit("je", zero)
        emit("cmp.64", RCX, Immediate(-1))
        emit("je", negative)                # where the processor traps for the least integer
        emit("cqo")
        emit("idiv.64", RCX)
        emit("test.64", RDX, RDX)
        emit("je", down)
        emit("xor.64", RCX, RDX)            # a rest with another sign than what is divided by: one too large
        emit("jns", down)
        emit("xor.64", RCX, RDX)
        emit("add.64", RDX, RCX)
        emit("sub.64", RAX, Immediate(1))
        emit.label(down)
        if op == "mod":
            emit("mov.64", RAX, RDX)
        emit("jmp", end)
        emit.label(negative)
        if op == "mod":
            emit("xor.32", RAX, RAX)
        else:
            emit("neg.64", RAX)
        emit("jmp", end)
        emit.label(zero)
        emit("mov.64", RAX, Immediate(UNSPECIFIED))
        emit.label(end)

    def wrapped(self, place: int, bits: int, signed: int) -> None:
        self.emit("mov.64", RAX, self.least(place))
        self.emit("shl.imm.64", RAX, Immediate(64 - bits))
        self.emit("sar.imm.64" if signed else "shr.imm.64", RAX, Immediate(64 - bits))
