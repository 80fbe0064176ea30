"""The machine code of calls that need no Python: three C functions of CPython, built with our own encoder.

    PyObject *kernel(PyObject *self, PyObject *const *args, Py_ssize_t count, PyObject *names)     Kernel.__call__
    PyObject *bound(PyObject *self, PyObject *const *args, Py_ssize_t count, PyObject *names)      BoundCall.__call__
    PyObject *launcher(PyObject *self, PyObject *const *args, Py_ssize_t count, PyObject *names)

`kernel` calls what is in the slot `launcher` of self, where no interpreter is current. `bound` runs the kernel where
the slot `_form` has what is needed and `_idle` is not empty. Both hand other calls to Python, the method CALLED.

What `kernel` calls is a `launcher` if the kernel was called before. Its `self` is a NumPy array whose data is a
*table*, which names *forms*, the calls that were seen, and who takes all other calls: to that one, the fallback, a call
goes on as it came. Words of 64 bits, offsets in bytes:

    table   FALLBACK  PARAMETERS (how many)  addresses of CPython (PYTHON)  TORCH, EXPORT (PyTorch's type of tensors and
            its DLPackDLTensorFromPyObjectNoSync, 0 where no form has such)  FORMS.. forms, after the last one 0
    form    KERNEL  WORDS (of the argument block, a multiple of 4)  TEMPLATE (the block, all but what a call writes)
            FRAME (bytes)  ALIGN (mask)  BLOCK, SYNC (offsets in the frame)  HOLDS_GIL  PAIRS, PAIRS_END (addresses)
            then a record for each parameter. (Of a bound call KERNEL to HOLDS_GIL; TEMPLATE is the block itself.)
    record  TYPE (what the object's type must be)  RANK  LOW  PLACE (offset in the argument block)  HIGH, and of
        a tensor    DEVICE, DESCR (what its view has there)  MASK (bits of its address that must be 0)  FLAGS (that
                    must be set), then extent and stride of each dimension. LOW to HIGH: its bytes, from its address
        a scalar    RANK is its kind, below 0. LOW to HIGH: the integers that it may be
    pair    two views, from the frame's end, their records, SAME: they share no byte, or if it is 1 all
    view    of an argument that is a tensor, below the frame's end: a DLTensor, and flags. Of an array the device is 0,
            the rank has no dtype beside it, and in the place of byte_offset is its dtype.

A form matches if types, ranks, dtypes, extents and strides are equal. Addresses, alignment, flags, overlap and values
are then checked, and where one fails the fallback tells why. All that holds the GIL; the kernel runs without it, unless
it is short. Block, sync block and scratch lie on the stack, so any number of threads may be in one form.

Source: CPython's C API, "Call Protocol" (PEP 590), "Thread State and the Global Interpreter Lock"; NumPy's
PyArrayObject_fields (numpy/ndarraytypes.h); DLPack 1.3 (dlpack.h); System V ABI AMD64 3.2.
"""

from __future__ import annotations

from ..codegen.encode import encode
from ..codegen.listing import Listing, at
from ..codegen.machine import Immediate, MachineFunction, Memory, Register
from ..targets.x86_64.registers import R8, R9, R10, R11, R12, R13, R14, R15, RAX, RBP, RBX, RCX, RDI, RDX, RSI, RSP
from .scratch import BARRIER_OFFSET, COUNTER_BYTES, COUNTER_LINE_BYTES
from .vectorcall import (
    ALIGN,
    ARRAY,
    BLOCK,
    CALLED,
    CONSTANTS,
    CONTEXT,
    DESCR,
    DEVICE,
    EXPORT,
    FALLBACK,
    FLAGS,
    FORM_BYTES,
    FORM_SLOT,
    FORMS,
    FRAME,
    HIGH,
    HOLDS_GIL,
    IDLE_SLOT,
    KERNEL,
    KINDS,
    LAUNCHER_SLOT,
    LOW,
    MASK,
    PAIR_BYTES,
    PAIRS,
    PAIRS_END,
    PARAMETERS,
    PLACE,
    PYTHON,
    RANK,
    REQUIRES_GRAD,
    SCALAR_BYTES,
    SYNC,
    TEMPLATE,
    TENSOR_BYTES,
    TORCH,
    TYPE,
    VIEW_BYTES,
    WORDS,
)

