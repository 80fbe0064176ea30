"""The rows of AArch64 from outside: their bytes against GNU as, their meaning against an emulator."""

from __future__ import annotations

import hashlib
import random
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sapper.codegen.compile import text_of
from sapper.codegen.encode import EncodeError
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
from sapper.codegen.words import encode
from sapper.emulate.riscv import executable
from sapper.targets import target
from sapper.targets.aarch64.instructions import CONDITION_CODES, ROWS
from sapper.targets.aarch64.meaning import dtype_of
from sapper.targets.aarch64.registers import SP, ZERO
from sapper.targets.aarch64.rows import bit_mask_code
from sapper.targets.aarch64.text import print_instruction

TARGET = target("neoverse-v2")
RECORDED = Path(__file__).with_name("recorded.txt")
"""Lines of `bytes  instruction`, as GNU as 2.44 has them; `python -m tests.targets.aarch64.test_rows` makes them."""
COMPUTED = Path(__file__).with_name("computed.txt")
"""Lines of `row  digest`: what qemu-aarch64 10.0 computes by the rows that Unicorn does not know; made likewise."""
ASSEMBLER, EMULATOR = "aarch64-linux-gnu-as", "qemu-aarch64"
PLACE, CONSTANT = ".place", ".constant"


def an_immediate(form: Any, row: Any, choose: random.Random) -> int:
    """A value that the row takes, by what its fields may hold."""
    if form.field == "b":
        ones, turned = choose.randrange(1, 64), choose.randrange(64)
        run = (1 << ones) - 1
        return (run >> turned | run << (64 - turned)) & (1 << 64) - 1
    letter, sign, number, multiple = form.codes[0]
    if sign < 0:                                    # shifts to the right, and lsl
        low, high = (1, number // 2) if "64-i,63-j" not in row.syntax else (1, 63)
        return choose.randint(low, high)
    if number:
        return choose.randrange(number)             # shifts to the left
    if row.name == "add.word.64":
        return choose.randrange(5)
    if row.name.startswith("ext.8b"):
        return choose.randrange(8)
    return choose.randrange(1 << len(row.words[0].fields[letter])) * multiple


def operands_of(row: Any, reach: str, choose: random.Random) -> list[Any]:
    """Random operands that the row takes."""
    made: list[Any] = []
    for form in row.operands:
        if form.kind == "gpr":
            made.append(Register("gpr", choose.choice([*range(31), SP if form.stack else ZERO])))
        elif form.kind == "vec":
            made.append(Register("vec", choose.randrange(32)))
        elif form.kind == "label":
            made.append(LabelReference(PLACE))
        elif form.kind == "imm":
            made.append(Immediate(an_immediate(form, row, choose)))
        else:
            base, size = Register("gpr", choose.choice([*range(31), SP])), row.memory_bits // 8
            made.append({"literal": lambda: Memory(label=CONSTANT), "plain": lambda b=base: Memory(b),
                         "index": lambda b=base, s=size: Memory(b, Register("gpr", choose.randrange(31)),
                                                                choose.choice([1, s])),
                         "near": lambda b=base: Memory(b, disp=choose.randrange(-256, 0)),
                         "scaled": lambda b=base, s=size: Memory(b, disp=s * choose.randrange(4096))}[reach]())
    return made


def every_form(seed: int, each: int) -> MachineFunction:
    """Each row in each of its ways."""
    choose = random.Random(seed)
    body: list[Instruction | Label] = [Label(PLACE)]
    body += [Instruction(row, operands_of(row, way.reach, choose))
             for row in ROWS.values() for way in row.words for _ in range(each)]
    return MachineFunction("rows", body, {CONSTANT: (16, bytes(range(16)))})


def listing(function: MachineFunction, code: bytes) -> list[str]:
    instructions = [item for item in function.body if isinstance(item, Instruction)]
    return [f"{code[4 * n:4 * n + 4].hex()}  {print_instruction(item)}" for n, item in enumerate(instructions)]


def assembled(text: str, folder: Path) -> bytes:
    """What GNU as makes of a file: its code and constants."""
    (folder / "file.s").write_text(text)
    done = subprocess.run([ASSEMBLER, "-o", folder / "file.o", folder / "file.s"], capture_output=True, text=True,
                          check=False)
    assert done.returncode == 0, done.stderr
    subprocess.run(["aarch64-linux-gnu-objcopy", "-O", "binary", "-j", ".text", folder / "file.o",
                    folder / "file.bin"], check=True)
    return (folder / "file.bin").read_bytes()


def test_every_row_has_the_bytes_that_were_recorded_of_gnu_as() -> None:
    function = every_form(2026, 2)
    assert listing(function, encode(function, TARGET).code) == RECORDED.read_text().splitlines()


@pytest.mark.skipif(shutil.which(ASSEMBLER) is None, reason=f"{ASSEMBLER} is not installed")
def test_every_row_against_gnu_as(tmp_path: Path) -> None:
    function = every_form(random.randrange(1 << 30), 4)
    theirs = assembled(text_of(function, TARGET), tmp_path)
    assert listing(function, encode(function, TARGET).code) == listing(function, theirs)


# --- Meaning ----------------------------------------------------------------------------------------------------------

DATA_BYTES, DATA_AT = 4096, 0x1000_0000
NOT_RUN = re.compile(r"b|b\..*|bl|bl?r|udf|mrs.*|distance|cbn?z.*|ret|svc|yield|dmb.*"
                     r"|prfm.*|push.*|pop.*|.*\.stack|ldar.*|stlr.*")


def bits_of(number: int, size: int) -> bytes:
    return (number & (1 << 8 * size) - 1).to_bytes(size, "little")


def is_unknown(row: Any) -> bool:
    """Whether Unicorn, which is QEMU of the year 2020, lacks it."""
    return bool(row.features & {"i8mm", "bf16"})


def some_vector(choose: random.Random, kind: str) -> bytes:
    """16 bytes: of floats numbers of all sizes, of integers any bits and small ones."""
    if kind[0] == "f":
        dtype = dtype_of(kind)
        special = [0.0, -0.0, 1.0, -1.5, np.inf, -np.inf, np.nan, 2.5, -3.5, 1e-40, 3e9, -3e9, 65504.0]
        values = [choose.choice(special) if choose.random() < 0.4 else
                  choose.gauss(0, 1) * 10.0 ** choose.randint(-3, 3) for _ in range(16 // dtype.itemsize)]
        with np.errstate(over="ignore"):
            return np.array(values, dtype).tobytes()
    if choose.random() < 0.3:
        return bytes(choose.choice([0, 0, 1, 0xFF]) for _ in range(16))
    return choose.randbytes(16)


def lanes_of(data: bytes, form: Any, kind: str) -> np.ndarray:
    return np.frombuffer(data[:form.bits // 8], dtype_of(kind)).copy()


def same_bits(made: bytes, found: bytes, kind: str) -> bool:
    """Of NaNs only that they are some: which one is left to the processor."""
    if made == found:
        return True
    if kind[0] != "f" or len(made) % dtype_of(kind).itemsize:
        return False
    a, b = np.frombuffer(made, dtype_of(kind)), np.frombuffer(found, dtype_of(kind))
    nans = np.isnan(a) & np.isnan(b)
    unsigned = f"u{a.itemsize}"
    return bool(np.all(nans | (a.view(unsigned) == b.view(unsigned))))


class OneRow:
    """Runs single instructions on the emulator, and by their meaning."""

    def __init__(self) -> None:
        from sapper.emulate.arm import CODE_AT, Core

        self.data = np.zeros(2 * DATA_BYTES, np.uint8)
        start = -self.data.ctypes.data % DATA_BYTES
        self.data = self.data[start:start + DATA_BYTES]
        self.core = Core(bytes(4096), [(DATA_AT, self.data)])
        self.uc, self.code_at, self.general, self.vectors = (
            self.core.uc, CODE_AT, self.core.general, self.core.vectors)
        self.flags_at = self.core.names.UC_ARM64_REG_NZCV

    def run(self, row: Any, choose: random.Random) -> str | None:
        """One case; what differs, or None."""
        general = [choose.choice([choose.getrandbits(64), choose.randrange(64), choose.getrandbits(31),
                                  -choose.randrange(1, 99) & (1 << 64) - 1]) for _ in range(31)]
        kind = row.dtypes or "u8"
        vectors = [some_vector(choose, kind) for _ in range(32)]
        flags = {letter: choose.randrange(2) for letter in "nzcv"}
        self.data[:] = np.frombuffer(choose.randbytes(DATA_BYTES), np.uint8)
        operands: list[Any] = []
        free = choose.sample(range(28), 6)
        for form in row.operands:
            if form.kind == "gpr":
                operands.append(Register("gpr", free.pop()))
            elif form.kind == "vec":
                operands.append(Register("vec", choose.randrange(8)))
            elif form.kind == "imm":
                operands.append(Immediate(an_immediate(form, row, choose)))
            else:
                base = free.pop()
                general[base] = DATA_AT + 8 * choose.randrange(64)
                operands.append(Memory(Register("gpr", base)))
        item = Instruction(row, operands)
        code = encode(MachineFunction("one", [item], {}), TARGET).code
        self.uc.mem_write(self.code_at, code)
        self.uc.ctl_remove_cache(self.code_at, self.code_at + 4)
        for number, value in enumerate(general):
            self.uc.reg_write(self.general[number], value)
        for number, data in enumerate(vectors):
            self.uc.reg_write(self.vectors[number], int.from_bytes(data, "little"))
        self.uc.reg_write(self.flags_at, sum(flags[f] << b for f, b in zip("nzcv", (31, 30, 29, 28), strict=True)))
        wanted = self.expected(row, operands, general, vectors, flags)
        self.uc.emu_start(self.code_at, self.code_at + 4, count=1)
        for what, bits, made_kind in wanted:
            found = self.found(what, len(bits))
            if not same_bits(bits, found, made_kind):
                return f"{print_instruction(item)}: {what} is {found.hex()}, by the meaning {bits.hex()}"
        return None

    def found(self, what: Any, size: int) -> bytes:
        if what == "flags":
            return bits_of(self.uc.reg_read(self.flags_at) >> 28, 1)
        if isinstance(what, Register):
            names = self.general if what.kind == "gpr" else self.vectors
            return bits_of(self.uc.reg_read(names[what.number]), size)
        return self.data[what:what + size].tobytes()

    def expected(self, row: Any, operands: list[Any], general: list[int], vectors: list[bytes],
                 flags: dict[str, int]) -> list[tuple[Any, bytes, str]]:
        """(register, offset in memory or "flags", bits that it has then, kind of its elements)."""
        reads: list[Any] = []
        written: list[Any] = []
        kind = row.dtypes or "u8"
        for form, operand in zip(row.operands, operands, strict=True):
            if form.writes:
                written.append((form, operand))
            if not form.reads:
                continue
            if form.kind == "gpr":
                reads.append(general[operand.number] & (1 << form.bits) - 1)
            elif form.kind == "vec":
                reads.append(lanes_of(vectors[operand.number], form, kind if form.vector else "u8"))
            elif form.kind == "imm":
                reads.append(operand.value)
            else:
                at = general[operand.base.number] - DATA_AT
                data = self.data[at:at + form.bits // 8]
                reads.append(data.copy() if any(o.kind == "vec" for o in row.operands)
                             else int.from_bytes(data.tobytes(), "little"))
        if row.flags_read:
            reads.append(flags)
        with np.errstate(all="ignore"):
            made = row.meaning(*reads)
        made = made if isinstance(made, tuple) else (made,)
        wanted: list[tuple[Any, bytes, str]] = []
        if row.flags_written:
            *made_values, now = made
            wanted.append(("flags", bits_of(sum(now[f] << b for f, b in zip("nzcv", (3, 2, 1, 0), strict=True)), 1),
                           "u8"))
            made = tuple(made_values)
        assert len(made) == len(written)
        for (form, operand), value in zip(written, made, strict=True):
            if form.kind == "gpr":
                wanted.append((operand, bits_of(int(value), 8), "u8"))
            elif form.kind == "vec":     # what is not written is 0
                data, whole = value.tobytes(), 16
                kept = "+" in row.syntax and value.nbytes < 16 and not form.vector
                result = value.dtype.kind + str(8 * value.itemsize)
                wanted.append((operand, data if kept else data.ljust(whole, b"\0"), result))
            else:
                data = value.tobytes() if isinstance(value, np.ndarray) else bits_of(int(value), form.bits // 8)
                wanted.append((general[operand.base.number] - DATA_AT, data, "u8"))
        return wanted


@pytest.mark.parametrize("seed", [1])
def test_every_row_against_its_meaning(seed: int) -> None:
    pytest.importorskip("unicorn", reason="the package unicorn is not installed")
    one, choose, differences, ran = OneRow(), random.Random(seed), [], 0
    for row in ROWS.values():
        if NOT_RUN.fullmatch(row.name) or is_unknown(row):
            continue
        ran += 1
        for _ in range(12):
            difference = one.run(row, choose)
            if difference:
                differences.append(f"{row.name}: {difference}")
                break
    assert not differences, "\n".join(differences)
    assert ran == len([name for name, row in ROWS.items() if not NOT_RUN.fullmatch(name) and not is_unknown(row)]) > 200


# --- Meaning of what Unicorn does not know -------------------------------------------------------------------------

CASES = 24
SLOTS = 4       # of 16 bytes: what up to three operands hold, and the result
Case = tuple[Any, list[bytes], int | None]
"""A row, what its operands hold, the place of an element."""


def some_bfloat16(choose: random.Random) -> int:
    """Bits: numbers near each other, so that sums are rounded and cancel, hostile ones, and any."""
    if choose.random() < 0.2:
        return choose.choice([0, 0x8000, 0x3F80, 0x7F80, 0xFF80, 0x7FC0, 0x7F81, 1, 0x807F, 0x0080, 0x7F7F, 0xFF7F])
    if choose.random() < 0.3:
        return choose.getrandbits(16)
    return choose.randrange(2) << 15 | choose.randint(120, 134) << 7 | choose.getrandbits(7)


def held_by(row: Any, number: int, choose: random.Random) -> bytes:
    """What operand `number` holds; of sums of floats the lower bits are any."""
    if row.name.startswith("bfcvt"):
        return some_vector(choose, "f32") if choose.random() < 0.3 else choose.randbytes(16)
    if row.features & {"bf16"}:
        words = [some_bfloat16(choose) for _ in range(8)]
        if number == 0:
            words[::2] = [choose.getrandbits(16) for _ in range(4)]
        return np.array(words, np.uint16).tobytes()
    return some_vector(choose, "u8")


def unknown_cases() -> list[Case]:
    choose = random.Random(11)
    return [(row, [held_by(row, n, choose) for n in range(sum(form.kind == "vec" for form in row.operands))],
             choose.randrange(4) if row.operands[-1].kind == "imm" else None)
            for row in ROWS.values() if is_unknown(row) for _ in range(CASES)]


def meant(case: Case) -> bytes:
    """What the written register holds by the meaning: NaNs too are told, and what is not written is 0."""
    row, held, place = case
    forms = [form for form in row.operands if form.kind == "vec"]
    reads = [lanes_of(data, form, row.dtypes) for form, data in zip(forms, held, strict=True) if form.reads]
    return row.meaning(*reads, *([] if place is None else [place])).tobytes().ljust(16, b"\0")


def emulated(of: list[Case]) -> list[bytes]:
    """The same by qemu-aarch64: a program that loads operands, runs rows, and writes what came of them."""
    data = bytearray()
    body: list[Instruction | Label] = []

    def emit(name: str, *operands: Any) -> None:
        body.append(Instruction(ROWS[name], [Immediate(o) if isinstance(o, int) else o for o in operands]))

    def load(number: int, value: int) -> None:
        emit("movz.64", X[number], value & 0xFFFF, 0)
        emit("movk.64", X[number], value >> 16, 16)

    for row, held, place in of:
        load(1, DATA_AT + len(data))
        registers = V[16:16 + len(held)]
        for number, (register, bits) in enumerate(zip(registers, held, strict=True)):
            emit("ldr.q", register, Memory(X[1], disp=16 * number))
            data += bits
        emit(row.name, *registers, *([] if place is None else [place]))
        emit("str.q", Memory(X[1], disp=16 * (SLOTS - 1)), V[16])
        data += bytes(16 * (SLOTS - len(held)))
    pages = np.frombuffer(bytes(data).ljust(-(-len(data) // 4096) * 4096, b"\0"), np.uint8)
    for number, arguments in ((64, (1, DATA_AT, len(pages))), (94, (0,))):     # write, exit_group
        for register, value in enumerate(arguments):
            load(register, value)
        load(8, number)
        emit("svc")
    code = encode(MachineFunction("rows", body, {}), TARGET).code
    program = executable(code, 0, [(DATA_AT, pages)], machine=183, flags=0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows"
        path.write_bytes(program)
        path.chmod(0o700)
        done = subprocess.run([EMULATOR, "-cpu", "max", str(path)], capture_output=True, check=True, timeout=60)
    return [done.stdout[64 * number + 48:64 * number + 64] for number in range(len(of))]


def digests(of: list[Case], results: list[bytes]) -> dict[str, str]:
    """By row."""
    found: dict[str, Any] = {}
    for (row, _, _), made in zip(of, results, strict=True):
        found.setdefault(row.name, hashlib.sha256()).update(made)
    return {name: digest.hexdigest()[:16] for name, digest in found.items()}


def test_meaning_of_rows_that_unicorn_lacks_is_what_was_recorded() -> None:
    of = unknown_cases()
    recorded = dict(line.split() for line in COMPUTED.read_text().splitlines())
    assert digests(of, [meant(case) for case in of]) == recorded and len(recorded) > 15


@pytest.mark.skipif(shutil.which(EMULATOR) is None, reason=f"{EMULATOR} is not installed")
def test_meaning_of_rows_that_unicorn_lacks_against_an_emulator() -> None:
    of = unknown_cases()
    for case, found in zip(of, emulated(of), strict=True):
        assert meant(case).hex() == found.hex(), (case[0].name, [held.hex() for held in case[1]], case[2])


# --- What the encoder refuses -----------------------------------------------------------------------------------------

X = [Register("gpr", n) for n in range(33)]
V = [Register("vec", n) for n in range(33)]


@pytest.mark.parametrize(("name", "operands", "message"), [
    ("add.64", [X[1], X[2]], "found 2 operands; expected 3"),
    ("add.64", [X[1], X[2], X[SP]], "operand 2: found Register"),
    ("add.imm.64", [X[1], X[ZERO], Immediate(1)], "operand 1: found Register"),
    ("add.imm.64", [X[1], X[2], Immediate(4097)], "expected some that one of its words holds"),
    ("add.64", [X[1], V[2], X[3]], "operand 1: found Register"),
    ("add.64", [X[1], VirtualRegister("gpr", 3), X[3]], "operand 1: found %gpr3"),
    ("and.imm.64", [X[1], X[2], Immediate(5)], "operand 2: found Immediate"),
    ("fadd.4s", [V[1], V[2], V[32]], "operand 2: found Register"),
    ("ldr.q", [V[1], Memory(X[1], disp=257)], "one of its words holds"),
    ("ldr.q", [V[1], Memory(X[1], X[2], 8)], "one of its words holds"),
    ("ldr.q", [V[1], Memory(X[1], X[2], 16, disp=16)], "one of its words holds"),
    ("ldr.h", [V[1], Memory(label=CONSTANT)], "found the label .constant; expected one of this function"),
    ("b", [LabelReference(".nowhere")], "found the label .nowhere"),
    ("shl.4s", [V[1], V[2], Immediate(-1)], "operand 2: found Immediate"),
    ("shl.4s", [V[1], V[2], Immediate(32)], "operand 2: found Immediate"),
    ("sshr.2d", [V[1], V[2], Immediate(0)], "operand 2: found Immediate"),
    ("lsl.imm.64", [X[1], X[2], Immediate(64)], "operand 2: found Immediate")])
def test_the_encoder_says_what_it_does_not_take(name: str, operands: list[Any], message: str) -> None:
    with pytest.raises(EncodeError, match=re.escape(message)):
        encode(MachineFunction("one", [Instruction(ROWS[name], operands)], {}), TARGET)


def test_a_jump_beyond_its_reach_is_refused() -> None:
    nop = Instruction(ROWS["yield"], [])
    body = [Instruction(ROWS["b.eq"], [LabelReference(PLACE)]), *[nop] * (1 << 18), Label(PLACE)]
    with pytest.raises(EncodeError, match=r"found a distance of 1048580 bytes; expected 21 bits, signed"):
        encode(MachineFunction("far", body, {}), TARGET)


@pytest.mark.parametrize("value", [1, 0x7FFF, 1 << 63, 0x8000000000000001, (1 << 64) - 2, 0xFF00])
def test_bit_masks_are_runs_turned_round(value: int) -> None:
    code = bit_mask_code(value)
    assert code is not None
    run, turned = (1 << (code & 63) + 1) - 1, code >> 6 & 63
    assert (run >> turned | run << (64 - turned)) & (1 << 64) - 1 == value


@pytest.mark.parametrize("value", [0, (1 << 64) - 1, 5, 0b11011])
def test_other_numbers_are_no_bit_masks(value: int) -> None:
    assert bit_mask_code(value) is None


def test_conditions_come_in_pairs() -> None:
    """One bit apart: what `cset` makes of them."""
    names = list(CONDITION_CODES)
    assert all(CONDITION_CODES[b] == CONDITION_CODES[a] + 1 for a, b in zip(names[::2], names[1::2], strict=True))


if __name__ == "__main__":
    of = unknown_cases()
    COMPUTED.write_text("".join(f"{name} {digest}\n" for name, digest in digests(of, emulated(of)).items()))
    made = every_form(2026, 2)
    with tempfile.TemporaryDirectory() as folder:
        RECORDED.write_text("\n".join(listing(made, assembled(text_of(made, TARGET), Path(folder)))) + "\n")
