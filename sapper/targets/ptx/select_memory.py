"""Selection rules of PTX: addresses, loads and stores of scalars, rows and runs, prefetches.

See select.py. Holds: an address is added up once for all accesses in sight that share it; one in near memory has 32
bits. Source: PTX ISA, section 9.7.9 (data movement) and 5.1 (state spaces).
"""

from __future__ import annotations

from typing import Any

from ...ir.nodes import Op, Value
from ...ir.types import DType
from ...lane.synchronise import bytes_of_lane, values_of_run
from .select_common import Rule, bits_of, load_immediate, low_half, row, scalar, settle
from .text import NEAR, Symbol

# --- Addresses -------------------------------------------------------------------------------------------------------

def address(s: Any, op: Op, at: int, element_bytes: int) -> Any:
    """The address of a thread's own element, or of the one element for all (element_bytes 0), base and index added up
    once for all accesses in sight that share them."""
    base, index, scale, disp = s.address_parts(op, at)
    key = (base, index, scale, element_bytes)
    register, block = s.facts.addresses.get(key, (None, None))
    if register is None or block not in s.scope:
        register = s.scalar(base)
        terms = []
        if index is not None:
            scaled = s.scalar(index)
            if scale != 1:
                scaled = s.new("gpr")
                s.emit("shl.b64", scaled, s.scalar(index), scale.bit_length() - 1)
            terms.append(scaled)
        if element_bytes:
            terms.append(s.facts.lane_bytes[element_bytes])
        for term in terms:
            total = s.new("gpr")
            s.emit("add.s64", total, register, term)
            register = total
        if terms:
            s.facts.addresses[key] = register, s.scope[-1]
    if not -(2**31) <= disp < 2**31:
        far = s.new("gpr")
        s.emit("add.s64", far, register, disp)
        register, disp = far, 0
    return s.memory(register, disp=disp)


def uniform_address(s: Any, op: Op, at: int) -> Any:
    return address(s, op, at, 0)


def lanes_own_address(s: Any, base: Value, offsets: Value, op: Op) -> Any:
    """base + offset * scale + disp of every lane, base and offset added up once."""
    scale = op.attributes.get("scale", 1)
    key = (base, offsets, "gather", scale)
    made, block = s.facts.addresses.get(key, (None, None))
    if made is None or block not in s.scope:
        offset = row(s, offsets)
        start = s.scalar(base)
        made = s.new("gpr")
        if isinstance(offset, int):
            s.emit("add.s64", made, start, ((offset + 2**31) % 2**32 - 2**31) * scale)
        else:
            s.emit("mad.wide.s32", made, offset, scale, start)
        s.facts.addresses[key] = made, s.scope[-1]
    return s.memory(made, disp=op.attributes.get("disp", 0))


def near_memory(s: Any, op: Op) -> None:
    s.emit("mov.u64", s.define(op.results[0]), Symbol(NEAR))


def near_address(s: Any, base: Value, offsets: Value, disp: int, flip: int = 0) -> Any:
    """((base + offset) ^ flip) + disp of every lane; all but disp is computed once. Shared addresses have 32 bits."""
    key = (base, offsets, flip)
    made, block = s.facts.addresses.get(key, (None, None))
    if made is None or block not in s.scope:
        made = s.new("vec")
        if flip:
            s.emit("xor.b32", made, near_address(s, base, offsets, 0).base, flip)
        else:
            s.emit("add.s32", made, low_half(s, base), row(s, offsets))
        s.facts.addresses[key] = made, s.scope[-1]
    return s.memory(made, disp=disp)


def near_scalar(s: Any, base: Value, disp: int = 0) -> Any:
    """base + disp in near memory; the base has 32 bits there."""
    key = (base, "near")
    made, block = s.facts.addresses.get(key, (None, None))
    if made is None or block not in s.scope:
        made = low_half(s, base)
        if isinstance(made, int):
            number, made = made, s.new("vec")
            s.emit("mov.b32", made, number)
        s.facts.addresses[key] = made, s.scope[-1]
    return s.memory(made, disp=disp)


