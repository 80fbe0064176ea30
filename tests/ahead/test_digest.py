"""The digest of weights: machine code against the specification, written in Python."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sapper.ahead.digest import digest

MASK = (1 << 64) - 1
P1, P2, P3 = 11400714785074694791, 14029467366897019727, 1609587929392839161
P4, P5 = 9650029242287828579, 2870177450012600261


def rotate(value: int, by: int) -> int:
    return (value << by | value >> 64 - by) & MASK


def one_round(total: int, lane: int) -> int:
    return rotate((total + lane * P2) & MASK, 31) * P1 & MASK


def reference(content: bytes) -> int:
    """XXH64 with seed 0, step by step as the specification has it."""
    here = 0
    if len(content) >= 32:
        sums = [(P1 + P2) & MASK, P2, 0, -P1 & MASK]
        while here + 32 <= len(content):
            for i in range(4):
                sums[i] = one_round(sums[i], int.from_bytes(content[here + 8 * i : here + 8 * i + 8], "little"))
            here += 32
        value = sum(rotate(s, by) for s, by in zip(sums, (1, 7, 12, 18), strict=True)) & MASK
        for s in sums:
            value = ((value ^ one_round(0, s)) * P1 + P4) & MASK
    else:
        value = P5
    value = (value + len(content)) & MASK
    while here + 8 <= len(content):
        value = (rotate(value ^ one_round(0, int.from_bytes(content[here : here + 8], "little")), 27) * P1 + P4) & MASK
        here += 8
    if here + 4 <= len(content):
        lane = int.from_bytes(content[here : here + 4], "little")
        value = (rotate(value ^ lane * P1 & MASK, 23) * P2 + P3) & MASK
        here += 4
    for byte in content[here:]:
        value = rotate(value ^ byte * P5 & MASK, 11) * P1 & MASK
    value = (value ^ value >> 33) * P2 & MASK
    value = (value ^ value >> 29) * P3 & MASK
    return value ^ value >> 32


@pytest.mark.parametrize(("content", "expected"), [
    (b"", 0xEF46DB3751D8E999), (b"a", 0xD24EC4F1A98C6E5B), (b"abc", 0x44BC2CF5AD770999),
    (b"Nobody inspects the spammish repetition", 0xFBCEA83C8A378BF1),
])
def test_known_digests(content: bytes, expected: int) -> None:
    assert digest(content) == reference(content) == expected


@given(st.integers(0, 200), st.integers(0, 2**32))
def test_any_length(count: int, seed: int) -> None:
    content = np.random.default_rng(seed).integers(0, 256, count, np.uint8).tobytes()
    assert digest(content) == reference(content)
