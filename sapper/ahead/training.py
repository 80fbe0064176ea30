"""The functions of the C ABI of a model in training, in machine code: train, evaluate, save and what they need.

Enters: a `Plan`, the digest of what the weights file says of itself. Leaves: the functions, with those of opening.py.
docs/c-abi.md is written for the caller. Holds: with another status than OK, nothing has changed; a file that is saved
is there as a whole, under its name, or not at all.

    int     NAME_open(const char *weights, int64_t threads, NAME_model **model)    opening.py
    int     NAME_train(NAME_model *model, const int32_t *tokens, const int32_t *targets,
                       const sapper_recipe *recipe, sapper_trained *trained)
    int     NAME_evaluate(NAME_model *model, const int32_t *tokens, const int32_t *targets, double *loss)
    int64_t NAME_steps(const NAME_model *model)
    int     NAME_save(const NAME_model *model, const char *path)
    int     NAME_save_state(const NAME_model *model, const char *path)
    int     NAME_load_state(NAME_model *model, const char *path)
    void    NAME_close(NAME_model *model)    opening.py

All arithmetic is that of kernels: the program "numbers" makes the variables of a step, which these functions put into
the argument blocks of the program "train".
Source: open(2), fstat(2), mmap(2), write(2), fsync(2), rename(2), unlink(2).
"""

from __future__ import annotations

import struct

from .opening import READ, opening_of, replaced
from .plan import TRAINING, Plan, Training
from .tables import STATE_HEAD
from .written import Written, written

MAX_PATH_BYTES = 4096
ENDING = b".part\0"
"""Of a file's name while it is written."""

_TAKE = """
    # take(rdi: model, rsi: tokens, rdx: targets) -> status: looks at all of them, then copies them
    xor ecx, ecx
    xor r8d, r8d                    # targets that count
    mov eax, @BAD_TOKEN
check:
    cmp dword ptr [rsi + rcx*4], @vocabulary
    jae leave
    mov r9d, dword ptr [rdx + rcx*4]
    test r9d, r9d
    js passed
    cmp r9d, @vocabulary
    jae leave
    add r8d, 1
passed:
    add rcx, 1
    cmp rcx, @count
    jb check
    test r8d, r8d
    je leave
    xor ecx, ecx
    xor r8d, r8d
copy:
    mov r9d, dword ptr [rsi + rcx*4]
    mov dword ptr [rdi + rcx*4 + @tokens], r9d
    mov r9d, dword ptr [rdx + rcx*4]
    mov dword ptr [rdi + rcx*4 + @targets], r9d
    test r9d, r9d
    cmovs r9d, r8d
    mov dword ptr [rdi + rcx*4 + @wanted], r9d
    add rcx, 1
    cmp rcx, @count
    jb copy
    xor eax, eax
leave:
    ret
"""

_TRAIN = """
    push rbx
    push rbp
    push r12
    mov rbx, rdi
    mov rbp, rcx                    # the recipe
    mov r12, r8                     # where the result goes, or null
    mov eax, @BAD_RECIPE            # numbers that are not negative have the order of their bits; NaN lies above
{limits}
    lea rax, @take
    call rax
    test eax, eax
    jne leave
{recipe}
    mov rdi, rbx
    lea rsi, [rbx + @numbers_control]
    lea rax, @run
    call rax
{variables}
    mov rdi, rbx
    lea rsi, [rbx + @train_control]
    lea rax, @run
    call rax
    xor eax, eax
    test r12, r12
    je leave
    mov rcx, qword ptr [rbx + @loss]
    mov qword ptr [r12], rcx
    mov ecx, dword ptr [rbx + @norm]
    mov dword ptr [r12 + 8], ecx
leave:
    pop r12
    pop rbp
    pop rbx
    ret
"""

_LIMIT = """\
    mov r9, {limit}    # {name}
    cmp qword ptr [rbp + {place}], r9
    jae leave
"""

_RECIPE = """\
    mov rax, qword ptr [rbp + {place}]
    mov qword ptr [rbx + @recipe + {place}], rax
"""

_VARIABLE = """\
    mov edx, dword ptr [rbx + @numbers + {place}]  # {name}
    mov rdi, rbx
    lea rsi, @train_{name}
    lea rax, @set
    call rax
"""

