"""Addresses that a loop computes from its counter become sums that it carries: a programmer adds to a pointer.

Enters: a lane function. Leaves: the same stores from the same values. Holds: only 64-bit scalars change, modulo 2^64.

Three steps, for loops without loops inside. `split_blocks`, before `simplify`: where a loop takes its counter apart, as
it does for memory that was copied in blocks (`k & -16`, `k & 15`), it becomes a loop over the blocks and one within
a block, in which both parts are affine. `reduce_strength`, after it: a product of the counter with a number, and what
is added to that from outside, is carried and grows by a constant. Where that leaves no reader of the counter, selection
counts down to 0, and the loop's end is two instructions. `point_at_operands`, for targets on which a multiply-add with
an index in its address is two operations: a pointer takes the place of a base and the counter, or what grows with it.

For targets that give registers themselves; the assembler of PTX does this on its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from operator import attrgetter

from ..ir.nodes import Block, Builder, Function, Op, Value
from ..ir.types import S64
from .simplify import FIRST, constant

MOST_CARRIED = 4
"""So many sums at most does a loop carry for this, each in a register of its own from start to end."""

MOST_POINTED = 2
"""And so many pointers in place of a base and an index."""

FAR = 4096
"""A pointer whose reads are all so many bytes from it begins at the first of them: long displacements are longer
instructions, or one more."""


def split_blocks(function: Function) -> int:
    """Split loops over blocks, in place; how many."""
    return sum(_split(block, op) for block, op in list(_innermost(function.body)))


def reduce_strength(function: Function) -> int:
    """Carry what is affine in a counter, in place; how many values are carried now."""
    return sum(_carry(block, op) for block, op in list(_innermost(function.body)))


def point_at_operands(function: Function, uses: int = 1) -> int:
    """Carry a pointer, in place, where what a loop reads by a base and an index that grows is an operand of a
    multiply-add, for targets on which that is two operations. uses: of how many multiply-adds an element is at most.
    How many pointers are carried now."""
    users: dict[Value, list[Op]] = {}
    for op in function.walk():
        for operand in op.operands:
            users.setdefault(operand, []).append(op)
    return sum(_point(block, op, users, uses) for block, op in list(_innermost(function.body)))


def _innermost(block: Block) -> Iterator[tuple[Block, Op]]:
    """Every loop with no loop inside, and the block that it stands in."""
    for op in block.ops:
        if op.name == "loop" and not any(map(attrgetter("blocks"), op.blocks[0].ops)):
            yield block, op
        for inner in op.blocks:
            yield from _innermost(inner)


# ---- blocks


def _split(block: Block, op: Op) -> int:
    body = op.blocks[0]
    counter = body.arguments[0]
    step: int = op.attributes["step"]
    masks = {number for inner in body.ops if inner.name == "s_and" and counter in inner.operands
             for number in map(constant, inner.operands) if number is not None}
    size = next((-mask for mask in sorted(masks) if mask < 0 and -mask - 1 in masks and -mask & -mask - 1 == 0), 0)
    if size and step % size == 0 and _is_multiple(op.operands[0], size):
        _begin_at_blocks(body, counter, size)
        return 0
    if size <= step or size % step or not _is_multiple(op.operands[0], size):
        return 0
    # Over the blocks: the same values carried, the counter of the block in place of the loop's.
    outer = Block([value.type for value in body.arguments])
    first, *carried = outer.arguments
    build = Builder(outer, op.location)
    end = build.value("s_add", [first, build.value("s_const", [], S64, value=size)], S64)
    if not _is_multiple(op.operands[1], size):
        end = build.value("s_min", [end, op.operands[1]], S64)
    within = build.add("loop", [first, end, *carried], [v.type for v in op.results], [body], **op.attributes)
    build.add("yield", list(within.results))
    offset = Op("s_sub", [counter, first], (S64,), None, None, op.location)
    for inner in body.ops:
        if inner.name == "s_and" and counter in inner.operands:
            if any(constant(operand) == -size for operand in inner.operands):
                _replace(body, inner.result, first)
            elif any(constant(operand) == size - 1 for operand in inner.operands):
                _replace(body, inner.result, offset.result)
    body.ops.insert(0, offset)
    op.blocks = [outer]
    op.attributes = {**op.attributes, "step": size}
    return 1


def _begin_at_blocks(body: Block, counter: Value, size: int) -> None:
    """The counter of a loop is always where a block begins."""
    none = Op("s_const", [], (S64,), {"value": 0}, None, None)
    for inner in body.ops:
        if inner.name == "s_and" and counter in inner.operands:
            if any(constant(operand) == -size for operand in inner.operands):
                _replace(body, inner.result, counter)
            elif any(constant(operand) == size - 1 for operand in inner.operands):
                _replace(body, inner.result, none.result)
    body.ops.insert(0, none)


def _replace(block: Block, old: Value, new: Value) -> None:
    """Read another value in all ops of a block, which have no blocks themselves."""
    for op in block.ops:
        if old in op.operands:
            op.operands = [new if operand is old else operand for operand in op.operands]


def _is_multiple(value: Value, size: int) -> bool:
    """Whether a scalar is known to be a multiple of a power of two."""
    owner = value.owner
    if isinstance(owner, Op):
        number = constant(value)
        if number is not None:
            return number % size == 0
        if owner.name in ("s_add", "s_sub"):
            return all(_is_multiple(operand, size) for operand in owner.operands)
        if owner.name in ("s_and", "s_mul"):
            return any(_is_multiple(operand, size) for operand in owner.operands)
    return False


# ---- strength


def _carry(block: Block, op: Op) -> int:
    body = op.blocks[0]
    counter = body.arguments[0]
    step: int = op.attributes["step"]
    inside = {result for inner in body.ops for result in inner.results}.union(body.arguments)
    factors = {counter: 1}  # affine in the counter -> how much it grows with it
    multiplied: set[Value] = set()  # those that take a multiplication
    for inner in body.ops:
        factor = _factor(inner, factors, inside)
        if factor is not None:
            factors[inner.result] = factor
            if inner.name in ("s_mul", "s_shl") or not multiplied.isdisjoint(inner.operands):
                multiplied.add(inner.result)
    if not multiplied:
        return 0
    read = {value for inner in body.ops for value in inner.operands
            if not inner.results or inner.results[0] not in factors}
    wanted = [value for value in factors if value in multiplied and value in read]
    if not wanted or len(wanted) > MOST_CARRIED:
        return 0
    more = _Carried(block, op)
    known: dict[Value, Value] = {counter: op.operands[0]}
    starts = [_at_start(value, known, factors, more.before) for value in wanted]
    for value, begins in zip(wanted, starts, strict=True):
        argument = more.argument(value.name)
        inside.add(argument)
        base = _only_base(body, value, inside)
        if base is not None:  # the pointer itself: neither base nor index need registers
            begins = more.before.value("s_add", [base, begins], S64)
            for inner in body.ops:
                if value in inner.operands:
                    first = FIRST[inner.name]
                    inner.operands = [*inner.operands[:first], argument, *inner.operands[first + 2 :]]
                    inner.attributes = {**inner.attributes, "indexed": False, "scale": 1}
        _address_by(argument, value, body, counter, factors[value])
        _replace(body, value, argument)
        more.carry(argument, _nearer(argument, begins, body, more.before), factors[value] * step)
    more.finish()
    return len(wanted)


def _point(block: Block, op: Op, users: dict[Value, list[Op]], uses: int) -> int:
    body = op.blocks[0]
    growing = _growing(op)
    inside = {result for inner in body.ops for result in inner.results}.union(body.arguments)
    places: dict[tuple[Value, Value, int], list[Op]] = {}
    for inner in body.ops:
        first = FIRST.get(inner.name, -1)
        if first >= 0 and inner.attributes.get("indexed") and inner.operands[first] not in inside:
            index = inner.operands[first + 1]
            if index in growing and inner.operands.count(index) == 1:
                places.setdefault((inner.operands[first], index, inner.attributes.get("scale", 1)), []).append(inner)
    wanted = {place: ops for place, ops in places.items() if any(
        inner.name in ("load", "load_splat")
        and len(users[inner.result]) <= (uses if inner.name == "load_splat" else 1)
        and all(user.name == "fma" for user in users[inner.result]) for inner in ops)}
    if not wanted or len(wanted) > MOST_POINTED:
        return 0
    more = _Carried(block, op)
    for (base, index, scale), ops in wanted.items():
        start, step = growing[index]
        argument = more.argument()
        for inner in ops:
            first = FIRST[inner.name]
            inner.operands = [*inner.operands[:first], argument, *inner.operands[first + 2:]]
            inner.attributes = {**inner.attributes, "indexed": False, "scale": 1}
        begins = base
        if constant(start) != 0:
            begins = more.before.value("s_mul", [start, more.before.value("s_const", [], S64, value=scale)], S64)
            begins = more.before.value("s_add", [base, begins], S64)
        more.carry(argument, _nearer(argument, begins, body, more.before), scale * step)
    more.finish()
    return len(wanted)


def _nearer(pointer: Value, begins: Value, body: Block, build: Builder) -> Value:
    """What a pointer begins with: `begins`, or where its first memory operand is if all of its readers are far."""
    readers = [op for op in body.ops if pointer in op.operands]
    for op in readers:
        if op.name not in FIRST or op.operands[FIRST[op.name]] is not pointer or op.operands.count(pointer) > 1:
            return begins
    offset = min((op.attributes.get("disp", 0) for op in readers), default=0) & -64
    if offset < FAR:
        return begins
    for op in readers:
        op.attributes = {**op.attributes, "disp": op.attributes["disp"] - offset}
    return build.value("s_add", [begins, build.value("s_const", [], S64, value=offset)], S64)


def _growing(op: Op) -> dict[Value, tuple[Value, int]]:
    """The counter of a loop, and what it carries that grows by a constant: what each begins with, and by how much."""
    body = op.blocks[0]
    found = {body.arguments[0]: (op.operands[0], int(op.attributes["step"]))}
    carried = body.terminator.operands if body.terminator is not None else []
    for argument, begins, grown in zip(body.arguments[1:], op.operands[2:], carried, strict=True):
        if grown.op is not None and grown.op.name == "s_add" and grown.op.operands[0] is argument:
            step = constant(grown.op.operands[1])
            if step is not None:
                found[argument] = (begins, step)
    return found


class _Carried:
    """Scalars that a loop is made to carry, each of which grows by a constant. before: builds what they begin with, in
    front of the loop."""

    def __init__(self, block: Block, loop: Op) -> None:
        body = loop.blocks[0]
        self.block = block
        self.loop = loop
        self.before = Builder(Block(), loop.location)
        self.terminator = body.ops.pop() if body.terminator is not None else Op("yield", [])
        self.grown: list[Op] = []

    def argument(self, name: str = "") -> Value:
        argument = Value(S64, self.loop.blocks[0], name)
        self.loop.blocks[0].arguments.append(argument)
        return argument

    def carry(self, argument: Value, begins: Value, step: int) -> None:
        self.loop.operands.append(begins)
        self.loop.results.append(Value(S64, self.loop))
        grows = self.before.value("s_const", [], S64, value=step)
        self.grown.append(Op("s_add", [argument, grows], (S64,), None, None, self.loop.location))

    def finish(self) -> None:
        """Put all of it in its place."""
        body = self.loop.blocks[0]
        body.ops += self.grown
        body.ops.append(Op("yield", [*self.terminator.operands, *(op.result for op in self.grown)], (), None, None,
                           self.terminator.location))
        place = self.block.ops.index(self.loop)
        self.block.ops[place:place] = self.before.block.ops


def _factor(op: Op, factors: dict[Value, int], inside: set[Value]) -> int | None:
    """How much the result of an op grows with the counter; None where it is not affine in it."""
    if op.name not in ("s_add", "s_sub", "s_mul", "s_shl"):
        return None
    a, b = op.operands
    if op.name in ("s_mul", "s_shl"):
        number = constant(b)
        if a not in factors or number is None or (op.name == "s_shl" and not 0 <= number < 63):
            return None
        return factors[a] * (number if op.name == "s_mul" else 1 << number)
    if a in factors and b not in inside:
        return factors[a]
    return factors[b] if op.name == "s_add" and b in factors and a not in inside else None


def _only_base(body: Block, value: Value, inside: set[Value]) -> Value | None:
    """The base of all memory operands that a value is the index of, if it is nothing else and they have one in common
    from outside of the loop."""
    bases: set[Value] = set()
    for op in body.ops:
        if value in op.operands:
            first = FIRST.get(op.name, -1)
            if (first < 0 or not op.attributes.get("indexed") or op.attributes.get("scale", 1) != 1
                    or op.operands.count(value) > 1 or op.operands[first + 1] is not value):
                return None
            bases.add(op.operands[first])
    base = bases.pop() if len(bases) == 1 else None
    return None if base in inside else base


def _address_by(pointer: Value, value: Value, body: Block, counter: Value, factor: int) -> None:
    """Memory operands that count from a base by the counter, read by the pointer to the same place."""
    assert value.op is not None
    if value.op.name != "s_add":
        return
    a, b = value.op.operands
    for base, offset in ((a, b), (b, a)):
        if offset.op is None or offset.op.name not in ("s_mul", "s_shl") or offset.op.operands[0] is not counter:
            continue
        for op in body.ops:
            first = FIRST.get(op.name, -1)
            if first >= 0 and op.attributes.get("indexed") and op.operands[first] is base \
                    and op.operands[first + 1] is counter and op.attributes.get("scale", 1) == factor:
                op.operands = [*op.operands[:first], pointer, *op.operands[first + 2:]]
                op.attributes = {**op.attributes, "indexed": False, "scale": 1}


def _at_start(value: Value, known: dict[Value, Value], factors: dict[Value, int], build: Builder) -> Value:
    """What an affine value is in the first turn."""
    if value not in factors:
        number = constant(value)  # which may stand in the loop
        return value if number is None else build.value("s_const", [], S64, value=number)
    found = known.get(value)
    if found is None:
        assert value.op is not None
        a, b = (_at_start(operand, known, factors, build) for operand in value.op.operands)
        name = value.op.name
        if (name == "s_sub" and a is b) or (name in ("s_mul", "s_shl") and constant(a) == 0) \
                or (name == "s_mul" and constant(b) == 0):
            found = build.value("s_const", [], S64, value=0)
        elif name == "s_add" and 0 in (constant(a), constant(b)):
            found = b if constant(a) == 0 else a
        else:
            found = build.value(name, [a, b], S64)
        known[value] = found
    return found
