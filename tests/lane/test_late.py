"""Loops over rows that are stored past the caches: which walks may be late, what is asked for ahead, and that the
results stay the same."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sapper.ir.nodes import Function, Op
from sapper.ir.types import f32, i32
from sapper.kernels import library
from sapper.lane import interpret
from sapper.lane.lower import lower
from sapper.lang.builtins import argmax, each, exp, max, sum, tiles, where, whole
from sapper.lang.dims import dims
from sapper.lang.kernel import kernel
from sapper.lang.tensor import Tensor
from sapper.tile.canonical import canonicalize
from sapper.tile.plan import Late, late_walk, plan_block
from sapper.tile.reduce_loops import reduce_loops
from sapper.tile.requests import KEPT, READ_AGAIN, Requests
from sapper.tile.schedule import DimClass, Facts, Schedule, Specialization
from tests.strategies.amount import examples

from .run_lane import run_lane, specialize

AVX512 = Facts(lanes=16, vector_registers=32)
AVX2 = Facts(lanes=8, vector_registers=16)
NARROW = Facts(lanes=4, vector_registers=8)
BESIDE = replace(AVX512, requests=Requests(late_stores=READ_AGAIN), dots=frozenset({"dot2_bf16"}))
LIBRARY = {k.name: k for k in library()}
M, N, B = dims("M N B")


def aligned(array: np.ndarray) -> np.ndarray:
    """A copy whose data start at a cache line."""
    raw = np.empty(array.nbytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    copy = raw[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def run_streaming(function: Function, arguments: dict[str, Any], facts: Facts, workers: int = 1) -> Function:
    """Run with every tensor stored past the caches that may be."""
    known = specialize(function, arguments)
    names = frozenset(t.name for t in function.tensors())
    return run_lane(function, arguments, facts=facts, specialization=replace(known, aligned=names), workers=workers)


def late_of(function: Function, streamed: tuple[str, ...], beside_arithmetic: int = 0) -> Late | None:
    """The late walk of the body of the function's only loop over m."""
    (loop,) = [op for op in function.walk() if op.name == "tiles"]
    wholes = frozenset(op.attributes["axis"] for op in function.walk() if op.name == "whole")
    plan = plan_block(loop.blocks[0], wholes)
    return late_walk(plan, loop.blocks[0], frozenset(loop.attributes["axes"]),
                     lambda op: op.operands[0].name in streamed, beside_arithmetic)


def canonical(name: str) -> Function:
    """A kernel of the library as it is lowered, with its sums of products as contractions."""
    function = reduce_loops(LIBRARY[name].kernel.tile_ir())
    canonicalize(function)
    return function


def loops_over(lane: Function, axis: str) -> list[Op]:
    return [op for op in lane.walk() if op.name == "loop" and op.attributes.get("label") == axis]


@kernel
def two_results(x: Tensor[f32, M, N], best: Tensor[i32, M], y: Tensor[f32, M, N], z: Tensor[f32, M, N]):
    for m in tiles(M):
        n = whole(N)
        row = x[m, n]
        e = exp(row - max(row, over=n))
        best[m] = argmax(row, over=n).to(i32)
        scale = 1.0 / sum(e, over=n)
        y[m, n] = e * scale
        z[m, n] = row * scale + 1.0


@kernel
def by_batch(x: Tensor[f32, B, M, N], y: Tensor[f32, B, M, N]):
    for b in each(B):
        for m in tiles(M):
            n = whole(N)
            row = x[b, m, n]
            y[b, m, n] = row - sum(row, over=n)


@kernel
def in_place(x: Tensor[f32, M, N]):
    for m in tiles(M):
        n = whole(N)
        x[m, n] = x[m, n] - sum(x[m, n], over=n)


@kernel
def kept_condition(x: Tensor[f32, M, N], y: Tensor[f32, M, N]):
    for m in tiles(M):
        n = whole(N)
        row = x[m, n]
        y[m, n] = where(sum(row, over=n) > 0.0, row, -row)


