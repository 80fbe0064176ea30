"""What is proved of bank conflicts is what the emulator counts: on random addresses, on kernels of this project and of
Triton."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sapper import emulate, targets
from sapper.codegen.pipeline import compile_kernel
from sapper.emulate import Options, conflicts
from sapper.emulate.conflicts import SharedAccess, Spread, shared_accesses
from sapper.kernels import find
from tests.strategies.amount import examples

from .test_machine import text

DATA = Path(__file__).parent / "data"
WARPS, SHARED_BYTES = 2, 8192


def agree(accesses: list[SharedAccess], counters: Any) -> int:
    """How many instructions ran that are proved; each took the cycles of its proof, or less where lanes were off."""
    compared = 0
    for access in accesses:
        counted = counters.lines.get(access.line)
        if access.proof is None or counted is None or not counted.shared_accesses:
            continue
        compared += 1
        most = counted.shared_accesses * access.proof.total
        assert counted.shared_cycles <= most, access
        assert access.masked or counted.shared_cycles == most, access
    return compared


# Statements on five values: the lane, the warp, a number that a loop counts, the thread, and lanes to which it adds.
REGISTER = st.sampled_from(["lane", "warp", "round", "thread", "moved"])
NUMBER = st.sampled_from([1, 3, 4, 7, 12, 16, 20, 31, 32, 64, 96, 112, 127, 128, 144, 272, 0xFFFFFFF0]).map(str)
STATEMENT = st.one_of(
    st.tuples(st.sampled_from(["add.u32", "xor.b32", "or.b32", "sub.u32", "and.b32", "mul.lo.u32"]), REGISTER, REGISTER,
              REGISTER | NUMBER),
    st.tuples(st.sampled_from(["shl.b32", "shr.u32", "shr.s32", "bfe"]), REGISTER, REGISTER,
              st.integers(0, 6).map(str)),
    st.tuples(st.just("choose"), REGISTER, REGISTER, REGISTER),
    st.tuples(st.just("wide"), REGISTER, REGISTER, st.sampled_from(["1", "4", "12", "64"])))
ACCESS = {"ld.shared.u8 %h1": 1, "ld.shared.b16 %h1": 2, "ld.shared.b32 %r20": 4, "ld.shared.v2.b32 {%r20, %r21}": 8,
          "ld.shared.v4.b32 {%r20, %r21, %r22, %r23}": 16}


def program(statements: list[tuple[str, str, str, str]], step: int, access: str, offset: int) -> str:
    """Three rounds of the statements, each with an access of shared memory at what they made. Each statement writes a
    register of its own, as compilers do."""
    width = ACCESS[access]
    names = {"lane": "%r10", "warp": "%r11", "round": "%r12", "thread": "%r1", "moved": "%r13"}
    lines = ["and.b32 %r10, %r1, 31", "shr.u32 %r11, %r1, 5", "mov.u32 %r12, 0", "mul.lo.u32 %r13, %r10, 20",
             "mov.u32 %r15, memory", "again: mov.u32 %r16, 0"]
    for number, (name, to, one, other) in enumerate(statements):
        made, one, other = f"%r{30 + number}", names[one], names.get(other, other)
        if name == "choose":
            lines += [f"setp.lt.u32 %p{number}, {one}, 16", f"selp.b32 {made}, {one}, {other}, %p{number}"]
        elif name == "bfe":
            lines.append(f"bfe.u32 {made}, {one}, {other}, 4")
        elif name == "wide":
            lines += [f"mul.wide.u32 %d{10 + number}, {one}, {other}",
                      f"add.u64 %d{20 + number}, %d{10 + number}, 64", f"cvt.u32.u64 {made}, %d{20 + number}"]
        else:
            lines.append(f"{name} {made}, {one}, {other}")
        names[to] = made
    lines += [f"and.b32 %r4, {names['lane']}, {SHARED_BYTES // 2 - 1}", f"and.b32 %r5, %r4, {0x100000000 - width}",
              "add.u32 %r6, %r5, %r15", f"{access}, [%r6+{offset * width}]",
              f"add.u32 %r13, %r13, {step}", "add.u32 %r12, %r12, 48", "setp.lt.u32 %p15, %r12, 144", "@%p15 bra again"]
    return text("".join(f" {line};\n" for line in lines), SHARED_BYTES)


@settings(max_examples=examples(150), deadline=None)
@given(st.lists(STATEMENT, max_size=7), st.sampled_from([1, 4, 12, 16, 128]), st.sampled_from(sorted(ACCESS)),
       st.integers(0, 9))
def test_random_addresses(statements: list[tuple[str, str, str, str]], step: int, access: str, offset: int) -> None:
    code = program(statements, step, access, offset)
    (found,) = shared_accesses(code, block=(32 * WARPS,))
    counters = emulate.load(code).launch(block=(32 * WARPS,), arguments=[np.zeros(64, np.uint32)], options=Options(
        races=False, uninitialised=False, lines=True)).counters
    assert counters.lines[found.line].shared_accesses == 3 * WARPS
    agree([found], counters)


# The algebra by itself: what is known of two values holds for all values of which it may be known.
BITS = st.integers(0, 2**12 - 1)
OPERATIONS: dict[str, tuple[Callable[[Spread, Spread], Spread | None], Callable[[int, int], int]]] = {
    "add": (conflicts.add, lambda a, b: a + b), "subtract": (conflicts.subtract, lambda a, b: a - b),
    "exclusive or": (conflicts.exclusive_or, lambda a, b: a ^ b), "both": (conflicts.both, lambda a, b: a & b),
    "either": (conflicts.either, lambda a, b: a | b), "multiply": (conflicts.multiply, lambda a, b: a * b)}


@st.composite
def spreads(draw: Any) -> tuple[Spread, list[int]]:
    """What is known, and a value of which it is true."""
    table = tuple(draw(st.lists(BITS, min_size=32, max_size=32))) if draw(st.booleans()) else (draw(BITS),) * 32
    mask = draw(st.sampled_from([0xFFF, 0x0F0, 0x00F, 0xFF0, 0xF]))
    table = tuple(number & mask for number in table)
    carry = draw(st.sampled_from([0, 2, 4, 7, 64, 64, 64, 64]))
    free = draw(st.one_of(st.just(0), st.sampled_from([0xF00, 0x0F0, 0xF, 0xFF0]), BITS)) & (1 << carry) - 1
    one, more, other = draw(BITS) & free, draw(BITS) << carry, draw(BITS) << carry
    odd = 2 * draw(st.integers(0, 20)) + 1

    def value(number: int) -> int:
        low = (number ^ one) & (1 << carry) - 1
        high = number >> carry << carry
        return low + ((high ^ other) * odd + more if carry < 64 else 0) & 2**64 - 1

    return Spread(table, free, carry), [value(number) for number in table]


def covered(spread: Spread, values: list[int]) -> bool:
    low = (1 << spread.carry) - 1
    differ = {(number ^ value) & low for number, value in zip(spread.table, values, strict=True)}
    if len(differ) > 1 or differ.pop() & ~spread.free:
        return False
    for bits in range(spread.carry + 1, 24 if spread.carry < 24 else 0):
        mask = (1 << bits) - 1 & ~low
        pairs = {(number & mask, value & mask) for number, value in zip(spread.table, values, strict=True)}
        if len(pairs) > len({number for number, _ in pairs}) or len(pairs) > len({value for _, value in pairs}):
            return False
    return True


@settings(max_examples=examples(300), deadline=None)
@given(spreads(), spreads(), st.sampled_from(sorted(OPERATIONS)))
def test_what_is_known_of_a_result_is_true(a: tuple[Spread, list[int]], b: tuple[Spread, list[int]], name: str) -> None:
    assert covered(*a) and covered(*b)
    known, exact = OPERATIONS[name]
    made = known(a[0], b[0])
    if made is not None:
        assert covered(made, [exact(x, y) % 2**64 for x, y in zip(a[1], b[1], strict=True)]), made
    if made is None and name == "add":      # of one number for all, and of numbers that are known, everything is
        assert not (a[0].uniform or b[0].uniform or (a[0].exact and b[0].exact))


@settings(max_examples=examples(200), deadline=None)
@given(spreads(), spreads(), st.integers(0, 9), st.booleans())
def test_what_is_known_of_shifts_and_choices(a: tuple[Spread, list[int]], b: tuple[Spread, list[int]], places: int,
                                             taken: bool) -> None:
    assert covered(conflicts.shift_left(a[0], places), [value << places & 2**64 - 1 for value in a[1]])
    made = conflicts.shift_right(a[0], places)
    assert made is None or covered(made, [value >> places for value in a[1]])
    chosen = conflicts.agreed(a[0], b[0])
    assert chosen is None or covered(chosen, (a if taken else b)[1])
    if not a[0].support >> 31:
        return
    assert covered(conflicts.widened(a[0], 32), [(value & 2**32 - 1 ^ 2**31) - 2**31 & 2**64 - 1 for value in a[1]])


def accesses_of(lines: list[str], threads: int = 64) -> list[SharedAccess]:
    code = text("".join(f" {line};\n" for line in ["mov.u32 %r15, memory", *lines]), SHARED_BYTES)
    return shared_accesses(code, block=(threads,))


def swizzled(turn: str) -> list[str]:
    """Eight rows of 128 bytes for each of four matrices: chunks are turned by the row's number (%r2), or not."""
    return ["and.b32 %r2, %r1, 7", "shr.u32 %r3, %r2, 1", "shr.u32 %r4, %r1, 3", "and.b32 %r5, %r4, 3",
            f"xor.b32 %r6, %r5, {turn}", "shl.b32 %r7, %r6, 4", "shl.b32 %r8, %r2, 7", "add.u32 %r9, %r7, %r8",
            "add.u32 %r10, %r9, %r15", "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r11, %r12, %r13, %r14}, [%r10]"]


