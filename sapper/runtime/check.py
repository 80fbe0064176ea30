"""A kernel checked at every station, so that a wrong result names the first station that made it.

Enters: a kernel, a target, a seed. Leaves: a `Report`. Holds: whatever the kernel's code does, the caller survives: it
runs in a child process between guard pages, and every station has a time limit.

    source ── front end ── tile sizes ── parallel loops ── canonical ── lower ── expand ── simplify ── native
    │ eager     │ tile interpreter: whole axes, 1, 3, 8, races           │ lane interpreter     │ this CPU

Each station's result is compared with what the tile IR means, within the bound that rounding leaves (tile.rounding).
A kernel that has assembly by hand goes on: pieces on rows are proved where they only move and combine bits; each kernel
by hand is interpreted from the meanings of its rows, proved where it can be, then run; and each micro-kernel in its
loops is checked by itself, on all tiles that it is written for.
Code that is wrong is made again without the later steps of code generation, which tells select, schedule, allocate and
peephole apart.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy

from ..assembly.prove import Proof
from ..ir.nodes import Function
from ..ir.types import DType
from ..tile.rounding import Expectation, expect
from ..tile.schedule import LoweringError, Panels
from ..tile.semantics import OutOfBounds
from .arguments import Binding, Parameter, Signature, fill_words
from .cases import Arguments, Case, MakeArguments, cases, copies_of
from .compiled import CompiledKernel
from .errors import ArgumentError
from .packed import Packed, pack_array

PROOF = "proof"
LAST_STATIONS = ("select", "schedule", "allocate", "peephole", "native", PROOF, "by hand, interpreted",
                 "by hand, native", "micro-kernels")
STATIONS = (
    "front end", "tile sizes", "parallel loops", "canonical", "lower", "expand", "simplify", *LAST_STATIONS,
)
"""All stations in order. Those from `select` on run as one, `native`; they are told apart where that is wrong."""

RUNS = 12
TIME_LIMIT_S = 60.0


@dataclass(frozen=True, slots=True)
class Finding:
    """A wrong result. station: the first that is wrong. case: which arguments. message: what is wrong, where."""

    station: str
    case: str
    message: str


@dataclass(slots=True)
class Report:
    """How a kernel did. passed: how many cases each station got right. skipped: why a station did not run at all.

    refused: cases whose arguments the kernel can't take (an index outside its tensor). proofs: of each piece by hand,
    whether it is proved for all inputs, and how, or why not.
    """

    kernel: str
    cases: int = 0
    passed: dict[str, int] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    refused: int = 0
    proofs: dict[str, Proof] = field(default_factory=dict)
    finding: Finding | None = None

    @property
    def ok(self) -> bool:
        return self.finding is None and self.cases > 0

    def to_json(self) -> dict[str, Any]:
        wrong = self.finding
        return {
            "kernel": self.kernel, "ok": self.ok, "cases": self.cases, "passed": dict(self.passed),
            "skipped": dict(self.skipped), "refused": self.refused,
            "proofs": {name: {"proved": p.proved, "text": str(p)} for name, p in self.proofs.items()},
            "finding": None if wrong is None else
            {"station": wrong.station, "case": wrong.case, "message": wrong.message},
        }


class _Wrong(Exception):
    """A station's result is wrong."""

    def __init__(self, station: str, message: str) -> None:
        super().__init__(message)
        self.station = station


class _OutOfTime(Exception):
    pass


@contextlib.contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise _OutOfTime after so much processor time, which other work on the machine does not use up, where this thread
    can take a signal; elsewhere there is no limit."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: Any) -> None:
        raise _OutOfTime

    previous = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, previous)


