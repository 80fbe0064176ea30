"""Operands that are computed on their way to matrix instructions (sapper/lane/computed_pieces.py)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import sapper as sp
from sapper import Tensor, bf16, each, emulate, f32, i8, maximum, targets, tiles, u8, whole, zeros
from sapper.codegen.pipeline import compile_kernel, facts_of, to_lane
from sapper.ir.extents import evaluate_nested
from sapper.ir.nodes import Function
from sapper.ir.types import DType
from sapper.targets.ptx import assembler
from sapper.tile.interpret import interpret
from sapper.tile.schedule import DimClass, Schedule, Specialization

from .computed import BLOCKS, KERNELS, int4, int8

NUMPY = {"bf16": ml_dtypes.bfloat16, "f16": np.float16, "f32": np.float32, "f8e4m3": ml_dtypes.float8_e4m3fn,
         "f8e5m2": ml_dtypes.float8_e5m2, "i8": np.int8, "u8": np.uint8, "i32": np.int32}
needs_machine_code = pytest.mark.skipif(
    None in map(assembler.find_tool, ("ptxas", "nvdisasm")), reason="ptxas or nvdisasm is not installed")
WHOLE = {"M": 33, "N": 64, "K": 128, "KB": 16, "NB": 8, "E": 2}
RAGGED = {"M": 35, "N": 43, "K": 90, "KB": 12, "NB": 6, "E": 1}
"""No rows are aligned, and pieces end inside."""
M, N, K, KB, B = sp.dims("M N K KB B")


def arguments_of(kernel: Any, extents: dict[str, int]) -> dict[str, np.ndarray]:
    """Scales and the like are positive; every code of a byte, but for NaN and infinities of fp8, is among weights."""
    random = np.random.default_rng(4)
    made: dict[str, np.ndarray] = {}
    for name, type in kernel.parameters:
        shape, dtype = [evaluate_nested(d, extents) for d in type.dims], NUMPY[type.dtype.name]
        if name == "y":
            made[name] = np.full(shape, np.nan, dtype)
        elif name in ("start", "stop"):      # groups of 3 rows and the rest
            made[name] = np.array([0, 3, extents["M"]], dtype)[-shape[0] - (name == "start"):][:shape[0]]
        elif type.dtype.is_integer:
            low, high = (0, 16) if name == "z" else (np.iinfo(dtype).min, np.iinfo(dtype).max + 1)
            made[name] = random.integers(low, high, shape).astype(dtype)
        elif type.dtype.bits == 8:
            codes = random.integers(0, 0x7C, shape).astype(np.uint8) | (random.integers(0, 2, shape) << 7).astype(
                np.uint8)
            made[name] = codes.view(dtype)
        else:
            values = random.uniform(0.1, 0.5, shape) if name in "srgt" else random.standard_normal(shape)
            made[name] = values.astype(dtype)
    return made


def assert_right(kernel: Any, extents: dict[str, int], level: str, lazy: bool, aligned: str | None = None,
                 schedule: Schedule | None = None) -> Mapping[str, int]:
    """Gives what was carried out, how often."""
    arguments = arguments_of(kernel, extents)
    copies = {name: array.copy() for name, array in arguments.items()}
    interpret(kernel.tile_ir(), copies)
    counters = emulate.run(kernel, *arguments.values(), target=level, workers=2, aligned=aligned, schedule=schedule,
                           options=emulate.Options(lazy=lazy)).counters
    found, wanted = (a["y"].astype(np.float64) for a in (arguments, copies))
    least = np.nanmax(np.abs(wanted)) * (1e-5 if kernel.parameters[-1][1].dtype is f32 else 1e-2)
    np.testing.assert_allclose(found, wanted, rtol=1e-2, atol=least)
    assert any(name.startswith("mma.sync") for name in counters.instructions)
    return counters.instructions


@pytest.mark.sampled(4)
@pytest.mark.parametrize("extents", [WHOLE, RAGGED], ids=["whole", "ragged"])
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.name)
def test_on_the_emulator(kernel: Any, extents: dict[str, int]) -> None:
    """Lazy, where races would show, if whole; what is ragged on another level."""
    whole = extents is WHOLE
    assert_right(kernel, extents, "sm_80" if whole else "sm_90a", whole)


def test_aligned_rows_that_end_inside_a_piece() -> None:
    """Neighbours of a lane are then inside or outside together, and are read at once."""
    assert_right(int8, {"M": 64, "N": 64, "K": 112}, "sm_80", True, "xw")


def test_shares_of_the_depth() -> None:
    assert_right(int4, {"M": 64, "N": 64, "K": 256, "KB": 2}, "sm_80", False, schedule=Schedule(split={"k": 2}))


def lowered(kernel: Any, level: str = "sm_80") -> Function:
    names = [name for name, _ in kernel.parameters]
    known = Specialization({d: DimClass(4096, 64) for d in ("M", "N", "K", "KB", "NB", "B", "E")},
                           dict.fromkeys(names, "contiguous"), frozenset(names))
    return to_lane(kernel.tile_ir(), Schedule(), facts_of(targets.target(level)), known)


def test_what_lies_in_memory_waits_in_registers_for_the_products() -> None:
    """Read once, 16 bytes of a lane at a time: before the products of another piece, half of which are made before an
    element is."""
    loop = max((op for op in lowered(int4).walk() if op.name == "loop"),
               key=lambda op: sum(inner.name == "matrix_multiply" for inner in op.blocks[0].ops))
    names = [op.name for op in loop.blocks[0].ops]
    products = [place for place, name in enumerate(names) if name == "matrix_multiply"]
    runs = [op for op in loop.blocks[0].ops if op.name == "load_run"]
    assert len(products) == 128 and [len(op.results) for op in runs] == [4, 4]
    assert max(place for place, name in enumerate(names) if name == "load_run") < products[0]
    assert sum(place < names.index("unpack") for place in products) == 64 and names.count("pack2") == 32


@sp.kernel
def costly(x: Tensor[bf16, M, K], w: Tensor[bf16, N, K], y: Tensor[f32, M, N]):
    for m, n in tiles(M, N):
        acc = zeros(m, n, dtype=f32)
        for k in tiles(K):
            acc += sp.tanh(x[m, k].to(f32)).to(bf16) @ w[n, k]
        y[m, n] = acc


@sp.kernel
def thirds(x: Tensor[bf16, M, K], w: Tensor[i8, N, K], s: Tensor[f32, N, KB], y: Tensor[f32, M, N]):
    for m, n in tiles(M, N):
        acc = zeros(m, n, dtype=f32)
        for k in tiles(K):
            acc += x[m, k] @ (w[n, k].to(f32) * s[n, k // 96]).to(bf16)
        y[m, n] = acc


@pytest.mark.parametrize("kernel", [costly, thirds], ids=lambda k: k.name)
def test_what_is_made_before_the_product(kernel: Any) -> None:
    """More than fits in the time of the products is computed once, by a loop of its own; so is what a block of scales
    that no piece keeps to is for."""
    names = [op.name for op in lowered(kernel).walk()]
    assert "unpack" not in names and "matrix_multiply" in names and "barrier" in names


@pytest.mark.sampled(3)
@pytest.mark.parametrize("rows", [66, 33])
@pytest.mark.parametrize("kernel", BLOCKS, ids=lambda k: k.name)
def test_blocks_of_bytes(kernel: Any, rows: int) -> None:
    """Their sums, and scales, are those of the whole; of 33 columns there is none in the second warp."""
    extents = {"M": rows, "N": 99 - rows, "K": 384, "B": 3, "NB": 3}
    counters = assert_right(kernel, extents, "sm_80" if rows == 66 else "sm_90a", rows == 66, "xw")
    assert any("m16n8k32" in name for name in counters)


@pytest.mark.parametrize("kernel", BLOCKS, ids=lambda k: k.name)
def test_sums_of_blocks_are_floats_already(kernel: Any) -> None:
    lane = lowered(kernel)
    products = [op for op in lane.walk() if op.name == "matrix_multiply"]
    begins = [v.op for op in products for v in op.operands[6:] if v.op is not None and v.op.name == "splat_const"]
    assert len(products) == 64 and {op.attributes["value"] for op in begins} == {0x4B400000}
    assert "cvt" not in {op.name for op in lane.walk()}


@pytest.mark.parametrize(("left", "right"), [((u8, 255), (u8, 255)), ((u8, 255), (i8, -128)), ((i8, -128), (i8, -128))],
                         ids=["u8 u8", "u8 i8", "i8 i8"])
def test_the_largest_sums_of_blocks(left: tuple[DType, int], right: tuple[DType, int]) -> None:
    (of_rows, high), (of_columns, wide) = left, right

    @sp.kernel
    def product(x: Tensor[of_rows, M, B, 128], s: Tensor[f32, M, B], w: Tensor[of_columns, N, B, 128],
                y: Tensor[f32, M, N]):
        for m, n in tiles(M, N):
            acc = zeros(m, n, dtype=f32)
            for b in each(B):
                k = whole(128)
                acc += (x[m, b, k] @ w[n, b, k]).to(f32) * s[m, b]
            y[m, n] = acc

    x, w = np.full((33, 1, 128), high, NUMPY[of_rows.name]), np.full((33, 1, 128), wide, NUMPY[of_columns.name])
    s, y = np.ones((33, 1), np.float32), np.zeros((33, 33), np.float32)
    counters = emulate.run(product, x, s, w, y, target="sm_80", workers=1, aligned="xw").counters
    assert any("m16n8k32" in name for name in counters.instructions)
    assert (y == 128 * high * wide).all()


@sp.kernel
def other_block(x: Tensor[i8, M, B, 128], s: Tensor[f32, M, B], w: Tensor[i8, N, B, 128], y: Tensor[f32, M, N]):
    """The scale is of the block before."""
    for m, n in tiles(M, N):
        acc = zeros(m, n, dtype=f32)
        for b in each(B):
            k = whole(128)
            acc += (x[m, b, k] @ w[n, b, k]).to(f32) * s[m, maximum(b - 1, 0)]
        y[m, n] = acc


@sp.kernel
def weighted(x: Tensor[i8, M, B, 128], s: Tensor[f32, M, N], w: Tensor[i8, N, B, 128], y: Tensor[f32, M, N]):
    """The scale is one of an element of the sum."""
    for m, n in tiles(M, N):
        acc = zeros(m, n, dtype=f32)
        for b in each(B):
            k = whole(128)
            acc += (x[m, b, k] @ w[n, b, k]).to(f32) * s[m, n]
        y[m, n] = acc


@pytest.mark.parametrize("kernel", [other_block, weighted], ids=lambda k: k.name)
def test_loops_over_blocks_that_stay(kernel: Any) -> None:
    assert "matrix_multiply" not in {op.name for op in lowered(kernel).walk()}


@needs_machine_code
def test_machine_code() -> None:
    """Triton 3.9 takes 1080 instructions for the same (bench/gpu_static.py)."""
    names = [name for name, _ in int4.parameters]
    text = compile_kernel(int4, {}, dict.fromkeys(names, "contiguous"),
                          dict.fromkeys(("M", "N", "K", "KB"), (2**31 - 1, 64)), targets.target("sm_80"), None,
                          frozenset(names)).text()
    (made,) = assembler.assemble([text], "sm_80").values()
    assert made.spilled_bytes == 0
    loop = next(loop for loop in made.loops() if loop["HMMA"])
    assert loop["HMMA"] == 128 and loop["I2F"] == 0 and loop.total() <= 520
