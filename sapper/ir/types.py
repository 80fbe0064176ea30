"""Element types, and the types of IR values.

A value is a scalar, a tile (a scalar is a tile without axes), a kernel's tensor argument, or, below the tile
stage, a lane-machine scalar, register row or mask.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Union

Dim = Union[str, int, tuple[str, "Dim", "Dim"]]
"""One extent of a tensor: the name of a symbolic dimension, a static size, or what is computed of such: (op, left,
right), op a key of SYMBOLS."""

SYMBOLS = {"add": "+", "sub": "-", "mul": "*", "floordiv": "//", "mod": "%"}


def spell_nested(value: Any) -> str:
    """An extent (a list for a tuple is as good), as its author would write it."""
    if not isinstance(value, (list, tuple)):
        return str(value)
    op, *sides = value
    if op == "add" and isinstance(sides[0], int) and sides[0] < 0:
        op, sides = "sub", [sides[1], -sides[0]]
    if op not in SYMBOLS:
        return f"{op}({', '.join(map(spell_nested, sides))})"
    left, right = (f"({spell_nested(s)})" if isinstance(s, (list, tuple)) else str(s) for s in sides)
    return f"-{right}" if op == "sub" and left == "0" else f"{left} {SYMBOLS[op]} {right}"


@dataclass(frozen=True, slots=True, eq=False)
class DType:
    """An element type: one of those below, so that `is` and `==` say the same.

    kind: "f" floating, "i" signed, "u" unsigned, "b" boolean, "x" index.
    bits: of a value. A boolean takes one byte in memory, and so does an i4, as ml_dtypes holds it (pairs in one byte
    are bits of a u8). "index" never lies in memory.
    compute: False for types that may be stored and cast, but not computed with yet (fp8, i4).
    """

    name: str
    kind: str
    bits: int
    compute: bool = True

    @property
    def size_bytes(self) -> int:
        return -(-self.bits // 8)

    @property
    def is_float(self) -> bool:
        return self.kind == "f"

    @property
    def is_integer(self) -> bool:
        return self.kind in "iux"

    def __repr__(self) -> str:
        return self.name

    def __reduce__(self) -> str:
        """The name of the global below: what is copied or comes from another process is that very type."""
        return "bool_" if self.name == "bool" else self.name


f64 = DType("f64", "f", 64)
f32 = DType("f32", "f", 32)
f16 = DType("f16", "f", 16)
bf16 = DType("bf16", "f", 16)
f8e4m3 = DType("f8e4m3", "f", 8, compute=False)
f8e5m2 = DType("f8e5m2", "f", 8, compute=False)
i64 = DType("i64", "i", 64)
i32 = DType("i32", "i", 32)
i16 = DType("i16", "i", 16)
i8 = DType("i8", "i", 8)
i4 = DType("i4", "i", 4, compute=False)
u8 = DType("u8", "u", 8)
bool_ = DType("bool", "b", 8)
FLOAT8 = (f8e4m3, f8e5m2)
NARROW_FLOATS = (bf16, f16, *FLOAT8)
"""Floats whose rows are rows of f32 that hold values of the type."""
index = DType("index", "x", 64)
"""Dimensions, loop indices and coordinates. A scalar index has 64 bits; a tile of them holds 32 in each lane,
which is enough because no dimension may exceed 2**31 - 1."""

DTYPES: dict[str, DType] = {
    d.name: d for d in (f64, f32, f16, bf16, f8e4m3, f8e5m2, i64, i32, i16, i8, i4, u8, bool_, index)
}


@dataclass(frozen=True, slots=True)
class TileType:
    """A tile: element type and the names of the axes that it spans. A scalar spans none."""

    dtype: DType
    axes: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.dtype.name}[{', '.join(self.axes)}]" if self.axes else self.dtype.name


@dataclass(frozen=True, slots=True)
class TensorType:
    """A tensor argument: element type and extents. Strides are known at the call."""

    dtype: DType
    dims: tuple[Dim, ...]

    def __str__(self) -> str:
        return f"tensor<{', '.join([self.dtype.name, *map(spell_nested, self.dims)])}>"


@dataclass(frozen=True, slots=True)
class ScalarType:
    """Lane IR: one 64-bit integer, the same for all lanes (also addresses and truth values, 0 or 1)."""

    def __str__(self) -> str:
        return "s64"


class RowType:
    """Lane IR: one element in each lane. There is one object of each, so that `is` and `==` say the same.

    dtype: f32, i32, f64, i64, or b32 (32 bits of packed narrow elements).
    """

    __slots__ = ("dtype",)

    dtype: DType
    made: ClassVar[dict[DType, RowType]] = {}

    def __new__(cls, dtype: DType) -> RowType:
        found = cls.made.get(dtype)
        if found is None:
            found = super().__new__(cls)
            found.dtype = dtype
            found = cls.made.setdefault(dtype, found)   # another thread may have been faster
        return found

    def __repr__(self) -> str:
        return f"RowType({self.dtype!r})"

    def __reduce__(self) -> tuple[type[RowType], tuple[DType]]:
        return RowType, (self.dtype,)

    def __str__(self) -> str:
        return f"row<{self.dtype.name}>"


@dataclass(frozen=True, slots=True)
class MaskType:
    """Lane IR: one truth value in each lane."""

    def __str__(self) -> str:
        return "mask"


@dataclass(frozen=True, slots=True)
class TileRegisterType:
    """Lane IR: a matrix register, of so many rows of so many 32-bit elements as the function's attribute `tile` says.

    dtype: f32, i32, or b32 (32 bits of packed narrow elements).
    """

    dtype: DType

    def __str__(self) -> str:
        return f"tile<{self.dtype.name}>"


b32 = DType("b32", "u", 32)
"""A 32-bit slot of packed narrow elements (two bf16, four i8); lane IR only."""

Type = Union[TileType, TensorType, ScalarType, RowType, MaskType, TileRegisterType]

S64 = ScalarType()
MASK = MaskType()
ROW_F32 = RowType(f32)
ROW_I32 = RowType(i32)
ROW_F64 = RowType(f64)
ROW_I64 = RowType(i64)
ROW_B32 = RowType(b32)
TILE_F32 = TileRegisterType(f32)
TILE_I32 = TileRegisterType(i32)
TILE_B32 = TileRegisterType(b32)
