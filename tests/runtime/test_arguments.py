"""Arguments: every protocol, every check with its message, and the geometry of strides against brute force."""

from __future__ import annotations

import ctypes
import itertools
import math
import struct
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.lib.stride_tricks import as_strided

from sapper.ir.types import DTYPES, TensorType, TileType, bf16, bool_, f16, f32, f64, i8, i32, i64, u8
from sapper.lang.errors import CallError
from sapper.runtime import arguments as module
from sapper.runtime.arguments import (
    MEMORY_WORDS,
    Parameter,
    Signature,
    extent_bytes,
    fill_words,
    is_contiguous,
    is_injective,
    scalar_word,
    view_tensor,
)
from sapper.runtime.errors import ArgumentError
from tests.strategies import examples

MATRIX = Parameter("x", f32, ("M", "N"))


def signature(*parameters: Parameter, in_place: tuple[tuple[str, str], ...] = ()) -> Signature:
    return Signature("k", parameters, in_place)


def refused(kind: str, call: Callable[[], object]) -> ArgumentError:
    with pytest.raises(ArgumentError) as caught:
        call()
    error = caught.value
    assert error.kind == kind
    assert isinstance(error, CallError) and isinstance(error, TypeError) and isinstance(error, ValueError)
    assert error.found and error.expected and error.mend
    assert all(part in str(error) for part in ("k", error.found, error.expected, error.mend))
    return error


# ---- NumPy


def test_numpy_view() -> None:
    array = np.arange(24, dtype=np.float32).reshape(4, 6)[1:, ::2]
    view = view_tensor(array, "k", MATRIX)
    assert (view.address, view.shape, view.strides) == (array.ctypes.data, (3, 3), (6, 2))
    assert view.writeable and view.dtype is f32 and not view.is_contiguous
    assert view_tensor(array.T, "k", MATRIX).strides == (2, 6)
    assert view_tensor(array[::-1], "k", MATRIX).strides == (-6, 2)
    assert view_tensor(np.broadcast_to(array[0], (5, 3)), "k", MATRIX).strides == (0, 2)


def test_ml_dtypes_view() -> None:
    array = np.zeros((2, 3), ml_dtypes.bfloat16)
    assert view_tensor(array, "k", Parameter("x", bf16, ("M", "N"))).strides == (3, 1)


def test_memory_words_read_what_numpy_says() -> None:
    assert MEMORY_WORDS is not None
    for array in (np.zeros(3), np.zeros((4, 4), np.int8)[1:, 2:], np.zeros(5, np.float32)[::-1]):
        assert MEMORY_WORDS[(id(array) >> 3) + 2] == array.ctypes.data
        assert bool(MEMORY_WORDS[(id(array) >> 3) + 8] & module.WRITEABLE_FLAG) == array.flags.writeable
    array.flags.writeable = False
    assert not MEMORY_WORDS[(id(array) >> 3) + 8] & module.WRITEABLE_FLAG


# ---- other protocols


class Interface:
    """Only `__array_interface__`."""

    def __init__(self, array: np.ndarray[Any, Any]) -> None:
        self.array = array
        self.__array_interface__ = array.__array_interface__


def test_array_interface() -> None:
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    array.flags.writeable = False
    view = view_tensor(Interface(array), "k", MATRIX)
    assert (view.address, view.shape, view.strides, view.writeable) == (array.ctypes.data, (2, 3), (3, 1), False)


