"""What all selection rules of AArch64 share: dtypes and arrangements, constants by key, moves, addresses.

Enters: the driver (`s`, sapper/codegen/select.py: Selector). Holds: a constant is named by a key: ("s", element bytes,
bits) in every lane, ("d", bytes) a whole register. A row of 32-bit elements has four lanes, or two in the lower half
of a register where the function has rows of 64-bit elements.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

from ...ir.nodes import Op, Value
from ...ir.types import DType, RowType, ScalarType
from ...ir.types import i32 as I32
from ..constants import constant_bits

Key = tuple[Any, ...]
Rule = Callable[[Any, Op], None]
OwnConstants = Callable[[Any, Op], tuple[Key, ...]]

MIRRORED = {"eq": "eq", "ne": "ne", "lt": "gt", "gt": "lt", "le": "ge", "ge": "le"}
ZERO4: Key = ("s", 4, 0)
ONES: Key = ("s", 4, 0xFFFFFFFF)
VECTOR_BYTES = 16
_STEP = 1 << 12
"""Immediates of sums: 12 bits, or 12 more above them."""


def dtype_of(value: Value) -> DType:
    type_ = value.type
    return type_.dtype if isinstance(type_, RowType) else I32


def arrangement(s: Any, dtype: DType) -> str:
    """How the elements of a row lie in a register."""
    if dtype.bits == 32:
        return str(s.facts.narrow)
    if s.lanes > 2:
        raise ValueError(f"{s.location or s.function.name}: found {s.lanes} lanes of {dtype.name}; expected at most 2 "
                         "on this target; mend: lower functions with 64-bit rows for fewer lanes")
    return "2d"


def constant_key(s: Any, value: Value) -> Key:
    """The key of a splat_const."""
    key: Key | None = s.facts.keys.get(value)
    if key is None:
        op = value.op
        assert op is not None
        dtype = dtype_of(value)
        bits = constant_bits(dtype, op.attributes["value"])
        key = s.facts.keys[value] = number_key(dtype.bits // 8, bits)
    return key


def number_key(size: int, bits: int) -> Key:
    """The key of a number of so many bytes in every lane."""
    if bits == 0:
        return ZERO4
    return ONES if bits == (1 << 8 * size) - 1 else ("s", size, bits)


def _one_byte(key: Key) -> int | None:
    """The shift of the only byte that is not 0, of a number of 32 bits; None if there are several."""
    if key[:2] != ("s", 4):
        return None
    return next((shift for shift in (0, 8, 16, 24) if key[2] & ~(0xFF << shift) == 0), None)


def is_cheap(key: Key) -> bool:
    """Made by one instruction without a load."""
    return key == ONES or _one_byte(key) is not None


def constant_kind(key: Key) -> str:
    del key
    return "vec"


def make_constant(s: Any, key: Key, register: Any) -> None:
    shift = _one_byte(key)
    if key == ZERO4:
        s.emit("movi.zero", register)
    elif key == ONES:
        s.emit("movi.ones", register)
    elif shift is not None:
        s.emit(f"movi.4s.{shift}", register, key[2] >> shift)
    else:
        data = key[1] if key[0] == "d" else key[2].to_bytes(key[1], "little") * (VECTOR_BYTES // key[1])
        s.emit("ldr.q" if len(data) == VECTOR_BYTES else "ldr.d", register,
               s.memory(None, label=s.constant_label(len(data), data)))


def constant_room(s: Any, loop: Op, live_rows: int, hoisted: list[Key]) -> dict[str, int]:
    """How many more constants may live in registers through a loop that needs `live_rows` rows at once."""
    return {"vec": s.facts.vector_registers - live_rows - len(hoisted) - 3}


def iota_key(s: Any) -> Key:
    return ("d", struct.pack(f"<{s.lanes}i", *range(s.lanes)))


def copy_row(s: Any, destination: Any, source: Any) -> None:
    s.emit("mov.16b", destination, source)


def move(s: Any, destination: Any, source: Any, type_: Any) -> None:
    if isinstance(type_, ScalarType):
        s.emit("mov.64", destination, source)
    else:
        copy_row(s, destination, source)


def bring(s: Any, value: Value, register: Any) -> None:
    """Copy or make a row in a given register."""
    op = value.op
    if value not in s.registers and op is not None and op.name == "splat_const":
        key = constant_key(s, value)
        if key not in s.hoisted:
            make_constant(s, key, register)
            return
    copy_row(s, register, s.vector(value))


def load_immediate(s: Any, register: Any, number: int) -> None:
    """By pieces of 16 bits; those that are all ones, or 0, take no instruction if there are more of them."""
    number %= 1 << 64
    pieces = [(number >> 16 * place) & 0xFFFF for place in range(4)]
    negative = pieces.count(0xFFFF) > pieces.count(0)
    rest = [place for place, piece in enumerate(pieces) if piece != (0xFFFF if negative else 0)] or [0]
    first = rest[0]
    s.emit("movn.64" if negative else "movz.64", register, pieces[first] ^ (0xFFFF if negative else 0), 16 * first)
    for place in rest[1:]:
        s.emit("movk.64", register, pieces[place], 16 * place)


def is_sum_immediate(number: int) -> bool:
    """Whether it is added, or compared with, as it is."""
    return 0 <= number < _STEP or (number % _STEP == 0 and 0 <= number < _STEP * _STEP)


def add_number(s: Any, destination: Any, source: Any, number: int) -> None:
    """destination = source + number; they may be one register."""
    name, size = ("add", number) if number >= 0 else ("sub", -number)
    if is_sum_immediate(size):
        s.emit(f"{name}.imm.64", destination, source, size)
    elif size < _STEP * _STEP:
        between = s.new("gpr")
        s.emit(f"{name}.imm.64", between, source, size // _STEP * _STEP)
        s.emit(f"{name}.imm.64", destination, between, size % _STEP)
    else:
        other = s.new("gpr")
        load_immediate(s, other, number)
        s.emit("add.64", destination, source, other)


def _reaches(disp: int, size: int) -> bool:
    return -256 <= disp < 256 or (disp % size == 0 and 0 <= disp < size * _STEP)


def place(s: Any, base: Any, disp: int, size: int) -> Any:
    """Memory of `size` bytes at base + disp, by a sum before it where a load does not reach that far."""
    if _reaches(disp, size):
        return s.memory(base, disp=disp)
    near = s.new("gpr")
    rest = disp % _STEP
    if not _reaches(rest, size):
        rest = 0
    add_number(s, near, base, disp - rest)
    return s.memory(near, disp=rest)


def address(s: Any, op: Op, at: int, size: int) -> Any:
    """The memory operand of an op whose base is operand `at`, for so many bytes."""
    base, index, _, disp = s.address_parts(op, at)
    assert index is None, "the target says that addresses have none"
    return place(s, s.scalar(base), disp, size)


def part(s: Any, memory: Any, bytes_: int, size: int) -> Any:
    """Memory of `size` bytes so far behind the start of another operand."""
    return place(s, memory.base, memory.disp + bytes_, size)
