"""Every lane op, compiled and run on this processor, against the lane interpreter on the same memory."""

from __future__ import annotations

import ctypes
import itertools
import mmap
import threading
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sapper.codegen.compile import CompiledCode, compile_lane
from sapper.ir.nodes import Block, Builder, Function, Op, Value
from sapper.ir.types import (
    MASK,
    ROW_B32,
    ROW_F32,
    ROW_F64,
    ROW_I32,
    ROW_I64,
    S64,
    DType,
    RowType,
    b32,
    bf16,
    bool_,
    f16,
    f32,
    f64,
    i8,
    i16,
    i32,
    i64,
    u8,
)
from sapper.lane.interpret import bind_arguments, run
from sapper.targets.x86_64.detect import host
from sapper.targets.x86_64.select import legal_ops
from sapper.targets.x86_64.target import TARGETS, Target
from tests.strategies import examples

HOST = host().features
MACHINES = [TARGETS[name] for name in ("v3", "alderlake", "v4", "zen4") if TARGETS[name].features <= HOST]
BOTH = [t for t in MACHINES if t.name in ("v3", "v4")]
LANES = [(t, lanes) for t in BOTH for lanes in (4, 8, 16) if lanes <= t.lanes]
NUMPY: dict[str, Any] = {"f32": np.float32, "f64": np.float64, "i32": np.int32, "i64": np.int64, "b32": np.uint32,
                         "bf16": ml_dtypes.bfloat16, "f16": np.float16, "i8": np.int8, "u8": np.uint8,
                         "i16": np.int16, "bool": np.uint8}
ROWS = {"f32": ROW_F32, "f64": ROW_F64, "i32": ROW_I32, "i64": ROW_I64, "b32": ROW_B32}
LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def loaded(code: CompiledCode) -> Callable[[int, int, int], None]:
    """The code as a function of Python, in memory that is written first and executable after."""
    size = -(-len(code.bytes) // 4096) * 4096
    memory = mmap.mmap(-1, size)
    memory.write(code.bytes)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert LIBC.mprotect(address, size, mmap.PROT_READ | mmap.PROT_EXEC) == 0
    function = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)(address)
    function.memory = memory  # type: ignore[attr-defined]
    return function


class Program:
    """A lane function under construction: `pointer(name)` and `scalar(name)` are its arguments."""

    def __init__(self, lanes: int, arrays: dict[str, np.ndarray], scalars: dict[str, Any] | None = None) -> None:
        self.arrays = arrays
        self.scalars = scalars or {}
        self.function = Function("test", "lane")
        slots = [f"{name}.data" for name in arrays] + [f"scalar.{name}" for name in self.scalars]
        self.function.attributes = {"lanes": lanes, "slots": slots, "scratch_bytes": 0}
        self.builder = Builder(self.function.body)
        self.values = {slot.removesuffix(".data").removeprefix("scalar."):
                       self.builder.value("arg", [], S64, slot=3 + place) for place, slot in enumerate(slots)}

    def constant(self, number: int, builder: Builder | None = None) -> Value:
        return (builder or self.builder).value("s_const", [], S64, value=number)

    def check(self, target: Target, workers: int = 1, ulp: int = 0) -> CompiledCode:
        """Run under the interpreter and natively, on the same memory, and compare every byte of it (NaN is NaN)."""
        words, memory = bind_arguments(self.function, self.arrays, self.scalars, workers=workers)
        before = {name: array.copy() for name, array in self.arrays.items()}
        run(self.function, words, memory, workers)
        expected = {name: array.copy() for name, array in self.arrays.items()}
        for name, array in self.arrays.items():
            array[...] = before[name]
        ctypes.memset(int(words[2]), 0, 512)
        code = compile_lane(self.function, target, checked=True)
        native = loaded(code)
        block = words.ctypes.data
        if workers == 1:
            native(block, 0, 1)
        else:
            threads = [threading.Thread(target=native, args=(block, n, workers)) for n in range(workers)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(30)
                assert not thread.is_alive()
        for name, array in self.arrays.items():
            same = same_values(array, expected[name], ulp)
            assert same.all(), (
                f"{name} differs at {np.argwhere(~same)[:4].tolist()}: found {array[~same][:4]}, "
                f"expected {expected[name][~same][:4]}, before {before[name][~same][:4]}\n{code.text}")
        return code


def same_values(a: np.ndarray, b: np.ndarray, ulp: int = 0) -> np.ndarray:
    bits = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}[a.itemsize]
    same = a.view(bits) == b.view(bits)
    if a.dtype.kind not in "iu":
        same |= np.isnan(a) & np.isnan(b)
        if ulp:
            same |= np.abs(a.view(bits).astype(np.int64) - b.view(bits).astype(np.int64)) <= ulp
    return same


SPECIAL = {
    "f": [0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, 0.5, -0.5, 1.5, 2.5, -2.5, 1e-40, -1e-40, 3.4e38, -3.4e38,
          1e-45, 100.25, -7.75, 65504.0, 65520.0, 1e-7, 6e-8, 2.0**31, -2.0**31, 8388609.0, 127.0, -126.0, -149.5],
    "i": [0, 1, -1, 2, -2, 7, -7, 255, 256, -128, 128, 32767, -32768, 65535, 65536, 2**31 - 1, -2**31, 2**30],
}


def sample(name: str, count: int, seed: int) -> np.ndarray:
    """Elements of every size: special values first (shuffled), then random bits and small numbers."""
    rng = np.random.default_rng(seed)
    dtype = np.dtype(NUMPY[name])
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        pool = np.array([v for v in SPECIAL["i"] if limits.min <= v <= limits.max], dtype)
        wild = rng.integers(limits.min, limits.max, count, dtype, endpoint=True)
    else:
        with np.errstate(all="ignore"):
            pool = np.array(SPECIAL["f"]).astype(dtype)
        wild = rng.integers(0, 256, count * dtype.itemsize, np.uint8).view(dtype)
    with np.errstate(all="ignore"):
        tame = (rng.standard_normal(count) * 30).astype(dtype)
    kind = rng.integers(0, 3, count)
    return np.where(kind == 0, rng.choice(pool, count), np.where(kind == 1, wild, tame)).astype(dtype)


COUNT = 24


def rowwise(lanes: int, inputs: list[np.ndarray], output: np.ndarray,
            body: Callable[[Builder, list[Value]], Value], in_dtypes: list[DType], out_dtype: DType,
            **attributes: Any) -> Program:
    """out[row] = body(in0[row], ...), one row an iteration of a loop. attributes: more of the store."""
    arrays = {f"in{n}": a for n, a in enumerate(inputs)} | {"out": output}
    program = Program(lanes, arrays)
    loop = Op("loop", [program.constant(0), program.constant(len(output))], [], {"step": lanes}, [Block([S64])])
    program.builder.block.ops.append(loop)
    inner = Builder(loop.blocks[0])
    index = loop.blocks[0].arguments[0]
    values = [inner.value("load", [program.values[f"in{n}"], index], row_of(d), dtype=d, indexed=True,
                          scale=d.size_bytes)
              for n, d in enumerate(in_dtypes)]
    made = body(inner, values)
    inner.add("store", [made, program.values["out"], index], dtype=out_dtype, indexed=True, scale=out_dtype.size_bytes,
              **attributes)
    inner.add("yield", [])
    return program


