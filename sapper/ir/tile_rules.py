"""The rules of the tile IR: what each op asks of its operands and gives (the doc lines of sapper/tile/ops.py)."""

from __future__ import annotations

from .checker import BOOL, INDEX, Checker, Rule, branches, join_dtypes, nothing, union_of_axes
from .nodes import Op, Value
from .types import (
    NARROW_FLOATS,
    DType,
    TensorType,
    TileType,
    Type,
    b32,
    bool_,
    f32,
    f64,
    i8,
    i32,
    index,
    u8,
)


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
    if "join" in op.attributes:
        bits = check.one_of(op, "join", ("add", "max", "min", "and", "or", "xor")) in ("and", "or", "xor")
        _computes(check, value.dtype, "iu" if bits else "fiu", "integers" if bits else "numbers")
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
    repeats = check.names(op, "repeats") if "repeats" in op.attributes else []
    if not set(repeats) <= set(axes):
        check.fail(f"repeats = {repeats}", "axes of the loop")
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
    "if": branches(BOOL),
    "yield": nothing,
}
