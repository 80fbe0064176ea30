"""Integers of few bits that become floats by their bits (sapper/lane/small_integers.py)."""

from __future__ import annotations

import numpy as np
import pytest

from sapper.ir.rewriter import eliminate_dead
from sapper.ir.verifier import verify
from sapper.lane.interpret import bind_arguments, run
from sapper.lane.ops import LANE_OPS
from sapper.lane.small_integers import convert_by_bits

from .test_interpret import program

LANES = 8


def converted(made: str, words: np.ndarray, done: bool = True, after: str = "",
              result: str = "%f") -> tuple[np.ndarray, np.ndarray]:
    """%i of a row %w of words as floats %f, with conversions and by bits. made: how %i is made; after: what is made of
    %f."""
    found = []
    for by_bits in (False, True):
        arrays = {"w": words.astype(np.uint32), "y": np.zeros(LANES, np.float32)}
        body = f"%b: row<b32> = load %w_data {{dtype = :b32}}\n%w: row<i32> = bitcast %b\n{made}"
        function = program(f"{body}%f: row<f32> = cvt %i\n{after}store {result}, %y_data {{dtype = :f32}}", LANES,
                           ("w.data", "y.data"))
        if by_bits:
            assert convert_by_bits(function) == done
            verify(function, LANE_OPS)
            eliminate_dead(function, LANE_OPS)
            assert "cvt" not in {op.name for op in function.walk()} or not done
        run(function, *bind_arguments(function, arrays))
        found.append(arrays["y"])
    return found[0], found[1]


WORDS = np.array([0, 0xFFFFFFFF, 0x89ABCDEF, 0x12345678, 0x80000000, 0x7FFFFFFF, 0xF0F0F0F0, 1], np.uint32)


@pytest.mark.parametrize("shift", range(0, 32, 4))
def test_numbers_of_4_bits(shift: int) -> None:
    """Wherever they lie in a word, less 8."""
    plain, by_bits = converted(
        f"%s: row<i32> = sar %w {{amount = {shift}}}\n%m: row<i32> = splat_const {{value = 15}}\n"
        "%n: row<i32> = and %s, %m\n%e: row<i32> = splat_const {value = 8}\n%i: row<i32> = sub %n, %e\n", WORDS)
    np.testing.assert_array_equal(by_bits, plain)
    np.testing.assert_array_equal(by_bits, (WORDS >> shift & 15).astype(np.float32) - 8)


@pytest.mark.parametrize("place", range(4))
def test_halves_of_bytes(place: int) -> None:
    """A shift and a mask that reach past the byte take its bits alone."""
    plain, by_bits = converted(
        f"%u: row<i32> = unpack %b {{dtype = :u8, place = {place}}}\n%s: row<i32> = sar %u {{amount = 4}}\n"
        "%m: row<i32> = splat_const {value = 31}\n%i: row<i32> = and %s, %m\n", WORDS)
    np.testing.assert_array_equal(by_bits, plain)


@pytest.mark.parametrize("place", range(4))
def test_upper_halves_less_a_float(place: int) -> None:
    """A byte that is shifted has no mask; what is subtracted from the float is so from its bits."""
    plain, by_bits = converted(
        f"%u: row<i32> = unpack %b {{dtype = :u8, place = {place}}}\n%i: row<i32> = shr %u {{amount = 4}}\n", WORDS,
        after="%c: row<f32> = splat_const {value = 8.0}\n%d: row<f32> = sub %f, %c\n", result="%d")
    np.testing.assert_array_equal(by_bits, plain)
    np.testing.assert_array_equal(by_bits, (WORDS >> 8 * place + 4 & 15).astype(np.float32) - 8)


@pytest.mark.parametrize("made", [
    "%m: row<i32> = splat_const {value = 16777215}\n%i: row<i32> = and %w, %m\n",       # 24 bits
    "%m: row<i32> = splat_const {value = 5}\n%i: row<i32> = and %w, %m\n",
    "%i: row<i32> = unpack %b {dtype = :u8, place = 1}\n",
    "%s: row<i32> = sar %w {amount = 16}\n%m: row<i32> = splat_const {value = 255}\n%i: row<i32> = and %s, %m\n"])
def test_what_is_converted_as_ever(made: str) -> None:
    """More than a float's fraction holds, bits with gaps, and bytes by themselves."""
    plain, other = converted(made, WORDS, done=False)
    np.testing.assert_array_equal(other, plain)


def test_copies_of_a_sign() -> None:
    """They are shifted in as ever."""
    plain, by_bits = converted(
        "%s: row<i32> = sar %w {amount = 30}\n%m: row<i32> = splat_const {value = 7}\n%i: row<i32> = and %s, %m\n",
        WORDS)
    np.testing.assert_array_equal(by_bits, plain)
    assert plain.max() == 7
