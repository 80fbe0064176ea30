"""How to get from any instruction of a function to its caller, as DWARF call frame information.

Enters: a machine function after its frame was made, and the offset of each item in its code. Leaves: `Row`s, and the
sections .eh_frame, .eh_frame_hdr and .debug_frame made of them, which C++'s unwinder, backtrace(), gdb and perf read.
Holds: the rows follow from the instructions that move the stack pointer, whoever wrote them; a function that moves it
in another way gets none, and no backtrace passes through it.

The canonical frame address (CFA) is what the stack pointer was before the call. It is a register plus a number; where
the stack is aligned further, it is a register that was copied before, or a word of the frame that keeps that copy.
Source: DWARF version 4, 6.4; System V ABI AMD64 supplement, 3.6.2 (register numbers); Linux Standard Base 5.0, 10.6
(.eh_frame, .eh_frame_hdr).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..targets.x86_64.abi import CALLEE_SAVED
from ..targets.x86_64.registers import RSP
from .dwarf import Fixup, signed, unsigned
from .machine import Immediate, Instruction, Label, LabelReference, MachineFunction, Memory, Register

_NUMBERS = (0, 2, 1, 3, 7, 6, 4, 5, 8, 9, 10, 11, 12, 13, 14, 15)
"""DWARF's number of each general register, by its number in the encodings."""
_RETURN_ADDRESS, _WORD_BYTES = 16, 8
_ADVANCE, _OFFSET, _RESTORE = 0x40, 0x80, 0xC0
_ADVANCE_1, _ADVANCE_2, _ADVANCE_4, _DEF_CFA, _DEF_CFA_EXPRESSION = 0x02, 0x03, 0x04, 0x0C, 0x0F
_BASE_REGISTER, _DEREFERENCE, _PLUS = 0x70, 0x06, 0x23
_RELATIVE_4, _TABLE_RELATIVE_4, _UNSIGNED_4 = 0x1B, 0x3B, 0x03


@dataclass(frozen=True, slots=True)
class Frame:
    """Where the caller's frame is. The CFA is `register` plus `offset`; with `word` it is offset plus what lies at
    register + word. saved: (register, its place below the CFA in bytes). copy: (register, how far below the CFA it
    points), a copy of the stack pointer."""

    register: int = RSP
    offset: int = _WORD_BYTES
    word: int | None = None
    saved: tuple[tuple[int, int], ...] = ()
    copy: tuple[int, int] | None = None

    def told(self) -> Frame:
        """What of it is written down."""
        return replace(self, copy=None)


Row = tuple[int, Frame]
"""From this offset of the code on, until the next."""


def frame_rows(function: MachineFunction, offsets: Sequence[int]) -> list[Row]:
    """The rows of a function; none where the stack pointer is moved in a way that can't be followed.

    offsets: of each item of its body, and of the end (EncodedCode.offsets).
    """
    at_label: dict[str, Frame] = {}
    while True:
        rows: list[Row] = []
        frame: Frame | None = Frame()
        known = len(at_label)
        for item, start in zip(function.body, offsets, strict=False):
            if isinstance(item, Label):
                frame = at_label.get(item.name) if frame is None else at_label.setdefault(item.name, frame)
                continue
            if frame is None:
                continue  # only reached from below; the next pass knows
            if not rows or rows[-1][1] != frame.told():
                rows.append((start, frame.told()))
            if item.row.control in ("jump", "branch"):
                for operand in item.operands:
                    if isinstance(operand, LabelReference):
                        at_label.setdefault(operand.name, frame)
            if item.row.control in ("jump", "return", "trap"):
                frame = None
            else:
                after = _after(frame, item)
                if after is None:
                    return []
                frame = after
        if len(at_label) == known:
            return rows


