"""Code that is loaded and laid out for calls of one form, and calls with their arguments bound.

Enters: a compiled kernel, its code in memory, a binding. Leaves: `Entry`, which any number of calls with such arguments
share, and `BoundCall`, one call that can be run again and again. Holds: one call at a time uses an argument block.
"""

from __future__ import annotations

import ctypes
import os
import time
import weakref
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from . import arguments as _arguments
from . import settings
from .arguments import FIRST_SLOT, Binding, Parameter, Signature, fill_words, slot_words
from .compiled import CompiledKernel
from .errors import ArgumentError
from .loader import CodeBlock
from .scratch import NO_COUNTS, areas, stride_bytes, take_area
from .vectorcall import bound_form, quicken_bound

if TYPE_CHECKING:
    from .bounds import Bounds

GRAIN_NS = 2_500.0
"""A worker gets at least so much of the estimated work, if it is awake. Two of a Zen 4 that are take as long as one for
2.5 us of it in all, estimated at 3 to 4, and from 20 us on 1.5 to 1.9 times less (softmax, norms, products, sums)."""
WAKE_NS = 50_000.0
"""So much if it has to be woken."""
HOLD_NS = 5_000_000.0
"""From so much of it on a launching thread is kept on its CPU, which takes 5 to 15 us."""
SHORT_NS = 10_000.0
"""Of so little work the launching thread keeps the GIL: a call that lets go of it takes 100 us and more beside a thread
that computes in Python."""
ASSUMED_BYTES_PER_NS = 10.0
LOOK_AGAIN_S, AT_MOST_S = 2e-5, 1e-3
"""How long a thread sleeps that finds a bound call run by another, before it looks again: twice as long each time."""

Block = tuple["memoryview[int]", "memoryview[float]", "memoryview[float]", int]
"""An argument block as 64-bit words, as floats, as doubles, and its address."""


class Threads(NamedTuple):
    """Workers of a launch: `most` if they are awake, `least` if they have to be woken. hold: it keeps the launching
    thread on its CPU."""

    most: int
    least: int
    hold: bool


ALONE = Threads(1, 1, False)


class Entry:
    """A kernel compiled, loaded, and laid out for calls with one set of shapes and strides.

    run(words, address) launches it with a filled block. words: the block's words from FIRST_SLOT on; data_words and
    scalar_words are (word, position of the parameter) of those that every call writes anew. direct: it needs no scratch
    and no sync block. is_short: by the compiler's estimate. blocks: argument blocks that no call is using.
    """

    __slots__ = ("_asked", "aligned", "blocks", "code", "compiled", "data_words", "direct", "is_short", "run",
                 "scalar_words", "scratch_bytes", "threads", "words")

    def __init__(
        self, signature: Signature, compiled: CompiledKernel, code: CodeBlock, binding: Binding, threads: Threads,
        aligned: tuple[str, ...] = (),
    ) -> None:
        self.compiled = compiled
        self.aligned = frozenset(aligned)
        self.scratch_bytes = compiled.scratch_for(binding.dims)
        work_ns = compiled.work_ns(binding.dims)
        self.is_short = work_ns is not None and work_ns < SHORT_NS
        self.code = code
        self.words = fill_words(signature, compiled.slots, binding)
        slots = slot_words(compiled.slots)
        parameters = [(i, p.name) for i, p in enumerate(signature.parameters)]
        self.data_words = [(slots[f"{n}.data"], i) for i, n in parameters if f"{n}.data" in slots]
        self.scalar_words = [(slots[f"scalar.{n}"], i) for i, n in parameters if f"scalar.{n}" in slots]
        self._asked = threads
        self.threads = threads.most
        self.blocks: list[Block] = []
        self.direct = self.threads == 1 and not self.scratch_bytes and compiled.counters == 0
        self.run: Callable[[memoryview, int], None] = self._runner()

    def block(self) -> Block:
        """A new argument block: words 0 to 2, the slots, and one word that takes what the kernel doesn't ask for."""
        words = (ctypes.c_int64 * (FIRST_SLOT + len(self.words) + 1))(0, 0, 0, *self.words)
        view = memoryview(words).cast("B")
        return view.cast("q"), view.cast("f"), view.cast("d"), ctypes.addressof(words)

    def _runner(self) -> Callable[[memoryview, int], None]:
        function, address = self.code.function, self.code.address
        scratch_bytes, (threads, least, hold) = self.scratch_bytes, self._asked
        step = stride_bytes(scratch_bytes)
        if threads > 1:
            from . import workers  # a process whose launches take one worker never loads them

            def run_together(view: memoryview, block: int) -> None:
                workers.launch(address, view, block, threads, step, least, hold)

            return run_together
        if self.direct:

            def run_direct(view: memoryview, block: int) -> None:
                function(block, 0, 1)

            return run_direct

        def run_alone(view: memoryview, block: int) -> None:
            area = take_area(scratch_bytes)
            view[0] = area.scratch
            view[1] = step
            view[2] = area.sync
            area.counters[:] = NO_COUNTS
            function(block, 0, 1)
            areas.append(area)

        return run_alone


