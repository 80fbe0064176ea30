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
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any, Protocol

from ..ir.nodes import Location
from .machine import Immediate, Instruction, Label, LabelReference, MachineFunction, Memory, Register, VirtualRegister

READ, WRITE, CHANGE = 1, 2, 3
"""How a row uses one operand: reads it, writes it, or reads and writes it (two-address)."""

NEXT, JUMP, BRANCH, RETURN = 0, 1, 2, 3
"""Where a row goes: on, to its label, either, or out of the function."""


class AllocationError(Exception):
    """A register cannot be found, or the code given is not sound (a register read before it is written).

    location: the source line where too many are wanted, where it is known.
    """

    def __init__(self, message: str, location: Location | None = None) -> None:
        super().__init__(message)
        self.location = location


class RowFacts:
    """What the machine passes need to know about one row of an instruction table.

    access: one of 0 (no register), READ, WRITE, CHANGE for each operand. bits: the width of each operand, 0 where
    it has none. reads, writes: physical registers that the row uses without naming them, as (kind, number).
    mask_access: how the opmask register is used. merges: a write under a mask, not zeroing, keeps the other lanes,
    so the operand is read as well. idiom: the result does not depend on the registers when all are the same one
    (and the last immediate, if `idiom_immediate` is not None, is that). move_bits: this row copies that many low bits
    of operand 1 to operand 0, 0 if it is no copy. side_effects: must not be removed, repeated or moved. only_writes:
    it does nothing but to write operand 0, by what its operands are.
    """

    __slots__ = (
        "access",
        "bits",
        "flow",
        "idiom",
        "idiom_immediate",
        "mask_access",
        "merges",
        "move_bits",
        "name",
        "only_writes",
        "reads",
        "reads_flags",
        "side_effects",
        "writes",
        "writes_flags",
    )

    def __init__(
        self,
        name: str,
        access: tuple[int, ...],
        bits: tuple[int, ...],
        reads: tuple[tuple[str, int], ...],
        writes: tuple[tuple[str, int], ...],
        flow: int,
        reads_flags: bool,
        writes_flags: bool,
        mask_access: int,
        merges: bool,
        idiom: bool,
        idiom_immediate: int | None,
        move_bits: int,
        side_effects: bool,
    ) -> None:
        self.name = name
        self.access = access
        self.bits = bits
        self.reads = reads
        self.writes = writes
        self.flow = flow
        self.reads_flags = reads_flags
        self.writes_flags = writes_flags
        self.mask_access = mask_access
        self.merges = merges
        self.idiom = idiom
        self.idiom_immediate = idiom_immediate
        self.move_bits = move_bits
        self.side_effects = side_effects
        self.only_writes = flow == NEXT and bool(access) and access[0] & WRITE != 0 and not (
            reads or writes or reads_flags or writes_flags or side_effects)


class Abi(Protocol):
    """Register facts of a target, and the rows that the allocator and the frame add by themselves.

    registers: the allocatable numbers of each kind, the ones to prefer first. never_spilled: kinds that have no rows to
    and from the frame. counts: how many registers of each kind
    there are, allocatable or not. full_bits: the widest register of each kind. stack_pointer, frame_scratch: (kind,
    number); frame_scratch is free on entry and at a return.
    move_bits: names of rows that copy so many low bits of register operand 1 to register operand 0, zero the rest and
    do nothing else. idioms: names of rows whose result is a constant when all registers are the same, with the last
    immediate needed for it or None. facts_table: made by the passes, for them to keep here; None at first.
    """

    registers: Mapping[str, Sequence[int]]
    never_spilled: Sequence[str]
    counts: Mapping[str, int]
    full_bits: Mapping[str, int]
    callee_saved: Sequence[tuple[str, int]]
    stack_pointer: tuple[str, int]
    frame_scratch: tuple[str, int]
    move_bits: Mapping[str, int]
    idioms: Mapping[str, int | None]
    facts_table: Any

    def spill_row(self, kind: str, bits: int) -> Any:
        """A row [memory, register read] that touches no flags."""
        ...

    def reload_row(self, kind: str, bits: int) -> Any:
        """A row [register written, memory] that touches no flags."""
        ...

    def memory_bits(self, row: Any) -> tuple[int, ...]:
        """For each operand of a row its width in memory, 0 where none of the target's encodings takes memory."""
        ...

    def frame_row(self, what: str) -> Any:
        """push, pop (one register); subtract, and (register, immediate); move, load, store; vzeroupper."""
        ...


