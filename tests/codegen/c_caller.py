"""Calls the functions of a built library as a C program would: through ctypes, with structs filled by hand."""

from __future__ import annotations

import ctypes
import os
import pickle
import signal
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from sapper.codegen.c_abi import STATUS, CKernel
from sapper.codegen.library import Library
from sapper.ir.types import TensorType

STATUS_NAMES = {number: name for name, (number, _) in STATUS.items()}
_FORMATS = {"f64": "d", "f32": "f", "i64": "q", "i32": "i", "i16": "h", "i8": "b", "u8": "B", "bool": "B", "index": "q"}
_C_TYPES = {"d": ctypes.c_double, "f": ctypes.c_float, "q": ctypes.c_int64, "i": ctypes.c_int32, "h": ctypes.c_int16,
            "b": ctypes.c_int8, "B": ctypes.c_uint8, "H": ctypes.c_uint16}
TIME_LIMIT_S = 20


def aligned_bytes(size_bytes: int, align: int = 64) -> np.ndarray:
    """Zeroed memory that starts at a multiple of `align`."""
    room = np.zeros(size_bytes + align, np.uint8)
    start = -room.ctypes.data % align
    return room[start:start + size_bytes]


def half_bits(dtype: str, value: Any) -> int:
    """A 16-bit float as its bits."""
    import ml_dtypes

    theirs = np.float16 if dtype == "f16" else ml_dtypes.bfloat16
    return int(np.asarray(value).astype(theirs).view(np.uint16))


class Loaded:
    """A library in this process."""

    def __init__(self, library: Library, directory: Path, name: str = "libtest.so") -> None:
        path = directory / name
        path.write_bytes(library.so(name))
        self.kernels = {k.name: k for k in library.kernels}
        self.library = ctypes.CDLL(str(path))

    def dims(self, kernel: CKernel, arguments: dict[str, Any]) -> dict[str, int]:
        dims: dict[str, int] = {}
        for name, type in kernel.parameters:
            if isinstance(type, TensorType):
                for dim, extent in zip(type.dims, arguments[name].shape, strict=True):
                    if isinstance(dim, str):
                        dims[dim] = extent
        return dims

    def plain(self, name: str, arguments: dict[str, Any], **dims: int) -> str:
        """NAME, with contiguous arrays; dims: other extents than the arrays have. Returns the status."""
        kernel = self.kernels[name]
        given: list[Any] = []
        for parameter, type in kernel.parameters:
            if isinstance(type, TensorType):
                given.append(ctypes.c_void_p(arguments[parameter].ctypes.data))
            elif type.dtype.name in ("f16", "bf16"):
                given.append(ctypes.c_uint16(half_bits(type.dtype.name, arguments[parameter])))
            else:
                given.append(_C_TYPES[_FORMATS[type.dtype.name]](arguments[parameter]))
        extents = self.dims(kernel, arguments) | dims
        given += [ctypes.c_int64(extents[d]) for d in kernel.dims]
        return STATUS_NAMES[getattr(self.library, name)(*given)]

    def fill(self, name: str, arguments: dict[str, Any], workers: int = 1, **fields: int) -> tuple[Any, list[Any]]:
        """The NAME_call for these arrays, and what must be kept alive. fields: other values, by what a field holds."""
        kernel = self.kernels[name]
        words: dict[str, Any] = {f"dim.{d}": n for d, n in self.dims(kernel, arguments).items()}
        for parameter, type in kernel.parameters:
            value = arguments[parameter]
            if isinstance(type, TensorType):
                words[f"{parameter}.data"] = value.ctypes.data
                words[f"{parameter}.stride"] = [s // value.itemsize for s in value.strides]
            else:
                words[f"scalar.{parameter}"] = value
        sync = aligned_bytes(1024)
        words |= {"scratch": 0, "scratch_bytes": 0, "sync": sync.ctypes.data} | fields
        buffer = ctypes.create_string_buffer(kernel.call_bytes)
        for place in kernel.fields:
            value = words[place.holds]
            if place.count:
                struct.pack_into(f"<{place.count}q", buffer, place.offset, *value)
            elif place.holds.startswith("scalar.") and place.dtype is not None:
                if place.dtype.name in ("f16", "bf16"):
                    struct.pack_into("<H", buffer, place.offset, half_bits(place.dtype.name, value))
                else:
                    struct.pack_into(f"<{_FORMATS[place.dtype.name]}", buffer, place.offset, value)
            else:
                struct.pack_into("<q", buffer, place.offset, value)
        keep: list[Any] = [sync]
        if "scratch" not in fields:
            size_bytes = self.scratch_bytes(name, buffer)
            if size_bytes > 0:
                scratch = aligned_bytes(size_bytes * workers)
                scratch[...] = 0xA5
                keep.append(scratch)
                struct.pack_into("<q", buffer, kernel.field("scratch").offset, scratch.ctypes.data)
                if "scratch_bytes" not in fields:
                    struct.pack_into("<q", buffer, kernel.field("scratch_bytes").offset, len(scratch))
        return buffer, keep

    def scratch_bytes(self, name: str, call: Any) -> int:
        function = getattr(self.library, f"{name}_scratch_bytes")
        function.restype = ctypes.c_int64
        return int(function(call))

    def on(self, name: str, arguments: dict[str, Any], workers: int = 1, **fields: int) -> str:
        """NAME_on from so many threads. Returns the status, which must be the same in all."""
        call, keep = self.fill(name, arguments, workers, **fields)
        function = getattr(self.library, f"{name}_on")
        found = [-1] * workers

        def work(worker: int) -> None:
            found[worker] = function(call, ctypes.c_int64(worker), ctypes.c_int64(workers))

        threads = [threading.Thread(target=work, args=(worker,)) for worker in range(1, workers)]
        for thread in threads:
            thread.start()
        work(0)
        for thread in threads:
            thread.join()
        del keep
        assert len(set(found)) == 1, found
        return STATUS_NAMES[found[0]]


def in_child(run: Callable[[], Any]) -> Any:
    """What `run` returns, in a forked child, so that wrong machine code ends nothing but the test."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(read)
            signal.alarm(TIME_LIMIT_S)
            result = run()
            with os.fdopen(write, "wb") as file:
                pickle.dump(result, file)
            status = 0
        finally:
            os._exit(status)
    os.close(write)
    with os.fdopen(read, "rb") as file:
        data = file.read()
    _, status = os.waitpid(child, 0)
    assert status == 0, f"the child ended with {signal.Signals(status & 127).name if status & 127 else status}"
    return pickle.loads(data)
