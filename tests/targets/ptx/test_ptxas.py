"""NVIDIA's assembler takes every kernel, spills nothing, and gives the recorded registers.

Skipped where there is no ptxas: it comes with the CUDA toolkit, or in the wheel nvidia-cuda-nvcc. The recorded figures
are compared where the assembler has the version that made them; opcodes of machine code where there is a disassembler,
nvdisasm, too. What the same ptxas has taken before, with the same flags, is known by a digest and not given again, but
for a sample; SAPPER_TEST_PTXAS=all gives it everything. `python -m tests.targets.ptx.test_ptxas` records anew, and
needs both programs.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

from sapper import targets
from sapper.codegen.pipeline import compile_kernel
from sapper.kernels import find, library
from sapper.kernels.record import LibraryKernel
from sapper.targets.ptx import assembler
from sapper.targets.ptx.assembler import Assembled, AssemblerError, assemble
from sapper.targets.ptx.target import TARGETS
from tests.strategies.amount import FUZZ

from .kernels import KERNELS, bf16_nn
from .narrow import block_scaled
from .test_library import text_of

RECORD = Path(__file__).with_name("recorded.json")
needs_ptxas = pytest.mark.skipif(assembler.find_tool("ptxas") is None, reason="ptxas is not installed")
needs_nvdisasm = pytest.mark.skipif(assembler.find_tool("nvdisasm") is None, reason="nvdisasm is not installed")


def matrix_text(kernel: Any, level: str) -> str:
    names = [name for name, _ in kernel.parameters]
    return compile_kernel(kernel, {}, dict.fromkeys(names, "contiguous"), dict.fromkeys("MNK", (2**31 - 1, 64)),
                          targets.target(level), None, frozenset(names)).text()


LATENT = find("latent_attention_decode_narrow").kernel
LATENT_HEADS = (16, 128)
"""Of DeepSeek-V2-Lite and DeepSeek-V3."""


def latent_text(heads: int, level: str) -> str:
    """Multi-head latent attention of one token on matrix instructions, its number of heads in its name."""
    names = [name for name, type in LATENT.parameters if hasattr(type, "dims")]
    text = compile_kernel(LATENT, {"H": heads, "C": 512, "S": 64}, dict.fromkeys(names, "contiguous"),
                          dict.fromkeys("PB", (2**31 - 1, 1)), targets.target(level), None, frozenset(names)).text()
    return text.replace(f".entry {LATENT.name}(", f".entry {LATENT.name}_{heads}(")


RECORDED = ("sm_80", "sm_90a")
"""Levels of which figures are recorded; of the others digests are."""

ALL = bool(FUZZ) or os.environ.get("SAPPER_TEST_PTXAS") == "all"
SAMPLE = 16
"""One of so many texts, by digest, is given to ptxas though it is known."""
COMPILED = 4
"""One of so many kernels is compiled though its text is known to be sm_80's but for the head."""


def texts_of(level: str, expected: Mapping[str, Any] | None = None) -> dict[str, str]:
    """By name of the kernel. Levels without recorded figures take the library's in turns, each its part of those of one
    type and of one kind of products; in a search for faults all of them. expected: what is recorded of the level."""
    others = [other for other in TARGETS if other not in RECORDED]
    dealt = sorted(library(), key=lambda entry: (entry.products, entry.dtype))
    taken = dealt if level in RECORDED or FUZZ else dealt[others.index(level)::len(others)]
    # Two processes that need the same texts meet in the middle.
    ordered = [*enumerate(taken)][::-1 if [*TARGETS].index(level) % 2 else 1]
    texts = [*(library_text(entry, level, expected if number % COMPILED else None) for number, entry in ordered),
             *(matrix_text(k, level) for k in KERNELS), *(latent_text(heads, level) for heads in LATENT_HEADS)]
    named = {name_of(text): text for text in texts}
    assert len(named) == len(texts)
    return named