def row_of(dtype: DType) -> RowType:
    if dtype.name in ROWS:
        return ROWS[dtype.name]
    return ROW_F32 if dtype.is_float else ROW_I32


def check_rows(target: Target, lanes: int, dtypes: list[DType], out: DType,
               body: Callable[[Builder, list[Value]], Value], seed: int = 0,
               prepare: Callable[[list[np.ndarray]], None] | None = None) -> CompiledCode:
    inputs = [sample(d.name, COUNT * lanes, seed + n) for n, d in enumerate(dtypes)]
    if prepare:
        prepare(inputs)
    output = np.zeros(COUNT * lanes, NUMPY[out.name])
    return rowwise(lanes, inputs, output, body, dtypes, out).check(target)


def fits(target: Target, lanes: int, *dtypes: DType) -> bool:
    return all(lanes * max(d.bits, 32) <= target.vector_bits for d in dtypes)


ALL = (f32, f64, i32, i64)
CASES = [(t, lanes, d) for t, lanes in LANES for d in ALL if fits(t, lanes, d)]
NAMES = [f"{t.name}-{lanes}-{d.name}" for t, lanes, d in CASES]


def cases_with(op: str, dtype: DType) -> Any:
    """Of an op on rows of that type, for the targets that have it."""
    return pytest.mark.parametrize(("target", "lanes"), [
        pytest.param(t, lanes, id=f"{t.name}-{lanes}") for t, lanes in LANES
        if op in legal_ops(t) and fits(t, lanes, dtype)])


@pytest.mark.parametrize(("target", "lanes", "dtype"), CASES, ids=NAMES)
def test_binary(target: Target, lanes: int, dtype: DType) -> None:
    names = ["add", "sub", "mul", "min", "max"] + (["div"] if dtype.is_float else ["and", "or", "xor"])
    for seed, name in enumerate(names):
        check_rows(target, lanes, [dtype, dtype], dtype, lambda b, v, name=name: b.value(name, v, v[0].type), seed)


@pytest.mark.parametrize(("target", "lanes", "dtype"), CASES, ids=NAMES)
def test_unary(target: Target, lanes: int, dtype: DType) -> None:
    names = ["neg", "abs"] + (["sqrt", "floor", "ceil", "round", "trunc"] if dtype.is_float else ["not"])
    for seed, name in enumerate(names):
        check_rows(target, lanes, [dtype], dtype, lambda b, v, name=name: b.value(name, v, v[0].type), seed)


@pytest.mark.parametrize(("target", "lanes", "dtype"), CASES, ids=NAMES)
def test_shifts(target: Target, lanes: int, dtype: DType) -> None:
    if dtype.is_float:
        pytest.skip("integer ops")

    def amounts(inputs: list[np.ndarray]) -> None:
        inputs[1] &= dtype.bits - 1

    for name in ("shl", "shr", "sar"):
        check_rows(target, lanes, [dtype, dtype], dtype, lambda b, v, name=name: b.value(name, v, v[0].type), 1,
                   amounts)
        for amount in (0, 1, 7, dtype.bits - 1):
            check_rows(target, lanes, [dtype], dtype,
                       lambda b, v, name=name, amount=amount: b.value(name, v, v[0].type, amount=amount), 2)


@pytest.mark.parametrize(("target", "lanes", "dtype"), CASES, ids=NAMES)
def test_division(target: Target, lanes: int, dtype: DType) -> None:
    if dtype.is_float:
        pytest.skip("integer ops")

    def nonzero(inputs: list[np.ndarray]) -> None:
        inputs[1][inputs[1] == 0] = 3
        inputs[1][::7] = -1
        inputs[0][::7] = np.iinfo(inputs[0].dtype).min

    for name in ("idiv", "imod"):
        check_rows(target, lanes, [dtype, dtype], dtype, lambda b, v, name=name: b.value(name, v, v[0].type), 3,
                   nonzero)
        for divisor in (1, 8, 24, -3):
            check_rows(target, lanes, [dtype], dtype, lambda b, v, name=name, divisor=divisor: b.value(
                name, [v[0], b.value("splat_const", [], v[0].type, value=divisor)], v[0].type), 4)


@pytest.mark.parametrize(("target", "lanes", "dtype"), CASES, ids=NAMES)
def test_fma_in_every_form(target: Target, lanes: int, dtype: DType) -> None:
    if not dtype.is_float:
        pytest.skip("float op")
    row = row_of(dtype)
    for seed, (order, signs, keep) in enumerate(itertools.product(
            itertools.permutations(range(3)), ((0, 0, 0), (1, 0, 0), (0, 0, 1), (1, 0, 1), (1, 1, 0)), (False, True))):
        def body(b: Builder, v: list[Value], order: Any = order, signs: Any = signs, keep: bool = keep) -> Value:
            x = [b.value("neg", [v[n]], row) if sign else v[n] for n, sign in zip(order, signs, strict=True)]
            made = b.value("fma", x, row)
            if keep:  # the operands live on
                for value in v:
                    made = b.value("max", [made, value], row)
            return made
        if seed % 7 == lanes % 7 or seed < 6:
            check_rows(target, lanes, [dtype] * 3, dtype, body, seed)


@pytest.mark.parametrize(("target", "lanes", "dtype"), [
    case for case in CASES if case[2].is_float and "scale_exponent" in legal_ops(case[0])])
def test_scale_exponent(target: Target, lanes: int, dtype: DType) -> None:
    def powers(inputs: list[np.ndarray]) -> None:
        rng = np.random.default_rng(5)
        inputs[1][:] = rng.uniform(-330, 330, len(inputs[1])) * (1 if dtype.bits == 32 else 7)
        inputs[1][::5] = rng.uniform(-20, 20, len(inputs[1][::5]))
        inputs[1][1::17] = np.inf
        inputs[1][2::17] = -np.inf
        inputs[1][3::17] = np.nan
        # A NaN times 2**infinity is infinity or 0 by VSCALEF's own rule: unspecified.
        inputs[0][np.isinf(inputs[1]) & np.isnan(inputs[0])] = 0

    for seed, operands in itertools.product(range(4), (2, 3)):      # the third: below which power it is 0
        check_rows(target, lanes, [dtype] * operands, dtype, lambda b, v: b.value("scale_exponent", v, v[0].type), seed,
                   powers)


@cases_with("fraction", f32)
def test_fraction(target: Target, lanes: int) -> None:
    for seed in range(3):
        check_rows(target, lanes, [f32], f32, lambda b, v: b.value("fraction", v, ROW_F32), seed)
        check_rows(target, lanes, [f32], f32, lambda b, v: b.value("fraction", v, ROW_F32, down=True), seed)


