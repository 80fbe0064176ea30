"""Guarded runs: good kernels give their outputs, bad ones a report, and the caller survives all of them."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sapper.codegen.machine import Immediate
from sapper.ir.types import TileType, f32, i64
from sapper.runtime import guarded
from sapper.runtime.compiled import CompiledKernel
from sapper.runtime.errors import ArgumentError
from sapper.runtime.guarded import PLACEMENTS, run_guarded
from sapper.targets.x86_64.registers import RAX, RCX, RDX, RSP

from .conftest import ADD_F32, ADD_I64, ADD_I64_SLOTS, ADD_SLOTS, Compiler, FakeKernel, assemble, at, tensor, word

ENDLESS = assemble("again", ("jmp", "again"))
LIMIT_S = 30  # for what comes at once, unless the machine is held up
PAUSE = 34
WAITING = assemble("again", ("mov.32", RAX, Immediate(PAUSE)), ("syscall",), ("jmp", "again"))
"""A kernel without end that a test can see from outside: its process is in pause(2)."""


def kernel_of(compiler: Compiler, code: bytes, slots: tuple[str, ...], dtype: Any = i64, **facts: Any) -> FakeKernel:
    compiler.results["k"] = CompiledKernel("k", code, slots, stored=("out",), **facts)
    kernel = FakeKernel("k", [("a", tensor(dtype, "M")), ("x", TileType(dtype)), ("out", tensor(dtype, "M"))])
    kernel.source_digest = code.hex  # type: ignore[method-assign]
    return kernel


def arguments(size: int = 5) -> tuple[Any, int, Any]:
    return np.arange(size), 10, np.full(size, -1, np.int64)


def touch(slot_word: int, disp: int, write: bool) -> bytes:
    """A kernel that reads or writes 8 bytes at an offset from a tensor's address."""
    access = ("mov.64", at(RAX, disp), RAX) if write else ("mov.64", RCX, at(RAX, disp))
    return assemble(("mov.64", RAX, word(slot_word)), access, ("ret",))


@pytest.mark.parametrize("size", [0, 1, 5, 512, 513, 3000])
def test_good_kernel(compiler: Compiler, size: int) -> None:
    kernel = kernel_of(compiler, ADD_I64, ADD_I64_SLOTS)
    a, x, out = arguments(size)
    runs = run_guarded(kernel, (a, x, out))
    assert [run.placement for run in runs] == list(PLACEMENTS)
    for run in runs:
        assert run.crash is None
        np.testing.assert_array_equal(run.outputs["out"], a + x)
    assert (out == -1).all() and (a == np.arange(size)).all()


def test_strided_and_reversed_arguments(compiler: Compiler) -> None:
    kernel = kernel_of(compiler, ADD_I64, ADD_I64_SLOTS)
    memory = np.arange(60)
    for a in (memory[::3], memory[::-3], memory[5:25]):
        for run in run_guarded(kernel, (a, 1, np.zeros(20, np.int64))):
            assert run.crash is None
            np.testing.assert_array_equal(run.outputs["out"], a + 1)


def test_floats(compiler: Compiler) -> None:
    kernel = kernel_of(compiler, ADD_F32, ADD_SLOTS, f32)
    a = np.arange(8, dtype=np.float32)
    for run in run_guarded(kernel, (a, 1.0, np.zeros(8, np.float32))):
        np.testing.assert_array_equal(run.outputs["out"], a + 1)
    # Three elements too few for whole vectors: the first vector starts before the buffer.
    runs = run_guarded(kernel, (a[:5], 1.0, np.zeros(5, np.float32)))
    assert [run.crash is None for run in runs] == [True, True]  # rounds down, and touches nothing else


@pytest.mark.parametrize(
    ("slot_word", "disp", "write", "placement", "buffer", "words"),
    [
        (3, 40, False, "end", "a", "read 0 bytes past the end of `a` (40 bytes)"),
        (3, -8, False, "start", "a", "read 8 bytes before the start of `a`"),
        (4, 48, True, "end", "out", "write 8 bytes past the end of `out`"),
        (4, -4, True, "start", "out", "write 4 bytes before the start of `out`"),
        (3, 8, True, "end", "a", "write at byte 8 of the read-only `a`"),
        (3, 8, True, "start", "a", "write at byte 8 of the read-only `a`"),
        (0, 64, True, "end", "scratch", "write 0 bytes past the end of `scratch` (64 bytes)"),
        (2, -8, True, "start", "sync block", "write 8 bytes before the start of `sync block`"),
    ],
)
def test_access_outside_is_reported(
    compiler: Compiler, slot_word: int, disp: int, write: bool, placement: str, buffer: str, words: str
) -> None:
    kernel = kernel_of(compiler, touch(slot_word, disp, write), ("a.data", "out.data"), scratch_bytes=50)
    (run,) = run_guarded(kernel, arguments(), placements=[placement])
    crash = run.crash
    assert crash is not None and not run.outputs
    assert (crash.kind, crash.signal, crash.buffer, crash.access) == (
        "signal", "SIGSEGV", buffer, "write" if write else "read",
    )  # fmt: skip
    assert words in str(crash)
    assert crash.offset_bytes == disp
    assert crash.code_offset == len(assemble(("mov.64", RAX, word(slot_word))))


