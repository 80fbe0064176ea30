"""Kernels of the forms that users write, drawn (tests/strategies/nests.py), as machine code, and as the lane IR that it
is selected from for processors that this one may not be."""

from __future__ import annotations

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sapper.codegen.pipeline import facts_of, finish_lane
from sapper.targets.x86_64.target import TARGETS
from sapper.tile.canonical import canonicalize
from sapper.tile.moved import move_as_integers
from sapper.tile.reduce_loops import reduce_loops
from sapper.tile.schedule import LoweringError
from tests.lane.run_lane import run_lane, specialize
from tests.strategies import KernelCase, assert_meaning, examples
from tests.strategies.nests import TILE_SIZES, hints, nests, packed

from .run_native import RUNNABLE, run_native

FOREIGN = ("zen4", "sapphirerapids", "graniterapids", "v4")
"""With packed dot products of bf16 and bytes, tile registers too, these and panels read from places, and none of it."""

MEDIUM = 5000
FEW_POINTS = 2000
"""Of nests that are run, and of those that are interpreted row by row."""


@settings(max_examples=examples(16))
@given(case=nests(MEDIUM), seed=st.integers(0, 1000), machine=st.sampled_from(RUNNABLE), threads=st.integers(1, 2),
       guess=st.integers(0, 2**32 - 1))
def test_machine_code(case: KernelCase, seed: int, machine: str, threads: int, guess: int) -> None:
    kernel = case.load()
    arguments = case.make_arguments(seed, hostile=False)
    run_native(kernel.tile_ir(), arguments, TARGETS[machine], threads, hints(case, guess), in_place=case.in_place)
    assert_meaning(case, kernel.tile_ir(), case.make_arguments(seed, hostile=False), arguments, TILE_SIZES)


@settings(max_examples=examples(32))
@given(case=nests(FEW_POINTS), seed=st.integers(0, 1000), machine=st.sampled_from(FOREIGN), workers=st.integers(1, 3),
       guess=st.integers(0, 2**32 - 1), packs=st.booleans())
def test_lanes(case: KernelCase, seed: int, machine: str, workers: int, guess: int, packs: bool) -> None:
    """packs: what may be packed is; where the kernel does more with it than panels serve, it is refused."""
    kernel, target = case.load(), TARGETS[machine]
    arguments = case.make_arguments(seed, hostile=False)
    function = reduce_loops(kernel.tile_ir())
    canonicalize(function)
    move_as_integers(function)
    matrices = packed(case, function, arguments, target) if packs else {}
    try:
        run_lane(function, arguments, None, facts_of(target), specialize(function, arguments, hints(case, guess)),
                 workers, passes=lambda lane: finish_lane(lane, target), packed=matrices)
    except LoweringError:
        assume(not matrices)
        raise
    assert_meaning(case, kernel.tile_ir(), case.make_arguments(seed, hostile=False), arguments, TILE_SIZES)