@cases_with("copy_sign", f32)
def test_copy_sign(target: Target, lanes: int) -> None:
    """Where each operand, both or none may be overwritten."""
    def signed(b: Builder, v: list[Value]) -> Value:
        return b.value("copy_sign", v, ROW_F32)

    check_rows(target, lanes, [f32, f32], f32, signed)
    check_rows(target, lanes, [f32, f32], f32, lambda b, v: b.value("add", [signed(b, v), v[0]], ROW_F32))
    check_rows(target, lanes, [f32, f32], f32, lambda b, v: b.value("add", [signed(b, v), v[1]], ROW_F32))
    check_rows(target, lanes, [f32], f32, lambda b, v: signed(b, [v[0], v[0]]))


@cases_with("lookup", i32)
def test_lookup(target: Target, lanes: int) -> None:
    tables = [[float(16 * t + i) for i in range(16)] for t in range(2)]

    def body(b: Builder, v: list[Value]) -> Value:
        first, second = (b.value("lookup", v, ROW_F32, table=table) for table in tables)
        squared = b.value("mul", [second, second], ROW_F32)
        return b.value("bitcast", [b.value("sub", [first, squared], ROW_F32)], ROW_I32)

    for seed in range(3):
        check_rows(target, lanes, [i32], i32, body, seed)


