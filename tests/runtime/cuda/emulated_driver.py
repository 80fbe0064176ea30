"""A libcuda.so.1 whose device is the emulator of PTX: what cuda-bindings passes arrives here as it would at the driver.

Enters: calls of the driver's C interface, made by the real cuda-bindings. Leaves: their results; kernels run on
`sapper.emulate`, over one device memory. Holds: parameters of a launch are read from the pointers that were passed,
with the sizes that the PTX declares; structures are read as cuda.h lays them out; a tensor map is made from the
arguments of its encoding, under the conditions that the CUDA Driver API names. `log` has every call that changes or
runs something.

The library itself is a few lines of assembly, which hand each look-up of a function to `EmulatedDriver.find`.
"""

from __future__ import annotations

import ctypes
import hashlib
import struct
import subprocess
import traceback
from collections.abc import Callable
from dataclasses import astuple
from pathlib import Path
from typing import Any, ClassVar

import ml_dtypes
import numpy as np

from sapper import emulate
from sapper.emulate.errors import EmulationError
from sapper.emulate.memory import GLOBAL_BASE, GlobalMemory
from sapper.emulate.tensor_map import TensorMap

STUB = """
.text
.globl cuGetProcAddress_v2
.type cuGetProcAddress_v2, @function
cuGetProcAddress_v2: mov sapper_find@GOTPCREL(%rip), %rax
 jmp *(%rax)
.data
.balign 8
.globl sapper_find
.type sapper_find, @object
.size sapper_find, 8
sapper_find: .quad 0
.section .note.GNU-stack,"",@progbits
"""
OUT_OF_MEMORY, INVALID_VALUE, INVALID_IMAGE, INVALID_PTX = 2, 1, 200, 218
INVALID_HANDLE, NOT_FOUND, LAUNCH_FAILED, TOO_LARGE = 400, 500, 719, 720
CAPTURE_UNSUPPORTED, CAPTURE_INVALIDATED, INVALID_CLUSTER = 900, 901, 912
NAMES = {0: "CUDA_SUCCESS", 1: "CUDA_ERROR_INVALID_VALUE", 2: "CUDA_ERROR_OUT_OF_MEMORY", 100: "CUDA_ERROR_NO_DEVICE",
         200: "CUDA_ERROR_INVALID_IMAGE", 218: "CUDA_ERROR_INVALID_PTX", 400: "CUDA_ERROR_INVALID_HANDLE",
         500: "CUDA_ERROR_NOT_FOUND", 719: "CUDA_ERROR_LAUNCH_FAILED",
         720: "CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE", 900: "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED",
         901: "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED", 912: "CUDA_ERROR_INVALID_CLUSTER_SIZE"}
DRIVER_VERSION = 13000
CUBIN = b"\x7fELF, as the emulated driver has it\n"
CAPABILITY_MAJOR, CAPABILITY_MINOR, PROCESSORS, SHARED_OPTIN = 75, 76, 16, 97
"""CUdevice_attribute, cuda.h."""
MAX_DYNAMIC_SHARED = 8
CLUSTER_DIMENSION, COOPERATIVE = 4, 2
"""CUlaunchAttributeID."""
MAP_DTYPES: dict[int, Any] = {0: np.uint8, 1: np.uint16, 2: np.uint32, 3: np.int32, 4: np.uint64, 5: np.int64,
                              6: np.float16, 7: np.float32, 8: np.float64, 9: ml_dtypes.bfloat16}
"""CUtensorMapDataType."""
RELAXED = 2
"""CUstreamCaptureMode: what might wait for a stream is allowed to the thread."""
LAUNCH_SECONDS = 0.02
"""What a launch takes between events: so much that few of them are enough for who takes times."""
P, I, U, Z = ctypes.c_void_p, ctypes.c_int, ctypes.c_uint, ctypes.c_size_t


class Config(ctypes.Structure):
    """CUlaunchConfig, cuda.h."""

    _fields_ = (("grid", U * 3), ("block", U * 3), ("shared", U), ("stream", P), ("attributes", P), ("count", U))


class Attribute(ctypes.Structure):
    """CUlaunchAttribute, cuda.h: the value starts at a multiple of 8 and has 64 bytes."""

    _fields_ = (("id", I), ("pad", ctypes.c_char * 4), ("value", U * 16))


