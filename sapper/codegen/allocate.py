"""Register allocation: virtual registers become physical ones, or slots in the frame.

Enters: a MachineFunction with virtual and physical registers, and the target's register facts (`Abi`).
Leaves: `Allocation`: a new MachineFunction without virtual registers, the origin of each of its instructions, and
statistics. The function given is not changed, so that check.py can compare the two.
Holds: a class of registers that copies join (joined.py) gets one place. Where more registers of a kind are wanted
than there are, some classes are spilled first (spill.py). Then classes and pieces of spilled ones take registers in the
order in which they begin, which needs no more registers than the pressure in straight-line code; one that finds none
moves others aside, then a class falls apart into its members, then it is spilled or spills others, and colouring starts
again.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from .joined import Classes
from .machine import Instruction, Label, MachineFunction, Memory, Operand, Register, VirtualRegister
from .row_facts import Abi, AllocationError
from .spill import Piece, Plan, Slot

MAX_ROUNDS = 60


@dataclass(slots=True)
class Allocation:
    """What allocation did. origin: for each item of function.body its place in the code given, -1 where added.

    spills, reloads, rematerialised: instructions added, counted in the text. folded: operands that became memory
    operands in the frame. moves_removed: copies of the code given that are gone. max_pressure: for each kind the most
    registers wanted at one place before anything was spilled.
    """

    function: MachineFunction
    origin: list[int]
    spills: int = 0
    reloads: int = 0
    rematerialised: int = 0
    folded: int = 0
    moves_removed: int = 0
    max_pressure: dict[str, int] = field(default_factory=dict)
    slots: list[Slot] = field(default_factory=list)


def allocate(function: MachineFunction, abi: Abi, no_spill: bool = False, classes: Classes | None = None) -> Allocation:
    """Give every virtual register a place.

    no_spill: raise AllocationError, listing the registers live where most are wanted, instead of using memory.
    classes: of the function, where the caller knows them.
    Raises AllocationError too when an instruction needs more registers at once than there are, and when a kind that is
    never spilled does not suffice.
    """
    if classes is None:
        classes = Classes(function, abi)
    plan = Plan(classes)
    pressure = {kind: max(row, default=0)
                for kind, row in zip(classes.flow.kinds, classes.ranges.pressure, strict=True)}
    crowded = any(pressure[kind] > len(numbers) for kind, numbers in abi.registers.items() if numbers)
    for kind in abi.never_spilled:
        if pressure[kind] > len(abi.registers.get(kind, ())):
            raise _crowded(function, classes, kind)
    roots = _roots(classes)
    spilled = plan.choose([node for _, node in roots]) if crowded else {}
    if spilled and no_spill:
        raise _crowded(function, classes, classes.flow.kinds[classes.flow.kind_of[next(iter(spilled))]])
    plan.spill(spilled)
    for _ in range(MAX_ROUNDS):
        colours = _Colours(function, classes, plan)
        evicted = colours.colour(roots)
        if not evicted:
            return _emit(function, classes, plan, colours, pressure)
        kinds = [colours.kinds[colours.kind_of[node]] for node in evicted]
        refused = kinds if no_spill else [kind for kind in kinds if kind in abi.never_spilled]
        if refused:
            raise _crowded(function, classes, refused[0])
        plan.evict(evicted)
        roots = _roots(classes)     # some may have fallen apart
    raise AllocationError(f"{function.name}: registers do not suffice after {MAX_ROUNDS} rounds of spilling")


def _roots(classes: Classes) -> list[tuple[int, int]]:
    """All classes of virtual registers that are ever wanted, as (first point, class), in this order."""
    points, parent = classes.points, classes.parent
    return sorted(((points[node] & -points[node]).bit_length(), node)
                  for node in range(classes.flow.physical, len(parent)) if parent[node] == node and points[node])


class _Colours:
    """One attempt to give everything a register.

    taken: the physical node of each node, -1 as long as it has none. busy: where each physical node is taken. holders:
    who has it. parent, points, members: as in `Classes`, but for what falls apart in this attempt.
    """

    def __init__(self, function: MachineFunction, classes: Classes, plan: Plan) -> None:
        self.name = function.name
        self.classes = classes
        self.plan = plan
        flow = classes.flow
        self.physical = flow.physical
        self.kinds = flow.kinds
        more = plan.next_node - len(flow.nodes)
        self.taken = [-1] * plan.next_node
        self.points = classes.points + [0] * more
        self.kind_of = flow.kind_of + [0] * more
        self.parent = classes.parent[:]
        self.members = dict(classes.members)
        self.hints = dict(classes.hints)
        self.busy = self.points[:self.physical]
        self.holders: list[list[int]] = [[] for _ in range(self.physical)]
        self.register_nodes: list[list[int]] = []
        node = 0
        for kind in flow.kinds:
            numbers = classes.abi.registers.get(kind, ())
            self.register_nodes.append(list(range(node, node + len(numbers))))
            node += len(numbers)
        for number, piece in plan.pieces.items():
            self.points[number] = piece.points
            self.kind_of[number] = flow.kinds.index(piece.register.kind)

    def find(self, node: int) -> int:
        """The class of a node, as far as it did not fall apart."""
        parent = self.parent
        while parent[node] != node:
            node = parent[node]
        return node

    def first(self, node: int) -> int:
        points = self.points[node]
        return (points & -points).bit_length()

    def colour(self, roots: list[tuple[int, int]]) -> list[int]:
        """Give everything a register. Returns what must be spilled first, nothing when all is well."""
        points, busy, taken = self.points, self.busy, self.taken
        spilled: list[int] = []
        begin = [root for root in roots if root[1] not in self.plan.home_of]
        begin += [(self.first(piece), piece) for piece in self.plan.pieces]
        queue = [node for _, node in sorted(begin, reverse=True)]
        while queue:
            node = queue.pop()
            wanted = points[node]
            registers = self.register_nodes[self.kind_of[node]]
            chosen = self._hinted(node, wanted, registers) if node in self.hints else -1
            if chosen < 0:
                for register in registers:
                    if not busy[register] & wanted:
                        chosen = register
                        break
                else:
                    chosen = self._move_aside(wanted, registers)
            if chosen >= 0:
                taken[node] = chosen
                busy[chosen] |= wanted
                self.holders[chosen].append(node)
                continue
            members = self.members.pop(node, None)
            if members is not None:
                queue.extend(self._take_apart(members))
                continue
            spilled.extend(self._evict(node, wanted, registers, queue))
        return spilled

    def _hinted(self, node: int, wanted: int, registers: list[int]) -> int:
        """A register that would make a copy vanish, or -1."""
        for hint in self.hints[node]:
            register = hint if hint < self.physical else self.taken[self.find(hint)]
            if register in registers and not self.busy[register] & wanted:
                return register
        return -1

    def _move_aside(self, wanted: int, registers: list[int]) -> int:
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
        for member in members:
            self.parent[member] = member
            self.points[member] = self.classes.ranges.points[member]
            self.hints[member] = [*self.hints.get(member, ()), *(m for m in members if m != member)]
        return sorted((m for m in members if self.points[m]), key=lambda m: (-self.first(m), -m))

    def _cost(self, node: int) -> float | None:
        """What it costs to spill a class or to make a piece smaller; None where that gains nothing."""
        piece = self.plan.pieces.get(node)
        if piece is not None:
            return piece.cost if len(piece.places) > 1 or piece.loop is not None else None
        return sum(map(self.plan.cost, self.members.get(node) or [node]))

    def _evict(self, node: int, wanted: int, registers: list[int], queue: list[int]) -> list[int]:
        """Choose the cheaper: spill the class, or spill all that hold some register in its way."""
        points = self.points
        own = self._cost(node)
        best: list[int] | None = None if own is None else [node]
        best_cost = float("inf") if own is None else own
        best_register = -1
        for register in registers:
            if points[register] & wanted:
                continue
            blocking = [holder for holder in self.holders[register] if points[holder] & wanted]
            costs = [self._cost(holder) for holder in blocking]
            if None not in costs and (cost := sum(costs)) < best_cost:  # type: ignore[arg-type]
                best, best_cost, best_register = blocking, cost, register
        if best is None:
            raise AllocationError(
                f"{self.name}: no register for {self.register(node)!r} and nothing left to spill; "
                f"the kind {self.kinds[self.kind_of[node]]} has {len(registers)} registers"
            )
        if best_register >= 0:
            for holder in best:
                self.busy[best_register] ^= points[holder]
                self.holders[best_register].remove(holder)
                self.taken[holder] = -1
            queue.append(node)
        for spilled in best:
            root = self.classes.find(spilled) if spilled not in self.plan.pieces else -1
            if root >= 0 and spilled not in self.members and root in self.classes.members:
                self.classes.separate(root)  # it fell apart: its members are spilled one by one
        return best

    def register(self, node: int) -> VirtualRegister | Register:
        piece = self.plan.pieces.get(node)
        return self.classes.flow.nodes[node] if piece is None else piece.register


def _crowded(function: MachineFunction, classes: Classes, name_of_kind: str) -> AllocationError:
    """What is live where most registers of the kind are wanted, and the line there."""
    flow, ranges = classes.flow, classes.ranges
    kind = flow.kinds.index(name_of_kind)
    row = ranges.pressure[kind]
    most = max(row)
    place = row.index(most)
    lines = []
    for node, points in enumerate(ranges.points):
        if flow.kind_of[node] == kind and points >> (2 * place) & 3:
            first = ranges.first(node) // 2
            item = function.body[first]
            what = "" if isinstance(item, Label) else f" {item.row.name}"
            where = f" ({item.location})" if isinstance(item, Instruction) and item.location else ""
            last = (points.bit_length() - 1) // 2
            lines.append(f"  {flow.nodes[node]!r}: from place {first}{what}{where} to place {last}")
    limit = len(classes.abi.registers[name_of_kind])
    item = function.body[place]
    name = item.name if isinstance(item, Label) else item.row.name
    before = (i.location for i in reversed(function.body[:place + 1]) if isinstance(i, Instruction) and i.location)
    return AllocationError(
        f"{function.name}: {name_of_kind} registers do not suffice without spilling: at place {place} ({name}) "
        f"{most} are wanted, expected at most {limit}; mend: smaller tiles or fewer values kept"
        f"{'' if name_of_kind in classes.abi.never_spilled else ', or allow spills'}. "
        "Live there:\n" + "\n".join(lines), next(before, None))


class _Emitter:
    """Writes the code with physical registers."""

    def __init__(self, classes: Classes, plan: Plan, colours: _Colours) -> None:
        nodes = classes.flow.nodes
        self.plan = plan
        self.registers: dict[VirtualRegister, Register] = {}
        for node in range(classes.flow.physical, len(nodes)):
            place = colours.taken[colours.find(node)]
            if place >= 0:  # else never wanted, or spilled: each piece has a register
                self.registers[nodes[node]] = nodes[place]  # type: ignore[index,assignment]
        self.before: dict[int, list[Piece]] = {}
        self.after: dict[int, list[Piece]] = {}
        self.renamed: dict[int, dict[VirtualRegister, Register]] = {}
        self.pieces: dict[int, Register] = {}
        for number, piece in plan.pieces.items():
            register: Register = nodes[colours.taken[number]]  # type: ignore[assignment]
            self.registers[piece.register] = register
            if piece.loaded >= 0:
                self.before.setdefault(piece.loaded, []).append(piece)
            if piece.stored >= 0:
                self.after.setdefault(piece.stored, []).append(piece)
            names = [nodes[node] for node in piece.home.nodes]
            for place in piece.places:
                table = self.renamed.setdefault(place, {})
                for name in names:
                    table[name] = register  # type: ignore[index]
        self.body: list[Instruction | Label] = []
        self.origin: list[int] = []
        self.spills = self.reloads = self.rematerialised = self.folded = 0

    def run(self, body: list[Instruction | Label], copies: set[int]) -> None:
        plan, out, origin = self.plan, self.body, self.origin
        before, after, dropped, replaced, renamed = (
            self.before, self.after, plan.dropped, plan.replaced, self.renamed)
        for place, item in enumerate(body):
            if place in before:
                for piece in before[place]:
                    self._add(plan.load(piece.home, self.registers[piece.register], self._like(body, place)))
                    if piece.home.constant is None:
                        self.reloads += 1
                    else:
                        self.rematerialised += 1
            if type(item) is not Instruction:
                out.append(item)
                origin.append(place)
            elif place not in dropped:
                table = self.registers
                if place in renamed:
                    table = _Joined(renamed[place], table)
                if place in replaced:
                    self._replaced(*replaced[place], place, table)
                else:
                    made = _with_registers(item, table)
                    operands = made.operands
                    if not (place in copies and operands[0] == operands[1]):
                        out.append(made)
                        origin.append(place)
            if place in after:
                for piece in after[place]:
                    self._add(plan.store(piece.home, self.registers[piece.register], self._like(body, place)))
                    self.spills += 1

    def _replaced(self, item: Instruction, same: bool, place: int, table: dict[VirtualRegister, Register]) -> None:
        made = _with_registers(item, table)
        if same:
            self.folded += 1
            self.body.append(made)
            self.origin.append(place)
            return
        self._add(made)
        if type(made.operands[0]) is Memory:
            self.spills += 1
        elif type(made.operands[1]) is Memory and made.operands[1].label is None:
            self.reloads += 1
        else:
            self.rematerialised += 1

    def _add(self, item: Instruction) -> None:
        self.body.append(item)
        self.origin.append(-1)

    @staticmethod
    def _like(body: list[Instruction | Label], place: int) -> Instruction:
        """The instruction at a place, or the next one behind a label."""
        while isinstance(item := body[place], Label):
            place += 1
        return item


class _Joined(dict[VirtualRegister, Register]):
    """A table, and another for what it lacks."""

    def __init__(self, own: dict[VirtualRegister, Register], other: dict[VirtualRegister, Register]) -> None:
        super().__init__(own)
        self.other = other

    def __missing__(self, key: VirtualRegister) -> Register:
        return self.other[key]


def _with_registers(item: Instruction, registers: dict[VirtualRegister, Register]) -> Instruction:
    operands: list[Operand] = item.operands[:]
    for position, operand in enumerate(operands):
        kind = type(operand)
        if kind is VirtualRegister:
            operands[position] = registers[operand]  # type: ignore[index]
        elif kind is Memory:
            base, index = operand.base, operand.index  # type: ignore[union-attr]
            if type(base) is VirtualRegister or type(index) is VirtualRegister:
                operands[position] = Memory(
                    registers[base] if type(base) is VirtualRegister else base,
                    registers[index] if type(index) is VirtualRegister else index,  # type: ignore[arg-type]
                    operand.scale,  # type: ignore[union-attr]
                    operand.disp,  # type: ignore[union-attr]
                    operand.broadcast,  # type: ignore[union-attr]
                    operand.label,  # type: ignore[union-attr]
                )
    mask = item.mask
    return Instruction(item.row, operands, registers[mask] if type(mask) is VirtualRegister else mask, item.zeroing,
                       item.location, item.comment)


def _emit(function: MachineFunction, classes: Classes, plan: Plan, colours: _Colours,
          pressure: dict[str, int]) -> Allocation:
    """Write the code with physical registers, without the copies that copy a register to itself."""
    slots = sorted(plan.slots, key=lambda slot: -slot.size_bytes)
    offset = 0
    for slot in slots:
        slot.memory.disp = offset
        offset += slot.size_bytes
    emitter = _Emitter(classes, plan, colours)
    emitter.run(function.body, classes.copies)
    kept = set(emitter.origin)
    return Allocation(
        MachineFunction(function.name, emitter.body, function.constants, offset), emitter.origin, emitter.spills,
        emitter.reloads, emitter.rematerialised, emitter.folded,
        sum(1 for place in classes.flow.moves if place not in kept), pressure, slots)