def check_kernel(
    kernel: Any, target: Any = None, seed: int = 0, runs: int = RUNS, schedule: Any = None,
    make_arguments: MakeArguments | None = None, shapes: tuple[Mapping[str, int], ...] = (),
    on_case: Callable[[str], None] | None = None, emulate: Callable[..., Any] | None = None, prove: bool = True,
    verify_by_hand: Callable[..., int] | None = None, run_code: Callable[..., None] | None = None,
    brief: bool = False,
) -> Report:
    """Check a kernel on `runs` cases and stop at the first wrong result.

    target: None for this CPU. make_arguments, shapes: see cases.cases. on_case: told the label of each case. emulate:
    runs a kernel for a GPU (sapper.emulate.run); without it the last station of such a target is left out. prove: try
    to show of pieces by hand that they are right for all inputs. verify_by_hand: compares a kernel by hand for a GPU
    with the kernel (sapper.emulate.by_hand.verify). run_code: runs machine code of another family
    (sapper.emulate.arm.run_compiled), which is left out without it. brief: of lane IR only the last form is
    interpreted, which says that a kernel is wrong, and not from which station on.
    Raises KernelError where the kernel does not compile to tile IR, ScheduleError where the schedule can't be followed.
    """
    if target is None:
        from ..targets import host_target

        target = host_target()
    drawn = cases(kernel, kernel.tile_ir(), seed, runs, make_arguments, shapes)
    report = Report(kernel.name)
    checker = _Checker(kernel, target, schedule, report, emulate, brief, run_code)
    for case in drawn:
        if on_case is not None:
            on_case(case.label)
        checker.guarded(case, lambda case=case: checker.run(case, seed))  # type: ignore[misc]
        if report.finding is not None:
            return report
    if prove:
        prove_by_hand(kernel, target, schedule, report)
    if report.finding is None:
        check_by_hand(kernel, target, seed, runs, report, prove, verify_by_hand)
    if report.finding is None:
        check_micro_kernels(checker.micro_kernels(), target, seed, report)
    return report


def prove_by_hand(kernel: Any, target: Any, schedule: Any, report: Report) -> None:
    """Pieces on rows against their meaning, for all inputs."""
    from .proofs import prove_pieces

    for name, proof in prove_pieces(kernel, target, schedule).items():
        _told(report, name, proof)


def _told(report: Report, name: str, proof: Proof) -> None:
    report.proofs[name] = proof
    if proof.proved is False:
        report.finding = Finding(PROOF, name, proof.text)


def check_lanes(kernel: Any, target: Any, known: Iterable[tuple[Case, Mapping[str, Expectation]]],
                schedule: Any) -> tuple[Report, set[str]]:
    """Only the simplified lane IR, interpreted, and the code made from it, on cases whose results are known; and which
    micro-kernels (lang/by_hand.py) they came to, by key."""
    report = Report(kernel.name)
    checker = _Checker(kernel, target, schedule, report, brief=True)
    for case, expected in known:
        report.cases += 1
        checker.workers = 1
        checker.guarded(case, lambda: checker.lane_stations(case, case.arguments, expected))  # noqa: B023
        if report.finding is not None:
            break
    return report, checker.micro_kernels()


def check_micro_kernels(keys: set[str], target: Any, seed: int, report: Report) -> None:
    """Each micro-kernel by itself, on all tiles that it is written for, and each product of fragments."""
    from ..lang.by_hand import CONTRACTIONS, PRODUCTS
    from .micro_kernel import check_micro_kernel
    from .product import check_product

    for key in sorted(keys):
        alone = check_product(PRODUCTS[key], target, seed) if key in PRODUCTS else \
            check_micro_kernel(CONTRACTIONS[key], target, seed)
        if alone.finding is not None:
            found = alone.finding
            report.finding = Finding(found.station, f"{alone.kernel} by itself, {found.case}", found.message)
            return
        report.passed["micro-kernels"] = report.passed.get("micro-kernels", 0) + alone.cases


