"""Selection rules of RISC-V: arithmetic, bits, comparisons and masks of rows, and conversions.

See select.py. A mask is a bit for each lane, whatever the elements are that it chooses among.
"""

from __future__ import annotations

from bisect import insort
from typing import Any

from ...ir.nodes import Op, Value
from .select_common import (
    MIRRORED,
    ZERO4,
    Key,
    OwnConstants,
    Rule,
    apart,
    bring,
    copy_row,
    deliver,
    dtype_of,
    immediate_of,
    load_immediate,
    mask_on,
    mask_register,
    named,
    row,
    scalar_kind,
)


def _operands(s: Any, op: Op) -> tuple[Any, Any, bool]:
    """A vector register, one of any kind, and whether these stand in the other order."""
    a, b = op.operands[:2]
    left, right = s.vector(a), s.vector(b)
    if left.kind == "vec":
        return left, right, False
    return (right, left, True) if right.kind == "vec" else (row(s, a), right, False)


def _arithmetic(of_floats: str, of_integers: str, turned_floats: str = "", turned_integers: str = "") -> Rule:
    """turned: of a scalar and a row, in this order; as otherwise where the order does not count."""
    def rule(s: Any, op: Op) -> None:
        is_float = dtype_of(op.results[0]).is_float
        name, turned = (of_floats, turned_floats) if is_float else (of_integers, turned_integers)
        if not is_float and (_added_product(s, op) or _by_immediate(s, op, name)):
            return
        left, right, swapped = _operands(s, op)
        name = f"{turned if swapped and turned else name}.v{scalar_kind(right)}"
        s.emit(named(s, name, op.results[0]), s.define(op.results[0]), left, right)
    return rule


def defer_products(s: Any) -> None:
    """Products of integers that only a sum reads wait for it, as an instruction does both (vmacc)."""
    for op in s.function.walk():
        if op.name != "add" or dtype_of(op.results[0]).is_float:
            continue
        for value in op.operands:
            made = value.op
            if made is not None and made.name == "mul" and s.uses.get(value) == 1 and value not in s.deferred \
                    and s.block_of[value] is s.block_of.get(op.results[0]):
                s.deferred[value] = made
                for used in made.operands:
                    used = s.alias.get(used, used)
                    if used in s.uses_at:
                        insort(s.uses_at[used], s.start[op])
                break


def _added_product(s: Any, op: Op) -> bool:
    """Whether it was the sum of a product that waited."""
    waiting = [value in s.deferred and s.deferred[value].name == "mul" for value in op.operands]
    if op.name != "add" or True not in waiting:
        return False
    place = waiting.index(True)
    product = s.deferred[op.operands[place]]
    left, right, _ = _operands(s, product)
    total, result = op.operands[1 - place], op.results[0]
    register, tied = s.tie(result, (total,) if total not in s.facts.scalars else ())
    sums = s.new("vec") if tied < 0 and register in (left, right) else register
    if tied < 0:
        bring(s, total, sums)
    s.emit(named(s, f"vmacc.v{scalar_kind(right)}", result), sums, right, left)
    if sums is not register:
        copy_row(s, register, sums)
    return True


def _by_immediate(s: Any, op: Op, name: str) -> bool:
    """Whether it was an integer operation with a number of five bits."""
    a, b = op.operands
    number, value = immediate_of(s, b), a
    if number is not None and name == "vsub":
        name, number = "vadd", -number
    elif number is None:
        number, value = immediate_of(s, a), b
        name = {"vsub": "vrsub"}.get(name, name)
    if number is None or not -16 <= number < 16 or name not in ("vadd", "vrsub", "vand", "vor", "vxor"):
        return False
    source = row(s, value)
    s.emit(named(s, f"{name}.vi", op.results[0]), s.define(op.results[0]), source, number)
    return True


def choose(s: Any, result: Value, mask: Any, a: Value, b: Value) -> None:
    """Lanes of a where the mask (None: v0) is on, else of b."""
    number = immediate_of(s, a)
    x, y = None if number is not None else s.vector(a), row(s, b)
    if mask is not None:
        mask_on(s, mask)
    if x is None:
        s.emit(named(s, "vmerge.vim", result), s.define(result), y, number)
    else:
        name = {"vec": "vmerge.vvm", "gpr": "vmerge.vxm", "fpr": "vfmerge.vfm"}[x.kind]
        s.emit(named(s, name, result), s.define(result), y, x)


