"""Programs: several kernels on planned memory as one launch, with no Python between them.

Enters: kernels with their arguments, in order. Leaves: a `Program`, whose call runs them all on the same memory.
Holds: the results are those of calling the kernels one after the other. Workers enter once for each run and meet at a
barrier only before a kernel that touches what an earlier one, since the last barrier, writes, or writes what it reads.

    length, count = Variable("length", 1), Variable("count", 512)
    step = Program([(scale, (Rows(x, count), factor, Rows(y, count))), (mix, (y, z, length, out))], threads=2)
    step()
    step(length=2, count=37)

What each kernel is compiled for, its argument block and all checks are those of `prepare`. program_code.py has the
machine code that walks the table of launches; every program uses the same. sapper/ahead makes files of the same parts.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import numpy

from ..ir.extents import names_in
from ..ir.types import DTYPES, spell_nested
from ..lang.errors import CallError
from . import settings, workers
from .arguments import (
    FIRST_SLOT,
    Binding,
    Parameter,
    Signature,
    fill_words,
    integer_range,
    scalar_word,
    slot_words,
)
from .bounds import Bounds
from .buffers import HUGE_THRESHOLD_BYTES, LINE_BYTES, Mapping
from .cache import kept_code
from .compiled import CompiledKernel
from .entries import HOLD_NS, register_renewal
from .errors import ArgumentError, LaunchError
from .launch import Launcher, configuration, interpret, launcher_with
from .loader import CodeBlock, load
from .scratch import SYNC_BYTES, stride_bytes
from .specialise import Specialisation, extent_bound, large_in_program, specialise
from .streams import stream_of
from .system import PAGE_BYTES, round_up

if TYPE_CHECKING:
    from .profile import Launched

# Offsets in the control memory and in a launch of the table, in bytes; program_code.py says what lies there.
TABLE, SYNC, SYNC_COUNT, COUNTERS, SPIN_CYCLES = 24, 32, 40, 48, 56
ARRIVED, GENERATION, SLEEPERS, TIMES, TIMES_BYTES = 64, 128, 132, 136, 144
CONTROL_BYTES = 192
KERNEL, BLOCK, FLAGS, AHEAD, STREAM_WORD, GRANULES, GRANULE_BYTES = 0, 8, 16, 20, 24, 28, 32
LAUNCH_BYTES = 40
OWN_SYNC = 16
"""Where in an argument block the address of the launch's sync block is, in bytes."""
ALONE, BARRIER = 1, 2
"""Flags of a launch: only worker 0 runs it; all workers meet after it."""
LEAST_SHARED_NS = 1000.0
"""Launches of less work than this, one of which waits for the other, are left to worker 0: they need no barrier between
them. Measured on a Zen 3, chains of 32 on one thread, on two that share them, on two of which one runs them, us for
each: RMSNorm of 4 x 576 (estimated at 0.6) 0.33, 0.52, 0.36; SwiGLU of 4 x 256 (0.6) 0.49, 0.64, 0.49; softmax of
8 x 256 (1.0) 1.00, 1.05, 0.99, of 16 x 256 (1.9) 1.96, 1.43, 1.96; RMSNorm of 16 x 576 (2.3) 1.29, 1.28, 1.36."""

WORD_BYTES = 8
ANY_WORD = -(1 << 63), (1 << 63) - 1
RUNS_UNSEEN = 64
"""Runs between looks at how many CPUs there are for the workers, on which hangs how long one spins."""

Compile = Callable[[Launcher, Specialisation, dict[str, int]], tuple[CompiledKernel, Any]]
"""A kernel for what a launch lets it assume and for its extents, and whatever its caller keeps of the code."""


class Variable:
    """A scalar argument, or a number of rows, that may change from run to run of a program, by its name.

    value: what it is at first, also when the kernels are bound; of rows, all where there are fewer.
    """

    __slots__ = ("name", "value")

    def __init__(self, name: str, value: Any) -> None:
        self.name = name
        self.value = value


class Rows:
    """A tensor argument: the first `count` rows of an array, from none to all of them.

    count: a Variable. All tensors of a kernel that share the dimension are given so.
    """

    __slots__ = ("array", "count")

    def __init__(self, array: Any, count: Variable) -> None:
        self.array = array
        self.count = count


