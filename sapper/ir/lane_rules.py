"""The rules of the lane IR: what each op asks of its operands and gives (the doc lines of sapper/lane/ops.py)."""

from __future__ import annotations

from .checker import Checker, Rule, branches, nothing, types_of
from .nodes import Op
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
    TileRegisterType,
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
    u8,
)

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

_MEMORY_DTYPES = tuple(MEMORY_ROWS)

SCALAR_MEMORY = (i8, u8, i16, i32, i64, bool_)


def _signature(operands: tuple[Type, ...], results: tuple[Type, ...]) -> Rule:
    taken, given = list(operands), list(results)

    def rule(check: Checker, op: Op) -> None:
        if [v.type for v in op.operands] != taken:
            check.operands(op, *operands)
        if [v.type for v in op.results] != given:
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
        types = [v.type for v in (*op.operands, *op.results)]
        if types.count(type) < len(types):
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


def _lane_any_zero(check: Checker, op: Op) -> None:
    check.operands(op, *[ROW_B32] * len(op.operands))
    check.results(op, S64)


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
    if op.attributes.get("nearest") and (source, result) != (ROW_F32, ROW_I32):
        check.fail(f"{source} to {result}, nearest", f"{ROW_F32} to {ROW_I32}")


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
    check.results(op, *[ROW_F32] * (2 if len(op.results) == 2 else 4))
    if op.attributes.get("scaled") and (len(op.results) != 2 or op.attributes["dtype"] is not f8e4m3):
        check.fail(f"scaled, {len(op.results)} rows of {op.attributes['dtype']}", "two of f8e4m3")


def _lane_widen_bytes(check: Checker, op: Op) -> None:
    check.one_of(op, "dtype", (i8, u8))
    check.attribute(op, "odd", bool)
    check.operands(op, ROW_B32)
    check.results(op, ROW_B32)


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


def _lane_interleave(check: Checker, op: Op) -> None:
    count = 4 if len(op.operands) > 2 else 2
    check.operands(op, *[ROW_B32] * count)
    check.results(op, *[ROW_B32] * count)


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
        check.fail(f"memory operands {types_of(found)}",
                   f"({', '.join(map(str, expected))}) by the attributes indexed and masked")


def _lane_load(gathered: bool) -> Rule:
    def rule(check: Checker, op: Op) -> None:
        dtype = check.one_of(op, "dtype", _MEMORY_DTYPES)
        _memory(check, op, 0, gathered)
        beside = op.attributes.get("beside")
        if beside is not None and (beside not in (1, -1) or op.attributes.get("masked")):
            check.fail(f"beside = {beside}, masked = {bool(op.attributes.get('masked'))}", "1 or -1, and no mask")
        bits = op.attributes.get("bits")
        if bits is not None and not (dtype is b32 and 0 <= check.attribute(op, "bits", int) < 1 << 32):
            check.fail(f"bits = {bits} of {dtype}", "32 bits, unsigned, of b32")
        if op.attributes.get("twice") and (dtype is not b32 or op.attributes.get("masked")):
            check.fail(f"twice, of {dtype}, masked = {bool(op.attributes.get('masked'))}", "b32, and no mask")
        check.results(op, MEMORY_ROWS[dtype])

    return rule


MOST_RUN_BYTES = 16


def _lane_run(check: Checker, op: Op) -> None:
    """load_run and store_run: a power of two of rows, of MOST_RUN_BYTES for a lane; the address has no index; bits are
    inverted in near memory alone."""
    dtype = check.one_of(op, "dtype", _MEMORY_DTYPES)
    gathered, masked = (bool(op.attributes.get(name)) and check.attribute(op, name, bool) for name in
                        ("gathered", "masked"))
    expected = [S64, *[ROW_I32] * gathered, *[MASK] * masked]
    rows = op.results or op.operands[1 + gathered:len(op.operands) - masked]
    if masked and not gathered:
        check.fail("a mask without offsets", "both")
    if "flip" in op.attributes and not (gathered and op.attributes.get("near")):
        check.fail("flip of an address that is not gathered in near memory", "both, or no flip")
    if len(rows) & (len(rows) - 1) or len(rows) * dtype.size_bytes > MOST_RUN_BYTES:
        check.fail(f"a run of {len(rows)} {dtype}", f"a power of 2, {MOST_RUN_BYTES} bytes at most")
    found = op.operands if op.results else [*op.operands[:1 + gathered], *op.operands[len(op.operands) - masked:]]
    if [v.type for v in found] != expected or op.attributes.get("indexed"):
        check.fail(f"an address {types_of(found)}, indexed = {op.attributes.get('indexed')}",
                   f"({', '.join(map(str, expected))}) without an index")
    if any(v.type != MEMORY_ROWS[dtype] for v in rows):
        check.fail(f"{types_of(rows)} for {dtype} in memory", f"{MEMORY_ROWS[dtype]}")
    for name in ("streaming", "handed"):
        if name in op.attributes:
            check.attribute(op, name, bool)


