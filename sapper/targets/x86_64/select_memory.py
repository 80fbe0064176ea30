"""Selection rules of x86-64: loads, stores, gathers and scatters of rows, prefetches.

See select.py. Source: Intel SDM volume 2; the manual's operand order throughout.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

from ...ir.nodes import Op, Value
from .select_common import FOLDED_DTYPES, Key, OwnConstants, Rule, bits_of, widens_by_bytes
from .select_conversions import round_bfloat16, rounding_constants
from .select_float8 import FLOAT8, UNPACKING, by_lanes, packed_bytes, unpack
from .select_lanes import extract_half, join, lanes_out, load_splat_into, quarters
from .select_masks import wide_mask

_WIDENING = {"i8": "vpmovsxbd", "u8": "vpmovzxbd", "bool": "vpmovzxbd", "i16": "vpmovsxwd", "bf16": "vpmovzxwd",
             "f16": "vcvtph2ps"}


def load(s: Any, op: Op) -> None:
    dtype = op.attributes["dtype"]
    name = dtype.name
    memory = s.address(op, 0)
    mask = op.operands[-1] if op.attributes.get("masked") else None
    result = op.results[0]
    facts = s.facts
    if op.attributes.get("twice"):
        s.emit(f"vbroadcasti128.{facts.bits4}", s.define(result), memory)
        return
    if name in FOLDED_DTYPES:
        bits = bits_of(s, dtype)
        if mask is None:
            s.emit(f"vmovups.{bits}", s.define(result), memory)
        elif facts.opmask:
            on = s.vector(mask)
            s.emit_masked(f"vmovups.{bits}" if dtype.bits == 32 else f"vmovupd.{bits}", on, True, s.define(result),
                          memory)
        elif dtype.bits == 32:
            on = s.vector(mask)
            s.emit(f"vmaskmovps.load.{bits}", s.define(result), on, memory)
        else:
            on = wide_mask(s, mask)
            s.emit(f"vmaskmovpd.load.{bits}", s.define(result), on, memory)
        return
    if name not in _WIDENING and name not in FLOAT8:
        raise ValueError(f"{s.location or s.function.name}: load of {name}: found no row for it; expected one of "
                         f"{sorted([*FOLDED_DTYPES, *_WIDENING, *FLOAT8])}; mend: load bytes and take them apart")
    bits = facts.bits4
    source = memory
    on = None
    if mask is not None:
        if facts.opmask:
            on = s.vector(mask)
        else:
            source = _load_narrow_lanes(s, dtype.size_bytes, memory, mask)
    elif name in FLOAT8 and s.lanes == 4:  # widening reads 8 bytes
        source = s.new("vec")
        s.emit("vmovd.to_vec", source, memory)
    if _widens_by_permutation(s, op):
        if "beside" in op.attributes:
            # The whole line, of which one half is taken: a load and a permutation in one instruction.
            both = moved(s, memory, min(0, op.attributes["beside"]) * bits // 16)
            s.emit_masked(f"vpermw.{bits}", s.constant(_upper_halves(s)), True, s.define(result),
                          s.constant(_widening_key(s, op)), both)
            return
        packed = s.new("vec")
        s.emit(f"vmovups.{bits // 2}", packed, memory)
        s.emit(f"vpermw.{bits}", s.define(result), s.constant(_widening_key(s, op)), packed)
        return
    if widens_by_bytes(s, op):
        # Both halves of a register take their elements of the same 16 bytes: one operation besides the load.
        both = s.new("vec")
        s.emit("vbroadcasti128.256", both, memory)
        s.emit("vpshufb.256", s.define(result), both, s.constant_operand(_UPPER_WORDS))
        return
    widen(s, name, s.define(result), source, on)


def _widens_by_permutation(s: Any, op: Op) -> bool:
    """Whether bf16 are brought to the upper halves of lanes by one instruction, not by two: it reads a whole register,
    of which the load leaves the upper half 0. It is one operation where permutations of bytes exist, two before."""
    return bool(op.attributes["dtype"].name == "bf16" and {"avx512bw", "avx512_vbmi"} <= s.facts.features
                and s.lanes >= 8 and not op.attributes.get("masked"))


_UPPER_WORDS: Key = ("d", bytes(byte for lane in range(8) for byte in (0x80, 0x80, 2 * lane, 2 * lane + 1)))
"""VPSHUFB's control: element i of 16 bytes to the upper half of lane i, zeros to the lower one."""


