"""List scheduling within basic blocks, before register allocation.

Enters: a MachineFunction with virtual registers and the target's register facts. Leaves: the same function with the
instructions of some blocks in another order; the result is the same, since these stay in order: a register's writes
and reads, flags, memory accesses that may touch the same bytes, and instructions with side effects.
Holds: registers that copies will join (joined.py) count as one register, so no order makes a copy necessary that was
not. A block is given a new order only if the model finds it faster, and if it wants no more registers than the old
order, or one fewer than there are. A jump stays last, and so does the comparison right before it, which some
processors join with it.

The model: each instruction starts when its inputs are there and its unit is free; `ISSUE_WIDTH` enter in a cycle, in
order, and at most `QUEUE` wait at a time, so the processor itself runs that far ahead and only blocks with longer
waits than that gain anything. Latencies, throughputs and ports are the rows'. An instruction moves up past at most
`WINDOW` others, so that what runs ahead (loads, mostly) is a little ahead.
"""

from __future__ import annotations

from heapq import heappop, heappush
from typing import Any

from .joined import Classes
from .liveness import READ, WRITE, Abi, Flow, RowFacts, facts_table, members
from .machine import Instruction, MachineFunction, Memory

ISSUE_WIDTH = 6
QUEUE = 48
"""Zen 4 has two queues of 32 for vector operations and four of 24 for the rest; half of that is taken, since blocks
follow each other and the order across them is not seen here."""
WINDOW = 24
GAIN = 0.97
"""A new order must take less than this part of the old one's cycles."""
LOAD_LATENCY_GENERAL = 4
LOAD_LATENCY_VECTOR = 7
"""Cycles from address to register on an L1 hit: 4 to 5 to a general register, 7 to 8 to a vector register on Zen 4."""
MOST_TRACKED_STORES = 32


class _Cost:
    """latency, cycles of its unit, and the unit, of one row in one form (with a memory operand or without)."""

    __slots__ = ("latency", "throughput", "unit")

    def __init__(self, facts: RowFacts, row: Any, loads: bool, stores: bool) -> None:
        latency = float(row.latency)
        if loads:
            vector = any(o.kind in ("vec", "mask") for o in row.operands)
            latency = (LOAD_LATENCY_VECTOR if vector else LOAD_LATENCY_GENERAL) + (0 if facts.move_bits else latency)
        self.latency = latency
        self.throughput = float(row.throughput) if row.ports else 0.0
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


def schedule(function: MachineFunction, abi: Abi, classes: Classes | None = None) -> int:
    """Reorder the blocks of `function` where that helps. Returns the number of blocks changed.

    classes: of the function, where the caller knows them; kept true.
    """
    if classes is None:
        classes = Classes(function, abi)
    flow = classes.flow
    costs: dict[Any, _Cost] = {}
    moves = set(flow.moves)  # true of every block that has not been reordered yet
    body = function.body
    changed = 0
    registers: _Registers | None = None
    for block in range(len(flow.block_start) - 1):
        start, stop = flow.block_start[block], flow.block_start[block + 1]
        by_hand = False
        while start < stop and not isinstance(body[start], Instruction):
            by_hand = by_hand or body[start].name in function.ordered  # type: ignore[union-attr]
            start += 1
        if by_hand:
            continue
        stop = _movable_end(function, start, stop, abi)
        if stop - start < 4 or _flows_well(function, flow, moves, start, stop, abi, costs):
            continue
        if registers is None:
            registers = _Registers(classes, abi)
        order = _reorder(function, flow, registers, block, start, stop, abi, costs)
        if order is not None:
            body[start:stop] = [body[start + number] for number in order]
            classes.reordered(start, order, block)
            changed += 1
    if changed:
        classes.join()  # what was joined stays so, and more may be possible
    return changed


class _Registers:
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


def _form(item: Instruction, facts: RowFacts) -> tuple[Any, bool, bool]:
    """The row, and whether it loads and stores."""
    for position, operand in enumerate(item.operands):
        if type(operand) is Memory:
            how = facts.access[position]
            return item.row, how & READ != 0, how & WRITE != 0
    return item.row, False, False


