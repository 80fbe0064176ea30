"""Places `sync_lanes` for targets whose lanes are threads: each has its own view of memory.

Enters: a lane function, simplified. Leaves: the same with `sync_lanes` ops. Holds: between two accesses that may touch
the same bytes from different lanes, one of them a store, there is a `sync_lanes` (or a meeting of more than the lanes)
on every path; where a loop's accesses wait for what lies before the loop, it stands before the loop.

What may touch the same bytes: accesses of one tensor, or of scratch memory; of two tensors too, since a call may pass
one tensor as both (`in_place`). Rows that start at the same place, modulo the bytes of a row, meet lane by lane: the
same lane has each element in both. That is read off the address, a sum of products modulo those bytes:
  - a product by a stride that is known only at run time counts as 0: where two accesses meet, their indices are equal,
    and so are these products;
  - a loop's counter is its start where its step is a whole number of rows.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..ir.nodes import Block, Function, Op, Value
from .ops import ADDRESS_AT

READS = frozenset({"load", "load_run", "load_splat", "gather", "s_load"})
WRITES = frozenset({"store", "store_run", "store_lane0", "scatter", "s_store", "join"})
SCRATCH, NEAR = "scratch", "near memory"
UNKNOWN = "?"
MEETINGS = frozenset({"barrier", "sync_lanes", "sync_warps", "sync_cluster", "hand_over", "take_over"})


@dataclass(frozen=True, slots=True)
class Touch:
    """An access. memory: a tensor's name, SCRATCH, NEAR or UNKNOWN. row: where every lane takes its own element of a
    row, the bytes of a lane and where the row starts, modulo the row; None where lanes reach over, or where it
    starts is not known. disjoint: a store that meets no other such store. joins: it is one step with others of its
    kind."""

    memory: str
    stores: bool
    row: tuple[object, ...] | None
    disjoint: bool = False
    joins: bool = False


Pending = frozenset[Touch]
"""Accesses since the last synchronisation, on any path."""


def bytes_of_lane(op: Op) -> int:
    """What each lane reads or writes."""
    run = len(op.results) if op.name == "load_run" else len(values_of_run(op)) if op.name == "store_run" else 1
    size: int = op.attributes["dtype"].size_bytes
    return run * size


def values_of_run(op: Op) -> list[Value]:
    """What a store_run stores: operands between its address and its mask."""
    end = len(op.operands) - bool(op.attributes.get("masked"))
    return op.operands[1 + bool(op.attributes.get("gathered")):end]


def is_consecutive(join: Op) -> bool:
    """Whether a store that joins has a row of neighbours."""
    made = join.operands[2].op
    factors = [] if made is None or made.name != "mul" else [v.op for v in made.operands]
    size = join.attributes["dtype"].size_bytes
    return {f.name: f.attributes.get("value") for f in factors if f is not None} == {"iota": None, "splat_const": size}


def conflict(a: Touch, b: Touch) -> bool:
    """Whether two accesses, in either order, may meet in the same bytes from different lanes."""
    if not (a.stores or b.stores):
        return False
    if (a.row is not None and a.row == b.row) or (a.disjoint and b.disjoint) or (
            a.joins and b.joins):
        return False
    memories = {a.memory, b.memory}
    return len(memories) == 1 or UNKNOWN in memories or not memories & {SCRATCH, NEAR}


class Accesses:
    """What the memory ops of a function touch."""

    def __init__(self, function: Function) -> None:
        self.slots: list[str] = list(function.attributes["slots"])
        self.lanes: int = function.attributes["lanes"]
        self.memories: dict[Value, frozenset[str]] = {}
        self.loops = {op.blocks[0]: op for op in function.walk() if op.name in ("loop", "tasks")}
        self.fixed: dict[Value, bool] = {}
        self.touches: dict[Op, Touch | None] = {}
        self.numbers: dict[object, int] = {}

    def of(self, op: Op) -> Touch | None:
        """What an op touches, or None if it is no access."""
        if op not in self.touches:
            self.touches[op] = self._of(op) if op.name in READS or op.name in WRITES else None
        return self.touches[op]

    def _of(self, op: Op) -> Touch:
        found = self.memory(op.operands[ADDRESS_AT[op.name]])
        rows = is_consecutive(op) if op.name == "join" else (
            op.name in ("load", "load_run", "store", "store_run") and not op.attributes.get("gathered"))
        row = self.row(op) if rows else None
        return Touch(next(iter(found)) if len(found) == 1 else UNKNOWN, op.name in WRITES, row,
                     bool(op.attributes.get("disjoint")), op.name == "join")

    def memory(self, value: Value) -> frozenset[str]:
        """The memories whose addresses are summands of a scalar."""
        known = self.memories.get(value)
        if known is None:
            known = self.memories[value] = self._memory(value)
        return known

    def _memory(self, value: Value) -> frozenset[str]:
        op = value.op
        if op is None:
            return frozenset()
        if op.name == "near_memory":
            return frozenset({NEAR})
        if op.name == "arg":
            slot = op.attributes["slot"]
            if slot == 0:
                return frozenset({SCRATCH})
            name, _, kind = self.slots[slot - 3].partition(".") if slot >= 3 else ("", "", "")
            return frozenset({name}) if kind == "data" else frozenset()
        if op.name in ("s_load", "lane0") or op.blocks:
            return frozenset()
        return frozenset[str]().union(*(self.memory(v) for v in op.operands))

    # Where a row starts.

    def row(self, op: Op) -> tuple[object, ...] | None:
        size = bytes_of_lane(op)
        modulus = size * self.lanes
        at = ADDRESS_AT[op.name]
        terms = [(op.operands[at], 1)]
        if op.attributes.get("indexed"):
            terms.append((op.operands[at + 1], op.attributes.get("scale", 1)))
        form: dict[object, int] = {}
        if not all(self.expand(value, factor, modulus, form) for value, factor in terms):
            return None
        start = (form.pop(None, 0) + op.attributes.get("disp", 0)) % modulus
        atoms = sorted((self.numbers.setdefault(atom, len(self.numbers)), n % modulus)
                       for atom, n in form.items() if n % modulus)
        return size, start, tuple(atoms)

    def expand(self, value: Value, factor: int, modulus: int, form: dict[object, int]) -> bool:
        """Add value * factor to a sum (atom -> factor, None: the constant); False if it can't be told."""
        if factor % modulus == 0:
            return True
        op = value.op
        if op is None:
            loop = self.loops.get(value.owner)  # type: ignore[arg-type]
            if loop is None or loop.name == "tasks" or value is not loop.blocks[0].arguments[0] \
                    or loop.attributes["step"] * factor % modulus:
                return False
            return self.expand(loop.operands[0], factor, modulus, form)
        name = op.name
        if name == "s_const":
            form[None] = form.get(None, 0) + op.attributes["value"] * factor
            return True
        if name == "s_add":
            return all(self.expand(v, factor, modulus, form) for v in op.operands)
        if name == "s_sub":
            a, b = op.operands
            if self.is_rest(b, a, factor, modulus):
                return True
            return self.expand(a, factor, modulus, form) and self.expand(b, -factor, modulus, form)
        if name in ("s_mul", "s_shl"):
            for number, other in ((op.operands[1], op.operands[0]), (op.operands[0], op.operands[1])):
                if number.op is not None and number.op.name == "s_const" \
                        and (name == "s_mul" or number is op.operands[1]):
                    by = number.op.attributes["value"]
                    return self.expand(other, factor * (by if name == "s_mul" else 1 << by), modulus, form)
            if name == "s_mul" and any(self.is_fixed(v) for v in op.operands):
                return True
        if name == "arg" and op.attributes["slot"] >= 3 and self.slots[op.attributes["slot"] - 3].endswith(".data"):
            return True         # every tensor starts where it starts
        if not self.is_fixed(value):
            return False
        form[value] = form.get(value, 0) + factor
        return True

    @staticmethod
    def is_rest(rest: Value, whole: Value, factor: int, modulus: int) -> bool:
        """Whether `rest` is `whole` modulo a number that makes whole - rest a whole number of rows."""
        op = rest.op
        if op is None or op.name not in ("s_and", "s_mod") or op.operands[0] is not whole:
            return False
        number = op.operands[1].op
        if number is None or number.name != "s_const":
            return False
        divisor = number.attributes["value"] + (op.name == "s_and")
        return bool((op.name == "s_mod" or divisor & (divisor - 1) == 0) and divisor * factor % modulus == 0)

    def is_fixed(self, value: Value) -> bool:
        """Whether a scalar is made of arguments and constants only: the same wherever it is used."""
        known = self.fixed.get(value)
        if known is None:
            op = value.op
            known = op is not None and not op.blocks \
                and op.name not in ("s_load", "lane0", "mask_any", "mask_all") and all(map(self.is_fixed, op.operands))
            self.fixed[value] = known
        return known


