"""Sums of products of bytes that a number scales: as words, by a dot product that adds what it scales.

Enters: a lane function with dot products of bytes. Leaves: the same, in which

    add (acc, mul (dots, number))    is    dot2_i16 (dot2_i16 acc, first, number), second, number

where `dots` is a chain of dot4_u8i8 that begins with 0 and that nothing else reads, `first` and `second` (or `first`
alone) are what parts of it sum, and the bits of its operands and of the number say that all of these fit 16 bits. The
number's upper word is 0, so that the sign of a sum, which is in its upper word, adds nothing.
Holds: results are the same for all operands. What is scaled stands where its part is made, so that registers hold no
more of them at once.

Worth it where a product of 32 bits takes two operations (`slow_products` of the target), and with a sum three: for
Q4_K's blocks of 32 weights two do (sums of 32 would not fit).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from ..ir.nodes import Block, Function, Op, Value
from ..ir.types import ROW_B32, ROW_I32, RowType
from .scaled_words import WORD, constant_of, is_positive_word
from .split_dots import bits_of

MOST = (1 << WORD - 1) - 1
"""The largest sum."""
MOST_PARTS = 2
"""Parts of a chain that take less than a product and a sum."""


@dataclass(slots=True)
class _Term:
    """A product in a sum. parts: dot products of its chain that are summed apart. product: what it was."""

    parts: list[list[Op]]
    number: Value
    product: Op


def scale_sums(function: Function) -> int:
    """In place; how many products are parts of dot products now."""
    return _scale(function.body, function.count_uses())


def _scale(block: Block, uses: Counter[Value]) -> int:
    count = sum(_scale(inner, uses) for op in block.ops for inner in op.blocks)
    if any(op.blocks or not (op.results or op.name in ("prefetch", "yield")) for op in block.ops):
        return count    # nothing moves across what writes
    members, known = set(block.ops), dict[Value, int]()
    inner = {v for op in block.ops if _is_sum(op) for v in op.operands
             if v.op in members and _is_sum(v.op) and uses[v] == 1}
    order = {op: place for place, op in enumerate(block.ops)}
    made: dict[Op, list[Op]] = {}       # behind which op what is new stands
    gone: set[Op] = set()
    for root in [op for op in block.ops if _is_sum(op) and op.results[0] not in inner]:
        sums, leaves = _flatten(root, inner)
        terms = [_term(leaf, members, uses, known) for leaf in leaves]
        found = [term for term in terms if term is not None]
        if found:
            count += len(found)
            gone |= {*sums, *(term.product for term in found)}
            _chain(root, [leaf for leaf, term in zip(leaves, terms, strict=True) if term is None], found,
                   order, made)
    if gone:
        ops = [new for op in block.ops for new in (op, *made.get(op, ())) if new not in gone]
        block.ops = _in_order(ops)
    return count


def _is_sum(op: Op | None) -> bool:
    return op is not None and op.name == "add" and op.results[0].type == ROW_I32


def _flatten(root: Op, inner: set[Value]) -> tuple[list[Op], list[Value]]:
    """The sums that a sum is made of, itself too, and what they add."""
    sums, leaves = [root], list[Value]()
    for value in root.operands:
        if value in inner and value.op is not None:
            below, further = _flatten(value.op, inner)
            sums, leaves = sums + below, leaves + further
        else:
            leaves.append(value)
    return sums, leaves


def _term(value: Value, members: set[Op], uses: Counter[Value], known: dict[Value, int]) -> _Term | None:
    op = value.op
    if op is None or op not in members or op.name != "mul" or uses[value] != 1:
        return None
    for dots, number in zip(op.operands, reversed(op.operands), strict=True):
        parts = _parts(dots, members, uses, known)
        if parts and is_positive_word(number, known):
            return _Term(parts, number, op)
    return None


def _parts(value: Value, members: set[Op], uses: Counter[Value], known: dict[Value, int]) -> list[list[Op]]:
    """Parts of a chain of dot products whose sums fit 16 bits; none where it is no such chain, or they are too many."""
    chain: list[Op] = []
    while value.op is not None and value.op in members and value.op.name == "dot4_u8i8" and uses[value] == 1:
        chain.insert(0, value.op)
        value = value.op.operands[0]
    if constant_of(value) != 0:
        return []
    parts, room = list[list[Op]](), 0
    for op in chain:
        bits = bits_of(op.operands[1], known)
        magnitude = 128 * sum(bits >> shift & 0xFF for shift in (0, 8, 16, 24))
        if magnitude >= MOST:
            return []
        if magnitude > room:
            parts.append([])
            room = MOST
        parts[-1].append(op)
        room -= magnitude
    return parts if len(parts) <= MOST_PARTS else []


def _chain(root: Op, rest: list[Value], terms: list[_Term], order: dict[Op, int], made: dict[Op, list[Op]]) -> None:
    """Has a sum made by dot products of words, each behind the last of bytes whose sum it scales."""
    def emit(behind: Op, name: str, operands: list[Value], row: RowType = ROW_I32, **attributes: object) -> Value:
        op = Op(name, operands, (row,), attributes, None, root.location)
        made.setdefault(behind, []).append(op)
        return op.result

    total = rest[0] if rest else emit(terms[0].product, "splat_const", [], value=0)
    for value in rest[1:]:
        total = emit(root, "add", [total, value])
    parts: list[tuple[Op, Value]] = []
    for term in terms:
        number = emit(term.product, "bitcast", [term.number], ROW_B32)
        begin = term.parts[0][0].operands[0]
        for dots in term.parts:
            dots[0].operands[0] = begin
            parts.append((dots[-1], number))
    for last, number in sorted(parts, key=lambda part: order[part[0]]):
        total = emit(last, "dot2_i16", [total, emit(last, "bitcast", [last.result], ROW_B32), number])
    assert total.op is not None
    total.op.results = root.results
    root.result.move_to(total.op)


def _in_order(ops: list[Op]) -> list[Op]:
    """The ops, what an op reads before it."""
    left, ordered = dict.fromkeys(ops), list[Op]()

    def place(op: Op) -> None:
        if op in left:
            del left[op]
            for value in op.operands:
                if value.op is not None:
                    place(value.op)
            ordered.append(op)

    for op in ops:
        place(op)
    return ordered
