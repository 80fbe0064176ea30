"""Kernels as AArch64 machine code: what test_code_on_emulators.py does not ask of every family."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from sapper.kernels import find
from tests.targets.on_emulators import compile_for, needs_emulator, run_crowded

from .test_rows import ASSEMBLER, assembled


@needs_emulator("aarch64")
def test_what_does_not_fit_the_registers_goes_to_the_frame_and_comes_back() -> None:
    """Registers of the caller are saved and given back."""
    made, names = run_crowded("neoverse-n1", 40)
    assert made.frame_bytes and {"sub.stack", "push.vec", "pop.vec", "str.q"} <= names


@pytest.mark.skipif(shutil.which(ASSEMBLER) is None, reason=f"{ASSEMBLER} is not installed")
@pytest.mark.parametrize("name", ["softmax", "matmul_nt_bf16", "rope_yarn_half_split", "grouped_q4"])
def test_text_and_bytes_are_the_same_program(name: str, tmp_path: Path) -> None:
    entry = find(name)
    arguments = entry.make_arguments(np.random.default_rng(0), entry.check_shapes[-1])
    made, _ = compile_for(entry.kernel.tile_ir(), arguments, "neoverse-n1")
    assert assembled(made.text, tmp_path) == made.bytes
