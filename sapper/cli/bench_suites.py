"""What `sapper bench` measures: the suites, and how each case is timed.

In: `Settings`. Out: `Row`s, one for each contestant of a case, as they are measured. Holds: a case's contestants are
timed in turns (sapper.tune.measure), and with them what gives that case's floor: where products are most of its work, a
loop of nothing else, and in DRAM a read and a copy of our own, as what other machines on the same host leave of a core
and of its memory changes from minute to minute.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import partial
from itertools import cycle
from time import perf_counter, thread_time
from typing import Any

SUITES = ("peaks", "call", "threads", "compile", "matmul", "matvec", "rows", "attention", "others", "train",
          "deepseek", "quantized", "model", "batch", "all")
"""In the order in which `all` runs them. llama.cpp configures tile registers once for a thread and dies where they are
released later, as PyTorch does after each product on them: what runs PyTorch comes before llama.cpp's first such
product, which in `deepseek` is after PyTorch's last."""
PEERS = ("numpy", "torch", "llama")
FLOOR_READ, FLOOR_COPY = "(read)", "(copy)"
PRODUCTS_SHARE = 0.5
"""Products are timed with a case whose operations take this part of its floor, or more."""
CHECK_BYTES = 64 << 20
"""Results of cases up to this size are compared with the reference before they are timed."""
QUICK_SCALE = 0.5
SETTLE_S = 0.012
"""Longer than the threads of a peer spin after its work: OpenMP's for about 5 ms, OpenBLAS's as told by the next."""
BLAS_SPIN_LOG2_CYCLES = 24

