"""List scheduling within basic blocks, before register allocation.

Enters: a MachineFunction with virtual registers and the target's register facts. Leaves: the same function with the
instructions of some blocks in another order; the result is the same, since these stay in order: a register's writes
and reads, flags, memory accesses that may touch the same bytes, and instructions with side effects.
Holds: registers that copies will join (allocate.py) count as one register, so no order makes a copy necessary that was
not. A block is given a new order only if a model that issues in order finds it faster, and if it wants no more
registers than the old order, or one fewer than there are. A jump stays last, and so does the comparison right before
it, which some processors join with it.

The model: each instruction starts when its inputs are there and its unit is free; `ISSUE_WIDTH` start in a cycle.
Latencies, throughputs and ports are the rows'. An instruction moves up past at most `WINDOW` others, so that what runs
ahead (loads, mostly) is a little ahead.
"""

from __future__ import annotations

from typing import Any

from .allocate import joined_registers
from .liveness import READ, WRITE, Abi, Flow, RowFacts, analyse, facts_table, live_ranges
from .machine import Instruction, MachineFunction, Memory, Register

ISSUE_WIDTH = 4
WINDOW = 24
LOAD_LATENCY_GENERAL = 4
LOAD_LATENCY_VECTOR = 7
"""Cycles from address to register on an L1 hit: 4 to 5 to a general register, 7 to 8 to a vector register on Zen 4."""
MOST_TRACKED_STORES = 32


class _Cost:
    """latency, cycles of its unit, and the unit, of one row in one form (with a memory operand or without)."""

    __slots__ = ("latency", "throughput", "unit")

    def __init__(self, row: Any, facts: RowFacts, loads: bool, stores: bool) -> None:
        latency = float(row.latency)
        if loads:
            vector = any(o.kind in ("vec", "mask") for o in row.operands)
            latency = (LOAD_LATENCY_VECTOR if vector else LOAD_LATENCY_GENERAL) + (0 if facts.move_bits else latency)
        self.latency = latency
        self.throughput = float(row.throughput)
        self.unit: Any = "load" if loads and facts.move_bits else "store" if stores and facts.move_bits else row.ports


class _Block:
    """The dependences of one block. Numbers count from its first instruction."""

    __slots__ = ("after", "cost", "height", "makes", "takes", "value_kind", "value_uses", "waits_for")

    def __init__(self, size: int) -> None:
        self.after: list[list[tuple[int, float]]] = [[] for _ in range(size)]  # (instruction, cycles)
        self.waits_for = [0] * size
        self.cost: list[_Cost] = []
        self.height = [0.0] * size
        self.takes: list[list[int]] = []  # values that it reads
        self.makes: list[list[int]] = []  # values that it begins
        self.value_kind: list[int] = []
        self.value_uses: list[int] = []


def schedule(function: MachineFunction, abi: Abi) -> int:
    """Reorder the blocks of `function` where that helps. Returns the number of blocks changed."""
    flow = analyse(function, abi)
    allocatable = sum(len(numbers) for numbers in abi.registers.values())
    ranges = live_ranges(flow, allocatable)
    joined = joined_registers(function, flow, ranges, abi)
    kind_of = flow.kind_of[:]
    for node in range(allocatable, flow.physical):
        kind_of[node] = len(flow.kinds)
    limits = [max(0, len(abi.registers.get(kind, ())) - 1) for kind in flow.kinds]
    costs: dict[Any, _Cost] = {}
    body = function.body
    changed = 0
    for block in range(len(flow.block_start) - 1):
        start, stop = flow.block_start[block], flow.block_start[block + 1]
        while start < stop and type(body[start]) is not Instruction:
            start += 1
        stop = _movable_end(function, start, stop, abi)
        if stop - start < 4:
            continue
        order = _reorder(function, flow, joined, kind_of, limits, block, start, stop, abi, costs)
        if order is not None:
            body[start:stop] = [body[start + number] for number in order]
            changed += 1
    return changed


