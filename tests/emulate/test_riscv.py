"""What the emulator of RISC-V finds wrong in code, and `sapper check` by it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from sapper import emulate
from sapper.cli.main import main
from sapper.codegen.machine import Immediate, Instruction, Label, LabelReference, MachineFunction, Memory, Register
from sapper.codegen.settle import settle
from sapper.codegen.words import encode
from sapper.emulate import riscv
from sapper.emulate.errors import DeadlockError, EmulationError, MemoryFault
from sapper.emulate.laid_out import Buffers
from sapper.targets import target
from sapper.targets.riscv64.allocation import register_file

runs = pytest.mark.skipif(shutil.which(riscv.PROGRAM) is None, reason=f"{riscv.PROGRAM} is not installed")
X = [Register("gpr", number) for number in range(32)]
TARGET = target("rva23u64")
REGISTERS = register_file(TARGET.vector_bits)


def code_of(*items: tuple[Any, ...] | str) -> bytes:
    """Instructions as (row, operands ...), labels as text; a return at the end."""
    body: list[Instruction | Label] = [
        Label(item) if isinstance(item, str) else Instruction(REGISTERS.rows[item[0]], list(item[1:]))
        for item in [*items, ("ret",)]]
    function = MachineFunction("f", body, {})
    settle(function, REGISTERS, TARGET, TARGET.lanes)
    return encode(function, TARGET).code


FIRST = ("ld", X[13], Memory(X[10], disp=24))
"""The address of the only array: word 3."""


def run(code: bytes, array: np.ndarray, workers: int = 1, at_end: bool = True) -> None:
    def words_of(buffers: Buffers) -> list[int]:
        return [buffers.add_array(array)]

    riscv.run_code(code, words_of, 0, workers, at_end)


@runs
def test_code_that_is_right() -> None:
    array = np.arange(4, dtype=np.int64)
    run(code_of(FIRST, ("ld", X[14], Memory(X[13], disp=24)), ("sd", Memory(X[13]), X[14])), array)
    assert array.tolist() == [3, 1, 2, 3]


@runs
@pytest.mark.parametrize("workers", [2, 3])
def test_each_worker_has_its_number(workers: int) -> None:
    array = np.full(4, 9, np.int64)
    run(code_of(FIRST, ("slli", X[14], X[11], Immediate(3)), ("add", X[13], X[13], X[14]),
                ("sd", Memory(X[13]), X[12])), array, workers)
    assert array.tolist() == [workers] * workers + [9] * (4 - workers)


@runs
def test_the_length_of_vectors_is_what_was_asked_for() -> None:
    """A whole register is stored: so many bytes."""
    array = np.zeros(64, np.uint8)
    code = code_of(FIRST, ("vconst.e32", Register("vec", 1), Immediate(-1)),
                   ("vs1r.v", Memory(X[13]), Register("vec", 1)))
    for bits in (128, 256):
        riscv.run_code(code, lambda buffers: [buffers.add_array(array)], 0, vector_bits=bits)
        assert np.count_nonzero(array[bits // 8:]) == 0 and array[:16].tolist() == [255] * 16


@runs
@pytest.mark.parametrize(("at_end", "disp"), [(True, 32), (False, -8)])
@pytest.mark.parametrize("access", [
    lambda at: ("ld", X[14], at), lambda at: ("sd", at, X[14])], ids=["load", "store"])
def test_an_access_beyond_an_array(access: Callable[[Memory], tuple[Any, ...]], at_end: bool, disp: int) -> None:
    with pytest.raises(MemoryFault, match="SIGSEGV: found an access beyond a buffer, or no instruction, at 0x"):
        run(code_of(FIRST, access(Memory(X[13], disp=disp))), np.zeros(4, np.int64), at_end=at_end)


@runs
@pytest.mark.parametrize(("name", "item"), [
    ("s2", ("li", X[18], Immediate(1))), ("fs0", ("fconst.64", Register("fpr", 8), Immediate(1))),
    ("fs11", ("fconst.32", Register("fpr", 27), Immediate(0))), ("sp", ("addi", X[2], X[2], Immediate(-16)))])
def test_registers_of_the_caller(name: str, item: tuple[Any, ...]) -> None:
    with pytest.raises(EmulationError, match=f"found {name} changed at the return"):
        run(code_of(item), np.zeros(1))


@runs
def test_code_that_does_not_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(riscv, "SECONDS", 1)
    with pytest.raises(DeadlockError, match="still running after 1 s"):
        run(code_of(".here", ("j", LabelReference(".here"))), np.zeros(1))


@runs
def test_an_executable_that_fails() -> None:
    start = riscv.Start(128)
    start.call_system(94, 7)
    start.emit("ret")
    with pytest.raises(EmulationError, match="found exit code 7"):
        riscv.run_executable(riscv.executable(start.bytes(), 0, []), 128)


def test_an_executable_is_laid_out_as_its_headers_say() -> None:
    """Read back by the System V ABI's structures: each segment's bytes at its offset, which is its address modulo a
    page."""
    data = np.arange(4096, dtype=np.uint8)
    file = riscv.executable(b"code", 2, [(0x1000_0000, data)])
    assert file[:4] == b"\x7fELF" and int.from_bytes(file[24:32], "little") == riscv.CODE_AT + 2
    offset, address, _, size = np.frombuffer(file, "<u8", 4, 64 + 56 + 8).tolist()
    assert (address, size) == (0x1000_0000, 4096) and (offset - address) % 4096 == 0
    assert file[offset:offset + size] == data.tobytes()


@runs
def test_check_finds_what_machine_code_does_wrong(capsys: pytest.CaptureFixture[str],
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    from sapper.targets.riscv64 import select_arithmetic, select_common

    def spoiled(s: Any, op: Any) -> None:
        left, right = (select_common.row(s, value) for value in op.operands)
        s.emit(select_common.named(s, "vfsub.vv", op.results[0]), s.define(op.results[0]), left, right)

    from sapper.targets.riscv64 import select

    assert main(["check", "vector_add", "--target", "rva23u64", "--runs", "2"]) == 0
    assert "emulator" in capsys.readouterr().out
    monkeypatch.setitem(select.RULES, "add", spoiled)
    assert select_arithmetic.RULES["add"] is not spoiled
    assert main(["check", "vector_add", "--target", "rva23u64", "--runs", "2"]) == 1
    assert "WRONG at station `emulator`" in capsys.readouterr().out


def test_without_the_emulator_check_says_so(capsys: pytest.CaptureFixture[str],
                                            monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emulate, "which", lambda name: None)
    assert emulate.code_runner(TARGET) == (None, "apt install qemu-user, whose emulator runs such code")
    assert main(["check", "vector_add", "--target", "spacemit-x60", "--runs", "1"]) == 0
    assert "apt install qemu-user" in capsys.readouterr().out