@kernel
def one_walk(x: Tensor[f32, M, N], y: Tensor[f32, M, N]):
    for m, n in tiles(M, N):
        y[m, n] = x[m, n] + 1.0


@kernel
def columns(x: Tensor[f32, M, N], w: Tensor[f32, B], y: Tensor[f32, M, B]):
    for m in tiles(M):
        n = whole(N)
        b = whole(B)
        y[m, b] = w[b] * sum(x[m, n], over=n)


def test_the_host_is_the_walk_that_makes_what_is_read() -> None:
    late = late_of(reduce_loops(LIBRARY["softmax"].kernel.tile_ir()), ("y",))
    assert late is not None and len(late.buffers) == 1 and len(late.rows) == 1
    assert late.buffers[0] in late.host.inner and [r.attributes["kind"] for r in late.host.reductions] == ["sum"]


def test_a_row_is_stored_beside_much_arithmetic() -> None:
    """Without a buffer, and past the caches, beside the last walk that reads nothing for the first time."""
    def of(name: str, streamed: tuple[str, ...], beside_arithmetic: int = READ_AGAIN) -> Late | None:
        return late_of(canonical(name), streamed, beside_arithmetic)

    for streamed in ((), ("y",)):
        late = of("layer_norm_bf16", streamed)
        assert late is not None and not late.buffers and len(late.rows) == 2
        assert [op.name for op in late.host.reductions] == ["contract"]     # of the variance
        assert of("layer_norm", streamed) is None and of("layer_norm_bf16", streamed, KEPT) is None
        assert of("rms_norm", streamed) is None
        assert of("rms_norm_bf16", streamed) is None    # its host's pieces are slots of two elements
    for name in ("softmax", "softmax_bf16"):
        for which in (KEPT, READ_AGAIN):
            late = of(name, (), which)
            assert late is not None and len(late.buffers) == 1
        assert of(name, (), 0) is None


@kernel
def reads_another(x: Tensor[f32, M, N], w: Tensor[f32, M, N], y: Tensor[f32, M, N]):
    for m in tiles(M):
        n = whole(N)
        e = exp(x[m, n] - max(x[m, n], over=n))
        y[m, n] = x[m, n] * sum(exp(e * w[m, n]), over=n)


def test_what_waits_for_memory_itself_is_no_host() -> None:
    assert late_of(reduce_loops(reads_another.tile_ir()), ("y",), READ_AGAIN) is None
    assert late_of(reduce_loops(reads_another.tile_ir()), (), READ_AGAIN) is not None


@pytest.mark.parametrize(("refused", "streamed"), [
    (two_results, ("y",)), (in_place, ("x",)), (one_walk, ("y",)), (columns, ("y",)), (kept_condition, ()),
    (by_batch, ("y",)),
], ids=["a store that does not stream", "a tensor that is read", "one walk", "other axes", "nothing streams",
        "a host that keeps nothing"])
def test_walks_that_can_not_be_late(refused: Any, streamed: tuple[str, ...]) -> None:
    assert late_of(reduce_loops(refused.tile_ir()), streamed) is None


@settings(max_examples=examples(60), deadline=None)
@example("softmax", 3, 320, BESIDE, 1, False)
@example("softmax_bf16", 3, 333, BESIDE, 2, False)
@example("layer_norm_bf16", 4, 320, BESIDE, 1, True)
@example("layer_norm_bf16", 4, 333, BESIDE, 1, False)
@example("rms_norm_bf16", 4, 320, BESIDE, 1, False)
@given(name=st.sampled_from(["softmax", "rms_norm", "layer_norm", "layer_norm_bf16", "softmax_bf16", "rms_norm_bf16"]),
       m=st.integers(0, 6), n=st.sampled_from([16, 32, 48, 64, 80, 144, 320, 333]),
       facts=st.sampled_from([AVX512, AVX2, NARROW, BESIDE]), workers=st.integers(1, 3), streaming=st.booleans())
