"""The PTX table: every row is sound, and ptxas agrees with it on what each level has."""

from __future__ import annotations

import re
import subprocess
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest

from sapper import emulate
from sapper.targets.ptx.assembler import find_tool
from sapper.targets.ptx.instructions import TABLE, form
from sapper.targets.ptx.levels import LEVELS, Needs, combine, lacking, version_for
from sapper.targets.ptx.rows import write_line

from .ptx_probes import forms, module

TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_90a", "sm_100a", "sm_120a")


PTXAS = find_tool("ptxas")
needs_ptxas = pytest.mark.skipif(PTXAS is None, reason="needs ptxas: pip install nvidia-cuda-nvcc")


def assemble(text: str, level: str, folder: Path) -> tuple[int, dict[int, str]]:
    """(status, line -> message) of ptxas."""
    path = folder / "probe.ptx"
    path.write_text(text, encoding="utf-8")
    done = subprocess.run([str(PTXAS), f"-arch={level}", "-O0", str(path), "-o", str(folder / "probe.cubin")],
                          capture_output=True, text=True, check=False)
    errors = {int(line): message for line, message in re.findall(r"line (\d+); error\s*: (.*)", done.stderr)}
    if done.returncode and not errors:
        pytest.fail(done.stderr[-2000:])
    return done.returncode, errors


@needs_ptxas
@pytest.mark.parametrize("level", TARGETS)
def test_ptxas_takes_every_form_at_its_lowest_version(level: str, tmp_path: Path) -> None:
    by_version = defaultdict(list)
    for one in forms():
        if one.illegal_on(level) is None:
            by_version[version_for(level, [one.needs])].append(one)
    for version, some in sorted(by_version.items()):
        text, told = module(level, version, some)
        status, errors = assemble(text, level, tmp_path)
        assert status == 0, {told.get(line, line): message for line, message in errors.items()}


@needs_ptxas
@pytest.mark.parametrize("level", TARGETS)
def test_ptxas_refuses_what_a_level_lacks(level: str, tmp_path: Path) -> None:
    some = [one for one in forms() if one.illegal_on(level) is not None]
    text, told = module(level, (9, 0), some)
    _, errors = assemble(text, level, tmp_path)
    assert [mnemonic for line, mnemonic in told.items() if line not in errors] == []


def test_a_mnemonic_names_one_row() -> None:
    for row in TABLE.rows.values():
        for text in row.mnemonics():
            owners = [other.name for other in TABLE.rows_of(row.opcode)
                      if other.match(tuple(text.split(".")[1:])) is not None]
            assert owners == [row.name], text


def test_there_are_rows_for_what_kernels_need() -> None:
    assert len(TABLE.rows) >= 200
    assert len(TABLE.opcodes()) >= 90


@pytest.mark.parametrize(("text", "level", "message"), [
    ("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16", "sm_80", "sm_90a; found sm_80; instead: mma.sync"),
    ("wgmma.fence.sync.aligned", "sm_100a", "is only on sm_90a; found sm_100a"),
    ("cp.async.bulk.commit_group", "sm_89", "needs sm_90 or later; found sm_89; instead: cp.async"),
    ("add.bf16x2", "sm_86", "modifier .bf16x2 needs sm_90 or later; found sm_86; instead: fma.rn.bf16x2"),
    ("mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32", "sm_86",
     "needs sm_89 or later; found sm_86; instead: cvt to f16"),
    ("ld.shared::cluster.b32", "sm_80", "modifier .shared::cluster needs sm_90"),
    ("tcgen05.mma.cta_group::1.kind::f16", "sm_120a", "is only on sm_100a; found sm_120a; instead: mma.sync.aligned"),
    ("tcgen05.ld.sync.aligned.32x32b.x8.b32", "sm_90a", "instead: nothing: sums of mma.sync lie in registers"),
])
def test_what_a_level_lacks_is_told_with_its_substitute(text: str, level: str, message: str) -> None:
    told = form(text).illegal_on(level)
    assert told is not None and message in told


def test_every_row_that_a_level_lacks_names_a_substitute() -> None:
    for row in TABLE.rows.values():
        for key, needs in row.needs.items():
            if any(lacking(needs, level) for level in TARGETS):
                assert row.instead.get(key) or row.instead.get(""), (row.name, key)


def forms_named(word: str) -> list[str]:
    """Those that a word of a substitute may mean: with all of its modifiers, and perhaps more."""
    opcode, *modifiers = word.split(".")
    found = [name for row in TABLE.rows_of(opcode) for name in row.mnemonics()]
    return [name for name in found if set(modifiers) <= set(name.split(".")[1:])]