MATVEC_SHAPES = ((576, 1536), (1536, 576), (2048, 2048), (4096, 4096), (49152, 576))
DECODE_SHAPES = ((576, 1536), (2048, 2048))
COLD_PRODUCTS = ("matmul_nt_f32", "matmul_nt_bf16_bf16", "matmul_nn_i8", "matmul_nt_i8")
COLD_ROWS, COLD_SHAPE = (1, 4, 16, 128), (4096, 4096)
"""Products of a few rows with cold weights, as they lie and packed."""


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the result, and one object of the JSON file.

    case: what is done. shape: extents, in the order of the kernel's dims. peer: who did it; "sapper" is ours. median_s:
    seconds for one. rate, unit: "GFLOP/s", "GB/s", "tokens/s", or a time in "ms" or "us". percent_of_floor: the least
    time that the machine's peaks allow over the median, in percent. ratio_to_best_peer: the fastest peer's median over
    this one, so that above 1 is faster than all of them; None without a peer. operations, bytes: what the case has to
    do at least. products: "f32", "bf16" or "i8", whose peak its arithmetic counts against. The floor follows from these
    three; None where there is none.
    """

    case: str
    dtype: str
    shape: str
    threads: int
    peer: str
    median_s: float | None
    rate: float | None
    unit: str
    percent_of_floor: float | None = None
    ratio_to_best_peer: float | None = None
    operations: int | None = None
    bytes: int | None = None
    products: str | None = None


@dataclass(slots=True)
class Settings:
    """What the command line asked for. against: peers that are there. say: for notes and errors, a line each.
    report: is told what is measured next. failed: how many cases could not be measured.
    """

    thread_counts: tuple[int, ...]
    against: tuple[str, ...]
    quick: bool
    pattern: str | None
    say: Callable[[str], None]
    report: Callable[[str], None]
    failed: int = 0
    _probes: dict[int, tuple[Any, Any]] = field(default_factory=dict)
    _product_probes: dict[tuple[int, str], tuple[Any, int]] = field(default_factory=dict)
    _peaks: dict[int, Any] = field(default_factory=dict)

    def wants(self, name: str) -> bool:
        return self.pattern is None or fnmatchcase(name, f"*{self.pattern}*")

    def peaks(self, threads: int) -> Any:
        from ..tune.peaks import measure_peaks

        if threads not in self._peaks:
            self._peaks[threads] = measure_peaks(
                threads, QUICK_SCALE if self.quick else 1.0,
                lambda what: self.report(f"peaks with {threads} worker{'s' * (threads > 1)}: {what}"))
        return self._peaks[threads]

    def memory_probes(self, threads: int) -> tuple[Any, Any]:
        """A read and a copy in DRAM."""
        from ..targets.x86_64.detect import host_target
        from ..tune.peaks import COPY_BYTES, READ_BYTES, copy_probe, read_probe

        if threads not in self._probes:
            target = host_target()
            scale = QUICK_SCALE if self.quick else 1.0
            self._probes[threads] = (read_probe(int(READ_BYTES["DRAM"] * scale), threads, target, True),
                                     copy_probe(int(COPY_BYTES * scale), threads, target, True))
        return self._probes[threads]

    def product_probe(self, products: str, peaks: Any) -> tuple[Any, int]:
        """Products of "f32", "bf16" or "i8" and nothing else, and how many repetitions are a sample."""
        from ..targets.x86_64.detect import host_target

        key = (peaks.threads, products)
        if key not in self._product_probes:
            probe = peaks.product_probe(products, host_target())
            self._product_probes[key] = (probe, probe.sample()[0])
        return self._product_probes[key]

    def measure(self, contestants: Mapping[str, Callable[[], Any]], threads: int = 1,
                **options: Any) -> dict[str, Any]:
        """options: of sapper.tune.measure, but with `quick`."""
        return self._measure(contestants, threads, thread_time if threads == 1 else perf_counter, **options)

    def measure_by_wall(self, contestants: Mapping[str, Callable[[], Any]], threads: int = 1) -> dict[str, Any]:
        """By the clock on the wall, where what else runs on the machine is to count."""
        return self._measure(contestants, threads, perf_counter)

    def _measure(self, contestants: Mapping[str, Callable[[], Any]], threads: int,
                 clock: Callable[[], float], **options: Any) -> dict[str, Any]:
        from ..tune.measure import measure

        settle_s = SETTLE_S if threads > 1 and len(contestants) > 1 else 0.0
        if self.quick:
            return measure(contestants, sample_s=5e-4, budget_s=0.05, rounds=3, settle_s=settle_s, clock=clock)
        return measure(contestants, settle_s=settle_s, clock=clock, **options)


@dataclass(frozen=True, slots=True)
class Job:
    """A kernel of the library with one shape. cold: its weights shall come from DRAM. packed: its tensor b is packed
    for us, before the clock runs; peers have the array."""

    entry: Any
    case: Any
    cold: bool = False
    packed: bool = False

    @property
    def name(self) -> str:
        return f"{self.entry.name}{' packed' * self.packed}"

    @property
    def label(self) -> str:
        return f"{self.name} {self.case.label}"

    def arguments(self, arguments: Mapping[str, Any]) -> list[Any]:
        """What our kernel is called with."""
        if not self.packed:
            return list(arguments.values())
        from ..runtime.packed import pack

        return list({**arguments, "b": pack(self.entry.kernel, "b", arguments["b"])}.values())


# ------------------------------------------------------------------------------------------------------- jobs by suite


def jobs_of(suite: str, quick: bool) -> list[Job]:
    """The library's cases of a suite; with `quick` the smallest of each kernel."""
    from ..kernels import library
    from ..kernels.integer import case as integer_case
    from ..kernels.matmul import case as matmul_case
    from ..kernels.record import NUMPY_DTYPES, Case

    jobs: list[Job] = []
    for entry in library():
        name = entry.name
        module = entry.reference.__module__.rsplit(".", 1)[-1]
        cases: list[Any] = list(entry.cases)
        cold = False
        if module == "matmul" and suite == "matvec":
            size = NUMPY_DTYPES[entry.dtype].itemsize
            cases = [matmul_case(1, n, k, size, "") for n, k in DECODE_SHAPES] if name.startswith("matmul_nt_") and len(
                name.split("_")) == 3 else []
            cold = True
            if name in COLD_PRODUCTS:
                left = 2 if entry.products == "bf16" else 4
                cases += [matmul_case(m, *COLD_SHAPE, size, "", left) for m in COLD_ROWS]
        elif module == "integer" and suite == "matvec":
            cases = [integer_case(m, *COLD_SHAPE) for m in COLD_ROWS] if name in COLD_PRODUCTS else []
            cold = True
        elif module == "matvec" and suite == "matvec":
            cold = True
            if name in ("matvec_f32", "matvec_bf16"):
                size = NUMPY_DTYPES[entry.dtype].itemsize
                extra = [Case({"N": n, "K": k}, 2 * n * k, size * n * k + 4 * n + 4 * k) for n, k in MATVEC_SHAPES]
                cases = extra + [c for c in cases if c.label not in {e.label for e in extra}]
        elif _suite_of(name, module) != suite:
            continue
        if quick:
            cases = sorted(cases, key=lambda c: int(c.bytes))[:1]
        jobs += [Job(entry, case, cold) for case in cases]
        if name in COLD_PRODUCTS and suite == "matvec":
            jobs += [Job(entry, case, cold, packed=True) for case in cases]
    return jobs


