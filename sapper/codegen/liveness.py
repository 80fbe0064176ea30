"""Control flow, liveness and live ranges of a machine function.

Enters: a MachineFunction (registers virtual or physical) and an `Abi`, the register facts of the target as data.
Leaves: `Flow` (what each instruction reads and writes, the basic blocks, loop depths, live sets) and `Ranges` (the
points at which each register holds a value that is still wanted).
Holds: every register is a small number, its *node*: all physical ones first, the allocatable before the others, then
the virtual ones in order of first appearance. Sets of nodes are Python ints used as bitsets, and so is a live range:
instruction i has the points 2i (where it reads) and 2i + 1 (where it writes), and bit p of a range is set when the
register is wanted at point p. Two registers may share one place exactly when their ranges have no bit in common.
"""

from __future__ import annotations

from bisect import bisect_left
from itertools import accumulate, pairwise

from .accesses import Nodes, accesses_of, is_copy
from .machine import Instruction, Label, LabelReference, MachineFunction, Register, VirtualRegister
from .row_facts import BRANCH, NEXT, RETURN, Abi, AllocationError, FactsTable, facts_table


class Flow:
    """What a function reads and writes, instruction by instruction, and its blocks.

    nodes: the register of each node. physical: how many of them are physical. kind_of: index into `kinds` of each.
    moves: the places of plain register copies. uses, writes, changes: for each place of the body the nodes that are
    only read, only written, read and written.
    block_start: first place of each block, then the length of the body. live_in, live_out: a bitset for each block.
    loops: the blocks of each loop, by its first block. depth: in how many loops each block lies. weight: how often it
    is taken to run.
    """

    __slots__ = (
        "block_start",
        "changes",
        "depth",
        "kind_of",
        "kinds",
        "live_in",
        "live_out",
        "loops",
        "moves",
        "node_of",
        "nodes",
        "physical",
        "predecessors",
        "successors",
        "uses",
        "weight",
        "writes",
    )

    nodes: list[Register | VirtualRegister]
    node_of: dict[Register | VirtualRegister, int]
    physical: int
    kinds: list[str]
    kind_of: list[int]
    moves: list[int]
    uses: list[tuple[int, ...]]
    writes: list[tuple[int, ...]]
    changes: list[tuple[int, ...]]
    block_start: list[int]
    successors: list[list[int]]
    predecessors: list[list[int]]
    loops: dict[int, set[int]]
    depth: list[int]
    weight: list[float]
    live_in: list[int]
    live_out: list[int]

    def reorder(self, start: int, order: list[int]) -> None:
        """Follow instructions of one block that took another order; nodes keep their numbers.

        order: for each place from `start` on the instruction that stands there now, as its number from `start`.
        """
        stop = start + len(order)
        for rows in (self.uses, self.writes, self.changes):
            rows[start:stop] = [rows[start + number] for number in order]
        first, end = bisect_left(self.moves, start), bisect_left(self.moves, stop)
        moved = set(self.moves[first:end])
        self.moves[first:end] = [start + i for i, number in enumerate(order) if start + number in moved]


def blocks_of(body: list[Instruction | Label], abi: Abi) -> tuple[list[int], list[list[int]]]:
    """The first place of each basic block, then the length of the body; and each block's successors.

    Raises AllocationError for a jump to a label that is not there and for code that runs off its end.
    """
    starts = [0]
    labels: dict[str, int] = {}
    ends: list[tuple[int, str | None]] = []  # of each block: where it goes, and the label
    facts_of = facts_table(abi)
    open_block = False
    for place, item in enumerate(body):
        if isinstance(item, Label):
            if open_block:
                ends.append((NEXT, None))
                starts.append(place)
                open_block = False
            if item.name in labels:
                raise AllocationError(f"label {item.name} stands twice; expected one place for each label")
            labels[item.name] = len(starts) - 1
            # Several labels in a row open one block.
            continue
        flow = facts_of[item.row].flow
        open_block = True
        if flow:
            target = None
            if flow != RETURN:
                target = next((o.name for o in item.operands if type(o) is LabelReference), None)
                if target is None:
                    raise AllocationError(f"jump {item.row.name} has no label among its operands")
            ends.append((flow, target))
            starts.append(place + 1)
            open_block = False
    if starts[-1] == len(body):
        starts.pop()
    while len(ends) < len(starts):
        ends.append((NEXT, None))
    count = len(starts)
    successors: list[list[int]] = []
    for block, (flow, target) in enumerate(ends):
        follow: list[int] = []
        if flow in (NEXT, BRANCH):
            if block + 1 == count:
                raise AllocationError("the code runs off its end; expected a return or a jump as last instruction")
            follow.append(block + 1)
        if target is not None:
            if target not in labels:
                raise AllocationError(f"jump to label {target}, which is not in the function")
            if labels[target] not in follow:
                follow.append(labels[target])
        successors.append(follow)
    starts.append(len(body))
    return starts, successors


