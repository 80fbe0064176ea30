"""Whether assembly by hand may stand for a kernel: compiled, interpreted or run, and compared with what it replaces.

Enters: a kernel, one of its pieces by hand, a target. Leaves: code, or one warning that says why the generated code is
taken. Holds: no piece runs in a caller's process before it has run in a guarded child and given the kernel's results
on random and hostile values and ragged extents.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import numpy

from ..assembly.emulate import LIMIT, Emulator
from ..assembly.errors import AssemblyError
from ..assembly.mutate import Mutant
from ..assembly.override import KernelAssembly, Override, compile_by_hand, digest
from ..assembly.static import check_static
from ..codegen.machine import Instruction, Register
from ..ir.scratch import scratch_bytes
from ..lang import context
from ..lang.by_hand import pieces_named
from ..tile.rounding import Expectation, expect
from ..tile.schedule import Schedule
from ..tile.semantics import OutOfBounds
from .arguments import Binding, Parameter, Signature, fill_words
from .cases import Case, boundary_cases, cases, copies_of
from .compiled import CompiledKernel
from .errors import warn_once

_LEAST_NORMAL = 2.0**-126
_STEPS_THAT_FLUSH = 4096
_DIRT = 0xFF
_VALUES_AT_ONCE = 1 << 22
"""Scratch memory holds what others left: NaN, so that reading what was not written shows."""
_APART_BYTES = 8
"""Tensors lie so many bytes beyond an aligned address: calls promise that of elements, of which 8 is the largest."""
QUICK_RUNS = 8
"""Cases before a piece is first used; `sapper check` takes more."""

_verdicts: dict[tuple[Any, Any, Any], Override | AssemblyError] = {}
_trusted: dict[tuple[Any, Any, str], bool] = {}
_digests: dict[tuple[Any, Any], str] = {}


def signature_of(kernel: Any) -> Signature:
    return Signature(kernel.name, [Parameter.of(n, t) for n, t in kernel.parameters],
                     kernel.options.get("in_place", ()))


def choose(kernel: Any, target: Any, static_dims: Mapping[str, int], unit_strides: Mapping[str, Any],
           dim_classes: Mapping[str, tuple[int, int]]) -> Override | None:
    """The first piece that admits this specialisation and is right; None: take the generated code."""
    for piece in kernel.by_hand:
        if piece.refusal(target, static_dims, unit_strides, dim_classes):
            continue
        found = judged(kernel, piece, target)
        if isinstance(found, Override):
            return found
    return None


def judged(kernel: Any, piece: Any, target: Any) -> Override | AssemblyError:
    """The code of a piece that passed its trial, or what is wrong with it (and one warning). The trial is run on this
    CPU where it has the target's features, else interpreted from the meanings of the rows; for a GPU by the emulator.
    """
    key = (kernel, piece.write, target)
    if key not in _verdicts:
        _verdicts[key] = _judge(kernel, piece, target)
    return _verdicts[key]


def trusted(kernel: Any, target: Any, schedule: Any) -> bool:
    """Whether a kernel with pieces by hand in it gives its results; one warning where it does not."""
    key = (kernel, target, repr(schedule))
    if key not in _trusted:
        from .check import check_kernel

        wanted = schedule if schedule is None or isinstance(schedule, Schedule) else Schedule.from_json(dict(schedule))
        finding = check_kernel(kernel, target, runs=QUICK_RUNS, schedule=wanted, prove=False, brief=True).finding
        _trusted[key] = finding is None
        if finding is not None:
            kernel.refused_by_hand = True
            warn_once(f"by-hand {kernel.name} {key[2]}",
                      f"kernel {kernel.name}: its pieces by hand are not used, generated code is: at station "
                      f"{finding.station}, with {finding.case}: {finding.message}")
    return _trusted[key]


def key_of(kernel: Any, blocks: tuple[str, ...] = ()) -> list[str]:
    """What pieces by hand add to the key of a kernel's compiled form. blocks: those that its schedule names."""
    keys = [piece.digest() for name in blocks for piece in pieces_named(name)]
    for piece in getattr(kernel, "by_hand", ()):
        known = _digests.get((kernel, piece.write))
        if known is None:
            try:
                known = digest(kernel, piece)
            except AssemblyError as error:
                known = str(error)
            _digests[kernel, piece.write] = known
        keys.append(known)
    return keys


