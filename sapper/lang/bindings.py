"""What a name in a kernel may be bound to, while the kernel is read.

An IR Value (a tile or scalar, or a tensor argument), an Axis, a Span, a LoopRange, or a plain Python object (numbers,
dtypes, tuples, functions, Dims, ...), which exists at compile time only. And where names stand: the loops (LoopScope)
and functions (Frame) around them. Holds: data only; who reads a kernel makes and changes it.
"""

from __future__ import annotations

import ast
import difflib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from ..ir.nodes import Block, Location, Op, Value
from ..ir.types import Dim, DType, TensorType, TileType
from .affine import Affine
from .source import ParsedFunction


class Axis:
    """An axis in scope: name, unique in the function, and what it walks.

    start, stop: the range as affine forms. loop: the LoopScope that brings it, None for `whole`.
    level: how many loops enclose it, its own included. block and anchor: where its `index` op goes.
    """

    __slots__ = ("anchor", "block", "coordinate", "in_scope", "level", "location", "loop", "name", "start", "stop")

    def __init__(self, name: str, start: Affine, stop: Affine, loop: LoopScope | None, level: int, block: Block,
                 anchor: Op | None, location: Location) -> None:
        self.name = name
        self.start = start
        self.stop = stop
        self.loop = loop
        self.level = level
        self.block = block
        self.anchor = anchor
        self.location = location
        self.coordinate: Value | None = None
        self.in_scope = True

    def __repr__(self) -> str:
        return f"axis {self.name}"


class LoopScope:
    """A loop while its body is read.

    kind: "tiles", "each" or "range". variables: Axes, or index Values. guards: open branches and ragged loops.
    disjoint: see LoopRange. ends: of a range that may be empty as the kernel runs; empty: it surely is.
    """

    __slots__ = ("carries", "disjoint", "empty", "ends", "guards", "kind", "level", "names", "node", "variables")

    def __init__(self, kind: str, level: int, guards: int, node: ast.For, names: list[str], carries: bool) -> None:
        self.kind = kind
        self.level = level
        self.guards = guards
        self.node = node
        self.names = names
        self.carries = carries
        self.disjoint = False
        self.empty = False
        self.ends: list[Value] = []
        self.variables: list[Any] = []


class Span:
    """`span(start, stop)`: two ints, Dims or integer scalars."""

    __slots__ = ("start", "stop")

    def __init__(self, start: Any, stop: Any) -> None:
        self.start = start
        self.stop = stop


class Descent(NamedTuple):
    """A range that runs downwards: its first number, and how far down each next one is."""

    start: Any
    step: int


class LoopRange:
    """What a for loop walks. kind: "tiles", "each" or "range"; spans: one for each loop variable; step of a range.
    disjoint: the author asserts that no iteration touches what another writes. down: of a range that runs downwards;
    the span counts its numbers then."""

    __slots__ = ("disjoint", "down", "kind", "spans", "step")

    def __init__(self, kind: str, spans: list[Span], step: int = 1, disjoint: bool = False,
                 down: Descent | None = None) -> None:
        self.disjoint = disjoint
        self.down = down
        self.kind = kind
        self.spans = spans
        self.step = step


class Frame:
    """One function being read: its source, names, and the call that led to it.

    env: the local names. function_globals, closure: where other names are. outer: the frame of the function in which
    a nested one was defined. nesting: how many run-time loops and branches of this frame are open.
    """

    __slots__ = ("assigned_at", "call_node", "caller", "closure", "env", "function_globals", "key", "live",
                 "local_names",
                 "name", "nesting", "outer", "parsed")

    def __init__(self, name: str, key: Any, parsed: ParsedFunction, function_globals: Mapping[str, Any],
                 closure: Mapping[str, Any], local_names: frozenset[str], live: Mapping[ast.AST, tuple[str, ...]],
                 caller: Frame | None, call_node: ast.AST | None, outer: Frame | None = None) -> None:
        self.name = name
        self.key = key
        self.parsed = parsed
        self.function_globals = function_globals
        self.closure = closure
        self.local_names = local_names
        self.live = live
        self.caller = caller
        self.call_node = call_node
        self.outer = outer
        self.env: dict[str, Any] = {}
        self.assigned_at: dict[str, ast.AST] = {}
        self.nesting = 0


Walked = tuple[Value, Value, int]
"""Start, stop and step of what a loop or an axis walks."""


class Carried:
    """A scalar that a loop over numbers carries: before the loop, and what is added to it in each step. counter: the
    index of the loop."""

    __slots__ = ("counter", "initial", "step")

    def __init__(self, initial: Value, step: Affine, counter: Value) -> None:
        self.initial, self.step, self.counter = initial, step, counter


def is_tile(value: Any) -> bool:
    return isinstance(value, Value) and isinstance(value.type, TileType)


def is_tensor(value: Any) -> bool:
    return isinstance(value, Value) and isinstance(value.type, TensorType)


def dtype_of(value: Value) -> DType:
    """The element type of a tile, scalar or tensor."""
    return value.type.dtype  # type: ignore[union-attr]


def axes_of(value: Value) -> tuple[str, ...]:
    """The axes of a tile or scalar."""
    return value.type.axes  # type: ignore[union-attr]


def dims_of(value: Value) -> tuple[Dim, ...]:
    """The extents of a tensor."""
    return value.type.dims  # type: ignore[union-attr]


def near(name: str, known: Iterable[str], otherwise: str) -> str:
    """`did you mean ...?`, or what else to do where no name is near."""
    close = difflib.get_close_matches(name, list(known), 1, 0.65)
    return f"did you mean {close[0]}?" if close else otherwise
