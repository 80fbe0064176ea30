"""Packed dot products of bytes, expanded: exact on all operands, and by pairs only where bits prove it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sapper.ir.nodes import Function
from sapper.ir.types import ROW_I32
from sapper.ir.verifier import VerificationError, verify
from sapper.lane.interpret import bind_arguments, run
from sapper.lane.memory import LaneError
from sapper.lane.ops import LANE_OPS
from sapper.lane.split_dots import bits_of, pair_range, split_dots
from tests.strategies import examples

from .test_interpret import program

LANES = 8
NOTHING: frozenset[str] = frozenset()
SIGNED = frozenset({"dot4_i8i8", "dot4_u8u8"})
U8, I8 = (0, 1, 15, 127, 128, 255), (-128, -127, -1, 0, 1, 127)


def chain(masks: list[tuple[int, int]], kept: tuple[int, ...] = ()) -> Function:
    """Products of row n of a and of b, each with the bits of its masks alone, added up from the rows of c on; those of
    `kept` have a second reader."""
    body = "%t0: row<i32> = load %c_data {dtype = :i32}\n"
    for n, pair in enumerate(masks):
        for name, mask in zip("ab", pair, strict=True):
            body += (f"%{name}{n}: row<b32> = load %{name}_data {{dtype = :b32, disp = {4 * LANES * n}}}\n"
                     f"%{name}i{n}: row<i32> = splat_const {{value = {mask - (mask >> 31 << 32)}}}\n"
                     f"%{name}m{n}: row<b32> = bitcast %{name}i{n}\n"
                     f"%{name}k{n}: row<b32> = and %{name}{n}, %{name}m{n}\n")
        body += f"%t{n + 1}: row<i32> = dot4_u8i8 %t{n}, %ak{n}, %bk{n}\n"
    for place, n in enumerate((*kept, len(masks) - 1)):
        body += f"store %t{n + 1}, %y_data {{dtype = :i32, disp = {4 * LANES * place}}}\n"
    return program(body, LANES, ("a.data", "b.data", "c.data", "y.data"))


def results(function: Function, count: int, seed: int) -> np.ndarray:
    """Of hostile bytes, mostly the extremes."""
    random = np.random.default_rng(seed)
    rows = {"a": random.choice(U8, (count, LANES, 4)).astype(np.uint8).view(np.uint32)[..., 0],
            "b": random.choice(I8, (count, LANES, 4)).astype(np.int8).view(np.uint32)[..., 0],
            "c": random.integers(-2**31, 2**31, LANES).astype(np.int32), "y": np.zeros((3, LANES), np.int32)}
    run(function, *bind_arguments(function, rows))
    return rows["y"]


def names(function: Function) -> list[str]:
    wanted = ("dot4_u8i8", "dot4_i8i8", "dot2_i16", "pairs_u8i8", "add_i16", "widen_bytes")
    return [op.name for op in function.walk() if op.name in wanted]


def word(byte: int) -> int:
    return byte * 0x01010101


BYTES = st.sampled_from([word(0xFF), word(0xFF), word(0x0F), word(0x7F), word(0x80), word(3), 0x000F80FF, 0])


@settings(max_examples=examples(60))
@given(masks=st.lists(st.tuples(BYTES, BYTES), min_size=1, max_size=12), kept=st.sets(st.integers(0, 11), max_size=2),
       seed=st.integers(0, 99), legal=st.sampled_from([NOTHING, SIGNED]))
def test_sums_stay_exact(masks: list[tuple[int, int]], kept: set[int], seed: int, legal: frozenset[str]) -> None:
    read_twice = tuple(n for n in sorted(kept) if n < len(masks))
    expected = results(chain(masks, read_twice), len(masks), seed)
    function = chain(masks, read_twice)
    split_dots(function, legal)
    verify(function, LANE_OPS)
    assert "dot4_u8i8" not in names(function)
    np.testing.assert_array_equal(results(function, len(masks), seed), expected)


@pytest.mark.parametrize(("count", "bits", "sums"), [
    (8, 0x0F, 1), (9, 0x0F, 2), (2, 0x3F, 1), (3, 0x3F, 2), (1, 0x7F, 1), (2, 0x7F, 2), (1, 0x80, 1),
])
def test_words_are_added_up_as_long_as_they_fit(count: int, bits: int, sums: int) -> None:
    function = chain([(word(bits), word(0xFF))] * count)
    split_dots(function, NOTHING)
    assert sorted(names(function)) == sorted(
        ["pairs_u8i8"] * count + ["add_i16"] * (count - sums) + ["dot2_i16"] * sums)


def test_bytes_below_128_are_signed_as_they_are() -> None:
    """Others take 128 off, once for all products, and two more products put it back."""
    function = chain([(word(0x7F), word(0xFF))] * 3)
    split_dots(function, SIGNED)
    assert names(function) == ["dot4_i8i8"] * 3 and "xor" not in [op.name for op in function.walk()]
    function = chain([(word(0x80), word(0xFF)), (word(0x7F), word(0xFF))])
    split_dots(function, SIGNED)
    assert names(function) == ["dot4_i8i8"] * 4


def test_what_may_not_fit_is_widened_once() -> None:
    """129 * 128 * 2 does not fit a word; a row that two products read has its halves once."""
    function = chain([(word(0x81), word(0xFF))])
    split_dots(function, NOTHING)
    assert names(function) == ["widen_bytes"] * 4 + ["dot2_i16"] * 2
    text = "".join(f"%{n}: row<b32> = load %x_data {{dtype = :b32, disp = {32 * at}}}\n" for at, n in enumerate("abc"))
    text += ("%z: row<i32> = splat_const {value = 0}\n%p: row<i32> = dot4_u8i8 %z, %a, %b\n"
             "%q: row<i32> = dot4_u8i8 %p, %a, %c\nstore %q, %y_data {dtype = :i32}")
    function = program(text, LANES, ("x.data", "y.data"))
    split_dots(function, NOTHING)
    assert names(function).count("widen_bytes") == 6


@pytest.mark.parametrize("name", ["dot4_i8i8", "dot4_u8u8"])
@given(seed=st.integers(0, 99))
def test_bytes_of_one_sign_are_widened_as_they_are(name: str, seed: int) -> None:
    """Whatever bits they have: by words only."""
    function, split = (chain([(word(0x0F), word(0xFF)), (word(0xFF), word(0xFF))]) for _ in range(2))
    for one in (function, split):
        for op in one.walk():
            op.name = name if op.name == "dot4_u8i8" else op.name
    split_dots(split, NOTHING)
    verify(split, LANE_OPS)
    assert sorted(names(split)) == ["dot2_i16"] * 4 + ["widen_bytes"] * 8
    np.testing.assert_array_equal(results(split, 2, seed), results(function, 2, seed))


def test_a_target_with_the_instruction_keeps_it() -> None:
    function = chain([(word(0xFF), word(0xFF))])
    split_dots(function, frozenset({"dot4_u8i8"}))
    assert names(function) == ["dot4_u8i8"]


@given(unsigned=st.sampled_from([0xFF, 0x80, 0x7F, 0x0F, 1, 0]), signed=st.sampled_from([0xFF, 0x80, 0x7F, 7, 0]))
def test_the_range_of_pairs_holds_all_of_them(unsigned: int, signed: int) -> None:
    low, high = pair_range(word(unsigned), word(signed))
    left = {n & unsigned for n in range(256)}
    right = {(n & signed) - ((n & signed) >> 7 << 8) for n in range(256)}
    assert low <= 2 * min(a * b for a in left for b in right)
    assert high >= 2 * max(a * b for a in left for b in right)
    assert (low, high) in ((-2 * max(left) * 128, 2 * max(left) * 127), (0, 2 * max(left) * max(right)))


def test_halves_of_bf16_are_multiplied_apart_and_widened_once() -> None:
    """Denormal numbers and the order of the roundings included; row a is read by two products."""
    text = "%t: row<f32> = load %c_data {dtype = :f32}\n"
    text += "".join(f"%{n}: row<b32> = load %x_data {{dtype = :b32, disp = {32 * at}}}\n" for at, n in enumerate("abc"))
    text += ("%p: row<f32> = fma2_bf16 %t, %a, %b\n%q: row<f32> = fma2_bf16 %p, %c, %a\n"
             "store %q, %y_data {dtype = :f32}")
    bits = np.random.default_rng(5).integers(0, 1 << 16, (3, 2 * LANES)).astype(np.uint16)
    bits[0, :8], bits[1, :8] = [1, 0x8003, 0, 0x8000, 0x3F80, 0x4049, 0x0080, 0x7F7F], 0x3F81
    found = []
    for split in (False, True):
        function = program(text, LANES, ("x.data", "c.data", "y.data"))
        if split:
            split_dots(function, frozenset({"dot4_u8i8"}))
            verify(function, LANE_OPS)
            ops = [op.name for op in function.walk()]
            assert "fma2_bf16" not in ops and (ops.count("fma"), ops.count("shl"), ops.count("and")) == (4, 3, 3)
        rows = {"x": bits.view(np.uint32), "c": np.linspace(-1, 1, LANES, dtype=np.float32),
                "y": np.zeros(LANES, np.float32)}
        with np.errstate(all="ignore"):
            run(function, *bind_arguments(function, rows))
        found.append(rows["y"])
    np.testing.assert_array_equal(*found)


def test_bits_follow_shifts_and_masks() -> None:
    text = ("%x: row<i32> = load %x_data {dtype = :i32}\n%m: row<i32> = splat_const {value = 252645135}\n"
            "%s: row<i32> = shr %x {amount = 4}\n%k: row<i32> = and %s, %m\n%l: row<i32> = shl %k {amount = 2}\n"
            "%o: row<i32> = or %k, %l\n%n: row<i32> = add %k, %l\nstore %o, %y_data {dtype = :i32}\n"
            "store %n, %y_data {dtype = :i32}")
    function = program(text, LANES, ("x.data", "y.data"))
    found = [bits_of(op.result, {}) for op in function.walk() if op.results and op.result.type == ROW_I32]
    every = (1 << 32) - 1
    assert found == [every, word(0x0F), every >> 4, word(0x0F), word(0x3C), word(0x3F), every]


@pytest.mark.parametrize("between", ["", "store %o, %y_data {dtype = :i32, disp = 32}\n"], ids=["nothing", "a store"])
def test_what_sums_of_words_are_added_to_is_loaded_late(between: str) -> None:
    """Not past a store, which may be to the same place."""
    text = ("%o: row<i32> = splat_const {value = 15}\n%t: row<i32> = load_splat %c_data {dtype = :i32}\n"
            f"%p: row<i32> = load_splat %c_data {{dtype = :i32, disp = 4}}\n{between}%b: row<b32> = bitcast %o\n"
            "%a: row<b32> = load %a_data {dtype = :b32}\n%x: row<b32> = and %a, %b\n"
            "%q: row<i32> = dot4_u8i8 %t, %x, %a\n%r: row<i32> = dot4_u8i8 %q, %x, %a\n"
            "%s: row<i32> = add %r, %p\nstore %s, %y_data {dtype = :i32}")
    function = program(text, LANES, ("a.data", "c.data", "y.data"))
    split_dots(function, NOTHING)
    verify(function, LANE_OPS)
    order = [op.name for op in function.walk()]
    assert order[:order.index("pairs_u8i8")].count("load_splat") == (2 if between else 1)
    assert order.count("load_splat") == 2


def test_bits_of_what_is_loaded_are_what_the_load_says() -> None:
    text = ("%a: row<b32> = load %a_data {dtype = :b32, bits = 252645135}\n%u: row<i32> = load %a_data {dtype = :u8}\n"
            "%i: row<i32> = load %a_data {dtype = :i8}\n%b: row<b32> = bitcast %i\n"
            "store %a, %y_data {dtype = :b32}\nstore %u, %y_data {dtype = :i32}\nstore %b, %y_data {dtype = :b32}")
    function = program(text, LANES, ("a.data", "y.data"))
    verify(function, LANE_OPS)
    found = [bits_of(op.results[0], {}) for op in function.walk() if op.name == "load"]
    assert found == [word(0x0F), 0xFF, (1 << 32) - 1]
    arrays = {"a": np.full(4 * LANES, 0x0F, np.uint8), "y": np.zeros(LANES, np.int32)}
    run(function, *bind_arguments(function, arrays))
    arrays["a"][5] = 0x10
    with pytest.raises(LaneError, match="expected no bits but 0xf0f0f0f"):
        run(function, *bind_arguments(function, arrays))


@pytest.mark.parametrize("wrong", [
    "dtype = :i32, bits = 15", "dtype = :b32, bits = -1", "dtype = :b32, bits = 4294967296",
])
def test_bits_are_those_of_32(wrong: str) -> None:
    with pytest.raises(VerificationError, match="32 bits, unsigned, of b32"):
        program(f"%a: row<{'i32' if 'i32' in wrong else 'b32'}> = load %a_data {{{wrong}}}", LANES, ("a.data",))
