"""Pairs of small whole numbers that become f16 by their bits (sapper/lane/packed_bits.py)."""

from __future__ import annotations

import numpy as np
import pytest

from sapper.ir.rewriter import eliminate_dead
from sapper.ir.verifier import verify
from sapper.lane.interpret import bind_arguments, run
from sapper.lane.ops import LANE_OPS
from sapper.lane.packed_bits import pack_by_bits

from .test_interpret import program

LANES = 8
WORDS = np.array([0, 0xFFFFFFFF, 0x89ABCDEF, 0x12345678, 0x80008000, 0x7F807F80, 0xF0F0F0F0, 1], np.uint32)


def packed(low: str, high: str, done: bool = True) -> np.ndarray:
    """%i and %j of a row %b of words as a pair of f16, with conversions and by bits, which are compared. done: whether
    there is a way by bits."""
    found = []
    for by_bits in (False, True):
        arrays = {"w": WORDS.copy(), "y": np.zeros(LANES, np.uint32)}
        function = program(
            f"%b: row<b32> = load %w_data {{dtype = :b32}}\n{low}{high}%f: row<f32> = cvt %i\n%g: row<f32> = cvt %j\n"
            "%p: row<b32> = pack2 %f, %g {dtype = :f16}\nstore %p, %y_data {dtype = :b32}", LANES, ("w.data", "y.data"))
        if by_bits:
            assert pack_by_bits(function) == done
            verify(function, LANE_OPS)
            eliminate_dead(function, LANE_OPS)
            assert ("cvt" in {op.name for op in function.walk()}) != done
        run(function, *bind_arguments(function, arrays))
        found.append(arrays["y"])
    np.testing.assert_array_equal(found[1], found[0])
    return found[1].view(np.float16).reshape(LANES, 2)


def byte(name: str, dtype: str, place: int) -> str:
    return f"%{name}: row<i32> = unpack %b {{dtype = :{dtype}, place = {place}}}\n"


@pytest.mark.parametrize("dtype", ["i8", "u8"])
@pytest.mark.parametrize("place", [0, 1])
def test_bytes(dtype: str, place: int) -> None:
    """All that there are, with a sign or without."""
    made = packed(byte("i", dtype, place), byte("j", dtype, place + 2))
    wanted = WORDS.view(np.int8 if dtype == "i8" else np.uint8).reshape(LANES, 4)[:, [place, place + 2]]
    np.testing.assert_array_equal(made, wanted.astype(np.float16))


@pytest.mark.parametrize("less", ["", "8"])
def test_halves_of_bytes(less: str) -> None:
    def half(name: str, place: int) -> str:
        q = f"{name}q" if less else name
        return byte(f"{name}u", "u8", place) + f"%{q}: row<i32> = shr %{name}u {{amount = 4}}\n" + (
            f"%{name}n: row<i32> = splat_const {{value = {less}}}\n%{name}: row<i32> = sub %{q}, %{name}n\n"
            if less else "")

    made = packed(half("i", 1), half("j", 3))
    wanted = (WORDS.view(np.uint8).reshape(LANES, 4)[:, [1, 3]] >> 4).astype(np.float16) - (8 if less else 0)
    np.testing.assert_array_equal(made, wanted)


@pytest.mark.parametrize("second", [("i8", 1), ("u8", 2), ("i8", 0)])
def test_others_are_converted(second: tuple[str, int]) -> None:
    """Those that are not 16 bits apart, or of another kind."""
    packed(byte("i", "i8", 0), byte("j", *second), done=False)
