"""Each lane op as PTX: a function of rows on the emulator gives what the lane interpreter gives, at 32 lanes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from sapper import emulate, targets
from sapper.codegen.compile import compile_lane
from sapper.codegen.select import SelectionError
from sapper.ir.nodes import Block, Builder, Function, Value
from sapper.ir.types import MASK, S64, RowType, b32, bf16, bool_, f16, f32, f64, i8, i16, i32, i64, u8
from sapper.ir.verifier import verify
from sapper.lane.interpret import run
from sapper.lane.math import EXPANDABLE
from sapper.lane.memory import Memory
from sapper.lane.ops import LANE_OPS
from sapper.targets.ptx.rows import form
from sapper.targets.ptx.select import RULES
from sapper.targets.ptx.text import LevelError, check_level

LANES = 32
TARGET = targets.target("sm_80")
NUMPY = {f32: np.float32, f64: np.float64, i32: np.int32, i64: np.int64, b32: np.int32}
INF, NAN = float("inf"), float("nan")
FLOATS = [0.0, -0.0, 1.0, -1.5, 2.5, 0.5, 3.4e38, -3.4e38, 1e-45, -1e-40, INF, -INF, NAN, 7.0, 1e10, -2.0**31,
          65504.0, 65520.0, 1.0078125, 1.01171875, -3.7, 123456.7, 1e-30, 0.1, -0.3, 100.0, 8388609.0, -8388607.5, 4.0,
          9.0, 2.0, 3.0]
INTEGERS = [0, 1, -1, 2, -2, 7, -7, 31, 32, 255, -128, 32767, -32768, 65536, 2**31 - 1, -(2**31), 5, 6, 9, 10, 100,
            -100, 12345, -54321, 3, 4, 8, 16, 64, 127, 128, 1000]


class Program:
    """A lane function over buffers. inputs: arrays of 32 elements; results are stored in the order of `out`."""

    def __init__(self) -> None:
        self.function = Function("program", "lane")
        self.builder = Builder(self.function.body)
        self.slots: list[str] = []
        self.buffers: list[np.ndarray] = []

    def add(self, name: str, operands: list[Value], type: Any = None, **attributes: Any) -> Any:
        types = [] if type is None else list(type) if isinstance(type, tuple) else [type]
        op = self.builder.add(name, operands, types, **attributes)
        return op if len(types) != 1 else op.result

    def buffer(self, array: np.ndarray) -> Value:
        self.slots.append(f"b{len(self.slots)}.data")
        self.buffers.append(array)
        return self.add("arg", [], S64, slot=2 + len(self.slots))

    def row(self, values: Any, dtype: Any) -> Value:
        with np.errstate(all="ignore"):
            array = np.resize(np.array(values, dtype=NUMPY[dtype]), LANES)
        return self.add("load", [self.buffer(array)], RowType(dtype), dtype=dtype)

    def out(self, value: Value) -> None:
        if value.type == MASK:
            value = self.add("mask_to_row", [value], RowType(i32))
        if value.type == S64:
            self.add("s_store", [value, self.buffer(np.zeros(1, np.int64))], dtype=i64)
            return
        dtype = value.type.dtype  # type: ignore[union-attr]
        self.add("store", [value, self.buffer(np.zeros(LANES, NUMPY[dtype]))], dtype=dtype)

    def check(self, workers: int = 1) -> None:
        self.function.attributes = {"lanes": LANES, "slots": self.slots}
        verify(self.function, LANE_OPS)
        wanted = [b.copy() for b in self.buffers]
        memory = Memory()
        words = [0, 0, memory.allocate("sync", 1024)] + [memory.add_array(f"b{n}", b) for n, b in enumerate(wanted)]
        run(self.function, np.array(words), memory, workers)
        text = compile_lane(self.function, TARGET).text
        found = [b.copy() for b in self.buffers]
        # One of the block's four warps does it, the others find no task: all of them may store the same.
        emulate.load(text.replace(".reqntid 128", f".reqntid {32 * workers}")).launch(
            block=(32 * workers,), arguments=[np.zeros(8), 0, np.zeros(1024, np.uint8), *found], cooperative=True)
        for number, (have, want) in enumerate(zip(found, wanted, strict=True)):
            np.testing.assert_array_equal(have, want, err_msg=f"buffer {number}\n{text}")


def rows(name: str, kinds: list[Any], result: Any, values: list[Any], **attributes: Any) -> None:
    program = Program()
    operands = [program.row(v, k) for v, k in zip(values, kinds, strict=True)]
    program.out(program.add(name, operands, result if result == MASK else RowType(result), **attributes))
    program.check()


ROLLED = [FLOATS, FLOATS[5:] + FLOATS[:5], FLOATS[11:] + FLOATS[:11]]
ROLLED_INTEGERS = [INTEGERS, INTEGERS[3:] + INTEGERS[:3]]
NOT_ZERO = [n or 3 for n in ROLLED_INTEGERS[1]]


@pytest.mark.parametrize("dtype", [f32, f64], ids=str)
@pytest.mark.parametrize(("name", "count"), [
    ("add", 2), ("sub", 2), ("mul", 2), ("div", 2), ("min", 2), ("max", 2), ("fma", 3), ("neg", 1), ("abs", 1),
    ("sqrt", 1), ("floor", 1), ("ceil", 1), ("round", 1), ("trunc", 1)])
def test_float_rows(name: str, count: int, dtype: Any) -> None:
    rows(name, [dtype] * count, dtype, ROLLED[:count])


@pytest.mark.parametrize("name", ["exp2", "reciprocal", "rsqrt"])
def test_approximate_rows(name: str) -> None:
    """The emulator's are the exact results, rounded, as the interpreter's."""
    rows(name, [f32], f32, [[0.0, 1.0, 0.3, 2.0, 7.5, 100.0, INF, NAN, 1e-30, 4.0]])


def test_what_is_rounded_by_a_store_is_not_rounded_before() -> None:
    """The rounding that stands before is left to the assembler, which drops it."""
    program = Program()
    rounded = program.add("round_to", [program.row(FLOATS, f32)], RowType(f32), dtype=bf16)
    program.slots.append("y.data")
    program.buffers.append(np.zeros(LANES, np.uint16))
    program.add("store", [rounded, program.add("arg", [], S64, slot=2 + len(program.slots))], dtype=bf16)
    program.function.attributes = {"lanes": LANES, "slots": program.slots}
    lines = compile_lane(program.function, TARGET).text.splitlines()
    loaded = next(line for line in lines if "ld.global.b32" in line).split("{")[-1].split()[1].rstrip(",")
    assert next(line for line in lines if "cvt.rn.bf16.f32" in line).endswith(f"{loaded};")


@pytest.mark.parametrize("name", ["min", "max"])
def test_extremes_of_a_number_and_what_may_be_none_are_one_instruction(name: str) -> None:
    program = Program()
    number = program.add("splat_const", [], RowType(f32), value=1.0)
    program.out(program.add(name, [number, program.row(FLOATS, f32)], RowType(f32)))
    program.check()
    text = compile_lane(program.function, TARGET).text
    assert f"{name}.NaN.f32" in text and "setp" not in text.split("ld.global")[1]


@pytest.mark.parametrize("dtype", [i32, i64], ids=str)
@pytest.mark.parametrize(("name", "count"), [
    ("add", 2), ("sub", 2), ("mul", 2), ("min", 2), ("max", 2), ("and", 2), ("or", 2), ("xor", 2), ("not", 1),
    ("neg", 1), ("abs", 1)])
def test_integer_rows(name: str, count: int, dtype: Any) -> None:
    rows(name, [dtype] * count, dtype, ROLLED_INTEGERS[:count])


@pytest.mark.parametrize("dtype", [i32, i64], ids=str)
@pytest.mark.parametrize("name", ["idiv", "imod"])
def test_divisions_round_down(name: str, dtype: Any) -> None:
    numerators = [n if n != -(2**31) else 11 for n in INTEGERS]
    rows(name, [dtype, dtype], dtype, [numerators, NOT_ZERO])


@pytest.mark.parametrize("dtype", [i32, i64], ids=str)
@pytest.mark.parametrize("name", ["shl", "shr", "sar"])
def test_shifts(name: str, dtype: Any) -> None:
    rows(name, [dtype], dtype, [INTEGERS], amount=5)
    rows(name, [dtype, dtype], dtype, [INTEGERS, list(range(32))])


@pytest.mark.parametrize("condition", ["eq", "ne", "lt", "le", "gt", "ge"])
@pytest.mark.parametrize("dtype", [f32, f64, i32, i64], ids=str)
def test_comparisons(condition: str, dtype: Any) -> None:
    values = ROLLED[:2] if dtype.is_float else ROLLED_INTEGERS
    rows("cmp", [dtype, dtype], MASK, values, cond=condition)


CONVERSIONS = [(f32, f64), (f64, f32), (i32, f32), (i32, f64), (i64, f32), (i64, f64), (i32, i64), (i64, i32)]


@pytest.mark.parametrize(("source", "result"), CONVERSIONS, ids=lambda d: d.name)
def test_conversions(source: Any, result: Any) -> None:
    rows("cvt", [source], result, [FLOATS if source.is_float else INTEGERS])


@pytest.mark.parametrize(("source", "result"), [(f32, i32), (f32, i64), (f64, i32), (f64, i64)], ids=lambda d: d.name)
def test_floats_to_integers_truncate(source: Any, result: Any) -> None:
    rows("cvt", [source], result, [[1.9, -1.9, 0.5, -0.5, 100.7, -3.2, 0.0, 12345.678]])


@pytest.mark.parametrize("narrow", [bf16, f16], ids=str)
def test_rounding_to_narrow_floats(narrow: Any) -> None:
    rows("round_to", [f32], f32, [[x for x in FLOATS if x == x]], dtype=narrow)


def test_bits_of_rows() -> None:
    rows("bitcast", [f32], i32, [FLOATS[:8]])
    program = Program()
    one = program.add("splat_const", [], RowType(f32), value=1.0)
    program.out(program.add("bitcast", [one], RowType(i32)))
    program.check()


@pytest.mark.parametrize("dtype", [f32, i64], ids=str)
def test_lanes_change_places(dtype: Any) -> None:
    values = list(range(32))
    for distance in (1, 2, 4, 8, 16):
        rows("shuffle_xor", [dtype], dtype, [values], distance=distance)
        program = Program()
        made = program.add("exchange", [program.row(values, dtype), program.row([v + 100 for v in values], dtype)],
                           (RowType(dtype),) * 2, distance=distance)
        for value in made.results:
            program.out(value)
        program.check()
    rows("broadcast_lane", [dtype], dtype, [values], lane=13)


def test_masks() -> None:
    program = Program()
    three, forty = (program.add("s_const", [], S64, value=n) for n in (3, 40))
    first = program.add("mask_first", [three], MASK)
    every = program.add("mask_first", [forty], MASK)
    row = program.row(INTEGERS, i32)
    positive = program.add("cmp", [row, program.add("splat_const", [], RowType(i32), value=0)], MASK, cond="gt")
    for name in ("and", "or", "xor"):
        program.out(program.add(f"mask_{name}", [first, positive], MASK))
    off = program.add("mask_not", [first], MASK)
    program.out(off)
    for mask in (first, every, positive, off):
        program.out(program.add("mask_any", [mask], S64))
        program.out(program.add("mask_all", [mask], S64))
    program.out(program.add("select", [positive, row, program.add("iota", [], RowType(i32))], RowType(i32)))
    program.check()


SCALARS = [(7, 2), (-7, 2), (7, -2), (-7, -2), (2**40 + 5, 3), (-(2**40), 7), (0, 5), (2**62, 2**33)]


@pytest.mark.parametrize("name", ["s_add", "s_sub", "s_mul", "s_min", "s_max", "s_and", "s_or", "s_xor", "s_floordiv",
                                  "s_mod"])
def test_scalars(name: str) -> None:
    program = Program()
    for pair in SCALARS:
        a, b = (program.add("s_load", [program.buffer(np.array([n], np.int64))], S64, dtype=i64) for n in pair)
        program.out(program.add(name, [a, b], S64))
        program.out(program.add(name, [a, program.add("s_const", [], S64, value=pair[1])], S64))
    program.check()


def test_scalar_shifts_and_choices() -> None:
    program = Program()
    for number, by in ((5, 3), (-5, 1), (-(2**62), 40)):
        a = program.add("s_load", [program.buffer(np.array([number], np.int64))], S64, dtype=i64)
        b = program.add("s_const", [], S64, value=by)
        for name in ("s_shl", "s_shr", "s_sar"):
            program.out(program.add(name, [a, b], S64))
        for condition in ("eq", "ne", "lt", "le", "gt", "ge"):
            truth = program.add("s_cmp", [a, b], S64, cond=condition)
            program.out(truth)
            program.out(program.add("s_select", [truth, b, a], S64))
    program.check()


@pytest.mark.parametrize("dtype", [f32, bf16, f16, i8, u8, i16, i32, bool_, f64, i64], ids=str)
def test_memory(dtype: Any) -> None:
    """load, masked load, load_splat, gather and their stores, of every type of element."""
    row = RowType(f64 if dtype is f64 else i64 if dtype is i64 else f32 if dtype.is_float else i32)
    random = np.random.default_rng(1)
    size_bytes = dtype.size_bytes
    raw = random.integers(0, 100, 64 * size_bytes).astype(np.uint8)
    if dtype is bool_:
        raw &= 1
    program = Program()
    source, target = program.buffer(raw), program.buffer(np.zeros(2048, np.uint8))
    mask = program.add("mask_first", [program.add("s_const", [], S64, value=11)], MASK)
    factor = program.add("splat_const", [], RowType(i32), value=size_bytes)
    reverse = program.add("sub", [program.add("splat_const", [], RowType(i32), value=40),
                                  program.add("iota", [], RowType(i32))], RowType(i32))
    offsets = program.add("mul", [reverse, factor], RowType(i32))
    loaded = [program.add("load", [source], row, dtype=dtype, disp=3 * size_bytes),
              program.add("load", [source, mask], row, dtype=dtype, masked=True),
              program.add("load_splat", [source], row, dtype=dtype, disp=size_bytes),
              program.add("gather", [source, offsets], row, dtype=dtype),
              program.add("gather", [source, offsets, mask], row, dtype=dtype, masked=True)]
    for number, value in enumerate(loaded):
        program.add("store", [value, target], dtype=dtype, disp=number * 32 * size_bytes)
    narrow = program.buffer(np.zeros(1024, np.uint8))
    program.add("store", [loaded[0], narrow, mask], dtype=dtype, masked=True)
    program.add("store_lane0", [loaded[3], narrow], dtype=dtype, disp=512)
    scattered = program.buffer(np.zeros(1024, np.uint8))
    program.add("scatter", [loaded[0], scattered, offsets], dtype=dtype)
    program.add("scatter", [loaded[3], scattered, offsets, mask], dtype=dtype, masked=True, disp=64)
    program.check()


@pytest.mark.parametrize(("dtype", "run"), [(dtype, 1 << bit) for dtype in (f32, i32, bf16, f16, i8, u8)
                                            for bit in range(1, 5) if dtype.size_bytes << bit <= 16], ids=str)
def test_runs(dtype: Any, run: int) -> None:
    """Back to front, so that places count."""
    program = Program()
    kind = {bf16: np.uint16, f16: np.float16, f32: np.float32, i32: np.int32, i8: np.int8, u8: np.uint8}[dtype]
    values = (np.random.default_rng(run).standard_normal(64 + LANES * run) * 60).astype(np.float32)
    if dtype is bf16:
        values = (values.view(np.uint32) >> 16).astype(np.uint32)
    row = RowType(f32 if dtype.is_float else i32)
    source = program.buffer(values.astype(kind))
    target = program.buffer(np.zeros(128 + LANES * run, kind))
    loaded = program.add("load_run", [source], (row,) * run, dtype=dtype, disp=16 * dtype.size_bytes).results
    program.add("store_run", [target, *reversed(loaded)], dtype=dtype, disp=32 * dtype.size_bytes, streaming=run > 4)
    program.check()


def test_displacements_below_zero() -> None:
    """PTX writes an address as register+number, whatever the number's sign."""
    program = Program()
    ahead = program.add("s_load", [program.buffer(np.array([64], np.int64))], S64, dtype=i64)
    later = program.add("s_add", [program.buffer(np.arange(40, dtype=np.float32)), ahead], S64)
    program.out(program.add("load", [later], RowType(f32), dtype=f32, disp=-32))
    program.check()
    assert "+-32]" in compile_lane(program.function, TARGET).text


