"""The Kernel object: a Python function with annotated parameters, its tile IR, and the way to call it.

Enters: the decorated function. Leaves: `tile_ir`, `source_digest`, and a call that goes through the hook in
sapper/lang/context.py. Holds: parameters in order, each a TensorType or a scalar TileType.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Mapping
from importlib import import_module
from operator import attrgetter
from types import FunctionType
from typing import Any

from ..ir.extents import names_in, names_of
from ..ir.kept import Kept
from ..ir.nodes import Function, Location
from ..ir.types import DType, TensorType, TileType, bool_, spell_nested
from . import context
from .by_hand import ByHand
from .errors import KernelError
from .stamps import note
from .tensor import TensorAnnotation

ParameterType = TensorType | TileType

CALL_OPTIONS = ("emulate", "interpret", "schedule", "static", "target", "threads")
"""Of a call; the decorator may be given them for all calls."""

KEPT_IRS = 16
"""Tile IRs that are kept. Reading the source takes 13 times as long as making the ops anew and looking through what the
kernel closes over; checks, explanations, tuning and the specialisations of a kernel ask for its IR again and again."""

_kept: dict[tuple[Any, ...], tuple[weakref.ref[Kernel], str, Kept]] = {}
"""By the id of the kernel, and extents that are fixed: the kernel, its digest then, and its IR."""

COROUTINE = 0x80 | 0x200
"""Flags of the code of `async def` (inspect.CO_COROUTINE, CO_ASYNC_GENERATOR)."""


class Kernel:
    """A function decorated with @sapper.kernel.

    name: the name of the compiled function. parameters: (name, TensorType or scalar TileType) in order.
    defaults: the default values of scalar parameters, by name. options: what the decorator was given beside the
    name, for the runtime. specialise: dims whose extents the runtime compiles in. python_function, source_file,
    source_line: where it comes from.
    launcher: what a call runs; the runtime may replace it. by_hand: assembly that stands for it, the first that can.
    refused_by_hand: set where some of it was found wrong in this process; what is compiled instead is not kept on disk,
    so that the next process says so too.
    """

    __slots__ = ("__dict__", "__weakref__", "launcher")

    def __init__(
        self, function: FunctionType, name: str | None, options: Mapping[str, Any], names: Mapping[str, Any],
        specialise: str = "",
    ) -> None:
        self.python_function = function
        self.name = name or function.__name__
        self.options = dict(options)
        self.source_file = function.__code__.co_filename
        self.source_line = function.__code__.co_firstlineno
        self.__doc__ = function.__doc__
        self.__name__ = function.__name__
        self.__module__ = function.__module__
        self.__qualname__ = function.__qualname__
        self.__wrapped__ = function
        self.annotations = _annotations(function, names)
        self.parameters: list[tuple[str, ParameterType]] = [
            (parameter, entry.type if isinstance(entry, TensorAnnotation) else TileType(entry))
            for parameter, entry in self.annotations.items()
        ]
        count = len(function.__defaults__ or ())
        self.defaults: dict[str, Any] = dict(
            zip([p for p, _ in self.parameters][len(self.parameters) - count :], function.__defaults__ or (),
                strict=True)
        )
        self.specialise = frozenset(specialise.split())
        known = self._bound_dims(function)
        for dim in sorted(self.specialise.difference(known)):
            place = Location(self.source_file, self.source_line, 1, 1)
            raise KernelError("unbound-dim", f"kernel {self.name} cannot be specialised for {dim}", place,
                              found=f"no dimension {dim} in its tensors",
                              expected=f"dimensions of the kernel: {', '.join(known) or 'it has none'}",
                              mend=f"leave {dim} out of specialise")
        self._check_options()
        note(function)
        self.launcher: Callable[..., Any] = self._first_call
        self.by_hand: list[ByHand] = []
        self.refused_by_hand = False
        self._digest: str | None = None

    def _bound_dims(self, function: FunctionType) -> list[str]:
        """The dimensions that tensors have for themselves. Raises KernelError for one that is only calculated with."""
        known = names_of(type for _, type in self.parameters)
        for parameter, type in self.parameters:
            for extent in type.dims if isinstance(type, TensorType) else ():
                for name in names_in(extent):
                    if name not in known:
                        taken = {n for _, t in self.parameters if isinstance(t, TensorType) for d in t.dims
                                 for n in names_in(d)}
                        made = next(n for n in (*"PQRSTUVWXYZ", "EXTENT") if n not in taken)
                        raise KernelError(
                            "unbound-dim", f"no tensor of kernel {self.name} says what {name} is",
                            _parameter_place(function, parameter),
                            f"{spell_nested(extent)} as an extent of {parameter}",
                            f"a tensor of which {name} is an extent by itself: another's may be computed of it then",
                            f'name this extent: {made} = dims("{made}"), {parameter}: Tensor[{type.dtype}, ..., '
                            f"{made}], and write {_inverse(extent, name, made)} where {name} is meant")
        return known

    def _check_options(self) -> None:
        """Raise KernelError for an option that there is not, or a pair of in_place that names no two tensors."""
        place = Location(self.source_file, self.source_line, 1, 1)
        known = ("in_place", *CALL_OPTIONS)
        for option in self.options:
            if option not in known:
                from .bindings import near

                raise KernelError("call-arguments", f"@kernel has no option {option}", place, option,
                                  f"name, specialise, {', '.join(known)}", near(option, known, "leave it out"))
        tensors = [name for name, type in self.parameters if isinstance(type, TensorType)]
        for pair in self.options.get("in_place", ()):
            if len(pair) != 2 or isinstance(pair, str) or not all(name in tensors for name in pair):
                raise KernelError("call-arguments", f"in_place of {self.name} names no two of its tensors", place,
                                  repr(pair), f"a pair of {', '.join(tensors)}", 'write in_place=[("out", "x")]')

    def tile_ir(self, static: Mapping[str, int] | None = None) -> Function:
        """The kernel as a tile IR function, a fresh one at each call.

        static: extents, by the name of the dimension, that are fixed at compile time.
        Raises KernelError where the source means nothing.
        """
        from .digest import digest
        from .frontend import build

        fixed = dict(static or {})
        key, now = (id(self), *sorted(fixed.items())), digest(self)
        found = _kept.pop(key, None)
        if found is not None and found[0]() is self and found[1] == now:
            _kept[key] = found  # the last that was asked for
            return found[2].made()
        function = build(self, fixed)
        _kept[key] = weakref.ref(self), now, Kept(function)
        if len(_kept) > KEPT_IRS:
            for old in list(_kept)[:-KEPT_IRS]:
                _kept.pop(old, None)
        return function

    def source_digest(self) -> str:
        """A hash (hex) of the kernel's code, of every function that it inlines and constant that it closes over."""
        if self._digest is None:
            from .digest import digest

            self._digest = digest(self)
        return self._digest

    def check_constants(self) -> None:
        """Raise KernelError if what the kernel closes over is no longer what it was at the first call: code for other
        extents would mean something else, and be kept by the name of what it was."""
        from .digest import digest

        if digest(self) != self.source_digest():
            place = Location(self.source_file, self.source_line, 1, 1)
            raise KernelError("constant-changed", f"what {self.name} closes over has changed since its first call",
                              place, "another constant or function", "the same in all calls, as it is compiled in",
                              "define the kernel anew, or make what changes a parameter")

    def assembly(
        self, *, family: str = "x86_64", features: str = "", contiguous: str = "",
        divisible: Mapping[str, int] | None = None, no_spill: bool = False, budget: Mapping[str, int] | None = None,
        reorder: bool = False, flushes_denormals: bool = False,
    ) -> Callable[[Callable[[Any], None]], Callable[[Any], None]]:
        """`@matmul.assembly(features="avx512f", ...)` over `def write(a)`: this kernel in assembly by hand.

        It runs in place of the generated code where the target has the features, the tensors named in `contiguous` are
        in C order, and extents are multiples of what `divisible` says; everywhere else, and under a schedule given at
        the call, the generated code runs. features, contiguous: names, separated by blanks. See lang/by_hand.py.
        """
        for tensor in contiguous.split():
            if not isinstance(dict(self.parameters).get(tensor), TensorType):
                raise ValueError(f"assembly of {self.name}: found no tensor {tensor!r}; expected one of "
                                 f"{', '.join(n for n, t in self.parameters if isinstance(t, TensorType))}")
        dims = names_of(type for _, type in self.parameters)
        for dim in divisible or {}:
            if dim not in dims:
                raise ValueError(f"assembly of {self.name}: found no dim {dim!r}; expected one of "
                                 f"{', '.join(dims)}")

        names = frozenset(features.split())
        if context.features_of is not None:
            names = context.features_of(family, features, f"assembly of {self.name}")

        def attach(write: Callable[[Any], None]) -> Callable[[Any], None]:
            self.by_hand.append(ByHand(
                write.__name__, family, names, write, tuple(contiguous.split()),
                dict(divisible or {}), no_spill, dict(budget or {}), reorder,
                flushes_denormals))
            return write

        return attach

    def call_in_python(self, *arguments: Any, **options: Any) -> Any:
        """A call. The runtime may put another `__call__` in the place of this, which does the same."""
        if context.current() is not None:  # a kernel called by a kernel under the interpreter
            return self.python_function(*arguments, **options)
        return self.launcher(*arguments, **options)

    __call__ = call_in_python

    def _first_call(self, *arguments: Any, **options: Any) -> Any:
        if context.make_launcher is None:
            raise RuntimeError("no runtime is present to run kernels: import sapper as a whole")
        self.launcher = context.make_launcher(self)
        return self.launcher(*arguments, **options)

    def __copy__(self) -> Kernel:
        """Itself, as of a function."""
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Kernel:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """By its module and name, as a function: whoever reads it has the same source."""
        try:
            found = _at(self.__module__, self.__qualname__)
        except (ImportError, AttributeError):
            found = None
        if found is not self:
            from pickle import PicklingError

            raise PicklingError(f"kernel {self.name} can't be pickled: found another thing, or nothing, as "
                                f"{self.__module__}.{self.__qualname__}; expected the kernel there; mend: define it at "
                                "the top of a module, or make it in the process that calls it")
        return _at, (self.__module__, self.__qualname__)

    def __repr__(self) -> str:
        return f"<kernel {self.name} ({', '.join(f'{n}: {t}' for n, t in self.parameters)})>"


