"""Layouts: text, maps, algebra, and conversions that are executed on arrays."""

from __future__ import annotations

from math import prod

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sapper.kernels.matmul import matmul_nn_f32, matmul_nt_f32
from sapper.lane.layout import (
    LANE,
    MEMORY,
    REGISTER,
    SLOT,
    WARP,
    Conversion,
    Exchange,
    Factor,
    LaneSwap,
    Layout,
    LayoutError,
    Rename,
    ThroughMemory,
    convert,
)
from sapper.lane.lower import result_layouts
from sapper.tile.canonical import canonicalize
from sapper.tile.reduce_loops import reduce_loops
from sapper.tile.schedule import DimClass, Facts, Schedule, Specialization
from tests.strategies import examples
from tests.strategies.malformed import mutations, refusals

ACCUMULATORS = "m: 14@register; n: 2@register × 16@lane"
FRAGMENT = "m: 2@register × 8@lane(stride 4); n: 4@lane × 2@register"


def strided(axes: dict[str, list[tuple[int, str]]], order: list[tuple[str, int]]) -> Layout:
    """A layout whose factors take their strides in `order` (axis, position), the first the smallest of its level."""
    strides: dict[tuple[str, int], int] = {}
    level_extent: dict[str, int] = {}
    for axis, i in order:
        extent, level = axes[axis][i]
        strides[axis, i] = level_extent.get(level, 1)
        level_extent[level] = level_extent.get(level, 1) * extent
    return Layout({a: tuple(Factor(e, level, strides[a, i]) for i, (e, level) in enumerate(factors))
                   for a, factors in axes.items()})


@st.composite
def layouts(draw: st.DrawFn, levels: tuple[str, ...] = (REGISTER, LANE, SLOT, WARP, MEMORY)) -> Layout:
    axes: dict[str, list[tuple[int, str]]] = {axis: [] for axis in "mnk"[: draw(st.integers(1, 3))]}
    for _ in range(draw(st.integers(0, 5))):
        level = draw(st.sampled_from(levels))
        extents = [2, 4] if level in (LANE, SLOT) else [2, 3]
        axes[draw(st.sampled_from(list(axes)))].append((draw(st.sampled_from(extents)), level))
    return strided(axes, draw(st.permutations([(a, i) for a, factors in axes.items() for i in range(len(factors))])))


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Layout, Layout]:
    """Two layouts of one tile: bits of its axes dealt anew to 8 lanes and to registers, and one odd register factor."""
    lanes = 3
    bits = {"m": draw(st.integers(0, 4)), "n": draw(st.integers(0, 4))}
    while sum(bits.values()) < lanes:
        bits["n"] += 1
    odd = draw(st.sampled_from([1, 3, 7]))
    made = []
    for _ in range(2):
        places = [(a, i) for a in bits for i in range(bits[a])]
        chosen = set(draw(st.permutations(places))[:lanes])
        axes = {a: [(2, LANE if (a, i) in chosen else REGISTER) for i in range(bits[a])] for a in bits}
        axes["m"].insert(0, (odd, REGISTER))
        made.append(strided(axes, draw(st.permutations([(a, i) for a, fs in axes.items() for i in range(len(fs))]))))
    return made[0], made[1]


def elements(layout: Layout) -> list[dict[str, int]]:
    shape = layout.shape
    return [dict(zip(shape, map(int, index), strict=True)) for index in np.ndindex(*shape.values())]


# Text.


@pytest.mark.parametrize("text", [
    ACCUMULATORS, "m: 1; n: 4@register × 16@lane", "m: 2@slot", "m: 3@memory(stride 100); n: 64@memory",
    "k: 8@lane(stride 1); m: 4@lane(stride 8)", "b: 4@warp; m: 2@register × 8@lane(stride 4); n: 4@lane × 2@register",
])
def test_text_is_read_back(text: str) -> None:
    layout = Layout.parse(text)
    assert Layout.parse(str(layout)) == layout


