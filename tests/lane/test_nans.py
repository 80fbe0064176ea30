"""Whether rounding to bf16 may meet a NaN that it would carry to infinity."""

from __future__ import annotations

import pytest

from sapper.ir.nodes import Block, Builder, Function, Op
from sapper.ir.types import ROW_F32, ROW_I32, S64, DType, bf16, f16, f32
from sapper.lane.nans import short_nans


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
