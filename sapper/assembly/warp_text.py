"""PTX as text, into the assembly being built.

Enters: instructions as the vendor's assembler takes them (labels, guards, `.reg` declarations, braces, comments), and
operands bound by name: `@x` stands for the register, label or number given as `x`. Leaves: the same instructions that
the mnemonics would add, each at its own line of the text. Holds: a register of the text is a new virtual one; what no
row covers is refused with the nearest rows.

    fma.rn.f32 @sum, %f1, @x, @sum;       @%p1 bra AGAIN;       @@inside st.global.f32 [@y + 4], %f2;

A guard or an operand that is negated (`@!%p`, `!%p`) becomes a predicate of its own, made by `not.pred` before.
Source: PTX ISA, chapter "Syntax" and section "Predicated Execution".
"""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from ..ir.nodes import Location
from .errors import AssemblyError
from .notation import Address, LabelName, Mem, Reg
from .warp import FloatBits, WarpAssembly

_SKIPPED = (".loc", ".pragma", ".file")
_MOST_REGISTERS = 1 << 16


class WarpTextReader:
    """One text. names: what `@name` stands for. start: the place of the text's first line."""

    def __init__(self, assembly: WarpAssembly, names: Mapping[str, Any], start: Location | None) -> None:
        self.assembly, self.table, self.names, self.start = assembly, assembly.table, names, start
        self.scopes: list[dict[str, Reg]] = [{}]
        self.labels: dict[str, LabelName] = {}
        self.named_at: dict[str, int] = {}
        self.tokens: list[Any] = []
        self.position = 0

    def read(self, text: str) -> None:
        """Add what the text says. Raises AssemblyError."""
        try:
            self.tokens = self.table.tokens(text)
        except self.table.TokenError as error:
            raise self.fail(str(error), "characters that are no token", "PTX", line=error.line) from None
        while self.position < len(self.tokens):
            self.statement()
        if len(self.scopes) > 1:
            raise self.fail("a brace is not closed", "the end of the text", "}")
        for name, label in self.labels.items():
            if not label.placed:
                raise self.fail(f"label {name} is not in the text", name, f"{name}: before an instruction",
                                line=self.named_at[name])

    # --- Tokens -----------------------------------------------------------------------------------------------------

    def peek(self, ahead: int = 0) -> str:
        at = self.position + ahead
        return str(self.tokens[at].text) if at < len(self.tokens) else ""

    def next(self) -> str:
        if self.position >= len(self.tokens):
            raise self.fail("the text ends within an instruction", "the end", "a semicolon")
        self.position += 1
        return str(self.tokens[self.position - 1].text)

    def accept(self, text: str) -> bool:
        if self.peek() == text:
            self.position += 1
            return True
        return False

    def expect(self, text: str) -> None:
        if not self.accept(text):
            raise self.fail("text that is no PTX", self.peek() or "the end", text)

    def location(self, line: int = 0) -> Location | None:
        """The place of a line of the text, else of the token that is read."""
        if self.start is None:
            return None
        if not line and self.tokens:
            line = self.tokens[min(self.position, len(self.tokens) - 1)].line
        return Location(self.start.file, self.start.line + max(line, 1) - 1, 1, 1)

    def fail(self, headline: str, found: str, expected: str = "", mend: str = "", line: int = 0) -> AssemblyError:
        return AssemblyError("notation", headline, self.location(line), found, expected, mend)

    # --- Statements -------------------------------------------------------------------------------------------------

    def statement(self) -> None:
        word = self.peek()
        if word == ";":
            self.next()
        elif word == "{":
            self.next()
            self.scopes.append({})
        elif word == "}":
            if len(self.scopes) == 1:
                raise self.fail("a brace closes nothing", "}", "{ before it")
            self.next()
            self.scopes.pop()
        elif word == ".reg":
            self.declaration()
        elif word in _SKIPPED:
            line = self.tokens[self.position].line
            while self.position < len(self.tokens) and self.tokens[self.position].line == line:
                self.position += 1
        elif word.startswith("."):
            raise self.fail(f"the directive {word} has no meaning here", word, ".reg, or an instruction",
                            "bind memory by name: @x for the register with its address")
        elif self.peek(1) == ":" and self.tokens[self.position].kind == "name":
            if (label := self.label(self.peek())).placed:
                raise self.fail("a label is placed twice", self.peek(), "one place")
            self.assembly.place(label)
            self.position += 2
        else:
            self.instruction()

    def declaration(self) -> None:
        """`.reg .b32 %r<4>, %s;`"""
        self.next()
        type_ = self.next().removeprefix(".")
        bits = self.table.BITS.get(type_, 0)
        if bits not in self.table.NAME_OF_BITS:
            known = sorted(t for t, b in self.table.BITS.items() if b in self.table.NAME_OF_BITS)
            raise self.fail("registers of a type that there is not", type_, ", ".join(known))
        while True:
            name = self.next()
            names = [name]
            if self.accept("<"):
                count = self.number()
                if not isinstance(count, int) or count > _MOST_REGISTERS:
                    raise self.fail("a count of registers", str(count), f"a whole number up to {_MOST_REGISTERS}")
                names = [f"{name}{number}" for number in range(count)]
                self.expect(">")
            for each in names:
                self.scopes[-1][each] = self.assembly.new(self.table.NAME_OF_BITS[bits])
            if not self.accept(","):
                break
        self.expect(";")

    def label(self, name: str) -> LabelName:
        found = self.labels.get(name)
        if found is None:
            found = self.labels[name] = self.assembly.label(f"{name}.")
            self.named_at[name] = self.tokens[min(self.position, len(self.tokens) - 1)].line
        return found

    def instruction(self) -> None:
        where, guard = self.location(), None
        if self.accept("@"):
            negated = self.accept("!")
            guard = self.named()
            if not isinstance(guard, Reg):
                raise self.fail("a guard that is no predicate", repr(guard), "@%p or @@name")
            guard = self.negated(guard, where) if negated else guard
        words = [self.next()]
        while self.position < len(self.tokens) and self.tokens[self.position].kind == "directive":
            words.append(self.next())
        operands = []
        while not self.accept(";"):
            operands.append(self.operand())
            if self.peek() != ";" and not self.accept("|"):
                self.expect(",")
        self.assembly.emit("".join(words), operands, guard, location=where)

    def negated(self, predicate: Reg, where: Location | None) -> Reg:
        made = self.assembly.pred()
        self.assembly.emit("not.pred", (made, predicate), location=where)
        return made

    # --- Operands ---------------------------------------------------------------------------------------------------

    def operand(self) -> Any:
        token = self.tokens[self.position] if self.position < len(self.tokens) else None
        if token is None or token.text in (";", ",", ")", "]", "}"):
            raise self.fail("an operand is missing", self.peek() or "the end", "a register, a number, [memory]")
        if token.kind == "number" or token.text == "-":
            return self.number()
        if token.text == "_":
            self.next()
            return self.table.NOBODY
        if token.text == "!":
            self.next()
            found = self.named()
            if not isinstance(found, Reg) or found.kind != "pred":
                raise self.fail("a negation of what is no predicate", repr(found), "!%p")
            return self.negated(found, self.location())
        if token.text == "{":
            self.next()
            parts = []
            while not self.accept("}"):
                if self.peek() in ("{", "["):
                    raise self.fail("a part of a vector", self.peek(), "a register or a number")
                parts.append(self.operand())
                if self.peek() != "}":
                    self.expect(",")
            return tuple(parts)
        if token.text == "[":
            return self.memory()
        return self.named()

    def memory(self) -> Mem:
        self.expect("[")
        base = self.peek() if self.peek() in ("[", "{") else self.operand()
        if not isinstance(base, Reg):
            raise self.fail("an address that is no register and a number", repr(base), "[%rd1 + 16]",
                            "bind the register with the address of memory by name: [@x]")
        disp = 0
        while self.peek() in ("+", "-"):
            sign = -1 if self.next() == "-" else 1
            offset = self.number()
            if not isinstance(offset, int):
                raise self.fail("an offset that is no whole number", str(offset), "[%rd1 + 16]")
            disp += sign * offset
        self.expect("]")
        return Mem(Address(base, None, 1, disp))

    def named(self) -> Any:
        if self.accept("@"):
            name = self.next()
            if name not in self.names:
                raise self.fail(f"@{name} is not bound", f"@{name}", ", ".join(f"@{n}" for n in self.names) or
                                "no names", f"give {name}=...")
            return self.names[name]
        name = self.next()
        for scope in reversed(self.scopes):
            if name in scope:
                return scope[name]
        if name.startswith("%"):
            while self.peek() in (".x", ".y", ".z", ".w"):
                name += self.next()
            special = self.table.SPECIAL.get(name[1:].replace(".", "_"))
            if special is None:
                known = [*(r for scope in self.scopes for r in scope), *(f"%{s}" for s in self.table.SPECIAL)]
                near = ", ".join(get_close_matches(name, known, 4, 0.5))
                raise self.fail("a register that is not declared", name, f".reg .b32 {name};" +
                                (f" near: {near}" if near else ""))
            return special
        return self.label(name)

    def number(self) -> int | float | FloatBits:
        negative = self.accept("-")
        text = self.next()
        if self.tokens[self.position - 1].kind != "number":
            raise self.fail("text that is no number", text, "12, 0x1F, 1.5, 0f3F800000")
        bits, value = self.table.number(text)
        width = {"f": 32, "d": 64}.get(text[1:2].lower(), 0) if text[:1] == "0" and len(text) in (10, 18) else 0
        if value is not None and width:
            return FloatBits(bits ^ (1 << width - 1) if negative else bits, width)
        if value is not None:
            return -float(value) if negative else float(value)
        return -int(bits) if negative else int(bits)
