"""The machine code of a tokenizer: text to tokens and back, by the tables of words.py.

    int64_t     NAME_encode(NAME_model *model, const char *text, int64_t bytes, int32_t *tokens, int64_t room)
    const char *NAME_text(const NAME_model *model, int32_t token, int64_t *bytes)

Text is cut into words by each pattern in turn; a word begins as one token for each byte, and as long as some two
neighbours can be merged, those of the lowest rank are, the first of them if there are several. The memory for that is
part of the model's. A byte that is no UTF-8 is a character of its own, U+FFFD, when words are cut.
Source: R. Sennrich, B. Haddow and A. Birch, "Neural machine translation of rare words with subword units" (2016);
the byte-level form is that of GPT-2's encoder.py.
"""

from __future__ import annotations

from typing import Any

from .opening import WEIGHTS
from .plan import Plan
from .splits import DEAD, MATCH
from .words import HASH
from .written import Written, written

_ENCODE = """
    # rbx: model; rbp: weights; r12: text; r13: words left, then the next word; r14: where tokens go; r15: room for them
    # the stack: 0 the list of word ends, 8 the other list, 16 number of words, 24 tokens so far, 32 start of the word
    push rbx
    push rbp
    push r12
    push r13
    push r14
    push r15
    sub rsp, 56
    mov rbx, rdi
    mov rbp, qword ptr [rbx + @WEIGHTS]
    mov r12, rsi
    mov r14, rcx
    mov r15, r8
    xor eax, eax
    mov qword ptr [rsp + 24], rax
    mov qword ptr [rsp + 32], rax
    test rdx, rdx
    je done
    mov rax, -1
    cmp rdx, @text_bytes
    ja leave
    lea rax, [rbx + @list0]
    mov dword ptr [rax], edx        # one word: the whole text
    mov qword ptr [rsp], rax
    lea rax, [rbx + @list1]
    mov qword ptr [rsp + 8], rax
    mov ecx, 1
    mov qword ptr [rsp + 16], rcx
{cut}
    mov r13, qword ptr [rsp]
word:
    mov rax, qword ptr [rsp + 16]
    test rax, rax
    je done
    sub rax, 1
    mov qword ptr [rsp + 16], rax
    mov rsi, qword ptr [rsp + 32]
    mov edx, dword ptr [r13]
    add r13, 4
    mov qword ptr [rsp + 32], rdx
    sub rdx, rsi
    add rsi, r12
    mov rdi, rbx
    lea rax, @merge
    call rax
    add qword ptr [rsp + 24], rax
    cmp rax, r15
    ja full
    sub r15, rax
    xor ecx, ecx
copy:
    cmp rcx, rax
    jae copied
    mov edx, dword ptr [rbx + rcx*4 + @tokens_here]
    mov dword ptr [r14 + rcx*4], edx
    add rcx, 1
    jmp copy
copied:
    lea r14, [r14 + rax*4]
    jmp word
full:
    mov rax, -1
    jmp leave
done:
    mov rax, qword ptr [rsp + 24]
leave:
    add rsp, 56
    pop r15
    pop r14
    pop r13
    pop r12
    pop rbp
    pop rbx
    ret
"""

_CUT = """
    mov rdi, rbp
    mov rsi, r12
    mov rdx, qword ptr [rsp]
    mov rcx, qword ptr [rsp + 16]
    mov r8, qword ptr [rsp + 8]
    mov r9, @pattern{number}
    add r9, rbp
    lea rax, @split
    call rax
    mov qword ptr [rsp + 16], rax
    mov rax, qword ptr [rsp]
    mov rcx, qword ptr [rsp + 8]
    mov qword ptr [rsp], rcx
    mov qword ptr [rsp + 8], rax
"""

