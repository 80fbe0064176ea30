"""Selection rules of x86-64: conversions between dtypes, and rounding to narrower ones.

See select.py. Source: Intel SDM volume 2; the manual's operand order throughout.
"""

from __future__ import annotations

from typing import Any

from ...ir.nodes import Op
from ...ir.types import DType
from .select_common import Key, OwnConstants, Rule, bits_of, dtype_of
from .select_float8 import FLOAT8, ROUNDING, UNPACKING, packing_constants, round_row, widen_register, widening_constants
from .select_lanes import alias, insert_half, lanes_in, lanes_out, quarters
from .select_masks import narrow_mask

_CONVERSIONS = {
    ("f32", "f64"): "vcvtps2pd", ("f64", "f32"): "vcvtpd2ps", ("f32", "i32"): "vcvttps2dq",
    ("i32", "f32"): "vcvtdq2ps", ("f64", "i32"): "vcvttpd2dq", ("i32", "f64"): "vcvtdq2pd",
    ("f32", "i64"): "vcvttps2qq", ("i64", "f32"): "vcvtqq2ps", ("f64", "i64"): "vcvttpd2qq",
    ("i64", "f64"): "vcvtqq2pd", ("i32", "i64"): "vpmovsxdq", ("i64", "i32"): "vpmovqd"}
"""Each name takes the length of the wider side."""


def convert(s: Any, op: Op) -> None:
    value, result = op.operands[0], op.results[0]
    source, destination = dtype_of(value), dtype_of(result)
    if source.name == destination.name:
        alias(s, op)
        return
    bits = max(bits_of(s, source), bits_of(s, destination))
    pair = (source.name, destination.name)
    row = s.vector(value)
    if op.attributes.get("nearest"):
        s.emit(f"vcvtps2dq.{bits}", s.define(result), row)
    elif s.facts.opmask or "i64" not in pair or pair == ("i32", "i64"):
        s.emit(f"{_CONVERSIONS[pair]}.{bits}", s.define(result), row)
    elif pair == ("i64", "i32"):
        narrow_mask(s, row, s.define(result))
    elif source.name == "i64":
        # One lane after the other: the instruction of all lanes came with AVX-512.
        _scalar_floats(s, lanes_out(s, row, 8), destination, s.define(result))
    else:
        if source.name == "f32":
            wide = s.new("vec")
            s.emit(f"vcvtps2pd.{bits}", wide, row)  # exact
            row = wide
        integers = []
        for part in quarters(s, row, bits):
            for number in range(2):
                if number:
                    upper = s.new("vec")
                    s.emit("vunpckhpd.128", upper, part, part)
                    part = upper
                register = s.new("gpr")
                s.emit("vcvttsd2si.64", register, part)
                integers.append(register)
        lanes_in(s, integers, 8, s.define(result))


def _scalar_floats(s: Any, integers: list[Any], dtype: DType, into: Any) -> None:
    """64-bit integers in general registers to a row of floats, each rounded once."""
    name = "vcvtsi2sd.64" if dtype.bits == 64 else "vcvtsi2ss.64"
    made = []
    for integer in integers:
        register = s.new("vec")
        s.emit("vxorps.128", register, register, register)
        s.emit(name, register, register, integer)
        made.append(register)
    if dtype.bits == 64:
        low, high = s.new("vec"), s.new("vec")
        s.emit("vunpcklpd.128", low, made[0], made[1])
        s.emit("vunpcklpd.128", high, made[2], made[3])
        insert_half(s, into, low, high, 256)
    else:
        low, high = s.new("vec"), s.new("vec")
        s.emit("vunpcklps.128", low, made[0], made[1])
        s.emit("vunpcklps.128", high, made[2], made[3])
        s.emit("vunpcklpd.128", into, low, high)


_BF16_KEYS: tuple[Key, ...] = (("s", 4, 1), ("s", 4, 0x7FFF), ("s", 4, 0x7FC00000))
_BF16_MASK: Key = ("s", 4, 0xFFFF0000)


_DENORMAL = 0x20
"""The class of vfpclassps."""


def is_denormal(s: Any, op: Op) -> None:
    s.emit(f"vfpclassps.{s.facts.bits4}", s.define(op.results[0]), s.vector(op.operands[0]), _DENORMAL)


def concat_bf16(s: Any, op: Op) -> None:
    first, second = (s.vector(v) for v in op.operands)
    s.emit(f"vcvtne2ps2bf16.{s.facts.bits4}", s.define(op.results[0]), second, first)


