"""Selection rules of AArch64: arithmetic, bits, comparisons and masks of rows, and conversions.

See select.py. A mask is a row of 32-bit lanes, all ones or 0; one that chooses among 64-bit elements is widened first.
"""

from __future__ import annotations

from typing import Any

from ...ir.nodes import Op, Value
from .select_common import (
    Key,
    OwnConstants,
    Rule,
    arrangement,
    bring,
    copy_row,
    dtype_of,
    iota_key,
    load_immediate,
)
from .select_scalars import divide_scalars


def _three(s: Any, op: Op, name: str) -> None:
    first, second = (s.vector(value) for value in op.operands)
    s.emit(f"{name}.{arrangement(s, dtype_of(op.results[0]))}", s.define(op.results[0]), first, second)


def _arithmetic(of_floats: str, of_integers: str) -> Rule:
    def rule(s: Any, op: Op) -> None:
        dtype = dtype_of(op.results[0])
        if dtype.name == "i64" and of_integers == "mul":
            by_lanes(s, op, lambda a, b: _product(s, a, b))
        else:
            _three(s, op, of_floats if dtype.is_float else of_integers)
    return rule


def _product(s: Any, a: Any, b: Any) -> Any:
    made = s.new("gpr")
    s.emit("mul.64", made, a, b)
    return made


def by_lanes(s: Any, op: Op, compute: Any) -> None:
    """What no vector instruction does: each lane by general registers, sign-extended."""
    rows = [s.vector(value) for value in op.operands]
    letter = "d" if dtype_of(op.results[0]).bits == 64 else "s"
    made = s.new("vec")
    s.emit("movi.zero", made)
    for lane in range(s.lanes):
        numbers = []
        for row in rows:
            number = s.new("gpr")
            s.emit("umov.d" if letter == "d" else "smov.s", number, row, lane)
            numbers.append(number)
        s.emit(f"ins.general.{letter}", made, lane, compute(*numbers))
    deliver(s, op.results[0], made)


def deliver(s: Any, result: Value, made: Any) -> None:
    """A fresh register is the result, or goes where that is wanted."""
    wanted = s.target.get(result)
    if wanted is None:
        s.registers[result] = made
    else:
        copy_row(s, s.define(result), made)


def choose(s: Any, result: Value, mask: Any, a: Value, b: Value) -> None:
    """Lanes of a where the mask is on, else of b: put into the register of one that dies, or into one of the mask's."""
    x, y = s.vector(a), s.vector(b)
    register, place = s.tie(result, (a, b))
    if place == 0:
        s.emit("bif.16b", register, y, mask)
    elif place == 1:
        s.emit("bit.16b", register, x, mask)
    else:
        made = s.new("vec") if register in (x, y) else register
        if made is not mask:
            copy_row(s, made, mask)
        s.emit("bsl.16b", made, x, y)
        if made is not register:
            copy_row(s, register, made)


def _extreme(of_integers: str) -> Rule:
    """max is `a if a > b else b`, min is `a if a < b else b`: of floats by a comparison, as fmax has other NaNs."""
    def rule(s: Any, op: Op) -> None:
        dtype = dtype_of(op.results[0])
        if not dtype.is_float and dtype.bits == 32:
            _three(s, op, of_integers)
            return
        a, b = op.operands
        left, right = (a, b) if of_integers == "smax" else (b, a)
        name = "fcmgt" if dtype.is_float else "cmgt"
        mask = s.new("vec")
        s.emit(f"{name}.{arrangement(s, dtype)}", mask, s.vector(left), s.vector(right))
        choose(s, op.results[0], mask, a, b)
    return rule


def _factors(s: Any, values: list[Value]) -> tuple[list[Any], int | None, bool]:
    """Registers of two factors, the lane of the last of them that counts alone, if it does, and whether the product is
    negative: neither takes an instruction."""
    negative = False
    factors: list[Any] = []
    lane: int | None = None
    for value in values:
        made = value.op if value in s.deferred else None
        if made is not None and made.name == "neg":
            negative, value = not negative, made.operands[0]
        elif made is not None and made.name == "broadcast_lane" and lane is None:
            lane = made.attributes["lane"]
            factors.append(s.vector(made.operands[0]))
            continue
        factors.insert(0, s.vector(value))
    return factors, lane, negative