def _judge(kernel: Any, piece: Any, target: Any) -> Override | AssemblyError:
    try:
        made = compile_by_hand(kernel, piece, target)
        if target.assembler_allocates:
            if context.verify_by_hand is None:
                raise AssemblyError("result", f"{piece.name} can't be tried", None, "no emulator",
                                    "the package sapper to set it", "import sapper")
            context.verify_by_hand(kernel, made, target)
        else:
            verify(kernel, made, runs=QUICK_RUNS, interpreted=not _runs_here(target))
        return made
    except AssemblyError as error:
        kernel.refused_by_hand = True
        warn_once(f"by-hand {kernel.name} {piece.name} {target.name}",
                  f"kernel {kernel.name}: its assembly {piece.name} is not used, generated code is: {error}")
        return error


def _runs_here(target: Any) -> bool:
    from ..targets.x86_64.detect import UnsupportedCPU, host

    try:
        return bool(target.features <= host().features)
    except UnsupportedCPU:
        return False


def expectation(function: Any, case: Case) -> dict[str, Expectation] | None:
    """What the tensors must hold after a case, None where its arguments are out of bounds."""
    try:
        return expect(function, case.arguments, runs=6, tile_sizes=(None, 16, 8))
    except OutOfBounds:
        return None


def expected_cases(kernel: Any, piece: Any, seed: int = 0, runs: int = QUICK_RUNS,
                   ) -> Iterator[tuple[Case, dict[str, Expectation]]]:
    """The cases that a piece is asked for, with what its kernel gives: extents at edges, then drawn at random."""
    function = kernel.tile_ir()
    drawn = cases(kernel, function, seed, runs, divisible=piece.divisible, contiguous=piece.contiguous)
    edges = boundary_cases(kernel, function, seed, piece.divisible, piece.contiguous)
    for case in chain(edges, drawn):
        if piece.flushes_denormals:
            _flush(case)
        expected = expectation(function, case)
        if expected is not None:
            yield case, expected


@dataclass(slots=True)
class Trace:
    """What interpreting a piece shows beside its results. limit: instructions that each worker may run.

    busy: workers that stored something. reached: places in the body that some worker came to. executed: instructions.
    """

    limit: int = LIMIT
    busy: set[int] = field(default_factory=set)
    reached: set[int] = field(default_factory=set)
    executed: int = 0


def verify(kernel: Any, made: Override, seed: int = 0, runs: int = QUICK_RUNS, interpreted: bool = False,
           known: Iterable[tuple[Case, dict[str, Expectation]]] | None = None, trace: Trace | None = None) -> int:
    """Compare a piece with its kernel; how many cases it got right. Raises AssemblyError ("result", or what it did).

    interpreted: from the meanings of its rows (any CPU); else the code in a guarded child on this CPU. known: the
    expected cases, where they were worked out before; seed and runs are not used then. trace: filled where it is
    interpreted.
    """
    signature = signature_of(kernel)
    passed = 0
    for case, expected in expected_cases(kernel, made.piece, seed, runs) if known is None else known:
        given = copies_of(case.arguments, past=_APART_BYTES)
        binding = signature.bind(tuple(given.values()))
        try:
            results = (_interpret(made, signature, binding, given, trace or Trace()) if interpreted
                       else _run(made, signature, binding, given))
            for placement, outputs in results:
                _compare(made, case, expected, outputs, placement)
        except AssemblyError as error:
            error.found += f" (with {case.label})"
            raise
        passed += 1
    return passed


_TIMES_AS_LONG = 8
"""A planted error that makes a piece run so many times as many instructions is found: it may never end."""


Trial = tuple[tuple[Case, dict[str, Expectation]], Trace]
"""A case, what the kernel gives for it, and how a piece that is right does it."""


def trials_of(kernel: Any, made: Override, known: Iterable[tuple[Case, dict[str, Expectation]]]) -> list[Trial]:
    """Interpret a piece on each case, the shortest runs first. Raises AssemblyError where it is wrong."""
    trials = []
    for each in known:
        trace = Trace()
        verify(kernel, made, interpreted=True, known=[each], trace=trace)
        trials.append((each, trace))
    return sorted(trials, key=lambda trial: trial[1].executed)