def _after(frame: Frame, item: Instruction) -> Frame | None:
    """The frame after an instruction, None if the stack pointer is somewhere else."""
    mnemonic, operands = item.row.mnemonic, item.operands
    first = operands[0] if operands else None
    second = operands[1] if len(operands) > 1 else None
    by_stack = frame.register == RSP and frame.word is None
    if mnemonic == "push":
        moved = _moved(frame, _WORD_BYTES)
        register = first.number if isinstance(first, Register) else -1
        if by_stack and register in CALLEE_SAVED and register not in dict(frame.saved):
            return replace(moved, saved=(*frame.saved, (register, moved.offset)))
        return moved
    if mnemonic == "pop":
        assert isinstance(first, Register)
        saved = tuple(pair for pair in frame.saved if pair[0] != first.number)
        return _written(_moved(replace(frame, saved=saved), -_WORD_BYTES), first)
    if isinstance(first, Memory):
        if mnemonic == "mov" and frame.copy is not None and second == Register("gpr", frame.copy[0]) \
                and first.base == Register("gpr", RSP) and first.index is None and not by_stack:
            return replace(frame, register=RSP, offset=frame.copy[1], word=first.disp)
        return frame
    if first != Register("gpr", RSP):
        if mnemonic == "mov" and second == Register("gpr", RSP) and by_stack and isinstance(first, Register):
            return replace(frame, copy=(first.number, frame.offset))
        return _written(frame, first) if item.row.operands and item.row.operands[0].writes else frame
    if mnemonic in ("add", "sub") and isinstance(second, Immediate):
        return _moved(frame, second.value if mnemonic == "sub" else -second.value)
    if mnemonic == "and" and frame.copy is not None:
        return replace(frame, register=frame.copy[0], offset=frame.copy[1])
    if mnemonic == "mov" and isinstance(second, Memory) and frame.word is not None and second.disp == frame.word:
        return replace(frame, word=None)
    if mnemonic == "lea" and isinstance(second, Memory) and frame.copy is not None \
            and second.base == Register("gpr", frame.copy[0]) and second.index is None:
        return replace(frame, register=RSP, offset=frame.copy[1] - second.disp, word=None)
    return frame if not item.row.operands[0].writes else None


def _moved(frame: Frame, by: int) -> Frame:
    """After the stack pointer went down."""
    if frame.register != RSP:
        return frame
    return replace(frame, word=frame.word + by) if frame.word is not None else replace(frame, offset=frame.offset + by)


def _written(frame: Frame, register: Any) -> Frame | None:
    """After another register was written."""
    if frame.copy is None or register != Register("gpr", frame.copy[0]):
        return frame
    return None if frame.register == frame.copy[0] else replace(frame, copy=None)


# --- Sections ---------------------------------------------------------------------------------------------------------

@dataclass(frozen=True, slots=True)
class Frames:
    """The rows of one function. start, size_bytes: its code in .text."""

    start: int
    size_bytes: int
    rows: Sequence[Row]


