"""Addresses as formulas: what is shown holds for all numbers, and what is refused is wrong for the numbers given."""

from __future__ import annotations

from itertools import islice, product
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import sapper as sp
from sapper import Tensor, f32, tiles, x86
from sapper.assembly.contraction import Contraction
from sapper.assembly.errors import AssemblyError
from sapper.assembly.mutate import mutants
from sapper.assembly.override import Override, build, compile_by_hand
from sapper.assembly.polynomial import Known, Polynomial, Symbol
from sapper.assembly.static import shown
from sapper.codegen.machine import Instruction
from sapper.ir.nodes import Location
from sapper.kernels.by_hand import codebook, contraction, matmul, rows
from sapper.kernels.matmul import make_matmul_nn
from sapper.runtime import by_hand
from sapper.targets.x86_64.target import target
from tests.strategies.amount import FUZZ

ZEN4 = target("zen4")
M, N = sp.dims("M N")
NAMES = [Symbol.new("a"), Symbol.new("b"), Symbol.new("c"), Symbol.new("d", natural=False)]
RANGE = range(-3, 6)


def polynomials(most: int = 4) -> Any:
    monomial = st.lists(st.sampled_from(NAMES), max_size=2).map(lambda names: tuple(sorted(names)))
    return st.dictionaries(monomial, st.integers(-4, 4), max_size=most).map(Polynomial)


@given(st.lists(polynomials(3), max_size=4), polynomials())
def test_what_is_proved_holds_for_all_numbers(facts: list[Polynomial], goal: Polynomial) -> None:
    known = Known(facts)
    proved, numbers = known.proves(goal), known.refutes(goal)
    assert not (proved and numbers is not None)
    if numbers is not None:
        complete = {s: numbers.get(s, 0) for s in NAMES}
        assert goal.value(complete) < 0
    if proved:
        for values in product(*(RANGE if not s.natural else RANGE[3:] for s in NAMES)):
            numbers = dict(zip(NAMES, values, strict=True))
            if all(f.value(numbers) >= 0 for f in facts):
                assert goal.value(numbers) >= 0, numbers


@given(polynomials(), polynomials(), st.sampled_from(NAMES), polynomials(2))
def test_arithmetic(one: Polynomial, two: Polynomial, symbol: Symbol, by: Polynomial) -> None:
    numbers = dict(zip(NAMES, (3, 1, 4, -2), strict=True))
    assert (one * two - one).value(numbers) == one.value(numbers) * two.value(numbers) - one.value(numbers)
    assert one.replaced(symbol, by).value(numbers) == one.value(numbers | {symbol: by.value(numbers)})
    parts = one.parts(symbol)
    if parts is not None:
        assert parts[0].value(numbers) * numbers[symbol] + parts[1].value(numbers) == one.value(numbers)


def test_a_product_of_loops() -> None:
    """A row of a matrix, by two loops, as a kernel reaches it."""
    m, n = Symbol.new("M"), Symbol.new("N")
    row, column = Symbol.new("row"), Symbol.new("column")
    big, wide, at, beside = (Polynomial.of(s) for s in (m, n, row, column))
    known = Known([big - at - 14, wide - beside - 1])
    offset = (at + 13) * wide * 4 + beside * 4
    assert known.proves(big * wide * 4 - offset - 4)
    assert not known.proves(big * wide * 4 - offset - 8)
    numbers = known.refutes(big * wide * 4 - offset - 8)
    assert numbers is not None and numbers[m] >= numbers[row] + 14


def attached(attach: Any, kernel: Any, *options: Any) -> Any:
    attach(kernel, *options)
    return kernel


KERNELS = {
    "f32 14x32": lambda: attached(matmul.attach, make_matmul_nn(f32), matmul.AVX512),
    "f32 6x16": lambda: attached(matmul.attach, make_matmul_nn(f32), matmul.AVX2),
    "row sum": lambda: attached(rows.attach_row_sum, rows.make_row_sum()),
    "codebook": lambda: attached(codebook.attach, codebook.make_codebook()),
    "embedding": lambda: attached(rows.attach_embedding, rows.make_embedding()),
}
LEFT_TO_RUNNING = {"f32 14x32": "half a panel", "embedding": "rows that ids name"}
"""Of these some addresses depend on data, or on an opmask that is all on or all off."""


