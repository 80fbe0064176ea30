"""What the analytic model chooses: rows, vectors and streams from memory, of the library's kernels."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sapper.ir.nodes import Function
from sapper.ir.types import bf16, f32, i32
from sapper.kernels import library
from sapper.lane.choices import choices
from sapper.lane.lower import lower
from sapper.lang.builtins import each, exp, full, maximum, span, tiles, where, whole, zeros
from sapper.lang.dims import dims
from sapper.lang.kernel import kernel
from sapper.lang.tensor import Tensor
from sapper.tile.canonical import canonicalize
from sapper.tile.reduce_loops import reduce_loops
from sapper.tile.requests import Requests
from sapper.tile.schedule import DimClass, Facts, Panels, Schedule, Specialization
from tests.strategies import examples

from .run_lane import run_lane, specialize

D, H, K, M, N, S = dims("D H K M N S")
LIBRARY = {k.name: k for k in library()}
PLAIN = Facts(l2_bytes=2 << 20)
BY_LINES = replace(PLAIN, requests=Requests(line_by_line=True, stream_ahead_bytes=3072))
STREAMS = replace(PLAIN, requests=Requests(row_streams=4))
INTO_FIRST = replace(PLAIN, l1_bytes=48 << 10, requests=Requests(stream_level=1, stream_ahead_bytes=16 << 10))


def chosen(name: str, facts: Facts, *streamed: str, **extents: tuple[int, int]) -> Schedule:
    """The model's choices for a kernel of the library. extents: (typical, divisor). streamed: tensors that are larger
    than the caches."""
    function = reduce_loops(LIBRARY[name].kernel.tile_ir())
    canonicalize(function)
    dims = {dim: DimClass(*known) for dim, known in extents.items()}
    return choices(function, Schedule(), facts, Specialization(dims, aligned=frozenset(streamed))).schedule


def test_weights_are_read_line_by_line_where_that_is_quicker() -> None:
    """A line of each of two rows, asked for into the second cache; all is as before where many rows meet a weight."""
    large = {"N": (2048, 64), "K": (2048, 64)}
    assert chosen("matvec_f32", PLAIN, **large).registers["n"] == 8
    assert chosen("matvec_f32", BY_LINES, **large).registers == {"n": 2, "k": 1}
    rows = large | {"M": (512, 64)}
    assert chosen("matmul_nt_f32", PLAIN, **rows).registers == chosen("matmul_nt_f32", BY_LINES, **rows).registers
    for facts, level in ((PLAIN, 1), (BY_LINES, 2)):
        function = reduce_loops(LIBRARY["matvec_f32"].kernel.tile_ir())
        canonicalize(function)
        classes = {"N": DimClass(64, 64), "K": DimClass(576, 64)}
        asked = [op for op in lower(function, Schedule(), facts, Specialization(classes)).walk()
                 if op.name == "prefetch"]
        assert asked and {op.attributes["level"] for op in asked} == {level}


def prefetches(name: str, facts: Facts, strides: dict[str, Panels] | None = None,
               **extents: tuple[int, int]) -> list[dict[str, Any]]:
    """Attributes of what a kernel of the library asks for."""
    function = reduce_loops(LIBRARY[name].kernel.tile_ir())
    canonicalize(function)
    dims = {dim: DimClass(*known) for dim, known in extents.items()}
    lowered = lower(function, Schedule(), facts, Specialization(dims, strides or {}))
    return [op.attributes for op in lowered.walk() if op.name == "prefetch"]


@pytest.mark.parametrize(("name", "static", "lane", "tile"), [
    ("latent_attention_paged_f32", {"H": 16, "C": 64, "X": 32}, "h", {"h": 16, "p": 64}),
    ("latent_attention_paged_bf16", {"H": 16, "C": 64, "X": 32}, "h", {"h": 16, "p": 64}),
    ("latent_attention_decode_f32", {"H": 16, "C": 64, "S": 32}, "h", {"h": 16, "p": 64}),
    ("attention_paged_f32", {"G": 3, "D": 64}, "d", {"g": 3, "p": 64}),
    ("attention_decode_f32", {"G": 3, "D": 64}, "d", {"g": 3, "p": 256}),
])
def test_heads_meet_pages_as_they_meet_a_cache_in_one_piece(name: str, static: dict[str, int], lane: str,
                                                            tile: dict[str, int]) -> None:
    """All that share it at once, so that it is read once for them."""
    function = reduce_loops(LIBRARY[name].kernel.tile_ir(static))
    canonicalize(function)
    told = choices(function, Schedule(), PLAIN, Specialization({})).schedule
    assert (told.lane, told.tile) == (lane, tile)


@pytest.mark.parametrize(("heads", "many_workers", "positions"), [
    (1, False, 256), (4, False, 256), (6, False, 256), (40, False, 64), (4, True, 64)])
def test_few_heads_meet_many_positions_at_once(heads: int, many_workers: bool, positions: int) -> None:
    """As many as have room for their scores in an eighth of the first cache, and no more than there typically are."""
    function = reduce_loops(LIBRARY["attention_decode_f32"].kernel.tile_ir({"G": heads, "D": 64}))
    canonicalize(function)
    facts = replace(PLAIN, many_workers=many_workers)
    assert choices(function, Schedule(), facts, Specialization({})).schedule.tile["p"] == positions


@pytest.mark.parametrize(("name", "static"), [
    ("attention_f32", {"G": 1, "D": 64}), ("latent_attention_f32", {"D": 32, "S": 16, "V": 32})])
@pytest.mark.parametrize(("registers", "queries", "positions"), [(32, 16, 64), (16, 32, 48)])
def test_four_vectors_of_queries_meet_three_positions_where_registers_are_few(
        name: str, static: dict[str, int], registers: int, queries: int, positions: int) -> None:
    """Tiles of positions are whole threes then, and whole lines."""
    function = reduce_loops(LIBRARY[name].kernel.tile_ir(static))
    canonicalize(function)
    facts = replace(PLAIN, lanes=8, vector_registers=registers)
    told = choices(function, Schedule(), facts, Specialization({})).schedule
    assert (told.lane, told.tile["t"], told.tile["p"]) == ("t", queries, positions)
    if positions == 48:
        assert told.registers["p"] % 3 == 0


def attention_of(name: str, registers: int, **static: int) -> Function:
    function = reduce_loops(LIBRARY[name].kernel.tile_ir(static))
    canonicalize(function)
    return lower(function, Schedule(), replace(PLAIN, lanes=8, vector_registers=registers), Specialization({}))


@pytest.mark.parametrize(("registers", "vectors"), [(32, 8), (16, 4)])
def test_few_powers_are_computed_at_once_where_registers_are_few(registers: int, vectors: int) -> None:
    """Each waits for the last one to be stored."""
    loops = [op for op in attention_of("attention_f32", registers, G=1, D=64).walk() if op.name == "loop"]
    assert max(sum(inner.name == "exp2" for inner in loop.blocks[0].ops) for loop in loops) == vectors


@pytest.mark.parametrize(("name", "registers", "copied"), [
    ("latent_attention_f32", 16, True), ("latent_attention_f32", 32, False), ("attention_f32", 16, False)])
def test_values_of_a_head_that_lie_apart_are_copied_where_registers_are_few(
        name: str, registers: int, copied: bool) -> None:
    """[position, head, dim] by tiles of positions; rows of [head, position, dim] follow one another."""
    static = {"G": 1, "D": 64} if name == "attention_f32" else {"D": 64, "S": 32, "V": 64}
    loops = [op for op in attention_of(name, registers, **static).walk() if op.name == "loop"]
    made = [{op.name for op in loop.blocks[0].ops if not op.name.startswith("s_")} for loop in loops]
    assert ({"load", "store", "yield"} in made) == copied


@pytest.mark.parametrize(("heads", "rows", "facts", "times"), [
    (1, 4, PLAIN, 1), (4, 1, PLAIN, 1), (4, 1, STREAMS, 5),
    (1, 4, replace(PLAIN, fma_per_cycle=1.0), 1), (1, 1, replace(STREAMS, fma_per_cycle=1.0), 5)])
def test_values_are_read_whole_and_asked_for_as_they_are_used(heads: int, rows: int, facts: Facts, times: int) -> None:
    """Where several heads share them a row is asked for after each; a single head asks for four rows after four. Where
    rows are streams each line is asked for again and again, and rows come one by one for a single head, too."""
    function = reduce_loops(LIBRARY["attention_decode_split_f32"].kernel.tile_ir({"G": heads, "D": 128}))
    canonicalize(function)
    lowered = lower(function, Schedule(), facts, Specialization({}))
    lines = 128 * 4 // 64
    expected = 4 // rows * (["fma"] * lines * heads * rows + ["prefetch"] * lines * rows * times)
    assert expected in [[inner.name for inner in block.ops if inner.name in ("fma", "prefetch")]
                        for op in lowered.walk() for block in op.blocks]


@kernel
def scores_of_head(q: Tensor[f32, H, D], k: Tensor[f32, S, H, D], y: Tensor[f32, H, S]):
    """Rows of one head do not follow one another."""
    for h in each(H):
        for s in tiles(S):
            d = whole(D)
            y[h, s] = q[h, d] @ k[s, h, d]


@kernel
def solved(low: Tensor[f32, N, N], b: Tensor[f32, N, M], x: Tensor[f32, N, M]):
    for m in tiles(M):
        for i in range(N):
            acc = b[i, m]
            for j in tiles(span(0, i)):
                acc -= low[i, j] @ x[j, m]
            x[i, m] = acc / low[i, i]


@pytest.mark.parametrize(("d", "facts", "requests"), [
    (64, STREAMS, 1), (2048, STREAMS, 1), (4096, STREAMS, 5), (64, PLAIN, 0)])
def test_short_rows_that_do_not_follow_one_another_are_asked_for_by_rows(d: int, facts: Facts, requests: int) -> None:
    """8 KiB of them ahead, each line once; long ones are streams, of which each line is asked for five times."""
    rng = np.random.default_rng(d)
    q, k = rng.standard_normal((2, d), np.float32), rng.standard_normal((9, 2, d), np.float32)
    arguments = {"q": q, "k": k, "y": np.zeros((2, 9), np.float32)}
    lane = run_lane(reduce_loops(scores_of_head.tile_ir()), arguments, facts=facts)
    np.testing.assert_allclose(arguments["y"], np.einsum("hd,shd->hs", q, k), rtol=1e-3, atol=1e-3)
    products, asked = (sum(op.name == name for op in lane.walk()) for name in ("fma", "prefetch"))
    assert asked == requests * products


def test_what_a_kernel_writes_is_not_asked_for_as_what_is_read_once() -> None:
    rng = np.random.default_rng(5)
    low = np.tril(rng.standard_normal((9, 9), np.float32)) + 4 * np.eye(9, dtype=np.float32)
    b = rng.standard_normal((9, 70), np.float32)
    arguments = {"low": low, "b": b, "x": np.zeros_like(b)}
    lane = run_lane(reduce_loops(solved.tile_ir()), arguments, facts=STREAMS)
    np.testing.assert_allclose(low @ arguments["x"], b, rtol=1e-4, atol=1e-4)
    assert not any(op.name == "prefetch" for op in lane.walk())


@pytest.mark.parametrize(("d", "facts", "near"), [(64, PLAIN, True), (128, PLAIN, True), (512, PLAIN, False),
                                                  (128, BY_LINES, False)])
def test_keys_are_asked_into_the_first_cache_where_the_next_ones_have_room(d: int, facts: Facts, near: bool) -> None:
    """8 of f32 at a time, which may fill an eighth of it; not where memory is best read line by line."""
    function = reduce_loops(LIBRARY["attention_f32"].kernel.tile_ir({"D": d}))
    canonicalize(function)
    asked = {op.attributes["level"] for op in lower(function, Schedule(), facts, Specialization({})).walk()
             if op.name == "prefetch"}
    assert 2 in asked and (1 in asked) == near


@pytest.mark.parametrize("facts", [PLAIN, INTO_FIRST])
@pytest.mark.parametrize("name", ["attention_decode_f32", "attention_paged_bf16"])
def test_scores_of_several_heads_are_sums_of_four_positions(name: str, facts: Facts) -> None:
    """Though a vector alone reads rows of a matrix one by one, where the first cache takes streams."""
    function = reduce_loops(LIBRARY[name].kernel.tile_ir({"G": 3, "D": 256}))
    canonicalize(function)
    assert 3 * 4 in products_in_blocks(lower(function, Schedule(), facts, Specialization({})))


def products_in_blocks(lowered: Function, product: str = "fma") -> list[int]:
    """How many multiply-adds there are in each block that loops run."""
    return [sum(inner.name == product for inner in block.ops) for op in lowered.walk() for block in op.blocks]


@pytest.mark.parametrize(("facts", "at_once"), [(PLAIN, 4), (INTO_FIRST, 1)])
@pytest.mark.parametrize("name", ["attention_decode_f32", "attention_paged_f32"])
def test_values_that_heads_share_are_read_row_after_row(name: str, facts: Facts, at_once: int) -> None:
    """Where the first cache takes streams, and each vector of a row meets several sums."""
    function = reduce_loops(LIBRARY[name].kernel.tile_ir({"G": 4, "D": 128}))
    canonicalize(function)
    lowered = lower(function, Schedule(), facts, Specialization({}))
    vectors, heads = 128 // 16, 4
    products = products_in_blocks(lowered)
    assert vectors * heads * at_once in products
    assert not any(vectors * heads * n in products for n in (2, 4) if n != at_once)


@pytest.mark.parametrize(("static", "registers", "rows"), [
    ({"H": 16, "C": 64, "S": 32}, 32, 16), ({"H": 16, "C": 64, "S": 32}, 16, 12), ({"H": 32, "C": 64, "S": 32}, 32, 8)])
def test_a_single_vector_meets_as_many_rows_as_are_known_distances_apart(static: dict[str, int], registers: int,
                                                                         rows: int) -> None:
    """More than 8 where extents are compiled in, as far as registers hold their sums; by two vectors 8 are enough."""
    function = reduce_loops(LIBRARY["latent_attention_decode_f32"].kernel.tile_ir(static))
    canonicalize(function)
    told = choices(function, Schedule(), replace(PLAIN, vector_registers=registers), Specialization({})).schedule
    assert (told.lane, told.registers["p"]) == ("h", rows)
    assert chosen("latent_attention_decode_f32", PLAIN, H=(16, 16), C=(64, 64), S=(32, 32)).registers["p"] <= 8


FEW_REGISTERS = replace(PLAIN, vector_registers=16, fma_per_cycle=2)


@pytest.mark.parametrize(("name", "some", "others"), [
    ("latent_attention_decode_f32", {6 * 2 * 4, 4 * 2 * 4, 2 * 2 * 4}, set()),
    ("latent_attention_decode_bf16", {6 * 2 * 16, 4 * 2 * 16, 4 * 2 * 4}, {6 * 2 * 4, 2 * 2 * 4})])
def test_sums_beside_two_vectors_hide_the_latency_where_registers_are_few(name: str, some: set[int],
                                                                          others: set[int]) -> None:
    """More than two units have in flight, of 64 positions and of 32 columns where they lie, with smaller steps for what
    that leaves; of columns in scratch memory a divisor. By four steps of the depth, or a vector where it is widened."""
    function = reduce_loops(LIBRARY[name].kernel.tile_ir({"H": 32, "C": 32, "S": 32}))
    canonicalize(function)
    products = set(products_in_blocks(lower(function, Schedule(), FEW_REGISTERS, Specialization({}))))
    assert some <= products and not others & products, products


@pytest.mark.parametrize(("facts", "heads", "depth", "positions"), [
    (FEW_REGISTERS, 4, 80, 48), (FEW_REGISTERS, 4, 96, 42), (FEW_REGISTERS, 4, 128, 30), (FEW_REGISTERS, 3, 128, 30),
    (FEW_REGISTERS, 2, 128, 256), (FEW_REGISTERS, 1, 256, 256), (FEW_REGISTERS, 4, 256, 30), (PLAIN, 4, 128, 256)])
def test_values_that_are_read_by_columns_stay_in_the_first_cache(facts: Facts, heads: int, depth: int,
                                                                 positions: int) -> None:
    """Where registers do not hold a whole row of them for several heads: whole lines of weights, or threes."""
    function = reduce_loops(LIBRARY["attention_decode_f32"].kernel.tile_ir({"G": heads, "D": depth}))
    canonicalize(function)
    known = Specialization({"P": DimClass(4096, 64)})
    assert choices(function, Schedule(), facts, known).schedule.tile["p"] == positions


def test_the_next_tile_of_values_is_asked_for_in_the_order_of_memory() -> None:
    """By steps that read four rows of this one, a few columns at a time."""
    function = reduce_loops(LIBRARY["attention_decode_f32"].kernel.tile_ir({"G": 4, "D": 128}))
    canonicalize(function)
    lowered = lower(function, Schedule(), FEW_REGISTERS, Specialization({"P": DimClass(4096, 64)}))
    rows = [[op.attributes["disp"] for op in block.ops if op.name == "prefetch" and op.attributes["level"] == 2]
            for op in lowered.walk() for block in op.blocks if op.attributes.get("label") == "p"]
    assert {after - before for found in rows for before, after in pairwise(found)} == {64}, rows


def test_no_single_column_is_left_for_sums_that_hide_the_latency() -> None:
    """Of 26 columns six are held and two are left; of 25 five are."""
    five = {}
    for depth in (25, 26):
        function = reduce_loops(LIBRARY["attention_f32"].kernel.tile_ir({"D": depth}))
        canonicalize(function)
        known = Specialization({"T": DimClass(512, 64)})
        five[depth] = 5 * 2 * 4 in products_in_blocks(lower(function, Schedule(), FEW_REGISTERS, known))
    assert five == {25: True, 26: False}


@pytest.mark.parametrize(("name", "scatter", "order"), [
    ("transpose_f32", False, ("n", "m")), ("transpose_bf16", False, ("n", "m")), ("transpose_f32", True, ("m", "n"))])
def test_a_transpose_stores_line_after_line(name: str, scatter: bool, order: tuple[str, ...]) -> None:
    """Where it goes through squares of registers; else what one vector strides over is used up first."""
    told = chosen(name, replace(PLAIN, transposes_by_scatter=scatter), M=(512, 64), N=(576, 64))
    assert (told.lane, told.order) == ("m", order)


@pytest.mark.parametrize(("name", "dims", "order"), [
    ("yarn_tables", ("P", "R"), ("r", "p")), ("dequantize_fp8", ("N", "K"), ("n", "k"))])
def test_what_is_costly_along_the_lanes_alone_is_computed_once(name: str, dims: tuple[str, str],
                                                               order: tuple[str, ...]) -> None:
    """For all rows, where there are several and lanes are no threads; a quotient of indices alone costs nothing."""
    rows, columns = dims
    many = {rows: (4096, 64), columns: (32, 32)}
    assert chosen(name, PLAIN, **many).order == order
    for facts, extents in ((replace(PLAIN, many_workers=True), many), (PLAIN, many | {rows: (4, 4)})):
        assert chosen(name, facts, **extents).order[-1] == columns.lower()


@pytest.mark.parametrize(("name", "typical", "rows", "levels"), [
    ("matvec_f32", 2048, 1, set()), ("matvec_f32", 16384, 4, {1}), ("matvec_bf16", 2048, 1, {1}),
    ("matvec_swiglu_bf16", 2048, 1, set()),
    ("norm_matvec_bf16", 4096, 1, {1}), ("norm_matvec_bf16", 8192, 4, {1}),     # what vector and gain make
])
def test_single_rows_where_the_first_cache_takes_streams(name: str, typical: int, rows: int, levels: set[int]) -> None:
    """Or four, which share a vector that fills much of that cache. Lines are asked into it, but not where single rows
    are multiplied as they lie, or are those of two matrices."""
    extents = {"N": (2048, 64), "K": (typical, 64)}
    assert chosen(name, INTO_FIRST, **extents).registers["n"] == rows
    asked = prefetches(name, INTO_FIRST, **extents)
    assert {a["level"] for a in asked} == levels


@pytest.mark.parametrize(("name", "split", "rows"), [
    ("matmul_nt_f32", False, 3), ("matmul_nt_u8", False, 3), ("matmul_nt_bf16_bf16", True, 2),
    ("matmul_nt_i8", True, 2), ("matmul_swiglu_f32", False, 1)])
def test_few_rows_meet_weights_four_at_once_where_registers_are_few(name: str, split: bool, rows: int) -> None:
    """As many rows of the weights as 16 registers then have sums for: fewer of two matrices, or of parts."""
    dots = frozenset({"dot4_u8i8", "fma2_bf16"})
    facts = replace(PLAIN, vector_registers=16, lanes=8, dots=dots, split_dots=dots if split else frozenset())
    found = chosen(name, facts, M=(8, 1), N=(2048, 64), K=(4096, 64)).registers
    assert (found["m"], found["n"]) == (4, rows)


TOGETHER = replace(PLAIN, dots=frozenset({"dot4_u8i8"}), requests=Requests(few_at_once=8))


@pytest.mark.parametrize(("name", "rows", "counts"), [
    ("matmul_nt_f32", (8, 1), (8, 3)), ("matmul_nt_i8", (8, 16), (8, 3)), ("matmul_nt_f32", (4, 4), None),
    ("matmul_nt_f32", (512, 64), None), ("matmul_swiglu_f32", (8, 1), None)])
def test_few_rows_meet_weights_as_many_at_once_as_the_target_says(name: str, rows: tuple[int, int],
                                                                  counts: tuple[int, int] | None) -> None:
    extents = {"M": rows, "N": (2048, 64), "K": (1024, 64)}
    found = chosen(name, TOGETHER, **extents).registers
    if counts is None:
        assert found == chosen(name, replace(TOGETHER, requests=Requests()), **extents).registers
    else:
        assert (found["m"], found["n"]) == counts


@pytest.mark.parametrize("name", ["matmul_nt_f32", "matmul_nt_i8", "matmul_nt_bf16", "matmul_nt_gelu_f32"])
@pytest.mark.parametrize("rows", [1, 4, 5, 13])
def test_fewer_rows_have_code_of_their_own(name: str, rows: int) -> None:
    entry = LIBRARY[name]
    function = reduce_loops(entry.kernel.tile_ir())
    canonicalize(function)
    arguments = entry.make_arguments(np.random.default_rng(1), {"M": rows, "N": 23, "K": 75})
    specialization = specialize(function, arguments, {"M": 8, "N": 2048, "K": 1024})
    lane = run_lane(function, arguments, facts=TOGETHER, specialization=specialization)
    assert entry.compare(arguments, entry.reference(arguments)) is None
    steps = {op.attributes["step"] for op in lane.walk() if op.name == "loop" and op.attributes.get("label") == "m"}
    assert 8 in steps and 4 in steps
    assert any(op.name == "if" for op in lane.walk())


@pytest.mark.parametrize(("typical", "streams"), [(512, 4), (16384, 4)])
def test_streams_that_the_processor_sees_coming_are_not_asked_for(typical: int, streams: int) -> None:
    """From as many places as the target says for short vectors, and for long ones."""
    extents = {"N": (2048, 64), "K": (typical, 64)}
    unasked = replace(PLAIN, requests=Requests(row_streams=4, short_row_streams=4, again=False))
    assert chosen("matvec_bf16", unasked, **extents).registers["n"] == streams
    assert prefetches("matvec_bf16", unasked, **extents) == []
    once = replace(unasked, requests=unasked.requests._replace(places_ahead_bytes=1024))
    asked = prefetches("matvec_bf16", once, **extents)
    assert {(a["disp"] // 64 * 64, a["level"]) for a in asked} == {(1024, 1)} and len(asked) >= streams
    assert prefetches("matvec_bf16", STREAMS, **extents)


def test_blocks_that_several_meet_are_asked_for_once_if_nothing_is_again() -> None:
    few = {"M": (4, 4), "N": (2048, 64), "K": (1024, 64)}
    once = replace(STREAMS, requests=Requests(row_streams=4, again=False))
    assert len(prefetches("matmul_nt_f32", once, **few)) == len(prefetches("matmul_nt_f32", PLAIN, **few)) > 0
    assert len(prefetches("matmul_nt_f32", STREAMS, **few)) > len(prefetches("matmul_nt_f32", PLAIN, **few))


@pytest.mark.parametrize(("typical", "along"), [(4096, True), (256, False)])
def test_long_rows_are_asked_for_as_near_as_the_target_says(typical: int, along: bool) -> None:
    """Where half of the first cache has no room for the next ones, and into that."""
    facts = replace(PLAIN, requests=Requests(long_row_ahead_bytes=1024))
    few = {"M": (4, 4), "N": (2048, 64), "K": (typical, 64)}
    asked = [(a["disp"], a["level"]) for a in prefetches("matmul_nt_f32", facts, **few)]
    plain = [(a["disp"], a["level"]) for a in prefetches("matmul_nt_f32", PLAIN, **few)]
    assert ((1024, 1) in asked) == along and (1024, 1) not in plain
    assert (asked == plain) == (not along)


@pytest.mark.parametrize(("name", "rows", "depth", "asked"), [
    ("matmul_nn_f32", 512, 1024, True), ("matmul_nt_f32", 512, 1024, True), ("matmul_tn_f32", 512, 1024, True),
    ("matmul_nt_i8", 512, 1024, True), ("matmul_nn_f32", 512, 64, False), ("matmul_nn_f32", 4, 1024, False)])
def test_what_many_rows_meet_again_is_asked_into_the_first_cache(name: str, rows: int, depth: int, asked: bool) -> None:
    """Each line of a step of a panel once, between products, and of the rows beside it; not of what stays there."""
    plain = replace(PLAIN, dots=frozenset({"dot4_u8i8"}))
    facts = replace(plain, requests=Requests(reread_ahead_bytes=1024))
    extents = {"M": (rows, rows), "N": (2048, 64), "K": (depth, depth)}
    before = Counter(a["level"] for a in prefetches(name, plain, **extents))
    found = prefetches(name, facts, **extents)
    assert bool(Counter(a["level"] for a in found) - before) == asked
    if asked:
        function = reduce_loops(LIBRARY[name].kernel.tile_ir())
        canonicalize(function)
        classes = {dim: DimClass(*known) for dim, known in extents.items()}
        lowered = lower(function, Schedule(), facts, Specialization(classes))
        loop = max((op for op in lowered.walk() if op.name == "loop" and op.attributes["label"] == "k"),
                   key=lambda op: sum(inner.name in ("fma", "dot4_u8i8") for inner in op.blocks[0].ops))
        requests = [(op.operands, op.attributes["disp"]) for op in loop.blocks[0].ops
                    if op.name == "prefetch" and op.attributes["level"] == 1]
        loads = [(op.operands, op.attributes["disp"]) for op in loop.blocks[0].ops if op.name == "load"]
        assert loads and all((operands, disp + 1024) in requests for operands, disp in loads)
        order = [op.name for op in loop.blocks[0].ops if op.name in ("fma", "dot4_u8i8") or (
            op.name == "prefetch" and (op.operands, op.attributes["disp"] - 1024) in loads)]
        assert order.count("prefetch") == len(loads)
        assert all("prefetch" not in pair or len(set(pair)) == 2 for pair in pairwise(order))


@kernel
def attended(q: Tensor[f32, M, 64], x: Tensor[f32, N, 64], place: Tensor[i32, N], y: Tensor[f32, K, 64],
             out: Tensor[f32, M, 64]):
    """Values that are gathered."""
    for m in tiles(M):
        d = whole(64)
        low, mass = full(m, value=-1e30, dtype=f32), zeros(m, d, dtype=f32)
        for n in tiles(N):
            score = q[m, d] @ x[n, d]
            high = maximum(low, max(score, over=n))
            mass = mass * exp(low - high) + exp(score - high) @ y[place[n], d]
            low = high
        out[m, d] = mass


def test_gathered_values_follow_one_another_nowhere() -> None:
    """They are not asked for in the order of memory."""
    random = np.random.default_rng(0)
    given = {name: random.standard_normal((rows, 64)).astype(np.float32)
             for name, rows in (("q", 5), ("x", 9), ("y", 3))}
    given |= {"place": random.integers(0, 3, 9).astype(np.int32), "out": np.zeros((5, 64), np.float32)}
    function = reduce_loops(attended.tile_ir())
    canonicalize(function)
    run_lane(function, given, None, replace(PLAIN, requests=Requests(reread_ahead_bytes=1024)),
             specialize(function, given, {"M": 512, "N": 1024}))
    weights = np.exp(given["q"] @ given["x"].T)
    weights /= weights.max(axis=1, keepdims=True)
    np.testing.assert_allclose(given["out"], weights @ given["y"][given["place"]], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "extents", "again", "later"), [
    ("attention_f32", {"T": (512, 64), "H": (8, 1), "G": (4, 1), "D": (128, 128), "P": (1024, 1)}, 1, 1),
    ("attention_bf16", {"T": (512, 64), "H": (8, 1), "G": (4, 1), "D": (128, 128), "P": (1024, 1)}, 1, 0),
    ("attention_f32", {"T": (512, 64), "H": (8, 1), "G": (4, 1), "D": (16, 16), "P": (1024, 1)}, 0, 1),
    ("latent_attention_decode_f32",
     {"H": (16, 16), "C": (512, 512), "S": (64, 64), "P": (4096, 1), "B": (32, 1)}, 2, 0),
])
def test_values_are_asked_for_before_their_columns_are_met(
        name: str, extents: dict[str, tuple[int, int]], again: int, later: int) -> None:
    """Where reread_ahead_bytes says so: some rows ahead into the first cache, by both lines that 16 numbers of an array
    may lie in; and into the second, beside scores, rows that nothing else reads. Not what stays in the first."""
    static = {dim: known[0] for dim, known in extents.items() if dim in "GDHCS" and known[0] == known[1]}
    counts = []
    for facts in (PLAIN, replace(PLAIN, requests=Requests(reread_ahead_bytes=1024))):
        function = LIBRARY[name].kernel.tile_ir(static)
        reduce_loops(function)
        canonicalize(function)
        dims = {dim: DimClass(*known) for dim, known in extents.items()}
        lowered = lower(function, Schedule(), facts, Specialization(dims))
        counts.append(Counter(op.attributes["level"] for loop in lowered.walk() if loop.name == "loop"
                              and sum(op.name == "fma" for op in loop.blocks[0].ops) >= 32
                              for op in loop.blocks[0].ops if op.name == "prefetch"))
    before, now = counts
    assert now - before == Counter({level: asked for level, asked in ((1, 2 * again), (2, later)) if asked})


@pytest.mark.parametrize(("rows", "copied"), [(8, False), (512, True)])
def test_packed_bf16_is_widened_as_it_is_read_by_few_rows(rows: int, copied: bool) -> None:
    """Several pieces of them take less than to store it widened; of many rows, which meet it again and again, more."""
    facts = replace(PLAIN, vector_registers=16, lanes=8)
    function = reduce_loops(LIBRARY["matmul_nt_bf16"].kernel.tile_ir())
    canonicalize(function)
    dims = {"M": DimClass(rows, 1), "N": DimClass(2048, 64), "K": DimClass(2048, 64)}
    lowered = lower(function, Schedule(), facts, Specialization(dims, {"b": Panels(0, 1, 16)}))
    stores = [op for op in lowered.walk() if op.name == "store" and op.attributes["dtype"] is f32]
    inside = {op for loop in lowered.walk() if loop.name == "loop" and loop.attributes["label"] == "n"
              for op in loop.walk() if op.name == "store" and any(v.op is not None and v.op.name == "load"
                                                                  for v in op.operands[:1])}
    assert stores and bool(inside) == copied


@pytest.mark.parametrize(("name", "rows"), [
    ("matvec_bf16", 4), ("matvec_residual_bf16", 4), ("matmul_nt_bf16", 4), ("norm_matvec_bf16", 4), ("matvec_f32", 4),
    ("matvec_swiglu_bf16", 2), ("matvec_swiglu_f32", 2), ("matmul_nt_i8", 4), ("matmul_nt_bf16_bf16", 4)])
@pytest.mark.parametrize(("typical", "parts"), [(512, 2), (16384, 1)])
def test_rows_of_matrices_that_meet_a_vector_are_streams(name: str, rows: int, typical: int, parts: int) -> None:
    """From as many places, half of them for a short vector, whole lines of each, which are asked for five times and
    into the second cache."""
    extents = {"N": (2048, 64), "K": (typical, 64)} | ({"M": (1, 1)} if "_nt_" in name else {})
    facts = replace(STREAMS, dots=frozenset({"dot2_bf16", "dot4_u8i8"}))
    assert chosen(name, facts, **extents).registers["n"] == rows // parts
    function = reduce_loops(LIBRARY[name].kernel.tile_ir({"M": 1} if "_nt_" in name else None))
    canonicalize(function)
    lowered = lower(function, Schedule(), facts, Specialization({d: DimClass(*of) for d, of in extents.items()}))
    loops = [op for op in lowered.walk() if op.name == "loop" and op.attributes["label"] == "k"]
    asked = [[inner.attributes for inner in op.blocks[0].ops if inner.name == "prefetch"] for op in loops]
    most = max(asked, key=len)
    streams = 4 // parts
    lines = len(most) // streams // 5
    assert lines >= 1
    assert Counter(a["disp"] for a in most) == {
        ahead + 64 * line: streams for ahead in (10240, 8192, 6144, 4096, 2048) for line in range(lines)}
    assert {a["level"] for some in asked for a in some} == {2}
    places = {op.attributes["step"] for op in lowered.walk() if op.name == "loop" and op.attributes["label"] == "n"}
    assert places == {1}


@pytest.mark.parametrize(("multiply", "registers"), [(False, 32), (True, 32), (False, 16)])
def test_what_was_rounded_is_kept_wide_where_to_widen_it_is_in_the_way(multiply: bool, registers: int) -> None:
    """Queries and weights of the softmax: 32 bits of each are read beside multiply-adds, or 16, to be widened, which
    all pipes do that multiply, or which takes loads that few registers need for elements."""
    facts = replace(PLAIN, fma_per_cycle=2.0, dots=frozenset({"fma2_bf16", "dot4_u8i8"}), shared_pipes=multiply,
                    vector_registers=registers)
    wide = multiply or registers == 16
    function = reduce_loops(LIBRARY["attention_rounded_bf16"].kernel.tile_ir({"D": 128}))
    canonicalize(function)
    known = {"T": DimClass(512, 64), "H": DimClass(8, 1), "G": DimClass(1, 1), "P": DimClass(1024, 64)}
    lane = lower(function, Schedule(), facts, Specialization(known, dict.fromkeys(("q", "keys", "values", "out"),
                                                                                  "contiguous")))
    read = [{op.attributes["dtype"] for op in loop.blocks[0].ops if op.name == "load"}
            for loop in lane.walk() if loop.name == "loop"
            if sum(inner.name == "fma" for inner in loop.blocks[0].ops) >= 16]
    assert ({f32} in read) == wide


@pytest.mark.parametrize("name", ["absorb_f32", "absorb_bf16"])
def test_rows_that_one_number_each_meets_are_asked_for_again(name: str) -> None:
    """A vector by a matrix [in, out]: pieces of its rows lie apart. So many bytes of pieces ahead, as streams are."""
    known = {"H": (16, 1), "D": (128, 64), "C": (512, 64)}
    assert len(prefetches(name, STREAMS, **known)) == 5 * len(prefetches(name, PLAIN, **known)) > 0


def test_blocks_of_few_rows_are_asked_for_again_while_arithmetic_keeps_up() -> None:
    """Lines further along the rows of a block: five times by one row of f32, four by up to 4; 8 take longer than memory
    in most loops."""
    once = replace(PLAIN, fma_per_cycle=1.0)
    again = replace(once, requests=Requests(row_streams=4))
    for rows, always in ((1, True), (4, True), (8, False)):
        known = {"M": (rows, rows), "N": (4096, 64), "K": (4096, 64)}
        counts = []
        for facts in (once, again):
            function = reduce_loops(LIBRARY["matmul_nn_f32"].kernel.tile_ir({"M": rows}))
            canonicalize(function)
            lowered = lower(function, Schedule(), facts, Specialization({d: DimClass(*of) for d, of in known.items()}))
            counts.append(sum(op.name == "prefetch" for op in lowered.walk()))
        assert 0 < counts[0] < counts[1]
        assert (counts[1] == (5 if rows == 1 else 4) * counts[0]) == always


def test_rows_that_several_meet_are_no_streams() -> None:
    """They are taken as where the processor finds none."""
    few = {"M": (4, 4), "N": (2048, 64), "K": (2048, 64)}
    assert chosen("matmul_nt_bf16_bf16", STREAMS, **few) == chosen("matmul_nt_bf16_bf16", PLAIN, **few)
    known = {"H": (3, 1), "G": (3, 1), "D": (64, 64), "P": (512, 64)}
    assert chosen("attention_decode_bf16", STREAMS, **known) == chosen("attention_decode_bf16", PLAIN, **known)


def test_blocks_of_rows_that_several_meet_are_asked_for_again() -> None:
    """Five times by all at once, and by each of several pieces of them once: the call's rows choose where nobody knows.
    """
    def asked(rows: DimClass, facts: Facts, static: bool = False) -> list[int]:
        """How many lines each block of ops asks for that asks for any, into the second cache where these are streams.
        """
        function = reduce_loops(LIBRARY["matmul_nt_bf16_bf16"].kernel.tile_ir({"M": rows.hint} if static else None))
        canonicalize(function)
        large = DimClass(4096, 64)
        lowered = lower(function, Schedule(), facts, Specialization({"M": rows, "N": large, "K": large}))
        blocks = [block for op in lowered.walk() for block in op.blocks if op.name in ("loop", "if")]
        found = [[op.attributes["level"] for op in block.ops if op.name == "prefetch"] for block in blocks]
        assert not facts.requests.row_streams or {2} == {level for levels in found for level in levels}
        return [len(levels) for levels in found if levels]

    four, few = DimClass(4, 4), DimClass(16, 1)
    assert asked(four, STREAMS, True) == [5 * lines for lines in asked(four, PLAIN, True)] != []
    assert asked(few, STREAMS) == [count for lines in asked(few, PLAIN) for count in (lines, 5 * lines)] != []




@kernel
def first_rows_doubled(w: Tensor[bf16, N, K], x: Tensor[f32, K], y: Tensor[f32, N]):
    for n in tiles(N):
        acc = zeros(n, dtype=f32)
        for k in tiles(K):
            acc += w[n, k] @ x[k]
        y[n] = where(n < 5, acc + acc, acc)


@settings(max_examples=examples(30))
@given(rows=st.integers(0, 41), depth=st.integers(1, 70), workers=st.integers(1, 3), static=st.booleans(),
       seed=st.integers(0, 99), facts=st.sampled_from([
           replace(INTO_FIRST, l1_bytes=64), INTO_FIRST, STREAMS, replace(STREAMS, l1_bytes=64),
           replace(STREAMS, l1_bytes=1024)]))
def test_rows_that_share_a_long_vector_come_from_as_many_places(rows: int, depth: int, workers: int, static: bool,
                                                                seed: int, facts: Facts) -> None:
    """Four streams for each task, wherever its rows begin and however many are left; numbers of rows go with
    them."""
    random = np.random.default_rng(seed)
    w = random.standard_normal((rows, depth)).astype(ml_dtypes.bfloat16)
    x, y = random.standard_normal(depth).astype(np.float32), np.full(rows, np.nan, np.float32)
    function = reduce_loops(first_rows_doubled.tile_ir({"N": rows, "K": depth} if static else None))
    lowered = run_lane(function, {"w": w, "x": x, "y": y}, facts=facts, workers=workers)
    expected = w.astype(np.float64) @ x
    expected[:5] *= 2
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)
    assert halves_of_lines(lowered) % 2 == 0


def halves_of_lines(function: Function) -> int:
    """How many loads say that the other half of a line is loaded as well; each has it in its own block."""
    blocks = [function.body, *(block for op in function.walk() for block in op.blocks)]
    found = 0
    for block in blocks:
        half_bytes = function.attributes["lanes"] * 2
        loads = {(*map(id, op.operands), op.attributes.get("scale"), op.attributes.get("disp", 0)):
                 op.attributes["beside"] for op in block.ops if op.name == "load" and "beside" in op.attributes}
        for (*place, disp), beside in loads.items():
            assert loads[*place, disp + beside * half_bytes] == -beside
        found += len(loads)
    return found


@pytest.mark.parametrize(("name", "typical", "halves"), [
    ("matvec_residual_bf16", 14336, True), ("matvec_residual_bf16", 2048, False),   # rows one by one
    ("matvec_residual_f32", 14336, False), ("matvec_swiglu_bf16", 14336, False)])   # not widened; not in places
def test_lines_of_rows_in_places_are_loaded_whole(name: str, typical: int, halves: bool) -> None:
    """Both halves of each in the loops over whole lines; what is left of a row reads no more than itself."""
    function = reduce_loops(LIBRARY[name].kernel.tile_ir())
    canonicalize(function)
    classes = Specialization({"N": DimClass(4096, 64), "K": DimClass(typical, 64)})
    lowered = lower(function, Schedule(), INTO_FIRST, classes)
    assert (halves_of_lines(lowered) > 0) == halves
    assert all(op.attributes["beside"] in (1, -1) for op in lowered.walk() if "beside" in op.attributes)


def test_rows_in_places_are_asked_for_nearer_if_widened() -> None:
    """What is left of the rows, one by one, is asked for as single rows are."""
    def distances(name: str) -> set[int]:
        asked = prefetches(name, INTO_FIRST, N=(4096, 64), K=(14336, 64))
        return {a["disp"] for a in asked} & {1536, 2048}

    assert distances("matvec_residual_bf16") == {1536}
    assert distances("matvec_residual_f32") == {2048}


def test_places_of_rows_are_far_apart() -> None:
    """The loop over rows takes one of each place; without a long vector, or where lines are read in turn, neighbours
    are taken."""
    def steps(facts: Facts, typical: int, name: str = "matvec_residual_bf16") -> set[int]:
        function = reduce_loops(LIBRARY[name].kernel.tile_ir())
        canonicalize(function)
        lowered = lower(function, Schedule(registers={"n": 4}), facts,
                        Specialization({"N": DimClass(4096, 64), "K": DimClass(typical, 64)}))
        return {op.attributes["step"] for op in lowered.walk() if op.name == "loop" and op.attributes["label"] == "n"}

    assert steps(INTO_FIRST, 14336) == {1}
    assert steps(INTO_FIRST, 2048) == steps(BY_LINES, 14336) == steps(PLAIN, 14336) == {4}
    assert steps(INTO_FIRST, 14336, "matvec_swiglu_bf16") == {4}


@pytest.mark.parametrize(("met", "rows"), [(1, 1), (3, 4)])
def test_rows_that_several_meet_are_taken_four_at_once(met: int, rows: int) -> None:
    """Their sums over the lanes are then finished together: keys of a cache, which a group of queries meets."""
    function = reduce_loops(LIBRARY["attention_decode_bf16"].kernel.tile_ir())
    canonicalize(function)
    known = {"H": DimClass(3), "G": DimClass(met), "D": DimClass(64, 64), "P": DimClass(512, 64)}
    lowered = lower(function, Schedule(), INTO_FIRST, Specialization(known))
    loops = [op for op in lowered.walk() if op.name == "loop"]
    keys = [op for op in loops if op.attributes["label"] == "p" and op.attributes["step"] < 16 and any(
        inner.attributes.get("label") == "d" for inner in op.blocks[0].ops)]
    assert {op.attributes["step"] for op in keys} == {1, rows}


@pytest.mark.parametrize(("facts", "products"), [(PLAIN, True), (INTO_FIRST, False)])
@pytest.mark.parametrize("name", ["norm_matvec_f32", "norm_matvec_swiglu_bf16"])
def test_what_rows_meet_one_by_one_is_computed_once(name: str, facts: Facts, products: bool) -> None:
    """A vector times its gain, where single rows are read; where several are, it serves these."""
    function = reduce_loops(LIBRARY[name].kernel.tile_ir())
    canonicalize(function)
    lowered = lower(function, Schedule(), facts, Specialization({"N": DimClass(512, 64), "K": DimClass(2048, 64)}))
    loops = [op for op in lowered.walk() if op.name == "loop" and op.attributes["label"] == "k"
             and any(inner.name == "fma" for inner in op.blocks[0].ops)]
    assert loops and all(
        any(inner.name == "mul" for block in loop.blocks for inner in block.ops) == products for loop in loops)
    arguments = LIBRARY[name].make_arguments(np.random.default_rng(1), {"N": 37, "K": 91})
    expected = LIBRARY[name].reference(arguments)
    classes = Specialization({"N": DimClass(64), "K": DimClass(91)})
    run_lane(reduce_loops(LIBRARY[name].kernel.tile_ir()), arguments, facts=facts, specialization=classes)
    assert LIBRARY[name].compare(arguments, expected) is None


@pytest.mark.parametrize("rows", [1, 8, 512])
@pytest.mark.parametrize(("facts", "level", "slow", "quick"), [
    (PLAIN, 2, 2048, 8192), (BY_LINES, 2, 3072, 8192), (INTO_FIRST, 1, 16384, 16384),
    (replace(INTO_FIRST, requests=INTO_FIRST.requests._replace(panel_ahead_bytes=4096)), 1, 4096, 16384)])
def test_panels_are_asked_for_as_the_target_reads_them_best(facts: Facts, level: int, slow: int, quick: int,
                                                            rows: int) -> None:
    asked = prefetches("matmul_nt_f32", facts, {"b": Panels(0, 1, 32)}, M=(rows, 1), N=(2048, 64), K=(2048, 64))
    panels = [a for a in asked if a["disp"] >= slow]     # rows of a are asked for where they are used
    assert panels and {a["level"] for a in panels} == {level}
    assert quick in {a["disp"] for a in panels} if rows > 1 else min(a["disp"] for a in panels) == slow


@pytest.mark.parametrize(("name", "rows", "registers", "staged"), [
    ("matmul_nn_f32", 1, {"m": 1, "n": 12, "k": 1}, False), ("matmul_nn_f32", 8, {"m": 8, "n": 3, "k": 4}, False),
    ("matmul_nn_i8", 1, {"m": 1, "n": 12, "k": 1}, False), ("matmul_nn_i8", 8, {"m": 6, "n": 4, "k": 4}, True),
])
def test_rows_of_a_matrix_that_few_meet_are_read_several_lines_at_once(name: str, rows: int, registers: dict[str, int],
                                                                       staged: bool) -> None:
    """Those of [in, out], each pages after the one before: but where memory is best read line by line, or packed."""
    extents = {"M": (rows, 1), "N": (2048, 64), "K": (2048, 64)}
    facts = replace(PLAIN, fma_per_cycle=2.0, dots=frozenset({"dot4_u8i8"}))
    schedule = chosen(name, facts, **extents)
    assert schedule.registers == registers
    assert ("b" in (schedule.stage or ())) == staged
    by_lines = replace(facts, requests=Requests(line_by_line=True))
    other = chosen(name, by_lines, **extents)
    assert other.registers["n"] == 2 and "b" not in (other.stage or ())
    many = extents | {"M": (512, 1)}
    assert chosen(name, facts, **many).registers == chosen(name, by_lines, **many).registers


@pytest.mark.parametrize(("extents", "rows", "copied"), [
    ({"M": (512, 64), "N": (2048, 64), "K": (1024, 64)}, 6, True),     # six a page apart are too many for a set
    ({"M": (512, 64), "N": (2048, 64), "K": (1000, 8)}, 6, True),      # whose distance is known when it is called
    ({"M": (16, 16), "N": (2048, 64), "K": (1024, 64)}, 8, False),     # few, which meet blocks of the depth
])
def test_rows_that_may_share_a_set_of_the_first_cache_are_copied(extents: dict[str, tuple[int, int]], rows: int,
                                                                 copied: bool) -> None:
    facts = replace(PLAIN, vector_registers=16, fma_per_cycle=2.0)
    schedule = chosen("matmul_nn_f32", facts, **extents)
    assert schedule.registers["m"] == rows
    assert ("a" in (schedule.stage or ())) == copied


@pytest.mark.parametrize("name", ["rope_half_split", "rope_interleaved"])
def test_streams_that_leave_together_share_four_lines(name: str) -> None:
    """Past the caches, and where the first cache takes streams; a single one has four."""
    extents = {"T": (4096, 64), "H": (32, 16), "R": (64, 64), "P": (4096, 64)}
    assert chosen(name, INTO_FIRST, "y", **extents).registers["r"] == 2
    assert chosen(name, INTO_FIRST, **extents).registers["r"] == chosen(name, PLAIN, "y", **extents).registers["r"] == 4
    assert chosen("swiglu", INTO_FIRST, "y", M=(8192, 64), N=(4096, 64)).registers["n"] == 4


@pytest.mark.parametrize(("typical", "count"), [(2048, 4), (512, 1)])
def test_long_rows_are_asked_for_along_themselves(typical: int, count: int) -> None:
    """Where the next rows would not fit the first cache: so many streams. Few rows then meet six of them at once."""
    facts = replace(INTO_FIRST, fma_per_cycle=2.0)
    registers = chosen("matmul_nt_f32", facts, M=(4, 1), N=(2048, 64), K=(typical, 64)).registers
    assert registers == {"m": 4, "n": 6 if typical == 2048 else 4, "k": 1}
    for other, rows in ((PLAIN, 6 if typical == 2048 else 4), (replace(PLAIN, vector_registers=16), 3),
                        (replace(PLAIN, requests=Requests(line_by_line=True)), 4)):
        assert chosen("matmul_nt_f32", other, M=(4, 1), N=(2048, 64), K=(typical, 64)).registers["n"] == rows
    function = reduce_loops(LIBRARY["matvec_f32"].kernel.tile_ir())
    canonicalize(function)
    schedule = Schedule(registers={"n": 4, "k": 1})
    lowered = lower(function, schedule, facts, Specialization({"N": DimClass(64, 64), "K": DimClass(typical, 64)}))
    asked = [op for op in lowered.walk() if op.name == "prefetch"]
    assert len(asked) == 4 and len({op.operands[0] for op in asked}) == count
    assert {op.attributes["disp"] for op in asked} == ({2048} if count == 4 else {0, 64, 128, 192})


@pytest.mark.parametrize(("block_ahead", "level", "ahead"), [(0, 1, 4096), (6144, 2, 6144)])
def test_blocks_are_asked_for_as_far_ahead_as_the_target_says(block_ahead: int, level: int, ahead: int) -> None:
    facts = replace(PLAIN, requests=Requests(block_ahead_bytes=block_ahead))
    asked = prefetches("matvec_q4", facts, P=(512, 1), B=(64, 1))
    assert asked and {a["level"] for a in asked} == {level}
    assert min(a["disp"] for a in asked) == ahead


@pytest.mark.parametrize(("name", "scales"), [
    ("matmul_q4", [0]), ("matmul_q4m", [0]), ("matmul_q4k", [32 * 64]), ("matmul_q6k", [48 * 64])])
def test_a_target_may_have_single_rows_ask_for_all_but_scales_again(name: str, scales: list[int]) -> None:
    """Scales are what moves by a line or less with each block. Several rows ask once, and so do products of f32 but for
    super blocks, which are pieces of a stream."""
    facts = replace(PLAIN, dots=frozenset({"dot4_u8i8"}), requests=Requests(scales_ahead_bytes=256))
    deep = {"S" if name.endswith("k") else "G": (8, 1)}
    asked = prefetches(name, facts, P=(512, 1), C=(1, 1), M=(1, 1), **deep)
    assert [a["disp"] for a in asked if a["level"] == 1] == [place + 256 for place in scales]
    again = Counter(a["disp"] for a in asked if a["level"] == 2)
    plain = prefetches(name.replace("matmul", "matvec"), facts, P=(512, 1), B=(8, 1), S=(8, 1))
    for places in (again, Counter(a["disp"] for a in plain if a["level"] == 2)) if name.endswith("k") else (again,):
        nearest = [place for place in places if 2048 <= place < 4096]
        assert nearest and all(place + 2048 * number in places for place in nearest for number in range(5))
    several = prefetches(name, facts, P=(512, 1), C=(16, 1), M=(16, 1), **deep)
    assert len(several) > 4 and (name.endswith("k") or 4 < len(plain) < len(again))
    assert {a["level"] for a in several} >= {2}


def test_a_row_asks_for_all_its_matrices_together_into_a_first_cache_that_takes_streams() -> None:
    """As early as one another, and so far as their blocks are long: of 4 bits by 32, 256 bytes of quants and 32 of
    scales, four blocks at each index. Several rows ask as before."""
    facts = replace(PLAIN, requests=Requests(stream_level=1, block_ahead_bytes=8192))
    one, two = 8192 * 8 // 9, 8192 * 4 // 9
    for name, quants, scales in (("expert_matmul_q4", one, one // 8), ("expert_matmul_swiglu_q4", two, two // 8)):
        asked = prefetches(name, facts, E=(18, 1), K=(6, 1), P=(48, 1), G=(8, 1))
        assert {a["level"] for a in asked} == {1}
        first = -(-quants // 64) * 64
        assert {a["disp"] for a in asked} == {-(-scales // 64) * 64, *range(first, first + 256, 64)}
    asked = prefetches("expert_matmul_swiglu_q6k", facts, E=(18, 1), K=(6, 1), P=(48, 1), S=(4, 1))
    assert {a["level"] for a in asked} == {1} and min(a["disp"] for a in asked) == 4096
    asked = prefetches("matmul_q4", facts, P=(512, 1), G=(32, 1), M=(16, 1), C=(16, 1))
    assert {a["level"] for a in asked} == {2} and min(a["disp"] for a in asked) == 8192


def test_a_row_may_ask_for_blocks_into_the_first_cache_and_for_streams_into_the_second() -> None:
    into_first = replace(PLAIN, requests=Requests(block_ahead_bytes=8192, block_level=1))
    for name, levels in (("expert_matmul_q4k", {1}), ("expert_matmul_swiglu_q4", {1}), ("matvec_f32", {2})):
        dims = {"E": (18, 1), "K": (6, 1), "P": (48, 1), "G": (8, 1), "S": (4, 1)}
        vectors = {"N": (2048, 64), "K": (2048, 64)}
        asked = prefetches(name, into_first, **(vectors if name.startswith("matvec") else dims))
        assert {a["level"] for a in asked} == levels
    asked = prefetches("matmul_q4", into_first, P=(512, 1), G=(32, 1), M=(16, 1), C=(16, 1))
    assert {a["level"] for a in asked} >= {2}


@pytest.mark.parametrize(("name", "lines"), [
    ("widen_pairs_q4", 4 + 1), ("widen_pairs_q4m_128", 16 + 2), ("widen_pairs_q8", 8 + 1), ("matmul_near_q4m", 4 + 2)])
def test_weights_that_are_unpacked_and_stored_are_asked_for_where_the_target_says_so(name: str, lines: int) -> None:
    """Each line of a block's quants once, and of its scales; not rows that lie apart, nor what products read."""
    facts = replace(PLAIN, requests=Requests(widened_ahead_bytes=4096))
    asked = prefetches(name, facts, Q=(8, 1), J=(2, 2), P=(2, 1), R=(8, 1), B=(8, 1), M=(32, 1))
    widening = [a["disp"] for a in asked if a["level"] == 1 and a["disp"] >= 4096]
    assert len(widening) == lines and min(widening) == 4096
    for other in (replace(PLAIN, requests=Requests()), replace(facts, software_prefetch=False)):
        assert not prefetches("widen_pairs_q4", other, Q=(8, 1), J=(2, 2), B=(8, 1))
    assert not prefetches("embedding_q8", facts, P=(512, 1), B=(8, 1), T=(8, 1))