def _movable_end(function: MachineFunction, start: int, stop: int, abi: Abi) -> int:
    """Where the instructions end that may move: before a jump, and before the comparison it waits for."""
    table = facts_table(abi)
    if stop <= start:
        return stop
    last = function.body[stop - 1]
    assert isinstance(last, Instruction)
    facts = table[last.row]
    if not facts.flow:
        return stop
    stop -= 1
    if facts.reads_flags and stop > start:
        before = function.body[stop - 1]
        if isinstance(before, Instruction) and table[before.row].writes_flags:
            stop -= 1
    return stop


def _dependences(
    function: MachineFunction,
    flow: Flow,
    joined: list[int],
    kind_of: list[int],
    block: int,
    start: int,
    stop: int,
    abi: Abi,
    costs: dict[Any, _Cost],
) -> tuple[_Block, list[int]]:
    """The dependences of the instructions from `start` to `stop`, and how many registers are live before them."""
    body = function.body
    table = facts_table(abi)
    size = stop - start
    made = _Block(size)
    after, waits_for = made.after, made.waits_for
    writer: dict[int, int] = {}  # register -> the instruction that wrote it last
    readers: dict[int, list[int]] = {}  # register -> those that have read it since
    value_of: dict[int, int] = {}  # register -> the value it holds
    flags = -1
    value_kind, value_uses = made.value_kind, made.value_uses
    stores: list[tuple[int, Any, int, int]] = []  # (instruction, address, first byte, end)
    loads: list[tuple[int, Any, int, int]] = []
    barrier = -1
    since_barrier: list[int] = []

    def order(first: int, second: int, cycles: float) -> None:
        after[first].append((second, cycles))
        waits_for[second] += 1

    for number in range(size):
        place = start + number
        item = body[place]
        assert isinstance(item, Instruction)
        facts = table[item.row]
        reads = [joined[node] for node in flow.uses[place]]
        changes = [joined[node] for node in flow.changes[place]]
        writes = [joined[node] for node in flow.writes[place]]
        copy = bool(facts.move_bits) and len(reads) == 1 and reads == writes
        if facts.reads_flags:
            reads.append(flags)
        if facts.writes_flags:
            writes.append(flags)
        takes: list[int] = []
        makes: list[int] = []
        address_values: list[int] = []
        for register in reads + changes:
            if register >= 0:
                value = value_of.get(register)
                if value is None:
                    value = value_of[register] = len(value_kind)
                    value_kind.append(kind_of[register])
                    value_uses.append(0)
                if value not in takes:
                    takes.append(value)
                    value_uses[value] += 1
            before = writer.get(register)
            if before is not None:
                order(before, number, made.cost[before].latency)
            readers.setdefault(register, []).append(number)
        loading = storing = False
        memory: Memory | None = None
        for how, operand in zip(facts.access, item.operands, strict=True):
            if type(operand) is Memory and operand.label is None:
                memory = operand
                loading = loading or bool(how & READ)
                storing = storing or bool(how & WRITE)
                for part in (operand.base, operand.index):
                    if part is None:
                        address_values.append(-1)
                    else:
                        key: Any = (part.kind, part.number) if type(part) is Register else part
                        address_values.append(value_of[joined[flow.node_of[key]]])
            elif type(operand) is Memory:
                loading = loading or bool(how & READ)
        for register in changes + writes:
            for reader in readers.pop(register, ()):
                if reader != number:
                    order(reader, number, 0.0)
            before = writer.get(register)
            if before is not None and before != number:
                order(before, number, 0.0)
            writer[register] = number
            if register >= 0:
                value = value_of[register] = len(value_kind)
                value_kind.append(kind_of[register])
                value_uses.append(0)
                makes.append(value)
        made.takes.append(takes)
        made.makes.append(makes)
        form = (item.row, loading, storing)
        cost = costs.get(form)
        if cost is None:
            cost = costs[form] = _Cost(item.row, facts, loading, storing)
        if copy:
            cost = _Cost.__new__(_Cost)
            cost.latency, cost.throughput, cost.unit = 0.0, 0.0, None
        made.cost.append(cost)

        prefetching = facts.side_effects and memory is not None and not loading and not storing
        ordered = facts.side_effects and not prefetching or loading and storing
        if ordered:
            # All memory accesses before it, and all after it, stay where they are.
            for other in since_barrier:
                order(other, number, 0.0)
            if barrier >= 0:
                order(barrier, number, 0.0)
            barrier = number
            since_barrier = []
            stores.clear()
            loads.clear()
        elif memory is not None and (loading or storing):
            if barrier >= 0:
                order(barrier, number, 0.0)
            since_barrier.append(number)
            address: Any = (*address_values, memory.scale)
            if memory.index is not None and memory.index.kind != "gpr":
                address = number  # each lane has an address of its own
            width = max(facts.bits) // 8 or 64
            first, end = memory.disp, memory.disp + max(width, 64 if memory.broadcast else 0)
            entry = (number, address, first, end)
            for other, other_address, other_first, other_end in stores:
                if other_address != address or other_first < end and first < other_end:
                    order(other, number, 1.0 if loading else 0.0)
            if storing:
                for other, other_address, other_first, other_end in loads:
                    if other_address != address or other_first < end and first < other_end:
                        order(other, number, 0.0)
                if len(stores) >= MOST_TRACKED_STORES or len(loads) >= 4 * MOST_TRACKED_STORES:
                    # Too many to compare with each: this store follows all of them and stands for all of them.
                    for other in since_barrier[:-1]:
                        order(other, number, 0.0)
                    barrier = number
                    since_barrier = []
                    stores.clear()
                    loads.clear()
                else:
                    stores.append(entry)
            else:
                loads.append(entry)

    # What is wanted after the block never dies in it: by what follows in the body, or by other blocks.
    wanted = {joined[node] for node in _members(flow.live_out[block])}
    for place in range(stop, flow.block_start[block + 1]):
        for node in flow.uses[place] + flow.changes[place]:
            wanted.add(joined[node])
    for register, value in value_of.items():
        if register in wanted:
            value_uses[value] += 1
    height = made.height
    for number in range(size - 1, -1, -1):
        best = made.cost[number].latency
        for other, cycles in after[number]:
            if cycles + height[other] > best:
                best = cycles + height[other]
        height[number] = best
    live = [0] * (max(kind_of, default=0) + 2)
    for register in sorted({joined[node] for node in _members(flow.live_in[block])}):
        live[kind_of[register]] += 1
    return made, live


