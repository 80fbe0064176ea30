"""The CUDA driver, found once and called with every result checked; devices and their contexts.

Enters: the module cuda.bindings.driver. Leaves: `driver()`, `device(ordinal)`. Holds: nothing is imported or
initialised before it is asked for; a call that fails raises `CudaError` with the driver's own words. A device's primary
context is used, the one of PyTorch and of everything built on the CUDA runtime, so that memory and streams are shared.
Source: CUDA Driver API 13, and the reference of cuda-bindings 13.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ...targets.ptx.target import target_for
from ..errors import LaunchError

if TYPE_CHECKING:
    from ...targets.ptx.target import Target

OTHERWISE = "or run it without a device: target=\"sm_90a\", emulate=True, or interpret=True, with arrays of NumPy"
NAME_BYTES = 256


class CudaError(LaunchError):
    """The driver refused a call. name: such as "CUDA_ERROR_OUT_OF_MEMORY"."""

    def __init__(self, function: str, name: str, meaning: str) -> None:
        super().__init__(f"{function}: found {name} ({meaning}); expected CUDA_SUCCESS; mend: {_mend(name)}")
        self.name = name


def _mend(name: str) -> str:
    return {
        "CUDA_ERROR_OUT_OF_MEMORY": "free device memory, or split the work",
        "CUDA_ERROR_UNSUPPORTED_PTX_VERSION": "a newer driver",
        "CUDA_ERROR_NO_BINARY_FOR_GPU": "a target that the device runs (`sapper doctor` names it)",
        "CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE": "leave the device to this process",
    }.get(name, "rerun it under compute-sanitizer, or on the emulator, which says where: emulate=True")


class Driver:
    """The functions of `api` (cuda.bindings.driver), checked. failures: how many calls failed, of which any may be the
    one that tells of a kernel that was aborted earlier."""

    def __init__(self, api: Any) -> None:
        self.api = api
        self.failures = 0

    def __call__(self, function: str, *arguments: Any) -> Any:
        """What the function gives besides its result: nothing, one value, or a tuple. Raises CudaError."""
        result, *values = getattr(self.api, function)(*arguments)
        self.check(function, result)
        return values[0] if len(values) == 1 else tuple(values) or None

    def check(self, function: str, result: Any) -> None:
        """Raises CudaError unless it is CUDA_SUCCESS."""
        if int(result):
            self.failures += 1
            raise CudaError(function, *self.describe(result))

    def pointer(self, function: str, since: int) -> int:
        """The address of a function of the C interface, for what the package can't pass. since: 12000 for CUDA 12.0."""
        address, _ = self("cuGetProcAddress", function.encode(), since, 0)
        if not address:
            raise CudaError(function, "CUDA_ERROR_NOT_FOUND", "the driver is too old for it")
        return int(address)

    def describe(self, result: Any) -> tuple[str, str]:
        """Name and meaning of a result."""
        texts = []
        for function in ("cuGetErrorName", "cuGetErrorString"):
            wrong, text = getattr(self.api, function)(result)
            texts.append(f"error {int(result)}" if int(wrong) or text is None else text.decode())
        return texts[0], texts[1]

    def enumeration(self, kind: str, name: str) -> Any:
        """A constant, such as ("CUtensorMapSwizzle", "CU_TENSOR_MAP_SWIZZLE_128B")."""
        return getattr(getattr(self.api, kind), name)


_lock = threading.RLock()
_driver: Driver | None = None
_devices: dict[int, Device] = {}


def driver() -> Driver:
    """The driver, initialised. Raises LaunchError in one line where the package, the driver or a device is missing."""
    global _driver
    with _lock:
        if _driver is None:
            try:
                from cuda.bindings import driver as api
            except ImportError as error:
                raise LaunchError(f"CUDA: found no cuda.bindings ({error}); expected the package beside sapper; mend: "
                                  f"pip install 'sapper[cuda]', {OTHERWISE}") from error
            made = Driver(api)
            try:
                made("cuInit", 0)
            except CudaError as error:
                raise LaunchError(f"CUDA: found a driver that does not start ({error.name}); expected a device that "
                                  f"this process may use; mend: see what nvidia-smi shows, {OTHERWISE}") from error
            except Exception as error:  # which one says that libcuda is missing has changed between versions
                raise LaunchError(f"CUDA: found no driver ({type(error).__name__}); expected libcuda.so.1; mend: "
                                  f"install NVIDIA's driver, {OTHERWISE}") from error
            _driver = made
        return _driver


def forget() -> None:
    """Look for driver and devices anew."""
    global _driver
    with _lock:
        _driver = None
        _devices.clear()


class Device:
    """A device and its primary context.

    name: as the driver has it. capability: (9, 0) for an H100. processors: SMs. shared_bytes: most that a block may
    have. driver_version: 13000 for 13.0. target: facts of the level whose code it runs best.
    """

    def __init__(self, ordinal: int) -> None:
        call = self.call = driver()
        self.ordinal = ordinal
        self.handle = call("cuDeviceGet", ordinal)
        self.name = call("cuDeviceGetName", NAME_BYTES, self.handle).split(b"\0", 1)[0].decode()
        self.capability = (self._attribute("COMPUTE_CAPABILITY_MAJOR"), self._attribute("COMPUTE_CAPABILITY_MINOR"))
        self.processors = self._attribute("MULTIPROCESSOR_COUNT")
        self.shared_bytes = self._attribute("MAX_SHARED_MEMORY_PER_BLOCK_OPTIN")
        self.driver_version: int = call("cuDriverGetVersion")
        self.context = call("cuDevicePrimaryCtxRetain", self.handle)

    def _attribute(self, name: str) -> int:
        kind = self.call.enumeration("CUdevice_attribute", f"CU_DEVICE_ATTRIBUTE_{name}")
        return int(self.call("cuDeviceGetAttribute", kind, self.handle))

    @property
    def target(self) -> Target:
        found = target_for(self.capability)
        if found is None:
            raise LaunchError(f"{self.name}: found compute capability {'.'.join(map(str, self.capability))}; expected "
                              f"8.0 or later; mend: another device, {OTHERWISE}")
        return found

    @contextmanager
    def current(self) -> Iterator[Device]:
        """Its context is this thread's for the body of a `with`."""
        before = self.call("cuCtxGetCurrent")
        if int(before) == int(self.context):
            yield self
            return
        self.call("cuCtxSetCurrent", self.context)
        try:
            yield self
        finally:
            self.call("cuCtxSetCurrent", before)

    def __repr__(self) -> str:
        return f"<{self.name}, {self.processors} processors, compute capability {'.'.join(map(str, self.capability))}>"


def device_count() -> int:
    """How many devices there are. Raises LaunchError where there is no driver."""
    count: int = driver()("cuDeviceGetCount")
    return count


def device(ordinal: int | None = None) -> Device:
    """A device; None: that of the calling thread's context, or the first. Raises LaunchError."""
    call = driver()
    if ordinal is None:
        ordinal = int(call("cuCtxGetDevice")) if int(call("cuCtxGetCurrent")) else 0
    with _lock:
        found = _devices.get(ordinal)
        if found is None:
            count = device_count()
            if not 0 <= ordinal < count:
                raise LaunchError(f"CUDA: found device {ordinal}; expected one of {count}; mend: see "
                                  f"CUDA_VISIBLE_DEVICES, {OTHERWISE}")
            found = _devices[ordinal] = Device(ordinal)
        return found