class _Placement:
    def __init__(self, accesses: Accesses) -> None:
        self.accesses = accesses
        self.inside: dict[Block, frozenset[Touch]] = {}
        self.done: dict[tuple[Block, Pending], Pending] = {}

    def touches(self, block: Block) -> frozenset[Touch]:
        """All accesses of a block, those of nested blocks included."""
        if block not in self.inside:
            own = {touch for op in block.ops if (touch := self.accesses.of(op)) is not None}
            deeper = [self.touches(nested) for op in block.ops for nested in op.blocks]
            self.inside[block] = frozenset(own.union(*deeper))
        return self.inside[block]

    def block(self, block: Block, pending: Pending, place: bool) -> Pending:
        """What is pending after the block; places the ops only when told to."""
        if not place and (block, pending) in self.done:
            return self.done[block, pending]
        before = pending
        ops: list[Op] = []
        for op in block.ops:
            touch = self.accesses.of(op)
            if touch is not None:
                if any(conflict(touch, earlier) for earlier in pending):
                    ops.append(_sync(op))
                    pending = frozenset()
                pending |= {touch}
            elif op.name in MEETINGS:
                pending = frozenset()
            elif op.blocks:
                inside = [touch for nested in op.blocks for touch in self.touches(nested)]
                if any(conflict(a, b) for a in inside for b in pending):
                    ops.append(_sync(op))
                    pending = frozenset()
                pending = self.nested(op, pending, place)
            ops.append(op)
        if place:
            block.ops[:] = ops
        self.done[block, before] = pending
        return pending

    def nested(self, op: Op, pending: Pending, place: bool) -> Pending:
        if op.name == "if":
            return frozenset().union(*(self.block(nested, pending, place) for nested in op.blocks))
        # A loop: what a round leaves pending, the next one finds.
        while True:
            after = pending | self.block(op.blocks[0], pending, False)
            if after == pending:
                break
            pending = after
        if place:
            self.block(op.blocks[0], pending, True)
        return pending


