"""What every model's file has: a mapping of its weights, threads, and programs that they run, in machine code.

Enters: a `Plan`, the digest of the weights. Leaves: `NAME_open`, `NAME_close` and what they and the functions of
entry.py and training.py need. Holds: nothing but system calls is used (open, fstat, mmap, madvise, munmap, close,
clone, futex, exit and the like), and no memory but the stack, what is mapped here, and the word in which the
processor's features are remembered.

    int  NAME_open(const char *weights, int64_t threads, NAME_model **model)
    void NAME_close(NAME_model *model)

A model is one mapping (offsets in bytes; `Plan` has the rest):

    0 weights    8 the memory as it was mapped    16 its bytes    24 workers    32 position    40 of the random numbers
    POOL  the memory that workers share (runtime/workers_code.py); a mailbox has the number of its worker's thread,
          which the system sets to 0 when the thread has ended
    programs: control, sync blocks, table, argument blocks | temporaries | state | scratch of each worker | stacks

Weights that are trained are a copy of the file's, page by page, which no other process sees; then only the bytes up to
the first weight, which say what lies where, have the digest that they had.

The kernels' addresses, and those of what they work on, are filled in when a model is opened, from the tables of
tables.py. Workers are threads of this file's own: the machine code is that of sapper's runtime, started by clone(2).
Signals are blocked in them.
Source: clone(2), futex(2), mmap(2), fstat(2), sched_getaffinity(2); System V ABI AMD64 3.2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..codegen.c_abi import CHECK_CPU
from ..runtime import program, workers
from ..runtime.system import HUGE_PAGE_BYTES
from ..targets import module_of
from .digest import SYMBOL as DIGEST
from .plan import Plan
from .tables import CONSTANTS

STATUS = {
    "OK": (0, "done"),
    "NO_FILE": (1, "the weights file can't be opened or mapped"),
    "BAD_SIZE": (2, "the weights file has another size than the one that this code was made with"),
    "BAD_CONTENT": (3, "the weights file's digest is not the one that this code was made with"),
    "NO_MEMORY": (4, "the system gives no memory"),
    "NO_THREAD": (5, "the system gives no thread"),
    "BAD_THREADS": (6, "threads is not in 1 .. 256"),
    "BAD_CPU": (7, "the processor lacks what the code was made for"),
    "BAD_TOKEN": (8, "a token is not in the vocabulary, or there is none"),
    "CONTEXT_FULL": (9, "the tokens do not fit in the context"),
    "BAD_POSITION": (10, "the position is not in 0 .. the tokens so far"),
    "BAD_SAMPLING": (11, "a setting of sampling is out of its range"),
    "BAD_RECIPE": (12, "a number of the recipe is out of its range"),
    "NO_WRITE": (13, "the file can't be written"),
}
"""What the functions return, by name."""

LARGEST_STATUS = max(number for number, _ in STATUS.values())
READ, WRITE = 1, 2
"""Protections of mmap(2)."""
MOST_THREADS = 256
WEIGHTS, MAPPED, MAPPED_BYTES, THREADS, POSITION, DRAWS = 0, 8, 16, 24, 32, 40
BAD_SAMPLING = STATUS["BAD_SAMPLING"][0]
POOL = 64
HEAD_BYTES = POOL + workers.MAILBOXES + workers.MAILBOX_BYTES * MOST_THREADS
STACK_BYTES = 256 << 10
SHORT = ("draw", "numbers", "plan", "tell")
"""Programs so short that nobody spins while they run."""
SPIN_US, WAIT_US = 50, 1000
"""How long a worker without work, and who waits for workers that run, spins before it sleeps, as in
runtime/workers.py."""

_CLONE_FLAGS = 0x100 | 0x200 | 0x400 | 0x800 | 0x10000 | 0x40000 | 0x100000 | 0x200000
"""CLONE_VM, _FS, _FILES, _SIGHAND, _THREAD, _SYSVSEM, _PARENT_SETTID, _CHILD_CLEARTID."""

_NUMBERS: dict[str, int] = {
    "WEIGHTS": WEIGHTS, "MAPPED": MAPPED, "MAPPED_BYTES": MAPPED_BYTES, "THREADS": THREADS, "POSITION": POSITION,
    "POOL": POOL, "MOST_THREADS": MOST_THREADS, "STACK_BYTES": STACK_BYTES,
    "LARGEST_STATUS": LARGEST_STATUS,
    "HUGE": HUGE_PAGE_BYTES, "HUGE_MASK": -HUGE_PAGE_BYTES, "HUGE_LESS_1": HUGE_PAGE_BYTES - 1,
    "MAILBOXES": POOL + workers.MAILBOXES,
    "MAILBOX_BYTES": workers.MAILBOX_BYTES, "THREAD": POOL + workers.MAILBOXES + workers.THREAD,
    "POOL_SPIN": POOL + workers.SPIN_CYCLES, "POOL_JOIN": POOL + workers.JOIN_CYCLES,
    "ALLOWED": POOL + workers.ALLOWED, "ALLOWED_BYTES": workers.ALLOWED_BYTES, "PLACED": POOL + workers.PLACED,
    "KEPT_OFF": POOL + workers.KEPT_OFF, "CLONE_FLAGS": _CLONE_FLAGS,
    **{f"{name}": number for name, (number, _) in STATUS.items()},
    # system calls of Linux on x86-64 (asm/unistd_64.h)
    "sys_open": 2, "sys_close": 3, "sys_fstat": 5, "sys_mmap": 9, "sys_munmap": 11, "sys_sigprocmask": 14,
    "sys_madvise": 28, "sys_clone": 56, "sys_exit": 60, "sys_futex": 202, "sys_getaffinity": 204,
}

_OPEN = """
    # rbx: the model; r12: the path, then bytes to map; r13: threads; r14: where the model goes; r15: the weights
    # the stack: the bases of words
    push rbx
    push rbp
    push r12
    push r13
    push r14
    push r15
    sub rsp, 40
    mov r12, rdi
    mov r13, rsi
    mov r14, rdx
    lea rax, @check_cpu
    call rax
    test eax, eax
    mov eax, @BAD_CPU
    je leave
    lea rcx, [r13 - 1]
    mov eax, @BAD_THREADS
    cmp rcx, @MOST_THREADS
    jae leave

    mov rdi, r12
    mov rsi, @weights_bytes
    mov edx, {protection}
    lea rax, @map
    call rax
    cmp rax, @LARGEST_STATUS
    jbe leave
    mov r15, rax
    mov rdi, r15
    mov rsi, @checked_bytes
    lea rax, @digest
    call rax
    mov rcx, @weights_digest
    cmp rax, rcx
    mov ebx, @BAD_CONTENT
    jne unmap_weights

    mov r12, @scratch_bytes         # scratch and a stack for each worker
    add r12, @STACK_BYTES
    imul r12, r13
    mov rcx, @memory_bytes
    add r12, rcx
    add r12, @HUGE
    xor edi, edi                    # mmap(0, bytes, read | write, private | anonymous | no reserve, -1, 0)
    mov rsi, r12
    mov edx, 3
    mov r10d, 0x4022
    mov r8, -1
    xor r9d, r9d
    mov eax, @sys_mmap
    syscall
    cmp rax, -4096
    mov ebx, @NO_MEMORY
    ja unmap_weights
    lea rbx, [rax + @HUGE_LESS_1]
    and rbx, @HUGE_MASK
    mov qword ptr [rbx + @MAPPED], rax
    mov qword ptr [rbx + @MAPPED_BYTES], r12
    mov qword ptr [rbx + @WEIGHTS], r15
    mov qword ptr [rbx + @THREADS], r13
    mov rdi, rbx                    # huge pages: a system without them is slower, no more
    mov rsi, @huge_bytes
    mov edx, 14
    mov eax, @sys_madvise
    syscall
    xor eax, eax
    mov qword ptr [rsp], rax
    mov qword ptr [rsp + 8], r15
    mov qword ptr [rsp + 16], rbx
{constants}{tables}
    mov rdi, rbx
    lea rax, @start
    call rax
    test eax, eax
    jne close_again
    mov qword ptr [r14], rbx
    jmp leave
