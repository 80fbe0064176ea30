"""What all selection rules of RISC-V share: elements, constants by key, moves, operands that may be scalars.

Enters: the driver (`s`, sapper/codegen/select.py: Selector). Holds: a constant is named by a key: ("s", element bytes,
bits) in every lane; ("f", bytes, bits) in a float register and ("x", number) in a general one, where a scalar operand
is meant; ("numbers", bits) the numbers of the lanes, ("places", what, bits) numbers of other lanes, ("bit", distance,
set) a mask of the lanes in whose numbers that bit is set, or clear.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...ir.nodes import Op, Value
from ...ir.types import DType, RowType, ScalarType
from ...ir.types import i32 as I32
from ..constants import constant_bits
from .registers import MASK

Key = tuple[Any, ...]
Rule = Callable[[Any, Op], None]
OwnConstants = Callable[[Any, Op], tuple[Key, ...]]

MIRRORED = {"eq": "eq", "ne": "ne", "lt": "gt", "gt": "lt", "le": "ge", "ge": "le"}
ZERO4: Key = ("s", 4, 0)
_GENERAL_CONSTANTS, _FLOAT_CONSTANTS = 4, 16
"""So many registers of either kind hold constants through a loop."""

SCALAR_PLACES: dict[str, tuple[int, ...]] = {
    "add": (0, 1), "sub": (0, 1), "mul": (0, 1), "div": (0, 1), "fma": (0, 1), "cmp": (0, 1), "and": (0, 1),
    "or": (0, 1), "xor": (0, 1), "select": (1,)}
"""Operands of which one may be a scalar, for nothing."""
SCALAR_SOURCES = frozenset({"splat_const", "load_splat", "splat"})


def scalar_values(function: Any) -> set[Value]:
    """Rows whose lanes are all equal, and that are only read where a scalar may stand: they live in a general or a
    float register."""
    taken: dict[Value, int] = {}
    used: dict[Value, int] = {}
    for op in function.walk():
        places = SCALAR_PLACES.get(op.name, ())
        for place, value in enumerate(op.operands):
            used[value] = used.get(value, 0) + 1
            if place in places and value.op is not None and value.op.name in SCALAR_SOURCES:
                other = op.operands[1 - place] if len(op.operands) > 1 and op.name != "select" else None
                # Of two scalars one would be spread for this op alone.
                if other is None or other.op is None or other.op.name not in SCALAR_SOURCES:
                    taken[value] = taken.get(value, 0) + 1
    return {value for value, count in taken.items() if count == used[value]}


def dtype_of(value: Value) -> DType:
    type_ = value.type
    return type_.dtype if isinstance(type_, RowType) else I32


def element(s: Any, dtype: DType) -> int:
    """Bits of the elements of a row."""
    if dtype.bits == 64 and s.lanes > s.facts.wide_lanes:
        raise ValueError(f"{s.location or s.function.name}: found {s.lanes} lanes of {dtype.name}; expected at most "
                         f"{s.facts.wide_lanes} on this target; mend: lower functions with 64-bit rows for fewer lanes")
    return 64 if dtype.bits == 64 else 32


def named(s: Any, name: str, value: Value) -> str:
    """The row of a name for the elements of a value."""
    return f"{name}.e{element(s, dtype_of(value))}"


# --- Constants --------------------------------------------------------------------------------------------------------

def constant_key(s: Any, value: Value) -> Key:
    """The key of a splat_const."""
    key: Key | None = s.facts.keys.get(value)
    if key is None:
        op = value.op
        assert op is not None
        dtype = dtype_of(value)
        key = s.facts.keys[value] = number_key(dtype.bits // 8, constant_bits(dtype, op.attributes["value"]))
        if value in s.facts.scalars:
            key = ("f", *key[1:]) if dtype.is_float else ("x", signed(key[2], dtype.bits))
            s.facts.keys[value] = key
    return key


def signed(number: int, bits: int) -> int:
    number &= (1 << bits) - 1
    return number - (1 << bits) if number >> (bits - 1) else number


def number_key(size: int, bits: int) -> Key:
    """The key of a number of so many bytes in every lane."""
    return ("s", size, bits)


def is_cheap(key: Key) -> bool:
    """Made by one instruction."""
    if key[0] == "x":
        return bool(-2048 <= key[1] < 2048)
    if key[0] == "f":
        return bool(key[2] == 0)
    return key[0] == "numbers" or (key[0] == "s" and -16 <= signed(key[2], 8 * key[1]) < 16)


def constant_kind(key: Key) -> str:
    return {"x": "gpr", "f": "fpr"}.get(key[0], "vec")


def make_constant(s: Any, key: Key, register: Any) -> None:
    _MAKERS[key[0]](s, register, *key[1:])


def _make_places(s: Any, register: Any, what: str, bits: int) -> None:
    """`even`, `odd`: of lanes that `unzip` takes. `low`, `high`: those that `zip` takes. A number d: of lanes i ^ d."""
    numbers, kind = s.new("vec"), f"e{bits}"
    s.emit(f"vid.v.{kind}", numbers)
    if what in ("even", "odd"):
        twice, turned = s.new("vec"), s.new("vec") if what == "odd" else register
        s.emit(f"vsll.vi.{kind}", twice, numbers, 1)
        s.emit(f"vand.vi.{kind}", turned, twice, s.lanes - 1)
        if what == "odd":
            s.emit(f"vor.vi.{kind}", register, turned, 1)
    elif what in ("low", "high"):
        half = s.new("vec") if what == "high" else register
        s.emit(f"vsrl.vi.{kind}", half, numbers, 1)
        if what == "high":
            s.emit(f"vor.vi.{kind}", register, half, s.lanes // 2)
    else:
        s.emit(f"vxor.vi.{kind}", register, numbers, what)


def _make_bit(s: Any, register: Any, distance: int, is_set: bool) -> None:
    numbers, bit = s.new("vec"), s.new("vec")
    s.emit("vid.v.e32", numbers)
    s.emit("vand.vi.e32", bit, numbers, distance)
    s.emit("vmsne.vi.e32" if is_set else "vmseq.vi.e32", register, bit, 0)


_MAKERS: dict[str, Callable[..., None]] = {
    "s": lambda s, register, size, bits: s.emit(f"vconst.e{8 * size}", register, signed(bits, 8 * size)),
    "f": lambda s, register, size, bits: s.emit(f"fconst.{8 * size}", register, signed(bits, 8 * size)),
    "x": lambda s, register, number: s.emit("li", register, number),
    "numbers": lambda s, register, bits: s.emit(f"vid.v.e{bits}", register),
    "places": _make_places, "bit": _make_bit,
}


def constant_room(s: Any, loop: Op, live_rows: int, hoisted: list[Key]) -> dict[str, int]:
    """How many more constants may live in registers through a loop that needs `live_rows` rows at once."""
    kinds = [constant_kind(key) for key in hoisted]
    return {"vec": s.facts.vector_registers - live_rows - kinds.count("vec") - 3,
            "fpr": _FLOAT_CONSTANTS - kinds.count("fpr"), "gpr": _GENERAL_CONSTANTS - kinds.count("gpr")}


def load_immediate(s: Any, register: Any, number: int) -> None:
    s.emit("li", register, signed(number, 64))


# --- Registers --------------------------------------------------------------------------------------------------------

def row(s: Any, value: Value) -> Any:
    """A row in a vector register: where it is, or spread from a scalar's."""
    register = s.vector(value)
    if register.kind == "vec":
        return register
    made = s.new("vec")
    s.emit(named(s, "vfmv.v.f" if register.kind == "fpr" else "vmv.v.x", value), made, register)
    return made


