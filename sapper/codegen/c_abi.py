"""Kernels as C functions: the machine code between a C call and the compiled kernel, and what a C program must know.

Enters: a kernel's parameters and its compiled `Variant`s, the most special first. Leaves: `Part`s for object.py, the
areas that they need, and the facts that header.py prints. docs/c-abi.md is written for the caller.

    int     NAME(tensors and scalars as the kernel has them, int64_t DIM, ...)     contiguous tensors, this thread alone
    int     NAME_on(const NAME_call *call, int64_t worker, int64_t workers)        strides, own scratch, many threads
    int64_t NAME_scratch_bytes(const NAME_call *call)                              of each worker, -1: extents refused

`NAME` fills a `NAME_call` on its stack and calls `NAME_on`, which checks all that the code assumes of a call (status
codes below), takes the first variant whose assumptions hold, and fills the kernel's argument block (docs/ir.md).

    NAME_call     each tensor: its address, then its strides in elements | dims | scratch, scratch_bytes, sync | scalars

Holds: nothing outside the caller's memory, the stack and the library's own areas is touched, no system call is made,
and no instruction that needs a feature runs before the processor was asked for it.
Source: System V ABI AMD64 supplement, 3.2; Intel SDM volume 2, CPUID; volume 1, 13.3 (XGETBV).
"""

from __future__ import annotations

import keyword
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..ir.extents import MAX_EXTENT, names_of
from ..ir.indices import Row
from ..ir.nodes import Location
from ..ir.types import Dim, DType, TensorType
from ..targets.x86_64.detect import ARCH_REQ_XCOMP_PERM, FEATURE_BITS, SYS_ARCH_PRCTL, TILE_DATA, TILE_STATE
from ..targets.x86_64.registers import (
    R8,
    R9,
    R10,
    R11,
    R12,
    R13,
    RAX,
    RBP,
    RBX,
    RCX,
    RDI,
    RDX,
    RSI,
    RSP,
)
from .c_indices import check_index
from .encode import EncodedCode
from .listing import Listing, at
from .machine import Immediate, Instruction, MachineFunction, Memory, Register
from .object import Part
from .unwind import frame_rows

STATUS = {
    "OK": (0, "the kernel has run"),
    "BAD_POINTER": (1, "a tensor's address is null, or no multiple of its element's size"),
    "BAD_EXTENT": (2, "a dimension is negative, above 2^31 - 1, too small for the kernel's indices, which scalars may "
                      "be part of, or none that the library was built for"),
    "BAD_STRIDE": (3, "the library was built for contiguous tensors only"),
    "BAD_SCRATCH": (4, "scratch memory is null, too small, or not aligned to 64 bytes"),
    "BAD_SYNC": (5, "the sync block is null or not aligned to 64 bytes"),
    "BAD_WORKER": (6, "worker is not in 0 .. workers - 1"),
    "BAD_CPU": (7, "the processor lacks what the library was built for"),
    "BUSY": (8, "another thread uses the library's own scratch memory: give each call its own, with NAME_on"),
}
"""What the functions return, by name."""

SYNC_BYTES = 1024
CLEAR_BYTES = 576
"""Of the sync block, what is zero before a launch: eight task counters and the barrier (docs/ir.md)."""
SCRATCH_AREA, LOCK_AREA, CPU_AREA = "sapper.scratch", "sapper.lock", "sapper.cpu"
CHECK_CPU = "sapper.check_cpu"
SCRATCH_BYTES = 64 << 20
MOST_APART = 2**31
"""Bytes between elements that lanes reach by offsets."""
_INTEGER_ARGUMENTS = (RDI, RSI, RDX, RCX, R8, R9)
_VECTOR_ARGUMENTS = 8
_SAVED = (RBX, RBP, R12, R13)
_C_WORDS = frozenset({
    "auto", "break", "case", "char", "const", "continue", "default", "do", "double", "else", "enum", "extern",
    "float", "for", "goto", "if", "inline", "int", "long", "register", "restrict", "return", "short", "signed",
    "sizeof", "static", "struct", "switch", "typedef", "union", "unsigned", "void", "volatile", "while", "bool",
    "true", "false", "class", "delete", "friend", "mutable", "namespace", "new", "operator", "private", "protected",
    "public", "template", "this", "throw", "try", "typename", "using", "virtual", "and", "or", "not", "xor",
    "alignas", "alignof", "asm", "constexpr", "export", "explicit", "catch",
})


class BuildError(Exception):
    """A library that can't be built as asked."""


