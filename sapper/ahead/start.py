"""A model as a program: reads a prompt, prints an answer as it comes, without a C library.

    NAME [--tokens N] [--threads N] [--weights FILE] [--raw] [--temperature T] [--top-k N] [--top-p P] [--min-p P]
         [--seed N] [--] [PROMPT ...]

Enters: a plan with a tokenizer. Leaves: `NAME_start`, the entry of the executable. Holds: the words of the prompt are
joined by blanks; without any it is read from standard input, less a last line feed. The likeliest token is taken each
time where the temperature is 0, else one is drawn (draw.py): the tokens are those of `sapper generate` with the same
settings. Text goes to standard output, speeds to standard error; for the rest see process.py.
"""

from __future__ import annotations

from . import options, process
from .draw import bits
from .opening import POSITION, replaced
from .options import COMMON, FLAG, NUMBER, REAL, THREADS, WEIGHTS, WHOLE, Option, options_text
from .plan import Model, Plan
from .words import Tables
from .written import Written, written

_START = """
    # rbx: model; rbp: the stack at entry; r12: an argument's number, then tokens of the prompt; r13: a buffer for the
    # path, the text and the tokens; r14: end of the text, then tokens made; r15: room left for text
    # the stack: 0 model, 8 weights, 16 most tokens, 24 threads, 32 raw, 40 bytes of a token, 48 begin of the message,
    # 56 the file that it is read from, 64 and 80 and 96 times, 128 .. 256 CPUs, then a line of text, 608 top_k,
    # 616 .. 640 a sapper_model_sampling
{options}{begin}    mov rax, qword ptr [rsp + 608]
    mov dword ptr [rsp + 620], eax
    mov rdi, rbx
    lea rsi, [rsp + 616]
    lea rax, @sampling
    call rax
    test eax, eax
    jne told

    lea r14, [r13 + @path_bytes]    # the text: what the frame puts before it, the message, what comes behind
    mov r15d, @text_bytes
    mov rax, qword ptr [rsp + 32]
    test rax, rax
    jne message
    mov rsi, @before
    mov edx, @before_bytes
    call append_table
message:
    mov qword ptr [rsp + 48], r14
    cmp r12, qword ptr [rbp]
    jae input
word:
    mov rsi, qword ptr [rbp + r12*8 + 8]
    xor edx, edx
length:
    cmp byte ptr [rsi + rdx], 0
    je length_known
    add rdx, 1
    jmp length
length_known:
    call append
    add r12, 1
    cmp r12, qword ptr [rbp]
    jae message_read
    lea rsi, @blank
    mov edx, 1
    call append
    jmp word
input:
    xor edi, edi
    mov qword ptr [rsp + 56], rdi
{read}all_read:
    cmp r14, qword ptr [rsp + 48]
    je message_read
    cmp byte ptr [r14 - 1], 10
    jne message_read
    sub r14, 1
    add r15, 1
message_read:
    mov rax, qword ptr [rsp + 32]
    test rax, rax
    jne text_known
{trim}
    mov rsi, @after
    mov edx, @after_bytes
    call append_table
text_known:
    lea r12, [r13 + @tokens_place]  # the tokens: those before, those of the text, those behind
    mov rsi, @prefix
    mov edx, @prefix_count
    mov rax, qword ptr [rsp + 32]
    test rax, rax
    je framed
    mov rsi, @begin
    mov edx, @begin_count
framed:
    call append_tokens
    mov rdi, rbx
    lea rsi, [r13 + @path_bytes]
    mov rdx, r14
    sub rdx, rsi
    mov rcx, r12
    lea r8, [r13 + @tokens_end]
    sub r8, r12
    shr r8, 2
    lea rax, @encode
    call rax
    test rax, rax
    js too_long
    lea r12, [r12 + rax*4]
    mov rax, qword ptr [rsp + 32]
    test rax, rax
    jne tokens_known
    mov rsi, @suffix
    mov edx, @suffix_count
    call append_tokens
tokens_known:
    lea rax, [r13 + @tokens_place]
    sub r12, rax
    shr r12, 2
    je no_tokens
    cmp r12, @context
    ja too_long

    lea rsi, [rsp + 64]
    call clock
    mov rdi, rbx
    lea rsi, [r13 + @tokens_place]
    mov rdx, r12
    lea rax, @prefill
    call rax
    test eax, eax
    jne told
    lea rsi, [rsp + 80]
    call clock
    xor r14d, r14d
answer:
    mov rdi, rbx
    lea rax, @pick
    call rax
    mov ebp, eax
    mov rcx, qword ptr [rbx + @WEIGHTS]
    mov rdx, @stops
    add rcx, rdx
    xor edx, edx
stop:
    cmp edx, @stop_count
    jae no_stop
    cmp ebp, dword ptr [rcx + rdx*4]
    je answered
    add edx, 1
    jmp stop
no_stop:
    add r14, 1
    mov rdi, rbx
    mov esi, ebp
    lea rdx, [rsp + 40]
    lea rax, @text
    call rax
    mov edi, 1
    mov rsi, rax
    mov rdx, qword ptr [rsp + 40]
    call write
    cmp r14, qword ptr [rsp + 16]
    jae answered
    mov rax, qword ptr [rbx + @POSITION]
    cmp rax, @context
    jae answered
    mov rdi, rbx
    mov esi, ebp
    lea rax, @step
    call rax
    test eax, eax
    jne told
    jmp answer
answered:
    lea rsi, [rsp + 96]
    call clock
    mov edi, 1
    lea rsi, @line_feed
    mov edx, 1
    call write
    lea r15, [rsp + 256]            # the line of speeds
    mov rax, r12
    call decimal
    lea rsi, @text_prompt
    mov edx, @text_prompt_bytes
    call put
    mov rax, r12
    lea rcx, [rsp + 64]
    lea rdx, [rsp + 80]
    call speed
    mov rax, r14
    call decimal
    lea rsi, @text_answer
    mov edx, @text_answer_bytes
    call put
    lea rax, [r14 - 1]
    xor ecx, ecx
    test r14, r14
    cmove rax, rcx
    lea rcx, [rsp + 80]
    lea rdx, [rsp + 96]
    call speed
    lea rsi, [rsp + 256]
    lea rdx, [r15 - 2]              # less the last ", "
    sub rdx, rsi
    mov edi, 2
    call write
    mov edi, 2
    lea rsi, @line_feed
    mov edx, 1
    call write
    xor edi, edi
    jmp exit
too_long:
    lea rsi, @text_too_long
    mov edx, @text_too_long_bytes
    jmp failed
no_tokens:
    lea rsi, @text_no_tokens
    mov edx, @text_no_tokens_bytes
    jmp failed
append_table:
    add rsi, qword ptr [rbx + @WEIGHTS]
append:
    cmp rdx, r15                    # edx bytes at rsi to the end of the text
    ja too_long
    sub r15, rdx
    xor ecx, ecx
append_next:
    cmp rcx, rdx
    jae appended
    mov al, byte ptr [rsi + rcx]
    mov byte ptr [r14], al
    add r14, 1
    add rcx, 1
    jmp append_next
appended:
    ret
append_tokens:
    add rsi, qword ptr [rbx + @WEIGHTS]     # edx tokens at rsi, of which there may be more than there is room for
    xor ecx, ecx
token_next:
    cmp ecx, edx
    jae tokens_appended
    lea rax, [r13 + @tokens_end]
    cmp r12, rax
    jae too_long
    mov eax, dword ptr [rsi + rcx*4]
    mov dword ptr [r12], eax
    add r12, 4
    add ecx, 1
    jmp token_next
tokens_appended:
    ret
{end}"""

