"""The kernels and blocks by hand of the library: right under the interpreter of rows, on this CPU, and no planted error
in them goes unseen."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest

import sapper as sp
from sapper import Schedule, Tensor, bf16, f32, i32, tiles, zeros
from sapper.assembly.errors import AssemblyError
from sapper.assembly.mutate import mutants
from sapper.assembly.override import Override, compile_by_hand
from sapper.codegen.machine import Instruction
from sapper.ir.types import bf16 as BF16
from sapper.ir.types import f32 as F32
from sapper.kernels.by_hand import blocked, codebook, matmul, rows
from sapper.kernels.by_hand import tiles as tiled
from sapper.kernels.matmul import make_matmul_nn
from sapper.lang.by_hand import PIECES
from sapper.runtime import by_hand
from sapper.runtime.cases import Case
from sapper.runtime.check import check_kernel
from sapper.targets import host_target
from sapper.targets.x86_64.target import target
from sapper.tile import semantics
from sapper.tile.rounding import Expectation
from tests.strategies.amount import FUZZ

ZEN4 = target("zen4")
M, N, K = sp.dims("M N K")


@sp.kernel
def matmul_bf16(a: Tensor[bf16, M, K], b: Tensor[bf16, K, N], c: Tensor[f32, M, N]):
    for m, n in tiles(M, N):
        acc = zeros(m, n, dtype=f32)
        for k in tiles(K):
            acc += a[m, k] @ b[k, n]
        c[m, n] = acc


@sp.kernel
def exponential(x: Tensor[f32, N], y: Tensor[f32, N]):
    for n in tiles(N):
        y[n] = sp.exp(x[n])


@sp.kernel
def third_nibble(x: Tensor[i32, N], y: Tensor[f32, N]):
    for n in tiles(N):
        y[n] = sp.asm(rows.unpack4, x[n], 12, meaning=lambda p: (p << 16 >> 28).to(f32))


def attached(kernel: Any, attach: Callable[..., None], *options: Any) -> Any:
    kernel.by_hand.clear()
    attach(kernel, *options)
    return kernel


KERNELS: dict[str, Callable[[], Any]] = {
    "f32 14x32": lambda: attached(make_matmul_nn(f32), matmul.attach, matmul.AVX512),
    "f32 6x16": lambda: attached(make_matmul_nn(f32), matmul.attach, matmul.AVX2),
    "bf16 14x32": lambda: attached(matmul_bf16, matmul.attach, matmul.BF16),
    "row sum": lambda: attached(rows.make_row_sum(), rows.attach_row_sum),
    "embedding": lambda: attached(rows.make_embedding(), rows.attach_embedding),
    "f32 in blocks of the depth": lambda: attached(make_matmul_nn(f32), blocked.attach, 32),
    "codebook": lambda: attached(codebook.make_codebook(), codebook.attach),
    "bf16 tiles": lambda: attached(tiled.make_product(tiled.BF16), tiled.attach, tiled.BF16, 64),
    "i8 tiles": lambda: attached(tiled.make_product(tiled.I8), tiled.attach, tiled.I8, 64),
    "u8 i8 tiles": lambda: attached(tiled.make_product(tiled.U8_I8), tiled.attach, tiled.U8_I8, 64),
}
MATMULS = ("f32 14x32", "f32 6x16", "bf16 14x32")


def chip_of(name: str) -> Any:
    return target("sapphirerapids") if "tiles" in name else ZEN4


def compiled(name: str) -> tuple[Any, Override]:
    kernel = KERNELS[name]()
    return kernel, compile_by_hand(kernel, kernel.by_hand[0], chip_of(name))


@cache
def cases_of(name: str) -> tuple[Any, Override, list[tuple[Case, dict[str, Expectation]]]]:
    """A kernel by hand, and its cases with what the kernel gives. Of a matrix product all in which several dimensions
    have a rest, and every third of those in which one is at a boundary: in a search for faults, else every twelfth."""
    kernel, made = compiled(name)
    known = list(by_hand.expected_cases(kernel, made.piece, runs=3))
    if name in MATMULS:
        known = known[:9] + known[9::3 if FUZZ else 12]
    elif "tiles" in name:
        known = known[9::1 if FUZZ else 2]  # the first are all of one tile of the depth
    elif name == "f32 in blocks of the depth":
        known = known[::1 if FUZZ else 3]
    return kernel, made, known


@cache
def tried(name: str) -> tuple[Any, Override, list[by_hand.Trial]]:
    """And how it does them under the interpreter of rows."""
    kernel, made, known = cases_of(name)
    return kernel, made, by_hand.trials_of(kernel, made, known)


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_interpreted(name: str) -> None:
    _, made, trials = tried(name)
    assert len(trials) > (10 if FUZZ else 6)
    reached = set().union(*(trace.reached for _, trace in trials))
    assert reached == {place for place, item in enumerate(made.source.body) if isinstance(item, Instruction)}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", KERNELS)
def test_kernels_on_this_cpu(name: str) -> None:
    _, made = compiled(name)
    missing = sorted(made.piece.features - host_target().features)
    if missing:
        pytest.skip(f"this CPU has no {', '.join(missing)}")
    kernel, made, known = cases_of(name)
    assert by_hand.verify(kernel, made, known=known) > (10 if FUZZ else 6)


def test_the_inner_loops_spill_nothing() -> None:
    """No vector register is stored to the frame; general registers may be, outside the loop over k."""
    for name in MATMULS:
        _, made = compiled(name)
        wide = [i for i in made.finished.machine.body if getattr(i, "comment", "") in ("spill", "reload")
                and i.row.mnemonic.startswith("vmov")]  # type: ignore[union-attr]
        assert not wide
        assert made.finished.pressure["vec"] <= (16 if name == "f32 6x16" else 32)


@pytest.mark.parametrize("chip", [host_target(), target("v3")], ids=["host", "v3"])
def test_blocks(chip: Any) -> None:
    for kernel, schedule in ((exponential, Schedule(assembly=("exp_by_table",))), (third_nibble, None),
                             (rows.make_dot4(True), None)):
        report = check_kernel(kernel, chip, runs=5, schedule=schedule)
        assert report.ok, report.finding


@pytest.mark.skipif("avx512f" not in host_target().features, reason="no AVX-512")
def test_unpack4_as_code_is_right_for_words_of_all_kinds() -> None:
    """What its rows mean is proved for all words (tests/assembly/test_prove.py); this is the code itself."""
    assert by_hand.prove_exhaustively(third_nibble, step=257) == (1 << 32) // 257 + 1


@pytest.mark.skipif("avx512f" not in host_target().features, reason="no AVX-512")
def test_the_proof_finds_the_one_value_that_differs() -> None:
    @sp.kernel
    def nearly(x: Tensor[i32, N], y: Tensor[f32, N]):
        for n in tiles(N):
            y[n] = sp.asm(rows.unpack4, x[n], 12,
                          meaning=lambda p: sp.where(p == 0xC0FFEE, 0, p << 16 >> 28).to(f32))

    with pytest.raises(AssemblyError, match="0xc0ffee"):
        by_hand.prove_exhaustively(nearly)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name, every", [("f32 14x32", 97), ("bf16 14x32", 83), ("f32 6x16", 43), ("row sum", 7),
                                         ("embedding", 1), ("codebook", 2), ("bf16 tiles", 19), ("i8 tiles", 19)])
def test_planted_errors_are_found(name: str, every: int) -> None:
    """A sample of all mutants, evenly over the text."""
    kernel, made, trials = tried(name)
    chosen = list(mutants(made.assembly))[::every]
    assert len(chosen) >= 8
    chosen = chosen if FUZZ else chosen[::2]
    assert not [str(m) for m in by_hand.survivors(kernel, made, chip_of(name), chosen, trials)]


def words(random: np.random.Generator) -> list[Any]:
    return [random.integers(-2**31, 2**31, 16).astype(np.int32)]


def exponents(random: np.random.Generator) -> list[Any]:
    """Also half way between the table's entries, where the most is left to the terms, and where e^x ends."""
    hostile = [0, -0.0, np.inf, -np.inf, np.nan, 88.7, 89, 104, -87, -95, -103, -104, -200, 1e-40, 1, -1]
    between = (random.integers(-3000, 3000, 16) + 0.5) * math.log(2) / 32
    return [random.choice(np.array([random.uniform(-90, 89, 16), between, hostile]), axis=0).astype(np.float32)]