close_again:
    mov ebp, eax
    mov rdi, rbx
    lea rax, @close
    call rax
    mov eax, ebp
    jmp leave
unmap_weights:
    mov rdi, r15
    mov rsi, @weights_bytes
    mov eax, @sys_munmap
    syscall
    mov eax, ebx
    jmp leave
leave:
    add rsp, 40
    pop r15
    pop r14
    pop r13
    pop r12
    pop rbp
    pop rbx
    ret
"""

_MAP = """
    # map(rdi: path, rsi: bytes, rdx: protection) -> where a plain file of so many bytes is mapped, or a status
    # rbx: bytes; rbp: the file; r12: protection, then the result; the stack: of fstat(2)
    push rbx
    push rbp
    push r12
    sub rsp, 144
    mov rbx, rsi
    mov r12, rdx
    mov esi, 0x80000                # open(path, O_RDONLY | O_CLOEXEC)
    xor edx, edx
    mov eax, @sys_open
    syscall
    mov rbp, rax
    mov eax, @NO_FILE
    test rbp, rbp
    js leave
    mov edi, ebp
    mov rsi, rsp
    mov eax, @sys_fstat
    syscall
    test rax, rax
    js no_file
    mov ecx, dword ptr [rsp + @mode_offset]  # st_mode: a digest is of a regular file
    and ecx, 0xf000
    cmp ecx, 0x8000
    jne no_file
    cmp rbx, qword ptr [rsp + 48]   # st_size
    jne bad_size
    xor edi, edi                    # mmap(0, bytes, protection, MAP_PRIVATE | MAP_POPULATE, file, 0)
    mov rsi, rbx
    mov rdx, r12
    mov r10d, 0x8002
    mov r8d, ebp
    xor r9d, r9d
    mov eax, @sys_mmap
    syscall
    mov r12, rax
    cmp rax, -4096
    jbe close
