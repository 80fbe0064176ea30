"""Machine IR (all registers physical) -> bytes.

Enters: a `MachineFunction` whose instructions name rows of the target's table. Leaves: `EncodedCode`: the code, the
constants behind it (aligned), the offsets of all labels, and which source line each stretch of code comes from.
Holds: the bytes are those that GNU as gives for the text of print.py: VEX where it suffices and EVEX where a register
above 15, an opmask, a broadcast or 512 bits ask for it, the shortest displacement (EVEX: disp8*N), short jumps where
they reach. Nothing needs relocation: constants are reached by rip-relative addresses.
Source: Intel SDM volume 2, chapter 2 (instruction format; 2.3.5 VEX, 2.7 EVEX, 2.7.5 disp8*N).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from itertools import product
from typing import Any

from ..ir.nodes import Location
from .machine import Immediate, Instruction, Label, LabelReference, MachineFunction, Memory, Register


class EncodeError(ValueError):
    """An instruction that has no encoding. The message names the row, the operand, what was found and expected."""


@dataclass(slots=True)
class EncodedCode:
    """Machine code. code: instructions, then constants. code_bytes: where the instructions end.

    label_offsets: label or constant -> offset in `code`. align_bytes: what the start must be aligned to.
    line_table: (offset, location) where the location changes, in order of offset.
    relocations: (offset, label, addend) of each 32-bit field that is to hold the address of a label outside the
    function, plus the addend, less the field's own address; it holds 0.
    offsets: of each item of the body, and the end of the last.
    """

    code: bytes
    code_bytes: int
    label_offsets: dict[str, int]
    line_table: list[tuple[int, Location]]
    align_bytes: int = 16
    relocations: list[tuple[int, str, int]] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)


class _Plan:
    """One encoding of a row, for one choice of register or memory for each operand, taken apart for speed."""

    __slots__ = ("broadcast_disp8", "broadcast_ok", "byte_registers", "digit", "disp8", "distance", "features", "fixed",
                 "immediate", "immediate_bytes", "immediate_limits", "index_bits", "is4", "legacy_opcode",
                 "legacy_prefix", "length_code", "low", "mmm", "no_rm", "opcode", "operand_bits", "p1", "plain",
                 "raw_immediate", "reg", "registers", "rm", "rm_memory", "short_vex", "sibmem", "space", "vvvv", "w")
    space: int  # 0 legacy, 1 VEX, 2 EVEX
    # Which operand stands where; -1 for none.
    reg: int
    vvvv: int
    rm: int
    is4: int
    low: int
    immediate: int
    distance: int
    rm_memory: bool
    sibmem: bool  # always with a SIB byte
    no_rm: bool  # a ModRM byte whose rm is register 0
    fixed: list[tuple[int, int]]
    byte_registers: list[int]
    # The parts that do not depend on operands.
    legacy_prefix: bytes
    legacy_opcode: bytes
    opcode: int
    digit: int
    mmm: int
    p1: int
    w: int
    length_code: int
    short_vex: bool
    immediate_bytes: int
    immediate_limits: tuple[int, int]
    raw_immediate: bool
    operand_bits: int
    disp8: int
    broadcast_disp8: int
    broadcast_ok: bool
    index_bits: int
    features: frozenset[str]
    registers: list[frozenset[Register]]  # that may be each operand
    plain: bool  # takes any registers and memory of the right kinds, and no other way is shorter


_PP = {0: 0, 0x66: 1, 0xF3: 2, 0xF2: 3}
_CLASSES: dict[str, type] = {"r": Register, "m": Memory, "i": Immediate, "l": LabelReference}

Signature = tuple[type, ...]
"""The class of each operand of an instruction."""


def _alternatives(letter: str, operand: Any) -> str:
    """Which classes of operand (r, m, i, l) may stand where the encoding puts this letter."""
    if letter in "RVLOACU":
        return "r"
    if letter in "I1":
        return "i"
    if letter == "D":
        return "l"
    can_register = operand.kind not in ("mem", "imm", "label")
    if letter == "m" or not can_register:
        return "m"
    return "rm" if operand.memory_bits else "r"


def _plans(row: Any) -> dict[Signature, list[_Plan]]:
    """Plans in order of preference, by signature."""
    operands = row.operands
    plans: dict[Signature, list[_Plan]] = {}
    for encoding in row.encodings:
        letters = "" if encoding.letters == "-" else encoding.letters
        if len(letters) != len(operands):
            raise EncodeError(f"row {row.name}: found {len(letters)} letters in {encoding.text!r}; "
                              f"expected {len(operands)}, one for each operand")
        for choice in product(*(_alternatives(x, o) for x, o in zip(letters, operands, strict=True))):
            signature = tuple(_CLASSES[letter] for letter in choice)
            plans.setdefault(signature, []).append(_plan(row, encoding, letters, choice))
    row.plans = plans
    return plans


def forms_of(row: Any) -> Iterable[Signature]:
    """The classes of operands that some encoding of a row takes together: not each may be memory, or a register, beside
    every other."""
    return (row.plans or _plans(row)).keys()


@cache
def _registers_of(kind: str, fixed: int | None) -> frozenset[Register]:
    """Those that an operand may be."""
    return frozenset(Register(kind, n) for n in range(_REGISTERS.get(kind, 0)) if fixed is None or n == fixed)


def _plan(row: Any, encoding: Any, letters: str, choice: tuple[str, ...]) -> _Plan:
    plan = _Plan()
    operands = row.operands
    plan.space = {"legacy": 0, "vex": 1, "evex": 2}[encoding.space]

    def place(wanted: str) -> int:
        return next((i for i, letter in enumerate(letters) if letter in wanted), -1)

    plan.reg, plan.vvvv, plan.rm = place("R"), place("V"), place("MmU")
    plan.is4, plan.low, plan.immediate, plan.distance = place("L"), place("O"), place("I1"), place("D")
    plan.fixed = [(i, operands[i].fixed if letter == "C" else 0) for i, letter in enumerate(letters) if letter in "AC"]
    plan.rm_memory = plan.rm >= 0 and choice[plan.rm] == "m"
    plan.sibmem = plan.rm_memory and operands[plan.rm].sibmem
    plan.no_rm = encoding.modrm and plan.rm < 0
    plan.digit = encoding.digit
    plan.opcode = encoding.opcode[-1]
    plan.immediate_bytes = encoding.immediate_bytes if plan.is4 < 0 else 0
    plan.w, plan.length_code = encoding.w, encoding.length_code
    plan.features = encoding.features
    plan.index_bits = operands[plan.rm].index_bits if plan.rm >= 0 else 0
    pp = _PP[encoding.prefix]
    if plan.space:
        plan.mmm = encoding.opcode_map
        plan.p1 = encoding.w << 7 | (encoding.length_code & 3 if plan.space == 1 else 0) << 2 | pp
        plan.short_vex = plan.space == 1 and encoding.opcode_map == 1 and encoding.w == 0
    else:
        plan.mmm, plan.p1, plan.short_vex = 0, 0, False
    plan.legacy_prefix = (b"\xf0" if encoding.lock else b"") + (bytes([encoding.prefix]) if encoding.prefix else b"")
    plan.legacy_opcode = encoding.opcode
    # Byte registers 4 to 7 are spl .. dil only with a REX prefix.
    plan.byte_registers = [i for i, o in enumerate(operands)
                           if o.kind == "gpr" and o.bits == 8 and letters[i] in "RMUO" and choice[i] == "r"]
    plan.disp8, plan.broadcast_disp8, plan.broadcast_ok = 1, 0, False
    if plan.rm_memory and plan.space == 2:
        operand = operands[plan.rm]
        plan.disp8 = max(1, (row.disp8_bits or operand.memory_bits) // 8)
        plan.broadcast_disp8 = operand.broadcast_bits // 8
        plan.broadcast_ok = operand.broadcast_bits > 0
    plan.raw_immediate = True
    plan.operand_bits = 0
    plan.immediate_limits = (0, 0)
    if plan.immediate >= 0:
        operand = operands[plan.immediate]
        size = plan.immediate_bytes * 8
        # The operand's size: that of the other operands where the immediate is sign-extended to it.
        full = max([o.bits for o in operands if o.kind == "gpr"] or [size])
        widest = operand.immediate_bits or operand.bits
        if letters[plan.immediate] == "1":
            plan.immediate_limits = (1, 1)
        elif size == 8 and widest == 8:
            plan.immediate_limits = (0 if operand.unsigned_byte else -128, 255)
        elif size == full:
            plan.immediate_limits = (-(1 << size - 1), (1 << size) - 1)
        else:
            plan.immediate_limits = (-(1 << size - 1), (1 << size - 1) - 1)
            plan.raw_immediate = False
        plan.operand_bits = full
    plan.registers = [_registers_of(o.kind, o.fixed) for o in operands]
    plan.plain = plan.immediate < 0 and not plan.fixed and not (plan.space == 1 and plan.short_vex)
    return plan


def _memory(memory: Memory, reg: int, scale_bytes: int, row: Any, position: int,
            sib: bool) -> tuple[int, int, int, bytes]:
    """(bit 3 of the index, bit 3 of the base, bit 4 of a vector index, ModRM and what follows it).

    sib: there is a SIB byte even where nothing asks for one."""
    base: Any = memory.base
    index: Any = memory.index
    disp = memory.disp
    reg = (reg & 7) << 3
    if base is None:
        if index is None:
            return 0, 0, 0, bytes((reg | 4, 0x25)) + _disp32(disp, row, position)
        x = index.number
        sib = _SCALES[memory.scale] | (x & 7) << 3 | 5
        return x >> 3 & 1, 0, x >> 4, bytes((reg | 4, sib)) + _disp32(disp, row, position)
    b = base.number
    low = b & 7
    if not disp and low != 5:
        mod, tail = 0, b""
    elif -128 * scale_bytes <= disp <= 127 * scale_bytes and not disp % scale_bytes:
        mod, tail = 0x40, bytes((disp // scale_bytes & 0xFF,))
    else:
        mod, tail = 0x80, _disp32(disp, row, position)
    if index is not None:
        x = index.number
        return x >> 3 & 1, b >> 3, x >> 4, bytes((mod | reg | 4, _SCALES[memory.scale] | (x & 7) << 3 | low)) + tail
    if low == 4 or sib:
        return 0, b >> 3, 0, bytes((mod | reg | 4, 0x20 | low)) + tail
    return 0, b >> 3, 0, bytes((mod | reg | low,)) + tail


_SCALES = {1: 0, 2: 0x40, 4: 0x80, 8: 0xC0}


def _disp32(disp: int, row: Any, position: int) -> bytes:
    if not -1 << 31 <= disp < 1 << 31:
        raise EncodeError(f"row {row.name}, operand {position}: found displacement {disp}; expected 32 bits, signed")
    return (disp & 0xFFFFFFFF).to_bytes(4, "little")


def _check_memory(memory: Memory, plan: _Plan, row: Any, position: int) -> None:
    """Everything that `_memory` takes for granted."""
    base: Any = memory.base
    index: Any = memory.index
    if index is None and type(base) is Register and base.kind == "gpr" and memory.label is None \
            and not plan.index_bits and memory.scale == 1:
        return  # by far the most
    wrong = ""
    if base is not None and type(base) is not Register:
        wrong = f"base {base!r}; expected a physical register"
    elif base is not None and base.kind != "gpr":
        wrong = f"base {base}; expected a general register"
    elif index is not None and type(index) is not Register:
        wrong = f"index {index!r}; expected a physical register"
    elif memory.scale not in _SCALES:
        wrong = f"scale {memory.scale}; expected 1, 2, 4 or 8"
    elif plan.index_bits:
        if index is None or index.kind != "vec":
            wrong = f"index {index}; expected a vector register of {plan.index_bits} bits"
        elif index.number > 15 and plan.space != 2:
            wrong = f"vector index {index.number}; expected 0 to 15 (no EVEX encoding)"
    elif index is not None and (index.kind != "gpr" or index.number == 4):
        wrong = f"index {index}; expected a general register other than rsp"
    if not wrong and memory.label is not None and plan.sibmem:
        wrong = "a rip-relative address; expected rows of memory: [base + stride + disp]"
    if not wrong and memory.label is not None and (base is not None or index is not None):
        wrong = "a label with base or index; expected rip-relative [label + disp]"
    if wrong:
        raise EncodeError(f"row {row.name}, operand {position}: found {wrong}")


def _choose(instruction: Instruction) -> _Plan:
    """The encoding that GNU as would take, checked; EncodeError if there is none."""
    row = instruction.row
    operands: list[Any] = instruction.operands
    plans = (row.plans or _plans(row)).get(tuple(map(type, operands)))
    if plans is None:
        raise _mismatch(instruction)
    needs_evex = instruction.mask is not None
    if not needs_evex:
        for operand in operands:
            kind = type(operand)
            if kind is Register:
                if operand.number > 15:
                    needs_evex = True
                    break
            elif kind is Memory and (operand.broadcast or (
                    operand.index is not None and operand.index.number > 15)):
                needs_evex = True
                break
    first: _Plan | None = None
    for plan in plans:
        if needs_evex and plan.space != 2:
            continue
        if first is None and plan.plain:
            return plan
        if plan.immediate >= 0:
            value = operands[plan.immediate].value
            if not plan.raw_immediate and plan.immediate_limits[1] < value < 1 << plan.operand_bits <= 1 << 32:
                value -= 1 << plan.operand_bits
            low, high = plan.immediate_limits
            if not low <= value <= high:
                continue
        if plan.fixed and any(operands[i].number != n for i, n in plan.fixed):
            continue
        if first is None:
            first = plan
            # Only VEX register forms have a second way that can be shorter: operands swapped, so that the one which
            # needs the third prefix bit stands in ModRM.reg.
            if plan.space == 1 and plan.short_vex and plan.rm >= 0 and not plan.rm_memory \
                    and operands[plan.rm].number > 7 and plan.reg >= 0:
                continue
            return plan
        if first.space != plan.space or plan.rm == first.rm:
            break
        return plan if operands[plan.rm].number < 8 else first
    if first is None:
        raise _mismatch(instruction)
    return first


def _describe(operand: Any) -> str:
    """An operand of a row, for messages."""
    parts = [{"gpr": "general register", "vec": "vector register", "mask": "opmask register", "tile": "tile register",
              "imm": "immediate", "mem": "memory", "label": "label"}[operand.kind] + f" of {operand.bits} bits"]
    if operand.unsigned_byte:
        parts[-1] += ", not negative" if operand.kind == "imm" else ""
    if operand.fixed is not None:
        parts[0] += f" (only number {operand.fixed})"
    if operand.memory_bits and operand.kind != "mem":
        parts.append(f"memory of {operand.memory_bits} bits")
    if operand.broadcast_bits:
        parts.append(f"broadcast of {operand.broadcast_bits} bits")
    if operand.immediate_bits and operand.kind != "imm":
        parts.append(f"immediate of {operand.immediate_bits} bits")
    return " or ".join(parts)


def _mismatch(instruction: Instruction) -> EncodeError:
    """The most telling message for operands that no encoding takes."""
    row, operands = instruction.row, instruction.operands
    if len(operands) != len(row.operands):
        return EncodeError(f"row {row.name}: found {len(operands)} operands; expected {len(row.operands)}: "
                           + ", ".join(_describe(o) for o in row.operands))
    for position, (found, expected) in enumerate(zip(operands, row.operands, strict=True)):
        kind = type(found)
        where = f"row {row.name}, operand {position}: found {found}; expected {_describe(expected)}"
        allowed = {Register: expected.kind in _REGISTERS, Memory: expected.memory_bits > 0,
                   Immediate: expected.kind == "imm" or expected.immediate_bits > 0,
                   LabelReference: expected.kind == "label"}.get(kind, False)
        if not allowed:
            return EncodeError(where)
        if isinstance(found, Register) and expected.fixed is not None and found.number != expected.fixed:
            return EncodeError(where)
        if isinstance(found, Immediate):
            bits = expected.immediate_bits or expected.bits
            if not (0 if expected.unsigned_byte else -(1 << bits - 1)) <= found.value < 1 << bits:
                return EncodeError(where)
    if row.evex_features is None and any(
            instruction.mask is not None or (isinstance(o, Register) and o.number > 15)
            or (isinstance(o, Memory) and o.broadcast) for o in operands):
        return EncodeError(f"row {row.name}: found an opmask, a broadcast or a register above 15; expected none of "
                           "them, because the row has no EVEX encoding")
    return EncodeError(f"row {row.name}: found operands {', '.join(map(str, operands))}; expected one of the forms "
                       + ", ".join(repr(e.text) for e in row.encodings))


_REGISTERS = {"gpr": 16, "vec": 32, "mask": 8, "tile": 8}


def _check_registers(instruction: Instruction, plan: _Plan) -> None:
    """Kinds, numbers, masks: raises EncodeError."""
    row = instruction.row
    operands: list[Any] = instruction.operands
    for position, found in enumerate(operands):
        kind = type(found)
        if kind is Register:
            if found not in plan.registers[position]:
                raise EncodeError(f"row {row.name}, operand {position}: found {found}; "
                                  f"expected {_describe(row.operands[position])}")
        elif kind is Memory:
            _check_memory(found, plan, row, position)
            if found.broadcast and not plan.broadcast_ok:
                raise EncodeError(f"row {row.name}, operand {position}: found a broadcast; "
                                  f"expected {_describe(row.operands[position])}")
    if plan.index_bits:
        # The processor refuses gathers whose registers coincide (SDM volume 2, VGATHERDPS).
        vectors = [getattr(o.index if isinstance(o, Memory) else o, "number", -1) for o in operands]
        if instruction.operands and not isinstance(instruction.operands[0],
                                                   Memory) and len(set(vectors)) < len(vectors):
            raise EncodeError(f"row {row.name}: found vector registers {vectors}; expected destination, index and mask "
                              "to differ")
    if len(operands) == 3 and row.operands[0].kind == "tile" and len(set(operands)) < 3:
        # So it does products of tiles (SDM volume 2, TDPBF16PS).
        raise EncodeError(f"row {row.name}: found tiles {[o.number for o in operands]}; expected three that differ")
    mask: Any = instruction.mask
    if mask is not None:
        if type(mask) is not Register or mask.kind != "mask" or not 1 <= mask.number <= 7:
            raise EncodeError(f"row {row.name}: found opmask {mask}; expected a mask register 1 to 7")
        if not row.masking:
            raise EncodeError(f"row {row.name}: found opmask k{mask.number}; expected none, the row takes no opmask")
    elif row.masking == "required" and plan.space == 2:
        raise EncodeError(f"row {row.name}: found no opmask; expected one of k1 to k7")
    if instruction.zeroing:
        if mask is None:
            raise EncodeError(f"row {row.name}: found zeroing without an opmask; expected an opmask")
        if row.masking != "kz" or isinstance(instruction.operands[0], Memory):
            raise EncodeError(f"row {row.name}: found zeroing; expected merging, the destination can't be zeroed")


def _legacy_head(plan: _Plan, operands: list[Any], reg: int, x: int, b: int) -> bytes:
    """Prefixes, REX and opcode (SDM volume 2, section 2.2.1)."""
    rex = (plan.w << 3) | (reg >> 3) << 2 | x << 1 | b
    opcode = plan.legacy_opcode
    if plan.low >= 0:
        low = operands[plan.low].number
        rex |= low >> 3
        opcode = opcode[:-1] + bytes((opcode[-1] | low & 7,))
    prefix = plan.legacy_prefix
    if rex:
        return prefix + bytes((0x40 | rex,)) + opcode
    if plan.byte_registers and any(4 <= operands[i].number < 8 for i in plan.byte_registers):
        return prefix + b"\x40" + opcode
    return prefix + opcode


def _vex_head(plan: _Plan, operands: list[Any], reg: int, x: int, b: int) -> bytes:
    """VEX of two or three bytes, and opcode (section 2.3)."""
    v = operands[plan.vvvv].number if plan.vvvv >= 0 else 0
    p1 = plan.p1 | (~v & 15) << 3
    if plan.short_vex and not x and not b:
        return bytes((0xC5, p1 | (0 if reg & 8 else 0x80), plan.opcode))
    return bytes((0xC4, (0 if reg & 8 else 0x80) | (0 if x else 0x40) | (0 if b else 0x20) | plan.mmm, p1, plan.opcode))


def _evex_head(plan: _Plan, instruction: Instruction, reg: int, x: int, b: int, high_index: int) -> bytes:
    """EVEX and opcode (section 2.7). high_index: bit 4 of the index register."""
    operands: list[Any] = instruction.operands
    v = operands[plan.vvvv].number if plan.vvvv >= 0 else high_index << 4
    p0 = (0 if reg & 8 else 0x80) | (0 if x else 0x40) | (0 if b else 0x20) | (0 if reg & 16 else 0x10) | plan.mmm
    p2 = plan.length_code << 5 | (0 if v & 16 else 8)
    if instruction.mask is not None:
        p2 |= instruction.mask.number | (0x80 if instruction.zeroing else 0)
    if plan.rm_memory and operands[plan.rm].broadcast:
        p2 |= 0x10
    return bytes((0x62, p0, plan.p1 | (~v & 15) << 3 | 4, p2, plan.opcode))


def encode_instruction(
    instruction: Instruction, available: frozenset[str] | None = None
) -> tuple[bytes, str | None, int]:
    """One instruction that is no jump to a label: (bytes, label of its rip-relative address or None, offset of that
    32-bit field). The field holds the displacement still to be added to (label - end of the instruction).

    available: the features that may be used; None takes all. Raises EncodeError.
    """
    operands: list[Any] = instruction.operands
    plan = _choose(instruction)
    _check_registers(instruction, plan)
    if available is not None and not plan.features <= available:
        missing = ", ".join(sorted(plan.features - available))
        raise EncodeError(f"row {instruction.row.name}: found a target without {missing}; expected a row, registers "
                          "and operands that the target has")
    reg = operands[plan.reg].number if plan.reg >= 0 else (plan.digit if plan.digit > 0
                                                           else 0)
    space = plan.space
    label: str | None = None
    x = b = high_index = 0
    tail = b""
    if plan.rm >= 0:
        if plan.rm_memory:
            memory: Memory = operands[plan.rm]
            if memory.label is not None:
                label = memory.label
                tail = bytes(((reg & 7) << 3 | 5,)) + _disp32(memory.disp, instruction.row, plan.rm)
            else:
                x, b, high_index, tail = _memory(
                    memory, reg, plan.broadcast_disp8 if memory.broadcast else plan.disp8, instruction.row, plan.rm,
                    plan.sibmem)
        else:
            rm = operands[plan.rm].number
            x, b = rm >> 4, rm >> 3 & 1
            tail = bytes((0xC0 | (reg & 7) << 3 | rm & 7,))
    elif plan.no_rm:
        tail = bytes((0xC0 | (reg & 7) << 3,))
    if space == 0:
        head = _legacy_head(plan, operands, reg, x, b)
    elif space == 1:
        head = _vex_head(plan, operands, reg, x, b)
    else:
        head = _evex_head(plan, instruction, reg, x, b, high_index)
    field = len(head) + 1
    if plan.immediate_bytes:
        size = plan.immediate_bytes
        value = operands[plan.immediate].value
        tail += (value & ((1 << 8 * size) - 1)).to_bytes(size, "little")
    elif plan.is4 >= 0:
        tail += bytes((operands[plan.is4].number << 4,))
    return head + tail, label, field


# --- Whole functions -----------------------------------------------------------------------------------------------

_NOPS = (
    b"", b"\x90", b"\x66\x90", b"\x0f\x1f\x00", b"\x0f\x1f\x40\x00", b"\x0f\x1f\x44\x00\x00",
    b"\x66\x0f\x1f\x44\x00\x00",
    b"\x0f\x1f\x80\x00\x00\x00\x00", b"\x0f\x1f\x84\x00\x00\x00\x00\x00", b"\x66\x0f\x1f\x84\x00\x00\x00\x00\x00",
    b"\x66\x2e\x0f\x1f\x84\x00\x00\x00\x00\x00", b"\x66\x66\x2e\x0f\x1f\x84\x00\x00\x00\x00\x00",
)
"""The recommended multi-byte nops (SDM volume 2, NOP), as GNU as chooses them for 64-bit code."""


def padding(size_bytes: int) -> bytes:
    """Nops that fill `size_bytes`; a jump first where there would be more than eight of them, as GNU as does."""
    jump = b""
    if size_bytes >= 88:
        distance = size_bytes - 2
        if distance < 128:
            jump = bytes((0xEB, distance))
        else:
            jump = b"\xe9" + (size_bytes - 5).to_bytes(4, "little")
    whole, rest = divmod(size_bytes - len(jump), 11)
    return jump + _NOPS[11] * whole + _NOPS[rest]


class _Jump:
    """A jump to a label: short until it turns out not to reach. short is empty where there is no short form."""

    __slots__ = ("is_long", "long", "row", "short", "target")

    def __init__(self, row: Any, target: str, short: bytes, long: bytes) -> None:
        self.row = row
        self.target = target
        self.short = short
        self.long = long
        self.is_long = not short


def _jump(row: Any, target: str) -> _Jump:
    opcodes = {e.code_bytes: e.opcode for e in row.encodings}
    return _Jump(row, target, opcodes.get(1, b""), opcodes[4])


def encode(function: MachineFunction, features: Iterable[str] | None = None) -> EncodedCode:
    """Encode a function. features: what the target has; None takes every instruction.

    Raises EncodeError for an instruction without an encoding, for one that needs a feature outside `features`, and
    for labels that are unknown or defined twice.
    """
    available = None if features is None else frozenset(features)
    pieces: list[Any] = []  # bytes, _Jump or Label
    fixups: list[tuple[int, int, str]] = []  # piece, offset of the field in it, label
    locations: list[tuple[int, Location]] = []
    last_location: Location | None = None
    for item in function.body:
        if type(item) is not Instruction:
            pieces.append(item)
            continue
        row = item.row
        location = item.location
        if location is not None and location is not last_location and location != last_location:
            locations.append((len(pieces), location))
            last_location = location
        operands = item.operands
        if len(operands) == 1 and type(operands[0]) is LabelReference and row.operands \
                and row.operands[0].kind == "label":
            pieces.append(_jump(row, operands[0].name))
            continue
        code, label, offset = encode_instruction(item, available)
        if label is not None:
            fixups.append((len(pieces), offset, label))
        pieces.append(code)
    offsets, label_offsets, size, align = _relax(function, pieces)
    parts: list[bytes] = []
    for number, piece in enumerate(pieces):
        if type(piece) is bytes:
            parts.append(piece)
        elif type(piece) is Label:
            parts.append(padding(offsets[number + 1] - offsets[number]))
        else:
            distance = label_offsets[piece.target] - offsets[number + 1]
            if piece.is_long:
                parts.append(piece.long + distance.to_bytes(4, "little", signed=True))
            else:
                parts.append(piece.short + distance.to_bytes(1, "little", signed=True))
    relocations: list[tuple[int, str, int]] = []
    for number, offset, label in fixups:
        if label in function.externals:
            code = parts[number]
            stored = int.from_bytes(code[offset:offset + 4], "little", signed=True)
            parts[number] = code[:offset] + bytes(4) + code[offset + 4:]
            relocations.append((offsets[number] + offset, label, stored + offset - len(code)))
            continue
        if label not in label_offsets:
            raise EncodeError(f"function {function.name}: found a reference to {label!r}; expected a label or constant "
                              "of the function")
        code = parts[number]
        stored = int.from_bytes(code[offset:offset + 4], "little", signed=True)
        distance = label_offsets[label] + stored - offsets[number + 1]
        parts[number] = code[:offset] + distance.to_bytes(4, "little", signed=True) + code[offset + 4:]
    code_bytes = size
    for name, (alignment, content) in function.constants.items():
        parts.append(b"\xcc" * (label_offsets[name] - size))
        parts.append(content)
        size = label_offsets[name] + len(content)
        align = max(align, alignment)
    return EncodedCode(b"".join(parts), code_bytes, label_offsets, [(offsets[i], place) for i, place in locations],
                       align, relocations, offsets)


def _relax(function: MachineFunction, pieces: list[Any]) -> tuple[list[int], dict[str, int], int, int]:
    """Offsets of all pieces (and the end), of all labels and constants, the size of the code, its alignment.

    Jumps start short and only ever grow, so this ends. Which ones grow depends on the order, as padding shrinks when
    code before it grows; the order is that of GNU as (`relax_segment`, `relax_frag`): in each pass a jump sees the
    new offsets of what lies before it, and takes what lies after to move as far as itself, unless padding lies between.
    """
    align = 16
    starts: list[int] = []  # of jumps and labels: offsets, the label's before its padding
    items: list[Any] = []
    labels: dict[str, int] = {}
    order: dict[str, tuple[int, int]] = {}  # of labels: place in items, region
    regions: list[int] = []  # of items: how many paddings lie before
    here = region = 0
    for piece in pieces:
        kind = type(piece)
        if kind is bytes:
            here += len(piece)
            continue
        starts.append(here)
        regions.append(region)
        items.append(piece)
        if kind is not Label:
            here += len(piece.long) + 4 if piece.is_long else len(piece.short) + 1
            continue
        if piece.align > 1:
            here += -here % piece.align
            align = max(align, piece.align)
            region += 1
        if piece.name in labels:
            raise EncodeError(f"function {function.name}: found label {piece.name!r} twice; expected each once")
        labels[piece.name] = here
        order[piece.name] = len(items), region
    for item in items:
        if type(item) is not Label and item.target not in labels:
            raise EncodeError(f"function {function.name}, row {item.row.name}: found a jump to {item.target!r}; "
                              "expected a label of the function")
    _grow(items, starts, regions, labels, order)
    offsets: list[int] = []
    here = 0
    for piece in pieces:
        offsets.append(here)
        kind = type(piece)
        if kind is bytes:
            here += len(piece)
        elif kind is Label:
            here += -here % piece.align
        else:
            here += len(piece.long) + 4 if piece.is_long else len(piece.short) + 1
    offsets.append(here)
    size = here
    for name, (alignment, content) in function.constants.items():
        if name in labels:
            raise EncodeError(f"function {function.name}: found constant {name!r} twice; expected each label once")
        here += -here % alignment
        labels[name] = here
        here += len(content)
    return offsets, labels, size, align


def _grow(items: list[Any], starts: list[int], regions: list[int], labels: dict[str, int],
          order: dict[str, tuple[int, int]]) -> None:
    """Passes of `_relax`, in place, until no jump grows any more."""
    moved = True
    while moved:
        moved = False
        stretch = 0
        for place, item in enumerate(items):
            was = starts[place]
            start = starts[place] = was + stretch
            if type(item) is Label:
                if item.align > 1:
                    growth = -start % item.align - -was % item.align
                    if growth:
                        stretch += growth
                        moved = True
                labels[item.name] += stretch
            elif not item.is_long:
                target = labels[item.target]
                after, its_region = order[item.target]
                if stretch and after > place:
                    if stretch < 0 or its_region == regions[place]:
                        target += stretch
                    elif target < start:
                        continue
                short = len(item.short) + 1
                if not -128 <= target - start - short <= 127:
                    item.is_long = moved = True
                    stretch += len(item.long) + 4 - short
