"""The worker pool: Python threads parked inside generated code.

Enters: a loaded kernel, its argument block, a number of workers. Leaves: the kernel has run on all of them.
Holds: a worker is one ctypes call that lasts as long as the pool, so it never holds the GIL; the launching thread is
worker 0. One launch runs at a time: other Python threads wait for the lock. A forked child starts with no pool and
makes its own. At exit workers are told to return and are joined. Signals are blocked in workers, so Ctrl-C reaches the
launching thread, where Python raises it when the launch returns.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import signal
import threading
import time
from collections.abc import Callable

from . import settings
from .buffers import Mapping
from .cache import kept_code
from .errors import LaunchError
from .loader import CodeBlock, load
from .scratch import WorkArea
from .settings import MAX_THREADS

# Offsets in the control memory, in bytes; workers_code.py says what lies there.
KERNEL, ARGUMENTS, WORKERS, SPIN_CYCLES, JOIN_CYCLES = 0, 8, 16, 24, 28
PENDING, LAUNCHER_SLEEPS = 64, 68
KEPT_OFF, CALLER_CPU, PLACED, ALLOWED, ALLOWED_BYTES = 128, 132, 136, 144, 128
SAVED, SAVED_BYTES, OWN, ENDED, BEGAN = 272, 400, 408, 536, 540
MAILBOXES, MAILBOX_BYTES = 576, 64
GENERATION, SLEEPS, THREAD, STARTED, SPINS, TAKEN = 0, 4, 8, 12, 16, 20
COUNTERS = 8

WAIT_NS = 1_000_000
"""How long who waits for workers that run, at a barrier or at the end of a launch, spins before it sleeps: a thread
that is woken may come back beside the one that woke it. Workers without work sleep sooner."""
IDLE_SHIFT = 3
"""A worker without work spins for 2 ** -IDLE_SHIFT of the time that its last work took, but at least for
settings.spin_us and at most for WAIT_NS: what launches a model's step comes back after some 100 µs of Python."""
_CALIBRATE_NS, _CALIBRATE_LIMIT_NS, _CALIBRATE_TIMES, _CALIBRATE_DOUBT = 100_000, 500_000_000, 20, 0.02
_FAULTS = {signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGABRT, signal.SIGTRAP}

_pointer = ctypes.c_void_p
_CLOCK = ctypes.PYFUNCTYPE(ctypes.c_uint32)
_WORK = ctypes.CFUNCTYPE(None, _pointer, _pointer, _pointer, _pointer)
_LAUNCH = ctypes.CFUNCTYPE(None, *[_pointer] * 6)


class _Code:
    """The workers' machine code, loaded once in a process (a forked child has it too), and the clock's rate."""

    def __init__(self) -> None:
        code, offsets = kept_code("workers", _workers_code)
        self.block: CodeBlock = load(code)
        self.work = _WORK(self.block.address + offsets["work"])
        self.launch = _LAUNCH(self.block.address + offsets["launch"])
        self.cycles_per_ns: float = clock_rate(_CLOCK(self.block.address + offsets["clock"]))

    def cycles(self, time_ns: int, size: int) -> int:
        """How long one of so many workers spins before it sleeps, in cycles of the clock. More workers than CPUs don't
        spin: one would keep another off its CPU."""
        return int(time_ns * self.cycles_per_ns) if size <= settings.available_cpus() else 0


def clock_rate(cycles: Callable[[], int], now_ns: Callable[[], int] = time.perf_counter_ns) -> float:
    """Cycles per nanosecond of a clock that counts modulo 2^32.

    The system may hold the thread up between any two reads, for longer than the whole measurement takes, and a rate
    from such reads is wrong by any factor. So cycles are read between two reads of the time, which say how well the
    two belong together, and of several measurements that with the least doubt counts.
    """

    def moment() -> tuple[int, int, int]:
        before = now_ns()
        read = cycles()
        return before, read, now_ns()

    rates: list[tuple[float, float]] = []  # doubt, rate
    while len(rates) < _CALIBRATE_TIMES and not (rates and min(rates)[0] < _CALIBRATE_DOUBT):
        start, end = moment(), moment()
        while end[2] - start[0] < _CALIBRATE_NS:
            end = moment()
        doubt = (start[2] - start[0] + end[2] - end[0]) / (end[2] - start[0])
        if end[2] - start[0] > _CALIBRATE_LIMIT_NS:
            doubt += 1  # the count may have gone round
        rates.append((doubt, ((end[1] - start[1]) & 0xFFFFFFFF) * 2 / (end[0] + end[2] - start[0] - start[2])))
    return min(rates)[1]


def _workers_code() -> tuple[bytes, dict[str, int]]:
    from .workers_code import workers_code

    return workers_code()


