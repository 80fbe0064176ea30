"""Selection rules of x86-64: comparisons of rows, masks, choosing by them.

See select.py: a mask is an opmask register, or without AVX-512 a vector register of 32-bit lanes.
Source: Intel SDM volume 2; the manual's operand order throughout.
"""

from __future__ import annotations

from typing import Any

from ...ir.nodes import Op, Value
from ...ir.types import DType
from .select_common import (
    FLOAT,
    INTEGER,
    MIRRORED,
    ONES,
    ZERO4,
    OwnConstants,
    Rule,
    bits_of,
    constant_key,
    dtype_of,
    index_key,
    iota_key,
    load_immediate,
    make_constant,
)
from .select_lanes import extract_half, splat_register

_FLOAT_PREDICATES = {"eq": 0, "lt": 17, "le": 18, "ne": 4, "ge": 29, "gt": 30}
"""Quiet comparisons: false if unordered, except ne (SDM volume 2, CMPPS, table 3-1)."""
_INTEGER_PREDICATES = {"eq": 0, "lt": 1, "le": 2, "ne": 4, "ge": 5, "gt": 6}


def compare(s: Any, op: Op) -> None:
    a, b = op.operands
    condition = op.attributes["cond"]
    dtype = dtype_of(a)
    bits = bits_of(s, dtype)
    if s.is_memory(a) and not s.is_memory(b):
        a, b, condition = b, a, MIRRORED[condition]
    result = op.results[0]
    if dtype.name in FLOAT:
        last = s.operand(b)
        first = s.vector(a)
        register = _mask_made(s, result, dtype)
        s.emit(f"vcmp{FLOAT[dtype.name]}.{'k.' if s.facts.opmask else ''}{bits}", register, first, last,
               _FLOAT_PREDICATES[condition])
    elif s.facts.opmask:
        last = s.operand(b)
        first = s.vector(a)
        s.emit(f"vpcmp{INTEGER[dtype.name]}.{bits}", s.define(result), first, last, _INTEGER_PREDICATES[condition])
        return
    else:
        letter = INTEGER[dtype.name]
        if condition in ("lt", "ge"):
            a, b, condition = b, a, MIRRORED[condition]
        last = s.operand(b)
        first = s.vector(a)
        register = _mask_made(s, result, dtype)
        name = f"vpcmp{'gt' if condition in ('gt', 'le') else 'eq'}{letter}.{bits}"
        if condition in ("gt", "eq"):
            s.emit(name, register, first, last)
        elif dtype.bits == 32 and s.facts.is_choice(result, s.uses.get(result, 0)):
            s.emit(name, register, first, last)
            s.facts.opposite.add(result)
        else:
            made = s.new("vec")
            s.emit(name, made, first, last)
            s.emit(f"vpxor.{bits}", register, made, s.constant(ONES))
    if not s.facts.opmask and dtype.bits == 64:
        narrow_mask(s, register, s.define(result))


def _mask_made(s: Any, result: Value, dtype: DType) -> Any:
    """Where a comparison writes: the mask's register, or one that is narrowed after (64-bit lanes, no opmasks)."""
    if s.facts.opmask or dtype.bits == 32:
        return s.define(result)
    register = s.facts.wide_masks[result] = s.new("vec")
    return register


def narrow_mask(s: Any, wide: Any, register: Any) -> None:
    """Four 64-bit lanes of ones or zeros to 32-bit lanes."""
    high = s.new("vec")
    extract_half(s, high, wide, 256)
    s.emit("vshufps.128", register, wide, high, 0x88)


def wide_mask(s: Any, value: Value) -> Any:
    """A mask as 64-bit lanes of ones or zeros (without opmasks)."""
    wide = s.facts.wide_masks.get(value)
    if wide is None:
        wide = s.new("vec")
        s.emit("vpmovsxdq.256", wide, s.vector(value))
    return wide


