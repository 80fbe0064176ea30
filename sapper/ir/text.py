"""The text form of tile IR and lane IR: a function becomes text, text becomes the same function.

Enters: a Function, or its text. Leaves: the text, or a Function. Holds: print(parse(print(f))) == print(f) for every
function whose values are all defined before they are used; parsing malformed text raises TextError and nothing else.

The grammar (docs/ir.md shows it by example; `#` starts a comment that runs to the end of the line):

    function   = stage "func" "@"name "(" [value {"," value}] ")" [attributes] [location] block
    value      = "%"name ":" type
    block      = "{" {op} "}"
    op         = [value {"," value} "="] name [operand {"," operand}] [attributes] [location] {["(" values ")"] block}
    operand    = "%"name              the first one on the line of the op's name
    attributes = "{" name "=" data {"," name "=" data} "}"
    data       = string | number | "true" | "false" | ["-"] ("inf" | "nan" ["(" bits ")"]) | ":"dtype | "[" data, .. "]"
    type       = dtype ["[" axes "]"] | "tensor" "<" dtype {"," dim} ">" | "s64" | "row" "<" dtype ">" | "mask"
               | "tile" "<" dtype ">"
    dim        = name | number | "?"
    location   = "loc" "(" string ":" line ":" column ["-" end_column] ")"
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Mapping
from typing import Any, NoReturn

from .nodes import Block, Function, Location, Op, Value
from .ops import OpTable
from .types import (
    DTYPES,
    MASK,
    S64,
    SYMBOLS,
    Dim,
    DType,
    RowType,
    TensorType,
    TileRegisterType,
    TileType,
    Type,
    b32,
)

_DEPTH_LIMIT = 64
"""Blocks and lists nest no deeper in text; no kernel comes near, and Python's own stack must not decide."""

_NAN_BITS = 0x7FF8000000000000

_ALL_DTYPES: dict[str, DType] = {**DTYPES, "b32": b32}


class TextError(ValueError):
    """Text that is not a function. line and column count from 1."""

    def __init__(self, line: int, column: int, found: str, expected: str, line_text: str = "") -> None:
        self.line = line
        self.column = column
        self.found = found
        self.expected = expected
        message = f"{line}:{column}: found {found}; expected {expected}"
        if line_text:
            message += f"\n    {line_text}\n    {' ' * (column - 1)}^"
        super().__init__(message)


# Printing.

_NAME = re.compile(r"[^\W\d][\w.]*\Z")
_FUNCTION_NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*\Z")


def format_attribute(value: Any) -> str:
    """One attribute value as text. TypeError for what text cannot hold."""
    kind = type(value)
    if kind is str:
        return json.dumps(value)
    if kind is bool:
        return "true" if value else "false"
    if kind is int:
        return str(value)
    if kind is float:
        return _format_float(value)
    if kind is DType:
        return f":{value.name}"
    if kind is list or kind is tuple:
        return f"[{', '.join([format_attribute(v) for v in value])}]"
    if isinstance(value, (bool, int, float, str)):  # NumPy scalars and enumerations that are such a number or string
        for base in (bool, int, float, str):
            if isinstance(value, base):
                return format_attribute(base(value))
    raise TypeError(
        f"found an attribute value of type {kind.__name__}; expected str, int, float, bool, DType or a list of these"
    )


def _format_float(value: float) -> str:
    if math.isnan(value):
        (bits,) = struct.unpack("<Q", struct.pack("<d", value))
        sign = "-" if bits >> 63 else ""
        bits &= 0x7FFFFFFFFFFFFFFF
        return f"{sign}nan" if bits == _NAN_BITS else f"{sign}nan({bits:#x})"
    return repr(float(value))


def format_attributes(attributes: Mapping[str, Any]) -> str:
    """` {name = value, ...}`, or nothing if there are none."""
    if not attributes:
        return ""
    return " {" + ", ".join([f"{name} = {format_attribute(value)}" for name, value in attributes.items()]) + "}"