@pytest.mark.parametrize("name", KERNELS)
def test_the_librarys_kernels_are_shown(name: str) -> None:
    kernel = KERNELS[name]()
    inside, left = shown(build(kernel, kernel.by_hand[0]), ZEN4)
    assert len(inside) > 5
    assert bool(left) == (name in LEFT_TO_RUNNING)
    if name == "embedding":
        assert len(left) == 1


@pytest.mark.parametrize("piece", [contraction.f32_14x32, contraction.f32_6x16])
def test_all_of_a_micro_kernel_is_shown(piece: Contraction) -> None:
    for tile in piece.tiles():
        made = piece.assemble(tile)
        with made.building():
            x86.ret()
        inside, left = shown(made, ZEN4)
        assert len(inside) >= piece.step * (tile[0] + tile[1]) and not left


@pytest.mark.parametrize("name", ["row sum", "f32 6x16"])
def test_what_is_shown_never_leaves_its_region(name: str) -> None:
    """Copies with one error in them: where the interpreter of rows sees an access outside its buffer, the static check
    did not show it to be inside."""
    kernel = KERNELS[name]()
    made = compile_by_hand(kernel, kernel.by_hand[0], ZEN4)
    for place, item in enumerate(made.assembly.body):
        if isinstance(item, Instruction):
            item.location = Location("piece", place + 1, 1, 1)  # so that an error says which instruction it is
    known = list(islice(by_hand.expected_cases(kernel, made.piece), 12))
    tried = 0
    for mutant in list(mutants(made.assembly))[::(23 if FUZZ else 46) if name == "f32 6x16" else 4]:
        try:
            inside, _ = shown(mutant.assembly, ZEN4)
        except AssemblyError:
            continue
        wrong = Override(made.piece, mutant.assembly, mutant.assembly.machine(), made.finished, made.compiled)  # type: ignore[arg-type]
        try:
            by_hand.verify(kernel, wrong, interpreted=True, known=known, trace=by_hand.Trace(200_000))
        except AssemblyError as error:
            tried += 1
            if error.kind == "footprint":
                assert error.location not in [item.location for item in inside], str(mutant)
    assert tried > 5


def make_diagonal() -> Any:
    @sp.kernel
    def diagonal(x: Tensor[f32, N, N], y: Tensor[f32, N]):
        for n in tiles(N):
            y[n] = x[n, n]

    return diagonal


@pytest.mark.parametrize(("extra", "part"), [(0, ""), (1, "bytes 4 to 7")])
def test_strides_that_a_call_gives(extra: int, part: str) -> None:
    """x need not be contiguous: each index must lie inside its own extent."""
    diagonal = make_diagonal()

    def write(a: Any) -> None:
        x, y, n = a.data("x"), a.data("y"), a.extent("N")
        down, right = a.stride("x", 0), a.stride("x", 1)
        x86.add(down, right)
        v = a.xmm()
        with a.loop(0, n) as i:
            x86.vmovss(v, x86.ptr[x])
            x86.vmovss(x86.ptr[y + i * 4 + 4 * extra], v)
            x86.lea(x, x86.ptr[x + down * 4])
        x86.ret()

    diagonal.assembly(features="avx", contiguous="y")(write)
    assembly = build(diagonal, diagonal.by_hand[0])
    if not part:
        inside, left = shown(assembly, ZEN4)
        assert len(inside) == 7 and not left
    else:
        with pytest.raises(AssemblyError) as caught:
            shown(assembly, ZEN4)
        assert part in caught.value.found and "N = 1" in caught.value.found


def test_a_tensor_that_need_not_be_contiguous_is_no_row() -> None:
    diagonal = make_diagonal()

    def write(a: Any) -> None:
        x86.vmovss(a.xmm(), x86.ptr[a.data("x") + 4])
        x86.ret()

    diagonal.assembly(features="avx", contiguous="y")(write)
    with pytest.raises(AssemblyError, match="reaches outside x") as caught:
        shown(build(diagonal, diagonal.by_hand[0]), ZEN4)
    assert "times x.stride.1" in caught.value.expected