def loops_of(successors: list[list[int]], predecessors: list[list[int]]) -> dict[int, set[int]]:
    """The blocks of each loop, by its first block: those that reach a jump backwards without passing its target."""
    loops: dict[int, set[int]] = {}
    for block in range(len(successors)):
        for header in successors[block]:
            if header <= block:
                inside = loops.setdefault(header, {header})
                stack = [block]
                while stack:
                    member = stack.pop()
                    if member not in inside:
                        inside.add(member)
                        stack.extend(predecessors[member])
    return loops


def analyse(function: MachineFunction, abi: Abi) -> Flow:
    """Read the whole function once: registers, blocks, loop depths and live sets.

    Raises AllocationError for a virtual register that some path reads before it is written.
    """
    flow = Flow()
    _lay_out(flow, function.body, abi)
    nodes = Nodes(abi)
    exposed, overwritten = _read_blocks(flow, function.body, nodes, facts_table(abi))
    flow.nodes, flow.node_of, flow.physical = nodes.registers, nodes.node_of, nodes.physical
    flow.kinds, flow.kind_of = nodes.kinds, nodes.kind_of
    _find_live(flow, exposed, overwritten)
    _refuse_undefined(flow, function.body)
    return flow


def _lay_out(flow: Flow, body: list[Instruction | Label], abi: Abi) -> None:
    """The blocks, and the loops that they are in."""
    flow.block_start, flow.successors = blocks_of(body, abi)
    count = len(flow.successors)
    flow.predecessors = [[] for _ in range(count)]
    for block, follow in enumerate(flow.successors):
        for successor in follow:
            flow.predecessors[successor].append(block)
    flow.loops = loops_of(flow.successors, flow.predecessors)
    flow.depth = [0] * count
    for inside in flow.loops.values():
        for member in inside:
            flow.depth[member] += 1
    flow.weight = [8.0 ** depth for depth in flow.depth]


_NOTHING: tuple[int, ...] = ()


def _read_blocks(
    flow: Flow, body: list[Instruction | Label], nodes: Nodes, facts_of: FactsTable
) -> tuple[list[set[int]], list[set[int]]]:
    """What each instruction reads and writes. Returns, of each block, what it reads before any write, and what it
    writes."""
    uses = flow.uses = [_NOTHING] * len(body)
    writes = flow.writes = [_NOTHING] * len(body)
    changes = flow.changes = [_NOTHING] * len(body)
    flow.moves = []
    exposed: list[set[int]] = []
    overwritten: list[set[int]] = []
    for start, stop in pairwise(flow.block_start):
        upward: set[int] = set()
        written: set[int] = set()
        for place in range(start, stop):
            item = body[place]
            if isinstance(item, Label):
                continue
            facts = facts_of[item.row]
            found = accesses_of(item, facts, nodes)
            read, write, change = found
            if read:
                uses[place] = tuple(read)
                for node in read:
                    if node not in written:
                        upward.add(node)
            if change:
                changes[place] = tuple(change)
                for node in change:
                    if node not in written:
                        upward.add(node)
                        written.add(node)
            if write:
                writes[place] = tuple(write)
                written.update(write)
                if is_copy(item, facts, found):
                    flow.moves.append(place)
        exposed.append(upward)
        overwritten.append(written)
    return exposed, overwritten


def _bitset(numbers: set[int]) -> int:
    found = 0
    for number in numbers:
        found |= 1 << number
    return found


def _find_live(flow: Flow, exposed: list[set[int]], overwritten: list[set[int]]) -> None:
    """What is live where each block begins and ends: what it, or one that follows, reads before it is written."""
    # Only what some block exposes is ever live between blocks: most registers never enter a bitset.
    crossing = set().union(*exposed)
    block_uses = [_bitset(found) for found in exposed]
    block_writes = [_bitset(crossing & found) for found in overwritten]
    count = len(exposed)
    live_in = flow.live_in = block_uses[:]
    live_out = flow.live_out = [0] * count
    pending = list(range(count))
    waiting = [True] * count
    while pending:
        block = pending.pop()
        waiting[block] = False
        out = 0
        for successor in flow.successors[block]:
            out |= live_in[successor]
        live_out[block] = out
        into = block_uses[block] | (out & ~block_writes[block])
        if into != live_in[block]:
            live_in[block] = into
            for predecessor in flow.predecessors[block]:
                if not waiting[predecessor]:
                    waiting[predecessor] = True
                    pending.append(predecessor)


