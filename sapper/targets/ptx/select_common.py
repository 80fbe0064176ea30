"""What all selection rules of PTX share: dtypes, constants by key, a value as a source or as a result, moves.

Enters: the driver (`s`, sapper/codegen/select.py: Selector). Holds: a constant is named by a key, (bits of its
register, its content), and stands in the instruction that uses it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...ir.nodes import Op, Value
from ...ir.types import DType, MaskType, RowType, ScalarType
from ..constants import constant_bits

Key = tuple[Any, ...]
Rule = Callable[[Any, Op], None]
ALL_LANES = 0xFFFFFFFF
"""The threads that take part in a shuffle or a vote: all of the warp."""


# --- Types -----------------------------------------------------------------------------------------------------------

def dtype_of(value: Value) -> DType:
    assert isinstance(value.type, RowType)
    return value.type.dtype


def bits_of(value: Value) -> int:
    return dtype_of(value).bits


def arithmetic_type(value: Value) -> str:
    """The type by which an instruction computes with a row: f32, f64, s32, s64."""
    dtype = dtype_of(value)
    return dtype.name if dtype.is_float else f"s{dtype.bits}"


# --- Constants -------------------------------------------------------------------------------------------------------

def constant_key(s: Any, value: Value) -> Key:
    """(bits of the register, its content) of a splat_const."""
    del s
    op = value.op
    assert op is not None
    dtype = dtype_of(value)
    return dtype.bits, constant_bits(dtype, op.attributes["value"])


def is_cheap(key: Key) -> bool:
    del key
    return True


def constant_kind(key: Key) -> str:
    return "vec" if key[0] == 32 else "wide"


def make_constant(s: Any, key: Key, register: Any) -> None:
    s.emit(f"mov.b{key[0]}", register, key[1])


def constant_room(s: Any, loop: Op, live_rows: int, hoisted: list[Key]) -> dict[str, int]:
    """None: instructions hold their constants."""
    del s, live_rows, hoisted
    return {}


# --- Sources and results ---------------------------------------------------------------------------------------------

def row(s: Any, value: Value) -> Any:
    """A row as a source: its register, or its bits where it is a constant."""
    op = value.op
    if op is not None and op.name == "splat_const" and value not in s.registers:
        return constant_key(s, value)[1]
    return s.vector(value)


def scalar(s: Any, value: Value) -> Any:
    """A scalar as a source: its register, or the number."""
    number = s.constant_of(value)
    return s.scalar(value) if number is None else number


def low_half(s: Any, value: Value) -> Any:
    """The low 32 bits of a scalar as a source."""
    number = s.constant_of(value)
    if number is not None:
        return number
    made = s.new("vec")
    s.emit("cvt.u32.u64", made, s.scalar(value))
    return made


def settle(s: Any, value: Value, made: Any) -> None:
    """`value` is in the fresh register `made`, and goes to the register it was meant for, if there is one."""
    wanted = s.target.get(value)
    if wanted is None:
        s.registers[value] = made
    else:
        move(s, s.define(value), made, value.type)


def move(s: Any, destination: Any, source: Any, type_: Any) -> None:
    if isinstance(type_, MaskType):
        s.emit("mov.pred", destination, source)
    elif isinstance(type_, ScalarType) or type_.dtype.bits == 64:
        s.emit("mov.b64", destination, source)
    else:
        s.emit("mov.b32", destination, source)


def load_immediate(s: Any, register: Any, number: int) -> None:
    s.emit("mov.b64", register, number)
