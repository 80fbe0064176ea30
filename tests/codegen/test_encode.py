"""The encoder against GNU as: every row in every operand form, in one run of the assembler."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest

from sapper.codegen.encode import encode
from sapper.codegen.machine import Immediate, Instruction, Label, MachineFunction, Memory, Register
from sapper.codegen.print import print_function, print_instruction
from sapper.targets.x86_64.instructions import ROWS, Operand, Row

needs_as = pytest.mark.skipif(shutil.which("as") is None, reason="GNU as is not installed")


def gpr(n: int) -> Register:
    return Register("gpr", n)


def vec(n: int) -> Register:
    return Register("vec", n)


def k(n: int) -> Register:
    return Register("mask", n)


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
                           "vec": [1, 7, 8, 15, 0]}[operand.kind]
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
                operands[place] = Register(row.operands[place].kind, number % 8 if row.operands[place].kind == "mask"
                                           else number)
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
    """A gather whose registers coincide, which the encoder refuses."""
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
