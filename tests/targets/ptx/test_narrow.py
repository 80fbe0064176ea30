"""Contractions of fp8 by groups of warps: scales of blocks, sums in f32 after every 128 of the depth."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import sapper as sp
from sapper import Tensor, bf16, emulate, f8e4m3, f32, targets, tiles, zeros
from sapper.codegen.pipeline import compile_kernel, facts_of, finish_lane, to_lane
from sapper.ir.nodes import Function
from sapper.lane.interpret import run
from sapper.lane.memory import Memory
from sapper.targets.ptx import assembler
from sapper.tile.interpret import interpret
from sapper.tile.schedule import DimClass, Schedule, Specialization

from .kernels import bf16_nt
from .narrow import block_scaled, unscaled

TARGET = targets.target("sm_90a")
KERNELS = (unscaled, block_scaled)
M, N, K, KB = sp.dims("M N K KB")
needs_ptxas = pytest.mark.skipif(assembler.find_tool("ptxas") is None, reason="ptxas is not installed")


@sp.kernel
def scaled_by_column(a: Tensor[f8e4m3, M, K], b: Tensor[f8e4m3, N, K], sb: Tensor[f32, N, KB], c: Tensor[f32, M, N]):
    for m, n in tiles(M, N):
        acc = zeros(m, n, dtype=f32)
        for k in tiles(K):
            acc += a[m, k].to(f32) @ (b[n, k].to(f32) * sb[n, k // 128])
        c[m, n] = acc


@sp.kernel
def along_the_other_axis(a: Tensor[f8e4m3, M, K], b: Tensor[f8e4m3, K, N], c: Tensor[f32, M, N]):
    for m, n in tiles(M, N):
        acc = zeros(m, n, dtype=f32)
        for k in tiles(K):
            acc += a[m, k].to(f32) @ b[k, n].to(f32)
        c[m, n] = acc


def extents_of(m: int, n: int, k: int) -> dict[str, int]:
    return {"M": m, "N": n, "K": k, "KB": -(-k // 128), "NB": -(-n // 128)}


def arguments_of(kernel: Any, extents: dict[str, int]) -> dict[str, np.ndarray]:
    random = np.random.default_rng(5)
    made: dict[str, np.ndarray] = {}
    for name, type in kernel.parameters:
        shape = [extents[d] for d in type.dims]
        if name.startswith("s"):
            made[name] = random.uniform(0.25, 4, shape).astype(np.float32)
        elif name == "c":
            made[name] = np.full(shape, np.nan, np.float32 if type.dtype is f32 else ml_dtypes.bfloat16)
        else:
            made[name] = random.standard_normal(shape).astype(ml_dtypes.float8_e4m3fn)
    return made


def expected(kernel: Any, arguments: dict[str, np.ndarray]) -> np.ndarray:
    copies = {name: array.copy() for name, array in arguments.items()}
    interpret(kernel.tile_ir(), copies)
    return copies["c"].astype(np.float64)


def assert_near(found: np.ndarray, wanted: np.ndarray) -> None:
    """Scales come after the sums of a block instead of before: a rounding here or there."""
    tolerance = 1e-2 if found.dtype == ml_dtypes.bfloat16 else 1e-4
    np.testing.assert_allclose(found.astype(np.float64), wanted, rtol=tolerance, atol=1e-3)


def lowered(kernel: Any, tile: dict[str, int], level: str = "sm_90a", aligned: str = "ab") -> Function:
    known = Specialization({d: DimClass(4096, 16) for d in ("M", "N", "K", "KB", "NB")},
                           dict.fromkeys([name for name, _ in kernel.parameters], "contiguous"), frozenset(aligned))
    return to_lane(kernel.tile_ir(), Schedule(tile=tile), facts_of(targets.target(level)), known)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.name)
def test_lane_ir(kernel: Any) -> None:
    extents = extents_of(80, 144, 208)
    arguments = arguments_of(kernel, extents)
    wanted = expected(kernel, arguments)
    lane = finish_lane(lowered(kernel, {"m": 64, "n": 64}), TARGET)
    memory = Memory()
    words = [0, 0, memory.allocate("sync", 1024)]
    for slot in lane.attributes["slots"]:
        name, _, kind = slot.partition(".")
        words.append(memory.add_array(name, arguments[name]) if kind == "data" else extents[kind])
    run(lane, np.array(words), memory, workers=2)
    assert_near(arguments["c"], wanted)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("lazy", [False, True], ids=["eager", "lazy"])
@pytest.mark.parametrize("columns", [128, 256])
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.name)
def test_on_the_emulator(kernel: Any, columns: int, lazy: bool) -> None:
    """Of 256 columns there are none in the second half of the last tile, nor a scale of their block."""
    extents = extents_of(176, columns + 48 if columns == 256 else 208, 528)
    arguments = arguments_of(kernel, extents)
    wanted = expected(kernel, arguments)
    counters = emulate.run(kernel, *arguments.values(), target="sm_90a", workers=2, aligned="abc",
                           schedule=Schedule(tile={"m": 128, "n": columns}),
                           options=emulate.Options(lazy=lazy)).counters
    assert_near(arguments["c"], wanted)
    assert any("m64n128k32.f32.e4m3.e4m3" in name for name in counters.instructions)


def test_no_sum_of_the_instruction_runs_over_more_than_128_of_the_depth() -> None:
    """Its sums have fewer bits than f32: the first of four instructions starts anew, and f32 adds up what they give."""
    lane = lowered(block_scaled, {"m": 64, "n": 64})
    multiplies = [op for op in lane.walk() if op.name == "group_multiply"]
    assert [op.attributes["fresh"] for op in multiplies] == [True, False, False, False]
    assert all(after.operands[2] is before.results[0] for before, after in pairwise(multiplies))
    (wait,) = [op for op in lane.walk() if op.name == "group_wait"]
    assert wait.attributes["pending"] == 0 and wait.operands[0] is multiplies[-1].results[0]
    adds = [op for op in lane.walk() if op.name == "fma" and op.operands[0] in wait.results]
    assert len(adds) == len(wait.results) == 32


def test_a_schedule_may_refuse_them() -> None:
    known = Specialization({d: DimClass(4096, 16) for d in ("M", "N", "K", "KB", "NB")},
                           dict.fromkeys([name for name, _ in block_scaled.parameters], "contiguous"), frozenset("ab"))
    lane = to_lane(block_scaled.tile_ir(), Schedule(matrix=False), facts_of(TARGET), known)
    assert "group_multiply" not in {op.name for op in lane.walk()}


def test_halves_of_256_columns_are_summed_one_after_the_other() -> None:
    """In the same registers: 128 totals of a lane leave room for 64 sums."""
    lane = lowered(block_scaled, {"m": 128, "n": 256})
    multiplies = [op for op in lane.walk() if op.name == "group_multiply"]
    assert [op.attributes["fresh"] for op in multiplies] == [True, False, False, False] * 2
    starts = [op.attributes["right_disp"] for op in multiplies]
    assert [after - before for before, after in zip(starts[:4], starts[4:], strict=True)] == [128 * 128] * 4
    first, second = [op for op in lane.walk() if op.name == "group_wait"]
    assert len(first.results) == len(second.results) == 64
    assert multiplies[4].operands[2:] == list(first.results)


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("kernel", "level", "aligned"), [
    (scaled_by_column, "sm_90a", "ab"), (along_the_other_axis, "sm_90a", "ab"), (unscaled, "sm_80", "ab"),
    (block_scaled, "sm_90a", "a")], ids=lambda value: getattr(value, "name", value))
def test_without_an_instruction_for_it(kernel: Any, level: str, aligned: str) -> None:
    """Scales along the depth for each column, rows at any address: plain products. Another order, an older level: as
    bf16 (computed_pieces.py)."""
    plain = kernel in (scaled_by_column, block_scaled)
    extents = extents_of(16, 24, 144) if plain else extents_of(65, 72, 144)
    arguments = arguments_of(kernel, extents)
    wanted = expected(kernel, arguments)
    counters = emulate.run(kernel, *arguments.values(), target=level, workers=2, aligned=aligned).counters
    assert_near(arguments["c"], wanted)
    made = {name for name in counters.instructions if "mma" in name}
    assert made == (set() if plain else {"mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"})


@needs_ptxas
@pytest.mark.parametrize("aligned", ["ab", "abc"])
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.name)
def test_both_sums_fit_the_registers(kernel: Any, aligned: str) -> None:
    """Whether they are stored by lanes or by copies of boxes."""
    names = [name for name, _ in kernel.parameters]
    text = compile_kernel(kernel, {}, dict.fromkeys(names, "contiguous"),
                          dict.fromkeys(("M", "N", "K", "KB", "NB"), (2**31 - 1, 64)), TARGET, None,
                          frozenset(aligned)).text()
    assert "setmaxnreg.inc.sync.aligned.u32 240;" in text
    assert ("global.shared::cta.bulk_group" in text) == (aligned == "abc")
    (made,) = assembler.assemble([text], "sm_90a").values()
    assert made.spilled_bytes == 0


@pytest.mark.parametrize("kernel", [*KERNELS, bf16_nt], ids=lambda k: k.name)
def test_sm_120a_gets_the_products_of_ada(kernel: Any) -> None:
    """As docs/cuda.md says: tcgen05 is sm_100a's alone."""
    names = [name for name, _ in kernel.parameters]
    dims = {dim: (4096, 64) for _, type in kernel.parameters for dim in type.dims}
    texts = [compile_kernel(kernel, {}, dict.fromkeys(names, "contiguous"), dims, targets.target(name), None,
                            frozenset(names)).text().split("\n", 2)[2] for name in ("sm_89", "sm_120a")]
    assert texts[0] == texts[1]


