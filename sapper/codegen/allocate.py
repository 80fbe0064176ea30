"""Register allocation: virtual registers become physical ones, or slots in the frame.

Enters: a MachineFunction with virtual and physical registers, and the target's register facts (`Abi`).
Leaves: `Allocation`: a new MachineFunction without virtual registers, the origin of each of its instructions, and
statistics. The function given is not changed, so that check.py can compare the two.
Holds: copies whose ends never differ while both are wanted become one class of registers, and a class gets one place.
Where more registers of a kind are wanted than there are, the cheapest classes to spill (reads and writes weighted by
loop depth, over the crowded places they leave) go to memory first; a class with one definition that is a constant is
made again instead. Then classes take registers in the order in which they begin, which needs no more registers than
the pressure in straight-line code; a class that finds none moves others aside, then falls apart into its members,
then is spilled or spills others, and the whole is tried again.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from heapq import heapify, heappop, heapreplace

from .liveness import (
    NEXT,
    WRITE,
    Abi,
    AllocationError,
    Flow,
    Ranges,
    RowFacts,
    analyse,
    facts_table,
    is_idiom,
    live_ranges,
)
from .machine import Immediate, Instruction, Label, MachineFunction, Memory, Operand, Register, VirtualRegister

MAX_ROUNDS = 40


@dataclass(slots=True)
class Slot:
    """A place in the frame: size_bytes at [stack pointer + memory.disp], aligned to its size."""

    size_bytes: int
    memory: Memory


@dataclass(slots=True)
class Allocation:
    """What allocation did. origin: for each item of function.body its place in the code given, -1 where added.

    spills, reloads, rematerialised: instructions added, counted in the text. moves_removed: copies of the code given
    that are gone. max_pressure: for each kind the most registers wanted at one place before anything was spilled.
    """

    function: MachineFunction
    origin: list[int]
    spills: int = 0
    reloads: int = 0
    rematerialised: int = 0
    moves_removed: int = 0
    max_pressure: dict[str, int] = field(default_factory=dict)
    slots: list[Slot] = field(default_factory=list)


class _Work:
    """The code on its way: spilling rewrites it and the next round reads it afresh."""

    __slots__ = ("abi", "bits_of", "facts", "home", "minimal", "moves", "next_number", "origin", "slots", "source")

    def __init__(self, source: MachineFunction, abi: Abi) -> None:
        self.source = MachineFunction(source.name, source.body, source.constants)
        self.abi = abi
        self.facts = facts_table(abi)
        self.origin = list(range(len(source.body)))
        self.slots: list[Slot] = []
        self.home: dict[VirtualRegister, Slot] = {}  # registers that already have a copy in the frame
        self.bits_of: dict[VirtualRegister, int] = {}  # how wide registers are that stand for a wider one in places
        self.minimal: set[VirtualRegister] = set()  # spilling these gains nothing
        self.moves: list[int] = []  # places of the copies in the code given
        self.next_number = 0


def allocate(function: MachineFunction, abi: Abi, no_spill: bool = False, flow: Flow | None = None) -> Allocation:
    """Give every virtual register a place.

    no_spill: raise AllocationError, listing the registers live where most are wanted, instead of using memory.
    flow: what `analyse` says of the function, where the caller knows it.
    Raises AllocationError too when an instruction needs more registers at once than there are.
    """
    work = _Work(function, abi)
    result = Allocation(work.source, work.origin)
    for round_number in range(MAX_ROUNDS):
        if flow is None or round_number:
            flow = analyse(work.source, abi)
        allocatable = sum(len(numbers) for numbers in abi.registers.values())
        ranges = live_ranges(flow, allocatable)
        if round_number == 0:
            work.moves = flow.moves
            for kind, row in zip(flow.kinds, ranges.pressure, strict=True):
                result.max_pressure[kind] = max(row, default=0)
        classes = _Classes(flow, ranges, work)
        crowded = _crowded_places(flow, ranges, abi)
        spilled = _choose_spills(flow, ranges, classes, crowded, work) if crowded else []
        if not spilled:
            spilled = classes.colour()
            crowded = []
        if not spilled:
            return _emit(work, flow, classes, result)
        if no_spill:
            raise AllocationError(_crowd_report(work, flow, ranges, abi, spilled[0]))
        _spill(work, flow, ranges, classes, spilled, crowded, result)
    raise AllocationError(f"{function.name}: registers do not suffice after {MAX_ROUNDS} rounds of spilling")


class _Classes:
    """Registers joined by copies, and the physical registers that they take."""

    __slots__ = (
        "busy",
        "cost",
        "flow",
        "hints",
        "holders",
        "members",
        "moves",
        "parent",
        "points",
        "ranges",
        "register_nodes",
        "taken",
        "widths",
        "work",
    )

    def __init__(self, flow: Flow, ranges: Ranges, work: _Work) -> None:
        self.flow = flow
        self.ranges = ranges
        self.work = work
        self.moves: set[int] = set()  # places of copies of all that anyone looks at
        count = len(flow.nodes)
        self.parent = list(range(count))
        self.points = ranges.points[:]
        self.cost = ranges.cost[:]
        self.members: dict[int, list[int]] = {}
        self.hints: dict[int, list[int]] = {}
        self.widths: list[int] | None = None
        self.taken = [-1] * count  # the physical node of each class
        self.register_nodes: list[list[int]] = []
        node = 0
        for kind in flow.kinds:
            numbers = work.abi.registers.get(kind, ())
            self.register_nodes.append(list(range(node, node + len(numbers))))
            node += len(numbers)
        for register_node in range(flow.physical, count):
            hint = flow.nodes[register_node].hint  # type: ignore[union-attr]
            if hint is not None:
                hinted = flow.node_of.get((hint.kind, hint.number))  # type: ignore[call-overload]
                if hinted is not None:
                    self.hints.setdefault(register_node, []).append(hinted)
        self._coalesce()

    def _copy_bits_suffice(self, place: int, first: int, second: int) -> bool:
        """A copy of fewer bits than the register has is only a copy if nobody looks at the rest."""
        instruction = self.work.source.body[place]
        bits = self.work.facts[instruction.row].move_bits  # type: ignore[union-attr]
        if bits >= self.work.abi.full_bits[self.flow.kinds[self.flow.kind_of[first]]]:
            return True
        if self.widths is None:
            self.widths = value_bits(self.work, self.flow)
        return max(self.widths[first], self.widths[second]) <= bits

    def _coalesce(self) -> None:
        """Join the ends of copies whose ranges have no point in common, the innermost loops first."""
        flow = self.flow
        if not flow.moves:
            return
        block_of_place: list[tuple[float, int]] = []
        block = 0
        for place in flow.moves:
            while flow.block_start[block + 1] <= place:
                block += 1
            block_of_place.append((-flow.weight[block], place))
        block_of_place.sort()
        parent, points, physical = self.parent, self.points, flow.physical
        for _, place in block_of_place:
            target = flow.writes[place][0]
            source = flow.uses[place][0]
            if flow.kind_of[target] != flow.kind_of[source] or not self._copy_bits_suffice(place, target, source):
                continue
            self.moves.add(place)
            while parent[target] != target:
                target = parent[target]
            while parent[source] != source:
                source = parent[source]
            if target == source:
                continue
            if target < physical or source < physical:
                if target >= physical:
                    self.hints.setdefault(target, []).append(source)
                elif source >= physical:
                    self.hints.setdefault(source, []).append(target)
                continue
            if points[target] & points[source]:
                self.hints.setdefault(target, []).append(source)
                self.hints.setdefault(source, []).append(target)
                continue
            first, second = (target, source) if target < source else (source, target)
            parent[second] = first
            points[first] |= points[second]
            self.cost[first] += self.cost[second]
            self.members.setdefault(first, [first]).extend(self.members.pop(second, [second]))
            if second in self.hints:
                self.hints.setdefault(first, []).extend(self.hints.pop(second))

    def find(self, node: int) -> int:
        """The class of a node: its lowest member."""
        parent = self.parent
        while parent[node] != node:
            node = parent[node]
        return node

    def roots(self) -> list[int]:
        """All classes of virtual registers that are ever wanted, in order of their first point."""
        first = self.ranges.first
        begin: list[tuple[int, int]] = []
        for node in range(self.flow.physical, len(self.flow.nodes)):
            if self.parent[node] == node and self.points[node]:
                members = self.members.get(node)
                begin.append((first[node] if members is None else min(first[m] for m in members), node))
        begin.sort()
        return [node for _, node in begin]

    def colour(self) -> list[int]:
        """Give every class a register. Returns the classes that must be spilled first, none when all is well."""
        points = self.points
        busy = self.busy = points[: self.flow.physical]
        self.holders: list[list[int]] = [[] for _ in range(self.flow.physical)]
        taken = self.taken
        kind_of = self.flow.kind_of
        register_nodes = self.register_nodes
        spilled: list[int] = []
        queue = self.roots()
        queue.reverse()
        while queue:
            node = queue.pop()
            wanted = points[node]
            kind = kind_of[node]
            chosen = -1
            if node in self.hints:
                chosen = self._hinted(node, wanted)
            if chosen < 0:
                for register in register_nodes[kind]:
                    if not busy[register] & wanted:
                        chosen = register
                        break
                else:
                    chosen = self._move_aside(node, wanted, register_nodes[kind])
            if chosen >= 0:
                taken[node] = chosen
                busy[chosen] |= wanted
                self.holders[chosen].append(node)
                continue
            members = self.members.pop(node, None)
            if members is not None:
                queue.extend(self._take_apart(members))
                continue
            spilled.extend(self._evict(node, wanted, register_nodes[kind], queue))
        return spilled

    def _hinted(self, node: int, wanted: int) -> int:
        """A register that would make a copy vanish, or -1."""
        for hint in self.hints[node]:
            register = hint if hint < self.flow.physical else self.taken[self.find(hint)]
            if (
                register >= 0
                and register in self.register_nodes[self.flow.kind_of[node]]
                and not self.busy[register] & wanted
            ):
                return register
        return -1

    def _move_aside(self, node: int, wanted: int, registers: list[int]) -> int:
        """Free a register by giving its holders that are in the way other ones. Returns it, or -1."""
        busy, points = self.busy, self.points
        for register in registers:
            if points[register] & wanted:
                continue
            blocking = [holder for holder in self.holders[register] if points[holder] & wanted]
            if len(blocking) > 4:
                continue
            moves: list[tuple[int, int]] = []
            for holder in blocking:
                for other in registers:
                    if other != register and not busy[other] & points[holder]:
                        busy[other] |= points[holder]
                        moves.append((holder, other))
                        break
                else:
                    break
            if len(moves) == len(blocking):
                for holder, other in moves:
                    busy[register] ^= points[holder]
                    self.holders[register].remove(holder)
                    self.holders[other].append(holder)
                    self.taken[holder] = other
                return register
            for holder, other in moves:
                busy[other] ^= points[holder]
        return -1

    def _take_apart(self, members: list[int]) -> list[int]:
        """Undo a joining: each member becomes a class again, with the others as hints. Latest first."""
        first = self.ranges.first
        for member in members:
            self.parent[member] = member
            self.points[member] = self.ranges.points[member]
            self.cost[member] = self.ranges.cost[member]
            self.hints.setdefault(member, []).extend(m for m in members if m != member)
        return sorted((m for m in members if self.points[m]), key=lambda m: (-first[m], -m))

    def spillable(self, node: int) -> bool:
        """Whether memory may hold the class: not the short ends that spilling itself has made."""
        return self.flow.nodes[node] not in self.work.minimal

    def _evict(self, node: int, wanted: int, registers: list[int], queue: list[int]) -> list[int]:
        """Choose the cheaper: spill the class, or spill all that hold some register in its way."""
        points = self.points
        best: list[int] | None = [node] if self.spillable(node) else None
        best_cost = self.cost[node] if best else float("inf")
        best_register = -1
        for register in registers:
            if points[register] & wanted:
                continue
            blocking = [holder for holder in self.holders[register] if points[holder] & wanted]
            if all(self.spillable(holder) for holder in blocking):
                cost = sum(self.cost[holder] for holder in blocking)
                if cost < best_cost:
                    best, best_cost, best_register = blocking, cost, register
        if best is None:
            lacking = self.flow.nodes[node]
            raise AllocationError(
                f"{self.work.source.name}: no register for {lacking!r} and nothing left to spill; "
                f"the kind {lacking.kind} has {len(registers)} registers"
            )
        if best_register >= 0:
            for holder in best:
                self.busy[best_register] ^= points[holder]
                self.holders[best_register].remove(holder)
                self.taken[holder] = -1
            queue.append(node)
        return best


def joined_registers(function: MachineFunction, flow: Flow, ranges: Ranges, abi: Abi) -> list[int]:
    """For each node the class that copies join it to, before any spilling (for schedule.py)."""
    classes = _Classes(flow, ranges, _Work(function, abi))
    return [classes.find(node) for node in range(len(flow.nodes))]


def value_bits(work: _Work, flow: Flow) -> list[int]:
    """For each node the most bits that any row reads or writes of it; addresses count in full."""
    table = work.facts
    node_of = flow.node_of
    bits = [0] * flow.physical + [work.bits_of.get(n, 0) for n in flow.nodes[flow.physical :]]  # type: ignore[arg-type]
    for item in work.source.body:
        if isinstance(item, Label):
            continue
        facts = table[item.row]
        for operand, width in zip(item.operands, facts.bits, strict=True):
            kind_type = type(operand)
            if kind_type is VirtualRegister:
                node = node_of[operand]  # type: ignore[index]
                if bits[node] < width:
                    bits[node] = width
            elif kind_type is Memory:
                for part in (operand.base, operand.index):  # type: ignore[union-attr]
                    if type(part) is VirtualRegister:
                        # An index vector is as wide as the row's vectors.
                        wide = 64 if part.kind == "gpr" else max(facts.bits)
                        node = node_of[part]
                        if bits[node] < wide:
                            bits[node] = wide
        if type(item.mask) is VirtualRegister:
            bits[node_of[item.mask]] = 64
    for node in range(flow.physical):
        bits[node] = work.abi.full_bits.get(flow.kinds[flow.kind_of[node]], 0)
    return bits


def _crowded_places(flow: Flow, ranges: Ranges, abi: Abi) -> list[dict[int, int]]:
    """For each kind the places that want more registers than there are, with the excess. Empty list: nowhere."""
    crowded: list[dict[int, int]] = []
    found = False
    for kind, row in zip(flow.kinds, ranges.pressure, strict=True):
        limit = len(abi.registers.get(kind, ()))
        if row and limit and max(row) > limit:
            crowded.append({place: wanted - limit for place, wanted in enumerate(row) if wanted > limit})
            found = True
        else:
            crowded.append({})
    return crowded if found else []


def _definitions(flow: Flow, classes: _Classes) -> list[list[int]]:
    """For each class the places that write it."""
    found: list[list[int]] = [[] for _ in flow.nodes]
    parent = classes.parent
    for place, (written, changed) in enumerate(zip(flow.writes, flow.changes, strict=True)):
        for node in written + changed if changed else written:
            while parent[node] != node:
                node = parent[node]
            found[node].append(place)
    return found


def _named_points(flow: Flow, classes: _Classes, places: Iterable[int]) -> list[int]:
    """For each class the reading points of those of the places that name it."""
    named = [0] * len(flow.nodes)
    parent = classes.parent
    for place in places:
        for node in flow.uses[place] + flow.changes[place] + flow.writes[place]:
            while parent[node] != node:
                node = parent[node]
            named[node] |= 1 << (2 * place)
    return named


def _choose_spills(
    flow: Flow, ranges: Ranges, classes: _Classes, crowded: list[dict[int, int]], work: _Work
) -> list[int]:
    """Classes to spill so that no place is crowded, the cheapest for what they relieve first.

    What a class relieves only shrinks as others are chosen, so its last known score is an upper bound: the one on top
    of the heap is the best if its score still holds (lazy greedy; Minoux, 1978).
    """
    definitions = _definitions(flow, classes)
    spilled: list[int] = []
    roots = classes.roots()
    for kind, excess in enumerate(crowded):
        if not excess:
            continue
        named = _named_points(flow, classes, excess)
        # Bit 2p of plane i is bit i of the excess at place p: a class relieves all of its places in a few operations.
        planes = _planes(excess, len(flow.uses))
        mask = _union(planes)
        queue: list[tuple[float, int, int, int, float]] = []  # (-score, order, class, what it relieves, cost)
        for order, node in enumerate(roots):
            if flow.kind_of[node] == kind and classes.spillable(node):
                relieves = classes.points[node] & mask & ~named[node]
                if relieves:
                    cost = classes.cost[node]
                    if _constant_definition(work, flow, classes, node, definitions[node]) is not None:
                        cost *= 0.5
                    queue.append((-relieves.bit_count() / cost, order, node, relieves, cost))
        heapify(queue)
        while mask and queue:
            score, order, node, relieves, cost = queue[0]
            relieves &= mask
            if not relieves:
                heappop(queue)
            elif (now := -relieves.bit_count() / cost) != score:
                heapreplace(queue, (now, order, node, relieves, cost))
            else:
                heappop(queue)
                spilled.append(node)
                for position, plane in enumerate(planes):
                    planes[position] = plane ^ relieves
                    relieves &= ~plane
                mask = _union(planes)
    return spilled


def _planes(excess: dict[int, int], size: int) -> list[int]:
    """Bit 2p of plane i is bit i of excess[p]."""
    planes = []
    for position in range(max(excess.values()).bit_length()):
        digits = ["0"] * size
        for place, count in excess.items():
            if count >> position & 1:
                digits[-1 - place] = "1"
        planes.append(int("".join(digits), 4))
    return planes


def _union(planes: list[int]) -> int:
    mask = 0
    for plane in planes:
        mask |= plane
    return mask


def _is_constant(instruction: Instruction, facts: RowFacts, home: Slot | None) -> bool:
    """The instruction writes operand 0 only, from immediates and constants beside the code, and touches no flags.

    A load from the slot that is home to all of the class counts too: it holds while registers loaded from it are used.
    """
    if facts.flow != NEXT or facts.writes or facts.reads or facts.side_effects:
        return False
    if facts.writes_flags or facts.reads_flags:
        return False
    if instruction.mask is not None or not facts.access or not facts.access[0] & WRITE:
        return False
    if is_idiom(instruction, facts):
        return True
    if facts.access[0] != WRITE:
        return False
    for operand in instruction.operands[1:]:
        kind = type(operand)
        if kind is Immediate:
            continue
        if kind is Memory:
            if operand.label is not None and operand.base is None and operand.index is None:  # type: ignore[union-attr]
                continue
            if home is not None and operand is home.memory:
                continue
        return False
    return True


def _constant_definition(
    work: _Work, flow: Flow, classes: _Classes, node: int, definitions: list[int]
) -> int | None:
    """Of the places that write a class, the one that makes it, if that is all and it can be made again anywhere."""
    found = None
    for place in definitions:
        if place in classes.moves and classes.find(flow.uses[place][0]) == node:
            continue  # a copy inside the class
        if found is not None:
            return None
        found = place
    if found is None:
        return None
    instruction = work.source.body[found]
    home = _home(work, flow, classes.members.get(node, [node]))
    return found if _is_constant(instruction, work.facts[instruction.row], home) else None  # type: ignore


def _home(work: _Work, flow: Flow, members: list[int]) -> Slot | None:
    """The slot that all members have their copy in, or None."""
    homes = [work.home.get(flow.nodes[member]) for member in members]  # type: ignore[arg-type]
    return homes[0] if all(home is homes[0] for home in homes) else None


def _replace(operand: Operand, names: dict[VirtualRegister, VirtualRegister]) -> Operand:
    kind = type(operand)
    if kind is VirtualRegister:
        return names.get(operand, operand)  # type: ignore[arg-type]
    if kind is Memory:
        base, index = operand.base, operand.index  # type: ignore[union-attr]
        new_base = names.get(base, base) if type(base) is VirtualRegister else base
        new_index = names.get(index, index) if type(index) is VirtualRegister else index
        if new_base is not base or new_index is not index:
            return Memory(new_base, new_index, operand.scale, operand.disp, operand.broadcast, operand.label)  # type: ignore
    return operand


def _with_names(instruction: Instruction, names: dict[VirtualRegister, VirtualRegister]) -> Instruction:
    mask = instruction.mask
    return Instruction(
        instruction.row,
        [_replace(operand, names) for operand in instruction.operands],
        names.get(mask, mask) if type(mask) is VirtualRegister else mask,
        instruction.zeroing,
        instruction.location,
        instruction.comment,
    )


def _spill(
    work: _Work,
    flow: Flow,
    ranges: Ranges,
    classes: _Classes,
    spilled: list[int],
    crowded: list[dict[int, int]],
    result: Allocation,
) -> None:
    """Rewrite the code so that the spilled classes live in the frame, or are made again, between crowded places.

    Each stretch of a block between two places that are crowded and do not name the class loads it once. When no
    place is crowded (physical registers are in the way), each instruction loads it for itself.
    """
    abi = work.abi
    body = work.source.body
    definitions = _definitions(flow, classes)
    if classes.widths is None:
        classes.widths = value_bits(work, flow)
    constant: dict[int, Instruction] = {}
    slot_of: dict[int, Slot] = {}
    round_slots: list[tuple[Slot, int]] = []
    names_of: dict[int, list[VirtualRegister]] = {}
    by_node: dict[int, int] = {}
    bits_of_class: dict[int, int] = {}
    dropped: set[int] = set()
    had_home: set[int] = set()  # their definitions are already stored
    for root in spilled:
        members = classes.members.get(root, [root])
        bits_of_class[root] = max(classes.widths[member] for member in members)
        for member in members:
            by_node[member] = root
        names_of[root] = [flow.nodes[member] for member in members]  # type: ignore[misc]
        definition = _constant_definition(work, flow, classes, root, definitions[root])
        if definition is not None:
            constant[root] = body[definition]  # type: ignore[assignment]
            dropped.add(definition)
            continue
        home = _home(work, flow, members)
        if home is not None:
            slot_of[root] = home
            had_home.add(root)
            continue
        bits = bits_of_class[root]
        kind = flow.kinds[flow.kind_of[root]]
        size_bytes = max(bits, 64 if kind != "vec" else 128) // 8
        for position, (slot, busy) in enumerate(round_slots):
            if slot.size_bytes == size_bytes and not busy & classes.points[root]:
                round_slots[position] = (slot, busy | classes.points[root])
                slot_of[root] = slot
                break
        else:
            slot = Slot(size_bytes, Memory(Register(*abi.stack_pointer)))
            work.slots.append(slot)
            round_slots.append((slot, classes.points[root]))
            slot_of[root] = slot

    if not work.next_number:
        work.next_number = 1 + max((n.number for n in flow.nodes[flow.physical :]), default=0)

    new_body: list[Instruction | Label] = []
    new_origin: list[int] = []
    current: dict[int, VirtualRegister] = {}  # class -> the register that holds it here
    touches: dict[VirtualRegister, int] = {}
    unstored: set[int] = set()  # classes written whose store, of an earlier round, has not come yet

    def fresh(root: int) -> VirtualRegister:
        register = VirtualRegister(flow.kinds[flow.kind_of[root]], work.next_number)
        work.next_number += 1
        if root in slot_of:
            work.home[register] = slot_of[root]
        touches[register] = 0
        work.bits_of[register] = bits_of_class[root]
        return register

    def reload(root: int, like: Instruction) -> VirtualRegister:
        register = fresh(root)
        if root in constant:
            made = constant[root]
            old = made.operands[0]
            new_body.append(_with_names(made, {old: register}))  # type: ignore[dict-item]
            result.rematerialised += 1
        else:
            slot = slot_of[root]
            row = abi.reload_row(register.kind, slot.size_bytes * 8)
            new_body.append(Instruction(row, [register, slot.memory], location=like.location, comment="reload"))
            result.reloads += 1
        new_origin.append(-1)
        return register

    def store(root: int, register: VirtualRegister | Register, like: Instruction) -> None:
        slot = slot_of[root]
        row = abi.spill_row(register.kind, slot.size_bytes * 8)
        new_body.append(Instruction(row, [slot.memory, register], location=like.location, comment="spill"))
        new_origin.append(-1)
        result.spills += 1

    starts = set(flow.block_start)
    for place, item in enumerate(body):
        if place in starts:
            current.clear()
        if isinstance(item, Label):
            new_body.append(item)
            new_origin.append(work.origin[place])
            continue
        if place in dropped:
            continue
        if not crowded:
            for root in [root for root in current if root not in unstored]:
                del current[root]
        named: list[int] = []
        for group in (flow.uses[place], flow.changes[place], flow.writes[place]):
            for node in group:
                if node in by_node and by_node[node] not in named:
                    named.append(by_node[node])
        if crowded and current:
            for root in list(current):
                if place in crowded[flow.kind_of[root]] and root not in named and root not in unstored:
                    del current[root]
        if not named:
            new_body.append(item)
            new_origin.append(work.origin[place])
            continue
        assert isinstance(item, Instruction)
        if len(item.operands) == 2 and named[0] in had_home and item.operands[1] is slot_of[named[0]].memory:
            continue  # loaded from where it lives: each use loads it anew
        read = {by_node[n] for n in flow.uses[place] + flow.changes[place] if n in by_node}
        written = {by_node[n] for n in flow.writes[place] + flow.changes[place] if n in by_node}
        facts = work.facts[item.row]
        if place in classes.moves:
            source_root = by_node.get(flow.uses[place][0], -1)
            target_root = by_node.get(flow.writes[place][0], -2)
            if source_root == target_root:
                continue  # a copy inside the class: both live in the same slot
            if target_root >= 0 and source_root == -1 and target_root not in had_home:
                store(target_root, item.operands[1], item)  # type: ignore[arg-type]
                current.pop(target_root, None)
                continue
        for root in named:
            if root in read and root not in current:
                current[root] = reload(root, item)
        # A plain write starts a new register, so that what was loaded before can still be loaded again.
        reading = {register: current[root] for root in read for register in names_of[root]}
        for root in written:
            if root not in read or any(by_node.get(n) == root for n in flow.writes[place]):
                current[root] = fresh(root)
        writing = {register: current[root] for root in written for register in names_of[root]}
        for root in named:
            touches[current[root]] += 1
        new_body.append(_renamed(item, facts, reading, writing))
        new_origin.append(work.origin[place])
        for root in named:
            if root in written and root in slot_of:
                if root in had_home:
                    unstored.add(root)
                else:
                    store(root, current[root], item)
            elif root in unstored and item.operands[0] is slot_of[root].memory:
                unstored.discard(root)
    work.minimal.update(register for register, count in touches.items() if count <= 1)
    work.source = MachineFunction(work.source.name, new_body, work.source.constants)
    work.origin = new_origin


def _renamed(
    instruction: Instruction,
    facts: RowFacts,
    reading: dict[VirtualRegister, VirtualRegister],
    writing: dict[VirtualRegister, VirtualRegister],
) -> Instruction:
    """The instruction with operands that it writes renamed by `writing`, all others by `reading`."""
    mask = instruction.mask
    if is_idiom(instruction, facts):
        reading = writing  # nothing is read: all operands are the register written
    return Instruction(
        instruction.row,
        [
            _replace(operand, writing if how & WRITE and type(operand) is VirtualRegister else reading)
            for operand, how in zip(instruction.operands, facts.access, strict=True)
        ],
        reading.get(mask, mask) if type(mask) is VirtualRegister else mask,
        instruction.zeroing,
        instruction.location,
        instruction.comment,
    )


def _crowd_report(work: _Work, flow: Flow, ranges: Ranges, abi: Abi, spilled: int) -> str:
    """What is live where most registers of the kind are wanted."""
    kind = flow.kind_of[spilled]
    row = ranges.pressure[kind]
    most = max(row)
    place = row.index(most)
    lines = []
    for node, points in enumerate(ranges.points):
        if flow.kind_of[node] == kind and points >> (2 * place) & 3:
            first = ranges.first[node] // 2
            item = work.source.body[first]
            what = "" if isinstance(item, Label) else f" {item.row.name}"
            where = f" ({item.location})" if isinstance(item, Instruction) and item.location else ""
            last = (points.bit_length() - 1) // 2
            lines.append(f"  {flow.nodes[node]!r}: from place {first}{what}{where} to place {last}")
    limit = len(abi.registers[flow.kinds[kind]])
    item = work.source.body[place]
    name = item.name if isinstance(item, Label) else item.row.name
    return (
        f"{work.source.name}: {flow.kinds[kind]} registers do not suffice without spilling: at place {place} ({name}) "
        f"{most} are wanted, expected at most {limit}; mend: smaller tiles or fewer values kept, or allow spills. "
        "Live there:\n" + "\n".join(lines)
    )


def _emit(work: _Work, flow: Flow, classes: _Classes, result: Allocation) -> Allocation:
    """Write the code with physical registers, without the copies that copy a register to itself."""
    registers: dict[VirtualRegister, Register] = {}
    for node in range(flow.physical, len(flow.nodes)):
        register = flow.nodes[node]
        place = classes.taken[classes.find(node)]
        if place < 0:
            # Never wanted: it is not named by any instruction that is left.
            continue
        registers[register] = flow.nodes[place]  # type: ignore[index,assignment]
    offset = 0
    for slot in sorted(work.slots, key=lambda s: -s.size_bytes):
        slot.memory.disp = offset
        offset += slot.size_bytes
    body: list[Instruction | Label] = []
    origin: list[int] = []
    moves = classes.moves
    for place, item in enumerate(work.source.body):
        if isinstance(item, Label):
            body.append(item)
            origin.append(work.origin[place])
            continue
        operands: list[Operand] = []
        for operand in item.operands:
            kind = type(operand)
            if kind is VirtualRegister:
                operands.append(registers[operand])  # type: ignore[index]
            elif kind is Memory:
                base, index = operand.base, operand.index  # type: ignore[union-attr]
                if type(base) is VirtualRegister or type(index) is VirtualRegister:
                    operands.append(
                        Memory(
                            registers[base] if type(base) is VirtualRegister else base,
                            registers[index] if type(index) is VirtualRegister else index,  # type: ignore[arg-type]
                            operand.scale,  # type: ignore[union-attr]
                            operand.disp,  # type: ignore[union-attr]
                            operand.broadcast,  # type: ignore[union-attr]
                            operand.label,  # type: ignore[union-attr]
                        )
                    )
                else:
                    operands.append(operand)
            else:
                operands.append(operand)
        if (
            place in moves
            and operands[0] == operands[1]
        ):
            continue
        mask = item.mask
        body.append(
            Instruction(
                item.row,
                operands,
                registers[mask] if type(mask) is VirtualRegister else mask,
                item.zeroing,
                item.location,
                item.comment,
            )
        )
        origin.append(work.origin[place])
    result.function = MachineFunction(work.source.name, body, work.source.constants, offset)
    result.origin = origin
    result.slots = sorted(work.slots, key=lambda s: -s.size_bytes)
    kept = set(origin)
    result.moves_removed = sum(1 for place in work.moves if place not in kept)
    return result
