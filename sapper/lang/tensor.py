"""`Tensor[dtype, *dims]`: the annotation of a kernel's tensor parameter."""

from __future__ import annotations

import sys
from typing import Any

from ..ir.nodes import Location
from ..ir.types import DType, TensorType, bool_
from .dims import Dim, DimExpression
from .errors import KernelError


class TensorAnnotation:
    """What `Tensor[f32, M, 4]` gives. dtype, and dims: a Dim or an int for each dimension."""

    __slots__ = ("dims", "dtype")

    def __init__(self, dtype: DType, dims: tuple[Dim | int, ...]) -> None:
        self.dtype = dtype
        self.dims = dims

    @property
    def type(self) -> TensorType:
        """The IR type: symbolic dims by name."""
        return TensorType(self.dtype, tuple(d.name if isinstance(d, Dim) else d for d in self.dims))

    def __repr__(self) -> str:
        return f"Tensor[{', '.join([self.dtype.name, *map(str, self.dims)])}]"


class Tensor:
    """`Tensor[f32, M, N]` annotates a two-dimensional tensor of f32.

    Raises KernelError (bad-annotation) if the first entry is no dtype, or another is neither a Dim nor a
    non-negative int.
    """

    def __class_getitem__(cls, items: Any) -> TensorAnnotation:
        entries = items if isinstance(items, tuple) else (items,)
        dtype = bool_ if entries[0] is bool else entries[0]
        if not isinstance(dtype, DType) or dtype.kind == "x":
            raise _error(f"{dtype!r} as the element type", "a dtype such as f32", "write Tensor[f32, M, N]")
        for entry in entries[1:]:
            if isinstance(entry, Dim) or (isinstance(entry, int) and not isinstance(entry, bool) and entry >= 0):
                continue
            mend = 'name it: M, N = dims("M N")'
            if isinstance(entry, DimExpression):
                mend = "give this extent a Dim of its own"
            raise _error(f"{entry!r} as an extent", "a Dim or an int", mend)
        return TensorAnnotation(dtype, entries[1:])


def _error(found: str, expected: str, mend: str) -> KernelError:
    caller = sys._getframe(2)
    place = Location(caller.f_code.co_filename, caller.f_lineno, 1, 1)
    return KernelError("bad-annotation", "Tensor[...] cannot be read", place, found, expected, mend)
