"""Contractions whose sums lie in tensor memory (sm_100a): at the lane station, rehearsed, as PTX on the emulator."""

from __future__ import annotations

import re
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sapper as sp
from sapper import Tensor, bf16, emulate, f8e4m3, f32, max, maximum, targets, tiles, whole, zeros
from sapper.codegen.outline import costs_of
from sapper.codegen.pipeline import Compiled, compile_kernel, facts_of, finish_lane, to_lane
from sapper.ir.nodes import Function
from sapper.ir.text import parse_function, print_function
from sapper.ir.verifier import VerificationError, verify
from sapper.kernels import attention_narrow, find
from sapper.lane.interpret import run
from sapper.lane.memory import LaneError, Memory
from sapper.lane.ops import LANE_OPS
from sapper.lane.rehearse import rehearse
from sapper.targets.ptx import assembler
from sapper.tile.ops import TILE_OPS
from sapper.tile.schedule import DimClass, Schedule, Specialization
from tests.strategies.amount import examples

from . import test_narrow as narrow
from .kernels import KERNELS, bf16_nn, bf16_nt, f16_tn, gated
from .left_out import missed, told
from .narrow import block_scaled, unscaled
from .test_chained import TENSORS
from .test_chained import made as made_attention
from .test_chained import specialization as specialization_of_attention
from .test_groups import batched
from .test_matrix import arguments_of, assert_near, expected, specialization

TARGET = targets.target("sm_100a")
SMALL = {"m": 128, "n": 64}
ALONE = {"m": 1}
needs_ptxas = pytest.mark.skipif(assembler.find_tool("ptxas") is None, reason="ptxas is not installed")


def lowered(kernel: Any, schedule: Schedule, known: Specialization | None = None) -> Function:
    return finish_lane(to_lane(kernel.tile_ir(), schedule, facts_of(TARGET), known or specialization(kernel)), TARGET)


def compiled(kernel: Any, schedule: Schedule, columns: int = 64) -> Compiled:
    """For large extents, all multiples of 64."""
    names = [name for name, _ in kernel.parameters]
    dims = {dim: (4096, columns) for _, type in kernel.parameters for dim in type.dims}
    return compile_kernel(kernel, {}, dict.fromkeys(names, "contiguous"), dims, TARGET, schedule, frozenset(names))


def interpret_lane(lane: Function, arguments: dict[str, Any], extents: dict[str, int], workers: int) -> None:
    memory = Memory()
    scratch = sum(size * rows * lanes for size, ((rows, *_), (lanes, *_)) in lane.attributes["scratch"][:1])
    words = [memory.allocate("scratch", scratch * workers) if scratch else 0, scratch, memory.allocate("sync", 1024)]
    for slot in lane.attributes["slots"]:
        name, _, kind = slot.partition(".")
        value = memory.add_array(name, arguments[name]) if kind == "data" else extents.get(kind, arguments.get(kind))
        words.append(int(np.float32(value).view(np.int32)) if kind == "scale" else value)
    run(lane, np.array(words), memory, workers=workers)


def names_of(lane: Function) -> set[str]:
    return {op.name for op in lane.walk()}


# At the lane station.


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.name)
def test_lane_ir(kernel: Any) -> None:
    extents = {"M": 160, "N": 96, "K": 96}
    arguments = arguments_of(kernel, extents)
    wanted = expected(kernel, arguments)
    lane = lowered(kernel, Schedule(tile=SMALL, cluster=ALONE))
    verify(lane, LANE_OPS)
    text = print_function(lane)
    lane = parse_function(text, {"tile": TILE_OPS, "lane": LANE_OPS})
    assert print_function(lane) == text and rehearse(lane) == [] and lane.attributes["warps"] == 8
    interpret_lane(lane, arguments, extents, workers=2)
    assert_near(arguments[list(arguments)[-1]], wanted)


@pytest.mark.parametrize("schedule", [Schedule(tile=SMALL, stream="k", cluster=ALONE),
                                      Schedule(tile=SMALL, split={"k": 3}, cluster=ALONE)], ids=["stream", "split"])
