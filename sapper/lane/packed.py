"""Contractions on packed dot products: a slot of a register holds several elements of the contracted axis.

Enters a walk that contracts narrow operands, on a target that has a dot product for them (`Facts.dots`); leaves rows of
slots, which the loops, the staging and the sums of sapper/lane/walk.py take like any others. `vdpbf16ps` is thereby a
matrix instruction of 1 x lanes x 2, `vpdpbusd` one of 1 x lanes x 4.

What holds while a walk is packed: its contracted axis (the depth) is open in slots, counted from where the walk begins,
so that a step, a tail or a mask of that axis is one of slots. Elements that fill no slot are left to plain products.

An operand may be computed from what is loaded, by operations that leave every bit in its element or are cut there (and,
or, xor, not, shifts of u8): they are done on whole slots. So unpacking 4-bit weights costs a shift and a mask for 64 of
them, and not one for each. Of several contracted axes the one along which slots lie is packed; the others are loops.

`vpdpbusd` multiplies u8 by i8. Where both operands are i8, or both u8, one of them is *turned*: the highest bit of each
element is inverted, which moves it by 128 into the other type. The sum is then off by 128 times that of the other
operand's elements, which a second dot product finds. All sums wrap, so the result is exact for all inputs. Where there
is no such instruction nothing is turned: bytes are widened before they are multiplied (split_dots.py), of any sign.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from ..ir.nodes import Function, Op, Value
from ..ir.types import FLOAT8, ROW_B32, ROW_I32, DType, TileType, b32, bf16, f32, i8, i16, i32, u8
from ..tile.affine import affine
from ..tile.ops import memory_of
from ..tile.plan import axes_of
from ..tile.schedule import Facts, Panels
from .joined_rows import JoinedRows
from .rows import LoweringError
from .split_dots import BYTE_DOTS
from .state import Access, Open, element_bytes, row_dtype


@dataclass(frozen=True, slots=True)
class Dot:
    """A packed dot product. name: the lane op. elements: of a slot, per operand. result: of the accumulator's rows."""

    name: str
    elements: int
    dtypes: tuple[DType, ...]
    result: DType


def _byte_dot(first: Value, second: Value) -> str:
    """The lane op that multiplies bytes of two operands as they are."""
    dtypes = tuple(v.type.dtype for v in (first, second))  # type: ignore[union-attr]
    return next(name for name, known in BYTE_DOTS.items() if known == dtypes)


SLOTWISE = ("and", "or", "xor", "not", "shl", "shr")
"""Ops on narrow integers that can be done on whole slots."""


def constant_behind(value: Value) -> int | None:
    """The integer that every element of a value is, if it is a constant."""
    while value.op is not None and value.op.name in ("full", "cast"):
        value = value.op.operands[0]
    return int(value.op.attributes["value"]) if value.op is not None and value.op.name == "const" else None


def possible_bits(value: Value, known: dict[Value, int] | None = None) -> int:
    """The bits that an element of a value, computed from bytes on slots, may have. known: of values looked at before,
    as several ops may read one."""
    known = {} if known is None else known
    op = value.op
    if value not in known:
        if op is None or op.name not in ("and", "or", "xor", "shl", "shr"):
            return 0xFF
        left, right = (possible_bits(v, known) if (n := constant_behind(v)) is None else n & 0xFF for v in op.operands)
        known[value] = (left & right if op.name == "and" else left | right if op.name in ("or", "xor")
                        else left >> right if op.name == "shr" else left << right & 0xFF)
    return known[value]


def slot_loads(value: Value) -> list[Op] | None:
    """The loads that an operand is computed from on slots, each once: itself, or by `SLOTWISE` ops from bytes; else
    None."""
    found: dict[Op, None] = {}
    waiting, seen = [value], {value}
    while waiting:
        one = waiting.pop()
        if one.op is not None and one.op.name == "load":
            found[one.op] = None
            continue
        operands = _slot_operands(one)
        if operands is None:
            return None
        waiting += [v for v in reversed(operands) if v not in seen]
        seen.update(operands)
    return list(found)


