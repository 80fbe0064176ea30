"""Frame rows against what the stack really is at every instruction; the tables against binutils and a C program."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sapper.assembly import x86
from sapper.assembly.build import Assembly
from sapper.assembly.emulate import Emulator
from sapper.assembly.finish import finish
from sapper.codegen.encode import encode
from sapper.codegen.library import c_kernel, make_library
from sapper.codegen.machine import Instruction, MachineFunction, Register
from sapper.codegen.unwind import Frame, _word_expression, directives, frame_rows
from sapper.lane.memory import Memory
from tests.assembly.pieces import ZEN4, binary, piece

from . import library_kernels as source

SAVED = [Register(*pair) for pair in x86.table.CALLEE_SAVED]


class Watching(Emulator):
    """Checks, before each instruction, that the rows lead to the caller: the CFA, and what the caller's registers
    held."""

    def __init__(self, machine: MachineFunction, *arguments: Any) -> None:
        self.watched = False
        memory = Memory()
        registers: dict[Any, Any] = {r: 1000 + r.number for r in SAVED}
        for pair, value in zip(x86.table.ARGUMENTS, arguments, strict=False):
            registers[Register(*pair)] = memory.add_array("a", value) if isinstance(value, np.ndarray) else value
        super().__init__(x86.table, memory, registers)
        rows = frame_rows(machine, encode(machine).offsets)
        self.frames: dict[Instruction, Frame] = {}
        offsets = encode(machine).offsets
        for item, start in zip(machine.body, offsets, strict=False):
            if isinstance(item, Instruction):
                self.frames[item] = [frame for offset, frame in rows if offset <= start][-1]
        self.forms: set[str] = set()

    def word(self, address: int) -> int:
        return int.from_bytes(self.read(address, 8).tobytes(), "little")

    def execute(self, item: Instruction) -> None:
        frame = self.frames[item]
        base = self.get(Register("gpr", frame.register))
        cfa = frame.offset + (base if frame.word is None else self.word(base + frame.word))
        assert cfa == self.entry_stack + 8, (item.row.name, frame)
        kept = dict(frame.saved)
        for register in SAVED:
            held = self.word(cfa - kept[register.number]) if register.number in kept else self.get(register)
            assert held == 1000 + register.number, (item.row.name, frame)
        self.forms.add("word" if frame.word is not None else x86.table.REGISTERS and f"register {frame.register}")
        super().execute(item)


def spilling(count: int, kind: str) -> Any:
    """More values at once than there are registers, over a loop."""
    def write(a: Assembly, x: Any, y: Any, n: Any) -> None:
        held = [a.new(kind) for _ in range(count)]
        move = x86.mov if kind == "r64" else x86.vmovups
        size = 8 if kind == "r64" else 64
        for i, v in enumerate(held):
            move(v, x86.ptr[x + size * i])
        with a.loop(0, n):
            for i, v in enumerate(held):
                move(x86.ptr[y + size * i], v)
        x86.ret()

    return binary(write)


def naked(a: Assembly) -> None:
    """Pushes, room of its own, a loop, and two ways out."""
    a.input(x86.rdi)
    a.input(x86.rdx)
    out = a.label()
    x86.push(x86.rbx)
    x86.test(x86.rdx, x86.rdx)
    x86.jle(out)
    x86.push(x86.r12)
    x86.sub(x86.rsp, 24)
    head = a.here()
    x86.lea(x86.rbx, x86.ptr[x86.rdi + 1])
    x86.mov(x86.r12, x86.rbx)
    x86.sub(x86.rdx, 1)
    x86.jg(head)
    x86.add(x86.rsp, 24)
    x86.pop(x86.r12)
    x86.pop(x86.rbx)
    x86.ret()
    a.place(out)
    x86.nop()
    x86.pop(x86.rbx)
    x86.ret()


@pytest.mark.parametrize("count, kind, forms", [
    (2, "r64", {"register 4"}), (14, "r64", {"register 4"}), (20, "r64", {"register 4"}),
    (36, "zmm", {"register 4", "register 0", "word"}),
])
def test_the_rows_lead_to_the_caller_from_everywhere(count: int, kind: str, forms: set[str]) -> None:
    machine = finish(piece(spilling(count, kind)), ZEN4).machine
    x, y = np.arange(count * 8, dtype=np.int64), np.zeros(count * 8, np.int64)
    emulator = Watching(machine, x, y, 2)
    emulator.run(machine)
    assert len(emulator.forms) >= len(forms) - 1 and ("word" in emulator.forms) == ("word" in forms)


@pytest.mark.parametrize("count", [0, 3])
def test_functions_that_make_their_own_frame(count: int) -> None:
    machine = finish(piece(naked, True), ZEN4).machine
    emulator = Watching(machine, 5, 0, count)
    emulator.run(machine)


def test_a_stack_pointer_that_is_lost_gives_no_rows() -> None:
    def write(a: Assembly) -> None:
        a.input(x86.rdi)
        x86.mov(x86.rsp, x86.rdi)
        x86.ret()

    machine = piece(write, True).machine()
    assert frame_rows(machine, encode(machine).offsets) == []


def library(*kernels: Any) -> Any:
    return make_library([c_kernel(k, ZEN4) for k in kernels], ZEN4)


@pytest.mark.skipif(shutil.which("readelf") is None, reason="binutils are not installed")
@pytest.mark.parametrize("kind", ["so", "o"])
def test_binutils_read_the_tables(kind: str, tmp_path: Path) -> None:
    made = library(source.matmul)
    path = tmp_path / f"lib.{kind}"
    path.write_bytes(made.so("lib.so") if kind == "so" else made.o())
    shown = subprocess.run(["readelf", "-W", "--debug-dump=frames", str(path)], capture_output=True, text=True,
                           check=True)
    assert not shown.stderr
    ranges = re.findall(r"FDE cie=\w+ pc=(\w+)\.\.(\w+)", shown.stdout)
    assert len(ranges) == len(made.parts) and all(part.frame for part in made.parts)
    sizes = [int(end, 16) - int(begin, 16) for begin, end in ranges]
    assert sizes == [part.code.code_bytes for part in made.parts]
    assert "DW_CFA_offset: r3 (rbx) at cfa-16" in shown.stdout
    if kind == "so":
        segments = subprocess.run(["readelf", "-W", "-l", str(path)], capture_output=True, text=True, check=True).stdout
        assert "GNU_EH_FRAME" in segments


@pytest.mark.skipif(shutil.which("readelf") is None or shutil.which("as") is None, reason="binutils are not installed")
def test_the_text_says_the_same_as_the_object(tmp_path: Path) -> None:
    made = library(source.matmul)

    def frames(path: Path) -> list[str]:
        shown = subprocess.run(["readelf", "-W", "--debug-dump=frames-interp", str(path)], capture_output=True,
                               text=True, check=True).stdout
        return [line for line in shown.splitlines() if re.match(r"[0-9a-f]{16} [a-z]|   LOC", line)]

    (tmp_path / "own.o").write_bytes(made.o())
    (tmp_path / "text.s").write_text(made.s(), encoding="utf-8")
    subprocess.run(["as", "text.s", "-o", "as.o"], cwd=tmp_path, check=True)
    assert len(frames(tmp_path / "own.o")) > 20 and frames(tmp_path / "own.o") == frames(tmp_path / "as.o")


def test_the_text_says_that_a_caller_is_lost_or_kept_in_a_word() -> None:
    def lost(a: Assembly) -> None:
        a.input(x86.rdi)
        x86.mov(x86.rsp, x86.rdi)
        x86.ret()

    assert directives(piece(lost, True).machine()) == {0: [".cfi_undefined rip"]}
    # DW_CFA_def_cfa_expression, 5 bytes: DW_OP_breg7 (rsp) + 24, DW_OP_deref, DW_OP_plus_uconst 8.
    assert _word_expression(Frame(offset=8, word=24)) == bytes((0x0F, 5, 0x77, 24, 0x06, 0x23, 8))


C_PROGRAM = r"""
#include <execinfo.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
#include "kernels.h"

