"""A model in training as a program: learns from a text, tells of each step, saves, without a C library.

    NAME [--steps N] [--rate R] [--warmup N] [--decay D] [--clip C] [--balance B] [--seed N] [--save-every N]
         [--threads N] [--weights FILE] [--] [TEXT]

Enters: a plan with a tokenizer. Leaves: `NAME_start`, the entry of the executable. Holds: without a file the text is
read from standard input; sequences come in the order of a seed (draws.py) and the rate changes as in `sapper train`, so
that losses and weights are the same, bit for bit. The weights file is replaced as a whole, after some steps and at the
end; the optimiser's state lies beside it as training.safetensors, and where there is one it is gone on with. A state
waits under another name until its weights are there, so that between them lie two renamings. For the rest see
process.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction

from ..runtime.buffers import LINE_BYTES
from ..runtime.system import round_up
from . import options, process
from .draw import MIX, MIXING
from .opening import STATUS, replaced
from .options import COMMON, NUMBER, QUOTIENT, THREADS, WEIGHTS, WHOLE, Option, options_text
from .plan import LEARNING, Plan, Training
from .tables import WORDS
from .written import Written, written

ENDING = ".model"
"""Of the directory beside the executable, and the weights in it."""
FILE = "model.safetensors"
STATE_NAME, WAITING = b"training.safetensors\0", b".next\0"
MOST_PATH, NAME_BYTES = 4000, 4096
"""Bytes of the weights' path, and of one that is made of it."""