def test_sm_89_multiplies_by_warps() -> None:
    """mma.sync, each stage of 128 added up in f32; of rows that lie along the depth."""
    extents = extents_of(150, 80, 336)
    arguments = arguments_of(unscaled, extents)
    wanted = expected(unscaled, arguments)
    text = emulate.run(unscaled, *arguments.values(), target="sm_89", workers=2, aligned="ab",
                       options=emulate.Options(lazy=True)).counters.instructions
    assert_near(arguments["c"], wanted)
    assert text["mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32"]
    assert {op.attributes["dtype"] for op in lowered(along_the_other_axis, {}, "sm_89").walk()
            if op.name == "matrix_multiply"} == {bf16}


@pytest.mark.parametrize("kernel", [block_scaled, scaled_by_column], ids=lambda k: k.name)
def test_sm_89_multiplies_the_sums_of_blocks_by_scales(kernel: Any) -> None:
    """Of each row, of 128 columns, or of each column."""
    extents = extents_of(70, 66, 272)
    arguments = arguments_of(kernel, extents)
    wanted = expected(kernel, arguments)
    counters = emulate.run(kernel, *arguments.values(), target="sm_89", workers=2, aligned="ab",
                           options=emulate.Options(lazy=True)).counters.instructions
    assert_near(arguments["c"], wanted)
    assert counters["mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32"]
