"""Device memory, and its exchange with other packages by DLPack.

Enters: shapes and dtypes, arrays of NumPy. Leaves: `DeviceArray`. Holds: rows in C order at a multiple of 256 bytes;
copies go through the current stream and are over when the function returns; memory is freed with the last object that
uses it, a consumer of the DLPack capsule included (dlpack.h 1.0).
"""

from __future__ import annotations

import ctypes
import math
from typing import Any

import numpy

from ...ir.types import DTYPES, DType
from ..arguments import DLPACK_CODES
from ..dtypes import AnyDType, numpy_dtype, sapper_name
from .driver import Device, device
from .streams import destroy, handle_of

KDL_CUDA = 2


class Allocation:
    """Bytes of a device. handle: their address."""

    def __init__(self, on: Device, size_bytes: int) -> None:
        self.device, self.size_bytes = on, size_bytes
        with on.current():
            self.handle: Any = on.call("cuMemAlloc", max(size_bytes, 1))
        self.address = int(self.handle)

    def __del__(self) -> None:
        destroy(self, "cuMemFree")


class DeviceArray:
    """A tensor in device memory, in C order. A kernel takes it as it is; `torch.from_dlpack(x)` shares its memory."""

    __slots__ = ("__weakref__", "_memory", "address", "device", "dtype", "shape")

    def __init__(self, memory: Allocation, shape: tuple[int, ...], dtype: DType) -> None:
        self._memory, self.shape, self.dtype = memory, shape, dtype
        self.address, self.device = memory.address, memory.device

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.size_bytes

    def numpy(self) -> numpy.ndarray[Any, Any]:
        """A copy on the host, of what the work issued so far to the current stream has made."""
        made = numpy.empty(self.shape, numpy_dtype(self.dtype))
        if made.nbytes:
            with self.device.current():
                stream = handle_of(self.device, None)
                self.device.call("cuMemcpyDtoHAsync", made.ctypes.data, self._memory.handle, made.nbytes, stream)
                self.device.call("cuStreamSynchronize", stream)
        return made

    def copy_from(self, values: Any) -> DeviceArray:
        """Overwrite all elements by those of an array of NumPy of the same shape."""
        source = numpy.ascontiguousarray(values, numpy_dtype(self.dtype))
        if source.shape != self.shape:
            raise ValueError(f"copy_from: found shape {source.shape}; expected {self.shape}")
        if source.nbytes:
            with self.device.current():
                stream = handle_of(self.device, None)
                self.device.call("cuMemcpyHtoDAsync", self._memory.handle, source.ctypes.data, source.nbytes, stream)
                self.device.call("cuStreamSynchronize", stream)
        return self

    def copy_from_device(self, source: DeviceArray) -> DeviceArray:
        """Issue a copy of another tensor of the same size to the current stream."""
        if source.nbytes != self.nbytes:
            raise ValueError(f"copy_from_device: found {source.nbytes} bytes; expected {self.nbytes}")
        with self.device.current():
            self.device.call("cuMemcpyDtoDAsync", self._memory.handle, source._memory.handle, self.nbytes,
                             handle_of(self.device, None))
        return self

    def __dlpack_device__(self) -> tuple[int, int]:
        return KDL_CUDA, self.device.ordinal

    def __dlpack__(self, *, stream: int | None = None, max_version: tuple[int, int] | None = None,
                   dl_device: tuple[int, int] | None = None, copy: bool | None = None) -> Any:
        """A capsule that shares the memory. stream: the consumer's, which waits for the current one; -1: it sees to
        that itself."""
        if copy or (dl_device is not None and tuple(dl_device) != self.__dlpack_device__()):
            raise BufferError("found a wish for a copy; expected one for the memory as it is; mend: x.numpy()")
        if stream != -1:
            self._order_before(0 if stream in (None, 1) else int(stream or 0))
        return _capsule(self, versioned=max_version is not None and max_version[0] >= 1)

    def _order_before(self, consumer: int) -> None:
        """What the consumer's stream does next comes after what the current one does now."""
        from .streams import Event

        mine = handle_of(self.device, None)
        if int(mine) != consumer:
            event = Event(self.device).record(mine)
            with self.device.current():
                self.device.call("cuStreamWaitEvent", handle_of(self.device, consumer), event.handle, 0)

    def __repr__(self) -> str:
        return f"DeviceArray({list(self.shape)}, {self.dtype.name}, device {self.device.ordinal})"


