"""Calls of kernels whose tensors lie in device memory.

Enters: a `runtime.launch.Launcher` and arguments: device arrays, and what exports DLPack of a CUDA device. Leaves: the
kernel has been issued to the current stream when the call returns. Holds: the call is checked and specialised as any
other; nothing is copied and nothing waits.

    call ── bind ─ layout seen? ─ no: specialise ─ compile (or from disk) ─ load (or cubin from disk)
                        └ yes: words and tensor maps, launch

A worker is a warp, or a block of `warps` of them. A launch has as many as there are tasks, or as the device holds at
once: workers take tasks in turn, and a barrier needs all of them resident. Their scratch memory belongs to a stream, as
launches there come one after another, or to a prepared call, as a graph may hold its address.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from ...ir.extents import shape_of
from ...targets.ptx.target import runs_on
from ...targets.ptx.text import BLOCK_WARPS, SWIZZLE_BYTES, SYNC_BYTES, most_workers
from .. import arguments as _arguments
from ..arguments import Binding, Parameter, TensorView, fill_words, slot_words, view_dlpack
from ..bounds import Bounds
from ..compiled import CompiledKernel
from ..errors import ArgumentError
from .driver import Device, device
from .memory import KDL_CUDA, Allocation, DeviceArray
from .module import Function, Parameters, encode_map, load
from .streams import current_stream, handle_of, make_ready

if TYPE_CHECKING:
    from ..launch import Launcher

KDL_MANAGED = 13
DEVICES = frozenset({KDL_CUDA, KDL_MANAGED})
LEAST_SCRATCH_BYTES = 64 << 10
ROW_BYTES = 16
"""Most that a thread reads or copies at once: what rows of aligned tensors start at multiples of."""
_ENTRY = re.compile(r"\.entry\s+(\w+)")


def ordinal_of(value: Any) -> int | None:
    """The device that a tensor lies on; None: it lies in the host's memory, or is none."""
    asked = getattr(value, "__dlpack_device__", None)
    if asked is None:
        return None
    kind, ordinal = asked()
    return int(ordinal) if int(kind) in DEVICES else None


class Entry(NamedTuple):
    """A kernel loaded for one layout of its arguments. blocks, threads: of a launch. scratch_bytes: of each worker, of
    whom there are `workers`; shared_bytes: of what these share."""

    compiled: CompiledKernel
    function: Function
    blocks: int
    threads: int
    scratch_bytes: int
    shared_bytes: int
    workers: int


class DeviceCall:
    """A call with its arguments bound: calling it issues the kernel on the same memory again.

    The arguments are kept alive and must stay where they are.
    """

    def __init__(self, name: str, entry: Entry, parameters: Parameters, scratch: Scratch,
                 scalars: dict[str, tuple[int, Parameter]], keep: Any, bounds: Bounds) -> None:
        self.name, self.entry, self._bounds = name, entry, bounds
        self._parameters, self._scratch, self._scalars, self._keep = parameters, scratch, scalars, keep

    def __call__(self, stream: Any = None) -> None:
        """Issue it to a stream of ours, of PyTorch, or a handle; None: the current one."""
        issue(self.entry, self._parameters, self._scratch, stream)

    def set_scalar(self, name: str, value: Any) -> None:
        """Another value for a scalar parameter from the next call on; a graph keeps its own. Raises ArgumentError."""
        if name not in self._scalars:
            known = ", ".join(self._scalars) or "none"
            raise ArgumentError("scalar", self.name, name, "no such scalar", f"one of {known}", "prepare anew")
        word, parameter = self._scalars[name]
        held = _arguments.scalar_word(value, self.name, parameter)
        self._bounds.allow({("scalar", name): held})
        self._parameters.words[word] = held


def issue(entry: Entry, parameters: Parameters, scratch: Scratch, stream: Any) -> None:
    compiled = entry.compiled
    if compiled.barriers:
        make_ready(scratch.clear_after_failure, stream)
    entry.function.launch((entry.blocks,), (entry.threads,), parameters, compiled.near_bytes,
                          (compiled.cluster,) if compiled.cluster > 1 else (), compiled.barriers, stream)


