"""Tile IR in its plainest form: one way to say each thing, so that later passes look for one form only.

Enters: a verified tile function. Leaves: the same function, where sums of products are contractions, casts that cancel
are gone, index arithmetic on constants is done and dead ops are removed. Holds: the meaning is the same bit for bit,
save that a sum of products in f32 or f64 may round as a contraction does.
"""

from __future__ import annotations

from collections.abc import Callable

from ..ir.nodes import Function, Op, Value
from ..ir.rewriter import Replacement, Rewriter, Rule, RuleSet, Trace, eliminate_dead, rewrite
from ..ir.types import (
    NARROW_FLOATS,
    DType,
    TileType,
    bf16,
    bool_,
    f8e4m3,
    f8e5m2,
    f16,
    f32,
    f64,
    i4,
    i8,
    i16,
    i32,
    i64,
    index,
    u8,
)
from .ops import TILE_OPS


def tile_type(value: Value) -> TileType:
    assert isinstance(value.type, TileType)
    return value.type


def constant_of(value: Value) -> float | int | bool | None:
    """The number that every element of a value is, if it is a constant or one spread over axes."""
    op = value.op
    if op is not None and op.name == "full":
        op = op.operands[0].op
    if op is None or op.name != "const":
        return None
    number: float | int | bool = op.attributes["value"]
    return number


# Casts.

_HOLDS: dict[DType, tuple[DType, ...]] = {
    bool_: (i8, u8, i16, i32, i64, index, bf16, f16, f32, f64),
    i8: (i16, i32, i64, index, bf16, f16, f32, f64),
    u8: (i16, i32, i64, index, bf16, f16, f32, f64),
    i16: (i32, i64, index, f32, f64),
    i32: (i64, index, f64),
    index: (i64,),
    bf16: (f32, f64),
    f16: (f32, f64),
    f8e4m3: (bf16, f16, f32, f64),
    f8e5m2: (bf16, f16, f32, f64),
    i4: (i8, i16, i32, i64, index, bf16, f16, f32, f64),
    f32: (f64,),
}
"""The dtypes that hold every value of a dtype exactly."""


def _cast_of_cast(op: Op, build: Rewriter) -> Replacement:
    """A cast that loses nothing, followed by another, is that other one alone; one that leads back is nothing."""
    (value,) = op.operands
    result = tile_type(op.result)
    if tile_type(value) == result:
        return [value]
    before = value.op
    if before is None or before.name != "cast":
        return None
    (source,) = before.operands
    if tile_type(value).dtype not in _HOLDS.get(tile_type(source).dtype, ()):
        return None
    if tile_type(source) == result:
        return [source]
    if not tile_type(source).dtype.is_float and tile_type(value).dtype.is_float and result.dtype in (bf16, f16):
        return None  # an integer to bf16 goes by f32, which may round twice where f64 does not
    return [build.build("cast", [source], result)]


# Contractions.


def _uncast(value: Value, to: DType, allowed: tuple[DType, ...]) -> Value:
    """The operand of a cast from one of the allowed dtypes; the value itself otherwise."""
    op = value.op
    if op is not None and op.name == "cast" and tile_type(value).dtype == to:
        (source,) = op.operands
        if tile_type(source).dtype in allowed:
            return source
    return value


def _sum_of_product(op: Op, build: Rewriter) -> Replacement:
    """sum(a * b, over=k) with k in both a and b: a contraction, in f32, f64, or i32 of products of i8 and u8."""
    if op.attributes["kind"] != "sum":
        return None
    product = op.operands[0].op
    if product is None or product.name != "mul":
        return None
    a, b = product.operands
    over = list(op.attributes["over"])
    if not all(axis in tile_type(a).axes and axis in tile_type(b).axes for axis in over):
        return None
    dtype = tile_type(op.result).dtype
    if dtype == i32:
        a, b = _uncast(a, i32, (i8, u8)), _uncast(b, i32, (i8, u8))
        if tile_type(a).dtype not in (i8, u8) or tile_type(b).dtype not in (i8, u8):
            return None
    elif dtype not in (f32, f64) or tile_type(a).dtype != dtype or tile_type(b).dtype != dtype:
        return None
    return [build.build("contract", [a, b], op.result.type, over=over)]


def _before_exact_casts(value: Value) -> Value:
    for wide, narrow in ((f32, NARROW_FLOATS), (bf16, (f8e4m3, f8e5m2)), (f16, (f8e4m3, f8e5m2))):
        value = _uncast(value, wide, narrow)
    return value