ROW_MODULES = ("softmax", "norm", "activation", "rope", "narrow")


def _suite_of(name: str, module: str) -> str:
    if module in ROW_MODULES or name.startswith("quantize_"):
        return "rows"
    if module in ("matmul", "batched", "integer"):
        return "matmul"
    if module in ("attention", "attention_narrow", "mla"):
        return "attention"
    if module == "matvec":
        return module
    return "others"


# -------------------------------------------------------------------------------------------------------- library cases


def case_rows(job: Job, threads: int, settings: Settings) -> list[Row]:
    """Measure a case of the library. Raises what the compiler raises, and RuntimeError for a wrong result."""
    import numpy

    from ..runtime.launch import prepare
    from ..tune.measure import rotating
    from ..tune.operands import copies, placed

    entry, case = job.entry, job.case
    arguments = placed(entry.make_arguments(numpy.random.default_rng(1), case.shape))
    expected = entry.reference(arguments) if case.bytes <= CHECK_BYTES else None
    calls = [prepare(entry.kernel, *job.arguments(arguments), threads=threads)]
    stored = calls[0].entry.compiled.stored
    if expected is not None:
        calls[0]()
        wrong = entry.compare(arguments, expected)
    else:
        wrong = unwritten(calls[0], {name: arguments[name] for name in stored})
    if wrong:
        raise RuntimeError(wrong)
    peaks = settings.peaks(threads)
    sets = copies(arguments, job.cold, peaks.level_bytes["L3"])
    if job.cold:
        calls = [prepare(entry.kernel, *job.arguments(one), threads=threads) for one in sets]
    places = cycle(range(len(sets)))
    contestants: dict[str, Callable[[], Any]] = {"sapper": rotating(calls, places)}
    for peer in settings.against:
        if peer in entry.peers:
            set_peer_threads(peer, threads)
            contestants[peer] = rotating([entry.peers[peer](one) for one in sets], places)
    size_bytes, written = case.bytes, min(case.bytes, sum(arguments[name].nbytes for name in stored))
    footprint = sum(a.nbytes for a in arguments.values() if isinstance(a, numpy.ndarray))
    if footprint < size_bytes:
        # Changed in place: each byte is fetched once, and goes back while others come.
        size_bytes, written = footprint, 0
    level = "DRAM" if job.cold else peaks.level(size_bytes)
    floor_s = peaks.floor_s(case.flops, size_bytes - written, written, level, entry.products)
    multiplies = case.flops / peaks.arithmetic(entry.products) >= PRODUCTS_SHARE * floor_s
    in_memory = level == "DRAM"
    timings, peaks = with_floor(contestants, peaks, settings, products=(entry.products,) * multiplies,
                                reads=in_memory, writes=in_memory and written > 0)
    floor_s = peaks.floor_s(case.flops, size_bytes - written, written, level, entry.products)
    by_flops = case.flops / peaks.arithmetic(entry.products) >= floor_s
    work, unit = (case.flops, "GOP/s" if entry.products == "i8" else "GFLOP/s") if by_flops else (case.bytes, "GB/s")
    return rows_of(job.name, entry.dtype, case.label, threads, timings, floor_s, work / 1e9, unit,
                   totals=(case.flops, size_bytes, entry.products))


def with_floor(contestants: Mapping[str, Callable[[], Any]], peaks: Any, settings: Settings, *,
               products: Sequence[str] = (), reads: bool = False, writes: bool = False,
               **options: Any) -> tuple[dict[str, Any], Any]:
    """The timings, and the peaks: of these products, and of what DRAM reads and writes, as they were in the same
    minutes. options: of Settings.measure."""
    limits: dict[str, tuple[str, Any, int]] = {}  # contestant -> the field of the peaks, its probe, repetitions
    for name in products:
        limit = peaks.fastest(name)
        limits[f"({limit})"] = (limit, *settings.product_probe(name, peaks))
    if reads or writes:
        read, copy = settings.memory_probes(peaks.threads)
        limits[FLOOR_READ] = ("read", read, 1)
        if writes:
            limits[FLOOR_COPY] = ("copy", copy, 1)
    probes = {name: partial(probe.run, repeats) for name, (_, probe, repeats) in limits.items()}
    timings = settings.measure({**contestants, **probes}, peaks.threads, **options)
    for name, (limit, probe, repeats) in limits.items():
        rate = probe.work * repeats / timings.pop(name).median_s
        if limit == "read":
            peaks = replace(peaks, read={**peaks.read, "DRAM": rate})
        elif limit == "copy":
            peaks = replace(peaks, copy=rate, copy_streaming=rate)
        else:
            peaks = replace(peaks, **{limit: rate})
    return timings, peaks


