"""Spilling: which registers live in the frame, and through which stretches of the code they are in a register still.

Enters: the classes of a function (joined.py) in which some place wants more registers than there are. Leaves: a `Plan`:
pieces to be given registers in place of the spilled classes, with the loads and stores between them and the frame.
Holds: the code is not changed and places keep their numbers, so nothing has to be analysed again.

    loop:   ...       class spilled: in the frame here       load  r, [slot]
                                                       loop: use r ... use r        one piece: the whole loop
            ...                                               store [slot], r         where the loop writes it
    p:      use a                                            load  s, [slot]
    p + 1:  ...                                              use s ... use s          one piece: a stretch of a block
    q:      add b, a                                         add b, [slot]            no piece: the row takes memory

A class is chosen by what spilling it relieves, over its uses weighted by loop depth; first only where it is outside of
the loops that name it, since it can stay in a register through these. Then, the innermost loops first, it gets a
register back wherever there is room for it: through a whole loop, else from one use to the next in a block. A class
with one definition that is a constant is made again instead of loaded.

Order at a place: what is stored after the instruction before it, then what is loaded for it, then the instruction. So
a piece that is loaded for a place is wanted from the place's reading point on, and one that is stored after a place
up to its writing point.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heapreplace
from operator import itemgetter

from .joined import Classes
from .machine import Immediate, Instruction, LabelReference, Memory, Register, VirtualRegister
from .row_facts import READ, WRITE, RowFacts, is_idiom


@dataclass(slots=True)
class Slot:
    """A place in the frame: size_bytes at [stack pointer + memory.disp], aligned to its size."""

    size_bytes: int
    memory: Memory
    points: int = 0  # where one of those that share it is wanted


@dataclass(frozen=True, slots=True, eq=False)
class Loop:
    """first, last: its places. entered: only by falling into `first`. left: only by falling out of `last`. points: all
    points of its places."""

    first: int
    last: int
    depth: int
    entered: bool
    left: bool
    points: int

    def within(self, other: Loop) -> bool:
        return other.first <= self.first and self.last <= other.last


@dataclass(slots=True, eq=False)
class Home:
    """Where a spilled class lives: in a slot, or nowhere if it is a constant that is made again.

    nodes, points: of the class. places: those that name it, in order; named: their reading points. reads, writes:
    which of them do. loops: those through which it is in a register.
    """

    kind: str
    nodes: list[int]
    points: int
    places: list[int]
    named: int
    reads: set[int]
    writes: set[int]
    slot: Slot | None
    constant: Instruction | None
    loops: list[Loop] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class Piece:
    """A stretch of the code through which what has a home is in a register.

    places: those that name it. loaded: before this place, or -1. stored: after this place, or -1. loop: which it
    covers, if it covers one. cost: of its uses.
    """

    register: VirtualRegister
    home: Home
    places: list[int]
    loaded: int
    stored: int
    loop: Loop | None
    points: int
    cost: float


class _Counts:
    """A small number for each place, as bit planes: bit 2p of plane i is bit i of the number of place p."""

    def __init__(self, numbers: Sequence[int], of: Callable[[int], int]) -> None:
        """of: what is counted, from a number."""
        counts = [of(number) for number in range(max(numbers, default=0) + 1)]
        self.planes: list[int] = []
        text = "".join(map(chr, reversed(numbers)))
        for position in range(max(counts).bit_length()):
            digits = "".join("01"[count >> position & 1] for count in counts)
            self.planes.append(int(text.translate(digits) or "0", 4))
        self._update()

    def _update(self) -> None:
        self.above_zero = 0
        for plane in self.planes:
            self.above_zero |= plane

    def add(self, points: int) -> None:
        """1 more at these points."""
        self.above_zero |= points
        for position, plane in enumerate(self.planes):
            self.planes[position] = plane ^ points
            points &= plane
            if not points:
                return
        if points:
            self.planes.append(points)

    def subtract(self, points: int) -> None:
        """1 less at these points, where it is above 0."""
        points &= self.above_zero
        for position, plane in enumerate(self.planes):
            self.planes[position] = plane ^ points
            points &= ~plane
            if not points:
                break
        self._update()


class _Room:
    """For one kind: how many registers are free at each place, and how many are lacking."""

    def __init__(self, wanted: Sequence[int], limit: int) -> None:
        self.lacking = _Counts(wanted, lambda number: max(0, number - limit))
        self.free = _Counts(wanted, lambda number: max(0, limit - number))

    def give(self, points: int) -> None:
        needed = points & self.lacking.above_zero
        self.lacking.subtract(needed)
        self.free.add(points ^ needed)

    def take(self, points: int) -> bool:
        """Take a register at all of these points, if each has one."""
        if points & ~self.free.above_zero:
            return False
        self.free.subtract(points)
        return True


@dataclass(slots=True, eq=False)
class _Part:
    """A class outside of the loops that name it, or inside one of them but outside of further ones.

    idle: the reading points where it is wanted, but not named. cost: of holding it in memory there.
    """

    loop: Loop | None
    around: _Part | None
    idle: int
    cost: float
    spilled: bool = False

    def spill(self, room: _Room) -> None:
        """This part, and those round it that are not spilled yet."""
        part: _Part | None = self
        while part is not None and not part.spilled:
            part.spilled = True
            room.give(part.idle)
            part = part.around


def _loops(classes: Classes) -> list[Loop]:
    """The loops whose blocks stand together, innermost first."""
    flow = classes.flow
    found = []
    starts = flow.block_start
    for header, inside in flow.loops.items():
        last = max(inside)
        if last - header + 1 != len(inside):
            continue
        into = {(before, block) for block in inside for before in flow.predecessors[block] if before not in inside}
        out = {(block, after) for block in inside for after in flow.successors[block] if after not in inside}
        found.append(Loop(
            starts[header], starts[last + 1] - 1, flow.depth[header],
            into == {(header - 1, header)} and not _jumps(classes, starts[header] - 1, header),
            out == {(last, last + 1)} and not _jumps(classes, starts[last + 1] - 1, last + 1),
            (1 << 2 * starts[last + 1]) - (1 << 2 * starts[header])))
    return sorted(found, key=lambda loop: (-loop.depth, loop.first))


def _jumps(classes: Classes, place: int, block: int) -> bool:
    """Whether the instruction at `place` names the label of a block, rather than only falling into it."""
    item = classes.body[place]
    if not isinstance(item, Instruction):
        return False
    names = {operand.name for operand in item.operands if type(operand) is LabelReference}
    place = classes.flow.block_start[block]
    while names and not isinstance(label := classes.body[place], Instruction):
        if label.name in names:
            return True
        place += 1
    return False


def is_constant(instruction: Instruction, facts: RowFacts) -> bool:
    """The instruction writes operand 0 only, from immediates and constants beside the code, and touches no flags."""
    if not facts.only_writes or instruction.mask is not None:
        return False
    if is_idiom(instruction, facts):
        return True
    return facts.access[0] == WRITE and all(
        type(operand) is Immediate
        or (type(operand) is Memory and operand.label is not None and operand.base is None and operand.index is None)
        for operand in instruction.operands[1:])


class Plan:
    """What is spilled so far.

    pieces: by their node, a number from that of the flow's nodes up to `next_node`. home_of: of spilled nodes. dropped:
    places whose instruction is gone. replaced: instructions that stand where others stood, and whether they are the
    same instruction still (with an operand in memory). loops: innermost first. weight: of each place.
    """

    def __init__(self, classes: Classes) -> None:
        self.classes = classes
        self.flow = classes.flow
        self.pieces: dict[int, Piece] = {}
        self.home_of: dict[int, Home] = {}
        self.slots: list[Slot] = []
        self.dropped: set[int] = set()
        self.replaced: dict[int, tuple[Instruction, bool]] = {}
        self.loops = _loops(classes)
        # For each block the loops around it that are entered in one place.
        starts = classes.flow.block_start
        self._loops_around: list[list[Loop]] = [[] for _ in starts]
        for loop in self.loops:
            if loop.entered:
                for block in range(bisect_left(starts, loop.first), bisect_left(starts, loop.last + 1)):
                    self._loops_around[block].append(loop)
        self.weight = [classes.flow.weight[block] for block in classes.block_of]
        self._even = int("01" * len(classes.body) or "0", 2)
        self._rooms: dict[int, _Room] = {}
        self.next_node = len(classes.flow.nodes)
        self._next_number = 1 + max(
            (node.number for node in classes.flow.nodes[classes.flow.physical:]), default=0)

    # --- choosing --------------------------------------------------------------------------------------------------

    def cost(self, node: int) -> float:
        """What it would cost to hold a node in memory: 1 for each place that names it, by its weight."""
        return sum(map(self.weight.__getitem__, self.classes.mentions[node]))

    def choose(self, roots: list[int]) -> dict[int, list[Loop]]:
        """Classes to spill so that no place is crowded, and the loops through which each stays in a register all the
        same. The parts of classes are taken that cost least for what they relieve; a loop's part never without the
        parts round it, which cost less.

        What a part relieves only shrinks as others are chosen, so its last known score is an upper bound: the one on
        top of the heap is the best if its score still holds (lazy greedy; Minoux, 1978).
        """
        kept: dict[int, list[Loop]] = {}
        kind_of, points = self.flow.kind_of, self.classes.points
        for kind in range(len(self.flow.kinds)):
            room = self._room(kind)
            lacking = room.lacking
            crowded = lacking.above_zero
            if not crowded:
                continue
            of_root: dict[int, list[_Part]] = {}
            queue: list[tuple[float, int, _Part]] = []  # -score, order, part
            for root in roots:
                if kind_of[root] == kind and (wanted := points[root] & crowded):
                    parts = self._parts(root, wanted)
                    if parts:
                        of_root[root] = parts
                    for part in parts:
                        relieves = part.idle & crowded
                        if relieves:
                            queue.append((-relieves.bit_count() / part.cost, len(queue), part))
            heapify(queue)
            while lacking.above_zero and queue:
                score, order, part = queue[0]
                relieves = part.idle & lacking.above_zero
                if not relieves or part.spilled:
                    heappop(queue)
                elif (now := -relieves.bit_count() / part.cost) != score:
                    heapreplace(queue, (now, order, part))
                else:
                    heappop(queue)
                    part.spill(room)
            for root, parts in of_root.items():
                if parts[0].spilled:
                    kept[root] = [part.loop for part in parts[1:]  # type: ignore[misc]
                                  if not part.spilled and part.around.spilled]  # type: ignore[union-attr]
        return kept

    def _parts(self, root: int, crowded: int) -> list[_Part]:
        """The range of a class outside of all loops that name it, then inside each of these; nothing if it relieves
        none of the places that lack a register. crowded: those of them where it is wanted."""
        classes = self.classes
        nodes = classes.of(root)
        points = classes.points[root]
        if len(nodes) == 1:
            places = classes.mentions[root]
        else:
            places = sorted({place for node in nodes for place in classes.mentions[node]})
        named = self._points_of(places)
        if not crowded & ~named:
            return []  # most registers: they live from one instruction to one near by
        idle = points & self._even & ~named
        scale = 1.0 if self._definition(nodes) is None else 0.5
        parts = [_Part(None, None, idle, scale * sum(map(self.cost, nodes)))]
        block_of = classes.block_of
        first, last = block_of[places[0]], block_of[places[-1]]
        blocks = (first,) if first == last else {block_of[place] for place in places}
        around_it = {loop for block in blocks for loop in self._loops_around[block] if points >> 2 * loop.first & 1}
        if not around_it:
            return parts
        written = [place for node in nodes for place in classes.definitions[node]]
        for loop in sorted(around_it, key=lambda loop: (loop.depth, loop.first)):
            if not self._keepable(loop, points, written):
                continue
            low, high = bisect_left(places, loop.first), bisect_right(places, loop.last)
            around = next(part for part in reversed(parts) if part.loop is None or loop.within(part.loop))
            cost = scale * sum(map(self.weight.__getitem__, places[low:high]))
            part = _Part(loop, around, around.idle & loop.points, cost)
            around.idle &= ~loop.points
            around.cost -= cost - scale * self.weight[loop.first - 1]
            parts.append(part)
        return parts

    @staticmethod
    def _keepable(loop: Loop, points: int, written: Iterable[int]) -> bool:
        """Whether what is wanted at these points can be in a register through a loop: it can be loaded before it, and
        stored after it."""
        return loop.entered and bool(points >> 2 * loop.first & 1) and (
            loop.left or not any(loop.first <= place <= loop.last for place in written))

    def _room(self, kind: int) -> _Room:
        room = self._rooms.get(kind)
        if room is None:
            limit = len(self.classes.abi.registers.get(self.flow.kinds[kind], ()))
            room = self._rooms[kind] = _Room(self.classes.ranges.pressure[kind], limit)
        return room

    def _points_of(self, places: Collection[int]) -> int:
        """The reading points of places."""
        if len(places) <= 4:
            bits = 0
            for place in places:
                bits |= 1 << 2 * place
            return bits
        found = bytearray(len(self.classes.body) // 4 + 1)
        for place in places:
            found[place >> 2] |= 1 << 2 * (place & 3)
        return int.from_bytes(found, "little")

    def _definition(self, nodes: list[int]) -> int | None:
        """Of the places that write a class, the one that makes it, if that is all and it can be made again anywhere."""
        found = None
        flow, classes = self.flow, self.classes
        for node in nodes:
            for place in classes.definitions[node]:
                if node in flow.changes[place]:
                    return None
                if place in classes.copies and flow.uses[place][0] in nodes:
                    continue  # it is copied inside the class
                item = classes.body[place]
                assert isinstance(item, Instruction)
                if found is not None or not is_constant(item, classes.facts[item.row]):
                    return None
                found = place
        return found

    # --- spilling --------------------------------------------------------------------------------------------------

    def spill(self, kept: dict[int, list[Loop]]) -> None:
        """Put classes into the frame, but for the loops given, and take pieces apart into smaller ones."""
        homes = []
        for node, loops in kept.items():
            piece = self.pieces.pop(node, None)
            if piece is None:
                homes.append(self._make_home(node))
                homes[-1].loops = loops
            elif piece.loop is not None:
                room = self._room(self.flow.kinds.index(piece.home.kind))
                room.give(piece.points & self._even & ~piece.home.named)
                self._make_stretches(piece.home, piece.places)
            else:
                for place in piece.places:
                    self._make_piece(piece.home, [place])
        for loop in self.loops:
            first, last = loop.first, loop.last
            inside = [(bisect_left(home.places, first) - count, home) for home in homes
                      if (count := bisect_right(home.places, last)) and home.places[count - 1] >= first]
            inside.sort(key=itemgetter(0))  # the most named first
            for _, home in inside:
                self._keep_through(home, loop)
        for home in homes:
            for loop in home.loops:
                low, high = bisect_left(home.places, loop.first), bisect_right(home.places, loop.last)
                if low < high:  # else only copies inside the class were there
                    self._make_piece(home, home.places[low:high], loop)
                del home.places[low:high]
            self._make_stretches(home, home.places)

    def evict(self, nodes: list[int]) -> None:
        """Spill classes that found no register, though there are enough; take pieces apart that found none."""
        for node in nodes:
            if node not in self.pieces:
                idle = self.classes.points[node] & self._even & ~self._points_of(
                    [place for member in self.classes.of(node) for place in self.classes.mentions[member]])
                self._room(self.flow.kind_of[node]).give(idle)
        self.spill({node: [] for node in nodes})

    def _make_home(self, root: int) -> Home:
        """Where a class lives from now on. Copies inside it are dropped, and the definition of a constant."""
        flow, classes = self.flow, self.classes
        nodes = classes.of(root)
        kind = flow.kinds[flow.kind_of[root]]
        points = classes.points[root]
        definition = self._definition(nodes)
        slot: Slot | None = None
        constant: Instruction | None = None
        if definition is not None:
            self.dropped.add(definition)
            constant = classes.body[definition]  # type: ignore[assignment]
        else:
            slot = self._slot(kind, max(classes.bits(node) for node in nodes), points)
        reads: set[int] = set()
        writes: set[int] = set()
        for node in nodes:
            for place in classes.mentions[node]:
                if place in classes.copies and flow.uses[place][0] in nodes and flow.writes[place][0] in nodes:
                    self.dropped.add(place)
                    continue
                if node in flow.uses[place]:
                    reads.add(place)
                if node in flow.writes[place]:
                    writes.add(place)
                if node in flow.changes[place]:
                    reads.add(place)
                    writes.add(place)
        writes.discard(-1 if definition is None else definition)
        places = sorted(reads | writes)
        home = Home(kind, nodes, points, places, self._points_of(places), reads, writes, slot, constant)
        for node in nodes:
            self.home_of[node] = home
        return home

    def _slot(self, kind: str, bits: int, points: int) -> Slot:
        """A slot that nobody else wants at these points."""
        size_bytes = max(bits, 64 if kind != "vec" else 128) // 8
        for slot in self.slots:
            if slot.size_bytes == size_bytes and not slot.points & points:
                break
        else:
            slot = Slot(size_bytes, Memory(Register(*self.classes.abi.stack_pointer)))
            self.slots.append(slot)
        slot.points |= points
        return slot

    def _keep_through(self, home: Home, loop: Loop) -> None:
        """Have it in a register through a loop that it is wanted all round, if there is room."""
        if any(map(loop.within, home.loops)) or not self._keepable(loop, home.points, home.writes):
            return
        inner = [other for other in home.loops if other.within(loop)]
        points = home.points & loop.points & self._even & ~home.named
        for other in inner:
            points &= ~other.points
        if self._room(self.flow.kinds.index(home.kind)).take(points):
            home.loops = [other for other in home.loops if other not in inner]
            home.loops.append(loop)

    def _make_stretches(self, home: Home, places: list[int]) -> None:
        """Pieces from one place to the next, in a block, as far as there is room between them."""
        block_of = self.classes.block_of
        room = self._room(self.flow.kinds.index(home.kind))
        stretch: list[int] = []
        for place in places:
            if self._store_instead(home, place):
                if stretch:
                    self._make_piece(home, stretch)
                    stretch = []
                continue
            if stretch:
                last = stretch[-1]
                between = (1 << 2 * place) - (4 << 2 * last) & self._even
                begins = place in home.writes and place not in home.reads
                if begins or block_of[last] != block_of[place] or not room.take(between):
                    self._make_piece(home, stretch)
                    stretch = []
            stretch.append(place)
        if stretch:
            self._make_piece(home, stretch)

    def _store_instead(self, home: Home, place: int) -> bool:
        """A copy to what lives in the frame is a store."""
        if place not in self.classes.copies or place in self.replaced or place not in home.writes or home.slot is None:
            return False
        item = self.classes.body[place]
        assert isinstance(item, Instruction)
        row = self.classes.abi.spill_row(home.kind, home.slot.size_bytes * 8)
        self.replaced[place] = (Instruction(row, [home.slot.memory, item.operands[1]], location=item.location,
                                            comment="spill"), False)
        return True

    def _make_piece(self, home: Home, places: list[int], loop: Loop | None = None) -> None:
        """A piece that the places given name, in one block or through a loop."""
        first, last = places[0], places[-1]
        written = [place for place in places if place in home.writes]
        if loop is not None:
            points = home.points & loop.points
            loaded = loop.first
            stored = loop.last if written and home.points >> 2 * loop.last + 2 & 1 else -1
        else:
            if len(places) == 1 and not written and self._no_register(home, first):
                return
            loaded = first if first in home.reads else -1
            stored = written[-1] if written and self._wanted_after(home, last) else -1
            points = (2 << 2 * last + (last in home.writes)) - (1 << 2 * first + (loaded < 0))
        register = VirtualRegister(home.kind, self._next_number)
        self._next_number += 1
        self.pieces[self.next_node] = Piece(
            register, home, places, loaded, stored, loop, points,
            sum(map(self.weight.__getitem__, places)))
        self.next_node += 1

    def _wanted_after(self, home: Home, place: int) -> bool:
        """Whether anyone reads it after a place, before it is written again."""
        block = self.classes.block_of[place]
        if place + 1 < self.flow.block_start[block + 1]:
            return bool(home.points >> 2 * place + 2 & 1)
        out = self.flow.live_out[block]
        return any(out >> node & 1 for node in home.nodes)

    def _no_register(self, home: Home, place: int) -> bool:
        """One read that needs no register: a copy is a load, and many rows take an operand in memory."""
        classes = self.classes
        if place in self.replaced:
            return False
        item = classes.body[place]
        assert isinstance(item, Instruction)
        facts = classes.facts[item.row]
        if place in classes.copies and self.flow.writes[place][0] not in self.home_of:
            self.replaced[place] = (self.load(home, item.operands[0], item), False)  # type: ignore[arg-type]
            return True
        if home.slot is None or any(type(operand) is Memory for operand in item.operands):
            return False
        registers = [self.flow.nodes[node] for node in home.nodes]
        at = [position for position, operand in enumerate(item.operands) if operand in registers]
        if item.mask in registers or len(at) != 1 or facts.access[at[0]] != READ \
                or is_idiom(item, facts) or classes.abi.memory_bits(item.row)[at[0]] != home.slot.size_bytes * 8:
            return False
        operands = item.operands[:]
        operands[at[0]] = home.slot.memory
        self.replaced[place] = (Instruction(item.row, operands, item.mask, item.zeroing, item.location, item.comment),
                                True)
        return True

    # --- instructions ----------------------------------------------------------------------------------------------

    def load(self, home: Home, register: VirtualRegister | Register, like: Instruction) -> Instruction:
        """What brings a value from its home into a register."""
        made = home.constant
        if made is not None:
            old = made.operands[0]
            return Instruction(made.row, [register if operand == old else operand for operand in made.operands],
                               None, made.zeroing, made.location, made.comment)
        assert home.slot is not None
        row = self.classes.abi.reload_row(home.kind, home.slot.size_bytes * 8)
        return Instruction(row, [register, home.slot.memory], location=like.location, comment="reload")

    def store(self, home: Home, register: VirtualRegister | Register, like: Instruction) -> Instruction:
        """What brings a value from a register to its home."""
        assert home.slot is not None
        row = self.classes.abi.spill_row(home.kind, home.slot.size_bytes * 8)
        return Instruction(row, [home.slot.memory, register], location=like.location, comment="spill")