def library_text(entry: LibraryKernel, level: str, expected: Mapping[str, Any] | None) -> str:
    """The text of sm_80 under this level's head, where that is what is recorded: nearly always. Else compiled."""
    if level != "sm_80" and expected and not ALL:
        head = text_of(find("vector_add"), level).split("\n", 2)[:2]
        text = "\n".join((*head, text_of(entry, "sm_80").split("\n", 2)[2]))
        if digest(text, level) == expected.get(name_of(text), {}).get("digest"):
            return text
    return text_of(entry, level)


def name_of(text: str) -> str:
    return re.findall(r"\.entry (\w+)\(", text)[0]


def digest(text: str, level: str) -> str:
    """Of all that ptxas's code depends on: comments name the place of the source, which is another one elsewhere."""
    parts = (assembler.version(assembler.tool("ptxas")), *assembler.flags(level), re.sub(r"\s*//.*", "", text))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


SPILLS = {("sm_90a", "grouped_blocks_swiglu_fp8"): 8, ("sm_120a", "grouped_swiglu_fp8"): 16,
          ("sm_120a", "latent_attention_runs_rounded"): 16, ("sm_120a", "latent_attention_paged_bf16"): 40,
          ("sm_120a", "latent_attention_paged_sparse_bf16"): 56}
"""Bytes that ptxas spills all the same: of the second and third it leaves 250 and 254 registers on sm_89, and needs 259
on sm_120a, where the last two take 254. The first is for processors with 16 registers."""


def assembled(texts: Iterable[str], level: str) -> dict[str, Assembled]:
    """Of each kernel, none of which spills but those of SPILLS."""
    found = assemble([*texts], level)
    spilled = {name: made.spilled_bytes for name, made in found.items() if made.spilled_bytes}
    assert spilled == {name: SPILLS[level, name] for name in found if (level, name) in SPILLS}
    assert all(made.registers <= TARGETS[level].registers for made in found.values())
    return found


def figures(made: Assembled) -> dict[str, Any]:
    return {"registers": made.registers, "instructions": made.instructions, "opcodes": made.opcodes()}


@needs_ptxas
@pytest.mark.long
@pytest.mark.parametrize("level", TARGETS)
def test_every_kernel_assembles_without_spills(level: str) -> None:
    record = json.loads(RECORD.read_text())
    expected = record["levels"][level]
    texts = texts_of(level, expected)
    digests = {name: digest(text, level) for name, text in texts.items()}
    new = {name for name, made in digests.items() if made != expected.get(name, {}).get("digest")}
    sample = {name for name, made in digests.items() if ALL or int(made, 16) % SAMPLE == 0}
    found = assembled([texts[name] for name in texts if name in new | sample], level)
    assert found.keys() == new | sample
    if record["ptxas"] != assembler.version(assembler.tool("ptxas")):
        return
    if level in RECORDED:
        assert texts.keys() == expected.keys(), "record anew"
        for name, made in found.items():
            known = figures(made) if made.code is not None else figures(made) | {"opcodes": expected[name]["opcodes"]}
            assert known | {"digest": expected[name]["digest"]} == expected[name], (
                f"{name}: record anew if the change is meant")
    if new and not FUZZ:
        warnings.warn(f"{level}: {len(new)} kernels are not as recorded and take time: record anew", stacklevel=1)


@needs_ptxas
@needs_nvdisasm
def test_the_loop_of_a_matrix_product_in_machine_code() -> None:
    """128 x 128 x 64 on four warps: 128 products of 16 x 8 x 16 for each, their operands 32 times four 8 x 8 matrices.

    Triton 3.9 takes 275 instructions for the same (bench/gpu_static.py).
    """
    loop = next(loop for loop in assemble([matrix_text(bf16_nn, "sm_80")], "sm_80")["bf16_nn"].loops() if loop["HMMA"])
    assert (loop["HMMA"], loop["LDSM"], loop["LDGSTS"]) == (128, 32, 16)
    assert loop.total() <= 275


