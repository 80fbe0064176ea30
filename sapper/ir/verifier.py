"""Checks that a function is well formed: what every pass may rely on and must leave behind.

Enters: a Function and the op table of its stage. Leaves: nothing, or VerificationError. Holds afterwards: every op is
in the table with the counts and attributes that it asks for; each value is defined once and used only where its
definition is in scope; blocks yield what their op returns; types follow the rules of the stage (docs/ir.md and the
doc lines of sapper/tile/ops.py and sapper/lane/ops.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NoReturn

from .nodes import Block, Function, Location, Op, Value
from .ops import OpTable
from .text import print_op
from .types import (
    MASK,
    NARROW_FLOATS,
    ROW_B32,
    ROW_F32,
    ROW_F64,
    ROW_I32,
    ROW_I64,
    S64,
    TILE_B32,
    TILE_F32,
    TILE_I32,
    DType,
    MaskType,
    RowType,
    ScalarType,
    TensorType,
    TileRegisterType,
    TileType,
    Type,
    b32,
    bf16,
    bool_,
    f8e4m3,
    f8e5m2,
    f16,
    f32,
    f64,
    i8,
    i16,
    i32,
    i64,
    index,
    u8,
)


class VerificationError(ValueError):
    """A function breaks a rule. op is None where the function as a whole does."""

    def __init__(self, function: Function, op: Op | None, found: str, expected: str) -> None:
        self.function = function
        self.op = op
        self.found = found
        self.expected = expected
        self.location: Location | None = op.location if op is not None else function.location
        place = f" at {self.location}" if self.location is not None else ""
        what = f"op {op.name}" if op is not None else "function"
        message = f"{function.stage} {what} in {function.name}{place}: found {found}; expected {expected}"
        if op is not None:
            message += f"\n    {_show(op)}"
        super().__init__(message)


def _show(op: Op) -> str:
    try:
        return print_op(op)
    except TypeError as error:  # the attribute that cannot be printed may be the very fault
        return f"{op.name} ({error})"


def _types(values: Iterable[Value]) -> str:
    return f"({', '.join([str(v.type) for v in values])})"


def union_of_axes(values: Iterable[Value]) -> tuple[str, ...]:
    """The axes of tile values in order of first appearance."""
    found: dict[str, None] = {}
    for value in values:
        if isinstance(value.type, TileType):
            for axis in value.type.axes:
                found[axis] = None
    return tuple(found)


INDEX = TileType(index)
BOOL = TileType(bool_)

_MIXES_WITH_INDEX = (i32, i64, index)


def join_dtypes(a: DType, b: DType) -> DType | None:
    """The dtype of an elementwise op on a and b: equal, or index where one is index and one i32 or i64."""
    if a == b:
        return a
    if a in _MIXES_WITH_INDEX and b in _MIXES_WITH_INDEX and index in (a, b):
        return index
    return None


class Checker:
    """The walk over one function, and what the rules of the stages ask of it."""

    __slots__ = ("axes", "axes_seen", "defined", "dims", "ever_defined", "function", "inside_tasks", "lanes", "op",
                 "rules", "slots", "table")

    def __init__(self, function: Function, table: OpTable, rules: dict[str, Rule]) -> None:
        self.function = function
        self.table = table
        self.rules = rules
        self.defined: set[Value] = set()  # in scope here
        self.ever_defined: set[Value] = set()
        self.axes: set[str] = set()
        self.axes_seen: set[str] = set()
        self.dims: set[str] | None = None
        self.op: Op | None = None
        self.lanes = 0
        self.slots = 0
        self.inside_tasks = False

    def fail(self, found: str, expected: str) -> NoReturn:
        raise VerificationError(self.function, self.op, found, expected)

    # Structure.

    def run(self) -> None:
        body = self.function.body
        for argument in body.arguments:
            self.define(argument, body)
        self.block(body, None)

    def define(self, value: Value, owner: Op | Block) -> None:
        if value.owner is not owner:
            self.fail(f"%{value.name or '?'} owned by {value.owner!r}", "a value owned by what defines it")
        if value in self.ever_defined:
            self.fail(f"%{value.name or '?'} defined twice", "each value defined once")
        self.ever_defined.add(value)
        self.defined.add(value)

    def block(self, block: Block, owner: Op | None, yields: list[Type] | None = None) -> None:
        """One block, its arguments already defined. yields: what it must yield; the function yields nothing."""
        here: list[Value] = list(block.arguments)
        axes_before = set(self.axes)
        defined, rows = self.defined, self.table.rows
        last = len(block.ops) - 1
        for position, op in enumerate(block.ops):
            self.op = op
            row = rows.get(op.name)
            if row is None:
                self.fail(f"op {op.name}", f"an op of the {self.table.stage} IR")
            for number, operand in enumerate(op.operands):
                if operand not in defined:
                    self.fail(f"operand {number} (%{operand.name or '?'}: {operand.type}) that is not defined here",
                              "a value defined above it, in this block or one around it")
            self.count("operands", len(op.operands), row.operands)
            self.count("results", len(op.results), row.results)
            if len(op.blocks) != row.blocks:
                self.fail(f"{len(op.blocks)} blocks", f"{row.blocks}")
            attributes = op.attributes
            for name in row.attributes:
                if name not in attributes:
                    self.fail(f"no attribute {name}", f"attributes {', '.join(row.attributes)}")
            if len(attributes) > len(row.attributes):
                for name in attributes:
                    if name not in row.attributes and name not in row.optional:
                        known = ", ".join((*row.attributes, *row.optional)) or "none"
                        self.fail(f"attribute {name}", f"only {known}")
            if op.name == "yield" and (position != last or owner is None):
                self.fail("yield in the middle" if owner is not None else "yield in the function's own block",
                          "yield as the last op of a nested block")
            self.rules[op.name](self, op)
            self.op = op
            for value in op.results:
                self.define(value, op)
                here.append(value)
        if owner is not None:
            self.yielded(block, owner, yields or [])
        self.axes = axes_before
        for value in here:
            defined.discard(value)

    def count(self, what: str, found: int, allowed: tuple[int, int | None]) -> None:
        low, high = allowed
        if found < low or (high is not None and found > high):
            limit = f"{low}" if high == low else f"at least {low}" if high is None else f"{low} to {high}"
            self.fail(f"{found} {what}", limit)

    def yielded(self, block: Block, owner: Op, expected: list[Type]) -> None:
        terminator = block.terminator
        values = terminator.operands if terminator is not None else []
        if terminator is None and expected:
            self.op = owner
            self.fail("a block without yield", f"a yield of ({', '.join(map(str, expected))})")
        if [v.type for v in values] != expected:
            self.op = terminator
            self.fail(f"a yield of {_types(values)}", f"({', '.join(map(str, expected))}), as op {owner.name} returns")

    def nested(self, op: Op, block: Block, arguments: list[Type], yields: list[Type]) -> None:
        """A nested block with arguments of these types, yielding those."""
        if [a.type for a in block.arguments] != arguments:
            self.fail(f"block arguments {_types(block.arguments)}", f"({', '.join(map(str, arguments))})")
        for argument in block.arguments:
            self.define(argument, block)
        self.block(block, op, yields)
        self.op = op

    # Attributes and types.

    def attribute(self, op: Op, name: str, kind: type, default: Any = None) -> Any:
        value = op.attributes.get(name, default)
        if type(value) is not kind:
            self.fail(f"attribute {name} = {value!r}", f"a value of type {kind.__name__}")
        return value

    def one_of(self, op: Op, name: str, allowed: tuple[Any, ...], default: Any = None) -> Any:
        value = op.attributes.get(name, default)
        if value not in allowed or isinstance(value, bool):
            self.fail(f"attribute {name} = {value!r}", "one of " + ", ".join(map(str, allowed)))
        return value

    def names(self, op: Op, name: str) -> list[str]:
        value = op.attributes[name]
        if not isinstance(value, (list, tuple)) or not all(type(v) is str for v in value):
            self.fail(f"attribute {name} = {value!r}", "a list of axis names")
        if len(set(value)) != len(value) or not value:
            self.fail(f"attribute {name} = {list(value)!r}", "at least one axis, each once")
        return list(value)

    def results(self, op: Op, *expected: Type) -> None:
        if tuple([v.type for v in op.results]) != expected:
            self.fail(f"results {_types(op.results)}", f"({', '.join(map(str, expected))})")

    def operands(self, op: Op, *expected: Type) -> None:
        if tuple([v.type for v in op.operands]) != expected:
            self.fail(f"operands {_types(op.operands)}", f"({', '.join(map(str, expected))})")

    def bring_axes(self, axes: list[str]) -> None:
        for axis in axes:
            if axis in self.axes_seen:
                self.fail(f"axis {axis} brought into scope twice", "axis names that are unique in the function")
            self.axes_seen.add(axis)
            self.axes.add(axis)


Rule = Callable[[Checker, Op], None]


# Tile rules.


def _tile(check: Checker, value: Value, what: str) -> TileType:
    if not isinstance(value.type, TileType):
        check.fail(f"{what} of type {value.type}", "a tile or a scalar")
    return value.type


def _tiles(check: Checker, op: Op) -> list[TileType]:
    return [_tile(check, v, f"operand {n}") for n, v in enumerate(op.operands)]


def _result_tile(check: Checker, op: Op, dtype: DType, axes: tuple[str, ...]) -> None:
    check.results(op, TileType(dtype, axes))
    for axis in axes:
        if axis not in check.axes:
            check.fail(f"axis {axis} out of scope", f"an axis in scope ({', '.join(sorted(check.axes)) or 'none'})")


def _computes(check: Checker, dtype: DType, allowed: str, names: str) -> None:
    if not dtype.compute or dtype.kind not in allowed or dtype == b32:
        check.fail(f"dtype {dtype}", names)


def _elementwise(allowed: str, names: str, compare: bool = False) -> Rule:
    def rule(check: Checker, op: Op) -> None:
        types = _tiles(check, op)
        dtype: DType | None = types[0].dtype
        for other in types[1:]:
            dtype = join_dtypes(dtype, other.dtype) if dtype is not None else None
        if dtype is None:
            check.fail(" and ".join([str(t.dtype) for t in types]), "equal dtypes, or index with i32 or i64")
        _computes(check, dtype, allowed, names)
        _result_tile(check, op, bool_ if compare else dtype, union_of_axes(op.operands))

    return rule


def _tile_dim(check: Checker, op: Op) -> None:
    name = check.attribute(op, "name", str)
    if check.dims is not None and name not in check.dims:
        check.fail(f"dimension {name}", f"a dimension of the function ({', '.join(sorted(check.dims))})")
    check.results(op, INDEX)


def _integer_limits(dtype: DType) -> tuple[int, int]:
    if dtype.kind == "u":
        return 0, (1 << dtype.bits) - 1
    return -(1 << (dtype.bits - 1)), (1 << (dtype.bits - 1)) - 1


def _tile_const(check: Checker, op: Op) -> None:
    type = _tile(check, op.result, "a result")
    value = op.attributes["value"]
    if type.axes:
        check.fail(f"a result of type {type}", "a scalar; `full` spreads one")
    kind = {"f": float, "b": bool}.get(type.dtype.kind, int)
    if value.__class__ is not kind:
        check.fail(f"value {value!r} for {type}", f"a value of type {kind.__name__}")
    if kind is int:
        low, high = _integer_limits(type.dtype)
        if not low <= value <= high:
            check.fail(f"value {value} for {type}", f"{low} to {high}")


def _tile_full(check: Checker, op: Op) -> None:
    (type,) = _tiles(check, op)
    result = _tile(check, op.result, "a result")
    if type.axes:
        check.fail(f"an operand of type {type}", "a scalar")
    if len(set(result.axes)) != len(result.axes):
        check.fail(f"a result of type {result}", "each axis once")
    _result_tile(check, op, type.dtype, result.axes)


def _tile_index(check: Checker, op: Op) -> None:
    _result_tile(check, op, index, (check.attribute(op, "axis", str),))


def _tile_whole(check: Checker, op: Op) -> None:
    check.operands(op, INDEX, INDEX)
    check.bring_axes([check.attribute(op, "axis", str)])


def _tensor_access(check: Checker, op: Op, indices: list[Value]) -> TensorType:
    tensor = op.operands[0].type
    if not isinstance(tensor, TensorType):
        check.fail(f"operand 0 of type {tensor}", "a tensor")
    if len(indices) != len(tensor.dims):
        check.fail(f"{len(indices)} indices for {tensor}", f"{len(tensor.dims)}, one for each dimension")
    for number, value in enumerate(indices):
        dtype = _tile(check, value, f"index {number}").dtype
        if not dtype.is_integer or not dtype.compute:
            check.fail(f"index {number} of dtype {dtype}", "an integer dtype")
    return tensor


def _tile_load(check: Checker, op: Op) -> None:
    indices = op.operands[1:]
    tensor = _tensor_access(check, op, indices)
    _result_tile(check, op, tensor.dtype, union_of_axes(indices))


def _tile_store(check: Checker, op: Op) -> None:
    indices = op.operands[2:]
    tensor = _tensor_access(check, op, indices)
    value = _tile(check, op.operands[1], "the value")
    if value.dtype != tensor.dtype:
        check.fail(f"a value of {value.dtype} for {tensor}", f"{tensor.dtype}")
    axes = union_of_axes(indices)
    for axis in value.axes:
        if axis not in axes:
            check.fail(f"a value over axis {axis}, which no index spans", "indices that span all axes of the value")


def _tile_select(check: Checker, op: Op) -> None:
    condition, a, b = _tiles(check, op)
    if condition.dtype != bool_:
        check.fail(f"a condition of {condition.dtype}", "bool")
    dtype = join_dtypes(a.dtype, b.dtype)
    if dtype is None:
        check.fail(f"{a.dtype} and {b.dtype}", "equal dtypes, or index with i32 or i64")
    _result_tile(check, op, dtype, union_of_axes(op.operands))


def _tile_asm(check: Checker, op: Op) -> None:
    meaning, *_ = _tiles(check, op)
    check.attribute(op, "by", str)
    _result_tile(check, op, meaning.dtype, meaning.axes)


def _tile_cast(check: Checker, op: Op) -> None:
    (type,) = _tiles(check, op)
    _result_tile(check, op, _tile(check, op.result, "a result").dtype, type.axes)


def _tile_bitcast(check: Checker, op: Op) -> None:
    (type,) = _tiles(check, op)
    result = _tile(check, op.result, "a result")
    if type.dtype.bits != result.dtype.bits or {index, bool_} & {type.dtype, result.dtype}:
        check.fail(f"{type.dtype} to {result.dtype}", "two dtypes of one width, neither index nor bool")
    _result_tile(check, op, result.dtype, type.axes)


def _tile_reduce(check: Checker, op: Op) -> None:
    (type,) = _tiles(check, op)
    kind = check.one_of(op, "kind", ("sum", "max", "min", "argmax", "argmin"))
    over = check.names(op, "over")
    for axis in over:
        if axis not in type.axes:
            check.fail(f"over = {over} of {type}", "axes of the operand")
    _computes(check, type.dtype, "fiux", "a number that can be computed with")
    dtype = type.dtype
    if kind in ("argmax", "argmin"):
        if len(over) != 1:
            check.fail(f"{kind} over {over}", "one axis")
        dtype = index
    _result_tile(check, op, dtype, tuple([a for a in type.axes if a not in over]))


def _tile_scan(check: Checker, op: Op) -> None:
    (type,) = _tiles(check, op)
    check.one_of(op, "kind", ("sum", "max", "min"))
    _one_axis(check, op, type)
    _result_tile(check, op, type.dtype, type.axes)


def _tile_topk(check: Checker, op: Op) -> None:
    (type,) = _tiles(check, op)
    over = _one_axis(check, op, type)
    into = check.attribute(op, "into", str)
    if into not in check.axes or into in type.axes:
        check.fail(f"into = {into}", "an axis in scope that the operand does not span")
    axes = (*[a for a in type.axes if a != over], into)
    check.results(op, TileType(type.dtype, axes), TileType(index, axes))


def _one_axis(check: Checker, op: Op, type: TileType) -> str:
    over = check.names(op, "over")
    if len(over) != 1 or over[0] not in type.axes:
        check.fail(f"over = {over} of {type}", "one axis of the operand")
    _computes(check, type.dtype, "fiux", "a number that can be computed with")
    return over[0]


def contract_dtype(a: DType, b: DType) -> DType | None:
    """The dtype of a contraction: f32 for bf16, f16, fp8, f32 in any mix; f64; i32 for i8 and u8 in any mix."""
    if a in (*NARROW_FLOATS, f32) and b in (*NARROW_FLOATS, f32):
        return f32
    if a == f64 and b == f64:
        return f64
    if a in (i8, u8) and b in (i8, u8):
        return i32
    return None


def _tile_contract(check: Checker, op: Op) -> None:
    a, b = _tiles(check, op)
    over = check.names(op, "over")
    for axis in over:
        if axis not in a.axes or axis not in b.axes:
            check.fail(f"over = {over} of {a} and {b}", "axes of both operands")
    dtype = contract_dtype(a.dtype, b.dtype)
    if dtype is None:
        check.fail(f"{a.dtype} and {b.dtype}", "bf16, f16 or f32 (gives f32), f64 twice, or i8 or u8 (gives i32)")
    _result_tile(check, op, dtype, tuple([x for x in union_of_axes(op.operands) if x not in over]))


def _carried(check: Checker, op: Op, bounds: int) -> list[Type]:
    """Checks the bounds and that what is carried in is what comes out; its types."""
    if len(op.operands) < bounds:
        check.fail(f"{len(op.operands)} operands", f"at least {bounds} (a start and a stop each)")
    for number, value in enumerate(op.operands[:bounds]):
        if value.type != INDEX:
            check.fail(f"bound {number} of type {value.type}", "an index scalar")
    carried = [v.type for v in op.operands[bounds:]]
    for type in carried:
        if not isinstance(type, TileType):
            check.fail(f"a carried value of type {type}", "a tile or a scalar")
    check.results(op, *carried)
    parallel = check.attribute(op, "parallel", bool)
    if check.attribute(op, "ordered", bool, False) and parallel:
        check.fail("a loop that is ordered and parallel", "one of the two")
    if carried and parallel:
        check.fail("a parallel loop that carries values", "parallel = false, or no carried values")
    return carried


def _tile_tiles(check: Checker, op: Op) -> None:
    axes = check.names(op, "axes")
    carried = _carried(check, op, 2 * len(axes))
    outside = set(check.axes)
    check.bring_axes(axes)
    check.nested(op, op.blocks[0], carried, carried)
    check.axes = outside


def _tile_each(check: Checker, op: Op) -> None:
    count = check.attribute(op, "count", int)
    if count < 1:
        check.fail(f"count = {count}", "at least 1")
    step = check.attribute(op, "step", int, 1)
    if step < 1:
        check.fail(f"step = {step}", "a positive step")
    carried = _carried(check, op, 2 * count)
    if check.attribute(op, "asserted", bool, False) and not op.attributes["parallel"]:
        check.fail("an asserted loop that is not parallel", "parallel = true")
    check.nested(op, op.blocks[0], [INDEX] * count + carried, carried)


def _if(condition: Type) -> Rule:
    def rule(check: Checker, op: Op) -> None:
        if op.operands[0].type != condition:
            check.fail(f"a condition of type {op.operands[0].type}", f"{condition}")
        types = [v.type for v in op.results]
        for block in op.blocks:
            check.nested(op, block, [], types)

    return rule


def _tile_view(check: Checker, op: Op) -> None:
    tensor, *extents = op.operands
    if not isinstance(tensor.type, TensorType):
        check.fail(f"operand 0 of type {tensor.type}", "a tensor")
    check.operands(op, tensor.type, *[INDEX] * len(extents))
    _computed_tensor(check, op, len(extents))
    groups = op.attributes["groups"]
    counts = [len(tensor.type.dims), len(extents)]
    if [sum(g[side] for g in groups) for side in (0, 1)] != counts:
        check.fail(f"groups = {groups}", f"pairs whose sums are {counts}")


def _tile_buffer(check: Checker, op: Op) -> None:
    check.operands(op, *[INDEX] * len(op.operands))
    _computed_tensor(check, op, len(op.operands))


def _computed_tensor(check: Checker, op: Op, rank: int) -> None:
    type = op.result.type
    if not isinstance(type, TensorType) or type.dims != ("?",) * rank:
        check.fail(f"a result of type {type}", f"a tensor of {rank} extents, each ?")


def _tile_part(check: Checker, op: Op) -> None:
    parallel = check.attribute(op, "parallel", bool)
    if not parallel and any(inner.attributes.get("parallel") for inner in op.blocks[0].ops):
        check.fail("a parallel loop in a part of one worker", "parallel = true")
    seen = set(check.axes_seen)
    check.nested(op, op.blocks[0], [], [])
    check.axes_seen = seen


def _nothing(check: Checker, op: Op) -> None:
    """yield: the block's owner checks it."""


