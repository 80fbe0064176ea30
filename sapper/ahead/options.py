"""The command line of an executable: part of the text of start.py.

Enters: the stack at entry (rbp after it). Leaves: at `options_read` r12, the number of the prompt's first argument, and
the settings on the stack: 8 the weights or null, 16 most tokens, 24 threads or 0, 32 raw, 608 top_k, and from 616 on a
sapper_model_sampling but for its top_k. Holds: what is not understood, or an option behind a word of the prompt, ends
the process with the usage and status 2. A number is digits with at most one point among them: up to 15, both parts of
the quotient by a power of ten are exact as f64, so that it is rounded as Python rounds it.
"""

from __future__ import annotations

from .draw import bits
from .opening import STATUS

DEFAULT_TOKENS, DEFAULT_TOP_K = 128, 40
NUMBERS = {"BAD_CPU": STATUS["BAD_CPU"][0], "default_tokens": DEFAULT_TOKENS, "default_top_k": DEFAULT_TOP_K,
           "one": bits(1.0)}

OPTIONS = """\
    mov rbp, rsp
    sub rsp, 640
    and rsp, -64
    xor eax, eax
    mov qword ptr [rsp], rax
    mov qword ptr [rsp + 8], rax
    mov qword ptr [rsp + 24], rax
    mov qword ptr [rsp + 32], rax
    mov qword ptr [rsp + 616], rax
    mov qword ptr [rsp + 632], rax
    mov eax, @default_tokens
    mov qword ptr [rsp + 16], rax
    mov eax, @default_top_k
    mov qword ptr [rsp + 608], rax
    mov eax, @one                   # top_p 1, min_p 0
    mov qword ptr [rsp + 624], rax
    lea rax, @check_cpu
    call rax                        # before any instruction that not every processor has
    test eax, eax
    mov eax, @BAD_CPU
    je told
    mov r12d, 1
option:
    cmp r12, qword ptr [rbp]
    jae options_read
    mov rdi, qword ptr [rbp + r12*8 + 8]
    cmp byte ptr [rdi], 45          # '-'
    jne operands
    add r12, 1
    lea rsi, @text_end
    call same
    je options_read
    lea rsi, @text_help
    call same
    je help
    lea rsi, @text_raw
    call same
    je raw
    lea rsi, @text_weights
    call same
    je weights
    lea rsi, @text_tokens
    lea r8, [rsp + 16]
    call same
    je number
    lea rsi, @text_threads
    lea r8, [rsp + 24]
    call same
    je number
    lea rsi, @text_top_k
    lea r8, [rsp + 608]
    call same
    je number
    lea rsi, @text_temperature
    lea r8, [rsp + 616]
    call same
    je real
    lea rsi, @text_top_p
    lea r8, [rsp + 624]
    call same
    je real
    lea rsi, @text_min_p
    lea r8, [rsp + 628]
    call same
    je real
    lea rsi, @text_seed
    call same
    je seed
usage:
    mov edi, 2
    lea rsi, @usage
    mov edx, @usage_bytes
    call write
    mov edi, 2
    jmp exit
help:
    mov edi, 1
    lea rsi, @usage
    mov edx, @usage_bytes
    call write
    xor edi, edi
    jmp exit
operands:
    lea r8, [r12 + 1]               # what looks like an option behind the prompt's first word is neither
operand:
    cmp r8, qword ptr [rbp]
    jae options_read
    mov rdi, qword ptr [rbp + r8*8 + 8]
    add r8, 1
    cmp byte ptr [rdi], 45
    jne operand
    add rdi, 1
    cmp byte ptr [rdi], 45
    jne operand
    add rdi, 1
    movzx eax, byte ptr [rdi]
    test eax, eax
    je operand
    jmp usage
raw:
    mov eax, 1
    mov qword ptr [rsp + 32], rax
    jmp option
weights:
    cmp r12, qword ptr [rbp]
    jae usage
    mov rax, qword ptr [rbp + r12*8 + 8]
    mov qword ptr [rsp + 8], rax
    add r12, 1
    jmp option
number:
    call digits                     # a whole number from 1 to 99999999
    test edx, edx
    jne usage
    lea rcx, [rax - 1]
    cmp rcx, 99999999
    jae usage
    mov qword ptr [r8], rax
    jmp option
seed:
    call digits
    test edx, edx
    jne usage
    mov qword ptr [rsp + 632], rax
    jmp option
real:
    call digits
    cmp r9d, 15
    ja usage
    vmovq xmm0, rax
    vcvtsi2sd xmm0, xmm0, rax
    mov ecx, 1
power:
    sub edx, 1
    js powered
    imul rcx, rcx, 10
    jmp power
powered:
    vmovq xmm1, rcx
    vcvtsi2sd xmm1, xmm1, rcx
    vdivsd xmm0, xmm0, xmm1
    vcvtsd2ss xmm0, xmm0, xmm0
    vmovss dword ptr [r8], xmm0
    jmp option
digits:
    cmp r12, qword ptr [rbp]        # the next argument: rax its digits, edx how many lie behind a point, r9d in all
    jae usage
    mov rdi, qword ptr [rbp + r12*8 + 8]
    add r12, 1
    xor eax, eax
    xor edx, edx
    xor r9d, r9d
    xor r10d, r10d                  # 1 behind a point
digit:
    movzx ecx, byte ptr [rdi]
    test ecx, ecx
    je digits_read
    add rdi, 1
    cmp ecx, 46                     # '.'
    je point
    sub ecx, 48
    cmp ecx, 10
    jae usage
    imul rax, rax, 10
    add rax, rcx
    add edx, r10d
    add r9d, 1
    cmp r9d, 18
    ja usage
    jmp digit
point:
    test r10d, r10d
    jne usage
    mov r10d, 1
    jmp digit
digits_read:
    test r9d, r9d
    je usage
    ret
same:
    xor ecx, ecx                    # whether the strings at rdi and rsi are the same
compare:
    movzx eax, byte ptr [rdi + rcx]
    cmp al, byte ptr [rsi + rcx]
    jne compared
    add rcx, 1
    test eax, eax
    jne compare
compared:
    ret
"""


def usage(name: str) -> bytes:
    return (
        f"{name} [--tokens N] [--threads N] [--weights FILE] [--raw] [--temperature T] [--top-k N] [--top-p P]\n"
        "    [--min-p P] [--seed N] [--] [PROMPT ...]\n"
        "Answers a prompt, or standard input. Behind -- all is the prompt; without it options come first.\n"
        f"--tokens: at most so many ({DEFAULT_TOKENS}). --threads: workers (all CPUs).\n"
        "--weights: the file beside this one unless given. --raw: go on with a text, without the chat template.\n"
        "--temperature: 0 (the default) takes the likeliest token. Else one is drawn: of the likeliest --top-k\n"
        f"({DEFAULT_TOP_K}) the fewest that have --top-p (1) together, and of these those with --min-p (0) of the "
        "likeliest's.\n"
    ).encode()


def constants(name: str) -> dict[str, bytes]:
    """What the text names."""
    words = ("help", "raw", "weights", "tokens", "threads", "temperature", "top-k", "top-p", "min-p", "seed")
    named = {f"text_{word.replace('-', '_')}": f"--{word}\0".encode() for word in words}
    return {"usage": usage(name), "text_end": b"--\0", **named}