@dataclass(frozen=True, slots=True)
class Arguments:
    """How a family passes arguments of C: so many integers and so many floats in registers, the rest on the stack, 8
    bytes each. floats_go_on: floats for which no float register is left take integer registers. symbol: of the function
    that takes them from memory."""

    integers: int
    floats: int
    floats_go_on: bool
    symbol: str


@dataclass(frozen=True, slots=True)
class Variant:
    """A compiled form of a kernel, and what it assumes of a call.

    static, divisors: by dimension, the extent compiled in, or what the extent is a multiple of. strides: for each
    tensor "contiguous", or for each dimension whether its stride is 1. slots, scratch, counters: as
    `pipeline.Compiled` says.
    """

    symbol: str
    code: EncodedCode
    machine: MachineFunction
    slots: tuple[str, ...]
    scratch: tuple[Any, ...]
    counters: int
    static: Mapping[str, int]
    divisors: Mapping[str, int]
    strides: Mapping[str, str | tuple[bool, ...]]


@dataclass(frozen=True, slots=True)
class Field:
    """One field of a NAME_call: its name in C, its offset, and what it holds: a slot of the kernel, or "scratch", ...

    count: elements, where it is an array of int64_t (a tensor's strides). dtype: of a scalar, or a tensor's elements.
    """

    name: str
    holds: str
    offset: int
    size_bytes: int
    dtype: DType | None = None
    count: int = 0


@dataclass(slots=True)
class CKernel:
    """A kernel as C sees it. stored: tensors that it writes. requires: docs/ir.md. in_place: tensors that may coincide
    with another one. source: where it is defined."""

    name: str
    parameters: list[tuple[str, Any]]
    stored: tuple[str, ...]
    requires: tuple[tuple[Any, ...], ...]
    variants: list[Variant]
    in_place: frozenset[str] = frozenset()
    source: Location | None = None
    documentation: str = ""
    fields: list[Field] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", self.name) or self.name in _C_WORDS:
            raise BuildError(f"{self.name}: found a name that C can't spell; expected an ASCII identifier that is no "
                             "word of C; mend: @kernel(name=...)")
        self.fields = _fields(self.parameters)

    @property
    def dims(self) -> list[str]:
        """Symbolic dimensions in order of first appearance."""
        return dims_of(self.parameters)

    @property
    def call_bytes(self) -> int:
        last = self.fields[-1]
        return _round_up(last.offset + last.size_bytes, 8)

    def field(self, holds: str) -> Field:
        return next(f for f in self.fields if f.holds == holds)


def dims_of(parameters: Iterable[tuple[str, Any]]) -> list[str]:
    return names_of(type for _, type in parameters)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _fields(parameters: list[tuple[str, Any]]) -> list[Field]:
    taken: set[str] = set()

    def spell(name: str) -> str:
        """A name that is free and no word of C or C++; other letters than ASCII become _xx."""
        name = "".join(c if c.isascii() else f"_{ord(c):x}" for c in name)
        while name in taken or name in _C_WORDS or keyword.iskeyword(name):
            name += "_"
        taken.add(name)
        return name

    fields: list[Field] = []
    here = 0
    tensors = [(n, t) for n, t in parameters if isinstance(t, TensorType)]
    spelled = {n: spell(n) for n, _ in parameters}
    for name, type in tensors:
        fields.append(Field(spelled[name], f"{name}.data", here, 8, type.dtype))
        here += 8
        if type.dims:
            fields.append(Field(spell(f"{spelled[name]}_stride"), f"{name}.stride", here, 8 * len(type.dims),
                                count=len(type.dims)))
            here += 8 * len(type.dims)
    for holds in [*(f"dim.{d}" for d in dims_of(parameters)), "scratch", "scratch_bytes", "sync"]:
        fields.append(Field(spell(holds.removeprefix("dim.")), holds, here, 8))
        here += 8
    for name, type in parameters:
        if not isinstance(type, TensorType):
            size_bytes = type.dtype.size_bytes
            here = _round_up(here, size_bytes)
            fields.append(Field(spelled[name], f"scalar.{name}", here, size_bytes, type.dtype))
            here += size_bytes
    return fields


# ------------------------------------------------------------------------------------------------------- the functions


