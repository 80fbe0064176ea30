"""Kernels as machine code on this processor, at every width that it runs: random ones and the whole library.

Every run is in a child process with its buffers against guard pages, at their ends and at their starts; the
register allocation is proved by the independent checker.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sapper as sp
from sapper import Tensor, each, i32, i64
from sapper.codegen.machine import Instruction
from sapper.codegen.pipeline import HINTS, LARGE
from sapper.ir.text import parse_function
from sapper.kernels import library
from sapper.runtime.launch import Launcher
from sapper.runtime.specialise import Specialisation, specialise
from sapper.targets import host_target
from sapper.targets.x86_64.target import TARGETS
from sapper.tile.ops import TILE_OPS
from sapper.tile.rounding import expect
from tests.lane.run_lane import specialize
from tests.lang.test_random_kernels import kernel_of
from tests.strategies import FUZZ, assert_expected, built, examples, kernels
from tests.strategies.sums import arguments_of_sums, sums

from .run_native import PLACEMENTS, RUNNABLE, compile_checked, run_compiled, run_native, threads_of

N = sp.dims("N")
MACHINES = [name for name in ("v3", "v4", "zen4") if name in RUNNABLE]
LIBRARY = library()


@pytest.mark.sampled(2)
@pytest.mark.parametrize("place", range(len(LIBRARY)), ids=[entry.name for entry in LIBRARY])
def test_library_kernel(place: int, proved_code: None) -> None:
    """One of the first two specialisations that shapes ask for, on the narrowest machine or this one, by turns; in a
    search for faults all of them. tests/kernels calls kernels at more shapes on this one."""
    entry = LIBRARY[place]
    function, launcher = entry.kernel.tile_ir(), Launcher(entry.kernel, {})
    calls: dict[Specialisation, list[tuple[int, dict]]] = {}    # shapes of one class share their code, as calls do
    for number, shape in enumerate(entry.check_shapes):
        arguments = entry.make_arguments(np.random.default_rng(number), shape)
        binding = launcher.signature.bind(tuple(arguments.values()))
        calls.setdefault(specialise(launcher.signature, binding, frozenset()), []).append((number, arguments))
    first = list(calls)[:2]
    for turn, specialisation in enumerate(calls if FUZZ else [first[place // 2 % len(first)]], place):
        machine = (TARGETS[MACHINES[0]], host_target())[turn % 2]
        compiled = launcher.from_disk_or_compile(specialisation, None, machine)
        for number, arguments in calls[specialisation]:
            with np.errstate(all="ignore"):
                expected = entry.reference(arguments)
            run_compiled(function, compiled, arguments, threads_of(entry.name),
                         PLACEMENTS[number // 2 % 2:][:1], entry.kernel.options.get("in_place", ()))
            wrong = entry.compare(arguments, expected)
            assert wrong is None, (machine.name, entry.check_shapes[number], wrong)


@pytest.mark.parametrize("machine", [name for name in ("zen4", "zen5") if name in RUNNABLE])
@settings(max_examples=examples(25))
@given(rows=st.integers(1, 21), depth=st.integers(1, 140), seed=st.integers(0, 99), threads=st.integers(1, 2))
def test_lines_that_are_loaded_whole_end_with_their_rows(machine, rows, depth, seed, threads) -> None:
    """Rows in several places of a matrix, of which both halves of a line come from all of it: never from beyond."""
    entry = next(kernel for kernel in LIBRARY if kernel.name == "matvec_residual_bf16")
    arguments = entry.make_arguments(np.random.default_rng(seed), {"N": rows, "K": depth})
    expected = entry.reference(arguments)
    function = entry.kernel.tile_ir()
    specialization = specialize(function, arguments, {"N": HINTS[8192], "K": LARGE})
    made, compiled = compile_checked(function, specialization, TARGETS[machine])
    assert any(item.row.name.startswith("vpermw") and item.zeroing for item in made.machine.body
               if isinstance(item, Instruction))
    run_compiled(function, compiled, arguments, threads, text=made.text)
    assert entry.compare(arguments, expected) is None


@settings(max_examples=examples(40))
@given(case=kernels(), seed=st.integers(0, 1000), machine=st.sampled_from(MACHINES), threads=st.integers(1, 3),
       hint=st.sampled_from([None, 1, 7, 40, 1000, 20000]))
def test_random_kernels(case, seed, machine, threads, hint) -> None:
    """Machine code does what tile IR means, on strided, hostile and empty arguments."""
    kernel, original = built(case)
    arguments = case.make_arguments(seed)
    expectations = expect(original, arguments)
    hints = None if hint is None else dict.fromkeys(case.sizes(seed), hint)
    run_native(kernel.tile_ir(), arguments, TARGETS[machine], threads, hints)
    assert_expected(arguments, expectations, repr(case))


@settings(max_examples=examples(30))
@given(drawn=sums(), rows=st.integers(0, 40), columns=st.integers(1, 40), spread=st.integers(1, 30),
       seed=st.integers(0, 99), machine=st.sampled_from(MACHINES), threads=st.integers(1, 3),
       hint=st.sampled_from([None, 1, 40, 5000]))
def test_random_sums(drawn, rows, columns, spread, seed, machine, threads, hint) -> None:
    """Sums at elements that are met again: each value is added, whichever worker and lane it is in."""
    source, dtype = drawn
    kernel = kernel_of(source)
    arguments = arguments_of_sums(dtype, rows, columns, spread, seed)
    expectations = expect(kernel.tile_ir(), arguments, runs=2, tile_sizes=(None, 3))
    run_native(kernel.tile_ir(), arguments, TARGETS[machine], threads,
               None if hint is None else dict.fromkeys("MNVW", hint))
    assert_expected(arguments, expectations, source)


@sp.kernel
def scalar_division(a: Tensor[i64, N], b: Tensor[i64, N], small: Tensor[i32, N], out: Tensor[i64, N, 4]):
    for n in each(N):
        out[n, 0], out[n, 1] = a[n] // b[n], a[n] % b[n]
        divisor = b[n].to(i32)
        out[n, 2], out[n, 3] = (small[n] // divisor).to(i64), (small[n] % divisor).to(i64)


@pytest.mark.parametrize("machine", MACHINES)
def test_scalar_division_never_traps(machine: str) -> None:
    a, b = np.int64([7, -7, -(2**63), -(2**63), 2**63 - 1, 5]), np.int64([2, 2, -1, 3, -1, 0])
    small = np.int32([7, -7, -(2**31), -(2**31), 2**31 - 1, 5])
    arguments = {"a": a, "b": b, "small": small, "out": np.zeros((6, 4), np.int64)}
    run_native(scalar_division.tile_ir(), arguments, TARGETS[machine])
    with np.errstate(all="ignore"):
        expected = np.stack([a // b, a % b, small // b.astype(np.int32), small % b.astype(np.int32)], axis=1)
    assert (arguments["out"][:5] == expected[:5]).all()  # by 0 it may be anything


@pytest.mark.parametrize("machine", MACHINES)
def test_an_i64_scalar_that_becomes_a_row_halves_the_lanes(machine: str) -> None:
    text = """tile func @widen(%a: tensor<u8, N>, %out: tensor<i64, N>) {
      %zero: index = const {value = 0}
      %N: index = dim {name = "N"}
      each %zero, %N {count = 1, parallel = true} (%i: index) {
        %x: u8 = load %a, %i
        %wide: i64 = cast %x
        store %out, %wide, %i
      }
    }"""
    arguments = {"a": np.arange(200, 220, dtype=np.uint8), "out": np.zeros(20, np.int64)}
    run_native(parse_function(text, {"tile": TILE_OPS}), arguments, TARGETS[machine])
    np.testing.assert_array_equal(arguments["out"], np.arange(200, 220))


@pytest.mark.parametrize("machine", MACHINES)
def test_an_f64_condition_halves_the_lanes(machine: str) -> None:
    text = """tile func @choose(%a: tensor<f32, N>, %s: f64) {
      %zero: index = const {value = 0}
      %N: index = dim {name = "N"}
      whole %zero, %N {axis = "n"}
      %i: index[n] = index {axis = "n"}
      %x: f32[n] = load %a, %i
      %condition: bool = eq %s, %s
      %one: f32 = const {value = 1.0}
      %y: f32[n] = if %condition {
        %z: f32[n] = add %x, %one
        yield %z
      } {
        yield %x
      }
      store %a, %y, %i
    }"""
    for s, expected in ((0.5, 1.0), (float("nan"), 0.0)):
        arguments = {"a": np.zeros(20, np.float32), "s": s}
        run_native(parse_function(text, {"tile": TILE_OPS}), arguments, TARGETS[machine])
        assert (arguments["a"] == expected).all()
