"""Nests of products of bytes in blocks, whose sums scales multiply before they are added up: for block_products.py.

Enters a tile function. Leaves the nest that it is, if it is one: parallel rows, and columns in panels of 16, around one
loop in order over blocks of the depth. Between rows and columns may stand a loop in order over groups of rows. In that
over blocks stand sums of contractions over short axes, or loops in order over a few blocks that have such sums; and
else what takes elements one by one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from ..ir.nodes import Block, Function, Op, Value
from ..ir.types import DType, TensorType, TileType, f32, i32
from ..tile.affine import affine
from ..tile.ops import memory_of
from ..tile.plan import axes_of, is_scalar_integer
from ..tile.schedule import Specialization
from ..tile.semantics import ELEMENTWISE
from . import fragments
from .places import forms_place

PANEL = 16
"""Columns of one, which are two blocks of an instruction's."""
LEAST_DEPTH = 32
"""Of a block: rows of 64 bytes."""
MOST_BLOCKS = 8
"""Of a loop inside, which is written out."""
BYTES = frozenset({"i8", "u8"})
FLOATED = frozenset({"add", "sub", "mul", "neg", "shl"})
"""What may be done with integer sums."""
NOTHING = frozenset({"whole", "index", "const", "dim", "yield"})


@dataclass(frozen=True, slots=True)
class BlockSum:
    """A sum of contractions, and of other integers. depth: of its part of a block, first: where that begins."""

    contractions: tuple[Op, ...]
    others: tuple[Value, ...]
    first: int
    depth: int


@dataclass(frozen=True, slots=True)
class BlockPart:
    """Sums of a block that have other columns of their own, by what they give. loop: of `count` blocks inside that over
    blocks, if they stand in one. depth: of one of them. rows: of the parts before, the one that has the same rows."""

    loop: Op | None
    count: int
    sums: dict[Value, BlockSum]
    depth: int
    rows: BlockPart | None = None


@dataclass(frozen=True, slots=True)
class BlockNest:
    """rows: its axis. columns: the axes of panels, and of what is in one. body: the block of the nest. loop: the one
    over blocks. floats: integers that are made of sums, as floats here. groups: the loop in order over groups of rows,
    if there is one."""

    rows: str
    columns: tuple[str, str]
    body: Block
    loop: Op
    parts: tuple[BlockPart, ...]
    floats: frozenset[Value]
    groups: Op | None = None

    @property
    def loops(self) -> list[Op]:
        """Those inside that over blocks, in order."""
        return list(dict.fromkeys(part.loop for part in self.parts if part.loop is not None))

    @property
    def sets(self) -> int:
        """Values of all rows and columns that registers hold at once."""
        return len(self.loop.results) + max((len(loop.results) for loop in self.loops), default=0)

    def part_of(self, value: Value) -> tuple[BlockPart, BlockSum] | None:
        """Where a sum stands."""
        return next(((part, part.sums[value]) for part in self.parts if value in part.sums), None)


def find_nest(function: Function, specialization: Specialization) -> BlockNest | None:
    """The nest that a function is, if it is one."""
    block = function.body
    axes: list[str] = []
    groups = None
    while True:
        control = [op for op in block.ops if op.blocks]
        if len(control) != 1 or control[0].name not in ("tiles", "each"):
            return None
        (outer,) = control
        if outer.results:
            break
        parallel = outer.attributes["parallel"]
        if any(op.name in ("store", "reduce", "contract", "buffer") for op in block.ops) or not (
                parallel or (block is not function.body and _is_of_groups(outer))):
            return None
        groups = groups if parallel else outer
        axes += outer.attributes["axes"] if outer.name == "tiles" else ()
        innermost, (block,) = outer, outer.blocks
    if len(axes) != 2 or innermost.name != "tiles" or not _is_ordered(outer):
        return None
    return _Finder(function, specialization, axes, block, outer, groups).nest()