_EVALUATE = """
    push rbx
    push rbp
    push r12
    mov rbx, rdi
    mov rbp, rcx
    lea rax, @take
    call rax
    test eax, eax
    jne leave
    mov rdi, rbx
    lea rsi, [rbx + @evaluate_control]
    lea rax, @run
    call rax
    mov rax, qword ptr [rbx + @loss]
    mov qword ptr [rbp], rax
    xor eax, eax
leave:
    pop r12
    pop rbp
    pop rbx
    ret
"""

_STEPS = """
    mov rax, qword ptr [rdi + @steps]   # a whole number in f64
    mov rcx, rax
    shr rcx, 52
    je none
    sub ecx, 1075                   # negative: how often the mantissa is halved
    mov rdx, 0xfffffffffffff
    and rax, rdx
    add rdx, 1
    add rax, rdx
halve:
    test ecx, ecx
    je done
    shr rax, 1
    add ecx, 1
    jmp halve
none:
    xor eax, eax
done:
    ret
"""

_SAVE = """
    sub rsp, 24
    mov rax, qword ptr [rdi + @WEIGHTS]
    mov qword ptr [rsp], rax
    mov rax, @weights_bytes
    mov qword ptr [rsp + 8], rax
    mov rdi, rsi
    mov rsi, rsp
    mov edx, 1
    lea rax, @write
    call rax
    add rsp, 24
    ret
"""

_SAVE_STATE = """
    sub rsp, @list_room
    lea rax, @state_head
    mov qword ptr [rsp], rax
    mov eax, @state_head_bytes
    mov qword ptr [rsp + 8], rax
{pieces}
    mov rdi, rsi
    mov rsi, rsp
    mov edx, @pieces
    lea rax, @write
    call rax
    add rsp, @list_room
    ret
"""

_PIECE = """\
    mov rax, {place}    # {name}
    add rax, rdi
    mov qword ptr [rsp + {at}], rax
    mov rax, {bytes}
    mov qword ptr [rsp + {at} + 8], rax
"""

_WRITE = """
    # write(rdi: a path, rsi: pieces of memory, each its address and bytes, rdx: their number) -> status
    # rbx: the next piece; rbp: pieces left; r12: the path; r13: the file; r14: the next byte; r15: bytes left
    # the stack: the name while it is written
    push rbx
    push rbp
    push r12
    push r13
    push r14
    push r15
    sub rsp, @path_room
    mov rbx, rsi
    mov rbp, rdx
    mov r12, rdi
    mov r8, rsp
    xor ecx, ecx
name:
    mov eax, @NO_WRITE
    cmp rcx, @most_path
    jae leave
    movzx eax, byte ptr [r12 + rcx]
    mov byte ptr [r8 + rcx], al
    add rcx, 1
    test eax, eax
    jne name
    mov eax, @ending_low
    mov dword ptr [r8 + rcx - 1], eax
    mov eax, @ending_high
    mov dword ptr [r8 + rcx + 3], eax

    mov rdi, rsp                    # open(name, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666)
    mov esi, 0x80241
    mov edx, 0x1b6
    mov eax, @sys_open
    syscall
    mov r13, rax
    mov eax, @NO_WRITE
    test r13, r13
    js leave
piece:
    mov r14, qword ptr [rbx]
    mov r15, qword ptr [rbx + 8]
more:
    mov edi, r13d
    mov rsi, r14
    mov rdx, r15
    mov eax, @sys_write
    syscall
    cmp rax, -4                     # EINTR
    je more
    cmp rax, 1
    jl failed
    add r14, rax
    sub r15, rax
    jne more
    add rbx, 16
    sub rbp, 1
    jne piece
    mov edi, r13d
    mov eax, @sys_fsync
    syscall
    test rax, rax
    js failed
    mov edi, r13d
    mov eax, @sys_close
    syscall
    mov rdi, rsp
    mov rsi, r12
    xor r10d, r10d                  # flags, where the system's call has some
    mov eax, @sys_rename
    syscall
    test rax, rax
    js remove
    xor eax, eax
    jmp leave
failed:
    mov edi, r13d
    mov eax, @sys_close
    syscall
remove:
    mov rdi, rsp
    xor r10d, r10d
    mov eax, @sys_unlink
    syscall
    mov eax, @NO_WRITE
leave:
    add rsp, @path_room
    pop r15
    pop r14
    pop r13
    pop r12
    pop rbp
    pop rbx
    ret
"""