class Pool:
    """Workers 1 to size - 1 as threads, and what they share. Use `launch`; a pool is not made directly."""

    def __init__(self, code: _Code) -> None:
        self.size = 1
        self.area = WorkArea()
        self._code = code
        self._start = code.launch
        self._memory = Mapping(MAILBOXES + MAILBOX_BYTES * MAX_THREADS, huge=False)
        self.control = self._memory.address
        self._threads: list[threading.Thread] = []

    def grow(self, size: int) -> None:
        """Start threads until there are so many workers. Raises LaunchError where the system has no more threads."""
        self._set_word(SPIN_CYCLES, self._code.cycles(1000 * settings.spin_us(), size))
        self._set_word(JOIN_CYCLES, self._code.cycles(WAIT_NS, size))
        while self.size < size:
            index = self.size
            mailbox = self.control + MAILBOXES + MAILBOX_BYTES * index
            generation = ctypes.c_int32.from_address(mailbox + GENERATION).value
            thread = threading.Thread(
                target=self._run_worker, args=(index, mailbox, generation), name=f"sapper-{index}", daemon=True
            )
            try:
                thread.start()
            except RuntimeError as error:
                raise LaunchError(
                    f"starting worker {index}: found {error}; expected a new thread; mend: SAPPER_THREADS={index}"
                ) from error
            assert thread.native_id is not None
            ctypes.c_int32.from_address(mailbox + THREAD).value = thread.native_id
            self._threads.append(thread)
            self.size += 1
        self._place()

    def _place(self) -> None:
        """Let launches keep the workers off their own CPU, if there is one for each; otherwise leave them to the
        system."""
        allowed = os.sched_getaffinity(0)
        bits = sum(1 << cpu for cpu in allowed if cpu < 8 * ALLOWED_BYTES)
        ctypes.memmove(self.control + ALLOWED, bits.to_bytes(ALLOWED_BYTES, "little"), ALLOWED_BYTES)
        self._set_word(KEPT_OFF, -1)
        if self.size <= len(allowed):
            self._set_word(PLACED, self.size)
            return
        if ctypes.c_int32.from_address(self.control + PLACED).value:
            for thread in self._threads:
                os.sched_setaffinity(thread.native_id or 0, allowed)
        self._set_word(PLACED, 0)

    def _set_word(self, offset: int, value: int) -> None:
        ctypes.c_int32.from_address(self.control + offset).value = value

    def _run_worker(self, index: int, mailbox: int, generation: int) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals() - _FAULTS)
        self._code.work(self.control, index, mailbox, generation)

    def launch(self, kernel: int, view: memoryview, block: int, workers: int, step_bytes: int, least: int = MAX_THREADS,
               hold: bool = True) -> None:
        if workers > self.size:
            self.grow(workers)
        if step_bytes * workers > self.area.capacity_bytes:
            self.area = WorkArea(step_bytes * workers)
        area = self.area
        view[0] = area.scratch
        view[1] = step_bytes
        view[2] = area.sync
        self._start(self.control, kernel, block, workers, least, hold)

    def stop(self) -> None:
        """Let every worker return, and join their threads."""
        if self.size > 1:
            self._start(self.control, 0, 0, self.size, self.size, False)
            self.size = 1
        for thread in self._threads:
            thread.join()
        self._threads.clear()


_lock = threading.Lock()
_pool: Pool | None = None
_code: _Code | None = None


def launch(kernel: int, view: memoryview, block: int, workers: int, step_bytes: int, least: int = MAX_THREADS,
           hold: bool = True) -> None:
    """Run the kernel at an address on `workers` workers, or on fewer, but not less than `least`, where others sleep.

    view, block: the argument block as 64-bit words, and its address; words 0 to 2 are filled in here.
    step_bytes: scratch of each worker, a multiple of the page. hold: keep this thread on its CPU meanwhile.
    """
    global _pool
    with _lock:
        pool = _pool
        if pool is None:
            pool = _pool = Pool(_loaded_code())
        pool.launch(kernel, view, block, workers, step_bytes, least, hold)


def wait_cycles(size: int) -> int:
    """How long one of so many workers spins at a barrier before it sleeps, in cycles of the time stamp counter."""
    with _lock:
        return _loaded_code().cycles(WAIT_NS, size)


def cycles_per_ns() -> float:
    """How fast the time stamp counter counts."""
    with _lock:
        return _loaded_code().cycles_per_ns


def _loaded_code() -> _Code:
    global _code
    if _code is None:
        _code = _Code()
    return _code


def stop() -> None:
    """End all workers; the next launch starts new ones."""
    global _pool
    with _lock:
        if _pool is not None:
            _pool.stop()
            _pool = None


def pool_size() -> int:
    """Workers there are now, the launching thread included."""
    return 1 if _pool is None else _pool.size


def _after_fork_in_child() -> None:
    global _pool, _lock
    _pool = None  # its threads exist in the parent only
    _lock = threading.Lock()


# The lock is held across a fork so that the child never inherits a launch in progress.
os.register_at_fork(
    before=lambda: _lock.acquire(), after_in_parent=lambda: _lock.release(), after_in_child=_after_fork_in_child
)
atexit.register(stop)
