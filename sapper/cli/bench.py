"""`sapper bench`: how fast the kernels, the compiler and the model are on this machine, beside its peaks and its peers.

In: the command's settings. Out: a table on stdout, progress and notes on stderr, and a JSON file. Holds: the function
returns the exit status: 0 done, 1 a case failed or nothing fitted, 2 the command line is at fault, 130 stopped by
Ctrl-C, in which case what was measured so far is printed and written all the same.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from itertools import takewhile
from pathlib import Path
from typing import Any

from .bench_suites import PEERS, SUITES, Row, Settings, prepare_peers, present_peers, suite_rows
from .console import print_whole, time_text
from .errors import CommandError
from .files import write_files

FAILED, MISUSED, INTERRUPTED = 1, 2, 130
GPU = "gpu"
"""A suite by itself: it needs a device, and its lines have other columns."""
PIPED_WIDTH = 240
"""Columns of the table where stdout is no terminal: each case has a line of its own, and takes what it needs."""


def run_bench(
    suite: str = "all", threads: int | None = None, against: str | Sequence[str] | None = None,
    json_file: str | None = None, quick: bool = False, case: str | None = None,
) -> int:
    """Measure a suite and print it.

    suite: one of SUITES, or GPU: kernels on a device (bench_gpu.py). threads: workers of each kernel and threads of
    each peer; None: one, and then as many as there are CPUs. against: peers, names with commas between or a list; None:
    all that are installed; "": none. json_file: where to write a list of objects with the fields of `Row`. quick: the
    smallest case of each kernel, hurried. case: only cases whose "name shape" contains this; `*`, `?` match anything.
    """
    from ..runtime.settings import MAX_THREADS, available_cpus

    if suite == GPU:
        from .bench_gpu import run_gpu

        if threads is not None or against is not None:
            print("error: gpu: found --threads or --against; expected neither: a device has its own, and its peers are "
                  "those that are installed", file=sys.stderr)
            return MISUSED
        return run_gpu(quick, case or "", json_file)
    if suite not in SUITES:
        print(f"error: suite: found {suite!r}; expected one of {', '.join(SUITES)}, {GPU}", file=sys.stderr)
        return MISUSED
    if threads is not None and not 1 <= threads <= MAX_THREADS:
        print(f"error: threads: found {threads}; expected a number from 1 to {MAX_THREADS}", file=sys.stderr)
        return MISUSED
    try:
        from rich.console import Console
        from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
    except ImportError:
        print("error: no package rich; expected it installed; mend: pip install 'sapper[cli]'", file=sys.stderr)
        return FAILED
    counts = (threads,) if threads is not None else tuple(dict.fromkeys((1, available_cpus())))
    notes = Console(stderr=True, highlight=False, soft_wrap=True)

    def say(line: str) -> None:
        notes.print(line, markup=False)

    prepare_peers(max(counts), say)
    wanted = [w.strip() for w in against.split(",") if w.strip()] if isinstance(against, str) else list(
        PEERS if against is None else against)
    peers = present_peers(wanted, say)
    rows: list[Row] = []
    status = 0
    with Progress(SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn(), console=notes,
                  transient=True, disable=not notes.is_terminal) as progress:
        task = progress.add_task("starting", total=None)
        settings = Settings(counts, peers, quick, case, say, lambda what: progress.update(task, description=what))
        try:
            for found in suite_rows(suite, settings):
                rows += found
                if json_file is not None:
                    write_json(json_file, rows)
        except KeyboardInterrupt:
            say("stopped; this is what was measured so far")
            status = INTERRUPTED
        except CommandError as error:
            say(f"error: {error}")
            return FAILED
    if rows:
        console = Console(highlight=False)
        print_table(rows, console if console.is_terminal else Console(highlight=False, width=PIPED_WIDTH))
    else:
        why = f": no case contains {case!r}" if case and not settings.failed and not status else ""
        say(f"nothing was measured{why}")
    return status or (FAILED if settings.failed or not rows else 0)


def write_json(path: str, rows: Sequence[Row]) -> None:
    """Write what was measured so far; a run that is killed leaves the file of the case before. Raises CommandError."""
    write_files({Path(path): to_json(rows).encode()})


def to_json(rows: Sequence[Row]) -> str:
    """The rows as a JSON list of objects; numbers with six digits."""
    def rounded(value: Any) -> Any:
        return float(f"{value:.6g}") if isinstance(value, float) else value

    return json.dumps([{key: rounded(value) for key, value in asdict(row).items()} for row in rows], indent=1) + "\n"


def print_table(rows: Sequence[Row], console: Any) -> None:
    """One line for each case and number of threads, the peers beside it: how many times as long they took."""
    from rich.table import Table

    peers = [peer for peer in PEERS if any(row.peer == peer for row in rows)]
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("case", "dtype", "shape"):
        table.add_column(name, overflow="fold")
    for name in ("threads", "time", "rate", "of floor", *(f"vs {peer}" for peer in peers)):
        table.add_column(name, justify="right", no_wrap=True)
    for at, row in enumerate(rows):
        if row.peer != "sapper":
            continue
        # Its peers, measured in turn with it, come behind it; their dtype may be another.
        others = {r.peer: r for r in takewhile(lambda r: r.peer != "sapper", rows[at + 1:])}
        ratios = [ratio_text(row, others.get(peer)) for peer in peers]
        table.add_row(row.case, row.dtype, row.shape, str(row.threads),
                      "" if row.median_s is None else time_text(row.median_s), rate_text(row),
                      "" if row.percent_of_floor is None else f"{row.percent_of_floor:.0f} %", *ratios)
    print_whole(console, table)


def rate_text(row: Row) -> str:
    return "" if row.rate is None or row.unit in ("ms", "us") else f"{row.rate:.4g} {row.unit}"


def ratio_text(ours: Row, other: Row | None) -> str:
    """How many times as long the peer took."""
    if other is None or not ours.median_s or other.median_s is None:
        return ""
    return f"{other.median_s / ours.median_s:.2f} x"
