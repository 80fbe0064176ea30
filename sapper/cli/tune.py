"""`sapper tune`: the search for faster schedules, and what it found.

Enters: a kernel and shapes, or what to do with results. Leaves: an exit status. Holds: Ctrl-C ends the trial that runs,
and what was tried before is kept, so the same command goes on from there. What was only estimated is never kept.
"""

from __future__ import annotations

import json as json_text
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .console import time_text
from .errors import CommandError, UsageError
from .files import write_files
from .kernels import Found, find_kernel, find_target, kernel_dims, parse_dims, parse_scalars

GOOD = 1.05
"""The model's schedule is called good where it takes at most this times what the best one takes."""
INTERRUPTED = 130


def run_tune(wanted: str | None, shape: str | None, budget: str, threads: int | None, cold: bool, database: str | None,
             report: bool, export: str | None, import_from: str | None, json: bool, target_name: str | None = None,
             on_paper: bool = False, scalars: str | None = None) -> int:
    """Search, or with report, export or import_from deal with what was found. Returns the exit status.

    scalars: `position=511`, for scalar parameters. target_name: None for this CPU, or a level of a CUDA device.
    on_paper: by estimates, for any target.
    """
    from ..runtime.errors import LaunchError
    from ..runtime.settings import MAX_THREADS
    from ..tune.database import Database, DatabaseError

    tasks = sum((wanted is not None, report, export is not None, import_from is not None))
    if tasks != 1:
        raise UsageError("expected one of: a kernel to tune, --report, --export FILE, --import FILE")
    if wanted is None and (on_paper or target_name is not None or scalars is not None):
        raise UsageError("found --target, --on-paper or --set without a kernel; expected a kernel to tune")
    if wanted is not None and on_paper:
        if threads is not None or cold or database is not None:
            raise UsageError("found --threads, --cold or --database beside --on-paper; expected none, as nothing is "
                             "timed or kept")
        found = find_kernel(wanted)
        return _on_paper(_subjects(found, shape, scalars), seconds_of(budget), find_target(target_name), json)
    if threads is not None and threads > MAX_THREADS:
        raise UsageError(f"--threads: found {threads}; expected a number from 1 to {MAX_THREADS}")
    path = database or default_database()
    try:
        opened = Database(path)
        try:
            if wanted is not None:
                return _search(_subjects(find_kernel(wanted), shape, scalars), seconds_of(budget), threads, cold,
                               opened, json, _timed_target(target_name, threads))
            if import_from is not None:
                return _import(opened, import_from)
            results = opened.results()
            if export is not None:
                data = [r.to_json() for r in results]
                write_files({Path(export): (json_text.dumps(data, indent=1) + "\n").encode()})
                print(f"{export}: {len(data)} results")
                return 0
            _report(results, json)
            return 0
        finally:
            opened.close()
    except DatabaseError as error:
        raise CommandError(str(error)) from None
    except LaunchError as error:
        raise CommandError(f"{error}; or compare the model's estimates: --on-paper") from None


def _timed_target(name: str | None, threads: int | None) -> Any:
    """The target that schedules are timed on. Raises UsageError for a CPU that is not this one, LaunchError for a
    device that is not here."""
    from ..tune.trial import find_device

    target = find_target(name)
    if target.assembler_allocates:
        if threads is not None:
            raise UsageError(f"--threads {threads}: found a GPU, {name}; expected none, as it has as many workers as "
                             "it holds")
        find_device(target)
    elif name is not None and name != find_target(None).name:
        raise UsageError(f"--target {name}: found a CPU that is not this one, {find_target(None).name}, on which "
                         "schedules could be timed; expected a level of a GPU, or none; mend: --on-paper")
    return target


def default_database() -> str:
    """Beside the kernels on disk. Raises CommandError where the user wants nothing there."""
    from ..runtime import settings

    directory = settings.cache_directory()
    if directory is None:
        raise CommandError("SAPPER_CACHE_DIR is off: found no place for trials; expected one; mend: --database FILE")
    return os.path.join(directory, "trials.sqlite")


