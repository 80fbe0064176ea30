"""Selection rules of AArch64: rows from and to memory, from scalars, and between lanes.

See select.py. Lanes that a mask leaves off touch no memory: each lane that is on is loaded or stored by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...ir.nodes import Op, Value
from .select_arithmetic import deliver, narrow_bfloat16, rounding_constants
from .select_common import (
    OwnConstants,
    Rule,
    address,
    arrangement,
    bring,
    copy_row,
    dtype_of,
    iota_key,
    make_constant,
    number_key,
    part,
    place,
)

WHOLE = frozenset(["f32", "f64", "i32", "i64", "b32"])
"""Dtypes of memory that are a row's own."""
_LETTERS = {1: "b", 2: "h", 4: "s", 8: "d", 16: "q"}
_WIDENING = {"bf16": ("shll.4s",), "f16": ("fcvtl.4s",), "i16": ("sxtl.4s",), "i8": ("sxtl.8h", "sxtl.4s"),
             "u8": ("uxtl.8h", "uxtl.4s"), "bool": ("uxtl.8h", "uxtl.4s")}


def _size_of(s: Any, op: Op) -> int:
    """Bytes of a row in memory."""
    size: int = op.attributes["dtype"].size_bytes * s.lanes
    return size


def widen(s: Any, name: str, source: Any, result: Value) -> None:
    """Narrow elements in the low part of a register to a row."""
    steps = _WIDENING.get(name)
    if steps is None:
        raise ValueError(f"{s.location or s.function.name}: load of {name}: found no row for it; expected one of "
                         f"{sorted([*WHOLE, *_WIDENING])}; mend: load bytes and take them apart")
    for number, step in enumerate(steps):
        register = s.define(result) if number == len(steps) - 1 else s.new("vec")
        s.emit(step, register, source)
        source = register


def for_each_lane(s: Any, op: Op, body: Callable[[int], None]) -> None:
    """Code for lane 0, 1, ..., each jumped over if the op's mask has it off. Of a mask of the first lanes the first
    that is off is the last to be looked at."""
    if not op.attributes.get("masked"):
        for lane in range(s.lanes):
            body(lane)
        return
    value = op.operands[-1]
    mask = s.vector(value)
    first_ones = value.op is not None and value.op.name == "mask_first"
    end = s.new_label("lanes")
    for lane in range(s.lanes):
        on, after = s.new("gpr"), end if first_ones else s.new_label("lane")
        s.emit("umov.s", on, mask, lane)
        s.branch("cbz.32", after, on)
        body(lane)
        if not first_ones:
            s.label(after)
    if first_ones:
        s.label(end)


def load(s: Any, op: Op) -> None:
    dtype = op.attributes["dtype"]
    size = _size_of(s, op)
    result = op.results[0]
    if not op.attributes.get("masked"):
        memory = address(s, op, 0, size)
        whole = dtype.name in WHOLE
        register = s.define(result) if whole else s.new("vec")
        s.emit(f"ldr.{_LETTERS[size]}", register, memory)
        if not whole:
            widen(s, dtype.name, register, result)
        return
    each = dtype.size_bytes
    memory = address(s, op, 0, each)
    made = s.new("vec")
    s.emit("movi.zero", made)
    for_each_lane(s, op, lambda lane: _insert(s, made, lane, part(s, memory, lane * each, each), each))
    _finish(s, dtype.name, made, result)


def _insert(s: Any, row: Any, lane: int, memory: Any, each: int) -> None:
    """One element from memory."""
    letter, one = _LETTERS[each], s.new("vec")
    s.emit(f"ldr.{letter}", one, memory)
    s.emit(f"ins.{letter}", row, lane, one, 0)


def _finish(s: Any, name: str, made: Any, result: Value) -> None:
    """Elements side by side, in a fresh register, are the result."""
    if name in WHOLE:
        deliver(s, result, made)
    else:
        widen(s, name, made, result)


def load_splat(s: Any, op: Op) -> None:
    dtype = op.attributes["dtype"]
    each = dtype.size_bytes
    memory = address(s, op, 0, each)
    one = s.new("vec")
    s.emit(f"ldr.{_LETTERS[each]}", one, memory)
    for step in _WIDENING.get(dtype.name, ()):
        wide = s.new("vec")
        s.emit(step, wide, one)
        one = wide
    s.emit(f"dup.element.{arrangement(s, dtype_of(op.results[0]))}", s.define(op.results[0]), one, 0)


