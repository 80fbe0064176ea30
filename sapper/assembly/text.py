"""Assembly as text, in Intel or AT&T syntax, into the assembly being built.

Enters: lines as GNU as takes them (labels, `.balign`, comments, instructions), and operands bound by name: `@x` stands
for the register, address or integer given as `x`. Leaves: the same instructions that the mnemonics of notation.py
would add, each at its own line of the text. Holds: text that print.py made gives back the same instructions.

Intel:  vaddps zmm1{k1}{z}, zmm2, dword ptr [rax + rcx*4 + 8]{1to16}
AT&T:   vaddps 8(%rax,%rcx,4){1to16}, %zmm2, %zmm1{%k1}{z}
Source: GNU as manual, "AT&T Syntax versus Intel Syntax" (operand order, size suffixes, movzbl and its kin).
"""

from __future__ import annotations

import linecache
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..codegen.print import local_label
from ..ir.nodes import Location
from .build import Assembly
from .errors import AssemblyError
from .notation import Address, LabelName, Mem, Reg

SYNTAXES = ("intel", "att")
_COMMENT = re.compile(r"#(?!@).*|//.*|;.*")
_LABEL = re.compile(r"\s*([A-Za-z_.$][\w.$]*)\s*:")
_DECORATION = re.compile(r"\{\s*(%?[\w@]+)\s*\}")
_NUMBER = re.compile(r"([+-]?)\s*(0[xX][0-9a-fA-F]+|0[bB][01]+|0[0-7]*|[1-9][0-9]*)$")
_NUMBER_LENGTH = 66  # 0b and 64 digits
_MEMORY = re.compile(r"(?:(\w+)\s+ptr\b)?\s*(?:ds:)?\s*\[([^\[\]]*)\]", re.IGNORECASE)
_TERM = re.compile(r"\s*([+-])\s*([^+-]*)")
_IGNORED = (".intel_syntax", ".att_syntax", ".text", ".globl", ".type", ".size")
_SUFFIX_BITS = {"b": 8, "w": 16, "l": 32, "q": 64, "x": 128, "y": 256, "z": 512, "s": 32}
_ATT_NAMES = {"cltd": "cdq", "cqto": "cqo", "movabs": "mov", "movabsq": "mov", "movslq": "movsxd"}
_EXTENDS = re.compile(r"mov([sz])([bw])([wlq])$")
NO_INDEX = "riz"
"""How GNU tools spell that there is no index, where an instruction always has a byte for one."""
_SHIFTS = frozenset({"shl", "sal", "shr", "sar", "rol", "ror"})