class Place(NamedTuple):
    """A word of an argument block that a variable sets. most: the largest number of rows; None for a scalar. bounds: of
    its launch."""

    variable: Variable
    word: int
    parameter: Parameter
    kernel: str
    most: int | None
    bounds: Bounds | None = None

    @property
    def leaf(self) -> tuple[str, str]:
        """By what name indices know it."""
        return "scalar" if self.most is None else "dim", self.parameter.name

    @property
    def free(self) -> tuple[int, int]:
        """From and to where its word may be without a look at indices."""
        everywhere = (0, 1) if self.parameter.dtype.kind == "b" else self.plain
        found = everywhere if self.bounds is None else self.bounds.free.get(self.leaf, everywhere)
        return ANY_WORD if found == everywhere else found

    @property
    def plain(self) -> tuple[int, int]:
        """From and to where an int is its own word; an empty range where none is."""
        if self.most is not None:
            return 0, self.most
        return integer_range(self.parameter.dtype) if self.parameter.dtype.kind in "iu" else (1, 0)

    @property
    def first_word(self) -> int:
        """The word for the variable's own value, of which all rows are the most. Raises ArgumentError."""
        return self.word_of(_first_rows(self.variable.value, self.most))

    def word_of(self, value: Any) -> int:
        """The word for a value. Raises ArgumentError."""
        word = scalar_word(value, self.kernel, self.parameter)
        if self.most is not None and not 0 <= word <= self.most:
            raise ArgumentError("range", self.kernel, self.parameter.name, f"{value} rows", f"0 to {self.most}",
                                "make the program with larger arrays")
        return word