no_file:
    mov r12d, @NO_FILE
    jmp close
bad_size:
    mov r12d, @BAD_SIZE
close:
    mov edi, ebp
    mov eax, @sys_close
    syscall
    mov rax, r12
leave:
    add rsp, 144
    pop r12
    pop rbp
    pop rbx
    ret
"""

_TABLE = """\
    lea rdi, @{program}_table
    mov rsi, rsp
    lea rax, @fill
    call rax
"""

_CONSTANTS = """\
    lea rax, @constants
    mov qword ptr [rsp + 24], rax
"""

_FILL = """
    # fill(rdi: a program's table, rsi: the bases): writes its control memory, table and argument blocks
    push rbx
    push rbp
    mov rdx, qword ptr [rsi + 16]   # the model's memory
    mov eax, dword ptr [rdi]
    lea rbx, [rdx + rax]            # control
    mov eax, dword ptr [rdi + 4]
    lea r8, [rdx + rax]             # where the next launch of the table goes
    mov qword ptr [rbx + @TABLE], r8
    mov eax, dword ptr [rdi + 8]
    add rax, rdx
    mov qword ptr [rbx + @SYNC], rax
    mov qword ptr [rbx + 16], rax
    mov eax, dword ptr [rdi + 12]
    mov qword ptr [rbx + @SYNC_COUNT], rax
    mov eax, dword ptr [rdi + 16]
    mov qword ptr [rbx + @COUNTERS], rax
    mov r9d, dword ptr [rdi + 20]   # launches
    lea rbx, [rdi + 32]
launch:
    sub r9, 1
    jb done
    movsxd rax, dword ptr [rbx]
    add rax, rdi
    mov qword ptr [r8], rax
    mov r10d, dword ptr [rbx + 4]
    add r10, rdx                    # its argument block
    mov qword ptr [r8 + 8], r10
    mov eax, dword ptr [rbx + 8]
    mov dword ptr [r8 + 16], eax
    mov r11d, dword ptr [rbx + 12]  # words
    mov rax, qword ptr [rbx + 16]
    mov qword ptr [r8 + 20], rax
    mov rax, qword ptr [rbx + 24]
    mov qword ptr [r8 + 28], rax
    add rbx, 32
    add r8, @LAUNCH_BYTES
word:
    mov rax, qword ptr [rbx]
    mov rcx, qword ptr [rsi + rax*8]
    add rcx, qword ptr [rbx + 8]
    mov qword ptr [r10], rcx
    add r10, 8
    add rbx, 16
    sub r11, 1
    jne word
    jmp launch
done:
    pop rbp
    pop rbx
    ret
"""

_SET = """
    # set(rdi: model, rsi: a table of places, rdx: value): sets a variable in all argument blocks
    mov ecx, dword ptr [rsi]
