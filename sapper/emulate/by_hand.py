"""Whether a kernel written by hand for a GPU may stand for a kernel: run by the emulator and compared with it.

Enters: a kernel, the code of one of its pieces by hand, a target. Leaves: nothing, or AssemblyError. Holds: what passes
gave the kernel's results on random and hostile values and ragged extents, without a race, an access outside its
tensors, or threads that part where they must be together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from typing import Any

from ..assembly.errors import AssemblyError
from ..assembly.override import Override
from ..codegen.machine import Instruction
from ..ir.extents import names_of
from ..runtime.by_hand import expectation, expected_cases
from ..runtime.cases import Case, copies_of, shaped_cases
from ..targets.ptx.text import item_texts
from ..tile.rounding import Expectation
from .errors import DeadlockError, EmulationError, MemoryFault, RaceError

QUICK_RUNS = 6
WORKERS = 5
"""Warps of a trial: more than one block of them, and of the last not all."""
LONG = 800
_MENDS = {"footprint": "put it under a predicate that is false beyond the end; take a vector only where its address is "
                       "a multiple of its size"}
_KINDS = {MemoryFault: "footprint", RaceError: "result", DeadlockError: "loop"}


def verify(kernel: Any, made: Override, target: Any, run: Callable[..., Any], seed: int = 0,
           runs: int = QUICK_RUNS) -> int:
    """Compare a piece with its kernel; how many cases it got right. Raises AssemblyError, at the author's line where
    the emulator knows it."""
    passed = 0
    for case, expected in chain(expected_cases(kernel, made.piece, seed, runs), _long_cases(kernel, made.piece, seed)):
        given = copies_of(case.arguments)
        try:
            run(kernel, *given.values(), target=target.name, workers=WORKERS, code=made.compiled)
        except EmulationError as error:
            kind = next((k for of, k in _KINDS.items() if isinstance(error, of)), "result")
            raise AssemblyError(kind, f"{made.piece.name} can't be run", line_of(made, error.line),
                                f"{error} (with {case.label})", "code that the emulator runs to its end",
                                _MENDS.get(kind, "")) from None
        wrong = [text for name, e in expected.items() if name in made.compiled.stored
                 and (text := e.mismatch(given[name]))]
        if wrong:
            raise AssemblyError("result", f"{made.piece.name} does not compute what {kernel.name} does", _first(made),
                                f"{'; '.join(wrong)} (with {case.label})", "the kernel's results within rounding")
        passed += 1
    return passed


def _long_cases(kernel: Any, piece: Any, seed: int) -> Iterator[tuple[Case, Mapping[str, Expectation]]]:
    """One dimension at a time so long that every warp has several rounds of 32 elements; the others hold two elements,
    or what a piece asks for."""
    function = kernel.tile_ir()
    dims = names_of(type for _, type in kernel.parameters)
    shapes = [{d: -(-(LONG if d == long else 2) // (factor := piece.divisible.get(d, 1))) * factor for d in dims}
              for long in dims]
    for case in shaped_cases(kernel, function, seed, shapes):
        if piece.contiguous and not case.label.endswith("contiguous"):
            continue
        expected = expectation(function, case)
        if expected is not None:
            yield case, expected


def line_of(made: Override, line: int) -> Any:
    """The author's place of a line of the text."""
    lines = made.compiled.text().splitlines()
    texts = item_texts(made.source)
    first = next((number for number in range(len(lines)) if _are(lines[number:], texts)), None)
    if first is None or not first < line <= first + len(texts):
        return _first(made)
    return getattr(made.source.body[line - 1 - first], "location", None) or _first(made)


def _are(lines: list[str], texts: list[str]) -> bool:
    return len(lines) >= len(texts) and all(
        line.split("//")[0].strip() == text.strip() for line, text in zip(lines, texts, strict=False))


def _first(made: Override) -> Any:
    return next((i.location for i in made.source.body if isinstance(i, Instruction) and i.location is not None), None)
