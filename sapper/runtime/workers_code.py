"""The machine code in which workers wait and which starts them: three functions, built with our own encoder.

    uint32 clock(void)                                            low half of the time stamp counter
    void work(control, index, mailbox, generation)                a worker's whole life; returns when told to stop
    void launch(control, kernel, args, workers, least, hold)      run a kernel on workers; the caller is worker 0

Memory that they share, `control` (64-byte aligned; offsets in bytes):

    0    kernel to run, 0 to stop     8  args     16  workers of this launch     24  i32 cycles to spin before sleeping
    28   i32 the same for the launcher
    64   i32 pending: other workers still in the kernel               68  i32 the launcher sleeps on `pending`
    128  i32 the CPU that workers keep off    132  i32 the launcher's CPU now    136  number of workers to place, or 0
    144  the CPUs that workers may use, a bit each, 1024 bits
    272  those that the launcher may use between launches             400  bytes of these, 0 outside a launch
    408  a set of CPUs in the making, else 0    536  i32 the clock when the last launch ended
    540  i32 the clock when the first of a series of launches began
    576 + 64 * index, the mailbox of a worker:   +0  i32 generation    +4  i32 the worker sleeps on `generation`
         +8  i32 its thread, as the system numbers it    +12  i32 the clock when its work began
         +16  i32 cycles that it spins now before it sleeps    +20  i32 the last generation that somebody took

Who is asked. Of short work a part is worth nothing if its worker sleeps: waking it takes longer. So `launch` asks those
that are awake, in their order up to the first that sleeps, but `least` at the least. In a series of launches, none of
which begins later after another than workers spin, they would be awake by now; once it has gone on for as long as they
spin, all are asked, who sleeps is woken, and stays awake for as long as it goes on.

Protocol. `launch` writes the order (0 to 64), then adds one to the generation of each worker it wants, the last first,
then wakes workers 1 and 2 if they sleep; a worker i that starts wakes 2i+1 and 2i+2, so waking takes logarithmic time.
Whoever sees its generation changed sees the order and the generations of all workers after it, since stores become
visible in order (x86 total store order). A worker that is done subtracts one from `pending`; the last wakes the
launcher.

Standing in. A worker that sees generation g takes it: `taken` goes from g - 1 to g, atomically, or else it waits for
the next. A launcher that is done with its own share takes what nobody has, and runs the kernel as that worker: so a
launch does not wait for who is still asleep, or for whose CPU another process has. Outside launches `taken` is the
generation, and whoever took one is pending until it is done, so the order is that of the generation taken. A launcher
takes one at a time and runs it at once; a worker may wait in a kernel for one that nobody has taken, as its own thread
will.

A sleeper sets its flag with `xchg` (a full barrier) before the system compares the word that it waits on; a waker
writes the word, passes a full barrier, then reads the flag: one of the two sees the other, so no wake-up is lost. A
wake-up too many, a signal or a stale flag only makes a sleeper look again. Waiting spins on its own cache line for
`cycles to spin` first, and after long work for a part of the time that it took (IDLE_SHIFT): launches one after the
other meet workers that are awake, and an idle process is quiet. Of work of 2^32 cycles and more only the rest counts.

Placing. A scheduler likes to put a thread that is woken on the CPU of the one that wakes it, and some (those of virtual
machines that pack their threads) leave it there for ten milliseconds: the launch then runs on one CPU. So `launch`,
when its CPU is another than the last time, takes that CPU from those that the workers may use; and where it is told
to `hold` the launching thread, keeps it on its CPU until the launch ends, as the same schedulers pull that one to a
worker's. That takes 5 us.

Source: futex(2), getcpu(2), sched_setaffinity(2); System V ABI AMD64 3.2; Intel SDM volume 3, 9.2.3.
"""

from __future__ import annotations