next:
    sub ecx, 1
    jb done
    add rsi, 4
    mov eax, dword ptr [rsi]
    mov qword ptr [rdi + rax], rdx
    jmp next
done:
    ret
"""

_START = """
    # start(rdi: model) -> status: starts the workers 1, 2, ...; on failure as many as there are stay known
    push rbx
    push rbp
    push r12
    push r13
    push r14
    sub rsp, 144
    mov rbx, rdi
    mov r12, qword ptr [rbx + @THREADS]
    mov r13d, 1                     # workers there are
    xor r14d, r14d                  # status

    xor edi, edi                    # as many as CPUs spin before they sleep; more would keep others off them
    mov esi, @ALLOWED_BYTES
    lea rdx, [rbx + @ALLOWED]
    mov eax, @sys_getaffinity
    syscall
    xor ecx, ecx
    xor edx, edx
    test rax, rax
    jle counted
count:
    cmp rdx, rax
    jae counted
    mov rdi, qword ptr [rbx + rdx + @ALLOWED]
    add rdx, 8
bits:
    test rdi, rdi
    je count
    lea rsi, [rdi - 1]
    and rdi, rsi
    add ecx, 1
    jmp bits
counted:
    xor eax, eax
    mov dword ptr [rbx + @KEPT_OFF], -1
    cmp rcx, r12
    jb crowded
    mov qword ptr [rbx + @PLACED], r12
    mov dword ptr [rbx + @POOL_SPIN], @SPIN_CYCLES
    mov eax, @WAIT_CYCLES
crowded:
    mov dword ptr [rbx + @POOL_JOIN], eax
{spins}
    mov rax, -1                     # all signals are blocked while a thread starts, which it takes over
    mov qword ptr [rsp], rax
    mov edi, 2
    mov rsi, rsp
    lea rdx, [rsp + 8]
    mov r10d, 8
    mov eax, @sys_sigprocmask
    syscall
again:
    cmp r13, r12
    jae started
    mov rbp, @stacks                # the top of its stack
    mov rax, @scratch_bytes
    imul rax, r12
    add rbp, rax
    lea rax, [r13 + 1]
    imul rax, rax, @STACK_BYTES
    add rbp, rax
    add rbp, rbx
    mov qword ptr [rbp - 16], rbx
    mov qword ptr [rbp - 8], r13
    mov edi, @CLONE_FLAGS
    lea rsi, [rbp - 16]
    imul rdx, r13, @MAILBOX_BYTES
    lea rdx, [rbx + rdx + @THREAD]
    mov r10, rdx
    xor r8d, r8d
    mov eax, @sys_clone
    syscall
    test rax, rax
    js refused
    je thread
    add r13, 1
    jmp again
refused:
    mov r14d, @NO_THREAD
    xor eax, eax
    mov qword ptr [rbx + @PLACED], rax
started:
    mov qword ptr [rbx + @THREADS], r13
    mov edi, 2
    lea rsi, [rsp + 8]
    xor edx, edx
    mov r10d, 8
    mov eax, @sys_sigprocmask
    syscall
    mov eax, r14d
    add rsp, 144
    pop r14
    pop r13
    pop r12
    pop rbp
    pop rbx
    ret
thread:
    mov rbx, qword ptr [rsp]        # the new thread, on its own stack: work(pool, index, mailbox, generation 0)
    mov rsi, qword ptr [rsp + 8]
    lea rdi, [rbx + @POOL]
    imul rdx, rsi, @MAILBOX_BYTES
    lea rdx, [rbx + rdx + @MAILBOXES]
    xor ecx, ecx
    lea rax, @work
    call rax
    xor edi, edi
    mov eax, @sys_exit
    syscall
    ud2
"""

_CLOSE = """
    test rdi, rdi
    je nothing
    push rbx
    push rbp
    push r12
    mov rbx, rdi
    mov rcx, qword ptr [rbx + @THREADS]
    lea r12, [rcx - 1]              # the last worker
    test r12, r12
    je alone
    lea rdi, [rbx + @POOL]          # launch(pool, 0, 0, workers, all of them, not held) tells them to end
    xor esi, esi
    xor edx, edx
    mov r8, rcx
    xor r9d, r9d
    lea rax, @launch
    call rax