def test_strides_are_printed_only_where_they_say_something() -> None:
    assert str(Layout.parse(ACCUMULATORS)) == ACCUMULATORS
    assert str(Layout.parse(FRAGMENT)) == FRAGMENT.replace("(stride 4)", "")
    assert str(Layout.parse("m: 4@lane(stride 1); n: 4@lane(stride 4)")) == "m: 4@lane(stride 1); n: 4@lane(stride 4)"


@given(layouts())
@settings(max_examples=examples(60))
def test_random_text_is_read_back(layout: Layout) -> None:
    again = Layout.parse(str(layout))
    assert again == layout and hash(again) == hash(layout)


@pytest.mark.parametrize(("text", "said"), [
    ("m", "expected AXIS"), ("m: 2@register; m: 3@register", "each axis once"),
    ("m: 2@core", "LEVEL one of slot, lane"),
    ("m: 2", "expected EXTENT@LEVEL"), ("m: x@lane", "found 'x@lane'"), ("m: 6@lane", "expected powers of two"),
    ("m: 3@slot", "expected powers of two"), ("m: 0@register", "expected both >= 1"),
    ("m: 4@register(stride 1); n: 2@register(stride 2)", "two elements share a place"),
    ("m: 4@register(stride 2)", "a place stays empty"), ("m: 4@memory(stride 2); n: 3@memory", "share a place"),
])
def test_what_is_no_layout(text: str, said: str) -> None:
    with pytest.raises(LayoutError, match=said.replace("(", r"\(")):
        Layout.parse(text)


# Maps.


