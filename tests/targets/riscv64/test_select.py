"""What selection for RISC-V makes of each lane op: run by the rows' meanings and on the emulator, against the lane
interpreter; and what it refuses."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import sapper.targets.riscv64.select as rules
from sapper.codegen.compile import compile_lane
from sapper.codegen.machine import Instruction
from sapper.codegen.select import select
from sapper.emulate.laid_out import Buffers
from sapper.emulate.riscv import PROGRAM, run_code
from sapper.ir.nodes import Builder, Function, Value
from sapper.ir.types import (
    MASK,
    ROW_F32,
    ROW_F64,
    ROW_I32,
    ROW_I64,
    S64,
    DType,
    bf16,
    bool_,
    f8e4m3,
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
from sapper.lane.ops import CONDITIONS, LANE_OPS
from sapper.targets import target
from tests.codegen.test_select import ALWAYS_SPLIT, OF_THREADS, STRUCTURE

from .by_meaning import run_by_meaning

ARRAYS = {"f": np.float32, "i": np.int32, "d": np.float64, "w": np.int64, "h": np.float16, "b": np.uint8,
          "o": np.int32, "y": np.uint8}
TABLE, PROBE_BYTES, PROBES = 64, 128, 600
MADE_BY_PASSES = {"dot2_bf16", "dot4_u8i8", "dot2_i16", "pairs_u8i8", "add_i16", "widen_bytes", "pack_bf16",
                  "is_denormal", "concat_bf16", "any_zero_bf16", "interleave", "pack2", "widen_float8", "max_u8",
                  "fraction", "lookup", "pick", "tile_configure", "tile_release", "tile_zero", "tile_load",
                  "tile_store", "tile_wake", "tile_multiply", "two_by_two_bf16", "two_by_two_i8i8", "two_by_two_u8i8",
                  "two_by_two_u8u8", "asm", "asm_contract"}
"""Ops that only targets have which say so (legal_ops, dots, tiles, pieces by hand)."""


class Probes:
    """A lane function that computes much, and stores it in order. names: of what is stored where. wide: elements of 64
    bits may be among its rows."""

    def __init__(self, lanes: int, wide: bool = False) -> None:
        self.lanes, self.wide = lanes, wide
        self.function = Function("probes", "lane")
        self.function.attributes = {"lanes": lanes, "slots": [f"{name}.data" for name in ARRAYS], "scratch_bytes": 0,
                                    "scratch": [], "counters": 0}
        self.b = Builder(self.function.body)
        self.at = {name: self.b.value("arg", [], S64, slot=3 + n) for n, name in enumerate(ARRAYS)}
        self.names: list[str] = []

    def value(self, op: str, operands: list[Value], type_: Any, **attributes: Any) -> Value:
        return self.b.value(op, operands, type_, **attributes)

    def number(self, value: int) -> Value:
        return self.value("s_const", [], S64, value=value)

    def constant(self, value: float, type_: Any) -> Value:
        return self.value("splat_const", [], type_, value=value)

    def place(self, name: str) -> dict[str, Any]:
        self.names.append(name)
        return {"disp": PROBE_BYTES * (len(self.names) - 1)}

    def row(self, name: str, value: Value) -> None:
        self.b.add("store", [value, self.at["y"]], dtype=value.type.dtype, **self.place(name))

    def mask(self, name: str, value: Value) -> None:
        self.row(name, self.value("mask_to_row", [value], ROW_I32))

    def scalar(self, name: str, value: Value) -> None:
        self.b.add("s_store", [value, self.at["y"]], dtype=i64, **self.place(name))

    def loaded(self, array: str, type_: Any, number: int, **attributes: Any) -> Value:
        return self.value("load", [self.at[array]], type_, dtype=type_.dtype,
                          disp=number * self.lanes * type_.dtype.size_bytes, **attributes)


def arithmetic(p: Probes, array: str, type_: Any) -> None:
    a, b, c = (p.loaded(array, type_, n) for n in range(3))
    float_ = type_.dtype.is_float
    scalar = {"element": p.value("load_splat", [p.at[array]], type_, dtype=type_.dtype, disp=8),
              "small": p.constant(5, type_), "large": p.constant(4.75 if float_ else 123456, type_)}
    for op in ("add", "sub", "mul", "min", "max", *(["div"] if float_ else ["and", "or", "xor"])):
        p.row(op, p.value(op, [a, b], type_))
        for name, one in scalar.items():
            p.row(f"{op} {name}", p.value(op, [a, one], type_))
            p.row(f"{name} {op}", p.value(op, [one, a], type_))
    for condition in CONDITIONS:
        p.mask(condition, p.value("cmp", [a, b], MASK, cond=condition))
        for name, one in (*scalar.items(), ("lowest", p.constant(-16, type_))):
            p.mask(f"{condition} {name}", p.value("cmp", [a, one], MASK, cond=condition))
            p.mask(f"{name} {condition}", p.value("cmp", [one, a], MASK, cond=condition))
    chosen = p.value("cmp", [a, b], MASK, cond="lt")
    for name, one in (("row", b), *scalar.items()):
        p.row(f"select {name}", p.value("select", [chosen, one, c], type_))
    for op in ("neg", "abs"):
        p.row(op, p.value(op, [a], type_))
    p.row("product added", p.value("add", [p.value("mul", [a, b], type_), c], type_))
    p.row("product by an element added", p.value("add", [c, p.value("mul", [a, scalar["element"]], type_)], type_))
    if float_:
        p.row("sqrt", p.value("sqrt", [p.value("abs", [a], type_)], type_))
        for name, one in (("row", b), *scalar.items()):
            p.row(f"fma {name}", p.value("fma", [a, one, c], type_))
            p.row(f"fma {name} first", p.value("fma", [one, a, c], type_))
            p.row(f"fma neg {name}", p.value("fma", [one, p.value("neg", [a], type_), c], type_))
        p.row("fma squared", p.value("fma", [b, b, p.constant(1.5, type_)], type_))
        return
    p.row("not", p.value("not", [a], type_))
    some = p.value("or", [b, p.constant(1, type_)], type_)
    for op in ("idiv", "imod"):
        p.row(op, p.value(op, [a, some], type_))
    amounts = p.value("and", [b, p.constant(31, type_)], type_)
    for op in ("shl", "shr", "sar"):
        p.row(f"{op} by rows", p.value(op, [a, amounts], type_))
        for amount in (0, 1, 31, *([40, 63] if type_.dtype.bits == 64 else [])):
            p.row(f"{op} by {amount}", p.value(op, [a], type_, amount=amount))


def lanes_of_rows(p: Probes, array: str, type_: Any) -> None:
    a, b = (p.loaded(array, type_, n) for n in range(2))
    distances = [1 << n for n in range(p.lanes.bit_length() - 1)]
    for distance in distances:
        p.row(f"shuffle_xor {distance}", p.value("shuffle_xor", [a], type_, distance=distance))
        for number, value in enumerate(p.b.add("exchange", [a, b], [type_, type_], distance=distance).results):
            p.row(f"exchange {distance}, {number}", value)
    for lane in range(p.lanes):
        p.row(f"broadcast_lane {lane}", p.value("broadcast_lane", [a], type_, lane=lane))
    for op in ("unzip", "zip"):
        for number, value in enumerate(p.b.add(op, [a, b], [type_, type_]).results):
            p.row(f"{op}, {number}", value)


def masks(p: Probes) -> None:
    a, b = (p.loaded("i", ROW_I32, n) for n in range(2))
    x, y = (p.value("cmp", [row, p.constant(0, ROW_I32)], MASK, cond="lt") for row in (a, b))
    for op in ("and", "or", "xor"):
        p.mask(f"mask_{op}", p.value(f"mask_{op}", [x, y], MASK))
    p.mask("mask_not", p.value("mask_not", [x], MASK))
    none, all_ = (p.value("mask_first", [p.number(n)], MASK) for n in (0, p.lanes))
    for name, mask in (("some", x), ("none", none), ("all", all_)):
        for op in ("mask_any", "mask_all"):
            p.scalar(f"{op} {name}", p.value(op, [mask], S64))
    counts = p.value("s_load", [p.at["w"]], S64, dtype=i64)
    for count in (-(1 << 40), -1, 0, 1, p.lanes - 1, p.lanes, 1 << 40):
        given = p.value("s_add", [p.value("s_sub", [counts, counts], S64), p.number(count)], S64)
        p.mask(f"mask_first {count}", p.value("mask_first", [given], MASK))
        p.mask(f"mask_first of {count}", p.value("mask_first", [p.number(count)], MASK))
    p.row("iota", p.value("iota", [], ROW_I32))
    p.scalar("lane0", p.value("lane0", [a], S64))


def memory(p: Probes) -> None:
    first = p.value("mask_first", [p.number(p.lanes - 1)], MASK)
    other = p.value("cmp", [p.loaded("i", ROW_I32, 0), p.constant(0, ROW_I32)], MASK, cond="lt")
    rows = {bf16: ROW_F32, f16: ROW_F32, f32: ROW_F32, i8: ROW_I32, u8: ROW_I32, i16: ROW_I32, i32: ROW_I32,
            bool_: ROW_I32, **({f64: ROW_F64, i64: ROW_I64} if p.wide else {})}
    sources = {bf16: "b", f16: "h", f32: "f", i8: "b", u8: "b", i16: "b", i32: "i", bool_: "b", f64: "d", i64: "w"}
    for dtype, type_ in rows.items():
        base = p.at[sources[dtype]]
        if dtype is bool_:      # bytes that are 0 or 1
            base = p.value("s_add", [base, p.number(256)], S64)
        p.row(f"load {dtype.name}", p.value("load", [base], type_, dtype=dtype, disp=8))
        p.row(f"load_splat {dtype.name}", p.value("load_splat", [base], type_, dtype=dtype, disp=8))
        for name, mask in (("first", first), ("other", other)):
            p.row(f"load {dtype.name} {name}", p.value("load", [base, mask], type_, dtype=dtype, masked=True))
        offsets = p.loaded("o", ROW_I32, 0)
        middle = p.value("s_add", [base, p.number(64)], S64)
        size = dtype.size_bytes
        for scale in {size, 1} if size == 1 else {size}:
            p.row(f"gather {dtype.name} {scale}", p.value("gather", [middle, offsets], type_, dtype=dtype, scale=scale))
            p.row(f"gather {dtype.name} masked", p.value("gather", [middle, offsets, other], type_, dtype=dtype,
                                                         scale=scale, disp=2 * size, masked=True))
        steps = p.value("splat", [p.value("s_load", [p.at["o"]], S64, dtype=i32, disp=64)], ROW_I32)
        for name, factor in (("", steps), (" 3", p.constant(3 * size, ROW_I32))):
            apart = p.value("mul", [p.value("iota", [], ROW_I32), factor], ROW_I32)
            p.row(f"strided {dtype.name}{name}", p.value("gather", [base, apart], type_, dtype=dtype, disp=size))
            p.row(f"strided {dtype.name}{name} masked", p.value("gather", [base, apart, other], type_, dtype=dtype,
                                                                masked=True))
            value = p.value("load", [base], type_, dtype=dtype, disp=24)
            p.b.add("scatter", [value, p.at["y"], apart], dtype=dtype, **p.place(f"scatter strided {dtype.name}{name}"))
            p.b.add("scatter", [value, p.at["y"], apart, other], dtype=dtype, masked=True,
                    **p.place(f"scatter strided {dtype.name}{name} masked"))
        value = p.value("load", [base], type_, dtype=dtype, disp=16)
        p.b.add("store", [value, p.at["y"]], dtype=dtype, **p.place(f"store {dtype.name}"))
        p.b.add("store", [value, p.at["y"], other], dtype=dtype, masked=True, **p.place(f"store {dtype.name} masked"))
        p.b.add("store_lane0", [value, p.at["y"]], dtype=dtype, **p.place(f"store_lane0 {dtype.name}"))
        p.b.add("scatter", [value, p.value("s_add", [p.at["y"], p.number(64)], S64), offsets], dtype=dtype,
                scale=size, **p.place(f"scatter {dtype.name}"))
        p.b.add("scatter", [value, p.value("s_add", [p.at["y"], p.number(64)], S64), offsets, other], dtype=dtype,
                scale=size, masked=True, **p.place(f"scatter {dtype.name} masked"))
    p.b.add("prefetch", [p.at["f"]], disp=40, level=1)
    rounded = p.loaded("f", ROW_F32, 0)
    for dtype in (bf16, f16):
        p.row(f"round_to {dtype.name}", p.value("round_to", [rounded], ROW_F32, dtype=dtype))
        p.b.add("store", [rounded, p.at["y"]], dtype=dtype, **p.place(f"store rounded {dtype.name}"))
    p.row("copy_sign", p.value("copy_sign", [rounded, p.loaded("f", ROW_F32, 1)], ROW_F32))
    p.row("bitcast", p.value("bitcast", [rounded], ROW_I32))
    p.row("i32 of f32", p.value("cvt", [p.loaded("f", ROW_F32, 2)], ROW_I32))
    p.row("nearest", p.value("cvt", [p.loaded("f", ROW_F32, 2)], ROW_I32, nearest=True))
    p.row("f32 of i32", p.value("cvt", [p.loaded("i", ROW_I32, 0)], ROW_F32))
    p.row("splat", p.value("splat", [p.value("s_load", [p.at["i"]], S64, dtype=i32)], ROW_I32))
    word = p.value("splat", [p.value("s_load", [p.at["f"]], S64, dtype=i32, disp=20)], ROW_I32)
    p.row("splat f32", p.value("add", [rounded, p.value("bitcast", [word], ROW_F32)], ROW_F32))
    p.row("splat added", p.value("add", [word, p.loaded("i", ROW_I32, 0)], ROW_I32))


def between_widths(p: Probes) -> None:
    single, whole = p.loaded("f", ROW_F32, 2), p.loaded("i", ROW_I32, 0)
    double, long = p.loaded("d", ROW_F64, 2), p.loaded("w", ROW_I64, 0)
    for source, types in ((single, (ROW_F64, ROW_I64)), (whole, (ROW_F64, ROW_I64)),
                          (double, (ROW_F32, ROW_I32, ROW_I64)), (long, (ROW_F32, ROW_F64, ROW_I32))):
        for type_ in types:
            p.row(f"{type_} of {source.type}", p.value("cvt", [source], type_))
    p.scalar("lane0 of i64", p.value("lane0", [long], S64))


def scalars(p: Probes) -> None:
    a, b = (p.value("s_load", [p.at["w"]], S64, dtype=i64, disp=8 * n) for n in range(2))
    small = p.number(3)
    for op in ("add", "sub", "mul", "min", "max", "and", "or", "xor"):
        p.scalar(f"s_{op}", p.value(f"s_{op}", [a, b], S64))
        for number in (1, -5, 2047, 2048, -2049, 1 << 40):
            p.scalar(f"s_{op} {number}", p.value(f"s_{op}", [a, p.number(number)], S64))
            p.scalar(f"{number} s_{op}", p.value(f"s_{op}", [p.number(number), a], S64))
    for op in ("shl", "shr", "sar"):
        p.scalar(f"s_{op}", p.value(f"s_{op}", [a, p.value("s_and", [b, p.number(63)], S64)], S64))
        p.scalar(f"s_{op} 7", p.value(f"s_{op}", [a, p.number(7)], S64))
    for op in ("floordiv", "mod"):
        for divisor in (b, p.number(16), p.number(1), p.number(1 << 20), p.number(-7), small):
            p.scalar(f"s_{op}", p.value(f"s_{op}", [a, divisor], S64))
    for condition in CONDITIONS:
        for name, other in (("", b), ("itself", a), ("0", p.number(0)), ("9", p.number(9))):
            holds = p.value("s_cmp", [a, other], S64, cond=condition)
            p.scalar(f"s_cmp {condition} {name}", holds)
            p.scalar(f"s_select {condition} {name}", p.value(
                "s_select", [p.value("s_cmp", [a, other], S64, cond=condition), b, small], S64))
    p.scalar("s_select", p.value("s_select", [a, b, small], S64))
    for dtype in (i8, u8, i16, i32, i64, bool_):
        base = p.value("s_add", [p.at["b"], p.number(256)], S64) if dtype is bool_ else p.at["b"]
        p.scalar(f"s_load {dtype.name}", p.value("s_load", [base], S64, dtype=dtype, disp=16))
    for dtype in (i8, i16, i32):
        p.b.add("s_store", [a, p.at["y"]], dtype=dtype, **p.place(f"s_store {dtype.name}"))


def probes(name: str, wide: bool) -> Iterator[Probes]:
    """Functions for a target, each of which stores all that it computes."""
    facts = target(name)
    for number in range(4):
        p = Probes(facts.wide_lanes if wide else facts.lanes, wide)
        if number == 0:
            arithmetic(p, "f", ROW_F32)
            lanes_of_rows(p, "f", ROW_F32)
            masks(p)
        elif number == 1:
            arithmetic(p, "i", ROW_I32)
            scalars(p)
        elif number == 2:
            memory(p)
        elif wide:
            arithmetic(p, "d", ROW_F64)
            arithmetic(p, "w", ROW_I64)
            lanes_of_rows(p, "d", ROW_F64)
            between_widths(p)
        p.b.add("yield", [])
        yield p


def arrays(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    made = {
        "f": rng.standard_normal(TABLE).astype(np.float32), "i": rng.integers(-2**31, 2**31, TABLE).astype(np.int32),
        "d": rng.standard_normal(TABLE), "w": rng.integers(-2**62, 2**62, TABLE), "h": rng.standard_normal(256).astype(
            np.float16), "b": rng.integers(0, 256, 512).astype(np.uint8),
        "o": np.append(rng.permutation(np.arange(-8, 8)), 8).astype(np.int32),
        "y": np.full(PROBE_BYTES * PROBES, 0xAB, np.uint8)}
    made["f"][:6] = np.nan, 0.0, -0.0, np.inf, 1.0, -2.5
    made["i"][:8] = 5, -16, 0, 7, -7, -(2**31), 2**31 - 1, 123456
    made["f"][16:32] *= 1000
    made["b"][256:] &= 1
    made["b"][:256:2] &= 0x3F      # as pairs of bytes no NaN of bf16
    made["b"][1:256:2] &= 0x7E
    return made


def same(found: np.ndarray, wanted: np.ndarray) -> bool:
    """As bytes, or as floats of 16 to 64 bits but for which NaN it is."""
    if found.tobytes() == wanted.tobytes():
        return True
    for dtype in (np.float32, np.float64, np.float16):
        a, b = found.view(dtype), wanted.view(dtype)
        alike = (np.isnan(a) & np.isnan(b)) | (a.view(f"u{a.itemsize}") == b.view(f"u{a.itemsize}"))
        if alike.all():
            return True
    return False


@pytest.mark.parametrize("emulated", [False, pytest.param(True, marks=pytest.mark.skipif(
    shutil.which(PROGRAM) is None, reason=f"{PROGRAM} is not installed"))], ids=["by meaning", "emulated"])
@pytest.mark.parametrize("name", ["rva23u64", "spacemit-x60"])
@pytest.mark.parametrize("wide", [False, True], ids=["narrow", "wide"])
def test_each_op_computes_what_the_interpreter_does(name: str, wide: bool, emulated: bool) -> None:
    facts, wrong = target(name), []
    for p in probes(name, wide):
        wanted, found = arrays(3), arrays(3)
        with np.errstate(all="ignore"):
            run(p.function, *bind_arguments(p.function, wanted))
        made = compile_lane(p.function, facts, checked=True)

        def words_of(buffers: Buffers, found: dict[str, np.ndarray] = found) -> list[int]:
            return [buffers.add_array(found[array]) for array in ARRAYS]

        if emulated:
            run_code(made.bytes, words_of, 0, vector_bits=facts.vector_bits)
        else:
            assert run_by_meaning(made.machine, facts.vector_bits, words_of, 0) > 0
        assert len(p.names) <= PROBES
        for number, probe in enumerate(p.names):
            at = slice(PROBE_BYTES * number, PROBE_BYTES * (number + 1))
            if not same(found["y"][at], wanted["y"][at]):
                wrong.append(f"{probe}: {found['y'][at][:64].tobytes().hex()}, "
                             f"expected {wanted['y'][at][:64].tobytes().hex()}")
    assert not wrong, "\n".join(wrong)


def test_every_lane_op_has_a_rule() -> None:
    from sapper.lane.math import EXPANDABLE

    missing = set(LANE_OPS.rows) - set(rules.RULES) - STRUCTURE - EXPANDABLE - OF_THREADS - ALWAYS_SPLIT
    assert missing == MADE_BY_PASSES


# --- What it refuses --------------------------------------------------------------------------------------------------

def refused(lanes: int, op: str, operands: int, type_: Any, source: Any = ROW_F32, **attributes: Any) -> Function:
    function = Function("test", "lane")
    function.attributes = {"lanes": lanes, "slots": ["x.data"], "scratch_bytes": 0}
    b = Builder(function.body)
    base = b.value("arg", [], S64, slot=3)
    row = b.value("load", [base], source, dtype=source.dtype)
    b.add("store", [b.value(op, [row] * operands or [base], type_, **attributes), base], dtype=type_.dtype)
    return function


@pytest.mark.parametrize(("function", "message"), [
    (refused(3, "neg", 1, ROW_F32), "lanes of function test: found 3; expected 4, or 2 of 64-bit elements; mend: "),
    (refused(4, "add", 2, ROW_F64, ROW_F64), "found 4 lanes of f64; expected at most 2 on this target; mend: "),
    (refused(4, "load", 0, ROW_F32, dtype=f8e4m3), "load of f8e4m3: found no row for it; expected one of "),
    (refused(4, "round_to", 1, ROW_F32, dtype=f8e4m3), "round_to f8e4m3: found no row for it; expected bf16 or f16"),
])
def test_what_is_refused(function: Function, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        select(function, rules, target("rva23u64"))


def test_a_store_of_what_has_no_row_is_refused() -> None:
    function = refused(4, "neg", 1, ROW_F32)
    function.body.ops[-1].attributes["dtype"] = f8e4m3
    with pytest.raises(ValueError, match="store of f8e4m3: found no row for it; expected one of"):
        select(function, rules, target("rva23u64"))


# --- What it chooses --------------------------------------------------------------------------------------------------

def chosen(build: Any) -> list[str]:
    """Names of the rows for what a builder makes of two rows of f32 or i32 and the address of an element."""
    p = Probes(4)
    build(p)
    p.b.add("yield", [])
    machine = select(p.function, rules, target("rva23u64"))
    return [item.row.name for item in machine.body if isinstance(item, Instruction)]


def test_an_element_that_multiplies_rows_stays_in_a_float_register() -> None:
    def build(p: Probes, dtype: DType = f32) -> None:
        one = p.value("load_splat", [p.at["f"]], ROW_F32, dtype=dtype)
        for number in range(3):
            p.row("", p.value("fma", [p.loaded("f", ROW_F32, number), one, p.loaded("f", ROW_F32, 3)], ROW_F32))

    made = chosen(build)
    assert made.count("flw") == 1 and made.count("vfmacc.vf.e32") == 3 and "vfmv.v.f.e32" not in made


def test_an_element_that_is_stored_too_is_a_row() -> None:
    def build(p: Probes) -> None:
        one = p.value("load_splat", [p.at["f"]], ROW_F32, dtype=f32)
        p.row("", p.value("mul", [p.loaded("f", ROW_F32, 0), one], ROW_F32))
        p.row("", one)

    made = chosen(build)
    assert "vfmul.vv.e32" in made and "vfmv.v.f.e32" in made


def test_numbers_of_five_bits_are_part_of_instructions() -> None:
    def build(p: Probes) -> None:
        p.row("", p.value("add", [p.loaded("i", ROW_I32, 0), p.constant(-16, ROW_I32)], ROW_I32))
        p.row("", p.value("sub", [p.loaded("i", ROW_I32, 1), p.constant(-15, ROW_I32)], ROW_I32))
        p.row("", p.value("and", [p.loaded("i", ROW_I32, 2), p.constant(16, ROW_I32)], ROW_I32))

    made = chosen(build)
    assert made.count("vadd.vi.e32") == 2 and "vand.vx.e32" in made