def immediate_of(s: Any, value: Value) -> int | None:
    """The number of an integer constant that is no row and fits five bits."""
    op = value.op
    if value not in s.facts.scalars or op is None or op.name != "splat_const" or dtype_of(value).is_float:
        return None
    number: int = constant_key(s, value)[1]
    return number if -16 <= number < 16 else None


def scalar_kind(register: Any) -> str:
    """What a name ends with whose last operand is in that register: v, x or f."""
    return {"vec": "v", "gpr": "x", "fpr": "f"}[register.kind]


def copy_row(s: Any, destination: Any, source: Any) -> None:
    s.emit("vmv1r.v", destination, source)


def move(s: Any, destination: Any, source: Any, type_: Any) -> None:
    if isinstance(type_, ScalarType):
        s.emit("mv", destination, source)
    else:
        copy_row(s, destination, source)


def bring(s: Any, value: Value, register: Any) -> None:
    """Copy or make a row in a given register."""
    op = value.op
    if value not in s.registers and op is not None and op.name == "splat_const":
        key = constant_key(s, value)
        if key[0] == "s" and key not in s.hoisted:
            make_constant(s, key, register)
            return
    copy_row(s, register, row(s, value))


def deliver(s: Any, result: Value, made: Any) -> None:
    """A fresh register is the result, or goes where that is wanted."""
    if s.target.get(result) is None:
        s.registers[result] = made
    else:
        copy_row(s, s.define(result), made)


def apart(s: Any) -> Any:
    """A fresh vector register that will be none of those that the instruction which writes it reads."""
    made = s.new("vec")
    s.emit("undefined", made)
    return made


def mask_register(s: Any) -> Any:
    """v0, for a mask that the next instructions take and nobody else."""
    return s.physical("vec", MASK)


def mask_on(s: Any, mask: Any) -> None:
    """The next instructions take this mask."""
    s.emit("vmv1r.v.mask", mask)
