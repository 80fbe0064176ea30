"""PTX to code of a device, kept on disk; kernels of it; tensor maps.

Enters: PTX text. Leaves: a loaded `Module` and its `Function`s. Holds: the driver's compiler sees a text once for each
driver and kind of device: its result, a cubin, is an entry of the disk cache under PTX, driver and device, whole or
absent (runtime/cache.py). What the driver no longer takes is made anew. Only what moves registers between warps is
given to the driver as text (see WHOLE), which it keeps in a cache of its own, by the same three.
Source: CUDA Driver API 13, "Module Management", "Execution Control", "Tensor Map Object Management".
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Sequence
from typing import Any

import numpy

from ..cache import disk_cache
from ..dtypes import numpy_dtype
from ..errors import LaunchError
from .driver import CudaError, Device, device
from .memory import DeviceArray
from .streams import destroy, handle_of

LOG_BYTES = 16 << 10
PLAIN_SHARED_BYTES = 48 << 10
"""More dynamic shared memory than this is only had by asking (CUDA C++ Programming Guide, 16.7)."""
WHOLE = "setmaxnreg"
"""A text with this instruction must be compiled as a whole. The driver gives cubins out only of its linker, which
compiles relocatable code, and there the instruction is ignored: ptxas -c says so (C7504), 13.0."""
STALE = ("CUDA_ERROR_INVALID_IMAGE", "CUDA_ERROR_NO_BINARY_FOR_GPU", "CUDA_ERROR_INVALID_SOURCE")
MAP_BYTES, MAP_ALIGN_BYTES = 128, 64
MAP_DTYPES = {"bf16": "BFLOAT16", "f16": "FLOAT16", "f32": "FLOAT32", "f64": "FLOAT64", "i32": "INT32", "i64": "INT64",
              "i16": "UINT16", "i8": "UINT8", "u8": "UINT8", "f8e4m3": "UINT8", "f8e5m2": "UINT8"}


class TensorMap:
    """What tensor copies know of a tensor in C order. box: elements of a tile, by dimension. swizzle_bytes: of the rows
    over which 16-byte chunks are permuted in shared memory; 0: not at all. `data`: the map's 128 bytes."""

    def __init__(self, tensor: DeviceArray, box: Sequence[int], swizzle_bytes: int = 0) -> None:
        self.tensor = tensor
        self.data = encode_map(tensor.device, tensor.address, tensor.dtype.name, tensor.shape, box, swizzle_bytes)


_Encode = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32, ctypes.c_void_p, *[ctypes.c_void_p] * 4,
    *[ctypes.c_int] * 4)
"""cuTensorMapEncodeTiled: map, dtype, rank; address; extents, strides, box, steps; interleave, swizzle, L2, fill."""


def encode_map(on: Device, address: int, dtype: str, shape: Sequence[int], box: Sequence[int],
               swizzle_bytes: int) -> bytes:
    """The 128 bytes of a tensor map. shape, box: as the array has them, the contiguous dimension last. Boxes
    are zero outside of the tensor. Raises CudaError where the driver refuses addresses, strides or boxes.

    The driver wants the map at a multiple of 64, and objects of cuda-bindings lie at multiples of 16: so it is called
    by its address.
    """
    call, size_bytes = on.call, numpy_dtype(dtype).itemsize
    extents, steps = list(shape)[::-1], []
    for extent in extents[:-1]:
        size_bytes *= extent
        steps.append(size_bytes)
    rank = len(extents)
    memory, at = aligned_memory(MAP_BYTES)
    constants = [int(call.enumeration(f"CUtensorMap{kind}", f"CU_TENSOR_MAP_{name}")) for kind, name in (
        ("DataType", f"DATA_TYPE_{MAP_DTYPES[dtype]}"), ("Interleave", "INTERLEAVE_NONE"),
        ("Swizzle", f"SWIZZLE_{f'{swizzle_bytes}B' if swizzle_bytes else 'NONE'}"),
        ("L2promotion", "L2_PROMOTION_L2_128B"), ("FloatOOBfill", "FLOAT_OOB_FILL_NONE"))]
    with on.current():
        call.check("cuTensorMapEncodeTiled", _Encode(call.pointer("cuTensorMapEncodeTiled", 12000))(
            at, constants[0], rank, address, (ctypes.c_uint64 * rank)(*extents), (ctypes.c_uint64 * rank)(*steps),
            (ctypes.c_uint32 * rank)(*list(box)[::-1]), (ctypes.c_uint32 * rank)(*[1] * rank), *constants[1:]))
    return bytes(memory.raw[at - ctypes.addressof(memory):][:MAP_BYTES])