def _slot_operands(value: Value) -> list[Value] | None:
    """What a value is made of by an op that is done on slots of bytes; None if it is by no such op."""
    op, dtype = value.op, value.type.dtype  # type: ignore[union-attr]
    if op is None or dtype not in (i8, u8):
        return None
    if op.name == "cast" and op.operands[0].type.dtype in (i8, u8):  # type: ignore[union-attr]
        return op.operands[:1]
    if op.name not in SLOTWISE or (op.name == "shr" and dtype is i8):
        return None
    if op.name in ("shl", "shr"):
        amount = constant_behind(op.operands[1])
        return op.operands[:1] if amount is not None and 0 <= amount < 8 else None
    return [v for v in op.operands if constant_behind(v) is None]


def load_behind(value: Value) -> Op | None:
    """The load that an operand of a contraction is, but for casts."""
    while value.op is not None and value.op.name == "cast":
        value = value.op.operands[0]
    return value.op if value.op is not None and value.op.name == "load" else None


DOT2_BF16 = Dot("dot2_bf16", 2, (bf16,), f32)
FMA2_BF16 = Dot("fma2_bf16", 2, (bf16,), f32)
"""No instruction of any target: it serves where slots are what memory holds, and saves nothing where they are made."""
DOTS = (Dot("dot4_u8i8", 4, (u8, i8), i32), DOT2_BF16, FMA2_BF16)

@dataclass(frozen=True, slots=True)
class Term:
    """One contraction. first: which of its operands is the dot product's first, of u8. turned: which one is turned."""

    first: int = 0
    turned: int | None = None


@dataclass(slots=True)
class Packing:
    """How a walk is packed. depth: the contracted axis along which slots lie. reduced: all contracted axes. elements:
    how the depth is open in elements. padded: a last slot that is not full holds zeros in all operands, and is taken
    like any other. turned: the operands that some contraction turns, and so all that read them (sapper/lane/model.py).
    """

    dot: Dot
    depth: str
    reduced: tuple[str, ...]
    elements: Open
    padded: bool = False
    terms: dict[Op, Term] = field(default_factory=dict)
    turned: frozenset[Value] = field(init=False)

    def __post_init__(self) -> None:
        self.turned = frozenset(op.operands[term.turned] for op, term in self.terms.items() if term.turned is not None)


