"""Searching the schedule of a kernel for one shape: model, search, trials, database and the file of what was found.

Enters: a kernel (of the library, or a user's), a shape, a target, a budget. Leaves: a `Result` in the database, and in
the file that calls read (sapper/runtime/tuned.py). Holds: a schedule is kept only if a slower check on other shapes
finds it right, and if in a last run, longer than those of the search, it still beats the model's by more than MARGIN.
The target is this CPU, or the level of a CUDA device. Without either a search on paper compares the model's estimates:
nothing is run, and nothing of it is kept.
"""

from __future__ import annotations

import fcntl
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy

from .. import emulate
from ..codegen.pipeline import HINTS, LARGE, facts_of
from ..ir.nodes import Function
from ..ir.types import TensorType
from ..lane.choices import Choices, choices
from ..lane.rows import LoweringError
from ..runtime import settings, tuned
from ..runtime.arguments import Parameter, Signature
from ..runtime.cache import toolchain_key
from ..runtime.cases import arguments_of_shape
from ..runtime.check import check_kernel
from ..runtime.specialise import LARGE_BYTES, aligned_tensors, dim_class
from ..tile.canonical import canonicalize
from ..tile.reduce_loops import reduce_loops
from ..tile.rounding import expect
from ..tile.schedule import DimClass, Schedule, ScheduleError, Specialization, StrideClass
from .database import Database, DatabaseError, Key, Result
from .operands import placed
from .rank import Rank, rank, worth_a_trial
from .search import MARGIN, search
from .space import Step, steps
from .trial import Task, Trial, check_candidate, try_candidate

CHECK_BYTES = 64 << 20
"""Results of calls up to this size are compared with the reference before they are timed; what is to be kept is checked
on other shapes in any case."""
CHECK_RUNS = 6
FINAL_BUDGET_S = 1.0
EMULATED_EXTENTS, REMAINDER = (192, 320), 64
"""Extents up to which schedules for devices are checked, and what keeps rows aligned as they are."""
TILE_SIZES = (None, 16, 40)
"""Of the interpreter that says what must come out, in one run each."""
CALL = "call"

Tell = Callable[[str], None]


class ShapeError(ValueError):
    """There are no arguments of a shape: extents that do not go together, or more than memory holds."""


@dataclass(frozen=True, slots=True)
class Subject:
    """A kernel to be tuned. shape: what a library kernel's cases are made from, else the extents of its dims.
    make_arguments, reference, compare: those of a library kernel, else None. scalars: values of scalar arguments;
    others are those of make_arguments, or as arguments_of_shape makes them."""

    name: str
    kernel: Any
    shape: dict[str, int]
    make_arguments: Any = None
    reference: Any = None
    compare: Any = None
    check_shapes: tuple[Mapping[str, int], ...] = ()
    scalars: Mapping[str, Any] = field(default_factory=dict)


class Known:
    """What is known of the calls of a kernel on a target, and what the lowering makes of a schedule for them.

    dims: extents. static: those that calls compile in, as the kernel is specialised for them. classes: of each other
    (runtime/specialise.py). aligned: tensors whose rows start at cache lines. refused: schedules that the lowering
    refused, by their text: each is told once.
    """

    def __init__(self, kernel: Any, target: Any, dims: Mapping[str, int], aligned: Iterable[str]) -> None:
        self.kernel, self.target, self.dims = kernel, target, dims
        self.facts = facts_of(target)
        self.static = {dim: extent for dim, extent in dims.items() if dim in kernel.specialise}
        self.classes = {dim: dim_class(extent) for dim, extent in dims.items() if dim not in self.static}
        self.strides: dict[str, StrideClass] = {
            name: "contiguous" for name, type in kernel.parameters if isinstance(type, TensorType)}
        self.aligned = frozenset(aligned)
        self.refused: set[str] = set()

    def function(self) -> Function:
        function: Function = self.kernel.tile_ir(self.static)
        reduce_loops(function)
        canonicalize(function)
        return function

    def choices(self, schedule: Schedule, exact: bool = False) -> Choices:
        """exact: of the very extents, where a call is compiled for their classes. Raises what lowering raises."""
        hints = {dim: DimClass(self.dims[dim] if exact else HINTS.get(bound, LARGE), divisor)
                 for dim, (bound, divisor) in self.classes.items()}
        return choices(self.function(), schedule, self.facts, Specialization(hints, self.strides, self.aligned))

    def rank(self, blocks: Iterable[str], schedule: Schedule) -> list[Rank]:
        return rank(self.kernel, self.target, blocks, schedule, static_dims=self.static, unit_strides=self.strides,
                    dim_classes=self.classes, aligned=self.aligned)

    def neighbours(self, schedule: Schedule, threads: int, tell: Tell) -> list[Step]:
        """Steps that the lowering takes: one that it refuses costs no child process."""
        made = self.choices(schedule)
        hopeful = worth_a_trial(self.rank(made.blocks, schedule)) if made.blocks else set()
        return [step for step in steps(schedule, made, self.facts.vector_registers, threads)
                if (step.part != "block" or step.schedule.assembly[-1] in hopeful) and self._is_taken(step, tell)]

    def _is_taken(self, step: Step, tell: Tell) -> bool:
        try:
            self.choices(step.schedule)
        except (ScheduleError, LoweringError) as error:
            text = repr(step.schedule)
            if text not in self.refused:
                self.refused.add(text)
                tell(f"     {step.label:<44} refused  {str(error).splitlines()[0]}")
            return False
        return True

    def estimate(self, schedule: Schedule) -> tuple[float, str]:
        """(cycles, of what) on paper: of a call, that a processor works on the product of several warps; else of the
        main loop, for each operation or each byte that it stores. Raises what compiling raises."""
        product = self.choices(schedule).product
        if product is None:
            (found,) = self.rank((), schedule)
            return found.cycles, found.unit
        exact = self.choices(replace(product.schedule(), assembly=schedule.assembly), exact=True).product
        assert exact is not None
        return exact.cycles, CALL


