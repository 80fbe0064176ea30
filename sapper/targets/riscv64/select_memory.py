"""Selection rules of RISC-V: rows from and to memory, from scalars, and between lanes.

See select.py. Loads and stores have the width of their elements in themselves: whatever the processor is set to, they
move as many as there are lanes. Lanes that a mask leaves off touch no memory.
"""

from __future__ import annotations

from bisect import insort
from typing import Any

from ...ir.nodes import Op, Value
from ...ir.types import DType
from ...lane.ops import ADDRESS_AT
from .registers import PAIR
from .select_arithmetic import round_bfloat16, rounding_constants
from .select_common import (
    Key,
    OwnConstants,
    Rule,
    apart,
    bring,
    copy_row,
    deliver,
    dtype_of,
    element,
    load_immediate,
    make_constant,
    mask_on,
    named,
    number_key,
    row,
)
from .select_scalars import LOADS, STORES, add_number

WHOLE = frozenset(["f32", "f64", "i32", "i64", "b32"])
"""Dtypes of memory that are a row's own."""
_WIDENING = {"bf16": "vzext.vf2.e32", "f16": "vfwcvt.f.f.v.e16", "i16": "vsext.vf2.e32", "i8": "vsext.vf4.e32",
             "u8": "vzext.vf4.e32", "bool": "vzext.vf4.e32"}


def widen(s: Any, name: str, source: Any, result: Value) -> None:
    """Narrow elements to a row."""
    step = _WIDENING.get(name)
    if step is None:
        raise ValueError(f"{s.location or s.function.name}: load of {name}: found no row for it; expected one of "
                         f"{sorted([*WHOLE, *_WIDENING])}; mend: load bytes and take them apart")
    made = apart(s)
    s.emit(step, made, source)
    if name == "bf16":
        s.emit("vsll.vi.e32", s.define(result), made, 16)
    else:
        deliver(s, result, made)


def _finish(s: Any, name: str, made: Any, result: Value) -> None:
    """Elements as they lie in memory, in a fresh register, are the result."""
    if name in WHOLE:
        deliver(s, result, made)
    else:
        widen(s, name, made, result)


def _none(s: Any, dtype: DType) -> Any:
    """A fresh register of zeros, as many as there are lanes, of at least 32 bits."""
    made = s.new("vec")
    make_constant(s, number_key(max(4, dtype.size_bytes), 0), made)
    return made


def load(s: Any, op: Op) -> None:
    dtype, result = op.attributes["dtype"], op.results[0]
    memory = s.address(op, 0)
    name = f"vle{dtype.bits}.v"
    if op.attributes.get("masked"):
        mask, made = s.vector(op.operands[-1]), _none(s, dtype)
        mask_on(s, mask)
        s.emit(f"{name}.masked", made, memory)
        _finish(s, dtype.name, made, result)
    elif dtype.name in WHOLE:
        s.emit(name, s.define(result), memory)
    else:
        made = s.new("vec")
        s.emit(name, made, memory)
        widen(s, dtype.name, made, result)


def _load_float(s: Any, op: Op) -> Any:
    """One element as a float of 32 or 64 bits."""
    name = op.attributes["dtype"].name
    made = s.new("fpr")
    if name == "bf16":
        bits, upper = s.new("gpr"), s.new("gpr")
        s.emit("lhu", bits, s.address(op, 0))
        s.emit("slli", upper, bits, 16)
        s.emit("fmv.w.x", made, upper)
    elif name == "f16":
        half = s.new("fpr")
        s.emit("flh", half, s.address(op, 0))
        s.emit("fcvt.s.h", made, half)
    else:
        s.emit({"f32": "flw", "f64": "fld"}[name], made, s.address(op, 0))
    return made


def load_splat(s: Any, op: Op) -> None:
    result = op.results[0]
    if op.attributes["dtype"].is_float:
        made = _load_float(s, op)
    else:
        made = s.new("gpr")
        s.emit(LOADS[op.attributes["dtype"].name], made, s.address(op, 0))
    if result in s.facts.scalars:
        s.registers[result] = made
    else:
        s.emit(named(s, "vfmv.v.f" if made.kind == "fpr" else "vmv.v.x", result), s.define(result), made)


def narrow(s: Any, name: str, given: Any, exact: bool = False) -> Any:
    """A row of 32-bit lanes to elements of 1 or 2 bytes, packed as in memory, in a fresh register. exact: as of a
    store."""
    made = s.new("vec")
    if name == "f16":
        s.emit("vfncvt.f.f.w.e16", made, given)
    elif name == "bf16":
        s.emit("vnsrl.wi.e16", made, given if exact else round_bfloat16(s, given), 16)
    elif name == "i16":
        s.emit("vnsrl.wi.e16", made, given, 0)
    elif name in ("i8", "u8", "bool"):
        halves = s.new("vec")
        s.emit("vnsrl.wi.e16", halves, given, 0)
        s.emit("vnsrl.wi.e8", made, halves, 0)
    else:
        raise ValueError(f"{s.location or s.function.name}: store of {name}: found no row for it; expected one of "
                         f"{sorted([*WHOLE, *_WIDENING])}; mend: store bytes")
    return made


