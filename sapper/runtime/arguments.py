"""What a caller passes, seen as memory and machine words.

Enters: NumPy arrays, objects with `__dlpack__` or `__array_interface__`, Python and NumPy scalars. Leaves: a `Binding`
(addresses, strides in elements, extents of the symbolic dims, scalar words). Holds: after `Signature.bind` the call is
safe to run: dtypes, ranks, extents and alignment are as the kernel declares, whatever is stored is writable, no two
of its elements share memory, and it shares none with another argument unless the kernel says that it may.

DLPack capsules are read here through their C layout (dlpack.h 1.0), so no framework is imported and nothing is copied.
A capsule is not consumed: it is held while the kernel runs, and its own destructor frees the export.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy

from ..ir.extents import MAX_EXTENT, evaluate_nested, names_in
from ..ir.types import DTYPES, Dim, DType, TensorType, spell_nested
from .dtypes import NUMPY_NAMES, numpy_dtype, sapper_name
from .errors import ArgumentError

if TYPE_CHECKING:
    from ..tile.schedule import Panels

WRITEABLE_FLAG = 0x0400  # NPY_ARRAY_WRITEABLE, numpy/ndarraytypes.h
FORMS = 1024
"""Shapes with strides of which is kept what follows from them: the tensors of a model's layers have few."""


class Parameter(NamedTuple):
    """One parameter of a kernel. dims is None for a scalar."""

    name: str
    dtype: DType
    dims: tuple[Dim, ...] | None

    @classmethod
    def of(cls, name: str, type: Any) -> Parameter:
        """From the IR type that the author annotated: a TensorType, or a TileType without axes."""
        return cls(name, type.dtype, type.dims if isinstance(type, TensorType) else None)


class TensorView(NamedTuple):
    """Memory of one tensor argument. address: bytes; strides: elements; keep: holds the memory while in use. panels: of
    a packed matrix, whose strides are those of the matrix that it stands for."""

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: DType
    writeable: bool
    keep: Any
    panels: Panels | None = None

    @property
    def extent(self) -> tuple[int, int]:
        """First byte and one past the last, as offsets from the address; (0, 0) when there are no elements."""
        if self.panels is not None:
            return 0, self.keep.nbytes
        return extent_bytes(self.shape, self.strides, self.dtype.size_bytes)

    @property
    def is_contiguous(self) -> bool:
        return is_contiguous(self.shape, self.strides)


@lru_cache(FORMS)
def extent_bytes(shape: tuple[int, ...], strides: tuple[int, ...], element_bytes: int) -> tuple[int, int]:
    low = high = 0
    for size, stride in zip(shape, strides, strict=True):
        if size == 0:
            return 0, 0
        if stride < 0:
            low += (size - 1) * stride
        else:
            high += (size - 1) * stride
    return low * element_bytes, (high + 1) * element_bytes


@lru_cache(FORMS)
def is_contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether the elements lie in C order without gaps; strides along extents of 0 and 1 don't matter."""
    if 0 in shape:
        return True
    expected = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