def test_two_rows_that_meet_blocks_are_a_piece() -> None:
    """Of three a single one is left, which reads the blocks a second time."""
    facts = replace(PLAIN, dots=frozenset({"dot4_u8i8"}))
    function = reduce_loops(LIBRARY["matmul_q4"].kernel.tile_ir())
    canonicalize(function)
    dims = {"P": DimClass(512, 1), "G": DimClass(32, 1), "M": DimClass(8, 1), "C": DimClass(8, 1)}
    lowered = lower(function, Schedule(), facts, Specialization(dims, {}))
    steps = [op.attributes["step"] for op in lowered.walk() if op.name == "loop" and op.attributes["label"] == "m"]
    assert steps[-3:] == [4, 2, 1]


def test_blocks_that_several_rows_meet_are_asked_for_by_another_distance() -> None:
    """Of a target that says which, into the cache that takes streams. What is left of several rows are single ones."""
    known = Requests(block_ahead_bytes=6144, block_rows_ahead_bytes=10240, stream_level=1)
    facts = replace(PLAIN, dots=frozenset({"dot4_u8i8"}), requests=known)
    asked = prefetches("matmul_q4", facts, P=(512, 1), G=(32, 1), C=(4, 1), M=(4, 1))
    assert {a["level"] for a in asked} == {1}
    assert max(a["disp"] for a in asked) == 10240 + 192 and min(a["disp"] for a in asked) < 6144


