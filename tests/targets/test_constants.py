"""Numbers as bits: of floats the nearest, beyond the largest infinite, of integers as they wrap."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sapper.ir.types import b32, f32, f64, i32, i64
from sapper.targets.constants import constant_bits


@given(number=st.floats())
def test_floats_are_rounded_to_the_nearest(number: float) -> None:
    with np.errstate(over="ignore"):
        assert constant_bits(f32, number) == int(np.float32(number).view(np.uint32))
    assert constant_bits(f64, number) == int(np.float64(number).view(np.uint64))


@pytest.mark.parametrize(("dtype", "number", "bits"), [
    (f32, 3.5e38, 0x7F800000), (f32, -3.5e38, 0xFF800000), (i32, -1, 0xFFFFFFFF), (b32, 0x80808080, 0x80808080),
    (i64, -2, (1 << 64) - 2)])
def test_what_does_not_fit(dtype, number, bits) -> None:
    assert constant_bits(dtype, number) == bits