def survivors(kernel: Any, made: Override, target: Any, chosen: Iterable[Mutant], trials: list[Trial],
              on_each: Callable[[Mutant, bool], None] = lambda mutant, lives: None) -> list[Mutant]:
    """The planted errors that neither the static checks nor the interpreter of rows finds; there should be none.

    A slip in how the work is shared can leave all of it to one worker, with right results: it is found where other
    workers store than those of the piece. chosen: of `mutants(made.assembly)`. on_each: told each mutant and whether
    it lives.
    """
    alive = []
    for mutant in chosen:
        lives = not _is_found(kernel, made, target, mutant, trials)
        on_each(mutant, lives)
        if lives:
            alive.append(mutant)
    return alive


def _is_found(kernel: Any, made: Override, target: Any, mutant: Mutant, trials: list[Trial]) -> bool:
    """Whether a check finds a planted error. Where the piece never came to its place, the mutant does the same."""
    assert isinstance(mutant.assembly, KernelAssembly)
    try:
        check_static(mutant.assembly, target)
        wrong = Override(made.piece, mutant.assembly, mutant.assembly.machine(), made.finished, made.compiled)
        for known, of_piece in trials:
            if mutant.place in of_piece.reached:
                trace = Trace(_TIMES_AS_LONG * of_piece.executed)
                verify(kernel, wrong, interpreted=True, known=[known], trace=trace)
                if trace.busy != of_piece.busy:
                    return True
    except AssemblyError:
        return True
    return False


def prove_exhaustively(kernel: Any, step: int = 1) -> int:
    """Run a kernel `(x, y)` over one dimension, y[n] a function of the 32 bits of x[n], on all of them, by hand and as
    generated, on this CPU; how many values were compared. Raises AssemblyError at the first that differs.

    step: take each so many-th value only. Where it is 1, and the generated code is the meaning in integer arithmetic,
    this is a proof, of the code itself and not of what its rows mean (proofs.py).
    """
    from ..codegen.pipeline import compile_kernel
    from .dtypes import numpy_dtype
    from .entries import ALONE, Entry
    from .launch import configuration
    from .loader import load

    chosen = configuration().find_target(None)
    (source, source_type), (result, result_type) = kernel.parameters
    if source_type.dtype.bits != 32 or len(source_type.dims) != 1 or len(result_type.dims) != 1:
        raise ValueError(f"{kernel.name}: found {source}: {source_type}, {result}: {result_type}; expected one vector "
                         "of 32-bit elements and one result")
    facts: dict[str, Any] = {
        "static_dims": {}, "unit_strides": {source: "contiguous", result: "contiguous"},
        "dim_classes": {source_type.dims[0]: (2**31 - 1, 64)}, "target": chosen, "schedule": Schedule(),
    }
    signature = signature_of(kernel)
    found = []
    for by_hand in (True, False):
        made = compile_kernel(kernel, by_hand=by_hand, **facts)
        if by_hand and not made.pieces:
            raise ValueError(f"{kernel.name}: found no piece by hand in it; expected one that {chosen.name} takes")
        found.append((CompiledKernel.of(kernel.name, made), load(made.code)))
    outputs = [numpy.zeros(_VALUES_AT_ONCE, numpy_dtype(result_type.dtype)) for _ in range(2)]
    every = range(0, 1 << 32, step)
    for begin in range(0, len(every), _VALUES_AT_ONCE):
        part = every[begin:begin + _VALUES_AT_ONCE]
        words = numpy.arange(part.start, part.stop, step, dtype=numpy.int64).astype(numpy.uint32)
        values = words.view(numpy_dtype(source_type.dtype))
        outputs = [output[:len(values)] for output in outputs]
        for (compiled, code), output in zip(found, outputs, strict=True):
            binding = signature.bind((values, output))
            entry = Entry(signature, compiled, code, binding, ALONE)
            view, _, _, address = entry.block()
            entry.run(view, address)
        bits = [output.view(numpy.uint32 if output.itemsize == 4 else numpy.uint8) for output in outputs]
        if not numpy.array_equal(bits[0], bits[1]):
            at = int(numpy.flatnonzero(bits[0] != bits[1])[0])
            raise AssemblyError("result", f"{kernel.name} by hand differs from what it means", None,
                                f"{outputs[0][at]!r} for the input {part[at]:#x}", repr(outputs[1][at]))
    return len(every)


def _flush(case: Case) -> None:
    """Zeros in place of denormal inputs: a piece that flushes them is only asked for what is left."""
    for value in case.arguments.values():
        if isinstance(value, numpy.ndarray) and value.dtype.kind not in "iub":
            value[numpy.abs(value.astype(numpy.float64)) < _LEAST_NORMAL] = 0