def _instructions(rows: Sequence[Row]) -> bytes:
    out = bytearray()
    here = 0
    before = Frame()
    for offset, frame in rows:
        if frame == before:
            continue
        out += _advance(offset - here)
        here = offset
        if frame.word is not None:
            out += _word_expression(frame)
        elif (frame.register, frame.offset, frame.word) != (before.register, before.offset, before.word):
            out += bytes((_DEF_CFA,)) + unsigned(_NUMBERS[frame.register]) + unsigned(frame.offset)
        held = dict(before.saved)
        for register, place in frame.saved:
            if held.pop(register, None) != place:
                out += bytes((_OFFSET | _NUMBERS[register],)) + unsigned(place // _WORD_BYTES)
        out += bytes(_RESTORE | _NUMBERS[register] for register in held)
        before = frame
    return bytes(out)


def directives(function: MachineFunction) -> dict[int, list[str]]:
    """The same for GNU as: before the item at each place of the body, the lines that tell of a change. Without rows
    the return address is said to be lost (`.cfi_undefined rip`), so that no backtrace goes on wrongly."""
    found: dict[int, list[str]] = {}
    before = Frame()
    rows = frame_rows(function, range(len(function.body) + 1))
    for place, frame in rows:
        lines = found.setdefault(place, [])
        if frame.word is not None and frame != before:
            lines.append(f".cfi_escape {', '.join(map(hex, _word_expression(frame)))}")
        elif (frame.register, frame.offset, frame.word) != (before.register, before.offset, before.word):
            lines.append(f".cfi_def_cfa {_NUMBERS[frame.register]}, {frame.offset}")
        held = dict(before.saved)
        for register, below in frame.saved:
            if held.pop(register, None) != below:
                lines.append(f".cfi_offset {_NUMBERS[register]}, {-below}")
        lines += [f".cfi_restore {_NUMBERS[register]}" for register in held]
        before = frame
    return found if rows else {0: [".cfi_undefined rip"]}


def _word_expression(frame: Frame) -> bytes:
    """DW_CFA_def_cfa_expression for a frame address that a word of the frame keeps."""
    assert frame.word is not None
    expression = bytes((_BASE_REGISTER + _NUMBERS[frame.register],)) + signed(frame.word) + bytes(
        (_DEREFERENCE, _PLUS)) + unsigned(frame.offset)
    return bytes((_DEF_CFA_EXPRESSION,)) + unsigned(len(expression)) + expression


def _advance(by: int) -> bytes:
    if by == 0:
        return b""
    if by < 0x40:
        return bytes((_ADVANCE | by,))
    if by < 0x100:
        return struct.pack("<BB", _ADVANCE_1, by)
    return struct.pack("<BH", _ADVANCE_2, by) if by < 0x10000 else struct.pack("<BI", _ADVANCE_4, by)


def _entry(identity: bytes, content: bytes, align_bytes: int) -> bytes:
    """A length, then what it counts, padded with DW_CFA_nop."""
    body = identity + content
    body += bytes(-(len(body) + 4) % align_bytes)
    return struct.pack("<I", len(body)) + body


def _common(augmentation: bytes, data: bytes) -> bytes:
    """Of a CIE, what follows its identity: at the entry the CFA is the stack pointer and a word."""
    head = bytes((1,)) + augmentation + b"\0" + unsigned(1) + signed(-_WORD_BYTES) + bytes((_RETURN_ADDRESS,)) + data
    return head + bytes((_DEF_CFA, _NUMBERS[RSP], _WORD_BYTES, _OFFSET | _RETURN_ADDRESS, 1))


def eh_frame(functions: Sequence[Frames], distance: int = 0) -> tuple[bytes, list[Fixup], list[tuple[int, int]]]:
    """(the section, its fields that hold the distance to a function, (start of a function, offset of its entry)).

    distance: from the start of the section to that of .text; 0 where a linker will see to it.
    """
    out = bytearray(_entry(bytes(4), _common(b"zR", unsigned(1) + bytes((_RELATIVE_4,))), 8))
    fixups, places = [], []
    for function in functions:
        if not function.rows:
            continue
        at = len(out)
        field = at + 8
        content = struct.pack("<iI", distance + function.start - field, function.size_bytes) + b"\0"
        out += _entry(struct.pack("<I", at + 4), content + _instructions(function.rows), 8)
        fixups.append(Fixup(".eh_frame", field, 4, ".text", function.start, relative=True))
        places.append((function.start, at))
    return bytes(out) + bytes(4), fixups, places


def eh_frame_header(places: Sequence[tuple[int, int]], to_frames: int, to_text: int) -> bytes:
    """.eh_frame_hdr, by which a function's entry is found. places: as eh_frame gives them. to_frames, to_text: from its
    own start to those sections."""
    table = b"".join(struct.pack("<ii", to_text + start, to_frames + entry) for start, entry in sorted(places))
    return struct.pack("<BBBBiI", 1, _RELATIVE_4, _UNSIGNED_4, _TABLE_RELATIVE_4, to_frames - 4, len(places)) + table


HEADER_ENTRY_BYTES, HEADER_BYTES = 8, 12


def debug_frame(function: Frames, text_address: int) -> bytes:
    """.debug_frame for code that lies in memory."""
    common = _entry(b"\xff\xff\xff\xff", _common(b"", b""), 8)
    content = struct.pack("<QQ", text_address + function.start, function.size_bytes) + _instructions(function.rows)
    return common + (_entry(struct.pack("<I", 0), content, 8) if function.rows else b"")
