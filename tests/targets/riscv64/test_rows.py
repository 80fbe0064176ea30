"""The rows of RISC-V from outside: their bytes against GNU as, their meaning against an emulator."""

from __future__ import annotations

import hashlib
import random
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

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
from sapper.codegen.settle import settle
from sapper.codegen.words import encode
from sapper.emulate.riscv import PROGRAM, Start, executable, run_executable
from sapper.targets import target
from sapper.targets.riscv64.allocation import register_file
from sapper.targets.riscv64.instructions import table
from sapper.targets.riscv64.meaning import dtype_of
from sapper.targets.riscv64.rows import Row
from sapper.targets.riscv64.text import print_instruction

TARGET, WIDER = target("rva23u64"), target("spacemit-x60")
ROWS = table(TARGET.vector_bits)
RECORDED = Path(__file__).with_name("recorded.txt")
"""Lines of `bytes  instruction`, as GNU as 2.44 has them; `python -m tests.targets.riscv64.test_rows` makes them."""
COMPUTED = Path(__file__).with_name("computed.txt")
"""Lines of `row  digest`: what qemu-riscv64 10.0 computes by it; made likewise."""
ASSEMBLER, PLACE = "riscv64-linux-gnu-as", ".place"
BEHIND = "divu"
"""The first row of those from which the start of the code is too far for a branch."""
ASSEMBLED = [row for row in ROWS.values() if row.words]


def an_immediate(form: Any, choose: random.Random) -> int:
    low = -(1 << form.count - 1) if form.signed else 0
    return choose.randrange(low, low + (1 << form.count))


def operands_of(row: Row, choose: random.Random, place: str) -> list[Any]:
    """Random operands that the row takes. place: a label that it reaches."""
    made: list[Any] = []
    vectors = choose.sample(range(1, 30), 3)        # some results may not be in operands' registers
    for form in row.operands:
        if form.kind == "vec":
            made.append(Register("vec", vectors.pop()))
        elif form.kind in ("gpr", "fpr"):
            made.append(Register(form.kind, choose.randrange(32)))
        elif form.kind == "label":
            made.append(LabelReference(place))
        elif form.kind == "imm":
            made.append(Immediate(an_immediate(form, choose)))
        else:
            places = len(row.words[0].fields.get("m", ()))
            disp = choose.randrange(-2048, 2048) // (1 << 12 - places) * (1 << 12 - places) if places else 0
            fields = row.words[0].fields
            kind = "gpr" if "x" in fields else "vec" if "w" in fields else ""
            made.append(Memory(Register("gpr", choose.randrange(32)), Register(kind, 30) if kind else None, disp=disp))
    return made


def every_form(seed: int, each: int) -> MachineFunction:
    choose = random.Random(seed)
    body: list[Instruction | Label] = [Label(PLACE)]
    place = PLACE
    for row in ASSEMBLED:
        if row.name == BEHIND:
            place = f".{BEHIND}"
            body.append(Label(place))
        body += [Instruction(row, operands_of(row, choose, place)) for _ in range(each)]
    return MachineFunction("rows", body, {})


def listing(function: MachineFunction, code: bytes) -> list[str]:
    instructions = [item for item in function.body if isinstance(item, Instruction)]
    return [f"{code[4 * n:4 * n + 4].hex()}  {print_instruction(item)}" for n, item in enumerate(instructions)]


def assembled(text: str, folder: Path) -> bytes:
    """What GNU as makes of a file; ld fills in what `norelax` leaves to it."""
    tool = ASSEMBLER.removesuffix("as")
    (folder / "file.s").write_text(text)
    done = subprocess.run([ASSEMBLER, "-o", folder / "file.o", folder / "file.s"], capture_output=True, text=True,
                          check=False)
    assert done.returncode == 0, done.stderr
    subprocess.run([f"{tool}ld", "--no-relax", "-Ttext=0", "-e", "0", "-o", folder / "file", folder / "file.o"],
                   check=True, capture_output=True)
    subprocess.run([f"{tool}objcopy", "-O", "binary", "-j", ".text", folder / "file", folder / "file.bin"], check=True)
    return (folder / "file.bin").read_bytes()


def test_bytes_of_every_row_are_those_that_were_recorded() -> None:
    function = every_form(2026, 2)
    assert listing(function, encode(function, TARGET).code) == RECORDED.read_text().splitlines()


