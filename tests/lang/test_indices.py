"""Indices of every kind against the interpreter: a call is refused where an element is outside, and only there."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sapper as sp
from sapper import Tensor, each, f32, i8, i32, kernel, span, tiles, u8
from sapper.lang.errors import CallError, KernelError
from sapper.runtime.arguments import Parameter, Signature
from sapper.tile import eager
from sapper.tile.interpret import interpret
from tests.strategies import examples

from .test_random_kernels import kernel_of

K, M, N, T = sp.dims("K M N T")
REFUSALS = ("write-race", "out-of-bounds", "bad-range", "store-axes", "read-after-write", "stores-nothing",
            "carried-type")


def refused(k: Any, arguments: dict[str, Any], touched: bool = True) -> bool:
    """Whether a call is, by what the kernel requires; where nothing is touched, but for what is asked of extents alone
    (docs/ir.md)."""
    signature = Signature(k.name, [Parameter.of(name, type) for name, type in k.parameters])
    binding = signature.bind(tuple(arguments[name] for name, _ in k.parameters))
    requires = k.tile_ir().attributes.get("requires", ())
    try:
        signature.check_requires(binding, [row for row in requires if touched or row[1] == "indexed"])
    except CallError:
        return True
    return False


EXTENTS = st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 9))


@st.composite
def sources(draw: st.DrawFn) -> str:
    """Loops of several kinds, perhaps a branch, and an access at an index made of all that is at hand."""
    lines = ["@kernel", "def k(x: Tensor[i32, T], a: Tensor[i32, A], b: Tensor[i32, B], p: i32, flag: bool):"]
    names: list[str] = []
    indent, carried = "    ", 0
    if draw(st.integers(0, 3)) == 0:
        lines.append(f"    q = {draw(st.sampled_from(['0', '1', 'p', 'A', 'p - 1']))}")
    for name in "ijk"[:draw(st.integers(1, 3))]:
        around = [n for n in names if n.islower()]
        ends = ["A", "B", "A // 2", "3"] + [f"{n} + 1" for n in around] + ["p", "minimum(p + 2, A)"]
        start, stop = draw(st.sampled_from(["0", "0", "1", *around])), draw(st.sampled_from(ends))
        kind = draw(st.sampled_from(["each(span({}, {}))", "range({}, {})", "range({}, {}, 2)", "tiles(span({}, {}))",
                                     "whole(span({}, {}))"]))
        if kind.startswith("whole"):
            lines.append(f"{indent}{name} = {kind.format(start, stop)}")
            names.append(name.upper())
            lines.append(f"{indent}{name.upper()} = {name} + 0")
            continue
        lines.append(f"{indent}for {name} in {kind.format(start, stop)}:")
        names.append(name.upper() if kind.startswith("tiles") else name)
        indent += "    "
        if "q = " in lines[2] and len(indent) == 8 and not kind.startswith("tiles"):
            carried = len(indent)
            names.append("q")
        if kind.startswith("tiles"):
            lines.append(f"{indent}{name.upper()} = {name} + 0")

    def number(depth: int, scalar: bool = False) -> str:
        leaves = [n for n in names if n.islower() or not scalar] + ["p", "A", "2", "5"]
        if depth == 0 or draw(st.integers(0, 4)) == 0:
            return draw(st.sampled_from(leaves))
        left, right = number(depth - 1, scalar), number(depth - 1, scalar)
        by = draw(st.sampled_from(["2", "3", "4", "7", "B"]))
        forms = [f"({left} + {right})", f"({left} - {right})", f"{left} * {by}", f"{left} // {by}", f"{left} % {by}",
                 f"{left} * {by} % 7", f"minimum({left}, {right})", f"maximum({left}, {right})",
                 f"abs({left} - {right})"]
        if not scalar:
            forms.append(f"where({left} < {right}, {right}, {left} + 1)")
        return draw(st.sampled_from(forms))

    if draw(st.booleans()):
        tests = [f"{number(1, True)} {draw(st.sampled_from(['<', '>=', '==', '!=']))} {number(1, True)}"
                 for _ in range(draw(st.integers(1, 2)))]
        tests += draw(st.sampled_from([[], ["flag"], ["not flag"]]))
        test = draw(st.sampled_from([" and ", " or "])).join(tests)
        lines.append(f"{indent}if {test}:")
        indent += "    "
    spread = " + ".join([f"0 * {name}" for name in names if name.isupper()] or ["0"])
    lines.append(f"{indent}x[{number(3)} + {spread}] += 1")
    if carried:
        lines.append(f"{' ' * carried}q = q + {draw(st.sampled_from(['1', '2', 'p', 'B', '2 * p', 'q % 3']))}")
    return "\n".join(lines) + "\n"


@settings(max_examples=examples(200))
@given(sources(), EXTENTS, st.integers(-2, 6), st.booleans())
def test_a_call_is_refused_where_an_element_is_outside(source: str, extents: tuple[int, int, int], p: int, flag: bool
                                                       ) -> None:
    k = kernel_of("A, B, T = dims('A B T')\n" + source)
    a, b, t = extents
    arguments: dict[str, Any] = {"x": np.zeros(t, np.int32), "a": np.zeros(a, np.int32), "b": np.zeros(b, np.int32),
                                 "p": p, "flag": flag}
    try:
        function = k.tile_ir()
    except KernelError as error:
        assert error.kind in REFUSALS, source
        return
    x = np.zeros(t, np.int32)
    try:
        interpret(function, arguments | {"x": x})
        outside = False
    except IndexError:
        outside = True
    if "q % 3" not in source:
        assert refused(k, arguments, outside or x.any()) == outside, source


@settings(max_examples=examples(60))
@given(sources(), st.integers(0, 6), st.booleans())
def test_with_extents_fixed_the_kernel_is_refused_at_once(source: str, p: int, flag: bool) -> None:
    k = kernel_of("A, B, T = dims('A B T')\n" + source)
    arguments = {"x": np.zeros(5, np.int32), "a": np.zeros(4, np.int32), "b": np.zeros(3, np.int32), "p": p,
                 "flag": flag}
    try:
        k.tile_ir({"A": 4, "B": 3, "T": 5})
    except KernelError as error:
        if error.kind == "out-of-bounds" and not any(word in source for word in ("if ", "p")):
            with pytest.raises(IndexError):
                eager.run(k, arguments)


@kernel
def rests(x: Tensor[f32, T], y: Tensor[f32, K]):
    for k in tiles(K):
        y[k] = x[5 * k % 7]


@kernel
def chosen(x: Tensor[f32, T], y: Tensor[f32, K]):
    for k in tiles(K):
        y[k] = x[sp.where(k < 3, k + 2, 0)]


@kernel
def stepped(x: Tensor[f32, T], y: Tensor[f32, K]):
    for i in range(1, K, 2):
        y[i] = x[i * 3 % 5]


@kernel
def guarded(x: Tensor[f32, T], y: Tensor[f32, K]):
    for k in each(K):
        for j in range(3):
            if k >= j and not (k == 7 or k > 90):
                y[k] += x[k - j]


@kernel(in_place=[("y", "x")])
def turned(x: Tensor[f32, K], y: Tensor[f32, K]):
    for k in each(K):
        y[k] = x[k * k % 5]


def part(x: Any, y: Any, factor: int) -> None:
    for k in tiles(K):
        y[k] = x[factor * k % 7]


@kernel
def by_call(x: Tensor[f32, T], y: Tensor[f32, K]):
    part(x, y, 3)


@kernel
def narrow(x: Tensor[f32, T], y: Tensor[f32, K]):
    for k in tiles(K):
        y[k] = x[k.to(i8).to(i32) * 2 % 8]


@kernel
def scales(x: Tensor[u8, T], s: Tensor[f32, M], y: Tensor[f32, K]):
    for k in tiles(K):
        y[k] = (x[k // 2].to(i32) >> (4 * (k % 2)).to(i32) & 15).to(f32) * s[sp.where(k < 4, 0, k // 4)]


@pytest.mark.parametrize(("k", "length", "count"), [
    (rests, 7, 9), (rests, 6, 2), (chosen, 5, 9), (chosen, 4, 2), (stepped, 5, 9), (guarded, 9, 9), (by_call, 7, 9),
    (narrow, 7, 300), (turned, 5, 5)])
def test_the_shortest_tensor_is_taken_and_a_shorter_one_refused(k: Any, length: int, count: int) -> None:
    """In every way to call it that runs here."""
    for options in ({}, {"interpret": True}):
        x, y = np.arange(length, dtype=np.float32), np.zeros(count, np.float32)
        k(x, y, **options)
        with pytest.raises(CallError, match=r"(in x\[|since the kernel indexes so far)"):
            k(x[:-1], y[:-1] if k is turned else y, **options)


def test_scales_of_blocks_are_looked_through() -> None:
    x, y = np.full(5, 0x21, np.uint8), np.zeros(9, np.float32)
    scales(x, np.ones(3, np.float32), y)
    assert y.tolist() == [1, 2, 1, 2, 1, 2, 1, 2, 1]
    with pytest.raises(CallError, match=r"index 2 of dimension 0, in s\[sp.where.*\] where M = 2, K = 9"):
        scales(x, np.ones(2, np.float32), y)


def test_the_kernel_is_refused_where_all_is_known() -> None:
    """With the author's line."""
    @kernel
    def fixed(x: Tensor[f32, 6], y: Tensor[f32, 9]):
        for k in tiles(9):
            y[k] = x[5 * k % 7]

    with pytest.raises(KernelError) as caught:
        fixed.tile_ir()
    assert str(caught.value).splitlines()[-3:] == [
        "  found:    an index of 6", "  expected: 0 to 5", "  mend:     take minimum(5 * k % 7, 5), or a longer tensor"]
    assert "y[k] = x[5 * k % 7]" in str(caught.value)
    with pytest.raises(KernelError, match="index 0 of x is negative"):
        rests_below.tile_ir()
    with pytest.raises(KernelError, match="found:    an index of 6"):
        rests(np.zeros(6, np.float32), np.zeros(9, np.float32), static=True)


