"""The object file is read by binutils and by the linker, and what is in it runs."""

from __future__ import annotations

import ctypes
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from sapper.codegen.encode import EncodedCode, encode
from sapper.codegen.listing import Listing
from sapper.codegen.machine import Immediate, Instruction, MachineFunction, Memory, Register
from sapper.codegen.object import Part, write_executable, write_object
from sapper.targets.x86_64.instructions import ROWS
from sapper.targets.x86_64.registers import RAX, RDI


def sum_of(name: str, extra: int) -> EncodedCode:
    """int64 name(int64 a, int64 b): a + b + extra, the latter from a constant beside the code."""
    body = [Instruction(ROWS["lea.64"], [Register("gpr", 0), Memory(Register("gpr", 7), Register("gpr", 6))]),
            Instruction(ROWS["add.64"], [Register("gpr", 0), Memory(label="extra")]), Instruction(ROWS["ret"], [])]
    return encode(MachineFunction(name, list(body), {"extra": (64, extra.to_bytes(8, "little"))}))


@pytest.mark.skipif(shutil.which("objdump") is None, reason="binutils are not installed")
def test_binutils_read_it(tmp_path: Path) -> None:
    functions = {"first": sum_of("first", 1), "second": sum_of("second", 2)}
    path = tmp_path / "two.o"
    path.write_bytes(write_object([Part(n, c) for n, c in functions.items()]))
    shown = subprocess.run(["objdump", "-d", "-t", "-M", "intel", str(path)], capture_output=True, text=True,
                           check=True)
    assert not shown.stderr
    assert "g     F .text\t0000000000000048 first" in shown.stdout
    assert "g     F .text\t0000000000000048 second" in shown.stdout
    assert "lea    rax,[rdi+rsi*1]" in shown.stdout
    listed = subprocess.run(["readelf", "-W", "-a", str(path)], capture_output=True, text=True, check=True)
    assert "Warning" not in listed.stderr + listed.stdout
    assert "There are no relocations in this file." in listed.stdout
    assert write_object([Part(n, c) for n, c in functions.items()]) == path.read_bytes()


@pytest.mark.skipif(shutil.which("ld") is None or platform.machine() != "x86_64", reason="needs ld and x86-64")
def test_it_links_and_runs(tmp_path: Path) -> None:
    (tmp_path / "two.o").write_bytes(write_object([Part("first", sum_of("first", 1)),
                                                    Part("second", sum_of("second", 1000))]))
    done = subprocess.run(["ld", "-shared", "-o", str(tmp_path / "two.so"), str(tmp_path / "two.o")],
                          capture_output=True,
                          text=True, check=True)
    assert not done.stderr  # no warning about an executable stack
    library = ctypes.CDLL(str(tmp_path / "two.so"))
    assert library.first(40, 1) == 42
    assert library.second(40, 2) == 1042


@pytest.mark.skipif(platform.machine() != "x86_64" or platform.system() != "Linux", reason="not x86-64 Linux")
def test_an_executable_begins_at_its_entry(tmp_path: Path) -> None:
    """Its status is a number that one function wrote to an area, and another one reads."""
    store, start = Listing(), Listing()
    store("mov.32", RAX, Immediate(42))
    store("mov.32", Memory(label="place"), RAX)
    store("ret")
    start("lea.64", RAX, Memory(label="store"))
    start("call.indirect", RAX)
    start("mov.32", RDI, Memory(label="place"))
    start("mov.32", RAX, Immediate(60))
    start("syscall")
    functions = [MachineFunction("store", store.body, {}, externals=frozenset({"place"})),
                 MachineFunction("start", start.body, {}, externals=frozenset({"place", "store"}))]
    parts = [Part(f.name, encode(f)) for f in functions]
    path = tmp_path / "program"
    path.write_bytes(write_executable(parts, "start", {"place": 8}, debug=True))
    path.chmod(0o755)
    assert subprocess.run([str(path)], timeout=10, check=False).returncode == 42
    if shutil.which("readelf"):
        told = subprocess.run(["readelf", "-Wa", str(path)], capture_output=True, text=True, check=True)
        assert "EXEC" in told.stdout and "INTERP" not in told.stdout and not told.stderr
    with pytest.raises(ValueError, match="no function 'main'"):
        write_executable(parts, "main", {"place": 8})


def test_bad_names_and_empty_sets_are_refused() -> None:
    with pytest.raises(ValueError, match="found no function"):
        write_object([])
    with pytest.raises(ValueError, match="found function name"):
        write_object([Part("a\0b", sum_of("x", 1))])
