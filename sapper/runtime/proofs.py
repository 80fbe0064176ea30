"""What of a kernel's assembly by hand is shown for all inputs, and why the rest is not.

Enters: a kernel, a target, a schedule. Leaves: a `Proof` for each piece by hand that the kernel uses there. Holds:
pieces on rows are compared with their meaning in the language; kernels by hand that only move and combine bits are
compared with the tile interpreter for all values of their tensors, at extents that are given, with the indices as
drawn.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy

from ..assembly import terms
from ..assembly.errors import AssemblyError
from ..assembly.override import Override
from ..assembly.prove import Meaning, Proof, decide, known_array, meaning_in_language, pairs, prove_block
from ..assembly.symbolic import Lanes, NotSymbolic, lanes_of, unknown
from ..ir.nodes import Function, Op, Value
from ..ir.types import TensorType, TileType, bf16, f32
from ..lang.by_hand import PIECES
from ..tile import semantics
from ..tile.interpret import interpret
from ..tile.ops import place_of
from .by_hand import Trace, expectation, run_workers, signature_of, verify
from .cases import Case, boundary_cases, integer_uses

SHAPES = 2
"""Extents at which a kernel by hand is proved."""
_MOVES = frozenset({"select", "bitcast", "asm"})
"""Elementwise ops that compute nothing, whatever the dtype."""


def prove_pieces(kernel: Any, target: Any, schedule: Any = None) -> dict[str, Proof]:
    """For each piece on rows that the kernel uses on this target, by its name and its immediates."""
    found: dict[str, Proof] = {}
    function = kernel.tile_ir()
    named = set(getattr(schedule, "assembly", ()) or ())
    stored = {place_of(op.operands[0]) for op in function.walk() if op.name == "store"}
    for op in function.walk():
        for piece, immediates, types, meaning in _uses(op, named):
            *inputs, result = types
            if any(t.bits < 32 for t in types) or not piece.usable(target.family, target.features, target.lanes,
                                                                   tuple(inputs), result):
                continue
            name = " ".join([piece.name, *map(str, immediates)])
            if op.attributes.get("tolerance"):
                found[name] = Proof(None, "it has a tolerance")
                continue
            if name not in found or found[name].proved:
                keys = [_key(value, stored) for value in _inputs(op)]
                found[name] = prove_block(piece, immediates, meaning, [semantics.numpy_dtype(t) for t in inputs],
                                          target.lanes, [keys.index(key) for key in keys])
    terms.forget()
    return found


def _key(value: Value, stored: set[Value]) -> Any:
    """Equal of values that are computed alike: those that a piece gets may be one. stored: tensors that are written, so
    that two loads may differ."""
    op = value.op
    if op is None or op.blocks or len(op.results) != 1 or (op.name == "load" and place_of(op.operands[0]) in stored):
        return value
    return op.name, repr(sorted(op.attributes.items(), key=str)), *(_key(v, stored) for v in op.operands)


def _inputs(op: Op) -> list[Value]:
    """What a piece that stands for an op gets."""
    return list(op.operands[1:] if op.name == "asm" else op.operands)


def _uses(op: Op, named: set[str]) -> Iterator[tuple[Any, list[int], list[Any], Meaning]]:
    """The pieces that may stand for an op: (piece, immediates, dtypes of its rows and of its result, its meaning)."""
    if op.name not in semantics.ELEMENTWISE:
        return
    inputs = _inputs(op)
    types = [v.type.dtype for v in (*inputs, op.results[0])]  # type: ignore[union-attr]
    if op.name == "asm":
        meaning = meaning_in_language(op.operands[0], inputs)
        yield PIECES[op.attributes["by"]], op.attributes["immediates"], types, meaning
        return
    for piece in PIECES.values():
        if piece.key.partition(":")[2] in named:
            if piece.implements == op.name:
                yield piece, [], types, meaning_in_language(op.results[0], inputs)
            elif piece.implements == "to_bf16" and op.name == "cast" and types == [f32, bf16]:
                yield piece, [], [f32, f32], lambda rows: semantics.cast(semantics.cast(rows[0], bf16), f32)


def rounds(function: Function) -> str:
    """The first op of a kernel that is no matter of bits, "" where there is none."""
    for op in function.walk():
        dtypes = [v.type.dtype for v in (*op.results, *op.operands) if isinstance(v.type, TileType)]
        floats = any(d.is_float for d in dtypes)
        if op.name in ("reduce", "contract") or (floats and op.name in semantics.ELEMENTWISE - _MOVES):
            return op.name
    return ""


def prove_kernel(kernel: Any, made: Override, seed: int = 0) -> Proof:
    """A kernel by hand against its tile kernel, for all values of the tensors that it reads."""
    function = kernel.tile_ir()
    rounding = rounds(function)
    if rounding:
        return Proof(None, f"{rounding} of the kernel is more than moving bits")
    cases = [case for case in boundary_cases(kernel, function, seed, made.piece.divisible, made.piece.contiguous)
             if case.small]
    cases.sort(key=lambda case: -sum(v.size for v in case.arguments.values() if isinstance(v, numpy.ndarray)))
    labels = []
    for case in cases[:SHAPES]:
        try:
            proof = _at(kernel, function, made, case)
        except NotSymbolic as error:
            return Proof(None, str(error))
        finally:
            terms.forget()
        if not proof.proved:
            return proof
        labels.append(case.label.removeprefix("boundary "))
    return Proof(True, proof.text, f"{proof.scope} at {' and at '.join(labels)}")


class _Memory:
    """Buffers of which some bytes are not known: an address range has a `Lanes` beside it."""

    def __init__(self) -> None:
        from ..lane.memory import Memory

        self._memory = Memory()
        self._hidden: list[tuple[int, Lanes]] = []

    def add_array(self, name: str, array: Any, hidden: Lanes | None = None) -> int:
        address = self._memory.add_array(name, array)
        if hidden is not None and array.size:
            self._hidden.append((address, hidden))
        return address

    def allocate(self, name: str, size_bytes: int, align_bytes: int = 64) -> int:
        address = self._memory.allocate(name, size_bytes, align_bytes)
        self._hidden.append((address, lanes_of([terms.const(0, 8)] * size_bytes, numpy.uint8)))
        return address

    def find(self, address: int, size_bytes: int, write: bool) -> Any:
        found = self._memory.find(address, size_bytes, write)
        if isinstance(found, str):
            return found
        for start, hidden in self._hidden:
            if start <= address and address + size_bytes <= start + len(hidden):
                return hidden[address - start:address - start + size_bytes]
        return found


def _at(kernel: Any, function: Function, made: Override, case: Case) -> Proof:
    uses = integer_uses(function)
    memory = _Memory()
    arguments: dict[str, Any] = {}
    rows: dict[str, Lanes] = {}
    for name, type in kernel.parameters:
        value = case.arguments[name]
        if not isinstance(type, TensorType) or (name in uses and (uses[name].dims or uses[name].bound)):
            arguments[name] = value
            if isinstance(value, numpy.ndarray):
                memory.add_array(name, value)
            continue
        if not value.flags.c_contiguous:
            return Proof(None, f"{name} does not lie in C order at {case.label}")
        rows[name] = unknown(name, value.shape, value.dtype)  # what is only stored too: some of it may stay as it was
        arguments[name] = rows[name].copy()
        value.flags.writeable = name in made.compiled.stored
        memory.add_array(name, value, rows[name].bytes())
    interpret(function, arguments)
    signature = signature_of(kernel)
    binding = signature.bind(tuple(case.arguments.values()))
    run_workers(made, signature, binding, memory, Trace())
    ways: list[str] = []
    for name in made.compiled.stored:
        value = case.arguments[name]
        found = memory.find(value.ctypes.data, value.nbytes, False)
        if isinstance(found, str):
            continue  # it has no bytes
        decision = decide(pairs(found.view(value.dtype), arguments[name].reshape(-1)), value.dtype)
        if decision.values is not None:
            given = {n: known_array(rows[n], decision.values) if n in rows else v for n, v in case.arguments.items()}
            return _replayed(kernel, made, Case(case.label, given))
        if not decision.proved:
            return Proof(None, "; ".join(decision.ways))
        ways += decision.ways
    free = ", ".join(name for name in rows if name not in made.compiled.stored)
    drawn = ", ".join(name for name in case.arguments if name not in rows)
    return Proof(True, ", ".join(dict.fromkeys(ways)), f"values of {free}" + (f", {drawn} as drawn," if drawn else ""))


def _replayed(kernel: Any, made: Override, case: Case) -> Proof:
    """A counterexample, run through the interpreter of rows and through the kernel's."""
    expected = expectation(kernel.tile_ir(), case)
    assert expected is not None
    try:
        verify(kernel, made, interpreted=True, known=[(case, expected)])
    except AssemblyError as error:
        return Proof(False, error.found)
    raise RuntimeError(f"{kernel.name}: a counterexample does not differ when it is run: {case.arguments}")
