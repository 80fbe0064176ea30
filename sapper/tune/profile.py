"""How often each block of a kernel runs in one call, and how long the call takes.

Enters: a kernel and the arguments of a call. Leaves: a `Profile`. Holds: the call is first run in a child process
between guard pages, so that a kernel that crashes ends nothing; blocks are counted in a copy of the code, and what is
timed is the code as it is, on one thread.

A counter is one 64-bit word behind the code, and counting saves what it uses: neither registers nor flags change.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..codegen.compile import rules_of
from ..codegen.encode import encode
from ..codegen.listing import Listing, at
from ..codegen.liveness import blocks_of
from ..codegen.machine import Immediate, Instruction, Label, MachineFunction, Memory
from ..codegen.pipeline import Compiled
from ..runtime import system
from ..runtime.compiled import CompiledKernel
from ..runtime.entries import ALONE, Entry
from ..runtime.guarded import run_compiled_guarded
from ..runtime.launch import compile_for_call, launcher_with
from ..runtime.loader import KERNEL_PROTOTYPE, load
from ..runtime.specialise import specialise
from ..targets.x86_64.registers import RAX, RDI
from .measure import Timing, measure

_COUNTS = "sapper.counts"
_CHAIN = 64
_MULTIPLY_CYCLES = 3
"""Latency of a 64-bit imul on every x86-64 processor since 2008 (A. Fog, "Instruction tables")."""
TIME_LIMIT_S = 60.0
_RETURN = b"\xc3"


class NotProfiled(Exception):
    """The call can't be run: the message says why."""


@dataclass(slots=True)
class Profile:
    """One call on one thread. block_counts: how often each block ran. cycles_per_s: of this processor's clock, now.

    call_s: what calling code that does nothing takes in the same way, which `timing` contains. dims: extents of the
    call. static: those compiled in. compiled: what ran.
    """

    compiled: Compiled
    block_counts: list[int]
    timing: Timing
    call_s: float
    cycles_per_s: float
    dims: dict[str, int]
    static: dict[str, int]


class _Code:
    """Code and its counters side by side, as an `Entry` takes it."""

    def __init__(self, code: bytes, count: int) -> None:
        self.code_bytes = system.round_up(len(code), system.PAGE_BYTES)
        self.size_bytes = self.code_bytes + system.round_up(8 * count, system.PAGE_BYTES)
        self.address = system.map_memory(self.size_bytes, system.PROT_READ | system.PROT_WRITE)
        ctypes.memmove(self.address, code, len(code))
        system.protect_memory(self.address, self.code_bytes, system.PROT_READ | system.PROT_EXEC)
        self.function = KERNEL_PROTOTYPE(self.address)
        self.counts = (ctypes.c_uint64 * count).from_address(self.address + self.code_bytes)

    def close(self) -> None:
        system.unmap_memory(self.address, self.size_bytes)


def counting(function: MachineFunction, abi: Any) -> tuple[MachineFunction, int]:
    """The function with a counter at the start of each block, and how many blocks there are."""
    starts, _ = blocks_of(function.body, abi)
    first = {start: number for number, start in enumerate(starts[:-1])}
    body: list[Instruction | Label] = []
    waiting: int | None = None
    for place, item in enumerate(function.body):
        waiting = first.get(place, waiting)
        if isinstance(item, Instruction) and waiting is not None:
            emit = Listing()
            counter = Memory(label=_COUNTS, disp=8 * waiting)
            emit("push", RAX)
            emit("mov.64", RAX, counter)
            emit("lea.64", RAX, at(RAX, 1))
            emit("mov.64", counter, RAX)
            emit("pop", RAX)
            body += emit.body
            waiting = None
        body.append(item)
    made = MachineFunction(function.name, body, function.constants, function.frame_bytes, frozenset({_COUNTS}))
    return made, len(starts) - 1


def _load_counting(function: MachineFunction, abi: Any) -> _Code:
    counted, blocks = counting(function, abi)
    encoded = encode(counted)
    code = bytearray(encoded.code)
    distance = system.round_up(len(code), system.PAGE_BYTES)
    for offset, _, addend in encoded.relocations:
        code[offset:offset + 4] = struct.pack("<i", distance + addend - offset)
    return _Code(bytes(code), blocks)


def profile(
    kernel: Any, arguments: Mapping[str, Any], target: Any, static: Mapping[str, int] | None = None,
    schedule: Any = None,
) -> Profile:
    """Compile a kernel for these arguments, count and time it.

    static: dimensions whose extents are compiled in. Raises NotProfiled where the guarded run fails; ArgumentError.
    """
    launcher = launcher_with(kernel, {"threads": 1, "static": sorted(static or {}), "schedule": schedule})
    signature = launcher.signature
    binding = signature.bind(tuple([arguments[p.name] for p in signature.parameters]))
    wanted = specialise(signature, binding, launcher.static_for(binding.dims))
    compiled = compile_for_call(
        kernel, static_dims=dict(wanted.static_dims), unit_strides=dict(wanted.unit_strides),
        dim_classes=dict(wanted.dim_classes), target=target, schedule=schedule, aligned=frozenset(wanted.aligned))
    packed = CompiledKernel.of(kernel.name, compiled)
    signature.check_stores(binding, packed.stored)
    signature.check_requires(binding, packed.requires)
    crash = next((run.crash for run in run_compiled_guarded(signature, packed, binding, time_limit_s=TIME_LIMIT_S)
                  if run.crash is not None), None)
    if crash is not None:
        raise NotProfiled(f"the call fails between guard pages: {crash}")
    code = _load_counting(compiled.made.machine, rules_of(target).register_file(target))
    try:
        _run_of(Entry(signature, packed, code, binding, ALONE), binding)()  # type: ignore[arg-type]
        counts = list(code.counts)
    finally:
        code.close()
    run = _run_of(Entry(signature, packed, load(compiled.code), binding, ALONE), binding)
    nothing = _run_of(Entry(signature, packed, load(_RETURN), binding, ALONE), binding)
    timings = measure({"kernel": run, "nothing": nothing})
    return Profile(compiled, counts, timings["kernel"], timings["nothing"].low_s, cycles_per_second(),
                   dict(binding.dims), dict(wanted.static_dims))


def _run_of(entry: Entry, binding: Any) -> Any:
    """A closure that runs an entry on the bound arguments."""
    view, _, _, address = block = entry.block()
    for word, position in entry.data_words:
        view[word] = binding.tensors[position].address
    for word, position in entry.scalar_words:
        view[word] = binding.scalars[position]

    def run(kept: Any = block) -> None:
        entry.run(view, address)

    return run


def cycles_per_second() -> float:
    """The clock of this processor while it works: a chain of multiplications, whose latency is known."""
    emit = Listing()
    emit.label("again", 16)
    for _ in range(_CHAIN):
        emit("imul.64", RAX, RAX)
    emit("sub.64", RDI, Immediate(1))
    emit("jne", "again")
    emit("ret")
    code = load(encode(MachineFunction("sapper_clock", emit.body, {})).code)
    passes = 2000
    timing = measure({"clock": lambda: code.function(passes, 0, 0)}, budget_s=0.05)["clock"]
    return passes * _CHAIN * _MULTIPLY_CYCLES / timing.low_s