def _flows_well(
    function: MachineFunction, flow: Flow, moves: set[int], start: int, stop: int, abi: Abi, costs: dict[Any, _Cost]
) -> bool:
    """The order as it stands takes hardly longer than the longest chain or the busiest unit: nothing to gain."""
    table = facts_table(abi)
    body = function.body
    ready: dict[int, float] = {}
    chain: dict[int, float] = {}
    unit_free: dict[Any, float] = {}
    busy: dict[Any, float] = {}
    starts: list[float] = []
    entered = 0.0
    end = longest = 0.0
    step = 1.0 / ISSUE_WIDTH
    uses, writes, changes = flow.uses, flow.writes, flow.changes
    for place in range(start, stop):
        if place in moves:
            target, source = writes[place][0], uses[place][0]
            ready[target] = ready.get(source, 0.0)
            chain[target] = chain.get(source, 0.0)
            continue
        item = body[place]
        form = _form(item, table[item.row])  # type: ignore[union-attr,arg-type]
        cost = costs.get(form)
        if cost is None:
            cost = costs[form] = _Cost(table[form[0]], *form)
        begin = entered
        depth = 0.0
        for node in uses[place] + changes[place]:
            if node in ready:
                known = ready[node]
                if known > begin:
                    begin = known
                known = chain[node]
                if known > depth:
                    depth = known
        unit, throughput, latency = cost.unit, cost.throughput, cost.latency
        free = unit_free.get(unit, 0.0)
        # A unit that is idle while a later one waits may serve an earlier-entered instruction first.
        unit_free[unit] = (free if free > entered else entered) + throughput
        if free > begin:
            begin = free
        busy[unit] = busy.get(unit, 0.0) + throughput
        begin_end = begin + latency
        depth += latency
        for node in changes[place] + writes[place]:
            ready[node] = begin_end
            chain[node] = depth
        if begin_end > end:
            end = begin_end
        if depth > longest:
            longest = depth
        starts.append(begin)
        entered += step
        if len(starts) >= QUEUE and starts[-QUEUE] > entered:
            entered = starts[-QUEUE]
    bound = max(longest, max(busy.values(), default=0.0), len(starts) * step)
    # The last result of a block that is bound by a unit comes a latency after the unit is done.
    return end * GAIN <= bound + 4.0


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
    registers: _Registers,
    block: int,
    start: int,
    stop: int,
    abi: Abi,
    costs: dict[Any, _Cost],
) -> tuple[_Block, list[int]]:
    """The dependences of the instructions from `start` to `stop`, and how many registers are live before them."""
    body = function.body
    table = facts_table(abi)
    joined, kind_of = registers.joined, registers.kind_of
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

    def value_at(part: Any) -> int:
        """The value that a register of an address holds here."""
        return -1 if part is None else value_of[joined[flow.node_of[part]]]

    all_uses, all_changes, all_writes, cost_of = flow.uses, flow.changes, flow.writes, made.cost
    for number in range(size):
        place = start + number
        item = body[place]
        assert isinstance(item, Instruction)
        facts = table[item.row]
        reads = [joined[node] for node in all_uses[place]]
        writes = [joined[node] for node in all_writes[place]]
        copy = bool(facts.move_bits) and len(reads) == 1 and reads == writes
        if facts.reads_flags:
            reads.append(flags)
        if facts.writes_flags:
            writes.append(flags)
        if all_changes[place]:
            changes = [joined[node] for node in all_changes[place]]
            reads += changes
            writes = changes + writes
        takes: list[int] = []
        makes: list[int] = []
        for register in reads:
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
                after[before].append((number, cost_of[before].latency))
                waits_for[number] += 1
            there = readers.get(register)
            if there is None:
                readers[register] = [number]
            else:
                there.append(number)
        loading = storing = False
        memory: Memory | None = None
        address: Any = None
        for position, operand in enumerate(item.operands):
            if type(operand) is Memory:
                how = facts.access[position]
                loading = loading or how & READ != 0
                if operand.label is None:
                    memory = operand
                    storing = storing or how & WRITE != 0
                    address = (value_at(operand.base), value_at(operand.index), operand.scale)
        for register in writes:
            there = readers.pop(register, None)
            if there is not None:
                for reader in there:
                    if reader != number:
                        after[reader].append((number, 0.0))
                        waits_for[number] += 1
            before = writer.get(register)
            if before is not None and before != number:
                after[before].append((number, 0.0))
                waits_for[number] += 1
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
            cost = costs[form] = _Cost(facts, item.row, loading, storing)
        if copy:
            cost = _Cost.__new__(_Cost)
            cost.latency, cost.throughput, cost.unit = 0.0, 0.0, None
        cost_of.append(cost)

        prefetching = facts.side_effects and memory is not None and not loading and not storing
        ordered = (facts.side_effects and not prefetching) or (loading and storing)
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
            width = max(facts.bits) // 8 or 64
            if memory.index is not None and (memory.index.kind != "gpr" or width > 64):
                address = number  # each lane, each row of a tile, has an address of its own
            first, end = memory.disp, memory.disp + max(width, 64 if memory.broadcast else 0)
            entry = (number, address, first, end)
            for other, other_address, other_first, other_end in stores:
                if other_address != address or (other_first < end and first < other_end):
                    order(other, number, 1.0 if loading else 0.0)
            if storing:
                for other, other_address, other_first, other_end in loads:
                    if other_address != address or (other_first < end and first < other_end):
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
    wanted = {joined[node] for node in members(flow.live_out[block])}
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
    for register in sorted({joined[node] for node in members(flow.live_in[block])}):
        live[kind_of[register]] += 1
    return made, live


