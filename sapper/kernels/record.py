"""What a kernel of the library brings along, so that check, bench and the command line can walk over all of them.

In: nothing. Out: the record types. Holds: a record's `make_arguments` gives the arguments in the order of the
kernel's parameters, and `reference` computes, from the same arguments, what each output must hold afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
Arguments = dict[str, Any]
"""Arguments by parameter name, in the order of the kernel's parameters: arrays, and Python numbers for scalars."""
Shape = Mapping[str, int]
"""Extent of each of the kernel's dimensions, and the value of integer scalars such as `position`, by name."""


@dataclass(frozen=True, slots=True)
class Tolerance:
    """How far a result may be from the reference: |found - expected| <= absolute + relative * |expected|.

    reason: why no less can be asked for.
    """

    relative: float
    absolute: float
    reason: str


EXACT = Tolerance(0.0, 0.0, "the result is a choice or a copy of inputs, there is no rounding")


@dataclass(frozen=True, slots=True)
class Case:
    """One shape to be timed. flops and bytes are what the task itself needs: the floor is the larger of
    flops / peak rate and bytes / bandwidth, every operand read once and every result written once.
    """

    shape: dict[str, int]
    flops: int
    bytes: int

    @property
    def label(self) -> str:
        return "x".join(str(extent) for extent in self.shape.values())


@dataclass(frozen=True, slots=True)
class LibraryKernel:
    """A kernel with its plain reference, its check and its benchmark.

    kernel: what `@sapper.kernel` made.
    reference: arguments -> the expected contents of each output, by parameter name, computed in float64.
    make_arguments: random generator, shape -> arguments. Outputs are filled with NaN or -1, so that an element
        that was not written is found.
    tolerance: of the outputs.
    cases: shapes to time. check_shapes: small, ragged and empty shapes to check.
    dtype: what the case is called in tables: the type of the weights, or else of the activations.
    products: of which type its products are, and so which peak bounds it: "f32", "bf16" or "i8".
    peers: name ("numpy", "torch") -> function that takes the arguments and returns a closure to be timed, which
        does the same work into its own output.
    """

    name: str
    kernel: Any
    reference: Callable[[Arguments], dict[str, Array]]
    make_arguments: Callable[[np.random.Generator, Shape], Arguments]
    tolerance: Tolerance
    cases: tuple[Case, ...]
    check_shapes: tuple[dict[str, int], ...]
    dtype: str = "f32"
    products: str = "f32"
    peers: dict[str, Callable[[Arguments], Callable[[], Any]]] = field(default_factory=dict)

    def compare(self, arguments: Arguments, expected: Mapping[str, Array]) -> str | None:
        """None if every output in `arguments` is as `expected` within the tolerance; else what is wrong and where."""
        for name, wanted in expected.items():
            found = np.asarray(arguments[name]).astype(np.float64)
            wanted64 = np.asarray(wanted).astype(np.float64)
            if found.shape != wanted64.shape:
                return f"{self.name}: {name} has shape {found.shape}, expected {wanted64.shape}"
            with np.errstate(invalid="ignore"):
                limit = self.tolerance.absolute + self.tolerance.relative * np.abs(wanted64)
                near = np.abs(found - wanted64) <= limit
            good = near | (found == wanted64) | (np.isnan(found) & np.isnan(wanted64))
            if not good.all():
                place = tuple(int(i) for i in np.argwhere(~good)[0])
                return (
                    f"{self.name}: {name}{list(place)} is {found[place]!r}, expected {wanted64[place]!r} "
                    f"({int((~good).sum())} of {good.size} elements differ; tolerance relative "
                    f"{self.tolerance.relative:g}, absolute {self.tolerance.absolute:g})"
                )
        return None


NUMPY_DTYPES: dict[str, np.dtype[Any]] = {
    "f32": np.dtype(np.float32),
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "i32": np.dtype(np.int32),
}


def normal(random: np.random.Generator, *extents: int, dtype: str = "f32", scale: float = 1.0) -> Array:
    """Normally distributed values of the given extents and type."""
    return (random.standard_normal(extents, dtype=np.float32) * np.float32(scale)).astype(NUMPY_DTYPES[dtype])


def unwritten(*extents: int, dtype: str = "f32") -> Array:
    """An output to be filled: NaN, or -1 for integers, so that an element that stays unwritten is found."""
    return np.full(extents, -1 if dtype == "i32" else np.nan, dtype=NUMPY_DTYPES[dtype])


def rounded_to_bf16(tolerance: Tolerance) -> Tolerance:
    """The same for a result that is then rounded to bf16, whose significands have 8 bits."""
    return Tolerance(2.0**-8 + 2 * tolerance.relative, 1.01 * tolerance.absolute + 1e-40,
                     f"{tolerance.reason}; then half a unit of 8 bits")


def torch_view(array: Array) -> Any:
    """A torch tensor of the same memory; NumPy has no bf16 that torch knows."""
    import torch

    if array.dtype == NUMPY_DTYPES["bf16"]:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)
