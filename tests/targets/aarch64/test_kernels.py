"""Kernels as AArch64 machine code: what test_code_on_emulators.py does not ask of every family."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from sapper.cli.kernels import specialise
from sapper.codegen.machine import Instruction
from sapper.codegen.pipeline import compile_kernel
from sapper.kernels import find
from sapper.targets import target
from tests.targets.on_emulators import compile_for, needs_emulator, run_crowded

from .test_rows import ASSEMBLER, assembled


@needs_emulator("aarch64")
def test_what_does_not_fit_the_registers_goes_to_the_frame_and_comes_back() -> None:
    """Registers of the caller are saved and given back."""
    made, names = run_crowded("neoverse-n1", 40)
    assert made.frame_bytes and {"sub.stack", "push.vec", "pop.vec", "str.q"} <= names


OWN_PRODUCTS = {"usdot", "sudot", "bfdot", "smmla", "ummla", "usmmla", "bfmmla", "bfcvtn", "bfcvtn2"}


@pytest.mark.parametrize(("name", "expected"), [
    ("matmul_nt_i8", {"smmla"}), ("matmul_nt_u8", {"usmmla", "usdot", "sudot"}),
    ("matmul_nt_bf16_bf16", {"bfmmla", "bfdot"}), ("matmul_q8", {"usmmla", "usdot"}),
    ("attention_bf16_128", {"bfmmla", "bfdot", "bfcvtn"}), ("narrow_bf16", {"bfcvtn"})])
def test_kernels_take_the_products_of_their_types(name: str, expected: set[str]) -> None:
    """Those of a processor that lacks them stay as they were."""
    for processor, products in (("neoverse-v2", expected), ("neoverse-n1", set())):
        made = compile_kernel(find(name).kernel, target=target(processor), schedule=None, aligned=frozenset(),
                              **specialise(find(name).kernel, {}, {}))
        mnemonics = {item.row.mnemonic for item in made.made.machine.body if isinstance(item, Instruction)}
        assert mnemonics & OWN_PRODUCTS == products


@pytest.mark.skipif(shutil.which(ASSEMBLER) is None, reason=f"{ASSEMBLER} is not installed")
@pytest.mark.parametrize(("name", "processor"), [
    ("softmax", "neoverse-n1"), ("matmul_nt_bf16", "neoverse-n1"), ("rope_yarn_half_split", "neoverse-n1"),
    ("grouped_q4", "neoverse-n1"), ("matmul_nt_bf16_bf16", "neoverse-v1"), ("matmul_q8", "neoverse-n2"),
    ("attention_bf16_128", "neoverse-v2")])
def test_text_and_bytes_are_the_same_program(name: str, processor: str, tmp_path: Path) -> None:
    entry = find(name)
    arguments = entry.make_arguments(np.random.default_rng(0), entry.check_shapes[-1])
    made, _ = compile_for(entry.kernel.tile_ir(), arguments, processor)
    assert assembled(made.text, tmp_path) == made.bytes