def test_a_wrong_swizzle_has_no_proof() -> None:
    assert [str(a.proof) for a in accesses_of(swizzled("%r2"))] == ["no conflicts: rank 3 of 3"]
    assert [str(a.proof) for a in accesses_of(swizzled("0"))] == \
        ["32 cycles for 4: lanes 0 and 1 meet in bank 0; rank 0 of 3"]
    assert [str(a.proof) for a in accesses_of(swizzled("%r3"))] == \
        ["8 cycles for 4: lanes 0 and 1 meet in bank 0; rank 2 of 3"]


def test_padded_rows_are_enumerated() -> None:
    rows = ["shr.u32 %r2, %r1, 2", "and.b32 %r3, %r1, 3", "and.b32 %r4, %r2, 7", "shl.b32 %r5, %r3, 3",
            "mad.lo.u32 %r6, %r4, {}, %r5", "add.u32 %r7, %r6, %r15", "st.shared.v2.b32 [%r7], {{%r1, %r1}}"]
    for row_bytes, cycles in ((288, 2), (160, 2), (256, 8), (272, 4)):
        (access,) = accesses_of([line.format(row_bytes) for line in rows])
        assert access.proof is not None and access.proof.total == cycles, row_bytes


def test_lanes_that_part_are_not_followed() -> None:
    """A loop that lanes leave one by one: what it counts differs between them behind it. What was there before does
    not."""
    parted = ["shl.b32 %r2, %r1, 2", "add.u32 %r3, %r2, %r15", "mov.u32 %r4, 0", "again: add.u32 %r4, %r4, 4",
              "setp.lt.u32 %p1, %r4, %r1", "@%p1 bra again", "add.u32 %r5, %r3, %r4", "st.shared.u32 [%r3], 1",
              "st.shared.u32 [%r5], 1"]
    first, second = accesses_of(parted)
    assert first.proof is not None and first.proof.free
    assert second.proof is None and second.reason == "its address is not followed"
    together = [line.replace("%r4, %r1", "%r4, 64") for line in parted]
    assert all(access.proof is not None and access.proof.free for access in accesses_of(together))