def space_of(op: Op) -> str:
    return "shared" if op.attributes.get("near") else "global"


# --- Scalars ---------------------------------------------------------------------------------------------------------

def s_load(s: Any, op: Op) -> None:
    memory = uniform_address(s, op, 0)
    dtype = op.attributes["dtype"]
    name = "u8" if dtype.name == "bool" else f"{'u' if dtype.kind == 'u' else 's'}{dtype.bits}"
    s.emit(f"ld.{space_of(op)}.{name}", s.define(op.results[0]), memory)


def s_store(s: Any, op: Op) -> None:
    value = scalar(s, op.operands[0])
    if isinstance(value, int):
        made = s.new("gpr")
        load_immediate(s, made, value)
        value = made
    memory = uniform_address(s, op, 1)
    dtype = op.attributes["dtype"]
    name = "u8" if dtype.name == "bool" else f"u{dtype.bits}"
    s.emit_masked(f"st.{space_of(op)}.{name}", s.facts.first, False, memory, value)


# --- Rows ------------------------------------------------------------------------------------------------------------

def memory_type(dtype: DType) -> str:
    """The type by which a load extends an element to a register, and a store takes its low bits."""
    if dtype.name == "bool":
        return "u8"
    if dtype.bits >= 32 or dtype.is_float:
        return f"b{dtype.bits}"
    return f"{'s' if dtype.kind == 'i' else 'u'}{dtype.bits}"


def mask_of(s: Any, op: Op) -> Any:
    return s.vector(op.operands[-1]) if op.attributes.get("masked") else None


def read(s: Any, op: Op, memory: Any, mask: Any) -> None:
    """An element from memory as the row holds it; 0 in lanes that are off."""
    result, dtype = op.results[0], op.attributes["dtype"]
    type_ = f"{space_of(op)}.{memory_type(dtype)}"

    def fetch(register: Any, bits: int) -> None:
        if mask is not None:
            s.emit(f"mov.b{bits}", register, 0)
            s.emit_masked(f"ld.{type_}", mask, False, register, memory)
        else:
            s.emit(f"ld.{type_}", register, memory)

    if dtype.name == "bf16":
        raw = s.new("vec")
        fetch(raw, 32)
        s.emit("shl.b32", s.define(result), raw, 16)
    elif dtype.name == "f16":
        half = s.new("half")
        fetch(half, 16)
        s.emit("cvt.f32.f16", s.define(result), half)
    elif mask is not None:
        # The address and the mask are read after the zero is there: it goes to a register of its own.
        made = s.new(s.kind(result.type))
        fetch(made, bits_of(result))
        settle(s, result, made)
    else:
        fetch(s.define(result), bits_of(result))


def unrounded(value: Value, dtype: DType) -> Value:
    """What an element that is stored was rounded from, if storing it rounds it so, too: once is enough. (ptxas drops
    the rounding, where nothing else reads it.)"""
    op = value.op
    return op.operands[0] if op is not None and op.name == "round_to" and op.attributes["dtype"] is dtype else value


def write(s: Any, op: Op, memory: Any, mask: Any) -> None:
    """The low bits, or the rounded number, of every lane that is on."""
    dtype = op.attributes["dtype"]
    source = s.vector(unrounded(op.operands[0], dtype))
    if dtype.name in ("bf16", "f16"):
        half = s.new("half")
        s.emit(f"cvt.rn.{dtype.name}.f32", half, source)
        source = half
    hint = ".cs" if op.attributes.get("streaming") else ""
    mnemonic = f"st.{space_of(op)}{hint}.b{8 if dtype.name == 'bool' else dtype.bits}"
    if mask is None:
        s.emit(mnemonic, memory, source)
    else:
        s.emit_masked(mnemonic, mask, False, memory, source)