@pytest.mark.parametrize(("target", "lanes", "dtype"), CASES, ids=NAMES)
def test_comparisons_and_masks(target: Target, lanes: int, dtype: DType) -> None:
    row = row_of(dtype)

    def some_equal(inputs: list[np.ndarray]) -> None:
        inputs[1][::3] = inputs[0][::3]

    for cond in ("eq", "ne", "lt", "le", "gt", "ge"):
        check_rows(target, lanes, [dtype, dtype], dtype, lambda b, v, cond=cond: b.value(
            "select", [b.value("cmp", v, MASK, cond=cond), v[0], v[1]], row), 1, some_equal)
        check_rows(target, lanes, [dtype, dtype], i32, lambda b, v, cond=cond: b.value(
            "mask_to_row", [b.value("cmp", v, MASK, cond=cond)], ROW_I32), 2, some_equal)

    def zero(b: Builder) -> Value:
        return b.value("splat_const", [], row, value=0)

    for place in (0, 1):
        def select_zero(b: Builder, v: list[Value], place: int = place) -> Value:
            mask = b.value("cmp", [v[0], v[1]], MASK, cond="lt")
            return b.value("select", [mask, zero(b), v[1]] if place == 0 else [mask, v[1], zero(b)], row)
        check_rows(target, lanes, [dtype, dtype], dtype, select_zero, 3)
    for name in ("mask_and", "mask_or", "mask_xor"):
        def combined(b: Builder, v: list[Value], name: str = name) -> Value:
            first = b.value("cmp", [v[0], v[1]], MASK, cond="lt")
            second = b.value("cmp", [v[0], zero(b)], MASK, cond="gt")
            mask = b.value(name, [first, b.value("mask_not", [second], MASK)], MASK)
            return b.value("select", [mask, v[0], v[1]], row)
        check_rows(target, lanes, [dtype, dtype], dtype, combined, 4)
    for name in ("mask_any", "mask_all"):
        for cond in ("ne", "gt"):
            def tested(b: Builder, v: list[Value], name: str = name, cond: str = cond) -> Value:
                mask = b.value("cmp", [v[0], v[1]], MASK, cond=cond)
                if name == "mask_any":
                    mask = b.value("mask_not", [mask], MASK)
                return b.value("splat", [b.value(name, [mask], S64)], ROW_I32)
            def nearly(inputs: list[np.ndarray]) -> None:
                inputs[0][:] = np.arange(len(inputs[0])) % 5 + 1
                inputs[1][:] = 0
                inputs[1][: len(inputs[1]) // 2: 5] = inputs[0][: len(inputs[1]) // 2: 5]
            check_rows(target, lanes, [dtype, dtype], i32, tested, 5, nearly)


@pytest.mark.parametrize(("target", "lanes"), LANES)
def test_conversions(target: Target, lanes: int) -> None:
    for source, destination in itertools.product(ALL, ALL):
        if not fits(target, lanes, source, destination):
            continue

        def in_range(inputs: list[np.ndarray], source: DType = source, destination: DType = destination) -> None:
            if source.is_float and not destination.is_float:
                limit = 2.0 ** (destination.bits - 1) * 0.999
                inputs[0][:] = np.where(np.abs(inputs[0]) < limit, inputs[0], 12.75)

        check_rows(target, lanes, [source], destination,
                   lambda b, v, d=destination: b.value("cvt", v, row_of(d)), 1, in_range)
    check_rows(target, lanes, [f32], i32, lambda b, v: b.value("cvt", v, row_of(i32), nearest=True), 1,
               lambda inputs: in_range(inputs, f32, i32))
    for source, destination in ((f32, i32), (i32, f32), (f64, i64), (i64, f64), (f32, b32)):
        if fits(target, lanes, source, destination):
            check_rows(target, lanes, [source], destination,
                       lambda b, v, d=destination: b.value("bitcast", v, row_of(d)), 2)
            check_rows(target, lanes, [source], destination, lambda b, v, s=source, d=destination: b.value(
                "bitcast", [b.value("splat_const", [], row_of(s), value=3)], row_of(d)), 2)
    for dtype in (bf16, f16):
        for seed in range(5):
            check_rows(target, lanes, [f32], f32,
                       lambda b, v, dtype=dtype: b.value("round_to", v, ROW_F32, dtype=dtype), seed)


MEMORY = (f32, f64, i32, i64, b32, bf16, f16, i8, u8, i16, bool_)


@pytest.mark.parametrize(("target", "lanes"), LANES)
def test_memory_dtypes(target: Target, lanes: int) -> None:
    """Load widens, store narrows; both unmasked, and masked by mask_first at the very end of a buffer."""
    for dtype in MEMORY:
        if not fits(target, lanes, dtype):
            continue
        row = row_of(dtype)
        if dtype.name not in ("b32", "bool", "u8"):
            wide = {"f": f32, "i": i32, "u": i32}[dtype.kind] if dtype.name not in ROWS else dtype
            for seed in range(3):
                check_rows(target, lanes, [wide], dtype, lambda b, v: v[0], seed)
        check_rows(target, lanes, [dtype], dtype, lambda b, v: v[0], 6)
        source = sample(dtype.name, 3 * lanes, 7)
        for count in (-3, *range(min(lanes, 8)), lanes - 1, lanes, lanes + 5, 2**40):
            for constant in (False, True):
                on = max(0, min(lanes, count))
                # Exactly as long as what may be touched, with guard elements that must not change.
                program = Program(lanes, {"a": source[:on].copy(), "c": np.full(on + 1, 77).astype(NUMPY[dtype.name])},
                                  {"n": np.int64(count)})
                b = program.builder
                number = program.constant(count) if constant else program.values["n"]
                mask = b.value("mask_first", [number], MASK)
                x = b.value("load", [program.values["a"], mask], row, dtype=dtype, masked=True)
                b.add("store", [x, program.values["c"], mask], dtype=dtype, masked=True)
                program.check(target)
        # Lanes that are off read as 0.
        program = Program(lanes, {"a": source.copy(), "c": np.full(lanes, 77).astype(NUMPY[dtype.name])})
        b = program.builder
        mask = b.value("mask_first", [program.constant(lanes // 2)], MASK)
        x = b.value("load", [program.values["a"], mask], row, dtype=dtype, masked=True, disp=dtype.size_bytes)
        b.add("store", [x, program.values["c"]], dtype=dtype)
        program.check(target)


@pytest.mark.parametrize("count", [3, 8, None])
@pytest.mark.parametrize("dtype", [u8, bf16])
def test_narrow_elements_under_a_mask_are_moved_together(dtype: DType, count: int | None) -> None:
    """Without opmasks: by one instruction where all lanes are on; and of a known number of lanes none is asked for."""
    target = TARGETS["haswell"]
    program = Program(8, {"a": sample(dtype.name, 8, 1), "c": sample(dtype.name, 8, 2)}, {"n": np.int64(8)})
    b = program.builder
    mask = b.value("mask_first", [program.values["n"] if count is None else program.constant(count)], MASK)
    x = b.value("load", [program.values["a"], mask], row_of(dtype), dtype=dtype, masked=True)
    b.add("store", [x, program.values["c"], mask], dtype=dtype, masked=True)
    names = [item.row.mnemonic for item in compile_lane(program.function, target).machine.body if hasattr(item, "row")]
    whole = "vmovq" if dtype is u8 else "vmovups"
    pieces = [n for n in names if n.startswith(("vpinsr", "vpextr"))]
    if count is None:
        assert names.count("jne") == 2 and len(pieces) == 16
    else:
        assert not {"test", "je"} & set(names)
        assert len(pieces) == (0 if count == 8 else 4 if dtype is u8 else 2)
    assert count == 3 or names.count(whole) >= 2


@pytest.mark.parametrize(("target", "lanes"), LANES)
def test_splats_and_lane0(target: Target, lanes: int) -> None:
    for dtype in MEMORY:
        if not fits(target, lanes, dtype):
            continue
        row = row_of(dtype)
        wide = dtype if dtype.name in ROWS else f32 if dtype.is_float else i32
        for seed in range(4):
            source = sample(dtype.name, 8, seed)
            program = Program(lanes, {"a": source, "c": np.zeros(lanes, NUMPY[wide.name]),
                                      "d": np.zeros(4, NUMPY[dtype.name]), "s": np.zeros(2, np.int64)})
            b, v = program.builder, program.values
            x = b.value("load_splat", [v["a"]], row, dtype=dtype, disp=3 * dtype.size_bytes)
            b.add("store", [x, v["c"]], dtype=wide)
            b.add("store_lane0", [x, v["d"]], dtype=dtype, disp=dtype.size_bytes)
            if not dtype.is_float and dtype.name != "b32":
                s = b.value("lane0", [x], S64)
                b.add("s_store", [s, v["s"]], dtype=i64)
                twice = b.value("splat", [b.value("s_add", [s, s], S64)], row)
                b.add("store", [b.value("add", [x, twice], row), v["c"]], dtype=wide)
            program.check(target)
    for number, dtype in ((5, i32), (-1, i32), (2**40 + 7, i32), (-(2**40), i64), (0, i64)):
        if fits(target, lanes, dtype):
            program = Program(lanes, {"c": np.zeros(lanes, NUMPY[dtype.name])}, {"n": np.int64(number)})
            b, v = program.builder, program.values
            x = b.value("splat", [v["n"]], row_of(dtype))
            y = b.value("splat", [program.constant(number)], row_of(dtype))
            b.add("store", [b.value("sub", [b.value("add", [x, y], x.type), x], x.type), v["c"]], dtype=dtype)
            program.check(target)
    program = Program(lanes, {"c": np.zeros(lanes, np.int32)})
    program.builder.add("store", [program.builder.value("iota", [], ROW_I32), program.values["c"]], dtype=i32)
    program.check(target)


@pytest.mark.parametrize(("target", "lanes"), LANES)
def test_gather_and_scatter(target: Target, lanes: int) -> None:
    rng = np.random.default_rng(3)
    for dtype in MEMORY:
        if not fits(target, lanes, dtype):
            continue
        row = row_of(dtype)
        for masked in (False, True):
            table = sample(dtype.name, 50, 9)
            places = rng.permutation(40)[:lanes].astype(np.int32) - 5
            if masked:
                places[1::2] = 2**30  # off: must not be touched
            program = Program(lanes, {"a": table, "i": places, "c": np.zeros(50, NUMPY[dtype.name]),
                                      "m": (np.arange(lanes) % 2 == 0).astype(np.int32)})
            b, v = program.builder, program.values
            offsets = b.value("load", [v["i"]], ROW_I32, dtype=i32)
            extra = []
            if masked:
                on = b.value("load", [v["m"]], ROW_I32, dtype=i32)
                extra = [b.value("cmp", [on, b.value("splat_const", [], ROW_I32, value=0)], MASK, cond="ne")]
            options = {"dtype": dtype, "scale": dtype.size_bytes, "disp": 5 * dtype.size_bytes, "masked": masked}
            x = b.value("gather", [v["a"], offsets, *extra], row, **options)
            b.add("scatter", [x, v["c"], offsets, *extra], **options)
            program.check(target)


@pytest.mark.parametrize(("target", "lanes", "dtype"), CASES, ids=NAMES)
def test_between_lanes(target: Target, lanes: int, dtype: DType) -> None:
    row = row_of(dtype)
    for distance in range(lanes):
        check_rows(target, lanes, [dtype], dtype,
                   lambda b, v, distance=distance: b.value("shuffle_xor", v, row, distance=distance), distance)
        check_rows(target, lanes, [dtype], dtype,
                   lambda b, v, lane=distance: b.value("broadcast_lane", v, row, lane=lane), distance)
    distance = 1
    while distance < lanes:
        source = sample(dtype.name, 2 * lanes, distance)
        for second_first in (False, True):
            program = Program(lanes, {"a": source.copy(), "c": np.zeros(2 * lanes, source.dtype)})
            b, v = program.builder, program.values
            loop = Op("loop", [program.constant(0), program.constant(3)] + [
                b.value("load", [v["a"]], row, dtype=dtype, disp=n * lanes * dtype.size_bytes) for n in (0, 1)],
                [row, row], {"step": 1}, [Block([S64, row, row])])
            b.block.ops.append(loop)
            inner = Builder(loop.blocks[0])
            x, y = loop.blocks[0].arguments[1:]
            made = inner.add("exchange", [x, y], [row, row], distance=distance).results
            inner.add("yield", list(reversed(made)) if second_first else list(made))
            for n in (0, 1):
                b.add("store", [loop.results[n], v["c"]], dtype=dtype, disp=n * lanes * dtype.size_bytes)
            program.check(target)
        distance *= 2


@pytest.mark.parametrize(("target", "lanes", "dtype"), CASES, ids=NAMES)
@pytest.mark.parametrize("name", ["zip", "unzip"])
def test_pairs_of_elements(target: Target, lanes: int, dtype: DType, name: str) -> None:
    row = ROWS[dtype.name]
    inputs = [np.arange(start, start + COUNT * lanes).astype(NUMPY[dtype.name]) for start in (0, 1000)]
    for number in (0, 1):
        program = rowwise(lanes, inputs, np.zeros_like(inputs[0]),
                          lambda b, v, number=number: b.add(name, v, [row] * 2).results[number], [dtype] * 2, dtype)
        program.check(target)
    both = rowwise(lanes, inputs, np.zeros_like(inputs[0]), lambda b, v: b.value("sub", list(
        b.add(name, v, [row] * 2).results), row), [dtype] * 2, dtype)
    both.check(target)


@pytest.mark.parametrize(("target", "lanes"), LANES)
@pytest.mark.parametrize("dtype", [f32, i32], ids=lambda d: d.name)
def test_picked_elements(target: Target, lanes: int, dtype: DType) -> None:
    """The low bits of an index say which, as many as count the lanes."""
    row = np.arange(COUNT * lanes).astype(NUMPY[dtype.name])
    places = np.random.default_rng(2).integers(0, lanes, COUNT * lanes, np.int32)
    program = rowwise(lanes, [row, places], np.zeros_like(row),
                      lambda b, v: b.value("pick", v, ROWS[dtype.name]), [dtype, i32], dtype)
    program.check(target)


@pytest.mark.parametrize("target", BOTH, ids=lambda t: t.name)
def test_transposition_by_exchanges(target: Target) -> None:
    lanes = target.lanes
    source = sample("f32", lanes * lanes, 1).reshape(lanes, lanes)
    program = Program(lanes, {"a": source, "c": np.zeros((lanes, lanes), np.float32)})
    b, v = program.builder, program.values
    rows = [b.value("load", [v["a"]], ROW_F32, dtype=f32, disp=4 * lanes * n) for n in range(lanes)]
    distance = 1
    while distance < lanes:
        for n in range(lanes):
            if not n & distance:
                made = b.add("exchange", [rows[n], rows[n + distance]], [ROW_F32, ROW_F32], distance=distance)
                rows[n], rows[n + distance] = made.results
        distance *= 2
    for n, row in enumerate(rows):
        b.add("store", [row, v["c"]], dtype=f32, disp=4 * lanes * n)
    program.check(target)
    assert same_values(program.arrays["c"], source.T.copy()).all()


SCALARS = [0, 1, -1, 2, 3, 5, 7, 8, -8, 9, 64, 100, -100, 255, 2**31 - 1, -2**31, 2**31, 2**40 + 3, -2**45]


@pytest.mark.parametrize("target", BOTH, ids=lambda t: t.name)
def test_scalars(target: Target) -> None:
    """Every scalar op on registers, and on constants at either side."""
    names = ["s_add", "s_sub", "s_mul", "s_min", "s_max", "s_and", "s_or", "s_xor", "s_floordiv", "s_mod",
             *(f"s_cmp.{c}" for c in ("eq", "ne", "lt", "le", "gt", "ge")), "s_shl", "s_shr", "s_sar"]
    rng = np.random.default_rng(8)
    for x, y in [(3, 5), *zip(rng.choice(SCALARS, 9).tolist(), rng.choice(SCALARS, 9).tolist(), strict=True)]:
        y = y or 11
        program = Program(8, {"c": np.zeros(8 * len(names), np.int64)}, {"x": np.int64(x), "y": np.int64(y)})
        b, v = program.builder, program.values
        place = 0
        for name in names:
            shift = name in ("s_shl", "s_shr", "s_sar")
            base, _, cond = name.partition(".")
            more = {"cond": cond} if cond else {}
            second = b.value("s_and", [v["y"], program.constant(63)], S64) if shift else v["y"]
            right = y & 63 if shift else y
            for p, q in ((v["x"], second), (v["x"], program.constant(right)), (program.constant(x), second)):
                made = b.value(base, [p, q], S64, **more)
                b.add("s_store", [made, v["c"]], dtype=i64, disp=8 * place)
                place += 1
            if cond:
                for p, q in ((v["x"], v["y"]), (program.constant(x), v["y"])):
                    made = b.value("s_select", [b.value(base, [p, q], S64, **more), v["y"], v["x"]], S64)
                    b.add("s_store", [made, v["c"]], dtype=i64, disp=8 * place)
                    place += 1
        program.check(target)


@pytest.mark.parametrize("target", BOTH, ids=lambda t: t.name)
def test_scalar_memory(target: Target) -> None:
    for dtype in (i64, i32, i16, i8, u8, bool_):
        source = sample(dtype.name, 8, 1)
        program = Program(8, {"a": source, "c": np.zeros(8, np.int64), "d": np.zeros(12, source.dtype)},
                          {"i": np.int64(2)})
        b, v = program.builder, program.values
        for n in range(4):
            i = b.value("s_add", [v["i"], program.constant(n)], S64)
            x = b.value("s_load", [v["a"], i], S64, dtype=dtype, scale=dtype.size_bytes, indexed=True)
            b.add("s_store", [x, v["c"], i], dtype=i64, scale=8, indexed=True)
            b.add("s_store", [b.value("s_mul", [x, v["i"]], S64), v["d"], i], dtype=dtype, scale=dtype.size_bytes,
                  indexed=True)
        b.add("s_store", [program.constant(-3), v["d"]], dtype=dtype)
        b.add("s_store", [program.constant(2**31 + 5), v["d"]], dtype=dtype, disp=dtype.size_bytes)
        program.check(target)


@pytest.mark.parametrize("target", BOTH, ids=lambda t: t.name)
@pytest.mark.parametrize(("start", "stop", "step"),
                         [(0, 0, 1), (0, 7, 1), (3, 20, 4), (5, 2, 1), (0, 1, 8), (-3, 3, 2)])
def test_loops(target: Target, start: int, stop: int, step: int) -> None:
    """Bounds as constants and as arguments, counter read or not, carried scalars and rows, swapped values."""
    for constant, counted, after in itertools.product((False, True), (False, True), (False, True)):
        program = Program(8, {"a": sample("f32", 64, 2), "c": np.zeros(32, np.float32), "s": np.zeros(8, np.int64)},
                          {"start": np.int64(start), "stop": np.int64(stop)})
        b, v = program.builder, program.values
        low = program.constant(start) if constant else v["start"]
        high = program.constant(stop) if constant else v["stop"]
        zero = b.value("splat_const", [], ROW_F32, value=0.0)
        first = b.value("load", [v["a"]], ROW_F32, dtype=f32, disp=64)
        loop = Op("loop", [low, high, zero, zero, first, v["a"], program.constant(5)],
                  [ROW_F32, ROW_F32, ROW_F32, S64, S64], {"step": step},
                  [Block([S64, ROW_F32, ROW_F32, ROW_F32, S64, S64])])
        b.block.ops.append(loop)
        inner = Builder(loop.blocks[0])
        i, p, q, r, pointer, total = loop.blocks[0].arguments
        x = inner.value("load", [pointer], ROW_F32, dtype=f32, disp=12)
        moved = inner.value("s_add", [pointer, program.constant(4, inner)], S64)
        y = inner.value("load", [pointer], ROW_F32, dtype=f32, disp=32)
        summed = inner.value("fma", [x, y, p], ROW_F32)
        grown = inner.value("s_add", [total, i if counted else program.constant(3, inner)], S64)
        inner.add("yield", [summed, r, q, moved, grown])  # q and r change places
        for n, value in enumerate(loop.results[:3]):
            b.add("store", [value, v["c"]], dtype=f32, disp=32 * n)
        b.add("s_store", [loop.results[4], v["s"]], dtype=i64)
        distance = b.value("s_sub", [loop.results[3], v["a"]], S64)
        b.add("s_store", [distance, v["s"]], dtype=i64, disp=8)
        if after:
            b.add("s_store", [b.value("s_add", [low, high], S64), v["s"]], dtype=i64, disp=16)
            b.add("store", [first, v["c"]], dtype=f32, disp=96)
        program.check(target)


@pytest.mark.parametrize("target", BOTH, ids=lambda t: t.name)
def test_nested_loops_and_ifs(target: Target) -> None:
    for rows, columns in ((0, 3), (1, 1), (4, 5), (3, 0)):
        program = Program(8, {"a": sample("f32", 256, 4), "c": np.zeros(16, np.float32), "s": np.zeros(4, np.int64)},
                          {"m": np.int64(rows), "n": np.int64(columns)})
        b, v = program.builder, program.values
        zero = b.value("splat_const", [], ROW_F32, value=0.0)
        one = b.value("splat_const", [], ROW_F32, value=1.5)
        outer = Op("loop", [program.constant(0), v["m"], zero, one, program.constant(0)], [ROW_F32, ROW_F32, S64],
                   {"step": 1}, [Block([S64, ROW_F32, ROW_F32, S64])])
        b.block.ops.append(outer)
        o = Builder(outer.blocks[0])
        i, acc, peak, count = outer.blocks[0].arguments
        inner = Op("loop", [program.constant(0, o), v["n"], acc, count], [ROW_F32, S64], {"step": 1},
                   [Block([S64, ROW_F32, S64])])
        o.block.ops.append(inner)
        n = Builder(inner.blocks[0])
        j, t, c = inner.blocks[0].arguments
        place = n.value("s_add", [n.value("s_mul", [i, v["n"]], S64), j], S64)
        x = n.value("load", [v["a"], place], ROW_F32, dtype=f32, indexed=True, scale=4)
        odd = n.value("s_and", [place, program.constant(1, n)], S64)
        condition = n.value("s_cmp", [odd, program.constant(0, n)], S64, cond="ne")
        branch = Op("if", [condition], [ROW_F32, S64], None, [Block(), Block()])
        n.block.ops.append(branch)
        yes, no = Builder(branch.blocks[0]), Builder(branch.blocks[1])
        yes.add("yield", [yes.value("fma", [x, x, t], ROW_F32), yes.value("s_add", [c, j], S64)])
        no.add("yield", [t, c])
        n.add("yield", branch.results)
        higher = o.value("max", [inner.results[0], peak], ROW_F32)
        o.add("yield", [inner.results[0], higher, inner.results[1]])
        b.add("store", [outer.results[0], v["c"]], dtype=f32)
        b.add("store", [outer.results[1], v["c"]], dtype=f32, disp=32)
        b.add("s_store", [outer.results[2], v["s"]], dtype=i64)
        code = program.check(target)
        text = code.text
        assert "vmovaps" not in text.split("loop2:")[1].split("loop2_end:")[0]  # carried values never move


@pytest.mark.parametrize("target", BOTH, ids=lambda t: t.name)
@pytest.mark.parametrize("number", [0, 1])
def test_if_that_keeps_a_value_in_one_branch_and_uses_it_up_in_the_other(target: Target, number: int) -> None:
    program = Program(8, {"a": sample("f32", 24, 4), "c": np.zeros(8, np.float32)}, {"n": np.int64(number)})
    b, v = program.builder, program.values
    x, y = (b.value("load", [v["a"]], ROW_F32, dtype=f32, disp=32 * n) for n in range(2))
    b.add("store", [b.value("add", [x, y], ROW_F32), v["c"]], dtype=f32)
    branch = Op("if", [v["n"]], [ROW_F32], None, [Block(), Block()])
    b.block.ops.append(branch)
    yes, no = Builder(branch.blocks[0]), Builder(branch.blocks[1])
    yes.add("yield", [yes.value("fma", [x, y, x], ROW_F32)])
    no.add("yield", [y])
    b.add("store", [b.value("sub", [branch.results[0], x], ROW_F32), v["c"]], dtype=f32)
    program.check(target)


@pytest.mark.parametrize("target", MACHINES, ids=lambda t: t.name)
def test_dot_products(target: Target) -> None:
    legal = legal_ops(target)
    assert legal >= ({"dot2_bf16", "dot4_u8i8"} if target.name == "zen4" else set())
    assert {"dot2_i16", "pairs_u8i8", "add_i16", "widen_bytes"} <= legal
    for lanes in (4, 8, 16):
        if lanes > target.lanes:
            continue
        words = [sample("b32", COUNT * lanes, n) for n in (4, 5)]
        for name, attributes in (("pairs_u8i8", {}), ("add_i16", {}), *(
                ("widen_bytes", {"dtype": dtype, "odd": odd}) for dtype in (i8, u8) for odd in (False, True))):
            program = rowwise(lanes, words, np.zeros(COUNT * lanes, np.uint32),
                              lambda b, v, name=name, attributes=attributes: b.value(
                                  name, v[:1] if attributes else v, ROW_B32, **attributes), [b32, b32], b32)
            program.check(target)
        for name, acc in (("dot2_bf16", f32), ("dot4_u8i8", i32), ("dot2_i16", i32)):
            if name not in legal or lanes > target.lanes:
                continue
            bfloat = [sample("bf16", 2 * COUNT * lanes, n).astype(np.float32) for n in (1, 2)]
            packed = [np.clip(np.nan_to_num(x), -1e9, 1e9) for x in bfloat]
            packed = [np.where(np.abs(x) < 1e-9, 0, x).astype(ml_dtypes.bfloat16).view(np.uint32) for x in packed]
            start = np.nan_to_num(sample(acc.name, COUNT * lanes, 3), posinf=1, neginf=1)
            if acc is f32:
                start = np.clip(start, -1e9, 1e9)
                start[np.abs(start) < 1e-9] = 0
            output = np.zeros(COUNT * lanes, NUMPY[acc.name])
            program = rowwise(lanes, [start.astype(output.dtype), *packed], output,
                              lambda b, v, name=name: b.value(name, v, v[0].type), [acc, b32, b32], acc)
            program.check(target)
        if "pack2" in legal and lanes <= target.lanes:
            values = [sample("f32", COUNT * lanes, n) for n in (1, 2)]
            for value in values:
                value[np.isnan(value)] = np.nan     # what else a NaN holds the interpreter does not keep
            program = rowwise(lanes, values, np.zeros(COUNT * lanes, np.uint32),
                              lambda b, v: b.value("pack2", v, ROW_B32, dtype=bf16), [f32, f32], b32)
            code = program.check(target)
            # f32 from memory may be NaN with any bits.
            wanted = ("vpternlogd", "vcmpps") if target.mask_kind == "opmask" else ("vpblendw", "vblendvps")
            assert all(name in code.text for name in wanted)
        if "pack_bf16" in legal and lanes <= target.lanes:
            values = [sample("f32", COUNT * lanes, n) for n in (1, 2)]
            program = rowwise(lanes, values, np.zeros(COUNT * lanes, np.uint32),
                              lambda b, v: b.value("pack_bf16", v, ROW_B32), [f32, f32], b32)
            program.check(target)
            program = rowwise(lanes, values, np.zeros(COUNT * lanes, np.uint32),
                              lambda b, v: b.value("concat_bf16", v, ROW_B32), [f32, f32], b32)
            program.check(target)
            program = rowwise(lanes, values[:1], np.zeros(COUNT * lanes, np.int32), lambda b, v: b.value(
                "mask_to_row", [b.value("is_denormal", v, MASK)], ROW_I32), [f32], i32)
            program.check(target)
            halves = np.ones((2, 2 * COUNT * lanes), ml_dtypes.bfloat16)
            for number, value in enumerate((0.0, -0.0, 1e-40, -1.0, np.nan, 0.0)):    # two rows of memory further each
                halves[number % 2, 4 * lanes * number + number] = value
            words = [row.view(np.uint32) for row in halves]
            program = rowwise(lanes, words, np.zeros(COUNT * lanes, np.int32), lambda b, v: b.value(
                "splat", [b.value("any_zero_bf16", v, S64)], ROW_I32), [b32, b32], i32)
            program.check(target)

            def chosen(b: Builder, v: list[Value]) -> Value:
                both = [b.value("s_const", [], S64, value=number) for number in (3, 5)]
                return b.value("splat", [b.value("s_select", [b.value("any_zero_bf16", v, S64), *both], S64)], ROW_I32)

            rowwise(lanes, words, np.zeros(COUNT * lanes, np.int32), chosen, [b32, b32], i32).check(target)
            for denormals in ("none", "rare"):
                program = rowwise(lanes, values[:1], np.zeros(COUNT * lanes, ml_dtypes.bfloat16), lambda b, v: v[0],
                                  [f32], bf16, denormals=denormals)
                code = program.check(target)
                assert ("vcvtneps2bf16" in code.text) == (denormals == "none")
    for name, acc, feature in (("dot2_bf16", f32, "avx512_bf16"), ("dot4_u8i8", i32, "avx_vnni")):
        if target.name == "v3":
            program = rowwise(8, [np.zeros(8, NUMPY[acc.name]), np.zeros(8, np.uint32)], np.zeros(8, NUMPY[acc.name]),
                              lambda b, v, name=name: b.value(name, [v[0], v[1], v[1]], v[0].type), [acc, b32], acc)
            with pytest.raises(ValueError, match=rf"{feature}.*legal_ops"):
                program.check(target)


@pytest.mark.parametrize("target", MACHINES, ids=lambda t: t.name)
@pytest.mark.parametrize("count", [2, 4])
def test_elements_are_interleaved(target: Target, count: int) -> None:
    for lanes in (4, 8, 16):
        if lanes > target.lanes:
            continue
        rows = [sample("b32", COUNT * lanes, n) for n in range(count)]
        for number in range(count):
            rowwise(lanes, rows, np.zeros(COUNT * lanes, np.uint32), lambda b, v, number=number: b.add(
                "interleave", v, [ROW_B32] * count).results[number], [b32] * count, b32).check(target)


@pytest.mark.parametrize("target", BOTH, ids=lambda t: t.name)
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_tasks_and_barriers(target: Target, workers: int) -> None:
    """Tasks are shared out once each, also by a counter that a barrier has set back; after a barrier every worker sees
    what the others stored."""
    count = 40
    program = Program(8, {"a": np.zeros(count, np.int64), "c": np.zeros((workers, count), np.int64)})
    b, v = program.builder, program.values
    total = program.constant(count)
    for phase in range(5):
        share = Op("tasks", [total], [], {"counter": phase % 3}, [Block([S64])])
        b.block.ops.append(share)
        inner = Builder(share.blocks[0])
        i = share.blocks[0].arguments[0]
        old = inner.value("s_load", [v["a"], i], S64, dtype=i64, indexed=True, scale=8)
        inner.add("s_store", [inner.value("s_add", [inner.value("s_add", [old, old], S64), i], S64), v["a"], i],
                  dtype=i64, indexed=True, scale=8)
        inner.add("yield", [])
        b.add("barrier", [], **({"reset": (phase + 1) % 3} if phase >= 2 else {}))
    worker = b.value("worker", [], S64)
    mine = b.value("s_add", [v["c"], b.value("s_mul", [worker, program.constant(8 * count)], S64)], S64)
    loop = Op("loop", [program.constant(0), total], [], {"step": 1}, [Block([S64])])
    b.block.ops.append(loop)
    inner = Builder(loop.blocks[0])
    i = loop.blocks[0].arguments[0]
    x = inner.value("s_load", [v["a"], i], S64, dtype=i64, indexed=True, scale=8)
    inner.add("s_store", [x, mine, i], dtype=i64, indexed=True, scale=8)
    inner.add("yield", [])
    b.add("s_store", [b.value("workers", [], S64), mine], dtype=i64)
    program.check(target, workers)


@pytest.mark.parametrize("target", BOTH, ids=lambda t: t.name)
def test_streaming_stores_and_prefetch(target: Target) -> None:
    lanes = target.lanes
    for dtype in (f32, i32, f64, bf16, f16, i8, i16):
        if not fits(target, lanes, dtype):
            continue
        store = np.zeros(64 + 4 * lanes * dtype.size_bytes, np.uint8)
        skip = -store.ctypes.data % 64
        output = store[skip:skip + 2 * lanes * dtype.size_bytes].view(NUMPY[dtype.name])
        wide = dtype if dtype.name in ROWS else f32 if dtype.is_float else i32
        program = Program(lanes, {"a": sample(wide.name, lanes, 2), "c": output})
        b, v = program.builder, program.values
        b.add("prefetch", [v["a"]], level=2, disp=64)
        x = b.value("load", [v["a"]], row_of(wide), dtype=wide)
        b.add("store", [x, v["c"]], dtype=dtype, streaming=True)
        b.add("fence_streaming", [])
        code = program.check(target)
        if lanes * dtype.bits >= 128:
            assert "vmovnt" in code.text
        assert "sfence" in code.text and "prefetcht1" in code.text


@pytest.mark.parametrize(("features", "name"), [({"prfchw"}, "prefetchw"), (set(), "prefetcht0")])
def test_a_line_is_asked_for_to_be_written(features: set[str], name: str) -> None:
    target = BOTH[0]._replace(features=BOTH[0].features - {"prfchw"} | features)
    program = Program(target.lanes, {"a": sample("f32", target.lanes, 2)})
    program.builder.add("prefetch", [program.values["a"]], level=1, write=True, disp=64)
    assert name in program.check(target).text


@settings(max_examples=examples(60))
@given(st.data())
def test_random_programs(data: st.DataObject) -> None:
    """Random straight-line and looped programs over f32 and i32 rows, masks and scalars."""
    target = data.draw(st.sampled_from(BOTH))
    lanes = data.draw(st.sampled_from([n for n in (4, 8, 16) if n <= target.lanes]))
    seed = data.draw(st.integers(0, 2**32 - 1))
    length = data.draw(st.integers(5, 60))
    rng = np.random.default_rng(seed)
    program = Program(lanes, {"a": sample("f32", 40 * lanes, seed % 1000), "b": sample("i32", 40 * lanes, seed % 999),
                              "c": np.zeros(40 * lanes, np.float32), "d": np.zeros(40 * lanes, np.int32)},
                      {"n": np.int64(rng.integers(0, 5))})
    build_random(program, program.builder, rng, length, lanes, 0, {
        "f": [], "i": [], "m": [], "s": [program.values["n"]]}, [0])
    program.check(target)


def build_random(program: Program, b: Builder, rng: np.random.Generator, length: int, lanes: int, depth: int,
                 pools: dict[str, list[Value]], stored: list[int]) -> None:
    f, i, m, s = pools["f"], pools["i"], pools["m"], pools["s"]
    types = {"f": ROW_F32, "i": ROW_I32, "m": MASK, "s": S64}

    def pick(pool: str) -> Value:
        values = pools[pool]
        if not values or rng.random() < 0.1:
            if pool == "f":
                values.append(b.value("splat_const", [], ROW_F32, value=float(rng.choice([0.0, 1.0, -2.5, 0.3]))))
            elif pool == "i":
                values.append(b.value("splat_const", [], ROW_I32, value=int(rng.choice([0, -1, 3, 65536]))))
            elif pool == "m":
                values.append(b.value("mask_first", [pick("s")], MASK))
            else:
                values.append(b.value("s_const", [], S64, value=int(rng.integers(-4, 9))))
            return values[-1]
        return values[-1 - min(int(rng.exponential(3)), len(values) - 1)]

    for _ in range(length):
        choice = int(rng.integers(0, 16))
        at = int(rng.integers(0, 30)) * lanes * 4
        if choice == 0:
            f.append(b.value("load", [program.values["a"]], ROW_F32, dtype=f32, disp=at))
        elif choice == 1:
            i.append(b.value("load", [program.values["b"]], ROW_I32, dtype=i32, disp=at))
        elif choice == 2:
            f.append(b.value("load_splat", [program.values["a"]], ROW_F32, dtype=f32, disp=at))
        elif choice == 3:
            f.append(b.value(str(rng.choice(["add", "sub", "mul", "min", "max"])), [pick("f"), pick("f")], ROW_F32))
        elif choice == 4:
            i.append(b.value(str(rng.choice(["add", "sub", "mul", "min", "max", "and", "xor"])), [pick("i"), pick("i")],
                             ROW_I32))
        elif choice in (5, 6):
            f.append(b.value("fma", [pick("f"), pick("f"), pick("f")], ROW_F32))
        elif choice == 7:
            f.append(b.value("neg", [pick("f")], ROW_F32))
        elif choice == 8:
            m.append(b.value("cmp", [pick("f"), pick("f")], MASK, cond=str(rng.choice(["eq", "lt", "ge"]))))
        elif choice == 9:
            f.append(b.value("select", [pick("m"), pick("f"), pick("f")], ROW_F32))
        elif choice == 10:
            # The maximum is no NaN: which NaN an operation gives is nobody's promise.
            least = b.value("splat_const", [], ROW_F32, value=-3.0)
            i.append(b.value("bitcast", [b.value("max", [pick("f"), least], ROW_F32)], ROW_I32))
        elif choice == 11:
            name = str(rng.choice(["s_add", "s_sub", "s_min", "s_max", "s_xor"]))
            s.append(b.value(name, [pick("s"), pick("s")], S64))
        elif choice == 12:
            stored[0] = (stored[0] + 1) % 30
            b.add("store", [pick("f"), program.values["c"]], dtype=f32, disp=stored[0] * lanes * 4)
        elif choice == 13:
            s.append(b.value("s_select", [b.value("s_cmp", [pick("s"), pick("s")], S64, cond="lt"), pick("s"),
                                          pick("s")], S64))
        elif depth < 3:
            kinds = [str(k) for k in rng.choice(["f", "i", "s", "m"], int(rng.integers(0, 6)))]
            values = [pick(k) for k in kinds]
            inside: dict[str, list[Value]] = {k: list(v) for k, v in pools.items()}
            if choice == 14:
                stop = b.value("s_and", [pick("s"), b.value("s_const", [], S64, value=3)], S64)
                op = Op("loop", [b.value("s_const", [], S64, value=0), stop, *values], [types[k] for k in kinds],
                        {"step": 1}, [Block([S64, *(types[k] for k in kinds)])])
                inside["s"].append(op.blocks[0].arguments[0])
                for k, argument in zip(kinds, op.blocks[0].arguments[1:], strict=True):
                    inside[k].append(argument)
            else:
                condition = b.value("s_cmp", [pick("s"), pick("s")], S64, cond=str(rng.choice(["lt", "eq"])))
                op = Op("if", [condition], [types[k] for k in kinds], None, [Block(), Block()])
            b.block.ops.append(op)
            for block in op.blocks:
                nested = Builder(block)
                own = {k: list(v) for k, v in inside.items()}
                build_random(program, nested, rng, int(rng.integers(0, 12)), lanes, depth + 1, own, stored)
                ends = []
                for k in kinds:
                    choices = own[k]
                    if choices:
                        ends.append(choices[-1 - min(int(rng.exponential(1.5)), len(choices) - 1)])
                    else:
                        ends.append(values[kinds.index(k)])
                nested.add("yield", ends)
            for k, result in zip(kinds, op.results, strict=True):
                pools[k].append(result)
    if depth == 0:
        for n, value in enumerate(f[-6:]):
            b.add("store", [value, program.values["c"]], dtype=f32, disp=(30 + n) * lanes * 4)
        for n, value in enumerate(i[-6:]):
            b.add("store", [value, program.values["d"]], dtype=i32, disp=n * lanes * 4)
        for n, value in enumerate(m[-3:]):
            b.add("store", [b.value("mask_to_row", [value], ROW_I32), program.values["d"]], dtype=i32,
                  disp=(10 + n) * lanes * 4)
        for n, value in enumerate(s[-5:]):
            b.add("s_store", [value, program.values["d"]], dtype=i64, disp=20 * lanes * 4 + 8 * n)
