"""What is known of the integers of a row: bounds that hold, and cuts to narrow types that are left out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sapper.ir.nodes import Block, Builder, Value
from sapper.ir.types import MASK, ROW_I32, S64, i8, i16, i32, u8
from sapper.lane.row_bounds import ANY, bounds_of, is_within
from sapper.lang.builtins import tiles
from sapper.lang.dims import dims
from sapper.lang.kernel import kernel
from sapper.lang.tensor import Tensor
from sapper.tile.schedule import Facts
from tests.strategies.amount import examples

from .run_lane import run_lane, specialize

FACTS = Facts(lanes=8, vector_registers=16)
(N,) = dims("N"),


@kernel
def small(x: Tensor[u8, N], y: Tensor[i8, N]):
    """Two bits, less one."""
    for n in tiles(N):
        y[n] = ((x[n] >> 2) & 3).to(i8) - 1


@kernel
def large(x: Tensor[u8, N], y: Tensor[i8, N]):
    """A byte above 127 is a negative number."""
    for n in tiles(N):
        y[n] = x[n].to(i8) >> 1


@pytest.mark.parametrize(("k", "cuts"), [(small, False), (large, True)], ids=lambda k: getattr(k, "name", ""))
def test_what_fits_is_not_cut(k: Any, cuts: bool) -> None:
    x = np.arange(256, dtype=np.uint8)
    arguments = {"x": x, "y": np.zeros(256, np.int8)}
    function = k.tile_ir()
    lane = run_lane(function, arguments, None, FACTS, specialize(function, arguments))
    np.testing.assert_array_equal(arguments["y"], x.astype(np.int8) >> 1 if cuts else (x >> 2 & 3).astype(np.int8) - 1)
    assert any(op.name == "shl" for op in lane.walk()) == cuts


OPS = ("and", "or", "add", "sub", "mul", "min", "max", "select", "sar", "shl")


def value_of(name: str, values: list[np.ndarray], amount: int) -> np.ndarray:
    a, b = values
    with np.errstate(over="ignore"):
        return {"and": lambda: a & b, "or": lambda: a | b, "add": lambda: a + b, "sub": lambda: a - b,
                "mul": lambda: a * b, "min": lambda: np.minimum(a, b), "max": lambda: np.maximum(a, b),
                "select": lambda: np.where(np.arange(len(a)) % 2 == 0, a, b), "sar": lambda: a >> amount,
                "shl": lambda: a << amount}[name]().astype(np.int32)


@settings(max_examples=examples(200), deadline=None)
@given(data=st.data())
def test_bounds_hold(data: Any) -> None:
    """Of any expression of loads and constants."""
    builder = Builder(Block())
    address = builder.value("arg", [], S64, slot=3)
    mask = builder.value("mask_first", [address], MASK)
    rows: list[tuple[Value, np.ndarray]] = []
    random = np.random.default_rng(data.draw(st.integers(0, 99)))
    for dtype, type in ((u8, np.uint8), (i8, np.int8), (i16, np.int16), (i32, np.int32)):
        ends = np.iinfo(type)
        values = np.concatenate([[ends.min, ends.max, ends.max, ends.min], random.integers(ends.min, ends.max + 1, 60)])
        rows.append((builder.value("load", [address], ROW_I32, dtype=dtype), values.astype(np.int32)))
    for number in data.draw(st.lists(st.integers(-300, 300), min_size=1, max_size=3)):
        rows.append((builder.value("splat_const", [], ROW_I32, value=number), np.full(64, number, np.int32)))
    for name in data.draw(st.lists(st.sampled_from(OPS), min_size=1, max_size=6)):
        (a, x), (b, y) = (data.draw(st.sampled_from(rows)) for _ in range(2))
        amount = data.draw(st.integers(0, 31))
        if name in ("sar", "shl"):
            made = builder.value(name, [a], ROW_I32, amount=amount)
        else:
            made = builder.value(name, [mask, a, b] if name == "select" else [a, b], ROW_I32)
        rows.append((made, value_of(name, [x, y], amount)))
    for row, values in rows:
        low, high = bounds_of(row)
        assert low <= values.min() and values.max() <= high
        for bits, signed in ((8, False), (8, True), (16, True)):
            type = np.dtype(f"{'i' if signed else 'u'}{bits // 8}")
            assert not is_within(row, bits, signed) or (values.astype(type) == values).all()


@pytest.mark.parametrize("deepest", [0, 1])
def test_what_is_too_far_behind_is_any_number(deepest: int) -> None:
    builder = Builder(Block())
    row = builder.value("splat_const", [], ROW_I32, value=3)
    for _ in range(deepest):
        row = builder.value("add", [row, row], ROW_I32)
    assert bounds_of(row, deepest) == ANY
    assert bounds_of(row) == (3 << deepest, 3 << deepest)