@pytest.mark.parametrize("kernel", [bf16_nt, gated], ids=lambda k: k.name)
def test_workers_that_share_the_depth(kernel: Any, schedule: Schedule) -> None:
    """All of a tile's sums are in registers where they are handed over."""
    lane = lowered(kernel, schedule)
    assert "take_over" in names_of(lane) and rehearse(lane) == []
    extents = {"M": 136, "N": 80, "K": 520}
    arguments = arguments_of(kernel, extents)
    wanted = expected(kernel, arguments)
    interpret_lane(lane, arguments, extents, workers=5)
    assert_near(arguments[list(arguments)[-1]], wanted)


@pytest.mark.parametrize("tile", [SMALL, {"m": 256, "n": 128}], ids=str)
@pytest.mark.parametrize("kernel", [unscaled, block_scaled], ids=lambda k: k.name)
def test_elements_of_8_bits_are_summed_anew_in_each_stage(kernel: Any, tile: dict[str, int]) -> None:
    extents = narrow.extents_of(144, 144, 272)
    arguments = narrow.arguments_of(kernel, extents)
    wanted = narrow.expected(kernel, arguments)
    known = Specialization({d: DimClass(4096, 16) for d in ("M", "N", "K", "KB", "NB")},
                           dict.fromkeys(arguments, "contiguous"), frozenset("ab"))
    lane = lowered(kernel, Schedule(tile=tile, cluster=ALONE), known)
    products = [op for op in lane.walk() if op.name == "sums_multiply"]
    assert {op.attributes["dtype"] for op in products} == {f8e4m3} and rehearse(lane) == []
    interpret_lane(lane, arguments, extents, workers=2)
    narrow.assert_near(arguments["c"], wanted)


