"""What a single row meets, read from several places at a time (Requests.row_streams, where nothing is asked again)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sapper import Tensor, bf16, dims, each, f32, i8, i32, kernel, tiles, u8, whole, zeros
from sapper.codegen.pipeline import facts_of, panels_of_kernel
from sapper.kernels import library
from sapper.lane.choices import choices
from sapper.lane.lower import lower
from sapper.lane.register_factors import STAGE_ROWS
from sapper.runtime.packed import pack_array
from sapper.targets.x86_64.target import TARGETS
from sapper.tile.canonical import canonicalize
from sapper.tile.reduce_loops import reduce_loops
from sapper.tile.schedule import DimClass, Facts, Schedule, Specialization
from tests.strategies import examples

from .run_lane import run_lane, specialize
from .test_lower import recorded
from .test_packed import PRODUCTS, arguments_of, expected_of, make_product

ZEN3 = TARGETS["zen3"]
FOLLOWED = facts_of(ZEN3)
ONCE = replace(FOLLOWED, requests=FOLLOWED.requests._replace(places_ahead_bytes=1024))
ASKED = replace(FOLLOWED, requests=FOLLOWED.requests._replace(again=True))
PARTS = replace(FOLLOWED, requests=FOLLOWED.requests._replace(
    panel_parts=5, panel_streams=2, long_row_ahead_bytes=1024))
TYPES = [(f32, f32, f32), (bf16, bf16, f32), (i8, i8, i32), (u8, i8, i32)]
LIBRARY = {entry.name: entry for entry in library()}
KERNELS = {types: PRODUCTS.get(("nt", types)) or make_product("nt", *types) for types in TYPES}


def product(types, m, n, k, facts=FOLLOWED, seed=0, hint=None):
    """The lane IR of a product with packed weights, after it ran and was compared."""
    function = reduce_loops(KERNELS[types].tile_ir())
    if types[0] is f32:
        random = np.random.default_rng(seed)
        arguments = {"a": random.integers(-8, 9, (m, k)).astype(np.float32),
                     "b": random.integers(-8, 9, (n, k)).astype(np.float32), "c": np.full((m, n), np.nan, np.float32)}
    else:
        arguments = arguments_of("nt", types, m, n, k, seed)
    packed = {"b": pack_array(arguments["b"], types[1], panels_of_kernel(KERNELS[types], "b", ZEN3))}
    hints = None if hint is None else {"M": m, "N": hint, "K": k}
    lane = run_lane(function, arguments, facts=facts, specialization=specialize(function, arguments, hints),
                    packed=packed, workers=1 + seed % 2)
    np.testing.assert_array_equal(arguments["c"], expected_of("nt", arguments))
    return lane


@settings(max_examples=examples(40))
@given(m=st.sampled_from([1, 1, 1, 2, 5]), n=st.integers(1, 300), k=st.integers(0, 40), types=st.sampled_from(TYPES),
       hint=st.sampled_from([None, 1024]), seed=st.integers(0, 99))
def test_any_extents(m, n, k, types, hint, seed) -> None:
    """Small integers, of which all sums are exact: panels that are left, a last one with few columns, slots that are
    not full, and what turned bytes begin with, all of each part."""
    product(types, m, n, k, seed=seed, hint=hint)


@pytest.mark.parametrize("types", TYPES, ids=lambda t: f"{t[0].name}-{t[1].name}")
def test_a_single_row_meets_panels_of_four_places(types) -> None:
    """And nobody asks for them; several rows, or where requests help, meet one panel after the other. Where each line
    is asked for once, a step of the depth asks for some of all four, into the first cache."""
    def asks(*arguments):
        return any(op.name == "prefetch" for op in product(types, *arguments).walk())

    assert not asks(1, 256, 32)
    assert asks(1, 256, 32, ASKED) and asks(2, 256, 32)
    lane = product(types, 1, 256, 32, ONCE)
    loops = [[op for op in loop.blocks[0].ops if op.name == "prefetch"] for loop in lane.walk() if loop.name == "loop"]
    most = max(loops, key=len)
    assert most and {op.attributes["level"] for op in most} == {1}
    assert len({(*op.operands, op.attributes["disp"]) for op in most}) == len(most) >= 4


@settings(max_examples=examples(40))
@given(m=st.integers(1, 19), n=st.integers(1, 70), k=st.integers(0, 40), types=st.sampled_from(TYPES),
       hint=st.sampled_from([None, 1024]), seed=st.integers(0, 99))
def test_any_extents_by_parts_of_the_depth(m, n, k, types, hint, seed) -> None:
    """Steps and slots that are left, depths shorter than there are parts, and rows that are left."""
    product(types, m, n, k, PARTS, seed, hint)


@pytest.mark.parametrize("types", TYPES, ids=lambda t: f"{t[0].name}-{t[1].name}")
def test_few_rows_meet_panels_by_parts_of_the_depth(types) -> None:
    """A step of each of five, and requests for what follows it; a single row meets two panels, many one after another.
    """
    def places(rows: int, facts: Facts) -> set[int]:
        """Of each loop over the depth that asks for memory, the most places that a step asks for."""
        loops = [op for op in product(types, rows, 64, 160, facts).walk() if op.attributes.get("label") == "k"]
        return {len({op.operands[0] for op in loop.blocks[0].ops if op.name == "prefetch"}) for loop in loops}

    assert max(places(4, PARTS)) >= 5
    assert max(places(4, FOLLOWED)) <= 2    # the rows' next block besides
    assert max(places(40, PARTS)) <= 2 and max(places(1, PARTS)) == 0


def rows_of_few(name: str, rows: int, columns: int, depth: int, facts: Facts = FOLLOWED) -> tuple[set[int], bool]:
    """The steps of loops over rows of a matrix as it is, which few meet, after the product ran and was compared; and
    whether memory is asked for."""
    entry = LIBRARY[name]
    function = reduce_loops(entry.kernel.tile_ir())
    canonicalize(function)
    arguments = entry.make_arguments(np.random.default_rng(rows), {"M": rows, "N": columns, "K": depth})
    specialization = specialize(function, arguments, {"M": 8, "N": 2048, "K": 2048})
    lane = run_lane(function, arguments, facts=facts, specialization=specialization, workers=1 + rows % 2)
    assert entry.compare(arguments, entry.reference(arguments)) is None
    loops = [op for op in lane.walk() if op.name == "loop" and op.attributes.get("label") == "n"]
    return {op.attributes["step"] for op in loops}, any(op.name == "prefetch" for op in lane.walk())


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("name", "together"), [
    ("matmul_nt_f32", 3), ("matmul_nt_bf16_bf16", 2), ("matmul_nt_residual_f32", 3)])
@pytest.mark.parametrize(("columns", "depth"), [(9, 40), (10, 17), (2, 8), (0, 8), (7, 0)])
def test_rows_that_few_meet_come_from_as_many_places(name: str, together: int, columns: int, depth: int) -> None:
    """Of each part of the rows the next one in each step, and requests along these. Else neighbours are together."""
    for rows in (1, 2, 4, 7):
        assert rows_of_few(name, rows, columns, depth) == ({1}, True)
    assert together in rows_of_few(name, 4, columns, depth, ASKED)[0]


@pytest.mark.parametrize("name", ["matmul_nt_gelu_f32", "matmul_nt_i8"])
def test_rows_are_neighbours_where_much_is_made_of_results_or_these_are_of_bytes(name: str) -> None:
    assert max(rows_of_few(name, 4, 9, 40)[0]) > 1


def places_of(name: str, facts: Facts, rows: int) -> int:
    """How many panels of blocks a nest takes at once."""
    function = reduce_loops(LIBRARY[name].kernel.tile_ir())
    canonicalize(function)
    dims = {"P": DimClass(512, 64), "G": DimClass(32, 16), "B": DimClass(32, 16), "S": DimClass(32, 16),
            "M": DimClass(rows, 1)}
    return choices(function, Schedule(), facts, Specialization(dims)).schedule.tile["p"]


@pytest.mark.parametrize(("name", "places"), [
    ("matmul_q4", 4), ("matmul_residual_q8", 4), ("matmul_q4m_128", 4), ("matmul_swiglu_q4", 1), ("matmul_q4k", 4),
    ("matmul_q6k", 2), ("matmul_swiglu_q4k", 1), ("matvec_q8", 1)])
def test_blocks_of_one_matrix_are_read_in_runs_from_four_places(name: str, places: int) -> None:
    """Not of two matrices, nor where products take longer than memory; of super blocks that are written out, by fewer
    the longer these are; also where other blocks are asked for at a distance of their own."""
    asked = replace(FOLLOWED, requests=FOLLOWED.requests._replace(block_ahead_bytes=8192))
    assert places_of(name, asked, 1) == places_of(name, FOLLOWED, 1) == places
    assert places_of(name, FOLLOWED, 8) == 1
    rolled = replace(FOLLOWED, requests=FOLLOWED.requests._replace(blocks_written_out=False))
    assert places_of(name, rolled, 1) == (1 if "k" in name.removeprefix("matmul_") else places)
    assert places_of(name, replace(FOLLOWED, requests=FOLLOWED.requests._replace(block_places=0)), 1) == 1


P, G = dims("P G")


@kernel
def summed(w: Tensor[i8, P, G, 16, 4], x: Tensor[u8, G, 4], y: Tensor[i32, P]):
    """A number for each panel: one row of several sums over lanes, were these neighbours."""
    for p in tiles(P):
        l, i = whole(16), whole(4)
        acc = zeros(p, l, dtype=i32)
        for g in each(G):
            acc += w[p, g, l, i] @ x[g, i]
        y[p] = sum(acc, over=l)


@pytest.mark.parametrize("panels", [1, 8, 11, 32])
def test_sums_over_lanes_that_come_from_several_places_are_no_neighbours(panels: int) -> None:
    random = np.random.default_rng(panels)
    arguments = {"w": random.integers(-9, 10, (panels, 6, 16, 4)).astype(np.int8),
                 "x": random.integers(0, 10, (6, 4)).astype(np.uint8), "y": np.zeros(panels, np.int32)}
    function = reduce_loops(summed.tile_ir())
    canonicalize(function)
    made = choices(function, Schedule(), FOLLOWED, Specialization({"P": DimClass(512, 1), "G": DimClass(32, 1)}))
    assert made.schedule.tile["p"] == 4
    run_lane(function, arguments, facts=FOLLOWED, specialization=specialize(function, arguments, {"P": 512, "G": 32}))
    np.testing.assert_array_equal(arguments["y"], np.einsum("pgli,gi->p", arguments["w"].astype(int), arguments["x"]))


@pytest.mark.parametrize("panels", [1, 3, 4, 11, 32])
def test_panels_of_blocks_that_are_left(panels: int) -> None:
    entry = LIBRARY["matmul_q4m_by32"]
    arguments = entry.make_arguments(np.random.default_rng(panels), {"P": panels, "G": 3, "C": 1, "M": 1}).values()
    function = reduce_loops(entry.kernel.tile_ir())
    named = dict(zip([v.name for v in function.arguments], arguments, strict=True))
    expected = run_on(function, {**named, "y": named["y"].copy()}, Facts())
    found = run_on(function, named, FOLLOWED)
    np.testing.assert_allclose(found, expected, rtol=1e-6)      # an addition more is fused, or fewer


@settings(max_examples=examples(20))
@given(name=st.sampled_from(["expert_matvec_f32", "expert_matvec_swiglu_bf16"]), width=st.integers(1, 70),
       depth=st.integers(0, 30), seed=st.integers(0, 99))
def test_the_depth_comes_from_several_places(name, width, depth, seed) -> None:
    """Steps that are left, and pieces of a row of which some are not whole."""
    entry = LIBRARY[name]
    shape = {"E": 3, "K": 2, "B": 2, "I": depth, "L": width}
    arguments = dict(zip([v.name for v in entry.kernel.tile_ir().arguments],
                         entry.make_arguments(np.random.default_rng(seed), shape).values(), strict=True))
    plain, found = ({**arguments, "y": arguments["y"].copy()} for _ in range(2))
    run_lane(reduce_loops(entry.kernel.tile_ir()), plain, facts=Facts())
    run_lane(reduce_loops(entry.kernel.tile_ir()), found, facts=FOLLOWED)
    # Sums of at most 30 products of about 1 in another order, each rounded to 2^-24.
    np.testing.assert_allclose(found["y"], plain["y"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["expert_matvec_f32", "expert_matvec_swiglu_bf16"])
def test_nobody_asks_for_what_comes_from_several_places(name: str) -> None:
    """But where memory is best read line by line."""
    entry = LIBRARY[name]
    arguments = dict(zip([v.name for v in entry.kernel.tile_ir().arguments], entry.make_arguments(
        np.random.default_rng(0), {"E": 2, "K": 1, "B": 1, "I": 16, "L": 32}).values(), strict=True))

    def asks(facts):
        lane = run_lane(reduce_loops(entry.kernel.tile_ir()), {**arguments}, facts=facts)
        return any(op.name == "prefetch" for op in lane.walk())

    assert asks(ASKED) and not asks(FOLLOWED)
    by_line = FOLLOWED.requests._replace(line_by_line=True)
    assert asks(replace(FOLLOWED, requests=by_line._replace(places_ahead_bytes=512)))
    assert not asks(replace(FOLLOWED, requests=by_line))


@pytest.mark.parametrize(("typical", "vectors"), [(64, 4), (2048, 6)])
def test_a_piece_is_at_most_half_of_a_short_axis(typical: int, vectors: int) -> None:
    """Else few extents of its class have a whole one, and the others are walked by single vectors."""
    function = reduce_loops(LIBRARY["expert_matvec_swiglu_f32"].kernel.tile_ir())
    canonicalize(function)
    dims = {"E": DimClass(16, 16), "B": DimClass(32, 16), "K": DimClass(6, 1), "I": DimClass(1024, 64),
            "L": DimClass(typical, 16)}
    facts = replace(FOLLOWED, requests=FOLLOWED.requests._replace(rows_end_to_end=0))
    assert choices(function, Schedule(), facts, Specialization(dims)).schedule.registers["l"] == vectors


def run_on(function, arguments, facts):
    hints = {"P": 512, "G": 3, "C": 1, "M": 1}
    run_lane(function, arguments, facts=facts, specialization=specialize(function, arguments, hints))
    return arguments["y"]


G, P, D = dims("G P D")


@kernel
def scores(q: Tensor[f32, G, D], keys: Tensor[f32, P, D], y: Tensor[f32, G, P]):
    for p in tiles(P):
        g, d = whole(G), whole(D)
        y[g, p] = q[g, d] @ keys[p, d]


@kernel
def mixed(w: Tensor[f32, G, P], values: Tensor[f32, P, D], y: Tensor[f32, G, D]):
    for g in tiles(G):
        p, d = whole(P), whole(D)
        y[g, d] = w[g, p] @ values[p, d]


def heads(made, count, positions, features, facts=FOLLOWED):
    """The lane IR of a product of heads that share keys or values, after it ran and was compared."""
    function = reduce_loops(made.tile_ir({"G": count, "D": features}))
    canonicalize(function)
    random = np.random.default_rng(positions)
    extents = {"G": count, "P": positions, "D": features}
    arguments = {name: random.integers(-8, 9, [extents[d] for d in t.dims]).astype(np.float32)
                 for name, t in made.parameters}
    arguments["y"][:] = np.nan
    lane = run_lane(function, arguments, facts=facts, specialization=specialize(function, arguments, {"P": 4096}))
    left, right, _ = arguments.values()
    np.testing.assert_array_equal(arguments["y"], left @ (right.T if made is scores else right))    # exact in f32
    return lane


@pytest.mark.parametrize(("count", "features", "facts", "apart"), [
    (2, 128, FOLLOWED, True), (4, 128, FOLLOWED, True), (13, 128, FOLLOWED, False), (4, 128, ASKED, False),
    (4, 64, FOLLOWED, False)])
def test_keys_that_few_heads_share_come_from_several_places(count: int, features: int, facts: Facts,
                                                            apart: bool) -> None:
    """All heads in one step, with a key from each place; of 13 registers do not hold all, and where keys are short, to
    finish sums one by one takes as long as to read them."""
    for positions in (1, 3, 40, 131):
        lane = heads(scores, count, positions, features, facts)
        loops = [op for op in lane.walk() if op.attributes.get("label") == "p"]
        assert (loops[0].attributes["step"] == 1) == apart


@pytest.mark.parametrize(("features", "in_order"), [(64, True), (128, True), (576, False)])
def test_short_values_that_few_heads_share_are_asked_for_in_the_order_of_memory(
        features: int, in_order: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line in each step, a block ahead; rows of more than half a page are streams by themselves."""
    asked, early = recorded(monkeypatch, "load")
    heads(mixed, 4, 64, features)
    assert (asked == sorted(set(asked))) == in_order
    if in_order:
        assert sum(early.values()) >= (64 - 8) * features * 4 // 64


def test_rows_lie_behind_the_panels_that_they_meet() -> None:
    """There is room for as many rows as a task may have, of which most calls have few: nothing lies behind it."""
    function = reduce_loops(LIBRARY["matmul_nt_f32"].kernel.tile_ir())
    canonicalize(function)
    dims = {"M": DimClass(1024, 1), "N": DimClass(512, 16), "K": DimClass(2048, 16)}
    scratch = lower(function, Schedule(), FOLLOWED, Specialization(dims)).attributes["scratch"]
    lengths = [extents[0][0] for _, extents in scratch if any("K" in names for _, names, _ in extents)]
    assert lengths[0] == 1 and lengths[-1] > STAGE_ROWS
