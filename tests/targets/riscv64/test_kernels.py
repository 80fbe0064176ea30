"""Kernels as RISC-V machine code, on an emulator that others wrote where it is installed: the library, and random
ones."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sapper as sp
from sapper import Tensor, each, f32, i32, i64, tiles, zeros
from sapper.codegen.machine import Instruction
from sapper.emulate.riscv import PROGRAM
from sapper.ir.scratch import scratch_bytes
from sapper.kernels import find, library
from sapper.kernels.record import LibraryKernel
from sapper.lang.errors import KernelError
from sapper.targets import target
from sapper.targets.riscv64.rows import NOP
from sapper.tile.rounding import expect
from tests.codegen.run_native import threads_of
from tests.kernels.shapes import interpreted
from tests.lane.run_lane import argument_words, dims_of
from tests.lang.test_random_kernels import kernel_of
from tests.strategies import KernelCase, assert_expected, assert_meaning, examples, kernels, reject_unbuildable
from tests.strategies.nests import TILE_SIZES, hints, nests
from tests.strategies.sums import arguments_of_sums, sums

from .by_meaning import run_by_meaning
from .machine import compile_for, run_emulated
from .test_rows import ASSEMBLER, assembled

TARGETS = ("rva23u64", "spacemit-x60")
LIBRARY = library()
M, N, K = sp.dims("M N K")
runs = pytest.mark.skipif(shutil.which(PROGRAM) is None, reason=f"{PROGRAM} is not installed")


@pytest.mark.sampled(8)
@pytest.mark.parametrize("place", range(len(LIBRARY)), ids=[entry.name for entry in LIBRARY])
def test_library_kernel(place: int) -> None:
    """At one of its shapes, by turns, compiled as for large extents or for its own, its allocation proved; and run."""
    entry: LibraryKernel = LIBRARY[place]
    shape = interpreted(entry, entry.check_shapes[place % len(entry.check_shapes)])
    arguments = entry.make_arguments(np.random.default_rng(place), shape)
    with np.errstate(all="ignore"):
        expected = entry.reference(arguments)
    large = dict.fromkeys(entry.kernel.tile_ir().attributes["dims"], 512) if place % 2 else None
    name = TARGETS[place // 2 % 2]
    if shutil.which(PROGRAM) is None:
        made, _ = compile_for(entry.kernel.tile_ir(), arguments, name, large)
        assert made.code_bytes
        return
    run_emulated(entry.kernel.tile_ir(), arguments, threads_of(entry.name), name, large, at_end=place % 3 > 0)
    wrong = entry.compare(arguments, expected)
    assert wrong is None, (shape, wrong)


BY_MEANING = ("softmax_bf16", "matmul_nn_f32", "matmul_nt_i8", "matmul_tn_bf16", "gather_f32", "rope_half_split",
              "rms_norm_quantize", "matvec_q4m", "dequantize_q4", "quantize_rows", "sample")


@pytest.mark.parametrize("place", range(len(BY_MEANING)), ids=BY_MEANING)
def test_library_kernel_by_the_meanings_of_rows(place: int) -> None:
    """Without an emulator, at a shape of middling size: code, what vectors are set to, and the frame."""
    entry, name = find(BY_MEANING[place]), TARGETS[place % 2]
    shapes = sorted((s for s in entry.check_shapes if all(s.values())), key=lambda s: math.prod(s.values()))
    shape = shapes[len(shapes) // 3]
    arguments = entry.make_arguments(np.random.default_rng(place), shape)
    with np.errstate(all="ignore"):
        expected = entry.reference(arguments)
    function = entry.kernel.tile_ir()
    made, lane = compile_for(function, arguments, name, dict.fromkeys(function.attributes["dims"], 512))
    run_by_meaning(made.machine, target(name).vector_bits, lambda buffers: argument_words(
        function, lane.attributes["slots"], arguments, lambda name: buffers.add_array(arguments[name])),
        scratch_bytes(lane.attributes["scratch"], dims_of(function, arguments)))
    wrong = entry.compare(arguments, expected)
    assert wrong is None, (shape, wrong)


@runs
@settings(max_examples=examples(16))
@given(case=kernels(), seed=st.integers(0, 1000), workers=st.integers(1, 3),
       hint=st.sampled_from([None, 1, 7, 40, 1000, 20000]), name=st.sampled_from(TARGETS))
def test_random_kernels(case: KernelCase, seed: int, workers: int, hint: int | None, name: str) -> None:
    """Machine code does what tile IR means, on strided, hostile and empty arguments."""
    kernel = case.load()
    try:
        original = kernel.tile_ir()
    except KernelError as error:
        reject_unbuildable(error)
        return
    arguments = case.make_arguments(seed)
    expectations = expect(original, arguments)
    run_emulated(kernel.tile_ir(), arguments, workers, name,
                 hints=None if hint is None else dict.fromkeys(case.sizes(seed), hint))
    assert_expected(arguments, expectations, repr(case))


@runs
@settings(max_examples=examples(6))
@given(case=nests(2000), seed=st.integers(0, 1000), workers=st.integers(1, 2), guess=st.integers(0, 2**32 - 1))
def test_random_nests(case: KernelCase, seed: int, workers: int, guess: int) -> None:
    kernel = case.load()
    arguments = case.make_arguments(seed, hostile=False)
    run_emulated(kernel.tile_ir(), arguments, workers, TARGETS[seed % 2], hints=hints(case, guess))
    assert_meaning(case, kernel.tile_ir(), case.make_arguments(seed, hostile=False), arguments, TILE_SIZES)


@runs
@settings(max_examples=examples(9))
@given(drawn=sums(), rows=st.integers(0, 20), columns=st.integers(1, 20), spread=st.integers(1, 30),
       seed=st.integers(0, 99), workers=st.integers(1, 3), hint=st.sampled_from([None, 1, 40, 5000]))
def test_random_sums(drawn: tuple[str, str], rows: int, columns: int, spread: int, seed: int, workers: int,
                     hint: int | None) -> None:
    """Sums at elements that are met again: parts of workers, and barriers between them."""
    source, dtype = drawn
    kernel = kernel_of(source)
    arguments = arguments_of_sums(dtype, rows, columns, spread, seed)
    expectations = expect(kernel.tile_ir(), arguments, runs=2, tile_sizes=(None, 3))
    run_emulated(kernel.tile_ir(), arguments, workers, hints=None if hint is None else dict.fromkeys("MNVW", hint))
    assert_expected(arguments, expectations, source)


@sp.kernel
def normalised(x: Tensor[f32, N], y: Tensor[f32, N]):
    """Two parts: all workers meet between them."""
    total = zeros(dtype=f32)
    for n in tiles(N):
        total += sp.sum(x[n], over=n)
    for n in tiles(N):
        y[n] = x[n] / total


@runs
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_workers_meet_at_a_barrier(workers: int) -> None:
    x = np.random.default_rng(workers).random(5000, np.float32)
    arguments = {"x": x, "y": np.full(5000, np.nan, np.float32)}
    made = run_emulated(normalised.tile_ir(), arguments, workers)
    assert "ecall" in made.text and "amoadd.w.aqrl" in made.text
    np.testing.assert_allclose(arguments["y"], x / x.sum(dtype=np.float64), rtol=2e-5)


@sp.kernel
def scalar_division(a: Tensor[i64, N], b: Tensor[i64, N], small: Tensor[i32, N], out: Tensor[i64, N, 4]):
    for n in each(N):
        out[n, 0], out[n, 1] = a[n] // b[n], a[n] % b[n]
        divisor = b[n].to(i32)
        out[n, 2], out[n, 3] = (small[n] // divisor).to(i64), (small[n] % divisor).to(i64)


@runs
def test_division_rounds_down() -> None:
    a, b = np.int64([7, -7, 7, -7, -(2**63), -(2**63), 2**63 - 1, 5]), np.int64([2, 2, -2, -2, -1, 3, -1, 7])
    small = np.int32([7, -7, 7, -7, -(2**31), -(2**31), 2**31 - 1, 5])
    arguments = {"a": a, "b": b, "small": small, "out": np.zeros((8, 4), np.int64)}
    run_emulated(scalar_division.tile_ir(), arguments)
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


@runs
def test_division_in_lanes() -> None:
    x = np.random.default_rng(1).integers(-1000, 1000, (5, 13)).astype(np.int32)
    arguments = {"x": x, "y": np.zeros(5, np.int32)}
    run_emulated(ranked.tile_ir(), arguments)
    np.testing.assert_array_equal(arguments["y"], np.maximum(0, (x % 7 + x // 3).max(1)))


@runs
@pytest.mark.parametrize(("name", "count"), [("rva23u64", 40), ("spacemit-x60", 130)])
def test_what_does_not_fit_the_registers_goes_to_the_frame_and_comes_back(name: str, count: int) -> None:
    """Rows that are all wanted at the end, some of them beyond what a word reaches; registers of the caller are saved
    and given back."""
    rows = "\n".join(f"        v{i} = x[{i}, n] * x[{(i + 1) % count}, n]" for i in range(count))
    total = " + ".join(f"v{i} * v{count - 1 - i}" for i in range(count))
    kernel = kernel_of(f"@kernel\ndef k(x: Tensor[f32, {count}, N], y: Tensor[f32, N]):\n"
                       f"    for n in tiles(N):\n{rows}\n        y[n] = {total}\n")
    x = np.random.default_rng(0).standard_normal((count, 37), np.float32)
    arguments = {"x": x, "y": np.zeros(37, np.float32)}
    made = run_emulated(kernel.tile_ir(), arguments, name=name)
    products = x.astype(np.float64) * np.roll(x, -1, 0)
    np.testing.assert_allclose(arguments["y"], (products * products[::-1]).sum(0), rtol=1e-4, atol=1e-4)
    names = {item.row.name for item in made.machine.body if isinstance(item, Instruction)}
    assert (made.frame_bytes > 2048) == (count > 40) and {"vs1r.v", "vl1re8.v", "sd", "ld"} <= names


def test_the_same_bytes_each_time() -> None:
    entry = find("softmax")
    arguments = entry.make_arguments(np.random.default_rng(0), {"M": 3, "N": 50})
    first, second = (compile_for(entry.kernel.tile_ir(), arguments)[0] for _ in range(2))
    assert first.bytes == second.bytes and first.text == second.text


@pytest.mark.skipif(shutil.which(ASSEMBLER) is None, reason=f"{ASSEMBLER} is not installed")
@pytest.mark.parametrize("name", ["softmax", "matmul_nt_bf16", "rope_yarn_half_split", "grouped_q4"])
def test_text_and_bytes_are_the_same_program(name: str, tmp_path: Path) -> None:
    entry = find(name)
    arguments = entry.make_arguments(np.random.default_rng(0), entry.check_shapes[-1])
    made, _ = compile_for(entry.kernel.tile_ir(), arguments)
    theirs = assembled(made.text, tmp_path)     # to the end of a block of 16 bytes
    assert theirs == made.bytes + NOP * ((len(theirs) - len(made.bytes)) // len(NOP))


@sp.kernel
def product(a: Tensor[f32, M, K], b: Tensor[f32, K, N], c: Tensor[f32, M, N]):
    for m, n in tiles(M, N):
        acc = zeros(m, n, dtype=f32)
        for k in tiles(K):
            acc += a[m, k] @ b[k, n]
        c[m, n] = acc


@pytest.mark.parametrize("name", TARGETS)
def test_a_product_takes_elements_from_float_registers(name: str) -> None:
    """The main loop: multiply-adds by a scalar, loads, what moves pointers; no row is spread, nothing is spilled."""
    arguments = {"a": np.zeros((64, 64), np.float32), "b": np.zeros((64, 64), np.float32),
                 "c": np.zeros((64, 64), np.float32)}
    made, _ = compile_for(product.tile_ir(), arguments, name, dict.fromkeys("MNK", 512))
    blocks: list[list[str]] = [[]]
    for item in made.machine.body:
        if isinstance(item, Instruction):
            blocks[-1].append(item.row.name)
            if item.row.control:
                blocks.append([])
        else:
            blocks.append([])
    loop = max(blocks, key=lambda names: names.count("vfmacc.vf.e32"))
    assert loop.count("vfmacc.vf.e32") >= 100
    assert set(loop) <= {"vfmacc.vf.e32", "flw", "vle32.v", "addi", "blt", "bgtz", "add"}
    assert loop.count("flw") * 2 == loop.count("vfmacc.vf.e32") and loop.count("addi") <= loop.count("vle32.v") + 4
