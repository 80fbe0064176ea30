"""What executables have in common, as parts of the text of start.py and learn.py.

Enters: settings on the stack (options.py). Leaves: BEGIN, which opens the model, and END, the routines. Holds: the
weights are those beside the executable unless told otherwise; messages go to standard error; the status is 0, 1 after
an error, 2 for a command line that is not understood. Where the structure of sigaction(2) has no restorer (RISC-V), its
place is the mask's: the handler ends the process, whatever signals are blocked in it.
Source: System V ABI AMD64 3.4.1 (the stack at entry), write(2), readlink(2), clock_gettime(2), rt_sigaction(2).
"""

from __future__ import annotations

from ..codegen.c_abi import CHECK_CPU
from .opening import MOST_THREADS, STATUS
from .written import Written, written

MESSAGE_BYTES = 160
PATH_BYTES = 8192
LINE = 256
"""Where a line of text lies on the stack; before it what the system says, from 128 on."""

BEGIN = """\
options_read:
    lea rax, @fault
    mov qword ptr [rsp + 128], rax  # sigaction(SIGBUS), of weights that are cut short while they are mapped
    mov edx, 0x4000000              # SA_RESTORER, which the kernel wants, though the handler does not return
    mov qword ptr [rsp + 136], rdx
    mov qword ptr [rsp + 144], rax
    xor eax, eax
    mov qword ptr [rsp + 152], rax
    mov edi, 7
    lea rsi, [rsp + 128]
    xor edx, edx
    mov r10d, 8
    mov eax, 13
    syscall
    xor edi, edi                    # mmap: memory for the path, and what follows
    mov rsi, @buffer_bytes
    mov edx, 3
    mov r10d, 0x4022
    mov r8, -1
    xor r9d, r9d
    mov eax, 9
    syscall
    mov r13, rax
    mov eax, @NO_MEMORY
    cmp r13, -4096
    ja told
    mov rax, qword ptr [rsp + 8]
    test rax, rax
    jne path_known
    lea rdi, @text_self             # the executable's own name, and what the weights' has behind it
    mov rsi, r13
    mov edx, 4096
    mov eax, 89
    syscall
    test rax, rax
    js no_path
    lea rcx, [r13 + rax]
    lea rsi, @ending
ending:
    movzx eax, byte ptr [rsi]
    mov byte ptr [rcx], al
    add rsi, 1
    add rcx, 1
    test eax, eax
    jne ending
no_path:
    mov qword ptr [rsp + 8], r13
path_known:
    mov rsi, qword ptr [rsp + 24]
    test rsi, rsi
    jne threads_known
    xor edi, edi                    # as many threads as there are CPUs
    mov esi, 128
    lea rdx, [rsp + 128]
    mov eax, 204
    syscall
    xor esi, esi
    xor ecx, ecx
cpus:
    cmp rcx, rax
    jge cpus_counted
    mov rdx, qword ptr [rsp + rcx + 128]
    add rcx, 8
cpu:
    test rdx, rdx
    je cpus
    lea rdi, [rdx - 1]
    and rdx, rdi
    add esi, 1
    jmp cpu
cpus_counted:
    mov eax, 1
    cmp esi, 1
    cmovb esi, eax
    mov eax, @most_threads
    cmp esi, eax
    cmova esi, eax
threads_known:
    mov rdi, qword ptr [rsp + 8]
    mov rdx, rsp
    lea rax, @open
    call rax
    test eax, eax
    jne weights_refused
    mov rbx, qword ptr [rsp]
"""
"""rbx: the model; r13: a buffer, in which the path is at first; on the stack 0 the model."""

READ = """\
read:
    mov rdi, qword ptr [rsp + 56]   # one byte more than there is room for, so that too long a text shows
    mov rsi, r14
    lea rdx, [r15 + 1]
    xor eax, eax
    syscall
    test rax, rax
    js read_failed
    je all_read
    cmp rax, r15
    ja too_long
    add r14, rax
    sub r15, rax
    jmp read
read_failed:
    cmp rax, -4                     # EINTR
    je read
refused:
    lea rsi, @no_input
    mov edx, @no_input_bytes
    jmp failed
"""
"""The file at 56 of the stack to r14, which has room for r15 bytes, until `all_read`; `refused` where there is none."""