class Capsule:
    """An object with `__dlpack__`, its capsule written by hand as dlpack.h lays it out."""

    def __init__(
        self, data: np.ndarray[Any, Any], code: int, bits: int, lanes: int = 1, device: int = 1, offset: int = 0,
        strides: tuple[int, ...] | None = None, versioned: bool = False, flags: int = 0, major: int = 1,
        name: bytes | None = None,
    ) -> None:  # fmt: skip
        self.data = data
        rank = data.ndim
        self.shape = (ctypes.c_int64 * max(rank, 1))(*data.shape)
        self.strides = (ctypes.c_int64 * max(rank, 1))(*(strides or ()))
        tensor = struct.pack(
            "<QiiiBBHQQQ", data.ctypes.data, device, 0, rank, code, bits, lanes, ctypes.addressof(self.shape),
            ctypes.addressof(self.strides) if strides is not None else 0, offset,
        )  # fmt: skip
        head, tail = struct.pack("<IIQQQ", major, 1, 0, 0, flags), struct.pack("<QQ", 0, 0)
        managed = head + tensor if versioned else tensor + tail
        self.memory = ctypes.create_string_buffer(managed)
        self.name = name or (b"dltensor_versioned" if versioned else b"dltensor")
        self.device = device
        self.versioned = versioned

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device, 0

    def __dlpack__(self, **keywords: Any) -> Any:
        if keywords and not self.versioned:
            raise TypeError("no keyword arguments")
        new = ctypes.pythonapi.PyCapsule_New
        new.restype = ctypes.py_object
        new.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
        return new(ctypes.addressof(self.memory), self.name, None)


@pytest.mark.parametrize(("key", "name"), module._DLPACK_DTYPES.items())
@pytest.mark.parametrize("versioned", [False, True])
def test_dlpack_dtypes(key: tuple[int, int], name: str, versioned: bool) -> None:
    data = np.zeros((3, 4 * DTYPES[name].size_bytes), np.uint8)
    exporter = Capsule(data[:, :4], *key, offset=DTYPES[name].size_bytes, versioned=versioned)
    view = view_tensor(exporter, "k", Parameter("x", DTYPES[name], ("M", "N")))
    assert (view.address, view.shape, view.strides) == (data.ctypes.data + DTYPES[name].size_bytes, (3, 4), (4, 1))
    assert view.writeable


def test_dlpack_strides_and_flags() -> None:
    data = np.zeros((3, 4), np.float32)
    exporter = Capsule(data, 2, 32, strides=(1, 3), versioned=True, flags=1)
    view = view_tensor(exporter, "k", MATRIX)
    assert view.strides == (1, 3) and not view.writeable


def test_dlpack_scalar_tensor() -> None:
    assert view_tensor(Capsule(np.zeros((), np.float32), 2, 32), "k", Parameter("x", f32, ())).shape == ()


def test_dlpack_refusals() -> None:
    data = np.zeros((3, 4), np.float32)
    error = refused("device", lambda: view_tensor(Capsule(data, 2, 32, device=2), "k", MATRIX))
    assert "CUDA" in error.found
    refused("dtype", lambda: view_tensor(Capsule(data, 5, 64), "k", MATRIX))
    refused("dtype", lambda: view_tensor(Capsule(data, 2, 32, lanes=4), "k", MATRIX))
    refused("dtype", lambda: view_tensor(Capsule(data, 0, 32), "k", MATRIX))
    refused("export", lambda: view_tensor(Capsule(data, 2, 32, versioned=True, major=2), "k", MATRIX))
    refused("export", lambda: view_tensor(Capsule(data, 2, 32, name=b"used_dltensor"), "k", MATRIX))

    class Refuses:
        def __dlpack__(self, **keywords: Any) -> Any:
            raise BufferError("it requires grad")

    assert "requires grad" in refused("export", lambda: view_tensor(Refuses(), "k", MATRIX)).found


