"""Selection rules of x86-64: arithmetic and bit operations on rows.

See select.py. Source: Intel SDM volume 2; the manual's operand order throughout.
"""

from __future__ import annotations

from typing import Any

from ...ir.nodes import Op, Value
from ...ir.types import DType
from .select_common import FLOAT, INTEGER, ONES, ZERO4, Key, OwnConstants, Rule, bits_of, dtype_of
from .select_lanes import bring, extract_half, insert_half, join, quarters
from .select_scalars import divide_scalars


def binary(s: Any, op: Op, name: str, commutative: bool) -> None:
    """One instruction of three operands; the last may be memory."""
    a, b = op.operands
    if commutative and s.is_memory(a) and not s.is_memory(b):
        a, b = b, a
    second = s.operand(b)
    first = s.vector(a)
    s.emit(name, s.define(op.results[0]), first, second)


def _arithmetic(float_name: str, integer_name: str, commutative: bool) -> Rule:
    def rule(s: Any, op: Op) -> None:
        dtype = dtype_of(op.results[0])
        bits = bits_of(s, dtype)
        if dtype.name in FLOAT:
            binary(s, op, f"v{float_name}{FLOAT[dtype.name]}.{bits}", commutative)
        elif dtype.bits == 64 and not s.facts.opmask and integer_name in ("mull", "mins", "maxs"):
            _wide_integer(s, op, integer_name, bits)
        else:
            binary(s, op, f"vp{integer_name}{INTEGER[dtype.name]}.{bits}", commutative or integer_name in
                   ("mins", "maxs"))
    return rule


def _wide_integer(s: Any, op: Op, name: str, bits: int) -> None:
    """i64 multiplication, minimum and maximum without AVX-512."""
    a, b = s.vector(op.operands[0]), s.vector(op.operands[1])
    if name == "mull":
        # a * b = low(a) low(b) + ((high(a) low(b) + low(a) high(b)) << 32)
        high, cross, low = s.new("vec"), s.new("vec"), s.new("vec")
        s.emit(f"vpsrlq.imm.{bits}", high, a, 32)
        s.emit(f"vpmuludq.{bits}", high, high, b)
        s.emit(f"vpsrlq.imm.{bits}", cross, b, 32)
        s.emit(f"vpmuludq.{bits}", cross, cross, a)
        s.emit(f"vpaddq.{bits}", high, high, cross)
        s.emit(f"vpsllq.imm.{bits}", high, high, 32)
        s.emit(f"vpmuludq.{bits}", low, a, b)
        s.emit(f"vpaddq.{bits}", s.define(op.results[0]), low, high)
        return
    greater = s.new("vec")
    s.emit(f"vpcmpgtq.{bits}", greater, a, b)
    if name == "maxs":
        a, b = b, a
    s.emit(f"vblendvpd.{bits}", s.define(op.results[0]), a, b, greater)


def div(s: Any, op: Op) -> None:
    dtype = dtype_of(op.results[0])
    binary(s, op, f"vdiv{FLOAT[dtype.name]}.{bits_of(s, dtype)}", False)


def _unnegated(s: Any, value: Value) -> tuple[Value, bool]:
    negated = False
    while value in s.deferred and value.op.name == "neg":  # type: ignore[union-attr]
        value, negated = value.op.operands[0], not negated  # type: ignore[union-attr]
    return value, negated


def fma(s: Any, op: Op) -> None:
    """231 where c dies (accumulators), else 213 or 132 where a factor dies, else 231 on a copy of c."""
    result = op.results[0]
    dtype = dtype_of(result)
    bits = bits_of(s, dtype)
    a, negative_a = _unnegated(s, op.operands[0])
    b, negative_b = _unnegated(s, op.operands[1])
    c, negative_c = _unnegated(s, op.operands[2])
    stem = "vf" + ("n" if negative_a != negative_b else "") + ("msub" if negative_c else "madd")
    tail = f"{FLOAT[dtype.name]}.{bits}"
    register, place = s.tie(result, (c, a, b))
    if place < 0:
        # One operand has to be brought into the result's register: best one that is loaded anyway.
        if s.is_memory(c) or not (s.is_memory(a) or s.is_memory(b)):
            place = 0
            bring(s, c, register, bits)
        else:
            place = 1 if s.is_memory(a) else 2
            bring(s, a if place == 1 else b, register, bits)
    if place == 0:
        if s.is_memory(a) and not s.is_memory(b):
            a, b = b, a
        last = s.operand(b)
        s.emit(f"{stem}231{tail}", register, s.vector(a), last)
        return
    factor = b if place == 1 else a
    if s.is_memory(factor) and not s.is_memory(c):
        last = s.operand(factor)
        s.emit(f"{stem}132{tail}", register, s.vector(c), last)
    else:
        last = s.operand(c)
        s.emit(f"{stem}213{tail}", register, s.vector(factor), last)