@pytest.mark.parametrize(("name", "group", "at_once"), [
    ("matmul_q4", 128, 6), ("matmul_q4m_by32", 32, 6), ("matmul_q6k", 256, 4)])
def test_a_target_may_have_rows_that_meet_blocks_ask_for_their_next_groups(name: str, group: int, at_once: int) -> None:
    """Each of the rows that are met at once, as these lie; few rows stay in the caches."""
    def asked(rows: int, next_rows: bool) -> Counter[tuple[int, int]]:
        facts = replace(PLAIN, dots=frozenset({"dot4_u8i8"}), fma_per_cycle=2.0, requests=Requests(next_rows=next_rows))
        deep = {"S" if name.endswith("k") else "G": (32, 1)}
        return Counter((a["level"], a["disp"]) for a in prefetches(
            name, facts, P=(512, 1), C=(rows, 1), M=(rows, 1), **deep))

    more = asked(512, True) - asked(512, False)
    assert {level for level, _ in more} == {1}
    assert {place for _, place in more}.issuperset(range(0, at_once * group, max(group, 64)))
    assert asked(16, True) == asked(16, False)


@pytest.mark.parametrize(("name", "panels", "rows", "cache"), [
    ("matmul_q4", 5, 47, 8 << 10), ("matmul_swiglu_q8", 5, 38, 8 << 10), ("matmul_residual_q4m", 7, 45, 1 << 20),
    ("matmul_q4k", 5, 41, 16 << 10)])
