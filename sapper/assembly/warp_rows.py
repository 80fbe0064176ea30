"""What assembly by hand for a warp does to rows of lanes, from the meanings of its instructions.

Enters: a `WarpAssembly` without jumps and memory, what its registers hold, a bit pattern for each lane. Leaves: the
same after it. Holds: approximate results are as far off as the manual allows; what is not one warp's own registers
(jumps, memory, other warps) is refused at its line.
"""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np

from ..codegen.machine import Immediate, Instruction, Label
from .errors import AssemblyError
from .warp import WarpAssembly

WARP = "warp"
"""The unit of instructions that see the registers of all lanes of a warp."""
_WORDS = {1: np.bool_, 16: np.uint16, 32: np.uint32, 64: np.uint64}


def run_rows(assembly: WarpAssembly, held: dict[Any, Any], lanes: int) -> None:
    """Run all instructions on `held`, in place. Raises AssemblyError."""
    random = np.random.default_rng(0)
    for item in assembly.body:
        if not isinstance(item, Instruction) or item.row.row.meaning is None or item.row.row.unit not in ("", WARP):
            what = item.name if isinstance(item, Label) else item.row.mnemonic
            raise AssemblyError("notation", f"{what} is not interpreted in a block on rows",
                                getattr(item, "location", None), what, "instructions on a warp's own registers")
        _step(assembly.table, item, held, lanes, random)


def _step(table: Any, item: Instruction, held: dict[Any, Any], lanes: int, random: Any) -> None:
    form, warp = item.row, item.row.row.unit == WARP
    specs = table.operands_of(form, len(item.operands))
    sources = []
    for spec, operand in zip(specs, item.operands, strict=False):
        if not spec.reads and spec.role != "i":
            continue
        parts = [_source(table, item, spec, part, held, lanes) for part in
                 (operand if isinstance(operand, tuple) else (operand,))]
        if warp:
            parts = [part.reshape(1, *part.shape) for part in parts]
        sources.append(np.stack(parts) if isinstance(operand, tuple) else parts[0])
    with np.errstate(all="ignore"):  # infinities and NaNs are results like others
        results = form.row.meaning(form, np.ones((1, lanes), np.bool_), *sources) if warp \
            else form.row.meaning(form, *sources)
    tolerance = table.tolerance(form)
    targets = [o for spec, o in zip(specs, item.operands, strict=False) if spec.writes]
    for operand, value in zip(targets, results if isinstance(results, tuple) else (results,), strict=False):
        value = np.asarray(value)
        if tolerance and value.dtype.kind == "f":
            with np.errstate(all="ignore"):
                off = value * (1 + tolerance * random.choice([-1.0, 1.0], value.shape))
            value = np.where(np.isfinite(off), off, value).astype(value.dtype)
        for number, part in enumerate(operand if isinstance(operand, tuple) else (operand,)):
            mine = value[number] if isinstance(operand, tuple) else value
            _write(item, held, part, np.ascontiguousarray(mine[0] if warp else mine), lanes)


def _source(table: Any, item: Instruction, spec: Any, operand: Any, held: dict[Any, Any], lanes: int) -> Any:
    """An operand as its type sees it."""
    seen = table.ARRAYS[spec.type]
    if isinstance(operand, Immediate):
        bits = table.bits_of(spec.type)
        raw: Any = np.full(lanes, operand.value & ((1 << bits) - 1), _WORDS[bits])
    elif operand in held:
        raw = held[operand]
    else:
        raise AssemblyError("undefined", f"{item.row.mnemonic} reads a register that was never written",
                            item.location, repr(operand))
    if isinstance(seen, tuple):
        return raw.view(seen[0]).reshape(len(raw), seen[1])
    return raw.view(seen)


def _write(item: Instruction, held: dict[Any, Any], operand: Any, made: Any, lanes: int) -> None:
    if item.mask is not None:
        before = held.get(operand)
        if before is None:
            raise AssemblyError("undefined", f"{item.row.mnemonic} writes some lanes of what holds nothing",
                                item.location, repr(operand))
        bits = made.reshape(lanes, -1).view(before.dtype).reshape(lanes)
        made = np.where(held[item.mask].view(np.bool_), bits, before)
    held[operand] = made.reshape(lanes, -1).view(f"u{prod(made.shape[1:], start=made.itemsize)}") \
        .reshape(lanes) if made.dtype != np.bool_ else made