# Of an object, of a float, and of an array (numpy/ndarraytypes.h); vectorcall.py has looked that they are so.
_OBJECT_TYPE, _FLOAT_VALUE = 8, 16
_DATA, _RANK, _EXTENTS, _STRIDES, _DESCR, _FLAGS = 16, 24, 32, 40, 56, 64
# Of a view, in which the rank is 32 bits and the dtype the next ones.
_AT_DATA, _AT_DEVICE, _AT_RANK, _AT_EXTENTS, _AT_STRIDES, _AT_DESCR, _AT_FLAGS = 0, 8, 16, 24, 32, 40, 48
_SAVED = (RBX, RBP, R12, R13, R14, R15)
_VECTOR = Register("vec", 0)

_FIRST_REFUSED = 0x47EFFFFFF0000000
"""The bits of the double 2^128 - 2^103: from there on a float has no f32, but for infinity."""
_INFINITY = 0x7FF0000000000000


def kernel_function() -> MachineFunction:
    """rbx: constants, r12: args, r13: count, r14: self, then what is called, rsp: a word for the context."""
    emit = Listing()
    emit("test.64", RCX, RCX)
    emit("jne", "in_python")
    for register in (RBX, R12, R13, R14):
        emit("push", register)
    emit("sub.64", RSP, Immediate(8))
    emit("mov.64", RBX, Immediate(CONSTANTS))
    for register, argument in ((R14, RDI), (R12, RSI), (R13, RDX)):
        emit("mov.64", register, argument)
    emit("mov.64", RDI, at(RBX, CONTEXT))
    emit("xor.32", RSI, RSI)
    emit("mov.64", RDX, RSP)
    emit("call.indirect", at(RBX, PYTHON["PyContextVar_Get"]))
    emit("test.32", RAX, RAX)
    emit("mov.32", RAX, Immediate(0))
    emit("jne", "return")
    emit("mov.64", RDI, at(RSP))
    emit("call.indirect", at(RBX, PYTHON["Py_DecRef"]))
    emit("mov.64", RAX, at(RSP))  # compared, no more: it may be gone
    emit("cmp.64", RAX, at(RBX, PYTHON["_Py_NoneStruct"]))
    emit("jne", "under_an_interpreter")
    emit("add.64", R14, at(RBX, LAUNCHER_SLOT))
    emit("mov.64", R14, at(R14))
    emit("mov.64", RDI, R14)
    emit("call.indirect", at(RBX, PYTHON["Py_IncRef"]))  # a launcher may be replaced while it runs
    for argument, register in ((RDI, R14), (RSI, R12), (RDX, R13)):
        emit("mov.64", argument, register)
    emit("xor.32", RCX, RCX)
    emit("call.indirect", at(RBX, PYTHON["PyObject_Vectorcall"]))
    emit("mov.64", R12, RAX)
    emit("mov.64", RDI, R14)
    emit("call.indirect", at(RBX, PYTHON["Py_DecRef"]))
    emit("mov.64", RAX, R12)
    emit.label("return")
    emit("add.64", RSP, Immediate(8))
    for register in (R14, R13, R12, RBX):
        emit("pop", register)
    emit("ret")
    emit.label("under_an_interpreter")
    for argument, register in ((RDI, R14), (RSI, R12), (RDX, R13)):
        emit("mov.64", argument, register)
    emit("xor.32", RCX, RCX)
    emit("add.64", RSP, Immediate(8))
    for register in (R14, R13, R12, RBX):
        emit("pop", register)
    _call_in_python(emit)
    return MachineFunction("sapper_call_kernel", emit.body, {})


def bound_function() -> MachineFunction:
    """rbx: constants, r12: self, r15: what of a form a bound call has, rbp: the frame's end, below which are the object
    that was in the slot `_idle`, which is empty meanwhile, and the slot's address."""
    emit = Listing()
    emit("mov.64", RAX, RDX)
    emit("or.64", RAX, RCX)
    emit("jne", "in_python")
    emit("mov.64", R11, Immediate(CONSTANTS))
    emit("mov.64", R8, at(R11, FORM_SLOT))
    emit("mov.64", R8, at(RDI, 0, R8))
    emit("cmp.64", R8, at(R11, PYTHON["_Py_NoneStruct"]))
    emit("je", "in_python")
    emit("mov.64", R10, at(R11, IDLE_SLOT))
    emit("add.64", R10, RDI)
    emit("mov.64", R9, at(R10))
    emit("test.64", R9, R9)
    emit("je", "in_python")
    emit("mov.64", at(R10), Immediate(0))  # who holds the GIL is alone here
    for register in _SAVED:
        emit("push", register)
    emit("mov.64", RBP, RSP)
    emit("push", R9)
    emit("push", R10)
    emit("mov.64", RBX, R11)
    emit("mov.64", R15, at(R8, _DATA))
    emit("sub.64", RSP, at(R15, FRAME))
    emit("and.64", RSP, at(R15, ALIGN))
    emit("mov.64", R11, at(R15, TEMPLATE))
    _run(emit)
    emit("mov.64", RCX, at(RBP, -8))
    emit("mov.64", RDX, at(RBP, -16))
    emit("mov.64", at(RDX), RCX)
    _leave(emit)
    emit("ret")
    _call_in_python(emit)
    return MachineFunction("sapper_call_bound", emit.body, {})


