"""Text in both syntaxes: what print.py writes reads back to the same bytes, and AT&T as GNU as's disassembler writes
it; operands bound by name; refusals."""

from __future__ import annotations

import contextlib
import random
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sapper.assembly import x86
from sapper.assembly.build import Assembly
from sapper.assembly.errors import AssemblyError
from sapper.assembly.finish import finish
from sapper.codegen.encode import EncodeError, encode_instruction
from sapper.codegen.machine import Immediate, Instruction, Memory
from sapper.codegen.print import print_instruction
from sapper.targets.x86_64.instructions import ROWS
from tests.assembly.pieces import ZEN4, binary, interpret, piece
from tests.codegen.test_encode import assemble, clashes, forms, needs_as
from tests.strategies.malformed import mutations, refusals


def read(text: str, syntax: str) -> Instruction:
    assembly = Assembly("line", x86.table)
    assembly.constants["constant"] = (64, bytes(64))
    assembly.text(text, syntax)
    (made,) = (item for item in assembly.body if isinstance(item, Instruction))
    return made


def cases(every: int) -> list[Instruction]:
    """Of each row the first form, then each so many-th."""
    found = []
    for row in ROWS.values():
        mine = [i for i in forms(row) if not clashes(i)]
        found += mine[:1] + mine[1::every]
    return found


def test_every_form_of_every_row_reads_back_to_the_same_bytes() -> None:
    wrong = []
    for case in cases(3):
        text = print_instruction(case)
        try:
            found = encode_instruction(read(text, "intel"))
        except AssemblyError as error:
            wrong.append(f"{case.row.name}: {text}: {error.headline}: {error.found}")
            continue
        if found != encode_instruction(case):
            wrong.append(f"{case.row.name}: {text}: {found[0].hex()} for {encode_instruction(case)[0].hex()}")
    assert not wrong, f"{len(wrong)} differ:\n" + "\n".join(wrong[:40])


@pytest.mark.skipif(shutil.which("objdump") is None, reason="GNU binutils are not installed")
def test_att_as_the_gnu_disassembler_writes_it(tmp_path: Path) -> None:
    """Bytes of a seventh of all forms, those a label, written as AT&T text by objdump, read back to the same bytes."""
    chosen = [c for c in cases(7) if not any(isinstance(o, Memory) and o.label for o in c.operands)]
    codes = [encode_instruction(c)[0] for c in chosen]
    binary_file = tmp_path / "code.bin"
    binary_file.write_bytes(b"".join(codes))
    listing = subprocess.run(["objdump", "-D", "-b", "binary", "-m", "i386:x86-64", "-w", str(binary_file)],
                             capture_output=True, text=True, check=True).stdout
    lines = [m.group(1) for m in re.finditer(r"^\s*[0-9a-f]+:\t[0-9a-f ]+\t(.*)$", listing, re.M)]
    assert len(lines) == len(chosen)
    wrong = []
    for case, code, text in zip(chosen, codes, lines, strict=True):
        if text.startswith("vpcmpeq") and case.row.mnemonic != text.split()[0]:
            continue  # vpcmpb with predicate 0 is a longer form of an instruction that has a mnemonic of its own
        text = text.removeprefix("{evex} ")
        try:
            found = encode_instruction(read(text, "att"))[0]
        except AssemblyError as error:
            wrong.append(f"{case.row.name}: {text}: {error.headline}: {error.found}")
            continue
        if found != code:
            wrong.append(f"{case.row.name}: {text}: {found.hex()} for {code.hex()}")
    assert not wrong, f"{len(wrong)} of {len(chosen)} differ:\n" + "\n".join(wrong[:60])


SUM = """
    xor eax, eax
    vxorps @acc, @acc, @acc      # the sum
    jmp test
    .balign 32
again:
    vaddps @acc, @acc, zmmword ptr [@x + rax*4]
    add rax, 16
test:
    cmp rax, @n
    jl again
    vmovups [@y], @acc
    ret
"""
SUM_ATT = """
    xorl %eax, %eax
    vxorps @acc, @acc, @acc
    jmp test
    .p2align 5
again:
    vaddps (@x,%rax,4), @acc, @acc
    addq $16, %rax
test:
    cmpq @n, %rax
    jl again
    vmovups @acc, (@y)
    ret
"""