def test_library_rows(name: str, m: int, n: int, facts: Facts, workers: int, streaming: bool) -> None:
    entry = LIBRARY[name]
    arguments = entry.make_arguments(np.random.default_rng(m + n), {"M": m, "N": n})
    arguments = {k: aligned(v) if isinstance(v, np.ndarray) else v for k, v in arguments.items()}
    expected = entry.reference(arguments)
    function = canonical(name)
    streaming = streaming and n * arguments["y"].itemsize % 64 == 0     # what a call makes sure of
    lane = (run_streaming(function, arguments, facts, workers) if streaming
            else run_lane(function, arguments, facts=facts, workers=workers))
    assert entry.compare(arguments, expected) is None
    streams = any(op.attributes.get("streaming") for op in lane.walk() if op.name == "store")
    assert streams == streaming
    beside = facts is BESIDE and m > 1 and n >= 256
    late = beside and name in ("layer_norm_bf16", "softmax", "softmax_bf16")
    if streams:
        late = name.startswith("softmax") or (beside and name == "layer_norm_bf16")
    assert (len(loops_over(lane, "m")) == 3) == late


@pytest.mark.parametrize("facts", [AVX512, AVX2, NARROW], ids=["16 lanes", "8 lanes", "4 lanes"])
@pytest.mark.parametrize("rows", [1, 2, 5])
def test_several_results_and_an_index(rows: int, facts: Facts) -> None:
    x = aligned(np.random.default_rng(rows).standard_normal((rows, 96)).astype(np.float32))
    arguments = {"x": x, "best": aligned(np.zeros(rows, np.int32)), "y": aligned(x), "z": aligned(x)}
    run_streaming(reduce_loops(two_results.tile_ir()), arguments, facts)
    e = np.exp(x.astype(np.float64) - x.max(axis=1, keepdims=True))
    scale = 1 / e.sum(axis=1, keepdims=True)
    assert np.array_equal(arguments["best"], x.argmax(axis=1))
    np.testing.assert_allclose(arguments["y"], e * scale, rtol=1e-5)
    np.testing.assert_allclose(arguments["z"], x * scale + 1, rtol=1e-5)


@pytest.mark.parametrize("streaming", [by_batch, in_place, kept_condition, columns], ids=lambda k: k.name)
@pytest.mark.parametrize("facts", [AVX512, NARROW], ids=["16 lanes", "4 lanes"])
def test_other_loops_over_rows(streaming: Any, facts: Facts) -> None:
    random = np.random.default_rng(5)
    shape = (3, 4, 32) if streaming is by_batch else (4, 32)
    arguments = {"x": aligned(random.standard_normal(shape).astype(np.float32))}
    x = arguments["x"].astype(np.float64)
    total = x.sum(axis=-1, keepdims=True)
    expected = {"by_batch": x - total, "in_place": x - total, "kept_condition": np.where(total > 0, x, -x)}
    if streaming is columns:
        arguments["w"] = aligned(random.standard_normal(48).astype(np.float32))
        expected["columns"] = arguments["w"] * total
    if streaming is not in_place:
        arguments["y"] = aligned(np.full(shape[:-1] + ((48,) if streaming is columns else shape[-1:]), 7, np.float32))
    run_streaming(reduce_loops(streaming.tile_ir()), arguments, facts)
    np.testing.assert_allclose(arguments.get("y", arguments["x"]), expected[streaming.name], rtol=2e-5, atol=2e-5)


ONCE = replace(AVX512, requests=Requests(line_by_line=True))
TWICE = replace(AVX512, requests=Requests(row_requests=2, stream_requests=1, request_level=1))


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("name", "facts", "requests", "ahead"), [
    ("softmax", AVX512, 3, 1 << 14), ("rms_norm", AVX512, 4, 1 << 14), ("layer_norm", AVX512, 3, 1 << 14),
    ("softmax", ONCE, 1, 1 << 11), ("rms_norm", ONCE, 1, 1 << 11), ("layer_norm", ONCE, 1, 1 << 11),
    ("softmax", TWICE, 2, 1 << 14), ("rms_norm", TWICE, 2, 1 << 14), ("gelu", AVX512, 3, 1 << 14),
    ("gelu", TWICE, 1, 1 << 12), ("gelu", ONCE, 1, 1 << 11)])