def narrow(s: Any, name: str, row: Any, exact: bool = False) -> Any:
    """A row of 32-bit lanes to packed elements of 1 or 2 bytes in the low part of a fresh register. exact: as of a
    store."""
    made = s.new("vec")
    if name == "f16":
        s.emit("fcvtn.4h", made, row)
    elif name == "bf16" and not exact:
        return narrow_bfloat16(s, row)
    elif name == "bf16":
        s.emit("shrn.4h", made, row, 16)
    elif name == "i16":
        s.emit("xtn.4h", made, row)
    elif name in ("i8", "u8", "bool"):
        halves = s.new("vec")
        s.emit("xtn.4h", halves, row)
        s.emit("xtn.8b", made, halves)
    else:
        raise ValueError(f"{s.location or s.function.name}: store of {name}: found no row for it; expected one of "
                         f"{sorted([*WHOLE, *_WIDENING])}; mend: store bytes")
    return made


def _packed(s: Any, op: Op, value: Value) -> Any:
    """A row as its elements lie in memory, in a register."""
    name = op.attributes["dtype"].name
    row = s.vector(value)
    return row if name in WHOLE else narrow(s, name, row, bool(op.attributes.get("exact")))


def _store_element(s: Any, memory: Any, row: Any, lane: int, each: int) -> None:
    letter = _LETTERS[each]
    if lane:
        one = s.new("vec")
        s.emit(f"mov.element.{letter}", one, row, lane)
        row = one
    s.emit(f"str.{letter}", memory, row)


def store(s: Any, op: Op) -> None:
    row = _packed(s, op, op.operands[0])
    if not op.attributes.get("masked"):
        size = _size_of(s, op)
        s.emit(f"str.{_LETTERS[size]}", address(s, op, 1, size), row)
        return
    each = op.attributes["dtype"].size_bytes
    memory = address(s, op, 1, each)
    for_each_lane(s, op, lambda lane: _store_element(s, part(s, memory, lane * each, each), row, lane, each))


def store_lane0(s: Any, op: Op) -> None:
    row = _packed(s, op, op.operands[0])
    each = op.attributes["dtype"].size_bytes
    s.emit(f"str.{_LETTERS[each]}", address(s, op, 1, each), row)


def _offset_place(s: Any, op: Op, base: Any, offsets: Any, lane: int) -> Any:
    """The memory of one lane: its offset is signed, of 32 bits."""
    offset, sum_ = s.new("gpr"), s.new("gpr")
    s.emit("umov.s", offset, offsets, lane)
    s.emit("add.word.64", sum_, base, offset, op.attributes.get("scale", 1).bit_length() - 1)
    return place(s, sum_, op.attributes.get("disp", 0), op.attributes["dtype"].size_bytes)


def gather(s: Any, op: Op) -> None:
    dtype = op.attributes["dtype"]
    base, offsets = s.scalar(op.operands[0]), s.vector(op.operands[1])
    made = s.new("vec")
    s.emit("movi.zero", made)
    for_each_lane(s, op, lambda lane: _insert(s, made, lane, _offset_place(s, op, base, offsets, lane),
                                              dtype.size_bytes))
    _finish(s, dtype.name, made, op.results[0])


def scatter(s: Any, op: Op) -> None:
    row = _packed(s, op, op.operands[0])
    base, offsets = s.scalar(op.operands[1]), s.vector(op.operands[2])
    for_each_lane(s, op, lambda lane: _store_element(s, _offset_place(s, op, base, offsets, lane), row, lane,
                                                     op.attributes["dtype"].size_bytes))


def prefetch(s: Any, op: Op) -> None:
    kind = "pst" if op.attributes.get("write") else "pld"
    s.emit(f"prfm.{kind}l{op.attributes.get('level', 1)}keep", address(s, op, 0, 8))


# --- From scalars, and back -------------------------------------------------------------------------------------------

def splat(s: Any, op: Op) -> None:
    result = op.results[0]
    dtype = dtype_of(result)
    number = s.constant_of(op.operands[0])
    if number is not None:
        make_constant(s, number_key(dtype.size_bytes, number & (1 << dtype.bits) - 1), s.define(result))
        return
    source = s.scalar(op.operands[0])
    s.emit(f"dup.{arrangement(s, dtype)}", s.define(result), source)


