"""The copy of the author's function that an eager run executes.

Enters: a Python function. Leaves: a function of the same code (eager_code.py says what is rewritten in it), in whose
globals, closure and builtins Python's own names, dimensions and the functions that it calls mean sapper's. Holds: the
author's module is not touched; what sapper and the libraries that know nothing of tiles define stays as it is.
"""

from __future__ import annotations

import builtins as python
import operator
from collections.abc import Callable
from types import CellType, CodeType, FunctionType, ModuleType
from typing import Any

from ..ir.types import bool_, f32, i32
from ..lang import builtins as language
from ..lang import context
from ..lang.dims import DimExpression
from ..lang.kernel import Kernel
from .eager_code import LOCALS, METHOD, NUMBERS, UPDATE, WEAKEN, code_of
from .eager_tensor import TensorView
from .eager_values import Tile, as_bool, as_dtype, as_tile, default_dtype, literal, scalar_index


class Overlay:
    """The copies of one run: a function is copied once."""

    def __init__(self) -> None:
        self._copies: dict[FunctionType, FunctionType] = {}

    def of(self, function: FunctionType) -> FunctionType:
        """A copy of a function, of the same code, in which builtins, dimensions and called functions mean sapper's."""
        copy = self._copies.get(function)
        if copy is not None:
            return copy
        world = dict(function.__globals__)
        world["__builtins__"] = {**vars(python), **_OVERLAY}
        code = code_of(function)
        cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
        closure = tuple(CellType() for _ in code.co_freevars)
        copy = FunctionType(code, world, function.__name__, function.__defaults__, closure)
        copy.__kwdefaults__ = function.__kwdefaults__
        self._copies[function] = copy  # before what it calls, which may call it back
        for name in _global_names(code):
            if name in world:
                world[name] = self.replaced(world[name])
        for name, mine in zip(code.co_freevars, closure, strict=True):
            try:
                mine.cell_contents = self.replaced(cells[name].cell_contents)
            except ValueError:  # an empty cell stays empty
                continue
        return copy

    def replaced(self, value: Any) -> Any:
        """What stands for a global or closed-over value in the copy."""
        if isinstance(value, Kernel):
            return self.of(value.python_function)
        if isinstance(value, FunctionType):
            return value if _is_ours(value.__module__) else self.of(value)
        if isinstance(value, DimExpression):
            return scalar_index(value.__index__())
        if isinstance(value, ModuleType) and not _is_ours(value.__name__):
            return _Module(value, self)
        return value


class _Module:
    """A module whose functions are seen as their overlaid copies."""

    __slots__ = ("_module", "_overlay")

    def __init__(self, module: ModuleType, overlay: Overlay) -> None:
        self._module = module
        self._overlay = overlay

    def __getattr__(self, name: str) -> Any:
        return self._overlay.replaced(getattr(self._module, name))


# Python's own names, as a kernel means them.


def _range(*bounds: Any) -> Any:
    return context.current().range(*bounds)


def _float(value: Any = 0.0) -> Any:
    return value.to(f32) if isinstance(value, Tile) else float(value)


def _int(value: Any = 0) -> Any:
    return value.to(i32) if isinstance(value, Tile) else int(value)


def _weaken(value: Any) -> Any:
    """A Python number as a scalar without a dtype; anything else as it is."""
    if isinstance(value, bool | int | float):
        dtype = default_dtype(value)
        return Tile(literal(value, dtype).array, (), dtype, True)
    return value


def _method(value: Any, name: str, *arguments: Any) -> Any:
    """value.to(dtype) or value.bits(dtype), also of a Python number."""
    if isinstance(value, bool | int | float) and len(arguments) == 1:
        if name == "bits":
            return as_tile(value, default_dtype(value)).bits(arguments[0])
        dtype = as_dtype(arguments[0])
        return literal(bool(value) if dtype is bool_ else int(value) if dtype.is_integer else value, dtype)
    return getattr(value, name)(*arguments)


def _update(value: Any, indices: Any, by: Any, other: Any, turned: bool = False) -> None:
    """value[indices] = by(value[indices], other). by: a function, or the name of an operator in Python's ast. turned:
    the operands change places."""
    operator = OPERATORS[by] if isinstance(by, str) else by
    if isinstance(value, TensorView):
        value.update(indices, operator, other, turned)
    else:
        value[indices] = operator(other, value[indices]) if turned else operator(value[indices], other)


OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    "Add": operator.add, "Sub": operator.sub, "Mult": operator.mul, "Div": operator.truediv,
    "FloorDiv": operator.floordiv, "Mod": operator.mod, "Pow": operator.pow, "MatMult": operator.matmul,
    "LShift": operator.lshift, "RShift": operator.rshift, "BitAnd": operator.and_, "BitOr": operator.or_,
    "BitXor": operator.xor,
}

_OVERLAY: dict[str, Any] = {
    WEAKEN: _weaken, METHOD: _method, LOCALS: locals, UPDATE: _update, NUMBERS: range,
    "sum": language.sum, "max": language.max, "min": language.min, "abs": language.abs, "round": language.round,
    "range": _range, "float": _float, "int": _int, "bool": as_bool,
}


def _is_ours(module: str | None) -> bool:
    """Whether a module's functions are the language, or libraries that know nothing of tiles."""
    root = (module or "").split(".")[0]
    if root == "sapper":
        return (module or "").split(".")[1:2] != ["kernels"] and (module or "").split(".")[1:2] != ["models"]
    return root in ("numpy", "math", "ml_dtypes", "pdb", "builtins", "typing")


def _global_names(code: CodeType) -> list[str]:
    """Names that the code, or code nested in it, may look up in its globals."""
    names = list(code.co_names)
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            names += _global_names(inner)
    return names
