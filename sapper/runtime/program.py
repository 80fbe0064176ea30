"""Programs: several kernels on planned memory as one launch, with no Python between them.

Enters: kernels with their arguments, in order. Leaves: a `Program`, whose call runs them all on the same memory.
Holds: the results are those of calling the kernels one after the other. Workers enter once for each run and meet at a
barrier only before a kernel that touches what an earlier one, since the last barrier, writes, or writes what it reads.

    length = Variable("length", 1)
    step = Program([(scale, (x, factor, y)), (mix, (y, z, length, out))], threads=2)
    step()
    step(length=2)

What each kernel is compiled for, its argument block and all checks are those of `prepare`. program_code.py has the
machine code that walks the table of launches; every program uses the same.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from typing import Any

import numpy

from . import settings, workers
from .arguments import FIRST_SLOT, Binding, Parameter, Signature, scalar_word, slot_words
from .buffers import LINE_BYTES, Mapping
from .errors import ArgumentError
from .launch import Entry, interpret, launcher_with, register_renewal
from .loader import CodeBlock, load
from .scratch import SYNC_BYTES, stride_bytes
from .system import PAGE_BYTES, round_up

# Offsets in the control memory and in a launch of the table, in bytes; program_code.py says what lies there.
TABLE, SYNC, SYNC_COUNT, COUNTERS, SPIN_CYCLES = 24, 32, 40, 48, 56
ARRIVED, GENERATION, SLEEPERS = 64, 128, 132
CONTROL_BYTES = 192
KERNEL, BLOCK, FLAGS = 0, 8, 16
LAUNCH_BYTES = 32
ALONE, BARRIER = 1, 2
"""Flags of a launch: only worker 0 runs it; all workers meet after it."""

_WORD_BYTES = 8
_code: CodeBlock | None = None


class Variable:
    """A scalar argument that may change from run to run of a program, by its name.

    value: what it is at first, also when the kernels are bound.
    """

    __slots__ = ("name", "value")

    def __init__(self, name: str, value: Any) -> None:
        self.name = name
        self.value = value


class _Launch:
    """One kernel of a program, bound. reads, writes: ranges of memory, (first byte, one past the last)."""

    def __init__(self, kernel: Any, arguments: Sequence[Any], options: dict[str, Any]) -> None:
        plain = [a.value if isinstance(a, Variable) else a for a in arguments]
        launcher = launcher_with(kernel, options)
        filled, rest = launcher.by_position(tuple(plain), {})
        assert not rest
        self.entry: Entry
        self.binding: Binding
        self.entry, self.own_words, self.binding = launcher.bind(filled)
        self.signature: Signature = launcher.signature
        self.keep = filled
        self.variables = [
            (argument, self.signature.parameters[i]) for i, argument in enumerate(arguments)
            if isinstance(argument, Variable)
        ]
        self.reads: list[tuple[int, int]] = []
        self.writes: list[tuple[int, int]] = []
        for position, view in self.binding.tensors.items():
            low, high = view.extent
            stored = self.signature.parameters[position].name in self.entry.compiled.stored
            (self.writes if stored else self.reads).append((view.address + low, view.address + high))
        self.sync_index = 0
        self.barrier = False

    def follows(self, other: _Launch) -> bool:
        """Whether it must wait for `other`: one of the two writes what both touch."""
        return (
            _meet(self.writes, other.writes) or _meet(self.writes, other.reads) or _meet(self.reads, other.writes)
        )


def _meet(some: list[tuple[int, int]], others: list[tuple[int, int]]) -> bool:
    return any(low < other_high and other_low < high for low, high in some for other_low, other_high in others)


class Program:
    """Kernels in order, with their arguments; `program()` runs them, `program(name=value)` after setting variables.

    launches: (kernel, arguments); a scalar may be a `Variable`. options: those of a kernel's call: threads (None: as
    many as SAPPER_THREADS allows), static, target, interpret (each kernel by itself under the reference interpreter).
    Arguments are kept alive and must stay where they are. Raises what calling the kernels would, and ArgumentError for
    a variable whose value does not fit its parameter. One thread runs a program at a time; others wait.
    """

    def __init__(self, launches: Iterable[tuple[Any, Sequence[Any]]], **options: Any) -> None:
        steps = [(kernel, tuple(arguments)) for kernel, arguments in launches]
        self._lock = threading.Lock()
        self._interpreted: list[tuple[Any, tuple[Any, ...]]] | None = None
        self._variables: dict[str, list[Variable]] = {}
        for _, arguments in steps:
            for argument in arguments:
                if isinstance(argument, Variable):
                    known = self._variables.setdefault(argument.name, [])
                    if not any(argument is variable for variable in known):
                        known.append(argument)
        if options.pop("interpret", False) or settings.interpret():
            self._interpreted = steps
            self._options = options
            return
        threads = options.get("threads")
        self.threads: int = settings.threads() if threads is None else threads
        self._launches = [_Launch(kernel, arguments, options) for kernel, arguments in steps]
        self._plan()
        self._lay_out()
        register_renewal(self)

    # ---- planning

    def _plan(self) -> None:
        """Barriers, and a sync block for each launch that no barrier parts from another."""
        phase: list[_Launch] = []
        for launch in self._launches:
            if any(launch.follows(other) for other in phase):
                phase[-1].barrier = True
                phase = []
            launch.sync_index = len(phase)
            phase.append(launch)
        if phase:
            phase[-1].barrier = True  # leaves the counters at zero for the next run

    def _lay_out(self) -> None:
        """The memory: control, sync blocks, table, argument blocks, scratch."""
        launches = self._launches
        sync_count = 1 + max((launch.sync_index for launch in launches), default=0)
        step = stride_bytes(max((launch.entry.scratch_bytes for launch in launches), default=0))
        sync = round_up(CONTROL_BYTES, LINE_BYTES)
        table = sync + sync_count * SYNC_BYTES
        block = round_up(table + LAUNCH_BYTES * (len(launches) + 1), LINE_BYTES)
        blocks = []
        for launch in launches:
            blocks.append(block)
            block = round_up(block + _WORD_BYTES * (FIRST_SLOT + len(launch.entry.words) + 1), LINE_BYTES)
        scratch = round_up(block, PAGE_BYTES)
        self._mapping = mapping = Mapping(scratch + step * self.threads)
        base = mapping.address
        memory: Any = mapping.bytes_view()
        words = numpy.frombuffer(memory, numpy.int64, count=scratch // _WORD_BYTES)
        self._words = words
        self._view = memoryview(memory).cast("B")[: scratch].cast("q")
        self._sync = range(sync // _WORD_BYTES, table // _WORD_BYTES)

        def put(offset: int, *values: int) -> None:
            words[offset // _WORD_BYTES : offset // _WORD_BYTES + len(values)] = values

        put(TABLE, base + table, base + sync, sync_count)
        put(COUNTERS, max((launch.entry.compiled.counters or 0 for launch in launches), default=0))
        places: dict[int, list[tuple[int, Parameter, str]]] = {}
        for number, (launch, at) in enumerate(zip(launches, blocks, strict=True)):
            alone = not launch.entry.compiled.counters
            put(table + LAUNCH_BYTES * number, launch.entry.code.address, base + at,
                (ALONE if alone else 0) | (BARRIER if launch.barrier else 0))
            put(at, base + scratch, step, base + sync + SYNC_BYTES * launch.sync_index, *launch.entry.words)
            for word, value in launch.own_words.items():
                words[at // _WORD_BYTES + word] = value
            slots = slot_words(launch.entry.compiled.slots)
            for variable, parameter in launch.variables:
                word = slots.get(f"scalar.{parameter.name}", FIRST_SLOT + len(launch.entry.words))
                places.setdefault(id(variable), []).append(
                    (at // _WORD_BYTES + word, parameter, launch.signature.kernel))
        # For each variable, by dtype: the words that take its value.
        self._places: dict[str, list[tuple[Parameter, str, Any]]] = {}
        for name, variables in self._variables.items():
            groups: dict[str, list[tuple[int, Parameter, str]]] = {}
            for place in (p for variable in variables for p in places[id(variable)]):
                groups.setdefault(place[1].dtype.name, []).append(place)
            self._places[name] = [
                (group[0][1], group[0][2], numpy.array([word for word, _, _ in group])) for group in groups.values()
            ]

    @property
    def barriers(self) -> int:
        """How many times in a run the workers meet, the last time at its end."""
        return sum(launch.barrier for launch in self._launches)

    # ---- running

    def __call__(self, **values: Any) -> None:
        for name in values:
            if name not in self._variables:
                known = ", ".join(self._variables) or "none"
                raise ArgumentError("scalar", "the program", name, "no such variable", f"one of {known}",
                                    "give it as Variable(name, value) where the program is made")
        if self._interpreted is not None:
            self._interpret(values)
            return
        with self._lock:
            words = [
                (where, scalar_word(value, kernel, parameter))
                for name, value in values.items() for parameter, kernel, where in self._places[name]
            ]
            for where, word in words:
                self._words[where] = word
            code = _program_code()
            address = self._mapping.address
            if self.threads == 1:
                code.function(address, 0, 1)
            else:
                spin = workers.spin_cycles(self.threads)
                self._view[SPIN_CYCLES // _WORD_BYTES] = spin
                workers.launch(code.address, self._view, address, self.threads, 0)

    def _interpret(self, values: dict[str, Any]) -> None:
        for name, value in values.items():
            for variable in self._variables[name]:
                variable.value = value
        for kernel, arguments in self._interpreted or ():
            plain = [a.value if isinstance(a, Variable) else a for a in arguments]
            interpret(kernel, *plain, **self._options)

    def renew_lock(self) -> None:
        """For a forked child, in which no thread runs the program: forget one that was in it."""
        self._lock = threading.Lock()
        self._view[ARRIVED // _WORD_BYTES] = 0
        self._view[GENERATION // _WORD_BYTES] = 0
        for word in self._sync:
            self._view[word] = 0


def _program_code() -> CodeBlock:
    global _code
    if _code is None:
        _code = load(workers.kept_code("program", _make_code)[0])
    return _code


def _make_code() -> tuple[bytes, dict[str, int]]:
    from .program_code import program_code

    return program_code(), {}