def empty(shape: int | tuple[int, ...], dtype: AnyDType = "f32", on: Device | None = None) -> DeviceArray:
    """A new tensor, its elements not set, on a device (None: the current one)."""
    extents = (shape,) if isinstance(shape, int) else tuple(shape)
    if any(extent < 0 for extent in extents):
        raise ValueError(f"empty: found shape {extents}; expected extents of 0 or more")
    name = sapper_name(numpy_dtype(dtype))
    if name is None:
        raise TypeError(f"empty: found dtype {dtype}; expected one of {', '.join(DTYPES)}")
    element = DTYPES[name]
    return DeviceArray(Allocation(on or device(), math.prod(extents) * element.size_bytes), extents, element)


def array(values: Any, on: Device | None = None) -> DeviceArray:
    """A copy on a device of an array of NumPy, or of what NumPy makes an array of."""
    source = numpy.asarray(values)
    return empty(source.shape, source.dtype, on).copy_from(source)


# ---------------------------------------------------------------------------------------------------- DLPack capsules

class _Tensor(ctypes.Structure):
    """DLTensor."""

    _fields_ = (("data", ctypes.c_void_p), ("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32),
                ("rank", ctypes.c_int32), ("code", ctypes.c_uint8), ("bits", ctypes.c_uint8),
                ("lanes", ctypes.c_uint16), ("shape", ctypes.c_void_p), ("strides", ctypes.c_void_p),
                ("byte_offset", ctypes.c_uint64))


_Deleter = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class _Managed(ctypes.Structure):
    """DLManagedTensor."""

    _fields_ = (("tensor", _Tensor), ("context", ctypes.c_void_p), ("deleter", _Deleter))


class _Versioned(ctypes.Structure):
    """DLManagedTensorVersioned."""

    _fields_ = (("major", ctypes.c_uint32), ("minor", ctypes.c_uint32), ("context", ctypes.c_void_p),
                ("deleter", _Deleter), ("flags", ctypes.c_uint64), ("tensor", _Tensor))


_exported: dict[int, Any] = {}
"""Address of a managed tensor that somebody holds -> it, and what it needs."""


def _forget(address: int) -> None:
    _exported.pop(address, None)


_delete = _Deleter(_forget)

_NAMES = {False: b"dltensor", True: b"dltensor_versioned"}
_new_capsule = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)(
    ("PyCapsule_New", ctypes.pythonapi))
# The capsule is about to go when its destructor gets it, so it must not become an object of Python's again.
_is_valid = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p)(("PyCapsule_IsValid", ctypes.pythonapi))
_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi))


def _destroy(capsule: int) -> None:
    """Nobody took it: a consumer renames it, and calls the deleter itself."""
    for name in _NAMES.values():
        if _is_valid(capsule, name):
            _exported.pop(_pointer(capsule, name), None)


_destroy_capsule = ctypes.PYFUNCTYPE(None, ctypes.c_void_p)(_destroy)

def _capsule(source: DeviceArray, versioned: bool) -> Any:
    rank = len(source.shape)
    steps = [math.prod(source.shape[i + 1:]) for i in range(rank)]
    extents = (ctypes.c_int64 * (2 * rank))(*source.shape, *steps)
    code, bits = DLPACK_CODES[source.dtype.name]
    at = ctypes.addressof(extents)
    tensor = _Tensor(source.address, KDL_CUDA, source.device.ordinal, rank, code, bits, 1, at, at + 8 * rank, 0)
    managed = _Versioned(1, 0, None, _delete, 0, tensor) if versioned else _Managed(tensor, None, _delete)
    address = ctypes.addressof(managed)
    _exported[address] = managed, extents, source
    return _new_capsule(address, _NAMES[versioned], ctypes.cast(_destroy_capsule, ctypes.c_void_p))
