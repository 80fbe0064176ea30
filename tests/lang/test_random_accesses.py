"""Random indices: what the front end proves about loads and stores is true.

A kernel that it accepts gives one result for every tile size, without a race in a loop that it calls parallel, and
stays in bounds where the interpreter does. One that it refuses as out of bounds is.
"""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from sapper.lang.errors import KernelError
from sapper.tile import eager
from sapper.tile.interpret import interpret
from tests.strategies import examples

from .test_random_kernels import kernel_of

SIZE = 40
HEAD = f"@kernel\ndef k(a: Tensor[i32, {SIZE}], g: Tensor[i32, 6], out: Tensor[i32, {SIZE}]):\n"

small = st.integers(-2, 4)
loops = st.sampled_from(["tiles(4)", "each(3)", "range(3)", "tiles(span(1, 5))", "each(span(2, 4))", "range(0, 6, 2)",
                         "range(3, -1, -1)", "range(6, 1, -2)", "each(span(0, g[1]))", "tiles(span(0, g[2]))"])


@st.composite
def programs(draw: st.DrawFn) -> str:
    depth = draw(st.integers(1, 3))
    lines: list[str] = []
    names: list[str] = []
    indent = "    "
    if draw(st.booleans()):
        names.append("w")
        lines.append(f"{indent}w = whole(3)")
    for name in "pqr"[:depth]:
        lines.append(f"{indent}for {name} in {draw(loops)}:")
        names.append(name)
        indent += "    "
        if draw(st.integers(0, 5)) == 0 and "each" in lines[-1]:
            lines.append(f"{indent}if {name} > 0:")
            indent += "    "

    def subscript() -> str:
        terms = [f"{draw(small)} * {name}" for name in names if draw(st.integers(0, 3))]
        if draw(st.integers(0, 7)) == 0:
            terms.append(f"g[{draw(st.sampled_from(names))}]")
        return " + ".join([*terms, str(draw(st.integers(0, 12)))])

    for _ in range(draw(st.integers(1, 3))):
        kind = draw(st.integers(0, 3))
        if kind == 0:
            lines.append(f"{indent}out[{subscript()}] = a[0] + {draw(st.sampled_from(names))}.to(i32)")
        elif kind == 1:
            lines.append(f"{indent}out[{subscript()}] = out[{subscript()}] + 1")
        else:
            lines.append(f"{indent}out[{subscript()}] += a[{subscript()}]")
    return HEAD + "\n".join(lines) + "\n"


@settings(max_examples=examples(150))
@given(programs())
def test_proofs(source: str) -> None:
    k = kernel_of(source)
    arguments = {"a": np.arange(7, 7 + SIZE, dtype=np.int32), "g": np.array([3, 0, 2, 5, 1, 2], np.int32)}

    def fresh() -> np.ndarray:
        return np.full(SIZE, 1000, np.int32)

    try:
        function = k.tile_ir()
    except KernelError as error:
        assert error.kind in ("write-race", "read-after-write", "out-of-bounds", "store-axes"), str(error)
        if error.kind == "out-of-bounds" and "span(0, g" not in source and " if " not in source:  # it does run
            out = fresh()
            try:
                eager.run(k, {**arguments, "out": out})
            except (IndexError, KernelError):
                return
            raise AssertionError(f"refused, but it stays in bounds:\n{source}\n{error}") from error
        return
    results = []
    for size in (None, 1, 2, 3):
        out = fresh()
        try:
            interpret(function, {**arguments, "out": out}, size, check_races=True)
        except IndexError:
            return
        results.append(out)
    for other in results[1:]:
        np.testing.assert_array_equal(other, results[0], err_msg=source)


EXTENTS = st.sampled_from(["A", "B", "A // B", "B // 2", "A - 1", "4"])
DIGITS = st.sampled_from(["{}", "{}", "{}", "({} % 3)", "({} // 2)"])
STRIDES = st.sampled_from(["A", "B", "(A // B)", "1", "2", "A * B", "(A + 1)", "2 * B", "4"])


@st.composite
def strided_programs(draw: st.DrawFn) -> str:
    """Indices whose strides are dimensions."""
    lines = ["@kernel", "def k(a: Tensor[i32, A], b: Tensor[i32, B], out: Tensor[i32, 400]):"]
    names = ["p", "q", "r"][:draw(st.integers(2, 3))]
    indent = "    "
    for at, name in enumerate(names):
        extent = draw(EXTENTS)
        if at and "each" in lines[-1] and draw(st.booleans()):
            start = f"{names[at - 1]} * ({extent})"
            extent = f"span({start}, minimum({start} + {extent}, {draw(EXTENTS)}))"
        lines.append(f"{indent}for {name} in {draw(st.sampled_from(['tiles', 'each', 'each']))}({extent}):")
        indent += "    "
    for _ in range(draw(st.integers(1, 2))):
        terms = [f"{draw(DIGITS).format(name)} * {draw(STRIDES)}" for name in names]
        lines.append(f"{indent}out[{' + '.join([*terms, str(draw(st.integers(0, 3)))])}] = "
                     f"{draw(st.sampled_from(names))}.to(i32)")
    return "\n".join(lines) + "\n"


@settings(max_examples=examples(150))
@given(strided_programs(), st.sampled_from([(3, 2), (1, 4), (4, 1), (6, 3), (5, 2), (2, 6)]))
def test_proofs_with_strides(source: str, extents: tuple[int, int]) -> None:
    try:
        function = kernel_of("A, B = dims('A B')\n" + source).tile_ir()
    except KernelError as error:
        assert error.kind in ("write-race", "out-of-bounds", "bad-range"), str(error)
        return
    results = []
    for size in (None, 1, 2):
        out = np.full(400, -1, np.int32)
        given = {"a": np.zeros(extents[0], np.int32), "b": np.zeros(extents[1], np.int32), "out": out}
        try:
            interpret(function, given, size, check_races=True)
        except IndexError:
            return
        results.append(out)
    for other in results[1:]:
        np.testing.assert_array_equal(other, results[0], err_msg=source)