def load(s: Any, op: Op) -> None:
    read(s, op, address(s, op, 0, op.attributes["dtype"].size_bytes), mask_of(s, op))


def load_splat(s: Any, op: Op) -> None:
    read(s, op, uniform_address(s, op, 0), None)


def gather(s: Any, op: Op) -> None:
    base, offsets = op.operands[:2]
    read(s, op, lanes_own_address(s, base, offsets, op), mask_of(s, op))


def store(s: Any, op: Op) -> None:
    write(s, op, address(s, op, 1, op.attributes["dtype"].size_bytes), mask_of(s, op))


def store_lane0(s: Any, op: Op) -> None:
    write(s, op, uniform_address(s, op, 1), s.facts.first)


def scatter(s: Any, op: Op) -> None:
    base, offsets = op.operands[1:3]
    write(s, op, lanes_own_address(s, base, offsets, op), mask_of(s, op))


def join(s: Any, op: Op) -> None:
    base, offsets = op.operands[1:3]
    memory, mask = lanes_own_address(s, base, offsets, op), mask_of(s, op)
    kind, dtype, source = op.attributes["kind"], op.attributes["dtype"], s.vector(op.operands[0])
    type_ = dtype.name
    if dtype.bits == 16:
        half = s.new("half")
        s.emit(f"cvt.rn.{dtype.name}.f32", half, source)
        source, type_ = half, f"noftz.{dtype.name}"
    elif dtype.is_integer:
        # The sum of two numbers is the same with a sign as without; of 64 bits there is no other.
        type_ = f"{'u' if kind == 'add' else 's' if kind in ('max', 'min') else 'b'}{dtype.bits}"
    mnemonic = f"red.relaxed.gpu.global.{kind}.{type_}"
    if mask is None:
        s.emit(mnemonic, memory, source)
    else:
        s.emit_masked(mnemonic, mask, False, memory, source)


def prefetch(s: Any, op: Op) -> None:
    s.emit(f"prefetch.global.L{min(2, op.attributes.get('level', 1))}", uniform_address(s, op, 0))


def fence_streaming(s: Any, op: Op) -> None:
    """Nothing: these stores are ordered like any other."""
    del s, op


# --- Runs ------------------------------------------------------------------------------------------------------------

WORD_BYTES = 4


def type_of_run(op: Op) -> str:
    """Of the one instruction by which a lane takes a run: words side by side, or a part of one."""
    size_bytes = bytes_of_lane(op)
    words = size_bytes // WORD_BYTES
    return f"v{words}.b32" if words > 1 else f"b{8 * size_bytes}"


def address_of_run(s: Any, op: Op) -> Any:
    if not op.attributes.get("gathered"):
        return address(s, op, 0, bytes_of_lane(op))
    base, offsets = op.operands[:2]
    if op.attributes.get("near"):
        return near_address(s, base, offsets, op.attributes.get("disp", 0), op.attributes.get("flip", 0))
    return lanes_own_address(s, base, offsets, op)