def _add_product(s: Any, op: Op, name: str, total: Value, factors: list[Any], lane: int | None, kind: str) -> None:
    """An instruction that adds a product to its destination: the total's register, or a copy."""
    held = s.vector(total) if total in s.deferred else None
    register, place = s.tie(op.results[0], (total,))
    sums = register
    if place < 0:
        if register in factors:
            sums = s.new("vec")
        if held is not None:
            copy_row(s, sums, held)
        else:
            bring(s, total, sums)
    if lane is None:
        s.emit(f"{name}.{kind}", sums, *factors)
    else:
        s.emit(f"{name}.element.{kind}", sums, *factors, lane)
    if sums is not register:
        copy_row(s, register, sums)


def fma(s: Any, op: Op) -> None:
    """a * b + c, in the register of c."""
    factors, lane, negative = _factors(s, op.operands[:2])
    _add_product(s, op, "fmls" if negative else "fmla", op.operands[2], factors, lane,
                 arrangement(s, dtype_of(op.results[0])))


def _dot(name: str) -> Rule:
    """Products of four bytes each, added to 32 bits."""
    def rule(s: Any, op: Op) -> None:
        factors, lane, _ = _factors(s, op.operands[1:])
        _add_product(s, op, name, op.operands[0], factors, lane, s.facts.narrow)
    return rule


def dot_of_signs(s: Any, op: Op) -> None:
    """The same of unsigned and signed bytes; of which kind the lane is, the instruction says."""
    total, first, second = op.operands
    factors, lane, _ = _factors(s, [first, second])
    spread = first in s.deferred and s.deferred[first].name == "broadcast_lane"
    if lane is None:
        factors = factors[::-1]
    _add_product(s, op, "sudot" if lane is not None and spread else "usdot", total, factors, lane, s.facts.narrow)


MATRICES = {"two_by_two_bf16": "bfmmla", "two_by_two_i8i8": "smmla", "two_by_two_u8u8": "ummla",
            "two_by_two_u8i8": "usmmla"}
"""Products of matrices of 2 x 8 bytes, or 2 x 4 bf16."""


def _matrices(name: str) -> Rule:
    def rule(s: Any, op: Op) -> None:
        factors = [s.vector(value) for value in op.operands[1:]]
        _add_product(s, op, name, op.operands[0], factors, None, "4s")
    return rule


def _one(of_floats: str, of_integers: str = "") -> Rule:
    def rule(s: Any, op: Op) -> None:
        dtype = dtype_of(op.results[0])
        source = s.vector(op.operands[0])
        s.emit(f"{of_floats if dtype.is_float else of_integers}.{arrangement(s, dtype)}", s.define(op.results[0]),
               source)
    return rule


_SIGN: Key = ("s", 4, 0x80000000)


def copy_sign(s: Any, op: Op) -> None:
    """The sign of b into the register of a."""
    a, b = op.operands
    sign, mask = s.vector(b), s.constant(_SIGN)
    register, place = s.tie(op.results[0], (a,))
    made = s.new("vec") if place < 0 and register is sign else register
    if place < 0:
        bring(s, a, made)
    s.emit("bit.16b", made, sign, mask)
    if made is not register:
        copy_row(s, register, made)


def _bits(name: str) -> Rule:
    def rule(s: Any, op: Op) -> None:
        first, second = (s.vector(value) for value in op.operands)
        s.emit(f"{name}.16b", s.define(op.results[0]), first, second)
    return rule


def bit_not(s: Any, op: Op) -> None:
    source = s.vector(op.operands[0])
    s.emit("mvn.16b", s.define(op.results[0]), source)


def _shift(left: bool, by_number: str, by_row: str) -> Rule:
    def rule(s: Any, op: Op) -> None:
        kind = arrangement(s, dtype_of(op.results[0]))
        row = s.vector(op.operands[0])
        amount = op.attributes.get("amount")
        if amount is None:
            amounts = s.vector(op.operands[1])
            if not left:
                negative = s.new("vec")
                s.emit(f"neg.{kind}", negative, amounts)
                amounts = negative
            s.emit(f"{by_row}.{kind}", s.define(op.results[0]), row, amounts)
        elif amount:
            s.emit(f"{by_number}.{kind}", s.define(op.results[0]), row, amount)
        else:
            copy_row(s, s.define(op.results[0]), row)
    return rule


# --- Masks ------------------------------------------------------------------------------------------------------------

def wide_mask(s: Any, mask: Any) -> Any:
    """A mask for 64-bit elements."""
    wide = s.new("vec")
    s.emit("sxtl.2d", wide, mask)
    return wide


