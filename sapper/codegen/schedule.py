"""List scheduling within basic blocks, before register allocation.

Enters: a MachineFunction with virtual registers and the target's register facts. Leaves: the same function with the
instructions of some blocks in another order; the result is the same, since these stay in order: a register's writes
and reads, flags, memory accesses that may touch the same bytes, and instructions with side effects.
Holds: registers that copies will join (joined.py) count as one register, so no order makes a copy necessary that was
not. A block is given a new order only if the model finds it faster, and if it wants no more registers than the old
order, or one fewer than there are. A jump stays last, and so does the comparison right before it, which some
processors join with it.

The model: each instruction starts when its inputs are there and its unit is free; so many enter in a cycle, in order,
and at most so many wait at a time (`issue` of the register facts), so the processor itself runs that far ahead and only
blocks with longer waits than that gain anything. Latencies, throughputs and ports are the rows'. An instruction moves
up past at most `WINDOW` others, so that what runs ahead (loads, mostly) is a little ahead.
"""

from __future__ import annotations

from heapq import heappop, heappush
from typing import Any

from .dependences import Cost, Dependences, JoinedRegisters, cost_of, dependences
from .joined import Classes
from .liveness import Flow
from .machine import Instruction, MachineFunction, Memory
from .row_facts import READ, WRITE, Abi, RowFacts, facts_table

WINDOW = 24
GAIN = 0.97
"""A new order must take less than this part of the old one's cycles."""


def schedule(function: MachineFunction, abi: Abi, classes: Classes | None = None) -> int:
    """Reorder the blocks of `function` where that helps. Returns the number of blocks changed.

    classes: of the function, where the caller knows them; kept true.
    """
    if classes is None:
        classes = Classes(function, abi)
    flow = classes.flow
    costs: dict[Any, Cost] = {}
    moves = set(flow.moves)  # true of every block that has not been reordered yet
    body = function.body
    changed = 0
    registers: JoinedRegisters | None = None
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
            registers = JoinedRegisters(classes, abi)
        order = _reorder(function, flow, registers, block, start, stop, abi, costs)
        if order is not None:
            body[start:stop] = [body[start + number] for number in order]
            classes.reordered(start, order, block)
            changed += 1
    if changed:
        classes.join()  # what was joined stays so, and more may be possible
    return changed


def _form(item: Instruction, facts: RowFacts) -> tuple[Any, bool, bool]:
    """The row, and whether it loads and stores."""
    for position, operand in enumerate(item.operands):
        if type(operand) is Memory:
            how = facts.access[position]
            return item.row, how & READ != 0, how & WRITE != 0
    return item.row, False, False


def _flows_well(
    function: MachineFunction, flow: Flow, moves: set[int], start: int, stop: int, abi: Abi, costs: dict[Any, Cost]
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
    width, queue = abi.issue
    step = 1.0 / width
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
            cost = costs[form] = cost_of(table[form[0]], *form)
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
        if len(starts) >= queue and starts[-queue] > entered:
            entered = starts[-queue]
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


def _issue(made: Dependences, order: list[int] | range, issue: tuple[int, int]) -> float:
    """Cycles until the last result is there, when the instructions enter in this order."""
    width, queue = issue
    ready = [0.0] * len(made.cost)
    unit_free: dict[Any, float] = {}
    starts: list[float] = []
    entered = end = 0.0
    step = 1.0 / width
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
            if len(starts) >= queue and starts[-queue] > entered:
                entered = starts[-queue]
        for other, cycles in made.after[number]:
            if begin + cycles > ready[other]:
                ready[other] = begin + cycles
        if begin + cost.latency > end:
            end = begin + cost.latency
    return end


def _pressure(made: Dependences, order: list[int] | range, live_before: list[int]) -> list[int]:
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
    registers: JoinedRegisters,
    block: int,
    start: int,
    stop: int,
    abi: Abi,
    costs: dict[Any, Cost],
) -> list[int] | None:
    """A better order of the instructions from `start` to `stop`, as numbers from `start`, or None."""
    made = dependences(function.body, flow, registers, block, start, stop, abi, costs)
    live_before = made.live
    limits = registers.limits
    old = range(stop - start)
    enough = GAIN * _issue(made, old, abi.issue)
    if max(made.height) > enough:
        return None  # no order is faster than the longest chain
    old_most = _pressure(made, old, live_before)
    allowed = [max(a, b) for a, b in zip(limits, old_most, strict=False)]
    order = _list_schedule(made, stop - start, live_before, allowed, abi.issue[0])
    if _issue(made, order, abi.issue) > enough:
        return None
    new_most = _pressure(made, order, live_before)
    if any(new > most for new, most in zip(new_most, allowed, strict=False)):
        return None
    return order


class _Live:
    """How many values of each kind live while instructions are taken one by one, and how many may."""

    __slots__ = ("kinds", "limits", "live", "makes", "takes", "uses")

    def __init__(self, made: Dependences, before: list[int], limits: list[int]) -> None:
        self.takes, self.makes, self.kinds = made.takes, made.makes, made.value_kind
        self.uses = made.value_uses[:]
        self.live = before[:]
        self.limits = [*limits, 1 << 30, 1 << 30]

    def wants_more(self, number: int) -> bool:
        """Whether an instruction takes a kind of register beyond its limit."""
        for value in self.makes[number]:
            kind = self.kinds[value]
            if self.live[kind] >= self.limits[kind]:
                freed = sum(self.uses[taken] == 1 and self.kinds[taken] == kind for taken in self.takes[number])
                if self.live[kind] + 1 - freed > self.limits[kind]:
                    return True
        return False

    def take(self, number: int) -> bool:
        """Take an instruction; whether a value died by it."""
        died = False
        for value in self.takes[number]:
            self.uses[value] -= 1
            if not self.uses[value]:
                self.live[self.kinds[value]] -= 1
                died = True
        for value in self.makes[number]:
            if self.uses[value]:
                self.live[self.kinds[value]] += 1
        return died


def _list_schedule(made: Dependences, size: int, live_before: list[int], limits: list[int], width: int) -> list[int]:
    """Take at each step, of the instructions whose inputs are there, the one with the longest chain behind it.

    One that would want more registers than the limit waits until a register is free, or nothing else can go on.
    """
    waits_for = made.waits_for[:]
    after, height, costs = made.after, made.height, made.cost
    live = _Live(made, live_before, limits)
    ready_at = [0.0] * size
    unit_free: dict[Any, float] = {}
    done = [False] * size
    first_open = 0  # all before it are done
    now = 0.0
    step = 1.0 / width
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
            if live.wants_more(number):
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
        if live.take(number) and blocked:
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