@pytest.mark.parametrize("syntax, text", [("intel", SUM), ("att", SUM_ATT)])
def test_a_loop_with_bound_operands(syntax: str, text: str) -> None:
    from sapper.assembly.static import check_static

    made = piece(binary(lambda a, x, y, n: a.text(text, syntax, x=x, y=y, n=n, acc=a.zmm())))
    check_static(made, ZEN4)
    x, y = np.arange(64, dtype=np.float32), np.zeros(16, np.float32)
    interpret(made.machine(), x, y, 64)
    assert np.array_equal(y, x.reshape(4, 16).sum(0))


def refused(text: str, syntax: str = "intel", **names: Any) -> AssemblyError:
    with pytest.raises(AssemblyError) as caught:
        piece(lambda a: a.text(text, syntax, **names))
    return caught.value


def test_unknown_instruction_names_the_nearest_and_the_way_to_add_one() -> None:
    error = refused("\n\n  vfmad231ps zmm0, zmm1, zmm2")
    assert error.kind == "unknown-instruction"
    assert "vfmadd231ps" in error.expected
    assert "docs/add-an-instruction.md" in error.mend


def test_labels_are_told_by_their_line() -> None:
    def missing(a: Any) -> None:
        a.text("""nop
            jmp ther
            there: nop""")

    def twice(a: Any) -> None:
        a.text("""there: nop
            there:
            jmp there""")

    for write, what in ((missing, "label ther is not in the text"), (twice, "a label is placed twice")):
        with pytest.raises(AssemblyError, match=what) as caught:
            piece(write)
        assert caught.value.location is not None
        assert caught.value.location.line == write.__code__.co_firstlineno + 2


def test_lines_that_stand_elsewhere_are_told_by_the_call() -> None:
    assert (error := refused("nop\nnop\n.long 5\nnop")).location is not None
    assert error.location.line == refused.__code__.co_firstlineno + 2


def test_the_error_is_at_the_line_of_the_text() -> None:
    with pytest.raises(AssemblyError) as caught:
        piece(lambda a: a.text("""nop
            nop
            vaddps zmm0, zmm1"""))
    error = caught.value
    assert error.kind == "operands" and error.location is not None
    assert error.location.file == __file__
    assert "vaddps zmm0, zmm1" in Path(__file__).read_text().split("\n")[error.location.line - 1]


@pytest.mark.parametrize("text, part", [
    ("vaddps zmm0, zmm1, @missing", "@missing is not bound"),
    ("add [rax], 5", "how large"),
    ("mov rax, [rbx + rcx + rdx]", "too many parts"),
    ("mov rax, [rbx + rcx*3]", "scaled"),
    ("mov rax, [rbx + nowhere]", "a term of an address"),
    ("vaddps zmm0{z}, zmm1, zmm2", "without an opmask"),
    ("vaddps zmm0{rax}, zmm1, zmm2", "decoration"),
    ("vaddps zmm0, zmm1, zmm2{1to16}", "broadcast"),
    ("jmp nowhere", "not in the text"),
    (".long 5", "no meaning here"),
    ("mov rax, huge ptr [rbx]", "size of memory"),
])
def test_refusals(text: str, part: str) -> None:
    assert part in refused(text).headline


@pytest.mark.parametrize("text, part", [
    ("mov rax, [ebx + 8]", "a register of an address"),
    ("mov rax, [rbx + cl*4]", "a register of an address"),
    ("mov rax, [rbx + rcx*]", "a scale that is no number"),
    ("mov rax, [rbx + rcx*-8]", "a scale that is no number"),
    ("mov rax, [rbx -- 8]", "can't be read"),
    ("mov rax, [rbx + 8 +]", "can't be read"),
    ("mov rax, dword [rbx]", "can't be read"),
    ("mov rax, qword ptrptr [rbx]", "can't be read"),
    ("mov rax, dword ptr qword ptr [rbx]", "can't be read"),
    ("mov rax, [rip + 8]", "without a constant"),
    ("mov rax, [rax + rsp*2]", "the stack pointer as an index"),
    ("mov rax,, rbx", "can't be read"),
    ("vaddps zmm0{k0}, zmm1, zmm2", "under an opmask"),
    ("vaddps zmm0{k1}{k2}, zmm1, zmm2", "a decoration"),
    ("vpternlogd zmm0, zmm1, zmm2, -1", "takes no such operands"),
])
def test_what_gnu_as_would_read_otherwise_is_refused(text: str, part: str) -> None:
    assert part in refused(text).headline


