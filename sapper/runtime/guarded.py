"""A compiled kernel run where it can crash: in a child process, with guard pages round every buffer.

Enters: compiled code and a checked call. Leaves: for each placement what the kernel wrote, or how it crashed.
Holds: the caller's arrays are never written, and the caller survives whatever the kernel does within the time limit.

    no access │ data, flush to the end ▏no access           one region for each tensor, and one for the scratch
    no access ▏data, flush to the start │ no access
    no access │ 8 bytes, data           │ no access          "apart": no vector of a tensor is aligned

The pages of tensors that the kernel doesn't store to are read-only. Bytes between the elements of a strided output are
compared afterwards. Scratch is filled with 0xFF (NaN as floats), so that nothing may rely on it being zero. A handler
in machine code notes signal, address and instruction; no Python runs in a crashed process.
Source: sigaction(2); Linux arch/x86 struct ucontext (gregs: error code 19, rip 16, from byte 40).
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import struct
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy

from . import system, workers
from .arguments import Binding, Signature, TensorView, fill_words
from .compiled import CompiledKernel
from .dtypes import numpy_dtype
from .loader import CodeBlock, load
from .scratch import SYNC_BYTES, stride_bytes
from .signals import held
from .system import MAP_SHARED, PAGE_BYTES, PROT_NONE, PROT_READ, PROT_WRITE, round_up

GUARD_BYTES = 1 << 20
PLACEMENTS = ("end", "start")
APART = "apart"
"""A third placement, for code that may ask more of addresses than calls promise: those of its elements' size."""
_APART_BYTES = 8
"""As many as the largest element has, and fewer than any instruction asks for that asks for more than its elements."""
_FAULTS = (signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGTRAP)
_CRASHED, _DONE = 77, 0
_DONE_OFFSET = 64
"""Where the report says how many calls have ended; what the handler notes comes first."""
_SA_SIGINFO, _SA_ONSTACK = 0x4, 0x0800_0000
_ALTERNATE_STACK_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class Crash:
    """How a run failed.

    kind: "signal", "time limit", "stray write" (between an output's elements), or "exit" (the child ended otherwise).
    signal: its name. access: "read", "write" or "". buffer: the tensor, "scratch", or "" when the address is near none.
    offset_bytes: of the fault from the buffer's first byte. code_offset: of the instruction in the kernel, or None.
    """

    kind: str
    message: str
    signal: str = ""
    access: str = ""
    buffer: str = ""
    offset_bytes: int = 0
    code_offset: int | None = None

    def __str__(self) -> str:
        return self.message


@dataclass(frozen=True, slots=True)
class GuardedRun:
    """placement: "end", "start" or "apart". outputs: stored tensors by name, C order, as the kernel left them; none
    after a crash."""

    placement: str
    outputs: dict[str, numpy.ndarray[Any, Any]] = field(default_factory=dict)
    crash: Crash | None = None


class _Region:
    """Shared memory with guards. address: of the first data byte. before: what a tensor's region held at first."""

    __slots__ = ("_mapped_bytes", "_start", "address", "before", "name", "size_bytes")

    def __init__(self, name: str, size_bytes: int, placement: str) -> None:
        self.name = name
        self.size_bytes = size_bytes
        self.before = b""
        past = _APART_BYTES if placement == APART else 0
        pages_bytes = round_up(size_bytes + past, PAGE_BYTES)
        self._mapped_bytes = 0
        self._start = system.map_memory(pages_bytes + 2 * GUARD_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED)
        self._mapped_bytes = pages_bytes + 2 * GUARD_BYTES
        first = self._start + GUARD_BYTES
        system.protect_memory(self._start, GUARD_BYTES, PROT_NONE)
        system.protect_memory(first + pages_bytes, GUARD_BYTES, PROT_NONE)
        self.address = first + pages_bytes - size_bytes if placement == "end" else first + past

    def make_read_only(self) -> None:
        if self.size_bytes:
            pages_bytes = self._mapped_bytes - 2 * GUARD_BYTES
            system.protect_memory(self._start + GUARD_BYTES, pages_bytes, PROT_READ)

    def close(self) -> None:
        if self._mapped_bytes:
            system.unmap_memory(self._start, self._mapped_bytes)
            self._mapped_bytes = 0

    def read(self) -> bytes:
        return ctypes.string_at(self.address, self.size_bytes)

    def covers(self, address: int) -> bool:
        return self._start <= address < self._start + self._mapped_bytes