from ..codegen.encode import encode
from ..codegen.listing import Listing, at
from ..codegen.machine import Immediate, MachineFunction, Memory, Register
from ..targets.x86_64.registers import R8, R9, R10, R12, R13, R14, R15, RAX, RBP, RBX, RCX, RDI, RDX, RSI, RSP
from .workers import (
    ALLOWED,
    ALLOWED_BYTES,
    ARGUMENTS,
    BEGAN,
    CALLER_CPU,
    COUNTERS,
    ENDED,
    GENERATION,
    IDLE_SHIFT,
    JOIN_CYCLES,
    KEPT_OFF,
    KERNEL,
    LAUNCHER_SLEEPS,
    MAILBOX_BYTES,
    MAILBOXES,
    OWN,
    PENDING,
    PLACED,
    SAVED,
    SAVED_BYTES,
    SLEEPS,
    SPIN_CYCLES,
    SPINS,
    STARTED,
    TAKEN,
    THREAD,
    WORKERS,
)  # fmt: skip

_SYS_FUTEX, _SYS_SCHED_SETAFFINITY, _SYS_SCHED_GETAFFINITY, _SYS_GETCPU = 202, 203, 204, 309
FUTEX_WAIT, FUTEX_WAKE = 128, 129  # FUTEX_WAIT and FUTEX_WAKE with FUTEX_PRIVATE_FLAG
_SAVED = (RBX, RBP, R12, R13, R14, R15)


def enter(emit: Listing) -> None:
    """Save the callee-saved registers and leave rsp a multiple of 16, as a call wants it."""
    for register in _SAVED:
        emit("push", register)
    emit("sub.64", RSP, Immediate(8))


def leave(emit: Listing) -> None:
    emit("add.64", RSP, Immediate(8))
    for register in reversed(_SAVED):
        emit("pop", register)
    emit("ret")


def futex(emit: Listing, operation: int) -> None:
    """futex(rdi, operation, edx, no time limit); destroys rax, rcx, r11, rsi, r10."""
    emit("mov.32", RSI, Immediate(operation))
    emit("xor.32", R10, R10)
    emit("mov.32", RAX, Immediate(_SYS_FUTEX))
    emit("syscall")


def _mailbox(emit: Listing, destination: int, index: int) -> None:
    emit("imul.imm.64", destination, index, Immediate(MAILBOX_BYTES))
    emit("lea.64", destination, at(RBX, MAILBOXES, destination))


def spin_again(emit: Listing, label: str, spin_cycles: Memory) -> None:
    """Back to the label while fewer cycles have passed since the clock in r14d than are at spin_cycles.

    Destroys rax, rdx. Nobody yields its CPU meanwhile: workers have one each (placing), and a neighbour that got it
    would keep it for a slice, which is longer than what is waited for; who sleeps is let in at once when it is woken.
    """
    emit("pause")
    emit("rdtsc")
    emit("sub.32", RAX, R14)
    emit("cmp.32", RAX, spin_cycles)
    emit("jb", label)


