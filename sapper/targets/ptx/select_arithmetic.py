"""Selection rules of PTX: arithmetic on rows, and conversions.

See select.py. The rounding is written out (add.rn), since ptxas may fuse a product and a sum that have none.
"""

from __future__ import annotations

from typing import Any

from ...ir.nodes import Block, Op, Value
from .select_common import Rule, arithmetic_type, bits_of, dtype_of, move, row, settle
from .select_scalars import floor_division

# --- Arithmetic ------------------------------------------------------------------------------------------------------

def _arithmetic(mnemonic: str, integers: str = "") -> Rule:
    """integers: a modifier that the integer form has."""
    def rule(s: Any, op: Op) -> None:
        result = op.results[0]
        sources = [row(s, v) for v in op.operands]
        more = ".rn" if dtype_of(result).is_float else integers
        s.emit(f"{mnemonic}{more}.{arithmetic_type(result)}", s.define(result), *sources)
    return rule


def _plain(mnemonic: str) -> Rule:
    def rule(s: Any, op: Op) -> None:
        sources = [row(s, v) for v in op.operands]
        s.emit(f"{mnemonic}.{arithmetic_type(op.results[0])}", s.define(op.results[0]), *sources)
    return rule


def _extreme(name: str, condition: str) -> Rule:
    """min or max: `a if a < b else b`. The instruction gives the operand that is a number, hence the same unless b may
    be NaN; with .NaN it gives NaN if there is one, the same unless a may be. (Which of two zeros it takes is free.)"""
    def rule(s: Any, op: Op) -> None:
        a, b = op.operands
        result = op.results[0]
        first, second = row(s, a), row(s, b)
        if not dtype_of(result).is_float or never_nan(s, b):
            s.emit(f"{name}.{arithmetic_type(result)}", s.define(result), first, second)
            return
        if dtype_of(result).bits == 32 and never_nan(s, a):
            s.emit(f"{name}.NaN.{arithmetic_type(result)}", s.define(result), first, second)
            return
        takes = s.new("pred")
        s.emit(f"setp.{condition}.{arithmetic_type(result)}", takes, first, second)
        s.emit(f"selp.b{bits_of(result)}", s.define(result), first, second, takes)
    return rule


def never_nan(s: Any, value: Value) -> bool:
    """Whether a float row is known to hold numbers only: a constant, or an extreme of one with anything, also through
    shuffles and loops. A value that a loop carries is taken to be one while its new value is looked at."""
    known: dict[Value, bool] = s.facts.never_nan
    if value in known:
        return known[value]
    op = value.op
    sources: list[Value] | None = None
    if op is None:
        block = value.owner
        assert isinstance(block, Block)
        loop = s.bounds.get(block.arguments[0])       # operands: start, stop, then what the arguments start with
        if loop is not None:
            number = block.arguments.index(value)
            sources = [loop.operands[number + 1], block.ops[-1].operands[number - 1]]
    elif op.name == "splat_const":
        number_held = op.attributes["value"]
        known[value] = number_held == number_held
        return known[value]
    elif op.name in ("min", "max"):
        sources = [op.operands[1]]
    elif op.name in ("shuffle_xor", "broadcast_lane"):
        sources = [op.operands[0]]
    elif op.name == "select":
        sources = list(op.operands[1:])
    elif op.name == "loop":
        sources = [op.blocks[0].arguments[op.results.index(value) + 1]]
    known[value] = True
    known[value] = sources is not None and all(never_nan(s, v) for v in sources)
    return known[value]


def fma(s: Any, op: Op) -> None:
    sources = [row(s, v) for v in op.operands]
    s.emit(f"fma.rn.{dtype_of(op.results[0]).name}", s.define(op.results[0]), *sources)


def _approximate(mnemonic: str) -> Rule:
    """2 ulp at most (PTX ISA, ex2, rcp, rsqrt). With .ftz what is below 2**-126 is 0: without it takes up to three
    instructions more."""
    def rule(s: Any, op: Op) -> None:
        source = row(s, op.operands[0])
        s.emit(f"{mnemonic}.f32", s.define(op.results[0]), source)
    return rule


def _rounding(mode: str) -> Rule:
    def rule(s: Any, op: Op) -> None:
        name = dtype_of(op.results[0]).name
        source = row(s, op.operands[0])
        s.emit(f"cvt.{mode}.{name}.{name}", s.define(op.results[0]), source)
    return rule


def _bitwise(name: str) -> Rule:
    def rule(s: Any, op: Op) -> None:
        sources = [row(s, v) for v in op.operands]
        s.emit(f"{name}.b{bits_of(op.results[0])}", s.define(op.results[0]), *sources)
    return rule


UPPER_HALVES = 0x7632
"""Of two operands, that of the first one below (PTX ISA, prmt)."""
AND_OR = 0xEA
"""(a & b) | c of three operands (PTX ISA, lop3)."""


