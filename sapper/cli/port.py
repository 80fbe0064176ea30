"""`sapper port`: what becomes of kernels on every target that is known.

Enters: kernels, a shape. Leaves: one object for each kernel and target: how it is done there, the static cost of its
hottest loop, or why it can't be and what is done instead. Holds: nothing is run; every target is compiled for. A piece
by hand is named with the calls that it is used for, and with the reason where it is not.
"""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from multiprocessing import get_context
from typing import Any

from .build import extents
from .code import Piece, code_for
from .console import console as report_console
from .console import print_whole
from .errors import is_told
from .kernels import Found, find_kernels, find_target, kernel_dims, library_kernels, parse_extents, parse_schedule

GENERATED, BY_HAND, IMPOSSIBLE = "generated", "hand-written", "impossible"
JOBS_A_WORKER = 16
"""Kernels for targets, for which another process is worth its start: each takes some tenths of a second."""

_Job = Callable[[], dict[str, Any]]

SUBSTITUTE = "the interpreter runs it (SAPPER_INTERPRET=1)"


def run_port(
    wanted: str | None, static: str | None, dims: str | None, schedule: str | None, targets: list[str]
) -> Iterator[dict[str, Any]]:
    """A row for each kernel and target, in order.

    wanted: None for the whole library. targets: those wanted; none means all.
    """
    from ..targets import known_targets

    chosen = parse_schedule(schedule)
    found = library_kernels() if wanted is None else find_kernels(wanted)
    names = targets or list(known_targets())
    facts = [find_target(name) for name in names]
    for text, option in ((static, "static"), (dims, "dims")):
        extents([kernel.kernel for kernel in found], text, option)     # each is of some kernel
    jobs: list[_Job] = []
    for kernel in found:
        own = set(kernel_dims(kernel.kernel))
        fixed, free = parse_extents(_own(static, own), _own(dims, own), kernel.kernel)
        jobs += [partial(_row, kernel, target, fixed, free, chosen) for target in facts]
    workers = min(len(os.sched_getaffinity(0)), len(jobs) // JOBS_A_WORKER)
    if workers < 2:
        yield from (job() for job in jobs)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)     # of fork beside threads: these only compile
        pool = get_context("fork").Pool(workers, _begin, (jobs,))
    with pool:
        yield from pool.imap(_of, range(len(jobs)))


_jobs: list[_Job] = []
"""In a worker: what is to be done. A kernel can't be sent to another process: it is there since the fork."""


def _begin(jobs: list[_Job]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)    # the parent ends its workers, and tells it
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _jobs[:] = jobs


def _of(number: int) -> dict[str, Any]:
    return _jobs[number]()


def _own(text: str | None, dims: set[str]) -> str:
    """Of `M=512,N=64` the entries that a kernel has."""
    return ",".join(p for p in (text or "").replace(",", " ").split() if p.partition("=")[0] in dims)


def _row(found: Found, target: Any, static: dict[str, int], dims: dict[str, int], schedule: Any) -> dict[str, Any]:
    from ..codegen.explain import Unexplained, hottest_loop

    row: dict[str, Any] = {"kernel": found.name, "target": target.name}
    try:
        code = code_for(found.kernel, target, schedule, static, dims)
    except Exception as error:
        if not is_told(error):
            raise
        return row | {"how": IMPOSSIBLE, "reason": _reason(error), "substitute": SUBSTITUTE}
    compiled = code.compiled
    row |= {"how": BY_HAND if code.pieces else GENERATED, "pieces": [asdict(piece) for piece in code.pieces],
            "not_by_hand": code.refused, "code_bytes": len(compiled.code),
            "instructions": compiled.made.statistics["instructions"]}
    if target.assembler_allocates:
        return row | _outlined(compiled, target)
    try:
        loop, model = hottest_loop(compiled.made.machine, target)
    except Unexplained as error:
        return row | {"cost": None, "no_cost": str(error)}
    row["spills"] = compiled.made.statistics.get("spills", 0)
    row["cost"] = None if loop is None else _cost(loop, model)
    if loop is None:
        row["no_cost"] = "it has no loop"
    return row


