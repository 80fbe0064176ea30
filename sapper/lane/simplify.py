"""Clean-up of lane IR after lowering: cheap, exact, and done in one go.

Enters: a verified lane function. Leaves: a smaller one with the same stores in the same order. Holds: scalar arithmetic
on constants is done; constants move out of sums into `disp` of memory operands and factors 2, 4, 8 into `scale`; pure
ops are computed once in a scope, and outside the loops they do not depend on; nothing dead is left. Floating-point
results stay the same bit for bit. Ops whose divisor might be 0 are not moved to where they would run more often. Loads
of what the function never stores to (its attribute `steady`) are pure, too, but leave no loop that may not run at all.

simplify() runs: FOLD rules, hoisting, common subexpressions, ADDRESS rules, dead code (what a loop carries for itself
alone included). Hoisting comes first because it brings equal ops from sibling loops into one block, and before the
ADDRESS rules because an address that a loop leaves alone is best computed once, not in every memory operand.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..ir.nodes import Block, Function, Op, Value
from ..ir.rewriter import Replacement, Rewriter, Rule, RuleSet, Trace, eliminate_dead, rewrite
from ..ir.types import ROW_F32, ROW_I32, S64, DType, RowType, b32, bool_, f32
from .ops import FIRST_WORDS, LANE_OPS

READERS = frozenset({"load", "load_run", "load_splat", "gather", "s_load", "prefetch"})
"""Impure only because they read memory (or hint at it): dropped when nobody uses what they read."""

_READERS_OF_VALUES = READERS - {"prefetch"}

_DIVISIONS = frozenset({"s_floordiv", "s_mod", "idiv", "imod"})

_COMMUTES = frozenset({
    "s_add", "s_mul", "s_and", "s_or", "s_xor", "s_min", "s_max", "add", "mul", "and", "or", "xor", "mask_and",
    "mask_or", "mask_xor",
})

# Scalar constants.

_HALF = 1 << 63


def constant(value: Value) -> int | None:
    """The number that a scalar is, if it is a constant."""
    op = value.owner
    if op.__class__ is not Op or op.name != "s_const":
        return None
    number: int = op.attributes["value"]
    return number if -_HALF <= number < _HALF else _wrap(number)


def _wrap(value: int) -> int:
    """The low 64 bits, as a signed integer."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


_COMPARE = {
    "eq": lambda a, b: a == b, "ne": lambda a, b: a != b, "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b, "gt": lambda a, b: a > b, "ge": lambda a, b: a >= b,
}

_FOLD: dict[str, Callable[[int, int], int]] = {
    "s_add": lambda a, b: a + b,
    "s_sub": lambda a, b: a - b,
    "s_mul": lambda a, b: a * b,
    "s_min": min,
    "s_max": max,
    "s_and": lambda a, b: a & b,
    "s_or": lambda a, b: a | b,
    "s_xor": lambda a, b: a ^ b,
    "s_shl": lambda a, b: a << (b & 63),
    "s_shr": lambda a, b: (a & ((1 << 64) - 1)) >> (b & 63),
    "s_sar": lambda a, b: a >> (b & 63),
    "s_floordiv": lambda a, b: a // b,
    "s_mod": lambda a, b: a % b,
}


def _fold_constants(op: Op, build: Rewriter) -> Replacement:
    """Arithmetic on two constants; a division by 0 stays, to fail where it was written."""
    a, b = op.operands
    y = constant(b)
    if y is None:
        return None
    x = constant(a)
    if x is None:
        return None
    if y == 0 and op.name in _DIVISIONS:
        return None
    if op.name == "s_cmp":
        return [build.build("s_const", [], S64, value=int(_COMPARE[op.attributes["cond"]](x, y)))]
    return [build.build("s_const", [], S64, value=_wrap(_FOLD[op.name](x, y)))]


_RIGHT_NEUTRAL = {
    "s_add": 0, "s_sub": 0, "s_mul": 1, "s_or": 0, "s_xor": 0, "s_and": -1, "s_shl": 0, "s_shr": 0, "s_sar": 0,
    "s_floordiv": 1,
}