def _call_in_python(emit: Listing) -> None:
    """The method CALLED of self takes the call, whose arguments are in their registers."""
    emit.label("in_python")
    saved = (RBX, R12, R13, R14, R15)
    for register in saved:
        emit("push", register)
    emit("mov.64", RBX, Immediate(CONSTANTS))
    for register, argument in ((R12, RSI), (R13, RDX), (R14, RCX)):
        emit("mov.64", register, argument)
    emit("mov.64", RSI, at(RBX, CALLED))
    emit("call.indirect", at(RBX, PYTHON["PyObject_GetAttr"]))
    emit("test.64", RAX, RAX)
    emit("je", "returned")
    emit("mov.64", R15, RAX)
    for argument, register in ((RDI, R15), (RSI, R12), (RDX, R13), (RCX, R14)):
        emit("mov.64", argument, register)
    emit("call.indirect", at(RBX, PYTHON["PyObject_Vectorcall"]))
    emit("mov.64", R12, RAX)
    emit("mov.64", RDI, R15)
    emit("call.indirect", at(RBX, PYTHON["Py_DecRef"]))
    emit("mov.64", RAX, R12)
    emit.label("returned")
    for register in reversed(saved):
        emit("pop", register)
    emit("ret")


def launcher_function() -> MachineFunction:
    """rbx: table, r12: args, r15: form, rbp: the frame's end. Later r13: cursor in args, r14: in records."""
    emit = Listing()
    emit("test.64", RCX, RCX)
    emit("jne", "go_on")
    emit("mov.64", R11, at(RDI, _DATA))
    emit("cmp.64", RDX, at(R11, PARAMETERS))
    emit("jne", "go_on")
    for register in _SAVED:
        emit("push", register)
    emit("mov.64", RBP, RSP)
    emit("mov.64", RBX, R11)
    emit("mov.64", R12, RSI)
    _view(emit)
    _match(emit)
    _fill(emit)
    _check_pairs(emit)
    _run(emit)
    _leave(emit)
    emit("ret")
    emit.label("refuse")
    emit("mov.64", RDI, at(RBX, FALLBACK))
    emit("mov.64", RSI, R12)
    emit("mov.64", RDX, at(RBX, PARAMETERS))
    emit("mov.64", RAX, at(RBX, PYTHON["PyObject_Vectorcall"]))
    _leave(emit)
    emit("xor.32", RCX, RCX)
    emit("jmp.indirect", RAX)
    emit.label("go_on")
    emit("mov.64", R11, at(RDI, _DATA))
    emit("mov.64", RDI, at(R11, FALLBACK))
    emit("jmp.indirect", at(R11, PYTHON["PyObject_Vectorcall"]))
    return MachineFunction("sapper_call_launcher", emit.body, {})


def vectorcall_code() -> tuple[bytes, dict[str, int]]:
    """The code of all three, one after the other, and where each begins."""
    code = bytearray()
    offsets: dict[str, int] = {}
    functions = {"kernel": kernel_function(), "bound": bound_function(), "launcher": launcher_function()}
    for name, function in functions.items():
        code += b"\xcc" * (-len(code) % 64)
        offsets[name] = len(code)
        code += encode(function).code
    return bytes(code), offsets


def _leave(emit: Listing) -> None:
    emit("mov.64", RSP, RBP)
    for register in reversed(_SAVED):
        emit("pop", register)