def _work(emit: Listing) -> None:
    emit.label("work", 64)
    enter(emit)
    emit("mov.64", RBX, RDI)  # control
    emit("mov.64", R12, RSI)  # index
    emit("mov.64", RBP, RDX)  # mailbox
    emit("mov.32", R13, RCX)  # generation seen last
    emit("rdtsc")
    emit("mov.32", at(RBP, STARTED), RAX)
    emit.label("wait")
    emit("rdtsc")
    emit("mov.32", R14, RAX)
    emit("sub.32", RAX, at(RBP, STARTED))
    emit("shr.imm.32", RAX, Immediate(IDLE_SHIFT))
    emit("mov.32", RCX, at(RBX, JOIN_CYCLES))
    emit("cmp.32", RAX, RCX)
    emit("cmova.32", RAX, RCX)
    emit("mov.32", RCX, at(RBX, SPIN_CYCLES))
    emit("cmp.32", RAX, RCX)
    emit("cmovb.32", RAX, RCX)
    emit("test.32", RCX, RCX)  # none spins who was told not to
    emit("cmove.32", RAX, RCX)
    emit("mov.32", at(RBP, SPINS), RAX)
    emit.label("spin")
    emit("mov.32", RAX, at(RBP, GENERATION))
    emit("cmp.32", RAX, R13)
    emit("jne", "start")
    spin_again(emit, "spin", at(RBP, SPINS))
    emit.label("sleep")
    emit("mov.32", RAX, Immediate(1))
    emit("xchg.32", at(RBP, SLEEPS), RAX)
    emit("mov.64", RDI, RBP)
    emit("mov.32", RDX, R13)
    futex(emit, FUTEX_WAIT)
    emit("mov.32", at(RBP, SLEEPS), Immediate(0))
    emit("mov.32", RAX, at(RBP, GENERATION))
    emit("cmp.32", RAX, R13)
    emit("je", "sleep")
    emit.label("start")
    emit("mov.32", R13, RAX)
    emit("call", "wake")
    emit("rdtsc")
    emit("mov.32", at(RBP, STARTED), RAX)  # who comes too late has worked for no time
    emit("mov.64", RDI, RBP)
    emit("mov.32", RCX, R13)
    _take(emit)
    emit("jne", "wait")
    emit("mov.64", R14, at(RBX, KERNEL))
    emit("test.64", R14, R14)
    emit("je", "finish")
    emit("mov.64", RDI, at(RBX, ARGUMENTS))
    emit("mov.64", RSI, R12)
    emit("mov.64", RDX, at(RBX, WORKERS))
    emit("call.indirect", R14)
    emit.label("finish")
    emit("mov.32", RAX, Immediate(-1))
    emit("lock.xadd.32", at(RBX, PENDING), RAX)
    emit("cmp.32", RAX, Immediate(1))
    emit("jne", "finished")
    emit("cmp.32", at(RBX, LAUNCHER_SLEEPS), Immediate(0))
    emit("je", "finished")
    emit("lea.64", RDI, at(RBX, PENDING))
    emit("mov.32", RDX, Immediate(1))
    futex(emit, FUTEX_WAKE)
    emit.label("finished")
    emit("test.64", R14, R14)
    emit("jne", "wait")
    leave(emit)


def _take(emit: Listing) -> None:
    """Take generation ecx of the mailbox rdi; "not equal" if somebody has. Destroys rax."""
    emit("mov.32", RAX, RCX)
    emit("sub.32", RAX, Immediate(1))
    emit("lock.cmpxchg.32", at(RDI, TAKEN), RCX)


def _wake(emit: Listing) -> None:
    """Wake the workers 2 * r12 + 1 and 2 * r12 + 2 where they are wanted and sleep; keeps rbx, rbp, r12, r13."""
    emit.label("wake", 16)
    emit("lea.64", R15, Memory(Register("gpr", R12), Register("gpr", R12), 1, 1))
    emit("mov.32", R14, Immediate(2))
    emit.label("wake_next")
    emit("cmp.64", R15, at(RBX, WORKERS))
    emit("jae", "woken")
    _mailbox(emit, RDI, R15)
    emit("cmp.32", at(RDI, SLEEPS), Immediate(0))
    emit("je", "awake")
    emit("mov.32", RDX, Immediate(1))
    futex(emit, FUTEX_WAKE)
    emit.label("awake")
    emit("add.64", R15, Immediate(1))
    emit("sub.32", R14, Immediate(1))
    emit("jne", "wake_next")
    emit.label("woken")
    emit("ret")