@kernel
def rests_below(x: Tensor[f32, T], y: Tensor[f32, K]):
    for k in tiles(K):
        y[k] = x[k % 3 - sp.where(k < 5, 3, 4)]


def test_what_is_proved_asks_nothing() -> None:
    @kernel
    def inside(x: Tensor[f32, 7], z: Tensor[f32, M, N], y: Tensor[f32, K], p: i32):
        for k in tiles(K):
            y[k] = x[5 * k % 7] + x[sp.minimum(sp.maximum(p, 0), 6)]
        for block in each(sp.cdiv(N, 4)):
            for m in tiles(M):
                for n in tiles(span(4 * block, sp.minimum(4 * block + 4, N))):
                    z[m, n] = 2.0 * z[m, n]

    assert "requires" not in inside.tile_ir().attributes


def test_what_depends_on_data_is_left_to_the_interpreter() -> None:
    @kernel
    def gather(x: Tensor[f32, T], at: Tensor[i32, K], y: Tensor[f32, K]):
        for k in tiles(K):
            y[k] = x[at[k]]

    assert "requires" not in gather.tile_ir().attributes
    with pytest.raises(IndexError):
        gather(np.zeros(3, np.float32), np.full(2, 3, np.int32), np.zeros(2, np.float32), interpret=True)
