"""Packed dot products -> products of small matrices, two by two.

Enters: a lane function for a target whose registers of four lanes are also matrices of two rows by two slots. Leaves:
the same function, in which loops that add dot products to sums, a vector of four columns times one slot of a row,
multiply two columns by two rows at a time. Results are the same, as a target's instruction adds two dot products to
each sum, one after the other. `low, high = zip (sum of row m, sum of row m + 1)` are the sums in the loop:

    low     (m, n) (m + 1, n)  (m, n + 1) (m + 1, n + 1)      of columns n, n + 1
    high    the same of columns n + 2, n + 3
    left    slots k, k + 1 of column n, then of n + 1:        zip of the vectors of slots k and k + 1
    right   slots k, k + 1 of row m, then of m + 1:           as memory has them, or exchanged between two rows

    %t: dot2_bf16 (%s, %v, broadcast_lane %q {lane = 0})
    %u: dot2_bf16 (%t, %w, broadcast_lane %q {lane = 1})       %low: two_by_two_bf16 (%l, zip (%v, %w).0, %q)
    %x: dot2_bf16 (%r, %v, broadcast_lane %q {lane = 2})  ->   %high: two_by_two_bf16 (%h, zip (%v, %w).1, %q)
    %y: dot2_bf16 (%x, %w, broadcast_lane %q {lane = 3})

Where the instruction wants its first operand unsigned, and the rows are, they go first, and the sums are exchanged in
place of zipped. A loop is only changed where that saves instructions.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from ..ir.nodes import Block, Function, Op, Value
from .even_odd import PASSED_BY_LOADS

PRODUCTS = {"dot2_bf16": "two_by_two_bf16", "dot4_i8i8": "two_by_two_i8i8", "dot4_u8u8": "two_by_two_u8u8",
            "dot4_u8i8": "two_by_two_u8i8"}
LANES, SLOTS = 4, 2


@dataclass(frozen=True, slots=True)
class _Step:
    """One dot product: a vector by a lane of a row. rows_first: which operand the row is."""

    op: Op
    vector: Value
    row: Value
    lane: int
    rows_first: bool


@dataclass(slots=True)
class _Chain:
    """All that is added to a sum that a loop carries, which is number `place` of these: products of one kind, of a
    vector by a row or of a row by a vector."""

    place: int
    steps: list[_Step]

    @property
    def key(self) -> tuple[object, ...]:
        """Sums of one key meet the same vectors."""
        return (self.steps[0].op.name, self.steps[0].rows_first, *(step.vector for step in self.steps))


@dataclass(slots=True)
class _Pair:
    """Sums of two rows by the same vector of columns."""

    first: _Chain
    second: _Chain

    @property
    def rows_first(self) -> bool:
        """Whether the rows are the first operand of the products: only where their kind demands it."""
        step = self.first.steps[0]
        return step.rows_first and step.op.name == "dot4_u8i8"

    def fits(self) -> bool:
        """Whether two slots at a time are two of one register for both rows, or the same two of two registers."""
        for n in range(0, len(self.first.steps), SLOTS):
            (a, b), (c, d) = self.first.steps[n:n + SLOTS], self.second.steps[n:n + SLOTS]
            lanes = (a.lane, b.lane, c.lane, d.lane)
            together = a.row is b.row is c.row is d.row and lanes == (0, 1, 2, 3)
            apart = a.row is b.row and c.row is d.row and a.row is not c.row and lanes in ((0, 1, 0, 1), (2, 3, 2, 3))
            if not together and not apart:
                return False
        return True


@dataclass(slots=True)
class _Loop:
    """A loop that is changed. made: what two values give, exchanged or zipped, by which and how."""

    op: Op
    pairs: list[_Pair]
    ops: list[Op] = field(default_factory=list)
    made: dict[tuple[str, Value, Value], list[Value]] = field(default_factory=dict)

    def instructions(self) -> int:
        """How many it takes in place of the dot products."""
        moves: set[tuple[str, Value, Value]] = set()
        count = 0
        for pair in self.pairs:
            for n in range(0, len(pair.first.steps), SLOTS):
                count += 2
                a, b, c = *pair.first.steps[n:n + SLOTS], pair.second.steps[n]
                if not _unzipped(a.vector, b.vector):
                    moves.add(("zip", a.vector, b.vector))
                if a.row is not c.row:
                    moves.add(("exchange", a.row, c.row))
        return count + 2 * len(moves)

    def move(self, name: str, first: Value, second: Value) -> list[Value]:
        """Both results of an exchange or a zip, made where they are wanted first."""
        if name == "zip" and _unzipped(first, second):
            assert first.op is not None
            return first.op.operands
        key = (name, first, second)
        if key not in self.made:
            self.ops.append(_move(name, first, second))
            self.made[key] = self.ops[-1].results
        return self.made[key]


def _move(name: str, first: Value, second: Value) -> Op:
    return Op(name, [first, second], (first.type, second.type), {"distance": 2} if name == "exchange" else {})


def _unzipped(first: Value, second: Value) -> bool:
    """Whether two values are what an unzip gives, in order."""
    return first.op is not None and first.op.name == "unzip" and first.op.results == [first, second]


def multiply_two_by_two(function: Function) -> int:
    """In place; how many loops are changed."""
    if function.attributes["lanes"] != LANES:
        return 0
    return _visit(function.body, function.count_uses())


def _visit(block: Block, uses: Counter[Value]) -> int:
    count = 0
    ops: list[Op] = []
    for op in block.ops:
        count += sum(_visit(inner, uses) for inner in op.blocks)
        found = _found(op, uses) if op.name == "loop" else None
        if found is None:
            ops.append(op)
        else:
            count += 1
            _change(found, ops)
    block.ops = ops
    return count


def _found(loop: Op, uses: Counter[Value]) -> _Loop | None:
    """What of a loop can be done two by two, if that is less than the dot products are."""
    (body,) = loop.blocks
    waiting: dict[tuple[object, ...], _Chain] = {}
    pairs = []
    for place, (carried, made) in enumerate(zip(body.arguments[1:], body.ops[-1].operands, strict=True)):
        chain = _chain(place, carried, made, uses)
        if chain is None:
            continue
        before = waiting.pop(chain.key, None)
        if before is None:
            waiting[chain.key] = chain
        elif (pair := _Pair(before, chain)).fits():
            pairs.append(pair)
        else:
            waiting[chain.key] = chain
    found = _Loop(loop, pairs)
    return found if pairs and found.instructions() < sum(2 * len(pair.first.steps) for pair in pairs) else None


def _chain(place: int, carried: Value, made: Value, uses: Counter[Value]) -> _Chain | None:
    steps: list[_Step] = []
    total = made
    while total is not carried:
        op = total.op
        if op is None or op.name not in PRODUCTS or uses[total] != 1:
            return None
        step = _step(op)
        if step is None or (steps and (op.name, step.rows_first) != (steps[0].op.name, steps[0].rows_first)):
            return None
        steps.insert(0, step)
        total = op.operands[0]
    return _Chain(place, steps) if steps and len(steps) % SLOTS == 0 and uses[carried] == 1 else None


def _step(op: Op) -> _Step | None:
    _, first, second = op.operands
    for vector, spread, rows_first in ((first, second, False), (second, first, True)):
        if spread.op is not None and spread.op.name == "broadcast_lane" and (
                vector.op is None or vector.op.name != "broadcast_lane"):
            return _Step(op, vector, spread.op.operands[0], spread.op.attributes["lane"], rows_first)
    return None


def _change(loop: _Loop, outside: list[Op]) -> None:
    """outside: what stands before the loop, to which it is added, with what stands behind it."""
    op = loop.op
    (body,) = op.blocks
    dots = {step.op for pair in loop.pairs for chain in (pair.first, pair.second) for step in chain.steps}
    at: dict[Op, list[tuple[_Pair, int]]] = {}      # the last of four dot products -> what is multiplied there
    order = {inner: n for n, inner in enumerate(body.ops)}
    for pair in loop.pairs:
        for n in range(0, len(pair.first.steps), SLOTS):
            last = max((chain.steps[n + 1].op for chain in (pair.first, pair.second)), key=order.__getitem__)
            at.setdefault(last, []).append((pair, n))
    sums = {place: body.arguments[1 + place] for pair in loop.pairs for place in (pair.first.place, pair.second.place)}
    for inner in body.ops:
        for pair, n in at.get(inner, ()):
            _multiply(loop, pair, n, sums)
        if inner not in dots:
            loop.ops.append(inner)
    ending = loop.ops[-1]
    for place, value in sums.items():
        ending.operands[place] = value
    body.ops = _loaded_late(_wanted(loop.ops))
    behind = []
    for pair in loop.pairs:
        i, j = pair.first.place, pair.second.place
        name, undone = ("exchange", "exchange") if pair.rows_first else ("zip", "unzip")
        one, other = op.operands[2 + i], op.operands[2 + j]
        if not (one is other and one.op is not None and one.op.name == "splat_const"):
            outside.append(_move(name, one, other))
            op.operands[2 + i], op.operands[2 + j] = outside[-1].results
        old = [op.results[i], op.results[j]]
        op.results[i], op.results[j] = (Value(value.type, op) for value in old)
        back = _move(undone, op.results[i], op.results[j])
        back.results = old
        for value in old:
            value.move_to(back)
        behind.append(back)
    outside += [op, *behind]


def _multiply(loop: _Loop, pair: _Pair, n: int, sums: dict[int, Value]) -> None:
    """Two slots of two rows by those of four columns."""
    a, b, c = *pair.first.steps[n:n + SLOTS], pair.second.steps[n]
    columns = loop.move("zip", a.vector, b.vector)
    rows = a.row if a.row is c.row else loop.move("exchange", a.row, c.row)[a.lane // SLOTS]
    for place, two in zip((pair.first.place, pair.second.place), columns, strict=True):
        factors = [rows, two] if pair.rows_first else [two, rows]
        made = Op(PRODUCTS[a.op.name], [sums[place], *factors], (sums[place].type,), {}, None, a.op.location)
        loop.ops.append(made)
        sums[place] = made.result


def _wanted(ops: list[Op]) -> list[Op]:
    """All but what only the dot products read."""
    uses = Counter(value for op in ops for inner in op.walk() for value in inner.operands)
    made = []
    for op in reversed(ops):
        if op.name in ("broadcast_lane", "unzip") and not any(uses[value] for value in op.results):
            uses.subtract(op.operands)
        else:
            made.append(op)
    return made[::-1]


def _loaded_late(ops: list[Op]) -> list[Op]:
    """Loads just before what reads them first: fewer registers are held."""
    made: list[Op] = []
    waiting: dict[Value, Op] = {}
    for op in ops:
        if op.name == "load":
            waiting[op.result] = op
            continue
        wanted = op.operands if op.name in PASSED_BY_LOADS else list(waiting)
        made += [waiting.pop(value) for value in dict.fromkeys(wanted) if value in waiting]
        made.append(op)
    return made
