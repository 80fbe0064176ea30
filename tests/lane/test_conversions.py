"""Ways from one distribution of a tile to another, or out to memory: they lead there, and what they cost."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sapper.lane import fragments
from sapper.lane.banks import PHASE_BYTES
from sapper.lane.conversions import MEETINGS, NEAR_MEMORY, Price, Way, cheapest, conversions, moved, turned
from sapper.lane.fragment_stores import fragment, in_rows
from sapper.lane.layout import LANE, REGISTER, Exchange, Factor, Layout, LayoutError
from sapper.targets.ptx.target import MOVES
from tests.strategies.amount import examples


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """Bits of two axes in any order over 32 lanes and 1 to 32 registers; some registers more on top."""
    levels = draw(st.permutations([LANE] * 5 + [REGISTER] * draw(st.integers(0, 5))))
    order = {level: draw(st.permutations([i for i, one in enumerate(levels) if one == level]))
             for level in (LANE, REGISTER)}
    cut = draw(st.integers(0, len(levels)))
    bits = [Factor(2, level, 1 << order[level].index(i)) for i, level in enumerate(levels)]
    return Layout({"m": tuple(bits[:cut]), "n": tuple(bits[cut:])})


@settings(max_examples=examples(120), deadline=None)
@given(layouts(), st.data())
def test_every_way_leads_where_it_says(source: Layout, data: st.DataObject) -> None:
    """Steps on registers do what storing in the one distribution and loading in the other does."""
    target = data.draw(layouts())
    assume(target.shape == source.shape)
    tile = np.arange(np.prod(list(source.shape.values()))).reshape(list(source.shape.values()))
    ways = conversions(source, target, MOVES)
    assert {way.name for way in ways} <= {"as it is", "names", "shuffles", NEAR_MEMORY}
    for way in ways:
        rows = source.spread(tile)
        for step in way.steps:
            rows = step.apply(rows)
        if way.name != NEAR_MEMORY:
            np.testing.assert_array_equal(rows, target.spread(tile))
    free = [way for way in ways if way.name in ("as it is", "names")]
    assert not free or cheapest(ways, MOVES) is free[0]


@settings(max_examples=examples(120), deadline=None)
@given(layouts(), st.integers(1, 2), st.sampled_from("mn"))
def test_turned_lanes_have_neighbours(source: Layout, bits: int, axis: str) -> None:
    try:
        after = turned(source, axis, bits)
    except LayoutError:
        return
    tile = np.arange(np.prod(list(source.shape.values()))).reshape(list(source.shape.values()))
    way = next(way for way in conversions(source, after, MOVES) if way.name == "shuffles")
    assert len(way.steps) == bits and all(isinstance(step, Exchange) for step in way.steps)
    rows = source.spread(tile)
    for step in way.steps:
        rows = step.apply(rows)
    np.testing.assert_array_equal(rows, after.spread(tile))


def test_fragments_are_those_of_the_instruction() -> None:
    """In the order in which sums stand: 16 rows x 8 columns have registers 0 and 1 of the first 8 rows, then 2, 3."""
    place = fragment(16, 8).place({"m": fragments.C[0], "n": fragments.C[1]})
    np.testing.assert_array_equal(place[REGISTER], np.broadcast_to(np.arange(4)[:, None], (4, 32)))
    np.testing.assert_array_equal(place[LANE], np.broadcast_to(np.arange(32), (4, 32)))


def test_weights_of_attention_are_operands_by_name() -> None:
    """Sums of 16 x 16, two neighbours packed, are registers of the left operand of the next product."""
    words = Layout.parse("m: 2@register × 8@lane; n: 2@register × 4@lane")
    operand = Layout.parse("m: 2@register(stride 1) × 8@lane; n: 2@register(stride 2) × 4@lane")
    way = cheapest(conversions(words, operand, MOVES), MOVES)
    assert (way.name, way.price) == ("names", Price())
    rows, columns = (places[:, 0] for places in fragments.A)       # of the first slot
    place = operand.place({"m": rows, "n": columns // 2})
    np.testing.assert_array_equal(place[REGISTER], np.broadcast_to(np.arange(4)[:, None], (4, 32)))
    np.testing.assert_array_equal(place[LANE], np.broadcast_to(np.arange(32), (4, 32)))


def test_a_square_is_best_turned_in_near_memory() -> None:
    """Five rounds of 16 exchanges against 32 stores and 32 loads; a word after each row keeps banks apart."""
    rows, columns = Layout.parse("m: 32@register; n: 32@lane"), Layout.parse("m: 32@lane; n: 32@register")
    found = {way.name: way.price for way in conversions(rows, columns, MOVES)}
    assert found["shuffles"] == Price(5 * 16 * 4, 5 * 16)
    assert found[NEAR_MEMORY] == Price(64 + MEETINGS, 64, 0, 32 * 33 * 4)
    unpadded = next(way for way in conversions(rows, columns, MOVES, 0) if way.name == NEAR_MEMORY)
    assert unpadded.price.passes == 32 + 8 * 32      # loads of 16 bytes, all of whose lanes meet in four banks


@pytest.mark.parametrize(("columns", "element_bytes", "best"), [(64, 4, 0), (64, 2, 1), (32, 2, 1), (8, 2, 0)])
def test_wide_elements_fill_sectors_and_narrow_ones_are_turned(columns: int, element_bytes: int, best: int) -> None:
    packed = element_bytes == 2
    held, prices = fragment(64, columns, packed), []
    for bits in (0, 1, 2):
        try:
            after = turned(held, "n", bits)
        except LayoutError:
            break
        price = moved(after, "n", 4, MOVES)
        if bits:
            price += next(way.price for way in conversions(held, after, MOVES) if way.name == "shuffles")
        prices.append(Way(str(bits), after, price))
    assert cheapest(prices, MOVES).name == str(best)
    full = 64 * columns * element_bytes // MOVES.sector_bytes
    assert [way.price.sectors for way in prices[:2]] == [full * (2 if packed else 1), full][:len(prices)]


def test_rows_that_start_anywhere_go_through_near_memory() -> None:
    """Element by element from fragments a store touches eight sectors, and in rows four or five."""
    held = fragment(64, 64)
    for aligned, best in ((False, NEAR_MEMORY), (True, "as it is")):
        rows = in_rows(64, 64, 32, False, aligned)
        through = next(way for way in conversions(held, rows, MOVES, 32) if way.name == NEAR_MEMORY)
        ways = [Way("as it is", held, moved(held, "n", 4, MOVES, aligned)),
                Way(NEAR_MEMORY, rows, through.price + moved(rows, "n", 4, MOVES, aligned))]
        assert cheapest(ways, MOVES).name == best


def test_near_memory_that_keeps_workers_away_costs_their_work() -> None:
    held = fragment(16, 32)
    ways = [Way("shuffles", held, Price(issued=600)), Way(NEAR_MEMORY, held, Price(issued=400, near_bytes=30 << 10))]
    assert cheapest(ways, MOVES, 1, 40 << 10, 80 << 10).name == NEAR_MEMORY
    assert cheapest(ways, MOVES, 2, 40 << 10, 80 << 10).name == "shuffles"      # one worker in place of two
    assert cheapest(ways, MOVES, 4, 40 << 10, 80 << 10).name == "shuffles"      # it has no room at all


@given(st.sampled_from([(1, 4), (2, 4), (4, 4), (2, 2), (4, 2)]), st.integers(1, 4))
def test_moved_counts_bytes(run_and_size: tuple[int, int], repeats: int) -> None:
    """Of lanes side by side: each 128 bytes a pass, each 32 a sector."""
    run, size = run_and_size
    held = Layout.parse(f"m: {repeats}@register; n: 32@lane × {run}@register")
    price = moved(held, "n", size, MOVES)
    at_once = 32 * run * size
    assert price == Price(repeats, repeats * -(-at_once // PHASE_BYTES), repeats * at_once // 32)