def _extreme(of_integers: str) -> Rule:
    """max is `a if a > b else b`, min is `a if a < b else b`: of floats by a comparison, as vfmax has other NaNs."""
    def rule(s: Any, op: Op) -> None:
        a, b = op.operands
        x, y = s.vector(a), s.vector(b)
        if not dtype_of(op.results[0]).is_float:
            s.emit(named(s, f"{of_integers}.vv", op.results[0]), s.define(op.results[0]), x, y)
            return
        left, right = (y, x) if of_integers == "vmax" else (x, y)
        s.emit(named(s, "vmflt.vv", a), mask_register(s), left, right)
        choose(s, op.results[0], None, a, b)
    return rule


def _factors(s: Any, values: list[Value]) -> tuple[list[Any], bool]:
    """Registers of two factors, a scalar first, and whether the product is negative: that takes no instruction."""
    negative = False
    factors: list[Any] = []
    for value in values:
        made = value.op if value in s.deferred else None
        if made is not None and made.name == "neg":
            negative, value = not negative, made.operands[0]
        factors.append(s.vector(value))
    if factors[1].kind != "vec":
        factors.reverse()
    return factors, negative


def fma(s: Any, op: Op) -> None:
    """a * b + c: in the register of c, or else in that of a factor."""
    total, result = op.operands[2], op.results[0]
    factors, negative = _factors(s, op.operands[:2])
    candidates = (total, *(value for value in op.operands[:2] if value in s.registers and value not in s.deferred
                           and s.registers[value].kind == "vec" and s.registers[value] in factors))
    register, place = s.tie(result, candidates)
    if place > 0:
        others = [factor for factor in factors if factor is not register] or [register]
        name = f"{'vfnmsub' if negative else 'vfmadd'}.v{scalar_kind(others[0])}"
        s.emit(named(s, name, result), register, others[0], row(s, total))
        return
    sums = register
    if place < 0:
        if register in factors:
            sums = s.new("vec")
        bring(s, total, sums)
    name = f"{'vfnmsac' if negative else 'vfmacc'}.v{scalar_kind(factors[0])}"
    s.emit(named(s, name, result), sums, *factors)
    if sums is not register:
        copy_row(s, register, sums)


def _one(name: str) -> Rule:
    def rule(s: Any, op: Op) -> None:
        source = row(s, op.operands[0])
        s.emit(named(s, name, op.results[0]), s.define(op.results[0]), source)
    return rule


def negate(s: Any, op: Op) -> None:
    source, result = row(s, op.operands[0]), op.results[0]
    if dtype_of(result).is_float:
        s.emit(named(s, "vfneg.v", result), s.define(result), source)
    else:
        s.emit(named(s, "vrsub.vi", result), s.define(result), source, 0)


def absolute(s: Any, op: Op) -> None:
    source, result = row(s, op.operands[0]), op.results[0]
    if dtype_of(result).is_float:
        s.emit(named(s, "vfabs.v", result), s.define(result), source)
        return
    negative = s.new("vec")
    s.emit(named(s, "vrsub.vi", result), negative, source, 0)
    s.emit(named(s, "vmax.vv", result), s.define(result), source, negative)


def copy_sign(s: Any, op: Op) -> None:
    a, b = (row(s, value) for value in op.operands)
    s.emit(named(s, "vfsgnj.vv", op.results[0]), s.define(op.results[0]), a, b)


def bit_not(s: Any, op: Op) -> None:
    source = row(s, op.operands[0])
    s.emit(named(s, "vxor.vi", op.results[0]), s.define(op.results[0]), source, -1)


def _shift(name: str) -> Rule:
    def rule(s: Any, op: Op) -> None:
        result = op.results[0]
        source = row(s, op.operands[0])
        amount = op.attributes.get("amount")
        if amount is None:
            amounts = row(s, op.operands[1])
            s.emit(named(s, f"{name}.vv", result), s.define(result), source, amounts)
        elif amount > 31:
            number = s.new("gpr")
            load_immediate(s, number, amount)
            s.emit(named(s, f"{name}.vx", result), s.define(result), source, number)
        elif amount:
            s.emit(named(s, f"{name}.vi", result), s.define(result), source, amount)
        else:
            copy_row(s, s.define(result), source)
    return rule


def _signs_differ(s: Any, result: Value, rest: Any, divisor: Any) -> None:
    """v0: lanes with a remainder whose sign is not the divisor's."""
    signs, negative, some = (s.new("vec") for _ in range(3))
    s.emit(named(s, "vxor.vv", result), signs, rest, divisor)
    s.emit(named(s, "vmsle.vi", result), negative, signs, -1)
    s.emit(named(s, "vmsne.vi", result), some, rest, 0)
    s.emit("vmand.mm", mask_register(s), negative, some)