class PackedRows(JoinedRows):
    """Rows of slots. packing: of the walk that is being emitted, or None where its rows hold elements. in_rest: those
    are of what fills no slot."""

    packing: Packing | None = None
    in_rest = False

    @property
    def slot_elements(self) -> int:
        """How many coordinates of the contracted axis a lane of a row of an operand holds."""
        return 1 if self.packing is None else self.packing.dot.elements

    @contextmanager
    def packed(self, packing: Packing | None) -> Iterator[None]:
        """Within, the depth is open in slots."""
        if packing is None:
            yield
            return
        outer = self.open[packing.depth]
        o, size = packing.elements, packing.dot.elements
        extent = self.ceil_div(o.extent, size) if packing.padded else self.scalar("s_floordiv", o.extent, size)
        self.packing = packing
        self.open[packing.depth] = Open(0, extent, max(1, o.hint // size), max(1, o.divisor // size), o.capacity)
        yield
        self.packing, self.open[packing.depth] = None, outer

    @contextmanager
    def unpacked(self) -> Iterator[None]:
        """Within a packed walk, the depth is open in elements."""
        packing = self.packing
        assert packing is not None
        slots = self.open[packing.depth]
        self.packing, self.open[packing.depth] = None, packing.elements
        yield
        self.packing, self.open[packing.depth] = packing, slots

    @contextmanager
    def rest_of_depth(self) -> Iterator[bool]:
        """Within, the depth is open in elements, to those that fill no slot. Gives whether there may be any."""
        packing = self.packing
        assert packing is not None
        o = packing.elements
        rest = self.scalar("s_mod", o.extent, packing.dot.elements)
        if packing.padded or rest == 0 or o.divisor % packing.dot.elements == 0:
            yield False
            return
        slots, staged = self.open[packing.depth], self.staged
        start = self.add(o.offset, self.sub(o.extent, rest))
        self.packing, self.in_rest = None, True
        self.staged = {op: memory.rest(start) for op, memory in staged.items() if memory.in_place}
        self.open[packing.depth] = Open(start, rest, 1, origin=o.offset)
        yield True
        self.packing, self.in_rest, self.staged, self.open[packing.depth] = packing, False, staged, slots

    # Rows.

    def operand_row(self, op: Op, at: dict[str, int]) -> Value:
        """The row of a load that a contraction reads: of slots where the walk is packed. An axis that a nest holds at
        one coordinate may be missing in `at`."""
        at = {**dict.fromkeys(axes_of(op.result), 0), **at}
        if self.packing is None:
            return self.row(op.result, at)
        return self.slot_row(op.result, at, op.result in self.packing.turned)

    def operand_dtype(self, op: Op) -> DType:
        """The element type of the rows that `operand_row` gives."""
        return row_dtype(op.result.type.dtype) if self.packing is None else b32  # type: ignore[union-attr]

    def operand_access(self, op: Op) -> Access:
        """Where the elements of a load lie; packed, its slots, if it is contiguous along the depth."""
        access = self.access(op)
        if self.packing is None:
            return access
        depth, offset, size = self.packing.depth, self.packing.elements.offset, self.packing.dot.elements
        memo = self.levels[-1].memo
        key = ("slots of", op, depth, offset, size)
        found: Access | None = memo.get(key)
        if found is None:
            step = access.axes[depth]
            base = self.add(access.base, self.mul(step, offset))
            found = memo[key] = Access(base, access.disp, {**access.axes, depth: self.mul(step, size)}, b32)
        return found

    def slot_row(self, value: Value, at: dict[str, int], turned: bool) -> Value:
        """A row of slots of an operand, for slot at[depth] of the depth."""
        op = value.op
        assert op is not None
        axes = value.type.axes  # type: ignore[union-attr]
        level = self.level_of(value)
        memo = self.levels[level].memo
        key = ("slots", value, tuple([at[a] for a in axes]), turned)
        found: Value | None = memo.get(key)
        if found is None:
            outer_location, self.location = self.location, op.location or self.location
            staged = self.staged.get(op)
            if staged is not None:
                row = staged.load(at, level)
            elif op.name == "load":
                row = self._fetch_slots(op, at, level)
            else:
                row = self._slotwise(op, at, level)
            if turned and staged is None:
                row = self._bits(level, "xor", row, self.turning_row())
            found = memo[key] = row
            self.location = outer_location
        return found

    def _slotwise(self, op: Op, at: dict[str, int], level: int) -> Value:
        """An elementwise op on bytes, done on slots of four."""
        if op.name in ("shl", "shr"):
            return self._shifted(op, at, level, 0xFF)
        numbers = [constant_behind(operand) for operand in op.operands]
        if op.name == "and" and None in numbers and numbers != [None, None]:
            value, kept = (op.operands[numbers.index(None)], next(n for n in numbers if n is not None) & 0xFF)
            if value.op is not None and value.op.name in ("shl", "shr") and value not in self.rows:
                return self._shifted(value.op, at, level, kept)
        rows = [self.slot_row(operand, at, False) if number is None else number
                for operand, number in zip(op.operands, numbers, strict=True)]
        if op.name == "cast":
            return rows[0]  # type: ignore[return-value]  # between i8 and u8: the same bits
        if op.name == "not":
            return self._bits(level, "xor", rows[0], 0xFF)
        return self._bits(level, op.name, *rows)

    def _shifted(self, op: Op, at: dict[str, int], level: int, kept: int) -> Value:
        """A shift of bytes, and of these the bits `kept`: what came from a neighbour is cut off, where there is any."""
        row, amount = self.slot_row(op.operands[0], at, False), constant_behind(op.operands[1])
        assert amount is not None
        bits = possible_bits(op.operands[0])
        if amount:
            integers = self.emit(level, "bitcast", [row], ROW_I32)
            moved = self.emit(level, op.name, [integers], ROW_I32, amount=amount)
            row = self.emit(level, "bitcast", [moved], ROW_B32)
        within = bits >> amount if op.name == "shr" else bits << amount & 0xFF
        strays = bits & (1 << amount) - 1 if op.name == "shr" else bits << amount & ~0xFF
        return row if within & ~kept == 0 and not strays else self._bits(level, "and", row, kept & within)

    def _bits(self, level: int, name: str, left: Value | int, right: Value | int) -> Value:
        """and, or, xor of rows of slots; a number is that of each byte."""
        rows = [self.bytes_row(side) if isinstance(side, int) else side for side in (left, right)]
        return self.emit(level, name, rows, ROW_B32)

    def bytes_row(self, number: int) -> Value:
        """The low 8 bits of a number in every byte."""
        number = (number & 0xFF) * 0x01010101
        memo = self.levels[0].memo
        key = ("bytes", number)
        if key not in memo:
            signed = number - (1 << 32) if number >> 31 else number
            memo[key] = self.emit(0, "bitcast", [self.constant(signed, i32)], ROW_B32)
        found: Value = memo[key]
        return found

    def turning_row(self) -> Value:
        """The highest bit of every byte: as four u8 128, as four i8 -128."""
        return self.bytes_row(0x80)

    def _fetch_slots(self, op: Op, at: dict[str, int], level: int) -> Value:
        assert self.packing is not None
        access = self.access(op)
        slots = self.operand_access(op)
        t = op.result.type
        assert isinstance(t, TileType)
        step = access.axes[self.packing.depth]
        size = element_bytes(access.dtype)
        mask = self.lane_mask(t.axes)
        if step == size:
            return self.fetch_row(slots, b32, at, level, mask)
        # The elements of a slot lie apart: rows of them, joined.
        lane = next((a for a in t.axes if self.bound[a].lane), None)
        if (size == 2 or self.facts.interleaves) and mask is None and lane is not None and (
                self.bound[lane].count % self.slot_elements == 0 and slots.axes.get(lane) == size):
            return self._interleaved(op, lane, at, level)
        joined: Value | None = None
        for number in range(self.slot_elements):
            row = self.fetch_row(self.neighbour(op, number), i32, at, level, mask)
            bits = 8 * size * number
            if bits:
                row = self.emit(level, "shl", [row], ROW_I32, amount=bits)
            elif size == 2:
                row = self.emit(level, "and", [row, self.constant(0xFFFF, i32)], ROW_I32)
            joined = row if joined is None else self.emit(level, "or", [joined, row], ROW_I32)
        assert joined is not None
        return self.emit(level, "bitcast", [joined], ROW_B32)

    def neighbour(self, op: Op, number: int) -> Access:
        """Where element `number` of each slot of a load lies, if those of a slot are apart."""
        assert self.packing is not None
        slots, access = self.operand_access(op), self.access(op)
        step = access.axes[self.packing.depth]
        part = Access(slots.base, slots.disp, slots.axes, u8 if element_bytes(access.dtype) == 1 else i16)
        if isinstance(step, int):
            part.disp += step * number
        else:
            part.base = self.add(slots.base, self.mul(step, number))
        return part

    def _interleaved(self, op: Op, lane: str, at: dict[str, int], level: int) -> Value:
        """The same of as many vectors as a slot has elements: one of each neighbour give as many rows of slots."""
        count = self.slot_elements
        first = {**at, lane: at[lane] // count * count}
        memo = self.levels[level].memo
        key = ("interleaved", op, tuple(first.items()))
        if key not in memo:
            rows = []
            for number in range(count):
                operands, attributes = self.address(self.neighbour(op, number), first)
                rows.append(self.emit(level, "load", operands, ROW_B32, dtype=b32, masked=False, **attributes))
            memo[key] = self.emit_rows(level, "interleave", rows, {})
        found: Value = memo[key][at[lane] % count]
        return found

    def rows_at_once(self, reductions: list[Op]) -> int:
        """How many rows of a narrow operand of these contractions are best read together."""
        loads = [load for op in reductions for value in op.operands if (load := load_behind(value)) is not None]
        return self.facts.float8_rows if any(op.result.type.dtype in FLOAT8 for op in loads) else 1  # type: ignore[union-attr]

    def kept_slots(self, value: Value, at: dict[str, int]) -> Value:
        raise NotImplementedError("sapper/lane/slots.py reads what it keeps")

    # Sums.

    def dot(self, contraction: Op, at: dict[str, int], total: Value) -> Value:
        """total + the products of the slots at these coordinates."""
        assert self.packing is not None
        term = self.packing.terms[contraction]
        rows = []
        for operand in contraction.operands:
            rows.append(self.kept_slots(operand, at) if operand in self.slot_axes
                        else self.slot_row(operand, at, operand in self.packing.turned))
        name = self.packing.dot.name
        if name == "dot4_u8i8" and term.turned is None:
            name = _byte_dot(contraction.operands[term.first], contraction.operands[1 - term.first])
        return self.emit(self.depth, name, [total, rows[term.first], rows[1 - term.first]], total.type)

    def straight_operand(self, contraction: Op) -> Value | None:
        """The operand whose elements, summed, say how far off the products with the turned one are."""
        if self.packing is None or self.packing.terms[contraction].turned is None:
            return None
        return contraction.operands[1 - self.packing.terms[contraction].turned]  # type: ignore[operator]

    def add_error(self, row: Value, first: bool, total: Value) -> Value:
        """total + what products of the slots of a row with turned ones are too large by. first: the row is of u8."""
        rows = [row, self.turning_row()]
        return self.emit(self.depth, "dot4_u8i8", [total, *(rows if first else rows[::-1])], ROW_I32)



# Tensors that are packed once.

PANEL_VECTORS = 2
"""Width of a panel: as many vectors of the lane axis as the model takes for a contraction (sapper/lane/model.py)."""


def panels_for(function: Function, name: str, facts: Facts) -> Panels:
    """How a tensor of a canonical tile IR function lies best for the contractions that read it.

    Raises LoweringError where it is no matrix, something else than a contraction reads it, or it is stored to.
    """
    found: set[Panels] = set()
    reached = [op for op in function.walk() if op.name in ("load", "store") and memory_of(op.operands[0]).name == name]
    if any(op.name == "store" for op in reached):
        raise LoweringError(f"tensor {name}: found a store to it; expected that the kernel only reads it; mend: pass "
                            "it as it is")
    loads = [op for op in reached if op.operands[0].op is None]     # and not by way of a view
    contracted: set[Op] = set()
    for op in function.walk():
        for value in op.operands if op.name == "contract" else ():
            load = load_behind(value)
            if load is None or load not in loads or len(load.operands) != 3:
                continue
            axes = [plain_axis(function, index) for index in load.operands[1:]]
            (over,) = op.attributes["over"] if len(op.attributes["over"]) == 1 else (None,)
            if over is not None and over in axes and None not in axes:
                depth = axes.index(over)
                columns = axes[1 - depth]
                if sum(columns in axes_of(v) for v in op.operands) > 1:
                    continue        # of a batch, not of the result alone
                contracted.add(load)
                dot = dot_for(op, facts)
                elements = 1 if dot is None or dot is FMA2_BF16 else dot.elements
                found.add(Panels(1 - depth, depth, PANEL_VECTORS * facts.lanes, elements))
    met = {v for load in contracted for v in load.results}
    for op in function.walk():
        behind = load_behind(op.operands[0]) if op.name == "cast" else None
        if op.name == "cast" and behind in contracted:
            met.update(op.results)
        elif op.name != "contract" and not met.isdisjoint(op.operands):
            contracted.clear()      # something else is made of it, too
    if len(found) != 1 or contracted != set(reached):
        raise LoweringError(f"tensor {name}: found {len(reached)} reads of it; expected that each is the operand of a "
                            "contraction over one of its two dimensions, the same for all, and of nothing else, "
                            "indexed by plain axes from 0 on; mend: pass it as it is")
    return found.pop()


def plain_axis(function: Function, index: Value) -> str | None:
    """The axis that an index is by itself, if its range begins at 0."""
    form = affine(index)
    if form is None or form.constant or form.scalars or list(form.axes.values()) != [1]:
        return None
    (axis,) = form.axes
    for op in function.walk():
        axes = op.attributes["axes"] if op.name == "tiles" else [op.attributes.get("axis")]
        if op.name in ("tiles", "whole") and axis in axes:
            start = op.operands[2 * axes.index(axis)].op
            return axis if start is not None and start.name == "const" and start.attributes["value"] == 0 else None
    return None


def dot_for(contraction: Op, facts: Facts) -> Dot | None:
    """The packed dot product that serves the types of a contraction's operands, if their slots can be had."""
    if any(slot_loads(value) is None for value in contraction.operands):
        return None
    dtypes = {v.type.dtype for v in contraction.operands}  # type: ignore[union-attr]
    result = row_dtype(contraction.result.type.dtype)  # type: ignore[union-attr]
    return next((dot for dot in DOTS if dot.name in facts.dots and dtypes <= set(dot.dtypes)
                 and dot.result is result), None)