def test_control() -> None:
    """Loops with carried values, branches with results, tasks and a barrier, by four warps."""
    program = Program()
    totals = program.buffer(np.zeros((20, LANES), np.float32))
    last = program.buffer(np.zeros(LANES, np.float32))
    twenty = program.add("s_const", [], S64, value=20)
    function, builder = program.function, program.builder

    def nested(types: list[Any], body: Callable[[list[Value]], list[Value]]) -> Any:
        block = Block(types)
        program.builder = Builder(block)
        program.add("yield", body(block.arguments))
        return block

    def task(arguments: list[Value]) -> list[Value]:
        (number,) = arguments
        start = program.add("splat_const", [], RowType(f32), value=1.0)
        here = program.builder
        body = nested([S64, RowType(f32)], lambda v: [program.add("add", [v[1], program.add(
            "cvt", [program.add("splat", [v[0]], RowType(i32))], RowType(f32))], RowType(f32))])
        program.builder = here
        zero = program.add("s_const", [], S64, value=0)
        sums = here.add("loop", [zero, number, start], [RowType(f32)], blocks=[body], step=3).result
        five = program.add("s_const", [], S64, value=5)
        low = program.add("s_cmp", [number, five], S64, cond="lt")
        then = nested([], lambda _: [program.add("neg", [sums], RowType(f32))])
        other = nested([], lambda _: [program.add("mul", [sums, sums], RowType(f32))])
        program.builder = here
        chosen = here.add("if", [low], [RowType(f32)], blocks=[then, other]).result
        row_bytes = program.add("s_const", [], S64, value=128)
        place = program.add("s_add", [totals, program.add("s_mul", [number, row_bytes], S64)], S64)
        program.add("store", [chosen, place], dtype=f32)
        return []

    tasks = nested([S64], task)
    program.builder = builder
    builder.add("tasks", [twenty], [], blocks=[tasks], counter=0)
    program.add("barrier", [])
    worker = program.add("worker", [], S64)
    zero = program.add("s_const", [], S64, value=0)
    first = program.add("s_cmp", [worker, zero], S64, cond="eq")

    def read(_: list[Value]) -> list[Value]:
        rows_ = [program.add("load", [totals], RowType(f32), dtype=f32, disp=128 * n) for n in range(20)]
        total = rows_[0]
        for row in rows_[1:]:
            total = program.add("add", [total, row], RowType(f32))
        program.add("store", [total, last], dtype=f32)
        return []

    then, other = nested([], read), nested([], lambda _: [])
    program.builder = builder
    builder.add("if", [first], [], blocks=[then, other])
    assert function.body is builder.block
    program.check(workers=4)


