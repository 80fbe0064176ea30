"""What assembly by hand for a warp does to rows of lanes, from the meanings of its instructions.

Enters: a `WarpAssembly` without jumps and memory, what its registers hold: a bit pattern for each lane, or one of which
nothing is known (symbolic.py). Leaves: the same after it. Holds: approximate results are as far off as the manual
allows; what is not one warp's own registers (jumps, memory, other warps) is refused at its line. Of what is not known,
arithmetic on floats is one call of a function for each lane, its row's meaning; all else is followed bit by bit.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from math import prod
from typing import Any

import numpy as np

from ..codegen.machine import Immediate, Instruction, Label
from . import terms
from .errors import AssemblyError
from .symbolic import Lanes, NotSymbolic, as_lanes, lanes_of
from .warp import WarpAssembly

WARP = "warp"
"""The unit of instructions that see the registers of all lanes of a warp."""
ALL_LANES = 0xFFFFFFFF
_WORDS = {1: np.bool_, 16: np.uint16, 32: np.uint32, 64: np.uint64}


def run_rows(assembly: WarpAssembly, held: dict[Any, Any], lanes: int) -> None:
    """Run all instructions on `held`, in place. Raises AssemblyError, and NotSymbolic where a step needs a value that
    is not known."""
    random = np.random.default_rng(0)
    for item in assembly.body:
        if not isinstance(item, Instruction) or item.row.row.meaning is None or item.row.row.unit not in ("", WARP):
            what = item.name if isinstance(item, Label) else item.row.mnemonic
            raise AssemblyError("notation", f"{what} is not interpreted in a block on rows",
                                getattr(item, "location", None), what, "instructions on a warp's own registers")
        _step(assembly.table, item, held, lanes, random)


def _step(table: Any, item: Instruction, held: dict[Any, Any], lanes: int, random: Any) -> None:
    form = item.row
    specs = table.operands_of(form, len(item.operands))
    sources = [[_word(item, spec, part, held, lanes) for part in
                (operand if isinstance(operand, tuple) else (operand,))]
               for spec, operand in zip(specs, item.operands, strict=False) if spec.reads or spec.role == "i"]
    if form.row.opcode in table.MEMBERS:
        _check_members(item, sources[-1][0])
    targets = [o for spec, o in zip(specs, item.operands, strict=False) if spec.writes]
    unknown = any(isinstance(word, Lanes) for words in sources for word in words)
    if unknown:
        results = _followed(table, item, specs, sources, lanes)
    else:
        with np.errstate(all="ignore"):  # infinities and NaNs are results like others
            results = _meant(table, form, specs, sources, lanes)
    for operand, value in zip(targets, results, strict=False):
        if not unknown:
            value = _off(np.asarray(value), table.tolerance(form), random)
        for number, part in enumerate(operand if isinstance(operand, tuple) else (operand,)):
            mine = value[number] if isinstance(operand, tuple) else value
            _write(item, held, part, mine[0] if form.row.unit == WARP else mine, lanes)


def _check_members(item: Instruction, members: Any) -> None:
    """All lanes of a warp run a block on rows, and each lane that runs the instruction must be a member (PTX ISA,
    shfl.sync)."""
    named = {int(word) for word in members}
    if named != {ALL_LANES}:
        raise AssemblyError("operands", f"{item.row.mnemonic} leaves out lanes that run it", item.location,
                            ", ".join(f"{word:#x}" for word in sorted(named)), f"{ALL_LANES:#x}")


def _meant(table: Any, form: Any, specs: list[Any], sources: list[list[Any]], lanes: int) -> tuple[Any, ...]:
    """What the row's meaning gives. sources: words of each operand that is read."""
    warp = form.row.unit == WARP
    given = []
    for spec, words in zip((s for s in specs if s.reads or s.role == "i"), sources, strict=False):
        parts = [seen(table, spec.type, word) for word in words]
        if warp:
            parts = [part.reshape(1, *part.shape) for part in parts]
        given.append(np.stack(parts) if spec.count else parts[0])
    results = form.row.meaning(form, np.ones((1, lanes), np.bool_), *given) if warp else form.row.meaning(form, *given)
    return results if isinstance(results, tuple) else (results,)