def _widening_key(s: Any, op: Op) -> Key:
    """Where the words of lanes come from: the upper ones from the elements, the lower ones from what is 0, or, of a
    whole line, from anywhere."""
    first = s.lanes if op.attributes.get("beside") == -1 else 0
    return ("d", struct.pack(f"<{2 * s.lanes}H", *[place for i in range(s.lanes) for place in (s.lanes, first + i)]))


def _upper_halves(s: Any) -> Key:
    """The upper word of each lane."""
    return ("k", int("10" * s.lanes, 2))


def widen(s: Any, name: str, register: Any, source: Any, on: Any = None) -> None:
    """Narrow elements in memory or in a register to a row; under an opmask the others become 0."""
    if name in FLOAT8:
        unpack(s, name, register, source, on)
        return
    bits = s.facts.bits4
    made = s.new("vec") if name == "bf16" else register
    if on is not None:
        s.emit_masked(f"{_WIDENING[name]}.{bits}", on, True, made, source)
    else:
        s.emit(f"{_WIDENING[name]}.{bits}", made, source)
    if name == "bf16":
        s.emit(f"vpslld.imm.{bits}", register, made, 16)


def moved(s: Any, memory: Any, bytes_: int) -> Any:
    """The same memory operand so many bytes further."""
    return s.memory(memory.base, memory.index, memory.scale, memory.disp + bytes_)


def for_each_lane(s: Any, mask: Value | None, body: Callable[[int], None],
                  together: Callable[[], None] | None = None) -> None:
    """Code for lane 0, 1, ..., each jumped over if its lane is off; where lanes that are on come first, so are all that
    follow. Without opmasks, or for what they can't do. together: code for all lanes, if none is off, as in most windows
    and in all pieces of a tail but the last."""
    bits = end = None
    first = mask is not None and mask.op is not None and mask.op.name == "mask_first"
    if first:
        end = s.new_label("all")
    if mask is not None:
        on = s.vector(mask)
        bits = s.new("gpr")
        if s.facts.opmask:
            s.emit("kmovw.from_mask", bits, on)
        else:
            s.emit(f"vmovmskps.{s.facts.bits4}", bits, on)
    if together is not None and bits is not None:
        some, end = s.new_label("some"), end or s.new_label("all")
        s.emit("cmp.32", bits, (1 << s.lanes) - 1)
        s.branch("jne", some)
        together()
        s.branch("jmp", end)
        s.label(some)
    for lane in range(s.lanes):
        if bits is None:
            body(lane)
            continue
        after = end if first else s.new_label("lane")
        s.emit("test.32", bits, 1 << lane)
        s.branch("je", after)
        body(lane)
        if not first:
            s.label(after)
    if end is not None:
        s.label(end)


def _known_count(s: Any, mask: Value | None) -> int | None:
    """How many lanes are on, if these are the first ones, and that is known."""
    if mask is None or mask.op is None or mask.op.name != "mask_first":
        return None
    count = s.constant_of(mask.op.operands[0])
    return None if count is None else max(0, min(s.lanes, count))


def _load_narrow_lanes(s: Any, size: int, memory: Any, mask: Value) -> Any:
    """Elements of 1 or 2 bytes at consecutive places, only those that are on; the others are 0."""
    register = s.new("vec")
    count = _known_count(s, mask)
    if count is not None:
        _move_first_bytes(s, register, memory, count * size, load=True)
        return register
    s.emit("vxorps.128", register, register, register)
    letter = "b" if size == 1 else "w"
    whole = {4: "vmovd.to_vec", 8: "vmovq", 16: "vmovups.128"}[s.lanes * size]
    for_each_lane(s, mask, lambda lane: s.emit(f"vpinsr{letter}", register, register, moved(s, memory, lane * size),
                                               lane), lambda: s.emit(whole, register, memory))
    return register