def test_what_a_crash_leaves_is_run_by_another_child(compiler: Compiler) -> None:
    """Whichever placement it is that crashes, alone or with the other."""
    for disp, crashed in ((40, ("end",)), (-8, ("start",)), (8192, PLACEMENTS)):
        kernel = kernel_of(compiler, touch(4, disp, True), ("a.data", "out.data"))
        for order in (PLACEMENTS, PLACEMENTS[::-1], ("start", "start", "end", "end")):
            runs = run_guarded(kernel, arguments(), placements=order)
            assert [run.placement for run in runs] == list(order)
            assert [run.placement for run in runs if run.crash] == [place for place in order if place in crashed]
            assert all(("out" in run.outputs) != bool(run.crash) for run in runs)


def test_accesses_inside_are_fine(compiler: Compiler) -> None:
    for slot_word, disp in ((4, 0), (4, 32), (0, 0), (0, 56), (2, 0), (2, 568)):
        kernel = kernel_of(compiler, touch(slot_word, disp, True), ("a.data", "out.data"), scratch_bytes=64)
        assert [run.crash for run in run_guarded(kernel, arguments())] == [None, None]


def test_other_ways_to_die(compiler: Compiler) -> None:
    wild = assemble(("mov.64", RAX, Immediate(0x1234)), ("mov.64", at(RAX), RAX), ("ret",))
    (run,) = run_guarded(kernel_of(compiler, wild, ()), arguments(), placements=["end"])
    assert run.crash is not None and "0x1234, which is near no buffer" in str(run.crash)
    assert run.crash.buffer == ""
    for code, name in ((b"\x0f\x0b", "SIGILL"), (b"\xcc", "SIGTRAP")):
        (run,) = run_guarded(kernel_of(compiler, code, ()), arguments(), placements=["end"])
        assert run.crash is not None and run.crash.signal == name
    exhausting = assemble("again", ("push", RDX), ("jmp", "again"))
    (run,) = run_guarded(kernel_of(compiler, exhausting, ()), arguments(), placements=["end"])
    assert run.crash is not None and run.crash.signal == "SIGSEGV"
    leaving = assemble(
        ("mov.32", RAX, Immediate(231)), ("mov.32", 7, Immediate(5)), ("syscall",)
    )  # exit_group(5)
    (run,) = run_guarded(kernel_of(compiler, leaving, ()), arguments(), placements=["end"])
    assert run.crash is not None and (run.crash.kind, "status 5" in str(run.crash)) == ("exit", True)
    runs = run_guarded(kernel_of(compiler, assemble(  # exit_group(0), before its end
        ("mov.32", RAX, Immediate(231)), ("mov.32", 7, Immediate(0)), ("syscall",)), ()), arguments())
    assert ["status 0" in str(run.crash) for run in runs] == [True, True]
    killed = assemble(
        ("mov.32", RAX, Immediate(39)), ("syscall",), ("mov.32", 7, RAX), ("mov.32", 6, Immediate(9)),
        ("mov.32", RAX, Immediate(62)), ("syscall",), ("ret",),
    )  # fmt: skip  # kill(getpid(), SIGKILL)
    (run,) = run_guarded(kernel_of(compiler, killed, ()), arguments(), placements=["end"])
    assert run.crash is not None and "SIGKILL" in str(run.crash)
    bad_stack = assemble(("mov.64", RSP, Immediate(0)), ("push", RDX), ("ret",))
    (run,) = run_guarded(kernel_of(compiler, bad_stack, ()), arguments(), placements=["end"])
    assert run.crash is not None and run.crash.signal == "SIGSEGV"


def test_time_limit(compiler: Compiler) -> None:
    kernel = kernel_of(compiler, ENDLESS, ())
    start = time.monotonic()
    (run,) = run_guarded(kernel, arguments(), time_limit_s=0.2, placements=["end"])
    assert run.crash is not None and run.crash.kind == "time limit"
    assert 0.2 <= time.monotonic() - start < LIMIT_S
    assert [str(run.crash) for run in run_guarded(kernel, arguments(), time_limit_s=0.1)] == [
        "still running after 0.1 s"] * 2


def test_ctrl_c_ends_the_child(compiler: Compiler) -> None:
    def interrupt() -> None:
        child_in_its_kernel(os.getpid())
        os.kill(os.getpid(), signal.SIGINT)

    kernel = kernel_of(compiler, WAITING, ())
    before = children(os.getpid())
    with pytest.raises(KeyboardInterrupt):
        threading.Thread(target=interrupt).start()
        run_guarded(kernel, arguments(), time_limit_s=LIMIT_S)
    assert children(os.getpid()) == before


