"""A hash of all that a kernel's meaning depends on, without reading its source.

Enters: a Kernel. Leaves: a hex digest over the code objects of its function and of the functions that it calls, over
the constants that they reach through globals, closures and attributes, and over which tensors may be one. Line numbers
and comments do not count.
A change of Python's version changes the digest, since code objects do.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping
from types import CodeType, FunctionType, ModuleType
from typing import TYPE_CHECKING, Any

from ..ir.types import DType
from .dims import DimExpression

if TYPE_CHECKING:
    from .kernel import Kernel

LIBRARY_MODULES = frozenset({"math", "numpy", "sapper"})
"""Modules whose attributes are fixed by their version."""


def digest(kernel: Kernel) -> str:
    """The digest of a kernel, 64 hex digits."""
    names: dict[str, None] = {}
    while True:
        walk = _Walk(names)
        walk.add("kernel", kernel.name, ";".join(f"{name}: {type}" for name, type in kernel.parameters))
        for pair in kernel.options.get("in_place", ()):
            walk.add("in place", *pair)
        walk.function(kernel.python_function)
        if len(walk.names) == len(names):
            return walk.hash.hexdigest()
        names = walk.names  # an attribute may be read by another function than the one that names the object


class _Walk:
    """Adds to a hash what it visits, each function once.

    attributes: the names that any of the code may read of an object; names: those that the walk met.
    """

    def __init__(self, attributes: Mapping[str, None]) -> None:
        self.hash = hashlib.sha256(sys.version.encode())
        self.seen: dict[FunctionType, int] = {}
        self.attributes = attributes
        self.names: dict[str, None] = {}

    def add(self, *words: str) -> None:
        for word in words:
            raw = word.encode()
            self.hash.update(b"%d:" % len(raw))
            self.hash.update(raw)

    def function(self, function: FunctionType) -> None:
        number = self.seen.get(function)
        if number is not None:
            self.add("again", str(number))
            return
        self.seen[function] = len(self.seen)
        names: dict[str, None] = {}
        self.code(function.__code__, names)
        self.names.update(names)
        self.value(function.__defaults__)
        self.value(tuple(sorted((function.__kwdefaults__ or {}).items())))
        for name in names:
            # pytest brings names of its own, which no source can have, into functions that assert.
            if name in function.__globals__ and name.isidentifier():
                self.add("global", name)
                self.value(function.__globals__[name])
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            self.add("closure", name)
            try:
                value = cell.cell_contents
            except ValueError:
                self.add("empty")
            else:
                self.value(value)

    def code(self, code: CodeType, names: dict[str, None]) -> None:
        self.add("code", code.co_code.hex(), *code.co_varnames, *code.co_freevars, *code.co_names)
        names.update(dict.fromkeys(code.co_names))
        for constant in code.co_consts:
            if isinstance(constant, CodeType):
                self.code(constant, names)
            elif isinstance(constant, frozenset):
                self.add("frozenset", *sorted(map(repr, constant)))
            else:
                self.add(type(constant).__name__, repr(constant))

    def value(self, value: Any, depth: int = 0) -> None:
        """A constant; of modules, classes and other objects, the attributes that the code names."""
        if isinstance(value, (bool, int, float, str, DType, DimExpression, type(None))):
            self.add(type(value).__name__, repr(value))
        elif isinstance(value, (tuple, list)):
            self.add("tuple", str(len(value)))
            for item in value:
                self.value(item, depth)
        elif isinstance(value, FunctionType):
            if value.__module__ and value.__module__.startswith("sapper.lang."):
                self.add("function", value.__module__, value.__qualname__)
            else:
                self.function(value)
        elif isinstance(getattr(value, "key", None), str) and callable(getattr(value, "digest", None)):
            self.add("piece", value.key, value.digest())  # by hand: see by_hand.RowPiece
        elif isinstance(getattr(value, "python_function", None), FunctionType):
            self.function(value.python_function)
        elif getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
            self.add("number", repr(value.item()))
        else:
            name = getattr(value, "__qualname__", None) or getattr(value, "__name__", None) or type(value).__qualname__
            self.add("object", getattr(value, "__module__", None) or "", name)
            if depth > 4 or (isinstance(value, ModuleType) and name in LIBRARY_MODULES):
                return
            for name in self.attributes:
                attribute = getattr(value, name, None)
                if attribute is not None:
                    self.add("attribute", name)
                    self.value(attribute, depth + 1)