def check_by_hand(kernel: Any, target: Any, seed: int, runs: int, report: Report, prove: bool,
                  verify_by_hand: Callable[..., int] | None = None) -> None:
    """The last stations: assembly by hand against the kernel, from the meanings of its rows, then on this CPU."""
    from ..assembly.errors import AssemblyError
    from ..assembly.override import compile_by_hand
    from ..targets.x86_64.detect import UnsupportedCPU, host
    from .by_hand import verify
    from .proofs import prove_kernel

    for piece in kernel.by_hand:
        missing = sorted(piece.features - target.features)
        if piece.family != target.family or missing:
            report.skipped[f"by hand, {piece.name}"] = f"{target.name} is no {piece.family} with {', '.join(missing)}"
            continue
        station = "by hand, interpreted"
        try:
            made = compile_by_hand(kernel, piece, target)
            if target.assembler_allocates:
                if verify_by_hand is None:
                    report.skipped[station] = f"without an emulator code of the family {target.family} can't run here"
                    continue
                done = verify_by_hand(kernel, made, target, seed, runs)
                report.passed[station] = report.passed.get(station, 0) + done
                continue
            report.passed[station] = report.passed.get(station, 0) + verify(kernel, made, seed, runs, interpreted=True)
            try:
                lacking = sorted(target.features - host().features)
            except UnsupportedCPU as error:
                lacking = [str(error)]
            if prove:
                _told(report, piece.name, prove_kernel(kernel, made, seed))
            if report.finding is not None:
                return
            station = "by hand, native"
            if lacking:
                report.skipped[station] = f"this CPU has no {', '.join(lacking)}"
            else:
                report.passed[station] = report.passed.get(station, 0) + verify(kernel, made, seed, runs)
        except AssemblyError as error:
            report.finding = Finding(station, piece.name, str(error))
            return