@pytest.fixture(params=[128, 256])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Queries of a block of attention, as long as the test lasts."""
    monkeypatch.setattr(attention_narrow, "QUERY_BLOCK", request.param)
    return int(request.param)


@pytest.mark.parametrize("name", ["matmul_nt_i8", "matmul_nt_u8", "matmul_nt_i8_scaled"])
def test_integers_of_8_bits_are_exact(name: str) -> None:
    """u8 by i8 among them; at the lane station, and as PTX."""
    entry = find(name)
    shape = {"M": 144, "N": 80, "K": 336}
    tensors = [name for name, type in entry.kernel.parameters if hasattr(type, "dims")]
    dims = {dim: DimClass(4096, 16) for dim in "MNK"}
    known = Specialization(dims, dict.fromkeys(tensors, "contiguous"), frozenset("ab"))
    lane = lowered(entry.kernel, Schedule(tile=SMALL, cluster=ALONE), known)
    assert rehearse(lane) == [] and "sums_multiply" in names_of(lane)
    for lazy in (None, False, True):
        arguments = entry.make_arguments(np.random.default_rng(5), shape)
        wanted = entry.reference(arguments)
        if lazy is None:
            interpret_lane(lane, arguments, shape, workers=2)
        else:
            counters = emulate.run(entry.kernel, *arguments.values(), target="sm_100a", workers=2, aligned="ab",
                                   options=emulate.Options(lazy=lazy)).counters
            assert counters.instructions["tcgen05.mma.cta_group::1.kind::i8"]
        assert entry.compare(arguments, wanted) is None, entry.compare(arguments, wanted)


def attention(size: int = 64) -> Any:
    """Causal, of heads of that size."""
    return attention_narrow.make_attention(bf16, size, size)


def test_attention(block: int) -> None:
    """One group of warps, or two, each with 128 queries; the loop comes twice, the second time with masks."""
    lane = lowered(attention(), Schedule(), specialization_of_attention())
    assert {"sums_multiply", "sums_multiply_rows", "sums_store"} <= names_of(lane)
    assert lane.attributes["warps"] == 4 * (block // 128) + 4 and rehearse(lane) == []
    for shape in ({"T": 40, "H": 1, "G": 1, "position": 45}, {"T": 145, "H": 1, "G": 2, "position": 151}):
        entry = find("attention_bf16_64")
        arguments, wanted = made_attention(entry, shape)
        interpret_lane(lane, arguments, {**shape, "P": arguments["keys"].shape[1]}, workers=2)
        assert entry.compare(arguments, wanted) is None, entry.compare(arguments, wanted)


WAITS = ("signal_wait", "signal_arrive", "signal_expect", "signal_start", "signal_fence", "tensor_copy", "sync_warps",
         "sums_signal", "sums_acquire", "sums_release", "sums_open", "sums_close")


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", WAITS)
def test_the_rehearsal_finds_what_is_left_out_of_a_product(name: str) -> None:
    """Each op of that name, left out by itself. After its last loads a warp tells nobody but those that it meets."""
    assert missed(lowered(bf16_nt, Schedule(tile=SMALL, cluster=ALONE)), name) == []


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", [*WAITS, "store_fence"])
def test_the_rehearsal_finds_what_is_left_out_of_attention(name: str) -> None:
    assert missed(lowered(attention(), Schedule(), specialization_of_attention()), name) == []


def program(body: str, near_bytes: int = 8192) -> Function:
    text = f"""lane func @f() {{lanes = 32, slots = [], scratch = [], warps = 4, near_bytes = {near_bytes}}} {{
      %near: s64 = near_memory
      %zero: s64 = s_const {{value = 0}}
      %far: s64 = s_const {{value = {32 << 16}}}
      {body}
    }}"""
    return parse_function(text, {"lane": LANE_OPS})


LOAD = "%a: row<f32>, %b: row<f32>, %c: row<f32>, %d: row<f32> = sums_load %far"


@pytest.mark.parametrize(("body", "found"), [
    (LOAD, "found row 32 at hand of warp 0; expected one of rows 0"),
    (LOAD.replace("%far", "%zero"), "expected columns that sums_open set aside"),
    ("sums_close %zero {columns = 32}", "found no columns that are set aside; expected sums_open before"),
    ("sums_open %near {columns = 32}", "found columns that are set aside; expected sums_close of these before")])
def test_what_the_lane_machine_refuses(body: str, found: str) -> None:
    memory = Memory()
    with pytest.raises(LaneError, match=re.escape(found)):
        run(program(body), np.array([0, 0, memory.allocate("sync", 1024)]), memory)


@pytest.mark.parametrize(("body", "found"), [
    ("sums_open %near {columns = 96}", "columns = 96"),
    ("sums_multiply %near, %near, %zero, %zero {dtype = :bf16, rows = 64, columns = 64, left_rows = true, "
     "right_rows = true}", "64 x 64 sums"),
    ("sums_multiply %near, %near, %zero, %zero {dtype = :f8e4m3, rows = 128, columns = 64, left_rows = false, "
     "right_rows = true}", "left_rows = False"),
    ("sums_multiply %near, %near, %zero, %zero {dtype = :i8, right_dtype = :bf16, rows = 128, columns = 64, "
     "left_rows = true, right_rows = true}", "right_dtype"),
    ("%a: row<f32> = sums_load %zero", "1 results")])
def test_what_the_verifier_refuses(body: str, found: str) -> None:
    with pytest.raises(VerificationError, match=re.escape(found)):
        verify(program(body), LANE_OPS)


# As PTX on the emulator.


@pytest.mark.sampled(2)
@pytest.mark.parametrize("lazy", [False, True], ids=["eager", "lazy"])
@pytest.mark.parametrize("columns", [64, 256])
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.name)
def test_on_the_emulator(kernel: Any, columns: int, lazy: bool) -> None:
    """Several tiles for each of two workers, of which one has more; edges in all three directions."""
    wide = columns // 2 if kernel is gated and columns > 64 else columns
    names = [name for name, _ in kernel.parameters]
    extents = {"M": 128 + 48, "N": wide + 48, "K": 336 if columns == 64 else 144}
    arguments = arguments_of(kernel, extents)
    wanted = expected(kernel, arguments)
    counters = emulate.run(kernel, *arguments.values(), target="sm_100a", workers=2, aligned=names,
                           schedule=Schedule(tile={"m": 128, "n": wide}, cluster=ALONE),
                           options=emulate.Options(lazy=lazy)).counters
    assert_near(arguments[names[-1]], wanted)
    assert counters.instructions["tcgen05.mma.cta_group::1.kind::f16"]
    assert not any(name.startswith("mma.sync") for name in counters.instructions)
    assert counters.shared_cycles == counters.shared_ideal


@pytest.mark.sampled(2)
@pytest.mark.parametrize("lazy", [False, True], ids=["eager", "lazy"])
@pytest.mark.parametrize(("kernel", "schedule", "extents"), [
    (bf16_nt, Schedule(tile=SMALL, cluster={"m": 2}), {"M": 272, "N": 80, "K": 336}),
    (f16_tn, Schedule(tile={"m": 128, "n": 128}, cluster={"n": 2}), {"M": 144, "N": 272, "K": 80}),
    (bf16_nn, Schedule(tile={"m": 128, "n": 256}, cluster={"m": 4}), {"M": 400, "N": 80, "K": 144})],
    ids=["rows", "columns", "four workers"])
def test_clusters(kernel: Any, schedule: Schedule, extents: dict[str, int], lazy: bool) -> None:
    arguments = arguments_of(kernel, extents)
    wanted = expected(kernel, arguments)
    counters = emulate.run(kernel, *arguments.values(), target="sm_100a", workers=4, aligned="abc", schedule=schedule,
                           options=emulate.Options(lazy=lazy)).counters
    assert_near(arguments["c"], wanted)
    assert any(re.match(r"tcgen05\.commit.*multicast::cluster", name) for name in counters.instructions)


@pytest.mark.parametrize("lazy", [False, True], ids=["eager", "lazy"])
def test_shared_depths_scales_and_more_dimensions(lazy: bool) -> None:
    options = emulate.Options(lazy=lazy)
    extents = {"M": 136, "N": 80, "K": 520}
    arguments = arguments_of(bf16_nt, extents)
    wanted = expected(bf16_nt, arguments)
    emulate.run(bf16_nt, *arguments.values(), target="sm_100a", workers=5, aligned="abc", options=options,
                schedule=Schedule(tile=SMALL, stream="k", cluster=ALONE))
    assert_near(arguments["c"], wanted)
    arguments = narrow.arguments_of(block_scaled, narrow.extents_of(176, 208, 272))
    wanted = narrow.expected(block_scaled, arguments)
    counters = emulate.run(block_scaled, *arguments.values(), target="sm_100a", workers=2, aligned="abc",
                           options=options).counters
    narrow.assert_near(arguments["c"], wanted)
    assert counters.instructions["tcgen05.mma.cta_group::1.kind::f8f6f4"]
    arguments = arguments_of(batched, {"B": 3, "M": 144, "N": 88, "K": 80})
    wanted = expected(batched, arguments)
    emulate.run(batched, *arguments.values(), target="sm_100a", workers=2, aligned="abc", options=options)
    assert_near(arguments["c"], wanted)


def test_rows_of_which_memory_says_how_many_there_are() -> None:
    """No box of sums: what lies behind the rows stays."""
    entry = find("masked_matmul_nt_bf16_bf16")
    arguments = entry.make_arguments(np.random.default_rng(3), {"B": 3, "M": 160, "N": 128, "K": 128})
    wanted = entry.reference(arguments)
    counters = emulate.run(entry.kernel, *arguments.values(), target="sm_100a", workers=2, aligned=["a", "w"]).counters
    assert entry.compare(arguments, wanted) is None, entry.compare(arguments, wanted)
    assert any(name.startswith("tcgen05.mma") for name in counters.instructions)


@settings(deadline=None, max_examples=examples(6))
@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 300), st.integers(1, 5), st.integers(0, 3))
def test_any_extents(m: int, n: int, k: int, workers: int, kernel: int) -> None:
    chosen = KERNELS[kernel]
    extents = {"M": -(-m // 8) * 8, "N": -(-n // 8) * 8, "K": -(-k // 8) * 8}
    arguments = arguments_of(chosen, extents)
    wanted = expected(chosen, arguments)
    names = list(arguments)
    known = compile_kernel(chosen, {}, dict.fromkeys(names, "contiguous"), dict.fromkeys("MNK", (4096, 1)), TARGET,
                           Schedule(tile=SMALL, cluster=ALONE), frozenset(names))
    emulate.run(chosen, *arguments.values(), target="sm_100a", workers=workers, code=known,
                options=emulate.Options(lazy=True))
    assert_near(arguments[names[-1]], wanted)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("lazy", [False, True], ids=["eager", "lazy"])
def test_attention_on_the_emulator(block: int, lazy: bool) -> None:
    entry, kernel = find("attention_bf16_64"), attention()
    arguments, wanted = made_attention(entry, {"T": 145, "H": 1, "G": 2, "position": 51})
    counters = emulate.run(kernel, *arguments.values(), target="sm_100a", workers=2, aligned=TENSORS,
                           options=emulate.Options(lazy=lazy)).counters
    assert entry.compare(arguments, wanted) is None, entry.compare(arguments, wanted)
    assert counters.instructions["tcgen05.st.sync.aligned.16x128b.x8.b32"]
    assert counters.shared_cycles == counters.shared_ideal


T, P = sp.dims("T P")


@sp.kernel
def watched(q: Tensor[bf16, T, 64], keys: Tensor[bf16, P, 64], values: Tensor[bf16, P, 64], out: Tensor[f32, T, 64],
            seen: Tensor[f32, T]):
    """What is carried is read in each round, before the next weighted values are added."""
    for t in tiles(T):
        d, e = whole(64), whole(64)
        acc = zeros(t, e, dtype=f32)
        highest = zeros(t, dtype=f32)
        for p in tiles(P):
            highest = maximum(highest, max(acc, over=e))
            weight = q[t, d] @ keys[p, d]
            acc = acc + weight.to(bf16) @ values[p, e]
        out[t, e] = acc
        seen[t] = highest


@pytest.mark.parametrize("lazy", [False, True], ids=["eager", "lazy"])
def test_what_is_read_in_each_round_is_added_at_once(lazy: bool) -> None:
    random = np.random.default_rng(3)
    q, keys, values = (random.standard_normal((n, 64)).astype(ml_dtypes.bfloat16) for n in (300, 200, 200))
    out, seen = np.zeros((300, 64), np.float32), np.zeros(300, np.float32)
    counters = emulate.run(watched, q, keys, values, out, seen, target="sm_100a", workers=2,
                           aligned=["q", "keys", "values", "out"], options=emulate.Options(lazy=lazy)).counters
    assert counters.instructions["tcgen05.mma.cta_group::1.kind::f16"]
    q, keys, values = (x.astype(np.float64) for x in (q, keys, values))
    weight = (q @ keys.T).astype(ml_dtypes.bfloat16).astype(np.float64)
    sums = [weight[:, :n] @ values[:n] for n in range(0, 200, 64)]
    np.testing.assert_allclose(out, weight @ values, rtol=1e-2, atol=2.0)      # f32 may round a weight the other way
    np.testing.assert_allclose(seen, np.max([one.max(axis=1) for one in sums], axis=0), rtol=1e-2, atol=2.0)


WAIT = r"mbarrier\.try_wait\.parity\.shared::cta\.b64 (%p\d+), \[[^]]*\], %r\d+;"
PASSES = r"setp.eq.s32 \1, 0, 0;"
FAULTS = {
    "stores do not wait for sums": (WAIT, PASSES, 0),
    "copies do not wait for free stages": (WAIT, PASSES, 1),
    "products do not wait for free sums": (WAIT, PASSES, 2),
    "products do not wait for full stages": (WAIT, PASSES, 3),
    "no commit": (r"@%p\d+ tcgen05\.commit[^;]*;", "", 0),
    "no wait for loads": (r"tcgen05\.wait::ld\.sync\.aligned;", "", 0),
    "no fence after": (r"tcgen05\.fence::after_thread_sync;", "", 0),
    "no fence before": (r"tcgen05\.fence::before_thread_sync;", "", 0),
    "never freed": (r"tcgen05\.dealloc[^;]*;", "", 0),
    "fewer columns": (r"(tcgen05\.alloc[^;]*), 128;", r"\1, 64;", 0),
    "a swizzle of 64 bytes": (r"0x40004040", hex(0x40004040 ^ (2 ^ 4) << 29), None),
    "rows 512 bytes apart": (r"0x40004040", hex(0x40004040 - 32), None),
    "sums of f16": (r"0x8100490", "0x8100480", None),
    "half of the columns": (r"0x8100490", "0x8080490", None),
    "always added": (r"setp\.ne\.s64 (%p\d+), (%rd\d+), 0;", r"setp.eq.s64 \1, \2, \2;", None),
    "another warp's lanes": (r"(shl\.b64|mul\.lo\.s64) (%rd\d+), (%rd\d+), (65536|16);", r"mov.b64 \2, 0;", None)}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_caught(fault: str) -> None:
    """On the emulator: an error, a wrong result, or nobody can go on."""
    made = compiled(bf16_nt, Schedule(tile=SMALL, cluster=ALONE))
    extents = {"M": 128, "N": 192, "K": 384}
    arguments = arguments_of(bf16_nt, extents)
    wanted = expected(bf16_nt, arguments)
    if not told(made, FAULTS[fault], arguments, extents):
        with pytest.raises(AssertionError):
            assert_near(arguments["c"], wanted)


# What is chosen, and what it costs.


def shape_of(kernel: Any, extents: dict[str, int]) -> tuple[int, bool]:
    """Columns of the tile that the model takes, and whether workers share its depth."""
    names = [name for name, _ in kernel.parameters]
    known = Specialization({d: DimClass(n, 64) for d, n in extents.items()}, dict.fromkeys(names, "contiguous"),
                           frozenset(names[:-1]))
    lane = lowered(kernel, Schedule(), known)
    multiply = next(op for op in lane.walk() if op.name == "sums_multiply")
    return multiply.attributes["columns"], "take_over" in names_of(lane)


def test_a_worker_outlasts_what_others_signal_it() -> None:
    """Products of a cluster arrive at every worker by themselves: the copying warp waits for all stages at its end."""
    waits = {workers: sum(op.name == "signal_wait" for op in lowered(
        bf16_nt, Schedule(tile=SMALL, cluster={"m": workers})).walk()) for workers in (1, 2)}
    assert waits[2] - waits[1] == 4


def test_the_tile_that_takes_least_time_by_the_model() -> None:
    """On 148 processors."""
    assert shape_of(bf16_nt, {"M": 8192, "N": 8192, "K": 1024}) == (256, False)
    assert shape_of(bf16_nt, {"M": 1536, "N": 1536, "K": 1024}) == (128, False)
    assert shape_of(bf16_nt, {"M": 128, "N": 4096, "K": 16384}) == (128, True)
    assert shape_of(gated, {"M": 8192, "N": 8192, "K": 1024}) == (128, False)


def test_a_product_occupies_the_tensor_cores_as_long_as_its_descriptor_says() -> None:
    """128 x 256 x 16 in 128 cycles: 4096 multiply-adds each; at 1.85 GHz the 2.25 PFLOP/s of a B200's data sheet."""
    made = compiled(bf16_nt, Schedule(tile={"m": 128, "n": 256}, cluster=ALONE))
    item = next(item for item in made.made.machine.body if getattr(item, "row", None) is not None
                and item.row.mnemonic.startswith("tcgen05.mma"))
    cost = costs_of(TARGET).cost_of_item(item, "sm_100a")
    assert (cost.unit, cost.cycles, cost.operations) == ("tensor", 128, 2 * 128 * 256 * 16)
    assert TARGET.processors * 1.85e9 * cost.operations / cost.cycles == pytest.approx(2.25e15, rel=0.03)