def _lane_unpack(check: Checker, op: Op) -> None:
    dtype = check.one_of(op, "dtype", _MEMORY_DTYPES)
    place = check.attribute(op, "place", int)
    if not 0 <= place < b32.bits // dtype.bits:
        check.fail(f"place = {place} of {dtype} in 32 bits", f"0 to {b32.bits // dtype.bits - 1}")
    check.operands(op, ROW_B32)
    check.results(op, MEMORY_ROWS[dtype])


def _lane_store(gathered: bool) -> Rule:
    def rule(check: Checker, op: Op) -> None:
        dtype = check.one_of(op, "dtype", _MEMORY_DTYPES)
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


def _lane_join(check: Checker, op: Op) -> None:
    check.one_of(op, "kind", ("add", "max", "min", "and", "or", "xor"))
    if op.attributes["kind"] != "add" and op.attributes["dtype"].is_float:
        check.fail(f"{op.attributes['kind']} of {op.attributes['dtype']}", "integers")
    _lane_store(True)(check, op)


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
    if "write" in op.attributes:
        check.attribute(op, "write", bool)
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
            check.fail(f"operands {types_of(op.operands)}", f"({', '.join(map(str, operands))}), a tile of any type")
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
        _cluster(check, op)
        check.operands(op, *[S64] * (1 + waits))
        check.results(op)

    return rule


def _cluster(check: Checker, op: Op) -> None:
    """What acts on several workers does so on those of a cluster."""
    if "workers" in op.attributes and check.attribute(op, "workers", int) != check.function.attributes.get("cluster"):
        check.fail(f"workers = {op.attributes['workers']}", "the function's attribute cluster")


def _lane_tensor_copy(check: Checker, op: Op) -> None:
    """Near address, the signal of a copy that lands there, coordinates."""
    maps = check.function.attributes.get("tensor_maps", [])
    number = check.attribute(op, "map", int)
    if not 0 <= number < len(maps):
        check.fail(f"map = {number}", f"one of the {len(maps)} maps of the function's attribute tensor_maps")
    _cluster(check, op)
    check.operands(op, *[S64] * (1 + (op.name == "tensor_copy") + len(maps[number][2])))
    check.results(op)


def _near_operands(check: Checker, op: Op, more: tuple[DType, ...] = ()) -> DType:
    """The type and the layouts of operands in near memory."""
    dtype: DType = check.one_of(op, "dtype", (bf16, f16, f8e4m3, *more))
    for side in ("left", "right"):
        if not check.attribute(op, f"{side}_rows", bool):
            if dtype.bits == 8:
                check.fail(f"{side}_rows = False for {dtype}", "rows along the depth")
            check.attribute(op, f"{side}_panel_bytes", int)
    return dtype


def _lane_group_multiply(check: Checker, op: Op) -> None:
    _near_operands(check, op)
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


def _lane_sums_columns(check: Checker, op: Op) -> None:
    columns = check.attribute(op, "columns", int)
    if columns not in (32, 64, 128, 256, 512):
        check.fail(f"columns = {columns}", "a power of two from 32 to 512")
    check.operands(op, S64)
    check.results(op)


def _lane_sums_multiply(check: Checker, op: Op) -> None:
    dtype = _near_operands(check, op, (i8, u8))
    if "right_dtype" in op.attributes:
        check.one_of(op, "right_dtype", (i8, u8) if dtype.is_integer else (dtype,))
    _sums_shape(check, op)
    check.operands(op, S64, S64, S64, S64)
    check.results(op)


def _sums_shape(check: Checker, op: Op) -> None:
    rows, columns = (check.attribute(op, name, int) for name in ("rows", "columns"))
    if rows != 128 or columns % 16 or not 16 <= columns <= 256:
        check.fail(f"{rows} x {columns} sums", "128 rows, and a multiple of 16 columns up to 256")


def _lane_sums_multiply_rows(check: Checker, op: Op) -> None:
    check.one_of(op, "dtype", (bf16, f16))
    if not check.attribute(op, "right_rows", bool):
        check.attribute(op, "right_panel_bytes", int)
    _sums_shape(check, op)
    check.operands(op, S64, S64, S64, S64)
    check.results(op)


def _lane_sums_store(check: Checker, op: Op) -> None:
    rows = len(op.operands) - 1
    if rows not in (4, 8, 16, 32, 64, 128):
        check.fail(f"{rows} rows", "4 for each 16 elements, of which there is a power of two up to 512")
    check.operands(op, S64, *[ROW_B32] * rows)
    check.results(op)