def test_rows_that_ask_for_their_next_groups_meet_blocks_of_panels(name: str, panels: int, rows: int, cache: int
                                                                   ) -> None:
    """Each tile of rows all panels of a block, before the next tile does, as long as half of the second cache has room
    for these; whatever is left of rows and of panels."""
    facts = replace(PLAIN, l2_bytes=cache, dots=frozenset({"dot4_u8i8"}), fma_per_cycle=2.0,
                    requests=Requests(next_rows=True))
    deep = {"S" if name.endswith("k") else "G": 2}
    shape = {"P": panels, "C": rows, "M": rows, **deep}
    arguments = LIBRARY[name].make_arguments(np.random.default_rng(1), shape)
    expected = LIBRARY[name].reference(arguments)
    classes = Specialization({dim: DimClass(512 if dim in "CM" else extent) for dim, extent in shape.items()})
    lowered = run_lane(reduce_loops(LIBRARY[name].kernel.tile_ir()), arguments, facts=facts, specialization=classes)
    assert LIBRARY[name].compare(arguments, expected) is None
    around = [op for op in lowered.walk() if op.name == "loop" and op.attributes["label"] == "m"]
    assert around and all(any(inner.name == "loop" and inner.attributes["label"] == "p" for inner in op.walk())
                          for op in around)