_LOAD_STATE = """
    # rbx: model; rbp: the file as it is mapped; r12: status
    push rbx
    push rbp
    push r12
    mov rbx, rdi
    mov rdi, rsi
    mov rsi, @state_bytes
    mov edx, @READ
    lea rax, @map
    call rax
    cmp rax, @LARGEST_STATUS
    jbe leave
    mov rbp, rax
    mov r12d, @BAD_CONTENT
    lea rax, @state_head
    xor ecx, ecx
head:
    mov rdx, qword ptr [rax + rcx]
    cmp rdx, qword ptr [rbp + rcx]
    jne unmap
    add rcx, 8
    cmp rcx, @state_head_bytes
    jb head
    mov rsi, rbp
    add rsi, rcx
    mov rdx, qword ptr [rsi]        # steps: from 1 to 2**52, as f64
    mov rcx, @one
    sub rdx, rcx
    mov rcx, @range_of_steps
    cmp rdx, rcx
    jae unmap
{copies}
    xor r12d, r12d
unmap:
    mov rdi, rbp
    mov rsi, @state_bytes
    mov eax, @sys_munmap
    syscall
    mov eax, r12d
leave:
    pop r12
    pop rbp
    pop rbx
    ret
copy:
    mov eax, dword ptr [rsi]        # rdx bytes from rsi on, which moves on
    mov dword ptr [rdi], eax
    add rsi, 4
    add rdi, 4
    sub rdx, 4
    jne copy
    ret
"""

_COPY = """\
    mov rdi, {place}    # {name}
    add rdi, rbx
    mov rdx, {bytes}
    call copy
"""


def training_functions(plan: Plan[Training], head_digest: int) -> list[tuple[Written, bool]]:
    """The functions of the ABI and those they call, each with whether others may call it."""
    model, name = plan.model, plan.model.name
    opening = opening_of(plan, head_digest)
    ending = ENDING.ljust(8, b"\0")
    saved = [(key, plan.place(key), model.arrays[key].nbytes) for key in ("steps", *model.saved)]
    numbers = opening.numbers | {
        "vocabulary": model.vocabulary, "count": len(model.arrays["tokens"]),
        **{key: plan.place(key) for key in TRAINING},
        "most_path": MAX_PATH_BYTES, "path_room": MAX_PATH_BYTES + 16,
        "ending_low": int.from_bytes(ending[:4], "little"), "ending_high": int.from_bytes(ending[4:], "little"),
        "state_head_bytes": len(model.state_head), "state_bytes": len(model.state_head) + sum(n for *_, n in saved),
        "pieces": 1 + len(saved), "list_room": 16 * (1 + len(saved)) + 8, "one": _bits(1.0),
        "range_of_steps": _bits(2.0**52) - _bits(1.0) + 1,
        "READ": READ, "sys_write": 1, "sys_fsync": 74, "sys_rename": 82, "sys_unlink": 87,
    }
    reaches = opening.reaches | {key: f"{name}.{key}" for key in ("take", "write", STATE_HEAD)}
    train = replaced(
        _TRAIN,
        limits="".join(replaced(_LIMIT, name=key, place=str(8 * place), limit=str(_bits(below)))
                       for place, (key, below) in enumerate(model.recipe.items())),
        recipe="".join(replaced(_RECIPE, place=str(8 * place)) for place in range(len(model.recipe))),
        variables="".join(replaced(_VARIABLE, name=key, place=str(4 * place))
                          for key, place in model.variables["train"].items()))
    save_state = replaced(_SAVE_STATE, pieces="".join(
        replaced(_PIECE, name=key, place=str(place), bytes=str(size), at=str(16 * number))
        for number, (key, place, size) in enumerate(saved, 1)))
    load_state = replaced(_LOAD_STATE, copies="".join(
        replaced(_COPY, name=key, place=str(place), bytes=str(size)) for key, place, size in saved))
    public = {"open": opening.outer["open"], "train": train, "evaluate": _EVALUATE, "steps": _STEPS, "save": _SAVE,
              "save_state": save_state, "load_state": load_state, "close": opening.outer["close"]}
    inner = {**opening.inner, "take": _TAKE, "write": _WRITE}
    return [
        *((written(f"{name}_{key}", text, numbers, reaches), True) for key, text in public.items()),
        *((written(f"{name}.{key}", text, numbers, reaches), False) for key, text in inner.items()),
    ]


def _bits(number: float) -> int:
    return int(struct.unpack("<q", struct.pack("<d", number))[0])
