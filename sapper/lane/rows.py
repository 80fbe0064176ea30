"""Tile values as register rows, one op at a time.

`row(value, at)` gives the row of a tile value at register coordinates `at` (axis -> number of the register). It
computes pure ops on demand and once for each level, in the outermost level where all axes of the value are bound.
A value that does not span the lane axis is a row whose lanes are all equal; a boolean is a mask.
"""

from __future__ import annotations

import math
import struct
from functools import cached_property
from typing import Any, NoReturn

from ..ir.nodes import Function, Op, Value
from ..ir.types import (
    MASK,
    NARROW_FLOATS,
    ROW_F32,
    ROW_F64,
    ROW_I32,
    S64,
    DType,
    RowType,
    TensorType,
    TileType,
    bf16,
    bool_,
    f8e4m3,
    f8e5m2,
    f16,
    f32,
    f64,
    i4,
    i8,
    i16,
    i32,
    i64,
    index,
    u8,
)
from ..lang.by_hand import PIECES
from ..tile.affine import affine
from ..tile.coarse import QUOTIENTS, beside_one, coarse
from ..tile.ops import memory_of, place_of
from ..tile.plan import LATE
from ..tile.schedule import Facts, LoweringError, Panels, StrideClass
from ..tile.signs import never_positive, same_loads
from .ops import ABSOLUTE, BOUNDED, COARSE, MATH
from .row_bounds import is_within
from .state import Access, Scalar, State, element_bytes, memory_dtype, row_dtype

Rows = dict[tuple[int, ...], Value]
"""A value in registers: row for each register coordinate, in the order of the value's axes."""

MOST_OFFSET = (1 << 31) - 1
_SAME = {"min": "min", "max": "max", "div": "div", "floor": "floor", "ceil": "ceil", "round": "round", "sqrt": "sqrt",
         "abs": "abs", **{name: name for name in MATH}}
_WRAPS = ("add", "sub", "mul", "neg", "shl", "abs", "not")
_CONDITIONS = ("eq", "ne", "lt", "le", "gt", "ge")
_SCALAR_OPS = {"add": "s_add", "sub": "s_sub", "mul": "s_mul", "min": "s_min", "max": "s_max", "and": "s_and",
               "or": "s_or", "xor": "s_xor", "floordiv": "s_floordiv", "mod": "s_mod", "shl": "s_shl", "shr": "s_sar"}


_FLOAT8 = {f8e4m3: (3, -6, 448.0, math.nan), f8e5m2: (2, -14, 57344.0, math.inf)}
"""Bits of the mantissa, the least normal exponent, the largest number, what is beyond it."""


def rounded_constant(value: float | int, dtype: DType) -> float | int:
    """A constant as its dtype holds it: rows of narrow floats are f32 rows whose values fit the narrow type."""
    if dtype in _FLOAT8 and math.isfinite(value):
        places, least, largest, beyond = _FLOAT8[dtype]
        step = 2.0 ** (max(math.frexp(value)[1] - 1, least) - places)
        rounded = math.copysign(round(value / step) * step, value)
        return rounded if abs(rounded) <= largest else math.copysign(beyond, value)
    if dtype is f16 and math.isfinite(value):
        try:
            return float(struct.unpack("<e", struct.pack("<e", value))[0])
        except OverflowError:
            return math.copysign(math.inf, value)
    if dtype is bf16 and math.isfinite(value):
        try:
            bits = struct.unpack("<I", struct.pack("<f", value))[0]
        except OverflowError:
            return math.copysign(math.inf, value)
        bits = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000
        return float(struct.unpack("<f", struct.pack("<I", bits))[0])
    return value


def _coarse_and_one(rows: list[Value]) -> tuple[Value, Value] | None:
    """f and g of a product (1 + f) g whose f is coarse: that it is g + f g shows no more than that f is coarse does."""
    for total, other in (rows, rows[::-1]):
        if total.op is not None and total.op.name == "add":
            for one, f in (total.op.operands, total.op.operands[::-1]):
                if (f.op is not None and f.op.attributes.get("coarse") and one.op is not None
                        and one.op.name == "splat_const" and one.op.attributes["value"] == 1.0):
                    return f, other
    return None


