"""Searching the schedule of a kernel for one shape: model, search, trials, database and the file of what was found.

Enters: a kernel (of the library, or a user's), a shape, a budget. Leaves: a `Result` in the database, and in the file
that calls read (sapper/runtime/tuned.py). Holds: a schedule is kept only if a slower check on other shapes finds it
right, and if in a last run, longer than those of the search, it still beats the model's by more than MARGIN.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy

from ..codegen.pipeline import HINTS, LARGE, facts_of
from ..ir.types import TensorType
from ..lane.choices import choices
from ..lane.rows import LoweringError
from ..runtime import settings, tuned
from ..runtime.cache import toolchain_key
from ..runtime.cases import arguments_of_shape
from ..runtime.check import check_kernel
from ..runtime.specialise import dim_class
from ..tile.canonical import canonicalize
from ..tile.reduce_loops import reduce_loops
from ..tile.schedule import DimClass, Schedule, ScheduleError, Specialization, StrideClass
from .database import Database, DatabaseError, Key, Result
from .operands import placed
from .rank import rank, worth_a_trial
from .search import MARGIN, search
from .space import Step, steps
from .trial import Task, check_candidate, try_candidate

CHECK_BYTES = 64 << 20
"""Results of calls up to this size are compared with the reference before they are timed; what is to be kept is checked
on other shapes in any case."""
CHECK_RUNS = 6
FINAL_BUDGET_S = 1.0

Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Subject:
    """A kernel to be tuned. make_arguments, reference, compare: those of a library kernel, else None."""

    name: str
    kernel: Any
    shape: dict[str, int]
    make_arguments: Any = None
    reference: Any = None
    compare: Any = None
    check_shapes: tuple[Mapping[str, int], ...] = ()


def tune(subject: Subject, target: Any, database: Database, threads: int, cold: bool, budget_s: float, tell: Tell,
         clock: Callable[[], float] = time.monotonic) -> Result:
    """Search for at most budget_s seconds, or until no step helps. tell: for progress. Trials that the database has are
    not made again. Raises DatabaseError, and what compiling raises."""
    kernel = subject.kernel
    task, dims = _task(subject, target, threads, cold)
    key = Key(subject.name, kernel.source_digest(), target.name, tuple(sorted(dims.items())), threads, cold)
    facts = facts_of(target)
    classes = {dim: dim_class(extent) for dim, extent in dims.items()}
    hints = {dim: DimClass(HINTS.get(bound, LARGE), divisor) for dim, (bound, divisor) in classes.items()}
    aligned = frozenset(name for name, a in task.arguments.items() if getattr(a, "nbytes", 0) >= 8 << 20)
    strides: dict[str, StrideClass] = {
        name: "contiguous" for name, type in kernel.parameters if isinstance(type, TensorType)}
    specialization = Specialization(hints, strides, aligned)
    compiler = toolchain_key()
    end = clock() + budget_s
    count = 0

    def neighbours(schedule: Schedule) -> Sequence[Step]:
        function = kernel.tile_ir()
        reduce_loops(function)
        canonicalize(function)
        made = choices(function, schedule, facts, specialization)
        found = steps(schedule, made, facts.vector_registers, threads)
        hopeful = worth_a_trial(rank(kernel, target, made.blocks, schedule, static_dims={}, unit_strides=strides,
                                     dim_classes=classes)) if made.blocks else set()
        return [step for step in found if (step.part != "block" or step.schedule.assembly[-1] in hopeful)
                and _can_be_lowered(kernel, step.schedule, facts, specialization)]

    def attempt(step: Step, best: Schedule) -> float | None:
        nonlocal count
        count += 1
        trial = database.trial(key, compiler, step.schedule, best)
        if trial is None:
            trial = try_candidate(task, step.schedule, best)
            if trial.ratio is not None and trial.ratio < 1.0 - MARGIN:
                checked = check_candidate(task, step.schedule)
                trial = trial if checked.status == "timed" else checked
            database.add_trial(key, compiler, step.schedule, best, trial)
        ratio = trial.ratio
        told = f"{100 * (1 / ratio - 1):+.1f} %" if ratio else trial.status
        tell(f"{count:3}  {step.label:<44} {told}" + (f"  {trial.message.splitlines()[0]}" if trial.message else ""))
        return ratio

    found = search(Schedule(), neighbours, attempt, lambda: clock() >= end)
    result = _result(key, task, found.best, found.tried, found.finished)
    database.add_result(result)
    return result


def _can_be_lowered(kernel: Any, schedule: Schedule, facts: Any, specialization: Specialization) -> bool:
    """Whether the lowering takes a schedule: a step that it refuses costs no child process."""
    function = kernel.tile_ir()
    reduce_loops(function)
    canonicalize(function)
    try:
        choices(function, schedule, facts, specialization)
    except (ScheduleError, LoweringError):
        return False
    return True


def _result(key: Key, task: Task, best: Schedule, tried: int, finished: bool) -> Result:
    """The best against the model's schedule once more, with more samples; the model's where the gain does not last."""
    final = try_candidate(task, best, Schedule(), FINAL_BUDGET_S)
    if final.median_s is None or final.against_s is None:
        raise DatabaseError(f"{key.kernel}: the model's own schedule: {final.status} {final.message}; expected a time")
    if final.median_s > (1.0 - MARGIN) * final.against_s:
        return Result(key, Schedule(), final.against_s, final.against_s, tried, finished)
    return Result(key, best, final.median_s, final.against_s, tried, finished)


def _task(subject: Subject, target: Any, threads: int, cold: bool) -> tuple[Task, dict[str, int]]:
    """The call that is timed, and the extents of its dims."""
    kernel = subject.kernel
    if subject.make_arguments is not None:
        made = subject.make_arguments(numpy.random.default_rng(1), subject.shape)
    else:
        made = arguments_of_shape(kernel, kernel.tile_ir(), subject.shape)
    arguments = placed(made)
    dims: dict[str, int] = {}
    for name, type in kernel.parameters:
        for dim, extent in zip(getattr(type, "dims", ()), getattr(arguments[name], "shape", ()), strict=False):
            if isinstance(dim, str):
                dims[dim] = extent
    size_bytes = sum(a.nbytes for a in arguments.values() if isinstance(a, numpy.ndarray))
    expected = subject.reference(arguments) if subject.reference is not None and size_bytes <= CHECK_BYTES else None

    def is_wrong(after: Mapping[str, Any]) -> str | None:
        return None if expected is None else subject.compare(after, expected)

    def check(schedule: Schedule) -> str | None:
        report = check_kernel(kernel, target, runs=CHECK_RUNS, schedule=schedule, make_arguments=subject.make_arguments,
                              shapes=subject.check_shapes)
        return None if report.finding is None else f"{report.finding.station}: {report.finding.message}"

    return Task(kernel, arguments, is_wrong, threads, cold, target.l3_bytes, check), dims


# ------------------------------------------------------------------------------------------------ what calls read


def entries_of(results: Sequence[Result]) -> tuned.Entries:
    """Results as the file that calls read has them: those in which the search beat the model. Of a shape that was tuned
    with warm and with cold operands the cold one counts, as in a model weights are read once."""
    entries: tuned.Entries = {}
    for result in sorted(results, key=lambda r: (r.key.kernel, r.key.dims, r.key.threads, not r.key.cold)):
        if result.schedule == Schedule():
            continue
        mine = entries.setdefault(result.key.kernel, [])
        entry = {"source": result.key.source, "dims": dict(result.key.dims), "threads": result.key.threads,
                 "schedule": result.schedule.to_json(), "gain": round(result.model_s / result.median_s, 3)}
        if not any(e["dims"] == entry["dims"] and e["threads"] == entry["threads"] for e in mine):
            mine.append(entry)
    return entries


def write_entries(path: str, entries: tuned.Entries) -> None:
    """Write the file beside its place and rename it, so that a reader sees a whole one. Raises DatabaseError."""
    directory = os.path.dirname(os.path.abspath(path))
    try:
        os.makedirs(directory, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=directory, prefix=".writing-", delete=False) as file:
            json.dump(entries, file, indent=1, sort_keys=True)
            file.write("\n")
        os.chmod(file.name, 0o644)
        os.replace(file.name, path)
    except OSError as error:
        raise DatabaseError(f"{path}: {error.strerror}; expected room to write; mend: set SAPPER_TUNED") from error
    tuned.forget()


def user_file(target: str) -> str | None:
    """Where calls look for the user's schedules; None where they are switched off."""
    directory = settings.tuned_directory()
    return None if directory is None else os.path.join(directory, f"{target}.json")