def library_parts(
    kernels: Iterable[CKernel], features: Iterable[str], target: Any, scratch_bytes: int = SCRATCH_BYTES,
) -> tuple[list[Part], list[MachineFunction], dict[str, int]]:
    """(functions, the same as machine code for printing, areas) of a library.

    features: what the kernels' code needs of the processor. target: what it was made for. scratch_bytes: of the
    library's own scratch memory.
    """
    from .compile import encoded, style_of
    from .translate import cpu_check, gathering, translated

    kernels = list(kernels)
    own_scratch = any(v.scratch for k in kernels for v in k.variants)
    checks, areas = cpu_check(target, frozenset(features), often=True)
    if own_scratch:
        areas |= {LOCK_AREA: 64, SCRATCH_AREA: scratch_bytes}
    functions: list[tuple[MachineFunction, EncodedCode | None, bool, Location | None]] = []

    def add(function: MachineFunction, exported: bool = True) -> None:
        functions.append((translated(function, target, ordered=True), None, exported, None))

    for kernel in kernels:
        gather, arguments = gathering(kernel.name, target)
        if gather is not None:
            functions.append((gather, None, True, None))
        add(_plain(kernel, scratch_bytes, arguments), gather is None)
        add(_on(kernel))
        add(_scratch_bytes(kernel))
        functions += [(v.machine, v.code, False, kernel.source) for v in kernel.variants]
    functions += [(check, None, False, None) for check in checks]
    parts = []
    unwinds = style_of(target).unwinds
    for f, given, exported, source in functions:
        code = given or encoded(f, target, checked=False)
        parts.append(Part(f.name, code, exported, source, tuple(frame_rows(f, code.offsets)) if unwinds else ()))
    return parts, [f for f, _, _, _ in functions], areas


def _finish(name: str, emit: Listing, externals: Iterable[str]) -> MachineFunction:
    return MachineFunction(name, emit.body, {}, externals=frozenset(externals))


def _call(emit: Listing, label: str) -> None:
    emit("lea.64", RAX, Memory(label=label))
    emit("call.indirect", RAX)


def _fail(emit: Listing, statuses: Iterable[str], leave: str) -> None:
    """A place for each status that sets it and goes to `leave`."""
    for status in statuses:
        emit.label(status)
        emit("mov.32", RAX, Immediate(STATUS[status][0]))
        emit("jmp", leave)


def _status_labels(emit: Listing) -> list[str]:
    """The statuses that the code jumps to, in order of their numbers."""
    wanted = {o.name for i in emit.body for o in getattr(i, "operands", ()) if hasattr(o, "name")}
    return [status for status in STATUS if status in wanted]


def _load_extent(emit: Listing, dim: Dim, where: Callable[[str], Memory]) -> None:
    """An extent into rcx. Of one that is computed rdx is lost, and `where` must not go by rsp."""
    if isinstance(dim, int):
        emit("mov.32", RCX, Immediate(dim))
    elif isinstance(dim, str):
        emit("mov.64", RCX, where(dim))
    else:
        emit("push", RAX)
        _compute(emit, dim, where, 1)
        emit("mov.64", RCX, RAX)
        emit("pop", RAX)


def _compute(emit: Listing, value: Any, where: Callable[[str], Memory], pushed: int = 0) -> None:
    """An expression of extents (`ir.extents`) into rax; rcx and rdx are lost. `where` must not go by rsp. pushed: words
    on the stack, which are dropped where it divides by 0, or by less."""
    if not isinstance(value, tuple):
        emit("mov.64", RAX, Immediate(value) if isinstance(value, int) else where(value))
        return
    op, left, right = value
    _compute(emit, right, where, pushed)
    emit("push", RAX)
    _compute(emit, left, where, pushed + 1)
    emit("pop", RCX)
    if op in ("floordiv", "mod"):
        here = f"divide{len(emit.body)}"
        emit("test.64", RCX, RCX)
        emit("jg", here)
        for _ in range(pushed):
            emit("pop", RCX)
        emit("jmp", "BAD_EXTENT")
        emit.label(here)
        emit("cqo")
        emit("idiv.64", RCX)
        emit("test.64", RDX, RDX)   # a rest has the sign of what is divided; rounded down, it has none
        emit("jns", f"{here}.down")
        emit("add.64", RDX, RCX)
        emit("sub.64", RAX, Immediate(1))
        emit.label(f"{here}.down")
        if op == "mod":
            emit("mov.64", RAX, RDX)
    elif op in ("min", "max"):
        emit("cmp.64", RAX, RCX)
        emit("cmovg.64" if op == "min" else "cmovl.64", RAX, RCX)
    else:
        emit({"add": "add.64", "sub": "sub.64", "mul": "imul.64", "or": "or.64", "xor": "xor.64"}[op], RAX, RCX)


