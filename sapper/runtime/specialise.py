"""What a call lets the compiler assume: the specialisation that code is made for.

Enters: the arguments of a call, bound. Leaves: `Specialisation`. Holds: calls of the same specialisation run the same
code, and everything that the code relies on is in it.

The contract of specialisation:
`compile_kernel(kernel, static_dims, unit_strides, dim_classes, target, schedule, aligned)`, where
    static_dims   {dim: extent}, compiled in as constants
    unit_strides  {tensor: "contiguous" | (stride of dimension i is 1, ...) | Panels}; of a contiguous tensor (C order)
                  the strides follow from its extents, another's are in the slots "a.stride.i"; of an extent of 1 a
                  stride may be anything, and flags for it say what the caller passed; Panels: it was packed
    dim_classes   {dim: (bound, divisor)}; bound 1 | 16 | 128 | 1024 | 8192 | 2**31-1, the least not below the extent,
                  except that 1 means exactly one (an extent of 0 is in class 16); divisor 64 | 16 | 1, the largest that
                  divides the extent; dims in static_dims have none
    aligned       names of large tensors whose data and rows all start at multiples of 64 bytes; of a GPU's, rows at
                  multiples of 16
and whose result is read by `CompiledKernel.of`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

from .arguments import Binding, Signature

if TYPE_CHECKING:
    from ..tile.schedule import StrideClass

DIM_CLASSES = (16, 128, 1024, 8192)
LARGEST_CLASS = 2**31 - 1
CACHE_LINE_BYTES = 64
LARGE_BYTES = 8 << 20
"""A tensor from this size on is not expected in the caches when it is read next: it may be stored past them, if it is
aligned to cache lines."""


def large_in_program(target: Any) -> int:
    """LARGE_BYTES of what a kernel of a program stores, which the next one reads, and whose memory others use in turn:
    half of the last cache. (In a prompt of 512 tokens to the bench's DeepSeek in Q8_0 on a Granite Rapids two kernels
    stored 9 MB past the caches; through them all take 257 ms in place of 288, those two 125 in place of 131.)"""
    return max(LARGE_BYTES, int(target.l3_bytes) // 2)


class Specialisation(NamedTuple):
    """What a kernel is compiled for; see the head of the module."""

    static_dims: tuple[tuple[str, int], ...]
    unit_strides: tuple[tuple[str, StrideClass], ...]
    dim_classes: tuple[tuple[str, tuple[int, int]], ...]
    aligned: tuple[str, ...] = ()

    @property
    def has_packed(self) -> bool:
        """Whether a tensor lies in panels (sapper.pack)."""
        return any(type(stride) not in (str, tuple) for _, stride in self.unit_strides)


def dim_class(extent: int) -> tuple[int, int]:
    """(least upper bound of the class, divisor) of an extent."""
    return extent_bound(extent), 64 if extent % 64 == 0 else 16 if extent % 16 == 0 else 1


def extent_bound(extent: int) -> int:
    if extent == 1:
        return 1
    for most in DIM_CLASSES:
        if extent <= most:
            return most
    return LARGEST_CLASS


def specialise(signature: Signature, binding: Binding, static: frozenset[str], large_bytes: int = LARGE_BYTES,
               row_bytes: int = CACHE_LINE_BYTES) -> Specialisation:
    """What a call lets the compiler assume. large_bytes, row_bytes: see aligned_tensors."""
    patterns: list[tuple[str, StrideClass]] = []
    for position, view in binding.tensors.items():
        name = signature.parameters[position].name
        patterns.append((name, view.panels or ("contiguous" if view.is_contiguous else
                                               tuple(s == 1 for s in view.strides))))
    fixed = tuple((dim, extent) for dim, extent in binding.dims.items() if dim in static)
    classes = tuple((dim, dim_class(extent)) for dim, extent in binding.dims.items() if dim not in static)
    return Specialisation(fixed, tuple(patterns), classes, aligned_tensors(signature, binding, large_bytes, row_bytes))


def aligned_tensors(signature: Signature, binding: Binding, large_bytes: int = LARGE_BYTES,
                    row_bytes: int = CACHE_LINE_BYTES) -> tuple[str, ...]:
    """Tensors of large_bytes or more whose data start at cache lines and whose rows at multiples of row_bytes: those of
    a CPU may be stored past the caches, those of a GPU copied in pieces of 16 bytes. Rows shorter than that (pairs)
    count as part of longer ones."""
    names = []
    for position, view in binding.tensors.items():
        size_bytes = view.dtype.size_bytes
        if (not view.address % CACHE_LINE_BYTES and size_bytes * math.prod(view.shape) >= large_bytes
                and view.strides and view.strides[-1] == 1
                and not any(s * size_bytes % row_bytes for s in view.strides[:-1]
                            if s * size_bytes not in (2, 4, 8))):
            names.append(signature.parameters[position].name)
    return tuple(names)
