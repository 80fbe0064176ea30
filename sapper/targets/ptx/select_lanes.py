"""Selection rules of PTX: rows from scalars and back, masks, what goes from lane to lane.

See select.py. A mask is a predicate; a vote or a shuffle has all threads of the warp.
"""

from __future__ import annotations

from typing import Any

from ...ir.nodes import Op
from .select_common import ALL_LANES, Rule, arithmetic_type, bits_of, row, scalar, settle

# --- Rows from scalars, and back -------------------------------------------------------------------------------------

def splat(s: Any, op: Op) -> None:
    value = scalar(s, op.operands[0])
    result = op.results[0]
    if bits_of(result) == 64:
        s.emit("mov.b64", s.define(result), value)
    elif isinstance(value, int):
        s.emit("mov.b32", s.define(result), value & 0xFFFFFFFF)
    else:
        s.emit("cvt.u32.u64", s.define(result), value)


def iota(s: Any, op: Op) -> None:
    s.emit("mov.b32", s.define(op.results[0]), s.facts.lane)


def lane0(s: Any, op: Op) -> None:
    value = op.operands[0]
    wide = bits_of(value) == 64
    made = s.new("wide" if wide else "vec")
    shuffle(s, made, s.vector(value), "idx", 0, wide)
    s.emit("mov.b64" if wide else "cvt.s64.s32", s.define(op.results[0]), made)


# --- Masks -----------------------------------------------------------------------------------------------------------

def compare(s: Any, op: Op) -> None:
    condition = op.attributes["cond"]
    type_ = arithmetic_type(op.operands[0])
    if condition == "ne" and type_[0] == "f":
        condition = "neu"        # unordered is true
    sources = [row(s, v) for v in op.operands]
    s.emit(f"setp.{condition}.{type_}", s.define(op.results[0]), *sources)


def select(s: Any, op: Op) -> None:
    mask, a, b = op.operands
    result = op.results[0]
    on, first, second = s.vector(mask), row(s, a), row(s, b)
    s.emit(f"selp.b{bits_of(result)}", s.define(result), first, second, on)


def mask_first(s: Any, op: Op) -> None:
    count = scalar(s, op.operands[0])
    s.emit("setp.lt.s64", s.define(op.results[0]), s.facts.wide_lane, count)


def _mask_op(mnemonic: str) -> Rule:
    def rule(s: Any, op: Op) -> None:
        sources = [s.vector(v) for v in op.operands]
        s.emit(mnemonic, s.define(op.results[0]), *sources)
    return rule


def vote(s: Any, made: Any, op: Op) -> None:
    s.emit(f"vote.sync.{op.name.removeprefix('mask_')}.pred", made, s.vector(op.operands[0]), ALL_LANES)


def mask_test(s: Any, op: Op) -> None:
    made = s.new("pred")
    vote(s, made, op)
    s.emit("selp.b64", s.define(op.results[0]), 1, 0, made)


def mask_to_row(s: Any, op: Op) -> None:
    on = s.vector(op.operands[0])
    s.emit("selp.b32", s.define(op.results[0]), 1, 0, on)


# --- Between lanes ---------------------------------------------------------------------------------------------------

def sync_lanes(s: Any, op: Op | None) -> None:
    """What a lane wrote before is seen by the other lanes after."""
    del op
    s.emit("bar.warp.sync", ALL_LANES)


def shuffle(s: Any, made: Any, source: Any, mode: str, lane: int, wide: bool) -> None:
    """A shuffle moves 32 bits."""
    if not wide:
        s.emit(f"shfl.sync.{mode}.b32", made, source, lane, 31, ALL_LANES)
        return
    low, high, new_low, new_high = (s.new("vec") for _ in range(4))
    s.emit("mov.b64", (low, high), source)
    s.emit(f"shfl.sync.{mode}.b32", new_low, low, lane, 31, ALL_LANES)
    s.emit(f"shfl.sync.{mode}.b32", new_high, high, lane, 31, ALL_LANES)
    s.emit("mov.b64", made, (new_low, new_high))


def _shuffle(mode: str, attribute: str) -> Rule:
    def rule(s: Any, op: Op) -> None:
        source = s.vector(op.operands[0])
        shuffle(s, s.define(op.results[0]), source, mode, op.attributes[attribute], bits_of(op.results[0]) == 64)
    return rule


def exchange(s: Any, op: Op) -> None:
    """Each lane gives away one row and keeps the other: those with the bit set give a, the others b."""
    a, b = op.operands
    wide = bits_of(a) == 64
    kind, bits = ("wide", 64) if wide else ("vec", 32)
    distance = op.attributes["distance"]
    bit, upper = s.new("vec"), s.new("pred")
    s.emit("and.b32", bit, s.facts.lane, distance)
    s.emit("setp.ne.s32", upper, bit, 0)
    first, second = s.vector(a), s.vector(b)
    given, taken, low, high = (s.new(kind) for _ in range(4))
    s.emit(f"selp.b{bits}", given, first, second, upper)
    shuffle(s, taken, given, "bfly", distance, wide)
    s.emit(f"selp.b{bits}", low, taken, first, upper)
    s.emit(f"selp.b{bits}", high, second, taken, upper)
    settle(s, op.results[0], low)
    settle(s, op.results[1], high)


RULES: dict[str, Rule] = {
    "splat": splat, "iota": iota, "lane0": lane0,
    "cmp": compare, "select": select, "mask_first": mask_first, "mask_and": _mask_op("and.pred"),
    "mask_or": _mask_op("or.pred"), "mask_xor": _mask_op("xor.pred"), "mask_not": _mask_op("not.pred"),
    "mask_any": mask_test, "mask_all": mask_test, "mask_to_row": mask_to_row, "sync_lanes": sync_lanes,
    "shuffle_xor": _shuffle("bfly", "distance"), "broadcast_lane": _shuffle("idx", "lane"), "exchange": exchange,
}