_START = """
    # rbx: model; rbp: the stack at entry, then tokens of a step and what follows each; r12: an argument's number, then
    # the step; r13: a buffer for paths, the text, tokens, the order of windows; r14: end of the text, then steps that
    # were done before; r15: room left for text, then the end of a line, or the weights' path
    # the stack: 0 model, 8 weights, 24 threads, 32 steps from one saving to the next, 40 seed, 48 tokens of the text,
    # 56 the text's file, then windows, 64 windows that were seen of this order, 72 what random numbers count, 80 and
    # 96 times, 112 steps to the next saving, 120 sequences of the step so far, 128 .. 256 CPUs, then a line of text,
    # 640 settings
{options}{begin}    xor ecx, ecx
setting:
    mov rax, qword ptr [rsp + rcx*8 + 640]
    mov qword ptr [rbx + rcx*8 + @settings], rax
    add rcx, 1
    cmp rcx, @setting_words
    jb setting

    mov rsi, qword ptr [rsp + 8]    # the state's path: what the weights' has up to the last slash, and its own name
    lea rdi, [r13 + @state_place]
    xor ecx, ecx
    xor edx, edx                    # bytes up to the last slash
path:
    movzx eax, byte ptr [rsi + rcx]
    test eax, eax
    je path_read
    cmp rcx, @MOST_PATH
    jae long_path
    mov byte ptr [rdi + rcx], al
    add rcx, 1
    cmp eax, 47
    cmove rdx, rcx
    jmp path
long_path:
    mov eax, @NO_FILE
    jmp weights_refused
path_read:
    add rdi, rdx
    lea rsi, @state_name
    call copy_name
    lea rsi, [r13 + @state_place]
    lea rdi, [r13 + @waiting_place]
    call copy_name
    lea rsi, @waiting
    call copy_name

    mov rdi, rbx
    lea rsi, [r13 + @state_place]
    lea rax, @load_state
    call rax
    cmp eax, @NO_FILE
    je state_known                  # a new training
    test eax, eax
    je state_known
    lea rcx, [r13 + @state_place]
    mov qword ptr [rsp + 8], rcx
    jmp weights_refused
state_known:

    xor edi, edi                    # the text
    cmp r12, qword ptr [rbp]
    jae opened
    mov rdi, qword ptr [rbp + r12*8 + 8]
    add r12, 1
    cmp r12, qword ptr [rbp]
    jne usage
    mov esi, 0x80000                # open(path, O_RDONLY | O_CLOEXEC)
    xor edx, edx
    mov eax, 2
    syscall
    mov rdi, rax
    test rdi, rdi
    js refused
opened:
    mov qword ptr [rsp + 56], rdi
    lea r14, [r13 + @text_place]
    mov r15d, @text_bytes
{read}too_long:
    lea rsi, @text_too_long
    mov edx, @text_too_long_bytes
    jmp failed
all_read:
    mov rdi, @work_place
    add rdi, r13
    lea rax, @words
    mov qword ptr [rdi], rax        # where the tables are
    lea rsi, [r13 + @text_place]
    mov rdx, r14
    sub rdx, rsi
    lea rcx, [r13 + @tokens_place]
    mov r8d, @text_bytes
    lea rax, @encode
    call rax
    mov qword ptr [rsp + 48], rax
    sub rax, 1
    js too_short
    mov ecx, @length
    xor edx, edx
    div rcx
    test rax, rax
    je too_short
    mov qword ptr [rsp + 56], rax
    mov qword ptr [rsp + 64], rax
    mov rax, qword ptr [rsp + 40]
    mov qword ptr [rsp + 72], rax

    mov rdi, rbx
    lea rax, @done_before
    call rax
    mov r14, rax
    cmp r14, qword ptr [rsp + 640]
    jae all_done
    mov rax, qword ptr [rsp + 32]
    mov qword ptr [rsp + 112], rax
    lea rbp, [r13 + @batch_place]
    xor r12d, r12d
step:
    add r12, 1
    xor ecx, ecx
    mov qword ptr [rsp + 120], rcx
sequence:
    mov rcx, qword ptr [rsp + 64]
    cmp rcx, qword ptr [rsp + 56]
    jb in_order
    mov r8, rcx
    mov r9, qword ptr [rsp + 72]
    call shuffle
    mov qword ptr [rsp + 72], r9
    xor ecx, ecx
in_order:
    lea rax, [rcx + 1]
    mov qword ptr [rsp + 64], rax
    cmp r12, r14
    jbe sequence_taken              # it was learned from before
    lea rsi, [r13 + @order_place]
    mov esi, dword ptr [rsi + rcx*4]
    mov ecx, @length
    imul rsi, rcx
    lea rax, [r13 + @tokens_place]
    lea rsi, [rax + rsi*4]
    imul rdi, qword ptr [rsp + 120], @length_bytes
    add rdi, rbp
    xor ecx, ecx
token:
    mov eax, dword ptr [rsi + rcx*4]
    mov dword ptr [rdi + rcx*4], eax
    mov eax, dword ptr [rsi + rcx*4 + 4]
    mov dword ptr [rdi + rcx*4 + @batch_bytes], eax
    add rcx, 1
    cmp rcx, @length
    jb token
sequence_taken:
    mov rcx, qword ptr [rsp + 120]
    add rcx, 1
    mov qword ptr [rsp + 120], rcx
    cmp rcx, @sequences
    jb sequence
    cmp r12, r14
    jbe step

    lea rsi, [rsp + 80]
    call clock
    mov rdi, rbx
    lea rsi, [rbx + @plan_control]
    lea rax, @run
    call rax
    mov rdi, rbx
    mov rsi, rbp
    lea rdx, [rbp + @batch_bytes]
    lea rcx, [rbx + @recipe]
    xor r8d, r8d
    lea rax, @train
    call rax
    test eax, eax
    jne told
    mov rdi, rbx
    lea rsi, [rbx + @tell_control]
    lea rax, @run
    call rax
    lea rsi, [rsp + 96]
    call clock
    mov eax, dword ptr [rbx + @told + 8]
    test eax, eax
    je no_numbers
    lea r15, [rsp + 256]            # the line
    lea rsi, @text_step
    mov edx, @text_step_bytes
    call put
    mov rax, r12
    call decimal
    lea rsi, @text_of
    mov edx, @text_of_bytes
    call put
    mov rax, qword ptr [rsp + 640]
    call decimal
    lea rsi, @text_loss
    mov edx, @text_loss_bytes
    call put
    mov eax, dword ptr [rbx + @told]
    mov ecx, 10000
    call fixed
    lea rsi, @text_norm
    mov edx, @text_norm_bytes
    call put
    mov eax, dword ptr [rbx + @told + 4]
    mov ecx, 100
    call fixed
    lea rsi, @comma
    mov edx, 2
    call put
    mov eax, @step_tokens
    lea rcx, [rsp + 80]
    lea rdx, [rsp + 96]
    call speed
    mov al, 10                      # in place of the last ", "
    mov byte ptr [r15 - 2], al
    lea rsi, [rsp + 256]
    lea rdx, [r15 - 1]
    sub rdx, rsi
    mov edi, 1
    call write
    cmp r12, qword ptr [rsp + 640]
    jae learned
    mov rax, qword ptr [rsp + 112]
    sub rax, 1
    mov qword ptr [rsp + 112], rax
    jne step                        # from 0 on it never gets there
    mov rax, qword ptr [rsp + 32]
    mov qword ptr [rsp + 112], rax
    mov r15, qword ptr [rsp + 8]
    call save
    jmp step
learned:
    mov r15, qword ptr [rsp + 8]
    call save
    xor edi, edi
    jmp exit

too_short:
    lea rsi, @text_too_short
    mov edx, @text_too_short_bytes
    jmp failed
all_done:
    lea rsi, @text_all_done
    mov edx, @text_all_done_bytes
    jmp failed
no_numbers:
    lea rsi, @text_no_numbers
    mov edx, @text_no_numbers_bytes
    jmp failed

save:
    # the state under the name in which it waits, the weights, whose path is at r15, then its own name
    sub rsp, 8
    mov rdi, rbx
    lea rsi, [r13 + @waiting_place]
    lea rax, @save_state
    call rax
    test eax, eax
    jne told
    mov rdi, rbx
    mov rsi, r15
    lea rax, @save_weights
    call rax
    test eax, eax
    jne told
    lea rdi, [r13 + @waiting_place]
    lea rsi, [r13 + @state_place]
    xor r10d, r10d                  # flags, where the system's call has some
    mov eax, 82
    syscall
    test rax, rax
    mov eax, @NO_WRITE
    js told
    add rsp, 8
    ret
copy_name:
    movzx eax, byte ptr [rsi]       # to rdi, which is left at the 0 behind it
    mov byte ptr [rdi], al
    test eax, eax
    je name_copied
    add rsi, 1
    add rdi, 1
    jmp copy_name
name_copied:
    ret
shuffle:
    # r8 windows in another order, with random numbers that r9 counts (Fisher and Yates; SplitMix64)
    lea rdi, [r13 + @order_place]
    xor ecx, ecx
place:
    mov dword ptr [rdi + rcx*4], ecx
    add rcx, 1
    cmp rcx, r8
    jb place
shuffle_next:
    cmp r8, 2
    jb shuffled
    mov rcx, @STEP
    add r9, rcx
    mov rax, r9
{mix}    shr rax, 32
    imul rax, r8
    shr rax, 32                     # below r8
    sub r8, 1
    mov edx, dword ptr [rdi + rax*4]
    mov ecx, dword ptr [rdi + r8*4]
    mov dword ptr [rdi + rax*4], ecx
    mov dword ptr [rdi + r8*4], edx
    jmp shuffle_next
shuffled:
    ret
fixed:
    push rcx                        # rax over rcx, a power of ten, to the line with the digits behind its point
    xor edx, edx
    div rcx
    push rdx
    call decimal
    mov al, 46
    mov byte ptr [r15], al
    add r15, 1
    pop rax
    pop rcx
digit_behind:
    mov rsi, rcx                    # rax of rsi is left
    push rax
    mov rax, rsi
    xor edx, edx
    mov ecx, 10
    div rcx
    mov rcx, rax
    pop rax
    xor edx, edx
    div rcx
    add eax, 48
    mov byte ptr [r15], al
    add r15, 1
    mov rax, rdx
    cmp rcx, 1
    jne digit_behind
    ret
{end}"""

