"""PTX text to a module of functions, variables and instructions.

Enters: PTX text, from any compiler. Leaves: `Module`. Holds: every instruction has the form of the row table, and its
operands are parsed; names of registers are resolved by scope (braces in a body open one), labels to positions.
Debug sections, .loc and .file are skipped. Source: PTX ISA, chapters "Syntax" and "State Spaces, Types, and Variables".
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass, field
from functools import cache
from typing import Union

from ..targets.ptx.instructions import form as form_of
from ..targets.ptx.rows import BITS, Form
from ..targets.ptx.tokens import Token, TokenError, number, tokens
from .errors import ParseError


@dataclass(frozen=True, slots=True)
class Register:
    """A register of a function. slot: its number there; negated: `!%p`."""

    name: str
    slot: int
    type: str
    negated: bool = False


@dataclass(frozen=True, slots=True)
class Special:
    """A special register, such as %tid.x."""

    name: str


@dataclass(frozen=True, slots=True)
class Immediate:
    """bits: of an integer, or of a float written 0f or 0d (`is_float` tells). value: the float of a decimal."""

    bits: int
    float_bits: int = 0
    value: float | None = None


@dataclass(frozen=True, slots=True)
class Symbol:
    """The address of a variable, plus an offset."""

    name: str
    offset: int = 0


@dataclass(frozen=True, slots=True)
class Address:
    """[base + offset], with the tensor coordinates after a comma if there are any."""

    base: Union[Register, Symbol, Immediate]
    offset: int = 0
    coordinates: tuple[Operand, ...] = ()


@dataclass(frozen=True, slots=True)
class Vector:
    """{a, b, ...}; None is `_`."""

    items: tuple[Operand | None, ...]


@dataclass(frozen=True, slots=True)
class Label:
    """A place to branch to. scopes: numbers of the braces around, outermost first; labels are local to theirs."""

    name: str
    scopes: tuple[int, ...] = ()


Operand = Union[Register, Special, Immediate, Symbol, Address, Vector, Label]


@dataclass(slots=True)
class Instruction:
    """One instruction. guard: the predicate it runs under. operands: in the form's order, None for `_` and for what was
    left out."""

    line: int
    text: str
    form: Form
    operands: list[Operand | None]
    guard: Register | None = None


@dataclass(slots=True)
class Variable:
    """A variable or parameter. space: global, const, shared, local, param. size_bytes: 0 for `.extern ... name[]`."""

    name: str
    space: str
    size_bytes: int
    alignment: int
    initial: bytes | None = None


@dataclass(slots=True)
class Function:
    """An entry or a function. registers: (name, type) of each slot. labels: (scope, name) -> position in
    `body`."""

    name: str
    entry: bool
    parameters: list[Variable]
    body: list[Instruction] = field(default_factory=list)
    labels: dict[tuple[int, str], int] = field(default_factory=dict)
    registers: list[tuple[str, str]] = field(default_factory=list)
    variables: list[Variable] = field(default_factory=list)
    required_threads: tuple[int, ...] = ()
    most_registers: int = 0
    required_cluster: tuple[int, ...] = ()

    def place_of(self, label: Label) -> int | None:
        """The position of a label, or None where no scope around has it."""
        for scope in reversed(label.scopes):
            if (scope, label.name) in self.labels:
                return self.labels[scope, label.name]
        return None


@dataclass(slots=True)
class Module:
    version: tuple[int, int]
    target: str
    functions: dict[str, Function]
    variables: dict[str, Variable]


_SKIPPED = {".loc", ".file", ".pragma", ".address_size", ".calltargets", ".alias"}
_LINKAGE = {".visible", ".extern", ".weak", ".common"}
_MOST_REGISTERS = 1 << 20
_MOST_BYTES = 1 << 32
_MOST_ALIGNMENT = 1 << 16
"""Of a function and of a variable: far above what any device has, and no reason to run out of memory."""
_SPACES = {".global", ".const", ".shared", ".local", ".param"}


class _Parser:
    def __init__(self, text: str) -> None:
        self.text = text
        try:
            self.tokens = tokens(text)
        except TokenError as error:
            raise ParseError(str(error), error.line) from None
        self.texts = [token.text for token in self.tokens] + [""] * 3
        """Of the tokens, and of those that are asked for behind the last."""
        self.position = 0
        self.module = Module((0, 0), "", {}, {})
        self.function: Function | None = None
        self.scopes: list[dict[str, int]] = []
        self.registers: dict[int, Register] = {}
        """Of the function, by slot: those that were named so far."""
        self.known: dict[str, Register] = {}
        """By name: operands that were looked up since registers or variables were declared last."""
        self.names: list[dict[str, str]] = []
        """Variables of a function by scope: source name -> name in the function."""
        self.scope_numbers: list[int] = []
        self.scope_count = 0
        self.tables: dict[str, list[Label]] = {}
        """Lists of labels of a function, for brx.idx."""

    # Tokens

    def peek(self, ahead: int = 0) -> str:
        return self.texts[self.position + ahead]

    def here(self) -> Token:
        if self.position >= len(self.tokens):
            raise ParseError("the text ends too early", self.tokens[-1].line if self.tokens else 0)
        return self.tokens[self.position]

    def next(self) -> Token:
        token = self.here()
        self.position += 1
        return token

    def name(self) -> str:
        token = self.next()
        if token.kind != "name":
            raise ParseError(f"found {token.text!r}, expected a name", token.line)
        return token.text

    def expect(self, text: str) -> Token:
        token = self.next()
        if token.text != text:
            raise ParseError(f"found {token.text!r}, expected {text!r}", token.line)
        return token

    def accept(self, text: str) -> bool:
        if self.texts[self.position] == text:
            self.position += 1
            return True
        return False

    def skip_line(self) -> None:
        line = self.tokens[self.position].line
        while self.position < len(self.tokens) and self.tokens[self.position].line == line:
            self.position += 1

    # Module

    def parse(self) -> Module:
        while self.position < len(self.tokens):
            token = self.tokens[self.position]
            if token.text == ".version":
                self.next()
                version = self.next()
                if not re.fullmatch(r"[0-9]{1,4}\.[0-9]{1,4}", version.text):
                    raise ParseError(f"found {version.text!r}, expected a version such as 8.0", version.line)
                major, _, minor = version.text.partition(".")
                self.module.version = (int(major), int(minor))
            elif token.text == ".target":
                self.next()
                self.module.target = self.next().text
                while self.accept(","):
                    self.next()
            elif token.text == ".section":
                while not self.accept("{"):
                    self.next()
                while not self.accept("}"):
                    self.next()
            elif token.text in _SKIPPED:
                self.skip_line()
            elif token.text in _LINKAGE:
                self.next()
            elif token.text in (".entry", ".func"):
                self.parse_function()
            elif token.text in _SPACES:
                for variable in self.parse_variables():
                    self.module.variables[variable.name] = variable
            elif token.text == ";":
                self.next()
            else:
                raise ParseError(f"found {token.text!r}, expected a directive", token.line)
        return self.module

    def parse_variables(self, many: bool = True) -> list[Variable]:
        """`.space .align n .type name[n] = {...}, ...;`"""
        space = self.next().text[1:]
        alignment, type, vector = 0, "", 1
        while self.peek().startswith("."):
            word = self.next().text
            if word == ".align":
                alignment = self.integer()
            elif word in (".v2", ".v4", ".v8"):
                vector = int(word[2:])
            elif word == ".ptr":
                while self.peek() in (".global", ".shared", ".const", ".local", ".generic", ".align"):
                    if self.next().text == ".align":
                        self.integer()
            elif word not in (".attribute",):
                type = word[1:]
        found = []
        while True:
            name = self.name()
            size, count = BITS.get(type, 64) // 8 * vector, 1
            if not size or alignment & (alignment - 1) or not 0 <= alignment <= _MOST_ALIGNMENT:
                raise ParseError(f"found {name} of type .{type} aligned to {alignment}, expected bytes, and a power of "
                                 f"two up to {_MOST_ALIGNMENT}", self.tokens[self.position - 1].line)
            if self.accept("<"):
                raise ParseError("found a range of variables", self.here().line)
            dimensions = []
            while self.accept("["):
                dimensions.append(0 if self.peek() == "]" else self.integer())
                self.expect("]")
            for dimension in dimensions:
                count *= dimension
            if not 0 <= size * count <= _MOST_BYTES:
                raise ParseError(f"found {name} of {size * count} bytes, expected at most {_MOST_BYTES}",
                                 self.tokens[self.position - 1].line)
            initial = self.parse_initial(type, size * count) if self.accept("=") else None
            found.append(Variable(name, space, size * count, alignment or size, initial))
            if not many or not self.accept(","):
                break
        if self.peek() == ";":
            self.next()
        return found

    def parse_initial(self, type: str, size_bytes: int) -> bytes:
        numbers: list[int] = []
        if type not in BITS:
            raise ParseError(f"found the type {type!r} of a variable, expected one with a size", self.here().line)
        element = BITS[type] // 8
        depth = 0
        while True:
            if self.accept("{"):
                depth += 1
            elif self.accept("}"):
                depth -= 1
            elif not (depth and self.accept(",")):
                value = self.number()
                numbers.append(value.bits if value.value is None else _float_bits(value, element == 8))
            if depth <= 0:
                break
        data = b"".join((number & ((1 << 8 * element) - 1)).to_bytes(element, "little") for number in numbers)
        return data.ljust(size_bytes, b"\0")

    def parse_function(self) -> None:
        entry = self.next().text == ".entry"
        returned: list[Variable] = []
        if self.peek() == "(":
            returned = self.parse_parameters()
        name = self.name()
        function = Function(name, entry, returned + (self.parse_parameters() if self.peek() == "(" else []))
        while self.peek() not in ("{", ";"):
            word = self.next()
            if word.text in (".reqntid", ".maxntid", ".reqnctapercluster", ".maxclusterrank", ".minnctapersm",
                             ".maxnreg"):
                numbers = [self.integer()]
                while self.accept(","):
                    numbers.append(self.integer())
                if word.text == ".reqntid":
                    function.required_threads = tuple(numbers)
                elif word.text == ".reqnctapercluster":
                    function.required_cluster = tuple(numbers)
                elif word.text == ".maxnreg":
                    function.most_registers = numbers[0]
            elif word.text not in (".explicitcluster", ".noreturn", ".blocksareclusters",
                                   ".pragma") and word.kind != "string":
                raise ParseError(f"found {word.text!r}, expected a directive of {name} or its body", word.line)
        if self.accept(";"):
            return
        self.function, self.tables, self.registers = function, {}, {}
        self.module.functions[name] = function
        self.parse_body()
        self.function = None

    def parse_parameters(self) -> list[Variable]:
        self.expect("(")
        found: list[Variable] = []
        while not self.accept(")"):
            if self.peek() == ".reg":
                raise ParseError("found a register as a parameter", self.here().line)
            found += self.parse_variables(many=False)
            self.accept(",")
        return found

    # Bodies

    def parse_body(self) -> None:
        self.expect("{")
        self.scopes, self.names, self.scope_numbers, self.known = [{}], [{}], [0], {}
        while self.scopes:
            token = self.here()
            if token.text == "}":
                self.next()
                self.known = {}
                self.scopes.pop()
                self.names.pop()
                self.scope_numbers.pop()
            elif token.text == "{":
                self.next()
                self.known = {}
                self.scopes.append({})
                self.names.append({})
                self.scope_count += 1
                self.scope_numbers.append(self.scope_count)
            elif token.text == ".reg":
                self.parse_registers()
            elif token.text in _SPACES:
                self.parse_local_variables()
            elif token.text in _SKIPPED:
                self.skip_line()
            elif token.text == ";":
                self.next()
            elif self.peek(1) == ":" and self.peek(2) == ".branchtargets":
                self.parse_table()
            elif self.peek(1) == ":" and token.kind == "name":
                assert self.function is not None
                self.function.labels[self.scope_numbers[-1], token.text] = len(self.function.body)
                self.position += 2
            else:
                self.parse_instruction()

    def parse_table(self) -> None:
        """name: .branchtargets label, ...;"""
        labels = self.tables[self.name()] = []
        self.position += 2
        while not self.accept(";"):
            labels.append(Label(self.name(), tuple(self.scope_numbers)))
            self.accept(",")

    def parse_registers(self) -> None:
        assert self.function is not None
        self.known = {}
        self.next()
        word = self.next()
        type = word.text[1:]
        if not word.text.startswith(".") or type not in BITS:
            raise ParseError(f"found {word.text!r}, expected the type of registers", word.line)
        while True:
            name = self.name()
            names = [name]
            if self.accept("<"):
                count = self.integer()
                if len(self.function.registers) + count > _MOST_REGISTERS:
                    raise ParseError(f"found {count} registers {name}, expected at most {_MOST_REGISTERS} in all",
                                     self.here().line)
                names = [f"{name}{number}" for number in range(count)]
                self.expect(">")
            for one in names:
                self.scopes[-1][one] = len(self.function.registers)
                self.function.registers.append((one, type))
            if not self.accept(","):
                break
        self.expect(";")

    def parse_local_variables(self) -> None:
        assert self.function is not None
        for variable in self.parse_variables():
            plain = variable.name
            if any(other.name == plain for other in self.function.variables):
                self.scope_count += 1
                variable.name = f"{plain}${self.scope_count}"
            self.names[-1][plain] = variable.name
            self.function.variables.append(variable)

    def parse_instruction(self) -> None:
        assert self.function is not None
        first, guard = self.here(), None
        if self.accept("@"):
            negated = self.accept("!")
            register = self.named()
            if not isinstance(register, Register):
                raise ParseError("expected a predicate after @", first.line)
            guard = Register(register.name, register.slot, register.type, negated)
        start = self.position
        self.next()
        tokens, texts, known, place = self.tokens, self.texts, self.known, self.position
        while place < len(tokens) and tokens[place].kind == "directive":
            place += 1
        self.position = place
        self.here()
        mnemonic = "".join(texts[start:place])
        try:
            form = form_of(mnemonic)
        except KeyError as error:
            raise ParseError(str(error.args[0]), first.line) from None
        operands: list[tuple[Operand | None, bool]] = []
        while (text := texts[self.position]) != ";":
            found = known.get(text)
            if found is not None:
                self.position += 1
                operands.append((found, False))
            else:
                joined = self.accept("|")
                operands.append((self.operand(), joined))
            text = texts[self.position]
            if text == ",":
                self.position += 1
            elif text not in (";", "|"):
                self.expect(",")
        end = self.next()
        instruction = Instruction(first.line, " ".join(self.text[first.start:end.end].split()), form,
                                  self.arrange(form, operands, first.line), guard)
        if form.row.opcode == "brx":
            self.expand_branch(instruction)
        else:
            self.function.body.append(instruction)

    def expand_branch(self, branch: Instruction) -> None:
        """brx.idx as comparisons and branches, one for each label, and a trap for an index that has none."""
        function = self.function
        assert function is not None
        index, name = branch.operands
        labels = self.tables.get(name.name) if isinstance(name, Label) else None
        if labels is None:
            raise ParseError(f"found no .branchtargets before {branch.text}", branch.line)
        chosen = Register(f"%branch{len(function.body)}", len(function.registers), "pred")
        function.registers.append((chosen.name, chosen.type))
        pieces: list[tuple[str, list[Operand | None], Register | None]] = []
        for place, label in enumerate(labels):
            compared: list[Operand | None] = [chosen, None, index, Immediate(place)]
            if branch.guard is None:
                pieces.append(("setp.eq.u32", compared, None))
            else:
                pieces.append(("setp.eq.and.u32", [*compared, branch.guard], None))
            pieces.append(("bra", [label], chosen))
        pieces.append(("trap", [], branch.guard))
        function.body += [Instruction(branch.line, branch.text, form_of(mnemonic), operands, guard)
                          for mnemonic, operands, guard in pieces]

    def arrange(self, form: Form, found: list[tuple[Operand | None, bool]], line: int) -> list[Operand | None]:
        """The operands in the form's order, None for those left out."""
        arranged: list[Operand | None] = [given for given, _ in found]
        if len(found) == len(form.operands) and _takes_all(form):
            for given in arranged:
                if given is None:
                    break
            else:
                return arranged
        arranged = []
        rest = list(found)
        for operand in form.operands:
            if operand.joined:
                arranged.append(rest.pop(0)[0] if rest and rest[0][1] else None)
            elif operand.optional and operand.count and rest and not isinstance(rest[0][0], Vector):
                arranged.append(None)
            elif not rest:
                if not operand.optional:
                    raise ParseError(f"{form.mnemonic} has too few operands: found {len(found)}", line)
                arranged.append(None)
            else:
                given = rest.pop(0)[0]
                if given is None and operand.reads:
                    raise ParseError(f"{form.mnemonic} reads an operand; found _", line)
                arranged.append(given)
        if rest:
            raise ParseError(f"{form.mnemonic} has too many operands: found {len(found)}, expected at most "
                             f"{len(form.operands)}", line)
        return arranged

    # Operands

    def operand(self) -> Operand | None:
        known = self.known.get(self.texts[self.position])
        if known is not None:
            self.position += 1
            return known
        token = self.here()
        if token.text == "_":
            self.next()
            return None
        if token.text == "!":
            self.next()
            register = self.named()
            if not isinstance(register, Register):
                raise ParseError("expected a predicate after !", token.line)
            return Register(register.name, register.slot, register.type, not register.negated)
        if token.text in ("{", "("):
            self.next()
            close = "}" if token.text == "{" else ")"
            items = []
            while not self.accept(close):
                if self.peek() in ("{", "(", "["):
                    raise ParseError(f"found {self.peek()!r}, expected a part of a vector", token.line)
                items.append(self.operand())
                self.accept(",")
            return Vector(tuple(items))
        if token.text == "[":
            return self.address()
        if token.kind == "number" or token.text in ("-", "~", "+") or token.text == "WARP_SZ":
            return self.number()
        found = self.named()
        if isinstance(found, Register):
            self.known[token.text] = found
        return found

    def named(self) -> Operand:
        token = self.next()
        for scope in reversed(self.scopes):
            slot = scope.get(token.text)
            if slot is not None:
                found = self.registers.get(slot)
                if found is None:
                    assert self.function is not None
                    found = self.registers[slot] = Register(token.text, slot, self.function.registers[slot][1])
                return found
        if token.text.startswith("%"):
            name = token.text[1:]
            if self.peek() in (".x", ".y", ".z", ".w"):
                name += self.next().text
            return Special(name)
        symbol = self.symbol_name(token.text)
        if symbol is None:
            return Label(token.text, tuple(self.scope_numbers))
        offset = 0
        while self.peek() in ("+", "-"):
            sign = -1 if self.next().text == "-" else 1
            offset += sign * self.integer()
        return Symbol(symbol, offset)

    def symbol_name(self, name: str) -> str | None:
        for scope in reversed(self.names):
            if name in scope:
                return scope[name]
        known = self.function is not None and any(parameter.name == name for parameter in self.function.parameters)
        return name if known or name in self.module.variables else None

    def address(self) -> Address:
        opening = self.expect("[")
        if self.peek() == "[":
            raise ParseError("found an address in an address", opening.line)
        base = self.operand()
        if isinstance(base, Label):
            raise ParseError(f"found the unknown variable {base.name!r}", opening.line)
        if not isinstance(base, (Register, Symbol, Immediate)):
            raise ParseError("expected a register, a variable or a number as address", opening.line)
        offset = 0
        while self.peek() in ("+", "-"):
            sign = -1 if self.next().text == "-" else 1
            offset += sign * self.integer()
        coordinates: list[Operand] = []
        while self.accept(","):
            more = self.operand()
            if more is not None:
                coordinates.append(more)
        self.expect("]")
        return Address(base, offset, tuple(coordinates))

    def integer(self) -> int:
        return self.number().bits

    def number(self) -> Immediate:
        signs = []
        while self.peek() in ("-", "+", "~"):
            signs.append(self.next().text)
        value = self.unsigned()
        for sign in reversed(signs):
            if sign == "-":
                value = Immediate(-value.bits, value.float_bits ^ (1 << 63) if value.float_bits else 0,
                                  None if value.value is None else -value.value)
            elif sign == "~":
                value = Immediate(~value.bits)
        return value

    def unsigned(self) -> Immediate:
        token = self.next()
        text = token.text
        if text == "WARP_SZ":
            return Immediate(32)
        if token.kind != "number":
            raise ParseError(f"found {text!r}, expected a number", token.line)
        bits, decimal = number(text)
        return Immediate(bits, bits if text[:2] in ("0d", "0D") else 0, decimal)


@cache
def _takes_all(form: Form) -> bool:
    """Whether no operand of the form may be left out."""
    return not any(operand.joined or operand.optional for operand in form.operands)


def _float_bits(value: Immediate, wide: bool) -> int:
    assert value.value is not None
    data = struct.pack("<d" if wide else "<f", value.value)
    return int.from_bytes(data, "little")


def parse(text: str) -> Module:
    """The module of a PTX text. Raises ParseError with the line."""
    return _Parser(text).parse()