def _followed(table: Any, item: Instruction, specs: list[Any], sources: list[list[Any]], lanes: int,
              ) -> tuple[Any, ...]:
    """The same where not all is known."""
    form = item.row
    if table.tolerance(form):
        raise NotSymbolic(f"{form.mnemonic}: it is only approximate")
    if table.is_arithmetic_on_floats(form):
        bits = [table.bits_of(spec.type) for spec in specs if spec.reads or spec.role == "i"]
        (result,) = (table.bits_of(spec.type) for spec in specs if spec.writes)
        return (_called(table, form, bits, result, [words[0] for words in sources], lanes),)
    try:
        return _meant(table, form, specs, sources, lanes)
    except NotSymbolic as error:
        raise NotSymbolic(f"{form.mnemonic}: {error}") from None


def _called(table: Any, form: Any, bits: list[int], result: int, sources: list[Any], lanes: int) -> Lanes:
    """A function on the words of each lane, by the name of the instruction; of conversions one that says that nothing
    is left to how sums are rounded."""
    name = f"cast {form.mnemonic}" if form.row.opcode == "cvt" else form.mnemonic
    words = [as_lanes(source).terms() for source in sources]
    made = [terms.call(name, _on_words(table, form), tuple(np.dtype(_WORDS[n]).name for n in bits),
                       np.dtype(_WORDS[result]).name, *each) for each in zip(*words, strict=True)]
    return lanes_of(made, _WORDS[result])


@cache
def _on_words(table: Any, form: Any) -> Callable[..., Any]:
    """A form's meaning on arrays of words, and giving one."""
    def function(*words: Any) -> Any:
        made = np.asarray(_meant(table, form, list(form.operands), [[word] for word in words], len(words[0]))[0])
        return _as_words(np.ascontiguousarray(made), len(words[0]))

    return function


def _word(item: Instruction, spec: Any, operand: Any, held: dict[Any, Any], lanes: int) -> Any:
    """The bits of an operand in each lane."""
    if isinstance(operand, Immediate):
        bits = 64 if spec.type == "" else spec.bits
        return np.full(lanes, operand.value & ((1 << bits) - 1), _WORDS[bits])
    if operand in held:
        return held[operand]
    raise AssemblyError("undefined", f"{item.row.mnemonic} reads a register that was never written", item.location,
                        repr(operand))


def seen(table: Any, type_: str, word: Any) -> Any:
    """Words as a type sees them."""
    kind = table.ARRAYS[type_]
    return word.view(kind[0]).reshape(len(word), kind[1]) if isinstance(kind, tuple) else word.view(kind)


def _off(value: Any, tolerance: float, random: Any) -> Any:
    if not tolerance or value.dtype.kind != "f":
        return value
    with np.errstate(all="ignore"):
        moved = value * (1 + tolerance * random.choice([-1.0, 1.0], value.shape))
    return np.where(np.isfinite(moved), moved, value).astype(value.dtype)


def _as_words(made: Any, lanes: int) -> Any:
    """What a lane holds as one word."""
    if made.dtype == np.bool_:
        return made
    return made.reshape(lanes, -1).view(f"u{prod(made.shape[1:], start=made.itemsize)}").reshape(lanes)


def _write(item: Instruction, held: dict[Any, Any], operand: Any, made: Any, lanes: int) -> None:
    words = _as_words(made if isinstance(made, Lanes) else np.ascontiguousarray(made), lanes)
    if item.mask is not None:
        before = held.get(operand)
        if before is None:
            raise AssemblyError("undefined", f"{item.row.mnemonic} writes some lanes of what holds nothing",
                                item.location, repr(operand))
        words = np.where(held[item.mask], words.view(before.dtype), before)
    held[operand] = words
