"""Kernels of the forms that users write, drawn (tests/strategies/nests.py), as PTX on the emulator: races, reads of
what nobody wrote, and bounds are looked for. Where a warp may not wait as it must, the kernel does not compile."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from sapper import emulate
from sapper.codegen.pipeline import compile_kernel
from sapper.targets import target
from tests.lane.run_lane import specialize
from tests.strategies import KernelCase, assert_meaning, examples
from tests.strategies.nests import TILE_SIZES, hints, nests

FEW_POINTS = 1000
LARGE = 2**31 - 1
"""A class of extents from which code for many is made."""


@settings(max_examples=examples(8))
@given(case=nests(FEW_POINTS), seed=st.integers(0, 1000), level=st.sampled_from(["sm_80", "sm_90a", "sm_90a"]),
       lazy=st.booleans(), large=st.integers(0, 2**32 - 1))
def test_emulated(case: KernelCase, seed: int, level: str, lazy: bool, large: int) -> None:
    """large: which extents the code takes for large, whatever they are."""
    kernel = case.load()
    arguments = case.make_arguments(seed, hostile=False, strided=False)
    known = specialize(kernel.tile_ir(), arguments)
    guessed = hints(case, large)
    code = compile_kernel(kernel, {}, known.strides, {
        dim: (LARGE if guessed[dim] > 100 else 128, kind.divisor) for dim, kind in known.dims.items()},
        target(level), None)
    emulate.run(kernel, *arguments.values(), target=level, workers=5, code=code, options=emulate.Options(lazy=lazy))
    assert_meaning(case, kernel.tile_ir(), case.make_arguments(seed, hostile=False, strided=False), arguments,
                   TILE_SIZES)