def _sync(before: Op) -> Op:
    return Op("sync_lanes", [], (), {}, None, before.location)


def synchronise(function: Function) -> None:
    """Place the ops, in the function itself."""
    _Placement(Accesses(function)).block(function.body, frozenset(), True)


def unsynchronised(function: Function) -> list[tuple[Op, Op]]:
    """Pairs of accesses that may meet in the same bytes with no synchronisation between them on some path.

    Knows nothing of how they were placed: it follows every path of the function's flow from each access.
    """
    accesses = Accesses(function)
    following: dict[int, list[int]] = {}
    points: list[Op | None] = []

    def point(op: Op | None, before: list[int]) -> list[int]:
        number = len(points)
        points.append(op)
        for other in before:
            following.setdefault(other, []).append(number)
        return [number]

    def flow(block: Block, before: list[int]) -> list[int]:
        for op in block.ops:
            if op.name == "if":
                before = [end for nested in op.blocks for end in flow(nested, before)]
            elif op.blocks:
                head = point(None, before)
                for end in flow(op.blocks[0], head):
                    following.setdefault(end, []).append(head[0])
                before = head
            elif accesses.of(op) is not None or op.name in MEETINGS:
                before = point(op, before)
        return before

    flow(function.body, point(None, []))
    found = []
    for start, op in enumerate(points):
        touch = accesses.of(op) if op is not None else None
        if op is None or touch is None:
            continue
        stack, seen = list(following.get(start, ())), set()
        while stack:
            number = stack.pop()
            if number in seen:
                continue
            seen.add(number)
            other = points[number]
            if other is not None:
                if other.name in MEETINGS:
                    continue
                met = accesses.of(other)
                if met is not None and conflict(touch, met):
                    found.append((op, other))
            stack += following.get(number, ())
    return found
