"""`Tensor[dtype, *dims]`: the annotation of a kernel's tensor parameter."""

from __future__ import annotations

import linecache
import sys
from typing import Any

from ..ir.nodes import Location
from ..ir.types import DType, TensorType, bool_, spell_nested
from .dims import DimExpression, DimLike, extent_of
from .errors import KernelError

_OURS = {"float": "f32", "float64": "f64", "double": "f64", "float16": "f16", "half": "f16", "bfloat16": "bf16",
         "int": "i32", "int8": "i8", "uint8": "u8", "int16": "i16", "int32": "i32", "int64": "i64"}
"""What other libraries call the element types; float32 is the rest's."""


class TensorAnnotation:
    """What `Tensor[f32, M, 4]` gives. dtype, and dims: a Dim, an int or arithmetic on these for each dimension."""

    __slots__ = ("dims", "dtype")

    def __init__(self, dtype: DType, dims: tuple[DimLike, ...]) -> None:
        self.dtype = dtype
        self.dims = dims

    @property
    def type(self) -> TensorType:
        """The IR type: symbolic dims by name."""
        return TensorType(self.dtype, tuple(map(extent_of, self.dims)))

    def __repr__(self) -> str:
        return f"Tensor[{', '.join([self.dtype.name, *map(spell_nested, self.type.dims)])}]"


class Tensor:
    """`Tensor[f32, M, N]` annotates a two-dimensional tensor of f32, `Tensor[u8, N, K // 2]` one whose rows are half as
    long as another tensor's K.

    Raises KernelError (bad-annotation) if the first entry is no dtype, or another is neither a non-negative int, a Dim
    nor arithmetic on them.
    """

    def __class_getitem__(cls, items: Any) -> TensorAnnotation:
        entries = items if isinstance(items, tuple) else (items,)
        dtype = bool_ if entries[0] is bool else entries[0]
        if not isinstance(dtype, DType) or dtype.kind == "x":
            known = _OURS.get(getattr(dtype, "__name__", None) or str(dtype).rpartition(".")[2], "f32")
            raise _error(f"{dtype!r} as the element type", "a dtype of sapper's", f"write Tensor[{known}, M, N]")
        for entry in entries[1:]:
            if isinstance(entry, DimExpression) or (
                    isinstance(entry, int) and not isinstance(entry, bool) and entry >= 0):
                continue
            raise _error(f"{entry!r} as an extent", "a Dim, an int or arithmetic on them",
                         'name it: M, N = dims("M N")')
        return TensorAnnotation(dtype, entries[1:])


def _error(found: str, expected: str, mend: str) -> KernelError:
    caller = sys._getframe(2)
    line, last_line, column, end_column = tuple(caller.f_code.co_positions())[caller.f_lasti // 2]
    place = Location(caller.f_code.co_filename, caller.f_lineno, 1, 1)
    if column is not None and end_column is not None and line == last_line == place.line:
        source = linecache.getline(place.file, place.line).encode()  # columns are of bytes
        first, end = (len(source[:at].decode(errors="replace")) + 1 for at in (column, end_column))
        place = Location(place.file, place.line, first, end)
    return KernelError("bad-annotation", "Tensor[...] cannot be read", place, found, expected, mend)