def test_every_op_has_a_rule_or_is_expanded_before() -> None:
    own = {"loop", "if", "tasks", "yield", "s_const", "splat_const"}       # the driver's
    missing = set(LANE_OPS.rows) - set(RULES) - own - EXPANDABLE
    # Only where a target has them.
    assert missing == {"add_i16", "any_zero_bf16", "asm_contract", "concat_bf16", "copy_sign", "dot2_bf16", "dot2_i16",
                       "dot4_i8i8", "dot4_u8u8", "fma2_bf16", "fraction", "interleave", "is_denormal", "lookup",
                       "max_u8", "pack_bf16", "pairs_u8i8",
                       "pick", "tile_configure", "tile_load", "tile_multiply", "tile_release", "tile_store",
                       "tile_wake", "tile_zero", "two_by_two_bf16", "two_by_two_i8i8", "two_by_two_u8i8",
                       "two_by_two_u8u8", "unzip", "widen_bytes", "widen_float8", "zip"}
    program = Program()
    zero = program.row([0], f32)
    packed = program.row([0], b32)
    program.out(program.add("dot2_bf16", [zero, packed, packed], RowType(f32)))
    program.function.attributes = {"lanes": LANES, "slots": program.slots}
    with pytest.raises(SelectionError, match="found no rule of the family ptx; expected"):
        compile_lane(program.function, TARGET)


def test_packed_dot_products() -> None:
    rows("dot4_u8i8", [i32, b32, b32], i32, [INTEGERS, INTEGERS, ROLLED_INTEGERS[1]])


def test_a_function_for_other_lanes_is_refused() -> None:
    function = Function("narrow", "lane")
    function.attributes = {"lanes": 16, "slots": []}
    with pytest.raises(ValueError, match="found 16; expected 32"):
        compile_lane(function, TARGET)


def test_what_a_level_lacks_is_refused_at_the_line() -> None:
    program = Program()
    program.out(program.row(FLOATS, f32))
    program.function.attributes = {"lanes": LANES, "slots": program.slots}
    machine = compile_lane(program.function, TARGET).machine
    machine.body[0].row = form("griddepcontrol.wait")
    machine.body[0].operands = []
    with pytest.raises(LevelError, match=r"griddepcontrol.wait needs sm_90 or later; found sm_80"):
        check_level(machine, "sm_80")
    check_level(machine, "sm_90a")