def iota(s: Any, op: Op) -> None:
    numbers = s.constant(iota_key(s))
    copy_row(s, s.define(op.results[0]), numbers)


def lane0(s: Any, op: Op) -> None:
    row = s.vector(op.operands[0])
    s.emit("umov.d" if dtype_of(op.operands[0]).bits == 64 else "smov.s", s.define(op.results[0]), row, 0)


def alias(s: Any, op: Op) -> None:
    """The same register under another name; a constant gets one of its own."""
    value = op.operands[0]
    if value.op is not None and value.op.name == "splat_const":
        bring(s, value, s.define(op.results[0]))
    else:
        s.registers[op.results[0]] = s.vector(value)


# --- Between lanes ----------------------------------------------------------------------------------------------------

def shuffle_xor(s: Any, op: Op) -> None:
    dtype = dtype_of(op.operands[0])
    row = s.vector(op.operands[0])
    register = s.define(op.results[0])
    if dtype.bits == 64 or op.attributes["distance"] == 2:
        s.emit("ext.16b", register, row, row, 8)
    else:
        s.emit(f"rev64.{s.facts.narrow}", register, row)


def broadcast_lane(s: Any, op: Op) -> None:
    row = s.vector(op.operands[0])
    s.emit(f"dup.element.{arrangement(s, dtype_of(op.operands[0]))}", s.define(op.results[0]), row,
           op.attributes["lane"])


def _pair(s: Any, op: Op, names: tuple[str, str], kind: str) -> None:
    """Two results, each of both operands."""
    x, y = (s.vector(value) for value in op.operands)
    first, second = (s.define(result) for result in op.results)
    low = s.new("vec") if first in (x, y) else first
    s.emit(f"{names[0]}.{kind}", low, x, y)
    s.emit(f"{names[1]}.{kind}", second, x, y)
    if low is not first:
        copy_row(s, first, low)


def exchange(s: Any, op: Op) -> None:
    """One stage of a transposition."""
    dtype = dtype_of(op.operands[0])
    wide = dtype.bits * op.attributes["distance"] == 64
    _pair(s, op, ("trn1", "trn2"), "2d" if wide else s.facts.narrow)


def unzip(s: Any, op: Op) -> None:
    _pair(s, op, ("uzp1", "uzp2"), arrangement(s, dtype_of(op.operands[0])))


def interleave(s: Any, op: Op) -> None:
    """Elements of two rows of halves by turns; of four rows of bytes those of two first, then halves of both."""
    narrow, wide = ("16b", "8h") if s.lanes == 4 else ("8b", "4h")
    if len(op.operands) == 2:
        _pair(s, op, ("zip1", "zip2"), wide)
        return
    rows = [s.vector(value) for value in op.operands]
    halves = []
    for n, name in ((0, "zip1"), (2, "zip1"), (0, "zip2"), (2, "zip2")):
        halves.append(s.new("vec"))
        s.emit(f"{name}.{narrow}", halves[-1], *rows[n:n + 2])
    for number, result in enumerate(op.results):
        first = number // 2 * 2
        s.emit(f"zip{number % 2 + 1}.{wide}", s.define(result), *halves[first:first + 2])


def pack_bfloat16(s: Any, op: Op) -> None:
    first, second = (narrow_bfloat16(s, s.vector(value)) for value in op.operands)
    s.emit(f"zip1.{'8h' if s.lanes == 4 else '4h'}", s.define(op.results[0]), first, second)


def zip_rows(s: Any, op: Op) -> None:
    _pair(s, op, ("zip1", "zip2"), arrangement(s, dtype_of(op.operands[0])))


RULES: dict[str, Rule] = {
    "load": load, "load_splat": load_splat, "store": store, "store_lane0": store_lane0, "gather": gather,
    "scatter": scatter, "prefetch": prefetch, "splat": splat, "iota": iota, "lane0": lane0, "bitcast": alias,
    "shuffle_xor": shuffle_xor, "broadcast_lane": broadcast_lane, "exchange": exchange, "unzip": unzip,
    "zip": zip_rows, "interleave": interleave, "pack_bf16": pack_bfloat16,
}

OWN_CONSTANTS: dict[str, OwnConstants] = {
    "iota": lambda s, op: (iota_key(s),), "store": rounding_constants, "store_lane0": rounding_constants,
    "scatter": rounding_constants,
}