class Refused(Exception):
    """A call that the driver answers with an error."""


class Capture:
    def __init__(self) -> None:
        self.nodes: list[Callable[[], None]] = []


class EmulatedDriver:
    """One device. options: of the emulator. log: (function, facts). refuse: function -> the error that it answers
    with. failure: what went wrong on our side. settled: launches that left what they found in memory, and that, which
    would only do so again."""

    SIGNATURES: ClassVar[dict[str, tuple[Any, ...]]] = {
        "cuInit": (U,), "cuDriverGetVersion": (P,), "cuDeviceGetCount": (P,), "cuDeviceGet": (P, I),
        "cuDeviceGetName": (P, I, I), "cuDeviceGetAttribute": (P, I, I), "cuGetErrorName": (I, P),
        "cuGetErrorString": (I, P), "cuDevicePrimaryCtxRetain": (P, I), "cuCtxGetCurrent": (P,),
        "cuCtxSetCurrent": (P,), "cuCtxGetDevice": (P,), "cuCtxSynchronize": (),
        "cuMemAlloc": (P, Z), "cuMemFree": (P,),
        "cuMemcpyHtoDAsync": (P, P, Z, P),
        "cuMemcpyDtoHAsync": (P, P, Z, P), "cuMemcpyDtoDAsync": (P, P, Z, P),
        "cuMemsetD8Async": (P, ctypes.c_ubyte, Z, P), "cuStreamCreate": (P, U),
        "cuStreamDestroy": (P,), "cuStreamSynchronize": (P,), "cuStreamWaitEvent": (P, P, U), "cuEventCreate": (P, U),
        "cuEventRecord": (P, P), "cuEventSynchronize": (P,), "cuEventElapsedTime": (P, P, P), "cuEventDestroy": (P,),
        "cuLinkCreate": (U, P, P, P), "cuLinkAddData": (P, I, P, Z, ctypes.c_char_p, U, P, P),
        "cuLinkComplete": (P, P, P), "cuLinkDestroy": (P,), "cuModuleLoadDataEx": (P, P, U, P, P),
        "cuModuleUnload": (P,),
        "cuModuleGetFunction": (P, P, ctypes.c_char_p), "cuFuncSetAttribute": (P, I, I),
        "cuOccupancyMaxActiveBlocksPerMultiprocessor": (P, P, I, Z), "cuOccupancyMaxActiveClusters": (P, P, P),
        "cuLaunchKernelEx": (P, P, P, P),
        "cuTensorMapEncodeTiled": (P, I, U, P, P, P, P, P, I, I, I, I), "cuStreamBeginCapture": (P, I),
        "cuThreadExchangeStreamCaptureMode": (P,),
        "cuStreamEndCapture": (P, P), "cuGraphInstantiateWithFlags": (P, P, ctypes.c_ulonglong),
        "cuGraphLaunch": (P, P), "cuGraphExecDestroy": (P,), "cuGraphDestroy": (P,),
    }

    def __init__(self, folder: Path) -> None:
        source, made = folder / "stub.s", folder / "libcuda.so.1"
        source.write_text(STUB)
        subprocess.run(["as", "-o", folder / "stub.o", source], check=True)
        subprocess.run(["ld", "-shared", "-soname", "libcuda.so.1", "-o", made, folder / "stub.o"], check=True)
        self.library = ctypes.CDLL(str(made), mode=ctypes.RTLD_GLOBAL)
        self.functions = {name: ctypes.CFUNCTYPE(I, *kinds)(self._answer(name)) for name, kinds in
                          self.SIGNATURES.items()}
        kind = ctypes.CFUNCTYPE(I, ctypes.c_char_p, P, I, ctypes.c_uint64, P)
        self._finder = kind(self.find)
        P.in_dll(self.library, "sapper_find").value = ctypes.cast(self._finder, P).value
        self.memory = GlobalMemory()
        self.objects: dict[int, Any] = {}
        self._texts = {code: ctypes.create_string_buffer(text.encode()) for code, text in NAMES.items()}
        self.reset()

    def reset(self, capability: tuple[int, int] = (9, 0), processors: int = 2) -> None:
        """Another kind of device. What is still held of earlier ones stays, and is freed when it goes."""
        self.capability, self.processors, self.shared_optin = capability, processors, 227 << 10
        self.version = DRIVER_VERSION
        self.log: list[tuple[str, Any]] = []
        self.context = 0
        self.captures: dict[int, Capture] = {}
        self.capture_mode = 0
        self.options = emulate.Options()
        self.failure: BaseException | None = None
        self.refuse: dict[str, int] = {}
        self.settled: set[tuple[Any, bytes]] = set()

    # ---- looking functions up

    def find(self, name: bytes, out: int, version: int, flags: int, status: int) -> int:
        """cuGetProcAddress: what is not known here is not found."""
        del version, flags
        text = name.decode()
        if text == "cuGetProcAddress":
            found = ctypes.cast(self.library.cuGetProcAddress_v2, P).value
        else:
            function = self.functions.get(text)
            found = None if function is None else ctypes.cast(function, P).value
        P.from_address(out).value = found
        if status:
            I.from_address(status).value = 0 if found else 1
        return 0

    def _answer(self, name: str) -> Callable[..., int]:
        method = getattr(self, name)

        def answer(*arguments: Any) -> int:
            try:
                if name in self.refuse:
                    return self.refuse[name]
                method(*arguments)
            except Refused as error:
                return int(error.args[0])
            except BaseException as error:  # no exception passes through C: the test asks for it
                self.failure = error
                traceback.print_exc()
                return LAUNCH_FAILED
            return 0

        return answer

    def new(self, value: Any) -> int:
        """A handle."""
        handle = 0x1000 + 16 * len(self.objects)
        self.objects[handle] = value
        return handle

    def use(self, handle: int | None, kind: type) -> Any:
        found = self.objects.get(handle or 0)
        if not isinstance(found, kind):
            raise Refused(INVALID_HANDLE)
        return found

    def need_context(self) -> None:
        if not self.context:
            raise Refused(201)

    # ---- devices

    def cuInit(self, flags: int) -> None:
        assert flags == 0

    def cuDriverGetVersion(self, out: int) -> None:
        I.from_address(out).value = self.version

    def cuDeviceGetCount(self, out: int) -> None:
        I.from_address(out).value = 1

    def cuDeviceGet(self, out: int, ordinal: int) -> None:
        if ordinal:
            raise Refused(101)
        I.from_address(out).value = ordinal

    def cuDeviceGetName(self, out: int, size: int, device: int) -> None:
        del device
        ctypes.memmove(out, b"Emulated\0", min(size, 9))

    def cuDeviceGetAttribute(self, out: int, kind: int, device: int) -> None:
        del device
        I.from_address(out).value = {CAPABILITY_MAJOR: self.capability[0], CAPABILITY_MINOR: self.capability[1],
                                     PROCESSORS: self.processors, SHARED_OPTIN: self.shared_optin}[kind]

    def cuGetErrorName(self, code: int, out: int) -> None:
        if code not in NAMES:
            raise Refused(INVALID_VALUE)
        P.from_address(out).value = ctypes.addressof(self._texts[code])

    cuGetErrorString = cuGetErrorName

    def cuDevicePrimaryCtxRetain(self, out: int, device: int) -> None:
        P.from_address(out).value = 0x77000 + device

    def cuCtxGetCurrent(self, out: int) -> None:
        P.from_address(out).value = self.context

    def cuCtxSetCurrent(self, context: int | None) -> None:
        self.context = context or 0

    def cuCtxGetDevice(self, out: int) -> None:
        self.need_context()
        I.from_address(out).value = 0

    def cuCtxSynchronize(self) -> None:
        self.need_context()

    # ---- memory

    def cuMemAlloc(self, out: int, size_bytes: int) -> None:
        self.need_context()
        if self.captures:
            raise Refused(CAPTURE_UNSUPPORTED)
        address = self.memory.allocate(size_bytes)
        P.from_address(out).value = address
        self.log.append(("alloc", (address, size_bytes)))

    def cuMemFree(self, address: int) -> None:
        if self.captures and self.capture_mode != RELAXED:
            self.captures.clear()
            raise Refused(CAPTURE_UNSUPPORTED)
        self.memory.free(address)
        self.log.append(("free", address))

    def _place(self, address: int | None, size_bytes: int) -> slice:
        offset = (address or 0) - GLOBAL_BASE
        if self.memory.outside(np.array([offset]), size_bytes) is not None:
            raise Refused(INVALID_VALUE)
        return slice(offset, offset + size_bytes)

    def cuMemcpyHtoDAsync(self, target: int, source: int, size_bytes: int, stream: int | None) -> None:
        self.need_context()
        place = self._place(target, size_bytes)
        self.memory.bytes[place] = np.frombuffer(ctypes.string_at(source, size_bytes), np.uint8)
        self.memory.written[place] = 1
        self.log.append(("to device", (stream or 0, size_bytes)))

    def cuMemcpyDtoHAsync(self, target: int, source: int, size_bytes: int, stream: int | None) -> None:
        self.need_context()
        ctypes.memmove(target, self.memory.bytes[self._place(source, size_bytes)].tobytes(), size_bytes)
        self.log.append(("to host", (stream or 0, size_bytes)))

    def cuMemcpyDtoDAsync(self, target: int, source: int, size_bytes: int, stream: int | None) -> None:
        self.need_context()
        self.memory.bytes[self._place(target, size_bytes)] = self.memory.bytes[self._place(source, size_bytes)]
        self.memory.written[self._place(target, size_bytes)] = 1
        self.log.append(("copy", (stream or 0, size_bytes)))

    def cuMemsetD8Async(self, target: int, value: int, count: int, stream: int | None) -> None:
        self.need_context()
        self.log.append(("set", (self._stream(stream), count)))
        place = self._place(target, count)
        self.memory.bytes[place], self.memory.written[place] = value, 1

    def _contents(self) -> bytes:
        """A digest of what is allocated, and of what stands there."""
        memory = self.memory
        digest = hashlib.blake2b()
        for start, end in zip(memory.starts, memory.ends, strict=True):
            digest.update(struct.pack("<qq", start, end))
            digest.update(memory.bytes[start:end])
            digest.update(memory.written[start:end])
        return digest.digest()

    # ---- streams, events, graphs

    def _stream(self, handle: int | None) -> int:
        if handle not in (None, 0, 1, 2):
            self.use(handle, str)
        return handle or 0

    def cuStreamCreate(self, out: int, flags: int) -> None:
        assert flags == 1  # CU_STREAM_NON_BLOCKING
        P.from_address(out).value = self.new("stream")

    def cuStreamDestroy(self, stream: int) -> None:
        self.use(stream, str)
        self.objects[stream] = None
        self.log.append(("destroy", stream))

    def cuStreamSynchronize(self, stream: int | None) -> None:
        if self.captures.pop(stream or 0, None) is not None:
            raise Refused(CAPTURE_UNSUPPORTED)
        self.log.append(("synchronize", self._stream(stream)))

    def cuStreamWaitEvent(self, stream: int | None, event: int, flags: int) -> None:
        assert flags == 0
        self.log.append(("wait", (self._stream(stream), self.use(event, list)[0])))

    def cuEventCreate(self, out: int, flags: int) -> None:
        assert flags == 0
        P.from_address(out).value = self.new([None, 0])

    def cuEventRecord(self, event: int, stream: int | None) -> None:
        done = len(self.log) - sum(kind == "record" for kind, _ in self.log)
        self.use(event, list)[:] = self._stream(stream), done
        self.log.append(("record", self._stream(stream)))

    def cuEventSynchronize(self, event: int) -> None:
        self.use(event, list)

    def cuEventElapsedTime(self, out: int, start: int, end: int) -> None:
        """LAUNCH_SECONDS for each thing logged between but such events."""
        things = self.use(end, list)[1] - self.use(start, list)[1]
        ctypes.c_float.from_address(out).value = things * LAUNCH_SECONDS * 1000

    def cuEventDestroy(self, event: int) -> None:
        self.use(event, list)
        self.objects[event] = None

    def cuStreamBeginCapture(self, stream: int, mode: int) -> None:
        assert mode == 1  # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self.captures[self._stream(stream)] = Capture()

    def cuThreadExchangeStreamCaptureMode(self, mode: int) -> None:
        place = I.from_address(mode)
        place.value, self.capture_mode = self.capture_mode, place.value

    def cuStreamEndCapture(self, stream: int, out: int) -> None:
        if stream not in self.captures:
            raise Refused(CAPTURE_INVALIDATED)
        P.from_address(out).value = self.new(self.captures.pop(self._stream(stream)))

    def cuGraphInstantiateWithFlags(self, out: int, graph: int, flags: int) -> None:
        assert flags == 0
        P.from_address(out).value = self.new(tuple(self.use(graph, Capture).nodes))

    def cuGraphLaunch(self, graph: int, stream: int | None) -> None:
        self.log.append(("graph", self._stream(stream)))
        for node in self.use(graph, tuple):
            node()

    def cuGraphExecDestroy(self, graph: int) -> None:
        self.use(graph, tuple)
        self.objects[graph] = None

    def cuGraphDestroy(self, graph: int) -> None:
        self.use(graph, Capture)
        self.objects[graph] = None

    # ---- modules

    def cuLinkCreate(self, count: int, options: int, values: int, out: int) -> None:
        P.from_address(out).value = self.new({"log": self._log(count, options, values)})

    @staticmethod
    def _log(count: int, options: int, values: int) -> tuple[int, int]:
        kinds, given = (I * count).from_address(options), (P * count).from_address(values)
        found = dict(zip(kinds, given, strict=True))
        assert set(found) == {5, 6}, found  # CU_JIT_ERROR_LOG_BUFFER, its size
        return found[5], found[6]

    def _compile(self, text: bytes, log: tuple[int, int]) -> emulate.Module:
        try:
            module = emulate.load(text.decode())
        except emulate.ParseError as error:
            where, most = log
            said = str(error).encode()[:most - 1]
            ctypes.memmove(where, said + b"\0", len(said) + 1)
            raise Refused(INVALID_PTX) from error
        self.log.append(("compile", len(text)))
        return module

    def cuLinkAddData(self, state: int, kind: int, data: int, size: int, name: bytes, count: int,
                      *options: Any) -> None:
        assert kind == 1 and count == 0 and name, options  # CU_JIT_INPUT_PTX
        found = self.use(state, dict)
        text = ctypes.string_at(data, size)
        assert text[-1] == 0, "PTX must end with a zero byte"
        self._compile(text[:-1], found["log"])
        found["cubin"] = ctypes.create_string_buffer(CUBIN + text[:-1])

    def cuLinkComplete(self, state: int, out: int, size: int) -> None:
        cubin = self.use(state, dict)["cubin"]
        P.from_address(out).value = ctypes.addressof(cubin)
        Z.from_address(size).value = len(cubin)

    def cuLinkDestroy(self, state: int) -> None:
        """What the state owns is gone."""
        cubin = self.use(state, dict).pop("cubin", None)
        if cubin is not None:
            ctypes.memset(cubin, 0, len(cubin))
        self.objects[state] = None

    def cuModuleLoadDataEx(self, out: int, image: int, count: int, options: int, values: int) -> None:
        """A cubin, or PTX."""
        self.need_context()
        text, log = ctypes.string_at(image), self._log(count, options, values)
        if text.startswith(CUBIN):
            module = emulate.load(text[len(CUBIN):].decode())
        elif b".version" in text:
            module = self._compile(text, log)
        else:
            raise Refused(INVALID_IMAGE)
        P.from_address(out).value = self.new(module)
        self.log.append(("load", len(text)))

    def cuModuleUnload(self, module: int) -> None:
        self.use(module, emulate.Module)
        self.objects[module] = None

    def cuModuleGetFunction(self, out: int, module: int, name: bytes) -> None:
        found = self.use(module, emulate.Module)
        if name.decode() not in found.kernels:
            raise Refused(NOT_FOUND)
        P.from_address(out).value = self.new([found, name.decode(), 48 << 10])

    def cuFuncSetAttribute(self, function: int, kind: int, value: int) -> None:
        assert kind == MAX_DYNAMIC_SHARED
        if value > self.shared_optin:
            raise Refused(INVALID_VALUE)
        self.use(function, list)[2] = value

    def cuOccupancyMaxActiveBlocksPerMultiprocessor(self, out: int, function: int, threads: int, shared: int) -> None:
        self.use(function, list)
        I.from_address(out).value = self._blocks_of_processor(threads, shared)

    def _blocks_of_processor(self, threads: int, shared: int) -> int:
        return min(2048 // threads, 2, self.shared_optin // max(shared, 1))

    def cuOccupancyMaxActiveClusters(self, out: int, function: int, config: int) -> None:
        """Of a device whose processors are one group."""
        self.use(function, list)
        given = Config.from_address(config)
        (found,) = (Attribute * given.count).from_address(given.attributes)
        assert found.id == CLUSTER_DIMENSION and not given.stream
        each = self._blocks_of_processor(given.block[0], given.shared)
        I.from_address(out).value = each * self.processors // found.value[0]

    def cuLaunchKernelEx(self, config: int, function: int, parameters: int, extra: int | None) -> None:
        self.need_context()
        assert not extra
        module, name, allowed = self.use(function, list)
        given = Config.from_address(config)
        grid, block, stream = tuple(given.grid), tuple(given.block), self._stream(given.stream)
        cluster, cooperative = None, False
        for found in (Attribute * given.count).from_address(given.attributes) if given.count else ():
            if found.id == CLUSTER_DIMENSION:
                cluster = tuple(found.value[:3])
            else:
                assert found.id == COOPERATIVE, found.id
                cooperative = found.value[0] == 1
        threads, blocks = int(np.prod(block)), int(np.prod(grid))
        if given.shared > allowed or not 0 < threads <= 1024 or max(grid[1:]) > 65535 or not blocks:
            raise Refused(INVALID_VALUE)
        if cooperative and blocks > self.processors * self._blocks_of_processor(threads, given.shared):
            raise Refused(TOO_LARGE)
        declared = module.parsed.functions[name].required_cluster
        if cluster and (int(np.prod(cluster)) > 8 or any(g % c for g, c in zip(grid, cluster, strict=True))
                        or (declared and (*declared, 1, 1)[:3] != cluster)):
            raise Refused(INVALID_CLUSTER)
        wanted = module.parsed.functions[name].parameters
        places = (P * len(wanted)).from_address(parameters)
        pieces = [ctypes.string_at(place, each.size_bytes) for place, each in zip(places, wanted, strict=True)]
        facts = {"kernel": name, "grid": grid, "block": block, "shared": given.shared, "stream": stream,
                 "cluster": cluster, "cooperative": cooperative,
                 "words": [struct.unpack("<q", piece)[0] for piece in pieces if len(piece) == 8]}

        def run() -> None:
            self.log.append(("launch", facts))
            before = self._contents()
            told = (module, name, grid, block, tuple(pieces), facts["shared"], cluster, cooperative,
                    astuple(self.options))
            if (told, before) in self.settled:
                return
            module.launch(name, grid=grid, block=block, arguments=pieces, shared_bytes=facts["shared"], cluster=cluster,
                          cooperative=cooperative, options=self.options, memory=self.memory)
            if self._contents() == before:
                self.settled.add((told, before))

        capture = self.captures.get(stream)
        if capture is not None:
            capture.nodes.append(run)
        else:
            run()

    def cuTensorMapEncodeTiled(self, out: int, kind: int, rank: int, address: int, extents: int, strides: int, box: int,
                               steps: int, interleave: int, swizzle: int, promotion: int, fill: int) -> None:
        """The conditions are those of the CUDA Driver API, 6.30."""
        self.need_context()
        shape = tuple((ctypes.c_uint64 * rank).from_address(extents))
        between = tuple((ctypes.c_uint64 * (rank - 1)).from_address(strides)) if rank > 1 else ()
        tile = tuple((ctypes.c_uint32 * rank).from_address(box))
        assert tuple((ctypes.c_uint32 * rank).from_address(steps)) == (1,) * rank
        assert (interleave, fill) == (0, 0) and promotion in (0, 1, 2, 3)
        if out % 64 or address % 16 or any(step % 16 or step >= 1 << 40 for step in between):
            raise Refused(INVALID_VALUE)
        if not all(0 < extent <= 1 << 32 for extent in shape):
            raise Refused(INVALID_VALUE)
        self.log.append(("map", {"dtype": kind, "address": address, "shape": shape, "strides": between, "box": tile,
                                 "swizzle": swizzle}))
        dtype = np.dtype(MAP_DTYPES[kind])
        array = np.lib.stride_tricks.as_strided(np.zeros(1, dtype), shape[::-1], (*between[::-1], dtype.itemsize))
        try:
            made = TensorMap(array, tile[::-1], (0, 32, 64, 128)[swizzle])
        except EmulationError as error:
            raise Refused(INVALID_VALUE) from error
        ctypes.memmove(out, made.encode(address), 128)