def unwritten(call: Callable[[], Any], outputs: Mapping[str, Any]) -> str | None:
    """Run a large case and say which of its outputs was not written everywhere. Outputs are filled with NaN before;
    where one still holds NaN that may be the result, so it is filled with a number then, and computed again."""
    import numpy

    floats = {name: array for name, array in outputs.items() if array.dtype.kind == "f"}
    filled = [name for name, array in floats.items() if numpy.isnan(array).all()]
    call()
    for name, array in floats.items():
        held = numpy.isnan(array)
        if held.any() and name in filled:
            array[...] = 1.0
            call()
            held &= ~numpy.isnan(array)
        if held.any():
            return f"{name} holds NaN after the run; expected it written everywhere"
    return None


def rows_of(case: str, dtype: str, shape: str, threads: int, timings: Mapping[str, Any], floor_s: float | None,
            work: float | None, unit: str, dtypes: Mapping[str, str] | None = None,
            totals: tuple[int, int, str] | tuple[()] = ()) -> list[Row]:
    """Rows for the contestants of one case. work: what the rate counts, per second; None: the rate is the time itself,
    in the unit "ms" or "us". dtypes: of contestants whose dtype is another. totals: operations, bytes, products."""
    peers = [timing.median_s for name, timing in timings.items() if name != "sapper"]
    best_s = min(peers) if peers else None
    rows = []
    for name, timing in timings.items():
        median_s = timing.median_s
        rate = work / median_s if work is not None else median_s * {"ms": 1e3, "us": 1e6}[unit]
        rows.append(Row(
            case, (dtypes or {}).get(name, dtype), shape, threads, name, median_s, rate, unit,
            None if floor_s is None else 100.0 * floor_s / median_s, None if best_s is None else best_s / median_s,
            *totals,
        ))
    return rows


# --------------------------------------------------------------------------------------------------------------- peers


def present_peers(wanted: Sequence[str], say: Callable[[str], None]) -> tuple[str, ...]:
    """Those of the peers that can be imported; a line for each that can't, or that nobody knows."""
    from importlib.util import find_spec

    modules = {"numpy": ("numpy", "numpy"), "torch": ("torch", "torch"), "llama": ("llama_cpp", "llama-cpp-python")}
    present = []
    for peer in wanted:
        if peer not in modules:
            say(f"no peer {peer!r}: expected one of {', '.join(PEERS)}; it is left out")
        elif find_spec(modules[peer][0]) is None:
            say(f"{peer} is not installed and is left out; to compare with it: pip install {modules[peer][1]}")
        else:
            present.append(peer)
    return tuple(present)