def test_places_of_a_tensor_core_fragment() -> None:
    layout = Layout.parse(FRAGMENT)
    assert layout.shape == {"m": 16, "n": 8}
    for m in range(16):
        for n in range(8):
            # c0, c1 are row lane / 4, columns 2 * (lane % 4) + 0, 1; c2, c3 the same, 8 rows below.
            assert layout.place({"m": m, "n": n}) == {REGISTER: m // 8 * 2 + n % 2, LANE: m % 8 * 4 + n // 2}


@given(layouts())
@settings(max_examples=examples(60))
def test_elements_and_places_are_one_to_one(layout: Layout) -> None:
    seen = set()
    for element in elements(layout):
        place = layout.place(element)
        assert layout.element(place) == element
        seen.add(tuple(place.items()))
    assert len(seen) == prod(layout.shape.values()) == prod(layout.level_extent(level) for level in layout.levels)


def test_padded_memory_has_places_without_an_element() -> None:
    layout = Layout.parse("m: 3@memory(stride 10); n: 7@memory")
    assert layout.level_extent(MEMORY) == 27
    assert [layout.element(layout.place(e)) for e in elements(layout)] == elements(layout)
    with pytest.raises(LayoutError, match="holds no element"):
        layout.element({MEMORY: 8})
    with pytest.raises(LayoutError, match="no inverse"):
        layout.inverse()


def test_coordinates_are_checked() -> None:
    layout = Layout.parse(ACCUMULATORS)
    with pytest.raises(LayoutError, match="coordinate m: found 14; expected 0 to 13"):
        layout.place({"m": 14, "n": 0})
    with pytest.raises(LayoutError, match="found no coordinate n"):
        layout.place({"m": 1})


@given(layouts((REGISTER, LANE)))
@settings(max_examples=examples(40))
def test_spread_and_collect(layout: Layout) -> None:
    tile = np.arange(prod(layout.shape.values())).reshape(tuple(layout.shape.values()))
    rows = layout.spread(tile)
    assert np.array_equal(layout.collect(rows), tile)
    for element in elements(layout)[:50]:
        place = layout.place(element)
        assert rows[place.get(REGISTER, 0), place.get(LANE, 0)] == tile[tuple(element.values())]


def test_spread_wants_its_levels_and_shape() -> None:
    with pytest.raises(LayoutError, match="found elements at level warp"):
        Layout.parse("m: 2@warp").spread(np.zeros(2))
    with pytest.raises(LayoutError, match="found a tile of shape"):
        Layout.parse("m: 2@lane").spread(np.zeros(3))
    with pytest.raises(LayoutError, match="found places of shape"):
        Layout.parse("m: 2@lane").collect(np.zeros((2, 2)))


# Algebra.


@given(layouts())
@settings(max_examples=examples(60))
def test_inverse(layout: Layout) -> None:
    inverse = layout.inverse()
    for element in elements(layout):
        assert {**dict.fromkeys(layout.shape, 0), **inverse.place(layout.place(element))} == element
    identity = layout.then(inverse)
    assert all(identity.place(e).get(axis, 0) == e[axis] for e in elements(layout) for axis in e)


def test_inverse_in_words() -> None:
    inverse = Layout.parse(ACCUMULATORS).inverse()
    assert str(inverse) == "register: 14@m × 2@n; lane: 16@n"
    assert inverse.axes["register"] == (Factor(14, "m", 1), Factor(2, "n", 16))
    assert Layout.parse(str(inverse), ("m", "n")) == inverse


@given(pairs())
@settings(max_examples=examples(60))
def test_composition(both: tuple[Layout, Layout]) -> None:
    first, second = both
    moves = first.inverse().then(second)
    for element in elements(first):
        place = second.place(element)
        assert {**dict.fromkeys(place, 0), **moves.place(first.place(element))} == place


@given(pairs(), pairs())
@settings(max_examples=examples(30))
def test_composition_is_associative(one: tuple[Layout, Layout], two: tuple[Layout, Layout]) -> None:
    if one[0].shape != two[0].shape:
        two = one[::-1]
    a, b, c = one[0], one[0].inverse(), two[1]
    assert a.then(b.then(c)) == a.then(b).then(c) == c


def test_factors_that_cross_do_not_compose() -> None:
    first = Layout.parse("x: 2@register × 3@warp")
    second = Layout({"register": (Factor(2, "y", 1),), "warp": (Factor(3, "z", 1),)})
    assert str(first.then(second)) == "x: 2@y × 3@z"
    with pytest.raises(LayoutError, match="expected an axis of the second layout"):
        first.then(Layout.parse("register: 2@lane"))
    with pytest.raises(LayoutError, match="divides the other"):
        Layout.parse("x: 2@register(stride 1) × 3@register(stride 2)").then(
            Layout.parse("register: 2@register × 3@memory"))
    with pytest.raises(LayoutError, match="expected at most 2 places"):
        Layout.parse("x: 4@register").then(Layout.parse("register: 2@lane"))


# What the model chooses.


def test_layouts_of_a_matrix_product() -> None:
    function = matmul_nn_f32.tile_ir()
    reduce_loops(function)
    canonicalize(function)
    contiguous = Specialization(strides=dict.fromkeys("abc", "contiguous"))
    chosen = result_layouts(function, Schedule(), Facts(lanes=16, vector_registers=32), contiguous)
    assert [(op.name, str(layout)) for op, layout in chosen.items()] == [("contract", ACCUMULATORS)]
    chosen = result_layouts(function, Schedule(registers={"m": 5, "n": 3}), Facts(lanes=8), contiguous)
    assert list(map(str, chosen.values())) == ["m: 5@register; n: 3@register × 8@lane"]
    chosen = result_layouts(function, Schedule(lane="k", registers={"m": 3, "n": 2}), Facts(), contiguous)
    assert list(map(str, chosen.values())) == ["m: 3@register; n: 2@register; k: 16@lane"]


def test_three_rows_at_once_whether_or_not_they_divide_the_extent() -> None:
    """Of 16 registers twelve sums of dot products leave one of the other operand's and three rows'."""
    function = reduce_loops(matmul_nt_f32.tile_ir())
    canonicalize(function)
    known = Specialization({"M": DimClass(8), "N": DimClass(512, 64), "K": DimClass(512, 64)},
                           dict.fromkeys("abc", "contiguous"))
    chosen = result_layouts(function, Schedule(), Facts(lanes=8, vector_registers=16), known)
    assert list(map(str, chosen.values())) == ["m: 4@register; n: 3@register; k: 8@lane"]


# Conversions.


@given(pairs())
@settings(max_examples=examples(150))
def test_conversions_move_every_element(both: tuple[Layout, Layout]) -> None:
    source, target = both
    tile = np.arange(prod(source.shape.values())).reshape(tuple(source.shape.values()))
    plan = convert(source, target)
    assert np.array_equal(plan.apply(source.spread(tile)), target.spread(tile))
    assert plan.kind in ("none", "rename", "shuffle")
    assert (plan.kind == "shuffle") == any(isinstance(s, (Exchange, LaneSwap)) for s in plan.steps)
    assert (plan.kind == "none") == (source == target)


def test_a_square_is_transposed_by_one_exchange_for_each_bit() -> None:
    plan = convert(Layout.parse("m: 16@register; n: 16@lane"), Layout.parse("m: 16@lane; n: 16@register"))
    assert plan == Conversion("shuffle", tuple(Exchange(d, d) for d in (1, 2, 4, 8)))


def test_registers_change_their_names() -> None:
    plan = convert(Layout.parse("m: 3@register; n: 2@register × 4@lane"),
                   Layout.parse("m: 3@register(stride 1); n: 2@register(stride 3) × 4@lane"))
    assert plan == Conversion("rename", (Rename((0, 2, 4, 1, 3, 5)),))
    source = Layout.parse("m: 2@register(stride 1) × 3@register(stride 2)")
    plan = convert(source, Layout.parse("m: 3@register(stride 1) × 2@register(stride 3)"))   # factors that cross
    assert plan == Conversion("rename", (Rename((0, 4, 3, 2, 1, 5)),))


def test_lanes_are_swapped_without_a_register_to_spare() -> None:
    plan = convert(Layout.parse("m: 2@lane; n: 2@lane"), Layout.parse("m: 2@lane(stride 1); n: 2@lane(stride 2)"))
    assert plan == Conversion("shuffle", (LaneSwap(1, 2),))


@pytest.mark.parametrize(("source", "target"), [
    ("m: 4@register; n: 4@lane", "m: 4@memory; n: 4@memory"),
    ("m: 4@warp; n: 4@lane", "m: 4@lane; n: 4@warp"),
    ("m: 4@slot; n: 4@register", "m: 4@register; n: 4@slot"),
    ("m: 4@register × 4@lane", "m: 2@register × 8@lane"),
])
def test_what_goes_through_memory(source: str, target: str) -> None:
    plan = convert(Layout.parse(source), Layout.parse(target))
    (step,) = plan.steps
    assert plan.kind == "memory" and isinstance(step, ThroughMemory)
    before, after = Layout.parse(source), Layout.parse(target)
    tile = np.arange(prod(before.shape.values())).reshape(tuple(before.shape.values()))
    assert np.array_equal(plan.apply(before.spread(tile, step.levels)), after.spread(tile, step.levels))


def test_tiles_of_other_extents_are_not_converted() -> None:
    with pytest.raises(LayoutError, match="the same axes and extents"):
        convert(Layout.parse("m: 4@lane"), Layout.parse("m: 8@lane"))


def test_a_thousand_malformed_texts() -> None:
    """Each is a layout, which prints and parses back, or is refused."""
    def parse(text: str) -> None:
        layout = Layout.parse(text)
        assert Layout.parse(str(layout)) == layout

    texts = ["m: 14@register; n: 2@register × 16@lane", "m: 2@register × 8@lane(stride 4); n: 4@lane × 2@register",
             "k: 2@slot; m: 1; n: 3@memory(stride 70) × 64@memory"]
    pieces = ("@lane", "×", "(stride 0)", "(stride 2)", "2@", "; n: 4@warp")
    found = refusals(mutations(texts, pieces), parse, LayoutError)
    assert 800 < len(found) < 1000
