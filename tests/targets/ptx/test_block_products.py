"""Products of bytes in blocks, whose sums scales multiply, on matrix instructions (sapper/lane/block_products.py)."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
import pytest

import sapper as sp
from sapper import Tensor, each, emulate, f16, f32, i8, i32, maximum, targets, tiles, u8, whole, zeros
from sapper.codegen.pipeline import compile_kernel, facts_of, to_lane
from sapper.kernels import find
from sapper.lane.block_nests import BlockNest, find_nest
from sapper.lane.lower import Lowering, lanes_of
from sapper.targets.ptx import assembler
from sapper.tile.canonical import canonicalize
from sapper.tile.interpret import interpret
from sapper.tile.schedule import DimClass, Schedule, Specialization

P, G, C, M = sp.dims("P G C M")
MMA = "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"


def tensors_of(kernel: Any) -> list[str]:
    return [name for name, type in kernel.parameters if hasattr(type, "dims")]


CASES = {
    "matmul_q8": {"P": 5, "G": 2, "C": 35, "M": 33}, "matmul_q4": {"P": 3, "G": 1, "C": 64, "M": 64},
    "matmul_residual_q4m": {"P": 5, "G": 1, "C": 35, "M": 35}, "matmul_swiglu_q4": {"P": 3, "G": 2, "C": 33, "M": 33},
    "matmul_q4m_128": {"P": 5, "G": 2, "C": 33, "M": 33}, "matmul_q4m_by32": {"P": 5, "G": 3, "C": 70, "M": 70},
    "matmul_q4k": {"P": 3, "S": 1, "C": 35, "M": 33}, "matmul_q6k": {"P": 3, "S": 2, "C": 33, "M": 33},
    "grouped_swiglu_q8": {"E": 3, "N": 2, "T": 3, "G": 1, "C": 80, "J": 67},
    "grouped_q4m": {"E": 4, "N": 1, "T": 5, "G": 2, "C": 80, "J": 80},
    "grouped_q4k": {"E": 3, "N": 1, "T": 3, "S": 1, "C": 40, "J": 33},
}
FEW = {
    "matmul_residual_q4": {"P": 9, "G": 2, "C": 16, "M": 9}, "matmul_swiglu_q4m_128": {"P": 7, "G": 1, "C": 3, "M": 3},
    "matmul_residual_q6k": {"P": 5, "S": 1, "C": 16, "M": 16},
    "grouped_swiglu_q4m": {"E": 3, "N": 1, "T": 9, "G": 1, "C": 40, "J": 40},
}
"""Rows and panels that end inside of a tile. Scales of blocks and of groups, minima, sums of the activations, a block
that is a group, two matrices with the same rows, scales that are integers, weights of 6 bits; rows of experts. FEW:
up to 16 rows, or so many of an expert where those of all are shared out evenly."""


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", [*CASES, *FEW])
def test_on_the_emulator(name: str) -> None:
    """Some lazily, where races would show."""
    entry, lazy = find(name), name in ("matmul_q4", "matmul_q4m_by32", "grouped_q4m", "matmul_residual_q4")
    arguments = entry.make_arguments(np.random.default_rng(5), (CASES | FEW)[name])
    run = emulate.run(entry.kernel, *arguments.values(), target="sm_80" if lazy else "sm_90a", workers=1,
                      aligned=tensors_of(entry.kernel), options=emulate.Options(lazy=lazy))
    assert entry.compare(arguments, entry.reference(arguments)) is None
    assert run.counters.instructions[MMA] > 0


@sp.kernel
def odd(w: Tensor[u8, P, G, 4, 16, 4], x: Tensor[i8, G, C, 32], s: Tensor[f16, P, G, 16], t: Tensor[i32, G, P, 16],
        start: Tensor[i32, G, C], y: Tensor[f32, M, P, 16]):
    """What sums begin with is any number of a row, and of a column; one of two sums is scaled twice."""
    q, begin = x.view(G, C, 2, 4, 4), start.view(G, C)
    for p, m in tiles(P, M):
        l = whole(16)
        acc = zeros(m, p, l, dtype=f32)
        for g in each(G):
            j, i = whole(4), whole(4)
            packed = w[p, g, j, l, i]
            low, high = (packed & 15) @ q[g, m, 0, j, i], (packed >> 4) @ q[g, m, 1, j, i]
            acc += (low + (high + t[g, p, l])).to(f32) * s[p, g, l].to(f32)
            acc += (begin[g, m] - (low << 1)).to(f32) * 0.25
        y[m, p, l] = acc


@sp.kernel
def clipped(w: Tensor[u8, P, G, 8, 16, 4], x: Tensor[i8, G, C, 32], y: Tensor[f32, M, P, 16]):
    """Sums that something else is done with."""
    q = x.view(G, C, 8, 4)
    for p, m in tiles(P, M):
        l = whole(16)
        acc = zeros(m, p, l, dtype=f32)
        for g in each(G):
            j, i = whole(8), whole(4)
            acc += maximum(w[p, g, j, l, i] @ q[g, m, j, i], 0).to(f32)
        y[m, p, l] = acc


def arguments_of(kernel: Any, extents: dict[str, int]) -> dict[str, np.ndarray]:
    random = np.random.default_rng(3)
    made: dict[str, np.ndarray] = {}
    for name, type in kernel.parameters:
        shape = [extents.get(dim, dim) for dim in type.dims]
        dtype = {"u8": np.uint8, "i8": np.int8, "i32": np.int32, "f16": np.float16, "f32": np.float32}[type.dtype.name]
        values = random.standard_normal(shape) if type.dtype.is_float else random.integers(
            *{"u8": (0, 256), "i8": (-128, 128), "i32": (-9999, 9999)}[type.dtype.name], shape)
        made[name] = values.astype(dtype)
    return made


@pytest.mark.parametrize("kernel", [odd, clipped], ids=lambda k: k.name)
def test_other_kernels_of_that_form(kernel: Any) -> None:
    """What takes elements one by one is done on sums, as far as it does so with floats; else all is as before."""
    arguments = arguments_of(kernel, {"P": 3, "G": 2, "C": 35, "M": 33})
    copies = {name: array.copy() for name, array in arguments.items()}
    interpret(kernel.tile_ir(), copies)
    counters = emulate.run(kernel, *arguments.values(), target="sm_80", workers=1, aligned=tensors_of(kernel)).counters
    np.testing.assert_allclose(arguments["y"], copies["y"], rtol=1e-5, atol=1e-5 * np.abs(copies["y"]).max())
    assert (counters.instructions.get(MMA, 0) > 0) == (kernel is odd)


def nest_of(name: str, aligned: bool = True) -> BlockNest | None:
    kernel = find(name).kernel
    function = kernel.tile_ir()
    canonicalize(function)
    names = tensors_of(kernel)
    known = frozenset(names if aligned else ())
    return find_nest(function, Specialization({}, dict.fromkeys(names, "contiguous"), known))


def test_parts_of_nests() -> None:
    """Gate and up have the same rows; what minima meet are other rows, once for a super block."""
    plain, gated, super_blocks = map(nest_of, ("matmul_q4", "matmul_swiglu_q4", "matmul_q4k"))
    assert plain is not None and gated is not None and super_blocks is not None
    assert [(part.count, part.depth, len(part.sums)) for part in plain.parts] == [(4, 32, 1)] and plain.sets == 2
    (gate, up) = gated.parts
    assert gate.rows is None and up.rows is gate and gated.sets == 3
    assert [(part.count, part.depth, len(part.sums), part.rows) for part in super_blocks.parts] == [
        (4, 64, 2, None), (1, 32, 2, None)]


def test_words_of_what_starts_anywhere_are_not_read() -> None:
    assert nest_of("matmul_q4", aligned=False) is None


def lowered(name: str, rows: int) -> set[str]:
    kernel = find(name).kernel
    names = tensors_of(kernel)
    known = Specialization({"M": DimClass(rows, 1), **{d: DimClass(4096, 64) for d in "PGC"}},
                           dict.fromkeys(names, "contiguous"), frozenset(names))
    return {op.name for op in to_lane(kernel.tile_ir(), Schedule(), facts_of(targets.target("sm_80")), known).walk()}


def test_a_row_meets_panels_in_registers() -> None:
    assert "matrix_multiply" in lowered("matmul_q4", 2) and "matrix_multiply" not in lowered("matmul_q4", 1)


def tile_of(name: str, **hints: int) -> tuple[int, int]:
    kernel = find(name).kernel
    function, names = kernel.tile_ir(), tensors_of(kernel)
    canonicalize(function)
    known = Specialization({dim: DimClass(hints.get(dim, 4096), 64) for dim in function.attributes["dims"]},
                           dict.fromkeys(names, "contiguous"), frozenset(names))
    facts = facts_of(targets.target("sm_80"))
    lowering = Lowering(function, Schedule(), facts, known, lanes_of(function, facts))
    lowering.find_matrix_walk()
    assert max(1, prod(lowering.nest_warps)) == lowering.warps
    return lowering.nest_tile


def test_tiles() -> None:
    """Few rows have tiles of 32, wide as stages have room: two matrices, and blocks of 256; of both at once others.
    Rows of experts are those of all by the number of experts, from 2 to 256, if there are so many."""
    assert [tile_of(name, M=8) for name in ("matmul_q4", "matmul_swiglu_q4", "matmul_q4k", "matmul_swiglu_q4k")] == [
        (32, 128), (32, 128), (32, 64), (64, 32)]
    assert tile_of("matmul_q4", M=64) == tile_of("matmul_q4") == (128, 64)
    assert tile_of("grouped_q4", J=16384, E=64, T=8, N=8) == (128, 32)      # experts' rows share a task
    assert [tile_of("grouped_q4", J=rows, E=64, T=8, N=128) for rows in (16384, 2048, 8, 1)] == [
        (128, 64), (32, 128), (32, 128), (0, 0)]


@pytest.mark.skipif(None in map(assembler.find_tool, ("ptxas", "nvdisasm")),
                    reason="ptxas or nvdisasm is not installed")
@pytest.mark.parametrize(("name", "rows", "multiply_adds", "most", "spilled"), [
    ("matmul_q4", 2**31 - 1, 64 * 2 + 32, 720, 8), ("matmul_q6k", 16, 256 + 16, 1640, 40)])
def test_machine_code(name: str, rows: int, multiply_adds: int, most: int, spilled: int) -> None:
    """Of 128 x 64, or 32 x 128, sums by eight warps, each 64 products of 16 x 8 x 16 for a group, or a block of 256,
    of which each 16 have a scale: a multiply-add. What is spilled is outside of the loop."""
    kernel = find(name).kernel
    names = tensors_of(kernel)
    dims = dict.fromkeys("PGSCM", (2**31 - 1, 64)) | {"M": (rows, 1 if rows == 16 else 64)}
    text = compile_kernel(kernel, {}, dict.fromkeys(names, "contiguous"), {
        dim: dims[dim] for dim in kernel.tile_ir().attributes["dims"]}, targets.target("sm_80"), None,
        frozenset(names)).text()
    (made,) = assembler.assemble([text], "sm_80").values()
    loop = next(loop for loop in made.loops() if loop["HMMA"])
    assert made.spilled_bytes <= spilled and not loop["LDL"] + loop["STL"]
    assert (loop["HMMA"], loop["FFMA"]) == (64, multiply_adds) and loop.total() <= most