class Launch:
    """One kernel of a program, bound for the most rows that it may have.

    large_bytes: see large_in_program. words: of the argument block from FIRST_SLOT on. places: those that variables
    set. reads, writes: ranges of memory, (first byte, one past the last). code: what `compile` gave. work_ns:
    about how long one worker takes, None where that is not known. alone: worker 0 runs it. stream: see streams.py;
    ahead: how many launches further on is the one whose stream workers ask for while they wait after this one, 0 for
    none.
    """

    def __init__(self, kernel: Any, arguments: Sequence[Any], options: dict[str, Any], compile: Compile,
                 large_bytes: int) -> None:
        plain = [a.array if isinstance(a, Rows) else a.value if isinstance(a, Variable) else a for a in arguments]
        launcher = launcher_with(kernel, options)
        filled, rest = launcher.by_position(tuple(plain), {})
        assert not rest
        self.signature: Signature = launcher.signature
        self.binding: Binding = self.signature.bind(filled)
        rows = self._rows(arguments)
        static = launcher.static_for(self.binding.dims, rows)
        self.specialisation = _for_rows(specialise(self.signature, self.binding, static, large_bytes), rows)
        self.compiled, self.code = compile(launcher, self.specialisation, self.binding.dims)
        self.signature.check_stores(self.binding, self.compiled.stored)
        most = min((self.binding.dims[dim] for dim in rows), default=0)
        of_extents = [row for row in self.compiled.requires if row[1] != "indexed"]
        for count in sorted({0, min(1, most), most}):   # what is asked rises or falls with them: it holds between
            dims = self.binding.dims if count == most else self.binding.dims | dict.fromkeys(rows, count)
            self.signature.check_requires(self.binding._replace(dims=dims), of_extents)
        self.bounds = Bounds(self.signature, self.binding, self.compiled.requires,
                             {dim: _first_rows(count.value, self.binding.dims[dim]) for dim, count in rows.items()})
        self.words = fill_words(self.signature, self.compiled.slots, self.binding)
        self.scratch_bytes = self.compiled.scratch_for(self.binding.dims)
        self.keep = filled
        self.places = self._places(arguments, rows)
        for place in self.places:
            word = place.first_word
            if place.word < FIRST_SLOT + len(self.words):
                self.words[place.word - FIRST_SLOT] = word
        self.reads: list[tuple[int, int]] = []
        self.writes: list[tuple[int, int]] = []
        for position, view in self.binding.tensors.items():
            low, high = view.extent
            stored = self.signature.parameters[position].name in self.compiled.stored
            (self.writes if stored else self.reads).append((view.address + low, view.address + high))
        self.sync_index = 0
        self.work_ns = self.compiled.work_ns(self.binding.dims)
        self.alone = not self.compiled.counters
        self.barrier = False
        self.stream = stream_of(self)
        self.ahead = 0

    @property
    def block_words(self) -> int:
        """Words of the argument block, with one that takes what the kernel doesn't ask for."""
        return FIRST_SLOT + len(self.words) + 1

    @property
    def flags(self) -> int:
        return (ALONE if self.alone else 0) | (BARRIER if self.barrier else 0)

    @property
    def asking(self) -> tuple[int, int, int, int]:
        """AHEAD and what follows in a launch of the table."""
        return self.ahead * LAUNCH_BYTES, *(self.stream or (0, 0, 0))[:3]

    def _rows(self, arguments: Sequence[Any]) -> dict[str, Variable]:
        """Dimension -> the variable that says its extent. Raises ArgumentError where tensors disagree about it."""
        rows: dict[str, Variable] = {}
        given = dict(zip(self.signature.parameters, arguments, strict=False))
        for parameter, argument in given.items():
            if isinstance(argument, Rows):
                first = (parameter.dims or (0,))[0]
                if not isinstance(first, str):
                    raise ArgumentError("shape", self.signature.kernel, parameter.name, "Rows",
                                        "a plain argument, as it has no first dimension with a name", "pass the array")
                rows.setdefault(first, argument.count)
        for parameter, argument in given.items():
            for axis, dim in enumerate(parameter.dims or ()):
                for name in names_in(dim):
                    if name in rows and not (
                            axis == 0 and isinstance(argument, Rows) and argument.count is rows.get(str(dim))):
                        raise ArgumentError("shape", self.signature.kernel, parameter.name,
                                            f"dimension {axis} ({spell_nested(dim)}) of a fixed extent",
                                            f"rows by the variable {rows[name].name}, as other tensors have",
                                            f"pass Rows(x, {rows[name].name})")
        return rows

    def _places(self, arguments: Sequence[Any], rows: dict[str, Variable]) -> list[Place]:
        slots = slot_words(self.compiled.slots)
        spare = FIRST_SLOT + len(self.words)
        places = []
        for parameter, argument in zip(self.signature.parameters, arguments, strict=False):
            if isinstance(argument, Variable):
                word = slots.get(f"scalar.{parameter.name}", spare)
                places.append(Place(argument, word, parameter, self.signature.kernel, None, self.bounds))
        for dim, count in rows.items():
            places.append(Place(count, slots.get(f"dim.{dim}", spare), Parameter(dim, DTYPES["i64"], None),
                                self.signature.kernel, self.binding.dims[dim], self.bounds))
        return places

    def allow(self, values: dict[str, Any]) -> None:
        """Look through indices for other values of variables. Raises ArgumentError."""
        self.bounds.allow({place.leaf: place.word_of(values[place.variable.name]) for place in self.places
                           if place.variable.name in values})

    def follows(self, other: Launch) -> bool:
        """Whether it must wait for `other`: one of the two writes what both touch."""
        return (
            _meet(self.writes, other.writes) or _meet(self.writes, other.reads) or _meet(self.reads, other.writes)
        )


def _first_rows(value: Any, most: int | None) -> Any:
    """All rows are the most that there are at first."""
    return value if most is None or not isinstance(value, int) else min(value, most)


def _rows_of(kernel: Any, rows: Rows, given: bool) -> int:
    """How many rows there are now. given: in this call. Raises ArgumentError for more than the array has, then."""
    place = Place(rows.count, 0, Parameter(rows.count.name, DTYPES["i64"], None), kernel.name, len(rows.array))
    return place.word_of(rows.count.value) if given else place.first_word


def _for_rows(specialisation: Specialisation, rows: Iterable[str]) -> Specialisation:
    """Rows may be any number up to their bound, so no divisor holds; nor is one row for sure one."""
    classes = tuple((dim, (extent_bound(max(bound, 2)), 1) if dim in rows else (bound, divisor))
                    for dim, (bound, divisor) in specialisation.dim_classes)
    return specialisation._replace(dim_classes=classes)


def _meet(some: list[tuple[int, int]], others: list[tuple[int, int]]) -> bool:
    return any(low < other_high and other_low < high for low, high in some for other_low, other_high in others)


_share_all = False


def is_short(launch: Launch) -> bool:
    """Whether a second worker would take off less than a barrier costs."""
    if _share_all:
        return False
    if launch.alone or launch.compiled.task_count(launch.binding.dims) == 1:
        return True
    return launch.work_ns is not None and launch.work_ns < LEAST_SHARED_NS