def divide(s: Any, op: Op) -> None:
    """vdiv truncates: one less where there is a remainder whose sign is not the divisor's."""
    a, b, result = row(s, op.operands[0]), row(s, op.operands[1]), op.results[0]
    made, rest = s.new("vec"), s.new("vec")
    s.emit(named(s, "vdiv.vv", result), made, a, b)
    s.emit(named(s, "vrem.vv", result), rest, a, b)
    _signs_differ(s, result, rest, b)
    s.emit(named(s, "vadd.vi.masked", result), made, made, -1)
    deliver(s, result, made)


def remainder(s: Any, op: Op) -> None:
    """One divisor more, likewise."""
    a, b, result = row(s, op.operands[0]), row(s, op.operands[1]), op.results[0]
    made = s.new("vec")
    s.emit(named(s, "vrem.vv", result), made, a, b)
    _signs_differ(s, result, made, b)
    s.emit(named(s, "vadd.vv.masked", result), made, made, b)
    deliver(s, result, made)


# --- Masks ------------------------------------------------------------------------------------------------------------

def compare(s: Any, op: Op) -> None:
    a, b = op.operands
    condition: str = op.attributes["cond"]
    is_float = dtype_of(a).is_float
    number = None if is_float else immediate_of(s, b)
    if number is None and not is_float and (number := immediate_of(s, a)) is not None:
        a, b, condition = b, a, MIRRORED[condition]
    # Below a number is at most the one before it.
    if number is not None and condition in ("lt", "ge"):
        number, condition = number - 1, {"lt": "le", "ge": "gt"}[condition]
    if number is not None and number >= -16:
        source = row(s, a)
        s.emit(named(s, f"vms{condition.replace('ge', 'gt')}.vi", a), s.define(op.results[0]), source, number)
        return
    condition = op.attributes["cond"]
    left, right, swapped = _operands(s, op)
    if swapped:
        condition = MIRRORED[condition]
    if right.kind == "gpr" and condition == "ge":
        right = row(s, op.operands[0 if swapped else 1])
    if right.kind == "vec" and condition in ("gt", "ge"):
        left, right, condition = right, left, MIRRORED[condition]
    name = f"vm{'f' if is_float else 's'}{condition}.v{scalar_kind(right)}"
    s.emit(named(s, name, op.operands[0]), s.define(op.results[0]), left, right)


def select(s: Any, op: Op) -> None:
    choose(s, op.results[0], s.vector(op.operands[0]), op.operands[1], op.operands[2])


def _numbers(s: Any) -> Key:
    return ("numbers", 32)


def mask_first(s: Any, op: Op) -> None:
    """Lanes below a count, which is brought between 0 and all of them first."""
    numbers = s.constant(_numbers(s))
    number = s.constant_of(op.operands[0])
    count = s.new("gpr")
    if number is not None:
        load_immediate(s, count, max(0, min(number, s.lanes)))
    else:
        given, limit, most = s.scalar(op.operands[0]), s.new("gpr"), s.new("gpr")
        load_immediate(s, limit, s.lanes)
        s.emit("min", most, given, limit)
        s.emit("max.zero", count, most)
    s.emit("vmslt.vx.e32", s.define(op.results[0]), numbers, count)


def mask_to_row(s: Any, op: Op) -> None:
    mask, none = s.vector(op.operands[0]), s.constant(ZERO4)
    mask_on(s, mask)
    s.emit("vmerge.vim.e32", s.define(op.results[0]), none, 1)


def _masks(name: str) -> Rule:
    def rule(s: Any, op: Op) -> None:
        first, second = (s.vector(value) for value in op.operands)
        s.emit(f"{name}.mm", s.define(op.results[0]), first, second)
    return rule


def mask_not(s: Any, op: Op) -> None:
    mask = s.vector(op.operands[0])
    s.emit("vmnot.m", s.define(op.results[0]), mask)


# --- Conversions ------------------------------------------------------------------------------------------------------

_CONVERSIONS = {
    ("f32", "i32"): "vfcvt.rtz.x.f.v.e32", ("i32", "f32"): "vfcvt.f.x.v.e32",
    ("f64", "i64"): "vfcvt.rtz.x.f.v.e64", ("i64", "f64"): "vfcvt.f.x.v.e64",
    ("f32", "f64"): "vfwcvt.f.f.v.e32", ("f64", "f32"): "vfncvt.f.f.w.e32",
    ("i32", "i64"): "vsext.vf2.e64", ("f32", "i64"): "vfwcvt.rtz.x.f.v.e32", ("i32", "f64"): "vfwcvt.f.x.v.e32",
    ("i64", "f32"): "vfncvt.f.x.w.e32", ("f64", "i32"): "vfncvt.rtz.x.f.w.e32",
}