def _format_location(location: Location | None) -> str:
    if location is None:
        return ""
    end = f"-{location.end_column}" if location.end_column != 1 else ""
    return f" loc({json.dumps(location.file)}:{location.line}:{location.column}{end})"


class _Names:
    """Gives every value a name that no other value has: its hint where it has one, else a number."""

    __slots__ = ("by_value", "next_number", "suffix", "taken")

    def __init__(self) -> None:
        self.by_value: dict[Value, str] = {}
        self.taken: set[str] = set()
        self.suffix: dict[str, int] = {}
        self.next_number = 1

    def __call__(self, value: Value) -> str:
        name = self.by_value.get(value)
        if name is not None:
            return name
        hint = value.name
        if not hint or not _NAME.match(hint):
            name = str(self.next_number)
            self.next_number += 1
        elif hint in self.taken:
            count = self.suffix.get(hint, 0) + 1
            while f"{hint}_{count}" in self.taken:
                count += 1
            self.suffix[hint] = count
            name = f"{hint}_{count}"
        else:
            name = hint
        self.taken.add(name)
        self.by_value[value] = name
        return name


class _Printer:
    __slots__ = ("lines", "locations", "names")

    def __init__(self, locations: bool) -> None:
        self.names = _Names()
        self.lines: list[str] = []
        self.locations = locations

    def values(self, values: list[Value]) -> str:
        return ", ".join([f"%{self.names(v)}: {v.type}" for v in values])

    def header(self, op: Op) -> str:
        """The op up to its blocks."""
        text = f"{self.values(op.results)} = {op.name}" if op.results else op.name
        if op.operands:
            text += " " + ", ".join([f"%{self.names(v)}" for v in op.operands])
        if op.attributes:
            text += format_attributes(op.attributes)
        if self.locations:
            text += _format_location(op.location)
        return text

    def op(self, op: Op, indent: str) -> None:
        line = indent + self.header(op)
        for block in op.blocks:
            line += f" ({self.values(block.arguments)}) {{" if block.arguments else " {"
            self.lines.append(line)
            self.block(block, indent + "  ")
            line = indent + "}"
        self.lines.append(line)

    def block(self, block: Block, indent: str) -> None:
        for op in block.ops:
            self.op(op, indent)


def print_function(function: Function, locations: bool = False) -> str:
    """The text of a function, ending in a newline. locations: print `loc(...)` where an op has one."""
    printer = _Printer(locations)
    name = function.name if _FUNCTION_NAME.match(function.name) else json.dumps(function.name)
    printer.lines.append(
        f"{function.stage} func @{name}({printer.values(function.arguments)})"
        f"{format_attributes(function.attributes)}{_format_location(function.location) if locations else ''} {{"
    )
    printer.block(function.body, "  ")
    printer.lines.append("}\n")
    return "\n".join(printer.lines)


def print_op(op: Op) -> str:
    """One op without its blocks, for messages. Names are hints, made unique within the op."""
    return _Printer(False).header(op)


# Parsing.

_TOKEN = re.compile(
    r"""(?P<space>(?:\s|\#[^\n]*)+)
    |(?P<value>%[\w.]+)
    |(?P<name>[^\W\d]\w*)
    |(?P<number>[0-9][\w.]*(?:(?<=[eE])[+-][0-9]+)?)
    |(?P<string>"(?:[^"\\\n]|\\.)*")
    |(?P<sign>//|[-{}()\[\]<>,:=@.?+*%])""",
    re.VERBOSE,
)
_INTEGER = re.compile(r"[0-9]+\Z")
_HEX = re.compile(r"0x[0-9a-f]{1,16}\Z")
_FLOAT = re.compile(r"[0-9]+(\.[0-9]*)?([eE][+-]?[0-9]+)?\Z")