def _packed(s: Any, op: Op, value: Value) -> Any:
    """A row as its elements lie in memory, in a register."""
    name = op.attributes["dtype"].name
    given = row(s, value)
    return given if name in WHOLE else narrow(s, name, given, bool(op.attributes.get("exact")))


def store(s: Any, op: Op) -> None:
    packed = _packed(s, op, op.operands[0])
    name, memory = f"vse{op.attributes['dtype'].bits}.v", s.address(op, 1)
    if op.attributes.get("masked"):
        mask_on(s, s.vector(op.operands[-1]))
        name += ".masked"
    s.emit(name, memory, packed)


def store_lane0(s: Any, op: Op) -> None:
    dtype, value = op.attributes["dtype"], op.operands[0]
    packed = _packed(s, op, value) if dtype.is_float else row(s, value)
    number = s.new("gpr")
    s.emit(named(s, "vmv.x.s", value), number, packed)
    s.emit(STORES[dtype.size_bytes], s.address(op, 1), number)


def _stride(s: Any, offsets: Value) -> Value | int | None:
    """How many bytes lanes lie apart, where offsets are so many times the lanes' numbers. What the lanes reach lies
    less than 2 GiB apart (docs/ir.md), so that 32 bits of them are all."""
    op = offsets.op
    if op is None or op.name not in ("mul", "shl"):
        return None
    iota, others = [value.op is not None and value.op.name == "iota" for value in op.operands], op.operands
    if True not in iota:
        return None
    if op.name == "shl":
        return 1 << op.attributes["amount"] if "amount" in op.attributes else None
    factor = others[1 - iota.index(True)].op
    if factor is not None and factor.name == "splat":
        number = s.constant_of(factor.operands[0])
        return factor.operands[0] if number is None else int(number)
    return int(factor.attributes["value"]) if factor is not None and factor.name == "splat_const" else None


def defer_strides(s: Any) -> None:
    """Offsets that are only read by what takes a stride are not computed; the stride is read in their place."""
    strided: dict[Value, int] = {}
    for op in s.function.walk():
        if op.name in ("gather", "scatter") and op.attributes.get("scale", 1) == 1:
            offsets = op.operands[ADDRESS_AT[op.name] + 1]
            if _stride(s, offsets) is not None:
                strided[offsets] = strided.get(offsets, 0) + 1
    for offsets, count in strided.items():
        stride = _stride(s, offsets)
        if isinstance(stride, Value) and (places := s.uses_at.get(s.alias.get(stride, stride))) is not None:
            for place in s.uses_at[offsets]:
                insort(places, place)
        if s.uses[offsets] == count:
            s.deferred[offsets] = offsets.op


def _offset_memory(s: Any, op: Op, at: int) -> tuple[Any, bool]:
    """The memory of a gather or scatter, and whether its index is a stride. Else it is v30 (and v31): how far each lane
    lies from the base, 64 bits each, which stay there for the next one."""
    base, offsets = s.scalar(op.operands[at]), op.operands[at + 1]
    disp, scale = op.attributes.get("disp", 0), op.attributes.get("scale", 1)
    if disp:
        base, near = s.new("gpr"), base
        add_number(s, base, near, disp)
    stride = _stride(s, offsets) if scale == 1 else None
    if stride is not None:
        if isinstance(stride, Value):
            return s.memory(base, s.scalar(stride)), True
        between = s.new("gpr")
        load_immediate(s, between, stride)
        return s.memory(base, between), True
    facts, wanted = s.facts, (offsets, scale)
    if facts.pair != wanted or not all(hasattr(item, "row") for item in s.body[facts.pair_at:]):
        s.emit("vsext.vf2.pair", row(s, offsets))
        if scale > 1:
            s.emit("vsll.vi.pair", scale.bit_length() - 1)
    facts.pair, facts.pair_at = wanted, len(s.body)
    return s.memory(base, s.physical("vec", PAIR)), False


def gather(s: Any, op: Op) -> None:
    dtype = op.attributes["dtype"]
    masked = bool(op.attributes.get("masked"))
    mask = s.vector(op.operands[-1]) if masked else None
    memory, strided = _offset_memory(s, op, 0)
    made = _none(s, dtype) if masked else s.new("vec") if strided else apart(s)
    if masked:
        mask_on(s, mask)
    name = f"vlse{dtype.bits}.v" if strided else f"vluxei64.v.{dtype.bits}"
    s.emit(name + ".masked" * masked, made, memory)
    _finish(s, dtype.name, made, op.results[0])


def scatter(s: Any, op: Op) -> None:
    packed = _packed(s, op, op.operands[0])
    masked = bool(op.attributes.get("masked"))
    mask = s.vector(op.operands[-1]) if masked else None
    memory, strided = _offset_memory(s, op, 1)
    if masked:
        mask_on(s, mask)
    bits = op.attributes["dtype"].bits
    s.emit((f"vsse{bits}.v" if strided else f"vsoxei64.v.{bits}") + ".masked" * masked, memory, packed)


