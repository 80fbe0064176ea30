"""Sums of 8-bit floats with as few bits as tensor cores keep: their arithmetic, and what summing in blocks makes of it.

Numbers are drawn without the smallest ones, which have no leading 1: of the others a product is at least the power of
two by which it is aligned, so that every bound below follows from how many terms are cut, and where.
"""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sapper import emulate
from sapper.emulate import Options
from sapper.targets.ptx.short_sums import ShortSum, add_products, short_sum
from sapper.tile.schedule import Schedule
from tests.strategies.amount import examples

from .narrow import block_scaled, unscaled

DATA = Path(__file__).parents[2] / "emulate" / "data"
ADA, HOPPER = ShortSum(16, 13), ShortSum(32, 13)
DTYPES = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}
LEAST = {"e4m3": -6, "e5m2": -14, "sum": -126}
SHORT = Options(short_sums=True)
LOST = Fraction(34, 1 << 13)
"""Of the largest of 32 products and the sum so far, what an instruction loses at most: 33 terms are cut by less than
2^-13 of it each, and so is their sum, which is as large as all of them; see `bound`."""


def exponent(value: Fraction, least: int) -> int:
    if value == 0:
        return -10000
    found = math.floor(math.log2(abs(value)))
    found += (abs(value) >= Fraction(2) ** (found + 1)) - (abs(value) < Fraction(2) ** found)
    return max(found, least)


def cut(value: Fraction, highest: int, bits: int) -> Fraction:
    unit = Fraction(2) ** (highest - bits)
    return math.trunc(value / unit) * unit


def by_hand(how: ShortSum, types: tuple[str, str], a: list[float], b: list[float], total: float) -> Fraction:
    """One sum, in fractions."""
    known = Fraction(total)
    for start in range(0, len(a), how.products):
        pairs = [(Fraction(x), Fraction(y)) for x, y in zip(a[start:start + how.products],
                                                            b[start:start + how.products], strict=True)]
        highest = max([exponent(known, LEAST["sum"]), *(exponent(x, LEAST[types[0]]) + exponent(y, LEAST[types[1]])
                                                        for x, y in pairs)])
        if highest > -1000:
            known = cut(known, highest, how.bits) + sum(cut(x * y, highest, how.bits) for x, y in pairs)
        known = cut(known, exponent(known, LEAST["sum"]), how.bits) if known else known
    return known


@settings(max_examples=examples(60), deadline=None)
@given(st.sampled_from([ADA, HOPPER]), st.sampled_from(sorted(DTYPES)), st.sampled_from(sorted(DTYPES)),
       st.integers(0, 2**32 - 1), st.integers(-30, 30))
def test_every_bit_is_as_in_fractions(how: ShortSum, left: str, right: str, seed: int, size: int) -> None:
    """Any bytes but those that are no number, subnormals included; sums so far of any size and number of bits."""
    random = np.random.default_rng(seed)
    a, b = (random.integers(0, 256, (2, 32), np.uint8).view(DTYPES[kind]).astype(np.float32)
            for kind in (left, right))
    a, b = (np.where(np.isfinite(x) & (random.random(x.shape) < 0.9), x, np.float32(0)) for x in (a, b))
    sums = np.ldexp(random.standard_normal((2, 2)), size).astype(np.float32)
    sums[0, 0] = 0
    found = add_products(how, (left, right), a, b.T, sums)
    assert found.dtype == np.float32
    for i in range(2):
        for j in range(2):
            assert Fraction(float(found[i, j])) == by_hand(how, (left, right), a[i].tolist(), b[j].tolist(),
                                                           float(sums[i, j]))


@pytest.mark.parametrize(("a", "b", "before", "after"), [
    ([128.0, -128.0], [128.0, 128.0], 3.0, 2.0),            # a unit of 2^14 / 2^13
    ([128.0, -128.0], [128.0, 128.0], -3.0, -2.0),          # toward zero
    ([128.0, -128.0], [192.0, 192.0], 3.0, 2.0),            # 1.5 * 2^14: the same unit,
    ([192.0, -192.0], [192.0, 192.0], 3.0, 2.0),            # also where the product of two 1.5 is above 2^15
    ([1.0], [2.0**-9], 0.0, 2.0**-9),
    ([1.0, 1.0], [1.0, 2.0**-9], 16.0, 17.0 + 2.0**-9),     # the last bit that a sum of 17 keeps
    ([1.0, 1.0], [1.0, 2.0**-9], 32.0, 33.0)])
def test_what_is_kept(a: list[float], b: list[float], before: float, after: float) -> None:
    left, right = np.zeros((1, 32), np.float32), np.zeros((32, 1), np.float32)
    left[0, :len(a)], right[:len(b), 0] = a, b
    (found,), = add_products(HOPPER, ("e4m3", "e4m3"), left, right, np.array([[before]], np.float32))
    assert found == after


def test_ada_adds_half_of_the_products_first() -> None:
    """The second half meets the sum of the first; where all are added at once, what is small is cut in both."""
    a = np.full((1, 32), 2.0**-6, np.float32)
    b, a[0, 31] = np.full((32, 1), 2.0**-3, np.float32), 128.0
    b[31] = 128.0
    before = np.array([[-2.0**14]], np.float32)
    assert add_products(HOPPER, ("e4m3", "e4m3"), a, b, before) == 0
    assert add_products(ADA, ("e4m3", "e4m3"), a, b, before * 0) == 2.0**14
    b[31] = -128.0
    assert add_products(ADA, ("e4m3", "e4m3"), a, b, -before) == 0
    a[0, 31], a[0, 0], b[0] = 2.0**-6, 128.0, -128.0
    b[31] = 2.0**-3
    assert add_products(ADA, ("e4m3", "e4m3"), a, b, -before) == 16 * 2.0**-9