def run_guarded(
    kernel: Any,
    arguments: Sequence[Any],
    options: Mapping[str, Any] | None = None,
    time_limit_s: float = 20.0,
    placements: Iterable[str] = PLACEMENTS,
) -> list[GuardedRun]:
    """Compile a kernel for these arguments, as a call would, and run it guarded. The arguments are left as they are.

    Raises ArgumentError like a call.
    """
    from .launch import launcher_with

    launcher = launcher_with(kernel, options)
    entry, _, binding = launcher.bind(tuple(arguments))
    return run_compiled_guarded(
        launcher.signature, entry.compiled, binding, entry.code, entry.threads, time_limit_s, placements
    )


def run_compiled_guarded(
    signature: Signature,
    compiled: CompiledKernel,
    binding: Binding,
    code: CodeBlock | None = None,
    threads: int = 1,
    time_limit_s: float = 20.0,
    placements: Iterable[str] = PLACEMENTS,
) -> list[GuardedRun]:
    """Run compiled code on a checked call, once for each placement of its buffers. One child runs them in turn; after a
    crash another runs the rest."""
    loaded = load(compiled.code) if code is None else code
    calls = [_GuardedCall(signature, compiled, binding, loaded, placement) for placement in placements]
    report = _Region("report", PAGE_BYTES, "end")
    try:
        for call in calls:
            call.lay_out(report)
        runs: list[GuardedRun] = []
        while len(runs) < len(calls):
            rest = calls[len(runs):]
            crashes = _run_child(rest, report, threads, time_limit_s)
            runs += [call.outcome(crash) for call, crash in zip(rest, crashes, strict=False)]
        return runs
    finally:
        for region in (report, *(region for call in calls for region in call.regions)):
            region.close()