SETTINGS = 640
OPTIONS = (
    *COMMON, Option("seed", WHOLE, 40), Option("save-every", NUMBER, 32), Option("steps", NUMBER, SETTINGS),
    Option("rate", QUOTIENT, SETTINGS + 16), Option("warmup", WHOLE, SETTINGS + 32),
    Option("decay", QUOTIENT, SETTINGS + 48), Option("clip", QUOTIENT, SETTINGS + 64),
    Option("balance", QUOTIENT, SETTINGS + 80))


def usage(name: str, plan: Plan[Training]) -> bytes:
    model = plan.model
    usual = {key: f"{value:g}" for key, value in model.settings.items()}
    return (
        f"{name} [--steps N] [--rate R] [--warmup N] [--decay D] [--clip C] [--balance B] [--seed N]\n"
        "    [--save-every N] [--threads N] [--weights FILE] [--] [TEXT]\n"
        f"Learns from a text, or standard input: steps of {model.sequences} x {model.length} tokens, with AdamW.\n"
        f"--steps: all in all ({usual['steps']}). --rate: of learning, at its highest ({usual['rate']}).\n"
        f"--warmup: steps over which it rises ({usual['warmup']}). --decay: of matrices ({usual['decay']}).\n"
        f"--clip: largest norm of a gradient ({usual['clip']}).\n"
        f"--balance: how far a step moves a DeepSeek-V3's choice to experts with few tokens ({usual['balance']}).\n"
        "--seed: of the order of sequences (0). --threads: workers (all CPUs).\n"
        f"--weights: the file that is trained ({ENDING}/{FILE} behind this one's name). It and the\n"
        "optimiser's state beside it are written anew after each --save-every steps, and at the end; where there is\n"
        "such a state, training goes on from it, with the same options and text.\n"
    ).encode()


