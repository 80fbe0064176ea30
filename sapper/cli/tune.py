"""`sapper tune`: the search for faster schedules, and what it found.

Enters: a kernel and shapes, or what to do with results. Leaves: an exit status. Holds: Ctrl-C ends the trial that runs,
and what was tried before is kept, so the same command goes on from there.
"""

from __future__ import annotations

import json as json_text
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .errors import CommandError, UsageError
from .files import write_files
from .kernels import Found, find_kernel, find_target, kernel_dims, parse_dims

GOOD = 1.05
"""The model's schedule is called good where it takes at most this times what the best one takes."""
INTERRUPTED = 130


def run_tune(wanted: str | None, shape: str | None, budget: str, threads: int | None, cold: bool, database: str | None,
             report: bool, export: str | None, import_from: str | None, json: bool) -> int:
    """Search, or with report, export or import_from deal with what was found. Returns the exit status."""
    from ..tune.database import Database, DatabaseError

    tasks = sum((wanted is not None, report, export is not None, import_from is not None))
    if tasks != 1:
        raise UsageError("expected one of: a kernel to tune, --report, --export FILE, --import FILE")
    path = database or default_database()
    try:
        opened = Database(path)
        try:
            if wanted is not None:
                return _search(find_kernel(wanted), shape, seconds_of(budget), threads, cold, opened, json)
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


def _search(found: Found, shape: str | None, budget_s: float, threads: int | None, cold: bool, database: Any,
            json: bool) -> int:
    from ..kernels import by_hand as by_hand  # the library's blocks, which the search may try
    from ..runtime import settings
    from ..tune.tuner import Subject, entries_of, tune, user_file, write_entries

    target = find_target(None)
    workers = settings.threads() if threads is None else threads
    results = []
    for extents in _shapes(found, shape):
        entry = found.entry
        subject = Subject(found.name, found.kernel, extents) if entry is None else Subject(
            found.name, found.kernel, extents, entry.make_arguments, entry.reference, entry.compare, entry.check_shapes)
        label = " ".join(f"{name}={extent}" for name, extent in extents.items())
        print(f"{found.name} {label}, {workers} thread{'s' * (workers > 1)}, {target.name}", file=sys.stderr)
        try:
            result = tune(subject, target, database, workers, cold, budget_s, lambda line: print(line, file=sys.stderr))
        except KeyboardInterrupt:
            print("interrupted; what was tried is kept, and the same command goes on from there", file=sys.stderr)
            return INTERRUPTED
        results.append(result)
        if not json:
            print(_outcome(result))
    path = user_file(target.name)
    if path is not None:
        write_entries(path, entries_of(database.results(target.name)))
    if json:
        print(json_text.dumps([r.to_json() for r in results], indent=1))
    elif path is not None:
        print(f"calls find these schedules in {path}")
    return 0


def _shapes(found: Found, shape: str | None) -> list[dict[str, int]]:
    if shape is None and found.entry is not None:
        return [dict(case.shape) for case in found.entry.cases]
    extents = parse_dims(shape, found.kernel, "shape")
    missing = [dim for dim in kernel_dims(found.kernel) if dim not in extents]
    if found.entry is None and missing:
        raise UsageError(f"--shape: found no {', '.join(missing)}; expected every dimension of {found.name}, such as "
                         f"{','.join(f'{dim}=512' for dim in kernel_dims(found.kernel))}")
    if found.entry is not None:
        extents = {**found.entry.cases[0].shape, **extents}
    return [extents]


def _outcome(result: Any) -> str:
    state = "no step helps any more" if result.finished else "time is over"
    if not result.schedule.to_json():
        return f"the model's schedule stays: {1e3 * result.model_s:.3f} ms; {result.tried} tried, {state}"
    schedule = json_text.dumps(result.schedule.to_json())
    return (f"{1e3 * result.median_s:.3f} ms, the model's {1e3 * result.model_s:.3f} ms "
            f"({result.model_s / result.median_s:.2f} x); {result.tried} tried, {state}\n  {schedule}")


def _import(database: Any, path: str) -> int:
    from ..tune.database import Result
    from ..tune.tuner import entries_of, user_file, write_entries

    try:
        results = [Result.from_json(item) for item in json_text.loads(Path(path).read_text(encoding="utf-8"))]
    except OSError as error:
        raise UsageError(f"--import {path}: {error.strerror}; expected a file of `sapper tune --export`") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UsageError(f"--import {path}: {type(error).__name__}: {error}; expected a file of "
                         "`sapper tune --export`; mend: export it again") from None
    for result in results:
        database.add_result(result)
    for target in sorted({r.key.target for r in results}):
        found = user_file(target)
        if found is not None:
            write_entries(found, entries_of(database.results(target)))
    print(f"{path}: {len(results)} results read")
    return 0


def _report(results: Sequence[Any], json: bool) -> None:
    """All results, and how often the model's schedule is good."""
    if json:
        print(json_text.dumps([r.to_json() for r in results], indent=1))
        return
    from rich.table import Table

    from .console import console

    table = Table(box=None, header_style="bold")
    for name in ("kernel", "shape", "target"):
        table.add_column(name)
    for name in ("threads", "model ms", "best ms", "model / best", "tried"):
        table.add_column(name, justify="right")
    table.add_column("schedule")
    for r in results:
        shape = " ".join(f"{dim}={extent}" for dim, extent in r.key.dims) + (" cold" if r.key.cold else "")
        table.add_row(r.key.kernel, shape, r.key.target, str(r.key.threads), f"{1e3 * r.model_s:.3f}",
                      f"{1e3 * r.median_s:.3f}", f"{r.model_s / r.median_s:.2f}", str(r.tried),
                      json_text.dumps(r.schedule.to_json()) if r.schedule.to_json() else "the model's")
    console().print(table)
    good = sum(r.model_s <= GOOD * r.median_s for r in results)
    if results:
        print(f"the model's schedule takes at most {100 * (GOOD - 1):.0f} % longer than the best one in {good} of "
              f"{len(results)} cases ({100 * good / len(results):.0f} %)")
    else:
        print("nothing was tuned yet; `sapper tune KERNEL` does it")