def _neutral(op: Op, build: Rewriter) -> Replacement:
    """x + 0, x * 1, ... are x; x * 0 and x & 0 are 0."""
    kept, other = op.operands
    name = op.name
    number = constant(other)
    if number is None:
        if name not in _COMMUTES:
            return None
        kept, other = other, kept
        number = constant(other)
        if number is None:
            return None
    if number == _RIGHT_NEUTRAL[name]:
        return [kept]
    if number == 0 and name in ("s_mul", "s_and"):
        return [other]
    return None


def _sum_with_constant(value: Value) -> tuple[Value, int] | None:
    """x and c, if a scalar is x + c."""
    op = value.owner
    if op.__class__ is not Op or op.name != "s_add":
        return None
    operands = op.operands
    number = constant(operands[1])
    return None if number is None else (operands[0], number)


def _add_constants_outward(op: Op, build: Rewriter) -> Replacement:
    """c + x is x + c; (x + c) + d is x + (c + d); (x + c) + y and y + (x + c) are (x + y) + c.

    So unrolled copies of an address share x + y, and c can go into a displacement.
    """
    a, b = op.operands
    if constant(a) is not None:
        return [build.build("s_add", [b, a], S64)]
    number = constant(b)
    left = _sum_with_constant(a)
    if number is not None:
        if left is None:
            return None
        total = build.build("s_const", [], S64, value=_wrap(left[1] + number))
        return [build.build("s_add", [left[0], total], S64)]
    if left is not None:
        assert a.op is not None
        inner = build.build("s_add", [left[0], b], S64)
        return [build.build("s_add", [inner, a.op.operands[1]], S64)]
    right = _sum_with_constant(b)
    if right is not None:
        assert b.op is not None
        inner = build.build("s_add", [a, right[0]], S64)
        return [build.build("s_add", [inner, b.op.operands[1]], S64)]
    return None


def _subtract_constant(op: Op, build: Rewriter) -> Replacement:
    """x - c is x + -c; (x + c) - y is (x - y) + c; x - x is 0."""
    a, b = op.operands
    number = constant(b)
    if number is not None:
        return [build.build("s_add", [a, build.build("s_const", [], S64, value=_wrap(-number))], S64)]
    if a is b:
        return [build.build("s_const", [], S64, value=0)]
    left = _sum_with_constant(a)
    if left is not None:
        assert a.op is not None
        return [build.build("s_add", [build.build("s_sub", [left[0], b], S64), a.op.operands[1]], S64)]
    return None


def _scale_sum(op: Op, build: Rewriter) -> Replacement:
    """(x + c) * d is x * d + c * d, (x + c) << d likewise; constants stand on the right; (x * c) * d is x * (c * d)."""
    a, b = op.operands
    if op.name == "s_mul" and constant(a) is not None:
        return [build.build("s_mul", [b, a], S64)]
    number = constant(b)
    if number is None:
        return None
    factor = number if op.name == "s_mul" else 1 << (number & 63)
    left = _sum_with_constant(a)
    if left is not None:
        scaled = build.build(op.name, [left[0], b], S64)
        return [build.build("s_add", [scaled, build.build("s_const", [], S64, value=_wrap(left[1] * factor))], S64)]
    before = _product_with_constant(a)
    if before is not None:
        both = build.build("s_const", [], S64, value=_wrap(before[1] * factor))
        return [build.build("s_mul", [before[0], both], S64)]
    return None


def _product_with_constant(value: Value) -> tuple[Value, int] | None:
    """x and c, if a scalar is x * c or x << log2(c)."""
    op = value.op
    if op is None or (op.name != "s_mul" and op.name != "s_shl"):
        return None
    number = constant(op.operands[1])
    if number is None:
        return None
    if op.name == "s_shl":
        return (op.operands[0], 1 << number) if 0 <= number < 63 else None
    return op.operands[0], number


def _select_known(op: Op, build: Rewriter) -> Replacement:
    condition, a, b = op.operands
    if a is b:
        return [a]
    number = constant(condition)
    return None if number is None else [a if number else b]


def _splat_constant(op: Op, build: Rewriter) -> Replacement:
    number = constant(op.operands[0])
    if number is None or not isinstance(op.result.type, RowType):
        return None
    low = number & ((1 << op.result.type.dtype.bits) - 1)
    sign = 1 << (op.result.type.dtype.bits - 1)
    return [build.build("splat_const", [], op.result.type, value=(low ^ sign) - sign)]