_SPLIT = """
    # split(rdi: weights, rsi: text, rdx: ends of the pieces, rcx: their number, r8: where ends go, r9: an automaton)
    # -> the number of ends; rbx: starts of ranges; rbp: the automaton; r12: text; r13: the next end; r14: where the
    # next one goes; r15: the end of the piece. A word: from `here` [rsp], in state r8, at r9, the last match at r10
    # the stack: 0 here, 8 whether a gap is open, 16 pieces left, 32 where ends began
    push rbx
    push rbp
    push r12
    push r13
    push r14
    push r15
    sub rsp, 56
    mov rbx, @starts
    add rbx, rdi
    mov rbp, r9
    mov r12, rsi
    mov r13, rdx
    mov r14, r8
    mov qword ptr [rsp + 32], r8
    mov qword ptr [rsp + 16], rcx
    xor eax, eax
    mov qword ptr [rsp], rax
    mov qword ptr [rsp + 8], rax
piece:
    mov rax, qword ptr [rsp + 16]
    test rax, rax
    je done
    sub rax, 1
    mov qword ptr [rsp + 16], rax
    mov r15d, dword ptr [r13]
    add r13, 4
match:
    mov r9, qword ptr [rsp]
    cmp r9, r15
    jae end_of_piece
    xor r8d, r8d
    mov r10, r9
step:
    mov eax, @end_class
    xor edx, edx
    cmp r9, r15
    jae look
    call class
look:
    imul ecx, r8d, @class_count
    add ecx, eax
    movzx eax, word ptr [rbp + rcx*2]
    test eax, @MATCH
    je no_match
    mov r10, r9
no_match:
    and eax, @DEAD
    cmp eax, @DEAD
    je ended
    mov r8d, eax
    add r9, rdx
    jmp step
ended:
    mov r9, qword ptr [rsp]
    cmp r10, r9
    jne matched
    call class                      # nothing begins here: one more character in the gap
    add r9, rdx
    mov qword ptr [rsp], r9
    mov eax, 1
    mov qword ptr [rsp + 8], rax
    jmp match
matched:
    mov rax, qword ptr [rsp + 8]
    test rax, rax
    je no_gap
    mov dword ptr [r14], r9d
    add r14, 4
    xor eax, eax
    mov qword ptr [rsp + 8], rax
no_gap:
    mov dword ptr [r14], r10d
    add r14, 4
    mov qword ptr [rsp], r10
    jmp match
end_of_piece:
    mov rax, qword ptr [rsp + 8]
    test rax, rax
    je piece
    mov dword ptr [r14], r15d
    add r14, 4
    xor eax, eax
    mov qword ptr [rsp + 8], rax
    jmp piece
done:
    mov rax, r14
    sub rax, qword ptr [rsp + 32]
    shr rax, 2
    add rsp, 56
    pop r15
    pop r14
    pop r13
    pop r12
    pop rbp
    pop rbx
    ret

class:
    movzx eax, byte ptr [r12 + r9]  # the class (eax) and bytes (edx) of the character at r9; keeps rbx, rbp, r8 to r15
    mov edx, 1
    cmp eax, 128
    jb known
    cmp eax, 194
    jb bad
    cmp eax, 245
    jae bad
    mov ecx, 2                      # bytes of the character
    mov esi, 31
    cmp eax, 224
    jb more
    mov ecx, 3
    mov esi, 15
    cmp eax, 240
    jb more
    mov ecx, 4
    mov esi, 7
more:
    and eax, esi
    mov rsi, r15
    sub rsi, r9
    cmp rcx, rsi
    ja bad
    lea rdi, [r12 + r9]
following:
    movzx esi, byte ptr [rdi + rdx]
    shl eax, 6
    xor esi, 128
    cmp esi, 64
    jae bad
    or eax, esi
    add edx, 1
    cmp edx, ecx
    jb following
    jmp known
bad:
    mov eax, 65533
    mov edx, 1
known:
    xor esi, esi                    # the last range that starts at or before it: in [esi, edi)
    mov edi, @range_count
halve:
    lea ecx, [rsi + 1]
    cmp ecx, edi
    jae found
    lea ecx, [rsi + rdi]
    shr ecx, 1
    cmp eax, dword ptr [rbx + rcx*4]
    jb left
    mov esi, ecx
    jmp halve
left:
    mov edi, ecx
    jmp halve
found:
    movzx eax, byte ptr [rbx + rsi + @classes_behind]
    ret
"""

