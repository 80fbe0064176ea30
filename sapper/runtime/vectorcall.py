"""Calls by machine code: no Python runs between a caller's line and a kernel that one worker runs.

Enters: entries, and the arguments they were made from. Leaves: `Vectorcall.function`, which runs a call like one seen
before and hands all others to the Python function of fast_call.py, and what a bound call needs. Holds: it checks what
that function checks. Where this Python or this NumPy lays its objects out otherwise than vectorcall_code.py reads them,
all calls are Python's.
"""

from __future__ import annotations

import ctypes
import functools
import struct
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy

from ..ir.types import f32, f64
from ..lang import context
from . import arguments as _arguments
from . import settings
from .arguments import FIRST_SLOT, WRITEABLE_FLAG, Free, Parameter, Signature, capsule_pointer, integer_range
from .cache import kept_code
from .loader import load
from .scratch import SYNC_BYTES, stride_bytes
from .system import PAGE_BYTES, round_up

if TYPE_CHECKING:
    from .entries import Entry

PYTHON = {name: 16 + 8 * n for n, name in enumerate((
    "PyObject_Vectorcall", "PyEval_SaveThread", "PyEval_RestoreThread", "PyLong_AsLongLongAndOverflow",
    "PyContextVar_Get", "PyObject_GetAttr", "PyErr_Clear", "Py_IncRef", "Py_DecRef", "_Py_NoneStruct",
    "_Py_TrueStruct", "_Py_FalseStruct"))}
"""Offset in a table, and in the constants, of the address of each name of CPython."""
FALLBACK, PARAMETERS, ARRAY, TORCH, EXPORT, REQUIRES_GRAD, FORMS = 0, 8, *range(112, 152, 8)
"""In a table. ARRAY: NumPy's type. REQUIRES_GRAD: the name of that attribute."""
LAUNCHER_SLOT, CONTEXT, CALLED, FORM_SLOT, IDLE_SLOT = 0, 8, *range(112, 136, 8)
"""In the constants: offsets of slots in a kernel and in a bound call, the context variable, the name of the method that
takes the calls that machine code does not."""
CONSTANTS = 0x5AFE_C0DE_5AFE_C0DE
"""Stands in the code for the address of the constants."""
KERNEL, WORDS, TEMPLATE, FRAME, ALIGN, BLOCK, SYNC, HOLDS_GIL, PAIRS, PAIRS_END, FORM_BYTES = range(0, 88, 8)
TYPE, RANK, LOW, PLACE, HIGH, DEVICE, DESCR, MASK, FLAGS, TENSOR_BYTES = range(0, 80, 8)
SCALAR_BYTES, PAIR_BYTES, VIEW_BYTES = DEVICE, 40, 64
KINDS = {"f32": -1, "f64": -2, "bool": -3, "integer": -4}

MAX_FORMS = 16
"""Forms that a table holds, which are tried one after the other. A later one takes the place of the oldest."""
MAX_WORDS, MAX_SCRATCH_BYTES = 512, 16 << 10
"""Of a form, as its argument block and its scratch lie on the stack."""
_DLTENSOR_FROM_OBJECT = 40
"""Offset of the function in a DLPackExchangeAPI (dlpack.h, from 1.3 on)."""
_METH_FASTCALL_KEYWORDS = 0x80 | 0x02  # CPython's Include/methodobject.h
_CALLED, _REQUIRES_GRAD = "call_in_python", "requires_grad"


class _Table(numpy.ndarray[Any, Any]):
    """A table of vectorcall_code.py. forms, fallback: what it names, to be kept alive."""

    forms: list[Any]
    fallback: Any


class _Method(ctypes.Structure):
    """PyMethodDef."""

    _fields_ = (("name", ctypes.c_char_p), ("code", ctypes.c_void_p), ("flags", ctypes.c_int), ("doc", ctypes.c_char_p))


def _lies_as_read() -> bool:
    """Whether objects lie as the machine code reads them, by looking at some."""
    words = _arguments.MEMORY_WORDS
    if words is None or "t" in sys.abiflags:  # without the GIL objects begin otherwise
        return False

    def word(value: Any, offset: int) -> int:
        return int(words[(id(value) + offset) >> 3])

    array = numpy.zeros((3, 5), numpy.float32)[1:, ::2]
    extents, strides = word(array, 32), word(array, 40)
    number = 1.5
    return (
        all(word(value, 8) == id(type(value)) for value in (array, number, 7, True, numpy.zeros(1).view(_Table)))
        and word(number, 16) == struct.unpack("q", struct.pack("d", number))[0]
        and word(array, 24) & 0xFFFFFFFF == array.ndim
        and [words[(extents >> 3) + n] for n in range(2)] == list(array.shape)
        and [words[(strides >> 3) + n] for n in range(2)] == list(array.strides)
        and word(array, 56) == id(array.dtype)
        and word(array.view(_Table), 16) == array.ctypes.data
    )


