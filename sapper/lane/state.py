"""What lowering knows while it descends: levels of nested blocks, bound axes, scalars, addresses.

A *level* is a lane IR block under construction. Loops are appended to the outer block only after their body is
complete, so an op may still be appended to any outer level from inside: every op goes to the outermost level where
all that it reads exists, which hoists loop invariants as they are made.

An axis is *bound* to a sub-tile (offset, register count, lanes, mask) at a level, or *open*: it has an offset and an
extent, and a walk must loop over it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Union

from ..ir.nodes import Block, Builder, Location, Op, Value
from ..ir.types import NARROW_FLOATS, S64, Dim, DType, RowType, Type, b32, bool_, f32, f64, i4, i8, i32, i64, index
from ..tile.schedule import LoweringError
from .ops import FIRST_WORDS

MOST_VALUES = 1 << 16
"""Of one kernel: ten times what the largest of the library has. More would take minutes to compile."""

MANY_ROWS = 8
"""Rows with a stride that is known when the kernel runs: an address for each takes too many registers."""

Scalar = Union[int, Value]
"""A 64-bit scalar: a constant, or a lane IR value."""

_FOLD: dict[str, Callable[[int, int], int]] = {
    "s_add": lambda a, b: a + b, "s_sub": lambda a, b: a - b, "s_mul": lambda a, b: a * b, "s_min": min, "s_max": max,
    "s_floordiv": lambda a, b: a // b, "s_mod": lambda a, b: a % b, "s_and": lambda a, b: a & b,
    "s_shl": lambda a, b: a << b, "s_sar": lambda a, b: a >> b,
}

PAIR = 2
"""Elements of bf16 in a slot."""


def too_many_values() -> LoweringError:
    return LoweringError(f"the schedule unrolls the kernel to more than {MOST_VALUES} values; expected tiles whose "
                         "rows fit the registers; mend: smaller sizes in tile and registers")


def row_dtype(dtype: DType) -> DType:
    """The element type of the register rows that hold values of a tile dtype."""
    if dtype is f32 or dtype in NARROW_FLOATS:
        return f32
    if dtype in (f64, i64, b32):
        return dtype
    if dtype.kind in "iux":
        return i32
    raise TypeError(f"no register row holds {dtype.name}")


def memory_dtype(dtype: DType) -> DType:
    """How memory holds values of a tile dtype: the dtype of lane IR."""
    return i32 if dtype is index else i8 if dtype is i4 else dtype


class Level:
    """A block under construction, and what was already computed in it. iterations: of the loop that it is the body of,
    typically."""

    __slots__ = ("builder", "iterations", "memo")

    def __init__(self, block: Block) -> None:
        self.builder = Builder(block)
        self.iterations = 1
        self.memo: dict[Any, Any] = {}


@dataclass(slots=True)
class Bound:
    """Axis bound to coordinates offset + j (or offset + j * lanes + lane), 0 <= j < count.

    run: so many neighbours are in one lane (runs.py): then j stands for offset + (j div run) run lanes + lane run +
    j mod run. narrow: the mask is that of every piece, whose next begins where its lanes end, not only of the last.
    stop: where the axis ends, if that is what the mask cuts and it is known. spread: where the coordinates lie instead,
    if they are spread over lanes and registers (chained.py: Spread). hint: of a resident axis, its typical extent.
    apart: neighbours that are not in lanes lie so many coordinates apart; in lanes, each of so many `parts`, of
    neighbours, does. rest: it is what whole pieces leave of the axis."""

    offset: Scalar
    count: int
    lane: bool
    mask: Value | None
    depth: int
    resident: bool = False
    narrow: bool = False
    stop: Scalar | None = None
    spread: Any = None
    hint: int = 1
    run: int = 1
    apart: Scalar = 1
    parts: int = 1
    rest: bool = False

    def place(self, j: int, lanes: int) -> int:
        """What register coordinate j adds to the offset in lane 0."""
        if not self.lane:
            return j
        return j // self.run * self.run * lanes + j % self.run


@dataclass(slots=True)
class Open:
    """Axis still to be walked. hint: a typical extent; divisor: the extent is a multiple of it. origin: where scratch
    memory over it begins, if not at its offset. once: a tile has all of it. apart: neighbours lie so far apart."""

    offset: Scalar
    extent: Scalar
    hint: int
    divisor: int = 1
    capacity: Capacity | None = None
    origin: Scalar | None = None
    once: bool = False
    apart: Scalar = 1

    @property
    def most(self) -> int | None:
        """The greatest extent that it may have, if that is known."""
        if isinstance(self.extent, int):
            return self.extent
        return self.capacity.constant if self.capacity is not None and not self.capacity.dims else None


@dataclass(frozen=True, slots=True)
class Capacity:
    """An upper bound of an extent that scratch memory can be sized by: constant * product of dimensions, or of what is
    added up of them (`ir.extents`)."""

    constant: int
    dims: tuple[Dim, ...] = ()

    @property
    def nested(self) -> Dim:
        """The bound as one extent, if it is made of one factor besides the constant, or of none."""
        if not self.dims:
            return self.constant
        return self.dims[0] if self.constant == 1 else ("mul", self.constant, self.dims[0])

    @property
    def is_sum(self) -> bool:
        return any(isinstance(dim, tuple) for dim in self.dims)


@dataclass(slots=True)
class Access:
    """Where the elements of a load, a store or a buffer lie.

    base + disp + sum over axes of coordinate * coefficient (bytes). relative: coordinates count from the tile's
    offset (scratch buffers). near: in near memory. gathers: non-affine index values, with the byte stride of their
    dimension. tensor: which it is, and its index of each dimension, with the byte stride.
    """

    base: Scalar
    disp: int
    axes: dict[str, Scalar]
    dtype: DType
    relative: bool = False
    gathers: list[tuple[Value, Scalar]] = field(default_factory=list)
    near: bool = False
    home: int = 0
    tensor: Value | None = None
    indices: list[tuple[Value, Scalar]] = field(default_factory=list)


class State:
    """Levels, bindings and the arithmetic on scalars. Subclasses add rows, walks and control.

    indexed_addresses: whether a memory op may have an index; without, it is added to the base.
    """

    indexed_addresses = True

    def __init__(self, entry: Block, lanes: int) -> None:
        self.lanes = lanes
        self.levels = [Level(entry)]
        self.bound: dict[str, Bound] = {}
        self.open: dict[str, Open] = {}
        self.depths: dict[Scalar, int] = {}     # of values; constants, which are not in it, are at level 0
        self.steps: dict[Value, tuple[Scalar, int]] = {}  # of loop counters: where they start, and by what they grow
        self.slots: list[str] = []
        self.location: Location | None = None

    # Emission.

    @contextmanager
    def located(self, op: Op | None) -> Iterator[None]:
        """What is emitted inside comes from an op's line of the source, if it has one."""
        outer = self.location
        self.location = outer if op is None or op.location is None else op.location
        yield
        self.location = outer

    @property
    def depth(self) -> int:
        return len(self.levels) - 1

    def emit(self, depth: int, name: str, operands: list[Value], type: Type, **attributes: Any) -> Value:
        op = Op(name, operands, (type,), attributes, None, self.location)
        self.levels[depth].builder.block.ops.append(op)
        value = op.results[0]
        self.depths[value] = depth
        if len(self.depths) > MOST_VALUES:
            raise too_many_values()
        return value

    def emit_pair(self, depth: int, name: str, operands: list[Value],
                  attributes: dict[str, Any]) -> tuple[Value, Value]:
        """An op of two rows that gives two of their type."""
        low, high = self.emit_rows(depth, name, operands, attributes)
        return low, high

    def emit_rows(self, depth: int, name: str, operands: list[Value], attributes: dict[str, Any]) -> list[Value]:
        """An op of rows that gives as many of their type."""
        op = Op(name, operands, [v.type for v in operands], attributes, None, self.location)
        self.levels[depth].builder.block.ops.append(op)
        for result in op.results:
            self.depths[result] = depth
        return list(op.results)

    def effect(self, name: str, operands: list[Value], **attributes: Any) -> None:
        self.levels[-1].builder.block.ops.append(Op(name, operands, (), attributes, None, self.location))

    def depth_of(self, value: Scalar) -> int:
        return self.depths.get(value, 0)

    # Scalars.

    def extent(self, dim: Dim) -> Scalar:
        """The extent of a tensor's dimension."""
        if isinstance(dim, tuple):
            op, left, right = dim
            return self.scalar(f"s_{op}", self.extent(left), self.extent(right))
        return dim if isinstance(dim, int) else self.slot(f"dim.{dim}")

    def value(self, scalar: Scalar) -> Value:
        """A scalar as an SSA value."""
        if isinstance(scalar, Value):
            return scalar
        memo = self.levels[0].memo
        found = memo.get(scalar)
        if found is None:
            found = memo[scalar] = self.emit(0, "s_const", [], S64, value=scalar)
        return found

    def scalar(self, name: str, a: Scalar, b: Scalar) -> Scalar:
        """a `name` b, folded where constant, emitted at the outermost level where both exist."""
        if isinstance(a, int):
            if isinstance(b, int):
                return int(_FOLD[name](a, b))
            if a == 0 and name == "s_add":
                return b
            if name == "s_mul" and (a == 0 or a == 1):
                return b if a else 0
            depth = self.depths.get(b, 0)
        elif isinstance(b, int):
            if b == 0 and name in ("s_add", "s_sub", "s_shl", "s_sar"):
                return a
            if name == "s_mul" and (b == 0 or b == 1):
                return a if b else 0
            if b == 1 and name == "s_floordiv":
                return a
            if b == 1 and name == "s_mod":
                return 0
            if b > 0 and b & (b - 1) == 0:
                if name == "s_mod":
                    name, b = "s_and", b - 1
                elif name == "s_floordiv":
                    name, b = "s_sar", b.bit_length() - 1
            depth = self.depths.get(a, 0)
        else:
            depth = max(self.depths.get(a, 0), self.depths.get(b, 0))
        key = (name, a, b)
        memo = self.levels[depth].memo
        found = memo.get(key)
        if found is None:
            found = memo[key] = self.emit(depth, name, [self.value(a), self.value(b)], S64)
        return found

    def add(self, a: Scalar, b: Scalar) -> Scalar:
        return a + b if isinstance(a, int) and isinstance(b, int) else self.scalar("s_add", a, b)

    def sub(self, a: Scalar, b: Scalar) -> Scalar:
        return 0 if a is b else self.scalar("s_sub", a, b)

    def mul(self, a: Scalar, b: Scalar) -> Scalar:
        return a * b if isinstance(a, int) and isinstance(b, int) else self.scalar("s_mul", a, b)

    def ceil_div(self, a: Scalar, b: int) -> Scalar:
        return self.scalar("s_floordiv", self.add(a, b - 1), b)

    def round_up(self, a: Scalar, b: int) -> Scalar:
        return self.mul(self.ceil_div(a, b), b)

    def is_multiple(self, scalar: Scalar, of: int) -> bool:
        """Whether a scalar is known to be a multiple of a power of two."""
        if isinstance(scalar, int):
            return scalar % of == 0
        op = scalar.op
        if op is None:
            start, step = self.steps.get(scalar, (1, 1))
            return step % of == 0 and self.is_multiple(start, of)
        if op.name == "s_const":
            return bool(op.attributes["value"] % of == 0)
        known = [self.is_multiple(v, of) for v in op.operands]
        if op.name in ("s_mul", "s_and"):
            return any(known)
        return op.name in ("s_add", "s_sub", "s_min", "s_max") and all(known)

    def slot(self, name: str) -> Value:
        """The argument word `name`."""
        memo = self.levels[0].memo
        key = ("slot", name)
        if key not in memo:
            if name not in self.slots:
                self.slots.append(name)
            memo[key] = self.emit(0, "arg", [], S64, slot=len(FIRST_WORDS) + self.slots.index(name))
        found: Value = memo[key]
        return found

    # Blocks.

    def enter(self, block: Block) -> None:
        self.levels.append(Level(block))
        for argument in block.arguments:
            self.depths[argument] = self.depth

    def enter_again(self) -> None:
        """Another level in the same block, with a memo of its own."""
        block = self.levels[-1].builder.block
        known = [self.depths[argument] for argument in block.arguments]
        self.enter(block)
        self.depths.update(zip(block.arguments, known, strict=True))

    def leave(self) -> Block:
        return self.levels.pop().builder.block

    def finish(self, op: Op) -> None:
        """Append a control op whose blocks are complete to the current level."""
        self.levels[-1].builder.block.ops.append(op)
        for result in op.results:
            self.depths[result] = self.depth

    def fork(self, condition: Value, then: Callable[[], None], other: Callable[[], None]) -> None:
        """Where a scalar is not 0 what `then` emits, and else what `other` does; neither gives anything."""
        blocks = []
        for body in (then, other):
            self.enter(Block())
            body()
            self.effect("yield", [])
            blocks.append(self.leave())
        self.finish(Op("if", [condition], (), {}, blocks, self.location))

    # Addresses.

    def address(self, access: Access, at: dict[str, int]) -> tuple[list[Value], dict[str, Any]]:
        """Operands and attributes of a memory op for the element (or lane 0 of the row) at register coordinates."""
        disp = access.disp
        depth_of = self.depths.get
        terms: dict[int, list[tuple[Scalar, Scalar]]] = {}
        moving: list[tuple[int, Scalar, int]] = []
        for axis, coefficient in access.axes.items():
            bound = self.bound[axis]
            j = at.get(axis, 0)
            if bound.lane:
                if bound.parts > 1:
                    part, j = divmod(j, bound.count // bound.parts)
                    moving.append((part, self.mul(bound.apart, coefficient), bound.parts))
                j = bound.place(j, self.lanes)
            if bound.apart != 1 and not bound.lane:
                moving.append((j, self.mul(bound.apart, coefficient), bound.count))
            elif isinstance(coefficient, int):
                disp += j * coefficient
            elif j or bound.count >= MANY_ROWS:
                moving.append((j, coefficient, bound.count))
            offset: Scalar = bound.offset
            if access.relative:
                if bound.resident:
                    continue
                origin = self.open.get(axis)
                if origin is not None:
                    offset = self.sub(offset, origin.offset if origin.origin is None else origin.origin)
            if isinstance(offset, int) and isinstance(coefficient, int):
                disp += offset * coefficient
            else:
                depth = max(depth_of(offset, 0), depth_of(coefficient, 0))
                terms.setdefault(depth, []).append((offset, coefficient))
        base = access.base
        index: Scalar = 0
        scale = 1
        depths = sorted(terms)
        for depth in depths:
            group = terms[depth]
            if depth == depths[-1] and depth > self.depth_of(base):
                # The innermost terms become the index, so that the rest stays outside the innermost loop.
                if len(group) == 1 and group[0][1] in (1, 2, 4, 8):
                    index, scale = group[0][0], int(group[0][1])
                else:
                    for offset, coefficient in group:
                        index = self.add(index, self.mul(offset, coefficient))
            else:
                for offset, coefficient in group:
                    base = self.add(base, self.mul(offset, coefficient))
        for j, coefficient, count in moving:
            if self.indexed_addresses and len(moving) == 1 and count >= MANY_ROWS:
                base, index, scale = self._row_of_eight(base, index, scale, coefficient, j)
            else:
                base = self.add(base, self.mul(coefficient, j))
        operands, attributes = self.memory_operands(base, index, scale, disp)
        if access.near:
            attributes["near"] = True
        return operands, attributes

    def coordinate(self, axis: str, j: int) -> Scalar:
        """Of the element, or of lane 0, at a register coordinate."""
        bound = self.bound[axis]
        if not bound.lane:
            return self.add(bound.offset, j if bound.apart == 1 else self.mul(bound.apart, j))
        part, j = divmod(j, bound.count // bound.parts)
        place = bound.place(j, self.lanes)
        return self.add(bound.offset, self.add(self.mul(bound.apart, part), place) if part else place)

    def _row_of_eight(self, base: Scalar, index: Scalar, scale: int, stride: Scalar,
                      j: int) -> tuple[Scalar, Scalar, int]:
        """Base, index and scale of row j of many: one address for eight, which differ by multiples of the stride."""
        base = self.add(base, self.mul(stride, j & -8))
        if not isinstance(index, int):
            base = self.add(base, self.mul(index, scale))
        scale = j & 7 & -j
        return (base, self.mul(stride, (j & 7) // scale), scale) if scale else (base, 0, 1)

    def memory_operands(self, base: Scalar, index: Scalar, scale: int, disp: int) -> tuple[list[Value], dict[str, Any]]:
        """Operands and attributes of a memory op at base + index * scale + disp."""
        if isinstance(index, int):
            disp += index * scale
        elif self.indexed_addresses:
            return [self.value(base), index], {"scale": scale, "disp": disp, "indexed": True}
        else:
            base = self.add(base, self.mul(index, scale))
        return [self.value(base)], {"scale": 1, "disp": disp, "indexed": False}

    def address_of(self, operands: list[Value], attributes: dict[str, Any]) -> Scalar:
        """The address that `address` or `memory_operands` describe, as one scalar."""
        address: Scalar = operands[0]
        if attributes["indexed"]:
            address = self.add(address, self.mul(operands[1], attributes["scale"]))
        return self.add(address, attributes["disp"])

    # Constants.

    def constant(self, value: float | int, dtype: DType) -> Value:
        """A row with `value` in every lane."""
        memo = self.levels[0].memo
        key = ("row", dtype.name, repr(value))
        if key not in memo:
            memo[key] = self.emit(0, "splat_const", [], RowType(dtype), value=value)
        found: Value = memo[key]
        return found

    def row_of(self, scalar: Scalar) -> Value:
        """row<i32>: a scalar in every lane."""
        if isinstance(scalar, int):
            return self.constant(scalar, i32)
        memo = self.levels[self.depth_of(scalar)].memo
        key = ("row of", scalar)
        if key not in memo:
            memo[key] = self.emit(self.depth_of(scalar), "splat", [scalar], RowType(i32))
        found: Value = memo[key]
        return found

    def iota(self) -> Value:
        memo = self.levels[0].memo
        if "iota" not in memo:
            memo["iota"] = self.emit(0, "iota", [], RowType(i32))
        found: Value = memo["iota"]
        return found


def element_bytes(dtype: DType) -> int:
    return bool_.size_bytes if dtype is bool_ else memory_dtype(dtype).size_bytes