@dataclass(frozen=True, slots=True)
class Paper:
    """A search on paper. schedule: the one of the lowest estimate. cycles: that estimate, model_cycles: that of the
    model's own schedule, for one `unit` (a call, an operation, a byte)."""

    schedule: Schedule
    cycles: float
    model_cycles: float
    unit: str
    tried: int
    finished: bool


def tune_on_paper(subject: Subject, target: Any, budget_s: float, tell: Tell,
                  clock: Callable[[], float] = time.monotonic) -> Paper:
    """Search by the model's estimates, for any target that is known. Raises what compiling raises."""
    arguments, dims = _arguments(subject)
    known = Known(subject.kernel, target, dims, _aligned(subject.kernel, target, arguments))
    workers = target.processors if target.assembler_allocates else 1
    end = clock() + budget_s
    model, unit = known.estimate(Schedule())
    costs = {repr(Schedule()): model}
    count = 0

    def attempt(step: Step, best: Schedule) -> float | None:
        nonlocal count
        count += 1
        try:
            cycles, of = known.estimate(step.schedule)
        except (ScheduleError, LoweringError) as error:
            tell(f"{count:3}  {step.label:<44} refused  {str(error).splitlines()[0]}")
            return None
        if of != unit:
            tell(f"{count:3}  {step.label:<44} no estimate beside that of the model's schedule")
            return None
        costs[repr(step.schedule)] = cycles
        ratio = cycles / costs[repr(best)] if costs[repr(best)] else 1.0
        tell(f"{count:3}  {step.label:<44} {100 * (1 / ratio - 1):+.1f} % on paper")
        return ratio

    found = search(Schedule(), lambda schedule: known.neighbours(schedule, workers, tell), attempt,
                   lambda: clock() >= end)
    return Paper(found.best, costs[repr(found.best)], model, unit, found.tried, found.finished)


def tune(subject: Subject, target: Any, database: Database, threads: int, cold: bool, budget_s: float, tell: Tell,
         clock: Callable[[], float] = time.monotonic) -> Result:
    """Search for at most budget_s seconds, or until no step helps. target: of this CPU, or of a CUDA device, which has
    workers of its own instead of `threads` (trial.find_device says whether there is one). tell: for progress. Trials
    that the database has are not made again. Raises DatabaseError, and what compiling raises."""
    kernel = subject.kernel
    if target.assembler_allocates:
        threads = target.processors
    task, dims = _task(subject, target, threads, cold)
    key = Key(subject.name, kernel.source_digest(), target.name, tuple(sorted(dims.items())), threads, cold,
              tuple(sorted(integers_of(task.arguments).items())))
    known = Known(kernel, target, dims, _aligned(kernel, target, task.arguments))
    compiler = toolchain_key()
    end = clock() + budget_s
    count, runs = 0, False

    def attempt(step: Step, best: Schedule) -> float | None:
        nonlocal count, runs
        count += 1
        trial = database.trial(key, compiler, step.schedule, best)
        if trial is None:
            trial = try_candidate(task, step.schedule, best)
            if trial.ratio is not None and trial.ratio < 1.0 - MARGIN:
                checked = check_candidate(task, step.schedule)
                trial = trial if checked.status == "timed" else checked
            database.add_trial(key, compiler, step.schedule, best, trial)
        if trial.status in ("crashed", "time limit") and not runs:  # is it the candidate, or the call?
            _of_model(key, try_candidate(task, best, best))
        ratio, runs = trial.ratio, True
        told = f"{100 * (1 / ratio - 1):+.1f} %" if ratio else trial.status
        tell(f"{count:3}  {step.label:<44} {told}" + (f"  {trial.message.splitlines()[0]}" if trial.message else ""))
        return ratio

    found = search(Schedule(), lambda schedule: known.neighbours(schedule, threads, tell), attempt,
                   lambda: clock() >= end)
    result = _result(key, task, found.best, found.tried, found.finished)
    database.add_results([result])
    return result