def _outlined(compiled: Any, target: Any) -> dict[str, Any]:
    """The cost of the hottest loop, and what the target's own assembler says, where it is at hand: it gives the
    registers."""
    from ..codegen.outline import assembled, costs_of, outline

    loop = outline(compiled.made.machine, target).hottest()
    found: dict[str, Any] = {"cost": None, "no_cost": "it has no loop"} if loop is None else {
        "cost": _cost(loop, costs_of(target).MODEL)}
    made = assembled(compiled.text(), target)
    if "missing" in made:
        return found | {"assembled": None, "not_assembled": made["missing"]}
    return found | {"assembled": made, "spills": made["spilled_bytes"]}


def _cost(loop: Any, model: str) -> dict[str, Any]:
    """Of one pass of a loop: on a GPU of one warp, in cycles of an SM."""
    return {
        "model": model, "loop": loop.label, "cycles": loop.cycles, "bound": loop.bound,
        "operations": loop.operations, "loaded_bytes": loop.loaded_bytes, "stored_bytes": loop.stored_bytes,
        "operations_per_cycle": loop.operations / loop.cycles,
        "bytes_per_cycle": (loop.loaded_bytes + loop.stored_bytes) / loop.cycles,
    }


def _reason(error: Exception) -> str:
    """The first paragraph of a message, on one line."""
    return " ".join(str(error).split("\n\n")[0].split())


def print_report(rows: Sequence[Mapping[str, Any]]) -> None:
    """A table of the rows. Costs are of the hottest loop: the deepest with the most cycles."""
    from rich.table import Table

    console = report_console()
    table = Table(box=None, pad_edge=False)
    left = ("kernel", "target", "how", "loop", "bound by")
    for column in ("kernel", "target", "how", "instr", "regs", "spills", "loop", "cycles", "ops/cycle",
                   "bytes/cycle", "bound by"):
        table.add_column(column, justify="left" if column in left else "right", no_wrap=True)
    notes: dict[str, list[str]] = {}
    last = ""
    for row in rows:
        name = row["kernel"] if row["kernel"] != last else ""
        last = row["kernel"]
        if row["how"] == IMPOSSIBLE:
            table.add_row(name, row["target"], row["how"])
            notes.setdefault(f"{row['reason']}; instead: {row['substitute']}", []).append(f"{last} on {row['target']}")
            continue
        for piece in row["pieces"]:
            notes.setdefault(f"by hand: {Piece(**piece)}", []).append(f"{last} on {row['target']}")
        for piece, reason in row["not_by_hand"].items():
            notes.setdefault(f"{piece} is not used: {reason}", []).append(f"{last} on {row['target']}")
        cost, made = row["cost"], row.get("assembled") or {}
        if row.get("not_assembled"):
            notes.setdefault(f"registers are not known: {row['not_assembled']}", []).append(
                f"{last} on {row['target']}")
        facts = name, row["target"], row["how"], str(row["instructions"]), str(made.get("registers", "")), \
            str(row.get("spills", ""))
        if cost is None:
            notes.setdefault(f"no cost: {row['no_cost']}", []).append(f"{last} on {row['target']}")
            table.add_row(*facts)
            continue
        table.add_row(*facts, cost["loop"], f"{cost['cycles']:.1f}", f"{cost['operations_per_cycle']:.1f}",
                      f"{cost['bytes_per_cycle']:.1f}", cost["bound"])
    print_whole(console, table)
    models = {row["cost"]["model"] for row in rows if row.get("cost")}
    if models:
        of_warps = " (on a GPU of one warp, of a whole SM)" if any("assembled" in row for row in rows) else ""
        console.print(f"cycles: a lower bound for one pass of the hottest loop{of_warps}, by the costs of "
                      f"{', '.join(sorted(models))}", soft_wrap=True)
    for note, places in notes.items():
        console.print(f"{', '.join(places)}: {note}", markup=False, soft_wrap=True)