# Control.


def _if_known(op: Op, build: Rewriter) -> Replacement:
    number = constant(op.operands[0])
    if number is None:
        return None
    return build.inline(op.blocks[0] if number else op.blocks[1], [])


def _loop_known(op: Op, build: Rewriter) -> Replacement:
    """A loop that never runs is what it carries; one that runs once is its body."""
    start, stop = constant(op.operands[0]), constant(op.operands[1])
    if start is None or stop is None:
        return None
    if start >= stop:
        return op.operands[2:]
    if start + op.attributes["step"] >= stop:
        return build.inline(op.blocks[0], [op.operands[0], *op.operands[2:]])
    return None


# Rows and masks.


def _row_neutral(op: Op, build: Rewriter) -> Replacement:
    """x * 1, and for integers x + 0: exact, also for -0."""
    a, b = op.operands
    for kept, other in ((a, b), (b, a)):
        before = other.op
        if before is None or before.name != "splat_const":
            continue
        number = before.attributes["value"]
        if (op.name == "mul" and number == 1) or (op.name == "add" and number == 0 and number.__class__ is int):
            return [kept]
    return None


def _integer_of(value: Value) -> int | None:
    """The number in every lane of an integer row, if it is a constant."""
    op = value.op
    if op is None or op.name != "splat_const" or not isinstance(value.type, RowType) or value.type.dtype.is_float:
        return None
    return int(op.attributes["value"])


