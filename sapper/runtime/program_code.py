"""The machine code that runs a program: one function, which every worker enters once for each run.

    void program(int64_t *control, int64_t worker, int64_t workers)

It has a kernel's signature, so the worker pool launches it like a kernel. It walks a table of launches, which ends with
a kernel address of 0, and meets the other workers at a barrier after those that ask for it. Memory, by offsets in bytes
(`control` and the sync blocks are 64-byte aligned):

    control   0, 8, 16  for the launcher    24 table    32 sync blocks    40 their number    48 counters used in each
              56 i32 cycles to spin before sleeping
              64 i32 workers that have arrived
              128 i32 generation    132 i32 workers that may sleep on it
              136 where a profile keeps times    144 bytes of it for each worker
    launch    0 kernel    8 its argument block    16 i32 flags
              20 i32 bytes from here to the launch whose stream is asked for after this one, or 0
              its own stream (streams.py): 24 i32 where in the argument block its address is
              28 i32 granules    32 i32 bytes of a granule

Worker 0 sets the task counters of a launch that it runs alone to zero behind it, as the next such launch has the same
sync block. The last worker to arrive at a barrier does so for the other sync blocks, for the launches to come, then
adds one to the generation, which lets the others go: they see the counters reset, as stores become visible in order.
The others spin on the generation, then sleep on it. A sleeper counts itself with a locked instruction before the system
compares the generation; the last worker passes a locked instruction between the new generation and the look at that
count: one of the two sees the other, so no wake-up is lost.

While it spins, a worker asks for what it will read first of the next stream of weights, ASKED_BYTES of it at most:
memory is then busy while others still work, and in the short kernels before that stream. Which part that is follows
from how a range is shared among tasks (lane/tasks.py) and from its number, which is that of its first task.

A second form of the function (`profiled`) also keeps the time stamp counter, at 64 bits: before each launch, after it,
and, last, at the end.

Source: futex(2); System V ABI AMD64 3.2; Intel SDM volume 3, 9.2.3 (memory ordering).
"""

from __future__ import annotations

from ..codegen.encode import encode
from ..codegen.listing import Listing, at
from ..codegen.machine import Immediate, MachineFunction
from ..targets.x86_64.registers import R8, R9, R10, R11, R12, R13, R14, R15, RAX, RBP, RBX, RCX, RDI, RDX, RSI, RSP
from ..tile.schedule import TASKS_PER_WORKER
from .buffers import LINE_BYTES
from .program import (
    AHEAD,
    ALONE,
    ARRIVED,
    BARRIER,
    BLOCK,
    COUNTERS,
    FLAGS,
    GENERATION,
    GRANULE_BYTES,
    GRANULES,
    LAUNCH_BYTES,
    OWN_SYNC,
    SLEEPERS,
    SPIN_CYCLES,
    STREAM_WORD,
    SYNC,
    SYNC_COUNT,
    TABLE,
    TIMES,
    TIMES_BYTES,
)  # fmt: skip
from .scratch import COUNTER_LINE_BYTES, SYNC_BYTES
from .workers_code import FUTEX_WAIT, FUTEX_WAKE, enter, futex, leave, spin_again

_ALL = 0x7FFFFFFF
ASKED_BYTES = 256 << 10
"""A part of the second cache, which the kernels before the stream need too."""
ASKED_AT_ONCE = 4
"""Lines that a worker asks for between two looks at the generation."""


def program_function(profiled: bool = False) -> MachineFunction:
    """rbx control, r12 worker, r13 workers, rbp the launch in the table, [rsp] where a profile's next time goes."""
    emit = Listing()
    emit.label("program", 64)
    enter(emit)
    emit("mov.64", RBX, RDI)
    emit("mov.64", R12, RSI)
    emit("mov.64", R13, RDX)
    emit("mov.64", RBP, at(RBX, TABLE))
    if profiled:
        emit("mov.64", RAX, at(RBX, TIMES_BYTES))
        emit("imul.64", RAX, R12)
        emit("add.64", RAX, at(RBX, TIMES))
        emit("mov.64", at(RSP), RAX)
    emit.label("next")
    if profiled:
        _keep_time(emit)
    emit("mov.64", RAX, at(RBP))
    emit("test.64", RAX, RAX)
    emit("je", "done")
    emit("mov.64", RDI, at(RBP, 8))
    emit("mov.64", RSI, R12)
    emit("mov.64", RDX, R13)
    emit("mov.32", RCX, at(RBP, FLAGS))
    emit("test.32", RCX, Immediate(ALONE))
    emit("je", "run")
    emit("test.64", R12, R12)
    emit("jne", "ran")
    emit("mov.32", RDX, Immediate(1))
    emit("call.indirect", RAX)
    emit("mov.64", R9, at(RBP, BLOCK))
    emit("mov.64", R9, at(R9, OWN_SYNC))
    _reset_counters(emit, "own")
    emit("jmp", "ran")
    emit.label("run")
    emit("call.indirect", RAX)
    emit.label("ran")
    if profiled:
        _keep_time(emit)
    emit("mov.32", RCX, at(RBP, FLAGS))
    emit("add.64", RBP, Immediate(LAUNCH_BYTES))
    emit("test.32", RCX, Immediate(BARRIER))
    emit("je", "next")
    _barrier(emit)
    emit("jmp", "next")
    emit.label("done")
    leave(emit)
    return MachineFunction("sapper_program", emit.body, {})


def _keep_time(emit: Listing) -> None:
    emit("mov.64", RCX, at(RSP))
    emit("rdtsc")
    emit("shl.imm.64", RDX, Immediate(32))
    emit("or.64", RAX, RDX)
    emit("mov.64", at(RCX), RAX)
    emit("add.64", at(RSP), Immediate(8))