@contextmanager
def all_shared() -> Iterator[None]:
    """Workers share all launches of programs made in the block, however short: to measure barriers, or to test them."""
    global _share_all
    before, _share_all = _share_all, True
    try:
        yield
    finally:
        _share_all = before


def plan_barriers(launches: Sequence[Launch]) -> None:
    """What worker 0 does alone, barriers, a sync block for each launch of several workers that no barrier parts from
    another, and what is asked for meanwhile. Launches of worker 0 share the last block, and wait for each other without
    a barrier."""
    for before, launch in pairwise(launches):
        if is_short(before) and is_short(launch) and launch.follows(before):
            before.alone = launch.alone = True
    phase: list[Launch] = []
    for launch in launches:
        if any(launch.follows(other) for other in phase if not (launch.alone and other.alone)):
            phase[-1].barrier = True
            phase = []
        launch.sync_index = sum(not other.alone for other in phase)
        phase.append(launch)
    shared = sync_blocks(launches)
    for launch in launches:
        if launch.alone:
            launch.sync_index = shared
    if phase:
        phase[-1].barrier = True  # leaves the counters at zero for the next run
    plan_asking(launches)


def sync_blocks(launches: Sequence[Launch]) -> int:
    """How many blocks barriers set to zero: those of launches of several workers, at least one."""
    return 1 + max((launch.sync_index for launch in launches if not launch.alone), default=0)


def plan_asking(launches: Sequence[Launch]) -> None:
    """After each barrier there is a next stream: of weights, which no launch writes."""
    written = sorted(one for launch in launches for one in launch.writes)
    highest = list(accumulate((high for _, high in written), max))
    following = 0
    for number in range(len(launches) - 1, -1, -1):
        launch = launches[number]
        launch.ahead = following - number if launch.barrier and following else 0
        if launch.stream is not None:
            low, high = launch.stream.address, launch.stream.address + launch.stream.bytes
            below = bisect_left(written, (high, high))
            if not below or highest[below - 1] <= low:
                following = number


class Layout(NamedTuple):
    """Where the parts of a program lie in its memory, in bytes from its control memory.

    sync_count: sync blocks from `sync` on that barriers set to zero; there is one more. blocks: the argument block of
    each launch. counters: most that a launch uses. scratch: begins here, on a page; step_bytes of it for each worker.
    """

    sync: int
    sync_count: int
    table: int
    blocks: tuple[int, ...]
    counters: int
    scratch: int
    step_bytes: int

    @classmethod
    def of(cls, launches: Sequence[Launch]) -> Layout:
        sync_count = sync_blocks(launches)
        sync = round_up(CONTROL_BYTES, LINE_BYTES)
        table = sync + (sync_count + 1) * SYNC_BYTES
        block = round_up(table + LAUNCH_BYTES * (len(launches) + 1), LINE_BYTES)
        blocks = []
        for launch in launches:
            blocks.append(block)
            block = round_up(block + WORD_BYTES * launch.block_words, LINE_BYTES)
        return cls(sync, sync_count, table, tuple(blocks),
                   max((launch.compiled.counters or 0 for launch in launches), default=0), round_up(block, PAGE_BYTES),
                   stride_bytes(max((launch.scratch_bytes for launch in launches), default=0)))


def _once_for_equal_launches(compile: Compile) -> Compile:
    """The layers of a model launch the same kernels on the same shapes: what they need is looked up once."""
    found: dict[Any, tuple[CompiledKernel, Any]] = {}

    def looked_up(
        launcher: Launcher, specialisation: Specialisation, dims: dict[str, int]
    ) -> tuple[CompiledKernel, Any]:
        key = id(launcher), specialisation, tuple(dims.items())
        if key not in found:
            found[key] = compile(launcher, specialisation, dims)
        return found[key]

    return looked_up


