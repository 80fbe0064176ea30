"""Streams, events and graphs.

Enters: nothing, or work that is issued while a graph is captured. Leaves: handles of the driver. Holds: work goes to
the current stream: the innermost `with Stream()`, else PyTorch's current one where PyTorch uses the device, else the
default stream.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar, Token
from typing import Any

from .driver import CudaError, Device, device

Ready = Callable[[Any], None]
"""Makes ready, on a stream, what a launch there needs."""

GONE = frozenset(f"CUDA_ERROR_{name}" for name in (
    "DEINITIALIZED", "CONTEXT_IS_DESTROYED", "ILLEGAL_ADDRESS", "LAUNCH_FAILED", "LAUNCH_TIMEOUT",
    "ILLEGAL_INSTRUCTION", "MISALIGNED_ADDRESS", "INVALID_ADDRESS_SPACE", "INVALID_PC", "HARDWARE_STACK_ERROR",
    "ASSERT", "ECC_UNCORRECTABLE"))
"""Handles have gone with their context: closed, or lost by the fault of a kernel, which the call that met it has told
(CUDA Driver API, CUresult: "the process must be terminated and relaunched")."""

_current: ContextVar[Stream | None] = ContextVar("sapper_cuda_stream", default=None)
_captured: ContextVar[list[Ready] | None] = ContextVar("sapper_cuda_captured", default=None)


class Stream:
    """Work in order. As a context, it is the current one. It waits for no other stream."""

    def __init__(self, on: Device | None = None) -> None:
        self.device = on or device()
        kind = self.device.call.enumeration("CUstream_flags", "CU_STREAM_NON_BLOCKING")
        with self.device.current():
            self.handle: Any = self.device.call("cuStreamCreate", int(kind))
        self._before: list[Token[Stream | None]] = []

    def __enter__(self) -> Stream:
        self._before.append(_current.set(self))
        return self

    def __exit__(self, *_: object) -> None:
        _current.reset(self._before.pop())

    def synchronize(self) -> None:
        """Wait until all its work is done."""
        with self.device.current():
            self.device.call("cuStreamSynchronize", self.handle)

    def wait(self, event: Event) -> None:
        """What is issued later waits for the event."""
        with self.device.current():
            self.device.call("cuStreamWaitEvent", self.handle, event.handle, 0)

    def __del__(self) -> None:
        destroy(self, "cuStreamDestroy")


class Event:
    """A point in a stream's work, with its time."""

    def __init__(self, on: Device | None = None) -> None:
        self.device = on or device()
        with self.device.current():
            self.handle: Any = self.device.call("cuEventCreate", 0)

    def record(self, stream: Any = None) -> Event:
        """Mark what has been issued to a stream (None: the current one)."""
        with self.device.current():
            self.device.call("cuEventRecord", self.handle, handle_of(self.device, stream))
        return self

    def synchronize(self) -> Event:
        with self.device.current():
            self.device.call("cuEventSynchronize", self.handle)
        return self

    def since(self, earlier: Event) -> float:
        """Seconds from an earlier event; both must be over."""
        with self.device.current():
            return float(self.device.call("cuEventElapsedTime", earlier.handle, self.handle)) / 1e3

    def __del__(self) -> None:
        destroy(self, "cuEventDestroy")


class Graph:
    """Captured work; calling it issues all of it to the current stream at once. keep: what it uses. before: what makes
    that ready."""

    def __init__(self, on: Device, handle: Any, keep: Any, before: Sequence[Ready] = ()) -> None:
        self.device, self.handle, self.keep, self.before = on, handle, keep, tuple(before)

    def __call__(self, stream: Any = None) -> None:
        for ready in self.before:
            ready(stream)
        with self.device.current():
            self.device.call("cuGraphLaunch", self.handle, handle_of(self.device, stream))

    def __del__(self) -> None:
        destroy(self, "cuGraphExecDestroy")


def capture(work: Callable[[], Any], on: Device | None = None) -> Graph:
    """The graph of what `work` issues to the current stream.

    It runs nothing. `work` calls what `sapper.prepare` gave: then nothing is compiled or allocated meanwhile; their
    memory must stay. What it returns is kept as long as the graph, as is `work` itself.
    """
    on = on or device()
    stream = _current.get() or Stream(on)
    call = on.call
    before: list[Ready] = []
    with on.current(), stream:
        call("cuStreamBeginCapture", stream.handle,
             call.enumeration("CUstreamCaptureMode", "CU_STREAM_CAPTURE_MODE_THREAD_LOCAL"))
        token = _captured.set(before)
        try:
            keep = work()
        except BaseException:
            _abandon(on, stream)
            raise
        finally:
            _captured.reset(token)
        captured = call("cuStreamEndCapture", stream.handle)
        try:
            return Graph(on, call("cuGraphInstantiate", captured, 0), (work, keep), before)
        finally:
            call("cuGraphDestroy", captured)


def make_ready(ready: Ready, stream: Any) -> None:
    """Do so now, for what is about to be issued to a stream; while a graph is captured, before each launch of it."""
    before = _captured.get()
    if before is None:
        ready(stream)
    else:
        before.append(ready)


def _abandon(on: Device, stream: Stream) -> None:
    """End a capture whose work failed: the driver may say that it is invalid already."""
    try:
        on.call("cuGraphDestroy", on.call("cuStreamEndCapture", stream.handle))
    except CudaError as error:
        if not error.name.startswith("CUDA_ERROR_STREAM_CAPTURE"):
            raise


def current_stream(on: Device) -> int:
    """The handle that work on a device goes to; 0: the default stream."""
    own = _current.get()
    if own is not None and own.device is on:
        return int(own.handle)
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return int(torch.cuda.current_stream(on.ordinal).cuda_stream)
    return 0


def handle_of(on: Device, stream: Any) -> Any:
    """A stream of ours, of PyTorch, or a handle, as the driver takes it. None: the current one."""
    if stream is None:
        number = current_stream(on)
    else:
        number = int(getattr(stream, "cuda_stream", getattr(stream, "handle", stream)))
    return on.call.api.CUstream(number)


@contextmanager
def _outside_of_captures(on: Device) -> Iterator[None]:
    """Objects go at any moment: that their memory is freed must not break a capture that is under way."""
    call, name = on.call, "cuThreadExchangeStreamCaptureMode"
    before = call(name, call.enumeration("CUstreamCaptureMode", "CU_STREAM_CAPTURE_MODE_RELAXED"))
    try:
        yield
    finally:
        call(name, before)


def destroy(owner: Any, function: str) -> None:
    """Give a handle back. At the end of the process the driver may have gone first."""
    handle = getattr(owner, "handle", None)
    if handle is None or sys.is_finalizing():
        return
    owner.handle = None
    try:
        with owner.device.current(), _outside_of_captures(owner.device):
            owner.device.call(function, handle)
    except CudaError as error:
        if error.name not in GONE:
            raise
