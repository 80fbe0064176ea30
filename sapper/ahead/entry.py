"""The functions of the C ABI of a model that answers, in machine code: prefill, step and what they need.

Enters: a `Plan`, the digest of the weights. Leaves: the functions, with those of opening.py. docs/c-abi.md is written
for the caller. Holds: with another status than OK, nothing has changed.

    int          NAME_open(const char *weights, int64_t threads, NAME_model **model)    opening.py
    int          NAME_prefill(NAME_model *model, const int32_t *tokens, int64_t count)
    int          NAME_step(NAME_model *model, int32_t token)
    const float *NAME_logits(const NAME_model *model)
    int32_t      NAME_likeliest(const NAME_model *model)
    int64_t      NAME_position(const NAME_model *model)
    int          NAME_rewind(NAME_model *model, int64_t position)
    int          NAME_sampling(NAME_model *model, const sapper_model_sampling *how)    draw.py
    int32_t      NAME_pick(NAME_model *model)
    void         NAME_close(NAME_model *model)    opening.py
"""

from __future__ import annotations

from .opening import opening_of, replaced
from .plan import Model, Plan
from .written import Written, written

_STEP = """
    push rbx
    push rbp
    push r12
    mov rbx, rdi
    mov rbp, qword ptr [rbx + @POSITION]
    mov eax, @BAD_TOKEN
    cmp esi, @vocabulary
    jae leave
    mov eax, @CONTEXT_FULL
    cmp rbp, @context
    jae leave
    mov dword ptr [rbx + @token], esi
    mov r12d, 1
{variables}
    mov rdi, rbx
    lea rsi, [rbx + @step_control]
    lea rax, @run
    call rax
    add rbp, 1
    mov qword ptr [rbx + @POSITION], rbp
    xor eax, eax
leave:
    pop r12
    pop rbp
    pop rbx
    ret
"""

_PREFILL = """
    # rbx: model; r12: the next token; r13: tokens left; r14: position; r15: tokens of this chunk
    push rbx
    push r12
    push r13
    push r14
    push r15
    mov rbx, rdi
    mov r12, rsi
    mov r13, rdx
    mov r14, qword ptr [rbx + @POSITION]
    mov eax, @BAD_TOKEN
    cmp r13, 1
    jl leave
    mov ecx, @context
    sub rcx, r14
    mov eax, @CONTEXT_FULL
    cmp r13, rcx
    ja leave
    mov eax, @BAD_TOKEN             # all tokens are looked at before any is run
    xor ecx, ecx
check:
    cmp dword ptr [r12 + rcx*4], @vocabulary
    jae leave
    add rcx, 1
    cmp rcx, r13
    jb check
    cmp r13, 1
    jne chunk
    mov rdi, rbx                    # a single token is a step
    mov esi, dword ptr [r12]
    lea rax, @step
    call rax
    jmp leave
chunk:
    mov r15d, @chunk
    cmp r13, r15
    cmovb r15, r13
    xor ecx, ecx
copy:
    mov eax, dword ptr [r12 + rcx*4]
    mov dword ptr [rbx + rcx*4 + @tokens], eax
    add rcx, 1
    cmp rcx, r15
    jb copy
    lea eax, [r15 - 1]
    mov dword ptr [rbx + @last], eax
{variables}
    mov rdi, rbx
    lea rsi, [rbx + @prefill_control]
    lea rax, @run
    call rax
    add r14, r15
    mov qword ptr [rbx + @POSITION], r14
    lea r12, [r12 + r15*4]
    sub r13, r15
    jne chunk
    xor eax, eax
leave:
    pop r15
    pop r14
    pop r13
    pop r12
    pop rbx
    ret
"""

_VARIABLE = """
    imul rdx, {at}, {of_position}   # {name}
    imul rax, {count}, {of_count}
    add rdx, rax
    mov rdi, rbx
    lea rsi, @{program}_{name}
    lea rax, @set
    call rax
"""

_LOGITS = """
    lea rax, [rdi + @logits]
    ret
"""

_LIKELIEST = """
    mov eax, dword ptr [rdi + @picked]
    ret
"""

_POSITION = """
    mov rax, qword ptr [rdi + @POSITION]
    ret
"""

_REWIND = """
    mov eax, @BAD_POSITION
    cmp rsi, qword ptr [rdi + @POSITION]
    ja refused
    mov qword ptr [rdi + @POSITION], rsi
    xor eax, eax
refused:
    ret
"""


def entry_functions(plan: Plan[Model], weights_digest: int) -> list[tuple[Written, bool]]:
    """The functions of the ABI and those they call, each with whether others may call it."""
    model, name = plan.model, plan.model.name
    opening = opening_of(plan, weights_digest)
    numbers = opening.numbers | {
        "vocabulary": model.vocabulary, "context": model.context, "chunk": model.chunk,
        "tokens": plan.place(model.tokens), "last": plan.place(model.last), "token": plan.place(model.token),
        "logits": plan.place(model.logits), "picked": plan.place(model.picked),
    }
    reaches = opening.reaches | {"step": f"{name}_step"}
    prefill = replaced(_PREFILL, variables=_setting(plan, "prefill", "r14", "r15"))
    step = replaced(_STEP, variables=_setting(plan, "step", "rbp", "r12"))
    public = {"open": opening.outer["open"], "prefill": prefill, "step": step, "logits": _LOGITS,
              "likeliest": _LIKELIEST, "position": _POSITION, "rewind": _REWIND, "close": opening.outer["close"]}
    return [
        *((written(f"{name}_{key}", text, numbers, reaches), True) for key, text in public.items()),
        *((written(f"{name}.{key}", text, numbers, reaches), False) for key, text in opening.inner.items()),
    ]


def _setting(plan: Plan[Model], program_name: str, position: str, count: str) -> str:
    """Code that sets a program's variables from the registers with the position and the number of tokens."""
    return "".join(
        replaced(_VARIABLE, name=name, program=program_name, at=position, count=count, of_position=str(of_position),
                 of_count=str(of_count))
        for name, (of_position, of_count) in plan.model.variables[program_name].items())
