"""What must come before what in a basic block, for the scheduler (schedule.py).

Enters: the instructions of a block, and what they read and write (liveness.py). Leaves: `Dependences`.
Holds: in any order that keeps them the block computes the same: a register's writes and reads, flags, memory accesses
that may touch the same bytes, and instructions with side effects stay in order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from .joined import Classes
from .liveness import Flow, members
from .machine import Instruction, Label, Memory
from .row_facts import READ, WRITE, Abi, FactsTable, RowFacts, facts_table

LOAD_LATENCY_GENERAL = 4
LOAD_LATENCY_VECTOR = 7
"""Cycles from address to register on an L1 hit: 4 to 5 to a general register, 7 to 8 to a vector register on Zen 4."""
MOST_TRACKED_STORES = 32
_FLAGS = -1
"""Stands beside the classes of registers."""


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one row in one form (with a memory operand or without): latency, cycles of its unit, and the unit."""

    latency: float
    throughput: float
    unit: Any


_FREE = Cost(0.0, 0.0, None)
"""Of a copy that the allocator will drop, as both of its registers are one."""


def cost_of(facts: RowFacts, row: Any, loads: bool, stores: bool) -> Cost:
    latency = float(row.latency)
    if loads:
        vector = any(o.kind in ("vec", "mask") for o in row.operands)
        latency = (LOAD_LATENCY_VECTOR if vector else LOAD_LATENCY_GENERAL) + (0 if facts.move_bits else latency)
    unit = "load" if loads and facts.move_bits else "store" if stores and facts.move_bits else row.ports
    return Cost(latency, float(row.throughput) if row.ports else 0.0, unit)


class JoinedRegisters:
    """joined: the class of each node. kind_of: its kind, the last for reserved registers. limits: for each kind."""

    __slots__ = ("joined", "kind_of", "limits")

    def __init__(self, classes: Classes, abi: Abi) -> None:
        flow = classes.flow
        allocatable = sum(len(numbers) for numbers in abi.registers.values())
        self.joined = [classes.find(node) for node in range(len(flow.nodes))]
        self.kind_of = flow.kind_of[:]
        for node in range(allocatable, flow.physical):
            self.kind_of[node] = len(flow.kinds)
        self.limits = [max(0, len(abi.registers.get(kind, ())) - 1) for kind in flow.kinds]


class Dependences:
    """Of the instructions of one block. Numbers count from its first instruction.

    after: those that wait for each, and for how many cycles. waits_for: for how many each waits. takes, makes: the
    values (what a register holds from one write to the next) that each reads, and begins. value_kind: the kind of
    register of each value. value_uses: how many read it, and one more if it is wanted after the block. height: cycles
    from each to the end of the longest chain. live: registers of each kind that are live before the block.
    """

    __slots__ = ("after", "cost", "height", "live", "makes", "takes", "value_kind", "value_uses", "waits_for")

    def __init__(self, size: int) -> None:
        self.after: list[list[tuple[int, float]]] = [[] for _ in range(size)]
        self.waits_for = [0] * size
        self.cost: list[Cost] = []
        self.height = [0.0] * size
        self.takes: list[list[int]] = []
        self.makes: list[list[int]] = []
        self.value_kind: list[int] = []
        self.value_uses: list[int] = []
        self.live: list[int] = []

    def order(self, first: int, second: int, cycles: float) -> None:
        self.after[first].append((second, cycles))
        self.waits_for[second] += 1

    def new_value(self, kind: int) -> int:
        self.value_kind.append(kind)
        self.value_uses.append(0)
        return len(self.value_kind) - 1

    def measure_heights(self) -> None:
        height = self.height
        for number in range(len(height) - 1, -1, -1):
            best = self.cost[number].latency
            for other, cycles in self.after[number]:
                if cycles + height[other] > best:
                    best = cycles + height[other]
            height[number] = best


def dependences(
    body: list[Instruction | Label],
    flow: Flow,
    registers: JoinedRegisters,
    block: int,
    start: int,
    stop: int,
    abi: Abi,
    costs: dict[Any, Cost],
) -> Dependences:
    """Of the instructions from `start` to `stop` of a block. costs: of the forms of rows met so far."""
    made = Dependences(stop - start)
    reader = _Reader(made, flow, registers, facts_table(abi), costs)
    for place in range(start, stop):
        item = body[place]
        assert isinstance(item, Instruction)
        reader.read(place - start, place, item)
    # What is wanted after the block never dies in it: by what follows in the body, or by other blocks.
    joined, kind_of = registers.joined, registers.kind_of
    wanted = {joined[node] for node in members(flow.live_out[block])}
    for place in range(stop, flow.block_start[block + 1]):
        for node in flow.uses[place] + flow.changes[place]:
            wanted.add(joined[node])
    for register, value in reader.value_of.items():
        if register in wanted:
            made.value_uses[value] += 1
    made.measure_heights()
    made.live = [0] * (max(kind_of, default=0) + 2)
    for register in {joined[node] for node in members(flow.live_in[block])}:
        made.live[kind_of[register]] += 1
    return made


class _Access(NamedTuple):
    """Of memory. address: values of base and index, and the scale, or a number of its own where lanes have addresses of
    theirs; None where it is a constant beside the code."""

    memory: Memory | None
    address: Any
    loads: bool
    stores: bool