def _plain(kernel: CKernel, scratch_bytes: int, arguments: Arguments | None) -> MachineFunction:
    """NAME. The frame, from rsp: the NAME_call, the sync block aligned to 64; rbp -> saved rbp, return address, stack
    arguments. arguments: where these lie, by rdi, if they are not where System V puts them; it has another name then.
    """
    emit = Listing()
    sync = _round_up(kernel.call_bytes, 64)
    locks = any(v.scratch for v in kernel.variants)
    counts = any(v.counters for v in kernel.variants)
    frame = sync + (_round_up(CLEAR_BYTES, 64) if counts else 0)

    def here(holds: str) -> Memory:
        return at(RSP, kernel.field(holds).offset)

    emit("push", RBP)
    emit("mov.64", RBP, RSP)
    emit("push", RBX)
    emit("sub.64", RSP, Immediate(frame))
    emit("and.64", RSP, Immediate(-64))
    emit("xor.32", RBX, RBX)  # whether the lock is held
    if arguments is not None:
        _take_gathered(emit, kernel, arguments)
    in_vectors = _take_arguments(emit, kernel) if arguments is None else []
    emit("mov.64", RDI, RSP)    # its argument lies in the frame by now
    for name, type in kernel.parameters:
        if isinstance(type, TensorType) and type.dims:
            emit("mov.32", RAX, Immediate(1))
            for position in range(len(type.dims) - 1, -1, -1):
                emit("mov.64", at(RSP, kernel.field(f"{name}.stride").offset + 8 * position), RAX)
                if position:
                    _load_extent(emit, type.dims[position], lambda d: at(RDI, kernel.field(f"dim.{d}").offset))
                    emit("imul.64", RAX, RCX)
    _call(emit, CHECK_CPU)
    emit("test.32", RAX, RAX)
    emit("je", "BAD_CPU")
    for place, number in in_vectors:
        emit("vmovss" if place.size_bytes == 4 else "vmovsd", at(RSP, place.offset), Register("vec", number))
    emit("xor.32", RAX, RAX)
    for holds in ("scratch", "scratch_bytes", "sync"):
        emit("mov.64", here(holds), RAX)
    if counts:
        emit("mov.32", RCX, Immediate(CLEAR_BYTES // 8))
        emit.label("clear")
        emit("mov.64", Memory(Register("gpr", RSP), Register("gpr", RCX), 8, sync - 8), RAX)
        emit("sub.64", RCX, Immediate(1))
        emit("jne", "clear")
        emit("lea.64", RCX, at(RSP, sync))
        emit("mov.64", here("sync"), RCX)
    if locks:
        emit("mov.32", RAX, Immediate(1))
        emit("xchg.32", Memory(label=LOCK_AREA), RAX)
        emit("test.32", RAX, RAX)
        emit("jne", "BUSY")
        emit("mov.32", RBX, Immediate(1))
        emit("lea.64", RCX, Memory(label=SCRATCH_AREA))
        emit("mov.64", here("scratch"), RCX)
        emit("mov.64", here("scratch_bytes"), Immediate(scratch_bytes))
    emit("mov.64", RDI, RSP)
    emit("xor.32", RSI, RSI)
    emit("mov.32", RDX, Immediate(1))
    _call(emit, f"{kernel.name}_on")
    if locks:
        emit("xor.32", RCX, RCX)
        emit("mov.32", Memory(label=LOCK_AREA), RCX)  # the processor keeps stores in order: the next sees ours
    emit.label("leave")
    emit("lea.64", RSP, at(RBP, -8))
    emit("pop", RBX)
    emit("pop", RBP)
    emit("ret")
    _fail(emit, _status_labels(emit), "leave")
    return _finish(kernel.name if arguments is None else arguments.symbol, emit,
                   [CHECK_CPU, f"{kernel.name}_on", *([LOCK_AREA, SCRATCH_AREA] if locks else [])])


def _given(kernel: CKernel) -> list[tuple[Field, bool]]:
    """The arguments of NAME in order, and whether each is a float of C."""
    names = [f"{n}.data" if isinstance(t, TensorType) else f"scalar.{n}" for n, t in kernel.parameters]
    found = []
    for holds in [*names, *(f"dim.{d}" for d in kernel.dims)]:
        place = kernel.field(holds)
        floating = holds.startswith("scalar.") and place.dtype is not None and place.dtype.is_float
        found.append((place, floating and place.size_bytes >= 4))
    return found


def _take_arguments(emit: Listing, kernel: CKernel) -> list[tuple[Field, int]]:
    """Arguments as System V passes them into the NAME_call at rsp, but for those that are left in vector registers."""
    registers = iter(_INTEGER_ARGUMENTS)
    vectors = iter(range(_VECTOR_ARGUMENTS))
    stack = iter(range(16, 1 << 20, 8))
    in_vectors: list[tuple[Field, int]] = []
    for place, floating in _given(kernel):
        number = next(vectors if floating else registers, None)
        if floating and number is not None:
            in_vectors.append((place, number))
            continue
        if number is None:
            number = RAX
            emit("mov.64", RAX, at(RBP, next(stack)))
        emit(f"mov.{8 * place.size_bytes}", at(RSP, place.offset), number)
    return in_vectors


def _take_gathered(emit: Listing, kernel: CKernel, arguments: Arguments) -> None:
    """The same of arguments that lie in memory at rdi: integer registers, float registers, the address of the stack's.
    """
    integers = iter(range(0, 8 * arguments.integers, 8))
    floats = iter(range(8 * arguments.integers, 8 * (arguments.integers + arguments.floats), 8))
    stack = iter(range(0, 1 << 20, 8))
    emit("mov.64", RCX, at(RDI, 8 * (arguments.integers + arguments.floats)))
    for place, floating in _given(kernel):
        where = next(floats if floating else integers, None)
        if where is None and floating and arguments.floats_go_on:
            where = next(integers, None)
        emit("mov.64", RAX, at(RCX, next(stack)) if where is None else at(RDI, where))
        emit(f"mov.{8 * place.size_bytes}", at(RSP, place.offset), RAX)


def _on(kernel: CKernel) -> MachineFunction:
    """NAME_on. rbx: the call. r12: worker. r13: workers. rbp: scratch bytes of a worker. rsp: the argument block."""
    emit = Listing()
    block = 8 * (3 + max(len(v.slots) for v in kernel.variants))
    frame = _round_up(block, 16) + 8  # four pushes and the return address leave rsp a multiple of 16, less 8

    def here(holds: str, more: int = 0) -> Memory:
        return at(RBX, kernel.field(holds).offset + more)

    for register in _SAVED:
        emit("push", register)
    emit("sub.64", RSP, Immediate(frame))
    emit("mov.64", RBX, RDI)
    emit("mov.64", R12, RSI)
    emit("mov.64", R13, RDX)
    _call(emit, CHECK_CPU)
    emit("test.32", RAX, RAX)
    emit("je", "BAD_CPU")
    emit("cmp.64", R12, R13)
    emit("jae", "BAD_WORKER")  # unsigned: a negative worker is refused too
    emit("test.64", R13, R13)
    emit("jl", "BAD_WORKER")
    _check_extents(emit, kernel, "BAD_EXTENT")
    for name, type in kernel.parameters:
        if isinstance(type, TensorType):
            emit("mov.64", RAX, here(f"{name}.data"))
            emit("test.64", RAX, RAX)
            emit("je", "BAD_POINTER")
            if type.dtype.size_bytes > 1:
                emit("test.32", RAX, Immediate(type.dtype.size_bytes - 1))
                emit("jne", "BAD_POINTER")

    def load(emit: Listing, kind: str, name: str) -> None:
        if kind == "dim":
            emit("mov.64", RAX, here(f"dim.{name}"))
        else:
            _load_scalar(emit, kernel.field(f"scalar.{name}"))

    for name, dimension, constant, *terms in kernel.requires:
        if dimension == "contiguous":
            if terms[1:]:  # every variant asks for a contiguous tensor (library.c_kernel); one viewed as wider elements
                emit("test.32", here(f"{name}.data"), Immediate(terms[1] - 1))
                emit("jne", "BAD_POINTER")
            continue
        if dimension == "near":
            _check_near(emit, kernel, name, [constant, *terms], here)
            continue
        if dimension == "indexed":
            check_index(emit, Row(name, dimension, constant, *terms), load, "BAD_EXTENT")
            continue
        if dimension in ("multiple", "inside"):
            wanted = ("mod", constant, terms[0]) if dimension == "multiple" else ("sub", constant, terms[0])
            met = f"met{len(emit.body)}"
            for count in terms[1:]:
                _compute(emit, count, lambda d: here(f"dim.{d}"))
                emit("test.64", RAX, RAX)
                emit("jle", met)
            _compute(emit, wanted, lambda d: here(f"dim.{d}"))
            emit("test.64", RAX, RAX)
            emit("jne" if dimension == "multiple" else "jge", "BAD_EXTENT")
            emit.label(met)
            continue
        emit("mov.64", RAX, Immediate(constant))
        for dim, coefficient in zip(terms[::2], terms[1::2], strict=True):
            emit("imul.imm.64", RCX, here(f"dim.{dim}"), Immediate(coefficient))
            emit("add.64", RAX, RCX)
        _load_extent(emit, dict(kernel.parameters)[name].dims[dimension], lambda d: here(f"dim.{d}"))
        emit("cmp.64", RCX, RAX)
        emit("jl", "BAD_EXTENT")
    for number, variant in enumerate(kernel.variants):
        emit.label(f"variant{number}")
        last = number + 1 == len(kernel.variants)
        _check_assumptions(emit, kernel, variant, f"v{number}", None if last else f"variant{number + 1}")
        _run(emit, kernel, variant)
    emit.label("done")
    emit("xor.32", RAX, RAX)
    emit.label("leave")
    emit("add.64", RSP, Immediate(frame))
    for register in reversed(_SAVED):
        emit("pop", register)
    emit("ret")
    _fail(emit, _status_labels(emit), "leave")
    return _finish(f"{kernel.name}_on", emit, [CHECK_CPU, *(v.symbol for v in kernel.variants)])


def _check_near(emit: Listing, kernel: CKernel, name: str, counts: Sequence[int],
                here: Callable[..., Memory]) -> None:
    """BAD_EXTENT where elements that lanes reach by offsets of 32 bits lie too far apart (docs/ir.md). rsi has the
    sum."""
    types = dict(kernel.parameters)
    emit("xor.32", RSI, RSI)
    for dimension, most in zip(counts[::2], counts[1::2], strict=True):
        _load_extent(emit, types[name].dims[dimension], lambda d: here(f"dim.{d}"))
        emit("sub.64", RCX, Immediate(1))
        emit("mov.64", RAX, Immediate(most))
        emit("cmp.64", RCX, RAX)
        emit("cmovg.64", RCX, RAX)
        emit("mov.64", RAX, here(f"{name}.stride", 8 * dimension))
        emit("xor.32", RDX, RDX)
        emit("sub.64", RDX, RAX)
        emit("cmp.64", RAX, RDX)
        emit("cmovl.64", RAX, RDX)              # |x| is the larger of x and -x
        emit("imul.64", RAX, RCX)
        emit("add.64", RSI, RAX)
    emit("mov.64", RAX, Immediate((MOST_APART - 1) // types[name].dtype.size_bytes))
    emit("cmp.64", RSI, RAX)
    emit("jg", "BAD_EXTENT")


def _check_extents(emit: Listing, kernel: CKernel, refuse: str) -> None:
    for dim in kernel.dims:
        emit("cmp.64", at(RBX, kernel.field(f"dim.{dim}").offset), Immediate(MAX_EXTENT))
        emit("ja", refuse)  # unsigned: a negative one is refused too


def _check_assumptions(emit: Listing, kernel: CKernel, variant: Variant, label: str, otherwise: str | None) -> None:
    """Go to `otherwise`, or to the status that says what is amiss, unless the call is one for the variant."""
    def here(holds: str, more: int = 0) -> Memory:
        return at(RBX, kernel.field(holds).offset + more)

    extent = otherwise or "BAD_EXTENT"
    for dim, size in variant.static.items():
        emit("cmp.64", here(f"dim.{dim}"), Immediate(size))
        emit("jne", extent)
    for dim, divisor in variant.divisors.items():
        if divisor > 1:
            emit("test.32", here(f"dim.{dim}"), Immediate(divisor - 1))
            emit("jne", extent)
    types = dict(kernel.parameters)
    for name, pattern in variant.strides.items():
        dims = types[name].dims
        if pattern == "contiguous" and dims:
            if 0 in dims:
                continue
            for dim in dict.fromkeys(d for d in dims if not isinstance(d, int)):
                _load_extent(emit, dim, lambda d: here(f"dim.{d}"))
                emit("cmp.64", RCX, Immediate(0))
                emit("jle", f"{label}.{name}")  # strides of a tensor without elements do not matter
            emit("mov.32", RAX, Immediate(1))
            for position in range(len(dims) - 1, -1, -1):
                skip = f"{label}.{name}.{position}"
                _load_extent(emit, dims[position], lambda d: here(f"dim.{d}"))
                emit("cmp.64", RCX, Immediate(1))  # a stride along an extent of 1 does not matter
                emit("je", skip)
                emit("cmp.64", RAX, here(f"{name}.stride", 8 * position))
                emit("jne", otherwise or "BAD_STRIDE")
                emit("imul.64", RAX, RCX)
                emit.label(skip)
            emit.label(f"{label}.{name}")
        elif pattern != "contiguous":
            for position, one in enumerate(pattern):
                if one:
                    emit("cmp.64", here(f"{name}.stride", 8 * position), Immediate(1))
                    emit("jne", otherwise or "BAD_STRIDE")


def _scratch_size(emit: Listing, kernel: CKernel, variant: Variant, refuse: str) -> None:
    """Scratch bytes of a worker, a multiple of 64, into rbp; to `refuse` where they do not fit 63 bits."""
    def extent(name: str) -> Memory:
        return at(RBX, kernel.field(f"dim.{name}").offset)

    emit("xor.32", RBP, RBP)
    for size_bytes, axes in variant.scratch:
        emit("mov.64", RCX, Immediate(size_bytes))
        for constant, factors, multiple in axes:
            emit("mov.64", RAX, Immediate(constant))
            for dim in factors:
                if isinstance(dim, tuple):
                    emit("push", RCX)
                    emit("push", RAX)
                    _compute(emit, dim, extent)
                    emit("pop", RCX)
                    emit("imul.64", RAX, RCX)
                    emit("pop", RCX)
                else:
                    emit("imul.64", RAX, extent(str(dim)))
                emit("jo", refuse)
            if multiple > 1:
                emit("add.64", RAX, Immediate(multiple - 1))
                emit("xor.32", RDX, RDX)
                emit("mov.32", R10, Immediate(multiple))
                emit("div.64", R10)
                emit("imul.64", RAX, R10)
            emit("imul.64", RCX, RAX)
            emit("jo", refuse)
        emit("add.64", RCX, Immediate(63))
        emit("jo", refuse)
        emit("and.64", RCX, Immediate(-64))
        emit("add.64", RBP, RCX)
        emit("jo", refuse)


def _run(emit: Listing, kernel: CKernel, variant: Variant) -> None:
    """Check the memory that the variant asks for, fill its argument block and call it."""
    def here(holds: str, more: int = 0) -> Memory:
        return at(RBX, kernel.field(holds).offset + more)

    if not variant.counters:  # it has no tasks to share out: one worker does all
        emit("test.64", R12, R12)
        emit("jne", "done")
        emit("mov.32", R13, Immediate(1))
    _scratch_size(emit, kernel, variant, "BAD_SCRATCH")
    emit("mov.64", RCX, here("scratch"))
    if variant.scratch:
        enough = f"{variant.symbol}.scratch"
        emit("test.64", RBP, RBP)
        emit("je", enough)
        emit("test.64", RCX, RCX)
        emit("je", "BAD_SCRATCH")
        emit("test.32", RCX, Immediate(63))
        emit("jne", "BAD_SCRATCH")
        emit("mov.64", RAX, RBP)
        emit("imul.64", RAX, R13)
        emit("jo", "BAD_SCRATCH")
        emit("cmp.64", here("scratch_bytes"), RAX)
        emit("jl", "BAD_SCRATCH")
        emit.label(enough)
    emit("mov.64", at(RSP, 0), RCX)
    emit("mov.64", at(RSP, 8), RBP)
    emit("mov.64", RCX, here("sync"))
    if variant.counters:
        emit("test.64", RCX, RCX)
        emit("je", "BAD_SYNC")
        emit("test.32", RCX, Immediate(63))
        emit("jne", "BAD_SYNC")
    emit("mov.64", at(RSP, 16), RCX)
    for word, slot in enumerate(variant.slots, 3):
        head, _, tail = slot.rpartition(".")
        if slot.startswith("scalar."):
            _load_scalar(emit, kernel.field(slot))
        elif head.endswith(".stride"):
            emit("mov.64", RAX, here(head, 8 * int(tail)))
        else:
            emit("mov.64", RAX, here(slot))
        emit("mov.64", at(RSP, 8 * word), RAX)
    emit("mov.64", RDI, RSP)
    emit("mov.64", RSI, R12)
    emit("mov.64", RDX, R13)
    _call(emit, variant.symbol)
    emit("jmp", "done")


def _load_scalar(emit: Listing, place: Field) -> None:
    """A scalar as the word that the kernel reads (runtime/arguments.py), into rax."""
    memory, dtype = at(RBX, place.offset), place.dtype
    assert dtype is not None
    if dtype.name == "f16":
        emit("movzx.16.32", RAX, memory)
        emit("vmovd.to_vec", Register("vec", 0), RAX)
        emit("vcvtph2ps.128", Register("vec", 0), Register("vec", 0))
        emit("vmovd.from_vec", RAX, Register("vec", 0))
    elif dtype.name == "bf16":
        emit("movzx.16.32", RAX, memory)
        emit("shl.imm.32", RAX, Immediate(16))
    elif dtype.bits == 64:
        emit("mov.64", RAX, memory)
    elif dtype.bits == 32:
        emit("mov.32" if dtype.is_float else "movsxd", RAX, memory)
    else:
        extend = "movsx" if dtype.kind == "i" else "movzx"
        emit(f"{extend}.{dtype.bits}.64", RAX, memory)


def _scratch_bytes(kernel: CKernel) -> MachineFunction:
    """NAME_scratch_bytes: the most that any variant may ask for, as the call's strides are not looked at."""
    emit = Listing()
    emit("push", RBX)
    emit("push", RBP)
    emit("push", R12)
    emit("mov.64", RBX, RDI)
    emit("xor.32", R12, R12)
    _check_extents(emit, kernel, "refuse")
    for variant in kernel.variants:
        _scratch_size(emit, kernel, variant, "refuse")
        emit("cmp.64", R12, RBP)
        emit("cmovl.64", R12, RBP)
    emit("mov.64", RAX, R12)
    emit.label("leave")
    emit("pop", R12)
    emit("pop", RBP)
    emit("pop", RBX)
    emit("ret")
    emit.label("refuse")
    emit("mov.64", RAX, Immediate(-1))
    emit("jmp", "leave")
    return _finish(f"{kernel.name}_scratch_bytes", emit, ())


def needed_features(features: frozenset[str], functions: Iterable[MachineFunction]) -> frozenset[str]:
    """The features of a target that a library of these functions asks for: all, but tile registers only where an
    instruction uses them, as a process has to ask the system for those."""
    used = frozenset().union(*(item.row.features for function in functions for item in function.body
                               if isinstance(item, Instruction)))
    return frozenset(f for f in features if f in used or not (f in FEATURE_BITS and FEATURE_BITS[f][4] & TILE_STATE))


def check_cpu(features: frozenset[str]) -> MachineFunction:
    """Whether processor and operating system have the features: 1 or 0 in eax; asked once, as CPUID is slow.

    For tile registers the process asks the system, which grants them to all its threads, old and new (detect.py). The
    area holds 0 before, then 1 where they are there and 2 where not. Several threads may ask at once: all find the
    same. Destroys rcx and rdx too.
    """
    wanted: dict[tuple[int, int], list[int]] = {}
    enabled = 0
    for name in sorted(features):
        if name not in FEATURE_BITS:
            raise BuildError(f"found the feature {name}; expected one that CPUID tells: {', '.join(FEATURE_BITS)}")
        leaf, subleaf, register, bit, state = FEATURE_BITS[name]
        wanted.setdefault((leaf, subleaf), [0, 0, 0, 0])[register] |= 1 << bit
        enabled |= state
    if enabled:
        wanted.setdefault((1, 0), [0, 0, 0, 0])[2] |= 1 << 27  # OSXSAVE: XGETBV may be asked
    emit = Listing()
    emit("mov.32", RAX, Memory(label=CPU_AREA))
    emit("test.32", RAX, RAX)
    emit("jne", "known")
    emit("push", RBX)
    for leaf, subleaf in sorted(wanted):
        emit("mov.32", RAX, Immediate(leaf & 0x80000000))
        emit("xor.32", RCX, RCX)
        emit("cpuid")
        emit("cmp.32", RAX, Immediate(_signed(leaf)))
        emit("jb", "lacking")
        if subleaf:
            emit("mov.32", RAX, Immediate(leaf))
            emit("xor.32", RCX, RCX)
            emit("cpuid")
            emit("cmp.32", RAX, Immediate(subleaf))
            emit("jb", "lacking")
        emit("mov.32", RAX, Immediate(leaf))
        emit("mov.32", RCX, Immediate(subleaf))
        emit("cpuid")
        for register, bits in zip((RAX, RBX, RCX, RDX), wanted[leaf, subleaf], strict=True):
            if bits:
                emit("and.32", register, Immediate(_signed(bits)))
                emit("cmp.32", register, Immediate(_signed(bits)))
                emit("jne", "lacking")
    if enabled:
        emit("xor.32", RCX, RCX)
        emit("xgetbv")
        emit("and.32", RAX, Immediate(enabled))
        emit("cmp.32", RAX, Immediate(enabled))
        emit("jne", "lacking")
    if enabled & TILE_STATE:
        kept = (RDI, RSI, R11)
        for register in kept:
            emit("push", register)
        emit("mov.32", RAX, Immediate(SYS_ARCH_PRCTL))
        emit("mov.32", RDI, Immediate(ARCH_REQ_XCOMP_PERM))
        emit("mov.32", RSI, Immediate(TILE_DATA))
        emit("syscall")
        for register in reversed(kept):
            emit("pop", register)
        emit("test.64", RAX, RAX)
        emit("jne", "lacking")
    emit("mov.32", RAX, Immediate(1))
    emit.label("found")
    emit("mov.32", Memory(label=CPU_AREA), RAX)
    emit("pop", RBX)
    emit.label("known")
    emit("and.32", RAX, Immediate(1))
    emit("ret")
    emit.label("lacking")
    emit("mov.32", RAX, Immediate(2))
    emit("jmp", "found")
    return _finish(CHECK_CPU, emit, [CPU_AREA])


def _signed(bits: int) -> int:
    """32 bits as the signed immediate that has them."""
    return bits - (1 << 32) if bits >> 31 else bits
