"""Kernels as machine code of foreign processors, on emulators that others wrote, where these are installed: the
library, and random ones. What is one family's own stands in its folder here."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sapper as sp
from sapper import Tensor, each, f32, i32, i64, tiles, zeros
from sapper.kernels import find, library
from sapper.kernels.record import LibraryKernel
from sapper.tile.rounding import expect
from tests.codegen.run_native import threads_of
from tests.kernels.shapes import interpreted
from tests.lang.test_random_kernels import kernel_of
from tests.strategies import KernelCase, assert_expected, assert_meaning, built, examples, kernels
from tests.strategies.nests import TILE_SIZES, hints, nests
from tests.strategies.sums import arguments_of_sums, sums

from .on_emulators import TARGETS, compile_for, is_there, needs_emulator, run_emulated

LIBRARY = library()
M, N = sp.dims("M N")
BARRIERS = {"aarch64": ("svc #0", "ldar "), "riscv64": ("ecall", "amoadd.w.aqrl")}
"""What the text of a barrier has."""
on_each = pytest.mark.parametrize("family", [pytest.param(one, marks=needs_emulator(one)) for one in TARGETS])


@pytest.mark.sampled(8)
@pytest.mark.parametrize("family", TARGETS)
@pytest.mark.parametrize("place", range(len(LIBRARY)), ids=[entry.name for entry in LIBRARY])
def test_library_kernel(place: int, family: str) -> None:
    """At one of its shapes, by turns, compiled as for large extents or for its own, its allocation proved; and run."""
    entry: LibraryKernel = LIBRARY[place]
    shape = interpreted(entry, entry.check_shapes[place % len(entry.check_shapes)])
    arguments = entry.make_arguments(np.random.default_rng(place), shape)
    with np.errstate(all="ignore"):
        expected = entry.reference(arguments)
    large = dict.fromkeys(entry.kernel.tile_ir().attributes["dims"], 512) if place % 2 else None
    name = TARGETS[family][place // 2 % 2]
    if not is_there(family):
        made, _ = compile_for(entry.kernel.tile_ir(), arguments, name, large)
        assert made.code_bytes
        return
    run_emulated(entry.kernel.tile_ir(), arguments, name, threads_of(entry.name), large, at_end=place % 3 > 0)
    wrong = entry.compare(arguments, expected)
    assert wrong is None, (shape, wrong)


@on_each
@settings(max_examples=examples(16))
@given(case=kernels(), seed=st.integers(0, 1000), workers=st.integers(1, 3),
       hint=st.sampled_from([None, 1, 7, 40, 1000, 20000]))
def test_random_kernels(family: str, case: KernelCase, seed: int, workers: int, hint: int | None) -> None:
    """Machine code does what tile IR means, on strided, hostile and empty arguments."""
    kernel, original = built(case)
    arguments = case.make_arguments(seed)
    expectations = expect(original, arguments)
    run_emulated(kernel.tile_ir(), arguments, TARGETS[family][seed % 2], workers,
                 None if hint is None else dict.fromkeys(case.sizes(seed), hint))
    assert_expected(arguments, expectations, repr(case))


@on_each
@settings(max_examples=examples(6))
@given(case=nests(2000), seed=st.integers(0, 1000), workers=st.integers(1, 2), guess=st.integers(0, 2**32 - 1))
def test_random_nests(family: str, case: KernelCase, seed: int, workers: int, guess: int) -> None:
    kernel = case.load()
    arguments = case.make_arguments(seed, hostile=False)
    run_emulated(kernel.tile_ir(), arguments, TARGETS[family][seed % 2], workers, hints(case, guess))
    assert_meaning(case, kernel.tile_ir(), case.make_arguments(seed, hostile=False), arguments, TILE_SIZES)


@on_each
@settings(max_examples=examples(9))
@given(drawn=sums(), rows=st.integers(0, 20), columns=st.integers(1, 20), spread=st.integers(1, 30),
       seed=st.integers(0, 99), workers=st.integers(1, 3), hint=st.sampled_from([None, 1, 40, 5000]))
def test_random_sums(family: str, drawn: tuple[str, str], rows: int, columns: int, spread: int, seed: int, workers: int,
                     hint: int | None) -> None:
    """Sums at elements that are met again: parts of workers, and barriers between them."""
    source, dtype = drawn
    kernel = kernel_of(source)
    arguments = arguments_of_sums(dtype, rows, columns, spread, seed)
    expectations = expect(kernel.tile_ir(), arguments, runs=2, tile_sizes=(None, 3))
    run_emulated(kernel.tile_ir(), arguments, TARGETS[family][0], workers,
                 None if hint is None else dict.fromkeys("MNVW", hint))
    assert_expected(arguments, expectations, source)


@on_each
def test_arrays_that_share_memory(family: str) -> None:
    """What is worked on in place has two names."""
    kernel = kernel_of("@kernel(in_place=[('y', 'x')])\ndef k(x: Tensor[f32, N], y: Tensor[f32, N]):\n"
                       "    for n in tiles(N):\n        y[n] = x[n] * 0.5\n")
    x = np.arange(37, dtype=np.float32)
    run_emulated(kernel.tile_ir(), {"x": x, "y": x}, TARGETS[family][0])
    np.testing.assert_array_equal(x, np.arange(37, dtype=np.float32) / 2)


@sp.kernel
def normalised(x: Tensor[f32, N], y: Tensor[f32, N]):
    """Two parts: all workers meet between them."""
    total = zeros(dtype=f32)
    for n in tiles(N):
        total += sp.sum(x[n], over=n)
    for n in tiles(N):
        y[n] = x[n] / total


@on_each
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_workers_meet_at_a_barrier(family: str, workers: int) -> None:
    x = np.random.default_rng(workers).random(5000, np.float32)
    arguments = {"x": x, "y": np.full(5000, np.nan, np.float32)}
    made = run_emulated(normalised.tile_ir(), arguments, TARGETS[family][0], workers)
    assert all(part in made.text for part in BARRIERS[family])
    np.testing.assert_allclose(arguments["y"], x / x.sum(dtype=np.float64), rtol=2e-5)


@sp.kernel
def scalar_division(a: Tensor[i64, N], b: Tensor[i64, N], small: Tensor[i32, N], out: Tensor[i64, N, 4]):
    for n in each(N):
        out[n, 0], out[n, 1] = a[n] // b[n], a[n] % b[n]
        divisor = b[n].to(i32)
        out[n, 2], out[n, 3] = (small[n] // divisor).to(i64), (small[n] % divisor).to(i64)


@on_each
def test_division_rounds_down(family: str) -> None:
    a, b = np.int64([7, -7, 7, -7, -(2**63), -(2**63), 2**63 - 1, 5]), np.int64([2, 2, -2, -2, -1, 3, -1, 7])
    small = np.int32([7, -7, 7, -7, -(2**31), -(2**31), 2**31 - 1, 5])
    arguments = {"a": a, "b": b, "small": small, "out": np.zeros((8, 4), np.int64)}
    run_emulated(scalar_division.tile_ir(), arguments, TARGETS[family][0])
    with np.errstate(all="ignore"):
        expected = np.stack([a // b, a % b, small // b.astype(np.int32), small % b.astype(np.int32)], axis=1)
    np.testing.assert_array_equal(arguments["out"], expected)


@sp.kernel
def ranked(x: Tensor[i32, M, N], y: Tensor[i32, M]):
    for m in tiles(M):
        best = zeros(m, dtype=i32)
        for n in tiles(N):
            best = sp.maximum(best, sp.max(x[m, n] % 7 + x[m, n] // 3, over=n))
        y[m] = best


@on_each
def test_division_in_lanes(family: str) -> None:
    x = np.random.default_rng(1).integers(-1000, 1000, (5, 13)).astype(np.int32)
    arguments = {"x": x, "y": np.zeros(5, np.int32)}
    run_emulated(ranked.tile_ir(), arguments, TARGETS[family][0])
    np.testing.assert_array_equal(arguments["y"], np.maximum(0, (x % 7 + x // 3).max(1)))


@pytest.mark.parametrize("family", TARGETS)
def test_the_same_bytes_each_time(family: str) -> None:
    entry = find("softmax")
    arguments = entry.make_arguments(np.random.default_rng(0), {"M": 3, "N": 50})
    first, second = (compile_for(entry.kernel.tile_ir(), arguments, TARGETS[family][0])[0] for _ in range(2))
    assert first.bytes == second.bytes and first.text == second.text