def prefetch(s: Any, op: Op) -> None:
    """Somewhere in the line: hints count by 32 bytes."""
    memory = s.address(op, 0)
    s.emit("prefetch.w" if op.attributes.get("write") else "prefetch.r",
           s.memory(memory.base, disp=memory.disp // 32 * 32))


# --- From scalars, and back -------------------------------------------------------------------------------------------

def splat(s: Any, op: Op) -> None:
    result = op.results[0]
    dtype = dtype_of(result)
    if result in s.facts.scalars:
        made = s.new("gpr")
        s.emit("mv", made, s.scalar(op.operands[0]))
        s.registers[result] = made
        return
    number = s.constant_of(op.operands[0])
    if number is not None:
        make_constant(s, number_key(dtype.size_bytes, number & (1 << dtype.bits) - 1), s.define(result))
        return
    source = s.scalar(op.operands[0])
    s.emit(named(s, "vmv.v.x", result), s.define(result), source)


def iota(s: Any, op: Op) -> None:
    s.emit("vid.v.e32", s.define(op.results[0]))


def lane0(s: Any, op: Op) -> None:
    given = row(s, op.operands[0])
    s.emit(named(s, "vmv.x.s", op.operands[0]), s.define(op.results[0]), given)


def alias(s: Any, op: Op) -> None:
    """The same register under another name; a constant gets one of its own."""
    value = op.operands[0]
    if value.op is not None and value.op.name == "splat_const":
        bring(s, value, s.define(op.results[0]))
    else:
        s.registers[op.results[0]] = s.vector(value)


# --- Between lanes ----------------------------------------------------------------------------------------------------

def _places(s: Any, op: Op, what: Any) -> Key:
    return ("places", what, element(s, dtype_of(op.operands[0])))


def shuffle_xor(s: Any, op: Op) -> None:
    given, places = row(s, op.operands[0]), s.constant(_places(s, op, op.attributes["distance"]))
    made = apart(s)
    s.emit(named(s, "vrgather.vv", op.operands[0]), made, given, places)
    deliver(s, op.results[0], made)


def broadcast_lane(s: Any, op: Op) -> None:
    given = row(s, op.operands[0])
    made = apart(s)
    s.emit(named(s, "vrgather.vi", op.operands[0]), made, given, op.attributes["lane"])
    deliver(s, op.results[0], made)


def exchange(s: Any, op: Op) -> None:
    """One stage of a transposition: where a lane's bit is set, the other row's lanes from below; else from above."""
    a, b = (row(s, value) for value in op.operands)
    distance = op.attributes["distance"]
    made = []
    for name, own, other, is_set in (("vslideup", a, b, True), ("vslidedown", b, a, False)):
        mask, one = s.constant(("bit", distance, is_set)), s.new("vec")
        copy_row(s, one, own)
        mask_on(s, mask)
        s.emit(named(s, f"{name}.vi.masked", op.operands[0]), one, other, distance)
        made.append(one)
    for result, one in zip(op.results, made, strict=True):
        deliver(s, result, one)


def _from_both(s: Any, op: Op, kinds: tuple[str, str], distance: int) -> None:
    """Two results, each of the first row's lanes, and where a bit is set of the second's."""
    a, b = (row(s, value) for value in op.operands)
    mask = s.constant(("bit", distance, True))
    made = []
    for kind in kinds:
        places, one = s.constant(_places(s, op, kind)), apart(s)
        s.emit(named(s, "vrgather.vv", op.operands[0]), one, a, places)
        mask_on(s, mask)
        s.emit(named(s, "vrgather.vv.masked", op.operands[0]), one, b, places)
        made.append(one)
    for result, one in zip(op.results, made, strict=True):
        deliver(s, result, one)


def unzip(s: Any, op: Op) -> None:
    _from_both(s, op, ("even", "odd"), s.lanes // 2)


def zip_rows(s: Any, op: Op) -> None:
    _from_both(s, op, ("low", "high"), 1)


RULES: dict[str, Rule] = {
    "load": load, "load_splat": load_splat, "store": store, "store_lane0": store_lane0, "gather": gather,
    "scatter": scatter, "prefetch": prefetch, "splat": splat, "iota": iota, "lane0": lane0, "bitcast": alias,
    "shuffle_xor": shuffle_xor, "broadcast_lane": broadcast_lane, "exchange": exchange, "unzip": unzip,
    "zip": zip_rows,
}

OWN_CONSTANTS: dict[str, OwnConstants] = {
    "store": rounding_constants, "store_lane0": rounding_constants, "scatter": rounding_constants,
    "shuffle_xor": lambda s, op: (_places(s, op, op.attributes["distance"]),),
    "exchange": lambda s, op: tuple(("bit", op.attributes["distance"], is_set) for is_set in (True, False)),
    "unzip": lambda s, op: (_places(s, op, "even"), _places(s, op, "odd"), ("bit", s.lanes // 2, True)),
    "zip": lambda s, op: (_places(s, op, "low"), _places(s, op, "high"), ("bit", 1, True)),
}