@pytest.mark.parametrize(("name", "block"), [
    ("matvec_q4", {"h": 2, "w": 4, "s": 4}), ("matvec_q8", {"h": 1, "w": 8, "s": 4}),
    ("matvec_q4m_128", {"h": 2, "w": 16, "s": 4}), ("matvec_q4k", {"v": 8, "i": 4, "v_1": 8, "i_1": 4}),
    ("matvec_q6k", {"v": 3, "i": 4, "v_1": 1, "i_1": 4})])
def test_blocks_that_meet_plain_numbers_are_no_loops(name: str, block: dict[str, int]) -> None:
    extents = {"P": (512, 1), "B": (64, 1), "S": (16, 1)}
    assert chosen(name, PLAIN, **extents).registers == block


@pytest.mark.parametrize(("name", "per_cycle", "tile"), [
    ("matmul_q8", 1, {"p": 2, "m": 6}), ("matmul_q4k", 1, {"p": 2, "m": 4}), ("matmul_swiglu_q8", 1, {"p": 1, "m": 8}),
    ("matmul_swiglu_q8", 2, {"p": 1, "m": 12}), ("matmul_swiglu_fp8", 1, {"p": 1, "m": 8, "h": 64, "h_1": 64})])
def test_rows_of_blocks_are_as_many_as_sums_of_the_inner_loop_leave_room_for(
    name: str, per_cycle: int, tile: dict[str, int]
) -> None:
    """Of 26 registers: a sum of integers and what it is scaled to, for two vectors; of Q4_K two sums and the total; of
    two matrices, which come one after the other, those of one and what the other's have made, or two that blocks of
    fp8 are added to and the one that is made. What waits is not counted where two multiply-adds start in a cycle."""
    facts = replace(PLAIN, dots=frozenset({"dot4_u8i8", "dot2_bf16"}), fma_per_cycle=per_cycle)
    dims: dict[str, tuple[int, int]] = {"P": (512, 1), "C": (512, 1), "M": (512, 1)}
    dims |= {"H": (1024, 64), "A": (16, 1), "B": (16, 1), "G": (16, 1), "S": (16, 1)}
    assert chosen(name, facts, **dims).tile == tile