class Program:
    """Kernels in order, with their arguments; `program()` runs them, `program(name=value)` after setting variables.

    launches: (kernel, arguments); a scalar may be a `Variable`, a tensor `Rows`. options: those of a kernel's call:
    threads (None: as many as SAPPER_THREADS allows), static, target, interpret (each kernel by itself under the
    reference interpreter).
    Arguments are kept alive and must stay where they are. Raises what calling the kernels would, and ArgumentError for
    a variable whose value does not fit its parameter. One thread runs a program at a time; others wait.
    """

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Program can't be copied or pickled: it runs on the memory that it was bound to; mend: make "
                        "it anew, sapper.Program([...])")

    def __init__(self, launches: Iterable[tuple[Any, Sequence[Any]]], **options: Any) -> None:
        steps: list[tuple[Any, tuple[Any, ...]]] = []
        for step in launches:
            if not (isinstance(step, (tuple, list)) and len(step) == 2 and hasattr(step[0], "parameters")):
                raise CallError("type", "a step of a Program is a kernel and its arguments", "", repr(step),
                                "(kernel, (a, b, c))", "write Program([(kernel, (a, b, c)), ...])")
            steps.append((step[0], tuple(step[1])))
        self._lock = threading.Lock()
        self._runs_unseen = 0
        self._interpreted: list[tuple[Any, tuple[Any, ...]]] | None = None
        self._variables: dict[str, list[Variable]] = {}
        for _, arguments in steps:
            for argument in arguments:
                variable = argument.count if isinstance(argument, Rows) else argument
                if isinstance(variable, Variable):
                    known = self._variables.setdefault(variable.name, [])
                    if not any(variable is other for other in known):
                        known.append(variable)
        if options.pop("interpret", False) or settings.interpret():
            self._interpreted = steps
            self._options = options
            return
        threads = options.get("threads")
        self.threads: int = settings.threads() if threads is None else threads
        compile = _once_for_equal_launches(Launcher.get_compiled)
        large_bytes = large_in_program(configuration().find_target(options.get("target")))
        self._launches = [Launch(kernel, arguments, options, compile, large_bytes) for kernel, arguments in steps]
        kept: dict[Specialisation, Specialisation] = {}
        for launch in self._launches:       # a model has thousands of launches, of which most are equal
            launch.specialisation = kept.setdefault(launch.specialisation, launch.specialisation)
        plan_barriers(self._launches)
        work_ns = sum(HOLD_NS if launch.work_ns is None else launch.work_ns for launch in self._launches)
        self._hold = work_ns >= HOLD_NS
        if all(launch.alone for launch in self._launches):
            self.threads = 1
        self._fill(Layout.of(self._launches))
        register_renewal(self)

    def _fill(self, layout: Layout) -> None:
        """The memory: control, sync blocks, table, argument blocks, scratch."""
        launches = self._launches
        size_bytes = layout.scratch + layout.step_bytes * self.threads
        self._mapping = mapping = Mapping(size_bytes, huge=size_bytes >= HUGE_THRESHOLD_BYTES)
        base = mapping.address
        memory: Any = mapping.bytes_view()
        words = numpy.frombuffer(memory, numpy.int64, count=layout.scratch // WORD_BYTES)
        numbers = words.view(numpy.int32)
        self._view = memoryview(memory).cast("B")[: layout.scratch].cast("q")
        self._sync = range(layout.sync // WORD_BYTES, layout.table // WORD_BYTES)

        def put(offset: int, *values: int) -> None:
            words[offset // WORD_BYTES : offset // WORD_BYTES + len(values)] = values

        put(TABLE, base + layout.table, base + layout.sync, layout.sync_count, layout.counters)
        groups: dict[str, dict[tuple[str, int | None], list[tuple[Place, int]]]] = {}
        for number, (launch, at) in enumerate(zip(launches, layout.blocks, strict=True)):
            put(layout.table + LAUNCH_BYTES * number, launch.code.address, base + at)
            numbers[(layout.table + LAUNCH_BYTES * number + FLAGS) // 4 :][:5] = launch.flags, *launch.asking
            put(at, base + layout.scratch, layout.step_bytes, base + layout.sync + SYNC_BYTES * launch.sync_index,
                *launch.words)
            for place in launch.places:
                kind = place.parameter.dtype.name, place.most
                groups.setdefault(place.variable.name, {}).setdefault(kind, []).append(
                    (place, at // WORD_BYTES + place.word))
        self._groups = {name: list(kinds.values()) for name, kinds in groups.items()}
        self._values: dict[str, Any] = {}   # that runs have set
        self._see_places()

    def _see_places(self) -> None:
        """For each variable, by dtype and bound: one of its places, where an int is its own word and all words are free
        to be, whether they may not be elsewhere, and those that take its value."""
        self._places: dict[str, list[tuple[Place, int, int, bool, tuple[int, ...]]]] = {
            name: [(group[0][0], *_common([group[0][0].plain, *(place.free for place, _ in group)]),
                    any(place.free != ANY_WORD for place, _ in group), tuple(word for _, word in group))
                   for group in kinds] for name, kinds in self._groups.items()
        }

    @property
    def barriers(self) -> int:
        """How many times in a run the workers meet, the last time at its end."""
        return sum(launch.barrier for launch in self._launches)

    # ---- running

    def __call__(self, **values: Any) -> None:
        self._run(values, False)

    def profile(self, **values: Any) -> list[Launched]:
        """Run it, and say where the time goes: for each kernel in order, how long each worker was in it.

        Reading the clock adds some 20 ns to a kernel. Raises LaunchError under the reference interpreter.
        """
        from .profile import times_of

        if self._interpreted is not None:
            raise LaunchError("a profile: found a program under the interpreter; expected machine code; mend: run it "
                              "without interpret=True and SAPPER_INTERPRET")
        stamps = 2 * len(self._launches) + 1
        times = numpy.zeros((self.threads, stamps), numpy.int64)
        self._view[TIMES // WORD_BYTES], self._view[TIMES_BYTES // WORD_BYTES] = times.ctypes.data, times.strides[0]
        self._run(values, True)
        return times_of(self._launches, times, workers.cycles_per_ns())

    def _run(self, values: dict[str, Any], profiled: bool) -> None:
        """Little Python, and none of NumPy: the weights of a model have driven it out of the caches, so that each line
        of it comes from memory, and workers that wait for too long fall asleep."""
        if self._interpreted is not None:
            self._interpret(values)
            return
        with self._lock:
            words, seen = [], True
            for name, value in values.items():
                places = self._places.get(name)
                if places is None:
                    raise self._unknown(name)
                for place, low, high, bounded, where in places:
                    plain = type(value) is int and low <= value <= high
                    seen = seen and (plain or not bounded)
                    words.append((where, value if plain else place.word_of(value)))
            if not seen:
                self._look_through(self._values | values)
            self._values.update(values)
            view = self._view
            for where, word in words:
                for index in where:
                    view[index] = word
            code = _program_code(profiled)
            if self.threads == 1:
                code.function(self._mapping.address, 0, 1)
                return
            if not self._runs_unseen:
                view[SPIN_CYCLES // WORD_BYTES] = workers.wait_cycles(self.threads)
                self._runs_unseen = RUNS_UNSEEN
            self._runs_unseen -= 1
            workers.launch(code.address, view, self._mapping.address, self.threads, 0, hold=self._hold)

    def _look_through(self, values: dict[str, Any]) -> None:
        """A variable is where not all indices are known to be inside. Raises ArgumentError for one that is not; then
        nothing has changed."""
        before = [launch.bounds.state for launch in self._launches]
        try:
            for launch in self._launches:
                launch.allow(values)
        except ArgumentError:
            for launch, state in zip(self._launches, before, strict=True):
                launch.bounds.state = state
            raise
        self._see_places()

    def _unknown(self, name: str) -> CallError:
        return CallError("scalar", f"the program has no variable `{name}`", name, "no such variable",
                         f"one of {', '.join(self._variables) or 'none'}",
                         "give it as Variable(name, value) where the program is made")

    def _interpret(self, values: dict[str, Any]) -> None:
        for name, value in values.items():
            if name not in self._variables:
                raise self._unknown(name)
            for variable in self._variables[name]:
                variable.value = value
        for kernel, arguments in self._interpreted or ():
            plain = [a.array[: _rows_of(kernel, a, a.count.name in values)] if isinstance(a, Rows) else
                     a.value if isinstance(a, Variable) else a for a in arguments]
            interpret(kernel, *plain, **self._options)

    def renew_lock(self) -> None:
        """For a forked child, in which no thread runs the program: forget one that was in it."""
        self._lock = threading.Lock()
        self._view[ARRIVED // WORD_BYTES] = 0
        self._view[GENERATION // WORD_BYTES] = 0
        for word in self._sync:
            self._view[word] = 0


def _common(ranges: Iterable[tuple[int, int]]) -> tuple[int, int]:
    lows, highs = zip(*ranges, strict=True)
    return max(lows), min(highs)


@cache
def _program_code(profiled: bool) -> CodeBlock:
    def make() -> tuple[bytes, dict[str, int]]:
        from .program_code import program_code

        return program_code(profiled), {}

    return load(kept_code("program, profiled" if profiled else "program", make)[0])