class _Functions:
    """The three C functions of vectorcall_code.py, once for a process: CPython reads a method's definition also when
    what was made of it is dropped, so these stay."""

    def __init__(self) -> None:
        code, offsets = kept_code("vectorcall", _made)
        self.constants = numpy.zeros(IDLE_SLOT // 8 + 1, numpy.int64)
        _write_addresses(self.constants)
        self.constants[CONTEXT // 8], self.constants[CALLED // 8] = id(context.CURRENT), id(_CALLED)
        address = self.constants.ctypes.data
        self.code = load(code.replace(CONSTANTS.to_bytes(8, "little"), address.to_bytes(8, "little")))
        self.methods = {
            name: _Method(b"__call__", self.code.address + offset, _METH_FASTCALL_KEYWORDS, b"Run the kernel.")
            for name, offset in offsets.items()}

    def quicken(self, value: Any, method: str, slots: Mapping[str, int]) -> None:
        """Make a method the `__call__` of a value's type. slots: those that it reads, and where their offsets go."""
        kind, words = type(value), _arguments.MEMORY_WORDS
        if type(kind.__call__).__name__ == "method_descriptor":
            return
        assert words is not None
        for slot, offset in slots.items():
            inside = range(2, kind.__basicsize__ // 8)
            places = [n for n in inside if words[(id(value) >> 3) + n] == id(getattr(value, slot, None))]
            if len(places) != 1:
                return
            self.constants[offset // 8] = 8 * places[0]
        new = ctypes.pythonapi.PyDescr_NewMethod
        new.restype, new.argtypes = ctypes.py_object, (ctypes.py_object, ctypes.c_void_p)
        kind.__call__ = new(kind, ctypes.addressof(self.methods[method]))


def _made() -> tuple[bytes, dict[str, int]]:
    from .vectorcall_code import vectorcall_code

    return vectorcall_code()


@functools.cache
def functions() -> _Functions | None:
    """None where they can't be used, and for debuggers, which could not look through their frames."""
    return None if settings.debugging() or not _lies_as_read() else _Functions()


def _write_addresses(words: numpy.ndarray[Any, Any]) -> None:
    for name, offset in PYTHON.items():
        words[offset // 8] = ctypes.cast(getattr(ctypes.pythonapi, name), ctypes.c_void_p).value


class Vectorcall:
    """The C function of one launcher, and the forms that it knows."""

    def __init__(self, signature: Signature, method: _Method) -> None:
        self.signature = signature
        table = numpy.zeros(FORMS // 8 + MAX_FORMS + 1, numpy.int64).view(_Table)
        _write_addresses(table)
        table[PARAMETERS // 8], table[ARRAY // 8] = len(signature.parameters), id(numpy.ndarray)
        table[REQUIRES_GRAD // 8] = id(_REQUIRES_GRAD)
        table.fallback, table.forms = None, []
        self._table, self._added = table, 0
        new = ctypes.pythonapi.PyCFunction_NewEx
        new.restype, new.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.py_object, ctypes.c_void_p)
        self.function: Callable[..., None] = new(ctypes.addressof(method), table, None)

    def fall_back(self, fallback: Callable[..., None]) -> Callable[..., None]:
        """The function, whose calls of no form are taken by this one from now on."""
        before = self._table.fallback
        self._table[FALLBACK // 8] = id(fallback)
        self._table.fallback = fallback
        del before  # not earlier: the table named it
        return self.function

    def add(self, arguments: tuple[Any, ...], entry: Entry, places: list[int],
            spans: Mapping[int, tuple[int, int, int]], free: Free) -> None:
        """One form, of the call with these arguments.

        places: for each parameter the word of the block that a call writes. spans: for the position of each tensor its
        first and last byte from its address, and the mask of the bits of the address that must be 0. free: from and to
        where integer scalars may be (`Signature.freedom`).
        """
        if any(free["scalar", p.name] != (0, 1) for p in self.signature.parameters
               if p.dims is None and p.dtype.kind == "b"):      # the machine code takes either
            return
        words, scratch_bytes = entry.words, entry.scratch_bytes
        views: dict[int, _View] = {}
        for position in spans:
            view = _view_of(arguments[position], self._table)
            if view is None:
                return
            views[position] = view
        stored_positions = [self.signature.positions[name] for name in entry.compiled.stored]
        template = numpy.zeros(round_up(FIRST_SLOT + len(words) + 1, 4), numpy.int64)
        template[FIRST_SLOT:FIRST_SLOT + len(words)] = words
        template[1] = stride_bytes(scratch_bytes)
        frame = _frame(scratch_bytes, template.nbytes)
        form = [entry.code.address, len(template), template.ctypes.data, *frame, int(entry.is_short), 0, 0]
        records: dict[int, int] = {}
        kept: list[Any] = [entry, template]
        for position, (parameter, argument) in enumerate(zip(self.signature.parameters, arguments, strict=True)):
            records[position] = 8 * len(form)
            if position not in spans:
                kind, type_, low, high = _scalar(parameter)  # type: ignore[misc]
                low, high = free.get(("scalar", parameter.name), (low, high))
                form += [id(type_), KINDS[kind], low, 8 * places[position], high]
                continue
            low, high, mask = spans[position]
            flags = WRITEABLE_FLAG if position in stored_positions else 0
            rank, device, descr, dimensions = views[position]
            form += [id(type(argument)), rank, low, 8 * places[position], high, device, descr, mask, flags, *dimensions]
            kept.append(argument.dtype)
        pairs_at = len(form)
        made = numpy.zeros(pairs_at + PAIR_BYTES // 8 * len(spans) * len(stored_positions), numpy.int64)
        address = made.ctypes.data
        for i in stored_positions:
            for j in spans:
                if j != i and not (j in stored_positions and j < i):
                    names = frozenset((self.signature.parameters[i].name, self.signature.parameters[j].name))
                    same = names in self.signature.in_place and (
                        (views[i], spans[i][:2]) == (views[j], spans[j][:2]))
                    form += [-VIEW_BYTES * (i + 1), -VIEW_BYTES * (j + 1), address + records[i], address + records[j],
                             int(same)]
        form[PAIRS // 8], form[PAIRS_END // 8] = address + 8 * pairs_at, address + 8 * len(form)
        made[:len(form)] = form
        at, forms = self._added % MAX_FORMS, self._table.forms
        self._table[FORMS // 8 + at] = address
        forms[at:at + 1] = [(made, kept)]
        self._added += 1


def make_vectorcall(kernel: Any, signature: Signature) -> Vectorcall | None:
    """None where calls can't be C functions here, or those of this signature can't."""
    made = functions()
    if made is None or any(p.dims is None and _scalar(p) is None for p in signature.parameters):
        return None
    if hasattr(kernel, _CALLED):
        made.quicken(kernel, "kernel", {"launcher": LAUNCHER_SLOT})
    return Vectorcall(signature, made.methods["launcher"])


def bound_form(entry: Entry, block: int) -> numpy.ndarray[Any, Any] | None:
    """Of a bound call with the argument block at an address: where its kernel is, and the frame; None where the machine
    code can't run it."""
    if functions() is None or entry.threads > 1 or entry.scratch_bytes > MAX_SCRATCH_BYTES:
        return None
    frame = _frame(entry.scratch_bytes, 0)
    return numpy.array([entry.code.address, 0, block, *frame, int(entry.is_short)], numpy.int64)


def quicken_bound(bound: Any) -> None:
    """Let a bound call with such a form in its slot `_form`, and others, be run by machine code."""
    made = functions()
    assert made is not None
    made.quicken(bound, "bound", {"_form": FORM_SLOT, "_idle": IDLE_SLOT})


def _frame(scratch_bytes: int, block_bytes: int) -> list[int]:
    """FRAME, ALIGN, BLOCK, SYNC: scratch at the stack pointer, and after it the argument block and the sync block."""
    block = round_up(scratch_bytes, 64)
    sync = block + round_up(block_bytes, 64)
    return [sync + SYNC_BYTES, -PAGE_BYTES if scratch_bytes else -64, block, sync]


_View = tuple[int, int, int, tuple[int, ...]]
"""What the machine code sees of a tensor: RANK, DEVICE, DESCR, extents and strides in turns."""


def _view_of(tensor: Any, table: _Table) -> _View | None:
    """None for a tensor of a PyTorch that does not offer its view."""
    if type(tensor) is numpy.ndarray:
        return tensor.ndim, 0, id(tensor.dtype), _in_turns(tensor.shape, tensor.strides)
    api = getattr(type(tensor), "__dlpack_c_exchange_api__", None)
    if api is None:
        return None
    export = ctypes.c_size_t.from_address(capsule_pointer(api, b"dlpack_exchange_api") + _DLTENSOR_FROM_OBJECT).value
    table[TORCH // 8], table[EXPORT // 8] = id(type(tensor)), export
    made = (ctypes.c_int64 * (VIEW_BYTES // 8))()
    if ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.c_void_p)(export)(tensor, ctypes.addressof(made)):
        return None
    _, device, rank, extents, strides, byte_offset = made[:6]
    extents, strides = ((ctypes.c_int64 * tensor.ndim).from_address(at)[:] for at in (extents, strides))
    return rank, device, byte_offset, _in_turns(extents, strides)


def _in_turns(extents: Iterable[int], strides: Iterable[int]) -> tuple[int, ...]:
    return tuple(word for dimension in zip(extents, strides, strict=True) for word in dimension)


def _scalar(parameter: Parameter) -> tuple[str, type, int, int] | None:
    """The kind of a scalar, its type in Python, and the least and largest integer; None for one that the machine code
    does not know."""
    dtype = parameter.dtype
    if dtype in (f32, f64):
        return str(dtype), float, 0, 0
    if dtype.kind == "f":
        return None
    low, high = (0, 1) if dtype.kind == "b" else integer_range(dtype)
    return ("bool", bool, low, high) if dtype.kind == "b" else ("integer", int, low, high)