def _move_first_bytes(s: Any, register: Any, memory: Any, count: int, load: bool) -> None:
    """So many bytes between memory and the low end of a register, in as few pieces as they have. load: into the
    register, which has zeros above."""
    at = next(n for n in (16, 8, 4, 0) if count >= n)
    if at:
        name = {16: "vmovups.128", 8: "vmovq", 4: "vmovd.to_vec" if load else "vmovd.from_vec"}[at]
        s.emit(name, *((register, memory) if load else (memory, register)))
    elif load:
        s.emit("vxorps.128", register, register, register)
    for letter, size in (("d", 4), ("w", 2), ("b", 1)):
        if count - at >= size:
            piece = moved(s, memory, at)
            if load:
                s.emit(f"vpinsr{letter}", register, register, piece, at // size)
            else:
                s.emit(f"vpextr{letter}", piece, register, at // size)
            at += size


def load_splat(s: Any, op: Op) -> None:
    load_splat_into(s, op.attributes["dtype"].name, s.address(op, 0), s.define(op.results[0]))


def narrow(s: Any, name: str, row: Any, exact: bool = False) -> Any:
    """A row of 32-bit lanes to packed elements of 1 or 2 bytes in the low part of a fresh register. exact: as of a
    store."""
    if name in FLOAT8:
        return packed_bytes(s, name, row)
    bits = s.facts.bits4
    made = s.new("vec")
    if name == "f16":
        s.emit(f"vcvtps2ph.{bits}", made, row, 0)
        return made
    if name == "bf16" and not exact:
        row = round_bfloat16(s, row)
    words = name in ("bf16", "i16")
    if s.facts.opmask:
        if name == "bf16":
            rounded, row = row, s.new("vec")
            s.emit(f"vpsrld.imm.{bits}", row, rounded, 16)
        s.emit(f"vpmovd{'w' if words else 'b'}.{bits}", made, row)
        return made
    # The wanted bytes of each 128-bit part to its low end, then the parts side by side.
    packed = s.new("vec")
    first = 2 if name == "bf16" else 0
    order = [lane + byte for lane in range(first, 16, 4) for byte in ((0, 1) if words else (0,))]
    order += [0x80] * (16 - len(order))
    s.emit(f"vpshufb.{bits}", packed, row, s.constant_operand(("d", bytes(order) * (bits // 128))))
    if bits == 128:
        return packed
    if words:
        s.emit("vpermq.imm.256", made, packed, 0x08)
    else:
        high = s.new("vec")
        extract_half(s, high, packed, 256)
        s.emit("vpunpckldq.128", made, packed, high)
    return made


def store(s: Any, op: Op) -> None:
    value = op.operands[0]
    dtype = op.attributes["dtype"]
    name = dtype.name
    memory = s.address(op, 1)
    mask = op.operands[-1] if op.attributes.get("masked") else None
    streaming = bool(op.attributes.get("streaming")) and mask is None
    row = s.vector(value)
    facts = s.facts
    if name in FOLDED_DTYPES:
        bits = bits_of(s, dtype)
        if mask is None:
            s.emit(f"vmovntps.{bits}" if streaming else f"vmovups.{bits}", memory, row)
        elif facts.opmask:
            s.emit_masked(f"vmovups.{bits}" if dtype.bits == 32 else f"vmovupd.{bits}", s.vector(mask), False, memory,
                          row)
        elif 0 < (first := _first_bytes(s, mask, dtype.size_bytes)) < bits // 8:
            _store_first(s, memory, row, first, bits)
        elif dtype.bits == 32:
            s.emit(f"vmaskmovps.store.{bits}", memory, s.vector(mask), row)
        else:
            s.emit(f"vmaskmovpd.store.{bits}", memory, wide_mask(s, mask), row)
        return
    bits = facts.bits4
    size_bits = dtype.bits * s.lanes
    if op.attributes.get("denormals") == "none":
        packed = s.new("vec")
        s.emit(f"vcvtneps2bf16.{bits}", packed, row)
        _store_packed(s, memory, packed, size_bits, streaming)
        return
    if facts.opmask and not (streaming and size_bits >= 128) and (mask is not None or size_bits >= 64):
        if name == "bf16":
            rounded = row if op.attributes.get("exact") else round_bfloat16(s, row)
            row = s.new("vec")
            s.emit(f"vpsrld.imm.{bits}", row, rounded, 16)
        if name == "f16":
            instruction, more = f"vcvtps2ph.{bits}", [0]
        elif name in FLOAT8:
            (row, instruction), more = by_lanes(s, name, row), []
        else:
            instruction, more = f"vpmovd{'w' if dtype.bits == 16 else 'b'}.{bits}", []
        if mask is None:
            s.emit(instruction, memory, row, *more)
        else:
            s.emit_masked(instruction, s.vector(mask), False, memory, row, *more)
        return
    made = narrow(s, name, row, bool(op.attributes.get("exact")))
    count = _known_count(s, mask)
    if count is not None:
        _move_first_bytes(s, made, memory, count * dtype.size_bytes, load=False)
    elif mask is not None:
        letter = "b" if dtype.bits == 8 else "w"
        for_each_lane(s, mask, lambda lane: s.emit(f"vpextr{letter}", moved(s, memory, lane * dtype.size_bytes), made,
                                                   lane), lambda: _store_packed(s, memory, made, size_bits, False))
    else:
        _store_packed(s, memory, made, size_bits, streaming)


def _first_bytes(s: Any, mask: Value, size_bytes: int) -> int:
    """How many bytes of a row a mask of its first lanes leaves, if that is a number; else 0."""
    count = s.constant_of(mask.op.operands[0]) if mask.op is not None and mask.op.name == "mask_first" else None
    return 0 if count is None else max(0, count) * size_bytes


def _store_first(s: Any, memory: Any, row: Any, count: int, bits: int) -> None:
    """The first bytes of a row, whole elements: an AMD core takes a masked store apart lane by lane, 18 operations for
    four lanes and 42 for eight, and nothing else meanwhile. Measured on a Zen 3, attention of one token, whose scores
    are stored by threes: 8 x 4 heads of 128 and 4096 positions 0.90 of the time, 3 x 3 of 64 and 512 0.87."""
    done = 0
    if count >= 16:
        s.emit("vmovups.128", memory, row)
        done = 16
        if count > done:
            half = s.new("vec")
            extract_half(s, half, row, bits)
            row = half
    if count - done >= 8:
        s.emit("vmovq", moved(s, memory, done), row)
        done += 8
    if count > done:
        place = moved(s, memory, done)
        if done % 16:
            s.emit("vpextrd", place, row, done % 16 // 4)
        else:
            s.emit("vmovd.from_vec", place, row)


def _store_packed(s: Any, memory: Any, made: Any, size_bits: int, streaming: bool) -> None:
    """Narrow elements in the low part of a register."""
    if size_bits >= 128:
        s.emit(f"vmovntps.{size_bits}" if streaming else f"vmovups.{size_bits}", memory, made)
    else:
        s.emit("vmovq" if size_bits == 64 else "vmovd.from_vec", memory, made)


def store_lane0(s: Any, op: Op) -> None:
    value = op.operands[0]
    dtype = op.attributes["dtype"]
    memory = s.address(op, 1)
    row = s.vector(value)
    if dtype.name in FOLDED_DTYPES:
        s.emit("vmovd.from_vec" if dtype.bits == 32 else "vmovq", memory, row)
    elif dtype.name in FLOAT8:
        s.emit("vpextrb", memory, narrow(s, dtype.name, row), 0)
    elif dtype.name in ("bf16", "f16"):
        s.emit("vpextrw", memory, narrow(s, dtype.name, row, bool(op.attributes.get("exact"))), 0)
    else:
        s.emit("vpextrb" if dtype.bits == 8 else "vpextrw", memory, row, 0)


def gather(s: Any, op: Op) -> None:
    base, offsets = op.operands[:2]
    mask = op.operands[2] if op.attributes.get("masked") else None
    dtype = op.attributes["dtype"]
    name = dtype.name
    scale, disp = op.attributes.get("scale", 1), op.attributes.get("disp", 0)
    start, index = s.scalar(base), s.vector(offsets)
    result = op.results[0]
    facts = s.facts
    if name not in FOLDED_DTYPES:
        # Elements are narrower than any gather reads, and reading past them could fault: one lane after the other.
        registers = lanes_out(s, index, 4)
        letter, per = ("b", 16) if dtype.bits == 8 else ("w", 8)
        parts = []
        for _ in range(0, s.lanes, per):
            part = s.new("vec")
            s.emit("vxorps.128", part, part, part)
            parts.append(part)

        def one(lane: int) -> None:
            offset = s.new("gpr")
            s.emit("movsxd", offset, registers[lane])
            part = parts[lane // per]
            s.emit(f"vpinsr{letter}", part, part, s.memory(start, offset, scale, disp), lane % per)

        for_each_lane(s, mask, one)
        packed = parts[0]
        if len(parts) > 1:
            packed = s.new("vec")
            join(s, parts, packed)
        widen(s, name, s.define(result), packed)
        return
    bits = bits_of(s, dtype)
    suffix = "ps" if dtype.bits == 32 else "pd"
    # The destination is read (lanes that are off keep it), so it is zeroed: that also keeps it apart from the index,
    # which the instruction demands. The mask is used up.
    register = s.new("vec")
    s.emit("vxorps.128", register, register, register)
    memory = s.memory(start, index, scale, disp)
    if facts.opmask:
        on = s.new("mask")
        if mask is None:
            s.emit("kxnorw", on, on, on)
        else:
            s.emit("kmovq", on, s.vector(mask))
        s.emit_masked(f"vgatherd{suffix}.{bits}", on, False, register, memory)
    else:
        on = s.new("vec")
        if mask is None:
            s.emit(f"vpcmpeqd.{bits}", on, on, on)
        else:
            s.emit(f"vmovaps.{bits}", on, s.vector(mask) if dtype.bits == 32 else wide_mask(s, mask))
        s.emit(f"vgatherd{suffix}.vex.{bits}", register, memory, on)
    wanted = s.target.get(result)
    if wanted is None:
        s.registers[result] = register
    else:
        s.emit(f"vmovaps.{bits}", s.define(result), register)


def scatter(s: Any, op: Op) -> None:
    value, base, offsets = op.operands[:3]
    mask = op.operands[3] if op.attributes.get("masked") else None
    dtype = op.attributes["dtype"]
    scale, disp = op.attributes.get("scale", 1), op.attributes.get("disp", 0)
    start, index, row = s.scalar(base), s.vector(offsets), s.vector(value)
    facts = s.facts
    if facts.opmask and dtype.name in FOLDED_DTYPES:
        on = s.new("mask")
        if mask is None:
            s.emit("kxnorw", on, on, on)
        else:
            s.emit("kmovq", on, s.vector(mask))
        suffix = "ps" if dtype.bits == 32 else "pd"
        s.emit_masked(f"vscatterd{suffix}.{bits_of(s, dtype)}", on, False, s.memory(start, index, scale, disp), row)
        return
    registers = lanes_out(s, index, 4)
    size = dtype.size_bytes
    letter = {1: "b", 2: "w", 4: "d", 8: "q"}[size]
    if dtype.name in FOLDED_DTYPES:
        parts = quarters(s, row, bits_of(s, dtype))
    else:
        parts = quarters(s, narrow(s, dtype.name, row), max(128, dtype.bits * s.lanes))
    per = 16 // size

    def one(lane: int) -> None:
        offset = s.new("gpr")
        s.emit("movsxd", offset, registers[lane])
        s.emit(f"vpextr{letter}", s.memory(start, offset, scale, disp), parts[lane // per], lane % per)

    for_each_lane(s, mask, one)


def prefetch(s: Any, op: Op) -> None:
    if op.attributes.get("write") and "prfchw" in s.facts.features:
        s.emit("prefetchw", s.address(op, 0))
        return
    s.emit(f"prefetcht{op.attributes.get('level', 1) - 1}", s.address(op, 0))


def unpacking_constants(s: Any, op: Op) -> tuple[Key, ...]:
    if op.name == "load" and _widens_by_permutation(s, op):
        masks = (_upper_halves(s),) if "beside" in op.attributes else ()
        return (_widening_key(s, op), *masks)
    if op.name == "load" and widens_by_bytes(s, op):
        return (_UPPER_WORDS,)
    return UNPACKING.get(op.attributes["dtype"].name, ())


RULES: dict[str, Rule] = {
    "load": load, "load_splat": load_splat, "gather": gather, "store": store, "store_lane0": store_lane0,
    "scatter": scatter, "prefetch": prefetch,
}

OWN_CONSTANTS: dict[str, OwnConstants] = {
    "store": rounding_constants, "store_lane0": rounding_constants, "scatter": rounding_constants,
    **dict.fromkeys(("load", "gather", "load_splat"), unpacking_constants),
}
