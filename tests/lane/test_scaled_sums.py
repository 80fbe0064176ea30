"""Sums of products of bytes that dot products of words scale (sapper/lane/scaled_sums.py)."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sapper.ir.nodes import Function
from sapper.ir.verifier import verify
from sapper.lane.interpret import bind_arguments, run
from sapper.lane.ops import LANE_OPS
from sapper.lane.scaled_sums import scale_sums
from tests.strategies import examples

from .test_interpret import program

LANES = 8
SUMS = {"inside": "%a: row<i32> = add %m0, %m1\n%b: row<i32> = add %r, %a\n",
        "in turn": "%a: row<i32> = add %r, %m0\n%b: row<i32> = add %m1, %a\n",
        "alone": "%b: row<i32> = add %m0, %m1\n"}


def scaled(dots: int = 8, mask: int = 0x0F, start: int = 0, number: str = "u8", sums: str = "inside",
           again: bool = False) -> Function:
    """y = n0 * the first dot products + n1 * as many others, + r but for "alone". again: + the first of these sums."""
    body = (f"%k: row<i32> = splat_const {{value = {mask * 0x01010101}}}\n%kb: row<b32> = bitcast %k\n"
            f"%t: row<i32> = splat_const {{value = {start}}}\n")
    for term in range(2):
        total = "%t"
        for at in range(dots):
            place = f"disp = {4 * LANES * (dots * term + at)}"
            body += (f"%f{term}_{at}: row<b32> = load %w_data {{dtype = :b32, {place}}}\n"
                     f"%w{term}_{at}: row<b32> = and %f{term}_{at}, %kb\n"
                     f"%x{term}_{at}: row<b32> = load %x_data {{dtype = :b32, {place}}}\n"
                     f"%s{term}_{at}: row<i32> = dot4_u8i8 {total}, %w{term}_{at}, %x{term}_{at}\n")
            total = f"%s{term}_{at}"
        body += (f"%n{term}: row<i32> = load %n_data {{dtype = :{number}, disp = {LANES * term}}}\n"
                 f"%m{term}: row<i32> = mul {total}, %n{term}\n")
    body += f"%r: row<i32> = load %r_data {{dtype = :i32}}\n{SUMS[sums]}"
    body += f"%c: row<i32> = xor %b, %s0_{dots - 1}\nyield %c\n" if again else "yield %b\n"
    return program(  # what writes stands outside of the block
        "%zero: s64 = s_const {value = 0}\n%one: s64 = s_const {value = 1}\n%none: row<i32> = splat_const {value = 0}\n"
        f"%o: row<i32> = loop %zero, %one, %none {{step = 1, label = \"each\"}} (%i: s64, %z: row<i32>) {{\n{body}}}\n"
        "store %o, %y_data {dtype = :i32}\n", LANES, ("n.data", "w.data", "x.data", "r.data", "y.data"))


def count(function: Function, name: str) -> int:
    return sum(op.name == name for op in function.walk())


def results(function: Function, seed: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    arrays = {"n": random.choice([0, 1, 63, 255], 2 * LANES).astype(np.uint8),
              "w": random.choice([0, 0x0F, 0xFF], (16, LANES, 4)).astype(np.uint8),
              "x": random.choice([-128, -1, 127], (16, LANES, 4)).astype(np.int8),
              "r": random.choice([-5, 0, 1 << 30], LANES).astype(np.int32), "y": np.zeros(LANES, np.int32)}
    run(function, *bind_arguments(function, arrays))
    return arrays["y"]


@settings(max_examples=examples(20))
@given(dots=st.integers(1, 8), mask=st.sampled_from([0x01, 0x0F, 0x1F, 0x3F, 0xFF]), sums=st.sampled_from(sorted(SUMS)),
       start=st.integers(0, 1), again=st.booleans(), seed=st.integers(0, 99))
def test_scaled_sums_are_exact(dots: int, mask: int, sums: str, start: int, again: bool, seed: int) -> None:
    plain, made = (scaled(dots, mask, start, sums=sums, again=again) for _ in range(2))
    scale_sums(made)
    verify(made, LANE_OPS)
    np.testing.assert_array_equal(results(made, seed), results(plain, seed))


@pytest.mark.parametrize("sums", sorted(SUMS))
@pytest.mark.parametrize(("dots", "parts"), [(4, 1), (8, 2)])
def test_32_weights_of_4_bits_are_two_sums(dots: int, parts: int, sums: str) -> None:
    """A sum of 16 of them is at least -15 * 128 * 16."""
    function = scaled(dots, sums=sums)
    assert scale_sums(function) == 2
    assert [count(function, name) for name in ("mul", "add", "dot2_i16")] == [0, 0, 2 * parts]


def test_what_is_scaled_is_scaled_where_it_is_made() -> None:
    function = scaled()
    scale_sums(function)
    names = [op.name for op in function.walk() if op.name in ("dot4_u8i8", "dot2_i16")]
    assert names == 2 * (4 * ["dot4_u8i8"] + ["dot2_i16"] + 4 * ["dot4_u8i8"] + ["dot2_i16"])


@pytest.mark.parametrize("others", [
    {"start": 1}, {"mask": 0x1F}, {"mask": 0xFF}, {"number": "i8"}], ids=["a start", "three", "bytes", "a sign"])
def test_others_are_products(others: dict[str, int]) -> None:
    """Three sums take as long, and a sign would be in the upper word of a number, too."""
    assert scale_sums(scaled(**others)) == 0  # type: ignore[arg-type]


def test_a_sum_that_is_read_again_is_not_parted() -> None:
    assert scale_sums(scaled(again=True)) == 1