@lru_cache(FORMS)
def is_injective(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether it is plain that no two elements share memory: each stride steps over all that lies below it."""
    if 0 in shape:
        return True
    reach = 0
    for stride, size in sorted((abs(stride), size) for size, stride in zip(shape, strides, strict=True) if size > 1):
        if stride <= reach:
            return False
        reach += (size - 1) * stride
    return True


class Binding(NamedTuple):
    """A checked call. tensors and scalars by parameter position; scalars are 64-bit words; dims by name."""

    tensors: dict[int, TensorView]
    scalars: dict[int, int]
    dims: dict[str, int]


# ---------------------------------------------------------------------------------------------------- memory peeking


def address_through_interface(array: numpy.ndarray[Any, Any]) -> int:
    address: int = array.__array_interface__["data"][0]
    return address


def flags_through_interface(array: numpy.ndarray[Any, Any]) -> int:
    return WRITEABLE_FLAG if array.flags.writeable else 0


def _memory_words() -> memoryview | None:
    """All of this process's address space as 64-bit words, if NumPy's array header lies as its C API says.

    PyArrayObject_fields (numpy/ndarraytypes.h) after the 16-byte object header: data, nd, dimensions, strides, base,
    descr, flags; so the data pointer is word 2 and the flags are word 8. Reading it there takes 60 ns; the attribute
    `ctypes.data` takes 900. Checked on two arrays before it is trusted.
    """
    if struct.calcsize("P") != 8:
        return None
    words = memoryview((ctypes.c_uint64 * 2**44).from_address(0)).cast("B").cast("Q")
    for array in (numpy.zeros((3, 5), numpy.float32), numpy.zeros(7, numpy.int8)[2:]):
        for writeable in (True, False):
            array.flags.writeable = writeable
            head = id(array) >> 3
            if object.__basicsize__ != 16 or words[head + 2] != address_through_interface(array):
                return None
            if (words[head + 8] & WRITEABLE_FLAG) != flags_through_interface(array):
                return None
    return words


MEMORY_WORDS = _memory_words()


# ------------------------------------------------------------------------------------------------------------ DLPack

_capsule_is_valid = ctypes.pythonapi.PyCapsule_IsValid
_capsule_is_valid.argtypes = (ctypes.py_object, ctypes.c_char_p)
capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
capsule_pointer.argtypes = (ctypes.py_object, ctypes.c_char_p)
capsule_pointer.restype = ctypes.c_size_t

_TENSOR_BYTES = 48
_parse_tensor = struct.Struct("<QiiiBBHQQQ").unpack  # data, device, id, ndim, code, bits, lanes, shape, strides, offset
_HOST_DEVICES = frozenset({1, 3, 11})  # kDLCPU, kDLCUDAHost, kDLROCMHost
_DEVICE_NAMES = {2: "CUDA", 4: "OpenCL", 7: "Vulkan", 8: "Metal", 10: "ROCm", 13: "CUDA managed", 14: "oneAPI"}
_DLPACK_DTYPES = {
    (0, 8): "i8", (0, 16): "i16", (0, 32): "i32", (0, 64): "i64", (1, 8): "u8",
    (2, 16): "f16", (2, 32): "f32", (2, 64): "f64", (4, 16): "bf16", (6, 8): "bool",
    (10, 8): "f8e4m3", (12, 8): "f8e5m2",
}  # fmt: skip
DLPACK_CODES = {name: code for code, name in _DLPACK_DTYPES.items()}
"""Name of a dtype -> (code, bits)."""
_DLPACK_KINDS = {0: "int", 1: "uint", 2: "float", 3: "opaque", 4: "bfloat", 5: "complex", 6: "bool"}
_READ_ONLY = 1


def view_dlpack(value: Any, kernel: str, parameter: Parameter, devices: frozenset[int] = _HOST_DEVICES,
                expected: str = "CPU memory", **options: Any) -> TensorView:
    """A tensor of another package in memory of one of `devices`. options: of its `__dlpack__`."""

    def refuse(kind: str, found: str, expected: str, mend: str) -> ArgumentError:
        return ArgumentError(kind, kernel, parameter.name, found, expected, mend)

    try:
        device = value.__dlpack_device__()[0] if hasattr(value, "__dlpack_device__") else 1
    except Exception as error:  # each package has its own error for it
        raise refuse("device", f"{type(value).__name__} in memory that cannot be passed on ({error})", expected,
                     "copy it first (x.cpu())") from error
    if device not in devices:
        raise refuse(
            "device",
            f"a tensor in {_DEVICE_NAMES.get(int(device), f'device {int(device)}')} memory",
            expected,
            "copy it first (x.cpu())",
        )
    if getattr(value, "is_neg", bool)():  # PyTorch's imaginary part of a conjugate: exports forget the sign
        raise refuse("export", f"{type(value).__name__} that stands for its negative (is_neg)", "elements in memory",
                     "x.resolve_neg()")
    try:
        try:
            capsule = value.__dlpack__(max_version=(1, 0), **options)
        except TypeError:
            capsule = value.__dlpack__(**options)
    except (BufferError, RuntimeError, ValueError, TypeError) as error:
        raise refuse(
            "export", f"{type(value).__name__} that refuses to export ({error})", "a plain strided tensor",
            "x.to_dense()" if "layout" in str(error) else "x.detach()"
        ) from error
    read_only = False
    if _capsule_is_valid(capsule, b"dltensor_versioned"):
        pointer = capsule_pointer(capsule, b"dltensor_versioned")
        major, _, _, _, flags = struct.unpack("<IIQQQ", ctypes.string_at(pointer, 32))
        if major != 1:
            raise refuse("export", f"DLPack version {major}", "version 1", "pass numpy.asarray(x)")
        read_only = bool(flags & _READ_ONLY)
        pointer += 32
    elif _capsule_is_valid(capsule, b"dltensor"):
        pointer = capsule_pointer(capsule, b"dltensor")
    else:
        raise refuse("export", "__dlpack__() that gave no DLPack capsule", "a fresh capsule", "numpy.asarray(x)")
    data, device, _, rank, code, bits, lanes, shape_at, strides_at, offset = _parse_tensor(
        ctypes.string_at(pointer, _TENSOR_BYTES)
    )
    if device not in devices:
        raise refuse("device", f"a tensor on device {device}", expected, "copy it first (x.cpu())")
    name = _DLPACK_DTYPES.get((code, bits)) if lanes == 1 else None
    if name is None:
        kind = f"{_DLPACK_KINDS.get(code, f'type {code} of ')}{bits}" + (f"x{lanes}" if lanes != 1 else "")
        raise refuse("dtype", kind, parameter.dtype.name, f"convert it to {parameter.dtype.name}")
    layout = struct.Struct(f"<{rank}q")
    shape = layout.unpack(ctypes.string_at(shape_at, 8 * rank)) if rank else ()
    if strides_at and rank:
        strides = layout.unpack(ctypes.string_at(strides_at, 8 * rank))
    else:
        strides = row_major(shape)
    return TensorView(data + offset, shape, strides, DTYPES[name], not read_only, capsule)


def row_major(shape: Sequence[int]) -> tuple[int, ...]:
    strides = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


# ----------------------------------------------------------------------------------------------------------- tensors


def _view_array(array: numpy.ndarray[Any, Any], kernel: str, parameter: Parameter) -> TensorView:
    name = sapper_name(array.dtype)
    if name is None:
        if not array.dtype.isnative:
            raise ArgumentError(
                "byte-order",
                kernel,
                parameter.name,
                f"{array.dtype.name} in foreign byte order",
                "this machine's byte order",
                'x.astype(x.dtype.newbyteorder("="))',
            )
        raise dtype_error(kernel, parameter, array.dtype.name)
    element_bytes = array.dtype.itemsize
    shape, strides = array.shape, _in_elements(array.shape, array.strides, element_bytes)
    if isinstance(strides, int):
        raise ArgumentError(
            "stride",
            kernel,
            parameter.name,
            f"a stride of {array.strides[strides]} bytes along dimension {strides}",
            f"a multiple of the element's {element_bytes} bytes",
            "pass numpy.ascontiguousarray(x)",
        )
    return TensorView(
        array.__array_interface__["data"][0],
        shape,
        strides,
        DTYPES[name],
        array.flags.writeable,
        array,
    )


@lru_cache(FORMS)
def _in_elements(shape: tuple[int, ...], strides: tuple[int, ...], element_bytes: int) -> tuple[int, ...] | int:
    """Strides in elements; or the first dimension whose stride is no multiple of one, and matters."""
    found = []
    for dimension, stride in enumerate(strides):
        if stride % element_bytes:
            if shape[dimension] > 1:
                return dimension
            stride = element_bytes
        found.append(stride // element_bytes)
    return tuple(found)


def dtype_error(kernel: str, parameter: Parameter, found: str) -> ArgumentError:
    expected = parameter.dtype.name
    theirs = _numpy_spelling(expected)
    mend = (f"sp.empty(shape, {expected!r}) and copy, or x.astype({theirs}); of PyTorch "
            f"x.to(torch.{theirs.split('.')[-1]})")
    return ArgumentError("dtype", kernel, parameter.name, f"dtype {found}", f"dtype {expected}", mend)


def _numpy_spelling(name: str) -> str:
    theirs = NUMPY_NAMES.get(name, name)
    if name == "bool":
        return "bool"
    return f"{'ml_dtypes' if name in ('bf16', 'f8e4m3', 'f8e5m2') else 'numpy'}.{theirs}"


def view_tensor(value: Any, kernel: str, parameter: Parameter) -> TensorView:
    """One argument as memory, without copying. Raises ArgumentError when it isn't a tensor, or of another dtype."""
    if isinstance(value, numpy.ndarray):
        view = _view_array(value, kernel, parameter)
    elif hasattr(value, "panels"):
        view = TensorView(address_through_interface(value.data), value.shape, row_major(value.shape), value.dtype,
                          False, value, value.panels)
    elif hasattr(value, "__dlpack__") and not isinstance(value, numpy.generic):
        view = view_dlpack(value, kernel, parameter)
    elif hasattr(value, "__array_interface__") and not isinstance(value, numpy.generic):
        try:
            array = numpy.asarray(value)
        except (TypeError, ValueError) as error:
            raise ArgumentError("export", kernel, parameter.name, f"{type(value).__name__} whose __array_interface__ "
                                f"NumPy does not take ({error})", "an array in memory", "pass a NumPy array") from error
        view = _view_array(array, kernel, parameter)
    else:
        raise ArgumentError(
            "type",
            kernel,
            parameter.name,
            f"{type(value).__name__}",
            f"a {parameter.dtype.name} array of {_plural(len(parameter.dims or ()), 'dimension')}",
            f"pass numpy.asarray(x, {_numpy_spelling(parameter.dtype.name)})"
            if isinstance(value, (list, tuple, int, float)) else
            "pass a NumPy array, or an object with __dlpack__ or __array_interface__",
        )
    if view.dtype is not parameter.dtype and view.dtype.name != parameter.dtype.name:
        raise dtype_error(kernel, parameter, view.dtype.name)
    return view


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")


# ----------------------------------------------------------------------------------------------------------- scalars

_float_bits = struct.Struct("<f")
_double_bits = struct.Struct("<d")
_word = struct.Struct("<q")
_half_word = struct.Struct("<i")


def scalar_word(value: Any, kernel: str, parameter: Parameter) -> int:
    """A scalar argument as the 64-bit word that the compiled kernel reads, as a signed integer.

    Integers, bool and index are sign-extended; f32 is its bits in the low half; bf16 and f16 are rounded to their
    type and passed as f32 bits; f64 is its bits. Raises ArgumentError for a wrong kind or a value out of range.
    """
    dtype = parameter.dtype
    item = value
    if isinstance(value, numpy.generic) or (isinstance(value, numpy.ndarray) and value.ndim == 0):
        item = value.item()
    if dtype.kind == "f":
        if not isinstance(item, (int, float)) or isinstance(item, bool):
            raise _scalar_error("scalar", value, kernel, parameter, "a number")
        try:
            item = float(item)
            if dtype.bits == 64:
                word: int = _word.unpack(_double_bits.pack(item))[0]
                return word
            if dtype.bits < 32:
                with numpy.errstate(over="raise"):
                    item = float(numpy.float64(item).astype(numpy_dtype(dtype)))
            word = _half_word.unpack(_float_bits.pack(item))[0]
        except (OverflowError, FloatingPointError) as error:
            raise _scalar_error("range", value, kernel, parameter, f"a number within {dtype.name}") from error
        return word & 0xFFFFFFFF
    if dtype.kind == "b":
        if not isinstance(item, (bool, numpy.bool_)):
            raise _scalar_error("scalar", value, kernel, parameter, "True or False")
        return int(item)
    if isinstance(item, bool) or not isinstance(item, int):
        raise _scalar_error("scalar", value, kernel, parameter, "an integer")
    low, high = integer_range(dtype)
    if not low <= item <= high:
        raise _scalar_error("range", value, kernel, parameter, f"an integer from {low} to {high}")
    return item


def integer_range(dtype: DType) -> tuple[int, int]:
    if dtype.kind == "u":
        return 0, 2**dtype.bits - 1
    return -(2 ** (dtype.bits - 1)), 2 ** (dtype.bits - 1) - 1


def _scalar_error(kind: str, value: Any, kernel: str, parameter: Parameter, expected: str) -> ArgumentError:
    found = f"{type(value).__name__} {value!r}" if isinstance(value, (int, float, str)) else type(value).__name__
    converter = {"f": "float", "b": "bool"}.get(parameter.dtype.kind, "int")
    wider = {"f": "f64", "i": "i64", "u": "i64"}.get(parameter.dtype.kind, parameter.dtype.name)
    mend = f"pass {converter}(x)"
    if kind == "range":
        mend = "pass one nearer to 0" + (f", or declare {parameter.name}: {wider}" if parameter.dtype.bits < 64 else "")
    return ArgumentError(
        kind, kernel, parameter.name, found, f"{expected} ({parameter.dtype.name} scalar)", mend
    )


# --------------------------------------------------------------------------------------------------------- signature


Free = dict[tuple[str, str], tuple[int, int]]
"""From and to where each ("scalar", name) and ("dim", name) may be, all together."""


def looked_through(requires: Iterable[Sequence[Any]]) -> tuple[tuple[Any, ...], ...]:
    """The rows of ir/indices.py."""
    return tuple(tuple(row) for row in requires if row[1] == "indexed")


@lru_cache(maxsize=FORMS)
def freedom_of(rows: tuple[tuple[Any, ...], ...], sizes: tuple[tuple[tuple[str, str], int], ...],
               limits: tuple[tuple[tuple[str, str], tuple[int, int]], ...]) -> tuple[Free, bool]:
    """How far scalars and dimensions may go from where they are, all rows together (ir/indices.py), and whether all
    rows are proved there. Of others they may go nowhere."""
    found, here, proved = dict(limits), dict(sizes), True
    if rows:
        from ..ir.indices import Row, freedom
    for row in map(Row._make, rows) if rows else ():
        free = freedom(row, here, found)
        proved = proved and free is not None
        found |= {leaf: (here[leaf], here[leaf]) for leaf in found if leaf[1] in row.names(leaf[0])
                  } if free is None else free
    return found, proved


class Signature:
    """A kernel's parameters and the checks of a call.

    in_place: pairs of names (stored, other) that may be the very same tensor. computed: positions of tensors that have
    an extent like K // 2.
    """

    __slots__ = ("computed", "in_place", "kernel", "parameters", "positions", "scalar_positions", "tensor_positions")

    def __init__(
        self, kernel: str, parameters: Iterable[Parameter], in_place: Iterable[tuple[str, str]] = ()
    ) -> None:
        self.kernel = kernel
        self.parameters = tuple(parameters)
        self.in_place = frozenset(frozenset(pair) for pair in in_place)
        self.tensor_positions = tuple(i for i, p in enumerate(self.parameters) if p.dims is not None)
        self.computed = tuple(
            i for i, p in enumerate(self.parameters) if any(isinstance(d, tuple) for d in p.dims or ()))
        self.scalar_positions = tuple(i for i, p in enumerate(self.parameters) if p.dims is None)
        self.positions = {p.name: i for i, p in enumerate(self.parameters)}

    def bind(self, arguments: Sequence[Any],
             read: Callable[[Any, str, Parameter], TensorView] = view_tensor) -> Binding:
        """Check everything but stores. read: gives the memory of a tensor. Raises ArgumentError, which names the first
        argument at fault."""
        self.check_count(arguments)
        parameters = self.parameters
        tensors: dict[int, TensorView] = {}
        scalars: dict[int, int] = {}
        dims: dict[str, int] = {}
        dim_source: dict[str, str] = {}
        for position, (value, parameter) in enumerate(zip(arguments, parameters, strict=True)):
            if parameter.dims is None:
                scalars[position] = scalar_word(value, self.kernel, parameter)
                continue
            view = read(value, self.kernel, parameter)
            tensors[position] = view
            self._check_extents(view, parameter, dims, dim_source)
            element_bytes = view.dtype.size_bytes
            if view.address % element_bytes and 0 not in view.shape:
                raise self._refuse(
                    "alignment",
                    parameter,
                    f"data at an address that is not a multiple of {element_bytes}",
                    f"elements of {view.dtype.name} aligned to {element_bytes} bytes",
                    "pass x.copy()",
                )
        for position in self.computed:
            self._check_computed(tensors[position].shape, parameters[position], dims, dim_source)
        return Binding(tensors, scalars, dims)

    def check_count(self, arguments: Sequence[Any]) -> None:
        parameters = self.parameters
        if len(arguments) != len(parameters):
            names = ", ".join(p.name for p in parameters)
            given = _plural(len(arguments), "argument")
            if len(arguments) < len(parameters):
                given += f", and none for {parameters[len(arguments)].name}"
            raise ArgumentError(
                "count",
                self.kernel,
                "",
                given,
                f"{len(parameters)} ({names})",
                "pass them by position, in this order",
            )

    def check_stores(self, binding: Binding, stored: Iterable[str]) -> None:
        """Check that the tensors which the kernel writes may be written. Raises ArgumentError."""
        for name in stored:
            position = self.positions[name]
            view, parameter = binding.tensors[position], self.parameters[position]
            if not view.writeable:
                raise self._refuse(
                    "read-only",
                    parameter,
                    "a read-only array",
                    "a writable one, since the kernel stores to it",
                    f"{name} = {name}.copy(), and pass that",
                )
            if not is_injective(view.shape, view.strides):
                raise self._refuse(
                    "self-overlap",
                    parameter,
                    f"strides {view.strides} for shape {view.shape}, so that elements share memory",
                    "one place for each element, since the kernel stores to it",
                    f"{name} = {name}.copy(), and pass that",
                )
            self._check_overlap(position, binding.tensors)

    def check_requires(self, binding: Binding, requires: Iterable[Sequence[Any]]) -> None:
        """Check what the kernel's indices and views need: each of `requires` is a row as docs/ir.md says. Raises
        ArgumentError."""
        for name, dimension, constant, *terms in requires:
            if dimension in ("multiple", "inside"):
                self._check_extent_arithmetic(binding, name, dimension, constant, *terms)
                continue
            if dimension == "contiguous":
                self._check_contiguous(binding, name, constant, *terms)
                continue
            if dimension == "near":
                self._check_near(binding, name, [constant, *terms])
                continue
            if dimension == "indexed":
                self._check_indexed(binding, (name, dimension, constant, *terms))
                continue
            pairs = list(zip(terms[::2], terms[1::2], strict=True))
            needed = constant + sum(coefficient * binding.dims[dim] for dim, coefficient in pairs)
            position = self.positions[name]
            found = binding.tensors[position].shape[dimension]
            if found < needed:
                sizes = ", ".join(f"{dim} = {binding.dims[dim]}" for dim, _ in pairs)
                parts = [f"{c} * {dim}" if c != 1 else dim for dim, c in pairs]
                text = " + ".join([*parts, str(constant)] if constant else parts)
                raise self._refuse(
                    "shape",
                    self.parameters[position],
                    f"extent {found} of dimension {dimension}",
                    f"at least {needed} ({text}, where {sizes}), since the kernel indexes so far" if pairs else
                    f"at least {needed}, since the kernel indexes so far",
                    "pass a larger tensor, or one that fits the others",
                )

    def _check_extent_arithmetic(self, binding: Binding, name: str, kind: str, left: Any, right: Any, *walked: Any
                                 ) -> None:
        """`multiple`: left is a multiple of right, as a view divides it. `inside`: left, an index, is below right, if
        each of walked is above 0."""
        parameter = self.parameters[self.positions[name]]
        if any(evaluate_nested(count, binding.dims) <= 0 for count in walked):
            return
        try:
            a, b = evaluate_nested(left, binding.dims), evaluate_nested(right, binding.dims)
        except ZeroDivisionError:
            a, b = 1, 0
        if (a < b) if kind == "inside" else b != 0 and a % b == 0:
            return
        names = names_in(left) + names_in(right)
        sizes = ", ".join(f"{dim} = {size}" for dim, size in binding.dims.items() if dim in names)
        texts = spell_nested(left), spell_nested(right)
        if left == -1:
            wanted = f"{texts[1]} to be 0 or more, since the kernel begins to index there"
        elif kind == "multiple":
            wanted = f"{texts[0]} to be a multiple of {texts[1]}, as the kernel asks"
        elif isinstance(right, (list, tuple)) and right[0] == "add" and right[2] == 1:
            wanted = f"{texts[0]} <= {spell_nested(right[1])}, as the kernel asks"
        else:
            wanted = f"{texts[0]} to be below {texts[1]}, since the kernel indexes so far"
        raise self._refuse("shape", parameter, sizes, wanted, "pass tensors of such shapes")

    def check_scalars(self, binding: Binding, requires: Iterable[Sequence[Any]]) -> None:
        """Check again what hangs on scalars too, of shapes that `check_requires` has seen. Raises ArgumentError."""
        for row in looked_through(requires):
            if any(node[0] == "scalar" for node in row[4]):
                self._check_indexed(binding, row)

    def _check_indexed(self, binding: Binding, values: Iterable[Any]) -> None:
        """All values of an index are inside. values: the row of ir/indices.py."""
        from ..ir.indices import Row, TooMany, outside  # few kernels have such rows

        row = Row._make(values)
        sizes = self.sizes_of(binding)
        parameter = self.parameters[self.positions[row.tensor]]
        given = [name for kind in ("dim", "scalar") for name in row.names(kind)]
        where = f" where {', '.join(f'{n} = {sizes[k, n]}' for k, n in sizes if n in given)}" if given else ""
        try:
            found = outside(row, sizes)
        except TooMany:
            raise self._refuse("range", parameter, f"more values of index {row.dimension} of {row.text}{where} than "
                               "can be looked through", "an index that rises or falls along each axis, or fewer values",
                               "write minimum(maximum(index, 0), ...) in the kernel") from None
        if found is not None:
            index, extent = found
            raise self._refuse("range", parameter, f"index {index} of dimension {row.dimension}, in {row.text}{where}",
                               f"0 to {extent - 1}, the elements that there are" if extent > 0 else
                               "no access, as there are no elements",
                               "pass a longer tensor, or scalars that stay inside" if row.names("scalar") else
                               "pass a longer tensor, or one that fits the others")

    def sizes_of(self, binding: Binding) -> dict[tuple[str, str], int]:
        """What a call knows of an index: dimensions, integer scalars."""
        return {("dim", name): size for name, size in binding.dims.items()} | {
            ("scalar", self.parameters[position].name): word for position, word in binding.scalars.items()
            if self.parameters[position].dtype.kind != "f"}

    def freedom(self, binding: Binding, requires: Iterable[Sequence[Any]], most: Mapping[str, int] | None = None
                ) -> tuple[Free, bool]:
        """From and to where each integer scalar, and each dimension that may be fewer, `most` at most, may be in calls
        that are not checked again; whether this one needs no check."""
        limits = {("scalar", p.name): (0, 1) if p.dtype.kind == "b" else integer_range(p.dtype)
                  for p in self.parameters if p.dims is None and p.dtype.kind != "f"}
        limits |= {("dim", name): (0, size) for name, size in (most or {}).items()}
        return freedom_of(looked_through(requires), tuple(self.sizes_of(binding).items()), tuple(limits.items()))

    def _check_near(self, binding: Binding, name: str, counts: Sequence[int]) -> None:
        """counts: dimensions, each with the most steps along it between what lanes reach by offsets of 32 bits."""
        view = binding.tensors[self.positions[name]]
        apart = sum(min(view.shape[d] - 1, most) * abs(view.strides[d])
                    for d, most in zip(counts[::2], counts[1::2], strict=True)) * view.dtype.size_bytes
        if apart >= 1 << 31 and 0 not in view.shape:
            raise self._refuse(
                "shape", self.parameters[self.positions[name]], f"elements {apart} bytes apart (shape {view.shape})",
                "less than 2 GiB between those that the kernel reaches by indices in its lanes",
                "split it, or index it by scalars: for t in each(...)")

    def _check_contiguous(self, binding: Binding, name: str, first: int, last: int, element_bytes: int = 1) -> None:
        """Dimensions first to last of a tensor that a view merges; up to the rank: that it reads as elements of so many
        bytes."""
        position = self.positions[name]
        view = binding.tensors[position]
        rank = len(view.shape)
        if view.address % element_bytes and 0 not in view.shape:
            raise self._refuse("alignment", self.parameters[position],
                               f"data at an address that is not a multiple of {element_bytes}",
                               f"memory that the kernel can view as elements of {element_bytes} bytes", "pass x.copy()")
        wanted = 1 if last == rank else view.strides[last]
        for dimension in range(min(last, rank - 1), first - 1, -1):
            if view.shape[dimension] != 1 and view.strides[dimension] != wanted and 0 not in view.shape:
                raise self._refuse(
                    "stride", self.parameters[position], f"strides {view.strides} for shape {view.shape}",
                    f"dimensions {first} to {min(last, rank - 1)} to be contiguous, since the kernel merges them",
                    "pass x.copy()")
            wanted *= view.shape[dimension]

    def _refuse(self, kind: str, parameter: Parameter, found: str, expected: str, mend: str) -> ArgumentError:
        return ArgumentError(kind, self.kernel, parameter.name, found, expected, mend)

    def _check_extents(
        self, view: TensorView, parameter: Parameter, dims: dict[str, int], dim_source: dict[str, str]
    ) -> None:
        declared = parameter.dims or ()
        shape = view.shape
        if len(shape) != len(declared):
            spelled = ", ".join(map(spell_nested, declared))
            raise self._refuse(
                "rank",
                parameter,
                f"{_plural(len(shape), 'dimension')} (shape {shape})",
                f"{len(declared)} [{spelled}]",
                "reshape it",
            )
        for position, (size, dim) in enumerate(zip(shape, declared, strict=True)):
            if isinstance(dim, int):
                if size == dim:
                    continue
                found, expected, mend = f"extent {size}", f"{dim}", "pass an array of that shape"
            elif isinstance(dim, tuple):
                continue
            elif dims.setdefault(dim, size) != size:
                found, expected = f"{dim} = {size}", f"{dim} = {dims[dim]}, as in `{dim_source[dim]}`"
                mend = "make the shapes agree"
            elif size > MAX_EXTENT:
                found, expected, mend = f"extent {size}", f"at most {MAX_EXTENT}", "split it"
            else:
                dim_source.setdefault(dim, parameter.name)
                continue
            raise self._refuse("shape", parameter, f"{found} along dimension {position} (shape {shape})", expected,
                               mend)

    def _check_computed(self, shape: tuple[int, ...], parameter: Parameter, dims: dict[str, int],
                        dim_source: dict[str, str]) -> None:
        """Extents that are made of those of other tensors."""
        for position, (size, dim) in enumerate(zip(shape, parameter.dims or (), strict=True)):
            if not isinstance(dim, tuple):
                continue
            try:
                wanted: object = evaluate_nested(dim, dims)
            except ZeroDivisionError:
                wanted = "none, as it divides by 0"
            if size != wanted:
                known = ", ".join(f"{n} = {dims[n]} in `{dim_source[n]}`" for n in dict.fromkeys(names_in(dim)))
                raise self._refuse("shape", parameter, f"extent {size} along dimension {position} (shape {shape})",
                                   f"{spell_nested(dim)} = {wanted}, where {known}", "make the shapes agree")

    def _check_overlap(self, position: int, tensors: dict[int, TensorView]) -> None:
        mine = tensors[position]
        low, high = mine.extent
        low, high = mine.address + low, mine.address + high
        for other_position, other in tensors.items():
            if other_position == position or low == high:
                continue
            other_low, other_high = other.extent
            if other_low == other_high or high <= other.address + other_low or other.address + other_high <= low:
                continue
            names = self.parameters[position].name, self.parameters[other_position].name
            if frozenset(names) in self.in_place and _same_place(mine, other):
                continue
            if _share_memory(mine, other):
                raise self._refuse(
                    "overlap",
                    self.parameters[position],
                    f"memory that overlaps argument `{names[1]}`",
                    "separate memory, since the kernel stores to it",
                    f"pass another output, or write @kernel(in_place=[{names}])" if _same_place(mine, other) else
                    f"pass a copy of `{names[1]}`, or another output",
                )


def _same_place(a: TensorView, b: TensorView) -> bool:
    return a.address == b.address and a.shape == b.shape and a.strides == b.strides and a.dtype is b.dtype


def _share_memory(a: TensorView, b: TensorView) -> bool:
    """Whether any byte is in both; a case too hard to decide quickly counts as sharing."""
    share: Any = numpy.shares_memory
    try:
        return bool(share(as_array(a), as_array(b), max_work=10_000))
    except numpy.exceptions.TooHardError:
        return True


def as_array(view: TensorView) -> numpy.ndarray[Any, Any]:
    """The memory of a view as a NumPy array, which does not keep it alive; of a packed matrix, the matrix."""
    if view.panels is not None:
        unpacked: numpy.ndarray[Any, Any] = view.keep.unpack()
        return unpacked
    element_bytes = view.dtype.size_bytes
    low, high = view.extent
    memory: Any = (ctypes.c_char * (high - low)).from_address(view.address + low)
    steps = tuple(stride * element_bytes for stride in view.strides)
    array = numpy.ndarray(view.shape, numpy_dtype(view.dtype), memory, -low, steps)
    array.flags.writeable = view.writeable
    return array


# --------------------------------------------------------------------------------------------------------- the block

FIRST_SLOT = 3
"""Words 0 to 2 of the argument block are the scratch base, the scratch bytes of each worker, the sync block."""


def slot_words(slots: Sequence[str]) -> dict[str, int]:
    """Slot -> word of the argument block."""
    return {slot: FIRST_SLOT + i for i, slot in enumerate(slots)}


def fill_words(
    signature: Signature, slots: Sequence[str], binding: Binding, address_of: Callable[[int], int] | None = None
) -> list[int]:
    """The words of the argument block from FIRST_SLOT on, in the order of slots.

    address_of: what to write for the address of the tensor at a position (a guarded call moves the data elsewhere).
    Raises ValueError for a slot that means nothing here.
    """
    positions = signature.positions
    words = []
    for slot in slots:
        head, _, tail = slot.partition(".")
        if head == "dim" and tail in binding.dims:
            words.append(binding.dims[tail])
        elif head == "scalar" and tail in positions:
            words.append(binding.scalars[positions[tail]])
        elif head in positions and tail == "data":
            position = positions[head]
            words.append(binding.tensors[position].address if address_of is None else address_of(position))
        elif head in positions and tail.startswith("stride."):
            words.append(binding.tensors[positions[head]].strides[int(tail[7:])])
        else:
            raise ValueError(
                f"{signature.kernel}: found slot {slot!r}; expected NAME.data, NAME.stride.I, dim.NAME or scalar.NAME"
            )
    return words