def test_ctrl_c_that_was_held_ends_the_child(compiler: Compiler, monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes as soon as the child is there, before anybody waits for it."""
    @contextlib.contextmanager
    def held() -> Iterator[None]:
        yield
        raise KeyboardInterrupt

    monkeypatch.setattr(guarded, "held", held)
    kernel = kernel_of(compiler, WAITING, ())
    before = children(os.getpid())
    with pytest.raises(KeyboardInterrupt):
        run_guarded(kernel, arguments(), time_limit_s=LIMIT_S)
    assert children(os.getpid()) == before


def test_the_child_ends_with_its_parent(compiler: Compiler) -> None:
    kernel = kernel_of(compiler, WAITING, ())
    parent = os.fork()
    if parent == 0:
        run_guarded(kernel, arguments(), time_limit_s=2 * LIMIT_S)
        os._exit(0)
    child = child_in_its_kernel(parent)
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    try:
        deadline = time.monotonic() + LIMIT_S
        while _runs(child):
            assert time.monotonic() < deadline, "it outlives its parent"
            time.sleep(0.01)
    finally:
        if _runs(child):
            os.kill(child, signal.SIGKILL)


def children(parent: int) -> list[str]:
    """Those of a process's main thread. Other tests of this process may have left some: Python's resource tracker."""
    return Path(f"/proc/{parent}/task/{parent}/children").read_text().split()


def child_in_its_kernel(parent: int) -> int:
    """The child of a process whose main thread runs WAITING guarded, once it is there."""
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline:
        for child in children(parent):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                if Path(f"/proc/{child}/syscall").read_text().startswith(f"{PAUSE} "):
                    return int(child)
        time.sleep(0.01)
    raise AssertionError("no child came to run the kernel")


def _runs(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def test_write_between_the_elements(compiler: Compiler) -> None:
    kernel = kernel_of(compiler, touch(4, 8, True), ("a.data", "out.data"))
    memory = np.zeros(10, np.int64)
    (run,) = run_guarded(kernel, (np.zeros(5, np.int64), 0, memory[::2]), placements=["end"])
    assert run.crash is not None
    assert (run.crash.kind, run.crash.buffer, run.crash.offset_bytes // 8) == ("stray write", "out", 1)
    kernel = kernel_of(compiler, touch(4, 16, True), ("a.data", "out.data"))
    (run,) = run_guarded(kernel, (np.zeros(5, np.int64), 0, memory[::2]), placements=["end"])
    assert run.crash is None


def test_in_place(compiler: Compiler) -> None:
    compiler.results["k"] = CompiledKernel("k", ADD_I64, ADD_I64_SLOTS, stored=("out",))
    kernel = FakeKernel(
        "k", [("a", tensor(i64, "M")), ("x", TileType(i64)), ("out", tensor(i64, "M"))], in_place=[("a", "out")]
    )
    memory = np.arange(6)
    for run in run_guarded(kernel, (memory, 5, memory)):
        assert run.crash is None and run.outputs["out"].tolist() == (memory + 5).tolist()


def test_several_workers(tasks: FakeKernel) -> None:
    out, who = np.zeros(30, np.int64), np.zeros(30, np.int64)
    tasks(out, who, 0, threads=2)  # the parent has a pool of its own
    for threads in (1, 3):
        for run in run_guarded(tasks, (np.zeros(30, np.int64), who, 0), {"threads": threads}):
            assert run.crash is None and (run.outputs["out"] == 1).all()


def test_scratch_is_not_zero(compiler: Compiler) -> None:
    code = assemble(("mov.64", RAX, word(0)), ("mov.64", RAX, at(RAX)), ("mov.64", RCX, word(3)),
                    ("mov.64", at(RCX), RAX), ("ret",))  # fmt: skip
    kernel = kernel_of(compiler, code, ("out.data",), scratch_bytes=64)
    for run in run_guarded(kernel, arguments()):
        assert run.outputs["out"].tolist() == [-1, -1, -1, -1, -1]


def test_wrong_arguments_are_refused_before(compiler: Compiler) -> None:
    kernel = kernel_of(compiler, ADD_I64, ADD_I64_SLOTS)
    with pytest.raises(ArgumentError):
        run_guarded(kernel, (np.zeros(3), 1, np.zeros(3, np.int64)))
    with pytest.raises(ValueError, match="middle"):
        run_guarded(kernel, arguments(), placements=["middle"])


def test_nothing_is_left_behind(compiler: Compiler) -> None:
    def open_things() -> tuple[int, int, list[str]]:
        with open("/proc/self/maps") as lines:
            mapped = sum("/dev/zero" in line for line in lines)
        return len(os.listdir("/proc/self/fd")), mapped, children(os.getpid())

    kernel = kernel_of(compiler, touch(3, 4096, False), ("a.data",))
    before = open_things()
    for _ in range(3):
        run_guarded(kernel, arguments())
    assert open_things() == before