_MERGE = """
    # merge(rdi: model, rsi: a word, rdx: its bytes, at least one) -> the number of its tokens, which lie in the model
    # rbx: merges; rbp: tokens; r12: for each pair of neighbours rank and token; r13: tokens; r14: the pair to be
    # merged; r15: weights
    push rbx
    push rbp
    push r12
    push r13
    push r14
    push r15
    mov r15, qword ptr [rdi + @WEIGHTS]
    lea rbp, [rdi + @tokens_here]
    lea r12, [rdi + @pairs]
    mov r13, rdx
{whole_word}
    mov rbx, @merges
    add rbx, r15
    mov r8, @byte_tokens
    add r8, r15
    lea rdx, [rsi + r13]
    xor r13d, r13d
byte:
    movzx eax, byte ptr [rsi]
    mov eax, dword ptr [r8 + rax*4]
    mov dword ptr [rbp + r13*4], eax
    not eax                         # ~0: no token stands for this byte, and it is left out
    cmp eax, 1
    sbb r13, -1
    add rsi, 1
    cmp rsi, rdx
    jb byte
    xor r14d, r14d
    test r13, r13
    je done
pair:
    lea rax, [r14 + 1]
    cmp rax, r13
    jae search
    call look_up
    add r14, 1
    jmp pair
search:
    lea rdx, [r13 - 1]              # pairs
    mov rax, -1
    xor ecx, ecx
least:
    cmp rcx, rdx
    jae chosen
    mov rsi, qword ptr [r12 + rcx*8]
    cmp rsi, rax
    cmovb rax, rsi
    cmovb r14, rcx
    add rcx, 1
    jmp least
chosen:
    cmp rax, -1
    je done
    mov dword ptr [rbp + r14*4], eax
    sub r13, 1
    lea rcx, [r14 + 1]
close_up:
    cmp rcx, r13
    jae closed
    mov eax, dword ptr [rbp + rcx*4 + 4]
    mov dword ptr [rbp + rcx*4], eax
    mov rax, qword ptr [r12 + rcx*8]
    mov qword ptr [r12 + rcx*8 - 8], rax
    add rcx, 1
    jmp close_up
closed:
    lea rax, [r14 + 1]
    cmp rax, r13
    jae before
    call look_up
before:
    sub r14, 1
    jb search
    call look_up
    jmp search
done:
    mov rax, r13
leave:
    pop r15
    pop r14
    pop r13
    pop r12
    pop rbp
    pop rbx
    ret

look_up:
    mov eax, dword ptr [rbp + r14*4]    # sets what the pair at r14 makes; keeps rbx, rbp, r10 to r15
    shl rax, 32
    mov ecx, dword ptr [rbp + r14*4 + 4]
    or rax, rcx
    mov rcx, @HASH
    imul rcx, rax
    shr rcx, @merge_shift
probe:
    mov r9, rcx
    shl r9, 4
    mov rsi, qword ptr [rbx + r9]
    mov rdx, qword ptr [rbx + r9 + 8]
    cmp rsi, rax
    je there
    cmp rsi, -1
    je there                        # nothing: ~0, as the table holds beside it
    add rcx, 1
    and rcx, @merge_mask
    jmp probe
there:
    mov qword ptr [r12 + r14*8], rdx
    ret
"""

_WHOLE_WORD = """
    mov r8, @text_ends              # a token with the very bytes of the word, in [r9, r10) of those in order
    add r8, r15
    mov r11, @texts
    add r11, r15
    mov r14, @words
    add r14, r15
    xor r9d, r9d
    mov r10d, @word_count
halve:
    cmp r9, r10
    jae none
    lea rcx, [r9 + r10]
    shr rcx, 1
    mov eax, dword ptr [r14 + rcx*4]
    mov edx, dword ptr [r8 + rax*4 + 4]
    mov eax, dword ptr [r8 + rax*4]
    sub rdx, rax                    # its bytes
    add rax, r11
    xor edi, edi
compare:
    cmp rdi, rdx
    jae token_ends
    cmp rdi, r13
    jae lower
    movzx ebx, byte ptr [rsi + rdi]
    cmp bl, byte ptr [rax + rdi]
    ja higher
    jb lower
    add rdi, 1
    jmp compare
token_ends:
    cmp rdi, r13
    je same
higher:
    lea r9, [rcx + 1]
    jmp halve
lower:
    mov r10, rcx
    jmp halve
same:
    mov eax, dword ptr [r14 + rcx*4]
    mov dword ptr [rbp], eax
    mov eax, 1
    jmp leave
none:
"""

_TEXT = """
    mov rcx, qword ptr [rdi + @WEIGHTS]
    xor r8d, r8d
    xor eax, eax
    cmp esi, @vocabulary
    jae leave
    mov r9, @text_ends
    add r9, rcx
    mov esi, esi
    mov eax, dword ptr [r9 + rsi*4]
    mov r8d, dword ptr [r9 + rsi*4 + 4]
    sub r8, rax
    mov r9, @texts
    add rcx, r9
    add rax, rcx
leave:
    mov qword ptr [rdx], r8
    ret
"""


def words_functions(plan: Plan[Any]) -> list[tuple[Written, bool]]:
    """The functions of a tokenizer, each with whether others may call it. Nothing for a model without one."""
    tables = plan.words
    if tables is None:
        return []
    name = plan.model.name
    places = tables.places
    numbers = {
        "WEIGHTS": WEIGHTS, "MATCH": MATCH, "DEAD": DEAD, "HASH": HASH - (1 << 64), "vocabulary": plan.model.vocabulary,
        "text_bytes": plan.text_bytes, "end_class": tables.numbers["class_count"] - 1,
        "classes_behind": places["classes"] - places["starts"],
        **tables.numbers, **{key: plan.words_offset + place for key, place in places.items()}, **plan.work,
    }
    reaches = {"split": f"{name}.split", "merge": f"{name}.merge"}
    cut = "".join(_CUT.replace("{number}", str(number)) for number in range(tables.pattern_count))
    merge = _MERGE.replace("{whole_word}", _WHOLE_WORD if tables.numbers["word_count"] else "")
    return [
        (written(f"{name}_encode", _ENCODE.replace("{cut}", cut), numbers, reaches), True),
        (written(f"{name}_text", _TEXT, numbers, reaches), True),
        (written(f"{name}.split", _SPLIT, numbers, reaches), False),
        (written(f"{name}.merge", merge, numbers, reaches), False),
    ]