_Token = tuple[str, str, int]


class _Parser:
    """Recursive descent over a token list."""

    __slots__ = ("at", "depth", "tables", "text", "tokens", "values")

    def __init__(self, text: str, tables: Mapping[str, OpTable]) -> None:
        self.text = text
        self.tables = tables
        self.tokens: list[_Token] = []
        self.at = 0
        self.depth = 0
        self.values: dict[str, Value] = {}
        position, size = 0, len(text)
        match, append = _TOKEN.match, self.tokens.append
        while position < size:
            found = match(text, position)
            if found is None:
                self.fail_at(position, f"character {text[position]!r}", "a token of the IR text")
            kind = found.lastgroup or ""
            if kind != "space":
                append((kind, found.group(), position))
            position = found.end()
        self.tokens.append(("end", "", size))

    # Errors.

    def fail_at(self, position: int, found: str, expected: str) -> NoReturn:
        start = self.text.rfind("\n", 0, position) + 1
        stop = self.text.find("\n", position)
        line_text = self.text[start : stop if stop >= 0 else len(self.text)]
        raise TextError(self.text.count("\n", 0, position) + 1, position - start + 1, found, expected, line_text)

    def fail(self, expected: str, token: _Token | None = None) -> NoReturn:
        kind, text, position = token or self.tokens[self.at]
        self.fail_at(position, "the end of the text" if kind == "end" else f"`{text[:60]}`", expected)

    # Tokens.

    def next(self) -> _Token:
        token = self.tokens[self.at]
        if token[0] != "end":
            self.at += 1
        return token

    def sees(self, sign: str) -> bool:
        kind, text, _ = self.tokens[self.at]
        return text == sign and (kind == "sign" or kind == "name")

    def take(self, sign: str) -> bool:
        if self.sees(sign):
            self.at += 1
            return True
        return False

    def expect(self, sign: str) -> None:
        if not self.take(sign):
            self.fail(f"`{sign}`")

    def kind(self, kind: str, expected: str) -> str:
        token = self.tokens[self.at]
        if token[0] != kind:
            self.fail(expected)
        self.at += 1
        return token[1]

    def string(self) -> str:
        token = self.tokens[self.at]
        text = self.kind("string", "a string")
        try:
            return str(json.loads(text))
        except ValueError:
            self.fail("a string with JSON's escapes", token)

    def integer(self, expected: str = "an integer") -> int:
        token = self.tokens[self.at]
        text = self.kind("number", expected)
        if not _INTEGER.match(text) or len(text) > 1000:
            self.fail(expected, token)
        return int(text)

    def enter(self) -> None:
        self.depth += 1
        if self.depth > _DEPTH_LIMIT:
            self.fail(f"nesting of at most {_DEPTH_LIMIT} levels")

    # Types and attributes.

    def dtype(self) -> DType:
        token = self.tokens[self.at]
        found = _ALL_DTYPES.get(self.kind("name", "a dtype"))
        if found is None:
            self.fail(f"a dtype ({', '.join(_ALL_DTYPES)})", token)
        return found

    def extent(self) -> Dim:
        """A side, or two with a symbol between them."""
        token = self.tokens[self.at]
        left = self.side()
        op = next((op for op, symbol in SYMBOLS.items() if self.take(symbol)), None)
        if op is None and isinstance(left, int) and left < 0:
            self.fail("a dimension's name or size", token)
        return left if op is None else (op, left, self.side())

    def side(self) -> Dim:
        """A name, a number, `-side` or `(extent)`."""
        self.enter()
        found = self.bare_side()
        self.depth -= 1
        return found

    def bare_side(self) -> Dim:
        if self.take("-"):
            of = self.side()
            return -of if isinstance(of, int) else ("sub", 0, of)
        if self.take("("):
            found = self.extent()
            self.expect(")")
            return found
        if self.tokens[self.at][0] == "name":
            return self.next()[1]
        return self.integer("a dimension's name or size")

    def type(self) -> Type:
        if self.take("s64"):
            return S64
        if self.take("mask"):
            return MASK
        if self.take("row"):
            self.expect("<")
            dtype = self.dtype()
            self.expect(">")
            return RowType(dtype)
        if self.take("tile"):
            self.expect("<")
            dtype = self.dtype()
            self.expect(">")
            return TileRegisterType(dtype)
        if self.take("tensor"):
            self.expect("<")
            dtype = self.dtype()
            dims: list[Dim] = []
            while self.take(","):
                dims.append("?" if self.take("?") else self.extent())
            self.expect(">")
            return TensorType(dtype, tuple(dims))
        token = self.tokens[self.at]
        if token[0] != "name" or token[1] not in _ALL_DTYPES:
            self.fail("a type (a dtype with axes, tensor<...>, s64, row<...>, tile<...> or mask)")
        self.at += 1
        axes: list[str] = []
        if self.take("["):
            axes.append(self.kind("name", "an axis name"))
            while self.take(","):
                axes.append(self.kind("name", "an axis name"))
            self.expect("]")
        return TileType(_ALL_DTYPES[token[1]], tuple(axes))

    def data(self) -> Any:
        token = self.next()
        kind, text, _ = token
        if kind == "number":
            if _INTEGER.match(text):
                if len(text) > 1000:
                    self.fail("an integer of at most 1000 digits", token)
                return int(text)
            if _FLOAT.match(text):
                return float(text)
            self.fail("a number", token)
        if kind == "string":
            self.at -= 1
            return self.string()
        if kind == "name":
            if text == "true":
                return True
            if text == "false":
                return False
            if text == "inf":
                return math.inf
            if text == "nan":
                return self.nan(0)
        if text == "-" and kind == "sign":
            after = self.next()
            if after[0] == "name" and after[1] == "inf":
                return -math.inf
            if after[0] == "name" and after[1] == "nan":
                return self.nan(1 << 63)
            if after[0] == "number":
                self.at -= 1
                return -self.data()
            self.fail("a number", after)
        if text == ":" and kind == "sign":
            return self.dtype()
        if text == "[" and kind == "sign":
            self.enter()
            values: list[Any] = []
            if not self.take("]"):
                values.append(self.data())
                while self.take(","):
                    values.append(self.data())
                self.expect("]")
            self.depth -= 1
            return values
        self.fail("an attribute value (string, number, true, false, :dtype or a list)", token)

    def nan(self, sign_bit: int) -> float:
        bits = _NAN_BITS
        if self.take("("):
            token = self.tokens[self.at]
            text = self.kind("number", "the bits of a NaN")
            bits = int(text, 16) if _HEX.match(text) else 0
            if not 0x7FF0000000000000 < bits <= 0x7FFFFFFFFFFFFFFF:
                self.fail("the bits of a NaN, as 0x7ff0000000000001 to 0x7fffffffffffffff", token)
            self.expect(")")
        return float(struct.unpack("<d", struct.pack("<Q", bits | sign_bit))[0])

    def attributes(self) -> dict[str, Any]:
        """`{name = value, ...}` if that comes next; a block in braces never starts with `name =`."""
        found: dict[str, Any] = {}
        tokens, at = self.tokens, self.at
        if not self.sees("{") or tokens[at + 1][0] != "name" or tokens[at + 2][1] != "=":
            return found
        self.at += 1
        while True:
            token = self.tokens[self.at]
            name = self.kind("name", "an attribute's name")
            if name in found:
                self.fail("each attribute once", token)
            self.expect("=")
            found[name] = self.data()
            if not self.take(","):
                break
        self.expect("}")
        return found

    def location(self) -> Location | None:
        if not (self.sees("loc") and self.tokens[self.at + 1][1] == "("):
            return None
        self.at += 2
        file = self.string()
        self.expect(":")
        line = self.integer("a line")
        self.expect(":")
        column = self.integer("a column")
        end_column = self.integer("the end column") if self.take("-") else 1
        self.expect(")")
        return Location(file, line, column, end_column)

    # Values, ops, blocks.

    def define(self, value: Value, token: _Token) -> None:
        name = token[1][1:]
        if name in self.values:
            self.fail("a name that is not taken yet", token)
        if not name.isdigit():
            if not _NAME.match(name):
                self.fail("a value's name or number", token)
            value.name = name
        self.values[name] = value

    def definitions(self) -> list[tuple[_Token, Type]]:
        found: list[tuple[_Token, Type]] = []
        while True:
            token = self.tokens[self.at]
            self.kind("value", "a value (%name)")
            self.expect(":")
            found.append((token, self.type()))
            if not self.take(","):
                return found

    def arguments(self, block: Block) -> None:
        """`(%name: type, ...)`, the opening parenthesis already taken."""
        if self.take(")"):
            return
        for token, type in self.definitions():
            value = Value(type, block)
            self.define(value, token)
            block.arguments.append(value)
        self.expect(")")

    def operands(self, name_token: _Token) -> list[Value]:
        found: list[Value] = []
        tokens = self.tokens
        token = tokens[self.at]
        if token[0] != "value" or "\n" in self.text[name_token[2] : token[2]]:
            return found
        while True:
            token = tokens[self.at]
            if token[0] != "value":
                self.fail("an operand (%name)")
            value = self.values.get(token[1][1:])
            if value is None:
                self.fail("a value that is defined above", token)
            self.at += 1
            found.append(value)
            if tokens[self.at][1] != ",":
                return found
            self.at += 1

    def op(self, table: OpTable) -> Op:
        results: list[tuple[_Token, Type]] = []
        if self.tokens[self.at][0] == "value":
            results = self.definitions()
            self.expect("=")
        token = self.tokens[self.at]
        name = self.kind("name", "an op")
        if name not in table.rows:
            self.fail(f"an op of the {table.stage} IR", token)
        operands = self.operands(token)
        attributes = self.attributes()
        op = Op(name, operands, [type for _, type in results], attributes, None, self.location())
        for (result_token, _), value in zip(results, op.results, strict=True):
            self.define(value, result_token)
        while self.sees("{") or self.sees("("):
            block = Block()
            if self.take("("):
                self.arguments(block)
            self.block(block, table)
            op.blocks = [*op.blocks, block]
        return op

    def block(self, block: Block, table: OpTable) -> None:
        self.enter()
        self.expect("{")
        while not self.take("}"):
            block.ops.append(self.op(table))
        self.depth -= 1

    def function(self) -> Function:
        token = self.tokens[self.at]
        stage = self.kind("name", "a stage (tile or lane)")
        table = self.tables.get(stage)
        if table is None:
            self.fail(f"a stage ({' or '.join(self.tables)})", token)
        self.expect("func")
        self.expect("@")
        if self.tokens[self.at][0] == "string":
            name = self.string()
        else:
            name = self.kind("name", "a function's name")
            while self.take("."):
                name += "." + self.kind("name", "the rest of a function's name")
        function = Function(name, stage)
        self.expect("(")
        self.arguments(function.body)
        function.attributes = self.attributes()
        if "in_place" in function.attributes:
            function.unite()
        function.location = self.location()
        self.block(function.body, table)
        if self.tokens[self.at][0] != "end":
            self.fail("the end of the text after the function")
        return function


def parse_function(text: str, tables: Mapping[str, OpTable]) -> Function:
    """The function that a text says.

    tables: the op table of each stage, {"tile": TILE_OPS, "lane": LANE_OPS}. Types and rules are the verifier's
    business; the parser knows op names, and that a value is defined once and before its use.
    Raises TextError.
    """
    return _Parser(text, tables).function()
