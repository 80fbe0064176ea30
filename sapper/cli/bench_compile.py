"""`sapper bench compile`: what stands between a kernel's source and its first run, and between a start of Python and a
model's first token.

In: `Settings`. Out: `Row`s, in ms. Holds: compilations are timed by the CPU time that they take, all else by the clock;
what happens once in a process is timed in processes of their own, one after the other, which find the bytecode of all
modules.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from .bench_suites import Row, Settings, attempt, rows_of

COMPILE_EXTENT = 192
"""Compilations are timed for dims of at most this size: in the same class as all larger ones that 64 divides."""
COMPILE_TARGETS = ("zen4", "v4", "v3", "haswell", "sm_80", "sm_90a")
"""Targets for which compilations are timed besides the host."""
MODEL, PROMPT = "smollm2", "Why is the sky blue?"

FIRST_CALL = """\
import time, numpy
import sapper.runtime.launch
from sapper.kernels.add import vector_add
a, b, c = (numpy.ones(64, numpy.float32) for _ in range(3))
start = time.perf_counter()
vector_add(a, b, c, threads=1)
print(time.perf_counter() - start)
"""
"""A kernel's first call, found in the cache; the import of the runtime apart."""

PROGRAMS = f"""\
import time
from sapper.models.load import load_model
from sapper.runtime.program import Program
session = load_model({MODEL!r}).session(256, threads=1)
start = time.perf_counter()
for sections in session.program_sections().values():
    Program([step for _, steps in sections for step in steps], static=True, threads=1)
print(time.perf_counter() - start)
"""
"""A model's two programs compiled, or found in the cache, and bound; the import of the compiler included."""

SINCE_START = "print(time.clock_gettime(time.CLOCK_MONOTONIC) - float(sys.argv[1]))"

FIRST_TOKEN = f"""\
import io, sys, time
from sapper.cli.generate import run_generate
assert run_generate({MODEL!r}, {PROMPT!r}, 1, out=io.StringIO(), err=io.StringIO()) == 0
{SINCE_START}
"""
"""`sapper generate` from the start of Python to a token."""


def compile_rows(settings: Settings) -> Iterator[list[Row]]:
    """Every library kernel compiled anew, and read from the cache on disk; starts of processes; a whole model."""
    import tempfile

    from ..kernels import library

    entries = [e for e in library() if settings.wants(f"compile {e.name}")]
    before = os.environ.get("SAPPER_CACHE_DIR")
    with tempfile.TemporaryDirectory(prefix="sapper-bench-") as directory:
        try:
            if entries:
                yield from _library_compile_rows(entries, directory, settings)
            os.environ["SAPPER_CACHE_DIR"] = os.path.join(directory, "starts")
            yield from _start_rows(settings)
            yield from _model_rows(settings)
        finally:
            if before is None:
                os.environ.pop("SAPPER_CACHE_DIR", None)
            else:
                os.environ["SAPPER_CACHE_DIR"] = before


def _start_rows(settings: Settings) -> Iterator[list[Row]]:
    """What a process waits for until its first kernel has run."""
    count = 3 if settings.quick else 9
    if settings.wants("first call"):
        settings.report("first call")
        yield _process_row("first call of a process, from the disk cache", FIRST_CALL, count)
    if settings.wants("import sapper"):
        settings.report("import sapper")
        code = "import time; t = time.perf_counter(); import sapper; print(time.perf_counter() - t)"
        yield _process_row("import sapper", code, count)
        code = ("import time, numpy, sapper; t = time.perf_counter(); import sapper.runtime.launch; "
                "print(time.perf_counter() - t)")
        yield _process_row("import of the runtime, by the first call", code, count)
        yield _process_row("start of Python itself", f"import sys, time\n{SINCE_START}", 3)


def _model_rows(settings: Settings) -> Iterator[list[Row]]:
    """A model's programs, of a prompt and of a token, and its first token."""
    from ..models.errors import ModelError
    from ..models.locate import find_model

    codes = {f"{MODEL} compile": f"import os\nos.environ['SAPPER_CACHE_DIR'] = 'off'\n{PROGRAMS}",
             f"{MODEL} from the disk cache": PROGRAMS, f"{MODEL} first token": FIRST_TOKEN}
    wanted = {name: code for name, code in codes.items() if settings.wants(name)}
    if not wanted:
        return
    try:
        find_model(MODEL)
    except (ModelError, ImportError) as error:
        settings.say(f"no model to start: {error}")
        return
    count = 1 if settings.quick else 5
    for name, code in wanted.items():
        settings.report(name)
        yield from attempt(name, settings, partial(_process_row, name, code, count))