def _at(module: str, name: str) -> Any:
    """What a module has under a name, which may have points."""
    return attrgetter(name)(import_module(module))


def kernel(function: Any = None, /, *, name: str | None = None, specialise: str = "", **options: Any) -> Any:
    """`@kernel` or `@kernel(name=..., ...)` makes a Kernel of a function.

    specialise: dims, separated by blanks, of which there are few extents (those of heads), and for which the code is
    better where they are known: calls get code for theirs, and only after many different ones the code for any.
    Raises KernelError (missing-annotation, bad-annotation, call-arguments) if a parameter's annotation is missing or
    is neither Tensor[...] nor a dtype, and unbound-dim for an unknown dim. The body is read when the tile IR is first
    wanted.
    """
    caller = sys._getframe(1)

    def make(function: Any) -> Kernel:
        is_lambda = isinstance(function, FunctionType) and function.__name__ == "<lambda>"
        if isinstance(function, FunctionType) and not function.__code__.co_flags & COROUTINE and not is_lambda:
            return Kernel(function, name, options, caller.f_locals, specialise)
        if isinstance(function, FunctionType):
            place = Location(function.__code__.co_filename, function.__code__.co_firstlineno, 1, 1)
            found = "a lambda, whose parameters say no types" if is_lambda else f"{function.__name__}, which is async"
        else:
            place = Location(caller.f_code.co_filename, caller.f_lineno, 1, 1)
            found = f"{type(function).__name__} {getattr(function, '__name__', repr(function))}"
        raise KernelError("not-a-function", "a kernel is made of a plain function", place, found,
                          "a function written with def", "leave one @kernel out" if isinstance(function, Kernel) else
                          f"put @{type(function).__name__} above @kernel" if isinstance(
                              function, (staticmethod, classmethod)) else
                          "write def f(a: Tensor[f32, M], ...): under @kernel")

    return make if function is None else make(function)