@needs_ptxas
def test_no_tile_spills() -> None:
    texts = [compiled(kernel, Schedule(tile={"m": 128 * groups, "n": columns // (2 if kernel is gated else 1)},
                                       cluster=ALONE)).text().replace(f".entry {kernel.name}(",
                                                                      f".entry {kernel.name}_{groups}_{columns}(")
             for kernel in (bf16_nt, gated) for groups, columns in ((1, 256), (2, 128), (1, 128))
             if kernel is bf16_nt or groups == 1]
    texts += [compiled(kernel, Schedule(tile={"m": 256, "n": 128})).text() for kernel in (unscaled, block_scaled)]
    texts.append(compiled(bf16_nt, Schedule(tile={"m": 128, "n": 128}, stream="k", cluster=ALONE)).text())
    names = [re.findall(r"\.entry (\w+)\(", text)[0] for text in texts]
    found = assembler.assemble(texts, "sm_100a")
    assert {name: made.spilled_bytes for name, made in found.items()} == dict.fromkeys(names, 0)


@needs_ptxas
def test_attention_does_not_spill(block: int) -> None:
    known, texts = specialization_of_attention(), []
    for size in (64, 128):
        texts.append(compile_kernel(attention(size), {}, known.strides, dict.fromkeys("THGP", (4096, 1)), TARGET, None,
                                    known.aligned).text())
        assert f".reqntid {block + 128}" in texts[-1]
        budgets = [int(number) for number in re.findall(r"setmaxnreg\.\w+\.sync\.aligned\.u32 (\d+);", texts[-1])]
        # A thread begins with 168 of 65536 registers, by eights; none but those that are given up can be taken.
        assert budgets == ([] if block == 128 else [240, 24]) and 256 * 240 + 128 * 24 == 384 * 168
    assert {made.spilled_bytes for made in assembler.assemble(texts, "sm_100a").values()} == {0}
