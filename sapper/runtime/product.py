"""Whether a product of fragments by hand computes what it stands for.

Enters: a `ProductPiece` (lang/by_hand.py), a target. Leaves: a `Report`. Holds: the piece has been checked statically,
and run from the meanings of its rows on whole numbers, random and hostile values, from sums of zero and others, every
element of every fragment compared with the product of the matrices that the registers hold (lane/fragments.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy

from ..lane import fragments
from ..lang.by_hand import ProductPiece
from .check import Finding, Report
from .dtypes import numpy_dtype

CASES = 5
_HOSTILE = (0.0, -0.0, 1.0, -1.0, float("inf"), float("-inf"), float("nan"), 3.0e38, 1.0e-3)


def check_product(piece: ProductPiece, target: Any, seed: int = 0) -> Report:
    """The report's finding says what is wrong."""
    from ..assembly.errors import AssemblyError

    report = Report(piece.name)
    try:
        piece.check_op(None, target)
        for label, left, right, sums in _cases(piece, numpy.random.default_rng(seed)):
            found = piece.run(_registers(left, piece, *fragments.A), _registers(right, piece, *fragments.B),
                              [row for matrix in sums for row in matrix[fragments.C]])
            report.cases += 1
            wrong = _mismatch(piece, left, right, sums, found)
            if wrong:
                report.finding = Finding("products", label, wrong)
                return report
    except AssemblyError as error:
        report.finding = Finding("products", piece.name, str(error))
        return report
    report.passed["products"] = report.cases
    return report


def _cases(piece: ProductPiece, random: Any) -> Iterator[tuple[str, list[Any], list[Any], list[Any]]]:
    """(label, left, right, sums): matrices, of sums row by row of fragments."""
    dtype = numpy_dtype(piece.dtype)
    shapes = (fragments.ROWS, fragments.DEPTH), (fragments.DEPTH, fragments.COLUMNS)

    def whole(shape: tuple[int, int]) -> Any:
        return random.integers(-8, 9, shape).astype(numpy.float32)

    def normal(shape: tuple[int, int]) -> Any:
        return random.standard_normal(shape, dtype=numpy.float32)

    def hostile(shape: tuple[int, int]) -> Any:
        rare = random.random(shape) < 0.01
        values = numpy.array(_HOSTILE if piece.dtype.name == "bf16" else [v for v in _HOSTILE if not v > 1e38],
                             numpy.float32)
        return numpy.where(rare, values[random.integers(0, len(values), shape)], whole(shape)).astype(numpy.float32)

    for number in range(CASES):
        draw, label = (whole, "whole numbers") if number < 2 else (normal, "random") if number < 4 else (
            hostile, "hostile values")
        left = [draw(shapes[0]).astype(dtype) for _ in range(piece.rows)]
        right = [draw(shapes[1]).astype(dtype) for _ in range(piece.columns)]
        shape = fragments.ROWS, fragments.COLUMNS
        sums = [draw(shape) if number % 2 else numpy.zeros(shape, numpy.float32)
                for _ in range(piece.rows * piece.columns)]
        yield f"{label}, {'sums' if number % 2 else 'zeros'} before", left, right, sums


def _registers(matrices: list[Any], piece: ProductPiece, rows: Any, columns: Any) -> list[Any]:
    """The registers of fragments: two elements of 16 bits in each."""
    found = []
    for matrix in matrices:
        bits = matrix.view(numpy.uint16).astype(numpy.uint32)[rows, columns]    # [register, slot, lane]
        found += list(bits[:, 0] | bits[:, 1] << numpy.uint32(16))
    return found


def _mismatch(piece: ProductPiece, left: list[Any], right: list[Any], sums: list[Any], found: list[Any]) -> str:
    """What is wrong with the new sums, "" for nothing: a sum in f32 in any order is allowed."""
    for i, a in enumerate(left):
        for j, b in enumerate(right):
            at = i * piece.columns + j
            wide = a.astype(numpy.float64), b.astype(numpy.float64)
            with numpy.errstate(all="ignore"):
                expected = (wide[0] @ wide[1] + sums[at])[fragments.C]
                size = (abs(wide[0]) @ abs(wide[1]) + abs(sums[at]))[fragments.C]
                bound = numpy.where(numpy.isfinite(size), size * (fragments.DEPTH + 1) * 2.0**-23, numpy.inf)
                bound = numpy.where(size > numpy.finfo(numpy.float32).max, numpy.inf, bound)
                got = numpy.stack(found[4 * at:4 * at + 4]).astype(numpy.float64)
                both = (numpy.isnan(expected) & numpy.isnan(got)) | (expected == got)
                off = ~both & ~(abs(got - expected) <= bound)
                off |= numpy.isnan(expected) != numpy.isnan(got)
                off &= ~(numpy.isinf(bound) & numpy.isfinite(size))     # a partial sum may overflow
            if off.any():
                register, lane = (int(n[0]) for n in numpy.nonzero(off))
                return (f"sums[{i}][{j}][{register}] of lane {lane} is {got[register, lane]}; expected "
                        f"{expected[register, lane]} +- {bound[register, lane]:.3g} ({int(off.sum())} of {off.size} "
                        "elements are wrong)")
    return ""