def _reset_counters(emit: Listing, name: str) -> None:
    """Of the sync block at r9: to zero. Destroys rdx, r9; leaves 0 in rax."""
    emit("xor.32", RAX, RAX)
    emit("mov.64", RDX, at(RBX, COUNTERS))
    emit("test.64", RDX, RDX)
    emit("je", f"reset_{name}_done")
    emit.label(f"reset_{name}_counter")
    emit("mov.64", at(R9), RAX)
    emit("add.64", R9, Immediate(COUNTER_LINE_BYTES))
    emit("sub.64", RDX, Immediate(1))
    emit("jne", f"reset_{name}_counter")
    emit.label(f"reset_{name}_done")


def _barrier(emit: Listing) -> None:
    emit("mov.32", R15, at(RBX, GENERATION))
    emit("mov.32", RAX, Immediate(1))
    emit("lock.xadd.32", at(RBX, ARRIVED), RAX)
    emit("add.32", RAX, Immediate(1))
    emit("cmp.32", RAX, R13)
    emit("jne", "wait")

    emit("mov.64", R8, at(RBX, SYNC))
    emit("mov.64", RCX, at(RBX, SYNC_COUNT))
    emit.label("reset_block")
    emit("mov.64", R9, R8)
    _reset_counters(emit, "block")
    emit("add.64", R8, Immediate(SYNC_BYTES))
    emit("sub.64", RCX, Immediate(1))
    emit("jne", "reset_block")

    emit("mov.32", at(RBX, ARRIVED), RAX)
    emit("cmp.64", R13, Immediate(1))
    emit("je", "passed")
    emit("mov.32", RAX, Immediate(1))
    emit("lock.xadd.32", at(RBX, GENERATION), RAX)
    emit("cmp.32", at(RBX, SLEEPERS), Immediate(0))
    emit("je", "passed")
    emit("lea.64", RDI, at(RBX, GENERATION))
    emit("mov.32", RDX, Immediate(_ALL))
    futex(emit, FUTEX_WAKE)
    emit("jmp", "passed")

    emit.label("wait")
    find_stream(emit)
    emit("rdtsc")
    emit("mov.32", R14, RAX)
    emit.label("spin")
    emit("cmp.32", R15, at(RBX, GENERATION))
    emit("jne", "passed")
    emit("cmp.64", R8, R9)
    emit("jae", "asked")
    for line in range(ASKED_AT_ONCE):
        emit("prefetcht1", at(R8, LINE_BYTES * line))
    emit("add.64", R8, Immediate(LINE_BYTES * ASKED_AT_ONCE))
    emit("jmp", "spin")
    emit.label("asked")
    spin_again(emit, "spin", at(RBX, SPIN_CYCLES))
    emit("mov.32", RAX, Immediate(1))
    emit("lock.xadd.32", at(RBX, SLEEPERS), RAX)
    emit.label("sleep")
    emit("cmp.32", R15, at(RBX, GENERATION))
    emit("jne", "awake")
    emit("lea.64", RDI, at(RBX, GENERATION))
    emit("mov.32", RDX, R15)
    futex(emit, FUTEX_WAIT)
    emit("jmp", "sleep")
    emit.label("awake")
    emit("mov.32", RAX, Immediate(-1))
    emit("lock.xadd.32", at(RBX, SLEEPERS), RAX)
    emit.label("passed")


def find_stream(emit: Listing) -> None:
    """r8 ... r9: what this worker's first task reads of the next stream; empty where there is none. rbp is the launch
    behind the one that is done. Destroys rax, rcx, rdx, r10, r11."""
    emit("xor.32", R8, R8)
    emit("xor.32", R9, R9)
    emit("lea.64", R10, at(RBP, -LAUNCH_BYTES))
    emit("movsxd", RAX, at(R10, AHEAD))
    emit("test.64", RAX, RAX)
    emit("je", "found")
    emit("add.64", R10, RAX)
    emit("movsxd", RAX, at(R10, GRANULES))
    emit("imul.imm.64", RCX, R13, Immediate(TASKS_PER_WORKER))
    emit("cmp.64", RAX, RCX)
    emit("cmovl.64", RCX, RAX)  # tasks
    emit("cmp.64", R12, RCX)
    emit("jge", "found")
    emit("xor.32", RDX, RDX)
    emit("div.64", RCX)  # granules of each task, and how many tasks have one more
    emit("mov.64", R8, RDX)
    emit("cmp.64", R12, RDX)
    emit("cmovl.64", R8, R12)
    emit("mov.64", R11, R12)
    emit("imul.64", R11, RAX)
    emit("add.64", R8, R11)  # granules before its own
    emit("lea.64", RCX, at(RAX, 1))
    emit("cmp.64", R12, RDX)
    emit("cmovl.64", RAX, RCX)
    emit("movsxd", RCX, at(R10, GRANULE_BYTES))
    emit("imul.64", R8, RCX)
    emit("imul.64", RAX, RCX)
    emit("mov.64", RCX, Immediate(ASKED_BYTES))
    emit("cmp.64", RCX, RAX)
    emit("cmovl.64", RAX, RCX)
    emit("movsxd", RCX, at(R10, STREAM_WORD))
    emit("mov.64", RDX, at(R10, BLOCK))
    emit("add.64", R8, at(RDX, 0, RCX))
    emit("lea.64", R9, at(R8, 0, RAX))
    emit.label("found")


def program_code(profiled: bool = False) -> bytes:
    return encode(program_function(profiled)).code