def compare(s: Any, op: Op) -> None:
    a, b = op.operands
    condition: str = op.attributes["cond"]
    dtype = dtype_of(a)
    x, y = s.vector(a), s.vector(b)
    if condition in ("lt", "le"):
        x, y = y, x
    name = ("f" if dtype.is_float else "") + {"eq": "cmeq", "ne": "cmeq", "gt": "cmgt", "lt": "cmgt"}.get(
        condition, "cmge")
    wide, last = dtype.bits == 64, "mvn" if condition == "ne" else "xtn" if dtype.bits == 64 else ""
    made = s.new("vec") if last else s.define(op.results[0])
    s.emit(f"{name}.{arrangement(s, dtype)}", made, x, y)
    if wide:
        narrow = s.new("vec") if condition == "ne" else s.define(op.results[0])
        s.emit("xtn.2s", narrow, made)
        made = narrow
    if condition == "ne":
        s.emit("mvn.16b", s.define(op.results[0]), made)


def select(s: Any, op: Op) -> None:
    mask = s.vector(op.operands[0])
    if dtype_of(op.results[0]).bits == 64:
        mask = wide_mask(s, mask)
    choose(s, op.results[0], mask, op.operands[1], op.operands[2])


def mask_first(s: Any, op: Op) -> None:
    """Lanes below a count, which is brought between 0 and all of them first."""
    numbers = s.constant(iota_key(s))
    number = s.constant_of(op.operands[0])
    counts, kind = s.new("vec"), s.facts.narrow
    count = s.new("gpr")
    if number is not None:
        load_immediate(s, count, max(0, min(number, s.lanes)))
    else:
        given, limit, none, most = s.scalar(op.operands[0]), s.new("gpr"), s.new("gpr"), s.new("gpr")
        load_immediate(s, limit, s.lanes)
        load_immediate(s, none, 0)
        s.emit("cmp.imm.64", given, s.lanes)
        s.emit("csel.lt", most, given, limit)
        s.emit("cmp.imm.64", most, 0)
        s.emit("csel.gt", count, most, none)
    s.emit(f"dup.{kind}", counts, count)
    s.emit(f"cmgt.{kind}", s.define(op.results[0]), counts, numbers)


def mask_to_row(s: Any, op: Op) -> None:
    mask = s.vector(op.operands[0])
    s.emit(f"ushr.{s.facts.narrow}", s.define(op.results[0]), mask, 31)


# --- Conversions ------------------------------------------------------------------------------------------------------

_BY_STEPS = {
    ("f32", "f64"): ("fcvtl.2d",), ("f64", "f32"): ("fcvtn.2s",), ("i32", "i64"): ("sxtl.2d",),
    ("i64", "i32"): ("xtn.2s",), ("f64", "i64"): ("fcvtzs.2d",), ("i64", "f64"): ("scvtf.2d",),
    ("f64", "i32"): ("fcvtzs.2d", "xtn.2s"), ("i32", "f64"): ("sxtl.2d", "scvtf.2d"),
    ("f32", "i64"): ("fcvtl.2d", "fcvtzs.2d"),
}
"""Instructions, one after the other, of a conversion in which there are 64-bit elements."""


def convert(s: Any, op: Op) -> None:
    source, result = op.operands[0], op.results[0]
    pair = (dtype_of(source).name, dtype_of(result).name)
    row = s.vector(source)
    if dtype_of(source) == dtype_of(result):
        copy_row(s, s.define(result), row)
        return
    if pair == ("i64", "f32"):      # by way of f64 it would be rounded twice
        made = s.new("vec")
        s.emit("movi.zero", made)
        for lane in range(s.lanes):
            number, one = s.new("gpr"), s.new("vec")
            s.emit("umov.d", number, row, lane)
            s.emit("scvtf.s", one, number)
            s.emit("ins.s", made, lane, one, 0)
        deliver(s, result, made)
        return
    kind = s.facts.narrow
    steps = _BY_STEPS.get(pair) or {
        ("f32", "i32"): (f"{'fcvtns' if op.attributes.get('nearest') else 'fcvtzs'}.{kind}",),
        ("i32", "f32"): (f"scvtf.{kind}",)}.get(pair)
    if steps is None:
        raise ValueError(f"{s.location or s.function.name}: cvt of {pair[0]} to {pair[1]}: found no row for it; "
                         "expected f32, f64, i32, i64; mend: convert in two steps")
    for number, name in enumerate(steps):
        register = s.define(result) if number == len(steps) - 1 else s.new("vec")
        s.emit(name, register, row)
        row = register


_BF16_KEYS: tuple[Key, ...] = (("s", 4, 1), ("s", 4, 0x7FFF), ("s", 4, 0x7FC00000))
_BF16_MASK: Key = ("s", 4, 0xFFFF0000)