def test_ways_with_branches_of_their_own() -> None:
    """Nobody looks where the lanes meet: then nothing is followed that several places write."""
    lines = ["shl.b32 %r2, %r1, 2", "mov.u32 %r3, 0", "add.u32 %r4, %r2, %r15", "setp.lt.u32 %p1, %r1, 9",
             "@%p1 bra on", "add.u32 %r3, %r3, 4", "bra on", "on: add.u32 %r5, %r4, %r3", "st.shared.u32 [%r5], 1",
             "st.shared.u32 [%r4], 1"]
    first, second = accesses_of(lines)
    assert first.proof is None and first.reason == "its address is not followed: a branch may part the warp"
    assert second.proof is not None and second.proof.free


def test_a_predicate_that_differs_between_lanes() -> None:
    lines = ["shl.b32 %r2, %r1, 2", "setp.lt.u32 %p1, %r1, 9", "add.u32 %r3, %r2, %r15", "mov.u32 %r4, %r3",
             "@%p1 add.u32 %r4, %r3, 64", "@%p1 st.shared.u32 [%r15], 1", "st.shared.u32 [%r4], 1"]
    first, second = accesses_of(lines)
    assert first.masked and first.proof is not None and first.proof.total == 1
    assert second.proof is None


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("name", "level"), [
    ("matmul_nt_bf16_bf16", "sm_80"), ("matmul_nn_bf16_bf16", "sm_90a"), ("matmul_nn_f32", "sm_80"),
    ("matmul_tn_bf16", "sm_80"), ("matmul_nt_i8", "sm_80"), ("attention_bf16_64", "sm_80"),
    ("attention_bf16_64", "sm_90a"), ("grouped_matmul_bf16_bf16", "sm_90a")])