def seconds_of(text: str) -> float:
    """`60`, `60s`, `5m` or `1h` in seconds."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|m|h|)", text.strip())
    if match is None or not float(match[1]):
        raise UsageError(f"--budget: found {text!r}; expected a time such as 60s, 5m or 1h")
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]


def _subjects(found: Found, shape: str | None, scalars: str | None) -> list[Any]:
    """What is to be tuned: the shape that is given, or the cases that the library has."""
    from ..tune.tuner import Subject

    entry, kernel = found.entry, found.kernel
    values = parse_scalars(scalars, kernel, "set")
    if entry is None:
        extents = parse_dims(shape, kernel, "shape")
        missing = [dim for dim in kernel_dims(kernel) if dim not in extents]
        if missing:
            raise UsageError(f"--shape: found no {', '.join(missing)}; expected every dimension of {found.name}, "
                             f"such as {','.join(f'{dim}=512' for dim in kernel_dims(kernel))}")
        return [Subject(found.name, kernel, extents, scalars=values)]
    # What a case of the library is made from: extents, and scalars that others follow from, as the position in a cache.
    names = tuple(entry.cases[0].shape)
    given = parse_dims(shape, kernel, "shape", names) | {n: int(v) for n, v in values.items() if n in names}
    values = {n: v for n, v in values.items() if n not in names}
    shapes = [case.shape for case in entry.cases] if shape is None else [entry.cases[0].shape]
    return [Subject(found.name, kernel, {**extents, **given}, entry.make_arguments, entry.reference, entry.compare,
                    entry.check_shapes, values) for extents in shapes]


def _told(line: str) -> None:
    print(line, file=sys.stderr)


def _on_paper(subjects: list[Any], budget_s: float, target: Any, json: bool) -> int:
    """Compare estimates: what is printed says that they are, and nothing of them is kept."""
    from ..kernels import by_hand as by_hand  # the library's blocks, which the search may try
    from ..tune.tuner import label_of, tune_on_paper

    results = []
    for subject in subjects:
        _told(f"{subject.name} {label_of(subject)}, {target.name}, on paper: estimates of the model, nothing is timed")
        paper = tune_on_paper(subject, target, budget_s, _told)
        schedule = paper.schedule.to_json()
        results.append({"kernel": subject.name, "target": target.name, "shape": subject.shape, "estimate": True,
                        "schedule": schedule, "cycles": paper.cycles, "model_cycles": paper.model_cycles,
                        "unit": paper.unit, "tried": paper.tried, "finished": paper.finished})
        if not json:
            print(_outcome_on_paper(paper))
    if json:
        print(json_text.dumps(results, indent=1))
    return 0


def _outcome_on_paper(paper: Any) -> str:
    figures = f"{paper.model_cycles:.4g} cycles of a processor for a {paper.unit}"
    state = f"{paper.tried} tried, {'no step helps any more' if paper.finished else 'time is over'}"
    schedule = paper.schedule.to_json()
    if not schedule:
        return f"on paper the model's schedule stays: {figures}; {state}"
    return (f"on paper {paper.model_cycles / paper.cycles:.2f} x the model's schedule: {paper.cycles:.4g} in place of "
            f"{figures}; {state}\n  {json_text.dumps(schedule)}\nan estimate, which calls do not take: pass it as "
            "schedule=, or time it")


def _search(subjects: list[Any], budget_s: float, threads: int | None, cold: bool, database: Any, json: bool,
            target: Any) -> int:
    from ..kernels import by_hand as by_hand  # the library's blocks, which the search may try
    from ..runtime import settings
    from ..tune.tuner import label_of, publish, tune

    workers = settings.threads() if threads is None else threads
    where = target.name if target.assembler_allocates else f"{workers} thread{'s' * (workers > 1)}, {target.name}"
    results = []
    path: str | None = None
    for subject in subjects:
        _told(f"{subject.name} {label_of(subject)}, {where}")
        try:
            result = tune(subject, target, database, workers, cold, budget_s, _told)
            path = publish(database, target.name)
        except KeyboardInterrupt:
            print("interrupted; what was tried is kept, and the same command goes on from there", file=sys.stderr)
            return INTERRUPTED
        results.append(result)
        if not json:
            print(_outcome(result))
    if json:
        print(json_text.dumps([r.to_json() for r in results], indent=1))
    elif path is not None and any(r.schedule.to_json() for r in results):
        print(f"calls find these schedules in {path}")
    return 0


def _outcome(result: Any) -> str:
    state = "no step helps any more" if result.finished else "time is over"
    if not result.schedule.to_json():
        return f"the model's schedule stays: {time_text(result.model_s)}; {result.tried} tried, {state}"
    schedule = json_text.dumps(result.schedule.to_json())
    return (f"{time_text(result.median_s)}, the model's {time_text(result.model_s)} "
            f"({result.model_s / result.median_s:.2f} x); {result.tried} tried, {state}\n  {schedule}")


def _import(database: Any, path: str) -> int:
    from ..tune.database import Result
    from ..tune.tuner import publish

    try:
        results = [Result.from_json(item) for item in json_text.loads(Path(path).read_text(encoding="utf-8"))]
    except OSError as error:
        raise UsageError(f"--import {path}: {error.strerror}; expected a file of `sapper tune --export`") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UsageError(f"--import {path}: {type(error).__name__}: {error}; expected a file of "
                         "`sapper tune --export`; mend: export it again") from None
    database.add_results(results)
    for target in sorted({r.key.target for r in results}):
        publish(database, target)
    print(f"{path}: {len(results)} results read")
    return 0


def _report(results: Sequence[Any], json: bool) -> None:
    """All results, and how often the model's schedule is good."""
    if json:
        print(json_text.dumps([r.to_json() for r in results], indent=1))
        return
    from rich.table import Table

    from .console import console, print_whole

    table = Table(box=None, header_style="bold")
    for name in ("kernel", "shape", "target"):
        table.add_column(name, overflow="fold")
    for name in ("threads", "model", "best", "model / best", "tried"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("schedule", overflow="fold", min_width=24)
    for r in results:
        call = r.key.dims + tuple(scalar for scalar in r.key.scalars if scalar not in r.key.dims)
        shape = " ".join(f"{name}={value}" for name, value in call) + (" cold" if r.key.cold else "")
        table.add_row(r.key.kernel, shape, r.key.target, str(r.key.threads), time_text(r.model_s),
                      time_text(r.median_s), f"{r.model_s / r.median_s:.2f}", str(r.tried),
                      json_text.dumps(r.schedule.to_json()) if r.schedule.to_json() else "the model's")
    print_whole(console(), table)
    good = sum(r.model_s <= GOOD * r.median_s for r in results)
    if results:
        print(f"the model's schedule takes at most {100 * (GOOD - 1):.0f} % longer than the best one in {good} of "
              f"{len(results)} cases ({100 * good / len(results):.0f} %)")
    else:
        print("nothing was tuned yet; `sapper tune KERNEL` does it")