def learn_functions(plan: Plan[Training]) -> list[Written]:
    """`NAME_start` and what it reaches; none for a model without a tokenizer."""
    model, name, tables = plan.model, plan.model.name, plan.words
    if tables is None:
        return []
    constants = {
        **options.constants(OPTIONS, usage(name, plan)), **process.constants(f"{ENDING}/{FILE}".encode()),
        "state_name": STATE_NAME, "waiting": WAITING,
        "no_input": b"the text can't be read\n",
        "text_too_long": f"the text is too long; expected at most {plan.text_bytes} bytes\n".encode(),
        "text_too_short": f"the text is too short; expected at least {model.length + 1} tokens, a sequence and what "
                          "follows it\n".encode(),
        "text_all_done": b"as many steps were done before; expected more --steps, or no training.safetensors beside "
                         b"the weights\n",
        "text_no_numbers": b"the loss or its gradient is not finite; expected a lower --rate, from the last saved "
                           b"step\n",
        "text_step": b"step ", "text_of": b" of ", "text_loss": b": loss ", "text_norm": b", norm ", "comma": b", ",
    }
    numbers = _numbers(plan) | {f"{key}_bytes": len(text) for key, text in constants.items()}
    numbers["batch_bytes"] = 4 * model.sequences * model.length
    reaches = process.reaches(name) | {
        "words": f"{name}.{WORDS}", "run": f"{name}.run", "done_before": f"{name}_steps",
        "save_weights": f"{name}_save",
        **{key: f"{name}_{key}" for key in ("encode", "train", "load_state", "save_state")}}
    text = replaced(_START, options=options_text(OPTIONS, _defaults(model.settings), SETTINGS + 128),
                    begin=process.BEGIN, read=process.READ, mix=MIX, end=process.END)
    return [written(f"{name}_start", text, numbers, reaches, constants), process.fault(name)]


def _defaults(settings: Mapping[str, float]) -> dict[int, int]:
    """What lies on the stack before options are read."""
    found = dict.fromkeys((0, WEIGHTS, THREADS, 32, 40), 0)
    for place, value in enumerate(settings.values()):
        quotient = Fraction(repr(value))
        found |= {SETTINGS + 16 * place: quotient.numerator, SETTINGS + 16 * place + 8: quotient.denominator}
    return found


def _numbers(plan: Plan[Training]) -> dict[str, int]:
    model = plan.model
    sizes = {"state": NAME_BYTES, "waiting": NAME_BYTES,
             "text": plan.text_bytes + 1, "tokens": 4 * plan.text_bytes, "order": 4 * plan.text_bytes,
             "batch": 8 * model.sequences * model.length, "work": plan.work["pairs"] + 8 * (plan.text_bytes + 1)}
    places, here = {}, process.PATH_BYTES
    for key, size in sizes.items():
        places[f"{key}_place"] = here
        here = round_up(here + size, LINE_BYTES)
    return {
        **process.numbers(here), **options.NUMBERS, **places, **{key: plan.place(key) for key in ("recipe", *LEARNING)},
        "NO_FILE": STATUS["NO_FILE"][0], "NO_WRITE": STATUS["NO_WRITE"][0], "MOST_PATH": MOST_PATH,
        "text_bytes": plan.text_bytes, "setting_words": 2 * len(model.settings), "length": model.length,
        "length_bytes": 4 * model.length, "sequences": model.sequences, "step_tokens": model.sequences * model.length,
        "plan_control": plan.programs["plan"].control, "tell_control": plan.programs["tell"].control,
        **MIXING,
    }