static void handler(int number) {
    void *frames[64];
    backtrace_symbols_fd(frames, backtrace(frames, 64), 1);
    _exit(0);
}

int calls_the_kernel(float *x, float *y) { return NAME(x, 2.0f, y, 64, 64) + 100; }

int main(void) {
    void *warm[2];
    backtrace(warm, 2); /* it loads the unwinder now, not in the handler */
    struct sigaction action;
    memset(&action, 0, sizeof action);
    action.sa_handler = handler;
    sigaction(SIGSEGV, &action, 0);
    static float y[64 * 64];
    float *x = mmap(0, 1 << 16, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return calls_the_kernel(x, y);
}
"""


@pytest.mark.skipif(shutil.which("gcc") is None or platform.machine() != "x86_64", reason="gcc is not installed")
@pytest.mark.parametrize("kind", ["so", "o"])
def test_backtrace_passes_through_a_kernel(kind: str, tmp_path: Path) -> None:
    """The kernel faults; backtrace() in the handler sees its C caller, and main."""
    from sapper.targets import host_target

    chip = host_target()
    made = make_library([c_kernel(source.scale, chip)], chip)
    (tmp_path / "kernels.h").write_text(made.h("kernels"), encoding="utf-8")
    (tmp_path / "main.c").write_text(C_PROGRAM.replace("NAME", "scale"), encoding="utf-8")
    (tmp_path / "libk.so").write_bytes(made.so("libk.so"))
    (tmp_path / "k.o").write_bytes(made.o())
    linked = ["k.o"] if kind == "o" else ["-L.", "-lk", "-Wl,-rpath,."]
    built = subprocess.run(["gcc", "-O1", "-fno-omit-frame-pointer", "-fno-optimize-sibling-calls", "-rdynamic",
                            "main.c", *linked, "-o", "main"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    done = subprocess.run(["./main"], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done
    names = re.findall(r"\((\w*)\+0x\w+\)", done.stdout)
    assert "calls_the_kernel" in names and "main" in names, done.stdout
    assert names.index("calls_the_kernel") < names.index("main")
