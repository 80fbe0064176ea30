"""The suite `threads` of `sapper bench`: what it costs that workers meet, and what a busy neighbour does to them.

In: `Settings`; the largest number of its threads is used. Out: `Row`s. Holds: the busy neighbour is a process that does
nothing but loop, on any CPU that the system gives it; it ends before a case's rows are made, whatever happens.

A small call is one of CALLS equal launches of a program, each of which reads what the one before wrote, so that the
workers meet after each, where a program would leave launches so short to one of them. With one worker that is the
launch alone; what more workers take longer is the barrier.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from .bench_suites import Row, Settings, rows_of, set_peer_threads

CALLS = 1000
ALONE, BESIDE = "matmul alone", "matmul beside a busy process"
EXTENT = 512
"""Of the squares multiplied beside a neighbour: a few milliseconds, less than a slice of time that the system gives."""


def thread_rows(settings: Settings) -> Iterator[list[Row]]:
    """Calls and barriers inside a program; a product alone, and beside a process that keeps a CPU busy."""
    threads = max(settings.thread_counts)
    if settings.wants("program") or settings.wants("barrier"):
        yield [row for row in _program_rows(threads, settings) if settings.wants(row.case)]
    for name in (ALONE, BESIDE):
        if settings.wants(name):
            settings.report(name)
            yield _product_rows(name, threads, settings)


def _program_rows(threads: int, settings: Settings) -> list[Row]:
    settings.report("calls in a program")
    counts = tuple(dict.fromkeys((1, threads)))
    programs = {str(count): _small_calls(count) for count in counts}
    timings = settings.measure(programs, threads=threads)
    each_s = {count: timings[str(count)].median_s / CALLS for count in counts}
    rows = [_us_row("call in a program", count, each_s[count]) for count in counts]
    if threads > 1:
        rows.append(_us_row("barrier", threads, max(0.0, each_s[threads] - each_s[1])))
    return rows


def _us_row(case: str, threads: int, seconds: float) -> Row:
    return Row(case, "f32", "16", threads, "sapper", seconds, seconds * 1e6, "us")


def _small_calls(threads: int) -> Callable[[], Any]:
    """A program of CALLS sums of 16 elements, there and back between two arrays."""
    import numpy

    from ..kernels.add import vector_add
    from ..runtime.program import Program, all_shared

    here, there, nothing = (numpy.zeros(16, numpy.float32) for _ in range(3))
    with all_shared():
        program = Program([(vector_add, (here, nothing, there)), (vector_add, (there, nothing, here))] * (CALLS // 2),
                          threads=threads)
    assert program.barriers == CALLS
    return program


def _product_rows(case: str, threads: int, settings: Settings) -> list[Row]:
    """A product of squares by us and by the peers, by the clock on the wall."""
    import numpy

    from ..kernels.matmul import matmul_nt_f32

    random = numpy.random.default_rng(0)
    a, b = (random.standard_normal((EXTENT, EXTENT), dtype=numpy.float32) for _ in range(2))
    c = numpy.empty((EXTENT, EXTENT), numpy.float32)
    contestants: dict[str, Callable[[], Any]] = {"sapper": lambda: matmul_nt_f32(a, b, c, threads=threads)}
    if "numpy" in settings.against:
        set_peer_threads("numpy", threads)
        contestants["numpy"] = lambda: numpy.matmul(a, b.T, out=c)
    if "torch" in settings.against:
        import torch

        set_peer_threads("torch", threads)
        x, y, z = (torch.from_numpy(array) for array in (a, b, c))
        contestants["torch"] = lambda: torch.mm(x, y.T, out=z)
    with busy_process() if case == BESIDE else nullcontext():
        timings = settings.measure_by_wall(contestants, threads)
    return rows_of(case, "f32", "x".join([str(EXTENT)] * 3), threads, timings, None, 2.0 * EXTENT**3 / 1e9, "GFLOP/s")


@contextmanager
def busy_process() -> Iterator[subprocess.Popen[bytes]]:
    """A process that keeps a CPU busy until the end of the block."""
    neighbour = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield neighbour
    finally:
        neighbour.kill()
        neighbour.wait()
