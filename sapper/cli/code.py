"""Which code a kernel has on a target: by hand or generated, for which calls, and why not by hand.

Enters: a kernel, a target, what is known of the calls. Leaves: `Code`. Holds: every target can be asked for; a piece by
hand is taken as a call would take it (runtime/by_hand.py). The trial on cases, which the first call makes, is left out
unless it is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .kernels import aligned_on, specialise

SCHEDULED = "a schedule asks for generated code"
FAILED = "it failed its trial"


@dataclass(frozen=True, slots=True)
class Piece:
    """Assembly by hand in some code.

    kind: "kernel", the whole of it; "rows", an instruction or block in generated code; "loop", the inner loop of a
    contraction there. features: that the author declares it needs. calls: those for which it is used, "" for all.
    """

    name: str
    kind: str
    features: tuple[str, ...]
    calls: str = ""

    def __str__(self) -> str:
        needs = f" ({' '.join(self.features)})" if self.features else ""
        return f"{self.name}{needs}" + (f", for calls with {self.calls}; else generated" if self.calls else "")


@dataclass(slots=True)
class Code:
    """compiled: the code. pieces: by hand in it. refused: pieces that are not in it, with the reasons."""

    compiled: Any
    pieces: list[Piece] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)


def code_for(kernel: Any, target: Any, schedule: Any, static: dict[str, int], dims: dict[str, int],
             tried: bool = False) -> Code:
    """The code for calls with contiguous tensors; extents that are not given are what a piece by hand asks for.

    static: extents compiled in. dims: extents of the call, as far as given. tried: what is by hand has to pass its
    trial, too: on this CPU, by the interpreter of rows, or by the emulator. Raises what `compile_kernel` does.
    """
    from ..assembly.errors import AssemblyError
    from ..codegen.pipeline import compile_kernel
    from ..runtime.by_hand import judged, trusted

    facts = specialise(kernel, static, dims)
    refused: dict[str, str] = {}
    for piece in kernel.by_hand:
        classes = {d: (bound, divisor if d in dims else piece.divisible.get(d, 1))
                   for d, (bound, divisor) in facts["dim_classes"].items()}
        reason = SCHEDULED if schedule is not None else piece.refusal(target, **facts | {"dim_classes": classes})
        if not reason:
            made = judged(kernel, piece, target) if tried else _compiled(kernel, piece, target)
            if isinstance(made, AssemblyError):
                reason = " ".join(str(made).split())
            else:
                whole = Piece(piece.name, "kernel", tuple(sorted(piece.features)), piece.calls())
                return Code(made.compiled, [whole], refused)
        refused[piece.name] = reason
    rest = generated_code(kernel, target, schedule, static, dims)
    refused |= rest.refused
    if tried and rest.pieces and not trusted(kernel, target, schedule):
        refused |= {piece.name: FAILED for piece in rest.pieces}
        return Code(compile_kernel(kernel, target=target, schedule=schedule, by_hand=False, **facts,
                                   aligned=aligned_on(target, kernel, {**static, **dims})), [], refused)
    return Code(rest.compiled, rest.pieces, refused)


def _compiled(kernel: Any, piece: Any, target: Any) -> Any:
    """The code of a kernel by hand that passed its static checks, or the error."""
    from ..assembly.errors import AssemblyError
    from ..assembly.override import compile_by_hand

    try:
        return compile_by_hand(kernel, piece, target)
    except AssemblyError as error:
        return error


def generated_code(kernel: Any, target: Any, schedule: Any, static: dict[str, int] | None = None,
                   dims: dict[str, int] | None = None) -> Code:
    """The same where no whole kernel by hand is taken; instructions and blocks by hand may be in it."""
    from ..assembly.errors import AssemblyError
    from ..codegen.pipeline import compile_kernel
    from ..lang.by_hand import bare_name

    facts = specialise(kernel, static or {}, dims or {})
    facts["aligned"] = aligned_on(target, kernel, {**(static or {}), **(dims or {})})
    try:
        compiled = compile_kernel(kernel, target=target, schedule=schedule, **facts)
    except AssemblyError as error:
        reason = " ".join(str(error).split())
        compiled = compile_kernel(kernel, target=target, schedule=schedule, by_hand=False, **facts)
        return Code(compiled, [], dict.fromkeys(map(bare_name, blocks_named(schedule)), reason) or {"asm": reason})
    reasons = {key.partition(":")[2]: reason for key, reason in compiled.refused}
    refused = {name: reasons.get(name, f"{target.name} has no form of it, or the kernel no op that it implements")
               for name in map(bare_name, blocks_named(schedule))
               if f"{target.family}:{name}" not in compiled.pieces}
    return Code(compiled, _rows(compiled), refused)


def code_that_ran(code: Code, compiled: Any) -> Code:
    """The same of the code that a call ran: what `code_for` found in it, unless it is other code."""
    whole = [piece for piece in code.pieces if piece.kind == "kernel"]
    if whole and compiled.code == code.compiled.code:
        return Code(compiled, code.pieces, code.refused)
    refused = {piece.name: f"the call is none with {piece.calls}, or it failed its trial" for piece in whole}
    return Code(compiled, _rows(compiled), code.refused | refused)


def _rows(compiled: Any) -> list[Piece]:
    from ..lang.by_hand import CONTRACTIONS, piece_of

    found = []
    for key in compiled.pieces:
        piece = piece_of(key)
        kind = "loop" if key in CONTRACTIONS else "rows"
        found.append(Piece(piece.name, kind, tuple(sorted(piece.features))))
    return found


def blocks_named(schedule: Any) -> tuple[str, ...]:
    """The blocks that a schedule names."""
    if isinstance(schedule, Mapping):
        return tuple(schedule.get("assembly", ()))
    return () if schedule is None else tuple(schedule.assembly)