def load_run(s: Any, op: Op) -> None:
    dtype, results, mask = op.attributes["dtype"], op.results, mask_of(s, op)
    memory = address_of_run(s, op)
    each = WORD_BYTES // dtype.size_bytes
    plain = each == 1 and mask is None
    words = [s.define(v) if plain else s.new("vec") for v in results[::each]]
    mnemonic, target = f"ld.{space_of(op)}.{type_of_run(op)}", tuple(words) if len(words) > 1 else words[0]
    if mask is None:
        s.emit(mnemonic, target, memory)
    else:
        for word in words:
            s.emit("mov.b32", word, 0)
        s.emit_masked(mnemonic, mask, False, target, memory)
    for number, value in enumerate(() if plain else results):
        if each == 1:
            settle(s, value, words[number])
        else:
            s.facts.parts[value] = dtype, words[number // each], number % each
            take_element(s, dtype, words[number // each], number % each, value)


def unpack(s: Any, op: Op) -> None:
    take_element(s, op.attributes["dtype"], s.vector(op.operands[0]), op.attributes["place"], op.results[0])


def take_element(s: Any, dtype: DType, word: Any, place: int, value: Value) -> None:
    """The element at a place of a word as a row holds it."""
    if dtype.name == "bf16":
        if place:
            s.emit("and.b32", s.define(value), word, 0xFFFF0000)
        else:
            s.emit("shl.b32", s.define(value), word, 16)
    elif dtype.name == "f16":
        halves = s.new("half"), s.new("half")
        s.emit("mov.b32", halves, word)
        s.emit("cvt.f32.f16", s.define(value), halves[place])
    elif dtype.is_float and dtype.bits == 8:
        pairs, halves, both = (s.new("half"), s.new("half")), (s.new("half"), s.new("half")), s.new("vec")
        s.emit("mov.b32", pairs, word)
        s.emit(f"cvt.rn.f16x2.{dtype.name.removeprefix('f8')}x2", both, pairs[place // 2])
        s.emit("mov.b32", halves, both)
        s.emit("cvt.f32.f16", s.define(value), halves[place % 2])
    elif dtype.bits == 32:
        settle(s, value, word)
    else:
        s.emit(f"bfe.{'s' if dtype.kind == 'i' else 'u'}32", s.define(value), word, dtype.bits * place, dtype.bits)


def store_run(s: Any, op: Op) -> None:
    dtype = op.attributes["dtype"]
    values, mask = values_of_run(op), mask_of(s, op)
    each = WORD_BYTES // dtype.size_bytes
    words = [pack_values(s, dtype, values[first:first + each]) for first in range(0, len(values), each)]
    memory = address_of_run(s, op)
    hint = ".cs" if op.attributes.get("streaming") else ""
    mnemonic, source = f"st.{space_of(op)}{hint}.{type_of_run(op)}", tuple(words) if len(words) > 1 else words[0]
    if mask is None:
        s.emit(mnemonic, memory, source)
    else:
        s.emit_masked(mnemonic, mask, False, memory, source)


def pack_values(s: Any, dtype: DType, values: list[Value]) -> Any:
    """The word of elements: the one that was loaded, where they are its own."""
    parts = [s.facts.parts.get(v) for v in values]
    if len(values) == WORD_BYTES // dtype.size_bytes and None not in parts and [
            (kind, place) for kind, _, place in parts] == [(dtype, n) for n in range(len(parts))] and len(
            {word for _, word, _ in parts}) == 1:
        return parts[0][1]
    return pack(s, dtype, [s.vector(unrounded(v, dtype)) for v in values])


def pack(s: Any, dtype: DType, rows: list[Any]) -> Any:
    """Elements side by side in a word, the first in its low bits; fewer where a run is shorter than a word."""
    if dtype.bits == 32:
        return rows[0]
    made = s.new("vec")
    if dtype.bits == 16:
        if dtype.is_float:
            s.emit(f"cvt.rn.{dtype.name}x2.f32", made, rows[1], rows[0])
        else:
            s.emit("prmt.b32", made, rows[0], rows[1], 0x5410)
        return made
    s.emit("prmt.b32", made, rows[0], rows[1], 0x0040)
    if len(rows) == 2:
        return made
    high, whole = s.new("vec"), s.new("vec")
    s.emit("prmt.b32", high, rows[2], rows[3], 0x0040)
    s.emit("prmt.b32", whole, made, high, 0x5410)
    return whole


RULES: dict[str, Rule] = {
    "s_load": s_load, "s_store": s_store, "near_memory": near_memory,
    "load": load, "load_splat": load_splat, "gather": gather, "store": store, "store_lane0": store_lane0,
    "scatter": scatter, "join": join, "load_run": load_run, "store_run": store_run, "unpack": unpack,
    "prefetch": prefetch,
    "fence_streaming": fence_streaming,
}