def test_torch_tensors_are_not_copied() -> None:
    torch = pytest.importorskip("torch")
    for theirs, ours in ((torch.float32, f32), (torch.bfloat16, bf16), (torch.float16, f16), (torch.bool, bool_),
                         (torch.int8, i8), (torch.float8_e4m3fn, DTYPES["f8e4m3"])):  # fmt: skip
        tensor = torch.zeros(4, 6, dtype=theirs)[1:].T
        try:
            view = view_tensor(tensor, "k", Parameter("x", ours, ("M", "N")))
        except ArgumentError:
            assert "float8" in str(theirs)  # older versions don't export these
            continue
        assert (view.address, view.shape, view.strides) == (tensor.data_ptr(), (6, 3), (1, 6))
    refused("export", lambda: view_tensor(torch.zeros(2, 2, requires_grad=True), "k", MATRIX))
    refused("dtype", lambda: view_tensor(torch.zeros(2, 2, dtype=torch.complex64), "k", MATRIX))
    turned = torch.zeros(2, 2, dtype=torch.complex64).conj().imag  # its elements in memory have the other sign
    assert refused("export", lambda: view_tensor(turned, "k", MATRIX)).mend == "x.resolve_neg()"


def test_capsule_outlives_the_tensor() -> None:
    torch = pytest.importorskip("torch")
    view = view_tensor(torch.full((1 << 20,), 7.0), "k", Parameter("x", f32, ("M",)))
    assert ctypes.c_float.from_address(view.address + 4000).value == 7.0


# ---- refusals


@pytest.mark.parametrize("value", [None, 3, 2.5, [[1.0]], "text", np.float32(3), b"abcd", object()])
def test_wrong_type(value: object) -> None:
    error = refused("type", lambda: view_tensor(value, "k", MATRIX))
    assert ("numpy.asarray(x, numpy.float32)" if isinstance(value, (int, float, list)) else "NumPy array") in error.mend


def test_a_device_that_cannot_be_named() -> None:
    class Elsewhere:
        def __dlpack__(self) -> None: ...

        def __dlpack_device__(self) -> None:
            raise ValueError("Unknown device type meta")

    assert "device type meta" in refused("device", lambda: view_tensor(Elsewhere(), "k", MATRIX)).found


@pytest.mark.parametrize("broken", [
    "no dictionary", {"shape": (2, 2), "typestr": "<f4", "version": 3},
    {"shape": (2, 2), "typestr": "<f4", "version": 3, "data": (0, False)},
    {"shape": (-2, 2), "typestr": "<f4", "version": 3, "data": (4096, False)},
], ids=str)
def test_an_array_interface_that_means_nothing(broken: object) -> None:
    class Broken:
        __array_interface__ = broken

    assert "__array_interface__" in refused("export", lambda: view_tensor(Broken(), "k", MATRIX)).found


@pytest.mark.parametrize("dtype", ["float64", "int32", "complex64", "U3", "datetime64[s]", [("a", "f4")], "object"])
def test_wrong_dtype(dtype: Any) -> None:
    error = refused("dtype", lambda: view_tensor(np.zeros((2, 2), dtype), "k", MATRIX))
    assert "numpy.float32" in error.mend


def test_mend_names_the_module_of_the_dtype() -> None:
    error = refused("dtype", lambda: view_tensor(np.zeros(2, np.uint16), "k", Parameter("x", bf16, ("M",))))
    assert "ml_dtypes.bfloat16" in error.mend


def test_foreign_byte_order() -> None:
    refused("byte-order", lambda: view_tensor(np.zeros((2, 2), ">f4"), "k", MATRIX))


def test_strides_within_elements() -> None:
    raw = np.zeros(100, np.uint8)
    odd = np.ndarray((3, 2), np.float32, raw, 0, (10, 4))
    refused("stride", lambda: view_tensor(odd, "k", MATRIX))
    assert view_tensor(np.ndarray((1, 2), np.float32, raw, 0, (10, 4)), "k", MATRIX).strides == (1, 1)


def test_counts_ranks_and_extents() -> None:
    kernel = signature(Parameter("a", f32, ("M", "K")), Parameter("b", f32, ("K", 4)), Parameter("s", f32, None))
    a, b = np.zeros((2, 3), np.float32), np.zeros((3, 4), np.float32)
    assert kernel.bind((a, b, 1.0)).dims == {"M": 2, "K": 3}
    error = refused("count", lambda: kernel.bind((a, b)))
    assert "a, b, s" in error.expected and "none for s" in error.found
    refused("rank", lambda: kernel.bind((a[0], b, 1.0)))
    error = refused("shape", lambda: kernel.bind((a, b[:2], 1.0)))
    assert "K = 2" in error.found and "as in `a`" in error.expected
    refused("shape", lambda: kernel.bind((a, b[:, :3], 1.0)))
    huge = np.broadcast_to(np.float32(0), (2**31, 1))
    refused("shape", lambda: kernel.bind((huge, b[:1], 1.0)))


