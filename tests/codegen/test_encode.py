"""The encoder against GNU as: every row in every operand form, in one run of the assembler."""

from __future__ import annotations

import random
import re
import shutil
import subprocess
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sapper.codegen.encode import EncodeError, encode, encode_instruction
from sapper.codegen.machine import (
    Immediate,
    Instruction,
    Label,
    LabelReference,
    MachineFunction,
    Memory,
    Register,
    VirtualRegister,
)
from sapper.codegen.print import print_function, print_instruction
from sapper.ir.nodes import Location
from sapper.targets import module_of, target
from sapper.targets.x86_64.instructions import ROWS, Operand, Row
from tests.strategies import examples

needs_as = pytest.mark.skipif(shutil.which("as") is None, reason="GNU as is not installed")


def gpr(n: int) -> Register:
    return Register("gpr", n)


def vec(n: int) -> Register:
    return Register("vec", n)


def k(n: int) -> Register:
    return Register("mask", n)


def tile(n: int) -> Register:
    return Register("tile", n)


def addresses(operand: Operand, evex: bool) -> list[Memory]:
    """Every addressing mode: bases that need SIB or a displacement, indices, displacement widths, rip-relative."""
    if operand.index_bits:
        found = [Memory(gpr(base), vec(index), scale, disp) for base, index, scale, disp in
                 ((0, 1, 1, 0), (5, 9, 4, 0), (4, 3, 8, 4), (12, 15, 2, 100), (13, 2, 4, 1000), (7, 6, 8, -128))]
        return found + ([Memory(gpr(1), vec(17), 4, 8), Memory(gpr(9), vec(31), 8, 64)] if evex else [])
    found = [Memory(gpr(base)) for base in (0, 3, 4, 5, 12, 13, 15)]
    for n in {1, max(1, operand.memory_bits // 8), max(1, operand.broadcast_bits // 8)}:
        found += [Memory(gpr(1), disp=d * n) for d in (1, 127, 128, -128, -129)]
    found += [Memory(gpr(4), disp=8), Memory(gpr(12), disp=64), Memory(gpr(5), disp=-64), Memory(gpr(13), disp=100000)]
    found += [Memory(gpr(base), gpr(index), scale, disp) for base, index, scale, disp in
              ((0, 1, 1, 0), (5, 2, 2, 0), (13, 9, 4, 0), (4, 5, 8, 64), (12, 12, 2, 1000), (9, 13, 8, -64))]
    found += [Memory(None, gpr(6), 4, 64), Memory(None, gpr(14), 8, -300), Memory(None, None, 1, 4096)]
    if operand.sibmem:
        return found
    found += [Memory(label="constant"), Memory(label="constant", disp=8)]
    return found


def forms(row: Row) -> Iterator[Instruction]:
    """Instructions that cover the row: each kind of operand in each place, low and high registers, masks."""
    evex = row.evex_features is not None
    evex_only = all(e.space == "evex" for e in row.encodings)
    required = row.masking == "required" and evex
    mask = k(3) if required else None
    signatures = {"".join(p) for e in row.encodings for p in _choices(row, e.letters)}
    for signature in sorted(signatures):
        if "l" in signature:
            continue
        choices: list[list[object]] = []
        for letter, operand in zip(signature, row.operands, strict=True):
            if letter == "i":
                bits = operand.immediate_bits or operand.bits
                values = {8: [0, 1, 5, 127, 200], 16: [3, 127, 128, 1000], 32: [1, 5, 127, 128, -128, -129, 2147483647],
                          64: [1, -1] if "m" in signature
                          else [1, -1, 2147483648, -2147483649, 0x123456789ABCDEF0]}[bits]
                choices.append([Immediate(v) for v in values])
            elif letter == "m":
                choices.append(list(addresses(operand, evex)))
            elif operand.fixed is not None:
                choices.append([Register(operand.kind, operand.fixed)])
            else:
                numbers = {"gpr": [0, 1, 3, 4, 5, 6, 8, 12, 15], "mask": [0, 1, 4, 7],
                           "vec": [1, 7, 8, 15, 0],
                           "tile": [(len(choices) + n) % 8 for n in range(8)]}[operand.kind]
                if operand.kind == "gpr" and operand.bits == 64 and row.mnemonic in ("push", "pop"):
                    numbers = list(range(16))
                choices.append([Register(operand.kind, n) for n in numbers])
        # One operand varies at a time, round a base; pairs of registers vary together for the prefix bits.
        base = [c[min(1, len(c) - 1)] for c in choices]
        if not base:
            yield Instruction(row, [])
        for place, options in enumerate(choices):
            for option in options:
                yield Instruction(row, [*base[:place], option, *base[place + 1:]], mask)  # type: ignore[list-item]
        registers = [i for i, letter in enumerate(signature) if letter == "r" and row.operands[i].fixed is None]
        for numbers in product((2, 9), repeat=len(registers)):
            operands = list(base)
            for place, number in zip(registers, numbers, strict=True):
                kind = row.operands[place].kind
                operands[place] = Register(kind, number % 8 if kind in ("mask", "tile") else number)
            yield Instruction(row, operands, mask)  # type: ignore[arg-type]
        if not evex:
            continue
        high = [i for i in registers if row.operands[i].kind == "vec"]
        for place in high:
            for number in (16, 23, 24, 31):
                yield Instruction(row, [*base[:place], vec(number), *base[place + 1:]], mask)  # type: ignore[list-item]
        if row.masking:
            for number in (1, 7):
                yield Instruction(row, list(base), k(number))  # type: ignore[arg-type]
            if row.masking == "kz" and signature[0] != "m":
                yield Instruction(row, list(base), k(2), True)  # type: ignore[arg-type]
        for place, letter in enumerate(signature):
            if letter == "m" and row.operands[place].broadcast_bits:
                for address in addresses(row.operands[place], evex):
                    address.broadcast = True
                    yield Instruction(row, [*base[:place], address, *base[place + 1:]])  # type: ignore[list-item]
                address = Memory(gpr(2), broadcast=True)
                if row.masking:
                    yield Instruction(row, [*base[:place], address, *base[place + 1:]], k(4),
                                      row.masking == "kz")  # type: ignore[list-item]
            elif letter == "m" and evex_only and row.masking:
                yield Instruction(row, list(base), k(5))  # type: ignore[arg-type]


def clashes(instruction: Instruction) -> bool:
    """A gather or a product of tiles whose registers coincide, which the encoder refuses."""
    if instruction.row.name.startswith("tdp"):
        return len(set(instruction.operands)) < 3  # type: ignore[arg-type]
    vectors = [o.index if isinstance(o, Memory) else o for o in instruction.operands]
    return "gather" in instruction.row.name and len(set(vectors)) < len(vectors)  # type: ignore[arg-type]


def _choices(row: Row, letters: str) -> Iterator[tuple[str, ...]]:
    if letters == "-":
        yield ()
        return
    options = []
    for letter, operand in zip(letters, row.operands, strict=True):
        if letter in "RVLOACU":
            options.append("r")
        elif letter in "I1":
            options.append("i")
        elif letter == "D":
            options.append("l")
        elif letter == "m" or operand.kind == "mem":
            options.append("m")
        else:
            options.append("rm" if operand.memory_bits else "r")
    yield from product(*options)


def assemble(text: str, folder: Path) -> bytes:
    """The .text section that GNU as makes of `text`. Errors show the lines that it refused."""
    source, made, binary = folder / "case.s", folder / "case.o", folder / "case.bin"
    source.write_text(text)
    done = subprocess.run(["as", "-o", str(made), str(source)], capture_output=True, text=True, check=False)
    if done.returncode:
        lines = text.split("\n")
        shown = [f"{message}   <- {lines[int(found.group(1)) - 1].strip()}"
                 for message in done.stderr.split("\n") if (found := re.search(r":(\d+):", message))]
        raise AssertionError("as refused:\n" + "\n".join(shown[:40]))
    subprocess.run(["objcopy", "-O", "binary", "-j", ".text", str(made), str(binary)], check=True)
    return binary.read_bytes()


@needs_as
def test_every_row_in_every_form_against_as(tmp_path: Path) -> None:
    cases: list[Instruction] = [i for row in ROWS.values() for i in forms(row) if not clashes(i)]
    seen = {i.row.name for i in cases}
    assert all(name in seen for name, row in ROWS.items() if not any(o.kind == "label" for o in row.operands))
    body: list[Instruction | Label] = []
    for number, case in enumerate(cases):
        body += [Label(f"c{number}"), case]
    body.append(Label("end"))
    function = MachineFunction("all_rows", body, {"constant": (64, bytes(range(64)))})
    ours = encode(function)
    theirs = assemble(print_function(function), tmp_path)
    if ours.code == theirs:
        return
    # Say which cases differ: as keeps the local labels, nm says where each case starts.
    subprocess.run(["as", "-L", "-o", str(tmp_path / "x.o"), str(tmp_path / "case.s")], check=True)
    listing = subprocess.run(["nm", str(tmp_path / "x.o")], capture_output=True, text=True, check=True).stdout
    starts = {fields[2][2:]: int(fields[0], 16) for fields in map(str.split, listing.splitlines()) if len(fields) == 3}
    wrong = []
    for number, case in enumerate(cases):
        here, after = f"c{number}", f"c{number + 1}" if number + 1 < len(cases) else "end"
        mine = ours.code[ours.label_offsets[here]:ours.label_offsets[after]].hex()
        other = theirs[starts[here]:starts[after]].hex()
        if mine != other and "constant" not in str(case.operands):
            wrong.append(f"{case.row.name}: {print_instruction(case)}: found {mine}, as {other}")
    raise AssertionError(f"{len(wrong)} of {len(cases)} differ:\n" + "\n".join(wrong[:60]))


@pytest.mark.parametrize("operands, encoding, dtype, part", [
    ("w:v r:v r:v", "avx RVQ VEX.L.66.0F38.W0 0C /r", "u32", "found Q among the places RVQ"),
    ("w:v r:v r:v", "avx RVM VEX.L.66.0F38.W0 GG /r", "u32", "found 'GG'"),
    ("w:v r:v r:v", "avx RVM VEX.L.66.0F38.W0 0C", "u32", "found no /r"),
    ("w:v r:v r:v", "avx RVM VEX.L.66.0F38.W0 0C /r ib", "u32", "found ib"),
    ("w:v r:v r:v r:i8", "avx RVMI VEX.L.66.0F38.W0 0C /r", "u32", "found no ib"),
    ("w:v r:v r:v", "RVM VEX.L.66.0F38.W0 0C /r", "u32", "among the places VEX"),
    ("w:v r:v r:v", "avx", "u32", "expected features"),
    ("x:v r:v r:v", "avx RVM VEX.L.66.0F38.W0 0C /r", "u32", "found 'x:v'"),
    ("w:v r:v r:v/b33", "avx RVM VEX.L.66.0F38.W0 0C /r", "u32", "found 'b33'"),
    ("w:v r:v r:v", "avx RVM VEX.L.66.0F38.W0 0C /r", "u33", "lanes of 'u33'"),
])
def test_notation_that_means_nothing_is_told(operands: str, encoding: str, dtype: str, part: str) -> None:
    row = Row("mine.256", "mine", operands, encoding, lambda a, b: a, 256, dtype)
    with pytest.raises(ValueError, match="notation: ") as caught:
        encode_instruction(Instruction(row, [vec(number) for number, _ in enumerate(row.operands)]))
    assert part in str(caught.value)


@pytest.mark.parametrize("family, what", [
    ("x86_64", ("vaddps", "w:v r:v r:v", "avx RVM VEX.L.0F.WIG 58 /r", None)),
    ("aarch64", ("mov.64", "mov <Xd>, <Xm>", "10101010000 mmmmm 000000 11111 ddddd", None, "alu")),
])
def test_two_rows_of_one_name_are_told(family: str, what: tuple[object, ...]) -> None:
    add = getattr(module_of(family, "instructions"), "wide" if family == "x86_64" else "row")
    with pytest.raises(ValueError, match="found two; expected one"):
        add(*what, *(("f32",) if family == "x86_64" else ()))


# --- Whole functions -----------------------------------------------------------------------------------------------

def ins(name: str, *operands: object, mask: Register | None = None, zeroing: bool = False) -> Instruction:
    return Instruction(ROWS[name], list(operands), mask, zeroing)  # type: ignore[arg-type]


def jumps_of(seed: int, count: int) -> MachineFunction:
    """Jumps forth and back over stretches near the limits of short jumps, labels aligned here and there."""
    random_state = random.Random(seed)
    body: list[Instruction | Label] = []
    for number in range(count):
        body.append(Label(f"at {number}", random_state.choice((1, 1, 1, 16, 32))))
        body += [ins("nop")] * random_state.choice((0, 1, 3, 60, 118, 121, 124))
        target = LabelReference(f"at {max(0, min(count - 1, number + random_state.randint(-3, 3)))}")
        body.append(ins(random_state.choice(("jmp", "jne", "jl", "ja")), target))
    return MachineFunction("jumps", [*body, ins("ret")], {})


@needs_as
@settings(max_examples=examples(15))
@given(seed=st.integers(0, 10 ** 6), count=st.integers(1, 40))
def test_jumps_and_alignment_against_as(tmp_path: Path, seed: int, count: int) -> None:
    function = jumps_of(seed, count)
    assert encode(function).code == assemble(print_function(function), tmp_path)


@needs_as
def test_every_padding_against_as(tmp_path: Path) -> None:
    body: list[Instruction | Label] = []
    for size in range(256):
        body += [Label(f"a{size}", 256), *[ins("int3")] * size, Label(f"b{size}", 256), ins("ud2")]
    function = MachineFunction("padded", body, {})
    assert encode(function).code == assemble(print_function(function), tmp_path)


@needs_as
def test_every_conditional_jump_against_as(tmp_path: Path) -> None:
    names = [name for name, row in ROWS.items() if row.control in ("branch", "jump", "call") and "." not in name]
    assert len(names) == 18
    body: list[Instruction | Label] = [Label("top")]
    for name in names:
        body += [ins(name, LabelReference("top")), ins(name, LabelReference("bottom"))]
    body += [ins("nop")] * 200 + [Label("bottom"), ins("ret")]
    function = MachineFunction("branches", body, {})
    assert encode(function).code == assemble(print_function(function), tmp_path)


@needs_as
def test_constants_lie_behind_the_code_aligned(tmp_path: Path) -> None:
    body: list[Instruction | Label] = [
        ins("vmovaps.512", vec(0), Memory(label="wide")),
        ins("vaddps.512", vec(1), vec(0), Memory(label="one", broadcast=True)),
        ins("vpshufd.128", vec(2), Memory(label="wide", disp=16), Immediate(3)),
        ins("lea.64", gpr(0), Memory(label="one")),
        ins("cmp.32", Memory(label="one"), Immediate(1000)), ins("ret")]
    function = MachineFunction("constants", body, {"one": (4, b"\0\0\x80\x3f"), "wide": (64, bytes(range(64)))})
    made = encode(function)
    assert made.code == assemble(print_function(function), tmp_path)
    assert made.align_bytes == 64 and made.label_offsets["wide"] % 64 == 0
    assert made.code[made.label_offsets["wide"]:] == bytes(range(64))
    assert made.code[made.label_offsets["one"]:][:4] == b"\0\0\x80\x3f"
    assert made.label_offsets["one"] >= made.code_bytes


def test_line_table_and_comments_name_the_source() -> None:
    first, second = Location("kernel.py", 7, 5), Location("kernel.py", 9, 1)
    body: list[Instruction | Label] = [ins("nop"), ins("pause"), ins("nop"), ins("ret")]
    for item, location in zip(body, (first, first, second, None), strict=True):
        item.location = location  # type: ignore[union-attr]
    body[1].comment = "spins"  # type: ignore[union-attr]
    function = MachineFunction("lines", body, {})
    assert encode(function).line_table == [(0, first), (3, second)]
    text = print_function(function)
    assert [line.split("#")[1].strip() for line in text.splitlines() if "#" in line] == \
        ["kernel.py:7", "spins", "kernel.py:9"]


def test_printing_virtual_registers_and_odd_label_names() -> None:
    body: list[Instruction | Label] = [
        Label("loop body-1"), ins("vaddps.256", VirtualRegister("vec", 3), vec(1), VirtualRegister("vec", 4)),
        ins("jmp", LabelReference("loop body-1"))]
    text = print_function(MachineFunction("virtual", body, {}))
    assert "vaddps %vec3, ymm1, %vec4" in text
    assert ".Lloop_20body_2d1:" in text and "jmp .Lloop_20body_2d1" in text


BAD = [
    (ins("vaddps.512", vec(0), vec(1)), "row vaddps.512: found 2 operands; expected 3"),
    (ins("vaddps.512", vec(0), gpr(1), vec(2)),
     r"row vaddps.512, operand 1: found .*'gpr'.*; expected vector register"),
    (ins("vaddps.512", vec(0), vec(1), Immediate(3)),
     "operand 2: found Immediate.*; expected vector register of 512 bits"),
    (ins("vaddps.512", vec(0), vec(1), vec(32)), "operand 2: found Register.*32.*; expected vector register"),
    (ins("vaddps.256", vec(0), vec(1), vec(2), zeroing=True), "found zeroing without an opmask; expected an opmask"),
    (ins("vaddps.256", vec(0), vec(1), vec(2), mask=k(0)), "found opmask .*; expected a mask register 1 to 7"),
    (ins("vpxor.256", vec(0), vec(1), vec(17)), "row vpxor.256: .*register above 15.*; expected none of them"),
    (ins("vmovups.512", Memory(gpr(0)), vec(1), mask=k(1), zeroing=True), "found zeroing; expected merging"),
    (ins("vcmpps.k.512", k(1), vec(1), vec(2), Immediate(1), mask=k(1), zeroing=True),
     "found zeroing; expected merging"),
    (ins("kandw", k(1), k(2), k(3), mask=k(1)), "no EVEX encoding"),
    (ins("vgatherdps.512", vec(1), Memory(gpr(0), vec(2))),
     "row vgatherdps.512: found no opmask; expected one of k1 to k7"),
    (ins("vgatherdps.512", vec(1), Memory(gpr(0), vec(1)), mask=k(1)),
     "expected destination, index and mask to differ"),
    (ins("vgatherdps.512", vec(1), Memory(gpr(0), gpr(1)), mask=k(1)),
     "found index .*; expected a vector register of 512"),
    (ins("vmovups.512", vec(1), Memory(gpr(0), broadcast=True)), "row vmovups.512.* found a broadcast; expected"),
    (ins("tdpbf16ps", tile(1), tile(2), tile(2)), r"found tiles \[1, 2, 2\]; expected three that differ"),
    (ins("tdpbf16ps", tile(1), vec(2), tile(3)), "operand 1: found .*'vec'.*; expected tile register of 8192 bits"),
    (ins("tilezero", tile(8)), "operand 0: found .*8.*; expected tile register"),
    (ins("tileloadd", tile(1), Memory(label="x")), "found a rip-relative address; expected rows of memory"),
    (ins("mov.64", gpr(0), Memory(gpr(0), gpr(4))), "found index .*; expected a general register other than rsp"),
    (ins("mov.64", gpr(0), Memory(gpr(0), gpr(1), 3)), "found scale 3; expected 1, 2, 4 or 8"),
    (ins("mov.64", gpr(0), Memory(gpr(0), disp=1 << 31)), "found displacement 2147483648; expected 32 bits"),
    (ins("mov.64", gpr(0), Memory(vec(0))), "found base .*; expected a general register"),
    (ins("mov.64", gpr(0), Memory(gpr(1), label="x")), "found a label with base or index; expected rip-relative"),
    (ins("mov.64", Memory(gpr(0)), Memory(gpr(1))), "row mov.64: found operands .*; expected one of the forms"),
    (ins("add.64", gpr(0), Immediate(1 << 31)), "row add.64: found operands .*; expected one of the forms"),
    (ins("add.64", gpr(0), Immediate(1 << 40)),
     "operand 1: found Immediate.*; expected general register of 64 bits or"),
    (ins("vpshufd.256", vec(0), vec(1), Immediate(256)), "operand 2: found Immediate.*; expected immediate of 8 bits"),
    (ins("shl.cl.64", gpr(0), gpr(2)), r"operand 1: found .*; expected general register of 8 bits \(only number 1\)"),
    (ins("vaddps.256", vec(0), VirtualRegister("vec", 1), vec(2)), "operand 1: found %vec1; expected"),
    (ins("mov.64", gpr(0), Memory(VirtualRegister("gpr", 1))), "found base %gpr1; expected a physical register"),
]


@pytest.mark.parametrize(("instruction", "message"), BAD, ids=[m[:40] for _, m in BAD])
def test_bad_operands_say_row_operand_found_and_expected(instruction: Instruction, message: str) -> None:
    with pytest.raises(EncodeError, match=message):
        encode_instruction(instruction)


def test_bad_functions_are_refused() -> None:
    with pytest.raises(EncodeError, match="found a jump to 'nowhere'; expected a label of the function"):
        encode(MachineFunction("f", [ins("jmp", LabelReference("nowhere"))], {}))
    with pytest.raises(EncodeError, match="found label 'twice' twice"):
        encode(MachineFunction("f", [Label("twice"), Label("twice")], {}))
    with pytest.raises(EncodeError, match="found constant 'same' twice"):
        encode(MachineFunction("f", [Label("same")], {"same": (4, b"1234")}))
    with pytest.raises(EncodeError, match="found a reference to 'constant'; expected a label or constant"):
        encode(MachineFunction("f", [ins("lea.64", gpr(0), Memory(label="constant"))], {}))


def test_features_that_the_target_lacks_are_refused() -> None:
    haswell, skylake = target("haswell").features, target("skylake-avx512").features
    low, high = ins("vaddps.256", vec(1), vec(2), vec(3)), ins("vaddps.256", vec(1), vec(2), vec(16))
    assert encode(MachineFunction("f", [low], {}), haswell).code[0] in (0xC4, 0xC5)
    assert encode(MachineFunction("f", [high], {}), skylake).code[0] == 0x62
    with pytest.raises(EncodeError, match=r"row vaddps\.256: found a target without avx512f, avx512vl; expected"):
        encode(MachineFunction("f", [high], {}), haswell)
    with pytest.raises(EncodeError, match="without avx512_bf16"):
        encode(MachineFunction("f", [ins("vdpbf16ps.512", vec(1), vec(2), vec(3))], {}), skylake)


def test_rows_agree_with_themselves() -> None:
    """Facts that hold for every row, whatever it is."""
    for name, row in ROWS.items():
        assert row.name == name and name.replace("lock.", "lock ").startswith(row.mnemonic.removeprefix("{vex} "))
        assert row.masking in ("", "k", "kz", "required")
        for encoding in row.encodings:
            letters = encoding.letters.replace("-", "")
            assert len(letters) == len(row.operands), name
            assert len(set(letters)) == len(letters), name
            assert encoding.space in ("legacy", "vex", "evex")
        if row.masking:
            assert row.evex_features is not None, name
        written = [o for o in row.operands if o.writes]
        assert written or row.flags_written or row.control or row.side_effects or row.implicit_writes, name
        if row.meaning is None:
            assert row.side_effects or row.control, name
    assert len({row.mnemonic for row in ROWS.values()}) >= 150


def test_merging_by_an_opmask_reads_the_destination() -> None:
    row = ROWS["vaddps.512"]
    assert row.roles() == ("w", "r", "r")
    assert row.roles(masked=True) == ("rw", "r", "r")
    assert row.roles(masked=True, zeroing=True) == ("w", "r", "r")
    assert ROWS["vcmpps.k.512"].roles(masked=True)[0] == "w"
    assert (row.mask_role, ROWS["vgatherdps.512"].mask_role, ROWS["vpxor.256"].mask_role) == ("r", "rw", "")