def select(s: Any, op: Op) -> None:
    mask, a, b = op.operands
    result = op.results[0]
    dtype = dtype_of(result)
    bits = bits_of(s, dtype)
    suffix = "ps" if dtype.bits == 32 else "pd"
    if not s.facts.opmask:
        on = s.vector(mask) if dtype.bits == 32 else wide_mask(s, mask)
        if mask in s.facts.opposite:
            a, b = b, a
        if is_zero(s, b):
            row = s.vector(a)
            s.emit(f"vand{suffix}.{bits}", s.define(result), on, row)
        elif is_zero(s, a):
            row = s.vector(b)
            s.emit(f"vandn{suffix}.{bits}", s.define(result), on, row)
        else:
            first, second = s.vector(b), s.vector(a)
            s.emit(f"vblendv{suffix}.{bits}", s.define(result), first, second, on)
        return
    on = s.vector(mask)
    if is_zero(s, b):
        row = s.vector(a)
        s.emit_masked(f"vmova{suffix}.{bits}", on, True, s.define(result), row)
        return
    row, other = s.vector(a), s.vector(b)
    register, place = s.tie(result, (b,))
    if place == 0:
        s.emit_masked(f"vmova{suffix}.{bits}", on, False, register, row)
    else:
        s.emit_masked(f"vblendm{suffix}.{bits}", on, False, register, other, row)


def is_zero(s: Any, value: Value) -> bool:
    op = value.op
    return op is not None and op.name == "splat_const" and bool(constant_key(s, value) == ZERO4)


def clamped_count(s: Any, count: Value) -> Any:
    """A count cut to 0 .. lanes, in a fresh general register."""
    source = s.scalar(count)
    cut, zero = s.new("gpr"), s.new("gpr")
    s.emit("mov.32", cut, s.lanes)
    s.emit("cmp.64", source, cut)
    s.emit("cmovl.64", cut, source)
    s.emit("xor.32", zero, zero)
    s.emit("test.64", cut, cut)
    s.emit("cmovs.64", cut, zero)
    return cut


def mask_first(s: Any, op: Op) -> None:
    result = op.results[0]
    number = s.constant_of(op.operands[0])
    lanes = s.lanes
    if s.facts.opmask:
        register = s.define(result)
        bits = s.new("gpr")
        if number is not None:
            load_immediate(s, bits, (1 << max(0, min(number, lanes))) - 1)
        else:
            ones = s.new("gpr")
            cut = clamped_count(s, op.operands[0])
            s.emit("mov.32", ones, (1 << lanes) - 1)
            s.emit("bzhi.32", bits, ones, cut)
        s.emit("kmovw.to_mask", register, bits)
        return
    if number is not None:
        on = max(0, min(number, lanes))
        make_constant(s, index_key([-1] * on + [0] * (lanes - on), 4), s.define(result))
        return
    count = s.new("vec")
    cut = clamped_count(s, op.operands[0])
    splat_register(s, cut, count, 4, s.facts.bits4)
    last = s.constant_operand(iota_key(s))
    s.emit(f"vpcmpgtd.{s.facts.bits4}", s.define(result), count, last)


def _mask_binary(name: str) -> Rule:
    def rule(s: Any, op: Op) -> None:
        a, b = s.vector(op.operands[0]), s.vector(op.operands[1])
        if s.facts.opmask:
            s.emit(f"k{name}w", s.define(op.results[0]), a, b)
        else:
            s.emit(f"vp{name}.{s.facts.bits4}", s.define(op.results[0]), a, b)
    return rule


def mask_not(s: Any, op: Op) -> None:
    mask = s.vector(op.operands[0])
    if not s.facts.opmask:
        ones = s.constant(ONES)
        s.emit(f"vpxor.{s.facts.bits4}", s.define(op.results[0]), mask, ones)
    elif s.lanes == 4:
        ones = s.constant(("k", 15))
        s.emit("kxorw", s.define(op.results[0]), mask, ones)
    else:
        s.emit("knotw" if s.lanes == 16 else "knotb", s.define(op.results[0]), mask)


def mask_to_row(s: Any, op: Op) -> None:
    mask = s.vector(op.operands[0])
    bits = s.facts.bits4
    if s.facts.opmask:
        one = s.constant(("s", 4, 1))
        s.emit_masked(f"vmovaps.{bits}", mask, True, s.define(op.results[0]), one)
    else:
        s.emit(f"vpsrld.imm.{bits}", s.define(op.results[0]), mask, 31)


RULES: dict[str, Rule] = {
    "cmp": compare, "select": select, "mask_first": mask_first, "mask_and": _mask_binary("and"),
    "mask_or": _mask_binary("or"), "mask_xor": _mask_binary("xor"), "mask_not": mask_not, "mask_to_row": mask_to_row,
}

OWN_CONSTANTS: dict[str, OwnConstants] = {
    "mask_to_row": lambda s, op: (("s", 4, 1),) if s.facts.opmask else (),
}