_NUMBER = ("fiux", "a number that can be computed with")
_FLOAT = ("f", "a float that can be computed with")
_INTEGER = ("iux", "an integer that can be computed with")
_BITS = ("iuxb", "an integer or bool")

TILE_RULES: dict[str, Rule] = {
    "dim": _tile_dim,
    "const": _tile_const,
    "full": _tile_full,
    "index": _tile_index,
    "whole": _tile_whole,
    "load": _tile_load,
    "store": _tile_store,
    **dict.fromkeys(("exp", "exp2", "log", "log2", "sqrt", "rsqrt", "tanh", "sigmoid", "erf", "sin", "cos", "floor",
                     "ceil", "round", "div"), _elementwise(*_FLOAT)),
    **dict.fromkeys(("neg", "abs", "add", "sub", "mul", "min", "max"), _elementwise(*_NUMBER)),
    **dict.fromkeys(("floordiv", "mod", "shl", "shr"), _elementwise(*_INTEGER)),
    **dict.fromkeys(("and", "or", "xor", "not"), _elementwise(*_BITS)),
    **dict.fromkeys(("eq", "ne", "lt", "le", "gt", "ge"), _elementwise("fiuxb", _NUMBER[1] + " or bool", True)),
    "select": _tile_select,
    "asm": _tile_asm,
    "cast": _tile_cast,
    "bitcast": _tile_bitcast,
    "reduce": _tile_reduce,
    "contract": _tile_contract,
    "scan": _tile_scan,
    "topk": _tile_topk,
    "tiles": _tile_tiles,
    "each": _tile_each,
    "view": _tile_view,
    "buffer": _tile_buffer,
    "part": _tile_part,
    "if": _if(BOOL),
    "yield": _nothing,
}