def _launch(emit: Listing) -> None:
    emit.label("launch", 64)
    enter(emit)
    emit("mov.64", RBX, RDI)
    emit("mov.64", at(RBX, KERNEL), RSI)
    emit("mov.64", at(RBX, ARGUMENTS), RDX)
    emit("mov.64", RBP, RSI)
    emit("mov.64", R13, RDX)
    _choose(emit)
    emit("mov.64", at(RBX, WORKERS), RCX)
    _place(emit)
    emit("test.64", RBP, RBP)
    emit("je", "post")
    emit("mov.64", R8, at(R13, 16))  # the sync block: task counters start at zero
    emit("xor.32", RAX, RAX)
    for counter in range(COUNTERS):
        emit("mov.64", at(R8, 64 * counter), RAX)
    emit.label("post")
    emit("mov.64", RCX, at(RBX, WORKERS))
    emit("sub.64", RCX, Immediate(1))
    emit("mov.32", at(RBX, PENDING), RCX)
    emit("je", "posted")
    emit.label("post_next")
    _mailbox(emit, RDI, RCX)
    emit("add.32", at(RDI, GENERATION), Immediate(1))  # this thread alone writes it
    emit("sub.64", RCX, Immediate(1))
    emit("jne", "post_next")
    emit.label("posted")
    emit("xor.32", RAX, RAX)
    emit("xchg.32", at(RBX, LAUNCHER_SLEEPS), RAX)  # the barrier between generations written and flags read
    emit("xor.32", R12, R12)
    emit("call", "wake")
    emit("test.64", RBP, RBP)
    emit("je", "join")
    emit("mov.64", RDI, R13)
    emit("xor.32", RSI, RSI)
    emit("mov.64", RDX, at(RBX, WORKERS))
    emit("call.indirect", RBP)
    emit("mov.32", R12, Immediate(1))
    emit.label("stand_in")
    emit("cmp.64", R12, at(RBX, WORKERS))
    emit("jae", "join")
    _mailbox(emit, RDI, R12)
    emit("mov.32", RCX, at(RDI, GENERATION))
    _take(emit)
    emit("jne", "taken")
    emit("mov.64", RDI, R13)
    emit("mov.64", RSI, R12)
    emit("mov.64", RDX, at(RBX, WORKERS))
    emit("call.indirect", RBP)
    emit("lock.sub.32", at(RBX, PENDING), Immediate(1))
    emit.label("taken")
    emit("add.64", R12, Immediate(1))
    emit("jmp", "stand_in")
    emit.label("join")
    emit("rdtsc")
    emit("mov.32", R14, RAX)
    emit.label("join_spin")
    emit("cmp.32", at(RBX, PENDING), Immediate(0))
    emit("je", "joined")
    spin_again(emit, "join_spin", at(RBX, JOIN_CYCLES))
    emit("mov.32", RAX, Immediate(1))
    emit("xchg.32", at(RBX, LAUNCHER_SLEEPS), RAX)
    emit.label("join_sleep")
    emit("mov.32", RDX, at(RBX, PENDING))
    emit("test.32", RDX, RDX)
    emit("je", "joined")
    emit("lea.64", RDI, at(RBX, PENDING))
    futex(emit, FUTEX_WAIT)
    emit("jmp", "join_sleep")
    emit.label("joined")
    emit("mov.64", RSI, at(RBX, SAVED_BYTES))
    emit("test.64", RSI, RSI)
    emit("jle", "free")
    emit("xor.32", RDI, RDI)
    emit("lea.64", RDX, at(RBX, SAVED))
    emit("mov.32", RAX, Immediate(_SYS_SCHED_SETAFFINITY))
    emit("syscall")
    emit("mov.64", at(RBX, SAVED_BYTES), Immediate(0))
    emit.label("free")
    emit("rdtsc")
    emit("mov.32", at(RBX, ENDED), RAX)
    leave(emit)


def _choose(emit: Listing) -> None:
    """rcx: how many workers are asked, of rcx and at least r8. Destroys rax, rdx, rdi, r14."""
    emit("rdtsc")
    emit("mov.32", R14, RAX)
    emit("sub.32", RAX, at(RBX, ENDED))
    emit("cmp.32", RAX, at(RBX, SPIN_CYCLES))
    emit("jb", "goes_on")
    emit("mov.32", at(RBX, BEGAN), R14)
    emit.label("goes_on")
    emit("cmp.64", R8, RCX)
    emit("jae", "chosen")
    emit("sub.32", R14, at(RBX, BEGAN))
    emit("cmp.32", R14, at(RBX, SPIN_CYCLES))
    emit("ja", "chosen")
    emit("mov.32", RDX, Immediate(1))
    emit.label("choose_next")
    emit("cmp.64", RDX, RCX)
    emit("jae", "chosen")
    _mailbox(emit, RDI, RDX)
    emit("cmp.32", at(RDI, SLEEPS), Immediate(0))
    emit("jne", "asleep")
    emit("add.64", RDX, Immediate(1))
    emit("jmp", "choose_next")
    emit.label("asleep")
    emit("cmp.64", RDX, R8)
    emit("cmovb.64", RDX, R8)
    emit("mov.64", RCX, RDX)
    emit.label("chosen")