_ROW_FOLD: dict[str, Callable[[int, int], int]] = {
    "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b}


def _row_constants(op: Op, build: Rewriter) -> Replacement:
    """Sums, differences and products of two constants; integers wrap."""
    a, b = map(_integer_of, op.operands)
    if a is None or b is None:
        return None
    dtype = op.result.type.dtype  # type: ignore[union-attr]
    low, sign = _ROW_FOLD[op.name](a, b) & (1 << dtype.bits) - 1, 1 << dtype.bits - 1
    return [build.build("splat_const", [], op.result.type, value=(low ^ sign) - sign)]


def _shift_by_constant(op: Op, build: Rewriter) -> Replacement:
    """A shift by the number that every lane of a row has; by 0, what is shifted."""
    amount = _integer_of(op.operands[1]) if len(op.operands) == 2 else op.attributes["amount"]
    if amount == 0:
        return [op.operands[0]]
    if len(op.operands) < 2 or amount is None or not 0 < amount < op.result.type.dtype.bits:  # type: ignore[union-attr]
        return None
    return [build.build(op.name, [op.operands[0]], op.result.type, amount=amount)]


def _row_select_same(op: Op, build: Rewriter) -> Replacement:
    return [op.operands[1]] if op.operands[1] is op.operands[2] else None


def _full_mask(value: Value, lanes: int) -> bool:
    op = value.op
    if op is None:
        return False
    if op.name == "mask_first":
        number = constant(op.operands[0])
        return number is not None and number >= lanes
    return False


def _mask_full(op: Op, build: Rewriter) -> Replacement:
    """m and all is m; m or all is all."""
    lanes = build.function.attributes["lanes"]
    a, b = op.operands
    if a is b:
        return [a]
    for kept, other in ((a, b), (b, a)):
        if _full_mask(other, lanes):
            return [kept if op.name == "mask_and" else other]
    return None


# Memory operands: where the base stands among them.

FIRST = {
    "load": 0, "load_splat": 0, "s_load": 0, "prefetch": 0, "gather": 0, "load_run": 0, "store_run": 0, "store": 1,
    "store_lane0": 1, "s_store": 1, "scatter": 1, "join": 1,
}
_DISP_LIMIT = 1 << 31


def _rebuild(op: Op, build: Rewriter, operands: list[Value], **changed: Any) -> Replacement:
    attributes = {**op.attributes, **changed}
    return build.build_op(op.name, operands, [v.type for v in op.results], attributes).results


def _drop_full_mask(op: Op, build: Rewriter) -> Replacement:
    """A mask that is on in every lane is none."""
    if not op.attributes.get("masked") or not _full_mask(op.operands[-1], build.function.attributes["lanes"]):
        return None
    return _rebuild(op, build, op.operands[:-1], masked=False)


def _fold_displacement(op: Op, build: Rewriter) -> Replacement:
    """base + c, index + c and a constant index go into disp, where it holds them."""
    first = FIRST[op.name]
    attributes = op.attributes
    disp = attributes.get("disp", 0)
    base = op.operands[first]
    left = None if attributes.get("flip") else _sum_with_constant(base)
    if left is not None and -_DISP_LIMIT <= disp + left[1] < _DISP_LIMIT:
        operands = [*op.operands[:first], left[0], *op.operands[first + 1 :]]
        return _rebuild(op, build, operands, disp=disp + left[1])
    if not attributes.get("indexed"):
        return None
    scale = attributes.get("scale", 1)
    index = op.operands[first + 1]
    left = _sum_with_constant(index)
    if left is not None and -_DISP_LIMIT <= disp + left[1] * scale < _DISP_LIMIT:
        operands = [*op.operands[: first + 1], left[0], *op.operands[first + 2 :]]
        return _rebuild(op, build, operands, disp=disp + left[1] * scale)
    number = constant(index)
    if number is not None and -_DISP_LIMIT <= disp + number * scale < _DISP_LIMIT:
        operands = [*op.operands[: first + 1], *op.operands[first + 2 :]]
        return _rebuild(op, build, operands, disp=disp + number * scale, indexed=False, scale=1)
    return None


def _fold_scale(op: Op, build: Rewriter) -> Replacement:
    """base + x * c becomes base, index x, scale c for c = 1, 2, 4 or 8; index x * c becomes x with scale * c.

    Only where the sum or product is computed in this block: one from outside is cheaper as it is.
    """
    first = FIRST[op.name]
    attributes = op.attributes
    if attributes.get("indexed"):
        index = op.operands[first + 1]
        if index not in build.here:
            return None
        product = _product_with_constant(index)
        if product is None or product[1] * attributes.get("scale", 1) not in (1, 2, 4, 8):
            return None
        operands = [*op.operands[: first + 1], product[0], *op.operands[first + 2 :]]
        return _rebuild(op, build, operands, scale=product[1] * attributes.get("scale", 1))
    base = op.operands[first]
    if base not in build.here or base.op is None or base.op.name != "s_add":
        return None
    a, b = base.op.operands
    for kept, other in ((a, b), (b, a)):
        product = _product_with_constant(other)
        if product is not None and product[1] in (2, 4, 8):
            operands = [*op.operands[:first], kept, product[0], *op.operands[first + 1 :]]
            return _rebuild(op, build, operands, indexed=True, scale=product[1])
    return None


def _store_rounds(op: Op, build: Rewriter) -> Replacement:
    """A store to bf16 or f16 rounds: what was rounded to that type before need not have been."""
    before = op.operands[0].op
    if before is None or before.name != "round_to" or before.attributes["dtype"] is not op.attributes["dtype"]:
        return None
    return _rebuild(op, build, [before.operands[0], *op.operands[1:]])


def _store_wraps(op: Op, build: Rewriter) -> Replacement:
    """A store of a narrow integer takes the low bits: those above them need not have been cut, or set to the sign."""
    before, bits = op.operands[0].op, op.attributes["dtype"].bits
    if before is None or before.name not in ("and", "sar") or op.operands[0].type != ROW_I32:
        return None
    kept, above = before.operands[0], 32 - bits
    if before.name == "and":
        cut = _integer_of(before.operands[1]) == (1 << bits) - 1
    else:
        up = kept.op
        cut = up is not None and up.name == "shl" and before.attributes.get("amount") == up.attributes.get(
            "amount") == above > 0
        kept = up.operands[0] if cut and up is not None else kept
    return _rebuild(op, build, [kept, *op.operands[1:]]) if cut else None


def _store_scalar(op: Op, build: Rewriter) -> Replacement:
    """What all lanes hold of a scalar is stored from there."""
    before, dtype = op.operands[0].op, op.attributes["dtype"]
    if before is None or before.name != "splat" or not dtype.is_integer or dtype is bool_:
        return None
    return build.build_op("s_store", [before.operands[0], *op.operands[1:]], [], op.attributes).results


def _store_scalar_wraps(op: Op, build: Rewriter) -> Replacement:
    """A store takes the low bits of a scalar: the sign of an i32 need not be spread above them."""
    before = op.operands[0].op
    if before is None or before.name != "s_sar" or op.attributes["dtype"].bits > 32:
        return None
    up = before.operands[0].op
    if up is None or up.name != "s_shl" or any(constant(o.operands[1]) != 32 for o in (before, up)):
        return None
    return _rebuild(op, build, [up.operands[0], *op.operands[1:]])


def _convert_rounded(op: Op, build: Rewriter) -> Replacement:
    """What is rounded to an integer and then becomes one rounds as it becomes that."""
    before = op.operands[0].op
    if before is None or before.name != "round" or op.operands[0].type != ROW_F32 or op.result.type != ROW_I32:
        return None
    return [build.build("cvt", before.operands, ROW_I32, nearest=True)]


_ADDRESSED = ("load", "load_splat", "s_load", "prefetch", "store", "store_lane0", "s_store")
_MASKABLE = ("load", "gather", "load_run", "store", "store_run", "scatter", "join")

_FOLD_DISPLACEMENT = Rule("displacement", (*_ADDRESSED, "gather", "scatter", "join", "load_run", "store_run"),
                          _fold_displacement)

FOLD = RuleSet([
    Rule("scalar-constants", (*_FOLD, "s_cmp"), _fold_constants, priority=2),
    Rule("scalar-neutral", tuple(_RIGHT_NEUTRAL), _neutral, priority=1),
    Rule("add-constants-outward", ("s_add",), _add_constants_outward),
    Rule("subtract-constant", ("s_sub",), _subtract_constant),
    Rule("scale-sum", ("s_mul", "s_shl"), _scale_sum),
    Rule("scalar-select-known", ("s_select",), _select_known),
    Rule("splat-constant", ("splat",), _splat_constant),
    Rule("if-known", ("if",), _if_known),
    Rule("loop-known", ("loop",), _loop_known),
    Rule("row-neutral", ("add", "mul"), _row_neutral),
    Rule("row-constants", tuple(_ROW_FOLD), _row_constants, priority=1),
    Rule("shift-by-constant", ("shl", "shr", "sar"), _shift_by_constant),
    Rule("row-select-same", ("select",), _row_select_same),
    Rule("mask-full", ("mask_and", "mask_or"), _mask_full),
    Rule("store-rounds", ("store", "store_lane0", "scatter"), _store_rounds, priority=2),
    Rule("store-wraps", ("store", "store_lane0", "scatter"), _store_wraps, priority=3),
    Rule("store-scalar", ("store_lane0",), _store_scalar, priority=4),
    Rule("store-scalar-wraps", ("s_store",), _store_scalar_wraps, priority=1),
    Rule("convert-rounded", ("cvt",), _convert_rounded),
    Rule("drop-full-mask", _MASKABLE, _drop_full_mask, priority=1),
    _FOLD_DISPLACEMENT,
])

PLAIN_ADDRESS = RuleSet([_FOLD_DISPLACEMENT])

ADDRESS = RuleSet([
    _FOLD_DISPLACEMENT,
    Rule("scale", _ADDRESSED, _fold_scale, priority=-1),
], by_block=True)


# Common subexpressions.

_Key = tuple[Any, ...]


_EQUAL_IF_SAME = (int, DType)


def _attribute_key(attributes: dict[str, Any]) -> _Key:
    """repr keeps apart what == does not: 0.0 and -0.0, 1 and True; NaN is equal to itself."""
    if not attributes:
        return ()
    return tuple([(k, v if v.__class__ in _EQUAL_IF_SAME else repr(v)) for k, v in attributes.items()])


def eliminate_common(function: Function) -> int:
    """Compute each pure op once in the block where it first stands and the blocks inside that; how many went."""
    table: dict[_Key, list[Value]] = {}
    replaced: dict[Value, Value] = {}
    return _common_block(function.body, table, replaced, Steady(function))


_PURE = frozenset({name for name, row in LANE_OPS.rows.items() if row.pure and not row.blocks})
_STEADY = frozenset({"load", "load_splat"})
_TYPED = frozenset({"splat", "splat_const", "cvt", "bitcast"}) | _STEADY
"""Ops whose results may have several types."""


class Steady:
    """The loads of a function that find the same each time: of tensors in its attribute `steady`. Not of what products
    take from memory as it lies, which would only hold registers."""

    def __init__(self, function: Function) -> None:
        self.addresses: set[Value] = set()
        """Of such a tensor, with something added to it."""
        steady: list[str] = function.attributes.get("steady", [])
        numbers = {len(FIRST_WORDS) + function.attributes["slots"].index(name) for name in steady}
        for op in function.walk() if steady else ():
            begins = op.name == "arg" and op.attributes["slot"] in numbers
            if begins or (op.name == "s_add" and sum(v in self.addresses for v in op.operands) == 1):
                self.addresses.add(op.result)

    def __contains__(self, op: Op) -> bool:
        return op.name in _STEADY and op.operands[0] in self.addresses and op.attributes["dtype"] not in (f32, b32)


def _common_block(block: Block, table: dict[_Key, list[Value]], replaced: dict[Value, Value], steady: Steady) -> int:
    removed = 0
    added: list[_Key] = []
    out: list[Op] = []
    for op in block.ops:
        operands = op.operands
        if replaced:
            for position, value in enumerate(operands):
                if value in replaced:
                    operands[position] = replaced[value]
        name = op.name
        if name in _PURE or op in steady:
            attributes = _attribute_key(op.attributes)
            type = op.results[0].type if name in _TYPED else None
            key = (name, attributes, type, *operands)
            found = table.get(key)
            if found is None and name in _COMMUTES:
                found = table.get((name, attributes, type, operands[1], operands[0]))
            if found is not None:
                for old, new in zip(op.results, found, strict=True):
                    replaced[old] = new
                    if not new.name:
                        new.name = old.name
                removed += 1
                continue
            table[key] = op.results
            added.append(key)
        else:
            for inner in op.blocks:
                removed += _common_block(inner, table, replaced, steady)
        out.append(op)
    block.ops = out
    for key in added:
        del table[key]
    return removed


# Hoisting.


def _may_run_more_often(op: Op) -> bool:
    """Whether an op may run where it did not before: not a division whose divisor might be 0."""
    if op.name not in _DIVISIONS:
        return True
    before = op.operands[1].op
    return before is not None and before.name in ("s_const", "splat_const") and bool(before.attributes["value"])


def hoist(function: Function) -> int:
    """Move pure ops out of every `loop` and `tasks` whose values they do not depend on; how many moves."""
    return _hoist_block(function.body, Steady(function))


def _runs(loop: Op) -> bool:
    """Whether a loop runs once at least, for sure."""
    if loop.name != "loop":
        return False
    start, stop = (constant(v) for v in loop.operands[:2])
    return start is not None and stop is not None and start < stop


def _hoist_block(block: Block, steady: Steady) -> int:
    moved = 0
    out: list[Op] | None = None
    for position, op in enumerate(block.ops):
        if op.blocks:
            for inner in op.blocks:
                moved += _hoist_block(inner, steady)
            if op.name == "loop" or op.name == "tasks":
                (body,) = op.blocks
                runs = _runs(op)
                inside: set[Value] = set(body.arguments)
                up: list[Op] = []
                stay: list[Op] = []
                for candidate in body.ops:
                    leaves = _may_run_more_often(candidate) if candidate.name in _PURE else runs and candidate in steady
                    if leaves and inside.isdisjoint(candidate.operands):
                        up.append(candidate)
                    else:
                        inside.update(candidate.results)
                        stay.append(candidate)
                if up:
                    moved += len(up)
                    body.ops = stay
                    if out is None:
                        out = block.ops[:position]
                    out.extend(up)
        if out is not None:
            out.append(op)
    if out is not None:
        block.ops = out
    return moved


def simplify(function: Function, trace: Trace | None = None, indexed_addresses: bool = True) -> int:
    """All of the above on a lane function, in place; how often a rule fired, or an op was merged, moved or dropped.

    trace: called with each rule's name and the op that it replaced. indexed_addresses: memory operands may get an
    index.
    """
    changes = rewrite(function, FOLD, trace)
    changes += hoist(function)
    changes += eliminate_common(function)
    changes += rewrite(function, ADDRESS if indexed_addresses else PLAIN_ADDRESS, trace)
    return changes + eliminate_dead(function, LANE_OPS, _READERS_OF_VALUES)