def test_a_level_has_the_substitute_that_is_named_for_it() -> None:
    named = 0
    for row in TABLE.rows.values():
        for key, needs in row.needs.items():
            for level in (level for level in TARGETS if lacking(needs, level)):
                words = re.findall(r"[a-z]\w*(?:\.[\w:]+)+", row.instead.get(key) or row.instead[""])
                for word in (word for word in words if TABLE.rows_of(word.split(".")[0])):
                    named += 1
                    assert has(word, level), (row.name, key, word, level)
    assert named > 100


@cache
def has(word: str, level: str) -> bool:
    return any(form(name).illegal_on(level) is None for name in forms_named(word))


PRODUCT = "tcgen05.mma.cta_group::1.kind"
TENSOR_LINES = {
    # line -> what the emulator says of it, or nothing where it is fine; ptxas takes the same ones
    f"{PRODUCT}::f16 [%r1], %d1, %d2, %r2, {{%r3, %r4, %r5, %r6}}, %p1, 15;": "",
    f"{PRODUCT}::tf32.collector::a::lastuse [%r1+16], [%r2], %d2, 5, %p1, 0;": "",
    f"{PRODUCT}::i8 [%r1], %d1, %d2, %r2, {{%r3, %r4, %r5, %r6}}, !%p1;": "",
    "tcgen05.st.sync.aligned.16x32bx2.x2.unpack::16b.b32 [%r1], 64, {%r2, %r3};": "",
    "tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r1], %r2;": "",
    f"{PRODUCT}::f8f6f4 [%r1], %d1, %d2, %r2, %p1, 3;": "too many operands",
    f"{PRODUCT}::tf32 [%r1], %d1, %d2, %r2, %p1, 16;": "expected 0 to 15",
    f"{PRODUCT}::f16 [%r1], %d1, %d2, %r2, {{%r3, %r4}}, %p1;": "has 4 registers of lanes to leave alone, found 2",
    f"{PRODUCT}::f16.ashift [%r1], %d1, %d2, %r2, %p1;": "the table has no",
    "tcgen05.ld.sync.aligned.16x256b.x64.b32 {%r1}, [%r2];": "the table has no",
    "tcgen05.ld.sync.aligned.16x128b.x2.b32 {%r1, %r2}, [%r3];": "has 4 registers, found 2",
    "tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cta.b64 [%r1];": "the table has no",
    "max.f32 %r1, %r2, %r3, %r4;": "",
}


@needs_ptxas
def test_the_emulator_takes_those_lines_of_tensor_memory_that_ptxas_takes(tmp_path: Path) -> None:
    head = ".version 9.0\n.target sm_100a\n.address_size 64\n.visible .entry probe()\n{\n .reg .pred %p<4>;\n" \
        " .reg .b32 %r<16>;\n .reg .b64 %d<4>;\n bra done;\n"
    texts = {line: f"{head}{line}\ndone: ret;\n}}\n" for line in TENSOR_LINES}
    for line, told in TENSOR_LINES.items():
        if told:
            with pytest.raises(emulate.EmulationError, match=told):
                emulate.load(texts[line]).launch(block=(32,))
        else:
            emulate.load(texts[line]).launch(block=(32,))
    _, errors = assemble(head + "\n".join(TENSOR_LINES) + "\ndone: ret;\n}\n", "sm_100a", tmp_path)
    first = head.count("\n") + 1
    assert {line for place, line in enumerate(TENSOR_LINES) if place + first in errors} == {
        line for line, told in TENSOR_LINES.items() if told}


def test_unknown_forms_and_levels_are_told() -> None:
    with pytest.raises(KeyError, match=r"the table has no add\.f33; it has: add"):
        form("add.f33")
    with pytest.raises(KeyError, match="no form of this opcode"):
        form("frobnicate.u32")
    with pytest.raises(KeyError, match="unknown level 'sm_1'"):
        form("add.u32").illegal_on("sm_1")


def test_modifiers_may_stand_in_another_order() -> None:
    assert form("atom.global.gpu.acq_rel.add.u32").modifiers == form("atom.acq_rel.gpu.global.add.u32").modifiers


def test_lines() -> None:
    assert write_line(form("ld.global.v4.b32"), ["{%r1, %r2, %r3, %r4}", "[%rd1+16]", None]) == (
        "ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd1+16];")
    assert write_line(form("setp.lt.s32"), ["%p1", "%p2", "%r1", "0"], "@!%p3 ") == "@!%p3 setp.lt.s32 %p1|%p2, %r1, 0;"
    assert write_line(form("ret"), []) == "ret;"


def test_needs_add_up() -> None:
    both = combine([Needs.parse("7.8 sm_90"), Needs.parse("8.6 sm_100a sm_120a")])
    assert both == Needs((8, 6), 100, ("sm_100a", "sm_120a"))
    assert version_for("sm_80", [Needs.parse("7.8 sm_80")]) == (7, 8) and version_for("sm_80") == LEVELS["sm_80"]