@pytest.mark.skipif(shutil.which(ASSEMBLER) is None, reason=f"{ASSEMBLER} is not installed")
def test_bytes_of_every_row_against_the_assembler(tmp_path: Path) -> None:
    function = every_form(random.randrange(1 << 30), 4)
    theirs = assembled(text_of(function, TARGET), tmp_path)
    assert listing(function, encode(function, TARGET).code) == listing(function, theirs)


def test_words_do_not_depend_on_the_length_of_vectors() -> None:
    wider = table(WIDER.vector_bits)
    assert {name: row.pattern for name, row in ROWS.items()} == {name: row.pattern for name, row in wider.items()}


# --- Meaning ----------------------------------------------------------------------------------------------------------

CASES = 6
DATA_AT, AREA = 0x1000_0000, 16     # of a case: so many places of PLACE_BYTES
PLACE_BYTES = 64
BASE, OTHER = 5, 6
"""General registers with the address of a case's data, and of its memory operand."""
NOT_RUN = re.compile(r"j|jalr?|jr|unimp|rdtime|csrr.*|distance|lr.w|sc.w"
                     r"|b(eq|ne|lt|ge|gt|le)[zu]?|ret|ecall|pause|fence|prefetch.*|push.*|pop.*"
                     r"|.*\.stack|undefined|vsetivli.*|.*\.pair|vluxei64.*|vsoxei64.*|vlse.*|vsse.*|vmv1r.v.mask")


class Case(NamedTuple):
    """One instruction with its operands: for each the bytes that it holds before, None of what is only written."""

    row: Row
    operands: list[Any]
    held: list[bytes | None]
    mask: int


def lanes_of(row: Row) -> int:
    """Elements of the row's vectors: half as many where some have 64 bits."""
    return row.vector_bits // (64 if any(dtype.endswith("64") for dtype in row.dtypes) else 32)


def count_of(row: Row, dtype: str) -> int:
    return row.vector_bits // 8 if dtype == "u8" and "1r" in row.name else lanes_of(row)


def some_elements(choose: random.Random, dtype: str, count: int) -> bytes:
    """Of floats numbers of all sizes, of integers any bits and small ones, of masks bits."""
    if dtype == "m":
        return choose.getrandbits(64).to_bytes(8, "little")
    made = dtype_of(dtype)
    if dtype[0] == "f":
        special = [0.0, -0.0, 1.0, -1.5, np.inf, -np.inf, np.nan, 2.5, -3.5, 1e-40, 3e9, -3e9, 65504.0]
        values = [choose.choice(special) if choose.random() < 0.4 else
                  choose.gauss(0, 1) * 10.0 ** choose.randint(-3, 3) for _ in range(count)]
        with np.errstate(over="ignore"):
            return np.array(values, made).tobytes()
    if choose.random() < 0.5:
        return bytes(choose.choice([0, 0, 1, 0xFF]) for _ in range(count * made.itemsize))
    if choose.random() < 0.5:
        return np.array([choose.randrange(2 * count) for _ in range(count)]).astype(made).tobytes()
    return choose.randbytes(count * made.itemsize)


def some_number(choose: random.Random) -> int:
    return choose.choice([choose.getrandbits(64), choose.randrange(64), choose.getrandbits(31),
                          -choose.randrange(1, 99) & (1 << 64) - 1])


def some_float(choose: random.Random, row: Row) -> bytes:
    """A float register: what is no float of its size, or one of 32 bits with ones above it."""
    if any("64" in dtype for dtype in row.dtypes) or choose.random() < 0.1:
        return some_elements(choose, "f64", 1)
    if row.name == "fcvt.s.h":
        return some_elements(choose, "f16", 1) + b"\xff" * 6
    return some_elements(choose, "f32", 1) + b"\xff" * 4


