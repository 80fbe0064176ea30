"""Scalars that are part of indices: every way to call a kernel refuses those by which an element is outside."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sapper import (
    Program,
    Rows,
    Tensor,
    Variable,
    bool_,
    cdiv,
    dims,
    each,
    f32,
    i32,
    i64,
    kernel,
    minimum,
    prepare,
    span,
    tiles,
)
from sapper.emulate.kernel import run as emulate
from sapper.runtime.errors import ArgumentError
from tests.strategies import examples

K, P, T = dims("K P T")


@kernel
def append(new: Tensor[f32, T], position: i32, cache: Tensor[f32, P]):
    for t in tiles(T):
        cache[position + t] = new[t]


@kernel
def total(cache: Tensor[f32, P], position: i32, new: Tensor[f32, T], out: Tensor[f32, T]):
    """As attention does: blocks of what is new, each over what was before it."""
    for block in each(cdiv(T, 4)):
        for t in tiles(span(4 * block, minimum(4 * block + 4, T))):
            acc = new[t]
            for p in each(span(0, position + minimum(4 * block + 4, T))):
                acc = acc + cache[p]
            out[t] = acc


@kernel
def either(x: Tensor[f32, T], first: bool_, at: i64, out: Tensor[f32, 1]):
    if first:
        out[0] = x[0]
    else:
        out[0] = x[at * at - 2]


def floats(*shape: int) -> Any:
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


def test_calls_seen_before_are_looked_through_too() -> None:
    """The second call writes the function for the next ones, which machine code then takes."""
    new, cache = floats(3), np.zeros(9, np.float32)
    append.__dict__.pop("_runtime_registry", None)
    for position in (0, 1, 4, 6):
        append(new, position, cache)
        for wrong, index in ((-1, -1), (7, 9), (2**31 - 1, 2**31 + 1)):
            with pytest.raises(ArgumentError, match=rf"index {index} of dimension 0, in cache\[position \+ t\] where"):
                append(new, wrong, cache)
    assert cache.tolist() == [0, 0, 1, 2, 0, 1, 0, 1, 2]
    append(new[:2], 7, cache)
    append(new[:0], 99, cache)          # nothing is stored
    with pytest.raises(ArgumentError):
        append(new[:1], 99, cache)


def test_flags_and_products_are_looked_through() -> None:
    x, out = floats(8) + 1, np.zeros(1, np.float32)
    for _ in range(3):
        for first, at, expected in ((True, 77, 1.0), (False, 3, 8.0), (True, 0, 1.0), (False, -2, 3.0)):
            either(x, first, at, out)
            assert out[0] == expected
        for at in (1, 4, -4, 0):
            with pytest.raises(ArgumentError, match=r"in x\[at \* at - 2\] where T = 8, first = 0, at ="):
                either(x, False, at, out)


def test_bound_calls_take_other_scalars_where_all_stays_inside() -> None:
    new, cache = floats(3), np.zeros(9, np.float32)
    bound = prepare(append, new, 0, cache)
    bound()
    for position in (6, 2):
        bound.set_scalar("position", position)
        bound()
        with pytest.raises(ArgumentError, match="index 9 of dimension 0"):
            bound.set_scalar("position", 7)
        bound()
    assert cache.tolist() == [0, 1, 0, 1, 2, 0, 0, 1, 2]
    with pytest.raises(ArgumentError, match="index -1 of dimension 0"):
        prepare(append, new, -1, cache)


@pytest.mark.parametrize("options", [{"threads": 1}, {"threads": 2}, {"interpret": True}])
def test_programs_take_variables_where_all_stays_inside(options: dict[str, Any]) -> None:
    """Also where it hangs on two of them, and on none that the last run set."""
    new, cache, out = floats(6), np.zeros(9, np.float32), np.zeros(6, np.float32)
    position, count = Variable("position", 0), Variable("count", 2)
    program = Program([(append, (Rows(new, count), position, cache)),
                       (total, (cache, position, Rows(new, count), Rows(out, count)))], **options)
    program()
    program(position=3)
    with pytest.raises(ArgumentError, match="index 9 of dimension 0"):
        program(position=8)
    program(count=6, position=3)
    np.testing.assert_array_equal(cache, [0, 1, 0, 0, 1, 2, 3, 4, 5])
    with pytest.raises(ArgumentError, match=r"in cache\[position \+ t\] where"):
        program(position=4)
    if "interpret" not in options:
        program()                       # as before
        np.testing.assert_array_equal(cache, [0, 1, 0, 0, 1, 2, 3, 4, 5])
    program(count=1, position=8)
    assert cache[8] == 0 and out[0] == cache.sum()
    program(position=7)
    with pytest.raises(ArgumentError):
        program(count=3)
    with pytest.raises(ArgumentError, match="index 10 of dimension 0"):
        Program([(append, (new, Variable("position", 5), cache))], **options)()


@settings(max_examples=examples(25))
@given(st.integers(0, 3), st.integers(0, 5), st.lists(st.tuples(st.integers(-2, 12), st.integers(0, 6)), max_size=5))
def test_any_order_of_values(position: int, count: int, runs: list[tuple[int, int]]) -> None:
    new, cache = floats(6), np.zeros(9, np.float32)
    program = Program([(append, (Rows(new, Variable("count", count)), Variable("position", position), cache))],
                      threads=1)
    for at, rows in runs:
        fits = rows == 0 or 0 <= at <= 9 - rows
        try:
            program(position=at, count=rows)
        except ArgumentError:
            assert not fits
        else:
            assert fits


@pytest.mark.parametrize("target", ["sm_80", "sm_90a"])
def test_kernels_for_gpus_are_looked_through(target: str) -> None:
    new, cache = floats(3), np.zeros(9, np.float32)
    emulate(append, new, 6, cache, target=target)
    assert cache[6:].tolist() == [0, 1, 2]
    for wrong in (-1, 7):
        with pytest.raises(ArgumentError, match=r"in cache\[position \+ t\]"):
            emulate(append, new, wrong, cache, target=target)