def convert(s: Any, op: Op) -> None:
    source, result = op.operands[0], op.results[0]
    pair = (dtype_of(source).name, dtype_of(result).name)
    given = row(s, source)
    if dtype_of(source) == dtype_of(result):
        copy_row(s, s.define(result), given)
    elif pair == ("i64", "i32"):
        s.emit("vnsrl.wi.e32", s.define(result), given, 0)
    elif pair == ("f32", "i32") and op.attributes.get("nearest"):
        s.emit("vfcvt.x.f.v.e32", s.define(result), given)
    elif pair not in _CONVERSIONS:
        raise ValueError(f"{s.location or s.function.name}: cvt of {pair[0]} to {pair[1]}: found no row for it; "
                         "expected f32, f64, i32, i64; mend: convert in two steps")
    elif s.rows[_CONVERSIONS[pair]].operands[0].role == "rw":
        made = apart(s)
        s.emit(_CONVERSIONS[pair], made, given)
        deliver(s, result, made)
    else:
        s.emit(_CONVERSIONS[pair], s.define(result), given)


_BIAS: Key = ("x", 0x7FFF)
_QUIET: Key = ("x", 0x7FC00000)


def round_bfloat16(s: Any, given: Any) -> Any:
    """f32 row -> a fresh register whose upper halves are the bf16 nearest, ties to even; the lower halves are waste.

    Adding 0x7fff and the last bit that is kept carries into it exactly where rounding up is due. NaN becomes the quiet
    NaN of its sign; where none has bits that could be carried, it stays as it is.
    """
    upper, odd, amount, rounded = (s.new("vec") for _ in range(4))
    s.emit("vsrl.vi.e32", upper, given, 16)
    s.emit("vand.vi.e32", odd, upper, 1)
    s.emit("vadd.vx.e32", amount, given, s.constant(_BIAS))
    s.emit("vadd.vv.e32", rounded, amount, odd)
    if s.facts.short_nans:
        return rounded
    quiet, made = s.new("vec"), s.new("vec")
    s.emit("vor.vx.e32", quiet, given, s.constant(_QUIET))
    s.emit("vmfne.vv.e32", mask_register(s), given, given)
    s.emit("vmerge.vvm.e32", made, rounded, quiet)
    return made


def round_to(s: Any, op: Op) -> None:
    given = row(s, op.operands[0])
    name = op.attributes["dtype"].name
    if name == "f16":
        half, made = s.new("vec"), None
        s.emit("vfncvt.f.f.w.e16", half, given)
        made = apart(s)
        s.emit("vfwcvt.f.f.v.e16", made, half)
        deliver(s, op.results[0], made)
    elif name == "bf16":
        upper = s.new("vec")
        s.emit("vsrl.vi.e32", upper, round_bfloat16(s, given), 16)
        s.emit("vsll.vi.e32", s.define(op.results[0]), upper, 16)
    else:
        raise ValueError(f"{s.location or s.function.name}: round_to {name}: found no row for it; expected bf16 or "
                         "f16; mend: expand it (lane/float8.py)")


def rounding_constants(s: Any, op: Op) -> tuple[Key, ...]:
    if op.attributes["dtype"].name != "bf16" or op.attributes.get("exact"):
        return ()
    return (_BIAS,) if s.facts.short_nans else (_BIAS, _QUIET)


RULES: dict[str, Rule] = {
    "add": _arithmetic("vfadd", "vadd"), "sub": _arithmetic("vfsub", "vsub", "vfrsub", "vrsub"),
    "mul": _arithmetic("vfmul", "vmul"), "div": _arithmetic("vfdiv", "", "vfrdiv"), "min": _extreme("vmin"),
    "max": _extreme("vmax"), "fma": fma, "neg": negate, "abs": absolute, "sqrt": _one("vfsqrt.v"),
    "copy_sign": copy_sign, "and": _arithmetic("", "vand"), "or": _arithmetic("", "vor"),
    "xor": _arithmetic("", "vxor"), "not": bit_not, "shl": _shift("vsll"), "shr": _shift("vsrl"),
    "sar": _shift("vsra"), "idiv": divide, "imod": remainder, "cmp": compare, "select": select,
    "mask_first": mask_first, "mask_to_row": mask_to_row, "mask_not": mask_not, "mask_and": _masks("vmand"),
    "mask_or": _masks("vmor"), "mask_xor": _masks("vmxor"), "cvt": convert, "round_to": round_to,
}

OWN_CONSTANTS: dict[str, OwnConstants] = {
    "mask_first": lambda s, op: (_numbers(s),), "mask_to_row": lambda s, op: (ZERO4,), "round_to": rounding_constants,
}