def _aligned(kernel: Any, target: Any, arguments: Mapping[str, Any]) -> Iterable[str]:
    """Tensors that a call takes to be aligned, on a device whatever their size."""
    if not target.assembler_allocates:
        return [name for name, a in arguments.items() if getattr(a, "nbytes", 0) >= LARGE_BYTES]
    signature = Signature(kernel.name, [Parameter.of(name, type) for name, type in kernel.parameters],
                          kernel.options.get("in_place", ()))
    return aligned_tensors(signature, signature.bind(tuple(arguments.values())), 0)


def _result(key: Key, task: Task, best: Schedule, tried: int, finished: bool) -> Result:
    """The best against the model's schedule once more, with more samples; the model's where the gain does not last."""
    final = try_candidate(task, best, Schedule(), FINAL_BUDGET_S)
    median_s, against_s = _of_model(key, final)
    if median_s > (1.0 - MARGIN) * against_s:
        return Result(key, Schedule(), against_s, against_s, tried, finished)
    return Result(key, best, median_s, against_s, tried, finished)


def _of_model(key: Key, trial: Trial) -> tuple[float, float]:
    """The times of a trial beside the model's schedule. Raises DatabaseError where there are none."""
    if trial.median_s is None or trial.against_s is None:
        raise DatabaseError(f"{key.kernel} can't be timed: the model's own schedule: {trial.status} {trial.message}")
    return trial.median_s, trial.against_s


def label_of(subject: Subject) -> str:
    """The call that is tuned: extents, what a case of the library is made from, and integer scalars."""
    arguments, dims = _arguments(subject)
    known = {**subject.shape, **dims, **subject.scalars, **integers_of(arguments)}
    return " ".join(f"{name}={value}" for name, value in known.items())


def integers_of(arguments: Mapping[str, Any]) -> dict[str, int]:
    """The integer scalars of a call."""
    return {name: value for name, value in arguments.items() if isinstance(value, int)}


def _arguments(subject: Subject) -> tuple[dict[str, Any], dict[str, int]]:
    """The call that is tuned, and the extents of its dims."""
    kernel = subject.kernel
    try:
        if subject.make_arguments is not None:
            made = subject.make_arguments(numpy.random.default_rng(1), subject.shape) | subject.scalars
        else:
            made = arguments_of_shape(kernel, kernel.tile_ir(), subject.shape, scalars=subject.scalars)
        arguments = placed(made)
    except (ValueError, ArithmeticError, LookupError, MemoryError) as error:
        shape = ",".join(f"{dim}={extent}" for dim, extent in subject.shape.items())
        raise ShapeError(f"{shape}: {error.__class__.__name__}: {error}; expected extents of which {kernel.name} has "
                         "arguments, and memory for them") from error
    dims: dict[str, int] = {}
    for name, type in kernel.parameters:
        for dim, extent in zip(getattr(type, "dims", ()), getattr(arguments[name], "shape", ()), strict=False):
            if isinstance(dim, str):
                dims[dim] = extent
    return arguments, dims


def _task(subject: Subject, target: Any, threads: int, cold: bool) -> tuple[Task, dict[str, int]]:
    """What is timed, and the extents of its dims."""
    kernel = subject.kernel
    arguments, dims = _arguments(subject)
    size_bytes = sum(a.nbytes for a in arguments.values() if isinstance(a, numpy.ndarray))
    expected = subject.reference(arguments) if subject.reference is not None and size_bytes <= CHECK_BYTES else None

    def is_wrong(after: Mapping[str, Any]) -> str | None:
        return None if expected is None else subject.compare(after, expected)

    def check(schedule: Schedule) -> str | None:
        if target.assembler_allocates:
            return _check_emulated(subject, target, schedule)
        report = check_kernel(kernel, target, runs=CHECK_RUNS, schedule=schedule, make_arguments=subject.make_arguments,
                              shapes=subject.check_shapes)
        return None if report.finding is None else f"{report.finding.station}: {report.finding.message}"

    return Task(kernel, arguments, is_wrong, threads, cold, target.l3_bytes, check,
                target.name if target.assembler_allocates else None), dims