def _issue(made: _Block, order: list[int] | range) -> float:
    """Cycles until the last result is there, when the instructions enter in this order."""
    ready = [0.0] * len(made.cost)
    unit_free: dict[Any, float] = {}
    starts: list[float] = []
    entered = end = 0.0
    step = 1.0 / ISSUE_WIDTH
    for number in order:
        cost = made.cost[number]
        begin = ready[number]
        if cost.unit is not None:
            if begin < entered:
                begin = entered
            free = unit_free.get(cost.unit, 0.0)
            unit_free[cost.unit] = (free if free > entered else entered) + cost.throughput
            if free > begin:
                begin = free
            starts.append(begin)
            entered += step
            if len(starts) >= QUEUE and starts[-QUEUE] > entered:
                entered = starts[-QUEUE]
        for other, cycles in made.after[number]:
            if begin + cycles > ready[other]:
                ready[other] = begin + cycles
        if begin + cost.latency > end:
            end = begin + cost.latency
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
    registers: _Registers,
    block: int,
    start: int,
    stop: int,
    abi: Abi,
    costs: dict[Any, _Cost],
) -> list[int] | None:
    """A better order of the instructions from `start` to `stop`, as numbers from `start`, or None."""
    made, live_before = _dependences(function, flow, registers, block, start, stop, abi, costs)
    limits = registers.limits
    old = range(stop - start)
    enough = GAIN * _issue(made, old)
    if max(made.height) > enough:
        return None  # no order is faster than the longest chain
    old_most = _pressure(made, old, live_before)
    allowed = [max(a, b) for a, b in zip(limits, old_most, strict=False)]
    order = _list_schedule(made, stop - start, live_before, allowed)
    if _issue(made, order) > enough:
        return None
    new_most = _pressure(made, order, live_before)
    if any(new > most for new, most in zip(new_most, allowed, strict=False)):
        return None
    return order


def _list_schedule(made: _Block, size: int, live_before: list[int], limits: list[int]) -> list[int]:
    """Take at each step, of the instructions whose inputs are there, the one with the longest chain behind it.

    One that would want more registers than the limit waits until a register is free, or nothing else can go on.
    """
    waits_for = made.waits_for[:]
    after, height, costs = made.after, made.height, made.cost
    takes, makes, value_kind = made.takes, made.makes, made.value_kind
    uses = made.value_uses[:]
    live = live_before[:]
    limits = [*limits, 1 << 30, 1 << 30]
    ready_at = [0.0] * size
    unit_free: dict[Any, float] = {}
    done = [False] * size
    first_open = 0  # all before it are done
    now = 0.0
    step = 1.0 / ISSUE_WIDTH
    order: list[int] = []
    beyond: list[int] = []  # ready, but more than a window ahead; heaps all three
    pending: list[tuple[float, int]] = [(0.0, number) for number in range(size) if not waits_for[number]]
    ready: list[tuple[float, int]] = []
    blocked: list[int] = []  # want a register while none is free
    while len(order) < size:
        horizon = first_open + WINDOW
        while beyond and beyond[0] <= horizon:
            number = heappop(beyond)
            heappush(pending, (ready_at[number], number))
        while pending and pending[0][0] <= now:
            number = heappop(pending)[1]
            if number > horizon:
                heappush(beyond, number)
            else:
                heappush(ready, (-height[number], number))
        if ready:
            number = heappop(ready)[1]
            full = False
            for value in makes[number]:
                kind = value_kind[value]
                if live[kind] >= limits[kind]:
                    freed = 0
                    for taken in takes[number]:
                        if uses[taken] == 1 and value_kind[taken] == kind:
                            freed += 1
                    if live[kind] + 1 - freed > limits[kind]:
                        full = True
            if full:
                blocked.append(number)
                continue
        elif pending and (pending[0][1] <= horizon or not blocked):
            now = max(now, pending[0][0])
            if pending[0][1] > horizon:
                heappush(beyond, heappop(pending)[1])
            continue
        else:
            number = min(blocked)
            blocked.remove(number)
        cost = costs[number]
        begin = max(now, ready_at[number])
        if cost.unit is not None:
            free = unit_free.get(cost.unit, 0.0)
            if free > begin:
                begin = free
            unit_free[cost.unit] = begin + cost.throughput
            now = begin + step
        order.append(number)
        done[number] = True
        died = False
        for value in takes[number]:
            uses[value] -= 1
            if not uses[value]:
                live[value_kind[value]] -= 1
                died = True
        for value in makes[number]:
            if uses[value]:
                live[value_kind[value]] += 1
        if died and blocked:
            for other in blocked:
                heappush(ready, (-height[other], other))
            blocked.clear()
        for other, cycles in after[number]:
            waits_for[other] -= 1
            if begin + cycles > ready_at[other]:
                ready_at[other] = begin + cycles
            if not waits_for[other]:
                heappush(pending, (ready_at[other], other))
        while first_open < size and done[first_open]:
            first_open += 1
    return order