class TextReader:
    """One text, read line by line. names: what `@name` stands for."""

    def __init__(self, assembly: Assembly, syntax: str, names: Mapping[str, Any], start: Location | None) -> None:
        if syntax not in SYNTAXES:
            raise AssemblyError("notation", "an unknown syntax", start, syntax, " or ".join(SYNTAXES))
        self.assembly = assembly
        self.table = assembly.table
        self.syntax = syntax
        self.names = names
        self.start = start
        self.labels: dict[str, LabelName] = {}
        self.named_at: dict[str, tuple[Location | None, str]] = {}
        self.constants = {local_label(label): label for label in assembly.constants}
        self.location = start
        self.line = ""

    def fail(self, headline: str, found: str = "", expected: str = "", mend: str = "") -> AssemblyError:
        return AssemblyError("notation", headline, self.location, found or self.line.strip(), expected, mend)

    def read(self, text: str) -> None:
        source = [] if self.start is None else linecache.getlines(self.start.file)
        for number, line in enumerate(text.split("\n")):
            self.line = line
            if self.start is not None:
                # A text that begins on the line of its call, as a triple-quoted one does, gives each line its own. Of
                # one that is no file's, lines are counted.
                place = Location(self.start.file, self.start.line + number, 1, 1)
                there = not source or (place.line <= len(source) and line.strip() in source[place.line - 1])
                self.location = place if there else self.start
            self.read_line(_COMMENT.sub("", line))
        for name, label in self.labels.items():
            if not label.placed:
                self.location, self.line = self.named_at[name]
                raise self.fail(f"label {name} is not in the text", name, "a line `name:`")

    def read_line(self, line: str) -> None:
        while found := _LABEL.match(line):
            label = self.label(found.group(1))
            if label.placed:
                raise self.fail("a label is placed twice", found.group(1), "one place")
            self.assembly.place(label)
            line = line[found.end():]
        line = line.strip()
        if not line or line.startswith(_IGNORED):
            return
        if line.startswith("."):
            self.directive(line)
            return
        word, rest = _first(line)
        if word in ("lock", "rep", "repe", "repne", "{vex}"):
            second, rest = _first(rest)
            word = f"{word} {second}"
        parts = _split(rest)
        if self.syntax == "att" and word.startswith(("jmp", "call")):
            parts = [part.strip().removeprefix("*") for part in parts]
        operands = [self.operand(part) for part in parts]
        if self.syntax == "att":
            operands.reverse()
            self.emit_att(word, operands)
        else:
            self.emit(word, operands)

    def directive(self, line: str) -> None:
        name, _, rest = line.partition(" ")
        if name not in (".balign", ".align", ".p2align"):
            raise self.fail(f"the directive {name} has no meaning here", expected=".balign n, .p2align n",
                            mend="data goes through a.constant(...)")
        value = self.number(rest.split(",")[0].strip())
        allowed = range(13) if name == ".p2align" else [1 << power for power in range(13)]
        if value is None or value not in allowed:
            raise self.fail("an alignment", rest, "0 to 12" if name == ".p2align" else "a power of two up to 4096")
        made = self.assembly.label("aligned")
        self.assembly.place(made, 1 << value if name == ".p2align" else value)

    def label(self, name: str) -> LabelName:
        found = self.labels.get(name)
        if found is None:
            found = self.labels[name] = self.assembly.label(name.lstrip(".") + ".")
            self.named_at[name] = self.location, self.line
        return found

    # --- Operands ---------------------------------------------------------------------------------------------------

    def number(self, text: str) -> int | None:
        found = _NUMBER.match(text)
        if found is None:
            return None
        sign, digits = found.groups()
        octal = digits[0] == "0" and digits.isdigit()
        value = int(digits, 8 if octal else 0) if len(digits) <= _NUMBER_LENGTH else 1 << 64
        if value >> 64:
            raise self.fail("a number of more than 64 bits", text, "at most 0xffffffffffffffff")
        value = -value if sign == "-" else value
        return value - (1 << 64) if value >> 63 == 1 else value  # as disassemblers write negative ones

    def bound(self, name: str) -> Any:
        if name not in self.names:
            raise self.fail(f"@{name} is not bound", f"@{name}", ", ".join(f"@{n}" for n in self.names) or "no names",
                            f"give {name}=...")
        return self.names[name]

    def register(self, text: str) -> Reg | None:
        text = text.strip()
        if self.syntax == "att" and not text.startswith(("%", "@")):
            return None
        text = text.removeprefix("%")
        if text.startswith("@"):
            name, _, size = text[1:].partition(":")
            found = self.bound(name)
            if not isinstance(found, Reg):
                return None
            return found.at(int(size)) if size else found
        entry = self.table.REGISTERS.get(text.lower())
        if entry is None:
            return None
        kind, number, bits = entry
        from ..codegen.machine import Register

        return Reg(kind, bits, Register(kind, number))

    def operand(self, text: str) -> Any:
        text = text.strip()
        mask: Reg | None = None
        zeroing, spread = False, 0
        while text.endswith("}"):
            at = max(0, text.rfind("{"))
            inside = _DECORATION.fullmatch(text[at:])
            word = inside.group(1) if inside else ""
            named = self.register(word)
            if word == "z" and not zeroing:
                zeroing = True
            elif re.fullmatch(r"1to(2|4|8|16|32)", word) and not spread:
                spread = int(word[3:])
            elif named is not None and named.kind == "mask" and mask is None:
                mask = named
            else:
                raise self.fail("a decoration of an operand", text[at:], "{k1}, {z} or {1to16}, each once")
            text = text[:at].strip()
        found = self.plain(text)
        if isinstance(found, Mem):
            found.spread = spread
        elif spread:
            raise self.fail("a broadcast of what is no memory", text, "memory")
        if mask is not None:
            if not isinstance(found, (Reg, Mem)):
                raise self.fail("an opmask on what is neither register nor memory", text)
            found = found[(mask, "z")] if zeroing else found[mask]
        elif zeroing:
            raise self.fail("{z} without an opmask", text, "{k1}{z}")
        return found

    def plain(self, text: str) -> Any:
        register = self.register(text)
        if register is not None:
            return register
        if text.startswith("@") and "[" not in text and "(" not in text:
            found = self.bound(text[1:])
            return Mem(found) if isinstance(found, Address) else found
        if self.syntax == "att":
            return self.plain_att(text)
        number = self.number(text)
        if number is not None:
            return number
        if text.endswith("]"):
            return self.memory(text)
        if re.fullmatch(r"[A-Za-z_.$][\w.$]*", text):
            return self.label(text)
        raise self.fail("an operand that can't be read", text, "a register, a number, [memory] or a label")

    def memory(self, text: str) -> Mem:
        found = _MEMORY.fullmatch(text)
        if found is None:
            raise self.fail("memory that can't be read", text, "[base + index*scale + disp]",
                            "a size of memory stands before ptr, as in dword ptr [rax]")
        word, inner = found.groups()
        if word and word.lower() not in self.table.MEMORY_BITS:
            raise self.fail("a size of memory that is not known", word, ", ".join(self.table.MEMORY_BITS))
        return Mem(self.sum(inner), self.table.MEMORY_BITS[word.lower()] if word else 0)

    def sum(self, text: str) -> Address:
        """The address that a sum of terms is."""
        signed = text if text.strip().startswith(("+", "-")) else f"+{text}"
        terms = _TERM.findall(signed)
        if _TERM.sub("", signed).strip() or not all(term.strip() for _, term in terms):
            raise self.fail("an address that can't be read", text, "base + index*scale + disp")
        address: Address = Address()
        for sign, term in terms:
            address = address + self.term(term.strip(), sign == "-")
        words = {term.strip().lower() for _, term in terms}
        if "rip" in words and address.label is None:
            raise self.fail("an address beside the code without a constant", text, "[rip + constant]")
        if any(word.startswith(NO_INDEX) for word in words) and (address.base is None or address.index is not None):
            raise self.fail("an address that can't be read", text, f"[base + {NO_INDEX}*1 + disp]")
        return address

    def term(self, text: str, negative: bool) -> Any:
        number = self.number(text)
        if number is not None:
            return -number if negative else number
        if negative:
            raise self.fail("a subtracted term that is no number", text)
        if text.lower() == "rip":
            return 0
        first, star, scale = (part.strip() for part in text.partition("*"))
        if star and self.number(first) is not None:
            first, scale = scale, first
        factor = self.number(scale) if star else 1
        if factor is None:
            raise self.fail("a scale that is no number", scale, "1, 2, 4 or 8")
        if first == NO_INDEX:
            return 0
        register = self.register(first)
        if register is not None:
            return register * factor if star or register.kind == "vec" else register
        if text.startswith("@"):
            return self.bound(text[1:])
        if text in self.constants:
            return Address(label=self.constants[text])
        raise self.fail("a term of an address", text, "a register, a number, or a constant of this assembly")

    def plain_att(self, text: str) -> Any:
        if text.startswith("$"):
            number = self.number(text[1:])
            if number is not None:
                return number
            if text[1:].startswith("@"):
                return self.bound(text[2:])
            raise self.fail("an immediate that is no number", text)
        text = text.removeprefix("%ds:")
        register = self.register(text)
        if register is not None:
            return register
        found = re.fullmatch(r"([^()]*)\(([^()]*)\)", text)
        if found is None:
            number = self.number(text)
            if number is not None:
                return Mem(Address(disp=number))
            return self.label(text)
        parts = [part.strip() for part in found.group(2).split(",")]
        beside_code = parts[0] == "%rip"
        address = self.sum(f"{found.group(1)} + rip" if beside_code else found.group(1) or "0")
        if len(parts) > (1 if beside_code else 3) or address.base or address.index:
            raise self.fail("an address that can't be read", text, "disp(base, index, scale)")
        if parts[0] and not beside_code:
            address = Address(self.needed_register(parts[0]), None, 1, address.disp, address.label)
        if len(parts) > 1:
            scale = self.number(parts[2]) if len(parts) > 2 else 1
            if scale is None:
                raise self.fail("a scale that is no number", parts[2], "1, 2, 4 or 8")
            if parts[1] != f"%{NO_INDEX}":
                index = self.needed_register(parts[1])
                address = Address(address.base, index, scale, address.disp, address.label)
        return Mem(address)

    def needed_register(self, text: str) -> Reg:
        found = self.register(text)
        if found is None:
            raise self.fail("a register of an address", text, "a register")
        return found

    # --- Instructions -----------------------------------------------------------------------------------------------

    def emit(self, mnemonic: str, operands: Sequence[Any]) -> None:
        if not self.table.rows_of(mnemonic) and mnemonic in self.table.PREDICATES:
            mnemonic, predicate = self.table.PREDICATES[mnemonic]
            operands = [*operands, predicate]
        try:
            self.assembly.emit(mnemonic, operands, location=self.location)
        except AssemblyError as error:
            error.location = self.location
            raise

    def emit_att(self, mnemonic: str, operands: list[Any]) -> None:
        """AT&T names: as they are; else without the size suffix, which sizes memory and tells immediates' targets."""
        refusals: list[AssemblyError] = []
        for name, source_bits, target_bits in self.readings(mnemonic):
            given = list(operands)
            for position, operand in enumerate(given):
                bits = source_bits if position or len(given) == 1 or not target_bits else target_bits
                if isinstance(operand, Mem) and bits and not operand.bits and not operand.spread:
                    given[position] = Mem(operand.address, bits, operand.spread, operand.mask, operand.zeroing)
            tries = [given, [*given, 1]] if name in _SHIFTS and len(given) == 1 else [given]
            for attempt in tries:
                try:
                    self.emit(name, attempt)
                    return
                except AssemblyError as error:
                    refusals.append(error)
        telling = [error for error in refusals if error.kind != "unknown-instruction"]
        raise (telling or refusals)[0]

    def readings(self, mnemonic: str) -> list[tuple[str, int, int]]:
        """(mnemonic, bits of source memory, bits of target memory) that an AT&T name may mean, the plainest first."""
        prefix, _, word = mnemonic.rpartition(" ")
        prefix = f"{prefix} " if prefix else ""
        found = [(prefix + _ATT_NAMES.get(word, word), 0, 0)]
        if extends := _EXTENDS.match(word):
            found.append((f"mov{extends.group(1)}x", _SUFFIX_BITS[extends.group(2)], 0))
        sized = word[-1:] in "bwlqs" or word.startswith(("vcvt", "vfpclass"))
        if len(word) > 2 and word[-1] in _SUFFIX_BITS and sized and not self.table.rows_of(mnemonic):
            bits = _SUFFIX_BITS[word[-1]]
            found.append((prefix + word[:-1], bits, bits))
        return found


def _split(text: str) -> list[str]:
    """Operands between commas that stand in no brackets."""
    parts, depth, start = [], 0, 0
    for at, c in enumerate(text):
        if c in "([{":
            depth += 1
        elif c in ")]}":
            depth -= 1
        elif c == "," and depth == 0:
            parts.append(text[start:at])
            start = at + 1
    parts.append(text[start:])
    return parts if text.strip() else []


def _first(line: str) -> tuple[str, str]:
    """The first word, whose case does not matter, and the rest."""
    word, _, rest = line.strip().partition(" ")
    return word.lower(), rest