def _compare(made: Override, case: Case, expected: Mapping[str, Expectation], outputs: Mapping[str, Any],
             note: str) -> None:
    if made.piece.flushes_denormals:  # each step may lose what lies below the least normal number
        expected = {n: replace(e, bound=e.bound + _STEPS_THAT_FLUSH * _LEAST_NORMAL) for n, e in expected.items()}
    wrong = [text for name, e in expected.items() if name in outputs and (text := e.mismatch(outputs[name]))]
    if wrong:
        raise AssemblyError("result", f"{made.piece.name} does not compute what {made.compiled.name} does",
                            _where(made), "; ".join(wrong) + note, "the kernel's results within rounding",
                            "see which lanes are wrong, and run it under the interpreter of rows")


def _where(made: Override) -> Any:
    return next((i.location for i in made.source.body if isinstance(i, Instruction) and i.location is not None), None)


def _run(made: Override, signature: Signature, binding: Binding,
         given: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """given: what is bound; it is left as it is, but where the run crashes."""
    from .guarded import APART, PLACEMENTS, run_compiled_guarded

    found = []
    kernel = CompiledKernel.of(made.compiled.name, made.compiled)
    for run in run_compiled_guarded(signature, kernel, binding, threads=2 if kernel.counters else 1,
                                    placements=(*PLACEMENTS, APART)):
        place = (f"{_APART_BYTES} bytes past the start" if run.placement == APART
                 else f"flush to the {run.placement}")
        if run.crash is not None:
            _interpret(made, signature, binding, given, Trace())  # mostly it says more: the line, and what was asked
            raise AssemblyError("footprint", f"{made.piece.name} crashes", _at(made, run.crash.code_offset),
                                f"{run.crash} (buffers {place} of their pages)")
        found.append((f" (buffers {place} of their pages)", run.outputs))
    return found


def _at(made: Override, code_offset: int | None) -> Any:
    """The author's line of the instruction at an offset of the code; the first that has one where that is not known."""
    lines = made.compiled.made.line_table
    at = bisect.bisect_right(lines, code_offset, key=lambda line: line[0]) if code_offset is not None else 0
    return lines[at - 1][1] if at else _where(made)


def _merged(stores: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """(first byte, one past the last) of each stretch that the stores cover."""
    found: list[tuple[int, int]] = []
    for start, size in sorted(set(stores)):
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], start + size)
        else:
            found.append((start, start + size))
    return found


def _interpret(made: Override, signature: Signature, binding: Binding,
               given: Mapping[str, Any], trace: Trace) -> list[tuple[str, dict[str, Any]]]:
    from ..lane.memory import Memory

    memory = Memory()
    for name, value in given.items():
        if isinstance(value, numpy.ndarray):
            value.flags.writeable = name in made.compiled.stored
            memory.add_array(name, value)
    run_workers(made, signature, binding, memory, trace)
    return [(" (interpreted)", {name: given[name] for name in made.compiled.stored})]


def run_workers(made: Override, signature: Signature, binding: Binding, memory: Any, trace: Trace) -> None:
    """All workers of a piece, one after another, from the meanings of its rows. memory: has the tensors; it gets
    scratch memory and the argument block. Raises AssemblyError, also where two workers write the same byte."""
    compiled = made.compiled
    workers = 2 if compiled.counters else 1
    each = max(64, scratch_bytes(compiled.scratch, binding.dims))
    scratch = memory.allocate("scratch", each * workers)
    memory.find(scratch, each * workers, True)[:] = _DIRT
    words = numpy.array([scratch, each, 0, *(int(w) for w in fill_words(signature, compiled.slots, binding))],
                        numpy.int64)
    words.flags.writeable = False
    block = memory.add_array("the argument block", words)
    table = made.assembly.table
    written = []
    for worker in range(workers):
        registers = {Register(*table.ARGUMENTS[i]): value for i, value in enumerate((block, worker, workers))}
        emulator = Emulator(table, memory, registers)
        emulator.run(made.source, trace.limit)
        trace.executed += emulator.executed
        trace.reached |= emulator.reached
        written.append(_merged(emulator.written))
        if any(not scratch <= address < scratch + each * workers for address, _ in emulator.written):
            trace.busy.add(worker)
    for start, end in written[0] if workers > 1 else ():
        if any(first < end and start < last for first, last in written[1]):
            raise AssemblyError("result", f"{made.piece.name}: two workers write the same memory", _where(made),
                                f"{end - start} bytes at {start:#x}", "each byte written by one worker")
