"""Comparisons. Why a result may differ from the reference, and by how much, is said where it is computed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sapper.ir.nodes import Function
from sapper.ir.types import DType
from sapper.tile.rounding import Expectation, expect, ulp

from .kernel_case import KernelCase


def tolerance(dtype: DType, reduction_length: int = 1, function_ulps: int = 4) -> float:
    """The relative error of one sum of `reduction_length` products of functions, in units of the sum of magnitudes.

    A sum of n terms in any order is off by at most (n - 1) u of the sum of magnitudes, u = half an ulp (N. Higham,
    "Accuracy and Stability of Numerical Algorithms", 2nd edition, section 4.2). With random signs of the errors it
    grows with the root of n; four times that is never met in practice and still finds a dropped term. bf16 and f16
    sum in f32 and round once, so only the f32 part grows. Integers are exact.
    """
    if not dtype.is_float:
        return 0.0
    inside = 2.0**-53 if dtype.name == "f64" else 2.0**-24
    outside = {"bf16": 2.0**-8, "f16": 2.0**-11}.get(dtype.name, 0.0)
    return inside * (2 * function_ulps + 4 * math.sqrt(reduction_length)) + outside


def assert_agree(actual: np.ndarray, expected: np.ndarray, dtype: DType, reduction_length: int = 1) -> None:
    """Assert that two arrays agree within `tolerance`; NaN agrees with NaN, an infinity with itself.

    The sum of magnitudes is not known here; the largest magnitude in the result stands for it, so this is for well
    conditioned kernels. For any kernel use sapper.tile.rounding.expect, and assert_expected.
    """
    assert actual.shape == expected.shape, f"shape {actual.shape}; expected {expected.shape}"
    assert actual.dtype == expected.dtype, f"{actual.dtype}; expected {expected.dtype}"
    if not dtype.is_float:
        np.testing.assert_array_equal(actual, expected)
        return
    wide, reference = actual.astype(np.float64), expected.astype(np.float64)
    finite = np.isfinite(reference)
    largest = float(np.max(np.abs(reference[finite]), initial=0.0))
    bound = tolerance(dtype, reduction_length) * largest + ulp(expected, dtype)
    with np.errstate(invalid="ignore"):
        good = (wide == reference) | (np.isnan(wide) & np.isnan(reference)) | (
            finite & (np.abs(wide - reference) <= bound))
    wrong = np.argwhere(~good)
    assert not wrong.size, (
        f"{len(wrong)} of {actual.size} elements differ, first at {wrong[0].tolist()}: {wide[tuple(wrong[0])]!r}; "
        f"expected {reference[tuple(wrong[0])]!r} +- {np.broadcast_to(bound, wide.shape)[tuple(wrong[0])]:.3g}")


def assert_expected(actual: Mapping[str, Any], expectations: Mapping[str, Expectation], note: str = "") -> None:
    """Assert that every tensor holds what sapper.tile.rounding.expect found; note is printed on failure."""
    wrong = [text for name, expectation in expectations.items()
             if (text := expectation.mismatch(actual[name])) is not None]
    assert not wrong, "\n".join([*wrong, note])


def assert_meaning(case: KernelCase, function: Function, given: Mapping[str, Any], left: Mapping[str, Any],
                   tile_sizes: Sequence[int | None]) -> None:
    """Assert that a run on arguments like `given` left what the kernel means.

    In a few runs with random rounding the moves of a short sum may cancel in each: what is wrong then is asked again.
    """
    expected = case.settled(expect(function, given, tile_sizes=tile_sizes))
    if any(one.mismatch(left[name]) is not None for name, one in expected.items()):
        more = expect(function, given, runs=16, seed=1000, tile_sizes=tile_sizes)
        for name, one in expected.items():
            np.maximum(one.bound, more[name].bound, out=one.bound)
    assert_expected(left, expected, repr(case))