def test_alignment() -> None:
    raw = np.zeros(64, np.uint8)
    raw = raw[-raw.ctypes.data % 64 :]
    unaligned = raw[1:9].view(np.float32)
    refused("alignment", lambda: signature(Parameter("x", f32, ("M",))).bind((unaligned,)))
    signature(Parameter("x", f32, ("M",))).bind((unaligned[:0],))


def check(kernel: Signature, *arguments: Any, stored: tuple[str, ...] = ("out",)) -> None:
    kernel.check_stores(kernel.bind(arguments), stored)


COPY = signature(Parameter("a", f32, ("M",)), Parameter("out", f32, ("M",)))


def test_read_only_output() -> None:
    a, out = np.zeros(4, np.float32), np.zeros(4, np.float32)
    a.flags.writeable = False
    check(COPY, a, out)
    out.flags.writeable = False
    refused("read-only", lambda: check(COPY, a, out))


def test_output_whose_elements_share_memory() -> None:
    a = np.zeros(4, np.float32)
    refused("self-overlap", lambda: check(COPY, a, as_strided(np.zeros(1, np.float32), (4,), (0,))))


def test_overlapping_output() -> None:
    memory = np.zeros(16, np.float32)
    check(COPY, memory[:8], memory[8:])
    check(COPY, memory[::2], memory[1::2])  # interleaved, no byte in common
    check(COPY, memory[:0], memory[0:0])
    assert "`a`" in refused("overlap", lambda: check(COPY, memory[:8], memory[7:15])).found
    refused("overlap", lambda: check(COPY, memory[:8], memory[:8]))
    two = signature(Parameter("out", f32, ("M",)), Parameter("other", f32, ("M",)))
    refused("overlap", lambda: check(two, memory[:4], memory[3:7], stored=("out", "other")))


def test_in_place() -> None:
    kernel = Signature("k", COPY.parameters, [("out", "a")])
    memory = np.zeros(16, np.float32)
    check(kernel, memory[:8], memory[:8])
    refused("overlap", lambda: check(kernel, memory[:8], memory[1:9]))


# ---- scalars


def scalar(dtype: Any, value: Any) -> int:
    return scalar_word(value, "k", Parameter("s", dtype, None))


def test_scalar_words() -> None:
    assert scalar(f32, 1.5) == 0x3FC00000
    assert scalar(f32, -0.0) == 0x80000000  # the high half stays clear
    assert scalar(f32, 2) == 0x40000000
    assert scalar(f32, np.float32(1.5)) == scalar(f32, np.array(1.5)) == 0x3FC00000
    assert scalar(f32, math.inf) == 0x7F800000
    assert scalar(f64, -2.0) == struct.unpack("<q", struct.pack("<d", -2.0))[0]
    assert scalar(f16, 1.0 / 3) == struct.unpack("<I", np.float32(np.float16(1 / 3)).tobytes())[0]
    assert scalar(bf16, 1.0 / 3) == struct.unpack("<I", np.float32(ml_dtypes.bfloat16(1 / 3)).tobytes())[0]
    assert scalar(i32, -5) == -5 and scalar(i64, -(2**63)) == -(2**63) and scalar(u8, np.uint8(200)) == 200
    assert scalar(bool_, True) == scalar(bool_, np.True_) == 1


