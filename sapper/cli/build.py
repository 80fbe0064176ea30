"""`sapper build`: kernels as a library for C.

Enters: kernels, a target, what the calls are expected to be. Leaves: files, and what was made. Holds: assembly by hand
is in the library where it passed its trial, for the calls that it is for; what is not used is told with the reason.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .code import FAILED, SCHEDULED, Piece, blocks_named, generated_code
from .errors import UsageError
from .files import write_files
from .kernels import compiled_in, find_kernels, find_target, kernel_dims, parse_dims, parse_schedule

SUFFIXES = {".so": "a shared library", ".o": "an object file", ".s": "assembly for GNU as"}


def run_build(
    wanted: list[str], output: str, target_name: str | None, static: str | None, dims: str | None,
    schedule: str | None, fallback: bool, scratch_mib: int, header: str | None,
) -> dict[str, Any]:
    """Build a library and its header. Returns what was made: files, functions, bytes."""
    from ..codegen.library import c_kernel, make_library

    path = Path(output)
    if path.suffix not in SUFFIXES:
        kinds = ", ".join(f"{suffix} ({what})" for suffix, what in SUFFIXES.items())
        none = "" if path.suffix else f"; an executable is made of a model, and {wanted[0]} is none"
        raise UsageError(f"-o {output}: found the ending {path.suffix!r}; expected one of {kinds}{none}")
    header_path = Path(header) if header else path.with_suffix(".h")
    if header_path == path:
        raise UsageError(f"--header {header}: found the name of the library itself; expected another")
    target = find_target(target_name)
    if target.assembler_allocates:
        raise UsageError(f"--target {target.name}: found a target whose own assembler makes the code; expected a CPU, "
                         f"whose bytes are made here; mend: `sapper asm --target {target.name}` prints the text")
    chosen = parse_schedule(schedule)
    kernels = [found.kernel for name in wanted for found in find_kernels(name)]
    given_extents = extents(kernels, static, "static"), extents(kernels, dims, "dims")
    from ..runtime.specialise import dim_class

    made, told = [], []
    for kernel in kernels:
        own = kernel_dims(kernel)
        fixed, free = compiled_in(kernel, *({d: n for d, n in given.items() if d in own} for given in given_extents))
        classes = {d: dim_class(n) for d, n in free.items() if d not in fixed}
        hand = _by_hand(kernel, target, chosen, fixed, classes, fallback)
        pieces = _pieces_pass(kernel, target, chosen, hand.not_by_hand)
        made.append(c_kernel(kernel, target, chosen, fixed, classes, fallback, hand.forms, pieces))
        told.append({"by_hand": hand.by_hand, "not_by_hand": hand.not_by_hand})
    library = make_library(made, target, scratch_mib << 20)
    name = path.stem
    if path.suffix == ".so":
        content = library.so(path.name)
    else:
        content = library.o() if path.suffix == ".o" else library.s().encode()
    write_files({path: content, header_path: library.h(name.removeprefix("lib")).encode()})
    functions = [{"name": k.name, "forms": [v.symbol for v in k.variants],
                  "code_bytes": sum(v.code.code_bytes for v in k.variants)} | more
                 for k, more in zip(made, told, strict=True)]
    return {"output": str(path), "header": str(header_path), "target": target.name, "size_bytes": len(content),
            "functions": functions}


@dataclass(slots=True)
class _Hand:
    """forms: of a kernel by hand. by_hand: for each what it is. not_by_hand: pieces that are not used, with reasons."""

    forms: list[Any] = field(default_factory=list)
    by_hand: dict[str, str] = field(default_factory=dict)
    not_by_hand: dict[str, str] = field(default_factory=dict)


def _by_hand(kernel: Any, target: Any, schedule: Any, static: dict[str, int], classes: dict[str, tuple[int, int]],
             fallback: bool) -> _Hand:
    """The kernels by hand that a library takes: each for all calls that its conditions admit; without a fallback, the
    first that admits all calls of the special form, for these."""
    from ..assembly.errors import AssemblyError
    from ..codegen.library import Form
    from ..runtime.by_hand import judged

    hand = _Hand()
    tensors = {name: type for name, type in kernel.parameters if hasattr(type, "dims")}
    contiguous: dict[str, Any] = dict.fromkeys(tensors, "contiguous")
    for piece in kernel.by_hand:
        if fallback:
            # A library tests extents for multiples of powers of two; others have to be compiled in.
            fixed = {d: static[d] for d, n in piece.divisible.items() if n & (n - 1) and d in static}
            divisors = {d: n for d, n in piece.divisible.items() if not n & (n - 1)}
            strides = {name: "contiguous" if name in piece.contiguous else (False,) * len(type.dims)
                       for name, type in tensors.items()}
        else:
            fixed, divisors, strides = static, {d: divisor for d, (_, divisor) in classes.items()}, contiguous
        reason = SCHEDULED if schedule is not None else piece.refusal(
            target, fixed, strides, {d: (0, n) for d, n in divisors.items()})
        if not reason:
            found = judged(kernel, piece, target)
            if isinstance(found, AssemblyError):
                reason = " ".join(str(found).split())
            elif fallback or not hand.forms:
                label = f"by_hand{len(hand.forms) + 1}"
                hand.forms.append(Form(label, found.compiled, fixed, divisors, strides))
                calls = piece.calls() if fallback else ""
                hand.by_hand[label] = str(Piece(piece.name, "kernel", tuple(sorted(piece.features)), calls))
            else:
                reason = "another one by hand takes all calls"
        if reason:
            hand.not_by_hand[piece.name] = reason
    return hand


def _pieces_pass(kernel: Any, target: Any, schedule: Any, not_by_hand: dict[str, str]) -> bool:
    """Whether the instructions and blocks by hand in the generated code pass their trial; True where there are none."""
    from ..runtime.by_hand import trusted

    if not blocks_named(schedule) and not any(op.name == "asm" for op in kernel.tile_ir().walk()):
        return True
    code = generated_code(kernel, target, schedule)
    not_by_hand |= code.refused
    if not code.pieces or trusted(kernel, target, schedule):
        return True
    not_by_hand |= {piece.name: FAILED for piece in code.pieces}
    return False


def extents(kernels: list[Any], text: str | None, option: str) -> dict[str, int]:
    """`M=512,N=64`, where each name is a dimension of some kernel of the library. Raises UsageError."""
    if not text:
        return {}
    names = {part.partition("=")[0] for part in text.replace(",", " ").split()}
    known = dict.fromkeys(d for kernel in kernels for d in kernel_dims(kernel))
    for name in sorted(names - set(known)):
        expected = ", ".join(known) or "none"
        raise UsageError(f"--{option}: found {name!r}; expected dimensions of the kernels: {expected}")
    result: dict[str, int] = {}
    for kernel in kernels:
        own = [part for part in text.replace(",", " ").split() if part.partition("=")[0] in kernel_dims(kernel)]
        result |= parse_dims(",".join(own), kernel, option)
    return result


def report(made: dict[str, Any]) -> str:
    """What was made, for people."""
    lines = []
    for function in made["functions"]:
        forms = ", ".join(name.rpartition(".")[2] for name in function["forms"])
        lines.append(f"{function['name']}: {len(function['forms'])} forms ({forms}), {function['code_bytes']} bytes")
        lines += [f"{function['name']}: {form} is by hand: {piece}" for form, piece in function["by_hand"].items()]
        lines += [f"{function['name']}: {piece} is not used: {why}" for piece, why in function["not_by_hand"].items()]
    lines.append(f"{made['output']}: {made['size_bytes']} bytes for {made['target']}; declared in {made['header']}")
    return "\n".join(lines)
