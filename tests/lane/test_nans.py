"""Whether rounding to bf16 may meet a NaN that it would carry to infinity."""

from __future__ import annotations

import numpy as np
import pytest
from ml_dtypes import bfloat16

from sapper.ir.nodes import Block, Builder, Function, Op
from sapper.ir.types import ROW_B32, ROW_F32, ROW_I32, S64, DType, b32, bf16, f16, f32, i32
from sapper.ir.verifier import verify
from sapper.lane.interpret import bind_arguments, run
from sapper.lane.nans import short_nans, shorten_scalars
from sapper.lane.ops import LANE_OPS


def start(slots: list[str]) -> tuple[Function, Builder]:
    function = Function("f", "lane")
    function.attributes = {"lanes": 8, "slots": slots}
    return function, Builder(function.body)


@pytest.mark.parametrize(("dtype", "short"), [(bf16, True), (f32, False), (f16, False)])
def test_of_a_tensor(dtype: DType, short: bool) -> None:
    function, b = start(["x.data"])
    base = b.value("s_add", [b.value("arg", [], S64, slot=3), b.value("s_const", [], S64, value=64)], S64)
    row = b.value("load", [base], ROW_F32, dtype=dtype)
    b.value("add", [row, row], ROW_F32)
    assert short_nans(function) == short


def test_of_scratch_memory_beside_a_tensor() -> None:
    """It holds what the function has put there."""
    function, b = start(["dim.N", "x.data"])
    scratch = b.value("s_add", [b.value("arg", [], S64, slot=0), b.value("arg", [], S64, slot=3)], S64)
    b.value("load", [scratch], ROW_F32, dtype=f32)
    assert short_nans(function)
    b.value("load", [b.value("s_add", [scratch, b.value("arg", [], S64, slot=4)], S64)], ROW_F32, dtype=f32)
    assert not short_nans(function)


@pytest.mark.parametrize("place", ["counter", "carried", "yielded"])
def test_of_an_address_that_a_loop_gives(place: str) -> None:
    function, b = start(["x.data"])
    scratch, tensor, step = (b.value("arg", [], S64, slot=slot) for slot in (0, 3, 1))
    body = Block([S64, S64])
    inside = Builder(body)
    begin = tensor if place == "counter" else scratch
    b.block.ops.append(Op("loop", [begin, step, tensor if place == "carried" else scratch], [S64], {"step": 8}, [body]))
    address = body.arguments[0 if place == "counter" else 1]
    inside.value("load", [address], ROW_F32, dtype=f32)
    inside.add("yield", [tensor if place == "yielded" else address])
    assert not short_nans(function)


@pytest.mark.parametrize(("amount", "short"), [(23, True), (16, True), (8, False)])
def test_of_bits(amount: int, short: bool) -> None:
    function, b = start([])
    numbers = b.value("iota", [], ROW_I32)
    b.value("bitcast", [b.value("shl", [numbers], ROW_I32, amount=amount)], ROW_F32)
    assert short_nans(function) == short
    mask = b.value("splat_const", [], ROW_I32, value=-1 << amount)
    b.value("bitcast", [b.value("and", [numbers, mask], ROW_I32)], ROW_F32)
    assert short_nans(function) == short


def test_of_what_is_not_known() -> None:
    function, b = start([])
    b.value("splat", [b.value("arg", [], S64, slot=1)], ROW_F32)
    assert not short_nans(function)


@pytest.mark.parametrize("name", ["scale_exponent", "copy_sign"])
@pytest.mark.parametrize(("dtype", "short"), [(bf16, True), (f32, False)])
def test_of_powers_and_signs(name: str, dtype: DType, short: bool) -> None:
    function, b = start(["x.data"])
    row = b.value("load", [b.value("arg", [], S64, slot=3)], ROW_F32, dtype=dtype)
    b.value("fraction", [b.value(name, [row, row], ROW_F32)], ROW_F32)
    assert short_nans(function) == short


def test_of_a_table() -> None:
    function, b = start([])
    b.value("lookup", [b.value("iota", [], ROW_I32)], ROW_F32, table=(1.0,) * 16)
    assert short_nans(function)


def rounded_scalar(slot: str, more: DType | None = None) -> Function:
    """A scalar that is passed, beside a row of bf16, in a sum that is rounded."""
    function, b = start(["x.data", slot])
    source, word = b.value("arg", [], S64, slot=3), b.value("arg", [], S64, slot=4)
    scalar = b.value("bitcast", [b.value("splat", [word], ROW_I32)], ROW_F32)
    total = b.value("add", [b.value("load", [source], ROW_F32, dtype=more or bf16), scalar], ROW_F32)
    b.value("round_to", [total], ROW_F32, dtype=bf16)
    return function


@pytest.mark.parametrize("bits", [
    0x7FFFFFFF, 0xFFFF8001, 0x7F800001, 0xFFC00000, 0x7F800000, 0xFF800000, 0x3F8CCCCD, 0])
def test_a_scalar_that_is_passed_loses_the_lower_bits_of_a_nan(bits: int) -> None:
    """Once for a call: it stays what it is otherwise, and a NaN stays one, of its sign."""
    function = rounded_scalar("scalar.s")
    assert not short_nans(function)
    assert shorten_scalars(function) == 1
    verify(function, LANE_OPS)
    assert short_nans(function)
    word = next(op for op in function.walk() if op.name == "splat").result
    b = Builder(function.body)
    b.add("store", [word, b.value("arg", [], S64, slot=5)], dtype=i32)
    function.attributes["slots"].append("y.data")
    y = np.zeros(8, np.int32)
    scalar = np.uint32(bits).view(np.float32)
    run(function, *bind_arguments(function, {"x": np.zeros(8, bfloat16), "y": y}, {"s": scalar}))
    found, is_nan = int(y[0]) % 2**32, bits & 0x7FFFFFFF > 0x7F800000
    assert found == ((bits & 0xFFFF0000) | 0x400000 if is_nan else bits)


@pytest.mark.parametrize(("slot", "more"), [("scalar.s", f32), ("dim.N", None)])
def test_scalars_stay_where_it_would_not_help(slot: str, more: DType | None) -> None:
    """Where rows of f32 come from memory, or it is no scalar of the kernel's."""
    function = rounded_scalar(slot, more)
    count = len(list(function.walk()))
    assert shorten_scalars(function) == 0
    assert len(list(function.walk())) == count


def test_without_rounding_scalars_stay() -> None:
    function = rounded_scalar("scalar.s")
    function.body.ops.pop()
    assert shorten_scalars(function) == 0


@pytest.mark.parametrize("number", [1 << 16, 1])
def test_of_bits_by_way_of_slots(number: int) -> None:
    """As even and odd elements of bf16 are taken."""
    function, b = start([])
    mask = b.value("bitcast", [b.value("splat_const", [], ROW_I32, value=-number)], ROW_B32)
    word = b.value("load", [b.value("arg", [], S64, slot=0)], ROW_B32, dtype=b32)
    b.value("bitcast", [b.value("and", [word, mask], ROW_B32)], ROW_F32)
    assert short_nans(function) == (number == 1 << 16)