@pytest.mark.parametrize(("name", "rows", "tile"), [
    ("matmul_q8", (8, 16), {"p": 1, "m": 16}), ("matmul_q4", (8, 1), {"p": 1, "m": 16}),
    ("matmul_q8", (1, 1), {"p": 1, "m": 1}), ("matmul_q8", (512, 16), {"p": 2, "m": 6})])
def test_a_target_may_have_sixteen_rows_meet_blocks_at_once(name: str, rows: tuple[int, int],
                                                            tile: dict[str, int]) -> None:
    facts = replace(PLAIN, dots=frozenset({"dot4_u8i8"}), fma_per_cycle=2.0, requests=Requests(rows_together=16))
    assert chosen(name, facts, P=(512, 1), C=rows, M=rows, G=(16, 1)).tile == tile


def test_sums_of_super_blocks_are_too_many_for_sixteen_rows_at_once() -> None:
    facts = replace(PLAIN, dots=frozenset({"dot4_u8i8"}), fma_per_cycle=2.0, requests=Requests(rows_together=16))
    extents = {"P": (512, 1), "C": (8, 1), "M": (8, 1), "S": (16, 1)}
    assert chosen("matmul_q4k", facts, **extents).tile == chosen(
        "matmul_q4k", replace(facts, requests=Requests()), **extents).tile