_ROLES = {"r": READ, "w": WRITE, "rw": CHANGE}
_CONTROL = {"": NEXT, "call": NEXT, "trap": NEXT, "jump": JUMP, "branch": BRANCH, "return": RETURN}


class FactsTable(dict[Any, RowFacts]):
    """Row -> RowFacts, worked out when first asked for."""

    __slots__ = ("abi",)

    def __init__(self, abi: Abi) -> None:
        super().__init__()
        self.abi = abi

    def __missing__(self, row: Any) -> RowFacts:
        operands = row.operands
        facts = self[row] = RowFacts(
            row.name,
            tuple(_ROLES.get(o.role, 0) for o in operands),
            tuple(o.bits if o.kind in ("gpr", "vec", "mask", "tile") else o.index_bits for o in operands),
            tuple(row.implicit_reads),
            tuple(row.implicit_writes),
            _CONTROL[row.control],
            row.flags_read != "",
            row.flags_written != "",
            CHANGE if row.mask_role == "rw" else READ,
            bool(operands) and operands[0].kind == "vec" and not row.blend,
            row.name in self.abi.idioms,
            self.abi.idioms.get(row.name),
            self.abi.move_bits.get(row.name, 0),
            row.side_effects,
        )
        return facts


def facts_table(abi: Abi) -> FactsTable:
    """The table of row facts that belongs to `abi`."""
    table = abi.facts_table
    if table is None:
        table = abi.facts_table = FactsTable(abi)
    return table  # type: ignore[no-any-return]


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


_NOTHING: tuple[int, ...] = ()


def _bitset(numbers: set[int]) -> int:
    found = 0
    for number in numbers:
        found |= 1 << number
    return found