def prepare_peers(threads: int, say: Callable[[str], None]) -> None:
    """Let OpenBLAS choose by the CPU and use so many threads at most; works if NumPy is not loaded yet."""
    overrides = [name for name in ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE") if os.environ.pop(name, None) is not None]
    os.environ["OPENBLAS_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"] = str(threads)
    os.environ["OPENBLAS_THREAD_TIMEOUT"] = str(BLAS_SPIN_LOG2_CYCLES)
    if overrides and "numpy" in sys.modules:
        say(f"NumPy was loaded with {' and '.join(overrides)} set; its figures are not those of its own choice")


def set_peer_threads(peer: str, threads: int) -> None:
    if peer == "numpy":
        for setter in _openblas_setters():
            setter(threads)
    elif peer == "torch":
        import torch

        torch.set_num_threads(threads)


def _openblas_setters() -> list[Any]:
    """`set_num_threads` of every OpenBLAS in this process."""
    import numpy  # noqa: F401  (loads its OpenBLAS)

    with open("/proc/self/maps", encoding="utf-8") as maps:
        paths = {line.split(None, 5)[5].strip() for line in maps if "openblas" in line}
    setters = []
    for path in sorted(paths):
        library = ctypes.CDLL(path)
        for name in ("scipy_openblas_set_num_threads64_", "openblas_set_num_threads64_", "openblas_set_num_threads"):
            if hasattr(library, name):
                setters.append(getattr(library, name))
                break
    return setters


# ------------------------------------------------------------------------------------------------------- other suites


def library_rows(suite: str, settings: Settings) -> Iterator[list[Row]]:
    for job in jobs_of(suite, settings.quick):
        if settings.wants(job.label):
            for threads in settings.thread_counts:
                settings.report(f"{job.label}, {threads} thread{'s' * (threads > 1)}")
                yield from attempt(job.label, settings, partial(case_rows, job, threads, settings))


def attempt(label: str, settings: Settings, run: Callable[[], list[Row]]) -> Iterator[list[Row]]:
    """The rows of a case; a line, and no rows, for one that fails."""
    try:
        rows = run()
    except Exception as error:
        settings.failed += 1
        settings.say(f"error: {label}: {type(error).__name__}: {error}")
        return
    yield rows


PRODUCTS_OF_BYTES = {"dot4_u8i8": "vpdpbusd", "pairs_u8i8": "vpmaddubsw"}
"""Instruction that the peak of bytes is measured with."""


def peak_rows(settings: Settings) -> Iterator[list[Row]]:
    for threads in settings.thread_counts:
        found = settings.peaks(threads)
        figures = [
            ("peak multiply-add", "f32", found.f32_flops, "GFLOP/s"),
            ("peak vdpbf16ps", "bf16", found.bf16_flops, "GFLOP/s"),
            (f"peak {PRODUCTS_OF_BYTES[found.int8_products]}", "i8", found.int8_ops, "GOP/s"),
            ("peak tdpbf16ps", "bf16", found.tile_bf16_flops, "GFLOP/s"),
            ("peak tdpbusd", "i8", found.tile_int8_ops, "GOP/s"),
            *((f"peak read {level}", "f32", rate, "GB/s") for level, rate in found.read.items()),
            ("peak copy", "f32", found.copy, "GB/s"),
            ("peak copy, streaming stores", "f32", found.copy_streaming, "GB/s"),
        ]
        yield [Row(name, dtype, "", threads, "sapper", None, rate / 1e9, unit)
               for name, dtype, rate, unit in figures if rate is not None and settings.wants(name)]


def call_rows(settings: Settings) -> Iterator[list[Row]]:
    """What a call costs from Python: a kernel that has next to nothing to do."""
    import numpy

    from ..kernels.add import vector_add
    from ..runtime.launch import prepare
    from ..runtime.program import Program

    a, b, c = (numpy.ones(16, numpy.float32) for _ in range(3))
    vector_add(a, b, c)     # compiled before it is timed: how many calls a sample takes follows from the first
    contestants: dict[str, Callable[[], Any]] = {"sapper": lambda: vector_add(a, b, c)}
    if "numpy" in settings.against:
        contestants["numpy"] = lambda: numpy.add(a, b, out=c)
    if "torch" in settings.against:
        import torch

        x, y, z = (torch.from_numpy(array) for array in (a, b, c))
        contestants["torch"] = lambda: torch.add(x, y, out=z)
    if settings.wants("call"):
        settings.report("calls")
        yield rows_of("call", "f32", "16", 1, settings.measure(contestants), None, None, "us")
        for name, run in (("bound call", prepare(vector_add, a, b, c)),
                          ("program call", Program([(vector_add, (a, b, c))], threads=1))):
            yield rows_of(name, "f32", "16", 1, settings.measure({"sapper": run}), None, None, "us")


def suite_rows(suite: str, settings: Settings) -> Iterator[list[Row]]:
    """The rows of a suite, case by case."""
    if suite == "all":
        for one in SUITES[:-1]:
            yield from suite_rows(one, settings)
    elif suite == "peaks":
        yield from peak_rows(settings)
    elif suite == "call":
        yield from call_rows(settings)
    elif suite == "threads":
        from .bench_threads import thread_rows

        yield from thread_rows(settings)
    elif suite == "compile":
        from .bench_compile import compile_rows

        yield from compile_rows(settings)
    elif suite == "quantized":
        from .bench_quantized import quantized_rows

        yield from quantized_rows(settings)
    elif suite == "train":
        from .bench_train import train_rows

        yield from train_rows(settings)
    elif suite == "batch":
        from .bench_batch import batch_rows

        yield from batch_rows(settings)
    elif suite in ("model", "deepseek"):
        from .bench_models import deepseek_rows, model_rows

        yield from (model_rows if suite == "model" else deepseek_rows)(settings)
    else:
        yield from library_rows(suite, settings)
