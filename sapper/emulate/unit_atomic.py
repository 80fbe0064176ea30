"""Atomic operations on memory: atom, red.

Enters: addresses and values of lanes. Leaves: memory, and the old values. Holds: lanes that meet at one address come
one after another, in the order of their numbers. Source: PTX ISA, "atom", "red".
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..targets.ptx import meaning
from ..targets.ptx.rows import BITS
from . import parse
from .machine import Lanes, Machine, Run, Wait, as_type, to_register
from .unit_memory import Access, address_reader, load_from, space_of, store_to, synchronisation
from .units import unit

Array = NDArray[Any]


def combine(op: str, type: str, old: Array, value: Array, flushes: bool = False) -> Array:
    """What an atomic operation leaves where `old` was."""
    with np.errstate(all="ignore"):
        if op == "add":
            if type in ("f16", "bf16", "f16x2", "bf16x2"):
                total = old.astype(np.float32) + value.astype(np.float32)
                return np.asarray(total.astype(old.dtype))
            if flushes and type == "f32":
                return meaning.flush(meaning.flush(old) + meaning.flush(value))
            return old + value
        if op == "inc":
            return np.asarray(np.where(old >= value, old.dtype.type(0), old + old.dtype.type(1)))
        if op == "dec":
            return np.where((old == 0) | (old > value), value, old - old.dtype.type(1))
        if op == "exch":
            return value
        function: Any = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "min": np.minimum,
                         "max": np.maximum}[op]
        return np.asarray(function(old, value))


@unit("atomic")
def _atomic(machine: Machine, instruction: parse.Instruction) -> Run:
    form = instruction.form
    returns = form.row.opcode == "atom"
    operands = list(instruction.operands)
    target = operands.pop(0) if returns else None
    address, value, *rest = operands
    type = form.get("type", "b16")
    op = form.get("op") or ("cas" if "cas" in form else "add")
    items = value.items if isinstance(value, parse.Vector) else (value,)
    sources = [machine.reader(item, type) for item in items]
    other = machine.reader(rest[0], type) if op == "cas" else None
    size = BITS[type] // 8
    scope = form.get("scope") or "gpu"
    access = Access(machine, instruction.text, instruction.line, size, len(items), scope=scope)
    space = space_of(form.get("space") or ("global" if "global" in form else ""))
    read_address = address_reader(machine, address)
    targets = target.items if isinstance(target, parse.Vector) else (target,)
    writers = [machine.writer(item, type) for item in targets] if returns else []
    sem = form.get("sem", "relaxed")
    raw = np.dtype(f"u{size}")

    def run(lanes: Lanes) -> Wait | None:
        every, where = machine.lanes_of(lanes), read_address(lanes)
        values = [read(lanes) for read in sources]
        swap = other(lanes) if other is not None else None
        known = synchronisation(machine)
        olds = [np.zeros(len(every), raw) for _ in items]
        for place in _rounds(where):
            part = lanes if len(place) == len(every) else every[place]
            # One after the other, as the values: a later one acquires what an earlier one of this step released.
            if returns:
                known.observe(part, space, where[place], sem in ("acquire", "acq_rel"), scope)
            known.publish(part, space, where[place], sem in ("release", "acq_rel"), scope)
            stored = load_from(access, space, part, where[place], "observe")
            after = []
            for number, bits in enumerate(stored):
                olds[number][place] = bits
                old, new = as_type(bits, type), values[number][place]
                if swap is not None:
                    result = np.where(old == new, swap[place], old)
                else:
                    result = combine(op, type, old, new, flushes=space != "shared")
                after.append(to_register(result, raw, False))
            store_to(access, space, part, where[place], np.stack(after), "atomic")
        for write, bits in zip(writers, olds, strict=returns):
            if write is not None:
                write(lanes, bits)
        machine.happened()
        return None

    return run


def _rounds(address: Array) -> list[Array]:
    """Positions of lanes in rounds, in each of which every address comes once."""
    order = np.argsort(address, kind="stable")
    ordered = address[order]
    first = np.concatenate([[True], ordered[1:] != ordered[:-1]])
    if first.all():
        return [np.arange(len(address))]
    starts = np.flatnonzero(first)
    rank = np.arange(len(address)) - np.repeat(starts, np.diff([*starts, len(address)]))
    return [np.sort(order[rank == number]) for number in range(int(rank.max()) + 1)]