def _annotations(function: FunctionType, local_names: Mapping[str, Any]) -> dict[str, TensorAnnotation | DType]:
    code = function.__code__
    place = Location(code.co_filename, code.co_firstlineno, 1, 1)
    if code.co_flags & 0x0C or code.co_kwonlyargcount or code.co_posonlyargcount:
        raise KernelError(
            "call-arguments", f"kernel {function.__name__} has parameters that are not plain", place,
            found="*args, **kwargs, or a bare * or /", expected="named parameters",
            mend="put @kernel below the other decorators" if hasattr(function, "__wrapped__") else
            "write them one by one",
        )
    result: dict[str, TensorAnnotation | DType] = {}
    for parameter in code.co_varnames[: code.co_argcount]:
        if parameter not in function.__annotations__:
            raise KernelError(
                "missing-annotation", f"parameter {parameter} of kernel {function.__name__} has no annotation",
                _parameter_place(function, parameter),
                found=parameter, expected="Tensor[dtype, dims...] for a tensor, a dtype for a scalar",
                mend="leave self out: a kernel in a class is called without the object" if parameter == "self" else
                f"write {parameter}: Tensor[f32, M, N], or {parameter}: f32",
            )
        annotation = function.__annotations__[parameter]
        if isinstance(annotation, str):  # from __future__ import annotations
            text = annotation
            try:
                annotation = eval(text, function.__globals__, dict(local_names))
            except KernelError as error:
                raise KernelError(error.kind, error.headline, _parameter_place(function, parameter), error.found,
                                  error.expected, error.mend, error.notes) from None
            except Exception as error:
                raise KernelError(
                    "bad-annotation", f"the annotation of {parameter} cannot be read",
                    _parameter_place(function, parameter), found=f"{text!r} ({error})",
                    expected="names known where the kernel is defined",
                    mend="import it, or define it before the kernel",
                ) from None
        if annotation is bool:
            annotation = bool_
        scalar = isinstance(annotation, DType) and annotation.kind != "x" and annotation.compute
        if scalar or isinstance(annotation, TensorAnnotation):
            result[parameter] = annotation
        else:
            mend = f"write {parameter}: Tensor[f32, M, N], or {parameter}: f32"
            if annotation in (int, float):
                mend = f"write {parameter}: {'i32' if annotation is int else 'f32'}"
            if annotation is str:
                mend = "close over it: a function that makes the kernel has it as a parameter"
            shown = annotation.__name__ if isinstance(annotation, type) else repr(annotation)
            raise KernelError(
                "bad-annotation", f"parameter {parameter} of kernel {function.__name__} has an unknown annotation",
                _parameter_place(function, parameter), found=shown,
                expected="Tensor[dtype, dims...] for a tensor, a dtype that can be computed with for a scalar",
                mend=mend,
            )
    return result


def _inverse(extent: Any, name: str, made: str) -> str:
    """What the dimension `name` is, given the extent `made`, where it is calculated once."""
    op, left, right = extent
    back = {"floordiv": "mul", "mul": "floordiv", "add": "sub", "sub": "add"}.get(op)
    if back and left == name and not isinstance(right, tuple):
        return spell_nested((back, made, right))
    if back and op in ("add", "mul") and right == name and not isinstance(left, tuple):
        return spell_nested((back, made, left))
    return f"what follows from {made}"


def _parameter_place(function: FunctionType, parameter: str) -> Location:
    """Where the parameter is written: found in the source if that can be read, else the function's first line."""
    import ast

    from .source import SourceUnavailable, parse_function

    code = function.__code__
    try:
        parsed = parse_function(function)
    except (SourceUnavailable, SyntaxError):
        return Location(code.co_filename, code.co_firstlineno, 1, 1)
    assert isinstance(parsed.node, (ast.FunctionDef, ast.Lambda))
    for argument in parsed.node.args.args:
        if argument.arg == parameter:
            return parsed.location(argument)
    return Location(code.co_filename, code.co_firstlineno, 1, 1)
