"""Runs rows on the real CPU and compares them with their meaning; started as a child process by test_meaning.py.

Arguments: a file for the number of the case that is running (so that a crash can be blamed), a seed. Prints one JSON
object: how many cases ran, which rows were skipped and why, and the differences found.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from sapper.codegen.encode import encode
from sapper.codegen.machine import Immediate, Instruction, Label, LabelReference, MachineFunction, Memory, Register
from sapper.codegen.print import print_instruction
from sapper.targets.x86_64 import detect
from sapper.targets.x86_64.instructions import ROWS, Row
from sapper.targets.x86_64.meaning import execute

# The block that a case works on, by byte offset from rdi.
VECTORS, MASKS, GENERAL, FLAGS, MEMORY, BLOCK_BYTES = 0, 2048, 2112, 2240, 4096, 12288
GATHER_BYTES = 4096
REGISTER_BYTES = 64 if "avx512f" in detect.host().features else 32
BLOCK_POINTER = 7
FLAG_BITS = {"c": 0, "p": 2, "a": 4, "z": 6, "s": 7, "o": 11}
CANNOT_RUN = {
    "syscall": "calls the system", "int3": "traps", "ud2": "traps", "ret": "control", "call": "control",
    "call.indirect": "control", "jmp": "control", "jmp.indirect": "control", "push": "moves the stack",
    "pop": "moves the stack", "pushfq": "moves the stack", "popfq": "moves the stack", "cpuid": "no meaning of its own",
    "xgetbv": "no meaning of its own", "rdtsc": "no meaning of its own", "rdtscp": "no meaning of its own",
    "vldmxcsr": "changes the rounding of everything", "vstmxcsr": "reads the rounding state",
}
"""Rows that are not run, and why. Rows with no result (fences, prefetches, nops, vzeroupper) run for not crashing."""

TILES = "on tiles: run by native_tiles.py"


@dataclass(slots=True)
class Case:
    row: Row
    instruction: Instruction


def g(number: int) -> Register:
    return Register("gpr", number)


def cases_of(row: Row, wide: bool) -> Iterator[Case]:
    """Register, memory, broadcast, masked and zeroed forms of one row."""
    specs = row.operands
    forms: list[tuple[str, ...]] = []
    kinds: list[list[str]] = []
    for spec in specs:
        options = []
        if spec.kind in ("gpr", "vec", "mask"):
            options.append("r")
        if spec.memory_bits:
            options.append("m")
        if spec.broadcast_bits and wide:
            options.append("b")
        if spec.kind == "imm" or spec.immediate_bits:
            options.append("i")
        kinds.append(options)
    first = tuple(k[0] for k in kinds)
    forms.append(first)
    for place, options in enumerate(kinds):
        for option in options[1:]:
            forms.append((*first[:place], option, *first[place + 1:]))
    if len(specs) >= 2 and "m" in kinds[0] and "i" in kinds[1]:
        forms.append(("m", "i", *first[2:]))
    for form in forms:
        if not _fits(row, form):
            # A row of which one operand must be memory (loads, gathers, moves of lane 0).
            continue
        values: list[int | None] = [None]
        if "i" in form:
            values = list(range(32) if row.mnemonic.startswith("vcmpp") else
                          (0, 1, 2, 3, 5, 0x1B, 0x93, 0xE4, 0xFF) if row.length else (0, 1, 7, 31, 40, 127))
        for value in values:
            operands = _operands(row, form, value)
            variants: list[tuple[Register | None, bool]] = [(None, False)]
            if row.masking == "required":
                variants = [(Register("mask", 1), False)]
            elif row.masking and row.evex_features is not None and wide:
                variants.append((Register("mask", 1), False))
                if row.masking == "kz" and form[0] != "m":
                    variants.append((Register("mask", 1), True))
            if value is not None and value not in (values[0], values[-1]):
                variants = variants[:1]
            for mask, zeroing in variants:
                yield Case(row, Instruction(row, list(operands), mask, zeroing))


def _fits(row: Row, form: tuple[str, ...]) -> bool:
    """Whether the row has an encoding for operands of these kinds that this CPU knows: shifts of memory have but that
    of AVX-512."""
    from sapper.codegen.encode import _plans

    types = {"r": Register, "m": Memory, "b": Memory, "i": Immediate}
    encodings = (row.plans or _plans(row)).get(tuple(types[option] for option in form), ())
    return any(encoding.features <= detect.host().features for encoding in encodings)


def _operands(row: Row, form: tuple[str, ...], value: int | None) -> list[Any]:
    operands: list[Any] = []
    vectors, masks, general = iter(range(1, 9)), iter(range(2, 8)), iter((8, 9, 10, 3))
    for spec, option in zip(row.operands, form, strict=True):
        if option == "i":
            operands.append(Immediate(value or 0))
        elif spec.index_bits:
            operands.append(Memory(g(BLOCK_POINTER), Register("vec", 10), spec.memory_bits // 8, MEMORY))
        elif option in "mb":
            operands.append(Memory(g(BLOCK_POINTER), disp=MEMORY, broadcast=option == "b"))
        elif spec.fixed is not None:
            operands.append(Register(spec.kind, spec.fixed))
        else:
            operands.append(Register(spec.kind, next({"vec": vectors, "mask": masks, "gpr": general}[spec.kind])))
    if row.mnemonic == "lea":
        operands[1] = Memory(g(9), g(10), 4, 1000)
    return operands


def used_registers(case: Case) -> tuple[list[int], list[int], list[int]]:
    vectors, masks, general = set(), set(), set()
    for operand in case.instruction.operands:
        if isinstance(operand, Memory):
            operand_registers = [operand.base, operand.index]
        else:
            operand_registers = [operand]  # type: ignore[list-item]
        for register in operand_registers:
            if isinstance(register, Register):
                {"vec": vectors, "mask": masks, "gpr": general}[register.kind].add(register.number)
    if case.instruction.mask is not None:
        masks.add(1)
    for _, number in case.row.implicit_reads + case.row.implicit_writes:
        general.add(number)
    general.discard(BLOCK_POINTER)
    return sorted(vectors), sorted(masks), sorted(general)


def wrap(case: Case, number: int, wide: bool) -> list[Any]:
    """Label, load all registers, the instruction, store all registers, return."""
    def ins(name: str, *operands: Any) -> Instruction:
        return Instruction(ROWS[name], list(operands))

    def at(offset: int) -> Memory:
        return Memory(g(BLOCK_POINTER), disp=offset)

    vectors, masks, general = used_registers(case)
    move = "vmovups.512" if wide else "vmovups.256"
    body: list[Any] = [Label(f"case{number}", 16), ins("mov.64", g(11), g(3)), ins("mov.64", g(0), at(FLAGS)),
                       ins("push", g(0)), ins("popfq")]
    body += [ins(move, Register("vec", n), at(VECTORS + 64 * n)) for n in vectors]
    body += [ins("kmovq", Register("mask", n), at(MASKS + 8 * n)) for n in masks]
    body += [ins("mov.64", g(n), at(GENERAL + 8 * n)) for n in general]
    if case.row.control == "branch":
        body += [ins("mov.64", g(8), Immediate(1)), case.instruction, ins("mov.64", g(8), Immediate(0)),
                 Label(f"taken{number}"), ins("mov.64", at(GENERAL + 64), g(8))]
    else:
        body.append(case.instruction)
    body += [ins("mov.64", at(GENERAL + 8 * n), g(n)) for n in general]
    body += [ins("pushfq"), ins("pop", g(0)), ins("mov.64", at(FLAGS), g(0))]
    body += [ins(move, at(VECTORS + 64 * n), Register("vec", n)) for n in vectors]
    body += [ins("kmovq", at(MASKS + 8 * n), Register("mask", n)) for n in masks]
    return [*body, ins("mov.64", g(3), g(11)), ins("vzeroupper"), ins("ret")]


HOSTILE = {
    "f4": np.array([0, 0x80000000, 0x7F800000, 0xFF800000, 0x7FC00000, 0xFFC12345, 0x7F800001, 0xFFA00000, 1,
                    0x80000001,
                    0x7FFFFF, 0x800000, 0x7F7FFFFF, 0xFF7FFFFF, 0x3F800000, 0xBF800000, 0x3F000000, 0x4B000001,
                    0x4F000000,
                    0xCF000000, 0x5F000000, 0x40200000, 0xBFC00000, 0x477FE000, 0x477FF000, 0x33000000], np.uint32),
    "f8": np.array([0, 1 << 63, 0x7FF << 52, 0xFFF << 52, 0x7FF8 << 48, 0xFFF8123456789ABC, 0x7FF0000000000001, 1,
                    (1 << 63) + 1, 0xFFFFFFFFFFFFF, 1 << 52, 0x7FEFFFFFFFFFFFFF, 0x3FF << 52, 0xBFF << 52, 0x3FE << 52,
                    0x41DFFFFFFFC00000, 0x41E0000000000000, 0xC1E0000000200000, 0x43E << 52, 0xC3E << 52,
                    0x36A0000000000000, 0x47EFFFFFF0000000, 0x380FFFFFFFFFFFFF, 0x4330000000000001], np.uint64),
    "f2": np.array([0, 0x8000, 0x7C00, 0xFC00, 0x7E00, 0x7D01, 1, 0x3FF, 0x400, 0x7BFF, 0x3C00, 0xBC00], np.uint16),
}


def fill(array: np.ndarray, dtype: str, style: int, random_state: np.random.Generator) -> None:
    """Fill bytes with lanes of `dtype`: style 0 random bits, 1 hostile values, 2 moderate numbers, 3 few bits apart."""
    raw = random_state.integers(0, 256, len(array), dtype=np.uint8)
    size = int(dtype[1:] or 32) // 8 if dtype else 8
    count = len(array) // size
    if dtype in ("f32", "f64") and style:
        if style == 1:
            raw = random_state.choice(HOSTILE[f"f{size}"], count).view(np.uint8)
        elif style == 2:
            values = random_state.standard_normal(count) * 10.0 ** random_state.integers(-3, 6, count)
            raw = values.astype(f"f{size}").view(np.uint8)
        else:
            values = np.round(random_state.standard_normal(count) * 4) / 2
            raw = values.astype(f"f{size}").view(np.uint8)
    elif style == 1:
        edge = np.array([0, 1, (1 << 8 * size) - 1, 1 << 8 * size - 1, (1 << 8 * size - 1) - 1, 2, 3, 8 * size,
                         8 * size - 1],
                        np.uint64).astype(f"u{size}")
        if size == 2:
            edge = np.concatenate([edge, HOSTILE["f2"], np.array([0x7F80, 0xFF80, 0x7FC0, 0x7F81, 0x80, 0x7F, 0x8001],
                                                                 np.uint16)])
        raw = random_state.choice(edge, count).view(np.uint8)
    elif style == 2:
        raw = random_state.integers(0, 2 * 8 * size, count).astype(f"u{size}").view(np.uint8)
    elif style == 3 and size == 2:
        values = random_state.standard_normal(count).astype(np.float32)
        raw = (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    array[:len(raw)] = raw


def prepare(case: Case, style: int, block: np.ndarray, random_state: np.random.Generator) -> None:
    """Inputs of one run."""
    block[:] = random_state.integers(0, 256, len(block), dtype=np.uint8)
    for spec, operand in zip(case.row.operands, case.instruction.operands, strict=True):
        if isinstance(operand, Register) and operand.kind == "vec":
            fill(block[64 * operand.number:64 * operand.number + 64], spec.dtype, style, random_state)
        elif isinstance(operand, Memory):
            size = spec.memory_bits if not spec.index_bits else 8 * GATHER_BYTES
            fill(block[MEMORY:MEMORY + size // 8], spec.dtype, style, random_state)
            if spec.index_bits:
                index_bits = index_size(case.row)
                lanes = spec.index_bits // index_bits
                limit = GATHER_BYTES // (spec.memory_bits // 8)
                indices = random_state.permutation(limit)[:lanes].astype(f"i{index_bits // 8}")
                block[640:640 + spec.index_bits // 8] = indices.view(np.uint8)
        elif isinstance(operand, Register) and operand.kind == "gpr":
            fill(block[GENERAL + 8 * operand.number:GENERAL + 8 * operand.number + 8], f"u{spec.bits}", style,
                 random_state)
    if case.row.mnemonic == "vdpbf16ps" and style >= 2:
        # Pairs of bf16 of moderate size, so that both products and the accumulator weigh in.
        for start in (*(64 * n for n in range(2, 9)), MEMORY):
            values = (random_state.standard_normal(32) * 4.0 ** random_state.integers(-2, 3, 32)).astype(np.float32)
            block[start:start + 64] = (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    if style == 3:
        block[MASKS + 8:MASKS + 16] = 0 if random_state.integers(2) else 255
    flags = int(random_state.integers(0, 64))
    word = 2 + sum((flags >> i & 1) << bit for i, bit in enumerate(FLAG_BITS.values()))
    block[FLAGS:FLAGS + 8] = np.frombuffer(word.to_bytes(8, "little"), np.uint8)
    if case.row.mnemonic in ("div", "idiv"):
        block[GENERAL + 16:GENERAL + 24] = 0
        if case.row.mnemonic == "idiv":
            size = int(case.row.name[-2:]) // 8
            low = block[GENERAL:GENERAL + size].view(f"i{size}")[0]
            block[GENERAL + 16:GENERAL + 24] = 255 if low < 0 else 0


def index_size(row: Row) -> int:
    """Bits of one gather index, from the letter before the element type."""
    stem = row.mnemonic.removeprefix("vp").removeprefix("v").removeprefix("gather").removeprefix("scatter")
    return {"d": 32, "q": 64}[stem[0]]


def word(block: np.ndarray, offset: int, size_bytes: int = 8) -> int:
    return int.from_bytes(block[offset:offset + size_bytes].tobytes(), "little")


def gathered(case: Case, spec: Any, block: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Byte offsets of each lane's element, and the elements' bytes side by side."""
    index_bits = index_size(case.row)
    indices = block[640:640 + spec.index_bits // 8].view(f"i{index_bits // 8}").astype(np.int64)
    size = spec.memory_bits // 8
    lanes = min(len(indices), max(1, case.row.length // max(spec.memory_bits, index_bits)))
    offsets = MEMORY + indices[:lanes] * size
    return offsets, np.concatenate([block[o:o + size] for o in offsets])


def expected(case: Case, before: np.ndarray) -> tuple[np.ndarray, int]:
    """The block after the instruction by its meaning, and which flag bits are defined."""
    row, instruction = case.row, case.instruction
    values: list[Any] = []
    in_memory = []
    offsets = np.zeros(0, np.int64)
    for spec, operand in zip(row.operands, instruction.operands, strict=True):
        in_memory.append(isinstance(operand, Memory))
        if isinstance(operand, Immediate):
            size = next((o.bits for o in row.operands if o.kind == "gpr"), 8)
            widest = spec.immediate_bits or spec.bits
            values.append(operand.value & ((1 << (8 if widest == 8 else size)) - 1))
        elif isinstance(operand, Memory):
            if spec.role == "a":
                values.append(word(before, GENERAL + 72) + 4 * word(before, GENERAL + 80) + 1000)
            elif spec.index_bits:
                offsets, elements = gathered(case, spec, before)
                values.append(elements)
            else:
                size = (spec.broadcast_bits if operand.broadcast else spec.memory_bits) // 8
                values.append(before[MEMORY:MEMORY + size].copy())
        elif operand.kind == "vec":  # type: ignore[union-attr]
            start = 64 * operand.number  # type: ignore[union-attr]
            values.append(before[start:start + spec.bits // 8].copy())
        elif operand.kind == "mask":  # type: ignore[union-attr]
            values.append(word(before, MASKS + 8 * operand.number))  # type: ignore[union-attr]
        else:
            values.append(word(before, GENERAL + 8 * operand.number, spec.bits // 8))  # type: ignore[union-attr]
    bits = int(row.name[-2:]) if row.name[-2:] in ("32", "64") else 64
    if row.name in ("cdq", "cqo"):
        bits = 32 if row.name == "cdq" else 64
    implicit = tuple(word(before, GENERAL + 8 * n, bits // 8) for _, n in row.implicit_reads)
    flag_word = word(before, FLAGS)
    flags = {name: flag_word >> bit & 1 for name, bit in FLAG_BITS.items()}
    mask = word(before, MASKS + 8) if instruction.mask is not None else None
    results, implicit_out, flags_out, mask_out = execute(row, values, tuple(in_memory), mask, instruction.zeroing,
                                                         flags, implicit)
    after = before.copy()

    def put(offset: int, number: int) -> None:
        after[offset:offset + 8] = np.frombuffer(number.to_bytes(8, "little"), np.uint8)

    for (_, number), value in zip(row.implicit_writes, implicit_out, strict=True):
        if not (row.mnemonic.endswith("cmpxchg") and value == implicit[0]):
            put(GENERAL + 8 * number, value)
    # Last operands first: where one register is written twice the first operand wins.
    for position in reversed(range(len(values))):
        spec, operand, value = row.operands[position], instruction.operands[position], results[position]
        if not spec.writes:
            continue
        if isinstance(operand, Memory):
            if spec.index_bits:
                size = spec.memory_bits // 8
                for lane, offset in enumerate(offsets):
                    after[offset:offset + size] = value[lane * size:(lane + 1) * size]
            else:
                after[MEMORY:MEMORY + len(value)] = value
        elif operand.kind == "vec":  # type: ignore[union-attr]
            start = 64 * operand.number  # type: ignore[union-attr]
            after[start:start + REGISTER_BYTES] = 0
            after[start:start + len(value)] = value
        elif operand.kind == "mask":  # type: ignore[union-attr]
            put(MASKS + 8 * operand.number, value)  # type: ignore[union-attr]
        elif spec.bits == 8:
            after[GENERAL + 8 * operand.number] = value  # type: ignore[union-attr]
        elif spec.bits == 16:
            after[GENERAL + 8 * operand.number:][:2] = np.frombuffer(value.to_bytes(2, "little"),
                                                                     np.uint8)  # type: ignore[union-attr]
        else:
            put(GENERAL + 8 * operand.number, value)  # type: ignore[union-attr]
    if mask_out is not None:
        put(MASKS + 8, mask_out)
    defined = 0
    new_word = flag_word
    for name, bit in FLAG_BITS.items():
        if name in flags_out:
            new_word = new_word & ~(1 << bit) | flags_out[name] << bit
        if name in flags_out or name not in row.flags_written:
            defined |= 1 << bit
    put(FLAGS, new_word)
    return after, defined


def tolerant(case: Case, found: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """`found` with the lanes that are within the row's tolerance replaced by the wanted ones."""
    spec = case.row.operands[0]
    operand = case.instruction.operands[0]
    start = 64 * operand.number  # type: ignore[union-attr]
    dtype = f"f{int(spec.dtype[1:]) // 8}"
    out = found.copy()
    a = out[start:start + spec.bits // 8].view(dtype)
    b = wanted[start:start + spec.bits // 8].view(dtype)
    tiny = float(np.finfo(dtype).tiny)
    with np.errstate(all="ignore"):
        near = np.abs(a.astype(np.longdouble) - b) <= case.row.tolerance * np.abs(b.astype(np.longdouble)) + 0
        # Results that are not normal numbers are flushed or not as the implementation likes.
        near |= (np.abs(a) <= tiny) & (np.abs(b) <= tiny) & (np.signbit(a) == np.signbit(b))
        near |= np.isinf(a) & (np.abs(b) > float(np.finfo(dtype).max) / 2)
    a[near] = b[near]
    return out


def main(progress_path: str, seed: int) -> None:
    host = detect.host().features
    wide = "avx512f" in host
    rows, skipped = [], {}
    for row in ROWS.values():
        missing = sorted(row.features - host)
        if missing:
            skipped[row.name] = "the host lacks " + ", ".join(missing)
        elif row.name in CANNOT_RUN:
            skipped[row.name] = CANNOT_RUN[row.name]
        elif "amx_tile" in row.features:
            skipped[row.name] = TILES
        else:
            rows.append(row)
    cases: list[Case] = []
    for row in rows:
        if row.control == "branch":
            cases.append(Case(row, Instruction(row, [LabelReference(f"taken{len(cases)}")])))
        else:
            cases += cases_of(row, wide)
    body: list[Any] = []
    for number, case in enumerate(cases):
        body += wrap(case, number, wide)
    code = encode(MachineFunction("cases", body, {}))
    pages = b"".join([code.code, b"\xcc" * (-len(code.code) % 4096)])
    address = load(pages)
    storage = np.zeros(BLOCK_BYTES + 64, np.uint8)
    block = storage[-storage.ctypes.data % 64:][:BLOCK_BYTES]
    pointer = block.ctypes.data
    progress = os.open(progress_path, os.O_CREAT | os.O_RDWR)
    random_state = np.random.default_rng(seed)
    differences: list[str] = []
    runs = 0
    blamed: dict[str, int] = {}
    for number, case in enumerate(cases):
        os.pwrite(progress, f"{case.row.name}: {print_instruction(case.instruction)}".ljust(200).encode(), 0)
        native = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address + code.label_offsets[f"case{number}"])
        for style in range(4):
            prepare(case, style, block, random_state)
            before = block.copy()
            if case.row.meaning is None:
                native(pointer)
                runs += 1
                continue
            if case.row.control == "branch":
                native(pointer)
                runs += 1
                flag_word = word(before, FLAGS)
                taken = case.row.meaning({name: flag_word >> bit & 1 for name, bit in FLAG_BITS.items()})
                if word(block, GENERAL + 64) != int(taken):
                    differences.append(f"{case.row.name}: flags {flag_word:x}: found {word(block, GENERAL + 64)}")
                continue
            try:
                wanted, defined = expected(case, before)
            except OverflowError:
                continue
            except Exception as error:
                blamed[case.row.name] = blamed.get(case.row.name, 0) + 1
                if blamed[case.row.name] == 1:
                    text = print_instruction(case.instruction)
                    differences.append(f"{case.row.name}: {text}: meaning raised {error!r}")
                continue
            native(pointer)
            runs += 1
            found = tolerant(case, block, wanted) if case.row.tolerance else block.copy()
            status = (word(found, FLAGS) ^ word(wanted, FLAGS)) & defined
            found[FLAGS:FLAGS + 8] = wanted[FLAGS:FLAGS + 8]
            if case.row.name in ("cmpxchg.32", "bsf.32", "bsr.32"):
                # Processors differ in whether a register that keeps its value is extended with zeros.
                for n in (0, 8):
                    wanted[GENERAL + 8 * n + 4:GENERAL + 8 * n + 8] = found[GENERAL + 8 * n + 4:GENERAL + 8 * n + 8]
            wrong = np.flatnonzero(found != wanted)
            if len(wrong) or status:
                blamed[case.row.name] = blamed.get(case.row.name, 0) + 1
                if blamed[case.row.name] <= 2:
                    differences.append(describe(case, style, before, found, wanted, wrong, status))
    print(json.dumps({"runs": runs, "cases": len(cases), "rows": len(rows), "skipped": skipped, "blamed": blamed,
                      "differences": differences}))


def describe(case: Case, style: int, before: np.ndarray, found: np.ndarray, wanted: np.ndarray, wrong: np.ndarray,
             status: int) -> str:
    where = int(wrong[0]) // 8 * 8 if len(wrong) else FLAGS
    text = f"{case.row.name}: {print_instruction(case.instruction)} style {style}: "
    if status:
        text += "flags " + "".join(n for n, bit in FLAG_BITS.items() if status >> bit & 1) + " differ; "
    lane = where % 64
    inputs = []
    for operand in case.instruction.operands:
        if isinstance(operand, Register):
            start = {"vec": 64 * operand.number, "mask": MASKS + 8 * operand.number,
                     "gpr": GENERAL + 8 * operand.number}[operand.kind]
            inputs.append(before[start + (lane if operand.kind == "vec" else 0):][:8][::-1].tobytes().hex())
        elif isinstance(operand, Memory):
            inputs.append("m" + before[MEMORY + lane:][:8][::-1].tobytes().hex())
    return text + (f"at {where}: found {found[where:where + 8][::-1].tobytes().hex()}, meaning "
                   f"{wanted[where:where + 8][::-1].tobytes().hex()}; inputs {inputs} mask {word(before, MASKS + 8):x}")


def load(pages: bytes) -> int:
    """Map code: written, then made executable and read-only."""
    libc = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    address = libc.mmap(None, len(pages), 3, 0x22, -1, 0)
    ctypes.memmove(address, pages, len(pages))
    if libc.mprotect(address, len(pages), 5):
        raise OSError("mprotect")
    return int(address)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