def _lane_sums_load(check: Checker, op: Op) -> None:
    check.operands(op, S64)
    if len(op.results) not in (4, 8, 16, 32, 64, 128):
        check.fail(f"{len(op.results)} results", "4 for each 8 columns, of which there is a power of two up to 256")
    check.results(op, *[ROW_I32 if op.results[0].type == ROW_I32 else ROW_F32] * len(op.results))


def _lane_store_wait(check: Checker, op: Op) -> None:
    if check.attribute(op, "pending", int) < 0:
        check.fail(f"pending = {op.attributes['pending']}", "a whole number from 0")


def _lane_group_wait(check: Checker, op: Op) -> None:
    _lane_store_wait(check, op)
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
    "join": _lane_join,
    "prefetch": _lane_prefetch,
    **dict.fromkeys(("dot2_bf16", "fma2_bf16", "two_by_two_bf16"), _signature((ROW_F32, ROW_B32, ROW_B32), (ROW_F32,))),
    **dict.fromkeys(("dot4_u8i8", "dot4_i8i8", "dot4_u8u8", "dot2_i16", "two_by_two_i8i8", "two_by_two_u8u8",
                     "two_by_two_u8i8"),
                    _signature((ROW_I32, ROW_B32, ROW_B32), (ROW_I32,))),
    **dict.fromkeys(("pairs_u8i8", "add_i16", "max_u8"), _signature((ROW_B32, ROW_B32), (ROW_B32,))),
    "widen_bytes": _lane_widen_bytes,
    **dict.fromkeys(("fraction", "reciprocal"), _signature((ROW_F32,), (ROW_F32,))),
    "copy_sign": _signature((ROW_F32, ROW_F32), (ROW_F32,)),
    "pack_bf16": _signature((ROW_F32, ROW_F32), (ROW_B32,)),
    "concat_bf16": _signature((ROW_F32, ROW_F32), (ROW_B32,)),
    "is_denormal": _signature((ROW_F32,), (MASK,)),
    "any_zero_bf16": _lane_any_zero,
    "interleave": _lane_interleave,
    "warp": _signature((), (S64,)),
    "near_memory": _signature((), (S64,)),
    "sync_warps": nothing,
    "sync_cluster": nothing,
    "async_copy": _lane_async_copy,
    "async_commit": nothing,
    "async_wait": _lane_async_wait,
    "load_matrix": _signature((S64, ROW_I32), (ROW_B32,) * 4),
    "matrix_multiply": _lane_matrix_multiply,
    "asm_multiply": _lane_asm_multiply,
    "pack2": _signature((ROW_F32, ROW_F32), (ROW_B32,)),
    **dict.fromkeys(("add2", "sub2", "mul2"), _signature((ROW_B32, ROW_B32), (ROW_B32,))),
    "unpack": _lane_unpack,
    "tile_configure": _lane_tile(S64),
    "tile_release": _lane_tile(S64),
    "tile_zero": _lane_tile(result=True),
    "tile_load": _lane_tile(S64, S64, result=True),
    "tile_store": _lane_tile(TILE_B32, S64, S64),
    "tile_wake": nothing,
    "tile_multiply": _lane_tile_multiply,
    "signal_start": _lane_signal("arrivals", 1),
    "signal_fence": nothing,
    "signal_arrive": _lane_signal(),
    "signal_expect": _lane_signal("bytes", 1),
    "signal_wait": _lane_signal(waits=True),
    "tensor_copy": _lane_tensor_copy,
    "store_matrix": _signature((S64, ROW_I32, *(ROW_B32,) * 4), ()),
    "store_fence": nothing,
    "tensor_store": _lane_tensor_copy,
    "store_wait": _lane_store_wait,
    "group_fence": nothing,
    "group_multiply": _lane_group_multiply,
    "group_multiply_rows": _lane_group_multiply_rows,
    "group_commit": nothing,
    "sums_open": _lane_sums_columns,
    "sums_close": _lane_sums_columns,
    "sums_multiply": _lane_sums_multiply,
    "sums_signal": _lane_signal(),
    "sums_multiply_rows": _lane_sums_multiply_rows,
    "sums_load": _lane_sums_load,
    "sums_store": _lane_sums_store,
    "sums_acquire": nothing,
    "sums_release": nothing,
    "group_wait": _lane_group_wait,
    "register_budget": _lane_register_budget,
    "loop": _lane_loop,
    "if": branches(S64),
    "tasks": _lane_tasks,
    "barrier": _lane_barrier,
    "hand_over": nothing,
    "take_over": _signature((S64,), ()),
    "fence_streaming": nothing,
    "sync_lanes": nothing,
    "yield": nothing,
}