@pytest.mark.parametrize("rows", [16, 13, 4, 1])
def test_what_is_left_of_sixteen_rows_meets_blocks_by_eight_and_four(rows: int) -> None:
    entry = LIBRARY["matmul_q4"]
    facts = replace(PLAIN, dots=frozenset({"dot4_u8i8"}), fma_per_cycle=2.0, requests=Requests(rows_together=16))
    function = reduce_loops(entry.kernel.tile_ir())
    canonicalize(function)
    arguments = entry.make_arguments(np.random.default_rng(1), {"P": 3, "G": 2, "C": rows, "M": rows})
    specialization = specialize(function, arguments, {"P": 512, "G": 16, "C": 8, "M": 8})
    lane = run_lane(function, arguments, facts=facts, specialization=specialization)
    assert entry.compare(arguments, entry.reference(arguments)) is None
    steps = [op.attributes["step"] for op in lane.walk() if op.name == "loop" and op.attributes.get("label") == "m"]
    assert steps == ([16] if rows == 16 else [16, 8, 4, 1])


def test_short_vectors_that_share_what_is_unpacked_are_computed_together() -> None:
    """Both halves of a byte, but not words that a scale serves; none where two multiply-adds start in a cycle."""
    extents = {"P": (96, 1), "B": (20, 1)}
    assert {"h": 2, "w": 1}.items() <= chosen("dequantize_q4", PLAIN, **extents).registers.items()
    assert chosen("dequantize_q8", PLAIN, **extents).registers["w"] == 1
    assert chosen("dequantize_q4", replace(PLAIN, fma_per_cycle=2.0), **extents).registers["h"] == 1


def test_few_rows_of_bf16_meet_two_pieces_of_weights_of_fp8() -> None:
    """There are twice the products of bytes for as much memory; but of very few rows, which wait for it."""
    facts = replace(PLAIN, dots=frozenset({"dot4_u8i8", "dot2_bf16"}))
    blocks = {"P": (448, 1), "H": (1024, 64), "A": (16, 1), "B": (16, 1)}
    assert chosen("matmul_fp8", facts, M=(16, 16), **blocks).tile == {"p": 2, "m": 6, "h": 64}
    assert chosen("matmul_fp8", facts, M=(8, 1), **blocks).tile == {"p": 1, "m": 8, "h": 64}
    assert chosen("matmul_fp8", replace(facts, fma_per_cycle=2.0), M=(16, 16), **blocks).tile["p"] == 1
    assert chosen("matmul_q8", facts, P=(512, 1), C=(16, 1), M=(16, 16), G=(16, 1)).tile == {"p": 1, "m": 8}


def test_weights_that_take_much_to_unpack_meet_twice_the_rows() -> None:
    """In one piece; but where two dot products start in a cycle, which wait for loads of elements."""
    dims: dict[str, tuple[int, int]] = {"P": (512, 1), "S": (16, 1), "C": (512, 1), "M": (512, 1)}
    one = replace(PLAIN, dots=frozenset({"dot4_u8i8"}))
    two = replace(one, fma_per_cycle=2.0)
    assert chosen("matmul_q6k", one, **dims).tile == {"p": 1, "m": 8}
    assert chosen("matmul_q6k", two, **dims).tile == chosen("matmul_q4k", one, **dims).tile == {"p": 2, "m": 4}


def test_products_of_several_instructions_are_loops_sooner_in_what_is_left_of_rows() -> None:
    """Of four rows by two vectors, of 128 of the depth 32 products each; single rows are no loops either way."""
    function = reduce_loops(LIBRARY["matmul_q4m_128"].kernel.tile_ir())
    canonicalize(function)
    facts = replace(PLAIN, dots=frozenset({"dot4_u8i8"}))
    dims = {name: DimClass(512, 1) for name in "PCM"} | {"G": DimClass(16, 1)}
    whole, parted = (products_in_blocks(lower(function, Schedule(), one, Specialization(dims)), "dot4_u8i8")
                     for one in (facts, replace(facts, split_dots=facts.dots)))
    assert 4 * 2 * 32 in whole and 4 * 2 * 32 not in parted
    assert 32 in whole and 32 in parted