class _Checker:
    """One kernel on one target. What was made for a specialisation is kept, as several cases share it.

    brief: of lane IR only the last form is interpreted.
    """

    def __init__(self, kernel: Any, target: Any, schedule: Any, report: Report,
                 emulate: Callable[..., Any] | None = None, brief: bool = False,
                 run_code: Callable[..., None] | None = None) -> None:
        self.emulate = emulate
        self.run_code = run_code
        self.brief = brief
        self.kernel = kernel
        self.target = target
        self.schedule = schedule
        self.report = report
        self.signature = Signature(
            kernel.name, [Parameter.of(name, type) for name, type in kernel.parameters],
            kernel.options.get("in_place", ()),
        )
        self.made: dict[Any, _Made] = {}
        self.widen: Callable[[], None] = lambda: None
        self.workers = self.turns = 0
        from ..targets.x86_64.detect import UnsupportedCPU, host

        if target.assembler_allocates:
            self.native = False
            report.skipped["native"] = f"code of the family {target.family} can't run here"
            return
        try:
            missing = sorted(target.features - host().features)
        except UnsupportedCPU as error:
            missing = [str(error)]
        self.native = not missing
        if missing and run_code is None:
            report.skipped["native"] = f"this CPU has no {', '.join(missing)}"

    def guarded(self, case: Case, stations: Callable[[], None]) -> None:
        """Note the first station that is wrong."""
        try:
            stations()
        except _Wrong as wrong:
            self.report.finding = Finding(wrong.station, case.label, str(wrong))

    def micro_kernels(self) -> set[str]:
        """Keys of those that the code made so far has."""
        return {op.attributes["by"] for made in self.made.values() for op in made.lane.walk()
                if op.name in ("asm_contract", "asm_multiply")}

    def run(self, case: Case, seed: int) -> None:
        from ..lang.errors import KernelError

        report = self.report
        function = self.kernel.tile_ir()
        arguments = case.arguments
        sizes = (1, None, 3, 8) if case.small else (None, 16, 40)
        try:
            with self.station("tile sizes", OutOfBounds):
                expected = expect(function, arguments, runs=len(sizes), seed=seed, tile_sizes=sizes,
                                  flushes=self.target.flushes_functions)
        except OutOfBounds:
            report.refused += 1
            return
        report.cases += 1
        self.workers = self.workers % 3 + 1

        def widen() -> None:
            """More runs with random rounding: a few may miss a case of overflow."""
            more = expect(function, arguments, runs=12, seed=seed + 1000, tile_sizes=sizes,
                          flushes=self.target.flushes_functions)
            for name, e in expected.items():
                numpy.maximum(e.bound, more[name].bound, out=e.bound)

        self.widen = widen
        self.tile_stations(function, case, arguments, expected)
        try:
            self.lane_stations(case, arguments, expected)
        except KernelError as error:
            if error.kind != "out-of-bounds":
                raise
            report.cases -= 1       # only where extents are compiled in, in a loop that is empty in this case
            report.refused += 1

    @contextlib.contextmanager
    def station(self, name: str, *expected: type[Exception]) -> Iterator[None]:
        """Whatever is raised inside is what this station does wrong, unless it was expected."""
        try:
            with _time_limit(TIME_LIMIT_S):
                yield
        except _OutOfTime:
            raise _Wrong(name, f"still running after {TIME_LIMIT_S:g} s of processor time") from None
        except _Wrong:
            raise
        except Exception as error:
            if isinstance(error, expected):
                raise
            from ..lang.errors import KernelError
            from ..tile.schedule import ScheduleError

            if isinstance(error, KernelError) and error.kind != "disjoint":
                raise
            if isinstance(error, ScheduleError) and self.schedule is not None:  # the caller's, and nothing of sapper's
                raise
            raise _Wrong(name, f"{type(error).__name__}: {error}") from error

    def compare(
        self, station: str, found: Mapping[str, Any], expected: Mapping[str, Expectation], note: str = ""
    ) -> None:
        for widened in (False, True):
            wrong = [text for name, e in expected.items()
                     if isinstance(found.get(name), numpy.ndarray) and (text := e.mismatch(found[name])) is not None]
            if not wrong:
                return
            if not widened:
                self.widen()
        raise _Wrong(station, "; ".join(wrong) + note)

    def passed(self, station: str) -> None:
        self.report.passed[station] = self.report.passed.get(station, 0) + 1

    # ---- tile IR

    def tile_stations(
        self, function: Function, case: Case, arguments: Arguments, expected: Mapping[str, Expectation]
    ) -> None:
        from ..ir.verifier import verify
        from ..tile import eager
        from ..tile.canonical import canonicalize
        from ..tile.interpret import interpret
        from ..tile.ops import TILE_OPS
        from ..tile.reduce_loops import reduce_loops

        given = copies_of(arguments)
        with self.station("front end"):
            verify(function, TILE_OPS)
            eager.run(self.kernel, given)
        self.compare("front end", given, expected, " (source run by Python against tile IR)")
        self.passed("front end")
        for size in (1, 3, 8) if case.small else (16, 33):
            given = copies_of(arguments)
            with self.station("tile sizes"):
                interpret(function, given, size)
            self.compare("tile sizes", given, expected, f" (tiles of {size})")
        self.passed("tile sizes")
        if case.small:
            given = copies_of(arguments)
            with self.station("parallel loops"):
                interpret(function, given, check_races=True)
            self.compare("parallel loops", given, expected)
            self.passed("parallel loops")
        with self.station("canonical"):
            canonical = self.kernel.tile_ir()
            reduce_loops(canonical)
            canonicalize(canonical)
            verify(canonical, TILE_OPS)
            given = copies_of(arguments)
            interpret(canonical, given)
        self.compare("canonical", given, expected)
        self.passed("canonical")

    # ---- lane IR and code

    def lane_stations(self, case: Case, arguments: Arguments, expected: Mapping[str, Expectation]) -> None:
        self.lanes_and_code(case, arguments, expected)
        if case.packed and self.schedule is None and self.panels:
            self.turns += 1
            names = list(self.panels)
            if at := self.turns % (len(names) + 1):     # one of them, or all
                names = [names[at - 1]]
            packed = {name: pack_array(arguments[name], *self.panels[name]) for name in names}
            try:
                self.lanes_and_code(case, {**arguments, **packed}, expected, f" ({', '.join(packed)} packed)")
            except LoweringError as error:      # what one loop reads as panels another may not
                self.report.skipped[f"{', '.join(packed)} packed"] = str(error)

    @cached_property
    def panels(self) -> dict[str, tuple[DType, Panels]]:
        """The matrices that calls may pass packed."""
        from ..codegen.pipeline import panels_of_kernel
        from ..lang.errors import KernelError

        found = {}
        for parameter in self.signature.parameters:
            try:
                if parameter.dims is not None and len(parameter.dims) == 2:
                    found[parameter.name] = (
                        parameter.dtype, panels_of_kernel(self.kernel, parameter.name, self.target))
            except (LoweringError, KernelError):        # it is not only contracted
                continue
        return found

    def lanes_and_code(self, case: Case, arguments: Arguments, expected: Mapping[str, Expectation],
                       note: str = "") -> None:
        from .specialise import specialise

        given = copies_of(arguments)
        binding = self.signature.bind(tuple(given.values()))
        key = specialise(self.signature, binding, case.static)
        made = self.made.get(key)
        if made is None:
            made = self.made[key] = _Made(self, key)
        self.signature.check_stores(binding, made.stored)
        for station, program in made.lanes[-1:] if self.brief else made.lanes:
            given = copies_of(arguments)
            with self.station(station):
                self.interpret_lanes(program, given, made.stored)
            self.compare(station, given, expected,
                         note + (f" ({self.workers} workers)" if self.workers > 1 else ""))
            self.passed(station)
        if self.emulate is not None and not any(view.extent[0] for view in binding.tensors.values()):
            given = copies_of(arguments)
            try:
                with self.station("emulator", ArgumentError):
                    self.emulate(self.kernel, *given.values(), target=self.target.name, schedule=self.schedule or {},
                                 static=case.static, workers=self.workers, trial=False)
            except ArgumentError as error:
                if all(numpy.size(array) for array in given.values()):
                    raise _Wrong("emulator", f"ArgumentError: {error}") from error
                return      # as a call: extents must do for indices in loops that are empty in this case, too
            self.compare("emulator", given, expected, note)
            self.passed("emulator")
        if self.run_code is not None:
            given = copies_of(arguments)
            with self.station("emulator"):
                self.run_code(made.code, self.signature, self.signature.bind(tuple(given.values())), given,
                              self.workers)
            self.compare("emulator", given, expected, note)
            self.passed("emulator")
        if self.native:
            wrong = self.run_native(made.code, binding, expected)
            if wrong is not None:
                station, message = made.bisect(binding, expected, wrong)
                raise _Wrong(station, message + note)
            self.passed("native")

    def interpret_lanes(self, program: Any, given: Arguments, stored: tuple[str, ...]) -> None:
        from ..ir.scratch import scratch_bytes
        from ..lane.arithmetic import wrap64
        from ..lane.memory import Memory

        binding = self.signature.bind(tuple(given.values()))
        attributes = program.function.attributes
        memory = Memory()
        each = max(64, scratch_bytes(attributes["scratch"], binding.dims))
        shared = scratch_bytes(attributes.get("shared_scratch", ()), binding.dims)
        scratch = memory.allocate("scratch", each * self.workers + shared)
        sync = memory.allocate("sync block", 1024)
        written = {id(given[name]) for name in stored}
        for name, value in given.items():
            if isinstance(value, Packed):
                memory.add_array(name, value.data)
            elif isinstance(value, numpy.ndarray):
                value.flags.writeable = id(value) in written
                memory.add_array(name, value)
        words = [scratch, each, sync, *fill_words(self.signature, attributes["slots"], binding)]
        program.run(numpy.array([wrap64(w) for w in words], numpy.int64), memory, self.workers)

    def run_native(self, compiled: CompiledKernel, binding: Binding, expected: Mapping[str, Expectation]) -> str | None:
        """None, or what the code does wrong."""
        from .guarded import run_compiled_guarded

        threads = 1 if not compiled.counters else min(2, self.workers)
        for run in run_compiled_guarded(self.signature, compiled, binding, threads=threads):
            if run.crash is not None:
                return f"crash: {run.crash}"
            try:
                self.compare("native", run.outputs, expected)
            except _Wrong as wrong:
                return str(wrong) + (f" ({threads} threads)" if threads > 1 else "")
        return None