# Lane rules.

FLOAT_ROWS: tuple[Type, ...] = (ROW_F32, ROW_F64)
INTEGER_ROWS: tuple[Type, ...] = (ROW_I32, ROW_I64)
NUMBER_ROWS = (*FLOAT_ROWS, *INTEGER_ROWS)
BIT_ROWS = (*INTEGER_ROWS, ROW_B32)
CONDITIONS = ("eq", "ne", "lt", "le", "gt", "ge")

MEMORY_ROWS: dict[DType, RowType] = {
    f32: ROW_F32, **dict.fromkeys(NARROW_FLOATS, ROW_F32), f64: ROW_F64,
    **dict.fromkeys((i8, u8, i16, i32, bool_), ROW_I32), i64: ROW_I64, b32: ROW_B32,
}
"""The row type that elements of a memory dtype become."""

SCALAR_MEMORY = (i8, u8, i16, i32, i64, bool_)


def _signature(operands: tuple[Type, ...], results: tuple[Type, ...]) -> Rule:
    def rule(check: Checker, op: Op) -> None:
        check.operands(op, *operands)
        check.results(op, *results)

    return rule


def _row_of(check: Checker, type: Type, allowed: tuple[Type, ...], what: str) -> RowType:
    if type not in allowed or not isinstance(type, RowType):
        check.fail(f"{what} of type {type}", "one of " + ", ".join(map(str, allowed)))
    return type