def narrow_bfloat16(s: Any, row: Any) -> Any:
    """f32 row -> a fresh register with the bf16 nearest in its low part, ties to even."""
    made = s.new("vec")
    if s.facts.has_bfloat16:
        s.emit("bfcvtn.4h", made, row)
    else:
        s.emit("shrn.4h", made, round_bfloat16(s, row), 16)
    return made


def round_bfloat16(s: Any, row: Any) -> Any:
    """f32 row -> a fresh register whose upper halves are the bf16 nearest, ties to even; the lower halves are waste.

    Adding 0x7fff and the last bit that is kept carries into it exactly where rounding up is due. NaN becomes the quiet
    NaN of its sign; where none has bits that could be carried, it stays as it is.
    """
    kind = s.facts.narrow
    upper, odd, amount, rounded = (s.new("vec") for _ in range(4))
    s.emit(f"ushr.{kind}", upper, row, 16)
    s.emit("and.16b", odd, upper, s.constant(_BF16_KEYS[0]))
    s.emit(f"add.{kind}", amount, odd, s.constant(_BF16_KEYS[1]))
    s.emit(f"add.{kind}", rounded, row, amount)
    if s.facts.short_nans:
        return rounded
    number, quiet = s.new("vec"), s.new("vec")
    s.emit("orr.16b", quiet, row, s.constant(_BF16_KEYS[2]))
    s.emit(f"fcmeq.{kind}", number, row, row)
    s.emit("bsl.16b", number, rounded, quiet)
    return number


def round_to(s: Any, op: Op) -> None:
    row = s.vector(op.operands[0])
    name = op.attributes["dtype"].name
    if name == "f16":
        half = s.new("vec")
        s.emit("fcvtn.4h", half, row)
        s.emit("fcvtl.4s", s.define(op.results[0]), half)
    elif name == "bf16" and s.facts.has_bfloat16:
        s.emit("shll.4s", s.define(op.results[0]), narrow_bfloat16(s, row))
    elif name == "bf16":
        rounded = round_bfloat16(s, row)
        s.emit("and.16b", s.define(op.results[0]), rounded, s.constant(_BF16_MASK))
    else:
        raise ValueError(f"{s.location or s.function.name}: round_to {name}: found no row for it; expected bf16 or "
                         "f16; mend: expand it (lane/float8.py)")


def rounding_constants(s: Any, op: Op) -> tuple[Key, ...]:
    name = op.attributes["dtype"].name
    if name != "bf16" or op.attributes.get("exact") or s.facts.has_bfloat16:
        return ()
    keys = _BF16_KEYS[:2] if s.facts.short_nans else _BF16_KEYS
    return (*keys, _BF16_MASK) if op.name == "round_to" else keys


RULES: dict[str, Rule] = {
    "add": _arithmetic("fadd", "add"), "sub": _arithmetic("fsub", "sub"), "mul": _arithmetic("fmul", "mul"),
    "div": _arithmetic("fdiv", ""), "min": _extreme("smin"), "max": _extreme("smax"), "fma": fma,
    "neg": _one("fneg", "neg"), "abs": _one("fabs", "abs"), "sqrt": _one("fsqrt"), "floor": _one("frintm"),
    "ceil": _one("frintp"), "round": _one("frintn"), "trunc": _one("frintz"), "copy_sign": copy_sign,
    "and": _bits("and"), "or": _bits("orr"), "xor": _bits("eor"), "not": bit_not,
    "shl": _shift(True, "shl", "ushl"), "shr": _shift(False, "ushr", "ushl"), "sar": _shift(False, "sshr", "sshl"),
    "idiv": lambda s, op: by_lanes(s, op, lambda a, b: divide_scalars(s, a, b)[0]),
    "imod": lambda s, op: by_lanes(s, op, lambda a, b: divide_scalars(s, a, b)[1]),
    "cmp": compare, "select": select, "mask_first": mask_first, "mask_to_row": mask_to_row, "mask_not": bit_not,
    "mask_and": _bits("and"), "mask_or": _bits("orr"), "mask_xor": _bits("eor"),
    "cvt": convert, "round_to": round_to, "dot4_i8i8": _dot("sdot"), "dot4_u8u8": _dot("udot"),
    **{name: _matrices(row) for name, row in MATRICES.items()}, "dot4_u8i8": dot_of_signs, "dot2_bf16": _dot("bfdot"),
}

OWN_CONSTANTS: dict[str, OwnConstants] = {
    "copy_sign": lambda s, op: (_SIGN,), "mask_first": lambda s, op: (iota_key(s),), "round_to": rounding_constants,
}