def test_what_is_no_number_stays_so() -> None:
    a, b = np.zeros((1, 32), np.float32), np.ones((32, 1), np.float32)
    for value, wanted in ((np.inf, np.inf), (-np.inf, -np.inf), (np.nan, np.nan)):
        a[0, 3] = value
        np.testing.assert_array_equal(add_products(HOPPER, ("e5m2", "e5m2"), a, b, np.ones((1, 1), np.float32)),
                                      [[wanted]])
    a[0, 3] = 0
    np.testing.assert_array_equal(add_products(HOPPER, ("e5m2", "e5m2"), a, b, np.full((1, 1), -np.inf, np.float32)),
                                  [[-np.inf]])


def test_sums_of_f16_are_rounded_to_nearest() -> None:
    a, b = np.zeros((1, 32), np.float32), np.ones((32, 1), np.float32)
    a[0, 0] = 0.75
    assert add_products(HOPPER, ("e4m3", "e4m3"), a, b, np.full((1, 1), 2048, np.float16)) == np.float16(2048)
    a[0, 0] = 1.5
    assert add_products(HOPPER, ("e4m3", "e4m3"), a, b, np.full((1, 1), 2048, np.float16)) == np.float16(2050)


def test_levels() -> None:
    e4m3 = ("e4m3", "e4m3")
    assert short_sum("sm_90a", "wgmma", e4m3) == HOPPER and short_sum("sm_89", "mma", ("e5m2", "e4m3")) == ADA
    assert all(short_sum(level, "mma", e4m3) is None for level in ("sm_90", "sm_100a", "sm_120"))
    assert short_sum("sm_90a", "wgmma", ("bf16", "bf16")) is None


# ------------------------------------------------------------------------- what long sums lose, and blocks of 128 keep

def numbers(shape: tuple[int, int], signed: bool, seed: int) -> np.ndarray[Any, Any]:
    random = np.random.default_rng(seed)
    made = random.uniform(2.0**-6, 1, shape)
    return (np.where(random.random(shape) < 0.5, -made, made) if signed else made).astype(DTYPES["e4m3"])


def bound(size: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """What a sum loses at most that is made in blocks of 128. size: the sum of |a b|.

    Of a block's four instructions each loses at most LOST of what its products, and those before, sum up to in size:
    4 * 34 / 2^13 = 1.7 % of the block's part of `size`. f32 adds up the blocks.
    """
    return size * (4 * float(LOST) + 2.0**-20)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("signed", [False, True], ids=["positive", "signed"])
@pytest.mark.parametrize(("level", "file"), [("sm_90a", "triton_matmul_e4m3_sm90"),
                                              ("sm_89", "triton_matmul_e4m3_sm89")])
def test_blocks_of_128_keep_what_one_long_sum_loses(level: str, file: str, signed: bool) -> None:
    """K = 4096: another compiler's kernel, whose instructions add up all of it, and ours, where f32 does after 128."""
    m, n, k = 64, 64, 4096
    a, b = numbers((m, k), signed, 0), numbers((n, k), signed, 1)
    wide, right = a.astype(np.float64), b.astype(np.float64).T
    exact, size = wide @ right, np.abs(wide) @ np.abs(right)
    module = emulate.load((DATA / f"{file}.ptx").read_text(encoding="utf-8"))

    def lost(options: Options, ours: bool) -> np.ndarray[Any, Any]:
        c = np.full((m, n), np.nan, np.float32)
        if ours:
            emulate.run(unscaled, a, b, c, target=level, workers=1, aligned="abc", options=options,
                        schedule=Schedule(tile={"m": 64, "n": 64}) if level == "sm_90a" else None)
        else:
            module.launch(grid=(1, 1), arguments=[a, b, c, m, n, k, k, k, n, 0, 0], shared_bytes=24576, options=options)
        return np.abs(c - exact)

    assert (lost(Options(), False) <= size * 2.0**-20).all()
    whole, blocks = lost(SHORT, False), lost(SHORT, True)
    assert (blocks <= bound(size)).all()
    assert (blocks / size).max() < 1e-3 and whole.mean() > 5 * blocks.mean()
    assert signed or (whole / exact).min() > 0.02


def test_scales_of_blocks_come_after_the_short_sums() -> None:
    m, n, k = 64, 128, 512
    a, b = numbers((m, k), True, 2), numbers((n, k), True, 3)
    random = np.random.default_rng(4)
    sa, sb = random.uniform(0.5, 2, (m, k // 128)).astype(np.float32), random.uniform(0.5, 2, (1, k // 128)).astype(
        np.float32)
    c = np.zeros((m, n), ml_dtypes.bfloat16)
    emulate.run(block_scaled, a, sa, b, sb, c, target="sm_90a", workers=1, aligned="abc", options=SHORT)
    wide, right = a * np.repeat(sa.astype(np.float64), 128, 1), (b * np.repeat(sb.astype(np.float64), 128, 1)).T
    wrong = np.abs(c.astype(np.float64) - wide @ right)
    assert (wrong <= bound(np.abs(wide) @ np.abs(right)) + 2.0**-8 * np.abs(wide @ right)).all()
