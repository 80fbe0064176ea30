"""Machine IR (all registers physical) -> bytes, for families whose instructions all have one size.

Enters: a `MachineFunction` whose rows say what their words are (`words` of a row, such as those of
sapper/targets/aarch64/rows.py). Leaves: `EncodedCode`, as encode.py has it. Holds: the bytes are those that GNU as
gives for the text of print.py in the family's style; constants lie behind the code and are reached by their distance.
What stands elsewhere in the file is reached by words that are distances themselves (a field `l` of 32 bits, in bytes):
only these are relocated.
"""

from __future__ import annotations

from typing import Any

from ..ir.nodes import Location
from ..targets import module_of
from .encode import EncodedCode, EncodeError
from .machine import Immediate, Instruction, Label, LabelReference, MachineFunction, Memory, Register
from .print import Style

CODE_ALIGN_BYTES = 16


def encode(function: MachineFunction, target: Any, checked: bool = True) -> EncodedCode:
    """Raises EncodeError for an instruction that no word of its row holds, and if `checked` for one that the target
    lacks."""
    rows = _rows_of(target)
    size, nop, unit = target.word_bytes, rows.NOP, rows.DISTANCE_BYTES
    offsets: list[int] = []
    labels: dict[str, int] = {}
    at, align = 0, CODE_ALIGN_BYTES
    for item in function.body:
        if isinstance(item, Label):
            align = max(align, item.align)
            at = -(-at // item.align) * item.align
            labels[item.name] = at
        offsets.append(at)
        at += size * isinstance(item, Instruction)
    code_bytes = at
    for label, (alignment, content) in function.constants.items():
        align = max(align, alignment)
        at = -(-at // alignment) * alignment
        labels[label] = at
        at += len(content)
    code = bytearray(nop * (code_bytes // size)).ljust(at, b"\xcc")     # as print.py pads
    lines: list[tuple[int, Location]] = []
    relocations: list[tuple[int, str, int]] = []
    for offset, item in zip(offsets, function.body, strict=True):
        if isinstance(item, Instruction):
            if checked and not item.row.features <= target.features:
                raise EncodeError(f"row {item.row.name}: found the target {target.name}; expected one with "
                                  f"{', '.join(sorted(item.row.features - target.features))}")
            elsewhere = _elsewhere(item, function)
            if elsewhere:
                relocations.append((offset, elsewhere, 0))
                code[offset:offset + size] = bytes(size)
            else:
                code[offset:offset + size] = _word(item, offset, labels, unit).to_bytes(size, "little")
            if item.location is not None and (not lines or lines[-1][1] != item.location):
                lines.append((offset, item.location))
    for label, (_, content) in function.constants.items():
        code[labels[label]:labels[label] + len(content)] = content
    return EncodedCode(bytes(code), code_bytes, labels, lines, align, relocations, [*offsets, code_bytes])


_DISTANCE_BITS = 32


def _elsewhere(item: Instruction, function: MachineFunction) -> str:
    """The label of another function or table whose distance the word is; "" for any other word."""
    row = item.row
    if row.operands and row.operands[0].kind == "label" and len(row.words[0].fields["l"]) == _DISTANCE_BITS:
        name = getattr(item.operands[0], "name", "")
        return name if name in function.externals else ""
    return ""


def style_of(target: Any) -> Style:
    """How the family's instructions are written as text."""
    text = module_of(target.family, "text")
    return Style(text.head(target), text.COMMENT, text.print_instruction)


def _rows_of(target: Any) -> Any:
    return module_of(target.family, "rows")


_CLASSES: dict[str, type] = {"gpr": Register, "fpr": Register, "vec": Register, "mem": Memory,
                            "imm": Immediate, "label": LabelReference}


def _word(item: Instruction, offset: int, labels: dict[str, int], unit: int) -> int:
    """The word of one instruction that lies at `offset`. unit: bytes that distances are counted by."""
    row, found = item.row, item.operands
    if len(found) != len(row.operands):
        raise EncodeError(f"row {row.name}: found {len(found)} operands; expected {len(row.operands)}: {row.syntax}")
    codes: dict[str, int] = {}
    memory: Any = None
    distance: int | None = None
    for place, (operand, form) in enumerate(zip(found, row.operands, strict=True)):
        made: dict[str, int] | None = None
        if type(operand) is _CLASSES[form.kind]:
            if isinstance(operand, Register):
                code = form.register_code(operand)
                made = None if code is None else {form.field: code}
            elif isinstance(operand, Immediate):
                made = form.immediate_codes(operand.value)
            elif isinstance(operand, LabelReference):
                distance, made = _distance(row, operand.name, offset, labels), {}
            elif isinstance(operand, Memory):
                memory, made = operand, {}
                if operand.label is not None:
                    distance = _distance(row, operand.label, offset, labels)
        if made is None:
            raise EncodeError(f"row {row.name}, operand {place}: found {operand}; expected what `{row.syntax}` says")
        codes |= made
    for way in row.words:
        reached = way.reaches(memory, row.memory_bits // 8) if memory is not None else {}
        if reached is None:
            continue
        if "l" in way.fields:
            assert distance is not None
            bits = len(way.fields["l"])
            unit = 1 if bits == _DISTANCE_BITS else unit
            if not -1 << bits - 1 <= distance // unit < 1 << bits - 1:
                reach = bits + unit.bit_length() - 1
                raise EncodeError(f"row {row.name}: found a distance of {distance} bytes; expected {reach} bits, "
                                  "signed; mend: a smaller function")
            reached = reached | {"l": distance // unit & (1 << bits) - 1}
        word: int | None = way.with_codes(codes | reached)
        if word is not None:
            return word
    raise EncodeError(f"row {row.name}: found operands {', '.join(map(str, found))}; expected some that one of its "
                      f"words holds: `{row.syntax}`")


def _distance(row: Any, label: str, offset: int, labels: dict[str, int]) -> int:
    if label not in labels:
        raise EncodeError(f"row {row.name}: found the label {label}; expected one of this function")
    return labels[label] - offset
