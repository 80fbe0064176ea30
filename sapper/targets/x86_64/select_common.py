"""What all selection rules of x86-64 share: dtypes and widths, constants by key, moves.

Enters: the driver (`s`, sapper/codegen/select.py: Selector). Holds: a constant is named by a key: ("s", element bytes,
bits) in every lane, ("d", bytes) a whole register, ("k", bits) an opmask.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

from ...ir.nodes import Op, Value
from ...ir.types import DType, MaskType, RowType, ScalarType, TileRegisterType
from ...ir.types import i32 as I32
from ..constants import constant_bits

Key = tuple[Any, ...]
Rule = Callable[[Any, Op], None]
OwnConstants = Callable[[Any, Op], tuple[Key, ...]]

FLOAT = {"f32": "ps", "f64": "pd"}
INTEGER = {"i32": "d", "i64": "q", "b32": "d"}
MIRRORED = {"eq": "eq", "ne": "ne", "lt": "gt", "gt": "lt", "le": "ge", "ge": "le"}
ZERO4: Key = ("s", 4, 0)
ONES: Key = ("s", 4, 0xFFFFFFFF)

FOLDED_DTYPES = frozenset(["f32", "f64", "i32", "i64", "b32"])
"""Memory dtypes whose loads may become memory operands: those that are the row's own."""


def dtype_of(value: Value) -> DType:
    type_ = value.type
    return type_.dtype if isinstance(type_, RowType) else I32


def bits_of(s: Any, dtype: DType) -> int:
    """Register bits of a row."""
    facts = s.facts
    if dtype.bits == 32:
        return int(facts.bits4)
    if facts.bits8 > facts.vector_bits:
        raise ValueError(f"{s.location or s.function.name}: found {s.lanes} lanes of {dtype.name}; expected at most "
                         f"{facts.vector_bits // 64} on this target; mend: lower functions with 64-bit rows for "
                         "fewer lanes")
    return int(facts.bits8)