def some(count: int) -> Callable[[np.random.Generator], list[Any]]:
    return lambda random: [random.standard_normal(16).astype(np.float32) for _ in range(count)]


def near_ties(random: np.random.Generator) -> list[Any]:
    """Where rounding to the upper half turns, and NaNs of which only the lower half says that they are none."""
    upper = random.choice(np.array([random.integers(0, 2**16, 16), np.full(16, 0x7F80)]), axis=0)
    lower = random.choice([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], 16)
    return [(upper << 16 | lower).astype(np.uint32).view(np.float32)]


BLOCKS: dict[str, Any] = {
    "exp_by_table": ([], exponents, lambda x: np.exp(x.astype(np.float64)), 1.3e-7, 0),
    "unpack4": ([12], words, lambda x: x << 16 >> 28, 0, 0),
    "round_to_bf16": ([], near_ties, lambda x: semantics.cast(semantics.cast(x, BF16), F32), 0, 0),
    "sum_of_lanes": ([], some(1), lambda x: np.full(16, x.astype(np.float64).sum()), 1e-5, 1e-6),
    "sum_of_each_row": ([], some(16), lambda *xs: np.stack(xs).astype(np.float64).sum(axis=1), 1e-5, 1e-6),
}
"""Immediates, rows to try (drawn by a generator), what the block computes, and its relative and absolute error."""


@pytest.mark.parametrize("name", BLOCKS)
def test_planted_errors_in_blocks_are_found(name: str) -> None:
    immediates, draw, meaning, tolerance, least = BLOCKS[name]
    block: Any = PIECES[f"x86_64:{name}"]
    assembly, out, inputs = block.assemble((512,) * (1 + len(block.inputs)), immediates)
    random = np.random.default_rng(0)
    samples = [draw(random) for _ in range(12)]

    def right(candidate: Any) -> bool:
        with np.errstate(all="ignore"):
            return all(np.allclose(run_block(candidate, out, inputs, given), meaning(*given).astype(np.float32),
                                   tolerance, max(2e-45, least), equal_nan=True) for given in samples)

    def lives(mutant: Any) -> bool:
        try:
            return right(mutant.assembly)
        except AssemblyError:
            return False

    assert right(assembly)
    planted = list(mutants(assembly, [out.register]))
    assert len(planted) >= 6
    assert not [str(mutant) for mutant in planted if lives(mutant)]


def run_block(assembly: Any, out: Any, inputs: Any, given: list[Any]) -> Any:
    from sapper.assembly.emulate import Emulator
    from sapper.lane.memory import Memory

    held = {reg.register: row.view(np.uint8).copy() for reg, row in zip(inputs, given, strict=True)}
    emulator = Emulator(assembly.table, Memory(), held)
    emulator.run(assembly.machine())
    return emulator.get(out.register).view(np.float32)