def _same_rows(allowed: tuple[Type, ...]) -> Rule:
    """All operands and the result of one row type."""

    def rule(check: Checker, op: Op) -> None:
        type = _row_of(check, op.operands[0].type, allowed, "operand 0")
        check.operands(op, *[type] * len(op.operands))
        check.results(op, type)

    return rule


def _lane_arg(check: Checker, op: Op) -> None:
    slot = check.attribute(op, "slot", int)
    if not 0 <= slot < 3 + check.slots:
        check.fail(f"slot = {slot}", f"0 to {2 + check.slots} (three words, then the attribute slots)")
    check.results(op, S64)


def _lane_s_const(check: Checker, op: Op) -> None:
    value = check.attribute(op, "value", int)
    if not -(1 << 63) <= value < 1 << 64:
        check.fail(f"value = {value}", "64 bits")
    check.results(op, S64)


def _lane_s_cmp(check: Checker, op: Op) -> None:
    check.one_of(op, "cond", CONDITIONS)
    check.operands(op, S64, S64)
    check.results(op, S64)


def _lane_splat(check: Checker, op: Op) -> None:
    check.operands(op, S64)
    _row_of(check, op.result.type, BIT_ROWS, "a result")


def _lane_splat_const(check: Checker, op: Op) -> None:
    type = _row_of(check, op.result.type, (*NUMBER_ROWS, ROW_B32), "a result")
    value = op.attributes["value"]
    if type.dtype.is_float:
        check.attribute(op, "value", float)
    elif value.__class__ is not int or not -(1 << (type.dtype.bits - 1)) <= value < 1 << type.dtype.bits:
        check.fail(f"value = {value!r}", f"an integer of {type.dtype.bits} bits")