def _row(name: str, dtype: str, shape: str, seconds: list[float]) -> list[Row]:
    from ..tune.measure import timing_of

    return rows_of(name, dtype, shape, 1, {"sapper": timing_of(seconds, 1)}, None, None, "ms")


def _process_row(name: str, code: str, count: int) -> list[Row]:
    return _row(name, "", "", _printed_s(code, count))


def _library_compile_rows(entries: Sequence[Any], directory: str, settings: Settings) -> Iterator[list[Row]]:
    """For the host, each kernel by itself; for other targets the median and the worst."""
    from statistics import median

    from ..targets import target as target_of

    cold_s: list[tuple[float, str]] = []
    cached_s: list[float] = []
    for number, entry in enumerate(entries):
        settings.report(f"compile {entry.name}")
        if number == 0:  # The first compilation of a process loads the compiler.
            _compile_times(entry, "off")
        trials = range(1 if settings.quick else 3)
        found = [_compile_times(entry, os.path.join(directory, f"{number}-{trial}")) for trial in trials]
        cold = [cold for cold, _ in found]
        yield _row(f"compile {entry.name}", entry.dtype, "", cold)
        cold_s.append((median(cold), entry.name))
        cached_s += [cached for _, cached in found]
    count = f"{len(cold_s)} kernels"
    worst_s, worst = max(cold_s)
    yield _row("compile, median of all", "", count, [s for s, _ in cold_s])
    yield _row("compile, worst", "", worst, [worst_s])
    yield _row("from the disk cache, median", "", count, cached_s)
    yield _row("from the disk cache, worst", "", "", [max(cached_s)])
    for name in () if settings.quick else COMPILE_TARGETS:
        settings.report(f"compile for {name}")
        _cold_s(entries[0], target_of(name))
        cold_s = [(_cold_s(entry, target_of(name)), entry.name) for entry in entries]
        worst_s, worst = max(cold_s)
        yield _row(f"compile for {name}, median of all", "", count, [s for s, _ in cold_s])
        yield _row(f"compile for {name}, worst", "", worst, [worst_s])


_calls: dict[str, tuple[Any, Any]] = {}


def _wanted(entry: Any) -> tuple[Any, Any, Any]:
    """A new launcher of a kernel, the specialisation that a call asks it for, and the call's dims. The call's arguments
    are made once for each kernel, as quantised ones take seconds."""
    import numpy

    from ..runtime.launch import Launcher
    from ..runtime.specialise import specialise

    launcher = Launcher(entry.kernel, {})
    if entry.name not in _calls:
        shape = {name: min(extent, COMPILE_EXTENT) for name, extent in entry.cases[-1].shape.items()}
        arguments = tuple(entry.make_arguments(numpy.random.default_rng(1), shape).values())
        binding = launcher.signature.bind(arguments)
        wanted = specialise(launcher.signature, binding, launcher.static_for(binding.dims))
        _calls[entry.name] = wanted, dict(binding.dims)
    return launcher, *_calls[entry.name]


def _cold_s(entry: Any, target: Any) -> float:
    """Seconds of CPU time to compile a kernel for a target, its source read included."""
    import time

    from ..codegen.pipeline import compile_kernel

    _, wanted, _ = _wanted(entry)
    start = time.process_time()
    compile_kernel(entry.kernel, dict(wanted.static_dims), dict(wanted.unit_strides), dict(wanted.dim_classes), target,
                   None, frozenset(wanted.aligned))
    return time.process_time() - start


def _compile_times(entry: Any, directory: str) -> tuple[float, float]:
    """Seconds of CPU time to compile a kernel cold, its source read included; seconds to get it from the disk."""
    import time

    os.environ["SAPPER_CACHE_DIR"] = directory
    launcher, wanted, dims = _wanted(entry)
    start = time.process_time()
    launcher.get_compiled(wanted, dims)
    cold_s = time.process_time() - start
    launcher, wanted, dims = _wanted(entry)
    start = time.perf_counter()
    launcher.get_compiled(wanted, dims)
    return cold_s, time.perf_counter() - start


def _printed_s(code: str, count: int) -> list[float]:
    """What Python processes print that run some code, one after the other. Their argument is when they were started.

    They find Python's bytecode of all modules, as those of an installed package do, in a directory of their own; the
    first, which writes it (and compiles kernels for the cache), is not counted.
    """
    import subprocess
    import tempfile
    import time

    def once() -> float:
        now = str(time.clock_gettime(time.CLOCK_MONOTONIC))
        done = subprocess.run([sys.executable, "-c", code, now], check=True, capture_output=True, text=True,
                              env=environment)
        return float(done.stdout)

    with tempfile.TemporaryDirectory(prefix="sapper-bench-") as bytecode:
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        environment["PYTHONPYCACHEPREFIX"] = bytecode
        return [once() for _ in range(1 + count)][1:]