def _members(bits: int) -> list[int]:
    """The numbers of the bits that are set, lowest first."""
    found = []
    while bits:
        low = bits & -bits
        found.append(low.bit_length() - 1)
        bits ^= low
    return found


def _issue(made: _Block, order: list[int] | range) -> float:
    """Cycles until the last result is there, when the instructions start in this order."""
    ready = [0.0] * len(made.cost)
    unit_free: dict[Any, float] = {}
    now = end = 0.0
    step = 1.0 / ISSUE_WIDTH
    for number in order:
        cost = made.cost[number]
        start = ready[number]
        if start < now:
            start = now
        if cost.unit is not None:
            free = unit_free.get(cost.unit, 0.0)
            if free > start:
                start = free
            unit_free[cost.unit] = start + cost.throughput
            now = start + step
        for other, cycles in made.after[number]:
            if start + cycles > ready[other]:
                ready[other] = start + cycles
        if start + cost.latency > end:
            end = start + cost.latency
    return end


def _pressure(made: _Block, order: list[int] | range, live_before: list[int]) -> list[int]:
    """The most registers of each kind that this order wants at once."""
    live = live_before[:]
    most = live[:]
    uses = made.value_uses[:]
    for number in order:
        for value in made.takes[number]:
            uses[value] -= 1
        # What dies here frees its register for what begins here.
        for value in made.takes[number]:
            if not uses[value]:
                live[made.value_kind[value]] -= 1
        for value in made.makes[number]:
            kind = made.value_kind[value]
            live[kind] += 1
            if live[kind] > most[kind]:
                most[kind] = live[kind]
        for value in made.makes[number]:
            if not uses[value]:
                live[made.value_kind[value]] -= 1
    return most