@needs_ptxas
@needs_nvdisasm
@pytest.mark.parametrize("kernel", [k for k in KERNELS if len(k.parameters) == 3], ids=lambda k: k.name)
def test_the_loops_of_warps_that_specialise(kernel: Any) -> None:
    """128 x 256 x 64: four products of 64 x 256 x 16 for each group of warps, which do not copy; no product waits for
    the one before (ptxas would warn). Triton 3.9 takes 86 to 93 instructions for the same (bench/gpu_static.py)."""
    made = assemble([matrix_text(kernel, "sm_90a")], "sm_90a")[kernel.name]
    assert made.spilled_bytes == 0
    multiplies = next(loop for loop in made.loops() if loop["HGMMA"])
    copies = next(loop for loop in made.loops() if loop["UTMALDG"])
    assert (multiplies["HGMMA"], multiplies["UTMALDG"], copies["HGMMA"]) == (4, 0, 0)
    assert multiplies.total() <= 76


@needs_ptxas
@needs_nvdisasm
def test_the_loop_of_latent_attention_in_machine_code() -> None:
    """64 heads, 64 positions: a group has 18 products of 64 x 64 x 16 and four of 64 x 256 x 16, none of which waits
    for the one before, and nothing spills. On warps alone eight take 750 instructions for 16 heads."""
    made = assemble([latent_text(128, "sm_90a")], "sm_90a")[f"{LATENT.name}_128"]
    assert made.spilled_bytes == 0
    loop = next(loop for loop in made.loops() if loop["HGMMA"])
    assert (loop["HGMMA"], loop["UTMALDG"], loop["LDL"], loop["STL"]) == (22, 0, 0, 0)
    assert loop["WARPGROUP"] <= 4 and loop.total() <= 500


@needs_ptxas
@needs_nvdisasm
def test_the_loop_of_fp8_with_scales_of_blocks() -> None:
    """128 x 256 x 128 by two groups, in clusters of two: of each lane 128 totals, to which 64 sums are added twice;
    beside these 102 instructions at most, where two loops of 128 x 128 have 158. None waits for memory, or spills."""
    names = [name for name, _ in block_scaled.parameters]
    dims = dict.fromkeys(("M", "N", "K", "KB", "NB"), (2**31 - 1, 64))
    text = compile_kernel(block_scaled, {}, dict.fromkeys(names, "contiguous"), dims, targets.target("sm_90a"), None,
                          frozenset(names)).text()
    (made,) = assemble([text], "sm_90a").values()
    loop = next(loop for loop in made.loops() if loop["QGMMA"])
    assert (loop["QGMMA"], loop["FFMA"], loop["MEMBAR"], loop["LDL"], made.spilled_bytes) == (8, 128, 0, 0, 0)
    assert loop.total() <= 128 + 102


@needs_ptxas
def test_what_ptxas_refuses_is_told() -> None:
    text = text_of(find("vector_add"), "sm_80")
    with pytest.raises(AssemblerError, match=r"ptxas for sm_80: .*line \d+.*no_such"):
        assemble([text.replace("add.f32", "no_such.f32").replace("add.rn.f32", "no_such.f32")], "sm_80")


def test_without_an_assembler_the_error_says_where_it_comes_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assembler, "find_tool", lambda name: None)
    with pytest.raises(AssemblerError, match=r"found no ptxas; expected it on the path, .* package nvidia-cuda-nvcc"):
        assemble([text_of(find("vector_add"), "sm_80")], "sm_80")


def record() -> None:
    """One kernel a line, so that a change shows in few of them."""
    levels = []
    for level in TARGETS:
        texts = texts_of(level)
        lines = []
        for name, made in sorted(assembled(texts.values(), level).items()):
            assert made.code is not None, "found no nvdisasm; expected it beside ptxas"
            known = {"digest": digest(texts[name], level), **(figures(made) if level in RECORDED else {})}
            lines.append(f'   "{name}": {json.dumps(known)}')
        levels.append(f'  "{level}": {{\n' + ",\n".join(lines) + "\n  }")
    version = assembler.version(assembler.tool("ptxas"))
    RECORD.write_text(f'{{\n "ptxas": "{version}",\n "levels": {{\n' + ",\n".join(levels) + "\n }\n}\n")


if __name__ == "__main__":
    record()