def _check_emulated(subject: Subject, target: Any, schedule: Schedule) -> str | None:
    """A schedule for a device, on the emulator: for smaller extents with the remainders of those that it is for, so
    that rows lie as they do there. What is wrong, or None."""
    kernel = subject.kernel
    for most in EMULATED_EXTENTS:
        shape = {dim: extent if extent <= most else most + extent % REMAINDER - most % REMAINDER
                 for dim, extent in subject.shape.items()}
        near = {name: value for name, value in subject.scalars.items() if not isinstance(value, int) or value <= most}
        arguments, dims = _arguments(replace(subject, shape=shape, scalars=near))
        expected = expect(kernel.tile_ir(), arguments, runs=len(TILE_SIZES), tile_sizes=TILE_SIZES,
                          flushes=target.flushes_functions)
        emulate.run(kernel, *arguments.values(), target=target.name, schedule=schedule, trial=False,
                    aligned=_aligned(kernel, target, arguments))
        wrong = [text for name, e in expected.items() if (text := e.mismatch(arguments[name])) is not None]
        if wrong:
            return f"emulator, {' '.join(f'{dim}={n}' for dim, n in dims.items())}: {'; '.join(wrong)}"
    return None


# ------------------------------------------------------------------------------------------------ what calls read


def entries_of(results: Sequence[Result]) -> tuned.Entries:
    """Results as the file that calls read has them: those in which the search beat the model. Of a shape that was tuned
    with warm and with cold operands the cold one counts, as in a model weights are read once; of one that was tuned
    with several scalars the one that takes longest, as calls with others are over sooner. Each source has its own."""
    entries: tuned.Entries = {}
    for result in sorted(results, key=lambda r: (r.key.kernel, r.key.dims, r.key.threads, not r.key.cold, -r.model_s)):
        if result.schedule == Schedule():
            continue
        mine = entries.setdefault(result.key.kernel, [])
        entry = {"source": result.key.source, "dims": dict(result.key.dims), "threads": result.key.threads,
                 "schedule": result.schedule.to_json(), "gain": round(result.model_s / result.median_s, 3)}
        if not any(_same_call(e, entry) for e in mine):
            mine.append(entry)
    return entries


def _same_call(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return all(one[part] == other[part] for part in ("source", "dims", "threads"))


def publish(database: Database, target: str) -> str | None:
    """Bring what a database has for a target to the file that calls read, and return its path; None where there is no
    such file. What the file has of other calls, as from another database, stays. Raises DatabaseError."""
    path = user_file(target)
    if path is None:
        return None
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        lock = os.open(os.path.dirname(path), os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)  # from reading to writing, or of two processes one's results are lost
            results = database.results(target)
            entries = entries_of(results)
            tuned.forget()
            for name, others in tuned.read(path).items():
                searched = [{"source": r.key.source, "dims": dict(r.key.dims), "threads": r.key.threads}
                            for r in results if r.key.kernel == name]
                stay = [entry for entry in others if not any(_same_call(entry, call) for call in searched)]
                if stay:
                    entries[name] = stay + entries.get(name, [])
            write_entries(path, entries)
        finally:
            os.close(lock)
    except OSError as error:
        raise _unwritten(path, error) from error
    return path


def write_entries(path: str, entries: tuned.Entries) -> None:
    """Write the file beside its place and rename it, so that a reader sees a whole one. Raises DatabaseError."""
    directory = os.path.dirname(os.path.abspath(path))
    try:
        os.makedirs(directory, exist_ok=True)
        handle, written = tempfile.mkstemp(dir=directory, prefix=".writing-")
        try:
            with open(handle, "w", encoding="utf-8") as file:
                json.dump(entries, file, indent=1, sort_keys=True)
                file.write("\n")
            os.chmod(written, 0o644)
            os.replace(written, path)
        except BaseException:
            os.unlink(written)
            raise
    except OSError as error:
        raise _unwritten(path, error) from error
    tuned.forget()


def _unwritten(path: str, error: OSError) -> DatabaseError:
    return DatabaseError(f"{path}: {error.strerror}; expected room to write; mend: set SAPPER_TUNED")


def user_file(target: str) -> str | None:
    """Where calls look for the user's schedules; None where they are switched off."""
    directory = settings.tuned_directory()
    return None if directory is None else os.path.join(directory, f"{target}.json")