wait:
    imul rdi, r12, @MAILBOX_BYTES
    lea rdi, [rbx + rdi + @THREAD]
    mov edx, dword ptr [rdi]
    test edx, edx
    je ended
    xor esi, esi                    # futex(its word, FUTEX_WAIT, the thread's number, no time limit)
    xor r10d, r10d
    mov eax, @sys_futex
    syscall
    jmp wait
ended:
    sub r12, 1
    jne wait
alone:
    mov rdi, qword ptr [rbx + @WEIGHTS]
    mov rsi, @weights_bytes
    mov eax, @sys_munmap
    syscall
    mov rdi, qword ptr [rbx + @MAPPED]
    mov rsi, qword ptr [rbx + @MAPPED_BYTES]
    mov eax, @sys_munmap
    syscall
    pop r12
    pop rbp
    pop rbx
nothing:
    ret
"""

_RUN = """
    # run(rdi: model, rsi: a program's control memory): all workers walk its table
    mov rdx, rsi
    mov rcx, qword ptr [rdi + @THREADS]
    lea rsi, @program
    cmp rcx, 1
    je alone
    lea rdi, [rdi + @POOL]          # launch(pool, program, its control memory, workers, all of them, held)
    mov r8, rcx
    mov r9d, 1
    lea rax, @launch
    jmp rax
alone:
    mov rax, rsi
    mov rdi, rdx
    xor esi, esi
    mov edx, 1
    jmp rax
"""


@dataclass(frozen=True, slots=True)
class Opening:
    """numbers, reaches: what texts of functions name. outer, inner: texts of functions that others may call, and of
    those that they may not, by the ends of their names."""

    numbers: dict[str, int]
    reaches: dict[str, str]
    outer: dict[str, str]
    inner: dict[str, str]


def opening_of(plan: Plan[Any], weights_digest: int) -> Opening:
    """weights_digest: of as many bytes of the weights file as are checked."""
    name = plan.model.name
    system = module_of(plan.target.family, "system").SYSTEM
    numbers = _NUMBERS | {"SPIN_CYCLES": SPIN_US * system.clock_mhz, "WAIT_CYCLES": WAIT_US * system.clock_mhz,
                          "mode_offset": system.mode_offset}
    numbers |= {
        "weights_bytes": plan.weights_bytes, "checked_bytes": plan.checked_bytes, "memory_bytes": plan.memory_bytes,
        "scratch_bytes": plan.scratch_bytes, "stacks": plan.memory_bytes, "huge_bytes": plan.huge_bytes,
        "weights_digest": weights_digest - (1 << 64) if weights_digest >> 63 else weights_digest,
        "TABLE": program.TABLE, "SYNC": program.SYNC, "SYNC_COUNT": program.SYNC_COUNT, "COUNTERS": program.COUNTERS,
        "LAUNCH_BYTES": program.LAUNCH_BYTES,
    }
    for of in plan.programs.values():
        numbers |= {f"{of.name}_control": of.control, f"{of.name}_spin": of.control + program.SPIN_CYCLES}
    reaches = {
        "check_cpu": CHECK_CPU, "digest": DIGEST, "work": "sapper_work", "launch": "sapper_launch",
        "program": "sapper_program", "close": f"{name}_close", "constants": f"{name}.{CONSTANTS}",
        **{f"{of}_table": f"{name}.{of}" for of in plan.programs},
        **{key: f"{name}.{key}" for key in ("map", "fill", "set", "start", "run")},
        **{f"{of}_{variable}": f"{name}.{of}.{variable}" for of in plan.programs
           for variable in plan.model.variables[of]},
    }
    opening = replaced(
        _OPEN, tables="".join(replaced(_TABLE, program=of) for of in plan.programs).removesuffix("\n"),
        constants=_CONSTANTS if plan.constants else "", protection=str(READ | WRITE if plan.model.trained else READ))
    start = replaced(_START, spins="".join(
        f"    mov dword ptr [rbx + @{of}_spin], eax\n" for of in plan.programs if of not in SHORT))
    return Opening(numbers, reaches, {"open": opening, "close": _CLOSE},
                   {"map": _MAP, "fill": _FILL, "set": _SET, "start": start, "run": _RUN})


def replaced(text: str, **parts: str) -> str:
    """`{part}` by what it stands for."""
    for name, part in parts.items():
        text = text.replace(f"{{{name}}}", part)
    return text