def _lane_lookup(check: Checker, op: Op) -> None:
    check.operands(op, ROW_I32)
    check.results(op, ROW_F32)
    table = op.attributes["table"]
    if not isinstance(table, (list, tuple)) or len(table) != 16 or not all(type(v) is float for v in table):
        check.fail(f"table = {table!r}", "16 floats")


def _lane_pick(check: Checker, op: Op) -> None:
    kind = _row_of(check, op.operands[0].type, (ROW_F32, ROW_I32), "operand 0")
    check.operands(op, kind, ROW_I32)
    check.results(op, kind)


def _lane_lane0(check: Checker, op: Op) -> None:
    _row_of(check, op.operands[0].type, INTEGER_ROWS, "operand 0")
    check.results(op, S64)


def _lane_shift(check: Checker, op: Op) -> None:
    type = _row_of(check, op.operands[0].type, BIT_ROWS, "operand 0")
    if ("amount" in op.attributes) == (len(op.operands) == 2):
        check.fail(f"{len(op.operands)} operands and the attributes {list(op.attributes)}",
                   "either the attribute amount or a second operand")
    if len(op.operands) == 2:
        check.operands(op, type, type)
    else:
        amount = check.attribute(op, "amount", int)
        if not 0 <= amount < type.dtype.bits:
            check.fail(f"amount = {amount}", f"0 to {type.dtype.bits - 1}")
    check.results(op, type)


def _lane_cmp(check: Checker, op: Op) -> None:
    check.one_of(op, "cond", CONDITIONS)
    type = _row_of(check, op.operands[0].type, NUMBER_ROWS, "operand 0")
    check.operands(op, type, type)
    check.results(op, MASK)


def _lane_select(check: Checker, op: Op) -> None:
    type = _row_of(check, op.operands[1].type, (*NUMBER_ROWS, ROW_B32), "operand 1")
    check.operands(op, MASK, type, type)
    check.results(op, type)


def _lane_cvt(check: Checker, op: Op) -> None:
    source = _row_of(check, op.operands[0].type, NUMBER_ROWS, "operand 0")
    result = _row_of(check, op.result.type, NUMBER_ROWS, "a result")
    if source == result:
        check.fail(f"{source} to {result}", "two different row types")


def _lane_bitcast(check: Checker, op: Op) -> None:
    allowed = (*NUMBER_ROWS, ROW_B32)
    source = _row_of(check, op.operands[0].type, allowed, "operand 0")
    result = _row_of(check, op.result.type, allowed, "a result")
    if source.dtype.bits != result.dtype.bits:
        check.fail(f"{source} to {result}", "two row types of one width")


def _lane_round_to(check: Checker, op: Op) -> None:
    check.one_of(op, "dtype", NARROW_FLOATS)
    check.operands(op, ROW_F32)
    check.results(op, ROW_F32)


def _lane_shuffle(attribute: str, least: int) -> Rule:
    def rule(check: Checker, op: Op) -> None:
        value = check.attribute(op, attribute, int)
        if not least <= value < check.lanes:
            check.fail(f"{attribute} = {value}", f"{least} to {check.lanes - 1}")
        type = _row_of(check, op.operands[0].type, (*NUMBER_ROWS, ROW_B32), "operand 0")
        check.results(op, type)

    return rule


def _lane_widen_float8(check: Checker, op: Op) -> None:
    check.one_of(op, "dtype", (f8e4m3, f8e5m2))
    check.operands(op, ROW_B32)
    check.results(op, *[ROW_F32] * 4)


def _lane_exchange(check: Checker, op: Op) -> None:
    distance = check.attribute(op, "distance", int)
    if not 1 <= distance < check.lanes or distance & (distance - 1):
        check.fail(f"distance = {distance}", f"a power of 2 below {check.lanes}")
    type = _row_of(check, op.operands[0].type, (*NUMBER_ROWS, ROW_B32), "operand 0")
    check.operands(op, type, type)
    check.results(op, type, type)


def _lane_zip(check: Checker, op: Op) -> None:
    type = _row_of(check, op.operands[0].type, (*NUMBER_ROWS, ROW_B32), "operand 0")
    check.operands(op, type, type)
    check.results(op, type, type)


def _memory(check: Checker, op: Op, first: int, gathered: bool = False) -> None:
    """The memory operand from operand `first` on, with a mask last if masked."""
    attributes = op.attributes
    if attributes:
        check.one_of(op, "scale", (1, 2, 4, 8), 1)
        disp = check.attribute(op, "disp", int, 0)
        if not -(1 << 31) <= disp < 1 << 31:
            check.fail(f"disp = {disp}", "32 bits, signed")
    expected: list[Type] = [S64]
    if gathered:
        expected.append(ROW_I32)
    elif attributes.get("indexed") and check.attribute(op, "indexed", bool):
        expected.append(S64)
    if attributes.get("masked") and check.attribute(op, "masked", bool):
        expected.append(MASK)
    found = op.operands[first:]
    if [v.type for v in found] != expected:
        check.fail(f"memory operands {_types(found)}",
                   f"({', '.join(map(str, expected))}) by the attributes indexed and masked")