def _view(emit: Listing) -> None:
    """A view of each argument that is a tensor."""
    emit("mov.64", RCX, at(RBX, PARAMETERS))
    emit("shl.imm.64", RCX, Immediate(VIEW_BYTES.bit_length() - 1))
    emit("sub.64", RSP, RCX)
    emit("and.64", RSP, Immediate(-64))
    emit("mov.64", R13, R12)
    emit("lea.64", R14, at(RBP, -VIEW_BYTES))
    emit.label("view")
    _end_of_arguments(emit, RCX)
    emit("cmp.64", R13, RCX)
    emit("je", "viewed")
    emit("mov.64", RAX, at(R13))
    emit("mov.64", RDX, at(RAX, _OBJECT_TYPE))
    emit("cmp.64", RDX, at(RBX, ARRAY))
    emit("jne", "no_array")
    emit("mov.32", RCX, at(RAX, _RANK))
    emit("mov.64", at(R14, _AT_RANK), RCX)
    emit("mov.32", RCX, at(RAX, _FLAGS))
    emit("mov.64", at(R14, _AT_FLAGS), RCX)
    emit("mov.64", at(R14, _AT_DEVICE), Immediate(0))
    for place, field in ((_AT_DATA, _DATA), (_AT_EXTENTS, _EXTENTS), (_AT_STRIDES, _STRIDES), (_AT_DESCR, _DESCR)):
        emit("mov.64", RCX, at(RAX, field))
        emit("mov.64", at(R14, place), RCX)
    emit.label("view_next")
    emit("add.64", R13, Immediate(8))
    emit("sub.64", R14, Immediate(VIEW_BYTES))
    emit("jmp", "view")
    emit.label("no_array")
    emit("cmp.64", RDX, at(RBX, TORCH))
    emit("jne", "view_next")
    emit("mov.64", RDI, RAX)
    emit("mov.64", RSI, R14)
    emit("call.indirect", at(RBX, EXPORT))
    emit("test.32", RAX, RAX)
    emit("jne", "not_told")
    emit("mov.64", at(R14, _AT_FLAGS), Immediate(-1))
    emit("mov.64", RDI, at(R13))  # one that gradients are wanted of is refused
    emit("mov.64", RSI, at(RBX, REQUIRES_GRAD))
    emit("call.indirect", at(RBX, PYTHON["PyObject_GetAttr"]))
    emit("test.64", RAX, RAX)
    emit("je", "not_told")
    emit("mov.64", R15, RAX)
    emit("mov.64", RDI, RAX)
    emit("call.indirect", at(RBX, PYTHON["Py_DecRef"]))
    emit("cmp.64", R15, at(RBX, PYTHON["_Py_FalseStruct"]))
    emit("je", "view_next")
    emit("jmp", "refuse")
    emit.label("not_told")
    emit("call.indirect", at(RBX, PYTHON["PyErr_Clear"]))
    emit("jmp", "refuse")
    emit.label("viewed")


def _end_of_arguments(emit: Listing, register: int) -> None:
    emit("mov.64", register, at(RBX, PARAMETERS))
    emit("lea.64", register, Memory(Register("gpr", R12), Register("gpr", register), 8, 0))


def _match(emit: Listing) -> None:
    """r15: the first form whose types, ranks, dtypes, extents and strides are those of the arguments."""
    emit("lea.64", R14, at(RBX, FORMS))
    _end_of_arguments(emit, R13)
    emit.label("next_form")
    emit("mov.64", R15, at(R14))
    emit("add.64", R14, Immediate(8))
    emit("test.64", R15, R15)
    emit("je", "refuse")
    emit("lea.64", R8, at(R15, FORM_BYTES))
    emit("mov.64", RDX, R12)
    emit("mov.64", R11, RBP)
    emit.label("compare")
    emit("cmp.64", RDX, R13)
    emit("je", "matched")
    emit("mov.64", RAX, at(RDX))
    emit("add.64", RDX, Immediate(8))
    emit("sub.64", R11, Immediate(VIEW_BYTES))
    emit("mov.64", RCX, at(RAX, _OBJECT_TYPE))
    emit("cmp.64", RCX, at(R8, TYPE))
    emit("jne", "next_form")
    emit("mov.64", RCX, at(R8, RANK))
    emit("test.64", RCX, RCX)
    emit("js", "compared_scalar")
    for place, field in ((_AT_RANK, RANK), (_AT_DEVICE, DEVICE), (_AT_DESCR, DESCR)):
        emit("mov.64", RSI, at(R11, place))
        emit("cmp.64", RSI, at(R8, field))
        emit("jne", "next_form")
    emit("mov.64", RSI, at(R11, _AT_EXTENTS))
    emit("mov.64", RDI, at(R11, _AT_STRIDES))
    emit("lea.64", R8, at(R8, TENSOR_BYTES))
    emit.label("compare_dimension")
    emit("sub.32", RCX, Immediate(1))
    emit("js", "compare")
    emit("mov.64", R9, at(RSI))
    emit("mov.64", R10, at(RDI))
    emit("add.64", RSI, Immediate(8))
    emit("add.64", RDI, Immediate(8))
    emit("cmp.64", R9, at(R8))
    emit("jne", "next_form")
    emit("cmp.64", R10, at(R8, 8))
    emit("jne", "next_form")
    emit("add.64", R8, Immediate(16))
    emit("jmp", "compare_dimension")
    emit.label("compared_scalar")
    emit("add.64", R8, Immediate(SCALAR_BYTES))
    emit("jmp", "compare")
    emit.label("matched")