def _place(emit: Listing) -> None:
    """Where this thread is on another CPU than at the last launch, let the workers use the other ones only; and keep
    this one where it is, if r9 says so. Keeps rbx, rbp, r13. Where the system refuses, threads stay as they are."""
    emit("cmp.64", at(RBX, PLACED), Immediate(0))
    emit("je", "unplaced")
    emit("lea.64", RDI, at(RBX, CALLER_CPU))
    emit("xor.32", RSI, RSI)
    emit("xor.32", RDX, RDX)
    emit("mov.32", RAX, Immediate(_SYS_GETCPU))
    emit("syscall")
    emit("mov.32", RCX, at(RBX, CALLER_CPU))
    emit("cmp.32", RCX, Immediate(8 * ALLOWED_BYTES))
    emit("jae", "unplaced")
    emit("cmp.32", RCX, at(RBX, KEPT_OFF))
    emit("je", "placed")
    emit("mov.32", at(RBX, KEPT_OFF), RCX)
    _cpu_bit(emit, ALLOWED)
    emit("mov.64", R15, at(R14))
    emit("not.64", RAX)
    emit("and.64", at(R14), RAX)
    emit("mov.32", R12, Immediate(1))
    emit.label("place_next")
    emit("cmp.64", R12, at(RBX, PLACED))
    emit("jae", "place_done")
    _mailbox(emit, RDI, R12)
    emit("mov.32", RDI, at(RDI, THREAD))
    emit("mov.32", RSI, Immediate(ALLOWED_BYTES))
    emit("lea.64", RDX, at(RBX, ALLOWED))
    emit("mov.32", RAX, Immediate(_SYS_SCHED_SETAFFINITY))
    emit("syscall")
    emit("add.64", R12, Immediate(1))
    emit("jmp", "place_next")
    emit.label("place_done")
    emit("mov.64", at(R14), R15)
    emit.label("placed")
    emit("test.64", R9, R9)
    emit("je", "unplaced")
    emit("xor.32", RDI, RDI)
    emit("mov.32", RSI, Immediate(ALLOWED_BYTES))
    emit("lea.64", RDX, at(RBX, SAVED))
    emit("mov.32", RAX, Immediate(_SYS_SCHED_GETAFFINITY))
    emit("syscall")
    emit("mov.64", at(RBX, SAVED_BYTES), RAX)
    emit("test.64", RAX, RAX)
    emit("jle", "unplaced")
    emit("mov.32", RCX, at(RBX, CALLER_CPU))
    _cpu_bit(emit, OWN)
    emit("mov.64", at(R14), RAX)
    emit("xor.32", RDI, RDI)
    emit("mov.32", RSI, Immediate(ALLOWED_BYTES))
    emit("lea.64", RDX, at(RBX, OWN))
    emit("mov.32", RAX, Immediate(_SYS_SCHED_SETAFFINITY))
    emit("syscall")
    emit("mov.64", at(R14), Immediate(0))
    emit.label("unplaced")


def _cpu_bit(emit: Listing, cpus: int) -> None:
    """r14: where the bit of CPU ecx lies in the set at [rbx + cpus]; rax: the bit."""
    emit("mov.32", RAX, RCX)
    emit("shr.imm.64", RAX, Immediate(6))
    emit("lea.64", R14, Memory(Register("gpr", RBX), Register("gpr", RAX), 8, cpus))
    emit("mov.32", RAX, Immediate(1))
    emit("shl.cl.64", RAX, RCX)


def clock_function() -> MachineFunction:
    emit = Listing()
    emit("rdtsc")
    emit("ret")
    return MachineFunction("sapper_clock", emit.body, {})


def work_function() -> MachineFunction:
    emit = Listing()
    _work(emit)
    _wake(emit)
    return MachineFunction("sapper_work", emit.body, {})


def launch_function() -> MachineFunction:
    emit = Listing()
    _launch(emit)
    _wake(emit)
    return MachineFunction("sapper_launch", emit.body, {})


def workers_code() -> tuple[bytes, dict[str, int]]:
    """The code of all three, one after the other, and where each begins."""
    code = bytearray()
    offsets: dict[str, int] = {}
    for name, function in (("clock", clock_function()), ("work", work_function()), ("launch", launch_function())):
        encoded = encode(function)
        code += b"\xcc" * (-len(code) % encoded.align_bytes)
        offsets[name] = len(code)
        code += encoded.code
    return bytes(code), offsets