def _lane_load(gathered: bool) -> Rule:
    def rule(check: Checker, op: Op) -> None:
        dtype = check.one_of(op, "dtype", tuple(MEMORY_ROWS))
        _memory(check, op, 0, gathered)
        check.results(op, MEMORY_ROWS[dtype])

    return rule


MOST_RUN_BYTES = 16


def _lane_run(check: Checker, op: Op) -> None:
    """load_run and store_run: a power of two of rows, of MOST_RUN_BYTES for a lane; the address has no index."""
    dtype = check.one_of(op, "dtype", tuple(MEMORY_ROWS))
    gathered, masked = (bool(op.attributes.get(name)) and check.attribute(op, name, bool) for name in
                        ("gathered", "masked"))
    expected = [S64, *[ROW_I32] * gathered, *[MASK] * masked]
    rows = op.results or op.operands[len(expected):]
    if masked and not gathered:
        check.fail("a mask without offsets", "both")
    if len(rows) & (len(rows) - 1) or len(rows) * dtype.size_bytes > MOST_RUN_BYTES:
        check.fail(f"a run of {len(rows)} {dtype}", f"a power of 2, {MOST_RUN_BYTES} bytes at most")
    found = op.operands[:len(expected)] if op.name == "store_run" else op.operands
    if [v.type for v in found] != expected or op.attributes.get("indexed"):
        check.fail(f"an address {_types(found)}, indexed = {op.attributes.get('indexed')}",
                   f"({', '.join(map(str, expected))}) without an index")
    if any(v.type != MEMORY_ROWS[dtype] for v in rows):
        check.fail(f"{_types(rows)} for {dtype} in memory", f"{MEMORY_ROWS[dtype]}")
    if "streaming" in op.attributes:
        check.attribute(op, "streaming", bool)


def _lane_store(gathered: bool) -> Rule:
    def rule(check: Checker, op: Op) -> None:
        dtype = check.one_of(op, "dtype", tuple(MEMORY_ROWS))
        if op.operands[0].type != MEMORY_ROWS[dtype]:
            check.fail(f"a value of type {op.operands[0].type} for {dtype} in memory", f"{MEMORY_ROWS[dtype]}")
        if "streaming" in op.attributes:
            check.attribute(op, "streaming", bool)
        if op.attributes.get("exact") and dtype is not bf16:
            check.fail(f"an exact store of {dtype}", "bf16")
        if "denormals" in op.attributes:
            check.one_of(op, "denormals", ("none", "rare"))
            if dtype is not bf16 or op.attributes.get("exact") or op.attributes.get("masked"):
                check.fail(f"`denormals` of a store of {dtype}", "a rounding store of whole rows as bf16")
        _memory(check, op, 1, gathered)

    return rule


def _lane_s_load(check: Checker, op: Op) -> None:
    check.one_of(op, "dtype", SCALAR_MEMORY)
    _memory(check, op, 0)
    check.results(op, S64)


def _lane_s_store(check: Checker, op: Op) -> None:
    check.one_of(op, "dtype", SCALAR_MEMORY)
    if op.operands[0].type != S64:
        check.fail(f"a value of type {op.operands[0].type}", "s64")
    _memory(check, op, 1)


def _lane_prefetch(check: Checker, op: Op) -> None:
    check.one_of(op, "level", (1, 2, 3), 1)
    _memory(check, op, 0)


def _lane_async_copy(check: Checker, op: Op) -> None:
    masked = [MASK] if op.attributes.get("masked") else []
    check.operands(op, S64, ROW_I32, S64, ROW_I32, *masked)
    check.results(op)


def _lane_async_wait(check: Checker, op: Op) -> None:
    pending = check.attribute(op, "pending", int)
    if pending < 0:
        check.fail(f"pending = {pending}", "a whole number from 0")
    check.results(op)


def _lane_asm_multiply(check: Checker, op: Op) -> None:
    check.attribute(op, "by", str)
    rows, columns = check.attribute(op, "rows", int), check.attribute(op, "columns", int)
    if rows < 1 or columns < 1:
        check.fail(f"rows = {rows}, columns = {columns}", "at least 1 of each")
    check.operands(op, *[ROW_B32] * (4 * rows + 2 * columns), *[ROW_F32] * (4 * rows * columns))
    check.results(op, *[ROW_F32] * (4 * rows * columns))


def _lane_matrix_multiply(check: Checker, op: Op) -> None:
    dtype = check.one_of(op, "dtype", (bf16, f16, i8, u8, f8e4m3))
    if dtype.is_integer or "right_dtype" in op.attributes:
        check.one_of(op, "right_dtype", (i8, u8) if dtype.is_integer else (dtype,))
    sums = ROW_I32 if dtype.is_integer else ROW_F32
    check.operands(op, *[ROW_B32] * 6, *[sums] * 4)
    check.results(op, *[sums] * 4)


def _lane_tile(*operands: Type, result: bool = False) -> Rule:
    """A tile, the operands and the result of an op on tiles; a tile among `operands` stands for one of any type."""
    def rule(check: Checker, op: Op) -> None:
        size = check.function.attributes.get("tile")
        if type(size) is not int or size < 1:
            check.fail(f"attribute tile = {size!r}", "the rows of a tile, and elements of a row")
        check.attribute(op, "disp", int, 0)
        found = [TILE_B32 if isinstance(v.type, TileRegisterType) else v.type for v in op.operands]
        if found != list(operands):
            check.fail(f"operands {_types(op.operands)}", f"({', '.join(map(str, operands))}), a tile of any type")
        if result and op.result.type not in (TILE_F32, TILE_I32, TILE_B32):
            check.fail(f"a result of type {op.result.type}", "a tile of f32, i32 or b32")

    return rule


def _lane_tile_multiply(check: Checker, op: Op) -> None:
    dtype = check.one_of(op, "dtype", (bf16, i8, u8))
    check.one_of(op, "right_dtype", (i8, u8) if dtype.is_integer else (bf16,))
    sums = TILE_I32 if dtype.is_integer else TILE_F32
    check.operands(op, sums, TILE_B32, TILE_B32)
    if op.operands[1] is op.operands[2]:
        check.fail("one tile as both operands", "two, as instructions want different registers")
    check.results(op, sums)