class _GuardedCall:
    """One placement: regions, argument block, running them, and reading the outcome."""

    def __init__(
        self, signature: Signature, compiled: CompiledKernel, binding: Binding, code: CodeBlock, placement: str
    ) -> None:
        if placement not in (*PLACEMENTS, APART):
            raise ValueError(f"placement: found {placement!r}; expected one of {', '.join((*PLACEMENTS, APART))}")
        self.signature = signature
        self.compiled = compiled
        self.binding = binding
        self.code = code
        self.placement = placement
        self.regions: list[_Region] = []
        self.tensor_regions: dict[int, _Region] = {}

    def outcome(self, crash: Crash | None) -> GuardedRun:
        crash = crash or self._stray_write()
        outputs = {} if crash is not None else self._outputs()
        return GuardedRun(self.placement, outputs, crash)

    def _region(self, name: str, size_bytes: int, aligned: bool = False) -> _Region:
        region = _Region(name, size_bytes, "start" if aligned and self.placement == APART else self.placement)
        self.regions.append(region)
        return region

    def lay_out(self, report: _Region) -> None:
        self.report = report
        parameters = self.signature.parameters
        shared: dict[tuple[int, tuple[int, ...], tuple[int, ...]], _Region] = {}
        stored_places = {self._place(self.binding.tensors[self.signature.positions[n]]) for n in self.compiled.stored}
        for position, view in self.binding.tensors.items():
            place = self._place(view)
            region = shared.get(place)
            if region is None:
                low, high = view.extent
                region = self._region(parameters[position].name, high - low)
                ctypes.memmove(region.address, view.address + low, high - low)
                region.before = region.read()
                if place in stored_places:
                    shared[place] = region  # in place: an output and the very same tensor as an input
                else:
                    region.make_read_only()
            self.tensor_regions[position] = region
        self.sync = self._region("sync block", max(SYNC_BYTES, 64), aligned=True)
        scratch_bytes = round_up(self.compiled.scratch_for(self.binding.dims), 64)
        self.scratch = self._region("scratch", scratch_bytes, aligned=True)
        ctypes.memset(self.scratch.address, 0xFF, scratch_bytes)
        words = [self.scratch.address, scratch_bytes, self.sync.address]
        words += fill_words(self.signature, self.compiled.slots, self.binding, self._data_address)
        self.block = (ctypes.c_int64 * len(words))(*words)

    @staticmethod
    def _place(view: TensorView) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
        return view.address, view.shape, view.strides

    def _data_address(self, position: int) -> int:
        low, _ = self.binding.tensors[position].extent
        return self.tensor_regions[position].address - low

    def run(self, threads: int) -> None:
        """In the child."""
        if threads > 1:
            view = memoryview(self.block).cast("B").cast("q")
            step_bytes = stride_bytes(self.compiled.scratch_for(self.binding.dims))
            workers.launch(self.code.address, view, ctypes.addressof(self.block), threads, step_bytes)
        else:
            self.code.function(ctypes.addressof(self.block), 0, 1)

    def crash(self) -> Crash:
        """What the handler noted."""
        number, address, instruction, error = struct.unpack("<qQQQ", ctypes.string_at(self.report.address, 32))
        name = _signal_name(number)
        offset = instruction - self.code.address
        code_offset = offset if 0 <= offset < self.code.size_bytes else None
        where = f"at offset {code_offset:#x} of the code" if code_offset is not None else f"at {instruction:#x}"
        if number not in (signal.SIGSEGV, signal.SIGBUS):
            return Crash("signal", f"{name} {where}", name, code_offset=code_offset)
        access = "write" if error & 2 else "read"
        for region in (*self.regions, self.report):
            if region.covers(address):
                offset_bytes = address - region.address
                if offset_bytes < 0:
                    place = f"{-offset_bytes} bytes before the start of"
                elif offset_bytes >= region.size_bytes:
                    place = f"{offset_bytes - region.size_bytes} bytes past the end of"
                else:
                    place = f"at byte {offset_bytes} of the read-only"
                message = f"{name} {where}: {access} {place} `{region.name}` ({region.size_bytes} bytes)"
                return Crash("signal", message, name, access, region.name, offset_bytes, code_offset)
        message = f"{name} {where}: {access} at address {address:#x}, which is near no buffer"
        return Crash("signal", message, name, access, code_offset=code_offset)

    # ---- the outcome

    def _array(self, position: int, memory: Any) -> numpy.ndarray[Any, Any]:
        view = self.binding.tensors[position]
        low, _ = view.extent
        steps = tuple(stride * view.dtype.size_bytes for stride in view.strides)
        return numpy.ndarray(view.shape, numpy_dtype(view.dtype), memory, -low, steps)

    def _outputs(self) -> dict[str, numpy.ndarray[Any, Any]]:
        outputs = {}
        for name in self.compiled.stored:
            position = self.signature.positions[name]
            outputs[name] = numpy.array(self._array(position, self.tensor_regions[position].read()), order="C")
        return outputs

    def _stray_write(self) -> Crash | None:
        """A change of a byte between an output's elements."""
        for name in self.compiled.stored:
            position = self.signature.positions[name]
            view = self.binding.tensors[position]
            if view.is_contiguous:
                continue
            region = self.tensor_regions[position]
            before, after = bytearray(region.before), bytearray(region.read())
            for memory in (before, after):
                self._array(position, memory).view(f"V{view.dtype.size_bytes}")[...] = b"\0" * view.dtype.size_bytes
            if before != after:
                offset = next(i for i, (b, a) in enumerate(zip(before, after, strict=True)) if b != a)
                message = f"a write at byte {offset} of `{name}`, between its elements (strides {view.strides})"
                return Crash("stray write", message, "", "write", name, offset)
        return None


# --------------------------------------------------------------------------------------------------------- the child