def case_of(row: Row, choose: random.Random) -> Case:
    operands: list[Any] = []
    held: list[bytes | None] = []
    dtypes = iter(reversed(row.dtypes) if row.stores else row.dtypes)
    free = {"gpr": choose.sample(range(10, 18), 3), "fpr": choose.sample(range(8), 3),
            "vec": choose.sample(range(1, 30), 3)}
    for form in row.operands:
        before: bytes | None = None
        if form.kind == "imm":
            bits = 64 if not row.words else form.count
            value = an_immediate(form, choose) if row.words else some_number(choose)
            operands.append(Immediate(value - (1 << 64) if not row.words and value >> bits - 1 else value))
        elif form.kind == "mem":
            operands.append(Memory(Register("gpr", OTHER)))
            dtype = next(dtypes, "")
            size = count_of(row, dtype) * dtype_of(dtype).itemsize if dtype else form.bits // 8
            before = choose.randbytes(size)
        else:
            operands.append(Register(form.kind, free[form.kind].pop()))
            if form.kind == "vec":
                dtype = next(dtypes)
                before = some_elements(choose, dtype, count_of(row, dtype))
            else:
                before = some_number(choose).to_bytes(8, "little") if form.kind == "gpr" else some_float(choose, row)
            if not form.reads:
                before = None
        held.append(before)
    return Case(row, operands, held, choose.getrandbits(lanes_of(row)) if row.masked else 0)


def cases(vector_bits: int) -> list[Case]:
    choose = random.Random(7)
    return [case_of(row, choose) for row in table(vector_bits).values() if not NOT_RUN.fullmatch(row.name)
            for _ in range(CASES)]


def elements(row: Row, data: bytes, dtype: str) -> np.ndarray:
    count = count_of(row, dtype)
    if dtype == "m":
        return np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")[:count].astype(bool)
    return np.frombuffer(data[:count * dtype_of(dtype).itemsize], dtype_of(dtype)).copy()


def operand_dtypes(row: Row) -> Iterator[str]:
    """The dtype of each operand, "" of general and float registers, immediates, and memory of those."""
    dtypes = iter(reversed(row.dtypes) if row.stores else row.dtypes)
    for form in row.operands:
        yield next(dtypes) if form.kind == "vec" or (form.kind == "mem" and row.dtypes) else ""


def plain(value: Any, size: int, dtype: str) -> bytes:
    """What is written as bytes; of NaNs only that they are some, of masks the lanes' bits."""
    if isinstance(value, np.ndarray):
        if dtype == "m":
            return np.packbits(value.astype(bool), bitorder="little").tobytes()
        value = np.where(np.isnan(value), np.array(np.nan, value.dtype), value) if value.dtype.kind == "f" else value
        return value.tobytes()
    return (int(value) & (1 << 8 * size) - 1).to_bytes(size, "little")


