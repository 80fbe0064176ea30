"""Indices of every kind against the interpreter: a call is refused where an element is outside, and only there."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sapper as sp
from sapper import Tensor, each, f32, i8, i32, kernel, span, tiles, u8, whole
from sapper.lang.errors import CallError, KernelError
from sapper.runtime.arguments import Parameter, Signature
from sapper.tile import eager
from sapper.tile.interpret import interpret
from tests.strategies import examples

from .test_random_kernels import kernel_of

K, M, N, T = sp.dims("K M N T")
REFUSALS = ("write-race", "out-of-bounds", "bad-range", "store-axes", "read-after-write", "stores-nothing")


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


@st.composite
def sources(draw: st.DrawFn) -> str:
    """Loops of several kinds, perhaps a branch, and an access at an index made of all that is at hand."""
    lines = ["@kernel", "def k(x: Tensor[i32, T], a: Tensor[i32, A], b: Tensor[i32, B], p: i32, flag: bool):"]
    names: list[str] = []
    indent = "    "
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
        if kind.startswith("tiles"):
            lines.append(f"{indent}{name.upper()} = {name} + 0")

    def number(depth: int, scalar: bool = False) -> str:
        leaves = [n for n in names if n.islower() or not scalar] + ["p", "A", "2", "5"]
        if depth == 0 or draw(st.integers(0, 4)) == 0:
            return draw(st.sampled_from(leaves))
        left, right = number(depth - 1, scalar), number(depth - 1, scalar)
        by = draw(st.sampled_from(["2", "3", "4", "7", "B"]))
        forms = [f"({left} + {right})", f"({left} - {right})", f"{left} * {by}", f"{left} // {by}", f"{left} % {by}",
                 f"{left} * {by} % 7", f"minimum({left}, {right})", f"maximum({left}, {right})", f"abs({left} - {right})"]
        if not scalar:
            forms.append(f"where({left} < {right}, {right}, {left} + 1)")
        return draw(st.sampled_from(forms))

    if draw(st.booleans()):
        tests = [f"{number(1, True)} {draw(st.sampled_from(['<', '>=', '==', '!=']))} {number(1, True)}"
                 for _ in range(draw(st.integers(1, 2)))]
        test = draw(st.sampled_from([" and ", " or "])).join([*tests, *draw(st.sampled_from([[], ["flag"], ["not flag"]]))])
        lines.append(f"{indent}if {test}:")
        indent += "    "
    spread = " + ".join([f"0 * {name}" for name in names if name.isupper()] or ["0"])
    lines.append(f"{indent}x[{number(3)} + {spread}] += 1")
    return "\n".join(lines) + "\n"


@settings(max_examples=examples(200))
@given(sources(), st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 9)), st.integers(-2, 6), st.booleans())
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
    assert refused(k, arguments, outside or x.any()) == outside, source


@settings(max_examples=examples(60))
@given(sources(), st.integers(0, 6), st.booleans())
def test_with_extents_fixed_the_kernel_is_refused_at_once(source: str, p: int, flag: bool) -> None:
    k = kernel_of("A, B, T = dims('A B T')\n" + source)
    arguments = {"x": np.zeros(5, np.int32), "a": np.zeros(4, np.int32), "b": np.zeros(3, np.int32), "p": p, "flag": flag}
    try:
        k.tile_ir({"A": 4, "B": 3, "T": 5})
    except KernelError as error:
        if error.kind == "out-of-bounds" and not any(word in source for word in ("if ", "p")):
            with pytest.raises(IndexError):
                eager.run(k, arguments)
