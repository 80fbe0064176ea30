"""Kernels -> a library that C programs use: compiled forms, entry points, and the file in the form that is asked for.

Enters: `lang.Kernel`s, a target, what the calls are expected to be. Leaves: a `Library`, whose `so`, `o`, `s` and `h`
are the files. Holds: every library has the general forms of its kernels as a fallback, unless it is told to have none;
nothing of Python is needed to use it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..ir.extents import names_of
from ..ir.nodes import Location
from ..ir.types import TensorType
from ..targets import has_module, module_of
from ..targets.system import System
from .c_abi import SCRATCH_BYTES, BuildError, CKernel, Variant, library_parts, needed_features
from .compile import encoded, style_of
from .encode import EncodedCode
from .header import header_text
from .machine import MachineFunction
from .object import Part, write_object, write_shared_object
from .pipeline import Compiled, _tuples, compile_kernel
from .print import print_file

LARGE = (2**31 - 1, 1)
"""The class of a dimension of which nothing is known."""
SCRATCH_LIMIT = 2**31 - 64


@dataclass(slots=True)
class Library:
    """Its kernels, its functions as code and as machine IR, and its writable memory (name -> bytes)."""

    kernels: list[CKernel]
    parts: list[Part]
    functions: list[MachineFunction]
    areas: dict[str, int]
    target: Any

    @property
    def system(self) -> System:
        found: System = module_of(self.target.family, "system").SYSTEM
        return found

    def so(self, soname: str) -> bytes:
        return write_shared_object(self.parts, soname, self.areas, debug=True, system=self.system)

    def o(self) -> bytes:
        return write_object(self.parts, self.areas, debug=True, system=self.system)

    def s(self) -> str:
        exported = [(f, p.exported) for f, p in zip(self.functions, self.parts, strict=True)]
        return print_file(exported, self.areas, line_table=True, style=style_of(self.target))

    def h(self, name: str) -> str:
        return header_text(name, self.kernels, self.target.name,
                           needed_features(self.target.features, self.functions))


def make_library(kernels: Sequence[CKernel], target: Any, scratch_bytes: int = SCRATCH_BYTES) -> Library:
    """Raises BuildError for names that clash, and for more scratch memory than addresses reach."""
    names: set[str] = set()
    for kernel in kernels:
        for name in (kernel.name, f"{kernel.name}_on", f"{kernel.name}_scratch_bytes", f"{kernel.name}_call"):
            if name in names:
                raise BuildError(f"found the name {name} twice; expected kernels whose names, with _on, _scratch_bytes "
                                 "and _call, differ; mend: @kernel(name=...)")
            names.add(name)
    if not 0 <= scratch_bytes <= SCRATCH_LIMIT:
        raise BuildError(f"found {scratch_bytes} bytes of scratch memory; expected 0 to {SCRATCH_LIMIT}")
    made = [variant.machine for kernel in kernels for variant in kernel.variants]
    parts, functions, areas = library_parts(kernels, needed_features(target.features, made), target, scratch_bytes)
    return Library(list(kernels), parts, functions, areas, target)


@dataclass(frozen=True, slots=True)
class Form:
    """Code for a kernel, and the calls that it is for. static, divisors, strides: as in `Variant`."""

    label: str
    compiled: Compiled
    static: Mapping[str, int]
    divisors: Mapping[str, int]
    strides: Mapping[str, str | tuple[bool, ...]]


def c_kernel(
    kernel: Any, target: Any, schedule: Any = None, static: Mapping[str, int] | None = None,
    classes: Mapping[str, tuple[int, int]] | None = None, fallback: bool = True, by_hand: Sequence[Form] = (),
    pieces: bool = True,
) -> CKernel:
    """A kernel with its forms: by hand, for calls as given, for contiguous tensors, for any strides.

    static: extents compiled into the special form. classes: for dimensions of it, (least upper bound, divisor).
    fallback: False makes the special form only, and a call that does not suit it gets a status. by_hand: forms that
    are tried first; without a fallback they stand in place of the special one, and are for the same calls. pieces:
    whether instructions and blocks by hand may stand in generated code.
    """
    if not has_module(target.family, "system"):
        raise BuildError(f"target {target.name}: found a processor of the family {target.family}, for whose C calls "
                         "there is no code; expected a CPU whose family has system.py and translate.py; mend: `sapper "
                         "asm` prints a kernel, to be called as docs/ir.md says")
    types = dict(kernel.parameters)
    tensors = {n: t for n, t in types.items() if isinstance(t, TensorType)}
    dims = names_of(tensors.values())
    contiguous: dict[str, Any] = dict.fromkeys(tensors, "contiguous")
    requires = _requires(kernel, dict(static or {}), fallback)
    packed = {row[0] for row in requires if row[1] == "contiguous"}
    strided: dict[str, Any] = {n: "contiguous" if n in packed else (False,) * len(t.dims) for n, t in tensors.items()}
    free = [d for d in dims if d not in (static or {})]
    wanted: list[tuple[str, dict[str, int], dict[str, tuple[int, int]], dict[str, Any]]] = []
    if (static or classes) if fallback else not by_hand:
        wanted.append(("special", dict(static or {}), {d: (classes or {}).get(d, LARGE) for d in free}, contiguous))
    if fallback:
        wanted += [("contiguous", {}, dict.fromkeys(dims, LARGE), contiguous)]
        if any(len(t.dims) for t in tensors.values()):
            wanted += [("strided", {}, dict.fromkeys(dims, LARGE), strided)]
    forms = list(by_hand)
    for label, fixed, of_dims, strides in wanted:
        compiled = compile_kernel(kernel, fixed, strides, of_dims, target, schedule, by_hand=pieces)
        forms.append(Form(label, compiled, fixed, {d: divisor for d, (_, divisor) in of_dims.items()}, strides))
    near = dict.fromkeys(row for form in forms for row in form.compiled.requires if row[1] == "near")
    return CKernel(kernel.name, list(kernel.parameters), forms[0].compiled.stored,
                   (*requires, *near), [_variant(kernel.name, form, target) for form in forms],
                   in_place_of(kernel), Location(kernel.source_file, kernel.source_line), kernel.__doc__ or "")


def _variant(name: str, form: Form, target: Any) -> Variant:
    symbol, compiled = f"{name}.{form.label}", form.compiled
    made = compiled.made
    machine = MachineFunction(symbol, made.machine.body, made.machine.constants, made.machine.frame_bytes)
    code = EncodedCode(made.bytes, made.code_bytes, {}, made.line_table, made.align_bytes,
                       offsets=encoded(machine, target).offsets)
    return Variant(symbol, code, machine, compiled.slots, compiled.scratch, compiled.counters, form.static,
                   form.divisors, form.strides)


def _requires(kernel: Any, static: dict[str, int], fallback: bool) -> tuple[tuple[Any, ...], ...]:
    """What extents every form needs; extents compiled into the only form are known, and need no check."""
    function = kernel.tile_ir({} if fallback else static)
    return tuple(_tuples(row) for row in function.attributes.get("requires", ()))


def in_place_of(kernel: Any) -> frozenset[str]:
    """The tensors that may be the very same as another one."""
    pairs: Iterable[Sequence[str]] = kernel.options.get("in_place", ())
    return frozenset(name for pair in pairs for name in pair)