END = """\
exit:
    mov eax, 231                    # exit_group: the workers end too
    syscall
    ud2

weights_refused:
    cmp eax, @BAD_CONTENT           # the statuses up to this one speak of the file
    ja told
    mov r12d, eax
    mov rsi, qword ptr [rsp + 8]
    xor edx, edx
path_length:
    cmp byte ptr [rsi + rdx], 0
    je path_told
    add rdx, 1
    jmp path_length
path_told:
    mov edi, 2
    call write
    mov edi, 2
    lea rsi, @colon
    mov edx, 2
    call write
    mov eax, r12d
told:
    imul eax, eax, @MESSAGE_BYTES   # what a status means
    lea rsi, @messages
    add rsi, rax
    xor edx, edx
message_length:
    cmp byte ptr [rsi + rdx], 0
    je failed
    add rdx, 1
    jmp message_length
failed:
    mov edi, 2
    call write
    mov edi, 1
    jmp exit
write:
    test rdx, rdx                   # rdx bytes at rsi to the file edi
    je written
    mov eax, 1
    syscall
    test rax, rax
    js write_failed
    add rsi, rax
    sub rdx, rax
    jmp write
write_failed:
    cmp rax, -4
    je write
    cmp edi, 1
    jne unwritten
    mov edi, 2
    lea rsi, @no_output
    mov edx, @no_output_bytes
    mov eax, 1
    syscall                         # once, as it may fail as well
unwritten:
    mov edi, 1
    jmp exit
written:
    ret
clock:
    mov edi, 1                      # the monotonic clock to [rsi]
    mov eax, 228
    syscall
    ret
put:
    xor ecx, ecx                    # edx bytes at rsi to the line
put_next:
    cmp ecx, edx
    jae put_done
    mov al, byte ptr [rsi + rcx]
    mov byte ptr [r15], al
    add r15, 1
    add ecx, 1
    jmp put_next
put_done:
    ret
speed:
    imul r8, qword ptr [rdx], 1000000000    # rax tokens from the time at rcx to that at rdx, as "12.3 tokens/s, "
    add r8, qword ptr [rdx + 8]
    imul r9, qword ptr [rcx], 1000000000
    add r9, qword ptr [rcx + 8]
    sub r8, r9
    mov ecx, 1
    cmp r8, 1
    cmovl r8, rcx
    mov rcx, 10000000000
    mul rcx
    div r8
    xor edx, edx
    mov ecx, 10
    div rcx
    push rdx
    call decimal
    mov al, 46
    mov byte ptr [r15], al
    pop rax
    add eax, 48
    mov byte ptr [r15 + 1], al
    add r15, 2
    lea rsi, @text_rate
    mov edx, @text_rate_bytes
    jmp put
decimal:
    mov ecx, 10                     # rax in digits to the line: how many first, then from the last one on
    mov rsi, rax
count_digit:
    add r15, 1
    xor edx, edx
    div rcx
    test rax, rax
    jne count_digit
    mov rax, rsi
    mov rdi, r15
digit_out:
    xor edx, edx
    div rcx
    add edx, 48
    sub rdi, 1
    mov byte ptr [rdi], dl
    test rax, rax
    jne digit_out
    ret
"""
"""exit (edi: the status), told (eax: a status of the ABI), failed (rsi, edx: a message); write, clock, put, speed,
decimal."""

_FAULT = """
    # the handler of SIGBUS: says what happened, and ends the process
    mov edi, 2
    lea rsi, @text_cut
    mov edx, @text_cut_bytes
    mov eax, 1
    syscall
    mov edi, 1
    mov eax, 231
    syscall
    ret
"""


def numbers(buffer_bytes: int) -> dict[str, int]:
    """buffer_bytes: at r13."""
    return {"BAD_CONTENT": STATUS["BAD_CONTENT"][0], "NO_MEMORY": STATUS["NO_MEMORY"][0],
            "MESSAGE_BYTES": MESSAGE_BYTES, "most_threads": MOST_THREADS, "buffer_bytes": buffer_bytes}


def constants(ending: bytes) -> dict[str, bytes]:
    """ending: what is behind the executable's name in that of its weights."""
    messages = [f"{meaning}\n".encode()[:MESSAGE_BYTES - 1] for _, (_, meaning) in
                sorted(STATUS.items(), key=lambda item: item[1][0])]
    return {
        "ending": ending + b"\0", "text_self": b"/proc/self/exe\0",
        "messages": b"".join(message.ljust(MESSAGE_BYTES, b"\0") for message in messages),
        "no_output": b"standard output can't be written\n", "colon": b": ", "line_feed": b"\n",
        "text_rate": b" tokens/s, ",
    }


def reaches(name: str) -> dict[str, str]:
    return {"open": f"{name}_open", "check_cpu": CHECK_CPU, "fault": f"{name}.fault"}


def fault(name: str) -> Written:
    """The handler of SIGBUS."""
    cut = b"the weights file was cut short while it was used\n"
    return written(f"{name}.fault", _FAULT, {"text_cut_bytes": len(cut)}, {}, {"text_cut": cut})
