"""Meanings of rows on values that are not known, against the same meanings on values that are; terms by themselves."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sapper.assembly import terms
from sapper.assembly.symbolic import Lanes, NotSymbolic, Number, lanes_of, unknown
from sapper.targets.x86_64.instructions import ROWS
from sapper.targets.x86_64.meaning import execute
from sapper.tile import semantics
from tests.strategies.amount import examples

FLAGS = "oszapc"
COMPUTED = sorted(
    name for name, row in ROWS.items()
    if row.meaning is not None and not row.control and row.masking != "required" and "gather" not in name
    and "amx_tile" not in row.features
    and (row.length < 256 or f"{name[:-3]}128" not in ROWS))
"""Rows that compute values; of those that differ in length only, the shortest. Tiles are not followed."""
DECIDED_BY_DATA = {"bsf", "bsr", "tzcnt", "lzcnt", "pext", "pdep", "div", "idiv", "vcompressps", "vcompresspd",
                   "vpcompressd", "vpcompressq", "vexpandps", "vexpandpd", "vpexpandd", "vpexpandq"}
"""Mnemonics whose meaning branches on its operands, or on the opmask."""
COUNTED_IN_CL = {"rol", "ror", "shl", "shr", "sar", "bzhi", "shlx", "shrx", "sarx"}
"""Those whose count must be known."""


def operands_of(row: Any, random: np.random.Generator) -> list[Any]:
    """A random raw value for each operand."""
    made: list[Any] = []
    for spec in row.operands:
        if spec.kind == "imm":
            made.append(int(random.integers(0, 256)))
        elif spec.kind == "vec":
            made.append(random.integers(0, 256, spec.bits // 8).astype(np.uint8))
        elif spec.kind == "mem":
            made.append(random.integers(0, 256, spec.memory_bits // 8).astype(np.uint8))
        else:
            made.append(int(random.integers(0, 2**63)) & ((1 << spec.bits) - 1))
    return made


def hidden(value: Any, name: str, inputs: dict[str, Any]) -> Any:
    """The value as one that is not known; `inputs` gets what it is."""
    if isinstance(value, np.ndarray):
        inputs |= {f"{name}.{at}": np.array([x], np.uint64) for at, x in enumerate(value)}
        return unknown(name, value.shape, value.dtype)
    inputs[name] = np.array([value], np.uint64)
    return Number(terms.variable(name, 64))


def shown(found: Any, inputs: dict[str, Any]) -> Any:
    if isinstance(found, Lanes):
        return [int(v[0]) for v in terms.evaluate_all(found.terms(), inputs)]
    if isinstance(found, Number):
        return int(terms.evaluate(found.term, inputs)[0])
    return [int(x) for x in found] if isinstance(found, np.ndarray) else int(found)


@pytest.mark.parametrize("mnemonics", ["bdfhjln", "acegikmopqrtuwxyz", "v"])
def test_every_row_computes_on_terms_what_it_computes_on_values(mnemonics: str) -> None:
    refused: dict[str, str] = {}
    ran = 0
    for name in COMPUTED:
        row = ROWS[name]
        if name[0] not in mnemonics:
            continue
        random = np.random.default_rng(zlib.crc32(name.encode()))
        operands = operands_of(row, random)
        implicit = tuple(int(random.integers(0, 2**63)) for _ in row.implicit_reads)
        flags = {letter: int(random.integers(0, 2)) for letter in FLAGS} if row.flags_read else None
        inputs: dict[str, Any] = {}
        given = [v if s.kind == "imm" or (s.fixed is not None and row.mnemonic in COUNTED_IN_CL)
                 or (row.mnemonic in COUNTED_IN_CL and at == len(operands) - 1) else hidden(v, f"x{at}", inputs)
                 for at, (s, v) in enumerate(zip(row.operands, operands, strict=True))]
        memory = tuple(s.kind == "mem" for s in row.operands)
        unseen = None if flags is None else {k: hidden(v, k, inputs) for k, v in flags.items()}
        mask = int(random.integers(0, 2**62)) if row.masking and ran % 2 else None
        try:
            wanted = execute(row, operands, memory, mask, False, flags, implicit)
        except OverflowError:
            continue
        try:
            found = execute(row, given, memory, None if mask is None else hidden(mask, "k", inputs), False, unseen,
                            tuple(hidden(v, f"i{at}", inputs) for at, v in enumerate(implicit)))
        except NotSymbolic as error:
            if any(spec.dtype[:1] in ("f", "b") for spec in row.operands):
                continue  # arithmetic of floats is called, or refused
            refused[row.mnemonic] = str(error)
            continue
        ran += 1
        for spec, a, b in zip(row.operands, wanted[0], found[0], strict=True):
            if spec.writes:
                assert shown(b, inputs) == shown(a, inputs), (name, mask)
        assert [shown(v, inputs) for v in found[1]] == wanted[1], name
        assert {k: shown(v, inputs) for k, v in found[2].items()} == wanted[2], name
    assert set(refused) <= DECIDED_BY_DATA, refused
    assert ran > 20


@given(st.lists(st.tuples(st.integers(0, 11), st.integers(0, 40), st.integers(0, 2**32 - 1)), min_size=1, max_size=12),
       st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=examples(60))
def test_terms_are_rewritten_to_equal_ones(steps: list[tuple[int, int, int]], x: int, y: int) -> None:
    """Random arithmetic on two words: the value of the term is that of Python's ints; what a term is said to depend on
    is all that it depends on."""
    low = 2**32 - 1
    a, b = terms.variable("a", 32), terms.variable("b", 32)
    term, value = a, x
    for kind, by, constant in steps:
        c = terms.const(constant, 32)
        n = terms.const(by, 32)
        signed = value - (value >> 31 << 32)
        term, value = [
            (terms.both(term, c), value & constant), (terms.either(term, c), value | constant),
            (terms.differing(term, b), value ^ y), (terms.add(term, c), value + constant & low),
            (terms.shift_left(term, n), value << by & low), (terms.shift_right(term, n), value >> by),
            (terms.shift_right_signed(term, n), signed >> by & low),
            (terms.add(term, b), value + y & low), (terms.invert(term), ~value & low),
            (terms.ite(terms.less(term, b), c, term), constant if value < y else value),
            (terms.concat([terms.part(term, 0, 16), terms.part(b, 16, 16)]), (value & 0xFFFF) << 16 | y >> 16),
            (terms.mul(term, c), value * constant & low),
        ][kind]
    inputs = {"a": np.array([x], np.uint64), "b": np.array([y], np.uint64)}
    assert int(terms.evaluate(term, inputs)[0]) == value
    free = dict.fromkeys("ab", low)
    for name, bit in terms.support(term):
        free[name] &= ~(1 << bit)
    other = {name: inputs[name] ^ np.uint64(free[name]) for name in "ab"}
    assert int(terms.evaluate(term, other)[0]) == value


def test_bits_that_are_moved_the_same_way_are_one_term() -> None:
    a = terms.variable("a", 32)
    by_shifts = terms.shift_right_signed(terms.shift_left(a, terms.const(16, 32)), terms.const(28, 32))
    by_parts = terms.extended(terms.part(a, 12, 4), 32, True)
    assert by_shifts is by_parts
    assert terms.support(by_shifts) == {("a", bit) for bit in range(12, 16)}
    swapped = terms.concat([terms.part(a, 0, 16), terms.part(a, 16, 16)])
    assert terms.concat([terms.part(swapped, 0, 16), terms.part(swapped, 16, 16)]) is a


def test_a_cast_to_bf16_is_that_of_the_language() -> None:
    """Every upper half of an f32, with the lower halves where rounding turns."""
    upper = np.arange(2**16, dtype=np.uint32) << 16
    x = unknown("x", (1,), np.float32)
    (term,) = semantics.cast(x, semantics._BY_NUMPY[semantics._NUMPY[semantics.bf16]]).terms()
    for lower in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        bits = upper | np.uint32(lower)
        values = bits.view(np.float32)
        with np.errstate(all="ignore"):
            wanted = semantics.cast(values, semantics.bf16)
        found = terms.evaluate(term, {"x.0": bits.astype(np.uint64)}).astype(np.uint16)
        nan = np.isnan(values)
        assert np.array_equal(found[~nan], wanted.view(np.uint16)[~nan])
        assert np.isnan(found[nan].view(wanted.dtype).astype(np.float32)).all()


@pytest.mark.parametrize("step, part", [
    (lambda x: x[x > 0], "which lanes"), (lambda x: bool(x[0] > 0), "a decision"), (lambda x: x.tobytes(), "bytes"),
    (lambda x: range(x[0].integer()), "a place or a count"), (lambda x: np.sort(x), "numpy.sort"),
])
def test_what_needs_a_known_value_is_refused(step: Any, part: str) -> None:
    with pytest.raises(NotSymbolic, match=part):
        step(unknown("x", (4,), np.int32))


def test_what_is_known_needs_no_input() -> None:
    made = lanes_of([terms.const(5, 32)], np.int32)
    assert bool(made[0] == 5) and int(made[0]) == 5
    with pytest.raises(NotSymbolic):
        int(unknown("x", (1,), np.int32)[0])
