"""RISC-V machine code on an emulator that others wrote: qemu-riscv64, which runs an executable of Linux.

Enters: code as docs/ir.md says that it is called, and arguments. Leaves: arrays as the code left them. An executable is
written that has the code, each buffer in a segment of its own, as laid_out.py says, and a start that lets each worker
call the code on a stack of its own (clone), then writes all buffers to the standard output. Holds: an access beyond a
buffer is a fault, of which it is said where; what a function has to leave as it found it (psABI, "Procedure Calling
Convention") is compared. Needs the program qemu-riscv64 (qemu-user).
Source: System V ABI, "Program Header"; Linux system calls of riscv64.
"""

from __future__ import annotations

import re
import struct
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..codegen.machine import Immediate, Instruction, Label, LabelReference, MachineFunction, Memory, Register
from ..codegen.settle import settle
from ..codegen.words import encode
from ..runtime.arguments import Binding, Signature
from ..runtime.compiled import CompiledKernel
from ..targets import known_targets, target
from ..targets.riscv64.abi import CALLEE_SAVED, CALLEE_SAVED_FLOATS
from ..targets.riscv64.allocation import register_file
from ..targets.riscv64.registers import STACK, register_name
from .errors import DeadlockError, EmulationError, MemoryFault
from .laid_out import LOW, PAGE_BYTES, WordsOf, bound, whole_pages, with_arguments

PROGRAM = "qemu-riscv64"
CODE_AT, STACKS_AT = 0x10_0000, 0x70_0000_0000
STACK_BYTES = 64 * PAGE_BYTES
SECONDS = 60
"""What a call may take."""
_WRITE, _EXIT, _EXIT_GROUP, _YIELD, _CLONE = 64, 93, 94, 124, 220
_THREAD = 0x50F00
"""Flags of clone: memory, files, signals and the process are shared."""
_CHANGED = 64
"""The first exit code that names a register."""


class Start:
    """The code of an executable, being written. Registers are named as the manual numbers them."""

    def __init__(self, vector_bits: int) -> None:
        self.target = next(found for found in map(target, known_targets())
                           if found.family == "riscv64" and found.vector_bits == vector_bits)
        self.registers = register_file(vector_bits)
        self.body: list[Instruction | Label] = []

    def emit(self, name: str, *operands: Any) -> None:
        self.body.append(Instruction(self.registers.rows[name], [
            Immediate(o) if type(o) is int else LabelReference(o) if type(o) is str else o for o in operands]))

    def label(self, name: str) -> None:
        self.body.append(Label(name))

    def load(self, number: int, value: int) -> None:
        self.emit("li", general(number), (value & LOW) - (value >> 63 << 64))

    def call_system(self, number: int, *arguments: int) -> None:
        for place, value in enumerate(arguments):
            self.load(10 + place, value)
        self.load(17, number)
        self.emit("ecall")

    def bytes(self, lanes: int = 0) -> bytes:
        """lanes: of the vectors in it, if there are any."""
        function = MachineFunction("start", self.body, {})
        settle(function, self.registers, self.target, lanes or self.target.lanes)
        return encode(function, self.target).code


def general(number: int) -> Register:
    return Register("gpr", number)


def _marked(start: Start) -> None:
    """Registers that are the caller's, with what is looked for after the call."""
    for number in CALLEE_SAVED_FLOATS:
        start.load(5, 0xF00D_0000 + number)
        start.emit("fmv.d.x", Register("fpr", number), general(5))
    for number in CALLEE_SAVED:
        start.load(number, 0xC0DE_0000 + number)


def _compared(start: Start, stack: int) -> None:
    """Ends with the number of a register that is not what it was."""
    start.load(5, stack)
    start.emit("bne", general(5), general(STACK), f".changed{STACK}")
    below = Memory(general(STACK), disp=-16)
    for number in CALLEE_SAVED:
        start.load(5, 0xC0DE_0000 + number)
        start.emit("bne", general(5), general(number), f".changed{number}")
    for number in CALLEE_SAVED_FLOATS:
        start.emit("fsd", below, Register("fpr", number))
        start.emit("ld", general(6), below)
        start.load(5, 0xF00D_0000 + number)
        start.emit("bne", general(5), general(6), f".changed{32 + number}")


def _start_code(vector_bits: int, entry: int, words: int, workers: int, done: int,
                memory: Sequence[tuple[int, int]]) -> bytes:
    """done: the address of a word that counts workers that returned. memory: what is written, as (address, bytes)."""
    start = Start(vector_bits)
    for worker in range(1, workers):
        start.call_system(_CLONE, _THREAD, _stack_of(worker), 0, 0, 0)
        start.emit("beqz", general(10), f".worker{worker}")
    for worker in range(workers):
        start.label(f".worker{worker}")
        start.load(STACK, _stack_of(worker))
        _marked(start)
        for number, value in ((10, words), (11, worker), (12, workers), (5, entry)):
            start.load(number, value)
        start.emit("jalr", general(5))
        _compared(start, _stack_of(worker))
        if worker:
            start.load(5, 1)
            start.load(6, done)
            start.emit("amoadd.w", general(5), general(5), Memory(general(6)))
            start.call_system(_EXIT, 0)
            continue
        start.label(".wait")
        start.load(6, done)
        start.emit("lw", general(5), Memory(general(6)))
        start.load(6, workers - 1)
        start.emit("beq", general(5), general(6), ".written")
        start.call_system(_YIELD)
        start.emit("j", ".wait")
        start.label(".written")
        start.emit("fence")
        for place, (address, size_bytes) in enumerate(memory):
            _written(start, f".write{place}", address, size_bytes)
        start.call_system(_EXIT_GROUP, 0)
    for number in (STACK, *CALLEE_SAVED, *(32 + n for n in CALLEE_SAVED_FLOATS)):
        start.label(f".changed{number}")
        start.call_system(_EXIT_GROUP, _CHANGED + number)
    start.label(".unwritten")
    start.call_system(_EXIT_GROUP, 1)
    start.emit("ret")
    return start.bytes()


