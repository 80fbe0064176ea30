"""The machine code that draws a token: settings, random numbers, and the program that draws.

    int     NAME_sampling(NAME_model *model, const sapper_model_sampling *how)
    int32_t NAME_pick(NAME_model *model)

Enters: a plan whose model has the program `draw`. Leaves: the functions; none for another plan. Holds: a seed gives the
random numbers of draws.py, bit for bit, and the kernels are those of a session, so that tokens are
those of `sapper generate`. Settings that are out of range change nothing. Numbers are compared as the integers that
their bits are, which keeps the order of those that are not negative; a NaN and what is negative lie above all others.
"""

from __future__ import annotations

import struct

from .draws import FIRST, SECOND, STEP
from .opening import BAD_SAMPLING, DRAWS, replaced
from .plan import DRAWING, Model, Plan
from .written import Written, written

MIXING = {"STEP": STEP - (1 << 64), "FIRST": FIRST - (1 << 64), "SECOND": SECOND - (1 << 64)}
"""Numbers that random numbers are made with, as signed ones."""
MAX_TEMPERATURE = 1e6
TEMPERATURE, TOP_K, TOP_P, MIN_P, SEED = 0, 4, 8, 12, 16
"""Offsets of a sapper_model_sampling."""

MIX = """\
    mov rcx, rax
    shr rcx, 30
    xor rax, rcx
    mov rcx, @FIRST
    imul rax, rcx
    mov rcx, rax
    shr rcx, 27
    xor rax, rcx
    mov rcx, @SECOND
    imul rax, rcx
    mov rcx, rax
    shr rcx, 31
    xor rax, rcx
"""
"""What draws.py makes of what it counted, in rax."""

_SAMPLING = """
    # rdi: model; rsi: sapper_model_sampling, or null for the likeliest token
    test rsi, rsi
    je likeliest
    mov eax, @BAD_SAMPLING
    mov ecx, dword ptr [rsi + @TEMPERATURE]
    cmp ecx, @most_heat
    ja refused
    mov edx, dword ptr [rsi + @TOP_K]
    lea r8d, [rdx - 1]
    cmp r8d, @most_top_k
    jae refused
    mov r8d, @candidates
    cmp edx, r8d
    cmova edx, r8d
    mov r8d, dword ptr [rsi + @TOP_P]
    lea r9d, [r8 - 1]               # 0 is not in range
    cmp r9d, @one
    jae refused
    mov r9d, dword ptr [rsi + @MIN_P]
    cmp r9d, @one
    ja refused
    mov dword ptr [rdi + @temperature], ecx
    mov dword ptr [rdi + @top_k], edx
    mov dword ptr [rdi + @top_p], r8d
    mov dword ptr [rdi + @min_p], r9d
    mov rax, qword ptr [rsi + @SEED]
    mov qword ptr [rdi + @DRAWS], rax
    xor eax, eax
refused:
    ret
likeliest:
    xor eax, eax
    mov dword ptr [rdi + @temperature], eax
    ret
"""

_PICK = """
    # rbx: the model; SplitMix64 counts at DRAWS, and the high 24 bits of what it makes are the random number
    push rbx
    mov rbx, rdi
    cmp dword ptr [rbx + @temperature], 0
    jne draw
    mov eax, dword ptr [rbx + @picked]
    pop rbx
    ret
draw:
    mov rax, qword ptr [rbx + @DRAWS]
    mov rcx, @STEP
    add rax, rcx
    mov qword ptr [rbx + @DRAWS], rax
{mix}    shr rax, 40
    vmovd xmm0, eax
    vcvtsi2ss xmm0, xmm0, eax       # exact: 24 bits
    lea rcx, @scale
    vmulss xmm0, xmm0, dword ptr [rcx]
    vmovss dword ptr [rbx + @u], xmm0
    mov rdi, rbx
    lea rsi, [rbx + @draw_control]
    lea rax, @run
    call rax
    mov eax, dword ptr [rbx + @drawn]
    pop rbx
    ret
"""


def draw_functions(plan: Plan[Model]) -> list[tuple[Written, bool]]:
    """The functions, each with whether others may call it."""
    model = plan.model
    if not model.draws:
        return []

    numbers = {
        "BAD_SAMPLING": BAD_SAMPLING, "DRAWS": DRAWS, "TEMPERATURE": TEMPERATURE, "TOP_K": TOP_K, "TOP_P": TOP_P,
        "MIN_P": MIN_P, "SEED": SEED, **MIXING,
        "most_heat": bits(MAX_TEMPERATURE), "one": bits(1.0), "candidates": min(model.candidates, model.vocabulary),
        "most_top_k": model.candidates, "picked": plan.place(model.picked),
        "draw_control": plan.programs["draw"].control, **{name: plan.place(name) for name in DRAWING},
    }
    name = model.name
    return [
        (written(f"{name}_sampling", _SAMPLING, numbers), True),
        (written(f"{name}_pick", replaced(_PICK, mix=MIX), numbers, {"run": f"{name}.run"},
                 {"scale": struct.pack("<f", 2.0**-24)}), True),
    ]


def bits(value: float) -> int:
    """Of an f32."""
    return int.from_bytes(struct.pack("<f", value), "little")