class Scratch:
    """Memory of launches that come one after another: the sync block, zero as workers leave it, and scratch memory
    behind it.

    A kernel that is aborted may leave flags raised and arrivals counted there, for which those of the next launch would
    not wait. failures: of the driver, as they were when the block was known to be zero.
    """

    def __init__(self, on: Device, size_bytes: int) -> None:
        self.memory = Allocation(on, size_bytes)
        self.failures = on.call.failures
        self._clear(None)
        with on.current():      # whatever stream the first launch goes to
            on.call("cuStreamSynchronize", handle_of(on, None))

    def clear_after_failure(self, stream: Any) -> None:
        """Clear the sync block where a call of the driver has failed since it was known to be zero."""
        failures = self.memory.device.call.failures
        if self.failures != failures:
            self._clear(stream)
            self.failures = failures

    def _clear(self, stream: Any) -> None:
        on = self.memory.device
        with on.current():
            on.call("cuMemsetD8Async", self.memory.handle, 0, SYNC_BYTES, handle_of(on, stream))


class _StreamScratch:
    """Scratch memory of each stream of a device. It grows, and what it had stays: a graph may use it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.areas: dict[tuple[Device, int], list[Scratch]] = {}

    def take(self, on: Device, stream: int, size_bytes: int) -> Scratch:
        with self.lock:
            areas = self.areas.setdefault((on, stream), [])
            if not areas or areas[-1].memory.size_bytes < size_bytes:
                least = 2 * areas[-1].memory.size_bytes if areas else LEAST_SCRATCH_BYTES
                areas.append(Scratch(on, max(size_bytes, least)))
            return areas[-1]


_of_streams = _StreamScratch()


class DeviceLauncher:
    """What a `Launcher` does on devices."""

    def __init__(self, launcher: Launcher) -> None:
        self.launcher = launcher
        self.entries: dict[Any, Entry] = {}
        self.functions: dict[tuple[Device, bytes], Function] = {}
        self.compiled: dict[Any, CompiledKernel] = {}

    def call(self, arguments: tuple[Any, ...]) -> None:
        entry, parameters, _ = self.bind(arguments)
        on = entry.function.device
        stream = current_stream(on)
        scratch = _of_streams.take(on, stream, _scratch_bytes(entry))
        _place(parameters, entry, scratch)
        issue(entry, parameters, scratch, stream)

    def prepare(self, arguments: tuple[Any, ...]) -> DeviceCall:
        entry, parameters, binding = self.bind(arguments)
        scratch = Scratch(entry.function.device, _scratch_bytes(entry))
        _place(parameters, entry, scratch)
        slots = slot_words(entry.compiled.slots)
        scalars = {p.name: (slots[f"scalar.{p.name}"], p) for p in self.launcher.signature.parameters
                   if f"scalar.{p.name}" in slots}
        return DeviceCall(self.launcher.name, entry, parameters, scratch, scalars, (arguments, binding),
                          Bounds(self.launcher.signature, binding, entry.compiled.requires))

    def bind(self, arguments: tuple[Any, ...]) -> tuple[Entry, Parameters, Binding]:
        """Check a call, find or make its entry, fill in its parameters but for scratch memory."""
        signature = self.launcher.signature
        on = self._device_of(arguments)
        binding = signature.bind(arguments, self._reader(on))
        layout = (on, self._aligned(binding), *((v.shape, v.strides) for v in binding.tensors.values()))
        entry = self.entries.get(layout)
        if entry is None:
            entry = self._make_entry(on, binding)
            if len(self.entries) >= 1024:
                self.entries.clear()
            self.entries[layout] = entry
        else:
            signature.check_scalars(binding, entry.compiled.requires)
        compiled = entry.compiled
        signature.check_stores(binding, compiled.stored)
        words = fill_words(signature, compiled.slots, binding)
        maps = []
        for name, dtype, dims, box in compiled.tensor_maps:
            shape = shape_of(dims, binding.dims)
            at = binding.tensors[signature.positions[name]].address
            maps.append(encode_map(on, at, dtype, shape, box, SWIZZLE_BYTES))
        return entry, Parameters([0, 0, 0, *words], maps), binding

    def _aligned(self, binding: Binding) -> tuple[str, ...]:
        from ..specialise import aligned_tensors

        return aligned_tensors(self.launcher.signature, binding, 0, ROW_BYTES)

    def _device_of(self, arguments: tuple[Any, ...]) -> Device:
        """The one device that all tensors lie on."""
        signature, found = self.launcher.signature, None
        signature.check_count(arguments)
        for position in signature.tensor_positions:
            value, parameter = arguments[position], signature.parameters[position]
            ordinal = ordinal_of(value)
            if ordinal is None or ordinal != (ordinal if found is None else found):
                where = "memory of the host" if ordinal is None else f"memory of device {ordinal}"
                raise ArgumentError(
                    "device", self.launcher.name, parameter.name, f"{type(value).__name__} in {where}",
                    "memory of a CUDA device" if found is None else f"memory of device {found}, as the others",
                    "x = sapper.runtime.cuda.array(x), or x.cuda(); or emulate=True with arrays of NumPy")
            found = ordinal
        return device(found)

    def _reader(self, on: Device) -> Callable[[Any, str, Parameter], TensorView]:
        def read(value: Any, kernel: str, parameter: Parameter) -> TensorView:
            if isinstance(value, DeviceArray):
                steps = _arguments.row_major(value.shape)
                view = TensorView(value.address, value.shape, steps, value.dtype, True, value)
            else:
                # PyTorch's kernels and ours go to one stream; another producer is told ours, and orders itself before.
                follows = -1 if type(value).__module__.split(".")[0] == "torch" else current_stream(on) or 1
                view = view_dlpack(value, kernel, parameter, DEVICES, "memory of a CUDA device", stream=follows)
            if view.dtype.name != parameter.dtype.name:
                raise _arguments.dtype_error(kernel, parameter, view.dtype.name)
            return view

        return read

    def _make_entry(self, on: Device, binding: Binding) -> Entry:
        from ..specialise import specialise

        launcher, signature = self.launcher, self.launcher.signature
        target = launcher.device_target or on.target
        if not runs_on(target, on.capability):
            raise ArgumentError("option", launcher.name, "target", target.name,
                                f"a level that {on.name} runs, such as {on.target.name}", "leave target out")
        known = specialise(signature, binding, launcher.static, 0, ROW_BYTES)
        schedule = launcher.schedule_for(binding.dims, target, workers=on.processors)
        assumed = known, repr(schedule), target.name
        compiled = self.compiled.get(assumed)
        if compiled is None:
            compiled = self.compiled[assumed] = launcher.follow(
                schedule, lambda followed: launcher.from_disk_or_compile(known, followed, target))
        signature.check_requires(binding, compiled.requires)
        key = on, compiled.code
        function = self.functions.get(key)
        if function is None:
            text = compiled.code.decode()
            match = _ENTRY.search(text)
            assert match is not None
            function = self.functions[key] = load(text, on)[match[1]]
        each = max(64, compiled.scratch_for(binding.dims))
        warps = compiled.warps if compiled.warps > 1 else BLOCK_WARPS
        of_block = warps // compiled.warps
        wanted = compiled.task_count(binding.dims) if compiled.counters else 1
        blocks = min(function.resident_blocks(32 * warps, compiled.near_bytes, compiled.cluster),
                     most_workers(compiled.warps))
        if wanted is not None:
            blocks = max(1, min(blocks, -(-wanted // of_block)))
        blocks = max(1, blocks // compiled.cluster) * compiled.cluster
        return Entry(compiled, function, blocks, 32 * warps, each, compiled.shared_scratch_for(binding.dims),
                     blocks * of_block)


def _scratch_bytes(entry: Entry) -> int:
    return SYNC_BYTES + entry.scratch_bytes * entry.workers + entry.shared_bytes


def _place(parameters: Parameters, entry: Entry, scratch: Scratch) -> None:
    """The first three words: scratch base, scratch bytes of each worker, sync block."""
    at = scratch.memory.address
    parameters.words[0:3] = [at + SYNC_BYTES, entry.scratch_bytes, at]