def _written(start: Start, label: str, address: int, size_bytes: int) -> None:
    """Memory to the standard output, as much at a time as it takes. Ends where it takes none."""
    start.load(11, address)
    start.load(12, size_bytes)
    start.load(17, _WRITE)
    start.label(label)
    start.load(10, 1)
    start.emit("ecall")
    start.emit("blez", general(10), ".unwritten")
    start.emit("add", general(11), general(11), general(10))
    start.emit("sub", general(12), general(12), general(10))
    start.emit("bgtz", general(12), label)


def _stack_of(worker: int) -> int:
    """Where a worker's stack begins; it goes down from there."""
    return STACKS_AT + worker * (STACK_BYTES + PAGE_BYTES) + STACK_BYTES


RISCV, DOUBLE_FLOATS = 243, 4
"""What an executable says that it is for, and how it passes floats."""


def executable(code: bytes, entry: int, segments: Sequence[tuple[int, Any]], machine: int = RISCV,
               flags: int = DOUBLE_FLOATS) -> bytes:
    """A static executable: code at CODE_AT, entered so many bytes behind its start; segments of bytes that may be
    written, each whole pages at its address. machine, flags: e_machine and e_flags of its header."""
    parts = [(5, CODE_AT, np.frombuffer(code, np.uint8)), *((6, address, data) for address, data in segments)]
    at = whole_pages(64 + 56 * len(parts))
    headers, contents = [], []
    for rights, address, data in parts:
        headers.append(struct.pack("<IIQQQQQQ", 1, rights, at, address, address, len(data), len(data), PAGE_BYTES))
        contents.append(data.tobytes().ljust(whole_pages(len(data)), b"\0"))
        at += len(contents[-1])
    head = struct.pack("<16sHHIQQQIHHHHHH", b"\x7fELF\2\1\1", 2, machine, 1, CODE_AT + entry, 64, 0, flags, 64,
                       56, len(parts), 0, 0, 0)
    front = (head + b"".join(headers)).ljust(whole_pages(64 + 56 * len(parts)), b"\0")
    return front + b"".join(contents)


def run_executable(program: bytes, vector_bits: int) -> bytes:
    """What an executable writes. Raises MemoryFault where it reaches what is not there, DeadlockError where it does not
    end, EmulationError of its exit code, FileNotFoundError without qemu-riscv64."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel"
        path.write_bytes(program)
        path.chmod(0o700)
        command = [PROGRAM, "-cpu", f"max,vlen={vector_bits}", str(path)]
        try:
            done = subprocess.run(command, capture_output=True, timeout=SECONDS, check=False)
            if done.returncode < 0:
                traced = subprocess.run([*command[:1], "-strace", *command[1:]], capture_output=True, timeout=SECONDS,
                                        check=False)
                told = re.findall(r"--- (SIG\w+).*?si_addr\s*=\s*(\w+)", traced.stderr.decode(errors="replace"))
                what, where = told[-1] if told else (f"signal {-done.returncode}", "an unknown address")
                raise MemoryFault(f"{what}: found an access beyond a buffer, or no instruction, at {where}; expected "
                                  "neither")
        except subprocess.TimeoutExpired:
            raise DeadlockError(f"found workers still running after {SECONDS} s; expected them to return") from None
    if done.returncode >= _CHANGED:
        kind, number = divmod(done.returncode - _CHANGED, 32)
        name = register_name("fpr" if kind else "gpr", number)
        raise EmulationError(f"found {name} changed at the return; expected what the caller had there")
    if done.returncode:
        raise EmulationError(f"found exit code {done.returncode}: {done.stderr.decode(errors='replace')}; expected 0")
    return done.stdout


def run_code(code: bytes, words_of: WordsOf, scratch: int, workers: int = 1, at_end: bool = True,
             vector_bits: int = 128) -> None:
    """Run a kernel's code. words_of, scratch: see laid_out.py. vector_bits: of the registers that it was made for.
    Raises as `run_executable`."""
    buffers, words = with_arguments(words_of, scratch, workers, at_end)
    done, held = buffers.add(4, 4)
    held[:] = 0
    memory = [(address, len(pages)) for address, pages in buffers.memory]
    behind = -len(code) % 16
    start = _start_code(vector_bits, CODE_AT, words, workers, done, memory)
    stacks = [(_stack_of(worker) - STACK_BYTES, np.zeros(STACK_BYTES, np.uint8)) for worker in range(workers)]
    made = run_executable(executable(code + bytes(behind) + start, len(code) + behind, [*buffers.memory, *stacks]),
                          vector_bits)
    at = 0
    for _, pages in buffers.memory:
        pages[:] = np.frombuffer(made, np.uint8, len(pages), at)
        at += len(pages)
    buffers.give_back()


def run_compiled(compiled: CompiledKernel, signature: Signature, binding: Binding, arguments: Mapping[str, Any],
                 workers: int = 1, vector_bits: int = 128) -> None:
    """Run a compiled kernel on bound arguments, by name; arrays take what it wrote. Raises as `run_executable`."""
    words_of, scratch = bound(compiled, signature, binding, arguments)
    run_code(compiled.code, words_of, scratch, workers if compiled.counters else 1, vector_bits=vector_bits)
