"""Kernels as RISC-V machine code: what test_code_on_emulators.py does not ask of every family."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import numpy as np
import pytest

import sapper as sp
from sapper import Tensor, f32, tiles, zeros
from sapper.codegen.machine import Instruction
from sapper.ir.scratch import scratch_bytes
from sapper.kernels import find
from sapper.targets import target
from sapper.targets.riscv64.rows import NOP
from tests.lane.run_lane import argument_words, dims_of
from tests.targets.on_emulators import TARGETS, compile_for, needs_emulator, run_crowded

from .by_meaning import run_by_meaning
from .test_rows import ASSEMBLER, assembled

NAMES = TARGETS["riscv64"]
M, N, K = sp.dims("M N K")


BY_MEANING = ("softmax_bf16", "matmul_nn_f32", "matmul_nt_i8", "matmul_tn_bf16", "gather_f32", "rope_half_split",
              "rms_norm_quantize", "matvec_q4m", "dequantize_q4", "quantize_rows", "sample")


@pytest.mark.parametrize("place", range(len(BY_MEANING)), ids=BY_MEANING)
def test_library_kernel_by_the_meanings_of_rows(place: int) -> None:
    """Without an emulator, at a shape of middling size: code, what vectors are set to, and the frame."""
    entry, name = find(BY_MEANING[place]), NAMES[place % 2]
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


@needs_emulator("riscv64")
@pytest.mark.parametrize(("name", "count"), [("rva23u64", 40), ("spacemit-x60", 130)])
def test_what_does_not_fit_the_registers_goes_to_the_frame_and_comes_back(name: str, count: int) -> None:
    """Some of it beyond what a word reaches; registers of the caller are saved and given back."""
    made, names = run_crowded(name, count)
    assert (made.frame_bytes > 2048) == (count > 40) and {"vs1r.v", "vl1re8.v", "sd", "ld"} <= names


@pytest.mark.skipif(shutil.which(ASSEMBLER) is None, reason=f"{ASSEMBLER} is not installed")
@pytest.mark.parametrize("name", ["softmax", "matmul_nt_bf16", "rope_yarn_half_split", "grouped_q4"])
def test_text_and_bytes_are_the_same_program(name: str, tmp_path: Path) -> None:
    entry = find(name)
    arguments = entry.make_arguments(np.random.default_rng(0), entry.check_shapes[-1])
    made, _ = compile_for(entry.kernel.tile_ir(), arguments, "rva23u64")
    theirs = assembled(made.text, tmp_path)     # to the end of a block of 16 bytes
    assert theirs == made.bytes + NOP * ((len(theirs) - len(made.bytes)) // len(NOP))


@sp.kernel
def product(a: Tensor[f32, M, K], b: Tensor[f32, K, N], c: Tensor[f32, M, N]):
    for m, n in tiles(M, N):
        acc = zeros(m, n, dtype=f32)
        for k in tiles(K):
            acc += a[m, k] @ b[k, n]
        c[m, n] = acc


@pytest.mark.parametrize("name", NAMES)
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