def meant(case: Case) -> list[bytes]:
    """What the written operands hold by the meaning."""
    row, reads = case.row, []
    for form, operand, data, dtype in zip(row.operands, case.operands, case.held, operand_dtypes(row), strict=True):
        if form.kind == "imm":
            reads.append(operand.value)
        elif data is not None and (form.reads or row.masked):      # what a mask leaves off stays in memory
            reads.append(elements(row, data, dtype) if dtype else int.from_bytes(data, "little"))
    if row.masked:
        reads.append(elements(row, case.mask.to_bytes(8, "little"), "m"))
    with np.errstate(all="ignore"):
        made = row.meaning(*reads)
    made = made if isinstance(made, tuple) else (made,)
    written = [(form, dtype) for form, dtype in zip(row.operands, operand_dtypes(row), strict=True) if form.writes]
    assert len(made) == len(written)
    return [plain(value, form.bits // 8 if form.kind == "mem" else 8, dtype)
            for value, (form, dtype) in zip(made, written, strict=True)]


def digests(of: list[Case], results: list[list[bytes]]) -> dict[str, str]:
    """By row."""
    found: dict[str, Any] = {}
    for case, made in zip(of, results, strict=True):
        found.setdefault(case.row.name, hashlib.sha256()).update(b"|".join(made))
    return {name: digest.hexdigest()[:16] for name, digest in found.items()}


class Program:
    """Cases as one executable: each loads its operands from its data, runs its row, and puts there what was written."""

    def __init__(self, vector_bits: int) -> None:
        self.vector_bits = vector_bits
        self.code = b""
        self.data = bytearray()

    def add(self, case: Case) -> None:
        row, start = case.row, Start(self.vector_bits)
        first = DATA_AT + len(self.data)
        area = bytearray(AREA * PLACE_BYTES)
        start.load(BASE, first)
        start.load(OTHER, first + AREA // 2 * PLACE_BYTES)
        if row.masked:
            area[-PLACE_BYTES:-PLACE_BYTES + 8] = case.mask.to_bytes(8, "little")
            start.emit("vl1re8.v", Register("vec", 0), self.place(AREA - 1))
        for number, (form, operand, data) in enumerate(zip(row.operands, case.operands, case.held, strict=True)):
            if data is None:
                continue
            at = AREA // 2 if form.kind == "mem" else number
            area[at * PLACE_BYTES:at * PLACE_BYTES + len(data)] = data
            if form.kind != "mem":
                start.emit({"gpr": "ld", "fpr": "fld", "vec": "vl1re8.v"}[form.kind], operand, self.place(at))
        start.body.append(Instruction(row, case.operands))
        for number, (form, operand) in enumerate(zip(row.operands, case.operands, strict=True)):
            if form.writes and form.kind != "mem":
                start.emit({"gpr": "sd", "fpr": "fsd", "vec": "vs1r.v"}[form.kind], self.place(number), operand)
        self.code += start.bytes(lanes_of(row) if row.vector_bits else 0)
        self.data += area

    @staticmethod
    def place(number: int) -> Memory:
        return Memory(Register("gpr", BASE), disp=number * PLACE_BYTES)

    def run(self) -> bytes:
        size = -(-len(self.data) // 4096) * 4096
        end = Start(self.vector_bits)
        end.call_system(64, 1, DATA_AT, size)
        end.call_system(94, 0)
        end.emit("ret")
        data = np.frombuffer(bytes(self.data).ljust(size, b"\0"), np.uint8)
        return run_executable(executable(self.code + end.bytes(), 0, [(DATA_AT, data)]), self.vector_bits)


def emulated(of: list[Case], vector_bits: int) -> list[list[bytes]]:
    """What the written operands hold by the emulator."""
    program = Program(vector_bits)
    for case in of:
        program.add(case)
    made = program.run()
    results = []
    for number, case in enumerate(of):
        area = made[number * AREA * PLACE_BYTES:(number + 1) * AREA * PLACE_BYTES]
        found = []
        for at, (form, dtype) in enumerate(zip(case.row.operands, operand_dtypes(case.row), strict=True)):
            if form.writes:
                start = (AREA // 2 if form.kind == "mem" else at) * PLACE_BYTES
                data = area[start:start + PLACE_BYTES]
                size = form.bits // 8 if form.kind == "mem" else 8
                found.append(plain(elements(case.row, data, dtype), 0, dtype) if dtype else data[:size])
        results.append(found)
    return results


def test_meaning_of_every_row_is_what_was_recorded() -> None:
    recorded = dict(line.split() for line in COMPUTED.read_text().splitlines())
    made: dict[str, str] = {}
    for bits in (TARGET.vector_bits, WIDER.vector_bits):
        of = cases(bits)
        made |= {f"{name}:{bits}": digest for name, digest in digests(of, [meant(case) for case in of]).items()}
    assert made == recorded and len(made) > 400


@pytest.mark.skipif(shutil.which(PROGRAM) is None, reason=f"{PROGRAM} is not installed")
@pytest.mark.parametrize("bits", [TARGET.vector_bits, WIDER.vector_bits])
def test_every_row_against_its_meaning(bits: int) -> None:
    of = cases(bits)
    different = [f"{print_instruction(Instruction(case.row, case.operands))}: {case.held} {case.mask:x}: "
                 f"{[part.hex() for part in found]}, by the meaning {[part.hex() for part in wanted]}"
                 for case, found, wanted in zip(of, emulated(of, bits), [meant(case) for case in of], strict=True)
                 if found != wanted]
    assert not different, "\n".join(different)


# --- What the encoder refuses, and what is left to settle -------------------------------------------------------------

X = [Register("gpr", n) for n in range(33)]
F, V = Register("fpr", 1), Register("vec", 1)


@pytest.mark.parametrize(("name", "operands", "message"), [
    ("add", [X[1], X[2]], "found 2 operands; expected 3"),
    ("add", [X[1], X[2], X[32]], "operand 2: found Register"),
    ("add", [X[1], F, X[3]], "operand 1: found Register"),
    ("add", [X[1], VirtualRegister("gpr", 3), X[3]], "operand 1: found %gpr3"),
    ("addi", [X[1], X[2], Immediate(2048)], "operand 2: found Immediate"),
    ("slli", [X[1], X[2], Immediate(64)], "operand 2: found Immediate"),
    ("vadd.vi.e32", [V, V, Immediate(16)], "operand 2: found Immediate"),
    ("ld", [X[1], Memory(X[2], disp=2048)], "one of its words holds"),
    ("ld", [X[1], Memory(X[2], X[3])], "one of its words holds"),
    ("vle32.v", [V, Memory(X[2], disp=16)], "one of its words holds"),
    ("prefetch.r", [Memory(X[2], disp=16)], "one of its words holds"),
    ("j", [LabelReference(".nowhere")], "found the label .nowhere"),
    ("li", [X[1], Immediate(1)], "one of its words holds")])
def test_the_encoder_says_what_it_does_not_take(name: str, operands: list[Any], message: str) -> None:
    with pytest.raises(EncodeError, match=re.escape(message)):
        encode(MachineFunction("one", [Instruction(ROWS[name], operands)], {}), TARGET)


def test_a_jump_beyond_its_reach_is_refused() -> None:
    nop = Instruction(ROWS["pause"], [])
    body = [Instruction(ROWS["beqz"], [X[1], LabelReference(PLACE)]), *[nop] * 1024, Label(PLACE)]
    with pytest.raises(EncodeError, match="found a distance of 4100 bytes; expected 13 bits, signed"):
        encode(MachineFunction("far", body, {}), TARGET)


def settled(*items: Any) -> list[str]:
    """The lines of what instructions, as (row, operands ...), and labels become."""
    body = [Label(item) if isinstance(item, str) else Instruction(ROWS[item[0]], [
        Immediate(o) if type(o) is int else LabelReference(o) if type(o) is str else o for o in item[1:]])
        for item in items]
    function = MachineFunction("f", body, {})
    settle(function, register_file(TARGET.vector_bits), TARGET, TARGET.lanes)
    encode(function, TARGET)
    return [item.name if isinstance(item, Label) else print_instruction(item) for item in function.body]


ADD, HALF, COPY = ("vadd.vv.e32", V, V, V), ("vnsrl.wi.e16", V, V, 3), ("vmv1r.v.mask", V)
SET, SET_HALF = "vsetivli zero, 4, e32, m1, ta, mu", "vsetivli zero, 4, e16, mf2, ta, mu"
ADDS, HALVES = "vadd.vv v1, v1, v1", "vnsrl.wi v1, v1, 3"


def test_the_state_of_vectors_is_set_where_it_changes() -> None:
    assert settled(ADD, ADD, HALF, ("vle32.v", V, Memory(X[10])), ADD) == [
        SET, ADDS, ADDS, SET_HALF, HALVES, "vle32.v v1, (a0)", SET, ADDS]
    assert settled(("vle32.v", V, Memory(X[10]))) == [SET, "vle32.v v1, (a0)"]
    assert settled(("vl1re8.v", V, Memory(X[10]))) == ["vl1re8.v v1, (a0)"]


def test_the_state_is_set_before_a_loop_and_not_in_it() -> None:
    loop = (".loop", ADD, ("bgtz", X[10], ".loop"))
    assert settled(*loop, ("ret",)) == [SET, ".loop", ADDS, "bgtz a0, .loop", "ret"]
    assert settled(HALF, *loop, ("ret",)) == [SET_HALF, HALVES, SET, ".loop", ADDS, "bgtz a0, .loop", "ret"]
    # One that changes it sets it on both sides.
    assert settled(".loop", ADD, HALF, ("bgtz", X[10], ".loop"), ("ret",)) == [
        SET, ".loop", SET, ADDS, SET_HALF, HALVES, "bgtz a0, .loop", "ret"]


def test_where_two_ways_meet_the_state_is_known_if_both_have_it() -> None:
    assert settled(ADD, ("beqz", X[10], ".end"), ADD, ".end", ADD, ("ret",)).count(SET) == 1
    assert settled(ADD, ("beqz", X[10], ".end"), HALF, ".end", ADD, ("ret",)).count(SET) == 2


def test_a_call_of_the_system_loses_the_state_and_masks() -> None:
    assert settled(ADD, ("ecall",), ADD) == [SET, ADDS, "ecall", SET, ADDS]
    assert settled(COPY, COPY, ("ecall",), COPY) == [
        SET, "vmv1r.v v0, v1", "ecall", SET, "vmv1r.v v0, v1"]


def test_a_mask_is_copied_again_where_it_or_v0_changed() -> None:
    copy = "vmv1r.v v0, v1"
    assert settled(COPY, ("addi", X[10], X[10], 1), COPY).count(copy) == 1
    assert settled(COPY, ADD, COPY).count(copy) == 2
    assert settled(COPY, ("vmseq.vv.e32", Register("vec", 0), V, V), COPY).count(copy) == 2
    assert settled(COPY, ".label", COPY).count(copy) == 2


@pytest.mark.parametrize(("disp", "lines"), [
    (2047, ["ld a1, 2047(a0)"]), (2048, ["lui t6, 1", "add t6, t6, a0", "ld a1, -2048(t6)"]),
    (-70000, ["lui t6, 1048559", "add t6, t6, a0", "ld a1, -368(t6)"])])
def test_far_memory(disp: int, lines: list[str]) -> None:
    assert settled(("ld", X[11], Memory(X[10], disp=disp))) == lines


def test_registers_are_saved_together() -> None:
    """The stack pointer stays a multiple of 16, and moves once; what was saved last comes back first."""
    pushes = [("push.gpr", X[8]), ("push.gpr", X[9]), ("push.fpr", F)]
    assert settled(*pushes) == ["addi sp, sp, -32", "sd s0, 16(sp)", "sd s1, 8(sp)", "fsd ft1, 0(sp)"]
    pops = [("pop.fpr", F), ("pop.gpr", X[9]), ("pop.gpr", X[8]), ("ret",)]
    assert settled(*pops) == ["fld ft1, 0(sp)", "ld s1, 8(sp)", "ld s0, 16(sp)", "addi sp, sp, 32", "ret"]
    assert settled(("sub.stack", X[2], 5000)) == ["lui t6, 1048575", "addiw t6, t6, -904", "add sp, sp, t6"]


def test_vectors_in_far_memory() -> None:
    assert settled(("vl1re8.v", V, Memory(X[10], disp=48))) == ["addi t6, a0, 48", "vl1re8.v v1, (t6)"]
    assert settled(("vl1re8.v", V, Memory(X[10], disp=5000))) == [
        "lui t6, 1", "addiw t6, t6, 904", "add t6, t6, a0", "vl1re8.v v1, (t6)"]


def test_a_branch_that_does_not_reach_jumps_over_a_jump() -> None:
    pauses = [("pause",)] * 1024
    lines = settled(("beq", X[10], X[11], ".end"), *pauses, ".end", ("ret",))
    assert lines[:3] == ["bne a0, a1, .near1", "j .end", ".near1"] and lines[3:6] == ["pause"] * 3
    assert settled(("beq", X[10], X[11], ".end"), *pauses[2:], ".end", ("ret",))[0] == "beq a0, a1, .end"


@pytest.mark.parametrize("number", [0, -1, 2047, -2048, 2048, 4096, 0x7FFFFFFF, -0x80000000, 0x80000000, 0xFFFFFFFF,
                                    1 << 63, (1 << 63) - 1, 0x123456789ABCDEF0, -0x123456789ABCDEF, 0x3FE0 << 48])
def test_numbers_in_general_registers(number: int) -> None:
    """By the meaning of the rows that bring one there."""
    function = MachineFunction("f", [Instruction(ROWS["li"], [X[10], Immediate(number)])], {})
    settle(function, register_file(TARGET.vector_bits), TARGET, TARGET.lanes)
    held = 0
    for item in function.body:
        values = [held if operand == X[10] else operand.value for operand, form in zip(
            item.operands, item.row.operands, strict=True) if form.reads]
        held = item.row.meaning(*values)
    assert held == number & (1 << 64) - 1


def record() -> None:
    import tempfile

    made = every_form(2026, 2)
    with tempfile.TemporaryDirectory() as folder:
        RECORDED.write_text("\n".join(listing(made, assembled(text_of(made, TARGET), Path(folder)))) + "\n")
    lines = []
    for bits in (TARGET.vector_bits, WIDER.vector_bits):
        of = cases(bits)
        lines += [f"{name}:{bits} {digest}" for name, digest in digests(of, emulated(of, bits)).items()]
    COMPUTED.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    record()