class BoundCall:
    """A call with its arguments bound: calling it runs the kernel on the same memory again.

    One thread runs it at a time; others wait. The arguments are kept alive and must stay where they are. _idle: there
    while nobody runs it. _form: what machine code needs to run it (vectorcall.py), if it may. _bounds: where scalars
    may be.
    """

    __slots__ = ("__weakref__", "_block", "_bounds", "_form", "_idle", "_keep", "_scalars", "_view", "entry", "name")

    def __init__(self, name: str, entry: Entry, block: Block, keep: Any, scalars: dict[str, tuple[int, Parameter]],
                 bounds: Bounds) -> None:
        self.name = name
        self.entry = entry
        self._view, _, _, self._block = block
        self._idle: Any = object()
        self._keep = (keep, block)
        self._scalars = scalars
        self._bounds = bounds
        self._form = bound_form(entry, self._block)
        if self._form is not None:
            quicken_bound(self)
        register_renewal(self)

    def renew_lock(self) -> None:
        """Forget who runs it: for a forked child, in which nobody does."""
        self._idle = True

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"a bound call of {self.name} can't be copied or pickled: it runs on the memory that it was "
                        "bound to; mend: bind the kernel again, sapper.prepare(kernel, ...)")

    def call_in_python(self) -> None:
        """A call. Where one worker runs it in little memory, machine code does so in the place of this."""
        self._take()
        try:
            self.entry.run(self._view, self._block)
        finally:
            self._idle = True

    __call__ = call_in_python

    def _take(self) -> None:
        """Wait until no thread runs it; then it is this one's, which puts `_idle` back."""
        pause_s = LOOK_AGAIN_S
        while True:
            try:
                del self._idle
            except AttributeError:
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, AT_MOST_S)
            else:
                return

    def set_scalar(self, name: str, value: Any) -> None:
        """Another value for a scalar parameter from the next call on. Raises ArgumentError."""
        if name not in self._scalars:
            known = ", ".join(self._scalars) or "none"
            raise ArgumentError("scalar", self.name, name, "no such scalar", f"one of {known}", "prepare anew")
        word, parameter = self._scalars[name]
        held = _arguments.scalar_word(value, self.name, parameter)
        self._take()
        try:
            self._bounds.allow({("scalar", name): held})
            self._view[word] = held
        finally:
            self._idle = True


_renewed: weakref.WeakSet[Any] = weakref.WeakSet()


def register_renewal(bound: Any) -> None:
    """Have `bound.renew_lock()` called in a forked child."""
    _renewed.add(bound)


def _renew() -> None:
    """In a forked child: the thread that held a lock may not exist here. All that they guard is whole at any moment."""
    for bound in _renewed:
        bound.renew_lock()


os.register_at_fork(after_in_child=_renew)


def choose_threads(compiled: CompiledKernel, dims: Mapping[str, int], size_bytes: int, wanted: int | None) -> Threads:
    """How many workers a launch takes: as many as there are tasks, and as the work is worth asking, or waking.

    wanted: the caller's limit, or None for that of the settings. size_bytes: of all tensors, the measure of work when
    the compiler gave no estimate.
    """
    limit = settings.threads() if wanted is None else wanted
    if not compiled.counters or limit == 1:
        return ALONE
    tasks = compiled.task_count(dims)
    if tasks is not None:
        limit = min(limit, tasks)
    work_ns = compiled.work_ns(dims)
    if work_ns is None:
        work_ns = size_bytes / ASSUMED_BYTES_PER_NS
    most, least = (max(1, min(limit, int(work_ns / grain_ns))) for grain_ns in (GRAIN_NS, WAKE_NS))
    return Threads(most, least, work_ns >= HOLD_NS)