def join_bits(s: Any, op: Op) -> None:
    """With an `and` of a number it is one operation, of which ptxas makes two where both numbers stand apart; so is an
    upper half with another one shifted below it."""
    first, second = (v.op for v in op.operands)
    if first is not None and second is not None and (first.name, second.name) == ("and", "shr") \
            and second.attributes["amount"] == 16 and bits_of(op.results[0]) == 32 \
            and row(s, first.operands[1]) in (-1 << 16, 0xFFFF << 16):
        sources = [s.vector(v) for v in (second.operands[0], first.operands[0])]
        s.emit("prmt.b32", s.define(op.results[0]), *sources, UPPER_HALVES)
        return
    if first is not None and first.name == "and" and bits_of(op.results[0]) == 32 and all(
            isinstance(row(s, v), int) for v in (first.operands[1], op.operands[1])):
        sources = [row(s, v) for v in (*first.operands, op.operands[1])]
        s.emit("lop3.b32", s.define(op.results[0]), *sources, AND_OR)
        return
    _bitwise("or")(s, op)


def _shift(name: str, letter: str) -> Rule:
    def rule(s: Any, op: Op) -> None:
        result = op.results[0]
        source = row(s, op.operands[0])
        by: Any
        if len(op.operands) == 1:
            by = int(op.attributes["amount"])
        else:
            by = row(s, op.operands[1])
            if bits_of(op.operands[1]) == 64 and not isinstance(by, int):
                narrow = s.new("vec")
                s.emit("cvt.u32.u64", narrow, by)
                by = narrow
        s.emit(f"{name}.{letter}{bits_of(result)}", s.define(result), source, by)
    return rule


def _division(modulo: bool) -> Rule:
    def rule(s: Any, op: Op) -> None:
        result = op.results[0]
        a, b = (row(s, v) for v in op.operands)
        settle(s, result, floor_division(s, a, b, arithmetic_type(result), s.kind(result.type), modulo))
    return rule


def dot4_u8i8(s: Any, op: Op) -> None:
    accumulator, a, b = (row(s, v) for v in op.operands)
    s.emit("dp4a.u32.s32", s.define(op.results[0]), a, b, accumulator)


# --- Conversions -----------------------------------------------------------------------------------------------------

def convert(s: Any, op: Op) -> None:
    source, result = op.operands[0], op.results[0]
    old, new = arithmetic_type(source), arithmetic_type(result)
    value = row(s, source)
    if old == new:
        move(s, s.define(result), value, result.type)
        return
    if new[0] == "s" and old[0] == "s":
        old, new = (old, new) if new == "s64" else ("u64", "u32")     # narrower wraps
        mode = ""
    elif new[0] == "s":
        mode = ".rni" if op.attributes.get("nearest") else ".rzi"
    else:
        mode = "" if (old, new) == ("f32", "f64") else ".rn"
    s.emit(f"cvt{mode}.{new}.{old}", s.define(result), value)


def bitcast(s: Any, op: Op) -> None:
    """Only of a constant: others are the same register."""
    value = row(s, op.operands[0])
    move(s, s.define(op.results[0]), value, op.results[0].type)


def round_to(s: Any, op: Op) -> None:
    value = row(s, op.operands[0])
    result = op.results[0]
    if op.attributes["dtype"].name == "bf16":
        # The pair with 0 in its low half has the bits of the rounded f32.
        s.emit("cvt.rn.bf16x2.f32", s.define(result), value, 0)
        return
    half = s.new("half")
    s.emit("cvt.rn.f16.f32", half, value)
    s.emit("cvt.f32.f16", s.define(result), half)


RULES: dict[str, Rule] = {
    "add": _arithmetic("add"), "sub": _arithmetic("sub"), "mul": _arithmetic("mul", ".lo"), "div": _arithmetic("div"),
    "min": _extreme("min", "lt"), "max": _extreme("max", "gt"), "fma": fma, "neg": _plain("neg"),
    "abs": _plain("abs"), "sqrt": _arithmetic("sqrt"), "floor": _rounding("rmi"), "ceil": _rounding("rpi"),
    "exp2": _approximate("ex2.approx.ftz"), "reciprocal": _approximate("rcp.approx.ftz"),
    "rsqrt": _approximate("rsqrt.approx"), "round": _rounding("rni"), "trunc": _rounding("rzi"),
    "and": _bitwise("and"), "or": join_bits, "xor": _bitwise("xor"), "not": _bitwise("not"),
    "shl": _shift("shl", "b"), "shr": _shift("shr", "u"), "sar": _shift("shr", "s"),
    "idiv": _division(False), "imod": _division(True), "dot4_u8i8": dot4_u8i8,
    "cvt": convert, "bitcast": bitcast, "round_to": round_to,
}