class _Made:
    """All forms of a kernel for one specialisation. lanes: (station, runnable lane IR). stored: names."""

    def __init__(self, checker: _Checker, key: Any) -> None:
        from ..codegen import pipeline
        from ..ir.verifier import verify
        from ..lane.interpret import Program
        from ..lane.ops import LANE_OPS
        from ..lang.by_hand import PIECES, PRODUCTS
        from ..tile.schedule import DimClass, Schedule, Specialization

        self.checker = checker
        target = checker.target
        function = checker.kernel.tile_ir(dict(key.static_dims))
        self.stored = pipeline.stored_tensors(function)
        classes = {
            name: DimClass(pipeline.HINTS.get(bound, pipeline.LARGE), divisor)
            for name, (bound, divisor) in key.dim_classes
        }
        with checker.station("lower", *[LoweringError] * key.has_packed):
            lane = pipeline.to_lane(function, checker.schedule or Schedule(), pipeline.facts_of(target),
                                    Specialization(classes, dict(key.unit_strides), frozenset(key.aligned)))
            verify(lane, LANE_OPS)
            self.lanes = [("lower", Program(lane))]
        with checker.station("by hand, static"):
            for op in lane.walk():
                if op.name == "asm":
                    PIECES[op.attributes["by"]].check_op(op, target)
                elif op.name == "asm_multiply":
                    PRODUCTS[op.attributes["by"]].check_op(op, target)
        with checker.station("expand"):
            pipeline.expand_lane(lane, target)
            verify(lane, LANE_OPS)
            self.lanes.append(("expand", Program(lane)))
        with checker.station("simplify"):
            pipeline.simplify_lane(lane, target)
            verify(lane, LANE_OPS)
            self.lanes.append(("simplify", Program(lane)))
        self.lane = lane
        if target.assembler_allocates:
            with checker.station("for threads"):
                pipeline.for_threads(lane, target)
                verify(lane, LANE_OPS)
                self.lanes.append(("for threads", Program(lane)))
        else:
            self.code = self.compile(("schedule", "peephole"))

    def compile(self, steps: tuple[str, ...]) -> CompiledKernel:
        """Machine code, made with only some of the steps that may be left out. Raises _Wrong."""
        from ..codegen.allocate import allocate
        from ..codegen.check import CheckError, check
        from ..codegen.compile import counters_of, encoded, rules_of, settle_vectors
        from ..codegen.frame import finish_frame
        from ..codegen.peephole import peephole
        from ..codegen.pipeline import pieces_in
        from ..codegen.schedule import schedule
        from ..codegen.select import select
        from ..lang.by_hand import piece_of

        lane, target = self.lane, self.checker.target
        rules = rules_of(target)
        registers = rules.register_file(target)
        with self.checker.station("select"):
            selected = select(lane, rules, target)
        if "schedule" in steps:
            with self.checker.station("schedule"):
                schedule(selected, registers)
        with self.checker.station("allocate"):
            allocation = allocate(selected, registers)
            machine = allocation.function
            finish_frame(machine, registers, allocation.origin)
            try:
                check(selected, machine, allocation.origin, registers)
            except CheckError as error:
                raise _Wrong("allocate", str(error)) from error
            for key in pieces_in(lane):
                piece_of(key).check_kept(machine, target)
        if "peephole" in steps:
            with self.checker.station("peephole"):
                peephole(machine, registers)
        with self.checker.station("native"):
            settle_vectors(machine, registers, target, lane.attributes["lanes"])
            code = encoded(machine, target).code
        attributes = lane.attributes
        return CompiledKernel(
            lane.name, bytes(code), tuple(attributes["slots"]), 0, _tuples(attributes["scratch"]),
            counters_of(lane), self.stored,
        )

    def bisect(self, binding: Binding, expected: Mapping[str, Expectation], wrong: str) -> tuple[str, str]:
        """(station, message) of the first step of code generation whose code is wrong on this call."""
        for station, steps in (("select", ()), ("schedule", ("schedule",))):
            try:
                code = self.compile(steps)
            except _Wrong:
                continue  # it needs the steps left out; the next try says more
            found = self.checker.run_native(code, binding, expected)
            if found is not None:
                return station, found
        return "peephole", wrong


def _tuples(nested: Any) -> Any:
    if isinstance(nested, (list, tuple)):
        return tuple(_tuples(item) for item in nested)
    return nested