def constant_key(s: Any, value: Value) -> Key:
    """The key of a splat_const."""
    key: Key | None = s.facts.keys.get(value)
    if key is None:
        op = value.op
        assert op is not None
        dtype = dtype_of(value)
        bits = constant_bits(dtype, op.attributes["value"])
        if bits == 0:
            key = ZERO4
        elif bits == (1 << dtype.bits) - 1:
            key = ONES
        else:
            key = ("s", dtype.bits // 8, bits)
        s.facts.keys[value] = key
    return key


def is_cheap(key: Key) -> bool:
    """Made by one instruction without a load."""
    return key in (ZERO4, ONES)


def constant_kind(key: Key) -> str:
    return "mask" if key[0] == "k" else "vec"


def constant_memory(s: Any, key: Key) -> Any:
    facts = s.facts
    if key[0] == "d":
        return s.memory(None, label=s.constant_label(len(key[1]), key[1]))
    size = key[1]
    data = key[2].to_bytes(size, "little")
    if facts.opmask:
        return s.memory(None, broadcast=True, label=s.constant_label(size, data))
    data *= (facts.bits4 if size == 4 else facts.bits8) // 8 // size
    return s.memory(None, label=s.constant_label(len(data), data))


def make_constant(s: Any, key: Key, register: Any) -> None:
    facts = s.facts
    if key[0] == "k":
        number = s.new("gpr")
        load_immediate(s, number, key[1])
        s.emit("kmovw.to_mask" if key[1] < 1 << 16 else "kmovd.to_mask", register, number)
    elif key == ZERO4:
        s.emit("vxorps.128", register, register, register)
    elif key == ONES:
        if facts.opmask:
            s.emit(f"vpternlogd.{facts.vector_bits}", register, register, register, 0xFF)
        else:
            s.emit(f"vpcmpeqd.{facts.vector_bits}", register, register, register)
    elif key[0] == "d":
        s.emit(f"vmovups.{len(key[1]) * 8}", register, constant_memory(s, key))
    else:
        size = key[1]
        label = s.constant_label(size, key[2].to_bytes(size, "little"))
        if size == 4:
            s.emit(f"vbroadcastss.{facts.bits4}", register, s.memory(None, label=label))
        else:
            s.emit(f"vbroadcastsd.{facts.bits8}", register, s.memory(None, label=label))


_OF_SUMS = frozenset({"load", "load_splat", "bitcast", "add", "mul", "fma", "max_u8", "s_add", "s_mul", "s_const",
                      "splat_const", "prefetch", "yield"})
"""Ops whose rules take no registers but for their operands and results, as `widen_float8` that is `scaled`."""

_SPARE = 3
"""Registers left to what rules need besides, and to moves."""


def widens_by_bytes(s: Any, op: Op) -> bool:
    """Whether a row of bf16 is widened by VPSHUFB. VPMOVZXWD crosses the halves of a register, which are two operations
    on a Zen 3, and leaves a shift to do."""
    return (op.attributes["dtype"].name == "bf16" and not op.attributes.get("masked") and not s.facts.opmask
            and s.facts.bits4 == 256)


def constant_room(s: Any, loop: Op, live_rows: int, hoisted: list[Key]) -> dict[str, int]:
    """How many more constants may live in registers through a loop that needs `live_rows` rows at once.

    Loops that add up fp8 (lane/float8_sums.py) do with those, and what they do not touch gives way to constants: 8 sums
    and the greatest code leave room for all of these. Else they are three loads more for 16 numbers, where a Zen 3 does
    two in a cycle: from memory one row takes 0.87 of the time, 2 rows 0.95, 4 0.96, in the caches 0.85, 0.91, 0.97.
    Likewise those that add up products of bf16, which take one register to widen them: one row by 4096 x 4096 takes
    0.95 of the time, from the caches 0.79 to 0.85."""
    masks = sum(1 for key in hoisted if key[0] == "k")
    others = [op for op in loop.blocks[0].ops if op.name not in _OF_SUMS]
    adds_up = others and all(op.name == "widen_float8" and op.attributes.get("scaled") for op in others)
    widens = all(op.name == "s_sub" for op in others) and any(
        op.name == "load" and widens_by_bytes(s, op) for op in loop.blocks[0].ops)
    spare = -s.passing(loop) if adds_up else 1 - s.passing(loop) if widens else _SPARE
    return {"vec": s.facts.vector_registers - live_rows - (len(hoisted) - masks) - spare, "mask": 4 - masks}


def iota_key(s: Any) -> Key:
    return ("d", struct.pack(f"<{s.lanes}i", *range(s.lanes)))


def index_key(indices: list[int], size: int) -> Key:
    return ("d", struct.pack(f"<{len(indices)}{'i' if size == 4 else 'q'}", *indices))


def move(s: Any, destination: Any, source: Any, type_: Any) -> None:
    if isinstance(type_, ScalarType):
        s.emit("mov.64", destination, source)
    elif isinstance(type_, MaskType):
        if s.facts.opmask:
            s.emit("kmovq", destination, source)
        else:
            s.emit(f"vmovaps.{s.facts.bits4}", destination, source)
    elif isinstance(type_, TileRegisterType):
        raise ValueError(f"{s.function.name}: found a tile that must be copied to another; expected sums that are "
                             "carried in place, as no instruction copies tiles; mend: store and load it")
    else:
        s.emit(f"vmovaps.{bits_of(s, type_.dtype)}", destination, source)


def load_immediate(s: Any, register: Any, number: int) -> None:
    number = (number + 2**63) % 2**64 - 2**63
    if number == 0:
        s.emit("xor.32", register, register)
    elif 0 < number < 2**32:
        s.emit("mov.32", register, number)
    else:
        s.emit("mov.64", register, number)


def copy_constant(s: Any, result: Value, key: Key) -> None:
    register = s.define(result)
    hoisted = s.hoisted.get(key)
    if hoisted is not None:
        s.emit(f"vmovaps.{bits_of(s, dtype_of(result))}", register, hoisted)
    else:
        make_constant(s, key, register)