@pytest.mark.parametrize(("divisor", "size", "rows"), [(64, 64, 8), (1, 64, 14), (64, 512, 14)])
def test_rows_are_parted_evenly_where_what_they_meet_stays_in_the_first_cache(divisor: int, size: int,
                                                                              rows: int) -> None:
    extents = {"T": (64, 64), "H": (64, divisor), "S": (size, 64), "E": (size, 64), "P": (1024, 1)}
    assert chosen("index_scores_f32", PLAIN, **extents).registers["h"] == rows


def test_sums_of_a_row_are_no_matrix_that_is_read_line_by_line() -> None:
    assert chosen("rms_norm", BY_LINES, M=(512, 64), N=(2048, 64)).registers["n"] == 4


@pytest.mark.parametrize(("divisor", "vectors"), [(64, 4), (16, 2), (1, 2)])
def test_a_piece_is_shorter_than_a_short_axis(divisor: int, vectors: int) -> None:
    """Of an axis of some 64 elements, unless it is known that pieces of 64 fit: 32 would be walked 16 at a time."""
    extents = {"E": (8, 1), "B": (64, 16), "I": (512, 64), "K": (8, 1), "L": (64, divisor)}
    assert chosen("expert_matvec_bf16", BY_LINES, **extents).registers["l_1"] == vectors


@pytest.mark.parametrize("facts", [PLAIN, BY_LINES])
def test_rows_from_memory_are_several_streams(facts: Facts) -> None:
    """Where their results can't be joined; rows that stay in the cache, and a single row, are walked by themselves."""
    assert chosen("argmax_rows", facts, M=(512, 64), N=(16384, 64)).registers == {"m": 4, "n": 2}
    assert chosen("argmax_rows", facts, M=(512, 64), N=(64, 64)).registers == {"m": 1, "n": 4}
    assert chosen("argmax_rows", facts, M=(1, 1), N=(16384, 64)).registers == {"m": 1, "n": 4}


@pytest.mark.parametrize(("name", "facts", "vectors"), [
    ("gelu", BY_LINES, 1), ("gelu", PLAIN, 4), ("gelu_bf16", BY_LINES, 4), ("gelu", replace(BY_LINES, lanes=8), 4)])
def test_a_line_at_a_time_goes_past_the_caches(name: str, facts: Facts, vectors: int) -> None:
    """A vector that is a whole line, where memory is read so; others are rounded, or stored, several at once."""
    extents = {"M": (2048, 64), "N": (2048, 64)}
    assert chosen(name, facts, "x", "y", **extents).registers["n"] == vectors
    assert chosen(name, facts, **extents).registers["n"] == 4


@pytest.mark.parametrize(("name", "columns", "streamed", "rows"), [
    ("rms_norm_bf16", 512, (), 2), ("layer_norm_bf16", 512, (), 2), ("softmax_bf16", 512, (), 2),
    ("layer_norm", 512, (), 2), ("rms_norm_quantize", 512, (), 2),
    ("rms_norm", 512, (), 1),              # waits for memory
    ("rms_norm_bf16", 2048, (), 1),        # waits seldom
    ("rms_norm_bf16", 512, ("y",), 1),     # stores past the caches
])
def test_two_rows_at_once_where_one_would_wait_for_its_sum(name: str, columns: int, streamed: tuple[str, ...],
                                                           rows: int) -> None:
    assert chosen(name, PLAIN, *streamed, M=(512, 64), N=(columns, 64)).tile["m"] == rows


NEAR_PAIRS = replace(PLAIN, lanes=8, vector_registers=16, l3_bytes=32 << 20, sums_apart=True,
                     requests=PLAIN.requests._replace(pairs_in_caches=True))


@pytest.mark.parametrize(("name", "extents", "rows"), [
    ("layer_norm", (512, 512), 2), ("layer_norm_bf16", (512, 512), 2), ("rms_norm_bf16", (512, 512), 2),
    ("rms_norm_quantize", (512, 512), 2),
    ("rms_norm", (512, 512), 1), ("rms_norm_rounded", (512, 512), 1), ("softmax_bf16", (512, 512), 1),
    ("layer_norm", (2048, 512), 1), ("rms_norm_bf16", (2048, 512), 1),     # a call's may have to come from memory
    ("layer_norm", (16384, 64), 2),                                        # waits that long
])
def test_two_rows_at_once_where_they_stay_in_the_last_cache(name: str, extents: tuple[int, int], rows: int) -> None:
    m, n = extents
    assert chosen(name, NEAR_PAIRS, M=(m, 64), N=(n, 64)).tile["m"] == rows


@pytest.mark.parametrize(("rows", "at_once"), [(2048, 2), (4096, 1)])
def test_two_rows_of_known_extents_at_once(rows: int, at_once: int) -> None:
    """There is no call of more rows."""
    function = reduce_loops(LIBRARY["layer_norm"].kernel.tile_ir({"M": rows, "N": 512}))
    canonicalize(function)
    assert choices(function, Schedule(), NEAR_PAIRS, Specialization()).schedule.tile["m"] == at_once


@pytest.mark.parametrize("streamed", [(), ("y",)])
def test_four_short_rows_at_once_that_lie_apart(streamed: tuple[str, ...]) -> None:
    """Of the axis whose rows have others between them. The others follow each other: they are one stream."""
    assert chosen("quantize_fp8", PLAIN, *streamed, M=(512, 64), B=(56, 8)).tile == {"m": 4, "b": 1}


@pytest.mark.parametrize("name", ["rms_norm_bf16", "layer_norm", "softmax_bf16", "rms_norm_quantize"])
@pytest.mark.parametrize("m", [1, 2, 5])
def test_rows_at_once_and_the_one_that_is_left(name: str, m: int) -> None:
    entry = LIBRARY[name]
    arguments: dict[str, Any] = entry.make_arguments(np.random.default_rng(m), {"M": m, "N": 84})
    expected = entry.reference(arguments)
    classes = Specialization({"M": DimClass(512), "N": DimClass(84, 4)})
    run_lane(reduce_loops(entry.kernel.tile_ir()), arguments, facts=PLAIN, specialization=classes)
    assert entry.compare(arguments, expected) is None


@pytest.mark.parametrize(("name", "vectors"), [("gelu_bf16", 8), ("swiglu_bf16", 8), ("gelu", 4), ("softmax_bf16", 4),
                                                ("narrow_bf16", 4)])
def test_rows_that_are_rounded_together_and_nothing_else(name: str, vectors: int) -> None:
    """As many as the target wants; not of f32, nor of walks that take part of a row after another, or that have hardly
    any arithmetic."""
    facts = replace(PLAIN, dots=frozenset({"dot2_bf16"}), rounded_at_once=8)
    extents = {"M": (512, 64), "N": (2048, 64)}
    assert chosen(name, facts, **extents).registers["n"] == vectors
    assert chosen(name, replace(facts, rounded_at_once=4), **extents).registers["n"] == 4
    assert chosen(name, replace(facts, dots=frozenset({"fma2_bf16"})), **extents).registers["n"] == 4


@pytest.mark.parametrize(("depth", "vectors"), [(1024, 4), (4096, 2)])
def test_panels_stay_in_the_second_cache(depth: int, vectors: int) -> None:
    """4 vectors of 4096 f32 are 1 MiB: two do with half of that. Half of the cache has room for one panel, and for the
    next one where that is asked for meanwhile."""
    facts = Facts(fma_per_cycle=2.0, l2_bytes=1 << 20)
    extents = {"M": (128, 64), "N": (4096, 64), "K": (depth, 64)}
    assert chosen("matmul_nt_f32", facts, **extents).registers["n"] == vectors
    larger, largest = (replace(facts, l2_bytes=size << 20) for size in (2, 4))
    assert chosen("matmul_nn_f32", larger, **extents).registers["n"] == 4
    assert chosen("matmul_nt_f32", larger, **extents).registers["n"] == vectors
    assert chosen("matmul_nt_f32", largest, **extents).registers["n"] == 4


@pytest.mark.parametrize(("name", "registers", "rows"), [
    ("matmul_nt_i8", 32, 4), ("matmul_nt_u8", 32, 6), ("matmul_nt_bf16_bf16", 32, 6), ("matmul_nt_i8", 16, 2)])
def test_sums_that_mend_others_need_registers(name: str, registers: int, rows: int) -> None:
    """Of i8 by i8 one operand is turned: each row of the other one then has a sum besides those with four columns."""
    facts = replace(PLAIN, vector_registers=registers, dots=frozenset({"dot4_u8i8", "dot2_bf16"}))
    found = chosen(name, facts, M=(8, 1), N=(2048, 64), K=(1024, 64)).registers
    assert (found["m"], found["n"]) == (rows, 4)


@pytest.mark.parametrize(("name", "extents"), [
    ("attention_rounded_f32", {"T": (512, 64), "H": (8, 8), "G": (4, 4), "D": (128, 64), "P": (1024, 64)}),
    ("latent_attention_decode_rounded", {"H": (16, 16), "C": (512, 64), "S": (64, 64), "P": (512, 64), "B": (4, 1)}),
])
def test_operands_are_rounded_once_where_no_product_takes_them_narrow(name: str,
                                                                      extents: dict[str, tuple[int, int]]) -> None:
    """Rounding takes eight instructions without AVX512-BF16, and a weight meets all columns of the values."""
    function = reduce_loops(LIBRARY[name].kernel.tile_ir())
    canonicalize(function)
    facts = replace(PLAIN, vector_registers=16, fma_per_cycle=2.0, dots=frozenset({"fma2_bf16"}))
    dims = {dim: DimClass(*known) for dim, known in extents.items()}
    lowered = lower(function, Schedule(), facts, Specialization(dims))
    products = [block for op in lowered.walk() for block in op.blocks if op.name == "loop"
                and any(inner.name == "fma" for inner in block.ops)]
    assert products and not any(op.name == "round_to" for block in products for op in block.ops)