def _refuse_undefined(flow: Flow, body: list[Instruction | Label]) -> None:
    """A virtual register that is live where the function begins."""
    undefined = flow.live_in[0] >> flow.physical if flow.live_in else 0
    if not undefined:
        return
    node = flow.physical + (undefined & -undefined).bit_length() - 1
    where, place = next((item, place) for place, item in enumerate(body) if isinstance(item, Instruction) and (
        node in flow.uses[place] or node in flow.changes[place]))
    raise AllocationError(
        f"{flow.nodes[node]!r} may be read before it is written: found in {where.row.name} at place {place}"
        f"{f' ({where.location})' if where.location else ''}; "
        "expected a write on every path to it; mend: set it to zero first, or write with zeroing")


class Ranges:
    """Live ranges of all nodes, and how many registers of each kind are wanted at each place of the body.

    points: a bitset of points for each node. pressure: for each kind a list by place, the larger of the counts at its
    two points; registers that are not allocatable do not count.
    """

    __slots__ = ("_counted", "_flow", "points", "pressure")

    def __init__(self, flow: Flow, allocatable_nodes: int) -> None:
        self._flow = flow
        # A reserved register counts in a kind of its own, which nobody reads.
        self._counted = flow.kind_of[:]
        for node in range(allocatable_nodes, flow.physical):
            self._counted[node] = len(flow.kinds)
        self.points = [0] * len(flow.nodes)
        size = len(flow.uses)
        changes = [[0] * (2 * size + 1) for _ in range(len(flow.kinds) + 1)]
        end: dict[int, int] = {}
        alive = 0
        for block in range(len(flow.block_start) - 2, -1, -1):
            # Most of what is wanted at the end of this block is wanted where the next one in the text begins.
            boundary = 2 * flow.block_start[block + 1]
            after = flow.live_out[block]
            for node in members(alive & ~after):
                self._begin(node, boundary, end.pop(node), changes, 0)
            for node in members(after & ~alive):
                end[node] = boundary - 1
            self._walk(flow.block_start[block], flow.block_start[block + 1], end, changes, 0)
            alive = flow.live_in[block]
        for node, last in end.items():
            self._begin(node, 0, last, changes, 0)
        self.pressure = [_at_places(row) for row in changes[:-1]]

    def first(self, node: int) -> int:
        """The lowest point of a node that is wanted somewhere."""
        points = self.points[node]
        return (points & -points).bit_length() - 1

    def renew(self, block: int) -> None:
        """Follow instructions that took another order inside a block."""
        flow = self._flow
        start, stop = flow.block_start[block], flow.block_start[block + 1]
        named: set[int] = set()
        for rows in (flow.uses, flow.writes, flow.changes):
            named.update(*rows[start:stop])
        elsewhere = ~((1 << 2 * stop) - (1 << 2 * start))
        named_bits = 0
        for node in named:
            self.points[node] &= elsewhere
            named_bits |= 1 << node
        changes = [[0] * (2 * (stop - start) + 1) for _ in range(len(flow.kinds) + 1)]
        for node in members(flow.live_in[block] & ~named_bits):
            changes[self._counted[node]][0] += 1
        end = dict.fromkeys(members(flow.live_out[block] & named_bits), 2 * stop - 1)
        self._walk(start, stop, end, changes, 2 * start)
        for node, last in end.items():
            self._begin(node, 2 * start, last, changes, 2 * start)
        for row, renewed in zip(self.pressure, changes, strict=False):
            row[start:stop] = _at_places(renewed)

    def _begin(self, node: int, first: int, last: int, changes: list[list[int]], base: int) -> None:
        self.points[node] |= (2 << last) - (1 << first)
        row = changes[self._counted[node]]
        row[first - base] += 1
        row[last + 1 - base] -= 1

    def _walk(self, start: int, stop: int, end: dict[int, int], changes: list[list[int]], base: int) -> None:
        """Backwards over the places of one block. end: the last point of each node that is wanted further down.

        changes: of the counts at each point, which starts at `base`.
        """
        uses, writes, changed = self._flow.uses, self._flow.writes, self._flow.changes
        points, counted = self.points, self._counted
        for place in range(stop - 1, start - 1, -1):
            point = 2 * place + 1
            for node in changed[place]:
                if node not in end:
                    end[node] = point
            for node in writes[place]:
                last = end.pop(node, point)
                points[node] |= (2 << last) - (1 << point)
                row = changes[counted[node]]
                row[point - base] += 1
                row[last + 1 - base] -= 1
            point -= 1
            for node in uses[place]:
                if node not in end:
                    end[node] = point


def _at_places(changes: list[int]) -> list[int]:
    """The larger of the counts at the two points of each place, from the changes at each point."""
    if not any(changes):    # of masks and tiles, as a rule
        return [0] * (len(changes) // 2)
    counts = list(accumulate(changes))
    return list(map(max, counts[:-1:2], counts[1::2]))


def members(bits: int) -> list[int]:
    """The numbers of the bits that are set, lowest first."""
    found = []
    while bits:
        low = bits & -bits
        found.append(low.bit_length() - 1)
        bits ^= low
    return found