def _lane_signal(attribute: str = "", least: int = 0, waits: bool = False) -> Rule:
    def rule(check: Checker, op: Op) -> None:
        if attribute and check.attribute(op, attribute, int) < least:
            check.fail(f"{attribute} = {op.attributes[attribute]}", f"{least} or more")
        check.operands(op, *[S64] * (1 + waits))
        check.results(op)

    return rule


def _lane_tensor_copy(check: Checker, op: Op) -> None:
    maps = check.function.attributes.get("tensor_maps", [])
    number = check.attribute(op, "map", int)
    if not 0 <= number < len(maps):
        check.fail(f"map = {number}", f"one of the {len(maps)} maps of the function's attribute tensor_maps")
    check.operands(op, *[S64] * (2 + len(maps[number][2])))
    check.results(op)


def _lane_group_multiply(check: Checker, op: Op) -> None:
    dtype = check.one_of(op, "dtype", (bf16, f16, f8e4m3))
    for side in ("left", "right"):
        if not check.attribute(op, f"{side}_rows", bool):
            if dtype.bits == 8:
                check.fail(f"{side}_rows = False for {dtype}", "rows along the depth")
            check.attribute(op, f"{side}_panel_bytes", int)
    sums = len(op.operands) - 2
    if sums % 4 or not 4 <= sums <= 128:
        check.fail(f"{sums} rows of sums", "a multiple of 4, up to 128: 64 x N elements of which N is up to 256")
    check.operands(op, S64, S64, *[ROW_F32] * sums)
    check.results(op, *[ROW_F32] * sums)


def _lane_group_multiply_rows(check: Checker, op: Op) -> None:
    check.one_of(op, "dtype", (bf16, f16))
    if not check.attribute(op, "right_rows", bool):
        check.attribute(op, "right_panel_bytes", int)
    sums = len(op.operands) - 5
    if sums % 4 or not 4 <= sums <= 128:
        check.fail(f"{sums} rows of sums", "a multiple of 4, up to 128: 64 x N elements of which N is up to 256")
    check.operands(op, S64, *[ROW_B32] * 4, *[ROW_F32] * sums)
    check.results(op, *[ROW_F32] * sums)


def _lane_group_wait(check: Checker, op: Op) -> None:
    if check.attribute(op, "pending", int) < 0:
        check.fail(f"pending = {op.attributes['pending']}", "a whole number from 0")
    check.operands(op, *[ROW_F32] * len(op.operands))
    check.results(op, *[ROW_F32] * len(op.operands))


def _lane_register_budget(check: Checker, op: Op) -> None:
    registers = check.attribute(op, "registers", int)
    check.attribute(op, "more", bool)
    if not 24 <= registers <= 256 or registers % 8:
        check.fail(f"registers = {registers}", "a multiple of 8 from 24 to 256")


def _lane_loop(check: Checker, op: Op) -> None:
    step = check.attribute(op, "step", int)
    if step < 1:
        check.fail(f"step = {step}", "a positive step")
    if "label" in op.attributes:
        check.attribute(op, "label", str)
    carried = [v.type for v in op.operands[2:]]
    check.operands(op, S64, S64, *carried)
    for type in carried:
        if not isinstance(type, (ScalarType, RowType, MaskType, TileRegisterType)):
            check.fail(f"a carried value of type {type}", "s64, row, mask or tile")
    check.results(op, *carried)
    check.nested(op, op.blocks[0], [S64, *carried], carried)


def _lane_tasks(check: Checker, op: Op) -> None:
    _task_counter(check, op, "counter")
    if check.inside_tasks:
        check.fail("tasks inside tasks", "tasks that no other tasks contain")
    check.operands(op, S64)
    check.inside_tasks = True
    check.nested(op, op.blocks[0], [S64], [])
    check.inside_tasks = False


def _task_counter(check: Checker, op: Op, name: str) -> None:
    counter = check.attribute(op, name, int)
    if not 0 <= counter <= 7:
        check.fail(f"{name} = {counter}", "0 to 7")


def _lane_barrier(check: Checker, op: Op) -> None:
    if "reset" in op.attributes:
        _task_counter(check, op, "reset")
    if check.inside_tasks:
        check.fail("a barrier inside tasks, which not every worker would reach", "barriers outside tasks")


def _lane_asm(check: Checker, op: Op) -> None:
    check.attribute(op, "by", str)
    for value in (*op.operands, op.result):
        if not isinstance(value.type, RowType):
            check.fail(f"{value.type}", "rows")


def _lane_asm_contract(check: Checker, op: Op) -> None:
    check.attribute(op, "by", str)
    rows = check.attribute(op, "rows", int)
    rights = check.attribute(op, "rights", int)
    count = len(op.operands) - 3 - rights
    if rows < 1 or rights < 1 or count < 1 or count % (rows * rights):
        check.fail(f"{count} sums, rows = {rows}, rights = {rights}", "as many sums as rights times rows times vectors")
    row = ROW_I32 if op.operands[-1].type == ROW_I32 else ROW_F32
    check.operands(op, *[S64] * (3 + rights), *[row] * count)
    check.results(op, *[row] * count)


_SCALAR_BINARY = _signature((S64, S64), (S64,))
_MASK_BINARY = _signature((MASK, MASK), (MASK,))

