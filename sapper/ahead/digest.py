"""The digest that ties a weights file to the code that was made for it: XXH64.

Enters: bytes. Leaves: 64 bits. Holds: the machine code that a model's library runs when it opens its weights is the
code that computes the digest here. It finds damage and mix-ups; it is no proof against somebody who forges a file.

Four sums take eight bytes each in turn, so that their multiplications overlap; what is left goes in pieces of 8, 4 and
1. Source: XXH64 of the xxHash specification, version 0.1.1.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from ..codegen.encode import encode
from ..runtime.loader import load
from .written import Written, written

SYMBOL = "sapper.digest"
_P1, _P2, _P3 = 0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9
_P4, _P5 = 0x85EBCA77C2B2AE63, 0x27D4EB2F165667C5

_TEXT = """
    # uint64 digest(rdi: bytes, rsi: their number); rbx, rbp: the first two primes; r8 to r11: the four sums
    push rbx
    push rbp
    push r12
    push r13
    mov rbx, @P1
    mov rbp, @P2
    lea r13, [rdi + rsi]
    mov r12, rsi
    cmp rsi, 32
    jb short_input
    lea r8, [rbx + rbp]
    mov r9, rbp
    xor r10d, r10d
    mov r11, rbx
    neg r11
    lea rsi, [r13 - 32]
stripe:
    mov rax, [rdi]
    imul rax, rbp
    add r8, rax
    rol r8, 31
    imul r8, rbx
    mov rax, [rdi + 8]
    imul rax, rbp
    add r9, rax
    rol r9, 31
    imul r9, rbx
    mov rax, [rdi + 16]
    imul rax, rbp
    add r10, rax
    rol r10, 31
    imul r10, rbx
    mov rax, [rdi + 24]
    imul rax, rbp
    add r11, rax
    rol r11, 31
    imul r11, rbx
    add rdi, 32
    cmp rdi, rsi
    jbe stripe

    mov rdx, @P4
    mov rax, r8
    rol rax, 1
    mov rcx, r9
    rol rcx, 7
    add rax, rcx
    mov rcx, r10
    rol rcx, 12
    add rax, rcx
    mov rcx, r11
    rol rcx, 18
    add rax, rcx
    imul r8, rbp
    rol r8, 31
    imul r8, rbx
    xor rax, r8
    imul rax, rbx
    add rax, rdx
    imul r9, rbp
    rol r9, 31
    imul r9, rbx
    xor rax, r9
    imul rax, rbx
    add rax, rdx
    imul r10, rbp
    rol r10, 31
    imul r10, rbx
    xor rax, r10
    imul rax, rbx
    add rax, rdx
    imul r11, rbp
    rol r11, 31
    imul r11, rbx
    xor rax, r11
    imul rax, rbx
    add rax, rdx
    jmp rest
short_input:
    mov rax, @P5
rest:
    add rax, r12
    mov rdx, @P4
    mov r8, @P5
    mov r9, @P3
words:
    lea rcx, [rdi + 8]
    cmp rcx, r13
    ja half
    mov r10, [rdi]
    imul r10, rbp
    rol r10, 31
    imul r10, rbx
    xor rax, r10
    rol rax, 27
    imul rax, rbx
    add rax, rdx
    mov rdi, rcx
    jmp words
half:
    lea rcx, [rdi + 4]
    cmp rcx, r13
    ja last
    mov r10d, [rdi]
    imul r10, rbx
    xor rax, r10
    rol rax, 23
    imul rax, rbp
    add rax, r9
    mov rdi, rcx
last:
    cmp rdi, r13
    jae mix
    movzx r10d, byte ptr [rdi]
    imul r10, r8
    xor rax, r10
    rol rax, 11
    imul rax, rbx
    add rdi, 1
    jmp last
mix:
    mov rcx, rax
    shr rcx, 33
    xor rax, rcx
    imul rax, rbp
    mov rcx, rax
    shr rcx, 29
    xor rax, rcx
    imul rax, r9
    mov rcx, rax
    shr rcx, 32
    xor rax, rcx
    pop r13
    pop r12
    pop rbp
    pop rbx
    ret
"""
_loaded: list[Any] = []


def digest_function() -> Written:
    """uint64_t sapper.digest(const void *bytes, size_t count)"""
    signed = {name: value - (1 << 64) if value >> 63 else value
              for name, value in (("P1", _P1), ("P2", _P2), ("P3", _P3), ("P4", _P4), ("P5", _P5))}
    return written(SYMBOL, _TEXT, signed)


def digest(memory: Any) -> int:
    """The digest of the bytes of an object with a buffer; of a mapped file too, which is not copied."""
    if not _loaded:
        block = load(encode(digest_function().machine).code)
        _loaded.append((block, ctypes.CFUNCTYPE(ctypes.c_uint64, ctypes.c_void_p, ctypes.c_size_t)(block.address)))
    content = np.frombuffer(memory, np.uint8)
    found: int = _loaded[0][1](content.__array_interface__["data"][0], content.size)
    return found