def _sign_key(dtype: DType) -> Key:
    return ("s", dtype.bits // 8, 1 << (dtype.bits - 1))


def neg(s: Any, op: Op) -> None:
    value = op.operands[0]
    dtype = dtype_of(value)
    bits = bits_of(s, dtype)
    if dtype.name in FLOAT:
        row, sign = s.vector(value), s.constant_operand(_sign_key(dtype))
        s.emit(f"vxor{FLOAT[dtype.name]}.{bits}", s.define(op.results[0]), row, sign)
    else:
        row, zero = s.vector(value), s.constant(ZERO4)
        s.emit(f"vpsub{INTEGER[dtype.name]}.{bits}", s.define(op.results[0]), zero, row)


def absolute(s: Any, op: Op) -> None:
    value = op.operands[0]
    dtype = dtype_of(value)
    bits = bits_of(s, dtype)
    row = s.vector(value)
    if dtype.name in FLOAT:
        keep = s.constant_operand(_magnitude_key(dtype))
        s.emit(f"vand{FLOAT[dtype.name]}.{bits}", s.define(op.results[0]), row, keep)
    elif dtype.bits == 32 or s.facts.opmask:
        s.emit(f"vpabs{INTEGER[dtype.name]}.{bits}", s.define(op.results[0]), row)
    else:
        negative, flipped = s.new("vec"), s.new("vec")
        s.emit(f"vpcmpgtq.{bits}", negative, s.constant(ZERO4), row)
        s.emit(f"vpxor.{bits}", flipped, row, negative)
        s.emit(f"vpsubq.{bits}", s.define(op.results[0]), flipped, negative)


def _magnitude_key(dtype: DType) -> Key:
    return ("s", dtype.bits // 8, (1 << (dtype.bits - 1)) - 1)


def sqrt(s: Any, op: Op) -> None:
    dtype = dtype_of(op.operands[0])
    source = s.operand(op.operands[0])
    s.emit(f"vsqrt{FLOAT[dtype.name]}.{bits_of(s, dtype)}", s.define(op.results[0]), source)


def _rounding(mode: int) -> Rule:
    """Immediate of vroundps and vrndscaleps: 8 nearest even, 9 down, 10 up, 11 towards 0; without inexact."""
    def rule(s: Any, op: Op) -> None:
        value = op.operands[0]
        dtype = dtype_of(value)
        if dtype.name not in FLOAT:
            row = s.vector(value)
            s.emit(f"vmovaps.{bits_of(s, dtype)}", s.define(op.results[0]), row)
            return
        source = s.operand(value)
        name = "vrndscale" if s.facts.opmask else "vround"
        s.emit(f"{name}{FLOAT[dtype.name]}.{bits_of(s, dtype)}", s.define(op.results[0]), source, mode)
    return rule


def fraction(s: Any, op: Op) -> None:
    """VREDUCEPS, without inexact: to 0 binary places, nearest even, or down."""
    mode = 9 if op.attributes.get("down") else 8
    s.emit(f"vreduceps.{s.facts.bits4}", s.define(op.results[0]), s.operand(op.operands[0]), mode)


def copy_sign(s: Any, op: Op) -> None:
    """VPTERNLOGD takes of each bit the first operand's or, where the third's is set, the second's (SDM volume 2)."""
    magnitude, sign = op.operands
    bits = s.facts.bits4
    mask = s.constant(_sign_key(dtype_of(magnitude)))
    other = s.vector(sign)
    register, place = s.tie(op.results[0], (magnitude,))
    if register is other:
        made = s.new("vec")
        bring(s, magnitude, made, bits)
        s.emit(f"vpternlogd.{bits}", made, other, mask, 0xD8)
        s.emit(f"vmovaps.{bits}", register, made)
        return
    if place < 0:
        bring(s, magnitude, register, bits)
    s.emit(f"vpternlogd.{bits}", register, other, mask, 0xD8)


NOT_LESS = 21
"""The comparison that holds for NaN, too, and is quiet (SDM volume 2, CMPPS, table 3-1: NLT_UQ)."""


def scale_exponent(s: Any, op: Op) -> None:
    """VSCALEF, which is the op but for a NaN times an infinite power (SDM volume 2: infinity or 0). Lanes that an
    opmask puts to 0 raise no exception (volume 1, 15.6), so none of them waits for an underflow."""
    a, n, *least = op.operands
    dtype = dtype_of(a)
    name = f"vscalef{FLOAT[dtype.name]}.{bits_of(s, dtype)}"
    if not least:
        last = s.operand(n)
        s.emit(name, s.define(op.results[0]), s.vector(a), last)
        return
    bound, power = s.operand(least[0]), s.vector(n)
    kept = s.new("mask")
    s.emit(f"vcmp{FLOAT[dtype.name]}.k.{bits_of(s, dtype)}", kept, power, bound, NOT_LESS)
    s.emit_masked(name, kept, True, s.define(op.results[0]), s.vector(a), power)


def _bitwise(name: str) -> Rule:
    def rule(s: Any, op: Op) -> None:
        dtype = dtype_of(op.results[0])
        letter = INTEGER[dtype.name] if s.facts.opmask else ""
        binary(s, op, f"vp{name}{letter}.{bits_of(s, dtype)}", True)
    return rule


def bit_not(s: Any, op: Op) -> None:
    dtype = dtype_of(op.results[0])
    row, ones = s.vector(op.operands[0]), s.constant(ONES)
    s.emit(f"vpxor{INTEGER[dtype.name] if s.facts.opmask else ''}.{bits_of(s, dtype)}", s.define(op.results[0]), row,
           ones)


def _row_constant(value: Value) -> int | None:
    op = value.op
    if op is not None and op.name == "splat_const":
        return int(op.attributes["value"])
    return None


def _shift(name: str) -> Rule:
    """name: sll, srl, sra."""
    def rule(s: Any, op: Op) -> None:
        value = op.operands[0]
        dtype = dtype_of(value)
        bits = bits_of(s, dtype)
        letter = INTEGER[dtype.name]
        amount = op.attributes.get("amount")
        if len(op.operands) == 2:
            amount = _row_constant(op.operands[1])
        row = s.vector(value)
        if name == "sra" and letter == "q" and not s.facts.opmask:
            shift_right_signed(s, op, row, amount, bits)
        elif amount is not None:
            s.emit(f"vp{name}{letter}.imm.{bits}", s.define(op.results[0]), row, amount)
        else:
            by = s.vector(op.operands[1])
            s.emit(f"vp{name}v{letter}.{bits}", s.define(op.results[0]), row, by)
    return rule


def shift_right_signed(s: Any, op: Op, row: Any, amount: int | None, bits: int) -> None:
    """i64 without AVX-512: shift logically, the sign bit too, then extend it: (x ^ m) - m."""
    sign, shifted = s.new("vec"), s.new("vec")
    source = s.constant(("s", 8, 1 << 63))
    if amount is not None:
        s.emit(f"vpsrlq.imm.{bits}", sign, source, amount)
        s.emit(f"vpsrlq.imm.{bits}", shifted, row, amount)
    else:
        by = s.vector(op.operands[1])
        s.emit(f"vpsrlvq.{bits}", sign, source, by)
        s.emit(f"vpsrlvq.{bits}", shifted, row, by)
    s.emit(f"vpxor.{bits}", shifted, shifted, sign)
    s.emit(f"vpsubq.{bits}", s.define(op.results[0]), shifted, sign)


def _division(remainder: bool) -> Rule:
    def rule(s: Any, op: Op) -> None:
        a, b = op.operands
        result = op.results[0]
        dtype = dtype_of(result)
        bits = bits_of(s, dtype)
        letter = INTEGER[dtype.name]
        number = _row_constant(b)
        dividend = s.vector(a)
        if number is not None and number > 0 and number & (number - 1) == 0:
            if remainder:
                last = s.constant_operand(("s", dtype.bits // 8, number - 1) if number > 1 else ZERO4)
                s.emit(f"vpand{letter if s.facts.opmask else ''}.{bits}", s.define(result), dividend, last)
            elif letter == "q" and not s.facts.opmask:
                shift_right_signed(s, op, dividend, number.bit_length() - 1, bits)
            else:
                s.emit(f"vpsra{letter}.imm.{bits}", s.define(result), dividend, number.bit_length() - 1)
            return
        divisor = s.vector(b)
        if dtype.bits == 64:
            _divide_lanes(s, result, dividend, divisor, bits, remainder)
            return
        quotient = s.new("vec") if remainder else None
        made = divide_rows(s, dividend, divisor, quotient if remainder else s.define(result))
        if remainder:
            product = s.new("vec")
            s.emit(f"vpmulld.{bits}", product, made, divisor)
            s.emit(f"vpsubd.{bits}", s.define(result), dividend, product)
    return rule


def divide_rows(s: Any, dividend: Any, divisor: Any, register: Any) -> Any:
    """i32 floor division by f64 division, which is exact: two 32-bit integers that do not divide differ in their
    quotient from any integer by at least 2**-31, and the rounded quotient errs by less than 2**-22 of that."""
    bits = s.facts.bits4
    wide = min(2 * bits, s.facts.vector_bits)
    floor = "vrndscalepd" if s.facts.opmask else "vroundpd"

    def half(a: Any, b: Any, into: Any) -> None:
        x, y = s.new("vec"), s.new("vec")
        s.emit(f"vcvtdq2pd.{wide}", x, a)
        s.emit(f"vcvtdq2pd.{wide}", y, b)
        s.emit(f"vdivpd.{wide}", x, x, y)
        s.emit(f"{floor}.{wide}", x, x, 9)
        s.emit(f"vcvttpd2dq.{wide}", into, x)

    if wide == 2 * bits:
        half(dividend, divisor, register)
        return register
    high_a, high_b, low, high = s.new("vec"), s.new("vec"), s.new("vec"), s.new("vec")
    extract_half(s, high_a, dividend, bits)
    extract_half(s, high_b, divisor, bits)
    half(dividend, divisor, low)
    half(high_a, high_b, high)
    insert_half(s, register, low, high, bits)
    return register


def _divide_lanes(s: Any, result: Value, dividend: Any, divisor: Any, bits: int, remainder: bool) -> None:
    """i64: no float is wide enough, so one lane after the other.

    idiv traps for a divisor 0, which a lane that nobody will look at may have, and for -2**63 / -1: both divisors are
    replaced by 1, and a quotient by -1 negated."""
    parts = []
    per = 2
    for row_a, row_b in zip(quarters(s, dividend, bits), quarters(s, divisor, bits), strict=True):
        part = s.new("vec")
        for number in range(per):
            a, b, above, safe = s.new("gpr"), s.new("gpr"), s.new("gpr"), s.new("gpr")
            if number == 0:
                s.emit("vmovq.from_vec", a, row_a)
                s.emit("vmovq.from_vec", b, row_b)
            else:
                s.emit("vpextrq", a, row_a, number)
                s.emit("vpextrq", b, row_b, number)
            s.emit("lea.64", above, s.memory(b, disp=1))
            s.emit("mov.32", safe, 1)
            s.emit("cmp.64", above, 1)
            s.emit("cmova.64", safe, b)
            made = divide_scalars(s, a, safe, None)[int(remainder)]
            if not remainder:
                negated = s.new("gpr")
                s.emit("mov.64", negated, made)
                s.emit("neg.64", negated)
                s.emit("cmp.64", b, -1)
                s.emit("cmove.64", made, negated)
            if number == 0:
                s.emit("vmovq.to_vec", part, made)
            else:
                s.emit("vpinsrq", part, part, made, number)
        parts.append(part)
    join(s, parts, s.define(result))


def _sign_constants(s: Any, op: Op) -> tuple[Key, ...]:
    dtype = dtype_of(op.operands[0])
    if dtype.name not in FLOAT:
        return (ZERO4,)
    return (_magnitude_key(dtype) if op.name == "abs" else _sign_key(dtype),)


RULES: dict[str, Rule] = {
    "add": _arithmetic("add", "add", True), "sub": _arithmetic("sub", "sub", False),
    "mul": _arithmetic("mul", "mull", True), "min": _arithmetic("min", "mins", False),
    "max": _arithmetic("max", "maxs", False), "div": div, "fma": fma, "neg": neg, "abs": absolute, "sqrt": sqrt,
    "floor": _rounding(9), "ceil": _rounding(10), "round": _rounding(8), "trunc": _rounding(11),
    "fraction": fraction, "scale_exponent": scale_exponent, "copy_sign": copy_sign,
    "and": _bitwise("and"), "or": _bitwise("or"), "xor": _bitwise("xor"),
    "not": bit_not, "shl": _shift("sll"), "shr": _shift("srl"), "sar": _shift("sra"), "idiv": _division(False),
    "imod": _division(True),
}

OWN_CONSTANTS: dict[str, OwnConstants] = {
    "neg": _sign_constants, "abs": _sign_constants, "copy_sign": _sign_constants, "not": lambda s, op: (ONES,),
}
