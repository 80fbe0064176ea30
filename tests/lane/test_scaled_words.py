"""Sums of words that meet the number which scales them (sapper/lane/scaled_words.py)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sapper.ir.nodes import Function
from sapper.ir.verifier import verify
from sapper.lane.interpret import bind_arguments, run
from sapper.lane.ops import LANE_OPS
from sapper.lane.scaled_words import scale_words
from tests.strategies import examples

from .test_interpret import program

LANES = 8
NUMBERS = {
    "u8": "%n: row<i32> = load %n_data {dtype = :u8}\n",
    "i8": "%n: row<i32> = load %n_data {dtype = :i8}\n",
    "i16": "%n: row<i32> = load_splat %n_data {dtype = :i16}\n",
    "shifted": "%f: row<i32> = load %n_data {dtype = :i32}\n%n: row<i32> = sar %f {amount = 16}\n",
    "i32": "%n: row<i32> = load %n_data {dtype = :i32}\n",
    "u16": ("%f: row<i32> = load %n_data {dtype = :i32}\n%k: row<i32> = splat_const {value = 65535}\n"
            "%n: row<i32> = and %f, %k\n"),
}


def scaled(number: str, ones: int = 0x00010001, start: int = 0, more: str = "", turned: bool = False,
           others: int = 0) -> Function:
    """y = number * (start + the words of w, in pairs); z the same with other words. others: how many words more are
    added to each."""
    body = (f"{number}%o: row<i32> = splat_const {{value = {ones}}}\n%b: row<b32> = bitcast %o\n"
            f"%t: row<i32> = splat_const {{value = {start}}}\n")
    for at, name in enumerate("yz"):
        body += (f"%w{name}: row<b32> = load %w_data {{dtype = :b32, disp = {4 * LANES * at}}}\n"
                 f"%s{name}{0 if others else ''}: row<i32> = dot2_i16 %t, %w{name}, %b\n")
        for one in range(others):
            after = one + 1 if one + 1 < others else ""
            body += (f"%v{name}{one}: row<b32> = load %w_data {{dtype = :b32, disp = {4 * LANES * ((at + one) % 2)}}}\n"
                     f"%s{name}{after}: row<i32> = dot2_i16 %s{name}{one}, %v{name}{one}, %b\n")
        body += (f"%m{name}: row<i32> = mul {f'%n, %s{name}' if turned else f'%s{name}, %n'}\n"
                 f"store %m{name}, %y_data {{dtype = :i32, disp = {4 * LANES * at}}}\n")
    return program(body + more, LANES, ("n.data", "w.data", "y.data"))


def results(function: Function, seed: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    words = random.choice([-32768, -1, 0, 1, 30480, 32767], (2, LANES, 2)).astype(np.int16)
    arrays = {"n": random.choice([0, 1, 127, 128, 0x80FFFFFF, 0x7FFF8000, 0x8000FFFF], LANES).astype(np.uint32),
              "w": words.view(np.uint32)[..., 0], "y": np.zeros((2, LANES), np.int32)}
    run(function, *bind_arguments(function, arrays))
    return arrays["y"]


def products(function: Function) -> int:
    return sum(op.name == "mul" for op in function.walk())


@settings(max_examples=examples(40))
@given(number=st.sampled_from(sorted(NUMBERS)), turned=st.booleans(), others=st.integers(0, 2),
       seed=st.integers(0, 99))
def test_scaled_sums_are_exact(number: str, turned: bool, others: int, seed: int) -> None:
    function = scaled(NUMBERS[number], turned=turned, others=others)
    expected = results(function, seed)
    count = scale_words(function)
    verify(function, LANE_OPS)
    assert count == (0 if number in ("i32", "u16") else 2) == 2 - products(function)
    np.testing.assert_array_equal(results(function, seed), expected)


def test_a_number_is_paired_once() -> None:
    function = scaled(NUMBERS["u8"])
    scale_words(function)
    assert [op.name for op in function.walk()].count("shl") == 1


@pytest.mark.parametrize("others", [
    {"ones": 0x00010002}, {"start": 1}, {"start": 1, "others": 1},
    {"more": "".join(f"store %s{name}, %y_data {{dtype = :i32}}\n" for name in "yz")},
], ids=["other factors", "a sum that begins with something", "one of more words that does", "a sum that is read twice"])
def test_other_sums_stay(others: dict[str, Any]) -> None:
    function = scaled(NUMBERS["u8"], **others)
    assert scale_words(function) == 0 and products(function) == 2
