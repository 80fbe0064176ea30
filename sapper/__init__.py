"""sapper: AI kernels from one readable Python source to machine code.

What a user writes with is exported here, each name loaded when it is first used, so that `import sapper` costs
little. Calling a kernel goes to sapper.runtime, which is loaded by the first call.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .lang import context as _context

if TYPE_CHECKING:
    from collections.abc import Callable

    from .assembly import ptx, x86
    from .ir.types import (
        bf16,
        bool_,
        f8e4m3,
        f8e5m2,
        f16,
        f32,
        f64,
        i4,
        i8,
        i16,
        i32,
        i64,
        u8,
    )
    from .lang.builtins import (
        abs,
        argmax,
        argmin,
        asm,
        ceil,
        cos,
        cummax,
        cummin,
        cumsum,
        each,
        erf,
        exp,
        exp2,
        floor,
        full,
        log,
        log2,
        max,
        maximum,
        min,
        minimum,
        round,
        rsqrt,
        sigmoid,
        sin,
        span,
        sqrt,
        sum,
        tanh,
        tiles,
        topk,
        where,
        whole,
        zeros,
    )
    from .lang.dims import Dim, cdiv, dims
    from .lang.errors import CallError, KernelError
    from .lang.kernel import Kernel, kernel
    from .lang.tensor import Tensor
    from .runtime.buffers import empty
    from .runtime.launch import prepare
    from .runtime.packed import pack
    from .runtime.program import Program, Rows, Variable
    from .tile.schedule import Schedule, ScheduleError

__version__ = "0.1.0"

_HOMES = {
    ".assembly": "ptx x86",
    ".ir.types": "f64 f32 f16 bf16 f8e4m3 f8e5m2 i64 i32 i16 i8 i4 u8 bool_",
    ".lang.builtins": "asm tiles each whole span zeros full where maximum minimum abs exp exp2 log log2 sqrt rsqrt "
                      "tanh sigmoid erf sin cos floor ceil round sum max min argmax argmin cumsum cummax cummin topk",
    ".lang.dims": "Dim cdiv dims",
    ".lang.errors": "CallError KernelError",
    ".lang.kernel": "Kernel kernel",
    ".lang.tensor": "Tensor",
    ".tile.schedule": "Schedule ScheduleError",
    ".runtime.buffers": "empty",
    ".runtime.launch": "prepare",
    ".runtime.packed": "pack",
    ".runtime.program": "Program Rows Variable",
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names.split()}

__all__ = [
    "CallError", "Dim", "Kernel", "KernelError", "Program", "Rows", "Schedule", "ScheduleError", "Tensor", "Variable",
    "abs", "argmax", "argmin", "asm", "bf16", "bool_", "cdiv", "ceil", "cos", "cummax", "cummin", "cumsum", "dims",
    "each", "empty", "erf", "exp", "exp2",
    "f8e4m3", "f8e5m2", "f16", "f32", "f64", "floor", "full", "i4", "i8", "i16", "i32", "i64", "kernel", "log",
    "log2", "max", "maximum", "min", "minimum", "pack", "prepare", "ptx", "round", "rsqrt", "sigmoid", "sin",
    "span", "sqrt", "sum", "tanh", "tiles", "topk", "u8", "where", "whole", "x86", "zeros",
]


def __getattr__(name: str) -> Any:
    home = _HOME_OF.get(name)
    if home is None:
        dtype = name[0] in "fiu" and name[1:].isdecimal()
        raise AttributeError(f"module 'sapper' has no attribute {name!r}" + (
            "; found a dtype that tensors cannot have; expected f64, f32, f16, bf16, f8e4m3, f8e5m2, i64, i32, i16, "
            "i8, u8, i4 or bool_; mend: array.view of a signed dtype, as integers wrap" if dtype else ""))
    value = getattr(import_module(home, __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


def _make_launcher(kernel: Kernel) -> Callable[..., Any]:
    made: Callable[..., Any] = import_module(".runtime.launch", __name__).make_launcher(kernel)
    return made


def _emulate(kernel: Kernel, *arguments: Any, **options: Any) -> Any:
    return import_module(".emulate.kernel", __name__).run(kernel, *arguments, **options)


def _features_of(family: str, features: str, who: str) -> frozenset[str]:
    found: frozenset[str] = import_module(".assembly.override", __name__).features_of(family, features, who)
    return found


def _verify_by_hand(kernel: Kernel, made: Any, target: Any) -> int:
    verify = import_module(".emulate.by_hand", __name__).verify
    passed: int = verify(kernel, made, target, import_module(".emulate.kernel", __name__).run)
    return passed


_context.make_launcher = _make_launcher
_context.emulate = _emulate
_context.features_of = _features_of
_context.verify_by_hand = _verify_by_hand