def _fill(emit: Listing) -> None:
    """Make the frame and the block in it, and check what a call may have otherwise than the one before."""
    emit("sub.64", RSP, at(R15, FRAME))
    emit("and.64", RSP, at(R15, ALIGN))
    emit("mov.64", RCX, at(R15, WORDS))
    emit("mov.64", RSI, at(R15, TEMPLATE))
    emit("mov.64", RDI, RSP)
    emit("add.64", RDI, at(R15, BLOCK))
    emit("mov.64", R11, RDI)
    emit.label("copy")
    emit("vmovups.256", _VECTOR, at(RSI))
    emit("vmovups.256", at(RDI), _VECTOR)
    emit("add.64", RSI, Immediate(32))
    emit("add.64", RDI, Immediate(32))
    emit("sub.64", RCX, Immediate(4))
    emit("jg", "copy")
    emit("vzeroupper")
    emit("lea.64", R14, at(R15, FORM_BYTES))
    emit("mov.64", R13, R12)
    emit("xor.32", R10, R10)  # address bits that must be 0
    emit("mov.64", R9, RBP)
    emit.label("fill")
    _end_of_arguments(emit, RCX)
    emit("cmp.64", R13, RCX)
    emit("je", "filled")
    emit("mov.64", RAX, at(R13))
    emit("add.64", R13, Immediate(8))
    emit("sub.64", R9, Immediate(VIEW_BYTES))
    emit("mov.64", RDX, at(R14, PLACE))
    emit("mov.64", RCX, at(R14, RANK))
    emit("test.64", RCX, RCX)
    emit("js", "fill_scalar")
    emit("mov.64", RSI, at(R9, _AT_DATA))
    emit("mov.64", at(R11, 0, RDX), RSI)
    emit("and.64", RSI, at(R14, MASK))
    emit("or.64", R10, RSI)
    emit("mov.64", RSI, at(R9, _AT_FLAGS))
    emit("mov.64", RDI, at(R14, FLAGS))
    emit("and.64", RSI, RDI)
    emit("cmp.64", RSI, RDI)
    emit("jne", "refuse")
    emit("mov.32", RCX, RCX)  # without the dtype
    emit("shl.imm.64", RCX, Immediate(4))
    emit("lea.64", R14, at(R14, TENSOR_BYTES, RCX))
    emit("jmp", "fill")
    emit.label("fill_scalar")
    for kind in ("f32", "f64", "bool"):
        emit("cmp.64", RCX, Immediate(KINDS[kind]))
        emit("je", kind)
    _fill_integer(emit)
    emit.label("filled_scalar")
    emit("add.64", R14, Immediate(SCALAR_BYTES))
    emit("jmp", "fill")
    emit.label("f32")
    emit("mov.64", RCX, at(RAX, _FLOAT_VALUE))
    emit("shl.imm.64", RCX, Immediate(1))
    emit("shr.imm.64", RCX, Immediate(1))
    emit("mov.64", RSI, Immediate(_FIRST_REFUSED))
    emit("cmp.64", RCX, RSI)
    emit("jb", "has_f32")
    emit("mov.64", RSI, Immediate(_INFINITY))
    emit("cmp.64", RCX, RSI)
    emit("jb", "refuse")
    emit.label("has_f32")
    emit("vmovsd", _VECTOR, at(RAX, _FLOAT_VALUE))
    emit("vcvtsd2ss", _VECTOR, _VECTOR, _VECTOR)
    emit("vmovss", at(R11, 0, RDX), _VECTOR)
    emit("jmp", "filled_scalar")
    emit.label("f64")
    emit("mov.64", RCX, at(RAX, _FLOAT_VALUE))
    emit("mov.64", at(R11, 0, RDX), RCX)
    emit("jmp", "filled_scalar")
    emit.label("bool")
    emit("xor.32", RCX, RCX)
    emit("cmp.64", RAX, at(RBX, PYTHON["_Py_TrueStruct"]))
    emit("sete", RCX)
    emit("mov.64", at(R11, 0, RDX), RCX)
    emit("jmp", "filled_scalar")
    emit.label("filled")
    emit("test.64", R10, R10)
    emit("jne", "refuse")