def aligned_memory(size_bytes: int) -> tuple[Any, int]:
    """Memory of the host for tensor maps, and the first address in it that is a multiple of MAP_ALIGN_BYTES."""
    memory = ctypes.create_string_buffer(size_bytes + MAP_ALIGN_BYTES)
    return memory, -(-ctypes.addressof(memory) // MAP_ALIGN_BYTES) * MAP_ALIGN_BYTES


class Parameters:
    """A kernel's parameters, as the driver takes them: an array of their addresses.

    Bytes of each one lie at a multiple of 8, of a tensor map at one of 64. words: those of 64 bits from the start, to
    be written before a launch.
    """

    def __init__(self, words: Sequence[int], maps: Sequence[bytes] = ()) -> None:
        start = -(-8 * len(words) // MAP_ALIGN_BYTES) * MAP_ALIGN_BYTES
        self._memory, base = aligned_memory(start + MAP_BYTES * len(maps))
        self.words = (ctypes.c_int64 * len(words)).from_address(base)
        self.words[:] = [_signed(word) for word in words]
        places = [base + 8 * i for i in range(len(words))]
        for number, data in enumerate(maps):
            places.append(base + start + MAP_BYTES * number)
            ctypes.memmove(places[-1], data, MAP_BYTES)
        self._places = (ctypes.c_void_p * len(places))(*places)

    @property
    def address(self) -> int:
        return ctypes.addressof(self._places)


def _signed(word: int) -> int:
    return word - (1 << 64) if word >= 1 << 63 else word


class Function:
    """A kernel of a module."""

    def __init__(self, module: Module, name: str) -> None:
        self.module, self.name, self.device = module, name, module.device
        call = self.device.call
        with self.device.current():
            self.handle = call("cuModuleGetFunction", module.handle, name.encode())
        self._shared_bytes = PLAIN_SHARED_BYTES

    def allow_shared(self, size_bytes: int) -> None:
        """Let blocks have so much dynamic shared memory. Raises CudaError where the device has less."""
        if size_bytes > self._shared_bytes:
            kind = "CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES"
            with self.device.current():
                self.device.call("cuFuncSetAttribute", self.handle,
                                 self.device.call.enumeration("CUfunction_attribute", kind), size_bytes)
            self._shared_bytes = size_bytes

    def resident_blocks(self, threads: int, shared_bytes: int, cluster: int = 1) -> int:
        """Blocks that the device holds at once, in whole clusters: these need processors of one group."""
        self.allow_shared(shared_bytes)
        with self.device.current():
            if cluster > 1:
                config = self._config((cluster,), (threads,), shared_bytes, (cluster,))
                return int(self.device.call("cuOccupancyMaxActiveClusters", self.handle, config)) * cluster
            each = self.device.call("cuOccupancyMaxActiveBlocksPerMultiprocessor", self.handle, threads, shared_bytes)
        return int(each) * self.device.processors

    def __call__(self, grid: Sequence[int], block: Sequence[int], arguments: Sequence[Any], shared_bytes: int = 0,
                 cluster: Sequence[int] = (), cooperative: bool = False, stream: Any = None) -> None:
        """Launch it. grid: blocks; block: threads; cluster: blocks; each of up to three dimensions. arguments: device
        arrays, integers and addresses, scalars of NumPy, and after these tensor maps."""
        words, maps = [], []
        for argument in arguments:
            if isinstance(argument, TensorMap):
                maps.append(argument.data)
                continue
            if maps:
                raise LaunchError(f"{self.name}: found {type(argument).__name__} after a tensor map; expected the maps "
                                  "last; mend: order the kernel's parameters so")
            words.append(_word(argument, self.name))
        self.launch(grid, block, Parameters(words, maps), shared_bytes, cluster, cooperative, stream)

    def launch(self, grid: Sequence[int], block: Sequence[int], parameters: Parameters, shared_bytes: int = 0,
               cluster: Sequence[int] = (), cooperative: bool = False, stream: Any = None) -> None:
        self.allow_shared(shared_bytes)
        config = self._config(grid, block, shared_bytes, cluster, cooperative)
        config.hStream = handle_of(self.device, stream)
        with self.device.current():
            self.device.call("cuLaunchKernelEx", config, self.handle, parameters.address, 0)

    def _config(self, grid: Sequence[int], block: Sequence[int], shared_bytes: int, cluster: Sequence[int],
                cooperative: bool = False) -> Any:
        config = self.device.call.api.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = (*grid, 1, 1)[:3]
        config.blockDimX, config.blockDimY, config.blockDimZ = (*block, 1, 1)[:3]
        config.sharedMemBytes = shared_bytes
        attributes = []
        if cluster:
            size = self._attribute("CLUSTER_DIMENSION")
            wanted = size.value
            wanted.clusterDim.x, wanted.clusterDim.y, wanted.clusterDim.z = (*cluster, 1, 1)[:3]
            size.value = wanted
            attributes.append(size)
        if cooperative:
            together = self._attribute("COOPERATIVE")
            wanted = together.value
            wanted.cooperative = 1
            together.value = wanted
            attributes.append(together)
        config.attrs, config.numAttrs = attributes, len(attributes)
        return config

    def _attribute(self, name: str) -> Any:
        made = self.device.call.api.CUlaunchAttribute()
        made.id = self.device.call.enumeration("CUlaunchAttributeID", f"CU_LAUNCH_ATTRIBUTE_{name}")
        return made


def _word(argument: Any, kernel: str) -> int:
    """An argument as 64 bits, of which a smaller parameter takes the low ones."""
    if isinstance(argument, DeviceArray):
        return argument.address
    if isinstance(argument, numpy.generic):
        return int.from_bytes(argument.tobytes(), "little")
    if isinstance(argument, (bool, int)):
        return int(argument) & (1 << 64) - 1
    raise LaunchError(f"{kernel}: found an argument {type(argument).__name__}; expected a device array, an integer, a "
                      "scalar of NumPy or a TensorMap; mend: numpy.float32(x), cuda.array(x)")


class Module:
    """Code that a device has loaded: `module["name"]` is a kernel of it."""

    def __init__(self, on: Device, image: bytes) -> None:
        """image: a cubin, or PTX with a zero byte after it. Raises LaunchError with what the compiler says of PTX."""
        self.device = on
        with on.current(), _Log(on) as log:
            self.handle: Any = on.call("cuModuleLoadDataEx", image, len(log.options), log.options, log.values)
        self._functions: dict[str, Function] = {}

    def __getitem__(self, name: str) -> Function:
        found = self._functions.get(name)
        if found is None:
            found = self._functions[name] = Function(self, name)
        return found

    def __del__(self) -> None:
        destroy(self, "cuModuleUnload")


def load(text: str, on: Device | None = None) -> Module:
    """The module of a PTX text, ours or another's. Raises LaunchError with what the driver's compiler says of it."""
    on = on or device()
    if WHOLE in text:
        return Module(on, text.encode() + b"\0")
    cache = disk_cache()
    key = f"cubin with a name\n{on.driver_version}\n{on.name}\n{on.capability}\n{text}"
    packed = None if cache is None else cache.get(key)
    if packed is not None:
        try:
            return Module(on, packed.partition(b"\n")[2])
        except CudaError as error:
            if error.name not in STALE:
                raise
    cubin = assemble(on, text)
    if cache is not None:
        cache.put(key, json.dumps({"name": f"a module for {on.name}"}).encode() + b"\n" + cubin)
    return Module(on, cubin)


def assemble(on: Device, text: str) -> bytes:
    """PTX to a cubin by the driver's compiler, which can take seconds."""
    call, image = on.call, text.encode() + b"\0"
    with on.current(), _Log(on) as log:
        state = call("cuLinkCreate", len(log.options), log.options, log.values)
        try:
            call("cuLinkAddData", state, call.enumeration("CUjitInputType", "CU_JIT_INPUT_PTX"), image, len(image),
                 b"kernel.ptx", 0, [], [])
            address, size_bytes = call("cuLinkComplete", state)
            return ctypes.string_at(int(address), int(size_bytes))
        finally:
            call("cuLinkDestroy", state)


class _Log:
    """Has the driver's compiler write what it finds wrong, and adds that to its error. options, values: for a call."""

    def __init__(self, on: Device) -> None:
        self._name, self._text = on.name, bytearray(LOG_BYTES)
        self.options = [on.call.enumeration("CUjit_option", f"CU_JIT_{name}") for name in
                        ("ERROR_LOG_BUFFER", "ERROR_LOG_BUFFER_SIZE_BYTES")]
        self.values: list[Any] = [self._text, LOG_BYTES]

    def __enter__(self) -> _Log:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        said = bytes(self._text).split(b"\0", 1)[0].decode(errors="replace").strip()
        if said and isinstance(error, CudaError):
            raise LaunchError(f"{self._name}: {error}; its compiler says: {said}") from error
