"""Tables in registers: small integers that become floats, and gathers from tables that a kernel is given."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sapper as sp
from sapper import Tensor, bf16, f32, i8, i32, tiles, u8
from sapper.codegen.pipeline import facts_of, finish_lane, to_lane
from sapper.lane.tables import LARGEST_OFFSET
from sapper.runtime.check import check_kernel
from sapper.targets import target
from sapper.tile.schedule import DimClass, Schedule, Specialization
from tests.strategies.amount import examples

M, N, V = sp.dims("M N V")
V3, ZEN4 = target("v3"), target("zen4")


def names_of(kernel: Any, chip: Any) -> Counter[str]:
    """How often each lane op stands in the simplified function."""
    dims = {d: DimClass() for _, t in kernel.parameters for d in getattr(t, "dims", ()) if isinstance(d, str)}
    strides: dict[str, Any] = {name: "contiguous" for name, t in kernel.parameters if hasattr(t, "dims")}
    lane = to_lane(kernel.tile_ir(), Schedule(), facts_of(chip), Specialization(dims, strides))
    return Counter(op.name for op in finish_lane(lane, chip).walk())


def make_nibbles(shift: int, signed: bool) -> Any:
    @sp.kernel(name=f"nibbles_{shift}_{signed}")
    def nibbles(w: Tensor[i32, N], y: Tensor[f32, N]):
        for n in tiles(N):
            if signed:
                y[n] = (w[n] << (28 - shift) >> 28).to(f32)
            else:
                y[n] = (w[n] >> shift & 15).to(f32)

    return nibbles


@settings(max_examples=examples(12), deadline=None)
@given(st.integers(0, 28), st.booleans())
def test_four_bits_become_a_float_by_a_table(shift: int, signed: bool) -> None:
    kernel = make_nibbles(shift, signed)
    names = names_of(kernel, ZEN4)
    shifts = names["shl"] + names["shr"] + names["sar"]
    assert names["lookup"] and not names["cvt"] and not names["and"] and shifts <= names["lookup"]
    assert not names_of(kernel, V3)["lookup"]
    assert check_kernel(kernel, ZEN4, runs=2).finding is None


@pytest.mark.parametrize("offset", [8, -3, 0x7FFFFFFF])
def test_four_bits_less_a_number_are_a_table_too(offset: int) -> None:
    """As the quants of Q4_0; unless a difference might leave 32 bits, or its float be rounded."""
    @sp.kernel(name=f"less_{offset & 0xFFFFFFFF}")
    def less(w: Tensor[i32, N], y: Tensor[f32, N]):
        for n in tiles(N):
            y[n] = ((w[n] >> 12 & 15) - offset).to(f32)

    names = names_of(less, ZEN4)
    assert bool(names["lookup"]) == (abs(offset) < LARGEST_OFFSET) != bool(names["cvt"])
    assert check_kernel(less, ZEN4, runs=2).finding is None


def test_other_widths_are_converted() -> None:
    @sp.kernel
    def five(w: Tensor[i32, N], y: Tensor[f32, N]):
        for n in tiles(N):
            y[n] = (w[n] << 20 >> 27).to(f32) + (w[n] & 31).to(f32)

    names = names_of(five, ZEN4)
    assert names["cvt"] and not names["lookup"]


def e2m1(code: Any) -> Any:
    """f32 of four bits: a sign, two of an exponent, one of a mantissa."""
    magnitude = code & 7
    bits = ((magnitude >> 1) + 126 << 23) | ((magnitude & 1) << 22)
    value = sp.where(magnitude >= 2, bits, sp.where(magnitude == 1, 0x3F000000, 0))
    return (value | ((code & 8) << 28)).bits(f32)


@sp.kernel
def microscaled(w: Tensor[u8, N], y: Tensor[f32, N], z: Tensor[f32, N]):
    for n in tiles(N):
        y[n] = e2m1((w[n] & 15).to(i32)) * 3.0
        z[n] = e2m1(sp.where(n % 2 == 0, w[n] & 15, w[n] >> 4).to(i32))


@pytest.mark.parametrize("chip", [V3, ZEN4], ids=["halves", "whole"])
def test_what_is_computed_from_four_bits_alone_is_a_table(chip: Any) -> None:
    names = names_of(microscaled, chip)
    assert names["lookup"] and not names["bitcast"], "nothing of the exponent is put together"
    assert check_kernel(microscaled, chip, runs=3).finding is None
    if chip is V3:
        assert "lookup" not in names_of(microscaled, target("sm_80"))


def test_the_table_has_the_bits_of_what_was_computed() -> None:
    """All codes, with 0 of either sign."""
    w = np.arange(256, dtype=np.uint8)
    results = []
    for options in ({}, {"target": "v3"}, {"interpret": True}):
        y, z = np.full(256, np.nan, np.float32), np.full(256, np.nan, np.float32)
        microscaled(w, y, z, **options)
        results.append((y.view(np.int32), z.view(np.int32)))
    for found in results[:-1]:
        np.testing.assert_array_equal(found, results[-1])
    assert results[0][1][8] == np.int32(-(1 << 31)) and len(set(results[0][0].tolist())) == 16


def few_ops(c: Any) -> Any:
    return (c * 2 + 1).to(f32) * 0.5


def no_number(c: Any) -> Any:
    """Infinity, of 15."""
    return ((c << 27) | (c << 23)).bits(f32) * 2.0 + 1.0


def many_ops(c: Any) -> Any:
    return ((c + 3) * (c + 5)).to(f32) * (c ^ 3).to(f32) * 0.5 + 1.0


@pytest.mark.parametrize(("of", "whole", "halves"), [
    (few_ops, True, False), (no_number, False, False), (many_ops, True, True)],
    ids=lambda v: getattr(v, "__name__", ""))
def test_which_functions_become_tables(of: Any, whole: bool, halves: bool) -> None:
    """By halves a lookup is four instructions. A table has numbers only."""
    @sp.kernel(name=of.__name__)
    def computed(w: Tensor[u8, N], y: Tensor[f32, N]):
        for n in tiles(N):
            y[n] = of((w[n] & 15).to(i32))

    for chip, expected in ((ZEN4, whole), (V3, halves)):
        assert bool(names_of(computed, chip)["lookup"]) == expected
    assert check_kernel(computed, V3, runs=1).finding is None


def test_functions_of_two_codes_are_computed() -> None:
    @sp.kernel
    def two(w: Tensor[u8, N], v: Tensor[u8, N], y: Tensor[f32, N]):
        for n in tiles(N):
            a, b = (w[n] & 15).to(i32), (v[n] & 15).to(i32)
            y[n] = (((a * b + 3) ^ a) * 5 - (b >> 1) * (a | 2) + (a << b)).to(f32)

    assert not names_of(two, ZEN4)["lookup"] and not names_of(two, V3)["lookup"]


@sp.kernel
def codebook(w: Tensor[u8, N], book: Tensor[i8, 16], y: Tensor[i8, N]):
    for n in tiles(N):
        y[n] = book[w[n].to(i32) & 15]


@sp.kernel
def eight(w: Tensor[i32, N], book: Tensor[f32, 7], y: Tensor[f32, N]):
    for n in tiles(N):
        y[n] = book[sp.minimum(sp.maximum(w[n], 0), 6)]


@sp.kernel
def by_rows(w: Tensor[i32, M, N], books: Tensor[f32, M, 8], y: Tensor[f32, M, N]):
    for m, n in tiles(M, N):
        y[m, n] = books[m, w[m, n] & 7]


@sp.kernel
def twenty(w: Tensor[i32, N], book: Tensor[bf16, 20], y: Tensor[f32, N]):
    for n in tiles(N):
        y[n] = book[sp.minimum(sp.maximum(w[n], 0), 19)].to(f32)


@pytest.mark.parametrize(("kernel", "picks"), [(codebook, (2, 1)), (eight, (1, 1)), (twenty, (0, 2))],
                         ids=["i8", "f32", "bf16"])
def test_a_table_that_fits_two_registers_is_picked_from(kernel: Any, picks: tuple[int, int]) -> None:
    """picks: for each row, with 8 lanes and with 16."""
    for chip, count in zip((V3, ZEN4), picks, strict=True):
        names = names_of(kernel, chip)
        assert (names["pick"] > 0) == (count > 0) != (names["gather"] > 0)
        assert count < 2 or (names["pick"] % 2 == 0 and names["select"] >= names["pick"] // 2)
        assert check_kernel(kernel, chip, runs=6).finding is None
    assert not names_of(codebook, ZEN4)["and"]  # the index is taken modulo the lanes
    assert "pick" not in names_of(kernel, target("sm_80"))


def test_what_is_no_such_table_is_gathered() -> None:
    @sp.kernel
    def longer(w: Tensor[i32, N], book: Tensor[f32, 33], y: Tensor[f32, N]):
        for n in tiles(N):
            y[n] = book[w[n] & 15]

    @sp.kernel
    def unknown(w: Tensor[i32, N], book: Tensor[f32, V], y: Tensor[f32, N]):
        for n in tiles(N):
            y[n] = book[w[n]]

    for kernel in (longer, unknown):
        names = names_of(kernel, ZEN4)
        assert names["gather"] and not names["pick"]
    assert check_kernel(by_rows, ZEN4, runs=4).finding is None


def test_an_index_that_rows_share_is_read_once() -> None:
    @sp.kernel
    def embedding(table: Tensor[f32, V, N], ids: Tensor[i32, M], y: Tensor[f32, M, N]):
        for m, n in tiles(M, N):
            y[m, n] = table[ids[m], n]

    names = names_of(embedding, ZEN4)
    loads = names["load"]
    assert loads > names["s_load"] > 0 and names["s_load"] <= 3  # one for each loop over n: whole pieces, rests
    table = np.arange(60, dtype=np.float32).reshape(3, 20)
    y = np.zeros((4, 20), np.float32)
    embedding(table, np.array([2, 0, 1, 2], np.int32), y)
    assert (y == table[[2, 0, 1, 2]]).all()
