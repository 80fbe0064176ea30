"""The command line of an executable: part of the text of start.py and learn.py.

Enters: the stack at entry (rbp after it), what options there are. Leaves: at `options_read` r12, the number of the
first argument that belongs to none, and the settings on the stack. Holds: what is not understood, or an option behind
such an argument, ends the process with the usage and status 2. A number is digits with at most one point among them:
up to 15, both parts of the quotient by a power of ten are exact as f64, so that it is rounded as Python rounds it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .opening import STATUS, replaced

NUMBERS = {"BAD_CPU": STATUS["BAD_CPU"][0]}
NUMBER, WHOLE, REAL, QUOTIENT, TEXT, FLAG = "number", "whole", "real", "quotient", "text", "flag"
"""What an option is followed by: a whole number from 1 to 99999999; one of up to 18 digits; a number, as f32; a number,
as two i64 of which it is the quotient; an argument, whose address it is; nothing, and it is 1. But for f32, each is 8
bytes on the stack."""
WEIGHTS, THREADS = 8, 24
"""Where settings of all executables lie on the stack: the file or null, and a number or 0."""


@dataclass(frozen=True, slots=True)
class Option:
    """place: from rsp on."""

    name: str
    kind: str
    place: int


COMMON = (Option("weights", TEXT, WEIGHTS), Option("threads", NUMBER, THREADS))

_BEGIN = """\
    mov rbp, rsp
    sub rsp, {room}
    and rsp, -64
{defaults}    lea rax, @check_cpu
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
    lea rsi, @option_end
    call same
    je options_read
    lea rsi, @option_help
    call same
    je help
"""

_DEFAULT = """\
    mov rax, {value}
    mov qword ptr [rsp + {place}], rax
"""

_OPTION = """\
    lea rsi, @option_{word}
    lea r8, [rsp + {place}]
    call same
    je {kind}
"""

_KINDS = {
    FLAG: """\
flag:
    mov eax, 1
    mov qword ptr [r8], rax
    jmp option
""",
    TEXT: """\
text:
    cmp r12, qword ptr [rbp]
    jae usage
    mov rax, qword ptr [rbp + r12*8 + 8]
    mov qword ptr [r8], rax
    add r12, 1
    jmp option
""",
    NUMBER: """\
number:
    call digits
    test edx, edx
    jne usage
    lea rcx, [rax - 1]
    cmp rcx, 99999999
    jae usage
    mov qword ptr [r8], rax
    jmp option
""",
    WHOLE: """\
whole:
    call digits
    test edx, edx
    jne usage
    mov qword ptr [r8], rax
    jmp option
""",
    REAL: """\
real:
    call parts
    vmovq xmm0, rax
    vcvtsi2sd xmm0, xmm0, rax
    vmovq xmm1, rcx
    vcvtsi2sd xmm1, xmm1, rcx
    vdivsd xmm0, xmm0, xmm1
    vcvtsd2ss xmm0, xmm0, xmm0
    vmovss dword ptr [r8], xmm0
    jmp option
""",
    QUOTIENT: """\
quotient:
    call parts
    mov qword ptr [r8], rax
    mov qword ptr [r8 + 8], rcx
    jmp option
""",
}

_ROUTINES = """\
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
    lea r8, [r12 + 1]               # what looks like an option behind the first word is neither
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
parts:
    call digits                     # a number: rax over rcx
    cmp r9d, 15
    ja usage
    mov ecx, 1
power:
    sub edx, 1
    js powered
    imul rcx, rcx, 10
    jmp power
powered:
    ret
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


def options_text(options: Sequence[Option], defaults: Mapping[int, int], room: int) -> str:
    """defaults: place -> the 8 bytes there. room: of the settings on the stack, in bytes."""
    kinds = {option.kind for option in options}
    return "".join([
        replaced(_BEGIN, room=str(room), defaults="".join(
            replaced(_DEFAULT, value=str(value), place=str(place)) for place, value in defaults.items())),
        *(replaced(_OPTION, word=_word(option.name), place=str(option.place), kind=option.kind) for option in options),
        "    jmp usage\n", *(text for kind, text in _KINDS.items() if kind in kinds), _ROUTINES])


def constants(options: Sequence[Option], usage: bytes) -> dict[str, bytes]:
    """What the text names."""
    names = ("help", *(option.name for option in options))
    return {"usage": usage, "option_end": b"--\0",
            **{f"option_{_word(name)}": f"--{name}\0".encode() for name in names}}


def _word(name: str) -> str:
    return name.replace("-", "_")