def _contract_narrow(op: Op, build: Rewriter) -> Replacement:
    """A contraction widens narrow floats to f32 itself: take the operands before their casts, where these agree."""
    if tile_type(op.result).dtype != f32:
        return None
    a, b = op.operands
    narrow_a, narrow_b = (_before_exact_casts(value) for value in (a, b))
    if narrow_a is a and narrow_b is b:
        return None
    dtypes = {tile_type(narrow_a).dtype, tile_type(narrow_b).dtype}
    if dtypes == {bf16, f16}:
        return None
    return [build.build("contract", [narrow_a, narrow_b], op.result.type, over=list(op.attributes["over"]))]


# Arithmetic.

_FOLD: dict[str, Callable[[int, int], int]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "min": lambda a, b: a if a < b else b,
    "max": lambda a, b: a if a > b else b,
    "floordiv": lambda a, b: a // b,
    "mod": lambda a, b: a % b,
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
}


def wrap(value: int, dtype: DType) -> int:
    """The low bits of an integer, as a value of the dtype."""
    value &= (1 << dtype.bits) - 1
    return value - (1 << dtype.bits) if dtype.kind != "u" and value >> (dtype.bits - 1) else value


def _fold_constants(op: Op, build: Rewriter) -> Replacement:
    """Scalar integer arithmetic on constants."""
    result = tile_type(op.result)
    if result.axes:
        return None
    a, b = constant_of(op.operands[0]), constant_of(op.operands[1])
    if type(a) is not int or type(b) is not int or (op.name in ("floordiv", "mod") and b == 0):
        return None
    found = _FOLD[op.name](a, b)
    return [build.build("const", [], result, value=found if result.dtype == bool_ else wrap(found, result.dtype))]


def _neutral(op: Op, build: Rewriter) -> Replacement:
    """x + 0, x - 0, x * 1, x / 1, x // 1, x << 0, x >> 0, where the result is x to the bit.

    For floats x + 0.0 is not x when x is -0.0, but x + -0.0 and x - 0.0 are.
    """
    a, b = op.operands
    name = op.name
    pairs = [(a, b), (b, a)] if name in ("add", "mul") else [(a, b)]
    for kept, other in pairs:
        if kept.type != op.result.type:
            continue
        number = constant_of(other)
        if number is None or number.__class__ is bool:
            continue
        if name in ("mul", "div", "floordiv"):
            neutral = number == 1
        elif number != 0:
            neutral = False
        elif name == "add" and tile_type(kept).dtype.is_float:
            neutral = str(number) == "-0.0"
        elif name == "sub" and tile_type(kept).dtype.is_float:
            neutral = str(number) == "0.0"
        else:
            neutral = True
        if neutral:
            return [kept]
    return None


def _select_known(op: Op, build: Rewriter) -> Replacement:
    condition, a, b = op.operands
    number = constant_of(condition)
    if number is None:
        return [a] if a is b and a.type == op.result.type else None
    taken = a if number else b
    return [taken] if taken.type == op.result.type else None


def _if_known(op: Op, build: Rewriter) -> Replacement:
    number = constant_of(op.operands[0])
    if number is None:
        return None
    return build.inline(op.blocks[0] if number else op.blocks[1], [])


def _twice(op: Op, build: Rewriter) -> Replacement:
    """neg(neg(x)) and not(not(x))."""
    before = op.operands[0].op
    return [before.operands[0]] if before is not None and before.name == op.name else None


CANONICAL = RuleSet([
    Rule("cast-of-cast", ("cast",), _cast_of_cast),
    Rule("sum-of-product", ("reduce",), _sum_of_product),
    Rule("contract-narrow", ("contract",), _contract_narrow),
    Rule("fold-constants", tuple(_FOLD), _fold_constants, priority=1),
    Rule("neutral-operand", ("add", "sub", "mul", "div", "floordiv", "shl", "shr"), _neutral),
    Rule("select-known", ("select",), _select_known),
    Rule("if-known", ("if",), _if_known),
    Rule("twice", ("neg", "not"), _twice),
])


def canonicalize(function: Function, trace: Trace | None = None) -> int:
    """Apply the rules above and remove dead ops, in place; how often a rule fired."""
    fires = rewrite(function, CANONICAL, trace)
    eliminate_dead(function, TILE_OPS)
    return fires
