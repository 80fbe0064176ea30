"""NVIDIA's assembler takes every kernel for every level, spills nothing, and gives the registers that are recorded.

Skipped where there is no ptxas: it comes with the CUDA toolkit, or in the wheel nvidia-cuda-nvcc. The recorded figures
are compared where the assembler has the version that made them. `python -m tests.targets.ptx.test_ptxas` records anew.
"""

from __future__ import annotations

import json
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from sapper import targets
from sapper.codegen.pipeline import compile_kernel
from sapper.kernels import library
from sapper.targets.ptx.target import TARGETS

from .kernels import KERNELS
from .test_library import text_of

RECORD = Path(__file__).with_name("recorded.json")


def find_ptxas() -> str | None:
    """On the path, or in the wheel."""
    wheels = [p / "nvidia" / "cuda_nvcc" / "bin" / "ptxas" for p in map(Path, sys.path)]
    return shutil.which("ptxas") or next((str(p) for p in wheels if p.exists()), None)


PTXAS = find_ptxas()
needs_ptxas = pytest.mark.skipif(PTXAS is None, reason="ptxas is not installed")


def version() -> str:
    text = subprocess.run([str(PTXAS), "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"V([\d.]+)", text).group(1)  # type: ignore[union-attr]


def matrix_text(kernel: Any, level: str) -> str:
    names = [name for name, _ in kernel.parameters]
    return compile_kernel(kernel, {}, dict.fromkeys(names, "contiguous"), dict.fromkeys("MNK", (2**31 - 1, 64)),
                          targets.target(level), None, frozenset(names[:-1])).text()


def assembled(texts: list[str], level: str) -> dict[str, dict[str, int]]:
    """kernel -> registers, spilled bytes and instructions of machine code. All texts go through one run of ptxas."""
    heads = [text.split("\n\n", 1)[0] for text in texts]
    newest = max(heads, key=lambda head: [int(n) for n in head.split()[1].split(".")])
    near = next((line for text in texts for line in text.splitlines() if line.startswith(".extern .shared")), "")
    bodies = [text[text.index(".visible"):] for text in texts]
    with tempfile.TemporaryDirectory() as folder:
        source, made = Path(folder, "all.ptx"), Path(folder, "all.cubin")
        source.write_text("\n\n".join([newest, near, *bodies]))
        done = subprocess.run([str(PTXAS), f"-arch={level}", "-v", "-o", str(made), str(source)], capture_output=True,
                              text=True, check=False)
        assert not done.returncode, done.stderr[:3000]
        assert "warning" not in done.stderr, done.stderr[:3000]
        sizes = code_bytes(made.read_bytes())
    found = {}
    pattern = r"entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers"
    for name, stores, loads, registers in re.findall(pattern, done.stderr, re.DOTALL):
        found[name] = {"registers": int(registers), "spilled_bytes": int(stores) + int(loads),
                       "instructions": sizes[name] // 16}
    assert len(found) == len(texts)
    return found


def code_bytes(cubin: bytes) -> dict[str, int]:
    """kernel -> bytes of its section .text.NAME (ELF64: gABI, chapter 4). An instruction has 16."""
    (start,) = struct.unpack_from("<Q", cubin, 40)
    size, count, names = struct.unpack_from("<HHH", cubin, 58)
    headers = [struct.unpack_from("<IIQQQQ", cubin, start + size * n) for n in range(count)]
    table = headers[names][4]
    found = {cubin[table + h[0]:cubin.index(0, table + h[0])].decode(): h[5] for h in headers}
    return {name.removeprefix(".text."): length for name, length in found.items() if name.startswith(".text.")}


def measured(level: str) -> dict[str, dict[str, int]]:
    texts = [*(text_of(entry, level) for entry in library()), *(matrix_text(k, level) for k in KERNELS)]
    return assembled(texts, level)


@needs_ptxas
@pytest.mark.parametrize("level", TARGETS)
def test_every_kernel_assembles_without_spills(level: str) -> None:
    found = measured(level)
    assert [name for name, figures in found.items() if figures["spilled_bytes"]] == []
    assert all(figures["registers"] <= TARGETS[level].registers for figures in found.values())
    record = json.loads(RECORD.read_text())
    if record["ptxas"] == version() and level in record["levels"]:
        assert found == record["levels"][level], "record anew if the change is meant"


if __name__ == "__main__":
    levels = {level: measured(level) for level in ("sm_80", "sm_90a")}
    RECORD.write_text(json.dumps({"ptxas": version(), "levels": levels}, indent=1) + "\n")