class _Reader:
    """Goes over the instructions of a block in their order.

    writer, readers: of each class of registers the instruction that wrote it last, and those that have read it since.
    value_of: the value it holds.
    """

    def __init__(self, made: Dependences, flow: Flow, registers: JoinedRegisters, facts_of: FactsTable,
                 costs: dict[Any, Cost]) -> None:
        self.made, self.flow, self.facts_of, self.costs = made, flow, facts_of, costs
        self.joined, self.kind_of = registers.joined, registers.kind_of
        self.writer: dict[int, int] = {}
        self.readers: dict[int, list[int]] = {}
        self.value_of: dict[int, int] = {}
        self.memory = _MemoryOrder(made)

    def read(self, number: int, place: int, item: Instruction) -> None:
        facts, joined, flow = self.facts_of[item.row], self.joined, self.flow
        reads = [joined[node] for node in flow.uses[place]]
        writes = [joined[node] for node in flow.writes[place]]
        copies = bool(facts.move_bits) and len(reads) == 1 and reads == writes
        if facts.reads_flags:
            reads.append(_FLAGS)
        if facts.writes_flags:
            writes.append(_FLAGS)
        if flow.changes[place]:
            changes = [joined[node] for node in flow.changes[place]]
            reads += changes
            writes = changes + writes
        self._reads(number, reads)
        access = self._access(item, facts)
        self._writes(number, writes)
        form = (item.row, access.loads, access.stores)
        cost = self.costs.get(form)
        if cost is None:
            cost = self.costs[form] = cost_of(facts, *form)
        self.made.cost.append(_FREE if copies else cost)
        self.memory.follow(number, facts, access)

    def _reads(self, number: int, registers: list[int]) -> None:
        made, writer, readers, value_of = self.made, self.writer, self.readers, self.value_of
        takes: list[int] = []
        for register in registers:
            if register >= 0:
                value = value_of.get(register)
                if value is None:
                    value = value_of[register] = made.new_value(self.kind_of[register])
                if value not in takes:
                    takes.append(value)
                    made.value_uses[value] += 1
            before = writer.get(register)
            if before is not None:
                made.order(before, number, made.cost[before].latency)
            there = readers.get(register)
            if there is None:
                readers[register] = [number]
            else:
                there.append(number)
        made.takes.append(takes)

    def _writes(self, number: int, registers: list[int]) -> None:
        made, writer = self.made, self.writer
        makes: list[int] = []
        for register in registers:
            for reader in self.readers.pop(register, ()):
                if reader != number:
                    made.order(reader, number, 0.0)
            before = writer.get(register)
            if before is not None and before != number:
                made.order(before, number, 0.0)
            writer[register] = number
            if register >= 0:
                value = self.value_of[register] = made.new_value(self.kind_of[register])
                makes.append(value)
        made.makes.append(makes)

    def _access(self, item: Instruction, facts: RowFacts) -> _Access:
        loads = stores = False
        memory: Memory | None = None
        address: Any = None
        for operand, how in zip(item.operands, facts.access, strict=True):
            if type(operand) is Memory:
                loads = loads or how & READ != 0
                if operand.label is None:
                    memory = operand
                    stores = stores or how & WRITE != 0
                    address = (self._value_at(operand.base), self._value_at(operand.index), operand.scale)
        return _Access(memory, address, loads, stores)

    def _value_at(self, part: Any) -> int:
        """The value that a register of an address holds here."""
        return -1 if part is None else self.value_of[self.joined[self.flow.node_of[part]]]


class _MemoryOrder:
    """Which accesses of memory stay in order.

    stores, loads: those since the barrier, as (instruction, address, first byte, end). barrier: the last instruction
    that all others stay behind. since: all that has accessed memory since it.
    """

    def __init__(self, made: Dependences) -> None:
        self.made = made
        self.stores: list[tuple[int, Any, int, int]] = []
        self.loads: list[tuple[int, Any, int, int]] = []
        self.barrier = -1
        self.since: list[int] = []

    def follow(self, number: int, facts: RowFacts, access: _Access) -> None:
        memory, address, loads, stores = access
        prefetches = facts.side_effects and memory is not None and not loads and not stores
        if (facts.side_effects and not prefetches) or (loads and stores) or (stores and self._is_full()):
            self._stay_behind_all(number)
        elif memory is not None and (loads or stores):
            if self.barrier >= 0:
                self.made.order(self.barrier, number, 0.0)
            width = max(facts.bits) // 8 or 64
            if memory.index is not None and (memory.index.kind != "gpr" or width > 64):
                address = number  # each lane, each row of a tile, has an address of its own
            first, end = memory.disp, memory.disp + max(width, 64 if memory.broadcast else 0)
            self._order(self.stores, number, address, first, end, 1.0 if loads else 0.0)
            if stores:
                self._order(self.loads, number, address, first, end, 0.0)
            self.since.append(number)
            (self.stores if stores else self.loads).append((number, address, first, end))

    def _is_full(self) -> bool:
        """There are too many to compare with each: a store follows all of them then, and stands for all of them."""
        return len(self.stores) >= MOST_TRACKED_STORES or len(self.loads) >= 4 * MOST_TRACKED_STORES

    def _order(self, others: list[tuple[int, Any, int, int]], number: int, address: Any, first: int, end: int,
               cycles: float) -> None:
        """It stays behind those that may touch the same bytes."""
        for other, other_address, other_first, other_end in others:
            if other_address != address or (other_first < end and first < other_end):
                self.made.order(other, number, cycles)

    def _stay_behind_all(self, number: int) -> None:
        for other in self.since:
            self.made.order(other, number, 0.0)
        if self.barrier >= 0:
            self.made.order(self.barrier, number, 0.0)
        self.barrier = number
        self.since = []
        self.stores.clear()
        self.loads.clear()