LANE_RULES: dict[str, Rule] = {
    "arg": _lane_arg,
    "worker": _signature((), (S64,)),
    "workers": _signature((), (S64,)),
    "s_const": _lane_s_const,
    **dict.fromkeys([f"s_{name}" for name in ("add", "sub", "mul", "min", "max", "and", "or", "xor", "shl", "shr",
                                              "sar", "floordiv", "mod")], _SCALAR_BINARY),
    "s_cmp": _lane_s_cmp,
    "s_select": _signature((S64, S64, S64), (S64,)),
    "s_load": _lane_s_load,
    "s_store": _lane_s_store,
    "splat": _lane_splat,
    "splat_const": _lane_splat_const,
    "iota": _signature((), (ROW_I32,)),
    "lane0": _lane_lane0,
    "lookup": _lane_lookup,
    "pick": _lane_pick,
    **dict.fromkeys(("add", "sub", "mul", "min", "max", "neg", "abs"), _same_rows(NUMBER_ROWS)),
    **dict.fromkeys(("div", "fma", "sqrt", "floor", "ceil", "round", "trunc", "exp", "exp2", "log", "log2", "tanh",
                     "sigmoid", "erf", "sin", "cos", "rsqrt", "scale_exponent"), _same_rows(FLOAT_ROWS)),
    **dict.fromkeys(("and", "or", "xor", "not"), _same_rows(BIT_ROWS)),
    **dict.fromkeys(("shl", "shr", "sar"), _lane_shift),
    **dict.fromkeys(("idiv", "imod"), _same_rows(INTEGER_ROWS)),
    "cmp": _lane_cmp,
    "select": _lane_select,
    "asm": _lane_asm,
    "asm_contract": _lane_asm_contract,
    "mask_first": _signature((S64,), (MASK,)),
    **dict.fromkeys(("mask_and", "mask_or", "mask_xor"), _MASK_BINARY),
    "mask_not": _signature((MASK,), (MASK,)),
    "mask_any": _signature((MASK,), (S64,)),
    "mask_all": _signature((MASK,), (S64,)),
    "mask_to_row": _signature((MASK,), (ROW_I32,)),
    "cvt": _lane_cvt,
    "bitcast": _lane_bitcast,
    "round_to": _lane_round_to,
    "shuffle_xor": _lane_shuffle("distance", 1),
    "broadcast_lane": _lane_shuffle("lane", 0),
    "exchange": _lane_exchange, "zip": _lane_zip, "unzip": _lane_zip,
    "widen_float8": _lane_widen_float8,
    "load": _lane_load(False),
    "load_run": _lane_run, "store_run": _lane_run,
    "load_splat": _lane_load(False),
    "gather": _lane_load(True),
    "store": _lane_store(False),
    "store_lane0": _lane_store(False),
    "scatter": _lane_store(True),
    "prefetch": _lane_prefetch,
    "dot2_bf16": _signature((ROW_F32, ROW_B32, ROW_B32), (ROW_F32,)),
    "dot4_u8i8": _signature((ROW_I32, ROW_B32, ROW_B32), (ROW_I32,)),
    "fraction": _signature((ROW_F32,), (ROW_F32,)),
    "pack_bf16": _signature((ROW_F32, ROW_F32), (ROW_B32,)),
    "concat_bf16": _signature((ROW_F32, ROW_F32), (ROW_B32,)),
    "is_denormal": _signature((ROW_F32,), (MASK,)),
    "interleave": _signature((ROW_B32, ROW_B32), (ROW_B32, ROW_B32)),
    "warp": _signature((), (S64,)),
    "near_memory": _signature((), (S64,)),
    "sync_warps": _nothing,
    "async_copy": _lane_async_copy,
    "async_commit": _nothing,
    "async_wait": _lane_async_wait,
    "load_matrix": _signature((S64, ROW_I32), (ROW_B32,) * 4),
    "matrix_multiply": _lane_matrix_multiply,
    "asm_multiply": _lane_asm_multiply,
    "pack2": _signature((ROW_F32, ROW_F32), (ROW_B32,)),
    "tile_configure": _lane_tile(S64),
    "tile_release": _lane_tile(S64),
    "tile_zero": _lane_tile(result=True),
    "tile_load": _lane_tile(S64, S64, result=True),
    "tile_store": _lane_tile(TILE_B32, S64, S64),
    "tile_multiply": _lane_tile_multiply,
    "signal_start": _lane_signal("arrivals", 1),
    "signal_fence": _nothing,
    "signal_arrive": _lane_signal(),
    "signal_expect": _lane_signal("bytes", 1),
    "signal_wait": _lane_signal(waits=True),
    "tensor_copy": _lane_tensor_copy,
    "group_fence": _nothing,
    "group_multiply": _lane_group_multiply,
    "group_multiply_rows": _lane_group_multiply_rows,
    "group_commit": _nothing,
    "group_wait": _lane_group_wait,
    "register_budget": _lane_register_budget,
    "loop": _lane_loop,
    "if": _if(S64),
    "tasks": _lane_tasks,
    "barrier": _lane_barrier,
    "fence_streaming": _nothing,
    "sync_lanes": _nothing,
    "yield": _nothing,
}

_RULES = {"tile": TILE_RULES, "lane": LANE_RULES}


def verify(function: Function, table: OpTable) -> None:
    """Raise VerificationError, naming op, source location, found and expected, if the function breaks a rule."""
    if function.stage != table.stage or function.stage not in _RULES:
        raise VerificationError(function, None, f"stage {function.stage}", f"{table.stage}")
    rules = _RULES[function.stage]
    missing = [name for name in table.rows if name not in rules]
    if missing:
        raise VerificationError(function, None, f"ops {missing} in the table", "a rule for every op of the table")
    check = Checker(function, table, rules)
    if function.stage == "tile":
        for argument in function.arguments:
            kind = argument.type
            if not isinstance(kind, (TensorType, TileType)) or (isinstance(kind, TileType) and kind.axes):
                check.fail(f"argument %{argument.name} of type {kind}", "a tensor or a scalar")
        if "dims" in function.attributes:
            check.dims = set(function.attributes["dims"])
    else:
        if function.arguments:
            check.fail(f"{len(function.arguments)} arguments", "none: lane functions read the argument block by `arg`")
        lanes = function.attributes.get("lanes")
        if type(lanes) is not int or lanes < 1 or lanes & (lanes - 1):
            check.fail(f"attribute lanes = {lanes!r}", "a power of 2")
        check.lanes = lanes
        slots = function.attributes.get("slots", [])
        if not isinstance(slots, (list, tuple)) or not all(type(s) is str for s in slots):
            check.fail(f"attribute slots = {slots!r}", "a list of strings")
        check.slots = len(slots)
        scratch_bytes = function.attributes.get("scratch_bytes", 0)
        if type(scratch_bytes) is not int or scratch_bytes < 0:
            check.fail(f"attribute scratch_bytes = {scratch_bytes!r}", "a size in bytes")
    check.run()