def is_idiom(instruction: Instruction, facts: RowFacts) -> bool:
    """The instruction makes a constant (zero, all ones) whatever its registers hold, since all are the same."""
    if not facts.idiom or instruction.mask is not None:
        return False
    first = None
    last_immediate = None
    for operand in instruction.operands:
        kind = type(operand)
        if kind is Register or kind is VirtualRegister:
            if first is None:
                first = operand
            elif operand != first:
                return False
        elif kind is Immediate:
            if facts.idiom_immediate is None:
                return False  # sub r, 1 has one register only
            last_immediate = operand.value  # type: ignore[union-attr]
        else:
            return False
    return facts.idiom_immediate is None or last_immediate == facts.idiom_immediate


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
    body = function.body
    size = len(body)
    flow = Flow()
    starts, successors = blocks_of(body, abi)
    count = len(starts) - 1
    predecessors: list[list[int]] = [[] for _ in range(count)]
    for block, follow in enumerate(successors):
        for successor in follow:
            predecessors[successor].append(block)
    flow.block_start = starts
    flow.successors = successors
    flow.predecessors = predecessors
    flow.loops = loops_of(successors, predecessors)
    flow.depth = [0] * count
    for inside in flow.loops.values():
        for member in inside:
            flow.depth[member] += 1

    kinds = list(abi.registers)
    kind_index = {kind: index for index, kind in enumerate(kinds)}
    # Nodes 0 .. physical - 1 are all the physical registers that there are: allocatable ones, then the others.
    nodes: list[Register | VirtualRegister] = []
    kind_of: list[int] = []
    node_of: dict[Any, int] = {}
    for kind in kinds:
        for number in abi.registers[kind]:
            node_of[(kind, number)] = len(nodes)
            nodes.append(Register(kind, number))
            kind_of.append(kind_index[kind])
    for kind, there_are in abi.counts.items():
        if kind not in kind_index:
            kind_index[kind] = len(kinds)
            kinds.append(kind)
        for number in range(there_are):
            if (kind, number) not in node_of:
                node_of[(kind, number)] = len(nodes)
                nodes.append(Register(kind, number))
                kind_of.append(kind_index[kind])
    facts_of = facts_table(abi)
    physical = len(nodes)

    uses: list[tuple[int, ...]] = [_NOTHING] * size
    writes: list[tuple[int, ...]] = [_NOTHING] * size
    changes: list[tuple[int, ...]] = [_NOTHING] * size
    moves: list[int] = []
    exposed: list[set[int]] = []  # of each block, what it reads before any write
    overwritten: list[set[int]] = []

    def node_for(register: Register | VirtualRegister) -> int:
        if type(register) is Register:
            found = node_of.get((register.kind, register.number))
            if found is None:
                raise AllocationError(f"found register {register}; the target has none of that name")
            return found
        node = node_of.get(register)
        if node is None:
            if register.kind not in kind_index:
                raise AllocationError(f"register {register!r} is of a kind that the target lacks; expected {kinds}")
            node = node_of[register] = len(nodes)
            nodes.append(register)
            kind_of.append(kind_index[register.kind])
        return node

    known = node_of.get
    for block in range(count):
        upward: set[int] = set()
        written: set[int] = set()
        for place in range(starts[block], starts[block + 1]):
            item = body[place]
            if isinstance(item, Label):
                continue
            facts = facts_of[item.row]
            read: list[int] = []
            write: list[int] = []
            change: list[int] = []
            access, operands = facts.access, item.operands
            if len(access) != len(operands):
                raise AllocationError(f"{facts.name} has {len(operands)} operands; expected {len(access)}")
            mask = item.mask
            # Where a write goes: under a mask, not zeroing, it keeps what the other lanes hold.
            written_to = change if mask is not None and facts.merges and not item.zeroing else write
            constant = facts.idiom and is_idiom(item, facts)
            for operand, how in zip(operands, access):  # noqa: B905  of equal length, as was checked
                kind_type = type(operand)
                if kind_type is VirtualRegister or kind_type is Register:
                    node = known(operand)
                    if node is None:
                        node = node_for(operand)  # type: ignore[arg-type]
                    if how == READ:
                        if not constant:
                            read.append(node)
                    elif how == WRITE:
                        written_to.append(node)
                    elif constant:
                        write.append(node)
                    elif how == CHANGE:
                        change.append(node)
                    else:
                        raise AllocationError(f"{facts.name} takes no register where {operand!r} stands")
                elif kind_type is Memory:
                    part = operand.base  # type: ignore[union-attr]
                    if part is not None:
                        node = known(part)
                        read.append(node_for(part) if node is None else node)
                    part = operand.index  # type: ignore[union-attr]
                    if part is not None:
                        node = known(part)
                        read.append(node_for(part) if node is None else node)  # type: ignore[arg-type]
            if mask is not None:
                node = node_for(mask)
                if facts.mask_access == READ:
                    read.append(node)
                else:
                    change.append(node)
            if facts.reads:
                for pair in facts.reads:
                    node = node_of[pair]
                    if node not in read:
                        read.append(node)
            if facts.writes:
                for pair in facts.writes:
                    write.append(node_of[pair])
            if read:
                for node in read:
                    if node not in written:
                        upward.add(node)
                uses[place] = tuple(read)
            if change:
                for node in change:
                    if node not in written:
                        upward.add(node)
                        written.add(node)
                changes[place] = tuple(change)
            if write:
                written.update(write)
                writes[place] = tuple(write)
                if (
                    facts.move_bits
                    and len(read) == 1
                    and len(write) == 1
                    and type(operands[0]) is not Memory
                    and type(operands[1]) is not Memory
                ):
                    moves.append(place)
        exposed.append(upward)
        overwritten.append(written)

    # Only what some block exposes is ever live between blocks: most registers never enter a bitset.
    crossing = set().union(*exposed)
    block_uses = [_bitset(found) for found in exposed]
    block_writes = [_bitset(crossing & found) for found in overwritten]
    live_in = block_uses[:]
    live_out = [0] * count
    pending = list(range(count))
    waiting = [True] * count
    while pending:
        block = pending.pop()
        waiting[block] = False
        out = 0
        for successor in successors[block]:
            out |= live_in[successor]
        live_out[block] = out
        into = block_uses[block] | (out & ~block_writes[block])
        if into != live_in[block]:
            live_in[block] = into
            for predecessor in predecessors[block]:
                if not waiting[predecessor]:
                    waiting[predecessor] = True
                    pending.append(predecessor)

    undefined = live_in[0] >> physical if count else 0
    if undefined:
        register = nodes[physical + (undefined & -undefined).bit_length() - 1]
        node = node_of[register]
        place = next(p for p in range(size) if node in uses[p] or node in changes[p])
        where = body[place]
        raise AllocationError(
            f"{register!r} may be read before it is written: found in {where.row.name} at place {place}"  # type: ignore
            f"{f' ({where.location})' if where.location else ''}; "  # type: ignore[union-attr]
            "expected a write on every path to it; mend: set it to zero first, or write with zeroing"
        )

    flow.nodes = nodes
    flow.node_of = node_of
    flow.physical = physical
    flow.kinds = kinds
    flow.kind_of = kind_of
    flow.moves = moves
    flow.uses = uses
    flow.writes = writes
    flow.changes = changes
    flow.live_in = live_in
    flow.live_out = live_out
    flow.weight = [8.0 ** d for d in flow.depth]
    return flow


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