@pytest.mark.parametrize(
    ("dtype", "value"),
    [(i32, 1.0), (i32, True), (f32, "1"), (f32, True), (bool_, 1), (f32, None), (i64, np.float32(1)), (f32, [1.0]),
     (f32, np.zeros(1, np.float32))],
)  # fmt: skip
def test_scalar_of_a_wrong_kind(dtype: Any, value: Any) -> None:
    refused("scalar", lambda: scalar(dtype, value))


@pytest.mark.parametrize(
    ("dtype", "value"), [(i32, 2**31), (i32, -(2**31) - 1), (u8, -1), (u8, 256), (i8, 128), (i64, 2**63), (f32, 1e39),
                         (f32, 10**400), (f64, 10**400), (f16, 70000), (bf16, -1e39)]
)
def test_scalar_out_of_range(dtype: Any, value: Any) -> None:
    error = refused("range", lambda: scalar(dtype, value))
    assert "nearer to 0" in error.mend and ("declare" in error.mend) == (dtype.bits < 64)


# ---- geometry


layouts = st.lists(st.tuples(st.integers(0, 4), st.integers(-8, 8)), max_size=4).map(
    lambda pairs: (tuple(s for s, _ in pairs), tuple(t for _, t in pairs))
)


def offsets(shape: tuple[int, ...], strides: tuple[int, ...]) -> list[int]:
    return [sum(i * s for i, s in zip(at, strides, strict=True)) for at in itertools.product(*map(range, shape))]


@settings(max_examples=examples(200))
@given(layouts)
def test_geometry_of_strides(layout: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    shape, strides = layout
    places = offsets(shape, strides)
    low, high = extent_bytes(shape, strides, 4)
    assert (low, high) == ((min(places) * 4, max(places) * 4 + 4) if places else (0, 0))
    if is_contiguous(shape, strides):
        assert places == list(range(len(places)))
    else:
        assert places and places != list(range(len(places)))
    if is_injective(shape, strides):
        assert len(set(places)) == len(places)
    if len(set(places)) < len(places):
        assert not is_injective(shape, strides)


@settings(max_examples=examples(200))
@given(st.integers(0, 10), layouts, st.integers(0, 10), layouts)
def test_overlap_is_exactly_shared_memory(
    start: int, mine: tuple[tuple[int, ...], tuple[int, ...]], other_start: int, other: tuple[Any, Any]
) -> None:
    memory = np.zeros(400, np.float32)
    arrays = [
        as_strided(memory[200 + s :], shape, [4 * t for t in strides])
        for s, (shape, strides) in ((start, mine), (other_start, other))
    ]
    if not is_injective(*mine):
        return
    names = ["M", "N", "P", "Q", "R", "S", "T", "U"]
    kernel = signature(
        Parameter("out", f32, tuple(names[: len(mine[0])])), Parameter("b", f32, tuple(names[4 : 4 + len(other[0])]))
    )
    if np.shares_memory(*arrays):
        refused("overlap", lambda: check(kernel, *arrays))
    else:
        check(kernel, *arrays)


# ---- words


def test_words_in_the_order_of_slots() -> None:
    kernel = signature(Parameter("a", f32, ("M", "K")), Parameter("n", i32, None), Parameter("x", f32, None))
    array = np.zeros((6, 8), np.float32)[::2, 1:]
    binding = kernel.bind((array, -3, 1.0))
    slots = ("dim.K", "a.stride.1", "a.stride.0", "scalar.n", "a.data", "dim.M", "scalar.x")
    assert fill_words(kernel, slots, binding) == [7, 1, 16, -3, array.ctypes.data, 3, 0x3F800000]
    assert fill_words(kernel, ("a.data",), binding, lambda position: 1234) == [1234]
    with pytest.raises(ValueError, match=r"dim\.Q"):
        fill_words(kernel, ("dim.Q",), binding)


def test_parameter_of_ir_types() -> None:
    assert Parameter.of("a", TensorType(f32, ("M", 3))) == Parameter("a", f32, ("M", 3))
    assert Parameter.of("s", TileType(i64)) == Parameter("s", i64, None)