@pytest.mark.parametrize("text, part", [
    ("mov 8(rbx), %rax", "a register of an address"),
    ("mov 8(%xmm1,%rcx,2), %rax", "a register of an address"),
    ("mov %rcx(%rbx), %rax", "can't be read"),
    ("mov 8(%rip), %rax", "without a constant"),
    ("mov *8(%rbx), %rax", "a term of an address"),
    ("vaddps %zmm0, %zmm1, %zmm2{k1}", "a decoration"),
])
def test_what_gnu_as_would_read_otherwise_is_refused_in_its_own_syntax(text: str, part: str) -> None:
    assert part in refused(text, "att").headline


WORDS = ("eax", "cl", "rsp", "xmm3", "zmm31", "k0", "k1", "riz", "rip", "{k2}", "{z}", "{1to16}", "ptr", "dword ptr ",
         "qword ", "-1", "2", "8", "255", "256", "0x80000000", "010", "+", "-", "*", "[", "]", ",", " ")


def changed(text: str, source: random.Random) -> str:
    """One or two parts of a text left out, said twice, or put in the place of others."""
    for _ in range(source.choice((1, 1, 1, 2))):
        parts = re.findall(r"[\w.$@]+|\s+|.", text) or [" "]
        at = source.randrange(len(parts))
        parts[at] = source.choice((*WORDS, "", parts[at] * 2, source.choice(parts)))
        text = "".join(parts)
    return text


@needs_as
def test_changed_texts_are_refused_or_are_what_gnu_as_makes_of_them(tmp_path: Path) -> None:
    source = random.Random(7)
    rows = [c for c in cases(5) if not any(isinstance(o, Memory) and o.label for o in c.operands)]
    mine: dict[str, bytes] = {}
    for case in source.choices(rows, k=6000):
        text = changed(print_instruction(case), source).strip()
        with contextlib.suppress(AssemblyError, EncodeError, ValueError):  # refused, or no instruction
            # GNU as takes riz for a name where it is not told otherwise, no rsp*1, and spreads no number's place.
            if not re.search(r"riz|rsp\*1|\[[^a-z]*\]", text):
                mine[text] = encode_instruction(read(text, "intel"))[0]
    assert len(mine) > 200
    lines = "".join(f".balign 32\n{text}\n" for text in mine)
    found = assemble(f".intel_syntax noprefix\n{lines}.balign 32\n", tmp_path)
    wrong = [text for number, (text, code) in enumerate(mine.items())
             if not found[32 * number:].startswith(code)]
    assert len(found) == 32 * len(mine) and not wrong, wrong[:20]


def test_unknown_syntax() -> None:
    assert refused("nop", "masm").headline == "an unknown syntax"


@pytest.mark.parametrize("digits, value", [("010", 8), ("-0x10", -16), ("0b101", 5), ("0xffffffffffffffff", -1)])
def test_numbers_are_those_of_gnu_as(digits: str, value: int) -> None:
    assembly = Assembly("line", x86.table)
    assembly.text(f"mov rax, {digits}")
    assert [o.value for o in assembly.body[0].operands if isinstance(o, Immediate)] == [value]


@pytest.mark.parametrize("text, part", [
    ("mov rax, 0x1" + "0" * 16, "more than 64 bits"),
    ("mov rax, " + "9" * 5000, "more than 64 bits"),
    ("mov rax, 08", "can't be read"),
    (".balign 12", "an alignment"),
    (".balign -8", "an alignment"),
    (".p2align 13", "an alignment"),
    ("vaddps zmm0, zmm1, zmm2}", "a decoration"),
])
def test_numbers_and_marks_that_mean_nothing_are_refused(text: str, part: str) -> None:
    assert part in refused(text).headline


def test_a_text_without_instructions_is_refused() -> None:
    with pytest.raises(AssemblyError, match="no instruction") as caught:
        finish(piece(lambda a: a.text("# nothing")), ZEN4)
    assert caught.value.kind == "running-off"


@pytest.mark.parametrize("syntax, text, more", [
    ("intel", SUM, ("zmm1", "rax", "qword ptr ")), ("att", SUM_ATT, ("%zmm1", "%rax", "$-1")),
])
def test_a_thousand_malformed_texts(syntax: str, text: str, more: tuple[str, ...]) -> None:
    """Each becomes machine code that passes all checks, or is refused."""
    def assemble(text: str) -> None:
        finish(piece(binary(lambda a, x, y, n: a.text(text, syntax, x=x, y=y, n=n, acc=a.zmm()))), ZEN4)

    pieces = ("{k1}", "{z}", "{1to16}", "lock ", ".balign 3", "ret\n", "label:", *more)
    found = refusals(mutations([text], pieces), assemble, AssemblyError)
    assert 800 < len(found) < 1000
