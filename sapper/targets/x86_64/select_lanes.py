"""Selection rules of x86-64: rows made from scalars and constants, taken apart and joined, shuffled between lanes.

See select.py. Source: Intel SDM volume 2; the manual's operand order throughout.
"""

from __future__ import annotations

import struct
from typing import Any

from ...ir.nodes import Op, Value
from ...ir.types import DType, i64
from .select_common import (
    ZERO4,
    Key,
    OwnConstants,
    Rule,
    bits_of,
    constant_key,
    copy_constant,
    dtype_of,
    index_key,
    iota_key,
    make_constant,
)
from .select_float8 import FLOAT8, unpack
from .select_scalars import SCALAR_LOADS


def splat(s: Any, op: Op) -> None:
    result = op.results[0]
    dtype = dtype_of(result)
    bits = bits_of(s, dtype)
    number = s.constant_of(op.operands[0])
    if number is not None:
        number &= (1 << dtype.bits) - 1
        key = ZERO4 if number == 0 else ("s", dtype.bits // 8, number)
        make_constant(s, key, s.define(result))
        return
    splat_register(s, s.scalar(op.operands[0]), s.define(result), dtype.bits // 8, bits)


def splat_register(s: Any, source: Any, register: Any, size: int, bits: int) -> None:
    """A general register's low bytes into every lane."""
    letter = "d" if size == 4 else "q"
    if s.facts.opmask:
        s.emit(f"vpbroadcast{letter}.general.{bits}", register, source)
    else:
        low = s.new("vec")
        s.emit(f"vmov{letter}.to_vec", low, source)
        s.emit(f"vpbroadcast{letter}.{bits}", register, low)


def iota(s: Any, op: Op) -> None:
    copy_constant(s, op.results[0], iota_key(s))


def _table_keys(s: Any, op: Op) -> tuple[Key, ...]:
    """The table; without opmasks its halves."""
    table = op.attributes["table"]
    parts = [table] if s.facts.opmask else [table[:8], table[8:]]
    return tuple([("d", struct.pack(f"<{len(part)}f", *part)) for part in parts])


def lookup(s: Any, op: Op) -> None:
    """VPERMPS takes the low 4 bits of each index. 512 bits, as the table has; lanes beyond the row's mean nothing.
    Of 256 bits it takes the low 3, and the fourth, as a sign, chooses between halves of the table."""
    index, tables = s.vector(op.operands[0]), _table_keys(s, op)
    if s.facts.opmask:
        s.emit("vpermps.512", s.define(op.results[0]), index, s.constant_operand(tables[0]))
        return
    low, high, sign = s.new("vec"), s.new("vec"), s.new("vec")
    for half, key in ((low, tables[0]), (high, tables[1])):
        s.emit("vpermps.256", half, index, s.constant_operand(key))
    s.emit("vpslld.imm.256", sign, index, 28)
    s.emit("vblendvps.256", s.define(op.results[0]), low, high, sign)


def pick(s: Any, op: Op) -> None:
    """VPERMPS, VPERMD take the low bits of each index, as many as count the lanes."""
    name = "vpermps" if dtype_of(op.results[0]).is_float else "vpermd"
    row, index = (s.vector(operand) for operand in op.operands)
    bits = s.facts.bits4
    if bits == 128:     # they have no such form: of two copies any third bit of an index gives the same
        once, row, bits = row, s.new("vec"), 256
        s.emit("vshuff64x2.256" if s.facts.opmask else "vperm2f128.256", row, once, once, 0)
    s.emit(f"{name}.{bits}", s.define(op.results[0]), index, row)


def lane0(s: Any, op: Op) -> None:
    value = op.operands[0]
    row = s.vector(value)
    register = s.define(op.results[0])
    if dtype_of(value).bits == 64:
        s.emit("vmovq.from_vec", register, row)
    else:
        s.emit("vmovd.from_vec", register, row)
        s.emit("movsxd", register, register)


def bring(s: Any, value: Value, register: Any, bits: int) -> None:
    """Copy, load or make a row in a given register."""
    known = s.registers.get(value)
    if known is not None:
        s.emit(f"vmovaps.{bits}", register, known)
        return
    op = value.op
    assert op is not None
    if op.name == "splat_const":
        key = constant_key(s, value)
        hoisted = s.hoisted.get(key)
        if hoisted is not None:
            s.emit(f"vmovaps.{bits}", register, hoisted)
        else:
            make_constant(s, key, register)
    elif op.name == "load":
        s.emit(f"vmovups.{bits}", register, s.address(op, 0))
    elif op.name == "load_splat":
        load_splat_into(s, op.attributes["dtype"].name, s.address(op, 0), register)
    else:
        s.emit(f"vmovaps.{bits}", register, s.vector(value))


def extract_half(s: Any, register: Any, row: Any, bits: int) -> None:
    """The upper half of a register of 256 or 512 bits."""
    if bits == 512:
        s.emit("vextracti64x4.512", register, row, 1)
    elif s.facts.opmask:
        s.emit("vextracti32x4.256", register, row, 1)
    else:
        s.emit("vextracti128.256", register, row, 1)


def insert_half(s: Any, register: Any, low: Any, high: Any, bits: int) -> None:
    """A register of 256 or 512 bits from its halves."""
    if bits == 512:
        s.emit("vinserti64x4.512", register, low, high, 1)
    elif s.facts.opmask:
        s.emit("vinserti32x4.256", register, low, high, 1)
    else:
        s.emit("vinserti128.256", register, low, high, 1)


def quarters(s: Any, row: Any, bits: int) -> list[Any]:
    """The 128-bit parts of a register."""
    if bits == 128:
        return [row]
    if bits == 256:
        high = s.new("vec")
        extract_half(s, high, row, 256)
        return [row, high]
    parts = [row]
    for number in (1, 2, 3):
        part = s.new("vec")
        s.emit("vextracti32x4.512", part, row, number)
        parts.append(part)
    return parts


def join(s: Any, parts: list[Any], register: Any) -> None:
    """A register from its 128-bit parts."""
    if len(parts) == 2:
        insert_half(s, register, parts[0], parts[1], 256)
    elif len(parts) == 4:
        low, high = s.new("vec"), s.new("vec")
        insert_half(s, low, parts[0], parts[1], 256)
        insert_half(s, high, parts[2], parts[3], 256)
        insert_half(s, register, low, high, 512)
    else:
        s.emit("vmovaps.128", register, parts[0])


def lanes_out(s: Any, row: Any, size: int) -> list[Any]:
    """Every lane of a row in a general register of its own, zero-extended."""
    found = []
    per = 16 // size
    for part in quarters(s, row, size * 8 * s.lanes):
        for number in range(per):
            register = s.new("gpr")
            letter = "d" if size == 4 else "q"
            if number == 0:
                s.emit(f"vmov{letter}.from_vec", register, part)
            else:
                s.emit(f"vpextr{letter}", register, part, number)
            found.append(register)
    return found


def lanes_in(s: Any, registers: list[Any], size: int, into: Any) -> None:
    """A row from one general register for each lane."""
    per = 16 // size
    letter = "d" if size == 4 else "q"
    parts = []
    for first in range(0, len(registers), per):
        part = s.new("vec")
        s.emit(f"vmov{letter}.to_vec", part, registers[first])
        for number in range(1, per):
            s.emit(f"vpinsr{letter}", part, part, registers[first + number], number)
        parts.append(part)
    join(s, parts, into)


def alias(s: Any, op: Op) -> None:
    """The same register under another name; a constant gets one of its own."""
    value = op.operands[0]
    if value.op is not None and value.op.name == "splat_const":
        register = s.define(op.results[0])
        bring(s, value, register, bits_of(s, dtype_of(value)))
    else:
        s.registers[op.results[0]] = s.vector(value)


def shuffle_xor(s: Any, op: Op) -> None:
    value = op.operands[0]
    dtype = dtype_of(value)
    bits = bits_of(s, dtype)
    distance: int = op.attributes["distance"]
    per = 16 // (dtype.bits // 8)
    near, far = distance % per, distance // per
    row = s.vector(value)
    steps: list[tuple[str, tuple[int, ...]]] = []
    if near:
        # Within 128 bits, in units of 32.
        unit = near if dtype.bits == 32 else 2
        steps.append((f"vpshufd.{bits}", (sum(((i ^ unit) << (2 * i)) for i in range(4)),)))
    if far and bits == 256:
        steps.append((f"vpermq.imm.{bits}", (0x4E,)))
    elif far:
        steps.append((f"vshufi64x2.{bits}", (sum(((i ^ far) << (2 * i)) for i in range(4)),)))
    for number, (name, immediate) in enumerate(steps):
        register = s.define(op.results[0]) if number == len(steps) - 1 else s.new("vec")
        if name[:6] == "vshufi":
            s.emit(name, register, row, row, *immediate)
        else:
            s.emit(name, register, row, *immediate)
        row = register
    if not steps:
        s.emit(f"vmovaps.{bits}", s.define(op.results[0]), row)


def broadcast_lane(s: Any, op: Op) -> None:
    value = op.operands[0]
    dtype = dtype_of(value)
    bits = bits_of(s, dtype)
    lane: int = op.attributes["lane"]
    row = s.vector(value)
    register = s.define(op.results[0])
    single = dtype.bits == 32
    if lane == 0:
        s.emit(f"vbroadcast{'ss' if single else 'sd'}.{bits}", register, row)
    elif single and bits == 128:
        s.emit("vpshufd.128", register, row, lane * 0x55)
    elif not single and bits == 256:
        s.emit("vpermq.imm.256", register, row, lane * 0x55)
    else:
        # Permutes take the indices first and the row last.
        index = s.constant(index_key([lane] * s.lanes, dtype.bits // 8))
        s.emit(f"vperm{'d' if single else 'q'}.{bits}", register, index, row)


def exchange(s: Any, op: Op) -> None:
    """One stage of a transposition. Where two registers shuffle into each half there is one instruction for each
    result, else each result is one of the operands with the other's lanes put in under a mask."""
    a, b = op.operands
    first, second = op.results
    dtype = dtype_of(a)
    bits = bits_of(s, dtype)
    distance_bytes = op.attributes["distance"] * dtype.bits // 8
    x, y = s.vector(a), s.vector(b)
    low, high = s.define(first), s.define(second)
    if low is x or low is y:  # the second result still needs it
        low = s.new("vec")
    opmask = s.facts.opmask
    if distance_bytes == 8:
        s.emit(f"vunpcklpd.{bits}", low, x, y)
        s.emit(f"vunpckhpd.{bits}", high, x, y)
    elif distance_bytes == 32 and bits == 512:
        s.emit("vinsertf64x4.512", low, x, y, 1)
        s.emit("vshuff64x2.512", high, x, y, 0xEE)
    elif distance_bytes == 16 and bits == 256:
        if opmask:
            s.emit("vinsertf32x4.256", low, x, y, 1)
            s.emit("vshuff64x2.256", high, x, y, 3)
        else:
            s.emit("vperm2f128.256", low, x, y, 0x20)
            s.emit("vperm2f128.256", high, x, y, 0x31)
    elif distance_bytes == 16:
        # 128-bit quarters: a0 b0 a2 b2, a1 b1 a3 b3.
        copy = s.new("vec") if high is x else high
        s.emit("vmovaps.512", low, x)
        s.emit_masked("vshuff64x2.512", s.constant(("k", 0xCC)), False, low, y, y, 0xA0)
        s.emit("vmovaps.512", copy, y)
        s.emit_masked("vshuff64x2.512", s.constant(("k", 0x33)), False, copy, x, x, 0xF5)
        if copy is not high:
            s.emit("vmovaps.512", high, copy)
    elif opmask:
        copy = s.new("vec") if high is x else high
        s.emit(f"vmovaps.{bits}", low, x)
        s.emit_masked(f"vmovsldup.{bits}", s.constant(("k", 0xAAAA)), False, low, y)
        s.emit(f"vmovaps.{bits}", copy, y)
        s.emit_masked(f"vmovshdup.{bits}", s.constant(("k", 0x5555)), False, copy, x)
        if copy is not high:
            s.emit(f"vmovaps.{bits}", high, copy)
    else:
        even, odd = s.new("vec"), s.new("vec")
        s.emit(f"vmovsldup.{bits}", even, y)
        s.emit(f"vmovshdup.{bits}", odd, x)
        s.emit(f"vblendps.{bits}", low, x, even, 0xAA)
        s.emit(f"vblendps.{bits}", high, odd, y, 0xAA)
    if low is not s.registers[first]:
        s.emit(f"vmovaps.{bits}", s.registers[first], low)


def _pack_key(s: Any) -> Key:
    """The places of 16-bit elements that two rows, one after the other, have when they are side by side."""
    return ("d", struct.pack(f"<{2 * s.lanes}H", *[place + half for place in range(s.lanes) for half in (0, s.lanes)]))


def pack_bf16(s: Any, op: Op) -> None:
    bits = s.facts.bits4
    low, high = (s.vector(v) for v in op.operands)
    both = s.new("vec")
    s.emit(f"vcvtne2ps2bf16.{bits}", both, high, low)
    s.emit(f"vpermw.{bits}", s.define(op.results[0]), s.constant(_pack_key(s)), both)


def _interleave_keys(s: Any) -> tuple[Key, Key]:
    count = 2 * s.lanes  # elements of a register; the second table's follow the first's
    low, high = ([place for i in range(s.lanes) for place in (start + i, count + start + i)] for start in (0, s.lanes))
    return ("d", struct.pack(f"<{count}H", *low)), ("d", struct.pack(f"<{count}H", *high))


def interleave(s: Any, op: Op) -> None:
    """Bytes: unpacking alternates those of halves of each 128 bits, so that the 32 bits which go to one result have to
    lie together there before. Elements of 16 bits: vpermt2w overwrites its first table, so it is given a copy."""
    bits = s.facts.bits4
    rows = [s.vector(v) for v in op.operands]
    made = [s.new("vec") for _ in rows]
    if len(rows) > 2:
        for place, row in enumerate(rows if bits > 128 else ()):
            rows[place] = s.new("vec")
            s.emit(f"vpermd.{bits}", rows[place], s.constant(_quarters_key(s)), row)
        pairs = [_unpacked(s, "bw", *rows[:2]), _unpacked(s, "bw", *rows[2:])]
        made = [register for both in zip(*pairs, strict=True) for register in _unpacked(s, "wd", *both)]
    elif s.facts.opmask:
        for register, key in zip(made, _interleave_keys(s), strict=True):
            s.emit(f"vmovaps.{bits}", register, rows[0])
            s.emit(f"vpermt2w.{bits}", register, s.constant(key), rows[1])
    else:
        halves = _unpacked(s, "wd", *rows)
        for number, half in enumerate((0x20, 0x31)):
            if bits > 128:
                s.emit(f"vperm2i128.{bits}", made[number], *halves, half)
            else:
                made[number] = halves[number]
    for result, register in zip(op.results, made, strict=True):
        s.emit(f"vmovaps.{bits}", s.define(result), register)


def _unpacked(s: Any, kind: str, a: Any, b: Any) -> list[Any]:
    """The elements of two registers, alternating: of the lower halves of each 128 bits, and of the upper."""
    made = [s.new("vec"), s.new("vec")]
    for register, half in zip(made, "lh", strict=True):
        s.emit(f"vpunpck{half}{kind}.{s.facts.bits4}", register, a, b)
    return made


def _quarters_key(s: Any) -> Key:
    """Part n of each 128 bits: from quarter n of a row."""
    quarter = s.lanes // 4
    return index_key([number * quarter + part for part in range(quarter) for number in range(4)], 4)


def _merged(s: Any, op: Op, keys: tuple[Key, Key]) -> None:
    """Two results, each picked from the elements of both operands. VPERMT2 overwrites its first table."""
    dtype = dtype_of(op.operands[0])
    bits = bits_of(s, dtype)
    a, b = (s.vector(v) for v in op.operands)
    made = [s.new("vec"), s.new("vec")]
    for register, key in zip(made, keys, strict=True):
        s.emit(f"vmovaps.{bits}", register, a)
        s.emit(f"vpermt2{_float_suffix(dtype)}.{bits}", register, s.constant(key), b)
    for result, register in zip(op.results, made, strict=True):
        s.emit(f"vmovaps.{bits}", s.define(result), register)


def _float_suffix(dtype: DType) -> str:
    return "ps" if dtype.bits == 32 else "pd"


def _unzip_keys(s: Any, op: Op) -> tuple[Key, Key]:
    even = list(range(0, 2 * s.lanes, 2))
    return _places_keys(op, even, [place + 1 for place in even])


def _zip_keys(s: Any, op: Op) -> tuple[Key, Key]:
    both = [place for i in range(s.lanes) for place in (i, s.lanes + i)]
    return _places_keys(op, both[:s.lanes], both[s.lanes:])


def _places_keys(op: Op, low: list[int], high: list[int]) -> tuple[Key, Key]:
    size_bytes = dtype_of(op.operands[0]).size_bytes
    return index_key(low, size_bytes), index_key(high, size_bytes)


def unzip_rows(s: Any, op: Op) -> None:
    if s.facts.opmask:
        _merged(s, op, _unzip_keys(s, op))
        return
    dtype = dtype_of(op.operands[0])
    bits = bits_of(s, dtype)
    a, b = (s.vector(v) for v in op.operands)
    made = [s.new("vec"), s.new("vec")]
    for register, pick, half in zip(made, (0x88, 0xDD), "lh", strict=True):
        if dtype.bits == 32:
            s.emit(f"vshufps.{bits}", register, a, b, pick)
        else:
            s.emit(f"vunpck{half}pd.{bits}", register, a, b)
    for result, register in zip(op.results, made, strict=True):
        if bits == 256:  # what came from a is in the lower half of each 128-bit part
            s.emit("vpermq.imm.256", s.define(result), register, 0xD8)
        else:
            s.emit(f"vmovaps.{bits}", s.define(result), register)


def zip_rows(s: Any, op: Op) -> None:
    if s.facts.opmask:
        _merged(s, op, _zip_keys(s, op))
        return
    dtype = dtype_of(op.operands[0])
    bits = bits_of(s, dtype)
    a, b = (s.vector(v) for v in op.operands)
    low, high = s.new("vec"), s.new("vec")
    s.emit(f"vunpckl{_float_suffix(dtype)}.{bits}", low, a, b)
    s.emit(f"vunpckh{_float_suffix(dtype)}.{bits}", high, a, b)
    for result, register, half in zip(op.results, (low, high), (0x20, 0x31), strict=True):
        if bits == 256:
            s.emit("vperm2f128.256", s.define(result), low, high, half)
        else:
            s.emit(f"vmovaps.{bits}", s.define(result), register)


def load_splat_into(s: Any, name: str, memory: Any, register: Any) -> None:
    bits = s.facts.bits4
    if name in ("f32", "i32", "b32"):
        s.emit(f"vbroadcastss.{bits}", register, memory)
    elif name in ("f64", "i64"):
        bits_of(s, i64)
        s.emit(f"vbroadcastsd.{s.facts.bits8}", register, memory)
    elif name == "bf16":
        both = s.new("vec")
        s.emit(f"vpbroadcastw.{bits}", both, memory)
        s.emit(f"vpslld.imm.{bits}", register, both, 16)
    elif name == "f16":
        half = s.new("vec")
        s.emit(f"vpbroadcastw.{max(128, bits // 2)}", half, memory)
        s.emit(f"vcvtph2ps.{bits}", register, half)
    elif name in FLOAT8:
        both = s.new("vec")
        s.emit("vpbroadcastb.128", both, memory)
        unpack(s, name, register, both)
    else:
        number = s.new("gpr")
        s.emit(SCALAR_LOADS[name], number, memory)
        splat_register(s, number, register, 4, bits)


def _exchange_constants(s: Any, op: Op) -> tuple[Key, ...]:
    if not s.facts.opmask:
        return ()
    dtype = dtype_of(op.operands[0])
    distance_bytes = op.attributes["distance"] * dtype.bits // 8
    if distance_bytes == 4:
        return (("k", 0xAAAA), ("k", 0x5555))
    if distance_bytes == 16 and bits_of(s, dtype) == 512:
        return (("k", 0xCC), ("k", 0x33))
    return ()


def _interleave_constants(s: Any, op: Op) -> tuple[Key, ...]:
    if len(op.operands) > 2:
        return (_quarters_key(s),) if s.lanes > 4 else ()
    return _interleave_keys(s) if s.facts.opmask else ()


RULES: dict[str, Rule] = {
    "splat": splat, "iota": iota, "lookup": lookup, "pick": pick, "lane0": lane0, "bitcast": alias,
    "shuffle_xor": shuffle_xor, "broadcast_lane": broadcast_lane, "exchange": exchange, "zip": zip_rows,
    "unzip": unzip_rows,
    "pack_bf16": pack_bf16, "interleave": interleave,
}

OWN_CONSTANTS: dict[str, OwnConstants] = {
    "lookup": _table_keys, "exchange": _exchange_constants,
    "zip": lambda s, op: _zip_keys(s, op) if s.facts.opmask else (),
    "unzip": lambda s, op: _unzip_keys(s, op) if s.facts.opmask else (),
    "pack_bf16": lambda s, op: (_pack_key(s),), "interleave": _interleave_constants,
}