_TRIM = """
    mov rsi, qword ptr [rsp + 48]   # the template takes the white space from a message's ends
    mov rdx, r14
trim_end:
    cmp rdx, rsi
    jbe trimmed
    movzx eax, byte ptr [rdx - 1]
    call blank
    jne trim_begin
    sub rdx, 1
    jmp trim_end
trim_begin:
    movzx eax, byte ptr [rsi]
    call blank
    jne trimmed
    add rsi, 1
    jmp trim_begin
blank:
    cmp eax, 32
    je blank_known
    sub eax, 9
    cmp eax, 5
    setb al
    movzx eax, al
    cmp eax, 1
blank_known:
    ret
trimmed:
    mov rcx, qword ptr [rsp + 48]
close_up:
    cmp rsi, rdx
    jae trim_done
    mov al, byte ptr [rsi]
    mov byte ptr [rcx], al
    add rsi, 1
    add rcx, 1
    jmp close_up
trim_done:
    mov rax, r14
    sub rax, rcx
    add r15, rax
    mov r14, rcx
"""


OPTIONS = (
    Option("raw", FLAG, 32), *COMMON, Option("tokens", NUMBER, 16), Option("top-k", NUMBER, 608),
    Option("temperature", REAL, 616), Option("top-p", REAL, 624), Option("min-p", REAL, 628),
    Option("seed", WHOLE, 632))
DEFAULT_TOKENS, DEFAULT_TOP_K = 128, 40
DEFAULTS = {0: 0, WEIGHTS: 0, THREADS: 0, 32: 0, 616: 0, 632: 0, 16: DEFAULT_TOKENS, 608: DEFAULT_TOP_K,
            624: bits(1.0)}
"""top_p 1, min_p 0."""


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


def start_functions(plan: Plan[Model]) -> list[Written]:
    """`NAME_start` and what it reaches; none for a model without a tokenizer."""
    tables = plan.words
    if tables is None:
        return []
    name = plan.model.name
    numbers, constants = _numbers(plan, tables), _constants(plan)
    numbers |= {f"{key}_bytes": len(text) for key, text in constants.items()}
    reaches = process.reaches(name) | {
        key: f"{name}_{key}" for key in ("prefill", "step", "sampling", "pick", "encode", "text")}
    text = replaced(_START, options=options_text(OPTIONS, DEFAULTS, 640), begin=process.BEGIN, read=process.READ,
                    end=process.END, trim=_TRIM if tables.numbers["trims"] else "")
    return [written(f"{name}_start", text, numbers, reaches, constants), process.fault(name)]


def _numbers(plan: Plan[Model], tables: Tables) -> dict[str, int]:
    tokens_place = process.PATH_BYTES + -(-(plan.text_bytes + 1) // 64) * 64
    tokens_end = tokens_place + 4 * plan.model.context
    return {
        "WEIGHTS": 0, "POSITION": POSITION, "path_bytes": process.PATH_BYTES, "text_bytes": plan.text_bytes,
        "context": plan.model.context, "tokens_place": tokens_place, "tokens_end": tokens_end,
        **process.numbers(tokens_end), **options.NUMBERS, **tables.numbers,
        **{key: plan.words_offset + place for key, place in tables.places.items()},
    }


def _constants(plan: Plan[Model]) -> dict[str, bytes]:
    return {
        **options.constants(OPTIONS, usage(plan.model.name)), **process.constants(b".weights"),
        "text_too_long": f"the prompt is too long; expected at most {plan.model.context} tokens and "
                         f"{plan.text_bytes} bytes with the chat template\n".encode(),
        "text_no_tokens": b"the prompt is empty; expected some text\n",
        "no_input": b"standard input can't be read\n",
        "text_prompt": b" prompt tokens at ", "text_answer": b" tokens at ",
        "blank": b" ",
    }