def _run_child(calls: Sequence[_GuardedCall], report: _Region, threads: int, time_limit_s: float) -> list[Crash | None]:
    """Run calls in turn in one child. How each went, up to the first that crashed: the others have not run."""
    handler = load(_handler_code(report.address))
    done = ctypes.c_int64.from_address(report.address + _DONE_OFFSET)
    done.value = 0
    child, ended, status = 0, False, 0
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of fork beside threads: the child runs no others
            with held():
                child = os.fork()
                if child == 0:
                    _be_child(calls, done, handler, threads)
        ended, before = _ends_within(child, time_limit_s), 0
        while not ended and done.value > before:  # each has its own time
            before = done.value
            ended = _ends_within(child, time_limit_s)
    finally:  # a Ctrl-C that was held comes before the wait begins
        if child:
            if not ended:
                os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
    if ended and status == _DONE and done.value == len(calls):
        return [None] * len(calls)
    failed = min(done.value, len(calls) - 1)
    if not ended:
        crash = Crash("time limit", f"still running after {time_limit_s:g} s")
    elif os.WIFEXITED(status) and os.WEXITSTATUS(status) == _CRASHED:
        crash = calls[failed].crash()
    else:
        how = f"signal {_signal_name(os.WTERMSIG(status))}" if os.WIFSIGNALED(status) else f"status {status >> 8}"
        crash = Crash("exit", f"the child process ended with {how}")
    return [*[None] * failed, crash]


def _be_child(calls: Sequence[_GuardedCall], done: ctypes.c_int64, handler: CodeBlock, threads: int) -> None:
    """Runs in the child, and never returns. done: how many calls have ended."""
    status = _CRASHED + 1
    try:
        system.end_with_parent()
        _install_handler(handler.address)
        for call in calls:
            call.run(threads)
            done.value += 1
        status = _DONE
    finally:
        os._exit(status)


# --------------------------------------------------------------------------------------------------- system plumbing


def _handler_code(report: int) -> bytes:
    """handler(number, siginfo, ucontext): write number, address, rip and error code to the report and leave."""
    from ..codegen.encode import encode
    from ..codegen.machine import Immediate, Instruction, MachineFunction, Memory, Register
    from ..targets.x86_64.instructions import ROWS
    from ..targets.x86_64.registers import RAX, RCX, RDI, RDX, RSI

    def gpr(number: int) -> Register:
        return Register("gpr", number)

    body: list[Any] = [Instruction(ROWS["mov.64"], [gpr(RAX), Immediate(report)])]
    body.append(Instruction(ROWS["mov.64"], [Memory(gpr(RAX)), gpr(RDI)]))
    for offset, base, source in ((8, RSI, 16), (16, RDX, 40 + 8 * 16), (24, RDX, 40 + 8 * 19)):
        body.append(Instruction(ROWS["mov.64"], [gpr(RCX), Memory(gpr(base), disp=source)]))
        body.append(Instruction(ROWS["mov.64"], [Memory(gpr(RAX), disp=offset), gpr(RCX)]))
    body.append(Instruction(ROWS["mov.32"], [gpr(RDI), Immediate(_CRASHED)]))
    body.append(Instruction(ROWS["mov.32"], [gpr(RAX), Immediate(231)]))  # exit_group
    body.append(Instruction(ROWS["syscall"], []))
    return encode(MachineFunction("crash_handler", body, {})).code


def _install_handler(address: int) -> None:
    """Let the handler take every fault, on a stack of its own, as the kernel's may have run out."""
    library = ctypes.CDLL(None)
    stack = system.map_memory(_ALTERNATE_STACK_BYTES, PROT_READ | PROT_WRITE)
    library.sigaltstack(struct.pack("<QiiQ", stack, 0, 0, _ALTERNATE_STACK_BYTES), None)
    # struct sigaction of glibc and musl on x86-64: handler, mask of 128 bytes, flags, restorer
    action = struct.pack("<Q128xiiQ", address, _SA_SIGINFO | _SA_ONSTACK, 0, 0)
    for number in _FAULTS:
        if library.sigaction(int(number), action, None):
            os._exit(_CRASHED + 2)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _FAULTS)


def _ends_within(child: int, time_limit_s: float) -> bool:
    """Whether the child ends in time. It is left to be waited for."""
    deadline = time.monotonic() + time_limit_s
    try:
        descriptor = os.pidfd_open(child)
    except OSError:  # a system without pidfd: look now and then
        while time.monotonic() < deadline:
            if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
                return True
            time.sleep(0.001)
        return False
    try:
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        return bool(poll.poll(max(0.0, deadline - time.monotonic()) * 1000))
    finally:
        os.close(descriptor)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
