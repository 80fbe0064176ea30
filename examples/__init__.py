"""Kernels as users write them: plain loops, no tile size, no chip, each beside the NumPy that says the same.

    python bench/examples.py [WORD]        each beside NumPy and PyTorch

Every module ends in EXAMPLES. The tests run them all by machine code and by the interpreter, on extents that fit
nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np

MODULES = ("attention", "convolution", "images", "numerics", "recurrent", "search", "statistics", "training")

Shape = Mapping[str, int]
Arguments = Sequence[Any]


@dataclass(frozen=True)
class Example:
    """make_arguments: the inputs of a call for some extents, and arrays for its results, which come last. reference:
    what these shall hold, from the inputs. shape: the extents that are timed; small: those that tests take, too. torch:
    the same in PyTorch, from the inputs as tensors."""

    kernel: Any
    make_arguments: Callable[[np.random.Generator, Shape], Arguments]
    reference: Callable[..., Sequence[Any]]
    shape: Shape
    small: Shape
    torch: Callable[..., Any] | None = None
    results: int = 1
    tolerance: float = 2e-5
    """Of the largest element of a result: f32 sums of some hundred products, in another order."""

    @property
    def name(self) -> str:
        return str(self.kernel.name)

    def split(self, arguments: Arguments) -> tuple[Arguments, Arguments]:
        """Inputs and results."""
        return arguments[:-self.results], arguments[-self.results:]


def normal(random: np.random.Generator, *extents: int) -> Any:
    return random.standard_normal(extents, dtype=np.float32)


def empty(*extents: int, dtype: Any = np.float32) -> Any:
    return np.empty(extents, dtype)


def examples() -> list[Example]:
    return [one for module in MODULES for one in import_module(f"{__name__}.{module}").EXAMPLES]
