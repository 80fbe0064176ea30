"""Whether a micro-kernel by hand computes what it stands for.

Enters: a `ContractionPiece` (lang/by_hand.py), a target. Leaves: a `Report`. Holds: the piece has been asked for every
tile that it is written for, on depths of no step, of one and of several with a rest, on rows side by side and apart, on
random and hostile values; interpreted from the meanings of its rows, and run between guard pages where this CPU can.
The kernel round it is always the same, so that the stations before lowering need no check again.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy

from ..ir.types import DType, f32, i32
from ..lang.builtins import tiles, zeros
from ..lang.by_hand import ContractionPiece
from ..lang.dims import dims
from ..lang.kernel import kernel
from ..lang.tensor import Tensor
from ..tile.rounding import Expectation
from ..tile.schedule import Schedule
from .cases import Case, shaped_cases
from .check import Finding, Report, check_lanes

M, N, K = dims("M N K")
_LEAST_NORMAL = 2.0**-126


@cache
def product_of(dtype: DType, rights: int = 1, right: DType | None = None, columns: bool = False) -> Any:
    """What every micro-kernel is the inside of: one left operand meets some right ones. dtype: of the left operand,
    right: of the others, where it is another. columns: the left operand lies the other way round."""
    right, result = right or dtype, f32 if dtype.is_float else i32
    if rights == 1 and columns:
        @kernel(name="micro_kernel_columns")
        def product(a: Tensor[dtype, K, M], b: Tensor[right, K, N], c: Tensor[result, M, N]):
            for m, n in tiles(M, N):
                total = zeros(m, n, dtype=result)
                for k in tiles(K):
                    total += a[k, m] @ b[k, n]
                c[m, n] = total
    elif rights == 1:
        @kernel(name="micro_kernel")
        def product(a: Tensor[dtype, M, K], b: Tensor[right, K, N], c: Tensor[result, M, N]):
            for m, n in tiles(M, N):
                total = zeros(m, n, dtype=result)
                for k in tiles(K):
                    total += a[m, k] @ b[k, n]
                c[m, n] = total
    else:
        @kernel(name="micro_kernel_2")
        def product(a: Tensor[dtype, M, K], b: Tensor[dtype, K, N], b1: Tensor[dtype, K, N], c: Tensor[f32, M, N],
                    c1: Tensor[f32, M, N]):
            for m, n in tiles(M, N):
                total, other = zeros(m, n, dtype=f32), zeros(m, n, dtype=f32)
                for k in tiles(K):
                    left = a[m, k]
                    total += left @ b[k, n]
                    other += left @ b1[k, n]
                c[m, n] = total
                c1[m, n] = other
    return product


product = product_of(f32)


def whole_of(piece: ContractionPiece) -> Any:
    """The product of matrices that a micro-kernel is checked in."""
    return product_of(piece.dtype, piece.rights, piece.right_dtype, piece.left == "columns")


def shapes(piece: ContractionPiece, lanes: int) -> Iterator[dict[str, int]]:
    """Extents at which the generated loops come to each tile of the piece, and to tiles that it does not take."""
    rows, columns, step, size = piece.rows[0], piece.vectors[0] * lanes, piece.step, piece.elements
    # A step of many rows ends in fours and ones; one of vectors in single ones, the last under a mask.
    for m, n, k in ((rows, columns, step), (rows, columns, 3 * step + step // 2), (2 * rows + 5, columns + lanes, step),
                    (rows + 4, 2 * columns + lanes + 3, 5 * step + 1), (rows, columns, step - 1)):
        yield {"M": m, "N": n, "K": k * size + (k % size if size > 1 else 0)}


def check_micro_kernel(piece: ContractionPiece, target: Any, seed: int = 0) -> Report:
    """The static checks, then the piece inside a product of matrices, at every station. The report's finding says what
    is wrong; it has one, too, if no case came to the piece."""
    from ..assembly.errors import AssemblyError

    name = piece.key.partition(":")[2]
    try:
        piece.check(target)
    except AssemblyError as error:
        return Report(name, finding=Finding("micro-kernels", name, str(error)))
    whole = whole_of(piece)
    known = [(case, _expectation(case, piece))
             for case in shaped_cases(whole, whole.tile_ir(), seed, shapes(piece, target.lanes))]
    report, used = check_lanes(whole, target, known, Schedule(assembly=(name,)))
    report.kernel = name
    if report.finding is None and piece.key not in used:
        report.finding = Finding("micro-kernels", name, "no tile of a product of matrices is one that it takes")
    return report


def _expectation(case: Case, piece: ContractionPiece) -> dict[str, Expectation]:
    """Each product: of integers what the wrapped sums are; else in f64, and how far a sum in f32 in any order may be
    from it (N. Higham, "Accuracy and Stability of Numerical Algorithms", 3.1): anything where a partial sum of the
    finite terms may overflow. Packed dot products take denormals for zero, of the elements as of each sum: such
    elements are not asked for, and a step may lose what lies below the least normal number."""
    flushes = piece.elements > 1 and piece.dtype.is_float
    found = {}
    for number in range(piece.rights):
        names = ("a", f"b{number or ''}")
        result = f"c{number or ''}"
        if not piece.dtype.is_float:
            exact = _left(case, piece).astype(numpy.int64) @ case.arguments[names[1]].astype(numpy.int64)
            found[result] = Expectation(result, i32, exact.astype(numpy.int32), numpy.zeros(exact.shape))
            continue
        for name in names if flushes else ():
            values = case.arguments[name]
            values[numpy.abs(values.astype(numpy.float64)) < _LEAST_NORMAL] = 0
        a, b = (v.astype(numpy.float64) for v in (_left(case, piece), case.arguments[names[1]]))
        with numpy.errstate(all="ignore"):
            values = (a @ b).astype(numpy.float32)
            finite = numpy.where(numpy.isfinite(a), abs(a), 0) @ numpy.where(numpy.isfinite(b), abs(b), 0)
        steps = a.shape[1]
        least = 2 * _LEAST_NORMAL if flushes else 2.0**-149
        bound = finite * (steps + 1) * 2.0**-23 + steps * least
        bound[finite > numpy.finfo(numpy.float32).max] = numpy.inf
        found[result] = Expectation(result, f32, values, bound)
    return found


def _left(case: Case, piece: ContractionPiece) -> Any:
    """The left operand, row by row."""
    return case.arguments["a"].T if piece.left == "columns" else case.arguments["a"]