def _fill_integer(emit: Listing) -> None:
    """That of the object in rax goes to the place rdx of the block; keeps r9 to r11, r13, r14."""
    for register in (R9, R10, R11, RDX):
        emit("push", register)
    emit("sub.64", RSP, Immediate(16))
    emit("mov.64", RDI, RAX)
    emit("mov.64", RSI, RSP)
    emit("call.indirect", at(RBX, PYTHON["PyLong_AsLongLongAndOverflow"]))
    emit("mov.32", RCX, at(RSP))
    emit("add.64", RSP, Immediate(16))
    for register in (RDX, R11, R10, R9):
        emit("pop", register)
    emit("test.32", RCX, RCX)
    emit("jne", "refuse")
    emit("cmp.64", RAX, at(R14, LOW))
    emit("jl", "refuse")
    emit("cmp.64", RAX, at(R14, HIGH))
    emit("jg", "refuse")
    emit("mov.64", at(R11, 0, RDX), RAX)


def _check_pairs(emit: Listing) -> None:
    """What is stored to shares no byte with another tensor."""
    emit("mov.64", R14, at(R15, PAIRS))
    emit.label("pair")
    emit("cmp.64", R14, at(R15, PAIRS_END))
    emit("je", "paired")
    emit("mov.64", RSI, at(R14, 0))
    emit("mov.64", RSI, at(RBP, _AT_DATA, RSI))
    emit("mov.64", RDI, at(R14, 8))
    emit("mov.64", RDI, at(RBP, _AT_DATA, RDI))
    emit("mov.64", R8, at(R14, 16))
    emit("mov.64", R9, at(R14, 24))
    for above, above_record, below, below_record in ((RDI, R9, RSI, R8), (RSI, R8, RDI, R9)):
        emit("mov.64", RAX, at(below_record, HIGH))
        emit("add.64", RAX, below)
        emit("mov.64", RCX, at(above_record, LOW))
        emit("add.64", RCX, above)
        emit("cmp.64", RAX, RCX)
        emit("jbe", "apart")
    emit("cmp.64", RSI, RDI)
    emit("jne", "refuse")
    emit("cmp.64", at(R14, 32), Immediate(0))
    emit("je", "refuse")
    emit.label("apart")
    emit("add.64", R14, Immediate(PAIR_BYTES))
    emit("jmp", "pair")
    emit.label("paired")


def _run(emit: Listing) -> None:
    """The sync block as before any launch, the kernel, without the GIL if that is told, and None."""
    emit("mov.64", at(R11, 0), RSP)
    emit("mov.64", RDX, RSP)
    emit("add.64", RDX, at(R15, SYNC))
    emit("mov.64", at(R11, 16), RDX)
    emit("xor.32", RAX, RAX)
    for offset in (*range(0, COUNTER_BYTES, COUNTER_LINE_BYTES), BARRIER_OFFSET):
        emit("mov.64", at(RDX, offset), RAX)
    emit("mov.64", R13, R11)
    emit("xor.32", R14, R14)  # the thread's state, while it has not the GIL
    emit("cmp.64", at(R15, HOLDS_GIL), Immediate(0))
    emit("jne", "run")
    emit("call.indirect", at(RBX, PYTHON["PyEval_SaveThread"]))
    emit("mov.64", R14, RAX)
    emit.label("run")
    emit("mov.64", RDI, R13)
    emit("xor.32", RSI, RSI)
    emit("mov.32", RDX, Immediate(1))
    emit("call.indirect", at(R15, KERNEL))
    emit("test.64", R14, R14)
    emit("je", "ran")
    emit("mov.64", RDI, R14)
    emit("call.indirect", at(RBX, PYTHON["PyEval_RestoreThread"]))
    emit.label("ran")
    emit("mov.64", RDI, at(RBX, PYTHON["_Py_NoneStruct"]))
    emit("call.indirect", at(RBX, PYTHON["Py_IncRef"]))
    emit("mov.64", RAX, at(RBX, PYTHON["_Py_NoneStruct"]))