class RowEvaluation(State):
    def __init__(self, function: Function, lanes: int, strides: dict[str, StrideClass]) -> None:
        from ..ir.nodes import Block
        self.entry = Block()
        super().__init__(self.entry, lanes)
        self.function = function
        self.wholes = frozenset(op.attributes["axis"] for op in function.walk() if op.name == "whole")
        self.stride_classes = strides
        self.home: dict[Value, int] = {}
        self.rows: dict[Value, Rows] = {}
        self.buffers: dict[Value, Access] = {}
        self.scalars: dict[Value, Scalar] = {}
        self.staged: dict[Op, Any] = {}
        self.slot_axes: dict[Value, str] = {}  # values that are kept as slots (sapper/lane/slots.py) -> their depth
        self.tensor_strides: dict[Value, list[Scalar]] = {}
        self.tensor_bases: dict[Value, Scalar] = {}
        self.facts = Facts()
        self.blocks: dict[str, str] = {}  # op -> the block by hand that the schedule chose for it
        self.contractions: list[str] = []  # micro-kernels that the schedule named
        self.products: list[str] = []  # products of fragments that it named
        self.reached: dict[tuple[str | int, ...], None] = {}  # rows for what the call checks of offsets (note_reach)
        self.refused: dict[str, str] = {}  # block -> why it is not used, as far as that is known

    # Levels.

    def level_of(self, value: Value) -> int:
        depth = self.home.get(value, 0)
        for axis in value.type.axes:  # type: ignore[union-attr]
            bound = self.bound.get(axis)
            if bound is None:
                raise LoweringError(f"axis {axis} is not walked where a value over it is needed", value.op)
            if bound.depth > depth:
                depth = bound.depth
        return depth

    def spans_lane(self, value: Value) -> bool:
        return any(self.bound[a].lane for a in value.type.axes)  # type: ignore[union-attr]

    # Rows.

    def row(self, value: Value, at: dict[str, int]) -> Value:
        t = value.type
        assert isinstance(t, TileType)
        coordinates = tuple([at[a] for a in t.axes])
        held = self.rows.get(value)
        if held is not None:
            return held[coordinates]
        level = self.level_of(value)
        memo = self.levels[level].memo
        key = (value, coordinates)
        found = memo.get(key)
        if found is None:
            outer_location = self.location
            if value.op is not None and value.op.location is not None:
                self.location = value.op.location
            buffer = self.buffers.get(value) if value not in self.slot_axes else None
            found = (self._compute(value, at, level) if buffer is None
                     else self._from_memory(buffer, value, at, level))
            self.location = outer_location
            memo[key] = found
        return found

    def _compute(self, value: Value, at: dict[str, int], level: int) -> Value:
        t = value.type
        assert isinstance(t, TileType)
        dtype = t.dtype
        op = value.op
        integer = not t.axes and (dtype.is_integer or dtype is bool_) and not (op is not None and op.name == "const")
        if integer and (value in self.scalars or op is None or not self._made_of_rows(op)):
            scalar = self.value(self.integer(value))
            if dtype is bool_:
                as_row = self.emit(level, "splat", [scalar], ROW_I32)
                return self.emit(level, "cmp", [as_row, self.constant(0, i32)], MASK, cond="ne")
            return self.emit(level, "splat", [scalar], RowType(row_dtype(dtype)))
        if op is None:
            if value in self.function.arguments:      # a floating scalar argument lies in the argument block
                return self._scalar_argument(value)
            raise LoweringError(f"%{value.name} has no value here")
        name = op.name
        if name == "const":
            if dtype is bool_:
                return self.emit(level, "mask_first", [self.value(self.lanes if op.attributes["value"] else 0)], MASK)
            return self.constant(rounded_constant(op.attributes["value"], dtype), row_dtype(dtype))
        if name == "full":
            return self.row(op.operands[0], at)
        if name == "index":
            return self._coordinate(op.attributes["axis"], at, level)
        if name == "load":
            return self._load(op, at, level)
        if name == "asm":
            return self._by_hand(op, at, level)
        rows = [self.row(v, at) for v in op.operands]
        made = self.by_block(name, rows, dtype, level)
        return self._elementwise(op, name, rows, dtype, level) if made is None else made

    def by_block(self, name: str, rows: list[Value], dtype: DType, level: int) -> Value | None:
        """What an op gives on rows, by the block that the schedule chose for it, where the target has that. dtype: of
        the result."""
        if name not in self.blocks or dtype is bool_:
            return None
        piece, result = PIECES[self.blocks[name]], row_dtype(dtype)
        inputs = tuple(r.type.dtype for r in rows)  # type: ignore[union-attr]
        if not piece.usable(self.facts.family, self.facts.features, self.lanes, inputs, result):
            return None
        return self.emit(level, "asm", rows, RowType(result), by=piece.key, immediates=[])

    def rounded(self, row: Value, dtype: DType, level: int) -> Value:
        """An f32 row rounded to values of a narrow float."""
        made = self.by_block(f"to_{dtype.name}", [row], f32, level)
        return self.emit(level, "round_to", [row], ROW_F32, dtype=dtype) if made is None else made

    @staticmethod
    def is_rounded_by_block(row: Value, dtype: DType) -> bool:
        return row.op is not None and row.op.name == "asm" and PIECES[row.op.attributes["by"]].implements == \
            f"to_{dtype.name}"

    def _by_hand(self, op: Op, at: dict[str, int], level: int) -> Value:
        """`asm`: the piece where the target has it, else what it means."""
        dtype = op.result.type.dtype  # type: ignore[union-attr]
        result = row_dtype(dtype)
        inputs = tuple(row_dtype(v.type.dtype) for v in op.operands[1:])  # type: ignore[union-attr]
        piece = PIECES[op.attributes["by"]]
        narrow = any(v.type.dtype.bits < 32 for v in (op.result, *op.operands[1:]))  # type: ignore[union-attr]
        if narrow or not piece.usable(self.facts.family, self.facts.features, self.lanes, inputs, result):
            return self.row(op.operands[0], at)
        rows = [self.row(v, at) for v in op.operands[1:]]
        return self.emit(level, "asm", rows, RowType(result), by=piece.key, immediates=op.attributes["immediates"])

    @staticmethod
    def _made_of_rows(op: Op) -> bool:
        """Whether an integer scalar is computed as a row first: from floats, or by a reduction."""
        return op.name in LATE or bool(op.operands and op.name not in ("load", "each", "tiles", "if")
                                                         and op.operands[0].type.dtype.is_float)  # type: ignore[union-attr]

    def _scalar_argument(self, value: Value) -> Value:
        dtype = value.type.dtype  # type: ignore[union-attr]
        word = self.slot(f"scalar.{value.name}")
        if dtype is f64:
            return self.emit(0, "bitcast", [self.emit(0, "splat", [word], RowType(i64))], ROW_F64)
        row = self.emit(0, "bitcast", [self.emit(0, "splat", [word], ROW_I32)], ROW_F32)
        return row

    def _coordinate(self, axis: str, at: dict[str, int], level: int) -> Value:
        bound = self.bound[axis]
        start = self.coordinate(axis, at[axis])
        if isinstance(start, int) and not bound.lane:
            return self.constant(start, i32)
        lane = self.iota() if bound.run == 1 else self.emit(0, "mul", [self.iota(), self.constant(bound.run, i32)],
                                                            ROW_I32)
        if start == 0:
            return lane
        row = (self.constant(start, i32) if isinstance(start, int)
               else self.emit(level, "splat", [self.value(start)], ROW_I32))
        return self.emit(level, "add", [row, lane], ROW_I32) if bound.lane else row

    def _elementwise(self, op: Op, name: str, rows: list[Value], dtype: DType, level: int) -> Value:
        source = op.operands[0].type.dtype  # type: ignore[union-attr]
        if name == "cast":
            return self.cast(rows[0], source, dtype, level)
        if name == "bitcast":
            return self._bitcast(rows[0], source, dtype, level, op)
        if name in _CONDITIONS:
            if source is bool_:
                differ = self.emit(level, "mask_xor", rows, MASK)
                if name == "ne":
                    return differ
                if name == "eq":
                    return self.emit(level, "mask_not", [differ], MASK)
                rows = [self.emit(level, "mask_to_row", [r], ROW_I32) for r in rows]
            return self.emit(level, "cmp", rows, MASK, cond=name)
        if name == "select":
            if dtype is bool_:
                yes = self.emit(level, "mask_and", [rows[0], rows[1]], MASK)
                off = self.emit(level, "mask_not", [rows[0]], MASK)
                return self.emit(level, "mask_or", [yes, self.emit(level, "mask_and", [off, rows[2]], MASK)], MASK)
            return self.emit(level, "select", rows, RowType(row_dtype(dtype)))
        if dtype is bool_:
            return self.emit(level, "mask_not" if name == "not" else f"mask_{name}", rows, MASK)
        row = row_dtype(dtype)
        result = RowType(row)
        if name in ("floordiv", "mod"):
            made = self.emit(level, "idiv" if name == "floordiv" else "imod", rows, result)
        elif name in ("shl", "shr"):
            made = self._shift(op, name, rows, result, level)
        elif name in _SAME or name in ("add", "sub", "mul", "neg", "and", "or", "xor", "not"):
            known: dict[str, Any] = {}
            if name in BOUNDED and never_positive(op.operands[0], self.same_loads):
                known["most"] = 0.0
            if (name in COARSE and op.results[0] in self.coarse) or (
                    name == "div" and op.results[0] in self.coarse_quotients):
                known["coarse"] = True
            elif name in ABSOLUTE and op.results[0] in self.beside_one:
                known["absolute"] = True
            one_more = _coarse_and_one(rows) if name == "mul" else None
            if one_more is not None:
                made = self.emit(level, "fma", [*one_more, one_more[1]], result)
            else:
                made = self.emit(level, _SAME.get(name, name), rows, result, **known)
        else:
            raise LoweringError(f"no lane op for {name}", op)
        if dtype in (bf16, f16):
            return self.rounded(made, dtype, level)
        if name in _WRAPS:
            return self.wrap(made, dtype, level)
        return made

    def _shift(self, op: Op, name: str, rows: list[Value], result: RowType, level: int) -> Value:
        lane_name = "shl" if name == "shl" else "sar"       # narrow unsigned rows are zero-extended: sar is exact
        amount = op.operands[1].op
        while amount is not None and amount.name in ("full", "cast"):
            amount = amount.operands[0].op
        if amount is not None and amount.name == "const":
            return self.emit(level, lane_name, [rows[0]], result, amount=int(amount.attributes["value"]))
        return self.emit(level, lane_name, rows, result)

    def wrap(self, row: Value, dtype: DType, level: int) -> Value:
        """An i32 row cut to a narrower integer type."""
        if dtype.bits >= 32 or is_within(row, dtype.bits, dtype.kind == "i"):
            return row
        if dtype.kind == "u":
            return self.emit(level, "and", [row, self.constant((1 << dtype.bits) - 1, i32)], ROW_I32)
        amount = 32 - dtype.bits
        up = self.emit(level, "shl", [row], ROW_I32, amount=amount)
        return self.emit(level, "sar", [up], ROW_I32, amount=amount)

    def cast(self, row: Value, source: DType, target: DType, level: int) -> Value:
        if source is target:
            return row
        if target is bool_:
            zero = self.constant(0.0 if source.is_float else 0, row_dtype(source))
            return self.emit(level, "cmp", [row, zero], MASK, cond="ne")
        to = row_dtype(target)
        if source is bool_:
            ones = self.constant(1.0 if target.is_float else 1, to)
            zeros = self.constant(0.0 if target.is_float else 0, to)
            return self.emit(level, "select", [row, ones, zeros], RowType(to))
        if row_dtype(source) is not to:
            row = self.emit(level, "cvt", [row], RowType(to))
        if target in NARROW_FLOATS:
            exact = source in _FLOAT8 and target not in _FLOAT8
            return row if exact else self.rounded(row, target, level)
        if target.is_integer and target.bits < 32:
            fits = source.is_integer and source.bits < target.bits and (source.kind == "u" or target.kind == "i")
            return row if fits else self.wrap(row, target, level)
        return row

    def _bitcast(self, row: Value, source: DType, target: DType, level: int, op: Op) -> Value:
        if source.bits != target.bits:
            raise LoweringError(f"bits of {source.name} are not as wide as {target.name}", op)
        if source.bits >= 32:
            return self.emit(level, "bitcast", [row], RowType(row_dtype(target)))
        if source.is_float and target.is_integer and source is bf16:
            raw = self.emit(level, "bitcast", [row], ROW_I32)
            return self.wrap(self.emit(level, "sar", [raw], ROW_I32, amount=16), target, level)
        if target is bf16 and source.is_integer:
            return self.emit(level, "bitcast", [self.emit(level, "shl", [row], ROW_I32, amount=16)], ROW_F32)
        if source.is_integer and target.is_integer:
            return self.wrap(row, target, level)
        raise LoweringError(f"bits of {source.name} as {target.name} are not supported; cast through f32", op)

    # Integers that are the same for all lanes.

    def integer(self, value: Value, at: dict[str, int] | None = None) -> Scalar:
        """An integer or bool tile value as a scalar, at register coordinates; it must not span the lane axis."""
        t = value.type
        assert isinstance(t, TileType)
        if not t.axes:
            known = self.scalars.get(value)
            if known is not None:
                return known
            made = self._integer(value, {})
            self.scalars[value] = made
            return made
        return self._integer(value, at or {})

    def _divide(self, name: str, a: Scalar, b: Scalar, dtype: DType) -> Scalar:
        """A quotient or remainder. By 0 it is unspecified, but a processor must not trap; nor may it where the quotient
        of the lowest integer by -1 has no room."""
        if isinstance(b, int) and b not in (0, -1):
            return self._binary(name, a, b)
        divisor = self._selected(self._compare("eq", b, 0), 1, b)
        if dtype.name != "i64":
            made = self._binary(name, a, divisor)
            return self._wrap_integer(made, dtype) if dtype.kind == "i" and name == "s_floordiv" else made
        negates = self._compare("eq", b, -1)
        made = self._binary(name, a, self._selected(negates, 1, divisor))
        return made if name == "s_mod" else self._selected(negates, self.sub(0, a), made)

    def _selected(self, condition: Scalar, a: Scalar, b: Scalar) -> Scalar:
        depth = max(self.depth_of(condition), self.depth_of(a), self.depth_of(b))
        return self.emit(depth, "s_select", [self.value(condition), self.value(a), self.value(b)], S64)

    def _integer(self, value: Value, at: dict[str, int]) -> Scalar:
        t = value.type
        assert isinstance(t, TileType)
        dtype = t.dtype
        op = value.op
        if op is None:
            if value in self.function.arguments:
                return self.slot(f"scalar.{value.name}")
            if value in self.rows or value in self.buffers:     # a loop carries it, as what is looked up in a table
                return self._lane0(self.row(value, at), dtype)
            raise LoweringError(f"%{value.name} is not a scalar here")
        name = op.name
        if name == "const":
            return int(op.attributes["value"])
        if name == "dim":
            return self.slot(f"dim.{op.attributes['name']}")
        if name == "full":
            return self.integer(op.operands[0], at)
        if name == "index":
            return self.coordinate(op.attributes["axis"], at[op.attributes["axis"]])
        if value in self.rows or value in self.buffers or name in LATE:
            return self._lane0(self.row(value, at), dtype)
        level = self.level_of(value)
        if name == "load":
            access = self.access(op)
            operands, attributes = self.address(self._at_scalars(access, at), at)
            memo = self.levels[level].memo
            key = ("s_load", op, tuple(at[a] for a in t.axes))
            if key not in memo:
                memo[key] = self.emit(level, "s_load", operands, S64, dtype=access.dtype, **attributes)
            loaded: Value = memo[key]
            return self._wrap_integer(loaded, i4) if dtype is i4 else loaded
        source = op.operands[0].type.dtype  # type: ignore[union-attr]
        if source.is_float:
            return self._lane0(self.row(value, at), dtype)
        parts = [self.integer(v, at) for v in op.operands]
        if name == "cast":
            if dtype is bool_:
                return self._compare("ne", parts[0], 0)
            fits = source.bits < dtype.bits and (source.kind != "i" or dtype.kind != "u")
            return parts[0] if fits else self._wrap_integer(parts[0], dtype)
        if name == "bitcast":
            return self._wrap_integer(parts[0], dtype)
        if name in _CONDITIONS:
            return self._compare(name, parts[0], parts[1])
        if name == "select":
            return self.emit(level, "s_select", [self.value(p) for p in parts], S64)
        if name == "not":
            if dtype is bool_:
                return self._binary("s_xor", parts[0], 1)
            return self._wrap_integer(self._binary("s_xor", parts[0], -1), dtype)
        if name == "neg":
            return self._wrap_integer(self.sub(0, parts[0]), dtype)
        if name == "abs":
            return self._wrap_integer(self._binary("s_max", parts[0], self.sub(0, parts[0])), dtype)
        if name in ("floordiv", "mod"):
            return self._divide(_SCALAR_OPS[name], parts[0], parts[1], dtype)
        if name in _SCALAR_OPS:
            made = self._binary(_SCALAR_OPS[name], parts[0], parts[1])
            return self._wrap_integer(made, dtype) if name in ("add", "sub", "mul", "shl") else made
        raise LoweringError(f"{name} is not defined on integer scalars", op)

    def _binary(self, name: str, a: Scalar, b: Scalar) -> Scalar:
        if name in ("s_add", "s_sub", "s_mul", "s_min", "s_max", "s_floordiv", "s_mod", "s_and"):
            return self.scalar(name, a, b)
        return self.emit(max(self.depth_of(a), self.depth_of(b)), name, [self.value(a), self.value(b)], S64)

    def _compare(self, condition: str, a: Scalar, b: Scalar) -> Scalar:
        depth = max(self.depth_of(a), self.depth_of(b))
        return self.emit(depth, "s_cmp", [self.value(a), self.value(b)], S64, cond=condition)

    def _wrap_integer(self, scalar: Scalar, dtype: DType) -> Scalar:
        if dtype.bits >= 64 or dtype is bool_:
            return scalar
        if isinstance(scalar, int):
            scalar &= (1 << dtype.bits) - 1
            return scalar - (1 << dtype.bits) if dtype.kind == "i" and scalar >> (dtype.bits - 1) else scalar
        if dtype.kind == "u":
            return self.scalar("s_and", scalar, (1 << dtype.bits) - 1)
        return self._binary("s_sar", self._binary("s_shl", scalar, 64 - dtype.bits), 64 - dtype.bits)

    def _lane0(self, row: Value, dtype: DType) -> Scalar:
        depth = self.depths.get(row, 0)
        if dtype is bool_:
            return self.emit(depth, "mask_any", [row], S64)
        return self.emit(depth, "lane0", [row], S64)

    # Memory.

    def strides(self, tensor: Value) -> list[Scalar]:
        """Element strides of a tensor argument."""
        known = self.tensor_strides.get(tensor)
        if known is not None:
            return known
        t = tensor.type
        assert isinstance(t, TensorType)
        if tensor.op is not None:
            return self._view_strides(tensor.op)
        pattern = self.stride_classes.get(tensor.name, "contiguous")
        strides: list[Scalar] = []
        if isinstance(pattern, Panels):     # as within a panel: for the model, which asks what is contiguous
            strides = [1, 1]
            strides[pattern.depth] = pattern.width
        elif pattern == "contiguous":
            size: Scalar = 1
            for dim in reversed(t.dims):
                strides.insert(0, size)
                size = self.mul(size, self.extent(dim))
        else:
            strides = [1 if unit else self.slot(f"{tensor.name}.stride.{d}") for d, unit in enumerate(pattern)]
        self.tensor_strides[tensor] = strides
        return strides

    def scalar_strides(self, op: Op) -> dict[Value, int]:
        """By how many bytes a load moves with each index; those of which this is known only as the kernel runs are left
        out."""
        total: dict[Value, int] = {}
        unknown: set[Value] = set()
        for value, stride in zip(op.operands[1:], self.strides(op.operands[0]), strict=True):
            form = affine(value)
            for scalar, coefficient in (form.scalars if form is not None else {}).items():
                if isinstance(stride, int):
                    total[scalar] = total.get(scalar, 0) + coefficient * stride
                else:
                    unknown.add(scalar)
        size = element_bytes(op.operands[0].type.dtype)  # type: ignore[union-attr]
        return {scalar: stride * size for scalar, stride in total.items() if scalar not in unknown}

    def scalar_step(self, op: Op, scalar: Value) -> Scalar:
        """By how many bytes a load, none of whose indices is gathered, moves with an index."""
        step: Scalar = 0
        for value, stride in zip(op.operands[1:], self.strides(op.operands[0]), strict=True):
            form = affine(value)
            coefficient = form.scalars.get(scalar, 0) if form is not None else 0
            if coefficient:
                step = self.add(step, self.mul(stride, coefficient))
        return self.mul(step, element_bytes(op.operands[0].type.dtype))  # type: ignore[union-attr]

    def _view_strides(self, view: Op) -> list[Scalar]:
        """Element strides of a view: in each group of axes they follow from that of the group's last axis."""
        tensor, *sizes = view.operands
        if isinstance(self.stride_classes.get(memory_of(tensor).name), Panels):
            self._refuse_packed(tensor, view)
        before, after = tensor.type.dtype.size_bytes, view.result.type.dtype.size_bytes  # type: ignore[union-attr]
        packed = before != after  # then the tensor is contiguous
        old, extents = self.strides(tensor), [self.integer(size) for size in sizes]
        strides: list[Scalar] = []
        step: Scalar = 1
        for merged, count in reversed(view.attributes["groups"]):
            if not packed:
                step = old[-1]
                old = old[:-merged]
            for _ in range(count):
                strides.insert(0, step)
                step = self.mul(step, extents.pop())
        return strides

    def access(self, op: Op) -> Access:
        """How a load or store reaches memory; the scalars that it needs are computed at the op's own level."""
        memo = self.levels[self.home_of(op)].memo
        key = ("access", op)
        found: Access | None = memo.get(key)
        if found is None:
            found = memo[key] = self._access(op)
        return found

    def access_of(self, value: Value) -> Access | None:
        """Where the elements of a value lie that is kept, or a load, cast or not; None of others."""
        if value in self.buffers or value in self.rows:
            return self.buffers.get(value)
        op = value.op
        if op is not None and op.name == "cast":
            return self.access_of(op.operands[0])
        return self.access(op) if op is not None and op.name == "load" else None

    def home_of(self, op: Op) -> int:
        return self.home.get(op.results[0], 0) if op.results else self.home.get(op, self.depth)  # type: ignore[call-overload]

    def _access(self, op: Op) -> Access:
        tensor = op.operands[0]
        indices = op.operands[1:] if op.name == "load" else op.operands[2:]
        t = tensor.type
        assert isinstance(t, TensorType)
        size_bytes = element_bytes(t.dtype)
        base = self.tensor_bases.get(memory_of(tensor))
        if base is None:
            base = self.slot(f"{memory_of(tensor).name}.data")
        access = Access(base, 0, {}, memory_dtype(t.dtype), tensor=tensor)
        for value, stride in zip(indices, self.strides(tensor), strict=True):
            step = self.mul(stride, size_bytes)
            access.indices.append((value, step))
            form = affine(value)
            if form is None:
                access.gathers.append((value, step))
                continue
            if isinstance(step, int):
                access.disp += form.constant * step
            elif form.constant:
                access.base = self.add(access.base, self.mul(step, form.constant))
            for scalar, coefficient in form.scalars.items():
                access.base = self.add(access.base, self.mul(self.mul(self.integer(scalar), coefficient), step))
            for axis, coefficient in form.axes.items():
                access.axes[axis] = self.add(access.axes.get(axis, 0), self.mul(step, coefficient))
        return access

    def _at_scalars(self, access: Access, at: dict[str, int]) -> Access:
        """The access with every gathered index that does not span the lane axis turned into a scalar offset."""
        if not access.gathers:
            return access
        moved = Access(access.base, access.disp, access.axes, access.dtype, access.relative, tensor=access.tensor,
                       indices=access.indices)
        for value, step in access.gathers:
            if self.spans_lane(value):
                moved.gathers.append((value, step))
            else:
                moved.base = self.add(moved.base, self.mul(self.integer(value, at), step))
        return moved

    def lane_stride(self, axes: dict[str, Scalar]) -> Scalar:
        for axis, coefficient in axes.items():
            if self.bound[axis].lane:
                return self.mul(coefficient, self.bound[axis].run)
        return 0

    def lane_mask(self, axes: tuple[str, ...]) -> Value | None:
        for axis in axes:
            if self.bound[axis].lane:
                return self.bound[axis].mask
        return None

    def _load(self, op: Op, at: dict[str, int], level: int) -> Value:
        staged = self.staged.get(op)
        if staged is not None:
            return staged.load(at, level)  # type: ignore[no-any-return]
        if isinstance(self.stride_classes.get(op.operands[0].name), Panels):
            self._refuse_packed(op.operands[0], op)
        access = self._at_scalars(self.access(op), at)
        for found in (self.square_row, self.pair_row):
            row = found(op, access, at, level)
            if row is not None:
                return row
        mask = self.lane_mask(op.result.type.axes)  # type: ignore[union-attr]
        row = self._picked_row(op, access, at, level, mask)
        if row is None:
            row = self.window_row(op, access, at, level, mask)
        return self._fetch(access, op.result, at, level, mask) if row is None else row

    def _refuse_packed(self, tensor: Value, op: Op) -> NoReturn:
        raise LoweringError(f"found a packed tensor, {memory_of(tensor).name}, that is read otherwise than by a "
                            "contraction; expected plain memory; mend: pass the array itself", op)

    def _picked_row(self, op: Op, access: Access, at: dict[str, int], level: int, mask: Value | None) -> Value | None:
        """The row of a gather from a table that fits two registers, held in these; or None. The kernel must not store
        to it, and it lies in one piece."""
        if not self.facts.picks or len(access.gathers) != 1 or any(access.axes.values()) or access.near:
            return None
        tensor, (index, step) = op.operands[0], access.gathers[0]
        dims = tensor.type.dims  # type: ignore[union-attr]
        size = dims[op.operands[1:].index(index)]
        dtype = op.result.type.dtype  # type: ignore[union-attr]
        if (not isinstance(size, int) or size > 2 * self.lanes or step != element_bytes(access.dtype)
                or dtype not in (f32, i32, bf16, f16, i8, u8, i16) or memory_of(tensor) in self.stored):
            return None
        depth = self.depth_of(access.base)
        memo = self.levels[depth].memo

        def table(first: int) -> Value:
            key = ("table", access.base, access.disp, access.dtype, size, first)
            if key not in memo:
                here = Access(access.base, access.disp + first * step, {}, access.dtype)
                operands, attributes = self.address(here, {})
                some = size - first < self.lanes
                inside = [self.emit(depth, "mask_first", [self.value(size - first)], MASK)] if some else []
                memo[key] = self.emit(depth, "load", [*operands, *inside], RowType(row_dtype(dtype)),
                                      dtype=access.dtype, masked=some, **attributes)
            found: Value = memo[key]
            return found

        places = self.row(index, at)
        if places.type == RowType(i64):
            places = self.emit(level, "cvt", [places], ROW_I32)
        row: Value = self.emit(level, "pick", [table(0), places], table(0).type)
        if size > self.lanes:       # a pick takes the index modulo the lanes
            early = self.emit(level, "cmp", [places, self.constant(self.lanes, i32)], MASK, cond="lt")
            late = self.emit(level, "pick", [table(self.lanes), places], row.type)
            row = self.emit(level, "select", [early, row, late], row.type)
        if mask is not None:
            zero = self.constant(0.0 if dtype.is_float else 0, row_dtype(dtype))
            row = self.emit(level, "select", [mask, row, zero], row.type)
        return row

    @cached_property
    def coarse(self) -> frozenset[Value]:
        """Results of functions of which few bits count."""
        return coarse(self.function)

    @cached_property
    def beside_one(self) -> frozenset[Value]:
        """Results that are added to numbers of 1 or more alone."""
        return beside_one(self.function, ABSOLUTE)

    @cached_property
    def same_loads(self) -> dict[Value, Value]:
        return same_loads(self.function)

    @cached_property
    def coarse_quotients(self) -> frozenset[Value]:
        """Where quotients are dear, those of which few bits count."""
        return coarse(self.function, QUOTIENTS) if self.facts.slow_division else frozenset()

    @cached_property
    def stored(self) -> frozenset[Value]:
        """The memory that the function stores to, or may by another name."""
        places = {place_of(op.operands[0]) for op in self.function.walk() if op.name == "store"}
        return frozenset((*places, *(tensor for tensor in self.function.arguments if place_of(tensor) in places)))

    def square_row(self, op: Op, access: Access, at: dict[str, int], level: int) -> Value | None:
        """The row of a load that is read in squares (sapper/lane/squares.py), or None."""
        return None

    def run_row(self, access: Access, at: dict[str, int], level: int) -> Value | None:
        """The row of a load of several neighbours in a lane (sapper/lane/runs.py), or None."""
        return None

    def pair_row(self, op: Op, access: Access, at: dict[str, int], level: int) -> Value | None:
        """The row of a load of every second element (sapper/lane/pairs.py), or None."""
        return None

    def window_row(self, op: Op, access: Access, at: dict[str, int], level: int, mask: Value | None) -> Value | None:
        """The row of a load whose lanes read places that are near each other (sapper/lane/windows.py), or None."""
        return None

    def _from_memory(self, access: Access, value: Value, at: dict[str, int], level: int) -> Value:
        axes = value.type.axes  # type: ignore[union-attr]
        narrow = any(self.bound[axis].narrow for axis in axes)      # then a row may reach beyond the padding
        return self._fetch(access, value, at, level, self.lane_mask(axes), padded=not narrow)

    def _fetch(self, access: Access, value: Value, at: dict[str, int], level: int, mask: Value | None,
               padded: bool = False) -> Value:
        dtype = value.type.dtype  # type: ignore[union-attr]
        row = self.fetch_row(access, i32 if dtype is bool_ else row_dtype(dtype), at, level, mask, padded)
        if dtype is i4:
            return self.wrap(row, i4, level)
        if dtype is bool_:
            return self.emit(level, "cmp", [row, self.constant(0, i32)], MASK, cond="ne")
        return row

    def fetch_row(self, access: Access, to: DType, at: dict[str, int], level: int, mask: Value | None,
                  padded: bool = False) -> Value:
        """A row of `to` from memory. padded: consecutive elements past the edge may be touched, so that no mask is
        needed there."""
        in_run = self.run_row(access, at, level)
        if in_run is not None:
            return in_run
        stride = self.lane_stride(access.axes)
        operands, attributes = self.address(access, at)
        masked = [mask] if mask is not None else []
        if access.gathers or stride not in (0, element_bytes(access.dtype)):
            offsets = self._offsets(access, stride, at, level)
            base = operands[0]
            if attributes["indexed"]:
                scaled = self.mul(operands[1], attributes["scale"])
                base = self.value(self.add(base, scaled))
            return self.emit(level, "gather", [base, offsets, *masked], RowType(to), dtype=access.dtype, scale=1,
                             disp=attributes["disp"], masked=bool(masked), **self._nearness(access))
        if stride == 0:
            return self.emit(level, "load_splat", operands, RowType(to), dtype=access.dtype, **attributes)
        masked = [] if padded else masked
        return self.emit(level, "load", [*operands, *masked], RowType(to), dtype=access.dtype, masked=bool(masked),
                         **attributes, **self._besides(access, at))

    def _besides(self, access: Access, at: dict[str, int]) -> dict[str, int]:
        """Which neighbour of a row is loaded as well, said of pairs of bf16 from rows of a matrix that lie in several
        places of it (AxisLoops.parted_loop): a line of each is then widened by two instructions, not by four, and the
        processor looks further ahead. matvec_residual_bf16 of 4096 x 14336 from memory on one thread of a Zen 5: from
        87 to 91 % of what plain reads reach. A single stream of whole rows loses: 4096 x 4096, 96 and 93."""
        lanes = [(a, self.bound[a]) for a in access.axes if a in self.bound and self.bound[a].lane]
        if access.dtype is not bf16 or len(lanes) != 1 or all(
                self.bound[a].apart == 1 for a in access.axes if a in self.bound):
            return {}
        (axis, bound), = lanes
        return {} if bound.mask is not None or bound.count % 2 else {"beside": -1 if at[axis] % 2 else 1}

    @staticmethod
    def _nearness(access: Access) -> dict[str, bool]:
        return {"near": True} if access.near else {}

    def _offsets(self, access: Access, stride: Scalar, at: dict[str, int], level: int) -> Value:
        """Byte offsets of the lanes from the address of lane 0. All are 0 in a tensor that has no elements."""
        self.note_reach(access)
        total: Value | None = None
        if stride != 0:
            depth = self.depth_of(stride)
            memo = self.levels[depth].memo
            key = ("lane offsets", stride)
            if key not in memo:
                factor = (self.constant(stride, i32) if isinstance(stride, int)
                          else self.emit(depth, "splat", [stride], ROW_I32))
                memo[key] = self.emit(depth, "mul", [self.iota(), factor], ROW_I32)
            total = memo[key]
        for value, step in access.gathers:
            row = self.row(value, at)
            if row.type == RowType(i64):
                row = self.emit(level, "cvt", [row], ROW_I32)
            factor = (self.constant(step, i32) if isinstance(step, int)
                      else self.emit(self.depth_of(step), "splat", [step], ROW_I32))
            part = self.emit(level, "mul", [row, factor], ROW_I32)
            total = part if total is None else self.emit(level, "add", [total, part], ROW_I32)
        return self.constant(0, i32) if total is None else total

    def note_reach(self, access: Access) -> None:
        """Offsets have 32 bits: the call checks that what the lanes of an access may reach lies close enough. Said of
        dimensions of the tensor: how many coordinates at most the lanes lie apart."""
        tensor = None if access.tensor is None else memory_of(access.tensor)
        if tensor is None or tensor not in self.function.arguments:
            return
        found: list[int] = []
        for number, (value, step) in enumerate(access.indices):
            if any(value is gathered for gathered, _ in access.gathers):
                most = MOST_OFFSET
            else:
                form = affine(value)
                most = 0 if form is None else sum(abs(coefficient) * (self.lanes - 1) * self.bound[axis].run
                                                  for axis, coefficient in form.axes.items() if self.bound[axis].lane)
            if most and not (isinstance(step, int) and most * abs(step) < 1 << 28):
                found += [number, min(most, MOST_OFFSET)]
        if tensor is not access.tensor and found:     # a view has other dimensions
            found = [part for number in range(len(tensor.type.dims)) for part in (number, MOST_OFFSET)]  # type: ignore[union-attr]
        if found:
            self.reached[tensor.name, "near", *found] = None

    def put(self, access: Access, row: Value, dtype: DType, at: dict[str, int], axes: tuple[str, ...],
            streaming: bool = False, padded: bool = False, disjoint: bool = False) -> None:
        """Store the row of a value that spans `axes`. padded: as for `fetch_row`. disjoint: see the op scatter."""
        if dtype is bool_:
            row = self.emit(self.depth, "mask_to_row", [row], ROW_I32)
        spans = [a for a in axes if self.bound[a].lane]
        stride = self.lane_stride(access.axes)
        operands, attributes = self.address(access, at)
        exact = {"exact": True} if access.dtype is bf16 and self.is_rounded_by_block(row, bf16) else {}
        mask = self.bound[spans[0]].mask if spans else None
        tail = [mask] if mask is not None else []
        if access.gathers or (spans and stride != element_bytes(access.dtype)):
            offsets = self._offsets(access, stride, at, self.depth)
            base = operands[0]
            if attributes["indexed"]:
                base = self.value(self.add(base, self.mul(operands[1], attributes["scale"])))
            self.effect("scatter", [row, base, offsets, *tail], dtype=access.dtype, scale=1, disp=attributes["disp"],
                        masked=bool(tail), **self._nearness(access), **({"disjoint": True} if disjoint else {}))
        elif not spans:
            self.effect("store_lane0", [row, *operands], dtype=access.dtype, **exact, **attributes)
        else:
            tail = [] if padded else tail
            self.effect("store", [row, *operands, *tail], dtype=access.dtype, masked=bool(tail),
                        streaming=streaming and not tail, **exact, **attributes)


__all__ = ["Access", "LoweringError", "RowEvaluation", "Rows", "index", "memory_dtype"]