class _Finder:
    def __init__(self, function: Function, specialization: Specialization, tiles: Sequence[str], block: Block,
                 loop: Op, groups: Op | None) -> None:
        self.function, self.specialization, self.tiles, self.block, self.loop, self.groups = (
            function, specialization, tiles, block, loop, groups)
        self.inside = [op for op in loop.blocks[0].ops if op.blocks]
        self.levels = [loop.blocks[0], *(op.blocks[0] for op in self.inside)]

    def nest(self) -> BlockNest | None:
        contractions = [op for op in self.loop.walk() if op.name == "contract"]
        if not contractions or not all(_counts(op) for op in self.inside) or any(
                op.name == "contract" for op in self.block.ops):
            return None
        axes = self._axes(contractions)
        if axes is None:
            return None
        rows, columns = axes
        self.rows = rows
        self.floats = self._floats(contractions)
        known = {rows, *columns}
        carried = [v for op in (self.loop, *self.inside) for v in op.results]
        stores = [op for op in self.block.ops if op.name == "store"]
        if not all(self._is_plain(op, known) for level in (self.block, *self.levels) for op in level.ops
                   if not op.blocks) or any(op.name == "store" for level in self.levels for op in level.ops):
            return None
        if any(set(axes_of(v)) != known for v in carried) or any(
                _dtype(v) is not f32 and v not in self.floats for v in carried) or any(
                _dtype(v) is not f32 for v in self.loop.results) or any(
                set(axes_of(op.operands[1])) != known for op in stores):
            return None
        parts: list[BlockPart] = []
        for level, loop in zip((*self.levels[1:], self.levels[0]), (*self.inside, None), strict=True):
            parts += self._parts(level, loop, parts)
        return BlockNest(rows, columns, self.block, self.loop, tuple(parts), frozenset(self.floats), self.groups)

    def _axes(self, contractions: Sequence[Op]) -> tuple[str, tuple[str, str]] | None:
        """The axis of rows, and those of columns: of panels, and of what is in one."""
        inside = {op.attributes["axis"] for op in self.block.ops if op.name == "whole"
                  and [number_of(v) for v in op.operands] == [0, PANEL]}
        found = set[tuple[str, tuple[str, str]]]()
        for op in contractions:
            over = set(op.attributes["over"])
            sides = sorted((set(axes_of(v)) - over for v in op.operands), key=len)
            if [len(side) for side in sides] != [1, 2] or not sides[0] <= set(self.tiles) or (
                    _dtype(op.result) is not i32):
                return None
            (rows,), lanes = sides[0], sides[1] & inside
            panels = sides[1] - lanes
            if len(lanes) != 1 or not panels <= set(self.tiles) - {rows}:
                return None
            found.add((rows, (panels.pop(), lanes.pop())))
            if not all(extents_of(self.function, op).values()) or not all(self._is_operand(op, v) for v in op.operands):
                return None
        return found.pop() if len(found) == 1 else None

    def _is_operand(self, contraction: Op, value: Value) -> bool:
        """Whether it is made of bytes in memory that can come as words."""
        extents = extents_of(self.function, contraction)
        if set(extents) - set(axes_of(value)) or _dtype(value).name not in BYTES:
            return False
        extents |= {axis: 1 for axis in axes_of(value) if axis not in extents}
        pending = [value]
        while pending:
            op = pending.pop().op
            if op is None:
                return False
            if op.name == "load":
                tensor, *indices = op.operands
                root = memory_of(tensor).name
                if tensor.type.dtype.bits != 8 or root not in self.specialization.aligned or (  # type: ignore[union-attr]
                        self.specialization.strides.get(root, "contiguous") != "contiguous") or any(
                        axes_of(index) and (affine(index) is None or forms_place(index, extents) is None)
                        for index in indices):
                    return False
            elif op.name in ELEMENTWISE - {"asm"} or op.name in ("full", "const"):
                pending += op.operands
            else:
                return False
        return True

    def _floats(self, contractions: Sequence[Op]) -> set[Value]:
        """Integers that are made of contractions."""
        floats = {op.result for op in contractions}
        while True:
            before = len(floats)
            for level in self.levels:
                for op in level.ops:
                    if op.name not in ("cast", "yield") and not op.blocks and floats & set(op.operands):
                        floats.update(v for v in op.results if _dtype(v) is i32)
            for loop in self.inside:
                (block,) = loop.blocks
                for number, value in enumerate(block.ops[-1].operands):
                    if value in floats:
                        floats |= {block.arguments[1 + number], loop.results[number]}
            if len(floats) == before:
                return floats

    def _is_plain(self, op: Op, axes: set[str]) -> bool:
        """Whether an op can be done on registers of sums, or makes operands."""
        if op.name in NOTHING or op.name == "contract":
            return True
        if op.name == "store":
            return all(affine(v) is not None for v in op.operands[2:])
        values = [v for v in (*op.operands, *op.results) if isinstance(v.type, TileType)]
        if any(_dtype(v).bits > 32 and _dtype(v).name != "index" for v in values):
            return False
        if self.floats & set(op.operands):
            return (op.name == "cast" and _dtype(op.result) is f32) or (
                op.name in FLOATED and (op.name != "shl" or number_of(op.operands[1]) is not None))
        if op.name == "load":
            return not set(axes_of(op.result)) <= axes or all(affine(v) is not None for v in op.operands[1:])
        return op.name in ELEMENTWISE - {"asm"} or op.name == "full"

    # Parts.

    def _parts(self, block: Block, loop: Op | None, before: Sequence[BlockPart]) -> Iterator[BlockPart]:
        """Those of a block: where the rows are those of the first sum again, another one begins."""
        count = 1 if loop is None else number_of(loop.operands[1])
        assert count is not None
        several: list[list[tuple[Value, list[Op], list[Value]]]] = []
        for found in self._sums(block):
            mine = several[-1] if several else []
            if not mine or self._meet_the_same(mine[0][1], found[1], {}):
                several.append(mine := [])
            mine.append(found)
        made: list[BlockPart] = []
        for sums in several:
            placed, first = dict[Value, BlockSum](), 0
            for value, contractions, others in sums:
                depth = sum(prod(extents_of(self.function, op).values()) for op in contractions)
                depth = -(-depth // fragments.DEPTH) * fragments.DEPTH
                placed[value] = BlockSum(tuple(contractions), tuple(others), first, depth)
                first += depth
            part = BlockPart(loop, count, placed, max(LEAST_DEPTH, 1 << (first - 1).bit_length()))
            rows = next((other for other in (*before, *made) if other.rows is None and self._has_rows_of(part, other)),
                        None)
            made.append(part if rows is None else BlockPart(loop, count, placed, part.depth, rows))
        return iter(made)

    def _sums(self, block: Block) -> Iterator[tuple[Value, list[Op], list[Value]]]:
        """Sums that begin with contractions, these, and what else they add."""
        users: dict[Value, list[Op]] = {}
        for op in block.ops:
            for v in op.operands:
                users.setdefault(v, []).append(op)
        left = [op for op in block.ops if op.name == "contract"]
        while left:
            root = left[0].result
            while len(users.get(root, [])) == 1 and self._terms(users[root][0], users) is not None:
                root = users[root][0].result
            assert root.op is not None
            found = ([left[0]], list[Value]()) if root.op is left[0] else self._terms(root.op, users)
            assert found is not None
            terms, others = found
            yield root, terms, others
            left = [op for op in left if op not in terms]

    def _terms(self, op: Op, users: Mapping[Value, Sequence[Op]]) -> tuple[list[Op], list[Value]] | None:
        """The contractions that a sum adds up, and what else, of a row; None of anything else."""
        if op.name != "add" or op.result not in self.floats:
            return None
        terms, others = list[Op](), list[Value]()
        for value in op.operands:
            if value not in self.floats:
                if not set(axes_of(value)) <= {self.rows}:
                    return None
                others.append(value)
                continue
            if value.op is None or len(users[value]) != 1:
                return None
            found = ([value.op], []) if value.op.name == "contract" else self._terms(value.op, users)
            if found is None:
                return None
            terms += found[0]
            others += found[1]
        return terms, others

    def _has_rows_of(self, part: BlockPart, other: BlockPart) -> bool:
        """Whether the rows of two parts have the same elements along the depth."""
        if part.count != other.count or len(part.sums) != len(other.sums):
            return False
        counters = {} if part.loop is None or other.loop is None else {
            part.loop.blocks[0].arguments[0]: other.loop.blocks[0].arguments[0]}
        return (part.loop is None) == (other.loop is None) and all(
            self._meet_the_same(a.contractions, b.contractions, counters)
            for a, b in zip(part.sums.values(), other.sums.values(), strict=True))

    def _meet_the_same(self, some: Sequence[Op], others: Sequence[Op], counters: Mapping[Value, Value]) -> bool:
        """Whether contractions have the same rows."""
        return len(some) == len(others) and all(
            list(extents_of(self.function, a).values()) == list(extents_of(self.function, b).values()) and _alike(
                rows_of(a, self.rows), rows_of(b, self.rows), counters,
                dict(zip(a.attributes["over"], b.attributes["over"], strict=True)))
            for a, b in zip(some, others, strict=True))


def rows_of(contraction: Op, rows: str) -> Value:
    """The operand that has the rows."""
    (operand,) = [v for v in contraction.operands if rows in axes_of(v)]
    return operand


def extents_of(function: Function, contraction: Op) -> dict[str, int]:
    """The axes that a contraction is over, with their extents; 0 of what is no number, or does not begin at 0."""
    found = dict.fromkeys(contraction.attributes["over"], 0)
    for op in function.walk():
        if op.name == "whole" and op.attributes["axis"] in found:
            start, stop = (number_of(v) for v in op.operands)
            found[op.attributes["axis"]] = stop if start == 0 and stop is not None else 0
    return found


def number_of(value: Value) -> int | None:
    """The number that a value is, if it is one."""
    op = value.op
    while op is not None and op.name in ("full", "cast"):
        op = op.operands[0].op
    return int(op.attributes["value"]) if op is not None and op.name == "const" else None


def _alike(a: Value, b: Value, counters: Mapping[Value, Value], axes: Mapping[str, str]) -> bool:
    """Whether two values are the same where counters and axes of one are those of the other."""
    if a is b or counters.get(a) is b:
        return True
    if a.op is None or b.op is None or a.op.name != b.op.name or a.op.blocks or a.type.dtype is not b.type.dtype:  # type: ignore[union-attr]
        return False
    if a.op.name == "index":
        axis = a.op.attributes["axis"]
        return bool(axes.get(axis, axis) == b.op.attributes["axis"])
    return a.op.attributes == b.op.attributes and all(
        _alike(one, other, counters, axes) for one, other in zip(a.op.operands, b.op.operands, strict=True))


def _is_ordered(loop: Op) -> bool:
    return loop.name == "each" and not loop.attributes["parallel"] and loop.attributes["count"] == 1 and \
        loop.attributes.get("step", 1) == 1 and len(loop.results) > 0


def _is_of_groups(loop: Op) -> bool:
    """Whether a loop in order around a nest computes but where a group's rows begin and end."""
    return loop.name == "each" and all(
        is_scalar_integer(v) for op in loop.blocks[0].ops if not op.blocks for v in op.results)


def _counts(loop: Op) -> bool:
    """Whether it is a loop in order over a few blocks, with none inside."""
    count = number_of(loop.operands[1])
    return _is_ordered(loop) and number_of(loop.operands[0]) == 0 and count is not None and 0 < count <= MOST_BLOCKS \
        and count & count - 1 == 0 and not any(op.blocks for op in loop.blocks[0].ops)


def _dtype(value: Value) -> DType:
    t = value.type
    assert isinstance(t, TileType | TensorType)
    return t.dtype
