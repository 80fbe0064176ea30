"""Writes loads, stores and roundings of fp8 as ones of bytes, for targets that have no instructions for fp8.

Enters: a lane function. Leaves: the same without memory ops or `round_to` of f8e4m3 and f8e5m2. Holds: all 256 codes
and all roundings are as ml_dtypes has them, NaN for NaN. A denormal f32 is multiplied
only where that is quick.
Source: OCP 8-bit Floating Point Specification, 2023: e4m3 has bias 7, NaN where all bits are set, no infinity; e5m2 has
bias 15, infinities and NaN as IEEE 754.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..ir.nodes import Block, Function, Op, Value
from ..ir.types import MASK, ROW_B32, ROW_F32, ROW_I32, DType, RowType, Type, b32, f8e4m3, f8e5m2, u8
from .ops import LANE_OPS


@dataclass(frozen=True, slots=True)
class _Format:
    """mantissa: its bits. bias: of the exponent. special: the least code that is no number, or the one that is NaN."""

    mantissa: int
    bias: int
    special: int

    @property
    def shift(self) -> int:
        """From its last place to that of f32."""
        return 23 - self.mantissa

    @property
    def least(self) -> float:
        """The least normal number."""
        return 2.0 ** (1 - self.bias)

    @property
    def largest(self) -> float:
        last = self.special - 1
        return float(2.0 ** ((last >> self.mantissa) - self.bias) * (1 + (last & (1 << self.mantissa) - 1) / (
            1 << self.mantissa)))

    @property
    def rebias(self) -> int:
        return (127 - self.bias) << 23


_FORMATS = {f8e4m3: _Format(3, 7, 0x7F), f8e5m2: _Format(2, 15, 0x7C)}


class _Writer:
    """quick_denormals: see expand_float8."""

    def __init__(self, quick_denormals: bool) -> None:
        self.quick_denormals = quick_denormals
        self.head: list[Op] = []
        self.constants: dict[tuple[float | int, Type], Value] = {}
        self.ops: list[Op] = []
        self.at: Op | None = None

    def emit(self, name: str, operands: list[Value], type: Type, **attributes: object) -> Value:
        op = Op(name, operands, (type,), attributes, None, self.at.location if self.at else None)
        self.ops.append(op)
        return op.results[0]

    def constant(self, value: float | int, type: RowType) -> Value:
        key = (value, type)
        if key not in self.constants:
            op = Op("splat_const", [], (type,), {"value": value})
            self.head.append(op)
            self.constants[key] = op.results[0]
        return self.constants[key]

    def integer(self, name: str, a: Value, b: int) -> Value:
        return self.emit(name, [a, self.constant(b, ROW_I32)], ROW_I32)

    def scaled(self, top: Value, dtype: DType) -> Value:
        """row<i32> of codes in the highest bits to the numbers. Moved to where f32 has its fraction they are numbers,
        denormal ones too, that are a power of two too small."""
        f = _FORMATS[dtype]
        moved = self.emit("sar", [top], ROW_I32, amount=24 - f.shift)
        moved = self.integer("and", moved, -(1 << 31) | 0x7F << f.shift)
        number = self.emit("mul", [self.emit("bitcast", [moved], ROW_F32),
                                   self.constant(2.0 ** (127 - f.bias), ROW_F32)], ROW_F32)
        size = self.emit("abs", [number], ROW_F32)
        is_number = self.emit("cmp", [size, self.constant(f.largest, ROW_F32)], MASK, cond="le")
        if dtype is f8e4m3:
            special = self.constant(math.nan, ROW_F32)
        else:
            special = self.emit("bitcast", [self.integer("or", moved, 0x7F800000)], ROW_F32)
        return self.emit("select", [is_number, number, special], ROW_F32)

    def of_word(self, op: Op, dtype: DType) -> Value:
        """The number that an `unpack` takes from a word."""
        place: int = op.attributes["place"]
        if not self.quick_denormals:
            return self.unpacked(self.emit("unpack", op.operands, ROW_I32, dtype=u8, place=place), dtype)
        word = self.emit("bitcast", op.operands, ROW_I32)
        return self.scaled(self.emit("shl", [word], ROW_I32, amount=24 - 8 * place), dtype)

    def unpacked(self, code: Value, dtype: DType) -> Value:
        """row<i32> of codes 0 ... 255 to the numbers. Denormal ones: the bits under an exponent, less that power."""
        if self.quick_denormals:
            return self.scaled(self.emit("shl", [code], ROW_I32, amount=24), dtype)
        f = _FORMATS[dtype]
        magnitude = self.integer("and", code, 0x7F)
        shifted = self.emit("shl", [magnitude], ROW_I32, amount=f.shift)
        normal = self.emit("bitcast", [self.integer("add", shifted, f.rebias)], ROW_F32)
        raised = self.emit("bitcast", [self.integer("add", shifted, f.rebias + (1 << 23))], ROW_F32)
        small = self.emit("sub", [raised, self.constant(f.least, ROW_F32)], ROW_F32)
        is_small = self.emit("cmp", [magnitude, self.constant(1 << f.mantissa, ROW_I32)], MASK, cond="lt")
        number = self.emit("select", [is_small, small, normal], ROW_F32)
        is_special = self.emit("cmp", [magnitude, self.constant(f.special, ROW_I32)], MASK, cond="ge")
        # e5m2: the mantissa under f32's greatest exponent; e4m3: that is NaN too, as some of its bits are set.
        special = self.emit("bitcast", [self.integer("or", shifted, 0x7F800000)], ROW_F32)
        number = self.emit("select", [is_special, special, number], ROW_F32)
        sign = self.emit("shl", [self.integer("and", code, 0x80)], ROW_I32, amount=24)
        bits = self.emit("bitcast", [number], ROW_I32)
        return self.emit("bitcast", [self.emit("or", [bits, sign], ROW_I32)], ROW_F32)

    def packed(self, row: Value, dtype: DType) -> Value:
        """row<f32> to codes: half of the last place is added, less one where that place is even, then it is cut off.
        Below the normal numbers a power of two is added whose last place is theirs."""
        f = _FORMATS[dtype]
        bits = self.emit("bitcast", [row], ROW_I32)
        magnitude = self.integer("and", bits, 0x7FFFFFFF)
        odd = self.integer("and", self.emit("shr", [magnitude], ROW_I32, amount=f.shift), 1)
        half = self.integer("add", odd, (1 << f.shift - 1) - 1 - f.rebias)
        # NaN and what is too large ends up above `special`.
        normal = self.emit("shr", [self.emit("add", [magnitude, half], ROW_I32)], ROW_I32, amount=f.shift)
        power = 2.0 ** (23 + 1 - f.bias - f.mantissa)
        raised = self.emit("add", [self.emit("bitcast", [magnitude], ROW_F32), self.constant(power, ROW_F32)], ROW_F32)
        power_bits = 127 + int(math.log2(power)) << 23
        small = self.integer("sub", self.emit("bitcast", [raised], ROW_I32), power_bits)
        least = self.constant((128 - f.bias) << 23, ROW_I32)
        code = self.emit("select", [self.emit("cmp", [magnitude, least], MASK, cond="lt"), small, normal], ROW_I32)
        code = self.integer("min", code, f.special)
        if dtype is f8e5m2:  # infinity is its own, and NaN another
            is_nan = self.emit("cmp", [magnitude, self.constant(0x7F800000, ROW_I32)], MASK, cond="gt")
            code = self.emit("select", [is_nan, self.constant(0x7E, ROW_I32), code], ROW_I32)
        sign = self.integer("and", self.emit("shr", [bits], ROW_I32, amount=24), 0x80)
        return self.emit("or", [code, sign], ROW_I32)


def expand_float8(function: Function, legal: frozenset[str], quick_denormals: bool = False) -> None:
    """In place, unless `legal` has "float8"; with "unpack.float8" but for `unpack`. quick_denormals: products of
    denormal f32 take no longer than others."""
    if "float8" in legal:
        return
    writer = _Writer(quick_denormals)
    _expand_block(function.body, writer, {"group_multiply", "matrix_multiply", "sums_multiply",
                                          *(["unpack"] if "unpack.float8" in legal else [])})
    function.body.ops[:0] = writer.head


def _expand_block(block: Block, writer: _Writer, kept: set[str]) -> None:
    """kept: names of ops that the target has for fp8."""
    for op in block.ops:
        for inner in op.blocks:
            _expand_block(inner, writer, kept)
    if not any(op.attributes.get("dtype") in _FORMATS for op in block.ops):
        return
    writer.ops = []
    for op in block.ops:
        dtype = op.attributes.get("dtype")
        writer.at = op
        if dtype not in _FORMATS or op.name in kept:
            writer.ops.append(op)
        elif op.name in ("load", "load_splat", "gather"):
            _replace(op, writer.unpacked(writer.emit(op.name, op.operands, ROW_I32, **{**op.attributes, "dtype": u8}),
                                         dtype))
        elif op.name == "unpack":
            _replace(op, writer.of_word(op, dtype))
        elif op.name == "round_to":
            _replace(op, writer.unpacked(writer.packed(op.operands[0], dtype), dtype))
        else:  # store, store_lane0, scatter
            code = writer.packed(op.operands[0], dtype)
            writer.ops.append(Op(op.name, [code, *op.operands[1:]], (), {**op.attributes, "dtype": u8}, None,
                                 op.location))
    block.ops = writer.ops


def _replace(op: Op, value: Value) -> None:
    """The result of the op is what this last op makes: nothing that uses it has to change."""
    last, old = value.op, op.results[0]
    assert last is not None
    last.results[0] = old
    old.move_to(last)


# Reading a whole register of codes, where the target widens one at once.

ALL_ROWS = 4
"""Rows of numbers whose codes fill a register."""
_PASSES = frozenset({name for name, row in LANE_OPS.rows.items() if row.pure and not row.blocks}) | {
    "load", "load_splat", "gather", "s_load", "prefetch"}
"""Ops that loads may be moved over."""


def join_loads(function: Function, count: int) -> None:
    """Loads of fp8 that lie side by side, so many rows of them, become one of their bytes and `widen_float8`, in place.
    For targets whose register holds just these, four rows, or two of e4m3 in each of its halves."""
    lanes = function.attributes["lanes"]
    formats = _FORMATS.keys() if count == ALL_ROWS else {f8e4m3}

    def visit(block: Block) -> None:
        open_loads: dict[tuple[object, ...], dict[int, Op]] = {}
        made: dict[Op, list[Op]] = {}
        gone: set[Op] = set()
        for op in block.ops:
            for inner in op.blocks:
                visit(inner)
            if op.name == "load" and op.attributes["dtype"] in formats and not op.attributes.get("masked"):
                a = op.attributes
                key = (*op.operands, a["dtype"], a.get("scale", 1), a.get("near", False))
                found = open_loads.setdefault(key, {})
                disp = a.get("disp", 0)
                found[disp] = op
                for start in range(disp - (count - 1) * lanes, disp + 1, lanes):
                    rows = [found.get(start + lanes * r) for r in range(count)]
                    if None not in rows:
                        _join([row for row in rows if row is not None], start, block, made, gone)
                        for r in range(count):
                            del found[start + lanes * r]
                        break
            elif op.name not in _PASSES:
                open_loads = {}
        if made:
            block.ops = [new for op in block.ops for new in made.get(op, () if op in gone else (op,))]

    visit(function.body)


def _join(rows: list[Op], start: int, block: Block, made: dict[Op, list[Op]], gone: set[Op]) -> None:
    """The first of them in the block gives way to both ops: what they read is the same for all."""
    first = min(rows, key=block.ops.index)
    attributes = {**first.attributes, "dtype": b32, "disp": start}
    if len(rows) < ALL_ROWS:
        attributes["twice"] = True
    wide = Op("load", first.operands, (ROW_B32,), attributes, None, first.location)
    apart = Op("widen_float8", [wide.result], (ROW_F32,) * len(rows), {"dtype": first.attributes["dtype"]}, None,
               first.location)
    for number, row in enumerate(rows):
        apart.results[number] = row.result
        row.result.move_to(apart)
    made[first] = [wide, apart]
    gone.update(rows)