@pytest.mark.parametrize("n", [64, 8192])
def test_each_line_is_asked_for_at_a_distance(name: str, facts: Facts, requests: int, ahead: int, n: int,
                                              monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked for lies whole rows ahead, as many as make up a distance: for rows of 8192, one. Several times in
    all, as often as the target wants, or once where memory is read line by line. What is one stream, as of GELU, lies
    that distance ahead."""
    entry = LIBRARY[name]
    m = (8 << 15) // (4 * n)
    arguments = {k: aligned(v) if isinstance(v, np.ndarray) else v
                 for k, v in entry.make_arguments(np.random.default_rng(1), {"M": m, "N": n}).items()}
    asked: list[int] = []

    def record(program: interpret.Program, op: Op) -> Any:
        assert op.attributes["level"] == facts.requests.request_level
        address, _ = program.address(op, 0)
        return lambda environment: asked.append(address(environment))

    monkeypatch.setitem(interpret._BUILDERS, "prefetch", record)
    run_streaming(reduce_loops(entry.kernel.tile_ir()), arguments, facts)
    places = np.array(asked) - np.min(asked)
    lines = np.bincount(places // 64)
    assert not (places % 64).any()
    # All but the first and the last rows: a line is asked for up to three distances ahead.
    far = 3 * np.maximum(ahead, 4 * n) // 64
    assert len(lines) > 2 * far + 100 and (lines[far:-far] == requests).all()


WRITTEN = replace(AVX512, requests=Requests(store_ahead_bytes=1024))


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", ["softmax", "rms_norm", "layer_norm", "gelu", "softmax_bf16", "rope_interleaved"])
@pytest.mark.parametrize("late", [0, 1])
def test_lines_are_asked_for_to_be_written(name: str, late: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each but the first KiB, before it is stored to, once or as often as it has pieces; nothing goes past the caches.
    What is read is asked for once."""
    entry = LIBRARY[name]
    shape = {"T": 64, "H": 8, "R": 64, "position": 0} if "rope" in name else {"M": 68, "N": 1024}
    arguments = {k: aligned(v) if isinstance(v, np.ndarray) else v
                 for k, v in entry.make_arguments(np.random.default_rng(1), shape).items()}
    asked: list[int] = []
    read: list[int] = []

    def record(program: interpret.Program, op: Op) -> Any:
        address, _ = program.address(op, 0)
        places = asked if op.attributes.get("write") else read
        return lambda environment: places.append(address(environment))

    monkeypatch.setitem(interpret._BUILDERS, "prefetch", record)
    facts = replace(WRITTEN, requests=WRITTEN.requests._replace(late_stores=late))
    lane = run_streaming(reduce_loops(entry.kernel.tile_ir()), arguments, facts)
    assert not any(op.attributes.get("streaming") for op in lane.walk())
    (result,) = (v for k, v in arguments.items() if k in ("y", "out"))
    lines = np.bincount((np.array(asked) - np.min(asked)) // 64)
    assert len(lines) == result.nbytes // 64 and 1 <= lines.min() <= lines.max() <= 2
    assert name in ("softmax_bf16", "rope_interleaved") or Counter(read).most_common(1)[0][1] == 1


def test_small_results_are_not_asked_for_to_be_written() -> None:
    function = reduce_loops(LIBRARY["gelu"].kernel.tile_ir())
    canonicalize(function)
    for rows, asks in ((16, False), (64, True)):
        dims = {"M": DimClass(rows, 1), "N": DimClass(512, 64)}
        lane = lower(function, Schedule(), WRITTEN, Specialization(dims, dict.fromkeys("xy", "contiguous")))
        assert any(op.attributes.get("write") for op in lane.walk()) == asks