def _reorder(
    function: MachineFunction,
    flow: Flow,
    joined: list[int],
    kind_of: list[int],
    limits: list[int],
    block: int,
    start: int,
    stop: int,
    abi: Abi,
    costs: dict[Any, _Cost],
) -> list[int] | None:
    """A better order of the instructions from `start` to `stop`, as numbers from `start`, or None."""
    made, live_before = _dependences(function, flow, joined, kind_of, block, start, stop, abi, costs)
    size = stop - start
    old = range(size)
    old_cycles = _issue(made, old)
    if old_cycles <= 1.02 * _lower_bound(made):
        return None
    old_most = _pressure(made, old, live_before)
    order = _list_schedule(made, size, live_before, [max(a, b) for a, b in zip(limits, old_most, strict=False)])
    if order == list(old) or _issue(made, order) > 0.98 * old_cycles:
        return None
    new_most = _pressure(made, order, live_before)
    for kind, limit in enumerate(limits):
        if new_most[kind] > max(limit, old_most[kind]):
            return None
    return order


def _lower_bound(made: _Block) -> float:
    """No order takes fewer cycles: the longest chain, the busiest unit, the issue width."""
    busy: dict[Any, float] = {}
    issued = 0
    for cost in made.cost:
        if cost.unit is not None:
            busy[cost.unit] = busy.get(cost.unit, 0.0) + cost.throughput
            issued += 1
    return max(max(made.height, default=0.0), max(busy.values(), default=0.0), issued / ISSUE_WIDTH)


def _list_schedule(made: _Block, size: int, live_before: list[int], limits: list[int]) -> list[int]:
    """Take at each step, of the instructions that may come next, the one that can start first.

    Of several, the one with the longest chain behind it, then the first. One that would want more registers than the
    limit waits until nothing else can go on.
    """
    waits_for = made.waits_for[:]
    after, height, costs = made.after, made.height, made.cost
    takes, makes, value_kind = made.takes, made.makes, made.value_kind
    uses = made.value_uses[:]
    live = live_before[:]
    ready_at = [0.0] * size
    unit_free: dict[Any, float] = {}
    done = [False] * size
    first_open = 0  # all before it are done
    now = 0.0
    step = 1.0 / ISSUE_WIDTH
    order: list[int] = []
    available = [number for number in range(size) if not waits_for[number]]
    limits = [*limits, 1 << 30, 1 << 30]
    # Only makers of a new value can raise the pressure; most instructions make one.
    while available:
        horizon = first_open + WINDOW
        best = -1
        best_start = 0.0
        crowded_best = -1
        for number in available:
            if number > horizon:
                continue
            cost = costs[number]
            start = ready_at[number]
            if start < now:
                start = now
            if cost.unit is not None:
                free = unit_free.get(cost.unit, 0.0)
                if free > start:
                    start = free
            if (
                best < 0
                or start < best_start
                or start == best_start
                and (height[number] > height[best] or height[number] == height[best] and number < best)
            ):
                full = False
                for value in makes[number]:
                    kind = value_kind[value]
                    if live[kind] >= limits[kind]:
                        freed = sum(1 for v in takes[number] if uses[v] == 1 and value_kind[v] == kind)
                        if live[kind] + 1 - freed > limits[kind]:
                            full = True
                if full:
                    if crowded_best < 0 or number < crowded_best:
                        crowded_best = number
                    continue
                best, best_start = number, start
        if best < 0:
            best = crowded_best
            best_start = max(now, ready_at[best])
        cost = costs[best]
        if cost.unit is not None:
            unit_free[cost.unit] = max(best_start, unit_free.get(cost.unit, 0.0)) + cost.throughput
            now = best_start + step
        order.append(best)
        done[best] = True
        available.remove(best)
        for value in takes[best]:
            uses[value] -= 1
            if not uses[value]:
                live[value_kind[value]] -= 1
        for value in makes[best]:
            if uses[value]:
                live[value_kind[value]] += 1
        for other, cycles in after[best]:
            waits_for[other] -= 1
            if best_start + cycles > ready_at[other]:
                ready_at[other] = best_start + cycles
            if not waits_for[other]:
                available.append(other)
        while first_open < size and done[first_open]:
            first_open += 1
    return order