def pack2(s: Any, op: Op) -> None:
    """Two rows of f32 rounded to bf16 in the halves of slots. What lies below the upper ones is cut off."""
    if op.attributes["dtype"].name != "bf16":
        raise ValueError(f"{s.location or s.function.name}: pack2 to {op.attributes['dtype'].name}: found no row for "
                         "it; expected bf16; mend: store the rows one by one")
    low, high = (round_bfloat16(s, s.vector(value)) for value in op.operands)
    moved, made = s.new("vec"), s.define(op.results[0])
    s.emit(f"vpsrld.imm.{s.facts.bits4}", made if s.facts.opmask else moved, low, 16)
    if s.facts.opmask:
        s.emit(f"vpternlogd.{s.facts.bits4}", made, high, s.constant_operand(_BF16_MASK), 0xF8)  # made | high & mask
    else:
        s.emit(f"vpblendw.{s.facts.bits4}", made, moved, high, 0xAA)


def round_bfloat16(s: Any, row: Any) -> Any:
    """f32 row -> a fresh register whose upper halves are the bf16 nearest, ties to even; the lower halves are waste.

    vcvtneps2bf16 takes denormals for 0 (SDM volume 2), which bf16 has: it serves stores that say that there are none.
    Adding 0x7fff and the last bit that is kept carries into it exactly where rounding up is due. NaN becomes the quiet
    NaN of its sign; where none has bits that could be carried, it stays as it is.
    """
    bits = s.facts.bits4
    letter = "d" if s.facts.opmask else ""
    odd, rounded = s.new("vec"), s.new("vec")
    s.emit(f"vpsrld.imm.{bits}", odd, row, 16)
    s.emit(f"vpand{letter}.{bits}", odd, odd, s.constant_operand(_BF16_KEYS[0]))
    s.emit(f"vpaddd.{bits}", odd, odd, s.constant_operand(_BF16_KEYS[1]))
    s.emit(f"vpaddd.{bits}", rounded, row, odd)
    # A NaN must not be carried to infinity: its own bits with the quiet bit set stand instead.
    if s.facts.short_nans:
        return rounded
    if s.facts.opmask:
        nan = s.new("mask")
        s.emit(f"vcmpps.k.{bits}", nan, row, row, 3)
        s.emit_masked(f"vpord.{bits}", nan, False, rounded, row, s.constant_operand(_BF16_KEYS[2]))
        return rounded
    quiet, nan, chosen = s.new("vec"), s.new("vec"), s.new("vec")
    s.emit(f"vpor.{bits}", quiet, row, s.constant_operand(_BF16_KEYS[2]))
    s.emit(f"vcmpps.{bits}", nan, row, row, 3)
    s.emit(f"vblendvps.{bits}", chosen, rounded, quiet, nan)
    return chosen


def round_to(s: Any, op: Op) -> None:
    row = s.vector(op.operands[0])
    bits = s.facts.bits4
    name = op.attributes["dtype"].name
    if name in FLOAT8:
        round_row(s, name, s.define(op.results[0]), row)
        return
    if name == "f16":
        half = s.new("vec")
        s.emit(f"vcvtps2ph.{bits}", half, row, 0)
        s.emit(f"vcvtph2ps.{bits}", s.define(op.results[0]), half)
        return
    rounded = round_bfloat16(s, row)
    s.emit(f"vpand{'d' if s.facts.opmask else ''}.{bits}", s.define(op.results[0]), rounded,
           s.constant_operand(_BF16_MASK))


def rounding_constants(s: Any, op: Op) -> tuple[Key, ...]:
    name = op.attributes["dtype"].name
    if name in FLOAT8:
        return (*ROUNDING[name], *UNPACKING[name]) if op.name == "round_to" else packing_constants(s, name)
    if name != "bf16" or op.attributes.get("exact") or op.attributes.get("denormals"):
        return ()  # What is rare takes them from memory.
    keys = _BF16_KEYS[:2] if s.facts.short_nans else _BF16_KEYS
    return (*keys, _BF16_MASK) if op.name == "round_to" or (op.name == "pack2" and s.facts.opmask) else keys


RULES: dict[str, Rule] = {
    "cvt": convert, "round_to": round_to, "is_denormal": is_denormal, "concat_bf16": concat_bf16,
    "pack2": pack2,
    "widen_float8": widen_register,
}

OWN_CONSTANTS: dict[str, OwnConstants] = {
    "round_to": rounding_constants, "pack2": rounding_constants,
    "widen_float8": widening_constants,
}