def test_kernels_of_the_library(name: str, level: str) -> None:
    entry = find(name)
    shape = next(s for s in reversed(entry.check_shapes) if 0 < np.prod(list(s.values())) <= 40_000)
    tensors = {parameter: type.dims for parameter, type in entry.kernel.parameters if hasattr(type, "dims")}
    rows = {dims[-1] for dims in tensors.values() if len(dims) > 1 and dims[-1] in shape}
    shape |= {dim: -(-shape[dim] // 64) * 64 for dim in rows}
    arguments = entry.make_arguments(np.random.default_rng(5), shape)
    code = compile_kernel(entry.kernel, {}, dict.fromkeys(tensors, "contiguous"), dict.fromkeys(rows, (8192, 64)),
                          targets.target(level), None, frozenset(tensors))
    counters = emulate.run(entry.kernel, *arguments.values(), target=level, code=code, workers=4,
                           options=Options(lines=True)).counters
    accesses = shared_accesses(code.text())
    assert all(access.proof for access in accesses)
    assert agree(accesses, counters) > len(accesses) / 2


def test_a_matmul_of_triton() -> None:
    """Its loads and copies are free of conflicts, as the emulator counts, too."""
    code = (DATA / "triton_matmul_bf16_sm80.ptx").read_text(encoding="utf-8")
    rng = random.Random(7)
    a, b = (np.array([[rng.uniform(-1, 1) for _ in range(64)] for _ in range(64)], ml_dtypes.bfloat16) for _ in "ab")
    c = np.zeros((64, 64), np.float32)
    numbers = [np.int32(n) for n in (64, 64, 64, 64, 64, 64)]
    counters = emulate.load(code).launch(grid=(1, 1), arguments=[a, b, c, *numbers, np.int64(0), np.int64(0)],
                                         shared_bytes=49152, options=Options(lines=True)).counters
    accesses = shared_accesses(code)
    assert agree(accesses, counters) > 60
    assert all(a.proof is not None and a.proof.free for a in accesses if a.text.startswith(("ldmatrix", "cp.async")))
